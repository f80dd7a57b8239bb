"""One-pixel (and k-pixel) attack by differential evolution, all images at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..progress import Bar
from . import _contract as c
from ._ball import Ball, free_pixels


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
    grey: bool = False,
    mask: Tensor | None = None,
    eot: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    progress: bool = False,
) -> c.AttackResult:
    """Rewrite `pixels` pixels, searched by differential evolution. Source: Su et al., arXiv 1710.08864.

    DE/rand/1/bin: a trial is a + f * (b - c), crossed into its parent gene by gene with probability `cr`, and
    replaces it when the margin (best wrong logit - true logit) is no lower. The genes of a pixel: row, column
    and a value per channel (one value with grey=True), |value - pixel| <= eps. No gradient is needed.
    mask: bool [B or 1,1,H,W] of the pixels that may be rewritten; a place outside it is drawn anew in it.
    eot: passes averaged per look at a model that is random in eval mode (arXiv 1802.00420); success then
    means that most of eot fresh passes of x_adv are wrong.
    x: [B,C,H,W] in [0,1]. y: int64 [B]. The candidates of all images share full batches of `batch_size`; a
    fooled image leaves at once. Draws depend on (seed, id) only.
    `first_success_step`: 1 is the first population, 1 + g generation g.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    >>> result = one_pixel(model, x, y, population=5, iterations=3)
    >>> bool(result.l0[0] <= 1)
    True
    """
    x, ids = c.check_inputs(model, x, y, eps=eps, grey=grey, mask=mask, eot=eot, ids=ids)
    _check_search(pixels, population, iterations, f, cr, batch_size)
    with c.frozen(model), torch.no_grad():
        search = _Search(
            model,
            Ball(x, float(eps), grey=grey, mask=mask),
            y,
            pixels,
            population,
            eot,
            batch_size,
            seed,
            ids,
        )
        search.first_population()
        bar = Bar(range(iterations), desc=f"{pixels}-pixel", disable=not progress)
        for generation in bar:
            if not len(search.standing):
                break
            bar.set_postfix(standing=len(search.standing))
            search.evolve(generation + 2, f, cr)
        result = search.result(eps, seed)
    return result


def _check_search(
    pixels: int, population: int, iterations: int, f: float, cr: float, batch_size: int
) -> None:
    if pixels < 1 or iterations < 0 or batch_size < 1:
        raise ValueError("pixels and batch_size must be >= 1 and iterations >= 0")
    if population < 4:
        raise ValueError(f"population must be >= 4 (a trial mixes three others), not {population}")
    if not (0 < f <= 2 and 0 <= cr <= 1):
        raise ValueError(f"f must lie in (0,2] and cr in [0,1], not {f} and {cr}")


class _Search:
    """The populations [B,P,pixels,2+V] of all images; a pixel's first two genes are its row and column."""

    def __init__(
        self,
        model: nn.Module,
        ball: Ball,
        y: Tensor,
        pixels: int,
        population: int,
        eot: int,
        batch_size: int,
        seed: int,
        ids: Sequence[int],
    ) -> None:
        x = ball.x
        self.model, self.x, self.y, self.eot, self.batch_size = model, x, y, eot, batch_size
        self.lower, self.upper = ball.lower, ball.upper
        self.x_adv = x.clone()
        self.rngs = [np.random.default_rng([seed, i]) for i in ids]
        self.free = free_pixels(ball)
        values, size = 1 if ball.grey else x.shape[1], x.shape[2:]
        draws = zip(self.rngs, self.free, strict=True)
        self.genes = np.stack(
            [_first_genes(rng, population, pixels, values, size, free) for rng, free in draws]
        )
        self.margins = np.full((len(x), population), -np.inf, dtype=np.float32)
        self.queries = np.zeros(len(x), dtype=np.int64)
        self.first_step = np.full(len(x), -1)
        self.standing = np.arange(len(x))

    def first_population(self) -> None:
        """Set aside the images that are wrong already, then ask about the first candidates of the others."""
        wrong = self._wrong_now()
        self.first_step[wrong] = 0
        self.standing = np.flatnonzero(~wrong)
        if len(self.standing):
            self._select(self.genes[self.standing], step=1)

    def evolve(self, step: int, f: float, cr: float) -> None:
        size = self.x.shape[2:]
        trials = [
            _trials(self.rngs[i], self.genes[i], f, cr, size, self.free[i]) for i in self.standing
        ]
        self._select(np.stack(trials), step)

    def result(self, eps: float, seed: int) -> c.AttackResult:
        """The best candidate of each attacked image, judged once more by a plain forward."""
        attacked = np.flatnonzero(self.first_step != 0)
        if len(attacked):
            best = self.margins[attacked].argmax(1)
            self.x_adv[attacked] = self._write(attacked, self.genes[attacked, best])
        success = self._wrong_now()
        self.first_step[~success] = -1
        as_tensor = torch.from_numpy
        device = self.x.device
        return c.build_result(
            self.x,
            self.x_adv,
            as_tensor(success).to(device),
            as_tensor(self.first_step).to(device),
            as_tensor(self.queries).to(device),
            0,
            eps=eps,
            seed=seed,
        )

    def _wrong_now(self) -> np.ndarray:
        wrong = []
        for part, labels in zip(
            self.x_adv.split(self.batch_size), self.y.split(self.batch_size), strict=True
        ):
            wrong.append(
                c.answer(self.model, part, labels, c.margin, eot=self.eot, check=True)[0] > 0.5
            )
        self.queries += self.eot
        return torch.cat(wrong).cpu().numpy()

    def _select(self, trials: np.ndarray, step: int) -> None:
        """Ask about trials [n,P,pixels,2+V], keep the better of trial and parent, drop the fooled images."""
        rows = self.standing
        margins, fooling = self._ask(rows, trials)
        better = margins >= self.margins[rows]
        self.genes[rows] = np.where(better[..., None, None], trials, self.genes[rows])
        self.margins[rows] = np.where(better, margins, self.margins[rows])
        self.queries[rows] += self.eot * trials.shape[1]
        fooled = fooling.any(1)
        self.first_step[rows[fooled]] = step
        self.standing = rows[~fooled]

    def _ask(self, rows: np.ndarray, trials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(margins, whether every pass is wrong) [n,P] of the candidates, in full batches across images."""
        images = np.repeat(rows, trials.shape[1])
        flat = trials.reshape(len(images), *trials.shape[2:])
        margins, fooling = [], []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            labels = self.y[torch.from_numpy(images[part]).to(self.y.device)]
            written = self._write(images[part], flat[part])
            wrong, value = c.answer(self.model, written, labels, c.margin, eot=self.eot)
            margins.append(value.float())
            fooling.append(wrong == 1)
        shape = trials.shape[:2]
        return tuple(torch.cat(parts).cpu().numpy().reshape(shape) for parts in (margins, fooling))

    def _write(self, images: np.ndarray, genes: np.ndarray) -> Tensor:
        """Copies of the clean images [n,C,H,W] with the pixels of genes [n,pixels,2+V] written into them."""
        images = torch.from_numpy(images).to(self.x.device)
        genes = torch.from_numpy(genes).to(self.x.device)
        written, n = self.x[images], torch.arange(len(images), device=self.x.device)
        for k in range(
            genes.shape[1]
        ):  # one pixel after the other: of two at the same place the last one counts
            row, column = genes[:, k, 0].long(), genes[:, k, 1].long()
            low, high = self.lower[images, :, row, column], self.upper[images, :, row, column]
            written[n, :, row, column] = torch.clamp(
                genes[:, k, 2:].to(self.x.dtype).expand_as(low), low, high
            )
        return written


def _first_genes(
    rng: np.random.Generator,
    population: int,
    pixels: int,
    values: int,
    size: torch.Size,
    free: np.ndarray | None,
) -> np.ndarray:
    """Places uniform, values normal(0.5, 0.5) cut to [0,1], as in the paper."""
    places = _places(rng, (population, pixels), size, free)
    intensities = rng.normal(0.5, 0.5, size=(population, pixels, values)).clip(0, 1)
    return np.concatenate([places, intensities], axis=2).astype(np.float32)


def _places(
    rng: np.random.Generator, shape: tuple[int, ...], size: torch.Size, free: np.ndarray | None
) -> np.ndarray:
    """Uniform rows and columns [*shape,2] of the image, or of its free pixels."""
    if free is None:
        return rng.integers(0, np.array(size), size=(*shape, 2))
    return free[rng.integers(0, len(free), size=shape)]


def _trials(
    rng: np.random.Generator,
    genes: np.ndarray,
    f: float,
    cr: float,
    size: torch.Size,
    free: np.ndarray | None,
) -> np.ndarray:
    """One trial per member of a population [P,pixels,2+V] by DE/rand/1/bin.

    Places are rounded and wrap round the border, as clipping would crowd them there; values are clipped.
    """
    a, b, other = genes[_three_others(rng, len(genes))].swapaxes(0, 1)
    mutant = a + np.float32(f) * (b - other)
    mutant[..., :2] = np.floor(mutant[..., :2] + 0.5) % np.array(size, dtype=np.float32)
    mutant[..., 2:] = mutant[..., 2:].clip(0, 1)
    flat = genes[0].size
    crossed = rng.random((len(genes), flat)) < cr
    crossed[np.arange(len(genes)), rng.integers(0, flat, len(genes))] = (
        True  # at least one gene changes
    )
    trials = np.where(crossed.reshape(genes.shape), mutant, genes)
    if free is not None:
        allowed = np.zeros(size, dtype=bool)
        allowed[tuple(free.T)] = True
        outside = ~allowed[tuple(np.moveaxis(trials[..., :2].astype(np.int64), -1, 0))]
        trials[outside, :2] = _places(rng, (int(outside.sum()),), size, free)
    return trials


def _three_others(rng: np.random.Generator, population: int) -> np.ndarray:
    """For each member three different members, none of them itself: [P,3].

    >>> picks = _three_others(np.random.default_rng(0), 4)
    >>> bool((np.sort(np.column_stack([np.arange(4), picks])) == np.arange(4)).all())
    True
    """
    taken = np.arange(population)[:, None]
    picks = []
    for k in range(3):
        pick = rng.integers(0, population - 1 - k, population)
        for column in np.sort(taken, axis=1).T:  # step over those already taken, from the smallest
            pick += pick >= column
        picks.append(pick)
        taken = np.column_stack([taken, pick])
    return np.column_stack(picks)
