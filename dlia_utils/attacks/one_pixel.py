"""One-pixel (and k-pixel) attack by differential evolution, all images at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..units import check_numbers
from . import base

BATCH = 256  # candidates of all images share batches of this size


def one_pixel(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 1.0,
    pixels: int = 1,
    population: int = 60,
    iterations: int = 120,
    f: float = 0.5,
    cr: float = 0.9,
    seed: base.Seed = 0,
) -> base.AttackResult:
    """Rewrite `pixels` pixels, searched by differential evolution (Su et al., arXiv 1710.08864).

    DE/rand/1/bin: a trial is a + f * (b - c), crossed into its parent gene by gene with probability
    `cr`, and replaces it when the margin is no lower. The genes of a pixel: row, column and a value
    per channel, |value - pixel| <= eps. A fooled image leaves. `first_success_step`: 1 is the first
    population, 1 + g generation g. Arguments: as `pgd`.

    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), torch.rand(1, 1, 2, 2)
    >>> result = one_pixel(model, x, torch.tensor([0]), population=5, iterations=3)
    >>> int((result.x_adv != x).sum()) <= 1
    True
    """
    check_numbers("[1,inf)", whole=True, pixels=pixels)
    check_numbers("[0,inf)", whole=True, iterations=iterations)
    check_numbers("[4,inf)", whole=True, population=population)  # a trial mixes three others
    check_numbers("(0,2]", f=f)
    check_numbers("[0,1]", cr=cr)
    with base.search(model, x, y, eps=eps, seed=seed) as search, torch.no_grad():
        search.look()
        x_adv, places = search.x.clone(), np.array(x.shape[2:])
        for _, rows, _ in search.rounds(range(1)):
            rngs = [np.random.default_rng(search.keys[row]) for row in rows.tolist()]
            shape = (population, pixels, 2 + x.shape[1])
            genes = np.stack([_first_genes(rng, shape, places) for rng in rngs])
            step, margins, trials = 1, np.full(genes.shape[:2], -np.inf, np.float32), genes
            standing = np.arange(len(rows))
            while True:
                own = rows[torch.from_numpy(standing).to(rows.device)]
                margin, fooled = _ask(search, own, trials)
                better = margin >= margins[standing]
                genes[standing] = np.where(better[..., None, None], trials, genes[standing])
                margins[standing] = np.where(better, margin, margins[standing])
                search.first_step[own[torch.from_numpy(fooled).to(rows.device)]] = step
                standing, step = standing[~fooled], step + 1
                if not len(standing) or step > iterations + 1:
                    break
                trials = np.stack([_trials(rngs[i], genes[i], f, cr, places) for i in standing])
            best = genes[np.arange(len(genes)), margins.argmax(1)]
            x_adv[rows] = _write(search.x[rows], best, eps)
        fooled, _ = search.ask(search.everyone, x_adv, iterations + 1)  # judged by a plain forward
        search.first_step[~fooled] = -1
        return search.result(x_adv, fooled)


def _ask(search: base.Search, rows: Tensor, trials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(margins [n,P], whose candidates fool [n]) of trials [n,P,pixels,2+C], in full batches."""
    n, population = trials.shape[:2]
    images, flat = rows.repeat_interleave(population), trials.reshape(-1, *trials.shape[2:])
    margins, fooling = [], []
    for start in range(0, len(images), BATCH):
        own = images[start : start + BATCH]
        logits = search.model(_write(search.x[own], flat[start : start + BATCH], search.eps))
        margins.append(base.margin(logits, search.y[own]).float())
        fooling.append(base.wrong(logits, search.y[own]))
    search.queries[rows] += population
    margins, fooling = (torch.cat(parts).cpu().numpy() for parts in (margins, fooling))
    return margins.reshape(n, -1), fooling.reshape(n, -1).any(1)


def _write(x: Tensor, genes: np.ndarray, eps: float) -> Tensor:
    """Copies of images [n,C,H,W] with the pixels of genes [n,pixels,2+C] written into them."""
    written, n = x.clone(), torch.arange(len(x), device=x.device)
    # One pixel after the other: of two at the same place the last one counts.
    for pixel in torch.from_numpy(genes).to(x.device).unbind(1):
        row, column = pixel[:, 0].long(), pixel[:, 1].long()
        was = x[n, :, row, column]
        low, high = (was - eps).clamp(min=0), (was + eps).clamp(max=1)
        written[n, :, row, column] = torch.clamp(pixel[:, 2:].to(x.dtype), low, high)
    return written


def _first_genes(rng: np.random.Generator, shape: tuple, places: np.ndarray) -> np.ndarray:
    """Places uniform, values normal(0.5, 0.5) cut to [0,1], as in the paper: [P,pixels,2+C]."""
    where = rng.integers(0, places, size=(*shape[:2], 2))
    values = rng.normal(0.5, 0.5, size=(*shape[:2], shape[2] - 2)).clip(0, 1)
    return np.concatenate([where, values], axis=2).astype(np.float32)


def _trials(
    rng: np.random.Generator, genes: np.ndarray, f: float, cr: float, places: np.ndarray
) -> np.ndarray:
    """One trial per member of a population [P,pixels,2+C] by DE/rand/1/bin.

    Places are rounded and wrap round the border, where clipping would crowd them.
    """
    taken = np.arange(len(genes))[:, None]  # for each member three others, none of them itself
    for k in range(3):
        pick = rng.integers(0, len(genes) - 1 - k, len(genes))
        for column in np.sort(taken, axis=1).T:  # step over those already taken, from the smallest
            pick += pick >= column
        taken = np.column_stack([taken, pick])
    a, b, other = genes[taken[:, 1:]].swapaxes(0, 1)
    mutant = a + np.float32(f) * (b - other)
    mutant[..., :2] = np.floor(mutant[..., :2] + 0.5) % places.astype(np.float32)
    mutant[..., 2:] = mutant[..., 2:].clip(0, 1)
    flat = genes[0].size
    crossed = rng.random((len(genes), flat)) < cr
    crossed[np.arange(len(genes)), rng.integers(0, flat, len(genes))] = True  # at least one gene
    return np.where(crossed.reshape(genes.shape), mutant, genes)
