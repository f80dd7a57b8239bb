"""The competition's CSV: built from the rows of its id table, checked cell by cell, written in one step."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from . import files
from .data.readers import NIH_CLASSES

CORNERS = ("x1", "y1", "x2", "y2")
COORDINATES = ("x_min", "y_min", "x_max", "y_max")
PREDICTED = (*COORDINATES, "confidence", "label")
SAME_IOU = 0.99  # Two boxes of one label that overlap more than this are one finding said twice.
MIN_SIDE = 1e-3  # Thinner boxes (pixels) are dropped: another reader's rounding could turn them inside out.
SHOWN = 10  # How many rows or names a message lists before it only counts.
SEPARATORS = {";": "a semicolon", "\t": "a tab", "|": "a bar"}
MISSING = ("", "nan", "na", "n/a", "<na>", "null", "none")

Table = pd.DataFrame | str | os.PathLike


class SubmissionError(ValueError):
    """A submission that the competition would refuse or score wrongly; the message lists what, where and the fix."""


def columns(mapping: Table) -> list[str]:
    """The submission's columns in their order: the mapping's id column, `image_id`, the box and its label.

    `mapping` is the competition's id table or its file. The id is called `id` (edition A) or `ID` (edition
    B). Errors: `ValueError` for a table that is no mapping, `FileNotFoundError`.

    >>> columns(pd.DataFrame({"ID": [0], "image_id": ["a.png"]}))
    ['ID', 'image_id', 'x_min', 'y_min', 'x_max', 'y_max', 'confidence', 'label']
    """
    return [*_mapping(mapping).columns, *PREDICTED]


def class_prior(boxes: pd.DataFrame, sizes: Mapping[int, Sequence[int]]) -> pd.DataFrame:
    """The median box of each class in training, the most frequent class first: what `build` fills gaps with.

    `boxes` are true boxes (columns image, x1, y1, x2, y2, label; pixels of the original image), `sizes` gives
    an image's (width, height). Columns label, x1, y1, x2, y2, the corners as fractions of the image. Errors:
    `ValueError` for an empty table or an image without a size.

    >>> boxes = pd.DataFrame([[0, 10, 20, 30, 40, 2]], columns=["image", *CORNERS, "label"])
    >>> class_prior(boxes, {0: (100, 200)}).to_numpy().tolist()
    [[2.0, 0.1, 0.1, 0.3, 0.2]]
    """
    _need_columns(boxes, ("image", *CORNERS, "label"), "boxes")
    if boxes.empty:
        raise ValueError(
            "boxes is empty: the class prior is learnt from the training images' true boxes"
        )
    frames = {image: _frame(sizes, image) for image in boxes["image"].unique()}
    fractions = boxes[list(CORNERS)].to_numpy(float) / np.array(
        [frames[image] for image in boxes["image"]]
    )
    table = pd.DataFrame(fractions, columns=list(CORNERS)).assign(label=boxes["label"].to_numpy())
    count = table["label"].value_counts()
    order = sorted(count.index, key=lambda label: (-count[label], label))
    return table.groupby("label").median().loc[order].reset_index()


def build(
    predictions: pd.DataFrame,
    mapping: Table,
    *,
    names: Mapping[int, str] | pd.Series,
    classes: Sequence[str],
    sizes: Mapping[int, Sequence[int]],
    prior: pd.DataFrame | None = None,
    same_iou: float = SAME_IOU,
) -> pd.DataFrame:
    """One row per id of the mapping, in its order; the n-th id of an image gets its n-th best distinct box.

    `predictions` has the columns image, x1, y1, x2, y2, label, score (pixels of the original image, labels
    1..K); `names` gives each image's file name as in the mapping, `sizes` its (width, height); label k is
    `classes[k - 1]`. Boxes are clipped to the image, and those left thinner than `MIN_SIDE` pixels dropped,
    before they are ranked by score (ties: the table's order). The best box is sent whatever its score: under
    one row per id a threshold can only lose. A box is distinct from a better one when its label differs or
    their IoU is below `same_iou`; 0 keeps one box per label and image, as in the NIH annotations.

    An image with fewer distinct boxes than ids is filled up from `prior` (see `class_prior`), the most
    frequent class first, with confidence 0; when these run out too, its best box is repeated with confidence
    0: still a valid row. Errors: `ValueError` for an image of the mapping that `names` or `sizes` lacks,
    broken predictions, a gap without a `prior`, and for no usable box in any image.

    >>> found = pd.DataFrame([[7, 5., 5., 120., 50., 1, .02]], columns=["image", *CORNERS, "label", "score"])
    >>> ids = pd.DataFrame({"id": [1], "image_id": ["a.png"]})
    >>> build(found, ids, names={7: "a.png"}, classes=["Mass"], sizes={7: (100, 80)}).to_numpy().tolist()
    [[1, 'a.png', 5.0, 5.0, 100.0, 50.0, 0.02, 'Mass']]
    """
    mapping = _mapping(mapping)
    _check_predictions(predictions, len(classes))
    if prior is not None:
        _need_columns(prior, ("label", *CORNERS), "prior")
        _check_numbers(prior, len(classes), "prior")
    rows = _image_rows(names, mapping["image_id"])
    frames = {name: _frame(sizes, row) for name, row in rows.items()}
    ranked = predictions.sort_values("score", ascending=False, kind="stable")
    ranked = ranked[["image", *CORNERS, "score", "label"]].to_numpy(float)
    lists = {
        name: _clip(ranked[ranked[:, 0] == row, 1:], frames[name]) for name, row in rows.items()
    }
    if len(mapping) > 1 and not any(map(len, lists.values())):
        raise ValueError(
            "no image of the mapping has a usable box: rows from the prior alone would be a constant "
            "submission. Fix: predict with a score threshold near 0 (box_score_thresh=0.001), or train longer"
        )
    chosen = {
        name: _choose(lists[name], _scaled(prior, frames[name]), int(wanted), name, same_iou)
        for name, wanted in mapping["image_id"].value_counts().items()
    }
    turn = mapping.groupby("image_id").cumcount()
    picked = np.array([chosen[name][n] for name, n in zip(mapping["image_id"], turn, strict=True)])
    table = mapping.reset_index(drop=True)
    for number, column in enumerate((*COORDINATES, "confidence")):
        table[column] = picked[:, number]
    return table.assign(label=[classes[int(label) - 1] for label in picked[:, 5]])


def leak_guard(train_names: Iterable[str], mapping: Table) -> None:
    """Refuse training images that the competition asks about: edition A was split by row, not by image.

    `train_names` are file names or paths, one per training row. Errors: `ValueError` with the number of
    images and the first of their names.

    >>> leak_guard(["train/a.png"], pd.DataFrame({"id": [1], "image_id": ["b.png"]}))
    """
    trained = pd.Series(
        [PurePosixPath(str(name).replace("\\", "/")).name for name in train_names], dtype=object
    )
    both = trained[trained.isin(set(_mapping(mapping)["image_id"]))]
    if len(both):
        raise ValueError(
            f"{both.nunique()} training images ({len(both)} rows) stand in the competition's mapping: "
            f"{_listed(sorted(both.unique()))}. Fix: remove these rows from training, or, if the leak is "
            "wanted, leave this guard out and say so beside the score"
        )


def check(
    submission: Table,
    mapping: Table,
    *,
    images: str | os.PathLike | Mapping[str, Sequence[int]] | None = None,
    classes: Sequence[str] = NIH_CLASSES,
) -> pd.DataFrame:
    """Read a submission as strictly as a grader might; returns it as a table when all is well.

    `submission` and `mapping` are tables or CSV files. `images`, a folder that is searched for the mapping's
    files or a mapping of file name to (width, height), gives each image's true size; without it no frame is
    assumed and coordinates need only be finite and not negative. The order of rows is free, because the
    competition looks up ids. Errors: `SubmissionError` with every kind of problem found, its CSV lines and
    its fix; `FileNotFoundError` for a missing file, `ValueError` for a mapping or images of no use.

    >>> ids = pd.DataFrame({"id": [1], "image_id": ["a.png"]})
    >>> table = ids.assign(x_min=5., y_min=5., x_max=9., y_max=9., confidence=.5, label="Infiltration")
    >>> check(table, ids)
    Traceback (most recent call last):
    dlia_utils.submission.SubmissionError: the submission: 1 problem (line numbers are those of the CSV file; ...
      1. `Infiltration` in 1 row: line 2. Fix: the competition spells it `Infiltrate`
    >>> check(table.assign(label="Infiltrate"), ids).shape
    (1, 8)
    """
    mapping = _mapping(mapping)
    sizes = None if images is None else _sizes(images, mapping["image_id"].unique())
    name, text, problems = _text(submission)
    cells = _cells(text, columns(mapping), problems)
    _check_ids(cells, mapping, problems)
    numbers = _numbers(cells, problems)
    _check_boxes(numbers, cells, sizes, problems)
    _check_labels(cells, list(classes), problems)
    _check_constant(numbers, cells, problems)
    if problems:
        raise SubmissionError(_message(problems, name))
    identity = mapping.columns[0]
    return cells.assign(**numbers, **{identity: _as_ids(cells[identity])}).reset_index(drop=True)


def write(
    table: pd.DataFrame,
    path: str | os.PathLike,
    mapping: Table,
    *,
    images: str | os.PathLike | Mapping[str, Sequence[int]] | None = None,
    classes: Sequence[str] = NIH_CLASSES,
) -> Path:
    """Check `table`, write it as CSV, read it back and check again; only then does `path` appear.

    Options as in `check`. Returns the path. Errors: `SubmissionError`; the file at `path` is then as before.

    >>> import tempfile
    >>> ids = pd.DataFrame({"id": [1], "image_id": ["a.png"]})
    >>> table = ids.assign(x_min=5., y_min=5., x_max=9., y_max=9., confidence=.5, label="Mass")
    >>> write(table, Path(tempfile.mkdtemp()) / "mine.csv", ids).name
    'mine.csv'
    """
    sizes = None if images is None else _sizes(images, _mapping(mapping)["image_id"])
    options = {"images": sizes, "classes": classes}
    checked = check(table, mapping, **options)
    with files.atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, encoding="utf-8")
        if not check(temporary, mapping, **options).equals(checked):
            raise SubmissionError(
                f"{path}: what was written reads back as something else. Fix: write it again"
            )
    return Path(path)


def summary(table: pd.DataFrame) -> str:
    """A checked submission in four lines: rows, images, boxes per label, confidence.

    >>> ids = pd.DataFrame({"id": [1], "image_id": ["a.png"]})
    >>> print(summary(ids.assign(x_min=5., y_min=5., x_max=9., y_max=9., confidence=.5, label="Mass")))
    rows        1, ids 1 to 1
    images      1
    labels      Mass 1
    confidence  0.5 to 0.5, median 0.5
    """
    ids, confidence = table.iloc[:, 0], table["confidence"]
    labels = ", ".join(f"{label} {count}" for label, count in table["label"].value_counts().items())
    span = f"{confidence.min():.4g} to {confidence.max():.4g}, median {confidence.median():.4g}"
    return "\n".join(
        [
            f"rows        {len(table)}, ids {ids.min()} to {ids.max()}",
            f"images      {table['image_id'].nunique()}",
            f"labels      {labels}",
            f"confidence  {span}",
        ]
    )


def _mapping(mapping: Table) -> pd.DataFrame:
    """The id table with its two columns in order (other columns are left out), or an error that names the fix."""
    name = "the mapping"
    if not isinstance(mapping, pd.DataFrame):
        path = _need_file(mapping)
        name = str(path)
        try:
            mapping = pd.read_csv(path, dtype=str, encoding="utf-8-sig", keep_default_na=False)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{name} is not a CSV of ids and images ({error}): download it again"
            ) from error
        for column in {"id", "ID"} & set(mapping.columns):
            mapping[column] = _as_ids(mapping[column])
    identity = [column for column in mapping.columns if column in ("id", "ID")]
    if len(identity) != 1 or "image_id" not in mapping.columns:
        raise ValueError(
            f"{name} has the columns {_listed(mapping.columns)}; it needs `id` or `ID`, and `image_id`. "
            "Fix: pass the competition's ID_to_Image_Mapping.csv"
        )
    mapping = mapping[[*identity, "image_id"]]
    ids = mapping[identity[0]]
    if mapping.empty or mapping.isna().any(axis=None) or mapping.eq("").any(axis=None):
        raise ValueError(f"{name} is empty or has empty cells: read the competition's file again")
    if ids.dtype.kind == "f" or ids.duplicated().any():
        raise ValueError(f"{name} needs whole ids, each once: read the competition's file again")
    return mapping


def _as_ids(texts: pd.Series) -> pd.Series:
    """Ids as integers where each is written like one, else as the text they are."""
    whole = texts.str.fullmatch(r"0|-?[1-9]\d{0,17}").all()
    return texts.astype("int64") if whole else texts


def _need_file(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return path


def _need_columns(table: pd.DataFrame, needed: Sequence[str], name: str) -> None:
    if missing := [column for column in needed if column not in table.columns]:
        raise ValueError(
            f"{name} lacks the columns {_listed(missing)}; it has {_listed(table.columns)}"
        )


def _check_predictions(predictions: pd.DataFrame, count: int) -> None:
    _need_columns(predictions, ("image", *CORNERS, "label", "score"), "predictions")
    _check_numbers(predictions, count, "predictions")
    if not predictions["score"].between(0, 1).all():
        raise ValueError(
            "predictions has scores that are not in [0, 1]: pass probabilities, not logits or percentages"
        )


def _check_numbers(table: pd.DataFrame, count: int, name: str) -> None:
    if not np.isfinite(table[list(CORNERS)].to_numpy(float)).all():
        raise ValueError(f"{name} holds NaN or infinite corners: whatever made them is broken")
    if not table["label"].isin(range(1, count + 1)).all():
        raise ValueError(
            f"{name} has labels outside 1..{count}: 0 is the background, label k is classes[k - 1]"
        )


def _image_rows(names: Mapping[int, str] | pd.Series, wanted: pd.Series) -> dict[str, int]:
    """File name -> image row for the images of the mapping."""
    wanted = set(wanted)
    pairs = [(name, row) for row, name in names.items() if name in wanted]
    rows = dict(pairs)
    if missing := sorted(wanted - set(rows)):
        raise ValueError(
            f"{len(missing)} images of the mapping are not in names: {_listed(missing)}. Fix: predict on all "
            "test images, and give their file names as the mapping writes them"
        )
    if len(pairs) > len(rows):
        twice = sorted({name for name, row in pairs if rows[name] != row})
        raise ValueError(
            f"names has several rows for {_listed(twice)}. Fix: pass the test images' rows only"
        )
    return rows


def _frame(sizes: Mapping[int, Sequence[int]], image: int) -> tuple[float, float, float, float]:
    """(width, height, width, height) of an image row: the far corner for each of a box's two corners."""
    try:
        width, height = (float(side) for side in sizes[image])
    except (KeyError, IndexError):
        raise ValueError(f"sizes has no (width, height) for image {image}") from None
    if not (width > 0 and height > 0):
        raise ValueError(
            f"sizes gives {width:g} x {height:g} for image {image}: both must be positive"
        )
    return width, height, width, height


def _clip(boxes: np.ndarray, frame: tuple[float, float, float, float]) -> np.ndarray:
    """Boxes [n, 6] (corners, score, label) cut to the image; what is left thinner than `MIN_SIDE` is dropped."""
    corners = np.clip(boxes[:, :4], 0, frame)
    keep = (corners[:, 2:] - corners[:, :2] >= MIN_SIDE).all(1)
    return np.hstack([corners, boxes[:, 4:]])[keep]


def _scaled(prior: pd.DataFrame | None, frame: tuple[float, float, float, float]) -> np.ndarray:
    """The prior's boxes [n, 6] in pixels of one image, with score 0."""
    if prior is None:
        return np.empty((0, 6))
    corners = prior[list(CORNERS)].to_numpy(float) * frame
    return _clip(np.column_stack([corners, np.zeros(len(prior)), prior["label"]]), frame)


def _choose(
    found: np.ndarray, fillers: np.ndarray, wanted: int, name: str, same_iou: float
) -> np.ndarray:
    """The rows [wanted, 6] to send for one image: its distinct boxes, then fillers, then its best again."""
    kept: list[np.ndarray] = []
    for box in (*found, *fillers):
        if len(kept) == wanted:
            break
        if not any(box[5] == other[5] and _iou(box, other) >= same_iou for other in kept):
            kept.append(box)
    if not kept or (len(kept) < wanted and not len(fillers)):
        raise ValueError(
            f"{name} has {len(kept)} distinct boxes for {wanted} ids. Fix: pass prior=class_prior(...) of the "
            "training boxes, which fills the gap"
        )
    again = kept[0].copy()
    again[4] = 0.0
    return np.array(kept + [again] * (wanted - len(kept)))


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.clip(np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2]), 0, None)
    shared = sides.prod()
    return float(shared / ((a[2:4] - a[:2]).prod() + (b[2:4] - b[:2]).prod() - shared))


