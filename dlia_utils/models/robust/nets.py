"""The wide ResNets of the robust models (arXiv 1605.07146), with their public files' module names.

They take normalised images [B, 3, H, W] of any size: the published 8 x 8 pooling is the mean over
the map. No module runs twice or in place, so that hooks of heat maps see what they expect.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from ..pixel import Backbone, chains, scaled
from .meansparse import MeanSparse


def _conv(inputs: int, outputs: int, stride: int = 1, padding: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding, bias=False)


class TradesBlock(nn.Module):
    """Pre-activation block; the first of a group sends its activated input through a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, first: bool) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = _conv(inputs, outputs, stride)
        self.bn2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = _conv(outputs, outputs)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if first else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        branch = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return (x if self.convShortcut is None else self.convShortcut(activated)) + branch


class TradesWideResNet(Backbone):
    """Wide ResNet with ReLU and symmetric padding, as in the code of TRADES (arXiv 1901.08573).

    huang: with the names of WRN-34-R (Huang et al. 2021, arXiv 2110.03825), a narrow last stage.
    """

    MAP = "relu"
    BLOCK = TradesBlock

    def __init__(
        self, num_classes: int, width: float, *, widths: tuple, depth: int, huang: bool = False
    ) -> None:
        super().__init__()
        channels = [scaled(c, width) for c in (16, *widths)]
        self.add_module("stem_conv" if huang else "conv1", _conv(3, channels[0]))
        groups = chains(TradesBlock, channels, (depth,) * 3)
        groups = [nn.Sequential(OrderedDict(layer=layer)) for layer in groups]
        if huang:
            self.blocks = nn.Sequential(*groups)
        else:
            self.block1, self.block2, self.block3 = groups
        self.bn1 = nn.BatchNorm2d(channels[-1])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels[-1], num_classes)


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
        self.batchnorm_0, self.relu_0 = nn.BatchNorm2d(inputs, momentum=momentum), nn.SiLU()
        self.conv_0 = _conv(inputs, outputs, stride, 2 - stride)
        self.batchnorm_1, self.relu_1 = nn.BatchNorm2d(outputs, momentum=momentum), nn.SiLU()
        self.conv_1 = _conv(outputs, outputs)
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
        self.init_conv = _conv(3, channels[0])
        groups = chains(DeepMindBlock, channels, depths, **options)
        self.layer = nn.Sequential(*(nn.Sequential(OrderedDict(block=block)) for block in groups))
        self.batchnorm = nn.BatchNorm2d(
            channels[-1], momentum=0.01 if options.get("squeeze") else 0.1
        )
        self.meansparse_end = MeanSparse(channels[-1]) if options.get("sparse") else nn.Identity()
        self.relu = nn.SiLU()
        self.logits = nn.Linear(channels[-1], num_classes)
