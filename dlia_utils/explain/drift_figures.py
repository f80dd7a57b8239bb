"""Figures of corruptions and of what they do to maps: films, maps, drift over severity and depth, and warnings.

`predictions` and `drift` are the tables of `drift.measure`, `grid` that of `corruption_error.grid`, each of one model.
Where both trainings stand side by side, a mapping of the name of a training to its table is wanted. Every point and
box counts an image once.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr
from torch import Tensor

from .. import corrupt
from ..corruption_error import CLEAN
from ..detect.figures import _need
from ..plots import COLORS, line_style, panels
from . import base as s
from .drift import CEILING, FLOOR, INPUT, SIGN
from .figures import HEAT, _films

WIDTH = 10.0  # inches
ENTRY = 2.0  # of a legend, inches
SCORES = {  # those of drift.SIGN, as axes call them
    "rmse": "RMSE of scaled maps (0-255)",
    "rmse_raw": "RMSE of raw maps",
    "ssim": "structural similarity (low: drift)",
    "spearman": "rank correlation (low: drift)",
    "top10": "shared highest 10 % (low: drift)",
    "centre_shift": "shift of the centre / diagonal",
}


# ------------------------------------------------------------------------------------------- films and maps


def figure_corruptions(
    image: Tensor,
    caption: str,
    *,
    names: Sequence[str] = corrupt.THESIS,
    severities: Sequence[int] = corrupt.SEVERITIES,
    seed: int = 0,
    row: int = 0,
    scale: str = "imagenet-c",
) -> Figure:
    """One film under every corruption: a line each, clean at the left, then the severities.

    image: [1|3,H,W] in [0,1]; row: its row in the manifest, on which its noise depends; seed, scale: as
    `corrupt.apply`, whose errors it raises.
    """
    if image.ndim != 3:
        raise ValueError(
            f"image must be one film [1|3,H,W], not {list(image.shape)}: pass images[i]"
        )
    columns = 1 + len(severities)
    figure, axes = _picture_grid(len(names), columns, image.shape[1:])
    for line, name in zip(axes, names, strict=True):
        _row_label(line[0], _words(name))
        for axis, severity in zip(line, (0, *severities), strict=True):
            film = corrupt.apply(name, image[None], severity, seed=seed, ids=[row], scale=scale)
            axis.imshow(_films(film)[0], cmap="gray", vmin=0, vmax=1)
    for axis, severity in zip(axes[0], (0, *severities), strict=True):
        axis.set_title(f"severity {severity}" if severity else "clean", fontsize=9)
    return _finish_pictures(figure, caption, f"scale {scale}")


def figure_maps(
    images: Mapping[str, Tensor | np.ndarray],
    maps: Mapping[str, Mapping[str, Tensor | np.ndarray]],
    caption: str,
    *,
    answers: Mapping[str, tuple[str, float]] | None = None,
    scores: pd.DataFrame | None = None,
    alpha: float = 0.5,
    told: str = "",
) -> Figure:
    """One film clean and corrupted, a line each, and its map at each layer over it.

    images: name of the line ("clean", "contrast") -> film [1|3,H,W] or [H,W] in [0,1]. maps: the same names ->
    layer -> map [h,w] of any size; each is scaled from its own minimum to its own maximum, as the RMSE of scaled
    maps is. answers: name -> class read and its probability. scores: name x layer table of numbers for the
    corners, such as drift.pivot(index="corruption", columns="layer", values="rmse"); it may lack lines. alpha:
    share of the map in the picture, 1 for the map alone. told: said in the heading. Errors: ValueError for lines
    or layers that differ.
    """
    names = list(images)
    if not names or list(maps) != names:
        raise ValueError(
            f"maps has the lines {list(maps)}, images {names}: give one entry of each per line"
        )
    layers = list(maps[names[0]])
    if odd := [name for name in names if list(maps[name]) != layers]:
        raise ValueError(
            f"the maps of {odd} have other layers than those of {names[0]!r}: {layers}"
        )
    films = {name: _film(image) for name, image in images.items()}
    figure, axes = _picture_grid(len(names), 1 + len(layers), next(iter(films.values())).shape)
    for line, (name, film) in zip(axes, films.items(), strict=True):
        read = "\n{}\n{:.3f}".format(*answers[name]) if answers else ""
        _row_label(line[0], _words(name) + read)
        line[0].imshow(film, cmap="gray", vmin=0, vmax=1)
        for axis, layer in zip(line[1:], layers, strict=True):
            axis.imshow(film, cmap="gray", vmin=0, vmax=1)
            heat, remark = _scaled(maps[name][layer])
            height, width = film.shape
            # The corner pixels of a coarse map reach to the edges of the film.
            place = (-0.5, width - 0.5, height - 0.5, -0.5)
            axis.imshow(
                heat, cmap=HEAT, vmin=0, vmax=1, alpha=alpha, extent=place, interpolation="bilinear"
            )
            if scores is not None and name in scores.index and layer in scores.columns:
                _corner(axis, f"{scores.loc[name, layer]:.3g}", 0.04)
            if remark:
                _corner(axis, remark, 0.8)
    for axis, title in zip(axes[0], ["film", *map(_words, layers)], strict=True):
        axis.set_title(title, fontsize=8)
    return _finish_pictures(figure, caption, told)


# ------------------------------------------------------------------------------------------- drift


def figure_rmse_lines(
    drift: pd.DataFrame,
    caption: str,
    *,
    by: str = "layer",
    score: str = "rmse",
    method: str = "gradcam++",
    told: str = "",
) -> Figure:
    """Drift over severity, one line a corruption: the mean over the images, in small panels.

    by: "layer" for the layers of `method`, or "method" for all methods, each at its deepest layer (the last one
    in the table). Dotted grey: the same image twice (the floor). Dashed grey: random pairs of images (the
    ceiling), with the band of their middle half. told: said in the heading. Errors: ValueError for a missing
    column or method.
    """
    _check_drift(drift, "drift", score)
    if by not in ("layer", "method"):
        raise ValueError(f'by must be "layer" or "method", not {by!r}')
    if by == "layer":
        own = _of(drift, "drift", method=method)
        parts = {_words(layer): own[own["layer"].eq(layer)] for layer in own["layer"].unique()}
    else:
        parts = {}
        for name, own in drift.groupby("method", sort=False):
            layer = own["layer"].unique()[-1]
            parts[name if layer == INPUT else f"{name}, {_words(layer)}"] = own[
                own["layer"].eq(layer)
            ]
    columns = min(4, len(parts))
    rows = -(-len(parts) // columns)
    figure, axes = panels(
        columns, rows=rows, width=WIDTH / columns, height=1.9 if rows > 1 else 2.4
    )
    names = _corruptions(drift)
    for axis, (title, part) in zip(axes.flat, parts.items(), strict=False):
        _reference_lines(axis, part, score)
        means = _means(part, score)
        for number, name in enumerate(names):
            line = means[means["corruption"].eq(name)].sort_values("severity")
            axis.plot(line["severity"], line[score], ms=3.5, lw=1.2, **line_style(number))
        axis.set_title(title)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
    if score != "rmse_raw" and by == "layer":
        _share(axes.flat[: len(parts)], "y")
    for axis in axes.flat[len(parts) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel(_wrapped(SCORES[score], 20), fontsize=8)
    handles = [
        Line2D([], [], ms=3.5, lw=1.2, label=_words(name), **line_style(n))
        for n, name in enumerate(names)
    ]
    told = told or (method if by == "layer" else "")
    return _finish_panels(figure, caption, told, "severity", handles + _reference_handles(drift))


def figure_layers(
    drift: Mapping[str, pd.DataFrame],
    caption: str,
    *,
    severity: int = 5,
    score: str = "rmse",
    method: str = "gradcam++",
) -> Figure:
    """Drift against depth at one severity: layers across, one line a corruption, a panel per training.

    Layers stand in the order of the table. Grey as in `figure_rmse_lines`. Errors: ValueError for a missing
    column, method or severity.
    """
    tables = {}
    for name, table in drift.items():
        _check_drift(table, f"drift[{name!r}]", score)
        tables[name] = _of(table, f"drift[{name!r}]", method=method)
    figure, axes = panels(len(tables), width=WIDTH / max(len(tables), 1.5), height=3.2)
    names = _union(_corruptions(table) for table in tables.values())
    for axis, (title, table) in zip(axes[0], tables.items(), strict=True):
        layers = list(table["layer"].unique())
        for reference, line in ((FLOOR, ":"), (CEILING, "--")):
            own = table[table["corruption"].eq(reference)].groupby("layer")[score].mean()
            if len(own):
                axis.plot(range(len(layers)), own.reindex(layers), line, color="0.5", lw=1.2)
        at = _of(table, f"drift[{title!r}]", severity=severity)
        for number, name in enumerate(names):
            own = at[at["corruption"].eq(name)].groupby("layer")[score].mean()
            axis.plot(range(len(layers)), own.reindex(layers), ms=4, lw=1.3, **line_style(number))
        axis.set_xticks(
            range(len(layers)), map(_words, layers), rotation=40, ha="right", fontsize=8
        )
        axis.set_title(title)
        axis.grid(alpha=0.25)
    _share(axes[0], "y")
    axes[0, 0].set_ylabel(SCORES[score], fontsize=9)
    handles = [
        Line2D([], [], ms=4, lw=1.3, label=_words(name), **line_style(n))
        for n, name in enumerate(names)
    ]
    handles += _reference_handles(pd.concat(tables.values()), band=False)
    return _finish_panels(
        figure, caption, f"{method}, severity {severity}", "layer, from shallow to deep", handles
    )


def figure_scatter(
    grid: Mapping[str, pd.DataFrame],
    drift: Mapping[str, pd.DataFrame],
    caption: str,
    *,
    metric: str = "auc",
    score: str = "rmse",
    method: str = "gradcam++",
    layer: str | None = None,
) -> Figure:
    """The drop of a metric against the mean drift: one point per corruption and severity, a panel per training.

    Not one per image: images of one cell share its drop, and would pass for many witnesses of the same thing.
    grid: name of the training -> table with columns corruption, severity, metric and drop (clean minus
    corrupted). layer: of `method`; by default the mean over its layers. The title has the rank correlation over
    the cells. Lines join the severities of a corruption. Errors: ValueError for missing columns, methods, layers,
    metrics or different trainings.
    """
    _same_trainings(grid, drift)
    figure, axes = panels(len(drift), width=WIDTH / max(len(drift), 1.5), height=3.6)
    names = _union(_corruptions(table) for table in drift.values())
    for axis, name in zip(axes[0], drift, strict=True):
        cells = _cells(grid[name], drift[name], name, metric, score, method, layer)
        for number, corruption in enumerate(names):
            own = cells[cells["corruption"].eq(corruption)].sort_values("severity")
            look = line_style(number)
            axis.plot(own[score], own["drop"], color=look["color"], lw=0.7, alpha=0.5)
            sizes = 12 + 14 * own["severity"]
            axis.scatter(
                own[score],
                own["drop"],
                s=sizes,
                color=look["color"],
                marker=look["marker"],
                alpha=0.85,
                lw=0,
            )
        axis.axhline(0, color="0.6", lw=0.8)
        axis.set_title(f"{name}: {_correlation(cells[score], cells['drop'])}")
        axis.set_xlabel(f"mean {SCORES[score]}", fontsize=9)
        axis.grid(alpha=0.25)
    _share(axes[0], "y")
    axes[0, 0].set_ylabel(f"drop of {_called(metric)}, clean minus corrupted", fontsize=9)
    looks = [line_style(number) for number in range(len(names))]
    handles = [
        Line2D([], [], ls="", ms=6, label=_words(name), color=look["color"], marker=look["marker"])
        for name, look in zip(names, looks, strict=True)
    ]
    levels = sorted({level for table in drift.values() for level in table["severity"]} - {0})
    ends = dict.fromkeys([levels[0], levels[-1]])
    handles += [
        Line2D(
            [],
            [],
            ls="",
            marker="o",
            color="0.6",
            ms=math.sqrt(12 + 14 * level),
            label=f"severity {level}",
        )
        for level in ends
    ]
    return _finish_panels(figure, caption, _named(method, layer), "", handles)


def figure_box(
    grid: pd.DataFrame,
    drift: pd.DataFrame,
    caption: str,
    *,
    by: str = "severity",
    metric: str = "auc",
    score: str = "rmse",
    method: str = "gradcam++",
    layer: str | None = None,
    told: str = "",
) -> Figure:
    """Boxes of every image's drift, and below them the drop of a metric with its interval.

    by: "severity" for a panel per severity with the corruptions across, "corruption" for the opposite. Boxes:
    quartiles and median; whiskers: 5 to 95 %. grid: as for `figure_scatter`, with drop_low and drop_high. layer:
    of `method`; by default the mean over its layers. told: said in the heading. Errors: ValueError for missing
    columns, methods, layers or metrics.
    """
    if by not in ("severity", "corruption"):
        raise ValueError(f'by must be "severity" or "corruption", not {by!r}')
    _need(grid, "grid", "drop_low", "drop_high")
    drops = _drops(grid, "grid", metric).set_index(["corruption", "severity"])
    values = _per_image(drift, "drift", score, method, layer)
    names, levels = _corruptions(values), sorted(set(values["severity"]) - {0})
    panels, inside = (levels, names) if by == "severity" else (names, levels)
    # A rotated name needs 0.2 inches.
    columns = min(5, len(panels), max(1, int(WIDTH / (0.6 + 0.2 * len(inside)))))
    lines = -(-len(panels) // columns)
    figure, axes = panels(columns, rows=2 * lines, width=WIDTH / columns, height=1.8)
    for axis in axes.flat:
        axis.axis("off")
    for number, panel in enumerate(panels):
        line, column = divmod(number, columns)
        above, below = axes[2 * line, column], axes[2 * line + 1, column]
        for axis in (above, below):
            axis.axis("on")
            axis.grid(axis="y", alpha=0.25)
        for place, key in enumerate(inside):
            cell = (key, panel) if by == "severity" else (panel, key)
            color = COLORS[names.index(cell[0]) % len(COLORS)]
            own = values[values["corruption"].eq(cell[0]) & values["severity"].eq(cell[1])][
                score
            ].dropna()
            if len(own):
                _box(above, own, place, color)
            if cell in drops.index:
                drop = drops.loc[cell]
                below.plot([place] * 2, [drop["drop_low"], drop["drop_high"]], color=color, lw=1.6)
                below.plot(place, drop["drop"], "o", color=color, ms=4)
        below.axhline(0, color="0.6", lw=0.8)
        above.set_title(f"severity {panel}" if by == "severity" else _words(panel))
        above.set_xticks(range(len(inside)), [])
        below.set_xticks(range(len(inside)), map(_words, inside), fontsize=8)
        if by == "severity":
            below.tick_params(axis="x", rotation=55)
            for text in below.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
        for axis in (above, below):
            axis.set_xlim(-0.6, len(inside) - 0.4)
    used = [axis for axis in axes.flat if axis.axison]
    _share([axis for axis in used if axis in axes[0::2]], "y")
    _share([axis for axis in used if axis in axes[1::2]], "y")
    for line in range(lines):
        axes[2 * line, 0].set_ylabel(_wrapped(SCORES[score], 20), fontsize=8)
        axes[2 * line + 1, 0].set_ylabel(f"drop of {_called(metric)}", fontsize=8)
    told = ", ".join(part for part in (told, _named(method, layer)) if part)
    below = "boxes: images (quartiles; whiskers 5 to 95 %); points: drop with its interval"
    return _finish_panels(
        figure, caption, told, f"{'severity; ' if by == 'corruption' else ''}{below}", []
    )


def figure_kept_flipped(
    predictions: pd.DataFrame,
    drift: pd.DataFrame,
    caption: str,
    *,
    score: str = "rmse",
    method: str = "gradcam++",
    layer: str | None = None,
    severity: int | None = None,
    told: str = "",
) -> Figure:
    """Drift where the corruption left the prediction as it was, beside drift where it turned it.

    predictions: columns image, corruption ("clean" or a name), severity, predicted. An image counts once in a box,
    with its mean over the severities of that box; below stand how many images a box has. The last pair, "all", is
    the mean over corruptions too. Boxes as in `figure_box`. layer: of `method`; by default the mean over its
    layers. severity: one of them alone; over all of them, flipped means severe as well, and severity drives drift.
    Errors: ValueError for missing columns, methods, layers or severities, and drift of images that have no
    prediction.
    """
    _need(predictions, "predictions", "image", "corruption", "severity", "predicted")
    values = _per_image(drift, "drift", score, method, layer)
    values = values[~values["corruption"].isin([FLOOR, CEILING])]
    values = values if severity is None else _of(values, "drift", severity=severity)
    clean = predictions[predictions["corruption"].eq(CLEAN)].set_index("image")["predicted"]
    values = values.merge(predictions[["image", "corruption", "severity", "predicted"]], how="left")
    values = values.assign(clean=values["image"].map(clean))
    if values[["clean", "predicted"]].isna().any(axis=None):
        lost = values[values[["clean", "predicted"]].isna().any(axis=1)].iloc[0]
        raise ValueError(
            f"predictions lacks image {lost['image']}, clean or under {lost['corruption']} at severity "
            f"{lost['severity']}, which drift has"
        )
    values = values.assign(flipped=values["predicted"].ne(values["clean"]))
    names = [*_corruptions(values), "all"]
    figure, axes = panels(1, width=WIDTH, height=3.3)
    axis, counts = axes[0, 0], []
    for place, name in enumerate(names):
        part = values if name == "all" else values[values["corruption"].eq(name)]
        numbers = []
        for shift, flipped, color in ((-0.2, False, COLORS[0]), (0.2, True, COLORS[1])):
            own = part[part["flipped"].eq(flipped)].groupby("image")[score].mean().dropna()
            numbers.append(str(len(own)))
            if len(own):
                _box(axis, own, place + shift, color, width=0.32)
        counts.append(f"{_words(name)}\n{' | '.join(numbers)}")
    many = len(names) > 8
    axis.set_xticks(
        range(len(names)),
        counts,
        rotation=35 if many else 0,
        ha="right" if many else "center",
        fontsize=8,
    )
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.axvline(len(names) - 1.5, color="0.8", lw=0.8)
    axis.set_ylabel(SCORES[score], fontsize=9)
    axis.grid(axis="y", alpha=0.25)
    handles = [
        Patch(color=color, alpha=0.55, label=f"prediction {word}")
        for color, word in ((COLORS[0], "kept"), (COLORS[1], "flipped"))
    ]
    at = "" if severity is None else f"severity {severity}"
    told = ", ".join(part for part in (told, _named(method, layer), at) if part)
    return _finish_panels(figure, caption, told, "images with a prediction kept | flipped", handles)


# ------------------------------------------------------------------------------------------- answers


def figure_auc_lines(
    grid: Mapping[str, pd.DataFrame], caption: str, *, metric: str = "auc"
) -> Figure:
    """A metric over severity, a panel per corruption, one line a training with its interval as a band.

    grid: name of the training -> table with columns corruption, severity, metric, value, ci_low, ci_high. The
    row of corruption "clean" begins every line. Errors: ValueError for a missing column or metric.
    """
    tables = {}
    for name, table in grid.items():
        _need(
            table,
            f"grid[{name!r}]",
            "corruption",
            "severity",
            "metric",
            "value",
            "ci_low",
            "ci_high",
        )
        tables[name] = _of(table, f"grid[{name!r}]", metric=metric)
    names = _union(_corruptions(table) for table in tables.values())
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure, axes = panels(
        columns, rows=rows, width=WIDTH / columns, height=1.9 if rows > 1 else 2.4
    )
    for axis, corruption in zip(axes.flat, names, strict=False):
        for number, table in enumerate(tables.values()):
            line = table[table["corruption"].isin([CLEAN, corruption])].sort_values("severity")
            look = line_style(number)
            axis.plot(line["severity"], line["value"], ms=3.5, lw=1.3, **look)
            band = line["ci_low"].to_numpy(float), line["ci_high"].to_numpy(float)
            axis.fill_between(line["severity"], *band, color=look["color"], alpha=0.15, lw=0)
        axis.set_title(_words(corruption))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
    _share(axes.flat[: len(names)], "y")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel(_called(metric), fontsize=9)
    handles = [
        Line2D([], [], ms=3.5, lw=1.3, label=name, **line_style(n)) for n, name in enumerate(tables)
    ]
    return _finish_panels(figure, caption, "", "severity (0: clean); bands: intervals", handles)


def figure_warning(
    tables: Mapping[str, pd.DataFrame],
    caption: str,
    *,
    outcome: str = "error",
    metric: str = "auroc",
) -> Figure:
    """How well each score tells which answers go wrong, with intervals: a panel per reading, one mark a training.

    tables: name of the training -> table of `warning.warning` (columns predictor, outcome, reading, metric, value,
    ci_low, ci_high, n, copies, events). metric: "auroc", whose dotted line stands at 0.5: what lies left of it
    warns worse than a coin; others of the table have theirs at 0. Errors: ValueError for a missing column, or an
    outcome or metric that a table lacks.
    """
    parts = {}
    for name, table in tables.items():
        _need(
            table,
            f"tables[{name!r}]",
            "predictor",
            "outcome",
            "reading",
            "metric",
            "value",
            "ci_low",
            "ci_high",
            "n",
            "copies",
            "events",
        )
        parts[name] = _of(
            _of(table, f"tables[{name!r}]", outcome=outcome), f"tables[{name!r}]", metric=metric
        )
    readings = _union(part["reading"] for part in parts.values())
    predictors = _union(part["predictor"] for part in parts.values())
    figure, axes = panels(
        len(readings), width=WIDTH / len(readings), height=1.4 + 0.3 * len(predictors)
    )
    for axis, reading in zip(axes[0], readings, strict=True):
        for number, part in enumerate(parts.values()):
            own, look = part[part["reading"].eq(reading)], line_style(number) | {"ls": ""}
            for _, row in own.iterrows():
                place = predictors.index(row["predictor"]) + 0.26 * (number - (len(parts) - 1) / 2)
                axis.plot([row["ci_low"], row["ci_high"]], [place] * 2, color=look["color"], lw=1.6)
                axis.plot(row["value"], place, ms=5, **look)
        axis.axvline(0.5 if metric == "auroc" else 0, color="0.4", ls=":", lw=1.2)
        axis.set_title(str(reading))
        axis.set_xlabel(f"{_called(metric)} for {_words(outcome)}", fontsize=9)
        axis.set_ylim(len(predictors) - 0.5, -0.5)
        axis.set_yticks(range(len(predictors)), [])
        axis.grid(axis="x", alpha=0.25)
        for place in range(len(predictors) - 1):
            axis.axhline(place + 0.5, color="0.9", lw=0.6)
    axes[0, 0].set_yticks(range(len(predictors)), predictors, fontsize=8)
    _share(axes[0], "x")
    images = sorted({int(n) for part in parts.values() for n in part["n"]})
    below = f"bars: intervals by patient; {' or '.join(map(str, images))} images"
    handles = []
    for number, (name, part) in enumerate(parts.items()):
        events, copies = part[["events", "copies"]].iloc[0]
        label = f"{name}: {events} of {copies} copies"
        handles.append(Line2D([], [], ms=5, label=label, **line_style(number) | {"ls": "-"}))
    return _finish_panels(figure, caption, "", below, handles)


# ------------------------------------------------------------------------------------------- numbers


def _check_drift(drift: pd.DataFrame, name: str, score: str) -> None:
    if score not in SIGN:
        raise ValueError(f"score must be one of {', '.join(SIGN)}, not {score!r}")
    _need(drift, name, "image", "corruption", "severity", "method", "layer", score)


def _of(table: pd.DataFrame, name: str, **wanted: str | int) -> pd.DataFrame:
    """The rows that have the value of one column."""
    ((column, value),) = wanted.items()
    own = table[table[column].eq(value)]
    if own.empty:
        had = ", ".join(map(repr, table[column].unique().tolist()))
        raise ValueError(f"{name} has no {column} {value!r}, only {had}: choose with {column}=")
    return own


def _drops(grid: pd.DataFrame, name: str, metric: str) -> pd.DataFrame:
    _need(grid, name, "corruption", "severity", "metric", "drop")
    own = _of(grid, name, metric=metric)
    return own[own["corruption"].ne(CLEAN)]


def _per_image(
    drift: pd.DataFrame, name: str, score: str, method: str, layer: str | None
) -> pd.DataFrame:
    """One row per image, corruption and severity: the score at `layer`, or its mean over the layers."""
    _check_drift(drift, name, score)
    own = _of(drift, name, method=method)
    own = own if layer is None else _of(own, name, layer=layer)
    return own.groupby(["image", "corruption", "severity"], sort=False)[score].mean().reset_index()


def _means(drift: pd.DataFrame, score: str) -> pd.DataFrame:
    return drift.groupby(["corruption", "severity"], sort=False)[score].mean().reset_index()


def _cells(
    grid: pd.DataFrame,
    drift: pd.DataFrame,
    name: str,
    metric: str,
    score: str,
    method: str,
    layer: str | None,
) -> pd.DataFrame:
    """Mean drift and drop of every (corruption, severity) that both tables have."""
    means = _means(_per_image(drift, f"drift[{name!r}]", score, method, layer), score)
    drops = _drops(grid, f"grid[{name!r}]", metric)[["corruption", "severity", "drop"]]
    cells = means.merge(drops, on=["corruption", "severity"])
    if cells.empty:
        raise ValueError(
            f"drift and grid of {name!r} share no corruption and severity: take both from one run"
        )
    return cells


def _correlation(x: pd.Series, y: pd.Series) -> str:
    told = x.notna() & y.notna()
    if told.sum() < 3 or x[told].nunique() < 2 or y[told].nunique() < 2:
        return f"no rank correlation from {told.sum()} cells"
    return f"Spearman {spearmanr(x[told], y[told]).statistic:+.2f} over {told.sum()} cells"


def _corruptions(table: pd.DataFrame) -> list[str]:
    """Names of the corruptions in the order of the table."""
    return [name for name in table["corruption"].unique() if name not in (CLEAN, FLOOR, CEILING)]


def _union(lists) -> list:
    return list(dict.fromkeys(one for these in lists for one in these))


def _same_trainings(grid: Mapping, drift: Mapping) -> None:
    if list(grid) != list(drift) or not drift:
        raise ValueError(
            f"grid has the trainings {list(grid)}, drift {list(drift)}: give one table of each"
        )


# ------------------------------------------------------------------------------------------- parts


def _words(name: str) -> str:
    return str(name) if str(name).startswith("layer") else str(name).replace("_", " ")


def _called(metric: str) -> str:
    return metric.upper() if metric in ("auc", "auroc") else _words(metric)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _named(method: str, layer: str | None) -> str:
    return method if layer is None or layer == INPUT else f"{method}, {_words(layer)}"


def _film(image: Tensor | np.ndarray) -> np.ndarray:
    """One grey film [H,W]."""
    image = image[None] if image.ndim == 2 else image
    return _films(image[None])[0]


def _scaled(heat: Tensor | np.ndarray) -> tuple[np.ndarray, str]:
    """A map from its own minimum (0) to its own maximum (1), and what to say of one that cannot be scaled."""
    heat = np.asarray(heat.detach().cpu() if isinstance(heat, Tensor) else heat, dtype=float)
    if heat.ndim != 2:
        raise ValueError(f"a map must be [h,w], not {list(heat.shape)}")
    low, high = heat.min(), heat.max()
    if high - low <= s.TINY:
        return np.zeros_like(heat), "flat map" if abs(high) > s.TINY else "zero map"
    return (heat - low) / (high - low), ""


def _reference_lines(axis: Axes, part: pd.DataFrame, score: str) -> None:
    """Floor and ceiling in grey, the ceiling with the middle half of its pairs."""
    floor, ceiling = (
        part.loc[part["corruption"].eq(name), score].dropna() for name in (FLOOR, CEILING)
    )
    if len(floor):
        axis.axhline(floor.mean(), color="0.5", ls=":", lw=1.2)
    if len(ceiling):
        axis.axhspan(*ceiling.quantile([0.25, 0.75]), color="0.5", alpha=0.15, lw=0)
        axis.axhline(ceiling.mean(), color="0.5", ls="--", lw=1.2)


def _reference_handles(drift: pd.DataFrame, *, band: bool = True) -> list:
    had = set(drift["corruption"])
    handles = [Line2D([], [], color="0.5", ls=":", lw=1.2, label="floor: same image")] * (
        FLOOR in had
    )
    ceiling = [Line2D([], [], color="0.5", ls="--", lw=1.2, label="ceiling: random pairs")]
    ceiling += [Patch(color="0.5", alpha=0.15, lw=0, label="their middle half")] * band
    return handles + ceiling * (CEILING in had)


def _box(axis: Axes, values: pd.Series, place: float, color: str, *, width: float = 0.6) -> None:
    axis.boxplot(
        values.to_numpy(),
        positions=[place],
        widths=width,
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        manage_ticks=False,
        boxprops={"facecolor": color, "alpha": 0.55, "lw": 0.8},
        medianprops={"color": "black", "lw": 1.4},
    )


def _share(axes: Sequence[Axes], which: str) -> None:
    """The same range of "x" or "y" for all; numbers stay at each, which are read one by one."""
    limits = np.array([getattr(axis, f"get_{which}lim")() for axis in axes])
    for axis in axes:
        getattr(axis, f"set_{which}lim")(limits.min(), limits.max())


def _row_label(axis: Axes, text: str) -> None:
    lines = [one for part in text.split("\n") for one in (textwrap.wrap(part, 14) or [""])]
    axis.text(
        -0.06, 0.5, "\n".join(lines), transform=axis.transAxes, ha="right", va="center", fontsize=8
    )


def _corner(axis: Axes, text: str, height: float) -> None:
    label = axis.text(0.04, height, text, transform=axis.transAxes, color="white", fontsize=8)
    label.set_path_effects([patheffects.withStroke(linewidth=1.8, foreground="black")])


def _picture_grid(rows: int, columns: int, shape: Sequence[int]) -> tuple[Figure, np.ndarray]:
    """Axes for pictures of `shape` with room for words at the left: tight_layout has none for axes switched off."""
    left, head, foot, gap = 1.15, 0.6, 0.08, 0.06
    side = min(1.3, (WIDTH - left) / columns - gap)
    tall = side * shape[0] / shape[1]
    width, height = left + columns * (side + gap), head + rows * (tall + gap) + foot
    figure, axes = panels(columns, rows=rows)
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=left / width,
        right=1 - gap / width,
        bottom=foot / height,
        top=1 - head / height,
        wspace=gap / side,
        hspace=gap / tall,
    )
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def _finish_pictures(figure: Figure, caption: str, told: str) -> Figure:
    figure.suptitle(
        ", ".join(part for part in (told, caption) if part), fontsize=9, y=0.995, va="top"
    )
    return figure


def _finish_panels(
    figure: Figure, caption: str, told: str, below: str, handles: Sequence
) -> Figure:
    """Small titles, heading, remark and legend under the panels; then the layout."""
    for axis in figure.axes:
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.suptitle(", ".join(part for part in (told, caption) if part), fontsize=9)
    a_line = int(figure.get_figwidth() / ENTRY)
    legend = 0.1 + 0.2 * -(-len(handles) // a_line) if handles else 0.03  # inches
    foot = legend + 0.2 * bool(below)
    tall = figure.get_figheight() + foot  # the panels keep their height
    figure.set_figheight(tall)
    if handles:
        figure.legend(
            handles=handles,
            ncols=min(a_line, len(handles)),
            fontsize=8,
            frameon=False,
            loc="lower center",
            handlelength=3,
            columnspacing=1.2,
        )
    if below:
        figure.text(0.5, legend / tall, below, ha="center", va="bottom", fontsize=8)
    # Not tight_layout: it would open all gaps as wide as the widest, that of long names askew.
    figure.set_layout_engine("constrained", rect=(0, foot / tall, 1, 1 - foot / tall), h_pad=0.06)
    return figure
