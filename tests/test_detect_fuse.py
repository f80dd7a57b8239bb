"""Fusion against ensemble-boxes, image by image."""

import ensemble_boxes
import numpy as np
import pandas as pd
import pytest
from ensemble_boxes import ensemble_boxes_nms

from dlia_utils.detect import fuse

SIZE = 512
CORNERS = ["x1", "y1", "x2", "y2"]


def predictions(seed=0, *, images=12, views=3, each=14, classes=3):
    """Several views of the same objects: clusters of near boxes and some strays."""
    rng, parts = np.random.default_rng(seed), []
    for image in rng.permutation(images) * 3 + 1:
        centre, side = rng.uniform(100, 400, (5, 2)), rng.uniform(40, 180, (5, 2))
        for view in range(views):
            which = rng.integers(0, 5, each)
            middle = centre[which] + rng.normal(0, 12, (each, 2))
            half = side[which] * rng.uniform(0.8, 1.2, (each, 2)) / 2
            corners = np.hstack([middle - half, middle + half]).clip(0, SIZE)
            table = pd.DataFrame(corners, columns=CORNERS).assign(image=image, view=view)
            parts.append(table.assign(label=rng.integers(1, classes + 1, each)))
    table = pd.concat(parts).assign(score=rng.uniform(0.02, 0.98, images * views * each))
    table = table[[*fuse.COLUMNS, "view"]]
    return table.sample(frac=1, random_state=seed, ignore_index=True)


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


def same(table, expected):
    """Equal to `expected` [n,7], coordinates as shares of the image."""
    scale = np.array([1, SIZE, SIZE, SIZE, SIZE, 1, 1])
    own = table[list(fuse.COLUMNS)].to_numpy() / scale
    np.testing.assert_allclose(own, expected / scale, rtol=0, atol=1e-6)


@pytest.mark.parametrize("views, each, iou", [(3, 14, 0.5), (1, 30, 0.3), (2, 60, 0.7)])
@pytest.mark.parametrize("seed", [0, 1])
def test_wbf_equals_ensemble_boxes(seed, views, each, iou):
    table = predictions(seed, views=views, each=each)
    expected = theirs(table, ensemble_boxes.weighted_boxes_fusion, views, iou_thr=iou)
    fused = fuse.wbf(table, iou=iou, views=views)
    assert len(expected) < 0.8 * len(table) and list(fused.columns) == list(fuse.COLUMNS)
    assert fused.dtypes["image"] == fused.dtypes["label"] == np.int64
    same(fused, expected)


def test_a_view_that_saw_nothing_still_counts():
    table = predictions(3)
    table = table[table.view != 2]
    expected = theirs(table, ensemble_boxes.weighted_boxes_fusion, 3, iou_thr=0.55)
    same(fuse.wbf(table, views=3), expected)
    one = pd.DataFrame([[0, 0.0, 0.0, 9.0, 9.0, 1, 0.8]], columns=fuse.COLUMNS)
    assert fuse.wbf(one, views=4).score.tolist() == [0.2] and fuse.wbf(one).score.tolist() == [0.8]
    nothing = pd.concat([one, one.assign(x1=1.0)], ignore_index=True).assign(score=0.0)
    assert fuse.wbf(nothing)[[*CORNERS, "score"]].to_numpy().tolist() == [[0, 0, 9, 9, 0]]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("iou", [0.3, 0.5, 0.7])
def test_nms_equals_ensemble_boxes(seed, iou, monkeypatch):
    plain = getattr(ensemble_boxes_nms.nms_float_fast, "py_func", ensemble_boxes_nms.nms_float_fast)
    monkeypatch.setattr(ensemble_boxes_nms, "nms_float_fast", plain)  # compiling it takes long
    table = predictions(seed)
    kept, expected = fuse.nms(table, iou=iou), theirs(table, ensemble_boxes.nms, 3, iou_thr=iou)
    assert len(expected) < len(table)
    same(kept, expected)
    pd.testing.assert_frame_equal(kept.merge(table), kept)  # whole rows, their view too


def test_one_per_class_keeps_the_best():
    table = predictions(0)
    expected = table.loc[table.groupby(["image", "label"]).score.idxmax()]
    expected = expected.sort_values(["image", "score"], ascending=[True, False], ignore_index=True)
    pd.testing.assert_frame_equal(fuse.one_per_class(table), expected)


ALL = {"nms": fuse.nms, "one": fuse.one_per_class, "wbf": lambda table: fuse.wbf(table, views=3)}


@pytest.mark.parametrize("function", ALL.values(), ids=ALL)
def test_what_all_have_in_common(function):
    """Images and classes do not meet, equal scores keep their order, the table stays as it was."""
    table = predictions(0, images=5)
    before, whole = table.copy(), function(table)
    assert whole.image.is_monotonic_increasing
    assert whole.groupby("image").score.agg(lambda own: own.is_monotonic_decreasing).all()
    for column in ("image", "label"):
        for value, own in table.groupby(column):
            alone = whole[whole[column] == value].reset_index(drop=True)
            pd.testing.assert_frame_equal(function(own), alone)
    pd.testing.assert_frame_equal(table, before)
    empty = function(table[:0])
    assert len(empty) == 0 and set(fuse.COLUMNS) <= set(empty.columns)
    tied, key = table.assign(score=0.5), ["image", "label", "x1"]
    by_label = tied.iloc[np.argsort(tied.label, kind="stable")]  # order within each class unchanged
    one, two = (function(t).sort_values(key, ignore_index=True) for t in (tied, by_label))
    pd.testing.assert_frame_equal(one, two)
    with pytest.raises(ValueError, match=r"predictions: a score outside \[0, 1\]"):
        function(table.assign(score=2.0))
