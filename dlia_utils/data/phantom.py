"""Synthetic radiographs in each data set's own tree, the default when no real data is there.

Drawn from physics, not from patients: X-rays pass through simple solids (Beer-Lambert), the
detector counts photons (Poisson) and blurs. Nothing medical can be learnt from them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.ndimage import gaussian_filter, zoom
from scipy.special import expit

from . import medmnist, readers

VERSION = 6  # Raise it when the trees change: phantoms of another version are not reused.
MARKER = "SYNTHETIC.txt"
IMAGES = {"train": (96, 144), "val": (8, 8), "test": (24, 40)}
FINDING_IMAGES = {"train": 240, "test": 40}  # of each edition of the competition
LEAKED, TWO_IDS = 4, 3  # edition A: test images that train has too, and test images with two ids
MARKED = (0.25, 0.75)  # share of the Normal and of the COVID images with a marker in a corner
TWINS = 1 / 15  # share of the COVID set's images that are another image once more
SPREAD = 2.5  # of how patients are placed; at 1, healthy lungs are taken for copies of one another
MEDMNIST_IMAGES = {"train": 320, "val": 64, "test": 128}

SOFT, BONE, LUNG = 0.20, 0.55, 0.05  # linear attenuation in 1/cm near 60 keV
PHOTONS = 12_000  # per detector pixel before the patient
HALF_WIDTH = 17.0  # cm
GAS_DEPTH = 2.5  # Free air is shown as deep as this many lungs: a real one is faint.
# Half widths of a patient's image (depth: cm), means and deviations.
SHAPE = "width depth lung heart ribs slope spine dome".split()
MEANS = (0.95, 20, 0.345, 0.27, 0.165, 0.30, 0.085, 0.50)
DEVIATIONS = (0.03, 2, 0.015, 0.03, 0.008, 0.05, 0.006, 0.05)
# Half width of a ball, and where it may lie in a lung, across and down.
BALLS = {"Mass": ((0.15, 0.20), (-0.05, 0.25), (-0.40, 0.10))}
BALLS["Nodule"] = ((0.075, 0.09), (-0.25, 0.45), (-0.50, 0.15))

Box, Pair = tuple[float, float, float, float], tuple[int, int]
Array, Rng, Patient = np.ndarray, np.random.Generator, SimpleNamespace


# ------------------------------------------------------------------------------------ radiographs


def anatomy(rng: Rng) -> Patient:
    """The shape of a random patient, the same in all of the patient's images."""
    found = dict(zip(SHAPE, rng.normal(MEANS, DEVIATIONS).tolist(), strict=True))
    found["depth"] = min(max(found["depth"], 15.0), 26.0)
    found["heart"] = min(max(found["heart"], 0.2), 0.36)
    return SimpleNamespace(**found, vessels=int(rng.integers(2**31)))


def chest(
    rng: Rng,
    *,
    size: int,
    pneumonia: bool,
    upper: bool = False,
    clouds: Pair = (2, 4),
    spread: float = 1.0,
    patient: Patient | None = None,
) -> tuple[Array, Array, Array]:
    """A frontal chest float32 [S,S] in [0,1]; masks bool [S,S] of its opacities and of the lungs.

    Only the opacities (`pneumonia`; from the first to the second number in `clouds`, high up with
    `upper`) tell the classes apart. `spread` multiplies how differently patients are placed.

    >>> image, opacities, lungs = chest(np.random.default_rng(0), size=48, pneumonia=True)
    >>> image.shape, bool(opacities.any()), 0.1 < float(lungs.mean()) < 0.5
    ((48, 48), True, True)
    """
    a = patient or anatomy(rng)
    x, y = _pose(rng, size, spread=spread)
    air = _lungs(a, x, y)
    fluid = (
        _opacities(rng, air, clouds=clouds, lowest=0.42 if upper else 1.0)
        if pneumonia
        else np.zeros_like(air)
    )
    aerated = _aerated(rng, a, x, y, air * (1 - 0.85 * fluid), air)
    lungs = air > 1.0
    return _exposed(rng, _attenuation(a, x, y, aerated)), (fluid > 0.3) & lungs, lungs


