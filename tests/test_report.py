"""Result rows, the results file, paired tables, verdict and figures on hand-made numbers."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from dlia_utils import plots, report


@dataclass
class FakeConfig:
    """The fields of a Config that report reads."""

    run_dir: Path
    notebook: str = "01_pneumonia_robustness"
    seed: int = 0
    size: int = 48
    epochs: int = 2
    profile: str = "smoke"
    data_name: str = "pneumonia (SYNTHETIC)"
    caption: str = "pneumonia (SYNTHETIC), smoke profile, 48 px"
    synthetic: bool = True
    headline_eps: float = 4 / 255
    pretrained: bool = False
    settings: dict = field(default_factory=dict)


@pytest.fixture
def config(tmp_path):
    return FakeConfig(tmp_path)


def rows(config, model, attack, eps, value, **labels):
    table = pd.DataFrame(
        [
            {
                "metric": "accuracy",
                "value": value,
                "ci_low": value - 0.1,
                "ci_high": value + 0.1,
                "n": 9,
            }
        ]
    )
    return report.result_rows(table, config, model=model, attack=attack, eps=eps, **labels)


def test_rows_carry_data_profile_and_hardware(config):
    row = rows(config, "baseline", "worst", 4 / 255, 0.5).iloc[0]
    assert list(row.index) == list(report.RESULT_COLUMNS)
    assert row["weights"] == "random"
    assert row["data"] == "pneumonia (SYNTHETIC)" and row["profile"] == "smoke" and row["hardware"]


def test_rows_say_how_long_the_model_was_really_trained(config):
    for name, epochs in (("free_at", 7), ("probe_head", 3)):
        (config.run_dir / name).mkdir()
        pd.DataFrame({"epoch": range(epochs)}).to_csv(
            config.run_dir / name / "metrics.csv", index=False
        )
    found = [
        rows(config, name, "clean", 0.0, 0.5)["epochs"].item()
        for name in ("free_at", "probe", "other")
    ]
    assert found == [7, 3, config.epochs]


def test_update_replaces_the_same_row_and_keeps_others(config):
    path = config.run_dir / "results.csv"
    report.update_results(
        pd.concat([rows(config, "a", "worst", 0.1, 0.5), rows(config, "b", "worst", 0.1, 0.6)]),
        path,
    )
    merged = report.update_results(rows(config, "a", "worst", 0.1, 0.7), path)
    assert merged.set_index("model")["value"].to_dict() == {"b": 0.6, "a": 0.7}
    assert len(pd.read_csv(path)) == 2


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"size": 96}, {"profile": "cpu"}, {"data_name": "pneumonia"}]
)
def test_a_row_of_another_seed_size_profile_or_data_is_another_result(config, tmp_path, other):
    path = tmp_path / "results.csv"
    report.update_results(rows(config, "a", "worst", 0.1, 0.5), path)
    merged = report.update_results(rows(replace(config, **other), "a", "worst", 0.1, 0.7), path)
    assert merged["value"].tolist() == [0.5, 0.7]


@pytest.mark.parametrize(
    ("labels", "nearest"), [({"atack": "worst"}, "attack"), ({"epss": 1.0}, "eps")]
)
def test_a_column_that_is_none_of_the_results_is_refused(config, labels, nearest):
    with pytest.raises(
        ValueError, match=f"no column '{next(iter(labels))}'; did you mean {nearest}"
    ):
        rows(config, "a", "clean", 0.0, 0.5, **labels)
    table = pd.DataFrame([{"metric": "accuracy", "value": 0.5, "n": 9, "region": "lungs"}])
    with pytest.raises(ValueError, match="no column 'region'"):
        report.result_rows(table, config, model="a")


def test_an_eps_whose_last_digit_was_lost_in_a_file_is_the_same_eps(config):
    path = config.run_dir / "results.csv"
    report.update_results(rows(config, "a", "worst", 1 / 255, 0.5), path)
    merged = report.update_results(rows(config, "a", "worst", 0.0039215686274509, 0.7), path)
    assert merged["value"].tolist() == [0.7] and report.eps_text(merged["eps"].item()) == "1/255"


def test_incomplete_rows_are_refused(config):
    with pytest.raises(ValueError, match="lack the columns"):
        report.update_results(pd.DataFrame({"model": ["a"]}), config.run_dir / "results.csv")


def per_image(fooled_clean, fooled_worst):
    image = np.arange(len(fooled_clean))
    clean = pd.DataFrame({"attack": "clean", "eps": 0.0, "image": image, "fooled": fooled_clean})
    return pd.concat(
        [
            clean,
            pd.DataFrame(
                {"attack": "worst", "eps": 4 / 255, "image": image, "fooled": fooled_worst}
            ),
        ]
    )


def test_paired_tests_count_discordant_images(config):
    tables = {
        "baseline": per_image([0] * 8, [1] * 8),
        "good": per_image([0] * 7 + [1], [0] * 6 + [1] * 2),
    }
    tables["same"] = tables["baseline"]
    study = SimpleNamespace(
        run=SimpleNamespace(bootstrap_draws=50), patients=lambda images: np.asarray(images)
    )
    paired = report.paired_tests(tables, study, eps=4 / 255, reference="baseline").set_index(
        ["condition", "model"]
    )
    worst = paired.loc["worst case 4/255"]
    assert worst.loc["good", ["only_model_right", "only_reference_right"]].tolist() == [6, 0]
    assert worst.loc["good", "p"] == pytest.approx(2 / 2**6)
    assert worst["p_holm"].tolist() == pytest.approx([4 / 2**6, 1]) and worst.loc["same", "p"] == 1
    assert paired.loc[("clean", "good"), "p"] == 1.0 and worst.loc["good", "difference"] == 0.75
    study.patients = lambda images: np.asarray(images) // 4  # two patients
    by_patient = report.paired_tests(tables, study, eps=4 / 255, reference="baseline").set_index(
        ["condition", "model"]
    )
    assert by_patient.loc[("worst case 4/255", "good"), "p"] == 0.5


@pytest.mark.parametrize(
    ("margin", "zeros", "balanced", "words"),
    [
        (0.60, 0.0, 0.9, "A real gain under every attack of the list."),
        (0.60, 0.0, 0.5, "No defence"),
        (0.40, 0.0, 0.9, "Masked gradients"),
        (0.05, 0.9, 0.9, "Masked gradients"),
        (0.60, 0.9, 0.9, "Masked gradients"),
    ],
)
def test_verdict_trusts_neither_masked_gradients_nor_constant_answers(
    config, margin, zeros, balanced, words
):
    table = pd.concat(
        [rows(config, "baseline", a, 4 / 255, 0.02) for a in ("worst", "pgd_ce", "pgd_margin")]
        + [
            rows(config, "defended", a, 4 / 255, v)
            for a, v in (("worst", margin), ("pgd_ce", 0.62), ("pgd_margin", margin))
        ]
    )
    shares = pd.DataFrame(
        {"model": ["baseline", "defended"], "metric": "zero_gradient_share", "value": [0.0, zeros]}
    )
    reading = shares.assign(metric="balanced_accuracy", value=[0.9, balanced])
    table = pd.concat(
        [table, report.result_rows(shares, config), report.result_rows(reading, config)]
    )
    masking = report.masking_table(table, eps=4 / 255)
    paired = pd.DataFrame([{"condition": "worst case 4/255", "model": "defended", "p_holm": 1e-6}])
    text = report.verdict(table, masking, paired, config)
    assert words in text and "Synthetic images" in text
    real = report.verdict(table, masking, paired, replace(config, synthetic=False))
    assert "A smoke run" in real and "'cpu'" in real, "nor is a tiny model on real images a finding"
    assert "smoke" not in report.verdict(
        table, masking, paired, replace(config, synthetic=False, profile="cpu")
    )


def test_figures_are_drawn_and_say_what_data(config):
    images = np.random.default_rng(0).random((4, 1, 8, 8))
    labels, p = np.array([0, 1, 0, 1]), np.array([0.2, 0.8, 0.6, 0.7])
    results = pd.concat(
        [rows(config, "a", "clean", 0.0, 0.9), rows(config, "a", "worst", 4 / 255, 0.4)]
    )
    history = pd.DataFrame({"epoch": [1, 2], "train_loss": [1.0, 0.5], "val_auc": [0.6, 0.7]})
    masking = pd.DataFrame(
        {"pgd_ce": [0.5], "pgd_margin": [0.1], "zero_gradients": [0.3]}, index=["a"]
    )
    figures = {
        "samples": plots.figure_samples(images, list("abcd"), config.caption),
        "history": plots.figure_history({"a": history}, config.caption),
        "roc": plots.figure_roc(labels, {"a": p}, config.caption),
        "confusion": plots.figure_confusion(
            labels, {"a": p > 0.5}, ("NORMAL", "PNEUMONIA"), config.caption
        ),
        "eps": plots.figure_accuracy_vs_eps(results, config.caption, attack="worst"),
        "masking": plots.figure_masking(masking, config.caption, eps=4 / 255),
        "adversarial": plots.figure_adversarial(
            images, {"pgd": images + 0.01}, [{}] * 4, config.caption
        ),
    }
    for name, figure in figures.items():
        assert isinstance(figure, Figure)
        words = " ".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))
        assert "SYNTHETIC" in words, name
        assert report.save_figure(figure, config, name).stat().st_size > 2000


# ------------------------------------------------------------------- attacks by direction, and maps

EPS = 4 / 255


def worst_case():
    """Six healthy films of which two fall, four sick ones of which three fall, at 4/255; one more at 8/255."""
    fooled = [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    table = pd.DataFrame(
        {
            "attack": "worst",
            "eps": EPS,
            "image": range(10),
            "label": [0] * 6 + [1] * 4,
            "fooled": fooled,
        }
    )
    return pd.concat(
        [
            table,
            table.assign(eps=8 / 255, fooled=1),
            table.assign(attack="pgd_ce", fooled=[1] + [0] * 9),
        ]
    )


class FakeStudy:
    def __init__(self, config):
        self.run = config

    def patients(self, rows):
        return np.asarray(rows)


def test_directions_split_the_worst_case_into_missed_disease_and_false_alarm(config):
    config.bootstrap_draws = 50
    found = report.direction_rows(worst_case(), FakeStudy(config), model="a", eps=EPS).set_index(
        "metric"
    )
    assert found.loc["sensitivity", ["value", "n"]].tolist() == [0.25, 4]
    assert (
        found.loc["specificity", "value"] == pytest.approx(4 / 6)
        and found.loc["specificity", "n"] == 6
    )
    assert set(found["attack"]) == {"worst"} and found["ci_low"].lt(found["value"]).all()


def test_a_fooled_two_class_model_named_the_other_class():
    answers = report.attacked_predictions(
        worst_case().sample(frac=1, random_state=0), attack="pgd_ce", eps=EPS
    )
    assert answers["image"].tolist() == list(range(10))
    assert answers["predicted"].tolist() == [1] + [0] * 5 + [1] * 4


def test_the_attack_table_is_in_per_cent_and_leaves_out_models_without_attacks(config):
    config.bootstrap_draws = 50
    table = report.attack_table(
        pd.concat(
            [
                rows(config, "a", "clean", 0.0, 0.9),
                rows(config, "a", "pgd_ce", EPS, 0.5),
                rows(config, "a", "worst", EPS, 0.4),
                rows(config, "a", "worst", 8 / 255, 0.2),
                report.direction_rows(worst_case(), FakeStudy(config), model="a", eps=EPS),
            ]
        ),
        eps=EPS,
    )
    assert table.loc["a", "clean accuracy (%)"] == "90.0 [80.0, 100.0]"
    assert table.loc["a", "PGD accuracy (%)"].startswith("50.0") and table.loc[
        "a", "worst case (%)"
    ].startswith("40.0")
    assert table.loc["a", "sensitivity, worst case (%)"].startswith("25.0")


def differences(low, high):
    rows = [
        {
            "map": "gradcam",
            "score": "coverage_gain",
            "reference": name,
            "value": (low + high) / 2,
            "ci_low": low,
            "ci_high": high,
            "model": "a",
        }
        for name in ("random", "edges")
    ]
    return pd.DataFrame(rows)


def test_the_map_verdict_follows_the_intervals():
    hit, even, miss = (
        report.map_verdict(differences(*ends)) for ends in ((0.1, 0.3), (-0.1, 0.3), (-0.3, -0.1))
    )
    assert (
        "1 of 1 maps beat" in hit
        and "**a, gradcam**: +0.200 [+0.100, +0.300]" in hit
        and "worse" not in hit
    )
    assert "0 of 1" in even and "worse" not in even
    assert (
        "0 of 1" in miss and "*worse* than at least one map that knows nothing: a, gradcam" in miss
    )
    mixed = pd.concat([differences(0.1, 0.3).iloc[:1], differences(-0.1, 0.2).iloc[1:]])
    assert "0 of 1 maps" in report.map_verdict(mixed), "all references must be beaten"


def test_map_rows_keep_map_score_and_region(config):
    summary = pd.DataFrame(
        [
            {
                "map": "gradcam",
                "score": "auprc",
                "value": 0.2,
                "ci_low": 0.1,
                "ci_high": 0.3,
                "n": 5,
                "region": region,
            }
            for region in ("box", "outline")
        ]
    )
    found = report.map_rows(summary, FakeStudy(config), model="a")
    assert found["metric"].tolist() == ["auprc box", "auprc outline"] and set(found["attack"]) == {
        "map gradcam"
    }
    table = report.map_table(summary[summary.region.eq("box")].assign(model="a"))
    assert table.loc[("a", "gradcam"), "auprc"] == "0.200 [0.100, 0.300]"
