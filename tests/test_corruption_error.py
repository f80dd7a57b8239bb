"""Loss of AUC and corruption error: hand-worked numbers, scikit-learn, exact zeros and ones."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from dlia_utils import corruption_error as ce

SEVERITIES = (1, 2, 3, 4, 5)


def table(cells: dict[tuple[str, int], list[int]], labels: list[int]) -> pd.DataFrame:
    """Predictions from what each cell answers: key (corruption, severity)."""
    frames = []
    for (name, severity), answers in cells.items():
        frame = pd.DataFrame({"image": range(len(labels)), "label": labels, "predicted": answers})
        p1 = frame["predicted"].astype(float)
        frames.append(frame.assign(corruption=name, severity=severity, p0=1 - p1, p1=p1))
    return pd.concat(frames, ignore_index=True)


def noisy(*, images: int = 80, classes: int = 2, seed: int = 0, harm: float = 0.4) -> pd.DataFrame:
    """A classifier that two corruptions make worse, with severity; rows in no order."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    frames = []
    for name, severity in [("clean", 0), *((c, s) for c in ("noise", "blur") for s in SEVERITIES)]:
        logits = 2.0 * np.eye(classes)[labels] * (1 - harm * severity / 5)
        logits += rng.normal(size=(images, classes))
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        frame = pd.DataFrame(p, columns=[f"p{c}" for c in range(classes)])
        frame = frame.assign(image=range(images), label=labels, predicted=p.argmax(1))
        frames.append(frame.assign(corruption=name, severity=severity))
    return pd.concat(frames, ignore_index=True).sample(frac=1, random_state=seed)


def alone(predictions: pd.DataFrame) -> dict[int, int]:
    """Every image its own patient."""
    return {image: image for image in predictions["image"].unique()}


def value(result: pd.DataFrame, corruption: str, metric: str) -> float:
    own = result["corruption"].eq(corruption) & result["metric"].eq(metric)
    return result.loc[own, "value"].item()


@pytest.mark.parametrize("classes", [2, 4])
def test_grid_equals_scikit_learn_in_every_cell(classes):
    predictions = noisy(classes=classes)
    result = ce.grid(predictions, alone(predictions), draws=20)
    assert list(result[["corruption", "severity"]].iloc[0]) == ["clean", 0] and len(result) == 11
    for row in result.itertuples():
        own = predictions["corruption"].eq(row.corruption)
        cell = predictions[own & predictions["severity"].eq(row.severity)]
        aucs = [sk.roc_auc_score(cell["label"] == c, cell[f"p{c}"]) for c in range(classes)]
        assert row.value == pytest.approx(aucs[1] if classes == 2 else np.mean(aucs))
        assert row.ci_low <= row.value <= row.ci_high
        assert row.drop == pytest.approx(result["value"][0] - row.value)


def test_a_corruption_that_changes_nothing_has_a_drop_of_exactly_0():
    clean = noisy().query("corruption == 'clean'")
    shuffled = clean.sample(frac=1, random_state=1).assign(corruption="nothing", severity=1)
    result = ce.grid(pd.concat([shuffled, clean]), alone(clean), draws=50).iloc[1]
    assert (result[["drop", "drop_low", "drop_high"]] == 0).all()
    assert result["ci_low"] < result["ci_high"]


def test_a_reference_against_itself_is_exactly_1():
    predictions = noisy(images=120, harm=0.9)
    again = predictions.sample(frac=1, random_state=3)
    result = ce.corruption_error(predictions, again, alone(predictions), draws=30)
    for metric in ("ce", "relative_ce"):
        rows = result[result["metric"] == metric]
        assert rows["corruption"].tolist()[-1] == "mean" and rows["left_out"].eq("").all()
        assert rows[["value", "ci_low", "ci_high"]].eq(1).all(axis=None)


def test_a_hand_worked_example():
    """Six images of class 0, two of class 1; balanced errors are halves of the classes' shares."""
    labels, answers = [0] * 6 + [1] * 2, {k: [1] * k + [0] * (6 - k) for k in range(7)}
    keys = [("clean", 0), ("noise", 1), ("noise", 2), ("blur", 1), ("blur", 2)]
    alarms = {"ours": (0, 1, 2, 0, 3), "reference": (1, 3, 3, 2, 4)}  # k false alarms: k / 12
    slips = {key: [int(key != ("noise", 2)), 1] for key in keys}
    cells = [zip(keys, ks, strict=True) for ks in alarms.values()]
    both = [{key: answers[n] + slips[key] for key, n in cell} for cell in cells]
    ours, reference = (table(one, labels) for one in both)
    result = ce.corruption_error(ours, reference, alone(ours), draws=20)
    # In twelfths: ours noise 1, 5, blur 0, 3 (clean 0); reference 3, 6 and 2, 4 (clean 1).
    expected = {("noise", "ce"): 6 / 9, ("blur", "ce"): 3 / 6, ("mean", "ce"): (6 / 9 + 3 / 6) / 2}
    expected |= {("noise", "relative_ce"): 6 / 7, ("blur", "relative_ce"): 3 / 4}
    expected |= {("mean", "relative_ce"): (6 / 7 + 3 / 4) / 2, ("noise", "error"): 3 / 12}
    for (corruption, metric), truth in expected.items():
        assert value(result, corruption, metric) == pytest.approx(truth), (corruption, metric)


