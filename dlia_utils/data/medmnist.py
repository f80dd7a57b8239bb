"""MedMNIST (Yang et al., Scientific Data 2023): every 2-D set, in all four sizes, as a data set of the suite.

A set is named as its file is, without the ending: `pneumoniamnist` (28 px), `pneumoniamnist_64`. The file is unpacked
once into PNG files, so that nothing else has to know of .npz: checks, audit, cache and splits read images by path.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
from filelock import FileLock
from PIL import Image

from ..progress import Bar
from .tables import BadData, DataNotFound, Tables, ignored_table, manifest_table, refuse

log = logging.getLogger("dlia_utils")

VERSION = 1  # Raise it when the unpacked files change: folders of an older version are then not read any more.
SIZES = (28, 64, 128, 224)
SPLITS = ("train", "val", "test")
LABELS = "labels.csv"
BLOCK = 256  # images read at a time: the largest file holds 13 GB of pixels
VOLUMES = (
    "organmnist3d",
    "nodulemnist3d",
    "adrenalmnist3d",
    "fracturemnist3d",
    "vesselmnist3d",
    "synapsemnist3d",
)


@dataclass(frozen=True)
class Flag:
    """A published set: names by the number in its file, whether it is in colour, and how labels are written.

    `findings`: the labels are [N,L] with 0 or 1 for each name, else [N,1] with a number. `reversed`: the file's last
    class is the healthy one; the suite's class 1 is the disease, so that missed disease can be told from false alarm.
    """

    names: tuple[str, ...]
    colour: bool = False
    findings: bool = False
    reversed: bool = False


_ORGANS = Flag(
    (
        "bladder",
        "femur-left",
        "femur-right",
        "heart",
        "kidney-left",
        "kidney-right",
        "liver",
        "lung-left",
        "lung-right",
        "pancreas",
        "spleen",
    )
)
FLAGS: dict[str, Flag] = {
    "pathmnist": Flag(
        (
            "adipose",
            "background",
            "debris",
            "lymphocytes",
            "mucus",
            "smooth muscle",
            "normal colon mucosa",
            "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium",
        ),
        colour=True,
    ),
    "chestmnist": Flag(
        (
            "atelectasis",
            "cardiomegaly",
            "effusion",
            "infiltration",
            "mass",
            "nodule",
            "pneumonia",
            "pneumothorax",
            "consolidation",
            "edema",
            "emphysema",
            "fibrosis",
            "pleural",
            "hernia",
        ),
        findings=True,
    ),
    "dermamnist": Flag(
        (
            "actinic keratoses and intraepithelial carcinoma",
            "basal cell carcinoma",
            "benign keratosis-like lesions",
            "dermatofibroma",
            "melanoma",
            "melanocytic nevi",
            "vascular lesions",
        ),
        colour=True,
    ),
    "octmnist": Flag(
        ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal")
    ),
    "pneumoniamnist": Flag(("normal", "pneumonia")),
    "retinamnist": Flag(("grade 0", "grade 1", "grade 2", "grade 3", "grade 4"), colour=True),
    "breastmnist": Flag(("malignant", "normal or benign"), reversed=True),
    "bloodmnist": Flag(
        (
            "basophil",
            "eosinophil",
            "erythroblast",
            "immature granulocytes",
            "lymphocyte",
            "monocyte",
            "neutrophil",
            "platelet",
        ),
        colour=True,
    ),
    "tissuemnist": Flag(
        (
            "collecting duct, connecting tubule",
            "distal convoluted tubule",
            "glomerular endothelial cells",
            "interstitial endothelial cells",
            "leukocytes",
            "podocytes",
            "proximal tubule segments",
            "thick ascending limb",
        )
    ),
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
}


@dataclass(frozen=True)
class Choice:
    """What the name of a data set asks for: a set, at least `size` pixels, and perhaps one finding of many."""

    flag: str
    size: int
    finding: str = ""


def parse(name: str) -> Choice:
    """Read FLAG, FLAG_SIZE or FLAG_SIZE-FINDING; without a size it is 28, as the files are named.

    Errors: `ValueError` for an unknown set, one of volumes, and an unknown size or finding, with what there is.

    >>> parse("breastmnist_128"), parse("chestmnist-edema")
    (Choice(flag='breastmnist', size=128, finding=''), Choice(flag='chestmnist', size=28, finding='edema'))
    """
    stem, dash, finding = name.partition("-")
    flag, underscore, size = stem.partition("_")
    if flag in VOLUMES:
        raise ValueError(
            f"{flag} holds volumes, and the suite reads images. Name a 2-D set: {', '.join(FLAGS)}"
        )
    if flag not in FLAGS:
        raise ValueError(f"unknown MedMNIST set {flag!r}. Name a 2-D set: {', '.join(FLAGS)}")
    if underscore and size not in map(str, SIZES[1:]):
        names = ", ".join(file_name(flag, one).removesuffix(".npz") for one in SIZES)
        raise ValueError(f"MedMNIST has no {stem!r}; the sizes are {names}")
    known = FLAGS[flag].names if FLAGS[flag].findings else ()
    if dash and finding not in known:
        there = f"name one of {', '.join(known)}" if known else f"name the set {stem!r} as a whole"
        raise ValueError(f"{flag} has no finding {finding!r}: {there}")
    return Choice(flag, int(size or SIZES[0]), finding)


def meant(name: str) -> bool:
    """Whether a name is one of MedMNIST's, right or wrong.

    >>> meant("pneumoniamnist_64"), meant("nodulemnist3d"), meant("pneumonia")
    (True, True, False)
    """
    return re.match(r"[a-z]+mnist(3d)?(?![a-z])", name) is not None


def file_name(flag: str, size: int) -> str:
    """The published name of a file.

    >>> file_name("octmnist", 28), file_name("octmnist", 224)
    ('octmnist.npz', 'octmnist_224.npz')
    """
    return f"{flag}.npz" if size == SIZES[0] else f"{flag}_{size}.npz"


def file_names(name: str) -> tuple[str, ...]:
    """The files that serve a data set's name, the best first: larger images can be made smaller, not the reverse.

    >>> file_names("octmnist_128")
    ('octmnist_128.npz', 'octmnist_224.npz')
    """
    choice = parse(name)
    return tuple(file_name(choice.flag, size) for size in SIZES if size >= choice.size)


def instead(name: str, folder: Path) -> str:
    """What a folder without the data set holds of it in smaller sizes, and the fix; "" when nothing."""
    choice = parse(name)
    smaller = [size for size in SIZES if size < choice.size]
    there = [size for size in smaller if (folder / file_name(choice.flag, size)).is_file()]
    if not there:
        return ""
    names = [file_name(choice.flag, size) for size in there]
    other = names[-1].removesuffix(".npz") + (f"-{choice.finding}" if choice.finding else "")
    return (
        f"{folder} has {' and '.join(names)}, but {name} needs {choice.size} px or more. "
        f"Put {file_name(choice.flag, choice.size)} there, or name the data set {other!r}"
    )


def home() -> Path:
    """The folder in which the package `medmnist` keeps its files."""
    return Path.home() / ".medmnist"


def download(name: str) -> Path:
    """Let the package `medmnist` download the file of `name` (it checks the MD5); returns `home()`.

    Errors: `DataNotFound` without the package or without internet.
    """
    choice = parse(name)
    file = file_name(choice.flag, choice.size)
    try:
        import medmnist
    except ImportError as error:
        raise DataNotFound(
            f"downloading {file} needs its package: python -m pip install medmnist"
        ) from error
    home().mkdir(parents=True, exist_ok=True)
    # Beside its place, then renamed: a download that is cut off leaves no half file that the next run would find.
    with tempfile.TemporaryDirectory(dir=home(), prefix=".part-") as part:
        try:
            published = getattr(medmnist, medmnist.INFO[choice.flag]["python_class"])
            published(split="val", download=True, root=part, size=choice.size)
        except RuntimeError as error:
            raise DataNotFound(
                f"{file} could not be downloaded: look at the internet connection, or put the file (Zenodo 10519652) "
                f"into {home()} yourself"
            ) from error
        os.replace(Path(part) / file, home() / file)
    return home()


# --- the file, unpacked once


def unpack(name: str, root: Path, *, cache: Path) -> Path:
    """Write the images of `root`'s file as PNG into a folder below `cache`, once; returns that folder.

    It holds train/, val/ and test/ with an image each row, as published (colour stays colour), and labels.csv. Its
    name ends in a hash of the check sums within the .npz file: a file with other pixels or labels gets another folder,
    and a copy of the same file finds this one. The folder appears whole or not at all; two processes write it once.
    Errors: `BadData` naming what is wrong with the file, before anything is written where its headers tell.
    """
    choice = parse(name)
    path = next((root / file for file in file_names(name) if (root / file).is_file()), None)
    if path is None:
        raise DataNotFound(instead(name, root) or f"{root} has no {' or '.join(file_names(name))}")
    again = f"Fix: download {path.name} again (see data/README.md)"
    try:
        with zipfile.ZipFile(path) as archive:
            _need_members(archive, path, again)
            folder = cache / "medmnist" / f"{path.stem}-{_key(archive)}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f"{folder.name}.lock")):
                if not folder.is_dir():
                    labels = _checked(archive, path, choice.flag)
                    _write(archive, labels, folder)
    except BadData:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise BadData(f"{path} is damaged or was cut short ({error}). {again}.") from error
    return folder


def _need_members(archive: zipfile.ZipFile, path: Path, again: str) -> None:
    have = archive.namelist()
    if missing := [name for name in _members() if f"{name}.npy" not in have]:
        there = ", ".join(name.removesuffix(".npy") for name in have) or "nothing"
        raise BadData(f"{path} has no array {', '.join(missing)}; it has {there}. {again}.")


def _members() -> list[str]:
    return [f"{split}_{what}" for split in SPLITS for what in ("images", "labels")]


def _key(archive: zipfile.ZipFile) -> str:
    """A hash of the content that costs nothing: the archive's directory holds a check sum of every array."""
    entries = [archive.getinfo(f"{name}.npy") for name in _members()]
    content = [VERSION, *((one.filename, one.CRC, one.file_size) for one in entries)]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _checked(archive: zipfile.ZipFile, path: Path, flag: str) -> dict[str, np.ndarray]:
    """The labels int64 [N,L] of each split, when the headers and the labels are as published; else `BadData`."""
    published, problems, labels = FLAGS[flag], [], {}
    size = next(size for size in SIZES if file_name(flag, size) == path.name)
    columns, highest = (
        (len(published.names), 1) if published.findings else (1, len(published.names) - 1)
    )
    for split in SPLITS:
        with archive.open(f"{split}_images.npy") as file:
            shape, _, kind = _header(file)
        with archive.open(f"{split}_labels.npy") as file:
            label_shape, _, label_kind = _header(file)
        shown = f"{split}_images is {kind} {list(shape)}"
        if len(shape) == 4 and shape[3] not in (1, 3) or len(shape) > 4:
            problems.append(f"  {shown}: volumes, and the suite reads images; name a 2-D set")
        elif kind != np.uint8 or shape[1:] not in ((size, size), (size, size, 3)):
            problems.append(
                f"  {shown}; it must be uint8 [N, {size}, {size}] or [N, {size}, {size}, 3]"
            )
        if label_kind.kind not in "iu" or label_shape[1:] != (columns,):
            shown = f"{split}_labels is {label_kind} {list(label_shape)}"
            problems.append(f"  {shown}; it must be whole numbers [N, {columns}]")
        elif label_shape[0] != shape[0] or not shape[0]:
            problems.append(
                f"  {split} has {shape[0]} images and {label_shape[0]} labels: as many of both, 1 or more"
            )
        else:
            labels[split] = _read(archive, f"{split}_labels").astype(np.int64)
            if labels[split].min() < 0 or labels[split].max() > highest:
                problems.append(f"  {split}_labels has numbers outside 0 to {highest}")
    fix = f"download {path.name} again (see data/README.md), and give it the name of the set that it is"
    refuse(f"{path} is not {flag} of {size} px:", problems, fix)
    return labels


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of an array, from the head of its .npy file."""
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    return read(file)


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _blocks(archive: zipfile.ZipFile, name: str) -> Iterator[np.ndarray]:
    """The images of an array, some at a time: a whole one may be larger than the memory."""
    with archive.open(f"{name}.npy") as file:
        shape, fortran, _ = _header(file)
        if fortran:  # One image is then spread over the whole file.
            yield _read(archive, name)
            return
        for start in range(0, shape[0], BLOCK):
            count = min(BLOCK, shape[0] - start)
            pixels = file.read(count * math.prod(shape[1:]))
            if len(pixels) < count * math.prod(shape[1:]):
                raise EOFError(f"{name} ends at image {start}")
            yield np.frombuffer(pixels, np.uint8).reshape(count, *shape[1:])


def _write(archive: zipfile.ZipFile, labels: dict[str, np.ndarray], folder: Path) -> None:
    """Write all images and labels.csv under another name, then rename. The caller holds the folder's lock."""
    for left_over in folder.parent.glob(f"{folder.name}.part-*"):  # of a killed process
        shutil.rmtree(left_over)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    rows = [(split, number) for split in SPLITS for number in range(len(labels[split]))]
    names = pd.Series([f"{split}/{number:06d}.png" for split, number in rows], name="path")
    try:
        for split in SPLITS:
            (part / split).mkdir()
        _write_images(archive, part, names)
        table = pd.DataFrame(np.concatenate([labels[split] for split in SPLITS])).add_prefix(
            "label_"
        )
        table.insert(0, "path", names)
        table.to_csv(part / LABELS, index=False)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_images(archive: zipfile.ZipFile, part: Path, names: pd.Series) -> None:
    def save(job: tuple[str, np.ndarray]) -> None:
        Image.fromarray(job[1]).save(part / job[0], compress_level=1)

    left = iter(names)
    bar = Bar(desc="unpacking images", total=len(names), delay=2)  # No bar for a moment's work.
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for split in SPLITS:
            for block in _blocks(archive, f"{split}_images"):
                for _ in pool.map(save, [(next(left), image) for image in block]):
                    bar.update()


