"""Boxes as tables: one-pass metrics, fusion of several views, test-time augmentation."""

from .evaluate import COCO_IOUS, best_thresholds, bootstrap, match, summary
from .fuse import nms, wbf

__all__ = ["COCO_IOUS", "best_thresholds", "bootstrap", "match", "nms", "summary", "wbf"]
