"""A reader's own images: a folder of class folders, or a table of boxes with a folder of images.

Everything is checked here, once, by names and tables alone; no image is decoded.
"""

from __future__ import annotations

import codecs
import logging
import os
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pandas as pd

from ..metrics import missing
from .readers import UNLABELLED, other_sizes, raw_boxes, read_coco
from .tables import (
    CORNERS,
    BadData,
    DataNotFound,
    box_table,
    delimiter,
    junk_reason,
    rarest_class,
    read_csv,
    refuse,
    shapes_of,
    sort_files,
    tables,
)

log = logging.getLogger("dlia_utils")

# More than the published sets' list: there, a .tif beside the images is something else.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
SPLIT_OF = dict.fromkeys(("train", "training"), "train")
SPLIT_OF |= dict.fromkeys(("val", "valid", "validation"), "val")
SPLIT_OF |= dict.fromkeys(("test", "testing"), "test")
HEALTHY = "normal,healthy,negative,no finding,none,control,benign,0".split(",")
FILE_COLUMNS = ("file", "filename", "image", "image_id")  # of a table of boxes
CORNER_COLUMNS = (CORNERS, ["xmin", "ymin", "xmax", "ymax"], ["x_min", "y_min", "x_max", "y_max"])
NEED_CORNERS = "corners are needed, x2 = x + width and y2 = y + height, in pixels of the image"


def read_folder(
    root: Path, *, classes: Sequence[str] | None = None, patient_pattern: str = ""
) -> dict:
    """Read class folders, perhaps below splits, perhaps with a CSV: see `datasets.from_folder`."""
    (images, ignored), file, problems = _images(root), _labels_file(root), []
    rows = pd.DataFrame({"path": images, "where": images}, dtype=object)
    if file:
        rows, ignored = _located(_table(file), file, images, ignored, root, problems)
        again = rows["path"].duplicated()
        problems += _lines(rows[again], "stands above already: keep one row for each file")
        refuse(f"{file}", problems, _fix_rows(root))
    rows["split"], rule = _splits(rows, file, problems)
    if "label" in rows:
        rows["class_name"] = rows["label"]
        problems += _lines(rows[rows["label"] == ""], "has no label")
    else:
        rows = _by_folders(root, rows, file, ignored, problems)
    what = f"correct the folders, or {file.name if file else 'add a CSV with file and label'}"
    refuse(f"{root}", problems, what)
    names = class_order(rows["class_name"], classes)
    if len(names) < 2:
        fix = f"add another class; if {root / names[0]} holds the classes, name that one instead"
        raise BadData(f"{root} has one class only, {names[0]}: two are needed. Fix: {fix}.")
    there = set(zip(rows["split"], rows["class_name"], strict=True))
    wanted = {(split, name) for split in rows["split"] for name in names}
    problems = [f"{split} has no image of {name}" for split, name in sorted(wanted - there)]
    rows["patient"] = _patients(rows, patient_pattern, root, problems)
    refuse(f"{root}", problems, "put every class into every split, and name every patient")
    manifest = [
        (row.path, names.index(row.class_name), row.class_name, row.patient, "", row.split)
        for row in rows.sort_values("path").itertuples()
    ]
    return tables(manifest, names, ignored, split_rule=rule)


