import shutil
from pathlib import Path

import pandas as pd
import pytest

from dlia_utils.data import datasets, phantom, sources


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    phantom.write_pneumonia(root, images={"train": (6, 8), "val": (2, 2), "test": (3, 3)}, size=24)
    return root


@pytest.fixture
def tree(written, tmp_path):
    """A copy that the test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "copy")) / "chest_xray"


def load(tree):
    return datasets.load(sources.find("pneumonia", tree))


def test_manifest_and_ignored_files(tree):
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    shutil.copy(
        next(tree.glob("train/NORMAL/*.jpeg")),
        tree / "train" / ".ipynb_checkpoints" / "a-checkpoint.jpeg",
    )
    (tree / "train" / "NORMAL" / "Thumbs.db").write_bytes(b"x")
    (tree / "train" / "NORMAL" / "notes.txt").write_text("x")
    (tree / "train" / "OTHER").mkdir()
    (tree / "train" / "OTHER" / "x.jpeg").write_text("x")
    dataset = load(tree)
    assert list(dataset.manifest.columns) == list(datasets.COLUMNS) and dataset.synthetic
    assert list(dataset.manifest.index) == list(range(24)) and dataset.manifest["path"].is_unique
    assert dataset.manifest["label"].dtype == "int64" and dataset.classes == ("NORMAL", "PNEUMONIA")
    assert (
        dataset.manifest["class_name"]
        == dataset.manifest["label"].map({0: "NORMAL", 1: "PNEUMONIA"})
    ).all()
    assert all((tree / path).is_file() for path in dataset.manifest["path"])
    reasons = dataset.ignored["reason"].value_counts()
    assert reasons["second copy of the data set (nested chest_xray)"] == 24
    for reason in (
        "hidden file or folder",
        "macOS archive litter (__MACOSX)",
        "macOS resource fork (._*)",
        "folder settings of the operating system",
        "not named like an image",
        "not a class of this data set",
    ):
        assert reasons[reason] >= 1
    everything = [path for path in tree.rglob("*") if path.is_file()]
    assert len(everything) == len(dataset.manifest) + len(dataset.ignored)


def test_summary(written):
    table = datasets.summary(load(written))
    assert list(table["split"]) == ["train", "train", "val", "val", "test", "test"]
    assert (
        list(table["images"]) == [6, 8, 2, 2, 3, 3] and (table["patients"] <= table["images"]).all()
    )


@pytest.mark.parametrize(
    "name, expected",
    [
        ("person1000_bacteria_2931.jpeg", ("person-1000", "bacteria")),
        ("person1000_virus_1681.jpeg", ("person-1000", "virus")),
        ("person23_virus_53_0.jpeg", ("person-23", "virus")),
        ("IM-0115-0001.jpeg", ("IM-0115", "normal")),
        ("IM-0330-0001-0002.jpeg", ("IM-0330", "normal")),
        ("NORMAL2-IM-0330-0001.jpeg", ("NORMAL2-IM-0330", "normal")),
        ("NORMAL2-IM-0501-0001-0002.jpeg", ("NORMAL2-IM-0501", "normal")),
        ("chest-7.png", ("chest-7", "unknown")),
    ],
)
def test_patients_from_names(name, expected):
    assert datasets.pneumonia_patient(name) == expected


def test_odd_names_and_small_val_are_said(tree, caplog):
    caplog.set_level("INFO", logger="dlia_utils")
    first = next(tree.glob("train/NORMAL/IM*.jpeg"))
    first.rename(first.with_name("odd.jpeg"))
    load(tree)
    assert "1 file names tell no patient" in caplog.text and "train/NORMAL/odd.jpeg" in caplog.text
    assert "val split has only 4 images" in caplog.text


def test_val_may_be_missing_but_not_empty(tree):
    for path in tree.glob("val/NORMAL/*.jpeg"):
        path.unlink()
    with pytest.raises(datasets.BadData, match="no images in val/NORMAL.*left out"):
        load(tree)
    shutil.rmtree(tree / "val")
    assert set(load(tree).manifest["split"]) == {"train", "test"}


def test_missing_and_empty_class_folders(tree):
    location = sources.find("pneumonia", tree)
    for path in tree.glob("train/PNEUMONIA/*.jpeg"):
        path.unlink()
    with pytest.raises(datasets.BadData, match="no images in train/PNEUMONIA"):
        datasets.load(location)
    shutil.rmtree(tree / "train" / "PNEUMONIA")
    with pytest.raises(sources.DataNotFound, match="has no train/PNEUMONIA"):
        datasets.load(location)


def test_check_lists_bad_files(tree):
    dataset = load(tree)
    assert datasets.check(dataset).empty
    paths = list(dataset.manifest["path"][:3])
    (tree / paths[0]).write_bytes(b"")
    (tree / paths[1]).write_text("<html>404</html>")
    (tree / paths[2]).unlink()
    problems = datasets.check(dataset)
    assert list(problems["path"]) == paths
    assert "empty" in problems["problem"][0] and problems["problem"][1] == "not an image"
    assert "cannot be read" in problems["problem"][2]
    text = datasets.problem_text(problems)
    assert all(path in text for path in paths) and "Fix:" in text


def test_long_lists_are_cut(written):
    text = datasets.problem_text(
        pd.DataFrame({"path": [f"{i}.jpeg" for i in range(50)], "problem": "not an image"})
    )
    assert "19.jpeg" in text and "20.jpeg" not in text and "and 30 more" in text


def test_real_set(real_data):
    dataset = datasets.load(sources.find("pneumonia", real_data))
    train = dataset.manifest[dataset.manifest["split"] == "train"]
    test = dataset.manifest[dataset.manifest["split"] == "test"]
    assert list(test["label"].value_counts().sort_index()) == [234, 390]
    assert list(train["label"].value_counts().sort_index()) == [1341, 3875]
    assert train.loc[train["label"] == 1, "patient"].nunique() == 1635
    assert test.loc[test["label"] == 1, "patient"].nunique() == 202
    assert len(set(train["patient"]) & set(test["patient"])) == 170
