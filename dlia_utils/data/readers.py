"""Each published layout is read into the fields of a `Dataset`: images, what was ignored, boxes, outlines, masks."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import warnings
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image

from .tables import (
    CORNERS,
    REPAIR,
    SLACK,
    BadData,
    DataNotFound,
    box_table,
    rarest_class,
    refuse,
    shapes_of,
    sort_files,
    tables,
)

log = logging.getLogger("dlia_utils")

# The order is part of every detection result: label k is NIH_CLASSES[k - 1], and 0 is the background.
NIH_CLASSES = tuple(
    "Atelectasis Cardiomegaly Effusion Infiltrate Mass Nodule Pneumonia Pneumothorax".split()
)
NIH_BOXES = "BBox_List_2017.csv"
DLIA_TRAIN, DLIA_MAPPING = "train.csv", "ID_to_Image_Mapping.csv"
TABLES = (NIH_BOXES, DLIA_TRAIN, DLIA_MAPPING)
LEAK = "its image is in the competition's test set too (leak)"
UNLABELLED = "unlabelled"  # class_name of an image without a label, which is then -1
TUBERCULOSIS_CLASSES, COVID_CLASSES = ("Normal", "Tuberculosis"), ("Normal", "COVID")
FRAC_CLASSES = ("Non_fractured", "Fractured")
FRAC_TABLE, FRAC_BOXES = "dataset.csv", "Annotations/COCO JSON/COCO_fracture_masks.json"
FRAC_SPLITS = {
    split: f"Utilities/Fracture Split/{split}.csv" for split in ("train", "valid", "test")
}
NINJA_SPLITS = {
    "train": "train",
    "val": "val",
    "test": "test",
    "not fractured": "",
}  # folder: split
SPELLINGS = {"Infiltration": "Infiltrate", "fractured": "fracture", "Fractured": "fracture"}
SUFFIXES = (".jpeg", ".jpg", ".png")


# ----------------------------------------------------------------------------------- class folders


def pneumonia(root: Path) -> dict:
    """Chest X-Ray Images (Pneumonia), Kermany et al. 2018: train/, test/ and perhaps val/ with NORMAL/, PNEUMONIA/.

    The archive's second copy in chest_xray/chest_xray and its junk files are listed in `ignored`, never read.
    """
    fields = _class_folders(root, ("NORMAL", "PNEUMONIA"), _splits(root), pneumonia_patient)
    odd = fields["manifest"].query("group == 'unknown'")["path"]
    if len(odd):
        log.warning("%d file names tell no patient, first: %s", len(odd), ", ".join(odd[:3]))
    return fields


def pneumonia_patient(path: PurePosixPath) -> tuple[str, str]:
    """Patient and group read from a file name of the pneumonia set; another name is a patient of its own.

    The number of `personN_bacteria_M` and `personN_virus_M` is taken for one patient, the careful reading: nothing
    published says whether the numbers of the two kinds are separate.

    >>> pneumonia_patient(PurePosixPath("person12_virus_48.jpeg"))
    ('person-12', 'virus')
    >>> pneumonia_patient(PurePosixPath("NORMAL2-IM-0501-0001-0002.jpeg"))
    ('NORMAL2-IM-0501', 'normal')
    """
    if match := re.match(r"person(\d+)_(bacteria|virus)_", path.name):
        return f"person-{int(match[1])}", match[2]
    if match := re.match(r"((?:NORMAL2-)?IM-\d+)-", path.name):
        return match[1], "normal"
    return path.stem, "unknown"


def tuberculosis(root: Path) -> dict:
    """TB Chest Radiography Database, Rahman et al. 2020: Normal/ and Tuberculosis/; no split, no patients."""
    return _class_folders(root, TUBERCULOSIS_CLASSES)


def covid(root: Path) -> dict:
    """COVID-19 against normal chests, in either of two trees; each image counts as a patient.

    The COVID-19 Radiography Database (Chowdhury et al. 2020, Rahman et al. 2021): COVID/ and Normal/ with images/ and
    perhaps masks/ of the lungs, read into `masks`; old versions have the images in the class folders themselves. No
    split is published. Or covid_xray: train/, test/ and perhaps val/, with normal/ and COVID/ in any case.
    """
    if (root / "train").is_dir():
        return _class_folders(root, COVID_CLASSES, _splits(root))
    fields = _class_folders(root, COVID_CLASSES, below=("images", "masks"))
    manifest = fields["manifest"]
    key = manifest["patient"].str.replace("/(images|masks)/", "/", regex=True)
    of_mask = manifest["path"].str.contains("^[^/]+/masks/")
    again = key.where(~of_mask).duplicated(keep="last") & ~of_mask  # beside images/, in some copies
    kept = ~of_mask & ~again
    row_of = {one: row for row, one in enumerate(key[kept])}
    masks = pd.DataFrame({"image": key.map(row_of), "path": manifest["path"]})[of_mask]
    lost, masks = masks[masks["image"].isna()], masks.dropna().astype({"image": "int64"})
    bare = (len(row_of) - len(masks)) * int(of_mask.any())
    if bare or len(lost):
        text = "%s: %d images have no mask and %d masks have no image"
        log.warning(text, root, bare, len(lost))
    extra = [(path, "mask without an image") for path in lost["path"]]
    extra += [(path, "second copy of an image") for path in manifest["path"][again]]
    ignored = pd.concat([fields["ignored"], pd.DataFrame(extra, columns=["path", "reason"])])
    images, masks = (
        manifest[kept].reset_index(drop=True),
        masks.sort_values("image", ignore_index=True),
    )
    return fields | dict(manifest=images, masks=masks, ignored=ignored.reset_index(drop=True))


def _splits(root: Path) -> list[str]:
    return [name for name in ("train", "val", "test") if name != "val" or (root / name).is_dir()]


def _class_folders(
    root: Path,
    classes: Sequence[str],
    splits: Sequence[str] = (),
    patient: Callable = lambda path: (str(path.with_suffix("")), ""),
    *,
    below: tuple[str, ...] = (),
) -> dict:
    """Images in the folders of `classes`, perhaps below `splits`; `below` are folders that they may lie in."""
    spelled, level = {name.casefold(): name for name in classes}, int(bool(splits))

    def reason(path: PurePosixPath) -> str:
        if path.parts[0] == "chest_xray":
            return "second copy of the data set (nested chest_xray)"
        if splits and path.parts[0] not in splits:
            return "outside the folders of the splits"
        if len(path.parts) > level + 1 and path.parts[level].casefold() not in spelled:
            return "not a class of this data set"
        inside = path.parts[level + 1 : -1] in ((), *((name,) for name in below))
        return "" if inside and len(path.parts) > level + 1 else "outside the class folders"

    found, ignored = sort_files(root, reason, SUFFIXES)
    rows = []
    for path in found:
        name, split = spelled[path.parts[level].casefold()], path.parts[0] if splits else ""
        rows.append((str(path), classes.index(name), name, *patient(path), split))
    there = {(row[5], row[2]) for row in rows}
    wanted = [(split, name) for split in splits or [""] for name in classes]
    empty = ["no images in " + "/".join(filter(None, one)) for one in wanted if one not in there]
    refuse(f"{root}", empty, REPAIR)
    return tables(rows, classes, ignored, split_rule="official" if splits else "none published")


# ------------------------------------------------------------------------------------------- boxes


def nih(root: Path, *, allow_missing: bool = False) -> dict:
    """NIH ChestX-ray8, the images with boxes (Wang et al., CVPR 2017): 984 boxes on 880 images, all in "train".

    `root` holds BBox_List_2017.csv and the images in images_001/images ..., in images/ or beside the list.
    """
    raw = _box_rows(root / NIH_BOXES)[1]
    pattern = r"\.|images(_\d+)?(/images)?"
    found, ignored = _named_files(
        root, lambda folder: "train" * bool(re.fullmatch(pattern, folder))
    )
    _need_files(root, {"train": set(raw["name"])}, found, allow_missing=allow_missing)
    rule = "none published: every image is in train"
    return _findings(root, NIH_BOXES, raw, {"train": set(raw["name"])}, found, ignored, rule)


def dlia(root: Path, *, allow_missing: bool = False, allow_leak: bool = False) -> dict:
    """The DLIA class competition (cut from the NIH boxes), both editions, told apart by their columns.

    Edition A has the NIH list's header in train.csv and a mapping `id,image_id` where an image may have several ids;
    edition B has `image_id,x_min,y_min,x_max,y_max,label` and `ID,image_id`. Images lie in train/ and test/ (or
    train_images/, test_images/). Training images that stand in the mapping too are left out unless `allow_leak`.
    """
    edition, raw = _box_rows(root / DLIA_TRAIN)
    mapping = read_csv(root / DLIA_MAPPING, ["image_id"])
    key = mapping.columns.intersection(["id", "ID"])
    if (
        not len(key)
        or mapping[[*key, "image_id"]].isna().any(axis=None)
        or mapping[key[0]].duplicated().any()
    ):
        fix = "Fix: download the file again."
        raise BadData(f"{root / DLIA_MAPPING} needs a column id or ID, filled, each once. {fix}")

    def kind(folder: str) -> str:
        match = re.fullmatch(r"(train|test)(_images)?", folder)
        return match[1] if match else ""

    found, ignored = _named_files(root, kind)
    wanted = {"train": set(raw["name"]), "test": set(mapping["image_id"])}
    _need_files(root, wanted, found, allow_missing=allow_missing)
    if not allow_leak:
        leaked = wanted["train"] & wanted["test"]
        ignored += [
            (found.pop(("train", name)), LEAK) for name in leaked if ("train", name) in found
        ]
    rule = f"the competition's, edition {edition}" + (", leaked images kept" if allow_leak else "")
    fields = _findings(root, DLIA_TRAIN, raw, wanted, found, ignored, rule)
    return fields | {"mapping": mapping}


def _named_files(
    root: Path, kind: Callable[[str], str]
) -> tuple[dict[tuple[str, str], str], list[tuple[str, str]]]:
    """Images by (kind of their folder, name), and (path, reason) of the rest; kind "" is no image folder."""

    def reason(path: PurePosixPath) -> str:
        return "" if kind(str(path.parent)) else "outside the image folders"

    paths, ignored = sort_files(root, reason, SUFFIXES)
    found: dict[tuple[str, str], str] = {}
    for path in paths:
        if found.setdefault((kind(str(path.parent)), path.name), str(path)) != str(path):
            ignored.append((str(path), "second copy of an image"))
    return found, ignored


def _need_files(
    root: Path, wanted: dict[str, set], found: Collection, *, allow_missing: bool
) -> None:
    """`BadData` for images that are missing; with `allow_missing` a warning, unless all are."""
    asked = [(kind, name) for kind, names in wanted.items() for name in names]
    missing = sorted(name for kind, name in asked if (kind, name) not in found)
    if missing:
        first = f"first: {', '.join(missing[:3])}"
        text = f"{root}: {len(missing)} of the {len(asked)} listed images are missing, {first}"
        if not allow_missing or len(missing) == len(asked):
            how = "or load the rest with datasets.load(location, allow_missing=True)"
            raise BadData(f"{text}; fix: {REPAIR}, {how}")
        log.warning("%s; the others are used", text)


def _findings(
    root: Path,
    file: str,
    raw: pd.DataFrame,
    wanted: dict[str, set],
    found: dict[tuple[str, str], str],
    ignored: list[tuple[str, str]],
    rule: str,
) -> dict:
    """Fields of a set of NIH findings, of the images `found` that are `wanted`; those of "test" have no boxes."""
    images = []
    for (split, name), path in sorted(
        found.items(), key=lambda one: (one[0][0] == "test", one[0][1])
    ):
        if name in wanted[split]:
            images.append((split, name, path))
        else:
            ignored.append((path, "has no box" if file == NIH_BOXES else "listed in no table"))
    row_of = {name: row for row, (split, name, _) in enumerate(images) if split != "test"}
    shapes = dict(
        zip(row_of, shapes_of(root, [images[row][2] for row in row_of.values()]), strict=True)
    )
    boxes, problems = box_table(raw, NIH_CLASSES, row_of, shapes)
    refuse(f"{root / file}", problems, "correct or delete these rows, or download the file again")
    labels = rarest_class(boxes, len(images))
    rows = []
    for label, (split, name, path) in zip(labels, images, strict=True):
        patient = name[:8] if re.match(r"\d{8}_", name) else PurePosixPath(name).stem
        class_name = NIH_CLASSES[label] if label >= 0 else UNLABELLED
        rows.append((path, label, class_name, patient, "", split))
    more = dict(boxes=boxes, box_classes=NIH_CLASSES, split_rule=rule)
    return tables(rows, NIH_CLASSES, [one for one in ignored if one[0] not in TABLES], **more)


def read_csv(path: Path, needed: Sequence[str]) -> pd.DataFrame:
    """A CSV file, whose rows may end in more commas than its header; `BadData` when it lacks a column."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)
        table = pd.read_csv(path, index_col=False)  # else pandas would shift the columns
    table = table.rename(columns=lambda name: str(name).strip())
    if missing := [name for name in needed if name not in table]:
        there = ", ".join(table.columns)
        raise BadData(f"{path} has no column {', '.join(missing)}; it has {there}. Fix: {REPAIR}.")
    return table


