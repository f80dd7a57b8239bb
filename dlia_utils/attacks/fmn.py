"""Fast minimum-norm attack: a ball that shrinks while the model is fooled and grows otherwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..units import check_numbers
from . import base
from .base import TINY, per_image

BEYOND = 1.02  # aims a little past the boundary: exactly on it rounding decides
GAMMA, GAMMA_LAST = 0.05, 3e-3  # shares by which the radius changes at first and, by a cosine, last
STEP_SIZE = 1.0  # L2 length of the first step in pixel units; decays to a hundredth


def fmn(
    model: nn.Module, x: Tensor, y: Tensor, *, norm: str = "linf", steps: int = 100
) -> base.AttackResult:
    """The smallest change, by a ball that finds its own radius (Pintor et al., arXiv 2102.12827).

    A step along the margin's gradient, then a projection on the ball, whose radius falls after a
    fooling point and otherwise rises; before the first one it is the distance by linear estimate.
    One run gives the robust accuracy at every eps: the share of images with a larger `linf` (or
    `l2`), or not fooled. Nothing is drawn. Arguments: as `pgd`.

    >>> _ = torch.manual_seed(1)
    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), torch.ones(1, 1, 2, 2) / 2
    >>> bool(fmn(model, x, model(x).argmax(1)).success[0])
    True
    """
    check_numbers("[1,inf)", whole=True, steps=steps)
    with base.search(model, x, y, norm=norm) as search:
        search.look()
        for _, rows, _ in search.rounds(range(1)):
            _run(search, rows, steps, norm)
        return search.result()


def _run(search: base.Search, rows: Tensor, steps: int, norm: str) -> None:
    """All steps for the images `rows`; the search keeps the nearest point that fools."""
    x = points = search.x[rows]
    radius = torch.full_like(x[:, 0, 0, 0], torch.inf)
    for step in range(steps):
        fooled, value, gradient = search.gradient(rows, points, step)
        decay = (1 + math.cos(math.pi * step / steps)) / 2
        ever, smallest = search.fooled[rows], -search.value[rows].to(x)
        rise, length = base.rise(gradient, norm), base.size(points - x, norm)
        estimate = length + BEYOND * value.abs() / rise.clamp_min(TINY)
        estimate = torch.where(rise > 0, estimate, torch.inf)
        gamma = GAMMA_LAST + (GAMMA - GAMMA_LAST) * decay
        shrunk = torch.minimum(radius * (1 - gamma), smallest)
        grown = torch.where(ever, radius * (1 + gamma), estimate)
        radius = torch.where(fooled, shrunk, grown)
        # The step size falls to a hundredth: at nothing the last steps would be lost.
        step_size = STEP_SIZE * (0.01 + 0.99 * decay)
        points = points + step_size * base.ascent(gradient, "l2")
        points = base.project(points, x, per_image(radius), norm)
    search.ask(rows, points, steps)
