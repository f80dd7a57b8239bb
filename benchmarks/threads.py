"""One CPU thread against all, alone and beside busy loops, and what `device.choose_threads` makes
of it.

    python benchmarks/threads.py
    python benchmarks/threads.py --trials 5 --steps 24

Wall time of training steps of the smoke profile's MobileNetV2 (16 x 3 x 48 x 48), one case after
the other, trial by trial; the median trial is told. What else the machine does shows as "other
work", in cores; a trial alone waits for others to pause, up to --wait seconds.
"""

# ruff: noqa: I001  (timing sets the allocator and puts the repository on the path: it comes first)

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `make` and the notebooks' kernels have it

from timing import Row, print_table

import numpy as np
import psutil
import torch
from torch.nn import functional as F

from dlia_utils import device
from dlia_utils.models.mobilenet import mobilenet_v2


def main() -> None:
    options = arguments()
    most = torch.get_num_threads()
    if most == 1:
        raise SystemExit("one CPU thread: nothing to compare")
    print(
        f"{platform.machine()} CPU, {most} threads; torch {torch.__version__}; "
        f"{options.steps} steps, median of {options.trials} trials; wall time\n"
    )
    step, rows = training_step(), []
    for loops in (0, most):
        with busy(loops):
            rows += compare(step, most, options, f"beside {loops} busy loops" if loops else "alone")
    print_table(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="batches per trial")
    parser.add_argument("--wait", type=float, default=60, help="seconds, for a quiet moment")
    return parser.parse_args()


def training_step() -> Callable[[], None]:
    torch.manual_seed(0)
    model = mobilenet_v2(width=0.5, stages=3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.rand(16, 3, 48, 48), torch.randint(0, 2, (16,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many processes that do nothing but keep a core busy."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        time.sleep(1 if loops else 0)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def compare(
    step: Callable[[], None], most: int, options: argparse.Namespace, where: str
) -> list[Row]:
    ratios, regrets = [], []
    for _ in range(options.trials):
        if where == "alone":
            pause(options.wait)
        start = work()
        measured = device.slowdown(most)
        chosen = most if measured <= device.WORTH else 1
        spent = {number: seconds(step, number, options.steps) for number in (1, most)}
        wall, other = (now - then for now, then in zip(work(), start, strict=True))
        ratios.append(spent[most] / spent[1])
        regrets.append(spent[chosen] / min(spent.values()))
        print(
            f"{where}: 1 thread {spent[1]:.2f} s, {most} threads {spent[most]:.2f} s "
            f"({ratios[-1]:.2f}x); measured at the start {measured:.2f}x: {chosen} chosen; "
            f"other work {max(other / wall, 0):.1f} cores"
        )
    ratio, regret = float(np.median(ratios)), float(np.median(regrets))
    return [
        (f"{most} threads, {where}", "one thread", ratio, ""),
        (f"the threads chosen, {where}", "the faster of both", regret, "<= 1.1x"),
    ]


def seconds(step: Callable[[], None], number: int, steps: int) -> float:
    torch.set_num_threads(number)
    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - start


def pause(limit: float) -> None:
    """Sleep until nothing else has run for a second, or for `limit` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end and psutil.cpu_percent(interval=1) > 5:
        pass


def work() -> tuple[float, float]:
    """Seconds so far: by the clock, and of the cores with other processes."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0)
    return time.perf_counter(), sum(times) - idle - time.process_time()


if __name__ == "__main__":
    main()
