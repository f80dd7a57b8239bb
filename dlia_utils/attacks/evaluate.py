"""Robust accuracy: all attacks on all images at all eps, the worst case per image, checks that can fail."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.fold import fast_copy
from ..models.robust.meansparse import MeanSparse, straight_through
from . import _contract as c
from .fgsm import fgsm
from .noise import noise
from .pgd import pgd

log = logging.getLogger("dlia_utils")

ATTACKS = ("noise", "fgsm", "pgd_ce", "pgd_margin")
ITERATED = ("pgd_ce", "pgd_margin")
BPDA = "_bpda"  # ends the name of an attack that goes straight through an operator
COLUMNS = ["attack", "eps", "image", "label", "fooled", "first_success_step", "queries"]


def pixel_eps(*levels: float) -> tuple[float, ...]:
    """The grid k/255 in pixel units.

    >>> [round(eps, 4) for eps in pixel_eps(1, 4)]
    [0.0039, 0.0157]
    """
    return tuple(level / 255 for level in levels)


def pixel_text(eps: float) -> str:
    """A pixel eps the way people write it.

    >>> pixel_text(0.5 / 255)
    '0.5/255'
    """
    return f"{eps * 255:.3g}/255"


def robustness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps_grid: Iterable[float],
    attacks: Sequence[str] = ATTACKS,
    steps: int = 10,
    restarts: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    grey: bool = False,
    progress: bool = True,
    fast: bool = True,
    bpda: Callable[[nn.Module], AbstractContextManager] | None = None,
) -> pd.DataFrame:
    """Attack all images; one row per (attack, eps, image). Worst case per image: Carlini, arXiv 1902.06705.

    images: [N,C,H,W] in [0,1]; labels: int64 [N]; eps_grid: pixel units (k/255); ids: default 0..N-1.
    Columns: attack, eps, image, label, fooled, first_success_step, queries. A clean error counts as
    fooled everywhere (step 0) and is not attacked. Added rows: attack "clean" at eps 0, and "worst":
    fooled by any of `attacks` at that eps or a smaller one. It grows with eps by construction, as a
    smaller ball lies inside a larger one.
    fast: attack a folded copy (`models.fold.fast_copy`); success is judged on `model` itself, and an image
    that fools only the copy is attacked again on `model`. The number of such disagreements is logged.
    bpda: context `bpda(model)` inside which the backward pass takes an operator for the identity (Athalye et
    al., arXiv 1802.00420). PGD then runs twice, exact and so: rows "pgd_ce_bpda" and "pgd_margin_bpda" are
    added and count in "worst". A model with MeanSparse operators in use (alpha above 0) gets
    `robust.straight_through` without being asked: its exact gradients hide directions, so they alone would
    overstate its robustness. In both, success is judged by plain forward passes of `model`.
    Errors: ValueError for an unknown attack, an empty grid, and what the attacks refuse.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
    >>> rows = robustness(model, x, y, eps_grid=[8 / 255], progress=False)
    >>> len(rows), rows.attack.unique().tolist()
    (18, ['clean', 'noise', 'fgsm', 'pgd_ce', 'pgd_margin', 'worst'])
    """
    grid = sorted({float(eps) for eps in eps_grid} - {0.0})
    unknown = sorted(set(attacks) - set(ATTACKS))
    if unknown or not attacks or not grid:
        raise ValueError(f"give attacks out of {ATTACKS} (unknown: {unknown}) and an eps > 0 in eps_grid")
    ids = np.arange(len(images)) if ids is None else np.asarray(ids)
    c.check_inputs(model, images, labels, eps=grid[-1], grey=grey, ids=ids)
    options = {"steps": steps, "restarts": restarts, "seed": seed, "grey": grey}
    runs = _runs(model, attacks, bpda or _known_bpda(model), fast=fast, **options)
    device = next((p.device for p in model.parameters()), images.device)
    tables, disagreements = [], 0
    total = len(images) * len(grid) * len(runs)
    with tqdm(total=total, desc="attacks", unit="image", disable=not progress) as bar:
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            x, y = images[part].to(device), labels[part].to(device)
            wrong = _wrong(model, x, y).cpu().numpy()
            frame = {"image": ids[part], "label": y.cpu().numpy()}
            once = np.ones(len(x), dtype=np.int64)
            tables.append(_table("clean", 0.0, frame, np.where(wrong, 0, -1), once))
            for eps in grid:
                for name, (run, attacked, context) in runs.items():
                    step, queries, differ = _one(model, attacked, context, run, x, y, ids[part], wrong, eps)
                    tables.append(_table(name, eps, frame, step, queries))
                    disagreements += differ
                    bar.update(len(x))
    if disagreements:
        log.info("%d times an image fooled the folded copy only and was attacked again", disagreements)
    rows = pd.concat(tables, ignore_index=True)
    return pd.concat([rows, _worst(rows)], ignore_index=True)[COLUMNS]


def _known_bpda(model: nn.Module) -> Callable[[nn.Module], AbstractContextManager] | None:
    """The context for the operators of the suite whose exact gradients hide directions; None without any."""
    sparse = (module for module in model.modules() if isinstance(module, MeanSparse))
    return straight_through if any(bool(module.threshold > 0) for module in sparse) else None


def _runs(
    model: nn.Module,
    attacks: Sequence[str],
    bpda: Callable[[nn.Module], AbstractContextManager] | None,
    *,
    fast: bool,
    **options,
) -> dict[str, tuple[Callable, nn.Module, Callable]]:
    """By name: the attack, the model it works on, the context around it."""
    exact = fast_copy(model) if fast else model
    runs = {name: (_attack(name, **options), exact, nullcontext) for name in attacks}
    if bpda is None:
        return runs
    # A folded copy has no operators left, but their gradient as it was when the copy was made.
    with bpda(model):
        through = fast_copy(model) if fast else model
    twice = [name for name in attacks if name in ITERATED]
    return runs | {f"{name}{BPDA}": (_attack(name, **options), through, bpda) for name in twice}


def _attack(name: str, *, steps: int, restarts: int, seed: int, grey: bool) -> Callable[..., c.AttackResult]:
    """attack(model, x, y, eps, ids) with its options filled in."""
    if name == "noise":
        return lambda model, x, y, eps, ids: noise(model, x, y, eps=eps, grey=grey, seed=seed, ids=ids)
    if name == "fgsm":
        return lambda model, x, y, eps, ids: fgsm(model, x, y, eps=eps, grey=grey)
    options = {"steps": steps, "restarts": restarts, "grey": grey, "seed": seed}
    loss = name.removeprefix("pgd_")
    return lambda model, x, y, eps, ids: pgd(model, x, y, eps=eps, loss=loss, ids=ids, **options)


def _one(
    model: nn.Module,
    attacked: nn.Module,
    context: Callable[[nn.Module], AbstractContextManager],
    run: Callable[..., c.AttackResult],
    x: Tensor,
    y: Tensor,
    ids: np.ndarray,
    wrong: np.ndarray,
    eps: float,
) -> tuple[np.ndarray, np.ndarray, int]:
    """One attack on one batch: (first success step [B], queries [B], images that fooled the copy only)."""
    step, queries, differ = np.where(wrong, 0, -1), np.ones(len(x), dtype=np.int64), 0
    rows = np.flatnonzero(~wrong)
    for target in dict.fromkeys([attacked, model]):
        if not len(rows):
            break
        with context(model):
            result = run(target, x[rows], y[rows], eps, ids[rows])
        success = _wrong(model, result.x_adv, y[rows]).cpu().numpy()
        claimed = result.success.cpu().numpy()
        found = np.maximum(result.first_success_step.cpu().numpy(), 1)
        step[rows[success]] = found[success]
        queries[rows] += result.queries.cpu().numpy() + 1
        rows = rows[claimed & ~success]
        differ += len(rows)
    return step, queries, differ


@torch.inference_mode()
def _wrong(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return c.check_logits(model(x), y).argmax(1) != y


def _table(attack: str, eps: float, frame: dict, step: np.ndarray, queries: np.ndarray) -> pd.DataFrame:
    outcome = {"fooled": step >= 0, "first_success_step": step, "queries": queries}
    return pd.DataFrame({"attack": attack, "eps": eps, **frame, **outcome})


def _worst(rows: pd.DataFrame) -> pd.DataFrame:
    """Per image: fooled by any attack up to this eps, the smallest step that did it, all queries so far."""
    attacks = rows[rows.attack != "clean"]
    never = np.iinfo(np.int64).max
    steps = attacks.assign(first_success_step=attacks.first_success_step.where(attacks.fooled, never))
    keys = ["eps", "image", "label"]
    merge = {"first_success_step": "min", "queries": "sum"}
    table = steps.groupby(keys, sort=True, as_index=False).agg(merge)
    by_image = table.groupby("image", sort=False)
    step = by_image.first_success_step.cummin()
    table["queries"] = by_image.queries.cumsum()
    table["fooled"] = step < never
    table["first_success_step"] = step.where(table.fooled, -1)
    return table.assign(attack="worst")


def accuracy_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by attack (down) and eps (across) over all images; a clean error counts as fooled.

    >>> rows = pd.DataFrame({"attack": ["clean", "clean"], "eps": [0.0, 0.0], "fooled": [True, False]})
    >>> float(accuracy_table(rows).loc["clean", 0.0])
    0.5
    """
    order = rows.attack.unique()
    return 1 - rows.pivot_table(index="attack", columns="eps", values="fooled", aggfunc="mean").loc[order]


