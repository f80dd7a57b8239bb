"""Does a drifting map warn of a wrong answer? Drift and simple competitors as predictors of failure, by patient.

Input are two tables: the predictions that `corruption_error` describes, one row per (image, corruption, severity),
and the drift of the maps, one row per (image, corruption, severity, method, layer) with a column for every score
of `drift.SIGN`. Every drift score is turned so that it grows with drift; no direction is ever chosen from
the data. One model at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from ..corruption_error import ALL_SEVERITIES, CLEAN, KEY, check, patients_of
from ..metrics import patient_weights
from .drift import SIGN

OUTCOMES = ("error", "flip", "new_error")
READINGS = ("within", "same answer", "mixed")
WHERE = {
    "within": "At equal corruption and severity",
    "same answer": "At equal corruption, severity and clean answer",
    "mixed": "Over all corruptions and severities mixed",
}
COMPETITORS = ("uncertainty", "p_shift", "severity")
ENOUGH_PATIENTS = 10  # with an event, and without: below, the verdict says that there are too few
CALLED = {
    "error": "wrong answers",
    "flip": "changed answers",
    "new_error": "answers that became wrong",
}

Predictor = tuple[str, str, str]  # method, layer, score


def outcomes(predictions: pd.DataFrame) -> pd.DataFrame:
    """What went wrong on every corrupted copy, and three predictors of it that need no map.

    Columns: image, corruption, severity; the outcomes error (predicted is not the label), flip (predicted is not
    what the clean image got) and new_error (an error on an image that was right when clean); clean_right, whether
    it was, and clean_predicted; and the competitors uncertainty (1 minus the highest probability of the copy: needs the copy
    alone), p_shift (half the L1 distance to the clean probabilities, their total variation: needs the clean image, as
    drift does) and severity. Errors: see `corruption_error.check`.

    >>> clean = pd.DataFrame({"image": [0, 1], "label": [0, 1], "corruption": "clean", "severity": 0,
    ...                       "predicted": [0, 0], "p0": [.9, .7], "p1": [.1, .3]})
    >>> copy = clean.assign(corruption="blur", severity=1, predicted=1, p0=[.4, .2], p1=[.6, .8])
    >>> outcomes(pd.concat([clean, copy]))[["error", "flip", "new_error", "uncertainty", "p_shift"]].round(3)
       error  flip  new_error  uncertainty  p_shift
    0   True  True       True          0.4      0.5
    1  False  True      False          0.2      0.5
    """
    columns = check(predictions)
    is_clean = predictions["corruption"].eq(CLEAN)
    copies = predictions[~is_clean]
    clean = predictions[is_clean].set_index("image").loc[copies["image"]]
    predicted, label = copies["predicted"].to_numpy(), copies["label"].to_numpy()
    before = clean["predicted"].to_numpy()
    p, p_before = (table[columns].to_numpy(float) for table in (copies, clean))
    table = copies[KEY].reset_index(drop=True)
    return table.assign(
        error=predicted != label,
        flip=predicted != before,
        new_error=(predicted != label) & (before == label),
        clean_right=before == label,
        clean_predicted=before,
        uncertainty=1 - p.max(1),
        p_shift=np.abs(p - p_before).sum(1) / 2,
    )


def warning(
    predictions: pd.DataFrame,
    drift: pd.DataFrame,
    patients: pd.Series | Mapping,
    *,
    predictors: Sequence[Predictor] | None = None,
    events: Sequence[str] = OUTCOMES,
    readings: Sequence[str] = READINGS,
    against: Sequence[str] = ("uncertainty",),
    draws: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC and Spearman correlation of drift, and of its competitors, with what went wrong; intervals by patient.

    predictors: (method, layer, score) triples, None for all in `drift`; `select` finds one on other films. events:
    of `OUTCOMES`; new_error is asked only of images that were right when clean. AUROC is the probability that a
    copy with the event has the higher score than a copy without it (ties one half), and the readings say
    which copies are compared:

    within  copies of different images under the same corruption and severity. Cells are averaged with the weight of
            their pairs (events times others), as a stratified AUROC: neither severity nor kind can be the cause.
    same answer  as within, and only of images that got the same answer when clean. A corruption that makes the model
            call everything one class breaks the answers of one class only; whatever tells the classes apart, as the map
            of another class does, then looks like a warning. Here it does not.
    mixed   copies of different images under any corruption and severity. Every image weighs the same: a copy
            weighs one over the number of copies of its image. This is the value to which drawing one copy per
            image tends when that is repeated for ever (ratio of the mean numbers of pairs), without the noise of
            the draws; pairs of one image with itself never meet there and are not counted here. Severity
            drives drift and errors alike, so it stands among the competitors: beat that row first.

    Spearman, for an outcome of 0 or 1, is a function of AUROC, the share of events p, and ties: (AUROC - 1/2)
    sqrt(12 p (1 - p) / (1 - sum t^3)), t being the shares of equal scores; "within" averages cells as above.
    A score that is undefined (NaN, such as a correlation with a constant map) says nothing: its pairs count one
    half, so all predictors are judged on the same copies. Each draw of patients recomputes all of it.

    The copies judged are those in `drift` (its reference rows, severity 0, are dropped); each must be there for
    every predictor, and in `predictions`. Columns: reading, outcome, predictor, method, layer, score ("" for
    competitors), metric (auroc, spearman, and for drift auroc_over_... of each competitor in `against`: the
    difference, paired), value, ci_low, ci_high, n (images), copies, events, event_patients and other_patients
    (patients with a copy that has the event, and that has not, in cells where both occur), cells (such cells),
    undefined. Errors: ValueError naming unknown predictors, events or readings, and copies that are missing.

    >>> predictions, drift = _example()
    >>> table = warning(predictions, drift, {k: k for k in range(4)}, events=["error"], readings=["within"], draws=20)
    >>> table.set_index(["predictor", "metric"])["value"].loc["gradcam layer4_1 rmse"].to_dict()
    {'auroc': 0.75, 'spearman': 0.4472135954999579, 'auroc_over_uncertainty': 0.25}
    """
    for given, known, what in (
        (events, OUTCOMES, "events"),
        (readings, READINGS, "readings"),
        (against, COMPETITORS[:2], "against"),
    ):
        if isinstance(given, str) or (unknown := [one for one in given if one not in known]):
            raise ValueError(
                f"{what} must be a list of {', '.join(known)}, not {given if isinstance(given, str) else unknown}"
            )
    copies, scores = _copies(predictions, drift, predictors)
    groups = pd.factorize(patients_of(copies["image"].to_numpy(), patients))[0]
    weights = np.vstack(
        [
            np.ones(groups.max() + 1),
            patient_weights(np.arange(groups.max() + 1), draws=draws, seed=seed),
        ]
    ).T
    rows = []
    for event in events:
        asked = (
            copies["clean_right"].to_numpy() if event == "new_error" else np.ones(len(copies), bool)
        )
        for reading in readings:
            design = _design(copies[asked], groups[asked], event, reading, weights)
            drawn: dict[str, np.ndarray] = {}
            for name in COMPETITORS:
                if name == "severity" and reading != "mixed":
                    continue  # the same for all copies of a cell
                values = _association(design, copies.loc[asked, name].to_numpy(float))
                drawn[name] = values["auroc"]
                rows += _rows(design, event, reading, name, ("", "", ""), values, 0, level)
            for predictor, score in scores.items():
                values = _association(design, score[asked])
                for name in against:
                    values[f"auroc_over_{name}"] = values["auroc"] - drawn[name]
                undefined = int(np.isnan(score[asked]).sum())
                rows += _rows(
                    design, event, reading, " ".join(predictor), predictor, values, undefined, level
                )
    return pd.DataFrame(rows)


