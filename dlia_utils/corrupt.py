"""Radiographs made worse on purpose: corruptions in five severities, whatever the batch.

What is drawn for an image depends on (seed, corruption, image id) alone, so that severities differ
in strength only. Scales: "imagenet-c" (Hendrycks & Dietterich, arXiv 1903.12261), harsh for
radiographs, and "medmnist-c" (Di Salvo et al., arXiv 2406.17536, for PneumoniaMNIST); the others
have our own scale. Lengths in pixels hold for a shorter side of 224 and grow with it.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .units import check_numbers

SCALES = ("imagenet-c", "medmnist-c")
SEVERITIES = (1, 2, 3, 4, 5)
THESIS = ("gaussian_noise", "speckle_noise", "motion_blur", "contrast", "brightness")
SIDE = 224  # pixels for which lengths are given
DENSITY = 3.0  # black to white: the natural logarithm of about 20 in transmitted light
Rngs = list[np.random.Generator]  # one of each image, from (seed, corruption, id)


class Corruption(NamedTuple):
    """A function and its parameters of severities 1 to 5 under each of `SCALES`, or under "own"."""

    function: Callable[..., Tensor]
    levels: dict[str, Sequence[float | tuple[float, ...]]]

    def parameters(self, severity: int, scale: str) -> tuple[float, ...]:
        """What the function is given at `severity` 1 to 5."""
        level = self.levels.get(scale, self.levels.get("own"))[severity - 1]
        return level if isinstance(level, tuple) else (level,)


CORRUPTIONS: dict[str, Corruption] = {}


def _register(**levels: Sequence[float | tuple[float, ...]]) -> Callable:
    """Enter a function under its name; keywords are scales (_ for -), a level is its parameters."""

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        by_scale = {name.replace("_", "-"): five for name, five in levels.items()}
        CORRUPTIONS[function.__name__] = Corruption(function, by_scale)
        return function

    return enter


@torch.no_grad()
def apply(
    name: str,
    images: Tensor,
    severity: int,
    *,
    seed: int | Sequence[int],
    ids: Sequence[int] | Tensor,
    scale: str = "imagenet-c",
) -> Tensor:
    """Corrupt a batch: a new tensor like `images`, [B,1|3,H,W] in [0,1]; severity 0 returns a copy.

    name: a key of `CORRUPTIONS`. ids: one integer per image, such as its row in the manifest: it
    keeps its noise whatever batch it comes in. ValueError for unknown names, severities, pixels.

    >>> x = torch.full((2, 1, 8, 8), 0.5)
    >>> noisy = apply("gaussian_noise", x, 2, seed=0, ids=[4, 9])
    >>> torch.equal(noisy[1:], apply("gaussian_noise", x[1:], 2, seed=0, ids=[9]))
    True
    """
    if name not in CORRUPTIONS or scale not in SCALES:
        raise ValueError(f"no {name!r}, scale {scale!r}: {', '.join([*CORRUPTIONS, *SCALES])}")
    check_numbers("[0,5]", whole=True, severity=severity)
    if len(ids) != len(images):
        raise ValueError(f"ids must be {len(images)} integers, one per image, not {len(ids)}")
    low, high = (v.item() for v in images.aminmax())
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # NaN compares false with everything
        span = f"[{low:.4g}, {high:.4g}]"
        raise ValueError(f"images must lie in [0,1] but span {span}: corrupt before normalisation")
    if not severity:
        return images.clone()
    x, corruption = images.float().clamp(0, 1), CORRUPTIONS[name]
    # Channels that are equal stay so: one is enough, and three times as fast.
    grey = x.shape[1] > 1 and bool((x == x[:, :1]).all())
    words = [*np.ravel(seed).tolist(), zlib.crc32(name.encode())]
    rngs = [np.random.default_rng([*words, int(i)]) for i in ids]
    parameters = corruption.parameters(severity, scale)
    found = corruption.function(x[:, :1] if grey else x, rngs, *parameters)
    return found.clamp_(0, 1).expand_as(x).contiguous().to(images.dtype)


@_register(imagenet_c=(0.08, 0.12, 0.18, 0.26, 0.38), medmnist_c=(0.04, 0.05, 0.06, 0.07, 0.08))
def gaussian_noise(x: Tensor, rngs: Rngs, sigma: float) -> Tensor:
    """x + sigma n, n standard normal; sigma in units of [0,1]."""
    return x + sigma * _normal(x, rngs)


@_register(imagenet_c=(0.15, 0.2, 0.35, 0.45, 0.6), medmnist_c=(0.05, 0.07, 0.10, 0.15, 0.20))
def speckle_noise(x: Tensor, rngs: Rngs, sigma: float) -> Tensor:
    """x + sigma x n, n standard normal: in proportion to the grey value."""
    return x + sigma * x * _normal(x, rngs)


_MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))


@_register(imagenet_c=_MOTION, medmnist_c=((5, 5), (9, 7), (9, 10), (13, 10), (17, 12)))
def motion_blur(x: Tensor, rngs: Rngs, radius: float, sigma: float) -> Tensor:
    """Half a Gaussian of 2 radius + 1 whole-pixel steps along a line, of U(-45, 45) degrees.

    The kernel has one side only: it also moves the content by up to 0.8 sigma. "medmnist-c" takes
    the constants of BreastMNIST.
    """
    height, width = x.shape[2:]
    zoom = min(height, width) / SIDE
    steps = np.arange(2 * round(radius * zoom) + 1)
    weights = np.exp(-0.5 * (steps / (sigma * zoom)) ** 2)
    weights /= weights.sum()
    result, reach = torch.zeros_like(x), len(steps)
    for image, blurred, rng in zip(x, result, rngs, strict=True):
        angle = rng.uniform(-math.pi / 4, math.pi / 4)
        down, right = (np.rint(steps * part).astype(int) for part in (np.sin(angle), np.cos(angle)))
        padded = torch.nn.functional.pad(image[None], [reach] * 4, mode="replicate")[0]
        for weight, dy, dx in zip(weights.tolist(), reach + down, reach + right, strict=True):
            blurred.add_(padded[:, dy : dy + height, dx : dx + width], alpha=weight)
    return result


@_register(imagenet_c=(0.4, 0.3, 0.2, 0.1, 0.05), medmnist_c=(0.9, 0.8, 0.7, 0.6, 0.4))
def contrast(x: Tensor, rngs: Rngs, factor: float) -> Tensor:
    """mean + factor (x - mean), the mean of each image and channel."""
    mean = x.double().mean((2, 3), keepdim=True).to(x)  # in double: the batch does not matter
    return mean + factor * (x - mean)


_ADD = [(step / 10, 1) for step in SEVERITIES]
_MULTIPLY = [(0, 1 + step / 10) for step in SEVERITIES]


@_register(imagenet_c=_ADD, medmnist_c=_MULTIPLY)
def brightness(x: Tensor, rngs: Rngs, add: float, factor: float) -> Tensor:
    """The value V of HSV, the largest channel, becomes factor V + add; hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    hue = torch.where(value > 0, x / value.clamp_min(torch.finfo(x.dtype).tiny), 1.0)
    return hue * (factor * value + add).clamp(0, 1)


