"""Resident memory of training on attacks at 160 px, by what the allocator may keep.

    python benchmarks/memory.py
    python benchmarks/memory.py --images 64 --only kept now

MobileNetV2, batch 32, PGD training of two steps on noise; after each epoch the validation images
are attacked and the fooled ones dropped, which makes batches of many sizes. Each way is a process
of its own, on one thread: "glibc's own", "kept" (every large buffer, for ever) and "now" (as `make`
and the notebooks' kernels have it, with `device.release_memory`). For Linux with glibc.
"""

# ruff: noqa: I001  (timing sets the allocator and puts the repository on the path: it comes first)

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time

from timing import MALLOC, print_table

import psutil
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dlia_utils import objectives, train
from dlia_utils.attacks import evaluate
from dlia_utils.execute import KERNEL_ENVIRONMENT
from dlia_utils.models.mobilenet import mobilenet_v2
from dlia_utils.units import pixel_eps

KEPT = MALLOC.rpartition("=")[0] + "=8589934592"
# What a process is told at its start.
WAYS = {"glibc's own": "", "kept": KEPT, "now": KERNEL_ENVIRONMENT["GLIBC_TUNABLES"]}
MOST = 2.5  # GB, after an epoch


def main() -> None:
    options = arguments()
    if options.child:
        return print(json.dumps(measured(options)))
    print(f"{platform.machine()} CPU, one thread; torch {torch.__version__}; {options.size} px\n")
    found = {way: in_its_own_process(way) for way in options.only}
    print(
        "\n| way | after each epoch, GB | largest, GB | images per CPU second |\n|---|---|---|---|"
    )
    for way, one in found.items():
        after = ", ".join(f"{size:.2f}" for size in one["after"])
        print(f"| {way} | {after} | {one['largest']:.2f} | {one['speed']:.2f} |")
    now, rows = found.get("now"), []
    if now:
        rows += [("after an epoch", f"{MOST} GB", max(now["after"]) / MOST, "<= 1.0x")]
        growth = now["after"][-1] / now["after"][0]
        rows += [("after the last epoch", "after the first", growth, "<= 1.05x")]
        for way in set(found) - {"now"}:
            rows += [("images per CPU second", way, now["speed"] / found[way]["speed"], "")]
    print_table(rows)


def in_its_own_process(way: str) -> dict:
    environment = os.environ | {"GLIBC_TUNABLES": WAYS[way]}
    command = [sys.executable, __file__, "--child", *sys.argv[1:]]
    command += [] if way == "now" else ["--keep"]
    said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(said.stdout.splitlines()[-1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=128, help="for training; half of them again")
    parser.add_argument("--size", type=int, default=160, help="image side in pixels")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    for inner in ("--child", "--keep"):
        parser.add_argument(inner, action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(options: argparse.Namespace) -> dict:
    """The training: resident size after each epoch, the largest, training images per CPU second."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if options.keep:
        train.release_memory = evaluate.release_memory = lambda **_: None
    torch.manual_seed(0)
    y = torch.arange(options.images) % 2
    x = torch.rand(len(y), 1, options.size, options.size) * 0.9 + y.view(-1, 1, 1, 1) * 0.1
    held, after, process = (x[::2], y[: len(x[::2])]), [], psutil.Process()

    def under_attack(model: nn.Module) -> dict[str, float]:
        budget = dict(attacks=("fgsm", "pgd_ce", "fmn"), steps=2, budgets={"fmn": {"steps": 3}})
        budget |= dict(batch_size=16, in_full=0, progress=False)
        found = evaluate.robust(model, held, pixel_eps(1, 2, 4), **budget)
        return {"robust": 1 - found.fooled("worst", 4 / 255).mean()}

    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train.fit(
            mobilenet_v2().to(memory_format=torch.channels_last),
            objectives.pgd_adversarial(eps=4 / 255, steps=2, step_size=2 / 255),
            TensorDataset(x, y),
            TensorDataset(*held),
            run_dir=folder,
            val_metric=under_attack,
            on_epoch=lambda row: after.append(process.memory_info().rss / 1e9),
            epochs=options.epochs,
            batch_size=32,
            progress=False,
        )
    speed = options.images * options.epochs / (time.process_time() - start)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"after": after, "largest": largest, "speed": speed}


if __name__ == "__main__":
    main()
