"""Classification metrics with intervals by patient, and paired comparisons of two models.

`options` are those of `bootstrap` everywhere: draws, seed, bca. Intervals are of 95 %.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy import ndarray as Array
from scipy.stats import binomtest, norm, rankdata

CHUNK = 4_000_000  # weights that a statistic sees at a time: bounds the memory
LEVEL = 0.95
ROUNDING = 1e-6  # a probability may lie outside [0, 1] by some last digits of float32
NO_ID = ("", *"nan NaN None NA N/A n/a #N/A <NA> NaT null NULL".split())  # how tables write no id
METRICS = "accuracy balanced_accuracy precision recall f1 sensitivity specificity auc".split()


def classification(
    labels: Array, score: Array, groups: Sequence, *, threshold: float = 0.5, **options
) -> pd.DataFrame:
    """Metrics of a classifier, each with an interval from resampling whole patients.

    labels [N] of 0/1, score [N] of class 1 (a probability, or any finite score with its
    `threshold`: log-odds and 0 keep the ranking of sharp models), groups [N] patient ids. Of K > 2
    classes: labels 0..K-1, score [N,K]; AUC is each class against the rest, its mean. Precision,
    recall and F1 are macro averages. A value of 0 or 1 gets the exact binomial interval over its
    own images; metrics of both classes take the class of fewer patients. Columns metric, value,
    ci_low, ci_high, n.

    >>> labels, score = np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.7, 0.9])
    >>> classification(labels, score, list("abcd"), draws=50).set_index("metric").at["auc", "value"]
    np.float64(1.0)
    """
    labels, score = checked(labels, score, groups)
    groups, two = patient_codes(groups), score.ndim == 1
    # Strictly above, as argmax decides two equal logits for class 0.
    predicted = (score > threshold).astype(int) if two else score.argmax(1)
    names = [name for name in METRICS if two or name not in ("sensitivity", "specificity")]
    ranked = [(labels, score)] if two else [(labels == c, p) for c, p in enumerate(score.T)]

    def values(weights: Array) -> Array:
        found = _rates(labels, predicted, weights, 2 if two else score.shape[1])
        found["auc"] = np.mean([weighted_auc(*one, weights) for one in ranked], axis=0)
        return np.column_stack([found[name] for name in names])

    table = bootstrap(values, groups, **options)
    table.insert(0, "metric", names)
    of_class = [labels == label for label in np.unique(labels)]
    fewer = min(of_class, key=lambda own: len(pd.unique(groups[own])))
    about = {"accuracy": labels >= 0, "sensitivity": labels == 1, "specificity": labels == 0}
    for place, name in table.loc[table["value"].isin([0.0, 1.0]), "metric"].items():
        ends = exact_interval(table.at[place, "value"], groups[about.get(name, fewer)])
        table.loc[place, ["ci_low", "ci_high"]] = ends
    return table


def bootstrap(
    statistic: Callable[[Array], Array],
    groups: Sequence,
    *,
    draws: int = 2000,
    seed: int = 0,
    bca: bool = False,
    width: int = 0,
) -> pd.DataFrame:
    """Intervals of any statistic of weighted images by patient (Field & Welsh 2007).

    `statistic` takes weights [B,N], how often each image counts, and returns [B] or [B,M]; one row
    a column: value (every image once), ci_low, ci_high, n. Percentile intervals, or BCa on the same
    draws (Efron 1987, JASA 82:171). A single patient has no interval (NaN), and BCa has none when
    all draws lie on one side of the value. width: numbers that a draw needs, if above N.

    >>> height = np.array([1.0, 3.0, 2.0, 6.0])
    >>> bootstrap(lambda w: w @ height / w.sum(1), list("aabc"), draws=100)["value"].item()
    3.0
    """
    codes = patient_codes(groups)
    weights = np.vstack([np.ones(len(codes)), patient_weights(codes, draws=draws, seed=seed)])

    def over(rows: Array) -> Array:
        step = max(1, CHUNK // max(len(codes), width))
        starts = range(0, len(rows), step)
        parts = [statistic(rows[at : at + step].astype(float)) for at in starts]
        return np.concatenate(parts).reshape(len(rows), -1).T

    values, patients = over(weights), np.arange(codes.max() + 1)
    without = over(patients[:, None] != codes) if bca else [None] * len(values)
    values = values if len(patients) > 1 else values[:, :1]
    pairs = zip(values, without, strict=True)
    return pd.DataFrame([interval_row(drawn, len(codes), without=w) for drawn, w in pairs])


def interval_row(drawn: Array, n: int, *, without: Array | None = None) -> dict[str, float]:
    """Value (the first of `drawn`) and the interval of the rest; BCa needs the values `without`.

    A draw that is NaN, such as an AUC without one of the classes, is left out.
    """
    tails = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    resampled = drawn[1:][np.isfinite(drawn[1:])]
    if without is not None and len(resampled):
        tails = _bca_tails(drawn[0], resampled, without[np.isfinite(without)], tails)
    known = len(resampled) and np.isfinite(tails).all()
    low, high = np.quantile(resampled, tails) if known else (np.nan, np.nan)
    return {"value": float(drawn[0]), "ci_low": float(low), "ci_high": float(high), "n": n}


def mean(values: Array, groups: Sequence, **options) -> dict[str, float]:
    """Mean of a number per image with its interval; of booleans it is their `share`."""
    given = np.asarray(values, dtype=float)
    table = bootstrap(lambda weights: weights @ given / weights.sum(1), groups, **options)
    row = table.to_dict("records")[0]
    if np.asarray(values).dtype == bool and row["value"] in (0.0, 1.0):
        row["ci_low"], row["ci_high"] = exact_interval(row["value"], groups)
    return row


def share(flags: Array, groups: Sequence, **options) -> dict[str, float]:
    """Mean of booleans with its interval, the exact one where all agree (see `exact_interval`)."""
    return {"metric": "share"} | mean(np.asarray(flags, dtype=bool), groups, **options)


def exact_interval(value: float, groups: Sequence) -> tuple[float, float]:
    """The binomial interval of a share of 0 or 1, patients as trials (Clopper & Pearson 1934).

    Where all images agree every draw does, too, and a bootstrap would claim certainty.
    """
    patients = patient_codes(groups).max() + 1
    exact = binomtest(int(value) * patients, patients).proportion_ci(LEVEL, method="exact")
    return float(exact.low), float(exact.high)


def patient_weights(groups: Sequence, *, draws: int, seed: int = 0) -> Array:
    """How often each image counts [draws,N] when whole patients are drawn with replacement."""
    codes = patient_codes(groups)
    patients = codes.max(initial=-1) + 1
    chances = np.full(patients, 1 / patients)
    counts = np.random.default_rng(seed).multinomial(patients, chances, size=draws)
    return counts[:, codes].astype(float)


def patient_codes(groups: Sequence, name: str = "groups") -> Array:
    """The number of each image's patient, in the order of appearance (see `exact_ids`)."""
    return pd.factorize(exact_ids(groups, name, "patient"))[0]


