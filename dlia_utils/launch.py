"""Independent jobs (folds, models, attack grids) side by side: one process per GPU, a log each."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import quote

import torch
from joblib import wrap_non_picklable_objects

from .progress import Bar


class JobsFailed(RuntimeError):
    """The end of the failed jobs' logs; `results` holds what the others returned."""

    def __init__(self, text: str, results: dict[str, Any]) -> None:
        well = f"ended well, and is read back the next time: {', '.join(results) or 'nothing'}"
        super().__init__(f"{text}\n\n{well}")
        self.results = results


def each(
    function: Callable[[str], Any],
    names: Sequence[str],
    *,
    log_dir: str | Path,
    devices: Sequence[str] | None = None,
    cost: Callable[[str], float] = lambda name: 0,
) -> dict[str, Any]:
    """`{name: function(name)}`; with two or more `devices` as processes, each seeing one device.

    `devices` are values of CUDA_VISIBLE_DEVICES (default: all GPUs). Jobs start in the order of
    `names`, those of the highest `cost` first: else the longest may be left for the end. The
    function may be a notebook cell's; what it returns is pickled: tables and numbers. Output goes
    to `log_dir`/NAME.log. A failed job lets the others end. Raises: `JobsFailed`.
    """
    if devices is None:
        devices = [str(number) for number in range(torch.cuda.device_count())]
    if len(devices) < 2 or len(names) < 2:
        return {name: function(name) for name in names}
    log_dir, free, running, over = Path(log_dir), SimpleQueue(), [], threading.Event()
    log_dir.mkdir(parents=True, exist_ok=True)
    for device in devices:
        free.put(device)
    # Each its share of the cores, and the package where this process found it, in a wheel perhaps.
    threads = str(max(1, (os.cpu_count() or 1) // len(devices)))
    shared = {"OMP_NUM_THREADS": threads} | os.environ
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))

    def job(number: int) -> str:
        name, task, device = names[number], Path(scratch, f"{number}.task"), free.get()
        log = log_dir / f"{quote(name, safe=' ')}.log"
        # By value, since a function of a notebook cell cannot be imported.
        task.write_bytes(pickle.dumps((wrap_non_picklable_objects(function), name)))
        command = [sys.executable, "-m", "dlia_utils.launch", str(task)]
        place = shared | {"CUDA_VISIBLE_DEVICES": device}
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=place)
            running.append(process)
            if over.is_set():
                process.terminate()
            status = process.wait()
        free.put(device)
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        return "\n".join([f"{name} ended with status {status}:", *tail]) if status else ""

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(devices)) as pool:
        order = sorted(range(len(names)), key=lambda number: -cost(names[number]))
        jobs = [pool.submit(job, number) for number in order]
        try:
            for _ in Bar(as_completed(jobs), total=len(jobs), desc=f"{len(jobs)} jobs"):
                pass
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()  # nothing happens to what has ended
        told = {name: Path(scratch, f"{number}.result") for number, name in enumerate(names)}
        told = {n: pickle.loads(path.read_bytes()) for n, path in told.items() if path.exists()}
        if failed := [one.result() for one in jobs if one.result()]:
            raise JobsFailed("\n\n".join(failed), told)
    return told


if __name__ == "__main__":
    asked = Path(sys.argv[1])
    called, argument = pickle.loads(asked.read_bytes())
    asked.with_suffix(".result").write_bytes(pickle.dumps(called(argument)))
