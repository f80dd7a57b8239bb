"""Figures that several notebooks draw: functions of numbers and a caption that return a Figure."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter
from sklearn.metrics import auc, confusion_matrix, roc_curve

from .units import eps_text

# Okabe & Ito's colours, which colour-blind readers tell apart, without their yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OTHERS = "others (thin)"  # what a legend calls the lines beyond them


class Described(Figure):
    """A figure that says in words what it shows, for readers who hear it or see no pictures.

    png: the picture, where it was saved already.
    """

    png = b""

    def alt(self) -> str:
        """Title, panels, axes, names of the lines and caption, in one line."""
        said, legends = [self.get_suptitle()], list(self.legends)
        for axis in self.axes:
            across, up = axis.get_xlabel(), axis.get_ylabel()
            said += [axis.get_title(), f"{up} over {across}" if up and across else up + across]
            said += [text.get_text() for text in axis.texts]
            legends += [legend] if (legend := axis.get_legend()) else []
        for legend in legends:
            said += [text.get_text() for text in (*legend.get_texts(), legend.get_title())]
        words = dict.fromkeys(" ".join(one.split()) for one in [*said, self.get_supxlabel()])
        return textwrap.shorten("; ".join(filter(None, words)), 600, placeholder=" ...")

    def _ipython_display_(self) -> None:
        """The picture with the words beside it, where Jupyter's converters look for them."""
        from IPython.display import display

        words, drawn = self.alt(), io.BytesIO(self.png)
        if not self.png:
            self.savefig(drawn, bbox_inches="tight")
        shown = {"text/plain": words, "image/png": base64.b64encode(drawn.getvalue()).decode()}
        display(shown, metadata={"image/png": {"alt": words}}, raw=True)


def panels(
    columns: int, *, rows: int = 1, width: float = 3.0, height: float = 3.0
) -> tuple[Figure, np.ndarray]:
    """A figure in constrained layout and its axes [rows,columns]; sizes are inches of one panel."""
    size = {"figsize": (width * columns, height * rows), "dpi": 100, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, squeeze=False, FigureClass=Described, **size)
    plt.close(figure)  # the notebook shows the returned figure once; pyplot must not show it again
    return figure, axes


def line_style(number: int) -> dict:
    """Colour, line style and marker of the n-th curve: different without colours as well."""
    line, marker = ("-", "--", "-.", ":")[number % 4], "osD^vPX*hd"[number % 10]
    return {"color": COLORS[number % len(COLORS)], "ls": line, "marker": marker}


def line_styles(names: Sequence[str], *, first: Sequence[str] = ()) -> dict[str, dict]:
    """A style a line: no colour twice; beyond `COLORS`, those not in `first` are thin grey."""
    ordered = [*(name for name in names if name in first), *(n for n in names if n not in first)]
    styles = {name: line_style(number) | {"lw": 1.7} for number, name in enumerate(ordered)}
    rest = {"color": "0.72", "lw": 1.0, "marker": "", "ls": "-", "zorder": 1}
    return {name: styles[name] if k < len(COLORS) else rest for k, name in enumerate(ordered)}


def titled(figure: Figure, title: str, caption: str) -> Figure:
    """The figure with what it shows above and, small, where its numbers are from below."""
    figure.suptitle(title, fontsize=11)
    wide = int(14 * figure.get_figwidth())
    caption = "\n".join(textwrap.fill(line, wide) for line in caption.split("\n"))
    figure.supxlabel(caption, fontsize=9, color="0.35")
    return figure


