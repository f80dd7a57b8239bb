"""Models: the door in [0, 1], weights from files, spectral normalisation, files that load strictly or not."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import MobileNet_V2_Weights
from torchvision.models import mobilenet_v2 as torchvision_mobilenet_v2

from dlia_utils import models
from dlia_utils.models.lipschitz import quick_input_gradient
from dlia_utils.models.mobilenet import IMAGENET_MEAN, IMAGENET_STD


def small(**options):
    return models.mobilenet_v2(width=0.25, **options)


def equal_states(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------ PixelModel and MobileNetV2


def test_a_grey_image_is_the_same_as_three_equal_channels_normalised_by_hand():
    model = small().eval()
    x = torch.rand(2, 1, 32, 32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = model.backbone((x.expand(-1, 3, -1, -1) - mean) / std)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x.expand(-1, 3, -1, -1)), expected)


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (2, 4, 8, 8), (1, 8, 8), (8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[B, 1, H, W\]"):
        small()(torch.rand(shape))


def test_the_seed_decides_the_weights_and_the_callers_random_stream_stays():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = small(seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert equal_states(first, small(seed=3).state_dict())
    assert not equal_states(first, small(seed=4).state_dict())


@pytest.fixture(scope="module")
def published() -> dict:
    """What a published file holds: 1000 classes, no normalisation buffers."""
    torch.manual_seed(11)
    return torchvision_mobilenet_v2(width_mult=0.25).state_dict()


def written(state, tmp_path):
    torch.save(state, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("head", ["1000 classes", "none", "half"])
def test_a_file_gives_the_features_and_the_seed_gives_a_last_layer_that_does_not_fit(
    published, tmp_path, caplog, head
):
    dropped = {"1000 classes": [], "none": ["weight", "bias"], "half": ["bias"]}[head]
    state = {
        key: value
        for key, value in published.items()
        if key.removeprefix("classifier.1.") not in dropped
    }
    with caplog.at_level("INFO", "dlia_utils"):
        model = small(weights=written(state, tmp_path))
    backbone, fresh = model.backbone.state_dict(), small().backbone.state_dict()
    assert all(
        torch.equal(backbone[key], published[key])
        for key in backbone
        if key.startswith("features.")
    )
    assert torch.equal(backbone["classifier.1.weight"], fresh["classifier.1.weight"])
    assert "weights.pth" in caplog.text and str(tmp_path) not in caplog.text


def test_a_last_layer_that_fits_is_taken(tmp_path):
    state = small(seed=9).backbone.state_dict()
    assert equal_states(small(weights=written(state, tmp_path)).backbone.state_dict(), state)


def test_a_file_that_does_not_fit_is_refused_with_the_keys(published, tmp_path):
    name = "features.0.0.weight"
    missing = {key: value for key, value in published.items() if key != name}
    for state, message in [
        (missing, f"missing {name}"),
        ({**published, "extra": torch.zeros(1)}, "unknown extra"),
        ({**published, name: torch.zeros(1, 2)}, f"{name}: \\(1, 2\\) in the file"),
        (
            {f"module.{key}": value for key, value in published.items()},
            "unknown module.features.0.0.weight|and ",
        ),
        ({"state_dict": published}, "not a plain state dict"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(weights=written(state, tmp_path))
    with pytest.raises(FileNotFoundError, match="DLIA_WEIGHTS"):
        small(weights=tmp_path / "nowhere.pth")


def test_imagenet_is_the_file_that_the_environment_names_or_a_download(
    published, tmp_path, monkeypatch
):
    monkeypatch.setenv("DLIA_WEIGHTS", str(written(published, tmp_path)))
    taken = small(weights="imagenet").backbone.state_dict()["features.0.0.weight"]
    assert torch.equal(taken, published["features.0.0.weight"])

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.delenv("DLIA_WEIGHTS")
    monkeypatch.setattr(MobileNet_V2_Weights, "get_state_dict", offline)
    with pytest.raises(RuntimeError, match="weights=None"):
        small(weights="imagenet")


# ------------------------------------------------------------------ files


def test_a_saved_model_comes_back_bit_equal_with_its_recipe(tmp_path):
    model = small(num_classes=3, seed=2)
    loaded = models.load(models.save(model, tmp_path / "model.pt", meta={"epoch": 4}))
    assert loaded.recipe == model.recipe and not loaded.training
    assert equal_states(loaded.state_dict(), model.state_dict())


def test_other_files_and_other_models_are_refused(tmp_path):
    path = models.save(nn.Linear(2, 2), tmp_path / "linear.pt", meta={})
    with pytest.raises(ValueError, match="pass build="):
        models.load(path)
    with pytest.raises(
        ValueError, match=r"0 of 2 entries matched.*weight: \(2, 2\), expected \(3, 2\)"
    ):
        models.load(path, lambda: nn.Linear(2, 3))
    with pytest.raises(ValueError, match="unknown bias"):
        models.load(path, lambda: nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match="not written by models.save"):
        models.load(written(nn.Linear(2, 2).state_dict(), tmp_path))
    with pytest.raises(FileNotFoundError):
        models.load(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="known: .*mobilenet_v2"):
        models.create("alexnet")


# ------------------------------------------------------------------ spectral normalisation


def test_every_layer_has_norm_one_and_bakes_into_a_plain_model_of_equal_outputs(tmp_path):
    model = models.spectral_normalize(small())
    for _ in range(20):  # the power iteration makes one step per forward pass in train mode
        model(torch.rand(2, 1, 32, 32))
    model.eval()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    norms = torch.stack(
        [torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2) for layer in layers]
    )
    assert len(layers) == 53 and (norms - 1).abs().max() < 0.1

    x = torch.rand(3, 1, 32, 32)
    expected = model(x)
    saved = models.save(model, tmp_path / "normalised.pt", meta={})
    baked = models.bake(copy.deepcopy(model))
    plain = small(seed=1).eval()
    plain.load_state_dict(baked.state_dict(), strict=True)
    assert torch.equal(plain(x), expected)
    loaded = models.load(saved)
    assert (
        torch.equal(loaded(x), expected) and loaded.state_dict().keys() == plain.state_dict().keys()
    )
    with pytest.raises(ValueError, match="already"):
        models.spectral_normalize(model)


def test_baking_changes_neither_flags_nor_a_plain_model():
    model = models.spectral_normalize(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2).eval()))
    assert models.bake(model)[0].training and not model[1].training
    assert equal_states(small().state_dict(), models.bake(small()).state_dict())


@pytest.mark.parametrize("stride", [1, 2])
def test_the_quick_second_derivative_is_torchs(stride):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, stride=stride, padding=1, groups=6, bias=False)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Tanh(), conv, nn.Tanh(), nn.Flatten()).double()
    x = torch.rand(3, 2, 7, 7, dtype=torch.double, requires_grad=True)

    def gradients() -> list:
        out = model(x).square().sum()
        (gradient,) = torch.autograd.grad(out, x, create_graph=True)
        return torch.autograd.grad(out + gradient.square().sum(), [x, *model.parameters()])

    expected = gradients()
    with quick_input_gradient():
        out = model(x).square().sum()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    quick = torch.autograd.grad(out + gradient.square().sum(), [x, *model.parameters()])
    for ours, torchs in zip(quick, expected, strict=True):
        torch.testing.assert_close(ours, torchs)
