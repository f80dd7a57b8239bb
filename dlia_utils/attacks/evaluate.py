"""Robust accuracy: the worst case per image over a suite of attacks at every eps; checks that can fail."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from .. import files, metrics
from ..device import fingerprint
from ..models.pixel import fast_copy
from ..models.robust.meansparse import MeanSparse, straight_through
from ..progress import Bar
from ..units import pixel_text
from . import _contract as c
from .apgd import apgd
from .carlini_wagner import carlini_wagner
from .deepfool import deepfool
from .fgsm import fgsm
from .fmn import fmn
from .mi_fgsm import mi_fgsm
from .noise import noise
from .one_pixel import one_pixel
from .pgd import pgd
from .square import square

if TYPE_CHECKING:
    from matplotlib.figure import Figure


log = logging.getLogger("dlia_utils")

Data = tuple[Tensor, Tensor] | Iterable[Sequence]
Bpda = Callable[[nn.Module], AbstractContextManager]

BPDA = "_bpda"  # ends the name of an attack that goes straight through an operator
COLUMNS = ["attack", "eps", "image", "label", "fooled", "first_success_step", "queries"]
FORMAT = 2  # of the files in `folder`
NEVER = np.iinfo(np.int64).max
PASSES = 5  # that a model must answer alike
PROBE, ALIKE = (
    16,
    1e-3,
)  # images that a folded copy is compared on; share of the logits by which it may differ
LEAD = 0.05  # share of the images by which one loss, or one kind of gradient, may beat another


@dataclass(frozen=True)
class Kind:
    """An attack as the suite calls it: its options, and what the check list must know of it."""

    attack: Callable[..., c.AttackResult]
    options: Mapping[str, Any]
    blind: bool = False  # sees no gradient of the model
    smallest: bool = (
        False  # looks for the smallest change: run once, it counts at every eps from there on
    )
    norm: str = "linf"  # the only one, where the attack has no choice


KINDS = {
    "noise": Kind(noise, {}, blind=True),
    "fgsm": Kind(fgsm, {}),
    "deepfool": Kind(deepfool, {"steps": 20}, smallest=True),
    "pgd_ce": Kind(pgd, {"loss": "ce"}),
    "pgd_margin": Kind(pgd, {"loss": "margin"}),
    "apgd_ce": Kind(apgd, {"loss": "ce", "steps": 50}),
    "apgd_margin": Kind(apgd, {"loss": "margin", "steps": 50}),
    "fmn": Kind(fmn, {"steps": 50}, smallest=True),
    "carlini_wagner": Kind(carlini_wagner, {"steps": 200}, smallest=True, norm="l2"),
    "transfer": Kind(mi_fgsm, {"loss": "margin"}, blind=True),
    "one_pixel": Kind(one_pixel, {"population": 20, "iterations": 20}, blind=True),
    "square": Kind(square, {"steps": 500, "restarts": 1}, blind=True),
}
TWICE = (
    "pgd_ce",
    "pgd_margin",
    "apgd_ce",
    "apgd_margin",
)  # run straight through an operator as well
ORDER = (  # cheap ones first; the black boxes last, to show what no gradient found
    *("noise", "fgsm", "deepfool", "pgd_ce", "pgd_margin", f"pgd_ce{BPDA}", f"pgd_margin{BPDA}"),
    *("apgd_ce", "apgd_margin", f"apgd_ce{BPDA}", f"apgd_margin{BPDA}", "fmn", "carlini_wagner"),
    *("transfer", "one_pixel", "square"),
)
LINF = tuple(name for name, own in KINDS.items() if own.norm == "linf" and name != "transfer")
SUITE = (
    "noise",
    "fgsm",
    "pgd_ce",
    "pgd_margin",
    "deepfool",
    "apgd_ce",
    "apgd_margin",
    "fmn",
    "square",
)


def suite(norm: str = "linf") -> tuple[str, ...]:
    """The attacks of `SUITE` that know the norm.

    >>> "fgsm" in suite("linf"), "fgsm" in suite("l2")
    (True, False)
    """
    return tuple(name for name in SUITE if _knows(name, norm))


# ------------------------------------------------------------------------------------------- the calls


def robust(
    model: nn.Module,
    data: Data,
    eps_grid: Iterable[float],
    *,
    attacks: Sequence[str] | None = None,
    norm: str = "linf",
    steps: int = 10,
    restarts: int = 1,
    budgets: Mapping[str, Mapping[str, Any]] | None = None,
    at: Mapping[str, Iterable[float]] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    eot: int = 1,
    ids: Sequence[int] | None = None,
    groups: Sequence | None = None,
    grey: bool = False,
    mask: Tensor | None = None,
    fast: bool = True,
    bpda: Bpda | None = None,
    surrogate: nn.Module | None = None,
    early_drop: bool = True,
    folder: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Evaluation:
    """The worst case per image over a suite of attacks, at every eps. Source: Carlini, arXiv 1902.06705.

    An image is robust at eps when the model is right on it and no attack fools it at that eps or a smaller
    one, as a smaller ball lies inside a larger one: the result falls with eps by construction.
    data: (images [N,C,H,W] in [0,1], labels int64 [N]), or batches (x, y, ...) as a loader without shuffling
    yields them; all are held in memory. eps_grid: pixel units (k/255); with norm "l2" the length of the whole
    change. attacks: names in `KINDS`, by default `suite(norm)`; they run in the order of `ORDER`, whatever
    the order given. steps, restarts: of PGD (restarts of APGD too); budgets: options of single attacks, such
    as {"square": {"steps": 2000}}. at: eps of the grid where a dear attack is run, if not at all of them, such as
    {"square": [4 / 255]}. eot: passes averaged per look at a model that is random in eval mode. ids:
    default 0..N-1; with seed and ids the draws of an image are fixed, whatever its batch. groups: patients
    [N], for the intervals. grey: one perturbation for R=G=B. mask: bool [N or 1,1,H,W] of the pixels that may
    change. surrogate: another model for the attack "transfer", which is then run too.
    early_drop: a fooled image is not attacked again, at this eps or a larger one. The rows of an attack, and
    its column in the table, are then only of the images that stood when it came: "worst" alone speaks of
    all. False: every attack on every image that the model gets right. The worst case is the same, but for
    images within float rounding of the boundary, as the batches differ.
    Attacks for the smallest change (DeepFool, FMN, Carlini-Wagner) are run once per image, and count at every
    eps from the size of the change they found; `at` is not for them.
    fast: attack a folded copy (`models.fold.fast_copy`), unless it answers otherwise than the model or eot is above
    1. Success is always judged on `model` itself; an image
    that fools only the copy is attacked again on `model`, and the number of such cases is logged.
    bpda: context `bpda(model)` inside which gradients go straight through an operator (`attacks.bpda`, arXiv
    1802.00420): PGD and APGD then run with exact gradients and so, as "pgd_ce_bpda" and so on. A model with
    MeanSparse operators in use (alpha above 0) gets `robust.straight_through` without being asked.
    folder: finished pairs of attack and eps are kept there; the same call then goes on where it was cut off.
    A folder of another model, other images or settings is refused; resume=False starts anew. Without early_drop
    the attacks, their options, eps_grid and `at` may differ: only what is new is then run.
    Errors: ValueError for unknown attacks or options, an empty grid, a folder of something else, and what the
    attacks refuse, before anything is attacked.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
    >>> found = robust(model, (x, y), [8 / 255, 1.0], progress=False)
    >>> found.table().ball.tolist(), found.table().worst.is_monotonic_decreasing
    (['8/255', '255/255'], True)
    """
    if isinstance(eps_grid, (int, float)):
        raise ValueError(
            f"eps_grid must be a sequence such as [{eps_grid}], not the number {eps_grid}"
        )
    if batch_size < 1 or seed < 0:
        raise ValueError(f"batch_size must be >= 1 and seed >= 0, not {batch_size} and {seed}")
    images, labels = _tensors(
        data, ordered=any(given is not None for given in (groups, ids, mask, folder))
    )
    grid = sorted({float(eps) for eps in eps_grid} - {0.0})
    names = [
        *(suite(norm) if attacks is None else attacks),
        *(["transfer"] if surrogate is not None else []),
    ]
    unknown = sorted(set(names) - set(KINDS))
    if unknown or not names or not grid:
        raise ValueError(
            f"give attacks out of {tuple(KINDS)} (unknown: {unknown}) and an eps > 0 in eps_grid"
        )
    ids = np.arange(len(images)) if ids is None else np.asarray(ids)
    if len(np.unique(ids)) < len(ids):
        raise ValueError("ids names an image twice; give every image an id of its own")
    c.check_inputs(model, images[:1], labels[:1], eps=grid[0], norm=norm)
    c.check_inputs(
        model, images, labels, eps=grid[-1], norm=norm, grey=grey, mask=mask, eot=eot, ids=ids
    )
    if groups is not None and len(groups) != len(images):
        raise ValueError(
            f"groups holds {len(groups)} patients for {len(images)} images; give one per image"
        )
    if "transfer" in names and surrogate is None:
        raise ValueError('the attack "transfer" needs surrogate=, the model that it is crafted on')
    shared = {
        "norm": norm,
        "steps": steps,
        "restarts": restarts,
        "seed": seed,
        "grey": grey,
        "eot": eot,
    }
    options = {
        name: _options(name, shared, budgets or {}) for name in sorted(set(names), key=ORDER.index)
    }
    _check_names("budgets", budgets or {}, options)
    at = _chosen_eps(at or {}, options, grid)
    _rehearse(options, images[:1], None if mask is None else mask[:1], grid[-1])
    if surrogate is not None:
        c.check_inputs(surrogate, images[:1], labels[:1], eps=grid[-1])
        with torch.no_grad():
            c.check_logits(surrogate(images[:1].to(c.device_of(surrogate, images))), labels[:1])
    bpda = bpda or _known_bpda(model)
    settings = {
        "norm": norm,
        "eps_grid": grid,
        "attacks": options,
        "at": at,
        "eot": eot,
        "seed": seed,
        "grey": grey,
        "fast": fast,
        "early_drop": early_drop,
        "bpda": None if bpda is None else _name(bpda),
    }
    store = None
    if folder is not None:
        content = {
            "model": _model_hash(model),
            "images": _hash(images),
            "labels": _hash(labels),
            "ids": _hash(torch.as_tensor(ids)),
            "mask": mask is not None and _hash(mask),
            "surrogate": surrogate is not None and _model_hash(surrogate),
        }
        store = _open_store(Path(folder), settings | content, resume)
    device = c.device_of(model, images)
    data = _Images(images, labels, ids, mask, device, batch_size, norm, eot)
    runs = _runs(
        model, options, at, bpda, surrogate, images[:PROBE].to(device), fast=fast and eot == 1
    )
    blocks = _attack_all(
        model, data, grid, runs, early_drop=early_drop, store=store, progress=progress
    )
    call = {
        "attacks": list(options),
        "norm": norm,
        "steps": steps,
        "restarts": restarts,
        "budgets": budgets,
        "at": at,
        "batch_size": batch_size,
        "seed": seed,
        "eot": eot,
        "ids": ids,
        "grey": grey,
        "mask": mask,
        "fast": fast,
        "bpda": bpda,
        "surrogate": surrogate,
    }
    return Evaluation(
        rows=_rows(blocks, data, grid, early_drop=early_drop),
        cost=pd.DataFrame([block.cost() for block in blocks]),
        distances=_distances(blocks, data),
        settings=settings | {"mask": mask is not None, "surrogate": surrogate is not None},
        groups=None if groups is None else np.asarray(groups),
        model=model,
        images=images,
        labels=labels,
        call=call,
    )


# ------------------------------------------------------------------------------------------- the answer


@dataclass(frozen=True)
class Evaluation:
    """What `robust` found.

    rows       one per (attack, eps, image): COLUMNS; "clean" at eps 0, "worst" for all images at every eps.
               queries: passes that show this attack's outcome on the image, the clean one counted in
    cost       one per (attack, eps), in the order they ran: attacked, fooled (images), forwards, backwards
               (image-passes really made, judging included), seconds
    distances  one per image that an attack for the smallest change was run on: attack, image, label, distance
               (in the norm, pixel units; NaN: never fooled)
    settings   the threat model and the budget: norm, eps_grid, attacks with their options, seed, ...
    groups     patients [N] or None
    model, images, labels, call: what the check list needs to look again
    """

    rows: pd.DataFrame
    cost: pd.DataFrame
    distances: pd.DataFrame
    settings: dict[str, Any]
    groups: np.ndarray | None
    model: nn.Module = field(repr=False)
    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    call: dict[str, Any] = field(repr=False)

    def table(self, *, draws: int = 2000) -> pd.DataFrame:
        """One row per eps: ball, images, clean, one column per attack, worst, sensitivity, specificity, attack_success.

        clean and worst are accuracies over all images (a clean error counts as fooled); attack_success is the
        share of the images right at first that are fooled in the worst case. An attack's column is its
        accuracy over all images too, or, with early_drop, over those that still stood when it came (NaN:
        none did, or it was not run at that eps). sensitivity and specificity, of two classes: worst among the
        images of class 1 (what is still found) and of class 0 (what is still left alone). worst_low, worst_high,
        clean_low, clean_high: their 95 % intervals from `draws` resamples of patients, or of images without groups.
        """
        groups = self.rows.groupby(["attack", "eps"], sort=False)
        right = {key: ~part.fooled.to_numpy() for key, part in groups}
        clean, labels, lines = right["clean", 0.0], self.labels.cpu().numpy(), []
        units = np.arange(len(clean)) if self.groups is None else self.groups
        for eps in self.settings["eps_grid"]:
            worst = right["worst", eps]
            line = {
                "eps": eps,
                "ball": self._ball(eps),
                "images": len(clean),
                "clean": clean.mean(),
            }
            for name in self._attacks():
                line[name] = right[name, eps].mean() if (name, eps) in right else np.nan
            line["worst"] = worst.mean()
            if set(labels) == {0, 1}:
                line |= {
                    "sensitivity": worst[labels == 1].mean(),
                    "specificity": worst[labels == 0].mean(),
                }
            line["attack_success"] = 1 - worst[clean].mean() if clean.any() else np.nan
            for name, flags in (("clean", clean), ("worst", worst)):
                interval = metrics.share(flags, units, draws=draws)
                line |= {f"{name}_low": interval["ci_low"], f"{name}_high": interval["ci_high"]}
            lines.append(line)
        return pd.DataFrame(lines)

    def first_fooled(self) -> pd.DataFrame:
        """How many images each attack was the first to fool, at that eps or below: eps down, attacks across.

        Column "clean": wrong from the start; "none": fooled by nothing. Every row sums to the images.
        """
        clean = self.rows[self.rows.attack == "clean"]
        first = pd.Series("none", index=clean.image.to_numpy())
        first[clean.image[clean.fooled]] = "clean"
        order = [name for name in dict.fromkeys(self.rows.attack) if name != "worst"]
        lines = {}
        for eps in self.settings["eps_grid"]:
            at_eps = self.rows[(self.rows.eps == eps) & self.rows.fooled]
            for name in order:
                images = at_eps.image[at_eps.attack == name]
                new = images[first[images].eq("none").to_numpy()]
                first[new] = name
            lines[eps] = first.value_counts()
        table = pd.DataFrame(lines).T.reindex(columns=[*order, "none"])
        return table.fillna(0).astype(int).rename_axis("eps")

    def report(self) -> pd.DataFrame:
        """The check list of this evaluation (`attacks.checklist`); it attacks a sample once more."""
        return self._checks

    def threat(self) -> str:
        """The threat model in words."""
        said = self.settings
        classes = (
            "any wrong class (of two classes, the other one: targeted and untargeted are the same)"
        )
        blind = [name for name in said["attacks"] if KINDS[name].blind]
        unit = (
            "largest change of a pixel" if said["norm"] == "linf" else "length of the whole change"
        )
        limits = [
            text
            for text, holds in {
                "one change for R=G=B": said["grey"],
                "only the pixels of the mask": said["mask"],
            }.items()
            if holds
        ]
        lines = {
            "goal": classes,
            "ball": f"{said['norm']} ({unit}), eps {self.balls()}, pixels in [0,1]",
            "limits": "; ".join(limits) or "none besides: every pixel and channel may change",
            "knowledge": f"weights and gradients; answers alone: {', '.join(blind) or 'no attack'}",
            "attacks": "; ".join(self._budget(name) for name in said["attacks"]),
            "operators": f"also straight through ({said['bpda']})"
            if said["bpda"]
            else "exact gradients",
            "draws": f"seed {said['seed']}, {said['eot']} pass(es) of the model per look",
        }
        return "\n".join(f"  {name:10}{line}" for name, line in lines.items())

    def text(self, *, checks: bool = True) -> str:
        """One page: threat model, table, cost, and the check list unless `checks` is False."""
        spent = self.cost[["forwards", "backwards", "seconds"]].sum()
        said = (
            "Fooled images were dropped: an attack's column is over the images that still stood when it came "
            "(-: none); clean and worst are over all."
            if self.settings["early_drop"]
            else "Every attack was run on every image that the model gets right; columns are over all images."
        )
        parts = [
            "Robust accuracy, worst case per image (arXiv 1902.06705)",
            self.threat(),
            self._printed().to_string(float_format=lambda value: f"{value:.3f}", na_rep="-"),
            f"{said} Brackets: 95 % by {'image (no patients given)' if self.groups is None else 'patient'}.\n"
            f"Spent: {spent.forwards:.0f} forward and {spent.backwards:.0f} backward image-passes, "
            f"{spent.seconds:.0f} s.",
        ]
        if checks:
            found = self.report()
            counts = found.verdict.value_counts().reindex(["PASS", "WARN"], fill_value=0)
            remarks = found.why.radd(". ").where(found.verdict.eq("WARN"), "")
            lines = "  " + found.verdict + "  " + found.check + ": " + found.value + remarks
            parts.append("\n".join([f"Check list: {counts.PASS} PASS, {counts.WARN} WARN", *lines]))
        return "\n\n".join(parts) + "\n"

    def figure(self, caption: str = "") -> Figure:
        """Accuracy against eps (worst case with its band), and which attack fooled the images first."""
        from ..plots import (
            COLORS,
            line_style,
            panels,
        )  # not at the top: the report imports this module

        table, scale = self.table(), 255 if self.settings["norm"] == "linf" else 1
        figure, axes = panels(2, width=5.6, height=3.9)
        left, right = axes[0]
        x, worst = np.r_[0, table.eps * scale], np.r_[table.clean[0], table.worst]
        if not self.settings["early_drop"]:
            for number, name in enumerate(self._attacks()):
                style = line_style(number) | {"marker": "", "lw": 0.9, "alpha": 0.8}
                left.plot(x, np.r_[table.clean[0], table[name]], label=name, **style)
        left.plot(x, worst, "o-", ms=4, lw=1.8, color="0.2", label="worst case")
        low, high = (
            np.r_[table[f"clean_{end}"][0], table[f"worst_{end}"]] for end in ("low", "high")
        )
        left.fill_between(x, low, high, color="0.2", alpha=0.12, lw=0)
        unit = "k/255, pixel units" if scale == 255 else "L2 length, pixel units"
        left.set(xlabel=f"eps ({unit})", ylabel="accuracy", ylim=(-0.02, 1.02))
        left.grid(alpha=0.25)
        left.legend(fontsize=7, frameon=False)
        counts, below = self.first_fooled() / len(self.images), np.zeros(len(table))
        for number, name in enumerate(counts):
            color = {"clean": "0.2", "none": "0.93"}.get(name, COLORS[(number - 1) % len(COLORS)])
            hatch = "//" if number > len(COLORS) and name != "none" else None
            label = {"clean": "wrong from the start", "none": "robust"}.get(name, name)
            right.bar(table.ball, counts[name], bottom=below, color=color, hatch=hatch, label=label)
            below += counts[name].to_numpy()
        right.set(xlabel="eps", ylabel="share of the images", title="fooled first by", ylim=(0, 1))
        right.tick_params(axis="x", labelsize=7)
        right.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        note = f"\n{caption}" if caption else ""
        left.set_title(f"Worst case over the suite{note}", fontsize=9)
        right.title.set_fontsize(9)
        figure.tight_layout()
        return figure

    @cached_property
    def _checks(self) -> pd.DataFrame:
        from .checklist import checklist  # not at the top: the check list runs `robust` itself

        return checklist(self.model, self.images, self.labels, self)

    def _printed(self) -> pd.DataFrame:
        """The table with each interval beside its number."""
        table = self.table().drop(columns="eps").set_index("ball")
        for name in ("clean", "worst"):
            low, high = table.pop(f"{name}_low"), table.pop(f"{name}_high")
            cells = zip(table[name], low, high, strict=True)
            table[name] = [f"{value:.3f} [{least:.3f}, {most:.3f}]" for value, least, most in cells]
        return table

    def _attacks(self) -> list[str]:
        return [name for name in dict.fromkeys(self.rows.attack) if name not in ("clean", "worst")]

    def balls(self, name: str | None = None) -> str:
        """The eps grid in words, or those eps at which the attack `name` is run."""
        return ", ".join(map(self._ball, self.settings["at"].get(name, self.settings["eps_grid"])))

    def _budget(self, name: str) -> str:
        """The attack with the numbers that make it strong or weak."""
        shared = ("norm", "seed", "grey", "eot", "loss")
        numbers = {k: v for k, v in self.settings["attacks"][name].items() if k not in shared}
        words = [f"{key} {value}" for key, value in numbers.items()]
        words += [f"only at {self.balls(name)}"] if name in self.settings["at"] else []
        return f"{name} ({', '.join(words)})" if words else name

    def _ball(self, eps: float) -> str:
        return pixel_text(eps) if self.settings["norm"] == "linf" else f"{eps:g}"


# ------------------------------------------------------------------------------------------- what is run


@dataclass(frozen=True)
class _Run:
    """One attack of the suite, ready: what it attacks, and the context around it."""

    attack: Callable[..., c.AttackResult]
    smallest: bool
    attacked: nn.Module
    context: Bpda
    at: Sequence[float] | None = None  # eps at which it is run; None: all


def _known_bpda(model: nn.Module) -> Bpda | None:
    """The context for the operators of the suite whose exact gradients hide directions; None without any."""
    sparse = (module for module in model.modules() if isinstance(module, MeanSparse))
    return straight_through if any(bool(module.threshold > 0) for module in sparse) else None


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(KINDS[name].attack).parameters


def _knows(name: str, norm: str) -> bool:
    return "norm" in _parameters(name) or KINDS[name].norm == norm


def _options(
    name: str, shared: Mapping[str, Any], budgets: Mapping[str, Mapping]
) -> dict[str, Any]:
    """What an attack is called with besides the images: the shared options, its own, those of the caller."""
    if not _knows(name, shared["norm"]):
        raise ValueError(
            f"the attack {name!r} does not know norm={shared['norm']!r}; leave it out of attacks, or leave "
            "attacks out"
        )
    known, own = _parameters(name), dict(budgets.get(name, {}))
    fixed = {
        "model",
        "x",
        "y",
        "eps",
        "ids",
        "mask",
        "surrogate",
        "progress",
        "norm",
        "seed",
        "grey",
        "eot",
    }
    odd = sorted(set(own) - (set(known) - fixed))
    if odd:
        raise ValueError(f"budgets[{name!r}] holds {odd}; it may set {sorted(set(known) - fixed)}")
    return (
        {key: value for key, value in shared.items() if key in known}
        | dict(KINDS[name].options)
        | own
    )


def _check_names(argument: str, given: Mapping[str, Any], options: Mapping[str, Mapping]) -> None:
    strange = sorted(set(given) - set(options))
    if strange:
        raise ValueError(
            f"{argument} speaks of {strange}, which are not among the attacks run: {list(options)}"
        )


def _chosen_eps(
    at: Mapping[str, Iterable[float]], options: Mapping[str, Mapping], grid: Sequence[float]
) -> dict[str, list[float]]:
    """By attack the eps of the grid at which it is run, for those that are not run at all of them."""
    _check_names("at", at, options)
    chosen = {}
    for name, wanted in ((name, list(eps)) for name, eps in at.items()):
        chosen[name] = [eps for eps in grid if np.isclose(eps, wanted, rtol=1e-6, atol=0).any()]
        if KINDS[name].smallest:
            raise ValueError(
                f"at[{name!r}]: this attack is run once and counts at every eps; leave it out of at"
            )
        if len(chosen[name]) < len(set(wanted)) or not chosen[name]:
            raise ValueError(
                f"at[{name!r}] must be eps of the grid {grid}, at least one; got {wanted}"
            )
    return chosen


def _runs(
    model: nn.Module,
    options: Mapping[str, Mapping[str, Any]],
    at: Mapping[str, Sequence[float]],
    bpda: Bpda | None,
    surrogate: nn.Module | None,
    probe: Tensor,
    *,
    fast: bool,
) -> dict[str, _Run]:
    """By name and in the order they run; with `fast` on a folded copy that answers `probe` as the model does."""
    exact = _faithful_copy(model, probe) if fast else model
    runs = {}
    for name, own in options.items():
        extra = {"surrogate": surrogate} if name == "transfer" else {}
        attack = partial(KINDS[name].attack, **own, **extra)
        runs[name] = _Run(attack, KINDS[name].smallest, exact, nullcontext, at.get(name))
    if bpda is not None:
        # A folded copy has no operators left, but their gradient as it was when the copy was made.
        with bpda(model):
            through = _faithful_copy(model, probe) if fast else model
        for name in set(TWICE) & set(options):
            runs[f"{name}{BPDA}"] = _Run(runs[name].attack, False, through, bpda, at.get(name))
    return {name: runs[name] for name in sorted(runs, key=ORDER.index)}


def _faithful_copy(model: nn.Module, probe: Tensor) -> nn.Module:
    """A folded copy, or the model itself where the copy is another function.

    Tracing keeps one way through the code and loses hooks of the whole model: a random or a hooked model would be
    attacked as something that it is not.
    """
    copied = fast_copy(
        model
    )  # with gradients on: what goes straight through an operator would be traced away
    with torch.no_grad():
        answers = torch.stack([model(probe).float() for _ in range(PASSES)])
        gap = float((torch.cat([answers, copied(probe).float()[None]]) - answers[0]).abs().max())
    if gap <= ALIKE * max(1.0, float(answers.abs().max())):
        return copied
    log.warning(
        "a folded copy of the model answers otherwise (logits differ by %.2g): the model itself is attacked",
        gap,
    )
    return model


class _Undecided(nn.Module):
    """Logits 0 and -1 for every image, with a gradient: at label 1 it is wrong from the start."""

    def forward(self, x: Tensor) -> Tensor:
        nothing = 0 * x.flatten(1).sum(1, keepdim=True)
        return torch.cat([nothing, nothing - 1], dim=1)


def _rehearse(
    options: Mapping[str, Mapping[str, Any]], image: Tensor, mask: Tensor | None, eps: float
) -> None:
    """Call each attack once, on a model that costs nothing: what it refuses is refused before any work."""
    stand_in, y = _Undecided().eval(), torch.ones(1, dtype=torch.int64, device=image.device)
    for name, own in options.items():
        extra = {"surrogate": stand_in} if name == "transfer" else {}
        extra |= {} if mask is None else {"mask": mask.to(image.device)}
        KINDS[name].attack(
            stand_in, image, y, eps=None if KINDS[name].smallest else eps, **own, **extra
        )


# ------------------------------------------------------------------------------------------- running it


@dataclass(frozen=True)
class _Images:
    """The images, and how they go to the model."""

    images: Tensor
    labels: Tensor
    ids: np.ndarray
    mask: Tensor | None
    device: torch.device
    batch_size: int
    norm: str
    eot: int

    def batches(self, positions: np.ndarray) -> Iterable[tuple[slice, np.ndarray]]:
        for start in range(0, len(positions), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield part, positions[part]

    def at(self, positions: np.ndarray) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Images, labels, and what else an attack must know of them."""
        rows = torch.from_numpy(positions)
        more: dict[str, Any] = {"ids": self.ids[positions].tolist()}
        if self.mask is not None:
            more["mask"] = (self.mask if len(self.mask) == 1 else self.mask[rows]).to(self.device)
        return self.images[rows].to(self.device), self.labels[rows].to(self.device), more


