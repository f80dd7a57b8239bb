"""Files are written under a temporary name and then renamed: a reader never sees half a file.

What is read back is checked: a damaged file is named, with the fix.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, a quota, a limit of the process
ANEW = "delete it, and it is made anew"
LONGEST = 150  # bytes of a name, which gets endings and 255 hold


class Damaged(ValueError):
    """A file that is cut, changed or of another kind; the message names it and the fix."""


class NoSpace(OSError):
    """The disk is full; the message names the folder."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, else it is removed.

    Raises: `NoSpace` for whatever a library says of a full disk.
    """
    path = Path(path)
    # The suffix stays last: np.save, savefig and others read the format from it.
    own = f"{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    temporary = path.with_name(f".{path.stem}.{own}{path.suffix}")
    try:
        with room(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def room(folder: Path) -> Iterator[None]:
    """Whatever a library says of a full disk while it writes into `folder` becomes `NoSpace`."""
    try:
        yield
    except NoSpace:
        raise
    except Exception as error:
        if _full(error):
            raise no_space(folder) from error
        raise


def no_space(folder: Path) -> NoSpace:
    """The error for a full disk, in words that cost nobody a good file."""
    fix = "make room there, then run again: what was finished is kept"
    return NoSpace(f"no space left in {folder} (a full disk, or a limit for its user): {fix}")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def _full(error: Exception) -> bool:
    # torch says it in its own words; what made it say so is the error's context.
    words = [os.strerror(one) for one in FULL]
    return any(
        getattr(one, "errno", None) in FULL
        or (isinstance(one, shutil.Error) and any(word in str(one) for word in words))
        for one in causes(error)
    )


def error_text(error: Exception) -> str:
    """An error as a line for the terminal.

    >>> error_text(FileNotFoundError(2, "No such file or directory", "a.csv"))
    'a.csv: No such file or directory'
    """
    place = getattr(error, "filename", None)
    return f"{place}: {error.strerror}" if place else str(error)


def one_part(name: str, what: str) -> str:
    """`name`, if it can be that of one file or folder here. Raises: ValueError that says `what`."""
    text = name if isinstance(name, str) else ""
    good = text.isprintable() and not set(text) & set("/\\") and not text.startswith(".")
    if not (text.strip() and good and len(os.fsencode(text)) <= LONGEST):
        rule = f"no / or \\, no dot at its start, at most {LONGEST} bytes"
        raise ValueError(f"{what} {name!r} cannot name a folder: {rule}")
    return name


def locked(path: str | Path) -> FileLock:
    """For `with`: the file is read, changed and written by one process at a time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"))


def put_aside(folder: Path) -> Path:
    """Rename a folder to NAME.<time>.old; returns the new path."""
    aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}.old")
    if aside.exists():
        aside = aside.with_name(f"{aside.stem}-{uuid.uuid4().hex[:8]}.old")
    return folder.rename(aside)


def copy_tree(source: str | Path, target: str | Path, *, linked: tuple[str, ...] = ()) -> Path:
    """Copy a folder (but hidden files, locks and links to folders, which may be loops) in one step;
    the copy can always be written.

    Files whose names end in one of `linked` get a second name instead, where the disk allows it.
    """

    def copy(old: str, new: str) -> None:
        if old.endswith(linked):
            with contextlib.suppress(OSError):  # another disk, or one that knows no links
                return os.link(old, new)
        shutil.copyfile(old, new)  # unlike copytree's own copy2 without the mode

    def ignored(folder: str, names: list[str]) -> set[str]:
        links = {
            path.name for path in Path(folder).iterdir() if path.is_symlink() and path.is_dir()
        }
        return links | shutil.ignore_patterns(".*", "*.lock")(folder, names)

    with atomic_path(target) as scratch:
        shutil.copytree(source, scratch, copy_function=copy, ignore=ignored)
        for folder in (scratch, *filter(Path.is_dir, scratch.rglob("*"))):
            folder.chmod(0o755)
    return Path(target)


def write_text(text: str, path: str | Path) -> Path:
    """Write `text` (UTF-8) in one step; returns the path."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


@contextlib.contextmanager
def reading(path: str | Path, fix: str) -> Iterator[None]:
    """Whatever goes wrong with the content of the file `path` becomes `Damaged`, with the fix."""
    try:
        yield
    except Damaged:
        raise
    except Exception as error:
        # A file that cannot be reached says so itself; an invalid seek is a damaged directory.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        why = f" ({' '.join(str(error).split())})" if isinstance(error, ValueError) else ""
        raise Damaged(f"{path} is damaged or of another kind{why}: {fix}") from error


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_zip(path: str | Path) -> None:
    """Refuse a zip (.pt, .npz) with a changed byte, or that would unpack to more than it holds.

    Raises: ValueError, zipfile.BadZipFile.
    """
    with zipfile.ZipFile(path) as inside:
        unpacked = sum(part.file_size for part in inside.infolist())
        if unpacked > Path(path).stat().st_size:
            raise ValueError(f"it would unpack to {unpacked / 1e6:.0f} MB")
        if changed := inside.testzip():
            raise ValueError(f"a part of it was changed, {changed}")


def read_torch(path: str | Path, fix: str) -> Any:
    """What `torch.save` has written: data alone (weights_only), no byte of it changed.

    Raises: `Damaged` that names the fix.
    """
    import torch  # a second, which those who only write text need not wait

    with reading(path, fix):
        if zipfile.is_zipfile(path):  # files of torch before 1.6 are none
            check_zip(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def write_torch(content: Any, path: str | Path) -> Path:
    """`torch.save` in one step; returns the path."""
    import torch

    # Through a file of Python's, which says when the disk is full.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
    return Path(path)


def read_json(path: str | Path, fix: str = ANEW) -> dict[str, Any] | None:
    """The dictionary that `write_json` has written to `path`; None where there is no such file.

    Raises: `Damaged` that names the fix.
    """
    path = Path(path)
    if not path.exists():
        return None
    with reading(path, fix):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found


def write_json(value: Any, path: str | Path) -> Path:
    """Write `value` as indented JSON in one step; returns the path."""
    return write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n", path)


def write_csv(table: pd.DataFrame, path: str | Path) -> Path:
    """Write `table` as CSV without its index in one step; returns the path."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
    return Path(path)


def read_csv(path: str | Path, fix: str = ANEW, **options: Any) -> pd.DataFrame:
    """A table that `write_csv` wrote; ids come back to the last digit, 007 as text.

    Raises: `Damaged` that names the fix.
    """
    with reading(path, fix):
        table, odd = pd.read_csv(path, **options), r"-?(0\d+|\d{16,})"
        if not re.search(rf"(?m)(^|,){odd}(,|$)", Path(path).read_text(encoding="utf-8")):
            return table
        cells = pd.read_csv(path, dtype=str)
        for name in table.select_dtypes("number"):
            # Whole numbers beside an empty cell were read as decimals, which end at 2**53.
            lost = odd if table[name].dtype.kind == "f" else r"-?0\d+"
            if cells[name].str.fullmatch(lost).any():
                table[name] = cells[name]
        return table
