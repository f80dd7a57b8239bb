"""Hyper-parameter search that widens its own ranges, and fine-tuning that steps back when the training falls.

Both can be killed at any moment and called again. The search is an Optuna study in SQLite (Akiba et al., KDD 2019,
arXiv 1907.10902): TPE draws the settings, median pruning ends hopeless runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DatabaseError

from . import train
from .files import write_csv
from .objectives import Objective
from .plots import COLORS, panels
from .study import OutOfTime

DIRECTIONS = ("maximize", "minimize")
EDGE = 0.1  # a best value in this outer share of its range lies on the edge
PRUNE_AFTER_RUNS = 3  # a median of fewer runs means little
PRUNE_AFTER_EPOCHS = 2
FILES = ("search.db", "runs.csv", "extensions.csv")
COLUMNS = ("number", "score", "state", "epochs", "seconds", "extension")

log = logging.getLogger("dlia_utils")


# -------------------------------------------------------------------- the space


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; whole numbers if both are `int`.

    `log` draws and measures in logarithms; `step` leaves only low, low + step, ..., high. `hard` is (min, max), which
    an extension never passes; None is no limit, but a range that starts at 0 or above stays there.

    >>> Range(1e-4, 1e-2, log=True), Range(0.0, 0.5, step=0.1, hard=(0, 0.9)).step
    (Range(low=0.0001, high=0.01, log=True, step=None, hard=(None, None)), 0.1)
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    hard: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Choice:
    """One of `values`; `ordered` says that neighbours are alike, and only then has a choice edges to extend.

    `beyond` is (lower values, higher values), in order: an extension adds the one next to the edge.

    >>> Choice((32, 64), beyond=((8, 16), (128,))).ordered
    True
    """

    values: Sequence[Any]
    ordered: bool = True
    beyond: tuple[Sequence[Any], Sequence[Any]] = ((), ())


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    best: parameter values of the best complete run; best_score: its score. runs: one row a run, as in runs.csv.
    extensions: one dict for each widened side of a range. ranges: one row a parameter: best value, the range asked
    for, the range searched, and `edge`, which is empty unless the best value still lies on an edge, and then says why.
    """

    best: dict[str, Any]
    best_score: float
    runs: pd.DataFrame
    extensions: list[dict[str, Any]]
    ranges: pd.DataFrame


# -------------------------------------------------------------------- the search


