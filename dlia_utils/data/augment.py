"""Training-time augmentation (albumentations): the same for every class, reproducible per image and epoch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence

os.environ.setdefault(
    "NO_ALBUMENTATIONS_UPDATE", "1"
)  # Before the import, which otherwise asks the network.

import albumentations as A  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402

from .cache import ImageCache  # noqa: E402

# OpenCV's thread pool does not survive a fork: a loader's worker would wait for it for ever. The workers are the threads.
cv2.setNumThreads(0)


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
    Exposure (brightness, contrast, gamma) and softness stand for other machines; `exposure=0, blur=0` leaves the
    geometry alone. Corners are filled by reflection, so they show no black edge. Input and output: uint8 [H,W],
    the same for every class.
    """
    steps = [
        A.HorizontalFlip(p=flip),
        A.Affine(
            rotate=(-rotate, rotate),
            translate_percent=(-shift, shift),
            scale=(1 - zoom, 1 + zoom),
            border_mode=cv2.BORDER_REFLECT_101,
            p=1,
        ),
    ]
    if exposure:
        steps += [
            A.RandomBrightnessContrast(brightness_limit=exposure, contrast_limit=exposure, p=0.8),
            A.RandomGamma(gamma_limit=(70, 140), p=0.5),
        ]
    if blur:
        steps.append(A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.0), p=blur))
    return A.Compose(steps)


def box_transform(
    *,
    flip: float = 0.5,
    shift: float = 0.0625,
    zoom: float = 0.1,
    rotate: float = 10.0,
    affine: float = 0.5,
    exposure: float = 0.2,
    dropout: float = 0.2,
    min_visible: float = 0.3,
) -> Callable[..., dict]:
    """Flip, shift, zoom and rotation with the boxes, brightness and contrast, and erased rectangles.

    `flip`, `affine` and `dropout` are probabilities; shift and zoom are shares of the side, rotation is in
    degrees. A rotated box becomes the box of its inscribed ellipse: that of its corners would grow by a quarter
    at 15 degrees. Boxes are clipped; one that keeps less than `min_visible` of its area is dropped. Erased
    rectangles (DeVries & Taylor 2017) leave the boxes as they are, and are not drawn where they would hide more
    than half of one. Call: transform(image=uint8 [H,W], bboxes=[n,4] xyxy, labels=[n]) -> dict of the same.

    >>> moved = box_transform()(image=np.zeros((64, 64), np.uint8), bboxes=np.array([[8, 8, 40, 30.0]]), labels=[1])
    >>> moved["image"].shape, len(moved["bboxes"])
    ((64, 64), 1)
    """
    return BoxTransform(
        A.Compose(
            [
                strict(A.HorizontalFlip, p=flip),
                strict(
                    A.Affine,
                    translate_percent=(-shift, shift),
                    scale=(1 - zoom, 1 + zoom),
                    rotate=(-rotate, rotate),
                    rotate_method="ellipse",
                    p=affine,
                ),
                strict(
                    A.RandomBrightnessContrast,
                    brightness_limit=exposure,
                    contrast_limit=exposure,
                    p=0.5,
                ),
            ],
            bbox_params=strict(
                A.BboxParams,
                format="pascal_voc",
                label_fields=["labels"],
                min_visibility=min_visible,
                clip=True,
                filter_invalid_bboxes=True,
            ),
        ),
        # In a pipeline of its own: with boxes in sight it would shrink them to what is left visible.
        A.Compose(
            [
                strict(
                    A.CoarseDropout,
                    num_holes_range=(1, 4),
                    hole_height_range=(0.02, 0.06),
                    hole_width_range=(0.02, 0.06),
                    fill=0,
                    p=dropout,
                )
            ]
        ),
    )


class BoxTransform:
    """What `box_transform` returns: boxes and image together, then the erased rectangles."""

    def __init__(self, together: A.Compose, dropout: A.Compose) -> None:
        self.together, self.dropout = together, dropout

    def set_random_seed(self, seed: int) -> None:
        """Decide the next call's parameters."""
        self.together.set_random_seed(seed)
        self.dropout.set_random_seed(seed)

    def __call__(self, *, image: np.ndarray, bboxes: np.ndarray, labels: Sequence[int]) -> dict:
        moved = self.together(image=image, bboxes=bboxes, labels=labels)
        erased = self.dropout(image=moved["image"])["image"]
        if not _hides_a_box(erased != moved["image"], moved["bboxes"]):
            moved["image"] = erased
        return moved


