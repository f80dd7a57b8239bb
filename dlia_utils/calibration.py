"""Are the probabilities right? Calibration errors, reliability and temperature.

Two classes: everything is about P(class 1) and how often class 1 occurs (Kull et al., 1910.12656).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy import ndarray as Array
from scipy.optimize import brentq
from scipy.special import softmax

from .metrics import bootstrap, checked, exact_interval, patient_codes, probabilities

SIMULATED = 200  # sets of labels behind `if_calibrated`


def summary(
    labels: Array, probability: Array, groups: Sequence, *, bins: int = 10, **options
) -> pd.DataFrame:
    """Brier score, log loss, expected and maximum calibration error of P(class 1), by patient.

    labels [N] of 0/1, probability [N] of class 1, groups [N]; options as in `metrics.bootstrap`.
    ece and mce: mean and largest gap between mean probability and share of class 1 in bins of equal
    mass (Naeini et al. 2015; Nguyen & O'Connor 2015). if_calibrated: what the same probabilities
    would score if they were right, on average over simulated labels: also above 0. BCa intervals.

    >>> found = summary([0, 1, 0, 1], [0.2, 0.4, 0.6, 0.8], "abcd", bins=2, draws=50)
    >>> found["value"].round(3).tolist()
    [0.2, 0.57, 0.2, 0.2]
    """
    labels, probability, member = _binned(labels, probability, groups, bins)

    def errors(weights: Array, outcome: Array = labels) -> Array:
        inside = np.clip(probability, 1e-16, 1 - 1e-16)
        # On [B,N]: the weights differ from draw to draw, or the outcome does.
        loss = -np.where(outcome == 1, np.log(inside), np.log1p(-inside))
        squared = (probability - outcome) ** 2
        gap = np.abs((weights * (probability - outcome)) @ member)
        means = [(weights * part).sum(1) for part in (squared, loss)] + [gap.sum(1)]
        largest = (gap / np.maximum(weights @ member, 1e-12)).max(1)
        return np.column_stack([part / weights.sum(1) for part in means] + [largest])

    table = bootstrap(errors, groups, **{"bca": True} | options)
    table.insert(0, "metric", ["brier", "log_loss", "ece", "mce"])
    codes = patient_codes(groups)
    rng = np.random.default_rng(options.get("seed", 0))
    chance = rng.random((SIMULATED, codes.max() + 1))[:, codes]
    simulated = errors(np.ones_like(chance), (chance < probability).astype(int))
    return table.assign(if_calibrated=simulated.mean(0))


def reliability(
    labels: Array, probability: Array, groups: Sequence, *, bins: int = 10, **options
) -> pd.DataFrame:
    """Share of class 1 against mean P(class 1) in bins of equal mass: a reliability diagram.

    Niculescu-Mizil & Caruana 2005 (ICML). Equal probabilities share a bin, so there can be fewer
    than `bins`. Columns probability (mean), value (share of class 1), ci_low, ci_high, n.

    >>> table = reliability([0, 1, 1, 1], [0.2, 0.4, 0.6, 0.8], "abcd", bins=2, draws=50)
    >>> table[["probability", "value"]].round(2).values.tolist()
    [[0.3, 0.5], [0.7, 1.0]]
    """
    labels, probability, member = _binned(labels, probability, groups, bins)

    def shares(weights: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return weights @ (member * labels[:, None]) / (weights @ member)

    rows, patient = [], patient_codes(groups)
    found = bootstrap(shares, groups, **options).to_dict("records")
    for row, inside in zip(found, member.T.astype(bool), strict=True):
        if row["value"] in (0.0, 1.0):
            row["ci_low"], row["ci_high"] = exact_interval(row["value"], patient[inside])
        rows.append({"probability": probability[inside].mean()} | row | {"n": inside.sum()})
    return pd.DataFrame(rows)


def fit_temperature(logits: Array, labels: Array) -> float:
    """The T > 0 that makes softmax(logits / T) fit best (Guo et al., arXiv 1706.04599).

    logits [N,K], labels [N] of 0..K-1 of validation images. The log loss is convex in 1/T, so its
    slope has one root; where it has none (every image is right) T stays 1, with a RuntimeWarning.

    >>> round(fit_temperature([[2.0, 0], [2, 0], [2, 0], [2, 0]], [0, 0, 0, 1]), 4)  # 2 / ln 3
    1.8205
    """
    logits, labels = np.asarray(logits, dtype=float), np.asarray(labels)
    own = logits[np.arange(len(labels)), labels.astype(int)]

    def slope(log_t: float) -> float:  # of the mean log loss in 1/T; it falls as T grows
        return float(((softmax(logits * np.exp(-log_t), axis=1) * logits).sum(1) - own).mean())

    ends = np.log([1e-4, 1e4])
    if slope(ends[0]) <= 0 or slope(ends[1]) >= 0:
        text = "no temperature fits, T stays 1: use more validation images"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return 1.0
    return float(np.exp(brentq(slope, *ends, xtol=1e-10)))


def _binned(labels: Array, probability: Array, groups: Sequence, bins: int) -> tuple:
    """What was given, checked, and the bin of equal mass of each image, 0/1 [N, bins]."""
    labels, probability = checked(labels, probability, groups)
    probability = probabilities(probability)
    starts = np.unique(np.sort(probability)[np.arange(bins) * len(probability) // bins])
    place = np.searchsorted(starts, probability, side="right") - 1
    return labels, probability, (place[:, None] == np.arange(len(starts))).astype(float)
