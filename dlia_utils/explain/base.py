"""What every map shares: the result, two logits from any head, the checks, the target class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from ..attacks.base import check_images, check_model
from ..models.pixel import TwoLogits, two_logits  # noqa: F401 (the maps take them from here)

TINY = 1e-30  # below it a float32 map is zero: its quotients would be noise
REFERENCES = ("random", "centre prior", "edges")  # names of the maps that no model made


@dataclass(frozen=True)
class Attribution:
    """Maps of a batch, and what is needed to judge them.

    method   name of the method
    maps     float32 [B,H,W] at image size: [0,1] for Grad-CAM, else signed and in logits (saliency: logits
             per unit of grey, >= 0)
    target   int64 [B]: the class that is explained; score [B]: its logit
    zero     bool [B]: the map is zero everywhere and says nothing
    error    [B]: completeness error |sum of the map - (f(x) - f(b))| over |f(x) - f(b)|, where differences
             below 0.01 logit count as 0.01; None for methods that promise no sum
    baseline what stands for "nothing there", in words; "" when the method needs none
    grid     Grad-CAM's map [B,h,w] as computed, before it is resized and scaled; else None

    >>> map = Attribution("demo", torch.tensor([[[-2.0, 0.0, 1.0]]]), *[torch.tensor([1])] * 2)
    >>> map.heat()
    tensor([[[0., 0., 1.]]])
    >>> map.heat(absolute=True)
    tensor([[[1.0000, 0.0000, 0.5000]]])
    """

    method: str
    maps: Tensor
    target: Tensor
    score: Tensor
    error: Tensor | None = None
    baseline: str = ""
    grid: Tensor | None = None

    @property
    def zero(self) -> Tensor:
        return self.maps.abs().amax((1, 2)) <= TINY

    def heat(self, *, absolute: bool = False) -> Tensor:
        """Maps [B,H,W] in [0,1] for overlays and scores: what speaks for the class, over its maximum.

        absolute: what speaks against it counts too, by its size.
        """
        return scale(self.maps.abs() if absolute else self.maps.clamp(min=0))


def scale(maps: Tensor) -> Tensor:
    """Maps >= 0 divided by their own maximum; zero maps stay zero."""
    top = maps.amax((1, 2), keepdim=True)
    return torch.where(top > TINY, maps / top.clamp(min=TINY), 0.0)


def check(model: nn.Module, x: Tensor, *, batch_size: int = 1) -> Tensor:
    """A clamped copy of the images; refuses a model in training mode and images outside [0,1]."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, not {batch_size}")
    check_model(model)
    return check_images(x)


def choose_target(logits: Tensor, target: int | Tensor | None) -> Tensor:
    """The class of each image, int64 [B]: as given, or the predicted one; refuses classes the model lacks."""
    if not bool(logits.isfinite().all()):
        raise ValueError("the model returns NaN or infinite logits on these images")
    if target is None:
        return logits.argmax(1)
    chosen = torch.as_tensor(target, device=logits.device)
    if (
        chosen.is_floating_point()
        or chosen.dtype == torch.bool
        or chosen.shape not in ((), logits.shape[:1])
    ):
        raise ValueError(
            f"target must be None, one class number, or int64 [{len(logits)}], not {target!r}"
        )
    if not bool(((chosen >= 0) & (chosen < logits.shape[1])).all()):
        raise ValueError(f"target holds a class outside 0..{logits.shape[1] - 1}: {target!r}")
    return chosen.long().expand(len(logits))


def pick(logits: Tensor, target: Tensor) -> Tensor:
    """The target's logit of every image [B]."""
    return logits.gather(1, target[:, None])[:, 0]


def window(maps: np.ndarray) -> np.ndarray:
    """Maps [...,H,W] averaged in the window of structural similarity: Gaussian, deviation 1.5, 11 wide, mirrored."""
    return gaussian_filter(maps, 1.5, truncate=3.5, axes=(-2, -1))


def likeness(
    mean_a: np.ndarray,
    mean_b: np.ndarray,
    variance_a: np.ndarray,
    variance_b: np.ndarray,
    product: np.ndarray,
) -> np.ndarray:
    """Structural similarity [...] of maps on [0,1], K1 = 0.01, K2 = 0.03; `product` is the window's mean of a * b.

    Source: Wang et al., IEEE TIP 13:600, 2004. All arguments are [...,H,W] as `window` gives them.
    """
    means = mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * means + c1) * (2 * (product - means) + c2)
    return (above / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean((-2, -1))
