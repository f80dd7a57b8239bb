"""DeepFool: walk to the nearest boundary of the linearised model, again and again."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..units import check_numbers
from . import base
from .base import TINY, per_image

OVERSHOOT = 0.02  # how far beyond the boundary
NUDGE = 1e-4  # length added to every step, as in the authors' code: past the boundary
CANDIDATES = 10  # the likeliest wrong classes looked at per step, one backward pass each


def deepfool(
    model: nn.Module, x: Tensor, y: Tensor, *, norm: str = "l2", steps: int = 50
) -> base.AttackResult:
    """Walk to the nearest linearised boundary until fooled (Moosavi-Dezfooli, arXiv 1511.04599).

    An image leaves once fooled. Nothing is drawn. Arguments: as `pgd`.

    >>> _ = torch.manual_seed(1)
    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), torch.ones(1, 1, 2, 2) / 2
    >>> deepfool(model, x, model(x).argmax(1)).first_success_step
    tensor([1])
    """
    check_numbers("[1,inf)", whole=True, steps=steps)
    with base.search(model, x, y, norm=norm) as search:
        rows = search.everyone
        points, total = search.x, torch.zeros_like(search.x)
        for step in range(steps):
            fooled, gaps, gradients = _boundaries(search, rows, points, step)
            if bool(fooled.all()):
                return search.result()
            total = (total + _shortest(gaps, gradients, norm))[~fooled]
            rows = rows[~fooled]
            points = (search.x[rows] + (1 + OVERSHOOT) * total).clamp(0, 1)
        search.ask(rows, points, steps)
        return search.result()


def _boundaries(
    search: base.Search, rows: Tensor, points: Tensor, step: int
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(who is fooled [n], per wrong class: logit gap [n], its gradient); none if all are fooled."""
    points, gaps, gradients = points.detach().requires_grad_(), [], []
    with torch.enable_grad():
        logits = search.answer(rows, points)
        said, y = logits.detach(), search.y[rows]
        fooled = search.record(rows, points.detach(), said, base.margin(said, y), step)
        if bool(fooled.all()):
            return fooled, gaps, gradients
        order = said.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
        for other in order[:, : min(CANDIDATES, logits.shape[1] - 1)].T:
            gap = (logits.gather(1, other[:, None]) - logits.gather(1, y[:, None]))[:, 0]
            gradients += torch.autograd.grad(gap.sum(), points, retain_graph=True)
            gaps.append(gap.detach())
            search.backwards += len(rows)
    return fooled, gaps, gradients


def _shortest(gaps: list[Tensor], gradients: list[Tensor], norm: str) -> Tensor:
    """The shortest change [n,C,H,W] that reaches a boundary of the linearised model."""
    nudge = NUDGE if norm == "l2" else NUDGE / math.sqrt(gradients[0][0].numel())
    best, change = torch.full_like(gaps[0], torch.inf), torch.zeros_like(gradients[0])
    for gap, gradient in zip(gaps, gradients, strict=True):
        rise = base.rise(gradient, norm)
        distance = torch.where(rise > 0, gap.abs() / rise.clamp_min(TINY), torch.inf)
        step = (distance + nudge).nan_to_num(posinf=0)
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        move = per_image(step) * base.ascent(gradient, norm)
        change = torch.where(per_image(nearer), move, change)
    return change
