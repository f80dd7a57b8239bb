import hashlib

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from dlia_utils.data import films, phantom

FEW = {"train": (6, 6), "val": (2, 2), "test": (3, 3)}


def tree_hash(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return [
        (path.relative_to(root).as_posix(), hashlib.sha1(path.read_bytes()).hexdigest())
        for path in files
    ]


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        phantom.write_pneumonia(tmp_path / name, seed=seed, images=FEW, size=32)
    a, b, c = (tree_hash(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c


def test_tree_has_the_traps_and_masks(tmp_path):
    tree = phantom.write_pneumonia(tmp_path, images=FEW, size=32)
    assert tree == tmp_path / "chest_xray" and (tmp_path / phantom.MARKER).is_file()
    own = [p.relative_to(tree) for p in tree.glob("[tv]*/*/[!.]*.jpeg")]
    nested = [p.relative_to(tree / "chest_xray") for p in (tree / "chest_xray").rglob("*.jpeg")]
    assert len(own) == 22 and sorted(own) == sorted(nested)
    assert (
        list(tree.glob("__MACOSX/**/._*"))
        and list(tree.glob("*/*/._*"))
        and list(tree.glob("*/*/.DS_Store"))
    )
    masks = [
        p.relative_to(tmp_path / "phantom_masks")
        for p in (tmp_path / "phantom_masks").rglob("*.png")
    ]
    assert sorted(m.with_suffix(".jpeg") for m in masks) == sorted(
        p for p in own if p.parts[1] == "PNEUMONIA"
    )
    with Image.open(tree / own[0]) as image:
        assert image.mode == "L" and image.size == (32, 32)


@pytest.mark.parametrize("pneumonia", [False, True])
def test_film(pneumonia):
    image, lesion = phantom.chest(np.random.default_rng(1), size=64, pneumonia=pneumonia)
    assert (
        image.shape == lesion.shape == (64, 64)
        and lesion.dtype == bool
        and image.dtype == np.float32
    )
    assert 0 <= image.min() < 0.1 and 0.8 < image.max() <= 1
    assert lesion.any() == pneumonia and lesion.mean() < 0.35


def test_classes_differ_by_the_opacity_and_not_by_brightness():
    films = [
        phantom.chest(np.random.default_rng([2, i]), size=48, pneumonia=i % 2 == 1)
        for i in range(160)
    ]
    labels = np.arange(160) % 2
    assert 0.4 < roc_auc_score(labels, [image.mean() for image, _ in films]) < 0.85
    corners = [image[:8, :8].mean() for image, _ in films]  # No shortcut at the edge of the film.
    assert 0.35 < roc_auc_score(labels, corners) < 0.65


def test_opacities_lie_in_the_lungs():
    anatomy = films.Anatomy.draw(np.random.default_rng(0))
    x, y = films._grid(64)
    air = films._lungs(anatomy, x, y)
    fluid = films._opacities(np.random.default_rng(5), air)
    assert fluid.max() <= 0.95 and (fluid[air <= 0] == 0).all() and fluid.max() > 0.3
