"""Random noise of the attack's size: the control every gradient attack must beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import _contract as c
from ._ball import Ball


def noise(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    draws: int = 10,
    grey: bool = False,
    mask: Tensor | None = None,
    seed: int = 0,
    ids: Sequence[int] | None = None,
) -> c.AttackResult:
    """Try `draws` random points of the eps-ball, by turns inside and on its corners (arXiv 1902.06705).

    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps: pixel units (k/255). grey: one perturbation for R=G=B.
    mask: bool [B,1,H,W] of the pixels that may change.
    Odd draws are uniform in the ball, even ones +eps or -eps in every pixel. Fooled images leave the batch.
    A draw depends on (seed, draw, id) only; `first_success_step` is the number of the draw.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> result = noise(model, torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), eps=8 / 255, draws=3)
    >>> bool(result.linf[0] <= 8 / 255 + 1e-6), result.backwards
    (True, 0)
    """
    x, ids = c.check_inputs(model, x, y, eps=eps, grey=grey, mask=mask, ids=ids)
    if draws < 1:
        raise ValueError(f"draws must be >= 1, not {draws}")
    eps = c.on_device(eps, x)
    whole = Ball(x, eps, grey=grey, mask=mask)
    ledger = c.Ledger(x, y)
    with c.frozen(model), torch.no_grad():
        logits = c.check_logits(model(x), y)
        ledger.record(ledger.everyone(), x, logits, c.margin(logits, y), step=0)
        for draw in range(1, draws + 1):
            rows = ledger.standing()
            if not len(rows):
                break
            ball = whole.of(rows)
            unit = c.uniform(ball.x, [ids[i] for i in rows.tolist()], seed=seed, stream=draw, grey=grey)
            if draw % 2 == 0:
                unit = unit.sign()
            points = ball.project(ball.x + eps * unit)
            logits = model(points)
            ledger.record(rows, points, logits, c.margin(logits, y[rows]), draw)
    return ledger.result(eps=eps, seed=seed)
