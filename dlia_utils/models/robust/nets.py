"""The backbones of the robust models, with the module names of their public checkpoints.

Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146) in three dialects, and the grouped
bottleneck ResNet of Peng et al. 2023 (arXiv 2308.16258). Each takes normalised images [B, 3, H, W] of any
size: the published 8 x 8 pooling is the mean over the map, which is the same at the published size 32. No
module is used twice and no activation works in place, so that hooks of explanation methods see what they
expect.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from ..pixel import Backbone, pooled, scaled
from .meansparse import MeanSparse

# ------------------------------------------------------------------ wide ResNets of the TRADES code


class TradesBlock(nn.Module):
    """Pre-activation block; the first of a group sends its activated input through a 1 x 1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, first: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if first else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        branch = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return (x if self.convShortcut is None else self.convShortcut(activated)) + branch


class TradesGroup(nn.Module):
    """`depth` blocks of one width; only the first may stride."""

    def __init__(self, inputs: int, outputs: int, depth: int, stride: int) -> None:
        super().__init__()
        blocks = [TradesBlock(inputs, outputs, stride, first=True)]
        blocks += [TradesBlock(outputs, outputs, 1, first=False) for _ in range(depth - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class TradesWideResNet(Backbone):
    """Wide ResNet with ReLU and symmetric padding, as in the code of TRADES (arXiv 1901.08573)."""

    MAP = "relu"
    BLOCK = TradesBlock

    def __init__(self, num_classes: int, width: float, *, depth: int, factor: int) -> None:
        super().__init__()
        stem, *widths = (scaled(16, width), *(scaled(c * factor, width) for c in (16, 32, 64)))
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.block1 = TradesGroup(stem, widths[0], blocks, 1)
        self.block2 = TradesGroup(widths[0], widths[1], blocks, 2)
        self.block3 = TradesGroup(widths[1], widths[2], blocks, 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(widths[2], num_classes)

    def features(self, x: Tensor) -> Tensor:
        return pooled(self.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x)))))))


class HuangWideResNet(Backbone):
    """Wide ResNet 34-R of Huang et al. 2021 (arXiv 2110.03825): a last stage of less capacity."""

    MAP = "relu"
    BLOCK = TradesBlock

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        channels = [scaled(c, width) for c in (16, 320, 640, 512)]
        self.stem_conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            TradesGroup(channels[g], channels[g + 1], 5, stride)
            for g, stride in enumerate((1, 2, 2))
        )
        self.bn1 = nn.BatchNorm2d(channels[-1])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem_conv(x)
        for group in self.blocks:
            x = group(x)
        return pooled(self.relu(self.bn1(x)))


# ------------------------------------------------------------------ wide ResNets of DeepMind


