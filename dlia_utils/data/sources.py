"""Find a data set: argument, DLIA_DATA, Kaggle mounts, data/, a download, else the phantom."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from filelock import FileLock

from . import medmnist, own_data, phantom, readers
from .tables import BadData, DataNotFound

log = logging.getLogger("dlia_utils")

REPOSITORY = Path(__file__).resolve().parents[2]
KAGGLE = Path("/kaggle")  # what Kaggle mounts things under
MAX_DEPTH = 3  # How far below a mount or an argument the data set's own folder may lie.


@dataclass(frozen=True)
class Location:
    """Where a data set lies: `root` is the folder that holds its published tree.

    `kind` is "published", or the reader's own "folder" of class folders or "boxes", with `options`
    for the reader.
    """

    dataset: str
    root: Path
    origin: str
    synthetic: bool
    kind: str = "published"
    options: dict = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Source:
    """How a data set is read and recognised, where to get it, and its synthetic stand-in, if any.

    `read` turns its folder into the fields of a `Dataset`. `trees` are those that it is published
    in: paths that must exist, the most telling first; "a|b": either. `handle` is kagglehub's
    "owner/slug", `mount` another name of a Kaggle mount.
    """

    read: Callable[..., dict]
    trees: tuple[tuple[str, ...], ...]
    write_phantom: Callable[[Path], Path] | None = None
    handle: str = ""
    mount: str = ""


_PNEUMONIA = ("train/NORMAL", "train/PNEUMONIA", "test/NORMAL", "test/PNEUMONIA")
_DLIA = (readers.DLIA_MAPPING, readers.DLIA_TRAIN, "train|train_images", "test|test_images")
_FRAC = ("images/Fractured|images/All_Images", readers.FRAC_TABLE, readers.FRAC_BOXES)
_FRAC += tuple(readers.FRAC_SPLITS.values())
_NINJA = tuple(f"{one}/{kind}" for one in readers.NINJA_FOLDERS for kind in ("ann", "img"))
_COVID = tuple(
    "|".join(f"{split}/{one}" for one in (name, name.lower(), name.title(), name.upper()))
    for name in readers.COVID_CLASSES[::-1]
    for split in ("train", "test")
)
_KERMANY, _FRACTURES = "paultimothymooney/chest-xray-pneumonia", "vuppalaadithyasriharsha/fracatlas"
_TB = "tawsifurrahman/tuberculosis-tb-chest-xray-dataset"
_CHOWDHURY = "tawsifurrahman/covid19-radiography-database"
_EDITION_A, _ORIGINAL = "m-2-big-data-dlia-project-2025-clean-dataset", "fracatlas-original-dataset"
# The TB Chest Radiography Database, Rahman et al. 2020: no split, no patients.
_tuberculosis = partial(readers.class_folders, classes=readers.TUBERCULOSIS_CLASSES)
_NIH, _TUBERCULOSIS = (readers.NIH_BOXES,), ("Tuberculosis", "Normal")
SOURCES: dict[str, Source] = {
    "pneumonia": Source(readers.pneumonia, (_PNEUMONIA,), phantom.write_pneumonia, _KERMANY),
    "nih": Source(readers.nih, (_NIH,), phantom.write_nih, "nih-chest-xrays/data"),
    "dlia": Source(readers.dlia, (_DLIA,), phantom.write_competition, mount=_EDITION_A),
    "fracatlas": Source(
        readers.fracatlas, (_FRAC, _NINJA), phantom.write_fracatlas, _FRACTURES, _ORIGINAL
    ),
    "tuberculosis": Source(_tuberculosis, (_TUBERCULOSIS,), phantom.write_tuberculosis, _TB),
    "covid": Source(readers.covid, (("COVID", "Normal"), _COVID), phantom.write_covid, _CHOWDHURY),
}


# Images as published, of each class (of a set of boxes: with a box), by their split
PUBLISHED = {"pneumonia": {"train": (1349, 3883), "test": (234, 390)}, "covid": {"": (10192, 3616)}}
PUBLISHED |= {"fracatlas": {"": (3366, 717)}, "tuberculosis": {"": (3500, 700)}}
PUBLISHED |= {"nih": {"": (880,)}, "dlia": {"train": (735,), "test": (145,)}}


def source_of(dataset: str) -> Source:
    """The row of `dataset` in `SOURCES`, or of a MedMNIST set. `ValueError`: unknown data set."""
    if dataset in SOURCES:
        return SOURCES[dataset]
    if not medmnist.meant(dataset):
        known = f"{', '.join(SOURCES)}, and MedMNIST's {', '.join(medmnist.FLAGS)}"
        raise ValueError(f"unknown data set {dataset!r}; known: {known}")
    tree = ("|".join(medmnist.file_names(dataset)),)
    read, write = partial(medmnist.read, dataset), partial(phantom.write_medmnist, name=dataset)
    return Source(read, (tree,), write)


def on_kaggle() -> bool:
    """True in a Kaggle kernel: the run type is set and the mounts exist."""
    return bool(os.environ.get("KAGGLE_KERNEL_RUN_TYPE")) and (KAGGLE / "input").is_dir()


def cache_root() -> Path:
    """Folder for decoded images and phantoms: `DLIA_CACHE`, Kaggle's scratch disk, ~/.cache."""
    if os.environ.get("DLIA_CACHE"):
        return Path(os.environ["DLIA_CACHE"]).expanduser()
    return KAGGLE / "temp" / "dlia" if on_kaggle() else Path.home() / ".cache" / "dlia_utils"


