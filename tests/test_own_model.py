"""Your own model: wrapped, checked at the door, by name, under a new head, its layers found."""

import sys
import types

import pytest
import torch
import torchvision
from test_cnn import equal, kept
from torch import nn
from torchvision.models import ResNet18_Weights

from dlia_utils import models
from dlia_utils.attacks import evaluate
from dlia_utils.explain import drift, gradcam
from dlia_utils.models.mobilenet import IMAGENET_MEAN, IMAGENET_STD

# name: number of blocks, the last one, the layer of the last map
FAMILIES = {
    "resnet18": (8, "layer4.1", "layer4.1"),
    "densenet121": (7, "features.denseblock4", "features.norm5"),
    "efficientnet_b0": (18, "features.8", "features.8"),
    "mobilenet_v3_small": (13, "features.12", "features.12"),
    "convnext_tiny": (22, "features.7.2", "features.7.2"),
    "vgg11": (8, "features.18", "features.19"),
}
X = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 1])
HALF = {"mean": 0.5, "std": 0.25}


def homemade(channels=3, outputs=2):
    """A flat chain for 32 px images alone."""
    torch.manual_seed(1)
    body = [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    body += [nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True)]
    end = [nn.Flatten(), nn.Dropout(0.5), nn.Linear(12 * 8 * 8, outputs)]
    return nn.Sequential(*body, nn.MaxPool2d(2), *end)


class Answers(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.forward = forward


def refused(message, call, kind=ValueError):
    with pytest.raises(kind, match=message):
        call()


@pytest.fixture(scope="module", params=FAMILIES)
def named(request):
    """A network by its name whose batch norms know their maps."""
    model = models.backbone(request.param, seed=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(1)))
    return request.param, model.eval()


