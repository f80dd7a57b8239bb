"""Drift as a warning: scikit-learn and scipy as oracles, brute force over pairs, and planted truths."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from dlia_utils.explain import warning as w

ONE = ("gradcam", "layer4_1", "rmse")


def tables(
    events: np.ndarray,
    drift: np.ndarray,
    *,
    confidence: np.ndarray | None = None,
    **scores: np.ndarray,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables from arrays [images,severities] of wrong answers and drift; every clean answer is right."""
    images, severities = events.shape
    confidence = np.full(events.shape, 0.8) if confidence is None else confidence
    clean = pd.DataFrame(
        {
            "image": range(images),
            "label": 0,
            "corruption": "clean",
            "severity": 0,
            "predicted": 0,
            "p0": 0.9,
            "p1": 0.1,
        }
    )
    copies = pd.DataFrame(
        {
            "image": np.repeat(np.arange(images), severities),
            "label": 0,
            "corruption": "noise",
            "severity": np.tile(np.arange(severities) + 1, images),
            "predicted": events.ravel().astype(int),
        }
    )
    p1 = np.where(events, confidence, 1 - confidence).ravel()
    copies = copies.assign(p0=1 - p1, p1=p1)
    maps = copies[["image", "corruption", "severity"]].assign(
        method="gradcam", layer="layer4_1", rmse=drift.ravel()
    )
    maps = maps.assign(**{name: values.ravel() for name, values in scores.items()})
    return pd.concat([clean, copies], ignore_index=True), maps


def noisy(
    images: int = 60,
    severities: int = 3,
    *,
    strength: float = 1.0,
    seed: int = 0,
    rate: float = 0.3,
):
    """Wrong answers and a drift that is higher with them."""
    rng = np.random.default_rng(seed)
    events = rng.random((images, severities)) < rate
    return events, strength * events + rng.normal(size=events.shape)


def alone(predictions: pd.DataFrame) -> dict[int, int]:
    return {image: image for image in predictions["image"].unique()}


def found(
    table: pd.DataFrame, reading: str, metric: str = "auroc", predictor: str = " ".join(ONE)
) -> pd.Series:
    rows = table[
        table["reading"].eq(reading) & table["metric"].eq(metric) & table["predictor"].eq(predictor)
    ]
    assert len(rows) == 1
    return rows.iloc[0]


# ------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("reading", w.READINGS)
@pytest.mark.parametrize("rate", [0.2, 0.8])
def test_single_copies_equal_scikit_learn_and_scipy_in_every_draw(reading, rate):
    events, drift = noisy(90, 1, rate=rate)
    drift = drift.round(1)  # ties
    predictions, maps = tables(events, drift)
    table = w.warning(
        predictions,
        maps.sample(frac=1, random_state=1),
        alone(predictions),
        events=["error"],
        draws=5,
    )
    assert found(table, reading)["value"] == pytest.approx(roc_auc_score(events[:, 0], drift[:, 0]))
    assert found(table, reading, "spearman")["value"] == pytest.approx(
        spearmanr(events[:, 0], drift[:, 0]).statistic
    )

    copies = w.outcomes(predictions)
    weights = np.random.default_rng(3).integers(0, 3, (90, 6)).astype(float)
    design = w._design(copies, np.arange(90), "error", reading, weights)
    drawn = w._association(design, drift[:, 0])
    for draw, times in enumerate(weights.T.astype(int)):
        index = np.repeat(np.arange(90), times)
        assert drawn["auroc"][draw] == pytest.approx(
            roc_auc_score(events[index, 0], drift[index, 0])
        )
        assert drawn["spearman"][draw] == pytest.approx(
            spearmanr(events[index, 0], drift[index, 0]).statistic
        )


def test_within_is_the_mean_over_cells_weighted_by_pairs():
    events, drift = noisy(70, 4)
    events[:, 2] = False  # a cell without an event has no pairs
    events[5:, 3] = True
    predictions, maps = tables(events, drift)
    table = w.warning(predictions, maps, alone(predictions), events=["error"], draws=5)
    cells = [0, 1, 3]
    pairs = [events[:, c].sum() * (~events[:, c]).sum() for c in cells]
    auroc = np.average([roc_auc_score(events[:, c], drift[:, c]) for c in cells], weights=pairs)
    rank = np.average(
        [spearmanr(events[:, c], drift[:, c]).statistic for c in cells], weights=pairs
    )
    assert found(table, "within")["value"] == pytest.approx(auroc)
    assert found(table, "within", "spearman")["value"] == pytest.approx(rank)
    assert found(table, "within")["cells"] == 3 and found(table, "within")["events"] == events.sum()


