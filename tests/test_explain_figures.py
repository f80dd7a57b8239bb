"""Figures of maps: what is drawn where, every number one of the table's, no text on another."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from dlia_utils.explain import figures
from dlia_utils.explain.base import REFERENCES
from dlia_utils.explain.figures import Picture

SIDE, CAPTION = 24, "fracatlas (SYNTHETIC), smoke profile"
pytestmark = [
    pytest.mark.filterwarnings(f"error::{kind}")
    for kind in ("UserWarning", "RuntimeWarning", "FutureWarning")
]


def images(count):
    return torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def heats(count, *, zero=()):
    maps = np.random.default_rng(1).random((count, SIDE, SIDE))
    maps[list(zero)] = 0
    return maps


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text))


def shown(figure):
    return [axis for axis in figure.axes if axis.axison]


def clean(figure):
    """Whether all titles and headings stand in the figure and none on another."""
    figure.draw_without_rendering()  # the canvas of a closed figure draws nothing
    texts = [figure._suptitle, *(axis.title for axis in shown(figure))]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [text.get_window_extent() for text in texts if text.get_text().strip()]
    inside = all(box.x0 > -1 and box.x1 < figure.bbox.x1 + 1 for box in boxes)
    below = all(box.y0 > -1 and box.y1 < figure.bbox.y1 + 1 for box in boxes)
    pairs = [(a, b) for k, a in enumerate(boxes) for b in boxes[k + 1 :]]
    return inside and below and not any(a.shrunk(0.96, 0.9).overlaps(b) for a, b in pairs)


def test_overlays_tint_what_is_hot_line_the_hottest_and_name_zero_maps():
    maps = {name: heats(2, zero=[1] if name == "d_d" else []) for name in ("a", "b", "c", "d_d")}
    boxes, x = [pd.DataFrame([{"x1": 2.0, "y1": 4.0, "x2": 10.0, "y2": 9.0}])] * 2, images(2)
    options = {"captions": ["IMG0003298.jpg, read as not fractured", "two"], "caption": CAPTION}
    figure = figures.figure_overlays(x, maps, boxes=boxes, **options)
    axes = np.reshape(figure.axes, (2, 5))  # a line an image
    assert [axis.get_title() for axis in axes[0]] == ["input", "a", "b", "c", "d d"]
    assert axes[1, 4].get_title() == "d d\nzero map"
    grey, over, zero = axes[0, 0], axes[0, 1], axes[1, 4]
    image, heat = x[0, 0].double(), maps["a"][0]
    for axis, expected in ((grey, [image]), (over, [image, heat])):
        for drawn, values in zip(axis.images, expected, strict=True):
            np.testing.assert_array_equal(drawn.get_array(), values)
            assert drawn.get_clim() == (0, 1)
    np.testing.assert_allclose(over.images[1].get_alpha(), 0.7 * np.asarray(heat))
    assert len(over.collections) == 1 and not grey.collections and not zero.collections
    for axis in (grey, over):
        (frame,) = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
        # Pixel i is drawn from i - 0.5 to i + 0.5, so a box from edge 2 starts at 1.5.
        assert frame.get_bbox().extents.tolist() == [1.5, 3.5, 9.5, 8.5]
    assert "SYNTHETIC" in words(figure) and clean(figure) and figure.get_figwidth() * 72 <= 900


def test_a_small_map_covers_its_image_and_lines_may_be_shorter():
    x = images(1)[0]
    lines = [("clean\nNORMAL", [Picture("image", x), Picture("layer4", x, np.eye(3), 0.5)])]
    figure = figures.figure_grid([*lines, ("contrast", [Picture("", x)])], CAPTION)
    over = figure.axes[1].images[1]
    np.testing.assert_array_equal(over.get_alpha(), 0.5 * np.eye(3))
    assert list(over.get_extent()) == [-0.5, 23.5, 23.5, -0.5]
    assert figure.axes[0].get_ylabel() == "clean\nNORMAL" and not figure.axes[3].images
    assert clean(figure)


def test_the_forest_has_every_value_with_its_interval_and_references_grey():
    names = ["mine", "none", *REFERENCES]
    rows = [(score, name) for score in ("auprc", "pointing") for name in names]
    table = pd.DataFrame(rows, columns=["score", "map"])
    table = table.assign(value=np.linspace(0.4, 0.9, 10), ci_low=0.3, ci_high=0.95)
    table = table.set_axis([0] * 10)  # as tables that were joined may be
    figure = figures.figure_forest(table, CAPTION, panel="score", row="map", chance="random")
    assert figure.axes[0].get_title() == f"AUPRC\nhighest: {names[-1]}"
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == names
    for axis, (_, part) in zip(figure.axes, table.groupby("score", sort=False), strict=True):
        bars, dots = axis.collections
        ends = np.array([segment[:, 0] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, part[["ci_low", "ci_high"]])
        np.testing.assert_allclose(dots.get_offsets(), np.c_[part["value"], range(5)])
        assert [to_hex(c) == "#8c8c8c" for c in bars.get_colors()] == [False] * 2 + [True] * 3
        assert axis.lines[0].get_xdata()[0] == part.set_index("map").loc["random", "value"]
    assert not figure.legends[0].get_texts() and clean(figure)


def test_series_of_a_forest_stand_beside_one_another_and_panels_share_their_axis():
    rows = [(r, p, m) for r in ("within", "mixed") for p in ("drift", "p_shift") for m in "ab"]
    table = pd.DataFrame(rows, columns=["reading", "predictor", "model"])
    table = table.assign(value=np.linspace(0.4, 0.9, 8), ci_low=0.3, ci_high=0.95)
    options = {"panel": "reading", "row": "predictor", "series": "model", "chance": 0.5}
    figure = figures.figure_forest(table, CAPTION, **options)
    first, second = shown(figure)
    assert first.get_xlim() == second.get_xlim() and first.lines[0].get_xdata()[0] == 0.5
    dots = [part.get_offsets() for part in first.collections[1::2]]
    np.testing.assert_allclose(np.array(dots)[:, :, 1], [[-0.1, 0.9], [0.1, 1.1]])
    np.testing.assert_allclose(dots[0][:, 0], table["value"].iloc[[0, 2]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert clean(figure)


def test_randomisation_has_a_curve_a_method_and_another_image_s_level_dotted():
    table = pd.DataFrame({"layers": [0, 3, 6, 0], "down_to": ["none", "b", "a", "another image"]})
    table = table.assign(zero=[0, 0, 2, 0], spearman=[1, 0.5, 0.1, 0.2], ssim=[1, 0.6, 0.3, 0.35])
    tables = {"gradcam": table, "saliency": table.iloc[:3].assign(zero=0, spearman=[1, 0.2, 0.1])}
    figure = figures.figure_randomisation(tables, CAPTION)
    for axis, score in zip(figure.axes, ("spearman", "ssim"), strict=True):
        curve, level, other = axis.lines
        assert list(curve.get_xdata()) == [0, 3, 6]
        assert list(curve.get_ydata()) == table[score].tolist()[:3]
        assert list(level.get_ydata()) == [table[score].iloc[3]] * 2
        assert level.get_color() == curve.get_color() != other.get_color()
    assert "gradcam (up to 2 zero maps)" in words(figure) and clean(figure)