def _sizes(
    images: str | os.PathLike | Mapping[str, Sequence[int]], wanted: Iterable[str]
) -> dict[str, tuple[float, float]]:
    """File name -> (width, height), from the files' headers when `images` is a folder."""
    wanted = set(wanted)
    if isinstance(images, Mapping):
        found = {name: tuple(images[name]) for name in wanted if name in images}
        where = "images"
    else:
        where = Path(images)
        if not where.is_dir():
            raise FileNotFoundError(f"no folder {where}")
        paths = {
            name: Path(folder, name)
            for folder, _, here in os.walk(where)
            for name in wanted & set(here)
        }
        found = {name: _header_size(path) for name, path in paths.items()}
    if missing := sorted(wanted - set(found)):
        raise ValueError(
            f"{where} lacks {len(missing)} of the mapping's {len(wanted)} images: {_listed(missing)}. Fix: give "
            "the folder that holds the competition's test images, or no images (boxes are then not compared "
            "with the image's size)"
        )
    return found


def _header_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): copy it again") from error


def _text(submission: Table) -> tuple[str, str, list[str]]:
    """Name, text and encoding problems. A table is checked as the CSV that it would become: one path for both."""
    if isinstance(submission, pd.DataFrame):
        return "the submission", submission.to_csv(index=False), []
    path = _need_file(submission)
    raw = path.read_bytes()
    fix = 'Fix: save as UTF-8 without a byte order mark, e.g. to_csv(path, index=False, encoding="utf-8")'
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return str(path), raw.decode("utf-16", errors="replace"), [f"the encoding is UTF-16. {fix}"]
    if raw.startswith(b"\xef\xbb\xbf"):
        found = [f"a byte order mark (BOM) hides the first column's name. {fix}"]
        return str(path), raw[3:].decode("utf-8", errors="replace"), found
    try:
        return str(path), raw.decode("utf-8"), []
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        return (
            str(path),
            raw.decode("latin-1"),
            [f"the encoding is not UTF-8 (first at line {line}). {fix}"],
        )


