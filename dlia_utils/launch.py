"""Independent jobs (folds, models, attack grids) side by side: one process per GPU, a log file and a place each.

With fewer than two GPUs `each` is a plain loop, so a notebook reads and behaves the same on a laptop. For *one* long
training on several GPUs there is torchrun: `train.fit` is ready for it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from joblib import wrap_non_picklable_objects  # joblib comes with scikit-learn

from .progress import Bar

POLL = 0.2  # seconds
TAIL = 15  # lines of a failed job's log that its error shows


def each(
    function: Callable[[str], Any],
    names: Sequence[str],
    *,
    log_dir: str | Path,
    devices: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """`{name: function(name)}`; with two or more `devices` as processes side by side, each seeing its device alone.

    `devices` are values of CUDA_VISIBLE_DEVICES (default: all GPUs). The function may be one that a notebook cell
    defines; it and what it returns travel between processes, so it should return tables and numbers, and leave
    models and images in files. The CPU's threads are shared out (OMP_NUM_THREADS). Output goes to `log_dir`/NAME.log. Errors: as `run`.

    >>> each(lambda name: name.upper(), ["baseline", "papernot"], log_dir="logs", devices=[])
    {'baseline': 'BASELINE', 'papernot': 'PAPERNOT'}
    """
    if devices is None:
        devices = [str(number) for number in range(torch.cuda.device_count())]
    if len(devices) < 2 or len(names) < 2:
        return {name: function(name) for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        commands = {}
        for name in names:
            task = Path(scratch) / f"{name}.task"
            # By value, since a function of a notebook cell cannot be imported.
            task.write_bytes(pickle.dumps((wrap_non_picklable_objects(function), name)))
            commands[name] = [
                sys.executable,
                "-m",
                "dlia_utils.launch",
                str(task),
                str(task.with_suffix(".result")),
            ]
        # The package may have been found by a notebook's first cell, in a wheel for example.
        path = os.pathsep.join(filter(None, sys.path))
        # Each its share of the cores: two processes of as many threads as cores are six times as slow as one thread each.
        threads = os.environ.get(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(devices)))
        )
        slots = [
            {"CUDA_VISIBLE_DEVICES": d, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
            for d in devices
        ]
        run(commands, slots=slots, log_dir=log_dir, progress=progress)
        return {
            name: pickle.loads((Path(scratch) / f"{name}.result").read_bytes()) for name in names
        }


def run(
    jobs: Mapping[str, Sequence[str]],
    *,
    slots: Sequence[Mapping[str, str]],
    log_dir: str | Path,
    progress: bool = True,
) -> dict[str, int]:
    """Run the commands of `jobs`, as many at a time as there are slots; returns every job's exit status.

    A slot is the environment its jobs get on top of this one, e.g. {"CUDA_VISIBLE_DEVICES": "1"}. The output of
    job NAME goes to `log_dir`/NAME.log. When jobs fail, the others still run to their end. An interrupt stops all.
    Errors: ValueError without a slot; RuntimeError naming the failed jobs, with the end of each log.

    >>> import sys, tempfile
    >>> run({"a": [sys.executable, "-c", "print(1)"]}, slots=[{}], log_dir=tempfile.mkdtemp(), progress=False)
    {'a': 0}
    """
    if not slots:
        raise ValueError("slots is empty: slots=[{}] runs one job after the other")
    log_dir = Path(log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    waiting, running, status = list(jobs), {}, {}
    bar = Bar(total=len(jobs), desc=f"{len(jobs)} jobs on {len(slots)} slots", disable=not progress)
    try:
        while waiting or running:
            for slot in range(len(slots)):
                if slot not in running and waiting:
                    name = waiting.pop(0)
                    running[slot] = name, _start(jobs[name], slots[slot], log_dir / f"{name}.log")
            for slot, (name, process) in list(running.items()):
                if process.poll() is not None:
                    status[name] = process.returncode
                    del running[slot]
                    bar.update()
            bar.set_postfix_str(", ".join(name for name, _ in running.values()))
            time.sleep(POLL)
    finally:
        for _, process in running.values():
            process.terminate()
            process.wait()
        bar.close()
    failed = [name for name in jobs if status[name]]
    if failed:
        raise RuntimeError(
            "\n\n".join(_tail(log_dir / f"{name}.log", status[name]) for name in failed)
        )
    return {name: status[name] for name in jobs}


def _start(command: Sequence[str], slot: Mapping[str, str], log: Path) -> subprocess.Popen:
    with log.open("wb") as sink:
        return subprocess.Popen(
            list(command), stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **slot}
        )


def _tail(log: Path, status: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return "\n".join([f"{log.stem} ended with status {status}; the end of {log.name}:", *lines])


def _work(task: str, result: str) -> None:
    """What a process of `each` does: read the function and its name, call it, leave the result."""
    function, name = pickle.loads(Path(task).read_bytes())
    Path(result).write_bytes(pickle.dumps(function(name)))


if __name__ == "__main__":
    _work(*sys.argv[1:])
