"""Several seeds: of 01 mean, spread and paired tests, of 02 the maps, from tables made by hand."""

import functools
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_report import EPS, FakeRun, FakeStudy, per_image

from dlia_utils import files, metrics, report
from dlia_utils.explain import localisation
from dlia_utils.explain.base import REFERENCES
from dlia_utils.study import made_by
from tools import notebooks


@dataclass
class SeedRun(FakeRun):
    seed_runs: tuple = ()
    adversarial: tuple = ("pgd_at", "mart", "late")
    trains: str = "3 Training"


class Study(FakeStudy):
    def rows(self, part):
        return np.arange(8)


@functools.cache
def cells(notebook, first, count):
    """The code of `count` cells from the one that holds `first`."""
    built = notebooks.build(notebooks.sources([notebook])[0])
    code = [cell.source for cell in built.cells if cell.cell_type == "code"]
    start = next(k for k, text in enumerate(code) if first in text)
    return "\n\n".join(code[start : start + count])


def written(run, fallen, **labels):
    """A run folder as sections 4 and 5 leave it; `fallen`: images fooled in the worst case."""
    (run.run_dir / "tables").mkdir(parents=True)
    (run.run_dir / "config.json").write_text(json.dumps({"settings": {"seed": run.seed}}))
    rows = []
    for name, count in fallen.items():
        table = per_image([0] * 8, [1] * count + [0] * (8 - count)).assign(label=[0, 1] * 8)
        table.to_csv(run.run_dir / "tables" / f"robust_{name}.csv", index=False)
        checks = pd.DataFrame({"check": ["a"], "verdict": "PASS", "value": "", "why": ""})
        checks.to_csv(run.run_dir / "tables" / f"checks_{name}.csv", index=False)
        rows.append(report.accuracy_rows(table, Study(run), model=name))
        rows.append(report.direction_rows(table, Study(run), model=name, eps=EPS))
    pd.concat(rows).assign(**labels).to_csv(run.run_dir / "results.csv", index=False)
    return run


def section(run):
    shown = []
    given = dict(run=run, pd=pd, np=np, files=files, report=report, metrics=metrics)
    given |= {"open_study": lambda run: Study(run), "made_by": made_by, "display": shown.append}
    given["MODELS"] = ["baseline", *run.adversarial]
    exec(cells("01", "def of_seeds(", 3), given)
    return given["table"], given["among"]


@pytest.fixture
def runs(tmp_path):
    """Of seed 0 with a model more; seeds 1 and 2."""
    first = SeedRun(tmp_path / "all", seed_runs=("s1", "s2", "more"))
    fallen = {"baseline": 8, "pgd_at": 2, "mart": 5}
    written(first, fallen | {"late": 1})
    for seed, fewer in ((1, 0), (2, 1)):
        own = {name: count - fewer for name, count in fallen.items()}
        written(replace(first, run_dir=tmp_path / f"s{seed}", seed=seed), own)
    written(replace(first, run_dir=tmp_path / "more"), fallen)  # seed 0 once more counts once
    return first


def test_mean_and_spread_over_the_seeds(runs):
    table, _ = section(runs)
    worst = table["worst accuracy"]
    assert worst["pgd_at"] == "0.792 ± 0.072 (0.750 to 0.875)" and worst["late"] == "0.875"
    assert table["seeds"].to_dict() == {"baseline": 3, "pgd_at": 3, "mart": 3, "late": 1}
    together = pd.read_csv(runs.run_dir / "all_results.csv")
    assert not together.duplicated(report.IDENTITY).any() and set(together.seed) == {0, 1, 2}
    checks = pd.read_csv(runs.run_dir / "all_checks.csv")
    assert len(checks) == 10 and list(checks)[:2] == ["model", "seed"]


def test_defences_are_paired_over_the_seeds_that_both_have(runs):
    _, among = section(runs)
    worst = among[among.condition.str.startswith("worst")].set_index("model")
    assert worst["seeds"].to_dict() == {"mart": 3, "late": 1} and set(worst.n) == {8}
    assert set(worst.reference_model) == {"pgd_at"} and set(worst["size"]) == {48}
    assert worst.loc["mart", "difference"] == pytest.approx(-3 / 8)
    assert worst.loc["late", "difference"] == pytest.approx(1 / 8)
    # Four images (patients) are lost, two of them under every seed: 2 of 2^4 patterns of signs.
    assert worst.loc["mart", "p"] == pytest.approx(1 / 8) and worst.loc["mart", "p_holm"] == 0.25
    assert worst.loc["mart", "only_reference_right"] == 9
    alone = section(replace(runs, seed_runs=()))
    assert alone[0]["seeds"].eq(1).all() and set(alone[1]["seeds"]) == {1}
    section(replace(runs, seed_runs=(), adversarial=()))


