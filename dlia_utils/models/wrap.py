"""The model's door: an image in [0, 1] goes in, logits come out; the model owns its normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PixelModel(nn.Module):
    """A classifier that takes images in [0, 1], grey or colour, and normalises them itself.

    Attacks then work in pixel units, and no caller can forget or repeat the normalisation.

    Args: `backbone` maps normalised [B, 3, H, W] to logits [B, K]; `mean`, `std` are per channel, in [0, 1]
    units; `recipe` is what `models.create` needs to build the same architecture again (it is saved with the
    weights).
    Shapes: x [B, 1, H, W] (repeated to three channels) or [B, 3, H, W] -> logits [B, K].
    Raises: ValueError for any other shape.

    >>> model = PixelModel(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), mean=[0.5] * 3, std=[0.25] * 3)
    >>> model(torch.rand(5, 1, 4, 4)).shape
    torch.Size([5, 2])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float], *, recipe: dict | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))
        self.recipe = recipe

    def normalize(self, x: Tensor) -> Tensor:
        """Pixels [B, 1 or 3, H, W] in [0, 1] -> normalised [B, 3, H, W]; one channel is repeated."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"expected images [B, 1, H, W] or [B, 3, H, W], got {tuple(x.shape)}")
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(self.normalize(x))
