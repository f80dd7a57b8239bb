"""Models by name, and their weights on disk: saved with a recipe, loaded strictly or not at all."""

from __future__ import annotations

import importlib
import logging
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .. import files
from .cnn import cnn, summary
from .lipschitz import bake, compare_norms, spectral_like, spectral_normalize
from .mobilenet import mobilenet_v2
from .named import backbone, build
from .pixel import PixelModel, TwoLogits, check_classifier, load_strictly, wrap
from .resnet import resnet18_cifar, resnet50_v2
from .transfer import blocks, cached_features, last_map_layer, unfreeze, with_head

__all__ = ["PixelModel", "TwoLogits", "backbone", "bake", "blocks", "cnn"]
__all__ += ["cached_features", "check_classifier", "compare_norms", "create", "last_map_layer"]
__all__ += ["load", "load_strictly", "mobilenet_v2", "read", "resnet18_cifar", "resnet50_v2"]
__all__ += ["save", "spectral_normalize", "summary", "unfreeze", "with_head", "wrap"]

FORMAT = "dlia_utils model 1"
FIX = "delete it, so that its section trains the model again, or copy it again"
LARGEST = 100_000  # number in a recipe
SLACK = 10_000_000  # weights that a recipe may draw and replace by others

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
    return files.write_torch({**content, "state_dict": state}, path)


def read(path: str | Path) -> dict[str, Any]:
    """What a file written by `save` holds: format, recipe, meta, state_dict.

    Raises: FileNotFoundError; ValueError for a damaged file or one of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model file {path}")
    content = files.read_torch(path, FIX)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by models.save (weights: see mobilenet_v2)")
    with files.reading(path, FIX):
        good = all(map(torch.is_tensor, content["state_dict"].values())) and "meta" in content
        if not (good and isinstance(content["recipe"], Mapping | None)):
            raise ValueError("it holds no weights, recipe and meta")
    return content


def load(path: str | Path, build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Read a file written by `save` into a plain model in eval mode on the CPU.

    `build` makes the empty model; by default the file's own recipe does. Your own network has none:
    give the function that made it, such as `lambda: wrap(MyNet(), mean=0.5, std=0.25)`.
    Raises: FileNotFoundError; ValueError for a damaged file, one of another kind or another model.
    """
    path, content = Path(path), read(path)
    recipe, state = content["recipe"], content["state_dict"]
    if build is None and recipe is None:
        fix = "pass build=, such as lambda: models.wrap(MyNet(), mean=0.5, std=0.25)"
        raise ValueError(f"{path} holds no recipe: {fix}")
    model = build() if build is not None else _built(recipe, state, path)
    spectral_like(model, state)
    load_strictly(model, state, origin=str(path))
    log.info("%s: all entries loaded, %s", path.name, content["meta"])
    return bake(model).eval()


def _built(recipe: Mapping[str, Any], state: Mapping[str, torch.Tensor], path: Path) -> nn.Module:
    """The empty model of a file's recipe, which is data: it names no file and is no larger than
    the file's weights. Raises: `files.Damaged`."""
    most = SLACK + 2 * sum(value.numel() for value in state.values())
    made = 0

    def count(module: nn.Module, name: str, weight: nn.Parameter) -> None:
        nonlocal made
        made += weight.numel()
        if made > most:
            raise ValueError("its recipe makes a larger network than its weights are of")

    with files.reading(path, FIX):
        _check_recipe(recipe)
        hook = register_module_parameter_registration_hook(count)
        try:
            return create(**recipe)
        finally:
            hook.remove()


def _check_recipe(value: Any) -> None:
    """Refuse in a recipe what is no plain setting: a path, a source of weights, a huge number."""
    if isinstance(value, Mapping):
        if {"weights", "pretrained"} & set(value):
            raise ValueError("its recipe names other weights")
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            _check_recipe(part)
    elif isinstance(value, str):
        if not re.fullmatch(r"[\w.-]+", value):
            raise ValueError(f"its recipe holds {value[:40]!r}")
    elif value is not None and not (math.isfinite(value) and abs(value) <= LARGEST):
        raise ValueError(f"its recipe holds {value}")
