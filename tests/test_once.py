"""The test split is opened once for a purpose; reading stored predictions back is no opening."""

import pandas as pd
import pytest
import torch
from small import start_run

from dlia_utils import models, once, study, train

NOTEBOOK = "06_covid_baseline"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLIA_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.delenv("DLIA_DATA", raising=False)
        yield study.open_study(start_run(NOTEBOOK, per_class=24, size=32))


@pytest.fixture
def fresh(opened):
    """The run folder without a log, stored predictions or models."""
    for path in [opened.run.run_dir / "test_log.csv", *opened.run.run_dir.glob("tables/*")]:
        path.unlink(missing_ok=True)
    keep_model(opened, "baseline", seed=0)
    return opened


def keep_model(opened, name, *, seed):
    model = models.cnn(channels=(4, 4), hidden=8, seed=seed)
    models.save(model, opened.run.run_dir / name / "best.pt", meta={})
    return model.eval()


def log(opened):
    path = opened.run.run_dir / "test_log.csv"
    return pd.read_csv(path)["purpose"].tolist() if path.exists() else []


def test_a_second_opening_is_refused_and_a_forced_one_is_logged_as_such(fresh):
    assert once.open_test(fresh, "final test")["purpose"].tolist() == ["final test"]
    once.open_test(fresh, "final test of another model")
    with pytest.raises(once.AlreadyOpened, match=r"'final test' at 20\d\d-.*force=True"):
        once.open_test(fresh, "final test")
    assert log(fresh) == ["final test", "final test of another model"], "a refusal opens nothing"
    once.open_test(fresh, "final test", force=True)
    assert log(fresh)[-1] == "final test (AGAIN, forced)"
    with pytest.raises(once.AlreadyOpened):
        once.open_test(fresh, "final test")


def test_force_where_nothing_was_opened_is_an_ordinary_opening(fresh):
    once.open_test(fresh, "final test", force=True)
    assert log(fresh) == ["final test"]
    with pytest.raises(ValueError, match="purpose is empty"):
        once.open_test(fresh, " ")


def test_other_openings_do_not_count(fresh):
    study.test_opened(fresh, "exploration")
    once.open_test(fresh, "final test")
    assert log(fresh) == ["exploration", "final test"]


def test_predictions_are_those_of_the_model_on_the_test_films_and_are_read_back(fresh, monkeypatch):
    told = once.predictions(fresh, "baseline")
    rows = fresh.rows("test")
    model = models.cnn(channels=(4, 4), hidden=8, seed=0).eval()
    with torch.no_grad():
        expected = model(fresh.images(rows)).double().softmax(1)[:, 1]
    assert told["image"].tolist() == rows.tolist()
    assert told["probability"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    assert told["label"].tolist() == fresh.labels(rows).tolist()
    assert told["path"].tolist() == fresh.dataset.manifest["path"][rows].tolist()
    monkeypatch.setattr(train, "predict", lambda *_: pytest.fail("the test films were read again"))
    pd.testing.assert_frame_equal(once.predictions(fresh, "baseline"), told)
    assert log(fresh) == ["final test of baseline"]


def test_another_training_after_the_test_is_refused_and_can_be_forced(fresh):
    first = once.predictions(fresh, "baseline")
    keep_model(fresh, "baseline", seed=1)
    with pytest.raises(once.AlreadyOpened):
        once.predictions(fresh, "baseline")
    second = once.predictions(fresh, "baseline", force=True)
    assert second["weights"].iloc[0] != first["weights"].iloc[0]
    assert log(fresh) == ["final test of baseline", "final test of baseline (AGAIN, forced)"]
    pd.testing.assert_frame_equal(once.predictions(fresh, "baseline"), second)


def test_a_run_that_was_cut_off_between_opening_and_answers_must_be_forced(fresh, monkeypatch):
    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "predict", cut_off)
        once.predictions(fresh, "baseline")
    with pytest.raises(once.AlreadyOpened):
        once.predictions(fresh, "baseline")
    assert len(once.predictions(fresh, "baseline", force=True)) == len(fresh.rows("test"))


def test_a_model_that_was_not_trained_opens_nothing(fresh):
    with pytest.raises(FileNotFoundError, match="'nobody' is not in"):
        once.predictions(fresh, "nobody")
    assert log(fresh) == []
