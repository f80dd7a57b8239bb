"""What training minimises: functions that return `objective(model, x, y) -> (loss, logits)`.

Every objective takes images [B, 1 or 3, H, W] in [0, 1] and labels int64 [B]; the loss is a mean over the
batch. `objective.settings` holds its name and numbers; `train.fit` stores them with the run, so that a run
made with other numbers is not taken for this one. `objective.second_order` tells `fit` that gradients are
differentiated. `detection` differs: its labels are lists of boxes, and it has no logits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._objective import (
    Objective,
    ce_attack,
    check_ball,
    check_positive,
    describe,
    kl,
    kl_attack,
    weighted_cross_entropy,
)
from .defences import (
    fast_adversarial,
    free_adversarial,
    gairat,
    gairat_weights,
    gaussian_noise,
    hat,
    margin_gradient,
    mart,
    mart_loss,
    overfitting_monitor,
)
from .device import evaluating, fingerprint
from .models.lipschitz import quick_input_gradient

__all__ = [
    "Objective",
    "cross_entropy",
    "cross_entropy_at",
    "detection",
    "distillation",
    "evaluating",
    "fast_adversarial",
    "fingerprint",
    "free_adversarial",
    "gairat",
    "gairat_weights",
    "gaussian_noise",
    "hat",
    "lipschitz",
    "margin_gradient",
    "mart",
    "mart_loss",
    "overfitting_monitor",
    "pgd_adversarial",
    "trades",
]


def cross_entropy(
    *, weight: Sequence[float] | None = None, label_smoothing: float = 0.0
) -> Objective:
    """Cross-entropy; `weight` is one factor per class.

    >>> x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    >>> loss, logits = cross_entropy()(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), x, y)
    >>> loss.shape, logits.shape
    (torch.Size([]), torch.Size([4, 2]))
    """
    ce = weighted_cross_entropy(weight, label_smoothing)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return ce(logits, y), logits

    return describe(objective, "cross_entropy", weight=weight, label_smoothing=label_smoothing)


def cross_entropy_at(
    temperature: float, *, weight: Sequence[float] | None = None, label_smoothing: float = 0.0
) -> Objective:
    """Cross-entropy of logits / T, for the teacher of defensive distillation (Papernot, arXiv 1511.04508).

    The model is used at T = 1 afterwards; its logits are then about T times larger than usual, which is what
    hides its gradients. Raises: ValueError for T <= 0.

    >>> cross_entropy_at(50).settings["temperature"]
    50
    """
    check_positive(temperature=temperature)
    ce = weighted_cross_entropy(weight, label_smoothing)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return ce(logits / temperature, y), logits

    return describe(
        objective,
        "cross_entropy_at",
        temperature=temperature,
        weight=weight,
        label_smoothing=label_smoothing,
    )


def distillation(
    teacher: nn.Module, *, temperature: float, alpha: float = 0.9, hard_temperature: float = 1.0
) -> Objective:
    """Knowledge distillation (Hinton, arXiv 1503.02531): soft labels of a teacher, and the hard ones.

    loss = alpha T^2 KL(teacher_T || student_T) + (1 - alpha) CE(student / hard_temperature, y).

    alpha = 0.9 with a teacher trained at T = 1 is the published study's recipe. Defensive distillation
    (Papernot, arXiv 1511.04508) takes a teacher trained by `cross_entropy_at(T)` and the same T here, in both
    terms. The teacher is copied, frozen and in eval mode; the caller's stays as it is.
    Raises: ValueError for a temperature <= 0 or alpha outside [0, 1].

    >>> teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)) for _ in range(2))
    >>> x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    >>> distillation(teacher, temperature=35, alpha=1.0)(teacher, x, y)[0].abs().item() < 1e-3
    True
    """
    check_positive(temperature=temperature, hard_temperature=hard_temperature)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    settings = {"temperature": temperature, "alpha": alpha, "hard_temperature": hard_temperature}
    settings["teacher"] = fingerprint(teacher)
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            soft = F.log_softmax(teacher.to(x.device)(x) / temperature, dim=1)
        logits = model(x)
        student = F.log_softmax(logits / temperature, dim=1)
        # T^2 undoes the 1/T^2 that the two softmaxes put on the gradient.
        loss = (
            alpha * temperature**2 * F.kl_div(student, soft, reduction="batchmean", log_target=True)
        )
        return loss + (1 - alpha) * F.cross_entropy(logits / hard_temperature, y), logits

    return describe(objective, "distillation", **settings)


def lipschitz(
    *,
    penalty: float = 0.05,
    input_std: Sequence[float] | None = None,
    weight: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Objective:
    """Cross-entropy + penalty * mean over the batch of || d max_k softmax_k(x) / dx ||_2^2, one forward pass.

    The gradient is taken with respect to pixels in [0, 1] of x as given (one channel for a radiograph). With
    `input_std` (one number per channel of a three-channel normalisation) it is taken per colour channel and
    in units of the normalised input: this is the published study's penalty, whose 0.05 is much weaker.
    float32 only: second derivatives underflow in half precision. Raises: ValueError for penalty < 0.

    >>> x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    >>> loss, _ = lipschitz(penalty=0.05)(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), x, y)
    >>> loss.requires_grad
    True
    """
    if penalty < 0:
        raise ValueError(f"penalty must not be negative, got {penalty}")
    ce = weighted_cross_entropy(weight, label_smoothing)
    std = (
        None
        if input_std is None
        else torch.tensor(input_std, dtype=torch.float32).view(1, -1, 1, 1)
    )

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float() if std is None else x.float().expand(-1, std.shape[1], -1, -1)
            x = x.detach().requires_grad_()
            with quick_input_gradient():
                logits = model(x)
            confidence = logits.softmax(dim=1).amax(dim=1).sum()
            (gradient,) = torch.autograd.grad(confidence, x, create_graph=True)
            if std is not None:
                gradient = gradient * std.to(x.device)
            return ce(logits, y) + penalty * gradient.square().flatten(1).sum(1).mean(), logits

    settings = {
        "penalty": penalty,
        "input_std": input_std,
        "weight": weight,
        "label_smoothing": label_smoothing,
    }
    return describe(objective, "lipschitz", second_order=True, **settings)


def pgd_adversarial(
    *,
    eps: float,
    steps: int = 2,
    step_size: float | None = None,
    weight: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Objective:
    """Adversarial training: cross-entropy on PGD images made on the spot (Madry, arXiv 1706.06083).

    `eps` and `step_size` (default 0.7 eps, right for two steps) are in pixel units, e.g. 4/255. The attack
    sees the model in eval mode: with batch statistics it would attack a model that nobody uses. The returned
    logits are those of the adversarial images. Raises: ValueError for eps outside [0, 1] or steps < 1.

    >>> x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    >>> loss, _ = pgd_adversarial(eps=4 / 255)(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), x, y)
    """
    step_size = check_ball(eps, steps, step_size)
    ce = weighted_cross_entropy(weight, label_smoothing)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = ce_attack(model, x, y, eps=eps, steps=steps, step_size=step_size)
        logits = model(x_adv)
        return ce(logits, y), logits

    settings = {"eps": eps, "steps": steps, "step_size": step_size}
    return describe(
        objective, "pgd_adversarial", **settings, weight=weight, label_smoothing=label_smoothing
    )


def trades(
    *,
    eps: float,
    beta: float = 6.0,
    steps: int = 2,
    step_size: float | None = None,
    weight: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Objective:
    """TRADES: clean cross-entropy + beta KL(clean || attacked) (Zhang et al. 2019, arXiv 1901.08573).

    The attacked image is the one in the eps ball whose answer differs most from the clean answer, whatever the
    label; beta weighs stability against clean accuracy. `eps` and `step_size` (default 0.7 eps, right for two
    steps) are in pixel units, e.g. 4/255; the attack sees the model in eval mode. The returned logits are those of
    the clean images. Raises: ValueError for eps outside [0, 1], steps < 1 or beta < 0.

    >>> x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    >>> loss, logits = trades(eps=4 / 255)(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), x, y)
    >>> logits.shape
    torch.Size([4, 2])
    """
    step_size = check_ball(eps, steps, step_size)
    if beta < 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    ce = weighted_cross_entropy(weight, label_smoothing)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = kl_attack(model, x, eps=eps, steps=steps, step_size=step_size)
        logits = model(x)
        stability = kl(logits.float().softmax(1), model(x_adv)) / len(x)
        return ce(logits, y) + beta * stability, logits

    settings = {"eps": eps, "beta": beta, "steps": steps, "step_size": step_size}
    return describe(objective, "trades", **settings, weight=weight, label_smoothing=label_smoothing)


def detection() -> Objective:
    """Faster R-CNN's four losses, summed: objectness and box of proposals, class and box of regions (1506.01497).

    `x` images and `y` the list of targets, as `augment.collate_boxes` makes them; the model is a
    `models.Detector` in training mode. No logits are returned.

    >>> detection().settings["name"]
    'detection'
    """

    def objective(
        model: nn.Module, x: Tensor, y: Sequence[dict[str, Tensor]]
    ) -> tuple[Tensor, None]:
        return torch.stack(list(model(x, y).values())).sum(), None

    return describe(objective, "detection")
