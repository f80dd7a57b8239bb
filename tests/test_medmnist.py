"""MedMNIST: published files become data sets with the official split and the true pixels."""

import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from dlia_utils import run, study
from dlia_utils.data import cache, datasets, medmnist, phantom, sources, split
from dlia_utils.data.tables import BadData, DataNotFound
from tools import notebooks

COUNTS = {"train": 12, "val": 5, "test": 7}


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data set anywhere, and a home of the test's own."""
    for name in ("DLIA_DATA", "DLIA_DOWNLOAD", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "KAGGLE", tmp_path / "root")
    for name in ("DLIA_CACHE", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.rpartition("_")[2].lower()))
    monkeypatch.setattr(phantom, "MEDMNIST_IMAGES", COUNTS)


def arrays_of(flag, *, size=28, counts=COUNTS, colour=False, seed=0):
    """The six arrays of a file; the mean grey of an image is about 20 + 15 x its label."""
    rng, arrays = np.random.default_rng(seed), {}
    classes = len(medmnist.FLAGS[flag])
    for name, count in counts.items():
        labels = rng.permutation(np.arange(count) % classes)[:, None].astype(np.uint8)
        if flag == "chestmnist":
            labels = (rng.random((count, classes)) < 0.15).astype(np.uint8)
            labels[0], labels[1] = 0, np.eye(classes)[6]
        images = 20 + 15 * labels.sum(1)[:, None, None] + rng.integers(-3, 4, (count, size, size))
        images = images.astype(np.uint8)
        if colour:  # the level in green alone
            images = np.stack([images // 4, images, 255 - images], axis=3)
        arrays |= {f"{name}_images": images, f"{name}_labels": labels}
    return arrays


def write(folder, flag, *, size=28, arrays=None, save=np.savez_compressed):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = arrays_of(flag, size=size) if arrays is None else arrays
    save(folder / medmnist.file_name(flag, size), **arrays)
    return arrays


def together(arrays, what):
    return np.concatenate([arrays[f"{name}_{what}"] for name in COUNTS])


def load(name, folder):
    return datasets.load(sources.find(name, folder))


@pytest.mark.parametrize(
    "flag, size, save",
    [
        ("pneumoniamnist", 28, np.savez),
        ("octmnist", 64, np.savez_compressed),
        ("dermamnist", 28, np.savez),
    ],
)
def test_pixels_labels_and_split_are_the_files_own(tmp_path, flag, size, save):
    arrays = arrays_of(flag, size=size, colour=flag == "dermamnist")
    write(tmp_path / "told", flag, size=size, arrays=arrays, save=save)
    dataset = load(flag if size == 28 else f"{flag}_{size}", tmp_path / "told")
    manifest, names = dataset.manifest, medmnist.FLAGS[flag]
    assert dataset.classes == names and not dataset.synthetic
    assert manifest["split"].tolist() == [name for name, n in COUNTS.items() for _ in range(n)]
    assert manifest["label"].tolist() == together(arrays, "labels")[:, 0].tolist()
    assert manifest["class_name"].tolist() == [names[label] for label in manifest["label"]]
    assert manifest["patient"].is_unique and datasets.check(dataset).empty
    cached = cache.build(dataset, size=size, progress=False)
    published = together(arrays, "images")
    grey = published @ (0.299, 0.587, 0.114) if published.ndim == 4 else published
    assert np.abs(cached.images.astype(float) - grey).max() <= 1
    assert (cached.shapes == size).all() and not list(tmp_path.rglob("*.png"))
    assert ("grey" in dataset.split_rule) == (flag == "dermamnist")
    assert dataset.split_rule.startswith(f"official; images of {size} px")
    assert "patients unknown" in dataset.split_rule


def test_labels_without_their_column_are_read_alike(tmp_path):
    arrays = write(tmp_path / "official", "breastmnist")
    flat = {name: found.ravel() if "labels" in name else found for name, found in arrays.items()}
    write(tmp_path / "copy", "breastmnist", arrays=flat)
    pair = [load("breastmnist", tmp_path / name).manifest for name in ("official", "copy")]
    assert pair[0]["label"].tolist() == pair[1]["label"].tolist()
    arrays = arrays_of("chestmnist")
    write(tmp_path, "chestmnist", arrays=arrays | {"val_labels": arrays["val_labels"].ravel()})
    with pytest.raises(BadData, match=r"val_labels is not \[5, 14\]"):  # 14 findings need columns
        load("chestmnist", tmp_path)


@pytest.mark.parametrize(
    "name, sizes",
    {
        "pneumoniamnist": (28, 28, 48),
        "chestmnist-edema": (28, 28, 48),
        "pneumoniamnist_64": (128, 64, 48),
        "covid": (128, 64, 48),
    }.items(),
)
def test_notebook_04_does_not_enlarge_28_px_by_itself(name, sizes):
    notebook = notebooks.read(notebooks.product(notebooks.sources(["04"])[0]))
    cells = [cell.source for cell in notebook.cells if "settings" in notebooks.tags(cell)]
    given = {"CHANGES": {"dataset": name}}
    exec("\n".join(cells), given)
    assert tuple(given[profile]["size"] for profile in ("FULL", "CPU", "SMOKE")) == sizes


def test_a_part_of_the_images_in_another_order(tmp_path):
    arrays = write(tmp_path, "octmnist")
    arrays["test_images"][3] = arrays["train_images"][5]
    write(tmp_path, "octmnist", arrays=arrays)
    whole, rows = load("octmnist", tmp_path), [15, 3, 20, 5]
    part = datasets.take(whole, rows)
    decoded = cache.build(part, size=28, progress=False)
    assert np.array_equal(decoded.images, together(arrays, "images")[rows])
    audit = split.audit(whole).set_index("check")["count"]
    assert audit["identical files in train and test"] == 1
    assert datasets.lengths(whole) != datasets.lengths(part)
    write(tmp_path, "octmnist", arrays=arrays_of("octmnist", seed=1))  # same paths, other pixels
    assert cache.build(load("octmnist", tmp_path), size=28, progress=False).key != decoded.key


def test_findings_become_two_classes_and_the_disease_is_class_one(tmp_path):
    arrays = write(tmp_path, "chestmnist")
    labels = together(arrays, "labels")
    some, one = load("chestmnist", tmp_path), load("chestmnist-pneumonia", tmp_path)
    assert some.classes == ("no finding", "finding")
    assert some.manifest["label"].tolist() == labels.any(1).astype(int).tolist()
    assert one.classes == ("no pneumonia", "pneumonia") and one.name == "chestmnist-pneumonia"
    assert one.manifest["label"].tolist() == labels[:, 6].tolist()
    arrays["train_labels"][:, 13] = 0
    write(tmp_path, "chestmnist", arrays=arrays)
    with pytest.raises(BadData, match="chestmnist-hernia has no training image of hernia"):
        load("chestmnist-hernia", tmp_path)
    arrays, dataset = write(tmp_path, "breastmnist"), load("breastmnist", tmp_path)
    assert dataset.classes == ("normal or benign", "malignant")
    assert dataset.manifest["label"].tolist() == (1 - together(arrays, "labels")[:, 0]).tolist()


def test_the_smallest_file_that_is_large_enough(tmp_path):
    folder = tmp_path / "home" / ".medmnist"
    write(folder, "pneumoniamnist", size=28)
    found = sources.find("pneumoniamnist")
    assert (found.root, found.origin, found.synthetic) == (folder, "~/.medmnist", False)
    with pytest.raises(DataNotFound, match="has pneumoniamnist_64.npz or pneumoniamnist_128.npz"):
        sources.find("pneumoniamnist_64", folder)
    for size in (128, 64):
        write(folder, "pneumoniamnist", size=size)
        assert f"images of {size} px" in load("pneumoniamnist_64", folder).split_rule
    write(tmp_path / "root" / "input" / "datasets" / "a" / "b" / "c", "breastmnist", size=64)
    assert sources.find("breastmnist_64").origin == "kaggle"


@pytest.mark.parametrize("name", ["organmnist3d", "mnist", "octmnist_32", "octmnist-drusen"])
def test_wrong_names(name):
    with pytest.raises(ValueError, match=f"'{name}'.*pathmnist, chestmnist"):
        sources.find(name)


WRONG = {
    "volumes": ({"train_images": np.zeros((12, 28, 28, 28), np.uint8)}, r"\[12, 28, 28, 28\]"),
    "unequal": ({"test_labels": np.zeros((6, 1), int)}, r"test_labels is not \[7, 1\]"),
    "other set": ({"train_labels": np.full((12, 1), 7)}, "from 0 to 3"),
    "floats": ({"train_images": np.zeros((12, 28, 28))}, "train_images is float64"),
    "objects": ({"train_labels": np.array([[None]] * 12)}, "damaged"),
}


@pytest.mark.parametrize("changed, message", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_by_name(tmp_path, changed, message):
    write(tmp_path, "octmnist", arrays=arrays_of("octmnist") | changed)
    with pytest.raises(BadData, match=f"octmnist.npz (.|\n)*{message}(.|\n)*Fix: download"):
        load("octmnist", tmp_path)


def test_a_file_cut_short_or_damaged_is_refused(tmp_path):
    path = tmp_path / "octmnist.npz"
    arrays = write(tmp_path, "octmnist", save=np.savez)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadData, match="octmnist.npz is damaged.*Fix: download octmnist.npz"):
        load("octmnist", tmp_path)
    at = whole.index(arrays["train_images"].tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])  # one pixel
    with pytest.raises(BadData, match="damaged.*CRC"):
        cache.build(load("octmnist", tmp_path), size=28, progress=False)


@pytest.mark.parametrize("name", ["dermamnist", "chestmnist_64", "pneumoniamnist"])
def test_phantom_is_found_marked_and_learnable(tmp_path, name):
    found = sources.find(name)
    assert found.synthetic and found.origin == "phantom"
    assert sources.find(name, found.root).synthetic  # However it is named, it stays synthetic.
    dataset = datasets.load(found)
    assert dataset.synthetic and dataset.manifest["split"].value_counts().to_dict() == COUNTS
    decoded = cache.build(dataset, size=28, progress=False).images.astype(float)
    labels = dataset.manifest["label"].to_numpy()
    assert not np.allclose(decoded[labels == 0].mean(0), decoded[labels == 1].mean(0), atol=20)
    again = phantom.write_medmnist(tmp_path / "again", name=name)
    for file, array in np.load(next(again.glob("*.npz"))).items():
        assert np.array_equal(array, np.load(next(found.root.glob("*.npz")))[file])


def test_download_only_when_asked(tmp_path, monkeypatch):
    asked = []

    class Fake:
        def __init__(self, split, download, root, size):
            asked.append((split, download, size))
            write(Path(root), "breastmnist", size=size)

    class Offline:
        def __init__(self, **_):
            raise RuntimeError("Automatic download failed!")

    package = types.ModuleType("medmnist")
    classes = {"breastmnist": "Fake", "octmnist": "Offline"}
    package.INFO = {flag: {"python_class": name} for flag, name in classes.items()}
    package.Fake, package.Offline = Fake, Offline
    monkeypatch.setitem(sys.modules, "medmnist", package)
    assert sources.find("breastmnist_64").origin == "phantom" and not asked
    monkeypatch.setenv("DLIA_DOWNLOAD", "1")
    found = sources.find("breastmnist_64")
    assert (found.origin, found.synthetic) == ("medmnist", False)
    assert asked == [("val", True, 64)] and os.listdir(found.root) == ["breastmnist_64.npz"]
    assert sources.find("breastmnist_64").origin == "~/.medmnist" and len(asked) == 1
    with pytest.raises(DataNotFound, match="put octmnist.npz .* into .* yourself"):
        sources.find("octmnist")
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(DataNotFound, match="pip install medmnist"):
        sources.find("octmnist")


def test_a_study_keeps_the_official_split(tmp_path):
    counts = {"train": 28, "val": 14, "test": 14}
    write(tmp_path / "told", "dermamnist", arrays=arrays_of("dermamnist", counts=counts))
    location = sources.find("dermamnist", tmp_path / "told")
    settings = {"size": 28, "seed": 0, "per_class": None, "val_share": 0.15, "test_share": 0.15}
    about = dict(notebook="test", profile="smoke", run_dir=tmp_path / "run", values=settings)
    opened = study.open_study(run.Run(location=location, **about))
    official = datasets.load(location).manifest["split"]
    assert opened.dataset.manifest["split"].tolist() == official.tolist()
    assert opened.class_weights() == (1.0,) * 7 and opened.key["files"]
