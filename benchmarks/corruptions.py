"""How many times faster images are corrupted than with albumentations and imagecorruptions.

    python benchmarks/corruptions.py                       1,000 images of 224 px, some minutes
    python benchmarks/corruptions.py --images 100 --only contrast jpeg

Each side takes the images in the form it works on, ready in memory: ours float32 [B,1,H,W] in
batches, albumentations float32 [H,W] (bytes where it takes nothing else) and imagecorruptions uint8
[H,W,3], one by one. The cases of a corruption are run in turn, round after round, and the fastest
round of each is kept. Time is CPU time of this process on one thread: it holds steady while others
use the machine. Before anything is timed the results are compared: imagecorruptions must change a
image as much as we do; albumentations has only near relatives of most. The rows of imagecorruptions
need `benchmarks/requirements.txt`: the release by that very name no longer imports, its
continuation imagecorruptions-imaug does.
"""

# ruff: noqa: I001  (timing sets the allocator and puts the repository on the path: it comes first)

from __future__ import annotations

import argparse
import platform
import warnings
from collections.abc import Callable

from timing import Row, installed, print_table, seconds

from dlia_utils.data import phantom
from dlia_utils import corrupt

import albumentations as A
import cv2
import numpy as np
import torch

SEVERITY = 3
BATCH = 50
DRAWN = 20  # drawn; the others repeat them, with noise of their own

# imagecorruptions' names, where they differ.
THEIR_NAMES = {"resampling": "pixelate", "jpeg": "jpeg_compression"}


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(
        f"{platform.machine()} CPU, one thread; torch {torch.__version__}; NumPy {np.__version__}; "
        f"albumentations {A.__version__}; fastest of {options.rounds} rounds; CPU time\n"
    )
    drawn = [
        phantom.chest(np.random.default_rng(i), size=options.side, pneumonia=False)[0]
        for i in range(DRAWN)
    ]
    images = torch.from_numpy(np.stack(drawn))[:, None].repeat(-(-options.images // DRAWN), 1, 1, 1)
    images = images[: options.images]
    rows = []
    for name in options.only:
        rows += compare(name, images, options.rounds)
    print_table(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    names = list(corrupt.CORRUPTIONS)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    return parser.parse_args()


def compare(name: str, images: torch.Tensor, rounds: int) -> list[Row]:
    """Time one corruption: ours, and each peer that has it."""

    def ours() -> list[torch.Tensor]:
        starts = range(0, len(images), BATCH)
        parts = [
            (images[at : at + BATCH], range(at, min(at + BATCH, len(images)))) for at in starts
        ]
        return [corrupt.apply(name, x, SEVERITY, seed=0, ids=ids) for x, ids in parts]

    cases: dict[str, Callable[[], object]] = {"ours": ours}
    nearest = albumentations_nearest().get(name)
    if nearest is not None:
        transform, as_bytes = nearest
        pictures = list(
            (images[:, 0] * 255).round().byte().numpy() if as_bytes else images[:, 0].numpy()
        )
        cases["albumentations"] = lambda: [
            transform(image=picture)["image"] for picture in pictures
        ]
    theirs = imagecorruption(name)
    if theirs is not None:
        colour = list((images[:, 0] * 255).round().byte().numpy()[..., None].repeat(3, -1))
        agree(name, images[:DRAWN], np.stack([theirs(picture) for picture in colour[:DRAWN]]))
        cases["imagecorruptions"] = lambda: [theirs(picture) for picture in colour]
    time_of = seconds(cases, rounds=rounds, device="cpu", group=name)
    what = f"{name}, {len(images):,} images of {images.shape[2]} px"
    result = []
    if nearest is not None:
        against = (
            f"albumentations' {type(nearest[0]).__name__}, {'uint8' if nearest[1] else 'float32'}"
        )
        result.append((what, against, time_of["albumentations"] / time_of["ours"], ""))
    if name in PUBLISHED:
        ratio = time_of.get("imagecorruptions", np.nan) / time_of["ours"]
        result.append((what, "imagecorruptions, uint8 RGB", ratio, ""))
    if not result:
        print(f"{name}: no peer has it; {1000 * time_of['ours'] / len(images):.3g} ms a image")
    return result


def albumentations_nearest() -> dict[str, tuple[A.BasicTransform, bool]]:
    """Its nearest transform to each corruption at the same strength; True: it takes only bytes."""

    def level(name: str) -> float:
        return corrupt.CORRUPTIONS[name].parameters(SEVERITY, "imagenet-c")[0]

    def make(build: Callable, **arguments) -> A.BasicTransform:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # albumentations only warns of unknown arguments
            return build(p=1, **arguments)

    sigma, speckle, photons = level("gaussian_noise"), level("speckle_noise"), level("shot_noise")
    kernel = 2 * int(level("motion_blur")) + 1
    factor, add, share = level("contrast"), level("brightness"), level("resampling")
    bits, quality = int(level("bit_depth")), int(level("jpeg"))
    blocks = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_NEAREST}
    return {
        "gaussian_noise": (make(A.GaussNoise, std_range=(sigma, sigma)), False),
        "speckle_noise": (
            make(
                A.MultiplicativeNoise,
                multiplier=(1 - 2 * speckle, 1 + 2 * speckle),
                elementwise=True,
            ),
            False,
        ),
        "motion_blur": (make(A.MotionBlur, blur_limit=(kernel, kernel)), False),
        "contrast": (
            make(
                A.RandomBrightnessContrast,
                brightness_limit=(0, 0),
                contrast_limit=(factor - 1, factor - 1),
            ),
            False,
        ),
        "brightness": (
            make(A.RandomBrightnessContrast, brightness_limit=(add, add), contrast_limit=(0, 0)),
            False,
        ),
        "shot_noise": (make(A.ShotNoise, scale_range=(1 / photons, 1 / photons)), False),
        "resampling": (
            make(A.Downscale, scale_range=(share, share), interpolation_pair=blocks),
            False,
        ),
        "bit_depth": (make(A.Posterize, num_bits=bits), True),
        "jpeg": (make(A.ImageCompression, quality_range=(quality, quality)), True),
    }


PUBLISHED = [name for name, one in corrupt.CORRUPTIONS.items() if "imagenet-c" in one.levels]


def imagecorruption(name: str) -> Callable[[np.ndarray], np.ndarray] | None:
    """imagecorruptions' function on uint8 [H,W,3]; None where it is not installed or has none."""
    if name not in PUBLISHED or not installed("imagecorruptions"):
        return None
    import imagecorruptions

    return lambda picture: imagecorruptions.corrupt(
        picture, corruption_name=THEIR_NAMES.get(name, name), severity=SEVERITY
    )


def agree(name: str, images: torch.Tensor, theirs: np.ndarray) -> None:
    """Both sides must change the images by as much; the noise itself may differ."""
    bytes_ = images.mul(255).round().div(255)
    ours = corrupt.apply(name, bytes_, SEVERITY, seed=0, ids=range(len(images)))
    change, their_change = (
        float((made - bytes_[:, 0]).square().mean().sqrt())
        for made in (ours[:, 0], torch.from_numpy(theirs[..., 0]).float() / 255)
    )
    # Angles of motion blur are drawn, and its size follows; over there bytes are cut off.
    slack = 0.25 if name == "motion_blur" else 0.05
    if not abs(change / their_change - 1) < slack:
        raise SystemExit(
            f"{name}: the two sides differ (change {change:.4f} and {their_change:.4f})"
        )


if __name__ == "__main__":
    main()
