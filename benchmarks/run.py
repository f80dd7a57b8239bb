"""Ratios of attacks and loader to what they must cost and to what others cost, all measured in one
run.

    python benchmarks/run.py                       the whole table
    python benchmarks/run.py --only gradient --size 64 --batch 16 --rounds 5

The cases of a group are run in turn, round after round, and the fastest round of each is kept. Time
is CPU time of this process on one thread (it holds steady while others use the machine), or wall
time on a GPU. For the rows of other libraries: `pip install -r benchmarks/requirements.txt` in an
environment of its own.
"""

# ruff: noqa: I001  (timing sets the allocator and puts the repository on the path: it comes first)

from __future__ import annotations

import argparse
import logging
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

from timing import Row, installed, print_table, seconds

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from dlia_utils.data import cache, datasets, sources, phantom
from dlia_utils.attacks import fgsm, frozen, one_pixel, pgd
from dlia_utils.models.pixel import fast_copy
from dlia_utils.models.pixel import PixelModel

EPS, STEP = 8 / 255, 2 / 255
REPEATS = 50  # reads of the cache per round: one alone is too short to time


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    hardware = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, one thread"
    )
    print(
        f"{hardware}; torch {torch.__version__}; MobileNetV2, {options.size} px, batch "
        f"{options.batch}, ",
        end="",
    )
    print(f"fastest of {options.rounds} rounds; {'wall' if device == 'cuda' else 'CPU'} time\n")
    rows = []
    for name in options.only:
        rows += GROUPS[name](options, device)
    print_table(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument(
        "--batch", type=int, default=16, help="images attacked by the gradient attacks"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument(
        "--jpeg", type=int, default=1024, help="side of the JPEG images of the loader group"
    )
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    return parser.parse_args()


def mobilenet(device: str) -> PixelModel:
    torch.manual_seed(0)
    backbone = torchvision.models.mobilenet_v2(num_classes=2)
    return PixelModel(backbone, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).eval().to(device)


# ------------------------------------------------------------------------------------- FGSM and PGD


def gradient(options: argparse.Namespace, device: str) -> list[Row]:
    """FGSM and PGD-10 against the bare passes of the same frozen model and against other
    libraries."""
    model = mobilenet(device)
    x = torch.rand(options.batch, 3, options.size, options.size, device=device)
    with torch.no_grad():
        y = model(x).argmax(1)
    fast = fast_copy(model)
    full = {"eps": EPS, "steps": 10, "restarts": 0, "stop_when_fooled": False}
    cases = {
        "bare 1": lambda: bare(model, x, y, steps=1),
        "bare 10": lambda: bare(model, x, y, steps=10),
        "bare 1 + forward": lambda: bare(model, x, y, steps=1, judge=True),
        "bare 10 + forward": lambda: bare(model, x, y, steps=10, judge=True),
        "fgsm": lambda: fgsm(model, x, y, eps=EPS),
        "pgd": lambda: pgd(model, x, y, **full),
        "fgsm fast": lambda: fgsm(fast, x, y, eps=EPS),
        "pgd fast": lambda: pgd(fast, x, y, **full),
    } | other_libraries(model, x, y)
    time_of = seconds(cases, rounds=options.rounds, device=device, group="gradient")
    rows = []
    for name, label, k in (("fgsm", "FGSM", 1), ("pgd", "PGD-10", 10)):
        passes = f"{k} forward+backward"
        same = f"bare model, the same passes ({passes}, and the forward that judges)"
        rows.append((label, same, time_of[name] / time_of[f"bare {k} + forward"], "<= 1.03x"))
        rows.append((label, f"bare model, {passes}", time_of[name] / time_of[f"bare {k}"], ""))
        through = f"{label} through fast_copy"
        rows.append(
            (through, same, time_of[f"{name} fast"] / time_of[f"bare {k} + forward"], "<= 0.75x")
        )
        rows.append(
            (through, f"bare model, {passes}", time_of[f"{name} fast"] / time_of[f"bare {k}"], "")
        )
        for library in ("torchattacks", "foolbox"):
            theirs = time_of.get(f"{library} {name}", np.nan)
            rows.append((label, library, time_of[name] / theirs, ""))
            rows.append((through, library, time_of[f"{name} fast"] / theirs, ""))
    return rows


def bare(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, judge: bool = False) -> None:
    """What any such attack must pay: forward and input gradient, and one forward to know what it
    achieved."""
    with frozen(model):
        for _ in range(steps):
            point = x.detach().requires_grad_()
            torch.autograd.grad(
                nn.functional.cross_entropy(model(point), y, reduction="sum"), point
            )
        if judge:
            with torch.no_grad():
                model(x)


def other_libraries(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """The same attacks of torchattacks (which does not say what was fooled) and foolbox (which
    does)."""
    cases = {}
    if installed("torchattacks"):
        import torchattacks

        cases["torchattacks fgsm"] = lambda: torchattacks.FGSM(model, eps=EPS)(x, y)
        theirs = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=10, random_start=False)
        cases["torchattacks pgd"] = lambda: theirs(x, y)
    if installed("foolbox"):
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
        single = foolbox.attacks.LinfFastGradientAttack(random_start=False)
        many = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=10, random_start=False)
        cases["foolbox fgsm"] = lambda: single(wrapped, x, y, epsilons=EPS)
        cases["foolbox pgd"] = lambda: many(wrapped, x, y, epsilons=EPS)
    return cases


# ---------------------------------------------------------------------------------------- one pixel


def pixel(options: argparse.Namespace, device: str) -> list[Row]:
    """One-Pixel against the same number of plain forwards, and against one image at a time with a
    graph."""
    model, n = mobilenet(device), 16
    x = torch.rand(n, 3, options.size, options.size, device=device)
    with torch.no_grad():
        y = model(x).argmax(1)
    search = {"population": 10, "iterations": 3}
    queries = one_pixel(model, x, y, **search).forwards
    fast = fast_copy(model)
    cases = {
        "forwards": lambda: plain_forwards(model, x, queries, 256),
        "one_pixel": lambda: one_pixel(model, x, y, **search),
        "one_pixel fast": lambda: one_pixel(fast, x, y, **search),
        "one at a time": lambda: one_at_a_time(model, x, y, queries),
    }
    time_of = seconds(cases, rounds=options.rounds, device=device, group="pixel")
    plain, loop = (
        f"{queries} plain forwards, batch 256",
        f"the original study's loop, {queries} forwards of one image",
    )
    return [
        ("One-Pixel", plain, time_of["one_pixel"] / time_of["forwards"], "<= 1.1x"),
        ("One-Pixel through fast_copy", plain, time_of["one_pixel fast"] / time_of["forwards"], ""),
        ("One-Pixel", loop, time_of["one_pixel"] / time_of["one at a time"], ""),
        (
            "One-Pixel through fast_copy",
            loop,
            time_of["one_pixel fast"] / time_of["one at a time"],
            "",
        ),
    ]


@torch.inference_mode()
def plain_forwards(model: nn.Module, x: Tensor, queries: int, batch_size: int) -> None:
    images = x.repeat(-(-batch_size // len(x)), 1, 1, 1)[:batch_size]
    for start in range(0, queries, batch_size):
        model(images[: queries - start])


def one_at_a_time(model: nn.Module, x: Tensor, y: Tensor, queries: int) -> None:
    """The published study's way: every candidate alone, autograd on, the answer fetched each
    time."""
    rng = np.random.default_rng(0)
    for query in range(queries):
        i = query % len(x)
        candidate = x[i : i + 1].clone()
        row, column = rng.integers(0, x.shape[2], 2)
        candidate[0, :, row, column] = torch.from_numpy(rng.random(3, dtype=np.float32)).to(x)
        model(candidate).softmax(1)[0, y[i]].item()


# ------------------------------------------------------------------------------------------- loader


def loader(options: argparse.Namespace, device: str) -> list[Row]:
    """Images from the cache against decoding and resizing the same JPEG images with PIL."""
    with tempfile.TemporaryDirectory() as folder:
        counts = {"train": (12, 12), "val": (1, 1), "test": (3, 3)}
        phantom.write_pneumonia(Path(folder), images=counts, size=options.jpeg)
        images = datasets.load(sources.find("pneumonia", Path(folder)))
        cached = cache.build(images, size=options.size, root=Path(folder) / "cache", progress=False)
        paths = [images.root / path for path in images.manifest["path"]]
        cases = {
            "PIL": lambda: [decode(path, options.size) for path in paths],
            "cache": lambda: [cached.batch(range(len(paths))) for _ in range(REPEATS)],
        }
        time_of = seconds(cases, rounds=options.rounds, device="cpu", group="loader")
    against = f"PIL decode + resize of {options.jpeg} px JPEG"
    return [
        (
            "cached loader, images per second",
            against,
            REPEATS * time_of["PIL"] / time_of["cache"],
            ">= 10x",
        )
    ]


def decode(path: Path, size: int) -> Tensor:
    with Image.open(path) as image:
        grey = image.convert("L").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(grey).copy())[None].float() / 255


GROUPS = {"gradient": gradient, "pixel": pixel, "loader": loader}

if __name__ == "__main__":
    main()