@dataclass
class _Block:
    """One attack at one eps: what it did to the images at `positions`, and what it cost."""

    attack: str
    eps: float
    positions: np.ndarray  # [n] of the images attacked
    step: np.ndarray  # [n] first step that fooled; -1: none
    queries: np.ndarray  # [n]
    distance: np.ndarray  # [n] size of the smallest fooling change; inf: none, or not looked for
    forwards: int = 0
    backwards: int = 0
    refuted: int = 0  # fooled the copy only
    seconds: float = 0.0

    @classmethod
    def of(cls, attack: str, eps: float, positions: np.ndarray) -> _Block:
        n = len(positions)
        return cls(
            attack, eps, positions, np.full(n, -1), np.ones(n, dtype=np.int64), np.full(n, np.inf)
        )

    def inside(self, eps: float) -> _Block:
        """A search for the smallest change, as an attack of the ball of this eps."""
        step = np.where(self.distance <= eps, self.step, -1)
        return _Block(**{**vars(self), "eps": eps, "step": step})

    def of_known(self, eps: float, positions: np.ndarray) -> _Block:
        """What an earlier search already says about `positions` at another eps: it costs nothing."""
        rows = np.searchsorted(self.positions, positions)
        known = _Block.of(self.attack, eps, positions)
        known.step, known.distance = self.step[rows], self.distance[rows]
        known.queries = np.zeros(len(rows), dtype=np.int64)
        return known.inside(eps)

    def cost(self) -> dict[str, Any]:
        counts = {"attacked": len(self.positions), "fooled": int((self.step >= 0).sum())}
        spent = {"forwards": self.forwards, "backwards": self.backwards, "seconds": self.seconds}
        return {"attack": self.attack, "eps": self.eps, **counts, **spent}


