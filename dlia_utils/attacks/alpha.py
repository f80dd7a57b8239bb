"""The threshold of MeanSparse, chosen on validation images by what the attacks leave of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import pandas as pd
from torch import Tensor, nn

from ..models.robust.meansparse import ALPHAS, operators, recompute_statistics, set_alpha
from ..units import check_numbers
from . import evaluate
from .base import check_attack

log = logging.getLogger("dlia_utils")

MAX_DROP = 0.01  # of the clean accuracy, against alpha 0


def select_alpha(
    model: nn.Module,
    train_batches: Iterable[Tensor],
    x_val: Tensor,
    y_val: Tensor,
    *,
    eps: float,
    grid: Sequence[float] = ALPHAS,
    steps: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Recompute the statistics on training images, choose and set alpha (arXiv 2406.05927).

    The authors chose on the test set, by exact gradients. Here a validation image is robust when it
    withstands PGD with exact gradients and straight through the operators. Of the alphas whose
    clean accuracy lies at most MAX_DROP below that of alpha 0 (always tried) the most
    robust one is set, the smallest if several are. train_batches: images [B,1 or 3,H,W], read once;
    eps in pixel units. Returns one row per alpha: alpha, clean, exact, straight_through, robust
    (accuracies), chosen. After an error the alphas are as they were.

    >>> import torch
    >>> from dlia_utils.models.robust.meansparse import MeanSparse
    >>> model = nn.Sequential(MeanSparse(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x, y = torch.rand(6, 1, 2, 2), torch.tensor([0, 1] * 3)
    >>> select_alpha(model, [x], x, y, eps=4 / 255, grid=(0, 0.2), progress=False).alpha.tolist()
    [0.0, 0.2]
    """
    for alpha in grid:
        check_numbers("[0,inf)", grid=alpha)
    check_numbers("[1,inf)", whole=True, steps=steps)
    check_numbers("[0,inf)", whole=True, seed=seed)
    found, alphas = operators(model), sorted({0.0, *map(float, grid)})
    check_attack(model, x_val, y_val, eps=eps)
    recompute_statistics(model, train_batches)
    before, rows = [operator.threshold.clone() for operator in found], []
    options = dict(attacks=["pgd_margin"], steps=steps, seed=seed, progress=progress, in_full=None)
    try:
        for alpha in alphas:
            set_alpha(model, alpha)
            result = evaluate.robust(model, (x_val, y_val), [eps], **options).rows
            right = 1 - result.groupby("attack").fooled.mean()
            through = right.get(f"pgd_margin{evaluate.BPDA}", right.pgd_margin)  # equal at alpha 0
            row = {"alpha": alpha, "clean": right.clean, "exact": right.pgd_margin}
            rows.append(row | {"straight_through": through, "robust": right.worst})
            log.info("MeanSparse on validation images: %s", rows[-1])
    except BaseException:
        for operator, alpha in zip(found, before, strict=True):
            operator.threshold.copy_(alpha)
        raise
    table = pd.DataFrame(rows)
    # Shares of whole images: the tolerance only absorbs their rounding.
    allowed = table[table.clean >= table.clean.iloc[0] - MAX_DROP - 1e-9]
    best = allowed.robust.idxmax()  # the first of equals
    set_alpha(model, table.alpha[best])
    return table.assign(chosen=table.index == best)
