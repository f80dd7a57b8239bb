"""Robust models of the literature: `robust.names()` shows them, `robust.create` builds one."""

from .meansparse import MeanSparse, recompute_statistics, set_alpha, straight_through
from .zoo import create, download, names

__all__ = ["MeanSparse", "create", "download", "names"]
__all__ += ["recompute_statistics", "set_alpha", "straight_through"]
