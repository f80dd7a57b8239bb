"""What readers share: errors, the walk through a folder, the doors for images and CSVs, boxes."""

from __future__ import annotations

import codecs
import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

COLUMNS = ("path", "label", "class_name", "patient", "group", "split")
CORNERS = ["x1", "y1", "x2", "y2"]
BOX_COLUMNS = ("image", *CORNERS, "label", "class_name")
SHOWN = 20  # How many names an error message lists before it only counts.
SLACK = 1.0  # A box may stick out of its image by this many pixels: it is clipped. More: an error.
LONGEST = 1000  # A line of a message that is longer loses its middle: a cell may hold megabytes.
REPAIR = "unpack the whole archive again (see data/README.md)"
CSV_FIX = 'save it as CSV in UTF-8, with a cell that holds "," in double quotes'
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Nothing else, PostScript least of all.
MAGIC = (b"BM", b"GIF8", b"\xff\xd8\xff", b"\x89PNG", b"II*\0", b"MM\0*", b"RIFF")  # how they begin
MAX_PIXELS = 100_000_000  # Mammograms and whole spines stay below a third of it.


class DataNotFound(FileNotFoundError):
    """No folder with the data set's tree where the user said it is."""


class BadData(ValueError):
    """Files of the data set that cannot be used; the message lists them and says what to do.

    `problems` holds them as a table (path, problem) where images are concerned.
    """

    def __init__(self, message: str, problems: pd.DataFrame | None = None):
        super().__init__("\n".join(map(_shortened, message.split("\n"))))
        none = problems is None
        self.problems = pd.DataFrame(columns=["path", "problem"]) if none else problems


class BadImage(BadData):
    """What is wrong with an image file, without its name."""


def _shortened(line: str) -> str:
    half = LONGEST // 2
    cut = f"{line[:half]} [... {len(line):,} characters ...] {line[-half:]}"
    return cut if len(line) > LONGEST else line


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
        real = os.path.realpath(folder)
        above = map(Path, map(os.path.realpath, Path(folder).parents))
        if os.path.islink(folder) and any(one.is_relative_to(real) for one in above):
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


def open_image(file: Path | io.BytesIO, *, whole: bool = False) -> Image.Image:
    """An image file of one of `FORMATS`, opened by its header; `whole`: with its check sums.

    Use it with `with`. Errors: `BadImage` for what Pillow cannot open, and for what it would read
    wrongly without a word: more than 8 bits, several images, a TIFF on its side, a wrong check sum
    (PNG), more than `MAX_PIXELS`.

    >>> open_image(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0"))
    Traceback (most recent call last):
    dlia_utils.data.tables.BadImage: not an image (BMP, GIF, JPEG, PNG, TIFF, WEBP)
    """
    try:
        if whole:
            _compare_sums(file)
        image = Image.open(file, formats=FORMATS)
        problem = _image_problem(image)
    except Exception as error:  # Pillow's readers raise of every kind
        raise BadImage(_words(file, error)) from error
    if problem:
        image.close()
        raise BadImage(problem)
    return image


def _compare_sums(file: Path | io.BytesIO) -> None:
    """SyntaxError for a PNG that is damaged; one that ends too early is for the decoder to tell."""
    with Image.open(file, formats=FORMATS) as image:
        try:
            if image.format == "PNG":
                image.verify()
        except OSError as error:
            if error.errno:
                raise


def _image_problem(image: Image.Image) -> str:
    """What an opened image has that would be read wrongly; "": nothing."""
    deep = image.mode.startswith(("I", "F"))  # Pillow would clip these to white without a word.
    if image.format == "PNG":  # And would halve the bits of these.
        deep |= ";16" in str(image.tile[:1])
    if image.format == "TIFF":
        deep |= max(image.tag_v2.get(258, (1,))) > 8
    if deep:
        return f"more than 8 bits a pixel (mode {image.mode}), convert it to 8"
    if image.width * image.height > MAX_PIXELS:
        return _too_large(f"{image.width} x {image.height}")
    frames = 1 if image.format == "JPEG" else getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph with its preview
        return f"holds {frames} images, and one would be read: save each as a file"
    if image.format == "TIFF" and orientation(image) > 1:  # Pillow may garble it
        return f"lies on its side (orientation {orientation(image)}): save it upright"
    return ""


def _too_large(size: str) -> str:
    limit = f"{MAX_PIXELS // 1_000_000} million pixels"
    return f"{size} is more than {limit}, larger than any radiograph: save it smaller"


