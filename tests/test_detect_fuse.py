"""Fusion against ensemble-boxes image by image, and by hand where it differs from what its paper says."""

import ensemble_boxes
import numpy as np
import pandas as pd
import pytest
from ensemble_boxes import ensemble_boxes_nms

from dlia_utils.detect import fuse

SIZE = 512
CORNERS = ["x1", "y1", "x2", "y2"]


def predictions(seed=0, *, images=12, views=3, each=14, classes=3):
    """Several views of the same objects, without equal scores: clusters of near boxes and some strays."""
    rng = np.random.default_rng(seed)
    parts = []
    for image in rng.permutation(images) * 3 + 1:
        centre, side = rng.uniform(100, 400, (5, 2)), rng.uniform(40, 180, (5, 2))
        for view in range(views):
            which = rng.integers(0, 5, each)
            middle = centre[which] + rng.normal(0, 12, (each, 2))
            half = side[which] * rng.uniform(0.8, 1.2, (each, 2)) / 2
            table = pd.DataFrame(
                np.hstack([middle - half, middle + half]).clip(0, SIZE), columns=CORNERS
            )
            parts.append(
                table.assign(image=image, view=view, label=rng.integers(1, classes + 1, each))
            )
    table = pd.concat(parts, ignore_index=True)
    table["score"] = rng.uniform(0.02, 0.98, len(table))
    return table[["image", *CORNERS, "label", "score", "view"]].sample(
        frac=1, random_state=seed, ignore_index=True
    )


def theirs(table, function, views, **options):
    """An ensemble-boxes function, image by image, as a table sorted like ours."""
    rows = []
    for image in sorted(table.image.unique()):
        own = [table[(table.image == image) & (table.view == view)] for view in range(views)]
        arrays = [[part[name].to_numpy() for part in own] for name in ("score", "label")]
        found = function([part[CORNERS].to_numpy() / SIZE for part in own], *arrays, **options)
        rows.append(np.c_[np.full(len(found[0]), image), found[0] * SIZE, found[2], found[1]])
    rows = np.concatenate(rows)
    return rows[np.lexsort((-rows[:, 6], rows[:, 0]))]


