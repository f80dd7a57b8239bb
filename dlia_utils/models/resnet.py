"""Pre-activation ResNet-50 with timm's weights, and ResNet-18 for small images."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ..units import check_numbers
from .layers import check_sizes, drawn
from .mobilenet import load_weights
from .pixel import Backbone, PixelModel, chains, scaled

TIMM_NAME = "resnetv2_50.a1h_in1k"
TIMM_MEAN = TIMM_STD = (0.5, 0.5, 0.5)  # what those weights were trained with
HEAD = ("head.fc.weight", "head.fc.bias")
VARIABLE = "DLIA_RESNETV2_WEIGHTS"


class PreActBottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution, each after its norm and ReLU; the 3 x 3 may stride."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, first: bool) -> None:
        super().__init__()
        inner = outputs // 4
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(inner), nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.norm3, self.relu3 = nn.BatchNorm2d(inner), nn.ReLU()
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.downsample = None
        if first:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(OrderedDict(conv=shortcut))

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.norm1(x))
        branch = self.conv2(self.relu2(self.norm2(self.conv1(activated))))
        branch = self.conv3(self.relu3(self.norm3(branch)))
        return (x if self.downsample is None else self.downsample(activated)) + branch


class PreActResNet(Backbone):
    """ResNet V2 of bottlenecks (He et al. 2016, arXiv 1603.05027), with timm's module names."""

    HEAD = "head"
    MAP = "relu"
    BLOCK = PreActBottleneck

    def __init__(self, num_classes: int, width: float, depths: Sequence[int]) -> None:
        super().__init__()
        channels = [scaled(c, width) for c in (64, 256, 512, 1024, 2048)][: len(depths) + 1]
        conv = nn.Conv2d(3, channels[0], 7, 2, padding=3, bias=False)
        self.stem = nn.Sequential(OrderedDict(conv=conv, pool=nn.MaxPool2d(3, 2, padding=1)))
        stages = chains(PreActBottleneck, channels, depths)
        self.stages = nn.Sequential(*(nn.Sequential(OrderedDict(blocks=s)) for s in stages))
        self.norm = nn.BatchNorm2d(channels[-1])
        self.relu = nn.ReLU()
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(channels[-1], num_classes)))
        _initialise(self)


def resnet50_v2(
    *,
    num_classes: int = 2,
    width: float = 1.0,
    depths: Sequence[int] = (3, 4, 6, 3),
    weights: str | Path | None = None,
    seed: int = 0,
) -> PixelModel:
    """Pre-activation ResNet-50 (He et al. 2016, arXiv 1603.05027), [B, 1 or 3, H, W] in [0, 1].

    weights: None (random, drawn from `seed`); a file with the keys of timm's resnetv2_50 with batch
    norm; or "imagenet": the file that DLIA_RESNETV2_WEIGHTS names, else timm's download. See
    `load_weights`. Public files have this width and these depths.

    >>> resnet50_v2(width=1 / 16, depths=(1, 1, 1, 1)).backbone.head.fc.out_features
    2
    """
    check_sizes(num_classes=num_classes, width=width, seed=seed)
    for depth in depths:
        check_sizes(depths=depth)
    backbone = drawn(seed, PreActResNet, num_classes, width, depths)
    load_weights(backbone, weights, head=HEAD, variable=VARIABLE, download=_download)
    recipe = {"name": "resnet50_v2", "num_classes": num_classes, "width": width}
    return PixelModel(backbone, TIMM_MEAN, TIMM_STD, recipe=recipe | {"depths": list(depths)})


def _download() -> dict[str, Tensor]:
    advice = f"name a file by `weights=` or {VARIABLE}, or train with weights=None"
    return timm_model(TIMM_NAME, advice, pretrained=True).state_dict()


def timm_model(arch: str, advice: str, **options) -> nn.Module:
    """`timm.create_model`. Raises: RuntimeError without timm or internet, with `advice`."""
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise RuntimeError(f"{arch} comes with timm (pip install timm); or {advice}") from error
    try:
        return timm.create_model(arch, **options)
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        reason = f"timm could not make {arch} ({type(error).__name__}: {error})"
        raise RuntimeError(f"{reason}: switch the internet on, or {advice}") from error


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with norms, the sum, ReLU; every module runs once."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, first: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2, self.downsample = nn.BatchNorm2d(outputs), None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2((x if self.downsample is None else self.downsample(x)) + branch)


class CifarResNet(Backbone):
    """ResNet-18 with a 3 x 3 stem and no first pooling: four stages of two blocks."""

    BLOCK = BasicBlock

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        channels = [scaled(c, width) for c in (64, 64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(channels[0]), nn.ReLU()
        for k, stage in enumerate(chains(BasicBlock, channels, (2, 2, 2, 2)), start=1):
            self.add_module(f"layer{k}", stage)
        self.fc = nn.Linear(channels[-1], num_classes)
        _initialise(self)


def resnet18_cifar(
    *, num_classes: int = 2, width: float = 1.0, mean: float = 0.5, std: float = 0.5, seed: int = 0
) -> PixelModel:
    """ResNet-18 for small images in [0, 1] (He et al. 2015, arXiv 1512.03385): 32 px end as 4 x 4.

    mean, std: of pixels in [0, 1], for all channels. [B, 1 or 3, H, W] -> [B, num_classes].
    """
    check_sizes(num_classes=num_classes, width=width, seed=seed)
    check_numbers("[0,1]", mean=mean)
    check_numbers("(0,1]", std=std)
    mean, std = float(mean), float(std)
    backbone = drawn(seed, CifarResNet, num_classes, width)
    recipe = {"name": "resnet18_cifar", "num_classes": num_classes, "width": width}
    recipe |= {"mean": mean, "std": std}
    return PixelModel(backbone, [mean] * 3, [std] * 3, recipe=recipe)


def _initialise(network: nn.Module) -> None:
    """The start of He et al. 2015 (arXiv 1502.01852): maps keep their variance."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
