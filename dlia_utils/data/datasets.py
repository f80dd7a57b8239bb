"""A data set as one table of images and tables of what is marked on them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from . import medmnist, own_data, readers
from .sources import Location, own, source_of
from .tables import BOX_COLUMNS, SHOWN, BadImage, open_image

log = logging.getLogger("dlia_utils")


def _empty(*columns: str) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype="int64") for name in columns})


@dataclass(frozen=True)
class Dataset:
    """A data set as tables: `manifest` has the columns `COLUMNS`, its row number is an image's id.

    `ignored` (path, reason) lists what was found but not read; `split_rule` says how `split`
    arose. `boxes` (columns `tables.BOX_COLUMNS`, corners in pixels of the original file, label k
    named `box_classes[k - 1]`), `outlines` (image, label, points [n,2] of x, y) and `masks`
    (image, path of a file that shows the lungs) have no rows where the data set has none. A
    competition has its `mapping` of ids to images. MedMNIST's pixels lie in the `archive`.
    """

    name: str
    root: Path
    manifest: pd.DataFrame
    classes: tuple[str, ...]
    ignored: pd.DataFrame
    synthetic: bool
    origin: str
    split_rule: str = "official"
    boxes: pd.DataFrame = field(default_factory=partial(_empty, *BOX_COLUMNS))
    box_classes: tuple[str, ...] = ()
    mapping: pd.DataFrame | None = None
    outlines: pd.DataFrame = field(default_factory=partial(_empty, "image", "label", "points"))
    masks: pd.DataFrame = field(default_factory=partial(_empty, "image", "path"))
    archive: Path | None = None


def load(location: Location, **options: bool) -> Dataset:
    """Read the data set at `location` (see `sources.find`, `find_own`); no image is decoded.

    Option: `allow_missing` ("nih", "dlia") uses the listed images that are there. Errors:
    `DataNotFound` for a missing file or folder; `BadData` listing what cannot be used.
    """
    if location.kind == "published":
        read = source_of(location.dataset).read
    else:
        read = own_data.read_folder if location.kind == "folder" else own_data.read_boxes
    fields = read(location.root, **location.options | options)
    reasons = fields["ignored"]["reason"].value_counts()
    if len(reasons):
        log.info("not read: %s", "; ".join(f"{n} {reason}" for reason, n in reasons.items()))
    if readers.LEAK in reasons:
        text = "%d training images are refused: they stand in the competition's test set too"
        log.warning(text, reasons[readers.LEAK])
    about = dict(synthetic=location.synthetic, origin=location.origin)
    return Dataset(location.dataset, location.root, **about, **fields)


def from_folder(
    path: str | Path, *, classes: Sequence[str] | None = None, patient_pattern: str = ""
) -> Dataset:
    """Your own images as a data set under the folder's name: a folder for each class.

    The class folders may lie below train/, val/ and test/, which are then the split; without them
    `split` is "". One CSV with a column `file` (paths below `path`) may lie in the folder: its
    column `label` replaces the class folders, `patient` names the patients, `split` the split, and
    images that it does not list are ignored. Labels count from 0 in the order of `classes`, without
    it healthy first, then by name. `patient_pattern` is a regular expression searched in each
    image's path: its group `patient`, or the first one, is the patient; with neither, each image is
    a patient of its own. Errors: `DataNotFound`; `BadData` naming the rows; `ValueError`.

    >>> import tempfile
    >>> from PIL import Image
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

    `annotations` is a CSV with a row for each box: `file`, `label`, and the corners x1, y1, x2, y2
    (or xmin, x_min, ...) in pixels of the upright image; a row without corners and label is an
    image without boxes. Or it is a COCO JSON. `patient` and `split` may stand in either; without a
    split every image is in train. The rest is as for `from_folder`; label k is
    `box_classes[k - 1]`, and an image's class is that of its rarest box.

    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("L", (20, 10)).save(folder / "1.png")
    >>> _ = (folder / "boxes.csv").write_text("file,label,x1,y1,x2,y2\\n1.png,mass,2,3,12,9\\n")
    >>> from_boxes(folder / "boxes.csv", folder).boxes.loc[0, ["x1", "y1", "x2", "y2"]].tolist()
    [2.0, 3.0, 12.0, 9.0]
    """
    file = Path(os.path.abspath(Path(annotations).expanduser()))
    options = {"annotations": file, "classes": classes, "patient_pattern": patient_pattern}
    return load(own(images, kind="boxes", options=options))


def summary(dataset: Dataset) -> pd.DataFrame:
    """Images and patients by split and class: columns split, class_name, images, patients."""
    order = pd.CategoricalDtype(["train", "val", "test", ""], ordered=True)
    manifest = dataset.manifest.astype({"split": order})
    groups = manifest.groupby(["split", "class_name"], observed=True)
    table = groups.agg(images=("path", "size"), patients=("patient", "nunique")).reset_index()
    return table.astype({"split": str})


def check(dataset: Dataset) -> pd.DataFrame:
    """Look at each file's header, without decoding: columns path, problem (empty: all is well)."""
    paths = [] if dataset.archive else list(dataset.manifest["path"])
    with ThreadPoolExecutor(8) as pool:
        problems = list(pool.map(lambda path: _file_problem(dataset.root / path), paths))
    rows = [(path, problem) for path, problem in zip(paths, problems, strict=True) if problem]
    return pd.DataFrame(rows, columns=["path", "problem"])


