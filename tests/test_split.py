import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dlia_utils.data import datasets, sources, split


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
                (
                    f"{official}/{label}/p{patient}-{film}.jpeg",
                    label,
                    f"person-{patient}",
                    group,
                    official,
                )
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
    source, copies = (
        dataset.root / paths.iloc[0],
        [dataset.root / paths.iloc[i] for i in range(30, 300, 30)],
    )
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
    numbers = audit.loc[
        ["patients in train and test, by number", "patients in val and test, by number"]
    ]
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


def with_boxes(dataset):
    """The same data set with one box in every image, whose x1 is the image's number."""
    count = len(dataset.manifest)
    rows = {
        "image": range(count),
        "x1": np.arange(count) * 1.0,
        "y1": 0.0,
        "x2": 1e6,
        "y2": 1.0,
        "label": 1,
    }
    boxes = pd.DataFrame({**rows, "class_name": "finding"})
    return replace(dataset, boxes=boxes, box_classes=("finding",))


def test_subset_takes_the_boxes_along(dataset):
    full = with_boxes(dataset)
    small = split.subset(full, per_class=5)
    for row in small.boxes.itertuples():
        assert full.manifest["path"][int(row.x1)] == small.manifest["path"][row.image]
    assert len(small.boxes) == len(small.manifest)


def test_subset_keeps_unlabelled_images(dataset):
    manifest = dataset.manifest.copy()
    manifest.loc[manifest["split"] == "test", "label"] = -1
    small = split.subset(replace(dataset, manifest=manifest), per_class=6)
    assert small.manifest["label"].value_counts()[-1] == 6


@pytest.mark.parametrize("n", [2, 5])
def test_folds(dataset, n):
    manifest = dataset.manifest.copy()
    manifest.loc[manifest.index[10:20], "label"] = -1
    dealt = split.folds(replace(dataset, manifest=manifest), n=n, seed=1)
    fold = dealt.manifest["fold"]
    out = (manifest["split"] == "test") | (manifest["label"] < 0)
    assert fold.dtype == "int64" and (fold[out] == -1).all() and set(fold[~out]) == set(range(n))
    used = dealt.manifest[~out]
    assert used.groupby("patient")["fold"].nunique().max() == 1
    share = used.groupby("fold")["label"].mean()
    assert (
        share.max() - share.min() < 0.05
        and used["fold"].value_counts(normalize=True).max() < 1.2 / n
    )
    assert "fold" not in dataset.manifest and f"{n} folds by patient" in dealt.split_rule


def test_folds_keep_identical_files_together(dataset):
    paths = dataset.manifest.loc[dataset.manifest["split"] == "train", "path"]
    for row in range(30, 300, 30):
        shutil.copyfile(dataset.root / paths.iloc[0], dataset.root / paths.iloc[row])
    copies = paths.iloc[[0, *range(30, 300, 30)]].index
    assert split.folds(dataset).manifest.loc[copies, "fold"].nunique() == 1


def test_folds_errors_and_rare_classes(tmp_path, caplog):
    rows = [(f"train/{i}.jpeg", int(i < 2), f"p{i}", "g", "train") for i in range(12)]
    few = make(tmp_path, rows)
    with pytest.raises(ValueError, match="n is 1"):
        split.folds(few, n=1)
    with pytest.raises(datasets.BadData, match="no class has 11 patients"):
        split.folds(few, n=11)
    assert split.folds(few, n=3).manifest["fold"].value_counts().max() <= 5
    assert "patients of PNEUMONIA 2 for 3 folds" in caplog.text


def test_folds_are_saved_and_hashed(dataset, tmp_path):
    plain, dealt = split.split_hash(dataset), split.folds(dataset, seed=2)
    assert split.save(dealt, tmp_path / "split.json") == split.split_hash(dealt) != plain
    pd.testing.assert_frame_equal(
        split.load(dataset, tmp_path / "split.json").manifest, dealt.manifest
    )
    split.save(dataset, tmp_path / "plain.json")
    assert "fold" not in split.load(dealt, tmp_path / "plain.json").manifest
    saved = json.loads((tmp_path / "split.json").read_text())
    saved["fold"][dataset.manifest["path"][0]] += 1
    (tmp_path / "split.json").write_text(json.dumps(saved))
    with pytest.raises(datasets.BadData, match="changed after it was written"):
        split.load(dataset, tmp_path / "split.json")


def test_hash_without_folds_is_the_one_of_earlier_runs(tmp_path):
    small = make(tmp_path, [("a.jpeg", 0, "p0", "g", "train"), ("b.jpeg", 1, "p1", "g", "test")])
    assert split.split_hash(small) == "8a79045f73208b31"


