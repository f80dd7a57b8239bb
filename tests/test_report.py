"""Result rows, the results file, paired tables, the verdict and figures on hand-made numbers."""

import base64
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from dlia_utils import plots, report, units

EPS = 4 / 255


@dataclass
class FakeRun:
    """The fields of a Run that report reads."""

    run_dir: Path
    notebook: str = "01_pneumonia_robustness"
    seed: int = 0
    size: int = 48
    epochs: int = 2
    profile: str = "smoke"
    data_name: str = "pneumonia (SYNTHETIC)"
    caption: str = "pneumonia (SYNTHETIC), smoke profile, 48 px"
    synthetic: bool = True
    headline_eps: float = EPS
    bootstrap_draws: int = 50
    settings: dict = field(default_factory=dict)


@dataclass
class FakeStudy:
    """A study of ten test images, each of a patient of its own."""

    run: FakeRun
    images_of_one: int = 1

    def patients(self, rows):
        return np.asarray(rows) // self.images_of_one

    def rows(self, part):
        return np.arange(10)


@pytest.fixture
def run(tmp_path):
    return FakeRun(tmp_path)


def rows(run, model, attack, eps, value, metric="accuracy", **labels):
    row = {"metric": metric, "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1, "n": 9}
    table = pd.DataFrame([row])
    return report.result_rows(table, run, model=model, attack=attack, eps=eps, **labels)


def test_rows_say_what_they_are_and_how_long_the_model_was_really_trained(run):
    for name, epochs in (("free_at", 7), ("probe_head", 3)):
        (run.run_dir / name).mkdir()
        log = pd.DataFrame({"epoch": range(epochs)})
        log.to_csv(run.run_dir / name / "metrics.csv", index=False)
    found = [rows(run, name, "worst", EPS, 0.5).iloc[0] for name in ("free_at", "probe", "other")]
    assert [row["epochs"] for row in found] == [7, 3, run.epochs]
    assert list(found[0].index) == list(report.RESULT_COLUMNS) and found[0]["weights"] == "random"
    assert found[0]["data"] == "pneumonia (SYNTHETIC)" and found[0]["hardware"]


def test_update_replaces_the_same_row_and_keeps_others(run):
    path = run.run_dir / "results.csv"
    both = pd.concat([rows(run, name, "worst", 1 / 255, 0.5) for name in "ab"])
    report.update_results(both, path)
    # An eps whose last digit was lost in a file is the same eps.
    merged = report.update_results(rows(run, "a", "worst", 0.0039215686274509, 0.7), path)
    assert merged.set_index("model")["value"].to_dict() == {"b": 0.5, "a": 0.7}
    assert len(pd.read_csv(path)) == 2 and units.eps_text(merged["eps"][1]) == "1/255"
    for model in ("007", "7", "007"):  # a name is text, whatever it looks like
        merged = report.update_results(rows(run, model, "worst", 0.0, 0.5), run.run_dir / "n.csv")
    assert merged["model"].tolist() == ["7", "007"]
    with pytest.raises(ValueError, match="lack the columns"):
        report.update_results(pd.DataFrame({"model": ["a"]}), path)


def test_two_runs_at_once_lose_no_row(run):
    path = run.run_dir / "results.csv"

    def add(name):
        report.update_results(rows(run, name, "worst", 0.1, 0.5), path)

    names = [f"model {number}" for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, names))
    assert sorted(pd.read_csv(path)["model"]) == sorted(names)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"size": 96}, {"profile": "cpu"}, {"data_name": "pneumonia"}]
)
def test_a_row_of_another_seed_size_profile_or_data_is_another_result(run, other):
    path = run.run_dir / "results.csv"
    report.update_results(rows(run, "a", "worst", 0.1, 0.5), path)
    merged = report.update_results(rows(replace(run, **other), "a", "worst", 0.1, 0.7), path)
    assert merged["value"].tolist() == [0.5, 0.7]


def test_a_column_that_is_none_of_the_results_is_refused(run):
    with pytest.raises(ValueError, match="no column 'epss'; did you mean eps"):
        rows(run, "a", "clean", 0.0, 0.5, epss=1.0)


def per_image(clean, worst):
    table = pd.DataFrame({"image": range(len(clean))})
    parts = table.assign(fooled=clean, attack="clean", eps=0.0), table.assign(fooled=worst)
    return pd.concat([parts[0], parts[1].assign(attack="worst", eps=EPS)])


