"""Weights from files and downloads, and the suite's files, which load strictly or not at all."""

import sys
from types import SimpleNamespace

import pytest
import torch
from harm import HARM
from safetensors.torch import save_file
from test_cnn import equal, randomised, tiny_resnet
from torch import nn
from torchvision.models import MobileNet_V2_Weights

from dlia_utils import models
from dlia_utils.models.mobilenet import IMAGENET_MEAN, IMAGENET_STD


def small(**options):
    return models.mobilenet_v2(width=0.25, **options)


def public_mobilenet(classes: int = 1000) -> dict:
    return small(num_classes=classes, seed=11).backbone.state_dict()


def public_resnet(classes: int = 1000) -> dict:
    state = randomised(tiny_resnet(num_classes=classes, seed=7)).backbone.state_dict()
    return {**state, "head.fc.weight": state["head.fc.weight"][:, :, None, None]}


FAMILIES = {  # build, a public file, the variable that may name it, its head, another entry
    "mobilenet": (small, public_mobilenet, "DLIA_WEIGHTS", "classifier.1", "features.0.0.weight"),
    "resnet": (tiny_resnet, public_resnet, "DLIA_RESNETV2_WEIGHTS", "head.fc", "stem.conv.weight"),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def written(state: dict, tmp_path, suffix: str = "pth"):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def test_a_grey_image_is_the_same_as_three_equal_channels_normalised_by_hand():
    model = small().eval()
    x = torch.rand(2, 1, 32, 32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = model.backbone((x.expand(-1, 3, -1, -1) - mean) / std)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x.expand(-1, 3, -1, -1)), expected)
    for shape in ((2, 2, 8, 8), (1, 8, 8)):
        with pytest.raises(ValueError, match=r"\[B, 1, H, W\]"):
            model(torch.rand(shape))


@every_family
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_gives_the_body_and_the_seed_a_head_that_does_not_fit(
    family, suffix, tmp_path, monkeypatch, caplog
):
    build, public, variable, head, _ = FAMILIES[family]
    state = {key: value for key, value in public().items() if key != f"{head}.bias"}
    monkeypatch.setenv(variable, str(written(state, tmp_path, suffix)))
    with caplog.at_level("INFO", "dlia_utils"):
        own = build(weights="imagenet", seed=3).backbone.state_dict()
    fresh = build(seed=3).backbone.state_dict()
    for key, value in own.items():
        assert torch.equal(value, (fresh if key.startswith(head) else state)[key])
    assert f"weights.{suffix}" in caplog.text and str(tmp_path) not in caplog.text


