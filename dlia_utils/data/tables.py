"""What every layout is read into, and the checks on files, boxes and outlines that the layouts share."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image

log = logging.getLogger("dlia_utils")

COLUMNS = ("path", "label", "class_name", "patient", "group", "split")
BOX_COLUMNS = ("image", "x1", "y1", "x2", "y2", "label", "class_name")
CORNERS = ["x1", "y1", "x2", "y2"]
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
SHOWN = 20  # How many names an error message lists before it only counts.
SLACK = (
    1.0  # A box may stick out of its image by this many pixels: it is clipped. More is an error.
)
REPAIR = "unpack the whole archive again (see data/README.md)"


class DataNotFound(FileNotFoundError):
    """No folder with the data set's tree where the user said it is."""


class BadData(ValueError):
    """Files or folders of the data set that cannot be used; the message lists them and says what to do."""


def no_boxes() -> pd.DataFrame:
    """An empty box table: the columns `BOX_COLUMNS` with their types.

    >>> no_boxes().dtypes["image"].name, no_boxes().dtypes["x1"].name, len(no_boxes())
    ('int64', 'float64', 0)
    """
    types = {"image": "int64", "label": "int64", "class_name": "str"}
    return pd.DataFrame({name: pd.Series(dtype=types.get(name, "float64")) for name in BOX_COLUMNS})


def no_outlines() -> pd.DataFrame:
    """An empty outline table: columns image, label, points (float64 [n,2]: x, y), one row a polygon.

    >>> [str(kind) for kind in no_outlines().dtypes]
    ['int64', 'int64', 'object']
    """
    types = {"image": "int64", "label": "int64", "points": "object"}
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in types.items()})


def no_masks() -> pd.DataFrame:
    """An empty mask table: columns image, path (of a file that shows an organ of that film).

    >>> list(no_masks().columns), no_masks().dtypes["image"].name
    (['image', 'path'], 'int64')
    """
    return pd.DataFrame({"image": pd.Series(dtype="int64"), "path": pd.Series(dtype="str")})


@dataclass(frozen=True)
class Tables:
    """What a layout holds; the fields are those of `datasets.Dataset` that bear their names."""

    manifest: pd.DataFrame
    classes: tuple[str, ...]
    ignored: pd.DataFrame
    split_rule: str = "official"
    boxes: pd.DataFrame = field(default_factory=no_boxes)
    box_classes: tuple[str, ...] = ()
    mapping: pd.DataFrame | None = None
    outlines: pd.DataFrame = field(default_factory=no_outlines)
    masks: pd.DataFrame = field(default_factory=no_masks)


# --- files and folders


def walk(root: Path) -> list[PurePosixPath]:
    """Every file below `root`, relative and sorted, so that row numbers do not depend on the file system."""
    found = []
    for folder, _, names in os.walk(root):
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found.extend(relative / name for name in names)
    return sorted(found)


def image_files(
    root: Path, folder: Callable[[PurePosixPath], str], *, known: Iterable[str] = ()
) -> tuple[dict[tuple[str, str], str], list[tuple[str, str]]]:
    """Images by (kind of folder, name), and (path, reason) of the rest; `folder` gives the kind or ""."""
    found: dict[tuple[str, str], str] = {}
    ignored = []
    for path in walk(root):
        if str(path) in known:
            continue
        kind = folder(path)
        if reason := junk_reason(path):
            pass
        elif not kind:
            reason = "outside the image folders"
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            reason = "not named like an image"
        elif (kind, path.name) in found:
            reason = "second copy of an image"
        else:
            found[kind, path.name] = str(path)
            continue
        ignored.append((str(path), reason))
    return found, ignored


def sort_files(
    root: Path, reason: Callable[[PurePosixPath], str]
) -> tuple[list[PurePosixPath], list[tuple[str, str]]]:
    """The images below `root` for which `reason` is "", and (path, reason) of every other file."""
    kept, ignored = [], []
    for path in walk(root):
        named = path.suffix.lower() in IMAGE_SUFFIXES
        if why := junk_reason(path) or reason(path) or ("" if named else "not named like an image"):
            ignored.append((str(path), why))
        else:
            kept.append(path)
    return kept, ignored


def junk_reason(path: PurePosixPath) -> str:
    """Why a file is litter whatever the data set; "" when it is not."""
    if "__MACOSX" in path.parts:
        return "macOS archive litter (__MACOSX)"
    if path.name.startswith("._"):
        return "macOS resource fork (._*)"
    if path.name.lower() in (".ds_store", "thumbs.db", "desktop.ini"):
        return "folder settings of the operating system"
    if any(part.startswith(".") for part in path.parts):
        return "hidden file or folder"
    return ""


def need_folders(root: Path, folders: Sequence[str]) -> None:
    """`DataNotFound` naming the folders that `root` lacks."""
    missing = [folder for folder in folders if not (root / folder).is_dir()]
    if missing:
        raise DataNotFound(f"{root} has no {', '.join(missing)}: {REPAIR}")


