"""Is an evaluation to be believed? The check list of Carlini et al. (arXiv 1902.06705)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import beta
from torch import Tensor, nn

from ..device import device_of
from ..metrics import with_interval
from ..units import check_numbers, pixel_text
from . import evaluate
from .evaluate import ALIKE, BPDA, KINDS, STANDING, SUITE, Evaluation, kind

PASSES = 5  # of the same images
ASKED = 160  # forwards at most to see that the model is steady, and its folded copy the same
SAME = 1e-4  # of the logits, or of their size where that is above 1: how far passes may differ
LEAST = 100  # images that get twice the steps, or all that stand
ALONE = 0.002  # share of images that a black box may fool alone (as AutoAttack's flag)
LEAD = 0.05  # share of the images by which one loss, or one kind of gradient, may beat another
SPAN, BETTER = 0.1, 0.1  # of [0,1] an image should fill; balanced accuracy in another range
POINTS = 2.0  # per cent of the images that twice the steps may add
BLACK = {"one_pixel", "square"}  # black boxes that search, unlike noise

# By key: the check, and below it what a WARN means and asks for.
TEXTS = """\
threat: threat model stated

clean: clean accuracy above always answering the largest class
A model that gives nearly every image the same answer is not robust: report balanced accuracy
range: the model wants pixels in [0,1], and the images fill them
eps of k/255 is another share of the contrast than it seems: let the model own its normalisation
fgsm: PGD fools at least what FGSM fools
A single step beats many: gradients mislead after the first step, or the steps are badly set
noise: random noise is weaker than PGD
Gradients say nothing here: look for a step without a gradient, and believe the black boxes
loss: cross-entropy finds what the margin loss finds (no masking)
Cross-entropy has lost its gradient (logits too large): report the margin loss, or the worst case
through: exact gradients find what {} finds (no masking)
The operator hides its gradient: report the worst case
monotone: a larger eps never fools fewer
An attack has not converged: raise its steps or restarts; the worst case adds up over eps
black box: white box beats black box
An attack that sees less did more, or there was none (add square): gradients may be masked
rising: a larger eps fools more
The steps of the grid are too small for so few images, or the attacks are stuck
everything: a large eps fools every image
Here lie images of every class, yet PGD finds no way: its gradient leads nowhere
converged: twice the steps add nothing
The attacks were stopped early and the accuracy is too high: double the steps until this passes
zero: no input gradient is exactly zero
Report the margin loss where cross-entropy alone vanishes, and believe Square where both do
random: the model answers alike each time, alone and in company
More than rounding: images near the boundary fall by chance; use float32 and no noise
union: the worst case is taken per image
The best attack on average is not the worst case: count an image that any attack fools
""".splitlines()
CHECKS = {
    head.split(": ")[0]: (head.split(": ")[1], why)
    for head, why in zip(TEXTS[::2], TEXTS[1::2], strict=True)
}


def report(found: Evaluation, *, subset: int = 50) -> pd.DataFrame:
    """What an evaluation of robustness must show, PASS or WARN with the reason.

    subset: the most images that are attacked anew in a ball in which every image must fall; twice
    the steps are tried on at least LEAST. Columns: check, verdict, value (what was found), why
    (after WARN: what it means). A check is left out where it does not apply.

    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), torch.rand(8, 1, 2, 2)
    >>> found = evaluate.robust(model, (x, model(x).argmax(1)), [0.1, 0.5], progress=False)
    >>> report(found).set_index("check").verdict["white box beats black box"]
    'PASS'
    """
    check_numbers("[1,inf)", whole=True, subset=subset)
    said = found.settings
    if said["in_full"] == 0:
        raise ValueError("the check list compares attacks: run `robust` with in_full of 1 or more")
    right = np.flatnonzero(~found.fooled("clean", 0.0))
    stated = f"linf, eps {_balls(found)}, {len(said['attacks'])} attacks"
    largest = float(found.labels.bincount().max()) / len(found.labels)
    accuracy = len(right) / len(found.labels)
    lines = [("threat", True, f"{stated}, seed {said['seed']}")]
    lines += [("clean", accuracy > largest, f"{accuracy:.1%} against {largest:.1%}")]
    lines += [_range(found, subset)]
    if len(right):  # else there is nothing to attack, which the second line says
        shares = found.rows[found.rows.attack.eq("worst")].groupby("eps").fooled.mean()
        stuck = bool(((shares.diff() <= 0) & (shares < 1)).any())
        rising = [f"{pixel_text(eps)}: {share:.1%} fooled" for eps, share in shares.items()]
        some = torch.from_numpy(_spread(right, subset))
        data = found.model, found.images[some], found.labels[some]
        ce, margin = (evaluate.zero_gradient_share(*data, loss=loss) for loss in ("ce", "margin"))
        zero = f"cross-entropy {ce:.1%}, margin {margin:.1%} of {len(some)} images"
        lines += [*_compared(found), _black_box(found), ("rising", not stuck, "; ".join(rising))]
        lines += [_everything(found, subset), _converged(found, shares, subset)]
        lines += [("zero", ce == margin == 0, zero), _random(found), _per_image(found, shares)]
    rows = []
    for key, passed, value, *name in lines:
        check, why = CHECKS[key]
        verdict = ["PASS", value, ""] if passed else ["WARN", value, why]
        rows.append([check.format(*name), *verdict])
    return pd.DataFrame(rows, columns=["check", "verdict", "value", "why"])


def most_passes(images: int, *, subset: int = 50, attacks=SUITE, **options: Any) -> np.ndarray:
    """Forward and backward image-passes [2] of `report` on a `robust` of these options: at most."""
    names = [name for name in attacks if KINDS[name].twice] or ["pgd_margin"]
    budgets = {name: own for name, own in (options.get("budgets") or {}).items() if name in names}
    asked = {name: options[name] for name in ("steps", "restarts", "through") if name in options}
    some, more = min(images, subset), min(images, max(LEAST, subset))
    twice = 2 * evaluate.most_passes(more, (1.0,), **asked | dict(attacks=names, budgets=budgets))
    asked |= dict(attacks=("pgd_ce", "pgd_margin"), steps=20)
    others = [6 * some + PASSES * (images + 1) + ASKED, 2 * some]
    return twice + evaluate.most_passes(some, (0.5, 1.0), **asked) + others


def page(found: Evaluation, checks: pd.DataFrame | None = None) -> str:
    """One page: threat model, table, cost, and the check list where `report(found)` is given."""
    spent = found.cost[["forwards", "backwards", "seconds"]].sum()
    full_at, count = found.settings["full_at"], found.settings["in_full"]
    some = count is not None and count < len(found.images)
    said = "every image that the model gets right"
    said = f"every attack was run on {f'{count} images evenly spread' if some else said}"
    if full_at is not None:
        said = f"at {pixel_text(full_at)} {said}, elsewhere on what that leaves open"
    said = said[0].upper() + said[1:] + f"; columns are over {'these' if some else 'all'}."
    if count == 0:
        said = "Images once fooled were attacked no more; clean and worst are over all images."
    by = "image (no patients given)" if found.groups is None else "patient"
    table = found.table().drop(columns="eps").set_index("ball")
    for name in ("clean", "worst"):
        columns = {name: "value", f"{name}_low": "ci_low", f"{name}_high": "ci_high"}
        cells = table[[*columns]].rename(columns=columns).to_dict("records")
        table[name] = [with_interval(row | {"n": len(found.images)}) for row in cells]
        table = table.drop(columns=[*columns][1:])
    parts = [
        "Robust accuracy, worst case per image (arXiv 1902.06705)",
        _threat(found),
        table.T.map(_cell).to_string(),
        f"{said} Brackets: 95 % by {by}.\nSpent: {spent.forwards:.0f} forward and "
        f"{spent.backwards:.0f} backward image-passes, {spent.seconds:.0f} s.",
    ]
    if checks is not None:
        passed = int(checks.verdict.eq("PASS").sum())
        remarks = checks.why.radd(". ").where(checks.verdict.eq("WARN"), "")
        lines = "  " + checks.verdict + "  " + checks.check + ": " + checks.value + remarks
        counts = f"Check list: {passed} PASS, {len(checks) - passed} WARN"
        parts.append("\n".join([counts, *lines]))
    return "\n\n".join(parts) + "\n"


def _threat(found: Evaluation) -> str:
    """The threat model in words."""
    said, budgets = found.settings, []
    blind = [name for name in said["attacks"] if KINDS[name].blind]
    for name, own in said["attacks"].items():
        words = [f"{key} {value}" for key, value in own.items() if key != "loss"]
        words += [f"only at {_balls(found, name)}"] if name in said["at"] else []
        words += [f"the nearest {n} of those standing" for n in [said["most"].get(name)] if n]
        budgets.append(f"{name} ({', '.join(words)})" if words else name)
    lines = {
        "goal": "any wrong class (of two, the other one: targeted and untargeted are the same)",
        "ball": f"linf (largest change of a pixel), eps {_balls(found)}, pixels in [0,1]",
        "limits": "none besides: every pixel and channel may change",
        "knowledge": f"weights and gradients; answers alone: {', '.join(blind) or 'no attack'}",
        "attacks": "; ".join(budgets),
        "operators": "also straight through" if said["straight_through"] else "exact gradients",
        "draws": f"seed {said['seed']}",
    }
    indent = {"width": 96, "subsequent_indent": " " * 12}
    return "\n".join(fill(f"  {name:10}{line}", **indent) for name, line in lines.items())


def _cell(value: Any) -> str:
    """A share with as many digits as its kind carries; "-" where the attack was not run."""
    if isinstance(value, str):
        return value
    return "-" if np.isnan(value) else f"{value:.0f}" if value > 1 else f"{value:.3f}"


def _balls(found: Evaluation, name: str = "") -> str:
    """The eps grid in words, or those eps at which the attack `name` is run."""
    grid = found.settings["at"].get(name, found.settings["eps_grid"])
    return ", ".join(map(pixel_text, grid))


def _again(found: Evaluation, positions: np.ndarray, grid: Sequence[float], budgets: Mapping):
    """`robust` once more on some of the images, these attacks in full."""
    said, some = found.settings, torch.from_numpy(positions)
    options = {key: said[key] for key in ("seed", "batch_size", "fast")}
    options |= dict(attacks=list(budgets), budgets=budgets, ids=said["ids"][positions], in_full=0)
    data = found.images[some], found.labels[some]
    return evaluate.robust(found.model, data, grid, progress=False, **options)


def _spread(positions: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the positions, evenly spread."""
    most = min(most, len(positions))
    return positions[np.linspace(0, len(positions) - 1, most).astype(int)]