def exact_ids(ids: Sequence, name: str, kind: str, of: str = "images") -> Array:
    """Ids as whole numbers or Python objects [N], none merged with another and none changed.

    name: what the argument is called, kind: what an id is one of, of: what has it. Errors:
    ValueError for a missing id (see `missing`), for ids that look alike in two types, such as 1 and
    "1", and for decimals that have lost digits.

    >>> exact_ids(["007", "7", "p1"], "groups", "patient").tolist()
    ['007', '7', 'p1']
    """
    if isinstance(getattr(ids, "dtype", None), np.dtype) and ids.dtype.kind in "iu":
        return np.asarray(ids)
    ids = [one.item() if hasattr(one, "item") else one for one in ids]
    different = {(type(one), one): one for one in ids}.values()
    if lost := any(missing(different)) and sum(missing(ids)):
        own = " of its own, e.g. its path" * (kind == "patient")
        raise ValueError(f"{name} lacks the {kind} of {lost} {of}: give each of them an id{own}")
    seen = {}
    for one in different:
        whole = isinstance(one, numbers.Real) and one % 1 == 0
        first = seen.setdefault(str(int(one) if whole else one), one)
        if type(first) is not type(one):
            text = f"{name} holds {first!r} and {one!r}, which may be one {kind} or two"
            raise ValueError(f"{text}: give all ids in one type, e.g. as text")
        if isinstance(one, float) and abs(one) >= 2**53:
            text = f"{name} holds the decimal {one!r}, whose last digits are lost"
            raise ValueError(f"{text}: read the ids as text (dtype=str)")
    types = set(map(type, seen.values()))
    if types == {int} or types == {float} and all(one % 1 == 0 for one in different):
        fits = all(-(2**63) <= one < 2**63 for one in seen.values())
        return np.array(ids, dtype=np.int64 if fits else object)
    found = np.empty(len(ids), dtype=object)
    found[:] = ids
    return found


