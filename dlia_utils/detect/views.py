"""Predictions of a detector as a table, and its test-time augmentation: several views of an image.

A view shows the image in another way and takes its boxes back; `fuse` joins the views.
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
    """One way to look: `scale` inside the detector, mirrored, or all pixels times `brightness`."""

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
        x1, y1, x2, y2 = boxes.unbind(-1)
        return torch.stack([width - x2, y1, width - x1, y2], dim=-1) if self.flip else boxes


PLAIN = View("plain")
VIEWS = (PLAIN, View("scale 0.9", scale=0.9), View("scale 1.1", scale=1.1), View("flip", flip=True))
VIEWS += (View("brightness 0.9", brightness=0.9), View("brightness 1.1", brightness=1.1))


@torch.inference_mode()
def predict(
    model: Detector,
    cache: ImageCache,
    rows: Sequence[int] | np.ndarray,
    *,
    views: Sequence[View] = (PLAIN,),
    batch_size: int = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """Boxes of the images `rows` under each view: a table of `COLUMNS`, in pixels of the files.

    `view` is the number of the view in `views`. Boxes found in the padding of an image are cut off
    at its border, and dropped where nothing is left. The model's flags and sizes are restored.
    """
    rows, device, parts = np.asarray(rows, np.int64), device_of(model), []
    starts = range(0, len(rows), batch_size)
    jobs = [(number, start) for number in range(len(views)) for start in starts]
    for number, start in Bar(jobs, desc="detecting", disable=not progress, delay=2):
        chunk, view = rows[start : start + batch_size], views[number]
        pixels = torch.from_numpy(np.asarray(cache.images[chunk])).unsqueeze(1).to(device)
        with evaluating(model), scaled(model, view.scale):
            found = model(view.show(pixels))
        for image, one in zip(chunk, found, strict=True):
            boxes = view.back(one["boxes"], cache.size).double()
            place = boxes.new_tensor([[image, number]]).expand(len(boxes), 2)
            other = torch.stack([one["labels"], one["scores"]], dim=1).double()
            parts.append(torch.cat([place, boxes, other], dim=1).cpu().numpy())
    values = np.concatenate([np.zeros((0, 8)), *parts])
    table = pd.DataFrame(values, columns=["image", "view", *COLUMNS[1:7]])[[*COLUMNS]]
    table = table.astype(dict.fromkeys(("image", "label", "view"), "int64"))
    images = table["image"].to_numpy()
    corners = table[[*COLUMNS[1:5]]].to_numpy() / np.tile(cache.scale(images), 2)
    table[[*COLUMNS[1:5]]] = np.clip(corners, 0, np.tile(cache.shapes[images][:, ::-1], 2))
    table = table[(table["x1"] < table["x2"]) & (table["y1"] < table["y2"])]
    up = [True, True, False]
    return table.sort_values(["image", "view", "score"], ascending=up, ignore_index=True)
