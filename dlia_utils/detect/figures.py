"""Figures and the per-class table of a detection study; boxes come as tables, films as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from ..plots import COLORS, line_style, panels
from ..report import with_interval

CORNERS = ["x1", "y1", "x2", "y2"]
FROC_POINTS = (
    1 / 8,
    1 / 4,
    1 / 2,
    1,
    2,
    4,
    8,
)  # false positives per image, as in LUNA16 (arXiv 1612.08012)
DRAWN = 12  # boxes of one film that are drawn at most: more would hide the film

# Light enough for a dark film; line style, score and label tell them apart without the colour as well.
TRUTH = {"color": "#3ddc84", "ls": "-", "lw": 1.8}
PREDICTION = {"color": "#ff5964", "ls": (0, (4, 2)), "lw": 1.8}


def boxes_by_image(
    table: pd.DataFrame, images: Sequence[int], *, scale: np.ndarray | None = None
) -> list[pd.DataFrame]:
    """One table of boxes per image, in the order of `images`: what the figures and `energy_inside` take.

    table: truth or predictions with columns image, x1, y1, x2, y2. images: row numbers; one without boxes
    gets an empty table. scale: float [len(images), 2] of (sx, sy), such as `ImageCache.scale(images)`, by
    which corners in pixels of the file become pixels of the cached film. Errors: ValueError for another shape
    of `scale`.

    >>> boxes = pd.DataFrame([{"image": 7, "x1": 10.0, "y1": 10.0, "x2": 30.0, "y2": 20.0, "label": 1}])
    >>> boxes_by_image(boxes, [3, 7], scale=np.array([[1, 1], [0.5, 2]]))[1][["x1", "y1", "x2", "y2"]].values
    array([[ 5., 20., 15., 40.]])
    """
    images = [int(image) for image in images]
    if scale is not None and np.shape(scale) != (len(images), 2):
        raise ValueError(
            f"scale must have shape [{len(images)}, 2], one (sx, sy) per image, not {np.shape(scale)}"
        )
    parts = dict(list(table.groupby("image", sort=False)))
    tables = [parts.get(image, table.iloc[:0]) for image in images]
    if scale is None:
        return tables
    return [
        part.assign(x1=part.x1 * sx, y1=part.y1 * sy, x2=part.x2 * sx, y2=part.y2 * sy)
        for part, (sx, sy) in zip(tables, np.asarray(scale, float), strict=True)
    ]


# ------------------------------------------------------------------------------------------- the data


def figure_classes(boxes: pd.DataFrame, classes: Sequence[str], caption: str) -> Figure:
    """Boxes per class, the size of each class's boxes (points, quartiles, median), and boxes per image.

    boxes: columns image, x1, y1, x2, y2, label, in pixels of the original files.
    """
    _check_labels(boxes, classes)
    figure, axes = panels(3, width=3.6, height=max(3.0, 1.5 + 0.3 * len(classes)))
    count, size, per_image = axes[0]
    rng = np.random.default_rng(0)
    side = np.sqrt((boxes.x2 - boxes.x1) * (boxes.y2 - boxes.y1)).to_numpy(float)
    for place in range(len(classes)):
        own = side[boxes.label.eq(place + 1).to_numpy()]
        count.barh(place, len(own), 0.7, color=COLORS[0])
        count.annotate(f" {len(own)}", (len(own), place), va="center", fontsize=8)
        if len(own):
            size.plot(
                own,
                place + rng.uniform(-0.28, 0.28, len(own)),
                ".",
                ms=4,
                alpha=0.35,
                color=COLORS[0],
                mew=0,
            )
            low, median, high = np.quantile(own, [0.25, 0.5, 0.75])
            size.plot([low, high], [place] * 2, color=COLORS[1], lw=2.5, solid_capstyle="butt")
            size.plot(median, place, "o", ms=5, color=COLORS[1], mec="white", mew=0.8)
    count.set_yticks(range(len(classes)), classes, fontsize=8)
    size.set_yticks(range(len(classes)), [])
    middle, half = (len(classes) - 1) / 2, max(len(classes), 3) / 2
    for axis in (count, size):
        axis.set_ylim(middle + half, middle - half)  # the first class on top
    count.set(xlabel="boxes", title="boxes per class")
    count.set_xlim(0, 1.2 * max(1, boxes.label.value_counts().max() if len(boxes) else 0))
    size.set(
        xlabel="square root of the box area, px of the file",
        title="box size: points, quartiles, median",
    )
    size.set_xlim(left=0)
    _count_bars(
        per_image,
        boxes.groupby("image").size(),
        xlabel="boxes per image (images with a box)",
        ylabel="images",
    )
    per_image.set_title("boxes per image")
    return _finish(figure, caption)


def figure_patients(manifest: pd.DataFrame, caption: str) -> Figure:
    """How many patients have one image, two, three...; images whose patient is not known are only counted."""
    figure, axes = panels(1, width=4.6, height=3.2)
    sizes = manifest.groupby("patient").size()
    _count_bars(axes[0, 0], sizes, xlabel="images of one patient", ylabel="patients")
    unknown = int(manifest.patient.isna().sum())
    title = f"{len(sizes)} patients, {len(manifest)} images" + (
        f", {unknown} without a patient" if unknown else ""
    )
    axes[0, 0].set_title(title)
    return _finish(figure, caption)


def _count_bars(axis: Axes, sizes: pd.Series, *, xlabel: str, ylabel: str) -> None:
    """Bars of how often each whole number occurs in `sizes`; the numbers stand above while there is room."""
    numbers = sizes.value_counts().sort_index()
    axis.bar(numbers.index, numbers, 0.8, color=COLORS[0])
    if len(numbers) <= 12:
        for at, number in numbers.items():
            axis.annotate(str(number), (at, number), ha="center", va="bottom", fontsize=8)
    axis.margins(y=0.12)
    _whole(axis)
    if len(numbers):
        axis.set_xlim(numbers.index.min() - 0.7, numbers.index.max() + 0.7)
    else:
        _say(axis, "none")
        axis.set_xticks([])
    axis.set(xlabel=xlabel, ylabel=ylabel)


# ------------------------------------------------------------------------------------------- films


def figure_boxes(
    images: np.ndarray,
    truth_by_row: Sequence[pd.DataFrame],
    predictions_by_row: Sequence[pd.DataFrame],
    titles: Sequence[str],
    classes: Sequence[str],
    caption: str,
    *,
    threshold: float | Mapping[int, float] = 0.0,
    beside: bool = False,
) -> Figure:
    """Films with ground truth (green, solid) and predictions (red, dashed, with their score).

    images: [S,S] or [N,S,S], uint8 or floats in [0,1]. truth_by_row, predictions_by_row: one table per film
    with corners in its pixels (`boxes_by_image`). threshold: the lowest score shown, for all or by label.
    beside: truth on the left film, predictions on the right one, instead of both on one film. Of more than
    twelve predictions the best twelve are drawn, and the title says so. When no table has a column `score`
    there is nothing to compare yet, and only the truth is shown. Errors: ValueError when the lengths differ.
    """
    films = _films(
        images, truth_by_row=truth_by_row, predictions_by_row=predictions_by_row, titles=titles
    )
    scored = any("score" in table for table in predictions_by_row)
    panels, width = 2 if beside else 1, 4.4 if len(films) == 1 else 3.3
    across = min(len(films), 2 if beside or len(films) == 4 else 3)
    figure, axes = panels(across * panels, rows=-(-len(films) // across), width=width)
    for axis in axes.flat:
        axis.axis("off")
    drawn = []
    for row, film in enumerate(films):
        pair = [axes.flat[panels * row + panel] for panel in range(panels)]
        for axis in pair:
            _show(axis, film)
        drawn.append((pair[0], _labelled(truth_by_row[row], classes), TRUTH))
        note = ""
        if scored:
            shown, reached = _strongest(predictions_by_row[row], threshold)
            drawn.append((pair[-1], _labelled(shown, classes), PREDICTION))
            if not reached:
                note = "no prediction" + (" above the threshold" if threshold else "")
            elif reached > len(shown):
                note = f"best {len(shown)} of {reached} predictions"
        if beside:
            pair[0].set_title(f"{titles[row]}, truth", fontsize=8)
            pair[1].set_title(note or "predictions", fontsize=8)
        else:
            pair[0].set_title(f"{titles[row]}\n{note}".strip(), fontsize=8)
    _lay_out(figure, caption, f"prediction, {_cut_text(threshold)}" if scored else None)
    _draw(drawn)
    return figure


def figure_localisation(
    images: np.ndarray,
    maps: np.ndarray,
    truth_by_row: Sequence[pd.DataFrame],
    predictions_by_row: Sequence[pd.DataFrame],
    classes: Sequence[str],
    caption: str,
    *,
    titles: Sequence[str] | None = None,
    threshold: float | Mapping[int, float] = 0.0,
) -> Figure:
    """Per film a row of three: the film, the map over it with the true boxes, and truth with predictions.

    maps: [N,S,S] in [0,1], such as `eigencam(..., size=S)`; the rest as in `figure_boxes`. Each map is
    stretched to its own full range, so colours compare places of one film, not two films.
    """
    titles = [""] * len(truth_by_row) if titles is None else titles
    films = _films(
        images,
        maps=maps,
        truth_by_row=truth_by_row,
        predictions_by_row=predictions_by_row,
        titles=titles,
    )
    figure, axes = panels(3, rows=len(films), width=3.1)
    for row, film in enumerate(films):
        for axis in axes[row]:
            _show(axis, film)
        heat = np.asarray(maps[row], float)
        height, width = film.shape
        place = (
            -0.5,
            width - 0.5,
            height - 0.5,
            -0.5,
        )  # a map of another size still covers the film
        axes[row, 1].imshow(heat, cmap="plasma", vmin=0, vmax=1, alpha=0.4, extent=place)
        heads = (titles[row] or "film", "where the layer responds (yellow: most)", "boxes")
        for axis, title in zip(axes[row], heads, strict=True):
            axis.set_title(title, fontsize=8)
    _lay_out(figure, caption, f"prediction, {_cut_text(threshold)}")
    drawn = []
    for row in range(len(films)):
        truth = _labelled(truth_by_row[row], classes)
        predictions = _labelled(_strongest(predictions_by_row[row], threshold)[0], classes)
        drawn += [
            (axes[row, 1], truth.assign(text=""), TRUTH),
            (axes[row, 2], truth, TRUTH),
            (axes[row, 2], predictions, PREDICTION),
        ]
    _draw(drawn)
    return figure


def _films(images: np.ndarray, **aligned: Sequence) -> list[np.ndarray]:
    """The films as a list of [S,S] floats in [0,1], after a check that everything is there for each."""
    films = [images] if len(images) and np.ndim(images[0]) == 1 else list(images)
    lengths = {name: len(values) for name, values in aligned.items() if len(values) != len(films)}
    if lengths or not films:
        raise ValueError(
            f"{len(films)} films, but {lengths}: give one entry per film, and at least one film"
        )
    arrays = [np.asarray(film).reshape(np.shape(film)[-2:]) for film in films]
    arrays = [film / 255 if film.dtype == np.uint8 else film.astype(float) for film in arrays]
    if max(film.max() for film in arrays) > 1.001:
        raise ValueError("films must be uint8 or floats in [0,1]: divide by their full scale first")
    return arrays


def _show(axis: Axes, film: np.ndarray) -> None:
    axis.imshow(film, cmap="gray", vmin=0, vmax=1)
    axis.set_anchor("N")
    axis.axis("off")


def _strongest(
    predictions: pd.DataFrame, threshold: float | Mapping[int, float]
) -> tuple[pd.DataFrame, int]:
    """The best `DRAWN` predictions that reach the threshold, and how many do."""
    reached = _reaching(predictions, threshold).sort_values("score", ascending=False, kind="stable")
    return reached.head(DRAWN), len(reached)


def _reaching(predictions: pd.DataFrame, threshold: float | Mapping[int, float]) -> pd.DataFrame:
    """The predictions whose score is at least the threshold, for all or by label."""
    cut = predictions.label.map(threshold) if isinstance(threshold, Mapping) else threshold
    return predictions[predictions.score >= cut]


def _labelled(boxes: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """The boxes with their `text`: class name, and score where there is one."""
    _check_labels(boxes, classes)
    text = [classes[int(label) - 1] for label in boxes.label]
    if "score" in boxes:
        text = [f"{name} {score:.2f}" for name, score in zip(text, boxes.score, strict=True)]
    return boxes.assign(text=text)


def _check_labels(boxes: pd.DataFrame, classes: Sequence[str]) -> None:
    wrong = sorted(set(boxes.label) - set(range(1, len(classes) + 1)))
    if wrong:
        raise ValueError(
            f"labels {wrong[:5]} are not in 1..{len(classes)}: label k is classes[k - 1], 0 is background"
        )


def _cut_text(threshold: float | Mapping[int, float]) -> str:
    if isinstance(threshold, Mapping):
        return "score at least its class's threshold"
    # A threshold that no score can reach is NaN.
    return (
        f"score at least {threshold:.3g}"
        if np.isfinite(threshold)
        else "no score reaches the threshold"
    )


def _lay_out(figure: Figure, caption: str, prediction: str | None) -> None:
    """Heading, legend and layout of a figure of films; only after it labels can be placed without overlap."""
    lines = {"ground truth": Line2D([], [], **TRUTH)}
    if prediction:
        lines[prediction] = Line2D([], [], **PREDICTION)
    # Laid out in inches, not by tight_layout, which has no room for the titles of axes switched off.
    rows, columns = figure.axes[0].get_gridspec().get_geometry()
    titles = 0.08 + 0.16 * max(axis.get_title().count("\n") + 1 for axis in figure.axes)
    width, gap, head = figure.get_figwidth(), 0.12, 0.28
    side = (width - gap * (columns + 1)) / columns
    foot = 0.36 if width > 5 else 0.56
    height = rows * (side + titles) + head + foot
    figure.set_figheight(height)
    figure.subplots_adjust(
        left=gap / width,
        right=1 - gap / width,
        bottom=foot / height,
        top=1 - (head + titles) / height,
        wspace=gap / side,
        hspace=titles / side,
    )
    figure.suptitle(caption, fontsize=9, y=1 - 0.08 / height, va="top")
    look = {
        "fontsize": 8,
        "facecolor": "0.25",
        "labelcolor": "white",
        "handlelength": 3,
        "borderaxespad": 0.2,
    }
    columns = 2 if width > 5 else 1
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncol=columns, **look)


def _draw(groups: Sequence[tuple[Axes, pd.DataFrame, Mapping]]) -> None:
    """Draw boxes, then their labels where they hide least: (axis, boxes with `text`, style) per group."""
    frames: dict[Axes, list] = {}
    for axis, boxes, style in groups:
        shadow = [
            patheffects.withStroke(linewidth=style["lw"] + 1.4, foreground="black", alpha=0.55)
        ]
        for (x1, y1, x2, y2), text in zip(boxes[CORNERS].to_numpy(float), boxes.text, strict=True):
            axis.add_patch(
                Rectangle(
                    (x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, path_effects=shadow, **style
                )
            )
            frames.setdefault(axis, []).append(
                (np.array([x1, y1, x2, y2]) - 0.5, text, style["color"])
            )
    for axis, boxes in frames.items():
        axis.apply_aspect()  # a film that is not square shrinks its axis only when drawn; labels need it now
        placed: list[np.ndarray] = []
        for box, text, color in boxes:
            if text:
                others = [other for other, _, _ in boxes]
                placed.append(_place_label(axis, box, text, color, placed, others))


def _place_label(
    axis: Axes,
    box: np.ndarray,
    text: str,
    color: str,
    placed: Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
) -> np.ndarray:
    """Write one label at the place around its box that hides least of labels, box edges and the outside."""
    label = Text(
        0,
        0,
        text,
        fontsize=7.5,
        color="black",
        va="top",
        ha="left",
        clip_on=False,
        bbox={"facecolor": color, "alpha": 0.85, "edgecolor": "none", "pad": 1.2},
    )
    axis.add_artist(label)
    extent = label.get_window_extent()
    unit = abs(
        axis.transData.transform((1, 0))[0] - axis.transData.transform((0, 0))[0]
    )  # display px per film px
    pad = 2.5 / unit
    width, height = extent.width / unit + 2 * pad, extent.height / unit + 2 * pad
    x1, y1, x2, y2 = box
    corners = [(x, y) for y in (y1 - height, y2, y1, y2 - height) for x in (x1, x2 - width)]
    corners += [(x, y) for x in (x2, x1 - width) for y in (y1, y2 - height)]
    (left, right), (bottom, top) = sorted(axis.get_xlim()), sorted(axis.get_ylim())
    spots = []
    for x, y in corners:
        x += max(left - x, 0) - max(x + width - right, 0)  # back onto the film
        y += max(bottom - y, 0) - max(y + height - top, 0)
        spots.append(np.array([x, y, x + width, y + height]))
    cost = [
        100 * sum(_overlap(spot, other) for other in placed)
        + sum(_crossed(spot, other) for other in boxes)
        for spot in spots
    ]
    best = spots[int(np.argmin(cost))]
    label.set_position((best[0] + pad, best[1] + pad))
    return best


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Common area of two boxes."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(np.prod(np.maximum(sides, 0)))


def _crossed(spot: np.ndarray, box: np.ndarray) -> float:
    """Area of the label that lies in the box, and much more for every edge of the box under the label."""
    inside = _overlap(spot, box)
    area = float(np.prod(spot[2:] - spot[:2]))
    return inside + (5 * area if 1e-9 < inside < area * (1 - 1e-9) else 0)


# ------------------------------------------------------------------------------------------- curves


def figure_froc(curves: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Free-response ROC: sensitivity against false positives per image, with the seven operating points.

    curves: name -> columns fp_per_image, sensitivity. A point's sensitivity is the highest that the curve
    reaches with no more false positives. The legend gives their mean, the score of LUNA16 (arXiv 1612.08012).
    """
    figure, axes = panels(1, width=6.4, height=4.2)
    axis = axes[0, 0]
    for number, (name, curve) in enumerate(curves.items()):
        _need(curve, f"the FROC curve {name!r}", "fp_per_image", "sensitivity")
        style = line_style(number)
        if len(curve) and curve.sensitivity.isna().all():
            axis.plot([], [], ms=5, label=f"{name} (no true box)", **style)
            continue
        curve = (
            curve[["fp_per_image", "sensitivity"]]
            .dropna()
            .sort_values(["fp_per_image", "sensitivity"])
        )
        reached = [
            curve.sensitivity[curve.fp_per_image <= at * (1 + 1e-9)].max() for at in FROC_POINTS
        ]
        reached = np.nan_to_num(np.array(reached, float))
        x = np.r_[np.maximum(curve.fp_per_image, FROC_POINTS[0] / 8), 2 * FROC_POINTS[-1]]
        y = np.r_[curve.sensitivity, curve.sensitivity.max() if len(curve) else 0]
        axis.plot(x, y, drawstyle="steps-post", lw=1.3, color=style["color"], ls=style["ls"])
        axis.plot(
            FROC_POINTS, reached, ls="none", marker=style["marker"], ms=5, color=style["color"]
        )
        axis.plot([], [], ms=5, label=f"{name} (mean {reached.mean():.3f})", **style)
    axis.set_xscale("log", base=2)
    axis.set_xticks(FROC_POINTS, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axis.set(
        xlim=(FROC_POINTS[0] / 1.15, FROC_POINTS[-1] * 1.15),
        ylim=(-0.02, 1.02),
        xlabel="false positives per image",
        ylabel="sensitivity",
    )
    axis.grid(alpha=0.25)
    _legend_right(axis)
    return _finish(figure, caption)


def figure_pr(curves: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Precision against recall, the best F1 marked, over grey lines of equal F1.

    curves: name -> columns threshold, precision, recall, f1.
    """
    figure, axes = panels(1, width=6.4, height=4.4)
    axis = axes[0, 0]
    for f1 in (0.2, 0.4, 0.6, 0.8):
        precision = np.linspace(f1 / (2 - f1), 1, 200)
        axis.plot(f1 * precision / (2 * precision - f1), precision, color="0.8", lw=0.8, zorder=1)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        where = {"ha": "right", "va": "center", "zorder": 1.5, "bbox": paper}
        axis.text(1.02, f1 / (2 - f1), f"F1 {f1:g}", fontsize=7, color="0.5", **where)
    for number, (name, curve) in enumerate(curves.items()):
        _need(curve, f"the curve {name!r}", "threshold", "precision", "recall", "f1")
        style = line_style(number)
        label = f"{name}: no true box" if len(curve) else f"{name}: no prediction"
        curve = curve.dropna(subset=["precision", "recall", "f1"]).sort_values("threshold")
        if len(curve):
            best = curve.loc[curve.f1.idxmax()]
            label = f"{name}: F1 {best.f1:.2f} at {best.threshold:.2f}"
            axis.plot(curve.recall, curve.precision, lw=1.3, color=style["color"], ls=style["ls"])
            axis.plot(
                best.recall,
                best.precision,
                style["marker"],
                ms=8,
                color=style["color"],
                mec="black",
                mew=0.8,
            )
        axis.plot([], [], ms=6, label=label, **style)
    axis.set(xlim=(-0.02, 1.03), ylim=(-0.02, 1.03), xlabel="recall", ylabel="precision")
    _legend_right(axis)
    return _finish(figure, caption)


def figure_thresholds(sweep: pd.DataFrame, best: Mapping[str, float], caption: str) -> Figure:
    """What a score cut does: mAP can only fall with it; F1 has a best cut, which is marked.

    sweep: columns threshold, mAP50, precision, recall, f1. best: threshold, f1 and fp_per_image at the best
    F1, such as one row of `best_thresholds`; a NaN threshold says that no cut is better than another.
    """
    _need(sweep, "sweep", "threshold", "mAP50", "precision", "recall", "f1")
    figure, axes = panels(2, width=4.8, height=3.6)
    sweep = sweep.sort_values("threshold")
    left, right = axes[0]
    marks = 3 if len(sweep) <= 25 else 0  # of a dense sweep, the lines alone
    left.plot(sweep.threshold, sweep.mAP50, "o-", ms=marks, color=COLORS[0])
    left.set(
        xlabel="score cut",
        ylabel="mAP at IoU 0.5",
        title="a cut can only lower mAP: it takes boxes away",
    )
    left.set_ylim(0, max(float(sweep.mAP50.max()) * 1.15, 0.05))
    for number, (column, name) in enumerate(
        {"f1": "F1", "precision": "precision", "recall": "recall"}.items()
    ):
        style = line_style(number)
        right.plot(
            sweep.threshold,
            sweep[column],
            ms=marks,
            lw=2.0 if column == "f1" else 1.2,
            label=name,
            **style,
        )
    at = float(best["threshold"])
    right.set(xlabel="score cut", ylim=(-0.02, 1.05), title="no cut keeps a true positive")
    if np.isfinite(at):
        right.axvline(at, color="0.4", lw=1, ls="--", label="best F1")
        marks = f"{best['fp_per_image']:.2g} false positives per image"
        right.set_title(f"best F1 {best['f1']:.2f} at {at:.2f}: {marks}")
    _legend_right(right)
    for axis in axes[0]:
        axis.grid(alpha=0.25)
    return _finish(figure, caption)


def figure_confidence(
    predictions: pd.DataFrame, caption: str, *, hits: np.ndarray | None = None
) -> Figure:
    """Histogram of the scores; with `hits` (bool, one per prediction) true and false positives apart."""
    if hits is not None and len(hits) != len(predictions):
        raise ValueError(
            f"hits has {len(hits)} entries for {len(predictions)} predictions: give one each"
        )
    figure, axes = panels(1, width=5.6, height=3.3)
    axis, bins = axes[0, 0], np.linspace(0, 1, 41)
    score = predictions.score.to_numpy(float)
    if hits is None:
        parts = {f"all predictions ({len(score)})": (score, COLORS[0], "-")}
    else:
        hits = np.asarray(hits, bool)
        parts = {
            f"false positives ({(~hits).sum()})": (score[~hits], COLORS[1], "--"),
            f"true positives ({hits.sum()})": (score[hits], COLORS[0], "-"),
        }
    if len(score):
        for label, (values, color, style) in parts.items():
            axis.hist(values, bins, histtype="stepfilled", color=color, alpha=0.25)
            axis.hist(values, bins, histtype="step", color=color, ls=style, lw=1.6, label=label)
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.7)
        axis.legend(fontsize=8, frameon=False, loc="upper right")
    else:
        _say(axis, "no predictions")
    axis.set(xlim=(0, 1), xlabel="score", ylabel="predictions (log scale)")
    return _finish(figure, caption)


def figure_per_image(
    predictions: pd.DataFrame,
    images: Sequence[int],
    caption: str,
    *,
    threshold: float | Mapping[int, float] = 0.0,
) -> Figure:
    """How many predictions an image gets; `images` are all evaluated ones, those without a prediction too."""
    figure, axes = panels(1, width=5.2, height=3.3)
    found = _reaching(predictions, threshold).image.value_counts()
    numbers = found.reindex(pd.Index(images), fill_value=0)
    _count_bars(axes[0, 0], numbers, xlabel="predictions per image", ylabel="images")
    axes[0, 0].set_title(
        f"{_cut_text(threshold)}: {numbers.mean():.2f} per image, "
        f"{numbers.eq(0).mean():.0%} of {len(numbers)} images without any"
    )
    return _finish(figure, caption)


def figure_tta(table: pd.DataFrame, caption: str) -> Figure:
    """mAP of each view and fusion with its interval, and its paired difference to the first row.

    table: columns name, value, ci_low, ci_high, difference, difference_low, difference_high, top to bottom as
    given; the first row is what the others are compared with. A difference whose interval crosses 0 shows no
    effect.
    """
    panels = (("value", "ci_low", "ci_high"), ("difference", "difference_low", "difference_high"))
    _need(table, "table", "name", *panels[0], *panels[1])
    figure, axes = panels(2, width=4.2, height=1.4 + 0.3 * len(table))
    place = np.arange(len(table))
    for axis, (value, low, high), color in zip(axes[0], panels, COLORS, strict=False):
        axis.hlines(place, table[low], table[high], color=color, lw=2)
        axis.plot(table[value], place, "o", ms=6, color=color, mec="white", mew=0.8)
        axis.set_ylim(len(table) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes[0, 0].set_yticks(place, table["name"], fontsize=8)
    axes[0, 1].set_yticks(place, [])
    axes[0, 1].axvline(0, color="0.4", lw=1, ls="--")
    axes[0, 0].set(xlabel="mAP at IoU 0.5, 95 % interval")
    axes[0, 1].set(xlabel=f"difference to {table['name'].iloc[0]!r}, 95 % interval")
    return _finish(figure, caption)


def figure_training(history: pd.DataFrame, caption: str, *, metric: str = "val_mAP50") -> Figure:
    """Training loss, its parts and the learning rate on the left; validation mAP and its best epoch right.

    history: columns epoch, train_loss and `metric`; optional lr and parts named loss_*. Errors: ValueError
    when one of the first three is missing.
    """
    _need(history, "history", "epoch", "train_loss", metric)
    figure, axes = panels(2, width=5.0, height=3.5)
    left, right = axes[0]
    left.plot(history.epoch, history.train_loss, "o-", ms=3, color=COLORS[0], lw=1.8, label="all")
    for number, name in enumerate((c for c in history if c.startswith("loss_")), start=1):
        style = line_style(number)
        left.plot(
            history.epoch,
            history[name],
            lw=1.1,
            color=style["color"],
            ls=style["ls"],
            label=name.removeprefix("loss_").replace("_", " "),
        )
    left.set(xlabel="epoch", ylabel="training loss")
    left.set_ylim(0, 1.35 * float(history.train_loss.max()))
    left.legend(fontsize=7, frameon=False, ncol=2, loc="upper right")
    if "lr" in history:
        rate = left.twinx()
        rate.plot(history.epoch, history.lr, color="0.6", lw=0.8)
        rate.set_ylabel("learning rate (thin line)", fontsize=7, color="0.5")
        rate.tick_params(labelsize=7, colors="0.5")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        rate.yaxis.get_offset_text().set_fontsize(7)
        rate.set_ylim(bottom=0)
    measured = history.dropna(subset=[metric])
    right.plot(measured.epoch, measured[metric], "o-", ms=3, color=COLORS[0])
    if len(measured):
        best = measured.loc[measured[metric].idxmax()]
        right.axvline(best.epoch, color="0.4", lw=1, ls="--")
        right.plot(best.epoch, best[metric], "*", ms=12, color=COLORS[1], mec="black", mew=0.6)
        right.set_title(f"best: {best[metric]:.3f} in epoch {best.epoch:.0f}")
    right.set(xlabel="epoch", ylabel="validation mAP at IoU 0.5")
    right.set_ylim(bottom=0)
    right.grid(alpha=0.25)
    for axis in axes[0]:
        _whole(axis)
        axis.set_xlim(history.epoch.min() - 0.5, history.epoch.max() + 0.5)
    return _finish(figure, caption)


def _need(table: pd.DataFrame, name: str, *columns: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"{name} lacks the columns {missing}; it has {list(table.columns)}")


def _legend_right(axis: Axes) -> None:
    axis.legend(
        fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=3
    )


def _whole(axis: Axes) -> None:
    """Whole numbers along x, however few there are."""
    axis.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def _say(axis: Axes, text: str) -> None:
    """A word in an axis that has nothing to show."""
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, color="0.5")
    axis.set_yticks([])


def _finish(figure: Figure, caption: str) -> Figure:
    """Small titles, the note on data and profile, and the layout."""
    for axis in figure.axes:
        axis.title.set_fontsize(9)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.suptitle(caption, fontsize=9)
    figure.tight_layout()
    return figure


# ------------------------------------------------------------------------------------------- table


def per_class_table(
    ap: pd.DataFrame,
    thresholds: pd.DataFrame,
    truth: pd.DataFrame,
    classes: Sequence[str],
    *,
    metric: str = "AP50",
) -> pd.DataFrame:
    """One row per class: boxes, images, AP with its interval; precision, recall, F1 at its best threshold.

    ap: columns label, metric, value, ci_low, ci_high, of which the rows of `metric` are used. thresholds:
    columns label, threshold, precision, recall, f1. truth: the evaluated boxes (image, label). A class that
    one of the tables does not have shows "-" or NaN. Errors: ValueError when `ap` has no row of `metric`.

    >>> ap = pd.DataFrame([{"label": 1, "metric": "AP50", "value": 0.5, "ci_low": 0.4, "ci_high": 0.6}])
    >>> best = pd.DataFrame([{"label": 1, "threshold": 0.3, "precision": 0.8, "recall": 0.4, "f1": 0.533}])
    >>> truth = pd.DataFrame({"image": [0, 0, 4], "label": [1, 1, 1]})
    >>> per_class_table(ap, best, truth, ["Mass"])[["class", "boxes", "images", "AP50"]].values
    array([['Mass', 3, 2, '0.500 [0.400, 0.600]']], dtype=object)
    """
    _need(ap, "ap", "label", "metric", "value", "ci_low", "ci_high")
    _need(thresholds, "thresholds", "label", "threshold", "precision", "recall", "f1")
    chosen = ap[ap["metric"].eq(metric)].set_index("label")
    if chosen.empty:
        raise ValueError(
            f"ap has no rows of metric {metric!r}; it has {sorted(ap['metric'].unique())}"
        )
    best = thresholds.set_index("label").reindex(range(1, len(classes) + 1))
    rows = []
    for label, name in enumerate(classes, start=1):
        own = truth[truth["label"].eq(label)]
        known = label in chosen.index and np.isfinite(chosen.loc[label, "value"])
        rows.append(
            {
                "class": name,
                "boxes": len(own),
                "images": own["image"].nunique(),
                metric: with_interval(chosen.loc[label]) if known else "-",
            }
        )
    numbers = (
        best[["threshold", "precision", "recall", "f1"]]
        .astype(float)
        .round(3)
        .reset_index(drop=True)
    )
    return pd.concat([pd.DataFrame(rows), numbers.rename(columns={"f1": "F1"})], axis=1)
