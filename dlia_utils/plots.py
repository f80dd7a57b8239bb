"""Figures that every notebook draws: functions of numbers and a caption that return a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, roc_curve

from .units import eps_text

if TYPE_CHECKING:
    from .attacks.evaluate import Evaluation

COLORS = ("#1b4965", "#d1495b", "#edae49", "#e07b39", "#8d6a9f", "#2a9d5c", "#8a8a8a")


def panels(
    columns: int, *, rows: int = 1, width: float = 3.0, height: float = 3.0
) -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, dpi=72
    )
    plt.close(figure)  # the notebook shows the returned figure once; pyplot must not show it again
    return figure, axes


def line_style(number: int) -> dict:
    """Colour, line style and marker of the n-th curve: different without colours as well."""
    line, marker = ("-", "--", "-.", ":")[number % 4], "osD^vPX*hd"[number % 10]
    return {"color": COLORS[number % len(COLORS)], "ls": line, "marker": marker}


def figure_samples(
    images: np.ndarray, titles: Sequence[str], caption: str, *, columns: int = 6
) -> Figure:
    """Grey images [N,1,H,W] or [N,H,W] in [0,1] with their titles."""
    images = np.asarray(images).reshape(len(images), *np.asarray(images).shape[-2:])
    rows = -(-len(images) // columns)
    figure, axes = panels(columns, rows=rows, width=1.7, height=2.2)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=8)
    figure.suptitle(caption, fontsize=9, y=1.0)
    figure.tight_layout()
    return figure


def figure_history(histories: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Training loss and validation AUC per epoch, one line a model."""
    figure, axes = panels(2, width=4.6, height=3.2)
    for number, (name, history) in enumerate(histories.items()):
        axes[0, 0].plot(history.epoch, history.train_loss, ms=3, label=name, **line_style(number))
        axes[0, 1].plot(history.epoch, history.val_auc, ms=3, label=name, **line_style(number))
    axes[0, 0].set(xlabel="epoch", ylabel="training loss (each model's own)", yscale="log")
    axes[0, 1].set(xlabel="epoch", ylabel="validation AUC")
    axes[0, 1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(caption, fontsize=9)
    figure.tight_layout()
    return figure


def figure_roc(labels: np.ndarray, probabilities: Mapping[str, np.ndarray], caption: str) -> Figure:
    """ROC curves on the test split, one a model; of scores [N,K] one a class, against the rest."""
    figure, axes = panels(1, width=4.6, height=4.2)
    curves = {}
    for name, score in probabilities.items():
        if np.ndim(score) == 1:
            curves[name] = labels, score
        else:
            curves |= {
                f"{name}, class {k}": (labels == k, column)
                for k, column in enumerate(np.transpose(score))
            }
    for number, (name, (truth, score)) in enumerate(curves.items()):
        false_alarm, hit, _ = roc_curve(truth, score)
        axes[0, 0].plot(false_alarm, hit, label=name, lw=1.6, **line_style(number) | {"marker": ""})
    axes[0, 0].plot([0, 1], [0, 1], ":", color="0.6")
    axes[0, 0].set(xlabel="1 - specificity", ylabel="sensitivity", title=f"Test ROC\n{caption}")
    axes[0, 0].title.set_fontsize(9)
    axes[0, 0].legend(fontsize=7 if len(curves) < 12 else 6, frameon=False, loc="lower right")
    figure.tight_layout()
    return figure


def figure_confusion(
    labels: np.ndarray, predictions: Mapping[str, np.ndarray], classes: Sequence[str], caption: str
) -> Figure:
    """Confusion matrices (rows truth, columns prediction), one a model."""
    columns = min(4, len(predictions))
    figure, axes = panels(columns, rows=-(-len(predictions) // columns), width=2.3, height=2.4)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, predicted) in zip(axes.flat, predictions.items(), strict=False):
        matrix = confusion_matrix(labels, predicted, labels=range(len(classes)))
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axis.axis("on")
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), number in np.ndenumerate(matrix):
            axis.text(
                j,
                i,
                f"{number}\n{share[i, j]:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if share[i, j] > 0.6 else "black",
            )
        short = [c if len(c) <= 12 else f"{c[:11]}." for c in classes]
        axis.set_xticks(
            range(len(classes)), short, fontsize=7, rotation=0 if len(classes) == 2 else 30
        )
        axis.set_yticks(
            range(len(classes)),
            short,
            fontsize=7,
            rotation=90 if len(classes) == 2 else 0,
            va="center",
        )
        axis.set_title(name, fontsize=8)
    figure.suptitle(f"rows: truth, columns: prediction; {caption}", fontsize=8)
    figure.tight_layout()
    return figure


def figure_accuracy_vs_eps(
    results: pd.DataFrame, caption: str, *, attack: str, unit: str = "pixel", note: str = ""
) -> Figure:
    """Accuracy against eps for all models in one figure, with the interval as a band (of at most seven models)."""
    figure, axes = panels(1, width=6.4, height=3.9)
    chosen = results[
        (results.metric == "accuracy") & (results.eps_unit.eq(unit) | results.attack.eq("clean"))
    ]
    scale = 255 if unit == "pixel" else 1
    names = list(dict.fromkeys(chosen[chosen.attack.eq(attack)].model))
    for number, name in enumerate(names):
        style = line_style(number)
        line = chosen[(chosen.model == name) & chosen.attack.isin(["clean", attack])].sort_values(
            "eps"
        )
        axes[0, 0].plot(line.eps * scale, line.value, ms=4, label=name, **style)
        if len(names) <= 7:  # more bands would hide each other; the tables have every interval
            axes[0, 0].fill_between(
                line.eps * scale, line.ci_low, line.ci_high, color=style["color"], alpha=0.12, lw=0
            )
    xlabel = (
        "eps (k/255, pixel units)"
        if unit == "pixel"
        else "eps (normalised units of the original study)"
    )
    axes[0, 0].set(
        xlabel=xlabel, ylabel="accuracy", ylim=(-0.02, 1.02), title=f"{note or attack}\n{caption}"
    )
    axes[0, 0].title.set_fontsize(9)
    axes[0, 0].grid(alpha=0.25)
    axes[0, 0].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure


def figure_masking(table: pd.DataFrame, caption: str, *, eps: float) -> Figure:
    """Per model: accuracy under PGD with cross-entropy and with the margin loss, and the zero-gradient share.

    `table` is indexed by model with columns `pgd_ce`, `pgd_margin`, `zero_gradients`. A gap between the first
    two bars is the signature of masked gradients (Carlini & Wagner, arXiv 1607.04311).
    """
    figure, axes = panels(1, width=max(7.0, 0.55 * len(table)), height=3.4)
    names = {
        "pgd_ce": "accuracy, PGD cross-entropy",
        "pgd_margin": "accuracy, PGD logit margin",
        "zero_gradients": "share of exactly zero gradients",
    }
    place = np.arange(len(table))
    for offset, (column, label), color in zip(
        (-0.27, 0.0, 0.27), names.items(), COLORS, strict=False
    ):
        axes[0, 0].bar(place + offset, table[column], 0.25, label=label, color=color)
    axes[0, 0].set_xticks(
        place, table.index, fontsize=8, rotation=25, ha="right", rotation_mode="anchor"
    )
    axes[0, 0].set(ylim=(0, 1.02), title=f"eps {eps_text(eps)}; {caption}")
    axes[0, 0].title.set_fontsize(9)
    axes[0, 0].legend(
        fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.28), ncol=3
    )
    figure.tight_layout()
    return figure


def figure_adversarial(
    clean: np.ndarray,
    attacked: Mapping[str, np.ndarray],
    captions: Sequence[Mapping[str, str]],
    caption: str,
) -> Figure:
    """Clean image, attacked images and the amplified difference; `captions[row]` maps column name to its line.

    `clean` [N,1,H,W], each entry of `attacked` the same shape. One row an image.
    """
    columns = ["clean"] + [part for name in attacked for part in (name, f"{name} - clean")]
    figure, axes = panels(len(columns), rows=len(clean), width=1.7, height=2.2)
    for row in range(len(clean)):
        for axis, column in zip(axes[row], columns, strict=True):
            source = attacked.get(column.removesuffix(" - clean"), clean)
            if column.endswith(" - clean"):
                difference = (source[row] - clean[row]).mean(0)
                reach = max(float(np.abs(difference).max()), 1e-6)
                axis.imshow(difference, cmap="RdBu", vmin=-reach, vmax=reach)
            else:
                axis.imshow(source[row].mean(0), cmap="gray", vmin=0, vmax=1)
            axis.set_title(captions[row].get(column, column), fontsize=7)
            axis.axis("off")
    figure.suptitle(caption, fontsize=9, y=1.0)
    figure.tight_layout()
    return figure


def figure_worst_case(found: Evaluation, caption: str) -> Figure:
    """Accuracy against eps (worst case with its band), and which attack fooled the images first.

    `found` is what `attacks.evaluate.robust` returned. An attack's own line is drawn where it was run on
    every image (early_drop=False).
    """
    table, rows, scale = found.table(), found.rows, 255 if found.settings["norm"] == "linf" else 1
    names = [name for name in dict.fromkeys(rows.attack) if name != "worst"]
    figure, axes = panels(2, width=5.6, height=3.9)
    left, right = axes[0]
    x = np.r_[0, table.eps * scale]
    for number, name in enumerate(names[1:] if not found.settings["early_drop"] else []):
        style = line_style(number) | {"marker": "", "lw": 0.9, "alpha": 0.8}
        left.plot(x, np.r_[table.clean[0], table[name]], label=name, **style)
    worst = np.r_[table.clean[0], table.worst]
    left.plot(x, worst, "o-", ms=4, lw=1.8, color="0.2", label="worst case")
    band = [np.r_[table[f"clean_{end}"][0], table[f"worst_{end}"]] for end in ("low", "high")]
    left.fill_between(x, *band, color="0.2", alpha=0.12, lw=0)
    unit = "k/255, pixel units" if scale == 255 else "L2 length, pixel units"
    left.set(xlabel=f"eps ({unit})", ylabel="accuracy", ylim=(-0.02, 1.02))
    left.set_title(f"Worst case over the suite\n{caption}", fontsize=9)
    left.grid(alpha=0.25)
    left.legend(fontsize=7, frameon=False)
    first = rows[rows.fooled & rows.attack.isin(names)].assign(
        turn=lambda t: t.attack.map(names.index)
    )
    first = first.sort_values(["eps", "turn"]).drop_duplicates("image")
    below = np.zeros(len(table))
    for number, name in enumerate([*names, "none"]):
        counts = [(first.attack.eq(name) & first.eps.le(eps)).sum() for eps in table.eps]
        share = 1 - below if name == "none" else np.array(counts) / table.images
        color = {"clean": "0.2", "none": "0.93"}.get(name, COLORS[(number - 1) % len(COLORS)])
        hatch = "//" if number > len(COLORS) and name != "none" else None
        label = {"clean": "wrong from the start", "none": "robust"}.get(name, name)
        right.bar(table.ball, share, bottom=below, color=color, hatch=hatch, label=label)
        below = below + share
    right.set(xlabel="eps", ylabel="share of the images", ylim=(0, 1))
    right.set_title("fooled first by", fontsize=9)
    right.tick_params(axis="x", labelsize=7)
    right.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure
