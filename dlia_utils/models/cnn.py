"""A small convolutional network to be trained from scratch, and a table of any model's layers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import untouched
from .pixel import Backbone, PixelModel

GRID = 4  # side of the pooled map


class ConvBlock(nn.Module):
    """Convolution, batch norm if wanted, ReLU, 2 x 2 maximum: [B, C, h, w] -> [B, C', h / 2, w / 2]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not batch_norm)
        self.norm = nn.BatchNorm2d(outputs) if batch_norm else nn.Identity()
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.norm(self.conv(x))))


class ConvNet(Backbone):
    """Blocks, the map pooled to 4 x 4, a hidden layer with dropout, the last layer."""

    BLOCK = ConvBlock

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[int],
        *,
        kernel: int,
        hidden: int,
        dropout: float,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        inputs = (3, *channels[:-1])
        self.blocks = nn.Sequential(
            *(
                ConvBlock(i, o, kernel, batch_norm=batch_norm)
                for i, o in zip(inputs, channels, strict=True)
            )
        )
        self.hidden = nn.Linear(channels[-1] * GRID * GRID, hidden)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(hidden, num_classes)

    def features(self, x: Tensor) -> Tensor:
        grid = F.adaptive_avg_pool2d(self.blocks(x), GRID)
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
    """A plain CNN for training from scratch, of the kind of LeCun et al. 1998 (Proc. IEEE 86, 2278).

    One block (convolution, batch norm, ReLU, 2 x 2 maximum) per entry of `channels`; the last map is averaged
    to 4 x 4, so images of any size of at least 2 ** len(channels) pixels go in; then a hidden layer, dropout
    and the last layer. mean, std: what pixels in [0, 1] are normalised by, for all channels.
    Shapes: [B, 1 or 3, H, W] in [0, 1] -> [B, num_classes].
    Raises: ValueError for numbers that make no sense.

    >>> cnn(channels=(4, 8), hidden=8).eval()(torch.rand(2, 1, 20, 24)).shape
    torch.Size([2, 2])
    """
    channels = tuple(int(c) for c in channels)
    if not channels or min(*channels, num_classes, hidden) < 1:
        raise ValueError(
            f"channels, num_classes and hidden must be at least 1, not {channels}, {num_classes}, {hidden}"
        )
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, so that a map keeps its size, not {kernel}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    if not std > 0:
        raise ValueError(f"std must be positive, not {std}")
    options = {"kernel": kernel, "hidden": hidden, "dropout": dropout, "batch_norm": batch_norm}
    # The caller's random stream stays as it is: the same seed gives the same start wherever the call stands.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = ConvNet(num_classes, channels, **options)
    recipe = {
        "name": "cnn",
        "num_classes": num_classes,
        "channels": list(channels),
        **options,
        "mean": float(mean),
        "std": float(std),
    }
    return PixelModel(backbone, [float(mean)] * 3, [float(std)] * 3, recipe=recipe)


def summary(model: nn.Module, size: int | tuple[int, int]) -> pd.DataFrame:
    """One row per layer in the order of a forward pass, and a row "total": the architecture as a table.

    size: side of a square image, or (height, width). Columns: layer (dotted name), kind, output (shape for a
    batch of one), parameters, trainable (how many of them train). Layers that share parameters or run again
    count them once. The model and its training flags stay as they are.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    >>> summary(net, 4)[["kind", "output", "parameters"]].values.tolist()[-2:]
    [['Linear', '[1, 2]', 18], ['total', '', 38]]
    """
    height, width = (size, size) if isinstance(size, int) else size
    weights = next((p for p in model.parameters()), torch.zeros(1))
    names = {module: name for name, module in model.named_modules() if not any(module.children())}
    rows, counted = [], set()

    def note(module: nn.Module, _inputs: tuple, output: object) -> None:
        fresh = [p for p in module.parameters() if p not in counted]
        counted.update(fresh)
        rows.append(
            {
                "layer": names[module],
                "kind": type(module).__name__,
                "output": str(list(output.shape))
                if isinstance(output, Tensor)
                else type(output).__name__,
                "parameters": sum(p.numel() for p in fresh),
                "trainable": sum(p.numel() for p in fresh if p.requires_grad),
            }
        )

    handles = [module.register_forward_hook(note) for module in names]
    try:
        with untouched(model):
            model(torch.zeros(1, 1, height, width, device=weights.device, dtype=weights.dtype))
    finally:
        for handle in handles:
            handle.remove()
    total = {
        "layer": "",
        "kind": "total",
        "output": "",
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    return pd.DataFrame([*rows, total])
