"""Synthetic chest films in a data set's own tree, junk included: the default when no real data is there.

They are drawn from physics, not from patients: X-rays pass through simple solids (Beer-Lambert), the detector
counts photons (Poisson) and blurs. Nothing medical can be learnt from them.
"""

from __future__ import annotations

import io
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom
from scipy.special import expit

VERSION = 2  # Raise it when the pictures change: a phantom written by an older version is then not reused.
MARKER = "SYNTHETIC.txt"
IMAGES = {"train": (96, 144), "val": (8, 8), "test": (24, 40)}

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
    body = _body(anatomy, x, y)
    path = SOFT * body + (BONE - SOFT) * _bones(anatomy, x, y) * np.minimum(body, 1)
    path -= (SOFT - LUNG) * np.maximum(aerated * _texture(rng, size) - _vessels(anatomy, x, y) * (air > 0), 0)
    path -= SOFT * _airways(anatomy, x, y)
    return _film(rng, path), (fluid > 0.3) & (air > 1.0)


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
        centre = side * (0.43 + 0.12 * np.clip(y, -0.7, 0.6))
        width = anatomy.lung * (1 + 0.20 * np.clip(y, -0.7, 0.6))
        lung = _dome((x - centre) / width, y, (0, -0.04), (1, 0.82), 2.3)
        floor = anatomy.dome + (0.0 if side < 0 else 0.06) + 1.1 * (x - side * 0.36) ** 2
        total += lung * expit((floor - y) / 0.012)
    heart = _dome(x, y, (0.09, 0.24), (anatomy.heart, 0.30)) + 0.8 * _dome(x, y, (0.02, -0.25), (0.14, 0.45))
    return 0.74 * anatomy.depth * np.maximum(total - 0.75 * heart, 0)


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
    note = f"Synthetic films, drawn by dlia_utils.phantom {VERSION}, seed {seed}. No patient data.\n"
    (root / MARKER).write_text(note, encoding="utf-8")
    return tree


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


def _save(picture: np.ndarray, path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray((picture * 255.0).round().astype(np.uint8)).save(buffer, kind, quality=92)
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
