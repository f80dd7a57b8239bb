"""Where an attack may go: the ball of a norm round an image cut with [0,1], grey and masked on request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
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


def border(x: Tensor, width: int) -> Tensor:
    """Mask [1,1,H,W] of the pixels within `width` of the edges of x [B,C,H,W]: an attack outside the anatomy.

    Errors: ValueError when the width is not from 1 up to half the shorter side.

    >>> border(torch.rand(2, 1, 3, 4), 1)[0, 0].int().tolist()
    [[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    """
    height, wide = x.shape[2:]
    if not 1 <= width <= min(height, wide) // 2:
        raise ValueError(f"width must be from 1 to {min(height, wide) // 2} pixels, not {width}")
    mask = torch.ones(1, 1, height, wide, dtype=torch.bool, device=x.device)
    mask[:, :, width : height - width, width : wide - width] = False
    return mask


class Ball:
    """Allowed points round x [B,C,H,W]: radius eps in a norm, pixels in [0,1], grey and masked on request.

    eps: pixel units; None: no radius, only [0,1]. mask: bool [B,1,H,W] or [1,1,H,W], False where a pixel must
    stay.
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
        mask = None if mask is None else mask.expand(len(x), -1, -1, -1)
        self.x, self.eps, self.norm, self.grey, self.mask = x, eps, norm, grey, mask
        self.lower, self.upper = c.ball(x, eps if norm == "linf" and eps is not None else 1.0)
        if mask is not None:
            self.lower, self.upper = (
                torch.where(mask, self.lower, x),
                torch.where(mask, self.upper, x),
            )

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

    def at(self, draw: Tensor) -> Tensor:
        """The point in the direction of a draw in [-1,1]: at eps times the draw; "l2": at the length eps."""
        if self.norm == "l2":
            draw = self.allowed(draw.expand_as(self.x))
            draw = draw / per_image(size(draw, "l2").clamp_min(TINY))
        return self.project(self.x + self.eps * draw)

    def random(self, ids: Sequence[int], *, seed: int, stream: int) -> Tensor:
        """A random point per image: uniform in the cube, or a random direction at the length eps ("l2")."""
        return self.at(c.uniform(self.x, ids, seed=seed, stream=stream, grey=self.grey))


def free_pixels(ball: Ball) -> list[np.ndarray | None]:
    """Row and column of the pixels of each image's mask [n,2]; None where every pixel may change, or none."""
    if ball.mask is None:
        return [None] * len(ball.x)
    places = [np.argwhere(plane) for plane in ball.mask[:, 0].cpu().numpy()]
    return [found if len(found) else None for found in places]


def record_smallest(
    ledger: c.Ledger, rows: Tensor, points: Tensor, wrong: Tensor, *, norm: str, step: int
) -> Tensor:
    """Note an answer in the search for the smallest change; returns which images are fooled [n]."""
    return ledger.record(rows, points, wrong, -size(points - ledger.x[rows], norm), step)


def look_smallest(ledger: c.Ledger, *, norm: str) -> None:
    """Ask the model about the clean images: those it gets wrong are fooled at step 0, by no change."""
    wrong, _ = c.answer(ledger.model, ledger.x, ledger.y, c.margin, eot=ledger.eot, check=True)
    record_smallest(ledger, ledger.everyone(), ledger.x, wrong, norm=norm, step=0)


def smallest_result(ledger: c.Ledger, *, eps: float | None, norm: str) -> c.AttackResult:
    """The smallest fooling points; with eps those further away are brought to eps and judged once more there.

    One that fools no longer gives way to the clean image.
    """
    if eps is not None:
        far = torch.nonzero(ledger.fooled & (size(ledger.x_adv - ledger.x, norm) > eps))[:, 0]
        if len(far):
            x = ledger.x[far]
            points = Ball(x, eps, norm=norm).project(ledger.x_adv[far])
            wrong, _ = c.answer(ledger.model, points, ledger.y[far], c.margin, eot=ledger.eot)
            kept = wrong == 1
            ledger.queries[far] += ledger.eot
            ledger.x_adv[far] = torch.where(per_image(kept), points, x)
            ledger.fooled[far] = kept
            lost = far[~kept]
            ledger.first_step[lost], ledger.held_step[lost] = -1, 0
    return ledger.result(eps=eps, seed=None)