def _box_rows(path: Path) -> tuple[str, pd.DataFrame]:
    """Edition and raw boxes (see `box_table`) of a table with the header of NIH ("A") or of edition B."""
    nih_columns = [
        "Image Index",
        "Finding Label",
        "Bbox [x",
        "y",
        "w",
        "h]",
    ]  # split by its own commas
    columns = ["image_id", "label", "x_min", "y_min", "x_max", "y_max"]
    edition = "A" if nih_columns[0] in read_csv(path, []) else "B"
    columns = nih_columns if edition == "A" else columns
    raw = read_csv(path, columns)[columns].set_axis(["name", "class_name", *CORNERS], axis=1)
    raw[CORNERS] = raw[CORNERS].apply(pd.to_numeric, errors="coerce").astype("float64")
    if edition == "A":
        raw["x2"] += raw["x1"]
        raw["y2"] += raw["y1"]
    for name in ("name", "class_name"):
        raw[name] = raw[name].astype(object).where(raw[name].notna(), "").astype(str).str.strip()
    raw["class_name"] = raw["class_name"].replace(SPELLINGS)
    return edition, raw.assign(where=[f"line {row + 2}" for row in range(len(raw))])


# --------------------------------------------------------------------------------------- FracAtlas


def fracatlas(root: Path) -> dict:
    """FracAtlas (Abedeen et al., Scientific Data 2023), original or DatasetNinja layout; no patients.

    An image is Fractured by dataset.csv (original) or its folder (DatasetNinja), and wherever something is marked on
    it. `group` is the body part (original). The official split names the fractured images only; `split` is "" for
    the others. Boxes and outlines lie on the upright image (EXIF orientation applied), as the annotators saw it.
    """
    read = _ninja if (root / "not fractured" / "ann").is_dir() else _original
    images, ignored, marks = read(root)  # images: name, path, fractured by the tree, group, split
    raw, outlines, annotated, problems = marks
    marked = {*raw["name"], *(name for name, *_ in outlines)}
    rows, row_of = [], {}
    for row, (name, path, flag, group, split) in enumerate(images):
        row_of[name], label = row, int(flag or name in marked)
        rows.append((path, label, FRAC_CLASSES[label], PurePosixPath(name).stem, group, split))
    paths = {name: path for name, path, *_ in images if name in marked}
    shapes = dict(zip(paths, shapes_of(root, paths.values()), strict=True))
    for name, shape in shapes.items():
        if (
            shape
            and name in annotated
            and np.abs(np.subtract(annotated[name], shape)).max() > SLACK
        ):
            problems.append(f"{name} is not of the size that it was annotated in")
    boxes, wrong = box_table(raw, ["fracture"], row_of, shapes)
    polygons, odd = _outline_table(outlines, row_of, shapes)
    refuse(f"{root}", problems + wrong + odd, f"correct these files, or {REPAIR}")
    more = dict(boxes=boxes, box_classes=("fracture",), outlines=polygons, split_rule="official")
    return tables(rows, FRAC_CLASSES, ignored, **more)


