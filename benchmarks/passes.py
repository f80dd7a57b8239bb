"""What passes cost here: images a second, how busy the device is, the ratio to the bare passes.

    python benchmarks/passes.py
    python benchmarks/passes.py --only attack train --size 96 --images 64
    python benchmarks/passes.py --only suite --attacked 60
    python benchmarks/passes.py --only start --processes 7

On a GPU or a CPU alike. "attack": PGD-10 of MobileNetV2, as it is and through `fast_copy`, against
the same forward and backward passes. "train": an epoch of `train.fit` (loader, augmentation, step,
checkpoint) against the bare step of the same model. "detect": the same of Faster R-CNN. "suite":
passes of notebook 01's whole suite of attacks with its `full` budgets on two trained networks: as
at a9fca2b, where every attack met every image at every eps, and as now. Only when asked for:
"compile", PGD-10 of a network that torch.compile made, and how long that took; "start", where the
first seconds of a process go, of one and of several started at once.

Time is wall time on a GPU, CPU time of one thread on a CPU. Busy: on a GPU the share of the wall
time in which it computes (from PyTorch's profiler), on a CPU the CPU time over the wall time.
"""

# ruff: noqa: I001  (timing sets the allocator and puts the repository on the path: it comes first)

from __future__ import annotations

import argparse
import json
import logging
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from timing import Row, clock, print_table

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from dlia_utils import models, objectives, train
from dlia_utils.attacks import evaluate, frozen, pgd
from dlia_utils.data import augment, cache, datasets, phantom, sources
from dlia_utils.device import fitting_batch
from dlia_utils.models.detector import faster_rcnn
from dlia_utils.models.mobilenet import mobilenet_v2
from dlia_utils.models.pixel import fast_copy
from dlia_utils.units import pixel_eps

# What is measured where nothing else is asked for
ON_GPU = dict(size=224, batch=64, images=512, detect_size=1024, arch="fasterrcnn_resnet50_fpn_v2")
ON_CPU = dict(size=128, batch=16, images=128, detect_size=256, arch="fasterrcnn_mobilenet_v2_fpn")
COUNTED = 3_945, 1_756  # passes per image and model of 01 at a9fca2b, as counted then
PGD_10 = {"eps": 8 / 255, "steps": 10, "restarts": 0, "stop_when_fooled": False}
HEADLINE, SQUARE, OF = 4 / 255, 200, 624  # 01 `full`: Square meets 200 of the 624 test images


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    gpu = torch.cuda.is_available() and not options.cpu
    device = "cuda" if gpu else "cpu"
    for name, usual in (ON_GPU if gpu else ON_CPU).items():
        setattr(options, name, getattr(options, name) or usual)
    hardware = f"{platform.machine()} CPU, one thread"
    print(
        f"{torch.cuda.get_device_name() if gpu else hardware}; torch {torch.__version__}; ", end=""
    )
    print(f"{options.size} px, batch {options.batch}, {options.images} images\n")
    rows: list[Row] = []
    if options.child:
        return print(json.dumps(started(device)))
    if speeds := [name for name in options.only if name in GROUPS]:
        print("| what | images/s | busy |\n|---|---|---|")
    for name in speeds:
        rows += GROUPS[name](options, device)
    if "suite" in options.only:
        rows += suite(options, device)
    if "compile" in options.only:
        rows += compiled(options, device)
    if "start" in options.only:
        starts(options)
    if rows:
        print_table(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, help="image side in pixels")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--images", type=int, help="of an epoch")
    parser.add_argument("--attacked", type=int, default=40, help="images, by the suite")
    parser.add_argument("--detect-size", type=int, help="side for the detector")
    parser.add_argument("--arch", help="of the detector")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=[*GROUPS, *ALONE], default=[*GROUPS, "suite"])
    parser.add_argument("--processes", type=int, default=7, help="started at once by start")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    return parser.parse_args()


def measured(cases: dict[str, Callable], images: int, device: str, rounds: int) -> dict[str, float]:
    """Images a second of each case, the fastest of interleaved rounds; told with how busy it was.

    A case may return the seconds that count, where it did other things as well.
    """
    best, busy = dict.fromkeys(cases, np.inf), {}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, case in cases.items():
            wall, begun = time.perf_counter(), clock(device)
            own = case()
            spent = own if isinstance(own, float) else clock(device) - begun
            wall = time.perf_counter() - wall
            if turn and spent < best[name]:
                best[name], busy[name] = spent, (clock(device) - begun) / wall
    for name, case in cases.items():
        share = gpu_share(case) if device == "cuda" else busy[name]
        print(f"| {name} | {images / best[name]:.1f} | {share:.0%} |")
    return {name: images / spent for name, spent in best.items()}