def _cells(text: str, expected: list[str], problems: list[str]) -> pd.DataFrame:
    """The file's cells as text, indexed by line number; only those of the expected columns it has."""
    nothing = pd.DataFrame(dtype=object)
    if not text.strip():
        problems.append("the file is empty. Fix: build the submission again")
        return nothing
    header = text.lstrip().splitlines()[0]
    separator = ","
    if "," not in header:
        separator = next((sign for sign in SEPARATORS if sign in header), ",")
        if separator != ",":
            problems.append(
                f"the separator is {SEPARATORS[separator]}. Fix: save with commas, to_csv(sep=',')"
            )
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        problems.append(f"not readable as CSV ({error}). Fix: build the submission again")
        return nothing
    (_, names), rows = rows[0], rows[1:]
    _check_header(names, expected, problems)
    if not rows and set(names) & set(expected):
        problems.append("there is a header but no row. Fix: build the submission again")
    ragged = pd.Series(
        {line: len(cells) for line, cells in rows if len(cells) != len(names)}, dtype=object
    )
    if len(ragged):
        problems.append(
            f"other than {len(names)} cells in {_rows(ragged)}; not read further. Fix: quote a cell that contains "
            "a comma, and write decimals with a point"
        )
    kept = [(line, cells) for line, cells in rows if len(cells) == len(names)]
    data = {
        name: [cells[names.index(name)] for _, cells in kept]
        for name in expected
        if names.count(name) == 1
    }
    return pd.DataFrame(data, index=[line for line, _ in kept], dtype=object)