# ---------------------------------------- the evaluation


def _compared(found: Evaluation) -> list[tuple]:
    """What the attacks say of each other, at the eps that they have in common."""
    rows, lines, falls = found.rows[~found.rows.attack.isin(["clean", "worst"])], [], []
    names = list(rows.attack.unique())
    wide = rows.set_index(["eps", "image", "attack"]).fooled.unstack().astype(float)
    strong = wide[[name for name in names if not kind(name).blind and name != "fgsm"]].max(axis=1)
    for weak in [name for name in ("fgsm", "noise") if name in names]:
        met = pd.DataFrame({"ours": strong, "theirs": wide[weak]}).dropna()
        sums = met.groupby("eps").sum().astype(int)
        signs = np.where(sums.ours >= sums.theirs, ">=", "<")
        said = zip(map(pixel_text, sums.index), sums.ours, signs, sums.theirs, strict=True)
        value = "; ".join(f"{at}: {a} {sign} {b}" for at, a, sign, b in said)
        value += f"; fooled by {weak} only: {(met.theirs > met.ours).sum()}"
        if len(met):
            lines.append((weak, "<" not in signs, value))
    pairs = [("loss", "pgd_margin", "pgd_ce", "the margin loss")]
    for name in names:
        if name.endswith(BPDA):
            through = "the way through the operator"
            pairs.append(("through", name, name.removesuffix(BPDA), through))
        counts = wide[name].groupby("eps").sum(min_count=1).dropna()
        for eps in counts.index[counts.diff() < 0]:
            falls.append(f"{name} at {pixel_text(eps)}: {counts[eps]:.0f}")
    for key, more, less, what in pairs:
        pair = wide.reindex(columns=[more, less])
        lead = (pair[more] - pair[less]).groupby("eps").mean().dropna()
        if len(lead):
            most = f"{lead.max():.1%} of the images at {pixel_text(lead.idxmax())}"
            text = f"largest lead of {what}: {most}"
            if key == "loss" and found.labels.max() < 2:
                text += "; of two classes both climb alike but where the softmax saturates"
            lines.append((key, lead.max() <= LEAD, text, more))
    if len(wide.index.unique("eps")) < 2:
        return lines
    return [*lines, ("monotone", not falls, "; ".join(falls) or "holds for every attack")]


