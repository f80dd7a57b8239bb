"""MedMNIST (Yang et al., Scientific Data 2023): the 2-D sets in all sizes, from their .npz files.

A set is named as its file is, without the ending: `pneumoniamnist` (28 px), `pneumoniamnist_64`.
"""

from __future__ import annotations

import logging
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from .tables import BadData, DataNotFound, refuse, tables

log = logging.getLogger("dlia_utils")

DAMAGED = (KeyError, zipfile.BadZipFile, zlib.error, EOFError, ValueError)
SIZES = (28, 64, 128, 224)
SPLITS = ("train", "val", "test")
# Names of the classes by the number in the file; ChestMNIST: of its findings.
_ORGANS = "bladder/femur-left/femur-right/heart/kidney-left/kidney-right/liver/lung-left/lung-right"
_CLASSES = f"""
pathmnist: adipose/background/debris/lymphocytes/mucus/smooth muscle/normal colon mucosa/\
cancer-associated stroma/colorectal adenocarcinoma epithelium
chestmnist: atelectasis/cardiomegaly/effusion/infiltration/mass/nodule/pneumonia/pneumothorax/\
consolidation/edema/emphysema/fibrosis/pleural/hernia
dermamnist: actinic keratoses and intraepithelial carcinoma/basal cell carcinoma/benign \
keratosis-like lesions/dermatofibroma/melanoma/melanocytic nevi/vascular lesions
octmnist: choroidal neovascularization/diabetic macular edema/drusen/normal
pneumoniamnist: normal/pneumonia
retinamnist: grade 0/grade 1/grade 2/grade 3/grade 4
breastmnist: malignant/normal or benign
bloodmnist: basophil/eosinophil/erythroblast/immature granulocytes/lymphocyte/monocyte/neutrophil/\
platelet
tissuemnist: collecting duct, connecting tubule/distal convoluted tubule/glomerular endothelial \
cells/interstitial endothelial cells/leukocytes/podocytes/proximal tubule segments/thick ascending \
limb
organamnist: {_ORGANS}/pancreas/spleen
organcmnist: {_ORGANS}/pancreas/spleen
organsmnist: {_ORGANS}/pancreas/spleen
"""
FLAGS = dict(line.split(": ") for line in _CLASSES.strip().splitlines())
FLAGS = {flag: tuple(names.split("/")) for flag, names in FLAGS.items()}


def meant(name: str) -> bool:
    """Whether a name is one of MedMNIST's, right or wrong."""
    return re.match(r"[a-z]+mnist(3d)?(?![a-z])", name) is not None


def parse(name: str) -> tuple[str, int, str]:
    """Set, size (28 if not named) and finding of FLAG, FLAG_SIZE or FLAG_SIZE-FINDING.

    >>> parse("breastmnist_128"), parse("chestmnist-edema")
    (('breastmnist', 128, ''), ('chestmnist', 28, 'edema'))
    """
    stem, _, finding = name.partition("-")
    flag, _, size = stem.partition("_")
    known = ("", *FLAGS["chestmnist"]) if flag == "chestmnist" else ("",)
    if flag not in FLAGS or (size and size not in map(str, SIZES[1:])) or finding not in known:
        how = "a 2-D set, with _64, _128 or _224 behind it if it is not of 28 px"
        text = f"no MedMNIST set {name!r}: name {how}: {', '.join(FLAGS)}; chestmnist-FINDING"
        raise ValueError(text)
    return flag, int(size or SIZES[0]), finding


def file_name(flag: str, size: int) -> str:
    """The published name of a file."""
    return f"{flag}.npz" if size == SIZES[0] else f"{flag}_{size}.npz"


def file_names(name: str) -> list[str]:
    """The files that serve a name, the best first: larger images can be made smaller."""
    flag, asked, _ = parse(name)
    return [file_name(flag, size) for size in SIZES if size >= asked]


def home() -> Path:
    """The folder in which the package `medmnist` keeps its files."""
    return Path.home() / ".medmnist"


def download(name: str) -> Path:
    """Let the package `medmnist` download the file (it checks the MD5); returns `home()`."""
    flag, size, _ = parse(name)
    try:
        import medmnist
    except ImportError as error:
        raise DataNotFound("medmnist is missing: python -m pip install medmnist") from error
    home().mkdir(parents=True, exist_ok=True)
    try:
        published = getattr(medmnist, medmnist.INFO[flag]["python_class"])
        published(split="val", download=True, root=str(home()), size=size)
    except RuntimeError as error:
        fix = f"put {file_name(flag, size)} (Zenodo 10519652) into {home()} yourself"
        raise DataNotFound(f"the download failed, perhaps without internet: {fix}") from error
    return home()


