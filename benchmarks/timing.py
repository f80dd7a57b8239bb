"""What the benchmarks share: cases timed in turn within one run, and the table of ratios.

Import it before NumPy and PyTorch: it sets the allocator, for which the process starts itself anew,
and puts the repository on the path.
"""

# ruff: noqa: E402  (the allocator is set before the imports)

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# glibc gives large blocks back after each forward and faults them in again, unless told at the
# start.
KEEP = "mmap_max=0 mmap_threshold=4294967296 trim_threshold=1073741824".split()
MALLOC = ":".join(f"glibc.malloc.{setting}" for setting in KEEP)
if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = MALLOC
    os.execv(sys.executable, [sys.executable, *sys.argv])
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm.auto import tqdm

Row = tuple[str, str, float, str]  # what, against what, ratio, target


def seconds(
    cases: dict[str, Callable[[], object]], *, rounds: int, device: str, group: str
) -> dict[str, float]:
    """Fastest time of each case over interleaved rounds, after one round that is not counted."""
    best = dict.fromkeys(cases, np.inf)
    for turn in tqdm(range(rounds + 1), desc=group):
        for name, case in cases.items():
            start = clock(device)
            case()
            if turn:
                best[name] = min(best[name], clock(device) - start)
    for name, value in best.items():
        print(f"{group}: {name}: {value:.3g} s")
    return best


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def print_table(rows: Iterable[Row]) -> None:
    print("\n| what | against | ratio | target | |\n|---|---|---|---|---|")
    for what, against, ratio, target in rows:
        print(f"| {what} | {against} | {ratio_text(ratio)} | {target} | {verdict(ratio, target)} |")


def ratio_text(ratio: float) -> str:
    return "not installed" if np.isnan(ratio) else f"{ratio:.3g}x"


def verdict(ratio: float, target: str) -> str:
    if not target or np.isnan(ratio):
        return ""
    sign, bound = target.split()
    met = ratio <= float(bound[:-1]) if sign == "<=" else ratio >= float(bound[:-1])
    return "met" if met else "NOT met"


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
