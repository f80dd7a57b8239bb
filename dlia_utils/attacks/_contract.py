"""What every attack shares: the result, the checks of the input, the untouched model, the book-keeping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

TOLERANCE = 1e-6
HARMLESS = (  # modules of torch that do the same in training mode; containers of the caller are looked into
    *(
        nn.Sequential,
        nn.ModuleList,
        nn.ModuleDict,
        nn.Identity,
        nn.Flatten,
        nn.Unflatten,
        nn.Linear,
        nn.Bilinear,
    ),
    *(
        nn.modules.conv._ConvNd,
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.ELU,
        nn.GELU,
        nn.SiLU,
        nn.Sigmoid,
        nn.Tanh,
        nn.Softmax,
    ),
    *(
        nn.modules.pooling._MaxPoolNd,
        nn.modules.pooling._AvgPoolNd,
        nn.modules.pooling._AdaptiveAvgPoolNd,
    ),
    *(
        nn.modules.pooling._AdaptiveMaxPoolNd,
        nn.modules.padding._ReflectionPadNd,
        nn.LayerNorm,
        nn.GroupNorm,
    ),
)
NORMS = ("linf", "l2")


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, per image of the batch.

    x_adv               [B,C,H,W] in [0,1]
    success             [B] bool: the model is wrong on x_adv (with eot > 1: in most of eot fresh passes)
    first_success_step  [B] int64: -1 never, 0 wrong before any step, else the step that fooled it first
    queries             [B] int64: forward passes spent on each image
    linf, l2, l0        [B] float: size of x_adv - x in pixel units; l0 counts changed pixel positions
    forwards, backwards image-passes of the whole batch
    eps                 the largest eps over channels; None: no budget; seed: None when nothing was drawn
    """

    x_adv: Tensor
    success: Tensor
    first_success_step: Tensor
    forwards: int
    backwards: int
    queries: Tensor
    linf: Tensor
    l2: Tensor
    l0: Tensor
    eps: float | None
    seed: int | None


# ------------------------------------------------------------------------------------------- checks


def check_inputs(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor | None,
    norm: str = "linf",
    grey: bool = False,
    mask: Tensor | None = None,
    eot: int = 1,
    ids: Sequence[int] | None = None,
) -> tuple[Tensor, list[int]]:
    """Refuse what would give a wrong number without a word; returns (a clamped copy of x, the image ids).

    x: [B,C,H,W] in [0,1]; y: int64 [B]; eps: pixel units of [0,1], a number or, for "linf", a tensor [C,1,1];
    None: no budget. norm: "linf" or "l2". mask: bool [B,1,H,W] of the pixels that may change, or one plane
    [1,1,H,W] for all images. eot: passes per look at an image.
    Errors: TypeError or ValueError that names the argument and the fix.
    """
    _check_model(model)
    _check_images(x)
    _check_labels(y, x)
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {list(NORMS)}, not {norm!r}")
    if eps is not None:
        _check_eps(eps, x, norm, grey)
    if mask is not None:
        _check_mask(mask, x)
    if grey and x.shape[1] > 1 and not bool((x == x[:, :1]).all()):
        raise ValueError(
            "grey=True needs grey images, but the channels of x differ; pass grey=False"
        )
    if eot < 1:
        raise ValueError(
            f"eot must be >= 1 (the passes of a random model that are averaged), not {eot}"
        )
    ids = [int(i) for i in ids] if ids is not None else list(range(len(x)))
    if len(ids) != len(x) or min(ids) < 0:
        raise ValueError(f"ids must be {len(x)} integers >= 0, one per image")
    return x.detach().clamp(0, 1), ids


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        if module.training and _changes_in_training(module):
            where = f"{name or 'the model'} ({type(module).__name__})"
            raise ValueError(
                f"{where} is in training mode and would be random or change; call model.eval()"
            )


