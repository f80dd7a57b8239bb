"""Metrics against scikit-learn, tests against statsmodels, intervals against known truths."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from statsmodels.stats.contingency_tables import mcnemar as mcnemar_of_statsmodels
from statsmodels.stats.multitest import multipletests

from dlia_utils import calibration, corruption_error, metrics
from dlia_utils.attacks import evaluate
from dlia_utils.explain import localisation


@pytest.fixture(params=["random", "ties", "one_class_predicted"])
def scored(request):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 200)
    probability = np.clip(0.5 + 0.3 * (labels - 0.5) + 0.3 * rng.standard_normal(200), 0, 1)
    if request.param == "ties":
        probability = np.round(probability, 1)
    return labels, probability / 2.5 if request.param == "one_class_predicted" else probability


def classified(*given, **options):
    return metrics.classification(*given, **options).set_index("metric")


def test_values_equal_scikit_learn(scored):
    labels, probability = scored
    predicted = (probability > 0.5).astype(int)
    macro = {"average": "macro", "zero_division": 0}
    p, r, f, _ = sk.precision_recall_fscore_support(labels, predicted, **macro)
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "auc": sk.roc_auc_score(labels, probability),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "sensitivity": sk.recall_score(labels, predicted),
        "specificity": sk.recall_score(labels, predicted, pos_label=0),
    }
    expected |= {"precision": p, "recall": r, "f1": f}
    found = classified(labels, probability, np.arange(200), draws=10)["value"]
    assert found.to_dict() == pytest.approx(expected, abs=1e-7)


def test_three_classes_agree_with_scikit_learn_and_have_no_sensitivity():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 90)
    score = rng.dirichlet((1, 1, 1), 90) + 0.5 * np.eye(3)[labels]
    score /= score.sum(1, keepdims=True)
    predicted, macro = score.argmax(1), {"average": "macro"}
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "auc": sk.roc_auc_score(labels, score, multi_class="ovr"),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "precision": sk.precision_score(labels, predicted, **macro),
        "recall": sk.recall_score(labels, predicted, **macro),
        "f1": sk.f1_score(labels, predicted, **macro),
    }
    found = classified(labels, score, np.arange(90), draws=50)["value"]
    assert found.to_dict() == pytest.approx(expected)


def test_resampled_metrics_equal_recomputing_on_the_drawn_images():
    rng = np.random.default_rng(0)
    labels, score = rng.integers(0, 2, 60), np.round(rng.random(60), 1)
    groups = rng.integers(0, 20, 60)
    weights = metrics.patient_weights(groups, draws=200, seed=0)
    drawn = [np.repeat(np.arange(60), weight.astype(int)) for weight in weights]
    oracles = {
        "auc": sk.roc_auc_score,
        "f1": lambda y, p: sk.f1_score(y, p > 0.5, average="macro"),
        "sensitivity": lambda y, p: sk.recall_score(y, p > 0.5),
    }
    found = classified(labels, score, groups, draws=200)
    for name, oracle in oracles.items():
        ends = np.quantile([oracle(labels[i], score[i]) for i in drawn], [0.025, 0.975])
        assert found.loc[name, ["ci_low", "ci_high"]].tolist() == pytest.approx(ends.tolist())


@pytest.mark.parametrize(
    ("labels", "score", "groups", "message"),
    [
        ([1, 3], np.ones((2, 3)), ["a", "b"], "0 to 2"),
        ([0, 1], [0.1, np.nan], ["a", "b"], "NaN"),
        ([0, 1], [0.1, 0.2], ["a", None], "lacks the patient of 1 images"),
    ],
)
def test_bad_input_is_named(labels, score, groups, message):
    with pytest.raises(ValueError, match=message):
        metrics.classification(np.array(labels), np.array(score), groups)


def test_patients_are_drawn_whole():
    weights = metrics.patient_weights(["a", "a", "b", "c", "c"], draws=50, seed=1)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3] == weights[:, 4]).all()
    assert weights[:, [0, 2, 3]].sum(1).tolist() == [3] * 50


def test_none_or_all_is_not_certain_and_a_number_is_no_share():
    groups, end = np.arange(200) // 2, 0.025 ** (1 / 100)
    none, every = (metrics.share(np.full(200, flag), groups) for flag in (False, True))
    assert none["value"] == none["ci_low"] == 0 and none["ci_high"] == pytest.approx(1 - end)
    assert every["ci_low"] == pytest.approx(end) and every["ci_high"] == 1
    assert metrics.mean(np.zeros(200), groups, draws=20)["ci_high"] == 0
    labels, score = np.array([0] * 30 + [1] * 10), np.array([0.1] * 30 + [0.9] * 9 + [0.2])
    patients = [*range(15), *range(15), *range(20, 30)]
    found = classified(labels, score, patients, draws=50)
    assert found.loc["specificity", "ci_low"] == pytest.approx(0.025 ** (1 / 15))  # 15 patients
    assert found.loc["sensitivity", "ci_low"] < 0.9 < found.loc["sensitivity", "ci_high"]
    perfect = classified(np.arange(20) % 2, np.arange(20) % 2 * 0.8, range(20), draws=200)
    low = stats.binomtest(10, 10).proportion_ci(method="exact").low  # the class of fewer patients
    assert perfect.loc[["auc", "f1", "sensitivity"], "ci_low"].tolist() == pytest.approx([low] * 3)
    assert perfect.loc["accuracy", "ci_low"] > low


def test_what_is_not_known_is_nan():
    table = classified(np.ones(5, int), np.linspace(0, 1, 5), list("abcde"), draws=5)
    assert np.isnan(table.loc["auc", "value"])
    table = classified(np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.7, 0.9]), ["one"] * 4)
    assert table.loc["accuracy", ["ci_low", "ci_high"]].isna().all(), "more than one patient?"
    assert np.isnan(metrics.mean(np.arange(4.0), ["one"] * 4)["ci_low"])


def bca_of_scipy(statistic, data, draws):
    """scipy's BCa interval of `statistic(data, axis)` from given bootstrap values."""
    given = type("Given", (), {"bootstrap_distribution": draws})()
    options = {"n_resamples": 0, "bootstrap_result": given, "method": "BCa", "vectorized": True}
    return tuple(stats.bootstrap((data,), statistic, **options).confidence_interval)


