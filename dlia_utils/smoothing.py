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

from .attacks.base import check_images, check_steady
from .device import device_of, evaluating
from .units import check_numbers

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
    """The smoothed class of each image and the L2 radius in which it is certain.

    `n0` noisy copies (not cut to [0,1]) choose the class; of `n` others, k get it. p_lower is the
    lower Clopper-Pearson bound of its probability, radius = sigma Phi^-1(p_lower); where p_lower <=
    1/2 the answer is ABSTAIN. The certificate holds for every attack, with probability 1 - alpha.
    x [B,C,H,W] in [0,1], y int64 [B]; sigma and radius in pixel units; the noise depends on (seed,
    id) only. Columns: image (its id), predicted, radius, p_lower, k, label, correct.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> table = certify(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]), sigma=0.25, n=50)
    >>> table.columns.tolist()
    ['image', 'predicted', 'radius', 'p_lower', 'k', 'label', 'correct']
    """
    check_numbers("(0,inf)", sigma=sigma)
    check_numbers("(0,0.5)", alpha=alpha)
    check_numbers("[1,inf)", whole=True, n0=n0, n=n, batch_size=batch_size)
    check_numbers("[0,inf)", whole=True, seed=seed)
    x, rows, device = check_images(x), [], device_of(model, x)

    def counts(image: Tensor, n: int, rng: np.random.Generator) -> np.ndarray:
        """How often the model gives each class [K] to n noisy copies."""
        found = 0
        for start in range(0, n, batch_size):
            # numpy's normal draws are the same in one piece or in several, torch's are not.
            noise = rng.standard_normal((min(batch_size, n - start), *image.shape), np.float32)
            logits = model(image + sigma * torch.from_numpy(noise).to(device))
            found += torch.bincount(logits.argmax(1), minlength=logits.shape[1]).cpu().numpy()
        return found

    with torch.inference_mode(), evaluating(model):
        check_steady(model, x[:1].to(device))
        for i, image in zip(range(len(x)) if ids is None else ids, x.to(device), strict=True):
            rngs = [np.random.default_rng([seed, stream, int(i)]) for stream in (0, 1)]
            top = int(counts(image, n0, rngs[0]).argmax())
            k = int(counts(image, n, rngs[1])[top])
            p = float(beta.ppf(alpha, k, n - k + 1)) if k else 0.0  # Clopper and Pearson 1934
            sure = (top, sigma * float(norm.ppf(p))) if p > 0.5 else (ABSTAIN, 0.0)
            rows.append([int(i), *sure, p, k])
    table = pd.DataFrame(rows, columns="image predicted radius p_lower k".split())
    table["label"] = y.cpu().numpy()
    return table.assign(correct=table.predicted == table.label)
