"""MeanSparse (Amini et al. 2024, arXiv 2406.05927): features close to their channel mean become that mean.

The operator needs no training, but it needs statistics of the data the model works on: after a transfer to
radiographs call `recompute_statistics` on the training images and choose `set_alpha` on validation images;
`select_alpha` does both.
Its exact gradient is zero wherever a feature was replaced, which hides directions from an attack. The
published robust accuracies fall below those of the models without the operator once the attack goes straight
through it: report the worse of the exact attack and the one inside `straight_through`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

ALPHAS = tuple(round(0.05 * step, 2) for step in range(11))  # the authors' grid

log = logging.getLogger("dlia_utils")


class MeanSparse(nn.Module):
    """y = mean where |x - mean| < alpha * std per channel, else x (arXiv 2406.05927).

    Shapes: [B, C, H, W] -> the same. The gradient is exact (0 inside the dead zone, 1 outside) or, while
    `straight_through` is on, 1 everywhere. The buffers bear the names of the public checkpoints:
    `threshold` is alpha (0: identity), the last two are kept for the file format only.

    >>> operator = MeanSparse(1)  # mean 0, variance 1
    >>> operator.threshold.fill_(0.5)
    tensor(0.5000)
    >>> operator(torch.tensor([-0.6, 0.4, 0.5]).view(1, 1, 1, 3)).flatten()
    tensor([-0.6000,  0.0000,  0.5000])
    """

    running_mean: Tensor
    running_var: Tensor
    threshold: Tensor
    flag_update_statistics: Tensor
    batch_num: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("flag_update_statistics", torch.tensor(0))
        self.register_buffer("batch_num", torch.tensor(0.0))
        self.straight_through = False

    def forward(self, x: Tensor) -> Tensor:
        mean = self.running_mean.view(1, -1, 1, 1)
        reach = self.threshold * self.running_var.sqrt().view(1, -1, 1, 1)
        y = torch.where((x - mean).abs() < reach, mean.to(x.dtype), x)
        # x - x.detach() is exactly zero and carries the gradient.
        return y.detach() + (x - x.detach()) if self.straight_through else y


def operators(model: nn.Module) -> list[MeanSparse]:
    """Every MeanSparse operator of `model`, in order. Raises: ValueError if it has none."""
    found = [module for module in model.modules() if isinstance(module, MeanSparse)]
    if not found:
        raise ValueError(
            "the model holds no MeanSparse operator: create one of the meansparse models (a folded copy has "
            "lost its operators, so fold it after setting alpha or gradient)"
        )
    return found


def set_alpha(model: nn.Module, alpha: float) -> nn.Module:
    """Set the width of every dead zone, in standard deviations, in place; 0 switches MeanSparse off.

    Choose it on validation images (the authors' grid is 0 to 0.5, step 0.05). Raises: ValueError for a
    negative alpha or a model without the operator.

    >>> set_alpha(nn.Sequential(MeanSparse(2)), 0.2)[0].threshold
    tensor(0.2000)
    """
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be a finite number >= 0, not {alpha}")
    for operator in operators(model):
        operator.threshold.fill_(alpha)
    return model


@contextmanager
def straight_through(model: nn.Module) -> Iterator[nn.Module]:
    """Context: the backward pass takes each MeanSparse operator for the identity (BPDA, arXiv 1802.00420).

    Logits stay as they are. Use it around an attack. Raises: ValueError for a model without the operator.

    >>> model, x = set_alpha(nn.Sequential(MeanSparse(1)), 1.0), torch.zeros(1, 1, 1, 1, requires_grad=True)
    >>> with straight_through(model):
    ...     torch.autograd.grad(model(x).sum(), x)[0].item()
    1.0
    """
    before = [(operator, operator.straight_through) for operator in operators(model)]
    try:
        for operator, _ in before:
            operator.straight_through = True
        yield model
    finally:
        for operator, value in before:
            operator.straight_through = value


def recompute_statistics(
    model: nn.Module, batches: Iterable[Tensor], *, pooled: bool = True
) -> nn.Module:
    """Replace mean and variance of every MeanSparse operator by those of `batches`, in place; one pass.

    `batches`: training images [B, 1 or 3, H, W] in [0, 1], moved to the model's device. The pass is made in
    eval mode with alpha 0, and both are put back. pooled: variance over all values of a channel; False gives
    the published estimate, the mean of the batches' own means and unbiased variances, in which a short last
    batch weighs as much as a full one. Raises: ValueError without operators or images, or if a statistic is
    not finite; the operators then keep what they had.

    >>> operator = recompute_statistics(MeanSparse(1), [torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)])
    >>> operator.running_mean, operator.running_var
    (tensor([0.5000]), tensor([0.2500]))
    """
    found = operators(model)
    sums = [_Sums() for _ in found]
    alphas = [operator.threshold.clone() for operator in found]
    modes = [(module, module.training) for module in model.modules()]
    count = 0
    with ExitStack() as stack, torch.no_grad():
        stack.callback(_restore, found, alphas, modes)
        for operator, total in zip(found, sums, strict=True):
            operator.threshold.zero_()
            stack.enter_context(operator.register_forward_pre_hook(total.add))
        model.eval()
        for images in batches:
            model(images.to(found[0].running_mean.device))
            count += 1
    if not count:
        raise ValueError(
            "batches holds no images: pass the training images, [B, C, H, W] in [0, 1]"
        )
    estimates = [total.pooled() if pooled else total.published(count) for total in sums]
    if not all(bool(value.isfinite().all()) for estimate in estimates for value in estimate):
        raise ValueError(
            "a MeanSparse statistic is not finite: the images or the model's weights hold NaN"
        )
    for operator, (mean, variance) in zip(found, estimates, strict=True):
        operator.running_mean.copy_(mean)
        operator.running_var.copy_(variance)
        operator.batch_num.fill_(count)
    return model


def _restore(
    found: list[MeanSparse], alphas: list[Tensor], modes: list[tuple[nn.Module, bool]]
) -> None:
    for operator, alpha in zip(found, alphas, strict=True):
        operator.threshold.copy_(alpha)
    for module, training in modes:
        module.training = training


class _Sums:
    """Running sums per channel over batches, in float64 on the CPU (not every device has float64)."""

    def __init__(self) -> None:
        self.values, self.mean, self.squares = (
            0,
            0.0,
            0.0,
        )  # squares: of the distances from the mean
        self.means, self.variances = 0.0, 0.0

    def add(self, _module: nn.Module, inputs: tuple[Tensor]) -> None:
        """Take in one batch; a forward pre-hook. The merge is Chan, Golub and LeVeque's (1979)."""
        x = inputs[0].float()
        values = x.numel() // x.shape[1]
        variance, mean = (t.cpu().double() for t in torch.var_mean(x, dim=(0, 2, 3), correction=0))
        total, shift = self.values + values, mean - self.mean
        self.mean = self.mean + shift * (values / total)
        self.squares = (
            self.squares + variance * values + shift.square() * (self.values * values / total)
        )
        self.values = total
        self.means = self.means + mean
        self.variances = self.variances + variance * values / max(values - 1, 1)

    def pooled(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.squares / max(self.values - 1, 1)

    def published(self, batches: int) -> tuple[Tensor, Tensor]:
        return self.means / batches, self.variances / batches
