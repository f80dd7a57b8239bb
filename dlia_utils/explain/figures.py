"""Figures of maps and of their drift: functions of numbers and a caption."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr
from torch import Tensor

from ..corruption_error import CLEAN
from ..plots import COLORS, line_style, panels
from . import base
from .drift import CEILING, FLOOR
from .eigencam import CORNERS

HEAT, TRUTH = "plasma", "#3ddc84"
WIDTH = 12.0  # inches: 864 pixels of a notebook
PAIRS = 3  # methods beside one image; more of them go to a line of their own
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
SCORES = {  # those of drift.SIGN, as axes call them
    "rmse": "RMSE of scaled maps (0-255)",
    "rmse_raw": "RMSE of raw maps",
    "ssim": "structural similarity (low: drift)",
    "spearman": "rank correlation (low: drift)",
    "top10": "shared highest 10 % (low: drift)",
    "centre_shift": "shift of the centre / diagonal",
}


class Picture(NamedTuple):
    """One cell of `figure_grid`: an image [1|3,H,W] or [H,W], a map [h,w], both in [0,1], or both.

    alpha: opacity of the map. boxes: a table of corners, drawn in green.
    """

    title: str = ""
    image: Tensor | np.ndarray | None = None
    heat: Tensor | np.ndarray | None = None
    alpha: float = 1.0
    boxes: pd.DataFrame | None = None


def figure_grid(lines: Sequence[tuple[str, Sequence[Picture]]], caption: str) -> Figure:
    """Pictures in lines of (label, pictures); a map that is zero everywhere is called so."""
    every = [picture for _, pictures in lines for picture in pictures]
    columns = max(len(pictures) for _, pictures in lines)
    tall, wide = next(np.shape(p.image)[-2:] for p in every if p.image is not None)
    side = min(2.2, WIDTH / (columns + 0.7))
    figure, axes = panels(columns, rows=len(lines))
    figure.suptitle(caption, fontsize=9)
    height = 0.5
    for line, (label, pictures) in zip(axes, lines, strict=True):
        line[0].set_ylabel(_wrapped(label, 18), fontsize=9, rotation=0, ha="right", va="center")
        titles = [_wrapped(picture.title, int(15 * side)) for picture in pictures]
        for axis, picture, title in zip(line, pictures, titles, strict=False):
            _show(axis, picture)
            zero = picture.heat is not None and not _array(picture.heat).max() > base.TINY
            axis.set_title(title + "\nzero map" * zero, fontsize=8)
        for axis in line:
            axis.set(xticks=[], yticks=[], frame_on=False)
        height += side * tall / wide + 0.15 * max(1 + title.count("\n") for title in titles)
    if any(picture.heat is not None for picture in every):
        shades = ScalarMappable(cmap=HEAT)
        bar = figure.colorbar(shades, ax=axes, location="bottom", shrink=0.3, aspect=40)
        bar.set_label("map: 0 to its own maximum", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        height += 0.5
    figure.set_size_inches(side * (columns + 0.7), height)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.03, hspace=0, wspace=0)
    return figure


def _show(axis: Axes, picture: Picture) -> None:
    place = {}
    if picture.image is not None:
        grey = _array(picture.image)
        grey = grey.mean(0) if grey.ndim == 3 else grey
        if not (grey.min() >= 0 and grey.max() <= 1.001):
            raise ValueError("images must lie in [0,1]: divide by their full scale first")
        axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
        # A map of another size covers the image all the same.
        place = {"extent": (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)}
    if picture.heat is not None:
        heat, look = _array(picture.heat), {"cmap": HEAT, "vmin": 0, "vmax": 1}
        axis.imshow(heat, alpha=picture.alpha, interpolation="bilinear", **look, **place)
    if picture.boxes is not None:
        for x1, y1, x2, y2 in picture.boxes[CORNERS].to_numpy(float):
            corner = (x1 - 0.5, y1 - 0.5)  # pixel i is drawn from i - 0.5 to i + 0.5
            axis.add_patch(Rectangle(corner, x2 - x1, y2 - y1, fill=False, color=TRUTH, lw=1.5))


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)


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
    """Per image [N,1|3,H,W] the input, then each method's map (name -> [N,H,W]) alone and over it.

    Images and maps (`Attribution.heat()`) lie in [0,1]. boxes: per image a table (`regions_of`).
    """
    lines, names = [], list(maps)
    for row, (image, text) in enumerate(zip(images, captions, strict=True)):
        own = None if boxes is None else boxes[row]
        for start in range(0, len(names), PAIRS):
            pictures = [Picture() if start else Picture("input", image, boxes=own)]
            for name in names[start : start + PAIRS]:
                heat = maps[name][row]
                pictures += [Picture(name, heat=heat), Picture("overlay", image, heat, 0.4, own)]
            lines.append(("" if start else text, pictures))
    return figure_grid(lines, caption)


def figure_groups(
    images: Tensor | np.ndarray,
    maps: Tensor | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    probabilities: Sequence[float] | np.ndarray,
    classes: Sequence[str],
    caption: str,
    *,
    per_group: int = 4,
) -> Figure:
    """Maps over images that a two-class model got right and wrong: a line each for TP, TN, FP and FN.

    images: [N,1|3,H,W], maps: [N,H,W], probabilities: of class 1, read above 0.5. A group shows its
    clearest cases: of the right answers those with the smallest error |probability - label|, of the wrong ones
    those with the largest. The heading names empty groups.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, float)
    error, read = np.abs(probabilities - labels), probabilities > 0.5
    lines, empty = [], []
    for name, label, positive in GROUPS:
        members = np.flatnonzero((labels == label) & (read == positive))
        order = error[members] if label == positive else -error[members]
        chosen = members[np.argsort(order, kind="stable")][:per_group]
        head = f"{name}s: {classes[label]} read as {classes[positive]}"
        if not len(members):
            empty.append(f"no {head}")
            continue
        pictures = [
            Picture(
                f"p {probabilities[row]:.3f}, error {error[row]:.3f}", images[row], maps[row], 0.4
            )
            for row in chosen
        ]
        lines.append((f"{head}\n{len(chosen)} of {len(members)} shown", pictures))
    return figure_grid(lines, "\n".join([caption, *empty]))


