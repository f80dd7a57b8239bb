"""Square attack: a search with random squares that sees only the model's answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from . import _contract as c
from ._ball import Ball, per_image

# Shares of all steps after which the squares get half the area (the paper's places of 10 000).
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    steps: int = 1000,
    restarts: int = 1,
    area: float = 0.8,
    grey: bool = False,
    mask: Tensor | None = None,
    seed: int = 0,
    ids: Sequence[int] | None = None,
) -> c.AttackResult:
    """Put +eps or -eps into random squares; keep what helps. Source: Andriushchenko et al., arXiv 1912.00049.

    L-infinity, without gradients. Starts from vertical stripes of +-eps; a square replaces the change beneath
    it, one sign per channel, and stays when the margin (best wrong logit - true logit) rises.
    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps: pixel units (k/255). steps: squares tried per restart, one
    forward pass each. area: share of the image that the first squares cover; it is halved nine times.
    grey: one sign for R=G=B. mask: bool [B,1,H,W] of the pixels that may change; every square touches it.
    Fooled images leave the batch. Draws depend on (seed, restart, id) only. `first_success_step`: 1 is the
    stripes, 1 + k the k-th square, counted over restarts.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> result = square(model, torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), eps=8 / 255, steps=5)
    >>> bool(result.linf[0] <= 8 / 255 + 1e-6), result.backwards
    (True, 0)
    """
    x, ids = c.check_inputs(model, x, y, eps=eps, grey=grey, mask=mask, ids=ids)
    if steps < 1 or restarts < 1 or not 0 < area <= 1:
        raise ValueError(
            f"steps and restarts must be >= 1 and area in (0,1], not {steps}, {restarts} and {area}"
        )
    whole = Ball(x, c.on_device(eps, x), grey=grey, mask=mask)
    ledger = c.Ledger(x, y)
    with c.frozen(model), torch.no_grad():
        c.look(model, ledger, c.margin)
        for restart in range(restarts):
            rows = ledger.standing()
            if not len(rows):
                break
            rngs = [np.random.default_rng([seed, restart, ids[i]]) for i in rows.tolist()]
            _search(model, ledger, rows, whole.of(rows), rngs, steps, area, restart * (steps + 1) + 1)
    return ledger.result(eps=eps, seed=seed)


def _search(
    model: nn.Module,
    ledger: c.Ledger,
    rows: Tensor,
    ball: Ball,
    rngs: list[np.random.Generator],
    steps: int,
    area: float,
    first: int,
) -> None:
    """One start for the images `rows`; the stripes count as step `first`."""
    channels, height, width = 1 if ball.grey else ball.x.shape[1], *ball.x.shape[2:]
    signs = np.stack([_signs(rng, (channels, 1, width)) for rng in rngs])
    players = list(zip(rngs, _free_pixels(ball), strict=True))
    best, best_value = ball.x, torch.full(rows.shape, -torch.inf, device=rows.device)
    trial = ball.project(ball.x + ball.eps * torch.from_numpy(signs).to(ball.x))
    for step in range(steps + 1):
        logits = model(trial)
        value = c.margin(logits, ledger.y[rows]).float()
        fooled = ledger.record(rows, trial, logits, value, first + step)
        better = value > best_value
        best = torch.where(per_image(better), trial, best)
        best_value = torch.where(better, value, best_value)
        if bool(fooled.all()) or step == steps:
            return
        if bool(fooled.any()):
            rows, best, best_value, ball = rows[~fooled], best[~fooled], best_value[~fooled], ball.of(~fooled)
            players = [player for player, gone in zip(players, fooled.tolist(), strict=True) if not gone]
        side = _side(area, step / steps, height, width)
        corners = np.stack([_corner(rng, side, (height, width), free) for rng, free in players])
        signs = np.stack([_signs(rng, (channels, 1, 1)) for rng, _ in players])
        trial = torch.where(
            _inside(corners, side, ball.x),
            ball.project(ball.x + ball.eps * torch.from_numpy(signs).to(ball.x)),
            best,
        )


def _signs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, 2, shape) * 2.0 - 1.0


def _side(area: float, progress: float, height: int, width: int) -> int:
    """Side of the squares after a share of the steps.

    >>> _side(0.8, 0.0, 32, 32), _side(0.8, 0.5, 32, 32), _side(0.8, 1.0, 32, 32)
    (29, 3, 1)
    """
    share = area / 2 ** sum(progress > place for place in HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def _free_pixels(ball: Ball) -> list[np.ndarray | None]:
    """Row and column of the pixels of each image's mask [n,2]; None where every pixel may change, or none."""
    if ball.mask is None:
        return [None] * len(ball.x)
    places = [np.argwhere(plane) for plane in ball.mask[:, 0].cpu().numpy()]
    return [found if len(found) else None for found in places]


def _corner(
    rng: np.random.Generator, side: int, shape: tuple[int, int], free: np.ndarray | None
) -> np.ndarray:
    """Row and column of the square's first pixel: anywhere, or such that it covers one of the free pixels."""
    room = np.array(shape) - side
    if free is None:
        return rng.integers(0, room + 1)
    pixel = free[rng.integers(len(free))]
    return np.clip(pixel - rng.integers(0, side, 2), 0, room)


def _inside(corners: np.ndarray, side: int, x: Tensor) -> Tensor:
    """Bool [n,1,H,W]: the pixels of each image's square."""
    top, left = (torch.from_numpy(part).to(x.device)[:, None] for part in corners.T)
    row, column = (torch.arange(length, device=x.device)[None] for length in x.shape[2:])
    rows, columns = (row >= top) & (row < top + side), (column >= left) & (column < left + side)
    return (rows[:, :, None] & columns[:, None, :])[:, None]
