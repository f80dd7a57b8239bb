"""Each published layout becomes one manifest: a row per image, with patient, group and official split."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd
from PIL import Image, UnidentifiedImageError

from .locate import DataNotFound, Location

log = logging.getLogger("dlia_utils")

COLUMNS = ("path", "label", "class_name", "patient", "group", "split")
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
SHOWN = 20  # How many names an error message lists before it only counts.


class BadData(ValueError):
    """Files or folders of the data set that cannot be used; the message lists them and says what to do."""


@dataclass(frozen=True)
class Dataset:
    """A data set as a table: `manifest` has the columns `COLUMNS`; the row number is an image's id.

    `ignored` (path, reason) lists what was found in the tree but not read; `split_rule` says how `split`
    arose.
    """

    name: str
    root: Path
    manifest: pd.DataFrame
    classes: tuple[str, ...]
    ignored: pd.DataFrame
    synthetic: bool
    origin: str
    split_rule: str = "official"


def load(location: Location) -> Dataset:
    """Read the data set at `location` (see `locate.find`) into a `Dataset`; no image is decoded.

    Errors: `DataNotFound` for a missing split or class folder, `BadData` for an empty class folder.
    """
    manifest, classes, ignored = _LAYOUTS[location.dataset](location.root)
    if len(ignored):
        reasons = ignored["reason"].value_counts()
        log.info(
            "ignored %d files: %s", len(ignored), "; ".join(f"{n} {reason}" for reason, n in reasons.items())
        )
    return Dataset(
        location.dataset, location.root, manifest, classes, ignored, location.synthetic, location.origin
    )


def summary(dataset: Dataset) -> pd.DataFrame:
    """Images and patients by split and class: columns split, class_name, images, patients."""
    order = [name for name in ("train", "val", "test") if name in set(dataset.manifest["split"])]
    table = dataset.manifest.groupby(["split", "class_name"], as_index=False).agg(
        images=("path", "size"), patients=("patient", "nunique")
    )
    table["split"] = pd.Categorical(table["split"], order, ordered=True)
    return table.sort_values(["split", "class_name"], ignore_index=True).astype({"split": str})


def check(dataset: Dataset) -> pd.DataFrame:
    """Look at each file's size and header, without decoding: columns path, problem (empty: all is well)."""
    paths = list(dataset.manifest["path"])
    with ThreadPoolExecutor(8) as pool:
        problems = list(pool.map(lambda path: _file_problem(dataset.root / path), paths))
    rows = [(path, problem) for path, problem in zip(paths, problems, strict=True) if problem]
    return pd.DataFrame(rows, columns=["path", "problem"])


def problem_text(problems: pd.DataFrame) -> str:
    """The message of a `BadData` error: the first files by name, the number of the rest, and the fix.

    >>> print(problem_text(pd.DataFrame({"path": ["test/NORMAL/a.jpeg"], "problem": ["not an image"]})))
    1 unusable file:
      test/NORMAL/a.jpeg: not an image
    Fix: copy these files again from the original data set, or delete them (`data check` decodes every file).
    """
    lines = [f"  {row.path}: {row.problem}" for row in problems.head(SHOWN).itertuples()]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    head = f"{len(problems)} unusable file{'s' if len(problems) != 1 else ''}:"
    fix = "Fix: copy these files again from the original data set, or delete them (`data check` decodes every file)."
    return "\n".join([head, *lines, fix])


def pneumonia(root: Path) -> tuple[pd.DataFrame, tuple[str, ...], pd.DataFrame]:
    """Chest X-Ray Images (Pneumonia), Kermany et al. 2018: manifest, classes and ignored files of `root`.

    `root` holds train/, test/ and perhaps val/ (16 images), each with NORMAL/ and PNEUMONIA/. The published
    archive also carries a second copy in chest_xray/chest_xray and Finder's litter: listed in `ignored`,
    never read.
    """
    classes = ("NORMAL", "PNEUMONIA")
    splits = [name for name in ("train", "val", "test") if name != "val" or (root / name).is_dir()]
    _need_folders(root, [f"{split}/{name}" for split in splits for name in classes])
    rows, ignored = [], []
    for path in _walk(root):
        reason = _junk_reason(path) or _layout_reason(path, splits, classes)
        if reason:
            ignored.append((str(path), reason))
        else:
            patient, group = pneumonia_patient(path.name)
            rows.append(
                (str(path), classes.index(path.parts[1]), path.parts[1], patient, group, path.parts[0])
            )
    manifest = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"label": "int64"})
    _need_images(manifest, root, splits, classes)
    _say_odd(manifest)
    return manifest, classes, pd.DataFrame(ignored, columns=["path", "reason"])


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


_LAYOUTS: dict[str, Callable[[Path], tuple[pd.DataFrame, tuple[str, ...], pd.DataFrame]]] = {
    "pneumonia": pneumonia
}


def _walk(root: Path) -> list[PurePosixPath]:
    """Every file below `root`, relative and sorted, so that row numbers do not depend on the file system."""
    found = []
    for folder, _, names in os.walk(root):
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found.extend(relative / name for name in names)
    return sorted(found)


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


def _layout_reason(path: PurePosixPath, splits: list[str], classes: tuple[str, ...]) -> str:
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
        raise DataNotFound(
            f"{root} has no {', '.join(missing)}: unpack the whole archive again (see data/README.md)"
        )


def _need_images(manifest: pd.DataFrame, root: Path, splits: list[str], classes: tuple[str, ...]) -> None:
    have = set(zip(manifest["split"], manifest["class_name"], strict=True))
    empty = [f"{split}/{name}" for split in splits for name in classes if (split, name) not in have]
    if empty:
        hint = "; val/ may be left out altogether" if any(name.startswith("val/") for name in empty) else ""
        raise BadData(f"{root}: no images in {', '.join(empty)}. Fix: unpack the whole archive again{hint}.")


def _say_odd(manifest: pd.DataFrame) -> None:
    odd = manifest.loc[manifest["group"] == "unknown", "path"]
    if len(odd):
        log.warning(
            "%d file names tell no patient; each counts as its own: %s", len(odd), ", ".join(odd[:SHOWN])
        )
    val = int((manifest["split"] == "val").sum())
    if 0 < val < 100:
        log.info("the official val split has only %d images: draw a larger one with split.grouped", val)


def _file_problem(path: Path) -> str:
    """What is wrong with a file as far as its size and header tell; "" when nothing."""
    try:
        if path.stat().st_size == 0:
            return "empty file (0 bytes)"
        with Image.open(path) as image:
            # Pillow would clip these to white without a word.
            deep = image.mode.startswith(("I", "F"))
            return f"more than 8 bits a pixel (mode {image.mode}), convert it to 8" if deep else ""
    except UnidentifiedImageError:
        return "not an image"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
