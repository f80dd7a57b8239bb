"""Robust models of the literature: built by name, loaded strictly from their public checkpoints.

`robust.list()` shows them, `robust.create(name, num_classes=2, pretrained="public")` builds one.
"""

from .checkpoint import LoadReport
from .meansparse import MeanSparse, recompute_statistics, set_alpha, straight_through
from .zoo import SOURCES, RobustModel, Source, create, download
from .zoo import table as list

__all__ = [
    "SOURCES",
    "LoadReport",
    "MeanSparse",
    "RobustModel",
    "Source",
    "create",
    "download",
    "list",
    "recompute_statistics",
    "set_alpha",
    "straight_through",
]
