"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) for radiographs, and weights from files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import MobileNet_V2_Weights
from torchvision.models import mobilenet_v2 as torchvision_mobilenet_v2

from .pixel import PixelModel, load_strictly

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HEAD = ("classifier.1.weight", "classifier.1.bias")
# The paper's table 2: expansion, channels, blocks, first stride.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
STAGES += ((6, 160, 3, 2), (6, 320, 1, 1))

log = logging.getLogger("dlia_utils")


def mobilenet_v2(
    *,
    num_classes: int = 2,
    width: float = 1.0,
    stages: int = len(STAGES),
    weights: str | Path | None = None,
    seed: int = 0,
) -> PixelModel:
    """MobileNetV2 that takes images in [0, 1], [B, 1 or 3, H, W] -> [B, num_classes].

    `weights`: None (random, drawn from `seed`), a file, or "imagenet": see `read_weights` and
    `load_weights`, which say what is raised.

    >>> mobilenet_v2(width=0.25).eval()(torch.rand(2, 1, 32, 32)).shape
    torch.Size([2, 2])
    """
    if not 1 <= stages <= len(STAGES):
        raise ValueError(f"stages must be 1 to {len(STAGES)}, got {stages}")
    options = {"width_mult": width, "inverted_residual_setting": [list(s) for s in STAGES[:stages]]}
    with torch.random.fork_rng(devices=[]):  # the caller's random stream stays as it is
        torch.manual_seed(seed)
        backbone = torchvision_mobilenet_v2(num_classes=num_classes, **options)
    if weights is None:
        log.info("MobileNetV2: random weights, seed %d", seed)
    else:
        load_weights(backbone, *read_weights(weights))
    recipe = {"name": "mobilenet_v2", "num_classes": num_classes, "width": width, "stages": stages}
    return PixelModel(backbone, IMAGENET_MEAN, IMAGENET_STD, recipe=recipe)


def read_weights(
    weights: str | Path,
    *,
    variable: str = "DLIA_WEIGHTS",
    download: Callable[[], tuple[dict[str, Tensor], str]] | None = None,
) -> tuple[dict[str, Tensor], str]:
    """State dict of a .pth, .bin or .safetensors file, and its name without the folder for the log.

    "imagenet" is the file that the environment variable `variable` names, else what `download`
    gives (default: torchvision's MobileNetV2). Raises: FileNotFoundError; ValueError for a file of
    another kind; RuntimeError without internet.
    """
    if str(weights) == "imagenet" and not os.environ.get(variable):
        return (download or _imagenet)()
    path = Path(os.environ[variable] if str(weights) == "imagenet" else weights)
    if not path.is_file():
        fix = f"correct `weights=` or {variable}, or use weights=None"
        raise FileNotFoundError(f"no weights file {path}: {fix}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # comes with accelerate; for such files only

        return load_file(path), f"file {path.name}"
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path.name} is no plain state dict; models.load reads the suite's files")
    return state, f"file {path.name}"


def load_weights(
    backbone: nn.Module, state: dict[str, Tensor], origin: str, *, head: Sequence[str] = HEAD
) -> None:
    """Load all but a last layer that is absent or of another width; refuse any other difference."""
    from_file = load_strictly(backbone, state, origin=origin, head=head)
    last = "from the file" if from_file else "drawn anew"
    log.info("%s: %s, last layer %s", type(backbone).__name__, origin, last)


def _imagenet() -> tuple[dict[str, Tensor], str]:
    # The first recipe's weights: features trained without label smoothing usually transfer better.
    try:
        state = MobileNet_V2_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        fix = "switch the internet on, name a file by DLIA_WEIGHTS, or train with weights=None"
        raise RuntimeError(f"the ImageNet weights could not be downloaded: {fix}") from error
    return state, "torchvision ImageNet weights"
