"""Robust models of the literature: built by name, loaded strictly from their public checkpoints.

`robust.list()` shows them, `robust.create(name, num_classes=2, pretrained="public")` builds one.
"""

from dlia_utils.models.robust.checkpoint import LoadReport
from dlia_utils.models.robust.meansparse import (
    MeanSparse,
    recompute_statistics,
    select_alpha,
    set_alpha,
    straight_through,
)
from dlia_utils.models.robust.zoo import SOURCES, RobustModel, Source, create, download
from dlia_utils.models.robust.zoo import table as list

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
    "select_alpha",
    "set_alpha",
    "straight_through",
]
