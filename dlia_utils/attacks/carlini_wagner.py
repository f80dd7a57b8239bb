"""Carlini and Wagner's L2 attack: distance and margin minimised together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..units import check_numbers
from . import base
from .base import TINY, per_image

NO_UPPER = 1e10
CONSTANT, STEP_SIZE = 0.1, 0.01  # where the model has no gradient to take them from
DECAYS = (0.9, 0.999)  # of Adam's two averages
FLOOR = 1e-12  # of Adam's division


def carlini_wagner(
    model: nn.Module, x: Tensor, y: Tensor, *, steps: int = 200, searches: int = 6
) -> base.AttackResult:
    """The nearest fooling image in L2, by projected Adam (Carlini and Wagner, arXiv 1608.04644).

    Minimises |change|^2 + constant * max(true logit - best wrong logit, 0). The constant starts,
    per image, at twice what the linearised model needs; it goes halfway down after a success and
    ten times up (later halfway up) after a failure. Each step is cut to [0,1], as in section V.B.
    It costs (steps + 1) * searches passes an image. Nothing is drawn. Arguments: as `pgd`.

    >>> _ = torch.manual_seed(1)
    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), torch.ones(1, 1, 2, 2) / 2
    >>> bool(carlini_wagner(model, x, model(x).argmax(1), steps=50).success[0])
    True
    """
    check_numbers("[1,inf)", whole=True, steps=steps, searches=searches)
    with base.search(model, x, y, norm="l2") as search:
        search.look()
        for _, rows, _ in search.rounds(range(1)):
            weight, pace = _scales(search, rows, steps)
            lower, upper = torch.zeros_like(weight), torch.full_like(weight, NO_UPPER)
            for number in range(searches):
                fooled = _descend(search, rows, weight, pace, steps, first=number * steps)
                upper = torch.where(fooled, torch.minimum(upper, weight), upper)
                lower = torch.where(fooled, lower, torch.maximum(lower, weight))
                found = upper < NO_UPPER
                weight = torch.where(found, (lower + upper) / 2, weight * 10)
                pace = torch.where(found, pace, pace * 2)
        return search.result()


def _scales(search: base.Search, rows: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """First constant and learning rate [n] of the linearised model; else the usual ones."""
    x = search.x[rows]
    _, value, gradient = search.gradient(rows, x, 0)
    gap, rise = value.abs().to(x), base.rise(gradient, "l2")
    distance = gap / rise.clamp_min(TINY)
    usable = (rise > 0) & (gap > 0)
    pixels = x[0].numel() ** 0.5  # Adam moves every pixel by about the learning rate
    weight = torch.where(usable, 4 * distance / rise.clamp_min(TINY), CONSTANT)
    return weight, torch.where(usable, 9 * distance / steps / pixels, STEP_SIZE)


def _descend(
    search: base.Search, rows: Tensor, weight: Tensor, pace: Tensor, steps: int, first: int
) -> Tensor:
    """One search at these weights and learning rates [n]; returns who fell at some step [n]."""
    x = points = search.x[rows]
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    ever = torch.zeros_like(rows, dtype=torch.bool)

    def hinge(logits: Tensor, y: Tensor) -> Tensor:
        return weight * base.margin(logits, y).clamp(max=0)

    for step in range(1, steps + 1):
        rate = 1 - 0.9 * (step - 1) / steps
        fooled, _, gradient = search.gradient(rows, points, first + step, objective=hinge)
        ever |= fooled
        downhill = 2 * (points - x) - gradient
        mean = DECAYS[0] * mean + (1 - DECAYS[0]) * downhill
        square = DECAYS[1] * square + (1 - DECAYS[1]) * downhill.square()
        spread = (square / (1 - DECAYS[1] ** step)).sqrt() + FLOOR
        direction = (mean / (1 - DECAYS[0] ** step)) / spread
        points = (points - rate * per_image(pace) * direction).clamp(0, 1)
    return ever | search.ask(rows, points, first + steps + 1)[0]  # the last step counts, too
