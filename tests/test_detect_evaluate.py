"""Matching against pycocotools and torchmetrics; curves and intervals against brute force."""

import contextlib
import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dlia_utils import metrics, submission
from dlia_utils.data import augment, cache
from dlia_utils.data.boxes import box_fault
from dlia_utils.detect import evaluate as ev
from dlia_utils.detect import fuse

TRUTH = ["image", "x1", "y1", "x2", "y2", "label"]
CORNERS = TRUTH[1:5]


def boxes(rng, n, *, images, classes, whole=False, spread=200):
    """n random boxes; `whole`: corners on a grid of 10 pixels, so that equal IoU is common."""
    low, side = rng.uniform(0, spread, (n, 2)), rng.uniform(15, 90, (n, 2))
    if whole:
        low, side = low // 10 * 10, side // 10 * 10 + 10
    table = pd.DataFrame(np.hstack([low, low + side]), columns=CORNERS)
    return table.assign(image=rng.choice(images, n), label=rng.integers(1, classes + 1, n))[TRUTH]


def detections(rng, truth, *, images, classes, extra=60, whole=False):
    """Shifted true boxes, some twice, and false ones."""
    near = truth.sample(frac=1.6, replace=True, random_state=int(rng.integers(1 << 30)))
    near[CORNERS] += np.tile(rng.normal(0, 6.0, (len(near), 2)), 2)
    if whole:
        near[CORNERS] = near[CORNERS] // 10 * 10
    far = boxes(rng, extra, images=images, classes=classes, whole=whole)
    score = np.r_[rng.beta(3, 2, len(near)), rng.beta(2, 4, extra)]
    found = pd.concat([near, far], ignore_index=True).assign(score=score)
    return found.sample(frac=1, random_state=0, ignore_index=True)


def scene(kind, seed=0):
    """truth, predictions, images (not in order), number of classes."""
    rng = np.random.default_rng([seed, len(kind)])
    images, classes = rng.permutation(200)[:30] + 5, 4
    if kind == "crowded":  # more than 100 boxes of a class in an image, of which 100 count
        images, classes = images[:3], 2
        truth = boxes(rng, 150, images=images, classes=2, spread=120)
        found = detections(rng, truth, images=images, classes=2, extra=600)
        return truth, found, images, classes
    truth = boxes(rng, 70, images=images[:25], classes=classes, whole=kind == "grid")
    found = detections(rng, truth, images=images, classes=classes, whole=kind == "grid")
    if kind in ("tied", "grid"):
        found["score"] = found["score"].round(1)
    elif kind == "one score":
        found["score"] = 0.5
    elif kind == "no predictions":
        found = found[:0]
    elif kind == "no truth":
        truth = truth[:0]
    elif kind == "gaps":  # class 1 without truth, class 2 without predictions
        truth, found = truth[truth.label != 1], found[found.label != 2]
    return truth, found, images, classes


def matched(kind, seed=0, iou=(0.5,)):
    truth, found, images, classes = scene(kind, seed)
    return ev.match(truth, found, images=images, classes=classes, iou=iou)


KINDS = ["random", "tied", "grid", "one score", "crowded", "no predictions", "no truth", "gaps"]


def pycoco(truth, found, images, classes, ious=ev.COCO_IOUS):
    """Average precision [K,T] by pycocotools, NaN for classes without truth."""

    def coco(table):
        result, rows = COCO(), []
        for number, (_, row) in enumerate(table.iterrows(), start=1):
            width, height = row.x2 - row.x1, row.y2 - row.y1
            known = {"id": number, "image_id": int(row.image), "category_id": int(row.label)}
            known |= {"bbox": [row.x1, row.y1, width, height], "area": width * height}
            rows.append(known | {"score": row.get("score", 1.0), "iscrowd": 0})
        names = [{"id": k} for k in range(1, classes + 1)]
        pictures = [{"id": int(i)} for i in images]
        result.dataset = {"images": pictures, "categories": names, "annotations": rows}
        result.createIndex()
        return result

    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(coco(truth), coco(found), "bbox")
        run.params.iouThrs, run.params.maxDets = np.array(ious), [100]
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 0]
    return np.where(precision[:, 0] < 0, np.nan, precision.mean(1)).T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_average_precision_equals_pycocotools(kind, seed):
    result, expected = matched(kind, seed, ev.COCO_IOUS), pycoco(*scene(kind, seed))
    table = ev.average_precision(result)
    np.testing.assert_allclose(table.to_numpy(), expected, rtol=0, atol=1e-9)
    assert table.index.tolist() == list(result.labels) and table.columns[1] == 0.55
    if kind not in ("no predictions", "no truth"):
        assert 0.02 < np.nanmean(expected) < 0.98, "a scene that says something"
        assert ev.summary(result)["mAP50"] == pytest.approx(np.nanmean(expected[:, 0]), abs=1e-9)
        assert ev.summary(result)["mAP50_95"] == pytest.approx(np.nanmean(expected), abs=1e-9)


