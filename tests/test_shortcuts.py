"""The shortcut audit against planted truths: a label in the corner or in the lungs."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from dlia_utils import shortcuts
from dlia_utils.data import cache, datasets
from dlia_utils.data.readers import BadData
from dlia_utils.shortcuts import REGIONS, Sample

SIDE = 32
CORNER = (slice(0, 3), slice(0, 3))  # inside the frame of a tenth of the side


class Reads(nn.Module):
    """Two logits from the mean grey of one place: class 1 where it is brighter than `level`."""

    def __init__(self, place, level):
        super().__init__()
        self.place, self.level = place, level

    def forward(self, x):
        score = 40 * (x[:, 0][:, *self.place].mean((1, 2)) - self.level)
        return torch.stack([torch.zeros_like(score), score], 1)


def lungs(rng, count):
    """Two rectangles that move a little, whatever the class; never in the frame or the corners."""
    masks = np.zeros((count, SIDE, SIDE), bool)
    for mask, (down, across) in zip(masks, rng.integers(-1, 2, (count, 2)), strict=True):
        for left in (6, 18):
            mask[8 + down : 24 + down, left + across : left + across + 8] = True
    return masks


def planted(where, *, count=160, seed=0, strength=0.25):
    """Images of noise whose label is a brightness in the "corner" or in the "lungs", or nowhere."""
    rng = np.random.default_rng(seed)
    y, masks = np.arange(count) % 2, lungs(rng, count)
    x = torch.from_numpy(rng.uniform(0.2, 0.6, (count, 1, SIDE, SIDE))).float()
    if where == "corner":
        x[y == 1, :, *CORNER] += strength
    elif where == "lungs":
        x += strength * torch.from_numpy(masks[:, None] * y[:, None, None, None]).float()
    return Sample(x, y, np.arange(count), masks)


# What tells, and what does not; the rest may go either way
TELLS = {"corner": "whole border_only corners_only lungs_blanked".split()}
TELLS["lungs"] = "whole lungs_only centre_only".split()
SILENT = {"corner": "lungs_only centre_only lung_shape".split()}
SILENT["lungs"] = "border_only corners_only lung_shape".split()
READERS = {"corner": Reads(CORNER, 0.525), "lungs": Reads((slice(8, 24), slice(6, 14)), 0.5)}


@pytest.mark.parametrize("where", TELLS)
def test_a_planted_label_is_found_where_it_is(where):
    model, told, not_told = READERS[where], TELLS[where], SILENT[where]
    parts = planted(where, seed=1), planted(where, seed=2)
    rows = shortcuts.region_accuracy(shortcuts.linear_probe(), *parts, model=model, draws=200)
    for how in ("tested", "retrained"):
        found = rows[rows["metric"].eq("auc") & rows["how"].eq(how)].set_index("region")
        assert found.index.tolist() == REGIONS
        assert (found.loc[told, "value"] > 0.97).all(), how
        # A constant answer has no interval: it is chance exactly.
        assert (found.loc[not_told, "ci_low"] <= 0.5).all(), how
        assert (found.loc[not_told, "ci_high"] >= 0.5).all(), how
    assert rows["how"].tolist() == sorted(rows["how"], reverse=True)


def test_the_pipeline_never_sees_test_labels_and_fill_is_the_training_mean():
    learnt, tested = planted("corner", seed=1), planted("corner", seed=2)
    seen = []

    def pipeline(x_train, y_train, x_test):
        seen.append((x_train, y_train, x_test))
        return np.linspace(0, 1, len(x_test))

    shortcuts.region_accuracy(pipeline, learnt, tested, regions=["lungs_only"], draws=10)
    x_train, y_train, x_test = seen[0]
    assert y_train is learnt.y
    for x, given in ((x_train, learnt), (x_test, tested)):
        inside = torch.from_numpy(given.masks)
        assert torch.equal(x[:, 0][inside], given.x[:, 0][inside])
        assert x[:, 0][~inside].unique().tolist() == [pytest.approx(float(learnt.x.mean()))]


def test_frozen_features_feed_the_probe():
    given = planted("corner", seed=1)
    probe = shortcuts.linear_probe(lambda x: x[:, :, :3, :3].mean((2, 3)))
    blind = shortcuts.linear_probe(lambda x: x[:, :, 20:, 20:].mean((2, 3)))
    right = [((p(given.x, given.y, given.x) > 0.5) == given.y).mean() for p in (probe, blind)]
    assert right[0] > 0.97 and right[1] < 0.7


def test_border_and_centre_are_complements_and_lungs_too():
    x, masks = torch.rand(3, 1, SIDE, SIDE) + 0.1, lungs(np.random.default_rng(0), 3)
    for pair in (("border_only", "centre_only"), ("lungs_only", "lungs_blanked")):
        parts = [shortcuts.limited(x, region, masks, fill=0.0) for region in pair]
        assert torch.equal(parts[0] + parts[1], x)
    corners = shortcuts.limited(x, "corners_only", masks, fill=0.0)[0, 0]
    assert corners[5, 5] > 0 and corners[6, 5] == 0 and corners[-6, -6] > 0


@pytest.fixture
def masked(tmp_path):
    """Four images of 60 x 40 pixels (height, width) with masks at half size.

    The masks: left half; lower right quarter; none; an empty one.
    """
    rows, masks = [], []
    shapes = {0: np.s_[:, :10], 1: np.s_[15:, 10:], 3: np.s_[:0]}
    for number in range(4):
        Image.new("L", (40, 60), 90).save(tmp_path / f"{number}.png")
        rows.append((f"{number}.png", number % 2, "ab"[number % 2], str(number), "", "train"))
        if number in shapes:
            mask = np.zeros((30, 20), np.uint8)
            mask[shapes[number]] = 255
            Image.fromarray(mask).convert("RGB").save(tmp_path / f"mask{number}.png")
            masks.append((number, f"mask{number}.png"))
    columns = ["path", "label", "class_name", "patient", "group", "split"]
    manifest, ignored = pd.DataFrame(rows, columns=columns), pd.DataFrame(columns=["path"])
    dataset = datasets.Dataset("demo", tmp_path, manifest, ("a", "b"), ignored, True, "argument")
    return replace(dataset, masks=pd.DataFrame(masks, columns=["image", "path"]))


def cached(dataset, root, fit):
    return cache.build(dataset, size=24, fit=fit, root=root / "cache", progress=False)


def test_masks_lie_where_the_cached_image_lies(masked, tmp_path):
    found, words = shortcuts.lung_masks(masked, [1, 0, 1], cached(masked, tmp_path, "squash"))
    expected = np.zeros((3, 24, 24), bool)
    expected[[0, 2], 12:, 12:] = True
    expected[1, :, :12] = True
    assert np.array_equal(found, expected) and words == "the data set's masks"
    padded = cached(masked, tmp_path, "pad")  # the image takes up 24 x 16 pixels
    given = shortcuts.sample(masked, padded, padded.batch([0, 1, 2, 3]), np.arange(4))
    expected = np.zeros((4, 24, 24), bool)
    expected[0, :, :8] = True
    expected[1, 12:, 8:16] = True
    expected[2:, :, :16] = shortcuts.crude_lung_box(24, 16)  # no mask, and an empty one
    assert np.array_equal(given.masks, expected) and given.y.tolist() == [0, 1, 0, 1]
    assert "for 2 of 4 images without one, a crude box" in given.lungs
    without = replace(masked, masks=masked.masks.iloc[:0])
    assert shortcuts.lung_masks(without, [0, 1], padded)[1] == shortcuts.CRUDE_BOX
    both = pd.DataFrame({"image": [0, 0], "path": ["mask0.png", "mask1.png"]})
    joined = shortcuts.lung_masks(replace(masked, masks=both), [0], padded)[0][0]
    assert np.array_equal(joined, expected[0] | expected[1])


def test_broken_masks_are_named(masked, tmp_path):
    images = cached(masked, tmp_path, "pad")
    (tmp_path / "mask0.png").write_bytes(b"no image")
    (tmp_path / "mask1.png").unlink()
    with pytest.raises(BadData, match="2 unusable files(.|\n)*mask0.png: cannot be read as a mask"):
        shortcuts.lung_masks(masked, [0, 1], images)
