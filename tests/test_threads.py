"""The number of CPU threads: what is asked for, what is measured, and no trace of measuring."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlia_utils import threads

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """An answer of its own for each test, and the threads as they were."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads.choose.cache_clear()
    yield
    threads.choose.cache_clear()
    torch.set_num_threads(before)


@pytest.fixture
def measured(monkeypatch):
    """Set what the measurement finds; the list counts its calls."""
    calls = []

    def set_ratio(ratio):
        monkeypatch.setattr(threads, "slowdown", lambda most: calls.append(most) or ratio)
        return calls

    return set_ratio


def test_what_the_environment_asks_for_is_honoured_unmeasured(monkeypatch, measured):
    calls = measured(5.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    assert threads.choose() == (2, "OMP_NUM_THREADS=2")
    assert not calls and torch.get_num_threads() == 2


def test_one_thread_is_not_measured(measured):
    calls = measured(5.0)
    torch.set_num_threads(1)
    assert threads.choose() == (1, "1 CPU thread") and not calls


def test_with_a_gpu_nothing_changes(monkeypatch, measured):
    calls = measured(5.0)
    torch.set_num_threads(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert threads.choose() == (2, "") and not calls


@pytest.mark.parametrize(("ratio", "number"), [(0.7, 2), (0.95, 1), (3.2, 1)])
def test_all_threads_are_kept_when_they_are_faster(measured, ratio, number):
    calls = measured(ratio)
    torch.set_num_threads(2)
    chosen, note = threads.choose()
    assert chosen == torch.get_num_threads() == number
    assert note.startswith("2 CPU threads" if number == 2 else "1 of 2 CPU threads")
    assert threads.choose() == (chosen, note) and calls == [2], "measured once a process"


def test_measuring_leaves_random_numbers_and_threads_as_they_were(monkeypatch):
    monkeypatch.setattr(threads, "SECONDS", 0.01)
    torch.set_num_threads(2)
    state, grad = torch.get_rng_state(), torch.is_grad_enabled()
    with torch.no_grad():  # whoever calls it may have switched gradients off
        assert threads.slowdown(2) > 0
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled() == grad
    assert torch.get_num_threads() == 2


def test_a_new_process_chooses_for_itself():
    code = "import torch; from dlia_utils import threads as t; print(t.choose()[0] == torch.get_num_threads())"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True\n"
