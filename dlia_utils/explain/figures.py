"""Figures of maps: side by side with the films, scored, against randomised weights, and by kind of answer."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..detect.figures import TRUTH, _draw, _finish, _need
from ..plots import COLORS, panels
from . import base as s

HEAT, SIGNED = "plasma", "RdBu_r"
WIDTH = 12.4  # inches; 900 pixels of a notebook
PAIRS = 3  # methods beside one film; more of them go to a line of their own
SCALE = (HEAT, 0, "0 to each map's own maximum")  # colour map, its lower end, what it says
GROUPS = (  # name, label, class read
    ("true positive", 1, 1),
    ("true negative", 0, 0),
    ("false positive", 0, 1),
    ("false negative", 1, 0),
)
PANELS = {
    "coverage_gain": "coverage of the finding, minus chance",
    "pointing": "highest pixel on the finding",
    "energy_gain": "energy inside, minus chance",
    "auprc": "average precision of the pixels",
}


def figure_overlays(
    images: Tensor | np.ndarray,
    maps: Mapping[str, Tensor | np.ndarray],
    *,
    captions: Sequence[str],
    caption: str,
    boxes: Sequence[pd.DataFrame | np.ndarray | None] | None = None,
    alpha: float = 0.4,
    signed: Sequence[str] = (),
) -> Figure:
    """Per film the input, then each method's map alone and over the film.

    images: [N,1|3,H,W] or [N,H,W] in [0,1]. maps: name -> [N,H,W] in [0,1], such as `Attribution.heat()`;
    those named in `signed` lie in [-1,1] (blue speaks against the class). captions: one per film. boxes: per
    film a table of corners or a mask (`regions_of`), or None, drawn in green. alpha: share of the map in the
    overlay. A film has a line per three methods. A map that is zero everywhere is called so. Errors:
    ValueError for lengths or ranges that do not fit, and names in `signed` that are no maps.
    """
    films = _films(images)
    boxes = [None] * len(films) if boxes is None else boxes
    _same_length(films, captions=captions, boxes=boxes)
    if unknown := set(signed) - set(maps):
        raise ValueError(
            f"signed names {', '.join(sorted(unknown))}, not among the maps: {', '.join(maps)}"
        )
    if not maps:
        raise ValueError("there is no map to show: give at least one")
    arrays = {
        name: _maps(these, films, name=name, signed=name in signed) for name, these in maps.items()
    }
    lines = -(-len(arrays) // PAIRS)
    pairs = -(-len(arrays) // lines)
    figure, axes = panels(1 + 2 * pairs, rows=lines * len(films))
    for axis in axes.flat:
        axis.axis("off")
    for row, film in enumerate(films):
        block = axes[row * lines : (row + 1) * lines]
        _show(block[0, 0], film, boxes[row])
        block[0, 0].set_title(captions[row])
        for number, (name, heats) in enumerate(arrays.items()):
            line, pair = divmod(number, pairs)
            alone, over = block[line, 1 + 2 * pair], block[line, 2 + 2 * pair]
            look = _look(name in signed)
            alone.imshow(heats[row], **look)
            alone.set_title(_titled(name, heats[row]))
            _show(over, film, boxes[row], width=0.8)
            over.set_title("overlay")
            over.imshow(heats[row], alpha=alpha, **look)
    bars = [SCALE] if len(set(signed)) < len(maps) else []
    bars += [(SIGNED, -1, "against the class, and for it")] if signed else []
    _lay_out(figure, caption, films.shape[1:], bars)
    return figure


def figure_groups(
    images: Tensor | np.ndarray,
    maps: Tensor | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    probabilities: Sequence[float] | np.ndarray,
    classes: Sequence[str],
    caption: str,
    *,
    per_group: int = 4,
    threshold: float = 0.5,
    alpha: float = 0.4,
) -> Figure:
    """Maps over films that a two-class model got right and wrong: a line each for TP, TN, FP and FN.

    images: [N,1|3,H,W] or [N,H,W] in [0,1]; maps: [N,H,W] in [0,1]; labels: 0 or 1; probabilities: of class
    1, which is read above `threshold`; classes: names of class 0 and 1. A group shows its `per_group`
    clearest cases: of the right answers those with the smallest error |probability - label|, of the wrong
    ones those with the largest. An empty group has no line; the heading names it. Errors: ValueError for
    lengths, labels or numbers of classes that do not fit.
    """
    films = _films(images)
    _same_length(films, labels=labels, probabilities=probabilities)
    heats = _maps(maps, films, name="these", signed=False)
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, float)
    if len(classes) != 2 or not np.isin(labels, (0, 1)).all():
        raise ValueError(
            f"the four groups need two classes and labels 0 or 1, not {len(classes)} classes"
        )
    if not ((probabilities >= 0) & (probabilities <= 1)).all() or per_group < 1:
        raise ValueError("probabilities must lie in [0,1] (of class 1), and per_group be >= 1")
    error, read = np.abs(probabilities - labels), probabilities > threshold
    found, empty = [], []
    for name, label, positive in GROUPS:
        members = np.flatnonzero((labels == label) & (read == positive))
        order = error[members] if label == positive else -error[members]
        chosen = members[np.argsort(order, kind="stable")][:per_group]
        head = f"{name}s: {classes[label]} read as {classes[positive]}"
        if len(members):
            found.append((f"{head}, {len(chosen)} of {len(members)} shown", chosen))
        else:
            empty.append(f"no {head}")
    figure, axes = panels(per_group, rows=len(found))
    for line, (head, chosen) in zip(axes, found, strict=True):
        for axis, row in zip(line, chosen, strict=False):
            _show(axis, films[row])
            axis.imshow(heats[row], alpha=alpha, **_look(False))
            text = f"p({classes[1]}) {probabilities[row]:.3f}, error {error[row]:.3f}"
            # The group's name runs over the films beside it, so it stands at the left and is not wrapped.
            axis.set_title(
                f"{head if row == chosen[0] else ''}\n{_titled(text, heats[row])}", loc="left"
            )
        for axis in line[len(chosen) :]:
            axis.axis("off")
    _lay_out(figure, caption, films.shape[1:], [SCALE], notes=empty)
    return figure


def figure_localisation(summary: pd.DataFrame, caption: str) -> Figure:
    """How well the maps find the finding: every score of `localise`'s summary with its interval.

    Maps that no model made are grey and come last. A dotted line stands at the random map's value: what lies
    left of it is worse than guessing.
    """
    _need(summary, "summary", "map", "score", "value", "ci_low", "ci_high", "n", "zero_maps")
    names = [name for name in dict.fromkeys(summary["map"]) if name not in s.REFERENCES]
    references = [name for name in s.REFERENCES if name in set(summary["map"])]
    zero = summary.groupby("map")["zero_maps"].first()
    figure, axes = panels(
        len(PANELS), width=WIDTH / len(PANELS), height=1.3 + 0.3 * len(names + references)
    )
    for axis, (score, title) in zip(axes[0], PANELS.items(), strict=True):
        table = summary[summary["score"].eq(score)].set_index("map")
        for place, name in enumerate(names + references):
            if name not in table.index:
                continue
            row, color = table.loc[name], "0.55" if name in references else COLORS[0]
            axis.plot([row["ci_low"], row["ci_high"]], [place, place], color=color, lw=1.6)
            axis.plot(row["value"], place, "s" if name in references else "o", color=color, ms=5)
        if s.REFERENCES[0] in table.index:
            axis.axvline(table.loc[s.REFERENCES[0], "value"], color="0.55", ls=":", lw=1)
        axis.set_title(title)
        axis.grid(axis="x", alpha=0.25)
        axis.set_ylim(len(names + references) - 0.5, -0.5)
        axis.set_yticks(range(len(names + references)), [])
    labels = [
        f"{name}\n({zero[name]} zero maps)" if zero[name] else name for name in names + references
    ]
    axes[0, 0].set_yticks(range(len(labels)), labels, fontsize=8)
    counts = sorted(set(summary["n"]))
    films = " or ".join(str(count) for count in counts)
    figure.supxlabel(
        f"{films} films with a finding; bars: intervals; grey: maps of no model", fontsize=8
    )
    return _finish(figure, caption)


def figure_randomisation(tables: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Likeness to the intact model's map while layers lose their weights, from the output down.

    tables: method -> `localisation.sanity`'s table. A dotted line of the method's colour: how alike its maps
    of different films are. A curve that stays far above it does not depend on the weights.
    """
    if not tables:
        raise ValueError("there is no table to show: give at least one method's")
    figure, axes = panels(2, width=4.9, height=3.2)
    titles = {"spearman": "rank correlation", "ssim": "structural similarity"}
    for number, (name, table) in enumerate(tables.items()):
        _need(table, f"tables[{name!r}]", "layers", "down_to", "spearman", "ssim", "zero")
        color, line = COLORS[number % len(COLORS)], ("-", "--", "-.")[number % 3]
        other = table["down_to"].eq("another image")
        steps = table[~other]
        label = f"{name}\n(up to {steps['zero'].max()} zero maps)" if steps["zero"].any() else name
        for axis, score in zip(axes[0], titles, strict=True):
            marker = "osD^vPX*"[number % 8]
            axis.plot(
                steps["layers"], steps[score], line, marker=marker, ms=4, color=color, label=label
            )
            if other.any():
                axis.axhline(table.loc[other, score].iloc[0], color=color, ls=":", lw=1.2)
    for axis, title in zip(axes[0], titles.values(), strict=True):
        axis.set(xlabel="randomised layers, from the output down", ylabel=title)
        axis.set_title("1: the same map; dotted: another film's map")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set_ylim(top=1.05)
        axis.grid(alpha=0.25)
    axes[0, 1].legend(
        fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=3
    )
    return _finish(figure, caption)


