"""Eight findings to plant in synthetic chest films, each with a look and a place of its own.

A finding is an array `change` [size,size] in [-1, 1]: the share of the lung's air that fluid replaces, or,
below zero, the share of the lung that free air replaces. Looks are exaggerated so that a small detector
learns them from scratch in minutes: they bear the names of real findings and say nothing about them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.special import expit

DEPTH = 2.5  # Free air is shown as deep as this many lungs: its dark is faint on a real film too.
VISIBLE = 0.25  # A box reaches as far as the change is above this share of its greatest value.


@dataclass(frozen=True)
class Lung:
    """One lung on the film: `out` runs from -1 (towards the spine) to 1 (towards the ribs), `y` downwards.

    `x`, `y` are film coordinates in half widths, `floor` the height of the diaphragm at each x, `air` the
    centimetres of aerated lung at each pixel.
    """

    side: int  # -1: the patient's right lung, on the left of the film
    x: np.ndarray
    y: np.ndarray
    out: np.ndarray
    floor: np.ndarray
    air: np.ndarray

    @property
    def pixel(self) -> float:
        """Width of a pixel in film coordinates."""
        return 2 / len(self.x)


def atelectasis(rng: np.random.Generator, lung: Lung) -> np.ndarray:
    """A flat, dense, slightly tilted band above the diaphragm."""
    height, thick = rng.uniform(0.17, 0.27), rng.uniform(0.10, 0.12)
    start, length = rng.uniform(-0.35, -0.15), rng.uniform(0.85, 1.05)
    line = lung.floor.min() - height + rng.uniform(-0.12, 0.12) * lung.out
    inside = _edge(thick / 2 - np.abs(lung.y - line), 0.012)
    return 0.95 * inside * _edge(lung.out - start, 0.04) * _edge(start + length - lung.out, 0.04)


def cardiomegaly(rng: np.random.Generator, lung: Lung) -> np.ndarray:
    """A wide heart: its silhouette reaches far into the patient's left lung, whichever lung is given."""
    wide, tall = rng.uniform(0.43, 0.51), rng.uniform(0.36, 0.42)
    return 0.97 * _disc(
        lung, (rng.uniform(0.10, 0.14), rng.uniform(0.20, 0.25)), (wide, tall), 0.02
    )


def effusion(rng: np.random.Generator, lung: Lung) -> np.ndarray:
    """Fluid at the bottom of a lung, its surface rising towards the ribs like a meniscus."""
    level = lung.floor.min() - rng.uniform(0.05, 0.16)
    rise = rng.uniform(0.16, 0.25) * np.clip(lung.out + 0.5, 0, None) ** 2
    return 0.97 * _edge(lung.y - (level - rise), 0.015)


def infiltrate(rng: np.random.Generator, lung: Lung) -> np.ndarray:
    """A cloud of small faint patches with lung between them."""
    centre = _place(rng, lung, (-0.1, 0.25), (-0.20, 0.15))
    cloud = _disc(lung, centre, (rng.uniform(0.21, 0.27), rng.uniform(0.24, 0.32)), 0.05)
    patches = gaussian_filter(rng.standard_normal(lung.x.shape), 0.034 / lung.pixel)
    return 0.65 * cloud * expit((patches / patches.std() - 0.1) / 0.15)


def mass(rng: np.random.Generator, lung: Lung) -> np.ndarray:
    """A large dense ball."""
    radius = rng.uniform(0.15, 0.20)
    return 0.95 * _disc(
        lung, _place(rng, lung, (-0.05, 0.25), (-0.40, 0.10)), (radius, radius), 0.01
    )


def nodule(rng: np.random.Generator, lung: Lung) -> np.ndarray:
    """A small dense ball."""
    radius = rng.uniform(0.075, 0.09)
    return 0.95 * _disc(
        lung, _place(rng, lung, (-0.25, 0.45), (-0.50, 0.15)), (radius, radius), 0.01
    )


def pneumonia(rng: np.random.Generator, lung: Lung) -> np.ndarray:
    """A whole upper lobe, evenly dense, that ends at a straight fissure."""
    fissure = rng.uniform(-0.16, 0.0) + rng.uniform(-0.06, 0.06) * lung.out
    top = rng.uniform(-0.62, -0.54)
    return 0.85 * _edge(fissure - lung.y, 0.012) * _edge(lung.y - top, 0.05)


def pneumothorax(rng: np.random.Generator, lung: Lung) -> np.ndarray:
    """Free air, black and without vessels, round the apex of a lung that has drawn back from the ribs."""
    gap, bottom = rng.uniform(0.32, 0.46), rng.uniform(-0.05, 0.20)
    drawn_back = (lung.out / (1 - gap)) ** 2 + ((lung.y + 0.04) / (0.82 * (1 - gap))) ** 2
    return (
        -_edge(drawn_back - 1, 0.06) * _edge(bottom - lung.y, 0.03) * _edge(lung.out + 0.45, 0.06)
    )


PAINTERS: dict[str, Callable[[np.random.Generator, Lung], np.ndarray]] = {
    "Atelectasis": atelectasis,
    "Cardiomegaly": cardiomegaly,
    "Effusion": effusion,
    "Infiltrate": infiltrate,
    "Mass": mass,
    "Nodule": nodule,
    "Pneumonia": pneumonia,
    "Pneumothorax": pneumothorax,
}


def paint(name: str, rng: np.random.Generator, lung: Lung) -> np.ndarray:
    """The change that the finding `name` makes in `lung`: 0 outside it (the heart: outside both lungs)."""
    change = PAINTERS[name](rng, lung)
    if name != "Cardiomegaly":
        change = change * (np.abs(lung.out) < 1)
    return change * (lung.air > 0)


def tight_box(effect: np.ndarray) -> tuple[float, float, float, float]:
    """Corners (x1, y1, x2, y2) in pixels of what can be seen of `effect`, a change of the film [size,size].

    >>> effect = np.zeros((6, 6))
    >>> effect[2:4, 1:5] = -1
    >>> tight_box(effect)
    (1.0, 2.0, 5.0, 4.0)
    """
    seen = np.abs(effect) > VISIBLE * np.abs(effect).max()
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _edge(distance: np.ndarray, soft: float) -> np.ndarray:
    """1 where `distance` is positive, 0 where negative, over a width of about `soft`."""
    return expit(distance / soft * 2)


def _disc(
    lung: Lung, centre: tuple[float, float], radii: tuple[float, float], soft: float
) -> np.ndarray:
    reach = np.hypot((lung.x - centre[0]) / radii[0], (lung.y - centre[1]) / radii[1])
    return _edge((1 - reach) * min(radii), soft)


def _place(
    rng: np.random.Generator, lung: Lung, out: tuple[float, float], down: tuple[float, float]
) -> tuple[float, float]:
    """Film coordinates of a random spot of the lung: `out` across it, `down` on the film."""
    across, level = rng.uniform(*out), rng.uniform(*down)
    nearest = np.argmin((lung.out - across) ** 2 + (lung.y - level) ** 2)
    return float(lung.x.flat[nearest]), float(lung.y.flat[nearest])
