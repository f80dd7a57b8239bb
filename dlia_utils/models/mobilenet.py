"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) for radiographs, on torchvision's implementation."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import MobileNet_V2_Weights
from torchvision.models import mobilenet_v2 as torchvision_mobilenet_v2

from .pixel import PixelModel

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HEAD = ("classifier.1.weight", "classifier.1.bias")
STAGES = (  # the paper's table 2: expansion, channels, blocks, first stride
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

log = logging.getLogger("dlia_utils")


def mobilenet_v2(
    *,
    num_classes: int = 2,
    width: float = 1.0,
    stages: int = len(STAGES),
    weights: str | Path | None = None,
    seed: int = 0,
) -> PixelModel:
    """MobileNetV2 that takes images in [0, 1] (Sandler et al. 2018, arXiv 1801.04381).

    `weights`: None (random, drawn from `seed`); a file with torchvision's MobileNetV2 keys; or "imagenet":
    the file that the environment variable DLIA_WEIGHTS names, else torchvision's download. A file may lack
    the last layer or have another number of classes there: that layer is then drawn from `seed`. Anything
    else that is missing, unknown or of another shape is refused. The log says which weights were taken.
    Shapes: [B, 1 or 3, H, W] -> [B, num_classes].
    Raises: FileNotFoundError, ValueError (the keys that do not fit), RuntimeError ("imagenet" without
    internet).

    >>> model = mobilenet_v2(width=0.25)
    >>> model.eval()(torch.rand(2, 1, 32, 32)).shape
    torch.Size([2, 2])
    """
    if not 1 <= stages <= len(STAGES):
        raise ValueError(f"stages must be 1 to {len(STAGES)}, got {stages}")
    # The caller's random stream stays as it is: the same seed gives the same start wherever the call stands.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kept = [list(stage) for stage in STAGES[:stages]]
        backbone = torchvision_mobilenet_v2(
            num_classes=num_classes, width_mult=width, inverted_residual_setting=kept
        )
    if weights is None:
        log.info("MobileNetV2: random weights, seed %d", seed)
    else:
        state, origin = read_weights(weights)
        load_weights(backbone, state, origin)
    recipe = {"name": "mobilenet_v2", "num_classes": num_classes, "width": width, "stages": stages}
    return PixelModel(backbone, IMAGENET_MEAN, IMAGENET_STD, recipe=recipe)


def read_weights(
    weights: str | Path,
    *,
    variable: str = "DLIA_WEIGHTS",
    download: Callable[[], tuple[dict[str, Tensor], str]] | None = None,
) -> tuple[dict[str, Tensor], str]:
    """State dict and a short name for the log, which never holds a path of this machine.

    "imagenet" is the file that the environment variable `variable` names, else what `download` gives.
    """
    if str(weights) == "imagenet" and not os.environ.get(variable):
        return (download or _download)()
    path = Path(os.environ[variable] if str(weights) == "imagenet" else weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights file {path}: correct `weights=` or {variable}, or use weights=None"
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # comes with accelerate; needed for such files only

        return load_file(path), f"file {path.name}"
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise ValueError(
            f"{path.name} is not a plain state dict; a file of this suite is read by models.load"
        )
    return state, f"file {path.name}"


def _download() -> tuple[dict[str, Tensor], str]:
    # The first recipe's weights: features trained without label smoothing usually transfer better.
    try:
        state = MobileNet_V2_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise RuntimeError(
            "the ImageNet weights could not be downloaded: switch the internet on, or name a weights file by "
            "`weights=` or the environment variable DLIA_WEIGHTS, or train from scratch with weights=None"
        ) from error
    return state, "torchvision ImageNet weights"


def load_weights(
    backbone: torch.nn.Module,
    state: dict[str, Tensor],
    origin: str,
    *,
    head: Sequence[str] = HEAD,
    name: str = "MobileNetV2",
) -> None:
    """Load all but a last layer that is absent or of another width; refuse every other difference."""
    own = backbone.state_dict()
    fits = {
        key: value for key, value in state.items() if key in own and value.shape == own[key].shape
    }
    fresh = sorted(key for key in head if key not in fits)
    problems = [f"missing {key}" for key in own if key not in state and key not in head]
    problems += [f"unknown {key}" for key in state if key not in own]
    problems += [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and key not in fits and key not in head
    ]
    if problems:
        shown = "; ".join(problems[:10]) + (
            f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        )
        raise ValueError(
            f"{origin} does not fit {name} ({len(problems)} of {len(own)} entries): {shown}"
        )
    backbone.load_state_dict(
        {**own, **{key: fits[key] for key in fits if not fresh or key not in head}}
    )
    log.info(
        "%s: %s, %d of %d entries; drawn anew: %s",
        name,
        origin,
        len(fits),
        len(own),
        fresh or "none",
    )
