"""Transfer learning: a trained body kept, frozen but for its last blocks, under a fresh head.

A frozen part stays in eval mode whatever `train()` is called: else its batch norms would drift.
"""

from __future__ import annotations

import copy
from itertools import dropwhile

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models import MobileNetV2

from ..progress import Bar
from ..units import check_numbers
from .layers import Call, block_names, check_sizes, drawn, last_linear, last_map, trace
from .pixel import Backbone, FeatureModel, PixelModel, fast_copy

OURS = (Backbone, MobileNetV2)  # networks whose blocks and last map are known


class HeadOnBody(nn.Module):
    """Body [B, 3, H, W] -> [B, C], then head -> [B, K]; all but `live` stays in eval mode."""

    HEAD = "head"

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.live: tuple[str, ...] = ()  # the body's layers that train

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def train(self, mode: bool = True) -> HeadOnBody:
        super().train(mode)
        self.body.eval()
        for name in self.live:
            self.body.get_submodule(name).train(mode)
        return self


def with_head(
    model: PixelModel,
    *,
    head: str = "linear",
    num_classes: int = 2,
    hidden: int = 512,
    dropout: float = 0.0,
    unfrozen: int | str = 0,
    seed: int = 0,
) -> FeatureModel:
    """A new model: a copy of `model`'s body, frozen but for its last blocks, and a new head.

    model: the body is all of it but its last layer (of a transfer model, its head). head, drawn by
    `seed`: "linear", or "mlp" (to `hidden`, ReLU, batch norm, linear), both after dropout.
    unfrozen: see `unfreeze`. The gradient still flows through the frozen part to the image.
    Raises: ValueError for a network without a last nn.Linear, another head.

    >>> from dlia_utils.models import mobilenet_v2
    >>> model = with_head(mobilenet_v2(width=0.25), num_classes=3).train()
    >>> model(torch.rand(2, 1, 32, 32)).shape, model.features(torch.rand(2, 1, 32, 32)).shape
    (torch.Size([2, 3]), torch.Size([2, 1280]))
    """
    check_sizes(num_classes=num_classes, hidden=hidden, seed=seed)
    check_numbers("[0,1)", dropout=dropout)
    if head not in ("linear", "mlp"):
        raise ValueError(f"head must be one of linear, mlp, not {head!r}")
    if not isinstance(model, PixelModel):
        kind = type(model).__name__
        raise ValueError(f"a {kind} does not take [0, 1]: models.wrap(net, mean=, std=) makes one")
    _, network, found = _network(model)
    body, inner = copy.deepcopy(network), model.recipe
    if isinstance(model.backbone, HeadOnBody):
        replaced, inner = model.backbone.head, inner and inner["body"]
    else:
        last = last_linear(found) if found else getattr(network, "HEAD", "classifier")
        replaced = network.get_submodule(last)
        body.set_submodule(last, nn.Identity())
    channels = next(m.in_features for m in replaced.modules() if isinstance(m, nn.Linear))
    layers = drawn(seed, _head, head, channels, hidden, num_classes, dropout)
    made = _behind(model, HeadOnBody(body, layers))
    recipe = {"name": "transfer", "body": inner, "head": head, "num_classes": num_classes}
    made.recipe = recipe | {"hidden": hidden, "dropout": dropout} if inner is not None else None
    return unfreeze(made, unfrozen)


def _head(kind: str, channels: int, hidden: int, classes: int, dropout: float) -> nn.Sequential:
    if kind == "linear":
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, classes))
    middle = nn.Linear(channels, hidden), nn.ReLU(), nn.BatchNorm1d(hidden), nn.Dropout(dropout)
    return nn.Sequential(nn.Dropout(dropout), *middle, nn.Linear(hidden, classes))


def _behind(model: PixelModel, network: nn.Module) -> FeatureModel:
    """`network` with the normalisation of `model`, on its device."""
    mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
    return FeatureModel(network, mean, std, checked=model.checked).to(model.mean.device)


