"""Randomised smoothing (Cohen et al. 2019, arXiv 1902.02918): a certified L2 robustness.

The smoothed classifier gives the class that the model gives most often to x + N(0, sigma^2). Train
the model on the same noise (`objectives.gaussian_noise`), else it abstains nearly everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import beta, norm
from torch import Tensor, nn

from . import metrics
from .attacks.base import check_images
from .device import device_of, evaluating

ABSTAIN = -1


def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 1000,
    alpha: float = 0.001,
    ids: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> pd.DataFrame:
    """The smoothed class of each image and the L2 radius in which it is certain (CERTIFY).

    `n0` noisy copies choose the class; of `n` others, k get it. p_lower is the lower Clopper-
    Pearson bound of its probability with error alpha, radius = sigma Phi^-1(p_lower). Where p_lower
    <= 1/2 the answer is ABSTAIN (-1). The certificate holds for every attack, with probability 1 -
    alpha. x [B,C,H,W] in [0,1], y int64 [B]; sigma and radius in pixel units. The noisy images are
    not cut to [0,1]; the noise depends on (seed, id) only. Columns: image (its id), predicted,
    radius, p_lower, k, label, correct (an abstention is not).

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> table = certify(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]), sigma=0.25, n=50)
    >>> table.columns.tolist()
    ['image', 'predicted', 'radius', 'p_lower', 'k', 'label', 'correct']
    """
    x, ids = check_images(x), list(range(len(x))) if ids is None else [int(i) for i in ids]
    if min(sigma, n0, n, batch_size) <= 0 or not 0 < alpha < 0.5:
        raise ValueError("sigma, n0, n and batch_size must be positive and alpha in (0, 0.5)")
    rows = []
    with torch.inference_mode(), evaluating(model):
        for i, image in zip(ids, x, strict=True):
            first, second = (
                _counts(model, image, count, sigma, np.random.default_rng([seed, k, i]), batch_size)
                for k, count in enumerate((n0, n))
            )
            k = int(second[first.argmax()])
            p = float(beta.ppf(alpha, k, n - k + 1)) if k else 0.0  # Clopper and Pearson 1934
            predicted, radius = ABSTAIN, 0.0
            if p > 0.5:
                predicted, radius = int(first.argmax()), sigma * float(norm.ppf(p))
            rows.append([i, predicted, radius, p, k])
    table = pd.DataFrame(rows, columns="image predicted radius p_lower k".split())
    table["label"] = y.cpu().numpy()
    return table.assign(correct=table.predicted == table.label)


def certified_accuracy(
    table: pd.DataFrame, radii: Sequence[float], groups: Sequence, *, draws: int = 2000
) -> pd.DataFrame:
    """The share of images that are right and certified at each L2 radius, of a `certify` table.

    groups: patient of each row. Columns: metric, value, ci_low, ci_high (95 %, by patient), n,
    radius. At radius 0 this is the smoothed model's accuracy, with abstentions as errors.

    >>> table = pd.DataFrame({"correct": [True, True, False], "radius": [0.5, 0.1, 0.9]})
    >>> certified_accuracy(table, [0, 0.2], groups="abc", draws=50).value.round(2).tolist()
    [0.67, 0.33]
    """
    right, radius = table.correct.to_numpy(dtype=bool), table.radius.to_numpy(dtype=float)
    shares = [metrics.share(right & (radius >= r), list(groups), draws=draws) for r in radii]
    return pd.DataFrame(shares).assign(radius=radii, metric="certified_accuracy")


def _counts(
    model: nn.Module, image: Tensor, n: int, sigma: float, draws: np.random.Generator, batch: int
) -> np.ndarray:
    """How often the model gives each class [K] to n noisy copies of one image [C,H,W]."""
    device = device_of(model, image)
    image, counts = image.to(device), 0
    for start in range(0, n, batch):
        # numpy's normal draws are the same in one piece or in several, torch's are not.
        noise = draws.standard_normal((min(batch, n - start), *image.shape), dtype=np.float32)
        logits = model(image + sigma * torch.from_numpy(noise).to(device))
        counts += torch.bincount(logits.argmax(1), minlength=logits.shape[1]).cpu().numpy()
    return counts
