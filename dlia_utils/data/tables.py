"""What readers share: errors, the walk through a folder, box tables, sizes from headers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image

COLUMNS = ("path", "label", "class_name", "patient", "group", "split")
CORNERS = ["x1", "y1", "x2", "y2"]
BOX_COLUMNS = ("image", *CORNERS, "label", "class_name")
SHOWN = 20  # How many names an error message lists before it only counts.
SLACK = 1.0  # A box may stick out of its image by this many pixels: it is clipped. More: an error.
REPAIR = "unpack the whole archive again (see data/README.md)"


class DataNotFound(FileNotFoundError):
    """No folder with the data set's tree where the user said it is."""


class BadData(ValueError):
    """Files of the data set that cannot be used; the message lists them and says what to do."""


def refuse(head: str, problems: Sequence[str], fix: str) -> None:
    """`BadData` that lists the first `problems` and counts the rest; nothing without any."""
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        lines = [f"  {line}" for line in [*problems[:SHOWN], *more]]
        number = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise BadData("\n".join([f"{head}: {number}", *lines, f"Fix: {fix}."]))


def tables(rows: Iterable[tuple], classes: Sequence[str], ignored: Iterable[tuple], **more) -> dict:
    """The fields of a `Dataset`: manifest of `rows`, ignored (path, reason), and `more`."""
    manifest = pd.DataFrame(list(rows), columns=list(COLUMNS)).astype({"label": "int64"})
    left_out = pd.DataFrame(sorted(ignored), columns=["path", "reason"])
    return dict(manifest=manifest, classes=tuple(classes), ignored=left_out) | more


def junk_reason(path: PurePosixPath) -> str:
    """Why a file is junk whatever the data set; "" when it is not."""
    if path.name.lower() in (".ds_store", "thumbs.db", "desktop.ini"):
        return "folder settings of the operating system"
    if "__MACOSX" in path.parts:
        return "macOS archive junk (__MACOSX)"
    if path.name.startswith("._"):
        return "macOS resource fork (._*)"
    return "hidden file or folder" if any(part.startswith(".") for part in path.parts) else ""


def sort_files(
    root: Path, reason: Callable[[PurePosixPath], str], suffixes: Sequence[str]
) -> tuple[list[PurePosixPath], list[tuple[str, str]]]:
    """The images below `root`, sorted, for which `reason` is "", and (path, reason) of other files.

    Links are followed, but never in a circle.
    """
    kept, ignored = [], []

    def failed(error: OSError) -> None:
        text = f"{error.filename} cannot be read ({error.strerror}). Fix: its access rights."
        raise BadData(text) from error

    for folder, below, names in os.walk(root, followlinks=True, onerror=failed):
        above = Path(os.path.realpath(os.path.dirname(folder)))
        if os.path.islink(folder) and above.is_relative_to(os.path.realpath(folder)):
            ignored.append((os.path.relpath(folder, root), "a link to a folder that it lies in"))
            below.clear()
            continue
        for name in names:
            path = PurePosixPath(Path(folder).relative_to(root).as_posix(), name)
            why = junk_reason(path) or reason(path)
            if not why and path.suffix.lower() not in suffixes:
                why = "not named like an image"
            if not why and not os.path.isfile(root / path):
                why = "a link to nothing, or no file"
            if why:
                ignored.append((str(path), why))
            else:
                kept.append(path)
    return sorted(kept), ignored


def shapes_of(root: Path, paths: Iterable[str]) -> list[tuple[int, int] | None]:
    """(height, width) of each file, upright, from its header; None for one that cannot be read."""

    def shape(path: str) -> tuple[int, int] | None:
        try:
            with Image.open(root / path) as image:
                return upright_shape(image)
        except OSError:
            return None

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(shape, paths))


def upright_shape(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image the right way up, from its header alone."""
    return (image.width, image.height) if orientation(image) >= 5 else (image.height, image.width)


def orientation(image: Image.Image) -> int:
    """EXIF orientation: 1 is upright, 5 to 8 swap the sides; 1 for any PNG, unread."""
    return 1 if image.format == "PNG" else image.getexif().get(0x0112, 1)


def box_table(
    raw: pd.DataFrame, classes: Sequence[str], row_of: dict[str, int], shapes: dict[str, tuple]
) -> tuple[pd.DataFrame, list[str]]:
    """The boxes (`BOX_COLUMNS`) of the images in `row_of`, clipped to them, and problems.

    `raw` has the columns name (of the image), class_name, x1, y1, x2, y2 and where (in the file);
    `shapes` holds (height, width) by name, as far as they are known.
    """
    sides = [shapes.get(name) or (np.inf, np.inf) for name in raw["name"]]
    height, width = np.array(sides, dtype=float).reshape(-1, 2).T
    given = raw[CORNERS].to_numpy(float)
    x1, y1, x2, y2 = given.T
    tests = {
        "names no image": raw["name"] == "",
        f"unknown label (known: {', '.join(classes)})": ~raw["class_name"].isin(classes),
        "a coordinate is not a number": np.isnan(given).any(1),
        "no width or no height; are these x, y, width, height?": (x2 <= x1) | (y2 <= y1),
        "a coordinate is negative": (x1 < -SLACK) | (y1 < -SLACK),
        "reaches out of its image": (x2 > width + SLACK) | (y2 > height + SLACK),
        "the same box stands above already": raw.duplicated(["name", "class_name", *CORNERS]),
    }
    wrong = np.select([np.asarray(test, bool) for test in tests.values()], list(tests), "")
    corners = [", ".join(map("{:g}".format, row)) for row in given]
    lines = raw["where"] + ": " + raw["name"] + " " + raw["class_name"] + " [" + corners + "]: "
    problems = (lines + wrong)[wrong != ""].tolist()
    boxes = raw.assign(x1=x1.clip(0), y1=y1.clip(0))
    boxes = boxes.assign(x2=np.minimum(x2, width), y2=np.minimum(y2, height))
    boxes["image"] = raw["name"].map(row_of)
    boxes["label"] = raw["class_name"].map({name: k for k, name in enumerate(classes, 1)})
    boxes = boxes[boxes["image"].notna() & (wrong == "")]
    boxes = boxes.sort_values(["image", "label", *CORNERS], ignore_index=True)[list(BOX_COLUMNS)]
    return boxes.astype({"image": "int64", "label": "int64"}), problems


def rarest_class(boxes: pd.DataFrame, count: int) -> list[int]:
    """Label of the rarest class on each of `count` images, -1 without a box."""
    frequency = boxes["label"].map(boxes["label"].value_counts())
    rarest = boxes.assign(frequency=frequency).sort_values(["frequency", "label"])
    rarest = rarest.drop_duplicates("image").set_index("image")["label"]
    return (rarest.reindex(range(count)).fillna(0).astype(int) - 1).tolist()