def strict(build: Callable, **arguments):
    """`build(**arguments)`, with albumentations' warnings as errors: it only warns of an argument that it ignores.

    >>> strict(A.CoarseDropout, max_holes=8)
    Traceback (most recent call last):
    ValueError: CoarseDropout: Argument(s) 'max_holes' are not valid for transform CoarseDropout
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return build(**arguments)
        except (Warning, TypeError) as problem:
            raise ValueError(f"{build.__name__}: {problem}") from problem


def _hides_a_box(erased: np.ndarray, boxes: np.ndarray) -> bool:
    corners = np.rint(boxes).astype(int)
    return any(
        erased[y1:y2, x1:x2].mean() > 0.5 for x1, y1, x2, y2 in corners if x2 > x1 and y2 > y1
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
        self.rows, self.labels = (
            np.asarray(manifest_rows, dtype=np.int64),
            np.asarray(labels, dtype=np.int64),
        )

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


class Balanced(torch.utils.data.Dataset):
    """As many draws of every class in each epoch: images are drawn with replacement, of each class as many.

    The sampling alternative to class weights in the loss; what an epoch draws depends on `seed` and epoch alone.
    `data` yields (x, y, ...) and has `labels` [N]; an image drawn twice in one epoch is augmented alike.

    >>> import types
    >>> data = types.SimpleNamespace(labels=np.array([0, 0, 0, 1]), set_epoch=lambda epoch: None)
    >>> drawn = Balanced(data, seed=0)
    >>> len(drawn), np.bincount(data.labels[drawn.order]).tolist()
    (4, [2, 2])
    """

    def __init__(self, data: CachedImages, *, seed: int = 0) -> None:
        self.data, self.seed = data, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the epoch's images; call it before the epoch's loader starts."""
        self.data.set_epoch(epoch)
        rng, labels = np.random.default_rng([self.seed, epoch]), self.data.labels
        classes = np.unique(labels)
        wanted = np.repeat(classes, -(-len(labels) // len(classes)))[: len(labels)]
        self.order = np.concatenate(
            [rng.choice(np.flatnonzero(labels == c), (wanted == c).sum()) for c in classes]
        )

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        return self.data[int(self.order[index])]


class CachedBoxes(torch.utils.data.Dataset):
    """Rows of an `ImageCache` with their boxes: (x uint8 [1,S,S], target), target a dict as torchvision wants it.

    `boxes` is a data set's box table (in pixels of the original files); targets are in pixels of the cached
    image: boxes float32 [n,4] xyxy, labels int64 [n] from 1, image_id. Pixels stay bytes until the device. The
    augmentation depends on `seed`, epoch and row alone, so workers neither repeat each other nor matter.
    Errors: `ValueError` for a label below 1.
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
        if len(boxes) and boxes["label"].min() < 1:
            raise ValueError(
                f"label {boxes['label'].min()}: labels of boxes start at 1, for 0 is the background"
            )
        self.cache, self.transform, self.seed, self.epoch = cache, transform, seed, 0
        self.rows = np.asarray(rows, dtype=np.int64)
        scale = np.tile(cache.scale(boxes["image"].to_numpy()), 2)
        corners = boxes[["x1", "y1", "x2", "y2"]].to_numpy(float) * scale
        places = boxes.groupby("image").indices
        none = np.empty(0, dtype=np.int64)
        self.corners = {row: corners[places.get(row, none)] for row in self.rows.tolist()}
        labels = boxes["label"].to_numpy(np.int64)
        self.labels = {row: labels[places.get(row, none)] for row in self.rows.tolist()}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn; call it before the epoch's loader starts."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        row = int(self.rows[index])
        pixels, boxes, labels = (
            np.array(self.cache.images[row]),
            self.corners[row],
            self.labels[row],
        )
        if self.transform is not None:
            state = np.random.SeedSequence([self.seed, self.epoch, row]).generate_state(1)[0]
            self.transform.set_random_seed(int(state))
            moved = self.transform(image=pixels, bboxes=boxes, labels=labels)
            pixels, boxes, labels = moved["image"], moved["bboxes"], moved["labels"]
        target = {
            "boxes": torch.as_tensor(np.asarray(boxes), dtype=torch.float32).reshape(-1, 4),
            "labels": torch.as_tensor(np.asarray(labels, dtype=np.int64)),
            "image_id": torch.tensor(row),
        }
        return torch.from_numpy(pixels).unsqueeze(0), target


def collate_boxes(items: Sequence[tuple[torch.Tensor, dict]]) -> tuple[torch.Tensor, list[dict]]:
    """A batch for a detector: images [B,1,S,S] and the list of their targets."""
    images, targets = zip(*items, strict=True)
    return torch.stack(images), list(targets)
