"""Transfer learning: a trained body kept, frozen but for its last blocks, and a fresh head put on it.

A frozen part stays in eval mode whatever `train()` is called: else its batch norms would take over the
statistics of the new images batch by batch, and the body would drift although no weight is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models import MobileNetV2

from ..progress import Bar
from . import layers
from .pixel import Backbone, PixelModel, fast_copy
from .robust.meansparse import MeanSparse
from .robust.zoo import RobustModel, check_pixels

HEADS = ("linear", "mlp")
OURS = (Backbone, MobileNetV2)  # networks whose blocks and last map are known


class HeadOnBody(nn.Module):
    """Body [B, 3, H, W] -> [B, C], then head [B, C] -> [B, K]; what `live` does not name stays in eval mode."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head
        self.live: tuple[str, ...] = ()  # the body's layers that train

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def train(self, mode: bool = True) -> HeadOnBody:
        super().train(mode)
        self.body.eval()
        for name in self.live:
            self.body.get_submodule(name).train(mode)
        return self


class TransferModel(PixelModel):
    """The model that `with_head` makes: the body's door and normalisation, `features`, and `head`.

    `head` is the very module that the model uses: training it alone (`cached_features`) trains the model.
    checked: refuse images outside [0, 1], as the robust models do.
    Shapes: x [B, 1 or 3, H, W] in [0, 1] -> logits [B, K]; `features(x)` [B, C], `head(features)` [B, K].
    """

    backbone: HeadOnBody

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        recipe: dict | None = None,
        checked: bool = False,
    ) -> None:
        super().__init__(backbone, mean, std, recipe=recipe)
        self.checked = checked

    @property
    def head(self) -> nn.Module:
        """The layers between features and logits."""
        return self.backbone.head

    def normalize(self, x: Tensor) -> Tensor:
        """Pixels [B, 1 or 3, H, W] in [0, 1] -> normalised [B, 3, H, W]; one channel is repeated."""
        if self.checked:
            check_pixels(x)
        return super().normalize(x)

    def features(self, x: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [0, 1] -> features [B, C]; `head` turns them into logits."""
        return self.backbone.body(self.normalize(x))


def with_head(
    model: PixelModel,
    *,
    head: str = "linear",
    num_classes: int = 2,
    hidden: int = 512,
    dropout: float = 0.0,
    unfrozen: int | str = 0,
    seed: int = 0,
) -> TransferModel:
    """A new model: a copy of `model`'s body, frozen but for its last blocks, under a head drawn from `seed`.

    model: a mobilenet_v2, cnn, resnet, robust or transfer model, a `models.backbone`, or your own network
    after `models.wrap`; the body is all of it but its last layer (of a transfer model, all but its head),
    which in a network that the suite does not know must be an nn.Linear. The caller's model stays as it is.
    head: "linear" (dropout, linear layer: a linear probe keeps robust features as they are) or "mlp"
    (dropout, linear layer to `hidden`, ReLU, batch norm, dropout, linear layer).
    unfrozen: how many of `blocks(model)`, counted from the end, train along, or "all"; see `unfreeze`.
    The frozen part stays in eval mode in training. The gradient still flows through it to the image, so that
    attacks and adversarial training of the head work. `recipe` builds the same model by `models.create`.
    Shapes: [B, 1 or 3, H, W] in [0, 1] -> [B, num_classes].
    Raises: ValueError for an unknown head or model and for numbers that make no sense.

    >>> from dlia_utils.models.mobilenet import mobilenet_v2
    >>> model = with_head(mobilenet_v2(width=0.25), num_classes=3).train()
    >>> model(torch.rand(2, 1, 32, 32)).shape, model.features(torch.rand(2, 1, 32, 32)).shape
    (torch.Size([2, 3]), torch.Size([2, 1280]))
    >>> model.backbone.body.training, sum(p.requires_grad for p in model.parameters())
    (False, 2)
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, not {head!r}")
    if num_classes < 1 or hidden < 1:
        raise ValueError(
            f"num_classes and hidden must be at least 1, not {num_classes} and {hidden}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    body, channels = _body(model)
    # The caller's random stream stays as it is: the same seed gives the same start wherever the call stands.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        top = _head(head, channels, num_classes, hidden, dropout)
    recipe = None
    if model.recipe is not None:
        inner = model.recipe["body"] if isinstance(model, TransferModel) else model.recipe
        recipe = {
            "name": "transfer",
            "body": inner,
            "head": head,
            "num_classes": num_classes,
            "hidden": hidden,
            "dropout": dropout,
        }
    checked = model.checked if isinstance(model, TransferModel) else isinstance(model, RobustModel)
    made = TransferModel(
        HeadOnBody(body, top), *_normalisation(model), recipe=recipe, checked=checked
    )
    return unfreeze(made.to(model.mean.device), unfrozen)


def unfreeze(model: TransferModel, unfrozen: int | str) -> TransferModel:
    """Let the last `unfrozen` of `blocks(model)` train, or "all" of the body; freeze the rest. In place.

    A block is: an inverted residual block of MobileNetV2, or the 1 x 1 convolution after them; a residual
    block of a ResNet or wide ResNet; a convolution with its norm and pooling of the CNN; in a network that
    the suite does not know, see `blocks`. What follows the last block (a final norm, the CNN's fully
    connected layer) trains with it; the stem only with "all". A transformer has no blocks here: 0 or "all".
    A trained head is kept: so a body is fine-tuned after its head. Parameters that train stay the same
    objects, but an optimiser must be made after this call. Raises: ValueError for another number.

    >>> from dlia_utils.models.mobilenet import mobilenet_v2
    >>> model = unfreeze(with_head(mobilenet_v2(width=0.25)), 1)
    >>> [name for name, p in model.named_parameters() if p.requires_grad][0]
    'backbone.body.features.18.0.weight'
    """
    if not isinstance(model, TransferModel):
        raise ValueError(f"unfreeze takes a model made by with_head, not a {type(model).__name__}")
    body = model.backbone.body
    parts, names = _parts(body, model.mean.shape[1])
    count = (
        isinstance(unfrozen, int) and not isinstance(unfrozen, bool) and 0 <= unfrozen <= len(names)
    )
    if not count and unfrozen != "all":
        raise ValueError(f"unfrozen must be 0 to {len(names)} blocks or 'all', not {unfrozen!r}")
    if unfrozen == "all":
        live = parts
    elif unfrozen == 0:
        live = []
    else:
        front = names[-unfrozen]
        first = next(i for i, name in enumerate(parts) if f"{name}.".startswith(f"{front}."))
        live = parts[first:]
    body.requires_grad_(False)
    for name in live:
        body.get_submodule(name).requires_grad_(True)
    model.backbone.live = tuple(live)
    if model.recipe is not None:
        model.recipe = {**model.recipe, "unfrozen": unfrozen}
    return model.train(model.training)


def cached_features(
    model: TransferModel,
    dataset: Dataset,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> TensorDataset:
    """The frozen body's features of all images, computed once: (feature [C], label), and the row if given.

    dataset: yields (x [1 or 3, H, W] in [0, 1], y) or (x, y, row), without augmentation: each image is seen
    once. A head is then trained in seconds, `train.fit(model.head, objective, features, ...)`; the model
    holds that head, so nothing needs to be put back (`model.to(device)` brings both together again, since
    `fit` may move the head). A copy of the body computes them on `device` (default: the model's), folded
    (`models.fold`) where that changes no more than the rounding; the model stays as it is. Features of a
    MeanSparse body belong to its statistics and alpha: set these before.
    Raises: ValueError if part of the body trains or the data set is empty.

    >>> from dlia_utils.models.mobilenet import mobilenet_v2
    >>> model = with_head(mobilenet_v2(width=0.25))
    >>> data = TensorDataset(torch.rand(3, 1, 32, 32), torch.tensor([0, 1, 0]))
    >>> cached_features(model, data, progress=False)[0][0].shape
    torch.Size([1280])
    """
    if not isinstance(model, TransferModel):
        raise ValueError(
            f"cached_features takes a model made by with_head, not a {type(model).__name__}"
        )
    if any(parameter.requires_grad for parameter in model.backbone.body.parameters()):
        raise ValueError(
            "part of the body trains, so its features change with every step: freeze it by "
            "unfreeze(model, 0), or train on the images"
        )
    if not len(dataset):
        raise ValueError("the data set is empty: no features to cache")
    device = torch.device(device) if device is not None else model.mean.device
    # At the edge of a MeanSparse dead zone the rounding of a folded copy decides, and then shows.
    sparse = any(isinstance(module, MeanSparse) for module in model.modules())
    body = TransferModel(model.backbone.body, *_normalisation(model), checked=model.checked)
    body = (copy.deepcopy(body).eval() if sparse else fast_copy(body)).to(device)
    columns: list[list[Tensor]] = []
    # Without a generator of its own a loader draws its workers' seed from the global random stream.
    loader = DataLoader(dataset, batch_size=batch_size, generator=torch.Generator())
    with torch.no_grad():
        for x, *rest in Bar(loader, desc="features", unit="batch", disable=not progress):
            columns.append([body(x.to(device)).float().cpu(), *map(torch.as_tensor, rest)])
    return TensorDataset(*(torch.cat(column) for column in zip(*columns, strict=True)))


def blocks(model: nn.Module) -> list[str]:
    """Dotted names of the body's blocks, the first one first: what `unfreeze` counts from the end.

    The outputs are maps [B, C, h, w], so each name is also a layer for Grad-CAM. In a network that the suite
    does not know they are found by one forward pass on a black image: the modules of several layers that
    make a map, down the chains (`nn.Sequential`) that hold them, such as the residual blocks of a ResNet;
    of a flat chain, such as VGG's, the convolutions. Raises: ValueError for a network without such blocks,
    such as a transformer.

    >>> from dlia_utils.models.mobilenet import mobilenet_v2
    >>> blocks(mobilenet_v2(width=0.25))[-2:]
    ['backbone.features.17', 'backbone.features.18']
    """
    prefix, network = _located(model)
    names = _parts(network, _channels(model))[1]
    if not names:
        raise ValueError(
            f"a {type(network).__name__} has no known blocks that make maps: unfreeze 0 or 'all' of it, and name "
            "the layers for its maps (named_modules() has the names)"
        )
    return [prefix + name for name in names]


def last_map_layer(model: nn.Module) -> str:
    """Dotted name of the layer whose output [B, C, h, w] is pooled for the head: Grad-CAM's usual layer.

    model: any network with convolutions. Where the suite does not know it, the layer is found by one forward
    pass on a black image: the last one that makes a map and is no pooling itself. The model stays as it is.
    Raises: ValueError for a network without such a layer, and for a transformer: name its layer yourself.

    >>> from dlia_utils.models.mobilenet import mobilenet_v2
    >>> last_map_layer(with_head(mobilenet_v2(width=0.25)))
    'backbone.body.features.18'
    """
    prefix, network = _located(model)
    if not isinstance(network, OURS):
        return prefix + layers.last_map(layers.trace(network, channels=_channels(model)))
    return prefix + (getattr(network, "MAP", "") or _parts(network)[1][-1])


# ------------------------------------------------------------------ parts


def _located(model: nn.Module) -> tuple[str, nn.Module]:
    """The prefix of the names of the network with the blocks in `model`, and the network."""
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, HeadOnBody):
        return "backbone.body.", backbone.body
    if isinstance(backbone, OURS) or isinstance(model, PixelModel):
        return "backbone.", backbone
    if isinstance(model, nn.Module):
        return "", model
    raise ValueError(f"a {type(model).__name__} is no network: give a torch.nn.Module")


def _channels(model: nn.Module) -> int | None:
    """How many channels the network behind the door reads; None without a door."""
    return model.mean.shape[1] if isinstance(model, PixelModel) else None


def _parts(network: nn.Module, channels: int | None = None) -> tuple[list[str], list[str]]:
    """Names of the parts that can train, in the order of the forward pass, and of the blocks.

    A part has no children, or weights of its own beside them.
    """
    if isinstance(network, OURS):  # registered in the order of the forward pass
        names = [name for name, module in network.named_modules() if not any(module.children())]
        if isinstance(network, MobileNetV2):
            return names, [
                f"features.{i}" for i in range(1, len(network.features))
            ]  # 0 is the stem
        return names, network.block_names()
    found = layers.trace(network, channels=channels)
    order = {call.name: number for number, call in reversed([*enumerate(found.begun)])}

    def place(name: str) -> int:
        # What does not run itself, such as the last layer inside an attention, stands with its parent.
        return order[name] if name in order else place(name.rpartition(".")[0])

    own = [
        name
        for name, module in network.named_modules()
        if not any(module.children()) or any(True for _ in module.parameters(recurse=False))
    ]
    return sorted(own, key=place), layers.block_names(found)


def _body(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy of the network without its last layer, on the same device, and the number of its features."""
    _, network = _located(model)
    if isinstance(model, TransferModel):
        return copy.deepcopy(network), _inputs(model.head)
    if not isinstance(model, PixelModel):
        raise ValueError(
            "with_head takes a model of images in [0, 1]: models.wrap(net, mean=, std=) makes one of a "
            f"{type(model).__name__}"
        )
    if isinstance(network, OURS):
        name = "classifier" if isinstance(network, MobileNetV2) else network.HEAD
    else:
        name = layers.last_linear(layers.trace(network, channels=_channels(model)))
    channels = _inputs(network.get_submodule(name))
    body = copy.deepcopy(network)
    layers.replace(body, name, lambda _: nn.Identity())
    return body, channels


def _inputs(head: nn.Module) -> int:
    """Number of features that a head takes."""
    return next(layer.in_features for layer in head.modules() if isinstance(layer, nn.Linear))


def _head(kind: str, channels: int, num_classes: int, hidden: int, dropout: float) -> nn.Sequential:
    if kind == "linear":
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(channels, hidden),
        nn.ReLU(),
        nn.BatchNorm1d(hidden),
        nn.Dropout(dropout),
        nn.Linear(hidden, num_classes),
    )


def _normalisation(model: PixelModel) -> tuple[list[float], list[float]]:
    return model.mean.flatten().tolist(), model.std.flatten().tolist()
