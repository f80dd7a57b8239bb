"""What every attack shares: result, check at the door, losses, ball, draws, book-keeping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..units import check_numbers

TOLERANCE = 1e-6
TINY = 1e-30  # keeps 0 / 0 of an image without a gradient at 0
STEADY = 1e-2  # of the largest logit: beyond rounding, also in half precision

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits [B,K], y [B]) -> value per image [B]
Seed = int | Sequence[Sequence[int]]  # one number, or a pair (seed, image) per image


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, per image of the batch.

    x_adv [B,C,H,W] in [0,1]; success [B] bool: the model is wrong on it; first_success_step [B]: -1
    never, 0 wrong before any step, else the step that fooled it; queries [B]: forward passes spent;
    linf, l2 [B]: size of x_adv - x in pixel units; forwards, backwards: passes of the whole batch.
    """

    x_adv: Tensor
    success: Tensor
    first_success_step: Tensor
    queries: Tensor
    linf: Tensor
    l2: Tensor
    backwards: int

    @property
    def forwards(self) -> int:
        return int(self.queries.sum())


# ---------------------------------------- the door


def check_attack(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float | Tensor = 1.0, norm: str = "linf"
) -> Tensor:
    """The door of every attack: refuses what would give a wrong number; returns x, clamped.

    x: [B,C,H,W] in [0,1]; y: int64 [B]; eps: a number or, for "linf", [C,1,1], in pixel units.
    """
    check_gradients(model)
    x, channels = check_images(x), x.shape[1]
    if getattr(y, "dtype", None) != torch.int64 or y.shape != x.shape[:1] or y.min() < 0:
        raise ValueError("y must be an int64 tensor [B], one label per image, none negative")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', not {norm!r}")
    for value in eps.flatten().tolist() if isinstance(eps, Tensor) else [eps]:
        interval = "(0,1]" if norm == "linf" else "(0,inf)"
        check_numbers(interval, hint=": in pixel units, such as 8/255", eps=value)
    if np.ndim(eps) and (norm == "l2" or eps.shape != (channels, 1, 1)):
        shape = f"[{channels},1,1], one per channel (expand grey images: x.expand(-1, 3, -1, -1))"
        raise ValueError(f"eps must be a number, or for 'linf' {shape}")
    return x


def check_gradients(model: nn.Module) -> None:
    """`check_model`, and refuse a place where torch keeps no gradients."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "torch.inference_mode() keeps no gradients: call this outside of it (no_grad may stay)"
        )
    check_model(model)


def check_model(model: nn.Module) -> None:
    """Refuse what is no module, and a module of which any part is in training mode."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        what = "the torch.nn.Module that it was made from; TorchScript hides its layers"
        more = f": give {what}" if isinstance(model, nn.Module) else ""
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}{more}")
    for name, module in model.named_modules():
        if module.training:
            where = f"{name or 'the model'} ({type(module).__name__})"
            raise ValueError(
                f"{where} is in training mode and could be random or change; call model.eval()"
            )


def structure(model: nn.Module) -> list[tuple]:
    """What a model's answers may depend on beside its weights: its modules, and their flags."""
    plain, found = (bool, int, float, str, type(None)), []
    for one in model.modules():
        flags = [v for k, v in vars(one).items() if k[0] != "_" and isinstance(v, plain)]
        buffers = [name for name, _ in one.named_buffers(recurse=False)]  # those that are not None
        found.append((id(one), flags, buffers))
    return found


_STEADY: WeakKeyDictionary[nn.Module, list] = WeakKeyDictionary()  # how they were found steady


@torch.no_grad()
def check_steady(model: nn.Module, x: Tensor) -> None:
    """Refuse a model whose answer depends on its company in the batch, or on chance.

    The first of the images x [B,C,H,W] is asked about alone and twice in company: once for each
    model, and again after a change of its modules or their flags.
    """
    if _STEADY.get(model) == (now := structure(model)):
        return
    company = torch.cat([x[:1], 1 - x[:1], x[:1] / 2])  # clones: a first layer may work in place
    alone, first, again = (model(one.clone()) for one in (x[:1], company, company))
    if not all(isinstance(answer, Tensor) for answer in (alone, first, again)):
        return  # a detector's; where logits are needed they are refused next
    allowed = dict(rtol=0, atol=STEADY * max(0.1, float(first.abs().max())), equal_nan=True)
    if not torch.allclose(first, again, **allowed):
        raise ValueError(
            "the model answers the same images differently each time (dropout or noise inside "
            "forward?): switch it off, as F.dropout(x, p, training=self.training) and eval() do"
        )
    if alone.shape != first[:1].shape or not torch.allclose(alone, first[:1], **allowed):
        norms = nn.modules.batchnorm._BatchNorm
        named = [(name, one) for name, one in model.named_modules() if isinstance(one, norms)]
        found = [name for name, one in named if one.running_mean is None]
        raise ValueError(
            "the model answers an image alone otherwise than in a batch (batch norm without "
            f"running statistics? {', '.join(found) or 'not seen'}): an answer must depend on its "
            "image only, as with BatchNorm2d(track_running_stats=True) or GroupNorm"
        )
    _STEADY[model] = now


