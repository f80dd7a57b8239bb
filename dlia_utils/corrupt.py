"""Radiographs made worse on purpose: corruptions in five severities, the same for an image in any batch.

Images are float tensors [B,1|3,H,W] in [0,1], pixels before normalisation, as everywhere in this package:
the models own their mean and std. What is drawn for an image depends on (seed, corruption, image id) alone.
It does not depend on the severity: severities of one image differ in strength and in nothing else.

Scales: "imagenet-c" (Hendrycks & Dietterich, arXiv 1903.12261), which the original study used and which is
harsh for radiographs, and "medmnist-c" (Di Salvo et al., arXiv 2406.17536; the constants of its PneumoniaMNIST set
unless said otherwise). Corruptions without a published scale have our own. Lengths in pixels hold for a
shorter side of 224 and grow with it.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SCALES = ("imagenet-c", "medmnist-c")
SEVERITIES = (1, 2, 3, 4, 5)
SIDE = 224  # pixels for which lengths are given
DENSITY = 3.0  # black to white on a film: the natural logarithm of about 20 in transmitted light


@dataclass(frozen=True)
class Corruption:
    """One entry of `CORRUPTIONS`: the function, whose docstring has the source, and its parameters by scale.

    `levels` holds those of severities 1 to 5 under each of `SCALES`, or under "own" where none is published.
    """

    name: str
    function: Callable[..., Tensor]
    levels: dict[str, tuple[tuple[float, ...], ...]]

    def parameters(self, severity: int, scale: str) -> tuple[float, ...]:
        """What the function is given at `severity` 1 to 5."""
        return self.levels.get(scale, self.levels.get("own"))[severity - 1]


CORRUPTIONS: dict[str, Corruption] = {}
THESIS = ("gaussian_noise", "speckle_noise", "motion_blur", "contrast", "brightness")


@dataclass(frozen=True)
class Draws:
    """Random numbers of a batch, each image's from `words` and its own id; `per_channel`: R, G, B differ.

    >>> one, two = Draws((0,), [7]), Draws((0,), [3, 7])
    >>> x = torch.zeros(2, 1, 4, 4)
    >>> torch.equal(one.normal(x[:1])[0], two.normal(x)[1])
    True
    """

    words: tuple[int, ...]
    ids: Sequence[int]
    per_channel: bool = field(default=False, kw_only=True)

    def generators(self) -> list[np.random.Generator]:
        """A fresh generator for each image."""
        return [np.random.default_rng([*self.words, i]) for i in self.ids]

    def normal(self, x: Tensor) -> Tensor:
        """Standard normal numbers [B,1,H,W], or [B,C,H,W] per channel."""
        shape = (x.shape[1] if self.per_channel else 1, *x.shape[2:])
        fields = [rng.standard_normal(shape, dtype=np.float32) for rng in self.generators()]
        return torch.from_numpy(np.stack(fields)).to(x)

    def poisson(self, mean: Tensor) -> Tensor:
        """Counts of that mean, float32. Channels draw from one state: equal means, equal counts."""
        fields = []
        for image, rng in zip(mean.cpu().numpy(), self.generators(), strict=True):
            state = rng.bit_generator.state
            channels = []
            for channel in image:
                if not self.per_channel:
                    rng.bit_generator.state = state
                channels.append(rng.poisson(channel))
            fields.append(np.stack(channels))
        return torch.from_numpy(np.stack(fields).astype(np.float32)).to(mean)

    def uniform(self, low: float, high: float, count: int) -> np.ndarray:
        """`count` numbers of each image, float64 [B,count]."""
        return np.stack([rng.uniform(low, high, count) for rng in self.generators()])


def _register(**levels: Sequence[float | tuple[float, ...]]) -> Callable:
    """Enter a function under its own name; keywords are scales (with _ for -), a level is its parameters."""

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        table = {
            scale.replace("_", "-"): tuple(
                one if isinstance(one, tuple) else (one,) for one in five
            )
            for scale, five in levels.items()
        }
        CORRUPTIONS[function.__name__] = Corruption(function.__name__, function, table)
        return function

    return enter


# ------------------------------------------------------------------------------------------- the way in


@torch.no_grad()
def apply(
    name: str,
    images: Tensor,
    severity: int,
    *,
    seed: int,
    ids: Sequence[int] | Tensor,
    scale: str = "imagenet-c",
    per_channel: bool = False,
) -> Tensor:
    """Corrupt a batch: a new tensor like `images`, [B,1|3,H,W] in [0,1]; severity 0 returns a copy.

    name: a key of `CORRUPTIONS`. severity: 0 to 5. ids: one integer >= 0 per image, such as its row in the
    manifest: it keeps its noise whatever batch it comes in. scale: see `SCALES`; corruptions with a scale of
    our own ignore it. Noise is the same in R, G and B, so that a grey film stays grey, unless `per_channel`.
    Errors: ValueError/TypeError for an unknown name, images outside [0,1], NaN, bad ids or severity.

    >>> films = torch.full((2, 1, 8, 8), 0.5)
    >>> noisy = apply("gaussian_noise", films, 2, seed=0, ids=[4, 9])
    >>> torch.equal(noisy[1:], apply("gaussian_noise", films[1:], 2, seed=0, ids=[9]))
    True
    """
    ids = _check(name, images, severity, seed, ids, scale)
    draws = Draws(_words(name, seed), ids, per_channel=per_channel)
    return _corrupt(name, images, severity, draws, scale)


def _words(name: str, seed: int, *more: int) -> tuple[int, ...]:
    return seed, *more, zlib.crc32(name.encode())


def _corrupt(name: str, images: Tensor, severity: int, draws: Draws, scale: str) -> Tensor:
    if not severity:
        return images.clone()
    x = images.detach().float().clamp(0, 1)
    corruption = CORRUPTIONS[name]
    # Channels that are equal stay so: one is enough, and three times as fast.
    grey = x.shape[1] > 1 and not draws.per_channel and bool((x == x[:, :1]).all())
    result = corruption.function(
        x[:, :1] if grey else x, draws, *corruption.parameters(severity, scale)
    )
    return result.clamp_(0, 1).expand_as(x).contiguous().to(images.dtype)


def _check(
    name: str, images: Tensor, severity: int, seed: int, ids: Sequence[int] | Tensor, scale: str
) -> list[int]:
    """Refuse what would give a wrong image without a word; returns the ids as integers."""
    _check_names([name], scale)
    _check_severity(severity)
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(
            "images must be a floating-point tensor in [0,1]; for uint8 use images.float() / 255"
        )
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images must be a non-empty batch [B,1|3,H,W], not {tuple(images.shape)}")
    low, high = (v.item() for v in images.detach().aminmax())
    if not low - high <= 0:  # NaN compares false with everything
        raise ValueError("images contain NaN")
    if low < -1e-6 or high > 1 + 1e-6:
        raise ValueError(
            f"images must lie in [0,1] but span [{low:.4g}, {high:.4g}]: corrupt before normalisation"
        )
    if not _whole(seed) or seed < 0:
        raise ValueError(f"seed must be a whole number >= 0, not {seed!r}")
    ids = [int(i) for i in ids]
    if len(ids) != len(images) or min(ids) < 0:
        raise ValueError(
            f"ids must be {len(images)} integers >= 0, one per image, not {len(ids)}: {ids[:5]}"
        )
    return ids


def _check_severity(severity: int) -> None:
    if not _whole(severity) or severity not in (0, *SEVERITIES):
        raise ValueError(
            f"severity must be a whole number from 0 (unchanged) to 5, not {severity!r}"
        )


def _whole(number: object) -> bool:
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def _check_names(names: Sequence[str], scale: str) -> None:
    for name in names:
        if name not in CORRUPTIONS:
            raise ValueError(f"corruption must be one of {', '.join(CORRUPTIONS)}, not {name!r}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, not {scale!r}")


# ------------------------------------------------------------------------------------------- the thesis' five


@_register(imagenet_c=(0.08, 0.12, 0.18, 0.26, 0.38), medmnist_c=(0.04, 0.05, 0.06, 0.07, 0.08))
def gaussian_noise(x: Tensor, draws: Draws, sigma: float) -> Tensor:
    """x + sigma n, n standard normal; sigma in units of [0,1]. Scales: arXiv 1903.12261, 2406.17536.

    >>> gaussian_noise(torch.full((1, 1, 64, 64), 0.5), Draws((0,), [0]), 0.1).std().round(decimals=2)
    tensor(0.1000)
    """
    return x + sigma * draws.normal(x)


@_register(imagenet_c=(0.15, 0.2, 0.35, 0.45, 0.6), medmnist_c=(0.05, 0.07, 0.10, 0.15, 0.20))
def speckle_noise(x: Tensor, draws: Draws, sigma: float) -> Tensor:
    """x + sigma x n, n standard normal: in proportion to the grey value. Scales: arXiv 1903.12261, 2406.17536.

    >>> speckle_noise(torch.zeros(1, 1, 8, 8), Draws((0,), [0]), 0.6).abs().max()
    tensor(0.)
    """
    return x + sigma * x * draws.normal(x)


@_register(
    imagenet_c=((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    medmnist_c=((5, 5), (9, 7), (9, 10), (13, 10), (17, 12)),
)
def motion_blur(x: Tensor, draws: Draws, radius: float, sigma: float) -> Tensor:
    """Half a Gaussian of 2 radius + 1 whole-pixel steps along a line, angle from U(-45, 45) degrees.

    Pixels at 224 px, borders repeated. ImageNet-C's kernel has one side only: it also moves the content by up
    to 0.8 sigma. MedMNIST-C has no motion blur for chest films; "medmnist-c" takes its BreastMNIST constants.

    >>> line = torch.zeros(1, 1, 224, 224).index_fill(3, torch.tensor(112), 1.0)
    >>> motion_blur(line, Draws((0,), [0]), 10, 3).max() < 0.5
    tensor(True)
    """
    height, width = x.shape[2:]
    zoom = min(height, width) / SIDE
    steps = np.arange(2 * round(radius * zoom) + 1)
    weights = np.exp(-0.5 * (steps / (sigma * zoom)) ** 2)
    weights /= weights.sum()
    result = torch.zeros_like(x)
    for image, blurred, (angle,) in zip(
        x, result, draws.uniform(-math.pi / 4, math.pi / 4, 1), strict=True
    ):
        down, right = (
            np.rint(steps * part).astype(int) for part in (math.sin(angle), math.cos(angle))
        )
        reach = len(steps)
        padded = torch.nn.functional.pad(image[None], [reach] * 4, mode="replicate")[0]
        for weight, dy, dx in zip(
            weights.tolist(), (reach + down).tolist(), (reach + right).tolist(), strict=True
        ):
            blurred.add_(padded[:, dy : dy + height, dx : dx + width], alpha=weight)
    return result


@_register(imagenet_c=(0.4, 0.3, 0.2, 0.1, 0.05), medmnist_c=(0.9, 0.8, 0.7, 0.6, 0.4))
def contrast(x: Tensor, draws: Draws | None, factor: float) -> Tensor:
    """mean + factor (x - mean), the mean of each image and channel. Scales: arXiv 1903.12261, 2406.17536.

    >>> contrast(torch.tensor([[[[0.0, 1.0]]]]), None, 0.4)
    tensor([[[[0.3000, 0.7000]]]])
    """
    mean = (
        x.double().mean((2, 3), keepdim=True).to(x)
    )  # In double, rounding does not depend on the batch.
    return mean + factor * (x - mean)


@_register(
    imagenet_c=((0.1, 1), (0.2, 1), (0.3, 1), (0.4, 1), (0.5, 1)),
    medmnist_c=((0, 1.1), (0, 1.2), (0, 1.3), (0, 1.4), (0, 1.5)),
)
def brightness(x: Tensor, draws: Draws | None, add: float, factor: float) -> Tensor:
    """The value V of HSV, the largest channel, becomes factor V + add; hue and saturation stay.

    ImageNet-C adds, MedMNIST-C multiplies (its "brightness up"). Scales: arXiv 1903.12261, 2406.17536.

    >>> brightness(torch.tensor([0.2, 0.4]).reshape(1, 1, 1, 2), None, 0.5, 1)
    tensor([[[[0.7000, 0.9000]]]])
    """
    if x.shape[1] == 1:
        return factor * x + add
    value = x.amax(1, keepdim=True)
    hue = torch.where(value > 0, x / value.clamp_min(torch.finfo(x.dtype).tiny), 1.0)
    return hue * (factor * value + add).clamp(0, 1)


# ------------------------------------------------------------------------------------------- dose and scatter


@_register(imagenet_c=(60, 25, 12, 5, 3), medmnist_c=(300, 200, 150, 100, 80))
def shot_noise(x: Tensor, draws: Draws, photons: float) -> Tensor:
    """Poisson counts of mean photons x, over photons: white is light, as in a photograph.

    Scales: arXiv 1903.12261, 2406.17536.

    >>> shot_noise(torch.ones(1, 1, 64, 64), Draws((0,), [0]), 100).std().round(decimals=1)
    tensor(0.1000)
    """
    return draws.poisson(photons * x) / photons


@_register(own=(1600, 800, 400, 200, 100))
def poisson_dose(x: Tensor, draws: Draws, photons: float) -> Tensor:
    """The film again at a lower dose: Poisson counts behind the patient, then their logarithm.

    On a film white is dense tissue, which lets few photons through, so white is noisier: the reverse of
    `shot_noise`. `photons` reach a pixel of the detector where the film is black. Our own scale: each
    severity halves them.

    >>> grey = torch.tensor([0.1, 0.9]).reshape(1, 1, 2, 1).repeat(1, 1, 1, 500)
    >>> dark, white = poisson_dose(grey, Draws((0,), [0]), 400)[0, 0].std(1)
    >>> white > 2 * dark
    tensor(True)
    """
    counts = draws.poisson(photons * torch.exp(-DENSITY * x))
    return (
        -torch.log(counts.clamp_min(0.5) / photons) / DENSITY
    )  # No photon at all has no logarithm.


@_register(own=(0.25, 0.5, 1, 2, 4))
def scatter_veil(x: Tensor, draws: Draws | None, ratio: float) -> Tensor:
    """Scattered light over the film: ratio times the transmitted light, spread over an eighth of the side.

    The film is exposed for the same total light. Our own scale: scatter over primary from that of a good grid
    to that of the mediastinum without a grid.

    >>> stripes = torch.tensor([0.0, 1.0]).repeat(1, 1, 32, 16)
    >>> scatter_veil(stripes, None, 4.0).std() < stripes.std() / 2
    tensor(True)
    """
    light = torch.exp(-DENSITY * x)
    height, width = (_blur_matrix(n, 0.125 * min(x.shape[2:])).to(x) for n in x.shape[2:])
    veiled = (light + ratio * _along_axes(light, height, width)) / (1 + ratio)
    return -torch.log(veiled) / DENSITY


# ------------------------------------------------------------------------------------------- things on the film


@_register(own=(0.02, 0.04, 0.06, 0.09, 0.12))
def collimation(x: Tensor, draws: Draws, share: float) -> Tensor:
    """Four blades, each over about `share` of the side and up to 3 degrees askew, leave black borders.

    Each blade covers 0.5 to 1.5 times the share, drawn for each image. Our own scale.

    >>> collimation(torch.ones(1, 1, 64, 64), Draws((0,), [0]), 0.1)[0, 0, [0, 32], [0, 32]]
    tensor([0., 1.])
    """
    height, width = x.shape[2:]
    across, down = _places(x)
    across, down = across - width / 2, down - height / 2
    masks = []
    for turn, *blades in draws.uniform(-1, 1, 5):
        angle = math.radians(3 * turn)
        right = (across * math.cos(angle) + down * math.sin(angle)) / width
        low = (down * math.cos(angle) - across * math.sin(angle)) / height
        inside = (0.5 + right, 0.5 - right, 0.5 + low, 0.5 - low)
        # The edge is soft over a hundredth of the side: the focal spot has a size.
        soft = [
            (edge - share * (1 + blade / 2)) / 0.01 + 0.5
            for edge, blade in zip(inside, blades, strict=True)
        ]
        masks.append(np.clip(np.min(soft, axis=0), 0, 1))
    return x * torch.from_numpy(np.stack(masks)[:, None]).to(x)


@_register(own=(0.05, 0.08, 0.12, 0.17, 0.23))
def marker(x: Tensor, draws: Draws, height: float) -> Tensor:
    """A white L or R in an upper corner, as high as `height` of the shorter side, up to 10 degrees askew.

    L stands on the right of the film, R on the left, as on a frontal film. Our own scale.

    >>> marker(torch.zeros(1, 1, 64, 64), Draws((0,), [0]), 0.2).max()
    tensor(1.)
    """
    across, down = _places(x)
    shorter = min(x.shape[2:])
    tall, margin = height * shorter, 0.05 * shorter
    result = x.clone()
    for image, (side, turn) in zip(result, draws.uniform(-1, 1, 2), strict=True):
        letter = LETTERS["L" if side > 0 else "R"]
        angle, wide = math.radians(10 * turn), LETTER_WIDTH * tall
        middle = x.shape[3] - margin - wide / 2 if side > 0 else margin + wide / 2
        # All that the letter can reach; to draw the rest would cost ten times the time.
        rows = slice(0, math.ceil(margin + 1.25 * tall))
        columns = slice(max(math.floor(middle - 0.75 * tall), 0), math.ceil(middle + 0.75 * tall))
        dx, dy = across[:, columns] - middle, down[rows] - margin - tall / 2
        u = (dx * math.cos(angle) + dy * math.sin(angle) + wide / 2) / tall
        v = (dy * math.cos(angle) - dx * math.sin(angle) + tall / 2) / tall
        distance = np.min([_to_segment(u, v, *segment) for segment in letter], axis=0)
        shape = torch.from_numpy(np.clip((STROKE / 2 - distance) * tall + 0.5, 0, 1)).to(x)
        image[:, rows, columns] = torch.maximum(image[:, rows, columns], shape)
    return result


@_register(own=(0.02, 0.03, 0.045, 0.065, 0.09))
def grid_lines(x: Tensor, draws: Draws, amplitude: float) -> Tensor:
    """The shadow of an anti-scatter grid that stood still: a sine of `amplitude` in units of [0,1].

    Lines are vertical or horizontal, up to 2 degrees askew, 3 to 6 pixels apart at 224 px (never under 2.5).
    Our own scale.

    >>> grid_lines(torch.full((1, 1, 32, 32), 0.5), Draws((0,), [0]), 0.09).sub(0.5).abs().max() < 0.0901
    tensor(True)
    """
    across, down = _places(x)
    waves = []
    for along, turn, apart, phase in draws.uniform(-1, 1, 4):
        angle = math.radians(2 * turn + (90 if along > 0 else 0))
        period = max((4.5 + 1.5 * apart) * min(x.shape[2:]) / SIDE, 2.5)
        path = across * math.cos(angle) + down * math.sin(angle)
        waves.append(np.sin(2 * math.pi * path / period + math.pi * phase))
    return x + amplitude * torch.from_numpy(np.stack(waves)[:, None]).to(x)


# The strokes of the markers' letters as x1, y1, x2, y2 in units of the letter's height.
STROKE, LETTER_WIDTH = 0.16, 0.7
_LEFT, _RIGHT, _TOP, _LOW = 0.08, 0.62, 0.08, 0.92
_BOW = [(0.38 + 0.22 * math.sin(a), 0.30 - 0.22 * math.cos(a)) for a in np.linspace(0, math.pi, 9)]
LETTERS = {
    "L": [(_LEFT, _TOP, _LEFT, _LOW), (_LEFT, _LOW, _RIGHT, _LOW)],
    "R": [
        (_LEFT, _TOP, _LEFT, _LOW),
        (_LEFT, _TOP, 0.38, _TOP),
        *((*a, *b) for a, b in zip(_BOW, _BOW[1:], strict=False)),
        (0.38, 0.52, _LEFT, 0.52),
        (0.36, 0.52, _RIGHT, _LOW),
    ],
}


def _to_segment(
    u: np.ndarray, v: np.ndarray, x1: float, y1: float, x2: float, y2: float
) -> np.ndarray:
    """Distance of the points (u, v) from a segment."""
    dx, dy = x2 - x1, y2 - y1
    share = np.clip(((u - x1) * dx + (v - y1) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(u - x1 - share * dx, v - y1 - share * dy)


def _places(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The middles of the pixels, in pixels: to the right [1,W] and down [H,1]."""
    height, width = x.shape[2:]
    return np.arange(width)[None] + 0.5, np.arange(height)[:, None] + 0.5


