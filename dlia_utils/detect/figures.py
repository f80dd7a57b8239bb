"""Figures and the per-class table of a detection study; boxes come as tables, images as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..plots import COLORS, line_style, panels, titled
from .evaluate import CORNERS

DRAWN = 12  # predictions of one image that are drawn at most: more would hide it
WIDE = 3.3  # inches of an image

# Light enough for a dark image; line style, score and label tell them apart without the colour too.
TRUTH = {"color": "#3ddc84", "ls": "-", "lw": 1.8}
PREDICTION = {"color": "#ff5964", "ls": (0, (4, 2)), "lw": 1.8}
LEGEND_RIGHT = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "fontsize": 9}
LEGEND_RIGHT |= {"frameon": False, "handlelength": 3}


def figure_boxes(
    images: np.ndarray,
    truth_by_row: Sequence[pd.DataFrame],
    predictions_by_row: Sequence[pd.DataFrame],
    titles: Sequence[str],
    classes: Sequence[str],
    caption: str,
    *,
    threshold: float = 0.0,
    beside: bool = False,
    maps: np.ndarray | None = None,
) -> Figure:
    """Images with true boxes (green, solid) and predictions (red, dashed, with their score).

    images: uint8 [N,S,S]. truth_by_row, predictions_by_row: one table an image with corners in its
    pixels (`folds.on_images`). threshold: the lowest score shown; of more than `DRAWN` predictions
    the best are drawn, and the title says so. beside: truth left, predictions right. maps: [N,S,S]
    in [0,1], such as `eigencam(..., size=S)`; a row then shows the image, the map over it with the
    true boxes, and all boxes. Without a column `score` only the truth is shown.
    """
    scored = any("score" in table for table in predictions_by_row)
    smooth = "nearest" if images.shape[-1] < 200 else None  # small ones are shown as they are
    across = 1 if maps is not None else min(len(images), 2 if beside or len(images) == 4 else 3)
    each = 1 + beside if maps is None else 3
    figure, axes = panels(across * each, rows=-(-len(images) // across), width=WIDE, height=3.7)
    for axis in axes.flat:
        axis.axis("off")
    for row, image in enumerate(images):
        own, known = axes.flat[each * row : each * (row + 1)], truth_by_row[row]
        for axis in own:
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation=smooth)
        heads = [titles[row], "where the layer responds (yellow: most)", "all boxes"][: each - 1]
        if maps is not None:
            own[1].imshow(maps[row], cmap="plasma", vmin=0, vmax=1, alpha=0.4)
            _draw(own[1], known, TRUTH)
        labels = _draw(own[0 if beside else -1], known, TRUTH, classes)
        note = ""
        if scored:
            shown, note = _strongest(predictions_by_row[row], threshold)
            _draw(own[-1], shown, PREDICTION, classes, [] if beside else labels)
        heads.append(note or "predictions" if each > 1 else f"{titles[row]}\n{note}".strip())
        for axis, head in zip(own, heads, strict=True):
            axis.set_title(head)
    lines = {"ground truth": Line2D([], [], **TRUTH)}
    if scored:  # NaN is a threshold that no score can reach
        cut = f"score at least {threshold:.3g}"
        cut = cut if np.isfinite(threshold) else "no score reaches the threshold"
        lines[f"prediction, {cut}"] = Line2D([], [], **PREDICTION)
    look = {"fontsize": 9, "frameon": False, "handlelength": 3}
    figure.legend(lines.values(), lines, loc="outside upper center", ncol=len(lines), **look)
    return finish(figure, "", caption)


def _strongest(predictions: pd.DataFrame, threshold: float) -> tuple[pd.DataFrame, str]:
    """The best `DRAWN` predictions that reach the threshold, and what to say of the others."""
    reached = predictions[predictions["score"] >= threshold].sort_values("score", ascending=False)
    note = f"best {DRAWN} of {len(reached)} predictions" if len(reached) > DRAWN else ""
    if not len(reached):
        note = "no prediction" + (" above the threshold" if threshold else "")
    return reached.head(DRAWN), note


def _draw(
    axis: Axes,
    boxes: pd.DataFrame,
    style: Mapping,
    classes: Sequence[str] = (),
    labels: Sequence[tuple[float, ...]] = (),
) -> list[tuple[float, ...]]:
    """Boxes with the name of their class (label k is classes[k - 1]) and their score, if any.

    labels: corners of those that are there already. Returns them and the new ones.
    """
    look = {"facecolor": style["color"], "alpha": 0.85, "edgecolor": "none", "pad": 1}
    look, labels = {"bbox": look, "fontsize": 9, "clip_on": True}, list(labels)
    for box in boxes.to_dict("records"):
        x1, y1, x2, y2 = corners = [box[corner] for corner in CORNERS]
        axis.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, **style))
        if classes:
            text = classes[int(box["label"]) - 1]
            text += f" {box['score']:.2f}" if "score" in box else ""
            labels.append(_free(axis, corners, text, labels, above=style is TRUTH))
            axis.text(*labels[-1][:2], text, va="top", **look)
    return labels


def _free(axis: Axes, box: Sequence[float], text: str, labels: list, *, above: bool) -> tuple:
    """Corners for a label at its box that cover least of other labels and lie in the image."""
    side = axis.images[0].get_array().shape[1]
    width, height = (points * side / (72 * WIDE) for points in (5.8 * len(text) + 4, 15))
    x1, y1, x2, y2 = box
    rows = [y1 - height, y2, y1, y2 - height]
    rows = rows if above else [rows[1], rows[0], rows[3], rows[2]]
    places = [(x, y, x + width, y + height) for y in rows for x in (x1, x2 - width)]

    def lost(place: tuple) -> float:
        covered = sum(_common(place, other) for other in labels)
        return covered + width * height - _common(place, (0, 0, side, side))

    return min(places, key=lost)


def _common(a: tuple, b: tuple) -> float:
    """The area that two rectangles share."""
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    return max(width, 0) * max(height, 0)


def figure_pr(curves: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Precision against recall, the best F1 marked, over grey lines of equal F1.

    curves: name -> columns threshold, precision, recall, f1.
    """
    figure, ((axis,),) = panels(1, width=7.4, height=4.4)
    found = {}
    for f1 in (0.2, 0.4, 0.6, 0.8):
        precision = np.linspace(f1 / (2 - f1), 1, 200)
        axis.plot(f1 * precision / (2 * precision - f1), precision, color="0.8", lw=0.8, zorder=1)
        look = {"ha": "right", "va": "center", "color": "0.45", "zorder": 1.5}
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.text(1.03, f1 / (2 - f1), f"F1 {f1:g}", fontsize=9, bbox=paper, **look)
    for number, (name, curve) in enumerate(curves.items()):
        style, lacks = line_style(number), "true box" if len(curve) else "prediction"
        label = f"{name}: no {lacks}"
        curve = curve.dropna(subset=["precision", "recall", "f1"]).sort_values("threshold")
        if len(curve):
            best = curve.loc[curve.f1.idxmax()]
            found[name] = best.f1
            label = f"{name}: F1 {best.f1:.2f} at {best.threshold:.2f}"
            axis.plot(curve.recall, curve.precision, lw=1.3, **style | {"marker": ""})
            axis.plot(best.recall, best.precision, ms=8, mec="black", mew=0.8, **style)
        axis.plot([], [], ms=6, label=label, **style)
    axis.set(xlim=(-0.02, 1.03), ylim=(-0.02, 1.03), xlabel="recall", ylabel="precision")
    axis.legend(**LEGEND_RIGHT)
    first = next(iter(found), "")
    return finish(figure, f"{first}: best F1 {found[first]:.2f}" if found else "", caption)