def test_a_wrapped_network_is_the_network_on_images_normalised_by_hand():
    net = torchvision.models.resnet18(num_classes=2).eval()
    model = models.wrap(net, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    hand = Answers(lambda x: net((x.expand(-1, 3, -1, -1) - mean) / std)).eval()
    assert torch.equal(model(X), hand(X)) and model.backbone is net and not model.training
    data = (X[..., :32, :32], hand(X[..., :32, :32]).argmax(1))
    options = dict(steps=3, attacks=["fgsm", "pgd_margin"], progress=False, fast=False)
    ours, theirs = (evaluate.robust(m, data, [1 / 255, 8 / 255], **options) for m in (model, hand))
    assert ours.table().equals(theirs.table())


def test_grey_networks_are_not_given_three_channels_and_no_numbers_mean_no_change():
    x, net = X[..., :32, :32], homemade(channels=1).eval()
    model = models.wrap(net, **HALF)
    assert torch.equal(model(x), net((x - 0.5) / 0.25)) and model.mean.shape == (1, 1, 1, 1)
    assert torch.equal(models.wrap(net)(x), net(x))
    refused(r"expected images \[B, 1, H, W\], got", lambda: model(x.expand(-1, 3, -1, -1)))
    assert models.wrap(nn.Flatten(), mean=[0.5], std=[0.25])(x).shape == (3, 32 * 32)
    assert models.wrap(homemade(), **HALF).mean.flatten().tolist() == [0.5] * 3


def test_numbers_that_make_no_sense_are_refused_and_what_is_no_bare_network():
    for net, mean, std, message in [
        (homemade(), 0.5, None, "both mean and std"),
        (homemade(), [123.7, 116.3, 103.5], [58.4, 57.1, 57.4], "0..255 scale. divide by 255"),
        (homemade(), [0.5, 0.5], 0.5, "one number or 3"),
        (models.cnn(), 0.5, 0.25, "already"),
    ]:
        refused(message, lambda net=net, m=mean, s=std: models.wrap(net, mean=m, std=s))


def test_answers_that_are_not_a_row_of_logits_an_image_are_refused():
    for answer, message in [
        (lambda x: x.mean((1, 2, 3)), r"nn.Linear\(n, 2\).*models.TwoLogits"),
        (lambda x: x.new_zeros(len(x), 1000), "1000 logits but .* 2 classes.*with_head"),
        (lambda x: x.new_full((len(x), 2), torch.nan), "NaN or infinite"),
        (lambda x: x.new_full((len(x), 2), 0.5), "take the softmax off"),
        (lambda x: {"logits": x}, r"returns a dict.*\['logits'\]"),
        (lambda x: x, r"returns \[2, 1, 64, 64\] for 2 image"),
    ]:
        model = Answers(answer)
        refused(message, lambda model=model: models.check_classifier(model, X, classes=2))


def test_the_door_names_the_channels_and_the_normalisation():
    net, x = homemade(), X[..., :32, :32]
    for images, message in [
        (x, r"reads 3 channel\(s\), and models.wrap"),
        (4 * x - 2, r"before normalisation.*models.wrap\(net, mean=, std=\)"),
        ((255 * x).byte(), "/ 255"),
    ]:
        refused(message, lambda images=images: models.check_classifier(net, images, classes=2))


def test_a_good_model_passes_and_stays_as_it_was_and_one_logit_becomes_two():
    model, x = models.wrap(homemade(), **HALF), X[..., :32, :32]
    model.backbone[4].eval()
    before = kept(model)
    models.check_classifier(model, x, classes=("normal", "ill"))
    assert equal(kept(model), before) and model.training and not model.backbone[4].training
    assert torch.equal(models.TwoLogits(model.eval(), half=True)(x), model(x))
    net = homemade(outputs=1).eval()
    two = models.wrap(models.TwoLogits(net, half=True), **HALF)
    models.check_classifier(two, x, classes=2)
    torch.testing.assert_close(two(x).softmax(1)[:, 1], net(two.normalize(x)).sigmoid()[:, 0])
    assert models.last_map_layer(two) == "backbone.model.5"


def test_pretrained_takes_torchvisions_weights_and_a_head_of_its_own(monkeypatch):
    published = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *_, **__: published)
    model, again = (
        models.backbone("resnet18", num_classes=3, pretrained=True, seed=1) for _ in range(2)
    )
    state = kept(model.backbone)
    head = {key: state.pop(key) for key in ("fc.weight", "fc.bias")}
    assert equal(state, {key: published[key] for key in state})
    assert head["fc.weight"].shape == (3, 512) and equal(kept(again), kept(model))

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    message = "resnet18 could not be downloaded.*checkpoints.*pretrained=False"
    refused(message, lambda: models.backbone("resnet18", pretrained=True), RuntimeError)