# ------------------------------------------------------------------------------------------- storage


@_register(imagenet_c=(0.6, 0.5, 0.4, 0.3, 0.25), medmnist_c=(0.8, 0.7, 0.6, 0.5, 0.4))
def resampling(x: Tensor, draws: Draws | None, share: float) -> Tensor:
    """Stored at `share` of its height and width (mean of each cell), shown at full size in blocks.

    The corruption that both scales call pixelate, with their constants.

    >>> resampling(torch.tensor([[[[0.0, 0.0, 0.0, 1.0]] * 4]]), None, 0.5)[0, 0, 0]
    tensor([0.0000, 0.0000, 0.5000, 0.5000])
    """
    sizes = [(n, max(int(share * n), 1)) for n in x.shape[2:]]
    stored = _along_axes(x, *(_cell_matrix(n, cells).to(x) for n, cells in sizes))
    down, right = (
        ((torch.arange(n, device=x.device) + 0.5) * cells / n).long() for n, cells in sizes
    )
    return stored.index_select(3, right).index_select(2, down)


@_register(own=(6, 5, 4, 3, 2))
def bit_depth(x: Tensor, draws: Draws | None, bits: float) -> Tensor:
    """Rounded to 2^bits grey values. Our own scale.

    >>> bit_depth(torch.tensor([[[[0.1, 0.4, 0.8]]]]), None, 2)
    tensor([[[[0.0000, 0.3333, 0.6667]]]])
    """
    return torch.round(x * (2**bits - 1)) / (2**bits - 1)


