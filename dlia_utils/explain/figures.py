"""Figures of maps and of their scores: functions of numbers and a caption."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..data.tables import CORNERS
from ..plots import line_style, panels, titled
from . import base

HEAT, TRUTH, LINE = "plasma", "#3ddc84", "#56B4E9"
WIDTH, LABEL = 8.6, 1.4  # inches: of a figure (860 pixels of a notebook), of the label of a line
TEXT = 9  # points of all text


class Picture(NamedTuple):
    """An image [1|3,H,W] or [H,W], a map [h,w], both in [0,1], or the map over the image."""

    title: str = ""
    image: Tensor | np.ndarray | None = None
    heat: Tensor | np.ndarray | None = None
    alpha: float = 1.0  # opacity of the map
    boxes: pd.DataFrame | None = None  # corners, drawn in green


def figure_grid(lines: Sequence[tuple[str, Sequence[Picture]]], caption: str) -> Figure:
    """Pictures in lines of (label, pictures); a map that is zero everywhere is called so."""
    every = [picture for _, pictures in lines for picture in pictures]
    columns = max(len(pictures) for _, pictures in lines)
    tall, wide = next(np.shape(p.image)[-2:] for p in every if p.image is not None)
    side = min(2.2, (WIDTH - LABEL) / columns, max(1.1, 10 / len(lines)))  # no taller than a page
    figure, axes = panels(columns, rows=len(lines))
    height = 0.5 + len(lines) * side * tall / wide
    for line, (label, pictures) in zip(axes, lines, strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(_wrapped(label, 18), fontsize=TEXT, rotation=0, ha="right", va="center")
        for axis, picture in zip(line, pictures, strict=False):
            _show(axis, picture)
            zero = picture.heat is not None and not base.array(picture.heat).max() > base.TINY
            title = _wrapped(picture.title, int(14 * side)) + ("\nzero map" if zero else "")
            axis.set_title(title, fontsize=TEXT)
        titles = [axis.get_title() for axis in line]
        height += 0.15 * max(title.count("\n") + bool(title) for title in titles)
    if any(picture.heat is not None for picture in every):
        told = (
            "maps: from 0 (blue) to their own maximum (yellow); line: round the hottest twentieth"
        )
        caption, height = f"{told}\n{caption}", height + 0.2
    figure.set_size_inches(side * columns + LABEL, height)
    titled(figure, "", caption)
    figure.set_layout_engine("compressed", w_pad=0.02, h_pad=0.03, hspace=0, wspace=0)
    return figure


def _show(axis: Axes, picture: Picture) -> None:
    look = {"vmin": 0, "vmax": 1}
    if picture.image is not None:
        grey = base.array(picture.image)
        grey = grey.mean(0) if grey.ndim == 3 else grey
        axis.imshow(grey, cmap="gray", interpolation="nearest" if len(grey) < 100 else None, **look)
        # A map of another size covers the image all the same.
        look["extent"] = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
    if picture.heat is not None:
        heat, look = base.array(picture.heat), look | {"cmap": HEAT, "interpolation": "bilinear"}
        # Over an image only what is hot is tinted, and a line goes round the hottest twentieth.
        axis.imshow(heat, **look, alpha=None if picture.image is None else picture.alpha * heat)
        if picture.image is not None and (level := np.quantile(heat, 0.95)) > base.TINY:
            tall, wide = (axis.images[0].get_array().shape[k] / heat.shape[k] for k in (0, 1))
            x, y = (np.arange(heat.shape[1]) + 0.5) * wide, (np.arange(heat.shape[0]) + 0.5) * tall
            axis.contour(x - 0.5, y - 0.5, heat, [level], colors=[LINE], linewidths=1.0)
    if picture.boxes is not None:
        for x1, y1, x2, y2 in picture.boxes[CORNERS].to_numpy(float):
            corner = (x1 - 0.5, y1 - 0.5)  # pixel i is drawn from i - 0.5 to i + 0.5
            axis.add_patch(Rectangle(corner, x2 - x1, y2 - y1, fill=False, color=TRUTH, lw=1.5))


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(part, width) for part in text.split("\n"))


def figure_overlays(
    images: Tensor | np.ndarray,
    maps: Mapping[str, Tensor | np.ndarray],
    *,
    captions: Sequence[str],
    caption: str,
    boxes: Sequence[pd.DataFrame] | None = None,
) -> Figure:
    """Per image [N,1|3,H,W] the input, then each method's map (name -> [N,H,W]) over it.

    Maps lie in [0,1] (`Attribution.heat()`). boxes: per image a table of corners (`regions_of`).
    """
    lines = []
    for row, (image, text) in enumerate(zip(images, captions, strict=True)):
        own = None if boxes is None else boxes[row]
        over = [Picture(_words(name), image, maps[name][row], 0.7, own) for name in maps]
        lines.append((text, [Picture("input", image, boxes=own), *over]))
    return figure_grid(lines, caption)


# ----------------------------------------------------------------------------------------- numbers


def figure_forest(
    table: pd.DataFrame,
    caption: str,
    *,
    panel: str,
    row: str,
    series: str = "",
    chance: float | str,
) -> Figure:
    """Values with their intervals (value, ci_low, ci_high): a panel for each value of one column.

    row, series: columns whose values stand under one another, and get a colour each; maps that no
    model made are grey. A dotted line stands at `chance`: a number, or the row that has it.
    """
    rows, names = list(table[row].unique()), list(table[series].unique()) if series else [""]
    common = isinstance(chance, float)  # else each panel has a scale of its own
    height = 1.5 + 0.15 * len(rows) * max(2, len(names))
    figure, axes = shared_panels(table[panel].nunique(), height=height, common=common)
    for axis, (title, part) in zip(axes.flat, table.groupby(panel, sort=False), strict=True):
        for number, name in enumerate(names):
            own, look = part[part[series].eq(name)] if series else part, line_style(number)
            grey = own[row].isin(base.REFERENCES)
            place = own[row].map(rows.index) + 0.2 * (number - (len(names) - 1) / 2)
            colors = np.where(grey, "0.55", look["color"])
            axis.hlines(place, own["ci_low"], own["ci_high"], colors, lw=1.5)
            axis.scatter(own["value"], place, 22, colors, marker=look["marker"], label=name)
        at = chance if isinstance(chance, float) else part.set_index(row)["value"][chance]
        axis.axvline(at, color="0.4", ls=":", lw=1.2)
        top = part.iloc[int(np.nanargmax(part["value"]))]
        axis.set(title=f"{_words(title)}\nhighest: {top[row]}", ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticks(range(len(rows)), rows)
    dotted = "chance" if isinstance(chance, float) else chance
    return finish(figure, "", caption, f"bars: 95 % intervals; dotted: {dotted}")


def figure_randomisation(tables: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Likeness to the intact model's map while weights are lost: method -> `sanity`'s table.

    Dotted, in the method's colour: how alike its maps of different images are. A curve that stays
    far above it does not depend on the weights.
    """
    figure, axes = shared_panels(2, height=3.2)
    titles = {"spearman": "rank correlation", "ssim": "structural similarity"}
    for axis, (score, title) in zip(axes.flat, titles.items(), strict=True):
        for number, (name, table) in enumerate(tables.items()):
            other, look = table["down_to"].eq("another image"), line_style(number)
            steps = table[~other]
            zero = f" (up to {steps['zero'].max()} zero maps)" if steps["zero"].any() else ""
            axis.plot(steps["layers"], steps[score], ms=4, label=name + zero, **look)
            for level in table.loc[other, score]:
                axis.axhline(level, color=look["color"], ls=":", lw=1.2)
        axis.set(ylim=(None, 1.05), title=f"{title}\n(1: the same map; dotted: another image's)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left = {name: one.loc[one["layers"].idxmax(), "spearman"] for name, one in tables.items()}
    most = max(left, key=left.get)
    title = f"Most alike without any trained layer: {most}, rank correlation {left[most]:.2f}"
    return finish(figure, title, caption, "randomised layers, from the output down")


# ------------------------------------------------------------------------------------------- parts


def shared_panels(
    used: int, *, columns: int = 4, height: float, common: bool = True
) -> tuple[Figure, np.ndarray]:
    """Panels with a common y axis, and x axis too; those that are not used are left empty."""
    columns = min(columns, used)
    width = WIDTH / max(columns, 2)
    figure, axes = panels(columns, rows=-(-used // columns), width=width, height=height)
    for axis in axes.flat[1:]:
        axis.sharey(axes[0, 0])
        if common:
            axis.sharex(axes[0, 0])
    for axis in axes[:, 1:].flat:
        axis.tick_params(labelleft=False)
    for axis in axes.flat[used:]:
        axis.axis("off")
    return figure, axes


def _words(name: str) -> str:
    return str(name).replace("_", " ").replace("auprc", "AUPRC")


def finish(figure: Figure, title: str, caption: str, below: str) -> Figure:
    """Small type, a light grid, title, remark and legend under the panels or in a free one."""
    for axis in figure.axes:
        axis.tick_params(labelsize=TEXT)
        axis.grid(alpha=0.25)
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            text.set_fontsize(TEXT)
        axis.spines[["top", "right"]].set_visible(False)
    figure.set_layout_engine("constrained")
    look, free = {"fontsize": TEXT, "title_fontsize": TEXT, "frameon": False}, figure.axes[-1]
    handles = figure.axes[0].get_legend_handles_labels()
    if free.axison:
        look |= {"ncols": _columns(handles[1]), "loc": "outside lower center"}
        figure.legend(*handles, title=f"{below}\n{caption}", **look)
        return titled(figure, title, "")  # the caption heads the legend: both want the lower edge
    free.legend(*handles, loc="center", **look)
    return titled(figure, title, f"{below}\n{caption}")


def _columns(labels: Sequence[str]) -> int:
    """As many as fit beside one another, at most four."""
    longest = max([len(label) for label in labels], default=1)
    return max(1, min(4, int(14 * WIDTH / (longest + 6))))
