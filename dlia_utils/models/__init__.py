"""Models by name, and their weights on disk: saved with a recipe, loaded strictly or not at all."""

from __future__ import annotations

import importlib
import logging
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..files import atomic_path
from .cnn import cnn, summary
from .lipschitz import bake, compare_norms, spectral_like, spectral_normalize
from .mobilenet import mobilenet_v2
from .named import backbone, build
from .pixel import PixelModel, TwoLogits, check_classifier, load_strictly, wrap
from .resnet import resnet18_cifar, resnet50_v2
from .transfer import blocks, cached_features, last_map_layer, unfreeze, with_head

__all__ = ["PixelModel", "TwoLogits", "backbone", "bake", "blocks", "cnn"]
__all__ += ["cached_features", "check_classifier", "compare_norms", "create", "last_map_layer"]
__all__ += ["load", "load_strictly", "mobilenet_v2", "resnet18_cifar", "resnet50_v2", "save"]
__all__ += ["spectral_normalize", "summary", "unfreeze", "with_head", "wrap"]

FORMAT = "dlia_utils model 1"

log = logging.getLogger("dlia_utils")


def _transfer(*, body: dict, **options) -> PixelModel:
    return with_head(create(**body), **options)


REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "transfer": _transfer,
    "torchvision": partial(build, "torchvision"),
    "timm": partial(build, "timm"),
    **{make.__name__: make for make in (mobilenet_v2, cnn, resnet50_v2, resnet18_cifar)},
}


def create(name: str, **options) -> nn.Module:
    """Build a model by the name in its recipe; `options` go to its function.

    >>> create("mobilenet_v2", width=0.25).recipe["width"]
    0.25
    """
    if name in REGISTRY:
        return REGISTRY[name](**options)
    # Imported when asked for: most notebooks need neither detectors nor robust models.
    if name == "faster_rcnn":
        return importlib.import_module(".detector", __name__).faster_rcnn(**options)
    robust = importlib.import_module(".robust", __name__)
    if name not in robust.names().index:
        known = ", ".join(sorted([*REGISTRY, "faster_rcnn", *robust.names().index]))
        raise ValueError(f"unknown model {name!r}; known: {known}; others: models.backbone")
    return robust.create(name, **options)


def save(model: nn.Module, path: str | Path, *, meta: dict) -> Path:
    """Write weights, recipe and `meta` (numbers, text, lists, dicts) in one step; returns the path.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "model.pt"
    >>> load(save(mobilenet_v2(width=0.25), path, meta={"epoch": 3})).recipe["name"]
    'mobilenet_v2'
    """
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    content = {"format": FORMAT, "recipe": getattr(model, "recipe", None), "meta": meta}
    with atomic_path(path) as temporary:
        torch.save({**content, "state_dict": state}, temporary)
    return Path(path)


def load(path: str | Path, build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Read a file written by `save` into a plain model in eval mode on the CPU.

    `build` makes the empty model; by default the file's own recipe does. Your own network has none:
    give the function that made it, such as `lambda: wrap(MyNet(), mean=0.5, std=0.25)`.
    Raises: FileNotFoundError; ValueError for a damaged file, one of another kind or another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError) as error:
        fix = "delete it, so that its section trains the model again, or copy it again"
        raise ValueError(f"{path.name} is damaged or no model file: {fix}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path.name} was not written by models.save (weights: see mobilenet_v2)")
    if build is None and content["recipe"] is None:
        fix = "pass build=, such as lambda: models.wrap(MyNet(), mean=0.5, std=0.25)"
        raise ValueError(f"{path.name} holds no recipe: {fix}")
    model = build() if build is not None else create(**content["recipe"])
    spectral_like(model, content["state_dict"])
    load_strictly(model, content["state_dict"], origin=path.name)
    log.info("%s: all entries loaded, %s", path.name, content["meta"])
    return bake(model).eval()