def unfreeze(model: FeatureModel, unfrozen: int | str) -> FeatureModel:
    """Let the last `unfrozen` of `blocks(model)` train, or "all" of the body; freeze the rest.

    In place, before an optimiser is made. What follows the last block trains with it, the stem
    only with "all". A transformer has no blocks: 0 or "all".

    >>> from dlia_utils.models import mobilenet_v2
    >>> model = unfreeze(with_head(mobilenet_v2(width=0.25)), 1)
    >>> [name for name, p in model.named_parameters() if p.requires_grad][0]
    'backbone.body.features.18.0.weight'
    """
    if not isinstance(getattr(model, "backbone", None), HeadOnBody):
        raise ValueError(f"a model made by with_head is wanted, not a {type(model).__name__}")
    _, body, found = _network(model)
    parts, names = _parts(body, found)
    if unfrozen != "all":
        check_numbers(f"[0,{len(names)}]", whole=True, hint="; or 'all'", unfrozen=unfrozen)
        first = f"{names[-unfrozen]}." if unfrozen else "none"
        parts = [*dropwhile(lambda name: not f"{name}.".startswith(first), parts)]
    body.requires_grad_(False)
    for name in parts:
        body.get_submodule(name).requires_grad_(True)
    model.backbone.live = tuple(parts)
    if model.recipe is not None:
        model.recipe = {**model.recipe, "unfrozen": unfrozen}
    return model.train(model.training)


def cached_features(
    model: FeatureModel, dataset: Dataset, *, batch_size: int = 64, progress: bool = True
) -> TensorDataset:
    """The frozen body's features of all images, computed once: (feature [C], label), and the row.

    dataset: yields (x [1 or 3, H, W] in [0, 1], y) or (x, y, row), without augmentation. Then
    `train.fit(model.head, objective, features, ...)` trains the head, which the model holds.
    Raises: ValueError if part of the body trains.
    """
    if any(parameter.requires_grad for parameter in model.backbone.body.parameters()):
        raise ValueError("part of the body trains, so its features change: unfreeze(model, 0)")
    body = _behind(model, model.backbone.body)
    foldable = all(getattr(module, "foldable", True) for module in body.modules())
    body = fast_copy(body) if foldable else copy.deepcopy(body).eval()
    columns: list[list[Tensor]] = []
    # Without a generator of its own a loader draws its workers' seed from the global random stream.
    loader = DataLoader(dataset, batch_size=batch_size, generator=torch.Generator())
    with torch.no_grad():
        for x, *rest in Bar(loader, desc="features", unit="batch", disable=not progress):
            found = body(x.to(model.mean.device)).float().cpu()
            columns.append([found, *map(torch.as_tensor, rest)])
    return TensorDataset(*(torch.cat(column) for column in zip(*columns, strict=True)))


def blocks(model: nn.Module) -> list[str]:
    """Dotted names of the body's blocks, the first one first, each with an output [B, C, h, w].

    >>> from dlia_utils.models import mobilenet_v2
    >>> blocks(mobilenet_v2(width=0.25))[-2:]
    ['backbone.features.17', 'backbone.features.18']
    """
    prefix, network, found = _network(model)
    names = _parts(network, found)[1]
    if not names:
        kind = type(network).__name__
        raise ValueError(f"a {kind} has no known blocks that make maps: unfreeze 0 or 'all' of it")
    return [prefix + name for name in names]


def last_map_layer(model: nn.Module) -> str:
    """Dotted name of the layer whose output [B, C, h, w] is pooled for the head: Grad-CAM's layer.

    >>> from dlia_utils.models import mobilenet_v2
    >>> last_map_layer(with_head(mobilenet_v2(width=0.25)))
    'backbone.body.features.18'
    """
    prefix, network, found = _network(model)
    known = last_map(found) if found else getattr(network, "MAP", "")
    return prefix + (known or _parts(network, found)[1][-1])


def _network(model: nn.Module) -> tuple[str, nn.Module, Call | None]:
    """The network with the blocks in `model`, its names' prefix, its trace if it is unknown."""
    prefix, network, channels = "", model, None
    if isinstance(model, PixelModel):
        prefix, network, channels = "backbone.", model.backbone, model.mean.shape[1]
    if isinstance(network, HeadOnBody):
        prefix, network = f"{prefix}body.", network.body
    return prefix, network, None if isinstance(network, OURS) else trace(network, channels)


def _parts(network: nn.Module, found: Call | None) -> tuple[list[str], list[str]]:
    """Names of the parts that can train, in the order of the forward pass, and of the blocks."""
    modules, order = dict(network.named_modules()), {}
    # Ours are registered in the order of the forward pass.
    for number, name in enumerate([call.name for call in found.begun()] if found else modules):
        order.setdefault(name, number)
    for name in modules:  # what does not run itself, such as the last layer inside an attention,
        order.setdefault(name, order[name.rpartition(".")[0]])  # is with its parent
    parts = [
        name
        for name, module in modules.items()
        if not any(module.children()) or any(True for _ in module.parameters(recurse=False))
    ]
    parts.sort(key=order.get)
    if found:
        return parts, block_names(found)
    if isinstance(network, MobileNetV2):
        return parts, [f"features.{i}" for i in range(1, len(network.features))]
    return parts, [name for name, module in modules.items() if isinstance(module, network.BLOCK)]