def test_mixed_is_what_draws_of_one_copy_per_image_tend_to():
    events, drift = noisy(9, 4, seed=5)
    drift = drift.round(0)
    predictions, maps = tables(events, drift)
    keep = ~((maps["image"] == 3) & (maps["severity"] > 1))  # one image has a single copy
    maps = maps[keep]
    copies = w.outcomes(predictions).merge(maps)
    unit = copies["image"].to_numpy() % 5  # patients of two images
    weights = np.random.default_rng(0).integers(0, 3, (5, 4)).astype(float)
    weights[:, 0] = 1
    score = copies["rmse"].to_numpy().copy()
    score[[2, 11]] = np.nan
    drawn = w._association(w._design(copies, unit, "error", "mixed", weights), score)["auroc"]

    image, happened = copies["image"].to_numpy(), copies["error"].to_numpy()
    share = 1 / np.bincount(image)[image]

    def beats(a, b):
        return (
            0.5
            if np.isnan(score[a]) or np.isnan(score[b])
            else (score[a] > score[b]) + (score[a] == score[b]) / 2
        )

    met = [
        (a, b)
        for a, b in itertools.product(range(len(copies)), repeat=2)
        if happened[a] and not happened[b] and image[a] != image[b]
    ]
    for draw in range(4):
        weight = [
            weights[unit[a], draw] * share[a] * weights[unit[b], draw] * share[b] for a, b in met
        ]
        truth = np.average([beats(a, b) for a, b in met], weights=weight)
        assert drawn[draw] == pytest.approx(truth)

    rng, won, pairs = np.random.default_rng(1), 0.0, 0
    of = [np.flatnonzero(image == k) for k in range(9)]
    for _ in range(1500):
        one = [rng.choice(places) for places in of]
        duels = [beats(a, b) for a in one if happened[a] for b in one if not happened[b]]
        won, pairs = won + sum(duels), pairs + len(duels)
    assert drawn[0] == pytest.approx(won / pairs, abs=0.02)


# ------------------------------------------------------------------------------------------- planted truths


def test_severity_that_drives_both_is_seen_through_within_only():
    rng = np.random.default_rng(0)
    severity = np.tile(np.arange(1, 6), (800, 1))
    events = rng.random((800, 5)) < 0.15 * severity
    predictions, maps = tables(events, severity + 0.5 * rng.normal(size=events.shape))
    table = w.warning(predictions, maps, alone(predictions), events=["error"], draws=100)
    within, mixed = found(table, "within"), found(table, "mixed")
    assert mixed["ci_low"] > 0.7 and abs(within["value"] - 0.5) < 0.03  # three standard errors
    assert mixed["ci_low"] > within["ci_high"]
    assert found(table, "mixed", predictor="severity")["value"] > mixed["value"] - 0.01
    assert "severity" not in set(table.loc[table["reading"] == "within", "predictor"])


def test_a_map_that_only_tells_the_classes_apart_warns_within_but_not_at_the_same_answer():
    rng = np.random.default_rng(0)
    healthy = np.repeat([True, False], 300)[:, None]
    events = np.where(
        healthy, rng.random((600, 2)) < 0.9, rng.random((600, 2)) < 0.1
    )  # all called ill, nearly
    predictions, maps = tables(events, healthy + 0.2 * rng.normal(size=events.shape))
    ill = predictions["image"].ge(300)
    swapped = {
        column: np.where(ill, 1 - predictions[column], predictions[column])
        for column in ("label", "predicted")
    }
    predictions = predictions.assign(**swapped)
    table = w.warning(predictions, maps, alone(predictions), events=["error"], draws=100)
    assert found(table, "within")["ci_low"] > 0.8
    assert abs(found(table, "same answer")["value"] - 0.5) < 0.06
    assert found(table, "same answer")["cells"] == 4 and found(table, "within")["cells"] == 2
    assert w.verdict(table, reading="same answer").startswith(
        "At equal corruption, severity and clean answer, no"
    )


