"""Carlini and Wagner's L2 attack: distance and margin minimised together, their balance searched."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _contract as c
from ._ball import TINY, Ball, look_smallest, per_image, record_smallest, size, smallest_result

NO_UPPER = 1e10
CONSTANT, STEP_SIZE = 0.1, 0.01  # where the model has no gradient to take them from
DECAYS = (0.9, 0.999)  # of Adam's two averages
FLOOR = 1e-12  # of Adam's division


def carlini_wagner(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | None = None,
    steps: int = 200,
    searches: int = 6,
    constant: float | None = None,
    step_size: float | None = None,
    grey: bool = False,
    mask: Tensor | None = None,
    eot: int = 1,
) -> c.AttackResult:
    """The nearest fooling image in L2, by projected Adam. Source: Carlini and Wagner, arXiv 1608.04644.

    Minimises |change|^2 + constant * max(true logit - best wrong logit, 0). The constant is searched per
    image: halfway down after a success, ten times up (later halfway up) after a failure, and until the first
    success each search takes steps twice as long as the last one. Each step is cut to [0,1], as in the paper's
    section V.B; its tanh variables hardly move in the black borders of radiographs.
    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps: None, or the L2 budget in pixel units: a longer change is cut
    to it and judged once more, and an image that it fools no longer is returned unchanged. steps: of Adam
    per search. step_size: its learning rate (change of a pixel per step), which falls to a tenth during a
    search; None: per image, so that about five times the distance to the boundary of the linearised model is
    walked: a fixed one such as 0.01 is too coarse for a model that falls to less. constant: the first one;
    None: per image, twice what the linearised model needs. grey: one perturbation for R=G=B. mask: bool
    [B or 1,1,H,W] of the pixels that may change.
    eot: passes averaged per look at a model that is random in eval mode (arXiv 1802.00420); success then
    means that most of eot fresh passes of x_adv are wrong.
    It costs (steps + 1) * searches passes for every image that the model gets right (the paper: 1000 * 9).
    Nothing is random.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> _ = torch.manual_seed(1)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x = torch.full((1, 1, 2, 2), 0.5)
    >>> bool(carlini_wagner(model, x, model(x).argmax(1), steps=50).success[0])
    True
    """
    x, _ = c.check_inputs(model, x, y, eps=eps, norm="l2", grey=grey, mask=mask, eot=eot)
    given = [value for value in (constant, step_size) if value is not None]
    if steps < 1 or searches < 1 or not all(value > 0 for value in given):
        raise ValueError(
            f"steps and searches must be >= 1, constant and step_size > 0, not {steps}, {searches}, "
            f"{constant} and {step_size}"
        )
    whole = Ball(x, None, norm="l2", grey=grey, mask=mask)
    ledger = c.Ledger(model, x, y, eot=eot)
    with c.frozen(model):
        look_smallest(ledger, norm="l2")
        rows = ledger.standing()
        if len(rows):
            _search(ledger, rows, whole.of(rows), steps, searches, constant, step_size)
        return smallest_result(ledger, eps=eps, norm="l2")


def _search(
    ledger: c.Ledger,
    rows: Tensor,
    ball: Ball,
    steps: int,
    searches: int,
    constant: float | None,
    step_size: float | None,
) -> None:
    """Search the balance for the images `rows`; every point goes into the ledger, which keeps the nearest."""
    weight, pace = _scales(ledger, rows, ball, steps)
    weight = weight if constant is None else torch.full_like(weight, constant)
    pace = pace if step_size is None else torch.full_like(pace, step_size)
    lower, upper = torch.zeros_like(weight), torch.full_like(weight, NO_UPPER)
    for search in range(searches):
        fooled = _descend(ledger, rows, ball, weight, pace, steps, first=search * steps)
        upper = torch.where(fooled, torch.minimum(upper, weight), upper)
        lower = torch.where(fooled, lower, torch.maximum(lower, weight))
        found = upper < NO_UPPER
        weight = torch.where(found, (lower + upper) / 2, weight * 10)
        if step_size is None:
            pace = torch.where(found, pace, pace * 2)


def _scales(ledger: c.Ledger, rows: Tensor, ball: Ball, steps: int) -> tuple[Tensor, Tensor]:
    """First constant and learning rate [n] from the linearised model; without a gradient the usual ones."""
    _, value, gradient = c.gradient_at(
        ledger.model, ball.x, ledger.y[rows], c.margin, eot=ledger.eot
    )
    ledger.queries[rows] += ledger.eot
    ledger.backwards += ledger.eot * len(rows)
    gap, rise = value.abs().to(ball.x), size(ball.allowed(gradient), "l2")
    distance = gap / rise.clamp_min(TINY)
    usable = (rise > 0) & (gap > 0)
    free = torch.ones_like(ball.x) if ball.mask is None else ball.mask.expand_as(ball.x).to(ball.x)
    pixels = (
        free.flatten(1).sum(1).clamp_min(1).sqrt()
    )  # Adam moves every free pixel by about the learning rate
    weight = torch.where(usable, 4 * distance / rise.clamp_min(TINY), CONSTANT)
    return weight, torch.where(usable, 9 * distance / steps / pixels, STEP_SIZE)


def _descend(
    ledger: c.Ledger, rows: Tensor, ball: Ball, weight: Tensor, pace: Tensor, steps: int, first: int
) -> Tensor:
    """One search at the weights [n] with Adam at the learning rates [n]; returns who fell at some step [n]."""
    y, mean, square = ledger.y[rows], torch.zeros_like(ball.x), torch.zeros_like(ball.x)
    points, ever = ball.x, torch.zeros_like(y, dtype=torch.bool)
    for step in range(1, steps + 1):
        rate = 1 - 0.9 * (step - 1) / steps
        wrong, _, gradient = c.gradient_at(
            ledger.model,
            points,
            y,
            lambda logits, y: weight * c.margin(logits, y).clamp(max=0),
            eot=ledger.eot,
        )
        ledger.backwards += ledger.eot * len(rows)
        ever |= record_smallest(ledger, rows, points, wrong, norm="l2", step=first + step)
        downhill = 2 * (points - ball.x) - ball.allowed(gradient)
        mean = DECAYS[0] * mean + (1 - DECAYS[0]) * downhill
        square = DECAYS[1] * square + (1 - DECAYS[1]) * downhill.square()
        direction = (mean / (1 - DECAYS[0] ** step)) / (
            (square / (1 - DECAYS[1] ** step)).sqrt() + FLOOR
        )
        points = ball.project(points - rate * per_image(pace) * direction)
    wrong, _ = c.answer(
        ledger.model, points, y, c.margin, eot=ledger.eot
    )  # the last step counts, too
    return ever | record_smallest(ledger, rows, points, wrong, norm="l2", step=first + steps + 1)
