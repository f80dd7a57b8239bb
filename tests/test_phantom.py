"""The synthetic radiographs: what is planted can be seen, where it is said to be."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score
from trees import tree_hash

from dlia_utils.data import datasets, phantom, readers, sources

SIZE = 128
FEW = {"train": (6, 6), "val": (2, 2), "test": (3, 3)}


@pytest.mark.parametrize(
    "write, options",
    [
        (phantom.write_pneumonia, {"images": FEW}),
        (phantom.write_competition, {"images": {"train": 12, "test": 8}}),
        (phantom.write_nih, {"images": 8}),
        (phantom.write_fracatlas, {"images": (8, 3)}),
        (phantom.write_tuberculosis, {"images": (4, 2)}),
        (phantom.write_covid, {"images": (6, 6)}),
    ],
)
def test_same_seed_same_bytes_and_marked(tmp_path, write, options):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write(tmp_path / name, seed=seed, size=32, **options)
        assert (tmp_path / name / phantom.MARKER).is_file()
    a, b, c = (tree_hash(tmp_path / name) for name in "abc")
    assert a == b != c


def test_classes_differ_by_the_opacity_and_not_by_brightness():
    labels = np.arange(160) % 2
    drawn = [
        phantom.chest(np.random.default_rng([2, i]), size=48, pneumonia=bool(label))[0]
        for i, label in enumerate(labels)
    ]
    assert 0.4 < roc_auc_score(labels, [image.mean() for image in drawn]) < 0.85
    assert 0.35 < roc_auc_score(labels, [image[:8, :8].mean() for image in drawn]) < 0.65


def test_opacities_of_tuberculosis_lie_high_up():
    rows = {True: [], False: []}
    for upper, found in rows.items():
        for seed in range(16):
            rng = np.random.default_rng(seed)
            found.append(np.nonzero(phantom.chest(rng, size=48, pneumonia=True, upper=upper)[1])[0])
    means = {upper: [one.mean() / 48 for one in found] for upper, found in rows.items()}
    assert max(means[True]) < 0.55 < max(means[False])
    assert np.mean(means[True]) < np.mean(means[False]) - 0.08


# --- findings


def drawn(name, seed):
    """What the finding changes, noise included; whether each pixel is in its box; the box."""
    bare, _ = phantom.chest_with_findings(np.random.default_rng(seed), [], size=SIZE)
    image, (box,) = phantom.chest_with_findings(np.random.default_rng(seed), [name], size=SIZE)
    x1, y1, x2, y2 = map(int, box)
    inside = np.zeros(image.shape, bool)
    inside[y1:y2, x1:x2] = True
    # The two have other grey windows: match them by the pixels outside.
    tone = np.polynomial.Polynomial.fit(bare[~inside], image[~inside], 5)
    return image - tone(bare), inside, np.array(box)


@pytest.fixture(scope="module")
def findings():
    return {name: [drawn(name, seed) for seed in range(12)] for name in readers.NIH_CLASSES}


def iou(one, other):
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = np.prod(np.clip(high - low, 0, None))
    area = [np.prod(np.subtract(box[2:], box[:2])) for box in (one, other)]
    return shared / (sum(area) - shared)


@pytest.mark.parametrize("name", readers.NIH_CLASSES)
def test_a_finding_stands_out_and_its_box_is_the_extent_of_the_change(findings, name):
    overlaps = []
    for change, inside, box in findings[name]:
        smooth = np.abs(gaussian_filter(change, 0.7))
        seen = smooth > 0.3 * np.percentile(smooth, 99.8)
        rows, columns = (np.flatnonzero(seen.sum(axis) > 1) for axis in (1, 0))
        overlaps.append(iou(np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]), box))
        assert np.percentile(np.abs(change[inside]), 80) > 4 * change[~inside].std()
        strongest = change[inside][np.argsort(np.abs(change[inside]))[-20:]]
        assert (strongest.mean() < 0) == (name == "Pneumothorax")  # Only free air darkens.
    assert np.median(overlaps) > 0.8 and min(overlaps) > 0.6


def test_competition_plan(tmp_path):
    phantom.write_competition(tmp_path, images={"train": 30, "test": 8}, size=32)
    first, second = (datasets.load(one) for one in sources.siblings(sources.find("dlia", tmp_path)))
    assert second.boxes.groupby("image").size().max() == 2
    assert not second.boxes.duplicated(["image", "label"]).any()
    truth = pd.read_csv(tmp_path / "phantom_truth.csv")
    for edition, dataset in (("A", first), ("B", second)):
        hidden = truth.loc[truth["edition"] == edition, "image_id"]
        assert sorted(hidden) == sorted(dataset.mapping["image_id"])  # An id is one hidden box.
    repeated = first.mapping["image_id"].value_counts()
    assert (repeated == 2).sum() == phantom.TWO_IDS and repeated.max() == 2
    assert second.mapping["image_id"].is_monotonic_increasing


# --- the planted shortcut and the near-duplicates


def test_covid_phantom_has_what_its_truth_says(tmp_path):
    tree = phantom.write_covid(tmp_path, images=(30, 30), size=48)
    truth = pd.read_csv(tmp_path / "phantom_truth.csv", keep_default_na=False).set_index("path")
    dataset = datasets.load(sources.find("covid", tree))
    assert list(truth.index) == list(dataset.manifest["path"])
    assert list(dataset.masks["image"]) == list(range(60))
    images = {path: np.asarray(Image.open(tree / path), dtype=float) for path in truth.index}
    labels, marker = dataset.manifest["label"].to_numpy(), truth["marker"].to_numpy()
    assert marker[labels == 1].mean() == pytest.approx(0.75, abs=0.04)
    assert marker[labels == 0].mean() == pytest.approx(0.25, abs=0.04)
    corner = np.array([image[1:5, 1].mean() for image in images.values()])
    assert roc_auc_score(marker, corner) == 1 and 0.65 < roc_auc_score(labels, corner) < 0.9
    assert 0.2 < roc_auc_score(labels[marker == 0], corner[marker == 0]) < 0.8
    twins = truth[truth["twin_of"] != ""]["twin_of"]
    assert len(twins) == 4
    for path, twin in twins.items():
        flat = {other: image.ravel() for other, image in images.items() if other != path}
        likeness = {o: np.corrcoef(images[path].ravel(), one)[0, 1] for o, one in flat.items()}
        assert max(likeness, key=likeness.get) == twin and 0.995 < likeness[twin] < 1


# --- bones


@pytest.mark.parametrize("seed", range(4))
def test_bone(seed):
    rng = np.random.default_rng(seed)
    image, box, gap = phantom.bone(rng, height=64, width=96, fractured=True)
    rows, columns = np.nonzero(gap)
    assert image.shape == (64, 96) and (box[2] - box[0]) * (box[3] - box[1]) > 30
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == box
    _, none, empty = phantom.bone(rng, height=64, width=96, fractured=False)
    assert none is None and not empty.any()