def need_images(
    manifest: pd.DataFrame, root: Path, splits: Sequence[str], classes: tuple[str, ...]
) -> None:
    """`BadData` naming every class folder without images; `splits` is [""] where there are none."""
    have = set(zip(manifest["split"], manifest["class_name"], strict=True))
    empty = [f"{split}/{name}" for split in splits for name in classes if (split, name) not in have]
    if empty:
        empty = [name.lstrip("/") for name in empty]  # Where there are no splits.
        hint = (
            "; val/ may be left out altogether"
            if any(name.startswith("val/") for name in empty)
            else ""
        )
        raise BadData(
            f"{root}: no images in {', '.join(empty)}. Fix: unpack the whole archive again{hint}."
        )


def absent(names: Iterable[str], found: dict[tuple[str, str], str], kind: str) -> list[str]:
    """The names, sorted, that `image_files` has not found in that kind of folder."""
    return sorted(name for name in set(names) if (kind, name) not in found)


def gap_text(missing: Sequence[str], total: int, what: str) -> str:
    """How many images are missing, in words; "" when none."""
    return f"{len(missing)} of the {total} {what} images are missing" if missing else ""


def need_files(
    missing: Sequence[str], total: int, what: str, root: Path, *, allow_missing: bool
) -> None:
    """`BadData` for missing images; with `allow_missing` a warning, unless all are missing."""
    if not missing:
        return
    text = f"{root}: {gap_text(missing, total, what)}, first: {', '.join(missing[:3])}"
    if not allow_missing or len(missing) == total:
        raise BadData(
            f"{text}; fix: {REPAIR}, or load the rest with datasets.load(location, allow_missing=True)"
        )
    log.warning("%s; the other %d are used", text, total - len(missing))


# --- tables


def manifest_table(rows: Sequence[tuple]) -> pd.DataFrame:
    """The manifest of rows that have the columns `COLUMNS`."""
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"label": "int64"})


