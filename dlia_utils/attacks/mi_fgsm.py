"""Momentum iterative FGSM: crafted on one model, judged on another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _contract as c
from ._ball import TINY, Ball, dual_size, per_image


def mi_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    surrogate: nn.Module | None = None,
    steps: int = 10,
    step_size: float | Tensor | None = None,
    decay: float = 1.0,
    loss: str = "ce",
    grey: bool = False,
    mask: Tensor | None = None,
    eot: int = 1,
) -> c.AttackResult:
    """Signed steps along accumulated gradients, for transfer. Source: Dong et al., arXiv 1710.06081.

    Crafts the image on `surrogate` and judges the last iterate on `model`, of which only the answers to the
    clean image and to that iterate are used; surrogate=None crafts on `model` itself.
    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps, step_size: pixel units (k/255), by default eps / steps.
    decay: weight of the earlier gradients. loss: "ce" or "margin", of the surrogate. grey: one perturbation
    for R=G=B. mask: bool [B or 1,1,H,W] of the pixels that may change.
    eot: passes averaged per look at a model that is random in eval mode (arXiv 1802.00420); success then
    means that most of eot fresh passes of x_adv are wrong.
    An image that `model` gets wrong already stays fooled at step 0. `queries` and `forwards` count the passes
    of `model`, `backwards` the gradients of whichever model the image is crafted on. Nothing is random.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> one, other = (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval() for _ in range(2))
    >>> x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    >>> result = mi_fgsm(one, x, y, eps=8 / 255, surrogate=other)
    >>> result.forwards, result.backwards
    (2, 10)
    """
    objective = c.choose_loss(loss)
    surrogate = model if surrogate is None else surrogate
    c.check_inputs(surrogate, x, y, eps=eps, grey=grey, mask=mask, eot=eot)
    x, _ = c.check_inputs(model, x, y, eps=eps, grey=grey, mask=mask, eot=eot)
    if steps < 1 or not decay >= 0:
        raise ValueError(f"steps must be >= 1 and decay >= 0, not {steps} and {decay}")
    eps = c.on_device(eps, x)
    step_size = eps / steps if step_size is None else c.on_device(step_size, x)
    ball = Ball(x, eps, grey=grey, mask=mask)
    ledger = c.Ledger(model, x, y, eot=eot)
    with c.frozen(model), c.frozen(surrogate):
        ledger.look(c.margin)
        points, momentum = x, torch.zeros_like(x)
        for step in range(steps):
            _, _, gradient = c.gradient_at(
                surrogate, points, y, objective, eot=eot, check=step == 0
            )
            if surrogate is model:
                ledger.queries += eot
            ledger.backwards += eot * len(x)
            gradient = ball.allowed(gradient)
            momentum = decay * momentum + gradient / per_image(
                dual_size(gradient, "linf").clamp_min(TINY)
            )
            points = ball.project(points + step_size * momentum.sign())
        ledger.ask(ledger.everyone(), points, c.margin, steps)
        return ledger.result(eps=eps, seed=None)
