"""How many CPU threads PyTorch should use here and now: all, or one where they would only wait.

Threads meet after every operation. Where other work holds a core, they wait for each other longer
than the operation takes.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean

import torch
import torch.nn.functional as F

SECONDS = 0.7  # of measuring: in less, a system's favour for a new process hides other work
WORTH = 0.9  # all threads must save a tenth: beside a little other work they may cost many times


@functools.cache
def choose() -> tuple[int, str]:
    """Set PyTorch's CPU threads, once a process, to what is not slower; returns number and remark.

    OMP_NUM_THREADS is honoured. With one thread or a GPU (no remark) nothing is measured, none set.

    >>> number, note = choose()
    >>> number == torch.get_num_threads()
    True
    """
    most = torch.get_num_threads()
    if asked := os.environ.get("OMP_NUM_THREADS"):
        return most, f"OMP_NUM_THREADS={asked}"
    if torch.cuda.is_available():
        return most, ""
    if most == 1:
        return most, "1 CPU thread"
    ratio = slowdown(most)
    number, note = decide(most, ratio)
    torch.set_num_threads(number)
    return number, note


def decide(most: int, ratio: float) -> tuple[int, str]:
    """One thread or all of them, from the time that all take over the time of one, and why.

    >>> decide(2, 0.7)
    (2, '2 CPU threads (1.4 times as fast as one)')
    >>> decide(2, 2.13)
    (1, '1 of 2 CPU threads: 2 would be 2.1 times as slow on this busy machine')
    >>> decide(2, 1.0)
    (1, '1 of 2 CPU threads: 2 would be hardly faster on this busy machine')
    """
    if ratio <= WORTH:
        return most, f"{most} CPU threads ({1 / ratio:.1f} times as fast as one)"
    loss = f"would be {ratio:.1f} times as slow" if ratio >= 1.05 else "would be hardly faster"
    return 1, f"1 of {most} CPU threads: {most} {loss} on this busy machine"


def slowdown(most: int) -> float:
    """The time of small training steps with `most` threads over that with one, in turn for SECONDS.

    Means, not the fastest: a training pays for every wait. The number of threads stays as it was.
    """
    step, spent, begun = _step(), {1: [], most: []}, time.perf_counter()
    with _threads_kept():
        while time.perf_counter() < begun + SECONDS:
            for number, times in spent.items():
                torch.set_num_threads(number)
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
    # The first time is a warm-up, unless the waits were so long that there is no other.
    means = {number: fmean(times[1:] or times) for number, times in spent.items()}
    return means[most] / means[1]


@contextmanager
def _threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _step() -> Callable[[], None]:
    """Forward and backward through the first layers of a MobileNetV2 at the smoke profile's size.

    Short, because an operation of threads that wait for each other can take a tenth of a second.
    """
    own = torch.Generator().manual_seed(0)  # the random numbers of the run stay as they were
    x = torch.randn(16, 3, 48, 48, generator=own).to(memory_format=torch.channels_last)
    shapes = (32, 3, 3, 3), (96, 32, 1, 1), (96, 1, 3, 3), (32, 96, 1, 1)
    weights = [torch.randn(shape, generator=own).requires_grad_() for shape in shapes]
    stem, wide, depthwise, narrow = weights

    def active(z: torch.Tensor) -> torch.Tensor:
        return F.relu6(F.batch_norm(z, None, None, training=True))

    @torch.enable_grad()
    def step() -> None:
        z = active(F.conv2d(x, stem, stride=2, padding=1))
        z = active(F.conv2d(active(F.conv2d(z, wide)), depthwise, stride=2, padding=1, groups=96))
        F.conv2d(z, narrow).square().mean().backward()

    return step
