"""Loss of AUC and corruption error: hand-worked numbers, scikit-learn as oracle, exact zeros and ones."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from dlia_utils import corruption_error as ce

SEVERITIES = (1, 2, 3, 4, 5)


def table(cells: dict[tuple[str, int], list[int]], labels: list[int]) -> pd.DataFrame:
    """Predictions from what each cell answers: key (corruption, severity)."""
    frames = [
        pd.DataFrame(
            {
                "image": range(len(labels)),
                "label": labels,
                "corruption": name,
                "severity": severity,
                "predicted": answers,
                "p0": [1.0 - a for a in answers],
                "p1": [float(a) for a in answers],
            }
        )
        for (name, severity), answers in cells.items()
    ]
    return pd.concat(frames, ignore_index=True)


def noisy(*, images: int = 80, classes: int = 2, seed: int = 0, harm: float = 0.4) -> pd.DataFrame:
    """A classifier that two corruptions make worse, with severity."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    frames = []
    for name, severity in [("clean", 0), *((c, s) for c in ("noise", "blur") for s in SEVERITIES)]:
        logits = 2.0 * np.eye(classes)[labels] * (1 - harm * severity / 5) + rng.normal(
            size=(images, classes)
        )
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        frame = pd.DataFrame(p, columns=[f"p{c}" for c in range(classes)])
        frames.append(
            frame.assign(
                image=range(images),
                label=labels,
                corruption=name,
                severity=severity,
                predicted=p.argmax(1),
            )
        )
    return pd.concat(frames, ignore_index=True).sample(
        frac=1, random_state=seed
    )  # no order is promised


def alone(predictions: pd.DataFrame) -> dict[int, int]:
    """Every image its own patient."""
    return {image: image for image in predictions["image"].unique()}


def value(result: pd.DataFrame, corruption: str, metric: str) -> float:
    return result[(result["corruption"] == corruption) & (result["metric"] == metric)][
        "value"
    ].item()


# ------------------------------------------------------------------------------------------- AUC and the grid


@pytest.mark.parametrize("classes", [2, 4])
def test_auc_equals_scikit_learn_plain_and_resampled(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 120)
    p = rng.dirichlet(np.ones(classes), 120).round(1) + 0.3 * np.eye(classes)[labels]
    weights = rng.integers(0, 3, (4, 120))

    def oracle(index):
        binary = [sk.roc_auc_score(labels[index] == c, p[index, c]) for c in range(classes)]
        return binary[1] if classes == 2 else np.mean(binary)

    assert ce.auc(labels, p) == pytest.approx(oracle(np.arange(120)))
    drawn = [oracle(np.repeat(np.arange(120), row)) for row in weights]
    assert ce.auc(labels, p, weights) == pytest.approx(drawn)


def test_auc_is_over_the_classes_that_occur():
    labels, p = (
        np.array([0, 0, 2, 2]),
        np.array([[0.8, 0.1, 0.1], [0.3, 0.1, 0.6], [0.5, 0.1, 0.4], [0.1, 0, 0.9]]),
    )
    both = [sk.roc_auc_score(labels == c, p[:, c]) for c in (0, 2)]
    assert ce.auc(labels, p) == pytest.approx(np.mean(both))
    assert np.isnan(ce.auc(labels, p, np.array([[1, 1, 0, 0]]))).all()
    with pytest.raises(ValueError, match="labels must lie in 0 ... 1"):
        ce.auc(labels, p[:, :2])


@pytest.mark.parametrize("metric", ce.METRICS)
def test_grid_equals_scikit_learn_in_every_cell(metric):
    predictions = noisy(classes=3)
    result = ce.grid(predictions, alone(predictions), metric=metric, draws=20)
    assert list(result[["corruption", "severity"]].iloc[0]) == ["clean", 0] and len(result) == 11
    for row in result.itertuples():
        cell = predictions[
            (predictions["corruption"] == row.corruption)
            & (predictions["severity"] == row.severity)
        ]
        p = cell[["p0", "p1", "p2"]].to_numpy()
        truth = {
            "auc": np.mean([sk.roc_auc_score(cell["label"] == c, p[:, c]) for c in range(3)]),
            "accuracy": sk.accuracy_score(cell["label"], cell["predicted"]),
            "balanced_accuracy": sk.balanced_accuracy_score(cell["label"], cell["predicted"]),
        }[metric]
        assert row.value == pytest.approx(truth) and row.ci_low <= row.value <= row.ci_high
        assert row.drop == pytest.approx(result["value"][0] - row.value)


def test_a_corruption_that_changes_nothing_has_a_drop_of_exactly_0():
    clean = noisy().query("corruption == 'clean'")
    shuffled = clean.sample(frac=1, random_state=1).assign(corruption="nothing", severity=1)
    for metric in ce.METRICS:
        result = ce.grid(pd.concat([shuffled, clean]), alone(clean), metric=metric, draws=50).iloc[
            1
        ]
        assert (result[["drop", "drop_low", "drop_high"]] == 0).all() and result["ci_low"] < result[
            "ci_high"
        ]