def zero_gradient_share(
    model: nn.Module, images: Tensor, labels: Tensor, *, loss: str = "ce", batch_size: int = 64
) -> float:
    """Share of images whose loss gradient is exactly zero in every pixel: no gradient attack moves these.

    images: [N,C,H,W] in [0,1]; labels: int64 [N]. Errors: as the attacks.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> zero_gradient_share(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]))
    0.0
    """
    objective = c.choose_loss(loss)
    images, _ = c.check_inputs(model, images, labels, eps=0.0)
    device = next((p.device for p in model.parameters()), images.device)
    zeros = 0
    with c.frozen(model), torch.enable_grad():
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            x, y = x.to(device).requires_grad_(), y.to(device)
            value = objective(c.check_logits(model(x), y), y).sum()
            (gradient,) = torch.autograd.grad(value, x)
            zeros += int((gradient.flatten(1) == 0).all(1).sum())
    return zeros / len(images)


# ------------------------------------------------------------------------------------------- checks


def sanity(rows: pd.DataFrame, zero_share: float | None = None) -> pd.DataFrame:
    """The check list of Carlini et al. (arXiv 1902.06705) as a table: check, passed, detail.

    rows: as `robustness` gives them; zero_share: as `zero_gradient_share` gives it. A check that fails says
    that an attack is too weak or gradients are masked: the robust accuracy is then too high. A check is
    left out when its attacks are not in `rows`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
    >>> rows = robustness(model, x, y, eps_grid=[8 / 255], progress=False)
    >>> bool(sanity(rows, 0.0).passed.all())
    True
    """
    fooled = {
        name: part.pivot(index="image", columns="eps", values="fooled").astype(bool)
        for name, part in rows.groupby("attack", sort=False)
    }
    through = [f"{name}{BPDA}" for name in ITERATED if f"{name}{BPDA}" in fooled]
    iterated = [name for name in (*ITERATED, *through) if name in fooled]
    checks = []
    if iterated and "fgsm" in fooled:
        checks.append(_beats("PGD fools at least what FGSM fools", fooled, iterated, "fgsm"))
    if iterated and "noise" in fooled:
        checks.append(_beats("random noise is weaker than PGD", fooled, iterated, "noise"))
    if all(name in fooled for name in ITERATED):
        found = _lead(fooled, strong="pgd_margin", weak="pgd_ce", what="the margin loss")
        checks.append(("cross-entropy finds what the margin loss finds (no masking)", *found))
    for name in through:
        found = _lead(fooled, strong=name, weak=name.removesuffix(BPDA), what="the way through the operator")
        checks.append((f"exact gradients find what {name} finds (no masking)", *found))
    checks.append(_monotone({name: fooled[name] for name in fooled if name not in ("clean", "worst")}))
    if zero_share is not None:
        detail = f"{zero_share:.1%} of the images"
        checks.append(("no input gradient is exactly zero", zero_share == 0, detail))
    return pd.DataFrame(checks, columns=["check", "passed", "detail"])


