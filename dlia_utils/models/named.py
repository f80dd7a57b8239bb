"""Networks by the name that torchvision or timm gives them, as models of images in [0, 1]."""

from __future__ import annotations

import difflib
import importlib

import torchvision
from torch import nn

from ..units import check_numbers
from .layers import check_sizes, drawn, last_linear, trace
from .mobilenet import IMAGENET_MEAN, IMAGENET_STD, mobilenet_v2
from .pixel import PixelModel, wrap
from .resnet import resnet50_v2, timm_model

OWN = {"mobilenet_v2": mobilenet_v2, "resnet50_v2": resnet50_v2}
# One answer and the same inputs with and without weights; torchvision's defaults depend on them.
OPTIONS = dict.fromkeys(
    ("googlenet", "inception_v3"), {"aux_logits": False, "transform_input": True}
)


def backbone(
    name: str, *, num_classes: int = 2, pretrained: bool = False, seed: int = 0
) -> PixelModel:
    """A network by its name, for images in [0, 1], with a last layer for `num_classes`.

    name: "mobilenet_v2", "resnet50_v2" (the suite's), or one of torchvision's or, if installed,
    timm's. pretrained: with ImageNet weights and a last layer drawn from `seed`.
    Raises: ValueError for an unknown name; RuntimeError for weights that cannot be had.

    >>> backbone("resnet18", num_classes=3).backbone.fc.out_features
    3
    """
    check_numbers("[2,inf)", whole=True, num_classes=num_classes)
    check_sizes(seed=seed)
    if name in OWN:
        weights = "imagenet" if pretrained else None
        return OWN[name](num_classes=num_classes, weights=weights, seed=seed)
    options = {"arch": name, "num_classes": num_classes, "pretrained": pretrained, "seed": seed}
    known = torchvision.models.list_models(module=torchvision.models)
    if name in known:
        return build("torchvision", **options)
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        timm = None
    if timm is not None and timm.is_model(name.split(".")[0]):  # after the dot: which weights
        return build("timm", **options)
    known = {*OWN, *known, *(timm.list_models() if timm else [])}
    near = difflib.get_close_matches(name.lower(), sorted(known), n=4, cutoff=0.5)
    missing = "" if timm else "; timm, which knows more, is not installed (pip install timm)"
    raise ValueError(f"unknown network {name!r}; near: {', '.join(near) or 'none'}{missing}")


def build(
    source: str, *, arch: str, num_classes: int = 2, pretrained: bool = False, seed: int = 0
) -> PixelModel:
    """`backbone` for a name of "torchvision" or "timm": what their recipes are made of."""
    if source == "timm":
        advice = "begin from random weights with pretrained=False"
        options = dict(pretrained=pretrained, num_classes=num_classes)
        network = drawn(seed, timm_model, arch, advice, **options)
    else:
        network = drawn(seed, _torchvision, arch, num_classes, pretrained)
    trained = getattr(network, "pretrained_cfg", {})  # timm's: what the network was trained with
    mean, std = trained.get("mean", IMAGENET_MEAN), trained.get("std", IMAGENET_STD)
    recipe = {"name": source, "arch": arch, "num_classes": num_classes}
    return wrap(network, mean=mean, std=std, recipe=recipe)


def _torchvision(arch: str, num_classes: int, pretrained: bool) -> nn.Module:
    make, options = torchvision.models.get_model_builder(arch), OPTIONS.get(arch, {})
    if not pretrained:
        return make(weights=None, num_classes=num_classes, **options)
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    try:
        network = make(weights=weights, progress=False, **options)
    except OSError as error:
        place = f"put {weights.url} into `checkpoints` of torch.hub.get_dir()"
        fix = f"switch the internet on, {place}, or use pretrained=False"
        raise RuntimeError(f"the weights of {arch} could not be downloaded: {fix}") from error
    last = last_linear(trace(network))
    features = network.get_submodule(last).in_features
    network.set_submodule(last, nn.Linear(features, num_classes))
    return network
