"""Classification metrics with patient-clustered intervals, and paired tests between two models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

METRICS = ("accuracy", "balanced_accuracy", "precision", "recall", "f1", "sensitivity", "specificity", "auc")


def classification(
    labels: np.ndarray,
    probability: np.ndarray,
    groups: Sequence,
    *,
    threshold: float = 0.5,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Two-class metrics, each with a percentile interval from resampling whole patients (Field & Welsh 2007).

    `labels` [N] of 0/1, `probability` [N] of class 1, `groups` [N] patient ids. Precision, recall and F1 are
    macro averages; sensitivity and specificity belong to class 1 and class 0 (accuracy, too, gets the exact binomial
    interval where it is 0 or 1: see `share`). An AUC needs both classes, else
    it is NaN. Columns: metric, value, ci_low, ci_high, n. Errors: unequal lengths, labels other than 0/1.

    >>> table = classification(np.array([0, 0, 1, 1]), np.array([.1, .6, .7, .9]), list("abcd"), draws=50)
    >>> table.set_index("metric").loc["accuracy", "value"]
    np.float64(0.75)
    """
    labels, probability = _check(labels, probability, groups)
    weights = np.vstack([np.ones(len(labels)), patient_weights(groups, draws=draws, seed=seed)])
    # Strictly above, as argmax decides two equal logits for class 0.
    predicted = (probability > threshold).astype(int)
    values = _rates(labels, predicted, weights) | {"auc": _weighted_auc(labels, probability, weights)}
    rows = [_row(name, values[name], len(labels), level) for name in METRICS]
    counted = {"accuracy": labels >= 0, "sensitivity": labels == 1, "specificity": labels == 0}
    for row in rows:
        if row["metric"] in counted and row["value"] in (0.0, 1.0):
            row |= _exact(row["value"], np.asarray(groups)[counted[row["metric"]]], level)
    return pd.DataFrame(rows)


def share(flags: np.ndarray, groups: Sequence, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> dict:
    """Mean of a boolean array with a patient-bootstrap interval, e.g. robust accuracy from 'still right' flags.

    When all flags agree, every draw does too and the bootstrap would claim certainty: the interval is then the
    exact binomial one (Clopper & Pearson 1934) with patients as trials.

    >>> share(np.array([True, True, False, True]), [1, 1, 2, 3], draws=100)["value"]
    0.75
    """
    flags = np.asarray(flags, dtype=float)
    if len(flags) != len(groups) or not len(flags):
        raise ValueError(f"flags ({len(flags)}) and groups ({len(groups)}) must have the same length above 0")
    weights = np.vstack([np.ones(len(flags)), patient_weights(groups, draws=draws, seed=seed)])
    row = _row("share", weights @ flags / weights.sum(1), len(flags), level)
    if row["value"] in (0.0, 1.0):
        row |= _exact(row["value"], groups, level)
    return row


def _exact(value: float, groups: Sequence, level: float) -> dict[str, float]:
    """The binomial interval of a share of 0 or 1, with patients as trials; the bootstrap would claim certainty."""
    patients = len(pd.unique(np.asarray(groups)))
    exact = binomtest(int(value) * patients, patients).proportion_ci(level, method="exact")
    return {"ci_low": float(exact.low), "ci_high": float(exact.high)}


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> dict[str, float]:
    """Exact McNemar test on paired outcomes (McNemar 1947): do two models differ in accuracy on the same images?

    `right_a`, `right_b` [N] booleans. Returns the two discordant counts and the two-sided p-value (1 when the
    models never disagree).

    >>> mcnemar(np.array([1, 1, 1, 1, 1, 1, 0], bool), np.array([0, 0, 0, 0, 0, 0, 0], bool))["p"]
    0.03125
    """
    right_a, right_b = np.asarray(right_a, bool), np.asarray(right_b, bool)
    if right_a.shape != right_b.shape:
        raise ValueError(f"right_a has shape {right_a.shape}, right_b {right_b.shape}: pair the same images")
    only_a, only_b = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {"only_a_right": only_a, "only_b_right": only_b, "p": float(p)}


def patient_weights(groups: Sequence, *, draws: int, seed: int = 0) -> np.ndarray:
    """Bootstrap weights [draws, N]: how often each image counts when whole patients are drawn with replacement.

    >>> patient_weights(["a", "a", "b"], draws=2).shape
    (2, 3)
    """
    codes, names = pd.factorize(np.asarray(groups))
    counts = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return counts[:, codes].astype(float)


def _check(labels: np.ndarray, probability: np.ndarray, groups: Sequence) -> tuple[np.ndarray, np.ndarray]:
    labels, probability = np.asarray(labels), np.asarray(probability, dtype=float)
    if not len(labels) == len(probability) == len(groups) or not len(labels):
        raise ValueError(
            f"labels ({len(labels)}), probability ({len(probability)}) and groups ({len(groups)}) "
            "must have the same length above 0"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, found {np.unique(labels)[:5]}")
    if not np.isfinite(probability).all():
        raise ValueError("probability holds NaN or infinite values: the model's output is broken")
    return labels.astype(int), probability


def _row(name: str, values: np.ndarray, n: int, level: float) -> dict:
    tail = (1 - level) / 2
    # A draw without one of the classes has no AUC or sensitivity: such draws are left out of the interval.
    resampled = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(resampled, [tail, 1 - tail]) if len(resampled) else (np.nan, np.nan)
    return {"metric": name, "value": float(values[0]), "ci_low": float(low), "ci_high": float(high), "n": n}


def _rates(labels: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """All threshold metrics for every row of weights at once, from four weighted counts."""
    count = {(t, p): weights @ ((labels == t) & (predicted == p)).astype(float) for t in (0, 1) for p in (0, 1)}
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = [count[c, c] / (count[c, 0] + count[c, 1]) for c in (0, 1)]
        called = [count[0, c] + count[1, c] for c in (0, 1)]
        # A class that is never predicted has precision 0 (scikit-learn's zero_division=0).
        precision = [np.where(called[c] > 0, count[c, c] / np.maximum(called[c], 1e-12), 0.0) for c in (0, 1)]
        total = [precision[c] + recall[c] for c in (0, 1)]
        f1 = [np.where(total[c] > 0, 2 * precision[c] * recall[c] / total[c], 0.0) for c in (0, 1)]
    mean = {"precision": precision, "recall": recall, "f1": f1}
    return {
        "accuracy": (count[0, 0] + count[1, 1]) / weights.sum(1),
        "balanced_accuracy": (recall[0] + recall[1]) / 2,
        "sensitivity": recall[1],
        "specificity": recall[0],
    } | {name: (pair[0] + pair[1]) / 2 for name, pair in mean.items()}


def _weighted_auc(labels: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve per row of weights (Mann-Whitney form, ties count one half)."""
    _, level = np.unique(score, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(level[order]) > 0])
    positive = np.add.reduceat((weights * (labels == 1))[:, order], starts, axis=1)
    negative = np.add.reduceat((weights * (labels == 0))[:, order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))
