"""Decode every image once into a grey uint8 memory map, so that an epoch never waits for JPEG decoding."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from PIL import Image, ImageFile
from tqdm.auto import tqdm

from . import datasets, files, locate
from .datasets import BadData, Dataset

log = logging.getLogger("dlia_utils")

VERSION = 1  # Raise it when decoding changes: old caches are then not read any more.
MAX_MISSING = 0.25  # A truncated image that lacks more of its rows than this is refused.


@dataclass(frozen=True)
class ImageCache:
    """Decoded images uint8 [N,S,S] in the manifest's order; `truncated` names files cut short but used."""

    images: np.memmap
    size: int
    key: str
    path: Path
    truncated: tuple[str, ...]

    def batch(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Images of `rows` as float32 [n,1,S,S] in [0,1]."""
        pixels = np.asarray(self.images[np.asarray(rows, dtype=np.int64)])
        return torch.from_numpy(pixels).unsqueeze(1).float().div_(255)

    def __reduce__(self) -> tuple:
        # A pickled memmap (workers under spawn) would carry all its pixels: send its path instead.
        return _open, (self.path,)


def build(
    dataset: Dataset, *, size: int, root: str | Path | None = None, progress: bool = True
) -> ImageCache:
    """Decode `dataset` once to grey uint8 of `size` x `size` pixels, or reopen what an earlier call decoded.

    Images are squashed to the square (aspect not kept, as the original study did), bilinear with
    antialiasing. The cache lies in `root` (default `locate.cache_root()`); its key is a hash of the
    manifest's paths, the files' lengths and times, and the size. Two processes build it once; a killed build
    leaves nothing that is taken for complete. Errors: `BadData` listing every unusable file; `ValueError` for
    the size.
    """
    if size < 8:
        raise ValueError(f"size is {size} pixels; it must be at least 8")
    key = _key(dataset, size)
    folder = Path(root or locate.cache_root()) / "images" / f"{dataset.name}-{size}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "meta.json").is_file():
            _fill(folder, dataset, size, key, progress=progress)
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
        truncated, unusable = _decode_all(target, readable, 8, progress=progress)
    return pd.concat([problems, pd.DataFrame(unusable, columns=list(problems.columns))]), tuple(truncated)


def _key(dataset: Dataset, size: int) -> str:
    digest = hashlib.sha256(f"{VERSION} {size}".encode())
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
    images = np.load(folder / "images.npy", mmap_mode="r")
    return ImageCache(images, meta["size"], meta["key"], folder, tuple(meta["truncated"]))


def _fill(folder: Path, dataset: Dataset, size: int, key: str, *, progress: bool) -> None:
    """Write images.npy, then meta.json, which completes the cache. The caller holds the folder's lock."""
    for left_over in folder.glob(".*.tmp*"):  # Of a killed process: under the lock nobody writes them.
        left_over.unlink()
    _refuse(list(datasets.check(dataset).itertuples(index=False, name=None)))
    with files.atomic_path(folder / "images.npy") as temporary:
        truncated, unusable = _decode_all(temporary, dataset, size, progress=progress)
        _refuse(unusable)
    files.write_json({"key": key, "size": size, "truncated": truncated}, folder / "meta.json")


def _decode_all(
    target: Path, dataset: Dataset, size: int, *, progress: bool
) -> tuple[list[str], list[tuple[str, str]]]:
    """Decode into a new .npy file; returns the files cut short but used, and (path, problem) of the unusable."""
    paths = list(dataset.manifest["path"])
    images = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=(len(paths), size, size))

    def decode(row: int) -> int | None:
        """Fill one row; returns it when the file does not decode cleanly."""
        try:
            images[row] = _decode(dataset.root / paths[row], size)
        except (OSError, SyntaxError, ValueError):
            return row
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = tqdm(
            pool.map(decode, range(len(paths))),
            desc=f"decoding to {size} px",
            total=len(paths),
            disable=not progress,
        )
        doubtful = [row for row in jobs if row is not None]
    truncated, unusable = [], []
    for row in doubtful:
        try:
            images[row] = _decode_truncated(dataset.root / paths[row], size)
            truncated.append(paths[row])
        except (OSError, SyntaxError, ValueError) as error:
            unusable.append((paths[row], str(error)))
    images.flush()
    return truncated, unusable


def _decode(path: Path, size: int) -> np.ndarray:
    with Image.open(path) as image:
        # JPEG decodes at 1/2, 1/4 or 1/8 cheaply: keep at least twice the pixels for the antialiasing.
        image.draft("L", (2 * size, 2 * size))
        return _squash(image, size)


def _decode_truncated(path: Path, size: int) -> np.ndarray:
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
            return _squash(image, size)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _squash(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.convert("L").resize((size, size), Image.Resampling.BILINEAR))


def _refuse(problems: Sequence[tuple[str, str]]) -> None:
    if problems:
        raise BadData(datasets.problem_text(pd.DataFrame(problems, columns=["path", "problem"])))
