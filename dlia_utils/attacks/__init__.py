"""Attacks of one contract: `attack(model, x, y, *, ...) -> AttackResult`; eps in pixel units."""

from .apgd import apgd
from .base import AttackResult, frozen, margin
from .carlini_wagner import carlini_wagner
from .deepfool import deepfool
from .fgsm import fgsm, normalised_eps
from .fmn import fmn
from .noise import noise
from .one_pixel import one_pixel
from .pgd import pgd
from .square import square

__all__ = [
    "AttackResult",
    "apgd",
    "carlini_wagner",
    "deepfool",
    "fgsm",
    "fmn",
    "frozen",
    "margin",
    "noise",
    "normalised_eps",
    "one_pixel",
    "pgd",
    "square",
]
