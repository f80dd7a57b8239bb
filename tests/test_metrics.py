"""Metrics against scikit-learn and torchmetrics, intervals against known truths."""

import numpy as np
import pytest
import torch
import torchmetrics.classification as tm
from scipy import stats
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
    table = metrics.classification(labels, probability, np.arange(200), draws=10).set_index(
        "metric"
    )["value"]
    predicted = (probability > 0.5).astype(int)
    p, r, f, _ = sk.precision_recall_fscore_support(
        labels, predicted, average="macro", zero_division=0
    )
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "precision": p,
        "recall": r,
        "f1": f,
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "auc": sk.roc_auc_score(labels, probability),
        "sensitivity": sk.recall_score(labels, predicted),
        "specificity": sk.recall_score(labels, predicted, pos_label=0),
    }
    assert table.to_dict() == pytest.approx(expected, abs=1e-12)


def test_values_equal_torchmetrics(scored):
    labels, probability = map(torch.as_tensor, scored)
    table = metrics.classification(*scored, np.arange(200), draws=10).set_index("metric")["value"]
    assert table["auc"] == pytest.approx(tm.BinaryAUROC()(probability, labels).item(), abs=1e-6)
    assert table["accuracy"] == pytest.approx(
        tm.BinaryAccuracy()(probability, labels).item(), abs=1e-6
    )