def gpu_share(case: Callable) -> float:
    """The share of the wall time in which a GPU's kernels run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as told:
        begun = clock("cuda")
        case()
        wall = clock("cuda") - begun
    return sum(event.self_device_time_total for event in told.key_averages()) / 1e6 / wall


# ------------------------------------------------------------------------------------------ attacks


def victim(options: argparse.Namespace, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """MobileNetV2, random images, and its own answers to them."""
    torch.manual_seed(0)
    model = mobilenet_v2(num_classes=2).eval().to(device)
    x = torch.rand(options.batch, 1, options.size, options.size, device=device)
    return model, x, model(x).argmax(1).detach()


def attack(options: argparse.Namespace, device: str) -> list[Row]:
    model, x, y = victim(options, device)
    fast = fast_copy(model)
    cases = {
        "PGD-10's bare passes": lambda: bare_passes(model, x, y),
        "PGD-10": lambda: pgd(model, x, y, **PGD_10),
        "PGD-10 through fast_copy": lambda: pgd(fast, x, y, **PGD_10),
    }
    speed = measured(cases, len(x), device, options.rounds)
    print(f"| (attacks of this model take {fitting_batch(model, x)} images at once) | | |")
    against, bare = "its bare passes, time", speed["PGD-10's bare passes"]
    return [
        ("PGD-10", against, bare / speed["PGD-10"], "<= 1.03x"),
        ("PGD-10 through fast_copy", against, bare / speed["PGD-10 through fast_copy"], "<= 0.75x"),
    ]


def bare_passes(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Ten forwards with input gradients, and the forward that judges."""
    with frozen(model):
        for _ in range(10):
            point = x.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
        with torch.no_grad():
            model(x)


def compiled(options: argparse.Namespace, device: str) -> list[Row]:
    """PGD-10 of a network that torch.compile made (on a GPU also as CUDA graphs), and its wait."""
    model, x, y = victim(options, device)
    fast = fast_copy(model)
    modes = ["default"] + ["reduce-overhead"] * (device == "cuda")  # the second: CUDA graphs
    made, waits = {"as it is": fast}, {}
    for mode in modes:
        name, begun = f"compiled, {mode}", time.perf_counter()
        made[name] = torch.compile(fast, mode=mode)
        pgd(made[name], x, y, **PGD_10)
        waits[name] = time.perf_counter() - begun
    print("\n| PGD-10 through fast_copy | images/s | busy |\n|---|---|---|")
    cases = {name: lambda one=one: pgd(one, x, y, **PGD_10) for name, one in made.items()}
    speed = measured(cases, len(x), device, options.rounds)
    for name, wait in waits.items():
        print(f"{name}: the first call took {wait:.0f} s")
    return [
        (f"PGD-10, {name}", "as it is, time", speed["as it is"] / speed[name], "") for name in waits
    ]


# ---------------------------------------------------------------------------------------- trainings


def decoded(options: argparse.Namespace, size: int, images: int) -> cache.ImageCache:
    noise = np.random.default_rng(0).integers(0, 256, (images, size, size), dtype=np.uint8)
    return cache.ImageCache(noise, size, "", Path(), (), np.full((images, 2), size))


def epochs(model: nn.Module, objective, data, device: str, batch: int, **more) -> Callable:
    """A case: two epochs of `train.fit`, the second one's seconds."""

    def case() -> float:
        with tempfile.TemporaryDirectory() as folder:
            begun, told = [], {}

            def on_epoch(row: dict) -> None:
                now = clock(device)
                told["seconds"] = now - begun[-1] if begun else 0.0
                begun.append(now)

            how = dict(run_dir=folder, epochs=2, batch_size=batch, monitor="epoch")
            how |= dict(on_epoch=on_epoch, progress=False) | more
            train.fit(model, objective, data, None, **how)
        return told["seconds"]

    return case


def bare_step(model: nn.Module, batch: tuple, loss: Callable, device: str, steps: int) -> Callable:
    """A case: so many steps of an optimiser on one batch that is there already."""
    model = model.train().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], fused=True)
    capable = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    half = torch.bfloat16 if capable else torch.float16
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda" and not capable)

    def case() -> None:
        for _ in range(steps):
            with torch.autocast(device, half, enabled=device == "cuda"):
                value = loss(model, *batch)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return case


