"""What training minimises: `trades(eps=4 / 255)` makes an objective(model, x, y) -> (loss, logits).

Images x [B, 1 or 3, H, W] lie in [0, 1], labels y [B] are int64, the loss is a mean over the batch;
`eps`, step sizes and `sigma` are in pixel units, `weight` is one factor per class on every term of
the loss, divided by the sum over the batch of the factors. Below stand the losses; `@_maker` makes
of each the function that readers call. `train.fit` reads on an objective: `settings` (name and
numbers), `second_order` (float32 only), `replays` (calls per batch).
"""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .device import evaluating, fingerprint
from .models.lipschitz import QuickInputGradient
from .units import check_numbers

Objective = Callable[[nn.Module, Tensor, Any], tuple[Tensor, Tensor | None]]

# What numbers may be: of one word the interval, of a list that of its entries
INTERVALS = dict(eps="(0,1]", step_size="(0,inf)", sigma="(0,inf)", temperature="(0,inf)")
INTERVALS |= dict(beta="[0,inf)", gamma="[0,inf)", penalty="[0,inf)", weight="[0,inf)")
INTERVALS |= dict(hard_temperature="(0,inf)", alpha="[0,1]", label_smoothing="[0,1]")
INTERVALS |= dict(helper="[1,inf)", input_std="(0,inf)", lam="(-inf,inf)")
# Losses whose formula has changed, so that no run takes an older training for the same
EDITIONS = dict.fromkeys(("trades", "hat"), {"edition": 2})
WHOLE = dict(steps="[1,inf)", replays="[1,inf)")
LISTS = ("weight", "input_std")
MAY_LACK = (*LISTS, "step_size")

log = logging.getLogger("dlia_utils")


