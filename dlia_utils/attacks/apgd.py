"""Auto-PGD: projected gradient descent with momentum that chooses its own step size."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..units import check_numbers
from . import base
from .base import per_image

MOMENTUM = 0.75  # weight of the new direction against the last move
ENOUGH_RISES = 0.75  # share of rising steps between two checks below which the step size is halved


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: str = "ce",
    stop_when_fooled: bool = True,
    seed: base.Seed = 0,
) -> base.AttackResult:
    """PGD whose step starts at 2 eps and halves when it stalls (Croce and Hein, arXiv 2003.01690).

    At set checks an image goes back to its best point with half the step, when fewer than 3/4 of
    its steps since the last check raised the loss, or neither its step nor its best loss changed.
    The margin loss needs two classes only (the paper's DLR needs three). Arguments: as `pgd`.

    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), torch.rand(1, 1, 2, 2)
    >>> bool(apgd(model, x, torch.tensor([0]), eps=0.1, steps=5).linf[0] <= 0.1 + 1e-6)
    True
    """
    check_numbers("[1,inf)", whole=True, steps=steps, restarts=restarts)
    with base.search(model, x, y, eps=eps, norm=norm, loss=loss, seed=seed) as search:
        search.look()
        for restart, rows, rngs in search.rounds(range(restarts), everyone=not stop_when_fooled):
            start = search.reach(base.uniform(search.x[rows], rngs), search.x[rows])
            _climb(search, rows, start, restart * steps, steps, stop_when_fooled)
        return search.result()


def _climb(
    search: base.Search, rows: Tensor, points: Tensor, first: int, steps: int, stop: bool
) -> None:
    """One start for the images `rows`; every point, also the last, is judged."""
    x, eps, norm, checks, last = search.x[rows], search.eps, search.norm, _checks(steps), 0
    # What every image still attacked carries along, all [n,...].
    n = SimpleNamespace(rows=rows, x=x, points=points, best=points, best_gradient=points)
    n.value = torch.full_like(x[:, 0, 0, 0], torch.inf)
    n.best_value = n.checked = -n.value  # checked: best at the last check
    n.step_size = torch.full_like(n.value, 2.0)  # in units of eps
    n.rises = torch.zeros_like(rows)  # since the last check
    n.halved = torch.zeros_like(rows, dtype=torch.bool)  # at the last check
    for step in range(steps):
        fooled, value, gradient = search.gradient(n.rows, points, first + max(step, 1), lazy=stop)
        if gradient is None:
            return
        n.rises = n.rises + (value > n.value)
        n.previous, n.points, n.value, n.gradient = n.points, points, value, gradient
        better = value > n.best_value
        n.best_value = torch.where(better, value, n.best_value)
        n.best = torch.where(per_image(better), points, n.best)
        n.best_gradient = torch.where(per_image(better), gradient, n.best_gradient)
        if step in checks:  # images that stall go back to their best point with half the step
            stalled = n.rises < ENOUGH_RISES * (step - last)
            stalled |= ~n.halved & (n.checked >= n.best_value)
            n.step_size = torch.where(stalled, n.step_size / 2, n.step_size)
            n.points = torch.where(per_image(stalled), n.best, n.points)
            n.value = torch.where(stalled, n.best_value, n.value)
            n.gradient = torch.where(per_image(stalled), n.best_gradient, n.gradient)
            n.halved, n.checked, n.rises, last = stalled, n.best_value, n.rises * 0, step
        if stop and bool(fooled.any()):
            n = SimpleNamespace(**{name: values[~fooled] for name, values in vars(n).items()})
        move = per_image(n.step_size) * eps * base.ascent(n.gradient, norm)
        points = base.project(n.points + move, n.x, eps, norm)
        if step:  # along the last move as well
            move = MOMENTUM * (points - n.points) + (1 - MOMENTUM) * (n.points - n.previous)
            points = base.project(n.points + move, n.x, eps, norm)
    search.ask(n.rows, points, first + steps)


def _checks(steps: int) -> list[int]:
    """Steps after which the step size is judged: 0, 22 % of them, then at shorter intervals.

    >>> _checks(100)
    [0, 22, 41, 57, 70, 80, 87, 93, 99]
    """
    places, last, place = [0], 0.0, 0.22
    while place < 1:
        places.append(math.ceil(round(place * steps, 6)))
        last, place = place, place + max(place - last - 0.03, 0.06)
    return places
