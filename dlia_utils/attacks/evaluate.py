"""Robust accuracy: the worst case per image over a suite of attacks (arXiv 1902.06705)."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .. import files, metrics
from ..device import device_of, fingerprint, fitting_batch, release_memory, tf32
from ..models.pixel import fast_copy
from ..models.robust.meansparse import MeanSparse, straight_through
from ..progress import Bar
from ..units import check_numbers, pixel_text
from . import apgd, base, deepfool, fgsm, fmn, noise, one_pixel, pgd, square

log = logging.getLogger("dlia_utils")

BPDA = "_bpda"  # ends the name of an attack straight through an operator (arXiv 1802.00420)
STANDING = ", of those standing"  # ends the name of an attack that met these alone
COLUMNS = "attack eps image label fooled first_success_step queries".split()
FORMAT = 5  # of the files in `folder`
NEVER = np.iinfo(np.int64).max
PROBE, ALIKE = 16, 1e-3  # images a folded copy is compared on; share of the logits it may differ by
CONTEXTS = {"": nullcontext, BPDA: straight_through}  # around an attack, by the end of its name


@dataclass(frozen=True)
class Kind:
    """An attack as the suite calls it, and what the check list must know of it."""

    attack: Callable[..., base.AttackResult]
    options: Mapping[str, Any] = field(default_factory=dict)
    blind: bool = False  # sees no gradient
    smallest: bool = False  # looks for the smallest change: one run counts at every eps
    twice: bool = False  # run straight through an operator as well
    stream: int = 0  # of its random starts: two losses, two attacks that begin elsewhere

    @property
    def parameters(self) -> set[str]:
        return set(inspect.signature(self.attack).parameters)

    def seeds(self, seed: int, ids: Iterable[int]) -> list[tuple[int, int]]:
        """The seed of each image; a generator reads the stream as a second word of it."""
        return [(int(seed) + (self.stream << 32), int(i)) for i in ids]

    def run(self, model: nn.Module, x: Tensor, y: Tensor, options: Mapping, **given):
        """The attack, with what it takes of eps and seed."""
        given = {"norm": "linf"} | given
        given = {key: value for key, value in given.items() if key in self.parameters}
        return self.attack(model, x, y, **options, **given)


KINDS = {
    "noise": Kind(noise, blind=True),
    "fgsm": Kind(fgsm),
    "deepfool": Kind(deepfool, {"steps": 20}, smallest=True),
    "pgd_ce": Kind(pgd, {"loss": "ce"}, twice=True),
    "pgd_margin": Kind(pgd, {"loss": "margin"}, twice=True, stream=1),
    "apgd_ce": Kind(apgd, {"loss": "ce", "steps": 50}, twice=True, stream=2),
    "apgd_margin": Kind(apgd, {"loss": "margin", "steps": 50}, twice=True, stream=3),
    "fmn": Kind(fmn, {"steps": 50}, smallest=True),
    "one_pixel": Kind(one_pixel, {"population": 20, "iterations": 20}, blind=True),
    "square": Kind(square, {"steps": 500, "restarts": 1}, blind=True),
}
LINF = tuple(KINDS)  # what `attacks` may name
SUITE = tuple("noise fgsm pgd_ce pgd_margin deepfool apgd_ce apgd_margin fmn square".split())
# Cheap ones first; the black boxes last, to show what no gradient found.
ORDER = "noise fgsm deepfool pgd_ce pgd_margin pgd_ce_bpda pgd_margin_bpda apgd_ce apgd_margin"
ORDER = f"{ORDER} apgd_ce_bpda apgd_margin_bpda fmn one_pixel square".split()


def kind(name: str) -> Kind:
    """What the suite knows of an attack, whatever ends its name."""
    return KINDS[name.removesuffix(STANDING).removesuffix(BPDA)]


def passes(name: str, options: Mapping[str, Any], *, classes: int = 2) -> tuple[int, int]:
    """Forward and backward passes of an image that the attack `name` cannot fool: the most.

    >>> passes("pgd_ce", {"steps": 20, "restarts": 2}), passes("square", {"steps": 2000})
    ((43, 40), (2002, 0))
    """
    usual = inspect.signature(KINDS[name].attack).parameters.items()
    own = {key: one.default for key, one in usual} | dict(KINDS[name].options) | dict(options)
    steps, starts = own.get("steps", 1), own.get("restarts", 1)
    forwards = {"noise": 1 + own.get("draws", 0), "fgsm": 2, "deepfool": steps + 1}
    forwards["one_pixel"] = 2 + own.get("population", 0) * (own.get("iterations", 0) + 1)
    backwards = dict.fromkeys(("noise", "one_pixel", "square"), 0)
    backwards["deepfool"] = steps * (classes - 1)
    climbing = (starts > 0) + max(starts, 1) * (steps + 1)  # the last point is judged, too
    return forwards.get(name, climbing), backwards.get(name, max(starts, 1) * steps)


def most_passes(
    images: int, eps_grid: Iterable[float], *, full_at=None, through: bool = False, **options: Any
) -> np.ndarray:
    """Forward and backward image-passes [2] of `robust` on so many images of two classes: at most.

    An image that fools the folded copy alone, which is rare, is attacked twice. through: of a model
    with MeanSparse operators; the others as for `robust`.
    """
    asked = dict(attacks=SUITE, steps=10, restarts=1, budgets=None, at=None, most=None) | options
    chosen = _options(*(asked[key] or {} for key in ("attacks", "steps", "restarts", "budgets")))
    grid, most = sorted({*map(float, eps_grid)} - {0.0}), asked["most"] or {}
    where, parts = _at(asked["at"] or {}, chosen, grid), np.zeros((3, 2), int)
    for name, own in chosen.items():
        smallest, ways = KINDS[name].smallest, 1 + (through and KINDS[name].twice)
        cost = ways * min(images, most.get(name, images)) * (np.array(passes(name, own)) + [1, 0])
        for eps in grid[:1] if smallest else where.get(name, grid):
            # What stands in the ball full_at meets the larger ones alone, what falls the smaller.
            apart = full_at and not (smallest or name in most or np.isclose(eps, full_at))
            parts[int(np.sign(eps - full_at)) if apart else 0] += cost
    return parts[0] + parts[1:].max(0) + [images, 0]


def robust(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    eps_grid: Iterable[float],
    *,
    attacks: Sequence[str] = SUITE,
    steps: int = 10,
    restarts: int = 1,
    budgets: Mapping[str, Mapping[str, Any]] | None = None,
    at: Mapping[str, Iterable[float]] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    groups: Sequence | None = None,
    in_full: int | None = 100,
    full_at: float | None = None,
    most: Mapping[str, int] | None = None,
    fast: bool = True,
    search_dtype: torch.dtype | None = None,
    folder: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Evaluation:
    """The worst case per image: right, and fooled by no attack at this eps or a smaller one.

    Each attack has random starts of its own. Of two classes cross-entropy and margin climb alike:
    there the pair is two starts, and shows by its difference a softmax that saturates.
    data: images [N,C,H,W] in [0,1] and labels int64 [N]. eps_grid: pixel units (k/255). attacks:
    names in `KINDS`. steps, restarts: of PGD; budgets: options of single attacks; at: the eps of
    expensive ones; most: attacks that meet at most so many images, of those that still stand the
    ones with the smallest change known (their rows are of these alone). groups: patients [N]. The
    draws depend on seed and ids only; batch_size: None is what a GPU's memory holds.

    An image once fooled is attacked no more, which gives the same worst case with far fewer passes.
    in_full: so many images, evenly spread, meet every attack none the less, for the columns by
    attack; None: all, 0: none. full_at: an eps of the grid; they do so there alone, that ball comes
    first, and elsewhere only what it leaves open is attacked: what stands in it stands in smaller
    ones, what falls falls in larger ones.

    Success is judged on `model`. fast: a folded copy that answers alike is attacked; search_dtype:
    under autocast to bfloat16 or float16, which may miss an image (float16 loses small gradients);
    what fools only the copy is attacked again on `model`. folder: finished blocks are kept there,
    and read back where nothing they depend on has changed. Raises: ValueError before any work.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
    >>> robust(model, (x, y), [8 / 255, 1.0], progress=False).table().ball.tolist()
    ['8/255', '255/255']
    """
    grid = sorted({float(eps) for eps in eps_grid} - {0.0})
    options = _options(attacks, steps, restarts, budgets or {})
    ids = np.arange(len(data[0])) if ids is None else np.asarray(ids)
    groups = None if groups is None else metrics.patient_codes(groups)
    check_numbers("[1,inf)", whole=True, batch_size=1 if batch_size is None else batch_size)
    check_numbers("[0,inf)", whole=True, seed=seed, in_full=in_full or 0)
    if not grid:
        raise ValueError("give an eps > 0 in eps_grid")
    if len(np.unique(ids)) != len(ids) or len(ids if groups is None else groups) != len(ids):
        raise ValueError("ids and groups must hold one entry per image, ids all different")
    settings = {"eps_grid": grid, "attacks": options, "at": _at(at or {}, options, grid)}
    settings |= dict(seed=seed, ids=ids, batch_size=batch_size, fast=fast, in_full=in_full)
    settings |= {"most": _most(most or {}, options), "full_at": full_at, "dtype": search_dtype}
    if full_at is not None:
        check_numbers("(0,inf)", full_at=full_at)
        (settings["full_at"],) = _near("full_at", [full_at], grid)
    study = _Study(model, *data, settings, folder and Path(folder), resume)
    base.check_steady(model, study.probe)
    blocks = _attack_all(study, progress)
    release_memory()
    cost, nearest = pd.DataFrame([block.cost() for block in blocks]), _nearest(blocks)
    return Evaluation(_rows(blocks, study), cost, settings, nearest, groups, model, *data)


@dataclass(frozen=True)
class Evaluation:
    """What `robust` found.

    rows      one per (attack, eps, image): COLUMNS; "clean" at eps 0, "worst" at every eps; with
              single attacks on the images `in_full`, with full_at there only; queries: passes that
              show the outcome on the image
    cost      one per (attack, eps), as they ran: attacked, fooled (images), forwards, backwards
              (image-passes really made, judging included), seconds
    settings  the threat model and the budget: eps_grid, attacks with their options, seed, ...
    nearest   [N] the smallest change known to fool each image: 0 wrong from the start, inf none
    groups    patients [N] or None; model, images, labels: what was attacked
    """

    rows: pd.DataFrame
    cost: pd.DataFrame
    settings: dict[str, Any]
    nearest: np.ndarray
    groups: np.ndarray | None
    model: nn.Module = field(repr=False)
    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    def fooled(self, attack: str, eps: float) -> np.ndarray:
        """Bool [N] of "clean" (eps 0) or "worst"; of one attack, of the images with its rows."""
        return self.rows.fooled[self.rows.attack.eq(attack) & self.rows.eps.eq(eps)].to_numpy(bool)

    def table(self, *, draws: int = 2000) -> pd.DataFrame:
        """One row per eps: ball, images, clean, one column per attack, worst, ...

        Accuracies over all images (of single attacks: over those `in_full`; a clean error counts as
        fooled; NaN: not run), with 95 % intervals by patient; attack_success is the share of the
        images right at first that are fooled. Of two classes: sensitivity and specificity in the
        worst case.
        """
        clean, labels, lines = ~self.fooled("clean", 0.0), self.labels.cpu().numpy(), []
        units = np.arange(len(clean)) if self.groups is None else self.groups
        means = (~self.rows.fooled).groupby([self.rows.attack, self.rows.eps]).mean()
        names = [name for name in self.rows.attack.unique() if name not in ("clean", "worst")]
        for eps in self.settings["eps_grid"]:
            worst = ~self.fooled("worst", eps)
            line = {"eps": eps, "ball": pixel_text(eps), "images": len(clean)}
            line["clean"] = clean.mean()
            line |= {name: means.get((name, eps), np.nan) for name in names}
            line["worst"] = worst.mean()
            if set(labels) == {0, 1}:
                sides = {"sensitivity": labels == 1, "specificity": labels == 0}
                line |= {name: worst[side].mean() for name, side in sides.items()}
            line["attack_success"] = 1 - worst[clean].mean() if clean.any() else np.nan
            for name, flags in (("clean", clean), ("worst", worst)):
                interval = metrics.share(flags, units, draws=draws)
                line |= {f"{name}_low": interval["ci_low"], f"{name}_high": interval["ci_high"]}
            lines.append(line)
        return pd.DataFrame(lines)


# ---------------------------------------- what is asked


def _options(
    names: Iterable[str], steps: int, restarts: int, budgets: Mapping
) -> dict[str, dict[str, Any]]:
    """What each attack is called with: the shared options, its own, the caller's; in order."""
    names, options, shared = set(names), {}, {"steps": steps, "restarts": restarts}
    unknown = sorted(names - set(KINDS)) + sorted(set(budgets) - names)
    if unknown or not names:
        raise ValueError(f"attacks and budgets must name some of {list(KINDS)}, not {unknown}")
    toy, x, y = nn.Flatten().eval(), torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([0])
    for name in sorted(names, key=ORDER.index):
        known, own = KINDS[name].parameters, dict(budgets.get(name, {}))
        free = known - set("model x y eps norm seed".split())
        if not set(own) <= free:
            raise ValueError(f"budgets[{name!r}] holds {sorted(own)}; it may set {sorted(free)}")
        options[name] = {key: value for key, value in shared.items() if key in known}
        options[name] |= dict(KINDS[name].options) | own
        KINDS[name].run(toy, x, y, options[name], eps=0.5)  # refuses bad options now
    return options


