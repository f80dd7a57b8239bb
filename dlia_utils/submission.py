"""The competition's CSV: built from its id table, checked row by row, written in one step."""

from __future__ import annotations

import io
import logging
import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import torch
from torchvision.ops import box_iou

from . import files
from .data.boxes import CLIP, box_fault, read_boxes, refuse
from .data.readers import NIH_CLASSES, id_table
from .data.tables import CORNERS, shapes_of

log = logging.getLogger("dlia_utils")

NUMBERS = "x_min y_min x_max y_max confidence".split()
SPELLING = {"Infiltration": "Infiltrate"}  # how the competition spells what others call so
SAME_IOU = 0.99  # two boxes of one label that overlap more than this are one finding said twice
MIN_SIDE = 1e-3  # thinner boxes (pixels) are dropped: another reader's rounding could invert them
NIH_NAME, NIH_SIZE = r"\d{8}_\d{3}\.png", (1024, 1024)  # every image of the NIH's is so large
SHOWN = 10  # how many rows or names a message lists before it only counts

Table = pd.DataFrame | str | os.PathLike
Sizes = Mapping[str, Sequence[int]] | str | os.PathLike | None


class SubmissionError(ValueError):
    """What the competition would refuse or score wrongly: what, where and the fix."""


def class_prior(boxes: pd.DataFrame, sizes: Mapping[int, Sequence[int]]) -> pd.DataFrame:
    """The median box of each class in training, the most frequent class first, for `build`.

    boxes: columns image, x1, y1, x2, y2, label, in pixels of the file. sizes: an image's (width,
    height). Columns label, x1, y1, x2, y2, the corners as fractions of the image.

    >>> boxes = pd.DataFrame([[0, 10, 20, 30, 40, 2]], columns=["image", *CORNERS, "label"])
    >>> class_prior(boxes, {0: (100, 200)}).to_numpy().tolist()
    [[2.0, 0.1, 0.1, 0.3, 0.2]]
    """
    found = read_boxes(boxes, "boxes", scored=False, sizes=sizes)
    frames = np.array([[*sizes[image]] * 2 for image in found.image.tolist()]).reshape(-1, 4)
    table = pd.DataFrame(found.corners.T / frames, columns=CORNERS).assign(label=found.label)
    count = table["label"].value_counts()
    order = sorted(count.index, key=lambda label: (-count[label], label))
    return table.groupby("label").median().loc[order].reset_index()


def build(
    predictions: pd.DataFrame,
    mapping: Table,
    *,
    names: Mapping[Hashable, str],
    classes: Sequence[str],
    sizes: Mapping[Hashable, Sequence[int]],
    prior: pd.DataFrame,
    prior_share: float = 0.1,
) -> pd.DataFrame:
    """One row per id of the mapping; the n-th id of an image gets its n-th best distinct box.

    predictions: columns image, x1, y1, x2, y2, label (1..K), score, in pixels of the file. names,
    sizes: each image's file name as in the mapping, and its (width, height). The best box is sent
    whatever its score: under one row per id a threshold can only lose. Best is the highest score,
    or the highest `worth` where predictions have such a column (`evaluate.worth`). A box is
    distinct when its label differs or the IoU is below `SAME_IOU`. Missing ones come from `prior`
    (`class_prior`) with confidence 0, then from the best box: that share of the rows is at most
    `prior_share`.
    Errors: ValueError for an image that `names` lacks, for broken predictions (another format of
    boxes among them), for no usable box, and for more of the prior than is asked for.

    >>> found = pd.DataFrame([[7, 5.0, 5.0, 100.7, 50.0, 1]], columns=["image", *CORNERS, "label"])
    >>> ids = pd.DataFrame({"id": [1], "image_id": ["a.png"]})
    >>> options = dict(names={7: "a.png"}, classes=["Mass"], sizes={7: (100, 80)}, prior=found[:0])
    >>> build(found.assign(score=0.02), ids, **options).to_numpy().tolist()
    [[1, 'a.png', 5.0, 5.0, 100.0, 50.0, 0.02, 'Mass']]
    """
    mapping = id_table(mapping)
    wanted = mapping["image_id"].value_counts().to_dict()
    if lost := sorted(set(wanted) - set(names.values())):
        raise ValueError(f"{len(lost)} images of the mapping are not in names: {_listed(lost)}")
    ranked = _ranked(predictions, names, sizes, len(classes))
    filler = np.column_stack([prior[CORNERS], np.zeros(len(prior)), prior["label"]])
    chosen, own, usable = {}, 0, 0
    for image, name in names.items():
        if name not in wanted:
            continue
        count, frame = wanted[name], np.array([*sizes[image]] * 2, float)
        found = _distinct(_clipped(np.array(ranked[image]).reshape(-1, 6), frame))
        own, usable = own + min(len(found), count), usable + len(found)
        boxes = _distinct(np.vstack([found, _clipped(filler * [*frame, 1, 1], frame)]))[:count]
        again = boxes[:1] * [1, 1, 1, 1, 0, 1]  # its best box once more, with confidence 0
        chosen[name] = np.vstack([boxes, np.repeat(again, count - len(boxes), axis=0)])
    if not usable:
        raise ValueError("no image of the mapping has a usable box: train longer")
    filled = len(mapping) - own
    if filled > prior_share * len(mapping):
        text = f"{filled} of {len(mapping)} rows would be the class prior, no box of the detector's"
        fix = "look at the predictions' images and scores, or ask for so many with prior_share=1"
        raise ValueError(f"{text}: {fix}")
    turn = mapping.groupby("image_id").cumcount()
    picked = np.array([chosen[name][n] for name, n in zip(mapping["image_id"], turn, strict=True)])
    table = mapping.assign(**dict(zip(NUMBERS, picked.T[:5], strict=True)))
    return table.assign(label=[classes[int(label) - 1] for label in picked[:, 5]])


