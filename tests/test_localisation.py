"""Scores against hand-made truth, references at chance, and maps of a model that must find the lesion."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

from dlia_utils import phantom
from dlia_utils.explain import Attribution, attribution, energy_inside
from dlia_utils.explain.attribution import METHODS, explain
from dlia_utils.explain.localisation import localise, reference_maps, sanity, score_maps, ssim

OPTIONS = {
    "gradcam": {"layer": "8"},
    "gradcam++": {"layer": "8"},
    "occlusion": {"window": 12, "stride": 6},
    "integrated_gradients": {"steps": 8},
}


def box(x1, y1, x2, y2):
    return pd.DataFrame([{"x1": x1, "y1": y1, "x2": x2, "y2": y2}])


def test_a_map_that_is_the_region_scores_full_and_its_complement_nothing():
    mask = np.zeros((20, 20), bool)
    mask[4:8, 10:15] = True
    right, wrong = score_maps(np.stack([mask, ~mask]).astype(float), [mask, box(10, 4, 15, 8)]).to_dict(
        "records"
    )
    assert right["area"] == wrong["area"] == 0.05
    assert [right[k] for k in ("coverage", "pointing", "energy", "auprc")] == [1, 1, 1, 1]
    assert [wrong[k] for k in ("coverage", "pointing", "energy")] == [0, 0, 0]
    assert right["coverage_gain"] == right["energy_gain"] == 0.95


def test_energy_and_auprc_are_those_of_the_other_implementations():
    rng = np.random.default_rng(0)
    maps, boxes = rng.random((3, 9, 11)), [box(1, 2, 6, 7), box(0, 0, 3, 3), box(5, 5, 11, 9)]
    table = score_maps(maps, boxes)
    np.testing.assert_allclose(table[["energy", "area"]], energy_inside(maps, boxes))
    inside = np.zeros((9, 11), bool)
    inside[2:7, 1:6] = True
    assert table["auprc"][0] == average_precision_score(inside.ravel(), maps[0].ravel())


def test_equal_heights_share_their_places_so_flat_and_zero_maps_score_chance():
    region = box(0, 0, 10, 4)
    table = score_maps(np.stack([np.full((10, 10), 0.3), np.zeros((10, 10))]), [region] * 2, p=7)
    np.testing.assert_allclose(table[["coverage", "energy", "auprc", "pointing"]], 0.4)
    np.testing.assert_allclose(table[["coverage_gain", "energy_gain"]], 0, atol=1e-12)
    assert table["zero"].tolist() == [False, True]
    heat = np.zeros((1, 10, 10))
    heat[0, 0, 0], heat[0, 1, 0], heat[0, 9, 9] = (
        2,
        1,
        1,
    )  # two places left for two of equal height, one inside
    assert score_maps(heat, [region], p=2)["coverage"][0] == 0.75


def test_pointing_counts_a_near_miss_within_the_tolerance_only():
    heat = np.zeros((1, 20, 20))
    heat[0, 10, 13] = 1  # three pixels right of the box
    region = [box(5, 5, 11, 15)]
    assert [score_maps(heat, region, tolerance=t)["pointing"][0] for t in (0, 2, 3)] == [0, 0, 1]
    chances = [score_maps(heat, region, tolerance=t)["pointing_chance"][0] for t in (0, 3)]
    assert chances[0] == 0.15 and chances[1] > 0.15


def test_references_know_nothing_and_are_reproducible():
    films = torch.zeros(2, 1, 30, 40)
    films[:, :, :, 20:] = 1
    first, again = reference_maps(films, seed=4), reference_maps(films, seed=4)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["random"][0], first["random"][1])
    assert first["edges"][0].sum(0).nonzero()[0].tolist() == [19, 20]
    assert np.unravel_index(first["centre prior"][0].argmax(), (30, 40)) in [
        (14, 19),
        (14, 20),
        (15, 19),
        (15, 20),
    ]
    rng = np.random.default_rng(1)
    masks = list(rng.random((60, 30, 30)) < 0.1)
    _, summary = localise({}, torch.rand(60, 1, 30, 30), masks, groups=range(60), draws=200)
    row = summary.query("map == 'random' and score == 'coverage_gain'").iloc[0]
    assert abs(row["value"]) < 0.02 and row["ci_low"] < row["value"] < row["ci_high"] and row["n"] == 60


def test_the_interval_draws_whole_patients():
    maps, masks = np.zeros((20, 8, 8)), [np.eye(8, dtype=bool)] * 20
    maps[:10] = np.eye(8)
    maps[10:] = 1 - np.eye(8)
    width = {}
    for name, groups in {"films": range(20), "patients": [k // 5 for k in range(20)]}.items():
        _, summary = localise({"m": maps}, torch.rand(20, 1, 8, 8), masks, groups=groups, draws=400)
        row = summary.query("map == 'm' and score == 'auprc'").iloc[0]
        width[name] = row["ci_high"] - row["ci_low"]
    assert width["patients"] > 1.5 * width["films"]


def test_bad_input_names_the_argument_and_the_fix():
    maps, films = np.ones((2, 8, 8)), torch.rand(2, 1, 8, 8)
    good = [box(0, 0, 2, 2)] * 2
    for regions, message in [
        (good[:1], "1 regions for 2 maps"),
        ([box(0, 0, 2, 2), box(0, 0, 0, 0)], "image 1 covers no pixel"),
        ([np.ones((4, 4), bool)] * 2, "resize"),
    ]:
        with pytest.raises(ValueError, match=message):
            score_maps(maps, regions)
    with pytest.raises(ValueError, match="Attribution.heat"):
        score_maps(-maps, good)
    with pytest.raises(ValueError, match="p must lie"):
        score_maps(maps, good, p=0)
    with pytest.raises(ValueError, match="resize them first"):
        localise({"m": maps[:, :4]}, films, good, groups=[1, 2])
    with pytest.raises(ValueError, match="one length"):
        localise({"m": maps}, films, good, groups=[1])
    with pytest.raises(ValueError, match="name of a reference"):
        localise({"edges": maps}, films, good, groups=[1, 2])


def test_ssim_is_one_for_equal_maps_symmetric_and_near_torchmetrics():
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = np.random.default_rng(0).random((2, 96, 96))
    b = 0.5 * a + 0.5 * b
    assert ssim(a, a) == 1 and ssim(a, b) == pytest.approx(ssim(b, a)) and ssim(a, 1 - a) < 0
    pair = [torch.from_numpy(m)[None, None] for m in (a, b)]
    assert ssim(a, b) == pytest.approx(
        float(structural_similarity_index_measure(*pair, data_range=1.0)), abs=0.02
    )


def block(channels, dilation):
    """As in MobileNetV2: batch norm and an in-place ReLU6."""
    convolution = nn.Conv2d(channels, 12, 5, padding=2 * dilation, dilation=dilation, bias=False)
    return [convolution, nn.BatchNorm2d(12), nn.ReLU6(inplace=True)]


def chests(seed, count, side=48):
    """Phantom films, every second with opacities, and the masks of these."""
    drawn = [
        phantom.chest(np.random.default_rng([seed, k]), size=side, pneumonia=k % 2 == 1) for k in range(count)
    ]
    films, masks = (np.stack(part) for part in zip(*drawn, strict=True))
    return torch.from_numpy(films)[:, None], masks


@pytest.fixture(scope="module")
def reader():
    """A classifier taught place by place where the opacities are: what it reads is known."""
    films, masks = chests(7, 96)
    truth = torch.from_numpy(masks).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features, head = nn.Sequential(*block(1, 1), *block(12, 2), *block(12, 3)), nn.Linear(12, 2)
        optimiser = torch.optim.Adam([*features.parameters(), *head.parameters()], 1e-2)
        for _ in range(8):
            for rows in torch.randperm(len(films)).split(16):
                logits = head(features(films[rows]).movedim(1, -1)).movedim(-1, 1)
                loss = nn.functional.cross_entropy(logits, truth[rows], weight=torch.tensor([1.0, 4.0]))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


@pytest.fixture(scope="module")
def lesions():
    films, masks = chests(8, 24)
    return films[1::2], list(masks[1::2])


def test_maps_of_a_reader_of_lesions_hit_the_lesions(reader, lesions):
    films, masks = lesions
    maps = {name: explain(name, reader, films, 1, **OPTIONS.get(name, {})).heat() for name in METHODS}
    rows, summary = localise(maps, films, masks, groups=range(len(films)), draws=200)
    assert len(rows) == (len(METHODS) + 3) * len(films)
    value = summary.pivot(index="map", columns="score", values="value")
    reference = value.loc[["random", "centre prior", "edges"]]
    for name in ("gradcam", "gradcam++"):
        assert value.loc[name, "pointing"] > 0.7 and (value.loc[name] > reference.max() + 0.2).all(), name
    for name in ("occlusion", "integrated_gradients"):
        assert (
            value.loc[name, ["coverage_gain", "auprc"]] > reference[["coverage_gain", "auprc"]].max()
        ).all(), name
    lows = summary.query("score == 'coverage_gain'").set_index("map")["ci_low"]
    assert lows["gradcam"] > 0.3 and lows["random"] < 0


@pytest.mark.parametrize("method", ["saliency", "integrated_gradients", "deeplift", "occlusion"])
def test_maps_of_a_model_that_sees_nothing_else_lie_inside_entirely(method, lesions):
    films, masks = lesions
    for film, mask in zip(films[:2], masks[:2], strict=True):
        net = nn.Sequential(nn.Flatten(), nn.Linear(film.numel(), 2)).eval()
        with torch.no_grad():
            net[1].weight.zero_()[1] = torch.from_numpy(mask).float().flatten()
        options = {"window": 4, "stride": 4} if method == "occlusion" else {}
        row = score_maps(explain(method, net, film[None], 1, **options).heat(), [mask], p=1).iloc[0]
        # A window of occlusion reaches over the lesion's edge by its own size.
        assert row["pointing"] == 1 if method != "occlusion" else row["pointing"] > 0.4
        assert row["energy"] > (0.5 if method == "occlusion" else 0.9999)
        assert row["coverage"] > 0.9


def test_randomised_weights_destroy_the_map_of_a_faithful_method(reader, lesions):
    films, _ = lesions
    before = {key: value.clone() for key, value in reader.state_dict().items()}
    table = sanity(reader, films, "gradcam", target=1, layer=reader[8], steps=3)
    assert table["layers"].tolist() == [0, 2, 5, 7, 0]
    assert table["down_to"].tolist() == ["none", "7", "3", "0", "another image"]
    assert table["spearman"][0] == pytest.approx(1) and table["ssim"][0] == pytest.approx(1)
    assert table["spearman"][1:4].max() < 0.5 and table["ssim"][1:4].max() < 0.5
    pd.testing.assert_frame_equal(table, sanity(reader, films, "gradcam", target=1, layer="8", steps=3))
    assert all(torch.equal(value, before[key]) for key, value in reader.state_dict().items())


def test_sanity_exposes_a_map_that_does_not_depend_on_the_weights(monkeypatch, reader, lesions):
    def edges(model, x, *, target=None):
        return Attribution("edges", torch.from_numpy(reference_maps(x)["edges"]).float(), target, target)

    monkeypatch.setitem(attribution.METHODS, "edges", edges)
    assert sanity(reader, lesions[0], "edges", target=1, steps=2)["spearman"][:3].min() == pytest.approx(1)
    with pytest.raises(ValueError, match="no layer with weights"):
        sanity(nn.Flatten().eval(), torch.rand(1, 1, 1, 2), "saliency")
    with pytest.raises(ValueError, match="steps must be"):
        sanity(reader, lesions[0], "saliency", steps=0)
