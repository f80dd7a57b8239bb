"""Films drawn from physics, not from patients: nothing medical can be learnt from them.

X-rays pass through simple solids (Beer-Lambert), the detector counts photons (Poisson) and blurs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, zoom
from scipy.special import expit

from . import findings

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
    return chest_with_lungs(rng, size=size, diseased=pneumonia, anatomy=anatomy)[:2]


def chest_with_lungs(
    rng: np.random.Generator,
    *,
    size: int,
    diseased: bool,
    upper: bool = False,
    spread: float = 1.0,
    anatomy: Anatomy | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `chest`, and the mask of the aerated lungs, bool [size,size].

    `upper` centres the opacities high up; `spread` multiplies how differently the patients are placed.

    >>> image, lesion, lungs = chest_with_lungs(np.random.default_rng(0), size=48, diseased=True, upper=True)
    >>> bool((lesion <= lungs).all()), 0.1 < float(lungs.mean()) < 0.5
    (True, True)
    """
    anatomy = anatomy or Anatomy.draw(rng)
    x, y = _pose(rng, size, spread=spread)
    air = _lungs(anatomy, x, y)
    fluid = _opacities(rng, air, lowest=0.42 if upper else 1.0) if diseased else np.zeros_like(air)
    aerated = air * (1 - 0.85 * fluid)
    aerated = np.maximum(aerated * _texture(rng, size) - _vessels(anatomy, x, y) * (air > 0), 0)
    lungs = air > 1.0
    return _film(rng, _attenuation(anatomy, x, y, aerated)), (fluid > 0.3) & lungs, lungs


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
    tissue = findings.DEPTH * (
        SOFT * air - (SOFT - LUNG) * aerated
    )  # what free air takes the place of
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
) -> tuple[np.ndarray, tuple[float, float, float, float] | None, np.ndarray]:
    """A film of a long bone, float32 [height,width]; the box (x1, y1, x2, y2) of its fracture's gap; its mask.

    The mask, bool [height,width], is the gap and a rim of bone; the box encloses it. Without a fracture the
    box is None and the mask empty.

    >>> image, box, gap = bone(np.random.default_rng(0), height=96, width=64, fractured=True)
    >>> image.shape, box is not None, 20 < int(gap.sum()) < 600
    ((96, 64), True, True)
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
    near = (distance < gap / 2 + 0.3 * radius) & (np.abs(side) < wide) & fractured
    return image, findings.tight_box(near.astype(float)) if fractured else None, near


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


def _pose(
    rng: np.random.Generator, size: int, *, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Patient coordinates of every pixel: x to the right, y downwards, a little turned, moved and scaled."""
    across, down = _grid(size)
    turn, scale = rng.normal(0, 0.026 * spread), rng.normal(1.0, 0.035 * spread)  # radians
    x = (across * math.cos(turn) + down * math.sin(turn)) / scale - rng.normal(0, 0.03 * spread)
    y = (down * math.cos(turn) - across * math.sin(turn)) / scale - rng.normal(0, 0.03 * spread)
    return x, y


def _dome(
    x: np.ndarray,
    y: np.ndarray,
    centre: tuple[float, float],
    radii: tuple[float, float],
    power: float = 2.0,
) -> np.ndarray:
    """Relative thickness (0..1) of a super-ellipsoid seen from the front."""
    reach = (
        np.abs((x - centre[0]) / radii[0]) ** power + np.abs((y - centre[1]) / radii[1]) ** power
    )
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
    heart = _dome(x, y, (0.09, 0.24), (anatomy.heart, 0.30)) + 0.8 * _dome(
        x, y, (0.02, -0.25), (0.14, 0.45)
    )
    return 0.74 * anatomy.depth * np.maximum(total - 0.75 * heart, 0)


def _across(anatomy: Anatomy, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    """Position across the lung of one side: -1 at the left of the film, 1 at the right edge of that lung."""
    centre = side * (0.43 + 0.12 * np.clip(y, -0.7, 0.6))
    width = anatomy.lung * (1 + 0.20 * np.clip(y, -0.7, 0.6))
    return (x - centre) / width


def _floor(anatomy: Anatomy, x: np.ndarray, side: int) -> np.ndarray:
    """Height of the diaphragm under the lung of one side."""
    return anatomy.dome + (0.0 if side < 0 else 0.06) + 1.1 * (x - side * 0.36) ** 2


def _lung(
    anatomy: Anatomy, x: np.ndarray, y: np.ndarray, air: np.ndarray, side: int
) -> findings.Lung:
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
        back = y - (
            level - 0.10 * np.sin(np.pi * np.minimum(reach / 0.5, 1)) + anatomy.slope * reach**2
        )
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
        near = (np.hypot(out, down) < 0.73) & (
            out > -0.05
        )  # Beyond, the vessels have no width left.
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


def _opacities(rng: np.random.Generator, air: np.ndarray, *, lowest: float = 1.0) -> np.ndarray:
    """Share of the air replaced by fluid (0..1): one to three soft, patchy clouds centred in the lungs.

    No centre lies further down the film than the share `lowest` of its height.
    """
    size = len(air)
    x, y = _grid(size)
    places = np.flatnonzero((air > 0.5 * air.max()) & (y < 2 * lowest - 1))
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