def missing(ids: Sequence) -> list[bool]:
    """Where an id is none: None, NaN, pd.NA, blank, or a text that stands for these in tables.

    >>> missing(["p1", "", "nan", None, float("nan"), 0])
    [False, True, True, True, True, False]
    """
    lost = pd.Series(list(ids), dtype=object).isna()
    texts = (one.strip() if isinstance(one, str) else None for one in ids)
    return [bool(gone) or text in NO_ID for gone, text in zip(lost, texts, strict=True)]


def probabilities(values: Array, name: str = "probability") -> Array:
    """Floats in [0, 1]; what rounding left outside (`ROUNDING`) is clipped, else ValueError.

    >>> probabilities([1.0000000000000002, 0.5]).tolist()
    [1.0, 0.5]
    """
    values = np.asarray(values, dtype=float)
    outside = ~((values >= -ROUNDING) & (values <= 1 + ROUNDING))
    if outside.any():
        row = int(np.argmax(outside.reshape(len(values), -1).any(1)))
        worst = float(values[outside][0])
        where = f"{outside.sum()} of {outside.size} values, first row {row}"
        text = f"{name} outside [0, 1]: {worst!r} ({where})"
        raise ValueError(f"{text}: give softmax or sigmoid outputs, not logits or percentages")
    return values.clip(0, 1)


def with_interval(
    row: Mapping, *, scale: float = 1, digits: int | None = None, signed: bool = False
) -> str:
    """One number the way the tables print it; signed: a difference, with + or -.

    digits: None for as many as `row["n"]` images carry, two below 500, else three.

    >>> with_interval({"value": 0.9123, "ci_low": 0.88, "ci_high": 0.94, "n": 64})
    '0.91 [0.88, 0.94]'
    """
    digits = digits_of(row.get("n", 1000)) - round(np.log10(scale)) if digits is None else digits
    form = f"{'+' if signed else ''}.{digits}f"
    ends = (scale * row[one] for one in ("value", "ci_low", "ci_high"))
    value, low, high = (f"{round(one, digits) + 0:{form}}" for one in ends)  # no "-0.00"
    return f"{value} [{low}, {high}]" if np.isfinite(row["ci_low"]) else value


def digits_of(n: float) -> int:
    """How many decimals a share of n images carries: its standard error is at most 0.5/sqrt(n)."""
    return 2 if n < 500 else 3