def _attack_all(
    model: nn.Module,
    data: _Images,
    grid: Sequence[float],
    runs: Mapping[str, _Run],
    *,
    early_drop: bool,
    store: Path | None,
    progress: bool,
) -> list[_Block]:
    """The clean images, then every attack at every eps, small balls first."""
    total = len(data.images)
    clean = _kept(store, "clean", np.arange(total), lambda: _judge_clean(model, data))
    fooled = clean.step == 0
    attackable, blocks, known = np.flatnonzero(~fooled), [clean], {}
    with Bar(
        total=total * len(grid) * len(runs), desc="attacks", unit="image", disable=not progress
    ) as bar:
        for eps in grid:
            for name in sorted(
                runs, key=lambda name: name not in known
            ):  # what costs nothing comes first
                if runs[name].at is not None and eps not in runs[name].at:
                    bar.update(total)
                    continue
                standing = np.flatnonzero(~fooled) if early_drop else attackable
                if name in known:
                    block = known[name].of_known(eps, standing)
                else:
                    strike = partial(_strike, model, name, runs[name], data, standing, eps)
                    # What looks for the smallest change does so once, whatever the grid.
                    place = name if runs[name].smallest else f"{eps:.9g}_{name}"
                    block = _kept(store, place, standing, strike)
                    if runs[name].smallest:
                        known[name], block = block, block.inside(eps)
                fooled[standing[block.step >= 0]] = True
                blocks.append(block)
                bar.update(total)
                bar.set_postfix(eps=f"{eps:.3g}", standing=int((~fooled).sum()))
    refuted = sum(block.refuted for block in blocks)
    if refuted:
        log.info("%d times an image fooled the folded copy only and was attacked again", refuted)
    return blocks


