"""Joining boxes of one image: non-maximum suppression, soft suppression and weighted boxes fusion.

Every function takes a table of predictions (image, x1, y1, x2, y2, label, score) and returns one, ordered by
image, then descending score. Boxes of different images or classes never meet. Equal scores keep the table's
order, so equal tables give equal results. The whole set is worked on at once: loops run over ranks within an
image and class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .evaluate import CORNERS, _rank, pair_iou, read_columns, refuse

COLUMNS = ("image", *CORNERS, "label", "score")
CONFIDENCES = ("avg", "max", "box_and_model_avg", "absent_model_aware_avg")


def nms(predictions: pd.DataFrame, *, iou: float = 0.5) -> pd.DataFrame:
    """Non-maximum suppression per image and class: a box goes when a better one overlaps it by more than `iou`.

    All columns are kept. Errors: ValueError for a broken table (see `evaluate.match`) or an `iou` outside
    [0,1].

    >>> boxes = pd.DataFrame({"image": 0, "x1": [0, 1, 0], "y1": 0, "x2": 9, "y2": 9, "label": [1, 1, 2], "score": 0.5})
    >>> nms(boxes)["label"].tolist()
    [1, 2]
    """
    _share(iou, "iou")
    order, group, corners, _ = _grouped(predictions)
    kept = []
    while len(order):
        head = np.arange(len(order)) - _rank(group)
        best = head == np.arange(len(order))
        kept.append(order[best])
        stay = ~best & (pair_iou(corners, corners[:, head]) <= iou)
        order, group, corners = order[stay], group[stay], corners[:, stay]
    return _ordered(predictions.iloc[np.sort(np.concatenate([order, *kept]))])


def soft_nms(
    predictions: pd.DataFrame,
    *,
    method: str = "gaussian",
    sigma: float = 0.5,
    iou: float = 0.5,
    floor: float = 0.001,
) -> pd.DataFrame:
    """Soft-NMS (Bodla et al., arXiv 1704.04503): overlapping boxes lose score instead of being removed.

    In each image and class the best box is taken and the others' scores are multiplied by exp(-IoU^2 / sigma)
    ("gaussian"), or by 1 - IoU where IoU > `iou` ("linear"), and so on with the next best. Boxes left with a
    score not above `floor` are dropped. All columns are kept, `score` is the new one. Errors: ValueError for
    a broken table, an unknown method or arguments out of range.

    >>> boxes = pd.DataFrame({"image": 0, "x1": 0, "y1": 0, "x2": [8, 4], "y2": 9, "label": 1, "score": [0.8, 0.6]})
    >>> soft_nms(boxes)["score"].round(3).tolist()
    [0.8, 0.364]
    """
    if method not in ("gaussian", "linear"):
        raise ValueError(f"method is {method!r}; it must be 'gaussian' or 'linear'")
    if sigma <= 0:
        raise ValueError(f"sigma is {sigma}; it must be above 0")
    _share(iou, "iou")
    _share(floor, "floor")
    order, group, corners, score = _grouped(predictions)
    kept, scores = [order[:0]], [score[:0]]
    while True:
        above = score > floor
        order, group, corners, score = order[above], group[above], corners[:, above], score[above]
        if not len(order):
            break
        head = _heads(group, score)
        best = head == np.arange(len(order))
        kept.append(order[best])
        scores.append(score[best])
        overlap = pair_iou(corners, corners[:, head])
        if method == "gaussian":
            score = score * np.exp(-(overlap**2) / sigma)
        else:
            score = np.where(overlap > iou, score * (1 - overlap), score)
        order, group, corners, score = order[~best], group[~best], corners[:, ~best], score[~best]
    kept, scores = np.concatenate(kept), np.concatenate(scores)
    places = np.argsort(kept)
    return _ordered(predictions.iloc[kept[places]].assign(score=scores[places]))


def wbf(
    predictions: pd.DataFrame,
    *,
    iou: float = 0.55,
    skip: float = 0.0,
    views: int | None = None,
    weights: Sequence[float] | None = None,
    conf_type: str = "avg",
) -> pd.DataFrame:
    """Weighted boxes fusion (Solovyev, Wang & Gabruseva 2021, arXiv 1910.13302) of the boxes of several views.

    A box joins the cluster of its image and class whose fused box it overlaps most, if by more than `iou`;
    fused corners are means weighted by score. views: how many views there are, also those that found nothing
    in an image: a box that n of V views saw has its mean score multiplied by min(V, n) / V. Column `view`
    (0..V-1) says which view a box is from; without it there is one view. weights: one per view, multiplied
    into its scores. Boxes that score below `skip` are left out. conf_type: "avg", "max", "box_and_model_avg"
    or "absent_model_aware_avg" as in the authors' package; with unequal weights "avg" can exceed 1 where one
    view gives several boxes of a cluster, "box_and_model_avg" then is the right one. Returns the seven
    columns of a prediction; fused corners are new numbers, not clipped. Errors: ValueError for a broken
    table, `view` or `weights` that disagree with `views`.

    >>> boxes = pd.DataFrame({"image": 0, "x1": [0, 2], "y1": 0, "x2": [10, 12], "y2": 9, "label": 1, "view": [0, 1]})
    >>> wbf(boxes.assign(score=[0.9, 0.3]), views=2)[["x1", "x2", "score"]].round(3).values.tolist()
    [[0.5, 10.5, 0.6]]
    """
    _share(iou, "iou")
    _share(skip, "skip")
    if conf_type not in CONFIDENCES:
        raise ValueError(f"conf_type is {conf_type!r}; it must be one of {', '.join(CONFIDENCES)}")
    view, weights = _views(predictions, views, weights)
    image, *corners, label, score = read_columns(predictions, COLUMNS, "predictions")
    used = score >= skip
    view, image, label, corners = view[used], image[used], label[used], np.array(corners)[:, used]
    weight = weights[view]
    score = score[used] * weight
    # A box's cluster has the number of the box that founded it: room for all without knowing how many will be.
    order = np.lexsort((-score, label, image))
    image, label, view, weight, score = (
        image[order],
        label[order],
        view[order],
        weight[order],
        score[order],
    )
    rank = _rank(_group(image, label))
    cluster = _cluster(corners[:, order], score, rank, iou)

    founds = cluster == np.arange(len(cluster))
    founders, cluster = np.flatnonzero(founds), (np.cumsum(founds) - 1)[cluster]
    count = np.bincount(cluster)
    total = np.bincount(cluster, score)
    fused = np.array([np.bincount(cluster, score * corner) for corner in corners[:, order]])
    alone = (count == 1) | (total == 0)
    fused = np.where(alone, corners[:, order][:, founders], fused / np.where(total == 0, 1, total))
    columns = {
        "image": image[founders].astype(np.int64),
        **dict(zip(CORNERS, fused, strict=True)),
        "label": label[founders].astype(np.int64),
        "score": _confidence(conf_type, cluster, count, total, score, view, weight, weights),
    }
    return _ordered(pd.DataFrame(columns))


def one_per_class(predictions: pd.DataFrame) -> pd.DataFrame:
    """At most one box per image and class, the best scored; no image of the NIH box list has two of one label.

    >>> boxes = pd.DataFrame({"image": 0, "x1": [0, 20], "y1": 0, "x2": 30, "y2": 9, "label": 1, "score": [0.2, 0.7]})
    >>> one_per_class(boxes)["x1"].tolist()
    [20]
    """
    order, group, _, _ = _grouped(predictions)
    return _ordered(predictions.iloc[np.sort(order[_rank(group) == 0])])


def _grouped(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Table rows ordered by image, class and descending score, with their group number, corners [4,n] and score."""
    image, *corners, label, score = read_columns(predictions, COLUMNS, "predictions")
    order = np.lexsort((-score, label, image))
    return order, _group(image[order], label[order]), np.array(corners)[:, order], score[order]