def test_copies_of_one_image_do_not_count_twice_when_mixed():
    events, drift = noisy(40, 3)
    predictions, maps = tables(events, drift)
    again = [
        t[t["image"].eq(7) & t["severity"].gt(0)].assign(corruption="again")
        for t in (predictions, maps)
    ]
    once = w.warning(predictions, maps, alone(predictions), draws=30, readings=["mixed"])
    twice = w.warning(
        pd.concat([predictions, again[0]]),
        pd.concat([maps, again[1]]),
        alone(predictions),
        draws=30,
        readings=["mixed"],
    )
    numbers = ["value", "ci_low", "ci_high"]
    rows = once["predictor"] != "severity"  # which may differ between the two
    assert np.allclose(
        once.loc[rows, numbers], twice.loc[rows, numbers], atol=1e-12, equal_nan=True
    )
    assert (twice["copies"] == once["copies"] + 3).all()


def test_patients_with_many_images_widen_the_interval():
    rng = np.random.default_rng(4)
    patient = np.repeat(np.arange(40), 6)
    wrong = np.repeat(
        rng.random((40, 1)) < 0.4, 6, 0
    )  # all films of a patient fail, and drift, alike
    drift = np.repeat(rng.normal(size=(40, 1)), 6, 0) + wrong + 0.01 * rng.normal(size=(240, 1))
    predictions, maps = tables(wrong, drift)
    by_image = w.warning(predictions, maps, alone(predictions), events=["error"], draws=300)
    by_patient = w.warning(predictions, maps, dict(enumerate(patient)), events=["error"], draws=300)
    for reading in w.READINGS:
        width = [
            row["ci_high"] - row["ci_low"]
            for row in (found(by_image, reading), found(by_patient, reading))
        ]
        assert width[1] / width[0] == pytest.approx(6**0.5, rel=0.3)
        assert found(by_patient, reading)["value"] == pytest.approx(
            found(by_image, reading)["value"]
        )
    assert found(by_patient, "within")["event_patients"] == wrong[::6].sum()


def test_scores_that_fall_with_drift_are_turned():
    events, drift = noisy()
    predictions, maps = tables(events, drift, ssim=-drift)
    table = w.warning(predictions, maps, alone(predictions), draws=10)
    numbers = ["reading", "outcome", "metric", "value", "ci_low", "ci_high"]
    rmse, ssim = (
        table[table["score"] == score][numbers].reset_index(drop=True) for score in ("rmse", "ssim")
    )
    pd.testing.assert_frame_equal(rmse, ssim)
    assert rmse["value"].iloc[0] > 0.6


def test_an_undefined_score_says_nothing_and_is_counted():
    events, drift = noisy(80, 2, strength=8.0)
    half = np.where(np.arange(80)[:, None] % 2, drift, np.nan)
    predictions, maps = tables(
        events, drift, rmse_raw=half, centre_shift=np.full(events.shape, np.nan)
    )
    table = w.warning(predictions, maps, alone(predictions), events=["error"], draws=20)
    for reading in w.READINGS:
        never = found(table, reading, predictor="gradcam layer4_1 centre_shift")
        assert never["value"] == 0.5 and never["undefined"] == 160
        assert found(table, reading, "spearman", "gradcam layer4_1 centre_shift")["value"] == 0
    raw = found(table, "within", predictor="gradcam layer4_1 rmse_raw")
    wrong, known = events, ~np.isnan(half)
    seen = sum((wrong & known)[:, c].sum() * (~wrong & known)[:, c].sum() for c in range(2))
    every = sum(wrong[:, c].sum() * (~wrong)[:, c].sum() for c in range(2))
    assert found(table, "within")["value"] == 1  # drift of 8 standard deviations
    assert raw["value"] == pytest.approx(0.5 + 0.5 * seen / every) and raw["undefined"] == 80


