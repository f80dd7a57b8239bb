"""Find a data set: argument, DLIA_DATA, Kaggle mounts, the repository's data/, kagglehub, the phantom."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from . import phantom

log = logging.getLogger("dlia_utils")

MAX_DEPTH = 3  # How far below a mount or an argument the data set's own folder may lie.


class DataNotFound(FileNotFoundError):
    """No folder with the data set's tree where the user said it is."""


@dataclass(frozen=True)
class Location:
    """Where a data set lies: `root` is the folder that holds its published tree.

    `origin` is one of "argument", "DLIA_DATA", "kaggle", "data/", "kagglehub", "phantom".
    """

    dataset: str
    root: Path
    origin: str
    synthetic: bool


@dataclass(frozen=True)
class Source:
    """One row of the registry: how a data set is recognised, where to get it, and its synthetic stand-in."""

    signature: tuple[str, ...]  # paths that must exist below the root
    slugs: tuple[str, ...]  # names of its Kaggle mounts
    handle: str  # kagglehub's "owner/slug"
    write_phantom: Callable[[Path], Path]


SOURCES: dict[str, Source] = {
    "pneumonia": Source(
        signature=("train/NORMAL", "train/PNEUMONIA", "test/NORMAL", "test/PNEUMONIA"),
        slugs=("chest-xray-pneumonia",),
        handle="paultimothymooney/chest-xray-pneumonia",
        write_phantom=phantom.write_pneumonia,
    ),
}


def kaggle_root() -> Path:
    """The folder that Kaggle mounts things under; `DLIA_KAGGLE_ROOT` replaces it in tests."""
    return Path(os.environ.get("DLIA_KAGGLE_ROOT") or "/kaggle")


def on_kaggle() -> bool:
    """True in a Kaggle kernel: the run type is set *and* the mounts exist (an API token alone is no sign)."""
    return bool(os.environ.get("KAGGLE_KERNEL_RUN_TYPE")) and (kaggle_root() / "input").is_dir()


def cache_root() -> Path:
    """Folder for decoded images and phantoms: `DLIA_CACHE`, Kaggle's scratch disk, or the user's cache."""
    if os.environ.get("DLIA_CACHE"):
        return Path(os.environ["DLIA_CACHE"]).expanduser()
    return kaggle_root() / "temp" / "dlia" if on_kaggle() else Path.home() / ".cache" / "dlia_utils"


def find(
    dataset: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    phantom_dir: str | Path | None = None,
) -> Location:
    """Find `dataset` ("pneumonia"); without any real copy, write and return its synthetic phantom.

    Order: `data_dir`, `DLIA_DATA`, Kaggle mounts, `data/` of the repository, kagglehub (only with
    `download=True` or `DLIA_DOWNLOAD=1`, never on Kaggle, where it waits for ever for a missing mount), the
    phantom. A `data_dir` or `DLIA_DATA` without the data set raises `DataNotFound`; it is never passed over.
    `ValueError`: unknown data set.

    >>> downloads = Path(tempfile.mkdtemp())
    >>> for folder in SOURCES["pneumonia"].signature:
    ...     (downloads / "chest_xray" / folder).mkdir(parents=True)
    >>> location = find("pneumonia", downloads)
    >>> location.root.name, location.origin, location.synthetic
    ('chest_xray', 'argument', False)
    """
    if dataset not in SOURCES:
        raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(SOURCES)}")
    for told, origin in ((data_dir, "argument"), (os.environ.get("DLIA_DATA"), "DLIA_DATA")):
        if told:
            return _told(dataset, Path(told).expanduser(), origin)
    for folder, origin in _usual_places(dataset):
        if root := _descend(folder, SOURCES[dataset].signature):
            return _location(dataset, root, origin)
        if missing := _half_there(folder, SOURCES[dataset].signature):
            log.warning("%s looks like %s but is passed over: %s", folder, dataset, missing)
    if (download or os.environ.get("DLIA_DOWNLOAD") == "1") and not on_kaggle():
        return _location(dataset, _download(dataset), "kagglehub")
    log.warning("no real %s data found: using SYNTHETIC phantom images (see data/README.md)", dataset)
    return _location(dataset, _phantom(dataset, phantom_dir), "phantom")


def _location(dataset: str, root: Path, origin: str) -> Location:
    # A phantom stays marked however it was found: by argument, environment or as a Kaggle data set.
    synthetic = any((folder / phantom.MARKER).is_file() for folder in (root, root.parent))
    return Location(dataset, root, origin, synthetic)


