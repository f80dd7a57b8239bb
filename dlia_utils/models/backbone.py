"""What the suite's own networks share: pooled features, a head by name, blocks that can be told apart."""

from __future__ import annotations

from torch import Tensor, nn


class Backbone(nn.Module):
    """A network of normalised images: `features` [B, 3, H, W] -> [B, C], then the head named `HEAD`.

    `BLOCK` is the class of its blocks, what transfer learning freezes one by one; submodules are registered in
    the order of the forward pass. `MAP` names the layer that makes the last map [B, C, h, w]; "" is the last
    block.
    """

    HEAD = "fc"
    MAP = ""
    BLOCK: type[nn.Module]

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.HEAD)(self.features(x))

    def block_names(self) -> list[str]:
        """Dotted names of the blocks, the first one first."""
        return [name for name, module in self.named_modules() if isinstance(module, self.BLOCK)]


def pooled(x: Tensor) -> Tensor:
    """Mean over the map: [B, C, h, w] -> [B, C]."""
    # Never `view(-1, channels)`: on a map larger than 1 x 1 that mixes channels with positions.
    return x.mean(dim=(2, 3))


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8 and at least 8; width 1 changes none of ours.

    >>> scaled(216, 1.0), scaled(216, 1 / 16)
    (216, 16)
    """
    return max(8, 8 * round(channels * width / 8))