def find(datasets: str | Sequence[str], data_dir: str | Path | None = None) -> Location:
    """Find a data set by name; of several names the first of which a usable copy is there.

    Where it looks, in order, data/README.md says. Errors: `DataNotFound` when `data_dir` or
    `DLIA_DATA` does not hold it; `ValueError` for an unknown name.

    >>> downloads = Path(tempfile.mkdtemp())
    >>> for folder in SOURCES["pneumonia"].trees[0]:
    ...     (downloads / "chest_xray" / folder).mkdir(parents=True)
    >>> find("pneumonia", downloads).root.name
    'chest_xray'
    """
    names, reasons = [datasets] if isinstance(datasets, str) else list(datasets), []
    for name in names:
        try:
            location = _present(name, data_dir)
            if location and len(names) > 1:
                _need_usable(location)
        except (DataNotFound, BadData) as error:
            if len(names) == 1:
                raise
            reasons.append(f"{name}: {error}")
            log.warning("%s is passed over: %s", name, error)
        else:
            if location:
                return location
    if data_dir or os.environ.get("DLIA_DATA"):
        raise DataNotFound(f"none of {', '.join(names)} can be used:\n" + "\n".join(reasons))
    if os.environ.get("DLIA_DOWNLOAD") == "1" and not on_kaggle():
        known = medmnist.meant(names[0])
        root = medmnist.download(names[0]) if known else _download(names[0])
        return _location(names[0], root, "medmnist" if known else "kagglehub")
    if source_of(names[0]).write_phantom is None:
        raise DataNotFound(f"no {names[0]} found, and it has no synthetic images: name its folder")
    log.warning("no real %s data found: SYNTHETIC images are used (see data/README.md)", names[0])
    return _location(names[0], _phantom(names[0]), "phantom")


def find_own(
    data_dir: str | Path | None, *, kind: str = "folder", options: dict | None = None
) -> Location | None:
    """The reader's own data in `data_dir`: class folders, or (kind "boxes") a table of boxes.

    None when the folder does not look so, or holds a published data set. The folder is not
    searched, and whether all is well with the data is for `datasets.load` to say.

    >>> folder = Path(tempfile.mkdtemp()) / "mine"
    >>> for name in ("flu", "Normal"):
    ...     (folder / name).mkdir(parents=True)
    ...     (folder / name / "1.png").touch()
    >>> find_own(folder).dataset, find_own(folder, kind="boxes")
    ('mine', None)
    """
    folder = Path(os.path.abspath(Path(data_dir or "").expanduser()))
    if not data_dir or not folder.is_dir() or published_in(folder):
        return None
    read = own_data.recognised(folder, kind)
    return None if read is None else own(folder, kind=kind, options=read | (options or {}))


