import json
import shutil
import tracemalloc
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dlia_utils.data import datasets, sources, split
from dlia_utils.data.tables import COLUMNS, BadData


def make(root, rows):
    """A data set of small distinct files: rows of (path, label, patient, group, split)."""
    manifest = pd.DataFrame(rows, columns=["path", "label", "patient", "group", "split"])
    names = ("NORMAL", "PNEUMONIA")
    manifest["class_name"] = manifest["label"].map(dict(enumerate(names)))
    for row, path in enumerate(manifest["path"]):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{row:06d}")
    ignored = pd.DataFrame(columns=["path", "reason"])
    about = (names, ignored, True, "argument")
    return datasets.Dataset("pneumonia", root, manifest[list(COLUMNS)], *about)


@pytest.fixture
def dataset(tmp_path):
    """300 patients of 1 to 4 images, an official val, and test numbers that train has too."""
    rng, rows = np.random.default_rng(0), []
    for k in range(300):
        label, part = int(k % 3 > 0), "val" if k < 6 else "train"
        group = ("bacteria" if k % 2 else "virus") if label else "normal"
        for number in range(rng.integers(1, 5)):
            rows.append((f"{part}/{label}/p{k}-{number}.jpeg", label, f"person-{k}", group, part))
    for k in range(40):
        who = f"person-{k}" if k < 6 else f"test-{k}"
        rows.append((f"test/{k % 2}/{k}.jpeg", k % 2, who, "other", "test"))
    return make(tmp_path, rows)


def need_no_overlap(dataset, *names):
    patients = dataset.manifest.groupby("split")["patient"].agg(set)
    assert not any(patients[one] & patients[other] for one, other in combinations(names, 2))


@pytest.mark.parametrize("val_share, seed", [(0.05, 1), (0.5, 1), *((0.15, k) for k in range(5))])
def test_grouped(dataset, val_share, seed):
    divided = split.grouped(dataset, val_share=val_share, seed=seed)
    before, after = dataset.manifest, divided.manifest
    need_no_overlap(divided, "train", "val")
    assert ((before["split"] == "test") == (after["split"] == "test")).all()
    for _, part in after[after["split"] != "test"].groupby("class_name"):
        assert (part["split"] == "val").mean() == pytest.approx(val_share, abs=0.012)
    assert "official test" in divided.split_rule and before["path"].equals(after["path"])


@pytest.mark.parametrize(("val_share", "test_share"), [(0.1, 0.1), (0.15, 0.2)])
def test_drawn_deals_whole_patients_in_proportion(dataset, val_share, test_share):
    divided = split.drawn(dataset, val_share=val_share, test_share=test_share, seed=3)
    need_no_overlap(divided, "train", "val", "test")
    shares = divided.manifest["split"].value_counts(normalize=True)
    assert abs(shares["val"] - val_share) < 0.03 and abs(shares["test"] - test_share) < 0.03
    assert np.ptp(divided.manifest.groupby("split")["label"].mean()) < 0.08


@pytest.mark.parametrize("n", [2, 5])
def test_folds(dataset, n):
    manifest = dataset.manifest.copy()
    manifest.loc[manifest.index[10:20], "label"] = -1
    dealt = split.folds(replace(dataset, manifest=manifest), n=n, seed=1)
    fold = dealt.manifest["fold"]
    out = (manifest["split"] == "test") | (manifest["label"] < 0)
    assert (fold[out] == -1).all() and set(fold[~out]) == set(range(n))
    used = dealt.manifest[~out]
    assert used.groupby("patient")["fold"].nunique().max() == 1
    assert np.ptp(used.groupby("fold")["label"].mean()) < 0.05
    assert used["fold"].value_counts(normalize=True).max() < 1.2 / n
    assert "fold" not in dataset.manifest and f"{n} folds by patient" in dealt.split_rule


@pytest.mark.parametrize("draw", [split.grouped, split.drawn, split.folds])
def test_a_split_depends_on_the_seed_alone_and_keeps_copies_together(dataset, draw):
    one, again, other = (split.split_hash(draw(dataset, seed=seed)) for seed in (0, 0, 1))
    assert one == again != other
    paths = dataset.manifest.loc[dataset.manifest["split"] == "train", "path"]
    copies = paths.iloc[range(0, 300, 30)]
    for copy in copies[1:]:
        shutil.copyfile(dataset.root / copies.iloc[0], dataset.root / copy)
    for seed in range(3):
        manifest = draw(dataset, seed=seed).manifest.loc[copies.index]
        assert manifest["fold" if "fold" in manifest else "split"].nunique() == 1


