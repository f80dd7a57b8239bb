"""Figures of corruptions and drift: every number drawn is one of the table's, and what a table lacks is said."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from scipy.stats import spearmanr

from dlia_utils import corrupt, corruption_error
from dlia_utils.explain import drift, warning
from dlia_utils.explain import drift_figures as figures
from dlia_utils.explain.drift import SIGN

NAMES, LAYERS, SEVERITIES, IMAGES = (
    ["contrast", "motion_blur"],
    ["layer1_2", "layer4_1"],
    [1, 2, 3],
    5,
)
CONFIG = SimpleNamespace(
    profile="smoke", size=24, data_name="pneumonia (SYNTHETIC)"
)  # what the figures read
pytestmark = [
    pytest.mark.filterwarnings(f"error::{kind}")
    for kind in ("UserWarning", "RuntimeWarning", "FutureWarning")
]


def make_drift(seed=0):
    rng, rows = np.random.default_rng(seed), []
    cells = [
        ("same image", 0),
        ("random pair", 0),
        *((name, s) for name in NAMES for s in SEVERITIES),
    ]
    for image in range(IMAGES):
        for corruption, severity in cells:
            for method, layers in (("gradcam++", LAYERS), ("saliency", ["input"])):
                rows += [(image, corruption, severity, method, layer, 1) for layer in layers]
    table = pd.DataFrame(
        rows, columns=["image", "corruption", "severity", "method", "layer", "target"]
    )
    table[list(SIGN)] = rng.random((len(table), len(SIGN)))
    table.loc[3, "rmse"] = np.nan
    return table.assign(zero=False)


def make_grid(seed=0):
    rng, cells = (
        np.random.default_rng(seed),
        [("clean", 0), *((name, s) for name in NAMES for s in SEVERITIES)],
    )
    table = pd.DataFrame(cells, columns=["corruption", "severity"]).assign(metric="auc", n=IMAGES)
    table["value"] = 0.9 - 0.5 * rng.random(len(table))
    table["drop"] = table["value"].iloc[0] - table["value"]
    for name in ("value", "drop"):
        low, high = ("ci_low", "ci_high") if name == "value" else ("drop_low", "drop_high")
        table[low], table[high] = table[name] - 0.04, table[name] + 0.03
    return pd.concat(
        [table, table.assign(metric="accuracy", value=0.1, drop=0.2)], ignore_index=True
    )


def make_predictions():
    """Image 0 flips under both corruptions at severities 2 and 3, image 1 under contrast at severity 3."""
    cells = [("clean", 0), *((name, s) for name in NAMES for s in SEVERITIES)]
    rows = [
        (
            image,
            corruption,
            severity,
            int(
                image == 0
                and severity > 1
                or image == 1
                and (corruption, severity) == ("contrast", 3)
            ),
        )
        for image in range(IMAGES)
        for corruption, severity in cells
    ]
    return pd.DataFrame(rows, columns=["image", "corruption", "severity", "predicted"])


def make_warning(seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        (reading, outcome, predictor, metric)
        for outcome in ("error", "flip")
        for reading in ("within", "mixed")
        for predictor in ("uncertainty", "severity", "gradcam++ layer4_1 rmse")
        for metric in ("auroc", "spearman")
        if (reading, predictor) != ("within", "severity")
    ]
    table = pd.DataFrame(rows, columns=["reading", "outcome", "predictor", "metric"])
    value = rng.random(len(table))
    return table.assign(
        value=value, ci_low=value - 0.1, ci_high=value + 0.05, n=IMAGES, copies=30, events=7
    )


DRIFT, GRID = make_drift(), make_grid()
TWO = {"resnet18": DRIFT, "resnet18_augmented": make_drift(1)}
GRIDS = {"resnet18": GRID, "resnet18_augmented": make_grid(1)}


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text))


def panels(figure):
    return [axis for axis in figure.axes if axis.axison]


def texts(figure):
    """All texts that are drawn; a tick outside the range keeps its label but does not show it."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axis in figure.axes:
        found += [axis.title, *axis.texts]
        if axis.axison:
            found += [axis.xaxis.label, axis.yaxis.label]
            for one in (axis.xaxis, axis.yaxis):
                low, high = sorted(one.get_view_interval())
                found += [
                    tick.label1 for tick in one.get_major_ticks() if low <= tick.get_loc() <= high
                ]
    return [text for text in found if text.get_text().strip()]