def paired_difference(right_a: Array, right_b: Array, groups: Sequence, **options) -> dict:
    """Accuracy of a minus accuracy of b on the same images: McNemar's exact test, by patient.

    right_a, right_b: booleans [N]. Keys value, ci_low, ci_high, n, only_a and only_b (images that
    only one has right) and p, of the exact randomisation test (Fisher 1935) that lets the models
    trade places in any patient; with one image a patient it is McNemar's (1947).

    >>> found = paired_difference(np.arange(7) < 6, np.zeros(7), range(7), draws=50)
    >>> round(found["value"], 3), found["p"]
    (0.857, 0.03125)
    """
    right_a, right_b = np.asarray(right_a, bool), np.asarray(right_b, bool)
    if not right_a.shape == right_b.shape == (len(groups),):
        raise ValueError("right_a, right_b and groups differ in length: pair the same images")
    gain = right_a.astype(float) - right_b
    found = mean(gain, groups, **options)
    if (gain == gain[0]).all():  # then the interval says how often others can still occur
        # An unseen patient moves a difference of 0 by one, a difference of one by two at most.
        reach = exact_interval(0.0, groups)[1] * (1 + abs(gain[0]))
        found |= {"ci_low": max(gain[0] - reach, -1.0), "ci_high": min(gain[0] + reach, 1.0)}
    by_patient = np.bincount(patient_codes(groups), weights=gain).astype(int)
    chance = np.ones(1)  # of the sums of gains of either sign, 0 in the middle
    for size in np.abs(by_patient[by_patient != 0]):
        chance = np.convolve(chance, np.r_[0.5, np.zeros(2 * size - 1), 0.5])
    away = np.abs(np.arange(len(chance)) - len(chance) // 2)
    found["p"] = float(min(chance[away >= abs(by_patient.sum())].sum(), 1.0))
    return found | {"only_a": int((gain > 0).sum()), "only_b": int((gain < 0).sum())}


def delong_test(labels: Array, score_a: Array, score_b: Array, groups: Sequence) -> dict:
    """Do two models differ in AUC on the same images? DeLong's test, with a variance by patient.

    DeLong et al. 1988 (Biometrics 44:837) by midranks (Sun & Xu 2014); with several images a
    patient the variance is Obuchowski's (1997, Biometrics 53:567). Keys value (AUC of a minus that
    of b), ci_low, ci_high, z, p (two-sided), n, auc_a, auc_b. Where both rank alike p is 1 and the
    interval NaN.

    >>> a, b = [0.1, 0.4, 0.35, 0.8, 0.3, 0.9], [0.2, 0.6, 0.5, 0.4, 0.55, 0.7]
    >>> found = delong_test([0, 0, 0, 1, 1, 1], a, b, range(6))
    >>> round(found["value"], 3), round(found["p"], 3)
    (0.111, 0.724)
    """
    scores = np.stack([checked(labels, score, groups)[1] for score in (score_a, score_b)])
    positive, codes = np.asarray(labels) == 1, patient_codes(groups)
    counts = [len(np.unique(codes[part])) for part in (positive, ~positive)]
    if min(counts) < 2:
        raise ValueError(f"a variance needs two patients with images of each class, not {counts}")
    inside, outside = scores[:, positive], scores[:, ~positive]
    ranks = rankdata(np.concatenate([inside, outside], axis=1), axis=1)
    m, n = inside.shape[1], outside.shape[1]
    # The share of the other class that an image is ranked above (class 1) or below (class 0).
    above = (ranks[:, :m] - rankdata(inside, axis=1)) / n
    below = 1 - (ranks[:, m:] - rankdata(outside, axis=1)) / m
    auc, patients = above.mean(1), codes.max() + 1

    def by_patient(values: Array, part: Array) -> Array:
        away = (values - auc[:, None]) / values.shape[1]
        return np.stack([np.bincount(codes[part], row, minlength=patients) for row in away])

    a, b = by_patient(above, positive), by_patient(below, ~positive)
    # A patient with images of both classes moves both parts at once: 0 without such patients.
    mixed = a @ b.T
    terms = zip((*counts, patients), (a @ a.T, b @ b.T, mixed + mixed.T), strict=True)
    covariance = sum(k / (k - 1) * term for k, term in terms)
    value = float(auc[0] - auc[1])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    se = float(np.sqrt(variance)) if variance > 1e-14 else np.nan  # rounding leaves about 1e-18
    reach, z = norm.ppf(0.975) * se, value / se
    p = 1.0 if np.isnan(z) and abs(value) < 1e-12 else float(2 * norm.sf(abs(z)))
    found = {"value": value, "ci_low": value - reach, "ci_high": value + reach, "z": z, "p": p}
    return found | {"n": len(labels), "auc_a": float(auc[0]), "auc_b": float(auc[1])}


def mean_of_defined(parts: Array) -> Array:
    """Mean over the first axis of what is not NaN, such as an AUC without one of the classes."""
    defined = np.isfinite(parts)
    with np.errstate(invalid="ignore"):
        return np.where(defined, parts, 0).sum(0) / defined.sum(0)


def holm(p: Sequence[float]) -> Array:
    """p-values adjusted for their number by Holm's step-down method (1979, Scand. J. Stat. 6:65).

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, dtype=float)
    order, result = np.argsort(p), np.empty(len(p))
    result[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return result


def checked(labels: Array, score: Array, groups: Sequence) -> tuple[Array, Array]:
    """Labels as integers and score as floats; ValueError where they do not fit each other."""
    labels, score = np.asarray(labels), np.asarray(score, dtype=float)
    lengths = len(labels), len(score), len(groups)
    if len(set(lengths)) > 1 or not len(labels):
        raise ValueError(f"labels, score and groups must have one length above 0, not {lengths}")
    top = 1 if score.ndim == 1 else score.shape[1] - 1
    if not np.isin(labels, range(top + 1)).all():
        raise ValueError(f"labels must be 0 to {top}, found {np.unique(labels)[:5]}")
    if not np.isfinite(score).all():
        raise ValueError("score holds NaN or infinite values: the model's output is broken")
    return labels.astype(int), score


def weighted_auc(labels: Array, score: Array, weights: Array) -> Array:
    """Area under the ROC curve per row of weights (Mann-Whitney form, ties count one half)."""
    _, level = np.unique(score, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(level[order]) > 0])
    sides = [(weights * (labels == side))[:, order] for side in (1, 0)]
    positive, negative = (np.add.reduceat(side, starts, axis=1) for side in sides)
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def _rates(labels: Array, predicted: Array, weights: Array, classes: int) -> dict[str, Array]:
    """All threshold metrics for every row of weights, from the weighted counts of each class."""
    here, named = np.eye(classes)[labels], np.eye(classes)[predicted]
    own, called, right = ((weights @ one).T for one in (here, named, here * named))
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = right / own
        # A class that is never predicted has precision 0 (scikit-learn's zero_division=0).
        precision = np.where(called > 0, right / called, 0.0)
        f1 = np.where(precision + recall > 0, 2 * precision * recall / (precision + recall), 0.0)
    macro = {"precision": precision, "recall": recall, "f1": f1, "balanced_accuracy": recall}
    found = {name: sum(values) / classes for name, values in macro.items()}
    found |= {"sensitivity": recall[1], "specificity": recall[0]}
    return found | {"accuracy": sum(right) / weights.sum(1)}


def _bca_tails(value: float, resampled: Array, without: Array, tails: Array) -> Array:
    """The shares of the draws at which a BCa interval ends (Efron 1987)."""
    # Draws equal to the value count by half: shares of few patients have many of them.
    bias = norm.ppf(((resampled < value).mean() + (resampled <= value).mean()) / 2)
    pull = without.mean() - without if len(without) else np.zeros(1)
    spread = (pull**2).sum() ** 1.5
    acceleration = (pull**3).sum() / (6 * spread) if spread > 0 else 0.0
    with np.errstate(invalid="ignore"):
        moved = bias + norm.ppf(tails)
        return norm.cdf(bias + moved / (1 - acceleration * moved))
