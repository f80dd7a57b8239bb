"""EigenCAM: what a layer responds to most, without gradients and without choosing a class."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

CORNERS = ["x1", "y1", "x2", "y2"]


def eigencam(
    activations: Tensor, *, size: int | tuple[int, int] | None = None, component: int = 0
) -> Tensor:
    """Saliency maps [B,H,W] in [0,1]: the activations projected on their principal component.

    Source: Muhammad and Yeasin, arXiv 2008.00299. Each image's activations are a matrix A [H*W, C] = U S V^T,
    taken as it is (the paper does not centre it), and the map is A v with v the first column of V;
    `component` picks a later one. An SVD leaves the sign open: here the map is positive where the activations
    are strong, that is, its inner product with their norm at each place is >= 0.

    activations: [B,C,h,w], any float type. size: side, or (H, W), to which the map is resized bilinearly;
    without it the map keeps h x w. Each map is then stretched to [0,1] by its own least and greatest value; a
    constant map, and a component that the activations do not have, become zeros. Images do not influence each
    other, and the heights of two maps cannot be compared. Returns float32 on the device of `activations`, no
    gradient. Errors: ValueError for another shape, NaN or infinite values, or a component beyond min(C, h*w).

    >>> place = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    >>> eigencam(torch.stack([place, 3 * place])[None])[0]
    tensor([[0.0000, 0.2500],
            [0.5000, 1.0000]])
    """
    if activations.ndim != 4 or not activations.numel() or not activations.is_floating_point():
        raise ValueError(
            f"activations must be floats [B,C,H,W], not {activations.dtype} {list(activations.shape)}"
        )
    rank = min(activations.shape[1], activations.shape[2] * activations.shape[3])
    if not 0 <= component < rank:
        raise ValueError(
            f"component must lie in 0..{rank - 1} for activations {list(activations.shape)}"
        )
    if not bool(activations.isfinite().all()):
        raise ValueError("activations contain NaN or infinite values: the model's output is broken")
    # One image at a time: a batch in float64 could fill a GPU, and the batch size would change the rounding.
    return torch.stack([_map(image.detach(), size, component) for image in activations]).float()


def _map(image: Tensor, size: int | tuple[int, int] | None, component: int) -> Tensor:
    """The finished map of one image's activations [C,h,w]."""
    matrix = image.double().flatten(1)  # [C, h*w]: A transposed
    tall = matrix.shape[1] > matrix.shape[0]
    # The eigenvectors of the smaller Gram matrix are one side of the SVD, for a fraction of its work.
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if tall else matrix.T @ matrix)
    vector = vectors[:, -1 - component]
    projected = vector @ (matrix if tall else matrix.T @ matrix)
    if (
        not values[-1 - component] > 1e-12 * values[-1]
    ):  # squared singular values; also true for all zeros
        projected = torch.zeros_like(projected)
    if projected @ matrix.norm(dim=0) < 0:
        projected = -projected
    grid = projected.view(1, 1, *image.shape[1:])
    if size is not None:
        shape = (size, size) if isinstance(size, int) else tuple(size)
        grid = nn.functional.interpolate(grid, shape, mode="bilinear", align_corners=False)
    low, high = grid.aminmax()
    # What is left of a constant map after rounding must not be blown up to a pattern.
    if high - low <= 1e-6 * grid.abs().max():
        return torch.zeros_like(grid[0, 0])
    return ((grid - low) / (high - low))[0, 0]


def activations(
    model: nn.Module,
    x: Tensor | Sequence[Tensor],
    layer: nn.Module | str,
    *,
    level: str | None = None,
) -> Tensor:
    """What `layer` returns while `model` reads `x`: a detached copy [B,C,H,W].

    x: whatever the model takes. layer: one of the model's modules, or its dotted name. level: which map of a
    layer that returns several by name, such as "0" (finest) to "3" or "pool" of torchvision's FPN backbone; a
    detector that pads its images returns maps of the padded image. The model is run once in eval mode without
    gradients; it is left as it was and its hook is taken off, also after an error. Errors: ValueError when
    the model is in training mode, for a layer that is not in the model, does not run or runs more than once,
    for a missing, unknown or needless level, and for an output that is not [B,C,H,W].

    >>> model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten()).eval()
    >>> activations(model, torch.rand(2, 1, 8, 8), "0").shape
    torch.Size([2, 3, 6, 6])
    """
    module, name = _find(model, layer)
    if any(part.training for part in model.modules()):
        raise ValueError("the model is in training mode and would change; call model.eval()")
    seen: list[Tensor] = []
    # Cloned at once: an in-place ReLU after the layer would otherwise change what was seen.
    handle = module.register_forward_hook(
        lambda _, __, output: seen.append(_pick(output, level, name).clone())
    )
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(
            f"{name} ran {len(seen)} times on this input: choose a layer that runs once"
        )
    return seen[0]


