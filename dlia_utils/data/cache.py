"""Decode every image once into a grey uint8 memory map, which every epoch reads."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from PIL import Image, ImageFile

from .. import files
from ..progress import Bar
from . import datasets, medmnist, sources
from .datasets import Dataset
from .tables import SHOWN, BadData, BadImage, open_image, orientation, shapes_of, upright_shape

log = logging.getLogger("dlia_utils")

VERSION = 2  # Raise it when decoding changes: old caches are then not read any more.
MAX_MISSING = 0.25  # A truncated image that lacks more of its rows than this is refused.
_TO = Image.Transpose
TURNS = dict(enumerate((_TO.FLIP_LEFT_RIGHT, _TO.ROTATE_180, _TO.FLIP_TOP_BOTTOM), 2))
TURNS |= dict(enumerate((_TO.TRANSPOSE, _TO.ROTATE_270, _TO.TRANSVERSE, _TO.ROTATE_90), 5))


@dataclass(frozen=True)
class ImageCache:
    """Decoded images uint8 [N,S,S] in the manifest's order; `truncated`: cut short but used.

    `shapes` int32 [N,2] holds the height and width of every original file, upright; `flat`: the
    files that show one grey value only.
    """

    images: np.memmap
    size: int
    key: str
    path: Path
    truncated: tuple[str, ...]
    shapes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    fit: str = "squash"
    flat: tuple[str, ...] = ()

    def batch(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Images of `rows` as float32 [n,1,S,S] in [0,1]."""
        pixels = np.asarray(self.images[np.asarray(rows, dtype=np.int64)])
        return torch.from_numpy(pixels).unsqueeze(1).float().div_(255)

    def scale(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
        """(sx, sy) float64 [n,2]: cached position = position in the upright original x scale."""
        shapes = self.shapes[np.asarray(rows, dtype=np.int64)].tolist()
        inside = [content_size(*shape, self.size, self.fit) for shape in shapes]
        scale = np.array(inside, dtype=np.float64) / np.array(shapes)
        return scale.reshape(-1, 2)[:, ::-1]

    def __reduce__(self) -> tuple:
        # A pickled memmap (workers under spawn) would carry all its pixels: send its path instead.
        return _open, (self.path,)


def build(
    dataset: Dataset,
    *,
    size: int,
    fit: str = "squash",
    root: str | Path | None = None,
    progress: bool = True,
) -> ImageCache:
    """Decode `dataset` once to grey uint8 [N,S,S], or reopen what an earlier call decoded.

    `fit="squash"` fills the square (aspect not kept, as the pneumonia study did); `fit="pad"`
    scales the long side to `size`: the image lies at the top left, the rest is 0. Bilinear with
    antialiasing. The cache lies in `root` (default `sources.cache_root()`), named by a hash of the
    files' paths, lengths and times, the size and the fit. Two processes build it once; a killed
    build leaves nothing that is taken for complete. Errors: `BadData` listing every unusable file,
    as a table in its attribute `problems` too; `OSError` for a disk that has no room.
    """
    if size < 8 or fit not in ("squash", "pad"):
        raise ValueError(f"size is {size}, fit is {fit!r}; at least 8 pixels, squash or pad")
    key = _key(dataset, size, fit)
    folder = Path(root or sources.cache_root()) / "images" / f"{dataset.name}-{size}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not ((folder / "meta.json").is_file() and (folder / "shapes.npy").is_file()):
            for left_over in folder.glob(".*.tmp*"):  # of a killed process: we hold the lock
                left_over.unlink()
            _refuse(datasets.check(dataset))
            with files.atomic_path(folder / "images.npy") as temporary:
                notes, unusable = _decode_all(temporary, dataset, size, fit, progress=progress)
                _refuse(unusable)
            with files.atomic_path(folder / "shapes.npy") as temporary:
                np.save(temporary, shapes(dataset))
            meta = {"key": key, "size": size, "fit": fit} | notes
            files.write_json(meta, folder / "meta.json")  # completes the cache
    cached = _open(folder)
    for text, paths in (
        ("%d truncated images are used, their missing rows flat: %s", cached.truncated),
        ("%d images are used that show one grey value only: look at %s", cached.flat),
    ):
        if paths:
            log.warning(text, len(paths), ", ".join(paths[:SHOWN]))
    return cached


def shapes(dataset: Dataset) -> np.ndarray:
    """Height and width int32 [N,2] of each image, upright, from the headers."""
    if dataset.archive:
        first = next(medmnist.images(dataset.archive, dataset.manifest["path"]))[1]
        return np.full((len(dataset.manifest), 2), len(first), np.int32)
    return np.array(shapes_of(dataset.root, dataset.manifest["path"]), np.int32).reshape(-1, 2)


def content_size(height: int, width: int, size: int, fit: str) -> tuple[int, int]:
    """Height and width that an image takes up in the square of `size` pixels."""
    if fit == "squash":
        return size, size
    ratio = size / max(height, width)
    return max(round(height * ratio), 1), max(round(width * ratio), 1)


def _key(dataset: Dataset, size: int, fit: str) -> str:
    # "squash" is left out: it was the only way once, and those caches stay good.
    digest = hashlib.sha256(f"{VERSION} {size}{'' if fit == 'squash' else f' {fit}'}".encode())
    try:
        for path, length in datasets.lengths(dataset):
            time = 0 if dataset.archive else os.stat(dataset.root / path).st_mtime_ns
            digest.update(f"\n{path} {length} {time}".encode())
    except OSError:
        _refuse(datasets.check(dataset))
        raise
    return digest.hexdigest()[:20]


def _open(folder: Path) -> ImageCache:
    meta = files.read_json(folder / "meta.json")
    images, sides = np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "shapes.npy")
    known = (meta["size"], meta["key"], folder, tuple(meta["truncated"]), sides)
    return ImageCache(images, *known, meta["fit"], tuple(meta["flat"]))


