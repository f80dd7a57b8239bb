"""Detection metrics: boxes are matched to the truth once, and every number is derived from that one pass.

Matching is greedy by descending score, so whether a box hits does not depend on the boxes scored below it:
any score threshold, and any resampling of the images, needs no second matching. NumPy and pandas only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..metrics import interval_row, patient_weights

CORNERS = ("x1", "y1", "x2", "y2")
COCO_IOUS = tuple(np.linspace(0.5, 0.95, 10).tolist())  # not rounded: exactly pycocotools' numbers
RECALLS = np.linspace(0, 1, 101)
RATES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
SWEEP = tuple((np.arange(1, 9) / 20).tolist())
STATISTICS = ("mAP50", "mAP50_95", "froc_mean", "sensitivity_at_1", "AP50")
CHUNK = 2_000_000  # numbers in one array of the bootstrap: bounds its memory


@dataclass(frozen=True, eq=False)
class Matches:
    """What `match` found; N images, K classes, D predictions, T IoU thresholds.

    images: int64 [N] ids in the caller's order. labels: the K classes, ascending. iou: the T thresholds.
    truths: int64 [N,K] true boxes. The predictions are ordered by class, then descending score; those of
    class number k are `bounds[k]:bounds[k + 1]`. score: float64 [D]. place: int64 [D], the row in `images`.
    hit: bool [T,D], true positive or not.
    """

    images: np.ndarray
    labels: tuple[int, ...]
    iou: tuple[float, ...]
    truths: np.ndarray
    score: np.ndarray
    place: np.ndarray
    hit: np.ndarray
    bounds: np.ndarray


def match(
    truth: pd.DataFrame,
    predictions: pd.DataFrame,
    *,
    images: Sequence[int] | np.ndarray,
    classes: int | Sequence[int],
    iou: Sequence[float] = (0.5,),
    max_detections: int = 100,
) -> Matches:
    """Match predictions to true boxes as COCO does (Lin et al., arXiv 1405.0312), at all IoU thresholds at once.

    truth: columns image, x1, y1, x2, y2, label; predictions: and score. images: ids of all evaluated images,
    those without a box too. classes: their number K (labels 1..K) or the labels. iou: `COCO_IOUS` for mAP
    0.5:0.95. In each image and class the `max_detections` best boxes are taken by descending score; each gets
    the free true box of highest IoU, if that reaches the threshold, and every true box counts once. Ties are
    broken as in pycocotools: equal scores by image id, then by the table's order; equal IoU by the later true
    box. There are no crowd boxes and no size ranges. Errors: ValueError for missing columns, label 0, labels
    or images not announced, NaN, corners out of order, scores outside [0,1]; the message names the first row.

    >>> truth = pd.DataFrame([[7, 0, 0, 10, 10, 1]], columns=["image", *CORNERS, "label"])
    >>> found = pd.DataFrame([[7, 0, 0, 10, 9, 1, 0.8]], columns=["image", *CORNERS, "label", "score"])
    >>> summary(match(truth, found, images=[7, 8], classes=1, iou=COCO_IOUS))
    {'mAP50': 1.0, 'mAP50_95': 0.9}
    """
    if max_detections < 1:
        raise ValueError(f"max_detections is {max_detections}; it must be at least 1")
    images, labels, iou = _images(images), _labels(classes), _ious(iou)
    order = np.argsort(images)
    known = _Boxes.read(truth, "truth", images[order], labels)
    found = _Boxes.read(predictions, "predictions", images[order], labels, scored=True)

    # One group is the boxes of one class in one image; by class first, then by image id.
    best_first = np.lexsort((-found.score, found.group))
    best_first = best_first[_rank(found.group[best_first]) < max_detections]
    found, known = found.take(best_first), known.take(np.argsort(known.group, kind="stable"))
    hit = _greedy(
        known, found, np.minimum(iou, 1 - 1e-10)
    )  # pycocotools' cap: IoU 1 can be reached

    classwise = np.lexsort((-found.score, found.group // len(images)))
    cells = order[known.group % len(images)] * len(labels) + known.group // len(images)
    return Matches(
        images=images,
        labels=labels,
        iou=iou,
        truths=np.bincount(cells, minlength=len(images) * len(labels)).reshape(
            len(images), len(labels)
        ),
        score=found.score[classwise],
        place=order[found.group[classwise] % len(images)],
        hit=hit[:, classwise],
        bounds=np.searchsorted(found.group[classwise] // len(images), np.arange(len(labels) + 1)),
    )


def average_precision(matches: Matches) -> pd.DataFrame:
    """COCO average precision (mean of the precision envelope at 101 recalls): a row per label, a column per IoU.

    NaN for a class without true boxes.

    >>> empty = pd.DataFrame(columns=["image", *CORNERS, "label", "score"])
    >>> truth = pd.DataFrame([[0, 0, 0, 10, 10, 2]], columns=["image", *CORNERS, "label"])
    >>> average_precision(match(truth, empty, images=[0], classes=2))[0.5].tolist()
    [nan, 0.0]
    """
    values = _weighted_ap(matches, np.ones((1, len(matches.images))), range(len(matches.iou)))[
        :, :, 0
    ]
    columns = pd.Index([round(t, 6) for t in matches.iou], name="iou")
    return pd.DataFrame(values.T, index=pd.Index(matches.labels, name="label"), columns=columns)


def summary(matches: Matches) -> dict[str, float]:
    """mAP50, and mAP50_95 where the pass was made at `COCO_IOUS`: means over the classes that have true boxes.

    NaN where no class has any. Errors: ValueError when the pass was made without IoU 0.5.
    """
    table = average_precision(matches)
    result = {"mAP50": float(table.iloc[:, _number(matches, 0.5)].mean())}
    if matches.iou == COCO_IOUS:
        result["mAP50_95"] = float(table.mean().mean())
    return result


# ------------------------------------------------------------------------------------------- thresholds


def curve(matches: Matches, label: int | None = None, *, iou: float = 0.5) -> pd.DataFrame:
    """Precision, recall, F1 and false positives per image when all boxes from a score upwards are kept.

    One row per distinct score, descending: threshold, precision, recall, f1, fp_per_image. label: one class,
    or None for all classes pooled. Recall and F1 are NaN where there are no true boxes. Errors: ValueError
    for a label or an IoU that the matching pass did not cover.
    """
    threshold, tp, fp = _counts(matches, label, iou, np.ones((1, len(matches.images))))
    return _rates(matches, label, threshold, tp[0], fp[0])


def froc(matches: Matches, *, iou: float = 0.5, rates: Sequence[float] = RATES) -> pd.DataFrame:
    """FROC: sensitivity at given false positives per image, and their mean (Setio et al. 2017, arXiv 1612.08012).

    One row for all classes pooled (label "all") and one per class; columns label, one per rate, mean. The
    value at a rate is the highest sensitivity of any score threshold with at most that many false positives
    per image: no interpolation between thresholds, boxes of equal score stand or fall together, and 0 where
    even the best scored boxes are too many. All images count, also those without true boxes. NaN for a class
    without true boxes. For another hit rule make the pass at that IoU, e.g. `match(..., iou=(0.1,))` and
    `froc(..., iou=0.1)`.

    >>> truth = pd.DataFrame([[0, 0, 0, 9, 9, 1], [1, 0, 0, 9, 9, 1]], columns=["image", *CORNERS, "label"])
    >>> found = truth.assign(x1=[0, 5], score=[0.9, 0.3])  # the second box is off
    >>> froc(match(truth, found, images=[0, 1], classes=1), rates=(0.25, 1))[["label", 0.25, 1, "mean"]]
      label  0.25    1  mean
    0   all   0.5  0.5   0.5
    1     1   0.5  0.5   0.5
    """
    weights = np.ones((1, len(matches.images)))
    rows = []
    for label in (None, *matches.labels):
        values = _sensitivity(matches, label, iou, weights, rates)[0]
        rows.append([_name(label), *values, values.mean()])
    return pd.DataFrame(rows, columns=["label", *rates, "mean"])


def best_thresholds(
    matches: Matches, *, objective: str = "f1", fp_per_image: float = 1.0, iou: float = 0.5
) -> pd.DataFrame:
    """The best score threshold of each class, and of all pooled (label "all"): a box is kept from it upwards.

    objective: "f1" for the highest F1, or "froc" for the highest sensitivity with at most `fp_per_image`
    false positives of the class per image. Columns label, threshold, precision, recall, f1, fp_per_image.
    Ties go to the highest threshold. Where keeping nothing is as good as anything (no true box found, or
    already the best scored boxes are too many false positives) the threshold is NaN, which no score reaches.
    Choose on other images than those that the result is reported on. Errors: ValueError for an unknown
    objective.

    >>> truth = pd.DataFrame([[0, 0, 0, 9, 9, 1]], columns=["image", *CORNERS, "label"])
    >>> found = pd.DataFrame({"image": 0, "x1": 0, "y1": 0, "x2": [9, 3], "y2": 9, "label": 1, "score": [0.7, 0.4]})
    >>> best_thresholds(match(truth, found, images=[0], classes=1))[["label", "threshold", "f1"]]
      label  threshold   f1
    0   all        0.7  1.0
    1     1        0.7  1.0
    """
    if objective not in ("f1", "froc"):
        raise ValueError(f"objective is {objective!r}; it must be 'f1' or 'froc'")
    rows = []
    for label in (None, *matches.labels):
        table = curve(matches, label, iou=iou)
        value = (
            table["f1"]
            if objective == "f1"
            else table["recall"].where(table["fp_per_image"] <= fp_per_image)
        )
        nothing = {
            "threshold": np.nan,
            "precision": np.nan,
            "recall": 0.0,
            "f1": 0.0,
            "fp_per_image": 0.0,
        }
        if not _truths(matches, label).sum():
            nothing |= {"recall": np.nan, "f1": np.nan}
        chosen = table.loc[value.idxmax()] if value.gt(0).any() else nothing
        rows.append({"label": _name(label), **chosen})
    return pd.DataFrame(rows)


def threshold_sweep(matches: Matches, thresholds: Sequence[float] = SWEEP) -> pd.DataFrame:
    """mAP@0.5, precision, recall, F1 and false positives per image of the boxes that score at least each threshold.

    One row per threshold: threshold, mAP50, precision, recall, f1, fp_per_image. A cut takes points off the
    end of each precision-recall curve, so mAP can only fall when the threshold rises: choosing a threshold by
    mAP always answers with the lowest one tried. Precision, recall and F1 (all classes pooled) do have a best
    threshold.
    """
    thresholds = np.asarray(thresholds, dtype=float)
    mean_ap = list(_cut_map(matches, _number(matches, 0.5), thresholds))
    score, tp, fp = _counts(matches, None, 0.5, np.ones((1, len(matches.images))))
    last = np.searchsorted(-score, -thresholds, side="right")
    table = _rates(matches, None, thresholds, np.r_[0, tp[0]][last], np.r_[0, fp[0]][last])
    table.insert(1, "mAP50", mean_ap)
    return table


# ------------------------------------------------------------------------------------------- intervals


def bootstrap(
    matches: Matches,
    groups: Sequence,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    statistics: Sequence[str] | None = None,
    iou: float = 0.5,
) -> pd.DataFrame:
    """Percentile intervals from drawing whole patients with replacement (Field & Welsh 2007), without new matching.

    groups: [N] patient of each of `matches.images`; an image without one (None, NaN) stands for itself.
    statistics: of `STATISTICS` (default: all that the pass allows); "AP50" gives a row per class, the FROC
    mean and the sensitivity at 1 false positive per image count hits at `iou`. An image drawn twice counts as
    two images: each draw equals evaluating the repeated set (up to the order of equal scores within one image
    and class). A class without true boxes in a draw is left out of that draw. Columns metric, label, value,
    ci_low, ci_high, n (images). Errors: ValueError for groups of another length, or a statistic whose IoU was
    not matched.

    >>> truth = pd.DataFrame({"image": range(4), "x1": 0, "y1": 0, "x2": 9, "y2": 9, "label": 1})
    >>> result = match(truth, truth.assign(score=0.5)[:2], images=range(4), classes=1)
    >>> bootstrap(result, list("abcd"), draws=100, statistics=["mAP50"])[["metric", "label", "value", "n"]].round(3)
      metric label  value  n
    0  mAP50   all  0.505  4
    """
    weights = _draw(matches, groups, draws, seed)
    return _intervals(_statistics(matches, weights, statistics, iou), len(matches.images), level)


def paired_bootstrap(
    matches_a: Matches,
    matches_b: Matches,
    groups: Sequence,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    statistics: Sequence[str] | None = None,
    iou: float = 0.5,
) -> pd.DataFrame:
    """Differences a - b of the statistics of `bootstrap` with intervals; both sides see the same draws.

    Errors: ValueError when the two were not evaluated on the same images, classes and true boxes.
    """
    same = (
        np.array_equal(matches_a.images, matches_b.images) and matches_a.labels == matches_b.labels
    )
    if not same or not np.array_equal(matches_a.truths, matches_b.truths):
        raise ValueError(
            "matches_a and matches_b differ in images, classes or true boxes: call match with the same truth, "
            "images (in one order) and classes for both"
        )
    weights = _draw(matches_a, groups, draws, seed)
    a, b = (_statistics(m, weights, statistics, iou) for m in (matches_a, matches_b))
    return _intervals({key: a[key] - b[key] for key in a if key in b}, len(matches_a.images), level)


def _draw(matches: Matches, groups: Sequence, draws: int, seed: int) -> np.ndarray:
    """[1 + draws, N]: how often each image counts; first row: once each, for the value itself."""
    codes, _ = pd.factorize(np.asarray(groups, dtype=object))
    if len(codes) != len(matches.images):
        raise ValueError(
            f"groups has {len(codes)} entries, but {len(matches.images)} images were evaluated"
        )
    unknown = np.flatnonzero(codes < 0)
    codes[unknown] = codes.max(initial=-1) + 1 + np.arange(len(unknown))
    return np.vstack([np.ones(len(codes)), patient_weights(codes, draws=draws, seed=seed)])


def _statistics(
    matches: Matches, weights: np.ndarray, names: Sequence[str] | None, iou: float
) -> dict[tuple[str, str | int], np.ndarray]:
    """(metric, label) -> values [draws]."""
    names = _allowed(matches) if names is None else tuple(names)
    unknown = sorted(set(names) - set(STATISTICS))
    if unknown:
        raise ValueError(f"unknown statistics {unknown}; known: {', '.join(STATISTICS)}")
    if "mAP50_95" in names and matches.iou != COCO_IOUS:
        raise ValueError(
            "statistic 'mAP50_95' needs a pass at all its IoU thresholds: match(..., iou=COCO_IOUS)"
        )
    step = max(1, CHUNK // max(len(matches.score), 1))
    parts = [
        _statistics_of(matches, weights[start : start + step], names, iou)
        for start in range(0, len(weights), step)
    ]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _allowed(matches: Matches) -> tuple[str, ...]:
    """The statistics that the IoU thresholds of the pass allow."""
    missing = {"mAP50_95"} if matches.iou != COCO_IOUS else set()
    if not np.isclose(matches.iou, 0.5).any():
        missing |= {"mAP50", "AP50"}
    return tuple(name for name in STATISTICS if name not in missing)


def _statistics_of(
    matches: Matches, weights: np.ndarray, names: Sequence[str], iou: float
) -> dict[tuple[str, str | int], np.ndarray]:
    values: dict[tuple[str, str | int], np.ndarray] = {}
    if {"mAP50", "mAP50_95", "AP50"} & set(names):
        half = _number(matches, 0.5)
        numbers = range(len(matches.iou)) if "mAP50_95" in names else [half]
        ap = _weighted_ap(matches, weights, numbers)
        at_half = ap[half if "mAP50_95" in names else 0]
    if {"froc_mean", "sensitivity_at_1"} & set(names):
        sensitivity = _sensitivity(matches, None, iou, weights, (*RATES, 1))
    for name in names:
        if name == "mAP50":
            values[name, "all"] = _mean_of_classes(at_half[None])
        elif name == "mAP50_95":
            values[name, "all"] = _mean_of_classes(ap)
        elif name == "froc_mean":
            values[name, "all"] = sensitivity[:, :-1].mean(1)
        elif name == "sensitivity_at_1":
            values[name, "all"] = sensitivity[:, -1]
        else:
            values |= {(name, label): at_half[k] for k, label in enumerate(matches.labels)}
    return values


def _mean_of_classes(ap: np.ndarray) -> np.ndarray:
    """Mean of [T,K,B] over IoUs and over the classes with a value; NaN where there is none."""
    per_class = ap.mean(0)
    there = ~np.isnan(per_class)
    with np.errstate(invalid="ignore"):
        return np.where(there, per_class, 0).sum(0) / there.sum(0)


def _intervals(
    values: dict[tuple[str, str | int], np.ndarray], n: int, level: float
) -> pd.DataFrame:
    rows = []
    for (metric, label), drawn in values.items():
        row = interval_row(drawn, n, level=level)
        rows.append({"metric": metric, "label": label, **row})
    return pd.DataFrame(rows, columns=["metric", "label", "value", "ci_low", "ci_high", "n"])


# ------------------------------------------------------------------------------------------- derived arrays


def _weighted_ap(matches: Matches, weights: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Average precision [T,K,B] at the IoUs `numbers` for every row of image weights [B,N]."""
    values = np.empty((len(numbers), len(matches.labels), len(weights)))
    for k, (own, truth) in enumerate(_by_class(matches, weights)):
        weight = weights[:, matches.place[own]]
        seen = np.cumsum(weight, axis=1)
        for t, number in enumerate(numbers):
            at = np.flatnonzero(matches.hit[number, own])
            values[t, k] = _ap(np.cumsum(weight[:, at], axis=1), seen[:, at], truth)
    return values