def chest_with_findings(
    rng: Rng, names: Sequence[str], *, size: int, patient: Patient | None = None
) -> tuple[Array, list[Box]]:
    """A chest float32 [S,S] with the findings `names`, and a box (x1, y1, x2, y2) for each.

    Two findings lie in different lungs. The same generator gives the same image but for the
    findings. Their looks are exaggerated, so that a small detector learns them in minutes.

    >>> image, boxes = chest_with_findings(np.random.default_rng(0), ["Mass"], size=64)
    >>> image.shape, len(boxes), boxes[0][2] - boxes[0][0] > 6
    ((64, 64), 1, True)
    """
    planting, rng = rng.spawn(2)
    a = patient or anatomy(rng)
    x, y = _pose(rng, size)
    air = _lungs(a, x, y)
    aerated = _aerated(rng, a, x, y, air, air)
    tissue = GAS_DEPTH * (SOFT * air - (SOFT - LUNG) * aerated)  # what free air takes the place of
    side = -1 if "Cardiomegaly" in names else int(planting.choice([-1, 1]))
    filled, freed, boxes = np.zeros_like(air), np.zeros_like(air), []
    for name in names:
        out = side * _across(a, x, y, side)
        change = _finding(name, planting, x, y, out, _floor(a, x, side))
        if name != "Cardiomegaly":
            change, side = change * (np.abs(out) < 1), -side
        change = change * (air > 0)
        fluid, gas = np.maximum(change, 0), np.maximum(-change, 0)
        boxes.append(_tight_box((SOFT - LUNG) * aerated * fluid - tissue * gas))
        filled, freed = 1 - (1 - filled) * (1 - fluid), np.maximum(freed, gas)
    path = _attenuation(a, x, y, aerated * (1 - filled)) - tissue * freed
    return _exposed(rng, path), boxes


def bone(rng: Rng, *, height: int, width: int, fractured: bool) -> tuple[Array, Box | None, Array]:
    """A long bone float32 [H,W]; the box of its fracture or None; the mask bool [H,W] of the gap.

    >>> image, box, gap = bone(np.random.default_rng(0), height=96, width=64, fractured=True)
    >>> image.shape, box is not None, 20 < int(gap.sum()) < 600
    ((96, 64), True, True)
    """
    long = max(height, width)
    down, across = np.mgrid[:height, :width].astype(np.float32) + 0.5
    x, y = (2 * across - width) / long, (2 * down - height) / long
    turn = rng.normal(0, 0.2) + (math.pi / 2 if width > height else 0)
    along, side = y * math.cos(turn) + x * math.sin(turn), x * math.cos(turn) - y * math.sin(turn)
    radius = rng.uniform(0.12, 0.16)
    place, tilt, gap = rng.uniform(-0.4, 0.4), rng.uniform(-0.7, 0.7), rng.uniform(0.07, 0.11)
    soft = 7.0 * _tube(side - 0.04, 3.2 * radius)
    slip = rng.choice([-1, 1]) * rng.uniform(0.7, 1.1) * radius
    if fractured:
        side = side - slip * (along > place + tilt * side)  # The lower fragment has slipped aside.
    wide = radius * (1 + 0.9 * np.abs(along) ** 4)
    shell = HALF_WIDTH * 0.6 * (_tube(side, wide) - 0.75 * _tube(side, 0.6 * wide))
    distance = np.abs(along - place - tilt * side)
    shell = shell * (distance > gap / 2) if fractured else shell
    image = _exposed(rng, SOFT * soft + (BONE - SOFT) * shell)
    near = (distance < gap / 2 + 0.3 * radius) & (np.abs(side) < wide) & fractured
    if not fractured:
        return image, None, near
    pieces, _ = ndimage.label(near, np.ones((3, 3)))  # without crumbs beside the gap
    near = pieces == np.bincount(pieces[near]).argmax()
    return image, _tight_box(near.astype(float)), near


def _tight_box(effect: Array) -> Box:
    """Corners of where a change is above a quarter of its greatest value."""
    seen = np.abs(effect) > 0.25 * np.abs(effect).max()
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _grid(size: int) -> tuple[Array, Array]:
    line = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    return tuple(np.meshgrid(line, line))


def _pose(rng: Rng, size: int, *, spread: float = 1.0) -> tuple[Array, Array]:
    """Patient coordinates of every pixel, a little turned, moved and scaled."""
    across, down = _grid(size)
    turn, scale = rng.normal(0, 0.026 * spread), rng.normal(1.0, 0.035 * spread)
    x = (across * math.cos(turn) + down * math.sin(turn)) / scale - rng.normal(0, 0.03 * spread)
    y = (down * math.cos(turn) - across * math.sin(turn)) / scale - rng.normal(0, 0.03 * spread)
    return x, y


def _dome(x: Array, y: Array, centre: Sequence, radii: Sequence, power: float = 2.0) -> Array:
    """Relative thickness (0 to 1) of a super-ellipsoid seen from the front."""
    across, down = np.abs((x - centre[0]) / radii[0]), np.abs((y - centre[1]) / radii[1])
    return np.sqrt(np.maximum(1 - (across**power + down**power), 0))


