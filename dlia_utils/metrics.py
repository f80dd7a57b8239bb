"""Classification metrics with patient-clustered intervals; paired tests stand in `comparison`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest, norm

CHUNK = 4_000_000  # weights that a statistic sees at a time: bounds the memory
INTERVALS = ("percentile", "bca")
METRICS = (
    "accuracy",
    "balanced_accuracy",
    "precision",
    "recall",
    "f1",
    "sensitivity",
    "specificity",
    "auc",
)


def classification(
    labels: np.ndarray,
    score: np.ndarray,
    groups: Sequence,
    *,
    threshold: float = 0.5,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    interval: str = "percentile",
) -> pd.DataFrame:
    """Metrics of a classifier, each with an interval from resampling whole patients (Field & Welsh 2007).

    `labels` [N] of 0/1, `score` [N] of class 1: its probability, or any finite score with the `threshold` that
    belongs to it (`train.log_odds` and 0: probabilities of sharp models tie at 1 and lose their AUC), `groups` [N]
    patient ids. Of K > 2 classes: labels 0..K-1 and score [N,K]; the highest is the answer, the AUC is the mean of
    each class against the rest (Provost & Domingos 2000), and there is no sensitivity or specificity. Precision, recall and F1 are macro averages; sensitivity and specificity belong to class 1 and
    class 0. An AUC needs both classes, else it is NaN. A value of exactly 0 or 1 comes out in every draw, too: it gets
    the exact binomial interval instead (see `share`), over the images that it is about; those that speak of both
    classes take the class of fewer patients, which is on the safe side. `interval` as in `bootstrap`. Columns: metric, value, ci_low, ci_high, n. Errors: unequal lengths, labels
    other than 0/1.

    >>> table = classification(np.array([0, 0, 1, 1]), np.array([.1, .6, .7, .9]), list("abcd"), draws=50)
    >>> table.set_index("metric").loc["accuracy", "value"]
    np.float64(0.75)
    """
    labels, score = _check(labels, score, groups)
    classes = range(2 if score.ndim == 1 else score.shape[1])
    # Strictly above, as argmax decides two equal logits for class 0.
    predicted = (score > threshold).astype(int) if score.ndim == 1 else score.argmax(1)
    names = [
        name for name in METRICS if score.ndim == 1 or name not in ("sensitivity", "specificity")
    ]

    def values(weights: np.ndarray) -> np.ndarray:
        if score.ndim == 1:
            auc = weighted_auc(labels, score, weights)
        else:
            auc = np.mean(
                [weighted_auc(labels == c, score[:, c], weights) for c in classes], axis=0
            )
        found = _rates(labels, predicted, weights, classes) | {"auc": auc}
        return np.column_stack([found[name] for name in names])

    table = bootstrap(values, groups, draws=draws, level=level, seed=seed, interval=interval)
    table.insert(0, "metric", names)
    rows = table.to_dict("records")
    counted = {"accuracy": labels >= 0, "sensitivity": labels == 1, "specificity": labels == 0}
    fewer = min(
        (labels == label for label in np.unique(labels)),
        key=lambda own: len(pd.unique(np.asarray(groups)[own])),
    )
    for row in rows:
        if row["value"] in (0.0, 1.0):
            row |= _exact(
                row["value"], np.asarray(groups)[counted.get(row["metric"], fewer)], level
            )
    return pd.DataFrame(rows)


def share(
    flags: np.ndarray,
    groups: Sequence,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    interval: str = "percentile",
) -> dict:
    """Mean of a boolean array with a patient-bootstrap interval, e.g. robust accuracy from 'still right' flags.

    When all flags agree, every draw does too and the bootstrap would claim certainty: the interval is then the
    exact binomial one (Clopper & Pearson 1934) with patients as trials. `interval` as in `bootstrap`.

    >>> share(np.array([True, True, False, True]), [1, 1, 2, 3], draws=100)["value"]
    0.75
    """
    flags = np.asarray(flags, dtype=float)
    if len(flags) != len(groups) or not len(flags):
        raise ValueError(
            f"flags ({len(flags)}) and groups ({len(groups)}) must have the same length above 0"
        )
    table = bootstrap(
        lambda weights: weights @ flags / weights.sum(1),
        groups,
        draws=draws,
        level=level,
        seed=seed,
        interval=interval,
    )
    row = {"metric": "share"} | table.to_dict("records")[0]
    if row["value"] in (0.0, 1.0):
        row |= _exact(row["value"], groups, level)
    return row


def _exact(value: float, groups: Sequence, level: float) -> dict[str, float]:
    """The binomial interval of a share of 0 or 1, with patients as trials; the bootstrap would claim certainty."""
    patients = len(pd.unique(np.asarray(groups)))
    exact = binomtest(int(value) * patients, patients).proportion_ci(level, method="exact")
    return {"ci_low": float(exact.low), "ci_high": float(exact.high)}


def sensitivity_at_specificity(
    validation: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray,
    score: np.ndarray,
    groups: Sequence,
    *,
    specificity: float = 0.9,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    interval: str = "percentile",
) -> pd.DataFrame:
    """Sensitivity at a fixed specificity, with the threshold from validation and, beside it, from the test ROC itself.

    `validation`: labels and score of the VALIDATION images; the threshold is the lowest with at least
    `specificity` there. labels, score, groups: the test images; scores as in `classification`. Rows (0.9 stands for `specificity`):
    sensitivity_at_0.9_val_threshold and specificity_at_0.9_val_threshold, what that threshold gives on the test
    images, and sensitivity_at_0.9_test_roc, the highest sensitivity on the test ROC curve with that specificity.
    The last one chooses its threshold on the images it is scored on, again in each draw: an upper reference, not a
    result that can be had in use. The interval of the first two takes the threshold as given. Columns metric, value,
    ci_low, ci_high, n, threshold (positive is strictly above it). Errors: ValueError for a specificity outside
    (0, 1], or without images of both classes.

    >>> found = sensitivity_at_specificity(([0, 0, 1], [.1, .4, .3]), [0, 0, 1, 1], [.2, .5, .45, .9], "abcd",
    ...                                    specificity=1.0, draws=50)
    >>> found[["metric", "value", "threshold"]].values.tolist()  # doctest: +NORMALIZE_WHITESPACE
    [['sensitivity_at_1_val_threshold', 1.0, 0.4], ['specificity_at_1_val_threshold', 0.5, 0.4],
     ['sensitivity_at_1_test_roc', 0.5, 0.5]]
    """
    groups = list(groups)
    labels, score = _check(labels, score, groups)
    held, held_score = _check(*validation, range(len(validation[0])))
    if not 0 < specificity <= 1:
        raise ValueError(f"specificity must be in (0, 1], e.g. 0.9, not {specificity}")
    for name, part in (("validation", held), ("test", labels)):
        if len(np.unique(part)) < 2:
            raise ValueError(
                f"the {name} images are all of class {part[0]}: a ROC curve needs both classes"
            )

    def on_roc(weights: np.ndarray) -> np.ndarray:
        return _roc_point(labels, score, weights, specificity)[0]

    options = {"draws": draws, "level": level, "seed": seed, "interval": interval}
    threshold = float(_roc_point(held, held_score, np.ones((1, len(held))), specificity)[1][0])
    own = float(_roc_point(labels, score, np.ones((1, len(labels))), specificity)[1][0])
    fixed = classification(labels, score, groups, threshold=threshold, **options).set_index(
        "metric"
    )
    table = pd.concat(
        [fixed.loc[["sensitivity", "specificity"]], bootstrap(on_roc, groups, **options)]
    )
    table.insert(
        0,
        "metric",
        [
            f"{name}_at_{specificity:g}_{how}"
            for name, how in (
                ("sensitivity", "val_threshold"),
                ("specificity", "val_threshold"),
                ("sensitivity", "test_roc"),
            )
        ],
    )
    return table.assign(threshold=[threshold, threshold, own]).reset_index(drop=True)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    groups: Sequence,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    interval: str = "percentile",
) -> pd.DataFrame:
    """Intervals of any statistic of weighted images, from resampling whole patients (Field & Welsh 2007).

    `statistic` takes weights [B,N], how often each image counts, and returns [B] or [B,M]; one row a column: value
    (every image once), ci_low, ci_high, n. `groups` [N] are patient ids. interval: "percentile", or "bca", corrected
    for bias and for a spread that changes with the value, on the same draws (Efron 1987, JASA 82:171; the
    acceleration from leaving out one patient at a time). A draw where the value is NaN is left out; a single patient
    has no interval (NaN), and BCa is NaN when all draws lie on one side of the value. Errors: ValueError for another interval, no images or missing ids.

    >>> height = np.array([1.0, 3.0, 2.0, 6.0])
    >>> bootstrap(lambda w: w @ height / w.sum(1), ["a", "a", "b", "c"], draws=100, interval="bca")["value"].item()
    3.0
    """
    if interval not in INTERVALS:
        raise ValueError(f"interval must be one of {', '.join(INTERVALS)}, not {interval!r}")
    codes = _patients(groups)
    if not len(codes):
        raise ValueError("groups is empty: an interval needs at least one image")
    weights = np.vstack([np.ones(len(codes)), patient_weights(codes, draws=draws, seed=seed)])
    step = max(1, CHUNK // len(codes))

    def over(count: int, rows: Callable[[slice], np.ndarray]) -> np.ndarray:
        parts = [np.asarray(statistic(rows(slice(at, at + step)))) for at in range(0, count, step)]
        values = np.concatenate(parts)
        return values.reshape(count, -1)

    values, without = over(len(weights), weights.__getitem__), None
    if interval == "bca":
        patients = np.arange(codes.max() + 1)
        without = over(len(patients), lambda part: (patients[part, None] != codes).astype(float))
    return pd.DataFrame(
        [
            _row(
                "",
                values[:, k] if codes.any() else values[:1, k],
                len(codes),
                level,
                None if without is None else without[:, k],
            )
            for k in range(values.shape[1])
        ]
    ).drop(columns="metric")


def patient_weights(groups: Sequence, *, draws: int, seed: int = 0) -> np.ndarray:
    """Bootstrap weights [draws, N]: how often each image counts when whole patients are drawn with replacement.

    >>> patient_weights(["a", "a", "b"], draws=2).shape
    (2, 3)
    """
    codes = _patients(groups)
    patients = codes.max(initial=-1) + 1
    counts = np.random.default_rng(seed).multinomial(
        patients, np.full(patients, 1 / patients), size=draws
    )
    return counts[:, codes].astype(float)


def _patients(groups: Sequence) -> np.ndarray:
    """The number of each image's patient, in the order of appearance."""
    codes, _ = pd.factorize(np.asarray(groups))
    if (codes < 0).any():
        raise ValueError(
            f"groups lacks the patient of {(codes < 0).sum()} images: give each of them an id of its own, e.g. its path"
        )
    return codes


