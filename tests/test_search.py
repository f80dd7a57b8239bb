"""The search finds known optima, widens ranges, prunes, survives kills and refuses; fine-tuning steps back in time."""

import math
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from filelock import FileLock
from matplotlib.colors import to_hex
from sqlalchemy import event
from sqlalchemy.engine import Engine
from torch import nn
from torch.utils.data import TensorDataset

from dlia_utils import objectives, search, study, train
from dlia_utils.plots import COLORS
from dlia_utils.search import Choice, Range


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    """A killed process loses nothing that it wrote; only a power cut would, and no test makes one."""

    def connected(connection, _):
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", connected)
    yield
    event.remove(Engine, "connect", connected)


SAME = [
    "x",
    "batch",
    "score",
    "state",
    "epochs",
    "extension",
]  # all of a run that has nothing to do with the clock


def peak(x, *, at):
    return 1 - (x - at) ** 2


def two(params, report):
    """Best at x = 1.6, beyond the range of `SPACE`, and batch = 32."""
    report(1, peak(params["x"], at=1.6))
    return {
        "score": peak(params["x"], at=1.6) - 0.1 * abs(math.log2(params["batch"] / 32)),
        "auc": 0.5,
    }


SPACE = {"x": Range(0.0, 1.0), "batch": Choice((16, 32, 64))}


def run(folder, objective=two, space=SPACE, **options):
    return search.search(objective, space, **{"folder": folder, "trials": 4, "seed": 3} | options)


# ------------------------------------------------------------------ edges


def test_a_best_value_on_the_edge_extends_the_range_until_it_lies_inside(tmp_path):
    found = run(
        tmp_path,
        lambda params, report: {"score": peak(params["x"], at=2.0)},
        {"x": Range(0.0, 1.0)},
        trials=6,
    )
    assert (
        found.best["x"] == pytest.approx(2.0, abs=0.2)
        and found.best_score == found.runs["score"].max()
    )
    first = found.runs[found.runs["extension"] == 0]
    assert (
        len(first) == 6 and first["x"].max() <= 1 and first["x"].idxmax() == first["score"].idxmax()
    )
    # 1 grows by half of the width of 1, then of 1.5; the middle and the end of the new part are looked at first.
    assert [entry["after"] for entry in found.extensions[:2]] == ["0 to 1.5", "0 to 2.25"]
    assert [entry["extension"] for entry in found.extensions] == list(
        range(1, len(found.extensions) + 1)
    )
    for number, probes in ((1, [1.25, 1.5]), (2, [1.875, 2.25])):
        part = found.runs[found.runs["extension"] == number]
        assert len(part) == 3 and part["x"].iloc[:2].tolist() == probes
    only = found.ranges.iloc[0]
    assert (
        only["edge"] == ""
        and only["extensions"] == len(found.extensions)
        and only["asked"] == "0 to 1"
    )
    written = pd.read_csv(tmp_path / "runs.csv")
    pd.testing.assert_frame_equal(written, found.runs)  # to the digits that any pandas reads back
    assert list(written) == ["number", "x", "score", "state", "epochs", "seconds", "extension"]
    log = pd.read_csv(tmp_path / "extensions.csv")
    assert log["side"].tolist() == ["high"] * len(found.extensions)


def test_an_optimum_inside_extends_nothing(tmp_path):
    found = run(
        tmp_path,
        lambda params, report: {"score": peak(params["x"], at=0.5)},
        {"x": Range(0.0, 1.0)},
        trials=6,
    )
    assert found.extensions == [] and len(found.runs) == 6 and found.ranges["edge"].tolist() == [""]
    assert (
        found.best["x"] == pytest.approx(0.5, abs=0.25)
        and not (tmp_path / "extensions.csv").exists()
    )


def test_the_hard_limit_holds_and_the_smallest_score_wins_when_asked(tmp_path):
    def loss(params, report):
        return {"score": (math.log10(params["lr"]) + 6) ** 2}

    space = {"lr": Range(1e-3, 1e-1, log=True, hard=(1e-5, None))}
    found = run(tmp_path, loss, space, direction="minimize", extend=5)
    assert [entry["after"] for entry in found.extensions] == [
        "0.0001 to 0.1 (log)",
        "1e-05 to 0.1 (log)",
    ]
    assert found.runs["lr"].min() >= 1e-5 and found.best_score == found.runs["score"].min()
    assert found.ranges["edge"].tolist() == ["low: nothing allowed beyond"]