@_register(imagenet_c=(60, 25, 12, 5, 3), medmnist_c=(300, 200, 150, 100, 80))
def shot_noise(x: Tensor, rngs: Rngs, photons: float) -> Tensor:
    """Poisson counts of mean photons x, over photons: white is light, as in a photograph."""
    return _poisson(photons * x, rngs) / photons


@_register(own=(1600, 800, 400, 200, 100))
def poisson_dose(x: Tensor, rngs: Rngs, photons: float) -> Tensor:
    """A lower dose: Poisson counts behind the patient, then their logarithm; white is noisier."""
    counts = _poisson(photons * torch.exp(-DENSITY * x), rngs)
    return -torch.log(counts.clamp_min(0.5) / photons) / DENSITY  # no photon has no logarithm


@_register(own=(0.25, 0.5, 1, 2, 4))
def scatter_veil(x: Tensor, rngs: Rngs, ratio: float) -> Tensor:
    """Scattered light: ratio times the transmitted light, spread over an eighth of the side.

    From the scatter over primary of a good grid to that of the mediastinum without a grid.
    """
    light = torch.exp(-DENSITY * x)
    height, width = (_blur_matrix(n, 0.125 * min(x.shape[2:])).to(x) for n in x.shape[2:])
    veiled = (light + ratio * _along_axes(light, height, width)) / (1 + ratio)
    return -torch.log(veiled) / DENSITY