def _check(
    labels: np.ndarray, score: np.ndarray, groups: Sequence
) -> tuple[np.ndarray, np.ndarray]:
    labels, score = np.asarray(labels), np.asarray(score, dtype=float)
    if not len(labels) == len(score) == len(groups) or not len(labels):
        raise ValueError(
            f"labels ({len(labels)}), score ({len(score)}) and groups ({len(groups)}) "
            "must have the same length above 0"
        )
    if score.ndim > 2 or (score.ndim == 2 and score.shape[1] < 3):
        raise ValueError(
            f"score must be [N] of class 1, or [N,K] of K > 2 classes, not {score.shape}"
        )
    if not np.isin(labels, range(2 if score.ndim == 1 else score.shape[1])).all():
        known = "0 or 1" if score.ndim == 1 else f"0 to {score.shape[1] - 1}"
        raise ValueError(f"labels must be {known}, found {np.unique(labels)[:5]}")
    if not np.isfinite(score).all():
        raise ValueError("score holds NaN or infinite values: the model's output is broken")
    return labels.astype(int), score


def _row(
    name: str, values: np.ndarray, n: int, level: float, without: np.ndarray | None = None
) -> dict:
    """Value (the first of `values`) and interval; BCa where `without` holds the values without each patient."""
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    # A draw without one of the classes has no AUC or sensitivity: such draws are left out of the interval.
    resampled = values[1:][np.isfinite(values[1:])]
    if without is not None and len(resampled):
        tails = _bca_tails(values[0], resampled, without[np.isfinite(without)], tails)
    known = len(resampled) and np.isfinite(tails).all()
    low, high = np.quantile(resampled, tails) if known else (np.nan, np.nan)
    return {
        "metric": name,
        "value": float(values[0]),
        "ci_low": float(low),
        "ci_high": float(high),
        "n": n,
    }