def figure_localisation(summary: pd.DataFrame, caption: str) -> Figure:
    """How well the maps find the finding: every score of `summarise` with its interval, a panel each.

    Maps that no model made are grey and come last; a dotted line stands at the random map's value.
    """
    names = [name for name in summary["map"].unique() if name not in base.REFERENCES]
    names += base.REFERENCES
    zero = summary.groupby("map")["zero_maps"].first()
    figure, axes = panels(len(PANELS), width=WIDTH / len(PANELS), height=1.5 + 0.3 * len(names))
    for axis, (score, title) in zip(axes[0], PANELS.items(), strict=True):
        table = summary[summary["score"].eq(score)].set_index("map").loc[names]
        colors = ["0.55" if name in base.REFERENCES else COLORS[0] for name in names]
        axis.hlines(range(len(names)), table["ci_low"], table["ci_high"], colors, lw=1.6)
        axis.scatter(table["value"], range(len(names)), s=25, c=colors, zorder=3)
        axis.axvline(table.loc["random", "value"], color="0.55", ls=":", lw=1)
        axis.set(
            title=title, ylim=(len(names) - 0.5, -0.5), yticks=range(len(names)), yticklabels=[]
        )
    axes[0, 0].set_yticklabels(
        [f"{name}\n({zero[name]} zero maps)" if zero[name] else name for name in names]
    )
    below = f"{summary['n'].iloc[0]} images with a finding; bars: intervals; grey: maps of no model"
    return _finish(figure, caption, below)


