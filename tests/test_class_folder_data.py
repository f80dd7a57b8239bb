"""Sets that are only folders of classes: TB Chest Radiography Database, both COVID trees, and their traps."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from dlia_utils.data import cache, datasets, phantom, sources


def load(name, root):
    return datasets.load(sources.find(name, root))


def save(path, value=7, side=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (side, side), value).save(path, "PNG")


def need_every_file_accounted_for(dataset):
    """No file of the tree is passed over without a word, and none counts twice."""
    found = sorted(
        path.relative_to(dataset.root).as_posix()
        for path in dataset.root.rglob("*")
        if path.is_file()
    )
    named = [*dataset.manifest["path"], *dataset.ignored["path"], *dataset.masks["path"]]
    assert sorted(named) == found


@pytest.fixture(scope="module")
def tuberculosis_tree(tmp_path_factory):
    return phantom.write_tuberculosis(tmp_path_factory.mktemp("tb"), images=(15, 3), size=40)


@pytest.fixture(scope="module")
def covid_tree(tmp_path_factory):
    return phantom.write_covid(tmp_path_factory.mktemp("covid"), images=(30, 30), size=48)


@pytest.fixture
def covid_by_hand(tmp_path):
    """A hand-made Radiography Database: two films a class, their masks, a class that is not read."""
    tree = tmp_path / "db"
    for name in ("COVID", "Normal", "Viral Pneumonia"):
        for number in (1, 2):
            save(tree / name / "images" / f"{name}-{number}.png")
            save(tree / name / "masks" / f"{name}-{number}.png", 255, side=10)
        (tree / f"{name}.metadata.xlsx").write_bytes(b"x")
    return tree


# --- TB Chest Radiography Database


def test_tuberculosis(tuberculosis_tree):
    dataset = load("tuberculosis", tuberculosis_tree)
    manifest = dataset.manifest
    assert dataset.classes == ("Normal", "Tuberculosis") and dataset.synthetic
    assert manifest["class_name"].value_counts().to_dict() == {"Normal": 15, "Tuberculosis": 3}
    assert (manifest["label"] == manifest["path"].str.startswith("Tuberculosis/")).all()
    assert (
        set(manifest["split"]) == set(manifest["group"]) == {""} and manifest["patient"].is_unique
    )
    reasons = dict(zip(dataset.ignored["path"], dataset.ignored["reason"], strict=True))
    assert (
        reasons["Normal.metadata.xlsx"] == reasons["README.md.txt"] == "outside the class folders"
    )
    assert len(reasons) == 4 and dataset.split_rule == "none published"
    need_every_file_accounted_for(dataset)
    modes = {Image.open(tuberculosis_tree / path).mode for path in manifest["path"]}
    assert modes == {"L", "RGB"}
    assert cache.build(dataset, size=16, progress=False).images.shape == (18, 16, 16)


def test_tuberculosis_refuses_an_empty_class_and_names_a_missing_one(tuberculosis_tree, tmp_path):
    tree = Path(shutil.copytree(tuberculosis_tree, tmp_path / "copy"))
    location = sources.find("tuberculosis", tree)
    for path in tree.glob("Tuberculosis/*.png"):
        path.unlink()
    with pytest.raises(datasets.BadData, match="no images in Tuberculosis. Fix: unpack"):
        datasets.load(location)
    (tree / "Tuberculosis").rmdir()
    with pytest.raises(sources.DataNotFound, match="has no Tuberculosis"):
        datasets.load(location)


def test_tuberculosis_opacities_lie_high_up():
    upper, anywhere = [], []
    for seed in range(16):
        for level, rows in ((True, upper), (False, anywhere)):
            rng = np.random.default_rng(seed)
            _, lesion, lungs = phantom.chest_with_lungs(rng, size=48, diseased=True, upper=level)
            assert not (lesion & ~lungs).any()
            rows.append(np.nonzero(lesion)[0].mean() / 48)
    assert max(upper) < 0.55 < max(anywhere) and np.mean(upper) < np.mean(anywhere) - 0.08


# --- COVID-19 Radiography Database


def test_covid_by_hand(covid_by_hand):
    dataset = load("covid", covid_by_hand.parent)
    assert dataset.root == covid_by_hand and dataset.classes == ("Normal", "COVID")
    expected = [
        f"{name}/images/{name}-{number}.png" for name in ("COVID", "Normal") for number in (1, 2)
    ]
    assert list(dataset.manifest["path"]) == expected and list(dataset.manifest["label"]) == [
        1,
        1,
        0,
        0,
    ]
    assert set(dataset.manifest["split"]) == set(dataset.manifest["group"]) == {""}
    assert dataset.manifest["patient"].is_unique
    assert dataset.masks.values.tolist() == [
        [k, path.replace("images", "masks")] for k, path in enumerate(expected)
    ]
    assert dataset.masks["image"].dtype == "int64"
    assert dataset.ignored["reason"].value_counts().to_dict() == {
        "not a class of this study": 4,
        "outside the class folders": 3,
    }
    need_every_file_accounted_for(dataset)


def test_covid_without_masks_and_old_version(covid_by_hand, caplog):
    shutil.rmtree(covid_by_hand / "COVID" / "masks")
    shutil.rmtree(covid_by_hand / "Normal" / "masks")
    assert load("covid", covid_by_hand).masks.empty
    for name in ("COVID", "Normal"):
        for path in (covid_by_hand / name / "images").iterdir():
            path.rename(covid_by_hand / name / path.name)
        (covid_by_hand / name / "images").rmdir()
    dataset = load("covid", covid_by_hand)
    assert list(dataset.manifest["path"]) == [
        "COVID/COVID-1.png",
        "COVID/COVID-2.png",
        "Normal/Normal-1.png",
        "Normal/Normal-2.png",
    ]
    assert "masks" not in caplog.text  # No masks folder: nothing is missing from it.


def test_covid_masks_that_do_not_match_are_counted(covid_by_hand, caplog):
    (covid_by_hand / "COVID" / "masks" / "COVID-1.png").unlink()
    save(covid_by_hand / "Normal" / "masks" / "Normal-9.png")
    save(
        covid_by_hand / "Normal" / "Normal-2.png"
    )  # Left over from an old version: the same film again.
    dataset = load("covid", covid_by_hand)
    assert "1 images have no mask and 1 masks have no image" in caplog.text
    assert len(dataset.manifest) == 4 and list(dataset.masks["image"]) == [1, 2, 3]
    reasons = dict(zip(dataset.ignored["path"], dataset.ignored["reason"], strict=True))
    assert reasons["Normal/masks/Normal-9.png"] == "mask without an image"
    assert reasons["Normal/Normal-2.png"] == "second copy of an image"
    need_every_file_accounted_for(dataset)


def test_masks_stay_with_their_films(covid_by_hand):
    dataset = load("covid", covid_by_hand)
    part = datasets.take(dataset, [3, 0])
    assert list(part.manifest["path"]) == ["Normal/images/Normal-2.png", "COVID/images/COVID-1.png"]
    assert part.masks.values.tolist() == [
        [0, "Normal/masks/Normal-2.png"],
        [1, "COVID/masks/COVID-1.png"],
    ]
    assert datasets.take(dataset, []).masks.empty


def test_half_a_covid_set_is_named(covid_by_hand):
    shutil.rmtree(covid_by_hand / "Normal")
    with pytest.raises(
        sources.DataNotFound, match="looks like covid but is not complete: .* has no Normal"
    ):
        sources.find("covid", covid_by_hand)


# --- the phantom and its shortcut


def test_covid_phantom(covid_tree):
    dataset = load("covid", covid_tree)
    assert (
        len(dataset.manifest) == 60 and dataset.manifest["label"].sum() == 30 and dataset.synthetic
    )
    assert list(dataset.masks["image"]) == list(range(60))
    need_every_file_accounted_for(dataset)
    first = dataset.masks.iloc[0]
    with (
        Image.open(covid_tree / first["path"]) as mask,
        Image.open(covid_tree / dataset.manifest["path"][0]) as film,
    ):
        assert mask.size == (41, 41) and film.size == (48, 48)
    brightness = []
    for row, path in dataset.masks.values[:20]:
        film = np.asarray(Image.open(covid_tree / dataset.manifest["path"][row]), dtype=float)
        lungs = (
            np.asarray(Image.open(covid_tree / path).resize((48, 48), Image.Resampling.NEAREST)) > 0
        )
        assert 0.1 < lungs.mean() < 0.6
        brightness.append(film[lungs].mean() - film[16:, 12:36][~lungs[16:, 12:36]].mean())
    assert max(brightness) < 0  # Air is darker than what lies between and below the lungs.


def test_covid_phantom_has_the_shortcut_it_says(covid_tree):
    truth = pd.read_csv(covid_tree.parent / "phantom_truth.csv", keep_default_na=False)
    dataset = load("covid", covid_tree)
    assert list(truth["path"]) == list(dataset.manifest["path"])
    labels = dataset.manifest["label"].to_numpy()
    assert truth["marker"][labels == 1].mean() == pytest.approx(0.75, abs=0.04)
    assert truth["marker"][labels == 0].mean() == pytest.approx(0.25, abs=0.04)
    corner = [np.asarray(Image.open(covid_tree / path))[1:5, 1].mean() for path in truth["path"]]
    assert roc_auc_score(truth["marker"], corner) == 1  # The marker is where the truth says it is,
    assert (
        0.65 < roc_auc_score(labels, corner) < 0.9
    )  # and the corner alone tells the classes apart, not wholly.
    bare = (truth["marker"] == 0).to_numpy()
    assert (
        0.2 < roc_auc_score(labels[bare], np.array(corner)[bare]) < 0.8
    )  # Nothing but the marker does.


def test_covid_phantom_has_near_duplicates(covid_tree):
    truth = pd.read_csv(covid_tree.parent / "phantom_truth.csv", keep_default_na=False).set_index(
        "path"
    )
    films = {
        path: np.asarray(Image.open(covid_tree / path), dtype=float).ravel() for path in truth.index
    }
    twins = truth.index[truth["twin_of"] != ""]
    assert len(twins) == 4
    for path in twins:
        twin = truth.loc[path, "twin_of"]
        likeness = {
            other: np.corrcoef(films[path], films[other])[0, 1] for other in films if other != path
        }
        assert max(likeness, key=likeness.get) == twin and likeness[twin] > 0.995
        assert (
            path.split("/")[0] == twin.split("/")[0]
            and truth.loc[path, "marker"] == truth.loc[twin, "marker"]
        )
        assert not np.array_equal(films[path], films[twin])


@pytest.mark.parametrize(
    "write, options",
    [
        (phantom.write_tuberculosis, {"images": (4, 2)}),
        (phantom.write_covid, {"images": (6, 6)}),
        (phantom.write_covid, {"images": (16, 16), "layout": "splits"}),
    ],
)
def test_same_seed_same_bytes(tmp_path, write, options):
    def hashes(folder, seed):
        write(tmp_path / folder, seed=seed, size=24, **options)
        paths = sorted(path for path in (tmp_path / folder).rglob("*") if path.is_file())
        return [
            (p.relative_to(tmp_path / folder).as_posix(), hashlib.sha1(p.read_bytes()).hexdigest())
            for p in paths
        ]

    assert hashes("a", 3) == hashes("b", 3) != hashes("c", 4)


# --- covid_xray


def test_covid_splits_phantom(tmp_path):
    tree = phantom.write_covid(tmp_path, images=(30, 30), size=24, layout="splits")
    dataset = load("covid", tmp_path)
    assert dataset.root == tree and dataset.masks.empty and dataset.split_rule == "official"
    counts = dataset.manifest.groupby(["split", "class_name"]).size().to_dict()
    assert counts == {
        (part, name): n
        for part, n in (("train", 21), ("val", 5), ("test", 4))
        for name in ("COVID", "Normal")
    }
    assert (dataset.manifest["split"] == dataset.manifest["path"].str.split("/").str[0]).all()
    assert dict(dataset.ignored["reason"].value_counts()) == {"hidden file or folder": 1}
    need_every_file_accounted_for(dataset)
    with pytest.raises(ValueError, match="layout is 'zip'; it must be radiography or splits"):
        phantom.write_covid(tmp_path, layout="zip")


@pytest.mark.parametrize("spelled", [("normal", "COVID"), ("Normal", "covid"), ("NORMAL", "Covid")])
@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val", "test")])
def test_covid_splits_in_any_case(tmp_path, spelled, splits):
    for part in splits:
        for name in spelled:
            save(tmp_path / "covid_xray" / part / name / "1.png")
    (tmp_path / "covid_xray" / "train" / "other").mkdir()
    save(tmp_path / "covid_xray" / "train" / "other" / "x.png")
    dataset = load("covid", tmp_path)
    assert set(dataset.manifest["class_name"]) == {"Normal", "COVID"} and len(
        dataset.manifest
    ) == 2 * len(splits)
    assert (
        dataset.manifest["label"] == dataset.manifest["path"].str.lower().str.contains("covid/")
    ).all()
    assert dataset.manifest[
        "patient"
    ].is_unique  # The same name in two folders is not the same film.
    assert list(dataset.ignored["reason"]) == ["not a class of this study"]


def test_covid_splits_refuse_an_empty_class(tmp_path):
    for part in ("train", "val", "test"):
        for name in ("normal", "COVID"):
            save(tmp_path / part / name / "1.png")
    (tmp_path / "val" / "normal" / "1.png").unlink()
    with pytest.raises(datasets.BadData, match="no images in val/Normal.*val/ may be left out"):
        load("covid", tmp_path)


def test_covid_and_pneumonia_are_told_apart(tmp_path, covid_tree):
    phantom.write_pneumonia(tmp_path, images={"train": (2, 2), "test": (2, 2)}, size=16)
    trees = "COVID, Normal; or train/COVID or train/covid"
    with pytest.raises(sources.DataNotFound, match=f"does not hold covid: .* {trees}"):
        sources.find("covid", tmp_path)
    with pytest.raises(sources.DataNotFound, match="does not hold pneumonia"):
        sources.find("pneumonia", covid_tree)
    with pytest.raises(sources.DataNotFound, match="does not hold tuberculosis"):
        sources.find("tuberculosis", covid_tree)


# --- the real files


def test_real_covid(real_data):
    dataset = load("covid", real_data)
    assert dataset.manifest["class_name"].value_counts().to_dict() == {
        "COVID": 1000,
        "Normal": 1000,
    }
    assert dataset.masks.empty and set(dataset.manifest["split"]) == {""} and dataset.ignored.empty
    assert (
        dataset.manifest["label"] == dataset.manifest["path"].str.startswith("COVID/images/")
    ).all()
    assert datasets.check(dataset).empty