def _bca_tails(
    value: float, resampled: np.ndarray, without: np.ndarray, tails: np.ndarray
) -> np.ndarray:
    """The shares of the draws at which a BCa interval ends (Efron 1987)."""
    # Draws equal to the value count by half on both sides: shares and AUCs of few patients have many of them.
    bias = norm.ppf(((resampled < value).mean() + (resampled <= value).mean()) / 2)
    pull = without.mean() - without if len(without) else np.zeros(1)
    spread = (pull**2).sum() ** 1.5
    acceleration = (pull**3).sum() / (6 * spread) if spread > 0 else 0.0
    with np.errstate(invalid="ignore"):
        moved = bias + norm.ppf(tails)
        return norm.cdf(bias + moved / (1 - acceleration * moved))


def _rates(
    labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray, classes: Sequence[int]
) -> dict[str, np.ndarray]:
    """All threshold metrics for every row of weights at once, from the weighted counts of each class."""

    def counted(flags: np.ndarray) -> np.ndarray:
        return weights @ flags.astype(float)

    right = [counted((labels == c) & (predicted == c)) for c in classes]
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = [right[c] / counted(labels == c) for c in classes]
        called = [counted(predicted == c) for c in classes]
        # A class that is never predicted has precision 0 (scikit-learn's zero_division=0).
        precision = [
            np.where(called[c] > 0, right[c] / np.maximum(called[c], 1e-12), 0.0) for c in classes
        ]
        total = [precision[c] + recall[c] for c in classes]
        f1 = [np.where(total[c] > 0, 2 * precision[c] * recall[c] / total[c], 0.0) for c in classes]
    mean = {"precision": precision, "recall": recall, "f1": f1, "balanced_accuracy": recall}
    return {
        "accuracy": sum(right) / weights.sum(1),
        "sensitivity": recall[1],
        "specificity": recall[0],
    } | {name: sum(values) / len(classes) for name, values in mean.items()}


