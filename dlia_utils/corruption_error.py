"""What corruptions cost a classifier: loss of AUC and corruption error, by patient.

Everything comes from a table of predictions, a row per (image, corruption, severity): columns
image, label, corruption ("clean" for the untouched image), severity (0 for clean), predicted and p0
... p{K-1}, the probabilities of the K classes. What is compared is compared on the same resampled
patients.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from .metrics import (
    exact_ids,
    interval_row,
    mean_of_defined,
    missing,
    patient_weights,
    weighted_auc,
)

CLEAN = "clean"
KEY = ["image", "corruption", "severity"]
ALL_SEVERITIES = "all severities"  # eps_unit of result rows that sum up the severities
LEAST = 0.01  # error of the reference that a corruption error may be a ratio to


def check(predictions: pd.DataFrame) -> list[str]:
    """The probability columns p0 ... p{K-1} of a table of predictions; ValueError if it is none."""
    columns = list(predictions.filter(regex=r"^p\d+$"))
    if not (predictions[columns].ge(0) & predictions[columns].le(1)).all(axis=None):
        raise ValueError(f"{', '.join(columns)} must be probabilities in [0,1] without NaN")
    clean = predictions[predictions["corruption"].eq(CLEAN)].set_index("image")["label"]
    if not predictions["image"].map(clean).eq(predictions["label"]).all():
        raise ValueError(f"every image needs a {CLEAN!r} row and one label")
    return columns


def patients_of(images: np.ndarray, patients: pd.Series | Mapping) -> np.ndarray:
    """Patient of each image, from a Series indexed by image (row in the manifest) or a mapping.

    >>> patients_of(np.array([3, 0]), {0: "ann", 3: "bob"}).tolist()
    ['bob', 'ann']
    """
    found = pd.Series(patients).reindex(images)
    if (lost := np.array(missing(found), bool)).any():
        raise ValueError(f"patients has no entry for image {found.index[lost][0]}")
    return exact_ids(found, "patients", "patient")


def grid(
    predictions: pd.DataFrame, patients: pd.Series | Mapping, *, draws: int = 1000
) -> pd.DataFrame:
    """The AUC at every corruption and severity, and its drop: clean minus corrupted, paired.

    Of more than two classes, the mean of one-vs-rest over the classes that occur. patients: image
    -> patient. Rows by corruption and severity, the clean one first.
    """
    columns = check(predictions)
    order = [CLEAN, *predictions["corruption"].unique()]
    wide = _wide(predictions, columns)
    weights = _weights(wide, patients, draws)
    labels = wide.index.get_level_values("label").to_numpy()
    cells = set(wide.columns.droplevel(0))
    rows, clean = [], None
    for cell in sorted(cells, key=lambda cell: (order.index(cell[0]), cell[1])):
        values = _auc(labels, wide[[(p, *cell) for p in columns]].to_numpy(float), weights)
        clean = values if clean is None else clean
        drop = interval_row(clean - values, len(labels))
        row = {"corruption": cell[0], "severity": cell[1], "metric": "auc"}
        row |= interval_row(values, len(labels)) | {"drop": drop["value"]}
        rows.append(row | {"drop_low": drop["ci_low"], "drop_high": drop["ci_high"]})
    return pd.DataFrame(rows)


def corruption_error(
    predictions: pd.DataFrame,
    reference_predictions: pd.DataFrame,
    patients: pd.Series | Mapping,
    *,
    draws: int = 1000,
) -> pd.DataFrame:
    """Corruption error of a model beside a reference, per corruption and as their "mean".

    Hendrycks & Dietterich, arXiv 1903.12261, with the balanced error of Di Salvo et al.,
    2406.17536: E(s) is 1 - balanced accuracy at severity s, R(s) the reference's, E0, R0 the clean.

        ce           sum E(s) / sum R(s); the mean is mCE; below 1: better than the reference
        relative_ce  sum (E(s) - E0) / sum (R(s) - R0): the same for what the corruption adds
        error        mean of E(s)

    Where R, or R - R0, is below `LEAST` on average, the ratio is NaN, and the mean is that of the
    others; where it is 0 or less in more than 2.5 % of the draws there is no interval. Columns
    corruption, metric, value, ci_low, ci_high, n, left_out (corruptions not in a mean).
    """
    both = []
    for table in (predictions, reference_predictions):
        check(table)
        right = table["predicted"].eq(table["label"]).astype(float)
        both.append(_wide(table.assign(right=right), "right"))
    ours, theirs = both
    if not ours.index.equals(theirs.index) or set(ours) != set(theirs):
        raise ValueError("predictions and reference_predictions differ in images or cells")
    names = [name for name in predictions["corruption"].unique() if name != CLEAN]
    severities = sorted(set(predictions["severity"]) - {0})
    weights = _weights(ours, patients, draws)
    cells = [(name, severity) for name in names for severity in severities]
    shape = (len(weights), len(names), len(severities))
    e, r = (_balanced_error(one[cells], weights).reshape(shape) for one in both)
    e0, r0 = (_balanced_error(one[[(CLEAN, 0)]], weights)[..., None] for one in both)
    found = {"error": e.sum(2) / len(severities)}
    for metric, above, below in (("ce", e, r), ("relative_ce", e - e0, r - r0)):
        below = below.sum(2)
        ratio = above.sum(2) / np.where(below > 0, below, np.nan)
        found[metric] = np.where(below[0] / len(severities) >= LEAST, ratio, np.nan)
    return pd.DataFrame([row for m, v in found.items() for row in _rows(m, v, names, len(ours))])


def metric_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `grid` or `corruption_error` as metric rows for `report.result_rows`.

    The corruption goes under attack, the severity under eps (eps_unit "severity"). A grid gives its
    metric and, of corrupted images, "delta_" + metric. What sums up the severities has eps 0 and
    eps_unit "all severities".
    """
    if "drop" in table.columns:
        lost = table[table["corruption"].ne(CLEAN)].drop(columns=["value", "ci_low", "ci_high"])
        new = {"drop": "value", "drop_low": "ci_low", "drop_high": "ci_high"}
        lost = lost.rename(columns=new).assign(metric="delta_" + lost["metric"])
        table = pd.concat([table, lost], ignore_index=True)
        table["eps_unit"] = np.where(table["corruption"].eq(CLEAN), "pixel", "severity")
    else:
        table = table.assign(severity=0, eps_unit=ALL_SEVERITIES)
    return defined(table.assign(attack=table["corruption"], eps=table["severity"].astype(float)))


