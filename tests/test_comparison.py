"""Paired tests against statsmodels, brute force and permutations; AUC variances against DeLong's definition."""

import itertools

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_of_statsmodels
from statsmodels.stats.multitest import multipletests

from dlia_utils import comparison


def scored(seed, n=80, *, ties=False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    a, b = labels + 1.5 * rng.standard_normal((2, n)) + rng.standard_normal(n)
    return labels, *(np.round([a, b], 0) if ties else (a, b))


# ------------------------------------------------------------------------------------------- AUC


def by_pairs(labels, scores):
    """AUCs and covariance as DeLong et al. 1988 define them: one comparison for every pair of images."""
    ill, well = [score[labels == 1] for score in scores], [score[labels == 0] for score in scores]
    wins = [(x[:, None] > y) + (x[:, None] == y) / 2 for x, y in zip(ill, well, strict=True)]
    above, below = np.stack([win.mean(1) for win in wins]), np.stack([win.mean(0) for win in wins])
    return np.array([win.mean() for win in wins]), np.cov(above) / above.shape[1] + np.cov(
        below
    ) / below.shape[1]


@pytest.mark.parametrize("ties", [False, True])
def test_the_covariance_of_two_aucs_is_delongs(ties):
    labels, a, b = scored(0, ties=ties)
    auc, covariance = comparison.auc_covariance(labels, [a, b], np.arange(80))
    expected_auc, expected = by_pairs(labels, [a, b])
    np.testing.assert_allclose(auc, expected_auc, atol=1e-12)
    np.testing.assert_allclose(covariance, expected, atol=1e-14)
    assert auc[0] == pytest.approx(roc_auc_score(labels, a), abs=1e-12)


def test_delong_one_auc_and_the_test_of_two_follow_from_the_covariance():
    labels, a, b = scored(1)
    auc, covariance = by_pairs(labels, [a, b])
    one = comparison.delong(labels, a, np.arange(80))
    assert (one["value"], one["se"]) == pytest.approx((auc[0], covariance[0, 0] ** 0.5), abs=1e-12)
    slope = auc[0] * (1 - auc[0])
    reach = 1.959964 * one["se"] / slope
    logits = [
        np.log(one[end] / (1 - one[end])) - np.log(auc[0] / (1 - auc[0]))
        for end in ("ci_low", "ci_high")
    ]
    assert logits == pytest.approx([-reach, reach], rel=1e-6)
    two = comparison.delong_test(labels, a, b, np.arange(80))
    se = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) ** 0.5
    assert two["z"] == pytest.approx((auc[0] - auc[1]) / se) and two["p"] == pytest.approx(
        2 * norm.sf(abs(two["z"]))
    )
    assert two["ci_high"] - two["ci_low"] == pytest.approx(2 * 1.959964 * se, rel=1e-6)
    assert comparison.delong_test(labels, b, a, np.arange(80))["value"] == pytest.approx(
        -two["value"]
    )


def test_copies_of_an_image_of_one_patient_are_no_evidence():
    labels, a, b = scored(2)
    copied = [np.repeat(part, 3) for part in (labels, a, b, np.arange(80))]
    single, by_patient = (
        comparison.delong_test(labels, a, b, np.arange(80)),
        comparison.delong_test(*copied),
    )
    assert by_patient["z"] == pytest.approx(single["z"]) and by_patient["p"] == pytest.approx(
        single["p"]
    )
    as_if_independent = comparison.delong_test(*copied[:3], np.arange(240))
    assert as_if_independent["z"] / single["z"] == pytest.approx(3**0.5, rel=0.02)


def test_the_variance_of_patients_with_images_of_both_classes_is_that_of_repeated_studies():
    rng = np.random.default_rng(3)

    def study():
        codes = np.repeat(np.arange(50), 4)
        labels = rng.permuted(np.tile([0, 0, 1, 1], (50, 1)), axis=1).ravel()
        own = (
            1.5 * rng.standard_normal(50)[codes]
        )  # what the patient's images share, whatever their class
        return labels, labels + own + rng.standard_normal(200), codes

    studies = [study() for _ in range(300)]
    spread = np.std(
        [
            comparison.auc_covariance(labels, [score], range(200))[0][0]
            for labels, score, _ in studies
        ]
    )
    stated = np.mean([comparison.delong(*one)["se"] for one in studies])
    assert stated == pytest.approx(spread, rel=0.12)
    # Both classes of a patient shift together here, so that images taken as independent look too uncertain.
    naive = np.mean(
        [comparison.delong(labels, score, range(200))["se"] for labels, score, _ in studies]
    )
    assert naive > 1.2 * spread


