"""Are the probabilities right, and do decisions by them help? Calibration errors, temperature, decision curves.

Two classes: everything is about P(class 1) and how often class 1 occurs, not about the confidence in the predicted
class (for two classes that is the classwise form of Kull et al., arXiv 1910.12656: both classes give the same number).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.optimize import brentq
from scipy.special import softmax

from . import metrics
from .metrics import _check, _exact, _patients
from .plots import COLORS, panels

ERRORS = ("brier", "log_loss", "ece", "mce")
TEMPERATURES = (1e-4, 1e4)  # where fit_temperature looks
_SIMULATED = 200  # sets of labels behind `if_calibrated`


def summary(
    labels: np.ndarray,
    probability: np.ndarray,
    groups: Sequence,
    *,
    bins: int = 10,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    interval: str = "bca",
) -> pd.DataFrame:
    """Brier score, log loss, expected and maximum calibration error of P(class 1), with intervals by patient.

    labels [N] of 0/1, probability [N] of class 1, groups [N] patient ids. Brier (1950): mean squared difference of
    probability and label. Log loss: natural logarithm, probabilities 1e-16 inside [0, 1]. ece and mce: mean (by
    images) and largest gap between mean probability and share of class 1 in `bins` bins of equal mass (Naeini et al.
    2015; equal mass: Nguyen & O'Connor 2015), which stay the same in all draws. Both are above 0 for a model without
    any error, the more so the fewer the images, and a bootstrap adds to that. Hence the column if_calibrated: what
    the same probabilities would score if they were right, on average over simulated labels (one random number a
    patient). An ece or mce near it shows no error, and its interval is too high, also with BCa, which takes a part of
    this bias away; one well above it has an interval that covers. Columns metric, value, ci_low, ci_high, n, if_calibrated. Errors: ValueError as for
    `metrics.classification`, for probabilities outside [0, 1] or bins < 1.

    >>> found = summary([0, 1, 0, 1], [0.2, 0.4, 0.6, 0.8], "abcd", bins=2, draws=50).set_index("metric")["value"]
    >>> found[["brier", "ece", "mce"]].round(3).tolist()
    [0.2, 0.2, 0.2]
    """
    groups = list(groups)
    labels, probability = _check_probability(labels, probability, groups)
    member = _members(probability, bins)

    def errors(weights: np.ndarray, outcome: np.ndarray = labels) -> np.ndarray:
        inside = np.clip(probability, 1e-16, 1 - 1e-16)
        # On [B,N]: the weights differ from draw to draw, or the outcome does.
        loss = -np.where(outcome == 1, np.log(inside), np.log1p(-inside))
        total, gap, mass = (
            weights.sum(1),
            (weights * (probability - outcome)) @ member,
            weights @ member,
        )
        gaps = np.abs(gap) / np.maximum(mass, 1e-12)
        squared = (weights * (probability - outcome) ** 2).sum(1)
        return np.column_stack(
            [
                squared / total,
                (weights * loss).sum(1) / total,
                np.abs(gap).sum(1) / total,
                gaps.max(1),
            ]
        )

    table = metrics.bootstrap(
        errors, groups, draws=draws, level=level, seed=seed, interval=interval
    )
    table.insert(0, "metric", ERRORS)
    chance = np.random.default_rng(seed).random((_SIMULATED, len(set(groups))))[
        :, _patients(groups)
    ]
    simulated = errors(np.ones_like(chance), (chance < probability).astype(int))
    return table.assign(if_calibrated=simulated.mean(0))


def reliability(
    labels: np.ndarray,
    probability: np.ndarray,
    groups: Sequence,
    *,
    bins: int = 10,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    interval: str = "percentile",
) -> pd.DataFrame:
    """Share of class 1 against mean P(class 1) in bins of equal mass: the numbers of a reliability diagram.

    Arguments and errors as for `summary`. Images of the same probability share a bin, so that there can be fewer
    than `bins`. Columns low, high (lowest and highest probability), probability (mean), value (share of class 1),
    ci_low, ci_high (patient bootstrap; exact binomial where the share is 0 or 1), n, patients. Niculescu-Mizil &
    Caruana 2005 (ICML).

    >>> reliability([0, 1, 1, 1], [0.2, 0.4, 0.6, 0.8], "abcd", bins=2, draws=50)[["probability", "value"]].round(2)
       probability  value
    0          0.3    0.5
    1          0.7    1.0
    """
    groups = list(groups)
    labels, probability = _check_probability(labels, probability, groups)
    member = _members(probability, bins)

    def shares(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return weights @ (member * labels[:, None]) / (weights @ member)

    table = metrics.bootstrap(
        shares, groups, draws=draws, level=level, seed=seed, interval=interval
    )
    rows = []
    for row, inside in zip(table.to_dict("records"), member.T.astype(bool), strict=True):
        own, patients = probability[inside], np.asarray(groups)[inside]
        row |= {"n": len(own), "patients": len(pd.unique(patients))}
        if row["value"] in (0.0, 1.0):
            row |= _exact(row["value"], patients, level)
        rows.append({"low": own.min(), "high": own.max(), "probability": own.mean()} | row)
    return pd.DataFrame(rows)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T > 0 that makes softmax(logits / T) fit best: temperature scaling (Guo et al., arXiv 1706.04599).

    logits [N,K], labels [N] of 0..K-1, both of the VALIDATION images; divide the test logits by T. T changes no
    prediction and no AUC of two classes. The log loss is convex in 1/T, so that its slope has one root; where it has
    none (every image is right, or the logits point away from the labels) T stays 1, with a RuntimeWarning. Errors:
    ValueError for other shapes or labels, or logits that are not finite.

    >>> round(fit_temperature([[2.0, 0], [2, 0], [2, 0], [2, 0]], [0, 0, 0, 1]), 4)  # P = 3/4 at T = 2 / ln 3
    1.8205
    """
    logits, labels = np.asarray(logits, dtype=float), np.asarray(labels)
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != (len(logits),) or not len(labels):
        raise ValueError(
            f"logits must be [N,K] with K >= 2 and labels [N], N > 0, not {list(logits.shape)} and "
            f"{list(labels.shape)}; a single logit z of class 1 is the pair (0, z)"
        )
    if not np.isfinite(logits).all():
        raise ValueError("logits hold NaN or infinite values: the model's output is broken")
    if not np.isin(labels, range(logits.shape[1])).all():
        raise ValueError(
            f"labels must be 0 ... {logits.shape[1] - 1}, found {np.unique(labels)[:5]}"
        )
    own = logits[np.arange(len(labels)), labels.astype(int)]

    def slope(log_t: float) -> float:
        """Derivative of the mean log loss in 1/T, which falls as T grows."""
        return float(((softmax(logits * np.exp(-log_t), axis=1) * logits).sum(1) - own).mean())

    ends = np.log(TEMPERATURES)
    if slope(ends[0]) <= 0 or slope(ends[1]) >= 0:
        warnings.warn(
            "no temperature fits: the validation images are all right, or the logits point away from the labels; T "
            "stays 1. Use more validation images",
            RuntimeWarning,
            stacklevel=2,
        )
        return 1.0
    return float(np.exp(brentq(slope, *ends, xtol=1e-10)))


def decision_curve(
    labels: np.ndarray,
    probability: np.ndarray,
    groups: Sequence,
    *,
    thresholds: Sequence[float] = tuple(np.arange(1, 100) / 100),
    prevalence: float | None = None,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    interval: str = "percentile",
) -> pd.DataFrame:
    """Net benefit of acting on the model against acting on all or none (Vickers & Elkin 2006, Med Decis Making 26:565).

    At threshold t, where one false alarm costs t / (1 - t) of what one hit is worth, the images with P(class 1) >= t
    are treated: net benefit = hits / N - false alarms / N * t / (1 - t). labels, probability, groups [N] as for
    `summary`; calibrate first. `prevalence`: share of class 1 where the model is to be used (default: that of the
    images), which a data set collected by class does not show. Columns threshold, strategy ("model", "treat all",
    "treat none", and "gain": the model less the better of the other two), value, ci_low, ci_high (patient
    bootstrap), n. Errors: ValueError as for `summary`, for thresholds or a prevalence outside (0, 1).

    >>> found = decision_curve([0, 0, 0, 1], [0.1, 0.3, 0.6, 0.9], "abcd", thresholds=[0.5], draws=50)
    >>> found.set_index("strategy")["value"].tolist()
    [0.0, -0.5, 0.0, 0.0]
    """
    groups = list(groups)
    labels, probability = _check_probability(labels, probability, groups)
    cuts = np.asarray(thresholds, dtype=float)
    if cuts.ndim != 1 or not len(cuts) or not ((cuts > 0) & (cuts < 1)).all():
        raise ValueError(
            f"thresholds must be a list of numbers between 0 and 1, both excluded, not {thresholds}"
        )
    if prevalence is not None and not 0 < prevalence < 1:
        raise ValueError(
            f"prevalence must be between 0 and 1, both excluded, or None, not {prevalence}"
        )
    cost, treated = cuts / (1 - cuts), probability[:, None] >= cuts
    diseased = (labels == 1).astype(float)

    def benefits(weights: np.ndarray) -> np.ndarray:
        ill, well = (weights @ part for part in (diseased, 1 - diseased))
        with np.errstate(invalid="ignore", divide="ignore"):
            hit, alarm = (
                (1 / (ill + well),) * 2
                if prevalence is None
                else (prevalence / ill, (1 - prevalence) / well)
            )
            model = hit[:, None] * (weights @ (treated * diseased[:, None]))
            model -= (alarm[:, None] * cost) * (weights @ (treated * (1 - diseased)[:, None]))
            everyone = (hit * ill)[:, None] - (alarm * well)[:, None] * cost
            return np.hstack(
                [model, everyone, np.zeros_like(model), model - np.maximum(everyone, 0)]
            )

    table = metrics.bootstrap(
        benefits, groups, draws=draws, level=level, seed=seed, interval=interval
    )
    table.insert(0, "threshold", np.tile(cuts, 4))
    table.insert(1, "strategy", np.repeat(["model", "treat all", "treat none", "gain"], len(cuts)))
    return table


def figure_reliability(tables: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Reliability diagram from `reliability` tables by model name, with each bin's interval; diagonal: calibrated."""
    if not tables:
        raise ValueError("there is no table to show: give at least one of `reliability`")
    figure, axes = panels(1, width=4.6, height=4.2)
    axis = axes[0, 0]
    axis.plot([0, 1], [0, 1], ":", color="0.6")
    for color, (name, table) in zip(cycle(COLORS), tables.items(), strict=False):
        reach = np.abs(table[["ci_low", "ci_high"]].to_numpy().T - table["value"].to_numpy())
        axis.errorbar(
            table["probability"],
            table["value"],
            yerr=reach,
            fmt="o-",
            ms=4,
            lw=1.2,
            elinewidth=0.8,
            capsize=2,
            color=color,
            label=name,
        )
    axis.set(
        xlabel="mean P(class 1) in the bin",
        ylabel="share of class 1",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
    )
    axis.set_title(f"Reliability, bins of equal mass\n{caption}", fontsize=9)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, frameon=False, loc="upper left")
    figure.tight_layout()
    return figure


def figure_decision_curve(tables: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Net benefit against threshold from `decision_curve` tables by model name, with intervals as bands."""
    if not tables:
        raise ValueError("there is no table to show: give at least one of `decision_curve`")
    figure, axes = panels(1, width=5.4, height=3.9)
    axis = axes[0, 0]
    for color, (name, table) in zip(cycle(COLORS), tables.items(), strict=False):
        line = table[table["strategy"].eq("model")]
        axis.plot(line["threshold"], line["value"], color=color, lw=1.6, label=name)
        axis.fill_between(
            line["threshold"], line["ci_low"], line["ci_high"], color=color, alpha=0.12, lw=0
        )
    first = next(iter(tables.values()))
    for strategy, style in (("treat all", "--"), ("treat none", ":")):
        line = first[first["strategy"].eq(strategy)]
        axis.plot(line["threshold"], line["value"], style, color="0.4", lw=1.2, label=strategy)
    # Treating all falls without end as the threshold nears 1: below this nothing is worth comparing.
    top = max(table.loc[table["strategy"].eq("model"), "value"].max() for table in tables.values())
    top = max(top, first.loc[first["strategy"].eq("treat all"), "value"].max(), 0.01)
    axis.set(
        xlabel="threshold probability",
        ylabel="net benefit",
        xlim=(0, 1),
        ylim=(-0.2 * top, 1.1 * top),
    )
    axis.set_title(f"Decision curve\n{caption}", fontsize=9)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def _check_probability(
    labels: np.ndarray, probability: np.ndarray, groups: Sequence
) -> tuple[np.ndarray, np.ndarray]:
    labels, probability = _check(labels, probability, groups)
    if probability.min() < 0 or probability.max() > 1:
        raise ValueError(
            f"probability must be in [0, 1], found {probability.min():.3g} to {probability.max():.3g}: "
            "give softmax outputs, not logits"
        )
    return labels, probability


def _members(probability: np.ndarray, bins: int) -> np.ndarray:
    """Which bin of equal mass each image is in, 0/1 [N,K], K <= bins; the same probability is in the same bin."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    starts = np.unique(np.sort(probability)[np.arange(bins) * len(probability) // bins])
    place = np.searchsorted(starts, probability, side="right") - 1
    return (place[:, None] == np.arange(len(starts))).astype(float)
