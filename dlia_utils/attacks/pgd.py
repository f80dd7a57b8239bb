"""Projected gradient descent in the L-infinity or L2 ball."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from . import _contract as c
from ._ball import Ball


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    steps: int = 10,
    step_size: float | Tensor | None = None,
    restarts: int = 1,
    random_start: bool = True,
    loss: str = "ce",
    grey: bool = False,
    mask: Tensor | None = None,
    eot: int = 1,
    stop_when_fooled: bool = True,
    seed: int = 0,
    ids: Sequence[int] | None = None,
) -> c.AttackResult:
    """Many small steps, each projected back into the eps-ball. Source: Madry et al., arXiv 1706.06083.

    x: [B,C,H,W] in [0,1]. y: int64 [B]. eps, step_size: pixel units (k/255), of the largest change of a pixel
    with norm "linf", of the length of the whole change with "l2"; step_size defaults to 2.5 * eps / steps.
    loss: "ce", or "margin", which does not vanish on a saturated model. grey: one perturbation for R=G=B.
    mask: bool [B or 1,1,H,W] of the pixels that may change. stop_when_fooled: an image leaves the batch once
    fooled, and one that is wrong already is returned unchanged; otherwise every step is run and the strongest
    point is returned.
    eot: passes averaged per look at a model that is random in eval mode (arXiv 1802.00420); success then
    means that most of eot fresh passes of x_adv are wrong; an image leaves once all passes of a look are.
    Images do not influence each other, and the random start depends on (seed, restart, id) only.
    `first_success_step`: updates made, counted over restarts; a random start that fools counts as step 1.
    Errors: ValueError/TypeError for images outside [0,1], NaN, bad labels or a model in training mode.

    >>> import torch
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> result = pgd(model, torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), eps=8 / 255, steps=5)
    >>> bool(result.linf[0] <= 8 / 255 + 1e-6)
    True
    """
    objective = c.choose_loss(loss)
    x, ids = c.check_inputs(model, x, y, eps=eps, norm=norm, grey=grey, mask=mask, eot=eot, ids=ids)
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be >= 1, not {steps} and {restarts}")
    if restarts > 1 and not random_start:
        raise ValueError(
            "restarts > 1 without random_start repeats the same attack; set random_start=True"
        )
    eps = c.on_device(eps, x)
    whole = Ball(x, eps, norm=norm, grey=grey, mask=mask)
    step_size = 2.5 * eps / steps if step_size is None else c.on_device(step_size, x)

    ledger = c.Ledger(model, x, y, eot=eot)
    with c.frozen(model):
        if random_start:  # without it the first iterate is the clean image itself
            ledger.look(objective)
        for restart in range(restarts):
            rows = ledger.standing() if stop_when_fooled else ledger.everyone()
            if not len(rows):
                break
            ball = whole.of(rows)
            start = ball.x
            if random_start:
                start = ball.random([ids[i] for i in rows.tolist()], seed=seed, stream=restart)
            _climb(
                ledger,
                rows,
                ball,
                start,
                objective=objective,
                step_size=step_size,
                steps=steps,
                stop_when_fooled=stop_when_fooled,
                first=restart * steps,
                start_step=1 if random_start else 0,
            )
        return ledger.result(eps=eps, seed=seed if random_start else None)


def _climb(
    ledger: c.Ledger,
    rows: Tensor,
    ball: Ball,
    points: Tensor,
    *,
    objective: Callable[[Tensor, Tensor], Tensor],
    step_size: float | Tensor,
    steps: int,
    stop_when_fooled: bool,
    first: int,
    start_step: int,
) -> None:
    """Run one start of PGD for the images `rows`; every iterate, also the last, goes into the ledger."""
    for step in range(steps):
        wrong, value, gradient = c.gradient_at(
            ledger.model,
            points,
            ledger.y[rows],
            objective,
            eot=ledger.eot,
            check=step == 0,
            stop_when_fooled=stop_when_fooled,
        )
        fooled = ledger.record(rows, points, wrong, value, first + max(step, start_step))
        if gradient is not None:
            ledger.backwards += ledger.eot * len(rows)
        if stop_when_fooled and bool(fooled.any()):
            rows, points, ball = rows[~fooled], points[~fooled], ball.of(~fooled)
            if not len(rows):
                return
            gradient = gradient[~fooled]
        points = ball.project(points + step_size * ball.ascent(gradient))
    ledger.ask(rows, points, objective, first + max(steps, start_step))