def _original(root: Path) -> tuple:
    needed = [FRAC_TABLE, FRAC_BOXES, *FRAC_SPLITS.values()]
    if missing := [name for name in needed if not (root / name).is_file()]:
        raise DataNotFound(f"{root} has no {', '.join(missing)}: {REPAIR}")
    # Some copies hold images/All_Images as well, or only that.
    found, ignored = _named_files(
        root, lambda folder: "x" * bool(re.fullmatch("images/[^/]+", folder))
    )
    parts = ["hand", "leg", "hip", "shoulder"]
    table = read_csv(root / FRAC_TABLE, ["image_id", "fractured", *parts])
    table = table.drop_duplicates("image_id").set_index("image_id")
    splits = {
        name: read_csv(root / file, ["image_id"])["image_id"] for name, file in FRAC_SPLITS.items()
    }
    split_of = {one: name.replace("valid", "val") for name, ones in splits.items() for one in ones}
    _, raw, outlines, annotated, problems = read_coco(root / FRAC_BOXES)
    listed = pd.concat(splits)
    problems += [f"{name} is in two splits" for name in listed[listed.duplicated()]]
    raw, boxed, images = raw.replace({"class_name": SPELLINGS}), set(raw["name"]), []
    for (_, name), path in sorted(found.items()):
        if name not in table.index:
            ignored.append((path, f"not listed in {FRAC_TABLE}"))
            continue
        flag, here = (
            bool(table.at[name, "fractured"]),
            [part for part in parts if table.at[name, part]],
        )
        images.append(
            (name, path, flag, here[0] if len(here) == 1 else "mixed", split_of.get(name, ""))
        )
        folder = PurePosixPath(path).parent.name
        if (
            len(
                {flag, name in boxed, {"Fractured": True, "Non_fractured": False}.get(folder, flag)}
            )
            > 1
        ):
            text = "%s: fractured=%d in %s, its folder is %s, its boxes: %d; fractured if a flag or box says so"
            log.warning(text, name, flag, FRAC_TABLE, folder, (raw["name"] == name).sum())
    if lost := sorted(boxed - {name for name, *_ in images}):
        log.warning("%d images with a box are not there, first: %s", len(lost), ", ".join(lost[:3]))
    ignored = [one for one in ignored if one[0] not in needed]
    return images, ignored, (raw, outlines, annotated, problems)