# ------------------------------------------------------------------------------------------- parts


def _films(images: Tensor | np.ndarray) -> np.ndarray:
    """Grey films [N,H,W] in [0,1]."""
    films = np.asarray(images.detach().cpu() if isinstance(images, Tensor) else images, dtype=float)
    films = films.mean(1) if films.ndim == 4 else films
    if films.ndim != 3 or not films.size:
        raise ValueError(
            f"images must be [N,1|3,H,W] or [N,H,W] with at least one film, not {list(films.shape)}"
        )
    if not (films.min() >= 0 and films.max() <= 1.001):
        raise ValueError("images must lie in [0,1]: divide by their full scale first")
    return films


def _maps(maps: Tensor | np.ndarray, films: np.ndarray, *, name: str, signed: bool) -> np.ndarray:
    heats = np.asarray(maps.detach().cpu() if isinstance(maps, Tensor) else maps, dtype=float)
    if heats.shape != films.shape:
        raise ValueError(
            f"{name} maps are {list(heats.shape)}, the films {list(films.shape)}: resize or select them"
        )
    if not (heats.min() >= (-1.001 if signed else 0) and heats.max() <= 1.001):
        raise ValueError(
            f"{name} maps leave {'[-1,1]' if signed else '[0,1]'}: pass Attribution.heat(), or divide signed "
            "maps by their largest size and name them in signed="
        )
    return heats


