"""Figures of maps: what is drawn where, what is said of zero maps and empty groups, what is refused."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from dlia_utils.explain import figures
from dlia_utils.explain.localisation import localise

SIDE = 24
CONFIG = SimpleNamespace(
    profile="smoke", size=SIDE, data_name="fracatlas (SYNTHETIC)"
)  # what the figures read
pytestmark = [
    pytest.mark.filterwarnings(f"error::{kind}")
    for kind in ("UserWarning", "RuntimeWarning", "FutureWarning")
]


def films(count):
    return torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def heats(count, *, zero=()):
    maps = np.random.default_rng(1).random((count, SIDE, SIDE))
    maps[list(zero)] = 0
    return maps


def words(figure):
    return " ".join(
        text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))
    )


def panels(figure):
    return [axis for axis in figure.axes if axis.get_subplotspec() is not None]


def test_one_film_is_a_row_of_input_map_and_overlay_with_its_boxes():
    maps, table = heats(1), pd.DataFrame([{"x1": 2.0, "y1": 4.0, "x2": 10.0, "y2": 9.0}])
    x = films(1)
    figure = figures.figure_overlays(
        x, {"gradcam": maps}, captions=["a"], caption=CONFIG.caption, boxes=[table]
    )
    film, alone, over = panels(figure)
    assert [axis.get_title() for axis in (film, alone, over)] == ["a", "gradcam", "overlay"]
    np.testing.assert_array_equal(film.images[0].get_array(), x[0, 0].double())
    np.testing.assert_array_equal(alone.images[0].get_array(), maps[0])
    below, above = over.images
    np.testing.assert_array_equal(below.get_array(), x[0, 0].double())
    np.testing.assert_array_equal(above.get_array(), maps[0])
    assert above.get_alpha() == 0.4 and above.get_clim() == alone.images[0].get_clim() == (0, 1)
    for axis in (film, over):
        (frame,) = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
        # Pixel i is drawn from i - 0.5 to i + 0.5, so a box from edge 2 starts at 1.5.
        assert frame.get_bbox().extents.tolist() == [1.5, 3.5, 9.5, 8.5]
    assert not alone.patches and "SYNTHETIC" in words(figure)


def test_a_mask_is_outlined_where_it_lies_and_at_the_border_too():
    mask = np.zeros((SIDE, SIDE), bool)
    mask[0:5, 10:20] = True
    figure = figures.figure_overlays(
        films(2), {"m": heats(2)}, captions="ab", caption=CONFIG.caption, boxes=[mask, None]
    )
    first, second = panels(figure)[0], panels(figure)[3]
    (line,) = first.collections
    corners = np.concatenate([path.vertices for path in line.get_paths()])
    assert corners.min(0).tolist() == [9.5, -0.5] and corners.max(0).tolist() == [19.5, 4.5]
    assert not second.collections
    assert first.get_xlim() == (-0.5, SIDE - 0.5) and first.get_ylim() == (SIDE - 0.5, -0.5)


def test_five_methods_take_two_lines_a_film_and_fit_a_notebook():
    maps = {name: heats(2) for name in "abcde"}
    figure = figures.figure_overlays(
        films(2), maps, captions=["one", "two"], caption=CONFIG.caption
    )
    assert panels(figure)[0].get_gridspec().get_geometry() == (4, 7)
    assert figure.get_figwidth() * 72 <= 900
    shown = [axis.get_title() for axis in panels(figure) if axis.images]
    assert [title for title in shown if title != "overlay"] == ["one", *"abcde", "two", *"abcde"]
    assert shown.count("overlay") == 10


def test_zero_maps_are_called_so_and_signed_maps_have_colours_of_their_own():
    signed = heats(2) * 2 - 1
    maps = {"gradcam": heats(2, zero=[1]), "deeplift": signed}
    figure = figures.figure_overlays(
        films(2), maps, captions="ab", caption=CONFIG.caption, signed=["deeplift"]
    )
    titles = [axis.get_title() for axis in panels(figure)]
    assert titles[1] == "gradcam" and titles[6] == "gradcam\nzero map"
    looks = {axis.get_title(): axis.images[0].get_clim() for axis in panels(figure)}
    assert looks["deeplift"] == (-1, 1) and looks["gradcam"] == (0, 1)
    assert len(figure.axes) - len(panels(figure)) == 2  # a colour bar each
    figure.canvas.draw()


def test_a_long_caption_is_wrapped_and_no_title_meets_a_film():
    captions = ["IMG0003298.jpg: fractured, read as not fractured, probability 0.0312", "b"]
    figure = figures.figure_overlays(
        films(2), {name: heats(2) for name in "abc"}, captions=captions, caption=CONFIG.caption
    )
    figure.canvas.draw()
    boxes = [axis.get_window_extent() for axis in panels(figure)]
    for axis in panels(figure):
        place = axis.title.get_window_extent()
        assert axis.get_title().strip() and not any(box.overlaps(place) for box in boxes), (
            axis.get_title()
        )
        assert figure.bbox.y1 >= place.y1


def test_overlays_refuse_what_does_not_fit():
    def draw(maps, **more):
        options = {"captions": ["a", "b"], "config": CONFIG} | more
        figures.figure_overlays(films(2), maps, **options)

    for maps, more, message in [
        ({"m": heats(3)}, {}, "m maps are .3, 24, 24.*resize or select"),
        ({"m": heats(2) * 3}, {}, r"m maps leave \[0,1\]: pass Attribution.heat"),
        ({"m": heats(2) - 0.5}, {}, "name them in signed"),
        ({"m": heats(2) * np.nan}, {}, "leave"),
        ({"m": heats(2)}, {"captions": ["a"]}, "captions"),
        ({"m": heats(2)}, {"boxes": [None]}, "boxes"),
        ({"m": heats(2)}, {"signed": ["n"]}, "signed names n"),
        ({}, {}, "at least one"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw(maps, **more)
    with pytest.raises(ValueError, match="full scale"):
        figures.figure_overlays(
            films(1) * 255, {"m": heats(1)}, captions="a", caption=CONFIG.caption
        )


def test_the_four_groups_hold_their_films_in_order_of_error():
    labels = np.array([1, 1, 0, 0, 0, 1])
    probabilities = np.array([0.7, 0.9, 0.2, 0.6, 0.95, 0.5])  # 0.5 is read as class 0
    maps = heats(6, zero=[4])
    figure = figures.figure_groups(
        films(6), maps, labels, probabilities, ("Normal", "COVID"), CONFIG.caption, per_group=2
    )
    axes = np.array(panels(figure)).reshape(4, 2)
    assert [axis.get_title(loc="left").split("\n")[0] for axis in axes[:, 0]] == [
        "true positives: COVID read as COVID, 2 of 2 shown",
        "true negatives: Normal read as Normal, 1 of 1 shown",
        "false positives: Normal read as COVID, 2 of 2 shown",
        "false negatives: COVID read as Normal, 1 of 1 shown",
    ]
    shown = [
        [1, 0],
        [2, None],
        [4, 3],
        [5, None],
    ]  # the smallest error first, and of the wrong ones the largest
    for axis, row in zip(axes.flat, np.ravel(shown), strict=True):
        if row is None:
            assert not axis.images
        else:
            np.testing.assert_array_equal(axis.images[1].get_array(), maps[row])
            assert axis.images[1].get_alpha() == 0.4
            assert f"p(COVID) {probabilities[row]:.3f}" in axis.get_title(loc="left")
            assert ("zero map" in axis.get_title(loc="left")) == (row == 4)
    assert "error 0.950" in axes[2, 0].get_title(loc="left")


def test_empty_groups_are_named_and_bad_labels_refused():
    figure = figures.figure_groups(
        films(3), heats(3), [1, 1, 0], [0.9, 0.8, 0.1], ("no", "yes"), CONFIG.caption
    )
    assert panels(figure)[0].get_gridspec().get_geometry() == (2, 4)
    assert "no false positives: no read as yes" in words(figure)
    assert "no false negatives: yes read as no" in words(figure)
    for labels, p, classes, message in [
        ([1, 2, 0], [0.5] * 3, ("a", "b"), "labels 0 or 1"),
        ([1, 0, 0], [0.5] * 3, ("a", "b", "c"), "3 classes"),
        ([1, 0], [0.5] * 3, ("a", "b"), "labels"),
        ([1, 0, 0], [0.5, 3.0, 0.1], ("a", "b"), "probabilities must lie"),
    ]:
        with pytest.raises(ValueError, match=message):
            figures.figure_groups(films(3), heats(3), labels, p, classes, CONFIG.caption)


def test_scores_are_drawn_with_their_intervals_and_references_grey():
    masks = [np.eye(SIDE, dtype=bool)] * 6
    maps = {"mine": np.stack(masks).astype(float), "none": np.zeros((6, SIDE, SIDE))}
    _, summary = localise(maps, films(6), masks, groups=range(6), draws=50)
    figure = figures.figure_localisation(summary, CONFIG.caption)
    assert len(figure.axes) == 4
    axis = figure.axes[3]
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["mine", "none\n(6 zero maps)", "random", "centre prior", "edges"]
    bars = [
        line
        for line in axis.lines
        if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2
    ]
    table = summary.query("score == 'auprc'").set_index("map")
    for place, (name, bar) in enumerate(
        zip(["mine", "none", "random", "centre prior", "edges"], bars, strict=True)
    ):
        assert list(bar.get_xdata()) == table.loc[name, ["ci_low", "ci_high"]].tolist()
        assert set(bar.get_ydata()) == {place}
        assert (to_hex(bar.get_color()) == "#8c8c8c") == (place >= 2)
    chance = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"]
    assert chance == [table.loc["random", "value"]]
    assert "6 films with a finding" in words(figure)
    with pytest.raises(ValueError, match="zero_maps"):
        figures.figure_localisation(summary.drop(columns="zero_maps"), CONFIG.caption)


def test_randomisation_has_a_curve_a_method_and_another_films_level_dotted():
    table = pd.DataFrame(
        {
            "layers": [0, 3, 6, 0],
            "down_to": ["none", "b", "a", "another image"],
            "zero": [0, 0, 2, 0],
            "spearman": [1, 0.5, 0.1, 0.2],
            "ssim": [1, 0.6, 0.3, 0.35],
        }
    )
    tables = {
        "gradcam": table,
        "saliency": table.iloc[:3].assign(zero=0, spearman=[1, 0.2, np.nan]),
    }
    figure = figures.figure_randomisation(tables, CONFIG.caption)
    for axis, score in zip(figure.axes, ("spearman", "ssim"), strict=True):
        dotted = [line for line in axis.lines if line.get_linestyle() == ":"]
        curves = [line for line in axis.lines if line.get_linestyle() != ":"]
        assert [list(line.get_ydata()) for line in dotted] == [[table[score].iloc[3]] * 2]
        assert dotted[0].get_color() == curves[0].get_color() != curves[1].get_color()
        assert list(curves[0].get_xdata()) == [0, 3, 6]
        assert list(curves[0].get_ydata()) == table[score].tolist()[:3]
    assert "gradcam\n(up to 2 zero maps)" in words(figure)
    with pytest.raises(ValueError, match="spearman"):
        figures.figure_randomisation({"m": table.drop(columns="spearman")}, CONFIG.caption)
    with pytest.raises(ValueError, match="at least one"):
        figures.figure_randomisation({}, CONFIG.caption)
