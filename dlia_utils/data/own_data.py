"""A reader's own images: a folder of class folders, or a table of boxes with a folder of images.

Everything is checked here, once, by names and tables alone; no image is decoded.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

import pandas as pd

from .readers import UNLABELLED
from .tables import (
    CORNERS,
    BadData,
    DataNotFound,
    Tables,
    box_table,
    ignored_table,
    junk_reason,
    manifest_table,
    need_sizes,
    refuse,
    shapes_of,
)

log = logging.getLogger("dlia_utils")

# More than the published sets' list: there, a .tif beside the images is something else.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
NOT_NAMED = "not named like an image"
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
HEALTHY = ("normal", "healthy", "negative", "no finding", "none", "control", "benign", "0")
FILE_COLUMNS = ("file", "filename", "image", "image_id")  # of a table of boxes
CORNER_COLUMNS = (CORNERS, ["xmin", "ymin", "xmax", "ymax"], ["x_min", "y_min", "x_max", "y_max"])
NEED_CORNERS = "corners are needed, x2 = x + width and y2 = y + height, in pixels of the image"


def folder_tables(
    root: Path, *, classes: Sequence[str] | None = None, patient_pattern: str = ""
) -> Tables:
    """Read class folders, perhaps below train/, val/ and test/, perhaps with a CSV.

    Layouts, options and errors: see `datasets.from_folder`, which gives the same as a `Dataset`.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("flu/p1_a.png", "Normal/p2_a.png", "Normal/p2_b.png"):
    ...     (root / name).parent.mkdir(exist_ok=True)
    ...     (root / name).touch()
    >>> tables = folder_tables(root, patient_pattern="(p[0-9]+)_")
    >>> tables.classes, tables.manifest["patient"].tolist()
    (('Normal', 'flu'), ['p2', 'p2', 'p1'])
    """
    pattern = _compiled(patient_pattern)
    images, ignored = _images(root)
    file = _labels_file(root)
    rows = pd.DataFrame({"path": images, "where": images}, dtype=object)
    if file:
        rows = _table(file)
        rows["path"] = _located(rows, images, root, file)
        again = rows[rows["path"].duplicated()]
        lines = _lines(again, "stands above already")
        refuse(f"{file}: {len(lines)} files are named twice:", lines, "keep one row for each file")
        ignored = _unread(root, images, ignored, rows, file)
    if by_label := file is not None and "label" in rows:
        rows["class_name"] = _filled(rows, "label", file)
    else:
        rows = _by_folders(root, rows, file, ignored)
    names = class_order(rows["class_name"], classes)
    if len(names) < 2:
        above = f"; if {root / names[0]} holds the class folders, name that one instead"
        fix = f"add the images of another class{'' if by_label else above}"
        raise BadData(f"{root} has one class only, {names[0]}: two are needed. Fix: {fix}.")
    rows["split"], rule = _splits(rows, file)
    have, given = (
        set(zip(rows["split"], rows["class_name"], strict=True)),
        sorted(set(rows["split"])),
    )
    lines = [
        f"  {name} in {split}" for split in given for name in names if (split, name) not in have
    ]
    fix = "put images of every class into every split"
    refuse(f"{root}: {len(lines)} classes have no image in a split:", lines, fix)
    rows["patient"] = _patients(rows, pattern, file, root)
    manifest = [
        (row.path, names.index(row.class_name), row.class_name, row.patient, "", row.split)
        for row in rows.sort_values("path").itertuples()
    ]
    return Tables(manifest_table(manifest), names, ignored_table(sorted(ignored)), rule)


def boxes_tables(
    root: Path, file: Path, *, classes: Sequence[str] | None = None, patient_pattern: str = ""
) -> Tables:
    """Read boxes on the images below `root` from `file`, a CSV or a COCO JSON.

    Columns, options and errors: see `datasets.from_boxes`, which gives the same as a `Dataset`.
    """
    pattern = _compiled(patient_pattern)
    images, ignored = _images(root)
    if not file.is_file():
        raise DataNotFound(f"{file} is not there; name the CSV or COCO JSON that holds the boxes")
    rows, raw, annotated = _coco(file) if file.suffix.lower() == ".json" else _csv_boxes(file)
    if raw.empty:
        raise BadData(f"{file} holds no box. Fix: export it again with the boxes.")
    rows = rows.assign(path=_located(rows, images, root, file))
    path_of = dict(zip(rows["file"], rows["path"], strict=True))
    for column in sorted({"id", "patient", "split"} & set(rows)):
        odd = rows[rows.groupby("path")[column].transform("nunique") > 1]
        lines = [f"  {row.where}: {row.path}: {getattr(row, column)}" for row in odd.itertuples()]
        fix = f"give each file one {column}"
        refuse(f"{file}: {odd['path'].nunique()} files have more than one {column}:", lines, fix)
    ignored = _unread(root, images, ignored, rows, file)
    rows = rows.drop_duplicates("path").sort_values("path", ignore_index=True)
    raw = raw.assign(name=raw["name"].map(path_of)).astype({"name": str, "class_name": str})
    # A box without a label stays, for `box_table` to name its row.
    names = class_order(set(raw["class_name"]) - {""}, classes)
    if raw[CORNERS].max(axis=None) <= 1:
        raise BadData(f"{file}: no corner lies beyond 1: are these shares? Fix: {NEED_CORNERS}.")
    shapes = shapes_of(root, {path: path for path in raw["name"]})
    need_sizes({path_of[name]: shape for name, shape in annotated.items()}, shapes, file)
    boxes = box_table(
        raw, file, names, {path: row for row, path in enumerate(rows["path"])}, shapes
    )
    splits, rule = _splits(rows, file, train_alone=True)
    if set(splits) == {""}:
        splits, rule = ["train"] * len(rows), "none given: every image is in train"
    # As in the published sets: an image's class is that of its boxes which is rarest among all.
    frequency = boxes["label"].map(boxes["label"].value_counts())
    rarest = boxes.assign(frequency=frequency).sort_values(["frequency", "label"])
    rarest = rarest.drop_duplicates("image").set_index("image")
    label = [int(rarest["label"].get(row, 0)) - 1 for row in range(len(rows))]
    name = [names[one] if one >= 0 else UNLABELLED for one in label]
    patients = _patients(rows, pattern, file, root)
    columns = (rows["path"], label, name, patients, [""] * len(rows), splits)
    manifest = manifest_table(list(zip(*columns, strict=True)))
    return Tables(manifest, names, ignored_table(sorted(ignored)), rule, boxes, names)


def class_order(names: Iterable[str], classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """The classes in their labels' order: `classes`, or healthy ones first, then by name or number.

    Errors: `BadData` for names that differ by case only; `ValueError` when `classes` are not these.

    >>> class_order(["flu", "Normal", "Asthma"]), class_order(["10", "2", "1"])
    (('Normal', 'Asthma', 'flu'), ('1', '2', '10'))
    """
    there = sorted(set(names))
    _need_one_spelling(there)
    if classes is not None:
        if sorted(classes) != there:
            raise ValueError(
                f"classes = {list(classes)!r} must name each of the data's classes once: "
                + ", ".join(there)
            )
        return tuple(classes)

    def rank(name: str) -> tuple:
        plain = _plain(name)
        healthy = HEALTHY.index(plain) if plain in HEALTHY else len(HEALTHY)
        number = (int(plain), "") if plain.isdecimal() else (float("inf"), plain)
        return healthy, *number

    return tuple(sorted(there, key=rank))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name)).strip().casefold()


def _need_one_spelling(names: Iterable[str]) -> None:
    alike = defaultdict(list)
    for name in sorted(names):
        alike[unicodedata.normalize("NFC", name).strip().casefold()].append(name)
    lines = [f"  {' and '.join(same)}" for same in alike.values() if len(same) > 1]
    fix = "write each class in one way"
    refuse(f"{len(lines)} classes are written in ways that differ by case only:", lines, fix)


def holds_classes(folder: Path) -> bool:
    """Whether a folder looks like class folders with images, or like images with a CSV of labels.

    One class folder is enough, for an error about the others says more than that nothing is there;
    beside a table of boxes it takes two.
    """
    tables = [_header(path) for path in _csv_files(folder)]
    if any({"file", "label"} <= set(one) and not _corners(one) for one in tables):
        return has_image(folder)
    tops = [folder / name for name in _subfolders(folder)]
    levels = [top for top in tops if top.name.casefold() in SPLIT_OF]
    places = [level / name for level in levels for name in _subfolders(level)] if levels else tops
    needed = 2 if box_files(folder) else 1
    return len(list(islice(filter(has_image, places), needed))) == needed


def box_files(folder: Path) -> list[Path]:
    """Files at a folder's top that look like boxes: CSV with files and corners, or COCO JSON."""
    found = [
        path
        for path in _csv_files(folder)
        if path.parent == folder
        and _corners(header := _header(path))
        and set(header) & set(FILE_COLUMNS)
    ]
    for path in sorted(folder.glob("*.[jJ][sS][oO][nN]")):
        with path.open("rb") as stream:  # A large file is not read whole for this.
            start = stream.read(1 << 16)
        if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{") and (
            b'"images"' in start or b'"annotations"' in start
        ):
            found.append(path)
    return sorted(found)


