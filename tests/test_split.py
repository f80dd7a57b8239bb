import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dlia_utils import datasets, locate, split


def make(root, rows):
    """A data set of small distinct files: rows of (path, label, patient, group, split)."""
    manifest = pd.DataFrame(rows, columns=["path", "label", "patient", "group", "split"])
    manifest["class_name"] = manifest["label"].map({0: "NORMAL", 1: "PNEUMONIA"})
    for row, path in enumerate(manifest["path"]):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{row:06d}")
    ignored = pd.DataFrame(columns=["path", "reason"])
    return datasets.Dataset(
        "pneumonia",
        root,
        manifest[list(datasets.COLUMNS)],
        ("NORMAL", "PNEUMONIA"),
        ignored,
        True,
        "argument",
    )


@pytest.fixture
def dataset(tmp_path):
    """300 patients of 1 to 4 films, both classes, an official val, and test numbers that train has too."""
    rng, rows = np.random.default_rng(0), []
    for patient in range(300):
        label = int(patient % 3 > 0)
        group = ("bacteria" if patient % 2 else "virus") if label else "normal"
        for film in range(rng.integers(1, 5)):
            official = "val" if patient < 6 else "train"
            rows.append(
                (f"{official}/{label}/p{patient}-{film}.jpeg", label, f"person-{patient}", group, official)
            )
    for patient in range(40):
        label = int(patient % 2)
        who = f"person-{patient}" if patient < 6 else f"test-{patient}"
        rows.append((f"test/{label}/{patient}.jpeg", label, who, "other", "test"))
    return make(tmp_path, rows)


def overlap(dataset, one, other):
    patients = dataset.manifest.groupby("split")["patient"].agg(set)
    return patients[one] & patients[other]


@pytest.mark.parametrize("val_share", [0.05, 0.15, 0.5])
def test_grouped(dataset, val_share):
    divided = split.grouped(dataset, val_share=val_share, seed=1)
    before, after = dataset.manifest, divided.manifest
    assert not overlap(divided, "train", "val")
    assert ((before["split"] == "test") == (after["split"] == "test")).all()
    pool = after[after["split"] != "test"]
    for _, part in pool.groupby("class_name"):
        assert (part["split"] == "val").mean() == pytest.approx(val_share, abs=1 / split.FOLDS)
    assert before["split"].eq("val").sum() > 0 and before["path"].equals(after["path"])


def test_grouped_is_reproducible_and_seeded(dataset):
    hashes = [split.split_hash(split.grouped(dataset, seed=seed)) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_identical_files_stay_together(dataset):
    paths = dataset.manifest.loc[dataset.manifest["split"] == "train", "path"]
    source, copies = dataset.root / paths.iloc[0], [dataset.root / paths.iloc[i] for i in range(30, 300, 30)]
    for copy in copies:
        shutil.copyfile(source, copy)
    for seed in range(3):
        audit = split.audit(split.grouped(dataset, seed=seed)).set_index("check")
        assert audit.loc["identical files in train and val", "count"] == 0
        within = audit.loc[["identical files within train", "identical files within val"], "count"]
        assert within.sum() == len(copies)


@pytest.mark.parametrize("share", [0, -0.1, 0.6])
def test_bad_share(dataset, share):
    with pytest.raises(ValueError, match="val_share"):
        split.grouped(dataset, val_share=share)


def test_one_patient_cannot_be_divided(tmp_path):
    rows = [(f"train/{i}.jpeg", i % 2, f"p{i % 2}", "g", "train") for i in range(8)]
    with pytest.raises(datasets.BadData, match="fewer than 2 patients"):
        split.grouped(make(tmp_path, rows))


def test_save_and_load(dataset, tmp_path):
    divided = split.grouped(dataset, seed=3)
    file = tmp_path / "run" / "split.json"
    assert split.save(divided, file) == split.split_hash(divided)
    again = split.load(dataset, file)
    pd.testing.assert_frame_equal(again.manifest, divided.manifest)
    assert again.split_rule == divided.split_rule and "seed 3" in again.split_rule


def test_load_refuses_another_or_edited_split(dataset, tmp_path):
    file = tmp_path / "split.json"
    split.save(split.grouped(dataset), file)
    fewer = replace(dataset, manifest=dataset.manifest.iloc[1:].reset_index(drop=True))
    with pytest.raises(datasets.BadData, match="other images: 0 here are not in it, 1 in it"):
        split.load(fewer, file)
    saved = json.loads(file.read_text())
    path = next(path for path, name in saved["split"].items() if name == "val")
    saved["split"][path] = "train"
    file.write_text(json.dumps(saved))
    with pytest.raises(datasets.BadData, match="changed after it was written"):
        split.load(dataset, file)


def test_audit_verdicts(dataset):
    audit = split.audit(split.grouped(dataset)).set_index("check")
    assert list(audit.columns) == ["count", "verdict", "detail"]
    assert audit.loc["patients in train and val, by number", "verdict"] == "ok"
    numbers = audit.loc[["patients in train and test, by number", "patients in val and test, by number"]]
    assert numbers["count"].sum() == 6 and "warning" in set(numbers["verdict"])
    assert audit.loc["patients in train and test, by number and kind", "verdict"] == "ok"
    assert set(audit["verdict"]) <= {"ok", "warning", "leak"}


def test_audit_finds_copies_and_conflicts(dataset):
    manifest, root = dataset.manifest, dataset.root
    sick = manifest.query("split == 'train' and label == 1")["path"].iloc[0]
    well = manifest.query("split == 'test' and label == 0")["path"].iloc[0]
    shutil.copyfile(root / sick, root / well)
    audit = split.audit(dataset).set_index("check")
    assert audit.loc["identical files in train and test"].to_list() == [1, "leak", sick]
    assert audit.loc["identical files with different labels", "count"] == 2
    assert audit.loc["identical files with different labels", "verdict"] == "leak"


def test_subset(dataset):
    divided = split.grouped(dataset)
    small = split.subset(divided, per_class=7, seed=2)
    counts = small.manifest.groupby(["split", "label"]).size()
    assert len(counts) == 6 and (counts == 7).all()
    assert list(small.manifest.index) == list(range(42)) and not overlap(small, "train", "val")
    truth = divided.manifest.set_index("path")["split"]
    assert (small.manifest["split"].to_numpy() == truth[small.manifest["path"]].to_numpy()).all()
    only_test = split.subset(divided, per_class=7, splits=("test",), seed=2)
    assert set(only_test.manifest["path"]) == set(small.manifest.query("split == 'test'")["path"])
    assert len(split.subset(divided, per_class=10**6).manifest) == len(divided.manifest)
    with pytest.raises(ValueError, match="per_class"):
        split.subset(divided, per_class=0)


def test_real_set(real_data):
    dataset = split.grouped(datasets.load(locate.find("pneumonia", real_data)))
    audit = split.audit(dataset).set_index("check")
    assert "leak" not in set(audit["verdict"])
    counts = audit["count"]
    assert (
        counts["patients in train and test, by number"] + counts["patients in val and test, by number"] == 170
    )
    assert counts["identical files with different labels"] == 0
