"""The one matching pass against pycocotools and torchmetrics; curves, thresholds and intervals against brute force."""

import contextlib
import io
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection import MeanAveragePrecision

from dlia_utils import metrics
from dlia_utils.detect import evaluate as ev

TRUTH = ["image", "x1", "y1", "x2", "y2", "label"]
CORNERS = TRUTH[1:5]


def boxes(rng, n, *, images, classes, whole=False, spread=200):
    """n random boxes; `whole`: corners on a grid of 10 pixels, so that equal IoU is common."""
    low, side = rng.uniform(0, spread, (n, 2)), rng.uniform(15, 90, (n, 2))
    if whole:
        low, side = low // 10 * 10, side // 10 * 10 + 10
    table = pd.DataFrame(np.hstack([low, low + side]), columns=CORNERS)
    return table.assign(image=rng.choice(images, n), label=rng.integers(1, classes + 1, n))[TRUTH]


def detections(rng, truth, *, images, classes, noise=6.0, extra=60, whole=False):
    """Shifted true boxes, some twice, and false ones."""
    near = truth.sample(frac=1.6, replace=True, random_state=int(rng.integers(1 << 30)))
    near[CORNERS] += (
        np.repeat(rng.normal(0, noise, (len(near), 2)), 2, axis=0)
        .reshape(-1, 2, 2)
        .swapaxes(1, 2)
        .reshape(-1, 4)
    )
    if whole:
        near[CORNERS] = near[CORNERS] // 10 * 10
    found = pd.concat(
        [near, boxes(rng, extra, images=images, classes=classes, whole=whole)], ignore_index=True
    )
    hint = np.r_[rng.beta(3, 2, len(near)), rng.beta(2, 4, extra)]
    found = found.assign(score=hint).sample(frac=1, random_state=0, ignore_index=True)
    return found[(found.x1 < found.x2) & (found.y1 < found.y2)].reset_index(drop=True)


def scene(kind, seed=0):
    """truth, predictions, images (not in order), number of classes, max_detections."""
    rng = np.random.default_rng([seed, len(kind)])
    images, classes, most = rng.permutation(200)[:30] + 5, 4, 100
    if kind == "crowded":
        images = images[:3]
        truth = boxes(rng, 150, images=images, classes=2, spread=120)
        return truth, detections(rng, truth, images=images, classes=2, extra=200), images, 2, most
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
    elif (
        kind == "gaps"
    ):  # class 1 without truth, class 2 without predictions, an image without either
        truth, found = truth[truth.label != 1], found[found.label != 2]
    elif kind == "too many":
        most = 2
    return truth, found, images, classes, most


KINDS = [
    "random",
    "tied",
    "grid",
    "one score",
    "crowded",
    "no predictions",
    "no truth",
    "gaps",
    "too many",
]


def pycoco(truth, found, images, classes, *, most=100, ious=ev.COCO_IOUS):
    """Average precision [K,T] by pycocotools, NaN for classes without truth."""

    def annotations(table):
        xywh = np.c_[table[["x1", "y1"]], table.x2 - table.x1, table.y2 - table.y1]
        rows = zip(
            table.image, table.label, xywh, table.get("score", np.ones(len(table))), strict=True
        )
        return [
            {
                "id": i,
                "image_id": int(image),
                "category_id": int(label),
                "bbox": box.tolist(),
                "score": score,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i, (image, label, box, score) in enumerate(rows, start=1)
        ]

    def coco(table):
        result = COCO()
        names = [{"id": k} for k in range(1, classes + 1)]
        result.dataset = {
            "images": [{"id": int(i)} for i in images],
            "categories": names,
            "annotations": annotations(table),
        }
        result.createIndex()
        return result

    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(coco(truth), coco(found), "bbox")
        run.params.iouThrs, run.params.maxDets = np.array(ious), [most]
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 0]
    return np.where(precision[:, 0] < 0, np.nan, precision.mean(1)).T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_average_precision_equals_pycocotools(kind, seed):
    truth, found, images, classes, most = scene(kind, seed)
    result = ev.match(
        truth, found, images=images, classes=classes, iou=ev.COCO_IOUS, max_detections=most
    )
    expected = pycoco(truth, found, images, classes, most=most)
    table = ev.average_precision(result)
    np.testing.assert_allclose(table.to_numpy(), expected, rtol=0, atol=1e-9)
    assert table.index.tolist() == list(range(1, classes + 1)) and table.columns[1] == 0.55
    if kind not in ("no predictions", "no truth"):
        assert 0.02 < np.nanmean(expected) < 0.98, "a scene that says something"
        assert ev.summary(result)["mAP50"] == pytest.approx(np.nanmean(expected[:, 0]), abs=1e-9)
        assert ev.summary(result)["mAP50_95"] == pytest.approx(np.nanmean(expected), abs=1e-9)


