"""Each published layout is read into plain tables: images, what was ignored, boxes, outlines, masks, ids."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import pandas as pd

from . import medmnist
from ._fracatlas import fracatlas
from .tables import (
    BOX_COLUMNS,
    COLUMNS,
    CORNERS,
    SHOWN,
    BadData,
    DataNotFound,
    Tables,
    absent,
    box_table,
    gap_text,
    ignored_table,
    image_files,
    manifest_table,
    need_columns,
    need_files,
    need_folders,
    need_images,
    no_boxes,
    no_masks,
    no_outlines,
    orientation,
    read_csv,
    shapes_of,
    sort_files,
    trace,
    upright_shape,
)

__all__ = [
    "BOX_COLUMNS",
    "COLUMNS",
    "CORNERS",
    "LAYOUTS",
    "NIH_CLASSES",
    "SHOWN",
    "BadData",
    "DataNotFound",
    "Tables",
    "no_boxes",
    "no_masks",
    "no_outlines",
    "orientation",
    "read",
    "trace",
    "upright_shape",
]

log = logging.getLogger("dlia_utils")

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

NIH_BOXES = "BBox_List_2017.csv"
DLIA_TRAIN, DLIA_MAPPING = "train.csv", "ID_to_Image_Mapping.csv"
TUBERCULOSIS_CLASSES = ("Normal", "Tuberculosis")
COVID_CLASSES = ("Normal", "COVID")
COVID_OTHERS = (
    "Lung_Opacity",
    "Viral Pneumonia",
)  # folders of the Radiography Database that are not read


def read(dataset: str, root: Path, **options: bool) -> Tables:
    """Read `root` as the layout named `dataset`; `options` that are True go to its function.

    Of a MedMNIST set `root` is the folder that `medmnist.unpack` gives.
    Errors: `ValueError` for an option that this layout does not have, else those of the layout.
    """
    layout = LAYOUTS.get(dataset) or partial(medmnist.layout, dataset)
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
    need_folders(root, [f"{split}/{name}" for split in splits for name in classes])
    found, ignored = sort_files(root, lambda path: _class_folder_reason(path, splits, classes))
    rows = []
    for path in found:
        patient, group = pneumonia_patient(path.name)
        rows.append(
            (str(path), classes.index(path.parts[1]), path.parts[1], patient, group, path.parts[0])
        )
    manifest = manifest_table(rows)
    need_images(manifest, root, splits, classes)
    _say_odd(manifest)
    _say_small_val(manifest)
    return Tables(manifest, classes, ignored_table(ignored))


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
    found, ignored = image_files(root, _nih_folder, known=[NIH_BOXES])
    missing = absent(raw["name"], found, "train")
    need_files(missing, raw["name"].nunique(), "boxed", root, allow_missing=allow_missing)
    names = sorted({name for _, name in found} & set(raw["name"]))
    ignored += [(path, "has no box") for (_, name), path in found.items() if name not in set(names)]
    images = [(name, found["train", name], "train") for name in names]
    rule = "none published: every image is in train"
    return _detection_tables(root, NIH_BOXES, raw, images, ignored, split_rule=rule)


def nih_gap(root: Path) -> str:
    """Why the NIH copy in `root` cannot be used: boxed images that are missing; "" when there are none."""
    names = _nih_rows(root / NIH_BOXES)["name"]
    missing = absent(names, image_files(root, _nih_folder)[0], "train")
    return gap_text(missing, names.nunique(), "boxed")


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
    found, ignored = image_files(root, _dlia_folder, known=[DLIA_TRAIN, DLIA_MAPPING])
    missing = [name for split, names in wanted.items() for name in absent(names, found, split)]
    total = sum(map(len, wanted.values()))
    need_files(missing, total, "listed", root, allow_missing=allow_missing)
    leaked = set() if allow_leak else wanted["train"] & wanted["test"]
    if leaked:
        log.warning(
            "%d training images with %d boxes are refused: they stand in the competition's test set too",
            len(leaked),
            int(raw["name"].isin(leaked).sum()),
        )
    images = []
    for (split, name), path in sorted(
        found.items(), key=lambda item: (item[0][0] == "test", item[0][1])
    ):
        if name not in wanted[split]:
            ignored.append(
                (path, f"not listed in {DLIA_TRAIN if split == 'train' else DLIA_MAPPING}")
            )
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
    found = image_files(root, _dlia_folder)[0]
    missing = absent(train, found, "train") + absent(test, found, "test")
    return gap_text(missing, train.nunique() + test.nunique(), "listed")


def tuberculosis(root: Path) -> Tables:
    """TB Chest Radiography Database, Rahman et al., IEEE Access 2020: 3,500 Normal and 700 Tuberculosis.

    `root` holds Normal/ and Tuberculosis/ with PNG files, and tables about them that are not read. No split
    and no patients are published: `split` is "" and each image counts as a patient. Errors: `DataNotFound`
    for a missing class folder, `BadData` for an empty one.
    """
    classes = TUBERCULOSIS_CLASSES
    need_folders(root, classes)
    found, ignored = sort_files(
        root,
        lambda path: (
            "" if path.parts[0] in classes and len(path.parts) == 2 else "outside the class folders"
        ),
    )
    rows = [_unknown_patient(path, path.parts[0], classes) for path in found]
    return _class_folder_tables(root, rows, classes, ignored, rule="none published")


def covid(root: Path) -> Tables:
    """COVID-19 against normal chest films, in either of two trees.

    The COVID-19 Radiography Database, Chowdhury et al. 2020 and Rahman et al. 2021: COVID/ and Normal/ with
    images/ and, in newer versions, masks/ (the lungs, under the image's name: read into `masks`); in old
    versions the images lie in the class folders themselves. Lung_Opacity/ and `Viral Pneumonia/` are not
    read. Nothing tells from which of its sources an image came, no split is published: `group` and `split`
    are "". Second tree, covid_xray: train/, test/ and perhaps val/, each with normal/ and COVID/ in any case:
    the official split.
    Each image counts as a patient, since no patients are known. Images without a mask, and masks without an
    image, are counted in a warning. Errors: `DataNotFound` for a missing folder, `BadData` for one without
    images.
    """
    return _covid_splits(root) if (root / "train").is_dir() else _covid_radiography(root)


def _covid_radiography(root: Path) -> Tables:
    classes = COVID_CLASSES
    need_folders(root, classes)
    found, ignored = sort_files(root, _covid_reason)
    images: dict[tuple[str, str], PurePosixPath] = {}
    masks: dict[tuple[str, str], PurePosixPath] = {}
    # Images of an old version that lie beside an images/ folder are the same films once more.
    for path in sorted(found, key=lambda path: (len(path.parts) == 2, path)):
        kind = masks if path.parts[1] == "masks" else images
        if kind.setdefault((path.parts[0], path.stem), path) != path:
            ignored.append((str(path), "second copy of an image"))
    paths = sorted(images.values())
    rows = [_unknown_patient(path, path.parts[0], classes) for path in paths]
    lost = [str(path) for key, path in masks.items() if key not in images]
    ignored += [(path, "mask without an image") for path in lost]
    bare = sum(
        (root / name / "masks").is_dir() and (name, stem) not in masks for name, stem in images
    )
    if lost or bare:
        log.warning("%s: %d images have no mask and %d masks have no image", root, bare, len(lost))
    row_of = {(path.parts[0], path.stem): row for row, path in enumerate(paths)}
    table = [(row_of[key], str(path)) for key, path in masks.items() if key in row_of]
    organs = pd.DataFrame(sorted(table), columns=["image", "path"]) if table else no_masks()
    return _class_folder_tables(root, rows, classes, ignored, rule="none published", masks=organs)


def _covid_splits(root: Path) -> Tables:
    classes = COVID_CLASSES
    spelled = {name.casefold(): name for name in classes}
    splits = [name for name in ("train", "val", "test") if name != "val" or (root / name).is_dir()]
    need_folders(root, splits)

    def reason(path: PurePosixPath) -> str:
        if path.parts[0] not in splits or len(path.parts) != 3:
            return "outside the split and class folders"
        return "" if path.parts[1].casefold() in spelled else "not a class of this study"

    found, ignored = sort_files(root, reason)
    rows = [
        _unknown_patient(path, spelled[path.parts[1].casefold()], classes, path.parts[0])
        for path in found
    ]
    return _class_folder_tables(root, rows, classes, ignored, splits=splits)


def _unknown_patient(
    path: PurePosixPath, class_name: str, classes: tuple[str, ...], split: str = ""
) -> tuple[str, int, str, str, str, str]:
    """A row of the manifest for an image of which nothing but its class is known."""
    return str(path), classes.index(class_name), class_name, str(path.with_suffix("")), "", split


def _class_folder_tables(
    root: Path,
    rows: Sequence[tuple],
    classes: tuple[str, ...],
    ignored: Sequence[tuple[str, str]],
    *,
    splits: Sequence[str] = ("",),
    rule: str = "official",
    masks: pd.DataFrame | None = None,
) -> Tables:
    manifest = manifest_table(rows)
    need_images(manifest, root, splits, classes)
    _say_small_val(manifest)
    masks = no_masks() if masks is None else masks
    return Tables(manifest, classes, ignored_table(sorted(ignored)), rule, masks=masks)


LAYOUTS: dict[str, Callable[..., Tables]] = {
    "pneumonia": pneumonia,
    "nih": nih,
    "dlia": dlia,
    "fracatlas": fracatlas,
    "tuberculosis": tuberculosis,
    "covid": covid,
}


# --- files and folders


def _nih_folder(path: PurePosixPath) -> str:
    return "train" if re.fullmatch(r"\.|images(_\d+)?(/images)?", str(path.parent)) else ""


def _dlia_folder(path: PurePosixPath) -> str:
    match = re.fullmatch(r"(train|test)(_images)?", str(path.parent))
    return match[1] if match else ""


def _covid_reason(path: PurePosixPath) -> str:
    if path.parts[0] in COVID_OTHERS:
        return "not a class of this study"
    if path.parts[0] not in COVID_CLASSES:
        return "outside the class folders"
    inside = len(path.parts) == 2 or len(path.parts) == 3 and path.parts[1] in ("images", "masks")
    return "" if inside else "outside the image folders"


def _class_folder_reason(path: PurePosixPath, splits: list[str], classes: tuple[str, ...]) -> str:
    if path.parts[0] == "chest_xray":
        return "second copy of the data set (nested chest_xray)"
    if path.parts[0] not in splits or len(path.parts) != 3:
        return "outside the split and class folders"
    if path.parts[1] not in classes:
        return "not a class of this data set"
    return ""


def _say_odd(manifest: pd.DataFrame) -> None:
    odd = manifest.loc[manifest["group"] == "unknown", "path"]
    if len(odd):
        log.warning(
            "%d file names tell no patient; each counts as its own: %s",
            len(odd),
            ", ".join(odd[:SHOWN]),
        )


def _say_small_val(manifest: pd.DataFrame) -> None:
    val = int((manifest["split"] == "val").sum())
    if 0 < val < 100:
        log.info(
            "the official val split has only %d images: draw a larger one with split.grouped", val
        )


# --- tables


def _nih_rows(path: Path) -> pd.DataFrame:
    """The raw boxes of a table with the NIH header, whose `Bbox [x,y,w,h]` its own commas split into four."""
    table = read_csv(path)
    columns = [
        "Image Index",
        "Finding Label",
        "Bbox [x",
        "y",
        "w",
        "h]",
    ]  # More, empty ones may follow.
    need_columns(table, columns, path)
    return _raw(table["Image Index"], table["Finding Label"], table[columns[2:]], xywh=True)


def _dlia_rows(path: Path) -> tuple[str, pd.DataFrame]:
    """Edition ("A" or "B") and raw boxes of the competition's train.csv."""
    table = read_csv(path)
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
    table = read_csv(path)
    need_columns(table, ("image_id",), path)
    key = next((name for name in table.columns if name in ("id", "ID")), None)
    if key is None:
        raise BadData(f"{path} has no column id or ID; it has {', '.join(table.columns)}")
    repeated = (
        table.index[table[key].isna() | table["image_id"].isna() | table[key].duplicated()] + 2
    )
    if len(repeated):
        lines = ", ".join(map(str, repeated[:SHOWN]))
        raise BadData(
            f"{path}: empty or repeated {key} in line {lines}. Fix: download the file again."
        )
    return table


def _raw(names: pd.Series, labels: pd.Series, sides: pd.DataFrame, *, xywh: bool) -> pd.DataFrame:
    """Raw boxes: columns name, class_name, x1, y1, x2, y2 and where (the line of the CSV file)."""
    numbers = (
        sides.apply(pd.to_numeric, errors="coerce").set_axis(CORNERS, axis=1).astype("float64")
    )
    if xywh:
        numbers["x2"] += numbers["x1"]
        numbers["y2"] += numbers["y1"]
    names, labels = (
        column.astype(object).where(column.notna(), "").astype(str).str.strip()
        for column in (names, labels)
    )
    lines = [f"line {row + 2}" for row in range(len(numbers))]  # 1 is the header.
    return numbers.assign(name=names, class_name=labels.replace(NIH_SPELLINGS), where=lines)


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
    shapes = shapes_of(root, {name: images[row][1] for name, row in labelled.items()})
    boxes = box_table(raw, root / file, NIH_CLASSES, labelled, shapes)
    frequency = boxes["label"].map(boxes["label"].value_counts())
    rarest = (
        boxes.assign(frequency=frequency)
        .sort_values(["frequency", "label"])
        .drop_duplicates("image")
    )
    class_of = dict(zip(rarest["image"], rarest["class_name"], strict=True))
    rows = []
    for row, (name, path, split) in enumerate(images):
        class_name = class_of.get(row, UNLABELLED)
        label = NIH_CLASSES.index(class_name) if row in class_of else -1
        rows.append((path, label, class_name, nih_patient(name), "", split))
    return Tables(
        manifest_table(rows), NIH_CLASSES, ignored_table(ignored), split_rule, boxes, NIH_CLASSES
    )
