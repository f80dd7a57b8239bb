"""Patient-grouped, stratified splits, saved with a hash; and their audit."""

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
from ..metrics import patient_codes
from ..progress import Bar
from . import medmnist
from .datasets import Dataset, take
from .tables import BadData

log = logging.getLogger("dlia_utils")

FOLDS = 20  # A validation share is made of whole folds: 1/20 is how exactly it is met.
SPLITS = ("train", "val", "test")
SAME_HASH, SAME_LOOK = 10, 0.98  # different bits of 63 at most, correlation of thumbnails at least


def grouped(dataset: Dataset, *, val_share: float = 0.15, seed: int = 0) -> Dataset:
    """Keep the official test split; draw val anew: whole patients, stratified by class and group.

    Byte-identical files, and images of one `look` (see `with_looks`), count as one patient.
    `val_share`, at most a half, is met to about 1/20. Errors: `BadData` when a class has fewer
    than two patients.
    """
    if not 0 < val_share <= 0.5:
        raise ValueError(f"val_share is {val_share}; it must lie in (0, 0.5]")
    given = dataset.split_rule.startswith("given by")
    test = f"test {dataset.split_rule}" if given else "official test"
    rule = f"{test}; val = {val_share:g} of train+val by patient, stratified, seed {seed}"
    return _divided(dataset, rule, seed, val=val_share)


def drawn(
    dataset: Dataset, *, val_share: float = 0.1, test_share: float = 0.1, seed: int = 0
) -> Dataset:
    """Draw train, val and test anew: patients, shares and errors as for `grouped`."""
    if not (min(val_share, test_share) > 0 and val_share + test_share <= 0.5):
        raise ValueError("val_share and test_share must be positive, together at most 0.5")
    rule = f"test = {test_share:g}, val = {val_share:g} of all, drawn by patient, stratified"
    return _divided(dataset, f"{rule}, seed {seed}", seed, test=test_share, val=val_share)


def _divided(dataset: Dataset, rule: str, seed: int, **shares: float) -> Dataset:
    """The images (without a share for "test" those of the test split stay) divided by patient."""
    split = dataset.manifest["split"].to_numpy(dtype=object).copy()
    pool = np.flatnonzero(split != "test") if "test" not in shares else np.arange(len(split))
    manifest, units = dataset.manifest.iloc[pool], _units(dataset)[pool]
    labels, needed = manifest["label"].to_numpy(), len(shares) + 1
    fewest = pd.Series(units).groupby(labels).nunique().min()
    if fewest < needed:
        raise BadData(f"a class has fewer than {needed} patients: no split can be drawn")
    strata = (manifest["class_name"] + "/" + manifest["group"]).to_numpy()
    target = strata if manifest.groupby(strata).size().min() >= FOLDS else labels
    parts = deal(target, units, min(FOLDS, fewest), seed=seed)
    split[pool], start = "train", 0
    for name, share in shares.items():
        end = start + max(round(share * len(parts)), 1)
        split[pool[np.concatenate(parts[start:end])]] = name
        start = end
    return replace(dataset, manifest=dataset.manifest.assign(split=split), split_rule=rule)


def folds(dataset: Dataset, *, n: int = 5, seed: int = 0) -> Dataset:
    """Add the manifest column `fold` (0 to n-1): patients as for `grouped`, stratified by class.

    Only labelled images of train and val are dealt out; every other row gets -1. `BadData` when no
    class has n patients.
    """
    manifest = dataset.manifest
    usable = manifest["split"].isin(["train", "val"]) & (manifest["label"] >= 0)
    rows = np.flatnonzero(usable.to_numpy())
    units, classes = _units(dataset)[rows], manifest["class_name"].to_numpy(dtype=object)[rows]
    spread = pd.Series(units).groupby(classes).nunique()
    if not len(spread) or spread.max() < n:
        text = f"no class has {n} patients in train and val: {n} folds cannot be filled"
        raise BadData(f"{text}. Fix: fewer folds")
    if (spread < n).any():
        rare = ", ".join(f"{name} {count}" for name, count in spread[spread < n].items())
        log.warning("some folds lack a class: patients of %s for %d folds", rare, n)
    fold = np.full(len(manifest), -1, dtype=np.int64)
    for number, held_out in enumerate(deal(classes, units, n, seed=seed)):
        fold[rows[held_out]] = number
    rule = f"{dataset.split_rule}; {n} folds by patient, stratified, seed {seed}"
    return replace(dataset, manifest=manifest.assign(fold=fold), split_rule=rule)