def _tube(distance: Array, radius: Array | float) -> Array:
    """Thickness of a rod at `distance` from its axis, in the unit of `radius`."""
    return 2 * np.sqrt(np.maximum(radius**2 - distance**2, 0))


def _across(a: Patient, x: Array, y: Array, side: int) -> Array:
    """-1 at the left, 1 at the right edge of a lung; side -1 is at the left of the image."""
    level = np.clip(y, -0.7, 0.6)
    return (x - side * (0.43 + 0.12 * level)) / (a.lung * (1 + 0.20 * level))


def _floor(a: Patient, x: Array, side: int) -> Array:
    """Height of the diaphragm under the lung of one side."""
    return a.dome + (0.0 if side < 0 else 0.06) + 1.1 * (x - side * 0.36) ** 2


def _lungs(a: Patient, x: Array, y: Array) -> Array:
    """Centimetres of aerated lung, less the heart, down to the two domes of the diaphragm."""
    total = np.zeros_like(x)
    for side in (-1, 1):
        lung = _dome(_across(a, x, y, side), y, (0, -0.04), (1, 0.82), 2.3)
        total += lung * expit((_floor(a, x, side) - y) / 0.012)
    vessels = 0.8 * _dome(x, y, (0.02, -0.25), (0.14, 0.45))
    heart = _dome(x, y, (0.09, 0.24), (a.heart, 0.30)) + vessels
    return 0.74 * a.depth * np.maximum(total - 0.75 * heart, 0)


def _aerated(rng: Rng, a: Patient, x: Array, y: Array, aerated: Array, air: Array) -> Array:
    """The aerated lung with its texture, less the vessels that fan out from both hila."""
    size, vessels = len(air), np.zeros_like(x)
    texture = 1 + 0.03 * _smooth_noise(rng, size, 6) + 0.03 * _smooth_noise(rng, size, 28)
    rng = np.random.default_rng(a.vessels)
    for side in (-1, 1):
        out, down = side * x - 0.14, y - 0.02
        near = (np.hypot(out, down) < 0.73) & (out > -0.05)  # Beyond, they have no width left.
        radius, angle = np.hypot(out, down)[near], np.arctan2(down, out)[near]
        for direction in rng.uniform(-1.4, 1.4, 11):
            bend = direction + 0.35 * np.sin(rng.uniform(4, 9) * radius + rng.uniform(0, 6))
            vessels[near] += _tube(radius * (angle - bend), 0.022 - 0.030 * radius)
        vessels += 0.10 * _dome(out, down, (0, 0), (0.10, 0.15))
    return np.maximum(aerated * texture - HALF_WIDTH * 1.3 * vessels * (air > 0), 0)


def _attenuation(a: Patient, x: Array, y: Array, aerated: Array) -> Array:
    """Attenuation along each ray through trunk, bones, lungs (`aerated`, in cm) and airways."""
    wide = x / (1 + 0.16 * expit((-0.62 - y) / 0.07))  # the shoulders
    trunk = a.depth * _dome(wide, np.zeros_like(y), (0, 0), (a.width + 0.08, 1), 3.2)
    body = trunk * expit((y + 1.05 - 0.5 * np.maximum(np.abs(x) - 0.22, 0)) / 0.05)
    path = SOFT * body + (BONE - SOFT) * _bones(a, x, y) * np.minimum(body, 1)
    path -= (SOFT - LUNG) * aerated
    windpipe = HALF_WIDTH * 0.7 * _tube(x + 0.02, 0.042) * expit((-0.22 - y) / 0.03)
    path -= SOFT * (windpipe + 4.0 * _dome(x, y, (0.38, a.dome + 0.22), (0.13, 0.08)))
    return path


def _bones(a: Patient, x: Array, y: Array) -> Array:
    """Centimetres of bone: ribs at the back and front, collar bones, spine."""
    reach = np.abs(x)
    inside = expit((a.width - 0.06 - reach) / 0.02)
    total = np.zeros_like(x)
    bend = 0.10 * np.sin(np.pi * np.minimum(reach / 0.5, 1))
    for k in range(9):
        level = -0.92 + k * a.ribs
        back = y - (level - bend + a.slope * reach**2)
        front = y - (level + 0.34 - 1.2 * a.slope * reach + 0.28 * reach**2)
        shell = _tube(back, 0.036) - 0.65 * _tube(back, 0.026)
        total += HALF_WIDTH * 0.85 * shell * inside * (reach > 0.06)
        total += HALF_WIDTH * 0.20 * _tube(front, 0.042) * inside * (reach > 0.34)
    collar = (y + 0.70 + 0.18 * np.tanh((reach - 0.1) * 3)) / 1.1
    shell = _tube(collar, 0.036) - 0.5 * _tube(collar, 0.022)
    total += HALF_WIDTH * 0.75 * shell * ((reach > 0.07) & (reach < 0.8))
    bodies = 0.85 + 0.15 * np.cos(2 * np.pi * y / 0.155)
    return total + HALF_WIDTH * 0.45 * _tube(x, a.spine) * bodies