@pytest.mark.parametrize("other", [{"size": 64}, {"profile": "full"}])
def test_runs_of_another_study_are_refused(runs, tmp_path, other):
    written(replace(runs, run_dir=tmp_path / "odd", seed=5), {"pgd_at": 1}, **other)
    with pytest.raises(ValueError, match="the same size, profile and data"):
        section(replace(runs, seed_runs=("odd",)))


def test_a_run_of_another_test_split_is_refused(runs, tmp_path):
    path = tmp_path / "s1" / "tables" / "robust_mart.csv"
    table = pd.read_csv(path)
    table[table.image > 0].to_csv(path, index=False)
    with pytest.raises(ValueError, match="another test split"):
        section(runs)


def maps_by_seed(found):
    """Section 7 of notebook 02: what it shows of the scores `found` of (model, seed), image by
    image, and the rows that it writes."""
    seeds, shown, rows = list(dict.fromkeys(seed for _, seed in found)), [], []

    def kept_maps(name, seed):
        scores = dict.fromkeys(localisation.SCORES, found[name, seed])
        about = {"region": "box", "zero": False, "image": range(4), "group": range(4)}
        return pd.concat(
            [pd.DataFrame({"map": m} | about | scores) for m in ("saliency", *REFERENCES)]
        )

    told = dict(
        with_interval=report.with_interval, show=lambda table, notes: shown.append((table, notes))
    )
    told["update_results"] = lambda new, path: rows.append(new)
    given = dict(pd=pd, localisation=localisation, REFERENCES=REFERENCES, kept_maps=kept_maps)
    given |= {"run": SimpleNamespace(seed=seeds[0], more_seeds=seeds[1:], bootstrap_draws=50)}
    given |= {"report": SimpleNamespace(**told), "open_study": lambda run: "the study"}
    given |= {"test_opened": lambda *_: None, "study_of": lambda name, seed: seed, "RESULTS": ""}
    given |= {"per_map": {name: kept_maps(name, seeds[0]) for name in ("standard", "pgd_at")}}
    given |= {"draws": 50}
    given["map_rows"] = lambda table, study, name: table.assign(model=name, seed=study)
    given |= {"blind_rows": given["map_rows"], "study": "the study"}
    exec(cells("02", "pairs = {name: {run.seed", 5), given)
    return shown[0], pd.concat(rows) if rows else pd.DataFrame()


def test_maps_of_seeds_are_paired_image_by_image():
    found = {("standard", 0): [0.0, 0.2, 0.4, 0.6], ("standard", 1): [0.2] * 4}
    found |= {("pgd_at", 0): [0.5] * 4, ("pgd_at", 1): [0.3] * 4}
    (table, notes), rows = maps_by_seed(found)
    assert table.index.tolist() == ["saliency"] and notes == "Coverage gain, seeds 0 1."
    assert table.loc["saliency", ["plain", "PGD-AT"]].tolist() == ["0.250 ± 0.071", "0.400 ± 0.141"]
    # Image by image 0.3, 0.2, 0.1, 0 over both seeds: four pieces of evidence, not eight.
    pooled = rows[rows.model.eq("pgd_at, seeds 0 1") & rows.score.eq("pointing")]
    blind = pooled.pop("reference").notna()
    assert pooled[blind][["value", "n"]].to_numpy().tolist() == [[0, 4]] * 3, "they score the same"
    pooled = pooled[~blind]
    assert pooled[["value", "n"]].to_numpy().tolist() == [[pytest.approx(0.15), 4]]
    assert set(rows[rows.model.eq("pgd_at")].seed) == {1}  # the run's own seed has its rows
    (table, notes), rows = maps_by_seed({key: one for key, one in found.items() if not key[1]})
    assert table.loc["saliency", "plain"] == "0.300" and notes == "Coverage gain, seed 0."
    assert rows.empty
