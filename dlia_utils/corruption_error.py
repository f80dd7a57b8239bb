"""What corruptions cost a classifier: loss of AUC, corruption error and area under the severity curve, by patient.

Everything is computed from one table of predictions, one row per (image, corruption, severity): columns image,
label, corruption ("clean" for the untouched image), severity (0 for clean), predicted and p0 ... p{K-1}, the
probabilities of the K classes. Intervals come from resampling whole patients; what is compared (clean with
corrupted, a model with its reference) is compared on the same resampled patients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .metrics import patient_weights, share, weighted_auc

CLEAN = "clean"
COLUMNS = ("image", "label", "corruption", "severity", "predicted")
KEY = ["image", "corruption", "severity"]
METRICS = ("auc", "accuracy", "balanced_accuracy")
ALL_SEVERITIES = "all severities"  # eps_unit of result rows that sum up the severities


def auc(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> float | np.ndarray:
    """Area under the ROC curve, for more than two classes the mean of one-vs-rest, as MedMNIST's evaluator takes it.

    Source: Yang et al., MedMNIST v2, arXiv 2110.14795. `labels` [N] of 0 ... K-1, `probabilities` [N,K]. Two
    classes: the AUC of p1. More: the unweighted mean over the classes that occur, each against all others. With
    `weights` [draws,N] (how often each image counts) the result is [draws]; a draw with one class only is NaN.
    One label per image: sets with several are not for this function. Errors: ValueError for shapes or labels
    that do not fit.

    >>> auc(np.array([0, 0, 1, 1]), np.array([[.9, .1], [.4, .6], [.3, .7], [.5, .5]]))
    0.75
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=float)
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or len(labels) != len(probabilities):
        raise ValueError(
            f"probabilities must be [N,K] with K >= 2 and N = {len(labels)} labels, not {list(probabilities.shape)}"
        )
    classes = probabilities.shape[1]
    if not np.isin(labels, range(classes)).all():
        raise ValueError(
            f"labels must lie in 0 ... {classes - 1} for {classes} columns of probabilities"
        )
    counted = np.ones((1, len(labels))) if weights is None else np.asarray(weights, dtype=float)
    if classes == 2:
        values = weighted_auc(labels, probabilities[:, 1], counted)
    else:
        each = [weighted_auc(labels == c, probabilities[:, c], counted) for c in np.unique(labels)]
        values = _mean_of_defined(np.stack(each))
    return float(values[0]) if weights is None else values


def check(predictions: pd.DataFrame, *, name: str = "predictions") -> list[str]:
    """Refuse a table of predictions that is not the module's; returns its probability columns p0 ... p{K-1}.

    Errors: ValueError naming missing columns, rows that occur twice, NaN or values outside [0,1], images without
    a clean row or with two labels, and labels that are no class.

    >>> check(pd.DataFrame({"image": [0], "label": [1], "corruption": "clean", "severity": [0],
    ...                     "predicted": [1], "p0": [.2], "p1": [.8]}))
    ['p0', 'p1']
    """
    columns = []
    while f"p{len(columns)}" in predictions.columns:
        columns.append(f"p{len(columns)}")
    missing = [c for c in COLUMNS if c not in predictions.columns] + ["p0", "p1"][len(columns) :]
    if missing:
        raise ValueError(
            f"{name} lacks the columns {missing}: it needs {', '.join(COLUMNS)} and p0, p1, ..."
        )
    if not len(predictions):
        raise ValueError(f"{name} has no rows")
    if (repeated := predictions.duplicated(KEY)).any():
        raise ValueError(
            f"{name} has {int(repeated.sum())} rows whose {', '.join(KEY)} occur before, such as "
            f"{_named(predictions[repeated])}: drop the duplicates of a repeated run"
        )
    values = predictions[columns].to_numpy(float)
    if not ((values >= 0) & (values <= 1)).all():  # NaN fails as well
        raise ValueError(
            f"{name}: {columns[0]} ... {columns[-1]} must be probabilities in [0,1] without NaN"
        )
    classes = range(len(columns))
    for column in ("label", "predicted"):
        if not predictions[column].isin(classes).all():
            raise ValueError(
                f"{name}: {column} must lie in 0 ... {len(columns) - 1}, the classes of the p columns"
            )
    clean = predictions["corruption"].eq(CLEAN)
    if not (clean == predictions["severity"].eq(0)).all():
        raise ValueError(
            f"{name}: severity must be 0 where corruption is {CLEAN!r}, and above 0 elsewhere"
        )
    if len(without := predictions[~predictions["image"].isin(predictions.loc[clean, "image"])]):
        raise ValueError(
            f"{name}: {without['image'].nunique()} images, {without['image'].iloc[0]} among them, have no "
            f"{CLEAN!r} row: predict the clean images as well"
        )
    if (predictions.groupby("image")["label"].nunique() > 1).any():
        raise ValueError(f"{name}: label differs between rows of one image")
    return columns