def meet(one, other):
    """Whether two texts stand on one another; names askew on an axis need a line's height between them."""
    a, b = (text.get_window_extent().shrunk(0.96, 0.9) for text in (one, other))
    angle = np.deg2rad(one.get_rotation())
    if angle and one.get_rotation() == other.get_rotation():
        height = 1.1 * one.get_fontsize() * (1 + one.get_text().count("\n")) * one.figure.dpi / 72
        return bool(a.overlaps(b) and abs(a.x1 - b.x1) * np.sin(angle) < height)
    return bool(a.overlaps(b))


def overlaps(figure):
    """Texts that stand on one another or leave the figure."""
    figure.draw_without_rendering()  # the canvas of a closed figure draws nothing
    found, edge = texts(figure), figure.bbox
    places = [(text.get_text(), text.get_window_extent()) for text in found]
    outside = [
        name
        for name, place in places
        if place.x0 < -1 or place.y0 < -1 or place.x1 > edge.x1 + 1 or place.y1 > edge.y1 + 1
    ]
    return outside + [
        (one.get_text(), other.get_text())
        for k, one in enumerate(found)
        for other in found[k + 1 :]
        if meet(one, other)
    ]


def test_every_score_of_drift_has_a_name_on_an_axis():
    assert list(figures.SCORES) == list(SIGN)


# ------------------------------------------------------------------------------------------- films and maps


def test_corruptions_stand_in_lines_that_begin_with_the_clean_film():
    film = torch.rand(1, 24, 16, generator=torch.Generator().manual_seed(0))
    figure = figures.figure_corruptions(
        film, CONFIG.caption, names=NAMES, severities=[1, 4], seed=3, row=8, scale="medmnist-c"
    )
    shown = np.reshape([axis.images[0].get_array() for axis in figure.axes], (2, 3, 24, 16))
    for name, (clean, *rest) in zip(NAMES, shown, strict=True):
        np.testing.assert_array_equal(clean, film[0].double())
        for severity, seen in zip([1, 4], rest, strict=True):
            made = corrupt.apply(name, film[None], severity, seed=3, ids=[8], scale="medmnist-c")
            np.testing.assert_array_equal(seen, made[0, 0].double())
    assert [axis.get_title() for axis in figure.axes[:3]] == ["clean", "severity 1", "severity 4"]
    assert (
        "motion blur" in words(figure)
        and "medmnist-c" in words(figure)
        and "SYNTHETIC" in words(figure)
    )
    assert not overlaps(figure) and figure.get_figwidth() <= figures.WIDTH
    with pytest.raises(ValueError, match="one film"):
        figures.figure_corruptions(film[None], CONFIG.caption)


def test_maps_lie_over_their_films_scaled_with_answers_and_scores():
    rng = np.random.default_rng(0)
    films = {
        name: torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(k))
        for k, name in enumerate(["clean", *NAMES])
    }
    maps = {
        name: {"layer1_2": 5 + rng.random((12, 12)), "layer4_1": torch.zeros(3, 3)}
        for name in films
    }
    maps["contrast"]["layer4_1"] = np.full((3, 3), 2.0)
    scores = DRIFT[DRIFT["image"].eq(1) & DRIFT["severity"].eq(2) & DRIFT["method"].eq("gradcam++")]
    scores = 100 * scores.pivot(index="corruption", columns="layer", values="rmse")
    answers = {
        "clean": ("NORMAL", 0.9),
        "contrast": ("PNEUMONIA", 0.875),
        "motion_blur": ("NORMAL", 0.5),
    }
    figure = figures.figure_maps(
        films, maps, CONFIG.caption, answers=answers, scores=scores, alpha=0.3, told="severity 2"
    )
    grid = np.reshape(figure.axes, (3, 3))
    for (name, film), line in zip(films.items(), grid, strict=True):
        for axis in line:
            np.testing.assert_array_equal(axis.images[0].get_array(), film[0].double())
        over = line[1].images[1]
        heat = maps[name]["layer1_2"]
        np.testing.assert_allclose(
            over.get_array(), (heat - heat.min()) / (heat.max() - heat.min())
        )
        assert over.get_alpha() == 0.3 and list(over.get_extent()) == [-0.5, 23.5, 23.5, -0.5]
        corners = [[text.get_text() for text in axis.texts] for axis in line[1:]]
        flat = "flat map" if name == "contrast" else "zero map"
        assert (
            corners == [[], [flat]]
            if name == "clean"
            else [
                [f"{scores.loc[name, 'layer1_2']:.3g}"],
                [f"{scores.loc[name, 'layer4_1']:.3g}", flat],
            ]
        )
    assert grid[1, 0].texts[0].get_text() == "contrast\nPNEUMONIA\n0.875"
    assert [axis.get_title() for axis in grid[0]] == ["film", *LAYERS] and "severity 2" in words(
        figure
    )
    assert not overlaps(figure) and figure.get_figwidth() <= figures.WIDTH
    with pytest.raises(ValueError, match="images.*one entry of each per line"):
        figures.figure_maps(films, {"clean": maps["clean"]}, CONFIG.caption)
    with pytest.raises(ValueError, match=r"\['motion_blur'\] have other layers"):
        figures.figure_maps(
            films, maps | {"motion_blur": {"layer1_2": np.ones((2, 2))}}, CONFIG.caption
        )