def defined(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that a metric row has, of the rows whose value is not NaN."""
    columns = "attack eps eps_unit metric value ci_low ci_high n".split()
    return table.loc[table["value"].notna(), columns].reset_index(drop=True)


def _wide(predictions: pd.DataFrame, values: str | list[str]) -> pd.DataFrame:
    """`values` with (image, label) down and the cells (corruption, severity) across."""
    wide = predictions.pivot(index=["image", "label"], columns=KEY[1:], values=values)
    if wide.isna().any(axis=None):
        raise ValueError("predict every image in every cell (corruption, severity)")
    return wide


def _weights(wide: pd.DataFrame, patients: pd.Series | Mapping, draws: int) -> np.ndarray:
    """Weights [1+draws,N]: every image once, then the draws of patients."""
    groups = patients_of(wide.index.get_level_values("image"), patients)
    return np.vstack([np.ones(len(groups)), patient_weights(groups, draws=draws)])


def _balanced_error(right: pd.DataFrame, weights: np.ndarray) -> np.ndarray:
    """1 - the mean recall of the classes that occur [draws,cells]."""
    labels = right.index.get_level_values("label").to_numpy()
    own = [weights * (labels == label) for label in np.unique(labels)]
    with np.errstate(invalid="ignore"):
        recalls = [one @ right.to_numpy() / one.sum(1, keepdims=True) for one in own]
    return 1 - mean_of_defined(recalls)


def _auc(labels: np.ndarray, p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC [draws] of p1, of more than two classes the mean over those that occur."""
    if p.shape[1] == 2:
        return weighted_auc(labels, p[:, 1], weights)
    return mean_of_defined([weighted_auc(labels == c, p[:, c], weights) for c in set(labels)])


def _rows(metric: str, values: np.ndarray, names: list[str], n: int) -> list[dict]:
    """A row for each corruption of `values` [1+draws,corruptions], and for their mean."""
    out = np.isnan(values[0])
    mean = np.full(len(values), np.nan) if out.all() else values[:, ~out].mean(1)
    rows = []
    for name, drawn in [*zip(names, values.T, strict=True), ("mean", mean)]:
        row = {"corruption": name, "metric": metric} | interval_row(drawn, n)
        if np.isnan(drawn[1:]).mean() > 0.025:
            row |= {"ci_low": np.nan, "ci_high": np.nan}
        left_out = ", ".join(np.array(names)[out]) if name == "mean" else ""
        rows.append(row | {"left_out": left_out})
    return rows
