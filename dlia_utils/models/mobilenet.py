"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) for radiographs, and weights from files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights
from torchvision.models import mobilenet_v2 as torchvision_mobilenet_v2

from .. import files
from ..units import check_numbers
from .layers import check_sizes, drawn
from .pixel import PixelModel, load_strictly, phantom_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HEAD = ("classifier.1.weight", "classifier.1.bias")
# The paper's table 2: expansion, channels, blocks, first stride.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
STAGES += ((6, 160, 3, 2), (6, 320, 1, 1))

log = logging.getLogger("dlia_utils")


def network(num_classes: int, width: float, stages: int = len(STAGES)) -> nn.Module:
    """torchvision's MobileNetV2 of the first `stages` stages."""
    setting = [list(stage) for stage in STAGES[:stages]]
    options = {"width_mult": width, "inverted_residual_setting": setting}
    return torchvision_mobilenet_v2(num_classes=num_classes, **options)


def mobilenet_v2(
    *,
    num_classes: int = 2,
    width: float = 1.0,
    stages: int = len(STAGES),
    weights: str | Path | None = None,
    seed: int = 0,
) -> PixelModel:
    """MobileNetV2 that takes images in [0, 1], [B, 1 or 3, H, W] -> [B, num_classes].

    `weights`: None (random, drawn from `seed`), a file, "imagenet" or "phantom": see
    `load_weights`.

    >>> import torch
    >>> mobilenet_v2(width=0.25).eval()(torch.rand(2, 1, 32, 32)).shape
    torch.Size([2, 2])
    """
    check_sizes(num_classes=num_classes, width=width, seed=seed)
    check_numbers(f"[1,{len(STAGES)}]", whole=True, stages=stages)
    backbone = load_weights(drawn(seed, network, num_classes, width, stages), weights)
    recipe = {"name": "mobilenet_v2", "num_classes": num_classes, "width": width, "stages": stages}
    return PixelModel(backbone, IMAGENET_MEAN, IMAGENET_STD, recipe=recipe)


def _imagenet() -> dict[str, Tensor]:
    # The first recipe's weights: features trained without label smoothing usually transfer better.
    try:
        return MobileNet_V2_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        fix = "switch the internet on, name a file by DLIA_WEIGHTS, or train with weights=None"
        raise RuntimeError(f"the ImageNet weights could not be downloaded: {fix}") from error


def load_weights(
    backbone: nn.Module,
    weights: str | Path | None,
    *,
    head: Sequence[str] = HEAD,
    variable: str = "DLIA_WEIGHTS",
    download: Callable[[], dict[str, Tensor]] = _imagenet,
) -> nn.Module:
    """Load all but a last layer that is absent or of another width; returns the same `backbone`.

    weights: None (nothing is loaded), a .pth, .bin or .safetensors file, "phantom" (the small body
    of the smoke profile), or "imagenet": the file that the environment variable `variable` names,
    else what `download` gives. Raises: FileNotFoundError; ValueError for a file that does not fit;
    RuntimeError without internet.
    """
    if weights is None:
        return backbone
    origin, given = "ImageNet weights", weights
    if str(weights) == "imagenet":
        given = os.environ.get(variable)
    if str(weights) == "phantom":
        state, origin = phantom_weights("mobilenet_v2"), "weights from phantom images"
    elif given:
        path, origin = Path(given), f"file {Path(given).name}"
        if not path.is_file():
            fix = f"correct `weights=` or {variable}, or use weights=None"
            raise FileNotFoundError(f"no weights file {path}: {fix}")
        state = _read(path)
    else:
        state = download()
    # timm's last layers are 1 x 1 convolutions
    state = {key: value.flatten(1) if key == head[0] else value for key, value in state.items()}
    last = "from the file" if load_strictly(backbone, state, origin=origin, head=head) else "new"
    log.info("%s: %s, last layer %s", type(backbone).__name__, origin, last)
    return backbone


def _read(path: Path) -> dict[str, Tensor]:
    fix = "fetch it again"
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # comes with accelerate; for such files only

        with files.reading(path, fix):
            return load_file(path)
    state = files.read_torch(path, fix)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is no plain state dict; models.load reads the suite's files")
    return state
