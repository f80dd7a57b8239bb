"""The wide ResNets of the robust models (arXiv 1605.07146), with the module names of their public files.

They take normalised images [B, 3, H, W] of any size: the published 8 x 8 pooling is the mean over the
map. No module runs twice or in place, so that hooks of explanation methods see what they expect.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from ..pixel import Backbone, scaled
from .meansparse import MeanSparse


def group(
    block: type[nn.Module], inputs: int, outputs: int, depth: int, stride: int, **options: bool
) -> nn.Sequential:
    """`depth` blocks of one width; only the first may stride."""
    blocks = [block(inputs, outputs, stride, first=True, **options)]
    blocks += [block(outputs, outputs, 1, first=False, **options) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


class TradesBlock(nn.Module):
    """Pre-activation block; the first of a group sends its activated input through a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, first: bool) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if first else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        branch = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return (x if self.convShortcut is None else self.convShortcut(activated)) + branch


class TradesWideResNet(Backbone):
    """Wide ResNet with ReLU and symmetric padding, as in the code of TRADES (arXiv 1901.08573)."""

    MAP = "relu"
    BLOCK = TradesBlock

    def __init__(self, num_classes: int, width: float, *, depth: int, factor: int) -> None:
        super().__init__()
        channels = [scaled(c, width) for c in (16, 16 * factor, 32 * factor, 64 * factor)]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        for k, stride in enumerate((1, 2, 2)):
            layer = group(TradesBlock, channels[k], channels[k + 1], (depth - 4) // 6, stride)
            self.add_module(f"block{k + 1}", nn.Sequential(OrderedDict(layer=layer)))
        self.bn1 = nn.BatchNorm2d(channels[-1])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.relu(self.bn1(x)).mean(dim=(2, 3))


class HuangWideResNet(Backbone):
    """Wide ResNet 34-R of Huang et al. 2021 (arXiv 2110.03825): a last stage of less capacity."""

    MAP = "relu"
    BLOCK = TradesBlock

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        channels = [scaled(c, width) for c in (16, 320, 640, 512)]
        self.stem_conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.blocks = nn.Sequential()
        for k, stride in enumerate((1, 2, 2)):
            layer = group(TradesBlock, channels[k], channels[k + 1], 5, stride)
            self.blocks.append(nn.Sequential(OrderedDict(layer=layer)))
        self.bn1 = nn.BatchNorm2d(channels[-1])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.blocks(self.stem_conv(x)))).mean(dim=(2, 3))


class DeepMindBlock(nn.Module):
    """Pre-activation block with SiLU and TensorFlow's SAME padding, perhaps with MeanSparse and SE.

    With stride 2 and an even size, SAME pads the right and the bottom only. Symmetric padding would
    take the same weights and shift every map by a pixel.
    """

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, first: bool, sparse=False, squeeze=False
    ) -> None:
        super().__init__()
        momentum = 0.01 if squeeze else 0.1
        operator = MeanSparse if sparse else nn.Identity
        self.stride = stride
        self.batchnorm_0 = nn.BatchNorm2d(inputs, momentum=momentum)
        self.relu_0 = nn.SiLU()
        self.conv_0 = nn.Conv2d(inputs, outputs, 3, stride, padding=2 - stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(outputs, momentum=momentum)
        self.relu_1 = nn.SiLU()
        self.conv_1 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if first else None
        self.se = SqueezeExcitation(outputs, max(1, round(outputs / 4))) if squeeze else None
        self.meansparse_0, self.meansparse_1 = operator(inputs), operator(outputs)
        self.meansparse_2 = operator(outputs)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu_0(self.meansparse_0(self.batchnorm_0(x)))
        padded = activated
        if self.stride == 2:  # an odd size on all sides, an even one right and below
            padded = F.pad(activated, (x.shape[-1] % 2, 1, x.shape[-2] % 2, 1))
        branch = self.relu_1(self.meansparse_1(self.batchnorm_1(self.conv_0(padded))))
        branch = self.conv_1(branch)
        if self.se is not None:
            branch = self.se(branch)
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return self.meansparse_2(shortcut + branch)


class DeepMindWideResNet(Backbone):
    """Wide ResNet with SiLU (Gowal et al. 2020, arXiv 2010.03593) from its widths (stem first).

    options: `sparse` puts MeanSparse (arXiv 2406.05927) before each activation and after each sum;
    `squeeze` squeeze-excitation before the sum, as in Robust Principles (arXiv 2308.16258).
    """

    HEAD = "logits"
    MAP = "relu"
    BLOCK = DeepMindBlock

    def __init__(
        self, num_classes: int, width: float, *, widths: tuple, depths: tuple, **options: bool
    ) -> None:
        super().__init__()
        channels = [scaled(c, width) for c in widths]
        self.init_conv = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential()
        for k, stride in enumerate((1, 2, 2)):
            sides = channels[k], channels[k + 1]
            block = group(DeepMindBlock, *sides, depths[k], stride, **options)
            self.layer.append(nn.Sequential(OrderedDict(block=block)))
        self.batchnorm = nn.BatchNorm2d(
            channels[-1], momentum=0.01 if options.get("squeeze") else 0.1
        )
        self.meansparse_end = MeanSparse(channels[-1]) if options.get("sparse") else nn.Identity()
        self.relu = nn.SiLU()
        self.logits = nn.Linear(channels[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.batchnorm(self.layer(self.init_conv(x)))
        return self.relu(self.meansparse_end(x)).mean(dim=(2, 3))