def _check_header(names: list[str], expected: list[str], problems: list[str]) -> None:
    if names == expected:
        return
    wanted = f"the columns must be {','.join(expected)}"
    if not set(names) & set(expected) and any(_number(name) is not None for name in names):
        problems.append(f"line 1 is no header but a row. Fix: write the header first; {wanted}")
        return
    if index := [name for name in names if not name.strip() or name.startswith("Unnamed:")]:
        problems.append(
            f"an index column was written ({_listed(map(repr, index))}). Fix: to_csv(index=False)"
        )
    extra = [name for name in dict.fromkeys(names) if name not in expected and name not in index]
    missing = [name for name in expected if name not in names]
    twice = [name for name in expected if names.count(name) > 1]
    if extra:
        problems.append(
            f"unknown columns {_listed(map(repr, extra))} in line 1. Fix: remove or rename them; {wanted}"
        )
    if missing:
        problems.append(
            f"missing columns {_listed(map(repr, missing))} in line 1. Fix: add them; {wanted}"
        )
    if twice:
        problems.append(
            f"columns written twice in line 1: {_listed(map(repr, twice))}. Fix: keep one; {wanted}"
        )
    if not missing and not twice and [name for name in names if name in expected] != expected:
        problems.append(f"columns in the wrong order in line 1: {','.join(names)}. Fix: {wanted}")