def own(folder: str | Path, *, kind: str = "folder", options: dict | None = None) -> Location:
    """The reader's own `folder` as a location, under its name (a published one gets "-folder").

    >>> own("data/mine").dataset, own("data/covid").dataset
    ('mine', 'covid-folder')
    """
    root = Path(os.path.abspath(Path(folder).expanduser()))  # A link keeps its own name.
    taken = root.name.casefold() in SOURCES or medmnist.meant(root.name.casefold())
    named = _location(root.name + "-folder" * taken or "folder", root, "argument")
    return replace(named, kind=kind, options=dict(options or {}))


def published_in(folder: Path) -> list[str]:
    """Names of the published data sets in `folder` or below it, down to `MAX_DEPTH`."""
    found = []
    for one in _folders(folder):
        found += [name for name, source in SOURCES.items() if _is_root(one, source)]
        found += [path.stem for path in sorted(one.glob("*.npz")) if medmnist.meant(path.stem)]
    return list(dict.fromkeys(found))


def siblings(location: Location) -> list[Location]:
    """The usable copies of the set beside `location.root`, itself included."""
    source, found = source_of(location.dataset), []
    for folder in sorted({location.root, *_children(location.root.parent)}):
        one = _location(location.dataset, folder, location.origin)
        with contextlib.suppress(BadData):
            if folder != location.root and _is_root(folder, source):
                _need_usable(one)
            found += [one] if _is_root(folder, source) else []
    return found


def _need_usable(location: Location) -> None:
    """`BadData` for a set of listed images of which some are missing."""
    if location.dataset in ("nih", "dlia"):
        source_of(location.dataset).read(location.root)


def mounts(slugs: Sequence[str] = ()) -> Iterator[Path]:
    """Everything attached under Kaggle's input folder; names in `slugs` first."""
    # Fixed-depth globs: rglob walks every image of every mount, and finds nested duplicates first.
    patterns = [p for s in slugs for p in (s, f"datasets/*/{s}", f"datasets/organizations/*/{s}")]
    patterns += "* datasets/*/* datasets/organizations/*/* competitions/* notebooks/*/*".split()
    found = [one for pattern in patterns for one in sorted((KAGGLE / "input").glob(pattern))]
    layouts = {"datasets", "competitions", "notebooks", "models", "organizations"}
    yield from dict.fromkeys(one for one in found if one.name not in layouts)


def _present(dataset: str, data_dir: str | Path | None) -> Location | None:
    """A copy that is there: where the user said (else `DataNotFound`) or in a usual place."""
    source = source_of(dataset)
    for told, what, origin in (
        (data_dir, "data_dir", "argument"),
        (os.environ.get("DLIA_DATA"), "the environment variable DLIA_DATA", "DLIA_DATA"),
    ):
        if told:
            folder = Path(told).expanduser()
            if root := _descend(folder, source):
                return _location(dataset, root, origin)
            raise DataNotFound(f"{what} = {told!r} {_why_not(dataset, folder, source)}")
    slugs = [slug for slug in (source.handle.split("/")[-1], source.mount) if slug]
    places = [(mount, "kaggle") for mount in mounts(slugs)]
    above = [Path.cwd(), *list(Path.cwd().parents)[:2]]
    above += [REPOSITORY] if (REPOSITORY / "pyproject.toml").is_file() else []  # not site-packages
    places += [(folder / "data", "data/") for folder in above]
    places += [(medmnist.home(), "~/.medmnist")] if medmnist.meant(dataset) else []
    for folder, origin in places:
        if root := _descend(folder, source):
            return _location(dataset, root, origin)
        if nearly := _nearly(folder, source):
            log.warning("%s looks like %s but is passed over: %s", folder, dataset, nearly)
    return None