def test_what_cannot_be_divided_is_refused(dataset, tmp_path, caplog):
    few = make(tmp_path / "few", [(f"{k}", int(k < 2), f"p{k}", "g", "train") for k in range(12)])
    with pytest.raises(BadData, match="fewer than 3 patients"):
        split.drawn(few)
    with pytest.raises(BadData, match="no class has 11 patients"):
        split.folds(few, n=11)
    assert split.folds(few, n=3).manifest["fold"].value_counts().max() <= 5
    assert "patients of PNEUMONIA 2 for 3 folds" in caplog.text
    one = make(tmp_path / "one", [(f"{k}", k % 2, f"p{k % 2}", "g", "train") for k in range(8)])
    with pytest.raises(BadData, match="fewer than 2 patients"):
        split.grouped(one)


@settings(derandomize=True, database=None, deadline=None, max_examples=10)
@given(
    patients=st.lists(st.integers(2**53, 2**53 + 12), min_size=12, max_size=24),
    seed=st.integers(0, 9),
    draw=st.sampled_from([split.grouped, split.drawn, split.folds]),
)
def test_whoever_the_patients_are_none_stands_on_two_sides(patients, seed, draw, tmp_path_factory):
    patients = [*patients, *range(8), "a", "007", "7b"]
    rows = [(f"{k}.png", k % 2, who, "g", "train") for k, who in enumerate([*patients, *patients])]
    rows += [(f"{k}b.png", (k + 1) % 2, who, "g", "train") for k, who in enumerate(patients)]
    dataset = make(tmp_path_factory.mktemp("any"), rows)
    options = {"n": 3} if draw is split.folds else {}
    manifest = draw(dataset, seed=seed, **options).manifest
    side = "fold" if draw is split.folds else "split"
    assert manifest.groupby(manifest["patient"].map(repr))[side].nunique().max() == 1
    assert manifest[side].nunique() == (2 if draw is split.grouped else 3)


@pytest.mark.parametrize("lost", [None, np.nan, pd.NA, ""])
@pytest.mark.parametrize("door", [split.grouped, split.drawn, split.folds, split.audit])
def test_images_without_a_patient_are_refused_before_they_are_dealt(tmp_path, door, lost):
    rows = [(f"{k}.png", k % 2, f"p{k}", "g", "train") for k in range(12)]
    few = make(tmp_path, rows)
    few.manifest["patient"] = few.manifest["patient"].astype(object)
    few.manifest.loc[[3, 4], "patient"] = lost
    with pytest.raises(ValueError, match="column patient lacks the patient of 2 images"):
        door(few)


@pytest.mark.parametrize("draw", [split.grouped, split.folds])
def test_save_and_load(dataset, tmp_path, draw):
    divided, file = draw(dataset, seed=3), tmp_path / "run" / "split.json"
    assert split.save(divided, file) == split.split_hash(divided) != split.split_hash(dataset)
    again = split.load(dataset, file)
    pd.testing.assert_frame_equal(again.manifest, divided.manifest)
    assert again.split_rule == divided.split_rule and "seed 3" in again.split_rule
    fewer = replace(dataset, manifest=dataset.manifest.iloc[1:].reset_index(drop=True))
    with pytest.raises(BadData, match="other images: 1 differ"):
        split.load(fewer, file)
    saved = json.loads(file.read_text())
    path = next(path for path, name in saved["split"].items() if name != "test")
    saved["split"][path] = "test"
    file.write_text(json.dumps(saved))
    with pytest.raises(BadData, match="changed after it was written"):
        split.load(dataset, file)


@pytest.mark.parametrize("content", ["", "[]", '{"split": 3}', '{"split": {}, "rule": "a"}'])
def test_a_damaged_split_is_named_with_the_fix(dataset, tmp_path, content):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(ValueError, match="split.json is damaged.*delete it"):
        split.load(dataset, tmp_path / "split.json")


def test_hash_without_folds_is_the_one_of_earlier_runs(tmp_path):
    small = make(tmp_path, [("a.jpeg", 0, "p0", "g", "train"), ("b.jpeg", 1, "p1", "g", "test")])
    assert split.split_hash(small) == "8a79045f73208b31"


def test_audit_verdicts(dataset):
    manifest, root = dataset.manifest, dataset.root
    audit = split.audit(split.grouped(dataset)).set_index("check")
    assert list(audit.columns) == ["count", "verdict", "detail"]
    assert audit.loc["patients in train and val, by number", "verdict"] == "ok"
    numbers = audit.filter(regex="and test, by number$", axis=0)
    assert numbers["count"].sum() == 6 and "warning" in set(numbers["verdict"])
    assert audit.loc["patients in train and test, by number and kind", "verdict"] == "ok"
    sick = manifest.query("split == 'train' and label == 1")["path"].iloc[0]
    well = manifest.query("split == 'test' and label == 0")["path"].iloc[0]
    shutil.copyfile(root / sick, root / well)
    audit = split.audit(dataset).set_index("check")
    assert audit.loc["identical files in train and test"].to_list() == [1, "leak", sick]
    assert audit.loc["identical files with different labels"].to_list()[:2] == [2, "leak"]


