"""The device that the numbers come from: picked once, named in every result row."""

from __future__ import annotations

import platform

import torch


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
        return "cpu", f"{name} is there, but this torch cannot use it ({str(error).splitlines()[0]})"
    return "cuda", f"{torch.cuda.device_count()} x {name}"


def hardware() -> str:
    """Short name of the machine for result rows, e.g. '2-core CPU x86_64' or '2 x Tesla T4'."""
    device, note = pick_device()
    return note if device == "cuda" else f"{torch.get_num_threads()}-core CPU {platform.machine()}"
