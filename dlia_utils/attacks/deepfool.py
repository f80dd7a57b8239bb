"""DeepFool: walk to the nearest boundary of the linearised model, again and again."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import _contract as c
from ._ball import TINY, Ball, dual_size, per_image, record_smallest, smallest_result

NUDGE = 1e-4  # length added to every step, as in the authors' code: exactly on the boundary the walk would end


def deepfool(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | None = None,
    norm: str = "l2",
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
    grey: bool = False,
    mask: Tensor | None = None,
    eot: int = 1,
) -> c.AttackResult:
    """Walk to the nearest linearised boundary until fooled. Source: Moosavi-Dezfooli, arXiv 1511.04599.

    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps: None, or the budget in pixel units of the norm: a longer
    change is cut to it and judged once more, and an image that it fools no longer is returned unchanged. norm: "l2" or "linf". overshoot: how far beyond the
    boundary. candidates: the most likely wrong classes looked at per step, one backward pass each.
    grey: one perturbation for R=G=B. mask: bool [B or 1,1,H,W] of the pixels that may change.
    eot: passes averaged per look at a model that is random in eval mode (arXiv 1802.00420); success then
    means that most of eot fresh passes of x_adv are wrong.
    An image leaves the batch once fooled; `first_success_step` is the step. Nothing is random.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> _ = torch.manual_seed(1)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x = torch.full((1, 1, 2, 2), 0.5)
    >>> result = deepfool(model, x, model(x).argmax(1))
    >>> bool(result.success[0]), int(result.first_success_step[0])
    (True, 1)
    """
    x, _ = c.check_inputs(model, x, y, eps=eps, norm=norm, grey=grey, mask=mask, eot=eot)
    if steps < 1 or candidates < 1 or not overshoot >= 0:
        raise ValueError(
            f"steps and candidates must be >= 1 and overshoot >= 0, not {steps}, {candidates} and {overshoot}"
        )
    ball = Ball(x, None, norm=norm, grey=grey, mask=mask)
    ledger = c.Ledger(model, x, y, eot=eot)
    rows, points, total = ledger.everyone(), x, torch.zeros_like(x)
    with c.frozen(model):
        for step in range(steps):
            wrong, gaps, gradients = _boundaries(ledger, rows, points, candidates, check=step == 0)
            fooled = record_smallest(ledger, rows, points, wrong, norm=norm, step=step)
            if bool(fooled.all()):
                return smallest_result(ledger, eps=eps, norm=norm)
            total = total + _shortest(gaps, gradients, ball)
            rows, total, ball = rows[~fooled], total[~fooled], ball.of(~fooled)
            points = ball.project(ball.x + (1 + overshoot) * total)
        wrong, _ = c.answer(model, points, y[rows], c.margin, eot=eot)
        record_smallest(ledger, rows, points, wrong, norm=norm, step=steps)
        return smallest_result(ledger, eps=eps, norm=norm)


def _boundaries(
    ledger: c.Ledger, rows: Tensor, points: Tensor, candidates: int, *, check: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(share of wrong passes [n], per wrong class: logit gap [n], its gradient [n,C,H,W]), means over passes.

    The wrong classes are the likeliest of the first pass. No gradients when a single pass is wrong everywhere.
    """
    true, order = ledger.y[rows], None
    points = points.detach().requires_grad_()
    votes, gaps, gradients = torch.zeros_like(true), [], []
    for _ in range(ledger.eot):
        with torch.enable_grad():
            logits = ledger.model(points)
            if check:
                c.check_logits(logits, true)
            votes = votes + (logits.detach().argmax(1) != true)
            if ledger.eot == 1 and bool(votes.all()):
                break
            if order is None:
                others = logits.detach().scatter(1, true[:, None], -torch.inf)
                order = others.argsort(1, descending=True)[
                    :, : min(candidates, logits.shape[1] - 1)
                ].T
                gaps, gradients = [0.0] * len(order), [0.0] * len(order)
            for k, other in enumerate(order):
                gap = (logits.gather(1, other[:, None]) - logits.gather(1, true[:, None]))[
                    :, 0
                ] / ledger.eot
                gradients[k] = (
                    gradients[k] + torch.autograd.grad(gap.sum(), points, retain_graph=True)[0]
                )
                gaps[k] = gaps[k] + gap.detach()
            ledger.backwards += len(order) * len(rows)
    return votes / ledger.eot, gaps, gradients


def _shortest(gaps: list[Tensor], gradients: list[Tensor], ball: Ball) -> Tensor:
    """The shortest change [n,C,H,W] that reaches a boundary of the model linearised at the points."""
    nudge = NUDGE if ball.norm == "l2" else NUDGE / math.sqrt(gradients[0][0].numel())
    best, change = torch.full_like(gaps[0], torch.inf), torch.zeros_like(gradients[0])
    for gap, gradient in zip(gaps, gradients, strict=True):
        gradient = ball.allowed(gradient)
        rise = dual_size(gradient, ball.norm)
        distance = torch.where(rise > 0, gap.abs() / rise.clamp_min(TINY), torch.inf)
        step = (distance + nudge).nan_to_num(posinf=0)
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        change = torch.where(per_image(nearer), per_image(step) * ball.ascent(gradient), change)
    return change