def read(name: str, root: Path) -> dict:
    """The fields of a `Dataset` whose images lie in a .npz file in `root`; its splits are kept.

    BreastMNIST's classes change places, so that class 1 is the disease. ChestMNIST, where an image
    may have several findings, becomes "no finding" and "finding", or e.g. `chestmnist-edema` "no
    edema" and "edema". No patients are published: each image counts as one. Errors: `BadData` when
    the file is not as published.
    """
    flag, _, finding = parse(name)
    path = next((root / file for file in file_names(name) if (root / file).is_file()), None)
    if path is None:
        raise DataNotFound(f"{root} has no {' or '.join(file_names(name))}")
    size = next(size for size in SIZES if file_name(flag, size) == path.name)
    fix = f"download {path.name} again (see data/README.md)"
    chest, labels, problems = flag == "chestmnist", {}, []
    columns, top = (len(FLAGS[flag]), 1) if chest else (1, len(FLAGS[flag]) - 1)
    try:
        with zipfile.ZipFile(path) as archive:
            for split in SPLITS:
                found = np.lib.format.read_array(archive.open(f"{split}_labels.npy"))
                found = found[:, None] if found.ndim == 1 else found  # some copies have [N]
                shape, fortran, kind = _header(archive.open(f"{split}_images.npy"))
                if fortran or kind != np.uint8 or shape[1:] not in ((size, size), (size, size, 3)):
                    text = f"{split}_images is {kind} {list(shape)}, not uint8 of {size} px"
                    problems.append(text)
                if found.shape != (shape[0], columns) or not 0 <= found.max() <= top:
                    text = f"{split}_labels is not [{shape[0]}, {columns}] from 0 to {top}"
                    problems.append(text)
                labels[split] = found.astype(int)
    except DAMAGED as error:
        raise BadData(f"{path} is damaged or not of MedMNIST ({error}). Fix: {fix}.") from error
    refuse(f"{path} is not {flag} of {size} px", problems, fix)
    raw, classes = np.concatenate([labels[split] for split in SPLITS]), FLAGS[flag]
    notes, label = ["official", f"images of {size} px"], raw[:, 0]
    notes += ["colour is turned to grey"] * (len(shape) == 4)
    if chest:
        classes = (f"no {finding or 'finding'}", finding or "finding")
        label = raw[:, FLAGS[flag].index(finding)] if finding else raw.max(1)
    if flag == "breastmnist":
        classes, label = classes[::-1], 1 - label
        notes.append("classes in reverse order, so that 1 is malignant")
    notes.append("patients unknown: intervals take images as independent, and may be too narrow")
    if lost := set(range(len(classes))) - set(label[: len(labels["train"])].tolist()):
        names = ", ".join(classes[one] for one in lost)
        raise BadData(f"{name} has no training image of {names}. Fix: {fix}.")
    log.warning("%s: %s", name, "; ".join(notes))
    places = [(split, f"{split}/{k:06d}") for split in SPLITS for k in range(len(labels[split]))]
    rows = [(p, k, classes[k], p, "", s) for (s, p), k in zip(places, label.tolist(), strict=True)]
    return tables(rows, classes, [], split_rule="; ".join(notes), archive=path)


def images(archive: Path, paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Path and pixels [S,S] or [S,S,3] of `paths`, in the archive's order, one at a time."""
    wanted = set(paths)
    try:
        with zipfile.ZipFile(archive) as opened:
            for split in SPLITS:
                file = opened.open(f"{split}_images.npy")
                shape, _, _ = _header(file)
                for number in range(shape[0]):
                    pixels = file.read(int(np.prod(shape[1:])))
                    if (path := f"{split}/{number:06d}") in wanted:
                        yield path, np.frombuffer(pixels, np.uint8).reshape(shape[1:])
    except DAMAGED as error:
        raise BadData(f"{archive} is damaged ({error}). Fix: download it again.") from error


def sums(archive: Path) -> list[tuple[str, int]]:
    """Name and check sum of each array: what the content of the file is known by."""
    with zipfile.ZipFile(archive) as opened:
        return sorted((one.filename, one.CRC) for one in opened.infolist())


def _header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of an array, from the head of its .npy file."""
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)