def _smooth_noise(rng: Rng, size: int, cells: int) -> Array:
    """Noise of unit variance with structures of about size/cells pixels."""
    coarse = rng.standard_normal((cells + 3, cells + 3))
    fine = zoom(coarse.astype(np.float32), size / cells + 0.01, order=3)[:size, :size]
    return fine / fine.std()


def _opacities(rng: Rng, air: Array, *, clouds: Pair, lowest: float) -> Array:
    """Share of the air replaced by fluid: so many clouds, none centred below `lowest`."""
    size = len(air)
    x, y = _grid(size)
    places = np.flatnonzero((air > 0.5 * air.max()) & (y < 2 * lowest - 1))
    fluid = np.zeros_like(air)
    for place in rng.choice(places, size=rng.integers(clouds[0], clouds[1] + 1)):
        row, column = divmod(int(place), size)
        wide, tall = rng.uniform(0.16, 0.34), rng.uniform(0.16, 0.36)
        cloud = np.exp(-(((x - x[row, column]) / wide) ** 2) - ((y - y[row, column]) / tall) ** 2)
        fluid += rng.uniform(0.7, 1.2) * cloud
    patchy = np.clip(1 + 0.35 * _smooth_noise(rng, size, 14), 0, 2)
    return np.clip(fluid * patchy, 0, 0.95) * (air > 0)


def _exposed(rng: Rng, path: Array) -> Array:
    """Exposure, scatter, photon noise, detector blur, then the grey window; bone is white."""
    exposure = PHOTONS * rng.uniform(0.7, 1.4)
    light = gaussian_filter(exposure * np.exp(-path), 0.003 * len(path))
    scatter = 0.10 * gaussian_filter(light, 0.12 * len(path))
    counts = rng.poisson(light + scatter) + 1.0
    density = -np.log(gaussian_filter(counts, 0.45) / exposure)
    low, high = np.percentile(density, [rng.uniform(0.5, 3), rng.uniform(97, 99.7)])
    shown = np.clip((density - low) / (high - low), 0, 1) ** rng.uniform(0.85, 1.2)
    return (rng.uniform(0.01, 0.06) + rng.uniform(0.84, 0.93) * shown).astype(np.float32)


def _edge(distance: Array, soft: float) -> Array:
    """1 where `distance` is positive, 0 where negative, over a width of about `soft`."""
    return expit(distance / soft * 2)


def _finding(name: str, rng: Rng, x: Array, y: Array, out: Array, floor: Array) -> Array:
    """Share [S,S] of the lung's air that fluid replaces or, below zero, free air.

    `out` runs from -1 (spine) to 1 (ribs); `floor` is the height of the diaphragm.
    """
    draw = rng.uniform

    def ball(centre: Sequence, radii: Sequence, soft: float) -> Array:
        reach = np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1])
        return _edge((1 - reach) * min(radii), soft)

    def place(across: Sequence, down: Sequence) -> tuple[float, float]:
        spot, level = draw(*across), draw(*down)
        nearest = np.argmin((out - spot) ** 2 + (y - level) ** 2)
        return float(x.flat[nearest]), float(y.flat[nearest])

    if name in BALLS:  # dense, large or small
        radius, *spot = BALLS[name]
        radii = [draw(*radius)] * 2
        return 0.95 * ball(place(*spot), radii, 0.01)
    match name:
        case "Atelectasis":  # a flat, dense, slightly tilted band above the diaphragm
            height, thick = draw(0.17, 0.27), draw(0.10, 0.12)
            start, length = draw(-0.35, -0.15), draw(0.85, 1.05)
            line = floor.min() - height + draw(-0.12, 0.12) * out
            inside = 0.95 * _edge(thick / 2 - np.abs(y - line), 0.012)
            return inside * _edge(out - start, 0.04) * _edge(start + length - out, 0.04)
        case "Cardiomegaly":  # a wide heart, whichever lung is given
            radii = draw(0.43, 0.51), draw(0.36, 0.42)
            return 0.97 * ball((draw(0.10, 0.14), draw(0.20, 0.25)), radii, 0.02)
        case "Effusion":  # fluid at the bottom, its surface rising towards the ribs like a meniscus
            level = floor.min() - draw(0.05, 0.16)
            rise = draw(0.16, 0.25) * np.clip(out + 0.5, 0, None) ** 2
            return 0.97 * _edge(y - (level - rise), 0.015)
        case "Infiltrate":  # a cloud of small faint patches with lung between them
            centre = place((-0.1, 0.25), (-0.20, 0.15))
            cloud = ball(centre, (draw(0.21, 0.27), draw(0.24, 0.32)), 0.05)
            patches = gaussian_filter(rng.standard_normal(y.shape), 0.034 / (2 / len(y)))
            return 0.65 * cloud * expit((patches / patches.std() - 0.1) / 0.15)
        case "Pneumonia":  # a whole upper lobe, evenly dense, that ends at a straight fissure
            fissure = draw(-0.16, 0.0) + draw(-0.06, 0.06) * out
            return 0.85 * _edge(fissure - y, 0.012) * _edge(y - draw(-0.62, -0.54), 0.05)
    gap, bottom = draw(0.32, 0.46), draw(-0.05, 0.20)  # Pneumothorax: free air round the apex
    back = (out / (1 - gap)) ** 2 + ((y + 0.04) / (0.82 * (1 - gap))) ** 2
    return -_edge(back - 1, 0.06) * _edge(bottom - y, 0.03) * _edge(out + 0.45, 0.06)


