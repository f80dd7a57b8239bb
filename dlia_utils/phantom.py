"""Synthetic films in each data set's own tree, junk included: the default when no real data is there.

They are drawn from physics, not from patients: X-rays pass through simple solids (Beer-Lambert), the detector
counts photons (Poisson) and blurs. Nothing medical can be learnt from them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom
from scipy.special import expit

from . import findings, layouts

VERSION = 2  # Raise it when the pictures change: a phantom written by an older version is then not reused.
MARKER = "SYNTHETIC.txt"
IMAGES = {"train": (96, 144), "val": (8, 8), "test": (24, 40)}
FINDING_IMAGES = {"train": 240, "test": 40}  # of each edition of the competition
LEAKED, TWO_IDS = 4, 3  # edition A: test images that train has too, and test images with two ids

# Linear attenuation in 1/cm near 60 keV: soft tissue, bone, aerated lung.
SOFT, BONE, LUNG = 0.20, 0.55, 0.05
PHOTONS = 12_000  # per detector pixel before the patient
HALF_WIDTH = 17.0  # cm


@dataclass(frozen=True)
class Anatomy:
    """Shape of one patient, the same in all the patient's films; lengths in half widths of the film."""

    width: float
    depth: float  # cm, front to back
    lung: float
    heart: float
    ribs: float
    slope: float
    spine: float
    dome: float
    vessels: int  # seed of the vessel tree

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Anatomy:
        """A random patient."""
        near = rng.normal
        return cls(
            width=float(near(0.95, 0.03)),
            depth=float(np.clip(near(20, 2), 15, 26)),
            lung=float(near(0.345, 0.015)),
            heart=float(np.clip(near(0.27, 0.03), 0.2, 0.36)),
            ribs=float(near(0.165, 0.008)),
            slope=float(near(0.30, 0.05)),
            spine=float(near(0.085, 0.006)),
            dome=float(near(0.50, 0.05)),
            vessels=int(rng.integers(2**31)),
        )