def test_paired_tests_count_discordant_images(run):
    tables = {"baseline": per_image([0] * 8, [1] * 8)}
    tables |= {"good": per_image([0] * 7 + [1], [0] * 6 + [1] * 2), "same": tables["baseline"]}
    given = {"eps": EPS, "reference": "baseline"}
    paired = report.paired_tests(tables, FakeStudy(run), **given).set_index(["condition", "model"])
    worst = paired.loc["worst case 4/255"]
    assert worst.loc["good", ["only_model_right", "only_reference_right"]].tolist() == [6, 0]
    assert worst["p"].tolist() == pytest.approx([2 / 2**6, 1])
    assert worst["p_holm"].tolist() == pytest.approx([4 / 2**6, 1])
    assert worst.loc["good", "difference"] == 0.75 and paired.loc[("clean", "good"), "p"] == 1
    by_patient = report.paired_tests(tables, FakeStudy(run, 4), **given)  # two patients
    assert by_patient[by_patient.model.eq("good")]["p"].tolist() == [1, 0.5]
    # A second seed of the same trainings is no second sample of patients.
    twice = {name: pd.concat([table, table]) for name, table in tables.items()}
    twice = report.paired_tests(twice, FakeStudy(run), **given).set_index(["condition", "model"])
    same = ["difference", "ci_low", "ci_high", "p", "p_holm"]
    pd.testing.assert_frame_equal(twice[same], paired[same])
    # What one seed gains and the other loses on an image is no difference of the trainings.
    other = per_image([0] * 8, [1] * 6 + [0] * 2)
    both = [tables["good"], other]
    mixed = {"baseline": pd.concat(both), "b": pd.concat(both[::-1])}
    assert report.paired_tests(mixed, FakeStudy(run), **given).p.tolist() == [1, 1]