@every_family
def test_a_head_that_fits_is_taken_and_what_does_not_fit_is_refused(family, tmp_path):
    build, public, variable, head, name = FAMILIES[family]
    state = public(classes=2)
    taken = build(weights=written(state, tmp_path)).backbone.state_dict()
    assert torch.equal(taken[f"{head}.weight"], state[f"{head}.weight"].flatten(1))
    for wrong, message in [
        ({key: value for key, value in state.items() if key != name}, f"missing {name}"),
        ({**state, "extra": torch.zeros(1)}, "unknown extra"),
        ({**state, name: torch.zeros(1, 2)}, rf"{name}: \(1, 2\), expected"),
        ({"state_dict": state}, "no plain state dict"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(weights=written(wrong, tmp_path))
    with pytest.raises(FileNotFoundError, match=variable):
        build(weights=tmp_path / "nowhere.pth")


def test_without_a_file_imagenet_is_a_download(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    def create_model(name, *, pretrained):
        assert (name, pretrained) == ("resnetv2_50.a1h_in1k", True)
        return SimpleNamespace(state_dict=public_resnet)

    for _, _, variable, _, _ in FAMILIES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(MobileNet_V2_Weights, "get_state_dict", offline)
    with pytest.raises(RuntimeError, match="weights=None"):
        small(weights="imagenet")
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    stem = tiny_resnet(weights="imagenet").backbone.stem.conv.weight
    assert torch.equal(stem, public_resnet()["stem.conv.weight"])
    for timm, message in [
        (SimpleNamespace(create_model=offline), "ConnectionError.*internet.*DLIA_RESNETV2_WEIGHTS"),
        (None, "pip install timm.*DLIA_RESNETV2_WEIGHTS.*weights=None"),  # not installed
    ]:
        monkeypatch.setitem(sys.modules, "timm", timm)
        with pytest.raises(RuntimeError, match=message):
            tiny_resnet(weights="imagenet")


def test_a_saved_model_comes_back_bit_equal_with_its_recipe(tmp_path):
    model = small(num_classes=3, seed=2)
    loaded = models.load(models.save(model, tmp_path / "model.pt", meta={"epoch": 4}))
    assert loaded.recipe == model.recipe and not loaded.training
    assert equal(loaded.state_dict(), model.state_dict())
    later = {"hat_wrn_34_10": {"width": 1 / 16}, "faster_rcnn": {"num_classes": 2, "size": 64}}
    for name, options in later.items():  # whose code is imported when asked for
        assert models.create(name, **options).recipe["name"] == name


def test_other_files_and_other_models_are_refused(tmp_path):
    path = models.save(nn.Linear(2, 2), tmp_path / "linear.pt", meta={})
    for file, build, message in [
        (path, None, "pass build="),
        (path, lambda: nn.Linear(2, 3), r"0 of 2 .*weight: \(2, 2\), expected \(3, 2\)"),
        (written(nn.Linear(2, 2).state_dict(), tmp_path), None, "not written by models.save"),
    ]:
        with pytest.raises(ValueError, match=message):
            models.load(file, build)
    with pytest.raises(ValueError, match="known: .*mobilenet_v2"):
        models.create("alexnet")


PARTS = {
    "no weights": lambda kept: kept.pop("state_dict"),
    "a list of weights": lambda kept: kept.update(state_dict=[1]),
    "numbers for weights": lambda kept: kept.update(state_dict={"a": 1}),
    "no meta": lambda kept: kept.pop("meta"),
    "a text for a recipe": lambda kept: kept.update(recipe="mobilenet_v2"),
}


@pytest.mark.parametrize("harm", [*HARM, *PARTS])
def test_a_damaged_model_file_is_named_with_the_fix(tmp_path, harm):
    path = models.save(models.cnn(channels=(4,), hidden=4), tmp_path / "best.pt", meta={})
    if harm in HARM:
        path.write_bytes(HARM[harm](path.read_bytes()))
    else:
        kept = torch.load(path, weights_only=True)
        PARTS[harm](kept)
        torch.save(kept, path)
    with pytest.raises(ValueError, match=r"/best\.pt is damaged.*delete it.*copy it again"):
        models.load(path)


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_file_of_weights_is_named(tmp_path, harm):
    path = written({"a": torch.ones(99)}, tmp_path)
    path.write_bytes(HARM[harm](path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name} is damaged.*fetch it again"):
        models.mobilenet_v2(width=0.25, stages=1, weights=path)


RECIPES = [
    {"name": "mobilenet_v2", "width": 500},
    {"name": "cnn", "channels": [50_000, 50_000]},
    {"name": "cnn", "hidden": 10**9},
    {"name": "resnet50_v2", "depths": [90_000] * 4},
    {"name": "cnn", "mean": float("nan")},
    {"name": "mobilenet_v2", "weights": "/etc/passwd"},
    {"name": "hat_wrn_34_10", "pretrained": "public"},
    {"name": "transfer", "body": {"name": "resnet50_v2", "weights": "imagenet"}, "head": "linear"},
    {"name": "timm", "arch": "hf-hub:somebody/something"},
    {"name": "torchvision", "arch": "../up"},
    {"name": "nobody"},
    {"width": 1.0},
    {"name": "cnn", "colour": 3},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: str(recipe)[:60])
def test_a_recipe_in_a_file_is_data_of_bounded_size(tmp_path, recipe):
    model = models.cnn(channels=(4,), hidden=4)
    model.recipe = recipe
    path = models.save(model, tmp_path / "best.pt", meta={})
    with pytest.raises(ValueError, match=r"best\.pt is damaged.*delete it"):
        models.load(path)


def test_a_recipe_that_draws_what_is_replaced_is_read(tmp_path):
    body = models.resnet50_v2(width=1 / 16, depths=(1, 1, 1, 1))
    plain = models.mobilenet_v2(width=0.25, stages=2)
    for model in (models.with_head(body), models.spectral_normalize(plain)):
        path = models.save(model, tmp_path / "best.pt", meta={})
        assert models.load(path).recipe == model.recipe