def _black_box(found: Evaluation) -> tuple:
    """Images that only an attack without gradients fools, inside the ball of some eps."""
    rows = found.rows
    blind = [n for n in rows.attack.unique() if n not in ("clean", "worst") and kind(n).blind]
    if not BLACK & set(found.settings["attacks"]):
        return "black box", False, "no black-box attack was run"
    hit = rows[rows.fooled & ~rows.attack.isin(["clean", "worst"])]
    first = hit[~hit.attack.isin(blind)].groupby("image").eps.min()
    hit = hit[hit.attack.isin(blind)]
    alone = hit[hit.eps < hit.image.map(first).fillna(np.inf)]
    count = alone.image.nunique()
    value = f"{count} image(s) fooled by {' or '.join(blind)} alone"
    alone = alone.groupby(["image", "attack"]).eps.min()
    shown = [f"image {i} by {name} at {pixel_text(eps)}" for (i, name), eps in alone.items()]
    if shown:
        value += f": {', '.join(shown[:10])}" + (" and more" if len(shown) > 10 else "")
    met = rows[~rows.attack.isin(["clean", "worst"])].image.nunique()
    return "black box", count <= ALONE * met, value


def _everything(found: Evaluation, subset: int) -> tuple:
    """In a ball that holds other images whole, every image must fall."""
    last = found.settings["eps_grid"][-1]
    some = _spread(np.flatnonzero(~found.fooled("worst", last)), subset)
    if not len(some):
        return "everything", True, f"all fooled at {pixel_text(last)}"
    far = [eps for eps in (0.5, 1.0) if eps > last] or [last]
    budgets = {name: {"steps": 20} for name in ("pgd_ce", "pgd_margin")}
    left = int((~_again(found, some, far, budgets).fooled("worst", far[-1])).sum())
    value = f"of {len(some)} images that stand at {pixel_text(last)}, {left} still stand at "
    return "everything", not left, value + pixel_text(far[-1])


