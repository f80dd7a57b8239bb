"""The pages tell the truth: tables come from the committed results, pictures too, and nothing is
left to fill in."""

import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_kaggle_tree import NO_DEFENCE

from dlia_utils import submission
from tools import notebooks, published

PAGE = published.PAGE.read_text(encoding="utf-8")
RESULTS = published.REPOSITORY / "results"


def test_tables_come_from_the_committed_results():
    assert published.fill(PAGE, published.blocks()) == PAGE, "run: python -m tools tables"


@pytest.mark.parametrize("name", ["01_pneumonia", "01_survey"])
def test_committed_results_are_real_and_complete(name):
    results = pd.read_csv(RESULTS / f"{name}.csv")
    assert not results.data.str.contains("SYNTHETIC").any()
    clean = results[results.attack.eq("clean") & results.metric.eq("accuracy")]
    assert (clean.n == 624).all(), "the official test split has 624 images"
    assert results[results.metric.eq("accuracy")][["ci_low", "ci_high"]].notna().all(axis=None)
    assert not results.duplicated(["model", "attack", "eps", "eps_unit", "metric", "seed"]).any()


@pytest.mark.parametrize(
    "name", sorted({path.name for path in RESULTS.glob("0*.csv")} - {"05_submission_edition_a.csv"})
)
def test_every_row_says_where_it_comes_from(name):
    results = pd.read_csv(RESULTS / name)
    columns = ["seed", "size", "profile", "data", "hardware"]
    columns += ["n"] * ("checks" not in name)  # whose counts stand in their texts
    assert results[columns].notna().all(axis=None)


def test_committed_detection_results_say_what_is_synthetic_and_on_how_many_images():
    results = pd.read_csv(RESULTS / "05_detection.csv")
    planted = results.model.eq("planted findings, 5 folds")
    assert (results.data.str.contains("SYNTHETIC") == planted).all()
    # All of edition A out of fold, or what did not train fold 0; FracAtlas' official test split.
    chests = results.model.str.startswith("fold 0, ").map({True: 294, False: 735})
    n = chests.where(results.data.eq("dlia"), 61)
    assert (results.n == n)[~planted].all()
    nih = results[results.data.eq("dlia")]
    sizes = nih.model.str.contains("256 px").map({True: 256, False: 512})
    assert (nih["size"] == sizes).all()
    assert not results.duplicated(["model", "metric", "data"]).any()


def test_committed_submission_has_a_box_for_every_id_and_no_label_takes_all():
    table = pd.read_csv(RESULTS / "05_submission_edition_a.csv")
    assert len(table) == 148 and table.id.is_unique and table.image_id.nunique() == 145
    ids = table[["id", "image_id"]]
    assert len(submission.check(table, ids, images=dict.fromkeys(ids.image_id, (1024, 1024))))
    assert table.label.value_counts(normalize=True).max() <= 0.5


def test_committed_fracture_results_are_real_paired_and_complete():
    results = pd.read_csv(RESULTS / "02_fracatlas.csv")
    assert set(results.data) == {"fracatlas"} and set(results.profile) == {"cpu"}
    assert not results.duplicated(["model", "seed", "attack", "eps", "metric"]).any()
    for attack in ("clean", "worst"):
        assert (results[results.attack.eq(attack) & results.metric.eq("accuracy")].n == 222).all()
    worst = results[results.attack.eq("worst") & results.metric.eq("accuracy")].sort_values("eps")
    assert (
        worst.groupby("model")["value"].apply(lambda values: values.is_monotonic_decreasing).all()
    )
    maps = results[results.attack.str.startswith("map ")]
    assert (maps.n == 72).all()
    kinds = maps.groupby(["model", "seed"])["attack"].nunique()
    together = kinds[kinds.index.get_level_values("model").str.endswith(", seeds 0 1 2")]
    assert together.tolist() == [5, 5] and (kinds.drop(together.index) == 8).all()
    seeds = kinds.drop(together.index).groupby("model").size()
    assert seeds.to_dict() == {"standard": 3, "pgd_at": 3, "trades": 1}