def chest(
    rng: np.random.Generator, *, size: int, pneumonia: bool, anatomy: Anatomy | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One frontal chest film: image float32 [size,size] in [0,1], and mask of its opacities bool [size,size].

    Pose, exposure and noise are drawn alike for both classes; only the opacities, fluid in the air of the
    lungs, tell them apart. `anatomy` makes it another film of the same patient.

    >>> image, lesion = chest(np.random.default_rng(0), size=48, pneumonia=True)
    >>> image.shape, image.dtype.name, bool(lesion.any())
    ((48, 48), 'float32', True)
    """
    anatomy = anatomy or Anatomy.draw(rng)
    x, y = _pose(rng, size)
    air = _lungs(anatomy, x, y)
    fluid = _opacities(rng, air) if pneumonia else np.zeros_like(air)
    aerated = air * (1 - 0.85 * fluid)
    aerated = np.maximum(aerated * _texture(rng, size) - _vessels(anatomy, x, y) * (air > 0), 0)
    return _film(rng, _attenuation(anatomy, x, y, aerated)), (fluid > 0.3) & (air > 1.0)


def chest_with_findings(
    rng: np.random.Generator, names: Sequence[str], *, size: int, anatomy: Anatomy | None = None
) -> tuple[np.ndarray, list[tuple[float, float, float, float]]]:
    """One chest film with the findings `names` (see `findings`): image float32 [size,size], a box for each.

    Corners are x1, y1, x2, y2 in pixels and enclose what the finding changes on the film. Two findings lie
    in different lungs. The same generator gives the same film but for the findings.

    >>> image, boxes = chest_with_findings(np.random.default_rng(0), ["Mass"], size=64)
    >>> image.shape, len(boxes), boxes[0][2] - boxes[0][0] > 6
    ((64, 64), 1, True)
    """
    planting, rng = rng.spawn(2)
    anatomy = anatomy or Anatomy.draw(rng)
    x, y = _pose(rng, size)
    air = _lungs(anatomy, x, y)
    aerated = np.maximum(air * _texture(rng, size) - _vessels(anatomy, x, y) * (air > 0), 0)
    tissue = findings.DEPTH * (SOFT * air - (SOFT - LUNG) * aerated)  # what free air takes the place of
    side = -1 if "Cardiomegaly" in names else int(planting.choice([-1, 1]))
    filled, freed, boxes = np.zeros_like(air), np.zeros_like(air), []
    for name in names:
        change = findings.paint(name, planting, _lung(anatomy, x, y, air, side))
        fluid, gas = np.maximum(change, 0), np.maximum(-change, 0)
        boxes.append(findings.tight_box((SOFT - LUNG) * aerated * fluid - tissue * gas))
        filled, freed = 1 - (1 - filled) * (1 - fluid), np.maximum(freed, gas)
        if name != "Cardiomegaly":
            side = -side
    path = _attenuation(anatomy, x, y, aerated * (1 - filled)) - tissue * freed
    return _film(rng, path), boxes


def bone(
    rng: np.random.Generator, *, height: int, width: int, fractured: bool
) -> tuple[np.ndarray, tuple[float, float, float, float] | None]:
    """A film of a long bone, float32 [height,width]; with a fracture, the box of its gap (x1, y1, x2, y2).

    >>> image, box = bone(np.random.default_rng(0), height=96, width=64, fractured=True)
    >>> image.shape, box is not None
    ((96, 64), True)
    """
    long = max(height, width)
    down, across = np.mgrid[:height, :width].astype(np.float32) + 0.5
    x, y = (2 * across - width) / long, (2 * down - height) / long
    turn = rng.normal(0, 0.2) + (math.pi / 2 if width > height else 0)
    along, side = y * math.cos(turn) + x * math.sin(turn), x * math.cos(turn) - y * math.sin(turn)
    radius = rng.uniform(0.10, 0.14)
    place, tilt, gap = rng.uniform(-0.4, 0.4), rng.uniform(-0.7, 0.7), rng.uniform(0.045, 0.075)
    soft = 7.0 * _tube(side - 0.04, 3.2 * radius)
    slip = rng.choice([-1, 1]) * rng.uniform(0.35, 0.65) * radius
    if fractured:
        side = side - slip * (along > place + tilt * side)  # The lower fragment has slipped aside.
    wide = radius * (1 + 0.9 * np.abs(along) ** 4)
    shell = HALF_WIDTH * 0.6 * (_tube(side, wide) - 0.75 * _tube(side, 0.6 * wide))
    distance = np.abs(along - place - tilt * side)
    shell = shell * (distance > gap / 2) if fractured else shell
    image = _film(rng, SOFT * soft + (BONE - SOFT) * shell)
    near = (distance < gap / 2 + 0.3 * radius) & (np.abs(side) < wide)
    return image, findings.tight_box(near.astype(float)) if fractured else None


def _attenuation(anatomy: Anatomy, x: np.ndarray, y: np.ndarray, aerated: np.ndarray) -> np.ndarray:
    """Total attenuation along each ray; `aerated` is centimetres of lung, less its vessels."""
    body = _body(anatomy, x, y)
    path = SOFT * body + (BONE - SOFT) * _bones(anatomy, x, y) * np.minimum(body, 1)
    path -= (SOFT - LUNG) * aerated
    path -= SOFT * _airways(anatomy, x, y)
    return path


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Film coordinates of every pixel, -1 to 1; float32, which halves the time to draw a film."""
    line = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    return tuple(np.meshgrid(line, line))


def _pose(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Patient coordinates of every pixel: x to the right, y downwards, a little turned, moved and scaled."""
    across, down = _grid(size)
    turn, scale = rng.normal(0, 0.026), rng.normal(1.0, 0.035)  # radians
    x = (across * math.cos(turn) + down * math.sin(turn)) / scale - rng.normal(0, 0.03)
    y = (down * math.cos(turn) - across * math.sin(turn)) / scale - rng.normal(0, 0.03)
    return x, y


def _dome(
    x: np.ndarray, y: np.ndarray, centre: tuple[float, float], radii: tuple[float, float], power: float = 2.0
) -> np.ndarray:
    """Relative thickness (0..1) of a super-ellipsoid seen from the front."""
    reach = np.abs((x - centre[0]) / radii[0]) ** power + np.abs((y - centre[1]) / radii[1]) ** power
    return np.sqrt(np.maximum(1 - reach, 0))


def _body(anatomy: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Centimetres of soft tissue: the trunk, widening to the shoulders, and the neck."""
    shoulders = 0.16 * expit((-0.62 - y) / 0.07)
    flat = np.zeros_like(y)  # as thick above as below
    trunk = anatomy.depth * _dome(x / (1 + shoulders), flat, (0, 0), (anatomy.width + 0.08, 1), 3.2)
    return trunk * expit((y + 1.05 - 0.5 * np.maximum(np.abs(x) - 0.22, 0)) / 0.05)


def _lungs(anatomy: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Centimetres of aerated lung, less the heart in front of it, down to the two domes of the diaphragm."""
    total = np.zeros_like(x)
    for side in (-1, 1):  # -1: the patient's right lung, on the left of the film
        lung = _dome(_across(anatomy, x, y, side), y, (0, -0.04), (1, 0.82), 2.3)
        total += lung * expit((_floor(anatomy, x, side) - y) / 0.012)
    heart = _dome(x, y, (0.09, 0.24), (anatomy.heart, 0.30)) + 0.8 * _dome(x, y, (0.02, -0.25), (0.14, 0.45))
    return 0.74 * anatomy.depth * np.maximum(total - 0.75 * heart, 0)


def _across(anatomy: Anatomy, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    """Position across the lung of one side: -1 at the left of the film, 1 at the right edge of that lung."""
    centre = side * (0.43 + 0.12 * np.clip(y, -0.7, 0.6))
    width = anatomy.lung * (1 + 0.20 * np.clip(y, -0.7, 0.6))
    return (x - centre) / width


def _floor(anatomy: Anatomy, x: np.ndarray, side: int) -> np.ndarray:
    """Height of the diaphragm under the lung of one side."""
    return anatomy.dome + (0.0 if side < 0 else 0.06) + 1.1 * (x - side * 0.36) ** 2


def _lung(anatomy: Anatomy, x: np.ndarray, y: np.ndarray, air: np.ndarray, side: int) -> findings.Lung:
    out = side * _across(anatomy, x, y, side)
    return findings.Lung(side, x, y, out, _floor(anatomy, x, side), air)


def _tube(distance: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """Thickness of a rod at `distance` from its axis, in the unit of `radius`."""
    return 2 * np.sqrt(np.maximum(radius**2 - distance**2, 0))


def _bones(anatomy: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Centimetres of bone: ribs at the back and front, collar bones, spine."""
    reach = np.abs(x)
    inside = expit((anatomy.width - 0.06 - reach) / 0.02)
    total = np.zeros_like(x)
    for k in range(9):
        level = -0.92 + k * anatomy.ribs
        back = y - (level - 0.10 * np.sin(np.pi * np.minimum(reach / 0.5, 1)) + anatomy.slope * reach**2)
        front = y - (level + 0.34 - 1.2 * anatomy.slope * reach + 0.28 * reach**2)
        shell = _tube(back, 0.036) - 0.65 * _tube(back, 0.026)
        total += HALF_WIDTH * 0.85 * shell * inside * (reach > 0.06)
        total += HALF_WIDTH * 0.20 * _tube(front, 0.042) * inside * (reach > 0.34)
    collar = (y + 0.70 + 0.18 * np.tanh((reach - 0.1) * 3)) / 1.1
    shell = _tube(collar, 0.036) - 0.5 * _tube(collar, 0.022)
    total += HALF_WIDTH * 0.75 * shell * ((reach > 0.07) & (reach < 0.8))
    bodies = 0.85 + 0.15 * np.cos(2 * np.pi * y / 0.155)
    return total + HALF_WIDTH * 0.45 * _tube(x, anatomy.spine) * bodies


def _airways(anatomy: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Centimetres of air in the windpipe and, under the left dome, in the stomach."""
    trachea = HALF_WIDTH * 0.7 * _tube(x + 0.02, 0.042) * expit((-0.22 - y) / 0.03)
    return trachea + 4.0 * _dome(x, y, (0.38, anatomy.dome + 0.22), (0.13, 0.08))


def _vessels(anatomy: Anatomy, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Centimetres of blood in the vessels that fan out from both hila, thinner towards the edge."""
    rng = np.random.default_rng(anatomy.vessels)
    total = np.zeros_like(x)
    for side in (-1, 1):
        out, down = side * x - 0.14, y - 0.02
        near = (np.hypot(out, down) < 0.73) & (out > -0.05)  # Beyond, the vessels have no width left.
        radius, angle = np.hypot(out, down)[near], np.arctan2(down, out)[near]
        for direction in rng.uniform(-1.4, 1.4, 11):
            bend = direction + 0.35 * np.sin(rng.uniform(4, 9) * radius + rng.uniform(0, 6))
            total[near] += _tube(radius * (angle - bend), 0.022 - 0.030 * radius)
        total += 0.10 * _dome(out, down, (0, 0), (0.10, 0.15))
    return HALF_WIDTH * 1.3 * total


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Noise of unit variance with structures of about size/cells pixels."""
    coarse = rng.standard_normal((cells + 3, cells + 3))
    fine = zoom(coarse.astype(np.float32), size / cells + 0.01, order=3)[:size, :size]
    return fine / fine.std()


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Uneven aeration of normal lung: a few per cent, at two scales."""
    return 1 + 0.03 * _smooth_noise(rng, size, 6) + 0.03 * _smooth_noise(rng, size, 28)


def _opacities(rng: np.random.Generator, air: np.ndarray) -> np.ndarray:
    """Share of the air replaced by fluid (0..1): one to three soft, patchy clouds centred in the lungs."""
    size = len(air)
    x, y = _grid(size)
    places = np.flatnonzero(air > 0.5 * air.max())
    fluid = np.zeros_like(air)
    for place in rng.choice(places, size=rng.integers(1, 4)):
        row, column = divmod(int(place), size)
        wide, tall = rng.uniform(0.16, 0.34), rng.uniform(0.16, 0.36)
        cloud = np.exp(-(((x - x[row, column]) / wide) ** 2) - ((y - y[row, column]) / tall) ** 2)
        fluid += rng.uniform(0.7, 1.2) * cloud
    patchy = np.clip(1 + 0.35 * _smooth_noise(rng, size, 14), 0, 2)
    return np.clip(fluid * patchy, 0, 0.95) * (air > 0)


def _film(rng: np.random.Generator, path: np.ndarray) -> np.ndarray:
    """Exposure, scatter, photon noise, detector blur, then the machine's grey window; bone is white."""
    exposure = PHOTONS * rng.uniform(0.7, 1.4)
    light = gaussian_filter(exposure * np.exp(-path), 0.003 * len(path))
    scatter = 0.10 * gaussian_filter(light, 0.12 * len(path))
    counts = rng.poisson(light + scatter) + 1.0
    density = -np.log(gaussian_filter(counts, 0.45) / exposure)
    low, high = np.percentile(density, [rng.uniform(0.5, 3), rng.uniform(97, 99.7)])
    shown = np.clip((density - low) / (high - low), 0, 1) ** rng.uniform(0.85, 1.2)
    return (rng.uniform(0.01, 0.06) + rng.uniform(0.84, 0.93) * shown).astype(np.float32)


def write_pneumonia(
    root: str | Path, *, seed: int = 0, images: Mapping[str, tuple[int, int]] | None = None, size: int = 128
) -> Path:
    """Write the tree of Chest X-Ray Images (Pneumonia) with synthetic films; returns `root`/chest_xray.

    `images` gives (NORMAL, PNEUMONIA) counts by split, default `IMAGES`. The archive's traps are there too: a
    second copy in chest_xray/chest_xray, `__MACOSX`, `._*`, `.DS_Store`, a 16-image val, a byte-identical
    pair, and patient numbers that appear in train as bacteria and in test as virus. The opacities' masks (255
    = opacity) lie in `root`/phantom_masks under the image's relative path, ending in .png.
    `root`/SYNTHETIC.txt is written last. The same seed gives the same bytes.
    """
    root = Path(root)
    tree = root / "chest_xray"
    plan = list(_plan(seed, images or IMAGES))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # Drawn in parallel, each from its own generator: the bytes do not depend on the order.
        list(pool.map(lambda film: _write_film(root, *film, size=size), plan))
    _write_twin(tree)
    shutil.copytree(tree, tree / "chest_xray")
    _write_litter(tree)
    _mark(root, seed)
    return tree


def write_competition(
    root: str | Path, *, seed: int = 0, images: Mapping[str, int] | None = None, size: int = 128
) -> Path:
    """Write both editions of the DLIA competition with planted findings; returns `root`.

    `root`/competition_edition_a and `root`/competition_edition_b train on the same images and test on
    different ones; `images` gives the counts of one edition ("train", "test"), default `FINDING_IMAGES`. As
    in the real editions: A's ids are the boxes missing from train.csv, so that `TWO_IDS` images have two and
    `LEAKED` stand in train and test; each of B's test images has exactly one box. The boxes behind the ids
    are in `root`/phantom_truth.csv (edition, image_id, x1, y1, x2, y2, class_name), beside the editions.
    The same seed gives the same bytes. Errors: `ValueError` for fewer than 12 or 8 images.
    """
    root, counts = Path(root), {**FINDING_IMAGES, **(images or {})}
    if counts["train"] < 12 or counts["test"] < 8:
        raise ValueError(f"images is {counts}; the competition needs at least 12 to train on and 8 to test")
    films = _draw_findings(counts["train"] + 2 * counts["test"] - LEAKED, seed=seed, size=size)
    rng = np.random.default_rng([seed, 1])
    order = [films[k] for k in rng.permutation(len(films))]
    single, double = ([film for film in order if len(film.names) == k] for k in (1, 2))
    test_b, rest = single[: counts["test"]], single[counts["test"] :]
    alone = counts["test"] - LEAKED - TWO_IDS
    test_a, train = [*rest[:alone], *double[:TWO_IDS]], [*rest[alone:], *double[TWO_IDS:]]
    leaked = double[TWO_IDS : TWO_IDS + LEAKED]
    hidden_a = [*_rows(test_a), *(list(_rows([film]))[1] for film in leaked)]
    train_a = [row for row in _rows(train) if row not in hidden_a]
    _write_edition_a(root / "competition_edition_a", rng, train, test_a + leaked, train_a, hidden_a)
    _write_edition_b(root / "competition_edition_b", rng, train, test_b)
    truth = [("A", *row) for row in sorted(hidden_a)] + [("B", *row) for row in sorted(_rows(test_b))]
    header = ("edition", "image_id", "class_name", "x1", "y1", "x2", "y2")
    _write_table(root / "phantom_truth.csv", header, truth)
    _mark(root, seed)
    return root


def write_nih(root: str | Path, *, seed: int = 0, images: int = 240, size: int = 128) -> Path:
    """Write the tree of NIH ChestX-ray8 with `images` films with planted findings; returns `root`/nih.

    Its traps are there too: the box list's header split by its own commas and followed by empty columns,
    `Infiltrate` there and `Infiltration` in Data_Entry_2017.csv, images in several folders, some RGBA, films
    without a box, Finder's litter. The same seed gives the same bytes.
    """
    root = Path(root)
    tree = root / "nih"
    films = _draw_findings(images, seed=seed, size=size)
    entries = []
    for k, film in enumerate(films):
        path = tree / f"images_{1 + 2 * k // len(films):03d}" / "images" / film.name
        _save(film.image, path, "PNG", mode="RGBA" if k % 28 == 4 else "L")
        labels = "|".join(film.names).replace("Infiltrate", "Infiltration")
        entries.append((film.name, labels, "PA"))
    for k in range(max(images // 20, 1)):  # As in the real archive, where most films have no box.
        name = f"{90_000_000 + k:08d}_000.png"
        image, _ = chest_with_findings(np.random.default_rng([seed, 2, k]), [], size=size)
        _save(image, tree / "images_002" / "images" / name, "PNG")
        entries.append((name, "No Finding", "PA"))
    header = "Image Index,Finding Label,Bbox [x,y,w,h],,,".split(",")
    _write_table(tree / layouts.NIH_BOXES, header, [[*row, "", "", ""] for row in _rows_xywh(_rows(films))])
    _write_table(tree / "Data_Entry_2017.csv", ("Image Index", "Finding Labels", "View Position"), entries)
    (tree / "images_001" / "images" / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    _mark(root, seed)
    return tree


def write_fracatlas(
    root: str | Path, *, seed: int = 0, images: tuple[int, int] = (60, 60), size: int = 128
) -> Path:
    """Write the original tree of FracAtlas with films of long bones; returns `root`/FracAtlas.

    `images` counts (fractured, not fractured), `size` is the long side in pixels. Its traps are there too:
    one JPEG cut short, one stored on its side (EXIF), one whose flag in dataset.csv contradicts its box. The
    same seed gives the same bytes.
    """
    root = Path(root)
    tree = root / "FracAtlas"
    table, boxes, shapes = [], {}, {}
    for k in range(sum(images)):
        fractured = k < images[0]
        rng = np.random.default_rng([seed, k])
        height, width = size, int(size * rng.uniform(0.55, 1.0))
        if rng.random() < 0.3:
            height, width = width, height
        image, box = bone(rng, height=height, width=width, fractured=fractured)
        name = f"IMG{k:07d}.jpg"
        path = tree / "images" / ("Fractured" if fractured else "Non_fractured") / name
        _save(image, path, "JPEG", on_its_side=k == 1)
        if fractured:
            boxes[name], shapes[name] = box, (height, width)
        table.append((name, 0, 1, 0, 0, 0, 0, 0, int(fractured and k != 2), int(fractured), 1, 0, 0))
    parts = "hand,leg,hip,shoulder,mixed,hardware,multiscan,fractured,fracture_count,frontal,lateral,oblique"
    _write_table(tree / layouts.FRACATLAS_TABLE, ["image_id", *parts.split(",")], table)
    cut = tree / "images" / "Fractured" / table[3][0]
    cut.write_bytes(cut.read_bytes()[:-40])
    _write_coco(tree / layouts.FRACATLAS_BOXES, boxes, shapes)
    names = list(boxes)
    marks = [0, round(0.8 * len(names)), round(0.9 * len(names)), len(names)]
    for k, file in enumerate(layouts.FRACATLAS_SPLITS.values()):
        _write_table(tree / file, ("image_id",), [(name,) for name in names[marks[k] : marks[k + 1]]])
    _mark(root, seed)
    return tree


@dataclass(frozen=True)
class _FindingFilm:
    """A drawn film: its file name, image [size,size], names and boxes of its findings."""

    name: str
    image: np.ndarray
    names: list[str]
    boxes: list[tuple[float, float, float, float]]


def _draw_findings(count: int, *, seed: int, size: int) -> list[_FindingFilm]:
    """`count` films, sorted by name; every third has two findings, about a quarter share a patient."""

    def draw(film: tuple[str, list[str], list[int], list[int]]) -> _FindingFilm:
        name, names, patient, key = film
        anatomy = Anatomy.draw(np.random.default_rng(patient))
        image, boxes = chest_with_findings(np.random.default_rng(key), names, size=size, anatomy=anatomy)
        return _FindingFilm(name, image, names, boxes)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(draw, _plan_findings(seed, count)))


def _plan_findings(seed: int, count: int) -> Iterator[tuple[str, list[str], list[int], list[int]]]:
    """(file name, names of the findings, seed of the patient, seed of the film) of every image."""
    rng = np.random.default_rng([seed, 0])
    patient, films_left, deck = 0, 0, []
    for film in range(count):
        if not films_left:
            patient += int(rng.integers(1, 60))
            films_left, visit = int(rng.choice([1, 2, 3], p=[0.86, 0.11, 0.03])), int(rng.integers(0, 20))
        films_left, visit = films_left - 1, visit + 1
        if len(deck) < 4:  # A deck of all classes, dealt out, keeps their numbers equal.
            deck += rng.permutation(layouts.NIH_CLASSES).tolist()
        names = [deck.pop(0)]
        if film % 3 == 2:
            names.append(deck.pop(next(k for k, name in enumerate(deck) if name != names[0])))
        yield f"{patient:08d}_{visit:03d}.png", names, [seed, 3, patient], [seed, 4, patient, visit]


def _rows(films: Iterable[_FindingFilm]) -> Iterator[tuple]:
    """(file name, class, x1, y1, x2, y2) of every box."""
    for film in films:
        for name, box in zip(film.names, film.boxes, strict=True):
            yield film.name, name, *box


def _rows_xywh(rows: Iterable[tuple]) -> list[tuple]:
    return [(film, name, x1, y1, x2 - x1, y2 - y1) for film, name, x1, y1, x2, y2 in rows]


def _write_edition_a(
    tree: Path,
    rng: np.random.Generator,
    train: list[_FindingFilm],
    test: list[_FindingFilm],
    shown: list[tuple],
    hidden: list[tuple],
) -> None:
    """Every id stands for one of the `hidden` boxes; the header is NIH's, the rows are in no order."""
    _save_films(tree, train, test)
    header = "Image Index,Finding Label,Bbox [x,y,w,h]".split(",")
    rows = _rows_xywh(shown)
    _write_table(tree / layouts.DLIA_TRAIN, header, [rows[k] for k in rng.permutation(len(rows))])
    ids = [(n, hidden[k][0]) for n, k in enumerate(rng.permutation(len(hidden)), 1)]
    _write_table(tree / layouts.DLIA_MAPPING, ("id", "image_id"), ids)


def _write_edition_b(
    tree: Path, rng: np.random.Generator, train: list[_FindingFilm], test: list[_FindingFilm]
) -> None:
    """One id an image, counted from 0 in the order of the names; train.csv has a column more."""
    _save_films(tree, train, test)
    rows = [(film, rng.choice(["AP", "PA"]), *box, name) for film, name, *box in sorted(_rows(train))]
    header = ("image_id", "view", "x_min", "y_min", "x_max", "y_max", "label")
    _write_table(tree / layouts.DLIA_TRAIN, header, rows)
    ids = enumerate(sorted(film.name for film in test))
    _write_table(tree / layouts.DLIA_MAPPING, ("ID", "image_id"), ids)


def _save_films(tree: Path, train: list[_FindingFilm], test: list[_FindingFilm]) -> None:
    for folder, films in (("train", train), ("test", test)):
        for film in films:
            _save(film.image, tree / folder / film.name, "PNG")


def _write_coco(
    path: Path, boxes: Mapping[str, tuple[float, ...]], shapes: Mapping[str, tuple[int, int]]
) -> None:
    images, annotations = [], []
    for k, (name, (x1, y1, x2, y2)) in enumerate(boxes.items()):
        height, width = shapes[name]
        images.append({"id": k + 1, "width": width, "height": height, "file_name": name})
        box = [x1, y1, x2 - x1, y2 - y1]
        annotations.append({"id": k, "image_id": k + 1, "category_id": 0, "iscrowd": 0, "bbox": box})
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "fractured"}]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(coco), encoding="utf-8")


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _mark(root: Path, seed: int) -> None:
    """Say that all of it is synthetic; written last, so that a phantom left half-written is not used."""
    note = f"Synthetic films, drawn by dlia_utils.phantom {VERSION}, seed {seed}. No patient data.\n"
    (root / MARKER).write_text(note, encoding="utf-8")


def _plan(
    seed: int, images: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, bool, list[int], list[int]]]:
    """(relative path, pneumonia, seed of the patient, seed of the film) of every image."""
    for s, (split, counts) in enumerate(images.items()):
        for pneumonia, count in enumerate(counts):
            rng = np.random.default_rng([seed, s, pneumonia])
            patient, films_left = 0, 0
            for film in range(1, count + 1):
                if not films_left:
                    patient, films_left = patient + 1, int(rng.choice([1, 1, 2, 3]))
                    virus = rng.random() < 0.35
                films_left -= 1
                # Numbers 1 and 2 return in every split, in test as the other kind: a trap of the real names.
                returns = pneumonia and patient <= 2
                number = patient if returns else patient + 1000 * s
                kind = "virus" if (split == "test" if returns else virus) else "bacteria"
                key = [seed, s, pneumonia, patient]
                yield f"{split}/{_name(pneumonia, number, kind, film)}", bool(pneumonia), key, [*key, film]


def _name(pneumonia: int, number: int, kind: str, film: int) -> str:
    if pneumonia:
        return f"PNEUMONIA/person{number}_{kind}_{film}.jpeg"
    return f"NORMAL/{'NORMAL2-' if number % 2 else ''}IM-{number:04d}-{film:04d}.jpeg"


def _write_film(
    root: Path, relative: str, pneumonia: bool, patient: list[int], film: list[int], *, size: int
) -> None:
    anatomy = Anatomy.draw(np.random.default_rng(patient))
    image, lesion = chest(np.random.default_rng(film), size=size, pneumonia=pneumonia, anatomy=anatomy)
    _save(image, root / "chest_xray" / relative, "JPEG")
    if pneumonia:
        _save(lesion, (root / "phantom_masks" / relative).with_suffix(".png"), "PNG")


def _save(picture: np.ndarray, path: Path, kind: str, *, mode: str = "L", on_its_side: bool = False) -> None:
    """Write grey values in [0, 1]; `on_its_side` stores them turned, with the EXIF tag that says so."""
    image = Image.fromarray((picture * 255.0).round().astype(np.uint8))
    exif = Image.Exif()
    if on_its_side:
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, quality=92, **({"exif": exif} if on_its_side else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def _write_twin(tree: Path) -> None:
    """Make a normal patient's second training film a copy of the first, as happens in the published set."""
    by_patient: dict[str, Path] = {}
    for path in sorted(tree.glob("train/NORMAL/*.jpeg")):
        first = by_patient.setdefault(path.name.rpartition("-")[0], path)
        if first != path:
            shutil.copyfile(first, path)
            return


def _write_litter(tree: Path) -> None:
    for path in sorted(tree.glob("*/*/*.jpeg"))[::40]:
        fork = tree / "__MACOSX" / "chest_xray" / path.parent.relative_to(tree) / f"._{path.name}"
        fork.parent.mkdir(parents=True, exist_ok=True)
        fork.write_bytes(b"\x00\x05\x16\x07" + bytes(60))
        shutil.copyfile(fork, path.with_name(fork.name))
        (path.parent / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
