"""Augmentation of training images, the same for every class, reproducible per image and epoch."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from unittest import mock

import cv2
import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from .boxes import read_boxes
from .cache import ImageCache

with mock.patch.dict(os.environ, NO_ALBUMENTATIONS_UPDATE="1"):  # else it asks the network
    import albumentations as A


def train_transform(*, flip: float = 0.5, exposure: float = 0.2, blur: float = 0.2) -> A.Compose:
    """Random flip, rotation, shift, zoom, exposure, and (p = `blur`) softness of uint8 [H,W].

    Flip and rotation are those of the pneumonia study. Zoom differs along the two axes: squashing
    images to a square turns their format, which differs between the classes there, into a
    distortion that could be learnt. Exposure (brightness, contrast, gamma) and softness stand for
    other machines; `exposure=0, blur=0` leaves the geometry alone. Corners are filled by
    reflection, so they show no black edge.
    """
    place = dict(rotate=(-5, 5), translate_percent=(-0.05, 0.05), scale=(0.85, 1.15))
    steps = [A.HorizontalFlip(p=flip), A.Affine(**place, border_mode=cv2.BORDER_REFLECT_101, p=1)]
    if exposure:
        limits = dict(brightness_limit=exposure, contrast_limit=exposure)
        gamma = A.RandomGamma(gamma_limit=(70, 140), p=0.5)
        steps += [A.RandomBrightnessContrast(**limits, p=0.8), gamma]
    if blur:
        steps.append(A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.0), p=blur))
    return A.Compose(steps)


def box_transform(*, flip: float = 0.5) -> BoxTransform:
    """Flip, shift, zoom and rotation with the boxes, exposure, and erased rectangles.

    A rotated box becomes the box of its inscribed ellipse: that of its corners would grow by a
    quarter at 15 degrees. Boxes are clipped; one that keeps less than 0.3 of its area is dropped.
    Erased rectangles (DeVries & Taylor 2017) are left out where they would hide more than half of
    a box.

    >>> image, box = np.zeros((64, 64), np.uint8), np.array([[8, 8, 40, 30.0]])
    >>> moved = box_transform()(image=image, bboxes=box, labels=[1])
    >>> moved["image"].shape, len(moved["bboxes"])
    ((64, 64), 1)
    """
    place = dict(translate_percent=(-0.0625, 0.0625), scale=(0.9, 1.1), rotate=(-10, 10))
    limits = dict(brightness_limit=0.2, contrast_limit=0.2)
    kept = dict(min_visibility=0.3, clip=True, filter_invalid_bboxes=True)
    holes = dict(hole_height_range=(0.02, 0.06), hole_width_range=(0.02, 0.06), fill=0)
    steps = [A.HorizontalFlip(p=flip), A.Affine(**place, rotate_method="ellipse", p=0.5)]
    steps.append(A.RandomBrightnessContrast(**limits, p=0.5))
    boxes = A.BboxParams(format="pascal_voc", label_fields=["labels"], **kept)
    # Apart: with boxes in sight it would shrink them to what is left visible.
    erase = A.Compose([A.CoarseDropout(num_holes_range=(1, 4), **holes, p=0.2)])
    return BoxTransform(A.Compose(steps, bbox_params=boxes), erase)


class BoxTransform:
    """Call it with image uint8 [H,W], bboxes [n,4] xyxy and labels [n] for a dict of the same."""

    def __init__(self, together: A.Compose, erase: A.Compose) -> None:
        self.together, self.erase = together, erase

    def set_random_state(self, generator: np.random.Generator, own: random.Random) -> None:
        """Decide the next call's parameters."""
        self.together.set_random_state(generator, own)
        self.erase.set_random_state(generator, own)

    def __call__(self, *, image: np.ndarray, bboxes: np.ndarray, labels: Sequence[int]) -> dict:
        moved = self.together(image=image, bboxes=bboxes, labels=labels)
        erased = self.erase(image=moved["image"])["image"]
        gone, corners = erased != moved["image"], np.rint(moved["bboxes"]).astype(int)
        parts = [gone[y1:y2, x1:x2] for x1, y1, x2, y2 in corners]
        if not any(part.size and part.mean() > 0.5 for part in parts):
            moved["image"] = erased
        return moved


class _Seeded(torch.utils.data.Dataset):
    """Rows of a cache; the augmentation depends on `seed`, epoch and row alone."""

    def __init__(
        self, cache: ImageCache, rows: Sequence[int], transform: Callable | None, seed: int
    ) -> None:
        self.cache, self.transform, self.seed, self.epoch = cache, transform, seed, 0
        self.steps = "apart"  # in a training's key: until November 2026 they had the same draws
        self.rows = np.asarray(rows, dtype=np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn, before its loader starts."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def augmented(self, row: int, **marked) -> dict:
        """The image of a row with what is marked on it, transformed."""
        given = {"image": np.array(self.cache.images[row])} | marked
        if self.transform is None:
            return given
        if torch.utils.data.get_worker_info():
            cv2.setNumThreads(0)  # OpenCV's pool does not survive the fork; workers are the threads
        self.seed_transform(row)
        return self.transform(**given)

    def seed_transform(self, row: int) -> None:
        """Decide what the transform draws next."""
        # By set_random_seed of albumentations 2.0.8 every step would get the same random numbers:
        # what is flipped would be lit as well.
        state = int(np.random.SeedSequence([self.seed, self.epoch, row]).generate_state(1)[0])
        self.transform.set_random_state(np.random.default_rng(state), random.Random(state))


class CachedImages(_Seeded):
    """Rows of an `ImageCache` as (x float32 [1,S,S] in [0,1], y int, row int).

    `balanced`: as many draws of every class in each epoch, which `seed` and epoch decide; the
    alternative to class weights in the loss. `device`: the bytes are copied there once, and what a
    loader asks for is changed there, a batch at a time, and stays there (so it takes no workers);
    the images are the same, to a rounding of a grey level. For `train_transform()` only.
    """

    def __init__(
        self,
        cache: ImageCache,
        rows: Sequence[int] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        *,
        transform: A.Compose | None = None,
        seed: int = 0,
        balanced: bool = False,
        device: str = "",
    ) -> None:
        super().__init__(cache, rows, transform, seed)
        self.device, self.pixels = device, None
        self.labels, self.balanced = np.asarray(labels, dtype=np.int64), balanced
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.order = np.arange(len(self.rows))
        if self.balanced:
            rng, classes = np.random.default_rng([self.seed, epoch]), np.unique(self.labels)
            places = [np.flatnonzero(self.labels == one) for one in classes]
            parts = np.array_split(self.order, len(classes))
            drawn = [rng.choice(own, len(p)) for own, p in zip(places, parts, strict=True)]
            self.order = np.concatenate(drawn)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        place = self.order[index]
        row = int(self.rows[place])
        pixels = torch.from_numpy(self.augmented(row)["image"])
        return pixels.unsqueeze(0).float().div_(255), int(self.labels[place]), row

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int, int]]:
        if not self.device:
            return [self[index] for index in indices]
        if self.pixels is None:  # now, in the process that trains, on the GPU that it was given
            self.pixels = torch.from_numpy(self.cache.images[self.rows]).to(self.device)
        places, draws = self.order[np.asarray(indices)], []
        rows, labels = self.rows[places].tolist(), self.labels[places].tolist()
        for row in rows:
            self.seed_transform(row)
            draws.append(drawn(self.transform, self.pixels.shape[1:]))
        grey = self.pixels[torch.from_numpy(places).to(self.device)].unsqueeze(1)
        return list(zip(changed(grey.float(), draws).div_(255), labels, rows, strict=True))


def drawn(transform: A.Compose, shape: tuple[int, int]) -> dict[str, dict]:
    """What albumentations draws for its next image, by the name of each step that it takes."""
    transform.py_random.random()  # whether anything is done at all
    given = {"shape": shape}, {"image": np.empty(shape, np.uint8)}
    taken = filter(A.BasicTransform.should_apply, transform.transforms)  # each before the next
    return {type(one).__name__: one.get_params_dependent_on_data(*given) for one in taken}


def changed(x: torch.Tensor, draws: Sequence[dict[str, dict]]) -> torch.Tensor:
    """Grey levels [n,1,S,S] of 0 to 255 after the steps of `train_transform` with these `draws`.

    Rounded after each step, as albumentations works on bytes.
    """

    def values(step: str, key: str, otherwise: float) -> torch.Tensor:
        found = [one.get(step, {}).get(key, otherwise) for one in draws]
        return torch.tensor(found, dtype=x.dtype, device=x.device).view(-1, 1, 1, 1)

    half = (x.shape[-1] - 1) / 2
    units = np.array([[1 / half, 0, -1], [0, 1 / half, -1], [0, 0, 1]])  # pixels -> [-1, 1]
    place = np.stack([one.get("Affine", {}).get("matrix", np.eye(3)) for one in draws])
    place = units @ np.linalg.inv(place) @ np.linalg.inv(units)  # of the new image in the old one
    place[["HorizontalFlip" in one for one in draws], 0] *= -1
    grid = F.affine_grid(torch.from_numpy(place[:, :2]).to(x), x.shape, align_corners=True)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=True).round()
    lit = (values("RandomBrightnessContrast", name, k) for k, name in ((1, "alpha"), (0, "beta")))
    x = (next(lit) * x + next(lit)).clamp(0, 255).floor()
    gamma = values("RandomGamma", "gamma", 1)
    x = torch.where(gamma == 1, x, (255 * (x / 255) ** gamma).floor())
    soft = [k for k, one in enumerate(draws) if "GaussianBlur" in one]
    if soft:
        kernels = [draws[k]["GaussianBlur"]["kernel"] for k in soft]
        most = max(map(len, kernels)) // 2
        kernels = np.stack([np.pad(one, most - len(one) // 2) for one in kernels])
        kernels = torch.from_numpy(kernels).to(x)[:, None, None]
        wide = F.pad(x[soft], (most,) * 4, mode="reflect").transpose(0, 1)
        for kernel in (kernels, kernels.mT):
            wide = F.conv2d(wide, kernel, groups=len(soft))
        x[soft] = wide.transpose(0, 1).round()
    return x


class CachedBoxes(_Seeded):
    """Rows of an `ImageCache` with their boxes: (x uint8 [1,S,S], target as torchvision wants it).

    `boxes` is a data set's box table (in pixels of the original files); targets are in pixels of
    the cached image: boxes float32 [n,4] xyxy, labels int64 [n] from 1, image_id. Pixels stay
    bytes until the device.
    """

    def __init__(
        self,
        cache: ImageCache,
        rows: Sequence[int] | np.ndarray,
        boxes: pd.DataFrame,
        *,
        transform: BoxTransform | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(cache, rows, transform, seed)
        sizes = dict(enumerate(cache.shapes[:, ::-1].tolist()))
        image, corners, self.labels, _ = read_boxes(boxes, "boxes", scored=False, sizes=sizes)
        self.corners = corners.T * np.tile(cache.scale(image), 2)
        self.places = boxes.groupby("image").indices

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        row = int(self.rows[index])
        own = self.places.get(row, np.empty(0, dtype=np.int64))
        moved = self.augmented(row, bboxes=self.corners[own], labels=self.labels[own])
        boxes = torch.as_tensor(np.asarray(moved["bboxes"]), dtype=torch.float32).reshape(-1, 4)
        labels = torch.as_tensor(np.asarray(moved["labels"], dtype=np.int64))
        target = dict(boxes=boxes, labels=labels, image_id=torch.tensor(row))
        return torch.from_numpy(moved["image"]).unsqueeze(0), target


def collate_boxes(items: Sequence[tuple[torch.Tensor, dict]]) -> tuple[torch.Tensor, list[dict]]:
    """A batch for a detector: images [B,1,S,S] and the list of their targets."""
    images, targets = zip(*items, strict=True)
    return torch.stack(images), list(targets)
