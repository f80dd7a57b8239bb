"""Joining the boxes of one image: non-maximum suppression, weighted boxes fusion.

Every function takes a table of predictions (image, x1, y1, x2, y2, label, score) and returns one,
ordered by image, then descending score. Boxes of different images or classes never meet; equal
scores keep the table's order. `sizes`: (width, height) by image, if the boxes are to be held
against them.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torchvision.ops import batched_nms

from ..data.boxes import Boxes, Sizes, in_order, places, read_boxes
from ..data.tables import CORNERS
from .evaluate import pair_iou, ranks

COLUMNS = ("image", *CORNERS, "label", "score")


def nms(predictions: pd.DataFrame, *, iou: float = 0.5, sizes: Sizes = None) -> pd.DataFrame:
    """Suppression per image and class: a box goes if a better one overlaps it by more than `iou`.

    >>> boxes = pd.DataFrame({"image": 0, "x1": [0, 1, 0], "y1": 0, "x2": 9, "y2": 9, "score": 0.5})
    >>> nms(boxes.assign(label=[1, 1, 2]))["label"].tolist()
    [1, 2]
    """
    found, _, place = _read(predictions, sizes)
    parts = found.corners.T.copy(), found.score, _group(place, found.label)
    kept = np.sort(batched_nms(*map(torch.from_numpy, parts), iou).numpy())
    return _ordered(predictions.iloc[kept], place[kept], found.score[kept])


def wbf(
    predictions: pd.DataFrame, *, iou: float = 0.55, views: int = 1, sizes: Sizes = None
) -> pd.DataFrame:
    """Weighted boxes fusion (Solovyev et al. 2021, arXiv 1910.13302) of several views.

    A box joins the cluster of its image and class whose fused box it overlaps most, if by more
    than `iou`; fused corners are means weighted by score. views: how many there are, also those
    that found nothing: the mean score of n boxes is multiplied by min(views, n) / views.

    >>> boxes = pd.DataFrame({"image": 0, "x1": [0, 2], "y1": 0, "x2": 9, "y2": 9, "label": 1})
    >>> wbf(boxes.assign(score=[0.9, 0.3]), views=2)["x1"].round(3).tolist()
    [0.5]
    """
    (_, corners, label, score), ids, place = _read(predictions, sizes)
    order = np.lexsort((-score, label, place))
    place, label, score, corners = place[order], label[order], score[order], corners[:, order]
    cluster = _cluster(corners, score, ranks(_group(place, label)), iou)
    founders, cluster = np.unique(cluster, return_inverse=True)
    count, total = np.bincount(cluster), np.bincount(cluster, score)
    fused = np.array([np.bincount(cluster, score * corner) for corner in corners])
    alone = (count == 1) | (total == 0)
    fused = np.where(alone, corners[:, founders], fused / np.where(total == 0, 1, total))
    columns = dict(zip(CORNERS, fused, strict=True))
    table = pd.DataFrame({"image": ids[place[founders]], **columns, "label": label[founders]})
    score = total / count * np.minimum(views, count) / views
    return _ordered(table, place[founders], score.clip(max=1))  # rounding may leave more


def one_per_class(predictions: pd.DataFrame) -> pd.DataFrame:
    """At most one box per image and class, the best scored, as in the NIH box list."""
    found, _, place = _read(predictions)
    table = _ordered(predictions, place, found.score)
    return table.drop_duplicates(["image", "label"], ignore_index=True)


def _read(predictions: pd.DataFrame, sizes: Sizes = None) -> tuple[Boxes, np.ndarray, np.ndarray]:
    """The boxes, the ids of their images in order, and the place of each box's image among them."""
    found = read_boxes(predictions, "predictions", sizes=sizes)
    ids = in_order(pd.unique(found.image))
    return found, ids, places(found.image, ids)


def _group(place: np.ndarray, label: np.ndarray) -> np.ndarray:
    """A whole number for each pair of image and class."""
    return place * (label.max(initial=0) + 1) + label


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


def _ordered(table: pd.DataFrame, place: np.ndarray, score: np.ndarray) -> pd.DataFrame:
    """The table with this `score`, by image, then descending score."""
    return table.assign(score=score).iloc[np.lexsort((-score, place))].reset_index(drop=True)
