"""Profiles, run folders and the refusal to mix two configurations."""

import json
import pickle

import pytest

from dlia_utils import config as dlia_config
from dlia_utils import locate

NOTEBOOK = "01_pneumonia_robustness"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("DLIA_PROFILE", raising=False)
    monkeypatch.delenv("DLIA_DATA", raising=False)
    real = tmp_path / "real"
    real.mkdir()
    monkeypatch.setattr(
        locate, "find",
        lambda dataset, data_dir=None, **_: locate.Location(dataset, real, "argument", synthetic=not data_dir),
    )  # fmt: skip
    monkeypatch.setattr(dlia_config, "pick_device", lambda: ("cpu", "no GPU"))


def test_auto_without_gpu_is_smoke_and_says_why():
    config = dlia_config.resolve(NOTEBOOK)
    assert config.profile == "smoke" and "no GPU" in config.reason
    assert "SYNTHETIC" in config.banner() and "SMOKE" in config.banner()
    assert config.run_dir.name == "smoke-synthetic"


def test_auto_with_gpu_and_real_data_is_full(monkeypatch):
    monkeypatch.setattr(dlia_config, "pick_device", lambda: ("cuda", "2 x Tesla T4"))
    config = dlia_config.resolve(NOTEBOOK, data_dir="somewhere")
    assert (config.profile, config.run_dir.name) == ("full", "full-real")
    assert "SYNTHETIC" not in config.banner()


def test_environment_profile_replaces_auto_only(monkeypatch):
    monkeypatch.setenv("DLIA_PROFILE", "cpu")
    assert dlia_config.resolve(NOTEBOOK).profile == "cpu"
    assert dlia_config.resolve(NOTEBOOK, "smoke").profile == "smoke"


def test_profiles_have_the_same_settings():
    for profiles in dlia_config.SETTINGS.values():
        assert {frozenset(settings) for settings in profiles.values()} == {frozenset(profiles["full"])}


def test_settings_read_as_attributes_and_survive_pickling():
    config = dlia_config.resolve(NOTEBOOK, "smoke")
    assert pickle.loads(pickle.dumps(config)).size == config.size == 48
    with pytest.raises(AttributeError, match="no setting 'sise'"):
        _ = config.sise


def test_run_folder_refuses_other_settings_unless_forced_or_put_aside():
    first = dlia_config.resolve(NOTEBOOK, "smoke", run_name="mine")
    (first.run_dir / "keep.txt").write_text("old")
    assert dlia_config.resolve(NOTEBOOK, "smoke", run_name="mine").key == first.key
    with pytest.raises(ValueError, match="choose another RUN_NAME"):
        dlia_config.resolve(NOTEBOOK, "cpu", run_name="mine")
    assert (dlia_config.resolve(NOTEBOOK, "cpu", run_name="mine", resume="force").run_dir / "keep.txt").exists()
    fresh = dlia_config.resolve(NOTEBOOK, "cpu", run_name="mine", resume=False)
    assert not (fresh.run_dir / "keep.txt").exists()
    assert list(fresh.run_dir.parent.glob("mine.*.old/keep.txt")), "the old run is put aside, not deleted"


def test_run_folder_records_config_and_environment():
    run_dir = dlia_config.resolve(NOTEBOOK, "smoke").run_dir
    assert json.loads((run_dir / "config.json").read_text())["settings"]["size"] == 48
    assert json.loads((run_dir / "env.json").read_text())["torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"notebook": "99_none"}, "has no settings"),
        ({"notebook": NOTEBOOK, "profile": "fast"}, "is not one of"),
        ({"notebook": NOTEBOOK, "resume": "yes"}, "RESUME"),
    ],
)
def test_bad_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dlia_config.resolve(**arguments)