def _group(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Number of the run of equal (image, label)."""
    new = (image[1:] != image[:-1]) | (label[1:] != label[:-1])
    return np.cumsum(np.r_[0, new])[: len(image)]


def _heads(group: np.ndarray, score: np.ndarray) -> np.ndarray:
    """For each element the first one of its group that has the group's highest score."""
    rank = _rank(group)
    starts = np.flatnonzero(rank == 0)
    size = np.diff(np.r_[starts, len(group)])
    highest = np.repeat(np.maximum.reduceat(score, starts), size)
    first = np.minimum.reduceat(
        np.where(score == highest, np.arange(len(group)), len(group)), starts
    )
    return np.repeat(first, size)


def _cluster(corners: np.ndarray, score: np.ndarray, rank: np.ndarray, iou: float) -> np.ndarray:
    """The founder of each box's cluster; boxes [4,n] sorted by group, then descending score; rank: in the group.

    Step r places the r-th box of every group. The clusters of a group stand one after the other from the
    group's first place on, in the order of their founding.
    """
    n = len(score)
    start = np.arange(n) - rank
    by_rank = np.argsort(rank, kind="stable")
    steps = np.searchsorted(rank[by_rank], np.arange(rank.max(initial=-1) + 2))
    founder, cluster = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    number = np.zeros(n, dtype=np.int64)  # clusters so far, kept at the group's first place
    fused, weighted, total = corners.copy(), np.zeros_like(corners), np.zeros(n)
    for first, stop in zip(steps[:-1], steps[1:], strict=True):
        box = by_rank[first:stop]
        base = start[box]
        slot = (
            np.full(len(box), -1)
            if first == 0
            else _nearest(corners[:, box], fused, base, number[base], iou)
        )
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


def _nearest(
    boxes: np.ndarray, fused: np.ndarray, base: np.ndarray, number: np.ndarray, iou: float
) -> np.ndarray:
    """The place of the cluster that each box [4,m] overlaps most, -1 unless by more than `iou`; number >= 1."""
    runs = np.cumsum(number) - number
    of = np.repeat(np.arange(len(base)), number)
    slot = (base - runs)[of] + np.arange(len(of))
    overlap = pair_iou(boxes[:, of], fused[:, slot])
    best = np.maximum.reduceat(overlap, runs)
    first = np.minimum.reduceat(np.where(overlap == best[of], slot, fused.shape[1]), runs)
    return np.where(best > iou, first, -1)


def _confidence(
    conf_type: str,
    cluster: np.ndarray,
    count: np.ndarray,
    total: np.ndarray,
    score: np.ndarray,
    view: np.ndarray,
    weight: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """Score of each cluster; `score` and `total` hold the views' weights already."""
    if conf_type == "max":
        highest = np.zeros(len(count))
        np.maximum.at(highest, cluster, score)
        return highest / weights.max()
    if conf_type == "avg":
        return total / count * np.minimum(len(weights), count) / weights.sum()
    seen = np.zeros((len(count), len(weights)), dtype=bool)
    seen[cluster, view] = True
    boxes = np.bincount(cluster, weight, minlength=len(count))
    if conf_type == "box_and_model_avg":
        return total / boxes * (seen @ weights) / weights.sum()
    return total / (boxes + ~seen @ weights)


def _views(
    predictions: pd.DataFrame, views: int | None, weights: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The view of each box, and the weight of each view."""
    view = (
        predictions["view"].to_numpy(dtype=float)
        if "view" in predictions
        else np.zeros(len(predictions))
    )
    if views is None:
        if view.any():
            raise ValueError(
                "predictions have a column 'view': say how many views there are, views=V"
            )
        views = 1
    elif views > 1 and "view" not in predictions:
        raise ValueError(
            f"views is {views}, but predictions lack the column 'view' (0..{views - 1})"
        )
    wrong = ~((view >= 0) & (view < views) & (view % 1 == 0))
    refuse(
        wrong,
        "predictions",
        f"a view outside 0..{views - 1}; views must be the number of views",
        view,
    )
    weights = np.ones(views) if weights is None else np.asarray(weights, dtype=float)
    if weights.shape != (views,) or not (np.isfinite(weights) & (weights > 0)).all():
        raise ValueError(
            f"weights is {weights.tolist()}: give {views} numbers above 0, one per view"
        )
    return view.astype(np.int64), weights


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    order = np.lexsort((-table["score"].to_numpy(float), table["image"].to_numpy(float)))
    return table.iloc[order].reset_index(drop=True)


def _share(value: float, name: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must lie in [0, 1]")