def _beats(
    check: str, fooled: dict[str, pd.DataFrame], strong: list[str], weak: str
) -> tuple[str, bool, str]:
    """At every eps the strong attacks together fool at least as many images as the weak one."""
    union = np.logical_or.reduce([fooled[name].to_numpy() for name in strong])
    weaker = fooled[weak].to_numpy()
    counts = [
        f"{pixel_text(eps)}: {ours} >= {theirs}" if ours >= theirs else f"{pixel_text(eps)}: {ours} < {theirs} FAILED"
        for eps, ours, theirs in zip(fooled[weak].columns, union.sum(0), weaker.sum(0), strict=True)
    ]
    alone = int((weaker & ~union).sum())
    passed = bool((union.sum(0) >= weaker.sum(0)).all())
    return check, passed, f"{'; '.join(counts)}; fooled by {weak} only: {alone}"


def _lead(
    fooled: dict[str, pd.DataFrame], *, strong: str, weak: str, what: str, allowed: float = 0.05
) -> tuple[bool, str]:
    """Whether `strong` fools hardly more than `weak` at any eps: a lead means a vanished or hidden gradient.

    With two classes cross-entropy and margin point the same way, and so do exact gradients and those straight
    through an operator that hides none.
    """
    lead = fooled[strong].mean() - fooled[weak].mean()
    worst = lead.idxmax()
    detail = f"largest lead of {what}: {lead[worst]:.1%} of the images at {pixel_text(worst)}"
    return bool(lead[worst] <= allowed), detail


def _monotone(fooled: dict[str, pd.DataFrame]) -> tuple[str, bool, str]:
    falls = []
    for name, table in fooled.items():
        counts = table.sum()
        for (low, few), (high, many) in zip(list(counts.items())[:-1], list(counts.items())[1:], strict=True):
            if many < few:
                falls.append(f"{name} {pixel_text(low)} -> {pixel_text(high)}: {few} -> {many}")
    return "a larger eps never fools fewer", not falls, "; ".join(falls) or "holds for every attack"