def _judge_clean(model: nn.Module, data: _Images) -> _Block:
    start, block = time.perf_counter(), _Block.of("clean", 0.0, np.arange(len(data.images)))
    for part, positions in data.batches(block.positions):
        x, y, _ = data.at(positions)
        block.step[part] = np.where(_wrong(model, x, y, data.eot), 0, -1)
    block.forwards, block.seconds = data.eot * len(data.images), time.perf_counter() - start
    return block


def _strike(
    model: nn.Module, name: str, run: _Run, data: _Images, positions: np.ndarray, eps: float
) -> _Block:
    """One attack on the images at `positions`, judged on `model` itself."""
    start, block = time.perf_counter(), _Block.of(name, eps, positions)
    takes_ids = "ids" in inspect.signature(run.attack).parameters
    for part, own in data.batches(positions):
        rows = np.arange(part.start, part.start + len(own))
        for target in dict.fromkeys([run.attacked, model]):
            if not len(rows):
                break
            x, y, more = data.at(positions[rows])
            if not takes_ids:
                more.pop("ids")
            with run.context(model):
                result = run.attack(target, x, y, eps=None if run.smallest else eps, **more)
            success, claimed = (
                _wrong(model, result.x_adv, y, data.eot),
                result.success.cpu().numpy(),
            )
            hit = rows[success]
            block.step[hit] = np.maximum(result.first_success_step.cpu().numpy(), 1)[success]
            if run.smallest:
                size = result.linf if data.norm == "linf" else result.l2
                block.distance[hit] = size.double().cpu().numpy()[success]
            block.queries[rows] += result.queries.cpu().numpy() + data.eot
            block.forwards += result.forwards + data.eot * len(rows)
            block.backwards += result.backwards
            rows = rows[claimed & ~success]
            if target is not model:
                block.refuted += len(rows)
    block.seconds = time.perf_counter() - start
    return block


