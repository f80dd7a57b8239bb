"""Hyper-parameter search that widens its own ranges.

An Optuna study in SQLite (Akiba et al., KDD 2019, arXiv 1907.10902), killed and resumed any time.
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from . import files

SAID_BY_BASE = (StorageInternalError, SQLAlchemyError, sqlite3.Error)
EDGE = 0.1  # a best value in this outer share of its range lies on the edge

log = logging.getLogger("dlia_utils")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, drawn and measured in logarithms with `log`.

    No extension passes the limits `hard`; a range that starts at 0 or above stays there anyway.
    """

    low: float
    high: float
    log: bool = False
    hard: tuple[float | None, float | None] = (None, None)

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low must be below high, and above 0 with log=True; got {self}")

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (" (log)" if self.log else "")

    def draw(self, trial: Trial, name: str) -> float:
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def value(self, drawn: float) -> float:
        return drawn

    def edge(self, drawn: float) -> str:
        """On which edge a best value lies: "low", "high" or ""."""
        ends = self.low, self.high, drawn
        low, high, place = map(math.log, ends) if self.log else ends
        share = (place - low) / (high - low)
        return "low" if share <= EDGE else "high" if share >= 1 - EDGE else ""

    def widen(self, side: str) -> tuple[Range, list[float]] | None:
        """Grown by half its width; to be tried first: the middle and the end of the new part."""
        sign, end = (-1, self.low) if side == "low" else (1, self.high)
        grown = end + sign * (self.high - self.low) / 2
        if self.log:
            grown = end * (self.high / self.low) ** (sign / 2)
        lowest, highest = self.hard
        lowest = (-math.inf if self.low < 0 else 0) if lowest is None else lowest
        grown = min(max(float(f"{grown:.6g}"), lowest), math.inf if highest is None else highest)
        middle = math.sqrt(end * grown) if self.log else (end + grown) / 2
        return (replace(self, **{side: grown}), [middle, grown]) if grown != end else None


@dataclass(frozen=True)
class Choice:
    """One of `values`, in order; `beyond` is (lower values, higher values) for extensions.

    Drawn is the place in lower + values + higher: Optuna's ranges of numbers may change, not lists.
    """

    values: Sequence[Any]
    beyond: tuple[Sequence[Any], Sequence[Any]] = ((), ())

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))

    def draw(self, trial: Trial, name: str) -> Any:
        first = len(self.beyond[0])
        return self.value(trial.suggest_int(name, first, first + len(self.values) - 1))

    def value(self, drawn: int) -> Any:
        return [*self.beyond[0], *self.values, *self.beyond[1]][drawn]

    def edge(self, drawn: int) -> str:
        first = len(self.beyond[0])
        return {first + len(self.values) - 1: "high", first: "low"}.get(drawn, "")

    def widen(self, side: str) -> tuple[Choice, list[int]] | None:
        """Grown by the next value; to be tried first: its place."""
        lower, higher = map(tuple, self.beyond)
        if side == "low" and lower:
            return Choice((lower[-1], *self.values), (lower[:-1], higher)), [len(lower) - 1]
        if side == "high" and higher:
            place = len(lower) + len(self.values)
            return Choice((*self.values, higher[0]), (lower, higher[1:])), [place]
        return None


Space = Mapping[str, Range | Choice]


@dataclass(frozen=True)
class SearchResult:
    """What `search` found; `extensions` has a dict for each widened side, `ranges` a row for each
    parameter, with the reason why a best value still lies on an edge."""

    best: dict[str, Any]
    best_score: float
    runs: pd.DataFrame
    extensions: list[dict[str, Any]]
    ranges: pd.DataFrame


