"""A data set as one table of images and tables of what is marked on them, whatever its published layout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from . import layouts, medmnist
from .layouts import (
    BOX_COLUMNS,
    COLUMNS,
    NIH_CLASSES,
    SHOWN,
    BadData,
    no_boxes,
    no_masks,
    no_outlines,
    pneumonia_patient,
)
from .locate import Location, cache_root

__all__ = [
    "BOX_COLUMNS",
    "COLUMNS",
    "NIH_CLASSES",
    "SHOWN",
    "BadData",
    "Dataset",
    "box_summary",
    "boxed",
    "check",
    "load",
    "no_boxes",
    "no_masks",
    "no_outlines",
    "pneumonia_patient",
    "problem_text",
    "summary",
    "take",
]

log = logging.getLogger("dlia_utils")


@dataclass(frozen=True)
class Dataset:
    """A data set as a table: `manifest` has the columns `COLUMNS`; the row number is an image's id.

    `ignored` (path, reason) lists what was found in the tree but not read; `split_rule` says how `split`
    arose. A detection set has `boxes` too (columns `BOX_COLUMNS`, corners in pixels of the original file,
    label k named `box_classes[k - 1]`), and a competition its `mapping` of ids to images as published.
    `outlines` (image, label, points: float64 [n,2] of x, y; one row a polygon) lie on the same pixels as the
    boxes; `masks` (image, path) names files, relative to `root`, that show an organ of that film (the lungs).
    Boxes, outlines and masks are tables without rows where the data set has none.
    """

    name: str
    root: Path
    manifest: pd.DataFrame
    classes: tuple[str, ...]
    ignored: pd.DataFrame
    synthetic: bool
    origin: str
    split_rule: str = "official"
    boxes: pd.DataFrame = field(default_factory=no_boxes)
    box_classes: tuple[str, ...] = ()
    mapping: pd.DataFrame | None = None
    outlines: pd.DataFrame = field(default_factory=no_outlines)
    masks: pd.DataFrame = field(default_factory=no_masks)


def load(location: Location, *, allow_missing: bool = False, allow_leak: bool = False) -> Dataset:
    """Read the data set at `location` (see `locate.find`) into a `Dataset`; no image is decoded.

    A MedMNIST file is unpacked into `locate.cache_root()` first, once (see `medmnist.unpack`): `root` is then that
    folder, and `split_rule` says what else a reader must know of the images.

    `allow_missing` ("nih", "dlia") uses the listed images that are there where others are missing;
    `allow_leak` ("dlia") keeps training rows whose image is in the competition's test set too.
    Errors: `DataNotFound` for a missing split or class folder; `BadData` for an empty class folder, unusable
    rows of a box table and missing images; `ValueError` for an option that the data set does not have.
    """
    root = location.root
    if medmnist.meant(location.dataset):
        root = medmnist.unpack(location.dataset, root, cache=cache_root())
    tables = layouts.read(location.dataset, root, allow_missing=allow_missing, allow_leak=allow_leak)
    if len(tables.ignored):
        reasons = tables.ignored["reason"].value_counts()
        log.info(
            "ignored %d files: %s",
            len(tables.ignored),
            "; ".join(f"{n} {reason}" for reason, n in reasons.items()),
        )
    return Dataset(
        location.dataset, root, synthetic=location.synthetic, origin=location.origin, **vars(tables)
    )


def summary(dataset: Dataset) -> pd.DataFrame:
    """Images and patients by split and class: columns split, class_name, images, patients."""
    order = sorted(set(dataset.manifest["split"]), key=("train", "val", "test", "").index)
    table = dataset.manifest.groupby(["split", "class_name"], as_index=False).agg(
        images=("path", "size"), patients=("patient", "nunique")
    )
    table["split"] = pd.Categorical(table["split"], order, ordered=True)
    return table.sort_values(["split", "class_name"], ignore_index=True).astype({"split": str})


def check(dataset: Dataset) -> pd.DataFrame:
    """Look at each file's size and header, without decoding: columns path, problem (empty: all is well)."""
    paths = list(dataset.manifest["path"])
    with ThreadPoolExecutor(8) as pool:
        problems = list(pool.map(lambda path: _file_problem(dataset.root / path), paths))
    rows = [(path, problem) for path, problem in zip(paths, problems, strict=True) if problem]
    return pd.DataFrame(rows, columns=["path", "problem"])