@_register(own=(0.02, 0.04, 0.06, 0.09, 0.12))
def collimation(x: Tensor, rngs: Rngs, share: float) -> Tensor:
    """Four black blades over 0.5 to 1.5 times `share` of the side, up to 3 degrees askew."""
    height, width = x.shape[2:]
    masks = []
    for rng in rngs:
        turn, *blades = rng.uniform(-1, 1, 5)
        across, down = _pixels(x)
        across, down = _turned(across - width / 2, down - height / 2, 3 * turn)
        right, low = across / width, down / height
        inside = zip((0.5 + right, 0.5 - right, 0.5 + low, 0.5 - low), blades, strict=True)
        # The edge is soft over a hundredth of the side: the focal spot has a size.
        soft = [(edge - share * (1 + blade / 2)) / 0.01 + 0.5 for edge, blade in inside]
        masks.append(np.clip(np.min(soft, axis=0), 0, 1))
    return x * torch.from_numpy(np.stack(masks)[:, None]).to(x)


# The strokes of the markers' letters as x1, y1, x2, y2 in units of the letter's height.
STROKE, LETTER_WIDTH = 0.16, 0.7
_STEM, _ARC = (0.08, 0.08, 0.08, 0.92), np.linspace(0, math.pi, 9)
_BOW = [(0.38 + 0.22 * math.sin(a), 0.30 - 0.22 * math.cos(a)) for a in _ARC]
_LEGS = [(0.08, 0.08, 0.38, 0.08), (0.38, 0.52, 0.08, 0.52), (0.36, 0.52, 0.62, 0.92)]
_CURVE = [(*a, *b) for a, b in zip(_BOW, _BOW[1:], strict=False)]
LETTERS = {"L": [_STEM, (0.08, 0.92, 0.62, 0.92)], "R": [_STEM, *_CURVE, *_LEGS]}


@_register(own=(0.05, 0.08, 0.12, 0.17, 0.23))
def marker(x: Tensor, rngs: Rngs, height: float) -> Tensor:
    """A white L or R in the upper right or left, `height` high, up to 10 degrees askew."""
    across, down = _pixels(x)
    shorter = min(x.shape[2:])
    tall, margin, wide = height * shorter, 0.05 * shorter, LETTER_WIDTH * height * shorter
    result = x.clone()
    for image, rng in zip(result, rngs, strict=True):
        side, turn = rng.uniform(-1, 1, 2)
        middle = x.shape[3] - margin - wide / 2 if side > 0 else margin + wide / 2
        # All that the letter can reach; to draw the rest would cost ten times the time.
        rows = slice(0, math.ceil(margin + 1.25 * tall))
        columns = slice(max(math.floor(middle - 0.75 * tall), 0), math.ceil(middle + 0.75 * tall))
        u, v = _turned(across[:, columns] - middle, down[rows] - margin - tall / 2, 10 * turn)
        u, v = (u + wide / 2) / tall, (v + tall / 2) / tall
        strokes = LETTERS["L" if side > 0 else "R"]
        distance = np.min([_to_segment(u, v, *stroke) for stroke in strokes], axis=0)
        shape = torch.from_numpy(np.clip((STROKE / 2 - distance) * tall + 0.5, 0, 1)).to(x)
        image[:, rows, columns] = torch.maximum(image[:, rows, columns], shape)
    return result


@_register(own=(0.02, 0.03, 0.045, 0.065, 0.09))
def grid_lines(x: Tensor, rngs: Rngs, amplitude: float) -> Tensor:
    """The shadow of an anti-scatter grid that stood still: a sine of `amplitude`.

    Lines are vertical or horizontal, up to 2 degrees askew, 3 to 6 pixels apart at 224 px.
    """
    waves = []
    for rng in rngs:
        along, turn, apart, phase = rng.uniform(-1, 1, 4)
        period = max((4.5 + 1.5 * apart) * min(x.shape[2:]) / SIDE, 2.5)
        path, _ = _turned(*_pixels(x), 2 * turn + (90 if along > 0 else 0))
        waves.append(np.sin(2 * math.pi * path / period + math.pi * phase))
    return x + amplitude * torch.from_numpy(np.stack(waves)[:, None]).to(x)


@_register(imagenet_c=(0.6, 0.5, 0.4, 0.3, 0.25), medmnist_c=(0.8, 0.7, 0.6, 0.5, 0.4))
def resampling(x: Tensor, rngs: Rngs, share: float) -> Tensor:
    """Stored at `share` of its height and width (cell means), shown in blocks: "pixelate"."""
    sizes = [(n, max(int(share * n), 1)) for n in x.shape[2:]]
    stored = _along_axes(x, *(_cell_matrix(n, cells).to(x) for n, cells in sizes))
    down, right = (((torch.arange(n) + 0.5) * cells / n).long().to(x.device) for n, cells in sizes)
    return stored.index_select(3, right).index_select(2, down)