def _changes_in_training(module: nn.Module) -> bool:
    # A parametrization such as spectral_norm runs a power iteration in train mode: its buffers change.
    if parametrize.is_parametrized(module):
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    # Any other layer may drop paths, draw slopes or update statistics: only what is known not to is let through.
    return not isinstance(module, HARMLESS) and (
        not any(module.children()) or type(module).__module__.startswith("torch")
    )


def _check_images(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            "x must be a floating-point tensor in [0,1]; for uint8 use images.float() / 255"
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"x must be float32 or float64, not {x.dtype}: half precision rounds a change out of its ball; use x.float(), "
            "and torch.autocast inside the model where it shall be fast"
        )
    if x.ndim != 4 or not x.numel():
        raise ValueError(f"x must be a non-empty batch [B,C,H,W], not {tuple(x.shape)}")
    low, high = (v.item() for v in x.detach().aminmax())
    if not low - high <= 0:  # NaN compares false with everything
        raise ValueError("x contains NaN")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(
            f"x must lie in [0,1] but spans [{low:.4g}, {high:.4g}]: pass pixels before normalisation, "
            "the model owns its mean and std: models.wrap(net, mean=, std=)"
        )


def _check_labels(y: Tensor, x: Tensor) -> None:
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError("y must be an int64 tensor of class numbers; use labels.long()")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have shape [{len(x)}], one label per image, not {list(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"x is on {x.device} but y on {y.device}; move y with y.to(x.device)")
    if y.min() < 0:
        raise ValueError(f"y holds the negative label {int(y.min())}")


def _check_eps(eps: float | Tensor, x: Tensor, norm: str, grey: bool) -> None:
    values = torch.as_tensor(eps)
    if not bool((values >= 0).all()):
        raise ValueError(f"eps must be >= 0, not {eps}")
    if norm == "l2":
        if values.ndim or not bool(values.isfinite()):
            raise ValueError(
                f"eps of an L2 ball must be one finite number, not {eps}; give a float"
            )
        return
    if bool((values > 1).any()):
        raise ValueError(
            f"eps={eps} is larger than the pixel range [0,1]: give pixel units, such as 8/255"
        )
    if values.ndim and values.shape != (x.shape[1], 1, 1):
        raise ValueError(
            f"eps per channel must have shape [{x.shape[1]},1,1] for x with {x.shape[1]} channel(s), not "
            f"{list(values.shape)}; expand grey images first with x.expand(-1, 3, -1, -1)"
        )
    if grey and values.numel() > 1 and bool((values != values.flatten()[0]).any()):
        raise ValueError(
            "grey=True shares one perturbation over the channels: give one eps for all"
        )


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError("mask must be a bool tensor, True where a pixel may change; use mask > 0")
    if mask.shape[0:1] not in ((1,), (len(x),)) or mask.shape[1:] != (1, *x.shape[2:]):
        raise ValueError(
            f"mask must have shape {[len(x), 1, *x.shape[2:]]}, one plane per image, or [1,1,H,W], one for "
            f"all, not {list(mask.shape)}; resize or reshape it"
        )
    if mask.device != x.device:
        raise ValueError(
            f"x is on {x.device} but mask on {mask.device}; move mask with mask.to(x.device)"
        )


def check_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Return the logits [B,K] when they fit the labels; ValueError otherwise."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return a tensor of logits [B,K], not {type(logits).__name__}: wrap it so that it does"
        )
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"the model must return logits [B,K] with K >= 2 classes, not {tuple(logits.shape)}; a single logit z of "
            "class 1 becomes two by torch.cat([torch.zeros_like(z), z], dim=1)"
        )
    if int(y.max()) >= logits.shape[1]:
        raise ValueError(
            f"y holds label {int(y.max())} but the model has classes 0..{logits.shape[1] - 1}"
        )
    if not bool(logits.isfinite().all()):
        raise ValueError("the model returns NaN or infinite logits on these images")
    return logits


