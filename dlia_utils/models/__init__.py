"""Models by name, and their weights on disk: saved with a recipe, loaded strictly or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import atomic_path
from . import robust
from .cnn import cnn, summary
from .detector import Detector, faster_rcnn
from .lipschitz import (
    bake,
    compare_norms,
    lipschitz_bound,
    operator_norm,
    spectral_like,
    spectral_normalize,
)
from .mobilenet import mobilenet_v2
from .named import backbone, from_timm, from_torchvision
from .pixel import PixelModel, TwoLogits, check_classifier, wrap
from .resnet import resnet18_cifar, resnet50_v2
from .transfer import TransferModel, blocks, cached_features, last_map_layer, unfreeze, with_head

__all__ = [
    "Detector",
    "PixelModel",
    "TransferModel",
    "TwoLogits",
    "backbone",
    "bake",
    "blocks",
    "cached_features",
    "check_classifier",
    "cnn",
    "compare_norms",
    "create",
    "faster_rcnn",
    "last_map_layer",
    "lipschitz_bound",
    "load",
    "load_strictly",
    "mobilenet_v2",
    "operator_norm",
    "resnet18_cifar",
    "resnet50_v2",
    "robust",
    "save",
    "spectral_normalize",
    "summary",
    "unfreeze",
    "with_head",
    "wrap",
]

FORMAT = "dlia_utils model 1"


def _transfer(*, body: dict, **options) -> TransferModel:
    """A body by its recipe under a head: what the recipe of `with_head` is made of."""
    return with_head(create(**body), **options)


REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v2": mobilenet_v2,
    "cnn": cnn,
    "resnet50_v2": resnet50_v2,
    "resnet18_cifar": resnet18_cifar,
    "transfer": _transfer,
    "faster_rcnn": faster_rcnn,
    "torchvision": from_torchvision,
    "timm": from_timm,
    **{name: partial(robust.create, name) for name in robust.SOURCES},
}

log = logging.getLogger("dlia_utils")


def create(name: str, **options) -> nn.Module:
    """Build a registered model; `options` go to its function. Raises: ValueError for an unknown name.

    >>> create("mobilenet_v2", width=0.25).recipe["width"]
    0.25
    """
    if name not in REGISTRY:
        raise ValueError(
            f"unknown model {name!r}; known: {', '.join(sorted(REGISTRY))}; by torchvision's or timm's "
            "names: models.backbone"
        )
    return REGISTRY[name](**options)


def save(model: nn.Module, path: str | Path, *, meta: dict) -> Path:
    """Write weights, recipe and `meta` (numbers, text, lists, dicts) in one step; returns the path.

    >>> import tempfile
    >>> path = save(mobilenet_v2(width=0.25), Path(tempfile.mkdtemp()) / "model.pt", meta={"epoch": 3})
    >>> load(path).recipe["name"]
    'mobilenet_v2'
    """
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    content = {
        "format": FORMAT,
        "recipe": getattr(model, "recipe", None),
        "meta": meta,
        "state_dict": state,
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)
    return Path(path)


def load(path: str | Path, build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Read a file written by `save` into a plain model in eval mode on the CPU.

    `build` makes the empty model; by default the file's own recipe does. Your own network has none: give the
    function that made it, such as `lambda: wrap(MyNet(), mean=0.5, std=0.25)`. Weights saved while spectrally
    normalised are loaded so and then baked: what comes back always has plain layers.
    Raises: FileNotFoundError; ValueError for a file of another kind, without a recipe, or with other keys or
    shapes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model file {path}")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{path.name} was not written by models.save: refused (weights alone: see mobilenet_v2)"
        )
    if build is None and content["recipe"] is None:
        raise ValueError(
            f"{path.name} holds no recipe: pass build=, the function that made the model, such as "
            "lambda: models.wrap(MyNet(), mean=0.5, std=0.25)"
        )
    model = build() if build is not None else create(**content["recipe"])
    spectral_like(model, content["state_dict"])
    load_strictly(model, content["state_dict"], origin=path.name)
    log.info(
        "%s: all %d entries loaded, %s", path.name, len(content["state_dict"]), content["meta"]
    )
    return bake(model).eval()


def load_strictly(model: nn.Module, state: dict[str, Tensor], *, origin: str) -> None:
    """Load `state` if every key and shape fits, else ValueError with the differences; never a part of it.

    >>> load_strictly(nn.Linear(2, 1), {"weight": torch.zeros(1, 2)}, origin="demo.pt")
    Traceback (most recent call last):
    ValueError: demo.pt does not fit the model (1 of 2 entries matched): missing bias
    """
    own = model.state_dict()
    shapes = {key: (tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state}
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unknown {key}" for key in state if key not in own]
    problems += [
        f"{key}: {theirs}, expected {ours}"
        for key, (theirs, ours) in shapes.items()
        if theirs != ours
    ]
    if problems:
        matched = sum(theirs == ours for theirs, ours in shapes.values())
        shown = "; ".join(problems[:10]) + (
            f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        )
        raise ValueError(
            f"{origin} does not fit the model ({matched} of {len(own)} entries matched): {shown}"
        )
    model.load_state_dict(state)