def test_equal_iou_goes_to_the_later_true_box():
    truth = pd.DataFrame([[0, 0, 0, 10, 10, 1], [0, 4, 0, 14, 10, 1]], columns=TRUTH)
    # The first lies between both; only if it takes the second is the first left for the next one.
    found = pd.DataFrame([[0, 2, 0, 12, 10, 1], [0, 0, 0, 10, 10, 1]], columns=TRUTH)
    found = found.assign(score=[0.9, 0.8])
    for order, expected in ((truth, [[True, True]]), (truth[::-1], [[True, False]])):
        assert ev.match(order, found, images=[0], classes=1).hit.tolist() == expected
        own = ev.average_precision(ev.match(order, found, images=[0], classes=1, iou=ev.COCO_IOUS))
        np.testing.assert_allclose(own, pycoco(order, found, [0], 1), atol=1e-9)


@pytest.mark.parametrize("kind", ["no predictions", "no truth"])
def test_the_other_tables_bear_emptiness(kind):
    result = matched(kind, iou=ev.COCO_IOUS)
    assert len(ev.threshold_sweep(result)) == 8 and len(ev.best_thresholds(result)) == 5
    table = ev.bootstrap(result, result.images, draws=5)
    value = 0.0 if kind == "no predictions" else np.nan
    np.testing.assert_array_equal(table.value, [value] * 7)
    assert (len(ev.curve(result)) == 0) == (kind == "no predictions")


def cut(found, threshold):
    return found[found.score >= threshold]


