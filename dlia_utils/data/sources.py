"""Find a data set: argument, DLIA_DATA, Kaggle mounts, the repository's data/, kagglehub, the phantom."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from filelock import FileLock

from . import _fracatlas, medmnist, own_data, phantom, readers
from .readers import BadData, DataNotFound

log = logging.getLogger("dlia_utils")

MAX_DEPTH = 3  # How far below a mount or an argument the data set's own folder may lie.


@dataclass(frozen=True)
class Location:
    """Where a data set lies: `root` is the folder that holds its published tree.

    `origin` is one of "argument", "DLIA_DATA", "kaggle", "data/", "kagglehub", "phantom", and for MedMNIST
    "~/.medmnist" or "medmnist" (downloaded by that package). `kind` says how the tree is read: "published", or the
    reader's own "folder" of class folders or "boxes", with the `options` of `datasets.from_folder` or `from_boxes`.
    """

    dataset: str
    root: Path
    origin: str
    synthetic: bool
    kind: str = "published"
    options: dict = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Source:
    """One row of the registry: how a data set is recognised, where to get it, and its synthetic stand-in."""

    signature: tuple[
        str, ...
    ]  # paths that must exist below the root, the most telling first; "a|b": either
    slugs: tuple[str, ...]  # names of its Kaggle mounts
    handle: str  # kagglehub's "owner/slug"; "" where it has none
    write_phantom: Callable[[Path], Path]
    gap: Callable[[Path], str] = lambda root: (
        ""
    )  # why a copy in this folder cannot be used; "" when it can
    others: tuple[
        tuple[str, ...], ...
    ] = ()  # signatures of the other trees that it is published in
    instead: Callable[[Path], str] = lambda folder: (
        ""
    )  # what a folder has that is nearly the data set, and the fix
    places: tuple[tuple[Path, str], ...] = ()  # further (folder, origin) to look in
    fetch: Callable[[], Path] | None = None  # downloads it, where kagglehub does not

    @property
    def signatures(self) -> tuple[tuple[str, ...], ...]:
        """All trees that the data set is recognised by."""
        return (self.signature, *self.others)


SOURCES: dict[str, Source] = {
    "pneumonia": Source(
        signature=("train/NORMAL", "train/PNEUMONIA", "test/NORMAL", "test/PNEUMONIA"),
        slugs=("chest-xray-pneumonia",),
        handle="paultimothymooney/chest-xray-pneumonia",
        write_phantom=phantom.write_pneumonia,
    ),
    "nih": Source(
        signature=(readers.NIH_BOXES,),
        slugs=("data",),
        handle="nih-chest-xrays/data",
        write_phantom=phantom.write_nih,
        gap=readers.nih_gap,
    ),
    "dlia": Source(
        signature=(
            readers.DLIA_MAPPING,
            readers.DLIA_TRAIN,
            "train|train_images",
            "test|test_images",
        ),
        slugs=("m-2-big-data-dlia-project-2025-clean-dataset",),
        handle="",
        write_phantom=phantom.write_competition,
        gap=readers.dlia_gap,
    ),
    "fracatlas": Source(
        signature=(
            "images/Fractured|images/All_Images",
            _fracatlas.TABLE,
            _fracatlas.BOXES,
            *_fracatlas.SPLITS.values(),
        ),
        slugs=("fracatlas", "fracatlas-original-dataset"),
        handle="vuppalaadithyasriharsha/fracatlas",
        write_phantom=phantom.write_fracatlas,
        others=(
            (
                "not fractured/ann",
                "not fractured/img",
                "train/ann",
                "train/img",
                "val/ann",
                "val/img",
                "test/ann",
                "test/img",
            ),
        ),
    ),
    "tuberculosis": Source(
        signature=("Tuberculosis", "Normal"),
        slugs=("tuberculosis-tb-chest-xray-dataset",),
        handle="tawsifurrahman/tuberculosis-tb-chest-xray-dataset",
        write_phantom=phantom.write_tuberculosis,
    ),
    "covid": Source(
        signature=("COVID", "Normal"),
        slugs=("covid19-radiography-database",),
        handle="tawsifurrahman/covid19-radiography-database",
        write_phantom=phantom.write_covid,
        others=(
            (
                "train/COVID|train/covid|train/Covid",
                "test/COVID|test/covid|test/Covid",
                "train/normal|train/Normal|train/NORMAL",
                "test/normal|test/Normal|test/NORMAL",
            ),
        ),
    ),
}


def source_of(dataset: str) -> Source:
    """The registry's row of `dataset`; a MedMNIST name (see `medmnist.parse`), of which there are many, gets its own.

    `ValueError`: unknown data set.

    >>> source_of("octmnist_64").signature
    ('octmnist_64.npz|octmnist_128.npz|octmnist_224.npz',)
    """
    if dataset in SOURCES:
        return SOURCES[dataset]
    if not medmnist.meant(dataset):
        raise ValueError(
            f"unknown data set {dataset!r}; known: {', '.join(SOURCES)}, and MedMNIST's {', '.join(medmnist.FLAGS)}"
        )
    return Source(
        signature=("|".join(medmnist.file_names(dataset)),),
        slugs=(),
        handle="",
        write_phantom=partial(phantom.write_medmnist, name=dataset),
        instead=partial(medmnist.instead, dataset),
        places=((medmnist.home(), "~/.medmnist"),),
        fetch=partial(medmnist.download, dataset),
    )


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
    """Find `dataset`, a name in `SOURCES` or one of MedMNIST's; without any real copy, write its synthetic phantom.

    Order: `data_dir`, `DLIA_DATA`, Kaggle mounts, `data/` of the repository, for MedMNIST `~/.medmnist`, a download
    by kagglehub or medmnist (only with `download=True` or `DLIA_DOWNLOAD=1`, never on Kaggle, where kagglehub waits
    for ever for a missing mount), the phantom. A `data_dir` or `DLIA_DATA` without the data set raises
    `DataNotFound`; it is never passed over.
    `ValueError`: unknown data set.

    >>> downloads = Path(tempfile.mkdtemp())
    >>> for folder in SOURCES["pneumonia"].signature:
    ...     (downloads / "chest_xray" / folder).mkdir(parents=True)
    >>> location = find("pneumonia", downloads)
    >>> location.root.name, location.origin, location.synthetic
    ('chest_xray', 'argument', False)
    """
    _need_known([dataset])
    if location := _present(dataset, data_dir):
        return location
    return _made([dataset], download=download, phantom_dir=phantom_dir)


def find_first(
    datasets: Sequence[str],
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    phantom_dir: str | Path | None = None,
) -> Location:
    """The first of `datasets` of which a usable copy is there; without any, the phantom of the first.

    Each is searched in turn as by `find`. A copy with a gap (boxed images that are missing) is passed over
    with a log line, and so is a data set that `data_dir` or `DLIA_DATA` does not hold; when they hold none of
    them: `DataNotFound`. A download is tried for the first data set that can be had so.
    `ValueError`: no or unknown data sets.
    """
    _need_known(datasets)
    reasons = []
    for dataset in datasets:
        try:
            location = _present(dataset, data_dir)
        except DataNotFound as error:
            reasons.append(str(error))
            log.info("%s is passed over: %s", dataset, error)
            continue
        if location is None:
            continue
        if not (gap := _gap(location)):
            return location
        reasons.append(f"{location.root} ({dataset}): {gap}")
        log.warning("%s in %s is passed over: %s", dataset, location.root, gap)
    if data_dir or os.environ.get("DLIA_DATA"):
        raise DataNotFound(
            "none of " + ", ".join(datasets) + " can be used:\n  " + "\n  ".join(reasons)
        )
    return _made(datasets, download=download, phantom_dir=phantom_dir)


def find_own(
    data_dir: str | Path | None, *, kind: str = "folder", options: dict | None = None
) -> Location | None:
    """The reader's own data in `data_dir`: class folders ("folder"), or one table of boxes with images ("boxes").

    None when the folder does not look so, or holds a published data set (see `published_in`). The folder is not
    searched: it must be the one that holds the class folders, or the table. Whether all is well with the data is
    for `datasets.load` to say. Errors: `ValueError` for another kind, `BadData` for a folder that cannot be read.

    >>> folder = Path(tempfile.mkdtemp()) / "mine"
    >>> for name in ("flu", "Normal"):
    ...     (folder / name).mkdir(parents=True)
    ...     (folder / name / "1.png").touch()
    >>> location = find_own(folder)
    >>> location.dataset, location.kind, find_own(folder, kind="boxes")
    ('mine', 'folder', None)
    """
    if kind not in ("folder", "boxes"):
        raise ValueError(f"kind is {kind!r}; it must be 'folder' or 'boxes'")
    folder = Path(os.path.abspath(Path(data_dir or "").expanduser()))
    if not data_dir or not folder.is_dir() or published_in(folder):
        return None
    if kind == "folder":
        return own(folder, options=options) if own_data.holds_classes(folder) else None
    tables = own_data.box_files(folder)
    if len(tables) != 1 or not own_data.has_image(folder):
        return None
    return own(folder, kind=kind, options={"annotations": tables[0]} | (options or {}))


def own(folder: str | Path, *, kind: str = "folder", options: dict | None = None) -> Location:
    """The reader's own `folder` as a location, under the folder's name; a published name gets "-folder" behind it.

    >>> own("data/mine").dataset, own("data/covid").dataset
    ('mine', 'covid-folder')
    """
    root = Path(os.path.abspath(Path(folder).expanduser()))  # A link keeps its own name.
    taken = root.name.casefold() in SOURCES or medmnist.meant(root.name.casefold())
    named = _location(root.name + "-folder" * taken or "folder", root, "argument")
    return replace(named, kind=kind, options=dict(options or {}))


def published_in(folder: Path) -> list[str]:
    """Names of the published data sets in `folder` or in one below it, down to `MAX_DEPTH`; of MedMNIST, of each file.

    >>> published_in(Path(tempfile.mkdtemp()))
    []
    """
    found = []
    for one in _folders(folder):
        found += [name for name, source in SOURCES.items() if _is_root(one, source)]
        found += [path.stem for path in sorted(one.glob("*.npz")) if medmnist.meant(path.stem)]
    return list(dict.fromkeys(found))


def siblings(location: Location) -> list[Location]:
    """The usable copies of the same data set in the folders beside `location.root`, itself included, sorted.

    Two editions of the competition that lie in one folder are found so.
    """
    source = source_of(location.dataset)
    folders = {location.root, *_children(location.root.parent)}
    found = [
        _location(location.dataset, folder, location.origin)
        for folder in sorted(folders)
        if folder == location.root or _is_root(folder, source)
    ]
    return [one for one in found if one.root == location.root or not _gap(one)]


def _need_known(datasets: Sequence[str]) -> None:
    if not datasets:
        raise ValueError(f"unknown data set (none given); known: {', '.join(SOURCES)}")
    for name in datasets:
        source_of(name)


def _present(dataset: str, data_dir: str | Path | None) -> Location | None:
    """A copy that is there already: where the user said (else `DataNotFound`) or in a usual place."""
    for told, origin in ((data_dir, "argument"), (os.environ.get("DLIA_DATA"), "DLIA_DATA")):
        if told:
            return _told(dataset, Path(told).expanduser(), origin)
    source = source_of(dataset)
    for folder, origin in _usual_places(source):
        if root := _descend(folder, source):
            return _location(dataset, root, origin)
        if missing := _half_there(folder, source) or _instead(folder, source):
            log.warning("%s looks like %s but is passed over: %s", folder, dataset, missing)
    return None


def _made(datasets: Sequence[str], *, download: bool, phantom_dir: str | Path | None) -> Location:
    """A download of the first data set that can be had so, if asked for, else the phantom of the first."""
    if (download or os.environ.get("DLIA_DOWNLOAD") == "1") and not on_kaggle():
        wanted = next(
            (name for name in datasets if source_of(name).handle or source_of(name).fetch),
            datasets[0],
        )
        if fetch := source_of(wanted).fetch:
            return _location(wanted, fetch(), "medmnist")
        return _location(wanted, _download(wanted), "kagglehub")
    log.warning(
        "no real %s data found: using SYNTHETIC phantom images (see data/README.md)", datasets[0]
    )
    return _location(datasets[0], _phantom(datasets[0], phantom_dir), "phantom")


def _gap(location: Location) -> str:
    try:
        return source_of(location.dataset).gap(location.root)
    except BadData as error:
        return str(error)


def _location(dataset: str, root: Path, origin: str) -> Location:
    # A phantom stays marked however it was found: by argument, environment or as a Kaggle data set.
    synthetic = any((folder / phantom.MARKER).is_file() for folder in (root, root.parent))
    return Location(dataset, root, origin, synthetic)


def _told(dataset: str, folder: Path, origin: str) -> Location:
    """The location inside a folder that the user named, or an error: never another place."""
    what = "data_dir" if origin == "argument" else "the environment variable DLIA_DATA"
    source = source_of(dataset)
    if not folder.is_dir():
        raise DataNotFound(
            f"{what} = {str(folder)!r} is not a folder; name the folder that holds {dataset}'s "
            f"{_shown(source)} (at most {MAX_DEPTH} levels below it)"
        )
    if root := _descend(folder, source):
        return _location(dataset, root, origin)
    if missing := _half_there(folder, source):
        raise DataNotFound(
            f"{what} = {str(folder)!r} looks like {dataset} but is not complete: {missing}. "
            "Unpack the whole archive again (see data/README.md)"
        )
    if nearly := _instead(folder, source):
        raise DataNotFound(f"{what} = {str(folder)!r} does not hold {dataset}: {nearly}")
    for parent in list(folder.resolve().parents)[:2]:
        if _is_root(parent, source):
            raise DataNotFound(
                f"{what} = {str(folder)!r} lies inside {dataset}; name {str(parent)!r} instead"
            )
    raise DataNotFound(
        f"{what} = {str(folder)!r} does not hold {dataset}: no folder in it (down to {MAX_DEPTH} levels) "
        f"has {_shown(source)}. Correct the path, or leave it out to search the usual places. A folder of class "
        "folders works in notebooks 01, 04, 06, 07"
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


def _descend(top: Path, source: Source) -> Path | None:
    """The nearest folder that holds the data set."""
    if not top.is_dir():
        return None
    return next((folder for folder in _folders(top) if _is_root(folder, source)), None)


def _is_root(folder: Path, source: Source) -> bool:
    return any(_holds(folder, signature) for signature in source.signatures)


def _holds(folder: Path, signature: Sequence[str]) -> bool:
    """Whether `folder` has every path of the signature, or one of its alternatives."""
    return all(any((folder / part).exists() for part in parts.split("|")) for parts in signature)


def _shown(source: Source) -> str:
    return "; or ".join(map(_listed, source.signatures))


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(one.replace("|", " or ") for one in parts)


def _half_there(top: Path, source: Source) -> str:
    """Which parts are missing in the first folder that has some of a signature; "" when there is none."""
    for folder in _folders(top) if top.is_dir() else ():
        for signature in source.signatures:
            missing = [parts for parts in signature if not _holds(folder, [parts])]
            # A train/ and a test/ alone tell nothing: most of the signature must be there, or its first part.
            if missing and (signature[0] not in missing or 2 * len(missing) < len(signature)):
                return f"{folder} has no {_listed(missing)}"
    return ""


def _instead(top: Path, source: Source) -> str:
    """What the first folder has that is nearly the data set; "" when there is none."""
    return next(filter(None, map(source.instead, _folders(top) if top.is_dir() else ())), "")


def mounts(slugs: Sequence[str] = ()) -> Iterator[Path]:
    """Everything attached under Kaggle's input folder, in all its layouts; names in `slugs` first."""
    # Fixed-depth globs: rglob walks every image of every mount, and finds nested duplicates first.
    patterns = [p for s in slugs for p in (s, f"datasets/*/{s}", f"datasets/organizations/*/{s}")]
    patterns += [
        "*",
        "datasets/*/*",
        "datasets/organizations/*/*",
        "competitions/*",
        "notebooks/*/*",
    ]
    layouts = {"datasets", "competitions", "notebooks", "models", "organizations"}
    seen: set[Path] = set()
    top = kaggle_root() / "input"
    for pattern in patterns if top.is_dir() else ():
        for mount in sorted(top.glob(pattern)):
            if mount not in seen and mount.name not in layouts:
                seen.add(mount)
                yield mount