def test_the_interval_of_a_drop_is_paired():
    """On the same patients a corruption that spoils a few images is measured better than either AUC is."""
    clean = noisy(images=200).query("corruption == 'clean'")
    spoiled = clean.assign(corruption="noise", severity=1)
    spoiled.loc[spoiled["image"] < 4, ["p0", "p1"]] = 0.5
    row = ce.grid(pd.concat([clean, spoiled]), alone(clean), draws=300).iloc[1]
    assert row["drop_high"] - row["drop_low"] < 0.5 * (row["ci_high"] - row["ci_low"])


def test_patients_with_many_images_widen_the_interval():
    one = noisy(images=40, seed=2)
    many = pd.concat([one.assign(image=one["image"] + 100 * k) for k in range(5)])
    by_image = ce.grid(many, alone(many), draws=400)
    by_patient = ce.grid(many, {i: i % 100 for i in many["image"].unique()}, draws=400)
    width = [(t["ci_high"] - t["ci_low"]).mean() for t in (by_image, by_patient)]
    assert width[1] / width[0] == pytest.approx(5**0.5, rel=0.2)
    assert by_patient["value"].equals(by_image["value"])


def test_an_accuracy_of_1_is_not_certain():
    perfect = table({("clean", 0): [0, 1] * 10, ("noise", 1): [0, 1] * 10}, [0, 1] * 10)
    row = ce.grid(perfect, alone(perfect), metric="accuracy", draws=20).iloc[0]
    assert row["ci_low"] == pytest.approx(0.025 ** (1 / 20)) and row["ci_high"] == 1


# ------------------------------------------------------------------------------------------- corruption error


def test_a_reference_against_itself_is_exactly_1():
    predictions = noisy(images=120, harm=0.9)
    result = ce.corruption_error(
        predictions, predictions.sample(frac=1, random_state=3), alone(predictions), draws=30
    )
    for metric in ("ce", "relative_ce"):
        rows = result[result["metric"] == metric]
        assert rows["corruption"].tolist()[-1] == "mean" and rows["left_out"].eq(0).all()
        assert (
            (rows["value"] == 1).all()
            and (rows["ci_low"] == 1).all()
            and (rows["ci_high"] == 1).all()
        )


def test_a_hand_worked_example():
    """Six films of class 0, two of class 1; balanced errors are halves of the classes' error shares."""
    labels = [0] * 6 + [1] * 2
    answers = {k: [1] * k + [0] * (6 - k) for k in range(7)}  # k false alarms: error k / 12
    ours = table(
        {
            ("clean", 0): answers[0] + [1, 1],
            ("noise", 1): answers[1] + [1, 1],
            ("noise", 2): answers[2] + [0, 1],
            ("blur", 1): answers[0] + [1, 1],
            ("blur", 2): answers[3] + [1, 1],
        },
        labels,
    )
    reference = table(
        {
            ("clean", 0): answers[1] + [1, 1],
            ("noise", 1): answers[3] + [1, 1],
            ("noise", 2): answers[3] + [0, 1],
            ("blur", 1): answers[2] + [1, 1],
            ("blur", 2): answers[4] + [1, 1],
        },
        labels,
    )
    result = ce.corruption_error(ours, reference, alone(ours), draws=20)
    # In twelfths: ours noise 1, 5 and blur 0, 3 (clean 0); reference noise 3, 6 and blur 2, 4 (clean 1).
    expected = {
        ("noise", "ce"): 6 / 9,
        ("blur", "ce"): 3 / 6,
        ("mean", "ce"): (6 / 9 + 3 / 6) / 2,
        ("noise", "relative_ce"): 6 / 7,
        ("blur", "relative_ce"): 3 / 4,
        ("mean", "relative_ce"): (6 / 7 + 3 / 4) / 2,
        ("noise", "error"): 3 / 12,
        ("noise", "reference_error"): 4.5 / 12,
        ("noise", "added_error"): 3 / 12,
        ("noise", "reference_added_error"): 3.5 / 12,
        ("mean", "error"): 2.25 / 12,
        # Trapezoids over 0, 1, 2 divided by 2: (first / 2 + second + third / 2) / 2.
        ("noise", "area"): 1 - (0 / 2 + 1 + 5 / 2) / 2 / 12,
        ("blur", "reference_area"): 1 - (1 / 2 + 2 + 4 / 2) / 2 / 12,
    }
    for (corruption, metric), truth in expected.items():
        assert value(result, corruption, metric) == pytest.approx(truth), (corruption, metric)
    plain = ce.corruption_error(ours, reference, alone(ours), error="accuracy", draws=5)
    assert value(plain, "noise", "ce") == pytest.approx((1 + 3) / (3 + 4))  # images wrong