def test_a_predictor_that_is_the_uncertainty_gains_exactly_nothing():
    events, _ = noisy()
    confidence = np.random.default_rng(1).uniform(0.5, 1, events.shape)
    predictions, maps = tables(events, 1 - confidence, confidence=confidence)
    table = w.warning(
        predictions, maps, alone(predictions), against=["uncertainty", "p_shift"], draws=40
    )
    gains = table[table["metric"] == "auroc_over_uncertainty"]
    assert len(gains) == 9 and (gains[["value", "ci_low", "ci_high"]].abs() < 1e-12).all(axis=None)
    shift = found(table[table["outcome"] == "error"], "within", "auroc_over_p_shift")
    assert shift["value"] < -0.3 and shift["ci_high"] < 0  # a wrong answer has moved far


# ------------------------------------------------------------------------------------------- outcomes


def test_outcomes_of_three_classes():
    rows = [
        (0, 1, "clean", 0, 1, 0.2, 0.7, 0.1),
        (0, 1, "blur", 1, 2, 0.1, 0.3, 0.6),
        (1, 0, "clean", 0, 2, 0.1, 0.1, 0.8),
        (1, 0, "blur", 1, 1, 0.3, 0.4, 0.3),
        (2, 2, "clean", 0, 0, 0.5, 0.2, 0.3),
        (2, 2, "blur", 1, 2, 0.2, 0.2, 0.6),
    ]
    table = w.outcomes(
        pd.DataFrame(
            rows,
            columns=["image", "label", "corruption", "severity", "predicted", "p0", "p1", "p2"],
        )
    )
    assert table["error"].tolist() == [True, True, False] and table["flip"].all()
    assert table["new_error"].tolist() == [True, False, False]
    assert table["uncertainty"].tolist() == pytest.approx([0.4, 0.6, 0.4])
    assert table["p_shift"].tolist() == pytest.approx([0.5, 0.5, 0.3])


def test_new_errors_are_asked_of_images_that_were_right():
    events, drift = noisy(60, 2)
    predictions, maps = tables(events, drift)
    wrong = predictions["image"] < 20
    predictions.loc[wrong & predictions["severity"].eq(0), "predicted"] = 1
    table = w.warning(
        predictions, maps, alone(predictions), draws=5, events=["new_error"], readings=["mixed"]
    )
    rest = w.warning(
        predictions[~wrong],
        maps[maps["image"] >= 20],
        alone(predictions),
        draws=5,
        events=["error"],
        readings=["mixed"],
    )
    assert table["n"].eq(40).all() and table["value"].tolist() == pytest.approx(
        rest["value"].tolist()
    )


def test_no_image_right_when_clean_gives_no_number_and_no_crash():
    predictions, maps = tables(*noisy(10, 2))
    predictions.loc[predictions["severity"] == 0, "predicted"] = 1
    table = w.warning(predictions, maps, alone(predictions), draws=5, events=["new_error"])
    assert table["value"].isna().all() and table["n"].eq(0).all()
    assert w.verdict(table, outcome="new_error").startswith("Too few answers that became wrong")


# ------------------------------------------------------------------------------------------- choice and verdict


def test_select_takes_the_best_and_never_turns_a_score_round():
    events, drift = noisy(200, 2)
    rng = np.random.default_rng(9)
    predictions, maps = tables(
        events, 0.2 * drift + rng.normal(size=events.shape), rmse_raw=drift, ssim=5.0 * events
    )
    deeper = maps.assign(layer="layer1_2", rmse=maps["rmse_raw"])
    both = pd.concat([maps, deeper.assign(ssim=0.0)])
    # ssim grows with the errors here, so as a drift score it is perfectly wrong; equals go by name.
    assert w.select(predictions, both) == ("gradcam", "layer1_2", "rmse")
    assert w.select(predictions, both.sample(frac=1, random_state=2)) == (
        "gradcam",
        "layer1_2",
        "rmse",
    )
    assert (
        w.select(
            predictions, both, predictors=[ONE, ("gradcam", "layer4_1", "ssim")], reading="mixed"
        )
        == ONE
    )
    never, maps = tables(np.zeros((5, 2), bool), np.ones((5, 2)))
    with pytest.raises(ValueError, match="with and without 'error'"):
        w.select(never, maps)


