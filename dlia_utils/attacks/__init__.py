"""Attacks of one contract: `attack(model, x, y, *, eps, ...) -> AttackResult`; eps in pixel units."""

from ._ball import border
from ._contract import AttackResult, frozen, margin
from .apgd import apgd
from .bpda import bpda
from .carlini_wagner import carlini_wagner
from .deepfool import deepfool
from .fgsm import fgsm, normalised_eps
from .fmn import fmn
from .mi_fgsm import mi_fgsm
from .noise import noise
from .one_pixel import one_pixel
from .pgd import pgd
from .square import square

__all__ = [
    "AttackResult",
    "apgd",
    "border",
    "bpda",
    "carlini_wagner",
    "deepfool",
    "fgsm",
    "fmn",
    "frozen",
    "margin",
    "mi_fgsm",
    "noise",
    "normalised_eps",
    "one_pixel",
    "pgd",
    "square",
]
