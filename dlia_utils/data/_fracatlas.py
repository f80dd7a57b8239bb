"""FracAtlas in its two published layouts: the original one and DatasetNinja's (Supervisely)."""

from __future__ import annotations

import base64
import io
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image

from .tables import (
    CORNERS,
    REPAIR,
    BadData,
    DataNotFound,
    Tables,
    box_table,
    ignored_table,
    image_files,
    junk_reason,
    manifest_table,
    need_columns,
    need_folders,
    need_sizes,
    outline_table,
    read_csv,
    refuse,
    shapes_of,
    trace,
    walk,
)

log = logging.getLogger("dlia_utils")

CLASSES = ("Non_fractured", "Fractured")
TABLE = "dataset.csv"
BOXES = "Annotations/COCO JSON/COCO_fracture_masks.json"
SPLITS = {name: f"Utilities/Fracture Split/{name}.csv" for name in ("train", "valid", "test")}
NINJA_SPLITS = {
    "train": "train",
    "val": "val",
    "test": "test",
    "not fractured": "",
}  # folder: split
SPELLINGS = {"fractured": "fracture"}

RawOutline = tuple[str, str, np.ndarray, str]  # name, class_name, points [n,2], where


def fracatlas(root: Path) -> Tables:
    """FracAtlas, Abedeen et al., Scientific Data 2023, original or DatasetNinja layout: 717 of 4,083 fractured.

    Original layout: the class is dataset.csv's `fractured`, and Fractured wherever an image has a fracture
    box: the flag of IMG0003298.jpg says 0 against its own fracture_count, folder, box and split. Boxes and
    outlines come from the COCO file; `group` is the body part. Only images that are there count.
    DatasetNinja layout: train/, val/, test/ (fractured) and `not fractured/`, each with img/ and ann/, a JSON
    file for each image with rectangles (boxes) and polygons or bitmaps (outlines, without their holes). The
    class is the folder's, and Fractured wherever an object is marked; `group` is "".
    In both the official split names the fractured images only; `split` is "" for the others. There are no
    patient numbers: each image counts as a patient. Corners and outlines refer to the image the right way up
    (EXIF orientation applied), as the annotators saw it. Errors: `BadData` for unusable boxes or outlines, an
    image of another size than the one annotated, an image in two splits and (DatasetNinja) images and
    annotations that do not match; `DataNotFound` for a missing file or folder.
    """
    return _ninja(root) if (root / "not fractured" / "ann").is_dir() else _original(root)


def _original(root: Path) -> Tables:
    needed = [TABLE, BOXES, *SPLITS.values()]
    if missing := [name for name in needed if not (root / name).is_file()]:
        raise DataNotFound(f"{root} has no {', '.join(missing)}: {REPAIR}")
    found, ignored = image_files(root, _image_folder, known=needed)
    table = pd.read_csv(root / TABLE)
    need_columns(table, ("image_id", "fractured", "hand", "leg", "hip", "shoulder"), root / TABLE)
    table = table.drop_duplicates("image_id").set_index("image_id")
    raw, outlines, annotated = _coco_rows(root / BOXES)
    unlisted = [path for (_, name), path in found.items() if name not in table.index]
    ignored += [(path, f"not listed in {TABLE}") for path in unlisted]
    paths = {name: path for (_, name), path in sorted(found.items()) if name in table.index}
    boxed = set(raw["name"])
    flags = {name: bool(table.at[name, "fractured"]) for name in paths}
    _say_contradictions([(name, path, flags[name], name in boxed) for name, path in paths.items()])
    if lost := sorted(boxed - set(paths)):
        log.warning("%d images with a box are not there, first: %s", len(lost), ", ".join(lost[:3]))
    split_of = _official_split(root)
    images = [
        (
            name,
            path,
            flags[name] or name in boxed,
            _body_part(table.loc[name]),
            split_of.get(name, ""),
        )
        for name, path in paths.items()
    ]
    return _tables_of(root, root / BOXES, images, ignored, raw, outlines, annotated)