# ------------------------------------------------------------------------------------------- drift


def lines_of(axis):
    """The coloured lines of a panel, without the grey references."""
    return [
        line for line in axis.lines if line.get_color() not in ("0.5", "0.6", "0.8", "0.9", "0.4")
    ]


def mean_of(table, **wanted):
    for column, value in wanted.items():
        table = table[table[column].eq(value)]
    return table["rmse"].mean()


def test_lines_are_means_over_images_with_floor_and_ceiling():
    figure = figures.figure_rmse_lines(DRIFT, CONFIG.caption, told="resnet18")
    assert [axis.get_title() for axis in panels(figure)] == LAYERS
    for axis, layer in zip(panels(figure), LAYERS, strict=True):
        own = DRIFT[DRIFT["method"].eq("gradcam++") & DRIFT["layer"].eq(layer)]
        for line, name in zip(lines_of(axis), NAMES, strict=True):
            assert list(line.get_xdata()) == SEVERITIES
            expected = [mean_of(own, corruption=name, severity=s) for s in SEVERITIES]
            np.testing.assert_allclose(line.get_ydata(), expected)
        floor, ceiling = (line for line in axis.lines if line.get_color() == "0.5")
        assert floor.get_ydata()[0] == pytest.approx(mean_of(own, corruption="same image"))
        assert ceiling.get_ydata()[0] == pytest.approx(mean_of(own, corruption="random pair"))
        (band,) = axis.patches
        quartiles = own.loc[own["corruption"].eq("random pair"), "rmse"].quantile([0.25, 0.75])
        np.testing.assert_allclose([band.get_y(), band.get_y() + band.get_height()], quartiles)
    assert panels(figure)[0].get_ylim() == panels(figure)[1].get_ylim()
    assert not overlaps(figure) and "resnet18" in words(figure) and "motion blur" in words(figure)


def test_methods_stand_side_by_side_at_their_deepest_layer():
    figure = figures.figure_rmse_lines(DRIFT, CONFIG.caption, by="method", score="spearman")
    assert [axis.get_title() for axis in panels(figure)] == ["gradcam++, layer4_1", "saliency"]
    own = DRIFT[DRIFT["method"].eq("saliency") & DRIFT["corruption"].eq("contrast")]
    line = lines_of(panels(figure)[1])[0]
    np.testing.assert_allclose(line.get_ydata(), own.groupby("severity")["spearman"].mean())


def test_a_table_without_reference_rows_is_drawn_without_them():
    bare = DRIFT[DRIFT["severity"].gt(0)]
    figure = figures.figure_rmse_lines(bare, CONFIG.caption)
    assert (
        not panels(figure)[0].patches
        and "floor" not in words(figure)
        and "ceiling" not in words(figure)
    )


def test_depth_is_drawn_in_the_order_of_the_layers_for_both_trainings():
    figure = figures.figure_layers(TWO, CONFIG.caption, severity=2)
    assert [axis.get_title() for axis in panels(figure)] == list(TWO)
    for axis, table in zip(panels(figure), TWO.values(), strict=True):
        own = table[table["method"].eq("gradcam++")]
        for line, name in zip(lines_of(axis), NAMES, strict=True):
            expected = [mean_of(own, corruption=name, severity=2, layer=layer) for layer in LAYERS]
            np.testing.assert_allclose(line.get_ydata(), expected)
        assert [text.get_text() for text in axis.get_xticklabels()] == LAYERS
        floor = [line for line in axis.lines if line.get_color() == "0.5"][0]
        np.testing.assert_allclose(
            floor.get_ydata(),
            [mean_of(own, corruption="same image", layer=layer) for layer in LAYERS],
        )
    assert not overlaps(figure)


