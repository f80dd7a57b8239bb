"""From one Kaggle session to the next: an earlier run attached as an input is taken up again."""

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
from dlia_utils.data import sources

ROOT = Path(__file__).parents[1]
NOTEBOOK = "01_pneumonia_robustness"
TINY = {"epochs": 4, "per_class": 12, "size": 32, "stages": 2}
LAYOUTS = ("input/my-run", "input/notebooks/me/my-run", "input/datasets/me/my-run")

# The first session: killed from outside in the middle of an epoch, as after Kaggle's twelve hours.
SESSION = f"""
import os, signal, sys
from pathlib import Path
from dlia_utils import objectives, study
from dlia_utils import execute
from dlia_utils.data import sources
sources.KAGGLE = Path(sys.argv[1])
(source,) = execute.pick(["{NOTEBOOK}"])
opened = study.open_study(execute.opened(source, PROFILE="smoke", CHANGES={TINY}))
calls = []
def objective(model, x, y):
    calls.append(1)
    if len(calls) == 6:  # 24 images in batches of 16: in the third epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return objectives.cross_entropy()(model, x, y)
objective.settings = objectives.cross_entropy().settings
study.train_model(opened, "baseline", objective, progress=False)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The runs folder of a session that was killed."""
    place = tmp_path_factory.mktemp("session")
    (place / "kaggle" / "input").mkdir(parents=True)
    new = {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    kept = {name: v for name, v in os.environ.items() if name not in ("DLIA_DATA", "DLIA_RUNS")}
    new |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SESSION, str(place / "kaggle")]
    done = subprocess.run(command, env=kept | new, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return place / "kaggle" / "working" / "runs"


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A session on Kaggle without any input yet."""
    (tmp_path / "kaggle" / "input").mkdir(parents=True)
    monkeypatch.setattr(sources, "KAGGLE", tmp_path / "kaggle")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.delenv("DLIA_DATA", raising=False)
    monkeypatch.delenv("DLIA_RUNS", raising=False)
    return tmp_path / "kaggle"


def attach(runs, mount):
    """The output of a session as a read-only input of the next, whose working folder is empty."""
    shutil.copytree(runs, mount / "runs")
    for path in [mount, *mount.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def train(**changes):
    opened = study.open_study(start_run(NOTEBOOK, **TINY | changes))
    return study.train_model(opened, "baseline", objectives.cross_entropy(), progress=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_session_that_was_cut_off_loses_at_most_one_epoch(killed, kaggle, layout, caplog):
    attach(killed, kaggle / layout)
    result = train()
    assert "continues the run of an earlier session" in caplog.text
    assert result.history["epoch"].tolist() == [1, 2, 3, 4]
    before = pd.read_csv(next(killed.rglob("metrics.csv")))
    assert before["epoch"].tolist() == [1, 2]  # the third, not finished, is all that was lost
    pd.testing.assert_frame_equal(result.history.head(2), before)
    run_dir = start_run(NOTEBOOK, **TINY).run_dir
    assert all(os.stat(path).st_mode & 0o200 for path in [run_dir, *run_dir.rglob("*")])
    assert json.loads((run_dir / "config.json").read_text())["notebook"] == NOTEBOOK


def test_it_ends_as_a_session_that_was_not_cut_off(killed, kaggle):
    straight = train()
    shutil.rmtree(kaggle / "working")
    attach(killed, kaggle / LAYOUTS[0])
    pair = [one.history[["train_loss", "val_loss"]] for one in (straight, train())]
    pd.testing.assert_frame_equal(*pair, check_exact=True)


def test_of_several_earlier_sessions_the_furthest_is_taken(killed, kaggle):
    older = kaggle / "input" / "a-first-version"
    shutil.copytree(killed, older / "runs")
    for path in older.rglob("last.pt"):
        torch.save(torch.load(path, weights_only=True) | {"epoch": 0}, path)
        os.utime(path, (1, 1))
    attach(killed, kaggle / "input" / "notebooks" / "me" / "second-version")
    run_dir = start_run(NOTEBOOK, **TINY).run_dir
    assert torch.load(run_dir / "baseline" / "last.pt", weights_only=True)["epoch"] == 2


def test_a_run_of_other_settings_is_not_continued(killed, kaggle, caplog):
    attach(killed, kaggle / "input" / "my-run")
    name = next((kaggle / "input").rglob("config.json")).parent.name
    for options in ({}, {"name": name}):
        run_dir = start_run(NOTEBOOK, **options, **TINY | {"epochs": 5}).run_dir
        assert not (run_dir / "baseline").exists()
    assert "has other settings: it is not continued" in caplog.text
    run_dir = start_run(NOTEBOOK, resume=False, **TINY).run_dir
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.json", "env.json"]


def test_what_a_changed_setting_does_not_touch_is_taken_from_an_attached_run(
    killed, kaggle, caplog
):
    attach(killed, kaggle / "input" / "my-run")
    caplog.set_level("INFO")
    assert len(train(bootstrap_draws=50).history) == 4
    assert "baseline is taken over from the run smoke-synthetic" in caplog.text
    assert "resumed after epoch 2 of 4" in caplog.text
