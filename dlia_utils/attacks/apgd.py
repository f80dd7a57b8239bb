"""Auto-PGD: projected gradient descent with momentum that chooses its own step size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

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

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> result = apgd(model, torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), eps=8 / 255, steps=5)
    >>> bool(result.linf[0] <= 8 / 255 + 1e-6)
    True
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be >= 1, not {steps} and {restarts}")
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
    n, checks, last = _Climbers(rows, search.x[rows], points), _checks(steps), 0
    for step in range(steps):
        count = first + max(step, 1)
        fooled, value, gradient = search.gradient(n.rows, points, count, lazy=stop)
        if gradient is None:
            return
        n.arrive(points, value, gradient)
        if step in checks:
            n.judge(step - last)
            last = step
        if stop and bool(fooled.any()):
            n.keep(~fooled)
        points = n.next(search.eps, search.norm, push=step > 0)
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


class _Climbers:
    """What every image still attacked carries along, all [n,...]."""

    def __init__(self, rows: Tensor, x: Tensor, start: Tensor) -> None:
        self.rows, self.x, self.points, self.previous, self.best = rows, x, start, start, start
        self.gradient = self.best_gradient = start
        self.value = torch.full_like(x[:, 0, 0, 0], torch.inf)
        self.best_value = self.checked_value = -self.value  # checked: best at the last check
        self.step_size = torch.full_like(self.value, 2.0)  # in units of eps
        self.rises = torch.zeros_like(rows)  # since the last check
        self.halved = torch.zeros_like(rows, dtype=torch.bool)  # at the last check

    def keep(self, rows: Tensor) -> None:
        for name, values in vars(self).items():
            setattr(self, name, values[rows])

    def next(self, eps: float, norm: str, *, push: bool) -> Tensor:
        """The next points, along the gradient and, with push, along the last move."""
        move = per_image(self.step_size) * eps * base.ascent(self.gradient, norm)
        moved = base.project(self.points + move, self.x, eps, norm)
        if not push:
            return moved
        move = MOMENTUM * (moved - self.points) + (1 - MOMENTUM) * (self.points - self.previous)
        return base.project(self.points + move, self.x, eps, norm)

    def arrive(self, points: Tensor, value: Tensor, gradient: Tensor) -> None:
        """Go there, and keep the point where the loss has never been higher."""
        self.rises = self.rises + (value > self.value)
        self.previous, self.points, self.value, self.gradient = self.points, points, value, gradient
        better = value > self.best_value
        self.best_value = torch.where(better, value, self.best_value)
        self.best = torch.where(per_image(better), points, self.best)
        self.best_gradient = torch.where(per_image(better), gradient, self.best_gradient)

    def judge(self, interval: int) -> None:
        """Halve the step of the images that stall and send them back to their best point."""
        stalled = self.rises < ENOUGH_RISES * interval
        stalled |= ~self.halved & (self.checked_value >= self.best_value)
        self.step_size = torch.where(stalled, self.step_size / 2, self.step_size)
        self.points = torch.where(per_image(stalled), self.best, self.points)
        self.value = torch.where(stalled, self.best_value, self.value)
        self.gradient = torch.where(per_image(stalled), self.best_gradient, self.gradient)
        self.halved, self.checked_value = stalled, self.best_value
        self.rises = torch.zeros_like(self.rises)
