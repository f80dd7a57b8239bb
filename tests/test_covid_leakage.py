"""Notebook 06 learns nothing from images that it must not read: its own cells, on corrupted data.

Everything up to the final test runs three times: as it is; with the pixels and labels of all TEST
images corrupted; and with those of the validation images, to show that the comparison sees a leak.
"""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from small import start_run

from dlia_utils import execute, plots, report, study
from dlia_utils.data import cache, datasets, explore, phantom, sources, split
from dlia_utils.run import digest
from tools import notebooks

NOTEBOOK = "06_covid_baseline"
TINY = dict(size=24, per_class=32, blocks=2, width=4, hidden=8, epochs=2, patience=1)
TINY |= dict(quick_epochs=1, trials=2, extend=0, search_epochs=2, bootstrap_draws=20)
TINY |= dict(search_batch=((), (16, 32), ()), search_width=((), (4, 6), ()))
LEARNT = ("2", "3", "4", "5", "6", "7")  # the sections between looking at the data and the test


@pytest.fixture(scope="module")
def cells():
    """The notebook's code: what stands before the sections, and each section by its number."""
    (path,) = execute.pick(["06"])
    opening, sections = notebooks.sections(notebooks.read(path))
    return opening[2:], {title.split(" ")[0]: code for title, code in sections.items()}


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLIA_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.delenv("DLIA_DATA", raising=False)
        patch.setattr(report, "save_figure", lambda *_, **__: None)  # drawing learns nothing
        for name in ("figure_curves", "figure_search"):
            patch.setattr(plots, name, lambda *_, **__: None)
        yield patch


def corrupt(opened, part):
    """The study with random pixels and turned labels in a split."""
    rows, rng = opened.rows(part), np.random.default_rng(7)
    images, manifest = np.array(opened.cache.images), opened.dataset.manifest.copy()
    images[rows] = rng.integers(0, 256, images[rows].shape, dtype=np.uint8)
    manifest.loc[rows, "label"] = 1 - manifest.loc[rows, "label"]
    dataset = replace(opened.dataset, manifest=manifest)
    return replace(opened, dataset=dataset, cache=replace(opened.cache, images=images))


def opened_names(opening, name, *, resume):
    """The notebook's names after its opening cells."""
    names = {"PROFILE": "smoke", "DATA_DIR": "", "RUN_NAME": name, "CHANGES": TINY}
    names |= {"RESUME": resume, "__name__": "cells"}
    for code in opening:
        exec(code, names)
    names["display"] = lambda *_: None
    return names


def run(cells, part, *, wanted=LEARNT):
    """Run the notebook's sections with the images of `part` corrupted (None: as they are)."""
    opening, sections = cells
    names = opened_names(opening, f"corrupted-{part}", resume=False)  # begun afresh
    started = names["run"]
    opened = study.open_study(started)
    if part:
        opened = corrupt(opened, part)
        started.opened[started.key] = opened
    for number in wanted:
        for code in sections[number]:
            exec(code, names)
    return SimpleNamespace(study=opened, folder=started.run_dir)


def runs_of(done):
    return pd.read_csv(done.folder / "search" / "runs.csv").drop(columns="seconds")


def weights_of(done, name="baseline"):
    return torch.load(done.folder / name / "best.pt", weights_only=True)["state_dict"]


def same_weights(one, other):
    return all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.fixture(scope="module")
def done(cells, patched):
    parts = {None: LEARNT, "test": LEARNT, "val": LEARNT[2:]}
    return {part: run(cells, part, wanted=wanted) for part, wanted in parts.items()}


def test_nothing_before_the_test_changes_when_all_test_images_are_corrupted(done):
    clean, corrupted = done[None], done["test"]
    rows = clean.study.rows("test")
    assert np.array_equal(rows, corrupted.study.rows("test")) and len(rows) >= 8
    assert not np.array_equal(clean.study.cache.images[rows], corrupted.study.cache.images[rows])
    pd.testing.assert_frame_equal(runs_of(clean), runs_of(corrupted), check_exact=True)
    for name in ("quick", "recipes", "ranges"):
        tables = [pd.read_csv(one.folder / "tables" / f"{name}.csv") for one in (clean, corrupted)]
        tables = [table.drop(columns="seconds", errors="ignore") for table in tables]
        pd.testing.assert_frame_equal(*tables, check_exact=True)
    choices = [json.loads((one.folder / "choice.json").read_text()) for one in (clean, corrupted)]
    assert choices[0] == choices[1] and choices[0]["epochs"] >= 1
    for name in ("initial", "unaugmented", "adam", "sgd", "smoothed", "baseline"):
        assert same_weights(weights_of(clean, name), weights_of(corrupted, name)), name