def test_a_reference_that_does_not_degrade_is_left_out_and_named():
    predictions = noisy(images=100)
    harmless = predictions[predictions["corruption"] == "clean"]
    reference = pd.concat(
        [predictions[predictions["corruption"] != "blur"]]
        + [harmless.assign(corruption="blur", severity=s) for s in SEVERITIES]
    )
    result = ce.corruption_error(predictions, reference, alone(predictions), draws=50)
    blur = result[(result["corruption"] == "blur") & (result["metric"] == "relative_ce")].iloc[0]
    mean = result[(result["corruption"] == "mean") & (result["metric"] == "relative_ce")].iloc[0]
    assert (
        np.isnan(blur["value"]) and blur["left_out"] == 1 and "rises by 0.0000 only" in blur["note"]
    )
    assert mean["left_out"] == 1 and mean["note"].startswith("left out: blur")
    assert mean["value"] == value(result, "noise", "relative_ce") == 1
    assert np.isfinite(value(result, "blur", "ce")) and np.isfinite(value(result, "mean", "ce"))


def test_a_denominator_that_may_be_0_has_no_interval():
    labels = [0, 1] * 20
    flawless, slipped = labels, [1 - labels[0], *labels[1:]]
    reference = table({("clean", 0): flawless, ("noise", 1): slipped}, labels)
    ours = table({("clean", 0): flawless, ("noise", 1): [0] * 40}, labels)
    row = ce.corruption_error(ours, reference, alone(ours), draws=200).iloc[0]
    # One wrong film of 40: a third of the draws miss it.
    assert (
        row["value"] == pytest.approx(20)
        and np.isnan(row["ci_low"])
        and "denominator" in row["note"]
    )


def test_intervals_of_ce_are_paired():
    reference = noisy(images=150, harm=0.8)
    ours = reference.copy()
    better = (ours["severity"] == 5) & (ours["image"] < 10)
    ours.loc[better, "predicted"] = ours.loc[better, "label"]
    result = ce.corruption_error(ours, reference, alone(ours), draws=300).set_index(
        ["corruption", "metric"]
    )
    mce, error = result.loc[("mean", "ce")], result.loc[("mean", "error")]
    assert mce["value"] < 1 and mce["ci_high"] <= 1
    relative = [(row["ci_high"] - row["ci_low"]) / row["value"] for row in (mce, error)]
    assert relative[0] < 0.5 * relative[1]


# ------------------------------------------------------------------------------------------- refusals and rows


def test_tables_that_do_not_fit_are_refused_by_name():
    good = noisy(images=20)
    patients = alone(good)
    blur5 = (good["corruption"] == "blur") & (good["severity"] == 5)
    cases = {
        r"lacks the columns \['predicted'\]": good.drop(columns="predicted"),
        "occur before, such as image": pd.concat([good, good.head(2)]),
        "blur at severity 5 lacks 1 of 20 images, 3 among them": good[
            ~(blur5 & (good["image"] == 3))
        ],
        "have no 'clean' row": good[~((good["corruption"] == "clean") & (good["image"] == 7))],
        "probabilities in": good.assign(p1=np.nan),
        "label differs": good.assign(label=np.where(blur5, 1 - good["label"], good["label"])),
        "severity must be 0": good.assign(severity=good["severity"].clip(lower=1)),
    }
    for message, broken in cases.items():
        with pytest.raises(ValueError, match=message):
            ce.grid(broken, patients, draws=5)
    with pytest.raises(ValueError, match="patients has no entry for 1 images, 0 among them"):
        ce.grid(good, {k: v for k, v in patients.items() if k}, draws=5)
    with pytest.raises(ValueError, match="metric must be one of"):
        ce.grid(good, patients, metric="f1")
    pairs = {
        "differ in 1 images, 4": good[good["image"] != 4],
        "reference_predictions lacks blur at severity 5": good[~blur5],
        "reference_predictions lacks blur at severity 1.* and 2 more": good[
            good["corruption"] != "blur"
        ],
    }
    for message, other in pairs.items():
        with pytest.raises(ValueError, match=message):
            ce.corruption_error(good, other, patients, draws=5)
    with pytest.raises(ValueError, match="predictions lacks blur at severity 5"):
        ce.corruption_error(good[~blur5], good, patients, draws=5)
    with pytest.raises(ValueError, match="every corruption needs the same severities"):
        ce.corruption_error(good[~blur5], good[~blur5], patients, draws=5)


def test_rows_merge_into_a_results_file_without_collisions():
    predictions = noisy(images=30)
    grid = ce.rows(ce.grid(predictions, alone(predictions), draws=10))
    errors = ce.rows(ce.corruption_error(predictions, predictions, alone(predictions), draws=10))
    both = pd.concat([grid, errors])
    assert not both.duplicated(["attack", "eps", "eps_unit", "metric"]).any()
    assert len(grid) == 1 + 2 * 10 and both["value"].notna().all()
    assert grid.loc[grid["attack"] == "clean", ["eps", "eps_unit"]].values.tolist() == [
        [0.0, "pixel"]
    ]
    assert {"ce", "relative_ce", "area"} <= set(errors.loc[errors["attack"] == "mean", "metric"])