def read_boxes(
    root: Path,
    annotations: Path,
    *,
    classes: Sequence[str] | None = None,
    patient_pattern: str = "",
) -> dict:
    """Read boxes from a CSV or a COCO JSON: see `datasets.from_boxes`."""
    (images, ignored), file = _images(root), annotations
    if not file.is_file():
        raise DataNotFound(f"{file} is not there; name the CSV or COCO JSON that holds the boxes")
    marks = read_coco(file) if file.suffix.lower() == ".json" else _csv_boxes(file)
    raw, problems = marks.boxes, marks.problems
    if raw.empty:
        problems.append("it holds no box: export it again with the boxes")
    elif raw[CORNERS].max(axis=None) <= 1:
        problems.append(f"no corner lies beyond 1: are these shares? {NEED_CORNERS}")
    rows, ignored = _located(marks.images, file, images, ignored, root, problems)
    for column in sorted({"id", "patient", "split"} & set(rows)):
        odd = rows[rows.groupby("path")[column].transform("nunique") > 1]
        problems += _lines(odd, f"has more than one {column}")
    refuse(f"{file}", problems, _fix_rows(root))
    path_of = dict(zip(rows["file"], rows["path"], strict=True))
    rows = rows.drop_duplicates("path").sort_values("path", ignore_index=True)
    raw = raw.assign(name=raw["name"].map(path_of)).astype({"name": str, "class_name": str})
    names = class_order(set(raw["class_name"]) - {""}, classes)
    row_of = {path: row for row, path in enumerate(rows["path"])}
    shapes = dict(zip(row_of, shapes_of(root, row_of), strict=True))
    problems += other_sizes({path_of[name]: size for name, size in marks.sizes.items()}, shapes)
    boxes, wrong = box_table(raw, names, row_of, shapes)
    rows["split"], rule = _splits(rows, file, problems, train_alone=True)
    rows["patient"] = _patients(rows, patient_pattern, root, problems)
    refuse(f"{file}", problems + wrong, f"correct or delete these rows ({NEED_CORNERS})")
    if set(rows["split"]) == {""}:
        rows["split"], rule = "train", "none given: every image is in train"
    manifest = [
        (row.path, k, names[k] if k >= 0 else UNLABELLED, row.patient, "", row.split)
        for k, row in zip(rarest_class(boxes, len(rows)), rows.itertuples(), strict=True)
    ]
    return tables(manifest, names, ignored, split_rule=rule, boxes=boxes, box_classes=names)


def recognised(folder: Path, kind: str) -> dict | None:
    """Options for reading a folder that looks like data of `kind` ("folder", "boxes"), else None.

    One class folder is enough, for an error about the others says more than that nothing is there;
    beside a table of boxes it takes two.
    """
    images, boxes, lists = _images(folder)[0], [], False
    for path in _csv_files(folder):
        header = _header(path)
        if not _corners(header):
            lists |= {"file", "label"} <= set(header)
        elif {*header} & {*FILE_COLUMNS}:
            boxes.append(path)
    for path in filter(Path.is_file, folder.glob("*.[jJ][sS][oO][nN]")):
        with path.open("rb") as stream:  # A large file is not read whole for this.
            start = stream.read(1 << 16)
        boxes += [path] if b'"images"' in start or b'"annotations"' in start else []
    if kind == "boxes":
        return {"annotations": boxes[0]} if images and len(boxes) == 1 else None
    level = int(any(map(_split_folder, images)))
    places = {tuple(path.split("/")[: level + 1]) for path in images if path.count("/") > level}
    return {} if images and (lists or len(places) >= (2 if boxes else 1)) else None


def class_order(names: Iterable[str], classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """The classes in their labels' order: `classes`, or healthy ones first, then by name or number.

    Errors: `BadData` for names that differ by case only; `ValueError` when `classes` are not these.

    >>> class_order(["flu", "Normal", "Asthma"]), class_order(["10", "2", "1"])
    (('Normal', 'Asthma', 'flu'), ('1', '2', '10'))
    """
    there, alike = sorted(set(names)), defaultdict(list)
    for name in there:
        alike[_plain(name)].append(name)
    same = [" and ".join(some) for some in alike.values() if len(some) > 1]
    refuse("classes that differ by their writing only", same, "write each class in one way")
    if classes is not None:
        if sorted(classes) != there:
            text = f"must name each class once: {', '.join(there)}"
            raise ValueError(f"classes = {list(classes)!r} {text}")
        return tuple(classes)

    def rank(name: str) -> tuple:
        plain = _plain(name)
        healthy = HEALTHY.index(plain) if plain in HEALTHY else len(HEALTHY)
        return healthy, (int(plain), "") if plain.isdecimal() else (float("inf"), plain)

    return tuple(sorted(there, key=rank))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name).strip()).casefold()


# ------------------------------------------------------------------------------ files and folders