def test_the_comparison_would_see_a_leak(done):
    """Validation images are read by choices and train the final model: both change with them."""
    clean, corrupted = done[None], done["val"]
    assert not runs_of(clean)["score"].equals(runs_of(corrupted)["score"])
    assert not same_weights(weights_of(clean), weights_of(corrupted))


def test_statistics_and_class_weights_read_training_images_only(done):
    clean = done[None]
    mean, spread = explore.mean_and_spread(clean.study.cache, clean.study.rows("train"))
    for part in ("test", "val"):
        corrupted = done[part]
        assert corrupted.study.class_weights() == clean.study.class_weights()
        for key in ("mean", "std"):  # of the final model, which trains on validation images too
            assert torch.equal(weights_of(clean)[key], weights_of(corrupted)[key])
    assert weights_of(clean)["mean"].flatten()[0].item() == pytest.approx(mean.mean(), abs=1e-6)
    std = np.sqrt((spread**2 + mean**2).mean() - mean.mean() ** 2)
    assert weights_of(clean)["std"].flatten()[0].item() == pytest.approx(std, abs=1e-6)


def test_validation_images_do_not_train_before_the_final_model(done):
    """Every EPOCH of a training is the same; only which epoch is kept may differ."""
    for name in ("initial", "unaugmented"):
        tables = [pd.read_csv(done[part].folder / name / "metrics.csv") for part in (None, "val")]
        tables = [table[["epoch", "train_loss", "train_accuracy"]] for table in tables]
        pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_the_test_is_opened_after_all_choices_and_once(done, cells, patched):
    clean = done[None]
    assert not (clean.folder / "test_log.csv").exists(), "a section before the test opened it"
    names = opened_names(cells[0], "corrupted-None", resume=True)
    for _ in range(2):  # the second time its predictions are read back
        for code in cells[1]["8"]:
            exec(code, names)
    opened = pd.read_csv(clean.folder / "test_log.csv")["purpose"]
    assert opened.tolist() == ["final test of baseline"]
    told = pd.read_csv(clean.folder / "predictions.csv")
    paths = clean.study.dataset.manifest["path"]
    assert told["path"].tolist() == paths[clean.study.rows("test")].tolist()
    (clean.folder / "tables" / "test_baseline.csv").unlink()
    with pytest.raises(study.AlreadyOpened):
        study.predictions(clean.study, "baseline")


@pytest.mark.parametrize("seed", [0, 1])
def test_images_that_occur_twice_never_lie_in_two_splits(tmp_path, patched, seed):
    tree = phantom.write_covid(tmp_path, seed=seed, images=(45, 45), size=64)
    changes = TINY | {"per_class": None}
    opened = study.open_study(start_run(NOTEBOOK, tree, f"twins-{seed}", **changes))
    truth = pd.read_csv(tmp_path / "phantom_truth.csv", keep_default_na=False)
    part_of = opened.dataset.manifest.set_index("path")["split"]
    twins = truth[truth["twin_of"] != ""]
    assert len(twins) >= 4
    assert (part_of[twins["path"]].to_numpy() == part_of[twins["twin_of"]].to_numpy()).all()
    audit = split.audit(opened.dataset)
    assert not (audit["verdict"] == "leak").any()
    assert set(part_of) == {"train", "val", "test"}


def test_a_split_that_ignores_twins_is_caught_by_the_audit(tmp_path):
    tree = phantom.write_covid(tmp_path, images=(60, 60), size=64)
    dataset = datasets.load(sources.find("covid", tree))
    torn = split.drawn(dataset, val_share=0.15, test_share=0.15)  # every image for itself
    images = cache.build(dataset, size=24, root=os.environ["DLIA_CACHE"], progress=False).images
    audit = split.audit(split.with_looks(torn, images)).set_index("check")
    assert audit.filter(like="near-duplicates in", axis=0)["count"].sum() > 0


def test_every_run_of_the_search_is_scored_on_validation_images(done):
    """The score is the best validation AUC of a training of its own; no weights are left behind."""
    runs, folder = runs_of(done[None]), done[None].folder / "search"
    assert len(runs) == TINY["trials"] and len(list(folder.glob("run_*"))) == len(runs)
    for _, row in runs.iterrows():
        params = {name: row[name] for name in ("lr", "dropout")}
        params |= {name: int(row[name]) for name in ("batch_size", "width")}
        history = pd.read_csv(folder / f"run_{digest(params)}" / "metrics.csv")
        assert row["score"] == pytest.approx(history["val_auc"].max(), abs=1e-12)
    assert not list(folder.glob("run_*/*.pt"))