def problem_text(problems: pd.DataFrame) -> str:
    """The message of a `BadData` error: the first files by name, the number of the rest, and the fix.

    >>> print(problem_text(pd.DataFrame({"path": ["test/NORMAL/a.jpeg"], "problem": ["not an image"]})))
    1 unusable file:
      test/NORMAL/a.jpeg: not an image
    Fix: copy these files again from the original data set, or delete them (`data check` decodes every file).
    """
    lines = [f"  {row.path}: {row.problem}" for row in problems.head(SHOWN).itertuples()]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    head = f"{len(problems)} unusable file{'s' if len(problems) != 1 else ''}:"
    fix = "Fix: copy these files again from the original data set, or delete them (`data check` decodes every file)."
    return "\n".join([head, *lines, fix])


def take(dataset: Dataset, rows: Sequence[int] | np.ndarray) -> Dataset:
    """Only the images of `rows` (each at most once), numbered anew in that order, with all that is on them."""
    rows = np.asarray(rows, dtype=np.int64)
    manifest = dataset.manifest.iloc[rows].reset_index(drop=True)
    number = pd.Series(np.arange(len(rows)), index=rows)

    def renumbered(table: pd.DataFrame) -> pd.DataFrame:
        kept = table[table["image"].isin(rows)]
        kept = kept.assign(image=kept["image"].map(number).astype("int64"))
        return kept.sort_values("image", kind="stable", ignore_index=True)

    marked = {name: renumbered(getattr(dataset, name)) for name in ("boxes", "outlines", "masks")}
    return replace(dataset, manifest=manifest, **marked)


def boxed(dataset: Dataset) -> Dataset:
    """Only the images that have boxes, numbered anew."""
    return take(dataset, np.unique(dataset.boxes["image"].to_numpy(dtype=np.int64)))


def box_summary(dataset: Dataset) -> pd.DataFrame:
    """Number and size of the boxes of each class.

    Columns class_name, boxes, images, patients, share, width, height, side_min, side_median, side_max;
    `share` is the part of the boxed images that have the class, width and height are medians, the sides
    square roots of the areas, all in pixels of the original files.
    """
    boxes = dataset.boxes.assign(
        patient=dataset.manifest["patient"].to_numpy()[dataset.boxes["image"].to_numpy(dtype=np.int64)],
        width=dataset.boxes["x2"] - dataset.boxes["x1"],
        height=dataset.boxes["y2"] - dataset.boxes["y1"],
    )
    boxes["side"] = np.sqrt(boxes["width"] * boxes["height"])
    table = boxes.groupby("label").agg(
        boxes=("image", "size"),
        images=("image", "nunique"),
        patients=("patient", "nunique"),
        share=("image", lambda images: images.nunique() / max(boxes["image"].nunique(), 1)),
        width=("width", "median"),
        height=("height", "median"),
        side_min=("side", "min"),
        side_median=("side", "median"),
        side_max=("side", "max"),
    )
    table = table.reindex(range(1, len(dataset.box_classes) + 1))
    counts = ["boxes", "images", "patients"]
    table[counts] = table[counts].fillna(0).astype("int64")
    table["share"] = table["share"].fillna(0.0)
    table.insert(0, "class_name", list(dataset.box_classes))
    return table.reset_index(drop=True)


def _file_problem(path: Path) -> str:
    """What is wrong with a file as far as its size and header tell; "" when nothing."""
    try:
        if path.stat().st_size == 0:
            return "empty file (0 bytes)"
        with Image.open(path) as image:
            # Pillow would clip these to white without a word.
            deep = image.mode.startswith(("I", "F"))
            return f"more than 8 bits a pixel (mode {image.mode}), convert it to 8" if deep else ""
    except UnidentifiedImageError:
        return "not an image"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