def patients_of(images: np.ndarray, patients: pd.Series | Mapping) -> np.ndarray:
    """Patient of each image, from a Series indexed by image (row number in the manifest) or a mapping.

    Errors: ValueError for images it does not hold.

    >>> patients_of(np.array([3, 0]), pd.Series(["ann", "bob"], index=[0, 3])).tolist()
    ['bob', 'ann']
    """
    series = pd.Series(patients)
    if series.index.has_duplicates:
        raise ValueError(
            "patients names an image twice: it must be a Series with one row per image"
        )
    found = series.reindex(images)
    if found.isna().any():
        raise ValueError(
            f"patients has no entry for {int(found.isna().sum())} images, {images[found.isna().to_numpy()][0]} "
            "among them: index it by the image's row in the manifest"
        )
    return found.to_numpy()


def grid(
    predictions: pd.DataFrame,
    patients: pd.Series | Mapping,
    *,
    metric: str = "auc",
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """A metric at every corruption and severity, and its drop: clean minus corrupted (the thesis' delta-AUC).

    metric: "auc" (see `auc`), "accuracy" or "balanced_accuracy" (mean recall of the classes). patients: image ->
    patient. Columns: corruption, severity, metric, value, ci_low, ci_high, drop, drop_low, drop_high, n (images);
    the first row is the clean one. Intervals are percentiles over resampled patients. That of a drop is paired:
    every draw takes the same patients for clean and corrupted, so a corruption that changes nothing has a drop
    of exactly 0 [0, 0]. An accuracy of 0 or 1 gets the exact binomial interval. Errors: ValueError for
    another metric and for cells whose images are not those of the clean rows (see `check` as well).

    >>> clean = pd.DataFrame({"image": [0, 1], "label": [0, 1], "corruption": "clean", "severity": 0,
    ...                       "predicted": [0, 1], "p0": [.9, .2], "p1": [.1, .8]})
    >>> bad = clean.assign(corruption="blur", severity=1, p0=.4, p1=.6, predicted=1)
    >>> table = grid(pd.concat([clean, bad]), {0: "ann", 1: "bob"}, draws=50)
    >>> table[["corruption", "severity", "value", "drop"]]
      corruption  severity  value  drop
    0      clean         0    1.0   0.0
    1       blur         1    0.5   0.5
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    cells = _cells(predictions, "predictions")
    groups = patients_of(cells.images, patients)
    weights = np.vstack([np.ones(len(groups)), patient_weights(groups, draws=draws, seed=seed)])
    if metric == "auc":
        values = np.stack([auc(cells.labels, p, weights) for p in cells.probabilities], axis=1)
    else:
        values = _rate(cells, weights, metric)
    rows = []
    for column, (corruption, severity) in enumerate(cells.keys):
        here = values[:, column]
        value, low, high = _interval(here, level)
        if metric == "accuracy" and value in (0.0, 1.0):
            exact = share(cells.right[column], groups, draws=1, level=level)
            low, high = exact["ci_low"], exact["ci_high"]
        drop, drop_low, drop_high = _interval(values[:, 0] - here, level)
        rows.append(
            {
                "corruption": corruption,
                "severity": severity,
                "metric": metric,
                "value": value,
                "ci_low": low,
                "ci_high": high,
                "drop": drop,
                "drop_low": drop_low,
                "drop_high": drop_high,
                "n": len(groups),
            }
        )
    return pd.DataFrame(rows)


def corruption_error(
    predictions: pd.DataFrame,
    reference_predictions: pd.DataFrame,
    patients: pd.Series | Mapping,
    *,
    error: str = "balanced_accuracy",
    least: float = 0.01,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Corruption error of a model beside a reference model, per corruption and as a mean, with the raw errors.

    Sources: Hendrycks & Dietterich, arXiv 1903.12261 (CE, mCE and their relative forms); Di Salvo et al.,
    MedMNIST-C, arXiv 2406.17536 (the same with the balanced error). E(s) is 1 - balanced accuracy at severity s,
    or 1 - accuracy for `error="accuracy"`; R(s) is the reference's, E0 and R0 are the clean ones. Rows by
    corruption and, as corruption "mean", over the corruptions:

    ce                  sum E(s) / sum R(s); the mean is mCE; below 1: better than the reference
    relative_ce         sum (E(s) - E0) / sum (R(s) - R0): the same for what the corruption adds
    error, added_error  mean of E(s); the same minus E0; reference_error, reference_added_error: of R
    area                area under the curve of 1 - E over the severities from 0 (trapezoids, divided by the
                        highest severity): needs no reference; reference_area: of R

    A ratio says nothing when its denominator is near 0: where R, or R - R0, is below `least` on average over the
    severities, ce or relative_ce is NaN, and the mean is that of the others. Columns: corruption,
    metric, value, ci_low, ci_high, n (images), left_out (corruptions that are not in the value), note (which
    and why). Intervals are percentiles over resampled patients, the same for both models. Where more draws than
    lie outside the interval have a denominator of 0 or less, the ratio is unbounded and has none; the note says so.
    Errors: ValueError for another `error`, no corruption, and two tables that differ in images, labels, corruptions
    or severities.

    >>> clean = pd.DataFrame({"image": [0, 1, 2, 3], "label": [0, 0, 1, 1], "corruption": "clean", "severity": 0,
    ...                       "predicted": [0, 0, 1, 1], "p0": .5, "p1": .5})
    >>> worse = pd.concat([clean, clean.assign(corruption="blur", severity=1, predicted=[0, 1, 0, 1])])
    >>> better = pd.concat([clean, clean.assign(corruption="blur", severity=1, predicted=[0, 1, 1, 1])])
    >>> table = corruption_error(better, worse, {0: 0, 1: 1, 2: 2, 3: 3}, draws=50)
    >>> float(table.query("corruption == 'mean' and metric == 'ce'")["value"].item())
    0.5
    """
    if error not in ("balanced_accuracy", "accuracy"):
        raise ValueError(f"error must be 'balanced_accuracy' or 'accuracy', not {error!r}")
    ours, reference = (
        _cells(predictions, "predictions"),
        _cells(reference_predictions, "reference_predictions"),
    )
    reference = _aligned(ours, reference)
    severities = _severities(ours)
    groups = patients_of(ours.images, patients)
    weights = np.vstack([np.ones(len(groups)), patient_weights(groups, draws=draws, seed=seed)])
    e, r = (1 - _rate(cells, weights, error) for cells in (ours, reference))  # [1+draws, cells]
    columns = {name: [ours.keys.index((name, s)) for s in severities] for name in ours.corruptions}
    per_metric: dict[str, dict[str, np.ndarray]] = {}
    for name, at in columns.items():
        per_metric[name] = {
            "ce": e[:, at].sum(1) / _positive(r[:, at].sum(1)),
            "relative_ce": (e[:, at] - e[:, :1]).sum(1) / _positive((r[:, at] - r[:, :1]).sum(1)),
            "error": e[:, at].mean(1),
            "added_error": (e[:, at] - e[:, :1]).mean(1),
            "area": _area(1 - e[:, [0, *at]], severities),
            "reference_error": r[:, at].mean(1),
            "reference_added_error": (r[:, at] - r[:, :1]).mean(1),
            "reference_area": _area(1 - r[:, [0, *at]], severities),
        }
    denominators = {
        "ce": ("reference_error", "is"),
        "relative_ce": ("reference_added_error", "rises by"),
    }
    rows = []
    for metric in next(iter(per_metric.values())):
        left_out = {}
        if metric in denominators:
            of, says = denominators[metric]
            size = {name: float(values[of][0]) for name, values in per_metric.items()}
            left_out = {
                name: f"the reference's error {says} {by:.4f} only"
                for name, by in size.items()
                if not by >= least
            }
        draws_of = {name: values[metric] for name, values in per_metric.items()}
        kept = [values for name, values in draws_of.items() if name not in left_out]
        draws_of["mean"] = np.mean(kept, axis=0) if kept else np.full(len(weights), np.nan)
        for name, values in draws_of.items():
            note, out = left_out.get(name, ""), int(name in left_out)
            if name in left_out:
                values = np.full(len(weights), np.nan)
            elif name == "mean" and left_out:
                note, out = f"left out: {', '.join(left_out)}", len(left_out)
            value, low, high = _interval(values, level)
            if np.isfinite(value) and np.isnan(values[1:]).mean() > (1 - level) / 2:
                low = high = np.nan
                note = "; ".join(
                    [note] * bool(note) + ["no interval: the denominator is not clear of 0"]
                )
            rows.append(
                {
                    "corruption": name,
                    "metric": metric,
                    "value": value,
                    "ci_low": low,
                    "ci_high": high,
                    "n": len(groups),
                    "left_out": out,
                    "note": note,
                }
            )
    return pd.DataFrame(rows)


def rows(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `grid` or `corruption_error` as metric rows for `report.result_rows`, which adds model and context.

    The corruption goes under attack, the severity under eps (eps_unit "severity"). A grid gives its metric
    and, for corrupted images, "delta_" + metric; its clean row keeps the unit "pixel" of every clean row. What
    sums up the severities has eps 0 and eps_unit "all severities". NaN values are left out.

    >>> table = pd.DataFrame({"corruption": ["blur"], "severity": [2], "metric": "auc", "value": [.8], "ci_low": [.7],
    ...                       "ci_high": [.9], "drop": [.1], "drop_low": [.0], "drop_high": [.2], "n": [50]})
    >>> rows(table)[["attack", "eps", "eps_unit", "metric", "value"]]
      attack  eps  eps_unit     metric  value
    0   blur  2.0  severity        auc    0.8
    1   blur  2.0  severity  delta_auc    0.1
    """
    if "drop" in table.columns:
        dropped = table[table["corruption"].ne(CLEAN)]
        deltas = dropped.assign(
            metric="delta_" + dropped["metric"],
            value=dropped["drop"],
            ci_low=dropped["drop_low"],
            ci_high=dropped["drop_high"],
        )
        long = pd.concat([table, deltas], ignore_index=True)
        long["eps_unit"] = np.where(long["corruption"].eq(CLEAN), "pixel", "severity")
    else:
        long = table.assign(severity=0, eps_unit=ALL_SEVERITIES)
    long = long.assign(attack=long["corruption"], eps=long["severity"].astype(float))
    columns = ["attack", "eps", "eps_unit", "metric", "value", "ci_low", "ci_high", "n"]
    return long.loc[long["value"].notna(), columns].reset_index(drop=True)


# ------------------------------------------------------------------------------------------- the table as arrays


@dataclass(frozen=True)
class _Cells:
    """Predictions of the same images in every cell: keys [cells] of (corruption, severity), the clean one first."""

    keys: list[tuple[str, int]]
    images: np.ndarray  # [N]
    labels: np.ndarray  # [N]
    right: np.ndarray  # bool [cells,N]
    probabilities: np.ndarray  # [cells,N,K]

    @property
    def corruptions(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.keys if name != CLEAN))


def _cells(predictions: pd.DataFrame, name: str) -> _Cells:
    """The table sorted into cells; refused when a cell's images are not those of the clean rows."""
    columns = check(predictions, name=name)
    clean = predictions[predictions["corruption"].eq(CLEAN)].sort_values("image")
    images = clean["image"].to_numpy()
    order = [CLEAN, *(c for c in predictions["corruption"].unique() if c != CLEAN)]
    ranked = predictions.assign(
        _corruption=predictions["corruption"].map({c: k for k, c in enumerate(order)})
    )
    ranked = ranked.sort_values(["_corruption", "severity", "image"])
    keys, right, probabilities = [], [], []
    for (corruption, severity), cell in ranked.groupby(["_corruption", "severity"]):
        if not np.array_equal(cell["image"].to_numpy(), images):
            lacking = np.setdiff1d(images, cell["image"])
            raise ValueError(
                f"{name}: {order[corruption]} at severity {severity} lacks {len(lacking)} of {len(images)} images, "
                f"{lacking[0]} among them: predict every image in every cell, or leave out the cell"
            )
        keys.append((order[corruption], int(severity)))
        right.append((cell["predicted"] == cell["label"]).to_numpy())
        probabilities.append(cell[columns].to_numpy(float))
    return _Cells(keys, images, clean["label"].to_numpy(), np.stack(right), np.stack(probabilities))


def _aligned(ours: _Cells, reference: _Cells) -> _Cells:
    """The reference's cells in our order; refused when the two tables do not hold the same images and cells."""
    if not np.array_equal(ours.images, reference.images):
        apart = np.setxor1d(ours.images, reference.images)
        raise ValueError(
            f"predictions and reference_predictions differ in {len(apart)} images, {apart[0]} among them: "
            "compare models on the same images"
        )
    if not np.array_equal(ours.labels, reference.labels):
        raise ValueError("predictions and reference_predictions give an image different labels")
    if lacking := [key for key in ours.keys if key not in reference.keys]:
        raise ValueError(
            f"reference_predictions lacks {_listed(lacking)}: corrupt for both models alike"
        )
    if lacking := [key for key in reference.keys if key not in ours.keys]:
        raise ValueError(
            f"predictions lacks {_listed(lacking)}, which the reference has: corrupt for both alike"
        )
    order = [reference.keys.index(key) for key in ours.keys]
    return _Cells(
        ours.keys, ours.images, ours.labels, reference.right[order], reference.probabilities[order]
    )


def _severities(cells: _Cells) -> list[int]:
    """The severities above 0, which must be the same for every corruption."""
    if not cells.corruptions:
        raise ValueError("predictions holds clean rows only: add corrupted ones")
    severities = sorted({s for name, s in cells.keys if name != CLEAN})
    if lacking := [
        (c, s) for c in cells.corruptions for s in severities if (c, s) not in cells.keys
    ]:
        raise ValueError(
            f"predictions lacks {_listed(lacking)}: every corruption needs the same severities"
        )
    return severities


def _named(row: pd.DataFrame) -> str:
    image, corruption, severity = row[KEY].iloc[0]
    return f"image {image}, {corruption} at severity {severity}"


def _listed(keys: list[tuple[str, int]]) -> str:
    names = ", ".join(f"{name} at severity {severity}" for name, severity in keys[:3])
    return names + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


# ------------------------------------------------------------------------------------------- numbers


def _rate(cells: _Cells, weights: np.ndarray, metric: str) -> np.ndarray:
    """Accuracy or balanced accuracy [draws,cells]: the mean over all images, or over the classes that occur."""
    right = cells.right.T.astype(float)
    if metric == "accuracy":
        return weights @ right / weights.sum(1, keepdims=True)
    each = []
    for label in np.unique(cells.labels):
        own = weights * (cells.labels == label)
        with np.errstate(invalid="ignore"):
            each.append(own @ right / own.sum(1, keepdims=True))
    return _mean_of_defined(np.stack(each))


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN: a draw may lack a class."""
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(0) / defined.sum(0)


def _positive(denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator > 0, denominator, np.nan)


def _area(values: np.ndarray, severities: list[int]) -> np.ndarray:
    """Trapezoids under [draws, 1 + severities], the first column clean, over the highest severity."""
    return np.trapezoid(values, [0, *severities], axis=1) / severities[-1]


def _interval(values: np.ndarray, level: float) -> tuple[float, float, float]:
    """The value (first entry) and the percentiles of the resampled ones that are defined."""
    resampled = values[1:][np.isfinite(values[1:])]
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail]) if len(resampled) else (np.nan, np.nan)
    return float(values[0]), float(low), float(high)
