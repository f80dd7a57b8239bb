"""Carlini and Wagner's L2 attack: distance and margin minimised together, their balance searched."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _contract as c
from ._ball import Ball, record_smallest, smallest_result

NO_UPPER = 1e10


def carlini_wagner(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | None = None,
    steps: int = 200,
    searches: int = 6,
    constant: float = 0.1,
    step_size: float = 0.01,
    grey: bool = False,
    mask: Tensor | None = None,
) -> c.AttackResult:
    """The nearest fooling image in L2, by projected Adam. Source: Carlini and Wagner, arXiv 1608.04644.

    Minimises |change|^2 + constant * max(true logit - best wrong logit, 0). The constant is searched per
    image: halfway down after a success, ten times up (later halfway up) after a failure. Each step is cut to
    [0,1], as in the paper's section V.B; its tanh variables hardly move in the black borders of radiographs.
    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps: None, or the L2 budget in pixel units: an image that needs more
    is returned unchanged and not fooled. steps: of Adam per search, with step_size as its learning rate;
    constant: the first one. grey: one perturbation for R=G=B. mask: bool [B,1,H,W] of the pixels that may
    change. It costs steps * searches passes for every image that the model gets right (the paper: 1000 * 9).
    Nothing is random.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> _ = torch.manual_seed(1)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x = torch.full((1, 1, 2, 2), 0.5)
    >>> bool(carlini_wagner(model, x, model(x).argmax(1), steps=50).success[0])
    True
    """
    x, _ = c.check_inputs(model, x, y, eps=eps, norm="l2", grey=grey, mask=mask)
    if steps < 1 or searches < 1 or not constant > 0 or not step_size > 0:
        raise ValueError(
            f"steps and searches must be >= 1, constant and step_size > 0, not {steps}, {searches}, "
            f"{constant} and {step_size}"
        )
    whole = Ball(x, None, norm="l2", grey=grey, mask=mask)
    ledger = c.Ledger(x, y)
    with c.frozen(model):
        with torch.no_grad():
            logits = c.check_logits(model(x), y)
            record_smallest(ledger, ledger.everyone(), x, logits, norm="l2", step=0)
        rows = ledger.standing()
        weight = torch.full(rows.shape, float(constant), dtype=x.dtype, device=x.device)
        lower, upper = torch.zeros_like(weight), torch.full_like(weight, NO_UPPER)
        for search in range(searches if len(rows) else 0):
            fooled = _descend(model, ledger, rows, whole, weight, steps, step_size, first=search * steps)
            upper = torch.where(fooled, torch.minimum(upper, weight), upper)
            lower = torch.where(fooled, lower, torch.maximum(lower, weight))
            weight = torch.where(upper < NO_UPPER, (lower + upper) / 2, weight * 10)
    return smallest_result(ledger, eps=eps, norm="l2")


def _descend(
    model: nn.Module,
    ledger: c.Ledger,
    rows: Tensor,
    whole: Ball,
    weight: Tensor,
    steps: int,
    step_size: float,
    first: int,
) -> Tensor:
    """One search of the images `rows` at their weights [n]; returns which were fooled at some step [n]."""
    ball, y = whole.of(rows), ledger.y[rows]
    change = torch.zeros_like(ball.x[:, :1] if ball.grey else ball.x).requires_grad_()
    optimizer = torch.optim.Adam([change], lr=step_size)
    ever = torch.zeros_like(y, dtype=torch.bool)
    for step in range(steps):
        with torch.enable_grad():
            points = ball.x + change
            logits = model(points)
            distance = (points - ball.x).square().flatten(1).sum(1)
            total = distance + weight * (-c.margin(logits, y)).clamp(min=0)
            (change.grad,) = torch.autograd.grad(total.sum(), change)
        ledger.backwards += len(rows)
        ever |= record_smallest(ledger, rows, points.detach(), logits, norm="l2", step=first + step + 1)
        optimizer.step()
        with torch.no_grad():
            change.copy_((ball.project(ball.x + change) - ball.x)[:, : change.shape[1]])
    return ever