def _converged(found: Evaluation, shares: pd.Series, subset: int) -> tuple:
    """Twice the steps, on images that still stand at the eps where about half have fallen.

    Those with the smallest known distance; the others, farther away, are taken to fall as often as
    the upper end of the exact interval says (Clopper & Pearson 1934, one-sided 95 %). An eps at
    which an expensive attack was not run is not converged: another one is taken.
    """
    said = found.settings
    names = [name for name in said["attacks"] if KINDS[name].twice] or ["pgd_margin"]
    ran = [eps for eps in shares.index if all(eps in said["at"].get(name, [eps]) for name in names)]
    unfinished = shares.reindex(ran or shares.index)
    unfinished = unfinished[unfinished < 1]
    if not len(unfinished):
        return "converged", True, "no image stands at any eps"
    eps = (unfinished - 0.5).abs().idxmin()
    standing = np.flatnonzero(~found.fooled("worst", eps))
    nearest = standing[np.argsort(found.nearest[standing], kind="stable")]
    some, own = nearest[: max(LEAST, subset)], {"pgd_margin": {"steps": 10}} | said["attacks"]
    budgets = {name: own[name] | {"steps": 2 * own[name]["steps"]} for name in names}
    new = int(_again(found, np.sort(some), [eps], budgets).fooled("worst", eps).sum())
    most = new
    if left := len(standing) - len(some):
        most = new + left * (beta.ppf(0.95, new + 1, len(some) - new) if new < len(some) else 1)
    added, most = (100 * count / len(found.labels) for count in (new, most))
    value = f"{added:.1f} points at {pixel_text(eps)}, at most {most:.1f} "
    which = f"the nearest {len(some)} of" if left else "all"
    value += f"({new} of {which} {len(standing)} images that stood there)"
    return "converged", most <= POINTS, value