@torch.no_grad()
def _wrong(model: nn.Module, x: Tensor, y: Tensor, eot: int) -> np.ndarray:
    """Whether most of `eot` passes are wrong, bool [B]."""
    return (c.answer(model, x, y, c.margin, eot=eot, check=True)[0] > 0.5).cpu().numpy()


# ------------------------------------------------------------------------------------------- tables


def _rows(
    blocks: Sequence[_Block], data: _Images, grid: Sequence[float], *, early_drop: bool
) -> pd.DataFrame:
    """Tidy rows of all blocks, and of the worst case at every eps."""
    wrong = blocks[0].step == 0
    best, spent = np.where(wrong, 0, NEVER), np.zeros(len(wrong), dtype=np.int64)
    tables, worst = [], []
    for eps in (0.0, *grid):
        for block in blocks:
            if block.eps != eps:
                continue
            if block.attack != "clean" and not early_drop:
                block = _over_all(block, wrong)
            tables.append(
                _table(data, block.attack, eps, block.positions, block.step, block.queries)
            )
            if eps:
                held = block.positions[block.step >= 0]
                best[held] = np.minimum(best[held], block.step[block.step >= 0])
                spent[block.positions] += block.queries
        if eps:
            everyone, step = np.arange(len(wrong)), np.where(best < NEVER, best, -1)
            worst.append(_table(data, "worst", eps, everyone, step, np.maximum(spent, 1)))
    return pd.concat([*tables, *worst], ignore_index=True)[COLUMNS]


