"""Attacks of one contract: `attack(model, x, y, *, eps, ...) -> AttackResult`; eps in pixel units."""

from ._contract import AttackResult, frozen, margin
from .fgsm import fgsm, normalised_eps
from .noise import noise
from .one_pixel import one_pixel
from .pgd import pgd

__all__ = ["AttackResult", "fgsm", "frozen", "margin", "noise", "one_pixel", "pgd", "normalised_eps"]