def search(
    objective_fn: Callable[[dict[str, Any], Callable[[int, float], None]], Mapping[str, Any]],
    space: Mapping[str, Range | Choice],
    *,
    folder: str | Path,
    trials: int,
    seed: int,
    direction: str = "maximize",
    prune: bool = True,
    extend: int = 3,
    resume: bool = True,
    config: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Search `space` for the setting with the best score: TPE, median pruning, ranges that grow where they must.

    `objective_fn(params, report)` trains a model that is NEW in every call (weights left from another run would make
    the runs depend on each other) and returns a dict with "score" and any other metrics. It may call
    `report(epoch, score)` after each epoch, with epochs counted from 1; with `prune`, a run whose best report is
    worse than the median of the earlier runs at that epoch ends there: `report` raises `optuna.TrialPruned`,
    which must be let through. Scores that choose must come from validation data. With `train.fit`:
    `on_epoch=lambda row: report(row["epoch"], row["val_auc"])` and `run_dir=folder / run_name(params)`.

    After `trials` runs every parameter is looked at: if the best value lies on an edge (the outer 10 % of the range
    in its own scale, or the first or last value of an ordered choice), the range grows on that side, by half its
    width or by the next value of `beyond`, up to its hard limit. Then trials // 2 more runs are made, the first
    of them the best setting with that one value moved into the middle, then to the end of the new part; and so on,
    at most `extend` times.

    `folder` receives search.db, runs.csv (replaced after each run: number, the parameters, score, other metrics,
    state, epochs, seconds, extension; 0 is the search before any extension) and extensions.csv. States: "complete";
    "pruned" (its score is the last reported one); "diverged" (the score is not finite, or FloatingPointError, as
    `train.fit` raises; counts as a bad run); "failed" (any other error, which goes on to the caller, or a kill).
    Called again, with `resume`, no finished run is repeated and a failed one is made anew with the same values:
    what is drawn depends on `seed` and on the scores so far only, so that if the objective gives the same scores
    again, an interrupted search ends as one that was not. `config` is anything else the scores depend on, e.g.
    `study.key`; a folder of another space, config or other settings is refused, a larger `extend` is not.

    Raises: ValueError (arguments, a folder of other settings, a result without score, no run completed),
    RuntimeError (another process searches in this folder).

    >>> import tempfile
    >>> found = search(lambda params, report: {"score": -((params["x"] - 1.2) ** 2)}, {"x": Range(0.0, 1.0)},
    ...                folder=tempfile.mkdtemp(), trials=4, seed=0, extend=1)
    >>> len(found.runs), found.extensions[0]["side"], 0.9 < found.best["x"] < 1.5
    (6, 'high', True)
    """
    _check(space, trials=trials, seed=seed, direction=direction, extend=extend, resume=resume)
    settings = {
        "space": {name: _plain(part) for name, part in space.items()},
        "trials": trials,
        "seed": seed,
        "direction": direction,
        "prune": prune,
        "config": dict(config or {}),
    }
    folder = Path(folder)
    with (
        _alone(folder),
        _opened(folder, json.loads(json.dumps(settings, default=str)), resume=resume) as study,
    ):
        _check_extend(study, extend)
        widened, extensions = dict(space), []
        for extension in range(extend + 1):
            probes = _probes(entry for entry in extensions if entry["extension"] == extension)
            _write(study, space, extensions, folder)
            while (done := len(_finished(study, extension))) < (
                trials // 2 if extension else trials
            ):
                _draw_as(study, seed=seed, startup=min(10, max(3, trials // 3)))
                probe = probes[done] if done < len(probes) else None
                try:
                    _run(study, objective_fn, widened, extension=extension, probe=probe)
                finally:
                    _write(study, space, extensions, folder)
            best = _best(study, extension)
            entries = _widen_all(widened, best.params, extension + 1) if extension < extend else []
            if not entries:
                break
            extensions += entries
            widened |= {entry["parameter"]: entry["space"] for entry in entries}
        values = {name: _decode(part, best.params[name]) for name, part in space.items()}
        runs = _runs(study, space)
    return SearchResult(
        best=values,
        best_score=best.value,
        runs=runs,
        extensions=[_entry_row(entry) for entry in extensions],
        ranges=_ranges(space, widened, best.params, extensions),
    )


def run_name(params: Mapping[str, Any]) -> str:
    """A folder name for the files of a run, the same for the same parameter values: a run made anew finds them.

    >>> run_name({"lr": 0.001, "dropout": 0.5}) == run_name({"dropout": 0.5, "lr": 0.001})
    True
    """
    text = json.dumps(dict(params), sort_keys=True, default=str)
    return "run_" + hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:12]


def retrain_epochs(history: pd.DataFrame, *, monitor: str = "val_auc") -> int:
    """The early-stopped number of epochs: the best epoch of a `train.fit` history, counted from 1, the first of equals.

    The final model is trained on training and validation data for this many epochs, without early stopping:
    `train.fit(..., val_set=None, monitor="epoch", epochs=this)`. The rate must not depend on the number of epochs
    (schedule="constant"), else the shorter training is another one. A monitor whose name ends in "loss" is the better
    the smaller. Raises: ValueError for a history without the monitor or without a number in it.

    >>> retrain_epochs(pd.DataFrame({"epoch": [1, 2, 3, 4], "val_auc": [0.7, 0.9, float("nan"), 0.9]}))
    2
    """
    if monitor not in history:
        raise ValueError(
            f"the history has no column {monitor!r}; choose monitor from {', '.join(history.columns)}"
        )
    scores = history[monitor].to_numpy(float)
    if not np.isfinite(scores).any():
        raise ValueError(
            f"the history has no epoch with a number in {monitor!r}: there is no best one"
        )
    best = np.nanargmin(scores) if monitor.endswith("loss") else np.nanargmax(scores)
    return int(history["epoch"].iloc[best])


# -------------------------------------------------------------------- fine-tuning


@dataclass(frozen=True)
class FineTuned:
    """What `finetune_with_drop_rule` kept.

    model: the fine-tuned model, or the start model, in eval mode. fitted: the kept attempt, None if the start model
    was kept. attempts: one row an attempt, as in attempts.csv.
    """

    model: torch.nn.Module
    fitted: train.FitResult | None
    attempts: pd.DataFrame


class _Drop(Exception):
    """The training metric fell: the attempt is over."""


def finetune_with_drop_rule(
    make_model: Callable[[], torch.nn.Module],
    objective: Objective,
    train_set: torch.utils.data.Dataset,
    val_set: torch.utils.data.Dataset | None,
    *,
    run_dir: str | Path,
    lrs: Sequence[float],
    epochs: int,
    baseline: Mapping[str, float],
    monitor: str = "val_auc",
    tolerance: float = 0.02,
    **options: Any,
) -> FineTuned:
    """Fine-tune with the largest rate of `lrs` that does not spoil the training; keep the start model without a gain.

    `make_model()` returns the start model anew: the trained weights loaded (the frozen model with its new head),
    and unfrozen. `baseline` has its "train_accuracy", taken from its own training history (so with augmentation and
    dropout, as it is measured here), and its `monitor`. An attempt ends as soon as an epoch's training accuracy is
    more than `tolerance` below the highest so far, the baseline's included, or the loss is no longer finite; the model
    is made anew and the next smaller rate tried. An attempt that ends well is kept if its best epoch has a better
    `monitor` than the baseline; otherwise, and when all rates made the training fall, the start model is kept. Without
    validation data (`val_set` None), monitor="train_accuracy" decides. Test data has no part in it.

    Attempt number n is `train.fit(..., **options)` in run_dir/attempt{n}, so a killed call goes on where it was.
    run_dir/attempts.csv: attempt, lr, epochs, outcome ("gain", "no gain", "drop", "diverged"), train_accuracy (of the
    last epoch), baseline_train_accuracy, best_epoch, and `monitor` with baseline_`monitor`.

    Raises: ValueError (rates not falling, a baseline without a number, arguments of `train.fit`), `study.OutOfTime`
    when `max_minutes` ended an attempt.

    >>> import tempfile
    >>> from dlia_utils.objectives import cross_entropy
    >>> data = torch.utils.data.TensorDataset(torch.rand(8, 1, 4, 4), torch.tensor([0, 1] * 4))
    >>> def start():
    ...     return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    >>> tuned = finetune_with_drop_rule(
    ...     start, cross_entropy(), data, data, run_dir=tempfile.mkdtemp(), lrs=[1e-3, 1e-4], epochs=1,
    ...     baseline={"train_accuracy": 1.5, "val_auc": 0.5}, progress=False)
    >>> tuned.attempts["outcome"].tolist(), tuned.fitted is None
    (['drop', 'drop'], True)
    """
    _check_finetune(lrs, baseline, monitor, tolerance)
    run_dir, rows = Path(run_dir), []
    for number, lr in enumerate(lrs, 1):
        model, told, fitted = make_model(), [], None
        try:
            fitted = train.fit(
                model,
                objective,
                train_set,
                val_set,
                run_dir=run_dir / f"attempt{number}",
                lr=lr,
                epochs=epochs,
                monitor=monitor,
                on_epoch=_drop_watch(baseline, tolerance, told),
                **options,
            )
            if fitted.status == "interrupted":
                name, limit = f"fine-tuning attempt {number}", options["max_minutes"]
                raise OutOfTime(name, done=len(told), epochs=epochs, limit=limit)
            outcome = (
                "gain"
                if _sign(monitor) * (fitted.best_score - baseline[monitor]) > 0
                else "no gain"
            )
        except _Drop:
            outcome = "drop"
        except FloatingPointError:
            outcome = "diverged"
        rows.append(
            {
                "attempt": number,
                "lr": lr,
                "epochs": len(told),
                "outcome": outcome,
                "train_accuracy": told[-1]["train_accuracy"] if told else math.nan,
                "baseline_train_accuracy": baseline["train_accuracy"],
                "best_epoch": fitted.best_epoch if fitted else 0,
            }
            | (
                {}
                if monitor == "train_accuracy"
                else {
                    monitor: fitted.best_score if fitted else math.nan,
                    f"baseline_{monitor}": baseline[monitor],
                }
            )
        )
        write_csv(pd.DataFrame(rows), run_dir / "attempts.csv")
        log.info("fine-tuning attempt %d (lr %g): %s", number, lr, outcome)
        if outcome == "gain":
            return FineTuned(model, fitted, pd.DataFrame(rows))
        if outcome == "no gain":
            break  # Nothing fell, so there is nothing that a smaller rate would mend.
    return FineTuned(make_model().eval(), None, pd.DataFrame(rows))


def _drop_watch(
    baseline: Mapping[str, float], tolerance: float, told: list[dict[str, float]]
) -> Callable[[dict[str, float]], None]:
    """A listener for `train.fit` that keeps the rows in `told` and raises `_Drop` when the training accuracy falls."""

    def on_epoch(row: dict[str, float]) -> None:
        highest = max(
            [baseline["train_accuracy"], *(earlier["train_accuracy"] for earlier in told)]
        )
        told.append(row)
        if row["train_accuracy"] < highest - tolerance:
            raise _Drop

    return on_epoch


def _check_finetune(
    lrs: Sequence[float], baseline: Mapping[str, float], monitor: str, tolerance: float
) -> None:
    if not lrs or any(later >= earlier for earlier, later in zip(lrs[:-1], lrs[1:], strict=True)):
        raise ValueError(
            f"lrs must be falling rates, the first one tried first, e.g. (1e-4, 1e-5); got {list(lrs)}"
        )
    for name in ("train_accuracy", monitor):
        if not math.isfinite(baseline.get(name, math.nan)):
            raise ValueError(
                f"baseline needs the start model's {name!r} as a number, from its history; got {dict(baseline)}"
            )
    if tolerance < 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")


def _sign(monitor: str) -> int:
    return -1 if monitor.endswith("loss") else 1


# -------------------------------------------------------------------- figures and tables


def figure_search(runs: pd.DataFrame, caption: str, *, direction: str = "maximize") -> Figure:
    """Score against each parameter, one point a run; pruned runs are hollow, extensions coloured, the best one starred.

    `runs` is `SearchResult.runs` or runs.csv. Runs without a score (diverged, failed) are only counted.
    """
    names = _parameters(runs)
    shown = runs[runs["state"].isin(["complete", "pruned"]) & runs["score"].notna()]
    complete = shown[shown["state"] == "complete"]
    best = (
        complete.nlargest(1, "score") if direction == "maximize" else complete.nsmallest(1, "score")
    )
    columns = min(4, len(names))
    figure, axes = panels(columns, rows=-(-len(names) // columns), width=2.9, height=2.9)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        place, labels = _places(runs[name])
        for extension, part in shown.groupby("extension"):
            color = _extension_color(extension)
            for _, point in part.iterrows():
                face = color if point["state"] == "complete" else "none"
                axis.scatter(
                    place[point.name],
                    point["score"],
                    s=26,
                    facecolors=face,
                    edgecolors=color,
                    lw=1.1,
                )
        axis.scatter(place[best.index], best["score"], marker="*", s=150, color="black", zorder=3)
        if labels:
            axis.set_xticks(range(len(labels)), labels, fontsize=7)
        elif _looks_logarithmic(place):
            axis.set_xscale("log")
        axis.set_xlabel(name)
        axis.grid(alpha=0.25)
    for row in axes:
        row[0].set_ylabel("score")
    figure.legend(
        handles=_search_legend(shown), fontsize=7, frameon=False, ncol=4, loc="lower center"
    )
    others = len(runs) - len(shown)
    figure.suptitle(
        f"{len(runs)} runs" + (f", {others} without a score" if others else "") + f"; {caption}",
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    return figure


def top_runs(runs: pd.DataFrame, *, count: int = 10, direction: str = "maximize") -> pd.DataFrame:
    """The `count` best complete runs, the best one first.

    >>> runs = pd.DataFrame({"number": [0, 1, 2], "score": [0.5, 0.9, 0.95], "state": ["complete"] * 2 + ["pruned"]})
    >>> top_runs(runs)["number"].tolist()
    [1, 0]
    """
    complete = runs[runs["state"] == "complete"]
    return complete.sort_values("score", ascending=direction == "minimize", kind="stable").head(
        count
    )


def _parameters(runs: pd.DataFrame) -> list[str]:
    """The names of the parameters: the columns between number and score."""
    return list(runs.columns[1 : runs.columns.get_loc("score")])


def _places(values: pd.Series) -> tuple[pd.Series, list[str]]:
    """Numbers to draw at, and the names of the ticks if `values` are no numbers."""
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        return values, []
    text = values.astype(str)
    labels = list(dict.fromkeys(text))
    return text.map(labels.index), labels


def _looks_logarithmic(values: pd.Series) -> bool:
    return bool(values.min() > 0 and values.max() / values.min() >= 20)


def _extension_color(extension: int) -> str:
    return COLORS[int(extension) % len(COLORS)]


def _search_legend(shown: pd.DataFrame) -> list[Line2D]:
    def point(label: str, **style: Any) -> Line2D:
        return Line2D(
            [], [], **{"ls": "", "marker": "o", "color": "0.4", "ms": 5, "label": label} | style
        )

    handles = [point("complete")]
    if (shown["state"] == "pruned").any():
        handles.append(point("pruned", markerfacecolor="none"))
    handles.append(point("best", marker="*", color="black", ms=9))
    numbers = sorted(shown["extension"].unique())
    if len(numbers) > 1:
        names = {0: "ranges as asked"} | {n: f"extension {n}" for n in numbers if n}
        handles += [point(names[n], color=_extension_color(n), marker="s") for n in numbers]
    return handles


# -------------------------------------------------------------------- one run


def _run(
    study: optuna.Study,
    objective_fn: Callable,
    space: Mapping[str, Range | Choice],
    *,
    extension: int,
    probe: dict[str, Any] | None,
) -> None:
    """Draw a setting (or take `probe`), run the objective, keep what came of it."""
    # A process killed right here before left its probe waiting: it comes first and must not wait twice.
    if probe and not study.get_trials(states=(TrialState.WAITING,)):
        study.enqueue_trial(probe)
    trial = study.ask({name: _distribution(part) for name, part in space.items()})
    trial.set_user_attr("extension", extension)
    params = {name: _decode(part, trial.params[name]) for name, part in space.items()}
    begun, state, metrics, epochs = time.monotonic(), "failed", {}, 0

    def report(epoch: int, score: float) -> None:
        nonlocal epochs
        epochs = int(epoch)
        trial.report(float(score), epochs)
        if trial.should_prune():
            raise optuna.TrialPruned(f"run {trial.number} is below the median after epoch {epochs}")

    try:
        metrics = _checked(objective_fn(dict(params), report), space)
        state = "complete" if math.isfinite(metrics["score"]) else "diverged"
    except optuna.TrialPruned:
        state = "pruned"
    except FloatingPointError as error:
        state = "diverged"
        log.warning("search run %d: %s", trial.number, error)
    finally:
        seconds = round(time.monotonic() - begun, 3)
        trial.set_user_attr(
            "outcome", {"state": state, "metrics": metrics, "epochs": epochs, "seconds": seconds}
        )
        if state == "complete":
            study.tell(trial, metrics["score"])
        else:
            study.tell(trial, state=TrialState.FAIL if state == "failed" else TrialState.PRUNED)
        log.info("search run %d, %s: %s -> %s", trial.number, state, params, metrics)


def _checked(metrics: Mapping[str, Any], space: Mapping[str, Range | Choice]) -> dict[str, Any]:
    """What the objective returned, as plain numbers; refused if it lacks a score or its names are taken."""
    if not isinstance(metrics, Mapping) or "score" not in metrics:
        raise ValueError(f'objective_fn must return a dict with "score", got {metrics!r}')
    if taken := [
        name for name in metrics if name in space or (name in COLUMNS and name != "score")
    ]:
        raise ValueError(
            f"objective_fn returns metrics whose names are columns of runs.csv: rename {taken}"
        )
    plain = {
        name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()
    }
    if odd := [
        name for name, value in plain.items() if not isinstance(value, int | float | str | None)
    ]:
        raise ValueError(
            f"objective_fn must return numbers or text, one a metric; {odd} are neither"
        )
    return plain | {"score": float(plain["score"])}


def _draw_as(study: optuna.Study, *, seed: int, startup: int) -> None:
    """Seed the sampler for the next run by the number of finished ones: a resumed search draws what it would have."""
    finished = len(_finished(study))
    seed = int(np.random.SeedSequence([seed, finished]).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)


def _finished(study: optuna.Study, extension: int | None = None) -> list[FrozenTrial]:
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [
        trial for trial in done if extension is None or trial.user_attrs["extension"] == extension
    ]


def _best(study: optuna.Study, extension: int) -> FrozenTrial:
    """The best complete run up to that extension, the first of equals."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    complete = [trial for trial in complete if trial.user_attrs["extension"] <= extension]
    if not complete:
        raise ValueError(
            "no run of the search completed (see runs.csv): narrow the ranges, above all of the rate"
        )
    sign = 1 if study.direction.name == "MAXIMIZE" else -1
    return max(complete, key=lambda trial: (sign * trial.value, -trial.number))


# -------------------------------------------------------------------- ranges and their edges

# Ordered choices are drawn as whole numbers, places in lower + values + higher, because Optuna lets ranges of numbers
# change within a study but not lists of values.


def _distribution(part: Range | Choice) -> BaseDistribution:
    if isinstance(part, Choice):
        if not part.ordered:
            return CategoricalDistribution(list(range(len(part.values))))
        first = len(part.beyond[0])
        return IntDistribution(first, first + len(part.values) - 1)
    if _whole(part):
        return IntDistribution(part.low, part.high, log=part.log, step=part.step or 1)
    return FloatDistribution(part.low, part.high, log=part.log, step=part.step)


def _decode(part: Range | Choice, drawn: Any) -> Any:
    if isinstance(part, Choice):
        return [*part.beyond[0], *part.values, *part.beyond[1]][drawn]
    # Steps of 0.1 add up to 0.30000000000000004.
    return round(drawn, 12) if part.step and not _whole(part) else drawn


def _whole(part: Range) -> bool:
    return isinstance(part.low, int) and isinstance(part.high, int)


def _scale(part: Range, value: float) -> float:
    return math.log(value) if part.log else value


def _edge(part: Range | Choice, drawn: Any) -> str:
    """On which edge a best value lies: "low", "high" or ""."""
    if isinstance(part, Choice):
        if not part.ordered:
            return ""
        share = (drawn - len(part.beyond[0])) / (len(part.values) - 1)
        return {0.0: "low", 1.0: "high"}.get(share, "")
    low, high = _scale(part, part.low), _scale(part, part.high)
    share = (_scale(part, drawn) - low) / (high - low)
    return "low" if share <= EDGE else "high" if share >= 1 - EDGE else ""


def _widen(part: Range | Choice, side: str) -> Range | Choice | None:
    """The range grown on one side; None where nothing lies beyond."""
    if isinstance(part, Choice):
        lower, higher = (tuple(values) for values in part.beyond)
        if side == "low":
            grown = Choice((*lower[-1:], *part.values), True, (lower[:-1], higher))
        else:
            grown = Choice((*part.values, *higher[:1]), True, (lower, higher[1:]))
        return grown if len(grown.values) > len(part.values) else None
    end = _next_end(part, side)
    if (end >= part.low) if side == "low" else (end <= part.high):
        return None
    return dataclasses.replace(part, **{side: end})


def _next_end(part: Range, side: str) -> float:
    """The end after growing by half the width: on the grid of steps, short enough to read, within the hard limit."""
    sign, end = (-1, part.low) if side == "low" else (1, part.high)
    lowest, highest = _limits(part)
    limit = lowest if side == "low" else highest
    if part.log:
        grown = end * (part.high / part.low) ** (sign / 2)
        grown = max(round(grown), 1) if _whole(part) else float(f"{grown:.6g}")
        return max(grown, limit) if side == "low" else min(grown, limit)
    half = (part.high - part.low) / 2
    if not (part.step or _whole(part)):
        grown = float(f"{end + sign * half:.6g}")
        return max(grown, limit) if side == "low" else min(grown, limit)
    step = part.step or 1
    room = math.floor(abs(limit - end) / step + 1e-9) if math.isfinite(limit) else math.inf
    steps = min(math.ceil(half / step - 1e-9), room)
    return end + sign * steps * step if _whole(part) else round(end + sign * steps * step, 12)


def _limits(part: Range) -> tuple[float, float]:
    lowest, highest = part.hard
    if lowest is None:
        lowest = -math.inf if part.low < 0 else 0
    # Whole numbers have whole limits; infinity stays as it is.
    if _whole(part):
        lowest = math.ceil(lowest) if math.isfinite(lowest) else lowest
        highest = highest if highest is None or not math.isfinite(highest) else math.floor(highest)
    return lowest, math.inf if highest is None else highest


def _added(part: Range | Choice, grown: Range | Choice, side: str) -> list[Any]:
    """What is drawn first of a widened range: the middle and the end of the new part, or the new value."""
    if isinstance(grown, Choice):
        place = _distribution(grown)
        return [place.low if side == "low" else place.high]
    old, new = getattr(part, side), getattr(grown, side)
    if _whole(grown) or grown.step:
        step = grown.step or 1
        if part.log:
            middle = round(math.sqrt(old * new))
        else:
            middle = old + (1 if new > old else -1) * step * math.ceil(
                abs(new - old) / step / 2 - 1e-9
            )
        return [middle, new] if abs(new - middle) > step / 2 else [new]
    return [math.sqrt(old * new) if part.log else (old + new) / 2, new]


def _probes(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first settings of an extension: the middles of all new parts, then their ends."""
    pairs = [entry["probes"] for entry in entries]
    return [pair[0] for pair in pairs] + [probe for pair in pairs for probe in pair[1:]]


def _widen_all(
    space: Mapping[str, Range | Choice], best: Mapping[str, Any], extension: int
) -> list[dict[str, Any]]:
    """One entry for each range whose best value (as drawn) lies on an edge with room beyond it."""
    entries = []
    for name, part in space.items():
        side = _edge(part, best[name])
        grown = _widen(part, side) if side else None
        if grown is None:
            continue
        probes = [dict(best) | {name: value} for value in _added(part, grown, side)]
        entries.append(
            {
                "extension": extension,
                "parameter": name,
                "side": side,
                "best": _decode(part, best[name]),
                "before": _text(part),
                "after": _text(grown),
                "space": grown,
                "probes": probes,
            }
        )
        log.info(
            "search: best %s = %s lies on the %s edge of %s; extended to %s",
            name,
            entries[-1]["best"],
            side,
            entries[-1]["before"],
            entries[-1]["after"],
        )
    return entries


def _entry_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("space", "probes")}


def _text(part: Range | Choice) -> str:
    if isinstance(part, Choice):
        return ", ".join(map(str, part.values))
    return f"{part.low:g} to {part.high:g}" + (" (log)" if part.log else "")


def _ranges(
    asked: Mapping[str, Range | Choice],
    searched: Mapping[str, Range | Choice],
    best: Mapping[str, Any],
    extensions: Sequence[Mapping[str, Any]],
) -> pd.DataFrame:
    rows = []
    for name, part in searched.items():
        side = _edge(part, best[name])
        why = "no extension left" if side and _widen(part, side) else "nothing allowed beyond"
        rows.append(
            {
                "parameter": name,
                "best": _decode(part, best[name]),
                "asked": _text(asked[name]),
                "searched": _text(part),
                "extensions": sum(entry["parameter"] == name for entry in extensions),
                "edge": f"{side}: {why}" if side else "",
            }
        )
    return pd.DataFrame(rows).astype({"best": object})


# -------------------------------------------------------------------- files


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two processes would each take the other's running run for that of a killed one."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "search.lock", timeout=0):
            yield
    except Timeout as error:
        raise RuntimeError(
            f"another process searches in {folder}: wait for it, or take another folder"
        ) from error


@contextmanager
def _opened(folder: Path, settings: dict[str, Any], *, resume: bool) -> Iterator[optuna.Study]:
    """The study in `folder`, made or resumed; runs that a killed process left are marked failed."""
    if not resume:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    path, storage = folder / "search.db", None
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        except DatabaseError as error:
            raise ValueError(
                f"{path} is not a search: remove it, or pass resume=False ({error.orig})"
            ) from error
        study = optuna.create_study(
            storage=storage,
            study_name="search",
            direction=settings["direction"],
            pruner=_pruner(settings["prune"]),
            load_if_exists=True,
        )
        _check_same(study, settings, folder)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
        yield study
    finally:
        optuna.logging.set_verbosity(verbosity)
        if storage is not None:  # Windows cannot remove a file that is still open.
            storage.remove_session()
            storage.engine.dispose()


def _pruner(prune: bool) -> optuna.pruners.BasePruner:
    if not prune:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(
        n_startup_trials=PRUNE_AFTER_RUNS, n_warmup_steps=PRUNE_AFTER_EPOCHS
    )


def _check_same(study: optuna.Study, settings: dict[str, Any], folder: Path) -> None:
    saved = study.user_attrs.get("settings")
    if saved is None and not study.get_trials(deepcopy=False):
        study.set_user_attr("settings", settings)
        return
    saved = saved or {}
    if names := [name for name in settings if saved.get(name) != settings[name]]:
        changes = "; ".join(f"{name}: {saved.get(name)!r} -> {settings[name]!r}" for name in names)
        raise ValueError(
            f"{folder} holds a search with other settings ({changes}): take another folder, "
            "or resume=False to start anew"
        )


def _check_extend(study: optuna.Study, extend: int) -> None:
    made = max((trial.user_attrs["extension"] for trial in _finished(study)), default=0)
    if made > extend:
        raise ValueError(
            f"this search was extended {made} times already: extend must be at least that, got {extend}"
        )


def _runs(study: optuna.Study, space: Mapping[str, Range | Choice]) -> pd.DataFrame:
    """One row a run, in the order of runs.csv."""
    rows, others = [], {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.WAITING:
            continue
        outcome = trial.user_attrs.get(
            "outcome", {"metrics": {}, "epochs": trial.last_step or 0, "seconds": math.nan}
        )
        ended = {TrialState.RUNNING: "running", TrialState.FAIL: "failed"}.get(trial.state)
        state = ended or outcome["state"]
        others |= dict.fromkeys(name for name in outcome["metrics"] if name != "score")
        params = {
            name: _decode(part, trial.params[name])
            for name, part in space.items()
            if name in trial.params
        }
        rows.append(
            {"number": trial.number, **params}
            | outcome["metrics"]
            | {
                "score": trial.value if state in ("complete", "pruned") else math.nan,
                "state": state,
            }
            | {"epochs": outcome["epochs"], "seconds": outcome["seconds"]}
            | {"extension": trial.user_attrs.get("extension", 0)}
        )
    columns = ["number", *space, "score", *others, "state", "epochs", "seconds", "extension"]
    return pd.DataFrame(rows, columns=columns).astype({"score": float})


def _write(
    study: optuna.Study,
    space: Mapping[str, Range | Choice],
    extensions: Sequence[Mapping[str, Any]],
    folder: Path,
) -> None:
    write_csv(_runs(study, space), folder / "runs.csv")
    if extensions:
        write_csv(pd.DataFrame(map(_entry_row, extensions)), folder / "extensions.csv")


# -------------------------------------------------------------------- refusals


def _check(
    space: Mapping[str, Range | Choice],
    *,
    trials: int,
    seed: int,
    direction: str,
    extend: int,
    resume: bool,
) -> None:
    """Refuse unusable arguments before anything is run or written."""
    if not space:
        raise ValueError(
            'space is empty: name at least one parameter, e.g. {"lr": Range(1e-4, 1e-2, log=True)}'
        )
    for name, part in space.items():
        if name in COLUMNS:
            raise ValueError(f"the parameter name {name!r} is a column of runs.csv: rename it")
        if isinstance(part, Range):
            _check_range(name, part)
        elif isinstance(part, Choice):
            _check_choice(name, part)
        else:
            raise ValueError(f"space[{name!r}] must be a Range or a Choice, got {part!r}")
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}; known: {', '.join(DIRECTIONS)}")
    if trials < 2:
        raise ValueError(f"trials must be at least 2, got {trials}")
    if seed < 0 or extend < 0:
        raise ValueError(f"seed and extend must not be negative, got {seed} and {extend}")
    if resume not in (True, False):
        raise ValueError(f"resume must be True or False, got {resume!r}")


def _check_range(name: str, part: Range) -> None:
    if not (math.isfinite(part.low) and math.isfinite(part.high) and part.low < part.high):
        raise ValueError(
            f"{name}: low must be below high, both finite; got {part.low} and {part.high}"
        )
    if part.log and part.low <= 0:
        raise ValueError(f"{name}: a logarithmic range needs low > 0, got {part.low}")
    if part.log and part.step is not None:
        raise ValueError(
            f"{name}: log and step exclude each other; use a Choice of the values you mean"
        )
    if part.step is not None:
        steps = (part.high - part.low) / part.step if part.step > 0 else 0.5
        if abs(steps - round(steps)) > 1e-9 or (_whole(part) and not isinstance(part.step, int)):
            raise ValueError(
                f"{name}: whole steps of {part.step} must lead from {part.low} to {part.high}"
            )
    lowest, highest = _limits(part)
    if not lowest <= part.low or not part.high <= highest:
        raise ValueError(
            f"{name}: the range {_text(part)} lies outside its hard limits {part.hard}"
        )
    if part.log and part.hard[0] is not None and part.hard[0] <= 0:
        raise ValueError(
            f"{name}: the hard minimum of a logarithmic range must be above 0, got {part.hard[0]}"
        )


def _check_choice(name: str, part: Choice) -> None:
    lower, higher = part.beyond
    scale = [*lower, *part.values, *higher]
    if len(part.values) < 2:
        raise ValueError(f"{name}: a choice needs at least two values, got {list(part.values)}")
    if any(value in scale[:place] for place, value in enumerate(scale)):
        raise ValueError(f"{name}: every value of a choice must be there once, got {scale}")
    if not part.ordered and (lower or higher):
        raise ValueError(f"{name}: only an ordered choice has values beyond its edges")


def _plain(part: Range | Choice) -> dict[str, Any]:
    """A space's part for the settings; lists, because JSON has no tuples."""
    return {"kind": type(part).__name__, **dataclasses.asdict(part)}