def test_bca_equals_scipys_over_patients_on_the_same_draws():
    rng = np.random.default_rng(1)
    groups, values = np.sort(rng.integers(0, 30, 90)), rng.exponential(size=90) ** 2
    total, images = (np.bincount(groups, weights=part) for part in (values, np.ones(90)))

    def mean(patients, axis=-1):
        return total[patients].sum(axis) / images[patients].sum(axis)

    weights = metrics.patient_weights(groups, draws=400, seed=5)
    expected = bca_of_scipy(mean, np.flatnonzero(images), weights @ values / weights.sum(1))
    found = metrics.mean(values, groups, draws=400, seed=5, bca=True)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(expected, rel=1e-12)


def test_large_sets_are_worked_through_in_parts(monkeypatch):
    rng = np.random.default_rng(3)
    given = rng.integers(0, 2, 50), rng.random(50), rng.integers(0, 20, 50)
    whole = classified(*given, draws=40, bca=True)
    monkeypatch.setattr(metrics, "CHUNK", 350)  # seven rows of weights
    np.testing.assert_allclose(classified(*given, draws=40, bca=True), whole, rtol=1e-12)


def two_models(seed, n=80, *, ties=False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    a, b = labels + 1.5 * rng.standard_normal((2, n)) + rng.standard_normal(n)
    return labels, *(np.round([a, b], 0) if ties else (a, b))


def by_pairs(labels, scores):
    """AUCs and covariance as DeLong et al. 1988 define them: a comparison for every pair."""
    ill, well = [score[labels == 1] for score in scores], [score[labels == 0] for score in scores]
    wins = [(x[:, None] > y) + (x[:, None] == y) / 2 for x, y in zip(ill, well, strict=True)]
    above, below = np.stack([win.mean(1) for win in wins]), np.stack([win.mean(0) for win in wins])
    parts = [np.cov(part) / part.shape[1] for part in (above, below)]
    return np.array([win.mean() for win in wins]), sum(parts)


@pytest.mark.parametrize("ties", [False, True])
def test_delongs_test_follows_from_its_definition(ties):
    labels, a, b = two_models(1, ties=ties)
    auc, covariance = by_pairs(labels, [a, b])
    se = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) ** 0.5
    found = metrics.delong_test(labels, a, b, np.arange(80))
    assert [found["auc_a"], found["auc_b"]] == pytest.approx(auc.tolist(), abs=1e-12)
    assert found["z"] == pytest.approx((auc[0] - auc[1]) / se, rel=1e-9)
    assert found["p"] == pytest.approx(2 * stats.norm.sf(abs(found["z"])))
    assert found["ci_high"] - found["ci_low"] == pytest.approx(2 * 1.959964 * se, rel=1e-6)
    other = metrics.delong_test(labels, b, a, np.arange(80))
    assert other["value"] == pytest.approx(-found["value"])
    same = metrics.delong_test(labels, a, np.exp(a), np.arange(80))
    assert same["value"] == 0 and same["p"] == 1 and np.isnan(same["ci_low"])


