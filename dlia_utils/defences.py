"""Objectives of defences past plain PGD training and TRADES; `objectives` offers them under its own name.

All follow the rules of `objectives`: images [B, 1 or 3, H, W] in [0, 1], labels int64 [B], eps and step sizes
in pixel units (k/255), `objective(model, x, y) -> (loss, logits)`. Attacks are made on the model in eval mode
and draw from torch's global random stream; training flags and parameter gradients are left as they were.
The forward passes that make the loss are in the caller's mode, so that in train mode each of them updates the
running statistics of batch normalisation.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._objective import (
    Objective,
    ce_attack,
    check_ball,
    check_positive,
    describe,
    kl,
    kl_attack,
    weighted_cross_entropy,
)
from .device import device_of, evaluating, fingerprint
from .models.lipschitz import quick_input_gradient

log = logging.getLogger("dlia_utils")


# ------------------------------------------------------------------ cheap adversarial training


def fast_adversarial(
    *,
    eps: float,
    step_size: float | None = None,
    weight: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Objective:
    """Fast adversarial training: one large step from a random start (Wong et al. 2020, arXiv 2001.03994).

    loss = CE(f(x'), y) with x' = clip(x + d + a sign grad CE(f(x + d), y)) and d uniform in [-eps, eps]; the step
    a is `step_size`, 1.25 eps by default. It costs one extra forward and backward pass. Caveat: it may overfit
    catastrophically, within a few hundred steps: the model answers this one step and falls to every PGD. Give
    `overfitting_monitor` to `train.fit` as `val_metric` and choose the epoch by "val_pgd_accuracy". The returned
    logits are those of the attacked images. Raises: ValueError for eps outside [0, 1].

    >>> fast_adversarial(eps=0.04).settings["step_size"]
    0.05
    """
    step_size = check_ball(eps, 1, step_size, share=1.25)
    ce = weighted_cross_entropy(weight, label_smoothing)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(ce_attack(model, x, y, eps=eps, steps=1, step_size=step_size))
        return ce(logits, y), logits

    settings = {
        "eps": eps,
        "step_size": step_size,
        "weight": weight,
        "label_smoothing": label_smoothing,
    }
    return describe(objective, "fast_adversarial", **settings)


def overfitting_monitor(
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    max_gap: float = 0.2,
    batch_size: int = 64,
    seed: int = 0,
) -> Callable[[nn.Module], dict[str, float]]:
    """Watch for catastrophic overfitting (Wong et al. 2020, arXiv 2001.03994): a `val_metric` for `train.fit`.

    Returns monitor(model) -> {"val_single_step_accuracy", "val_pgd_accuracy", "val_overfitting_gap"}: accuracy
    under fast training's own step, under PGD with `steps` steps (of 2.5 eps / steps by default), both on the
    cross-entropy and from random starts, and their difference; a gap above `max_gap` is also logged as a warning.
    x [N, C, H, W] and y [N] are validation images, never the test's. The draws depend on `seed` only: the
    caller's random stream and the model stay as they are.
    Raises: ValueError for eps outside [0, 1], steps < 1 or x and y of different lengths.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> monitor = overfitting_monitor(torch.rand(6, 1, 2, 2), torch.tensor([0, 1] * 3), eps=0.1)
    >>> monitor(model)["val_overfitting_gap"] <= 0.2
    True
    """
    if len(x) != len(y) or not len(x):
        raise ValueError(
            f"x and y must be equally many images and labels, at least one; got {len(x)} and {len(y)}"
        )
    attacks = {
        "val_single_step_accuracy": {"steps": 1, "step_size": check_ball(eps, 1, None, share=1.25)},
        "val_pgd_accuracy": {
            "steps": steps,
            "step_size": check_ball(eps, steps, step_size, share=2.5 / max(steps, 1)),
        },
    }

    def monitor(model: nn.Module) -> dict[str, float]:
        device = device_of(model, x)
        row = dict.fromkeys(attacks, 0.0)
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), evaluating(model):
            torch.manual_seed(seed)
            for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
                images, labels = images.to(device), labels.to(device)
                for name, attack in attacks.items():
                    with torch.enable_grad():
                        attacked = ce_attack(model, images, labels, eps=eps, **attack)
                    with torch.no_grad():
                        row[name] += (model(attacked).argmax(1) == labels).sum().item() / len(x)
        gap = row["val_single_step_accuracy"] - row["val_pgd_accuracy"]
        if gap > max_gap:
            log.warning(
                "catastrophic overfitting: accuracy %.3f under one step but %.3f under PGD-%d; go back to an earlier "
                "epoch, lower step_size, or train with pgd_adversarial",
                *row.values(),
                steps,
            )
        return row | {"val_overfitting_gap": gap}

    return monitor


def free_adversarial(
    *,
    eps: float,
    replays: int = 4,
    step_size: float | None = None,
    weight: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Objective:
    """Free adversarial training: one backward pass for weights and perturbation (Shafahi 2019, arXiv 1904.12843).

    A minibatch is used `replays` times in a row; each time loss = CE(f(x + d), y), and the loss's gradient at x + d
    also moves d by `step_size` (default eps) times its sign, cut to [-eps, eps]. d lives on into the next
    minibatch. So an attack costs nothing, and the attack sees the model in the caller's mode (train).

    The objective holds the minibatch and d itself: of every `replays` calls the first one takes the batch that is
    offered, the others ignore theirs. Under `train.fit` N epochs therefore see as many minibatches as N / replays
    plain epochs, drawn at random: multiply `epochs` by `replays` for the paper's 'epochs as seen'. In a loop of
    your own call it `replays` times per batch, with loss.backward() and an optimiser step after each call. No
    logits are returned, as they would belong to other labels than the offered ones. What it holds is dropped when
    another model comes, and is not in a checkpoint: a resumed run starts with d = 0. Train with accumulate=1.
    Raises: ValueError for eps outside [0, 1] or replays < 1; RuntimeError when the loss before was not
    differentiated.

    >>> model, objective = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), free_adversarial(eps=4 / 255, replays=2)
    >>> x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    >>> for _ in range(2):
    ...     loss, _ = objective(model, x, y)
    ...     loss.backward()
    """
    if replays < 1:
        raise ValueError(f"replays must be at least 1, got {replays}")
    step_size = check_ball(eps, replays, step_size, share=1.0)
    ce = weighted_cross_entropy(weight, label_smoothing)
    owner, point, clean, labels, delta, left = None, None, None, None, None, 0

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
        nonlocal owner, point, clean, labels, delta, left
        if owner is None or owner() is not model:
            owner, point, delta, left = weakref.ref(model), None, None, 0
        if point is not None:
            if point.grad is None:
                raise RuntimeError(
                    "free_adversarial moves its perturbation by the gradient of the loss before: call loss.backward() "
                    "after each call, outside no_grad"
                )
            # Loss scaling in half precision may give inf or NaN.
            step = step_size * point.grad.nan_to_num().sign()
            delta[: len(point)] = (delta[: len(point)] + step).clamp_(-eps, eps)
        if not left:
            clean, labels, left = x.detach(), y, replays
            if delta is None or delta.shape[1:] != x.shape[1:] or len(delta) < len(x):
                delta = torch.zeros_like(clean)
        left -= 1
        point = (clean + delta[: len(clean)]).clamp_(0, 1).requires_grad_()
        return ce(model(point), labels), None

    settings = {"eps": eps, "replays": replays, "step_size": step_size}
    return describe(
        objective, "free_adversarial", **settings, weight=weight, label_smoothing=label_smoothing
    )


# ------------------------------------------------------------------ adversarial training that looks at each image


def mart_loss(clean: Tensor, attacked: Tensor, y: Tensor, *, beta: float = 5.0) -> Tensor:
    """MART's loss per image [B] (Wang et al. 2020, ICLR "Improving Adversarial Robustness Requires Revisiting ...").

    loss = BCE(attacked, y) + beta KL(clean || attacked) (1 - p_y(clean)), where
    BCE = -log p_y(attacked) - log(1 - max_{k != y} p_k(attacked)): images that are wrong when clean are made stable
    most of all. `clean` and `attacked` are logits [B, K], K >= 2. With two classes BCE is twice the cross-entropy.

    >>> zero = torch.zeros(1, 2)
    >>> round(mart_loss(zero, zero, torch.tensor([1])).item(), 4)  # 2 log 2
    1.3863
    """
    clean, attacked = clean.float(), attacked.float()
    own = y[:, None]
    best_wrong = attacked.scatter(1, own, -torch.inf).argmax(1, keepdim=True)
    # log(1 - p_k) as the share of all other classes: exact also where p_k is 1 in float32.
    not_wrong = attacked.scatter(1, best_wrong, -torch.inf).logsumexp(1) - attacked.logsumexp(1)
    bce = F.cross_entropy(attacked, y, reduction="none") - not_wrong
    p = clean.softmax(1)
    stability = F.kl_div(attacked.log_softmax(1), p, reduction="none").sum(1)
    return bce + beta * stability * (1 - p.gather(1, own)[:, 0])


def mart(
    *,
    eps: float,
    beta: float = 5.0,
    steps: int = 2,
    step_size: float | None = None,
    weight: Sequence[float] | None = None,
) -> Objective:
    """Misclassification-aware adversarial training: `mart_loss` on PGD images (Wang et al., ICLR 2020).

    The attack raises the cross-entropy as in `pgd_adversarial`, with the same `eps`, `steps` and `step_size`; the
    paper takes 10 steps of eps / 4. `weight`, one factor per class, weighs images as in cross-entropy. The
    returned logits are those of the clean images. Raises: ValueError for eps outside [0, 1], steps < 1, beta < 0.

    >>> x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    >>> loss, logits = mart(eps=4 / 255)(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), x, y)
    >>> loss.requires_grad, logits.shape
    (True, torch.Size([4, 2]))
    """
    step_size = check_ball(eps, steps, step_size)
    if beta < 0:
        raise ValueError(f"beta must not be negative, got {beta}")

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = ce_attack(model, x, y, eps=eps, steps=steps, step_size=step_size)
        logits = model(x)
        return _class_mean(mart_loss(logits, model(x_adv), y, beta=beta), y, weight), logits

    settings = {"eps": eps, "beta": beta, "steps": steps, "step_size": step_size, "weight": weight}
    return describe(objective, "mart", **settings)


def _class_mean(losses: Tensor, y: Tensor, weight: Sequence[float] | None) -> Tensor:
    """Mean over the batch with one factor per class, as cross-entropy takes it."""
    if weight is None:
        return losses.mean()
    factors = torch.tensor(weight, dtype=torch.float32, device=y.device)[y]
    return (losses * factors).sum() / factors.sum()


def hat(
    standard: nn.Module,
    *,
    eps: float,
    beta: float = 2.5,
    gamma: float = 0.5,
    helper: float = 2.0,
    steps: int = 2,
    step_size: float | None = None,
    weight: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Objective:
    """Helper-based adversarial training (Rade & Moosavi-Dezfooli, ICLR 2022): TRADES with less excessive margin.

    loss = CE(f(x), y) + beta KL(f(x) || f(x')) + gamma CE(f(x + helper (x' - x)), argmax standard(x')).

    x' is TRADES's attacked image; the helper image lies further along the same line, cut to [0, 1], and gets the
    label that a `standard` (plainly trained) model gives to x', so that the decision border is not pushed further
    out than robustness in the ball needs. `standard` takes the same images; it is copied, frozen and in eval
    mode, the caller's stays as it is. `eps`, `steps` and `step_size` as in `trades`; the paper takes 10 steps.
    `weight` and `label_smoothing` belong to the first term. The returned logits are those of the clean images.
    Raises: ValueError for eps outside [0, 1], steps < 1, a negative beta or gamma, or helper < 1.

    >>> model, standard = (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)) for _ in range(2))
    >>> x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    >>> loss, logits = hat(standard, eps=4 / 255)(model, x, y)
    """
    step_size = check_ball(eps, steps, step_size)
    for name, value, low in (("beta", beta, 0), ("gamma", gamma, 0), ("helper", helper, 1)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    ce = weighted_cross_entropy(weight, label_smoothing)
    mark = fingerprint(standard)
    standard = copy.deepcopy(standard).eval().requires_grad_(False)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = kl_attack(model, x, eps=eps, steps=steps, step_size=step_size)
        with torch.no_grad():
            helped = standard.to(x.device)(x_adv).argmax(1)
        logits = model(x)
        stability = kl(logits.float().softmax(1), model(x_adv)) / len(x)
        further = (x + helper * (x_adv - x)).clamp_(0, 1)
        help_loss = F.cross_entropy(model(further).float(), helped)
        return ce(logits, y) + beta * stability + gamma * help_loss, logits

    settings = {
        "eps": eps,
        "beta": beta,
        "gamma": gamma,
        "helper": helper,
        "steps": steps,
        "step_size": step_size,
    }
    settings |= {"weight": weight, "label_smoothing": label_smoothing, "standard": mark}
    return describe(objective, "hat", **settings)


def gairat_weights(kappa: Tensor, *, steps: int, lam: float = -1.0) -> Tensor:
    """Geometry-aware weights per image [B], of mean 1 (Zhang et al. 2021, arXiv 2010.01736).

    w = (1 + tanh(lam + 5 (1 - 2 kappa / steps))) / 2, over its batch mean. `kappa` [B] counts the PGD steps that an
    image stays right, 0 to `steps`: images near the decision border weigh most. The paper takes lam -1 (0 and -2
    behave alike; its public checkpoint has 3, almost equal weights). Raises: ValueError for kappa outside
    [0, steps].

    >>> gairat_weights(torch.tensor([0, 5, 10]), steps=10)
    tensor([2.6804e+00, 3.1961e-01, 1.6474e-05])
    """
    if len(kappa) and not 0 <= kappa.min() <= kappa.max() <= steps:
        raise ValueError(
            f"kappa must lie in 0 to steps = {steps}, got {kappa.min()} to {kappa.max()}"
        )
    w = torch.sigmoid(
        2 * (lam + 5 * (1 - 2 * kappa.double() / steps))
    )  # (1 + tanh(u)) / 2, which float32 rounds to 0
    return (w / w.mean()).float()


def gairat(
    *,
    eps: float,
    lam: float = -1.0,
    steps: int = 10,
    step_size: float | None = None,
    weight: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Objective:
    """Geometry-aware instance-reweighted adversarial training (Zhang et al. 2021, ICLR, arXiv 2010.01736).

    loss = mean of w_i CE(f(x'_i), y_i), w by `gairat_weights`: kappa counts those of the `steps` PGD iterates, the
    random start first, that the model still gets right. With few steps kappa says little: the default is the
    paper's 10, of eps / 4. The paper weighs from epoch 60 of 120 on: train with `pgd_adversarial` first and go on
    from its weights with this; from a random start it can collapse, as images that are never right (wrong labels
    among them) weigh most. Known to hide its gradients: judge it by the worst case of the suite, not by PGD on
    cross-entropy. `weight`: one factor per class. The returned logits are those of the attacked images.
    Raises: ValueError for eps outside [0, 1] or steps < 1.

    >>> x, y = torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    >>> loss, _ = gairat(eps=4 / 255)(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), x, y)
    """
    step_size = check_ball(eps, steps, step_size, share=0.25)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        kappa = torch.zeros_like(y)

        def count(logits: Tensor) -> None:
            kappa.add_(logits.argmax(1) == y)

        logits = model(
            ce_attack(model, x, y, eps=eps, steps=steps, step_size=step_size, watch=count)
        )
        losses = F.cross_entropy(
            logits.float(), y, reduction="none", label_smoothing=label_smoothing
        )
        return _class_mean(gairat_weights(kappa, steps=steps, lam=lam) * losses, y, weight), logits

    settings = {"eps": eps, "lam": lam, "steps": steps, "step_size": step_size}
    return describe(objective, "gairat", **settings, weight=weight, label_smoothing=label_smoothing)


# ------------------------------------------------------------------ without attacks


def margin_gradient(
    *, penalty: float, weight: Sequence[float] | None = None, label_smoothing: float = 0.0
) -> Objective:
    """Cross-entropy + penalty * mean over the batch of || d margin / dx ||_2^2, one forward pass.

    margin = z_y - max_{k != y} z_k; for two classes its gradient is that of z1 - z0, up to the sign. An input-gradient
    penalty (Drucker & Le Cun 1992, IEEE Trans. Neural Networks 3; Ross & Doshi-Velez 2018, arXiv 1711.09404) that,
    unlike one on the loss or on probabilities, cannot be met by saturating the softmax. Unit of the gradient:
    logits per unit of a pixel in [0, 1], of x as given; that of a trained network has a squared length of tens to
    thousands, so start with a `penalty` of 1e-4 to 1e-2. In train mode the images of a batch are coupled through batch
    normalisation, and so is the gradient. float32 only: second derivatives underflow in half precision.
    Raises: ValueError for penalty < 0.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> loss, _ = margin_gradient(penalty=0.01)(model, torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))
    """
    if penalty < 0:
        raise ValueError(f"penalty must not be negative, got {penalty}")
    ce = weighted_cross_entropy(weight, label_smoothing)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            x = x.detach().float().requires_grad_()
            with quick_input_gradient():
                logits = model(x)
            own = y[:, None]
            margin = logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).amax(1)
            (gradient,) = torch.autograd.grad(margin.sum(), x, create_graph=True)
            return ce(logits, y) + penalty * gradient.square().flatten(1).sum(1).mean(), logits

    settings = {"penalty": penalty, "weight": weight, "label_smoothing": label_smoothing}
    return describe(objective, "margin_gradient", second_order=True, **settings)


def gaussian_noise(
    *, sigma: float, weight: Sequence[float] | None = None, label_smoothing: float = 0.0
) -> Objective:
    """Cross-entropy on x + N(0, sigma^2), the training for randomised smoothing (Cohen 2019, arXiv 1902.02918).

    `sigma` is in pixel units, the one that `smoothing.certify` will use. The noise is not cut to [0, 1]: neither is
    it when certifying. The returned logits are those of the noisy images. Raises: ValueError for sigma <= 0.

    >>> gaussian_noise(sigma=0.25).settings["sigma"]
    0.25
    """
    check_positive(sigma=sigma)
    ce = weighted_cross_entropy(weight, label_smoothing)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x + sigma * torch.randn_like(x))
        return ce(logits, y), logits

    return describe(
        objective, "gaussian_noise", sigma=sigma, weight=weight, label_smoothing=label_smoothing
    )