def search(
    objective_fn: Callable[[dict[str, Any], Callable[[int, float], None]], Mapping[str, Any]],
    space: Space,
    *,
    folder: str | Path,
    trials: int,
    seed: int,
    direction: str = "maximize",
    extend: int = 3,
    resume: bool = True,
    config: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Search `space` for the best score: TPE, median pruning, ranges that grow where they must.

    `objective_fn(params, report)` trains a NEW model and returns a dict with "score" and other
    metrics of validation data; `report(epoch, score)` ends a run below the median. If after
    `trials` runs a best value lies on an edge (the outer 10 % of its range, an end of a choice),
    the range grows there and trials // 2 more runs are made, at most `extend` times.

    `folder` receives runs.csv and extensions.csv. States: complete, pruned, diverged (the score is
    no number, or FloatingPointError), failed (another error, or a kill: made anew by the next
    call). An interrupted search ends as one that was not. `config`: what else scores depend on.
    Raises: ValueError (a folder of other settings, no complete run), RuntimeError (folder in use).
    """
    settings = {"space": {name: repr(part) for name, part in space.items()}, "trials": trials}
    settings |= {"seed": seed, "direction": direction, "config": dict(config or {})}
    folder, grown, extensions, probes = Path(folder), dict(space), [], []
    with _opened(folder, json.loads(json.dumps(settings, default=str)), resume) as study:
        for extension in range(extend + 1):
            _write(study, space, extensions, folder)
            wanted = trials // 2 if extension else trials
            while (done := len(_finished(study, extension))) < wanted:
                # Seeded by the number of runs: a resumed search draws what it would have drawn.
                drawn = np.random.SeedSequence([seed, len(_finished(study))]).generate_state(1)[0]
                options = dict(seed=int(drawn), n_startup_trials=min(10, max(3, trials // 3)))
                study.sampler = optuna.samplers.TPESampler(**options)
                # A process killed right here left its probe waiting, which must not wait twice.
                if done < len(probes) and not study.get_trials(states=(TrialState.WAITING,)):
                    study.enqueue_trial(probes[done])
                try:
                    study.optimize(partial(_run, objective_fn, grown, extension), n_trials=1)
                finally:
                    _write(study, space, extensions, folder)
            best = _best(study, extension)
            wider, entries, probes = _widened(grown, best.params, extension + 1)
            if extension == extend or not entries:
                break
            grown, extensions = wider, extensions + entries
        values = {name: part.value(best.params[name]) for name, part in space.items()}
        ranges = _ranges(space, grown, best.params, extensions)
        return SearchResult(values, best.value, _runs(study, space), extensions, ranges)


def _run(objective_fn: Callable, space: Space, extension: int, trial: Trial) -> float:
    """Draw a setting, run the objective, keep its metrics on the trial."""
    trial.set_user_attr("extension", extension)
    params = {name: part.draw(trial, name) for name, part in space.items()}

    def report(epoch: int, score: float) -> None:
        trial.report(float(score), int(epoch))
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        told = objective_fn(params, report)
        metrics = {k: v.item() if hasattr(v, "item") else v for k, v in told.items()}
        score = float(metrics.pop("score"))
        trial.set_user_attr("metrics", metrics)
    except FloatingPointError as error:
        log.warning("search run %d: %s", trial.number, error)
        score = math.nan
    log.info("search run %d: %s -> %s", trial.number, params, score)
    if not math.isfinite(score):
        trial.set_user_attr("diverged", True)
        raise optuna.TrialPruned  # for the sampler a bad run
    return score


def _finished(study: optuna.Study, extension: int | None = None) -> list[FrozenTrial]:
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [t for t in done if extension is None or t.user_attrs["extension"] == extension]


def _best(study: optuna.Study, extension: int) -> FrozenTrial:
    """The best complete run up to that extension, the first of equals."""
    complete = [t for step in range(extension + 1) for t in _finished(study, step)]
    complete = [trial for trial in complete if trial.state == TrialState.COMPLETE]
    if not complete:
        raise ValueError("no run of the search completed (see runs.csv): narrow the ranges")
    sign = 1 if study.direction.name == "MAXIMIZE" else -1
    return max(complete, key=lambda trial: (sign * trial.value, -trial.number))


def _widened(
    space: Space, best: Mapping[str, Any], extension: int
) -> tuple[Space, list[dict[str, Any]], list[dict[str, Any]]]:
    """The space grown at the edges where best values lie, a row for each, and what to try first."""
    wider, entries, tried = dict(space), [], []
    for name, part in space.items():
        side = part.edge(best[name])
        if side and (made := part.widen(side)):
            wider[name], first = made
            tried.append([dict(best) | {name: drawn} for drawn in first])
            row = dict(extension=extension, parameter=name, side=side, best=part.value(best[name]))
            entries.append(row | {"before": str(part), "after": str(wider[name])})
    # First the middles of all new parts, then their ends.
    probes = [one[0] for one in tried] + [probe for one in tried for probe in one[1:]]
    return wider, entries, probes


def _ranges(asked: Space, searched: Space, best: Mapping, extensions: list[dict]) -> pd.DataFrame:
    rows = []
    for name, part in searched.items():
        side, row = part.edge(best[name]), {"parameter": name, "best": part.value(best[name])}
        row |= {"asked": str(asked[name]), "searched": str(part)}
        row["extensions"] = sum(entry["parameter"] == name for entry in extensions)
        why = "no extension left" if side and part.widen(side) else "nothing allowed beyond"
        rows.append(row | {"edge": f"{side}: {why}" if side else ""})
    return pd.DataFrame(rows).astype({"best": object})


@contextmanager
def _opened(folder: Path, settings: dict[str, Any], resume: bool) -> Iterator[optuna.Study]:
    """The study in `folder`, made or resumed, for this process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    path, verbosity = folder / "search.sqlite", optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with FileLock(folder / "search.lock", timeout=0), _named(path):
            for name in () if resume else (path.name, "runs.csv", "extensions.csv"):
                (folder / name).unlink(missing_ok=True)
            storage = _storage(path)
            pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2)
            options = dict(storage=storage, study_name="search", pruner=pruner, load_if_exists=True)
            study = optuna.create_study(direction=settings["direction"], **options)
            saved = study.user_attrs.get("settings", settings)
            if saved != settings:
                names = [name for name in settings if saved.get(name) != settings[name]]
                text = f"{folder} holds a search with other settings ({', '.join(names)}): "
                raise ValueError(text + "take another folder, or resume=False to start anew")
            study.set_user_attr("settings", settings)
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                study.tell(trial.number, state=TrialState.FAIL)  # a killed process left it
            try:
                yield study
            finally:  # Windows cannot remove a file that is still open
                storage.remove_session()
                storage.engine.dispose()
    except Timeout as error:
        raise RuntimeError(f"another process searches in {folder}: wait for it") from error
    finally:
        optuna.logging.set_verbosity(verbosity)