def check_images(x: Tensor) -> Tensor:
    """Images [B,C,H,W], detached and clamped to [0,1]; refuses another type, shape or range."""
    dtype, shape = getattr(x, "dtype", type(x)), tuple(getattr(x, "shape", ()))
    if dtype not in (torch.float32, torch.float64) or len(shape) != 4 or not x.numel():
        raise ValueError(
            "x must be a non-empty float32 or float64 batch [B,C,H,W] in [0,1] (of bytes: "
            f"images.float() / 255), not {dtype} {shape}"
        )
    low, high = (value.item() for value in x.detach().aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # NaN compares false
        raise ValueError(
            f"x must lie in [0,1] but spans [{low:.4g}, {high:.4g}]: pass pixels before "
            "normalisation, the model owns its mean and std: models.wrap(net, mean=, std=)"
        )
    return x.detach().clamp(0, 1)


def check_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Return the logits [B,K] when they fit the labels; an error that names the fix otherwise."""
    shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(shape, list) or len(shape) != 2 or shape[1] < 2:
        raise ValueError(
            f"the model must return logits [B,K] with K >= 2 classes, not {shape}; a single logit "
            "z of class 1 becomes two by torch.cat([torch.zeros_like(z), z], dim=1)"
        )
    if int(y.max()) >= shape[1]:
        raise ValueError(f"y holds label {int(y.max())}; the model has classes 0..{shape[1] - 1}")
    if not bool(logits.isfinite().all()):
        raise ValueError("the model returns NaN or infinite logits on these images")
    return logits


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Parameters take no gradient inside; every flag is put back, also after an error."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield model.requires_grad_(False)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


# ---------------------------------------- losses, ball, draws


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per image [B]; its gradient is exactly zero where float32 softmax saturates."""
    return nn.functional.cross_entropy(logits.float(), y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Best wrong logit minus true logit, per image [B] (arXiv 1608.04644): cannot saturate.

    >>> margin(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0]))
    tensor([-2.,  2.])
    """
    others = logits.scatter(1, y[:, None], -torch.inf).max(1).values
    return others - logits.gather(1, y[:, None])[:, 0]


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin}


def wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Whether the answer is wrong, bool [B]: no number is no wrong answer."""
    return (logits.argmax(1) != y) & logits.isfinite().all(1)


def per_image(value: Tensor) -> Tensor:
    """[B] as [B,1,1,1]."""
    return value[:, None, None, None]


def size(change: Tensor, norm: str) -> Tensor:
    """Length of a change [B,C,H,W] per image [B]: the largest pixel, or the Euclidean length."""
    flat = change.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def rise(gradient: Tensor, norm: str) -> Tensor:
    """How much a linear function rises per unit of the norm, per image [B]: the dual norm."""
    flat = gradient.flatten(1)
    return flat.abs().sum(1) if norm == "linf" else flat.norm(dim=1)


def ascent(gradient: Tensor, norm: str) -> Tensor:
    """The change of length 1 in the norm along which the gradient promises most."""
    if norm == "linf":
        return gradient.sign()
    return gradient / per_image(size(gradient, "l2").clamp_min(TINY))


