"""The search finds known optima, widens ranges and survives kills."""

import contextlib
import math
import os
import re
import signal
import sqlite3
import traceback
from pathlib import Path

import optuna
import pandas as pd
import pytest
from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import event
from sqlalchemy.engine import Engine

from dlia_utils import search
from dlia_utils.search import Choice, Range


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    """A killed process loses nothing that it wrote; only a power cut would."""

    def connected(connection, _):
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", connected)
    yield
    event.remove(Engine, "connect", connected)


SAME = "x batch score state epochs extension".split()  # all of a run but the clock
SPACE = {"x": Range(0.0, 1.0), "batch": Choice((16, 32, 64))}


def peak(x, at):
    return 1 - (x - at) ** 2


def two(params, report):
    """Best at x = 1.6, beyond the range of `SPACE`, and batch = 32."""
    score = peak(params["x"], 1.6)
    report(1, score)
    return {"score": score - 0.1 * abs(math.log2(params["batch"] / 32)), "auc": 0.5}


def run(folder, objective=two, space=SPACE, **options):
    return search.search(objective, space, **{"folder": folder, "trials": 4, "seed": 3} | options)


def along_x(at):
    return lambda params, report: {"score": peak(params["x"], at)}


def test_a_best_value_on_the_edge_extends_the_range_until_it_lies_inside(tmp_path):
    found = run(tmp_path, along_x(2.0), {"x": Range(0.0, 1.0)}, trials=6)
    assert found.best["x"] == pytest.approx(2.0, abs=0.2)
    assert found.best_score == found.runs["score"].max()
    first = found.runs[found.runs["extension"] == 0]
    assert len(first) == 6 and first["x"].max() <= 1
    # 1 grows by half of the width of 1, then of 1.5; middle and end of the new part come first.
    assert [entry["after"] for entry in found.extensions[:2]] == ["0 to 1.5", "0 to 2.25"]
    for number, probes in ((1, [1.25, 1.5]), (2, [1.875, 2.25])):
        part = found.runs[found.runs["extension"] == number]
        assert len(part) == 3 and part["x"].iloc[:2].tolist() == probes
    only, written = found.ranges.iloc[0], pd.read_csv(tmp_path / "extensions.csv")
    assert only["edge"] == "" and only["asked"] == "0 to 1"
    assert only["extensions"] == len(found.extensions) == len(written)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "runs.csv"), found.runs)
    assert list(found.runs) == "number x score state epochs seconds extension".split()
    inside = run(tmp_path / "inside", along_x(0.5), {"x": Range(0.0, 1.0)}, trials=6)
    assert inside.extensions == [] and len(inside.runs) == 6
    with pytest.raises(ValueError, match="low must be below high"):
        Range(0.0, 1.0, log=True)


def test_the_hard_limit_holds_and_the_smallest_score_wins_when_asked(tmp_path):
    def loss(params, report):
        return {"score": (math.log10(params["lr"]) + 6) ** 2}

    space = {"lr": Range(1e-3, 1e-1, log=True, hard=(1e-5, None))}
    found = run(tmp_path, loss, space, direction="minimize", extend=5)
    after = [entry["after"] for entry in found.extensions]
    assert after == ["0.0001 to 0.1 (log)", "1e-05 to 0.1 (log)"]
    assert found.runs["lr"].min() >= 1e-5 and found.best_score == found.runs["score"].min()
    assert found.ranges["edge"].tolist() == ["low: nothing allowed beyond"]


def test_choices_grow_by_one_value(tmp_path):
    space = {"batch": Choice((16, 32), beyond=((8,), (64, 128)))}
    found = run(tmp_path / "a", lambda params, report: {"score": params["batch"]}, space)
    assert [entry["after"] for entry in found.extensions] == ["16, 32, 64", "16, 32, 64, 128"]
    assert found.best == {"batch": 128}
    assert found.ranges["edge"].tolist() == ["high: nothing allowed beyond"]
    one = run(tmp_path / "b", lambda params, report: {"score": params["batch"]}, space, extend=1)
    assert one.ranges["edge"].tolist() == ["high: no extension left"]


@pytest.mark.parametrize(
    ("part", "side", "grown", "tried"),
    [
        (Range(-1.0, 1.0), "low", (-2.0, 1.0), [-1.5, -2]),
        (Range(0.0, 0.5), "low", None, None),  # a share does not become negative
        (Range(0.0, 0.5, hard=(0, 0.6)), "high", (0.0, 0.6), [0.55, 0.6]),
        (Range(1e-4, 1e-2, log=True), "low", (1e-5, 1e-2), [10**-4.5, 1e-5]),
        (Range(1e-4, 1e-2, log=True, hard=(None, 0.03)), "high", (1e-4, 0.03), [3e-4**0.5, 0.03]),
    ],
)
def test_what_a_range_grows_to(part, side, grown, tried):
    made = part.widen(side)
    assert (made and (made[0].low, made[0].high)) == (grown and pytest.approx(grown, rel=1e-6))
    assert made is None or made[1] == pytest.approx(tried)


