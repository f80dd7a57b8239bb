"""Patient-grouped, stratified splits, saved with a hash; and the audit that shows what still leaks."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from .. import files
from ..progress import Bar
from .datasets import BadData, Dataset, take

log = logging.getLogger("dlia_utils")

FOLDS = 20  # A validation share is made of whole folds: 1/20 is how exactly it is met.
SPLITS = ("train", "val", "test")
SAME_HASH, SAME_LOOK = (
    10,
    0.98,
)  # at most so many of 63 hash bits differ, and thumbnails correlate by at least so much


def grouped(dataset: Dataset, *, val_share: float = 0.15, seed: int = 0) -> Dataset:
    """Keep the official test split; draw val anew from train+val: whole patients, stratified by class, group.

    Byte-identical files, and images of one `look` (see `with_looks`), count as one patient, so no copy lies on both
    sides. `val_share` is met to about 1/20. Errors: `ValueError` for a share outside (0, 0.5], `BadData` when a class has fewer than two
    patients.
    """
    if not 0 < val_share <= 0.5:
        raise ValueError(f"val_share is {val_share}; it must lie in (0, 0.5]")
    manifest = dataset.manifest.copy()
    pool = np.flatnonzero((manifest["split"] != "test").to_numpy())
    strata = (manifest["class_name"] + "/" + manifest["group"]).to_numpy()[pool]
    units = _units(dataset)[pool]
    chosen = _draw(
        manifest["label"].to_numpy()[pool], strata, units, val_share=val_share, seed=seed
    )
    names = manifest["split"].to_numpy(dtype=object).copy()
    names[pool] = "train"
    names[pool[chosen]] = "val"
    manifest["split"] = names
    test = (
        f"test {dataset.split_rule}"
        if dataset.split_rule.startswith("given by")
        else "official test"
    )
    rule = f"{test}; val = {val_share:g} of train+val by patient, stratified, seed {seed}"
    return replace(dataset, manifest=manifest, split_rule=rule)


def drawn(
    dataset: Dataset, *, val_share: float = 0.1, test_share: float = 0.1, seed: int = 0
) -> Dataset:
    """Draw train, val and test anew, whatever splits there were: whole patients, stratified by class and group.

    For a data set without an official test split, or with one of another question. Byte-identical files and images
    of one `look` (see `with_looks`) count as one patient. Both shares are met to about 1/20. Errors: `ValueError`
    for shares that are not positive or leave less than half to train on, `BadData` when a class has fewer than
    three patients.
    """
    if not (val_share > 0 and test_share > 0 and val_share + test_share <= 0.5):
        raise ValueError(
            f"val_share {val_share} and test_share {test_share} must be positive, together at most 0.5"
        )
    manifest = dataset.manifest
    labels, units = manifest["label"].to_numpy(), _units(dataset)
    strata = (manifest["class_name"] + "/" + manifest["group"]).to_numpy()
    parts = _parts(labels, strata, units, seed=seed, needed=3)
    ends = np.cumsum([max(round(share * len(parts)), 1) for share in (test_share, val_share)])
    names = np.full(len(manifest), "train", dtype=object)
    for start, end, name in ((0, ends[0], "test"), (ends[0], ends[1], "val")):
        names[np.concatenate(parts[start:end])] = name
    rule = f"test = {test_share:g}, val = {val_share:g} of all, drawn by patient, stratified, seed {seed}"
    return replace(dataset, manifest=manifest.assign(split=names), split_rule=rule)


def _parts(
    labels: np.ndarray, strata: np.ndarray, units: np.ndarray, *, seed: int, needed: int
) -> list[np.ndarray]:
    """Positions of up to `FOLDS` folds: whole units, stratified by class, and by group where it is frequent."""
    fewest = min(len(np.unique(units[labels == label])) for label in np.unique(labels))
    if fewest < needed:
        raise BadData(
            f"a class has fewer than {needed} patients: train, val and test cannot be drawn"
        )
    target = strata if pd.Series(strata).value_counts().min() >= FOLDS else labels
    # As in `folds`: the numbers drawn anew make the result depend on the seed.
    units = np.random.default_rng(seed).permutation(units.max() + 1)[units]
    splitter = StratifiedGroupKFold(min(FOLDS, fewest))
    return [held_out for _, held_out in splitter.split(units, target, units)]


def with_looks(dataset: Dataset, images: np.ndarray) -> Dataset:
    """Add the manifest column `look`: images that look the same share a number, and splits keep them together.

    `images` are grey uint8 [N,S,S] in the manifest's order, as the cache holds them. Two images look the same when
    their perceptual hashes (signs of 63 low DCT frequencies of the 32 x 32 thumbnail about their median) differ in
    at most `SAME_HASH` bits, and the thumbnails correlate by `SAME_LOOK`: films of one view are so alike that
    hashes alone would link hundreds of strangers. Found so: another compression, brightness or size of one film.

    >>> film = np.random.default_rng(0).integers(0, 200, (64, 64), dtype=np.uint8).cumsum(0, dtype=np.uint8)
    >>> looks(np.stack([film, film.T, film // 2 + 9])).tolist()
    [0, 1, 0]
    """
    if len(images) != len(dataset.manifest):
        raise ValueError(
            f"{len(images)} images for {len(dataset.manifest)} rows of the manifest: pass them all"
        )
    return replace(dataset, manifest=dataset.manifest.assign(look=looks(images)))


def looks(images: np.ndarray) -> np.ndarray:
    """A number per image [N]; see `with_looks`."""
    side = (32, 32)
    small = np.stack(
        [np.asarray(Image.fromarray(one).resize(side, Image.Resampling.BOX)) for one in images]
    )
    small = small.astype(np.float32)
    low = dctn(small, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(small), -1)[:, 1:]
    bits = (low > np.median(low, axis=1, keepdims=True)).astype(np.float32)
    flat = small.reshape(len(small), -1)
    flat = flat - flat.mean(1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    pairs = []
    for start in range(0, len(bits), 1024):  # blocks, so that ten thousand images need no gigabyte
        part = slice(start, start + 1024)
        differ = bits[part] @ (1 - bits).T + (1 - bits[part]) @ bits.T
        one, other = np.nonzero((differ <= SAME_HASH) & (flat[part] @ flat.T >= SAME_LOOK))
        pairs.append(np.stack([one + start, other]))
    one, other = np.concatenate(pairs, axis=1)
    links = coo_array((np.ones(len(one)), (one, other)), shape=(len(bits), len(bits)))
    return connected_components(links, directed=False)[1]


def folds(dataset: Dataset, *, n: int = 5, seed: int = 0) -> Dataset:
    """Add the manifest column `fold` (0 to n-1) for cross-validation: whole patients, stratified by class.

    Only labelled images of train and val are dealt out; every other row gets -1. Byte-identical files, and images
    of one `look`, count as one patient. Errors: `ValueError` for `n` below 2, `BadData` when no class has `n` patients.
    """
    if n < 2:
        raise ValueError(f"n is {n} folds; it must be at least 2")
    manifest = dataset.manifest
    usable = manifest["split"].isin(["train", "val"]) & (manifest["label"] >= 0)
    rows = np.flatnonzero(usable.to_numpy())
    units, classes = _units(dataset)[rows], manifest["class_name"].to_numpy(dtype=object)[rows]
    spread = pd.Series(units).groupby(classes).nunique()
    if not len(spread) or spread.max() < n:
        raise BadData(
            f"no class has {n} patients in train and val: {n} folds cannot be filled. Fix: fewer folds"
        )
    if (spread < n).any():
        rare = ", ".join(f"{name} {count}" for name, count in spread[spread < n].items())
        log.warning("some folds lack a class: patients of %s for %d folds", rare, n)
    fold = np.full(len(manifest), -1, dtype=np.int64)
    # Its own shuffle deals a class as unevenly as 9 to 36 before scikit-learn 1.7. Without it, ties between patients
    # are broken by their numbers: drawn anew, they make the folds depend on the seed.
    units = np.random.default_rng(seed).permutation(units.max() + 1)[units]
    splitter = StratifiedGroupKFold(n)
    with (
        warnings.catch_warnings()
    ):  # Its warning about rare classes counts images, ours above patients.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for number, (_, held_out) in enumerate(splitter.split(rows, classes, units)):
            fold[rows[held_out]] = number
    rule = f"{dataset.split_rule}; {n} folds by patient, stratified, seed {seed}"
    return replace(dataset, manifest=manifest.assign(fold=fold), split_rule=rule)


def _draw(
    labels: np.ndarray, strata: np.ndarray, units: np.ndarray, *, val_share: float, seed: int
) -> np.ndarray:
    """Positions of the validation rows: as many of `FOLDS` stratified group folds as the share needs."""
    fewest = min(len(np.unique(units[labels == label])) for label in np.unique(labels))
    if fewest < 2:
        raise BadData(
            "a class has fewer than 2 patients outside the test split: a validation split cannot be drawn"
        )
    rarest = pd.Series(strata).value_counts().min()
    # A group (bacteria, virus) too rare to spread over the folds cannot be balanced: stratify by class then.
    target = strata if rarest >= FOLDS else labels
    folds = min(FOLDS, fewest)
    take = min(max(round(val_share * folds), 1), folds - 1)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parts = [held_out for _, held_out in splitter.split(units, target, units)]
    return np.sort(np.concatenate(parts[:take]))


def _units(dataset: Dataset) -> np.ndarray:
    """An integer per row: rows of one patient, with identical bytes, of one look, or linked by these, share it."""
    patients = pd.factorize(dataset.manifest["patient"])[0]
    ties = [pd.factorize(byte_hashes(dataset))[0]]
    if "look" in dataset.manifest:
        ties.append(dataset.manifest["look"].to_numpy())
    nodes, ends = patients.max() + 1, []
    for tie in ties:
        ends.append(nodes + tie)
        nodes += tie.max() + 1
    starts = np.tile(patients, len(ties))
    links = coo_array((np.ones(len(starts)), (starts, np.concatenate(ends))), shape=(nodes, nodes))
    return connected_components(links, directed=False)[1][patients]


def byte_hashes(dataset: Dataset) -> pd.Series:
    """An id of each file's bytes: sha1 where another file has the same length, else the path (bytes unique).

    Only equal lengths are read, so this costs little even on the full-size films.
    """
    paths = [dataset.root / path for path in dataset.manifest["path"]]
    lengths = pd.Series([path.stat().st_size for path in paths])
    ids = dataset.manifest["path"].copy()
    doubtful = np.flatnonzero(lengths.duplicated(keep=False).to_numpy())
    for row in Bar(
        doubtful, desc="hashing files of equal length", delay=2
    ):  # No bar for a moment's work.
        ids[row] = hashlib.sha1(paths[row].read_bytes()).hexdigest()
    return ids


def split_hash(dataset: Dataset) -> str:
    """Hash of which path lies in which split and fold; the same wherever the data set is stored."""
    parts = [
        dataset.manifest[name] for name in ("path", "split", "fold") if name in dataset.manifest
    ]
    rows = sorted(zip(*(part.tolist() for part in parts), strict=True))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def save(dataset: Dataset, path: str | Path) -> str:
    """Write the split as JSON (rule, hash, split of each path and its fold, if any) and return the hash."""
    key = split_hash(dataset)
    paths = dataset.manifest["path"]
    saved = {"dataset": dataset.name, "rule": dataset.split_rule, "hash": key}
    for name in ("split", "fold"):
        if name in dataset.manifest:
            saved[name] = dict(zip(paths, dataset.manifest[name].tolist(), strict=True))
    files.write_json(saved, path)
    return key


def load(dataset: Dataset, path: str | Path) -> Dataset:
    """Apply a split written by `save`; `BadData` when it was edited or is not about exactly these images."""
    saved = json.loads(Path(path).read_text(encoding="utf-8"))
    have, want = set(dataset.manifest["path"]), set(saved["split"])
    if have != want:
        example = sorted(have ^ want)[0]
        raise BadData(
            f"{path} is the split of other images: {len(have - want)} here are not in it, {len(want - have)} "
            f"in it are not here (first: {example}). Delete it to draw a new split."
        )
    kept = {
        name: dataset.manifest["path"].map(saved[name])
        for name in ("split", "fold")
        if name in saved
    }
    manifest = dataset.manifest.drop(columns="fold", errors="ignore").assign(**kept)
    loaded = replace(dataset, manifest=manifest, split_rule=saved["rule"])
    if split_hash(loaded) != saved["hash"]:
        raise BadData(
            f"{path} was changed after it was written (its hash does not match). Delete it to draw a new one."
        )
    return loaded


def audit(dataset: Dataset) -> pd.DataFrame:
    """What the splits share: columns check, count, verdict ("ok", "warning", "leak"), detail.

    A patient shared with the official test split is a warning, any other sharing a leak. Where patients'
    groups differ (bacteria, virus), they are compared by number and kind too, because the pneumonia set does
    not say which reading is right. Unlabelled images conflict with none.
    """
    manifest = dataset.manifest.assign(content=byte_hashes(dataset).to_numpy())
    manifest["kind"] = manifest["patient"] + " " + manifest["group"]
    present = [name for name in SPLITS if (manifest["split"] == name).any()]
    rows = []
    for one, other in itertools.combinations(present, 2):
        sides = [manifest[manifest["split"] == name] for name in (one, other)]
        by_number = _shared(sides, "patient")
        verdict = "warning" if other == "test" else "leak"
        rows.append(_row(f"patients in {one} and {other}, by number", by_number, verdict))
        if manifest["group"].nunique() > 1:
            by_kind = _shared(sides, "kind")
            rows.append(_row(f"patients in {one} and {other}, by number and kind", by_kind, "leak"))
        both = _shared(sides, "content")
        rows.append(_row(f"identical files in {one} and {other}", _paths(sides[0], both), "leak"))
        if "look" in manifest:
            alike = sides[0][sides[0]["look"].isin(sides[1]["look"])]
            rows.append(_row(f"near-duplicates in {one} and {other}", list(alike["path"]), "leak"))
    for name in present:
        inside = manifest[manifest["split"] == name]
        copies = inside.loc[inside.duplicated("content"), "path"]
        rows.append(_row(f"identical files within {name}", list(copies), "warning"))
    labels = manifest[manifest["label"] >= 0].groupby("content")["label"].nunique()
    conflicts = _paths(manifest, list(labels.index[labels > 1]))
    rows.append(_row("identical files with different labels", conflicts, "leak"))
    if "look" in manifest:
        kinds = manifest[manifest["label"] >= 0].groupby("look")["label"].nunique()
        alike = list(manifest.loc[manifest["look"].isin(kinds.index[kinds > 1]), "path"])
        rows.append(_row("near-duplicates with different labels", alike, "warning"))
    return pd.DataFrame(rows, columns=["check", "count", "verdict", "detail"])


def _shared(sides: Sequence[pd.DataFrame], column: str) -> list[str]:
    return sorted(set(sides[0][column]) & set(sides[1][column]))


def _paths(part: pd.DataFrame, contents: Sequence[str]) -> list[str]:
    return list(part.loc[part["content"].isin(contents), "path"])


def _row(check: str, found: Sequence[str], verdict: str) -> tuple[str, int, str, str]:
    shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return check, len(found), verdict if found else "ok", shown


def subset(
    dataset: Dataset,
    *,
    per_class: int | Sequence[int],
    splits: Sequence[str] = (*SPLITS, ""),
    seed: int = 0,
) -> Dataset:
    """At most `per_class` images of each class from each of `splits`, at random; rows are numbered anew.

    One number for all classes, or one for each in the order of `dataset.classes`. An image stays in its split, so
    patients that were apart stay apart.
    """
    counts = [per_class] * len(dataset.classes) if isinstance(per_class, int) else list(per_class)
    if len(counts) != len(dataset.classes) or min(counts) < 1:
        raise ValueError(
            f"per_class is {per_class}; it must be at least 1, one number or one for each class"
        )
    kept = []
    for (name, label), part in dataset.manifest.groupby(["split", "label"]):
        if name in splits:
            # One generator for each part, so that leaving a split out does not change the others.
            rng = np.random.default_rng([seed, zlib.crc32(name.encode()), label % 2**32])
            kept.append(rng.permutation(part.index.to_numpy())[: counts[label]])
    rows = np.sort(np.concatenate(kept)) if kept else []
    return replace(
        take(dataset, rows), split_rule=f"{dataset.split_rule}; at most {per_class} a class"
    )