def _at(at: Mapping, options: Mapping, grid: Sequence[float]) -> dict[str, list[float]]:
    """By attack the eps at which it is run, for those that are not run at the whole grid."""
    chosen = {}
    for name, wanted in at.items():
        if name not in options or kind(name).smallest:
            run = "that is run at each eps (one for the smallest change runs once)"
            raise ValueError(f"at must name attacks of this run, {run}, not {name!r}")
        chosen[name] = _near(f"at[{name!r}]", list(wanted), grid)
    return chosen


def _near(what: str, wanted: Sequence[float], grid: Sequence[float]) -> list[float]:
    """The eps of the grid that are meant."""
    near = [eps for eps in grid if np.isclose(eps, wanted, rtol=1e-6, atol=0).any()]
    if len(near) < max(1, len(set(wanted))):
        raise ValueError(f"{what} must be of eps_grid, {grid}, not {wanted}")
    return near


def _most(most: Mapping[str, int], options: Mapping) -> dict[str, int]:
    """By attack how many images it meets, for those that do not meet all."""
    if unknown := sorted(set(most) - set(options)):
        raise ValueError(f"most must name some of {[*options]}, not {unknown}")
    check_numbers("[1,inf)", whole=True, **{f"most[{name!r}]": n for name, n in most.items()})
    return dict(most)