def _storage(path: Path) -> optuna.storages.RDBStorage:
    """The data base in `path`, checked before anything is added to it."""
    lost = path.exists() and not path.stat().st_size and (path.parent / "runs.csv").exists()

    def connect() -> sqlite3.Connection:  # in a URL ? # % {} of the path would mean something else
        return sqlite3.connect(path, check_same_thread=False)

    with closing(connect()) as connection:
        (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        kept = connection.execute("SELECT name FROM sqlite_master WHERE name = 'studies'")
        tables = connection.execute("SELECT name FROM sqlite_master").fetchone()
        if lost or found != "ok" or (tables and not kept.fetchone()):
            raise sqlite3.DatabaseError(f"malformed: {'empty' if lost else found}")
    return optuna.storages.RDBStorage("sqlite:///search", engine_kwargs={"creator": connect})


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the data base says of its file, in words that never advise to remove a good one."""
    try:
        yield
    except Exception as error:
        # Optuna may fail again over what the data base said.
        said = [one for one in files.causes(error) if isinstance(one, SAID_BY_BASE)]
        if not said:
            raise
        said = str(said[-1]).splitlines()[0]
        if "is full" in said:
            raise files.no_space(path.parent) from error
        if any(word in said for word in ("locked", "readonly", "unable to open", "I/O")):
            raise OSError(f"{path} cannot be read and written ({said}): nothing is lost") from error
        fix = "delete it, or pass resume=False, to search anew"
        raise files.Damaged(f"{path} is damaged or no search ({said}): {fix}") from error


def _runs(study: optuna.Study, space: Space) -> pd.DataFrame:
    """One row a run, in the order of runs.csv."""
    rows, others = [], {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING or not set(space) <= set(trial.params):
            continue  # killed before it had all its values: nothing ran
        told, metrics = trial.user_attrs, trial.user_attrs.get("metrics", {})
        state = {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
        state = "diverged" if told.get("diverged") and state == "pruned" else state
        row = {name: space[name].value(drawn) for name, drawn in trial.params.items()}
        row |= metrics | {"number": trial.number, "state": state, "epochs": trial.last_step or 0}
        row["score"] = trial.value if state in ("complete", "pruned") else math.nan
        row["seconds"] = round(trial.duration.total_seconds(), 3) if trial.duration else math.nan
        rows.append(row | {"extension": told.get("extension", 0)})
        others |= dict.fromkeys(metrics)
    columns = ["number", *space, "score", *others, "state", "epochs", "seconds", "extension"]
    return pd.DataFrame(rows, columns=columns).astype({"score": float})


def _write(study: optuna.Study, space: Space, extensions: list[dict], folder: Path) -> None:
    files.write_csv(_runs(study, space), folder / "runs.csv")
    if extensions:
        files.write_csv(pd.DataFrame(extensions), folder / "extensions.csv")


def top_runs(runs: pd.DataFrame, *, count: int = 10, direction: str = "maximize") -> pd.DataFrame:
    """The `count` best complete runs, the best one first."""
    runs, up = runs[runs["state"] == "complete"], direction == "minimize"
    return runs.sort_values("score", ascending=up, kind="stable").head(count)
