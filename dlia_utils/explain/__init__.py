"""Where a model looks: class activation maps, attributions, and how much of a map lies on a finding.

`attribution` and `localisation` need captum and are imported by name, so that the maps here work
without it; so is `figures`, which brings matplotlib.
"""

from .base import Attribution
from .eigencam import activations, eigencam, energy_inside
from .gradcam import gradcam

__all__ = ["Attribution", "activations", "eigencam", "energy_inside", "gradcam"]
