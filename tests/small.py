"""Small things for tests: a linear model with images for it, a run of a notebook."""

import contextlib
import io

import torch
from torch import Tensor, nn

from dlia_utils import execute


def linear(seed: int = 0, classes: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, classes))


def small_batch() -> tuple[Tensor, Tensor]:
    """Six images [6,1,3,3] well inside [0,1] and their labels."""
    generator = torch.Generator().manual_seed(1)
    x = 0.2 + 0.6 * torch.rand(6, 1, 3, 3, generator=generator)
    return x, torch.tensor([0, 1, 1, 0, 1, 0])


def start_run(number, data="", name="", *, profile="smoke", resume=True, **changes):
    """The run that notebook `number` starts, with `changes` of its settings."""
    (source,) = execute.pick([number])
    given = dict(PROFILE=profile, DATA_DIR=str(data), RUN_NAME=name, RESUME=resume)
    with contextlib.redirect_stdout(io.StringIO()):  # its banner
        return execute.opened(source, CHANGES=changes, **given)