def _over_all(block: _Block, wrong: np.ndarray) -> _Block:
    """A clean error counts as fooled by every attack, at step 0."""
    whole = _Block.of(block.attack, block.eps, np.arange(len(wrong)))
    whole.step = np.where(wrong, 0, -1)
    whole.step[block.positions], whole.queries[block.positions] = block.step, block.queries
    return whole


def _table(
    data: _Images,
    attack: str,
    eps: float,
    positions: np.ndarray,
    step: np.ndarray,
    queries: np.ndarray,
) -> pd.DataFrame:
    about = {"image": data.ids[positions], "label": data.labels.cpu().numpy()[positions]}
    outcome = {"fooled": step >= 0, "first_success_step": step, "queries": queries}
    return pd.DataFrame({"attack": attack, "eps": eps, **about, **outcome})


def _distances(blocks: Sequence[_Block], data: _Images) -> pd.DataFrame:
    """The sizes that the attacks for the smallest change found, each of which has one block that looked."""
    searched = {}
    for block in blocks:
        if block.attack != "clean" and kind(block.attack).smallest:
            searched.setdefault(block.attack, block)
    parts = (
        [pd.DataFrame({"attack": [], "image": [], "label": [], "distance": []})]
        if not searched
        else []
    )
    for name, block in searched.items():
        distance = np.where(np.isfinite(block.distance), block.distance, np.nan)
        labels = data.labels.cpu().numpy()[block.positions]
        about = {"attack": name, "image": data.ids[block.positions], "label": labels}
        parts.append(pd.DataFrame(about | {"distance": distance}))
    return pd.concat(parts, ignore_index=True)


