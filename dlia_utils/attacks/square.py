"""Square attack in the L-infinity ball: random squares, judged by the model's answers alone."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ..units import check_numbers
from . import base
from .base import per_image

AREA = 0.8  # share of the image that the first squares cover
# Shares of all steps after which the squares get half the area (the paper's places of 10 000).
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int = 1000,
    restarts: int = 1,
    seed: base.Seed = 0,
) -> base.AttackResult:
    """Change random squares and keep what helps (Andriushchenko et al., arXiv 1912.00049).

    Without gradients; a change stays when the margin rises. It starts from stripes of +-eps; a
    square replaces the change beneath it by +eps or -eps, one sign per channel. steps: squares per
    restart, one forward pass each. Fooled images leave. `first_success_step`: 1 is the start, 1 + k
    the k-th square, over all restarts. Arguments: as `pgd`.

    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), torch.rand(1, 1, 2, 2)
    >>> square(model, x, torch.tensor([0]), eps=8 / 255, steps=5).backwards
    0
    """
    check_numbers("[1,inf)", whole=True, steps=steps, restarts=restarts)
    with base.search(model, x, y, eps=eps, seed=seed) as search:
        search.look()
        for restart, rows, rngs in search.rounds(range(restarts)):
            _run(search, rows, rngs, steps, restart * (steps + 1) + 1)
        return search.result()


def _run(search: base.Search, rows: Tensor, rngs: list, steps: int, first: int) -> None:
    """One start for the images `rows`, which counts as step `first`."""
    x, (channels, _, width) = search.x[rows], search.x.shape[1:]
    best, best_value = x, torch.full(rows.shape, -torch.inf, device=rows.device)
    trial = search.reach(_signs(rngs, (channels, 1, width), x), x)
    for step in range(steps + 1):
        fooled, value = search.ask(rows, trial, first + step)
        better = value.float() > best_value
        best = torch.where(per_image(better), trial, best)
        best_value = torch.where(better, value.float(), best_value)
        if bool(fooled.all()) or step == steps:
            return
        if bool(fooled.any()):
            kept = ~fooled
            rows, x, best, best_value = rows[kept], x[kept], best[kept], best_value[kept]
            rngs = [rng for rng, stays in zip(rngs, kept.tolist(), strict=True) if stays]
        trial = _square(search, x, best, rngs, _side(step / steps, *x.shape[2:]))


def _square(search: base.Search, x: Tensor, best: Tensor, rngs: list, side: int) -> Tensor:
    """A square of +eps or -eps replaces what lies beneath; one that changes nothing is turned."""
    corners = np.stack([rng.integers(0, np.array(x.shape[2:]) - side + 1) for rng in rngs])
    signs = _signs(rngs, (x.shape[1], 1, 1), x)
    top, left = (torch.from_numpy(part).to(x.device)[:, None] for part in corners.T)
    row, column = (torch.arange(length, device=x.device)[None] for length in x.shape[2:])
    rows, columns = (row >= top) & (row < top + side), (column >= left) & (column < left + side)
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    trial = torch.where(inside, search.reach(signs, x), best)
    idle = per_image((trial == best).flatten(1).all(1))
    return torch.where(idle & inside, search.reach(-signs, x), trial)


def _signs(rngs: list, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """Random -1 and 1, [n, *shape]."""
    return torch.from_numpy(np.stack([rng.integers(0, 2, shape) * 2.0 - 1.0 for rng in rngs])).to(x)


def _side(progress: float, height: int, width: int) -> int:
    """Side of the squares after a share of the steps.

    >>> _side(0.0, 32, 32), _side(0.5, 32, 32), _side(1.0, 32, 32)
    (29, 3, 1)
    """
    share = AREA / 2 ** sum(progress > place for place in HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)
