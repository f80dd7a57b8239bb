"""Tables of boxes, read and checked in one way for all who take them: metrics, fusion, submission.

A table has the columns image, x1, y1, x2, y2 (two opposite corners in pixels), label (from 1) and
score.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..metrics import exact_ids, probabilities
from .tables import CORNERS, SLACK

SHARES = "these look normalised: give pixels, not fractions of the image"
SHARES += " (x times its width, y times its height)"
XYWH = "x, y, width, height: torchvision.ops.box_convert(boxes, 'xywh', 'xyxy')"
SWAPPED = "swapped corners: x1 is the smaller of both x, y1 of both y"
TURNED = "these look transposed, and fit only with width and height swapped:"
TURNED += " x stands before y, and sizes are (width, height)"
CLIP = "give pixels of the original file, and clip boxes to the image"
CLIP += " (torchvision.ops.clip_boxes_to_image)"

Sizes = Mapping[Hashable, Sequence[int]] | None


class Boxes(NamedTuple):
    """What `read_boxes` found in n rows."""

    image: np.ndarray  # [n] ids as they are in the table (`metrics.exact_ids`)
    corners: np.ndarray  # float64 [4,n]
    label: np.ndarray  # int64 [n]
    score: np.ndarray  # float64 [n] in [0, 1]; 1 where none is asked for


class Fault(NamedTuple):
    """Rows of boxes that are no x1, y1, x2, y2 in pixels, what they look like, and the fix."""

    kind: str  # "shares", "turned", "outside"; "" for none
    rows: np.ndarray  # bool [n]
    problem: str = ""
    fix: str = ""


def read_boxes(
    table: pd.DataFrame, name: str, *, scored: bool = True, sizes: Sizes = None
) -> Boxes:
    """The boxes of a table, checked; ids of images keep every digit, scores are clipped to [0, 1].

    sizes: (width, height) of each image, where they are known: boxes must then lie inside. Errors:
    ValueError that calls the table `name`, with the first wrong row, the likely reason and the fix.

    >>> table = pd.DataFrame({"image": ["007"], "x1": 1, "y1": 2, "x2": 30, "y2": 40, "label": 1})
    >>> read_boxes(table, "truth", scored=False).image.tolist()
    ['007']
    """
    columns = [*CORNERS, "label"] + ["score"] * scored
    if lost := [column for column in ("image", *columns) if column not in table.columns]:
        raise ValueError(f"{name} lacks the columns {lost}; it has {list(table.columns)}")
    values = table[columns].to_numpy(dtype=float).T
    corners, label, score = values[:4], values[4], values[5] if scored else np.ones(len(table))
    refuse(~np.isfinite(values).all(0), name, "NaN or an infinite value")
    refuse((label < 1) | (label % 1 > 0), name, "a label that is none of 1..K: 0 is the background")
    image, frames = exact_ids(table["image"], name, "image", "boxes"), None
    if sizes is not None:
        known = np.array([one in sizes for one in image.tolist()], bool)
        refuse(~known, name, "an image that `sizes` lacks")
        frames = np.array([sizes[one] for one in image.tolist()], float).reshape(-1, 2).T
    fault = box_fault(corners, frames)
    refuse(fault.rows, name, fault.problem, fault.fix)
    flat = (corners[:2] >= corners[2:]).any(0)
    refuse(flat, name, "x1 >= x2 or y1 >= y2", "a box without area: leave it out")
    score = probabilities(score, f"{name}: a score")
    return Boxes(image, corners, label.astype(np.int64), score)


def box_fault(corners: np.ndarray, frames: np.ndarray | None = None) -> Fault:
    """What is wrong with boxes [4,n] that should be x1, y1, x2, y2 in pixels of the image.

    frames: width and height [2,n], where they are known (inf: unknown).

    >>> box_fault(np.array([[0.1, 0.2, 0.5, 0.4]]).T).kind
    'shares'
    """
    first, last = corners[:2], corners[2:]
    frames = np.full_like(first, np.inf) if frames is None else frames
    every = np.full(corners.shape[1], True)
    if corners.size and np.abs(corners).max() <= 1 < frames.min():
        return Fault("shares", every, "no corner lies beyond 1", SHARES)
    turned = last < first
    if turned.any():
        # Of x, y, width, height only some are turned, as a rule; swapped corners all in one way.
        alike = all(axis.all() or not axis.any() for axis in turned)
        fits = (first + last <= frames + SLACK).all()
        looks = " or ".join([XYWH] * bool(fits) + [SWAPPED] * bool(alike or not fits))
        problem, fix = "x1 >= x2 or y1 >= y2", f"these look like {looks}"
        return Fault("turned", turned.any(0), problem, fix)
    beyond = np.where(np.isfinite(frames), np.maximum(-first, last - frames), 0).max(0)
    if (beyond > SLACK).any():
        swapped = (first >= -SLACK).all() and (last <= frames[::-1] + SLACK).all()
        problem = f"a box reaches up to {beyond.max():.4g} px out of its image"
        return Fault("outside", beyond > SLACK, problem, TURNED if swapped else CLIP)
    return Fault("", ~every)


def refuse(wrong: np.ndarray, name: str, problem: str, fix: str = "") -> None:
    """ValueError naming the first of the `wrong` rows."""
    if wrong.any():
        where = f"{wrong.sum()} of {len(wrong)} rows, first row {int(np.argmax(wrong))}"
        raise ValueError(f"{name}: {problem} ({where}){': ' * bool(fix)}{fix}")


def in_order(ids: np.ndarray) -> np.ndarray:
    """Different ids, numbers by size and others as text."""
    return ids[np.argsort(ids if ids.dtype.kind in "iu" else [str(one) for one in ids])]


def places(ids: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The place of each id in `among`, -1 where it is not there; 1 and "1" are two ids.

    >>> places(np.array(["7", 7], dtype=object), np.array([7, 8])).tolist()
    [-1, 0]
    """
    return pd.Index(among, dtype=object).get_indexer(pd.Index(ids, dtype=object))