def test_copies_of_an_image_of_one_patient_are_no_evidence():
    labels, a, b = two_models(2)
    copied = [np.repeat(part, 3) for part in (labels, a, b, np.arange(80))]
    single, again = metrics.delong_test(labels, a, b, np.arange(80)), metrics.delong_test(*copied)
    assert again["z"] == pytest.approx(single["z"])


def test_the_variance_of_patients_with_images_of_both_classes_is_that_of_repeated_studies():
    rng = np.random.default_rng(3)
    codes, found, naive = np.repeat(np.arange(50), 4), [], []
    for _ in range(300):
        labels = rng.permuted(np.tile([0, 0, 1, 1], (50, 1)), axis=1).ravel()
        own = 1.5 * rng.standard_normal(50)[codes]  # what the images of a patient share
        a, b = labels + own + rng.standard_normal(200), labels + 2 * rng.standard_normal(200)
        found.append(metrics.delong_test(labels, a, b, codes))
        naive.append(metrics.delong_test(labels, a, b, range(200)))
    spread = np.std([one["value"] for one in found])
    stated, alone = (np.mean([o["ci_high"] - o["value"] for o in way]) for way in (found, naive))
    assert stated / 1.96 == pytest.approx(spread, rel=0.12)
    # Both classes of a patient shift together here: images taken as independent look too uncertain.
    assert alone / 1.96 > 1.1 * spread


def test_mcnemar_equals_statsmodels():
    rng = np.random.default_rng(5)
    a, b = rng.random(60) < 0.8, rng.random(60) < 0.6
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    found = metrics.paired_difference(a, b, np.arange(60), draws=10)
    assert (found["only_a"], found["only_b"]) == (table[0][1], table[1][0])
    assert found["p"] == pytest.approx(mcnemar_of_statsmodels(table, exact=True).pvalue)
    assert found["value"] == pytest.approx(a.mean() - b.mean())


def test_the_clustered_p_is_that_of_all_exchanges_of_the_models():
    rng = np.random.default_rng(6)
    groups = rng.integers(0, 9, 30)
    a, b = rng.random(30) < 0.8, rng.random(30) < 0.5
    sums = [(a[groups == g].astype(int) - b[groups == g]).sum() for g in np.unique(groups)]
    totals = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=len(sums))]
    expected = np.mean([total >= abs(sum(sums)) for total in totals])
    assert 0 < expected < 1
    assert metrics.paired_difference(a, b, groups, draws=10)["p"] == pytest.approx(expected)