# ------------------------------------------------------------------------------------------ trees
# Each function returns the folder of its tree. The same seed gives the same bytes; `MARKER` comes
# last. `images` are numbers of images, `size` is the (long) side of an image.


def write_pneumonia(
    root: Path, *, seed: int = 0, images: Mapping[str, Pair] = IMAGES, size: int = 128
) -> Path:
    """Chest X-Ray Images (Pneumonia); `images` of NORMAL and PNEUMONIA by split.

    As in the archive: a second copy of the tree, macOS junk files, a 16-image val, an identical
    pair, patients of train (bacteria) whose number is in test (virus). Masks of the opacities lie
    in `root`/phantom_masks.
    """
    tree = root / "chest_xray"

    def write(job: tuple[str, list[int], list[int], bool]) -> None:
        path, patient, image, pneumonia = job
        who = anatomy(np.random.default_rng(patient))
        drawn = chest(np.random.default_rng(image), size=size, pneumonia=pneumonia, patient=who)
        _save(drawn[0], tree / path)
        if pneumonia:
            _save(drawn[1], (root / "phantom_masks" / path).with_suffix(".png"))

    _in_parallel(write, _plan_pneumonia(seed, images))
    first_of: dict[str, Path] = {}
    for path in sorted(tree.glob("train/NORMAL/*.jpeg")):
        first = first_of.setdefault(path.name.rpartition("-")[0], path)
        if first != path:
            shutil.copyfile(first, path)
            break
    shutil.copytree(tree, tree / "chest_xray")
    for path in sorted(tree.glob("*/*/*.jpeg"))[::40]:
        junk = tree / "__MACOSX" / "chest_xray" / path.parent.relative_to(tree) / f"._{path.name}"
        for place in (junk, path.with_name(junk.name), path.with_name(".DS_Store")):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"\x00\x05\x16\x07" + bytes(60))
    return _marked(root, tree, seed)


def _plan_pneumonia(seed: int, images: Mapping[str, Pair]) -> Iterator[tuple]:
    """(path, seed of the patient, seed of the image, pneumonia) of every image."""
    for s, (split, counts) in enumerate(images.items()):
        for pneumonia, count in enumerate(counts):
            rng = np.random.default_rng([seed, s, pneumonia])
            patient, left = 0, 0
            for number in range(1, count + 1):
                if not left:
                    patient, left = patient + 1, int(rng.choice([1, 1, 2, 3]))
                    virus = rng.random() < 0.35
                left -= 1
                # Numbers 1 and 2 return in every split, in test as the other kind.
                returns = pneumonia and patient <= 2
                person = patient if returns else patient + 1000 * s
                kind = "virus" if (split == "test" if returns else virus) else "bacteria"
                name = f"NORMAL/{'NORMAL2-' * (person % 2)}IM-{person:04d}-{number:04d}"
                name = f"PNEUMONIA/person{person}_{kind}_{number}" if pneumonia else name
                key = [seed, s, pneumonia, patient]
                yield f"{split}/{name}.jpeg", key, [*key, number], bool(pneumonia)


