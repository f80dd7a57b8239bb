"""Does a drifting map warn of a wrong answer? Drift and simple competitors as predictors.

Input are the two tables of `drift.measure`, of one model. Every drift score is turned so that it
grows with drift; no direction is ever chosen from the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd

from ..corruption_error import ALL_SEVERITIES, CLEAN, KEY, check, defined, patients_of
from ..metrics import bootstrap, patient_codes, weighted_auc
from .drift import SIGN

OUTCOMES = ("error", "flip", "new_error")
CELLS = {  # what the copies compared have in common
    "within": ["corruption", "severity"],
    "same answer": ["corruption", "severity", "clean_predicted"],
    "mixed": [],
}
READINGS = tuple(CELLS)
COMPETITORS = ("uncertainty", "p_shift", "severity")
CHUNK = 4_000_000  # weights that are looked at together: bounds the memory

NAMES = ("predictor", "method", "layer", "score")

Predictor = tuple[str, str, str]  # method, layer, score


def outcomes(predictions: pd.DataFrame) -> pd.DataFrame:
    """What went wrong on every corrupted copy, and predictors of it that need no map.

    Columns: image, corruption, severity; the outcomes error (predicted is not the label), flip (not
    what the clean image got) and new_error (an error on an image that was right when clean);
    clean_right, clean_predicted; uncertainty (1 minus the highest probability) and p_shift (total
    variation from the clean probabilities).
    """
    columns = check(predictions)
    is_clean = predictions["corruption"].eq(CLEAN)
    copies = predictions[~is_clean].reset_index(drop=True)
    clean = predictions[is_clean].set_index("image").loc[copies["image"]].reset_index()
    error, before = copies["predicted"].ne(copies["label"]), clean["predicted"]
    right = before.eq(copies["label"])
    found = copies[KEY].assign(error=error, flip=copies["predicted"].ne(before))
    found = found.assign(new_error=error & right, clean_right=right, clean_predicted=before)
    shift = (copies[columns] - clean[columns]).abs().sum(axis=1) / 2
    return found.assign(uncertainty=1 - copies[columns].max(axis=1), p_shift=shift)


def judge(
    predictions: pd.DataFrame,
    drift: pd.DataFrame,
    patients: pd.Series | Mapping,
    *,
    predictors: Sequence[Predictor] | None = None,
    events: Sequence[str] = OUTCOMES,
    readings: Sequence[str] = READINGS,
    against: Sequence[str] = ("uncertainty",),
    draws: int = 500,
) -> pd.DataFrame:
    """AUROC of drift, and of its competitors, for what went wrong, with intervals by patient.

    AUROC is the probability that a copy with the event has the higher score than a copy of another
    image without it; ties and undefined scores (NaN) count one half. predictors: (method, layer,
    score), None for all. new_error is asked only of images that were right when clean. Readings
    compare copies "within" one corruption and severity; with the "same answer" when clean as well
    (else a score that tells the classes apart passes for a warning); or "mixed", each image
    weighing the same, where severity competes too. Columns: reading, outcome, predictor, method,
    layer, score ("" for competitors), metric (auroc, and for drift auroc_over_... of each
    competitor in `against`, paired), value, ci_low, ci_high, n (images), copies, events, and
    event_patients and other_patients, in cells where both occur.
    """
    copies, scores = _copies(predictions, drift, predictors)
    unit = patient_codes(patients_of(copies["image"].to_numpy(), patients))
    patient = np.arange(unit.max() + 1)
    rows = []
    for event in events:
        asked = copies["clean_right"].to_numpy() | (event != "new_error")
        for reading in readings:
            pairs = _Pairs(copies[asked], unit[asked], event, reading)
            rivals = COMPETITORS[: 3 if reading == "mixed" else 2]  # else severity is equal
            judged = {(name, "", "", ""): copies[name].to_numpy(float) for name in rivals}
            judged |= {(" ".join(key), *key): score for key, score in scores.items()}
            metrics = [(key, "auroc", "") for key in judged]
            metrics += [(k, f"auroc_over_{r}", r) for k in judged if k[1] for r in against]
            values = partial(_metrics, pairs, {k: s[asked] for k, s in judged.items()}, metrics)
            table = bootstrap(values, patient, draws=draws).to_dict("records")
            for (key, metric, _), row in zip(metrics, table, strict=True):
                about = {"reading": reading, "outcome": event} | dict(zip(NAMES, key, strict=True))
                rows.append(about | {"metric": metric} | row | pairs.counts)
    return pd.DataFrame(rows)


def _metrics(pairs: _Pairs, judged: dict, metrics: list, weights: np.ndarray) -> np.ndarray:
    """AUROCs, and what they are above a rival's [draws,metrics]."""
    auroc = {key: pairs.auroc(score, weights) for key, score in judged.items()}
    rival = {key[0]: values for key, values in auroc.items()} | {"": 0.0}
    return np.stack([auroc[key] - rival[name] for key, _, name in metrics], 1)


