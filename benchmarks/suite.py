"""What the suite saves by dropping fooled images, and what cross-entropy does not see of a
distilled model.

    python benchmarks/suite.py                           both tables, some minutes
    python benchmarks/suite.py --only dropping --images 40 --size 48 --epochs 6

A small CNN trained on the pneumonia images (those in the folder DLIA_DATA names, otherwise
synthetic ones). All ways of running the suite must fool the same images at every eps, or the
benchmark stops. Time is CPU time of this process on one thread, or wall time on a GPU; image-passes
include the judging of every result. The second table: PGD with cross-entropy and with the margin
loss on models distilled as by Papernot et al. (arXiv 1511.04508).
"""

# ruff: noqa: I001  (timing sets the allocator and puts the repository on the path: it comes first)

from __future__ import annotations

import argparse
import logging
import platform
import tempfile
from collections.abc import Sequence

from timing import Row, clock, print_table

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dlia_utils.data import cache, datasets, sources, split
from dlia_utils import objectives, train
from dlia_utils.attacks import evaluate, pgd
from dlia_utils.models import cnn
from dlia_utils.units import pixel_eps, pixel_text

MOST = 0.2  # accuracy left where most images have fallen
# As the libraries do.
FULLY = [name for name, kind in evaluate.KINDS.items() if kind.twice]
EVERY_STEP = {name: {"stop_when_fooled": False} for name in FULLY}
WAYS = {"dropped": {"in_full": 0}, "full": {"in_full": None}}
WAYS["every step"] = {"in_full": None, "budgets": EVERY_STEP}
AGAINST = {
    "full": "every attack on every image",
    "every step": "the same, PGD and APGD without stopping",
}


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
    images, source = read(options)
    print(
        f"{hardware}; torch {torch.__version__}; CNN, {options.size} px, {options.epochs} epochs "
        "on "
        f"{len(images['train'][0])} {source} images, {len(images['test'][0])} attacked; "
        f"fastest of {options.rounds} rounds; {'wall' if device == 'cuda' else 'CPU'} time\n"
    )
    for name in options.only:
        GROUPS[name](images, options, device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=64, help="image side in pixels")
    parser.add_argument("--images", type=int, default=60, help="test images attacked")
    parser.add_argument(
        "--per-class", type=int, default=300, help="most images of a class read, all splits"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=8,
        help="of the plain model; the distilled: three times as many",
    )
    parser.add_argument(
        "--levels", type=float, nargs="+", default=[1, 2, 4, 8, 16], help="eps in 1/255"
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[50, 100])
    parser.add_argument("--steps", type=int, default=40, help="of PGD on the distilled models")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    return parser.parse_args()


def read(options: argparse.Namespace) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
    """Images and labels of the splits "train" and "test", and what kind of images they are."""
    location = sources.find("pneumonia")
    images = split.subset(datasets.load(location), per_class=options.per_class, seed=0)
    decoded = cache.build(images, size=options.size, progress=False)
    found = {}
    for name in ("train", "test"):
        rows = images.manifest.index[images.manifest["split"] == name].to_numpy()
        labels = torch.from_numpy(images.manifest["label"].to_numpy()[rows]).long()
        found[name] = decoded.batch(rows), labels
    order = torch.randperm(len(found["test"][0]), generator=torch.Generator().manual_seed(0))[
        : options.images
    ]
    found["test"] = tuple(part[order] for part in found["test"])
    return found, "synthetic" if location.synthetic else "real"


def trained(
    objective: objectives.Objective, images: tuple[Tensor, Tensor], epochs: int, device: str
) -> nn.Module:
    model = cnn(channels=(16, 32, 64), hidden=64, dropout=0.2)
    with tempfile.TemporaryDirectory() as folder:
        train.fit(
            model,
            objective,
            TensorDataset(*images),
            None,
            run_dir=folder,
            epochs=epochs,
            batch_size=16,
            monitor="epoch",
            progress=False,
        )
    return model.eval().to(device)


# ----------------------------------------------------------------------------------------- dropping


