"""Numbers as people give them: an eps or a step is k/255, k of the 255 grey levels; ranges."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


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


def check_numbers(interval: str, *, whole: bool = False, hint: str = "", **values: Any) -> None:
    """Refuse, by its name, a value that is no finite number of the interval: the door's one check.

    interval: "[0,1]", "(0,inf)", ..., a round bracket leaves its end out. whole: 1, but not 1.5 nor
    1.0. Neither takes NaN, infinity, text, True or a tensor. Raises: ValueError, ended by `hint`.

    >>> check_numbers("(0,1]", eps=4 / 255)
    >>> check_numbers("[1,inf)", whole=True, steps=0)
    Traceback (most recent call last):
    ValueError: steps must be a whole number in [1,inf), not 0
    """
    low, high = map(float, interval[1:-1].split(","))
    kind, word = (Integral, "whole") if whole else (Real, "finite")
    for name, value in values.items():
        good = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
        within = good and (value > low or (interval[0] == "[" and value == low))
        if not (within and (value < high or (interval[-1] == "]" and value == high))):
            raise ValueError(f"{name} must be a {word} number in {interval}, not {value!r}{hint}")
