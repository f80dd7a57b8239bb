"""Sets that are folders of classes: pneumonia, TB, both COVID trees."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from trees import need_every_file_accounted_for, save

from dlia_utils.data import datasets, phantom, readers, sources
from dlia_utils.data.tables import COLUMNS, BadData, DataNotFound


def load(name, root):
    return datasets.load(sources.find(name, root))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    images = {"train": (6, 8), "val": (2, 2), "test": (3, 3)}
    return phantom.write_pneumonia(tmp_path_factory.mktemp("p"), images=images, size=24)


@pytest.fixture
def tree(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "chest_xray"))


def test_pneumonia(tree):
    dataset = load("pneumonia", tree.parent)
    manifest = dataset.manifest
    assert list(manifest.columns) == list(COLUMNS) and dataset.classes == ("NORMAL", "PNEUMONIA")
    assert (
        len(manifest) == 24 and (manifest["label"] == manifest["path"].str.contains("/PNEU")).all()
    )
    assert (manifest["split"] == manifest["path"].str.split("/").str[0]).all()
    assert set(manifest["group"]) == {"normal", "bacteria", "virus"}
    reasons = dataset.ignored["reason"].value_counts()
    assert reasons["second copy of the data set (nested chest_xray)"] >= 24 and len(reasons) == 4
    need_every_file_accounted_for(dataset)
    table = datasets.summary(dataset)
    assert table["split"].tolist() == ["train"] * 2 + ["val"] * 2 + ["test"] * 2
    assert table["images"].tolist() == [6, 8, 2, 2, 3, 3]


def test_odd_names_missing_val_and_empty_classes(tree, caplog):
    first = next(tree.glob("train/NORMAL/[!.]*.jpeg"))
    first.rename(first.with_name("odd.jpeg"))
    load("pneumonia", tree)
    assert "1 file names tell no patient" in caplog.text and "train/NORMAL/odd" in caplog.text
    for path in tree.glob("train/PNEUMONIA/*.jpeg"):
        path.unlink()
    with pytest.raises(BadData, match="no images in train/PNEUMONIA(.|\n)*unpack"):
        load("pneumonia", tree)
    shutil.rmtree(tree / "val")
    save(tree / "train" / "PNEUMONIA" / "person1_virus_1.jpeg")
    assert set(load("pneumonia", tree).manifest["split"]) == {"train", "test"}


def test_check_lists_bad_files_and_cuts_long_lists(tree):
    dataset = load("pneumonia", tree)
    assert datasets.check(dataset).empty
    paths = list(dataset.manifest["path"][:3])
    (tree / paths[0]).write_bytes(b"")
    (tree / paths[1]).write_text("<html>404</html>")
    (tree / paths[2]).unlink()
    problems = datasets.check(dataset)
    assert list(problems["path"]) == paths
    texts = ("empty", "not an image", "cannot be")
    for problem, found in zip(texts, problems["problem"], strict=False):
        assert problem in found
    assert all(path in datasets.problem_text(problems) for path in paths)
    many = pd.DataFrame({"path": [f"{i}.jpeg" for i in range(50)], "problem": "not an image"})
    text = datasets.problem_text(many)
    assert "19.jpeg" in text and "20.jpeg" not in text and "and 30 more" in text


def test_tuberculosis(tmp_path):
    tree = phantom.write_tuberculosis(tmp_path, images=(15, 3), size=24)
    for junk in ("Normal.metadata.xlsx", "README.md.txt", "Normal/.DS_Store"):
        (tree / junk).write_bytes(b"x")
    dataset = load("tuberculosis", tree)
    manifest = dataset.manifest
    assert dataset.classes == ("Normal", "Tuberculosis") and dataset.synthetic
    assert np.bincount(manifest["label"]).tolist() == [15, 3]
    assert set(manifest["split"]) == set(manifest["group"]) == {""}
    assert manifest["patient"].is_unique and dataset.split_rule == "none published"
    need_every_file_accounted_for(dataset)


def test_a_new_set_of_class_folders_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DLIA_DATA", raising=False)
    read = partial(readers.class_folders, classes=("well", "ill"))
    monkeypatch.setitem(sources.SOURCES, "new", sources.Source(read, (("well", "ill"),)))
    with pytest.raises(DataNotFound, match="no new found, and it has no synthetic images"):
        sources.find("new")
    for name in ("well/1.png", "ill/1.png", "ill/2.png"):
        save(tmp_path / "told" / "archive" / name)
    dataset = load("new", tmp_path / "told")
    assert dataset.classes == ("well", "ill") and dataset.manifest["label"].tolist() == [1, 1, 0]


# --- COVID-19 Radiography Database


@pytest.fixture
def covid(tmp_path):
    """A hand-made Radiography Database: two images a class, their masks, a third class."""
    tree = tmp_path / "db"
    for name in ("COVID", "Normal", "Viral Pneumonia"):
        for number in (1, 2):
            save(tree / name / "images" / f"{name}-{number}.png")
            save(tree / name / "masks" / f"{name}-{number}.png", 255, (10, 10))
        (tree / f"{name}.metadata.xlsx").write_bytes(b"x")
    return tree


PATHS = [f"{one}/images/{one}-{number}.png" for one in ("COVID", "Normal") for number in (1, 2)]


def test_covid_by_hand(covid):
    dataset = load("covid", covid.parent)
    assert dataset.root == covid and dataset.classes == ("Normal", "COVID")
    assert list(dataset.manifest["path"]) == PATHS
    assert list(dataset.manifest["label"]) == [1, 1, 0, 0] and dataset.manifest["patient"].is_unique
    masks = [[k, path.replace("images", "masks")] for k, path in enumerate(PATHS)]
    assert dataset.masks.values.tolist() == masks and dataset.masks["image"].dtype == "int64"
    need_every_file_accounted_for(dataset)
    part = datasets.take(dataset, [3, 0])
    assert list(part.manifest["path"]) == [PATHS[3], PATHS[0]]
    assert part.masks["path"].tolist() == [masks[3][1], masks[0][1]]
    assert datasets.take(dataset, []).masks.empty
    shutil.rmtree(covid / "Normal")
    with pytest.raises(DataNotFound, match="looks like covid but is not complete: .*has no Normal"):
        sources.find("covid", covid)


def test_covid_without_masks_and_old_version(covid, caplog):
    for name in ("COVID", "Normal"):
        shutil.rmtree(covid / name / "masks")
    assert load("covid", covid).masks.empty
    for name in ("COVID", "Normal"):
        for path in (covid / name / "images").iterdir():
            path.rename(covid / name / path.name)
    paths = [path.replace("images/", "") for path in PATHS]
    assert list(load("covid", covid).manifest["path"]) == paths
    assert "mask" not in caplog.text  # No masks folder: nothing is missing from it.


def test_covid_masks_that_do_not_match_are_counted(covid, caplog):
    (covid / "COVID" / "masks" / "COVID-1.png").unlink()
    save(covid / "Normal" / "masks" / "Normal-9.png")
    save(covid / "Normal" / "Normal-2.png")  # Left over from an old version: the same image again.
    dataset = load("covid", covid)
    assert "1 images have no mask, 1 masks have no image" in caplog.text
    assert list(dataset.manifest["path"]) == PATHS and list(dataset.masks["image"]) == [1, 2, 3]
    need_every_file_accounted_for(dataset)


@pytest.mark.parametrize("spelled", [("normal", "COVID"), ("NORMAL", "Covid")])
@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val", "test")])
def test_covid_splits_in_any_case(tmp_path, spelled, splits):
    for part in splits:
        for name in (*spelled, "other"):
            save(tmp_path / "covid_xray" / part / name / "1.png")
    dataset = load("covid", tmp_path)
    manifest = dataset.manifest
    assert set(manifest["class_name"]) == {"Normal", "COVID"} and len(manifest) == 2 * len(splits)
    assert (manifest["label"] == manifest["path"].str.lower().str.contains("covid/")).all()
    assert manifest["patient"].is_unique and dataset.split_rule == "official"
    assert set(dataset.ignored["reason"]) == {"not a class of this data set"}


# --- the real files


def test_links_are_followed_but_never_in_a_circle(tree, tmp_path):
    expected = load("pneumonia", tree).manifest
    normal, elsewhere = tree / "train" / "NORMAL", tmp_path / "elsewhere"
    normal.rename(elsewhere)
    normal.symlink_to(elsewhere)
    (tmp_path / "linked").symlink_to(tree)
    for root in (tree, tmp_path / "linked"):
        pd.testing.assert_frame_equal(load("pneumonia", root).manifest, expected)
    (elsewhere / "up").symlink_to(tree)  # one link to what it lies in, and two that lead in a ring
    (elsewhere / "over").symlink_to(tree / "train" / "PNEUMONIA")
    (tree / "train" / "PNEUMONIA" / "back").symlink_to(elsewhere)
    dataset = load("pneumonia", tree)
    pd.testing.assert_frame_equal(dataset.manifest, expected)
    circles = dataset.ignored[dataset.ignored["reason"] == "a link to a folder that it lies in"]
    assert set(circles["path"].map(lambda path: Path(path).name)) >= {"up", "over", "back"}


def test_real_pneumonia(real_data):
    manifest = load("pneumonia", real_data).manifest
    train, test = (manifest[manifest["split"] == name] for name in ("train", "test"))
    assert list(test["label"].value_counts().sort_index()) == [234, 390]
    assert list(train["label"].value_counts().sort_index()) == [1341, 3875]
    assert train.loc[train["label"] == 1, "patient"].nunique() == 1635
    assert test.loc[test["label"] == 1, "patient"].nunique() == 202
    assert len(set(train["patient"]) & set(test["patient"])) == 170


def test_real_covid(real_data):
    dataset = load("covid", real_data)
    assert np.bincount(dataset.manifest["label"]).tolist() == [1000, 1000]
    assert dataset.masks.empty and dataset.ignored.empty
    assert dataset.manifest["label"].eq(dataset.manifest["path"].str.startswith("COVID/")).all()
    assert datasets.check(dataset).empty