def test_the_interval_of_a_difference_covers_the_truth():
    rng, hits = np.random.default_rng(8), 0
    for seed in range(120):
        groups = np.repeat(np.arange(60), 3)
        hard = rng.random(60)[groups]  # images of one patient are hard or easy together
        a, b = rng.random(180) < 0.9 - 0.4 * hard, rng.random(180) < 0.8 - 0.4 * hard
        options = {"draws": 300, "seed": seed, "bca": True}
        found = metrics.paired_difference(a, b, groups, **options)
        hits += found["ci_low"] <= 0.1 <= found["ci_high"]
    assert 106 <= hits <= 119  # 114 expected; outside at most 1 time in 100


def test_models_that_never_disagree_are_not_certainly_equal():
    right, patients = np.array([1, 1, 0, 1] * 10, bool), np.arange(40) // 2
    same = metrics.paired_difference(right, right, patients)
    reach = 1 - 0.025 ** (1 / 20)
    assert same["p"] == 1 and (same["ci_low"], same["ci_high"]) == pytest.approx((-reach, reach))
    apart = metrics.paired_difference(np.ones(40, bool), np.zeros(40, bool), patients)
    assert apart["value"] == apart["ci_high"] == 1
    assert apart["ci_low"] == pytest.approx(1 - 2 * reach) and apart["p"] == pytest.approx(2**-19)


def test_holm_equals_the_definition_and_statsmodels():
    p = np.array([0.02, 0.5, 0.011, 0.02])
    assert metrics.holm(p).tolist() == pytest.approx([0.06, 0.5, 0.044, 0.06])
    many = np.random.default_rng(9).random(25) ** 4
    np.testing.assert_allclose(metrics.holm(many), multipletests(many, method="holm")[1])


# --- whose image is it?

FOUR = np.array([0, 1, 0, 1]), np.array([0.1, 0.6, 0.7, 0.9])
# What is None here is not reached: nothing is attacked or asked before the patients are known.
SHARED = {
    "classification": lambda ids: metrics.classification(*FOUR, ids, draws=2),
    "bootstrap": lambda ids: metrics.bootstrap(lambda w: w @ FOUR[1], ids, draws=2),
    "mean": lambda ids: metrics.mean(FOUR[1], ids, draws=2),
    "share": lambda ids: metrics.share([True] * 4, ids, draws=2),
    "exact_interval": lambda ids: metrics.exact_interval(1.0, ids),
    "patient_weights": lambda ids: metrics.patient_weights(ids, draws=2),
    "paired_difference": lambda ids: metrics.paired_difference(*FOUR, ids, draws=2),
    "delong_test": lambda ids: metrics.delong_test(*FOUR, FOUR[1], ids),
    "calibration": lambda ids: calibration.summary(*FOUR, ids, draws=2),
    "reliability": lambda ids: calibration.reliability(*FOUR, ids, draws=2),
    "localise": lambda ids: localisation.localise({}, np.zeros((4, 1, 2, 2)), [], groups=ids),
    "robust": lambda ids: evaluate.robust(
        None, (torch.zeros(4, 1), 0), [1], attacks=["fgsm"], groups=ids
    ),
    "corruptions": lambda ids: corruption_error.patients_of(range(4), dict(enumerate(ids))),
}
HELD = {"list": list, "Series": pd.Series, "array": lambda ids: np.array(ids, dtype=object)}


@pytest.mark.parametrize("door", SHARED)
@pytest.mark.parametrize("held", HELD)
def test_an_image_without_a_patient_is_refused_wherever_patients_are_drawn(door, held):
    for lost in (None, np.nan, pd.NA, pd.NaT, "", "  ", "nan", "<NA>", "NA"):
        with pytest.raises(ValueError, match="lacks the patient of 2 images|no entry for image"):
            SHARED[door](HELD[held](["p1", lost, lost, "p2"]))


def test_numpys_text_of_a_missing_number_is_no_patient_either():
    with pytest.raises(ValueError, match="lacks the patient of 1 images: give each of them an id"):
        metrics.patient_codes(np.array(["p1", np.nan, "p2"]))
    for held in (["p1", None], [1.0, np.nan]):
        with pytest.raises(ValueError, match="lacks the patient"):
            metrics.patient_codes(pd.Series(held).convert_dtypes())


