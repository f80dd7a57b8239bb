"""DeepFool: walk to the nearest boundary of the linearised model, again and again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _contract as c
from ._ball import TINY, Ball, dual_size, per_image, record_smallest, smallest_result

NUDGE = 1e-4  # added to every step, as in the authors' code: exactly on the boundary the walk would end


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
) -> c.AttackResult:
    """Walk to the nearest linearised boundary until fooled. Source: Moosavi-Dezfooli, arXiv 1511.04599.

    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps: None, or the budget in pixel units of the norm: an image that
    needs more is returned unchanged and not fooled. norm: "l2" or "linf". overshoot: how far beyond the
    boundary. candidates: the most likely wrong classes looked at per step, one backward pass each.
    grey: one perturbation for R=G=B. mask: bool [B,1,H,W] of the pixels that may change.
    An image leaves the batch once fooled; `first_success_step` is the step. Nothing is random.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> _ = torch.manual_seed(1)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x = torch.full((1, 1, 2, 2), 0.5)
    >>> result = deepfool(model, x, model(x).argmax(1))
    >>> bool(result.success[0]), int(result.first_success_step[0])
    (True, 1)
    """
    x, _ = c.check_inputs(model, x, y, eps=eps, norm=norm, grey=grey, mask=mask)
    if steps < 1 or candidates < 1 or not overshoot >= 0:
        raise ValueError(
            f"steps and candidates must be >= 1 and overshoot >= 0, not {steps}, {candidates} and {overshoot}"
        )
    ball = Ball(x, None, norm=norm, grey=grey, mask=mask)
    ledger = c.Ledger(x, y)
    rows, points, total = ledger.everyone(), x, torch.zeros_like(x)
    with c.frozen(model):
        for step in range(steps + 1):
            last = step == steps
            with torch.set_grad_enabled(not last):
                points = points.detach().requires_grad_(not last)
                logits = model(points)
                if step == 0:
                    c.check_logits(logits, y)
                fooled = record_smallest(ledger, rows, points, logits, norm=norm, step=step)
                if last or bool(fooled.all()):
                    break
                total = total + _shortest(points, logits, ledger, rows, ball, candidates)
            rows, total, ball = rows[~fooled], total[~fooled], ball.of(~fooled)
            points = ball.project(ball.x + (1 + overshoot) * total)
    return smallest_result(ledger, eps=eps, norm=norm)


def _shortest(
    points: Tensor, logits: Tensor, ledger: c.Ledger, rows: Tensor, ball: Ball, candidates: int
) -> Tensor:
    """The shortest change [n,C,H,W] that reaches a boundary of the model linearised at the points."""
    true = ledger.y[rows][:, None]
    others = logits.detach().scatter(1, true, -torch.inf)
    order = others.argsort(1, descending=True)[:, : min(candidates, logits.shape[1] - 1)]
    best, change = torch.full_like(logits[:, 0].detach(), torch.inf), torch.zeros_like(points)
    for other in order.T:
        gap = (logits.gather(1, other[:, None]) - logits.gather(1, true))[:, 0]
        (gradient,) = torch.autograd.grad(gap.sum(), points, retain_graph=True)
        ledger.backwards += len(rows)
        gradient = ball.allowed(gradient)
        rise = dual_size(gradient, ball.norm)
        distance = torch.where(rise > 0, gap.detach().abs() / rise.clamp_min(TINY), torch.inf)
        step = (distance + NUDGE).nan_to_num(posinf=0)
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        change = torch.where(per_image(nearer), per_image(step) * ball.ascent(gradient), change)
    return change.detach()
