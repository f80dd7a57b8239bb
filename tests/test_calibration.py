"""Calibration errors against scikit-learn and by hand, a planted temperature, decision curves by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from dlia_utils import calibration

CONFIG = SimpleNamespace(data_name="demo (SYNTHETIC)", profile="smoke", size=48)


def calibrated(seed=0, n=300, *, patients=None, power=1.0):
    """Labels drawn from their true probabilities; with power > 1 the stated log-odds are too large by that factor."""
    rng = np.random.default_rng(seed)
    logit = 1.5 * rng.standard_normal(n)
    labels = (rng.random(n) < expit(logit)).astype(int)
    return labels, expit(power * logit), np.arange(n) % (patients or n)


# ------------------------------------------------------------------------------------------- errors


def test_brier_and_log_loss_equal_scikit_learn():
    labels, probability, groups = calibrated()
    found = calibration.summary(labels, probability, groups, draws=10).set_index("metric")["value"]
    assert found["brier"] == pytest.approx(sk.brier_score_loss(labels, probability))
    assert found["log_loss"] == pytest.approx(sk.log_loss(labels, probability))


def test_ece_and_mce_by_hand():
    probability = np.array([0.1, 0.1, 0.2, 0.4, 0.6, 0.7, 0.9, 1.0])
    labels = np.array([0, 0, 1, 0, 1, 0, 1, 1])
    # Bins of two: means 0.1, 0.3, 0.65, 0.95; shares of class 1: 0, 0.5, 0.5, 1.
    found = calibration.summary(labels, probability, range(8), bins=4, draws=10).set_index(
        "metric"
    )["value"]
    assert found["ece"] == pytest.approx((0.1 + 0.2 + 0.15 + 0.05) / 4) and found[
        "mce"
    ] == pytest.approx(0.2)
    mirrored = calibration.summary(
        1 - labels, 1 - probability, range(8), bins=4, draws=10
    ).set_index("metric")["value"]
    assert mirrored.to_dict() == pytest.approx(found.to_dict())


def test_bins_of_equal_mass_are_those_of_scikit_learn():
    labels, probability, groups = calibrated(1)
    table = calibration.reliability(labels, probability, groups, bins=10, draws=10)
    share, mean = calibration_curve(labels, probability, n_bins=10, strategy="quantile")
    assert set(table["n"]) == {30} and set(table["patients"]) == {30}
    np.testing.assert_allclose(table["value"], share)
    np.testing.assert_allclose(table["probability"], mean)
    assert (table["high"][:-1].to_numpy() < table["low"][1:].to_numpy()).all()
    found = calibration.summary(labels, probability, groups, bins=10, draws=10).set_index("metric")[
        "value"
    ]
    assert found["ece"] == pytest.approx(np.abs(share - mean).mean())
    assert found["mce"] == pytest.approx(np.abs(share - mean).max())


def test_equal_probabilities_share_a_bin_whatever_their_order():
    probability = np.array([0.0] * 5 + [0.5] * 2 + [1.0] * 5)
    labels = np.array([0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1])
    table = calibration.reliability(labels, probability, range(12), bins=6, draws=10)
    assert table["probability"].tolist() == [0.0, 0.5, 1.0] and table["n"].tolist() == [5, 2, 5]
    assert table["value"].tolist() == [0.2, 0.5, 1.0]
    assert table["ci_low"].iloc[2] == pytest.approx(0.025 ** (1 / 5)), "five of five is not certain"
    found = calibration.summary(labels, probability, range(12), bins=6, draws=10).set_index(
        "metric"
    )["value"]
    assert found["ece"] == pytest.approx(0.2 * 5 / 12), "a mean over images, not over bins"


def test_a_calibrated_model_scores_what_its_own_probabilities_promise():
    labels, probability, groups = calibrated(2, n=4000)
    found = calibration.summary(labels, probability, groups, draws=100).set_index("metric")
    promised = (probability * (1 - probability)).mean()
    assert found.loc["brier", "if_calibrated"] == pytest.approx(promised, rel=0.01)
    assert found.loc["brier", "value"] == pytest.approx(promised, rel=0.05)
    assert found.loc["ece", "value"] < 2 * found.loc["ece", "if_calibrated"] < 0.04
    _, sharp, _ = calibrated(2, n=4000, power=3.0)
    wrong = calibration.summary(labels, sharp, groups, draws=100).set_index("metric")
    assert wrong.loc["ece", "value"] > 5 * wrong.loc["ece", "if_calibrated"]
    assert wrong.loc["ece", "ci_low"] > wrong.loc["ece", "if_calibrated"]


def test_patients_that_agree_promise_less():
    labels, probability, _ = calibrated(3, n=300)
    copies = [np.repeat(part, 4) for part in (labels, probability, np.arange(300))]
    alone = (
        calibration.summary(*copies[:2], np.arange(1200), draws=50).set_index("metric").loc["ece"]
    )
    together = calibration.summary(*copies, draws=50).set_index("metric").loc["ece"]
    single = (
        calibration.summary(labels, probability, np.arange(300), draws=50)
        .set_index("metric")
        .loc["ece"]
    )
    assert together["value"] == pytest.approx(single["value"])
    assert together["if_calibrated"] > 1.5 * alone["if_calibrated"]
    assert together["if_calibrated"] == pytest.approx(single["if_calibrated"])


def test_the_interval_of_a_calibration_error_covers_the_truth():
    """A model that says 0.5 where 0.7 is true: its calibration error is 0.2 in every set of images."""
    rng, hits = np.random.default_rng(4), 0
    for seed in range(100):
        groups = np.repeat(np.arange(80), 2)
        labels = (rng.random(80) < 0.7).astype(int)[groups]
        stated = np.full(160, 0.5)
        row = (
            calibration.summary(labels, stated, groups, draws=300, seed=seed)
            .set_index("metric")
            .loc["ece"]
        )
        hits += row["ci_low"] <= 0.2 <= row["ci_high"]
    assert 88 <= hits <= 100


# ------------------------------------------------------------------------------------------- temperature


def test_a_planted_temperature_is_found():
    rng = np.random.default_rng(5)
    logits = 2 * rng.standard_normal((20000, 3))
    labels = np.array(
        [rng.multinomial(1, np.exp(row) / np.exp(row).sum()).argmax() for row in logits]
    )
    assert calibration.fit_temperature(logits, labels) == pytest.approx(1.0, rel=0.04)
    found = calibration.fit_temperature(2.5 * logits, labels)
    assert found == pytest.approx(2.5 * calibration.fit_temperature(logits, labels), rel=1e-6)


def test_the_temperature_is_the_minimum_of_the_log_loss_and_repairs_calibration():
    labels, probability, groups = calibrated(6, power=3.0)
    logits = np.stack([np.zeros(300), np.log(probability / (1 - probability))], axis=1)

    def loss(log_t):
        return sk.log_loss(labels, expit(logits[:, 1] / np.exp(log_t)))

    found = calibration.fit_temperature(logits, labels)
    assert np.log(found) == pytest.approx(
        minimize_scalar(loss, bounds=(-3, 5), method="bounded").x, abs=1e-4
    )
    before, after = (
        calibration.summary(labels, expit(logits[:, 1] / t), groups, draws=10).set_index("metric")[
            "value"
        ]
        for t in (1, found)
    )
    assert after["ece"] < before["ece"] / 2 and after["log_loss"] < before["log_loss"]


def test_huge_logits_of_a_distilled_model_are_no_trouble():
    labels, probability, _ = calibrated(7)
    logits = np.stack([np.zeros(300), np.log(probability / (1 - probability))], axis=1)
    one = calibration.fit_temperature(logits, labels)
    assert calibration.fit_temperature(1000 * logits - 5e4, labels) == pytest.approx(
        1000 * one, rel=1e-6
    )


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [1, 1, 0, 0]])
def test_without_a_best_temperature_there_is_a_warning(labels):
    logits = np.array([[2.0, 0.0], [1, 0], [0, 1], [0, 3]])
    with pytest.warns(RuntimeWarning, match="no temperature fits"):
        assert calibration.fit_temperature(logits, np.array(labels)) == 1.0


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros(3), [0, 1, 0], r"the pair \(0, z\)"),
        (np.zeros((3, 2)), [0, 1], r"\[3, 2\] and \[2\]"),
        (np.zeros((2, 2)), [0, 2], r"0 \.\.\. 1"),
        (np.full((2, 2), np.nan), [0, 1], "NaN"),
    ],
)
def test_bad_logits_are_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        calibration.fit_temperature(logits, labels)


# ------------------------------------------------------------------------------------------- decision curve


def test_net_benefit_by_hand():
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    probability = np.array([0.9, 0.6, 0.2, 0.7, 0.25, 0.1, 0.1, 0.1, 0.1, 0.1])
    table = calibration.decision_curve(
        labels, probability, range(10), thresholds=[0.2, 0.5], draws=50
    )
    value = table.set_index(["threshold", "strategy"])["value"]
    assert value[0.2, "model"] == pytest.approx(
        3 / 10 - 2 / 10 * 0.25
    )  # 0.2 is treated at a threshold of 0.2
    assert value[0.5, "model"] == pytest.approx(2 / 10 - 1 / 10)
    assert value[0.2, "treat all"] == pytest.approx(3 / 10 - 7 / 10 * 0.25)
    assert (
        value[0.5, "treat all"] == pytest.approx(3 / 10 - 7 / 10) and value[0.5, "treat none"] == 0
    )
    assert value[0.2, "gain"] == pytest.approx(5 / 10 * 0.25) and value[
        0.5, "gain"
    ] == pytest.approx(1 / 10)
    assert table["n"].eq(10).all() and (table["ci_low"] <= table["ci_high"]).all()


def test_net_benefit_at_another_prevalence_is_that_of_a_set_with_that_prevalence():
    labels, probability, _ = calibrated(8, n=200)
    more_ill = np.where(labels == 1, 5, 1)  # every diseased image five times
    repeated = [np.repeat(part, more_ill) for part in (labels, probability)]
    prevalence = repeated[0].mean()
    options = {"thresholds": [0.1, 0.4, 0.8], "draws": 10}
    expected = calibration.decision_curve(*repeated, range(len(repeated[0])), **options)["value"]
    found = calibration.decision_curve(
        labels, probability, range(200), prevalence=prevalence, **options
    )["value"]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_useless_model_gains_nothing_and_a_good_one_does():
    labels, probability, groups = calibrated(9, n=600, patients=200)
    useless = calibration.decision_curve(
        labels, np.full(600, labels.mean()), groups, thresholds=[0.2, 0.8], draws=50
    )
    assert useless.loc[useless["strategy"].eq("gain"), "value"].tolist() == pytest.approx(
        [0.0, 0.0]
    )
    good = calibration.decision_curve(
        labels, probability, groups, thresholds=[0.4, 0.5], draws=300, interval="bca"
    )
    assert (good.loc[good["strategy"].eq("gain"), "ci_low"] > 0).all()


# ------------------------------------------------------------------------------------------- figures and errors


def test_the_figures_show_every_model():
    labels, probability, groups = calibrated(10)
    tables = {
        name: calibration.reliability(labels, p, groups, bins=5, draws=20)
        for name, p in (("plain", probability), ("scaled", probability**2))
    }
    axis = calibration.figure_reliability(tables, CONFIG.caption).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["plain", "scaled"]
    assert "demo (SYNTHETIC), smoke profile, 48 px" in axis.get_title()
    np.testing.assert_allclose(
        axis.containers[0].lines[0].get_ydata(orig=False), tables["plain"]["value"]
    )
    curves = {"plain": calibration.decision_curve(labels, probability, groups, draws=20)}
    axis = calibration.figure_decision_curve(curves, CONFIG.caption).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "plain",
        "treat all",
        "treat none",
    ]
    assert axis.get_ylim()[1] > curves["plain"]["value"].max()
    for figure in (calibration.figure_reliability, calibration.figure_decision_curve):
        with pytest.raises(ValueError, match="give at least one"):
            figure({}, CONFIG)


@pytest.mark.parametrize(
    "function", [calibration.summary, calibration.reliability, calibration.decision_curve]
)
def test_logits_instead_of_probabilities_are_refused(function):
    with pytest.raises(ValueError, match="not logits"):
        function([0, 1], [-2.0, 3.0], ["a", "b"])


def test_bad_bins_thresholds_and_prevalence_are_named():
    with pytest.raises(ValueError, match="bins must be at least 1"):
        calibration.summary([0, 1], [0.2, 0.3], "ab", bins=0)
    with pytest.raises(ValueError, match="thresholds must be"):
        calibration.decision_curve([0, 1], [0.2, 0.3], "ab", thresholds=[0.0, 0.5])
    with pytest.raises(ValueError, match="prevalence must be"):
        calibration.decision_curve([0, 1], [0.2, 0.3], "ab", prevalence=1.0)