def test_committed_medmnist_results_are_whole_runs_beside_a_constant_answer():
    results = pd.read_csv(RESULTS / "04_perturbation_medmnist.csv")
    assert set(results.profile) == {"cpu"}
    assert not results.duplicated(["data", "seed", "model", "attack", "eps", "metric"]).any()
    clean = results[results.attack.eq("clean") & results.metric.eq("accuracy")]
    constant = clean[clean.model.eq("constant answer")].set_index("data").value.round(3)
    assert (constant == constant.index.map({"breastmnist": 0.731, "pneumoniamnist": 0.625})).all()
    assert (clean.n == clean.data.map({"breastmnist": 156, "pneumoniamnist": 624})).all()
    warned = results[results.metric.eq("auroc_over_p_shift error within")]
    assert len(warned) * 5 == len(clean) * 4


def test_committed_covid_results_are_real_and_of_one_test_split():
    results = pd.read_csv(RESULTS / "06_covid.csv")
    assert set(results.data) == {"covid"} and set(results.profile) == {"cpu"}
    assert not results.duplicated(["notebook", "model", "attack", "metric"]).any()
    assert (results[results.metric.isin(["accuracy", "auc"])].n == 300).all()


def test_committed_tuberculosis_results_are_real_and_say_where_from():
    results = pd.read_csv(RESULTS / "03_tuberculosis.csv")
    assert set(results.data) == {"tuberculosis", "shenzhen"} and set(results.profile) == {"cpu"}
    assert not results.duplicated(["model", "attack", "eps", "metric", "data"]).any()
    edges = results[results.attack.str.startswith("audit, ")].set_index("attack")
    learnt = edges[edges.index.str.startswith("audit, learnt here")]
    border = learnt[learnt.index.str.endswith("border_only")]
    assert border.n.tolist() == [334, 662] and border.data.tolist() == ["tuberculosis", "shenzhen"]
    assert border.ci_low.iloc[0] > 0.9 and border.ci_high.iloc[1] <= 0.5
    (copies,) = results[results.model.eq("(none)")].value
    assert copies == 0, "the text says that none was found"


def test_the_table_of_two_hospitals_takes_each_number_from_its_place():
    rows, clean = [], "clean, chosen threshold"
    for away, ending, value in (
        ("", "", 0.9),
        ("external, ", "", 0.6),
        ("external, ", "_change", -0.3),
    ):
        for attack, eps, metric in ((clean, 0.0, "auc"), ("worst", 4 / 255, "balanced_accuracy")):
            rows.append([away + attack, eps, metric + ending, value - (attack == "worst") * 0.1])
    rows.append(["worst", 1 / 255, "balanced_accuracy", 0.1])  # of another eps
    table = pd.DataFrame(rows, columns=["attack", "eps", "metric", "value"]).assign(model="m")
    table = table.assign(
        n=334, seed=0, eps_unit="pixel", ci_low=table.value - 0.1, ci_high=table.value + 0.1
    )
    found = published.hospitals(table).set_index("measure")
    assert found.loc["AUC"].tolist()[1:] == [
        "0.90 [0.80, 1.00]",
        "0.60 [0.50, 0.70]",
        "-0.30 [-0.40, -0.20]",
    ]
    worst = found.loc["balanced worst case at 4/255"]
    assert worst["collection"].startswith("0.80") and worst["Shenzhen"].startswith("0.50")