def _same_length(films: np.ndarray, **aligned: Sequence) -> None:
    lengths = {name: len(values) for name, values in aligned.items() if len(values) != len(films)}
    if lengths:
        raise ValueError(f"{len(films)} films, but {lengths}: give one entry per film")


def _look(signed: bool) -> dict:
    return {"cmap": SIGNED if signed else HEAT, "vmin": -1 if signed else 0, "vmax": 1}


def _titled(text: str, heat: np.ndarray) -> str:
    return text if np.abs(heat).max() > s.TINY else f"{text}\nzero map"


def _show(axis: Axes, film: np.ndarray, region=None, *, width: float = TRUTH["lw"]) -> None:
    """A film, and the outline of its finding."""
    axis.imshow(film, cmap="gray", vmin=0, vmax=1)
    axis.axis("off")
    if isinstance(region, pd.DataFrame):
        _draw([(axis, region.assign(text=""), TRUTH | {"lw": width})])
    elif region is not None and np.any(region):
        mask = np.pad(
            np.asarray(region, float), 1
        )  # so that the line closes at the border of the film
        place = [np.arange(side) - 1 for side in mask.shape]
        line = axis.contour(*place[::-1], mask, [0.5], colors=TRUTH["color"], linewidths=width)
        line.set_path_effects(
            [patheffects.withStroke(linewidth=width + 1.4, foreground="black", alpha=0.55)]
        )
        axis.set(xlim=(-0.5, film.shape[1] - 0.5), ylim=(film.shape[0] - 0.5, -0.5))


def _lay_out(
    figure: Figure,
    caption: str,
    shape: tuple[int, int],
    bars: Sequence[tuple[str, int, str]],
    notes: Sequence[str] = (),
) -> None:
    """Size, titles, heading and colour bars, in inches: tight_layout has no room for axes switched off."""
    rows, columns = figure.axes[0].get_gridspec().get_geometry()
    gap, head, foot = 0.08, 0.26 + 0.16 * len(notes), 0.52
    side = min(2.6, (WIDTH - gap) / columns - gap)
    lines = 1
    for axis in figure.axes:
        wrapped = [textwrap.fill(text, int(side * 16)) for text in axis.get_title().split("\n")]
        axis.set_title("\n".join(wrapped), fontsize=8)
        axis.set_title(axis.get_title(loc="left"), loc="left", fontsize=8)
        lines = max([lines] + [axis.get_title(loc=at).count("\n") + 1 for at in ("center", "left")])
    titles, tall = 0.1 + 0.145 * lines, side * shape[0] / shape[1]
    width, height = columns * (side + gap) + gap, rows * (tall + titles) + head + foot
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=gap / width,
        right=1 - gap / width,
        bottom=foot / height,
        top=1 - (head + titles) / height,
        wspace=gap / side,
        hspace=titles / tall,
    )
    figure.suptitle("\n".join([caption, *notes]), fontsize=9, y=1 - 0.08 / height, va="top")
    for number, (name, low, text) in enumerate(bars):
        place = ((number + 0.25) / len(bars), 0.36 / height, 0.5 / len(bars), 0.08 / height)
        axis = figure.add_axes(place)
        shades, ticks = ScalarMappable(Normalize(low, 1), name), [low, (low + 1) / 2, 1]
        figure.colorbar(shades, cax=axis, orientation="horizontal", ticks=ticks)
        axis.tick_params(labelsize=7, pad=1, length=2)
        axis.set_xlabel(f"map: {text}", fontsize=8, labelpad=1)
