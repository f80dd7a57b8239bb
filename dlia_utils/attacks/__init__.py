"""Attacks of one contract: `attack(model, x, y, *, ...) -> AttackResult`; eps in pixel units."""

from .apgd import apgd as apgd
from .base import AttackResult as AttackResult
from .base import frozen as frozen
from .base import margin as margin
from .carlini_wagner import carlini_wagner as carlini_wagner
from .deepfool import deepfool as deepfool
from .fgsm import fgsm as fgsm
from .fgsm import normalised_eps as normalised_eps
from .fmn import fmn as fmn
from .noise import noise as noise
from .one_pixel import one_pixel as one_pixel
from .pgd import pgd as pgd
from .square import square as square
