"""A run: profiles, settings that the reader changes, run folders, settings that are never mixed."""

import json
import pickle

import pytest
from PIL import Image

from dlia_utils import run
from dlia_utils.data import datasets, sources
from dlia_utils.data.tables import BadData, DataNotFound
from dlia_utils.run import start

NOTEBOOK = "01_pneumonia_robustness"
FULL = dict(dataset="pneumonia", seed=0, size=224, epochs=25, lr=1e-3, patience=None)
FULL |= dict(pretrained=True, eps_grid=(1 / 255, 4 / 255), attacks=("fgsm", "pgd_ce"))
FULL |= dict(budgets={"fmn": {"steps": 5}}, test_share=None, classes=None, patient_pattern="")
WORDS = {"attacks": ("fgsm", "pgd_ce", "fmn")}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    for name in ("DLIA_PROFILE", "DLIA_DATA"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "real").mkdir()

    def find(dataset, data_dir=None, **_):
        return sources.Location(dataset, tmp_path / "real", "argument", synthetic=not data_dir)

    monkeypatch.setattr(sources, "find", find)
    monkeypatch.setattr(run, "pick_device", lambda: ("cpu", "no GPU"))


def begin(profile="smoke", full=FULL, cpu=None, by_data=None, allowed=None, own="", **parameters):
    settings = dict(full=full, cpu=cpu or {"size": 112}, smoke={"size": 48})
    more = dict(by_data=by_data, allowed=allowed, own_data=own)
    return start(NOTEBOOK, settings, parameters | {"profile": profile}, **more)


def test_auto_is_smoke_without_gpu_and_full_with_one_and_real_data(monkeypatch):
    one = begin("auto")
    assert one.profile == "smoke" and "no GPU" in one.reason and one.size == 48 and one.epochs == 25
    assert "SYNTHETIC" in str(one) and "SMOKE" in str(one)
    assert one.run_dir.name == "smoke-synthetic" and one.caption.endswith("smoke profile, 48 px")
    monkeypatch.setattr(run, "pick_device", lambda: ("cuda", "2 x Tesla T4"))
    one = begin("auto", data_dir="somewhere")
    assert (one.profile, one.run_dir.name, one.size) == ("full", "full-real", 224)
    assert "SYNTHETIC" not in str(one)
    monkeypatch.setenv("DLIA_PROFILE", "cpu")
    assert "auto, and the environment says DLIA_PROFILE=cpu" in str(begin("auto"))
    assert begin("smoke").profile == "smoke"


def test_what_differs_with_the_data_comes_before_the_profile():
    by_data = {"pneumonia": {}, "*": {"test_share": 0.15, "size": 800}}
    assert begin("full", by_data=by_data).test_share is None
    given = dict(by_data=by_data, changes={"dataset": "covid"}, own=2)
    other = begin("full", **given)
    assert (other.test_share, other.size, other.run_dir.name) == (0.15, 800, "full-covid-synthetic")
    assert begin("smoke", **given).size == 48


def test_a_changed_setting_is_starred_written_down_and_has_a_folder_of_its_own():
    one = begin(changes={"epochs": 5, "eps_grid": [2 / 255]})
    assert one.pick("epochs", "eps_grid") == {"epochs": 5, "eps_grid": (2 / 255,)}
    text = str(one)
    assert "* epochs = 5  (in this profile: 25)" in text
    assert "*epochs=5" in text and "(2/255)" in text
    assert one.run_dir.name.startswith("smoke-synthetic-") and one.run_dir != begin().run_dir
    kept = json.loads((one.run_dir / "config.json").read_text())
    assert kept["settings"] == json.loads(json.dumps(one.settings))
    assert kept["changed"] == ["epochs", "eps_grid"]
    assert json.loads((one.run_dir / "env.json").read_text())["torch"]
    again = begin(changes={"epochs": 5, "eps_grid": (2 / 255,)})
    assert (again.run_dir, again.key) == (one.run_dir, one.key), "a list is a tuple"
    assert begin(changes={"epochs": 25}).run_dir == begin().run_dir, "it is set already"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 5}, "CHANGES: no such setting 'epoch'; did you mean epochs"),
        ({"epochs": "5"}, "is a text; it must be a whole number, such as 25"),
        ({"epochs": True}, "is True or False; it must be a whole"),
        ({"epochs": None}, "epochs = None"),
        ({"lr": float("nan")}, "is not a finite number"),
        ({"lr": -1.0}, "is negative"),
        ({"patience": "often"}, "is a text"),
        ({"attacks": "fgsm"}, "is a text; it must be a list"),
        ({"attacks": ("fgms",)}, "names 'fgms'; did you mean fgsm"),
        ({"eps_grid": ("1/255",)}, "holds a text; it must be a list"),
        ({"budgets": 3}, "must be a dictionary"),
        ({"dataset": "covid"}, "names 'covid'; there are: pneumonia"),
    ],
)
def test_a_wrong_change_is_named_before_any_data_is_read(change, message, monkeypatch):
    monkeypatch.setattr(sources, "find", lambda *_, **__: pytest.fail("data was looked for"))
    with pytest.raises(ValueError, match=message):
        begin(changes=change, allowed=WORDS)