def deal(target: np.ndarray, units: np.ndarray, n: int, *, seed: int) -> list[np.ndarray]:
    """Positions of n folds: whole units (whole numbers), stratified by `target`.

    >>> parts = deal(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3]), 2, seed=0)
    >>> [len(part) for part in parts]
    [2, 2]
    """
    # Its own shuffle deals a class as unevenly as 9 to 36 before scikit-learn 1.7. Without it ties
    # are broken by the units' numbers: drawn anew, they make the folds depend on the seed.
    units = np.random.default_rng(seed).permutation(units.max() + 1)[units]
    with warnings.catch_warnings():  # The warning about rare classes counts images, not patients.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        return [part for _, part in StratifiedGroupKFold(n).split(units, target, units)]


def _units(dataset: Dataset) -> np.ndarray:
    """An integer per row: rows linked by patient, identical bytes or look share it."""
    patients = _patients(dataset)
    ties = [pd.factorize(_contents(dataset))[0]]
    if "look" in dataset.manifest:
        ties.append(dataset.manifest["look"].to_numpy())
    nodes, ends = patients.max() + 1, []
    for tie in ties:
        ends.append(nodes + tie)
        nodes += tie.max() + 1
    return _linked(np.tile(patients, len(ties)), np.concatenate(ends), nodes)[patients]


def _patients(dataset: Dataset) -> np.ndarray:
    return patient_codes(dataset.manifest["patient"], "the manifest's column patient")


def _linked(one: np.ndarray, other: np.ndarray, nodes: int) -> np.ndarray:
    links = coo_array((np.ones(len(one)), (one, other)), shape=(nodes, nodes))
    return connected_components(links, directed=False)[1]