def _find(model: nn.Module, layer: nn.Module | str) -> tuple[nn.Module, str]:
    """The module and its name in `model`, or an error that helps to find the right one."""
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        if layer not in modules:
            near = difflib.get_close_matches(layer, modules, n=3, cutoff=0.3)
            raise ValueError(
                f"the model has no layer {layer!r}; near: {', '.join(near) or 'none'} (named_modules())"
            )
        return modules[layer], layer or "the model"
    for name, module in modules.items():
        if module is layer:
            return module, name or "the model"
    raise ValueError(
        f"this {type(layer).__name__} is not a part of the model: pass a module of it, or its name"
    )


def _pick(output: object, level: str | None, name: str) -> Tensor:
    """One feature map from what a layer returned."""
    if isinstance(output, Mapping):
        if level not in output:
            raise ValueError(
                f"{name} returns the levels {list(output)}, not level={level!r}: choose one of them"
            )
        output = output[level]
    elif level is not None:
        raise ValueError(
            f"{name} returns a {type(output).__name__}, not maps by name: leave out level={level!r}"
        )
    if not isinstance(output, Tensor) or output.ndim != 4:
        what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{name} returns {what}, not feature maps [B,C,H,W]: choose a convolutional layer"
        )
    return output


def energy_inside(maps: Tensor | np.ndarray, boxes_by_image: Sequence[pd.DataFrame]) -> np.ndarray:
    """Share of each map's sum that lies inside its boxes, beside the share of the area they cover: [N,2].

    Source: the energy-based pointing game of Wang et al., arXiv 1910.01279. A flat map scores exactly the
    area share, so only a share well above it says something; and where findings sit in the middle of the
    film, a map that always looks there beats it too. maps: [N,H,W], >= 0. boxes_by_image: one table per map
    with columns x1, y1, x2, y2 in the map's pixels; a pixel belongs to a box when its centre does, and where
    boxes overlap it counts once. Without a box both numbers are NaN; a map of zeros has a NaN share. Errors:
    ValueError for other shapes or lengths, or a negative or NaN map.

    >>> heat = np.zeros((1, 4, 4))
    >>> heat[0, 1, 1], heat[0, 3, 3] = 3, 1
    >>> energy_inside(heat, [pd.DataFrame([{"x1": 0, "y1": 0, "x2": 2, "y2": 2}])])
    array([[0.75, 0.25]])
    """
    maps = np.asarray(maps.detach().cpu() if isinstance(maps, Tensor) else maps, dtype=float)
    if maps.ndim != 3 or len(maps) != len(boxes_by_image):
        raise ValueError(
            f"maps {list(maps.shape)} must be [N,H,W] with one table of boxes each ({len(boxes_by_image)})"
        )
    if not (maps >= 0).all():
        raise ValueError(
            "maps hold negative or NaN values: a share of their sum would mean nothing"
        )
    shares = np.full((len(maps), 2), np.nan)
    for row, (heat, boxes) in enumerate(zip(maps, boxes_by_image, strict=True)):
        inside = _inside(boxes, heat.shape)
        if len(boxes):
            shares[row, 1] = inside.mean()
            if heat.sum() > 0:
                shares[row, 0] = heat[inside].sum() / heat.sum()
    return shares


def _inside(boxes: pd.DataFrame, shape: tuple[int, int]) -> np.ndarray:
    """Mask of the pixels whose centre lies in any of the boxes."""
    across, down = np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5
    inside = np.zeros(shape, bool)
    for x1, y1, x2, y2 in boxes[CORNERS].to_numpy(float):
        inside |= np.outer((down >= y1) & (down < y2), (across >= x1) & (across < x2))
    return inside