def test_timm_is_asked_for_what_torchvision_does_not_know(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    refused("near: resnet18, .*timm.* not installed", lambda: models.backbone("ResNet-18"))
    refused("pip install timm", lambda: models.create("timm", arch="resnet10t"), RuntimeError)

    def create_model(name, *, pretrained, num_classes):
        if pretrained:
            raise LookupError("hub")
        net = homemade(outputs=num_classes)
        net.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        return net

    calls = {"is_model": "tiny_net".__eq__, "list_models": lambda: ["tiny_net"]}
    timm = types.SimpleNamespace(**calls, create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", timm)
    model = models.backbone("tiny_net.in1k", num_classes=3).eval()
    again = models.load(models.save(model, tmp_path / "model.pt", meta={}))
    assert equal(kept(again), kept(model)) and again.mean.flatten().tolist() == [0.5] * 3
    with pytest.raises(RuntimeError, match="timm could not .*LookupError"):
        models.backbone("tiny_net", pretrained=True)


def test_layers_are_found_and_the_model_stays_as_it_was(named):
    name, model = named
    count, block, last = FAMILIES[name]
    before = kept(model)
    model.train().backbone.eval()
    assert len(models.blocks(model)) == count and models.blocks(model)[-1] == f"backbone.{block}"
    assert models.last_map_layer(model) == f"backbone.{last}"
    assert model.training and not model.backbone.training and equal(kept(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    maps = drift.read(model.eval(), X, target=0, methods=["gradcam"])[2]
    sides = [heat.shape[-1] for heat in maps.values()]
    assert 7 <= len(maps) <= drift.POSITIONS and list(maps)[-1] == ("gradcam", last)
    assert sides == sorted(sides, reverse=True) and sides[-1] > 1
    assert not gradcam(model, X).zero.all()


def test_a_new_head_learns_on_a_frozen_body_and_comes_back_from_a_file(named, tmp_path):
    name, model = named
    made = models.with_head(model, num_classes=3)
    body, ends = dict(made.backbone.body.named_parameters()), ("features.norm5.", "classifier.")
    for count in (1, 2, FAMILIES[name][0]):
        models.unfreeze(made, count)
        names = models.blocks(made)[-count:]
        live = tuple(f"{block.removeprefix('backbone.body.')}." for block in names)
        expected = {key for key in body if key.startswith(live + ends)}
        assert {key for key, p in body.items() if p.requires_grad} == expected
    statistics = kept(models.unfreeze(made, 0).backbone.body)
    assert made.train()(X).shape == (3, 3) and equal(kept(made.backbone.body), statistics)
    assert made.recipe["body"] == {"name": "torchvision", "arch": name, "num_classes": 2}
    if name == "vgg11":
        return  # half a gigabyte, whose file would show nothing new
    made = models.unfreeze(made.eval(), 1)
    again = models.load(models.save(made, tmp_path / "model.pt", meta={}))
    assert torch.equal(again(X), made(X)) and again.backbone.live == made.backbone.live


def test_a_flat_chain_of_one_size_has_its_convolutions_for_blocks_and_the_map_before_the_pooling():
    net, model = homemade().eval(), models.wrap(homemade(), **HALF)
    assert (
        models.blocks(model) == ["backbone.0", "backbone.3"] and models.last_map_layer(net) == "5"
    )
    made = models.with_head(model, unfrozen=1).eval()
    assert models.last_map_layer(made) == "backbone.body.5" and made.recipe is None
    trains = {
        key.split(".")[0] for key, p in made.backbone.body.named_parameters() if p.requires_grad
    }
    assert trains == {"3", "4"} and made.features(X[..., :32, :32]).shape == (3, 12 * 8 * 8)
    assert gradcam(net, X[:, [0, 0, 0], :32, :32]).grid.shape == (3, 16, 16)
    refused(r"models.wrap\(net, mean=, std=\) makes one", lambda: models.with_head(net))


def test_transformers_want_their_layer_named_and_what_has_no_head_is_refused():
    model = models.wrap(torchvision.models.VisionTransformer(64, 16, 2, 2, 16, 32, num_classes=2))
    refused("rows of tokens.*name the layer", lambda: models.last_map_layer(model))
    refused("no known blocks", lambda: models.blocks(model))
    refused("pass methods=", lambda: drift.map_layers(model))
    made = models.with_head(model, unfrozen="all")
    assert all(p.requires_grad for p in made.parameters()) and made(X).shape == (3, 2)
    refused(r"\[0,0\], not 1; or 'all'", lambda: models.unfreeze(made, 1))
    softmax = models.wrap(nn.Sequential(homemade(), nn.Softmax(1)))
    refused("does not end in an nn.Linear.*softmax", lambda: models.with_head(softmax))


def test_a_model_without_a_recipe_comes_back_through_the_function_that_builds_it(tmp_path):
    def build():
        return models.wrap(homemade(channels=1), **HALF)

    for number, make in enumerate((build, lambda: models.with_head(build(), unfrozen=1))):
        model = make().eval()
        nn.init.ones_(next(model.parameters()))
        path = models.save(model, tmp_path / f"{number}.pt", meta={})
        refused("no recipe: pass build=", lambda path=path: models.load(path))
        again = models.load(path, build=make)
        assert equal(kept(again), kept(model)) and type(again) is type(model) and not again.training
