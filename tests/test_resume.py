"""From one Kaggle session to the next: an earlier run attached as an input is taken up where it was cut off."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from small import start_run

from dlia_utils import objectives, study

ROOT = Path(__file__).parents[1]
NOTEBOOK = "01_pneumonia_robustness"
TINY = {"epochs": 4, "per_class": 12, "size": 32, "stages": 2}
LAYOUTS = ("input/my-run", "input/notebooks/me/my-run", "input/datasets/me/my-run")


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A session on Kaggle without any input yet."""
    (tmp_path / "kaggle" / "input").mkdir(parents=True)
    monkeypatch.setenv("DLIA_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.delenv("DLIA_DATA", raising=False)
    monkeypatch.delenv("DLIA_RUNS", raising=False)
    return tmp_path / "kaggle"


def train(**options):
    opened = study.open_study(start_run(NOTEBOOK, **TINY))
    return study.train_model(
        opened, "baseline", objectives.cross_entropy(), progress=False, **options
    )


# The first session: killed from outside, as at the end of Kaggle's twelve hours, in the middle of an epoch.
SESSION = """
import os, signal, sys
from dlia_utils import objectives, study
from tools import notebooks
(source,) = execute.pick(["{notebook}"])
opened = study.open_study(execute.opened(source, PROFILE="smoke", CHANGES={tiny}))
calls = 0
def objective(model, x, y):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return objectives.cross_entropy()(model, x, y)
objective.settings = objectives.cross_entropy().settings
study.train_model(opened, "baseline", objective, progress=False)
"""


def killed_session(kaggle, call):
    code = SESSION.format(notebook=NOTEBOOK, tiny=TINY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(call)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return kaggle / "working" / "runs"


def attach(runs, mount):
    """The output of a session becomes a read-only input of the next, whose working folder is empty."""
    mount.mkdir(parents=True)
    shutil.move(runs, mount / "runs")
    for path in [mount, *mount.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_session_that_was_cut_off_loses_at_most_one_epoch(kaggle, layout, caplog):
    # 24 images in batches of 16: two batches an epoch; the kill comes in the third epoch.
    attach(killed_session(kaggle, call=6), kaggle / layout)
    result = train()
    assert "continues the run of an earlier session" in caplog.text
    assert result.status == "done" and result.history["epoch"].tolist() == [1, 2, 3, 4]
    before = pd.read_csv(next((kaggle / layout).rglob("metrics.csv")))
    assert before["epoch"].tolist() == [1, 2]  # the third, not finished, is all that was lost
    pd.testing.assert_frame_equal(result.history.head(2), before)

    shutil.rmtree(kaggle / "working")
    shutil.rmtree(kaggle / "input")
    (kaggle / "input").mkdir()
    straight = train()
    columns = ["train_loss", "val_loss"]
    pd.testing.assert_frame_equal(
        result.history[columns], straight.history[columns], check_exact=True
    )


def test_of_several_earlier_sessions_the_furthest_is_taken(kaggle):
    runs = killed_session(kaggle, call=6)
    older = kaggle / "input" / "a-first-version"
    shutil.copytree(runs, older / "runs")
    for path in older.rglob("last.pt"):
        os.utime(path, (1, 1))
        saved = torch.load(path, weights_only=True)
        torch.save(saved | {"epoch": 0}, path)
        os.utime(path, (1, 1))
    attach(runs, kaggle / "input" / "notebooks" / "me" / "second-version")
    run_dir = start_run(NOTEBOOK, **TINY).run_dir
    assert torch.load(run_dir / "baseline" / "last.pt", weights_only=True)["epoch"] == 2


def test_a_run_of_other_settings_is_not_continued(kaggle, caplog):
    attach(killed_session(kaggle, call=6), kaggle / "input" / "my-run")
    run_dir = start_run(NOTEBOOK, **TINY | {"epochs": 5}).run_dir
    assert not (run_dir / "baseline").exists()
    named = start_run(NOTEBOOK, name=attached_name(kaggle), **TINY | {"epochs": 5}).run_dir
    assert (
        "has other settings: it is not continued" in caplog.text
        and not (named / "baseline").exists()
    )


def attached_name(kaggle):
    return next((kaggle / "input").rglob("config.json")).parent.name


def test_what_a_changed_setting_does_not_touch_is_taken_from_an_attached_run(kaggle, caplog):
    attach(killed_session(kaggle, call=6), kaggle / "input" / "my-run")
    caplog.set_level("INFO")
    opened = study.open_study(start_run(NOTEBOOK, **TINY, bootstrap_draws=50))
    result = study.train_model(opened, "baseline", objectives.cross_entropy(), progress=False)
    assert "baseline is taken over from the run smoke-synthetic" in caplog.text
    assert "resumed after epoch 2 of 4" in caplog.text and len(result.history) == 4


def test_resume_false_leaves_an_attached_run_alone(kaggle):
    attach(killed_session(kaggle, call=6), kaggle / "input" / "my-run")
    run_dir = start_run(NOTEBOOK, resume=False, **TINY).run_dir
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.json", "env.json"]


def test_what_was_imported_can_be_written(kaggle):
    attach(killed_session(kaggle, call=6), kaggle / "input" / "my-run")
    run_dir = start_run(NOTEBOOK, **TINY).run_dir
    assert all(os.stat(path).st_mode & 0o200 for path in [run_dir, *run_dir.rglob("*")])
    assert json.loads((run_dir / "config.json").read_text())["notebook"] == NOTEBOOK
    assert not list(run_dir.parent.glob(".import-*"))