FITTING = [{"lr": 1}, {"patience": 3}, {"attacks": ("fmn",)}, {"epochs": 1}, {"patience": None}]
FITTING += [{"lr": None}, {"budgets": {"fmn": {"steps": 9}, "square": {"steps": 2}}}]


@pytest.mark.parametrize("change", FITTING)
def test_what_fits_is_taken(change):
    assert begin(changes=change, allowed=WORDS | {"lr": (None,)}).pick(*change) == change


def test_settings_cannot_be_changed_behind_the_runs_back_but_in_a_variant():
    one = begin()
    one.settings["epochs"], one.budgets["fmn"]["steps"] = 2, 99
    assert one.epochs == 25 and one.budgets["fmn"]["steps"] == 5
    with pytest.raises(AttributeError, match=r"fixed once .*: write CHANGES = \{'epochs': ...\}"):
        one.epochs = 2
    with pytest.raises(AttributeError, match="no setting 'sise'; did you mean size"):
        _ = one.sise
    assert one.fit == "squash" and begin(full=FULL | {"fit": "pad"}).fit == "pad", "its default"
    other = one.variant(size=24)
    assert (other.size, one.size, other.run_dir) == (24, 48, one.run_dir) and other.key != one.key
    with pytest.raises(ValueError, match="no such setting 'sizes'; did you mean size"):
        one.variant(sizes=3)


def test_a_run_survives_pickling_and_is_opened_again_from_its_folder():
    one = begin(changes={"epochs": 3})
    one.opened["key"] = "decoded images"
    copied = pickle.loads(pickle.dumps(one))
    assert copied.settings == one.settings and not copied.opened
    again = run.reopen(one.run_dir)
    for name in ("key", "settings", "run_dir", "location", "trains"):
        assert getattr(again, name) == getattr(one, name)
    with pytest.raises(ValueError, match="is no run folder"):
        run.reopen(one.run_dir / "figures")


def test_run_folder_refuses_other_settings_unless_forced_or_put_aside():
    first = begin(run_name="mine")
    (first.run_dir / "keep.txt").write_text("old")
    assert begin(run_name="mine").key == first.key
    with pytest.raises(ValueError, match=r"\(size: 48 -> 112\): choose another RUN_NAME"):
        begin("cpu", run_name="mine")
    assert (begin("cpu", run_name="mine", resume="force").run_dir / "keep.txt").exists()
    fresh = begin("cpu", run_name="mine", resume=False)
    assert not (fresh.run_dir / "keep.txt").exists() and fresh.fresh
    assert list(fresh.run_dir.parent.glob("mine.*.old/keep.txt")), "put aside, not deleted"
    assert begin("cpu", run_name="mine").fresh, "gone on with, it still takes nothing from others"


def test_a_folder_of_another_format_is_refused_by_name():
    one = begin()
    record = one.run_dir / "config.json"
    former = json.loads(record.read_text())
    del former["format"]
    record.write_text(json.dumps(former))
    for resume in (True, "force"):
        with pytest.raises(ValueError, match="smoke-synthetic was written by another version"):
            begin(resume=resume)
    with pytest.raises(ValueError, match="another version"):
        run.reopen(one.run_dir)
    assert begin(resume=False).run_dir == one.run_dir


def test_settings_changed_in_their_own_cell_go_to_another_folder_instead_of_an_error(caplog):
    first = begin()
    edited = begin(full=FULL | {"epochs": 3})
    assert edited.run_dir != first.run_dir and "holds a run of other settings" in caplog.text
    assert begin(full=FULL | {"epochs": 3}).run_dir == edited.run_dir


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"profile": "fast"}, "is not one of"),
        ({"resume": "yes"}, "RESUME"),
        ({"run_nam": "a"}, "did you mean run_name"),
    ],
)
def test_bad_parameters_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        begin(**arguments)


