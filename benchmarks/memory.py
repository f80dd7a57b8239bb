"""Resident memory of training on attacks at 160 px, under what the allocator may keep.

    python benchmarks/memory.py
    python benchmarks/memory.py --images 32 --epochs 2 --only "kept" "now"

MobileNetV2, batch 32, PGD training of two steps; after each epoch the validation images are
attacked, the fooled ones dropped, which makes batches of many sizes. Each way is a process of its
own on one thread, with random images of noise. Told are the resident size after each epoch, the
largest, and images (of training and validation) per CPU second. Linux; elsewhere all ways are one.
"""

# ruff: noqa: I001  (timing sets the allocator and puts the repository on the path: it comes first)

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time

from timing import MALLOC, Row, print_table

import psutil
import torch
from torch.utils.data import TensorDataset

from dlia_utils import objectives, train
from dlia_utils.attacks import evaluate
from dlia_utils.execute import KERNEL_ENVIRONMENT
from dlia_utils.models.mobilenet import mobilenet_v2
from dlia_utils.units import pixel_eps

NOW = KERNEL_ENVIRONMENT["GLIBC_TUNABLES"]
# What each process is told at its start, and whether memory is given back after each epoch.
WAYS = {
    "glibc's own": ({"GLIBC_TUNABLES": ""}, False),
    "kept": ({"GLIBC_TUNABLES": MALLOC}, False),
    "now": ({"GLIBC_TUNABLES": NOW}, True),
    "1 GB": ({"GLIBC_TUNABLES": MALLOC.replace("8589934592", "1073741824")}, True),
    "no cache": ({"GLIBC_TUNABLES": MALLOC, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}, True),
    "small cache": ({"GLIBC_TUNABLES": MALLOC, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "200"}, True),
}


def main() -> None:
    options = arguments()
    if options.child:
        return print(json.dumps(measured(options)))
    found = {}
    for way in options.only:
        environment, gives_back = WAYS[way]
        command = [sys.executable, __file__, "--child", *sys.argv[1:]]
        command += [] if gives_back else ["--keep"]
        said = subprocess.run(
            command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True
        )
        found[way] = json.loads(said.stdout.splitlines()[-1])
        print(way, found[way], flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64, help="of training, and half of them val")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(options: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if options.keep:
        train.release_memory = evaluate.release_memory = lambda: None
    torch.manual_seed(0)
    x, y = torch.rand(options.images, 1, options.size, options.size), torch.arange(options.images) % 2
    x = (x + y.view(-1, 1, 1, 1) * 0.1).clamp(0, 1)
    held = x[::2], y[: len(x[::2])]
    sizes, process, start = [], psutil.Process(), time.process_time()
    before = process.memory_info().rss / 2**20

    def attacked(model):
        rate = evaluate.robust(
            model, held, pixel_eps(1, 2, 4), attacks=("fgsm", "pgd_ce", "fmn"), steps=2, budgets={"fmn": {"steps": 3}},
            batch_size=options.images // 4, early_drop=True, progress=False,
        ).table(draws=10).worst.iloc[-1]
        return {"robust": rate}

    objective = objectives.pgd_adversarial(eps=4 / 255, steps=2, step_size=2 / 255)
    model = mobilenet_v2().to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        result = train.fit(
            model, objective, TensorDataset(x, y), TensorDataset(*held), run_dir=folder, val_metric=attacked,
            epochs=options.epochs, batch_size=32, progress=False,
            on_epoch=lambda row: sizes.append(round(process.memory_info().rss / 2**20)),
        )
    import resource
    return {"before": round(before), "after": sizes, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "cpu": round(time.process_time() - start, 1), "loss": result.history.train_loss.iloc[-1]}


if __name__ == "__main__":
    main()
