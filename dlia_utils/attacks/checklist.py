"""Is the evaluation itself to be believed? The check list of Carlini et al. as checks that can fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..units import pixel_text
from . import evaluate as e
from ._contract import device_of
from .evaluate import PASSES, Evaluation, outcomes, robust, row_checks, zero_gradient_share

PASS, WARN = "PASS", "WARN"
COLUMNS = ["check", "verdict", "value", "why"]
AVERAGED = 10  # passes per look (eot) that make up for a random model
SAME = 1e-4  # of the logits, or of their size where that is above 1
ALONE = 0.002  # share of images that a black box may fool alone (as AutoAttack's flag)
LEAD = 0.1  # by which the balanced accuracy may be higher in another input range
SPAN = 0.1  # of [0,1] that an image should fill
LATE = ("transfer", "one_pixel", "square")  # black boxes that run after everything else

# key of `evaluate.row_checks`: (what it means when it holds, what it means and asks for when it fails)
REASONS = {
    "iterated": (
        "Many steps find at least what a single one finds, at every eps",
        "A single step beats many: gradients mislead after the first step, or the steps are badly set. Raise "
        "steps and restarts, and attack past the operator that hides the gradient (bpda=)",
    ),
    "noise": (
        "Directions chosen by gradients are better than random ones",
        "Random noise does better than gradients: they say nothing here. Look for a step without a gradient "
        "(rounding, a large temperature) and attack past it (bpda=), and believe the black boxes",
    ),
    "loss": (
        "Both losses lead to the same images, so cross-entropy does not saturate",
        "Cross-entropy has lost its gradient (logits too large, as after training at a high temperature): "
        "what it leaves standing is not robust. Report the margin loss, or the worst case",
    ),
    "monotone": (
        "No attack fools fewer images in a larger ball",
        "An attack fools fewer images in a larger ball, which contains the smaller one: it has not "
        "converged. Raise its steps or restarts; the worst case is right, as it adds up over eps",
    ),
}
THROUGH = (
    "Exact gradients show what the way through the operator shows",
    "The operator hides its gradient: robustness against exact gradients is not real. Report the worst case",
)


def checklist(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    evidence: Evaluation | pd.DataFrame,
    *,
    subset: int = 50,
    points: float = 2.0,
    progress: bool = False,
    **options,
) -> pd.DataFrame:
    """What an evaluation of robustness must show, PASS or WARN with the reason. Source: arXiv 1902.06705.

    images: [N,C,H,W] in [0,1]; labels: int64 [N]. evidence: what `robust` returned for them, or its rows
    with early_drop=False, with `options` then saying how they were made (norm, steps, grey, mask, bpda,
    ids, ...: the options of `robust`). subset: the most images that anything is run on anew: all attacks in
    full when the evidence dropped fooled images, twice the steps, the balls in which every image must fall,
    gradients. points: what twice the steps may add to the worst case, in per cent of all images.
    Columns: check, verdict, value (what was found), why (what it means; after WARN also what to do). A check
    is left out where it does not apply: with a mask no ball need fool every image.
    A WARN says that the robust accuracy may be too high, or speaks of something else than it seems to.
    Errors: ValueError for rows that do not belong to `images`, and what `robust` refuses.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> x = torch.rand(8, 1, 2, 2)
    >>> found = robust(model, (x, model(x).argmax(1)), [0.1, 0.5], early_drop=False, progress=False)
    >>> checklist(model, x, model(x).argmax(1), found).set_index("check").verdict["white box beats black box"]
    'PASS'
    """
    known = isinstance(evidence, Evaluation)
    rows = evidence.rows if known else evidence
    call = {**evidence.call} if known else {"ids": np.arange(len(images)), **options}
    if known and options:
        raise TypeError(
            f"options {sorted(options)} are those of the evaluation itself; give them to robust"
        )
    if set(rows.image) != set(np.asarray(call["ids"]).tolist()):
        raise ValueError(
            f"the rows name {rows.image.nunique()} images, not these {len(images)}: pass the same ids"
        )
    again = _Again(model, images, labels, call, progress)
    eps_text = pixel_text if call.get("norm", "linf") == "linf" else "{:g}".format
    right = np.flatnonzero(~_fooled(rows, "clean", 0.0, call["ids"]))
    stated = [
        _threat(evidence if known else None),
        _clean(labels, right),
        _range(model, images, labels, subset),
    ]
    if not len(right):  # there is nothing to attack, which the second line says
        return pd.DataFrame(stated, columns=COLUMNS)
    full, note = rows, ""
    if known and evidence.settings["early_drop"]:
        some = _spread(right, subset)
        names = [name for name in call["attacks"] if name not in LATE] or ["pgd_margin"]
        grid = evidence.settings["eps_grid"]
        full = again(some, grid, attacks=names, early_drop=False, surrogate=None).rows
        note = f" (all attacks in full on {len(some)} images)"
    checks = [
        *stated,
        *_compared(full, note, eps_text),
        _black_box(rows, full, call, note, eps_text),
        _rising(rows, eps_text),
        *_everything(again, rows, subset, eps_text),
        _converged(again, rows, subset, points, eps_text),
        _zero_gradients(model, images, labels, _spread(right, subset)),
        _random(model, images, call),
        _per_image(rows, eps_text),
    ]
    return pd.DataFrame(checks, columns=COLUMNS)


class _Again:
    """`robust` once more on some of the images, with the options of the evaluation, or others."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        call: Mapping[str, Any],
        progress: bool,
    ) -> None:
        self.model, self.images, self.labels, self.call, self.progress = (
            model,
            images,
            labels,
            call,
            progress,
        )

    def __call__(self, positions: np.ndarray, eps_grid: list[float], **changes) -> Evaluation:
        options = {**self.call, **changes, "ids": np.asarray(self.call["ids"])[positions]}
        for own in ("budgets", "at"):
            if options.get(own):
                options[own] = {k: v for k, v in options[own].items() if k in options["attacks"]}
        mask, some = options.get("mask"), torch.from_numpy(positions)
        if mask is not None and len(mask) > 1:
            options["mask"] = mask[some]
        data = (self.images[some], self.labels[some])
        return robust(self.model, data, eps_grid, **options, progress=self.progress)