def _ninja(root: Path) -> tuple:
    def kind(folder: str) -> str:
        top, _, rest = folder.partition("/")
        return top if top in NINJA_SPLITS and rest == "img" else ""

    found, ignored = _named_files(root, kind)
    notes = sorted(path.relative_to(root).as_posix() for path in root.glob("*/ann/*.json"))
    notes = [path for path in notes if path.split("/")[0] in NINJA_SPLITS and "/." not in path]
    wanted = {f"{folder}/ann/{name}.json" for folder, name in found}
    problems = [f"{path} has no image" for path in notes if path not in wanted]
    problems += [f"{path} is missing: its image is there" for path in sorted(wanted - set(notes))]
    names = pd.Series([name for _, name in found], dtype=str)
    problems += [f"{name} lies in two of the folders" for name in names[names.duplicated()]]
    rows, outlines, annotated = [], [], {}
    for path in notes:
        name = PurePosixPath(path).name.removesuffix(".json")
        try:
            note = json.loads((root / path).read_text(encoding="utf-8"))
            annotated[name] = int(note["size"]["height"]), int(note["size"]["width"])
            for number, one in enumerate(note["objects"]):
                about = (name, SPELLINGS.get(one["classTitle"], one["classTitle"]))
                corners, polygons = _ninja_object(one)
                where = f"{path} object {number}"
                rows += [(*about, *corners, where)] if corners else []
                outlines += [(*about, points, where) for points in polygons]
        except (KeyError, TypeError, AttributeError, ValueError, OSError, zlib.error) as error:
            problems.append(f"{path} cannot be read ({type(error).__name__}: {error})")
    raw = pd.DataFrame(rows, columns=["name", "class_name", *CORNERS, "where"])
    images = [
        (name, path, folder != "not fractured", "", NINJA_SPLITS[folder])
        for (folder, name), path in sorted(found.items(), key=lambda one: one[0][1])
    ]
    marked = {*raw["name"], *(name for name, *_ in outlines)}
    for name, _, fractured, *_ in images:
        if fractured != (name in marked):
            log.warning("%s: its folder and its objects differ; taken as Fractured", name)
    ignored = [one for one in ignored if one[0] not in set(notes)]
    return (
        images,
        ignored,
        (raw.astype(dict.fromkeys(CORNERS, "float64")), outlines, annotated, problems),
    )