def _per_image(found: Evaluation, shares: pd.Series) -> tuple:
    """Whether "worst" is the union of all attacks per image, and not the best of their averages."""
    single = found.rows[~found.rows.attack.eq("worst")]
    met = single[single.attack.ne("clean") & ~single.attack.str.endswith(STANDING)]
    worst = found.rows[found.rows.attack.eq("worst") & found.rows.eps.isin(single.eps)]
    worst = worst[worst.image.isin(met.image)]
    single = single[single.fooled]
    first = worst.image.map(single.groupby("image").eps.min()).fillna(np.inf)
    missed = int((worst.fooled != (worst.eps >= first)).sum())
    said = [f"{pixel_text(eps)}: {share:.1%}" for eps, share in shares.items()]
    differ = f"; {missed} outcomes differ" if missed else ""
    return "union", not missed, f"fooled by any attack {'; '.join(said)}{differ}"


# ---------------------------------------- the model


@torch.no_grad()
def _range(found: Evaluation, subset: int) -> tuple:
    """Whether the model wants another range of pixels, and the images fill theirs."""
    some = torch.from_numpy(_spread(np.arange(len(found.images)), subset))
    device = device_of(found.model, found.images)
    x, y = found.images[some].to(device), found.labels[some].to(device)
    ranges = {"[0,255]": x * 255, "[-1,1]": x * 2 - 1, "standardised": (x - 0.45) / 0.225}
    own = _balanced(found.model, x, y)
    accuracy = {name: _balanced(found.model, other, y) for name, other in ranges.items()}
    best = max(accuracy, key=accuracy.get)
    span = float((x.flatten(1).amax(1) - x.flatten(1).amin(1)).median())
    value = f"balanced accuracy {own:.1%} as given, {accuracy[best]:.1%} in {best}; "
    value += f"an image spans {span:.2g}"
    return "range", accuracy[best] <= own + BETTER and span >= SPAN, value


def _balanced(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean over the classes of the share that is right; 0 for a model that refuses such pixels."""
    try:
        right = (model(x).argmax(1) == y).float()
    except (ValueError, RuntimeError) as error:
        if re.search("out of memory|allocate memory|cuda", str(error), re.IGNORECASE):
            raise  # the machine failed, the model did not answer
        return 0.0
    return float(torch.stack([right[y == label].mean() for label in y.unique()]).mean())


@torch.no_grad()
def _random(found: Evaluation) -> tuple:
    x = found.images[: found.settings["batch_size"]].to(device_of(found.model, found.images))
    logits = torch.stack([found.model(x) for _ in range(PASSES)]).float()
    spread = float((logits.amax(0) - logits.amin(0)).max())
    alone = torch.cat([found.model(one) for one in x[:PASSES].split(1)]).float()
    gap = float((alone - logits[0, :PASSES]).abs().max())
    size = max(1.0, float(logits.abs().max()))
    value = f"{PASSES} passes differ by up to {spread:.2g}, alone and in a batch by {gap:.2g}"
    return "random", spread <= SAME * size and gap <= ALIKE * size, value