class DeepMindBlock(nn.Module):
    """Pre-activation block with SiLU and TensorFlow's SAME padding, optionally with MeanSparse and SE.

    The padding matters: with stride 2 and an even size, SAME pads the right and the bottom only. Symmetric
    padding would take the same weights and shift every map by a pixel.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, first: bool, sparse: bool, squeeze: bool
    ) -> None:
        super().__init__()
        momentum = 0.01 if squeeze else 0.1
        self.stride = stride
        self.batchnorm_0 = nn.BatchNorm2d(inputs, momentum=momentum)
        self.relu_0 = nn.SiLU()
        self.conv_0 = nn.Conv2d(inputs, outputs, 3, stride, padding=2 - stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(outputs, momentum=momentum)
        self.relu_1 = nn.SiLU()
        self.conv_1 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if first else None
        self.se = SqueezeExcitation(outputs, max(1, round(outputs / 4))) if squeeze else None
        self.meansparse_0 = MeanSparse(inputs) if sparse else nn.Identity()
        self.meansparse_1 = MeanSparse(outputs) if sparse else nn.Identity()
        self.meansparse_2 = MeanSparse(outputs) if sparse else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu_0(self.meansparse_0(self.batchnorm_0(x)))
        branch = self.conv_0(_same_padded(activated) if self.stride == 2 else activated)
        branch = self.conv_1(self.relu_1(self.meansparse_1(self.batchnorm_1(branch))))
        if self.se is not None:
            branch = self.se(branch)
        return self.meansparse_2(
            (x if self.shortcut is None else self.shortcut(activated)) + branch
        )


def _same_padded(x: Tensor) -> Tensor:
    """Zeros for a 3 x 3 convolution of stride 2: on all sides of an odd size, right and below an even one."""
    height, width = x.shape[-2], x.shape[-1]
    return F.pad(x, (width % 2, 1, height % 2, 1))


class DeepMindGroup(nn.Module):
    """`depth` blocks of one width; only the first may stride."""

    def __init__(self, inputs: int, outputs: int, depth: int, stride: int, **options: bool) -> None:
        super().__init__()
        blocks = [DeepMindBlock(inputs, outputs, stride, first=True, **options)]
        blocks += [
            DeepMindBlock(outputs, outputs, 1, first=False, **options) for _ in range(depth - 1)
        ]
        self.block = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class DeepMindWideResNet(Backbone):
    """Wide ResNet with SiLU (Gowal et al. 2020, arXiv 2010.03593) from its widths (stem first) and depths.

    `sparse` puts the MeanSparse operator (arXiv 2406.05927) before each activation and after each residual
    sum; `squeeze` adds squeeze-excitation before the sum, as in Robust Principles (arXiv 2308.16258).
    """

    HEAD = "logits"
    MAP = "relu"
    BLOCK = DeepMindBlock

    def __init__(
        self,
        num_classes: int,
        width: float,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        sparse: bool = False,
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        channels = [scaled(c, width) for c in widths]
        self.init_conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            *(
                DeepMindGroup(
                    channels[g], channels[g + 1], depths[g], stride, sparse=sparse, squeeze=squeeze
                )
                for g, stride in enumerate((1, 2, 2))
            )
        )
        self.batchnorm = nn.BatchNorm2d(channels[-1], momentum=0.01 if squeeze else 0.1)
        self.meansparse_end = MeanSparse(channels[-1]) if sparse else nn.Identity()
        self.relu = nn.SiLU()
        self.logits = nn.Linear(channels[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        return pooled(self.relu(self.meansparse_end(self.batchnorm(self.layer(self.init_conv(x))))))


# ------------------------------------------------------------------ ImageNet models of Robust Principles


class RaBottleneck(nn.Module):
    """Grouped bottleneck with SiLU and squeeze-excitation, and no norm after its first convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.F = nn.Sequential(
            OrderedDict(
                a=nn.Sequential(nn.Conv2d(inputs, inner, 1, bias=False), nn.Identity(), nn.SiLU()),
                b=nn.Sequential(
                    # The published group widths are half of the inner width in every stage of all models.
                    nn.Conv2d(inner, inner, 3, stride, padding=1, groups=2, bias=False),
                    nn.BatchNorm2d(inner),
                    nn.SiLU(),
                ),
                se=SqueezeExcitation(inner, round(inputs / 4)),
                c=nn.Sequential(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
            )
        )
        self.proj = None
        if stride != 1 or inputs != outputs:
            self.proj = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act((x if self.proj is None else self.proj(x)) + self.F(x))


class RaResNet(Backbone):
    """ResNet by the Robust Principles (Peng et al. 2023, arXiv 2308.16258): wide stem, late downsampling."""

    BLOCK = RaBottleneck

    def __init__(
        self, num_classes: int, width: float, *, widths: Sequence[int], depths: Sequence[int]
    ) -> None:
        super().__init__()
        channels = [scaled(c, width) for c in (96, *widths)]
        stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(),
        )
        # The public keys start with stem.stem.stem.
        self.stem = nn.Sequential(OrderedDict(stem=nn.Sequential(OrderedDict(stem=stem))))
        self.stages = nn.Sequential()
        for k, depth in enumerate(depths, start=1):
            stage = nn.Sequential()
            for i in range(depth):
                inputs, stride = (channels[k - 1], 2) if i == 0 else (channels[k], 1)
                stage.add_module(f"stage{k}-block{i}", RaBottleneck(inputs, channels[k], stride))
            self.stages.add_module(f"stage{k}", stage)
        self.fc = nn.Linear(channels[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        return pooled(self.stages(self.stem(x)))