def _ninja_object(one: dict) -> tuple[list[float], list[np.ndarray]]:
    """Corners of a rectangle, or outlines of a polygon or bitmap, of Supervisely's format."""
    if one["geometryType"] == "bitmap":  # base64 of a zlib stream of a PNG, placed at `origin`
        png = zlib.decompress(base64.b64decode(one["bitmap"]["data"]))
        with Image.open(io.BytesIO(png)) as image:
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
    """Outlines (image, label, points) of the images in `row_of`, clipped to them, and what is wrong with others."""
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


def read_coco(path: Path) -> tuple[pd.DataFrame, pd.DataFrame, list, dict[str, tuple], list[str]]:
    """Of a COCO file: images (file, where, perhaps patient, split), raw boxes, raw outlines, sizes, problems.

    Raw boxes as for `box_table`; outlines (name, class_name, points [n,2], where); sizes (height, width) by name.
    """
    try:
        coco = json.loads(path.read_text(encoding="utf-8-sig"))
        kinds = {one["id"]: str(one["name"]).strip() for one in coco["categories"]}
        named = [(one["id"], str(one["file_name"]).strip()) for one in coco["images"]]
        annotations = list(coco["annotations"])
    except (KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        fix = "Fix: export it again, with the lists images, annotations and categories."
        raise BadData(f"{path} is not COCO ({what}). {fix}") from error
    name_of, boxes, outlines, coded = dict(named), [], [], 0
    keys = pd.Series([key for key, _ in named], dtype=object)
    problems = [f"image id {key} is given more than once" for key in keys[keys.duplicated()]]
    for number, one in enumerate(annotations):
        try:
            where = f"annotation {one.get('id', number)}"
            x, y, width, height = map(float, one["bbox"])
            about = name_of[one["image_id"]], kinds[one["category_id"]]
            boxes.append((*about, x, y, x + width, y + height, where))
            coded += isinstance(one.get("segmentation"), dict)
            polygons = (
                [] if isinstance(one.get("segmentation"), dict) else one.get("segmentation") or []
            )
            flat = [np.asarray(each, dtype=np.float64) for each in polygons]
            points = [each if each.size % 2 else each.reshape(-1, 2) for each in flat]
            outlines += [(*about, each, where) for each in points]
        except (AttributeError, KeyError, TypeError, ValueError):
            what = "image_id and category_id must be listed, bbox be x, y, width, height"
            problems.append(f"annotation {number}: {what}")
    if coded:
        log.warning("%s: %d outlines are run-length coded and not read", path, coded)
    rows = pd.DataFrame(named, columns=["id", "file"], dtype=object)
    rows["where"] = [f"image {key}" for key, _ in named]
    for column in ("patient", "split"):
        if any(column in one for one in coco["images"]):
            rows[column] = [str(one.get(column, "")).strip() for one in coco["images"]]
    sizes = {
        n: (i.get("height"), i.get("width"))
        for (_, n), i in zip(named, coco["images"], strict=True)
    }
    raw = pd.DataFrame(boxes, columns=["name", "class_name", *CORNERS, "where"])
    raw = raw.astype(dict.fromkeys(CORNERS, "float64"))
    return rows, raw, outlines, {name: size for name, size in sizes.items() if all(size)}, problems


def trace(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines of a mask [h,w] along the edges of its pixels, float64 [n,2] of x, y each; holes are filled.

    >>> mask = np.zeros((4, 5), bool)
    >>> mask[1:3, 1:4] = True
    >>> trace(mask)[0].tolist()
    [[1.0, 1.0], [1.0, 3.0], [4.0, 3.0], [4.0, 1.0]]
    """
    import cv2  # comes with albumentations; nothing else here needs it

    height, width = mask.shape
    # OpenCV joins the centres of pixels. On a grid twice as fine a pixel covers its corners and edges too.
    fine = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    for place in range(9):
        down, across = divmod(place, 3)
        fine[down : down + 2 * height : 2, across : across + 2 * width : 2] |= mask.astype(np.uint8)
    found = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
    return [one.reshape(-1, 2) / 2 for one in found if len(one) > 2]


READERS: dict[str, Callable[..., dict]] = {
    one.__name__: one for one in (pneumonia, nih, dlia, fracatlas, tuberculosis, covid)
}