def test_several_seeds_are_told_as_mean_and_spread_beside_the_constant_answer():
    results = pd.read_csv(RESULTS / "01_survey.csv")
    third = results[results.model.isin(["pgd_at", "mart"])]
    moved = [third.assign(seed=seed, value=third.value + 0.01 * seed) for seed in (1, 2)]
    table = published.study_table(pd.concat([results, *moved]), published.ATTACKED)
    table = table.set_index("model")
    assert table.loc["pgd_at", "worst case at 4/255"] == "0.728 ± 0.010"
    assert table.seeds[["pgd_at", "baseline"]].tolist() == ["3", "1"]
    assert table.loc["baseline", "clean accuracy"].startswith("0.920 [")
    last = table.loc["always the same answer"]
    assert last.tolist() == ["", "0.625", "0.500", "0.625", "0.500", "1.000", "0.000"]
    square = results[results.attack.eq("square") & results.metric.eq("accuracy")].iloc[[-1]]
    square = square.assign(attack="square, of those standing", value=0.995, n=200)
    last = published.each_attack(pd.concat([results, square])).iloc[-2:]
    assert last["square, of those standing"].tolist() == ["0.995 of 200", ""]
    bones = pd.read_csv(RESULTS / "02_fracatlas.csv")
    maps = bones[bones.attack.str.startswith("map ") & bones.seed.eq(0)]
    moved = published.fracture_maps(pd.concat([maps, maps.assign(seed=1, value=maps.value + 0.02)]))
    ours = moved["model"].ne("(no model)")
    assert moved[ours].iloc[:, 2:].map(lambda cell: cell.endswith("± 0.01")).all(axis=None)
    assert not moved[~ours].iloc[:, 2:].map(lambda cell: "±" in cell).any(axis=None)
    tables = {"01-attacks": 8, "01-eps": 8, "study-01": 8, "01-survey": 16, "01-fgsm": 20}
    for name, rows in tables.items():
        lines = published.blocks()[name].splitlines()
        assert lines[-1].startswith("| always the same answer |") and len(lines) >= rows


KINDS = "*.md", "*/README.md", "docs/*.md"
PAGES = [page for kind in KINDS for page in notebooks.REPOSITORY.glob(kind)]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_nothing_is_left_to_fill_in(page):
    assert not re.search(r"\b(XX+|TODO|FIXME|TBD)\b|@@", page.read_text(encoding="utf-8"))


def test_pictures_are_made_from_the_results_and_lie_where_the_readme_looks():
    pictures = published.pictures()
    assert {f"docs/{name}.png" for name in pictures} == set(re.findall(r"docs/\w+\.png", PAGE))
    for name, figure in pictures.items():
        assert (published.REPOSITORY / "docs" / f"{name}.png").is_file() and figure.axes


EXAMPLES = re.findall(
    r"```python\n(.*?)```", (notebooks.REPOSITORY / "README.md").read_text(), re.S
)


@pytest.mark.parametrize("code", EXAMPLES, ids=["your own images", "your own model"])
def test_examples_of_the_readme_run_as_pasted(code, tmp_path, monkeypatch, capsys):
    for k in range(48):  # one bright and one dark class
        path = tmp_path / "my_images" / ("sick", "well")[k % 2] / f"p{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 99, (40, 40), np.uint8)
        Image.fromarray(noise + np.uint8(90 * (k % 2))).save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    exec(code, {})
    assert re.search(r"balanced_accuracy|worst", capsys.readouterr().out)


