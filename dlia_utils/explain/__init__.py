"""Where a model looks: class activation maps, attributions, and how much of a map is on a finding.

`attribution` and `localisation` (captum) and `figures` (matplotlib) are imported by name.
"""

from .base import Attribution
from .eigencam import activations, eigencam, energy_inside
from .gradcam import gradcam

__all__ = ["Attribution", "activations", "eigencam", "energy_inside", "gradcam"]
