"""Random noise of the attack's size: the control every gradient attack must beat."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from . import _contract as c
from ._ball import Ball


def noise(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    draws: int = 10,
    grey: bool = False,
    mask: Tensor | None = None,
    eot: int = 1,
    seed: int = 0,
    ids: Sequence[int] | None = None,
) -> c.AttackResult:
    """Try `draws` random points of the eps-ball, by turns inside and on its corners (arXiv 1902.06705).

    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps: pixel units (k/255); with norm "l2" the length of the whole
    change. grey: one perturbation for R=G=B. mask: bool [B or 1,1,H,W] of the pixels that may change.
    Odd draws are uniform in the L-infinity ball, even ones +eps or -eps in every pixel; with "l2" both are
    brought to the length eps, at which nearly all of a ball of many dimensions lies, and cut to [0,1] then: in the
    black borders of a radiograph half of a random change is lost. Fooled images leave.
    eot: passes averaged per look at a model that is random in eval mode (arXiv 1802.00420); success then
    means that most of eot fresh passes of x_adv are wrong.
    A draw depends on (seed, draw, id) only; `first_success_step` is the number of the draw.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> import torch
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> result = noise(model, torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), eps=8 / 255, draws=3)
    >>> bool(result.linf[0] <= 8 / 255 + 1e-6), result.backwards
    (True, 0)
    """
    x, ids = c.check_inputs(model, x, y, eps=eps, norm=norm, grey=grey, mask=mask, eot=eot, ids=ids)
    if draws < 1:
        raise ValueError(f"draws must be >= 1, not {draws}")
    whole = Ball(x, c.on_device(eps, x), norm=norm, grey=grey, mask=mask)
    ledger = c.Ledger(model, x, y, eot=eot)
    with c.frozen(model):
        ledger.look(c.margin)
        for draw in range(1, draws + 1):
            rows = ledger.standing()
            if not len(rows):
                break
            ball = whole.of(rows)
            unit = c.uniform(
                ball.x, [ids[i] for i in rows.tolist()], seed=seed, stream=draw, grey=grey
            )
            if draw % 2 == 0:
                unit = unit.sign()
            ledger.ask(rows, ball.at(unit), c.margin, draw)
        return ledger.result(eps=eps, seed=seed)