# --- what is unpacked, as tables


def layout(name: str, root: Path) -> Tables:
    """The unpacked folder `root` (see `unpack`) as tables; the official train, val and test splits stay.

    Classes as published, and an ordinal set (RetinaMNIST) as its grades; BreastMNIST's two change places, so that
    class 1 is the disease. ChestMNIST, where a film may have several findings, becomes two classes: "no finding" and
    "finding", or with a name such as `chestmnist-edema` "no edema" (with other findings or none) and "edema". No
    patients are published: each image counts as one. What a reader must know stands in `split_rule` and in the log.
    Errors: `BadData` when the training split lacks a class.
    """
    choice = parse(name)
    published = FLAGS[choice.flag]
    table = pd.read_csv(root / LABELS)
    raw = table.filter(like="label_").to_numpy()
    if published.findings:
        marked = (
            raw[:, published.names.index(choice.finding)] if choice.finding else raw.max(axis=1)
        )
        what = choice.finding or "finding"
        classes, labels = (f"no {what}", what), marked.astype(np.int64)
    elif published.reversed:
        classes, labels = published.names[::-1], len(published.names) - 1 - raw[:, 0]
    else:
        classes, labels = published.names, raw[:, 0]
    splits = table["path"].str.partition("/")[0]
    if absent := sorted(set(range(len(classes))) - set(labels[splits == "train"].tolist())):
        lost = ", ".join(classes[label] for label in absent)
        raise BadData(
            f"{name} has no training image of {lost}. Fix: download the file again, or name another set"
        )
    rule = _rule(root / table["path"][0], published)
    log.warning("%s: %s", name, rule)
    named = [classes[label] for label in labels]
    columns = (
        table["path"],
        labels,
        named,
        table["path"].str.removesuffix(".png"),
        [""] * len(table),
        splits,
    )
    return Tables(
        manifest_table(list(zip(*columns, strict=True))), classes, ignored_table([]), rule
    )


def _rule(first: Path, published: Flag) -> str:
    """How the splits arose, and what else a reader of the numbers must know."""
    with Image.open(first) as image:
        size, colour = image.width, image.mode == "RGB"
    notes = ["official", f"images of {size} px"]
    if colour:
        notes.append("colour is turned to grey by luminance (ITU-R 601)")
    if published.reversed:
        notes.append(f"classes in reverse order, so that 1 is {published.names[0]}")
    notes.append(
        "patients unknown: intervals take images as independent and are too narrow where they are not"
    )
    return "; ".join(notes)