def _check_ids(cells: pd.DataFrame, mapping: pd.DataFrame, problems: list[str]) -> None:
    identity = mapping.columns[0]
    if identity not in cells or cells.empty:
        return
    ids = cells[identity]
    owner = dict(zip(mapping[identity].astype(str), mapping["image_id"], strict=True))
    if len(bad := ids[~ids.isin(owner)]):
        problems.append(
            f"an {identity} that the mapping does not have in {_rows(bad)}. Fix: write one row per {identity} of "
            "the mapping, each as the mapping writes it"
        )
    if len(bad := ids[ids.duplicated() & ids.isin(owner)]):
        problems.append(
            f"an {identity} a second time in {_rows(bad)}. Fix: keep one row per {identity}"
        )
    if missing := [one for one in owner if one not in set(ids)]:
        problems.append(
            f"{len(missing)} of the mapping's {len(owner)} ids are missing: {_listed(missing)}. Fix: add a row "
            f"for each {identity}, with the image's best box whatever its confidence"
        )
    if "image_id" in cells:
        known = cells[ids.isin(owner)]
        pairs = [
            (line, f"{one} is {owner[one]}, not {name!r}")
            for line, one, name in zip(known.index, known[identity], known["image_id"], strict=True)
            if owner[one] != name
        ]
        if pairs:
            bad = pd.Series(dict(pairs), dtype=object)
            problems.append(
                f"an image_id that does not belong to its {identity} in {_rows(bad, show=str)}. Fix: take both "
                "from the same row of the mapping"
            )


