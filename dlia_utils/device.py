"""The device and the CPU threads that the numbers come from, and what a model is like on it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import nn

SECONDS = 0.7  # of measuring: in less, a system's favour for a new process hides other work
WORTH = 0.9  # all threads must save a tenth: beside a little other work they may cost many times
MODEST, MOST = 64, 1024  # images in one pass: without a GPU, and with much memory
RELEASE_EVERY = 10.0  # seconds: to take a GB from the system again costs half a second
released = [-RELEASE_EVERY]  # when it was last


def pick_device() -> tuple[str, str]:
    """The device that really works, with a remark; a GPU too old for this torch is not used."""
    if not torch.cuda.is_available():
        return "cpu", "no GPU"
    name = torch.cuda.get_device_name(0)
    try:
        # is_available() says True on a P100, whose first real operation then dies.
        (torch.ones(2, device="cuda") * 2).sum().item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return "cpu", f"{name} is there, but this torch cannot use it ({reason})"
    return "cuda", f"{torch.cuda.device_count()} x {name}"


def hardware() -> str:
    """Short name of the machine for result rows, e.g. '2-core CPU x86_64' or '2 x Tesla T4'."""
    device, note = pick_device()
    return note if device == "cuda" else f"{torch.get_num_threads()}-core CPU {platform.machine()}"


def device_of(model: nn.Module, images: torch.Tensor | None = None) -> torch.device:
    """Where the model's weights (or buffers) lie; of a model without any, where the images do."""
    tensors = chain(model.parameters(), model.buffers())
    otherwise = torch.device("cpu") if images is None else images.device
    return next((tensor.device for tensor in tensors), otherwise)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; afterwards, also after an error, every training flag is back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def release_memory(*, at_once: bool = False) -> None:
    """Give freed memory back to the system: glibc, told to keep large buffers, never does it alone.

    Called after an epoch, a suite of attacks and a batch of maps, and heeded once in RELEASE_EVERY
    seconds, or `at_once` (after a whole training); without glibc nothing happens.
    """
    due = at_once or time.monotonic() >= released[0] + RELEASE_EVERY
    if due and (trim := malloc_trim()):
        trim(0)
        released[0] = time.monotonic()


@functools.cache
def malloc_trim() -> Callable[[int], int] | None:
    """glibc's function, or None."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # macOS and musl, none, Windows
        return None


def fitting_batch(model: nn.Module, images: torch.Tensor) -> int:
    """How many images an attack takes at once: on a GPU the largest power of two that fits.

    At most half of the free memory for forward and backward pass, since cuDNN and the attack's own
    points want some; on a CPU `MODEST`, as more only cost memory there. images: [N,C,H,W].

    >>> fitting_batch(nn.Flatten(), torch.rand(3, 1, 8, 8))
    64
    """
    device = device_of(model, images)
    if device.type != "cuda":
        return MODEST
    fits = torch.cuda.mem_get_info(device)[0] / 2 / step_bytes(model, images[:8], device)
    return max(1, min(MOST, 2 ** int(math.log2(max(fits, 1)))))


@torch.enable_grad()
def step_bytes(model: nn.Module, images: torch.Tensor, gpu: torch.device) -> float:
    """What one forward and backward pass of images takes of a GPU's memory, per image."""
    torch.cuda.reset_peak_memory_stats(gpu)
    before, x = torch.cuda.memory_allocated(gpu), images.to(gpu, copy=True).requires_grad_()
    total = model(x).float().sum()
    if total.requires_grad:
        torch.autograd.grad(total, x, allow_unused=True)
    most = torch.cuda.max_memory_allocated(gpu) - before
    torch.cuda.empty_cache()  # what is kept for later counts as taken
    return max(most, 1) / len(images)


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Float32 products in TF32 on a GPU that has it (convolutions are by torch's own default)."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fingerprint(model: nn.Module) -> str:
    """Short hash of all weights and buffers: equal for bit-equal models on any device."""
    digest = hashlib.sha1(usedforsecurity=False)
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@functools.cache
def choose_threads() -> tuple[int, str]:
    """Set PyTorch's CPU threads, once a process, to what is not slower; returns number and remark.

    Where other work holds a core, threads wait for each other longer than the work takes.
    OMP_NUM_THREADS is honoured.
    """
    most = torch.get_num_threads()
    if asked := os.environ.get("OMP_NUM_THREADS"):
        return most, f"OMP_NUM_THREADS={asked}"
    if torch.cuda.is_available():
        return most, ""
    if most == 1:
        return most, "1 CPU thread"
    ratio = slowdown(most)
    if ratio <= WORTH:
        return most, f"{most} CPU threads ({1 / ratio:.1f} times as fast as one)"
    torch.set_num_threads(1)
    loss = f"would be {ratio:.1f} times as slow" if ratio >= 1.05 else "would be hardly faster"
    return 1, f"1 of {most} CPU threads: {most} {loss} on this busy machine"


@torch.enable_grad()
def slowdown(most: int) -> float:
    """The time of small training steps with `most` threads over that with one, in turn for SECONDS.

    Means, not the fastest: a training pays for every wait. A step is short (the first layers of a
    MobileNetV2 at 48 px), because an operation of waiting threads can take a tenth of a second.
    """
    own = torch.Generator().manual_seed(0)  # the random numbers of the run stay as they were
    x = torch.randn(16, 3, 48, 48, generator=own).to(memory_format=torch.channels_last)
    shapes = (32, 3, 3, 3), (96, 32, 1, 1), (96, 1, 3, 3), (32, 96, 1, 1)
    weights = [torch.randn(shape, generator=own).requires_grad_() for shape in shapes]
    options = dict(stride=2, padding=1), {}, dict(stride=2, padding=1, groups=96), {}
    spent, before, begun = {1: [], most: []}, torch.get_num_threads(), time.perf_counter()
    try:
        while time.perf_counter() < begun + SECONDS:
            for number, times in spent.items():
                torch.set_num_threads(number)
                start, z = time.perf_counter(), x
                for weight, option in zip(weights, options, strict=True):
                    z = F.batch_norm(F.conv2d(z, weight, **option), None, None, training=True)
                    z = F.relu6(z)
                z.square().mean().backward()
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    # The first time is a warm-up, unless the waits were so long that there is no other.
    means = {number: fmean(times[1:] or times) for number, times in spent.items()}
    return means[most] / means[1]