def project(points: Tensor, x: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    """Points moved into the ball round x cut with [0,1]; eps: a number, or what broadcasts with x.

    An L2 change is cut to [0,1] before it is shortened: the other way round, black borders would
    use up the budget.
    """
    if norm == "linf":
        return torch.clamp(points, (x - eps).clamp_(min=0), (x + eps).clamp_(max=1))
    change = points.clamp(0, 1) - x
    share = (eps / per_image(size(change, "l2").clamp_min(TINY))).clamp(max=1)
    return torch.clamp(x + change * share, 0, 1)


def pairs(seed: Seed, count: int) -> list[tuple[int, int]]:
    """(seed, image) of each image of a batch: its draws depend on nothing else.

    >>> pairs(5, 2), pairs([(5, 40), (5, 41)], 2)
    ([(5, 0), (5, 1)], [(5, 40), (5, 41)])
    """
    if np.ndim(seed) == 0:
        check_numbers("[0,inf)", whole=True, seed=seed)
        return [(int(seed), i) for i in range(count)]
    found = [(int(one), int(image)) for one, image in seed]
    if len(found) != count or min(map(min, found)) < 0:
        raise ValueError(f"seed must be a number >= 0, or {count} pairs (seed, image)")
    return found


def uniform(x: Tensor, rngs: list[np.random.Generator]) -> Tensor:
    """Uniform draws in [-1,1] shaped like x, one generator per image."""
    draws = [rng.random(x.shape[1:], dtype=np.float32) for rng in rngs]
    return torch.from_numpy(np.stack(draws)).to(x) * 2 - 1


# ---------------------------------------- the record


@contextmanager
def search(model: nn.Module, x: Tensor, y: Tensor, **options) -> Iterator[Search]:
    """The frame of every attack: the checks at the door, the model frozen, an empty record."""
    record = Search(model, x, y, **options)
    check_steady(model, record.x)
    with frozen(model):
        yield record


class Search:
    """Keeps each image's strongest point (fooling first, then the higher value) and counts passes.

    The value of a point is the loss or, without eps (the smallest change is looked for), how small
    its change is. `rows` are the numbers of the images that points belong to. The first answers are
    checked.
    """

    def __init__(self, model, x, y, *, eps=None, norm="linf", loss="margin", seed: Seed = 0):
        x = check_attack(model, x, y, eps=1.0 if eps is None else eps, norm=norm)
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {sorted(LOSSES)}, not {loss!r}")
        self.model, self.x, self.y, self.norm, self.objective = model, x, y, norm, LOSSES[loss]
        self.eps = eps.to(x) if isinstance(eps, Tensor) else eps
        self.keys, self.everyone = pairs(seed, len(x)), torch.arange(len(x), device=x.device)
        self.x_adv, self.checked, self.backwards = x.clone(), False, 0
        self.value = torch.full((len(x),), -torch.inf, device=x.device)
        self.fooled = torch.zeros_like(y, dtype=torch.bool)
        self.first_step, self.queries = torch.full_like(y, -1), torch.zeros_like(y)

    def rounds(
        self, streams: range, *, everyone: bool = False
    ) -> Iterator[tuple[int, Tensor, list[np.random.Generator]]]:
        """Rounds of the images that still stand: (stream, rows, a generator per image)."""
        for stream in streams:
            rows = self.everyone if everyone else torch.nonzero(~self.fooled)[:, 0]
            if not len(rows):
                return
            keys = [self.keys[row] for row in rows.tolist()]
            yield stream, rows, [np.random.default_rng([seed, stream, i]) for seed, i in keys]

    def reach(self, draw: Tensor, x: Tensor) -> Tensor:
        """The point at eps times a draw in [-1,1] or, for "l2", that way at the length eps."""
        draw = ascent(draw, "l2") if self.norm == "l2" else draw
        return project(x + self.eps * draw, x, self.eps, self.norm)

    def answer(self, rows: Tensor, points: Tensor) -> Tensor:
        """The model's logits."""
        self.queries[rows] += 1
        logits = self.model(points)
        if not self.checked:
            check_logits(logits, self.y)
        self.checked = True
        return logits

    @torch.no_grad()
    def ask(self, rows: Tensor, points: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Judge points of the images `rows`: (who is fooled [n], objective [n])."""
        logits = self.answer(rows, points)
        value = self.objective(logits, self.y[rows])
        return self.record(rows, points, logits, value, step), value

    def look(self) -> None:
        """Judge the clean images: those that the model gets wrong are fooled at step 0."""
        self.ask(self.everyone, self.x, 0)

    @torch.enable_grad()
    def gradient(
        self, rows: Tensor, points: Tensor, step: int, *, objective: Loss | None = None, lazy=False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(who is fooled [n], objective [n], its gradient); lazy: None where all are fooled."""
        points = points.detach().requires_grad_()
        logits = self.answer(rows, points)
        value = (objective or self.objective)(logits, self.y[rows])
        fooled = self.record(rows, points.detach(), logits.detach(), value.detach(), step)
        if lazy and bool(fooled.all()):
            return fooled, value.detach(), None
        self.backwards += len(rows)
        return fooled, value.detach(), torch.autograd.grad(value.sum(), points)[0]

    def record(
        self, rows: Tensor, points: Tensor, logits: Tensor, value: Tensor, step: int
    ) -> Tensor:
        """Note what the model said; returns who is fooled [n]."""
        fooled = wrong(logits, self.y[rows])
        value = -size(points - self.x[rows], self.norm) if self.eps is None else value
        value, held_fooled, held = value.float(), self.fooled[rows], self.value[rows]
        better = (fooled & ~held_fooled) | ((fooled == held_fooled) & (value > held))
        self.x_adv[rows[better]] = points[better]
        self.value[rows] = torch.where(better, value, held)
        first = self.first_step[rows]
        self.first_step[rows] = torch.where(fooled & (first < 0), step, first)
        self.fooled[rows] = held_fooled | fooled
        return fooled

    def result(self, x_adv: Tensor | None = None, success: Tensor | None = None) -> AttackResult:
        """The strongest points, or the points that the attack itself chose."""
        x_adv = self.x_adv if x_adv is None else x_adv
        success = self.fooled if success is None else success
        linf, l2 = (size(x_adv - self.x, norm) for norm in ("linf", "l2"))
        about = (x_adv, success, self.first_step, self.queries)
        return AttackResult(*about, linf, l2, self.backwards)