def test_no_difference_in_ranks_is_p_one_and_a_perfect_auc_has_no_interval():
    labels, a, _ = scored(4)
    same = comparison.delong_test(labels, a, np.exp(a), np.arange(80))
    assert same["value"] == 0 and same["p"] == 1 and np.isnan(same["ci_low"])
    perfect = comparison.delong(labels, labels.astype(float), np.arange(80))
    assert perfect["value"] == 1 and perfect["se"] == 0 and np.isnan(perfect["ci_high"])


def test_delong_needs_two_patients_of_each_class():
    with pytest.raises(
        ValueError, match="2 patients have an image of class 1 and 1 one of class 0"
    ):
        comparison.delong([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], ["a", "a", "b", "c"])
    with pytest.raises(ValueError, match="same length"):
        comparison.delong_test([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], [0.1], range(4))


# ------------------------------------------------------------------------------------------- accuracy


def test_mcnemar_equals_statsmodels():
    rng = np.random.default_rng(5)
    a, b = rng.random(60) < 0.8, rng.random(60) < 0.6
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    expected = mcnemar_of_statsmodels(table, exact=True).pvalue
    found = comparison.paired_difference(a, b, np.arange(60), draws=10)
    assert (found["only_a"], found["only_b"]) == (table[0][1], table[1][0])
    assert found["p"] == pytest.approx(expected) and found["value"] == pytest.approx(
        a.mean() - b.mean()
    )


def test_the_clustered_p_is_that_of_all_exchanges_of_the_models():
    rng = np.random.default_rng(6)
    groups = rng.integers(0, 9, 30)
    a, b = rng.random(30) < 0.8, rng.random(30) < 0.5
    sums = np.array(
        [(a[groups == one].astype(int) - b[groups == one]).sum() for one in np.unique(groups)]
    )
    totals = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=len(sums))]
    expected = np.mean([total >= abs(sums.sum()) for total in totals])
    assert 0 < expected < 1
    assert comparison.paired_difference(a, b, groups, draws=10)["p"] == pytest.approx(expected)


def test_copies_of_a_patients_image_leave_the_difference_as_uncertain_as_it_was():
    rng = np.random.default_rng(7)
    a, b = rng.random(100) < 0.8, rng.random(100) < 0.7
    single = comparison.paired_difference(a, b, np.arange(100))
    copied = comparison.paired_difference(
        np.repeat(a, 4), np.repeat(b, 4), np.repeat(np.arange(100), 4)
    )
    assert copied["p"] == pytest.approx(single["p"]) and copied["ci_low"] == pytest.approx(
        single["ci_low"]
    )
    as_if_independent = comparison.paired_difference(
        np.repeat(a, 4), np.repeat(b, 4), np.arange(400), draws=10
    )
    assert as_if_independent["p"] < single["p"] / 2


def test_the_interval_of_a_difference_covers_the_truth():
    rng = np.random.default_rng(8)
    hits = 0
    for seed in range(120):
        groups = np.repeat(np.arange(60), 3)
        hard = rng.random(60)[groups]  # films of one patient are hard or easy together
        a, b = rng.random(180) < 0.9 - 0.4 * hard, rng.random(180) < 0.8 - 0.4 * hard
        found = comparison.paired_difference(a, b, groups, draws=300, seed=seed, interval="bca")
        hits += found["ci_low"] <= 0.1 <= found["ci_high"]
    assert 106 <= hits <= 119  # 114 expected; outside at most 1 time in 100


def test_models_that_never_disagree_are_not_certainly_equal():
    right = np.array([1, 1, 0, 1] * 10, bool)
    same = comparison.paired_difference(right, right, np.arange(40) // 2)
    reach = 1 - 0.025 ** (1 / 20)
    assert same["p"] == 1 and (same["ci_low"], same["ci_high"]) == pytest.approx((-reach, reach))
    apart = comparison.paired_difference(np.ones(40, bool), np.zeros(40, bool), np.arange(40) // 2)
    assert apart["value"] == apart["ci_high"] == 1 and apart["ci_low"] == pytest.approx(
        1 - 2 * reach
    )
    assert apart["p"] == pytest.approx(2**-19)


def test_unpaired_input_is_refused():
    with pytest.raises(ValueError, match="pair the same images"):
        comparison.paired_difference(np.ones(3, bool), np.ones(4, bool), range(3))
    with pytest.raises(ValueError, match="percentile, bca"):
        comparison.paired_difference(
            np.ones(3, bool), np.ones(3, bool), range(3), interval="normal"
        )


# ------------------------------------------------------------------------------------------- several p-values


def test_holm_equals_the_definition_and_statsmodels():
    p = np.array([0.02, 0.5, 0.011, 0.02])
    assert comparison.holm(p).tolist() == pytest.approx([0.06, 0.5, 0.044, 0.06])
    assert comparison.holm([0.6, 0.9]).tolist() == [1.0, 1.0]
    many = np.random.default_rng(9).random(25) ** 4
    np.testing.assert_allclose(comparison.holm(many), multipletests(many, method="holm")[1])