def _cut_map(matches: Matches, number: int, thresholds: np.ndarray) -> Iterator[float]:
    """Mean average precision of the predictions that score at least each of the thresholds."""
    classes = [
        (matches.score[own][at := np.flatnonzero(matches.hit[number, own])], at + 1.0, truth)
        for own, truth in _by_class(matches, np.ones((1, len(matches.images))))
    ]
    for threshold in thresholds:
        kept = [(seen[None, score >= threshold], truth) for score, seen, truth in classes]
        values = [_ap(np.arange(1.0, seen.size + 1)[None], seen, truth) for seen, truth in kept]
        yield float(_mean_of_classes(np.array(values)[None])[0])


def _by_class(matches: Matches, weights: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """For each class its slice of the predictions, and its weighted number of true boxes [B]."""
    truths = weights @ matches.truths
    for k in range(len(matches.labels)):
        yield slice(matches.bounds[k], matches.bounds[k + 1]), truths[:, k]


def _ap(hits: np.ndarray, seen: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Average precision [B] from the counts [B,M] of hits and of all boxes seen at each hit, and of true boxes [B].

    Hits suffice: between two of them recall stands still and precision falls.
    """
    precision = hits / np.maximum(seen, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = hits / np.maximum(truth, 1)[:, None]
    # A recall level is served by the first hit that reaches it; a hit without weight serves none.
    served = np.searchsorted(RECALLS, recall, side="right")
    gained = np.diff(served, axis=1, prepend=0)
    return np.where(truth > 0, (gained * envelope).sum(1) / len(RECALLS), np.nan)


def _counts(
    matches: Matches, label: int | None, iou: float, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores [M], descending, and weighted true and false positives [B,M] from each score upwards."""
    if label is None:
        chosen = np.argsort(-matches.score, kind="stable")
    else:
        k = _class_number(matches, label)
        chosen = np.arange(matches.bounds[k], matches.bounds[k + 1])
    score, hit = matches.score[chosen], matches.hit[_number(matches, iou), chosen]
    ends = np.flatnonzero(np.r_[score[1:] != score[:-1], True][: len(score)])
    weight = weights[:, matches.place[chosen]]
    seen = np.cumsum(weight, axis=1)[:, ends]
    tp = np.cumsum(weight * hit, axis=1)[:, ends]
    return score[ends], tp, seen - tp


def _sensitivity(
    matches: Matches, label: int | None, iou: float, weights: np.ndarray, rates: Sequence[float]
) -> np.ndarray:
    """Sensitivity [B,R] at each number of false positives per image."""
    if min(rates, default=0) < 0:
        raise ValueError(
            f"rates {tuple(rates)} hold a negative number of false positives per image"
        )
    _, tp, fp = _counts(matches, label, iou, weights)
    # Counts are whole numbers: the small term only undoes the rounding of rate x images.
    most = weights.sum(1)[:, None] * np.asarray(rates, float) + 1e-9
    places = np.array(
        [np.searchsorted(row, limit, side="right") for row, limit in zip(fp, most, strict=True)]
    )
    reached = np.take_along_axis(np.hstack([np.zeros((len(tp), 1)), tp]), places, axis=1)
    truth = (weights @ _truths(matches, label))[:, None]
    return np.where(truth > 0, reached / np.maximum(truth, 1), np.nan)


def _rates(
    matches: Matches, label: int | None, threshold: np.ndarray, tp: np.ndarray, fp: np.ndarray
) -> pd.DataFrame:
    truth = _truths(matches, label).sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = tp / (tp + fp)
        recall, f1 = (
            (tp / truth, 2 * tp / (tp + fp + truth)) if truth else (tp * np.nan, tp * np.nan)
        )
    columns = {"threshold": threshold, "precision": precision, "recall": recall, "f1": f1}
    return pd.DataFrame(columns | {"fp_per_image": fp / len(matches.images)})


def _truths(matches: Matches, label: int | None) -> np.ndarray:
    """Number of true boxes [N] of one class, or of all."""
    return (
        matches.truths.sum(1) if label is None else matches.truths[:, _class_number(matches, label)]
    )


def _name(label: int | None) -> int | str:
    return "all" if label is None else label


def _class_number(matches: Matches, label: int) -> int:
    if label not in matches.labels:
        raise ValueError(
            f"label {label!r} is not one of the classes {matches.labels}; None pools them"
        )
    return matches.labels.index(label)


def _number(matches: Matches, iou: float) -> int:
    """Which of the pass's IoU thresholds is `iou`."""
    near = np.flatnonzero(np.isclose(matches.iou, iou, atol=1e-9))
    if not len(near):
        known = ", ".join(f"{t:g}" for t in matches.iou)
        raise ValueError(
            f"IoU {iou:g} was not matched, only {known}: call match(..., iou=(..., {iou:g}))"
        )
    return int(near[0])


# ------------------------------------------------------------------------------------------- matching


@dataclass(frozen=True, eq=False)
class _Boxes:
    """Checked boxes as arrays: group = class number x images + place of the image among the sorted ids."""

    group: np.ndarray
    corners: tuple[np.ndarray, ...]
    score: np.ndarray

    @classmethod
    def read(
        cls,
        table: pd.DataFrame,
        name: str,
        images: np.ndarray,
        labels: tuple[int, ...],
        *,
        scored: bool = False,
    ) -> _Boxes:
        columns = ["image", *CORNERS, "label", *(["score"] if scored else [])]
        values = dict(zip(columns, read_columns(table, columns, name), strict=True))
        label, image = values["label"], values["image"]
        known = np.array(labels)
        number = np.searchsorted(known, label).clip(max=len(known) - 1)
        allowed = (
            f"the classes are {labels}"
            if len(labels) <= 20
            else f"the labels go up to {labels[-1]}"
        )
        refuse(known[number] != label, name, f"a label that is no class ({allowed})", label)
        place = np.searchsorted(images, image).clip(max=len(images) - 1)
        refuse(
            images[place] != image,
            name,
            "an image id that `images` lacks; give the ids of all evaluated images",
            image,
        )
        corners = tuple(values[corner] for corner in CORNERS)
        return cls(number * len(images) + place, corners, values.get("score", np.empty(0)))

    def take(self, rows: np.ndarray) -> _Boxes:
        corners = tuple(corner[rows] for corner in self.corners)
        return _Boxes(
            self.group[rows], corners, self.score[rows] if len(self.score) else self.score
        )


def read_columns(table: pd.DataFrame, columns: Sequence[str], name: str) -> list[np.ndarray]:
    """The columns of a box table as float64 arrays, checked: what evaluation and fusion demand of every table.

    Errors: ValueError for missing columns, text, NaN, label 0, corners out of order and scores outside [0,1].
    """
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(
            f"{name} lacks the columns {missing}; it has {list(table.columns)}. A box table has {list(columns)}"
        )
    values = {}
    for column in columns:
        try:
            values[column] = table[column].to_numpy(dtype=float)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: column {column!r} must hold numbers: {error}") from error
        refuse(
            ~np.isfinite(values[column]),
            name,
            f"NaN or an infinite value in column {column!r}",
            values[column],
        )
    label = values["label"]
    refuse(
        label < 1, name, "a label below 1: 0 is the background, so classes are numbered 1..K", label
    )
    for low, high in (("x1", "x2"), ("y1", "y2")):
        problem = f"{low} >= {high}; corners are x1 < x2 and y1 < y2: drop boxes without area, or xywh was given"
        refuse(values[low] >= values[high], name, problem, values[low])
    if "score" in values:
        score = values["score"]
        refuse(
            (score < 0) | (score > 1),
            name,
            "a score outside [0, 1]; apply the sigmoid or softmax first",
            score,
        )
    return list(values.values())


def refuse(wrong: np.ndarray, name: str, problem: str, values: np.ndarray) -> None:
    """ValueError naming the first of the `wrong` rows and its value."""
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"{name}: {problem} ({wrong.sum()} of {len(wrong)} rows, first row {row}: {values[row]:g})"
        )


def _images(images: Sequence[int] | np.ndarray) -> np.ndarray:
    ids = np.asarray(images)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
        raise ValueError(
            "images must be the ids (whole numbers) of all evaluated images, at least one"
        )
    if len(np.unique(ids)) < len(ids):
        raise ValueError("images holds an id twice: every evaluated image is named once")
    return ids.astype(np.int64)


def _labels(classes: int | Sequence[int]) -> tuple[int, ...]:
    given = np.asarray(classes)
    labels = np.arange(1, int(given) + 1) if given.ndim == 0 and given.dtype.kind in "iu" else given
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu" or labels.min() < 1:
        raise ValueError(
            f"classes is {classes!r}: give the number of classes, or their labels (whole numbers from 1)"
        )
    return tuple(np.unique(labels).tolist())


def _ious(iou: Sequence[float]) -> tuple[float, ...]:
    thresholds = np.sort(np.atleast_1d(np.asarray(iou, dtype=float)))
    if not len(thresholds) or thresholds[0] <= 0 or thresholds[-1] > 1:
        raise ValueError(f"iou is {iou!r}: thresholds must lie in (0, 1]")
    return tuple(thresholds.tolist())


def _rank(groups: np.ndarray) -> np.ndarray:
    """Place of each element in its run of equal values."""
    number = np.arange(len(groups))
    new = np.r_[True, groups[1:] != groups[:-1]][: len(groups)]
    return number - np.maximum.accumulate(np.where(new, number, 0))


def _greedy(known: _Boxes, found: _Boxes, iou: np.ndarray) -> np.ndarray:
    """hit [T,D]: greedy matching of all groups side by side; both sorted by group, `found` then best first.

    The loop runs over ranks: in each step every group hands out a true box to its next candidate.
    """
    box, true, overlap = _pairs(known, found, lowest=iou[0])
    hit = np.zeros((len(iou), len(found.group)), dtype=bool)
    if not len(box):
        return hit
    candidate, of = np.unique(box, return_inverse=True)
    turn = _rank(found.group[candidate])[of]
    # In each box's run of pairs the best comes last; pycocotools takes the later true box of equal IoU.
    order = np.lexsort((true, overlap, box, turn))
    box, true, overlap, turn = box[order], true[order], overlap[order], turn[order]
    free = np.ones((len(iou), len(known.group)), dtype=bool)
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


def _pairs(
    known: _Boxes, found: _Boxes, *, lowest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs (found, known) of one group with IoU >= `lowest`, and their IoU."""
    first = np.searchsorted(known.group, found.group, side="left")
    count = np.searchsorted(known.group, found.group, side="right") - first
    box = np.repeat(np.arange(len(found.group)), count)
    true = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(box))
    overlap = pair_iou(
        [corner[box] for corner in found.corners], [corner[true] for corner in known.corners]
    )
    near = overlap >= lowest
    return box[near], true[near], overlap[near]


def pair_iou(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
    """Intersection over union of boxes pair by pair, each given as four arrays x1, y1, x2, y2.

    >>> pair_iou(np.array([[0.0], [0], [2], [2]]), np.array([[1.0], [0], [3], [2]])).round(4).tolist()
    [0.3333]
    """
    width = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])
    height = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])
    both = np.maximum(width, 0) * np.maximum(height, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
