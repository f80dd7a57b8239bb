"""Each published layout is read into plain tables: images, what was ignored, boxes, a competition's ids."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pandas as pd
from PIL import Image

log = logging.getLogger("dlia_utils")

COLUMNS = ("path", "label", "class_name", "patient", "group", "split")
BOX_COLUMNS = ("image", "x1", "y1", "x2", "y2", "label", "class_name")
# The order is part of every detection result: label k is NIH_CLASSES[k - 1], and 0 is the background.
NIH_CLASSES = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltrate",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
)
NIH_SPELLINGS = {"Infiltration": "Infiltrate"}  # Data_Entry_2017.csv and some copies write it out.
UNLABELLED = "unlabelled"  # class_name of a competition's test image; its label is -1
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
SHOWN = 20  # How many names an error message lists before it only counts.
SLACK = 1.0  # A box may stick out of its image by this many pixels: it is clipped. More is an error.

CORNERS = ["x1", "y1", "x2", "y2"]
NIH_BOXES = "BBox_List_2017.csv"
DLIA_TRAIN, DLIA_MAPPING = "train.csv", "ID_to_Image_Mapping.csv"
FRACATLAS_TABLE = "dataset.csv"
FRACATLAS_BOXES = "Annotations/COCO JSON/COCO_fracture_masks.json"
FRACATLAS_SPLITS = {name: f"Utilities/Fracture Split/{name}.csv" for name in ("train", "valid", "test")}
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


def read(dataset: str, root: Path, **options: bool) -> Tables:
    """Read `root` as the layout named `dataset`; `options` that are True go to its function.

    Errors: `ValueError` for an option that this layout does not have, else those of the layout.
    """
    layout = LAYOUTS[dataset]
    given = {name: True for name, value in options.items() if value}
    if unknown := [name for name in given if name not in inspect.signature(layout).parameters]:
        raise ValueError(f"{dataset} has no option {', '.join(unknown)}; leave it out")
    return layout(root, **given)


def pneumonia(root: Path) -> Tables:
    """Chest X-Ray Images (Pneumonia), Kermany et al. 2018.

    `root` holds train/, test/ and perhaps val/ (16 images), each with NORMAL/ and PNEUMONIA/. The published
    archive also carries a second copy in chest_xray/chest_xray and Finder's litter: listed in `ignored`,
    never read.
    """
    classes = ("NORMAL", "PNEUMONIA")
    splits = [name for name in ("train", "val", "test") if name != "val" or (root / name).is_dir()]
    _need_folders(root, [f"{split}/{name}" for split in splits for name in classes])
    rows, ignored = [], []
    for path in _walk(root):
        reason = _junk_reason(path) or _class_folder_reason(path, splits, classes)
        if reason:
            ignored.append((str(path), reason))
        else:
            patient, group = pneumonia_patient(path.name)
            rows.append(
                (str(path), classes.index(path.parts[1]), path.parts[1], patient, group, path.parts[0])
            )
    manifest = _manifest(rows)
    _need_images(manifest, root, splits, classes)
    _say_odd(manifest)
    return Tables(manifest, classes, _ignored(ignored))


def pneumonia_patient(name: str) -> tuple[str, str]:
    """Patient and group read from a file name of the pneumonia set.

    The number N of `personN_bacteria_M` and `personN_virus_M` is taken for one patient, the careful reading:
    nothing published says whether the numbers of the two kinds are separate. Another name is a patient of its
    own.

    >>> pneumonia_patient("person12_virus_48.jpeg"), pneumonia_patient("NORMAL2-IM-0501-0001-0002.jpeg")
    (('person-12', 'virus'), ('NORMAL2-IM-0501', 'normal'))
    >>> pneumonia_patient("IM-0115-0001.jpeg"), pneumonia_patient("scan.jpeg")
    (('IM-0115', 'normal'), ('scan', 'unknown'))
    """
    if match := re.match(r"person(\d+)_(bacteria|virus)_", name):
        return f"person-{int(match[1])}", match[2]
    if match := re.match(r"((?:NORMAL2-)?IM-\d+)-", name):
        return match[1], "normal"
    return PurePosixPath(name).stem, "unknown"


def nih(root: Path, *, allow_missing: bool = False) -> Tables:
    """NIH ChestX-ray8, the images with boxes: Wang et al., CVPR 2017; 984 boxes on 880 images.

    `root` holds BBox_List_2017.csv and the images in images_001/images to images_012/images, in images/ or
    beside the list. No split is published for the boxes: every image is "train". Errors: `BadData` for
    unusable rows, and when boxed images are missing, unless `allow_missing` keeps those that are there.
    """
    raw = _nih_rows(root / NIH_BOXES)
    found, ignored = _files(root, _nih_folder, known=[NIH_BOXES])
    missing = _missing(raw["name"], found, "train")
    _need_files(missing, raw["name"].nunique(), "boxed", root, allow_missing=allow_missing)
    names = sorted({name for _, name in found} & set(raw["name"]))
    ignored += [(path, "has no box") for (_, name), path in found.items() if name not in set(names)]
    images = [(name, found["train", name], "train") for name in names]
    rule = "none published: every image is in train"
    return _detection_tables(root, NIH_BOXES, raw, images, ignored, split_rule=rule)


def nih_gap(root: Path) -> str:
    """Why the NIH copy in `root` cannot be used: boxed images that are missing; "" when there are none."""
    names = _nih_rows(root / NIH_BOXES)["name"]
    missing = _missing(names, _files(root, _nih_folder)[0], "train")
    return _gap(missing, names.nunique(), "boxed")


def nih_patient(name: str) -> str:
    """Patient of an NIH file name: its first eight characters; another name is a patient of its own.

    >>> nih_patient("00013118_008.png"), nih_patient("film.png")
    ('00013118', 'film')
    """
    return name[:8] if re.match(r"\d{8}_", name) else PurePosixPath(name).stem


def dlia(root: Path, *, allow_missing: bool = False, allow_leak: bool = False) -> Tables:
    """The DLIA class competition (cut from the NIH boxes), both editions, told apart by their columns.

    Edition A has the NIH list's header (x, y, w, h) in train.csv and a mapping `id,image_id` where an image
    may have several ids; edition B has `image_id,x_min,y_min,x_max,y_max,label` and a mapping `ID,image_id`.
    Images lie in train/ and test/ (or train_images/, test_images/). Training rows whose image stands in the
    mapping too (edition A has 25 such images) are refused with a warning and listed in `ignored`, unless
    `allow_leak`. Errors: `BadData` for other columns, unusable rows, ids that repeat, and missing images,
    unless `allow_missing` keeps those that are there.
    """
    edition, raw = _dlia_rows(root / DLIA_TRAIN)
    mapping = _dlia_mapping(root / DLIA_MAPPING)
    wanted = {"train": set(raw["name"]), "test": set(mapping["image_id"])}
    found, ignored = _files(root, _dlia_folder, known=[DLIA_TRAIN, DLIA_MAPPING])
    missing = [name for split, names in wanted.items() for name in _missing(names, found, split)]
    total = sum(map(len, wanted.values()))
    _need_files(missing, total, "listed", root, allow_missing=allow_missing)
    leaked = set() if allow_leak else wanted["train"] & wanted["test"]
    if leaked:
        log.warning(
            "%d training images with %d boxes are refused: they stand in the competition's test set too",
            len(leaked),
            int(raw["name"].isin(leaked).sum()),
        )
    images = []
    for (split, name), path in sorted(found.items(), key=lambda item: (item[0][0] == "test", item[0][1])):
        if name not in wanted[split]:
            ignored.append((path, f"not listed in {DLIA_TRAIN if split == 'train' else DLIA_MAPPING}"))
        elif split == "train" and name in leaked:
            ignored.append((path, "its image is in the competition's test set too (leak)"))
        else:
            images.append((name, path, split))
    rule = f"the competition's, edition {edition}" + (", leaked images kept" if allow_leak else "")
    tables = _detection_tables(root, DLIA_TRAIN, raw, images, ignored, split_rule=rule)
    return Tables(**{**vars(tables), "mapping": mapping})


def dlia_gap(root: Path) -> str:
    """Why the competition in `root` cannot be used: images that are missing; "" when there are none."""
    train = _dlia_rows(root / DLIA_TRAIN)[1]["name"]
    test = _dlia_mapping(root / DLIA_MAPPING)["image_id"]
    found = _files(root, _dlia_folder)[0]
    missing = _missing(train, found, "train") + _missing(test, found, "test")
    return _gap(missing, train.nunique() + test.nunique(), "listed")


def fracatlas(root: Path) -> Tables:
    """FracAtlas in its original layout, Abedeen et al., Scientific Data 2023: 717 of 4,083 films fractured.

    The class is dataset.csv's `fractured`, and Fractured wherever an image has a fracture box: the flag of
    IMG0003298.jpg says 0 against its own fracture_count, folder, box and split. The official split names the
    fractured images only; `split` is "" for the others. There are no patient numbers: each image counts as a
    patient. Corners refer to the image the right way up (EXIF orientation applied), as the annotators saw it.
    Only images that are there count. Errors: `BadData` for unusable boxes or an image of another size than
    the one annotated; `DataNotFound` for a missing file.
    """
    classes = ("Non_fractured", "Fractured")
    needed = [FRACATLAS_TABLE, FRACATLAS_BOXES, *FRACATLAS_SPLITS.values()]
    if missing := [name for name in needed if not (root / name).is_file()]:
        raise DataNotFound(f"{root} has no {', '.join(missing)}: {REPAIR}")
    found, ignored = _files(root, _fracatlas_folder, known=needed)
    table = pd.read_csv(root / FRACATLAS_TABLE)
    _need_columns(table, ("image_id", "fractured", "hand", "leg", "hip", "shoulder"), root / FRACATLAS_TABLE)
    table = table.drop_duplicates("image_id").set_index("image_id")
    raw, annotated = _coco_rows(root / FRACATLAS_BOXES)
    images = [(name, path) for (_, name), path in sorted(found.items()) if name in table.index]
    ignored += [
        (path, f"not listed in {FRACATLAS_TABLE}")
        for (_, name), path in found.items()
        if name not in table.index
    ]
    boxed = set(raw["name"])
    flags = {name: bool(table.at[name, "fractured"]) for name, _ in images}
    fractured = {name: flag or name in boxed for name, flag in flags.items()}
    split_of = _fracatlas_split(root)
    rows = [
        (
            path,
            int(fractured[name]),
            classes[fractured[name]],
            PurePosixPath(name).stem,
            _body_part(table.loc[name]),
            split_of.get(name, ""),
        )
        for name, path in images
    ]
    manifest = _manifest(rows)
    _say_contradictions([(name, path, flags[name], name in boxed) for name, path in images])
    if absent := sorted(boxed - set(fractured)):
        log.warning("%d images with a box are not there, first: %s", len(absent), ", ".join(absent[:3]))
    row_of = {name: row for row, (name, _) in enumerate(images)}
    shapes = _shapes(root, {name: path for name, path in images if name in boxed})
    _need_sizes(annotated, shapes, root / FRACATLAS_BOXES)
    boxes = _boxes(raw, root / FRACATLAS_BOXES, ("fracture",), row_of, shapes)
    return Tables(manifest, classes, _ignored(ignored), boxes=boxes, box_classes=("fracture",))


LAYOUTS: dict[str, Callable[..., Tables]] = {
    "pneumonia": pneumonia,
    "nih": nih,
    "dlia": dlia,
    "fracatlas": fracatlas,
}


def upright_shape(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image the right way up, from its header alone."""
    return (image.width, image.height) if orientation(image) >= 5 else (image.height, image.width)


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image: 1 is upright, 5 to 8 swap the sides. A PNG counts as upright."""
    # Pillow would decode a whole PNG to look for the tag.
    return 1 if image.format == "PNG" else image.getexif().get(0x0112, 1)


# --- files and folders


def _walk(root: Path) -> list[PurePosixPath]:
    """Every file below `root`, relative and sorted, so that row numbers do not depend on the file system."""
    found = []
    for folder, _, names in os.walk(root):
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found.extend(relative / name for name in names)
    return sorted(found)


def _files(
    root: Path, folder: Callable[[PurePosixPath], str], *, known: Iterable[str] = ()
) -> tuple[dict[tuple[str, str], str], list[tuple[str, str]]]:
    """Images by (kind of folder, name), and (path, reason) of the rest; `folder` gives the kind or ""."""
    found: dict[tuple[str, str], str] = {}
    ignored = []
    for path in _walk(root):
        if str(path) in known:
            continue
        kind = folder(path)
        if reason := _junk_reason(path):
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


def _nih_folder(path: PurePosixPath) -> str:
    return "train" if re.fullmatch(r"\.|images(_\d+)?(/images)?", str(path.parent)) else ""


def _dlia_folder(path: PurePosixPath) -> str:
    match = re.fullmatch(r"(train|test)(_images)?", str(path.parent))
    return match[1] if match else ""


def _fracatlas_folder(path: PurePosixPath) -> str:
    # Some copies hold images/All_Images as well, or only that: one kind, so a name counts once.
    return "image" if len(path.parts) == 3 and path.parts[0] == "images" else ""


def _junk_reason(path: PurePosixPath) -> str:
    if "__MACOSX" in path.parts:
        return "macOS archive litter (__MACOSX)"
    if path.name.startswith("._"):
        return "macOS resource fork (._*)"
    if path.name.lower() in (".ds_store", "thumbs.db", "desktop.ini"):
        return "folder settings of the operating system"
    if any(part.startswith(".") for part in path.parts):
        return "hidden file or folder"
    return ""


def _class_folder_reason(path: PurePosixPath, splits: list[str], classes: tuple[str, ...]) -> str:
    if path.parts[0] == "chest_xray":
        return "second copy of the data set (nested chest_xray)"
    if path.parts[0] not in splits or len(path.parts) != 3:
        return "outside the split and class folders"
    if path.parts[1] not in classes:
        return "not a class of this data set"
    return "" if path.suffix.lower() in IMAGE_SUFFIXES else "not named like an image"


def _need_folders(root: Path, folders: list[str]) -> None:
    missing = [folder for folder in folders if not (root / folder).is_dir()]
    if missing:
        raise DataNotFound(f"{root} has no {', '.join(missing)}: {REPAIR}")


def _need_images(manifest: pd.DataFrame, root: Path, splits: list[str], classes: tuple[str, ...]) -> None:
    have = set(zip(manifest["split"], manifest["class_name"], strict=True))
    empty = [f"{split}/{name}" for split in splits for name in classes if (split, name) not in have]
    if empty:
        hint = "; val/ may be left out altogether" if any(name.startswith("val/") for name in empty) else ""
        raise BadData(f"{root}: no images in {', '.join(empty)}. Fix: unpack the whole archive again{hint}.")


def _missing(names: Iterable[str], found: dict[tuple[str, str], str], kind: str) -> list[str]:
    return sorted(name for name in set(names) if (kind, name) not in found)


def _gap(missing: Sequence[str], total: int, what: str) -> str:
    return f"{len(missing)} of the {total} {what} images are missing" if missing else ""


def _need_files(missing: Sequence[str], total: int, what: str, root: Path, *, allow_missing: bool) -> None:
    if not missing:
        return
    text = f"{root}: {_gap(missing, total, what)}, first: {', '.join(missing[:3])}"
    if not allow_missing or len(missing) == total:
        raise BadData(
            f"{text}; fix: {REPAIR}, or load the rest with datasets.load(location, allow_missing=True)"
        )
    log.warning("%s; the other %d are used", text, total - len(missing))


def _say_odd(manifest: pd.DataFrame) -> None:
    odd = manifest.loc[manifest["group"] == "unknown", "path"]
    if len(odd):
        log.warning(
            "%d file names tell no patient; each counts as its own: %s", len(odd), ", ".join(odd[:SHOWN])
        )
    val = int((manifest["split"] == "val").sum())
    if 0 < val < 100:
        log.info("the official val split has only %d images: draw a larger one with split.grouped", val)


# --- tables


def _manifest(rows: Sequence[tuple]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"label": "int64"})


def _ignored(rows: Sequence[tuple[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["path", "reason"])


def _need_columns(table: pd.DataFrame, names: Sequence[str], path: Path) -> None:
    if missing := [name for name in names if name not in table.columns]:
        raise BadData(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}. "
            "Fix: copy the file again from the original data set."
        )


def _csv(path: Path) -> pd.DataFrame:
    # index_col=False: where the rows end in more commas than the header, pandas would shift the columns.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)
        return pd.read_csv(path, index_col=False).rename(columns=lambda name: str(name).strip())


def _nih_rows(path: Path) -> pd.DataFrame:
    """The raw boxes of a table with the NIH header, whose `Bbox [x,y,w,h]` its own commas split into four."""
    table = _csv(path)
    columns = ["Image Index", "Finding Label", "Bbox [x", "y", "w", "h]"]  # More, empty ones may follow.
    _need_columns(table, columns, path)
    return _raw(table["Image Index"], table["Finding Label"], table[columns[2:]], xywh=True)


def _dlia_rows(path: Path) -> tuple[str, pd.DataFrame]:
    """Edition ("A" or "B") and raw boxes of the competition's train.csv."""
    table = _csv(path)
    if "Image Index" in table.columns:
        return "A", _nih_rows(path)
    corners = ["x_min", "y_min", "x_max", "y_max"]
    if missing := [name for name in ("image_id", *corners, "label") if name not in table.columns]:
        raise BadData(
            f"{path} is of neither edition: no column {', '.join(missing)} (edition B) and no 'Image Index' "
            f"(edition A); it has {', '.join(table.columns)}. Fix: download the competition's file again."
        )
    return "B", _raw(table["image_id"], table["label"], table[corners], xywh=False)


