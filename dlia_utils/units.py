"""Pixel units: an eps or a step is k/255, k grey levels of the 255 between black and white."""

from __future__ import annotations


def pixel_eps(*levels: float) -> tuple[float, ...]:
    """The grid k/255 in pixel units.

    >>> [round(eps, 4) for eps in pixel_eps(1, 4)]
    [0.0039, 0.0157]
    """
    return tuple(level / 255 for level in levels)


def pixel_text(eps: float) -> str:
    """A pixel eps the way people write it: '0.5/255'."""
    return f"{eps * 255:.3g}/255"


def eps_text(eps: float, unit: str = "pixel") -> str:
    """An eps as people write it, in its unit.

    >>> eps_text(4 / 255), eps_text(0.03, "normalised")
    ('4/255', '0.03')
    """
    return pixel_text(eps) if unit == "pixel" else f"{eps:g}"