def test_the_verdict_follows_the_intervals():
    def said(
        strength: float,
        sharp: bool = False,
        rate: float = 0.3,
        outcome: str = "error",
        reading: str = "within",
    ) -> str:
        events, drift = noisy(150, 2, strength=strength, rate=rate)
        sure = (
            np.where(events, 0.6, 0.9)
            if sharp
            else np.random.default_rng(2).uniform(0.5, 1, events.shape)
        )
        predictions, maps = tables(events, drift, confidence=sure)
        table = w.warning(
            predictions, maps, alone(predictions), events=[outcome], readings=[reading], draws=100
        )
        return w.verdict(table, outcome=outcome, reading=reading)

    strong, none = said(2.0), said(0.0)
    assert (
        "drift warns of wrong answers" in strong
        and "better than the model's own uncertainty" in strong
    )
    assert "needs no map, ranks them better" in said(1.0, sharp=True)
    assert "no warning of wrong answers by drift can be shown" in none and "No difference" in none
    assert "does not warn" in said(-2.0)
    assert said(2.0, rate=0.02).startswith("Too few wrong answers to judge gradcam layer4_1 rmse")
    assert said(2.0, reading="mixed", outcome="flip").startswith(
        "Over all corruptions and severities mixed"
    )
    predictions, maps = tables(*noisy(), ssim=np.zeros((60, 3)))
    with pytest.raises(ValueError, match="2 drift predictors"):
        w.verdict(w.warning(predictions, maps, alone(predictions), draws=5))


def test_rows_do_not_collide():
    predictions, maps = tables(*noisy(), ssim=np.zeros((60, 3)))
    rows = w.rows(w.warning(predictions, maps, alone(predictions), draws=5))
    assert (
        not rows.duplicated(["attack", "eps", "eps_unit", "metric"]).any()
        and rows["value"].notna().all()
    )
    # 3 outcomes x 3 readings x (2 competitors x 2 + 2 scores x 3), and severity x 2 when mixed
    assert len(rows) == 3 * (3 * (4 + 6) + 2)


def test_tables_that_do_not_fit_are_refused_by_name():
    predictions, maps = tables(*noisy(10, 2))
    patients = alone(predictions)
    cases = {
        "predictions lacks 1 copies that drift has, such as image 3, noise at severity 2": (
            predictions[~(predictions["image"].eq(3) & predictions["severity"].eq(2))],
            maps,
        ),
        "20 copies twice for gradcam layer4_1": (predictions, pd.concat([maps, maps])),
        "lacks 1 copies for gradcam layer4_1 that it has for other maps, such as image 9": (
            predictions,
            pd.concat([maps.iloc[:-1], maps.assign(layer="layer1_2")]),
        ),
        r"drift lacks the columns \['layer'\]": (predictions, maps.drop(columns="layer")),
        "drift has no corrupted copy or no score": (predictions, maps.assign(severity=0)),
    }
    for message, (p, d) in cases.items():
        with pytest.raises(ValueError, match=message):
            w.warning(p, d, patients, draws=5)
    with pytest.raises(ValueError, match=r"drift has no predictor \('gradcam', 'layer9', 'rmse'\)"):
        w.warning(predictions, maps, patients, predictors=[("gradcam", "layer9", "rmse")])
    with pytest.raises(
        ValueError, match="events must be a list of error, flip, new_error, not error"
    ):
        w.warning(predictions, maps, patients, events="error")
    with pytest.raises(
        ValueError,
        match="readings must be a list of within, same answer, mixed, not \\['between'\\]",
    ):
        w.warning(predictions, maps, patients, readings=["between"])


def test_reference_rows_and_films_without_drift_are_not_judged():
    events, drift = noisy(20, 2)
    predictions, maps = tables(events, drift)
    extra = maps.head(20).assign(corruption="random pair", severity=0, rmse=99.0)
    some = maps[maps["image"] < 12]
    table = w.warning(
        predictions, pd.concat([some, extra]), alone(predictions), draws=5, events=["error"]
    )
    truth = w.warning(
        predictions[predictions["image"] < 12], some, alone(predictions), draws=5, events=["error"]
    )
    pd.testing.assert_frame_equal(table, truth)
    assert table["n"].eq(12).all()