def _why_not(dataset: str, folder: Path, source: Source) -> str:
    """What is wrong with a folder that does not hold the data set, and what to do."""
    wanted = "; or ".join(", ".join(tree).replace("|", " or ") for tree in source.trees)
    if not folder.is_dir():
        return f"is not a folder; name the folder that holds {dataset}'s {wanted}"
    if nearly := _nearly(folder, source):
        return f"looks like {dataset} but is not complete: {nearly}"
    for parent in list(folder.resolve().parents)[:2]:
        if _is_root(parent, source):
            return f"lies inside {dataset}; name {str(parent)!r} instead"
    return (
        f"does not hold {dataset}: no folder in it (down to {MAX_DEPTH} levels) has {wanted}. "
        "Correct the path, or leave it out to search the usual places. A folder of class folders "
        "works in notebooks 01, 04, 06, 07"
    )


def _download(dataset: str) -> Path:
    source, by_hand = SOURCES[dataset], "download and unpack it yourself (see data/README.md)"
    if not source.handle:
        raise DataNotFound(f"kagglehub has no data set {dataset}: {by_hand}")
    try:
        import kagglehub
    except ImportError as error:
        raise DataNotFound("kagglehub is missing: python -m pip install kagglehub") from error
    if root := _descend(Path(kagglehub.dataset_download(source.handle)), source):
        return root
    raise DataNotFound(f"kagglehub's {source.handle} does not hold {dataset}: {by_hand}")


def _phantom(dataset: str) -> Path:
    """Write the phantom once: one left half-written is not used, two processes do not collide."""
    folder, source = cache_root() / "phantom" / f"{dataset}-{phantom.VERSION}", source_of(dataset)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not (folder / phantom.MARKER).is_file():
            for left_over in folder.parent.glob(f"{folder.name}.part-*"):
                shutil.rmtree(left_over)
            part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
            source.write_phantom(part)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
    return _descend(folder, source) or folder


def _location(dataset: str, root: Path, origin: str) -> Location:
    # A phantom stays marked however it was found: by argument, environment or as a Kaggle data set.
    synthetic = any((folder / phantom.MARKER).is_file() for folder in (root, root.parent))
    return Location(dataset, root, origin, synthetic)


def _folders(top: Path) -> Iterator[Path]:
    """`top` and the folders below it, nearest first, down to `MAX_DEPTH`; junk folders left out."""
    level = [top] if top.is_dir() else []
    for _ in range(MAX_DEPTH):
        yield from level
        level = [child for folder in level for child in _children(folder)]
    yield from level


def _children(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError:  # A folder that we may not read cannot be the one that the user wants.
        return []
    return [folder / name for name in names if not name.startswith(".") and name != "__MACOSX"]


def _descend(top: Path, source: Source) -> Path | None:
    """The nearest folder that holds the data set."""
    return next((folder for folder in _folders(top) if _is_root(folder, source)), None)


def _is_root(folder: Path, source: Source) -> bool:
    return any(not _missing(folder, tree) for tree in source.trees)


def _missing(folder: Path, tree: Sequence[str]) -> list[str]:
    """The parts of the tree of which `folder` has no alternative."""
    return [one for one in tree if not any((folder / part).exists() for part in one.split("|"))]


def _nearly(top: Path, source: Source) -> str:
    """What the first folder lacks that has some of the data set; "" when there is none."""
    for folder, tree in itertools.product(_folders(top), source.trees):
        missing = _missing(folder, tree)
        # A train/ and a test/ tell nothing: its first part must be there, or most of it.
        if missing and (tree[0] not in missing or 2 * len(missing) < len(tree)):
            lacks = ", ".join(missing).replace("|", " or ")
            return f"{folder} has no {lacks}; {readers.REPAIR}"
    return ""
