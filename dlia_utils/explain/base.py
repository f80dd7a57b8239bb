"""What every map shares: the result, the checks, the class explained, structural similarity."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from ..attacks.base import check_gradients, check_images, check_steady
from ..device import device_of

TINY = 1e-30  # below it a float32 map is zero: its quotients would be noise
REFERENCES = ("random", "centre prior", "edges")  # names of the maps that no model made


@dataclass(frozen=True)
class Attribution:
    """Maps [B,H,W] of a batch at image size, and the class explained [B].

    maps: [0,1] for Grad-CAM, else signed and in logits (saliency: >= 0, per unit of grey). error
    [B], of methods whose maps should sum to d, the change of the logit from a black image: the
    completeness error |sum - d| / max(|d|, 0.01). grid: Grad-CAM's map [B,h,w] as computed.

    >>> Attribution(torch.tensor([[[-2.0, 0.0, 1.0]]]), torch.tensor([1])).heat()
    tensor([[[0., 0., 1.]]])
    """

    maps: Tensor
    target: Tensor
    error: Tensor | None = None
    grid: Tensor | None = None

    @property
    def zero(self) -> Tensor:
        """Whether the map is 0 everywhere [B]."""
        return self.maps.abs().amax((1, 2)) <= TINY

    def heat(self) -> Tensor:
        """Maps in [0,1] for overlays and scores: what speaks for the class, over its maximum."""
        return scale(self.maps.clamp(min=0))


def scale(maps: Tensor) -> Tensor:
    """Maps >= 0 divided by their own maximum; zero maps stay zero."""
    top = maps.amax((1, 2), keepdim=True)
    return torch.where(top > TINY, maps / top.clamp(min=TINY), 0.0)


def stretch(maps: Tensor) -> Tensor:
    """Maps [N,h,w] by their own range on [0,1]; a constant one becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    size = maps.abs().amax((1, 2), keepdim=True)
    # What is left of a constant map after rounding must not be blown up to a pattern.
    varied = (high - low > 1e-6 * size) & (size > TINY)
    return torch.where(varied, (maps - low) / torch.where(varied, high - low, 1), 0.0)


def highest(maps: np.ndarray, share: float) -> tuple[np.ndarray, int]:
    """Which places [N,n] are among that share of the highest, and how many are; ties share."""
    count = max(1, round(share * maps.shape[1]))
    level = np.partition(maps, -count, axis=1)[:, -count, None]
    above, equal = maps > level, maps == level
    left = (count - above.sum(1, keepdims=True)) / equal.sum(1, keepdims=True)
    return np.where(above, 1.0, np.where(equal, left, 0.0)), count


def check(model: nn.Module, x: Tensor) -> Tensor:
    """Images [B,C,H,W], clamped to [0,1]; refuses others, and a model in training, or unsteady."""
    check_gradients(model)
    x = check_images(x)
    check_steady(model, x[:1].to(device_of(model, x)))
    return x


def choose_target(logits: Tensor, target: int | Tensor | None) -> Tensor:
    """The class of each image, int64 [B]: as given, or the predicted one."""
    if not bool(logits.isfinite().all()):
        raise ValueError("the model returns NaN or infinite logits on these images")
    if target is None:
        return logits.argmax(1)
    chosen, last = torch.as_tensor(target, device=logits.device), logits.shape[1] - 1
    if chosen.is_floating_point() or chosen.min() < 0 or chosen.max() > last:
        raise ValueError(f"target must be None, a class 0..{last} or int64 [B], not {target!r}")
    return chosen.long().expand(len(logits))


def pick(logits: Tensor, target: Tensor) -> Tensor:
    """The target's logit of every image [B]."""
    return logits.gather(1, target[:, None])[:, 0]


def find_layer(model: nn.Module, layer: nn.Module | str) -> tuple[nn.Module, str]:
    """A module of the model and its dotted name, or an error that names the nearest ones."""
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    name = layer if isinstance(layer, str) else names.get(layer, f"{type(layer).__name__}(...)")
    if name not in modules:
        near = ", ".join(difflib.get_close_matches(name, modules, n=3, cutoff=0.3)) or "none"
        raise ValueError(f"the model has no layer {name!r}; near: {near} (named_modules())")
    return modules[name], name or "the model"


def feature_map(output: object, name: str) -> Tensor:
    """What a layer returned, if it is a map [B,C,h,w]."""
    if not isinstance(output, Tensor) or output.ndim != 4:
        what = list(getattr(output, "shape", [])) or type(output).__name__
        raise ValueError(f"{name} returns {what}, not feature maps [B,C,H,W]: choose a convolution")
    return output


def array(values: Tensor | np.ndarray) -> np.ndarray:
    """float64 on the CPU, of a tensor or an array."""
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)


def moments(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance [...,H,W] in SSIM's window: Gaussian, deviation 1.5, 11 wide, mirrored."""
    mean = _window(maps)
    return mean, _window(maps**2) - mean**2


def ssim(a: np.ndarray, b: np.ndarray, of_a=None, of_b=None) -> np.ndarray:
    """Structural similarity [...] of maps [...,H,W] in [0,1]; of_a, of_b: `moments`, if known.

    Source: Wang et al., IEEE TIP 13:600, 2004. torchmetrics' refuses maps of 5 pixels or less.
    """
    (mean_a, variance_a), (mean_b, variance_b) = of_a or moments(a), of_b or moments(b)
    means, c1, c2 = mean_a * mean_b, 0.01**2, 0.03**2
    above = (2 * means + c1) * (2 * (_window(a * b) - means) + c2)
    return (above / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean((-2, -1))


def _window(maps: np.ndarray) -> np.ndarray:
    return gaussian_filter(maps, 1.5, truncate=3.5, axes=(-2, -1))