def _ranked(
    predictions: pd.DataFrame, names: Mapping, sizes: Mapping, classes: int
) -> dict[Hashable, list[np.ndarray]]:
    """The boxes (corners, score, label) of each image, the best first."""
    found = read_boxes(predictions, "predictions", sizes=sizes)
    refuse(found.label > classes, "predictions", f"labels outside 1..{classes}")
    images, ranked = found.image.tolist(), defaultdict(list)
    refuse(np.array([one not in names for one in images]), "predictions", "an image not in names")
    boxes = np.column_stack([found.corners.T, found.score, found.label])
    best = predictions["worth"].to_numpy(float) if "worth" in predictions else found.score
    refuse(~np.isfinite(best), "predictions", "a worth that is no number")
    for row in np.lexsort((-found.score, -best)):
        ranked[images[row]].append(boxes[row])
    return ranked


def _clipped(boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Boxes [n, 6] (corners, score, label) cut to the image; what is left too thin is dropped."""
    boxes = np.hstack([np.clip(boxes[:, :4], 0, frame), boxes[:, 4:]])
    return boxes[(boxes[:, 2:4] - boxes[:, :2] >= MIN_SIDE).all(1)]


def _distinct(boxes: np.ndarray) -> np.ndarray:
    """The boxes [n, 6], best first, that are no repetition of a better distinct one."""
    corners = torch.from_numpy(boxes[:, :4].copy())
    same = (box_iou(corners, corners).numpy() >= SAME_IOU) & (boxes[:, 5:] == boxes[:, 5])
    kept: list[int] = []
    for number in range(len(boxes)):
        if not same[number, kept].any():
            kept.append(number)
    return boxes[kept]


def leak_guard(train_names: Iterable[str], mapping: Table) -> None:
    """Refuse training images that the competition asks about: edition A was split by row.

    train_names: file names or paths, one per training row. Errors: ValueError naming the images.

    >>> leak_guard(["train/a.png"], pd.DataFrame({"id": [1], "image_id": ["b.png"]}))
    """
    asked = set(id_table(mapping)["image_id"])
    trained = [PurePosixPath(str(name).replace("\\", "/")).name for name in train_names]
    if both := [name for name in trained if name in asked]:
        count = f"{len(set(both))} training images ({len(both)} rows)"
        told = f"stand in the competition's mapping: {_listed(sorted(set(both)))}"
        raise ValueError(f"{count} {told}. Fix: remove these rows from training")


def check(
    submission: Table, mapping: Table, *, images: Sizes = None, classes: Sequence[str] = NIH_CLASSES
) -> pd.DataFrame:
    """Read a submission as strictly as a grader might; returns it as a table when all is well.

    images: a folder that is searched for the mapping's files, or file name -> (width, height); else
    the size of the NIH's images (`edition_sizes`), and for others a warning that boxes were not
    held against it. Errors: `SubmissionError` with every kind of problem found, its CSV lines and
    its fix; `FileNotFoundError`.

    >>> ids = pd.DataFrame({"id": [1], "image_id": ["00000001_000.png"]})
    >>> table = ids.assign(x_min=5.0, y_min=5.0, x_max=9.0, y_max=9.0, confidence=0.5)
    >>> check(table.assign(label="Infiltrate"), ids).shape
    (1, 8)
    """
    mapping = id_table(mapping)
    given = images is not None
    sizes = _sizes(images, set(mapping["image_id"])) if given else edition_sizes(mapping)
    if not sizes:
        log.warning("not checked: whether boxes lie inside their images. Fix: give images")
    name, cells = _cells(submission, [*mapping.columns, *NUMBERS, "label"])
    numbers = cells[NUMBERS].apply(pd.to_numeric, errors="coerce").astype(float)
    numbers = numbers.where(np.isfinite(numbers))
    problems = _row_problems(cells, numbers, mapping, sizes, list(classes))
    ids, wanted = cells.iloc[:, 0], mapping.iloc[:, 0].astype(str)
    if len(lost := wanted[~wanted.isin(ids)]):
        fix = "Fix: a row for each, with the image's best box whatever its confidence"
        problems.append(f"{len(lost)} of {len(wanted)} ids are missing: {_listed(lost)}. {fix}")
    predicted = numbers.assign(label=cells["label"])
    if len(cells) > 1 and predicted.nunique(dropna=False).eq(1).all():
        problems.append("every row holds the same prediction. Fix: send the detector's own boxes")
    if problems:
        raise _error(name, problems)
    for doubt in _doubts(cells["label"], classes):
        log.warning("%s: %s", name, doubt)
    typed = mapping.iloc[:, 0].to_numpy()[pd.Index(wanted).get_indexer(ids)]
    return cells.assign(**numbers, **{ids.name: typed}).reset_index(drop=True)


def _cells(submission: Table, expected: list[str]) -> tuple[str, pd.DataFrame]:
    """Name and cells (text, by line number) of a submission; a table as the CSV it would become."""
    table = isinstance(submission, pd.DataFrame)
    name = "the submission" if table else str(submission)
    options = dict(dtype=str, keep_default_na=False, skip_blank_lines=False)
    try:
        text = submission.to_csv(index=False) if table else Path(submission).read_text("utf-8")
        lines = enumerate(text.splitlines(), 1)
        long = [n for n, one in lines if one.endswith(",") and one.count(",") >= len(expected)]
        if long:  # the cell behind the last comma has no column
            fix = "Fix: take away the comma at the end of each line"
            raise _error(name, [f"{len(long)} lines have a comma too many: {_listed(long)}. {fix}"])
        cells = pd.read_csv(io.StringIO(text.rstrip()), **options)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        fix = "Fix: write UTF-8, with commas between cells and none within them"
        raise _error(name, [f"not readable as CSV ({error}). {fix}"]) from error
    if list(cells.columns) != expected or not len(cells) or text.startswith("\ufeff"):
        wanted = f"Fix: the header is {','.join(expected)}, without index or byte order mark"
        raise _error(name, [f"line 1 is {text.splitlines()[0]!r}, {len(cells)} rows. {wanted}"])
    if not isinstance(cells.index, pd.RangeIndex):
        raise _error(name, ["rows have more cells than the header. Fix: to_csv(index=False)"])
    return name, cells.set_axis(cells.index + 2).fillna("")


def _row_problems(
    cells: pd.DataFrame, number: pd.DataFrame, mapping: pd.DataFrame, sizes, classes: list[str]
) -> list[str]:
    """What is wrong with single rows: one sentence for each kind of problem."""
    identity = mapping.columns[0]
    ids, image, label = cells[identity], cells["image_id"], cells["label"]
    owner = ids.map(dict(zip(mapping[identity].astype(str), mapping["image_id"], strict=True)))
    limits = [image.map({k: v[side] for k, v in sizes.items()}).astype(float) for side in (0, 1)]
    whole = number[NUMBERS[:4]].notna().all(axis=1)
    corners = [number.loc[whole, name] for name in NUMBERS[:4]]
    fault = box_fault(np.array(corners), np.array([side[whole].fillna(np.inf) for side in limits]))
    likely = {fault.kind: fault.fix}
    plain = "write plain decimals with a point; every row needs a box"
    clip, end = likely.get("outside", CLIP), likely.get("turned", "give {}, not the {}")
    percent = "clip what rounding left; else send no percentages"
    misspelt = label.isin(SPELLING) & ~label.isin(classes)
    respelt = ", ".join(sorted({SPELLING[one] for one in label[misspelt]}))
    same = "take both from the same row of the mapping"
    checks = [
        (identity, owner.isna(), "not in the mapping", f"one row per {identity} of the mapping"),
        (identity, ids.duplicated(), "a second time", f"keep one row per {identity}"),
        ("image_id", owner.notna() & (owner != image), f"not the image of its {identity}", same),
        *((name, number[name].isna(), "no finite number", plain) for name in NUMBERS),
        *((name, number[name] < 0, "negative", clip) for name in NUMBERS[:4]),
        ("x_min", number.x_min >= number.x_max, "not below x_max", end.format("x_max", "width")),
        ("y_min", number.y_min >= number.y_max, "not below y_max", end.format("y_max", "height")),
        ("x_max", number.x_max > limits[0], "beyond the image's width", clip),
        ("y_max", number.y_max > limits[1], "beyond the image's height", clip),
        ("confidence", number.confidence > 1, "above 1", percent),
        ("confidence", number.confidence < 0, "below 0", "send probabilities, not logits"),
        ("label", misspelt, "spelt as in another list", f"the competition spells it {respelt}"),
        ("label", ~label.isin(classes) & ~misspelt, "unknown", f"one of {', '.join(classes)}"),
    ]
    problems = [f"{fault.problem}. Fix: {fault.fix}"] * (fault.kind == "shares")
    for column, wrong, text, fix in checks:
        if wrong.any():
            shown = [f"line {line} ({cell!r})" for line, cell in cells.loc[wrong, column].items()]
            rows = f"{len(shown)} row{'s' if len(shown) > 1 else ''}"
            problems.append(f"{column}: {text} in {rows}: {_listed(shown)}. Fix: {fix}")
    return problems


def _doubts(labels: pd.Series, classes: Sequence[str]) -> list[str]:
    """What is allowed and looks useless, of a table of some length and several classes."""
    share, count = labels.value_counts(normalize=True), len(labels)
    if len(classes) < 2 or count < 2 * len(classes):
        return []
    fix = "its AP is 0 whatever the others reach; see `worth` in submission.build"
    doubts = [f"no row says {one}: {fix}" for one in classes if one not in share]
    most = f"{share.iloc[0]:.0%} of {count} rows say {share.index[0]}: has the detector learnt?"
    return [*doubts, most] if share.iloc[0] > 0.5 else doubts


def _error(name: str, problems: list[str]) -> SubmissionError:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    numbered = [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
    return SubmissionError("\n".join([f"{name}: {count} (the header is line 1)", *numbered]))


def write(table: pd.DataFrame, path: str | os.PathLike, mapping: Table, **options) -> Path:
    """Check `table`, write it, read it back and check again; only then does `path` appear.

    Options as in `check`. Errors: `SubmissionError`; the file at `path` is then as before.
    """
    checked = check(table, mapping, **options)
    with files.atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, encoding="utf-8")
        if not check(temporary, mapping, **options).equals(checked):
            raise _error(str(path), ["what was written reads back as something else"])
    return Path(path)


def summary(table: pd.DataFrame) -> str:
    """A checked submission in four lines: rows, images, boxes per label, confidence."""
    ids, confidence = table.iloc[:, 0], table["confidence"]
    labels = ", ".join(f"{label} {count}" for label, count in table["label"].value_counts().items())
    low, high, median = confidence.min(), confidence.max(), confidence.median()
    return f"""rows        {len(table)}, ids {ids.min()} to {ids.max()}
images      {table["image_id"].nunique()}
labels      {labels}
confidence  {low:.4g} to {high:.4g}, median {median:.4g}"""


def edition_sizes(mapping: Table) -> dict[str, tuple[int, int]]:
    """(width, height) of each image of the mapping, where all of them are the NIH's; else empty.

    >>> edition_sizes(pd.DataFrame({"id": [1], "image_id": ["00000001_000.png"]}))
    {'00000001_000.png': (1024, 1024)}
    """
    names = id_table(mapping)["image_id"]
    return dict.fromkeys(names, NIH_SIZE) if names.str.fullmatch(NIH_NAME).all() else {}


def _sizes(images: Sizes, wanted: set[str]) -> Mapping[str, Sequence[int]]:
    """File name -> (width, height), upright, from the files' headers when `images` is a folder."""
    found, where = images, "images"
    if not isinstance(images, Mapping):
        paths = [path for path in Path(images).rglob("*") if path.name in wanted]
        shapes = zip(paths, shapes_of(Path(), paths), strict=True)
        found, where = {path.name: shape[::-1] for path, shape in shapes if shape}, str(images)
    if lost := sorted(wanted - set(found)):
        few = f"{where} lacks {len(lost)} of the mapping's {len(wanted)} images: {_listed(lost)}"
        fix = "Fix: the folder of the competition's test images, each readable, or none"
        raise FileNotFoundError(f"{few}. {fix}")
    return found


def _listed(names: Iterable) -> str:
    """The first `SHOWN` names, and how many more there are."""
    names = [str(name) for name in names]
    more = f", ... and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
