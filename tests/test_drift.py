"""Drift scores against known answers and scipy; one class, one path, fair references."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from dlia_utils.explain import drift
from dlia_utils.explain.attribution import saliency
from dlia_utils.explain.base import ssim
from dlia_utils.explain.gradcam import gradcam
from dlia_utils.models import cnn, mobilenet_v2, resnet18_cifar, with_head

KEYS = drift.KEYS[:5]


def scores(a, b):
    return pd.DataFrame(drift.compared(drift.prepared(a), drift.prepared(b)))


def random_maps(n, h, w, seed=0):
    return np.random.default_rng(seed).random((n, h, w))


def images(n, side=32, seed=1):
    """Grey images with one blurred spot each, at a place of its own, on a slope."""
    places = np.random.default_rng(seed).uniform(0.15, 0.85, (n, 2))
    down, right = np.mgrid[:side, :side] / side
    spots = [np.exp(-((down - a) ** 2 + (right - b) ** 2) / 0.02) for a, b in places]
    return torch.tensor(0.2 * down + 0.1 + 0.6 * np.stack(spots), dtype=torch.float32)[:, None]


def seesaw():
    """Class 0 where the image is light, class 1 where it is dark; its map, or the negative."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    net[0].load_state_dict(
        {"weight": torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1), "bias": torch.tensor([0.0, 1.0])}
    )
    return net


# scores


def test_identical_maps_do_not_drift_and_the_sign_turns_every_score_to_grow_with_drift():
    a = random_maps(4, 6, 9)
    table = scores(a, a)
    known = {"rmse": 0, "rmse_raw": 0, "ssim": 1, "spearman": 1, "top10": 1, "centre_shift": 0}
    for name, value in known.items():
        np.testing.assert_allclose(table[name], value, atol=1e-12)
    assert not table["zero"].any() and set(drift.SIGN) == set(known)
    noise = random_maps(4, 6, 9, seed=1)
    steps = [scores(a, (1 - share) * a + share * noise).mean() for share in (0.1, 0.4, 1.0)]
    for name, sign in drift.SIGN.items():
        turned = [sign * step[name] for step in steps]
        assert turned[0] < turned[1] < turned[2], name


def test_rmse_is_that_of_maps_scaled_to_255_and_rmse_raw_of_the_maps_themselves():
    a, b = np.array([[[0.0, 2.0], [1.0, 1.0]]]), np.array([[[3.0, 1.0], [2.0, 2.0]]])
    table = scores(a, b)
    assert table["rmse"][0] == pytest.approx(255 * np.sqrt((1 + 1) / 4))
    assert table["rmse_raw"][0] == pytest.approx(np.sqrt((9 + 1 + 1 + 1) / 4))
    a, b = random_maps(3, 7, 7), random_maps(3, 7, 7, seed=1)
    once, scaled = scores(a, b), scores(a, 1e-9 * b)  # which changes rmse_raw alone
    changed = {name for name in drift.SIGN if not np.allclose(once[name], scaled[name], rtol=1e-9)}
    assert changed == {"rmse_raw"}
    unit = [(heat[0] - heat[0].min()) / np.ptp(heat[0]) for heat in (a, b)]
    assert once["ssim"][0] == pytest.approx(ssim(*unit))


def test_inverted_ranks_give_minus_one_and_ties_are_those_of_scipy():
    a = random_maps(1, 5, 5)
    assert scores(a, 1 - a)["spearman"][0] == pytest.approx(-1)
    first, other = (np.round(4 * random_maps(6, 5, 8, seed=k)) for k in (1, 2))
    flat = (maps.reshape(6, -1) for maps in (first, other))
    expected = [spearmanr(*pair).statistic for pair in zip(*flat, strict=True)]
    np.testing.assert_allclose(scores(first, other)["spearman"], expected, atol=1e-12)


