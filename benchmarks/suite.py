"""What cross-entropy does not see of a distilled model, some minutes.

    python benchmarks/suite.py --images 40 --size 48 --epochs 6

PGD with cross-entropy and with the margin loss on a small CNN and on models distilled as by
Papernot et al. (arXiv 1511.04508), trained on the pneumonia images (those in the folder DLIA_DATA
names, otherwise synthetic ones).
"""

# ruff: noqa: I001  (timing sets the allocator and puts the repository on the path: it comes first)

from __future__ import annotations

import argparse
import logging
import platform
import tempfile

import timing  # noqa: F401

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dlia_utils.data import cache, datasets, sources, split
from dlia_utils import objectives, train
from dlia_utils.attacks import evaluate, pgd
from dlia_utils.models import cnn
from dlia_utils.units import pixel_eps, pixel_text


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
        f"{len(images['train'][0])} {source} images, {len(images['test'][0])} attacked\n"
    )
    distilled(images, options, device)


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
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    return parser.parse_args()


def read(options: argparse.Namespace) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
    """Images and labels of the splits "train" and "test", and what kind of images they are."""
    location = sources.find("pneumonia", download=False)
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


if __name__ == "__main__":
    main()
