"""The threshold of MeanSparse, chosen on validation images by what the attacks leave of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import pandas as pd
from torch import Tensor, nn

from ..models.robust.meansparse import ALPHAS, operators, recompute_statistics, set_alpha
from ._contract import check_inputs
from .evaluate import BPDA, robust

log = logging.getLogger("dlia_utils")


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
    found = operators(model)
    alphas = sorted({0.0, *(float(alpha) for alpha in grid)})
    if not 0 <= alphas[0] or not alphas[-1] < float("inf") or len(alphas) < 2:
        raise ValueError(f"grid must hold finite numbers >= 0 and one above 0, not {tuple(grid)}")
    if not 0 <= max_clean_drop <= 1:
        raise ValueError(
            f"max_clean_drop is a share of the images, e.g. 0.01, not {max_clean_drop}"
        )
    check_inputs(model, x_val, y_val, eps=eps, grey=grey)
    recompute_statistics(model, train_batches)
    before = [operator.threshold.clone() for operator in found]
    options = {
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "grey": grey,
        "progress": progress,
    }
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
    rows = robust(model, (x, y), [eps], attacks=attacks, early_drop=False, **options).rows
    through = rows.attack.str.endswith(BPDA)
    withstood = {
        "clean": rows[rows.attack == "clean"],
        "exact": rows[rows.attack.isin(attacks)],
        "straight_through": rows[
            through if through.any() else rows.attack.isin(attacks)
        ],  # alpha 0: equal
        "robust": rows[rows.attack == "worst"],
    }
    return {
        name: 1 - float(part.groupby("image").fooled.any().mean())
        for name, part in withstood.items()
    }