def _decode_all(
    target: Path, dataset: Dataset, size: int, fit: str, *, progress: bool
) -> tuple[dict[str, list[str]], pd.DataFrame]:
    """Decode into a new .npy file; returns lists of odd files that are used, and the unusable."""
    paths, flat, truncated, unusable = list(dataset.manifest["path"]), [], [], []
    images = _new_file(target, (len(paths), size, size))
    bar = dict(desc=f"decoding to {size} px", total=len(paths), disable=not progress)

    def fill(row: int, image: Image.Image) -> None:
        images[row], one_grey = _fitted(image, size, fit)
        if one_grey:
            flat.append(paths[row])

    def decode(row: int, truncated: bool = False) -> str:
        """Fill one row; returns what is wrong with the file."""
        try:
            with _opened(dataset.root / paths[row], size, truncated=truncated) as image:
                fill(row, image)
        except BadImage as error:
            return str(error)
        except Exception as error:  # decoders raise of every kind
            return f"cannot be decoded ({error or type(error).__name__})"
        return ""

    if dataset.archive:
        row_of = {path: row for row, path in enumerate(paths)}
        for path, pixels in Bar(medmnist.images(dataset.archive, paths), **bar):
            fill(row_of[path], Image.fromarray(pixels))
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(Bar(pool.map(decode, range(len(paths))), **bar))
        # Pillow's switch for it is global, hence one file at a time, after the threads.
        for row, problem in enumerate(found):
            if "truncated" in problem.lower() and not (problem := decode(row, truncated=True)):
                truncated.append(paths[row])
            unusable += [(paths[row], problem)] if problem else []
    images.flush()
    notes = {"truncated": truncated, "flat": sorted(flat)}
    return notes, pd.DataFrame(unusable, columns=["path", "problem"])


def _new_file(target: Path, shape: tuple[int, ...]) -> np.memmap:
    """A mapped .npy file whose room on the disk is claimed: without it, Linux kills who writes."""
    try:
        images = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape)
        _claim(target, images)
    except OSError as error:
        if error.errno not in files.FULL:
            raise
        text = f"no space left in {target.parent}: the decoded images need {np.prod(shape):,} "
        text += "bytes there; make room, or let DLIA_CACHE name a folder on another disk"
        raise files.NoSpace(text) from error
    return images


def _claim(target: Path, images: np.memmap) -> None:
    with target.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), images.offset, images.size)
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", 0) in files.FULL:
                raise
            file.seek(images.offset)  # a system or a disk that cannot claim room: fill it
            for image in images:
                file.write(bytes(image.size))


@contextlib.contextmanager
def _opened(path: Path, size: int, *, truncated: bool) -> Iterator[Image.Image]:
    """An image to decode; with `truncated` one that ends too early, its missing rows flat."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = before or truncated
    try:
        with open_image(path, whole=not truncated) as image:
            if truncated:
                varied = np.flatnonzero(np.ptp(np.asarray(image.convert("L")), axis=1))
                missing = 1 - (varied[-1] + 1) / image.height if len(varied) else 1.0
                if missing >= MAX_MISSING:
                    raise BadImage(f"truncated: {missing:.0%} of its rows are missing")
            else:
                # JPEG decodes at 1/2, 1/4 or 1/8 cheaply: keep twice the pixels for antialiasing.
                image.draft("L", (2 * size, 2 * size))
            yield image
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _fitted(image: Image.Image, size: int, fit: str) -> tuple[np.ndarray, bool]:
    """The image upright and grey, top left in a black square; whether it shows one value only."""
    turn = orientation(image)  # Boxes were drawn on the upright image.
    height, width = content_size(*upright_shape(image), size, fit)
    grey = image.convert("L")
    grey = grey.transpose(TURNS[turn]) if turn > 1 else grey
    low, high = grey.getextrema()
    square = np.zeros((size, size), np.uint8)
    square[:height, :width] = grey.resize((width, height), Image.Resampling.BILINEAR)
    return square, low == high


def _refuse(problems: pd.DataFrame) -> None:
    if len(problems):  # as a table too, for a caller who may do without these files
        raise BadData(datasets.problem_text(problems), problems)