def select(
    predictions: pd.DataFrame,
    drift: pd.DataFrame,
    *,
    outcome: str = "error",
    reading: str = "within",
    predictors: Sequence[Predictor] | None = None,
) -> Predictor:
    """The (method, layer, score) with the highest AUROC, to be chosen on validation films and judged on others.

    Arguments as for `warning`. Of equals, the first in alphabetical order. Errors: ValueError where no copy has the
    outcome, or all have it.

    >>> predictions, drift = _example()
    >>> select(predictions, drift)
    ('gradcam', 'layer4_1', 'rmse')
    """
    images = predictions["image"].unique()
    table = warning(
        predictions,
        drift,
        dict(zip(images, images, strict=True)),
        predictors=predictors,
        events=[outcome],
        readings=[reading],
        draws=0,
    )
    table = table[table["metric"].eq("auroc") & table["method"].ne("")]
    if table["value"].isna().any():
        raise ValueError(
            f"no cell of these films holds copies with and without {outcome!r}, so nothing can be chosen: "
            "take more films, stronger corruptions or another outcome"
        )
    table = table.assign(value=table["value"].round(12)).sort_values(["method", "layer", "score"])
    best = table.loc[table["value"].idxmax()]
    return best["method"], best["layer"], best["score"]


def verdict(table: pd.DataFrame, *, outcome: str = "error", reading: str = "within") -> str:
    """One or two plain sentences on the drift predictor in `warning`'s table: the intervals decide.

    Warns: the interval of its AUROC lies above 1/2. Better or worse than the model's own uncertainty: the interval
    of the paired difference lies above or below 0. With fewer than `ENOUGH_PATIENTS` patients that have the event,
    or that have not, it says only that. Errors: ValueError where the table holds several drift predictors
    (judge the one that `select` chose on other films) or lacks the rows asked for.

    >>> predictions, drift = _example()
    >>> verdict(warning(predictions, drift, {k: k for k in range(4)}, draws=20)).split(":")[0]
    'Too few wrong answers to judge gradcam layer4_1 rmse'
    """
    own = table[
        table["outcome"].eq(outcome) & table["reading"].eq(reading) & table["method"].ne("")
    ]
    if own["predictor"].nunique() != 1:
        raise ValueError(
            f"table holds {own['predictor'].nunique()} drift predictors of {outcome!r} ({reading}), not one: "
            "pass warning(..., predictors=[select(...)]), chosen on other films"
        )
    found = own.set_index("metric")
    auroc, name, called = found.loc["auroc"], own["predictor"].iloc[0], CALLED[outcome]
    if min(auroc["event_patients"], auroc["other_patients"]) < ENOUGH_PATIENTS:
        return (
            f"Too few {called} to judge {name}: {auroc['events']} copies from {auroc['event_patients']} patients "
            f"(and {auroc['other_patients']} patients without); {ENOUGH_PATIENTS} are needed on either side."
        )
    where = WHERE[reading]
    if auroc["ci_low"] > 0.5:
        says = f"drift warns of {called}: copies with them drift more"
    elif auroc["ci_high"] < 0.5:
        says = f"drift does not warn of {called}: copies with them drift less"
    else:
        says = f"no warning of {called} by drift can be shown"
    first = f"{where}, {says} ({name}, AUROC {_number(auroc)}, {auroc['events']} of {auroc['copies']} copies)."
    if "auroc_over_uncertainty" not in found.index:
        return first
    gain = found.loc["auroc_over_uncertainty"]
    if gain["ci_low"] > 0:
        compared = "It ranks them better than the model's own uncertainty does"
    elif gain["ci_high"] < 0:
        compared = "The model's own uncertainty, which needs no map, ranks them better"
    else:
        compared = "No difference to the model's own uncertainty can be shown"
    return f"{first} {compared} (drift minus uncertainty {_number(gain, '+')})."


