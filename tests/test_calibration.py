"""Calibration errors against scikit-learn and by hand, a planted temperature."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from dlia_utils import calibration


def calibrated(seed=0, n=300, *, power=1.0):
    """Labels drawn from true probabilities; the stated log-odds are `power` times the true ones."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.standard_normal(n)
    labels = (rng.random(n) < expit(z)).astype(int)
    return labels, expit(power * z), np.arange(n)


def summary(*given, **options):
    return calibration.summary(*given, **{"draws": 10} | options).set_index("metric")


def test_errors_equal_scikit_learn():
    labels, probability, groups = calibrated(1)
    found = summary(labels, probability, groups)["value"]
    assert found["brier"] == pytest.approx(sk.brier_score_loss(labels, probability))
    assert found["log_loss"] == pytest.approx(sk.log_loss(labels, probability))
    share, mean = calibration_curve(labels, probability, n_bins=10, strategy="quantile")
    assert found["ece"] == pytest.approx(np.abs(share - mean).mean())
    assert found["mce"] == pytest.approx(np.abs(share - mean).max())
    table = calibration.reliability(labels, probability, groups, draws=10)
    assert set(table["n"]) == {30}
    np.testing.assert_allclose(table[["value", "probability"]], np.stack([share, mean], axis=1))


def test_equal_probabilities_share_a_bin_whatever_their_order():
    probability = np.array([0.0] * 5 + [0.5] * 2 + [1.0] * 5)
    labels = np.array([0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1])
    table = calibration.reliability(labels, probability, range(12), bins=6, draws=10)
    assert table["probability"].tolist() == [0.0, 0.5, 1.0] and table["n"].tolist() == [5, 2, 5]
    assert table["value"].tolist() == [0.2, 0.5, 1.0]
    assert table["ci_low"].iloc[2] == pytest.approx(0.025 ** (1 / 5)), "five of five is not certain"
    ece = summary(labels, probability, range(12), bins=6).loc["ece", "value"]
    assert ece == pytest.approx(0.2 * 5 / 12), "a mean over images, not over bins"


def test_a_calibrated_model_scores_what_its_own_probabilities_promise():
    labels, probability, groups = calibrated(2, n=4000)
    found = summary(labels, probability, groups, draws=100)
    promised = (probability * (1 - probability)).mean()
    assert found.loc["brier", "if_calibrated"] == pytest.approx(promised, rel=0.01)
    assert found.loc["ece", "value"] < 2 * found.loc["ece", "if_calibrated"] < 0.04
    _, sharp, _ = calibrated(2, n=4000, power=3.0)
    wrong = summary(labels, sharp, groups, draws=100).loc["ece"]
    assert wrong["value"] > 5 * wrong["if_calibrated"] and wrong["ci_low"] > wrong["if_calibrated"]


def test_patients_that_agree_promise_less():
    labels, probability, groups = calibrated(3)
    copies = [np.repeat(part, 4) for part in (labels, probability, groups)]
    alone = summary(*copies[:2], np.arange(1200)).loc["ece"]
    together, single = summary(*copies).loc["ece"], summary(labels, probability, groups).loc["ece"]
    assert together["if_calibrated"] > 1.5 * alone["if_calibrated"]
    columns = ["value", "if_calibrated"]
    assert together[columns].tolist() == pytest.approx(single[columns].tolist())


def test_the_interval_of_a_calibration_error_covers_the_truth():
    """A model that says 0.5 where 0.7 is true: its error is 0.2 in every set of images."""
    rng, hits, groups = np.random.default_rng(4), 0, np.repeat(np.arange(80), 2)
    for seed in range(100):
        labels = (rng.random(80) < 0.7).astype(int)[groups]
        row = summary(labels, np.full(160, 0.5), groups, draws=300, seed=seed).loc["ece"]
        hits += row["ci_low"] <= 0.2 <= row["ci_high"]
    assert 88 <= hits <= 100


def test_the_temperature_is_the_minimum_of_the_log_loss_and_repairs_calibration():
    labels, probability, groups = calibrated(6, power=3.0)
    z = logit(probability)
    logits = np.stack([0 * z, z], axis=1)
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(3, rel=0.2)  # the planted one
    assert calibration.fit_temperature(2.5 * logits, labels) == pytest.approx(2.5 * found, rel=1e-6)
    options = {"bounds": (-3, 5), "method": "bounded"}
    best = minimize_scalar(lambda t: sk.log_loss(labels, expit(z / np.exp(t))), **options).x
    assert np.log(found) == pytest.approx(best, abs=1e-4)
    before, after = (summary(labels, expit(z / t), groups)["value"] for t in (1, found))
    assert after["ece"] < before["ece"] / 2 and after["log_loss"] < before["log_loss"]


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [1, 1, 0, 0]])
def test_without_a_best_temperature_there_is_a_warning(labels):
    logits = np.array([[2.0, 0.0], [1, 0], [0, 1], [0, 3]])
    with pytest.warns(RuntimeWarning, match="no temperature fits"):
        assert calibration.fit_temperature(logits, np.array(labels)) == 1.0


def test_logits_instead_of_probabilities_are_refused():
    with pytest.raises(ValueError, match="not logits"):
        summary([0, 1], [-2.0, 3.0], ["a", "b"])
