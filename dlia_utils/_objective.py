"""What the objectives share: the attack they train on, the frozen model around it, settings and checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .device import evaluating

Objective = Callable[[nn.Module, Tensor, Any], tuple[Tensor, Tensor | None]]


def describe(
    objective: Objective, name: str, *, second_order: bool = False, **settings
) -> Objective:
    """Write on the objective what `train.fit` reads from it."""
    objective.settings = {"name": name, **settings}
    objective.second_order = second_order
    return objective


def check_positive(**numbers: float) -> None:
    """ValueError that names the first number that is not positive."""
    for name, value in numbers.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


def check_ball(eps: float, steps: int, step_size: float | None, *, share: float = 0.7) -> float:
    """The step size of an attack in training, by default `share` of eps, after a look at its numbers."""
    if not 0 <= eps <= 1:
        raise ValueError(f"eps is in pixel units of [0, 1], e.g. 4/255; got {eps}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return share * eps if step_size is None else step_size


def weighted_cross_entropy(
    weight: Sequence[float] | None, label_smoothing: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross-entropy of (logits, y) in float32, with one factor per class if `weight` is given."""
    factors = None if weight is None else torch.tensor(weight, dtype=torch.float32)

    def ce(logits: Tensor, y: Tensor) -> Tensor:
        nonlocal factors
        if factors is not None:
            factors = factors.to(logits.device)  # copied once, then already there
        return F.cross_entropy(logits.float(), y, weight=factors, label_smoothing=label_smoothing)

    return ce


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """Sum over the batch of KL(target || softmax(logits)); `target` [B, K] are probabilities."""
    return F.kl_div(logits.float().log_softmax(1), target, reduction="sum")


def bare_model(model: nn.Module) -> nn.Module:
    """What the attack goes through: DDP's wrapper would wait for parameter gradients."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def pgd(
    model: nn.Module,
    x: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    *,
    eps: float,
    steps: int,
    step_size: float,
) -> Tensor:
    """PGD for training: the last iterate as it is, one forward pass per step; `loss_of` logits is raised.

    `attacks.pgd` also looks at its last step, for measuring; here that would be one forward pass too many.
    """
    low, high = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)
    x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp_(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(model(x_adv)), x_adv)
        x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), low, high)
    return x_adv


def ce_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int,
    step_size: float,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Images that raise the cross-entropy of the model in eval mode; `watch` sees every iterate's logits."""

    def loss_of(logits: Tensor) -> Tensor:
        if watch is not None:
            watch(logits.detach())
        # The sum, not the mean: images must not depend on each other, and fp16 loses small gradients.
        return F.cross_entropy(logits, y, reduction="sum")

    bare = bare_model(model)
    with evaluating(bare):
        return pgd(bare, x, loss_of, eps=eps, steps=steps, step_size=step_size)


def kl_attack(model: nn.Module, x: Tensor, *, eps: float, steps: int, step_size: float) -> Tensor:
    """Images whose answer differs most from the clean answer, by KL, of the model in eval mode."""
    bare = bare_model(model)
    with evaluating(bare):
        with torch.no_grad():
            target = bare(x).float().softmax(1)
        return pgd(
            bare, x, lambda logits: kl(target, logits), eps=eps, steps=steps, step_size=step_size
        )