def rows(table: pd.DataFrame) -> pd.DataFrame:
    """`warning`'s table as metric rows for `report.result_rows`, which adds model and context.

    "warning " and the predictor go under attack; metric, outcome and reading under metric; eps is 0 and eps_unit
    "all severities". NaN values are left out.

    >>> predictions, drift = _example()
    >>> rows(warning(predictions, drift, {k: k for k in range(4)}, draws=20))[["attack", "metric"]].iloc[0].tolist()
    ['warning uncertainty', 'auroc error within']
    """
    named = table.assign(
        attack="warning " + table["predictor"],
        eps=0.0,
        eps_unit=ALL_SEVERITIES,
        metric=table["metric"] + " " + table["outcome"] + " " + table["reading"],
    )
    columns = ["attack", "eps", "eps_unit", "metric", "value", "ci_low", "ci_high", "n"]
    return named.loc[named["value"].notna(), columns].reset_index(drop=True)


# ------------------------------------------------------------------------------------------- tables


def _copies(
    predictions: pd.DataFrame, drift: pd.DataFrame, predictors: Sequence[Predictor] | None
) -> tuple[pd.DataFrame, dict[Predictor, np.ndarray]]:
    """`outcomes` of the copies in `drift`, and every predictor's scores in their order, turned to grow with drift."""
    if missing := [c for c in (*KEY, "method", "layer") if c not in drift.columns]:
        raise ValueError(
            f"drift lacks the columns {missing}: it needs {', '.join(KEY)}, method, layer and scores"
        )
    drift = drift[drift["severity"].ne(0)]
    tables = dict(list(drift.groupby(["method", "layer"], sort=False)))
    known = [(*key, score) for key in tables for score in SIGN if score in drift.columns]
    chosen = known if predictors is None else [tuple(one) for one in predictors]
    if not chosen or (unknown := [one for one in chosen if one not in known]):
        raise ValueError(
            f"drift has no predictor {unknown[0]}"
            if chosen
            else "drift has no corrupted copy or no score: "
            f"it needs severities above 0 and columns of {', '.join(SIGN)}"
        )
    copies = outcomes(predictions)
    wanted = drift[KEY].drop_duplicates()
    copies = wanted.merge(copies, on=KEY, how="left", indicator=True)
    if (lost := copies["_merge"].ne("both")).any():
        raise ValueError(
            f"predictions lacks {int(lost.sum())} copies that drift has, such as {_named(copies[lost])}"
        )
    copies = copies.drop(columns="_merge")
    copies = copies.astype({name: bool for name in (*OUTCOMES, "clean_right")})
    place = copies[KEY].assign(_copy=np.arange(len(copies)))
    scores, order = {}, {}
    for method, layer in dict.fromkeys(one[:2] for one in chosen):
        table = tables[method, layer]
        if (repeated := table.duplicated(KEY)).any():
            raise ValueError(
                f"drift has {int(repeated.sum())} copies twice for {method} {layer}, such as "
                f"{_named(table[repeated])}: pass one model at a time, without the duplicates of a repeated run"
            )
        if len(table) != len(copies):
            lacking = wanted.merge(table[KEY], on=KEY, how="left", indicator=True).query(
                "_merge == 'left_only'"
            )
            raise ValueError(
                f"drift lacks {len(lacking)} copies for {method} {layer} that it has for other maps, such as "
                f"{_named(lacking)}: compute every map on the same copies"
            )
        order[method, layer] = table[KEY].merge(place, on=KEY, how="left")["_copy"].to_numpy()
    for method, layer, score in chosen:
        turned = np.empty(len(copies))
        turned[order[method, layer]] = SIGN[score] * tables[method, layer][score].to_numpy(float)
        scores[method, layer, score] = turned
    return copies, scores