def test_directions_split_the_worst_case_into_missed_disease_and_false_alarm(run):
    """Six healthy images of which two fall, four sick ones of which three fall."""
    fooled = [0, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    table = per_image([0] * 10, fooled).assign(label=[0] * 6 + [1] * 4 + [0] * 6 + [1] * 4)
    found = report.direction_rows(table, FakeStudy(run), model="a", eps=EPS).set_index("metric")
    assert found["value"].tolist() == pytest.approx([0.25, 4 / 6, 11 / 24])
    assert found["n"].tolist() == [4, 6, 10] and found.index[2] == "balanced_accuracy"
    assert set(found["attack"]) == {"worst"} and found["ci_low"].lt(found["value"]).all()
    accuracy = report.accuracy_rows(table, FakeStudy(run), model="a").set_index("attack")
    assert accuracy["value"].to_dict() == {"clean": 1.0, "worst": 0.5}
    others = [rows(run, "a", attack, eps, 0.5) for attack, eps in (("clean", 0.0), ("pgd_ce", EPS))]
    results = pd.concat([*others, accuracy.reset_index(), found.reset_index()])
    shown = report.attack_table(results, eps=EPS).loc["a"]
    assert shown["PGD accuracy (%)"] == "50 [40, 60]"
    assert shown["worst case (%)"].startswith("50 [")
    assert shown["sensitivity, worst case (%)"].startswith("25 [")
    wide = report.results_table(results[results.attack.ne("clean")])
    assert list(wide) == ["pgd_ce 4/255", "worst 4/255"] and wide.index.tolist() == ["a"]


NO_MORE = "list, yet not clearly more than the same answer for everybody (0.62)."


@pytest.mark.parametrize(
    ("margin", "ce", "zeros", "balanced", "words"),
    [
        (0.80, 0.62, 0.0, 0.9, "A real gain under every attack of the list."),
        (0.60, 0.62, 0.0, 0.9, NO_MORE),
        (0.45, 0.45, 0.0, 0.9, "list, yet less than the same answer for everybody (0.62)."),
        (0.60, 0.62, 0.0, 0.5, "No defence"),
        (0.40, 0.62, 0.0, 0.9, "Masked gradients"),
        (0.05, 0.62, 0.9, 0.9, "Masked gradients"),
        (0.60, 0.62, 0.9, 0.9, "Masked gradients"),
    ],
)
def test_verdict_trusts_no_masked_gradients_nor_constant_answers(
    run, margin, ce, zeros, balanced, words
):
    found = {"baseline": (0.02, 0.02, 0.0, 0.9), "mine": (margin, ce, zeros, balanced)}
    parts = []
    for name, (worst, ce, zero, clean) in found.items():
        attacks = {"worst": worst, "pgd_ce": ce, "pgd_margin": worst}
        parts += [rows(run, name, attack, EPS, value) for attack, value in attacks.items()]
        parts.append(rows(run, name, "clean", 0.0, clean, metric="balanced_accuracy"))
        for metric, n in (("sensitivity", 5), ("specificity", 3)):
            parts.append(rows(run, name, "worst", EPS, worst, metric=metric).assign(n=n))
        parts.append(report.zero_gradient_rows({name: zero}, FakeStudy(run)))
    table = pd.concat(parts)
    masking = report.masking_table(table, eps=EPS)
    paired = pd.DataFrame([{"condition": "worst case 4/255", "model": "mine", "p_holm": 1e-6}])
    text = report.verdict(table, masking, paired, run)
    assert words in text and "p < 0.001" in text and "Synthetic images" in text
    real = replace(run, synthetic=False)
    (line,) = report.verdict(table, masking, paired, real).splitlines()
    assert "No finding" in line and 'PROFILE = "cpu"' in line and "mine" not in line
    assert "smoke" not in report.verdict(table, masking, paired, replace(real, profile="cpu"))


def test_figures_are_drawn_and_say_what_data(run, monkeypatch):
    shown = []
    told_to = "IPython.display.display"
    monkeypatch.setattr(told_to, lambda data, metadata, raw: shown.append((data, metadata)))
    images = np.random.default_rng(0).random((4, 1, 8, 8))
    labels, p = np.array([0, 1, 0, 1]), np.array([0.2, 0.8, 0.6, 0.7])
    results = pd.concat([rows(run, "a", "clean", 0.0, 0.9), rows(run, "a", "worst", EPS, 0.4)])
    history = pd.DataFrame({"epoch": [1, 2], "train_loss": [1.0, 0.5], "val_auc": [0.6, 0.7]})
    caption = run.caption
    figures = {
        "samples": plots.figure_samples(images, list("abcd"), caption),
        "history": plots.figure_history({"a": history}, caption),
        "roc": plots.figure_roc(labels, {"a": p}, caption),
        "confusion": plots.figure_confusion(labels, {"a": p > 0.5}, ("NORMAL", "SICK"), caption),
        "eps": plots.figure_accuracy_vs_eps(results, caption, attack="worst"),
    }
    for name, figure in figures.items():
        texts = figure.findobj(Text)
        words = " ".join(text.get_text() for text in texts)
        assert "SYNTHETIC" in words and "SYNTHETIC" in figure.alt(), name
        assert min(t.get_fontsize() for t in texts if t.get_text()) >= 9, name
        figure._ipython_display_()
        path = report.save_figure(figure, run, name)
        figure._ipython_display_()
        for told, metadata in shown[-2:]:
            assert told["text/plain"] == metadata["image/png"]["alt"] == figure.alt()
            assert base64.b64decode(told["image/png"]).startswith(b"\x89PNG")
        assert base64.b64decode(told["image/png"]) == path.read_bytes(), "drawn once"
        assert path.stat().st_size > 2000


def test_lines_beyond_the_colours_share_one_name_in_the_legend():
    history = pd.DataFrame({"epoch": [1, 2], "train_loss": [1.0, 0.5], "val_auc": [0.6, 0.7]})
    figure = plots.figure_history(dict.fromkeys("abcdefghi", history), "a caption")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [*"abcdefg", plots.OTHERS]


@pytest.mark.parametrize("reach", [25, 1e4])
def test_log_axes_of_a_search_have_few_ticks_and_no_minor_labels(reach):
    lr = 2e-4 * np.geomspace(1, reach, 5)
    runs = pd.DataFrame({"number": range(5), "lr": lr, "score": lr, "state": "complete"})
    figure = plots.figure_search(runs.assign(extension=0), "")
    axis, (low, high) = figure.axes[0].xaxis, figure.axes[0].get_xlim()
    ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
    labels = [label.get_text() for place, label in ticks if low <= place <= high]
    assert 2 <= len(labels) <= 5 and all(labels) and axis.get_scale() == "log"
    assert not any(label.get_text() for label in axis.get_ticklabels(minor=True))


def test_a_shown_table_has_words_rounded_numbers_and_no_counting_index():
    table = pd.DataFrame(
        {"fp_per_image": [0.1234, np.nan], "n": [24.0, 1e3], "p_holm": [1e-6, 0.2]}
    )
    text = report.show(table.assign(verdict=["PASS", "WARN"], ok=[True, False]))
    assert list(text.table) == ["fp per image", "images", "p (Holm)", "verdict", "ok"]
    assert text.table.to_numpy().tolist() == [
        ["0.12", "24", "< 0.001", "PASS", "yes"],
        ["", "1,000", "0.200", "WARN", "no"],
    ]
    page = text._repr_html_()
    assert page.count("color:#B04A00") == 1 and 'text-align:right;max-width:36em">0.12' in page
    named = report.show(table.rename_axis("model"), notes="a < b")
    assert "model" in named.table and "a &lt; b" in named._repr_html_() and "a < b" in repr(named)


def test_an_interval_at_none_or_all_is_explained(run):
    near = pd.concat(
        [rows(run, "a", "clean", 0.0, 1.0), rows(run, "a", "clean", 0.0, 0.5, metric="f1")]
    )
    given = near.assign(ci_low=[0.9, 0.4], ci_high=[1.0, 0.6], n=40)
    both = report.wide(given, only=["f1", "accuracy"])
    assert both.loc["a"].to_dict() == {"f1": "0.50 [0.40, 0.60]", "accuracy": "1.00 [0.90, 1.00] †"}
    assert "Clopper" in report.show(both).notes
    bare = report.wide(given, intervals=["f1"])
    assert bare.loc["a"].to_dict() == {"accuracy": "1.00", "f1": "0.50 [0.40, 0.60]"}
    assert not report.show(bare).notes


def test_the_files_of_a_run_are_listed_by_folder(run):
    many = [*(f"suite/{k}.npz" for k in range(30)), *(f"figures/{k}.png" for k in range(10))]
    for name in ("results.csv", "tables/a.csv", *many):
        (run.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run.run_dir / name).write_text("")
    text = repr(report.written(run))
    assert "results.csv" in text and "a.csv" in text
    assert "and 27 more" in text and "and 2 more" in text