def dropping(
    images: dict[str, tuple[Tensor, Tensor]], options: argparse.Namespace, device: str
) -> None:
    """The suite with fooled images dropped against the same attacks in full."""
    model = trained(objectives.cross_entropy(), images["train"], options.epochs, device)
    grid = pixel_eps(*options.levels)
    found, spent = run_all(model, images["test"], grid, ["dropped", "full"], options.rounds, device)
    table = found["dropped"].table()
    print(table.drop(columns="eps").round(3).to_string(index=False))
    rows = ratios(f"all {len(grid)} eps", found, spent, "")
    fallen = table.eps[table.worst <= MOST]
    eps = float(fallen.iloc[0]) if len(fallen) else grid[-1]
    found, spent = run_all(model, images["test"], (eps,), list(WAYS), options.rounds, device)
    share = 1 - found["full"].table().worst.iloc[-1]
    rows += ratios(f"{pixel_text(eps)} alone, {share:.0%} fooled", found, spent, ">= 3x")
    print("\nHow many times as much as with dropping:")
    print_table(rows)


def run_all(
    model: nn.Module,
    images: tuple[Tensor, Tensor],
    eps_grid: Sequence[float],
    ways: Sequence[str],
    rounds: int,
    device: str,
) -> tuple[dict[str, evaluate.Evaluation], dict[str, float]]:
    """The suite in several ways, in turn: what each found, and the fastest time of each."""
    found, spent = {}, dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for way in ways:
            start = clock(device)
            found[way] = evaluate.robust(model, images, eps_grid, progress=False, **WAYS[way])
            spent[way] = min(spent[way], clock(device) - start)
    same_answer(found)
    return found, spent


def ratios(
    label: str, found: dict[str, evaluate.Evaluation], spent: dict[str, float], target: str
) -> list[Row]:
    """Image-forwards, image-backwards and time of the other ways over those of dropping."""
    rows, base = [], found["dropped"].cost[["forwards", "backwards"]].sum()
    for way in found:
        if way != "dropped":
            passes = found[way].cost[["forwards", "backwards"]].sum() / base
            goal = target if way == "full" else ""
            rows.append((f"image-forwards, {label}", AGAINST[way], float(passes.forwards), goal))
            rows.append((f"image-backwards, {label}", AGAINST[way], float(passes.backwards), ""))
            rows.append((f"time, {label}", AGAINST[way], spent[way] / spent["dropped"], ""))
    return rows


def same_answer(found: dict[str, evaluate.Evaluation]) -> None:
    sets = {}
    for way, one in found.items():
        worst = one.rows[(one.rows.attack == "worst") & one.rows.fooled]
        sets[way] = set(zip(worst.eps, worst.image, strict=True))
    if any(one != sets["dropped"] for one in sets.values()):
        raise SystemExit(
            f"not the same images are fooled: { ({way: len(one) for way, one in sets.items()}) }"
        )
    forwards = {way: int(one.cost.forwards.sum()) for way, one in found.items()}
    print(
        f"{len(sets['dropped'])} pairs of eps and image fooled, the same in all ways; forwards: "
        f"{forwards}"
    )


# ------------------------------------------------------------------------------------- distillation


def distilled(
    images: dict[str, tuple[Tensor, Tensor]], options: argparse.Namespace, device: str
) -> None:
    """PGD with both losses on a plain model and on distilled ones, all deployed at temperature
    1."""
    epochs = 3 * options.epochs
    models = {"plain": trained(objectives.cross_entropy(), images["train"], epochs, device)}
    for temperature in options.temperatures:
        hot = objectives.cross_entropy_at(temperature)
        teacher = trained(hot, images["train"], epochs, device)
        student = objectives.distillation(teacher, temperature=temperature, alpha=1.0)
        models[f"distilled, T = {temperature:g}"] = trained(
            student, images["train"], epochs, device
        )
    x, y = (part.to(device) for part in images["test"])
    print(
        "\n| model | clean accuracy | zero CE gradient | eps | fooled, PGD CE | fooled, PGD "
        "margin |"
    )
    print("|---|---|---|---|---|---|")
    for name, model in models.items():
        with torch.no_grad():
            right = model(x).argmax(1) == y
        zero = evaluate.zero_gradient_share(model, x[right], y[right])
        for eps in pixel_eps(*options.levels):
            shares = [
                pgd(model, x[right], y[right], eps=eps, steps=options.steps, loss=loss)
                .success.float()
                .mean()
                for loss in ("ce", "margin")
            ]
            print(
                f"| {name} | {right.float().mean():.1%} | {zero:.1%} | {pixel_text(eps)} | "
                f"{shares[0]:.1%} | {shares[1]:.1%} |"
            )


GROUPS = {"dropping": dropping, "distilled": distilled}

if __name__ == "__main__":
    main()
