import os
from dataclasses import replace
from pathlib import Path

import pytest

from dlia_utils.data import phantom, sources

NINJA_FOLDERS = ("train", "val", "test", "not fractured")
SIGNATURE = sources.SOURCES["pneumonia"].signature


def make_tree(root: Path, *, without: str = "") -> Path:
    for part in SIGNATURE:
        if part != without:
            (root / part).mkdir(parents=True)
    return root


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data set anywhere: each test puts its own in place."""
    for name in ("DLIA_DATA", "DLIA_DOWNLOAD", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DLIA_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    monkeypatch.setenv("DLIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        sources, "__file__", str(tmp_path / "repository" / "dlia_utils" / "locate.py")
    )


@pytest.fixture
def quick_phantom(monkeypatch):
    """A phantom of a few tiny films; returns the list of folders it was written to."""
    written = []

    def write(root):
        written.append(root)
        return phantom.write_pneumonia(root, images={"train": (2, 2), "test": (1, 1)}, size=16)

    source = sources.SOURCES["pneumonia"]
    monkeypatch.setitem(
        sources.SOURCES,
        "pneumonia",
        sources.Source(source.signature, source.slugs, source.handle, write),
    )
    return written


@pytest.mark.parametrize("below", ["", "chest_xray", "a/b/chest_xray"])
def test_argument_may_name_any_folder_above(tmp_path, below):
    root = make_tree(tmp_path / "told" / below)
    found = sources.find("pneumonia", str(tmp_path / "told"))
    assert (found.root, found.origin, found.synthetic) == (root, "argument", False)


def test_argument_wins_and_nearest_copy_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_DATA", str(make_tree(tmp_path / "env")))
    outer = make_tree(tmp_path / "told" / "chest_xray")
    make_tree(outer / "chest_xray")
    make_tree(tmp_path / "told" / "__MACOSX")
    assert sources.find("pneumonia", tmp_path / "told").root == outer
    assert sources.find("pneumonia").origin == "DLIA_DATA"


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_wrong_path_is_an_error_that_names_it(tmp_path, monkeypatch, by):
    make_tree(tmp_path / "repository" / "data" / "chest_xray")  # Must not be used instead.
    wrong = tmp_path / "no such folder"
    if by == "environment":
        monkeypatch.setenv("DLIA_DATA", str(wrong))
    with pytest.raises(sources.DataNotFound, match="no such folder.*train/NORMAL"):
        sources.find("pneumonia", wrong if by == "argument" else None)
    wrong.mkdir()
    with pytest.raises(sources.DataNotFound, match="does not hold pneumonia"):
        sources.find("pneumonia", wrong if by == "argument" else None)


def test_missing_class_folder_is_named(tmp_path):
    root = make_tree(tmp_path / "told" / "chest_xray", without="test/NORMAL")
    with pytest.raises(sources.DataNotFound, match="has no test/NORMAL"):
        sources.find("pneumonia", root.parent)


def test_folder_inside_the_data_set_names_the_right_one(tmp_path):
    root = make_tree(tmp_path / "chest_xray")
    with pytest.raises(
        sources.DataNotFound, match="lies inside pneumonia; name .*chest_xray' instead"
    ):
        sources.find("pneumonia", root / "train")


def test_unknown_data_set():
    with pytest.raises(ValueError, match="known: pneumonia"):
        sources.find("pnumonia")


@pytest.mark.parametrize(
    "mount",
    [
        "chest-xray-pneumonia/chest_xray",
        "datasets/paultimothymooney/chest-xray-pneumonia/chest_xray",
        "datasets/organizations/some-hospital/chest-xray-pneumonia/chest_xray",
        "a-renamed-copy/archive/chest_xray",
        "datasets/somebody/a-renamed-copy",
        "notebooks/somebody/prepared/chest_xray",
    ],
)
def test_kaggle_mounts_of_both_layouts(tmp_path, mount):
    root = make_tree(tmp_path / "kaggle" / "input" / mount)
    found = sources.find("pneumonia")
    assert (found.root, found.origin) == (root, "kaggle")


def test_repository_data_folder(tmp_path):
    root = make_tree(tmp_path / "repository" / "data" / "chest_xray")
    assert sources.find("pneumonia") == sources.Location("pneumonia", root, "data/", False)


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


def test_half_written_phantom_is_written_again(quick_phantom, tmp_path):
    folder = tmp_path / "mine"
    make_tree(
        folder / "chest_xray"
    )  # Complete to the eye, but without the marker, which is written last.
    (tmp_path / "mine.part-killed").mkdir()
    found = sources.find("pneumonia", phantom_dir=folder)
    assert list(found.root.glob("train/NORMAL/*.jpeg")) and (folder / phantom.MARKER).is_file()
    assert not list(tmp_path.glob("mine.part-*"))


def test_download_only_when_asked_and_never_on_kaggle(tmp_path, monkeypatch, quick_phantom):
    downloaded = make_tree(tmp_path / "downloaded")
    monkeypatch.setattr(sources, "_download", lambda dataset: downloaded)
    assert sources.find("pneumonia").origin == "phantom"
    assert sources.find("pneumonia", download=True).origin == "kagglehub"
    monkeypatch.setenv("DLIA_DOWNLOAD", "1")
    assert sources.find("pneumonia").root == downloaded
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    (tmp_path / "kaggle" / "input").mkdir(parents=True)
    assert sources.on_kaggle() and sources.find("pneumonia").origin == "phantom"


@pytest.mark.parametrize(
    "name, folders",
    [
        ("fracatlas", [f"{part}/{kind}" for kind in ("img", "ann") for part in NINJA_FOLDERS]),
        ("covid", ["COVID", "Normal"]),
        ("covid", ["train/covid", "train/normal", "test/covid", "test/normal"]),
        ("tuberculosis", ["Tuberculosis", "Normal"]),
    ],
)
def test_each_tree_of_a_data_set_is_recognised(tmp_path, monkeypatch, name, folders):
    root = tmp_path / "kaggle" / "input" / "somebodys-copy" / "archive"
    for folder in folders:
        (root / folder).mkdir(parents=True)
    assert sources.find(name) == sources.Location(name, root, "kaggle", False)
    (root / folders[-1]).rmdir()
    with pytest.raises(
        sources.DataNotFound,
        match=f"looks like {name} but is not complete: .* has no .*{folders[-1]}",
    ):
        sources.find(name, root)


def test_a_wrong_path_names_all_trees_of_the_data_set(tmp_path):
    with pytest.raises(
        sources.DataNotFound, match="images/All_Images, dataset.csv, .*; or not fractured/ann, not"
    ):
        sources.find("fracatlas", tmp_path)


NIH_LIST = "Image Index,Finding Label,Bbox [x,y,w,h]\n00000001_000.png,Mass,1,2,3,4\n"


def make_nih(root: Path, *, complete: bool = True) -> Path:
    (root / "images").mkdir(parents=True)
    (root / "BBox_List_2017.csv").write_text(NIH_LIST)
    if complete:
        (root / "images" / "00000001_000.png").write_bytes(b"x")
    return root


def make_competition(root: Path, *, folders: tuple[str, str] = ("train", "test")) -> Path:
    for folder, name in zip(folders, ("00000001_000.png", "00000002_000.png"), strict=True):
        (root / folder).mkdir(parents=True)
        (root / folder / name).write_bytes(b"x")
    (root / "train.csv").write_text(NIH_LIST)
    (root / "ID_to_Image_Mapping.csv").write_text("id,image_id\n1,00000002_000.png\n")
    return root


@pytest.mark.parametrize("folders", [("train", "test"), ("train_images", "test_images")])
def test_signature_with_alternatives(tmp_path, folders):
    root = make_competition(
        tmp_path / "kaggle" / "input" / "competitions" / "some-slug", folders=folders
    )
    assert sources.find("dlia").root == root


def test_train_and_test_folders_alone_are_no_competition(
    tmp_path, quick_phantom, monkeypatch, caplog
):
    make_tree(tmp_path / "repository" / "data" / "chest_xray")
    source = sources.SOURCES["dlia"]
    monkeypatch.setitem(
        sources.SOURCES, "dlia", replace(source, write_phantom=quick_phantom_of_nothing)
    )
    assert sources.find("dlia").synthetic and "looks like dlia" not in caplog.text
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / "ID_to_Image_Mapping.csv").write_text("id,image_id\n")
    with pytest.raises(
        sources.DataNotFound, match="not complete: .*no train.csv, train or train_images"
    ):
        sources.find("dlia", tmp_path / "told")


def quick_phantom_of_nothing(root: Path) -> Path:
    (root / phantom.MARKER).write_text("")
    return root


def test_first_usable_data_set_is_taken(tmp_path, caplog):
    caplog.set_level("INFO", logger="dlia_utils")
    data = tmp_path / "repository" / "data"
    make_nih(data / "boxes", complete=False)
    chest = make_tree(data / "chest_xray")
    order = ("dlia", "nih", "pneumonia")
    found = sources.find_first(order)
    assert (found.dataset, found.root) == ("pneumonia", chest)
    assert "nih in" in caplog.text and "1 of the 1 boxed images are missing" in caplog.text
    assert sources.find("nih").root == data / "boxes"  # Asked for by name it is found nevertheless.
    (data / "boxes" / "images" / "00000001_000.png").write_bytes(b"x")
    assert sources.find_first(order).dataset == "nih"
    make_competition(data / "challenge")
    assert sources.find_first(order).dataset == "dlia"


def test_find_first_in_a_told_folder(tmp_path, monkeypatch, caplog):
    make_competition(tmp_path / "repository" / "data" / "challenge")  # Must not be used instead.
    told = tmp_path / "told"
    make_nih(told / "boxes", complete=False)
    with pytest.raises(
        sources.DataNotFound, match="none of dlia, nih can be used(.|\n)*images are missing"
    ):
        sources.find_first(("dlia", "nih"), told)
    make_tree(told / "chest_xray")
    monkeypatch.setenv("DLIA_DATA", str(told))
    assert sources.find_first(("dlia", "nih", "pneumonia")).origin == "DLIA_DATA"
    with pytest.raises(ValueError, match="unknown data set 'nhi'; known"):
        sources.find_first(("dlia", "nhi"))
    with pytest.raises(ValueError, match="none given"):
        sources.find_first(())


def test_find_first_falls_back_to_the_phantom_of_the_first(quick_phantom):
    found = sources.find_first(("pneumonia", "nih"))
    assert (found.dataset, found.origin, found.synthetic) == ("pneumonia", "phantom", True)


def test_competition_cannot_be_downloaded(tmp_path):
    with pytest.raises(sources.DataNotFound, match="kagglehub has no data set dlia"):
        sources.find("dlia", download=True)


def test_siblings(tmp_path):
    first, second = (
        make_competition(tmp_path / "told" / name) for name in ("edition_a", "edition_b")
    )
    make_competition(tmp_path / "told" / "gap")
    (tmp_path / "told" / "gap" / "test" / "00000002_000.png").unlink()
    make_tree(tmp_path / "told" / "chest_xray")
    found = sources.find("dlia", tmp_path / "told" / "edition_b")
    assert [one.root for one in sources.siblings(found)] == [first, second]
    assert {one.origin for one in sources.siblings(found)} == {"argument"}


def test_cache_root(tmp_path, monkeypatch):
    assert sources.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("DLIA_CACHE")
    assert sources.cache_root() == Path.home() / ".cache" / "dlia_utils"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert not sources.on_kaggle()  # An environment variable alone is no Kaggle.
    os.makedirs(tmp_path / "kaggle" / "input")
    assert sources.cache_root() == tmp_path / "kaggle" / "temp" / "dlia"