def test_the_readme_is_short_and_names_what_exists():
    text = (notebooks.REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    for command in ("run", "test", "lab"):
        assert f"make {command}" in text
    for source in notebooks.sources():
        assert f"notebooks/{source.stem}.ipynb" in text


def headline(name, model, attack, metric="accuracy", eps=4 / 255):
    table = pd.read_csv(RESULTS / f"{name}.csv")
    own = table[table.model.eq(model) & table.attack.eq(attack) & table.metric.eq(metric)]
    return own[np.isclose(own.eps, eps if attack == "worst" else 0)].iloc[0]


def test_what_readme_and_notebooks_say_of_the_real_studies_is_in_the_results():
    plain = ["baseline", *NO_DEFENCE, "distilled_T35"]
    assert round(headline("01_survey", "baseline", "clean").value, 2) == 0.92
    studies = {"01_pneumonia": (6, ["baseline", "papernot"]), "01_survey": (14, plain)}
    for name, (models, weak) in studies.items():
        worst = pd.read_csv(RESULTS / f"{name}.csv").query("attack == 'worst'")
        worst = worst[np.isclose(worst.eps, 4 / 255) & worst.metric.eq("accuracy")]
        for _, own in worst.set_index("model").groupby("seed"):
            above = set(own.index[own.ci_low > 390 / 624])  # always answering pneumonia
            assert above == {"pgd_at", "mart"} and own.value.idxmax() == "pgd_at"
            assert (own.value[weak] == 0).all(), "nor does a smoke run praise: test_kaggle_tree.py"
        assert worst.model.nunique() == models
    pneumonia = pd.read_csv(RESULTS / "01_pneumonia.csv")
    clean = pneumonia.query("model == 'baseline' and attack == 'clean' and metric == 'accuracy'")
    assert clean.seed.tolist() == [0, 1] and (clean.value - 0.89).abs().max() < 0.01
    stood = pneumonia.query("attack == 'worst' and metric == 'accuracy' and eps > 0.01")
    stood = stood.groupby("model")["value"].agg(lambda values: values.round(3).tolist())
    tests = pd.read_csv(RESULTS / "01_seed_tests.csv").set_index(["model", "condition"])
    (pooled,) = tests.loc[("mart", "worst case 4/255"), ["difference"]].round(3)
    assert pooled == -0.039 and tests.seeds["mart"].eq(2).all()
    assert stood["pgd_at"] == [0.716, 0.728] and stood["trades"] == [0.263, 0.220]
    assert stood["hat"] == [0.399]
    best = pd.read_csv(RESULTS / "01_trainings.csv").groupby(["model", "seed"])["val_robust"].max()
    assert best["trades"].round(2).tolist() == [0.77, 0.76] and round(best["hat", 0], 2) == 0.76
    assert best["pgd_at"].round(2).tolist() == [0.92, 0.93]
    fallen = {name: headline("02_fracatlas", name, "worst").value for name in ("pgd_at", "trades")}
    assert [round(value, 3) for value in fallen.values()] == [0.559, 0.171]
    starts = pd.read_csv(RESULTS / "02_starts.csv").groupby(["model", "start", "seed"])
    best = starts["val_robust"].max().round(2)
    assert best.tolist() == [0.51, 0.57, 0.73, 0.76, 0.76, 0.76, 0.63, 0.43]
    for name in ("standard", "linear_probe", "robust_probe"):
        assert headline("02_fracatlas", name, "worst").value == 0
    own, there = (f"{place}clean, chosen threshold" for place in ("", "external, "))
    tb = [headline("03_tuberculosis", "standard", one, "auc").value for one in (own, there)]
    found = headline("03_tuberculosis", "standard", there, "sensitivity")
    assert [round(one, 2) for one in (*tb, found.value)] == [1, 0.63, 0.03] and found.n == 662
    assert round(headline("03_tuberculosis", "pgd_at", "worst").value, 2) == 0.94
    for model in ("pgd_at", "trades"):
        abroad = pd.read_csv(RESULTS / "03_tuberculosis.csv").query("attack == 'external, worst'")
        abroad = abroad[abroad.model.eq(model) & abroad.metric.eq("balanced_accuracy")]
        assert abroad.ci_high.item() < 0.5, "less than a constant answer"
    nih = pd.read_csv(RESULTS / "05_detection.csv").query("data == 'dlia'").set_index("model")
    hit, nih = (nih[nih.metric.eq(name)].value for name in ("boxes_hit", "mAP50"))
    assert hit.round(2).tolist() == [0.57, 0.63, 0.94]
    assert round(nih["plain"] / nih["median boxes"]) == 6
    kept = nih[[f"fold 0, {part} of the images" for part in ("25 %", "50 %")]]
    assert (kept / nih["fold 0, all images"]).round(2).tolist() == [0.48, 0.58]
    parts = [f"plain, with the right {part}" for part in ("corners", "labels")]
    assert nih[parts].round(2).tolist() == [0.20, 0.15]
    told = {"01": ["**0.716** and **0.728**", f"{stood['mart'][1]:.3f}"], "02": ["0.559", "0.171"]}
    for source, numbers in told.items():
        text = notebooks.sources([source])[0].read_text()
        assert all(number in text for number in numbers)
