"""How long a step took and how much memory, for the log and a table beside the results."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil
import torch

from . import files

log = logging.getLogger("dlia_utils")

INTERVAL = 0.2  # seconds between two looks at the memory
MIB = 2**20
FILE = "resources.csv"
COLUMNS = (
    "label",
    "started",
    "wall_s",
    "cpu_s",
    "rss_start_mib",
    "rss_peak_mib",
    "gpu_peak_mib",
    "failed",
)

_OPEN: list[dict] = []  # the rows of the blocks that are running now, the outer ones first


@contextmanager
def track(label: str, *, folder: str | Path | None = None) -> Iterator[dict]:
    """Measure a block: one line in the log of "dlia_utils" and, with `folder`, one more row in its resources.csv.

    Yields the row, a dict of `COLUMNS` that is complete after the block: started (local time), wall_s, cpu_s
    (seconds; user and system, with child processes that have ended), rss_start_mib and rss_peak_mib (resident memory
    of this process in MiB, looked at every 0.2 s: a shorter peak may be missed), gpu_peak_mib (allocated on all CUDA
    devices; NaN without one) and failed ("" or the name of the exception, which goes on). Blocks may be nested. The
    file only ever grows, by one process at a time. Errors: ValueError for an empty label.

    >>> with track("a step") as row:
    ...     total = sum(range(1000))
    >>> row["label"], row["failed"], row["rss_peak_mib"] >= row["rss_start_mib"] > 0
    ('a step', '', True)
    """
    if not label.strip():
        raise ValueError("label is empty: say in a few words what is measured")
    if folder is not None:
        Path(folder).mkdir(
            parents=True, exist_ok=True
        )  # what cannot be written to must show before the work
    process = psutil.Process()
    start = process.memory_info().rss / MIB
    row = {
        "label": label,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "rss_start_mib": start,
        "rss_peak_mib": start,
        "gpu_peak_mib": float("nan"),
        "failed": "",
    }
    ended = threading.Event()

    def look() -> None:
        row["rss_peak_mib"] = max(row["rss_peak_mib"], process.memory_info().rss / MIB)

    def watch() -> None:
        while not ended.wait(INTERVAL):
            look()

    _look_at_gpu()
    _OPEN.append(row)
    watcher = threading.Thread(target=watch, name="resources", daemon=True)
    wall, cpu = time.perf_counter(), _cpu_seconds(process)
    watcher.start()
    try:
        yield row
    except BaseException as error:
        row["failed"] = type(error).__name__
        raise
    finally:
        row |= {"wall_s": time.perf_counter() - wall, "cpu_s": _cpu_seconds(process) - cpu}
        ended.set()
        watcher.join()
        look()
        _look_at_gpu()
        _OPEN[:] = [other for other in _OPEN if other is not row]
        _tell(row)
        if folder is not None:
            _append(row, Path(folder) / FILE)


def table(folder: str | Path) -> pd.DataFrame:
    """The rows that `track` left in `folder`, oldest first, with `COLUMNS`.

    Errors: FileNotFoundError when nothing was tracked there.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: run a step under track(label, folder=...) first"
        )
    # A step may be called "NA", and one that did not fail has an empty cell: only the GPU's may be missing.
    text = {"label": str, "started": str, "failed": str}
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values={"gpu_peak_mib": [""]})[
        list(COLUMNS)
    ]


def _cpu_seconds(process: psutil.Process) -> float:
    spent = process.cpu_times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _look_at_gpu() -> None:
    """Credit every open block with the peak so far and count anew, so that a block inside another starts afresh."""
    if not torch.cuda.is_initialized():
        return
    devices = range(torch.cuda.device_count())
    peak = sum(torch.cuda.max_memory_allocated(device) for device in devices) / MIB
    for row in _OPEN:
        row["gpu_peak_mib"] = (
            peak if math.isnan(row["gpu_peak_mib"]) else max(peak, row["gpu_peak_mib"])
        )
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)


def _tell(row: dict) -> None:
    gpu = "" if math.isnan(row["gpu_peak_mib"]) else f", GPU at most {row['gpu_peak_mib']:.0f} MiB"
    log.log(
        logging.WARNING if row["failed"] else logging.INFO,
        "%s: %.1f s, CPU %.1f s, memory %.0f MiB at first and %.0f MiB at most%s%s",
        row["label"],
        row["wall_s"],
        row["cpu_s"],
        row["rss_start_mib"],
        row["rss_peak_mib"],
        gpu,
        f", ended by {row['failed']}" if row["failed"] else "",
    )


def _append(row: dict, path: Path) -> None:
    """One more line; what stood in the file stays, letter by letter."""
    kept = path.read_text(encoding="utf-8") if path.exists() else ""
    line = pd.DataFrame([row], columns=list(COLUMNS)).round(3)
    files.write_text(kept + line.to_csv(index=False, header=not kept, lineterminator="\n"), path)