def _words(file: Path | io.BytesIO, error: Exception) -> str:
    """Why an image cannot be opened."""
    if isinstance(error, Image.DecompressionBombError):
        return _too_large("its size")
    if isinstance(error, UnidentifiedImageError | SyntaxError):
        if isinstance(file, io.BytesIO):
            start = file.getvalue()
        else:
            with file.open("rb") as opened:
                start = opened.read(16)
        if start.startswith(MAGIC):
            return "damaged: copy it again"
        return f"not an image ({', '.join(FORMATS)})" if start else "empty file (0 bytes)"
    if "MAX_TEXT" in str(error) or "text chunks" in str(error):
        return "holds a text or colour profile of many megabytes: save it without"
    reason = getattr(error, "strerror", "") or error or type(error).__name__
    return f"cannot be read ({reason})"


def shapes_of(root: Path, paths: Iterable[str]) -> list[tuple[int, int] | None]:
    """(height, width) of each file, upright, from its header; None for one that cannot be used."""

    def shape(path: str) -> tuple[int, int] | None:
        try:
            with open_image(root / path) as image:
                return upright_shape(image)
        except BadImage:
            return None

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(shape, paths))


def upright_shape(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image the right way up, from its header alone."""
    return (image.width, image.height) if orientation(image) >= 5 else (image.height, image.width)


def orientation(image: Image.Image) -> int:
    """EXIF orientation: 1 is upright, 5 to 8 swap the sides; 1 for odd EXIF, and for any PNG."""
    if image.format == "PNG":
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged block may raise anything
        return 1
    return int(value) if value in range(1, 9) else 1


def read_csv(path: Path, needed: Sequence[str] = (), *, text: bool = False) -> pd.DataFrame:
    """A reader's CSV (UTF-8; commas, semicolons or tabs); the index holds the line of each row.

    Blank rows, columns without a name, and blank cells beyond the header are left out. A column
    that holds numbers only becomes numbers; `text`: cells as they stand (0012 stays 0012). Errors:
    `DataNotFound`; `BadData` with file, line and fix for another encoding, an open quote, ragged
    rows, a name twice, a column of `needed` missing, no rows.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.csv"
    >>> _ = path.write_text("file;patient\\n1.png;0012\\n\\n2.png;0013;\\n")
    >>> read_csv(path)["patient"].to_dict(), read_csv(path, text=True).loc[4].to_list()
    ({2: 12, 4: 13}, ['2.png', '0013'])
    """
    rows = _csv_rows(path, _csv_text(path))
    first = next(iter(rows), 0)
    header = rows.pop(first, [])
    width = max((n for n, name in enumerate(header, 1) if name), default=0)
    if not rows:
        what = "has 0 rows below its header" if width else "is empty"
        raise BadData(f"{path} {what}. Fix: write it again, with a row for each image.")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    problems = [f"two columns {name}: keep one" for name in twice]
    problems += [
        f"line {line}: {len(row)} cells, but the header has {len(header)}"
        for line, row in rows.items()
        if len(row) < width or any(row[len(header) :])
    ]
    refuse(f"{path} cannot be read", problems, CSV_FIX)
    if missing := [name for name in needed if name not in header]:
        there = ", ".join(filter(None, header))
        raise BadData(f"{path} has no column {', '.join(missing)}; it has {there}. Fix: {REPAIR}.")
    named = [(n, name) for n, name in enumerate(header) if name]
    table = pd.DataFrame({k: [row[n] for row in rows.values()] for n, k in named}, dtype=str)
    if not text:
        table = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    return table.set_axis(list(rows))


def _csv_text(path: Path) -> str:
    """The content of a CSV file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataNotFound(f"{path} is not there: correct the path") from error
    except OSError as error:
        raise BadData(f"{path} cannot be read ({error.strerror}): name a CSV file") from error
    if b"\0" in content or content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadData(f"{path} cannot be read (UTF-16, or no text at all). Fix: {CSV_FIX}.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        text = f"{path} cannot be read (line {line} is not UTF-8). Fix: {CSV_FIX}."
        raise BadData(text) from error


def _csv_rows(path: Path, content: str) -> dict[int, list[str]]:
    """The cells of each row that is not blank, by the line on which it starts."""
    lines = io.StringIO(content, newline="")
    reader = csv.reader(lines, delimiter=delimiter(content.partition("\n")[0]), strict=True)
    rows, start = {}, 1
    try:
        for row in reader:
            if any(cells := [cell.strip() for cell in row]):
                rows[start] = cells
            start = reader.line_num + 1
    except csv.Error as error:
        text = f"{path} cannot be read (line {start}: {error}). Fix: {CSV_FIX}."
        raise BadData(text) from error
    return rows


def delimiter(line: str) -> str:
    """What separates the cells of a header."""
    return max(",;\t", key=line.count)


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
