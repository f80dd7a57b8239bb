"""Training-time augmentation (albumentations): the same for every class, reproducible per image and epoch."""

from __future__ import annotations

import os
from collections.abc import Sequence

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # Before the import, which otherwise asks the network.

import albumentations as A  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from .cache import ImageCache  # noqa: E402


def train_transform(
    *,
    flip: float = 0.5,
    rotate: float = 5.0,
    shift: float = 0.05,
    zoom: float = 0.15,
    exposure: float = 0.2,
    blur: float = 0.2,
) -> A.Compose:
    """Random flip, rotation in degrees, shift and zoom by shares of the side, exposure, and (p = `blur`) softness.

    Flip and rotation are those of the original study. Zoom differs along the two axes: squashing films to a
    square turns their format, which differs between the classes here, into a distortion that could be learnt.
    Exposure (brightness, contrast, gamma) and softness stand for other machines. Corners are filled by
    reflection, so they show no black edge. Input and output: uint8 [H,W], the same for every class.
    """
    return A.Compose(
        [
            A.HorizontalFlip(p=flip),
            A.Affine(
                rotate=(-rotate, rotate),
                translate_percent=(-shift, shift),
                scale=(1 - zoom, 1 + zoom),
                border_mode=cv2.BORDER_REFLECT_101,
                p=1,
            ),
            A.RandomBrightnessContrast(brightness_limit=exposure, contrast_limit=exposure, p=0.8),
            A.RandomGamma(gamma_limit=(70, 140), p=0.5),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.0), p=blur),
        ]
    )


class CachedImages(torch.utils.data.Dataset):
    """Rows of an `ImageCache` as (x float32 [1,S,S] in [0,1], y int, row int).

    The augmentation of an image depends on `seed`, epoch and row alone: not on workers, order or an earlier
    kill.
    """

    def __init__(
        self,
        cache: ImageCache,
        manifest_rows: Sequence[int] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        *,
        transform: A.Compose | None = None,
        seed: int = 0,
    ) -> None:
        if len(manifest_rows) != len(labels):
            raise ValueError(
                f"{len(manifest_rows)} rows but {len(labels)} labels: give one label for each row"
            )
        self.cache, self.transform, self.seed, self.epoch = cache, transform, seed, 0
        self.rows, self.labels = np.asarray(manifest_rows, dtype=np.int64), np.asarray(labels, dtype=np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn; call it before the epoch's loader starts."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        row = int(self.rows[index])
        if self.transform is None:
            return self.cache.batch([row])[0], int(self.labels[index]), row
        state = np.random.SeedSequence([self.seed, self.epoch, row]).generate_state(1)[0]
        self.transform.set_random_seed(int(state))
        pixels = self.transform(image=np.array(self.cache.images[row]))["image"]
        return torch.from_numpy(pixels).unsqueeze(0).float().div_(255), int(self.labels[index]), row