def _ce(weight=None, label_smoothing=0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross-entropy of (logits, y) in float32; its `mean` weighs other losses [B] alike."""
    factors = None if weight is None else torch.tensor(weight, dtype=torch.float32)

    def ce(logits: Tensor, y: Tensor) -> Tensor:
        nonlocal factors
        factors = None if factors is None else factors.to(logits.device)  # copied once
        return F.cross_entropy(logits.float(), y, factors, label_smoothing=label_smoothing)

    ce.mean = partial(_class_mean, weight=weight)
    return ce


def _kl(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(clean || attacked) per image [B], of logits [B, K]; both as logarithms.

    The gradient of p log p, of a p that float32 rounds to 0, would be NaN.
    """
    target, answer = (logits.float().log_softmax(1) for logits in (clean, attacked))
    return F.kl_div(answer, target, reduction="none", log_target=True).sum(1)


def _class_mean(losses: Tensor, y: Tensor, weight) -> Tensor:
    """Mean over the batch with one factor per class, as cross-entropy takes it."""
    factors = torch.tensor([1.0] if weight is None else weight, device=y.device)
    return losses.mean() if weight is None else (losses * factors[y]).sum() / factors[y].sum()


def _bare(model: nn.Module) -> nn.Module:
    """Without DDP's wrapper, which would wait for the gradients of parameters."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _attack(model, x, y=None, watch=lambda logits: None, *, eps, steps, step_size) -> Tensor:
    """Images of PGD (the last iterate) that raise the cross-entropy with y, or the KL to the clean.

    Of the model in eval mode, which is left unchanged. `watch` sees every iterate's logits.
    """
    bare = _bare(model)
    with evaluating(bare):
        if y is None:
            with torch.no_grad():
                clean = bare(x)
        low, high = (x - eps).clamp_(0, 1), (x + eps).clamp_(0, 1)
        x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp_(0, 1)
        for _ in range(steps):
            logits = bare(x_adv.requires_grad_()).float()
            watch(logits.detach())
            if y is None:
                loss = _kl(clean, logits).sum()  # a sum: images must not depend on each other
            else:
                loss = F.cross_entropy(logits, y, reduction="sum")
            (slope,) = torch.autograd.grad(loss, logits)
            # Each image's to about 1, by a power of two: no sign changes, and half precision, where
            # a confident model's gradient would round to 0, loses none.
            exponent = torch.frexp(slope.abs().amax(1, keepdim=True)).exponent
            slope = torch.ldexp(slope, -exponent.clamp(min=-120))
            (gradient,) = torch.autograd.grad(logits, x_adv, slope)
            x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), low, high)
    return x_adv


# The parts that a loss may ask for: how they are made, and of which numbers with which defaults
PARTS = {"ce": (_ce, dict(weight=None, label_smoothing=0.0)), "state": (dict, {})}
PARTS["attack"] = partial(partial, _attack), dict(eps=inspect.Parameter.empty, step_size=None)
# Passes of an image in a step, beside one of each for every step of attack: forward, backward, and
# how many of these go on to the weights
PASSES = dict.fromkeys("cross_entropy cross_entropy_at gaussian_noise detection".split(), (1, 1, 1))
PASSES |= dict.fromkeys(("pgd_adversarial", "fast_adversarial", "free_adversarial"), (1, 1, 1))
PASSES |= {"gairat": (1, 1, 1), "pgd_awp": (2, 2, 2), "mart": (2, 2, 2), "trades": (3, 2, 2)}
PASSES |= {"hat": (5, 3, 3), "distillation": (2, 1, 1)}  # one of them through the other model
PASSES |= dict.fromkeys(("lipschitz", "margin_gradient"), (1, 2, 2))  # a gradient of a gradient


def _check(values: dict[str, Any]) -> None:
    """Refuse numbers out of their intervals; only what MAY_LACK names may be None."""
    hint = "; eps is in pixel units, e.g. 4/255" if "eps" in values else ""
    for name, value in values.items():
        if name in WHOLE:
            check_numbers(WHOLE[name], whole=True, hint=hint, **{name: value})
        if name not in INTERVALS or (value is None and name in MAY_LACK):
            continue
        for one in value if name in LISTS and np.ndim(value) else [value]:
            check_numbers(INTERVALS[name], hint=hint, **{name: one})
    weight = values.get("weight")
    if weight is not None and not (np.ndim(weight) == 1 and np.sum(weight) > 0):
        raise ValueError(f"weight must be one factor per class, not all 0, got {weight}")


def _maker(*, step=0.7, second_order=False, **steps: int) -> Callable:
    """Of a loss (model, x, y, ...) make the maker of an objective, which takes its other arguments.

    The loss gets the PARTS that it asks for (attacks step by `step` * eps), models copied, frozen.
    """

    def decorate(loss: Callable) -> Callable[..., Objective]:
        own = list(inspect.signature(loss).parameters.values())[3:]
        parts = {p.name: PARTS[p.name] for p in own if p.name in PARTS}
        public = [p for p in own if p.name not in PARTS]
        defaults = {name: value for _, numbers in parts.values() for name, value in numbers.items()}
        for name, value in (defaults | steps).items():
            public.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value))

        @wraps(loss)
        def make(*args: Any, **options: Any) -> Objective:
            given = make.__signature__.bind(*args, **options)
            given.apply_defaults()
            values = given.arguments
            _check(values)
            if values.get("step_size", 0) is None:
                values["step_size"] = step * values["eps"]
            nets = {name: value for name, value in values.items() if isinstance(value, nn.Module)}
            inner = values | {name: copy.deepcopy(net).eval() for name, net in nets.items()}
            for name in nets:
                inner[name].requires_grad_(False)
            for name, (make_part, numbers) in parts.items():
                names = [*numbers, *steps] if name == "attack" else numbers
                inner[name] = make_part(**{key: inner.pop(key) for key in names})
            objective = partial(loss, **inner)
            marks = {name: fingerprint(net) for name, net in nets.items()}
            edition = EDITIONS.get(loss.__name__, {})
            objective.settings = {"name": loss.__name__} | values | marks | edition
            objective.second_order, objective.replays = second_order, values.get("replays", 1)
            return objective

        make.__signature__ = inspect.Signature(public)
        return make

    return decorate


@_maker()
def cross_entropy(model, x, y, *, ce):
    """Cross-entropy, optionally with class weights and label smoothing."""
    logits = model(x)
    return ce(logits, y), logits


@_maker()
def cross_entropy_at(model, x, y, temperature: float, *, ce):
    """Cross-entropy of logits / T: the teacher of defensive distillation (arXiv 1511.04508)."""
    logits = model(x)
    return ce(logits / temperature, y), logits


@_maker()
def distillation(model, x, y, teacher, *, temperature: float, alpha=0.9, hard_temperature=1.0):
    """Knowledge distillation (Hinton, arXiv 1503.02531): soft labels of a teacher, and hard ones.

    loss = alpha T^2 KL(teacher_T || student_T) + (1 - alpha) CE(student / hard_temperature, y).
    """
    with torch.no_grad():
        soft = F.log_softmax(teacher.to(x.device)(x) / temperature, dim=1)
    logits = model(x)
    student = F.log_softmax(logits / temperature, dim=1)
    # T^2 undoes the 1/T^2 that the two softmaxes put on the gradient.
    share = alpha * temperature**2
    loss = share * F.kl_div(student, soft, reduction="batchmean", log_target=True)
    return loss + (1 - alpha) * F.cross_entropy(logits / hard_temperature, y), logits


@_maker()
def gaussian_noise(model, x, y, *, ce, sigma: float):
    """Cross-entropy on x + N(0, sigma^2), not cut to [0, 1] (arXiv 1902.02918)."""
    logits = model(x + sigma * torch.randn_like(x))
    return ce(logits, y), logits


def _with_slope(model, x, y, ce, penalty, score, std=None):
    """`ce` + penalty * squared length of the gradient of `score`, in one forward pass."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.float() if std is None else x.float().expand(-1, std.shape[1], -1, -1)
        x = x.detach().requires_grad_()
        with QuickInputGradient():
            logits = model(x)
        (gradient,) = torch.autograd.grad(score(logits, y).sum(), x, create_graph=True)
        gradient = gradient if std is None else gradient * std
        return ce(logits, y) + penalty * gradient.square().flatten(1).sum(1).mean(), logits


@_maker(second_order=True)
def lipschitz(model, x, y, *, ce, penalty=0.05, input_std=None):
    """Cross-entropy + penalty * mean over the batch of || d max_k softmax_k(x) / dx ||_2^2.

    x in pixels of [0, 1]; with `input_std` (a number a channel) in units of the normalised input:
    the published penalty, much weaker at 0.05.
    """
    std = None if input_std is None else torch.tensor(input_std, device=x.device).view(1, -1, 1, 1)
    return _with_slope(model, x, y, ce, penalty, lambda z, y: z.softmax(dim=1).amax(dim=1), std)


@_maker(second_order=True)
def margin_gradient(model, x, y, *, ce, penalty: float):
    """Cross-entropy + penalty * mean over the batch of || d (z_y - max_{k != y} z_k) / dx ||_2^2.

    Unlike a penalty on the loss or on probabilities (Drucker & Le Cun 1992; arXiv 1711.09404) it
    cannot be met by saturating the softmax. Start with a `penalty` of 1e-4 to 1e-2.
    """

    def margin(logits: Tensor, y: Tensor) -> Tensor:
        own = y[:, None]
        return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).amax(1)

    return _with_slope(model, x, y, ce, penalty, margin)


