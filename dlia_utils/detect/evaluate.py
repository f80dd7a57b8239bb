"""Detection metrics: boxes are matched to the truth once; every number comes from that one pass.

Matching is greedy by descending score, so whether a box hits does not depend on boxes of lower
score: any score threshold, and any resampling of the images, needs no second matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.isotonic import IsotonicRegression

from .. import metrics
from ..data.boxes import Boxes, Sizes, in_order, places, read_boxes, refuse
from ..data.tables import CORNERS as CORNERS  # for those who ask for it here

COCO_IOUS = tuple(np.linspace(0.5, 0.95, 10).tolist())  # not rounded: exactly pycocotools' numbers
RECALLS = np.linspace(0, 1, 101)
RATES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # false positives per image (Setio et al., 1612.08012)
SWEEP = tuple((np.arange(1, 9) / 20).tolist())  # score thresholds
STATISTICS = ("mAP50", "mAP50_95", "froc_mean", "sensitivity_at_1", "AP50")
MAX_DETECTIONS = 100  # boxes of one image and class that count, as COCO has it


@dataclass(frozen=True, eq=False)
class Matches:
    """What `match` found; N images, K classes, D predictions, T IoU thresholds.

    Predictions are ordered by class, then descending score.
    """

    images: np.ndarray  # [N] ids in the caller's order, whole numbers or text
    labels: tuple[int, ...]
    iou: tuple[float, ...]
    truths: np.ndarray  # int64 [N,K] true boxes
    score: np.ndarray  # float64 [D]
    place: np.ndarray  # int64 [D], the row in `images`
    hit: np.ndarray  # bool [T,D]
    bounds: np.ndarray  # the predictions of label k are bounds[k - 1]:bounds[k]

    @property
    def half(self) -> int:
        """Which of the IoU thresholds is 0.5."""
        return self.iou.index(0.5)

    def true_boxes(self, label: int | None) -> np.ndarray:
        """Number of true boxes [N] of one class, or of all (None)."""
        return self.truths.sum(1) if label is None else self.truths[:, label - 1]


def match(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    *,
    images,
    classes: int,
    iou=(0.5,),
    sizes: Sizes = None,
) -> Matches:
    """Match predictions to true boxes as COCO does (Lin et al. 2014, 1405.0312), at all IoUs.

    truth: columns image, x1, y1, x2, y2, label (1..`classes`); predictions: and score. images: ids
    of all evaluated images, those without a box too. In each image and class the best 100 boxes
    are taken by score; each gets the free true box of highest IoU, if that reaches the threshold.
    Ties as in pycocotools. iou: ascending, 0.5 among them. sizes: (width, height) by image, if the
    boxes are to be held against them. Errors: ValueError naming the first wrong row.

    >>> truth = pd.DataFrame([[7, 0, 0, 10, 10, 1]], columns="image x1 y1 x2 y2 label".split())
    >>> found = pd.DataFrame([[7, 0, 0, 10, 9, 1]], columns=truth.columns).assign(score=0.8)
    >>> summary(match(truth, found, images=[7, 8], classes=1, iou=COCO_IOUS))
    {'mAP50': 1.0, 'mAP50_95': 0.9}
    """
    images = metrics.exact_ids(images, "images", "id")
    if not len(images) or len(pd.unique(images)) < len(images):
        raise ValueError("images must name every evaluated image once, at least one")
    ordered, shape = in_order(images), (len(images), classes)
    order = places(ordered, images)
    known = read_boxes(truth, "truth", scored=False, sizes=sizes)
    found = read_boxes(predictions, "predictions", sizes=sizes)
    group, corners, _ = _grouped(known, "truth", ordered, classes)
    by_group = stable(group)
    known = group[by_group], corners[:, by_group]
    group, corners, score = _grouped(found, "predictions", ordered, classes)
    by_score = stable(group)  # scores are sorted once, since they cost most; equal ones by group
    by_score = by_score[np.argsort(-score[by_score], kind="stable")]
    best_first = by_score[stable(group[by_score])]
    best_first = best_first[ranks(group[best_first]) < MAX_DETECTIONS]
    kept = np.full(len(score), -1)
    kept[best_first] = np.arange(len(best_first))
    group, score = group[best_first], score[best_first]
    # pycocotools caps the thresholds, so that IoU 1 can be reached.
    hit = _greedy(*known, group, corners[:, best_first], np.minimum(iou, 1 - 1e-10))

    classwise = kept[by_score][kept[by_score] >= 0]
    classwise = classwise[stable(group[classwise] // len(images))]
    cells = order[known[0] % len(images)] * classes + known[0] // len(images)
    return Matches(
        images=images,
        labels=tuple(range(1, classes + 1)),
        iou=tuple(iou),
        truths=np.bincount(cells, minlength=len(images) * classes).reshape(shape),
        score=score[classwise],
        place=order[group[classwise] % len(images)],
        hit=hit[:, classwise],
        bounds=np.searchsorted(group[classwise] // len(images), np.arange(classes + 1)),
    )


def average_precision(matches: Matches) -> pd.DataFrame:
    """COCO average precision: a row per label (NaN without true boxes), a column per IoU.

    >>> truth = pd.DataFrame([[0, 0, 0, 10, 10, 2]], columns="image x1 y1 x2 y2 label".split())
    >>> nothing = truth[:0].assign(score=0.5)
    >>> average_precision(match(truth, nothing, images=[0], classes=2))[0.5].tolist()
    [nan, 0.0]
    """
    values = _weighted_ap(matches, np.ones((1, len(matches.images))), range(len(matches.iou)))
    columns = pd.Index([round(t, 6) for t in matches.iou], name="iou")
    return pd.DataFrame(values[:, :, 0].T, pd.Index(matches.labels, name="label"), columns)


def summary(matches: Matches) -> dict[str, float]:
    """mAP50, and mAP50_95 of a pass at `COCO_IOUS`: means over the classes that have true boxes."""
    table = average_precision(matches)
    result = {"mAP50": float(table.iloc[:, matches.half].mean())}
    return result | ({"mAP50_95": float(table.mean().mean())} if matches.iou == COCO_IOUS else {})


def curve(matches: Matches, label: int | None = None) -> pd.DataFrame:
    """What is right and wrong at IoU 0.5 when all boxes from a score upwards are kept.

    One row per distinct score, descending: threshold, precision, recall, f1, fp_per_image; NaN
    without true boxes. label: one class, or None for all pooled.
    """
    threshold, tp, fp = _counts(matches, label, np.ones((1, len(matches.images))))
    return _rates(matches, label, threshold, tp[0], fp[0])


def best_thresholds(
    matches: Matches, *, objective: str = "f1", fp_per_image: float = 1.0
) -> pd.DataFrame:
    """The best score threshold (a box is kept from it upwards) of each class, and of all pooled.

    objective: "f1", or "froc" for the highest sensitivity with at most `fp_per_image` false
    positives of the class per image. Columns label and those of `curve`. Ties go to the highest
    threshold; NaN, which no score reaches, where keeping nothing is as good. Choose on other images
    than those that the result is reported on.

    >>> truth = pd.DataFrame([[0, 0, 0, 9, 9, 1]], columns="image x1 y1 x2 y2 label".split())
    >>> found = truth.loc[[0, 0]].assign(x2=[9, 3], score=[0.7, 0.4])
    >>> best_thresholds(match(truth, found, images=[0], classes=1))["threshold"].tolist()
    [0.7, 0.7]
    """
    rows = []
    for label in (None, *matches.labels):
        table = curve(matches, label)
        allowed = table["recall"].where(table["fp_per_image"] <= fp_per_image)
        value = {"f1": table["f1"], "froc": allowed}[objective]
        zero = 0.0 if matches.true_boxes(label).any() else np.nan
        nothing = dict(threshold=np.nan, precision=np.nan, recall=zero, f1=zero, fp_per_image=0.0)
        chosen = table.loc[value.idxmax()] if value.gt(0).any() else nothing
        rows.append({"label": "all" if label is None else label, **chosen})
    return pd.DataFrame(rows)


def threshold_sweep(matches: Matches) -> pd.DataFrame:
    """mAP at IoU 0.5 and the columns of `curve` for the boxes that score at least each of `SWEEP`.

    A cut takes points off the end of each precision-recall curve, so mAP can only fall: choosing a
    threshold by mAP always answers with the lowest one tried. F1 does have a best threshold.
    """
    tables = []
    for threshold in SWEEP:
        keep = matches.score >= threshold
        hit, bounds = matches.hit[matches.half, keep], np.r_[0, np.cumsum(keep)][matches.bounds]
        kept = dict(score=matches.score[keep], place=matches.place[keep], hit=hit[None])
        left = replace(matches, iou=(0.5,), bounds=bounds, **kept)
        tables.append(_rates(matches, None, [threshold], hit.sum(), (~hit).sum()))
        tables[-1].insert(1, "mAP50", summary(left)["mAP50"])
    return pd.concat(tables, ignore_index=True)


def worth(matches: Matches, found: pd.DataFrame) -> np.ndarray:
    """What sending each box of `found` [D] is worth where an image may send one: P(hit)^2 / boxes.

    A hit adds to its class's AP the precision there, for one in so many true boxes. P is an
    isotonic regression of hits at IoU 0.5 on scores (Zadrozny & Elkan 2002), class by class.
    matches: of images other than those of `found`, which has columns label and score.

    >>> truth = pd.DataFrame({"image": [0, 1], "x1": 0, "y1": 0, "x2": 9, "y2": 9, "label": [1, 2]})
    >>> own = match(truth, truth.assign(score=0.5, y2=[9, 2]), images=[0, 1], classes=2)
    >>> worth(own, pd.DataFrame({"label": [1, 2], "score": [0.4, 0.9]})).tolist()
    [1.0, 0.0]
    """
    label, score = found["label"].to_numpy(), found["score"].to_numpy(float)
    result = np.zeros(len(found))
    for number, part in enumerate(map(slice, matches.bounds[:-1], matches.bounds[1:]), 1):
        own, hit = label == number, matches.hit[matches.half, part]
        if own.any() and hit.any():
            fitted = IsotonicRegression(out_of_bounds="clip").fit(matches.score[part], hit)
            result[own] = fitted.predict(score[own]) ** 2 / matches.true_boxes(number).sum()
    return result


def bootstrap(
    matches: Matches,
    groups: Sequence,
    *,
    less: Matches | None = None,
    draws: int = 1000,
    seed: int = 0,
    statistics: Sequence[str] = ("mAP50", "froc_mean", "sensitivity_at_1", "AP50"),
) -> pd.DataFrame:
    """95 % intervals from drawing whole patients with replacement (Field & Welsh 2007).

    groups: [N] patient of each of `matches.images`. less: another pass of the same images and
    truth; the values are then the differences to it, on the same draws. statistics: of
    `STATISTICS`; "AP50" gives a row per class. Columns metric, label, value, ci_low, ci_high, n.

    >>> truth = pd.DataFrame({"image": range(4), "x1": 0, "y1": 0, "x2": 9, "y2": 9, "label": 1})
    >>> result = match(truth, truth.assign(score=0.5)[:2], images=range(4), classes=1)
    >>> bootstrap(result, list("abcd"), draws=100, statistics=["mAP50"])["value"].round(3).tolist()
    [0.505]
    """
    passes = [matches] if less is None else [matches, less]
    if "mAP50_95" in statistics and any(one.iou != COCO_IOUS for one in passes):
        raise ValueError("statistic 'mAP50_95' needs match(..., iou=COCO_IOUS)")
    pairs = ((matches.images, passes[-1].images), (matches.truths, passes[-1].truths))
    if not all(np.array_equal(a, b) for a, b in pairs):
        raise ValueError("the two passes differ in images, classes or true boxes")

    def statistic(weights: np.ndarray) -> np.ndarray:
        first, *second = (_statistics(one, statistics, weights) for one in passes)
        return first - second[0] if second else first

    width = len(matches.score)
    table = metrics.bootstrap(statistic, groups, draws=draws, seed=seed, width=width)
    names = [(s, k) for s in statistics for k in (matches.labels if s == "AP50" else ["all"])]
    return pd.DataFrame(names, columns=["metric", "label"]).join(table)


def _statistics(matches: Matches, names: Sequence[str], weights: np.ndarray) -> np.ndarray:
    """Values [B,M] of the statistics, for every row of image weights [B,N]."""
    values, numbers = {}, [matches.half]
    if "mAP50_95" in names:
        numbers = list(range(len(matches.iou)))
    if {"mAP50", "mAP50_95", "AP50"} & set(names):
        ap = _weighted_ap(matches, weights, numbers)
        half = ap[numbers.index(matches.half)]
        values = {"AP50": half.T, "mAP50": metrics.mean_of_defined(half)}
        values["mAP50_95"] = metrics.mean_of_defined(ap.mean(0))
    if {"froc_mean", "sensitivity_at_1"} & set(names):
        reached = _sensitivity(matches, weights)
        values |= {"froc_mean": reached.mean(1), "sensitivity_at_1": reached[:, RATES.index(1)]}
    return np.column_stack([values[name] for name in names])


def _weighted_ap(matches: Matches, weights: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Average precision [T,K,B] at the IoUs `numbers` for every row of image weights [B,N]."""
    values = np.empty((len(numbers), len(matches.labels), len(weights)))
    truths = weights @ matches.truths
    for k in range(len(matches.labels)):
        own = slice(matches.bounds[k], matches.bounds[k + 1])
        weight = weights[:, matches.place[own]]
        seen = np.cumsum(weight, axis=1)
        for t, number in enumerate(numbers):
            at = np.flatnonzero(matches.hit[number, own])
            values[t, k] = _ap(np.cumsum(weight[:, at], axis=1), seen[:, at], truths[:, k])
    return values


