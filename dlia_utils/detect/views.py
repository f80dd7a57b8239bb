"""Predictions of a detector as a table, and its test-time augmentation: several views of each image.

A view shows the image to the detector in another way and takes its boxes back; `fuse` then joins the views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..data.cache import ImageCache
from ..device import device_of, evaluating
from ..models.detector import Detector, scaled
from ..progress import Bar

COLUMNS = ("image", "x1", "y1", "x2", "y2", "label", "score", "view")


@dataclass(frozen=True)
class View:
    """One way to look: resized by `scale` inside the detector, mirrored, or with all pixels times `brightness`.

    Every factor is fixed: the same image always gives the same boxes.
    """

    name: str
    scale: float = 1.0
    flip: bool = False
    brightness: float = 1.0

    def show(self, images: Tensor) -> Tensor:
        """What the detector gets: float images [B,1,H,W] in [0,1] of bytes."""
        shown = images.float().div_(255).mul_(self.brightness).clamp_(0, 1)
        return shown.flip(-1) if self.flip else shown

    def back(self, boxes: Tensor, width: int) -> Tensor:
        """Boxes [n,4] found in the view, in the image's own coordinates."""
        if not self.flip:
            return boxes
        x1, y1, x2, y2 = boxes.unbind(-1)
        return torch.stack([width - x2, y1, width - x1, y2], dim=-1)


PLAIN = View("plain")
VIEWS = (
    PLAIN,
    View("scale 0.9", scale=0.9),
    View("scale 1.1", scale=1.1),
    View("flip", flip=True),
    View("brightness 0.9", brightness=0.9),
    View("brightness 1.1", brightness=1.1),
)


def predict(
    model: Detector,
    cache: ImageCache,
    rows: Sequence[int] | np.ndarray,
    *,
    views: Sequence[View] = (PLAIN,),
    batch_size: int = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """Boxes of `rows` under each view: a table of `COLUMNS`, in pixels of the original files.

    `view` is the number of the view in `views`. The images are the cache's bytes; boxes found in the padding of
    an image are cut off at its border, and dropped where nothing is left. The model's training flags and sizes
    are restored. Errors: ValueError without a view.

    >>> sorted(set(COLUMNS) - {"view"}) == sorted(["image", "x1", "y1", "x2", "y2", "label", "score"])
    True
    """
    if not views:
        raise ValueError("views is empty; views=(PLAIN,) is the image as it is")
    rows = np.asarray(rows, dtype=np.int64)
    parts = []
    jobs = [
        (number, start) for number in range(len(views)) for start in range(0, len(rows), batch_size)
    ]
    for number, start in Bar(jobs, desc="detecting", disable=not progress, delay=2):
        chunk = rows[start : start + batch_size]
        parts.append(_look(model, cache, chunk, views[number]).assign(view=number))
    table = (
        pd.concat(parts, ignore_index=True)
        if parts
        else _table([], np.zeros((0, 4)), [], []).assign(view=0)
    )
    return _to_original(table, cache).sort_values(
        ["image", "view", "score"], ascending=[True, True, False], ignore_index=True
    )


@torch.inference_mode()
def _look(model: Detector, cache: ImageCache, rows: np.ndarray, view: View) -> pd.DataFrame:
    """One batch in one view, in pixels of the cache."""
    device = device_of(model)
    bytes_ = (
        torch.from_numpy(np.asarray(cache.images[rows])).unsqueeze(1).to(device, non_blocking=True)
    )
    with evaluating(model), scaled(model, view.scale):
        found = model(view.show(bytes_))
    boxes = torch.cat([view.back(one["boxes"], cache.size) for one in found]).double().cpu().numpy()
    images = np.repeat(rows, [len(one["boxes"]) for one in found])
    labels, scores = (
        torch.cat([one[key] for one in found]).cpu().numpy() for key in ("labels", "scores")
    )
    return _table(images, boxes, labels, scores)


def _table(
    images: Sequence[int], boxes: np.ndarray, labels: Sequence[int], scores: Sequence[float]
) -> pd.DataFrame:
    corners = dict(zip(("x1", "y1", "x2", "y2"), boxes.T, strict=True))
    columns = {"image": images, **corners, "label": labels, "score": scores}
    return pd.DataFrame(columns).astype({"image": "int64", "label": "int64", "score": "float64"})


def _to_original(table: pd.DataFrame, cache: ImageCache) -> pd.DataFrame:
    images = table["image"].to_numpy()
    scale, shapes = cache.scale(images), cache.shapes[images]
    corners = table[["x1", "y1", "x2", "y2"]].to_numpy() / np.tile(scale, 2)
    corners = np.clip(corners, 0, np.tile(shapes[:, ::-1], 2))
    table = table.assign(**dict(zip(("x1", "y1", "x2", "y2"), corners.T, strict=True)))
    return table[(table["x1"] < table["x2"]) & (table["y1"] < table["y2"])]
