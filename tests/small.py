"""A linear model of two classes and images for it: what losses are compared with closed forms on."""

import torch
from torch import Tensor, nn


def linear(seed: int = 0, classes: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, classes))


def small_batch() -> tuple[Tensor, Tensor]:
    """Six images [6,1,3,3] well inside [0,1] and their labels."""
    generator = torch.Generator().manual_seed(1)
    x = 0.2 + 0.6 * torch.rand(6, 1, 3, 3, generator=generator)
    return x, torch.tensor([0, 1, 1, 0, 1, 0])