def _dlia_mapping(path: Path) -> pd.DataFrame:
    table = _csv(path)
    _need_columns(table, ("image_id",), path)
    key = next((name for name in table.columns if name in ("id", "ID")), None)
    if key is None:
        raise BadData(f"{path} has no column id or ID; it has {', '.join(table.columns)}")
    repeated = table.index[table[key].isna() | table["image_id"].isna() | table[key].duplicated()] + 2
    if len(repeated):
        lines = ", ".join(map(str, repeated[:SHOWN]))
        raise BadData(f"{path}: empty or repeated {key} in line {lines}. Fix: download the file again.")
    return table


def _raw(names: pd.Series, labels: pd.Series, sides: pd.DataFrame, *, xywh: bool) -> pd.DataFrame:
    """Raw boxes: columns name, class_name, x1, y1, x2, y2 and where (the line of the CSV file)."""
    numbers = sides.apply(pd.to_numeric, errors="coerce").set_axis(CORNERS, axis=1).astype("float64")
    if xywh:
        numbers["x2"] += numbers["x1"]
        numbers["y2"] += numbers["y1"]
    names, labels = (
        column.astype(object).where(column.notna(), "").astype(str).str.strip() for column in (names, labels)
    )
    lines = [f"line {row + 2}" for row in range(len(numbers))]  # 1 is the header.
    return numbers.assign(name=names, class_name=labels.replace(NIH_SPELLINGS), where=lines)