def test_a_shifted_bump_moves_by_its_shift_over_the_diagonal():
    bump = np.zeros((1, 20, 30))
    bump[0, 4:7, 5:8] = [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    moved = np.roll(bump, (3, 4), (1, 2))
    assert scores(bump, moved)["centre_shift"][0] == pytest.approx(5 / np.hypot(20, 30))


def test_top10_counts_by_hand_and_shares_ties():
    def ranked(*highest):
        heat = np.zeros(20)
        heat[list(highest)] = np.linspace(9, 8, len(highest))
        return heat.reshape(1, 4, 5)

    flat, tied = np.ones((1, 4, 5)), ranked(0, 5)
    tied[0, 1, 0] = tied[0, 0, 1] = 3.0  # places 5 and 1 share what place 0 leaves
    for a, b, share in (
        (ranked(0, 1), ranked(1, 2), 0.5),  # two of 20 places
        (flat, flat, 0.1),
        (flat, ranked(3, 4), 0.1),
        (tied, ranked(0, 1), 0.75),
        (ranked(0), ranked(0), (1 + 1 / 19) / 2),  # the second place is anybody's
    ):
        assert scores(a, b)["top10"][0] == pytest.approx(share)


def test_zero_constant_and_single_place_maps_have_the_scores_that_are_defined():
    heat = random_maps(3, 6, 6)
    other = np.stack([np.zeros((6, 6)), np.full((6, 6), 0.1), heat[2]])
    other[1, 0, 0] += 1e-9  # rounding does not make a pattern
    table = scores(heat, other)
    assert table["zero"].tolist() == [True, False, False]
    assert table["spearman"].isna().tolist() == [True, True, False]
    assert table["centre_shift"].isna().tolist() == [True, False, False]
    np.testing.assert_allclose(table["top10"][:2], 4 / 36)  # chance
    unit = (heat[0] - heat[0].min()) / np.ptp(heat[0])
    assert table["rmse"][0] == pytest.approx(255 * np.sqrt((unit**2).mean()))
    both = scores(np.zeros((1, 6, 6)), np.zeros((1, 6, 6))).iloc[0]
    assert both["zero"] and both["rmse"] == both["rmse_raw"] == 0
    lone = scores(np.ones((1, 1, 1)), np.full((1, 1, 1), 3.0)).iloc[0]
    assert lone["rmse_raw"] == 2 and lone.drop(["rmse_raw", "zero"]).isna().all()


def test_the_layers_are_the_thesis_s_for_resnet_and_spread_over_mobilenet():
    found = drift.map_layers(resnet18_cifar(width=1 / 8))
    assert list(found) == [f"layer{k}_{n}" for k in (1, 2, 3, 4) for n in (2, 1)]
    ends = [found["layer3_2"], found["layer3_1"]]
    assert ends == ["backbone.layer3.0.conv2", "backbone.layer3.1.conv2"]
    mobile = mobilenet_v2(width=0.25)
    found = drift.map_layers(mobile)
    assert found["block17"] == "backbone.features.17" and len(found) == 8
    short = drift.map_layers(mobilenet_v2(width=0.25, stages=3))
    assert short == {f"block{k:02d}": f"backbone.features.{k}" for k in range(1, 7)}
    assert drift.map_layers(with_head(mobile))["block01"] == "backbone.body.features.1"
    assert drift.map_layers(cnn()) == {f"blocks.{k}": f"backbone.blocks.{k}" for k in range(3)}
    assert drift.map_layers(seesaw()) == {"0": "0"}
    with pytest.raises(ValueError, match="no known layers .*pass methods="):
        drift.map_layers(nn.Sequential(nn.Flatten(), nn.Linear(9, 2)))


def test_maps_of_one_pass_are_those_of_gradcam_and_saliency():
    net, x = resnet18_cifar(width=1 / 8).eval(), images(2, side=32)
    target = torch.tensor([1, 0])
    found, layers = drift.read(net, x, target=target)[2], drift.map_layers(net)
    cams = [(method, label) for method in ("gradcam++", "gradcam") for label in layers]
    assert list(found) == [*cams, ("saliency", "input")]
    pairs = []
    for label in ("layer1_1", "layer4_1"):
        for method, plus in (("gradcam++", True), ("gradcam", False)):
            expected = gradcam(net, x, layers[label], target=target, plus=plus).grid
            pairs.append((found[method, label], expected))
    pool = nn.AdaptiveAvgPool2d(28)
    pairs.append((found["saliency", "input"], pool(saliency(net, x, target=target).maps)))
    small = x[..., :20, :24]  # is not averaged
    own = drift.read(net, small, methods=["saliency"])[2]
    pairs.append((own["saliency", "input"], saliency(net, small).maps))
    for heat, expected in pairs:
        assert expected.amax() > 0 and (heat - expected).abs().max() <= 1e-6 * expected.amax()


# measure


def test_the_class_of_the_clean_image_is_explained_also_where_the_answer_flips():
    # Dark: class 1; 0.5 lighter: class 0, and nothing is clipped.
    x = 0.25 + 0.2 * (images(3, side=8) - 0.4)
    options = {"names": ["brightness"], "severities": [5], "methods": ["gradcam"]}
    predictions, moved = drift.measure(seesaw(), x, [1, 1, 1], [5, 2, 9], **options)
    by = predictions.set_index(["corruption", "image"])["predicted"]
    assert (by["clean"] == 1).all() and (by["brightness"] == 0).all()
    copies = moved[moved["corruption"] == "brightness"]
    assert (moved["target"] == 1).all() and (moved["layer"] == "0").all()
    np.testing.assert_allclose(copies["spearman"], 1, atol=0.01)  # the map of class 0 would give -1
    np.testing.assert_allclose(copies["rmse"], 0, atol=1e-3)
    # Weight 1/64 times the shift by 0.5.
    np.testing.assert_allclose(copies["rmse_raw"], 0.5 / 64, rtol=1e-4)
    assert moved["image"].unique().tolist() == [5, 2, 9]


def test_tables_have_the_agreed_columns_and_rows():
    net, x = resnet18_cifar(width=1 / 8, num_classes=3).eval(), images(3, side=16)
    before, options = copy.deepcopy(net.state_dict()), {"names": ["contrast"], "severities": [2, 5]}
    labels, ids = torch.tensor([0, 2, 1]), [4, 0, 7]
    predictions, moved = drift.measure(net, x, labels, ids, **options)
    assert list(predictions) == [*"image label corruption severity predicted p0 p1 p2".split()]
    assert list(moved) == [*drift.KEYS, *drift.SIGN, "zero"]
    assert len(predictions) == 3 * 3 and len(moved) == 3 * (2 + 2) * 17
    assert not moved.duplicated(KEYS).any() and moved["severity"].isin([0, 2, 5]).all()
    clean, expected = predictions.query("corruption == 'clean'"), net(x).softmax(1).detach()
    assert clean["severity"].eq(0).all() and clean["label"].tolist() == [0, 2, 1]
    np.testing.assert_allclose(clean[["p0", "p1", "p2"]], expected, atol=1e-6)
    assert clean["predicted"].tolist() == expected.argmax(1).tolist()
    assert (moved.groupby("image")["target"].first()[ids].to_numpy() == clean["predicted"]).all()
    assert moved.loc[moved["method"] == "saliency", "layer"].eq("input").all()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    alone, nothing = drift.measure(net, x, labels, ids, methods=(), **options)
    pd.testing.assert_frame_equal(alone, predictions, check_exact=False, atol=1e-6)
    assert len(nothing) == 0 and list(nothing) == list(moved)


def test_rows_depend_on_the_image_and_its_id_not_on_batches_or_order():
    net, x = mobilenet_v2(width=0.25, stages=2).eval(), images(5, side=16)
    ids, order = np.array([3, 11, 4, 8, 6]), [4, 0, 2, 1, 3]
    options = {"names": ["gaussian_noise"], "severities": [3], "methods": ["gradcam", "saliency"]}

    def measured(which, ids, **more):
        return drift.measure(net, x[which], np.zeros(len(which), int), ids, **options, **more)

    def same(tables, others):
        for a, b in zip(tables, others, strict=True):
            pd.testing.assert_frame_equal(a, b, check_exact=False, rtol=1e-3, atol=0.02)

    def copies(tables):
        keys = (KEYS[:3], KEYS)
        tables = [t[t["severity"] > 0].sort_values(by) for t, by in zip(tables, keys, strict=True)]
        return [t.reset_index(drop=True) for t in tables]

    first = measured(range(5), ids, batch_size=5)
    same(first, measured(range(5), ids, batch_size=2))  # references and the order of the rows too
    same(copies(first), copies(measured(order, ids[order], batch_size=3)))
    for other in (measured(range(5), ids + 100), measured(range(5), ids, seed=1)):  # other noise
        maps = [copies(tables)[1].query("method == 'saliency'") for tables in (first, other)]
        assert (maps[0]["rmse"] - maps[1]["rmse"]).abs().min() > 1e-3


def test_the_floor_is_zero_and_mild_corruptions_lie_between_it_and_the_ceiling():
    net, x = resnet18_cifar(width=1 / 8).eval(), images(6, side=32)
    options = {"names": ["brightness"], "severities": [1], "scale": "medmnist-c", "batch_size": 4}
    _, moved = drift.measure(net, x, [0] * 6, range(6), **options)
    floor = moved[moved["corruption"] == drift.FLOOR]
    assert floor["rmse"].max() < 0.1 and floor["spearman"].min() > 0.999
    assert floor["centre_shift"].max() < 1e-4
    means = moved.groupby(["corruption", "method", "layer"])["rmse"].mean().unstack("corruption")
    assert len(means) == 17 and (means[drift.CEILING] > 5).all()
    assert (means["brightness"] < means[drift.CEILING]).mean() > 0.8


def test_the_random_pair_is_another_image_explained_for_the_first_one_s_class():
    spot = 0.2 * images(1, side=8)[0]
    x = torch.stack([0.9 - spot, 0.1 + spot])  # class 0 and class 1
    _, moved = drift.measure(seesaw(), x, [0, 1], [0, 1], names=[], methods=["gradcam"])
    pair = moved[moved["corruption"] == drift.CEILING]
    assert pair["target"].tolist() == [0, 1]
    # One image is the other's negative: their maps are opposite for one class.
    np.testing.assert_allclose(pair["spearman"], -1, atol=0.01)


@pytest.mark.parametrize("squeeze", [False, True])
def test_one_logit_is_read_as_two_classes(squeeze):
    torch.manual_seed(3)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)]
    net, x = nn.Sequential(*layers, *([nn.Flatten(0)] if squeeze else [])).eval(), images(3, side=8)
    predictions, moved = drift.measure(net, x, [0, 1, 1], [0, 1, 2], names=[])
    z = net(x).reshape(-1).detach()
    np.testing.assert_allclose(predictions["p1"], z.sigmoid(), atol=1e-6)
    np.testing.assert_allclose(predictions["p0"] + predictions["p1"], 1)
    assert predictions["predicted"].tolist() == (z > 0).long().tolist()
    assert moved.groupby("image")["target"].first().tolist() == (z > 0).long().tolist()


def test_measure_refuses_bad_input_before_any_work():
    net, x, runs = seesaw(), images(2, side=8), []
    net.register_forward_hook(lambda *_: runs.append(1))
    good = {"images": x, "labels": [0, 1], "ids": [0, 1], "methods": ()}
    for wrong, said in (
        ({"images": x[:1], "labels": [0], "ids": [0]}, "two images or more"),
        ({"ids": [3, 3]}, "an id of its own"),
        ({"methods": ["cam"]}, "methods must be some of"),
    ):
        with pytest.raises(ValueError, match=said):
            drift.measure(net, **(good | wrong))
    assert not runs
