"""What a training curve says, on curves whose story is known."""

import numpy as np
import pandas as pd
import pytest

from dlia_utils import curves


def history(train_loss, val_loss=None, *, train_accuracy=0.9, val_accuracy=0.9, val_auc=0.9):
    table = pd.DataFrame({"epoch": np.arange(1, len(train_loss) + 1), "train_loss": train_loss})
    table["train_accuracy"] = train_accuracy
    if val_loss is not None:
        table = table.assign(val_loss=val_loss, val_accuracy=val_accuracy, val_auc=val_auc)
    return table


def kinds(table):
    return [sign.split(":")[0] for sign in curves.signs(curves.facts({"a": table}).iloc[0])]


def test_a_smooth_training_shows_no_sign():
    falling = np.linspace(0.7, 0.2, 10)
    assert kinds(history(falling, falling + 0.02)) == []


def test_a_validation_loss_that_rises_again_is_overfitting_and_says_where():
    table = history(np.linspace(0.7, 0.05, 9), [0.7, 0.5, 0.4, 0.41, 0.42, 0.44, 0.46, 0.48, 0.5])
    row = curves.facts({"a": table}).iloc[0]
    assert row["val_loss_epoch"] == 3 and row["val_loss_rise"] == pytest.approx(0.25)
    assert kinds(table) == ["overfitting"] and "epoch 3 and ends 25% higher" in curves.signs(row)[0]


def test_gap_unrest_and_underfitting():
    falling = np.linspace(0.7, 0.6, 8)
    assert kinds(history(falling, falling, train_accuracy=1.0, val_accuracy=0.9)) == ["overfitting"]
    assert kinds(history(falling, [0.5, 0.5, 0.5, 0.5, 0.9, 0.4, 0.9, 0.4])) == ["unrest"]
    assert kinds(history(falling, falling, train_accuracy=0.6, val_accuracy=0.6)) == [
        "underfitting"
    ]


def test_facts_count_falls_and_find_the_best_epoch_first_of_equals():
    row = curves.facts(
        {"a": history([0.7, 0.5, 0.6, 0.4], [0.5] * 4, val_auc=[0.5, 0.9, 0.9, 0.8])}
    ).iloc[0]
    assert (
        row["falls"] == pytest.approx(2 / 3)
        and row["best_epoch"] == 2
        and row["val_auc_last"] == 0.8
    )


def test_a_training_without_validation_and_one_epoch_work():
    read = curves.facts({"final": history([0.7, 0.4]), "one": history([0.7], [0.6])})
    assert (
        read.loc[0, ["best_epoch", "gap", "jumps"]].isna().all() and curves.signs(read.loc[0]) == []
    )
    assert read.loc[1, "epochs"] == 1 and np.isnan(read.loc[1, "falls"])
    with pytest.raises(ValueError, match="'empty' has no epoch"):
        curves.facts({"empty": history([])})


def test_the_figure_draws_training_solid_and_validation_dashed():
    class Config:
        data_name, profile, size = "films", "smoke", 48

    figure = curves.figure_curves(
        {"a": history([0.7, 0.4], [0.6, 0.5]), "final": history([0.6, 0.3])},
        "films, smoke profile, 48 px",
    )
    styles = [[line.get_linestyle() for line in axis.lines] for axis in figure.axes]
    assert styles == [["-", "--", "-"], ["-", "--", "-"], ["--"]]
    assert figure.axes[0].lines[1].get_ydata().tolist() == [0.6, 0.5]
    assert figure.get_size_inches()[0] * 72 <= 900
    alone = curves.figure_curves({"final": history([0.6, 0.3])}, "films, smoke profile, 48 px")
    assert "no validation" in alone.axes[2].texts[0].get_text()
    with pytest.raises(ValueError, match="at least one"):
        curves.figure_curves({}, "films, smoke profile, 48 px")
