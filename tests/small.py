"""Small things for tests: a linear model with images for it, and a run of a notebook with a few
settings changed."""

import contextlib
import io
from pathlib import Path

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


def start_run(
    number: str,
    data: str | Path = "",
    name: str = "",
    *,
    profile: str = "smoke",
    resume=True,
    **changes,
):
    """The run that notebook `number` starts, with `changes` of its settings."""
    (source,) = execute.pick([number])
    with contextlib.redirect_stdout(io.StringIO()):  # its banner
        return execute.opened(
            source,
            PROFILE=profile,
            DATA_DIR=str(data),
            RUN_NAME=name,
            RESUME=resume,
            CHANGES=changes,
        )
