"""Figures of a detection study: for one class and eight, one film and many, and no prediction at all."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dlia_utils import report
from dlia_utils.detect import figures

EIGHT = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltrate",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
)
ONE = ("fracture",)
SIDE = 96


@dataclass
class FakeConfig:
    """The fields of a Config that the figures read."""

    run_dir: Path
    profile: str = "smoke"
    size: int = SIDE
    data_name: str = "nih (SYNTHETIC)"
    caption: str = "nih (SYNTHETIC), smoke profile, 48 px"


@pytest.fixture
def config(tmp_path):
    return FakeConfig(tmp_path)


@pytest.fixture(autouse=True)
def _no_warning():
    with warnings.catch_warnings():
        # A failed layout, an empty slice, a pandas call that will change; not what matplotlib itself still uses.
        for kind in (UserWarning, RuntimeWarning, FutureWarning):
            warnings.simplefilter("error", kind)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def boxes(n, classes, images=4, *, score=False, seed=0):
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, SIDE / 2, (n, 2)), rng.uniform(5, SIDE / 2, (n, 2))
    table = pd.DataFrame(np.hstack([corner, corner + side]), columns=figures.CORNERS)
    table.insert(0, "image", rng.integers(0, images, n))
    table["label"] = rng.integers(1, len(classes) + 1, n)
    return table.assign(score=rng.random(n)) if score else table


def films(n):
    return np.random.default_rng(1).integers(0, 255, (n, SIDE, SIDE), dtype=np.uint8)


def words(figure):
    return " ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


def rectangles(axis):
    return [patch for patch in axis.patches if isinstance(patch, Rectangle)]


def pr_curve(n=30):
    cut = np.linspace(0.01, 0.99, n)
    precision, recall = 0.2 + 0.7 * cut, 1 - cut
    return pd.DataFrame(
        {
            "threshold": cut,
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
        }
    )


def every_figure(config, classes, *, n_films, found):
    """All figures on the same tables; `found` is the number of predictions."""
    truth, predictions = boxes(40, classes), boxes(found, classes, score=True, seed=3)
    rows = range(n_films)
    by_row, guessed = figures.boxes_by_image(truth, rows), figures.boxes_by_image(predictions, rows)
    titles, images = [f"film {row}" for row in rows], films(n_films)
    froc = pd.DataFrame({"fp_per_image": [0, 0.1, 1, 3.0], "sensitivity": [0, 0.2, 0.5, 0.6]})
    sweep = pr_curve().assign(mAP50=np.linspace(0.2, 0.1, 30))
    table = pd.DataFrame({"name": ["plain", "all views, wbf"], "value": [0.3, 0.33]})
    table = table.assign(
        ci_low=0.2,
        ci_high=0.4,
        difference=[0, 0.03],
        difference_low=[0, -0.1],
        difference_high=[0, 0.1],
    )
    history = pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "lr": [1e-3, 5e-3, 1e-5],
            "train_loss": [1.5, 0.8, 0.6],
            "loss_classifier": [0.7, 0.3, 0.2],
            "val_mAP50": [0.1, np.nan, 0.3],
        }
    )
    manifest = pd.DataFrame({"patient": ["a", "a", "b", None]})
    cut = froc if found else froc.iloc[:0]
    yield "classes", figures.figure_classes(truth, classes, config.caption)
    yield "patients", figures.figure_patients(manifest, config.caption)
    for beside in (False, True):
        yield (
            f"boxes{beside}",
            figures.figure_boxes(
                images,
                by_row,
                guessed,
                titles,
                classes,
                config.caption,
                threshold=0.2,
                beside=beside,
            ),
        )
    yield "froc", figures.figure_froc({name: cut for name in classes}, config.caption)
    yield (
        "pr",
        figures.figure_pr(
            {name: pr_curve() if found else pr_curve().iloc[:0] for name in classes}, config.caption
        ),
    )
    yield (
        "thresholds",
        figures.figure_thresholds(
            sweep, {"threshold": 0.4, "f1": 0.5, "fp_per_image": 1.0}, config.caption
        ),
    )
    yield (
        "confidence",
        figures.figure_confidence(
            predictions, config.caption, hits=predictions.score.to_numpy() > 0.6
        ),
    )
    yield "scores", figures.figure_confidence(predictions, config.caption)
    yield (
        "per_image",
        figures.figure_per_image(predictions, range(6), config.caption, threshold=0.3),
    )
    yield "tta", figures.figure_tta(table, config.caption)
    yield "training", figures.figure_training(history, config.caption)
    yield (
        "localisation",
        figures.figure_localisation(
            images,
            np.random.default_rng(2).random((n_films, 12, 12)),
            by_row,
            guessed,
            classes,
            config.caption,
        ),
    )


@pytest.mark.parametrize("classes, n_films, found", [(EIGHT, 4, 60), (ONE, 1, 9), (EIGHT, 2, 0)])
def test_every_figure_is_drawn_and_says_what_data(config, classes, n_films, found):
    for name, figure in every_figure(config, classes, n_films=n_films, found=found):
        assert isinstance(figure, Figure), name
        assert "SYNTHETIC" in words(figure), name
        figure.canvas.draw()


def test_no_boxes_at_all_and_a_first_epoch(config):
    empty = boxes(0, EIGHT)
    figure = figures.figure_classes(empty, EIGHT, config.caption)
    assert report.save_figure(figure, config, "classes").stat().st_size > 2000
    first = pd.DataFrame({"epoch": [1], "train_loss": [1.0], "val_mAP50": [np.nan]})
    figures.figure_training(first, config.caption).canvas.draw()


# ------------------------------------------------------------------------------------------- films


def one(x1, y1, x2, y2, label=1, **more):
    return pd.DataFrame(
        [{"image": 0, "x1": x1, "y1": y1, "x2": x2, "y2": y2, "label": label} | more]
    )


def test_truth_is_solid_and_predictions_dashed_where_the_table_says(config):
    figure = figures.figure_boxes(
        films(1)[0],
        [one(10, 20, 40, 60)],
        [one(12, 22, 42, 62, score=0.87)],
        ["a"],
        ONE,
        config.caption,
    )
    truth, prediction = rectangles(figure.axes[0])
    # Pixel i is drawn from i - 0.5 to i + 0.5, so a box from edge 10 starts at 9.5.
    assert truth.get_bbox().extents.tolist() == [
        9.5,
        19.5,
        39.5,
        59.5,
    ] and truth.get_linestyle() in ("-", "solid")
    assert prediction.get_bbox().extents.tolist() == [11.5, 21.5, 41.5, 61.5]
    assert prediction.get_linestyle() not in ("-", "solid")
    assert "fracture 0.87" in words(figure)


def test_beside_separates_truth_from_predictions(config):
    tables = [one(10, 20, 40, 60)], [one(12, 22, 42, 62, score=0.87)]
    figure = figures.figure_boxes(films(1), *tables, ["a"], ONE, config.caption, beside=True)
    assert [len(rectangles(axis)) for axis in figure.axes] == [1, 1]
    assert figure.axes[0].get_title() == "a, truth" and figure.axes[1].get_title() == "predictions"


def test_four_films_stand_two_by_two(config):
    tables = [one(1, 1, 9, 9)] * 4, [one(1, 1, 9, 9, score=0.5)] * 4
    grid = (
        figures.figure_boxes(films(4), *tables, list("abcd"), ONE, config.caption)
        .axes[0]
        .get_gridspec()
    )
    assert grid.get_geometry() == (2, 2)


def test_thresholds_by_class_and_a_crowd_are_cut_and_said(config):
    found = pd.concat([one(5, 5, 20, 20, 1, score=0.3), one(30, 30, 60, 60, 2, score=0.3)])
    figure = figures.figure_boxes(
        films(1),
        [one(1, 1, 9, 9)],
        [found],
        ["a"],
        ("x", "y"),
        config.caption,
        threshold={1: 0.5, 2: 0.2},
    )
    assert "y 0.30" in words(figure) and "x 0.30" not in words(figure)
    crowd = boxes(40, ONE, images=1, score=True)
    figure = figures.figure_boxes(films(1), [one(1, 1, 9, 9)], [crowd], ["a"], ONE, config.caption)
    assert len(rectangles(figure.axes[0])) == 1 + figures.DRAWN
    assert "best 12 of 40 predictions" in figure.axes[0].get_title()
    none = figures.figure_boxes(
        films(1), [one(1, 1, 9, 9)], [crowd], ["a"], ONE, config.caption, threshold=1.1
    )
    assert "no prediction above the threshold" in none.axes[0].get_title()


def test_before_any_training_only_the_truth_is_shown(config):
    known = one(1, 1, 9, 9)
    figure = figures.figure_boxes(
        films(2), [known] * 2, [known.iloc[:0]] * 2, ["a", "b"], ONE, config.caption
    )
    assert "prediction" not in words(figure) and "ground truth" in words(figure)


def test_a_threshold_that_no_score_reaches_is_said(config):
    found = one(1, 1, 9, 9, score=1.0)
    figure = figures.figure_boxes(
        films(1), [found], [found], ["a"], ONE, config.caption, threshold=np.nan
    )
    assert "no score reaches" in words(figure) and len(rectangles(figure.axes[0])) == 1
    assert "100% of 2 images" in words(
        figures.figure_per_image(found, [0, 1], config.caption, threshold=np.nan)
    )
    best = {"threshold": np.nan, "f1": 0.0, "fp_per_image": 0.0}
    figure = figures.figure_thresholds(pr_curve().assign(mAP50=0.0), best, config.caption)
    assert "no cut keeps a true positive" in words(figure)


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (SIDE, SIDE // 2)])
def test_labels_lie_on_the_film_and_not_on_each_other(config, shape):
    high, wide = shape
    found = pd.concat(
        [
            one(0, 0, 20, 15, score=0.9),
            one(1, 1, 22, 17, score=0.8),
            one(wide - 9, high - 9, wide, high, score=0.7),
        ]
    )
    figure = figures.figure_boxes(
        np.zeros(shape), [one(0, 0, 21, 16)], [found], ["a"], ONE, config.caption
    )
    figure.canvas.draw()
    axis = figure.axes[0]
    labels = [
        text
        for text in axis.findobj(lambda a: hasattr(a, "get_text"))
        if "fracture" in text.get_text()
    ]
    spots = [text.get_window_extent() for text in labels]
    assert len(spots) == 4
    frame = axis.get_window_extent()
    for number, spot in enumerate(spots):
        assert (
            frame.x0 - 1 <= spot.x0
            and spot.x1 <= frame.x1 + 1
            and frame.y0 - 1 <= spot.y0
            and spot.y1 <= frame.y1 + 1
        )
        assert not any(spot.overlaps(other) for other in spots[number + 1 :])


def test_films_tables_and_titles_must_fit(config):
    table = one(1, 1, 9, 9)
    with pytest.raises(ValueError, match="'titles': 1"):
        figures.figure_boxes(
            films(2), [table] * 2, [table.assign(score=1)] * 2, ["a"], ONE, config.caption
        )
    with pytest.raises(ValueError, match=r"\[0,1\]"):
        figures.figure_boxes(
            films(1).astype(float), [table], [table.assign(score=1)], ["a"], ONE, config.caption
        )
    with pytest.raises(ValueError, match="0 is background"):
        figures.figure_boxes(
            films(1), [table.assign(label=0)], [table.assign(score=1)], ["a"], ONE, config.caption
        )
    with pytest.raises(ValueError, match="0 is background"):
        figures.figure_classes(table.assign(label=0), ONE, config.caption)
    with pytest.raises(ValueError, match="hits has 2"):
        figures.figure_confidence(table.assign(score=1.0), config.caption, hits=np.ones(2, bool))


def test_boxes_by_image_keeps_order_scales_and_leaves_the_table_alone():
    table = pd.concat([one(2, 4, 6, 8), one(1, 1, 3, 3).assign(image=5)], ignore_index=True)
    before = table.copy()
    found = figures.boxes_by_image(
        table, np.array([5, 9, 0]), scale=np.array([[2, 1], [1, 1], [0.5, 0.25]])
    )
    assert [len(part) for part in found] == [1, 0, 1]
    assert found[0][figures.CORNERS].values.tolist() == [[2, 1, 6, 3]]
    assert found[2][figures.CORNERS].values.tolist() == [[1, 1, 3, 2]]
    assert list(found[1].columns) == list(table.columns)
    pd.testing.assert_frame_equal(table, before)
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        figures.boxes_by_image(table, [5, 9, 0], scale=np.ones((2, 2)))


# ------------------------------------------------------------------------------------------- curves


def test_froc_points_take_the_best_sensitivity_within_the_allowance(config):
    curve = pd.DataFrame(
        {"fp_per_image": [0.0, 0.25, 0.9, 2.0], "sensitivity": [0.1, 0.3, 0.5, 0.8]}
    )
    figure = figures.figure_froc({"a": curve}, config.caption)
    marked = [
        line
        for line in figure.axes[0].lines
        if line.get_marker() == "o" and len(line.get_xdata()) == 7
    ]
    assert marked[0].get_xdata().tolist() == list(figures.FROC_POINTS)
    assert marked[0].get_ydata().tolist() == [0.1, 0.3, 0.3, 0.5, 0.8, 0.8, 0.8]
    assert f"mean {np.mean([0.1, 0.3, 0.3, 0.5, 0.8, 0.8, 0.8]):.3f}" in words(figure)


def test_the_best_f1_is_marked(config):
    curve = pd.DataFrame(
        {
            "threshold": [0.1, 0.4, 0.8],
            "precision": [0.2, 0.6, 0.9],
            "recall": [0.9, 0.7, 0.1],
            "f1": [0.33, 0.65, 0.18],
        }
    )
    assert "F1 0.65 at 0.40" in words(figures.figure_pr({"a": curve}, config.caption))
    best = {"threshold": 0.4, "f1": 0.65, "fp_per_image": 1.5}
    figure = figures.figure_thresholds(
        curve.assign(mAP50=[0.3, 0.2, 0.1]), pd.Series(best), config.caption
    )
    assert "best F1 0.65 at 0.40: 1.5 false positives" in words(
        figure
    ) and "can only lower" in words(figure)


def test_a_class_without_a_true_box_has_no_score(config):
    curve = pr_curve(3).assign(
        recall=np.nan, f1=np.nan, sensitivity=np.nan, fp_per_image=[0.1, 0.2, 0.3]
    )
    assert "a (no true box)" in words(figures.figure_froc({"a": curve}, config.caption))
    assert "a: no true box" in words(figures.figure_pr({"a": curve}, config.caption))


def test_images_without_a_prediction_count(config):
    found = pd.concat([one(1, 1, 5, 5, score=0.9), one(2, 2, 6, 6, score=0.1)])
    figure = figures.figure_per_image(found, [0, 7, 8, 9], config.caption, threshold=0.5)
    heights = {
        round(p.get_x() + p.get_width() / 2): p.get_height() for p in rectangles(figure.axes[0])
    }
    assert heights == {0: 3, 1: 1} and "75% of 4 images" in words(figure)


def test_the_best_epoch_is_marked_and_an_unmeasured_one_is_not_it(config):
    history = pd.DataFrame(
        {"epoch": [1, 2, 3], "train_loss": [3.0, 2, 1], "val_mAP50": [0.2, np.nan, 0.1]}
    )
    assert "best: 0.200 in epoch 1" in words(figures.figure_training(history, config.caption))


# ------------------------------------------------------------------------------------------- table


def test_per_class_table_has_a_row_for_every_class():
    ap = pd.DataFrame(
        [
            {"label": 0, "metric": "AP50", "value": 0.35, "ci_low": 0.3, "ci_high": 0.4},
            {"label": 1, "metric": "AP50", "value": 0.5, "ci_low": 0.4, "ci_high": 0.6},
            {"label": 1, "metric": "AP", "value": 0.2, "ci_low": 0.1, "ci_high": 0.3},
            {"label": 2, "metric": "AP50", "value": np.nan, "ci_low": np.nan, "ci_high": np.nan},
        ]
    )
    best = pd.DataFrame(
        {"label": [3, 1], "threshold": [0.2, 0.3], "precision": 0.81234, "recall": 0.4, "f1": 0.5}
    )
    truth = pd.DataFrame({"image": [0, 0, 4, 4], "label": [1, 1, 1, 3]})
    table = figures.per_class_table(ap, best, truth, ["a", "b", "c"]).set_index("class")
    assert list(table.columns) == [
        "boxes",
        "images",
        "AP50",
        "threshold",
        "precision",
        "recall",
        "F1",
    ]
    assert table["AP50"].tolist() == ["0.500 [0.400, 0.600]", "-", "-"]
    assert table["boxes"].tolist() == [3, 0, 1] and table["images"].tolist() == [2, 0, 1]
    assert (
        table.loc["c", "threshold"] == 0.2
        and np.isnan(table.loc["b", "F1"])
        and table.loc["a", "precision"] == 0.812
    )
    with pytest.raises(ValueError, match="AP75.*'AP', 'AP50'"):
        figures.per_class_table(ap, best, truth, ["a"], metric="AP75")


def test_a_missing_column_is_named(config):
    history = pd.DataFrame({"epoch": [1], "train_loss": [1.0], "val_auc": [0.5]})
    with pytest.raises(ValueError, match="val_mAP50.*val_auc"):
        figures.figure_training(history, config.caption)
    with pytest.raises(ValueError, match="'a'.*sensitivity"):
        figures.figure_froc({"a": pd.DataFrame({"fp_per_image": [1.0]})}, config.caption)