def test_audit_of_one_group_and_of_unlabelled_images(tmp_path):
    rows = [("train/a.png", 1, "p0", "", "train"), ("test/a.png", -1, "p0", "", "test")]
    pair = make(tmp_path, rows)
    shutil.copyfile(tmp_path / "train" / "a.png", tmp_path / "test" / "a.png")
    audit = split.audit(pair).set_index("check")
    assert audit.loc["patients in train and test, by number", "verdict"] == "warning"
    assert not any("kind" in check for check in audit.index)
    assert audit.loc["identical files in train and test", "verdict"] == "leak"
    assert audit.loc["identical files with different labels", "verdict"] == "ok"


def test_real_set(real_data):
    dataset = split.grouped(datasets.load(sources.find("pneumonia", real_data)))
    audit = split.audit(dataset).set_index("check")
    assert "leak" not in set(audit["verdict"])
    counts = audit["count"]
    assert (
        counts["patients in train and test, by number"]
        + counts["patients in val and test, by number"]
        == 170
    )
    assert counts["identical files with different labels"] == 0


# --------------------------------------------------------------------------- train, val and test drawn anew, and looks


@pytest.mark.parametrize(("val_share", "test_share"), [(0.1, 0.1), (0.15, 0.2)])
def test_drawn_deals_whole_patients_in_proportion(dataset, val_share, test_share):
    divided = split.drawn(dataset, val_share=val_share, test_share=test_share, seed=3)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not overlap(divided, one, other)
    shares = divided.manifest["split"].value_counts(normalize=True)
    assert abs(shares["val"] - val_share) < 0.03 and abs(shares["test"] - test_share) < 0.03
    sick = divided.manifest.groupby("split")["label"].mean()
    assert np.ptp(sick) < 0.08
    assert "drawn by patient" in divided.split_rule


def test_drawn_depends_on_the_seed_alone(dataset):
    one, again, other = (split.split_hash(split.drawn(dataset, seed=seed)) for seed in (0, 0, 1))
    assert one == again != other


def test_drawn_refuses_shares_and_classes_it_cannot_serve(dataset, tmp_path):
    for shares in ({"val_share": 0.0}, {"test_share": -0.1}, {"val_share": 0.3, "test_share": 0.3}):
        with pytest.raises(ValueError, match="positive, together at most"):
            split.drawn(dataset, **shares)
    few = make(tmp_path / "few", [(f"{k}.png", int(k < 2), f"p{k}", "", "") for k in range(40)])
    with pytest.raises(datasets.BadData, match="fewer than 3 patients"):
        split.drawn(few)


def films(count, seed=0):
    """Unlike each other: smooth random fields."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (count, 8, 8)).astype(np.uint8)
    return np.stack(
        [
            np.asarray(Image.fromarray(one).resize((64, 64), Image.Resampling.BICUBIC))
            for one in coarse
        ]
    )


def test_looks_find_the_same_film_in_another_exposure_size_and_compression_and_nothing_else(
    tmp_path,
):
    first = films(30)
    Image.fromarray(first[1]).save(tmp_path / "again.jpeg", quality=30)
    darker = (first[0] * 0.7 + 10).astype(np.uint8)
    smaller = np.asarray(Image.fromarray(first[2]).resize((40, 40)).resize((64, 64)))
    found = split.looks(
        np.stack([*first, darker, np.asarray(Image.open(tmp_path / "again.jpeg")), smaller])
    )
    assert found[30] == found[0] and found[31] == found[1] and found[32] == found[2]
    assert len(np.unique(found)) == 30
    assert (
        split.looks(np.concatenate([films(700), films(700)]))[:700] == split.looks(films(700))
    ).all(), "across blocks"


def test_images_of_one_look_stay_on_one_side_and_the_audit_shows_it(dataset):
    looks = np.arange(len(dataset.manifest))
    train, test = (
        np.flatnonzero((dataset.manifest["split"] == name).to_numpy()) for name in ("train", "test")
    )
    looks[train[:30]] = looks[test[:30]]
    linked = replace(dataset, manifest=dataset.manifest.assign(look=looks))
    row = split.audit(linked).set_index("check").loc["near-duplicates in train and test"]
    assert row["count"] == 30 and row["verdict"] == "leak"
    healed = split.audit(split.drawn(linked, val_share=0.2, test_share=0.2)).set_index("check")
    assert (healed.filter(like="near-duplicates in", axis=0)["count"] == 0).all()
    other = np.arange(len(looks))
    other[test[:2]] = -1  # one look, labels 0 and 1
    mixed = split.audit(replace(dataset, manifest=dataset.manifest.assign(look=other))).set_index(
        "check"
    )
    assert mixed.loc["near-duplicates with different labels", ["count", "verdict"]].tolist() == [
        2,
        "warning",
    ]


def test_looks_need_an_image_for_every_row(dataset):
    with pytest.raises(ValueError, match="3 images for"):
        split.with_looks(dataset, films(3))


def test_subset_takes_a_number_for_each_class(dataset):
    part = split.subset(dataset, per_class=(5, 9), splits=["train"])
    assert part.manifest["label"].value_counts().to_dict() == {1: 9, 0: 5}
    with pytest.raises(ValueError, match="one for each class"):
        split.subset(dataset, per_class=(5, 9, 1))