# ------------------------------------------------------------------------------------------- going on


def _tensors(data: Data, *, ordered: bool) -> tuple[Tensor, Tensor]:
    """Images and labels, of a pair of tensors or of batches; `ordered`: something else is given image by image."""
    if (
        isinstance(data, (tuple, list))
        and len(data) == 2
        and all(isinstance(part, Tensor) for part in data)
    ):
        return data[0], data[1]
    if ordered and isinstance(getattr(data, "sampler", None), RandomSampler):
        raise ValueError(
            "the loader shuffles, so groups, ids, mask and folder would belong to other images: shuffle=False"
        )
    batches = list(data)
    if any(isinstance(batch, Mapping) for batch in batches):
        raise ValueError(
            "data yields dicts; it must yield batches (x, y, ...), such as ((b['x'], b['y']) for b in loader)"
        )
    batches = [(batch[0], batch[1]) for batch in batches]
    if not batches or not all(isinstance(part, Tensor) for batch in batches for part in batch):
        raise ValueError(
            "data must be (images, labels), or yield batches (x, y, ...) of tensors and not be empty"
        )
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def _open_store(folder: Path, settings: dict[str, Any], resume: bool) -> Path:
    """The folder of finished blocks; one that belongs to another evaluation is refused, or cleared.

    In full (no early_drop) no attack waits for another: blocks stand for themselves, and those of an attack
    whose options changed are removed.
    """
    asked = json.loads(json.dumps({"format": FORMAT, **settings}, default=str))
    path = folder / "settings.json"
    if resume and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        free = () if asked["early_drop"] else ("at", "attacks", "eps_grid")
        names = [
            name
            for name in {**kept, **asked}
            if name not in free and kept.get(name) != asked.get(name)
        ]
        if names:
            changes = "; ".join(
                f"{name}: {kept.get(name)!r} -> {asked.get(name)!r}" for name in names
            )
            raise ValueError(
                f"{folder} holds an evaluation of something else ({changes}): take another folder, or "
                "resume=False to start anew"
            )
        stale = [
            name for name, own in asked["attacks"].items() if kept["attacks"].get(name, own) != own
        ]
        asked["attacks"] = kept["attacks"] | asked["attacks"]
    else:
        stale = ["*"]
    for name in stale:
        for block in (
            *folder.glob(f"block_{name}.npz"),
            *folder.glob(f"block_*_{name}.npz"),
            *folder.glob(f"block_*_{name}{BPDA}.npz"),
        ):
            block.unlink(missing_ok=True)
    files.write_json(asked, path)
    return folder


def _kept(
    store: Path | None, name: str, positions: np.ndarray, compute: Callable[[], _Block]
) -> _Block:
    """The block as it was kept, or computed now and kept."""
    if store is None:
        return compute()
    path = store / f"block_{name}.npz"
    if path.exists():
        with np.load(path) as kept:
            block = _Block(
                **{key: kept[key] if kept[key].ndim else kept[key].item() for key in kept}
            )
        if not np.array_equal(block.positions, positions):
            raise ValueError(
                f"{path} does not fit the other files of its folder; pass resume=False to start anew"
            )
        return block
    block = compute()
    with files.atomic_path(path) as temporary:
        np.savez(temporary, **vars(block))
    return block


def _hash(values: Tensor) -> str:
    content = values.detach().cpu().contiguous().numpy().tobytes()
    shape = f"{values.dtype}{tuple(values.shape)}".encode()
    return hashlib.sha1(shape + content, usedforsecurity=False).hexdigest()


def _model_hash(model: nn.Module) -> str:
    """Of the weights, of the layers and of the plain attributes of each: two models may share the weights only."""
    plain = (bool, int, float, str, tuple, list)
    attributes = [
        (name, key, repr(value))
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
        if key != "training" and not key.startswith("_") and isinstance(value, plain)
    ]
    layers = hashlib.sha1(f"{model}{attributes}".encode(), usedforsecurity=False).hexdigest()[:8]
    return f"{fingerprint(model)}-{layers}"


