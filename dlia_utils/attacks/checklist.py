"""Is an evaluation to be believed? The check list of Carlini et al. (arXiv 1902.06705)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..device import device_of
from ..units import eps_text
from .evaluate import BPDA, KINDS, PASSES, Evaluation, kind, robust, zero_gradient_share

SAME = 1e-4  # of the logits, or of their size where that is above 1
ALONE = 0.002  # share of images that a black box may fool alone (as AutoAttack's flag)
LEAD = 0.05  # share of the images by which one loss, or one kind of gradient, may beat another
SPAN, BETTER = 0.1, 0.1  # of [0,1] an image should fill; balanced accuracy in another range
POINTS = 2.0  # per cent of the images that twice the steps may add
LATE = ("one_pixel", "square")  # black boxes that run after everything else

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
random: the model answers alike each time
Dropout left on, or noise at test time: a gradient of one pass misleads; switch it off
union: the worst case is taken per image
The best attack on average is not the worst case: count an image that any attack fools
""".splitlines()
CHECKS = {
    head.split(": ")[0]: (head.split(": ")[1], why)
    for head, why in zip(TEXTS[::2], TEXTS[1::2], strict=True)
}

Line = tuple[str, str, str, str]


def report(found: Evaluation, *, subset: int = 50) -> pd.DataFrame:
    """What an evaluation of robustness must show, PASS or WARN with the reason.

    subset: the most images that anything is run on anew: all attacks in full when fooled images
    were dropped, twice the steps, the ball in which every image must fall. Columns: check, verdict,
    value (what was found), why (after WARN: what it means). A WARN says that the robust accuracy
    may be too high, or speaks of something else. A check is left out where it does not apply.

    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval(), torch.rand(8, 1, 2, 2)
    >>> found = robust(model, (x, model(x).argmax(1)), [0.1, 0.5], progress=False)
    >>> report(found).set_index("check").verdict["white box beats black box"]
    'PASS'
    """
    rows, said = found.rows, found.settings
    right = np.flatnonzero(~_fooled(found, rows, "clean", 0.0))
    stated = f"{said['norm']}, eps {balls(found)}, {len(said['attacks'])} attacks"
    lines = [_line("threat", True, f"{stated}, seed {said['seed']}")]
    lines += [_clean(found, right), _range(found, subset)]
    if len(right):  # else there is nothing to attack, which the second line says
        full, note, some = rows, "", _spread(right, subset)
        if said["early_drop"]:
            names = [name for name in said["attacks"] if name not in LATE] or ["pgd_margin"]
            full = _again(found, some, said["eps_grid"], names, at=said["at"]).rows
            note = f" (all attacks in full on {len(some)} images)"
        lines += [*_compared(found, full, note), _black_box(found, full, note), _rising(found)]
        lines += [_everything(found, subset), _converged(found, subset)]
        lines += [_zero_gradients(found, some), _random(found), _per_image(found)]
    return pd.DataFrame(lines, columns=["check", "verdict", "value", "why"])


