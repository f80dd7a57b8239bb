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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pandas as pd
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


def recompute_statistics(model: nn.Module, batches: Iterable[Tensor], *, pooled: bool = True) -> nn.Module:
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
        raise ValueError("batches holds no images: pass the training images, [B, C, H, W] in [0, 1]")
    estimates = [total.pooled() if pooled else total.published(count) for total in sums]
    if not all(bool(value.isfinite().all()) for estimate in estimates for value in estimate):
        raise ValueError("a MeanSparse statistic is not finite: the images or the model's weights hold NaN")
    for operator, (mean, variance) in zip(found, estimates, strict=True):
        operator.running_mean.copy_(mean)
        operator.running_var.copy_(variance)
        operator.batch_num.fill_(count)
    return model


def select_alpha(
    model: nn.Module,
    train_batches: Iterable[Tensor],
    x_val: Tensor,
    y_val: Tensor,
    *,
    eps: float,
    grid: Sequence[float] = ALPHAS,
    steps: int = 10,
    max_clean_drop: float = 0.01,
    attacks: Sequence[str] = ("pgd_margin",),
    batch_size: int = 64,
    seed: int = 0,
    grey: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Recompute the statistics on training images, choose alpha on validation images, set it (arXiv 2406.05927).

    The authors' repository chose on the test set, and by exact gradients alone. Here an image counts as
    robust when it withstands `attacks` with exact gradients and straight through the operators. Of the alphas
    whose clean accuracy lies at most `max_clean_drop` below that of alpha 0, which is always tried, the most
    robust one is set, the smallest if several are.
    train_batches: training images [B, 1 or 3, H, W] in [0, 1], read once; x_val [N, 1 or 3, H, W], y_val
    int64 [N]; eps in pixel units (k/255); attacks, steps, batch_size, seed, grey: as `attacks.evaluate`.
    Returns one row per alpha: alpha, clean, exact, straight_through, robust (accuracies), chosen. After an
    error the model is as it was but for the statistics. Raises: ValueError for a model without operators, a
    bad grid and what `recompute_statistics` and the attacks refuse.

    >>> model = nn.Sequential(MeanSparse(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x, y = torch.rand(6, 1, 2, 2), torch.tensor([0, 1] * 3)
    >>> table = select_alpha(model, [x], x, y, eps=4 / 255, grid=(0, 0.2), progress=False)
    >>> table.alpha.tolist(), int(table.chosen.sum())
    ([0.0, 0.2], 1)
    """
    # Not at the top: the attacks import the models.
    from dlia_utils.attacks._contract import check_inputs

    found = operators(model)
    alphas = sorted({0.0, *(float(alpha) for alpha in grid)})
    if not 0 <= alphas[0] or not alphas[-1] < float("inf") or len(alphas) < 2:
        raise ValueError(f"grid must hold finite numbers >= 0 and one above 0, not {tuple(grid)}")
    if not 0 <= max_clean_drop <= 1:
        raise ValueError(f"max_clean_drop is a share of the images, e.g. 0.01, not {max_clean_drop}")
    check_inputs(model, x_val, y_val, eps=eps, grey=grey)
    recompute_statistics(model, train_batches)
    before = [operator.threshold.clone() for operator in found]
    options = {"steps": steps, "batch_size": batch_size, "seed": seed, "grey": grey, "progress": progress}
    rows = []
    try:
        for alpha in alphas:
            set_alpha(model, alpha)
            rows.append({"alpha": alpha, **_accuracies(model, x_val, y_val, eps, attacks, options)})
            log.info("MeanSparse on validation images: %s", rows[-1])
    except BaseException:
        for operator, alpha in zip(found, before, strict=True):
            operator.threshold.copy_(alpha)
        raise
    table = pd.DataFrame(rows)
    # Shares of whole images: the tolerance only absorbs their rounding.
    allowed = table[table.clean >= table.clean.iloc[0] - max_clean_drop - 1e-9]
    best = allowed.robust.idxmax()  # the first of equals
    set_alpha(model, table.alpha[best])
    return table.assign(chosen=table.index == best)


def _accuracies(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, attacks: Sequence[str], options: dict
) -> dict[str, float]:
    """Accuracy on clean images, and under the attacks with either gradient and with both, per image."""
    from dlia_utils.attacks.evaluate import BPDA, robust

    rows = robust(model, (x, y), [eps], attacks=attacks, early_drop=False, **options).rows
    through = rows.attack.str.endswith(BPDA)
    withstood = {
        "clean": rows[rows.attack == "clean"],
        "exact": rows[rows.attack.isin(attacks)],
        "straight_through": rows[through if through.any() else rows.attack.isin(attacks)],  # alpha 0: equal
        "robust": rows[rows.attack == "worst"],
    }
    return {name: 1 - float(part.groupby("image").fooled.any().mean()) for name, part in withstood.items()}


def _restore(found: list[MeanSparse], alphas: list[Tensor], modes: list[tuple[nn.Module, bool]]) -> None:
    for operator, alpha in zip(found, alphas, strict=True):
        operator.threshold.copy_(alpha)
    for module, training in modes:
        module.training = training


class _Sums:
    """Running sums per channel over batches, in float64 on the CPU (not every device has float64)."""

    def __init__(self) -> None:
        self.values, self.mean, self.squares = 0, 0.0, 0.0  # squares: of the distances from the mean
        self.means, self.variances = 0.0, 0.0

    def add(self, _module: nn.Module, inputs: tuple[Tensor]) -> None:
        """Take in one batch; a forward pre-hook. The merge is Chan, Golub and LeVeque's (1979)."""
        x = inputs[0].float()
        values = x.numel() // x.shape[1]
        variance, mean = (t.cpu().double() for t in torch.var_mean(x, dim=(0, 2, 3), correction=0))
        total, shift = self.values + values, mean - self.mean
        self.mean = self.mean + shift * (values / total)
        self.squares = self.squares + variance * values + shift.square() * (self.values * values / total)
        self.values = total
        self.means = self.means + mean
        self.variances = self.variances + variance * values / max(values - 1, 1)

    def pooled(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.squares / max(self.values - 1, 1)

    def published(self, batches: int) -> tuple[Tensor, Tensor]:
        return self.means / batches, self.variances / batches
