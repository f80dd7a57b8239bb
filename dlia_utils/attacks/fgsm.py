"""Fast gradient sign method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _contract as c
from ._ball import Ball


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    loss: str = "ce",
    grey: bool = False,
    mask: Tensor | None = None,
    eot: int = 1,
) -> c.AttackResult:
    """One step of size eps along the sign of the loss gradient. Source: Goodfellow et al., arXiv 1412.6572.

    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps: pixel units (k/255), or a tensor [C,1,1]; see `normalised_eps`.
    loss: "ce" or "margin". grey: one perturbation for R=G=B.
    mask: bool [B or 1,1,H,W] of the pixels that may change.
    eot: passes averaged per look at a model that is random in eval mode (arXiv 1802.00420); success then
    means that most of eot fresh passes of x_adv are wrong.
    Every image is moved, also one that is already wrong (`first_success_step` 0).
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> result = fgsm(model, torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), eps=8 / 255)
    >>> round(float(result.linf[0]) * 255), result.forwards, result.backwards
    (8, 2, 1)
    """
    objective = c.choose_loss(loss)
    x, _ = c.check_inputs(model, x, y, eps=eps, grey=grey, mask=mask, eot=eot)
    eps = c.on_device(eps, x)
    ball = Ball(x, eps, grey=grey, mask=mask)
    with c.frozen(model):
        before, _, gradient = c.gradient_at(model, x, y, objective, eot=eot, check=True)
        x_adv = ball.project(x + eps * ball.ascent(gradient))
        after, _ = c.answer(model, x_adv, y, objective, eot=eot)
    success = after > 0.5
    first_step = torch.where(before > 0.5, 0, torch.where(success, 1, -1))
    queries = torch.full_like(y, 2 * eot)
    return c.build_result(x, x_adv, success, first_step, queries, eot * len(x), eps=eps, seed=None)


def normalised_eps(value: float, std: float | list[float] | tuple[float, ...] | Tensor) -> Tensor:
    """Pixel eps per channel [C,1,1] of an attack that adds `value` * sign in normalised space.

    A model that sees (x - mean) / std is moved by `value` when the pixel moves by value * std.

    >>> (normalised_eps(0.03, [0.229, 0.224, 0.225]) * 255).flatten()
    tensor([1.7518, 1.7136, 1.7212])
    """
    return float(value) * torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1)
