"""Training curves: drawn, and read by rules that stand here, so that a sentence about a curve can be checked."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .plots import COLORS, panels

RISE = 0.1  # of the lowest validation loss: a later loss that is so much higher is a sign of overfitting
GAP = 0.05  # training accuracy above validation accuracy
JUMPS = 0.25  # mean step of the validation loss from epoch to epoch, as a share of its median
WEAK = 0.8  # a training accuracy below this, while the loss still falls, is a sign of underfitting


def facts(histories: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """What the curves of some trainings say: one row a training, in numbers.

    `histories` are those of `train.fit`, or its metrics.csv, by name. Columns run, epochs, train_loss_first,
    train_loss_last, falls (share of the epochs after the first whose training loss was lower than the one before),
    train_accuracy_last; and, NaN without validation, best_epoch (of val_auc), val_auc_best, val_auc_last,
    val_loss_epoch (of the lowest), val_loss_rise (last over lowest, minus 1), gap (training minus validation accuracy
    in the last epoch) and jumps (mean step of the validation loss in the second half, as a share of its median).
    Errors: ValueError for a history without epochs.

    >>> history = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [0.7, 0.4, 0.1], "train_accuracy": [0.6, 0.8, 1.0],
    ...                         "val_loss": [0.6, 0.5, 0.8], "val_accuracy": 0.75, "val_auc": [0.7, 0.9, 0.8]})
    >>> facts({"a": history})[["falls", "best_epoch", "val_loss_rise", "gap"]].round(2).values.tolist()
    [[1.0, 2.0, 0.6, 0.25]]
    """
    rows = []
    for name, history in histories.items():
        if not len(history):
            raise ValueError(f"the history of {name!r} has no epoch: was it trained?")
        loss = history["train_loss"].to_numpy(float)
        row = {
            "run": name,
            "epochs": len(history),
            "train_loss_first": loss[0],
            "train_loss_last": loss[-1],
            "falls": float((np.diff(loss) < 0).mean()) if len(loss) > 1 else np.nan,
            "train_accuracy_last": history["train_accuracy"].iloc[-1],
        }
        rows.append(row | (_of_validation(history) if "val_loss" in history else {}))
    columns = [
        "run",
        "epochs",
        "train_loss_first",
        "train_loss_last",
        "falls",
        "train_accuracy_last",
        "best_epoch",
        "val_auc_best",
        "val_auc_last",
        "val_loss_epoch",
        "val_loss_rise",
        "gap",
        "jumps",
    ]
    return pd.DataFrame(rows).reindex(columns=columns)


def _of_validation(history: pd.DataFrame) -> dict[str, float]:
    loss, auc = history["val_loss"].to_numpy(float), history["val_auc"].to_numpy(float)
    later = loss[len(loss) // 2 :] if len(loss) > 3 else loss
    known = np.isfinite(auc).any()
    return {
        "best_epoch": float(history["epoch"].iloc[np.nanargmax(auc)]) if known else np.nan,
        "val_auc_best": float(np.nanmax(auc)) if known else np.nan,
        "val_auc_last": auc[-1],
        "val_loss_epoch": float(history["epoch"].iloc[loss.argmin()]),
        "val_loss_rise": loss[-1] / loss.min() - 1,
        "gap": history["train_accuracy"].iloc[-1] - history["val_accuracy"].iloc[-1],
        "jumps": float(np.abs(np.diff(later)).mean() / np.median(later))
        if len(later) > 1
        else np.nan,
    }


def signs(row: Mapping) -> list[str]:
    """The signs of overfitting, unrest and underfitting in a row of `facts`, each with its number and rule.

    >>> calm = {"val_loss_rise": 0.0, "gap": 0.0, "jumps": 0.1, "train_accuracy_last": 0.9, "falls": 1.0,
    ...         "val_loss_epoch": 9, "epochs": 9}
    >>> signs(calm), [sign.split(":")[0] for sign in signs(calm | {"gap": 0.2, "jumps": 0.5})]
    ([], ['overfitting', 'unrest'])
    """
    found = []
    if row["val_loss_rise"] > RISE:
        found.append(
            f"overfitting: the validation loss was lowest in epoch {row['val_loss_epoch']:.0f} and ends "
            f"{row['val_loss_rise']:.0%} higher (rule: more than {RISE:.0%})"
        )
    if row["gap"] > GAP:
        found.append(
            f"overfitting: training accuracy ends {row['gap']:.3f} above validation accuracy (rule: more than {GAP})"
        )
    if row["jumps"] > JUMPS:
        found.append(
            f"unrest: the validation loss moves by {row['jumps']:.0%} of its median from epoch to epoch (rule: more "
            f"than {JUMPS:.0%})"
        )
    if row["train_accuracy_last"] < WEAK and row["falls"] > 0.5:
        found.append(
            f"underfitting: training accuracy ends at {row['train_accuracy_last']:.3f} while the loss mostly falls "
            f"(rule: below {WEAK})"
        )
    return found


def figure_curves(histories: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Loss, accuracy and validation AUC per epoch; training solid, validation dashed, one colour a training."""
    if not histories:
        raise ValueError("there is no history to show: give at least one")
    figure, axes = panels(3, width=3.9, height=3.3)
    for number, (name, history) in enumerate(histories.items()):
        color, epoch = COLORS[number % len(COLORS)], history["epoch"]
        for axis, column in ((axes[0, 0], "loss"), (axes[0, 1], "accuracy")):
            axis.plot(epoch, history[f"train_{column}"], "o-", ms=3, color=color, label=name)
            if f"val_{column}" in history:
                axis.plot(epoch, history[f"val_{column}"], "s--", ms=3, color=color, alpha=0.7)
        if "val_auc" in history:
            axes[0, 2].plot(epoch, history["val_auc"], "s--", ms=3, color=color, alpha=0.7)
    for axis, title in zip(axes[0], ("loss", "accuracy", "validation AUC"), strict=True):
        axis.set(xlabel="epoch", ylabel=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
    if not any("val_auc" in history for history in histories.values()):
        axes[0, 2].set_axis_off()
        axes[0, 2].text(
            0.5, 0.5, "no validation:\nall films train", ha="center", va="center", fontsize=9
        )
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"solid: training, dashed: validation; {caption}", fontsize=9)
    figure.tight_layout()
    return figure
