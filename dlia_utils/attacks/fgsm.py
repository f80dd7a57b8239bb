"""Fast gradient sign method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..units import check_numbers
from . import base


def fgsm(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float | Tensor, loss: str = "ce"
) -> base.AttackResult:
    """One step of size eps along the sign of the gradient (Goodfellow et al., arXiv 1412.6572).

    eps: pixel units, or a tensor [C,1,1] (`normalised_eps`). Every image is moved, also one that is
    already wrong (`first_success_step` 0). Arguments: as `pgd`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> result = fgsm(model, torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), eps=8 / 255)
    >>> round(float(result.linf[0]) * 255), result.forwards, result.backwards
    (8, 2, 1)
    """
    with base.search(model, x, y, eps=eps, loss=loss) as search:
        clean, eps = search.x, search.eps
        _, _, gradient = search.gradient(search.everyone, clean, 0)
        x_adv = base.project(clean + eps * gradient.sign(), clean, eps, "linf")
        fooled, _ = search.ask(search.everyone, x_adv, 1)
        return search.result(x_adv, fooled)


def normalised_eps(value: float, std: float | Sequence[float] | Tensor) -> Tensor:
    """Pixel eps per channel [C,1,1] of an attack that adds `value` * sign in normalised space.

    A model that sees (x - mean) / std is moved by `value` when the pixel moves by value * std.

    >>> (normalised_eps(0.03, [0.229, 0.224, 0.225]) * 255).flatten()
    tensor([1.7518, 1.7136, 1.7212])
    """
    stds = torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1)
    for one in stds.flatten().tolist():
        check_numbers("(0,inf)", value=value, std=one)
    return value * stds