@pytest.mark.parametrize(
    ("part", "value", "edge"),
    [
        (Range(0.0, 1.0), 0.1, "low"),
        (Range(0.0, 1.0), 0.91, "high"),
        (Range(1e-4, 1e-2, log=True), 1.5e-4, "low"),
        (Range(1e-4, 1e-2, log=True), 2e-4, ""),  # linear: both low
        (Choice("abc", beyond=("", "d")), 2, "high"),
        (Choice("abc", beyond=("z", "")), 1, "low"),
    ],
)
def test_where_the_edges_are(part, value, edge):
    assert part.edge(value) == edge


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
    found = run(tmp_path_factory.mktemp("straight"), extend=1)
    assert len(found.runs) == 6 and found.extensions  # 4, and 2 in the wider range
    return found


def check_same_end(found, straight):
    finished = found.runs[found.runs["state"] != "failed"].reset_index(drop=True)
    pd.testing.assert_frame_equal(finished[SAME], straight.runs[SAME], check_exact=True)
    assert found.best == straight.best and found.extensions == straight.extensions


@pytest.mark.parametrize("breaks", [4, 5])  # one that the sampler chose, the first of the extension
def test_after_an_error_the_next_call_goes_on_to_the_same_end(tmp_path, straight, breaks):
    first, second = Watched(breaks=breaks), Watched()
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, first, extend=1)
    written = pd.read_csv(tmp_path / "runs.csv")
    assert len(written) == breaks and written["state"].iloc[-1] == "failed"
    found = run(tmp_path, second, extend=1)
    assert len(second.calls) == 6 - breaks + 1 and second.calls[0] == first.calls[-1]
    check_same_end(found, straight)
    check_same_end(run(tmp_path, lambda *_: pytest.fail("ran again"), extend=1), straight)


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
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    objective = Watched()
    found = run(tmp_path, objective, extend=1)
    assert len(objective.calls) == 6 - (3 if moment == "in a run" else 4)
    check_same_end(found, straight)


def test_runs_below_the_median_end_early(tmp_path):
    def objective(params, report):
        for epoch in range(1, 5):
            report(epoch, params["x"] * epoch / 4)
        return {"score": params["x"]}

    runs = run(tmp_path, objective, {"x": Range(0.0, 1.0)}, trials=9, extend=0).runs
    pruned, complete = (runs[runs["state"] == state] for state in ("pruned", "complete"))
    assert len(pruned) >= 2 and len(pruned) + len(complete) == 9
    assert pruned["x"].max() < complete["x"].max() and pruned["epochs"].between(2, 3).all()
    assert pruned["score"].tolist() == pytest.approx((pruned["x"] * pruned["epochs"] / 4).tolist())
    assert complete["epochs"].eq(4).all() and runs["state"].iloc[:3].eq("complete").all()


def test_a_diverged_run_is_a_bad_run_and_not_the_end(tmp_path):
    def objective(params, report):
        if params["lr"] > 0.7:
            raise FloatingPointError("the loss is no longer finite")
        return {"score": math.nan if params["lr"] > 0.5 else params["lr"]}

    found = run(tmp_path / "a", objective, {"lr": Range(0.0, 1.0)}, trials=9, extend=0)
    bad = found.runs["lr"] > 0.5
    assert found.runs["state"].eq("diverged").equals(bad) and bad.sum() >= 2
    assert found.runs["score"].isna().equals(bad) and found.best["lr"] <= 0.5
    with pytest.raises(ValueError, match="no run of the search completed"):
        run(tmp_path / "b", objective, {"lr": Range(0.8, 1.0)}, trials=2)