def label_lines(
    axis: plt.Axes, names: Sequence[str], places: Sequence, colors: Sequence[str]
) -> None:
    """Names beside their lines or points, pushed apart where they would stand on one another."""
    low, high = axis.get_ylim()
    tall = 0.75 * axis.figure.get_figheight() / axis.get_gridspec().nrows  # inches, about
    apart, at = 1.25 * 9 / 72 / tall * (high - low), -np.inf
    order = sorted(range(len(names)), key=lambda k: places[k][1])
    heights = []
    for k in order:
        at = max(places[k][1], at + apart)
        heights.append(at)
    # What was pushed over the upper edge comes down again, and pushes what is below it.
    for k in reversed(range(len(order))):
        top = high if k == len(order) - 1 else heights[k + 1] - apart
        heights[k] = min(heights[k], top)
    for k, height in zip(order, heights, strict=True):
        look = {"color": colors[k], "fontsize": 9, "va": "center"}
        text = axis.text(places[k][0], height, names[k], clip_on=False, **look)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])


def figure_samples(
    images: np.ndarray, titles: Sequence[str], caption: str, *, columns: int = 6
) -> Figure:
    """Grey images [N,1,H,W] or [N,H,W] in [0,1] with their titles."""
    images = np.asarray(images).reshape(len(images), *np.shape(images)[-2:])
    figure, axes = panels(columns, rows=-(-len(images) // columns), width=1.7, height=2.1)
    smooth = "nearest" if images.shape[-1] < 100 else None  # small ones are shown as they are
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation=smooth)
        axis.set_title(title, fontsize=9)
    return titled(figure, "", caption)


def figure_history(histories: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Training loss and validation AUC per epoch, one line a model."""
    figure, axes = panels(2, width=4.4, height=3.6)
    best = {name: one.loc[one["val_auc"].idxmax()] for name, one in histories.items()}
    name = max(best, key=lambda name: best[name]["val_auc"])
    told = f"{best[name]['val_auc']:.3f}, {name} in epoch {best[name]['epoch']:.0f}"
    for name, style in line_styles(list(histories)).items():
        history = histories[name]
        for axis, column in zip(axes[0], ("train_loss", "val_auc"), strict=True):
            axis.plot(history.epoch, history[column], ms=3, label=_told(name, style), **style)
    axes[0, 0].set(xlabel="epoch", ylabel="training loss (each model's own)", yscale="log")
    axes[0, 1].set(xlabel="epoch", ylabel="validation AUC")
    return _legend(figure, axes[0, 1], f"Training: highest validation AUC {told}", caption)


def figure_roc(labels: np.ndarray, scores: Mapping[str, np.ndarray], caption: str) -> Figure:
    """ROC curves on the test split, one a model; of scores [N,K] one a class, against the rest."""
    figure, ((axis,),) = panels(1, width=6.4, height=4.2)
    curves = {}
    for name, score in scores.items():
        many = enumerate(np.transpose(score)) if np.ndim(score) > 1 else ()
        by_class = {f"{name}, class {k}": (labels == k, column) for k, column in many}
        curves |= by_class or {name: (labels, score)}
    areas = {}
    for name, style in line_styles(list(curves)).items():
        false_alarm, hit, _ = roc_curve(*curves[name])
        areas[name] = auc(false_alarm, hit)
        axis.plot(false_alarm, hit, label=_told(name, style), **style | {"marker": ""})
    axis.plot([0, 1], [0, 1], ":", color="0.6")
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
    best = max(areas, key=areas.get)
    title = f"ROC curves, test images: highest AUC {areas[best]:.2f} ({best})"
    return _legend(figure, axis, title, caption)


def _told(name: str, style: Mapping) -> str:
    """The name for the legend; the grey lines share one, which holds in a grey print as well."""
    return name if style["color"] in COLORS else OTHERS


def figure_confusion(
    labels: np.ndarray, predictions: Mapping[str, np.ndarray], classes: Sequence[str], caption: str
) -> Figure:
    """Confusion matrices (rows truth, columns prediction), one a model."""
    columns = min(4, len(predictions))
    figure, axes = panels(columns, rows=-(-len(predictions) // columns), width=2.4, height=3.3)
    short = [textwrap.fill(name.replace("_", " "), 12) for name in classes]
    for axis in axes.flat[len(predictions) :]:
        axis.axis("off")
    for axis, (name, predicted) in zip(axes.flat, predictions.items(), strict=False):
        matrix = confusion_matrix(labels, predicted, labels=range(len(classes)))
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), number in np.ndenumerate(matrix):
            style = {"ha": "center", "va": "center", "fontsize": 9}
            style["color"] = "white" if share[i, j] > 0.6 else "black"
            axis.text(j, i, f"{number}\n{share[i, j]:.0%}", **style)
        turn = (0, 90) if len(classes) == 2 else (30, 0)
        axis.set_xticks(range(len(classes)), short, rotation=turn[0])
        axis.set_yticks(range(len(classes)), short, rotation=turn[1], va="center")
        axis.set_title(name, fontsize=9)
    figure.get_layout_engine().set(h_pad=0.12)  # titles stand apart from the ticks above them
    right = {name: np.sum(labels == predicted) for name, predicted in predictions.items()}
    best = max(right, key=right.get)
    title = f"Most right answers: {best}, {right[best]} of {len(labels)}"
    return titled(figure, title, f"rows: truth, columns: prediction\n{caption}")


def figure_accuracy_vs_eps(
    results: pd.DataFrame,
    caption: str,
    *,
    attack: str,
    unit: str = "pixel",
    note: str = "",
    constant: float | None = None,
    told_at: float | None = None,
) -> Figure:
    """Accuracy against eps, a line a model: the first and the highest in colour, with intervals.

    constant: the accuracy of always giving the more frequent answer, drawn as a level. told_at: the
    eps of which the title speaks, such as that of all attacks; by default the largest.
    """
    figure, ((axis,),) = panels(1, width=7.6, height=4.2)
    clean, scale = results.attack.eq("clean"), 255 if unit == "pixel" else 1
    chosen = results[results.metric.eq("accuracy") & (results.eps_unit.eq(unit) | clean)]
    attacked = chosen[chosen.attack.eq(attack)].groupby("model", sort=False).value.mean()
    best = attacked.sort_values(ascending=False, kind="stable").index[: len(COLORS) - 1]
    styles = line_styles(list(attacked.index), first=[attacked.index[0], *best])
    ends, last, kept = {}, {}, {}
    for name, style in styles.items():
        line = chosen[chosen.model.eq(name) & chosen.attack.isin(["clean", attack])]
        line = line.sort_values("eps")
        axis.plot(line.eps * scale, line.value, ms=4, **style)
        last[name] = line.value.iloc[-1]
        at = line.eps.max() if told_at is None else told_at
        kept[name] = line.value[np.isclose(line.eps, at)].max()
        if _told(name, style) != OTHERS:
            band = {"color": style["color"], "alpha": 0.12, "lw": 0}
            axis.fill_between(line.eps * scale, line.ci_low, line.ci_high, **band)
            ends[name] = (last[name], style["color"])
    others = [name for name in styles if name not in ends]
    if len(others) == 1:
        ends[others[0]] = (last[others[0]], "0.5")
    elif others:
        ends[f"{len(others)} others, grey"] = (0, "0.5")
    if constant is not None:
        axis.axhline(constant, color="0.4", ls=":", lw=1)
        ends["always the same answer"] = (constant, "0.4")
    words = "k/255, pixel units" if unit == "pixel" else "normalised units of the original study"
    axis.set(xlabel=f"eps ({words})", ylabel="accuracy", ylim=(-0.02, 1.02))
    axis.grid(alpha=0.25)
    edge = axis.get_xlim()[1]
    places, colors = [(edge, y) for y, _ in ends.values()], [color for _, color in ends.values()]
    label_lines(axis, [f" {name}" for name in ends], places, colors)
    top, at = max(kept, key=kept.get), eps_text(at) if unit == "pixel" else f"{at:g}"
    return titled(figure, f"{note or attack}: {top} keeps {kept[top]:.2f} at {at}", caption)


def _legend(figure: Figure, axis: plt.Axes, title: str, caption: str) -> Figure:
    """The figure with its title, caption, and the legend of `axis` to the right of everything."""
    handles, names = axis.get_legend_handles_labels()
    named = dict(zip(names, handles, strict=True))
    figure.legend(named.values(), named, loc="outside right center", fontsize=9, frameon=False)
    return titled(figure, title, caption)


def figure_curves(histories: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Loss, accuracy, validation AUC per epoch; training solid, validation dashed."""
    names = [name for name in ("loss", "accuracy", "auc") if _measured(histories, name)]
    figure, axes = panels(len(names), width=3.7, height=3.4)
    for number, (name, history) in enumerate(histories.items()):
        style = {"color": COLORS[number % len(COLORS)], "ms": 3}
        for axis, column in zip(axes[0], names, strict=True):
            for part, line in (("train", "o-"), ("val", "s--")):
                if f"{part}_{column}" in history:
                    values = history[f"{part}_{column}"]
                    label = name if line == "o-" else None
                    axis.plot(history["epoch"], values, line, label=label, **style)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set(xlabel="epoch", ylabel={"auc": "validation AUC"}.get(name, name))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
    title, lowest = "", {n: one["val_loss"] for n, one in histories.items() if "val_loss" in one}
    if lowest:
        name = min(lowest, key=lambda name: lowest[name].min())
        epoch = histories[name]["epoch"][lowest[name].idxmin()]
        title = f"Lowest validation loss {lowest[name].min():.2g}: {name} in epoch {epoch:.0f}"
    return _legend(figure, axes[0, 0], title, f"solid: training, dashed: validation\n{caption}")


def _measured(histories: Mapping[str, pd.DataFrame], name: str) -> bool:
    columns = {f"train_{name}", f"val_{name}"}
    return any(columns & set(history) for history in histories.values())


def figure_search(runs: pd.DataFrame, caption: str, *, direction: str = "maximize") -> Figure:
    """Score against each parameter of `search.search`'s runs; pruned ones hollow, the best a star.

    Extensions are coloured; runs without a score (diverged, failed) are only counted.
    """
    names = list(runs.columns[1 : runs.columns.get_loc("score")])
    shown = runs[runs["state"].isin(["complete", "pruned"]) & runs["score"].notna()]
    score = shown.loc[shown["state"].eq("complete"), "score"]  # of equal ones the first
    best = shown.loc[[score.idxmax() if direction == "maximize" else score.idxmin()]]
    columns = min(4, len(names))
    figure, axes = panels(columns, rows=-(-len(names) // columns), width=2.9, height=2.9)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        place = _search_axis(axis, shown[name])
        for (extension, state), part in shown.groupby(["extension", "state"]):
            color = COLORS[int(extension) % len(COLORS)]
            style = {"edgecolors": color, "facecolors": color if state == "complete" else "none"}
            asked = f"extension {extension}, " if extension else "ranges as asked, "
            style["label"] = f"{asked if shown['extension'].any() else ''}{state}"
            axis.scatter(place[part.index], part["score"], s=26, lw=1.1, **style)
        star = {"marker": "*", "s": 150, "color": "black", "zorder": 3, "label": "best"}
        axis.scatter(place[best.index], best["score"], **star)
        axis.set_xlabel({"lr": "learning rate"}.get(name, name.replace("_", " ")))
        axis.grid(alpha=0.25)
    for row in axes:
        row[0].set_ylabel("validation score")
    signs = axes[0, 0].get_legend_handles_labels()
    figure.legend(*signs, fontsize=9, frameon=False, loc="outside right center")
    others = len(runs) - len(shown)
    unscored = f", {others} without a score" if others else ""
    title = f"{len(runs)} runs{unscored}: best score {best['score'].item():.3f}"
    return titled(figure, title, caption)


def _search_axis(axis: plt.Axes, values: pd.Series) -> pd.Series:
    """Where the values of a parameter stand; the axis gets names, or few ticks on a log scale."""
    if not pd.api.types.is_numeric_dtype(values):
        codes, labels = pd.factorize(values.astype(str))
        axis.set_xticks(range(len(labels)), labels, fontsize=9)
        return pd.Series(codes, values.index)
    if values.min() > 0 and (wide := values.max() / values.min()) >= 20:
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        if wide < 100:
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axis.xaxis.set_major_formatter("{x:g}")
    return values


def figure_worst_case(found: Any, caption: str) -> Figure:
    """Accuracy against eps (worst case with its band), and which attack fooled the images first.

    `found` is what `attacks.evaluate.robust` returned.
    """
    table, rows = found.table(), found.rows
    figure, ((left, right),) = panels(2, width=5.2, height=4.0)
    x = np.r_[0, table.eps * 255]
    single = rows[~rows.attack.isin(["worst", "clean"])]
    for name in filter(str.isidentifier, single.attack.unique()):  # others met a part of the images
        ran = np.r_[True, table[name].notna()]
        alone = np.r_[table.clean[0], table[name]][ran]
        left.plot(x[ran], alone, ".:" if not ran.all() else "-", color="0.72", lw=1.0)
    worst = np.r_[table.clean[0], table.worst]
    left.plot(x, worst, "o-", ms=4, lw=1.8, color=COLORS[0], label="worst case")
    band = [np.r_[table[f"clean_{end}"][0], table[f"worst_{end}"]] for end in ("low", "high")]
    left.fill_between(x, *band, color=COLORS[0], alpha=0.12, lw=0)
    left.set(xlabel="eps (k/255, pixel units)", ylabel="accuracy", ylim=(-0.02, 1.02))
    left.axhline(
        float(found.labels.bincount().max()) / len(found.labels), color="0.4", ls=":", lw=1
    )
    left.set_title("worst case (blue), each attack (grey), one answer (dotted)", fontsize=10)
    left.grid(alpha=0.25)
    _fooled_first(right, rows[rows.attack.ne("worst")], table[table.eps.isin(single.eps)])
    last = table.iloc[-1]
    title = f"Worst case over the suite: {last['clean']:.2f} right when clean, {last['worst']:.2f}"
    return titled(figure, f"{title} at {last['ball']}", caption)


def _fooled_first(axis: plt.Axes, rows: pd.DataFrame, table: pd.DataFrame) -> None:
    """Shares of the images by the attack that fooled them first, at every eps of `table`."""
    met = rows.image[rows.attack.ne("clean")].unique()
    rows, names = rows[rows.image.isin(met)], list(dict.fromkeys(rows.attack))
    first = rows[rows.fooled].assign(turn=rows.attack.map(names.index))
    first = first.sort_values(["eps", "turn"]).drop_duplicates("image")
    used = [name for name in names if name in set(first.attack) - {"clean"}]
    most = [n for n in first.attack.value_counts().index if n in used][: len(COLORS) - 1]
    parts = {"wrong from the start": ["clean"]} | {n: [n] for n in used if n in most}
    parts |= {"another attack": [name for name in used if name not in most]}
    colors = ["0.2", *COLORS[: len(most)], COLORS[-1]]
    below = np.zeros(len(table))
    for (label, own), color in zip(parts.items(), colors, strict=True):
        counts = [(first.attack.isin(own) & first.eps.le(eps)).sum() for eps in table.eps]
        share = np.array(counts) / len(met)
        if share.any():
            axis.bar(table.ball, share, bottom=below, color=color, label=label)
            below = below + share
    axis.bar(table.ball, 1 - below, bottom=below, color="0.93", label="robust")
    axis.set(xlabel="eps", ylabel="share of the images", ylim=(0, 1))
    axis.set_title("fooled first by", fontsize=10)
    axis.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