def write_competition(
    root: Path, *, seed: int = 0, images: Mapping[str, int] = FINDING_IMAGES, size: int = 128
) -> Path:
    """Both editions of the DLIA competition; `images` of one edition, at least 12 and 8.

    Edition A's ids are the boxes that train.csv lacks: `TWO_IDS` images have two, `LEAKED` stand
    in train and test; B's test images have one box each. The boxes of the test images are in
    `root`/phantom_truth.csv.
    """
    tests = images["test"]
    drawn = _draw_findings(images["train"] + 2 * tests - LEAKED, seed=seed, size=size)
    rng = np.random.default_rng([seed, 1])
    order = [drawn[k] for k in rng.permutation(len(drawn))]
    single, double = ([one for one in order if len(one.names) == k] for k in (1, 2))
    test_b, rest = single[:tests], single[tests:]
    alone = tests - LEAKED - TWO_IDS
    test_a, train = [*rest[:alone], *double[:TWO_IDS]], [*rest[alone:], *double[TWO_IDS:]]
    leaked = double[TWO_IDS : TWO_IDS + LEAKED]
    hidden = [*_box_rows(test_a), *(list(_box_rows([one]))[1] for one in leaked)]

    rows = _xywh(row for row in _box_rows(train) if row not in hidden)
    rows = [rows[k] for k in rng.permutation(len(rows))]
    ids = [(n, hidden[k][0]) for n, k in enumerate(rng.permutation(len(hidden)), 1)]
    first = ("Image Index,Finding Label,Bbox [x,y,w,h]".split(","), rows, "id", ids)
    rows = sorted(_box_rows(train))
    rows = [(one, rng.choice(["AP", "PA"]), *box, name) for one, name, *box in rows]
    ids = list(enumerate(sorted(one.name for one in test_b)))
    second = ("image_id view x_min y_min x_max y_max label".split(), rows, "ID", ids)
    editions = {"a": (*first, test_a + leaked), "b": (*second, test_b)}
    for edition, (header, rows, key, ids, test) in editions.items():
        tree = root / f"competition_edition_{edition}"
        _write_table(tree / readers.DLIA_TRAIN, header, rows)
        _write_table(tree / readers.DLIA_MAPPING, (key, "image_id"), ids)
        for folder, drawn in (("train", train), ("test", test)):
            for one in drawn:
                _save(one.image, tree / folder / one.name)
    truth = [("A", *row) for row in sorted(hidden)]
    truth += [("B", *row) for row in sorted(_box_rows(test_b))]
    header = "edition image_id class_name x1 y1 x2 y2".split()
    _write_table(root / "phantom_truth.csv", header, truth)
    return _marked(root, root, seed)