def _usual_places(source: Source) -> Iterator[tuple[Path, str]]:
    for mount in mounts(source.slugs):
        yield mount, "kaggle"
    yield Path(__file__).resolve().parents[1] / "data", "data/"
    yield from source.places


def _download(dataset: str) -> Path:
    handle = SOURCES[dataset].handle
    if not handle:
        raise DataNotFound(
            f"kagglehub has no data set {dataset}: download it from the competition's own page, unpack it "
            "and name its folder (see data/README.md)"
        )
    try:
        import kagglehub
    except ImportError as error:
        raise DataNotFound(
            f"downloading {handle} needs kagglehub: python -m pip install kagglehub"
        ) from error
    folder = Path(kagglehub.dataset_download(handle))
    if root := _descend(folder, SOURCES[dataset]):
        return root
    raise DataNotFound(
        f"kagglehub put {handle} into {folder}, but {_shown(SOURCES[dataset])} are not there"
    )


def _phantom(dataset: str, phantom_dir: str | Path | None) -> Path:
    """Write the phantom once: one left half-written is never used, and two processes do not collide."""
    folder = (
        Path(phantom_dir)
        if phantom_dir
        else cache_root() / "phantom" / f"{dataset}-{phantom.VERSION}"
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not (folder / phantom.MARKER).is_file():
            for left_over in folder.parent.glob(f"{folder.name}.part-*"):
                shutil.rmtree(left_over)
            part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
            source_of(dataset).write_phantom(part)
            if folder.is_dir():
                shutil.rmtree(folder)
            os.replace(part, folder)
    return _descend(folder, source_of(dataset)) or folder