def same(table, expected, atol=1e-6):
    """Equal to `expected` [n,7], coordinates as shares of the image."""
    scale = np.array([1, SIZE, SIZE, SIZE, SIZE, 1, 1])
    np.testing.assert_allclose(
        table[list(fuse.COLUMNS)].to_numpy() / scale, expected / scale, rtol=0, atol=atol
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("conf_type", fuse.CONFIDENCES)
@pytest.mark.parametrize("weights", [None, (2.0, 1.0, 0.5)])
def test_wbf_equals_ensemble_boxes(seed, conf_type, weights):
    table = predictions(seed)
    options = {"weights": weights, "conf_type": conf_type}
    expected = theirs(
        table, ensemble_boxes.weighted_boxes_fusion, 3, iou_thr=0.5, skip_box_thr=0.1, **options
    )
    assert len(expected) < 0.8 * len(table)
    fused = fuse.wbf(table, iou=0.5, skip=0.1, views=3, **options)
    assert (
        list(fused.columns) == list(fuse.COLUMNS)
        and fused.dtypes["image"] == fused.dtypes["label"] == np.int64
    )
    same(fused, expected)


@pytest.mark.parametrize("views, each, iou", [(1, 30, 0.3), (5, 10, 0.55), (2, 60, 0.7)])
def test_wbf_equals_ensemble_boxes_at_other_sizes(views, each, iou):
    table = predictions(7, images=4, views=views, each=each, classes=2)
    expected = theirs(table, ensemble_boxes.weighted_boxes_fusion, views, iou_thr=iou)
    same(fuse.wbf(table, iou=iou, views=views), expected)


def test_a_view_that_saw_nothing_still_counts():
    table = predictions(3)
    table = table[table.view != 2]
    expected = theirs(table, ensemble_boxes.weighted_boxes_fusion, 3, iou_thr=0.55)
    same(fuse.wbf(table, views=3), expected)
    one = pd.DataFrame([[0, 0.0, 0.0, 9.0, 9.0, 1, 0.8, 1]], columns=[*fuse.COLUMNS, "view"])
    assert fuse.wbf(one, views=4).score.tolist() == [0.2]
    assert fuse.wbf(one.drop(columns="view")).score.tolist() == [0.8]


def test_wbf_of_boxes_that_score_nothing():
    table = pd.DataFrame(
        {"image": 0, "x1": [0.0, 1], "y1": 0.0, "x2": 9.0, "y2": 9.0, "label": 1, "score": 0.0}
    )
    fused = fuse.wbf(table)
    assert fused[CORNERS].to_numpy().tolist() == [[0, 0, 9, 9]] and fused.score.tolist() == [0]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("iou", [0.3, 0.5, 0.7])
def test_nms_equals_ensemble_boxes(seed, iou, monkeypatch):
    plain = getattr(ensemble_boxes_nms.nms_float_fast, "py_func", ensemble_boxes_nms.nms_float_fast)
    monkeypatch.setattr(
        ensemble_boxes_nms, "nms_float_fast", plain
    )  # compiling it takes longer than all the rest
    table = predictions(seed)
    kept = fuse.nms(table, iou=iou)
    expected = theirs(table, ensemble_boxes.nms, 3, iou_thr=iou)
    assert len(expected) < len(table)
    same(kept, expected)
    pd.testing.assert_frame_equal(kept.merge(table), kept)  # whole rows, their view too


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method, code", [("linear", 1), ("gaussian", 2)])
def test_soft_nms_equals_ensemble_boxes(seed, method, code):
    """Its public function returns the scores from before the decay; the one underneath has the new ones."""
    table = predictions(seed)
    soft = fuse.soft_nms(table, method=method, iou=0.4, sigma=0.3, floor=0.05)
    rows = []
    for (image, label), own in table.groupby(["image", "label"]):
        corners, score = own[CORNERS].to_numpy() / SIZE, own.score.to_numpy().copy()
        keep = ensemble_boxes_nms.cpu_soft_nms_float(
            corners, score, Nt=0.4, sigma=0.3, thresh=0.05, method=code
        )
        named = np.tile([image, label], (len(keep), 1))
        rows.append(np.c_[named[:, :1], corners[keep] * SIZE, named[:, 1:], score[score > 0.05]])
    rows = np.concatenate(rows)
    assert len(rows) < len(table)
    same(soft, rows[np.lexsort((-rows[:, 6], rows[:, 0]))])
    public = theirs(
        table, ensemble_boxes.soft_nms, 3, method=code, iou_thr=0.4, sigma=0.3, thresh=0.05
    )
    assert len(public) == len(soft)


def test_one_per_class_keeps_the_best():
    table = predictions(0)
    best = fuse.one_per_class(table)
    expected = table.loc[table.groupby(["image", "label"]).score.idxmax()]
    expected = expected.sort_values(["image", "score"], ascending=[True, False], ignore_index=True)
    pd.testing.assert_frame_equal(best, expected)


ALL = [fuse.nms, fuse.soft_nms, fuse.one_per_class, lambda table: fuse.wbf(table, views=3)]


@pytest.mark.parametrize("function", ALL)
def test_equal_scores_keep_the_order_of_the_table(function):
    table = predictions(0, images=3).assign(score=0.5)
    result = function(table)
    pd.testing.assert_frame_equal(result, function(table))
    first = table.drop_duplicates(["image", "label"])  # the first of its class is never suppressed
    if function is not ALL[-1]:
        assert len(result.merge(first)) == len(first)
    same_way = function(
        table.iloc[np.argsort(table.label, kind="stable")]
    )  # order within each class unchanged
    key = ["image", "label", "x1"]
    pd.testing.assert_frame_equal(
        result.sort_values(key, ignore_index=True), same_way.sort_values(key, ignore_index=True)
    )


@pytest.mark.parametrize("function", ALL)
def test_images_and_classes_do_not_meet(function):
    table = predictions(0, images=5)
    whole = function(table)
    assert whole.image.is_monotonic_increasing
    assert whole.groupby("image").score.agg(lambda own: own.is_monotonic_decreasing).all()
    for image, own in table.groupby("image"):
        pd.testing.assert_frame_equal(
            function(own), whole[whole.image == image].reset_index(drop=True)
        )
    one = table[table.label == 2]
    pd.testing.assert_frame_equal(function(one), whole[whole.label == 2].reset_index(drop=True))


@pytest.mark.parametrize("function", ALL)
def test_an_empty_table_and_the_callers_table(function):
    table = predictions(0, images=2)
    before = table.copy()
    empty = function(table[:0])
    assert len(empty) == 0 and set(fuse.COLUMNS) <= set(empty.columns)
    function(table)
    pd.testing.assert_frame_equal(table, before)


def test_the_truth_itself_survives_class_wise_nms():
    """Class-agnostic suppression at IoU 0.3 deletes true boxes; class-wise it does not touch different classes."""
    table = pd.DataFrame(
        {
            "image": 0,
            "x1": 0.0,
            "y1": 0.0,
            "x2": [90.0, 95.0],
            "y2": 90.0,
            "label": [1, 2],
            "score": 1.0,
        }
    )
    assert len(fuse.nms(table, iou=0.3)) == 2


def test_wrong_arguments_are_named():
    table = predictions(0, images=1)
    with pytest.raises(ValueError, match="say how many views"):
        fuse.wbf(table)
    with pytest.raises(
        ValueError, match=r"a view outside 0..1; views must be the number of views \(14 of 42 rows"
    ):
        fuse.wbf(table, views=2)
    with pytest.raises(ValueError, match="lack the column 'view'"):
        fuse.wbf(table.drop(columns="view"), views=2)
    for weights in ([1, 2], [1, 1, 0], [1, 1, np.nan]):
        with pytest.raises(ValueError, match="give 3 numbers above 0"):
            fuse.wbf(table, views=3, weights=weights)
    with pytest.raises(ValueError, match="conf_type is 'mean'"):
        fuse.wbf(table, views=3, conf_type="mean")
    with pytest.raises(ValueError, match=r"iou is 1.5; it must lie in \[0, 1\]"):
        fuse.nms(table, iou=1.5)
    with pytest.raises(ValueError, match="method is 'hard'"):
        fuse.soft_nms(table, method="hard")
    with pytest.raises(ValueError, match="sigma is 0"):
        fuse.soft_nms(table, sigma=0)
    with pytest.raises(ValueError, match=r"predictions: a score outside \[0, 1\]"):
        fuse.nms(table.assign(score=2.0))
    with pytest.raises(ValueError, match="a label below 1"):
        fuse.one_per_class(table.assign(label=0))