def figure_tta(table: pd.DataFrame, caption: str) -> Figure:
    """mAP of each view and fusion with its interval, and its paired difference to the first row.

    table: columns name, value, ci_low, ci_high, difference, difference_low, difference_high, top
    to bottom as given. A difference whose interval crosses 0 shows no effect.
    """
    names = (("value", "ci_low", "ci_high"), ("difference", "difference_low", "difference_high"))
    figure, axes = panels(2, width=4.2, height=1.4 + 0.3 * len(table))
    place = np.arange(len(table))
    for axis, (value, low, high), color in zip(axes[0], names, COLORS[:2], strict=True):
        axis.hlines(place, table[low], table[high], color=color, lw=2)
        axis.plot(table[value], place, "o", ms=6, color=color, mec="white", mew=0.8)
        axis.set_ylim(len(table) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes[0, 0].set_yticks(place, table["name"])
    axes[0, 1].set_yticks(place, [])
    axes[0, 1].axvline(0, color="0.4", lw=1, ls="--")
    axes[0, 0].set_xlabel("mAP at IoU 0.5, 95 % interval")
    axes[0, 1].set_xlabel(f"difference to {table['name'].iloc[0]!r}, 95 % interval")
    unlike = table["difference_low"].gt(0) | table["difference_high"].lt(0)
    top = table.loc[table["value"].idxmax()]
    title = f"Highest mAP {top['value']:.2f} ({top['name']})"
    title += f"; {unlike.sum()} of {len(table) - 1} differ from the first"
    return finish(figure, title, caption)


def finish(figure: Figure, title: str, caption: str) -> Figure:
    """Small titles of the panels, what the figure shows, its caption, and the layout."""
    for axis in figure.axes:
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.set_layout_engine("constrained")
    return titled(figure, title, caption)