def test_resampled_metrics_equal_recomputing_on_the_drawn_images():
    rng = np.random.default_rng(0)
    labels, probability, groups = (
        rng.integers(0, 2, 60),
        np.round(rng.random(60), 1),
        rng.integers(0, 20, 60),
    )
    weights = metrics.patient_weights(groups, draws=5, seed=4)
    auc = metrics.weighted_auc(labels, probability, weights)
    rates = metrics._rates(labels, (probability > 0.5).astype(int), weights, (0, 1))
    for draw, weight in enumerate(weights):
        index = np.repeat(np.arange(60), weight.astype(int))
        assert auc[draw] == pytest.approx(sk.roc_auc_score(labels[index], probability[index]))
        predicted = (probability[index] > 0.5).astype(int)
        assert rates["f1"][draw] == pytest.approx(
            sk.f1_score(labels[index], predicted, average="macro")
        )


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
    assert none["value"] == none["ci_low"] == 0 and none["ci_high"] == pytest.approx(
        1 - 0.025 ** (1 / 100)
    )
    every = metrics.share(np.ones(200, bool), np.arange(200) // 2)
    assert every["ci_low"] == pytest.approx(0.025 ** (1 / 100)) and every["ci_high"] == 1


def test_auc_is_nan_with_one_class():
    table = metrics.classification(np.ones(5, int), np.linspace(0, 1, 5), list("abcde"), draws=5)
    assert np.isnan(table.set_index("metric").loc["auc", "value"])


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
    table = metrics.classification(
        labels, probability, [*range(15), *range(15), *range(20, 30)], draws=50
    ).set_index("metric")
    assert table.loc["specificity", "value"] == 1 and table.loc["specificity", "ci_high"] == 1
    assert table.loc["specificity", "ci_low"] == pytest.approx(
        0.025 ** (1 / 15)
    )  # fifteen patients, all right
    assert table.loc["sensitivity", "ci_low"] < 0.9 < table.loc["sensitivity", "ci_high"]


# ------------------------------------------------------------------------------------------- BCa intervals


def bca_of_scipy(statistic, data, draws):
    """scipy's BCa interval of `statistic(data, axis)` from given bootstrap values."""
    given = type("Given", (), {"bootstrap_distribution": draws})()
    found = stats.bootstrap(
        (data,), statistic, n_resamples=0, bootstrap_result=given, method="BCa", vectorized=True
    )
    return tuple(found.confidence_interval)


def test_bca_of_independent_images_equals_scipy_on_the_same_draws():
    values = np.random.default_rng(0).exponential(size=40) ** 2
    draws = metrics.patient_weights(np.arange(40), draws=500, seed=3) @ values / 40
    found = metrics.bootstrap(
        lambda w: w @ values / w.sum(1), np.arange(40), draws=500, seed=3, interval="bca"
    ).iloc[0]
    expected = bca_of_scipy(np.mean, values, draws)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(expected, rel=1e-12)
    # The skew: BCa lies to the right of the percentiles.
    plain = metrics.bootstrap(
        lambda w: w @ values / w.sum(1), np.arange(40), draws=500, seed=3
    ).iloc[0]
    assert found["ci_low"] > plain["ci_low"] and found["ci_high"] > plain["ci_high"]


def test_bca_of_patients_equals_scipys_over_patients():
    rng = np.random.default_rng(1)
    groups, flags = np.sort(rng.integers(0, 30, 90)), rng.random(90) < 0.85
    right, films = (np.bincount(groups, weights=part) for part in (flags, np.ones(90)))
    keep = np.flatnonzero(films)

    def accuracy(patients, axis=-1):
        return right[patients].sum(axis) / films[patients].sum(axis)

    weights = metrics.patient_weights(groups, draws=400, seed=5)
    expected = bca_of_scipy(accuracy, keep, weights @ flags / weights.sum(1))
    found = metrics.share(flags, groups, draws=400, seed=5, interval="bca")
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(expected, rel=1e-12)


def test_every_metric_has_a_bca_interval_around_it_and_the_draws_stay_the_same(scored):
    labels, probability = scored
    groups = np.arange(200) // 2
    both = [
        metrics.classification(labels, probability, groups, draws=300, interval=kind).set_index(
            "metric"
        )
        for kind in ("percentile", "bca")
    ]
    assert both[0]["value"].equals(both[1]["value"])
    undecided = both[1]["value"].isin([0.0, 1.0])
    inside = both[1][~undecided & (both[1]["ci_high"] > both[1]["ci_low"])]
    assert (inside["ci_low"] < inside["value"]).all() and (
        inside["value"] < inside["ci_high"]
    ).all()
    assert both[0].loc[undecided].equals(both[1].loc[undecided]), (
        "none or all: the exact interval for both"
    )
    assert (both[0]["ci_low"] - both[1]["ci_low"]).abs().max() < 0.05


def test_bca_where_one_patient_is_a_whole_class_leaves_that_patient_in():
    labels, probability = np.array([0] * 12 + [1]), np.r_[np.linspace(0, 0.8, 12), 0.5]
    found = metrics.classification(
        labels, probability, np.arange(13), draws=200, interval="bca"
    ).set_index("metric")
    assert found.loc["auc", "ci_low"] < found.loc["auc", "value"] < found.loc["auc", "ci_high"]


def test_bca_covers_a_skewed_share_of_patients_with_several_films():
    rng, hits, alone = np.random.default_rng(2), 0, 0
    for seed in range(150):
        groups = np.repeat(np.arange(80), 3)
        flags = (rng.random(80) < 0.9)[groups] & (rng.random(240) < 0.95)  # accuracy 0.855
        row = metrics.share(flags, groups, draws=300, seed=seed, interval="bca")
        hits += row["ci_low"] <= 0.855 <= row["ci_high"]
        row = metrics.share(flags, np.arange(240), draws=300, seed=seed, interval="bca")
        alone += row["ci_low"] <= 0.855 <= row["ci_high"]
    assert 136 <= hits <= 149  # 142.5 expected
    assert alone < 128, "films of a patient taken as independent: the interval is too narrow"


def test_large_sets_are_worked_through_in_parts(monkeypatch):
    rng = np.random.default_rng(3)
    labels, probability, groups = rng.integers(0, 2, 50), rng.random(50), rng.integers(0, 20, 50)
    whole = metrics.classification(labels, probability, groups, draws=40, interval="bca")
    monkeypatch.setattr(metrics, "CHUNK", 350)  # seven rows of weights
    parts = metrics.classification(labels, probability, groups, draws=40, interval="bca")
    np.testing.assert_allclose(
        parts.drop(columns="metric"), whole.drop(columns="metric"), rtol=1e-12
    )


def test_an_image_without_a_patient_is_refused():
    with pytest.raises(ValueError, match="lacks the patient of 2 images"):
        metrics.share(np.ones(4, bool), ["a", None, "b", None])
    with pytest.raises(ValueError, match="percentile, bca, not 'BCa'"):
        metrics.share(np.ones(2, bool), ["a", "b"], interval="BCa")


# ------------------------------------------------------------------------------------------- a fixed specificity


def at_specificity(labels, probability, specificity, **options):
    """Validation and test are the same images here."""
    found = metrics.sensitivity_at_specificity(
        (labels, probability),
        labels,
        probability,
        np.arange(len(labels)),
        specificity=specificity,
        **options,
    )
    return found.set_index("metric")


@pytest.mark.parametrize("specificity", [0.5, 0.7, 0.9, 1.0])
def test_the_point_on_the_roc_equals_scikit_learns_and_torchmetrics(scored, specificity):
    labels, probability = scored
    found = at_specificity(labels, probability, specificity, draws=10)
    false_alarm, hit, _ = sk.roc_curve(labels, probability, drop_intermediate=False)
    expected = hit[1 - false_alarm >= specificity - 1e-12].max()
    assert found.loc[f"sensitivity_at_{specificity:g}_test_roc", "value"] == pytest.approx(expected)
    oracle, _ = tm.BinarySensitivityAtSpecificity(specificity - 1e-6)(
        *map(torch.as_tensor, (probability, labels))
    )
    assert expected == pytest.approx(oracle.item(), abs=1e-6)
    # On the images that chose it, the threshold gives exactly this point.
    assert found.loc[f"sensitivity_at_{specificity:g}_val_threshold", "value"] == pytest.approx(
        expected
    )
    assert (
        found.loc[f"specificity_at_{specificity:g}_val_threshold", "value"] >= specificity - 1e-12
    )


def test_fifty_five_of_a_hundred_are_enough():
    labels, probability = np.array([0] * 100 + [1] * 2), np.r_[np.arange(100) / 100, 0.545, 0.75]
    found = at_specificity(
        labels, probability, 0.55, draws=10
    )  # 0.55 * 100 is above 55 in floating point
    assert found["threshold"].tolist() == [0.54] * 3
    assert found.loc["sensitivity_at_0.55_val_threshold", "value"] == 1


def test_the_threshold_comes_from_validation_and_the_test_roc_is_named_apart():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 400)
    score = labels + rng.standard_normal(400)
    shifted = (
        score[200:] + 0.8
    )  # the test hospital's films score higher: the specificity is not what was asked for
    found = metrics.sensitivity_at_specificity(
        (labels[:200], score[:200]),
        labels[200:],
        shifted,
        np.arange(200),
        specificity=0.9,
        draws=200,
    ).set_index("metric")
    threshold = np.sort(score[:200][labels[:200] == 0])[
        int(np.ceil(0.9 * (labels[:200] == 0).sum())) - 1
    ]
    assert found["threshold"].iloc[0] == found["threshold"].iloc[1] == threshold
    assert (
        found.loc["sensitivity_at_0.9_val_threshold", "value"]
        == (shifted[labels[200:] == 1] > threshold).mean()
    )
    assert found.loc["specificity_at_0.9_val_threshold", "ci_high"] < 0.9
    on_roc = found.loc["sensitivity_at_0.9_test_roc"]
    assert on_roc["threshold"] > threshold and on_roc["value"] < found["value"].iloc[0]
    assert on_roc["ci_low"] < on_roc["value"] < on_roc["ci_high"]


