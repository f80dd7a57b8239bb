"""Jobs in slots: all run, each in its slot's environment, and a failure is told with the end of its log."""

import os
import sys
import time

import pytest

from dlia_utils import launch


def say(text):
    return [sys.executable, "-c", f"import os, time; print({text}); time.sleep(0.3)"]


def test_jobs_run_side_by_side_in_their_slots(tmp_path):
    slots = [{"SLOT": "0"}, {"SLOT": "1"}]
    status = launch.run(
        {name: say("os.environ['SLOT']") for name in "abc"},
        slots=slots,
        log_dir=tmp_path,
        progress=False,
    )
    assert status == {"a": 0, "b": 0, "c": 0}
    logs = {path.stem: path.read_text().strip() for path in tmp_path.glob("*.log")}
    assert logs["a"] == "0" and logs["b"] == "1" and logs["c"] in ("0", "1")


def test_a_failed_job_is_told_when_the_others_are_done(tmp_path):
    jobs = {
        "bad": [sys.executable, "-c", "raise SystemExit('no such fold')"],
        "good": say("'fine'"),
    }
    with pytest.raises(RuntimeError, match=r"bad ended with status 1(?s:.*)no such fold"):
        launch.run(jobs, slots=[{}], log_dir=tmp_path, progress=False)
    assert (tmp_path / "good.log").read_text().strip() == "fine"


def test_an_interrupt_stops_what_runs(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.time, "sleep", interrupted)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch.run(
            {"long": [sys.executable, "-c", "import time; time.sleep(60)"]},
            slots=[{}],
            log_dir=tmp_path,
            progress=False,
        )
    assert time.monotonic() - begun < 30


def test_no_slot_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="slots is empty"):
        launch.run({}, slots=[], log_dir=tmp_path)


def test_functions_of_a_notebook_run_side_by_side_and_give_their_results_back(
    tmp_path, monkeypatch
):
    factor = 3  # a closure, as a notebook cell makes them

    def job(name):
        import os

        print("hello from", name)
        return {
            "device": os.environ["CUDA_VISIBLE_DEVICES"],
            "pid": os.getpid(),
            "value": factor * len(name),
            "threads": os.environ["OMP_NUM_THREADS"],
        }

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    results = launch.each(
        job, ["a", "bb", "ccc"], log_dir=tmp_path, devices=["", "-1"], progress=False
    )
    assert list(results) == ["a", "bb", "ccc"] and [r["value"] for r in results.values()] == [
        3,
        6,
        9,
    ]
    assert len({r["pid"] for r in results.values()} | {os.getpid()}) == 4
    assert {r["device"] for r in results.values()} == {"", "-1"}
    assert {r["threads"] for r in results.values()} == {"3"}
    assert "hello from bb" in (tmp_path / "bb.log").read_text()


def test_with_one_device_or_one_job_it_is_a_loop_in_this_process(tmp_path):
    for devices, names in ((["0"], ["a", "b"]), (["0", "1"], ["a"])):
        assert launch.each(
            lambda name: os.getpid(), names, log_dir=tmp_path, devices=devices
        ) == dict.fromkeys(names, os.getpid())
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_job_is_told_with_its_traceback(tmp_path):
    def job(name):
        return 1 / (name != "bad")

    with pytest.raises(RuntimeError, match=r"bad ended with status 1(?s:.*)ZeroDivisionError"):
        launch.each(job, ["good", "bad"], log_dir=tmp_path, devices=["", ""], progress=False)