def _told(dataset: str, folder: Path, origin: str) -> Location:
    """The location inside a folder that the user named, or an error: never another place."""
    what = "data_dir" if origin == "argument" else "the environment variable DLIA_DATA"
    signature = SOURCES[dataset].signature
    if not folder.is_dir():
        raise DataNotFound(
            f"{what} = {str(folder)!r} is not a folder; name the folder that holds {dataset}'s "
            f"{', '.join(signature)} (at most {MAX_DEPTH} levels below it)"
        )
    if root := _descend(folder, signature):
        return _location(dataset, root, origin)
    if missing := _half_there(folder, signature):
        raise DataNotFound(
            f"{what} = {str(folder)!r} looks like {dataset} but is not complete: {missing}. "
            "Unpack the whole archive again (see data/README.md)"
        )
    for parent in list(folder.resolve().parents)[:2]:
        if all((parent / part).is_dir() for part in signature):
            raise DataNotFound(
                f"{what} = {str(folder)!r} lies inside {dataset}; name {str(parent)!r} instead"
            )
    raise DataNotFound(
        f"{what} = {str(folder)!r} does not hold {dataset}: no folder in it (down to {MAX_DEPTH} levels) "
        f"has {', '.join(signature)}. Correct the path, or leave it out to search the usual places"
    )


def _folders(top: Path) -> Iterator[Path]:
    """`top` and the folders below it, nearest first, down to `MAX_DEPTH`; junk folders left out."""
    level = [top]
    for depth in range(MAX_DEPTH + 1):
        yield from level
        if depth < MAX_DEPTH:
            level = [child for folder in level for child in _children(folder)]


def _children(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError:  # A folder that we may not read cannot be the one that the user wants.
        return []
    return [folder / name for name in names if not name.startswith(".") and name != "__MACOSX"]


def _descend(top: Path, signature: tuple[str, ...]) -> Path | None:
    """The nearest folder that has every path of the signature."""
    if not top.is_dir():
        return None
    return next(
        (folder for folder in _folders(top) if all((folder / part).exists() for part in signature)), None
    )


def _half_there(top: Path, signature: tuple[str, ...]) -> str:
    """Which parts are missing in the first folder that has some of the signature; "" when there is none."""
    for folder in _folders(top) if top.is_dir() else ():
        missing = [part for part in signature if not (folder / part).exists()]
        if 0 < len(missing) < len(signature):
            return f"{folder} has no {', '.join(missing)}"
    return ""


def _usual_places(dataset: str) -> Iterator[tuple[Path, str]]:
    # Fixed-depth globs: rglob walks every image of every mount, and finds nested duplicates first.
    mounts = kaggle_root() / "input"
    slugs = SOURCES[dataset].slugs
    patterns = [p for s in slugs for p in (s, f"datasets/*/{s}", f"datasets/organizations/*/{s}")]
    patterns += ["*", "datasets/*/*", "datasets/organizations/*/*", "competitions/*", "notebooks/*/*"]
    layouts = {"datasets", "competitions", "notebooks", "models", "organizations"}
    seen: set[Path] = set()
    for pattern in patterns if mounts.is_dir() else ():
        for mount in sorted(mounts.glob(pattern)):
            if mount not in seen and mount.name not in layouts:
                seen.add(mount)
                yield mount, "kaggle"
    yield Path(__file__).resolve().parents[1] / "data", "data/"


def _download(dataset: str) -> Path:
    handle = SOURCES[dataset].handle
    try:
        import kagglehub
    except ImportError as error:
        raise DataNotFound(
            f"downloading {handle} needs kagglehub: python -m pip install kagglehub"
        ) from error
    folder = Path(kagglehub.dataset_download(handle))
    if root := _descend(folder, SOURCES[dataset].signature):
        return root
    raise DataNotFound(
        f"kagglehub put {handle} into {folder}, but {', '.join(SOURCES[dataset].signature)} are not there"
    )


def _phantom(dataset: str, phantom_dir: str | Path | None) -> Path:
    """Write the phantom once: one left half-written is never used, and two processes do not collide."""
    folder = Path(phantom_dir) if phantom_dir else cache_root() / "phantom" / f"{dataset}-{phantom.VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not (folder / phantom.MARKER).is_file():
            for left_over in folder.parent.glob(f"{folder.name}.part-*"):
                shutil.rmtree(left_over)
            part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
            SOURCES[dataset].write_phantom(part)
            if folder.is_dir():
                shutil.rmtree(folder)
            os.replace(part, folder)
    return _descend(folder, SOURCES[dataset].signature) or folder
