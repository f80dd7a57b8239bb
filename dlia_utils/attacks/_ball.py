"""Where an attack may go: the ball of a norm round an image cut with [0,1], grey and masked on request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _contract as c

TINY = 1e-30  # keeps 0 / 0 of an image without a gradient at 0


def size(change: Tensor, norm: str) -> Tensor:
    """Length of a change [B,C,H,W] per image [B]: "linf" the largest pixel, "l2" the Euclidean length.

    >>> size(torch.tensor([[[[0.3, -0.4]]]]), "l2")
    tensor([0.5000])
    """
    flat = change.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def dual_size(gradient: Tensor, norm: str) -> Tensor:
    """How much a linear function rises per unit of the norm, per image [B]: L1 for "linf", L2 for "l2"."""
    flat = gradient.flatten(1)
    return flat.abs().sum(1) if norm == "linf" else flat.norm(dim=1)


def per_image(value: Tensor) -> Tensor:
    """[B] as [B,1,1,1]."""
    return value[:, None, None, None]


class Ball:
    """Allowed points round x [B,C,H,W]: radius eps in a norm, pixels in [0,1], grey and masked on request.

    eps: pixel units; None: no radius, only [0,1]. mask: bool [B,1,H,W], False where a pixel must stay.
    """

    def __init__(
        self,
        x: Tensor,
        eps: float | Tensor | None,
        *,
        norm: str = "linf",
        grey: bool = False,
        mask: Tensor | None = None,
    ) -> None:
        self.x, self.eps, self.norm, self.grey, self.mask = x, eps, norm, grey, mask
        self.lower, self.upper = c.ball(x, eps if norm == "linf" and eps is not None else 1.0)
        if mask is not None:
            self.lower, self.upper = torch.where(mask, self.lower, x), torch.where(mask, self.upper, x)

    def of(self, rows: Tensor) -> Ball:
        """The ball of some of the images."""
        mask = None if self.mask is None else self.mask[rows]
        return Ball(self.x[rows], self.eps, norm=self.norm, grey=self.grey, mask=mask)

    def project(self, points: Tensor, radius: Tensor | None = None) -> Tensor:
        """Points moved into the ball; radius: one per image [B] that takes the place of eps.

        An L2 change is cut to [0,1] first and shortened then, which keeps it there: the other way round,
        black borders would use up the budget.
        """
        if self.norm == "linf" and radius is not None:
            points = torch.clamp(points, self.x - per_image(radius), self.x + per_image(radius))
        points = torch.clamp(points, self.lower, self.upper)
        if self.norm == "linf" or (radius is None and self.eps is None):
            return points
        change = points - self.x
        radius = torch.full_like(change[:, 0, 0, 0], self.eps) if radius is None else radius
        share = (radius / size(change, "l2").clamp_min(TINY)).clamp(max=1)
        return torch.clamp(self.x + change * per_image(share), self.lower, self.upper)

    def allowed(self, gradient: Tensor) -> Tensor:
        """The part of a gradient along allowed changes: equal in all channels (grey), zero outside the mask.

        An orthogonal projection, so that its dual size is the true rise per unit of allowed change.
        """
        if self.grey:
            gradient = gradient.mean(1, keepdim=True).expand_as(gradient)
        return gradient if self.mask is None else gradient * self.mask

    def ascent(self, gradient: Tensor) -> Tensor:
        """The allowed change of length 1 in the norm along which the gradient promises most."""
        gradient = self.allowed(gradient)
        if self.norm == "linf":
            return gradient.sign()
        return gradient / per_image(size(gradient, "l2").clamp_min(TINY))

    def random(self, ids: Sequence[int], *, seed: int, stream: int) -> Tensor:
        """A random point per image: uniform in the cube, or a random direction at the length eps ("l2")."""
        draw = c.uniform(self.x, ids, seed=seed, stream=stream, grey=self.grey)
        if self.norm == "l2":
            draw = self.allowed(draw.expand_as(self.x))
            draw = draw / per_image(size(draw, "l2").clamp_min(TINY))
        return self.project(self.x + self.eps * draw)


def record_smallest(
    ledger: c.Ledger, rows: Tensor, points: Tensor, logits: Tensor, *, norm: str, step: int
) -> Tensor:
    """Note an answer in the search for the smallest change; returns which images are fooled [n]."""
    return ledger.record(rows, points, logits, -size(points - ledger.x[rows], norm), step)


def smallest_result(ledger: c.Ledger, *, eps: float | None, norm: str) -> c.AttackResult:
    """The smallest fooling points; with eps those further away than eps give way to the clean image."""
    if eps is not None:
        far = ledger.fooled & (size(ledger.x_adv - ledger.x, norm) > eps)
        ledger.x_adv[far], ledger.fooled[far], ledger.first_step[far] = ledger.x[far], False, -1
    return ledger.result(eps=eps, seed=None)