def _file_problem(path: Path) -> str:
    try:
        with open_image(path):
            return ""
    except BadImage as error:
        return str(error)


def problem_text(problems: pd.DataFrame, shown: int = SHOWN) -> str:
    """The message of a `BadData` error: the first files, the number of the rest, and the fix."""
    lines = [f"  {row.path}: {row.problem}" for row in problems.head(shown).itertuples()]
    more = [f"  ... and {len(problems) - shown} more"] if len(problems) > shown else []
    fix = "Fix: as said; else copy them again, or delete them (`data check` lists all)."
    return "\n".join([f"{len(problems)} unusable files:", *lines, *more, fix])


def lengths(dataset: Dataset) -> list[tuple[str, int]]:
    """Path and length of each file (of an archive: check sums): what the data are known by."""
    paths = dataset.manifest["path"].tolist()
    if dataset.archive:
        return [*medmnist.sums(dataset.archive), *((path, 0) for path in paths)]
    return [(path, os.stat(dataset.root / path).st_size) for path in paths]


def take(dataset: Dataset, rows: Sequence[int] | np.ndarray) -> Dataset:
    """Only the images of `rows`, numbered anew in that order, with all that is marked on them."""
    rows = np.asarray(rows, dtype=np.int64)
    number, marked = pd.Series(np.arange(len(rows)), index=rows), {}
    for name in ("boxes", "outlines", "masks"):
        kept = getattr(dataset, name)
        kept = kept[kept["image"].isin(rows)]
        kept = kept.assign(image=kept["image"].map(number).astype("int64"))
        marked[name] = kept.sort_values("image", kind="stable", ignore_index=True)
    return replace(dataset, manifest=dataset.manifest.iloc[rows].reset_index(drop=True), **marked)


def boxed(dataset: Dataset) -> Dataset:
    """Only the images that have boxes, numbered anew."""
    return take(dataset, np.unique(dataset.boxes["image"].to_numpy(dtype=np.int64)))


def box_summary(dataset: Dataset) -> pd.DataFrame:
    """Number and size of the boxes of each class, in pixels of the original files.

    Columns class_name, boxes, images, patients, share (of the boxed images), width and height
    (medians), side_min, side_median, side_max (square roots of the areas).
    """
    boxes = dataset.boxes.join(dataset.manifest["patient"], on="image")
    boxes = boxes.assign(width=boxes["x2"] - boxes["x1"], height=boxes["y2"] - boxes["y1"])
    groups = boxes.assign(side=np.sqrt(boxes["width"] * boxes["height"])).groupby("label")
    counts = dict(boxes=("image", "size"), images=("image", "nunique"))
    counts |= dict(patients=("patient", "nunique"))
    medians = dict(width=("width", "median"), height=("height", "median"))
    sides = {f"side_{how}": ("side", how) for how in ("min", "median", "max")}
    table = groups.agg(**counts, **medians, **sides).reindex(range(1, len(dataset.box_classes) + 1))
    table[list(counts)] = table[list(counts)].fillna(0).astype("int64")
    table.insert(3, "share", table["images"] / max(boxes["image"].nunique(), 1))
    table.insert(0, "class_name", list(dataset.box_classes))
    return table.reset_index(drop=True)
