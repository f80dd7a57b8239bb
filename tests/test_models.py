"""MobileNetV2 and its weights from files, and the suite's files, which load strictly or not."""

import pytest
import torch
from test_cnn import equal
from torch import nn
from torchvision.models import MobileNet_V2_Weights
from torchvision.models import mobilenet_v2 as torchvision_mobilenet_v2

from dlia_utils import models
from dlia_utils.models.mobilenet import IMAGENET_MEAN, IMAGENET_STD


def small(**options):
    return models.mobilenet_v2(width=0.25, **options)


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


@pytest.fixture(scope="module")
def published() -> dict:
    """What a published file holds: 1000 classes, no normalisation buffers."""
    torch.manual_seed(11)
    return torchvision_mobilenet_v2(width_mult=0.25).state_dict()


def written(state, tmp_path):
    torch.save(state, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("dropped", [(), ("bias",)])
def test_a_file_gives_the_features_and_the_seed_gives_a_last_layer_that_does_not_fit(
    published, tmp_path, caplog, dropped
):
    state = {k: v for k, v in published.items() if k.removeprefix("classifier.1.") not in dropped}
    with caplog.at_level("INFO", "dlia_utils"):
        model = small(weights=written(state, tmp_path))
    backbone, fresh = model.backbone.state_dict(), small().backbone.state_dict()
    kept = [key for key in backbone if key.startswith("features.")]
    assert all(torch.equal(backbone[key], published[key]) for key in kept)
    assert torch.equal(backbone["classifier.1.weight"], fresh["classifier.1.weight"])
    assert "weights.pth" in caplog.text and str(tmp_path) not in caplog.text


def test_a_file_that_does_not_fit_is_refused_with_the_keys(published, tmp_path):
    name = "features.0.0.weight"
    for state, message in [
        ({key: value for key, value in published.items() if key != name}, f"missing {name}"),
        ({**published, "extra": torch.zeros(1)}, "unknown extra"),
        ({**published, name: torch.zeros(1, 2)}, f"{name}: \\(1, 2\\), expected"),
        ({"state_dict": published}, "no plain state dict"),
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


def test_a_saved_model_comes_back_bit_equal_with_its_recipe(tmp_path):
    model = small(num_classes=3, seed=2)
    again = small(num_classes=3, weights=written(model.backbone.state_dict(), tmp_path))
    assert equal(again.state_dict(), model.state_dict())  # a last layer that fits is taken
    loaded = models.load(models.save(model, tmp_path / "model.pt", meta={"epoch": 4}))
    assert loaded.recipe == model.recipe and not loaded.training
    assert equal(loaded.state_dict(), model.state_dict())
    later = {"hat_wrn_34_10": {"width": 1 / 16}, "faster_rcnn": {"num_classes": 2, "size": 64}}
    for name, options in later.items():  # whose code is imported when asked for
        assert models.create(name, **options).recipe["name"] == name


def test_other_files_and_other_models_are_refused(tmp_path):
    path = models.save(nn.Linear(2, 2), tmp_path / "linear.pt", meta={})
    plain = written(nn.Linear(2, 2).state_dict(), tmp_path)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(path.read_bytes()[:-300])
    for file, build, message in [
        (path, None, "pass build="),
        (path, lambda: nn.Linear(2, 3), r"0 of 2 .*weight: \(2, 2\), expected \(3, 2\)"),
        (path, lambda: nn.Linear(2, 2, bias=False), "unknown bias"),
        (plain, None, "not written by models.save"),
        (damaged, None, "damaged.pt is damaged .*delete it"),
    ]:
        with pytest.raises(ValueError, match=message):
            models.load(file, build)
    with pytest.raises(ValueError, match="known: .*mobilenet_v2"):
        models.create("alexnet")
