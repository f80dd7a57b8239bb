"""Networks by the name that torchvision or timm gives them, as models of images in [0, 1]."""

from __future__ import annotations

import difflib
import importlib
import logging
from types import ModuleType

import torch
import torchvision
from torch import nn

from . import layers
from .mobilenet import IMAGENET_MEAN, IMAGENET_STD, mobilenet_v2
from .pixel import PixelModel, wrap
from .resnet import resnet50_v2

OWN = {"mobilenet_v2": mobilenet_v2, "resnet50_v2": resnet50_v2}
# One answer and the same inputs with and without weights; torchvision's defaults depend on them.
OPTIONS = {
    name: {"aux_logits": False, "transform_input": True} for name in ("googlenet", "inception_v3")
}

log = logging.getLogger("dlia_utils")


def backbone(
    name: str, *, num_classes: int = 2, pretrained: bool = False, seed: int = 0
) -> PixelModel:
    """A network by its name, for images in [0, 1], with a last layer for `num_classes`.

    name: "mobilenet_v2" or "resnet50_v2", which are the suite's; a classification model of
    torchvision, such as "resnet18", "densenet121" or "convnext_tiny"; else one of timm, where that
    is installed. Never another network than the one that was named. pretrained: with its ImageNet
    weights and a last layer drawn from `seed`; else all is drawn from `seed`. The caller's random
    stream stays as it is. `recipe` builds the same network again, so that `models.save`,
    `models.load` and `models.with_head` work.
    Shapes: [B, 1 or 3, H, W] -> [B, num_classes].
    Raises: ValueError for an unknown name (the nearest are named) or fewer than 2 classes;
    RuntimeError for weights that cannot be had.

    >>> model = backbone("resnet18", num_classes=3).eval()
    >>> model(torch.rand(2, 1, 64, 64)).shape, model.recipe["arch"]
    (torch.Size([2, 3]), 'resnet18')
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, not {num_classes}")
    if name in OWN:
        weights = "imagenet" if pretrained else None
        return OWN[name](num_classes=num_classes, weights=weights, seed=seed)
    known = torchvision.models.list_models(module=torchvision.models)
    options = {"arch": name, "num_classes": num_classes, "pretrained": pretrained, "seed": seed}
    if name in known:
        return from_torchvision(**options)
    timm = _timm()
    if timm is not None and timm.is_model(name.split(".")[0]):  # after the dot: which weights
        return from_timm(**options)
    known = {*OWN, *known, *(timm.list_models() if timm else [])}
    near = difflib.get_close_matches(name.lower(), sorted(known), n=4, cutoff=0.5)
    missing = "" if timm else "; timm, which knows more, is not installed (pip install timm)"
    raise ValueError(f"unknown network {name!r}; near: {', '.join(near) or 'none'}{missing}")


def from_torchvision(
    *, arch: str, num_classes: int = 2, pretrained: bool = False, seed: int = 0
) -> PixelModel:
    """`backbone` for a name of torchvision: what the recipe of such a model is made of."""
    build, options = torchvision.models.get_model_builder(arch), OPTIONS.get(arch, {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not pretrained:
            network = build(weights=None, num_classes=num_classes, **options)
        else:
            weights = torchvision.models.get_model_weights(arch).DEFAULT
            try:
                network = build(weights=weights, progress=False, **options)
            except OSError as error:
                raise RuntimeError(
                    f"the ImageNet weights of {arch} could not be downloaded: switch the internet on, "
                    f"or put {weights.url} into the folder `checkpoints` of torch.hub.get_dir(), "
                    "or begin from random weights with pretrained=False"
                ) from error
            last = layers.last_linear(layers.trace(network))
            layers.replace(network, last, lambda old: nn.Linear(old.in_features, num_classes))
    return _finished(network, "torchvision", arch, num_classes, pretrained, seed)


def from_timm(
    *, arch: str, num_classes: int = 2, pretrained: bool = False, seed: int = 0
) -> PixelModel:
    """`backbone` for a name of timm: what the recipe of such a model is made of."""
    timm = _timm()
    if timm is None:
        raise RuntimeError(f"{arch} is a network of timm, which is not installed: pip install timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = timm.create_model(arch, pretrained=pretrained, num_classes=num_classes)
        except Exception as error:  # the hub's client raises types of its own
            if not pretrained:
                raise
            raise RuntimeError(
                f"timm could not fetch the weights of {arch} ({type(error).__name__}: {error}): "
                "switch the internet on, or begin from random weights with pretrained=False"
            ) from error
    return _finished(network, "timm", arch, num_classes, pretrained, seed)


def _timm() -> ModuleType | None:
    try:
        return importlib.import_module("timm")
    except ImportError:
        return None


def _finished(
    network: nn.Module, source: str, arch: str, num_classes: int, pretrained: bool, seed: int
) -> PixelModel:
    trained = getattr(network, "pretrained_cfg", {})  # timm's: what the network was trained with
    mean, std = trained.get("mean", IMAGENET_MEAN), trained.get("std", IMAGENET_STD)
    log.info(
        "%s of %s: %s", arch, source, "ImageNet weights" if pretrained else f"random, seed {seed}"
    )
    recipe = {"name": source, "arch": arch, "num_classes": num_classes}
    return wrap(network, mean=mean, std=std, recipe=recipe)