def training(options: argparse.Namespace, device: str) -> list[Row]:
    options.images -= options.images % options.batch
    images, labels = decoded(options, options.size, options.images), np.arange(options.images) % 2
    rows = np.arange(options.images)
    on_cpu, there = (
        augment.CachedImages(
            images, rows, labels, transform=augment.train_transform(), device=place
        )
        for place in ("", device)
    )
    new = mobilenet_v2
    x, y = images.batch(rows[: options.batch]).to(device), torch.from_numpy(labels)[: options.batch]
    own, loss, steps = (
        (device, options.batch),
        objectives.cross_entropy(),
        options.images // options.batch,
    )
    batch, attacked = (x, y.to(device)), objectives.pgd_adversarial(eps=4 / 255, steps=2)
    cases = {
        "bare step": bare_step(new(), batch, lambda *a: loss(*a)[0], device, steps),
        "an epoch of train.fit, images changed on the CPU": epochs(new(), loss, on_cpu, *own),
        "an epoch of train.fit, images changed on the device": epochs(new(), loss, there, *own),
        "bare step of PGD training (2 steps)": bare_step(
            new(), batch, lambda *a: attacked(*a)[0], device, steps
        ),
        "an epoch of PGD training": epochs(new(), attacked, there, *own),
    }
    speed = measured(cases, options.images, device, options.rounds)
    bare, cpu, device_, bare_pgd, at = speed.values()
    loaders = {"images changed on the CPU": on_cpu, "on the device": there}
    read = measured(
        {f"loader alone, {k}": lambda v=v: emptied(v, options) for k, v in loaders.items()},
        options.images,
        device,
        options.rounds,
    )
    least = min(read.values()) / bare
    return [
        ("training, images changed on the CPU", "bare step, images/s", cpu / bare, ">= 0.85x"),
        ("training, changed on the device", "bare step, images/s", device_ / bare, ">= 0.85x"),
        (
            "PGD training, changed on the device",
            "its bare step, images/s",
            at / bare_pgd,
            ">= 0.85x",
        ),
        ("the slower loader alone", "bare step, images/s", least, ""),
    ]


def emptied(data, options: argparse.Namespace) -> None:
    for _ in DataLoader(data, batch_size=options.batch):
        pass


def detection(options: argparse.Namespace, device: str) -> list[Row]:
    size, count, batch = options.detect_size, 16, 4
    images = decoded(options, size, count)
    boxes = pd.DataFrame({"image": np.arange(count), "x1": 0.2 * size, "y1": 0.3 * size})
    boxes = boxes.assign(x2=0.6 * size, y2=0.7 * size, label=1)
    data = augment.CachedBoxes(images, np.arange(count), boxes, transform=augment.box_transform())
    x, targets = augment.collate_boxes([data[k] for k in range(batch)])
    batch_ = x.to(device), [{k: v.to(device) for k, v in one.items()} for one in targets]
    how = dict(arch=options.arch, num_classes=8, size=size)
    loss = objectives.detection()
    cases = {
        "bare detector step": bare_step(
            faster_rcnn(**how), batch_, lambda *a: loss(*a)[0], device, count // batch
        ),
        "an epoch of the detector": epochs(
            faster_rcnn(**how), loss, data, device, batch, collate=augment.collate_boxes
        ),
    }
    bare, epoch = measured(cases, count, device, options.rounds).values()
    return [(f"detector, {options.arch}, {size} px", "its bare step", epoch / bare, ">= 0.85x")]


# -------------------------------------------------------------------------------------------- suite