def has_image(folder: Path) -> bool:
    """Whether any file below a folder is named like an image; the search stops at the first."""
    return any(not reason for _, reason in _files(folder))


# --- files and folders


def _files(root: Path) -> Iterator[tuple[str, str]]:
    """(path, why it is no image, or "") of every file below `root`; links are followed."""
    for path, broken in _walk(root, PurePosixPath(), frozenset()):
        named = "" if path.suffix.lower() in SUFFIXES else NOT_NAMED
        yield str(path), junk_reason(path) or broken or named


def _walk(
    folder: Path, relative: PurePosixPath, above: frozenset
) -> Iterator[tuple[PurePosixPath, str]]:
    above |= {os.path.realpath(folder)}
    for entry in _entries(folder):
        path = relative / entry.name
        if not entry.is_dir():
            yield path, "" if entry.is_file() else "a link to nothing, or no file"
        elif os.path.realpath(entry.path) in above:
            yield path, "a link to a folder that it lies in"
        else:
            yield from _walk(Path(entry.path), path, above)


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        text = f"{folder} cannot be read ({error.strerror}). Fix: its access rights."
        raise BadData(text) from error


def _images(root: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Images below `root`, and (path, reason) of the other files."""
    if not root.is_dir():
        raise DataNotFound(
            f"{root} is not a folder; name the folder that holds the images (unpacked)"
        )
    found = list(_files(root))
    return sorted(path for path, why in found if not why), [one for one in found if one[1]]


def _unread(root: Path, images: list, ignored: list, rows: pd.DataFrame, file: Path) -> list:
    """The ignored files, with the images that `file` does not list and without `file` itself."""
    unlisted = sorted(set(images) - set(rows["path"]))
    kept = [(path, why) for path, why in ignored if root / path != file]
    return kept + [(path, f"not in {file.name}") for path in unlisted]


def _subfolders(folder: Path) -> list[str]:
    names = [entry.name for entry in _entries(folder) if entry.is_dir()]
    return [name for name in names if not junk_reason(PurePosixPath(name))]


def _by_folders(root: Path, rows: pd.DataFrame, file: Path | None, ignored: list) -> pd.DataFrame:
    """The rows with the column class_name; images outside the class folders go to `ignored`."""
    split = rows["path"].map(_split_folder)
    level = int((split != "").any())
    parts = rows["path"].map(lambda path: path.split("/"))
    depth = parts.map(len) - 1
    lines = _lines(rows[(split == "") & (depth > 0)]) if level else []
    fix = "move these folders into a split's folder, or rename a class that is called like a split"
    refuse(f"{root}: images lie beside the folders of the splits:", lines, fix)
    loose = rows[depth <= level]
    if file:
        fix = f"move them, or add the column label to {file.name}"
        refuse(f"{file}: {len(loose)} images lie in no class folder:", _lines(loose), fix)
    ignored += [(path, "outside the class folders") for path in loose["path"]]
    tops = _subfolders(root)
    if level:
        tops = [top for top in tops if top.casefold() in SPLIT_OF]
        tops = [
            one
            for top in tops
            for one in [f"{top}/{name}" for name in _subfolders(root / top)] or [top]
        ]
    if not tops:
        raise BadData(
            f"{root} has no class folder ({len(rows)} images lie in it). Fix: make a folder for each "
            "class, or a CSV with the columns file and label"
        )
    rows = rows[depth > level].assign(
        class_name=parts.map(lambda names: names[min(level, len(names) - 1)])
    )
    _need_one_spelling(set(rows["class_name"]) | {top.split("/")[-1] for top in tops})
    filled = {"/".join(names[: level + 1]) for names in parts}
    lines = []
    for top in sorted(set(tops) - filled):
        kinds = Counter(
            PurePosixPath(path).suffix for path, _ in ignored if path.startswith(f"{top}/")
        )
        lines.append(f"  {top}" + (f" (files: {', '.join(map(str, kinds))})" if kinds else ""))
    which = f" listed in {file.name}" if file else f" ({', '.join(SUFFIXES)})"
    fix = "put images there (convert other types to PNG), or delete the folder"
    refuse(f"{root}: {len(lines)} class folders have no image{which}:", lines, fix)
    return rows


# --- tables


def _csv_files(folder: Path) -> list[Path]:
    files = [
        path for path in folder.glob("*.[cC][sS][vV]") if not junk_reason(PurePosixPath(path.name))
    ]
    beside = folder.parent / f"{folder.name}.csv"
    return sorted(files) + ([beside] if beside.is_file() else [])


def _labels_file(root: Path) -> Path | None:
    """The CSV with a column `file` in `root` or beside it; others are named in a warning."""
    files = _csv_files(root)
    tables = [
        path for path in files if "file" in (header := _header(path)) and not _corners(header)
    ]
    if len(tables) > 1:
        raise BadData(
            f"{root}: {' and '.join(map(str, tables))} both have a column file. Fix: keep one there."
        )
    if others := [path.name for path in files if path not in tables and path.parent == root]:
        log.warning(
            "%s: not read, for it has no column file, or is of boxes: %s", root, ", ".join(others)
        )
    return tables[0] if tables else None


def _header(path: Path) -> list[str]:
    """The column names of a CSV in lower case; none when it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            first = lines.readline(1 << 16)
        cells = next(csv.reader([first], delimiter=_delimiter(first)), [])
    except (OSError, csv.Error):
        return []
    return [cell.strip().casefold() for cell in cells]


def _delimiter(line: str) -> str:
    return max(",;\t", key=line.count)


def _corners(header: Iterable[str]) -> list[str]:
    """The names of the four corner columns; none when there are not all."""
    return next((names for names in CORNER_COLUMNS if set(names) <= set(header)), [])


def _table(path: Path) -> pd.DataFrame:
    """A CSV as text (0012 stays 0012), without blank rows; `where` is the line of each row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            delimiter = _delimiter(stream.readline())
            stream.seek(0)
            reader = csv.reader(stream, delimiter=delimiter)
            rows = [
                ([cell.strip() for cell in cells], f"line {reader.line_num}") for cells in reader
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadData(f"{path} cannot be read ({error}). Fix: save it as CSV in UTF-8.") from error
    header, rows = _header(path), [row for row in rows[1:] if any(row[0])]
    if twice := [name for name, count in Counter(filter(None, header)).items() if count > 1]:
        raise BadData(f"{path} has two columns {', '.join(twice)}. Fix: keep one.")
    if not rows:
        raise BadData(f"{path} has no rows. Fix: a row for each image.")
    lines = [f"  {where}: {len(cells)} cells" for cells, where in rows if any(cells[len(header) :])]
    fix = f'put a cell that holds "{delimiter}" in double quotes'
    refuse(f"{path}: {len(lines)} rows have more cells than the {len(header)} columns:", lines, fix)
    cells = [(cells + [""] * len(header))[: len(header)] for cells, _ in rows]
    table = pd.DataFrame(cells, columns=header, dtype=object)
    return table.loc[:, [name != "" for name in header]].assign(where=[where for _, where in rows])


def _lines(rows: pd.DataFrame, what: str = "") -> list[str]:
    """The rows in words: where, path, and what is wrong with it."""
    pairs = zip(rows["where"], rows["path"], strict=True)
    heads = [path if where == path else f"{where}: {path}" for where, path in pairs]
    return [f"  {head}" + (f" {what}" if what else "") for head in heads]


def _filled(rows: pd.DataFrame, column: str, file: Path) -> pd.Series:
    lines = _lines(rows[rows[column] == ""])
    refuse(
        f"{file}: {len(lines)} rows have no {column}:",
        lines,
        f"fill the column {column} in each row",
    )
    return rows[column]


def _located(rows: pd.DataFrame, images: list[str], root: Path, file: Path) -> list[str]:
    """The image below `root` that each row's `file` means, by path, or by name where only one has it."""
    there, named = set(images), defaultdict(list)
    for path in images:
        named[path.rpartition("/")[2].casefold()].append(path)
    found, lines = [], []
    for text, where in zip(rows["file"], rows["where"], strict=True):
        name = Path(os.path.relpath(text, root)).as_posix() if os.path.isabs(text) else text
        path = posixpath.normpath(name.replace("\\", "/"))
        same = named[path.rpartition("/")[2].casefold()]
        if path in there:
            wrong = ""
        elif not text:
            wrong = "names no file"
        elif path.startswith("../"):
            wrong = "lies outside the folder"
        elif PurePosixPath(path).suffix.lower() not in SUFFIXES:
            wrong = f"is not of a type that is read ({', '.join(SUFFIXES)})"
        elif "/" not in path and len(same) == 1 and same[0].endswith(f"/{path}"):
            path, wrong = same[0], ""
        else:
            wrong = f"is not there, but {' and '.join(same[:2])} is" if same else "is not there"
        found.append(path)
        lines += [f"  {where}: {text} {wrong}"] if wrong else []
    fix = f"correct these names (paths count from {root}), or copy the missing images there"
    refuse(f"{file}: {len(lines)} rows name a file that cannot be used:", lines, fix)
    return found


def _split_folder(path: str) -> str:
    """The split that a path's first folder is called like; "" when it is none."""
    top, slash, _ = path.partition("/")
    return SPLIT_OF.get(top.casefold(), "") if slash else ""


def _splits(
    rows: pd.DataFrame, file: Path | None, *, train_alone: bool = False
) -> tuple[list[str], str]:
    """The split of each row ("" where none is given) and the rule, from the CSV or the folders."""
    folders = rows["path"].map(_split_folder)
    given, rule = folders, "given by the folders"
    if "split" in rows and (rows["split"] != "").any():
        spelled = _filled(rows, "split", file)
        given, rule = spelled.str.casefold().map(SPLIT_OF), f"given by {file.name}"
        lines = [f"{line}: {one}" for line, one in zip(_lines(rows), spelled, strict=True)]
        unknown = [line for line, known in zip(lines, given.notna(), strict=True) if not known]
        refuse(
            f"{file}: {len(unknown)} rows have an unknown split:",
            unknown,
            "write train, val or test",
        )
        odd = [
            line
            for line, bad in zip(lines, (folders != "") & (folders != given), strict=True)
            if bad
        ]
        refuse(
            f"{file}: {len(odd)} images lie in another split's folder:",
            odd,
            "correct the column split",
        )
    elif (folders != "").any():
        stray = _lines(rows[folders == ""])
        fix = "move them into one, or add a column split"
        refuse(f"{len(stray)} images lie outside the folders of the splits:", stray, fix)
    names = set(given)
    if names == {""} or train_alone and names == {"train"}:
        return [""] * len(rows), "none"
    if "train" not in names or len(names) < 2:
        raise BadData(
            f"the splits ({rule}) are {', '.join(sorted(names))} only. Fix: train is needed, with test, "
            "val or both; without a split at all one is drawn"
        )
    return list(given), rule


def _compiled(patient_pattern: str) -> re.Pattern | None:
    try:
        pattern = re.compile(patient_pattern)
    except re.error as error:
        raise ValueError(
            f"patient_pattern = {patient_pattern!r} is no regular expression: {error}"
        ) from error
    if patient_pattern and not pattern.groups:
        raise ValueError(
            f"patient_pattern = {patient_pattern!r} has no group: put the part of the path that names "
            "the patient in round brackets"
        )
    return pattern if patient_pattern else None


def _patients(
    rows: pd.DataFrame, pattern: re.Pattern | None, file: Path | None, root: Path
) -> list[str]:
    """The patient of each row: from the column `patient`, by `pattern`, or each image its own."""
    if "patient" in rows:
        if pattern:
            raise ValueError(
                f"patient_pattern is set, and {file} names the patients: leave one out"
            )
        return list(_filled(rows, "patient", file))
    if pattern is None:
        log.warning(
            "%s: no patients are known, so each of the %d images counts as a patient of its own. "
            "Images of one patient may land on both sides of the split, and scores then come out "
            "too good. Give a column patient in a CSV, or the setting patient_pattern.",
            root,
            len(rows),
        )
        return list(rows["path"])
    group = "patient" if "patient" in pattern.groupindex else 1
    found = [pattern.search(path) for path in rows["path"]]
    patients = [(match and match[group]) or "" for match in found]
    lines = [
        f"  {path}" for path, patient in zip(rows["path"], patients, strict=True) if not patient
    ]
    what = f"finds no patient in {len(lines)} of {len(rows)} paths:"
    head = f"patient_pattern = {pattern.pattern!r} {what}"
    refuse(
        head,
        lines,
        "widen the pattern, or name the patients in a CSV with the columns file, patient",
    )
    return patients


def _csv_boxes(file: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """Rows (file, where, ...), raw boxes and no annotated sizes, of a CSV with corners."""
    table = _table(file)
    column = next((name for name in FILE_COLUMNS if name in table), "file")
    corners = _corners(table) or CORNERS
    if missing := [name for name in (column, "label", *corners) if name not in table]:
        raise BadData(
            f"{file} has no column {', '.join(missing)}; it has "
            f"{', '.join(table.columns.drop('where'))}. Fix: name the columns "
            f"file, label, x1, y1, x2, y2 ({NEED_CORNERS})."
        )
    table = table.rename(columns={column: "file"})
    numbers = (
        table[corners]
        .apply(pd.to_numeric, errors="coerce")
        .set_axis(CORNERS, axis=1)
        .astype("float64")
    )
    # An image that was looked at and has nothing on it: a row without corners.
    healthy = table["label"].map(lambda text: _plain(text) in ("", *HEALTHY))
    bare = healthy & (table[corners] == "").all(axis=1)
    raw = numbers.assign(name=table["file"], class_name=table["label"], where=table["where"])[~bare]
    flat = raw[(raw["x2"] <= raw["x1"]) | (raw["y2"] <= raw["y1"])]
    corners = flat[CORNERS].map("{:g}".format).agg(", ".join, axis=1)
    lines = _lines(flat.assign(path=flat["name"] + " [" + corners + "]")) if len(flat) else []
    head = f"{file}: {len(lines)} boxes whose second corner is not right of and below the first:"
    refuse(head, lines, f"are these x, y, width, height? {NEED_CORNERS}")
    kept = [name for name in ("file", "where", "patient", "split") if name in table]
    return table[kept], raw, {}


def _coco(file: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """As `_csv_boxes`, of a COCO file, with the (height, width) that it gives for files."""
    again = "Fix: export it again as COCO, with the lists images, annotations and categories."
    try:
        coco = json.loads(file.read_text(encoding="utf-8-sig"))
        images, annotations = list(coco["images"]), list(coco["annotations"])
        kinds = {one["id"]: str(one["name"]).strip() for one in coco["categories"]}
        named = [(one["id"], str(one["file_name"]).strip()) for one in images]
    except KeyError as error:
        raise BadData(f"{file} lacks {error}. {again}") from error
    except (ValueError, TypeError) as error:
        raise BadData(f"{file} is not COCO ({error}). {again}") from error
    twice = [key for key, count in Counter(key for key, _ in named).items() if count > 1]
    lines = [f"  image {key}: {name}" for key, name in named if key in twice]
    refuse(
        f"{file}: {len(twice)} ids are given to more than one image:",
        lines,
        "give each image its own id",
    )
    name_of, boxes, lines = dict(named), [], []
    for number, one in enumerate(annotations):
        one = one if isinstance(one, dict) else {}
        where = f"annotation {one.get('id', number)}"
        try:
            x, y, width, height = map(float, one["bbox"])
            name, kind = name_of[one["image_id"]], kinds[one["category_id"]]
        except (KeyError, TypeError, ValueError):
            what = [f"{key} {one.get(key)}" for key in ("image_id", "category_id", "bbox")]
            lines.append(f"  {where}: {', '.join(what)}")
        else:
            boxes.append((name, kind, x, y, x + width, y + height, where))
    fix = "image_id and category_id must be listed, and bbox be x, y, width, height"
    refuse(f"{file}: {len(lines)} unusable annotations:", lines, fix)
    rows = pd.DataFrame(named, columns=["id", "file"], dtype=object)
    rows["where"] = [f"image {key}" for key, _ in named]
    for column in ("patient", "split"):
        if any(column in one for one in images):
            rows[column] = [str(one.get(column, "")).strip() for one in images]
    raw = pd.DataFrame(boxes, columns=["name", "class_name", *CORNERS, "where"])
    sizes = zip(
        rows["file"], [(one.get("height"), one.get("width")) for one in images], strict=True
    )
    return rows, raw, {name: size for name, size in sizes if all(size)}