def write_nih(root: Path, *, seed: int = 0, images: int = 240, size: int = 128) -> Path:
    """NIH ChestX-ray8 with `images` boxed images, and some without."""
    tree = root / "nih"
    drawn = _draw_findings(images, seed=seed, size=size)
    for k, one in enumerate(drawn):
        _save(one.image, tree / f"images_{1 + 2 * k // images:03d}" / "images" / one.name)
    for k in range(max(images // 20, 1)):  # As in the real archive, where most images have no box.
        image, _ = chest_with_findings(np.random.default_rng([seed, 2, k]), [], size=size)
        _save(image, tree / "images_002" / "images" / f"{90_000_000 + k:08d}_000.png")
    header = "Image Index,Finding Label,Bbox [x,y,w,h],,,".split(",")
    rows = [[*row, "", "", ""] for row in _xywh(_box_rows(drawn))]
    _write_table(tree / readers.NIH_BOXES, header, rows)
    return _marked(root, tree, seed)


def _draw_findings(count: int, *, seed: int, size: int) -> list[SimpleNamespace]:
    """`count` images (name, image, names, boxes); every third has two findings."""

    def draw(job: tuple[str, list[str], list[int], list[int]]) -> SimpleNamespace:
        name, names, patient, key = job
        who, rng = anatomy(np.random.default_rng(patient)), np.random.default_rng(key)
        image, boxes = chest_with_findings(rng, names, size=size, patient=who)
        return SimpleNamespace(name=name, image=image, names=names, boxes=boxes)

    rng, jobs = np.random.default_rng([seed, 0]), []
    patient, left, deck = 0, 0, []
    for number in range(count):
        if not left:
            patient += int(rng.integers(1, 60))
            left = int(rng.choice([1, 2, 3], p=[0.86, 0.11, 0.03]))
            visit = int(rng.integers(0, 20))
        left, visit = left - 1, visit + 1
        if len(deck) < 4:  # A deck of all classes, dealt out, keeps their numbers equal.
            deck += rng.permutation(readers.NIH_CLASSES).tolist()
        names = [deck.pop(0)]
        if number % 3 == 2:
            names.append(deck.pop(next(k for k, name in enumerate(deck) if name != names[0])))
        keys = [seed, 3, patient], [seed, 4, patient, visit]
        jobs.append((f"{patient:08d}_{visit:03d}.png", names, *keys))
    return _in_parallel(draw, jobs)


def _box_rows(drawn: Iterable[SimpleNamespace]) -> Iterator[tuple]:
    """(file name, class, x1, y1, x2, y2) of every box."""
    for one in drawn:
        yield from ((one.name, n, *box) for n, box in zip(one.names, one.boxes, strict=True))


def _xywh(rows: Iterable[tuple]) -> list[tuple]:
    return [(name, kind, x1, y1, x2 - x1, y2 - y1) for name, kind, x1, y1, x2, y2 in rows]


def write_fracatlas(
    root: Path, *, seed: int = 0, images: Pair = (110, 110), size: int = 128
) -> Path:
    """FracAtlas: long bones, fractured (4 at least) or not, boxes and outlines of the fractures.

    As in the archive: image 1 lies on its side (EXIF), 2 has a flag in dataset.csv that
    contradicts its box, 3 is cut short.
    """
    tree, turned = root / "FracAtlas", Image.Exif()
    turned[0x0112] = 6
    names = [f"IMG{number:07d}.jpg" for number in range(sum(images))]

    def draw(number: int) -> tuple[Array, Box | None, Array]:
        rng = np.random.default_rng([seed, number])
        sides = size, int(size * rng.uniform(0.55, 1.0))
        height, width = sides[::-1] if rng.random() < 0.3 else sides
        image, box, gap = bone(rng, height=height, width=width, fractured=number < images[0])
        path = tree / "images" / ("Fractured" if box else "Non_fractured") / names[number]
        on_its_side = number == 1
        _save(np.rot90(image, on_its_side), path, **{"exif": turned} if on_its_side else {})
        if number == 3:
            path.write_bytes(path.read_bytes()[:-40])
        return image, box, gap

    drawn = _in_parallel(draw, range(sum(images)))
    parts = "hand leg hip shoulder mixed hardware multiscan fractured fracture_count frontal"
    table = [
        (name, 0, 1, 0, 0, 0, 0, 0, int(box is not None and n != 2), int(box is not None), 1)
        for n, (name, (_, box, _)) in enumerate(zip(names, drawn, strict=True))
    ]
    _write_table(tree / readers.FRAC_TABLE, ["image_id", *parts.split()], table)
    coco = {"images": [], "annotations": [], "categories": [{"id": 0, "name": "fractured"}]}
    for k, (image, (x1, y1, x2, y2), gap) in enumerate(drawn[: images[0]]):
        sides = {"width": image.shape[1], "height": image.shape[0]}
        outlines = [points.ravel().tolist() for points in readers.trace(gap)]
        coco["images"].append({"id": k + 1, **sides, "file_name": names[k]})
        one = {"id": k, "image_id": k + 1, "category_id": 0, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        coco["annotations"].append(one | {"segmentation": outlines})
    (tree / readers.FRAC_BOXES).parent.mkdir(parents=True)
    (tree / readers.FRAC_BOXES).write_text(json.dumps(coco), encoding="utf-8")
    marks = [0, round(0.8 * images[0]), round(0.9 * images[0]), images[0]]
    for k, file in enumerate(readers.FRAC_SPLITS.values()):
        _write_table(tree / file, ("image_id",), [(one,) for one in names[marks[k] : marks[k + 1]]])
    return _marked(root, tree, seed)


def write_tuberculosis(
    root: Path, *, seed: int = 0, images: Pair = (200, 40), size: int = 128
) -> Path:
    """The TB Chest Radiography Database; `images` of Normal and Tuberculosis."""
    tree = root / "TB_Chest_Radiography_Database"

    def write(job: tuple[int, int]) -> None:
        label, name = job[0], readers.TUBERCULOSIS_CLASSES[job[0]]
        rng = np.random.default_rng([seed, *job])
        image, *_ = chest(rng, size=size, pneumonia=bool(label), upper=True, spread=SPREAD)
        _save(image, tree / name / f"{name}-{job[1]}.png")

    _in_parallel(write, [(label, k + 1) for label in (0, 1) for k in range(images[label])])
    return _marked(root, tree, seed)


def write_covid(root: Path, *, seed: int = 0, images: Pair = (90, 90), size: int = 128) -> Path:
    """The COVID-19 Radiography Database, Normal and COVID, with lung masks and a shortcut.

    COVID has opacities, but a share `MARKED` of each class also bears a bright L in the top left
    corner. `TWINS` of the images are another one of their class once more, re-encoded, under a
    name of their own. The truth is in `root`/phantom_truth.csv (path, marker, twin_of).
    """
    tree = root / "COVID-19_Radiography_Dataset"
    jobs = []  # path, marker, path of the image that it repeats, seed; twins come last
    for label, (name, count) in enumerate(zip(readers.COVID_CLASSES, images, strict=True)):
        rng, own = np.random.default_rng([seed, label]), count - int(count * TWINS)
        shown = [*range(own), *rng.permutation(own)[: count - own].tolist()]
        marked = set(rng.permutation(own)[: round(MARKED[label] * own)].tolist())
        paths = [f"{name}/images/{name}-{number + 1}.png" for number in rng.permutation(count)]
        for k, image in enumerate(shown):
            twin_of = paths[image] if k >= own else ""
            jobs.append((paths[k], int(image in marked), twin_of, [seed, 6 + label, image]))

    def write(job: tuple[str, int, str, list[int]]) -> None:
        path, marker, twin_of, key = job
        rng, covid = np.random.default_rng(key), path.startswith("COVID")
        image, _, lungs = chest(rng, size=size, pneumonia=covid, clouds=(2, 5), spread=SPREAD)
        if marker:
            side, start = max(size // 12, 4), max(size // 32, 1)
            thick, end = max(side // 3, 1), start + side
            image[start:end, start : start + thick] = 0.97
            image[end - thick : end, start:end] = 0.97
        if twin_of:  # as another archive might hold it: a little flatter, once through JPEG
            buffer = io.BytesIO()
            flat = ((0.94 * image + 0.03) * 255).round().astype(np.uint8)
            Image.fromarray(flat).save(buffer, "JPEG", quality=70)
            image = np.asarray(Image.open(buffer), dtype=np.float32) / 255
        _save(image, tree / path)
        side = round(size * 256 / 299)  # The real masks are smaller than the images, too.
        mask = Image.fromarray(lungs).resize((side, side), Image.Resampling.NEAREST)
        _save(np.asarray(mask), tree / path.replace("/images/", "/masks/"))

    _in_parallel(write, jobs)
    rows = sorted(job[:3] for job in jobs)
    _write_table(root / "phantom_truth.csv", "path marker twin_of".split(), rows)
    return _marked(root, tree, seed)


def write_medmnist(root: Path, *, name: str) -> Path:
    """The .npz file of a MedMNIST set: chests in PneumoniaMNIST, else a bright patch at place k
    of label k."""
    flag, size, _ = medmnist.parse(name)
    count, arrays = len(medmnist.FLAGS[flag]), {}
    cells = np.array_split(np.arange(size * size), count)

    def draw(rng: Rng, labels: list[int]) -> Array:
        if flag == "pneumoniamnist":
            image = chest(rng, size=size, pneumonia=labels == [1])[0]
        else:
            image = rng.normal(0.4, 0.05, (size, size))
            image.flat[[pixel for label in labels for pixel in cells[label]]] += 0.4
        return (255 * image.clip(0, 1)).round().astype(np.uint8)

    for s, (split, number) in enumerate(MEDMNIST_IMAGES.items()):
        rngs = np.random.default_rng([0, s]).spawn(number + 1)
        shown = [[label] for label in rngs.pop().permutation(np.arange(number) % count).tolist()]
        labels = np.array(shown, np.uint8)
        if flag == "chestmnist":  # each image has none, one or two findings
            shown = [sorted({k, 3 * k % count})[: n % 3] for n, (k,) in enumerate(shown)]
            labels = np.array([[k in some for k in range(count)] for some in shown], np.uint8)
        arrays[f"{split}_images"] = np.stack([draw(*job) for job in zip(rngs, shown, strict=True)])
        arrays[f"{split}_labels"] = labels
    root.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(root / medmnist.file_name(flag, size), **arrays)
    return _marked(root, root, 0)


def _in_parallel(work: Callable, jobs: Iterable) -> list:
    """`work` of every job, in threads: each draws from a generator of its own."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, jobs))


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _marked(root: Path, tree: Path, seed: int) -> Path:
    """`tree`, after a note in `root` that all is synthetic, which comes last."""
    note = f"Synthetic images, drawn by the phantom {VERSION}, seed {seed}. No patients.\n"
    (root / MARKER).write_text(note, encoding="utf-8")
    return tree


def _save(picture: Array, path: Path, **more) -> None:
    """Write grey values in [0, 1] in the format that the name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray((picture * 255.0).round().astype(np.uint8))
    image.save(path, quality=92, **more)