def test_points_of_draws_equal_recomputing_on_the_drawn_images():
    rng = np.random.default_rng(5)
    labels, probability, groups = (
        rng.integers(0, 2, 60),
        np.round(rng.random(60), 1),
        rng.integers(0, 20, 60),
    )
    weights = metrics.patient_weights(groups, draws=8, seed=4)
    points, thresholds = metrics._roc_point(labels, probability, weights, 0.8)
    for draw, weight in enumerate(weights):
        index = np.repeat(np.arange(60), weight.astype(int))
        false_alarm, hit, _ = sk.roc_curve(
            labels[index], probability[index], drop_intermediate=False
        )
        assert points[draw] == pytest.approx(hit[1 - false_alarm >= 0.8 - 1e-12].max())
        right = probability[index][labels[index] == 1] > thresholds[draw]
        assert right.mean() == pytest.approx(points[draw])


def test_a_fixed_specificity_needs_both_classes_and_a_share():
    two = (np.array([0, 1]), np.array([0.1, 0.9]))
    with pytest.raises(ValueError, match="validation images are all of class 1"):
        metrics.sensitivity_at_specificity((np.ones(2), two[1]), *two, "ab")
    with pytest.raises(ValueError, match="test images are all of class 0"):
        metrics.sensitivity_at_specificity(two, np.zeros(2), two[1], "ab")
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        metrics.sensitivity_at_specificity(two, *two, "ab", specificity=90)