def test_ordered_choices_grow_by_one_value_and_unordered_never(tmp_path):
    def objective(params, report):
        return {"score": params["batch"] + (params["norm"] == "a")}

    space = {
        "batch": Choice((16, 32), beyond=((8,), (64, 128))),
        "norm": Choice(("a", "b"), ordered=False),
    }
    found = run(tmp_path, objective, space)
    assert [entry["after"] for entry in found.extensions] == ["16, 32, 64", "16, 32, 64, 128"]
    assert found.best == {"batch": 128, "norm": "a"}
    assert found.ranges["edge"].tolist() == ["high: nothing allowed beyond", ""]
    one = run(tmp_path / "one", objective, space, extend=1)
    assert one.best["batch"] == 64 and one.ranges["edge"].tolist() == [
        "high: no extension left",
        "",
    ]


@pytest.mark.parametrize(
    ("part", "side", "grown", "probes"),
    [
        (Range(0.0, 0.5, step=0.1, hard=(0, 0.9)), "high", (0.0, 0.8), [0.7, 0.8]),
        (Range(0.0, 0.5, step=0.1, hard=(0, 0.64)), "high", (0.0, 0.6), [0.6]),
        (Range(0.0, 0.5, step=0.1), "low", None, None),  # a share does not become negative
        (Range(-1.0, 1.0), "low", (-2.0, 1.0), [-1.5, -2]),
        (Range(1, 4), "high", (1, 6), [5, 6]),
        (Range(1, 4), "low", (0, 4), [0]),
        (Range(1, 4, hard=(1, 4.5)), "high", None, None),
        (Range(16, 64, step=16), "low", (0, 64), [0]),
        (Range(16, 64, log=True), "high", (16, 128), [91, 128]),
        (Range(1, 64, log=True), "low", None, None),
        (Range(1e-4, 1e-2, log=True), "low", (1e-5, 1e-2), [10**-4.5, 1e-5]),
        (
            Range(1e-4, 1e-2, log=True, hard=(None, 0.03)),
            "high",
            (1e-4, 0.03),
            [math.sqrt(3e-4), 0.03],
        ),
        (Range(0.1, 0.2, hard=(0, math.inf)), "low", (0.05, 0.2), [0.075, 0.05]),
    ],
)
def test_what_a_range_grows_to(part, side, grown, probes):
    new = search._widen(part, side)
    assert (new and (new.low, new.high)) == (grown and pytest.approx(grown, rel=1e-6))
    if new:
        added = search._added(part, new, side)
        assert added == pytest.approx(probes) and all(
            map(search._distribution(new)._contains, added)
        )
        assert all(isinstance(value, int) == isinstance(part.low, int) for value in added)


@pytest.mark.parametrize(
    ("part", "value", "edge"),
    [
        (Range(0.0, 1.0), 0.1, "low"),
        (Range(0.0, 1.0), 0.11, ""),
        (Range(0.0, 1.0), 0.91, "high"),
        (Range(1e-4, 1e-2, log=True), 1.5e-4, "low"),
        (Range(1e-4, 1e-2, log=True), 2e-4, ""),  # linear: both low
        (Range(1, 4), 1, "low"),
        (Range(1, 4), 2, ""),
        (Range(1, 4), 4, "high"),
        (Choice("abc"), 0, "low"),
        (Choice("abc"), 1, ""),
        (Choice("abc", beyond=("", "d")), 2, "high"),
        (Choice("abc", beyond=("z", "")), 1, "low"),
        (Choice("abc", ordered=False), 0, ""),
    ],
)
def test_where_the_edges_are(part, value, edge):
    assert search._edge(part, value) == edge


# ------------------------------------------------------------------ killed and resumed