def figure_randomisation(tables: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Likeness to the intact model's map while layers lose their weights: tables of `localisation.sanity` by method.

    A dotted line of the method's colour: how alike its maps of different images are. A curve that stays far
    above it does not depend on the weights.
    """
    figure, axes = panels(2, width=4.4, height=3.2)
    titles = {"spearman": "rank correlation", "ssim": "structural similarity"}
    for axis, (score, title) in zip(axes[0], titles.items(), strict=True):
        for number, (name, table) in enumerate(tables.items()):
            other, look = table["down_to"].eq("another image"), line_style(number)
            steps = table[~other]
            zero = f" (up to {steps['zero'].max()} zero maps)" if steps["zero"].any() else ""
            axis.plot(steps["layers"], steps[score], ms=4, label=name + zero, **look)
            for level in table.loc[other, score]:
                axis.axhline(level, color=look["color"], ls=":", lw=1.2)
        axis.set(
            ylabel=title, ylim=(None, 1.05), title="1: the same map; dotted: another image's map"
        )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return _finish(figure, caption, "randomised layers, from the output down", legend=True)


# ------------------------------------------------------------------------------------------- drift


def figure_auc_lines(
    grid: Mapping[str, pd.DataFrame], caption: str, *, metric: str = "auc"
) -> Figure:
    """A metric over severity, a panel per corruption, one line a training with its interval as a band.

    grid: name of the training -> table of `corruption_error.grid`; its clean row begins every line.
    """
    names = [name for name in next(iter(grid.values()))["corruption"].unique() if name != CLEAN]
    columns = min(5, len(names))
    figure, axes = _panels(columns, -(-len(names) // columns), len(names))
    for axis, corruption in zip(axes.flat, names, strict=False):
        for number, (name, table) in enumerate(grid.items()):
            own = table[table["metric"].eq(metric) & table["corruption"].isin([CLEAN, corruption])]
            own, look = own.sort_values("severity"), line_style(number)
            axis.plot(own["severity"], own["value"], ms=3.5, lw=1.3, label=name, **look)
            band = own["severity"], own["ci_low"], own["ci_high"]
            axis.fill_between(*band, color=look["color"], alpha=0.15, lw=0)
        axis.set_title(_words(corruption))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[:, 0]:
        axis.set_ylabel(metric.upper())
    return _finish(figure, caption, "severity (0: clean); bands: intervals", legend=True)


def figure_drift(
    drift: Mapping[str, pd.DataFrame],
    caption: str,
    *,
    score: str = "rmse",
    method: str = "gradcam++",
) -> Figure:
    """Drift against depth: a line of panels per training, a panel per severity, one line a corruption.

    drift: name of the training -> second table of `drift.measure`. Dotted grey: the same image twice (the
    floor). Dashed grey: random pairs of images (the ceiling), with the band of their middle half.
    """
    severities = sorted(set(next(iter(drift.values()))["severity"]) - {0})
    figure, axes = _panels(len(severities), len(drift), len(severities) * len(drift), height=2.4)
    for line, (training, table) in zip(axes, drift.items(), strict=True):
        own = table[table["method"].eq(method)]
        layers = list(own["layer"].unique())
        parts = own.groupby(["corruption", "severity", "layer"], sort=False)[score]
        means = parts.mean().unstack("layer")[layers]
        for axis, severity in zip(line, severities, strict=True):
            at = means.drop([FLOOR, CEILING]).xs(severity, level="severity")
            for number, (name, values) in enumerate(at.iterrows()):
                axis.plot(layers, values, ms=3.5, lw=1.2, label=_words(name), **line_style(number))
            axis.plot(layers, means.loc[FLOOR, 0], color="0.5", ls=":", label="floor: same image")
            axis.plot(
                layers, means.loc[CEILING, 0], color="0.5", ls="--", label="ceiling: random pairs"
            )
            low, high = (parts.quantile(q)[CEILING, 0][layers] for q in (0.25, 0.75))
            axis.fill_between(
                layers, low, high, color="0.5", alpha=0.15, lw=0, label="their middle half"
            )
            axis.set_title(f"{training}, severity {severity}")
            axis.tick_params(axis="x", rotation=60)
        line[0].set_ylabel(SCORES[score])
    return _finish(figure, f"{method}, {caption}", "layer, from shallow to deep", legend=True)


def figure_scatter(
    grid: Mapping[str, pd.DataFrame],
    drift: Mapping[str, pd.DataFrame],
    caption: str,
    *,
    metric: str = "auc",
    score: str = "rmse",
    method: str = "gradcam++",
) -> Figure:
    """The drop of a metric against the mean drift over layers and images: a point per corruption and severity.

    Not one per image: images of one cell share its drop, and would pass for many witnesses of the same thing.
    A panel per training; grid: tables of `corruption_error.grid`. Lines join the severities of a corruption.
    """
    figure, axes = _panels(len(drift), 1, len(drift), height=3.4)
    for axis, (name, table) in zip(axes[0], drift.items(), strict=True):
        own = table[table["method"].eq(method)].groupby(["corruption", "severity"], sort=False)
        drops = grid[name][grid[name]["metric"].eq(metric)].set_index(["corruption", "severity"])
        cells = drops[["drop"]].join(own[score].mean(), how="inner").drop(CLEAN, errors="ignore")
        for number, (corruption, part) in enumerate(cells.groupby("corruption", sort=False)):
            look = line_style(number) | {"ls": "-"}
            axis.plot(part[score], part["drop"], lw=0.7, ms=0, alpha=0.5, **look)
            size = 12 + 14 * part.index.get_level_values("severity")
            options = {
                "color": look["color"],
                "marker": look["marker"],
                "label": _words(corruption),
            }
            axis.scatter(part[score], part["drop"], s=size, alpha=0.85, lw=0, **options)
        axis.axhline(0, color="0.6", lw=0.8)
        varied = cells.nunique().min() > 1
        rank = spearmanr(cells[score], cells["drop"]).statistic if varied else np.nan
        axis.set(
            title=f"{name}: Spearman {rank:+.2f} over {len(cells)} cells",
            xlabel=f"mean {SCORES[score]}",
        )
    axes[0, 0].set_ylabel(f"drop of {metric.upper()}, clean minus corrupted")
    return _finish(figure, f"{method}, {caption}", "larger marks: higher severity", legend=True)


def figure_kept_flipped(
    predictions: pd.DataFrame,
    drift: pd.DataFrame,
    caption: str,
    *,
    score: str,
    method: str,
    layer: str,
) -> Figure:
    """Drift where the corruption left the answer as it was, beside drift where it turned it; tables of `drift.measure`.

    An image counts once in a box, with its mean over the severities of that box; below stand how many
    images a box has. The last pair, "all", is the mean over corruptions too. Boxes: quartiles and median; whiskers: 5 to 95 %.
    """
    own = drift[drift["method"].eq(method) & drift["layer"].eq(layer) & drift["severity"].gt(0)]
    clean = predictions[predictions["corruption"].eq(CLEAN)].set_index("image")["predicted"]
    own = own.merge(predictions[["image", "corruption", "severity", "predicted"]])
    own = own.assign(flipped=own["predicted"].ne(own["image"].map(clean)))
    parts = {**dict(iter(own.groupby("corruption", sort=False))), "all": own}
    figure, axes = _panels(1, 1, 1, height=3.0)
    labels = []
    for place, (name, part) in enumerate(parts.items()):
        counts = []
        for shift, flipped in ((-0.2, False), (0.2, True)):
            values = part[part["flipped"].eq(flipped)].groupby("image")[score].mean().dropna()
            counts.append(len(values))
            if len(values):
                _box(axes[0, 0], values, place + shift, COLORS[int(flipped)])
        labels.append(f"{_words(name)}\n{counts[0]} | {counts[1]}")
    axes[0, 0].set_xticks(range(len(parts)), labels)
    axes[0, 0].set_ylabel(SCORES[score])
    looks = zip(COLORS, ("answer kept", "answer turned"), strict=False)
    handles = [Patch(color=color, alpha=0.55, label=label) for color, label in looks]
    axes[0, 0].legend(handles=handles, fontsize=8, frameon=False)
    return _finish(figure, f"{method}, {layer}, {caption}", "images with an answer kept | turned")


def _box(axis: Axes, values: pd.Series, place: float, color: str) -> None:
    options = {"whis": (5, 95), "showfliers": False, "patch_artist": True, "manage_ticks": False}
    looks = {"boxprops": {"facecolor": color, "alpha": 0.55}, "medianprops": {"color": "black"}}
    axis.boxplot(values.to_numpy(), positions=[place], widths=0.32, **options, **looks)


def figure_warning(
    tables: Mapping[str, pd.DataFrame], caption: str, *, outcome: str = "error"
) -> Figure:
    """How well each score tells which answers go wrong: AUROC with intervals, a panel per reading, a mark a training.

    tables: name of the training -> table of `warning.warning`. What lies left of the dotted 0.5 warns worse than a coin.
    """
    parts = [t[t["outcome"].eq(outcome) & t["metric"].eq("auroc")] for t in tables.values()]
    every = pd.concat(parts)
    readings, predictors = (list(every[name].unique()) for name in ("reading", "predictor"))
    figure, axes = _panels(len(readings), 1, len(readings), height=1.4 + 0.3 * len(predictors))
    for axis, reading in zip(axes[0], readings, strict=True):
        for number, (name, part) in enumerate(zip(tables, parts, strict=True)):
            own, look = part[part["reading"].eq(reading)], line_style(number)
            place = own["predictor"].map(predictors.index) + 0.2 * (number - (len(parts) - 1) / 2)
            axis.hlines(place, own["ci_low"], own["ci_high"], look["color"], lw=1.4)
            label = f"{name}: {own['events'].iloc[0]} of {own['copies'].iloc[0]} copies"
            axis.plot(own["value"], place, ms=4, label=label, **look | {"ls": ""})
        axis.axvline(0.5, color="0.4", ls=":", lw=1.2)
        axis.set(
            title=reading, xlabel=f"AUROC for {_words(outcome)}", ylim=(len(predictors) - 0.5, -0.5)
        )
        axis.set_yticks(range(len(predictors)), predictors)
    return _finish(
        figure, caption, f"bars: intervals by patient; {every['n'].max()} images", legend=True
    )


# ------------------------------------------------------------------------------------------- parts


def _panels(
    columns: int, rows: int, used: int, *, height: float = 1.9
) -> tuple[Figure, np.ndarray]:
    """Panels with common axes; those that are not used are left empty."""
    figure, axes = panels(columns, rows=rows, width=WIDTH / max(columns, 2), height=height)
    for axis in axes.flat[1:]:
        axis.sharey(axes[0, 0])
    for axis in axes.flat[used:]:
        axis.axis("off")
    return figure, axes


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def _finish(figure: Figure, caption: str, below: str, *, legend: bool = False) -> Figure:
    """Small type, a light grid, heading, remark and legend under the panels."""
    for axis in figure.axes:
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            text.set_fontsize(9)
    figure.suptitle(caption, fontsize=9)
    figure.supxlabel(below, fontsize=8)
    figure.set_layout_engine("constrained")
    if legend:
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure
