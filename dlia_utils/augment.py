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
    scale: float = 0.1,
    brightness: float = 0.2,
    contrast: float = 0.2,
) -> A.Compose:
    """Random flip, rotation up to `rotate` degrees, shift and zoom by shares of the side, brightness, contrast.

    Flip and rotation are those of the original study; the rest stands for other machines and exposures. Corners
    are filled by reflection, so they show no black edge.
    """
    return A.Compose(
        [
            A.HorizontalFlip(p=flip),
            A.Affine(
                rotate=(-rotate, rotate),
                translate_percent=(-shift, shift),
                scale=(1 - scale, 1 + scale),
                border_mode=cv2.BORDER_REFLECT_101,
                p=1,
            ),
            A.RandomBrightnessContrast(brightness_limit=brightness, contrast_limit=contrast, p=0.8),
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