# ------------------------------------------------------------------------------------------- model


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Parameters take no gradient inside; every flag is put back on leaving, also after an error.

    >>> layer = nn.Linear(2, 2)
    >>> with frozen(layer):
    ...     layer.weight.requires_grad
    False
    >>> layer.weight.requires_grad
    True
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per image [B]; its gradient is exactly zero where float32 softmax saturates."""
    return nn.functional.cross_entropy(logits.float(), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Best wrong logit minus true logit, per image [B]: positive when the model is wrong; cannot saturate.

    Works for any number of classes >= 2. Source: Carlini and Wagner, arXiv 1608.04644.

    >>> margin(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor([-2.,  2.])
    """
    true = y[:, None]
    others = logits.scatter(1, true, -torch.inf).max(1).values
    return others - logits.gather(1, true)[:, 0]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "margin": margin}


def choose_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss by name, "ce" or "margin"; ValueError otherwise."""
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {sorted(LOSSES)}, not {name!r}")
    return LOSSES[name]


# ------------------------------------------------------------------------------------------- ball and draws


def device_of(model: nn.Module, images: Tensor) -> torch.device:
    """Where the model's parameters lie, or the images for a model without any."""
    return next((parameter.device for parameter in model.parameters()), images.device)


def on_device(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number as it is, a tensor moved to where x is."""
    return value.to(x) if isinstance(value, Tensor) else float(value)


def ball(x: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bound per pixel of the eps-ball cut with [0,1]."""
    return (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)


def uniform(x: Tensor, ids: Sequence[int], *, seed: int, stream: int, grey: bool) -> Tensor:
    """Uniform draws in [-1,1] shaped like x (one channel if grey), each from (seed, stream, id) only."""
    shape = (1 if grey else x.shape[1], *x.shape[2:])
    draws = [np.random.default_rng([seed, stream, i]).random(shape, dtype=np.float32) for i in ids]
    return torch.from_numpy(np.stack(draws)).to(x) * 2 - 1


# ------------------------------------------------------------------------------------------- book-keeping


def answer(
    model: nn.Module,
    points: Tensor,
    y: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
    *,
    eot: int = 1,
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Ask the model `eot` times: (share of the passes that are wrong [B], mean objective [B])."""
    wrong, value = torch.zeros_like(y, dtype=torch.float32), 0.0
    with torch.no_grad():
        for _ in range(eot):
            logits = check_logits(model(points), y) if check else model(points)
            wrong = wrong + _is_wrong(logits, y)
            value = value + objective(logits, y)
    return wrong / eot, value / eot


def _is_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """1.0 where the answer is another class, else 0.0 [B]; an answer that is no number is none, not a wrong one."""
    return ((logits.argmax(1) != y) & logits.isfinite().all(1)).float()


def gradient_at(
    model: nn.Module,
    points: Tensor,
    y: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
    *,
    eot: int = 1,
    check: bool = False,
    stop_when_fooled: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(share of the passes that are wrong [B], mean objective [B], mean gradient shaped like points).

    One forward and one backward pass, `eot` times over. stop_when_fooled: with a single pass that is wrong
    on every image the gradient is not computed, but None.
    """
    wrong, value, gradient = torch.zeros_like(y, dtype=torch.float32), 0.0, None
    points = points.detach().requires_grad_()
    for _ in range(eot):
        with torch.enable_grad():
            logits = check_logits(model(points), y) if check else model(points)
            values = objective(logits, y)
            total = values.sum()
        wrong = wrong + _is_wrong(logits.detach(), y)
        value = value + values.detach()
        if stop_when_fooled and eot == 1 and bool(wrong.all()):
            return wrong, value, None
        (found,) = torch.autograd.grad(total, points)
        gradient = found if gradient is None else gradient + found
    return (wrong, value, gradient) if eot == 1 else (wrong / eot, value / eot, gradient / eot)


class Ledger:
    """Keeps each image's strongest point (fooling before not, then the higher loss) and counts passes.

    eot: passes of a random model per look at a point. While the attack runs, a point fools only if all of
    them are wrong, as the best of many points by a lucky draw is no success; the result is judged by the
    majority of as many fresh passes of the point that is returned.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, *, eot: int = 1) -> None:
        self.model, self.x, self.y, self.eot = model, x, y, eot
        self.x_adv = x.clone()
        self.value = torch.full((len(x),), -torch.inf, device=x.device)
        self.fooled = torch.zeros_like(y, dtype=torch.bool)
        self.first_step = torch.full_like(y, -1)
        self.held_step = torch.zeros_like(y)
        self.queries = torch.zeros_like(y)
        self.backwards = 0

    def record(
        self, rows: Tensor, points: Tensor, wrong: Tensor, value: Tensor, step: int
    ) -> Tensor:
        """Note how often the model was wrong on `points` of the images `rows`; returns who is fooled [n]."""
        value = value.detach().float()
        fooled = wrong == 1
        held_fooled, held_value = self.fooled[rows], self.value[rows]
        better = (fooled & ~held_fooled) | ((fooled == held_fooled) & (value > held_value))
        self.x_adv[rows[better]] = points.detach()[better]
        self.value[rows] = torch.where(better, value, held_value)
        self.held_step[rows] = torch.where(better, step, self.held_step[rows])
        self.first_step[rows] = torch.where(
            fooled & (self.first_step[rows] < 0), step, self.first_step[rows]
        )
        self.fooled[rows] = held_fooled | fooled
        self.queries[rows] += self.eot
        return fooled

    def look(self, objective: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Ask the model about the clean images: those it gets wrong are fooled at step 0."""
        wrong, value = answer(self.model, self.x, self.y, objective, eot=self.eot, check=True)
        self.record(self.everyone(), self.x, wrong, value, step=0)

    def ask(
        self, rows: Tensor, points: Tensor, objective: Callable[[Tensor, Tensor], Tensor], step: int
    ) -> tuple[Tensor, Tensor]:
        """Ask the model about `points` of the images `rows` and note it: (who is fooled [n], objective [n])."""
        wrong, value = answer(self.model, points, self.y[rows], objective, eot=self.eot)
        return self.record(rows, points, wrong, value, step), value

    def everyone(self) -> Tensor:
        """Row numbers of all images."""
        return torch.arange(len(self.x), device=self.x.device)

    def standing(self) -> Tensor:
        """Row numbers of the images not fooled yet."""
        return torch.nonzero(~self.fooled)[:, 0]

    def result(self, *, eps: float | Tensor | None, seed: int | None) -> AttackResult:
        success, step = self.fooled, self.first_step
        if self.eot > 1:
            success = answer(self.model, self.x_adv, self.y, margin, eot=self.eot)[0] > 0.5
            step = torch.where(success, torch.where(step < 0, self.held_step, step), -1)
            self.queries += self.eot
        return build_result(
            self.x, self.x_adv, success, step, self.queries, self.backwards, eps=eps, seed=seed
        )


def build_result(
    x: Tensor,
    x_adv: Tensor,
    success: Tensor,
    first_step: Tensor,
    queries: Tensor,
    backwards: int,
    *,
    eps: float | Tensor | None,
    seed: int | None,
) -> AttackResult:
    """Measure the perturbation and wrap everything up."""
    change = (x_adv - x).abs()
    return AttackResult(
        x_adv=x_adv,
        success=success,
        first_success_step=first_step,
        forwards=int(queries.sum()),
        backwards=backwards,
        queries=queries,
        linf=change.flatten(1).amax(1),
        l2=change.flatten(1).norm(dim=1),
        l0=(change.amax(1) > 0).flatten(1).sum(1).to(x.dtype),
        eps=None if eps is None else float(torch.as_tensor(eps).max()),
        seed=seed,
    )