def test_perfect_separation_is_not_certainty():
    labels = np.arange(20) % 2
    table = metrics.classification(labels, labels * 0.8 + 0.1, range(20), draws=200).set_index(
        "metric"
    )
    low = (
        stats.binomtest(10, 10).proportion_ci(method="exact").low
    )  # ten patients of the class of fewer
    for metric in ("auc", "balanced_accuracy", "f1", "sensitivity"):
        assert (
            table.loc[metric, "ci_low"] == pytest.approx(low) and table.loc[metric, "ci_high"] == 1
        )
    assert table.loc["accuracy", "ci_low"] > low


def test_one_patient_has_no_interval():
    table = metrics.classification(
        np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.7, 0.9]), ["one"] * 4, draws=50
    )
    assert table.set_index("metric").loc["accuracy", ["ci_low", "ci_high"]].isna().all()


def test_log_odds_keep_a_ranking_that_probabilities_lose():
    labels, gap = np.array([0, 0, 1, 1]), np.array([40.0, 50.0, 60.0, 70.0])
    ties = (
        metrics.classification(labels, 1 / (1 + np.exp(-gap)), range(4), draws=20)
        .set_index("metric")
        .loc["auc", "value"]
    )
    kept = (
        metrics.classification(labels, gap, range(4), threshold=0, draws=20)
        .set_index("metric")
        .loc["auc", "value"]
    )
    assert ties < 1 == kept


# ------------------------------------------------------------------------------------------- more than two classes


def test_three_classes_agree_with_scikit_learn_and_have_no_sensitivity():
    from sklearn import metrics as sk

    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 90)
    score = rng.dirichlet((1, 1, 1), 90) + 0.5 * np.eye(3)[labels]
    score /= score.sum(1, keepdims=True)
    table = metrics.classification(labels, score, np.arange(90), draws=50).set_index("metric")[
        "value"
    ]
    predicted = score.argmax(1)
    wanted = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "auc": sk.roc_auc_score(labels, score, multi_class="ovr"),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "precision": sk.precision_score(labels, predicted, average="macro"),
        "recall": sk.recall_score(labels, predicted, average="macro"),
        "f1": sk.f1_score(labels, predicted, average="macro"),
    }
    assert set(table.index) == set(wanted) and all(
        table[name] == pytest.approx(value) for name, value in wanted.items()
    )
    with pytest.raises(ValueError, match="labels must be 0 to 2"):
        metrics.classification(labels + 1, score, np.arange(90))
    with pytest.raises(ValueError, match="K > 2 classes"):
        metrics.classification(labels % 2, score[:, :2], np.arange(90))