@_register(own=(6, 5, 4, 3, 2))
def bit_depth(x: Tensor, rngs: Rngs, bits: float) -> Tensor:
    """Rounded to 2^bits grey values."""
    return torch.round(x * (2**bits - 1)) / (2**bits - 1)


@_register(imagenet_c=(25, 18, 15, 10, 7), medmnist_c=(50, 30, 15, 10, 7))
def jpeg(x: Tensor, rngs: Rngs, quality: int) -> Tensor:
    """Through 8-bit JPEG (libjpeg) of that quality; equal channels as a grey file."""
    stored = []
    for image in x.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        grey = (image == image[..., :1]).all()
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if grey else image).save(file, "JPEG", quality=quality)
        pixels = np.asarray(Image.open(file))
        stored.append(np.broadcast_to(pixels[..., None], image.shape) if grey else pixels)
    return torch.from_numpy(np.stack(stored)).permute(0, 3, 1, 2).to(x) / 255


def _normal(x: Tensor, rngs: Rngs) -> Tensor:
    """Standard normal numbers [B,1,H,W]: channels share them."""
    fields = [rng.standard_normal((1, *x.shape[2:]), np.float32) for rng in rngs]
    return torch.from_numpy(np.stack(fields)).to(x)


def _poisson(mean: Tensor, rngs: Rngs) -> Tensor:
    """Counts of that mean, float32: where channels are equal their counts are."""
    counts = np.empty(mean.shape, np.float32)
    for image, found, rng in zip(mean.cpu().numpy(), counts, rngs, strict=True):
        state = rng.bit_generator.state
        for place, channel in enumerate(image):
            rng.bit_generator.state = state
            found[place] = rng.poisson(channel)
    return torch.from_numpy(counts).to(mean)


def _to_segment(u: np.ndarray, v: np.ndarray, *ends: float) -> np.ndarray:
    """Distance of the points (u, v) from the segment x1, y1, x2, y2."""
    x1, y1, x2, y2 = ends
    dx, dy = x2 - x1, y2 - y1
    share = np.clip(((u - x1) * dx + (v - y1) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(u - x1 - share * dx, v - y1 - share * dy)


def _pixels(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The middles of the pixels, in pixels: to the right [1,W] and down [H,1]."""
    height, width = x.shape[2:]
    return np.arange(width)[None] + 0.5, np.arange(height)[:, None] + 0.5


def _turned(across: np.ndarray, down: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return across * cos + down * sin, down * cos - across * sin


def _along_axes(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns^T, one by one: rounding must not depend on the batch."""
    images = [[rows @ channel @ columns.T for channel in image] for image in x]
    return torch.stack([torch.stack(channels) for channels in images])


def _blur_matrix(n: int, sigma: float) -> Tensor:
    """Gaussian blur of n pixels as a matrix [n,n]; beyond the border the image is mirrored."""
    place = torch.arange(n, dtype=torch.float64)
    away, added = place[:, None] - place, place[:, None] + place + 1
    weights = sum(torch.exp(-0.5 * (d / sigma) ** 2) for d in (away, added, added - 2 * n))
    return weights / weights.sum(1, keepdim=True)


def _cell_matrix(n: int, cells: int) -> Tensor:
    """The means over `cells` equal parts of n pixels as a matrix [cells,n]."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * n / cells
    pixel = torch.arange(n, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return overlap.clamp_min(0) * cells / n


@dataclass(eq=False)
class TrainAugmentor(Dataset):
    """A data set of (x [C,H,W], y, row) whose images are clean or corrupted, drawn anew each epoch.

    Clean with chance 1 / (1 + number of names), else a name and one of five severities, all alike.
    The draw depends on `seed`, epoch and row.

    >>> TrainAugmentor([(torch.full((1, 8, 8), 0.5), 1, 4)])[0][1:]
    (1, 4)
    """

    dataset: Dataset
    names: Sequence[str] = THESIS
    seed: int = 0
    scale: str = SCALES[0]
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is drawn, here and in the data set inside if it has epochs."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def choice(self, row: int) -> tuple[str | None, int]:
        """Name and severity drawn for an image in this epoch; (None, 0) when it stays clean."""
        rng = np.random.default_rng([self.seed, self.epoch, row])
        name, severity = rng.integers(len(self.names) + 1), rng.choice(SEVERITIES)
        return (self.names[name - 1], int(severity)) if name else (None, 0)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        x, y, row = self.dataset[index]
        name, severity = self.choice(row)
        if name is not None:
            seed = (self.seed, self.epoch)
            x = apply(name, x[None], severity, seed=seed, ids=[row], scale=self.scale)[0]
        return x, y, row