@pytest.mark.parametrize("kind", ["random", "tied", "gaps"])
@pytest.mark.parametrize("label", [None, 3])
def test_every_point_of_a_curve_equals_matching_what_is_left_above_it(kind, label):
    truth, found, images, classes = scene(kind)
    table = ev.curve(matched(kind), label)
    known, own = (t if label is None else t[t.label == label] for t in (truth, found))
    assert table.threshold.tolist() == sorted(own.score.unique(), reverse=True)
    for row in table.iloc[:: max(1, len(table) // 8)].itertuples():
        kept = cut(own, row.threshold)
        hits = ev.match(known, kept, images=images, classes=classes).hit.sum()
        assert row.precision == pytest.approx(hits / len(kept))
        assert row.recall == pytest.approx(hits / len(known))
        assert row.f1 == pytest.approx(2 * hits / (len(kept) + len(known)))
        assert row.fp_per_image == pytest.approx((len(kept) - hits) / len(images))


def test_best_thresholds_by_brute_force():
    result = matched("tied")
    by_f1 = ev.best_thresholds(result).set_index("label")
    by_froc = ev.best_thresholds(result, objective="froc", fp_per_image=0.2).set_index("label")
    for label in ("all", 1, 2, 3, 4):
        points = ev.curve(result, None if label == "all" else label)
        allowed = points[points.fp_per_image <= 0.2]
        best = points.threshold[points.f1 == points.f1.max()].max()
        assert by_f1.loc[label, ["f1", "threshold"]].tolist() == [points.f1.max(), best]
        best = allowed.threshold[allowed.recall == allowed.recall.max()].max()
        assert by_froc.loc[label, ["recall", "threshold"]].tolist() == [allowed.recall.max(), best]
    strict = ev.best_thresholds(result, objective="froc", fp_per_image=0)
    assert strict.threshold.isna().any() and not strict.fp_per_image.any()


@pytest.mark.parametrize("kind", ["random", "tied", "gaps"])
def test_the_sweep_equals_evaluating_each_cut_and_mAP_only_falls(kind):
    truth, found, images, classes = scene(kind)
    result = matched(kind, iou=ev.COCO_IOUS)
    table = ev.threshold_sweep(result)
    assert table.threshold.tolist() == [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4]
    for row in table.itertuples():
        kept = cut(found, row.threshold)
        expected = pycoco(truth, kept, images, classes, ious=(0.5,))
        assert row.mAP50 == pytest.approx(np.nanmean(expected), abs=1e-9)
        hits = ev.match(truth, kept, images=images, classes=classes).hit.sum()
        assert row.recall == pytest.approx(hits / len(truth))
        assert row.precision == pytest.approx(hits / len(kept))
    assert table.mAP50.is_monotonic_decreasing and table.mAP50.iloc[-1] < table.mAP50.iloc[0]
    assert table.mAP50.idxmax() == 0, "what the published sweep must always choose"
    assert table.f1.idxmax() > 0


@pytest.fixture(scope="module")
def resampled():
    """A scene with equal scores across, not within, images; its pass and its patients."""
    truth, found, images, classes = scene("random", seed=4)
    rng, grid = np.random.default_rng(0), np.arange(1, 60) / 60
    drawn = found.groupby("image").score.transform(lambda own: rng.choice(grid, len(own), False))
    found = found.assign(score=drawn)
    assert found.score.duplicated().sum() > 50
    result = ev.match(truth, found, images=images, classes=classes, iou=ev.COCO_IOUS)
    return truth, found, images, classes, result, rng.integers(0, 12, len(images))


def repeated(table, images, weight):
    """The table of a set in which each image counts `weight` times, as images of their own."""
    order = np.argsort(images)
    copies = np.split(np.arange(weight.sum()), np.cumsum(weight[order])[:-1])
    pairs = [(i, copy) for i, own in zip(images[order], copies, strict=True) for copy in own]
    parts = [table[table.image == image].assign(image=copy) for image, copy in pairs]
    return pd.concat([table[:0], *parts], ignore_index=True)


@pytest.mark.parametrize("seed", range(6))
def test_every_draw_equals_evaluating_the_repeated_set(resampled, seed):
    truth, found, images, classes, result, groups = resampled
    # The interval of a single draw is the value of that draw.
    drawn = ev.bootstrap(result, groups, draws=1, seed=seed, statistics=ev.STATISTICS)
    assert drawn.ci_low.equals(drawn.ci_high) and not drawn.ci_low.equals(drawn.value)
    weight = metrics.patient_weights(groups, draws=1, seed=seed)[0].astype(int)
    again = [repeated(table, images, weight) for table in (truth, found)]
    names = range(weight.sum())
    anew = ev.match(*again, images=names, classes=classes, iou=ev.COCO_IOUS)
    whole = ev.bootstrap(anew, names, draws=1, statistics=ev.STATISTICS)
    np.testing.assert_allclose(drawn.ci_low, whole.value, atol=1e-12)
    np.testing.assert_allclose(whole.value[:2], list(ev.summary(anew).values()), atol=1e-12)
    np.testing.assert_allclose(whole.value[4:], ev.average_precision(anew)[0.5], atol=1e-12)
    points = ev.curve(anew)
    reached = [points.recall[points.fp_per_image <= rate].max() for rate in ev.RATES]
    expected = [np.nan_to_num(reached).mean(), reached[ev.RATES.index(1)]]
    np.testing.assert_allclose(whole.value[2:4], expected, atol=1e-12)


def test_the_table_of_intervals(resampled, monkeypatch):
    _, _, images, classes, result, groups = resampled
    options = dict(draws=200, statistics=ev.STATISTICS)
    table = ev.bootstrap(result, groups, **options)
    assert list(table.columns) == ["metric", "label", "value", "ci_low", "ci_high", "n"]
    assert table.metric.tolist() == [*ev.STATISTICS[:4], *["AP50"] * classes]
    assert table.label.tolist() == ["all"] * 4 + [1, 2, 3, 4] and table.n.eq(len(images)).all()
    assert ((table.ci_low < table.value) & (table.value < table.ci_high)).all()
    assert not table.equals(ev.bootstrap(result, groups, seed=1, **options))
    alone = ev.bootstrap(result, groups, draws=200, statistics=("sensitivity_at_1", "mAP50"))
    assert alone.metric.tolist() == ["sensitivity_at_1", "mAP50"]
    assert alone.iloc[1].equals(table.iloc[0])
    one = ev.bootstrap(result, ["p"] * len(images), draws=50)
    assert one.ci_low.isna().all()  # a single patient has no interval
    monkeypatch.setattr(metrics, "CHUNK", 500)
    pd.testing.assert_frame_equal(table, ev.bootstrap(result, groups, **options), rtol=1e-12)


def test_the_paired_difference_is_narrower_than_the_two_intervals(resampled):
    truth, found, images, classes, result, groups = resampled
    noise = 0.2 * np.random.default_rng(1).random(len(found))
    other = found.assign(score=(found.score + noise).clip(0, 1))
    options = dict(images=images, classes=classes)
    second = ev.match(truth, other, iou=ev.COCO_IOUS, **options)
    pair = ev.bootstrap(result, groups, less=second, draws=300)
    a, b = (ev.bootstrap(one, groups, draws=300) for one in (result, second))
    np.testing.assert_allclose(pair.value, a.value - b.value, atol=1e-12)
    width = pair.ci_high - pair.ci_low
    assert (width < np.hypot(a.ci_high - a.ci_low, b.ci_high - b.ci_low))[:3].all()
    same = ev.bootstrap(result, groups, less=result, draws=20)
    assert same[["value", "ci_low", "ci_high"]].eq(0).all(axis=None)
    with pytest.raises(ValueError, match="lacks the patient of 1 images"):
        ev.bootstrap(result, [*groups[:-1], None], draws=2)
    with pytest.raises(ValueError, match="differ in images"):
        ev.bootstrap(result, groups, less=ev.match(truth[1:], found, **options), draws=2)


GOOD = pd.DataFrame([[3, 0.0, 0.0, 9.0, 9.0, 1], [4, 0.0, 0.0, 9.0, 9.0, 2]], columns=TRUTH)
WRONG = [
    ("label", 0, r"0 is the background \(1 of 2 rows, first row 1"),
    ("label", 3, "a label above 2"),
    ("label", 1.5, "a label that is none of"),
    ("x1", np.nan, "NaN or an infinite value"),
    ("x2", 0.0, "x1 >= x2"),
    ("y1", 12.0, "y1 >= y2"),
    ("image", 5, "an image id that `images` lacks"),
    ("score", 1.2, r"a score outside \[0, 1\]"),
]


@pytest.mark.parametrize("column, value, message", WRONG)
def test_broken_tables_are_refused_with_the_row(column, value, message):
    found = GOOD.assign(score=0.5)
    found[column] = [found[column][0], value]
    with pytest.raises(ValueError, match=f"predictions: .*{message}"):
        ev.match(GOOD, found, images=[3, 4], classes=2)


def test_missing_columns_and_arguments_are_named_and_nothing_is_touched():
    found = GOOD.assign(score=0.5, view=0)
    before = GOOD.copy(), found.copy()
    assert ev.summary(ev.match(GOOD, found, images=[4, 3], classes=2)) == {"mAP50": 1.0}
    for table, kept in zip((GOOD, found), before, strict=True):
        pd.testing.assert_frame_equal(table, kept)
    with pytest.raises(ValueError, match=r"predictions lacks the columns \['score'\]"):
        ev.match(GOOD, GOOD, images=[3, 4], classes=2)
    with pytest.raises(ValueError, match="every evaluated image once"):
        ev.match(GOOD, found, images=[3, 4, 4], classes=2)


# --- boxes in another format, ids of every kind

SIDES = {3: (400, 300), 4: (400, 300)}  # width, height
PIXELS = pd.DataFrame(
    [[3, 310.0, 20, 390, 60, 1, 0.9], [3, 20, 200, 60, 290, 2, 0.8], [4, 5, 4, 300, 280, 1, 0.7]],
    columns=[*TRUTH, "score"],
)
X1, Y1, X2, Y2 = PIXELS[CORNERS].to_numpy().T
FORMATS = {
    "xywh": ((X1, Y1, X2 - X1, Y2 - Y1), "look like x, y, width, height: .*box_convert.*'xywh'"),
    "swapped": ((X2, Y2, X1, Y1), "swapped corners"),
    "x swapped": ((X2, Y1, X1, Y2), "swapped corners"),
    "normalised": ((X1 / 400, Y1 / 300, X2 / 400, Y2 / 300), "look normalised: give pixels"),
    "xywh, normalised": ((X1 / 400, Y1 / 300, 0.1, 0.2), "look normalised: give pixels"),
    "transposed": ((Y1, X1, Y2, X2), "look transposed, and fit only with width and height swapped"),
    "of a larger image": ((3 * X1, 3 * Y1, 3 * X2, 3 * Y2), "clip boxes to the image"),
}
NAMES, IDS = {3: "a.png", 4: "b.png"}, pd.DataFrame({"id": [1, 2], "image_id": ["a.png", "b.png"]})
HOW = dict(names=NAMES, classes=["Mass", "Nodule"], sizes=SIDES, prior=PIXELS[:0])


def checked(found):
    """As a submission, one row a box."""
    ids = pd.DataFrame({"id": range(3), "image_id": found["image"].map(NAMES)})
    table = ids.assign(
        **dict(zip(submission.NUMBERS, found[[*CORNERS, "score"]].T.values, strict=True))
    )
    sizes = {NAMES[one]: side for one, side in SIDES.items()}
    return submission.check(table.assign(label="Mass"), ids, images=sizes)


SHAPES = np.array([(300, 400)] * 5)
CACHED = cache.ImageCache(np.zeros((5, 8, 8), np.uint8), 8, "", None, (), SHAPES)
DOORS = {
    "match": lambda t, s: ev.match(PIXELS, t, images=[3, 4], classes=2, sizes=s),
    "truth": lambda t, s: ev.match(t, PIXELS, images=[3, 4], classes=2, sizes=s),
    "wbf": lambda t, s: fuse.wbf(t, sizes=s),
    "nms": lambda t, s: fuse.nms(t, sizes=s),
    "training": lambda t, _: augment.CachedBoxes(CACHED, [3, 4], t),
    "prior": lambda t, _: submission.class_prior(t, SIDES),
    "build": lambda t, _: submission.build(t, IDS, **HOW),
    "check": lambda t, _: checked(t),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", FORMATS)
def test_boxes_of_another_format_are_refused_by_its_name_at_every_door(kind, door):
    assert DOORS[door](PIXELS, SIDES) is not None, "pixels are taken"
    corners, message = FORMATS[kind]
    table = PIXELS.assign(**dict(zip(CORNERS, corners, strict=True)))
    with pytest.raises(ValueError, match=message):
        DOORS[door](table, SIDES)
    if kind not in ("transposed", "of a larger image"):  # told without the images' sizes, too
        with pytest.raises(ValueError, match=message):
            DOORS[door](table, None)


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9), out=st.floats(0, 1))
def test_whatever_lies_inside_its_image_is_taken_and_a_pixel_more_as_well(seed, n, out):
    rng = np.random.default_rng(seed)
    frames = rng.integers(8, 900, (2, n)).astype(float)
    low = rng.uniform(0, 0.7, (2, n)) * frames
    corners = np.vstack([low - out, low + 2 + rng.uniform(0, 1, (2, n)) * (frames - 2 - low) + out])
    assert box_fault(corners.clip(-1, None), frames).kind == box_fault(corners).kind == ""
    assert box_fault(corners[[2, 3, 0, 1]], frames).kind == "turned"
    assert box_fault(corners / np.vstack([frames, frames]) / 2, frames).kind == "shares"
    assert box_fault(corners + np.vstack([frames, frames]), frames).kind == "outside"


MANY = {
    "whole numbers": lambda n: n,
    "beyond 2**53": lambda n: 2**53 + int(n),
    "beyond 2**64": lambda n: 2**64 + int(n),
    "text": lambda n: f"{n:03}",
    "text, no zeros": lambda n: str(n + 100),
}


@pytest.mark.parametrize("kind", MANY)
def test_ids_of_images_are_kept_to_the_last_digit(kind):
    truth, found, images, classes = scene("random")
    truth["image"], found["image"] = truth["image"].map(MANY[kind]), found["image"].map(MANY[kind])
    result = ev.match(truth, found, images=[MANY[kind](n) for n in images], classes=classes)
    plain = matched("random")
    assert ev.summary(result) == ev.summary(plain)
    assert result.images.tolist() == [MANY[kind](n) for n in images.tolist()]
    for join in (fuse.nms, fuse.wbf, fuse.one_per_class):
        joined, expected = join(found), join(scene("random")[1])
        assert joined["image"].tolist() == [MANY[kind](n) for n in expected["image"].tolist()]
        np.testing.assert_array_equal(joined[CORNERS], expected[CORNERS])


def test_an_id_of_another_type_is_not_the_image():
    found = GOOD.assign(score=0.5, image=["3", "4"])
    with pytest.raises(ValueError, match="predictions: an image id that `images` lacks"):
        ev.match(GOOD, found, images=[3, 4], classes=2)
    for wrong, message in (
        (["3", 3], "may be one image or two"),
        ([3, None], "lacks the image of"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse.wbf(GOOD.assign(score=0.5, image=pd.Series(wrong, dtype=object)))
    with pytest.raises(ValueError, match="last digits are lost"):
        ev.match(GOOD, found, images=[3.0, 2.0**60], classes=2)


def test_a_score_that_rounding_left_above_one_is_one_at_every_door():
    sure = pd.DataFrame([[3, 5.0, 5.0, 9.0, 9.0, 1, 1 + 2**-52]], columns=[*TRUTH, "score"])
    for join in (fuse.nms, fuse.wbf, fuse.one_per_class):
        assert join(sure)["score"].tolist() == [1.0]
    assert ev.match(sure, sure, images=[3], classes=1).score.tolist() == [1.0]
    table = submission.build(sure, IDS[:1], **HOW)
    assert submission.check(table, IDS[:1])["confidence"].tolist() == [1.0]
    several = pd.concat([sure.assign(score=1.0)] * 7)
    assert fuse.wbf(several, views=7)["score"].max() <= 1
    with pytest.raises(ValueError, match=r"a score outside \[0, 1\]: 1.001"):
        fuse.nms(sure.assign(score=1.001))


@settings(derandomize=True, database=None, deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), views=st.integers(1, 4))
def test_results_know_no_order_of_rows_and_images(seed, views):
    rng = np.random.default_rng(seed)
    images, classes = rng.permutation(9)[:6], 3
    truth = boxes(rng, 12, images=images, classes=classes)
    found = detections(rng, truth, images=images, classes=classes, extra=12)
    found["score"] = rng.permutation(len(found)) / len(found)
    moved = found.sample(frac=1, random_state=seed % 1000)
    how = dict(classes=classes, iou=ev.COCO_IOUS)
    one = ev.match(truth, found, images=images, **how)
    two = ev.match(truth, moved, images=rng.permutation(images), **how)
    pd.testing.assert_frame_equal(ev.average_precision(one), ev.average_precision(two))
    pd.testing.assert_frame_equal(ev.curve(one), ev.curve(two))
    for join in (fuse.nms, fuse.one_per_class, lambda table: fuse.wbf(table, views=views)):
        pd.testing.assert_frame_equal(join(found), join(moved))
    fused = fuse.wbf(found, views=views)
    assert fused["score"].between(0, 1).all() and fused["score"].max() <= found["score"].max()
    assert fused["x1"].min() >= found["x1"].min() and fused["x2"].max() <= found["x2"].max() + 1e-9
    assert len(fuse.nms(fuse.nms(found))) == len(fuse.nms(found))


def test_worth_is_the_squared_share_of_hits_over_the_boxes_of_the_class():
    """Class 1 hits in 3 of 4, class 2 in 1 of 4 with the same scores; class 3 never hits."""
    images, rows = range(12), [(n, 0, 0, 9, 9, 1 + n // 4) for n in range(12)]
    truth = pd.DataFrame(rows, columns=TRUTH)
    missed = truth.assign(score=0.5, x2=[9, 9, 9, 2, 9, 2, 2, 2, 2, 2, 2, 2])
    result = ev.match(truth, missed, images=images, classes=3)
    asked = pd.DataFrame({"label": [3, 2, 1, 1], "score": [0.9, 0.9, 0.1, 0.5]})
    expected = [0, 0.25**2 / 4, 0.75**2 / 4, 0.75**2 / 4]
    np.testing.assert_allclose(ev.worth(result, asked), expected)
    rising = missed.assign(score=np.tile([0.9, 0.8, 0.7, 0.1], 3))
    low, high = ev.worth(ev.match(truth, rising, images=images, classes=3), asked)[[2, 3]]
    assert low == 0 and high > 0, "never falls with the score"