def test_a_reference_that_does_not_degrade_is_left_out_and_named():
    predictions = noisy(images=100)
    harmless = predictions[predictions["corruption"] == "clean"]
    other = [harmless.assign(corruption="blur", severity=s) for s in SEVERITIES]
    reference = pd.concat([predictions[predictions["corruption"] != "blur"], *other])
    result = ce.corruption_error(predictions, reference, alone(predictions), draws=50)
    result = result.set_index(["corruption", "metric"])
    assert np.isnan(result.loc[("blur", "relative_ce"), "value"])
    mean = result.loc[("mean", "relative_ce")]
    assert mean["left_out"] == "blur" and mean["value"] == 1
    assert np.isfinite(result.loc[("mean", "ce"), "value"])


def test_a_denominator_that_may_be_0_has_no_interval():
    labels = [0, 1] * 20
    flawless, slipped = labels, [1 - labels[0], *labels[1:]]
    reference = table({("clean", 0): flawless, ("noise", 1): slipped}, labels)
    ours = table({("clean", 0): flawless, ("noise", 1): [0] * 40}, labels)
    result = ce.corruption_error(ours, reference, alone(ours), draws=200).set_index("metric")
    row = result.loc["ce"].iloc[0]
    # One wrong image of 40: a third of the draws miss it.
    assert row["value"] == pytest.approx(20) and np.isnan(row["ci_low"])


def test_intervals_of_ce_are_paired():
    reference = noisy(images=150, harm=0.8)
    ours = reference.copy()
    better = (ours["severity"] == 5) & (ours["image"] < 10)
    ours.loc[better, "predicted"] = ours.loc[better, "label"]
    result = ce.corruption_error(ours, reference, alone(ours), draws=300)
    result = result.set_index(["corruption", "metric"])
    mce, error = result.loc[("mean", "ce")], result.loc[("mean", "error")]
    assert mce["value"] < 1 and mce["ci_high"] <= 1
    relative = [(row["ci_high"] - row["ci_low"]) / row["value"] for row in (mce, error)]
    assert relative[0] < 0.5 * relative[1]


def test_tables_that_do_not_fit_are_refused():
    good = noisy(images=20)
    patients, clean = alone(good), good["corruption"].eq("clean")
    blur5 = good["corruption"].eq("blur") & good["severity"].eq(5)
    cases = {
        "duplicate entries": pd.concat([good, good.head(2)]),
        "image in every cell": good[~(blur5 & good["image"].eq(3))],
        "a 'clean' row": good[~clean],
        "probabilities in": good.assign(p1=np.nan),
    }
    for message, broken in cases.items():
        with pytest.raises(ValueError, match=message):
            ce.grid(broken, patients, draws=5)
    with pytest.raises(ValueError, match="no entry for image 0"):
        ce.grid(good, {k: v for k, v in patients.items() if k}, draws=5)
    with pytest.raises(ValueError, match="differ in images or cells"):
        ce.corruption_error(good, good[~blur5], patients, draws=5)
    with pytest.raises(KeyError, match="'blur', 5"):
        ce.corruption_error(good[~blur5], good[~blur5], patients, draws=5)
    nothing = ce.corruption_error(good[clean], good[clean], patients, draws=5)
    assert nothing["corruption"].eq("mean").all() and ce.metric_rows(nothing).empty


def test_rows_merge_into_a_results_file_without_collisions():
    predictions = noisy(images=30)
    given = {"patients": alone(predictions), "draws": 10}
    grid = ce.metric_rows(ce.grid(predictions, **given))
    both = pd.concat([grid, ce.metric_rows(ce.corruption_error(predictions, predictions, **given))])
    assert not both.duplicated(["attack", "eps", "eps_unit", "metric"]).any()
    assert len(grid) == 1 + 2 * 10 and both["value"].notna().all()
    delta = grid[grid["metric"].eq("delta_auc")]
    assert delta["eps_unit"].eq("severity").all() and len(delta) == 10