class Watched:
    """`two`, with its calls noted; the call number `breaks` raises or kills in its second epoch."""

    def __init__(self, *, breaks=None, kill=False):
        self.calls, self.breaks, self.kill = [], breaks, kill

    def __call__(self, params, report):
        self.calls.append(dict(params))
        if len(self.calls) == self.breaks:
            report(1, 0.0)
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("disk full")
        return two(params, report)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    objective = Watched()
    found = run(tmp_path_factory.mktemp("straight"), objective, extend=1)
    assert (
        len(found.runs) == 6 == len(objective.calls) and found.extensions
    )  # 4, and 2 in the wider range
    return found


def check_same_end(found, straight):
    finished = found.runs[found.runs["state"] != "failed"].reset_index(drop=True)
    pd.testing.assert_frame_equal(finished[SAME], straight.runs[SAME], check_exact=True)
    assert found.best == straight.best and found.extensions == straight.extensions


@pytest.mark.parametrize("breaks", [4, 5])  # one that the sampler chose, the first of the extension
def test_an_error_goes_to_the_caller_and_the_next_call_goes_on_to_the_same_end(
    tmp_path, straight, breaks
):
    first, second = Watched(breaks=breaks), Watched()
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, first, extend=1)
    written = pd.read_csv(tmp_path / "runs.csv")
    assert (
        len(written) == breaks
        and written["state"].iloc[-1] == "failed"
        and written["epochs"].iloc[-1] == 1
    )
    found = run(tmp_path, second, extend=1)
    assert len(second.calls) == 6 - breaks + 1 and second.calls[0] == first.calls[-1]
    check_same_end(found, straight)
    check_same_end(
        run(tmp_path, lambda params, report: pytest.fail("ran again"), extend=1), straight
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which Windows has not")
@pytest.mark.parametrize("moment", ["in a run", "when a probe was named"])
def test_killed_and_resumed_ends_as_if_never_killed(tmp_path, straight, moment):
    child = os.fork()
    if child == 0:
        try:
            enqueue = optuna.Study.enqueue_trial

            def die(self, *arguments, **options):
                enqueue(self, *arguments, **options)
                os.kill(os.getpid(), signal.SIGKILL)

            optuna.Study.enqueue_trial = die
            run(tmp_path, Watched(breaks=4 if moment == "in a run" else None, kill=True), extend=1)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    objective = Watched()
    found = run(tmp_path, objective, extend=1)
    assert len(objective.calls) == 6 - (3 if moment == "in a run" else 4)
    assert found.runs["state"].eq("failed").sum() == (moment == "in a run")
    check_same_end(found, straight)


def test_two_at_once_are_refused(tmp_path):
    with FileLock(tmp_path / "search.lock"), pytest.raises(RuntimeError, match="another process"):
        run(tmp_path)


# ------------------------------------------------------------------ pruned, diverged, failed


def test_runs_below_the_median_end_early(tmp_path):
    def objective(params, report):
        for epoch in range(1, 5):
            report(epoch, params["x"] * epoch / 4)
        return {"score": params["x"]}

    options = {"space": {"x": Range(0.0, 1.0)}, "trials": 9, "extend": 0}
    runs = run(tmp_path / "a", objective, **options).runs
    pruned, complete = (runs[runs["state"] == state] for state in ("pruned", "complete"))
    assert (
        len(pruned) >= 2
        and pruned["x"].max() < complete["x"].max()
        and len(pruned) + len(complete) == 9
    )
    assert pruned["epochs"].min() >= search.PRUNE_AFTER_EPOCHS and pruned["epochs"].max() < 4
    np.testing.assert_allclose(
        pruned["score"], pruned["x"] * pruned["epochs"] / 4
    )  # the last reported one
    assert (
        complete["epochs"].eq(4).all()
        and runs["state"].iloc[: search.PRUNE_AFTER_RUNS].eq("complete").all()
    )
    unpruned = run(tmp_path / "b", objective, prune=False, **options | {"trials": 5}).runs
    assert unpruned["state"].eq("complete").all()


def test_a_diverged_run_is_a_bad_run_and_not_the_end(tmp_path):
    def objective(params, report):
        if params["lr"] > 0.7:
            raise FloatingPointError("the loss is no longer finite")
        return {"score": math.nan if params["lr"] > 0.5 else params["lr"]}

    found = run(tmp_path / "a", objective, {"lr": Range(0.0, 1.0)}, trials=9, extend=0)
    bad = found.runs["lr"] > 0.5
    assert (
        found.runs["state"].tolist() == ["diverged" if row else "complete" for row in bad]
        and bad.sum() >= 2
    )
    assert found.runs["score"].isna().equals(bad) and found.best["lr"] <= 0.5
    with pytest.raises(ValueError, match="no run of the search completed"):
        run(tmp_path / "b", objective, {"lr": Range(0.8, 1.0)}, trials=2)
    assert pd.read_csv(tmp_path / "b" / "runs.csv")["state"].tolist() == ["diverged"] * 2


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"auc": 1.0}, 'must return a dict with "score"'),
        ({"score": 1.0, "x": 2.0}, r"rename \['x'\]"),
        ({"score": 1.0, "map": [1, 2]}, r"\['map'\] are neither"),
    ],
)
def test_a_result_that_cannot_be_a_row_is_refused(tmp_path, result, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, lambda params, report: result)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"x": Range(1.0, 1.0)}}, "x: low must be below high"),
        ({"space": {"x": Range(0.0, math.inf)}}, "both finite"),
        ({"space": {"lr": Range(0.0, 1.0, log=True)}}, "lr: .* needs low > 0"),
        ({"space": {"lr": Range(1e-3, 1.0, log=True, step=0.1)}}, "exclude each other"),
        ({"space": {"p": Range(0.0, 0.5, step=0.2)}}, "p: whole steps"),
        ({"space": {"n": Range(0, 4, step=0.5)}}, "n: whole steps"),
        ({"space": {"p": Range(0.0, 0.5, step=-0.1)}}, "p: whole steps"),
        ({"space": {"p": Range(0.0, 1.5, hard=(0, 1))}}, "outside its hard limits"),
        ({"space": {"lr": Range(1e-3, 1e-2, log=True, hard=(0, 1))}}, "above 0"),
        ({"space": {"b": Choice((8,))}}, "b: .* at least two values"),
        ({"space": {"b": Choice((8, 16), beyond=((), (16,)))}}, "there once"),
        (
            {"space": {"b": Choice((8, 16), ordered=False, beyond=((), (32,)))}},
            "only an ordered choice",
        ),
        ({"space": {"x": (0, 1)}}, "must be a Range or a Choice"),
        ({"space": {"score": Range(0.0, 1.0)}}, "column of runs.csv"),
        ({"direction": "up"}, "maximize, minimize"),
        ({"trials": 1}, "trials"),
        ({"seed": -1}, "seed"),
        ({"resume": "force"}, "resume must be True or False"),
    ],
)
def test_unusable_arguments_are_refused_before_anything_is_run_or_written(
    tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "new", lambda params, report: pytest.fail("ran"), **options)
    assert not (tmp_path / "new").exists()


