"""Each published layout is read into the fields of a `Dataset`."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pandas as pd

from ..metrics import exact_ids, missing
from .tables import (
    CORNERS,
    REPAIR,
    SHOWN,
    SLACK,
    BadData,
    DataNotFound,
    box_table,
    open_image,
    rarest_class,
    read_csv,
    refuse,
    shapes_of,
    sort_files,
    tables,
)

log = logging.getLogger("dlia_utils")

# Label k of every detection result is NIH_CLASSES[k - 1], and 0 is the background.
NIH_CLASSES = tuple(
    "Atelectasis Cardiomegaly Effusion Infiltrate Mass Nodule Pneumonia Pneumothorax".split()
)
NIH_BOXES = "BBox_List_2017.csv"
DLIA_TRAIN, DLIA_MAPPING = "train.csv", "ID_to_Image_Mapping.csv"
LEAK = "its image is in the competition's test set too (leak)"
UNLABELLED = "unlabelled"  # class_name of an image without a label, which is then -1
TUBERCULOSIS_CLASSES, COVID_CLASSES = ("Normal", "Tuberculosis"), ("Normal", "COVID")
FRAC_CLASSES = ("Non_fractured", "Fractured")
FRAC_TABLE, FRAC_BOXES = "dataset.csv", "Annotations/COCO JSON/COCO_fracture_masks.json"
FRAC_SPLITS = {one: f"Utilities/Fracture Split/{one}.csv" for one in ("train", "valid", "test")}
NINJA_FOLDERS = ("not fractured", "train", "val", "test")
SPELLINGS = {"Infiltration": "Infiltrate", "fractured": "fracture", "Fractured": "fracture"}
SUFFIXES = (".jpeg", ".jpg", ".png")


# ----------------------------------------------------------------------------------- class folders


def pneumonia(root: Path) -> dict:
    """Chest X-Ray Images (Pneumonia), Kermany et al. 2018: train/, test/ and perhaps val/."""
    fields = class_folders(root, ("NORMAL", "PNEUMONIA"), _pneumonia_patient, splits=True)
    odd = fields["manifest"].query("group == 'unknown'")["path"]
    if len(odd):
        log.warning("%d file names tell no patient, first: %s", len(odd), ", ".join(odd[:3]))
    return fields


def _pneumonia_patient(path: PurePosixPath) -> tuple[str, str]:
    """Patient and group read from a file name of the pneumonia set; another name is its own.

    The number of `personN_bacteria_M` and `personN_virus_M` is taken for one patient, the careful
    reading: nothing published says whether the numbers of the two kinds are separate.

    >>> _pneumonia_patient(PurePosixPath("person12_virus_48.jpeg"))
    ('person-12', 'virus')
    >>> _pneumonia_patient(PurePosixPath("NORMAL2-IM-0501-0001-0002.jpeg"))
    ('NORMAL2-IM-0501', 'normal')
    """
    if match := re.match(r"person(\d+)_(bacteria|virus)_", path.name):
        return f"person-{int(match[1])}", match[2]
    if match := re.match(r"((?:NORMAL2-)?IM-\d+)-", path.name):
        return match[1], "normal"
    return path.stem, "unknown"


def covid(root: Path) -> dict:
    """COVID-19 against normal chests, in either of two trees; each image counts as a patient.

    The COVID-19 Radiography Database (Chowdhury et al. 2020, Rahman et al. 2021): COVID/ and
    Normal/ with images/ and perhaps masks/ of the lungs, read into `masks`; old versions have the
    images in the class folders themselves. No split is published. Or covid_xray: train/, test/ and
    perhaps val/, with normal/ and COVID/ in any case.
    """
    if (root / "train").is_dir():
        return class_folders(root, COVID_CLASSES, splits=True)
    fields = class_folders(root, COVID_CLASSES, below=("images", "masks"))
    table = fields["manifest"]
    table["key"] = table["patient"].str.replace("/(images|masks)/", "/", regex=True)
    of_mask = table["path"].str.contains("^[^/]+/masks/")
    images = table[~of_mask].drop_duplicates("key", keep="last").reset_index(drop=True)
    row_of = pd.Series(images.index, images["key"])
    masks = table.assign(image=table["key"].map(row_of))[of_mask].dropna(subset="image")
    lost, bare = of_mask.sum() - len(masks), len(images) - len(masks)
    if of_mask.any() and (lost or bare):
        log.warning("%s: %d images have no mask, %d masks have no image", root, bare, lost)
    masks = masks[["image", "path"]].astype({"image": "int64"}).sort_values("image")
    extra = table.loc[~table["path"].isin([*images["path"], *masks["path"]]), ["path"]]
    extra = extra.assign(reason="second copy, or a mask without an image")
    ignored = pd.concat([fields["ignored"], extra], ignore_index=True)
    fields |= dict(manifest=images.drop(columns="key"), masks=masks.reset_index(drop=True))
    return fields | dict(ignored=ignored)


def class_folders(
    root: Path,
    classes: Sequence[str],
    patient: Callable = lambda path: (str(path.with_suffix("")), ""),
    *,
    splits: bool = False,
    below: tuple[str, ...] = (),
) -> dict:
    """Images in folders of `classes`, below train, test and perhaps val if `splits`.

    `patient` tells patient and group from a path; `below`: folders inside a class folder that count
    as it. `BadData` for a class without images.
    """
    spelled, level = {name.casefold(): name for name in classes}, int(splits)
    tops = [one for one in ("train", "val", "test") if one != "val" or (root / one).is_dir()]

    def reason(path: PurePosixPath) -> str:
        if path.parts[0] == "chest_xray":
            return "second copy of the data set (nested chest_xray)"
        if splits and path.parts[0] not in tops:
            return "outside the folders of the splits"
        if len(path.parts) > level + 1 and path.parts[level].casefold() not in spelled:
            return "not a class of this data set"
        inside = path.parts[level + 1 : -1] in ((), *((name,) for name in below))
        return "" if inside and len(path.parts) > level + 1 else "outside the class folders"

    (found, ignored), rows = sort_files(root, reason, SUFFIXES), []
    for path in found:
        name, split = spelled[path.parts[level].casefold()], path.parts[0] if splits else ""
        rows.append((str(path), classes.index(name), name, *patient(path), split))
    there = {(row[5], row[2]) for row in rows}
    wanted = [(split, name) for split in (tops if splits else [""]) for name in classes]
    empty = ["no images in " + "/".join(filter(None, one)) for one in wanted if one not in there]
    refuse(f"{root}", empty, REPAIR)
    return tables(rows, classes, ignored, split_rule="official" if splits else "none published")


# ------------------------------------------------------------------------------------------- boxes


def nih(root: Path, *, allow_missing: bool = False) -> dict:
    """NIH ChestX-ray8, the images with boxes (Wang et al., CVPR 2017), all in "train".

    `root` holds BBox_List_2017.csv and the images in images_001/images ..., in images/ or beside
    the list.
    """
    raw, rule = _box_rows(root / NIH_BOXES)[1], "none published: every image is in train"
    pattern, wanted = r"\.|images(?:_\d+)?(?:/images)?", {"train": set(raw["name"])}
    return _findings(root, pattern, raw, wanted, allow_missing=allow_missing) | {"split_rule": rule}


def dlia(root: Path, *, allow_missing: bool = False) -> dict:
    """The DLIA class competition (cut from the NIH boxes), both editions, told by their columns.

    Edition A has the NIH list's header in train.csv and a mapping `id,image_id` where an image may
    have several ids; edition B has `image_id,x_min,y_min,x_max,y_max,label` and `ID,image_id`.
    Images lie in train/ and test/ (or train_images/, test_images/). Training images that stand in
    the mapping too are left out.
    """
    edition, raw = _box_rows(root / DLIA_TRAIN)
    mapping = id_table(root / DLIA_MAPPING)
    wanted = {"train": set(raw["name"]), "test": set(mapping["image_id"])}
    options = dict(allow_missing=allow_missing, leaked=wanted["train"] & wanted["test"])
    fields = _findings(root, "(train|test)(?:_images)?", raw, wanted, **options)
    return fields | {"mapping": mapping, "split_rule": f"the competition's, edition {edition}"}


def id_table(mapping: pd.DataFrame | str | os.PathLike) -> pd.DataFrame:
    """The competition's mapping, checked: `id` (edition A) or `ID` (B), and `image_id`.

    No digit is lost: ids become int64 where all are whole numbers written plainly (001 is none),
    else text. Errors: `BadData` for what a spreadsheet or another table made of them;
    `FileNotFoundError`.

    >>> id_table(pd.DataFrame({"ID": ["007", "8"], "image_id": ["a.png", "b.png"]}))["ID"].tolist()
    ['007', '8']
    """
    table, name, fix = mapping, "the mapping", "give the competition's ID_to_Image_Mapping.csv"
    if not isinstance(mapping, pd.DataFrame):
        name = str(mapping)
        table = read_csv(Path(mapping), text=True)
    found = [column for column in table.columns if column in ("id", "ID")]
    if len(found) != 1 or "image_id" not in table.columns or table.empty:
        text = f"has {len(table)} rows of {', '.join(map(str, table.columns))}; it needs `id` or"
        raise BadData(f"{name} {text} `ID`, and `image_id`. Fix: {fix}.")
    try:
        columns = [exact_ids(table[one], name, one, "rows") for one in (*found, "image_id")]
    except ValueError as error:
        raise BadData(f"{error}. Fix: {fix}.") from error
    ids, images = (pd.Series([str(one).strip() for one in column]) for column in columns)
    number = pd.to_numeric(ids, errors="coerce").notna().all()
    wrong = pd.Series("is no plain id", ids.index).mask(ids.str.match(r"\d+$" if number else r"\w"))
    wrong = wrong.mask(ids.duplicated(), "stands above already").dropna()
    lines = range(2, len(ids) + 2) if table is mapping else table.index
    told = [f"line {lines[row]}: {found[0]} {ids[row]!r} {why}" for row, why in wrong.items()]
    refuse(name, told, f"each id once, as the competition wrote it: {fix}")
    whole = ids.str.fullmatch(r"0|[1-9]\d{0,17}").all()
    return pd.DataFrame({found[0]: ids.astype("int64") if whole else ids, "image_id": images})


def _named_files(root: Path, pattern: str) -> tuple[dict[tuple[str, str], str], list]:
    """Images by (kind: the pattern's group, name), and (path, reason) of the rest."""

    def reason(path: PurePosixPath) -> str:
        return "" if re.fullmatch(pattern, str(path.parent)) else "outside the image folders"

    paths, ignored = sort_files(root, reason, SUFFIXES)
    found: dict[tuple[str, str], str] = {}
    for path in paths:
        kind = (*re.fullmatch(pattern, str(path.parent)).groups(), "train")[0]
        if found.setdefault((kind, path.name), str(path)) != str(path):
            ignored.append((str(path), "second copy of an image"))
    read = {NIH_BOXES, DLIA_TRAIN, DLIA_MAPPING, FRAC_TABLE, FRAC_BOXES, *FRAC_SPLITS.values()}
    return found, [one for one in ignored if one[0] not in read]


def _findings(
    root: Path,
    pattern: str,
    raw: pd.DataFrame,
    wanted: dict[str, set],
    *,
    allow_missing: bool,
    leaked: Collection[str] = (),
) -> dict:
    """Fields of a set of NIH findings: images `wanted` of each split, in folders of `pattern`."""
    found, ignored = _named_files(root, pattern)
    asked = [(split, name) for split, names in wanted.items() for name in names]
    if missing := sorted(name for split, name in asked if (split, name) not in found):
        text = f"{root}: {len(missing)} of the {len(asked)} listed images are missing"
        text += f", first: {', '.join(missing[:3])}"
        if not allow_missing or len(missing) == len(asked):
            how = "or load the rest with datasets.load(location, allow_missing=True)"
            raise BadData(f"{text}; fix: {REPAIR}, {how}")
        log.warning("%s; the others are used", text)
    images = []
    for (split, name), path in sorted(found.items(), key=lambda one: (one[0][0] == "test", one[0])):
        if name in wanted[split] and not (split == "train" and name in leaked):
            images.append((split, name, path))
        else:
            ignored.append((path, LEAK if name in wanted[split] else "has no box"))
    row_of = {name: row for row, (split, name, _) in enumerate(images) if split == "train"}
    shapes = shapes_of(root, [path for split, _, path in images if split == "train"])
    boxes, problems = box_table(raw, NIH_CLASSES, row_of, dict(zip(row_of, shapes, strict=True)))
    refuse(f"{root}", problems, "correct or delete these rows, or download the file again")
    rows = []
    for label, (split, name, path) in zip(rarest_class(boxes, len(images)), images, strict=True):
        patient = name[:8] if re.match(r"\d{8}_", name) else PurePosixPath(name).stem
        rows.append((path, label, (*NIH_CLASSES, UNLABELLED)[label], patient, "", split))
    return tables(rows, NIH_CLASSES, ignored, boxes=boxes, box_classes=NIH_CLASSES)


def _box_rows(path: Path) -> tuple[str, pd.DataFrame]:
    """Edition and raw boxes (see `box_table`) of a table with NIH's header ("A") or that of B."""
    nih_columns = "Image Index,Finding Label,Bbox [x,y,w,h]".split(",")  # its own commas split it
    columns = "image_id label x_min y_min x_max y_max".split()
    edition = "A" if nih_columns[0] in read_csv(path) else "B"
    columns = nih_columns if edition == "A" else columns
    raw = read_csv(path, columns)[columns].set_axis(["name", "class_name", *CORNERS], axis=1)
    raw = raw.rename_axis("line").reset_index()
    raw[CORNERS] = raw[CORNERS].apply(pd.to_numeric, errors="coerce").astype("float64")
    if edition == "A":
        raw["x2"] += raw["x1"]
        raw["y2"] += raw["y1"]
    for name in ("name", "class_name"):
        raw[name] = raw[name].astype(object).where(raw[name].notna(), "").astype(str).str.strip()
    raw["class_name"] = raw["class_name"].replace(SPELLINGS)
    return edition, raw.assign(where=raw.pop("line").map("line {}".format))


# --------------------------------------------------------------------------------------- FracAtlas


def fracatlas(root: Path) -> dict:
    """FracAtlas (Abedeen et al., Scientific Data 2023), original or DatasetNinja layout.

    An image is Fractured by dataset.csv (original) or its folder (DatasetNinja), and wherever
    something is marked on it. `group` is the body part (original). The official split names the
    fractured images only; `split` is "" for the others. Boxes and outlines lie on the upright
    image (EXIF orientation applied), as the annotators saw it.
    """
    read = _ninja if (root / "not fractured" / "ann").is_dir() else _original
    images, ignored, marks = read(root)  # images: name, path, called fractured, group, split
    marked = {*marks.boxes["name"], *(name for name, *_ in marks.outlines)}
    rows, row_of = [], {name: row for row, (name, *_) in enumerate(images)}
    for name, path, flag, group, split in images:
        label = int(flag or name in marked)
        rows.append((path, label, FRAC_CLASSES[label], PurePosixPath(name).stem, group, split))
    if odd := [name for name, _, flag, *_ in images if flag != (name in marked)]:
        text = "%d images are marked or called fractured, not both: taken as Fractured: %s"
        log.warning(text, len(odd), ", ".join(odd[:SHOWN]))
    if lost := sorted(marked - set(row_of)):
        log.warning("%d marked images are not there, first: %s", len(lost), ", ".join(lost[:3]))
    paths = {name: path for name, path, *_ in images if name in marked}
    shapes = dict(zip(paths, shapes_of(root, paths.values()), strict=True))
    boxes, wrong = box_table(marks.boxes.replace(SPELLINGS), ["fracture"], row_of, shapes)
    polygons, bad = _outline_table(marks.outlines, row_of, shapes)
    problems = marks.problems + other_sizes(marks.sizes, shapes) + wrong + bad
    refuse(f"{root}", problems, f"correct these files, or {REPAIR}")
    more = dict(boxes=boxes, box_classes=("fracture",), outlines=polygons, split_rule="official")
    return tables(rows, FRAC_CLASSES, ignored, **more)


def other_sizes(sizes: dict[str, tuple], shapes: dict[str, tuple | None]) -> list[str]:
    """The images whose (height, width) is not that of the annotations: every box would be off."""
    pairs = [(name, size, shapes.get(name) or size) for name, size in sizes.items()]
    return [
        f"{name} is {there[1]} x {there[0]} px, but was annotated as {size[1]} x {size[0]}"
        for name, size, there in pairs
        if abs(size[0] - there[0]) > SLACK or abs(size[1] - there[1]) > SLACK
    ]


def _original(root: Path) -> tuple:
    needed = [FRAC_TABLE, FRAC_BOXES, *FRAC_SPLITS.values()]
    if missing := [name for name in needed if not (root / name).is_file()]:
        raise DataNotFound(f"{root} has no {', '.join(missing)}: {REPAIR}")
    found, ignored = _named_files(root, "images/[^/]+")  # or images/All_Images, or both
    parts = ["hand", "leg", "hip", "shoulder"]
    table = read_csv(root / FRAC_TABLE, ["image_id", "fractured", *parts])
    table = table.drop_duplicates("image_id").set_index("image_id")
    marks, split_of, images = read_coco(root / FRAC_BOXES), {}, []
    for split, file in FRAC_SPLITS.items():
        for name in read_csv(root / file, ["image_id"])["image_id"]:
            marks.problems.extend([f"{name} is in two splits"] * (name in split_of))
            split_of[name] = split.replace("valid", "val")
    for (_, name), path in sorted(found.items()):
        if name in table.index:
            row = table.loc[name]
            group = "".join(part for part in parts if row[part])
            group = group if group in parts else "mixed"
            images.append((name, path, bool(row["fractured"]), group, split_of.get(name, "")))
        else:
            ignored.append((path, f"not listed in {FRAC_TABLE}"))
    return images, ignored, marks


def _ninja(root: Path) -> tuple:
    folders = "|".join(NINJA_FOLDERS)
    found, ignored = _named_files(root, f"({folders})/img")
    pattern = f"({folders})/ann/[^./][^/]*[.]json"  # without macOS junk
    notes = {path for path, _ in ignored if re.fullmatch(pattern, path)}
    wanted = {f"{folder}/ann/{name}.json" for folder, name in found}
    problems = [f"{path} has no partner" for path in sorted(wanted ^ notes)]
    names = pd.Series([name for _, name in found], dtype=str)
    problems += [f"{name} lies in two of the folders" for name in names[names.duplicated()]]
    rows, outlines, sizes = [], [], {}
    for path in sorted(wanted & notes):
        name = PurePosixPath(path).name.removesuffix(".json")
        try:
            note = json.loads((root / path).read_text(encoding="utf-8"))
            sizes[name] = int(note["size"]["height"]), int(note["size"]["width"])
            for number, one in enumerate(note["objects"]):
                corners, polygons = _ninja_object(one)
                where = f"{path} object {number}"
                rows += [(name, one["classTitle"], *corners, where)] if corners else []
                outlines += [(name, one["classTitle"], points, where) for points in polygons]
        except (KeyError, TypeError, AttributeError, ValueError, OSError, zlib.error) as error:
            problems.append(f"{path} cannot be read ({type(error).__name__}: {error})")
    images = []
    for (folder, name), path in sorted(found.items(), key=lambda one: one[0][1]):
        fractured = folder != NINJA_FOLDERS[0]
        images.append((name, path, fractured, "", folder * fractured))
    ignored = [one for one in ignored if one[0] not in notes]
    marks = dict(boxes=raw_boxes(rows), outlines=outlines, sizes=sizes, problems=problems)
    return images, ignored, SimpleNamespace(**marks)


def raw_boxes(rows: Sequence[tuple]) -> pd.DataFrame:
    """Raw boxes for `box_table`."""
    raw = pd.DataFrame(rows, columns=["name", "class_name", *CORNERS, "where"])
    return raw.astype(dict.fromkeys(CORNERS, "float64"))


def _ninja_object(one: dict) -> tuple[list[float], list[np.ndarray]]:
    """Corners of a rectangle, or outlines of a polygon or bitmap, of Supervisely's format."""
    if one["geometryType"] == "bitmap":  # base64 of a zlib stream of a PNG, placed at `origin`
        png = zlib.decompress(base64.b64decode(one["bitmap"]["data"]))
        with open_image(io.BytesIO(png)) as image:
            # What counts is the opacity; an image without any is a mask by its grey values.
            shown = "A" in image.getbands() or "transparency" in image.info
            mask = image.convert("RGBA").getchannel("A") if shown else image.convert("L")
        origin = np.asarray(one["bitmap"]["origin"], dtype=np.float64)
        return [], [points + origin for points in trace(np.asarray(mask) > 0)]
    points = np.asarray(one["points"]["exterior"], dtype=np.float64)
    if one["geometryType"] == "polygon":
        return [], [points]
    if one["geometryType"] != "rectangle":
        raise ValueError(f"{one['geometryType']} is none of rectangle, polygon, bitmap")
    return [*points.min(0), *points.max(0)], []


def _outline_table(
    outlines: Sequence[tuple], row_of: dict[str, int], shapes: dict[str, tuple]
) -> tuple[pd.DataFrame, list[str]]:
    """Outlines (image, label, points) of the images in `row_of`, clipped to them, and problems."""
    rows, problems = [], []
    for name, class_name, points, where in outlines:
        height, width = shapes.get(name) or (np.inf, np.inf)
        if SPELLINGS.get(class_name, class_name) != "fracture":
            problems.append(f"{where}: {name}: unknown label {class_name}")
        elif points.ndim != 2 or len(points) < 3 or not np.isfinite(points).all():
            problems.append(f"{where}: {name}: no polygon of three or more points")
        elif (points < -SLACK).any() or (points > np.add((width, height), SLACK)).any():
            problems.append(f"{where}: {name}: the outline reaches out of its image")
        elif name in row_of:
            rows.append((row_of[name], 1, np.clip(points, 0, (width, height))))
    table = pd.DataFrame(rows, columns=["image", "label", "points"])
    table = table.astype({"image": "int64", "label": "int64", "points": object})
    return table.sort_values(["image", "label"], kind="stable", ignore_index=True), problems


def read_coco(path: Path) -> SimpleNamespace:
    """A COCO file: images (file, where, perhaps patient, split), boxes, outlines, sizes, problems.

    Boxes as for `box_table`; outlines (name, class_name, points [n,2], where); sizes (height,
    width) by name.
    """
    try:
        coco = json.loads(path.read_text(encoding="utf-8-sig"))
        kinds = {one["id"]: str(one["name"]).strip() for one in coco["categories"]}
        images = pd.DataFrame([{"split": "", "patient": ""} | one for one in coco["images"]])
        exact_ids(images["patient"][~np.array(missing(images["patient"]), bool)], "it", "patient")
        images["file"] = images["file_name"].str.strip()
        images["where"] = images["id"].map("image {}".format)
        annotations = list(coco["annotations"])
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        text = f"{path} is not COCO ({type(error).__name__}: {error})"
        fix = "Fix: export it again, with the lists images, annotations and categories."
        raise BadData(f"{text}. {fix}") from error
    again = images["where"][images["id"].duplicated()]
    problems = [f"{where} is given more than once" for where in again]
    name_of, boxes, outlines = dict(zip(images["id"], images["file"], strict=True)), [], []
    for number, one in enumerate(annotations):
        try:
            x, y, width, height = map(float, one["bbox"])
            where = f"annotation {one.get('id', number)}"
            about = name_of[one["image_id"]], kinds[one["category_id"]]
            boxes.append((*about, x, y, x + width, y + height, where))
            coded = isinstance(one.get("segmentation"), dict)  # run-length coded: not read
            for flat in () if coded else one.get("segmentation") or ():
                points = np.asarray(flat, dtype=np.float64)
                points = points if points.size % 2 else points.reshape(-1, 2)
                outlines.append((*about, points, where))
        except (AttributeError, KeyError, TypeError, ValueError):
            what = "image_id and category_id must be listed, bbox be x, y, width, height"
            problems.append(f"annotation {number}: {what}")
    columns = [name for name in ("patient", "split") if images[name].astype(bool).any()]
    sizes = images.reindex(columns=["height", "width"]).apply(pd.to_numeric, errors="coerce")
    sizes = sizes.assign(file=images["file"])[["file", "height", "width"]].dropna()
    return SimpleNamespace(
        images=images[["id", "file", "where", *columns]].astype(str),
        boxes=raw_boxes(boxes),
        outlines=outlines,
        sizes={name: size for name, *size in sizes.itertuples(index=False)},
        problems=problems,
    )


def trace(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines float64 [n,2] (x, y) of a mask [h,w] along the edges of its pixels, without holes.

    >>> mask = np.zeros((4, 5), bool)
    >>> mask[1:3, 1:4] = True
    >>> trace(mask)[0].tolist()
    [[1.0, 1.0], [1.0, 3.0], [4.0, 3.0], [4.0, 1.0]]
    """
    import cv2  # comes with albumentations; nothing else here needs it

    height, width = mask.shape
    # OpenCV joins centres of pixels. On a grid twice as fine a pixel covers its corners too.
    fine = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    for place in range(9):
        down, across = divmod(place, 3)
        fine[down : down + 2 * height : 2, across : across + 2 * width : 2] |= mask.astype(np.uint8)
    found = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
    return [one.reshape(-1, 2) / 2 for one in found if len(one) > 2]