def _named(row: pd.DataFrame) -> str:
    image, corruption, severity = row[KEY].iloc[0]
    return f"image {image}, {corruption} at severity {severity}"


def _rows(
    design: _Design,
    event: str,
    reading: str,
    name: str,
    predictor: Predictor,
    values: dict[str, np.ndarray],
    undefined: int,
    level: float,
) -> list[dict]:
    tail = (1 - level) / 2
    made = []
    for metric, drawn in values.items():
        resampled = drawn[1:][np.isfinite(drawn[1:])]
        low, high = np.quantile(resampled, [tail, 1 - tail]) if len(resampled) else (np.nan, np.nan)
        made.append(
            {
                "reading": reading,
                "outcome": event,
                "predictor": name,
                **dict(zip(("method", "layer", "score"), predictor, strict=True)),
                "metric": metric,
                "value": float(drawn[0]),
                "ci_low": float(low),
                "ci_high": float(high),
                **design.counts,
                "undefined": undefined,
            }
        )
    return made


def _number(row: pd.Series, sign: str = "") -> str:
    value, low, high = (f"{row[name]:{sign}.3f}" for name in ("value", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}]"


def _example() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Four films, clean and blurred: two go wrong (films 2 and 3), with drift 3 and 1 beside 0 and 2."""
    clean = pd.DataFrame(
        {
            "image": range(4),
            "label": 0,
            "corruption": CLEAN,
            "severity": 0,
            "predicted": 0,
            "p0": 0.9,
            "p1": 0.1,
        }
    )
    blurred = clean.assign(
        corruption="blur",
        severity=1,
        predicted=[0, 0, 1, 1],
        p0=[0.6, 0.6, 0.4, 0.4],
        p1=[0.4, 0.4, 0.6, 0.6],
    )
    drift = blurred[KEY].assign(method="gradcam", layer="layer4_1", rmse=[0.0, 2.0, 3.0, 1.0])
    return pd.concat([clean, blurred], ignore_index=True), drift


# ------------------------------------------------------------------------------------------- association


@dataclass(frozen=True)
class _Design:
    """Which copies are compared, with what weight, and all that does not depend on the predictor.

    A stratum is a cell ("within"), one clean answer in it ("same answer") or everything ("mixed"); a unit is a patient; `mass` is what a copy weighs
    before patients are drawn; weights [units,draws] has the plain sample first.
    """

    event: np.ndarray  # bool [copies]
    stratum: np.ndarray  # int [copies]
    strata: int
    unit: np.ndarray  # int [copies]
    image: np.ndarray  # int [copies]
    mass: np.ndarray  # [copies]
    weights: np.ndarray
    same_image: bool  # whether a stratum holds several copies of an image
    positive: np.ndarray  # weight of events [strata,draws]
    negative: np.ndarray
    counts: dict[str, int]

    def total(
        self, of: np.ndarray, weights: np.ndarray | None = None, power: int = 1
    ) -> np.ndarray:
        """Weight of the copies in the mask `of` by stratum and draw [strata,draws]; each to a power."""
        units = len(self.weights)
        cell = self.stratum[of] * units + self.unit[of]
        by_unit = np.bincount(cell, self.mass[of] ** power, minlength=self.strata * units)
        return by_unit.reshape(self.strata, units) @ (self.weights if weights is None else weights)


def _design(
    copies: pd.DataFrame, unit: np.ndarray, event: str, reading: str, weights: np.ndarray
) -> _Design:
    happened = copies[event].to_numpy()
    image, names = pd.factorize(copies["image"])
    if reading != "mixed":
        cell = ["corruption", "severity"] + ["clean_predicted"] * (reading == "same answer")
        stratum = copies.groupby(cell, sort=False).ngroup().to_numpy()
        mass = np.ones(len(copies))
    else:
        stratum = np.zeros(len(copies), dtype=int)
        mass = 1 / np.bincount(image)[image] if len(image) else np.ones(0)
    strata = int(stratum.max()) + 1 if len(stratum) else 1
    both = np.isin(np.arange(strata), stratum[happened]) & np.isin(
        np.arange(strata), stratum[~happened]
    )
    counts = {
        "n": len(names),
        "copies": len(copies),
        "events": int(happened.sum()),
        "event_patients": len(np.unique(unit[happened & both[stratum]])),
        "other_patients": len(np.unique(unit[~happened & both[stratum]])),
        "cells": int(both.sum()),
    }
    empty = np.zeros((0, 0))
    bare = _Design(
        happened,
        stratum,
        strata,
        unit,
        image,
        mass,
        weights,
        reading == "mixed",
        empty,
        empty,
        counts,
    )
    return _Design(
        **(vars(bare) | {"positive": bare.total(happened), "negative": bare.total(~happened)})
    )


def _association(design: _Design, score: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC and Spearman of a score with the event, by draw."""
    d, defined = design, np.isfinite(score)
    pairs = d.positive * d.negative
    above = _above(d.event, score, defined, d.stratum, d.strata, d.unit, d.mass, d.weights)
    if not defined.all():  # a pair with an undefined score counts one half
        above += (pairs - d.total(d.event & defined) * d.total(~d.event & defined)) / 2
    if d.same_image:
        above_self, pairs_self = _same_image(d, score, defined)
        above = above - above_self @ d.weights**2
        # What is left where no two images differ in the event is rounding, not pairs.
        pairs = pairs - pairs_self @ d.weights**2
        pairs = np.where(pairs > 1e-9, pairs, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = above.sum(0) / pairs.sum(0)
        total = d.positive + d.negative
        # The variance of the ranks, over that of ranks without ties.
        spread = ((total - d.total(~defined)) / total) ** 3 - _ties(d, score, defined) / total**3
        rank = (above / pairs - 0.5) * np.sqrt(12 * d.positive * d.negative / spread) / total
        rank = np.where(
            (pairs > 0) & (spread > 1e-12), rank, 0.0
        )  # ranks that never differ say nothing
        spearman = (pairs * rank).sum(0) / pairs.sum(0)
    return {"auroc": auroc, "spearman": spearman}


def _above(
    event: np.ndarray,
    score: np.ndarray,
    defined: np.ndarray,
    stratum: np.ndarray,
    strata: int,
    unit: np.ndarray,
    mass: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """Weight of the pairs in which the event has the higher score [strata,draws]; ties count one half.

    The others are counted between one score of an event and the next, by patient, before they meet the draws:
    the work grows with the number of events, not with all copies.
    """
    event, score, stratum, unit, mass = (a[defined] for a in (event, score, stratum, unit, mass))
    above = np.zeros((strata, weights.shape[1]))
    if 2 * event.sum() > len(event):
        event, score = ~event, -score  # the same pairs, in fewer steps
    if not event.any():
        return above
    values, rank = np.unique(score, return_inverse=True)
    key = stratum * len(values) + rank
    steps, step = np.unique(key[event], return_inverse=True)
    before, upto = (np.searchsorted(steps, key[~event], side) for side in ("left", "right"))
    half = mass[~event] / 2
    shape = (len(steps) + 1, len(weights))
    met = csr_matrix(
        (np.r_[half, half], (np.r_[before, upto], np.tile(unit[~event], 2))), shape=shape
    )
    own = csr_matrix((mass[event], (step, unit[event])), shape=shape)
    here = steps // len(values)  # stratum of each step
    starts = np.flatnonzero(np.r_[True, np.diff(here) > 0])
    cell = stratum[~event] * len(weights) + unit[~event]
    others = np.bincount(cell, mass[~event], minlength=strata * len(weights)).reshape(strata, -1)
    earlier = np.cumsum(others, axis=0) - others  # of the strata before, which must not count
    for part in _parts(weights.shape[1], len(steps)):
        drawn = weights[:, part]
        events = (own @ drawn)[:-1]
        below = np.cumsum((met @ drawn)[:-1], axis=0)
        below -= (earlier @ drawn)[here]
        above[here[starts], part] = np.add.reduceat(events * below, starts, axis=0)
    return above


def _same_image(
    design: _Design, score: np.ndarray, defined: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of an image with itself by patient [units], to take away: those the event wins, and all."""
    d, images = design, int(design.image.max()) + 1 if len(design.image) else 0
    units = len(d.weights)
    once = np.ones((units, 1))
    won = _above(d.event, score, defined, d.image, images, d.unit, d.mass, once)[:, 0]

    def pairs(of: np.ndarray) -> np.ndarray:
        counted = (
            np.bincount(d.image[of & side], d.mass[of & side], minlength=images)
            for side in (d.event, ~d.event)
        )
        return np.prod(list(counted), axis=0)

    every = pairs(np.ones(len(score), bool))
    won = won + (every - pairs(defined)) / 2
    patient = np.zeros(images, dtype=int)
    patient[d.image] = d.unit
    return tuple(np.bincount(patient, each, minlength=units) for each in (won, every))


def _ties(design: _Design, score: np.ndarray, defined: np.ndarray) -> np.ndarray:
    """Sum over the distinct scores of their weight to the third power [strata,draws]."""
    d = design
    values, rank = np.unique(score[defined], return_inverse=True)
    key = d.stratum[defined] * max(len(values), 1) + rank
    groups, group, size = np.unique(key, return_inverse=True, return_counts=True)
    alone = defined.copy()
    alone[defined] = size[group] == 1
    cubes = d.total(alone, d.weights**3, power=3)
    tied = np.flatnonzero(size > 1)
    if len(tied):
        place = np.searchsorted(groups[tied], key[size[group] > 1])
        of = defined & ~alone
        weight = csr_matrix((d.mass[of], (place, d.unit[of])), shape=(len(tied), len(d.weights)))
        here = groups[tied] // len(values)
        starts = np.flatnonzero(np.r_[True, np.diff(here) > 0])
        for part in _parts(d.weights.shape[1], len(tied)):
            cubes[here[starts], part] += np.add.reduceat(
                (weight @ d.weights[:, part]) ** 3, starts, axis=0
            )
    return cubes


def _parts(draws: int, rows: int, *, numbers: int = 1_000_000) -> list[slice]:
    """Draws in parts, so that rows times draws stays within some megabytes."""
    step = max(1, numbers // max(rows, 1))
    return [slice(at, min(at + step, draws)) for at in range(0, draws, step)]