@pytest.mark.parametrize("layer", [None, "layer1_2"])
def test_the_scatter_has_one_point_per_cell_and_their_correlation(layer):
    figure = figures.figure_scatter(GRIDS, TWO, CONFIG.caption, layer=layer)
    for axis, name in zip(panels(figure), TWO, strict=True):
        own = TWO[name][TWO[name]["method"].eq("gradcam++") & TWO[name]["severity"].gt(0)]
        own = own if layer is None else own[own["layer"].eq(layer)]
        per_image = own.groupby(["image", "corruption", "severity"])["rmse"].mean()
        expected = per_image.groupby(["corruption", "severity"]).mean()
        grid = GRIDS[name][GRIDS[name]["metric"].eq("auc")].set_index(["corruption", "severity"])[
            "drop"
        ]
        points = np.concatenate([dots.get_offsets() for dots in axis.collections])
        assert len(points) == len(NAMES) * len(SEVERITIES)
        np.testing.assert_allclose(points, np.c_[expected, grid[expected.index]])
        sizes = np.concatenate([dots.get_sizes() for dots in axis.collections])
        assert (np.diff(sizes.reshape(len(NAMES), -1), axis=1) > 0).all()
        rank = spearmanr(expected, grid[expected.index]).statistic
        assert axis.get_title() == f"{name}: Spearman {rank:+.2f} over 6 cells"
    assert not overlaps(figure)


def test_a_scatter_without_spread_has_no_correlation():
    figure = figures.figure_scatter({"a": GRID.assign(drop=0.0)}, {"a": DRIFT}, CONFIG.caption)
    assert panels(figure)[0].get_title() == "a: no rank correlation from 6 cells"


def box_medians(axis):
    return [
        line.get_ydata()[0]
        for line in axis.lines
        if line.get_color() == "black" and line.get_linewidth() == 1.4
    ]


@pytest.mark.parametrize("by", ["severity", "corruption"])
def test_boxes_of_images_stand_above_the_drops(by):
    figure = figures.figure_box(GRID, DRIFT, CONFIG.caption, by=by, layer="layer4_1")
    keys = SEVERITIES if by == "severity" else NAMES
    above, below = np.array(panels(figure)).reshape(2, len(keys))
    own = DRIFT[DRIFT["layer"].eq("layer4_1")]
    for key, boxes, points in zip(keys, above, below, strict=True):
        cells = (
            [(name, key) for name in NAMES] if by == "severity" else [(key, s) for s in SEVERITIES]
        )
        expected = [
            own[own["corruption"].eq(c) & own["severity"].eq(s)]["rmse"].median() for c, s in cells
        ]
        np.testing.assert_allclose(box_medians(boxes), expected)
        grid = GRID[GRID["metric"].eq("auc")].set_index(["corruption", "severity"]).loc[cells]
        dots = [line.get_ydata()[0] for line in points.lines if line.get_marker() == "o"]
        np.testing.assert_allclose(dots, grid["drop"])
        bars = [line.get_ydata() for line in lines_of(points) if line.get_marker() != "o"]
        np.testing.assert_allclose(bars, grid[["drop_low", "drop_high"]])
    assert not overlaps(figure) and figure.get_figwidth() <= figures.WIDTH


def test_kept_and_flipped_count_an_image_once_a_box():
    figure = figures.figure_kept_flipped(
        make_predictions(), DRIFT, CONFIG.caption, layer="layer4_1"
    )
    (axis,) = panels(figure)
    assert [text.get_text() for text in axis.get_xticklabels()] == [
        "contrast\n5 | 2",
        "motion blur\n5 | 1",
        "all\n5 | 2",
    ]
    own = DRIFT[DRIFT["layer"].eq("layer4_1")].set_index(["image", "corruption", "severity"])[
        "rmse"
    ]
    # Images 0 and 1 in contrast: 0 is kept at severity 1, 1 at severities 1 and 2, the others at all three.
    kept = [own[0, "contrast", 1], own.loc[1, "contrast", [1, 2]].mean()]
    kept += [own.loc[image, "contrast", SEVERITIES].mean() for image in (2, 3, 4)]
    flipped = [own.loc[0, "contrast", [2, 3]].mean(), own[1, "contrast", 3]]
    np.testing.assert_allclose(box_medians(axis)[:2], [np.median(kept), np.median(flipped)])
    assert len(box_medians(axis)) == 6 and not overlaps(figure)
    figure = figures.figure_kept_flipped(
        make_predictions(), DRIFT, CONFIG.caption, layer="layer4_1", severity=3
    )
    kept, flipped = own.loc[[2, 3, 4], "contrast", 3], own.loc[[0, 1], "contrast", 3]
    np.testing.assert_allclose(
        box_medians(panels(figure)[0])[:2], [kept.median(), flipped.median()]
    )
    with pytest.raises(ValueError, match="predictions lacks image 4.*which drift has"):
        figures.figure_kept_flipped(make_predictions().query("image < 4"), DRIFT, CONFIG.caption)