@_register(imagenet_c=(25, 18, 15, 10, 7), medmnist_c=(50, 30, 15, 10, 7))
def jpeg(x: Tensor, draws: Draws | None, quality: int) -> Tensor:
    """Through 8-bit JPEG (libjpeg) of that quality; equal channels as a grey file.

    Scales: arXiv 1903.12261, 2406.17536.

    >>> jpeg(torch.full((1, 1, 16, 16), 1.0), None, 7).min()
    tensor(1.)
    """
    stored = []
    for image in x.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        grey = (image == image[..., :1]).all()
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if grey else image).save(file, "JPEG", quality=quality)
        pixels = np.asarray(Image.open(file))
        stored.append(np.broadcast_to(pixels[..., None], image.shape) if grey else pixels)
    return torch.from_numpy(np.stack(stored)).permute(0, 3, 1, 2).to(x) / 255


def _along_axes(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns^T, image by image: a product of many would round by the size of the batch."""
    return torch.stack(
        [torch.stack([rows @ channel @ columns.T for channel in image]) for image in x]
    )


def _blur_matrix(n: int, sigma: float) -> Tensor:
    """Gaussian blur of n pixels as a matrix [n,n]; beyond the border the film goes on as in a mirror."""
    place = torch.arange(n, dtype=torch.float64)
    away = place[:, None] - place
    mirrored = (away, place[:, None] + place + 1, place[:, None] + place + 1 - 2 * n)
    weights = sum(torch.exp(-0.5 * (distance / sigma) ** 2) for distance in mirrored)
    return weights / weights.sum(1, keepdim=True)


def _cell_matrix(n: int, cells: int) -> Tensor:
    """The means over `cells` equal parts of n pixels as a matrix [cells,n]."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * n / cells
    pixel = torch.arange(n, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return overlap.clamp_min(0) * cells / n


# ------------------------------------------------------------------------------------------- data sets


class TrainAugmentor(torch.utils.data.Dataset):
    """A data set of (x [C,H,W], y, row) whose images are left clean or corrupted, drawn anew for each epoch.

    The original study trained on a list of 30 tensors for each image: 5 perturbations x 5 severities, and the
    clean image 5 times. Here each image is drawn from that list, once in an epoch and without keeping it:
    clean with chance 1 / (1 + number of names), else a name and a severity, all alike. The draw depends on
    `seed`, epoch and row alone. Errors: ValueError for an unknown name, scale or severity.

    >>> data = [(torch.full((1, 8, 8), 0.5), 1, 4)]
    >>> x, y, row = TrainAugmentor(data)[0]
    >>> x.shape, y, row
    (torch.Size([1, 8, 8]), 1, 4)
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        *,
        names: Sequence[str] = THESIS,
        severities: Sequence[int] = SEVERITIES,
        seed: int = 0,
        scale: str = "imagenet-c",
    ) -> None:
        _check_names(names, scale)
        if not len(severities) or not set(severities) <= set(SEVERITIES):
            raise ValueError(
                f"severities must be whole numbers from 1 to 5, not {list(severities)}"
            )
        self.dataset, self.names, self.severities = dataset, tuple(names), tuple(severities)
        self.seed, self.scale, self.epoch = seed, scale, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is drawn, here and in the data set inside if it has epochs."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def choice(self, row: int) -> tuple[str | None, int]:
        """Name and severity drawn for an image in this epoch; (None, 0) when it stays clean."""
        rng = np.random.default_rng([self.seed, self.epoch, row])
        name, severity = rng.integers(len(self.names) + 1), rng.choice(self.severities)
        return (self.names[name - 1], int(severity)) if name else (None, 0)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        x, y, row = self.dataset[index]
        name, severity = self.choice(row)
        if name is None:
            return x, y, row
        _check(name, x[None], severity, self.seed, [row], self.scale)
        draws = Draws(_words(name, self.seed, self.epoch), [row])
        return _corrupt(name, x[None], severity, draws, self.scale)[0], y, row


class TestAugmentor(torch.utils.data.Dataset):
    """A data set of (x [C,H,W], y, row) seen through one corruption at one severity: a cell of the test grid.

    The images are those of `apply` with the rows as ids: the same whenever they are read. Clean and corrupted
    images stay in [0,1]. Errors: as `apply`.

    >>> data = [(torch.full((1, 8, 8), 0.5), 1, 4)]
    >>> TestAugmentor(data, "brightness", 5)[0][0].mean()
    tensor(1.)
    """

    __test__ = False  # pytest takes a class of this name for a test

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        name: str,
        severity: int,
        *,
        seed: int = 0,
        scale: str = "imagenet-c",
    ) -> None:
        _check_names([name], scale)
        _check_severity(severity)
        self.dataset, self.name, self.severity, self.seed, self.scale = (
            dataset,
            name,
            severity,
            seed,
            scale,
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        x, y, row = self.dataset[index]
        return (
            apply(self.name, x[None], self.severity, seed=self.seed, ids=[row], scale=self.scale)[
                0
            ],
            y,
            row,
        )
