"""Joining the boxes of one image: non-maximum suppression, weighted boxes fusion.

Every function takes a table of predictions (image, x1, y1, x2, y2, label, score) and returns one,
ordered by image, then descending score. Boxes of different images or classes never meet; equal
scores keep the table's order.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torchvision.ops import batched_nms

from .evaluate import CORNERS, pair_iou, ranks, read_boxes

COLUMNS = ("image", *CORNERS, "label", "score")


def nms(predictions: pd.DataFrame, *, iou: float = 0.5) -> pd.DataFrame:
    """Suppression per image and class: a box goes if a better one overlaps it by more than `iou`.

    >>> boxes = pd.DataFrame({"image": 0, "x1": [0, 1, 0], "y1": 0, "x2": 9, "y2": 9, "score": 0.5})
    >>> nms(boxes.assign(label=[1, 1, 2]))["label"].tolist()
    [1, 2]
    """
    image, corners, label, score = read_boxes(predictions, "predictions")
    parts = corners.T.copy(), score, _group(image, label)
    tensors = [torch.from_numpy(part) for part in parts]
    return _ordered(predictions.iloc[np.sort(batched_nms(*tensors, iou).numpy())])


def wbf(predictions: pd.DataFrame, *, iou: float = 0.55, views: int = 1) -> pd.DataFrame:
    """Weighted boxes fusion (Solovyev et al. 2021, arXiv 1910.13302) of several views.

    A box joins the cluster of its image and class whose fused box it overlaps most, if by more
    than `iou`; fused corners are means weighted by score. views: how many there are, also those
    that found nothing: the mean score of n boxes is multiplied by min(views, n) / views.

    >>> boxes = pd.DataFrame({"image": 0, "x1": [0, 2], "y1": 0, "x2": 9, "y2": 9, "label": 1})
    >>> wbf(boxes.assign(score=[0.9, 0.3]), views=2)["x1"].round(3).tolist()
    [0.5]
    """
    image, corners, label, score = read_boxes(predictions, "predictions")
    order = np.lexsort((-score, label, image))
    image, label, score, corners = image[order], label[order], score[order], corners[:, order]
    cluster = _cluster(corners, score, ranks(_group(image, label)), iou)
    founders, cluster = np.unique(cluster, return_inverse=True)
    count, total = np.bincount(cluster), np.bincount(cluster, score)
    fused = np.array([np.bincount(cluster, score * corner) for corner in corners])
    alone = (count == 1) | (total == 0)
    fused = np.where(alone, corners[:, founders], fused / np.where(total == 0, 1, total))
    columns = dict(zip(CORNERS, fused, strict=True))
    columns |= {"label": label[founders], "score": total / count * np.minimum(views, count) / views}
    table = pd.DataFrame({"image": image[founders], **columns})
    return _ordered(table.astype({"image": np.int64, "label": np.int64}))


def one_per_class(predictions: pd.DataFrame) -> pd.DataFrame:
    """At most one box per image and class, the best scored, as in the NIH box list."""
    read_boxes(predictions, "predictions")
    return _ordered(predictions).drop_duplicates(["image", "label"], ignore_index=True)


def _group(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """A whole number for each pair of image and class."""
    return (image * (label.max(initial=0) + 1) + label).astype(np.int64)


def _cluster(corners: np.ndarray, score: np.ndarray, rank: np.ndarray, iou: float) -> np.ndarray:
    """The founder of each box's cluster; boxes [4,n] by image and class, then descending score.

    Step r places the r-th box of every image and class; the clusters of these stand one after the
    other from the place of their first box on, in the order of their founding.
    """
    n = len(score)
    start = np.arange(n) - rank
    by_rank = np.argsort(rank, kind="stable")
    steps = np.searchsorted(rank[by_rank], np.arange(rank.max(initial=-1) + 2))
    founder, cluster = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    number = np.zeros(n, dtype=np.int64)  # clusters so far, kept at the place of the first box
    fused, weighted, total = corners.copy(), np.zeros_like(corners), np.zeros(n)
    for first, stop in zip(steps[:-1], steps[1:], strict=True):
        box = by_rank[first:stop]
        base = start[box]
        slot = np.full(len(box), -1)
        if first:
            slot = _nearest(corners[:, box], fused, base, number[base], iou)
        founds = slot < 0
        slot[founds] = base[founds] + number[base[founds]]
        number[base[founds]] += 1
        founder[slot[founds]] = box[founds]
        cluster[box] = founder[slot]
        weighted[:, slot] += score[box] * corners[:, box]
        total[slot] += score[box]
        fused[:, slot[founds]] = corners[:, box[founds]]
        joins = slot[~founds & (total[slot] > 0)]
        fused[:, joins] = weighted[:, joins] / total[joins]
    return cluster


def _nearest(boxes, fused, base: np.ndarray, number: np.ndarray, iou: float) -> np.ndarray:
    """Place of the cluster that each box [4,m] overlaps most, -1 unless by more than `iou`."""
    runs = np.cumsum(number) - number
    of = np.repeat(np.arange(len(base)), number)
    slot = (base - runs)[of] + np.arange(len(of))
    overlap = pair_iou(boxes[:, of], fused[:, slot])
    best = np.maximum.reduceat(overlap, runs)
    first = np.minimum.reduceat(np.where(overlap == best[of], slot, fused.shape[1]), runs)
    return np.where(best > iou, first, -1)


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    order = np.lexsort((-table["score"].to_numpy(float), table["image"].to_numpy(float)))
    return table.iloc[order].reset_index(drop=True)