def test_equal_iou_goes_to_the_later_true_box():
    truth = pd.DataFrame([[0, 0, 0, 10, 10, 1], [0, 4, 0, 14, 10, 1]], columns=TRUTH)
    # The first prediction lies between both; only if it takes the second is the first left for the next one.
    found = pd.DataFrame([[0, 2, 0, 12, 10, 1], [0, 0, 0, 10, 10, 1]], columns=TRUTH).assign(
        score=[0.9, 0.8]
    )
    assert ev.match(truth, found, images=[0], classes=1).hit.tolist() == [[True, True]]
    assert ev.match(truth[::-1], found, images=[0], classes=1).hit.tolist() == [[True, False]]
    for order in (truth, truth[::-1]):
        own = ev.average_precision(ev.match(order, found, images=[0], classes=1, iou=ev.COCO_IOUS))
        np.testing.assert_allclose(own, pycoco(order, found, [0], 1), atol=1e-9)


@pytest.mark.parametrize("kind", ["random", "tied", "gaps", "crowded"])
def test_mean_average_precision_equals_torchmetrics(kind):
    truth, found, images, classes, _ = scene(kind)
    # Its own 101 recalls are float32, and 0.2 in float32 is above 0.2: which cost 4e-4 of mAP in one scene.
    recalls = np.linspace(0, 1, 101).tolist()
    metric = MeanAveragePrecision(
        class_metrics=True, iou_thresholds=list(ev.COCO_IOUS), rec_thresholds=recalls
    )

    def per_image(table, image, **more):
        own = table[table.image == image]
        return {
            "boxes": torch.tensor(own[CORNERS].to_numpy(), dtype=torch.float32),
            "labels": torch.tensor(own.label.to_numpy()),
        } | {name: torch.tensor(own[column].to_numpy()) for name, column in more.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        order = sorted(images)  # it breaks ties between images by the order in which it meets them
        metric.update(
            [per_image(found, i, scores="score") for i in order],
            [per_image(truth, i) for i in order],
        )
        expected = metric.compute()
    result = ev.match(truth, found, images=images, classes=classes, iou=ev.COCO_IOUS)
    table, own = ev.average_precision(result), ev.summary(result)
    assert own["mAP50"] == pytest.approx(expected["map_50"].item(), abs=1e-4)
    assert own["mAP50_95"] == pytest.approx(expected["map"].item(), abs=1e-4)
    seen = table.loc[expected["classes"].tolist()].mean(axis=1)
    per_class = expected["map_per_class"].numpy()
    np.testing.assert_allclose(seen.fillna(-1), per_class, atol=1e-4)


def test_perfect_and_hopeless_predictions():
    truth, _, images, classes, _ = scene("random")
    perfect = ev.match(
        truth, truth.assign(score=0.7), images=images, classes=classes, iou=ev.COCO_IOUS
    )
    assert ev.summary(perfect) == {"mAP50": 1.0, "mAP50_95": 1.0}
    assert ev.froc(perfect).drop(columns="label").eq(1).all(axis=None)
    best = ev.best_thresholds(perfect)
    assert (
        best.threshold.eq(0.7).all()
        and best.f1.eq(1).all()
        and best.label.tolist() == ["all", 1, 2, 3, 4]
    )
    away = truth.assign(score=0.7, x1=truth.x1 + 1000, x2=truth.x2 + 1000)
    hopeless = ev.match(truth, away, images=images, classes=classes)
    assert ev.summary(hopeless) == {"mAP50": 0.0}
    best = ev.best_thresholds(hopeless)
    assert best.threshold.isna().all() and best.f1.eq(0).all() and best.fp_per_image.eq(0).all()


def test_the_other_tables_bear_emptiness():
    for kind in ("no predictions", "no truth"):
        truth, found, images, classes, _ = scene(kind)
        result = ev.match(truth, found, images=images, classes=classes, iou=ev.COCO_IOUS)
        assert (
            len(ev.threshold_sweep(result)) == 8 and len(ev.best_thresholds(result)) == classes + 1
        )
        assert len(ev.bootstrap(result, images, draws=5)) == 4 + classes
        expected = [0.0] if kind == "no predictions" else [np.nan]
        np.testing.assert_array_equal(np.unique(ev.froc(result)["mean"]), expected)
        assert (len(ev.curve(result)) == 0) == (kind == "no predictions")


# ------------------------------------------------------------------------------------------- curves


def cut(found, threshold):
    return found[found.score >= threshold]


@pytest.mark.parametrize("kind", ["random", "tied", "gaps"])
@pytest.mark.parametrize("label", [None, 3])
def test_every_point_of_a_curve_equals_matching_what_is_left_above_the_threshold(kind, label):
    truth, found, images, classes, _ = scene(kind)
    table = ev.curve(ev.match(truth, found, images=images, classes=classes), label)
    assert table.threshold.is_monotonic_decreasing
    own_truth = truth if label is None else truth[truth.label == label]
    own = found if label is None else found[found.label == label]
    assert table.threshold.tolist() == sorted(own.score.unique(), reverse=True)
    for row in table.iloc[:: max(1, len(table) // 8)].itertuples():
        kept = cut(own, row.threshold)
        hits = ev.match(own_truth, kept, images=images, classes=classes).hit.sum()
        assert row.precision == pytest.approx(hits / len(kept))
        assert row.recall == pytest.approx(hits / len(own_truth))
        assert row.f1 == pytest.approx(2 * hits / (len(kept) + len(own_truth)))
        assert row.fp_per_image == pytest.approx((len(kept) - hits) / len(images))


@pytest.mark.parametrize("kind", ["random", "tied", "gaps"])
def test_froc_is_the_best_sensitivity_within_each_rate(kind):
    truth, found, images, classes, _ = scene(kind)
    result = ev.match(truth, found, images=images, classes=classes)
    table = ev.froc(result).set_index("label")
    for label in ("all", 1, 3):
        points = ev.curve(result, None if label == "all" else label)
        if points.recall.isna().any():
            assert table.loc[label].isna().all()
            continue
        expected = [points.recall[points.fp_per_image <= rate].max() for rate in ev.RATES]
        np.testing.assert_allclose(
            table.loc[label, list(ev.RATES)].astype(float), np.nan_to_num(expected)
        )
        assert table.loc[label, "mean"] == pytest.approx(np.mean(np.nan_to_num(expected)))
    assert table.loc["all", list(ev.RATES)].is_monotonic_increasing


def test_froc_at_a_loose_hit_rule():
    truth, found, images, classes, _ = scene("random")
    result = ev.match(truth, found, images=images, classes=classes, iou=(0.5, 0.1))
    loose, usual = (ev.froc(result, iou=iou)["mean"][0] for iou in (0.1, 0.5))
    alone = ev.froc(ev.match(truth, found, images=images, classes=classes, iou=(0.1,)), iou=0.1)[
        "mean"
    ][0]
    assert loose > usual and loose == alone
    with pytest.raises(ValueError, match=r"IoU 0.3 was not matched, only 0.1, 0.5"):
        ev.froc(result, iou=0.3)


def test_best_thresholds_by_brute_force():
    truth, found, images, classes, _ = scene("tied")
    result = ev.match(truth, found, images=images, classes=classes)
    by_f1 = ev.best_thresholds(result).set_index("label")
    by_froc = ev.best_thresholds(result, objective="froc", fp_per_image=0.2).set_index("label")
    for label in ("all", 1, 2, 3, 4):
        points = ev.curve(result, None if label == "all" else label)
        assert by_f1.loc[label, "f1"] == points.f1.max()
        assert by_f1.loc[label, "threshold"] == points.threshold[points.f1 == points.f1.max()].max()
        allowed = points[points.fp_per_image <= 0.2]
        assert by_froc.loc[label, "recall"] == allowed.recall.max()
        assert (
            by_froc.loc[label, "threshold"]
            == allowed.threshold[allowed.recall == allowed.recall.max()].max()
        )
    strict = ev.best_thresholds(result, objective="froc", fp_per_image=0)
    assert strict.threshold.isna().any() and not strict.fp_per_image.any()
    with pytest.raises(ValueError, match="'f1' or 'froc'"):
        ev.best_thresholds(result, objective="mAP")


@pytest.mark.parametrize("kind", ["random", "tied", "gaps"])
def test_the_sweep_equals_evaluating_each_cut_and_mAP_only_falls(kind):
    truth, found, images, classes, _ = scene(kind)
    table = ev.threshold_sweep(ev.match(truth, found, images=images, classes=classes))
    assert table.threshold.tolist() == [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4]
    for row in table.itertuples():
        kept = cut(found, row.threshold)
        expected = pycoco(truth, kept, images, classes, ious=(0.5,))
        assert row.mAP50 == pytest.approx(np.nanmean(expected), abs=1e-9)
        hits = ev.match(truth, kept, images=images, classes=classes).hit.sum()
        assert row.recall == pytest.approx(hits / len(truth)) and row.precision == pytest.approx(
            hits / len(kept)
        )
    assert table.mAP50.is_monotonic_decreasing and table.mAP50.iloc[-1] < table.mAP50.iloc[0]
    assert table.mAP50.idxmax() == 0, "what the published sweep must always choose"
    assert table.f1.idxmax() > 0
    nothing = ev.threshold_sweep(
        ev.match(truth, found, images=images, classes=classes), [1.0]
    ).iloc[0]
    assert nothing.mAP50 == 0 and nothing.recall == 0 and np.isnan(nothing.precision)


# ------------------------------------------------------------------------------------------- intervals


def repeated(table, images, weight):
    """The table of a set in which each image counts `weight` times: copies stand side by side as images of their own."""
    copies = dict(
        zip(
            sorted(images),
            np.split(np.arange(weight.sum()), np.cumsum(weight[np.argsort(images)])[:-1]),
            strict=True,
        )
    )
    parts = [
        table[table.image == image].assign(image=copy)
        for image in sorted(images)
        for copy in copies[image]
    ]
    return pd.concat([table[:0], *parts], ignore_index=True)


@pytest.fixture(scope="module")
def resampled():
    """A scene with equal scores across, not within, images; its pass, its patients and some bootstrap weights."""
    truth, found, images, classes, _ = scene("random", seed=4)
    rng = np.random.default_rng(0)
    grid = found.groupby("image").score.transform(
        lambda own: rng.choice(np.arange(1, 60) / 60, len(own), False)
    )
    found = found.assign(score=grid)
    groups = rng.integers(0, 12, len(images))
    weights = metrics.patient_weights(groups, draws=6, seed=3)
    result = ev.match(truth, found, images=images, classes=classes, iou=ev.COCO_IOUS)
    return truth, found, images, classes, result, groups, weights


def test_every_draw_equals_evaluating_the_repeated_set(resampled):
    truth, found, images, classes, result, _, weights = resampled
    assert found.score.duplicated().sum() > 50
    values = ev._statistics(result, weights, None, 0.5)
    for draw, weight in enumerate(weights.astype(int)):
        again = [repeated(table, images, weight) for table in (truth, found)]
        anew = ev.match(*again, images=range(weight.sum()), classes=classes, iou=ev.COCO_IOUS)
        assert values["mAP50", "all"][draw] == pytest.approx(ev.summary(anew)["mAP50"], abs=1e-12)
        assert values["mAP50_95", "all"][draw] == pytest.approx(
            ev.summary(anew)["mAP50_95"], abs=1e-12
        )
        froc = ev.froc(anew).iloc[0]
        assert values["froc_mean", "all"][draw] == pytest.approx(froc["mean"], abs=1e-12)
        assert values["sensitivity_at_1", "all"][draw] == froc[1]
        own = [values["AP50", label][draw] for label in range(1, classes + 1)]
        np.testing.assert_allclose(own, ev.average_precision(anew)[0.5], atol=1e-12)
        if not draw:
            np.testing.assert_allclose(
                own, pycoco(*again, range(weight.sum()), classes, ious=(0.5,))[:, 0], atol=1e-9
            )


def test_the_table_of_intervals(resampled):
    _, _, images, classes, result, groups, _ = resampled
    table = ev.bootstrap(result, groups, draws=200)
    assert list(table.columns) == ["metric", "label", "value", "ci_low", "ci_high", "n"]
    assert (
        table.metric.tolist() == [*ev.STATISTICS[:4], *["AP50"] * classes]
        and table.n.eq(len(images)).all()
    )
    assert table.label.tolist() == ["all"] * 4 + list(range(1, classes + 1))
    assert ((table.ci_low < table.value) & (table.value < table.ci_high)).all()
    assert (
        table.value[0] == ev.summary(result)["mAP50"]
        and table.value[2] == ev.froc(result)["mean"][0]
    )
    pd.testing.assert_frame_equal(table, ev.bootstrap(result, groups, draws=200))
    assert not table.equals(ev.bootstrap(result, groups, draws=200, seed=1))
    alone = ev.bootstrap(result, groups, draws=200, statistics=("sensitivity_at_1", "mAP50"))
    assert alone.metric.tolist() == ["sensitivity_at_1", "mAP50"]
    assert alone.iloc[1].equals(table.iloc[0])


def test_chunks_change_nothing(resampled, monkeypatch):
    result, groups = resampled[4:6]
    whole = ev.bootstrap(result, groups, draws=20)
    monkeypatch.setattr(ev, "CHUNK", 500)
    pd.testing.assert_frame_equal(whole, ev.bootstrap(result, groups, draws=20), rtol=1e-12)


def test_patients_are_drawn_whole_and_unknown_ones_stand_alone(resampled):
    _, _, images, _, result, groups, _ = resampled
    alone = ev.bootstrap(result, np.arange(len(images)), draws=50)
    pd.testing.assert_frame_equal(ev.bootstrap(result, [None] * len(images), draws=50), alone)
    pd.testing.assert_frame_equal(ev.bootstrap(result, [np.nan] * len(images), draws=50), alone)
    one = ev.bootstrap(result, ["p"] * len(images), draws=50)
    assert one.ci_low.equals(one.value) and one.ci_high.equals(one.value)
    with pytest.raises(ValueError, match=r"groups has 3 entries, but 30 images"):
        ev.bootstrap(result, [1, 2, 3])


def test_the_paired_difference_is_narrower_than_the_two_intervals(resampled):
    truth, found, images, classes, result, groups, weights = resampled
    other = found.assign(
        score=(found.score + 0.2 * np.random.default_rng(1).random(len(found))).clip(0, 1)
    )
    second = ev.match(truth, other, images=images, classes=classes, iou=ev.COCO_IOUS)
    pair = ev.paired_bootstrap(result, second, groups, draws=300)
    a, b = (ev.bootstrap(one, groups, draws=300) for one in (result, second))
    np.testing.assert_allclose(pair.value, a.value - b.value, atol=1e-12)
    width = pair.ci_high - pair.ci_low
    assert (width < np.hypot(a.ci_high - a.ci_low, b.ci_high - b.ci_low))[:4].all()
    same = ev.paired_bootstrap(result, result, groups, draws=20)
    assert same[["value", "ci_low", "ci_high"]].eq(0).all(axis=None)
    with pytest.raises(ValueError, match="differ in images, classes or true boxes"):
        ev.paired_bootstrap(
            result, ev.match(truth[1:], found, images=images, classes=classes), groups
        )


def test_statistics_that_the_pass_does_not_allow(resampled):
    truth, found, images, classes, _, groups, _ = resampled
    half = ev.match(truth, found, images=images, classes=classes)
    assert "mAP50_95" not in ev.bootstrap(half, groups, draws=2).metric.tolist()
    with pytest.raises(ValueError, match="iou=COCO_IOUS"):
        ev.bootstrap(half, groups, draws=2, statistics=["mAP50_95"])
    with pytest.raises(ValueError, match=r"unknown statistics \['map'\]"):
        ev.bootstrap(half, groups, draws=2, statistics=["map"])
    loose = ev.match(truth, found, images=images, classes=classes, iou=(0.1,))
    assert ev.bootstrap(loose, groups, draws=2, iou=0.1).metric.tolist() == [
        "froc_mean",
        "sensitivity_at_1",
    ]
    with pytest.raises(ValueError, match="IoU 0.5 was not matched"):
        ev.summary(loose)


# ------------------------------------------------------------------------------------------- input


GOOD = pd.DataFrame([[3, 0.0, 0.0, 9.0, 9.0, 1], [4, 0.0, 0.0, 9.0, 9.0, 2]], columns=TRUTH)


@pytest.mark.parametrize(
    "column, value, message",
    [
        (
            "label",
            0,
            r"label below 1: 0 is the background, so classes are numbered 1..K \(1 of 2 rows, first row 1: 0",
        ),
        ("label", 3, r"a label that is no class \(the classes are \(1, 2\)\)"),
        ("label", 1.5, "a label that is no class"),
        ("x1", np.nan, "NaN or an infinite value in column 'x1'"),
        ("y2", np.inf, "NaN or an infinite value in column 'y2'"),
        ("x2", 0.0, "x1 >= x2; corners are x1 < x2"),
        ("y1", 12.0, "y1 >= y2"),
        ("image", 5, "an image id that `images` lacks"),
        ("score", 1.2, r"a score outside \[0, 1\]"),
        ("score", -0.1, r"a score outside \[0, 1\]"),
        ("x1", "left", "column 'x1' must hold numbers"),
    ],
)
@pytest.mark.parametrize("which", ["truth", "predictions"])
def test_broken_tables_are_refused_with_the_row(which, column, value, message):
    if (which, column) == ("truth", "score"):
        return
    tables = {"truth": GOOD.copy(), "predictions": GOOD.assign(score=0.5)}
    tables[which] = tables[which].astype({column: object})
    tables[which].loc[1, column] = value
    with pytest.raises(ValueError, match=f"{which}: .*{message}|{which}: {message}"):
        ev.match(**tables, images=[3, 4], classes=2)


def test_missing_columns_and_arguments_are_named():
    scored = GOOD.assign(score=0.5)
    with pytest.raises(ValueError, match=r"predictions lacks the columns \['score'\]"):
        ev.match(GOOD, GOOD, images=[3, 4], classes=2)
    with pytest.raises(ValueError, match="an id twice"):
        ev.match(GOOD, scored, images=[3, 4, 4], classes=2)
    with pytest.raises(ValueError, match="images must be the ids"):
        ev.match(GOOD, scored, images=[], classes=2)
    for classes in (0, [], ["Mass"], [0, 1], 2.5):
        with pytest.raises(ValueError, match="give the number of classes"):
            ev.match(GOOD, scored, images=[3, 4], classes=classes)
    for iou in ((), (0.0,), (1.1,)):
        with pytest.raises(ValueError, match="thresholds must lie in"):
            ev.match(GOOD, scored, images=[3, 4], classes=2, iou=iou)
    with pytest.raises(ValueError, match="max_detections is 0"):
        ev.match(GOOD, scored, images=[3, 4], classes=2, max_detections=0)
    result = ev.match(GOOD, scored, images=[3, 4], classes=[1, 2])
    with pytest.raises(ValueError, match="label 7 is not one of the classes"):
        ev.curve(result, 7)
    with pytest.raises(ValueError, match="negative number of false positives"):
        ev.froc(result, rates=(-1, 1))


def test_labels_with_gaps_extra_columns_and_nothing_touched():
    truth, found = (
        GOOD.replace({"label": {2: 9}}),
        GOOD.replace({"label": {2: 9}}).assign(score=0.5, view=0, class_name="x"),
    )
    before = truth.copy(), found.copy()
    table = ev.average_precision(ev.match(truth, found, images=[4, 3], classes=[9, 1]))
    assert table.index.tolist() == [1, 9] and table[0.5].tolist() == [1.0, 1.0]
    pd.testing.assert_frame_equal(truth, before[0])
    pd.testing.assert_frame_equal(found, before[1])
