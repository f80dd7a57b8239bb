"""Boxes as tables: one-pass metrics, fusion of several views, test-time augmentation."""

from .evaluate import (
    COCO_IOUS,
    Matches,
    average_precision,
    best_thresholds,
    bootstrap,
    curve,
    froc,
    match,
    paired_bootstrap,
    summary,
    threshold_sweep,
)
from .fuse import nms, one_per_class, soft_nms, wbf

__all__ = [
    "COCO_IOUS",
    "Matches",
    "average_precision",
    "best_thresholds",
    "bootstrap",
    "curve",
    "froc",
    "match",
    "nms",
    "one_per_class",
    "paired_bootstrap",
    "soft_nms",
    "summary",
    "threshold_sweep",
    "wbf",
]
