"""Metrics against scikit-learn and torchmetrics, intervals against known truths."""

import math

import numpy as np
import pytest
import torch
import torchmetrics.classification as tm
from sklearn import metrics as sk

from dlia_utils import metrics


@pytest.fixture(params=["random", "ties", "one_class_predicted"])
def scored(request):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 200)
    probability = np.clip(0.5 + 0.3 * (labels - 0.5) + 0.3 * rng.standard_normal(200), 0, 1)
    if request.param == "ties":
        probability = np.round(probability, 1)
    if request.param == "one_class_predicted":
        probability = probability / 2.5
    return labels, probability


def test_values_equal_scikit_learn(scored):
    labels, probability = scored
    table = metrics.classification(labels, probability, np.arange(200), draws=10).set_index("metric")["value"]
    predicted = (probability > 0.5).astype(int)
    p, r, f, _ = sk.precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted), "precision": p, "recall": r, "f1": f,
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "auc": sk.roc_auc_score(labels, probability), "sensitivity": sk.recall_score(labels, predicted),
        "specificity": sk.recall_score(labels, predicted, pos_label=0),
    }  # fmt: skip
    assert table.to_dict() == pytest.approx(expected, abs=1e-12)


def test_values_equal_torchmetrics(scored):
    labels, probability = map(torch.as_tensor, scored)
    table = metrics.classification(*scored, np.arange(200), draws=10).set_index("metric")["value"]
    assert table["auc"] == pytest.approx(tm.BinaryAUROC()(probability, labels).item(), abs=1e-6)
    assert table["accuracy"] == pytest.approx(tm.BinaryAccuracy()(probability, labels).item(), abs=1e-6)


def test_resampled_metrics_equal_recomputing_on_the_drawn_images():
    rng = np.random.default_rng(0)
    labels, probability, groups = rng.integers(0, 2, 60), np.round(rng.random(60), 1), rng.integers(0, 20, 60)
    weights = metrics.patient_weights(groups, draws=5, seed=4)
    auc = metrics._weighted_auc(labels, probability, weights)
    rates = metrics._rates(labels, (probability > 0.5).astype(int), weights)
    for draw, weight in enumerate(weights):
        index = np.repeat(np.arange(60), weight.astype(int))
        assert auc[draw] == pytest.approx(sk.roc_auc_score(labels[index], probability[index]))
        predicted = (probability[index] > 0.5).astype(int)
        assert rates["f1"][draw] == pytest.approx(sk.f1_score(labels[index], predicted, average="macro"))


def test_patients_are_drawn_whole():
    weights = metrics.patient_weights(["a", "a", "b", "c", "c"], draws=50, seed=1)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3] == weights[:, 4]).all()


def test_interval_of_a_share_is_the_binomial_one_and_widens_with_clusters():
    rng = np.random.default_rng(1)
    flags = rng.random(400) < 0.8
    single = metrics.share(flags, np.arange(400))
    half_width = 1.96 * np.sqrt(flags.mean() * (1 - flags.mean()) / 400)
    assert single["ci_high"] - single["ci_low"] == pytest.approx(2 * half_width, rel=0.15)
    copied = metrics.share(np.repeat(flags, 4), np.repeat(np.arange(400), 4))
    assert copied["ci_high"] - copied["ci_low"] == pytest.approx(2 * half_width, rel=0.15)


def test_a_share_of_none_or_all_is_not_certain():
    none = metrics.share(np.zeros(200, bool), np.arange(200) // 2)
    assert none["value"] == none["ci_low"] == 0 and none["ci_high"] == pytest.approx(1 - 0.025 ** (1 / 100))
    every = metrics.share(np.ones(200, bool), np.arange(200) // 2)
    assert every["ci_low"] == pytest.approx(0.025 ** (1 / 100)) and every["ci_high"] == 1


def test_auc_is_nan_with_one_class():
    table = metrics.classification(np.ones(5, int), np.linspace(0, 1, 5), list("abcde"), draws=5)
    assert np.isnan(table.set_index("metric").loc["auc", "value"])


def test_mcnemar_known_values():
    right_a = np.array([True] * 10 + [False] * 2 + [True] * 30)
    right_b = np.array([False] * 10 + [True] * 2 + [True] * 30)
    result = metrics.mcnemar(right_a, right_b)
    assert (result["only_a_right"], result["only_b_right"]) == (10, 2)
    assert result["p"] == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)
    assert metrics.mcnemar(right_a, right_a)["p"] == 1.0


@pytest.mark.parametrize(
    ("labels", "probability", "groups", "message"),
    [
        ([0, 1], [0.1], ["a", "b"], "same length"),
        ([0, 2], [0.1, 0.2], ["a", "b"], "0 or 1"),
        ([0, 1], [0.1, np.nan], ["a", "b"], "NaN"),
    ],
)
def test_bad_input_is_named(labels, probability, groups, message):
    with pytest.raises(ValueError, match=message):
        metrics.classification(np.array(labels), np.array(probability), groups)


def test_a_rate_without_an_error_gets_the_exact_interval_of_its_own_class():
    labels, probability = np.array([0] * 30 + [1] * 10), np.array([0.1] * 30 + [0.9] * 9 + [0.2])
    table = metrics.classification(labels, probability, [*range(15), *range(15), *range(20, 30)], draws=50).set_index("metric")
    assert table.loc["specificity", "value"] == 1 and table.loc["specificity", "ci_high"] == 1
    assert table.loc["specificity", "ci_low"] == pytest.approx(0.025 ** (1 / 15))  # fifteen patients, all right
    assert table.loc["sensitivity", "ci_low"] < 0.9 < table.loc["sensitivity", "ci_high"]