def _spread(positions: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the positions, evenly spread.

    >>> _spread(np.arange(10), 3)
    array([0, 4, 9])
    """
    if len(positions) <= most:
        return positions
    return positions[np.linspace(0, len(positions) - 1, most).astype(int)]


def _fooled(rows: pd.DataFrame, attack: str, eps: float, ids) -> np.ndarray:
    """Bool [N] in the order of the images."""
    part = rows[rows.attack.eq(attack) & rows.eps.eq(eps)].set_index("image").fooled
    if part.empty:
        raise ValueError(f"the rows lack {attack!r} at eps {eps:g}: take them as robust gives them")
    return part.loc[np.asarray(ids)].to_numpy(bool)


def _grid(rows: pd.DataFrame) -> list[float]:
    return sorted(set(rows.eps) - {0.0})


def _share(rows: pd.DataFrame, eps: float) -> float:
    return float(rows[rows.attack.eq("worst") & rows.eps.eq(eps)].fooled.mean())


def _line(check: str, passed: bool, value: str, good: str, bad: str) -> tuple[str, str, str, str]:
    return check, PASS if passed else WARN, value, good if passed else bad


# ------------------------------------------------------------------------------------------- what is claimed


def _threat(evidence: Evaluation | None) -> tuple[str, str, str, str]:
    value = "not known"
    if evidence is not None:
        said = evidence.settings
        value = f"{said['norm']}, eps {evidence.balls()}, {len(said['attacks'])} attacks, seed {said['seed']}"
    return _line(
        "threat model stated",
        evidence is not None,
        value,
        "Goal, norm, eps, knowledge and budget of every attack are printed with the result (threat())",
        "Rows alone say neither norm nor budget: pass what robust returned, or print both beside the table",
    )


def _clean(labels: Tensor, right: np.ndarray) -> tuple[str, str, str, str]:
    largest, accuracy = float(labels.bincount().max()) / len(labels), len(right) / len(labels)
    return _line(
        "clean accuracy above always answering the largest class",
        accuracy > largest,
        f"{accuracy:.1%} against {largest:.1%}",
        "The model reads the images, so there is something to attack",
        "A model that gives nearly every image the same answer cannot be attacked and is not robust: report "
        "balanced accuracy, and do not call it a defence",
    )


@torch.no_grad()
def _range(
    model: nn.Module, images: Tensor, labels: Tensor, subset: int
) -> tuple[str, str, str, str]:
    """Whether the model wants another range of pixels, and the images fill theirs: else eps means nothing."""
    some = torch.from_numpy(_spread(np.arange(len(images)), subset))
    device = device_of(model, images)
    x, y = images[some].to(device), labels[some].to(device)
    ranges = {"[0,255]": x * 255, "[-1,1]": x * 2 - 1, "standardised": (x - 0.45) / 0.225}
    own, accuracy = _balanced(model(x).argmax(1), y), dict.fromkeys(ranges, 0.0)
    for name, z in ranges.items():
        with suppress(
            Exception
        ):  # a model that refuses other pixels, as those of `models.robust`, answers as it should
            accuracy[name] = _balanced(model(z).argmax(1), y)
    best = max(accuracy, key=accuracy.get)
    flat = x.flatten(1)
    span = float((flat.amax(1) - flat.amin(1)).median())
    return _line(
        "the model wants pixels in [0,1], and the images fill them",
        accuracy[best] <= own + LEAD and span >= SPAN,
        f"balanced accuracy {own:.1%} as given, {accuracy[best]:.1%} in {best}; an image spans {span:.2g}",
        "eps in pixel units means what it says",
        f"The model does better in {best}, or the images fill less than {SPAN:g} of [0,1]: eps of k/255 is "
        "then another share of the contrast than it seems. Let the model own its normalisation, and scale "
        "the pixels once",
    )


def _balanced(predicted: Tensor, y: Tensor) -> float:
    """Mean over the classes of the share that is right: the same answer for all scores like chance."""
    right = (predicted == y).float()
    return float(torch.stack([right[y == label].mean() for label in y.unique()]).mean())


# ------------------------------------------------------------------------------------------- attacks compared


def _compared(full: pd.DataFrame, note: str, eps_text: Callable) -> list[tuple[str, str, str, str]]:
    """What the rows of attacks run in full say."""
    return [
        _line(check, passed, detail + note, *REASONS.get(key, THROUGH))
        for key, (check, passed, detail) in row_checks(full, eps_text=eps_text).items()
    ]


def _black_box(
    rows: pd.DataFrame, full: pd.DataFrame, call: Mapping[str, Any], note: str, eps_text: Callable
) -> tuple[str, str, str, str]:
    """Images that only an attack without gradients fools, inside the ball of some eps."""
    tables = {name: table for name, table in outcomes(full).items() if name in e.ORDER}
    blind = [name for name in tables if e.kind(name).blind]
    grid = sorted({eps for table in tables.values() for eps in table})
    tables = {name: table.reindex(columns=grid, fill_value=False) for name, table in tables.items()}
    white = sum(
        (table for name, table in tables.items() if name not in blind),
        0 * next(iter(tables.values())),
    )
    alone = {}
    for name in blind:
        found = tables[name] & ~white.astype(bool).cummax(axis=1)
        alone |= {
            (image, name): eps
            for eps in reversed(found.columns)
            for image in found.index[found[eps]]
        }
    if (
        full is not rows
    ):  # fooled images were dropped: what these fooled had withstood every gradient
        blind += [
            name for name in LATE if name in call["attacks"]
        ]  # also one that found no image standing
        late = rows[rows.attack.isin(LATE) & rows.fooled].sort_values("eps", ascending=False)
        alone |= {(line.image, line.attack): line.eps for line in late.itertuples()}
        note = ""
    images = {image for image, _ in alone}
    check, shown = (
        "white box beats black box",
        [
            f"image {image} by {name} at {eps_text(eps)}"
            for (image, name), eps in sorted(alone.items())
        ],
    )
    if not set(blind) & set(LATE):
        remedy = "Add square to the attacks: only an attack without gradients can show that they are masked"
        return check, WARN, "no black-box attack was run", remedy
    listed = f": {', '.join(shown[:10])}" + (" and more" if len(shown) > 10 else "")
    return _line(
        check,
        len(images) <= ALONE * rows.image.nunique(),
        f"{len(images)} image(s) fooled by {' or '.join(blind)} alone{note}"
        + (listed if shown else ""),
        "Whatever was fooled without gradients was fooled with them too",
        "An attack that sees less did more, so the gradients are masked or the gradient attacks too short: "
        "attack past the masking operator (bpda=), raise steps and restarts",
    )


def _rising(rows: pd.DataFrame, eps_text: Callable) -> tuple[str, str, str, str]:
    grid = _grid(rows)
    shares = [_share(rows, eps) for eps in grid]
    flat = [
        f"{eps_text(low)} -> {eps_text(high)}"
        for low, high, few, many in zip(grid[:-1], grid[1:], shares[:-1], shares[1:], strict=True)
        if few >= many and many < 1
    ]
    return _line(
        "a larger eps fools more",
        not flat,
        "; ".join(
            f"{eps_text(eps)}: {share:.1%} fooled" for eps, share in zip(grid, shares, strict=True)
        ),
        "Every larger ball fools further images, until all have fallen",
        f"Not one image more from {', '.join(flat)}: the steps of the grid are too small for so few images, "
        "or the attacks are stuck. Take more images or wider steps; if it stays, look for masked gradients",
    )


def _everything(
    again: _Again, rows: pd.DataFrame, subset: int, eps_text: Callable
) -> list[tuple[str, str, str, str]]:
    """In a ball that holds other images whole, every image must fall; half the range makes all grey."""
    if again.call.get("mask") is not None:
        return []
    last = _grid(rows)[-1]
    some = _spread(np.flatnonzero(~_fooled(rows, "worst", last, again.call["ids"])), subset)
    left, value = np.zeros(0, dtype=bool), f"all fooled at {eps_text(last)}"
    if len(some):
        whole = (
            1.0
            if again.call.get("norm", "linf") == "linf"
            else float(np.sqrt(again.images[0].numel()))
        )
        far = [eps for eps in (0.5 * whole, whole) if eps > last] or [last]
        found = again(
            some,
            far,
            attacks=["pgd_ce", "pgd_margin"],
            budgets=None,
            at=None,
            steps=20,
            surrogate=None,
        )
        left = ~_fooled(found.rows, "worst", far[-1], found.call["ids"])
        stand = f"of {len(some)} images that stand at {eps_text(last)}"
        value = f"{stand}, {left.sum()} still stand at {eps_text(far[-1])}"
    line = _line(
        "a large eps fools every image",
        not left.any(),
        value,
        "Nothing is robust when everything may change, so the attacks do reach where they should",
        "Inside this ball lie images of every class, yet PGD finds no way: the answer does not depend on the "
        "image, or its gradient leads nowhere. Check the clean accuracy, then attack without gradients",
    )
    return [line]


def _converged(
    again: _Again, rows: pd.DataFrame, subset: int, points: float, eps_text: Callable
) -> tuple[str, str, str, str]:
    """Twice the steps, on images that still stand at the eps where about half have fallen.

    An eps at which a dear attack was not run is not converged and was not meant to be: another one is taken.
    """
    check, call = "twice the steps add nothing", again.call
    names = [name for name in call.get("attacks", rows.attack.unique()) if name in e.TWICE] or [
        "pgd_margin"
    ]
    at = call.get("at") or {}
    ran = [eps for eps in _grid(rows) if all(eps in at.get(name, [eps]) for name in names)]
    unfinished = [eps for eps in ran or _grid(rows) if _share(rows, eps) < 1]
    if not unfinished:
        return (
            check,
            PASS,
            "no image stands at any eps",
            "There is nothing left that more steps could fool",
        )
    eps = min(unfinished, key=lambda eps: abs(_share(rows, eps) - 0.5))
    standing = np.flatnonzero(~_fooled(rows, "worst", eps, call["ids"]))
    some = _spread(standing, subset)
    budgets = {name: dict((call.get("budgets") or {}).get(name, {})) for name in names}
    for name, own in budgets.items():
        steps = e.KINDS[name].options.get("steps", call.get("steps", 10))
        own["steps"] = 2 * own.get("steps", steps)
    found = again(some, [eps], attacks=names, budgets=budgets, at=None, surrogate=None)
    new = _fooled(found.rows, "worst", eps, found.call["ids"]).mean()
    added = 100 * new * len(standing) / rows.image.nunique()
    return _line(
        check,
        added <= points,
        f"{added:.1f} points at {eps_text(eps)} ({new:.1%} of {len(some)} images that stood there)",
        f"At most {points:g} points: the attacks have converged",
        f"More than {points:g} points: the attacks were stopped early and the accuracy is too high. Double "
        "the steps until this passes",
    )


# ------------------------------------------------------------------------------------------- the model


def _zero_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, some: np.ndarray
) -> tuple[str, str, str, str]:
    rows = torch.from_numpy(some)
    x, y = images[rows], labels[rows]
    ce, margin = (zero_gradient_share(model, x, y, loss=loss) for loss in ("ce", "margin"))
    remedy = (
        "Not even the margin has a gradient there: gradient attacks cannot move these images at all. Attack "
        "past the step without a gradient (bpda=), and believe Square"
        if margin
        else "Cross-entropy attacks do not move these images at all (saturated logits); the margin loss "
        "does. Do not report cross-entropy attacks alone"
    )
    return _line(
        "no input gradient is exactly zero",
        ce == 0 and margin == 0,
        f"cross-entropy {ce:.1%}, margin {margin:.1%} of {len(some)} images",
        "Every image has a direction to go",
        remedy,
    )


@torch.no_grad()
def _random(model: nn.Module, images: Tensor, call: Mapping[str, Any]) -> tuple[str, str, str, str]:
    device = device_of(model, images)
    x = images[: call.get("batch_size", 64)].to(device)
    logits = torch.stack([model(x) for _ in range(PASSES)]).float()
    spread = float((logits.amax(0) - logits.amin(0)).max())
    flips = int((logits.argmax(2) != logits[0].argmax(1)).any(0).sum())
    eot = call.get("eot", 1)
    return _line(
        "the model answers alike each time",
        spread <= SAME * max(1.0, float(logits.abs().max())) or eot >= AVERAGED,
        f"{PASSES} passes differ by up to {spread:.2g}; the answer changes on {flips} of {len(x)} images",
        "One pass tells what an attack achieved"
        if eot == 1
        else f"{eot} passes are averaged per look",
        "The model is random (dropout left on, noise at test time): a gradient of one pass misleads, and an "
        "image fooled once may be right the next time. Switch it off if it is a mistake, otherwise average "
        f"over passes: eot={AVERAGED} or more (it was {eot})",
    )


def _per_image(rows: pd.DataFrame, eps_text: Callable) -> tuple[str, str, str, str]:
    """Whether "worst" is the union of all attacks per image, and not the best of their averages."""
    worst = rows[rows.attack == "worst"].set_index(["image", "eps"]).fooled
    single = rows[(rows.attack != "worst") & rows.fooled]
    first = single.groupby("image").eps.min()
    images, eps = (worst.index.get_level_values(level) for level in ("image", "eps"))
    union = eps >= images.map(first).fillna(np.inf)
    missed = int((worst.to_numpy() != union).sum())
    shown = "; ".join(
        f"{eps_text(eps)}: {share:.1%}" for eps, share in worst.groupby("eps").mean().items()
    )
    return _line(
        "the worst case is taken per image",
        len(worst) > 0 and not missed,
        f"fooled by any attack {shown}",
        "An image counts as robust only if it withstands every attack, at this eps and below",
        f"{missed} outcomes differ from the union over attacks: the best attack on average is not the worst "
        "case. Count an image as fooled when any attack fools it",
    )
