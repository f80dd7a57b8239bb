"""Random noise of the attack's size: the control that every gradient attack must beat."""

from __future__ import annotations

from torch import Tensor, nn

from ..units import check_numbers
from . import base


def noise(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, draws: int = 10, seed: base.Seed = 0
) -> base.AttackResult:
    """Try `draws` random points of the ball, inside and on its corners by turns (arXiv 1902.06705).

    Odd draws are uniform in the L-infinity ball, even ones +eps or -eps in every pixel. Fooled
    images leave. `first_success_step` is the number of the draw. Arguments: as `pgd`.

    >>> import torch
    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), torch.rand(1, 1, 2, 2)
    >>> noise(model, x, torch.tensor([0]), eps=8 / 255).backwards
    0
    """
    check_numbers("[1,inf)", whole=True, draws=draws)
    with base.search(model, x, y, eps=eps, seed=seed) as search:
        search.look()
        for draw, rows, rngs in search.rounds(range(1, draws + 1)):
            unit = base.uniform(search.x[rows], rngs)
            unit = unit.sign() if draw % 2 == 0 else unit
            search.ask(rows, search.reach(unit, search.x[rows]), draw)
        return search.result()