def _coco_rows(path: Path) -> tuple[pd.DataFrame, dict[str, tuple[int, int]]]:
    """Raw boxes of a COCO file, and the (height, width) that it gives for each image."""
    coco = json.loads(path.read_text(encoding="utf-8"))
    images = {one["id"]: one for one in coco["images"]}
    kinds = {
        one["id"]: "fracture" if one["name"] == "fractured" else one["name"] for one in coco["categories"]
    }
    rows = []
    for one in coco["annotations"]:
        x, y, width, height = one["bbox"]
        name = images[one["image_id"]]["file_name"] if one["image_id"] in images else ""
        kind = kinds.get(one["category_id"], str(one["category_id"]))
        rows.append((name, kind, x, y, x + width, y + height, f"annotation {one['id']}"))
    raw = pd.DataFrame(rows, columns=["name", "class_name", *CORNERS, "where"])
    shapes = {one["file_name"]: (one["height"], one["width"]) for one in images.values()}
    return raw.astype(dict.fromkeys(CORNERS, "float64")), shapes


def _detection_tables(
    root: Path,
    file: str,
    raw: pd.DataFrame,
    images: Sequence[tuple[str, str, str]],
    ignored: Sequence[tuple[str, str]],
    *,
    split_rule: str,
) -> Tables:
    """Tables of a set of NIH findings; `images` holds (name, path, split), of which "test" has no boxes.

    The class of an image is that of its boxes which is rarest in the whole set, so that folds stratified by
    it spread the rare ones.
    """
    labelled = {name: row for row, (name, _, split) in enumerate(images) if split != "test"}
    shapes = _shapes(root, {name: images[row][1] for name, row in labelled.items()})
    boxes = _boxes(raw, root / file, NIH_CLASSES, labelled, shapes)
    frequency = boxes["label"].map(boxes["label"].value_counts())
    rarest = boxes.assign(frequency=frequency).sort_values(["frequency", "label"]).drop_duplicates("image")
    class_of = dict(zip(rarest["image"], rarest["class_name"], strict=True))
    rows = []
    for row, (name, path, split) in enumerate(images):
        class_name = class_of.get(row, UNLABELLED)
        label = NIH_CLASSES.index(class_name) if row in class_of else -1
        rows.append((path, label, class_name, nih_patient(name), "", split))
    return Tables(_manifest(rows), NIH_CLASSES, _ignored(ignored), split_rule, boxes, NIH_CLASSES)