def test_many_corruptions_do_not_stand_on_one_another():
    names = list(corrupt.CORRUPTIONS)
    parts = [DRIFT[DRIFT["severity"].eq(0)]]
    parts += [DRIFT[DRIFT["corruption"].eq("contrast")].assign(corruption=name) for name in names]
    many = pd.concat(parts, ignore_index=True)
    cells = GRID[GRID["corruption"].eq("contrast")]
    grid = pd.concat([cells.assign(corruption=name) for name in names], ignore_index=True)
    seen = make_predictions()
    copies = [seen[seen["corruption"].eq("contrast")].assign(corruption=name) for name in names]
    seen = pd.concat([seen[seen["corruption"].eq("clean")], *copies], ignore_index=True)
    assert not overlaps(figures.figure_rmse_lines(many, CONFIG.caption))
    assert not overlaps(figures.figure_box(grid, many, CONFIG.caption))
    assert not overlaps(figures.figure_kept_flipped(seen, many, CONFIG.caption))


def test_a_box_of_no_image_is_left_out():
    seen = make_predictions().assign(predicted=0)
    figure = figures.figure_kept_flipped(seen, DRIFT, CONFIG.caption)
    assert len(box_medians(panels(figure)[0])) == 3 and "5 | 0" in words(figure)


# ------------------------------------------------------------------------------------------- answers


def test_auc_lines_begin_at_the_clean_value_and_have_their_interval():
    figure = figures.figure_auc_lines(GRIDS, CONFIG.caption)
    assert [axis.get_title() for axis in panels(figure)] == ["contrast", "motion blur"]
    for axis, name in zip(panels(figure), NAMES, strict=True):
        for line, band, table in zip(lines_of(axis), axis.collections, GRIDS.values(), strict=True):
            own = table[table["metric"].eq("auc") & table["corruption"].isin(["clean", name])]
            assert list(line.get_xdata()) == [0, *SEVERITIES]
            np.testing.assert_allclose(line.get_ydata(), own["value"])
            edges = band.get_paths()[0].vertices[:, 1]
            assert edges.min() == pytest.approx(
                own["ci_low"].min()
            ) and edges.max() == pytest.approx(own["ci_high"].max())
    assert "resnet18_augmented" in words(figure) and not overlaps(figure)


@pytest.mark.parametrize("metric", ["auroc", "spearman"])
def test_the_forest_has_a_mark_and_an_interval_for_each_training(metric):
    tables = {"resnet18": make_warning(), "resnet18_augmented": make_warning(1)}
    figure = figures.figure_warning(tables, CONFIG.caption, outcome="flip", metric=metric)
    assert [axis.get_title().split("\n")[0] for axis in panels(figure)] == ["within", "mixed"]
    for axis, reading in zip(panels(figure), ("within", "mixed"), strict=True):
        own = [
            table[
                table["outcome"].eq("flip")
                & table["metric"].eq(metric)
                & table["reading"].eq(reading)
            ]
            for table in tables.values()
        ]
        marks = [line.get_xdata()[0] for line in lines_of(axis) if len(line.get_xdata()) == 1]
        np.testing.assert_allclose(marks, pd.concat(own)["value"])
        bars = [line.get_xdata() for line in lines_of(axis) if len(line.get_xdata()) == 2]
        np.testing.assert_allclose(bars, pd.concat(own)[["ci_low", "ci_high"]])
        (middle,) = [line for line in axis.lines if line.get_color() == "0.4"]
        assert middle.get_xdata()[0] == (0.5 if metric == "auroc" else 0)
    assert [text.get_text() for text in panels(figure)[0].get_yticklabels()] == [
        "uncertainty",
        "gradcam++ layer4_1 rmse",
        "severity",
    ]
    assert panels(figure)[0].get_xlim() == panels(figure)[1].get_xlim()
    assert "5 images" in words(figure) and not overlaps(figure)
    assert "resnet18: 7 of 30 copies" in words(figure)


