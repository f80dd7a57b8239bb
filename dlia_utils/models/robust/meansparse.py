"""MeanSparse (Amini et al. 2024, arXiv 2406.05927): features close to their channel mean become it.

Its exact gradient is zero there, which hides directions from an attack: report the worse of the
exact attack and the one inside `straight_through`. `attacks.alpha.select_alpha` sets alpha.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...device import evaluating
from ...units import check_numbers

ALPHAS = tuple(round(0.05 * step, 2) for step in range(11))  # the authors' grid


class MeanSparse(nn.Module):
    """y = mean where |x - mean| < alpha * std per channel, else x; [B, C, H, W] -> the same.

    Buffers as in the public checkpoints: `threshold` is alpha, the last two are unused.

    >>> operator = set_alpha(MeanSparse(1), 0.5)  # mean 0, variance 1
    >>> operator(torch.tensor([-0.6, 0.4, 0.5]).view(1, 1, 1, 3)).flatten()
    tensor([-0.6000,  0.0000,  0.5000])
    """

    foldable = False  # at the edge of a dead zone the rounding of a folded copy shows

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
        raise ValueError("the model holds no MeanSparse operator (a folded copy has lost them)")
    return found


def set_alpha(model: nn.Module, alpha: float) -> nn.Module:
    """Set the width of every dead zone, in standard deviations, in place; 0 switches it off."""
    check_numbers("[0,inf)", alpha=alpha)
    for operator in operators(model):
        operator.threshold.fill_(alpha)
    return model


@contextmanager
def straight_through(model: nn.Module) -> Iterator[nn.Module]:
    """Context: the backward pass takes each operator for the identity (BPDA, arXiv 1802.00420)."""
    before = {operator: operator.straight_through for operator in operators(model)}
    try:
        for operator in before:
            operator.straight_through = True
        yield model
    finally:
        for operator, value in before.items():
            operator.straight_through = value


def recompute_statistics(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Replace mean and variance of every MeanSparse operator by those of `batches`, in place.

    `batches`: training images [B, 1 or 3, H, W] in [0, 1], for one pass in eval mode with alpha 0.
    Raises: ValueError without operators or images, or for a statistic that is not finite.
    """
    found, count = operators(model), 0
    alphas, sums = [operator.threshold.clone() for operator in found], {}

    def add(operator: MeanSparse, inputs: tuple[Tensor]) -> None:
        """Take in one batch, in float64 on the CPU: the merge of Chan, Golub and LeVeque (1979)."""
        x, (values, mean, squares) = inputs[0].float(), sums.get(operator, (0, 0.0, 0.0))
        more = x.numel() // x.shape[1]
        variance, centre = (t.cpu().double() for t in torch.var_mean(x, (0, 2, 3), correction=0))
        total, shift = values + more, centre - mean
        squares = squares + variance * more + shift.square() * (values * more / total)
        sums[operator] = (total, mean + shift * (more / total), squares)

    handles = [operator.register_forward_pre_hook(add) for operator in found]
    try:
        set_alpha(model, 0.0)
        with evaluating(model), torch.no_grad():
            for images in batches:
                model(images.to(found[0].running_mean.device))
                count += 1
    finally:
        for handle, operator, alpha in zip(handles, found, alphas, strict=True):
            handle.remove()
            operator.threshold.copy_(alpha)
    if not count:
        raise ValueError("batches holds no images: pass the training images, [B, C, H, W]")
    parts = [sums[operator] for operator in found]
    estimates = [(mean, squares / max(values - 1, 1)) for values, mean, squares in parts]
    if not all(value.isfinite().all() for pair in estimates for value in pair):
        raise ValueError("a MeanSparse statistic is not finite: NaN in the images or the weights")
    for operator, (mean, variance) in zip(found, estimates, strict=True):
        operator.running_mean.copy_(mean)
        operator.running_var.copy_(variance)
        operator.batch_num.fill_(count)
    return model
