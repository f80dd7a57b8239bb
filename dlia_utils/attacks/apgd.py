"""Auto-PGD: projected gradient descent with momentum that chooses its own step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from . import _contract as c
from ._ball import Ball, per_image

MOMENTUM = 0.75  # weight of the new direction against the last move
ENOUGH_RISES = 0.75  # share of rising steps between two checks below which the step size is halved


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: str = "ce",
    grey: bool = False,
    mask: Tensor | None = None,
    eot: int = 1,
    stop_when_fooled: bool = True,
    seed: int = 0,
    ids: Sequence[int] | None = None,
) -> c.AttackResult:
    """PGD whose step starts at 2 eps and halves when it stalls. Source: Croce and Hein, arXiv 2003.01690.

    At set checks an image goes back to its best point with half the step, when fewer than 3/4 of its steps
    since the last check raised the loss, or when neither its step nor its best loss changed since then.
    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps: pixel units (k/255) for "linf"; with norm "l2" the length of the
    whole change. loss: "ce", or "margin", which does not vanish on a saturated model and needs two classes
    only (the paper's DLR loss needs three). grey: one perturbation for R=G=B. mask: bool [B or 1,1,H,W]
    of the pixels that may change. stop_when_fooled, eot: as for `pgd`.
    The random start depends on (seed, restart, id) only. `first_success_step`: updates made, counted over
    restarts; a random start that fools counts as step 1.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> result = apgd(model, torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), eps=8 / 255, steps=5)
    >>> bool(result.linf[0] <= 8 / 255 + 1e-6)
    True
    """
    objective = c.choose_loss(loss)
    x, ids = c.check_inputs(model, x, y, eps=eps, norm=norm, grey=grey, mask=mask, eot=eot, ids=ids)
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be >= 1, not {steps} and {restarts}")
    whole = Ball(x, c.on_device(eps, x), norm=norm, grey=grey, mask=mask)
    ledger = c.Ledger(model, x, y, eot=eot)
    with c.frozen(model):
        ledger.look(objective)
        for restart in range(restarts):
            rows = ledger.standing() if stop_when_fooled else ledger.everyone()
            if not len(rows):
                break
            ball = whole.of(rows)
            start = ball.random([ids[i] for i in rows.tolist()], seed=seed, stream=restart)
            _climb(
                ledger,
                rows,
                ball,
                start,
                objective=objective,
                steps=steps,
                stop_when_fooled=stop_when_fooled,
                first=restart * steps,
            )
        return ledger.result(eps=eps, seed=seed)


def _checks(steps: int) -> list[int]:
    """Steps after which the step size is judged: after 22 % of them, then at ever shorter intervals.

    >>> _checks(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    places, last, place = [], 0.0, 0.22
    while place < 1:
        places.append(math.ceil(round(place * steps, 6)))
        last, place = place, place + max(place - last - 0.03, 0.06)
    return places


@dataclass
class _Climbers:
    """What every image still attacked carries along, all [n,...]."""

    rows: Tensor
    y: Tensor
    points: Tensor
    previous: Tensor
    gradient: Tensor
    value: Tensor
    best: Tensor
    best_value: Tensor
    best_gradient: Tensor
    step_size: Tensor  # in units of eps
    rises: Tensor  # since the last check
    checked_value: Tensor  # best value at the last check
    halved: Tensor  # at the last check

    def keep(self, rows: Tensor) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])

    def note_best(self) -> None:
        """Keep the current point of the images whose loss has never been higher."""
        better = self.value > self.best_value
        self.best_value = torch.where(better, self.value, self.best_value)
        self.best = torch.where(per_image(better), self.points, self.best)
        self.best_gradient = torch.where(per_image(better), self.gradient, self.best_gradient)

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


def _climb(
    ledger: c.Ledger,
    rows: Tensor,
    ball: Ball,
    start: Tensor,
    *,
    objective: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    stop_when_fooled: bool,
    first: int,
) -> None:
    """Run one start for the images `rows`; every iterate goes into the ledger."""
    ask = {"objective": objective, "eot": ledger.eot, "stop_when_fooled": stop_when_fooled}
    y = ledger.y[rows]
    wrong, value, gradient = c.gradient_at(ledger.model, start, y, **ask)
    fooled = ledger.record(rows, start, wrong, value, first + 1)
    if gradient is None:
        return
    ledger.backwards += ledger.eot * len(rows)
    n = _Climbers(
        rows=rows,
        y=y,
        points=start,
        previous=start,
        gradient=gradient,
        value=value,
        best=start,
        best_value=value,
        best_gradient=gradient,
        step_size=torch.full_like(value, 2.0),
        rises=torch.zeros_like(rows),
        checked_value=value,
        halved=torch.zeros_like(fooled),
    )
    checks, last_check = _checks(steps), 0
    for step in range(1, steps + 1):
        if stop_when_fooled and bool(fooled.any()):
            n.keep(~fooled)
            ball = ball.of(~fooled)
            if not len(n.rows):
                return
        moved = ball.project(n.points + per_image(n.step_size) * ball.eps * ball.ascent(n.gradient))
        if step > 1:
            push = MOMENTUM * (moved - n.points) + (1 - MOMENTUM) * (n.points - n.previous)
            moved = ball.project(n.points + push)
        n.previous, n.points = n.points, moved
        if step == steps:  # nothing follows that would need the gradient
            ledger.ask(n.rows, moved, objective, first + step)
            return
        wrong, value, n.gradient = c.gradient_at(ledger.model, moved, n.y, **ask)
        fooled = ledger.record(n.rows, moved, wrong, value, first + step)
        if n.gradient is None:
            return
        ledger.backwards += ledger.eot * len(n.rows)
        n.rises += value > n.value
        n.value = value
        n.note_best()
        if step in checks:
            n.judge(step - last_check)
            last_check = step