def with_looks(dataset: Dataset, images: np.ndarray) -> Dataset:
    """Add the manifest column `look`: images that look the same share a number.

    `images` are grey uint8 [N,S,S] in the manifest's order, as the cache holds them. Two look the
    same when their perceptual hashes (signs of 63 low DCT frequencies of the 32 x 32 thumbnail
    about their median) differ in at most `SAME_HASH` bits, and the thumbnails correlate by
    `SAME_LOOK`: hashes alone would link hundreds of strangers. Found so: another compression,
    brightness or size of one image.
    """
    small = [Image.fromarray(one).resize((32, 32), Image.Resampling.BOX) for one in images]
    small = np.stack([np.asarray(one) for one in small]).astype(np.float32)
    low = dctn(small, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(small), -1)[:, 1:]
    bits = (low > np.median(low, axis=1, keepdims=True)).astype(np.float32)
    flat = small.reshape(len(small), -1)
    flat = flat - flat.mean(1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    looks = np.arange(len(bits))
    for start in range(0, len(bits), 256):  # blocks, and no pair that is linked already: however
        part, rest = slice(start, start + 256), slice(start, None)  # alike, little memory is needed
        differ = bits[part] @ (1 - bits[rest]).T + (1 - bits[part]) @ bits[rest].T
        same = (differ <= SAME_HASH) & (flat[part] @ flat[rest].T >= SAME_LOOK)
        one, other = np.nonzero(same & (looks[part, None] != looks[rest]))
        looks = _linked(looks[one + start], looks[other + start], len(looks))[looks]
    return replace(dataset, manifest=dataset.manifest.assign(look=looks))


def _contents(dataset: Dataset) -> pd.Series:
    """An id of each image's bytes: sha1 where another file has the same length, else the path."""
    paths, ids = dataset.manifest["path"], dataset.manifest["path"].copy()
    if dataset.archive:
        pixels = medmnist.images(dataset.archive, paths)
        return paths.map({path: hashlib.sha1(one.tobytes()).hexdigest() for path, one in pixels})
    lengths = pd.Series([(dataset.root / path).stat().st_size for path in paths])
    doubtful = np.flatnonzero(lengths.duplicated(keep=False).to_numpy())
    for row in Bar(doubtful, desc="hashing files of equal length", delay=2):
        ids[row] = hashlib.sha1((dataset.root / paths[row]).read_bytes()).hexdigest()
    return ids


def split_hash(dataset: Dataset) -> str:
    """Hash of which path lies in which split and fold; the same wherever the data set is stored."""
    columns = [name for name in ("path", "split", "fold") if name in dataset.manifest]
    rows = sorted(dataset.manifest[columns].itertuples(index=False, name=None))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def save(dataset: Dataset, path: str | Path) -> str:
    """Write the split as JSON (rule, hash, split and fold of each path) and return the hash."""
    saved = {"dataset": dataset.name, "rule": dataset.split_rule, "hash": split_hash(dataset)}
    for name in ("split", "fold"):
        if name in dataset.manifest:
            saved[name] = dataset.manifest.set_index("path")[name].to_dict()
    files.write_json(saved, path)
    return saved["hash"]


def load(dataset: Dataset, path: str | Path) -> Dataset:
    """Apply a split written by `save`; `BadData` when it was edited or is of other images."""
    saved, paths = files.read_json(path), dataset.manifest["path"]
    with files.reading(path, "delete it to draw a new split"):
        known, rule, written = set(saved["split"]), saved["rule"], saved["hash"]
    if odd := set(paths) ^ known:
        text = f"{path} is the split of other images: {len(odd)} differ, first {min(odd)}"
        raise BadData(f"{text}. Delete it to draw a new split.")
    kept = {name: paths.map(saved[name]) for name in ("split", "fold") if name in saved}
    manifest = dataset.manifest.drop(columns="fold", errors="ignore").assign(**kept)
    loaded = replace(dataset, manifest=manifest, split_rule=rule)
    if split_hash(loaded) != written:
        text = f"{path} was changed after it was written (its hash does not match)"
        raise BadData(f"{text}. Delete it to draw a new one.")
    return loaded


def audit(dataset: Dataset) -> pd.DataFrame:
    """What the splits share: columns check, count, verdict ("ok", "warning", "leak"), detail.

    A patient shared with the official test split is a warning, any other sharing a leak. Where
    patients' groups differ (bacteria, virus), they are compared by number and kind too. Unlabelled
    images conflict with none.
    """
    _patients(dataset)
    manifest = dataset.manifest.assign(content=_contents(dataset).to_numpy())
    manifest["kind"] = manifest["patient"].astype(str) + " " + manifest["group"]
    several, looks = manifest["group"].nunique() > 1, "look" in manifest
    parts = dict(list(manifest.groupby("split")))
    parts = {name: parts[name] for name in SPLITS if name in parts}
    rows = []

    def add(check: str, found: Sequence[str], verdict: str) -> None:
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        rows.append((check, len(found), verdict if len(found) else "ok", shown))

    for one, other in itertools.combinations(parts, 2):
        left, right, where = parts[one], parts[other], f"in {one} and {other}"
        shared = {name: left[left[name].isin(right[name])] for name in left.columns}
        verdict = "warning" if other == "test" else "leak"
        add(f"patients {where}, by number", sorted(set(shared["patient"]["patient"])), verdict)
        if several:
            kinds = sorted(set(shared["kind"]["kind"]))
            add(f"patients {where}, by number and kind", kinds, "leak")
        add(f"identical files {where}", shared["content"]["path"].tolist(), "leak")
        if looks:
            add(f"near-duplicates {where}", shared["look"]["path"].tolist(), "leak")
    for name, part in parts.items():
        copies = part["path"][part.duplicated("content")].tolist()
        add(f"identical files within {name}", copies, "warning")
    checks = [("content", "identical files", "leak")]
    checks += [("look", "near-duplicates", "warning")] * looks
    for column, what, verdict in checks:
        labels = manifest[manifest["label"] >= 0].groupby(column)["label"].nunique()
        odd = manifest["path"][manifest[column].isin(labels.index[labels > 1])].tolist()
        add(f"{what} with different labels", odd, verdict)
    return pd.DataFrame(rows, columns=["check", "count", "verdict", "detail"])


def subset(dataset: Dataset, *, per_class: int | Sequence[int], seed: int = 0) -> Dataset:
    """At most `per_class` images of each class from each split, at random; rows are numbered anew.

    One number for all classes, or one for each in the order of `dataset.classes`. An image stays
    in its split.
    """
    one = isinstance(per_class, int)
    counts = [per_class] * len(dataset.classes) if one else list(per_class)
    if len(counts) != len(dataset.classes) or min(counts) < 1:
        text = "it must be at least 1, one number or one for each class"
        raise ValueError(f"per_class is {per_class}; {text}")
    kept = []
    for (name, label), part in dataset.manifest.groupby(["split", "label"]):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), label % 2**32])
        kept.append(rng.permutation(part.index.to_numpy())[: counts[label]])
    rule = f"{dataset.split_rule}; at most {per_class} a class"
    return replace(take(dataset, np.sort(np.concatenate(kept))), split_rule=rule)
