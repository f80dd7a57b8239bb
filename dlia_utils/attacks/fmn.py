"""Fast minimum-norm attack: a ball that shrinks while the model is fooled and grows while it is not."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import _contract as c
from ._ball import (
    TINY,
    Ball,
    dual_size,
    look_smallest,
    per_image,
    record_smallest,
    size,
    smallest_result,
)

BEYOND = 1.02  # aims a little past the boundary: exactly on it rounding decides, at every step anew


def fmn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | None = None,
    norm: str = "linf",
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    grey: bool = False,
    mask: Tensor | None = None,
    eot: int = 1,
) -> c.AttackResult:
    """The smallest change, by a ball that finds its own radius. Source: Pintor et al., arXiv 2102.12827.

    A step along the margin's gradient, then a projection on the ball, whose radius falls by the share gamma
    after a fooling point and otherwise rises by it; before the first fooling point it is the linear
    estimate of the distance to the boundary. gamma decays to nothing along a cosine, step_size (L2 length in
    pixel units) to a hundredth.
    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps: None, or the budget in pixel units of the norm: a longer
    change is cut to it and judged once more, and an image that it fools no longer is returned unchanged.
    norm: "linf" or "l2". grey: one perturbation for R=G=B.
    mask: bool [B or 1,1,H,W] of the pixels that may change.
    eot: passes averaged per look at a model that is random in eval mode (arXiv 1802.00420); success then
    means that most of eot fresh passes of x_adv are wrong.
    All steps are run for every image that the model gets right. One run gives the robust accuracy at every
    eps: the share of images with a larger `linf` (or `l2`), or not fooled. Nothing is random.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> _ = torch.manual_seed(1)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x = torch.full((1, 1, 2, 2), 0.5)
    >>> bool(fmn(model, x, model(x).argmax(1)).success[0])
    True
    """
    x, _ = c.check_inputs(model, x, y, eps=eps, norm=norm, grey=grey, mask=mask, eot=eot)
    if steps < 1 or not step_size > 0 or not 0 < gamma < 1:
        raise ValueError(
            f"steps must be >= 1, step_size > 0 and gamma in (0,1), not {steps}, {step_size} and {gamma}"
        )
    ledger = c.Ledger(model, x, y, eot=eot)
    with c.frozen(model):
        look_smallest(ledger, norm=norm)
        rows = ledger.standing()
        if len(rows):
            ball = Ball(x, None, norm=norm, grey=grey, mask=mask).of(rows)
            _search(ledger, rows, ball, steps, step_size, gamma)
        return smallest_result(ledger, eps=eps, norm=norm)


def _search(
    ledger: c.Ledger, rows: Tensor, ball: Ball, steps: int, step_size: float, gamma: float
) -> None:
    """Search for the images `rows`; every point goes into the ledger, which keeps the smallest that fools."""
    y, points = ledger.y[rows], ball.x
    radius = torch.full_like(ledger.value[rows], torch.inf).to(ball.x)
    for step in range(steps):
        wrong, value, gradient = c.gradient_at(ledger.model, points, y, c.margin, eot=ledger.eot)
        ledger.backwards += ledger.eot * len(rows)
        if step:  # the first point is the clean image, which is on record
            fooled = record_smallest(ledger, rows, points, wrong, norm=ball.norm, step=step)
        else:
            ledger.queries[rows] += ledger.eot
            fooled = torch.zeros_like(y, dtype=torch.bool)
        gradient = ball.allowed(gradient)
        decay = (1 + math.cos(math.pi * step / steps)) / 2
        length = size(points - ball.x, ball.norm)
        ever, smallest = ledger.fooled[rows], -ledger.value[rows].to(ball.x)
        rise = dual_size(gradient, ball.norm)
        estimate = torch.where(
            rise > 0, length + BEYOND * value.abs() / rise.clamp_min(TINY), torch.inf
        )
        shrunk = torch.minimum(radius * (1 - gamma * decay), smallest)
        grown = torch.where(ever, radius * (1 + gamma * decay), estimate)
        radius = torch.where(fooled, shrunk, grown)
        ascent = gradient / per_image(size(gradient, "l2").clamp_min(TINY))
        # The step size falls to a hundredth, at nothing the last steps would be lost.
        points = points + step_size * (0.01 + 0.99 * decay) * ascent
        points = ball.project(points, radius)
    wrong, _ = c.answer(ledger.model, points, y, c.margin, eot=ledger.eot)
    record_smallest(ledger, rows, points, wrong, norm=ball.norm, step=steps)
