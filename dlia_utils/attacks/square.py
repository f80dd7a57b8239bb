"""Square attack: a search with random squares that sees only the model's answers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from . import _contract as c
from ._ball import TINY, Ball, free_pixels, per_image

Player = tuple[
    np.random.Generator, np.ndarray | None
]  # an image's draws and the pixels that may change

SMALLEST = 3  # side of a square that still holds a pair of bumps
# Shares of all steps after which the squares get half the area (the paper's places of 10 000).
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 1000,
    restarts: int = 1,
    area: float = 0.8,
    grey: bool = False,
    mask: Tensor | None = None,
    eot: int = 1,
    seed: int = 0,
    ids: Sequence[int] | None = None,
) -> c.AttackResult:
    """Change random squares and keep what helps. Source: Andriushchenko et al., arXiv 1912.00049.

    Without gradients; a change stays when the margin (best wrong logit - true logit) rises. Norm "linf"
    starts from vertical stripes of +-eps, and a square replaces the change beneath it by +eps or -eps, one
    sign per channel. Norm "l2" starts from a grid of bumps, and a square takes over the budget of a second
    one, which is cleared, and what is unused; it gets a pair of bumps of opposite sign added to its own change.
    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps: pixel units (k/255); with "l2" the length of the whole change.
    steps: squares tried per restart, one forward pass each. area: share of the image that the first squares
    cover; it is halved nine times. grey: one change for R=G=B. mask: bool [B or 1,1,H,W] of the pixels that
    may change; every square touches it.
    eot: passes averaged per look at a model that is random in eval mode (arXiv 1802.00420); success then
    means that most of eot fresh passes of x_adv are wrong.
    Fooled images leave the batch. Draws depend on (seed, restart, id) only. `first_success_step`: 1 is the
    start, 1 + k the k-th square, counted over restarts.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> result = square(model, torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), eps=8 / 255, steps=5)
    >>> bool(result.linf[0] <= 8 / 255 + 1e-6), result.backwards
    (True, 0)
    """
    x, ids = c.check_inputs(model, x, y, eps=eps, norm=norm, grey=grey, mask=mask, eot=eot, ids=ids)
    if steps < 1 or restarts < 1 or not 0 < area <= 1:
        raise ValueError(
            f"steps and restarts must be >= 1 and area in (0,1], not {steps}, {restarts} and {area}"
        )
    whole = Ball(x, c.on_device(eps, x), norm=norm, grey=grey, mask=mask)
    ledger = c.Ledger(model, x, y, eot=eot)
    with c.frozen(model):
        ledger.look(c.margin)
        for restart in range(restarts):
            rows = ledger.standing()
            if not len(rows):
                break
            rngs = [np.random.default_rng([seed, restart, ids[i]]) for i in rows.tolist()]
            _search(ledger, rows, whole.of(rows), rngs, steps, area, restart * (steps + 1) + 1)
        return ledger.result(eps=eps, seed=seed)


def _search(
    ledger: c.Ledger,
    rows: Tensor,
    ball: Ball,
    rngs: list[np.random.Generator],
    steps: int,
    area: float,
    first: int,
) -> None:
    """One start for the images `rows`, which counts as step `first`."""
    begin, move = (_stripes, _square) if ball.norm == "linf" else (_grid, _bumps)
    players = list(zip(rngs, free_pixels(ball), strict=True))
    best, best_value = ball.x, torch.full(rows.shape, -torch.inf, device=rows.device)
    trial = begin(ball, rngs)
    for step in range(steps + 1):
        fooled, value = ledger.ask(rows, trial, c.margin, first + step)
        value = value.float()
        better = value > best_value
        best = torch.where(per_image(better), trial, best)
        best_value = torch.where(better, value, best_value)
        if bool(fooled.all()) or step == steps:
            return
        if bool(fooled.any()):
            rows, best, best_value, ball = (
                rows[~fooled],
                best[~fooled],
                best_value[~fooled],
                ball.of(~fooled),
            )
            players = [
                player for player, gone in zip(players, fooled.tolist(), strict=True) if not gone
            ]
        trial = move(ball, best, players, _side(area, step / steps, *ball.x.shape[2:]))


# ------------------------------------------------------------------------------------------- L-infinity


def _stripes(ball: Ball, rngs: list[np.random.Generator]) -> Tensor:
    signs = np.stack([_signs(rng, (_planes(ball), 1, ball.x.shape[3])) for rng in rngs])
    return ball.at(torch.from_numpy(signs).to(ball.x))


def _square(ball: Ball, best: Tensor, players: list[Player], side: int) -> Tensor:
    """A square of +eps or -eps takes the place of what lies beneath it; one that changes nothing is turned round."""
    corners = np.stack([_corner(rng, side, ball.x.shape[2:], free) for rng, free in players])
    signs = np.stack([_signs(rng, (_planes(ball), 1, 1)) for rng, _ in players])
    signs, inside = torch.from_numpy(signs).to(ball.x), _inside(corners, side, ball.x)
    trial = torch.where(inside, ball.at(signs), best)
    idle = per_image((trial == best).flatten(1).all(1))
    return torch.where(idle & inside, ball.at(-signs), trial)


# ------------------------------------------------------------------------------------------- L2


def _grid(ball: Ball, rngs: list[np.random.Generator]) -> Tensor:
    """Bumps of random sign and orientation in a grid of about 5 x 5 tiles, together of the length eps."""
    shape = ball.x.shape[2:]
    tile = min(max(min(shape) // 5, SMALLEST), *shape)
    tops, lefts = (
        [start + (n % tile) // 2 for start in range(0, n - tile + 1, tile)] for n in shape
    )
    start = np.zeros((len(rngs), _planes(ball), *shape))
    for plane, rng in zip(start, rngs, strict=True):
        for top in tops:
            for left in lefts:
                tile_of = plane[:, top : top + tile, left : left + tile]
                tile_of[:] = _pair(rng, tile) * _signs(rng, (len(plane), 1, 1))
    return ball.at(torch.from_numpy(start).to(ball.x))


def _bumps(ball: Ball, best: Tensor, players: list[Player], side: int) -> Tensor:
    """One window is cleared; another gets bumps and the length that both windows had, and what is unused."""
    planes, shape = _planes(ball), ball.x.shape[2:]
    side = min(max(side, SMALLEST) | 1, (min(shape) - 1) | 1)  # odd: a bump then has a middle
    corners = np.stack(
        [[_corner(rng, side, shape, free) for _ in range(2)] for rng, free in players]
    )
    draw = np.zeros((len(players), planes, *shape), dtype=np.float32)
    for plane, (rng, _), ((top, left), _) in zip(draw, players, corners, strict=True):
        plane[:, top : top + side, left : left + side] = _pair(rng, side) * _signs(
            rng, (planes, 1, 1)
        )
    target, cleared = (_inside(corners[:, k], side, ball.x) for k in range(2))
    change = (best - ball.x)[
        :, :planes
    ]  # grey: one plane stands for all, with its share of the length
    radius = ball.eps / math.sqrt(ball.x.shape[1] / planes)
    unused = (radius**2 - change.square().sum((1, 2, 3), keepdim=True)).clamp(min=0)
    new = _unit(torch.from_numpy(draw).to(ball.x)) + _unit(change * target)
    new = _unit(new if ball.mask is None else new * ball.mask)
    both = target | cleared
    length = ((change * both).square().sum((2, 3), keepdim=True) + unused / planes).sqrt()
    return ball.project(ball.x + torch.where(both, 0, change) + length * new)


def _unit(planes: Tensor) -> Tensor:
    """Each plane [n,C,H,W] at length 1; zero stays zero."""
    return planes / planes.square().sum((2, 3), keepdim=True).sqrt().clamp_min(TINY)


def _pair(rng: np.random.Generator, side: int) -> np.ndarray:
    """Two bumps of opposite sign beside each other, or on top of each other: [side,side]."""
    return _two_bumps(side) if rng.random() < 0.5 else _two_bumps(side).T


@functools.cache
def _two_bumps(side: int) -> np.ndarray:
    half = side // 2
    return np.concatenate([_bump(side, half), -_bump(side, side - half)], axis=1)


def _bump(height: int, width: int) -> np.ndarray:
    """Steep towards the middle: at ring m from the border the sum of 1 / (n + 1 - k)^2 over k <= m, n = height // 2.

    >>> _bump(3, 3).round(2).tolist()
    [[0.25, 0.25, 0.25], [0.25, 1.25, 0.25], [0.25, 0.25, 0.25]]
    """
    n = height // 2
    levels = np.cumsum(1.0 / (n + 1 - np.arange(n + 1)) ** 2)
    row, column = np.ogrid[:height, :width]
    return levels[n - np.maximum(abs(row - n), abs(column - width // 2))]


# ------------------------------------------------------------------------------------------- draws


def _planes(ball: Ball) -> int:
    """Planes that are drawn independently."""
    return 1 if ball.grey else ball.x.shape[1]


def _signs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(0, 2, shape) * 2.0 - 1.0


def _side(area: float, progress: float, height: int, width: int) -> int:
    """Side of the squares after a share of the steps.

    >>> _side(0.8, 0.0, 32, 32), _side(0.8, 0.5, 32, 32), _side(0.8, 1.0, 32, 32)
    (29, 3, 1)
    """
    share = area / 2 ** sum(progress > place for place in HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


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