def _ap(hits: np.ndarray, seen: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Average precision [B] from counts [B,M] of hits and boxes seen, and true boxes [B]."""
    # Hits suffice: between two of them recall stands still and precision falls.
    precision = hits / np.maximum(seen, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = hits / np.maximum(truth, 1)[:, None]
    # A recall level is served by the first hit that reaches it; a hit without weight serves none.
    gained = np.diff(np.searchsorted(RECALLS, recall, side="right"), axis=1, prepend=0)
    return np.where(truth > 0, (gained * envelope).sum(1) / len(RECALLS), np.nan)


def _counts(matches: Matches, label: int | None, weights: np.ndarray) -> tuple:
    """Distinct scores [M], descending; weighted true and false positives [B,M] from each on."""
    chosen = np.argsort(-matches.score, kind="stable")
    if label is not None:
        chosen = np.arange(matches.bounds[label - 1], matches.bounds[label])
    score, hit = matches.score[chosen], matches.hit[matches.half, chosen]
    ends = np.flatnonzero(np.r_[score[1:] != score[:-1], True][: len(score)])
    weight = weights[:, matches.place[chosen]]
    seen, tp = (np.cumsum(w, axis=1)[:, ends] for w in (weight, weight * hit))
    return score[ends], tp, seen - tp


def _sensitivity(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Sensitivity [B,R] of all classes pooled at each of `RATES`."""
    _, tp, fp = _counts(matches, None, weights)
    # Counts are whole numbers: the small term only undoes the rounding of rate x images.
    most = weights.sum(1)[:, None] * np.array(RATES, float) + 1e-9
    places = [np.searchsorted(row, limit, "right") for row, limit in zip(fp, most, strict=True)]
    reached = np.take_along_axis(np.hstack([np.zeros((len(tp), 1)), tp]), np.array(places), axis=1)
    truth = (weights @ matches.true_boxes(None))[:, None]
    return np.where(truth > 0, reached / np.maximum(truth, 1), np.nan)


def _rates(matches, label, threshold, tp: np.ndarray, fp: np.ndarray) -> pd.DataFrame:
    truth = matches.true_boxes(label).sum() or np.nan
    with np.errstate(invalid="ignore"):
        table = pd.DataFrame({"threshold": threshold, "precision": tp / (tp + fp)})
    table = table.assign(recall=tp / truth, f1=2 * tp / (tp + fp + truth))
    return table.assign(fp_per_image=fp / len(matches.images))


def _grouped(found: Boxes, name: str, images: np.ndarray, classes: int):
    """Group (class x images + place of the image among `images`), corners [4,n] and score."""
    refuse(found.label > classes, name, f"a label above {classes}, the number of classes")
    place = places(found.image, images)
    refuse(place < 0, name, "an image id that `images` lacks")
    return (found.label - 1) * len(images) + place, found.corners, found.score


def stable(numbers: np.ndarray) -> np.ndarray:
    """The stable order of whole numbers >= 0, in linear time for those below 2^16."""
    least = np.min_scalar_type(numbers.max(initial=0))
    return np.argsort(numbers.astype(least), kind="stable")


def ranks(groups: np.ndarray) -> np.ndarray:
    """Place of each element in its run of equal values: 0, 1, 0 of 7, 7, 8."""
    number = np.arange(len(groups))
    new = np.r_[True, groups[1:] != groups[:-1]][: len(groups)]
    return number - np.maximum.accumulate(np.where(new, number, 0))


def _greedy(known, true_corners, group, corners, iou: np.ndarray) -> np.ndarray:
    """hit [T,D]: greedy matching of all groups side by side, the predictions best first.

    In each step of the loop every group hands out a true box to its next candidate.
    """
    hit, free = np.zeros((len(iou), len(group)), bool), np.ones((len(iou), len(known)), bool)
    # All pairs of a prediction and a true box of one group that overlap enough.
    first = np.searchsorted(known, group, side="left")
    count = np.searchsorted(known, group, side="right") - first
    box = np.repeat(np.arange(len(group)), count)
    true = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(box))
    overlap = pair_iou(corners[:, box], true_corners[:, true])
    near = overlap >= iou[0]
    box, true, overlap = box[near], true[near], overlap[near]
    if not len(box):
        return hit
    candidate, of = np.unique(box, return_inverse=True)
    turn = ranks(group[candidate])[of]
    # In each box's run of pairs the best comes last, of equal IoU the later true box.
    order = np.lexsort((true, overlap, box, turn))
    box, true, overlap, turn = box[order], true[order], overlap[order], turn[order]
    steps = np.searchsorted(turn, np.arange(turn[-1] + 2))
    for start, stop in zip(steps[:-1], steps[1:], strict=True):
        runs = np.flatnonzero(np.r_[True, np.diff(box[start:stop]) > 0])
        possible = (overlap[start:stop] >= iou[:, None]) & free[:, true[start:stop]]
        last = np.maximum.reduceat(np.where(possible, np.arange(start, stop), -1), runs, axis=1)
        at, run = np.nonzero(last >= 0)
        pair = last[at, run]
        hit[at, box[pair]] = True
        free[at, true[pair]] = False
    return hit


def pair_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes [4,n] pair by pair (torchvision's box_iou compares all with all)."""
    width = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])
    height = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])
    both = np.maximum(width, 0) * np.maximum(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
