"""Decode every image once into a grey uint8 memory map, so that an epoch never waits for JPEG decoding."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from PIL import Image, ImageFile, ImageOps

from .. import files
from ..progress import Bar
from . import datasets, readers, sources
from .datasets import BadData, Dataset

log = logging.getLogger("dlia_utils")

VERSION = 1  # Raise it when decoding changes: old caches are then not read any more.
FITS = ("squash", "pad")
MAX_MISSING = 0.25  # A truncated image that lacks more of its rows than this is refused.


@dataclass(frozen=True)
class ImageCache:
    """Decoded images uint8 [N,S,S] in the manifest's order; `truncated` names files cut short but used.

    `shapes` int32 [N,2] holds the height and width of every original file, upright.
    """

    images: np.memmap
    size: int
    key: str
    path: Path
    truncated: tuple[str, ...]
    shapes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    fit: str = "squash"

    def batch(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Images of `rows` as float32 [n,1,S,S] in [0,1]."""
        pixels = np.asarray(self.images[np.asarray(rows, dtype=np.int64)])
        return torch.from_numpy(pixels).unsqueeze(1).float().div_(255)

    def scale(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
        """(sx, sy) float64 [n,2] of `rows`: cached position = position in the upright original x scale."""
        shapes = self.shapes[np.asarray(rows, dtype=np.int64)].astype(np.int64).reshape(-1, 2)
        content = [
            _content(height, width, self.size, self.fit) for height, width in shapes.tolist()
        ]
        return np.array(content, dtype=np.float64).reshape(-1, 2)[:, ::-1] / shapes[:, ::-1]

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
    """Decode `dataset` once to grey uint8 of `size` x `size` pixels, or reopen what an earlier call decoded.

    `fit="squash"` fills the square (aspect not kept, as the pneumonia study did); `fit="pad"` scales the long
    side to `size` and keeps the aspect: the image lies at the top left, the rest is 0. Bilinear with
    antialiasing. The cache lies in `root` (default `sources.cache_root()`); its key is a hash of the
    manifest's paths, the files' lengths and times, the size and the fit. Two processes build it once; a
    killed build leaves nothing that is taken for complete. Errors: `BadData` listing every unusable file (as a table
    in its attribute `problems`); `ValueError` for the size or the fit.
    """
    if size < 8:
        raise ValueError(f"size is {size} pixels; it must be at least 8")
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; it must be one of {', '.join(FITS)}")
    key = _key(dataset, size, fit)
    folder = Path(root or sources.cache_root()) / "images" / f"{dataset.name}-{size}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "meta.json").is_file():
            _fill(folder, dataset, size, key, fit, progress=progress)
        if not (folder / "shapes.npy").is_file():  # Also: a cache from before the shapes were kept.
            _write_shapes(folder, dataset)
    cached = _open(folder)
    if cached.truncated:
        log.warning(
            "%d truncated images are used, their missing rows flat: %s",
            len(cached.truncated),
            ", ".join(cached.truncated[: datasets.SHOWN]),
        )
    return cached


def examine(dataset: Dataset, *, progress: bool = True) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Decode every file as `build` would and keep nothing: all unusable files (path, problem), and those cut short."""
    problems = datasets.check(dataset)
    rest = dataset.manifest[~dataset.manifest["path"].isin(problems["path"])]
    with tempfile.TemporaryDirectory() as scratch:
        target, readable = Path(scratch) / "images.npy", replace(dataset, manifest=rest)
        truncated, unusable = _decode_all(target, readable, 8, "squash", progress=progress)
    return pd.concat([problems, pd.DataFrame(unusable, columns=list(problems.columns))]), tuple(
        truncated
    )


def _key(dataset: Dataset, size: int, fit: str) -> str:
    # "squash" is left out: it was the only way once, and those caches stay good.
    digest = hashlib.sha256(f"{VERSION} {size}{'' if fit == 'squash' else f' {fit}'}".encode())
    lost = []
    for path in dataset.manifest["path"]:
        try:
            stat = os.stat(dataset.root / path)
        except OSError as error:
            lost.append((path, f"cannot be read ({error.strerror})"))
        else:
            digest.update(f"\n{path} {stat.st_size} {stat.st_mtime_ns}".encode())
    _refuse(lost)
    return digest.hexdigest()[:20]


def _open(folder: Path) -> ImageCache:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    images, shapes = np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "shapes.npy")
    fit = meta.get("fit", "squash")
    return ImageCache(
        images, meta["size"], meta["key"], folder, tuple(meta["truncated"]), shapes, fit
    )


def _content(height: int, width: int, size: int, fit: str) -> tuple[int, int]:
    """Height and width that an image takes up in the square of `size` pixels."""
    if fit == "squash":
        return size, size
    ratio = size / max(height, width)
    return max(round(height * ratio), 1), max(round(width * ratio), 1)


def _write_shapes(folder: Path, dataset: Dataset) -> None:
    """Write shapes.npy: height and width of every file, from its header."""

    def shape(path: str) -> tuple[int, int]:
        with Image.open(dataset.root / path) as image:
            return readers.upright_shape(image)

    with ThreadPoolExecutor(8) as pool:
        shapes = np.array(list(pool.map(shape, dataset.manifest["path"])), dtype=np.int32).reshape(
            -1, 2
        )
    with files.atomic_path(folder / "shapes.npy") as temporary:
        np.save(temporary, shapes)


def _fill(folder: Path, dataset: Dataset, size: int, key: str, fit: str, *, progress: bool) -> None:
    """Write images.npy, then meta.json, which completes the cache. The caller holds the folder's lock."""
    for left_over in folder.glob(
        ".*.tmp*"
    ):  # Of a killed process: under the lock nobody writes them.
        left_over.unlink()
    _refuse(list(datasets.check(dataset).itertuples(index=False, name=None)))
    with files.atomic_path(folder / "images.npy") as temporary:
        truncated, unusable = _decode_all(temporary, dataset, size, fit, progress=progress)
        _refuse(unusable)
    meta = {"key": key, "size": size, "fit": fit, "truncated": truncated}
    files.write_json(meta, folder / "meta.json")


def _decode_all(
    target: Path, dataset: Dataset, size: int, fit: str, *, progress: bool
) -> tuple[list[str], list[tuple[str, str]]]:
    """Decode into a new .npy file; returns the files cut short but used, and (path, problem) of the unusable."""
    paths = list(dataset.manifest["path"])
    images = np.lib.format.open_memmap(
        target, mode="w+", dtype=np.uint8, shape=(len(paths), size, size)
    )

    def decode(row: int) -> int | None:
        """Fill one row; returns it when the file does not decode cleanly."""
        try:
            images[row] = _decode(dataset.root / paths[row], size, fit)
        except (OSError, SyntaxError, ValueError):
            return row
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = Bar(
            pool.map(decode, range(len(paths))),
            desc=f"decoding to {size} px",
            total=len(paths),
            disable=not progress,
        )
        doubtful = [row for row in jobs if row is not None]
    truncated, unusable = [], []
    for row in doubtful:
        try:
            images[row] = _decode_truncated(dataset.root / paths[row], size, fit)
            truncated.append(paths[row])
        except (OSError, SyntaxError, ValueError) as error:
            unusable.append((paths[row], str(error)))
    images.flush()
    return truncated, unusable


def _decode(path: Path, size: int, fit: str) -> np.ndarray:
    with Image.open(path) as image:
        content = _content(*readers.upright_shape(image), size, fit)
        # JPEG decodes at 1/2, 1/4 or 1/8 cheaply: keep at least twice the pixels for the antialiasing.
        image.draft("L", (2 * size, 2 * size))
        return _fitted(image, content, size)


def _decode_truncated(path: Path, size: int, fit: str) -> np.ndarray:
    """Decode a file that ends too early. Rows that the decoder did not reach come out flat: count them.

    The switch is global to Pillow, hence one file at a time, after the threads.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with Image.open(path) as image:
            varied = np.flatnonzero(np.ptp(np.asarray(image.convert("L")), axis=1))
            missing = 1 - (varied[-1] + 1) / image.height if len(varied) else 1.0
            if missing >= MAX_MISSING:
                raise ValueError(f"truncated: {missing:.0%} of its rows are missing")
            return _fitted(image, _content(*readers.upright_shape(image), size, fit), size)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _fitted(image: Image.Image, content: tuple[int, int], size: int) -> np.ndarray:
    """The image upright and grey, `content` (height, width) pixels large, top left in a black square."""
    if readers.orientation(image) > 1:  # Boxes were drawn on the upright image.
        ImageOps.exif_transpose(image, in_place=True)
    square = np.zeros((size, size), np.uint8)
    square[: content[0], : content[1]] = image.convert("L").resize(
        content[::-1], Image.Resampling.BILINEAR
    )
    return square


def _refuse(problems: Sequence[tuple[str, str]]) -> None:
    if problems:
        table = pd.DataFrame(problems, columns=["path", "problem"])
        error = BadData(datasets.problem_text(table))
        error.problems = table  # for a caller who may do without these files
        raise error
