import os
from dataclasses import replace
from pathlib import Path

import pytest

from dlia_utils.data import phantom, sources
from dlia_utils.data.tables import DataNotFound

TREE = sources.SOURCES["pneumonia"].trees[0]


def make_tree(root: Path, *, without: str = "") -> Path:
    for part in TREE:
        if part != without:
            (root / part).mkdir(parents=True)
    return root


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data set anywhere: each test puts its own in place."""
    for name in ("DLIA_DATA", "DLIA_DOWNLOAD", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "KAGGLE", tmp_path / "kaggle")
    monkeypatch.setenv("DLIA_CACHE", str(tmp_path / "cache"))
    for folder in ("repository", "work/deep/er"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "repository" / "pyproject.toml").touch()
    monkeypatch.setattr(sources, "REPOSITORY", tmp_path / "repository")
    monkeypatch.chdir(tmp_path / "work" / "deep" / "er")


@pytest.fixture
def quick_phantom(monkeypatch):
    """A phantom of a few tiny images; returns the list of folders it was written to."""
    written = []

    def write(root):
        written.append(root)
        return phantom.write_pneumonia(root, images={"train": (2, 2), "test": (1, 1)}, size=16)

    quick = replace(sources.SOURCES["pneumonia"], write_phantom=write)
    monkeypatch.setitem(sources.SOURCES, "pneumonia", quick)
    return written


def test_argument_may_name_any_folder_above(tmp_path):
    for k, below in enumerate(["", "chest_xray", "a/b/chest_xray"]):
        root = make_tree(tmp_path / f"told{k}" / below)
        found = sources.find("pneumonia", str(tmp_path / f"told{k}"))
        assert (found.root, found.origin, found.synthetic) == (root, "argument", False)


def test_argument_wins_and_nearest_copy_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_DATA", str(make_tree(tmp_path / "env")))
    outer = make_tree(tmp_path / "told" / "chest_xray")
    make_tree(outer / "chest_xray")
    make_tree(tmp_path / "told" / "__MACOSX")
    assert sources.find("pneumonia", tmp_path / "told").root == outer
    assert sources.find("pneumonia").origin == "DLIA_DATA"


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_wrong_path_is_an_error_that_says_what_is_wrong(tmp_path, monkeypatch, by):
    make_tree(tmp_path / "repository" / "data" / "chest_xray")  # Must not be used instead.

    def need(path, message):
        if by == "environment":
            monkeypatch.setenv("DLIA_DATA", str(path))
        with pytest.raises(DataNotFound, match=message):
            sources.find("pneumonia", path if by == "argument" else None)

    need(tmp_path / "no such folder", "no such folder.*train/NORMAL")
    need(tmp_path / "work", "does not hold pneumonia.*class folders works in notebooks 01")
    half = make_tree(tmp_path / "half" / "chest_xray", without="test/NORMAL")
    need(half.parent, "looks like pneumonia but is not complete: .* has no test/NORMAL")
    inside = make_tree(tmp_path / "whole" / "chest_xray") / "train"
    need(inside, "lies inside pneumonia; name .*chest_xray' instead")
    with pytest.raises(ValueError, match="known: pneumonia"):
        sources.find("pnumonia")


@pytest.mark.parametrize(
    "mount",
    [
        "chest-xray-pneumonia/chest_xray",
        "datasets/paultimothymooney/chest-xray-pneumonia/chest_xray",
        "datasets/organizations/some-hospital/chest-xray-pneumonia/chest_xray",
        "notebooks/somebody/prepared/archive/chest_xray",
    ],
)
def test_kaggle_mounts_of_both_layouts(tmp_path, mount):
    root = make_tree(tmp_path / "kaggle" / "input" / mount)
    assert sources.find("pneumonia") == sources.Location("pneumonia", root, "kaggle", False)


@pytest.mark.parametrize("above", ["work/deep/er", "work", "repository"])
def test_data_folder_here_above_or_in_the_repository(tmp_path, above, quick_phantom):
    root = make_tree(tmp_path / above / "data" / "chest_xray")
    assert sources.find("pneumonia") == sources.Location("pneumonia", root, "data/", False)
    (tmp_path / "repository" / "pyproject.toml").unlink()  # as in site-packages
    assert (sources.find("pneumonia").origin == "data/") == (above != "repository")


def test_half_a_data_set_in_a_usual_place_is_reported(tmp_path, quick_phantom, caplog):
    make_tree(tmp_path / "repository" / "data" / "chest_xray", without="train/PNEUMONIA")
    assert sources.find("pneumonia").origin == "phantom"
    assert "passed over" in caplog.text and "train/PNEUMONIA" in caplog.text


def test_phantom_is_written_once_and_marked(quick_phantom, tmp_path):
    first, second = sources.find("pneumonia"), sources.find("pneumonia")
    assert first == second and first.synthetic and first.origin == "phantom"
    assert len(quick_phantom) == 1 and first.root.is_relative_to(tmp_path / "cache")
    told = sources.find("pneumonia", first.root.parent)
    assert told.origin == "argument" and told.synthetic  # However it is named, it stays synthetic.
    # Without the marker, which is written last, it was left half-written.
    (first.root.parent / phantom.MARKER).unlink()
    (first.root.parent.parent / f"{first.root.parent.name}.part-killed").mkdir()
    again = sources.find("pneumonia").root
    assert len(quick_phantom) == 2 and list(again.glob("train/NORMAL/*.jpeg"))
    assert not list(first.root.parent.parent.glob("*.part-*"))


def test_download_only_when_asked_and_never_on_kaggle(tmp_path, monkeypatch, quick_phantom):
    downloaded = make_tree(tmp_path / "downloaded")
    monkeypatch.setattr(sources, "_download", lambda dataset: downloaded)
    assert sources.find("pneumonia").origin == "phantom"
    monkeypatch.setenv("DLIA_DOWNLOAD", "1")
    assert sources.find("pneumonia").root == downloaded
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    (tmp_path / "kaggle" / "input").mkdir(parents=True)
    assert sources.on_kaggle() and sources.find("pneumonia").origin == "phantom"


@pytest.mark.parametrize(
    "name, folders",
    [
        ("fracatlas", [one.replace("|", "") for one in sources.SOURCES["fracatlas"].trees[1]]),
        ("covid", ["COVID", "Normal"]),
        ("covid", ["train/covid", "train/normal", "test/covid", "test/normal"]),
        ("tuberculosis", ["Tuberculosis", "Normal"]),
    ],
)
def test_each_tree_of_a_data_set_is_recognised(tmp_path, name, folders):
    root = tmp_path / "kaggle" / "input" / "somebodys-copy" / "archive"
    for folder in folders:
        (root / folder).mkdir(parents=True)
    assert sources.find(name) == sources.Location(name, root, "kaggle", False)
    (root / folders[-1]).rmdir()
    missing = f"looks like {name} but is not complete: .* has no .*{folders[-1]}"
    with pytest.raises(DataNotFound, match=missing):
        sources.find(name, root)


NIH_LIST = "Image Index,Finding Label,Bbox [x,y,w,h]\n00000001_000.png,Mass,1,2,3,4\n"


def make_nih(root: Path) -> Path:
    (root / "images").mkdir(parents=True)
    (root / "BBox_List_2017.csv").write_text(NIH_LIST)
    return root


def make_competition(root: Path, *, folders=("train", "test")) -> Path:
    for folder, name in zip(folders, ("00000001_000.png", "00000002_000.png"), strict=True):
        (root / folder).mkdir(parents=True)
        (root / folder / name).write_bytes(b"x")
    (root / "train.csv").write_text(NIH_LIST)
    (root / "ID_to_Image_Mapping.csv").write_text("id,image_id\n1,00000002_000.png\n")
    return root


def test_the_competition_in_both_spellings_and_half_of_it(tmp_path):
    for k, folders in enumerate((("train", "test"), ("train_images", "test_images"))):
        root = make_competition(tmp_path / f"told{k}" / "some-slug", folders=folders)
        assert sources.find("dlia", root.parent).root == root
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "ID_to_Image_Mapping.csv").write_text("id,image_id\n")
    with pytest.raises(DataNotFound, match="not complete: .*no train.csv, train or train_images"):
        sources.find("dlia", tmp_path / "half")


def test_first_usable_data_set_is_taken(tmp_path, caplog, quick_phantom):
    assert sources.find(("pneumonia", "nih")).origin == "phantom"
    data, order = tmp_path / "repository" / "data", ("dlia", "nih", "pneumonia")
    make_nih(data / "boxes")
    chest = make_tree(data / "chest_xray")
    found = sources.find(order)
    assert (found.dataset, found.root) == ("pneumonia", chest)
    assert "1 of the 1 listed images are missing" in caplog.text
    assert sources.find("nih").root == data / "boxes"  # Asked for by name it is found nevertheless.
    (data / "boxes" / "images" / "00000001_000.png").write_bytes(b"x")
    assert sources.find(order).dataset == "nih"
    make_competition(data / "challenge")
    assert sources.find(order).dataset == "dlia"
    make_nih(tmp_path / "told" / "boxes")
    with pytest.raises(DataNotFound, match="none of dlia, nih can be used(.|\n)*are missing"):
        sources.find(("dlia", "nih"), tmp_path / "told")
    with pytest.raises(ValueError, match="unknown data set 'nhi'; known"):
        sources.find(("nhi", "dlia"))


def test_siblings(tmp_path):
    first, second = (make_competition(tmp_path / "told" / f"edition_{one}") for one in "ab")
    make_competition(tmp_path / "told" / "gap")
    (tmp_path / "told" / "gap" / "test" / "00000002_000.png").unlink()
    make_tree(tmp_path / "told" / "chest_xray")
    found = sources.siblings(sources.find("dlia", tmp_path / "told" / "edition_b"))
    assert [one.root for one in found] == [first, second]
    assert {one.origin for one in found} == {"argument"}


def test_cache_root(tmp_path, monkeypatch):
    assert sources.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("DLIA_CACHE")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert not sources.on_kaggle()  # An environment variable alone is no Kaggle.
    assert sources.cache_root() == Path.home() / ".cache" / "dlia_utils"
    os.makedirs(tmp_path / "kaggle" / "input")
    assert sources.cache_root() == tmp_path / "kaggle" / "temp" / "dlia"
