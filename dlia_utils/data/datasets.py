"""A data set as one table of images and tables of what is marked on them, whatever its published layout."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from . import medmnist, own_data, readers
from .readers import (
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
from .sources import Location, cache_root, own

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
    "from_boxes",
    "from_folder",
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
    """Read the data set at `location` (see `locate.find`, `find_own`) into a `Dataset`; no image is decoded.

    A MedMNIST file is unpacked into `locate.cache_root()` first, once (see `medmnist.unpack`): `root` is then that
    folder, and `split_rule` says what else a reader must know of the images.

    `allow_missing` ("nih", "dlia") uses the listed images that are there where others are missing;
    `allow_leak` ("dlia") keeps training rows whose image is in the competition's test set too.
    Errors: `DataNotFound` for a missing split or class folder; `BadData` for an empty class folder, unusable
    rows of a box table and missing images; `ValueError` for an option that the data set does not have.
    """
    root = location.root
    if location.kind == "published":
        if medmnist.meant(location.dataset):
            root = medmnist.unpack(location.dataset, root, cache=cache_root())
        tables = readers.read(
            location.dataset, root, allow_missing=allow_missing, allow_leak=allow_leak
        )
    elif allow_missing or allow_leak:
        raise ValueError("allow_missing and allow_leak are for published data sets; leave them out")
    elif location.kind == "folder":
        tables = own_data.folder_tables(root, **location.options)
    else:
        options = dict(location.options)
        tables = own_data.boxes_tables(root, Path(options.pop("annotations")), **options)
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


def from_folder(
    path: str | Path, *, classes: Sequence[str] | None = None, patient_pattern: str = ""
) -> Dataset:
    """Your own images as a data set under the folder's name: a folder for each class, at any depth below.

    Images are jpg, png, bmp, tif or webp, of 8 bits. The class folders may lie below train/, val/ and test/ (also
    training, valid, validation, testing; train and one other at least), which are then the split; without them
    `split` is "". One CSV with a column `file` (paths below `path`) may lie in the folder, or beside it as PATH.csv:
    its column `label` replaces the class folders, `patient` names the patients, `split` the split, and images that
    it does not list are ignored.

    Labels count from 0 in the order of `classes`; without it, names that mean healthy (normal, healthy, negative,
    no finding, none, control, benign, 0) come first, then alphabetical. Of two classes label 1 is the disease that
    sensitivity speaks of. `patient_pattern` is a regular expression searched in each image's path: its group
    `patient`, or the first one, is the patient. With neither, each image is a patient of its own, with a warning.

    Errors: `DataNotFound` for a folder that is not there; `BadData` for a class folder without images, classes that
    differ by case, one class only, a class missing in a split, and CSV rows with missing or repeated files, unknown
    splits or empty cells; `ValueError` for `classes` that are not the data's and for an unusable `patient_pattern`.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "mine"
    >>> for name in ("flu/p1-a.png", "normal/p2-a.png", "normal/p2-b.png"):
    ...     (folder / name).parent.mkdir(parents=True, exist_ok=True)
    ...     Image.new("L", (8, 8)).save(folder / name)
    >>> dataset = from_folder(folder, patient_pattern="(p[0-9]+)-")
    >>> dataset.name, dataset.classes, dataset.manifest["patient"].tolist()
    ('mine', ('normal', 'flu'), ['p1', 'p2', 'p2'])
    """
    return load(own(path, options={"classes": classes, "patient_pattern": patient_pattern}))


def from_boxes(
    annotations: str | Path,
    images: str | Path,
    *,
    classes: Sequence[str] | None = None,
    patient_pattern: str = "",
) -> Dataset:
    """Your own boxes as a detection set under the name of the folder `images`.

    `annotations` is a CSV with a row for each box: `file` (or filename, image, image_id; a path below `images`),
    `label`, and the corners x1, y1, x2, y2 (or xmin, x_min, ...) in pixels of the upright image; a row without
    corners and label is an image without boxes. Or it is a COCO JSON, whose outlines are not read. `patient` and
    `split` may stand in the CSV's columns or with COCO's images; without a split (or folders train/, val/, test/)
    every image is in train. Images that are not listed are ignored. `classes` and `patient_pattern` as for
    `from_folder`; label k is `box_classes[k - 1]`, and an image's class is that of its rarest box.

    Errors: `DataNotFound` for a file or folder that is not there; `BadData` naming the rows: missing columns or
    images, a file with two ids, boxes that reach out of their image, width and height in place of corners.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("L", (20, 10)).save(folder / "1.png")
    >>> _ = (folder / "boxes.csv").write_text("file,label,x1,y1,x2,y2\\n1.png,mass,2,3,12,9\\n")
    >>> from_boxes(folder / "boxes.csv", folder).boxes.loc[0, ["x1", "y1", "x2", "y2"]].tolist()
    [2.0, 3.0, 12.0, 9.0]
    """
    options = {
        "annotations": Path(os.path.abspath(Path(annotations).expanduser())),
        "classes": classes,
        "patient_pattern": patient_pattern,
    }
    return load(own(images, kind="boxes", options=options))


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
        patient=dataset.manifest["patient"].to_numpy()[
            dataset.boxes["image"].to_numpy(dtype=np.int64)
        ],
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
            if image.format == "TIFF" and image.n_frames > 1:
                return f"holds {image.n_frames} images, and one would be read: save each as a file"
            if image.format == "TIFF" and readers.orientation(image) > 1:
                # Pillow turns it while loading, and garbles it where it maps the file into memory.
                return (
                    f"lies on its side (orientation {readers.orientation(image)}): save it upright"
                )
            deep = image.mode.startswith(("I", "F"))
            return f"more than 8 bits a pixel (mode {image.mode}), convert it to 8" if deep else ""
    except UnidentifiedImageError:
        return "not an image"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