RECORDS = {
    "empty": "",
    "a list": "[1]",
    "null": "null",
    "cut": '{"key": ',
    "deep": "[" * 100_000,
    "no settings": '{"format": 2}',
    "wrong parts": '{"format": 2, "key": 3, "settings": [], "location": {"a": 1}}',
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_damaged_config_is_named_and_can_be_put_aside(kind):
    record = begin(run_name="mine").run_dir / "config.json"
    record.write_text(RECORDS[kind])
    for action in (lambda: begin(run_name="mine"), lambda: run.reopen(record.parent)):
        with pytest.raises(ValueError, match=r"mine.* RUN_NAME, or RESUME = False \(--fresh\)"):
            action()
    assert begin(run_name="mine", resume=False).run_dir == record.parent
    assert list(record.parent.parent.glob("mine.*.old")), "put aside, not deleted"


@pytest.fixture
def attached(tmp_path, monkeypatch):
    """Kaggle, with a run attached as an input; the working folder is empty."""
    monkeypatch.setattr(sources, "KAGGLE", tmp_path / "kaggle")
    one = begin()
    (one.run_dir / "baseline").mkdir()
    (one.run_dir / "baseline" / "last.pt").write_text("weights")
    mount = tmp_path / "kaggle" / "input" / "mine"
    mount.mkdir(parents=True)
    (tmp_path / "runs").rename(mount / "runs")
    return mount


@pytest.mark.parametrize("kind", RECORDS)
def test_a_broken_file_in_an_input_stops_no_run(attached, kind, caplog):
    other = attached.with_name("another") / "runs" / NOTEBOOK / "smoke-synthetic" / "config.json"
    other.parent.mkdir(parents=True)
    other.write_text(RECORDS[kind])
    assert (begin().run_dir / "baseline" / "last.pt").exists()
    assert "another" in caplog.text


@pytest.mark.parametrize("left", [".config.77-ab.tmp.json", "executed.ipynb"])
def test_a_start_that_was_killed_before_its_first_file_blocks_none(attached, tmp_path, left):
    before = tmp_path / "runs" / NOTEBOOK / "smoke-synthetic" / left
    before.parent.mkdir(parents=True)
    before.write_text("half a file")
    assert (begin().run_dir / "baseline" / "last.pt").exists()


@pytest.mark.parametrize("name", ["../up", "/tmp/up", "a/b", ".", "x" * 300, 7])
def test_a_run_name_is_one_part_of_a_path(name, tmp_path):
    with pytest.raises(ValueError, match="RUN_NAME .* cannot name a folder"):
        begin(run_name=name)
    assert not (tmp_path / "runs").exists()
    odd = begin(run_name="\xfcber 100 %?#{x} 'q'").run_dir
    assert odd.parent.name == NOTEBOOK and run.reopen(odd).run_dir == odd


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """Class folders under a name that no published data set has."""
    monkeypatch.undo()
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("DLIA_DATA", raising=False)
    for name in ("circle", "square"):
        for number in range(3):
            path = tmp_path / "shapes" / name / f"p{number}_{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), 40 * number).save(path)
    return tmp_path / "shapes"


def test_a_folder_of_class_folders_is_the_data_under_its_own_name(shapes, monkeypatch):
    one = begin(data_dir=shapes, own=2, by_data={"*": {"test_share": 0.2}})
    assert (one.data_name, one.synthetic) == ("shapes", False)
    assert one.run_dir.name == "smoke-shapes-real"
    assert one.test_share == 0.2 and "real images of 'shapes'" in str(one)
    ordered = begin(data_dir=shapes, own=2, changes={"classes": ("square", "circle")})
    assert datasets.load(ordered.location).classes == ("square", "circle")
    assert run.reopen(ordered.run_dir).location.options == {"classes": ("square", "circle")}
    monkeypatch.setenv("DLIA_DATA", str(shapes))
    assert begin(own="any").data_name == "shapes"


def test_a_folder_is_refused_in_words_where_it_cannot_be_used(shapes):
    usable = "does not hold pneumonia.*works in notebooks 01, 04, 06, 07"
    with pytest.raises(DataNotFound, match=usable):
        begin(data_dir=shapes)
    with pytest.raises(BadData, match="2 classes .circle, square.; this notebook compares 3"):
        begin(data_dir=shapes, own=3)
    (shapes / "empty").mkdir()
    with pytest.raises(BadData, match="empty"):
        begin(data_dir=shapes, own="any")


def test_a_folder_that_holds_another_published_set_is_told_by_name(shapes, monkeypatch):
    monkeypatch.delenv("DLIA_DATA", raising=False)
    location = sources.find("tuberculosis")
    with pytest.raises(DataNotFound, match="holds tuberculosis: .*dataset=tuberculosis"):
        begin(data_dir=location.root, own=2)