def test_a_search_of_another_kind_is_refused_a_longer_one_goes_on_or_it_starts_anew(tmp_path):
    options = {
        "trials": 4,
        "config": {"split": "abc"},
        "objective": lambda params, report: {"score": params["x"]},
    }
    found = run(tmp_path, extend=1, **options)
    assert len(found.extensions) == 1
    for changed, message in [
        ({"space": SPACE | {"x": Range(0.0, 2.0)}}, "space: .*1.0.*2.0.*resume=False"),
        ({"config": {"split": "abd"}}, "config: .*abc.*abd"),
        ({"seed": 4}, "seed: 3 -> 4"),
        ({"trials": 3}, "trials: 4 -> 3"),
        ({"direction": "minimize"}, "direction"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tmp_path, **{**options, "extend": 1, **changed})
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 6  # and nothing was run
    with pytest.raises(ValueError, match="extended 1 times already"):
        run(tmp_path, extend=0, **options)
    longer = run(tmp_path, extend=3, **options)
    assert len(longer.extensions) == 3 and longer.extensions[:1] == found.extensions
    pd.testing.assert_frame_equal(longer.runs.iloc[: len(found.runs)], found.runs)
    anew = run(tmp_path, extend=0, trials=3, resume=False)
    assert len(anew.runs) == 3 and not (tmp_path / "extensions.csv").exists()


def test_a_file_that_is_no_search_is_refused(tmp_path):
    (tmp_path / "search.db").write_text(
        "no database at all, but long enough to be taken for one" * 20
    )
    with pytest.raises(ValueError, match="search.db is not a search.*resume=False"):
        run(tmp_path)
    assert len(run(tmp_path, resume=False, trials=2, extend=0).runs) == 2


# ------------------------------------------------------------------ with the training loop


def images(size=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(size) % 2
    x = 0.5 * torch.rand(size, 1, 4, 4, generator=generator)
    x[y == 0, :, :, :2] += 0.5  # the bright half tells the class
    x[y == 1, :, :, 2:] += 0.5
    return TensorDataset(x, y)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


def fit(model, run_dir, **options):
    options = {
        "epochs": 4,
        "batch_size": 8,
        "progress": False,
        "monitor": "val_accuracy",
        **options,
    }
    return train.fit(
        model, objectives.cross_entropy(), images(), images(seed=1), run_dir=run_dir, **options
    )


def test_a_search_over_trainings_and_the_epochs_of_the_final_one(tmp_path):
    kept = {}

    def objective(params, report):
        told = lambda row: report(row["epoch"], -row["val_loss"])  # noqa: E731
        name = search.run_name(params)
        kept[name] = fit(
            linear(), tmp_path / name, lr=params["lr"], monitor="val_loss", on_epoch=told
        )
        return {"score": -kept[name].best_score, "best_epoch": kept[name].best_epoch}

    found = run(tmp_path, objective, {"lr": Range(1e-4, 1e-2, log=True)}, extend=1)
    assert (
        found.best["lr"] > 5e-3 and found.extensions[0]["side"] == "high"
    )  # the edge: four epochs are few
    best = kept[search.run_name(found.best)]
    assert found.best_score == -best.best_score
    assert search.retrain_epochs(best.history, monitor="val_loss") == best.best_epoch
    assert set(pd.read_csv(tmp_path / "runs.csv")["state"]) <= {"complete", "pruned"}


def test_the_epochs_of_the_final_training():
    nan = math.nan
    history = pd.DataFrame(
        {"epoch": [1, 2, 3, 4], "val_auc": [nan, 0.8, 0.9, 0.9], "val_loss": [0.4, 0.3, 0.3, nan]}
    )
    assert (
        search.retrain_epochs(history) == 3
        and search.retrain_epochs(history, monitor="val_loss") == 2
    )
    with pytest.raises(ValueError, match="no column 'val_f1'.*val_auc, val_loss"):
        search.retrain_epochs(history, monitor="val_f1")
    with pytest.raises(ValueError, match="no epoch with a number in 'val_auc'"):
        search.retrain_epochs(history.head(1))


# ------------------------------------------------------------------ fine-tuning


def finetune(
    run_dir,
    *,
    baseline,
    lrs=(1e-2, 1e-3),
    make_model=linear,
    val_set=True,
    objective=None,
    **options,
):
    options = {
        "epochs": 4,
        "batch_size": 8,
        "progress": False,
        "monitor": "val_accuracy",
        **options,
    }
    return search.finetune_with_drop_rule(
        make_model,
        objective or objectives.cross_entropy(),
        images(),
        images(seed=1) if val_set else None,
        run_dir=run_dir,
        lrs=lrs,
        baseline=baseline,
        **options,
    )


def spoiling(threshold):
    """Cross-entropy that turns round, so that training unlearns, from that call on while the rate is the first."""

    def objective(model, x, y):
        objective.calls += 1
        loss, logits = objectives.cross_entropy()(model, x, y)
        return (-loss if objective.calls > threshold else loss), logits

    objective.calls, objective.settings = 0, {"name": "spoiling"}
    return objective


def same(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_a_gain_without_a_drop_is_kept(tmp_path):
    baseline = {"train_accuracy": 0.4, "val_accuracy": 0.5}
    tuned = finetune(tmp_path, baseline=baseline, lrs=(0.05, 0.005), epochs=8)
    expected = linear()
    fitted = fit(expected, tmp_path / "beside", lr=0.05, epochs=8)
    assert tuned.attempts["outcome"].tolist() == ["gain"] and same(tuned.model, expected)
    assert tuned.fitted.best_score == fitted.best_score == tuned.attempts["val_accuracy"][0] > 0.5
    assert tuned.attempts["baseline_val_accuracy"].tolist() == [0.5]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "attempts.csv"), tuned.attempts)


def test_a_fall_of_the_training_reloads_the_weights_and_lowers_the_rate(tmp_path):
    """The first attempt unlearns from its fourth epoch on (three batches an epoch); the second is spared."""
    made = []

    def make_model():
        made.append(linear())
        objective.calls = 0 if len(made) == 1 else -1000
        return made[-1]

    objective = spoiling(9)
    options = {"lrs": (0.2, 0.02), "epochs": 12, "make_model": make_model, "objective": objective}
    tuned = finetune(tmp_path, baseline={"train_accuracy": 0.3, "val_accuracy": 0.5}, **options)
    assert tuned.attempts["outcome"].tolist() == ["drop", "gain"] and tuned.attempts[
        "lr"
    ].tolist() == [0.2, 0.02]
    first = pd.read_csv(tmp_path / "attempt1" / "metrics.csv")["train_accuracy"]
    assert 4 <= len(first) == tuned.attempts["epochs"][0] < 12
    assert (
        first.iloc[-1] < first.iloc[:-1].max() - 0.02
        and (first.cummax() - first).iloc[:-1].max() <= 0.02
    )
    expected = linear()
    fit(
        expected, tmp_path / "beside", lr=0.02, epochs=12
    )  # from the start model, not from the spoilt one
    assert same(tuned.model, expected) and tuned.model is made[1]


def test_without_a_gain_or_with_nothing_but_falls_the_start_model_is_kept(tmp_path):
    perfect = {"train_accuracy": 0.1, "val_accuracy": 1.0}
    tuned = finetune(tmp_path / "a", baseline=perfect)
    assert tuned.attempts["outcome"].tolist() == ["no gain"]  # a smaller rate has nothing to mend
    assert tuned.fitted is None and same(tuned.model, linear()) and not tuned.model.training
    tuned = finetune(
        tmp_path / "b",
        baseline={"train_accuracy": 1.0, "val_accuracy": 0.0},
        lrs=(1e-4, 1e-5, 1e-6),
    )
    assert (
        tuned.attempts["outcome"].tolist() == ["drop"] * 3
        and tuned.attempts["epochs"].tolist() == [1] * 3
    )
    assert tuned.fitted is None and same(tuned.model, linear())


def test_a_smaller_loss_is_a_gain_and_a_loss_that_is_no_number_a_fall(tmp_path):
    start = {"train_accuracy": 0.0, "val_loss": 5.0}
    assert finetune(tmp_path / "a", baseline=start, monitor="val_loss").attempts[
        "outcome"
    ].tolist() == ["gain"]
    start["val_loss"] = 0.0
    assert finetune(tmp_path / "b", baseline=start, monitor="val_loss").attempts[
        "outcome"
    ].tolist() == ["no gain"]

    def broken(model, x, y):
        loss, logits = objectives.cross_entropy()(model, x, y)
        return loss * math.nan, logits

    tuned = finetune(tmp_path / "c", baseline=start, monitor="val_loss", objective=broken)
    assert tuned.attempts["outcome"].tolist() == ["diverged"] * 2 and tuned.attempts[
        "epochs"
    ].tolist() == [0, 0]


def test_without_validation_the_training_decides(tmp_path):
    options = {"monitor": "train_accuracy", "val_set": False, "epochs": 8, "lrs": (0.05, 0.01)}
    tuned = finetune(tmp_path / "a", baseline={"train_accuracy": 0.4}, **options)
    assert tuned.attempts["outcome"].tolist() == ["gain"] and "val_loss" not in tuned.fitted.history
    tuned = finetune(tmp_path / "b", baseline={"train_accuracy": 1.0}, tolerance=1.0, **options)
    assert tuned.attempts["outcome"].tolist() == ["no gain"]
    with pytest.raises(ValueError, match="give a val_set"):
        finetune(
            tmp_path / "c",
            baseline={"train_accuracy": 0.5, "val_auc": 0.5},
            **options | {"monitor": "val_auc"},
        )


def test_fine_tuning_goes_on_where_it_was_ended(tmp_path):
    options = {"baseline": {"train_accuracy": 0.0, "val_accuracy": 0.0}, "lrs": (0.05, 0.01)}
    with pytest.raises(study.OutOfTime, match="attempt 1 stopped after 1 of . epochs"):
        finetune(tmp_path / "a", max_minutes=1e-9, **options)
    resumed, straight = finetune(tmp_path / "a", **options), finetune(tmp_path / "b", **options)
    assert same(resumed.model, straight.model)
    pd.testing.assert_frame_equal(resumed.attempts, straight.attempts)
    again = finetune(tmp_path / "a", objective=spoiling(0), **options | {"resume": "force"})
    assert same(again.model, straight.model)  # nothing was trained again
    # A fall that was found before the kill is found again, without training.
    options["baseline"] = {"train_accuracy": 1.0, "val_accuracy": 0.0}
    first = finetune(tmp_path / "c", **options)
    again = finetune(tmp_path / "c", **options)
    pd.testing.assert_frame_equal(first.attempts, again.attempts)
    assert len(pd.read_csv(tmp_path / "c" / "attempt1" / "metrics.csv")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrs": ()}, "falling rates"),
        ({"lrs": (1e-4, 1e-4)}, "falling rates"),
        ({"baseline": {"val_accuracy": 0.5}}, "'train_accuracy' as a number"),
        (
            {"baseline": {"train_accuracy": 0.5, "val_accuracy": math.nan}},
            "'val_accuracy' as a number",
        ),
        ({"tolerance": -0.1}, "tolerance"),
    ],
)
def test_unusable_fine_tuning_is_refused_before_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        finetune(
            tmp_path / "new", **{"baseline": {"train_accuracy": 0.5, "val_accuracy": 0.5}} | options
        )
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------ figure and table