@_maker(steps=2)
def pgd_adversarial(model, x, y, *, ce, attack):
    """Adversarial training: cross-entropy on PGD images made on the spot (arXiv 1706.06083)."""
    logits = model(attack(model, x, y))
    return ce(logits, y), logits


@_maker(steps=2)
def pgd_awp(model, x, y, *, ce, attack, gamma=5e-3):
    """`pgd_adversarial` at weights that are attacked, too (AWP, Wu et al. 2020, arXiv 2004.05884).

    Each weight of two or more dimensions is moved up the loss's gradient on the attacked images, by
    `gamma` times its own norm, from the first epoch on (the paper: 5e-3, AT-AWP's code: 0.01). The
    weights are never written to, so there is nothing to restore: the gradient at the moved point
    becomes theirs, as published. Running statistics see the moved pass alone.
    """
    x_adv = attack(model, x, y)
    kept = {name: value.clone() for name, value in _bare(model).named_buffers()}
    weights = {k: w for k, w in model.named_parameters() if w.dim() > 1 and w.requires_grad}
    loss = len(x) * ce(functional_call(_bare(model), kept, (x_adv,)), y)  # fp16 loses small ones
    moves = torch.autograd.grad(loss, [*weights.values()])
    for (name, w), g in zip(list(weights.items()), moves, strict=True):
        weights[name] = w + gamma * w.detach().norm() / (g.norm() + 1e-20) * g
    logits = functional_call(model, weights, (x_adv,))
    return ce(logits, y), logits


@_maker(step=1.25)
def fast_adversarial(model, x, y, *, ce, attack):
    """Fast adversarial training: one large step from a random start (arXiv 2001.03994).

    It may overfit catastrophically within a few hundred steps: the model answers this one step and
    falls to PGD. Choose the epoch under such an attack (`val_metric` of `train.fit`).
    """
    logits = model(attack(model, x, y, steps=1))
    return ce(logits, y), logits


@_maker(step=1.0)
def free_adversarial(model, x, y, *, ce, state, eps: float, replays=4, step_size=None):
    """Free adversarial training: one backward pass for weights and attack (arXiv 1904.12843).

    loss = CE(f(x + d), y); its gradient also moves d by `step_size` (default eps) times its sign,
    cut to [-eps, eps]. d lives on into the next minibatch; it is 0 for a new model and after a
    resume. `train.fit` takes `replays` steps with each batch: divide the epochs by `replays`.
    """
    if state.get("model", lambda: None)() is not model or len(state["d"]) < len(x):
        state |= {"model": weakref.ref(model), "d": torch.zeros_like(x)}
    d = state["d"][: len(x)]
    point = (x + d).clamp_(0, 1).requires_grad_()

    def move(gradient: Tensor) -> None:
        # Loss scaling in half precision may give inf or NaN.
        d.add_(step_size * gradient.nan_to_num().sign()).clamp_(-eps, eps)

    point.register_hook(move)
    logits = model(point)
    return ce(logits, y), logits


