"""Paired comparisons of two models on the same images: accuracy, AUC, and p-values of several comparisons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, rankdata

from . import metrics
from .metrics import _check, _exact, _patients


def paired_difference(
    right_a: np.ndarray,
    right_b: np.ndarray,
    groups: Sequence,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    interval: str = "percentile",
) -> dict[str, float]:
    """Accuracy of a minus accuracy of b on the same images, where a patient may have several: McNemar by patient.

    right_a, right_b: booleans [N], e.g. right predictions, or "not fooled" for robust accuracy; groups: patient ids
    [N]. Returns value, ci_low, ci_high (patient bootstrap, `interval` as in `metrics.bootstrap`), n, only_a and only_b
    (images that only one of them has right) and p. p is the exact two-sided randomisation test (Fisher 1935) whose
    null hypothesis lets the two models trade places in any patient; with one image a patient it is McNemar's exact
    test (1947). Where all images agree, the bootstrap would claim
    certainty: the interval then says, with patients as trials, how often others can still occur (Clopper & Pearson
    1934). Errors: ValueError for unequal lengths.

    >>> found = paired_difference(np.array([1, 1, 1, 1, 1, 1, 0]), np.zeros(7), list("abcdefg"), draws=50)
    >>> round(found["value"], 3), found["p"]
    (0.857, 0.03125)
    """
    right_a, right_b = np.asarray(right_a, bool), np.asarray(right_b, bool)
    if not right_a.shape == right_b.shape == (len(groups),):
        raise ValueError(
            f"right_a {list(right_a.shape)}, right_b {list(right_b.shape)} and groups ({len(groups)}) must have one "
            "length: pair the same images"
        )
    gain = right_a.astype(float) - right_b
    found = metrics.bootstrap(
        lambda weights: weights @ gain / weights.sum(1),
        groups,
        draws=draws,
        level=level,
        seed=seed,
        interval=interval,
    ).to_dict("records")[0]
    if (gain == gain[0]).all():
        # An unseen patient moves a difference of 0 by one, a difference of one by two at most.
        reach = _exact(0.0, groups, level)["ci_high"] * (1 + abs(gain[0]))
        found |= {"ci_low": max(gain[0] - reach, -1.0), "ci_high": min(gain[0] + reach, 1.0)}
    by_patient = np.bincount(_patients(groups), weights=gain).astype(int)
    counts = {"only_a": int((gain > 0).sum()), "only_b": int((gain < 0).sum())}
    return found | counts | {"p": _sign_flip(by_patient)}


def delong(
    labels: np.ndarray, score: np.ndarray, groups: Sequence, *, level: float = 0.95
) -> dict[str, float]:
    """An AUC with its standard error and interval in closed form, for patients with one or several images.

    labels [N] of 0/1, score [N] of class 1, groups [N] patient ids. DeLong et al. 1988 (Biometrics 44:837) take the
    images as independent; with several of a patient the variance is Obuchowski's for clustered data (1997, Biometrics
    53:567), which is the same number where every patient has one. The interval is symmetric on the logit scale, so
    that it stays in [0, 1]; NaN for an AUC of 0 or 1. Keys metric ("auc"), value, ci_low, ci_high, n, se. Errors:
    ValueError for unequal lengths, labels other than 0/1, fewer than two patients with images of a class.

    >>> found = delong([0, 0, 0, 1, 1, 1], [.1, .4, .35, .8, .3, .9], range(6))
    >>> round(found["value"], 3), round(found["se"], 3)
    (0.778, 0.248)
    """
    auc, covariance = auc_covariance(labels, [score], groups)
    value, se = float(auc[0]), float(np.sqrt(covariance[0, 0]))
    low = high = np.nan
    if 0 < value < 1:
        middle, reach = (
            np.log(value / (1 - value)),
            norm.ppf((1 + level) / 2) * se / (value * (1 - value)),
        )
        low, high = (float(1 / (1 + np.exp(-end))) for end in (middle - reach, middle + reach))
    return {
        "metric": "auc",
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "n": len(labels),
        "se": se,
    }


def delong_test(
    labels: np.ndarray,
    score_a: np.ndarray,
    score_b: np.ndarray,
    groups: Sequence,
    *,
    level: float = 0.95,
) -> dict[str, float]:
    """Do two models differ in AUC on the same images? DeLong's test, with Obuchowski's variance by patient.

    Arguments, sources and errors as for `delong`. Keys value (AUC of a minus AUC of b), ci_low, ci_high, z, p
    (two-sided), n, auc_a, auc_b. Where both models rank the images alike there is no variance: p is 1 and the
    interval NaN.

    >>> found = delong_test([0, 0, 0, 1, 1, 1], [.1, .4, .35, .8, .3, .9], [.2, .6, .5, .4, .55, .7], range(6))
    >>> round(found["value"], 3), round(found["p"], 3)
    (0.111, 0.724)
    """
    auc, covariance = auc_covariance(labels, [score_a, score_b], groups)
    difference, variance = (
        float(auc[0] - auc[1]),
        covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1],
    )
    found = {"value": difference, "ci_low": np.nan, "ci_high": np.nan, "z": np.nan}
    if variance > 1e-14:  # rounding alone leaves about 1e-18
        se = float(np.sqrt(variance))
        reach, z = norm.ppf((1 + level) / 2) * se, difference / se
        found |= {
            "ci_low": difference - reach,
            "ci_high": difference + reach,
            "z": z,
            "p": float(2 * norm.sf(abs(z))),
        }
    else:
        found["p"] = 1.0 if abs(difference) < 1e-12 else np.nan
    return found | {"n": len(labels), "auc_a": float(auc[0]), "auc_b": float(auc[1])}


def auc_covariance(
    labels: np.ndarray, scores: Sequence[np.ndarray], groups: Sequence
) -> tuple[np.ndarray, np.ndarray]:
    """AUCs [M] of M models on the same images, and their covariance [M,M]; scores: M arrays [N].

    The placement values come from midranks (Sun & Xu 2014, IEEE Signal Process. Lett. 21:1389), in O(N log N) instead
    of one comparison a pair; their sums by patient give the variance (Obuchowski 1997). Errors as for `delong`.

    >>> auc, covariance = auc_covariance([0, 0, 1, 1], [[.1, .3, .2, .4], [.1, .2, .3, .4]], "abcd")
    >>> auc.tolist(), covariance.round(3).tolist()
    ([0.75, 1.0], [[0.125, 0.0], [0.0, 0.0]])
    """
    groups = list(groups)
    scores = np.stack([_check(labels, score, groups)[1] for score in scores])
    positive, codes = np.asarray(labels) == 1, _patients(groups)
    with_images = [len(np.unique(codes[part])) for part in (positive, ~positive)]
    if min(with_images) < 2:
        raise ValueError(
            f"{with_images[0]} patients have an image of class 1 and {with_images[1]} one of class 0: a variance needs "
            "at least two of each"
        )
    inside, outside = scores[:, positive], scores[:, ~positive]
    m, n = inside.shape[1], outside.shape[1]
    ranks = rankdata(np.concatenate([inside, outside], axis=1), axis=1)
    # Placement values: the share of the other class that an image is ranked above (class 1) or below (class 0).
    above, below = (
        (ranks[:, :m] - rankdata(inside, axis=1)) / n,
        1 - (ranks[:, m:] - rankdata(outside, axis=1)) / m,
    )
    auc = above.mean(1)
    of_positive = _sums(above - auc[:, None], codes[positive], codes.max() + 1) / m
    of_negative = _sums(below - auc[:, None], codes[~positive], codes.max() + 1) / n
    # A patient with images of both classes moves both parts at once: the third term, 0 without such patients.
    mixed = of_positive @ of_negative.T
    covariance = (
        _unbiased(with_images[0]) * of_positive @ of_positive.T
        + _unbiased(with_images[1]) * of_negative @ of_negative.T
        + _unbiased(codes.max() + 1) * (mixed + mixed.T)
    )
    np.fill_diagonal(covariance, np.maximum(np.diag(covariance), 0))
    return auc, covariance


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values adjusted for their number by Holm's step-down method (Holm 1979, Scand. J. Stat. 6:65).

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty(len(p))
    result[order] = np.minimum(adjusted, 1)
    return result


def _sign_flip(gains: np.ndarray) -> float:
    """Two-sided p of the sum of `gains` (integers) when each has either sign with probability one half, exactly."""
    sizes = np.abs(gains[gains != 0])
    reach = int(sizes.sum())
    chance = np.zeros(2 * reach + 1)  # of the sums -reach .. reach
    chance[reach] = 1.0
    for size in sizes:
        moved = np.zeros_like(chance)
        moved[size:] += chance[:-size] / 2
        moved[:-size] += chance[size:] / 2
        chance = moved
    return float(min(chance[np.abs(np.arange(-reach, reach + 1)) >= abs(gains.sum())].sum(), 1.0))


def _sums(values: np.ndarray, codes: np.ndarray, patients: int) -> np.ndarray:
    """Sums [M,patients] of `values` [M,N] by patient."""
    return np.stack([np.bincount(codes, weights=row, minlength=patients) for row in values])


def _unbiased(clusters: int) -> float:
    return clusters / (clusters - 1)
