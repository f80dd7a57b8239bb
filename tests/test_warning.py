"""Drift as a warning: scikit-learn as oracle, brute force over pairs, and planted truths."""

import itertools

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from dlia_utils.explain import warning as w


def tables(events, drift, *, confidence=0.8, **scores):
    """Both tables from arrays [images,severities] of wrong answers and drift."""
    images, severities = events.shape
    clean = pd.DataFrame({"image": range(images), "label": 0, "corruption": "clean", "severity": 0})
    clean = clean.assign(predicted=0, p0=0.9, p1=0.1)
    copies = clean.loc[clean.index.repeat(severities)].reset_index(drop=True)
    p1 = np.where(events, confidence, 1 - confidence).ravel()
    steps = np.tile(np.arange(severities) + 1, images)
    copies = copies.assign(corruption="noise", severity=steps, predicted=events.ravel().astype(int))
    copies = copies.assign(p0=1 - p1, p1=p1)
    maps = copies[["image", "corruption", "severity"]].assign(method="gradcam", layer="layer4_1")
    maps = maps.assign(rmse=drift.ravel(), **{name: v.ravel() for name, v in scores.items()})
    return pd.concat([clean, copies], ignore_index=True), maps


def noisy(images=60, severities=3, *, strength=1.0, seed=0, rate=0.3):
    """Wrong answers and a drift that is higher with them."""
    rng = np.random.default_rng(seed)
    events = rng.random((images, severities)) < rate
    return events, strength * events + rng.normal(size=events.shape)


def judged(predictions, maps, patients=None, **options):
    images = predictions["image"].unique()
    patients = dict(zip(images, images, strict=True)) if patients is None else patients
    return w.judge(predictions, maps, patients, **{"events": ["error"], "draws": 20} | options)


def found(table, reading, metric="auroc", predictor="gradcam layer4_1 rmse"):
    wanted = {"reading": reading, "metric": metric, "predictor": predictor}
    (row,) = table[(table[list(wanted)] == pd.Series(wanted)).all(axis=1)].to_dict("records")
    return row


@pytest.mark.parametrize("reading", w.READINGS)
@pytest.mark.parametrize("rate", [0.2, 0.8])
def test_single_copies_equal_scikit_learn_whatever_the_order_of_rows(reading, rate):
    events, drift = noisy(90, 1, rate=rate)
    drift = drift.round(1)  # ties
    predictions, maps = tables(events, drift)
    table = judged(predictions, maps.sample(frac=1, random_state=1))
    truth = roc_auc_score(events[:, 0], drift[:, 0])
    assert found(table, reading)["value"] == pytest.approx(truth)


def test_every_draw_of_every_reading_is_that_of_all_pairs_of_different_images():
    """Ties and undefined scores count one half; mixed, every image weighs one."""
    events, drift = noisy(9, 4, seed=5)
    drift = drift.round(0)
    drift[1, 1] = drift[4, 2] = np.nan
    predictions, maps = tables(events, drift)
    maps = maps[~((maps["image"] == 3) & (maps["severity"] > 1))]  # one image has a single copy
    patients = {image: image % 5 for image in range(9)}  # patients of two images
    table = judged(predictions, maps, patients, draws=7)
    copies = w.outcomes(predictions).merge(maps)
    image, score = copies["image"].to_numpy(), copies["rmse"].to_numpy()
    draws = np.random.default_rng(0).multinomial(5, np.full(5, 0.2), size=7)
    for reading, cells in w.CELLS.items():
        share = 1 / np.bincount(image)[image] if reading == "mixed" else np.ones(len(image))
        cell = copies[cells].astype(str).agg(" ".join, axis=1).to_numpy()
        values = []
        for weight in [np.ones(5), *draws]:
            mass = share * weight[image % 5]
            won = total = 0.0
            for a, b in itertools.product(np.flatnonzero(copies["error"]), range(len(copies))):
                if not copies["error"][b] and image[a] != image[b] and cell[a] == cell[b]:
                    beats = (score[a] > score[b]) + (score[a] == score[b]) / 2
                    beats = 0.5 if np.isnan(score[[a, b]]).any() else beats
                    won, total = won + beats * mass[a] * mass[b], total + mass[a] * mass[b]
            values.append(won / total if total else np.nan)
        row = found(table, reading)
        ends = np.nanquantile(values[1:], [0.025, 0.975])
        assert [row["value"], row["ci_low"], row["ci_high"]] == pytest.approx([values[0], *ends])


# ------------------------------------------------------------------------------ planted truths


def test_severity_that_drives_both_is_seen_through_within_only():
    rng = np.random.default_rng(0)
    severity = np.tile(np.arange(1, 6), (800, 1))
    events = rng.random((800, 5)) < 0.15 * severity
    table = judged(*tables(events, severity + 0.5 * rng.normal(size=events.shape)), draws=100)
    within, mixed = found(table, "within"), found(table, "mixed")
    assert mixed["ci_low"] > 0.7 and abs(within["value"] - 0.5) < 0.03  # three standard errors
    assert mixed["ci_low"] > within["ci_high"]
    assert found(table, "mixed", predictor="severity")["value"] > mixed["value"] - 0.01
    assert "severity" not in set(table.loc[table["reading"] == "within", "predictor"])


def test_a_map_that_only_tells_the_classes_apart_warns_within_but_not_at_the_same_answer():
    rng = np.random.default_rng(0)
    healthy = np.repeat([True, False], 300)[:, None]
    # Nearly all are called ill.
    events = np.where(healthy, rng.random((600, 2)) < 0.9, rng.random((600, 2)) < 0.1)
    predictions, maps = tables(events, healthy + 0.2 * rng.normal(size=events.shape))
    ill = predictions["image"].ge(300)
    for column in ("label", "predicted"):
        predictions[column] = np.where(ill, 1 - predictions[column], predictions[column])
    table = judged(predictions, maps, draws=100)
    assert found(table, "within")["ci_low"] > 0.8
    assert abs(found(table, "same answer")["value"] - 0.5) < 0.06


