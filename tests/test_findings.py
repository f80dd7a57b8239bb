"""The planted findings: what is drawn lies in its box, and each kind has its own look and place."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from dlia_utils.data import datasets, findings, phantom, readers, sources

SIZE = 128
FILMS = 12


def tree_hash(root):
    files = sorted(path for path in Path(root).rglob("*") if path.is_file())
    return [
        (path.relative_to(root).as_posix(), hashlib.sha1(path.read_bytes()).hexdigest())
        for path in files
    ]


def iou(one, other):
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = np.prod(np.clip(high - low, 0, None))
    area = [np.prod(np.subtract(box[2:], box[:2])) for box in (one, other)]
    return shared / (sum(area) - shared)


def drawn(name, seed):
    """What the finding changes on the film, noise included; whether each pixel is in its box; the box."""
    bare, _ = phantom.chest_with_findings(np.random.default_rng(seed), [], size=SIZE)
    image, (box,) = phantom.chest_with_findings(np.random.default_rng(seed), [name], size=SIZE)
    x1, y1, x2, y2 = map(int, box)
    inside = np.zeros(image.shape, bool)
    inside[y1:y2, x1:x2] = True
    # The two films have other grey windows: bring the bare one into that of the other by the pixels outside.
    tone = np.polynomial.Polynomial.fit(bare[~inside], image[~inside], 5)
    return image - tone(bare), inside, np.array(box)


@pytest.fixture(scope="module")
def films():
    return {name: [drawn(name, seed) for seed in range(FILMS)] for name in readers.NIH_CLASSES}


@pytest.mark.parametrize("name", readers.NIH_CLASSES)
def test_box_is_the_extent_of_the_change(films, name):
    overlaps = []
    for change, _, box in films[name]:
        smooth = np.abs(gaussian_filter(change, 0.7))
        seen = smooth > 0.3 * np.percentile(smooth, 99.8)
        rows, columns = (np.flatnonzero(seen.sum(axis) > 1) for axis in (1, 0))
        overlaps.append(iou(np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]), box))
    assert np.median(overlaps) > 0.8 and min(overlaps) > 0.6


@pytest.mark.parametrize("name", readers.NIH_CLASSES)
def test_findings_stand_out_from_noise(films, name):
    for change, inside, _ in films[name]:
        assert np.percentile(np.abs(change[inside]), 80) > 4 * change[~inside].std()


def test_sizes_and_places(films):
    boxes = {name: np.array([box for _, _, box in made]) for name, made in films.items()}
    sides = {name: np.sqrt((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])) for name, b in boxes.items()}
    middles = {name: (b[:, :2] + b[:, 2:]) / 2 / SIZE for name, b in boxes.items()}
    assert 8 <= sides["Nodule"].min() and sides["Nodule"].max() < sides["Mass"].min()
    assert sides["Mass"].max() < sides["Cardiomegaly"].min()
    flat = boxes["Atelectasis"]
    assert ((flat[:, 2] - flat[:, 0]) > 1.4 * (flat[:, 3] - flat[:, 1])).all()
    assert middles["Pneumothorax"][:, 1].max() < 0.5 < middles["Effusion"][:, 1].min()
    assert middles["Pneumonia"][:, 1].max() < 0.5 < middles["Atelectasis"][:, 1].min()
    assert (middles["Cardiomegaly"][:, 0] > 0.5).mean() > 0.5
    both_sides = {
        name for name, m in middles.items() if m[:, 0].min() < 0.45 and m[:, 0].max() > 0.55
    }
    assert both_sides >= set(readers.NIH_CLASSES) - {"Cardiomegaly"}


def test_only_free_air_darkens(films):
    for name, made in films.items():
        for change, inside, _ in made:
            strongest = change[inside][np.argsort(np.abs(change[inside]))[-20:]]
            assert (strongest.mean() < 0) == (name == "Pneumothorax"), name


def test_two_findings_lie_in_different_lungs():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        image, boxes = phantom.chest_with_findings(rng, ["Mass", "Effusion"], size=64)
        assert (boxes[0][2] <= 34) != (boxes[1][2] <= 34) and image.shape == (64, 64)


def test_every_class_has_a_painter():
    assert tuple(findings.PAINTERS) == readers.NIH_CLASSES


def test_competition_plan(tmp_path):
    phantom.write_competition(tmp_path, images={"train": 30, "test": 8}, size=32)
    assert (tmp_path / phantom.MARKER).is_file()
    first, second = sources.siblings(sources.find("dlia", tmp_path))
    boxes = datasets.load(second).boxes
    assert (
        boxes.groupby("image").size().max() == 2 and not boxes.duplicated(["image", "label"]).any()
    )
    text = (first.root / "train.csv").read_text().splitlines()
    assert text[0] == "Image Index,Finding Label,Bbox [x,y,w,h]"
    assert "view" in pd.read_csv(second.root / "train.csv").columns
    mapping = pd.read_csv(second.root / "ID_to_Image_Mapping.csv")
    assert mapping["image_id"].is_monotonic_increasing and list(mapping["ID"]) == list(range(8))
    with pytest.raises(ValueError, match="at least 12 to train on"):
        phantom.write_competition(tmp_path, images={"train": 3})


def test_plan_shares_patients_and_evens_out_the_classes():
    plan = list(phantom._plan_findings(0, 316))
    names = pd.Series([name for name, *_ in plan])
    assert names.is_unique and names.str.fullmatch(r"\d{8}_\d{3}\.png").all()
    assert 0.2 < names.str[:8].duplicated(keep=False).mean() < 0.35
    counts = pd.Series([one for _, kinds, *_ in plan for one in kinds]).value_counts()
    assert len(counts) == 8 and counts.max() - counts.min() <= 2
    assert all(len(set(kinds)) == len(kinds) for _, kinds, *_ in plan)


@pytest.mark.parametrize(
    "write, options",
    [
        (phantom.write_competition, {"images": {"train": 12, "test": 8}}),
        (phantom.write_nih, {"images": 8}),
        (phantom.write_fracatlas, {"images": (8, 3)}),
    ],
)
def test_same_seed_same_bytes(tmp_path, write, options):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / folder, seed=seed, size=32, **options)
    a, b, c = (tree_hash(tmp_path / folder) for folder in "abc")
    assert a == b != c


def test_nih_tree_has_the_traps(tmp_path):
    tree = phantom.write_nih(tmp_path, images=12, size=32)
    assert tree == tmp_path / "nih" and (tmp_path / phantom.MARKER).is_file()
    header = (tree / "BBox_List_2017.csv").read_text().splitlines()[0]
    assert header == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    entries = (tree / "Data_Entry_2017.csv").read_text()
    assert "Infiltration" in entries and "Infiltrate" not in entries and "No Finding" in entries
    assert {path.parent.parent.name for path in tree.rglob("*.png")} == {"images_001", "images_002"}


def test_bone():
    for seed in range(8):
        image, box, gap = phantom.bone(
            np.random.default_rng(seed), height=64, width=96, fractured=True
        )
        x1, y1, x2, y2 = box
        assert (
            image.shape == (64, 96)
            and 0 <= x1 < x2 <= 96
            and 0 <= y1 < y2 <= 64
            and (x2 - x1) * (y2 - y1) > 30
        )
        rows, columns = np.nonzero(gap)
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == box
        _, no_box, no_gap = phantom.bone(
            np.random.default_rng(seed), height=64, width=96, fractured=False
        )
        assert no_box is None and not no_gap.any() and no_gap.shape == (64, 96)


def test_fracatlas_tree_has_the_traps(tmp_path):
    tree = phantom.write_fracatlas(tmp_path, images=(10, 6), size=64)
    turned = Image.open(tree / "images" / "Fractured" / "IMG0000001.jpg")
    assert turned.getexif()[0x0112] == 6
    sizes = {Image.open(path).size for path in tree.rglob("*.jpg")}
    assert {width < height for width, height in sizes} == {True, False}
    table = pd.read_csv(tree / "dataset.csv")
    assert (
        len(table) == 16 and table["fractured"].sum() == 9 and table["fracture_count"].sum() == 10
    )