def _boxes(
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
    _refuse_rows(raw, limits, file, classes)
    kept = raw["name"].isin(list(row_of))
    boxes, limits = raw[kept].copy(), limits[kept]
    for low, high, side in (("x1", "x2", "width"), ("y1", "y2", "height")):
        boxes[low] = boxes[low].clip(lower=0)
        boxes[high] = boxes[high].clip(upper=limits[side])
    boxes["image"] = boxes["name"].map(row_of).astype("int64")
    boxes["label"] = boxes["class_name"].map({name: k for k, name in enumerate(classes, 1)}).astype("int64")
    return boxes.sort_values(["image", "label", *CORNERS], ignore_index=True)[list(BOX_COLUMNS)]


def _refuse_rows(raw: pd.DataFrame, limits: pd.DataFrame, file: Path, classes: tuple[str, ...]) -> None:
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
    if problems:
        lines = [text for *_, text in sorted(problems)]
        more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise BadData(
            "\n".join(
                [
                    f"{file}: {len(lines)} unusable rows (corners x1, y1, x2, y2):",
                    *lines[:SHOWN],
                    *more,
                    "Fix: correct or delete these rows, or copy the file again from the original data set.",
                ]
            )
        )


def _shapes(root: Path, paths: dict[str, str]) -> dict[str, tuple[int, int]]:
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


def _need_sizes(
    annotated: dict[str, tuple[int, int]], shapes: dict[str, tuple[int, int]], file: Path
) -> None:
    """The images must have the size that they were annotated in; else every box would be off."""
    wrong = [
        f"  {name}: {annotated[name][1]} x {annotated[name][0]} in the file, {shape[1]} x {shape[0]} on disk"
        for name, shape in shapes.items()
        if name in annotated and max(abs(a - b) for a, b in zip(annotated[name], shape, strict=True)) > SLACK
    ]
    if wrong:
        raise BadData(
            "\n".join(
                [
                    f"{file}: {len(wrong)} images do not have the size that they were annotated in:",
                    *wrong[:SHOWN],
                    "Fix: use the images of the same archive, or scale the boxes in this file with them.",
                ]
            )
        )


def _fracatlas_split(root: Path) -> dict[str, str]:
    split_of: dict[str, str] = {}
    for name, file in FRACATLAS_SPLITS.items():
        table = _csv(root / file)
        _need_columns(table, ("image_id",), root / file)
        for image in table["image_id"]:
            if image in split_of:
                raise BadData(f"{root / file}: {image} is in another split already. Fix: keep it in one.")
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
                FRACATLAS_TABLE,
                flag,
                folder,
                "a" if boxed else "no",
                "Fractured" if flag or boxed else "Non_fractured",
            )