def _numbers(cells: pd.DataFrame, problems: list[str]) -> dict[str, pd.Series]:
    """The numeric columns as float64, NaN where a cell is not a finite number (and a problem says so)."""
    numbers = {}
    for column in (*COORDINATES, "confidence"):
        if column not in cells:
            continue
        texts = cells[column]
        values = pd.Series([_number(text) for text in texts], index=texts.index, dtype=object)
        empty = texts.str.strip().str.lower().isin(MISSING)
        infinite = pd.Series(
            [v is not None and math.isinf(v) for v in values], texts.index, dtype=bool
        )
        if empty.any():
            problems.append(
                f"{column} is empty or NaN in {_rows(texts[empty])}. Fix: every row needs a box; for an image "
                "without predictions the class-prior box that `build` takes"
            )
        if len(bad := texts[values.isna() & ~empty]):
            problems.append(
                f"{column} is not a number in {_rows(bad)}. Fix: plain decimals with a point, e.g. 103.5"
            )
        if infinite.any():
            problems.append(
                f"{column} is infinite in {_rows(texts[infinite])}. Fix: clip boxes to the image"
            )
        numbers[column] = values.where(~infinite).astype("float64")
    return numbers


def _number(text: str) -> float | None:
    """The number that a cell spells; None for anything else, NaN included."""
    try:
        # float() also reads 1_000 and other scripts' digits, which other CSV readers take for text.
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        return None
    return None if math.isnan(value) else value