def suite(options: argparse.Namespace, device: str) -> list[Row]:
    """Passes per image of 01's suite, before and now, on a plain and on a robust network."""
    with tempfile.TemporaryDirectory() as folder:
        counts = {"train": (120, 120), "val": (1, 1), "test": (options.attacked // 2,) * 2}
        phantom.write_pneumonia(Path(folder), images=counts, size=64)
        told = datasets.load(sources.find("pneumonia", Path(folder)))
        images = cache.build(told, size=64, root=Path(folder) / "cache", progress=False)
        split, labels = told.manifest["split"], told.manifest["label"].to_numpy()
        parts = [np.flatnonzero(split.eq(name)) for name in ("train", "test")]
        learn, test = ((images.batch(rows), torch.from_numpy(labels[rows])) for rows in parts)
    grid = pixel_eps(0.25, 0.5, 1, 2, 4, 8)
    how = dict(attacks=evaluate.SUITE, steps=20, restarts=2, progress=False, in_full=None)
    how |= dict(budgets={"square": {"steps": 2000}}, at={"square": [HEADLINE]}, batch_size=64)
    ways = {"before": {}, "now": {"full_at": HEADLINE}}
    ways["now"]["most"] = {"square": max(1, round(len(test[0]) * SQUARE / OF))}
    rows = []
    trained = {"plain": objectives.cross_entropy()}
    trained["robust"] = objectives.pgd_adversarial(eps=HEADLINE, steps=5)
    for name, objective in trained.items():
        model = models.cnn(channels=(16, 32, 64), hidden=64, dropout=0.2)
        with tempfile.TemporaryDirectory() as folder:
            data = torch.utils.data.TensorDataset(*learn)
            fit = dict(epochs=12, batch_size=16, monitor="epoch", progress=False, run_dir=folder)
            train.fit(model, objective, data, None, **fit)
        found = {way: evaluate.robust(model, test, grid, **how | own) for way, own in ways.items()}
        spent = {
            way: one.cost[["forwards", "backwards"]].sum() / len(test[0])
            for way, one in found.items()
        }
        for way, one in spent.items():
            print(
                f"\n{name}, {way}: {one.forwards:.0f} forward, {one.backwards:.0f} backward", end=""
            )
        worst = [np.array([one.fooled("worst", eps) for eps in grid]) for one in found.values()]
        clean = found["now"].fooled("clean", 0.0).mean()
        stands = ", ".join(f"{1 - share:.2f}" for share in worst[1].mean(1))
        print(f"\n{name}: right {1 - clean:.2f}, then {stands} at {len(grid)} eps; ", end="")
        print(f"{(worst[0] != worst[1]).sum()} of {worst[0].size} outcomes differ")
        ratio = spent["before"].sum() / spent["now"].sum()
        rows.append((f"passes of the suite, {name} network", "now", ratio, ">= 3x"))
        bound = sum(COUNTED) / spent["now"].sum()
        rows.append(
            (f"{sum(COUNTED):,} passes, as counted at a9fca2b", f"now, {name}", bound, ">= 3x")
        )
    return rows


# -------------------------------------------------------------------------------------------- start


def starts(options: argparse.Namespace) -> None:
    """A table: seconds of the parts of a process's start, alone and the median of several."""
    command = [sys.executable, __file__, "--child", *(["--cpu"] if options.cpu else [])]
    told = {}
    for count in (1, options.processes):
        how = dict(stdout=subprocess.PIPE, text=True)
        running = [subprocess.Popen(command, **how) for _ in range(count)]
        said = [json.loads(one.communicate()[0].splitlines()[-1]) for one in running]
        told[f"of {count} at once"] = pd.DataFrame(said).median()
    print(pd.DataFrame(told).round(2).to_string())


def started(device: str) -> dict[str, float]:
    """Seconds of each part, by the wall clock; the imports were timed before all others."""
    spent, begun = {"imports": time.time() - psutil.Process().create_time()}, time.perf_counter()

    def mark(part: str) -> None:
        nonlocal begun
        torch.ones(1, device=device).item()  # waits for a GPU
        spent[part], begun = time.perf_counter() - begun, time.perf_counter()

    mark("device ready")
    model = mobilenet_v2().to(device, memory_format=torch.channels_last)
    x = torch.rand(8, 1, 96, 96, device=device)
    mark("model there")
    for part in ("first pass", "second pass"):
        model(x).sum().backward()
        mark(part)
    noise = decoded(argparse.Namespace(), 96, 32)
    rows, labels = np.arange(32), np.arange(32) % 2
    data = augment.CachedImages(noise, rows, labels, transform=augment.train_transform())
    for part in ("first two workers", "the next two workers"):
        next(iter(DataLoader(data, batch_size=8, num_workers=2)))
        mark(part)
    with tempfile.TemporaryDirectory() as folder:
        how = dict(run_dir=folder, epochs=3, batch_size=8, num_workers=2, progress=False)
        told = train.fit(model, objectives.cross_entropy(), data, data, **how).history["seconds"]
    return spent | {"first epoch of train.fit": told[0], "third epoch": told[2]}


ALONE = ("suite", "compile", "start")
GROUPS = {"attack": attack, "train": training, "detect": detection}

if __name__ == "__main__":
    main()