def test_the_tables_of_the_suite_are_drawn_as_they_come():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 2),
    ).eval()
    films, labels, ids = torch.rand(6, 1, 16, 16), [0, 1, 0, 1, 0, 1], [4, 5, 6, 7, 8, 9]
    layers, patients = {"first": "0", "second": "1"}, {image: image for image in ids}
    seen, moved = drift.measure(
        net, films, labels, ids, names=NAMES, severities=[1, 5], layers=layers, progress=False
    )
    grid = {"plain": corruption_error.grid(seen, patients, draws=20)}
    chosen = [("gradcam++", "second", "rmse"), ("saliency", "input", "spearman")]
    told = warning.warning(seen, moved, patients, predictors=chosen, events=["error"], draws=20)
    drawn = [
        figures.figure_rmse_lines(moved, CONFIG.caption),
        figures.figure_layers({"plain": moved}, CONFIG.caption),
        figures.figure_scatter(grid, {"plain": moved}, CONFIG.caption),
        figures.figure_box(grid["plain"], moved, CONFIG.caption),
        figures.figure_kept_flipped(seen, moved, CONFIG.caption),
        figures.figure_auc_lines(grid, CONFIG.caption),
        figures.figure_warning({"plain": told}, CONFIG.caption),
    ]
    assert [overlaps(figure) for figure in drawn] == [[]] * 7
    assert [axis.get_title() for axis in panels(drawn[0])] == ["first", "second"]


# ------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: figures.figure_rmse_lines(DRIFT.drop(columns="rmse"), CONFIG.caption),
            "drift lacks the columns.*rmse",
        ),
        (
            lambda: figures.figure_rmse_lines(DRIFT, CONFIG.caption, score="mse"),
            "score must be one of rmse, .*not 'mse'",
        ),
        (lambda: figures.figure_rmse_lines(DRIFT, CONFIG.caption, by="image"), "by must be"),
        (
            lambda: figures.figure_rmse_lines(DRIFT, CONFIG.caption, method="lime"),
            "no method 'lime', only 'gradcam.*method=",
        ),
        (
            lambda: figures.figure_layers({"b": DRIFT.drop(columns="layer")}, CONFIG.caption),
            r"drift\['b'\] lacks.*layer",
        ),
        (
            lambda: figures.figure_layers(TWO, CONFIG.caption, severity=5),
            "no severity 5, only 0, 1, 2, 3: choose",
        ),
        (
            lambda: figures.figure_scatter({"a": GRID}, TWO, CONFIG.caption),
            "give one table of each",
        ),
        (
            lambda: figures.figure_scatter(
                {"a": GRID.drop(columns="drop")}, {"a": DRIFT}, CONFIG.caption
            ),
            "lacks the col.*drop",
        ),
        (
            lambda: figures.figure_scatter(
                {"a": GRID}, {"a": DRIFT}, CONFIG.caption, layer="layer9"
            ),
            "no layer 'layer9'",
        ),
        (
            lambda: figures.figure_scatter(
                {"a": GRID.query("severity < 1")}, {"a": DRIFT}, CONFIG.caption
            ),
            "share no corruption",
        ),
        (
            lambda: figures.figure_box(GRID.drop(columns="drop_low"), DRIFT, CONFIG.caption),
            "grid lacks the columns.*drop_low",
        ),
        (
            lambda: figures.figure_box(GRID, DRIFT, CONFIG.caption, metric="f1"),
            "no metric 'f1', only 'auc', 'accuracy'",
        ),
        (lambda: figures.figure_box(GRID, DRIFT, CONFIG.caption, by="layer"), "by must be"),
        (
            lambda: figures.figure_kept_flipped(
                make_predictions().drop(columns="predicted"), DRIFT, CONFIG.caption
            ),
            "predictions lacks the columns.*predicted",
        ),
        (
            lambda: figures.figure_auc_lines({"a": GRID.drop(columns="ci_low")}, CONFIG.caption),
            r"grid\['a'\] lacks.*ci_low",
        ),
        (
            lambda: figures.figure_warning(
                {"a": make_warning().drop(columns="value")}, CONFIG.caption
            ),
            "lacks.*value",
        ),
        (
            lambda: figures.figure_warning({"a": make_warning()}, CONFIG.caption, outcome="death"),
            "no outcome 'death'",
        ),
    ],
)
def test_what_a_table_lacks_is_said(call, said):
    with pytest.raises(ValueError, match=said):
        call()