def page(found: Evaluation, checks: pd.DataFrame | None = None) -> str:
    """One page: threat model, table, cost, and the check list where `report(found)` is given."""
    spent = found.cost[["forwards", "backwards", "seconds"]].sum()
    said = "Every attack was run on every image that the model gets right; columns are over all."
    if found.settings["early_drop"]:
        said = "Fooled images were dropped: an attack's column is over the images that still stood "
        said += "when it came (-: none); clean and worst are over all."
    by = "image (no patients given)" if found.groups is None else "patient"
    table = found.table().drop(columns="eps").set_index("ball")
    for name in ("clean", "worst"):
        low, high = table.pop(f"{name}_low"), table.pop(f"{name}_high")
        cells = zip(table[name], low, high, strict=True)
        table[name] = [f"{value:.3f} [{least:.3f}, {most:.3f}]" for value, least, most in cells]
    parts = [
        "Robust accuracy, worst case per image (arXiv 1902.06705)",
        threat(found),
        table.to_string(float_format=lambda value: f"{value:.3f}", na_rep="-"),
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


def threat(found: Evaluation) -> str:
    """The threat model in words."""
    said = found.settings
    blind = [name for name in said["attacks"] if KINDS[name].blind]
    unit = "largest change of a pixel" if said["norm"] == "linf" else "length of the whole change"
    budgets = []
    for name, own in said["attacks"].items():
        words = [f"{key} {value}" for key, value in own.items() if key not in ("norm", "loss")]
        words += [f"only at {balls(found, name)}"] if name in said["at"] else []
        budgets.append(f"{name} ({', '.join(words)})" if words else name)
    lines = {
        "goal": "any wrong class (of two, the other one: targeted and untargeted are the same)",
        "ball": f"{said['norm']} ({unit}), eps {balls(found)}, pixels in [0,1]",
        "limits": "none besides: every pixel and channel may change",
        "knowledge": f"weights and gradients; answers alone: {', '.join(blind) or 'no attack'}",
        "attacks": "; ".join(budgets),
        "operators": "also straight through" if said["straight_through"] else "exact gradients",
        "draws": f"seed {said['seed']}",
    }
    return "\n".join(f"  {name:10}{line}" for name, line in lines.items())


def balls(found: Evaluation, name: str = "") -> str:
    """The eps grid in words, or those eps at which the attack `name` is run."""
    grid = found.settings["at"].get(name, found.settings["eps_grid"])
    return ", ".join(_text(found, eps) for eps in grid)


def _text(found: Evaluation, eps: float) -> str:
    return eps_text(eps, "pixel" if found.settings["norm"] == "linf" else "length")


def _line(key: str, passed: bool, value: str, name: str = "") -> Line:
    check, why = CHECKS[key]
    return check.format(name), "PASS" if passed else "WARN", value, "" if passed else why


def _again(found: Evaluation, positions: np.ndarray, grid: Sequence[float], names, **changes):
    """`robust` once more on some of the images, every attack in full."""
    said, some = found.settings, torch.from_numpy(positions)
    options = {key: said[key] for key in ("norm", "seed", "batch_size", "fast")}
    options |= {"budgets": said["attacks"], "ids": said["ids"][positions]} | changes
    known = {name: own for name, own in options["budgets"].items() if name in names}
    options["budgets"] = {n: {k: v for k, v in known[n].items() if k != "norm"} for n in known}
    data = (found.images[some], found.labels[some])
    options |= {"attacks": names, "early_drop": False, "progress": False}
    return robust(found.model, data, grid, **options)


def _spread(positions: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the positions, evenly spread."""
    most = min(most, len(positions))
    return positions[np.linspace(0, len(positions) - 1, most).astype(int)]


def _fooled(found: Evaluation, rows: pd.DataFrame, attack: str, eps: float) -> np.ndarray:
    """Bool [N] in the order of the images."""
    part = rows[rows.attack.eq(attack) & rows.eps.eq(eps)].set_index("image").fooled
    return part.reindex([i for i in found.settings["ids"] if i in part.index]).to_numpy(bool)


def _shares(found: Evaluation) -> pd.Series:
    """The share of the images fooled in the worst case, by eps."""
    return found.rows[found.rows.attack.eq("worst")].groupby("eps").fooled.mean()


# ---------------------------------------- the evaluation


def _clean(found: Evaluation, right: np.ndarray) -> Line:
    largest = float(found.labels.bincount().max()) / len(found.labels)
    accuracy = len(right) / len(found.labels)
    return _line("clean", accuracy > largest, f"{accuracy:.1%} against {largest:.1%}")


def _compared(found: Evaluation, full: pd.DataFrame, note: str) -> list[Line]:
    """What attacks run in full say of each other, at the eps that they have in common."""
    rows, lines = full[~full.attack.isin(["clean", "worst"])], []
    names = list(dict.fromkeys(rows.attack))
    wide = rows.set_index(["eps", "image", "attack"]).fooled.unstack().astype(float)
    strong = wide[[name for name in names if not kind(name).blind and name != "fgsm"]].max(axis=1)
    for weak in ("fgsm", "noise"):
        met = pd.DataFrame({"ours": strong, "theirs": wide.get(weak, np.nan)}).dropna()
        sums = met.groupby("eps").sum().astype(int)
        said = [
            (_text(found, eps), a, ">=" if a >= b else "<", b) for eps, a, b in sums.itertuples()
        ]
        value = "; ".join(f"{at}: {a} {sign} {b}" for at, a, sign, b in said)
        value += f"; fooled by {weak} only: {(met.theirs > met.ours).sum()}{note}"
        if len(met):
            lines.append(_line(weak, bool((sums.ours >= sums.theirs).all()), value))
    through = [("through", name, name.removesuffix(BPDA)) for name in names if name.endswith(BPDA)]
    for key, more, less in [("loss", "pgd_margin", "pgd_ce"), *through]:
        pair = wide.reindex(columns=[more, less])
        lead = (pair[more] - pair[less]).groupby("eps").mean().dropna()
        if len(lead):
            what = "the margin loss" if key == "loss" else "the way through the operator"
            value = f"largest lead of {what}: {lead.max():.1%} of the images at "
            value += _text(found, lead.idxmax()) + note
            lines.append(_line(key, lead.max() <= LEAD, value, more))
    falls = []
    for name in names:
        counts = wide[name].groupby("eps").sum(min_count=1).dropna()
        for eps in counts.index[counts.diff() < 0]:
            falls.append(f"{name} at {_text(found, eps)}: {counts[eps]:.0f}")
    return [
        *lines,
        _line("monotone", not falls, ("; ".join(falls) or "holds for every attack") + note),
    ]


def _black_box(found: Evaluation, full: pd.DataFrame, note: str) -> Line:
    """Images that only an attack without gradients fools, inside the ball of some eps."""
    rows, names = found.rows, list(found.settings["attacks"])
    blind = [name for name in names if KINDS[name].blind]
    if not set(names) & set(LATE):
        return _line("black box", False, "no black-box attack was run")
    hit = full[full.fooled & ~full.attack.isin(["clean", "worst"])]
    first = hit[~hit.attack.isin(blind)].groupby("image").eps.min()
    hit = hit[hit.attack.isin(blind)]
    alone = hit[hit.eps < hit.image.map(first).fillna(np.inf)]
    if full is not rows:  # what these fooled had withstood every gradient
        alone, note = pd.concat([alone, rows[rows.attack.isin(LATE) & rows.fooled]]), ""
    alone = alone.groupby(["image", "attack"]).eps.min()
    shown = [f"image {i} by {name} at {_text(found, eps)}" for (i, name), eps in alone.items()]
    count = alone.reset_index().image.nunique()
    value = f"{count} image(s) fooled by {' or '.join(blind)} alone{note}"
    if shown:
        value += f": {', '.join(shown[:10])}" + (" and more" if len(shown) > 10 else "")
    return _line("black box", count <= ALONE * rows.image.nunique(), value)


def _rising(found: Evaluation) -> Line:
    shares = _shares(found)
    stuck = bool(((shares.diff() <= 0) & (shares < 1)).any())
    said = [f"{_text(found, eps)}: {share:.1%} fooled" for eps, share in shares.items()]
    return _line("rising", not stuck, "; ".join(said))


def _everything(found: Evaluation, subset: int) -> Line:
    """In a ball that holds other images whole, every image must fall."""
    last = found.settings["eps_grid"][-1]
    some = _spread(np.flatnonzero(~_fooled(found, found.rows, "worst", last)), subset)
    if not len(some):
        return _line("everything", True, f"all fooled at {_text(found, last)}")
    whole = 1.0 if found.settings["norm"] == "linf" else found.images[0].numel() ** 0.5
    far = [eps for eps in (0.5 * whole, whole) if eps > last] or [last]
    names = ["pgd_ce", "pgd_margin"]
    again = _again(found, some, far, names, budgets={name: {"steps": 20} for name in names})
    left = int((~_fooled(found, again.rows, "worst", far[-1])).sum())
    value = f"of {len(some)} images that stand at {_text(found, last)}, {left} still stand at "
    return _line("everything", not left, value + _text(found, far[-1]))


def _converged(found: Evaluation, subset: int) -> Line:
    """Twice the steps, on images that still stand at the eps where about half have fallen.

    An eps at which an expensive attack was not run is not converged: another one is taken.
    """
    said, shares = found.settings, _shares(found)
    names = [name for name in said["attacks"] if KINDS[name].twice] or ["pgd_margin"]
    ran = [eps for eps in shares.index if all(eps in said["at"].get(name, [eps]) for name in names)]
    unfinished = shares.reindex(ran or shares.index)
    unfinished = unfinished[unfinished < 1]
    if not len(unfinished):
        return _line("converged", True, "no image stands at any eps")
    eps = (unfinished - 0.5).abs().idxmin()
    standing = np.flatnonzero(~_fooled(found, found.rows, "worst", eps))
    some = _spread(standing, subset)
    own = {name: said["attacks"].get(name, {"steps": 10}) for name in names}
    budgets = {name: own[name] | {"steps": 2 * own[name]["steps"]} for name in names}
    again = _again(found, some, [eps], names, budgets=budgets)
    new = _fooled(found, again.rows, "worst", eps).mean()
    added = 100 * new * len(standing) / len(found.labels)
    value = f"{added:.1f} points at {_text(found, eps)} "
    value += f"({new:.1%} of {len(some)} images that stood there)"
    return _line("converged", added <= POINTS, value)


def _per_image(found: Evaluation) -> Line:
    """Whether "worst" is the union of all attacks per image, and not the best of their averages."""
    worst = found.rows[found.rows.attack.eq("worst")]
    single = found.rows[~found.rows.attack.eq("worst") & found.rows.fooled]
    first = worst.image.map(single.groupby("image").eps.min()).fillna(np.inf)
    missed = int((worst.fooled != (worst.eps >= first)).sum())
    said = [f"{_text(found, eps)}: {share:.1%}" for eps, share in _shares(found).items()]
    differ = f"; {missed} outcomes differ" if missed else ""
    return _line("union", not missed, f"fooled by any attack {'; '.join(said)}{differ}")


# ---------------------------------------- the model


@torch.no_grad()
def _range(found: Evaluation, subset: int) -> Line:
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
    return _line("range", accuracy[best] <= own + BETTER and span >= SPAN, value)


def _balanced(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean over the classes of the share that is right; 0 for a model that refuses such pixels."""
    try:
        right = (model(x).argmax(1) == y).float()
    except (ValueError, RuntimeError) as error:
        if re.search("out of memory|allocate memory|cuda", str(error), re.IGNORECASE):
            raise  # the machine failed, the model did not answer
        return 0.0
    return float(torch.stack([right[y == label].mean() for label in y.unique()]).mean())


def _zero_gradients(found: Evaluation, some: np.ndarray) -> Line:
    x, y = (part[torch.from_numpy(some)] for part in (found.images, found.labels))
    ce, margin = (zero_gradient_share(found.model, x, y, loss=loss) for loss in ("ce", "margin"))
    value = f"cross-entropy {ce:.1%}, margin {margin:.1%} of {len(some)} images"
    return _line("zero", ce == 0 and margin == 0, value)


@torch.no_grad()
def _random(found: Evaluation) -> Line:
    x = found.images[: found.settings["batch_size"]].to(device_of(found.model, found.images))
    logits = torch.stack([found.model(x) for _ in range(PASSES)]).float()
    spread = float((logits.amax(0) - logits.amin(0)).max())
    flips = int((logits.argmax(2) != logits[0].argmax(1)).any(0).sum())
    value = f"{PASSES} passes differ by up to {spread:.2g}; "
    value += f"the answer changes on {flips} of {len(x)} images"
    return _line("random", spread <= SAME * max(1.0, float(logits.abs().max())), value)