def _ninja(root: Path) -> Tables:
    need_folders(root, [f"{folder}/{kind}" for folder in NINJA_SPLITS for kind in ("img", "ann")])
    listed = [path for path in walk(root) if _ninja_folder(path, "ann") and path.suffix == ".json"]
    notes = [path for path in listed if not junk_reason(path)]
    found, ignored = image_files(
        root, lambda path: _ninja_folder(path, "img"), known=set(map(str, notes))
    )
    _need_partners(root, found, notes)
    twice = [name for name, count in Counter(name for _, name in found).items() if count > 1]
    fix = "keep the image and its annotation in one of the folders"
    refuse(
        f"{root}: {len(twice)} images lie in two of the folders:",
        [f"  {name}" for name in twice],
        fix,
    )
    raw, outlines, annotated = _ninja_rows(root, notes)
    marked = {*raw["name"], *(name for name, *_ in outlines)}
    images = []
    for (folder, name), path in sorted(found.items(), key=lambda item: item[0][1]):
        if (folder != "not fractured") != (name in marked):
            what = "an" if name in marked else "no"
            log.warning("%s lies in %s and has %s object: taken as Fractured", name, folder, what)
        images.append(
            (name, path, folder != "not fractured" or name in marked, "", NINJA_SPLITS[folder])
        )
    return _tables_of(root, root, images, ignored, raw, outlines, annotated)


def _tables_of(
    root: Path,
    file: Path,
    images: Sequence[tuple[str, str, bool, str, str]],
    ignored: Sequence[tuple[str, str]],
    raw: pd.DataFrame,
    outlines: Sequence[RawOutline],
    annotated: dict[str, tuple[int, int]],
) -> Tables:
    """Tables of either layout; `images` holds (name, path, fractured, group, split)."""
    rows = [
        (path, int(fractured), CLASSES[fractured], PurePosixPath(name).stem, group, split)
        for name, path, fractured, group, split in images
    ]
    row_of = {name: row for row, (name, *_) in enumerate(images)}
    marked = {*raw["name"], *(name for name, *_ in outlines)}
    shapes = shapes_of(root, {name: path for name, path, *_ in images if name in marked})
    need_sizes(annotated, shapes, file)
    return Tables(
        manifest_table(rows),
        CLASSES,
        ignored_table(ignored),
        boxes=box_table(raw, file, ("fracture",), row_of, shapes),
        box_classes=("fracture",),
        outlines=outline_table(outlines, file, ("fracture",), row_of, shapes),
    )


def _image_folder(path: PurePosixPath) -> str:
    # Some copies hold images/All_Images as well, or only that: one kind, so a name counts once.
    return "image" if len(path.parts) == 3 and path.parts[0] == "images" else ""


def _ninja_folder(path: PurePosixPath, kind: str) -> str:
    """The split folder of a file in its img/ or ann/ (`kind`); "" elsewhere."""
    inside = len(path.parts) == 3 and path.parts[0] in NINJA_SPLITS and path.parts[1] == kind
    return path.parts[0] if inside else ""


def _need_partners(
    root: Path, found: Iterable[tuple[str, str]], notes: Sequence[PurePosixPath]
) -> None:
    """`BadData` unless every image (folder, name) has its annotation file, and the other way round."""
    images = {f"{folder}/ann/{name}.json" for folder, name in found}
    annotations = set(map(str, notes))
    problems = [
        f"  {path} names an image that is not there" for path in sorted(annotations - images)
    ]
    problems += [
        f"  {path} is missing: its image is there" for path in sorted(images - annotations)
    ]
    fix = f"{REPAIR}, or delete the files without a partner"
    refuse(f"{root}: {len(problems)} images and annotations do not match:", problems, fix)


def _coco_rows(path: Path) -> tuple[pd.DataFrame, list[RawOutline], dict[str, tuple[int, int]]]:
    """Raw boxes and raw outlines of a COCO file, and the (height, width) that it gives for each image."""
    coco = json.loads(path.read_text(encoding="utf-8"))
    images = {one["id"]: one for one in coco["images"]}
    kinds = {one["id"]: SPELLINGS.get(one["name"], one["name"]) for one in coco["categories"]}
    rows, outlines, coded = [], [], 0
    for one in coco["annotations"]:
        x, y, width, height = one["bbox"]
        name = images[one["image_id"]]["file_name"] if one["image_id"] in images else ""
        kind = kinds.get(one["category_id"], str(one["category_id"]))
        where = f"annotation {one['id']}"
        rows.append((name, kind, x, y, x + width, y + height, where))
        polygons = one.get("segmentation") or []
        if isinstance(polygons, dict):
            coded += 1
        else:
            outlines += [(name, kind, _points(flat), where) for flat in polygons]
    if coded:
        log.warning(
            "%s: %d outlines are run-length coded and not read (only polygons are)", path, coded
        )
    shapes = {one["file_name"]: (one["height"], one["width"]) for one in images.values()}
    return _raw_boxes(rows), outlines, shapes