def _copies(
    predictions: pd.DataFrame, drift: pd.DataFrame, predictors: Sequence[Predictor] | None
) -> tuple[pd.DataFrame, dict[Predictor, np.ndarray]]:
    """`outcomes` of the copies in `drift`, and the scores, turned to grow with drift."""
    drift, maps = drift[drift["severity"].ne(0)], ["method", "layer"]
    wide = drift.set_index([*KEY, *maps])[[s for s in SIGN if s in drift]].unstack(maps)
    if len(drift) != len(wide) * len(drift[maps].drop_duplicates()):
        raise ValueError("drift lacks copies for some maps: compute every map on the same copies")
    chosen = [(*map_, score) for score, *map_ in wide] if predictors is None else predictors
    scores = {(m, layer, s): SIGN[s] * wide[s, m, layer].to_numpy(float) for m, layer, s in chosen}
    return outcomes(predictions).set_index(KEY).loc[wide.index].reset_index(), scores


class _Pairs:
    """The pairs of copies that a reading compares, one with the event and one without."""

    def __init__(self, copies: pd.DataFrame, unit: np.ndarray, event: str, reading: str) -> None:
        self.happened, self.unit = copies[event].to_numpy(bool), unit
        copies = copies.reset_index(drop=True)
        by_image = copies.groupby("image").indices
        cells = copies.groupby(CELLS[reading] or [0] * len(copies)).indices.values()
        self.cells = [rows for rows in cells if 0 < self.happened[rows].mean() < 1]
        self.mass, self.same_image = np.ones(len(copies)), []
        if reading == "mixed":  # where every image weighs one, and must not meet itself
            self.mass = 1 / copies.groupby("image")["image"].transform("size").to_numpy()
            self.same_image = list(by_image.values())
        rows = np.concatenate([[], *self.cells]).astype(int)
        self.counts = {"n": len(by_image), "copies": len(copies), "events": self.happened.sum()}
        for name, of in (("event", self.happened[rows]), ("other", ~self.happened[rows])):
            self.counts[f"{name}_patients"] = len(np.unique(unit[rows][of]))

    def auroc(self, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """AUROC [draws] of a score, for weights [draws,patients]."""
        total = np.zeros((2, len(weights)))  # weight of the pairs that the event wins, and of all
        for rows in self.cells:
            step = max(1, CHUNK // len(rows))
            for at in range(0, len(weights), step):
                drawn = weights[at : at + step][:, self.unit[rows]] * self.mass[rows]
                total[:, at : at + step] += _won(self.happened[rows], score[rows], drawn)
        for rows in self.same_image:
            own = _won(self.happened[rows], score[rows], self.mass[None, rows])
            total -= own * weights[:, self.unit[rows[0]]] ** 2
        won, pairs = total
        # What is left where no two images differ in the event is rounding, not pairs.
        return np.where(pairs > 1e-9, won / np.where(pairs > 1e-9, pairs, 1), np.nan)


def _won(happened: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weight [2,draws] of the pairs in which the event has the higher score, and of all pairs."""
    known = np.isfinite(score)
    pairs, sure = (
        weights[:, happened & of].sum(1) * weights[:, ~happened & of].sum(1)
        for of in (np.ones_like(known), known)
    )
    won = (pairs - sure) / 2  # a pair with an undefined score counts one half
    if (sure > 0).any():
        auc = weighted_auc(happened[known], score[known], weights[:, known])
        won = won + np.nan_to_num(auc) * sure
    return np.stack([won, pairs])


def select(predictions: pd.DataFrame, drift: pd.DataFrame) -> Predictor:
    """The (method, layer, score) with the highest AUROC for errors, to be judged on other images.

    Of equals, the first in alphabetical order.
    """
    images = predictions["image"].unique()
    options = {"events": ["error"], "readings": ["within"], "against": [], "draws": 0}
    table = judge(predictions, drift, dict(zip(images, images, strict=True)), **options)
    table = table[table["method"].ne("")]
    if table["value"].isna().any():
        raise ValueError(
            "no cell has both wrong and right answers: take more images or stronger corruptions"
        )
    key = list(NAMES[1:])
    table = table.assign(value=table["value"].round(12)).sort_values(key)
    return tuple(table.loc[table["value"].idxmax(), key])


def metric_rows(table: pd.DataFrame) -> pd.DataFrame:
    """`judge`'s table as metric rows for `report.result_rows`.

    "warning " and the predictor go under attack; metric, outcome and reading under metric.
    """
    metric = table["metric"] + " " + table["outcome"] + " " + table["reading"]
    named = {"attack": "warning " + table["predictor"], "metric": metric}
    return defined(table.assign(eps=0.0, eps_unit=ALL_SEVERITIES, **named))