def test_a_search_of_another_kind_or_in_use_is_refused_a_longer_one_goes_on(tmp_path):
    options = {"config": {"split": "abc"}, "objective": along_x(9.0)}
    found = run(tmp_path, extend=1, **options)
    for changed, message in [
        ({"space": SPACE | {"x": Range(0.0, 2.0)}}, "space.*resume=False"),
        ({"config": {"split": "abd"}}, "config"),
        ({"seed": 4, "trials": 3}, "trials, seed"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tmp_path, **{**options, "extend": 1, **changed})
    with FileLock(tmp_path / "search.lock"), pytest.raises(RuntimeError, match="another process"):
        run(tmp_path, **options)
    longer = run(tmp_path, extend=3, **options)
    assert len(longer.extensions) == 3 and longer.extensions[:1] == found.extensions
    pd.testing.assert_frame_equal(longer.runs.iloc[: len(found.runs)], found.runs)
    anew = run(tmp_path, extend=0, trials=3, resume=False)
    assert len(anew.runs) == 3 and not (tmp_path / "extensions.csv").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Windows lacks")
def test_two_workers_share_a_search_as_the_page_on_running_shows(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "running.md").read_text(encoding="utf-8")
    (worker,) = (
        part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "optuna" in part
    )
    worker = worker.replace("runs/search.journal", f"{tmp_path}/search.journal")
    begun = []
    for _ in range(2):  # forked: the imports are done once
        begun.append(os.fork())
        if not begun[-1]:
            try:
                exec(worker, {"__name__": "worker"})
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
    assert [os.waitpid(one, 0)[1] for one in begun] == [0, 0]
    storage = JournalStorage(JournalFileBackend(f"{tmp_path}/search.journal"))
    trials = optuna.load_study(storage=storage, study_name="search").trials_dataframe()
    assert 24 <= (trials["state"] == "COMPLETE").sum() <= 25
    assert trials["datetime_start"].iloc[1] < trials["datetime_complete"].iloc[-1]
    assert trials["params_lr"].between(1e-4, 1e-1).all()


def test_the_best_runs_are_complete_ones():
    runs = pd.DataFrame({"score": [0.5, 0.7, 0.8, 0.6, 0.9, math.nan]})
    runs["state"] = ["complete"] * 3 + ["pruned", "complete", "diverged"]
    assert search.top_runs(runs, count=2).index.tolist() == [4, 2]
    assert search.top_runs(runs, count=2, direction="minimize").index.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["a?b", "100 % #2", "{x}", "\xfc 'q'"])
def test_a_search_lies_in_its_folder_whatever_its_name(tmp_path, name):
    run(tmp_path / name, along_x(0.5), trials=2, extend=0)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "search.sqlite").stat().st_size > 0
    run(tmp_path / name, lambda *_: pytest.fail("ran again"), trials=2, extend=0)


def foreign(path):
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE people (name)")


def scrambled(path):
    raw = bytearray(path.read_bytes())
    for page in range(4096, len(raw) - 4096, 8192):
        raw[page : page + 40] = bytes(range(40))
    path.write_bytes(raw)


BASES = {
    "empty": lambda path: path.write_bytes(b""),
    "a web page": lambda path: path.write_bytes(b"<!DOCTYPE html>" * 999),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "pages of random bytes": scrambled,
    "of another program": foreign,
}


@pytest.mark.parametrize("harm", BASES)
def test_a_damaged_data_base_is_named_with_the_fix(tmp_path, harm):
    run(tmp_path, along_x(0.5), trials=2, extend=0)
    BASES[harm](tmp_path / "search.sqlite")
    with pytest.raises(ValueError, match=r"search.sqlite is damaged.*delete it, or pass resume"):
        run(tmp_path, along_x(0.5), trials=2, extend=0)
    (tmp_path / "search.sqlite").unlink()  # which the message names
    assert len(run(tmp_path, along_x(0.5), trials=2, extend=0).runs) == 2


LIMITS = {
    "max_page_count = 40": "no space left in .*: make room",
    "query_only = 1": "cannot be read and written .*nothing is lost",
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_full_disk_or_a_locked_file_is_never_advised_to_be_deleted(tmp_path, monkeypatch, limit):
    whole = run(tmp_path / "whole", trials=5, extend=0)
    made, seen, make, folder = [], [], search._storage, tmp_path / "full"
    monkeypatch.setattr(search, "_storage", lambda path: made.append(make(path)) or made[-1])

    def limited(connection, _):
        connection.execute(f"PRAGMA {limit}")

    def objective(params, report):
        seen.append(params)
        if len(seen) == 3:  # what connects from now on meets a full disk
            event.listen(made[0].engine, "connect", limited)
            made[0].engine.dispose()
            return two(params, report) | {"note": "x" * 100_000}
        return two(params, report)

    with pytest.raises(OSError, match=LIMITS[limit]) as told:
        run(folder, objective, trials=5, extend=0)
    assert str(folder) in str(told.value) and "delete" not in str(told.value)
    check_same_end(run(folder, trials=5, extend=0), whole)


def test_a_run_killed_while_it_drew_its_values_leaves_no_row(tmp_path, straight):
    class Killed(Exception):
        pass

    drawn, suggest = [], optuna.Trial.suggest_int

    def die(self, *arguments, **options):
        drawn.append(1)
        if len(drawn) == 3:
            raise Killed
        return suggest(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "suggest_int", die)
        with pytest.raises(Killed):
            run(tmp_path, extend=1)
    assert pd.read_csv(tmp_path / "runs.csv")["batch"].dtype == int
    found = run(tmp_path, extend=1)
    check_same_end(found, straight)
    assert found.runs["batch"].dtype == int