class _Study:
    """The model, the images, the settings, and where finished blocks are kept."""

    def __init__(self, model, images, labels, settings: dict, folder: Path | None, resume: bool):
        self.model, self.images, self.labels = model, images, labels
        self.settings, self.folder, self.resume = settings, folder, resume
        for eps in settings["eps_grid"][:1] + settings["eps_grid"][-1:]:
            base.check_attack(model, images, labels, eps=eps)
        base.pairs([(settings["seed"], i) for i in settings["ids"]], len(images))
        self.device, self.targets = device_of(model, images), {}
        self.probe = images[:PROBE].to(self.device)
        # Where MeanSparse operators are in use, their exact gradients hide directions.
        found = [module for module in model.modules() if isinstance(module, MeanSparse)]
        settings["straight_through"] = any(bool(one.threshold > 0) for one in found)
        for way in ["", BPDA] if settings["straight_through"] else [""]:
            with CONTEXTS[way](model):  # a copy keeps the operators' gradient as it is now
                self.targets[way] = _faithful_copy(model, self.probe) if settings["fast"] else model
            if settings["dtype"]:
                self.targets[way] = _Half(self.targets[way], settings["dtype"]).eval()
        settings["batch_size"] = settings["batch_size"] or fitting_batch(model, images)
        self.key = [FORMAT, settings["seed"], settings["fast"]]
        self.key += [str(settings["dtype"])] if settings["dtype"] else []
        if folder:  # what a kept block depends on
            content = images.cpu().numpy(), labels.cpu().numpy(), settings["ids"]
            self.key += [fingerprint(model), str(model)]
            self.key += [(part.shape, _hash(part.tobytes())) for part in content]

    def in_full(self, eps: float) -> np.ndarray:
        """The images that meet every attack in this ball, as numbers."""
        total, wanted = len(self.images), self.settings["in_full"]
        count = total if wanted is None else min(wanted, total)
        count *= self.settings["full_at"] in (None, eps)
        return np.linspace(0, total - 1, count).astype(int)

    def batches(self, count: int) -> list[np.ndarray]:
        """The numbers below `count`, a batch at a time."""
        size = self.settings["batch_size"]
        return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]

    def batch(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        rows = torch.from_numpy(places)
        return self.images[rows].to(self.device), self.labels[rows].to(self.device)

    @torch.no_grad()
    def wrong(self, x: Tensor, y: Tensor) -> np.ndarray:
        """Whether the model is wrong, bool [B]; an answer that is no number is refused."""
        return (base.check_logits(self.model(x), y).argmax(1) != y).cpu().numpy()


class _Half(nn.Module):
    """A model asked under autocast; its logits in float32, and so the losses taken of them."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.dtype):
            return self.model(x).float()


def _faithful_copy(model: nn.Module, probe: Tensor) -> nn.Module:
    """A folded copy, or the model where the copy is another function (with hooks)."""
    copied = fast_copy(model)  # with gradients on: straight through must not be traced away
    with torch.no_grad():
        answers = model(probe).float()
        gap = float((copied(probe).float() - answers).abs().max())
    if gap <= ALIKE * max(1.0, float(answers.abs().max())):
        return copied
    log.info("a folded copy answers otherwise (by %.2g): the model itself is attacked", gap)
    return model


def _hash(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()[:12]


# ---------------------------------------- running it


@dataclass
class _Block:
    """One attack at one eps: what it did to the n images attacked, and what it cost."""

    attack: str
    eps: float
    places: np.ndarray  # [n] of the images attacked
    step: np.ndarray  # [n] first step that fooled; -1: none
    queries: np.ndarray  # [n]
    distance: np.ndarray  # [n] size of the smallest fooling change; inf: none, or not looked for
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0

    def cost(self) -> dict[str, Any]:
        counts = {"attacked": len(self.step), "fooled": int((self.step >= 0).sum())}
        spent = {key: getattr(self, key) for key in ("forwards", "backwards", "seconds")}
        return {"attack": self.attack, "eps": self.eps, **counts, **spent}


def _attack_all(study: _Study, progress: bool) -> list[_Block]:
    """The clean images, then the attacks on the right ones: small balls first, or `full_at`,
    the larger balls, the smaller ones."""
    total, known, grid = len(study.images), {}, study.settings["eps_grid"]
    blocks = [_kept(study, "clean", 0.0, np.arange(total))]
    right, stood = np.flatnonzero(blocks[0].step < 0), {}
    first = study.settings["full_at"] or 0.0
    asked, ways = study.settings["attacks"], study.targets
    names = [name + way for name in asked for way in ways if not way or kind(name).twice]
    count = total * len(grid) * len(names)
    with Bar(total=count, desc="attacks", unit="image", disable=not progress) as bar:
        for eps in sorted(grid, key=lambda eps: (eps < first, abs(eps - first))):
            standing = right
            for other, left in stood.items():
                open_to = np.intersect1d if other < eps else np.setdiff1d
                standing = open_to(standing, left)
            for name in sorted(names, key=lambda name: (name not in known, ORDER.index(name))):
                if eps in study.settings["at"].get(name.removesuffix(BPDA), grid):
                    places = np.union1d(standing, np.intersect1d(right, study.in_full(eps)))
                    if limit := study.settings["most"].get(name.removesuffix(BPDA)):
                        near = np.argsort(_nearest(blocks)[standing], kind="stable")[:limit]
                        places = standing[np.sort(near)]
                    block = known.get(name) or _kept(study, name, eps, places)
                    if kind(name).smallest:  # run once for all balls: later at no cost
                        step = np.where(block.distance <= eps, block.step, -1)
                        none = dict(queries=block.queries * 0, forwards=0, backwards=0, seconds=0.0)
                        known[name] = replace(block, **none)
                        block = replace(block, eps=eps, step=step)
                    blocks.append(block)
                    standing = np.setdiff1d(standing, block.places[block.step >= 0])
                bar.update(total)
                bar.set_postfix(eps=f"{eps:.3g}", attack=name)
            stood[eps] = standing
    return blocks


def _kept(study: _Study, name: str, eps: float, places: np.ndarray) -> _Block:
    """The block that the folder keeps for this model, these images and settings, or a new one."""
    path, n = None, len(places)
    if study.folder:
        own = study.settings["attacks"].get(name.removesuffix(BPDA))
        place = None if name != "clean" and kind(name).smallest else eps
        key = json.dumps([study.key, own, place, places.tolist()], default=str)
        path = study.folder / f"block_{eps:.9g}_{name}_{_hash(key.encode())}.npz"
        if study.resume and path.exists():
            return _read_block(path, places)
    start = time.perf_counter()
    block = _Block(name, eps, places, np.full(n, -1), np.ones(n, int), np.full(n, np.inf))
    if name == "clean":
        block.forwards = n
        for rows in study.batches(n):
            block.step[rows] = np.where(study.wrong(*study.batch(rows)), 0, -1)
    else:
        _strike(study, block)
    block.seconds = time.perf_counter() - start
    if path:
        with files.atomic_path(path) as temporary:
            np.savez(temporary, **vars(block))
    return block


def _read_block(path: Path, places: np.ndarray) -> _Block:
    with files.reading(path, "delete it to run this attack anew"):
        files.check_zip(path)
        with np.load(path) as kept:
            found = {key: kept[key] if kept[key].ndim else kept[key].item() for key in kept}
        block = _Block(**found)
        told = block.step, block.queries, block.distance
        if not np.array_equal(block.places, places) or {len(one) for one in told} != {len(places)}:
            raise ValueError("it is of other images")
        return block


def _strike(study: _Study, block: _Block) -> None:
    """One attack, judged on the model itself."""
    name, way = block.attack.removesuffix(BPDA), BPDA if block.attack.endswith(BPDA) else ""
    own, options = KINDS[name], study.settings["attacks"][name]
    for rows in study.batches(len(block.places)):
        for target in dict.fromkeys([study.targets[way], study.model]):
            if not len(rows):
                break
            x, y = study.batch(block.places[rows])
            seeds = own.seeds(study.settings["seed"], study.settings["ids"][block.places[rows]])
            with CONTEXTS[way](study.model), tf32(study.device):
                result = own.run(target, x, y, options, eps=block.eps, seed=seeds)
            success, claimed = study.wrong(result.x_adv, y), result.success.cpu().numpy()
            hit = rows[success]
            block.step[hit] = np.maximum(result.first_success_step.cpu().numpy(), 1)[success]
            if own.smallest:
                block.distance[hit] = result.linf.double().cpu().numpy()[success]
            block.queries[rows] += result.queries.cpu().numpy() + 1
            block.forwards += result.forwards + len(rows)
            block.backwards += result.backwards
            rows = rows[claimed & ~success]  # fooled the copy only: attacked again, on the model


def _rows(blocks: Sequence[_Block], study: _Study) -> pd.DataFrame:
    """Tidy rows of all blocks, and of the worst case at every eps."""
    ids, labels = study.settings["ids"], study.labels.cpu().numpy()
    tables, worst, wrong = [], [], blocks[0].step == 0
    best, spent = np.where(wrong, 0, NEVER), np.zeros(len(wrong), dtype=np.int64)

    def table(attack, eps, step, queries):
        columns = attack, eps, ids, labels, step >= 0, step, queries
        return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))

    for eps in [0.0, *study.settings["eps_grid"]]:
        for block in (block for block in blocks if block.eps == eps):
            # A clean error counts as fooled by every attack.
            step, queries = np.where(wrong, 0, -1), np.ones(len(wrong), dtype=np.int64)
            if eps:
                step[block.places], queries[block.places] = block.step, block.queries
                best = np.minimum(best, np.where(step < 0, NEVER, step))
                spent += queries
            met = study.in_full(eps) if eps else np.arange(len(wrong))
            if len(met):
                own = table(block.attack, eps, step, queries)
                if block.attack.removesuffix(BPDA) in study.settings["most"]:
                    met = block.places
                    own["attack"] += STANDING
                tables.append(own.iloc[met])
        if eps:
            step = np.where(best < NEVER, best, -1)
            worst.append(table("worst", eps, step, np.maximum(spent, 1)))
    return pd.concat([*tables, *worst], ignore_index=True)


def _nearest(blocks: Sequence[_Block]) -> np.ndarray:
    """The smallest change known to fool each image [N]; the first block is that of all images."""
    found = np.where(blocks[0].step == 0, 0.0, np.inf)
    for block in blocks[1:]:
        known = np.where(block.step >= 0, np.minimum(block.distance, block.eps), block.distance)
        found[block.places] = np.minimum(found[block.places], known)
    return found


def zero_gradient_share(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    loss: str = "ce",
    batch_size: int | None = None,
) -> float:
    """Share of images whose loss gradient is exactly zero: no gradient attack moves these.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> zero_gradient_share(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]))
    0.0
    """
    check_numbers("[1,inf)", whole=True, batch_size=1 if batch_size is None else batch_size)
    device, zeros = device_of(model, images), 0
    base.check_attack(model, images, labels)
    batch_size = batch_size or fitting_batch(model, images)
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        with base.search(model, x.to(device), y.to(device), loss=loss) as search:
            _, _, gradient = search.gradient(search.everyone, search.x, 0)
            zeros += int((gradient.flatten(1) == 0).all(1).sum())
    return zeros / len(images)