def _points(flat: Sequence[float]) -> np.ndarray:
    """COCO's x1, y1, x2, y2, ... as float64 [n,2]; an odd number of them is left flat, and refused later."""
    numbers = np.asarray(flat, dtype=np.float64)
    return numbers if numbers.size % 2 else numbers.reshape(-1, 2)


def _raw_boxes(rows: Sequence[tuple]) -> pd.DataFrame:
    """Raw boxes from rows (name, class_name, x1, y1, x2, y2, where)."""
    raw = pd.DataFrame(rows, columns=["name", "class_name", *CORNERS, "where"])
    return raw.astype(dict.fromkeys(CORNERS, "float64"))


def _ninja_rows(
    root: Path, notes: Sequence[PurePosixPath]
) -> tuple[pd.DataFrame, list[RawOutline], dict[str, tuple[int, int]]]:
    """As `_coco_rows`, of one Supervisely JSON file for each image."""
    rows, outlines, shapes, problems = [], [], {}, []
    for path in notes:
        name = path.name.removesuffix(".json")
        try:
            note = json.loads((root / path).read_text(encoding="utf-8"))
            shapes[name] = int(note["size"]["height"]), int(note["size"]["width"])
            for number, one in enumerate(note["objects"]):
                where = f"{path} object {number}"
                kind = SPELLINGS.get(one["classTitle"].lower(), one["classTitle"])
                if one["geometryType"] == "rectangle":
                    (xa, ya), (xb, yb) = one["points"]["exterior"]
                    rows.append(
                        (name, kind, min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb), where)
                    )
                elif one["geometryType"] == "polygon":
                    points = np.asarray(one["points"]["exterior"], dtype=np.float64)
                    outlines.append((name, kind, points, where))
                elif one["geometryType"] == "bitmap":
                    outlines += [
                        (name, kind, points, where) for points in _bitmap_outlines(one["bitmap"])
                    ]
                else:
                    shape = one["geometryType"]
                    problems.append(f"  {where}: {shape} is none of rectangle, polygon, bitmap")
        except (KeyError, TypeError, AttributeError) as error:
            problems.append(
                f"  {path}: not in Supervisely's format ({type(error).__name__}: {error})"
            )
        except (ValueError, OSError, zlib.error) as error:
            problems.append(f"  {path}: cannot be read ({error})")
    refuse(f"{root}: {len(problems)} unusable annotations:", problems, REPAIR)
    return _raw_boxes(rows), outlines, shapes


def _bitmap_outlines(bitmap: dict) -> list[np.ndarray]:
    """Outlines of a Supervisely bitmap: base64 of a zlib stream of a PNG, placed at `origin` (x, y)."""
    png = zlib.decompress(base64.b64decode(bitmap["data"]))
    with Image.open(io.BytesIO(png)) as image:
        # What counts is the opacity; an image without any is a mask by its grey values.
        shown = "A" in image.getbands() or "transparency" in image.info
        mask = (
            np.asarray(image.convert("RGBA").getchannel("A") if shown else image.convert("L")) > 0
        )
    return [points + np.asarray(bitmap["origin"], dtype=np.float64) for points in trace(mask)]


def _official_split(root: Path) -> dict[str, str]:
    split_of: dict[str, str] = {}
    for name, file in SPLITS.items():
        table = read_csv(root / file)
        need_columns(table, ("image_id",), root / file)
        for image in table["image_id"]:
            if image in split_of:
                raise BadData(
                    f"{root / file}: {image} is in another split already. Fix: keep it in one."
                )
            split_of[image] = "val" if name == "valid" else name
    return split_of


def _body_part(row: pd.Series) -> str:
    parts = [name for name in ("hand", "leg", "hip", "shoulder") if row[name]]
    return parts[0] if len(parts) == 1 else "mixed"


def _say_contradictions(images: Sequence[tuple[str, str, bool, bool]]) -> None:
    """Name the images (name, path, flag, has a box) whose flag, folder and boxes do not say the same."""
    for name, path, flag, boxed in images:
        folder = PurePosixPath(path).parent.name
        by_folder = {"Fractured": True, "Non_fractured": False}.get(folder, flag)
        if not flag == by_folder == boxed:
            log.warning(
                "%s: %s says fractured=%d, its folder is %s, and it has %s box: taken as %s",
                name,
                TABLE,
                flag,
                folder,
                "a" if boxed else "no",
                "Fractured" if flag or boxed else "Non_fractured",
            )
