"""MedMNIST: files in the published format become data sets with the official split and the true pixels."""

import os
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlia_utils import run, study, train
from dlia_utils.data import cache, datasets, medmnist, phantom, sources, split
from dlia_utils.models import resnet18_cifar
from dlia_utils.objectives import cross_entropy

COUNTS = {"train": 12, "val": 5, "test": 7}
LUMINANCE = (0.299, 0.587, 0.114)


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data set anywhere, and a home of the test's own."""
    for name in ("DLIA_DATA", "DLIA_DOWNLOAD", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DLIA_KAGGLE_ROOT", str(tmp_path / "kaggle"))
    monkeypatch.setenv("DLIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setattr(
        sources, "__file__", str(tmp_path / "repository" / "dlia_utils" / "locate.py")
    )


def arrays_of(flag, *, size=28, counts=COUNTS, seed=0):
    """The six arrays of a file; the mean grey of an image is 20 + 15 x its label (findings: x how many), nearly."""
    rng, published, arrays = np.random.default_rng(seed), medmnist.FLAGS[flag], {}
    classes = len(published.names)
    for name, count in counts.items():
        if published.findings:
            labels = (rng.random((count, classes)) < 0.15).astype(np.uint8)
            labels[0], labels[1] = 0, np.eye(classes)[6]
            level = labels.sum(1)
        else:
            labels = rng.permutation(np.arange(count) % classes)[:, None].astype(np.uint8)
            level = labels[:, 0]
        images = (20 + 15 * level[:, None, None] + rng.integers(-3, 4, (count, size, size))).astype(
            np.uint8
        )
        if published.colour:  # the level in green alone
            images = np.stack([images // 4, images, 255 - images], axis=3)
        arrays |= {f"{name}_images": images, f"{name}_labels": labels}
    return arrays


def write(folder, flag, *, size=28, arrays=None, save=np.savez_compressed):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = arrays_of(flag, size=size) if arrays is None else arrays
    save(folder / medmnist.file_name(flag, size), **arrays)
    return arrays


def load(name, folder):
    return datasets.load(sources.find(name, folder))


def together(arrays, what):
    return np.concatenate([arrays[f"{name}_{what}"] for name in COUNTS])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "flag, size", [("pneumoniamnist", 64), ("organamnist", 28), ("dermamnist", 28)]
)
def test_pixels_labels_and_split_are_the_files_own(tmp_path, flag, size, save):
    arrays = write(tmp_path / "told", flag, size=size, save=save)
    dataset = load(flag if size == 28 else f"{flag}_{size}", tmp_path / "told")
    manifest, names = dataset.manifest, medmnist.FLAGS[flag].names
    assert (
        list(manifest.columns) == list(datasets.COLUMNS)
        and dataset.classes == names
        and not dataset.synthetic
    )
    assert manifest["split"].tolist() == [
        name for name, count in COUNTS.items() for _ in range(count)
    ]
    assert manifest["label"].tolist() == together(arrays, "labels")[:, 0].tolist()
    assert manifest["class_name"].tolist() == [names[label] for label in manifest["label"]]
    assert manifest["patient"].is_unique and datasets.check(dataset).empty
    decoded = cache.build(dataset, size=size, progress=False).images.astype(float)
    published = together(arrays, "images")
    grey = published @ LUMINANCE if published.ndim == 4 else published
    assert np.abs(decoded - grey).max() <= 1
    assert ("luminance" in dataset.split_rule) == (flag == "dermamnist")
    assert (
        dataset.split_rule.startswith(f"official; images of {size} px")
        and "patients unknown" in dataset.split_rule
    )


def test_images_are_in_their_order_across_blocks_and_in_fortran_order(tmp_path, monkeypatch):
    monkeypatch.setattr(medmnist, "BLOCK", 5)
    arrays = write(tmp_path / "told", "octmnist")
    for order in "CF":
        arrays["train_images"] = np.asarray(arrays["train_images"], order=order)
        write(tmp_path / order, "octmnist", arrays=arrays)
        decoded = cache.build(load("octmnist", tmp_path / order), size=28, progress=False)
        assert np.array_equal(decoded.images, together(arrays, "images"))


def test_findings_become_two_classes(tmp_path):
    arrays = write(tmp_path, "chestmnist")
    labels = together(arrays, "labels")
    some = load("chestmnist", tmp_path)
    assert some.classes == ("no finding", "finding")
    assert some.manifest["label"].tolist() == labels.any(1).astype(int).tolist()
    one = load("chestmnist-pneumonia", tmp_path)
    assert one.classes == ("no pneumonia", "pneumonia") and one.name == "chestmnist-pneumonia"
    assert (
        one.manifest["label"].tolist() == labels[:, 6].tolist() != some.manifest["label"].tolist()
    )
    assert one.root == some.root  # unpacked once
    arrays["train_labels"][:, 13] = 0
    write(tmp_path, "chestmnist", arrays=arrays)
    with pytest.raises(datasets.BadData, match="chestmnist-hernia has no training image of hernia"):
        load("chestmnist-hernia", tmp_path)


def test_grades_and_the_disease_as_class_one(tmp_path):
    write(tmp_path, "retinamnist")
    assert load("retinamnist", tmp_path).classes == (
        "grade 0",
        "grade 1",
        "grade 2",
        "grade 3",
        "grade 4",
    )
    arrays = write(tmp_path, "breastmnist")
    dataset = load("breastmnist", tmp_path)
    assert (
        dataset.classes == ("normal or benign", "malignant")
        and "1 is malignant" in dataset.split_rule
    )
    assert dataset.manifest["label"].tolist() == (1 - together(arrays, "labels")[:, 0]).tolist()


def test_the_smallest_file_that_is_large_enough(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "home" / ".medmnist"
    write(folder, "pneumoniamnist", size=28)
    found = sources.find("pneumoniamnist")
    assert (found.root, found.origin, found.synthetic) == (folder, "~/.medmnist", False)
    with pytest.raises(
        sources.DataNotFound,
        match=r"pneumoniamnist.npz, but pneumoniamnist_64 needs 64 px or more\. "
        r"Put pneumoniamnist_64.npz there, or name the data set 'pneumoniamnist'",
    ):
        sources.find("pneumoniamnist_64", folder)
    monkeypatch.setattr(phantom, "MEDMNIST_IMAGES", COUNTS)
    assert sources.find("pneumoniamnist_64").synthetic and "passed over" in caplog.text
    assert "has pneumoniamnist.npz, but pneumoniamnist_64 needs 64 px" in caplog.text
    write(folder, "pneumoniamnist", size=128)
    assert "images of 128 px" in load("pneumoniamnist_64", folder).split_rule
    write(folder, "pneumoniamnist", size=64)
    assert "images of 64 px" in load("pneumoniamnist_64", folder).split_rule
    assert "images of 28 px" in load("pneumoniamnist", folder).split_rule


@pytest.mark.parametrize(
    "place", ["repository/data/medmnist", "kaggle/input/a-copy", "kaggle/input/datasets/a/b/c"]
)
def test_usual_places(tmp_path, place):
    write(tmp_path / place, "breastmnist", size=64)
    assert sources.find("breastmnist_64").root == tmp_path / place
    assert sources.find_first(("pneumonia", "breastmnist_64")).dataset == "breastmnist_64"


@pytest.mark.parametrize(
    "name, message",
    [
        ("organmnist3d", "organmnist3d holds volumes.*pathmnist, chestmnist"),
        ("nodulemnist3d_64", "holds volumes"),
        ("mnist", "unknown data set 'mnist'; known: pneumonia, .*pathmnist, chestmnist"),
        ("lungmnist", "unknown MedMNIST set 'lungmnist'. Name a 2-D set: pathmnist"),
        (
            "octmnist_32",
            "no 'octmnist_32'; the sizes are octmnist, octmnist_64, octmnist_128, octmnist_224",
        ),
        ("chestmnist-Edema", "no finding 'Edema': name one of atelectasis, .*hernia"),
        ("octmnist-drusen", "no finding 'drusen': name the set 'octmnist' as a whole"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(ValueError, match=message):
        sources.find(name)


def spoil(arrays, how):
    if how == "volumes":
        arrays |= {
            f"{name}_images": np.zeros((n, 28, 28, 28), np.uint8) for name, n in COUNTS.items()
        }
    elif how == "lost array":
        del arrays["val_labels"]
    elif how == "unequal":
        arrays["test_images"] = arrays["test_images"][:-1]
    elif how == "empty":
        arrays |= {"val_images": arrays["val_images"][:0], "val_labels": arrays["val_labels"][:0]}
    elif how == "other set":
        arrays["train_labels"] = arrays["train_labels"] + 7
    elif how == "findings":
        arrays["train_labels"] = np.zeros((12, 14), np.uint8)
    elif how == "floats":
        arrays["train_images"] = arrays["train_images"] / 255.0
    elif how == "objects":
        arrays["train_labels"] = np.array([[None]] * 12)
    elif how == "size":
        arrays["val_images"] = np.zeros((5, 64, 64), np.uint8)


@pytest.mark.parametrize(
    "how, message",
    [
        ("volumes", r"train_images is uint8 \[12, 28, 28, 28\]: volumes"),
        (
            "lost array",
            "octmnist.npz has no array val_labels; it has .*test_labels. Fix: download octmnist.npz again",
        ),
        ("unequal", "test has 6 images and 7 labels"),
        ("empty", "val has 0 images and 0 labels"),
        ("other set", "train_labels has numbers outside 0 to 3"),
        ("findings", r"train_labels is uint8 \[12, 14\]; it must be whole numbers \[N, 1\]"),
        ("floats", r"train_images is float64 .* must be uint8 \[N, 28, 28\]"),
        ("objects", "train_labels is object"),
        ("size", r"val_images is uint8 \[5, 64, 64\]"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, how, message):
    arrays = arrays_of("octmnist")
    spoil(arrays, how)
    write(tmp_path / "told", "octmnist", arrays=arrays)
    with pytest.raises(datasets.BadData, match=message) as caught:
        load("octmnist", tmp_path / "told")
    assert "Fix: " in str(caught.value) and "octmnist.npz" in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.png"))


def test_a_file_cut_short_or_damaged_is_refused(tmp_path):
    path = tmp_path / "told" / "octmnist.npz"
    write(path.parent, "octmnist", save=np.savez)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        datasets.BadData,
        match="octmnist.npz is damaged or was cut short.*Fix: download octmnist.npz",
    ):
        load("octmnist", path.parent)
    at = zipfile.ZipFile(_rewritten(path, whole)).getinfo("train_images.npy").header_offset + 1000
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])  # one pixel
    with pytest.raises(datasets.BadData, match="damaged.*CRC"):
        load("octmnist", path.parent)
    assert not list((tmp_path / "cache").rglob("*.png"))


def _rewritten(path, content):
    path.write_bytes(content)
    return path


class Killed(BaseException):
    pass


@pytest.mark.parametrize("gently", [True, False])
def test_nothing_half_written_is_used_when_the_unpacking_is_killed(tmp_path, monkeypatch, gently):
    arrays = write(tmp_path / "told", "octmnist")
    real_save, written = Image.Image.save, []

    def save(self, path, *rest, **options):
        written.append(path)
        if len(written) > 8:
            raise Killed
        real_save(self, path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        if not gently:  # as after SIGKILL: nobody clears up
            patch.setattr(medmnist.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            load("octmnist", tmp_path / "told")
    folder = tmp_path / "cache" / "medmnist"
    assert [one.name for one in folder.iterdir() if one.is_dir() and ".part-" not in one.name] == []
    assert bool(list(folder.glob("*.part-*"))) != gently
    dataset = load("octmnist", tmp_path / "told")
    assert np.array_equal(
        cache.build(dataset, size=28, progress=False).images, together(arrays, "images")
    )
    assert not list(folder.glob("*.part-*"))


def test_unpacked_once_and_anew_for_another_file(tmp_path):
    write(tmp_path / "a", "octmnist")
    first = load("octmnist", tmp_path / "a")
    made = (first.root / medmnist.LABELS).stat().st_mtime_ns
    write(tmp_path / "b", "octmnist")  # the same content, another time and place
    again = load("octmnist", tmp_path / "b")
    assert again.root == first.root and (first.root / medmnist.LABELS).stat().st_mtime_ns == made
    assert split.split_hash(again) == split.split_hash(first)
    write(tmp_path / "b", "octmnist", arrays=arrays_of("octmnist", seed=1))
    assert load("octmnist", tmp_path / "b").root != first.root


def test_phantom_is_found_and_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "MEDMNIST_IMAGES", {"train": 16, "val": 14, "test": 14})
    found = sources.find("dermamnist")
    assert (
        found.synthetic
        and found.origin == "phantom"
        and found.root.is_relative_to(tmp_path / "cache")
    )
    assert datasets.load(found).synthetic
    assert sources.find(
        "dermamnist", found.root
    ).synthetic  # However it is named, it stays synthetic.
    arrays = np.load(found.root / "dermamnist.npz")
    assert arrays["train_images"].shape == (16, 28, 28, 3) and arrays["val_labels"].shape == (14, 1)
    assert np.bincount(arrays["val_labels"][:, 0]).tolist() == [2] * 7
    again = phantom.write_medmnist(tmp_path / "again", "dermamnist")
    assert all(
        np.array_equal(one, arrays[name]) for name, one in np.load(again / "dermamnist.npz").items()
    )


def test_phantom_lesions_lie_where_the_truth_says(tmp_path):
    from scipy.ndimage import label

    few = {"train": 24, "val": 2, "test": 2}
    for name in ("organsmnist_64", "chestmnist_64", "pneumoniamnist_64"):
        root = phantom.write_medmnist(tmp_path / name, name, images=few)
        arrays, truth = np.load(root / f"{name}.npz"), np.load(root / "phantom_truth.npz")
        labels, masks = arrays["train_labels"], truth["train_masks"] > 0
        assert (
            arrays["train_images"].dtype == np.uint8 and masks.shape == arrays["train_images"].shape
        )
        if name.startswith("pneumonia"):
            assert (masks.any((1, 2)) == labels[:, 0].astype(bool)).all() and 0 < labels.sum() < 24
            continue
        many = [np.flatnonzero(row) for row in labels] if labels.shape[1] > 1 else list(labels)
        assert [label(mask)[1] for mask in masks] == [sum(1 + k % 4 for k in some) for some in many]
        for image, mask, some in zip(arrays["train_images"], masks, many, strict=True):
            if len(some) == 1:
                assert (image[mask].mean() > image[~mask].mean()) == (some[0] // 4 % 2 == 0)


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
    package.INFO = {
        "breastmnist": {"python_class": "Fake"},
        "octmnist": {"python_class": "Offline"},
    }
    package.Fake, package.Offline = Fake, Offline
    monkeypatch.setitem(sys.modules, "medmnist", package)
    monkeypatch.setattr(phantom, "MEDMNIST_IMAGES", COUNTS)
    assert sources.find("breastmnist_64").origin == "phantom" and not asked
    monkeypatch.setenv("DLIA_DOWNLOAD", "1")
    found = sources.find("breastmnist_64")
    assert (found.root, found.origin, found.synthetic) == (
        tmp_path / "home" / ".medmnist",
        "medmnist",
        False,
    )
    assert asked == [("val", True, 64)] and os.listdir(found.root) == ["breastmnist_64.npz"]
    assert sources.find("breastmnist_64").origin == "~/.medmnist" and len(asked) == 1
    with pytest.raises(
        sources.DataNotFound, match="octmnist.npz could not be downloaded.*into .*yourself"
    ):
        sources.find("octmnist")
    assert os.listdir(found.root) == ["breastmnist_64.npz"]
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(sources.DataNotFound, match="pip install medmnist"):
        sources.find("octmnist")


def test_a_study_keeps_the_official_split_and_trains_seven_classes(tmp_path):
    counts = {"train": 28, "val": 14, "test": 14}
    write(tmp_path / "told", "dermamnist", arrays=arrays_of("dermamnist", counts=counts))
    location = sources.find("dermamnist", tmp_path / "told")
    settings = {"size": 28, "seed": 0, "per_class": None, "val_share": 0.15, "test_share": 0.15}
    one = run.Run(
        notebook="test",
        profile="smoke",
        location=location,
        run_dir=tmp_path / "run",
        values=settings,
    )
    opened = study.open_study(one)
    official = datasets.load(location).manifest["split"]
    assert opened.dataset.manifest["split"].tolist() == official.tolist()
    assert opened.dataset.split_rule.startswith(
        "official; images of 28 px; colour is turned to grey"
    )
    assert opened.class_weights() == (1.0,) * 7
    fitted = train.fit(
        resnet18_cifar(num_classes=7, width=0.125),
        cross_entropy(),
        opened.torch_set("train"),
        opened.torch_set("val"),
        run_dir=tmp_path / "fit",
        epochs=1,
        batch_size=14,
        progress=False,
    )
    assert 0 <= fitted.history["val_auc"].iloc[-1] <= 1