def test_audit_of_one_group_and_of_unlabelled_images(tmp_path):
    rows = [("train/a.png", 1, "p0", "", "train"), ("test/a.png", -1, "p0", "", "test")]
    pair = make(tmp_path, rows)
    shutil.copyfile(tmp_path / "train" / "a.png", tmp_path / "test" / "a.png")
    verdicts = split.audit(pair).set_index("check")["verdict"]
    assert verdicts["patients in train and test, by number"] == "warning"
    assert not any("kind" in check for check in verdicts.index)
    assert verdicts["identical files in train and test"] == "leak"
    assert verdicts["identical files with different labels"] == "ok"


def test_subset(dataset):
    divided = split.grouped(dataset)
    boxes = pd.DataFrame({"image": divided.manifest.index, "x1": divided.manifest.index * 1.0})
    divided = replace(divided, boxes=boxes)
    small = split.subset(divided, per_class=7, seed=2)
    assert (small.manifest.groupby(["split", "label"]).size() == 7).all()
    assert list(small.manifest.index) == list(range(42))
    need_no_overlap(small, "train", "val")
    for row in small.boxes.itertuples():  # what is marked on an image goes with it
        assert divided.manifest["path"][int(row.x1)] == small.manifest["path"][row.image]
    assert len(split.subset(divided, per_class=10**6).manifest) == len(divided.manifest)
    each = split.subset(dataset, per_class=(5, 9)).manifest.query("split == 'train'")
    assert each["label"].value_counts().to_dict() == {0: 5, 1: 9}


# --- looks


def pictures(count, seed=0):
    """Unlike each other: smooth random fields."""
    coarse = np.random.default_rng(seed).integers(0, 255, (count, 8, 8)).astype(np.uint8)
    fields = [Image.fromarray(one).resize((64, 64), Image.Resampling.BICUBIC) for one in coarse]
    return np.stack([np.asarray(one) for one in fields])


def looks(tmp_path, images):
    rows = [(f"{k}.png", 0, f"p{k}", "", "") for k in range(len(images))]
    return split.with_looks(make(tmp_path, rows), images).manifest["look"].to_numpy()


def test_looks_find_another_exposure_size_and_compression_and_nothing_else(tmp_path):
    first = pictures(30)
    Image.fromarray(first[1]).save(tmp_path / "again.jpeg", quality=30)
    darker = (first[0] * 0.7 + 10).astype(np.uint8)
    smaller = np.asarray(Image.fromarray(first[2]).resize((40, 40)).resize((64, 64)))
    again = np.asarray(Image.open(tmp_path / "again.jpeg"))
    found = looks(tmp_path, np.stack([*first, darker, again, smaller]))
    assert found[30:].tolist() == found[:3].tolist() and len(np.unique(found)) == 30
    many = pictures(700)
    found = looks(tmp_path, np.concatenate([many, many]))  # across blocks
    assert (found[:700] == found[700:]).all() and len(np.unique(found)) == 700


def test_looks_follow_chains_through_the_blocks(tmp_path):
    """Links of links count; the numbers are in the order of first appearance."""
    base, way = pictures(600).astype(float), np.linspace(0, 1, 15)[:, None, None]
    chain = base[0] * (1 - way) + base[1] * way  # from one image to another in small steps
    order = np.random.default_rng(0).permutation(613)
    found = looks(tmp_path, np.concatenate([chain, base[2:]])[order].astype(np.uint8))
    assert len(np.unique(found[order < 15])) == 1 and len(np.unique(found)) == 599
    assert pd.factorize(found)[0].tolist() == found.tolist()
    assert len(set(looks(tmp_path, base[:2].astype(np.uint8)))) == 2


def test_many_equal_images_need_no_memory_for_every_pair():
    peaks = []
    manifest = pd.DataFrame({"path": map(str, range(1500))})
    dataset = datasets.Dataset("many", None, manifest, ("a",), None, True, "argument")
    noise = np.random.default_rng(0).integers(0, 255, (1500, 32, 32), dtype=np.uint8)
    for images in (noise, np.repeat(noise[:1], 1500, axis=0)):
        tracemalloc.start()
        split.with_looks(dataset, images)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4 * peaks[0], peaks


def test_real_set(real_data):
    dataset = split.grouped(datasets.load(sources.find("pneumonia", real_data)))
    audit = split.audit(dataset).set_index("check")
    assert "leak" not in set(audit["verdict"])
    assert audit.filter(regex="and test, by number$", axis=0)["count"].sum() == 170
    assert audit.loc["identical files with different labels", "count"] == 0