def _name(given: Any) -> str:
    """A context for the settings: its name and, of a partial, what it was given."""
    if isinstance(given, partial):
        inside = [
            *map(_name, given.args),
            *(f"{key}={_name(value)}" for key, value in given.keywords.items()),
        ]
        return f"{_name(given.func)}({', '.join(inside)})"
    if isinstance(given, nn.Module):
        return f"{type(given).__name__} {_model_hash(given)}"
    if isinstance(given, Mapping):
        return f"{{{', '.join(f'{_name(key)}: {_name(value)}' for key, value in given.items())}}}"
    if given is None or isinstance(given, (bool, int, float, str, tuple, list)):
        return repr(given)
    return getattr(given, "__qualname__", type(given).__name__)


# ------------------------------------------------------------------------------------------- summaries


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
    device = c.device_of(model, images)
    zeros = 0
    with c.frozen(model), torch.enable_grad():
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            x, y = x.to(device).requires_grad_(), y.to(device)
            value = objective(c.check_logits(model(x), y), y).sum()
            (gradient,) = torch.autograd.grad(value, x)
            zeros += int((gradient.flatten(1) == 0).all(1).sum())
    return zeros / len(images)


# ------------------------------------------------------------------------------------------- checks


def row_checks(
    rows: pd.DataFrame, *, eps_text: Callable[[float], str] = pixel_text
) -> dict[str, tuple[str, bool, str]]:
    """The checks of `checklist.checklist` that compare attacks, by key: (check, passed, detail).

    rows: those of `robust` with early_drop=False. A check is left out where its attacks were not run, or at no
    eps in common. Errors: ValueError for rows of which fooled images were dropped.
    """
    fooled = outcomes(rows)
    through = [name for name in fooled if name.endswith(BPDA)]
    iterated = [
        name for name in fooled if name in ORDER and not kind(name).blind and name != "fgsm"
    ]
    lead = partial(_lead, fooled, eps_text=eps_text)

    def share_an_eps(strong: list[str], weak: str) -> bool:  # `at` may keep two attacks apart
        met = {eps for name in strong if name in fooled for eps in fooled[name]}
        return weak in fooled and not met.isdisjoint(fooled[weak])

    checks = {}
    if share_an_eps(iterated, "fgsm"):
        checks["iterated"] = _beats(
            "PGD fools at least what FGSM fools", fooled, iterated, "fgsm", eps_text
        )
    if share_an_eps(iterated, "noise"):
        checks["noise"] = _beats(
            "random noise is weaker than PGD", fooled, iterated, "noise", eps_text
        )
    if share_an_eps(["pgd_margin"], "pgd_ce"):
        found = lead(strong="pgd_margin", weak="pgd_ce", what="the margin loss")
        checks["loss"] = ("cross-entropy finds what the margin loss finds (no masking)", *found)
    for name in (name for name in through if share_an_eps([name], name.removesuffix(BPDA))):
        found = lead(strong=name, weak=name.removesuffix(BPDA), what="the way through the operator")
        checks[name] = (f"exact gradients find what {name} finds (no masking)", *found)
    attacks = {name: table for name, table in fooled.items() if name not in ("clean", "worst")}
    checks["monotone"] = _monotone(attacks, eps_text)
    return checks


def outcomes(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By attack: fooled, images down, eps across. Errors: ValueError where an attack lacks images."""
    tables = {
        name: part.pivot(index="image", columns="eps", values="fooled")
        for name, part in rows.groupby("attack", sort=False)
    }
    images = rows.image.nunique()
    if any(len(table) < images or table.isna().any(axis=None) for table in tables.values()):
        raise ValueError(
            "the rows of an attack do not cover all images at every eps: its numbers cannot be compared with "
            "those of another; take the rows of robust(..., early_drop=False)"
        )
    return {name: table.astype(bool) for name, table in tables.items()}


def kind(name: str) -> Kind:
    """What the suite knows of an attack, straight through an operator or not."""
    return KINDS[name.removesuffix(BPDA)]


def _beats(
    check: str, fooled: dict[str, pd.DataFrame], strong: list[str], weak: str, eps_text: Callable
) -> tuple[str, bool, str]:
    """At every eps the strong attacks together fool at least as many images as the weak one."""
    common = [eps for eps in fooled[weak] if any(eps in fooled[name] for name in strong)]
    weaker = fooled[weak][common].to_numpy()
    union = np.logical_or.reduce(
        [fooled[name].reindex(columns=common, fill_value=False).to_numpy() for name in strong]
    )
    counts = [
        f"{eps_text(eps)}: {ours} " + (f">= {theirs}" if ours >= theirs else f"< {theirs} FAILED")
        for eps, ours, theirs in zip(common, union.sum(0), weaker.sum(0), strict=True)
    ]
    alone = int((weaker & ~union).sum())
    passed = bool((union.sum(0) >= weaker.sum(0)).all())
    return check, passed, f"{'; '.join(counts)}; fooled by {weak} only: {alone}"


def _lead(
    fooled: dict[str, pd.DataFrame], *, strong: str, weak: str, what: str, eps_text: Callable
) -> tuple[bool, str]:
    """Whether `strong` fools hardly more than `weak` at any eps: a lead means a vanished or hidden gradient.

    With two classes cross-entropy and margin point the same way, and so do exact gradients and those straight
    through an operator that hides none.
    """
    lead = (
        fooled[strong].mean() - fooled[weak].mean()
    ).dropna()  # at the eps that both were run at
    worst = lead.idxmax()
    detail = f"largest lead of {what}: {lead[worst]:.1%} of the images at {eps_text(worst)}"
    return bool(lead[worst] <= LEAD), detail


def _monotone(fooled: dict[str, pd.DataFrame], eps_text: Callable) -> tuple[str, bool, str]:
    falls = []
    for name, table in fooled.items():
        counts = table.sum()
        for (low, few), (high, many) in zip(
            list(counts.items())[:-1], list(counts.items())[1:], strict=True
        ):
            if many < few:
                falls.append(f"{name} {eps_text(low)} -> {eps_text(high)}: {few} -> {many}")
    return "a larger eps never fools fewer", not falls, "; ".join(falls) or "holds for every attack"
