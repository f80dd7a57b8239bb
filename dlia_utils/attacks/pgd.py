"""Projected gradient descent in the L-infinity or L2 ball."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..units import check_numbers
from . import base


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    steps: int = 10,
    restarts: int = 1,
    loss: str = "ce",
    stop_when_fooled: bool = True,
    seed: base.Seed = 0,
) -> base.AttackResult:
    """Steps of 2.5 eps / steps, each projected back into the ball (Madry et al., arXiv 1706.06083).

    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps: pixel units (k/255), of the largest change of a pixel
    or, with norm "l2", of the length of the change. restarts: random starts; 0: from the image
    itself. loss: "ce", or "margin", which does not vanish on a saturated model. stop_when_fooled:
    an image leaves once fooled; otherwise all steps are run for the strongest point.
    seed: a number, or a pair (seed, image) per image: its draws depend on nothing else.
    `first_success_step`: updates made, over all restarts; a random start counts as step 1.
    Raises: ValueError/TypeError for images outside [0,1], bad labels, a model in training mode.

    >>> import torch
    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), torch.rand(1, 1, 2, 2)
    >>> bool(pgd(model, x, torch.tensor([0]), eps=8 / 255).linf[0] <= 8 / 255 + 1e-6)
    True
    """
    check_numbers("[1,inf)", whole=True, steps=steps)
    check_numbers("[0,inf)", whole=True, restarts=restarts)
    with base.search(model, x, y, eps=eps, norm=norm, loss=loss, seed=seed) as search:
        if not restarts:  # the first point is the clean image itself
            _climb(search, search.everyone, search.x, range(steps + 1), stop_when_fooled)
            return search.result()
        search.look()
        for restart, rows, rngs in search.rounds(range(restarts), everyone=not stop_when_fooled):
            start = search.reach(base.uniform(search.x[rows], rngs), search.x[rows])
            counts = [restart * steps + max(step, 1) for step in range(steps + 1)]
            _climb(search, rows, start, counts, stop_when_fooled)
        return search.result()


def _climb(
    search: base.Search, rows: Tensor, points: Tensor, counts: Sequence[int], stop: bool
) -> None:
    """One run for the images `rows`; every point, also the last, is judged, as these steps."""
    x, eps, norm = search.x[rows], search.eps, search.norm
    step_size = 2.5 * eps / (len(counts) - 1)
    for count in counts[:-1]:
        fooled, _, gradient = search.gradient(rows, points, count, lazy=stop)
        if gradient is None:
            return
        if stop and bool(fooled.any()):
            kept = ~fooled
            rows, points, x, gradient = rows[kept], points[kept], x[kept], gradient[kept]
        points = base.project(points + step_size * base.ascent(gradient, norm), x, eps, norm)
    search.ask(rows, points, counts[-1])