@dataclass
class FakeConfig:
    """The fields of a Config that a figure reads."""

    run_dir: Path = Path()
    size: int = 48
    profile: str = "smoke"
    data_name: str = "covid (SYNTHETIC)"
    caption: str = "covid (SYNTHETIC), smoke profile, 48 px"
    settings: dict = field(default_factory=dict)


RUNS = pd.DataFrame(
    {
        "number": range(6),
        "lr": [1e-4, 1e-3, 1e-2, 1e-3, 0.1, 0.2],
        "norm": ["a", "b", "a", "b", "a", "b"],
        "score": [0.5, 0.7, 0.8, 0.6, 0.9, math.nan],
        "auc": 0.5,
        "extension": [0, 0, 0, 0, 1, 1],
        "state": ["complete", "complete", "complete", "pruned", "complete", "diverged"],
        "epochs": 3,
        "seconds": 1.0,
    }
)


def test_the_figure_shows_each_run_at_its_place_and_state(tmp_path):
    figure = search.figure_search(RUNS, FakeConfig().caption)
    lr, norm = [axis for axis in figure.axes if axis.get_xlabel()]
    assert (lr.get_xlabel(), norm.get_xlabel(), lr.get_xscale(), norm.get_xscale()) == (
        "lr",
        "norm",
        "log",
        "linear",
    )
    *points, star = lr.collections
    places = [tuple(point.get_offsets()[0]) for point in points]
    assert places == list(zip(RUNS["lr"][:5], RUNS["score"][:5], strict=True))
    assert [len(point.get_facecolors()) for point in points] == [
        1,
        1,
        1,
        0,
        1,
    ]  # the pruned one is hollow
    assert [to_hex(point.get_edgecolors()[0]) for point in points] == [COLORS[0]] * 4 + [COLORS[1]]
    assert tuple(star.get_offsets()[0]) == (0.1, 0.9)
    assert [label.get_text() for label in norm.get_xticklabels()] == ["a", "b"]
    assert "6 runs, 1 without a score; covid (SYNTHETIC)" in figure.get_suptitle()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["complete", "pruned", "best", "ranges as asked", "extension 1"]
    small = search.figure_search(RUNS, FakeConfig().caption, direction="minimize")
    assert tuple(small.axes[0].collections[-1].get_offsets()[0]) == (1e-4, 0.5)


def test_the_best_runs_are_complete_ones():
    assert search.top_runs(RUNS, count=2)["number"].tolist() == [4, 2]
    assert search.top_runs(RUNS, count=2, direction="minimize")["number"].tolist() == [0, 1]
