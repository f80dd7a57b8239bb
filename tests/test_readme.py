"""The pages tell the truth: tables come from the committed results, pictures too, and nothing is
left to fill in."""

import re

import pandas as pd
import pytest

from tools import notebooks, published

PAGE = published.PAGE.read_text(encoding="utf-8")


def test_tables_come_from_the_committed_results():
    assert published.fill(PAGE, published.blocks()) == PAGE, "run: python -m tools tables"


def test_committed_results_are_real_and_complete():
    results = pd.read_csv(published.REPOSITORY / "results" / "01_pneumonia.csv")
    assert not results.data.str.contains("SYNTHETIC").any()
    clean = results[results.attack.eq("clean") & results.metric.eq("accuracy")]
    assert (clean.n == 624).all(), "the official test split has 624 images"
    assert results[results.metric.eq("accuracy")][["ci_low", "ci_high"]].notna().all(axis=None)
    assert not results.duplicated(["model", "attack", "eps", "eps_unit", "metric"]).any()


def test_committed_detection_results_say_what_is_synthetic():
    results = pd.read_csv(published.REPOSITORY / "results" / "05_detection.csv")
    planted = results.model.eq("planted findings, 5 folds")
    assert (results.data.str.contains("SYNTHETIC") == planted).all() and (
        results[~planted].n == 61
    ).all()
    assert not results.duplicated(["model", "metric"]).any()


def test_committed_fracture_results_are_real_paired_and_complete():
    results = pd.read_csv(published.REPOSITORY / "results" / "02_fracatlas.csv")
    assert set(results.data) == {"fracatlas"} and set(results.profile) == {"cpu"}
    assert not results.duplicated(["model", "attack", "eps", "metric"]).any()
    for attack in ("clean", "worst"):
        assert (results[results.attack.eq(attack) & results.metric.eq("accuracy")].n == 222).all()
    worst = results[results.attack.eq("worst") & results.metric.eq("accuracy")].sort_values("eps")
    assert (
        worst.groupby("model")["value"].apply(lambda values: values.is_monotonic_decreasing).all()
    )
    maps = results[results.attack.str.startswith("map ")]
    assert (maps.n == 72).all() and maps.groupby("model")["attack"].nunique().eq(8).all()


def test_committed_covid_results_are_real_and_of_one_test_split():
    results = pd.read_csv(published.REPOSITORY / "results" / "06_covid.csv")
    assert set(results.data) == {"covid"} and set(results.profile) == {"cpu"}
    assert not results.duplicated(["notebook", "model", "attack", "metric"]).any()
    assert (results[results.metric.isin(["accuracy", "auc"])].n == 300).all()


PAGES = [*notebooks.REPOSITORY.glob("*.md"), *notebooks.REPOSITORY.glob("*/README.md")]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_nothing_is_left_to_fill_in(page):
    assert not re.search(r"\b(XX+|TODO|FIXME|TBD)\b|@@", page.read_text(encoding="utf-8"))


def test_pictures_are_made_from_the_results_and_lie_where_the_readme_looks():
    pictures = published.pictures()
    assert {f"docs/{name}.png" for name in pictures} == set(re.findall(r"docs/\w+\.png", PAGE))
    for name, figure in pictures.items():
        assert (published.REPOSITORY / "docs" / f"{name}.png").is_file() and figure.axes