def weighted_auc(labels: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve per row of weights (Mann-Whitney form, ties count one half)."""
    positive, negative, _ = _by_score(labels, score, weights)
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def _roc_point(
    labels: np.ndarray, score: np.ndarray, weights: np.ndarray, specificity: float
) -> tuple[np.ndarray, np.ndarray]:
    """Per row of weights: sensitivity and threshold of the lowest threshold with at least that specificity."""
    positive, negative, scores = _by_score(labels, score, weights)
    below, total = np.cumsum(negative, axis=1), negative.sum(1, keepdims=True)
    # The slack is for 0.55 * 100 = 55.00000000000001: 55 of 100 negatives are a specificity of 0.55.
    place = (below < specificity * total - 1e-9).sum(1)
    above = np.cumsum(positive[:, ::-1], axis=1)[:, ::-1] - positive
    with np.errstate(invalid="ignore"):
        sensitivity = above[np.arange(len(above)), place] / positive.sum(1)
    return np.where(total[:, 0] > 0, sensitivity, np.nan), scores[place]


def _by_score(
    labels: np.ndarray, score: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight of the positive and of the negative images at each score [B,L], and the scores [L], ascending."""
    scores, level = np.unique(score, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(level[order]) > 0])
    positive = np.add.reduceat((weights * (labels == 1))[:, order], starts, axis=1)
    negative = np.add.reduceat((weights * (labels == 0))[:, order], starts, axis=1)
    return positive, negative, scores
