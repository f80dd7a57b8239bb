"""Scores against hand-made truth, references at chance, maps of models that read the lesion."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from dlia_utils.data.cache import ImageCache
from dlia_utils.data.tables import CORNERS
from dlia_utils.explain import localisation as loc
from dlia_utils.explain.attribution import METHODS, explain
from dlia_utils.explain.base import REFERENCES, ssim
from dlia_utils.explain.eigencam import inside


def box(x1, y1, x2, y2):
    return pd.DataFrame([{"x1": x1, "y1": y1, "x2": x2, "y2": y2}])


def findings(boxes=None, outlines=()):
    """A data set of three images, 100 x 200 (height x width) each, and its cache of 50 pixels."""
    rows = [(image, np.array(points, float)) for image, points in outlines]
    polygons = pd.DataFrame(rows, columns=["image", "points"])
    manifest = pd.DataFrame({"path": ["a.jpg", "b.jpg", "c.jpg"]})
    dataset = SimpleNamespace(manifest=manifest, boxes=boxes, outlines=polygons)
    shapes, fits = np.array([[100, 200]] * 3, np.int32), ("squash", "pad")
    return dataset, {fit: ImageCache(None, 50, "", None, (), shapes, fit) for fit in fits}


def test_regions_are_the_boxes_where_the_cached_image_has_them():
    boxes = [box(20, 10, 60, 40), box(100, 50, 200, 100), box(82.4, 20.4, 84, 40)]
    dataset, caches = findings(pd.concat(boxes).assign(image=[2, 0, 2], label=1))
    squashed = loc.regions_of(dataset, [2, 0], caches["squash"])
    padded = loc.regions_of(dataset, [2, 0], caches["pad"])
    # The third box holds no pixel's centre: it gets the pixel it lies in.
    np.testing.assert_allclose(squashed[0][CORNERS], [[5, 5, 15, 20], [20, 10.2, 21, 20]])
    np.testing.assert_allclose(squashed[1][CORNERS], [[25, 25, 50, 50]])
    np.testing.assert_allclose(padded[1][CORNERS], [[25, 12.5, 50, 25]])
    area = loc.score_maps(np.ones((2, 50, 50)), squashed)["area"] * 2500
    assert area.tolist() == [10 * 15 + 1 * 10, 25 * 25]


def test_tiny_boxes_at_every_place_keep_a_pixel_and_others_stay():
    rng = np.random.default_rng(0)
    corner = rng.uniform([0, 0], [200, 100], (200, 2))
    far = np.minimum(corner + rng.choice([0.5, 3.0, 9.0], (200, 2)), [200, 100])
    boxes = pd.DataFrame(np.hstack([corner, far]), columns=CORNERS).assign(image=0)
    dataset, caches = findings(boxes)
    (found,) = loc.regions_of(dataset, [0], caches["squash"])
    scaled = boxes[CORNERS] * [0.25, 0.5, 0.25, 0.5]
    for row in range(len(boxes)):
        whole, mask = (inside(table.iloc[[row]], (50, 50)) for table in (scaled, found))
        assert mask.any() and (not whole.any() or np.array_equal(whole, mask))


def test_an_outline_is_filled_by_the_rule_of_the_boxes():
    shapes = {
        0: [[20, 10], [61, 10], [61, 41], [20, 41]],  # a box, drawn as a polygon
        1: [[0, 0], [200, 0], [0, 100]],  # half the image
        2: [[101, 51], [101.2, 51], [101.2, 51.2]],  # far smaller than a pixel
    }
    dataset, caches = findings(outlines=shapes.items())
    masks = loc.regions_of(dataset, [0, 1, 2], caches["squash"], kind="outline")
    assert all(mask.shape == (50, 50) and mask.dtype == bool for mask in masks)
    np.testing.assert_array_equal(masks[0], inside(box(5, 5, 15.25, 20.5), (50, 50)))
    below = np.add.outer(np.arange(50), np.arange(50)) + 1
    np.testing.assert_array_equal(masks[1], below < 50)
    assert np.argwhere(masks[2]).tolist() == [[25, 25]]
    (padded,) = loc.regions_of(dataset, [0], caches["pad"], kind="outline")
    np.testing.assert_array_equal(padded, inside(box(5, 2.5, 15.25, 10.25), (50, 50)))


def test_outlines_of_one_image_add_up_and_a_circle_has_its_area():
    turn = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    circle = np.stack([100 + 60 * np.cos(turn), 50 + 30 * np.sin(turn)], 1)
    square = [[0, 0], [8, 0], [8, 4], [0, 4]]
    dataset, caches = findings(outlines=[(1, circle), (1, square), (1, square)])
    (mask,) = loc.regions_of(dataset, [1], caches["squash"], kind="outline")
    assert mask[:2, :2].all() and mask.sum() - 4 == pytest.approx(np.pi * 15 * 15, rel=0.02)


def test_images_without_a_finding_are_named():
    dataset, caches = findings(box(1, 1, 9, 9).assign(image=1), [(0, [[1, 1], [9, 1], [9, 9]])])
    with pytest.raises(ValueError, match="leave out images without a box: a.jpg, c.jpg"):
        loc.regions_of(dataset, [0, 1, 2], caches["pad"])
    with pytest.raises(ValueError, match="without a outline: b.jpg"):
        loc.regions_of(dataset, [1], caches["pad"], kind="outline")


def test_a_map_that_is_the_region_scores_full_and_its_complement_nothing():
    mask = np.zeros((20, 20), bool)
    mask[4:8, 10:15] = True
    maps = np.stack([mask, ~mask]).astype(float)
    right, wrong = loc.score_maps(maps, [mask, box(10, 4, 15, 8)]).to_dict("records")
    assert right["area"] == wrong["area"] == 0.05
    assert [right[k] for k in ("coverage", "pointing", "energy", "auprc")] == [1, 1, 1, 1]
    assert [wrong[k] for k in ("coverage", "pointing", "energy")] == [0, 0, 0]
    assert right["coverage_gain"] == right["energy_gain"] == 0.95
    noise = np.random.default_rng(0).random((1, 20, 20))
    table = loc.score_maps(noise, [mask])
    assert table["energy"][0] == pytest.approx(noise[0, mask].sum() / noise.sum())


def test_equal_heights_share_their_places_so_flat_and_zero_maps_score_chance():
    region = box(0, 0, 10, 4)
    table = loc.score_maps(np.stack([np.full((10, 10), 0.3), np.zeros((10, 10))]), [region] * 2)
    np.testing.assert_allclose(table[["energy", "auprc", "pointing"]], 0.4)
    np.testing.assert_allclose(table["coverage"], 0.05)
    np.testing.assert_allclose(table[["coverage_gain", "energy_gain"]], 0, atol=1e-12)
    assert table["zero"].tolist() == [False, True]
    heat = np.zeros((1, 10, 10))  # five places: two for the highest, three for eight of one height
    heat[0, 0, :2], heat[0, 1, :4], heat[0, 9, :4] = 2, 1, 1
    assert loc.score_maps(heat, [region])["coverage"][0] == (2 + 3 * 4 / 8) / 40


def test_references_know_nothing_and_are_reproducible():
    images = torch.zeros(2, 1, 30, 40)
    images[:, :, :, 20:] = 1
    first, again = loc.reference_maps(images), loc.reference_maps(images)
    assert all(np.array_equal(first[name], again[name]) for name in REFERENCES)
    assert not np.array_equal(first["random"][0], first["random"][1])
    assert first["edges"][0].sum(0).nonzero()[0].tolist() == [19, 20]
    top = np.argwhere(first["centre prior"][0] == first["centre prior"][0].max())
    np.testing.assert_allclose(top.mean(0), [14.5, 19.5])


def test_bad_input_is_refused():
    maps, good = np.ones((2, 8, 8)), [box(0, 0, 2, 2)] * 2
    with pytest.raises(ValueError, match="image 1: no pixel of its region"):
        loc.score_maps(maps, [good[0], box(0, 0, 0, 0)])
    with pytest.raises(ValueError, match="Attribution.heat"):
        loc.score_maps(-maps, good)


def test_ssim_is_one_for_equal_maps_symmetric_and_torchmetrics_s_but_for_the_border():
    a, b = np.random.default_rng(0).random((2, 96, 96))
    b = 0.5 * a + 0.5 * b
    assert ssim(a, a) == 1 and ssim(a, b) == pytest.approx(ssim(b, a)) and ssim(a, 1 - a) < 0
    pair = [torch.from_numpy(m)[None, None] for m in (a, b)]
    theirs = float(structural_similarity_index_measure(*pair, data_range=1.0))
    assert ssim(a, b) == pytest.approx(theirs, abs=0.02)
    assert 0 < ssim(a[:4, :4], b[:4, :4]) < 1  # where torchmetrics refuses


@pytest.fixture(scope="module")
def lesions():
    """Dark noise with a bright square in each image, and the masks of the squares."""
    rng, masks = np.random.default_rng(0), np.zeros((12, 48, 48), bool)
    for mask, (down, right) in zip(masks, rng.integers(0, 38, (12, 2)), strict=True):
        mask[down : down + 10, right : right + 10] = True
    images = 0.7 * masks + 0.3 * rng.random(masks.shape)
    return torch.tensor(images, dtype=torch.float32)[:, None], list(masks)


def test_maps_of_a_reader_of_lesions_hit_the_lesions(lesions):
    images, masks = lesions
    layers = [nn.Conv2d(1, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)]
    reader = nn.Sequential(*layers).eval()  # of nothing but what is brighter than 0.5
    weights = [[[[1.0]]]], [-0.5], [[-1.0], [1.0]], [0.0, 0.0]
    for parameter, values in zip(reader.parameters(), weights, strict=True):
        parameter.data = torch.tensor(values).view_as(parameter)
    options = {"gradcam": {"layer": "1"}, "gradcam++": {"layer": "1"}, "occlusion": {"window": 4}}
    found = {name: explain(name, reader, images, 1, **options.get(name, {})) for name in METHODS}
    maps = {name: one.heat() for name, one in found.items()}
    rows = loc.localise(maps, images, masks, groups=range(12))
    summary = loc.summarise(rows, draws=200)
    assert len(rows) == (len(METHODS) + 3) * 12
    value = summary.pivot(index="map", columns="score", values="value")
    exact = value.drop(["occlusion", *REFERENCES])  # a window reaches over the lesion's edge
    assert (exact[["pointing", "auprc"]] > 0.999).all(axis=None)
    assert (value.loc["occlusion"] > value.loc[list(REFERENCES)].max()).all()
    lows = summary.query("score == 'auprc'").set_index("map")["ci_low"]
    assert 0.7 < lows["gradcam"] < 1 and lows["random"] < 0.1  # exact, where all are hits


def test_randomised_weights_destroy_the_map_layer_by_layer(lesions):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 5), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.Conv2d(8, 8, 5)]
    layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 2)]
    net = nn.Sequential(*layers).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    table = loc.sanity(net, lesions[0], "gradcam", target=1, layer="4", steps=2)
    assert table["layers"].tolist() == [0, 2, 4, 0]
    assert table["down_to"].tolist() == ["none", "3", "0", "another image"]
    assert table["spearman"][0] == pytest.approx(1) and table["ssim"][0] == pytest.approx(1)
    assert table["spearman"][1:3].max() < 0.5 and table["ssim"][1:3].max() < 0.5
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_differences_to_the_references_are_paired_by_image():
    rng = np.random.default_rng(1)
    masks = [rng.random((16, 16)) > 0.9 for _ in range(8)]
    maps = {"finds": np.stack(masks).astype(float), "noise": rng.random((8, 16, 16))}
    per_image = loc.localise(maps, torch.rand(8, 1, 16, 16), masks, groups=range(8))
    table = loc.against_references(per_image.sample(frac=1, random_state=0), draws=200)
    assert set(table["map"]) == {"finds", "noise"} and set(table["reference"]) == set(REFERENCES)
    assert (table[table["map"].eq("finds")]["ci_low"] > 0).all()
    by_hand = per_image.set_index(["map", "image"])["auprc"]
    row = table.query("map == 'noise' and score == 'auprc' and reference == 'edges'").iloc[0]
    assert row["value"] == pytest.approx((by_hand["noise"] - by_hand["edges"]).mean())
    assert row["ci_low"] < 0 < row["ci_high"]


def test_maps_of_two_models_are_compared_image_by_image(lesions):
    images, masks = lesions
    good, poor = np.stack(masks).astype(float), np.random.default_rng(0).random((12, 48, 48))
    pairs = [{"saliency": heat, "other": poor} for heat in (good, poor)]
    tables = [loc.localise(maps, images, masks, groups=range(12)) for maps in pairs]
    table = loc.against_model(*tables, draws=100).set_index(["map", "score"])
    assert table.loc[("saliency", "auprc"), "ci_low"] > 0.5
    assert (table.loc["other", "value"] == 0).all() and len(table) == 2 * len(loc.SCORES)
    with pytest.raises(ValueError, match="lacks the images"):
        loc.against_model(tables[0], tables[1].query("image > 0"))
