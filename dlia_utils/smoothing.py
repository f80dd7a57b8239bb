"""Randomised smoothing (Cohen et al. 2019, arXiv 1902.02918): a classifier whose L2 robustness is certified.

The smoothed classifier gives the class that the model gives most often to x + N(0, sigma^2). Its certificate holds for
every attack of a smaller L2 norm, with probability 1 - alpha over the draws; nothing about the model is assumed.
Train the model on the same noise (`objectives.gaussian_noise`), else it abstains nearly everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import beta, binomtest, norm
from torch import Tensor, nn

from . import metrics
from .device import evaluating

ABSTAIN = -1


def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 1000,
    alpha: float = 0.001,
    ids: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> pd.DataFrame:
    """The smoothed class of each image and the L2 radius in which it is certain (Cohen et al. 2019, CERTIFY).

    `n0` noisy copies choose the class; of `n` others, k get it. p_lower is the lower Clopper-Pearson bound of its
    probability with error alpha, radius = sigma Phi^-1(p_lower). Where p_lower <= 1/2 the answer is ABSTAIN (-1) and
    the radius 0. The largest radius that n copies can give is sigma Phi^-1(alpha ** (1 / n)): 2.5 sigma for 1000.

    x [B, C, H, W] in [0, 1], y int64 [B] if known; sigma and radius in pixel units, in the space of x as given (a grey
    radiograph: of its one channel). The noisy images are not cut to [0, 1]. The noise depends on (seed, id) only,
    `ids` being row numbers by default: results do not depend on batch_size, on order or on the company of an image.
    The model is used in eval mode; its flags come back.
    Returns one row per image: image (its id), predicted, radius, p_lower, k, and with y also label and correct.
    An abstention is not correct. Raises: ValueError for unusable numbers or lengths.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> table = certify(model, torch.rand(3, 1, 2, 2), sigma=0.25, n=50)
    >>> table.columns.tolist()
    ['image', 'predicted', 'radius', 'p_lower', 'k']
    """
    ids = _check(x, y, ids, sigma=sigma, n0=n0, n=n, alpha=alpha, batch_size=batch_size)
    rows = []
    with torch.inference_mode(), evaluating(model):
        for i, image in zip(ids, x, strict=True):
            first = _counts(
                model, image, n0, sigma, np.random.default_rng([seed, 0, i]), batch_size
            )
            chosen = int(first.argmax())
            k = int(
                _counts(model, image, n, sigma, np.random.default_rng([seed, 1, i]), batch_size)[
                    chosen
                ]
            )
            p = lower_bound(k, n, alpha=alpha)
            certain = p > 0.5
            rows.append(
                {
                    "image": i,
                    "predicted": chosen if certain else ABSTAIN,
                    "radius": sigma * float(norm.ppf(p)) if certain else 0.0,
                    "p_lower": p,
                    "k": k,
                }
            )
    table = pd.DataFrame(rows)
    if y is not None:
        table["label"] = y.cpu().numpy()
        table["correct"] = table.predicted == table.label
    return table


def predict(
    model: nn.Module,
    x: Tensor,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    ids: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """The smoothed class of each image, int64 [B], or ABSTAIN (-1) (Cohen et al. 2019, PREDICT).

    The most frequent class of `n` noisy copies, if a two-sided binomial test tells it from the runner-up at level
    alpha: an answer differs from the true smoothed class with probability alpha at most. Arguments as in `certify`;
    the draws are those that `certify` counts, so take another seed where the two must be independent.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> predict(model, torch.rand(3, 1, 2, 2), sigma=0.25, n=50).shape
    torch.Size([3])
    """
    ids = _check(x, None, ids, sigma=sigma, n=n, alpha=alpha, batch_size=batch_size)
    answers = []
    with torch.inference_mode(), evaluating(model):
        for i, image in zip(ids, x, strict=True):
            counts = _counts(
                model, image, n, sigma, np.random.default_rng([seed, 1, i]), batch_size
            )
            runner_up, top = np.sort(counts)[-2:].tolist()
            sure = binomtest(top, top + runner_up, 0.5).pvalue <= alpha
            answers.append(int(counts.argmax()) if sure else ABSTAIN)
    return torch.tensor(answers)


def certified_accuracy(
    table: pd.DataFrame, radii: Sequence[float], groups: Sequence, *, draws: int = 2000
) -> pd.DataFrame:
    """The share of images that are right and certified at each L2 radius, of all images of a `certify` table.

    groups: patient of each row. Columns: metric, value, ci_low, ci_high (95 %, by patient, see `metrics.share`), n,
    radius (pixel units). At radius 0 this is the smoothed model's accuracy, with abstentions as errors.
    Raises: ValueError for a table without labels, no rows, or a negative radius.

    >>> table = pd.DataFrame({"correct": [True, True, False], "radius": [0.5, 0.1, 0.9]})
    >>> certified_accuracy(table, [0, 0.2], groups="abc", draws=50).value.round(2).tolist()
    [0.67, 0.33]
    """
    missing = {"correct", "radius"} - set(table.columns)
    if missing or table.empty:
        raise ValueError(
            f"the table has no {sorted(missing) or 'rows'}: make it with certify(model, x, y, ...)"
        )
    if min(radii, default=0) < 0:
        raise ValueError(f"radii must not be negative, got {min(radii)}")
    right, radius = table.correct.to_numpy(dtype=bool), table.radius.to_numpy(dtype=float)
    rows = [
        metrics.share(right & (radius >= r), list(groups), draws=draws) | {"radius": r}
        for r in radii
    ]
    return pd.DataFrame(rows).assign(metric="certified_accuracy")


def lower_bound(k: int, n: int, *, alpha: float) -> float:
    """One-sided lower confidence bound of a probability seen k times in n (Clopper & Pearson 1934, Biometrika 26).

    >>> lower_bound(0, 10, alpha=0.05), round(lower_bound(10, 10, alpha=0.05), 6) == round(0.05**0.1, 6)
    (0.0, True)
    """
    return float(beta.ppf(alpha, k, n - k + 1)) if k else 0.0


def _counts(
    model: nn.Module,
    image: Tensor,
    n: int,
    sigma: float,
    draws: np.random.Generator,
    batch_size: int,
) -> np.ndarray:
    """How often the model gives each class [K] to n noisy copies of one image [C, H, W]."""
    device = next((parameter.device for parameter in model.parameters()), image.device)
    image, counts = image.to(device), 0
    for start in range(0, n, batch_size):
        # numpy's normal draws are the same in one piece or in several, torch's are not.
        noise = draws.standard_normal((min(batch_size, n - start), *image.shape), dtype=np.float32)
        logits = model(image + sigma * torch.from_numpy(noise).to(device))
        counts += torch.bincount(logits.argmax(1), minlength=logits.shape[1]).cpu().numpy()
    return counts


def _check(
    x: Tensor, y: Tensor | None, ids: Sequence[int] | None, *, alpha: float, **positive: float
) -> list[int]:
    """The images' ids, after a look at the arguments."""
    for name, value in positive.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not 0 < alpha < 0.5:
        raise ValueError(
            f"alpha is the probability of a wrong certificate, between 0 and 0.5; got {alpha}"
        )
    if x.ndim != 4 or not len(x):
        raise ValueError(f"x must be a non-empty batch [B, C, H, W], not {tuple(x.shape)}")
    if not (x.min() >= -1e-6 and x.max() <= 1 + 1e-6):
        raise ValueError(
            "x must lie in [0, 1]: pass pixels before normalisation, the model owns its mean and std"
        )
    ids = list(range(len(x))) if ids is None else [int(i) for i in ids]
    if len(ids) != len(x) or min(ids) < 0:
        raise ValueError(f"ids must be {len(x)} integers >= 0, one per image")
    if y is not None and len(y) != len(x):
        raise ValueError(f"y must hold one label per image: {len(y)} for {len(x)} images")
    return ids
