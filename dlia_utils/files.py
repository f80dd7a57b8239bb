"""Files are written under a temporary name and then renamed: a reader never sees half a file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, else it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: np.save, savefig and others read the format from it.
    own = f"{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
    temporary = path.with_name(f".{path.stem}.{own}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def copy_tree(source: str | Path, target: str | Path, *, linked: tuple[str, ...] = ()) -> Path:
    """Copy a folder (but hidden files and locks) in one step; the copy can always be written.

    Files whose names end in one of `linked` get a second name instead, where the disk allows it.
    """

    def copy(old: str, new: str) -> None:
        if old.endswith(linked):
            with contextlib.suppress(OSError):  # another disk, or one that knows no links
                return os.link(old, new)
        shutil.copyfile(old, new)  # unlike copytree's own copy2 without the mode

    with atomic_path(target) as scratch:
        ignored = shutil.ignore_patterns(".*", "*.lock")
        shutil.copytree(source, scratch, copy_function=copy, ignore=ignored)
        for folder in (scratch, *filter(Path.is_dir, scratch.rglob("*"))):
            folder.chmod(0o755)
    return Path(target)


def write_text(text: str, path: str | Path) -> Path:
    """Write `text` (UTF-8) in one step; returns the path."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def read_json(path: str | Path) -> Any:
    """What `write_json` has written to `path`; None where there is no such file."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(value: Any, path: str | Path) -> Path:
    """Write `value` as indented JSON in one step; returns the path."""
    return write_text(json.dumps(value, indent=1, sort_keys=True, default=str) + "\n", path)


def write_csv(table: pd.DataFrame, path: str | Path) -> Path:
    """Write `table` as CSV without its index in one step; returns the path."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
    return Path(path)


def read_csv(path: str | Path) -> pd.DataFrame:
    """A table that `write_csv` wrote; ids come back to the last digit, 007 as text."""
    table, odd = pd.read_csv(path), r"-?(0\d+|\d{16,})"
    if not re.search(rf"(?m)(^|,){odd}(,|$)", Path(path).read_text(encoding="utf-8")):
        return table
    cells = pd.read_csv(path, dtype=str)
    for name in table.select_dtypes("number"):
        # Whole numbers beside an empty cell were read as decimals, which end at 2**53.
        lost = odd if table[name].dtype.kind == "f" else r"-?0\d+"
        if cells[name].str.fullmatch(lost).any():
            table[name] = cells[name]
    return table
