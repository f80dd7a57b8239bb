"""Figures of a detection study: one class and eight, one image and many, no prediction at all."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dlia_utils.detect import figures

EIGHT = "Atelectasis Cardiomegaly Effusion Infiltrate Mass Nodule Pneumonia Pneumothorax".split()
ONE = ("fracture",)
SIDE = 96
CAPTION = "nih (SYNTHETIC), smoke profile, 48 px"
pytestmark = [pytest.mark.filterwarnings(f"error::{k}Warning") for k in ("User", "Runtime")]


def boxes(n, classes, images=4, *, seed=0):
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, SIDE / 2, (n, 2)), rng.uniform(5, SIDE / 2, (n, 2))
    table = pd.DataFrame(np.hstack([corner, corner + side]), columns=["x1", "y1", "x2", "y2"])
    table = table.assign(image=rng.integers(0, images, n), score=rng.random(n))
    return table.assign(label=rng.integers(1, len(classes) + 1, n))


def pictures(n):
    return np.random.default_rng(1).integers(0, 255, (n, SIDE, SIDE), dtype=np.uint8)


def one(x1, y1, x2, y2, label=1, **more):
    corners = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    return pd.DataFrame([{"image": 0, **corners, "label": label} | more])


def drawn(figure):
    """All words of a figure that was really drawn."""
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    return " ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


def rectangles(axis):
    return [patch for patch in axis.patches if isinstance(patch, Rectangle)]


def curve(n=30):
    cut = np.linspace(0.01, 0.99, n)
    table = pd.DataFrame({"threshold": cut, "precision": 0.2 + 0.7 * cut, "recall": 1 - cut})
    f1 = 2 * table.precision * table.recall / (table.precision + table.recall)
    return table.assign(f1=f1, fp_per_image=3 * (1 - cut))


VIEWS = pd.DataFrame({"name": ["plain", "all views, wbf"], "value": [0.3, 0.33], "ci_low": 0.2})
VIEWS = VIEWS.assign(ci_high=0.4, difference=[0, 0.03], difference_low=-0.1, difference_high=0.1)


@pytest.mark.parametrize("classes, n, found", [(EIGHT, 4, 60), (ONE, 1, 9), (EIGHT, 2, 0)])
def test_every_figure_is_drawn_and_says_what_data(classes, n, found):
    truth, predictions = boxes(40, classes).drop(columns="score"), boxes(found, classes, seed=3)
    both = [[table[table["image"].eq(row)] for row in range(n)] for table in (truth, predictions)]
    shown = (pictures(n), *both, [f"image {row}" for row in range(n)], classes, CAPTION)
    curves = {name: curve() if found else curve()[:0] for name in classes}
    for figure in (
        figures.figure_boxes(*shown, threshold=0.2),
        figures.figure_boxes(*shown, threshold=0.2, beside=True),
        figures.figure_boxes(*shown, maps=np.random.default_rng(2).random((n, SIDE, SIDE))),
        figures.figure_pr(curves, CAPTION),
        figures.figure_tta(VIEWS, CAPTION),
    ):
        assert CAPTION in drawn(figure)


def test_truth_is_solid_and_predictions_dashed_where_the_table_says():
    tables = [one(10, 20, 40, 60)], [one(12, 22, 42, 62, score=0.87)]
    figure = figures.figure_boxes(pictures(1), *tables, ["a"], ONE, CAPTION)
    truth, prediction = rectangles(figure.axes[0])
    # Pixel i is drawn from i - 0.5 to i + 0.5, so a box from edge 10 starts at 9.5.
    assert truth.get_bbox().extents.tolist() == [9.5, 19.5, 39.5, 59.5]
    assert prediction.get_bbox().extents.tolist() == [11.5, 21.5, 41.5, 61.5]
    assert truth.get_linestyle() in ("-", "solid") and prediction.get_linestyle()[1]
    assert "fracture 0.87" in drawn(figure)
    figure = figures.figure_boxes(pictures(1), *tables, ["a"], ONE, CAPTION, beside=True)
    assert [len(rectangles(axis)) for axis in figure.axes] == [1, 1]
    known = one(1, 1, 9, 9)  # before any training only the truth is shown
    figure = figures.figure_boxes(pictures(1), [known], [known[:0]], ["a"], ONE, CAPTION)
    assert "prediction" not in drawn(figure) and "ground truth" in drawn(figure)


def test_a_crowd_is_cut_and_a_threshold_that_nothing_reaches_is_said():
    crowd, known = boxes(40, ONE, images=1), [one(1, 1, 9, 9)]
    figure = figures.figure_boxes(pictures(1), known, [crowd], ["a"], ONE, CAPTION)
    assert len(rectangles(figure.axes[0])) == 1 + figures.DRAWN
    assert "best 12 of 40 predictions" in drawn(figure)
    shown = pictures(1), known, [crowd], ["a"], ONE, CAPTION
    for cut, said in ((1.1, "no prediction above the threshold"), (np.nan, "no score reaches")):
        figure = figures.figure_boxes(*shown, threshold=cut)
        assert said in drawn(figure) and len(rectangles(figure.axes[0])) == 1


def test_the_best_is_marked_and_what_is_unknown_is_not_it():
    table = curve(3).assign(f1=[0.33, 0.65, 0.18], threshold=[0.1, 0.4, 0.8])
    assert "F1 0.65 at 0.40" in drawn(figures.figure_pr({"a": table}, CAPTION))
    nothing = curve(3).assign(recall=np.nan, f1=np.nan)
    assert "a: no true box" in drawn(figures.figure_pr({"a": nothing}, CAPTION))