def ignored_table(rows: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """The table of (path, reason) of what is not read."""
    return pd.DataFrame(rows, columns=["path", "reason"])


def need_columns(table: pd.DataFrame, names: Sequence[str], path: Path) -> None:
    """`BadData` naming the columns that a file lacks."""
    if missing := [name for name in names if name not in table.columns]:
        raise BadData(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}. "
            "Fix: copy the file again from the original data set."
        )


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV file whose rows may end in more commas than its header."""
    # index_col=False: where the rows end in more commas than the header, pandas would shift the columns.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)
        return pd.read_csv(path, index_col=False).rename(columns=lambda name: str(name).strip())


def box_table(
    raw: pd.DataFrame,
    file: Path,
    classes: tuple[str, ...],
    row_of: dict[str, int],
    shapes: dict[str, tuple[int, int]],
) -> pd.DataFrame:
    """The box table of the images in `row_of`, clipped to them; every row of `raw` is checked first."""
    limits = pd.DataFrame(
        [shapes.get(name, (float("inf"), float("inf"))) for name in raw["name"]],
        columns=["height", "width"],
        index=raw.index,
        dtype="float64",
    )
    _refuse_boxes(raw, limits, file, classes)
    kept = raw["name"].isin(list(row_of))
    boxes, limits = raw[kept].copy(), limits[kept]
    for low, high, side in (("x1", "x2", "width"), ("y1", "y2", "height")):
        boxes[low] = boxes[low].clip(lower=0)
        boxes[high] = boxes[high].clip(upper=limits[side])
    boxes["image"] = boxes["name"].map(row_of).astype("int64")
    boxes["label"] = (
        boxes["class_name"].map({name: k for k, name in enumerate(classes, 1)}).astype("int64")
    )
    return boxes.sort_values(["image", "label", *CORNERS], ignore_index=True)[list(BOX_COLUMNS)]


def _refuse_boxes(
    raw: pd.DataFrame, limits: pd.DataFrame, file: Path, classes: tuple[str, ...]
) -> None:
    """Raise `BadData` naming every row that is no box of a known class inside its image."""
    outside = (raw["x2"] > limits["width"] + SLACK) | (raw["y2"] > limits["height"] + SLACK)
    identity = ["name", "class_name", *CORNERS]
    tests = [
        (raw["name"] == "", "names no image"),
        (~raw["class_name"].isin(classes), f"unknown label (known: {', '.join(classes)})"),
        (raw[CORNERS].isna().any(axis=1), "a coordinate is not a number"),
        ((raw["x2"] <= raw["x1"]) | (raw["y2"] <= raw["y1"]), "no width or no height"),
        (((raw["x1"] < -SLACK) | (raw["y1"] < -SLACK)), "a coordinate is negative"),
        (outside, "reaches out of its image"),
        (raw.duplicated(identity), "the same box stands above already"),
    ]
    problems = []
    for position, (wrong, what) in enumerate(tests):
        for row in raw[wrong].itertuples():
            corners = ", ".join(f"{getattr(row, name):g}" for name in CORNERS)
            text = f"  {row.where}: {row.name} {row.class_name} [{corners}]: {what}"
            problems.append((row.Index, position, text))
    refuse(
        f"{file}: {len(problems)} unusable rows (corners x1, y1, x2, y2):",
        [text for *_, text in sorted(problems)],
        "correct or delete these rows, or copy the file again from the original data set",
    )


def refuse(head: str, lines: Sequence[str], fix: str) -> None:
    """`BadData` of the problems in `lines`, cut after `SHOWN`; nothing when there are none."""
    if lines:
        more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise BadData("\n".join([head, *lines[:SHOWN], *more, f"Fix: {fix}."]))


def outline_table(
    raw: Sequence[tuple[str, str, np.ndarray, str]],
    file: Path,
    classes: tuple[str, ...],
    row_of: dict[str, int],
    shapes: dict[str, tuple[int, int]],
) -> pd.DataFrame:
    """The outline table of the images in `row_of`, clipped to them, of rows (name, class_name, points, where).

    Every row is checked first, whether its image is there or not.
    """
    rows, problems = [], []
    for name, class_name, points, where in raw:
        height, width = shapes.get(name, (np.inf, np.inf))
        if class_name not in classes:
            wrong = f"unknown label {class_name} (known: {', '.join(classes)})"
        elif (
            points.ndim != 2
            or points.shape[1:] != (2,)
            or len(points) < 3
            or not np.isfinite(points).all()
        ):
            wrong = "no polygon of three or more points"
        elif (points < -SLACK).any() or (points > np.add((width, height), SLACK)).any():
            wrong = "the outline reaches out of its image"
        else:
            wrong = ""
        if wrong:
            problems.append(f"  {where}: {name}: {wrong}")
        elif name in row_of:
            rows.append(
                (row_of[name], classes.index(class_name) + 1, np.clip(points, 0, (width, height)))
            )
    fix = "correct or delete these outlines, or copy the file again from the original data set"
    refuse(f"{file}: {len(problems)} unusable outlines:", problems, fix)
    if not rows:
        return no_outlines()
    table = pd.DataFrame(rows, columns=["image", "label", "points"])
    return table.sort_values(["image", "label"], kind="stable", ignore_index=True)


def trace(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines of a mask [h,w] along the edges of its pixels: float64 [n,2] of x, y each; holes are filled.

    Parts that touch at a corner have one outline.

    >>> mask = np.zeros((4, 5), bool)
    >>> mask[1:3, 1:4] = True
    >>> trace(mask)[0].tolist()
    [[1.0, 1.0], [1.0, 3.0], [4.0, 3.0], [4.0, 1.0]]
    """
    import cv2  # It comes with albumentations, and nothing else here needs it.

    mask = np.asarray(mask, dtype=np.uint8)
    height, width = mask.shape
    # OpenCV joins the centres of pixels. On a grid twice as fine a pixel covers its corners and edges too, so that
    # the outermost of these "centres" lie on the edges of the mask.
    fine = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    for down in range(3):
        for across in range(3):
            fine[down : down + 2 * height : 2, across : across + 2 * width : 2] |= mask
    found = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
    return [one.reshape(-1, 2) / 2 for one in found if len(one) > 2]


def shapes_of(root: Path, paths: dict[str, str]) -> dict[str, tuple[int, int]]:
    """(height, width) by name; a file that cannot be read is left out (`datasets.check` names it)."""

    def shape(path: str) -> tuple[int, int] | None:
        try:
            with Image.open(root / path) as image:
                return upright_shape(image)
        except OSError:
            return None

    with ThreadPoolExecutor(8) as pool:
        shapes = zip(paths, pool.map(shape, paths.values()), strict=True)
        return {name: found for name, found in shapes if found}


def need_sizes(
    annotated: dict[str, tuple[int, int]], shapes: dict[str, tuple[int, int]], file: Path
) -> None:
    """The images must have the size that they were annotated in; else every box would be off."""
    wrong = [
        f"  {name}: {annotated[name][1]} x {annotated[name][0]} in the file, {shape[1]} x {shape[0]} on disk"
        for name, shape in shapes.items()
        if name in annotated
        and max(abs(a - b) for a, b in zip(annotated[name], shape, strict=True)) > SLACK
    ]
    refuse(
        f"{file}: {len(wrong)} images do not have the size that they were annotated in:",
        wrong,
        "use the images of the same archive, or scale the boxes in this file with them",
    )


def upright_shape(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image the right way up, from its header alone."""
    return (image.width, image.height) if orientation(image) >= 5 else (image.height, image.width)


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image: 1 is upright, 5 to 8 swap the sides. A PNG counts as upright."""
    # Pillow would decode a whole PNG to look for the tag.
    return 1 if image.format == "PNG" else image.getexif().get(0x0112, 1)