@_maker(steps=2)
def trades(model, x, y, *, ce, attack, beta=6.0):
    """TRADES: clean cross-entropy + beta KL(clean || attacked) (arXiv 1901.08573).

    `weight` is on both terms: else a rare class would be learnt, and not defended.
    """
    return _trades(model, x, y, ce, attack(model, x), beta)


def _trades(model, x, y, ce, x_adv: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    logits = model(x)
    stability = ce.mean(_kl(logits, model(x_adv)), y)
    return ce(logits, y) + beta * stability, logits


@_maker(steps=2)
def hat(model, x, y, standard, *, ce, attack, beta=2.5, gamma=0.5, helper=2.0):
    """Helper-based adversarial training (Rade & Moosavi-Dezfooli, ICLR 2022): less excess margin.

    TRADES + gamma CE(f(x + helper (x' - x)), argmax standard(x')): an image beyond the attacked x'
    gets the label that a `standard` (plainly trained) model gives to x'. The paper takes 10 steps.
    `weight` is on all three terms, by the class of x.
    """
    x_adv = attack(model, x)
    with torch.no_grad():
        helped = standard.to(x.device)(x_adv).argmax(1)
    loss, logits = _trades(model, x, y, ce, x_adv, beta)
    further = (x + helper * (x_adv - x)).clamp_(0, 1)
    help_losses = F.cross_entropy(model(further).float(), helped, reduction="none")
    return loss + gamma * ce.mean(help_losses, y), logits


def mart_loss(clean: Tensor, attacked: Tensor, y: Tensor, *, beta: float) -> Tensor:
    """MART's loss per image [B] of logits [B, K] (Wang et al., ICLR 2020).

    BCE(attacked, y) + beta KL(clean || attacked) (1 - p_y(clean)), where BCE = -log p_y(attacked) -
    log(1 - max_{k != y} p_k(attacked)): what is wrong when clean is made stable most of all.
    """
    _check({"beta": beta})
    clean, attacked, own = clean.float(), attacked.float(), y[:, None]
    best_wrong = attacked.scatter(1, own, -torch.inf).argmax(1, keepdim=True)
    # log(1 - p_k) as the share of all other classes: exact also where p_k is 1 in float32.
    not_wrong = attacked.scatter(1, best_wrong, -torch.inf).logsumexp(1) - attacked.logsumexp(1)
    bce = F.cross_entropy(attacked, y, reduction="none") - not_wrong
    wrong = 1 - clean.softmax(1).gather(1, own)[:, 0]
    return bce + beta * _kl(clean, attacked) * wrong


@_maker(steps=2)
def mart(model, x, y, *, attack, beta=5.0, weight=None):
    """Misclassification-aware adversarial training: `mart_loss` on PGD images (paper: 10 steps)."""
    x_adv = attack(model, x, y)
    logits = model(x)
    return _class_mean(mart_loss(logits, model(x_adv), y, beta=beta), y, weight), logits


def gairat_weights(kappa: Tensor, *, steps: int, lam: float = -1.0) -> Tensor:
    """Weights per image [B]: (1 + tanh(lam + 5 (1 - 2 kappa / steps))) / 2, over their mean."""
    _check({"steps": steps, "lam": lam})
    # (1 + tanh(u)) / 2 = sigmoid(2 u), which float32 would round to 0.
    w = torch.sigmoid(2 * (lam + 5 * (1 - 2 * kappa.double() / steps)))
    return (w / w.mean()).float()


@_maker(step=0.25, steps=10)
def gairat(model, x, y, *, attack, lam=-1.0, weight=None, label_smoothing=0.0):
    """Geometry-aware instance-reweighted adversarial training (ICLR 2021, arXiv 2010.01736).

    loss = mean of w_i CE(f(x'_i), y_i), w of `gairat_weights`: kappa counts the steps of PGD that
    an image stays right. Start from a `pgd_adversarial` model: a random start can collapse. It
    hides its gradients: judge it by the suite's worst case.
    """
    kappa = torch.zeros_like(y)
    x_adv = attack(model, x, y, lambda logits: kappa.add_(logits.argmax(1) == y))
    logits = model(x_adv)
    options = dict(reduction="none", label_smoothing=label_smoothing)
    losses = F.cross_entropy(logits.float(), y, **options)
    weights = gairat_weights(kappa, steps=attack.keywords["steps"], lam=lam)
    return _class_mean(weights * losses, y, weight), logits


@_maker()
def detection(model, x, y):
    """Faster R-CNN's four losses, summed (arXiv 1506.01497), without logits.

    `y` is the list of targets that `augment.collate_boxes` makes, the model a `models.Detector`.
    """
    return torch.stack(list(model(x, y).values())).sum(), None