def _check_boxes(
    numbers: dict[str, pd.Series],
    cells: pd.DataFrame,
    sizes: dict[str, tuple[float, float]] | None,
    problems: list[str],
) -> None:
    for low, high in (("x_min", "x_max"), ("y_min", "y_max")):
        if low in numbers and high in numbers:
            bad = numbers[low] >= numbers[high]
            if bad.any():
                shown = cells.loc[bad, low] + " >= " + cells.loc[bad, high]
                problems.append(
                    f"{low} >= {high} in {_rows(shown, show=str)}. Fix: give two opposite corners (x_max is x_min "
                    "plus the width), the smaller first"
                )
    for column in COORDINATES:
        if column in numbers and len(bad := cells[column][numbers[column] < 0]):
            problems.append(f"{column} is negative in {_rows(bad)}. Fix: clip boxes to the image")
    if sizes is not None and "image_id" in cells:
        for column, side in (("x_max", 0), ("y_max", 1), ("x_min", 0), ("y_min", 1)):
            if column not in numbers:
                continue
            limit = cells["image_id"].map({name: float(size[side]) for name, size in sizes.items()})
            bad = numbers[column] > limit
            if bad.any():
                shown = cells.loc[bad, column] + " > " + limit[bad].map("{:g}".format)
                problems.append(
                    f"the box is outside the image: {column} beyond its {('width', 'height')[side]} in "
                    f"{_rows(shown, show=str)}. Fix: give pixels of the original file, and clip boxes to it"
                )
    if len(cells) and all(c in numbers and numbers[c].between(0, 1).all() for c in COORDINATES):
        problems.append(
            "no box leaves the first pixel: these are fractions of the image. Fix: multiply x by the image's "
            "width and y by its height"
        )
    if "confidence" in numbers:
        bad = (numbers["confidence"] < 0) | (numbers["confidence"] > 1)
        if bad.any():
            problems.append(
                f"confidence outside [0, 1] in {_rows(cells['confidence'][bad])}. Fix: send probabilities, not "
                "logits or percentages"
            )


def _check_labels(cells: pd.DataFrame, classes: list[str], problems: list[str]) -> None:
    if "label" not in cells:
        return
    labels = cells["label"]
    misspelt = labels.eq("Infiltration") & (
        "Infiltrate" in classes and "Infiltration" not in classes
    )
    if misspelt.any():
        problems.append(
            f"`Infiltration` in {_rows(labels[misspelt], show=None)}. Fix: the competition spells it `Infiltrate`"
        )
    if len(bad := labels[~labels.isin(classes) & ~misspelt]):
        problems.append(
            f"unknown label in {_rows(bad)}. Fix: one of {', '.join(classes)}, spelt exactly so"
        )


def _check_constant(
    numbers: dict[str, pd.Series], cells: pd.DataFrame, problems: list[str]
) -> None:
    values = [*numbers.values(), *([cells["label"]] if "label" in cells else [])]
    if (
        len(cells) > 1
        and len(values) == len(PREDICTED)
        and all(one.nunique(dropna=False) == 1 for one in values)
    ):
        problems.append(
            f"constant predictions: all {len(cells)} rows (lines {cells.index[0]} to {cells.index[-1]}) hold the "
            "same box, confidence and label. Fix: send the detector's own boxes; it may have found nothing at all"
        )


def _message(problems: list[str], name: str) -> str:
    head = f"{name}: {len(problems)} problem{'s' if len(problems) != 1 else ''} (line numbers are those of the"
    numbered = [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
    return "\n".join([f"{head} CSV file; its header is line 1)", *numbered])


def _rows(bad: pd.Series, *, show=repr) -> str:
    """'2 rows: line 3 ('x'), line 9 ('y')' of a Series that is indexed by line number."""
    listed = [f"line {line}" + (f" ({show(value)})" if show else "") for line, value in bad.items()]
    return f"{len(bad)} row{'s' if len(bad) != 1 else ''}: {_listed(listed)}"


def _listed(names: Iterable) -> str:
    """The first `SHOWN` names, and how many more there are."""
    names = [str(name) for name in names]
    more = f", ... and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
