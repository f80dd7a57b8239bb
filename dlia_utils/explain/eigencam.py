"""EigenCAM: what a layer responds to most, without gradients and without choosing a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..attacks.base import check_model, check_steady
from ..data.tables import CORNERS
from . import base


def eigencam(activations: Tensor, *, size: int | tuple[int, int] | None = None) -> Tensor:
    """Maps [B,H,W] in [0,1]: the activations projected on their first principal component.

    Source: Muhammad and Yeasin, arXiv 2008.00299. Each image's activations [C,h,w] are a matrix A
    [h*w, C], not centred, and the map is A v, v its first right singular vector, with the sign that
    makes it high where the activations are strong. size: side, or (H, W), of the map. Each map is
    stretched by its own range; a constant one becomes zeros.

    >>> place = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    >>> eigencam(torch.stack([place, 3 * place])[None])[0]
    tensor([[0.0000, 0.2500],
            [0.5000, 1.0000]])
    """
    # One at a time: a batch in float64 could fill a GPU, and its size would change the rounding.
    maps = torch.stack([_projected(image.detach()) for image in activations])
    if size is not None:
        maps = nn.functional.interpolate(maps[:, None], size, mode="bilinear")[:, 0]
    return base.stretch(maps).float()


def _projected(image: Tensor) -> Tensor:
    """One image's activations [C,h,w] on their first principal component, float64 [h,w]."""
    matrix = image.double().flatten(1)  # [C, h*w]: A transposed
    tall = matrix.shape[1] > matrix.shape[0]
    # The eigenvectors of the smaller Gram matrix are one side of the SVD, for less work.
    _, vectors = torch.linalg.eigh(matrix @ matrix.T if tall else matrix.T @ matrix)
    projected = vectors[:, -1] @ (matrix if tall else matrix.T @ matrix)
    if projected @ matrix.norm(dim=0) < 0:
        projected = -projected
    return projected.view(image.shape[1:])


def activations(
    model: nn.Module,
    x: Tensor | Sequence[Tensor],
    layer: nn.Module | str,
    *,
    level: str | None = None,
) -> Tensor:
    """What `layer` (a module or its dotted name) returns while `model` reads `x`: a copy [B,C,H,W].

    level: which map of a layer that returns several by name, such as "0" (finest) to "3" of
    torchvision's FPN. ValueError for a layer without maps, or one that does not run exactly once.

    >>> activations(nn.Sequential(nn.Conv2d(1, 3, 3)).eval(), torch.rand(2, 1, 8, 8), "0").shape
    torch.Size([2, 3, 6, 6])
    """
    module, name = base.find_layer(model, layer)
    check_model(model)
    if isinstance(x, Tensor):
        check_steady(model, x)
    seen: list[Tensor] = []

    def note(_module: nn.Module, _inputs: tuple, output: object) -> None:
        levels = output if isinstance(output, Mapping) else {None: output}
        if level not in levels:
            raise ValueError(f"{name} returns the levels {list(levels)}, not level={level!r}")
        # Cloned at once: an in-place ReLU after the layer would otherwise change what was seen.
        seen.append(base.feature_map(levels[level], name).clone())

    with module.register_forward_hook(note), torch.no_grad():
        model(x)
    if len(seen) != 1:
        raise ValueError(f"{name} ran {len(seen)} times on this input: choose one that runs once")
    return seen[0]


def energy_inside(maps: Tensor | np.ndarray, boxes: Sequence[pd.DataFrame]) -> np.ndarray:
    """Share of each map's sum inside its boxes, beside the share of the area they cover: [N,2].

    Source: the energy-based pointing game of Wang et al., arXiv 1910.01279. A flat map scores the
    area share. maps: [N,H,W] >= 0. boxes: a table per map with x1, y1, x2, y2 in its pixels;
    overlaps count once. Without a box both numbers are NaN; a map of zeros has a NaN share.

    >>> energy_inside(np.eye(4)[None], [pd.DataFrame([{"x1": 0, "y1": 0, "x2": 2, "y2": 2}])])
    array([[0.5 , 0.25]])
    """
    shares = np.full((len(boxes), 2), np.nan)
    for row, (heat, table) in enumerate(zip(base.array(maps), boxes, strict=True)):
        if len(table):
            mask, total = inside(table, heat.shape), heat.sum()
            shares[row] = heat[mask].sum() / total if total > 0 else np.nan, mask.mean()
    return shares


def inside(boxes: pd.DataFrame, shape: Sequence[int]) -> np.ndarray:
    """Mask [H,W] of the pixels whose centre lies in any of the boxes."""
    across, down = np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5
    mask = np.zeros(shape, bool)
    for x1, y1, x2, y2 in boxes[CORNERS].to_numpy(float):
        mask |= np.outer((down >= y1) & (down < y2), (across >= x1) & (across < x2))
    return mask