def test_scores_that_fall_with_drift_are_turned_and_undefined_ones_say_nothing():
    events, drift = noisy()
    never = np.full(events.shape, np.nan)
    table = judged(*tables(events, drift, ssim=-drift, centre_shift=never))
    numbers = ["reading", "metric", "value", "ci_low", "ci_high"]
    rmse, ssim = (
        table[table["score"] == score][numbers].reset_index(drop=True) for score in ("rmse", "ssim")
    )
    pd.testing.assert_frame_equal(rmse, ssim)
    assert rmse["value"].iloc[0] > 0.6
    assert found(table, "mixed", predictor="gradcam layer4_1 centre_shift")["value"] == 0.5


def test_a_predictor_that_is_the_uncertainty_gains_exactly_nothing():
    events, _ = noisy()
    confidence = np.random.default_rng(1).uniform(0.5, 1, events.shape)
    both = tables(events, 1 - confidence, confidence=confidence)
    table = judged(*both, against=["uncertainty", "p_shift"], events=w.OUTCOMES)
    gains = table[table["metric"] == "auroc_over_uncertainty"]
    assert len(gains) == 9 and (gains[["value", "ci_low", "ci_high"]].abs() < 1e-12).all(axis=None)
    shift = found(table[table["outcome"] == "error"], "within", "auroc_over_p_shift")
    assert shift["value"] < -0.3 and shift["ci_high"] < 0  # a wrong answer has moved far


# ---------------------------------------------------------------------------- outcomes, choice


def test_outcomes_of_three_classes():
    rows = [
        (0, 1, "clean", 0, 1, 0.2, 0.7, 0.1),
        (0, 1, "blur", 1, 2, 0.1, 0.3, 0.6),
        (1, 0, "clean", 0, 2, 0.1, 0.1, 0.8),
        (1, 0, "blur", 1, 1, 0.3, 0.4, 0.3),
        (2, 2, "clean", 0, 0, 0.5, 0.2, 0.3),
        (2, 2, "blur", 1, 2, 0.2, 0.2, 0.6),
    ]
    columns = "image label corruption severity predicted p0 p1 p2".split()
    table = w.outcomes(pd.DataFrame(rows, columns=columns))
    assert table["error"].tolist() == [True, True, False] and table["flip"].all()
    assert table["new_error"].tolist() == [True, False, False]
    assert table["uncertainty"].tolist() == pytest.approx([0.4, 0.6, 0.4])
    assert table["p_shift"].tolist() == pytest.approx([0.5, 0.5, 0.3])


def test_new_errors_are_asked_of_images_that_were_right():
    predictions, maps = tables(*noisy(60, 2))
    wrong = predictions["image"] < 20
    predictions.loc[wrong & predictions["severity"].eq(0), "predicted"] = 1
    table = judged(predictions, maps, events=["new_error"], readings=["mixed"])
    rest = judged(predictions[~wrong], maps[maps["image"] >= 20], readings=["mixed"])
    assert table["n"].eq(40).all() and np.allclose(table["value"], rest["value"])
    predictions.loc[predictions["severity"] == 0, "predicted"] = 1
    table = judged(predictions, maps, events=["new_error"])
    assert table["value"].isna().all() and table["n"].eq(0).all() and w.metric_rows(table).empty


def test_select_takes_the_best_and_never_turns_a_score_round():
    events, drift = noisy(200, 2)
    noise = np.random.default_rng(9).normal(size=events.shape)
    predictions, maps = tables(events, 0.2 * drift + noise, rmse_raw=drift, ssim=5.0 * events)
    deeper = maps.assign(layer="layer1_2", rmse=maps["rmse_raw"])
    both = pd.concat([maps, deeper.assign(ssim=0.0)])
    # ssim grows with the errors here, so as a drift score it is perfectly wrong; equals go by name.
    for table in (both, both.sample(frac=1, random_state=2)):
        assert w.select(predictions, table) == ("gradcam", "layer1_2", "rmse")
    with pytest.raises(ValueError, match="both wrong and right answers"):
        w.select(*tables(np.zeros((5, 2), bool), np.ones((5, 2))))


def test_rows_do_not_collide():
    predictions, maps = tables(*noisy(), ssim=np.zeros((60, 3)))
    rows = w.metric_rows(judged(predictions, maps, events=w.OUTCOMES))
    assert not rows.duplicated(["attack", "eps", "eps_unit", "metric"]).any()
    assert len(rows) == 3 * (3 * (2 + 4) + 1)  # severity is a competitor when mixed


def test_maps_of_different_copies_are_refused():
    predictions, maps = tables(*noisy(10, 2))
    uneven = pd.concat([maps.iloc[:-1], maps.assign(layer="layer1_2")])
    with pytest.raises(ValueError, match="lacks copies for some maps"):
        judged(predictions, uneven)


def test_reference_rows_and_images_without_drift_are_not_judged():
    predictions, maps = tables(*noisy(20, 2))
    extra = maps.head(20).assign(corruption="random pair", severity=0, rmse=99.0)
    some = maps[maps["image"] < 12]
    table = judged(predictions, pd.concat([some, extra]))
    pd.testing.assert_frame_equal(table, judged(predictions[predictions["image"] < 12], some))
    assert table["n"].eq(12).all()
