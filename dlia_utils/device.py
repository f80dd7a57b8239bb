"""The device that the numbers come from: picked once, named in every result row."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def pick_device() -> tuple[str, str]:
    """The device that really works, with a remark; a GPU too old for this torch falls back to the CPU.

    >>> device, note = pick_device()
    >>> device in ("cpu", "cuda")
    True
    """
    if not torch.cuda.is_available():
        return "cpu", f"no GPU, {torch.get_num_threads()} CPU threads"
    name = torch.cuda.get_device_name(0)
    try:
        # is_available() says True on a P100, whose first real operation then dies.
        (torch.ones(2, device="cuda") * 2).sum().item()
    except RuntimeError as error:
        return (
            "cpu",
            f"{name} is there, but this torch cannot use it ({str(error).splitlines()[0]})",
        )
    return "cuda", f"{torch.cuda.device_count()} x {name}"


def hardware() -> str:
    """Short name of the machine for result rows, e.g. '2-core CPU x86_64' or '2 x Tesla T4'."""
    device, note = pick_device()
    return note if device == "cuda" else f"{torch.get_num_threads()}-core CPU {platform.machine()}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; afterwards, also after an error, every training flag is as it was.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(1))
    >>> _ = model[1].eval()
    >>> with evaluating(model):
    ...     model.training
    False
    >>> model.training, model[1].training
    (True, False)
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def fingerprint(model: nn.Module) -> str:
    """Short hash of all weights and buffers: equal for bit-equal models on any device, in any layout.

    >>> fingerprint(nn.Identity())
    'da39a3ee5e6b'
    """
    digest = hashlib.sha1(usedforsecurity=False)
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def device_of(model: nn.Module, images: torch.Tensor) -> torch.device:
    """Where the model's parameters lie, or the images for a model without any."""
    return next((parameter.device for parameter in model.parameters()), images.device)