def _images(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    if not root.is_dir():
        text = "is not a folder; name the folder that holds the images (unpacked)"
        raise DataNotFound(f"{root} {text}")
    found, ignored = sort_files(root, lambda path: "", SUFFIXES)
    return sorted(map(str, found)), ignored


def _by_folders(
    root: Path, rows: pd.DataFrame, file: Path | None, ignored: list, problems: list[str]
) -> pd.DataFrame:
    """The rows with the column class_name; images outside the class folders go to `ignored`."""
    level = int(rows["path"].map(_split_folder).ne("").any())
    parts = rows["path"].str.split("/")
    loose = parts.map(len) <= level + 1
    if file:
        text = f"lies in no class folder, and {file.name} has no column label"
        problems += _lines(rows[loose], text)
    ignored += [(path, "outside the class folders") for path in rows["path"][loose]]
    tops = [one.relative_to(root) for one in root.glob("/".join("*" * (level + 1))) if one.is_dir()]
    tops = {one.as_posix() for one in tops if not junk_reason(PurePosixPath(one))}
    tops -= {top for top in tops if level and not _split_folder(top)}
    if not tops:
        problems.append(f"no class folder, but {len(rows)} images: make a folder for each class")
    for top in sorted(tops - {"/".join(some[: level + 1]) for some in parts}):
        kinds = {PurePosixPath(path).suffix for path, _ in ignored if path.startswith(f"{top}/")}
        which = f"listed in {file.name}" if file else f"({', '.join(SUFFIXES)})"
        found = f", only {', '.join(sorted(kinds))}: convert them to PNG" if kinds else ""
        problems.append(f"the class folder {top} has no image {which}{found}")
    return rows[~loose].assign(class_name=parts.str[level])


def _split_folder(path: str) -> str:
    """The split that a path's first folder is called like; "" when it is none."""
    top, slash, _ = path.partition("/")
    return SPLIT_OF.get(top.casefold(), "") if slash else ""


def _splits(
    rows: pd.DataFrame, file: Path | None, problems: list[str], *, train_alone: bool = False
) -> tuple[pd.Series, str]:
    """The split of each row ("" where none is given) and the rule, from the CSV or the folders."""
    folders = rows["path"].map(_split_folder)
    given, rule = folders, "given by the folders"
    if "split" in rows and (rows["split"] != "").any():
        given, rule = rows["split"].str.casefold().map(SPLIT_OF).fillna(""), f"given by {file.name}"
        problems += _lines(rows[given == ""], "has no split of train, val, test")
        odd = (folders != "") & (given != "") & (folders != given)
        problems += _lines(rows[odd], "lies in the folder of another split")
    elif (folders != "").any():
        deep = rows["path"].str.count("/") >= (0 if file else 1)
        problems += _lines(rows[(folders == "") & deep], "lies outside the folders of the splits")
    names = set(given) - {""}
    if not names or train_alone and names == {"train"}:
        return given.map(lambda _: ""), "none"
    if "train" not in names or len(names) < 2:
        text = f"the splits ({rule}) are {', '.join(sorted(names))} only"
        problems.append(f"{text}: train is needed, with test, val or both; or no split at all")
    return given, rule


# ----------------------------------------------------------------------------------------- tables


def _csv_files(folder: Path) -> list[Path]:
    return sorted(filter(Path.is_file, folder.glob("[!.]*.[cC][sS][vV]")))


def _labels_file(root: Path) -> Path | None:
    """The CSV with a column `file` in `root`; others are named in a warning."""
    found = _csv_files(root)
    fit = [path for path in found if "file" in _header(path) and not _corners(_header(path))]
    if len(fit) > 1:
        names = " and ".join(map(str, fit))
        raise BadData(f"{root}: {names} both have a column file. Fix: keep one there.")
    if others := [path.name for path in found if path not in fit]:
        text = "%s: not read, for it has no column file, or is of boxes: %s"
        log.warning(text, root, ", ".join(others))
    return fit[0] if fit else None


def _header(path: Path) -> list[str]:
    """The column names of a CSV in lower case, of one in UTF-16 too: it is refused by its name."""
    with path.open("rb") as stream:
        start = stream.read(1 << 16)
    wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    first = start.decode("utf-16" if wide else "utf-8-sig", "replace").split("\n")[0]
    return [cell.strip(' "\r').casefold() for cell in first.split(delimiter(first))]


def _corners(header: Collection[str]) -> list[str]:
    """The names of the four corner columns; none when there are not all."""
    return next((names for names in CORNER_COLUMNS if set(names) <= set(header)), [])


def _table(path: Path) -> pd.DataFrame:
    """A CSV as text, its columns in lower case; `where` is the line of each row."""
    table = read_csv(path, text=True).rename(columns=str.casefold)
    twice = table.columns[table.columns.duplicated()]
    refuse(f"{path}", [f"two columns {name}: keep one" for name in twice], "correct it")
    return table.assign(where=table.index.map("line {}".format)).reset_index(drop=True)


def _lines(rows: pd.DataFrame, what: str) -> list[str]:
    """The rows in words: where, path, and what is wrong with it."""
    pairs = zip(rows["where"], rows["path"], strict=True)
    return [f"{path if where == path else f'{where}: {path}'} {what}" for where, path in pairs]


def _located(
    rows: pd.DataFrame, file: Path, images: list[str], ignored: list, root: Path, problems: list
) -> tuple[pd.DataFrame, list]:
    """The rows with `path`, the image that `file` means, and the ignored, unlisted images too."""
    there, named, found = set(images), defaultdict(list), []
    for path in images:
        named[posixpath.basename(path).casefold()].append(path)
    for text, where in zip(rows["file"], rows["where"], strict=True):
        path = os.path.relpath(text, root) if os.path.isabs(text) else text
        path = posixpath.normpath(path.replace("\\", "/"))
        same = named[posixpath.basename(path).casefold()]
        if "/" not in path and len(same) == 1 and same[0].endswith(f"/{path}"):
            path = same[0]
        if path not in there:
            instead = f", but {' and '.join(same[:2])} is" if same else ""
            problems.append(f"{where}: {text or 'no file'} is not there{instead}")
        found.append(path)
    unlisted = [(path, f"not in {file.name}") for path in sorted(there - set(found))]
    kept = [one for one in ignored if root / one[0] != file]
    return rows.assign(path=found), kept + unlisted


def _fix_rows(root: Path) -> str:
    return f"correct these rows (paths count from {root}; images are {', '.join(SUFFIXES)})"


def _patients(rows: pd.DataFrame, pattern: str, root: Path, problems: list[str]) -> list[str]:
    """The patient of each row: from the column `patient`, by `pattern`, or each image its own."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        text = f"patient_pattern = {pattern!r} is no regular expression ({error})"
        raise ValueError(text) from error
    if pattern and ("patient" in rows or not compiled.groups):
        text = "it needs (a group), and no table that names the patients"
        raise ValueError(f"patient_pattern = {pattern!r}: {text}")
    if "patient" in rows:
        problems += _lines(rows[missing(rows["patient"])], "has no patient")
        return list(rows["patient"])
    if not pattern:
        text = "%s: no patients are known, so each of the %d images counts as a patient of its own."
        text += " Images of one patient may land on both sides of the split, and scores then come "
        text += "out too good. Give a column patient in a CSV, or the setting patient_pattern."
        log.warning(text, root, len(rows))
        return list(rows["path"])
    group = "patient" if "patient" in compiled.groupindex else 1
    found = [compiled.search(path) for path in rows["path"]]
    patients = [(match and match[group]) or "" for match in found]
    lost = rows[[not patient for patient in patients]]
    problems += _lines(lost, f"has no patient by patient_pattern = {pattern!r}: widen it")
    return patients


def _csv_boxes(file: Path) -> SimpleNamespace:
    """As `read_coco`, of a CSV with corners."""
    table = _table(file)
    column = next((name for name in FILE_COLUMNS if name in table), "file")
    corners = _corners(table) or CORNERS
    if missing := [name for name in (column, "label", *corners) if name not in table]:
        there = ", ".join(table.columns.drop("where"))
        fix = f"name the columns file, label, x1, y1, x2, y2 ({NEED_CORNERS})"
        raise BadData(f"{file} has no column {', '.join(missing)}; it has {there}. Fix: {fix}.")
    table = table.rename(columns={column: "file"})
    # An image that was looked at and has nothing on it: a row without corners.
    healthy = table["label"].map(lambda text: _plain(text) in ("", *HEALTHY))
    boxes = table[~(healthy & (table[corners] == "").all(axis=1))]
    numbers = boxes[corners].apply(pd.to_numeric, errors="coerce")
    columns = (boxes["file"], boxes["label"], *numbers.T.to_numpy(), boxes["where"])
    kept = table[[name for name in ("file", "where", "patient", "split") if name in table]]
    raw = raw_boxes(list(zip(*columns, strict=True)))
    return SimpleNamespace(images=kept, boxes=raw, sizes={}, problems=[])
