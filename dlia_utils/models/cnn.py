"""A small convolutional network to be trained from scratch, and a table of any model's layers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..units import check_numbers
from .layers import check_sizes, drawn, traced
from .pixel import Backbone, PixelModel


class ConvBlock(nn.Module):
    """Convolution, batch norm if wanted, ReLU, 2 x 2 maximum."""

    def __init__(self, inputs: int, outputs: int, kernel: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not batch_norm)
        self.norm = nn.BatchNorm2d(outputs) if batch_norm else nn.Identity()
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.norm(self.conv(x))))


class ConvNet(Backbone):
    """Blocks, the map pooled to 4 x 4, a hidden layer with dropout, the last layer."""

    BLOCK = ConvBlock

    def __init__(
        self, classes: int, channels: list, kernel: int, hidden: int, dropout: float, norm: bool
    ) -> None:
        super().__init__()
        pairs = zip((3, *channels[:-1]), channels, strict=True)
        self.blocks = nn.Sequential(*(ConvBlock(i, o, kernel, norm) for i, o in pairs))
        self.hidden = nn.Linear(channels[-1] * 16, hidden)
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(dropout)
        self.fc = nn.Linear(hidden, classes)

    def features(self, x: Tensor) -> Tensor:
        grid = F.adaptive_avg_pool2d(self.blocks(x), 4)
        return self.dropout(self.relu(self.hidden(grid.flatten(1))))


def cnn(
    *,
    num_classes: int = 2,
    channels: Sequence[int] = (32, 64, 128),
    kernel: int = 3,
    hidden: int = 128,
    dropout: float = 0.5,
    batch_norm: bool = True,
    mean: float = 0.5,
    std: float = 0.25,
    seed: int = 0,
) -> PixelModel:
    """A plain CNN to train from scratch, of the kind of LeCun et al. 1998 (Proc. IEEE 86, 2278).

    One block per entry of `channels`. mean, std: of pixels in [0, 1], for all channels.
    Shapes: [B, 1 or 3, H, W], H and W at least 2 ** len(channels) -> [B, num_classes].

    >>> cnn(channels=(4, 8), hidden=8).eval()(torch.rand(2, 1, 20, 24)).shape
    torch.Size([2, 2])
    """
    check_sizes(num_classes=num_classes, hidden=hidden, kernel=kernel, seed=seed)
    for count in channels:
        check_sizes(channels=count)
    check_numbers("[0,1)", dropout=dropout)
    check_numbers("[0,1]", mean=mean)
    check_numbers("(0,1]", std=std)
    channels, mean, std = [int(c) for c in channels], float(mean), float(std)
    network = drawn(seed, ConvNet, num_classes, channels, kernel, hidden, dropout, batch_norm)
    recipe = {"name": "cnn", "num_classes": num_classes, "channels": channels, "kernel": kernel}
    recipe |= {"hidden": hidden, "dropout": dropout, "batch_norm": batch_norm}
    return PixelModel(network, [mean] * 3, [std] * 3, recipe=recipe | {"mean": mean, "std": std})


def summary(model: nn.Module, size: int) -> pd.DataFrame:
    """One row per layer in the order of a forward pass, and a row "total": the architecture.

    size: side of a square image. Columns: layer, kind, output (shape for one image), parameters,
    trainable (how many train). Shared parameters count once.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> summary(net, 4)[["kind", "output", "parameters"]].values.tolist()[-2:]
    [['Linear', '[1, 2]', 18], ['total', '', 38]]
    """
    black = next(model.parameters(), torch.zeros(1)).new_zeros(1, 1, size, size)
    rows, counted = [], set()

    def add(layer: str, kind: str, output: str, weights: set) -> None:
        learning = sum(p.numel() for p in weights if p.requires_grad)
        rows.append((layer, kind, output, sum(p.numel() for p in weights), learning))

    for call in traced(model, black).ended():
        if call.leaf:
            fresh = set(call.module.parameters()) - counted
            counted |= fresh
            add(call.name, type(call.module).__name__, str(list(call.shape)), fresh)
    add("", "total", "", set(model.parameters()))
    return pd.DataFrame(rows, columns="layer kind output parameters trainable".split())
