"""Jobs side by side, one device each; a failure is told with the end of its log."""

import os
import signal
import threading
import time

import psutil
import pytest

from dlia_utils import launch


def test_functions_of_a_notebook_run_side_by_side_and_give_their_results_back(
    tmp_path, monkeypatch
):
    factor = 3  # a closure, as a notebook cell makes them

    def job(name):
        import os

        print("hello from", name)
        keys = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
        return [factor * len(name), os.getpid(), *(os.environ[key] for key in keys)]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    names, logs = ["/", "bb", "..\xfc"], tmp_path / "logs"
    results = launch.each(job, names, log_dir=logs, devices=["", "-1"])
    values, processes, devices, threads = zip(*results.values(), strict=True)
    assert list(results) == names and values == (3, 6, 9)
    assert len({*processes, os.getpid()}) == 4
    assert {*devices} == {"", "-1"} and {*threads} == {"3"}
    assert "hello from bb" in (logs / "bb.log").read_text()
    assert len(list(logs.iterdir())) == 3 and list(tmp_path.iterdir()) == [logs]


def test_with_one_device_or_one_job_it_is_a_loop_in_this_process(tmp_path):
    for devices, names in ((["0"], ["a", "b"]), (["0", "1"], ["a"])):
        told = launch.each(lambda name: os.getpid(), names, log_dir=tmp_path, devices=devices)
        assert told == dict.fromkeys(names, os.getpid())
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_job_is_told_when_the_others_are_done(tmp_path):
    def job(name):
        print("fine" if name != "bad" else 1 / 0)

        return name

    cost = {"bad": 1, "good": 2, "last": 0}.get
    said = r"bad ended with status 1(?s:.*)ZeroDivisionError(?s:.*)the next time: last, good"
    with pytest.raises(launch.JobsFailed, match=said) as failed:
        names = ["bad", "last", "good"]
        launch.each(job, names, log_dir=tmp_path, devices=["", ""], cost=cost)
    assert failed.value.results == {"last": "last", "good": "good"}
    logs = sorted(tmp_path.glob("*.log"), key=lambda path: path.stat().st_mtime_ns)
    assert logs[-1].stem == "last" and (tmp_path / "good.log").read_text().strip() == "fine"


def test_an_interrupt_stops_what_runs(tmp_path):
    def job(name):
        import time

        time.sleep(3600)

    def interrupt():
        while not list(tmp_path.glob("*.log")):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    def jobs():
        return [one for one in psutil.Process().children() if "dlia_utils.launch" in one.cmdline()]

    # Where tests run in a shell's background an interrupt is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            launch.each(job, ["a", "b", "c"], log_dir=tmp_path, devices=["", ""])
    finally:
        signal.signal(signal.SIGINT, before)
    assert not jobs()