@pytest.mark.parametrize("ids", [[1, "1"], [1, 1.0], [True, 1], ["2", 2.0], [np.int64(1), "1"]])
@pytest.mark.parametrize("held", HELD)
def test_ids_of_two_types_never_become_one_patient(ids, held):
    with pytest.raises(ValueError, match="may be one patient or two: give all ids in one type"):
        metrics.patient_codes(pd.Series(ids, dtype=object) if held == "Series" else HELD[held](ids))


BIG = 2**53
IDS = [["007", "7", "07"], [BIG, BIG + 1, BIG + 2], [2**70, 2**70 + 1, -1], [1, "a", ("a", 1)]]
IDS += [np.array([BIG, BIG + 1, -5]), np.array([2**64 - 1, 2**64 - 2, 0], np.uint64), "abc"]
IDS += [pd.Series(["a", "b", "c"], dtype="category"), pd.array([BIG, BIG + 1, 2], "Int64")]


@pytest.mark.parametrize("ids", IDS, ids=str)
def test_different_ids_are_different_patients_to_the_last_digit(ids):
    assert metrics.patient_codes([*ids, *ids]).tolist() == [0, 1, 2] * 2
    assert metrics.exact_ids(ids, "groups", "patient").tolist() == list(ids)
    with pytest.raises(ValueError, match="9007199254740992.0, whose last digits are lost"):
        metrics.patient_codes([1.0, float(BIG)])


@pytest.mark.parametrize(
    "outside", [1 + 2**-52, 1 + 2**-22, -1e-9, np.float32(1) + np.float32(2e-7)]
)
def test_what_rounding_left_outside_of_0_and_1_is_clipped(outside):
    assert metrics.probabilities([0.25, outside]).tolist() == [0.25, float(outside > 0.5)]
    labels, groups = np.array([0, 1, 1]), range(3)
    found = calibration.summary(labels, [0.2, 0.6, outside], groups, draws=2)
    clipped = calibration.summary(labels, [0.2, 0.6, np.clip(outside, 0, 1)], groups, draws=2)
    pd.testing.assert_frame_equal(found, clipped)


@pytest.mark.parametrize("outside", [1.00001, -0.001, 90.0, np.inf, np.nan])
def test_what_is_further_out_is_refused_by_its_true_value(outside):
    with pytest.raises(ValueError, match=rf"{outside!r} \(1 of 2 values, first row 1\)"):
        metrics.probabilities([0.5, outside])


SETTINGS = settings(derandomize=True, database=None, deadline=None, max_examples=15)


@SETTINGS
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(4, 24), levels=st.integers(1, 6))
def test_values_know_no_order_no_names_and_no_copies(seed, n, levels):
    rng = np.random.default_rng(seed)
    labels, groups = rng.integers(0, 2, n), rng.integers(0, 5, n)
    labels[:2] = 0, 1
    score = rng.integers(0, levels + 1, n) / levels
    table = classified(labels, score, groups, draws=20)
    order, twice = rng.permutation(n), np.repeat(np.arange(n), 2)
    moved = classified(labels[order], score[order], groups[order], draws=20)
    np.testing.assert_allclose(moved["value"], table["value"])
    named = classified(labels, score, [f"{one:03}" for one in groups], draws=20)
    pd.testing.assert_frame_equal(named, table)
    copied = classified(labels[twice], score[twice], groups[twice], draws=20).drop(columns="n")
    pd.testing.assert_frame_equal(copied, table.drop(columns="n"))
    if np.unique(groups[labels == 0]).size > 1 < np.unique(groups[labels == 1]).size:
        other = rng.random(n)
        one, two = (
            metrics.delong_test(*d)
            for d in (
                (labels, score, other, groups),
                (labels[order], score[order], other[order], groups[order]),
            )
        )
        assert (
            one["value"] == pytest.approx(two["value"]) == table.loc["auc", "value"] - one["auc_b"]
        )
