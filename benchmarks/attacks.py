"""Are our attacks as strong as those of torchattacks and foolbox? Fooled images on the same trained
model.

    python benchmarks/attacks.py
    python benchmarks/attacks.py --only pgd square --images 40

A small MobileNetV2 is trained on synthetic images for a few seconds. Every attack gets the images
of the test split that the model has right, the same eps and the same number of steps. eps is the
median distance to the boundary as our own minimum-norm attack finds it, so that about half of the
images can fall; the random squares get twice as much, and the random searches count as the mean of
three seeds. A image counts as fooled when the model is wrong on the image that the attack returns
and that image lies in [0,1] and within eps of the image. The command fails when an attack of ours
fools fewer images than a peer's by more than the tolerance: one image in fifty, at least one. For
the peers: `pip install -r benchmarks/requirements.txt` in an environment of its own; without them
their rows say so.
"""

# ruff: noqa: I001  (timing sets the allocator and puts the repository on the path: it comes first)

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from timing import installed

import numpy as np
import torch
from torch import Tensor, nn

from dlia_utils import attacks, models
from dlia_utils.data import cache, datasets, sources, phantom

INSIDE = 1e-5  # rounding of float32 that no library is blamed for
STEPS = {"pgd": 20, "apgd": 50, "square": 500, "deepfool": 50, "fmn": 60, "carlini_wagner": 60}
SEARCHES = 5  # of Carlini and Wagner's constant
PIXELS, POPULATION, GENERATIONS = 3, 40, 20
# Seeds whose mean counts: luck moves a random search by a image or two.
SEARCHING = {"square": 3, "one_pixel": 3}

# (model, x, y, eps, seed) -> attacked images
Attack = Callable[[nn.Module, Tensor, Tensor, float, int], Tensor]


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    peers = [peer for peer in ("torchattacks", "foolbox") if installed(peer)]
    start = time.process_time()
    model, x, y = trained_model(options)
    linf, l2 = (attacks.fmn(model, x, y, norm=norm, steps=100) for norm in ("linf", "l2"))
    eps = {"linf": float(linf.linf.median()), "l2": float(l2.l2.median())}
    seconds = time.process_time() - start
    print(
        f"torch {torch.__version__}; MobileNetV2 of width 0.25 with 3 stages, trained in "
        f"{seconds:.0f} s; ",
        end="",
    )
    print(f"{len(x)} synthetic images of {options.size} px that it has right\n")
    print(
        "| attack | norm | eps | ours fooled | peer fooled | difference | peer "
        "|\n|---|---|---|---|---|---|---|"
    )
    allowed, weaker, compared = max(1, len(x) // 50), [], 0
    for name, (norm, wanted, ours, theirs) in CASES.items():
        if not any(name.startswith(start) for start in options.only):
            continue
        radius = wanted if name == "one_pixel" else wanted * eps[norm]
        text = f"{radius * 255:.2f}/255" if norm == "linf" else f"{radius:.3f}"
        seeds = SEARCHING.get(name, 1)
        found = fooled(model, x, y, ours, radius, norm, seeds)
        for peer, attack in theirs.items():
            if peer not in peers:
                print(f"| {name} | {norm} | {text} | {found:.3g} | not installed |  | {peer} |")
                continue
            other = fooled(model, x, y, attack, radius, norm, seeds)
            row = [
                name,
                norm,
                text,
                f"{found:.3g}",
                f"{other:.3g}",
                f"{found - other:+.2g}",
                f"{peer} {version(peer)}",
            ]
            print(f"| {' | '.join(map(str, row))} |", flush=True)
            compared += 1
            if found < other - allowed:
                weaker.append(f"{name} ({norm}): {found:.3g} against {other:.3g} of {peer}")
    if not compared:
        sys.exit(
            "nothing was compared: pip install -r benchmarks/requirements.txt in an environment "
            "of its own"
        )
    if weaker:
        sys.exit(f"weaker than a peer by more than {allowed}: " + "; ".join(weaker))
    print(
        f"\nIn {compared} comparisons no attack of ours fools fewer than a peer by more than "
        f"{allowed} of {len(x)}."
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=40, help="image side in pixels")
    parser.add_argument("--images", type=int, default=40, help="test images per class")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--only", nargs="+", default=[""], help="attacks whose name starts so")
    return parser.parse_args()


def trained_model(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, x, y): the model, and the test images that it has right."""
    counts = {"train": (100, 100), "val": (1, 1), "test": (options.images, options.images)}
    with tempfile.TemporaryDirectory() as folder:
        phantom.write_pneumonia(Path(folder), images=counts, size=2 * options.size)
        images = datasets.load(sources.find("pneumonia", Path(folder)))
        cached = cache.build(images, size=options.size, root=Path(folder) / "cache", progress=False)
        split = images.manifest["split"].to_numpy()
        labels = torch.from_numpy(images.manifest["label"].to_numpy(dtype=np.int64, copy=True))
        train, test = (np.flatnonzero(split == part) for part in ("train", "test"))
        x, y, x_test, y_test = cached.batch(train), labels[train], cached.batch(test), labels[test]
    model = models.mobilenet_v2(width=0.25, stages=3).train()
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(x)).split(25):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    with torch.no_grad():
        right = model(x_test).argmax(1) == y_test
    if right.float().mean() < 0.8:
        sys.exit(f"the model has only {right.float().mean():.0%} right: train longer (--epochs)")
    return model, x_test[right], y_test[right]


def fooled(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, eps: float, norm: str, seeds: int
) -> float:
    """Images that the attack fools by an image in [0,1] and within eps, mean over the seeds."""
    counts = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (a peer draws from it)
        found = attack(model, x.clone(), y.clone(), eps, seed).detach()
        change = (found - x).flatten(1)
        size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
        low, high = found.flatten(1).amin(1), found.flatten(1).amax(1)
        fair = (size <= eps + INSIDE) & (low >= -INSIDE) & (high <= 1 + INSIDE)
        with torch.no_grad():
            counts.append(int(((model(found).argmax(1) != y) & fair).sum()))
    return sum(counts) / seeds


# -------------------------------------------------------------------------------------- the attacks


def ours(name: str, *, seeded: bool = False, budget: bool = True, **options) -> Attack:
    """budget: whether the attack takes eps; the others look for the smallest change."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
        given = options | ({"seed": seed} if seeded else {}) | ({"eps": eps} if budget else {})
        return getattr(attacks, name)(model, x, y, **given).x_adv

    return attack


def torchattacks(name: str, *, seeded: bool = False, budget: bool = True, **options) -> Attack:
    """budget: whether the attack takes eps; the others look for the smallest change. Functions are
    of eps."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
        import torchattacks as library

        given = {key: value(eps) if callable(value) else value for key, value in options.items()}
        given |= ({"seed": seed} if seeded else {}) | ({"eps": eps} if budget else {})
        return getattr(library, name)(model, **given)(x, y)

    return attack


def foolbox(name: str, **options) -> Attack:
    def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
        import foolbox as library

        given = {key: value(eps) if callable(value) else value for key, value in options.items()}
        wrapped = library.PyTorchModel(model, bounds=(0, 1), device=x.device)
        return getattr(library.attacks, name)(**given)(wrapped, x, y, epsilons=eps)[1]

    return attack


def step_of(eps: float) -> float:
    return 2.5 * eps / STEPS["pgd"]


# name: (norm, eps in median distances (One-Pixel: in pixel units), ours, the peers')
CASES: dict[str, tuple[str, float, Attack, dict[str, Attack]]] = {
    "fgsm": (
        "linf",
        1.0,
        ours("fgsm"),
        {
            "torchattacks": torchattacks("FGSM"),
            "foolbox": foolbox("LinfFastGradientAttack", random_start=False),
        },
    ),
    "pgd": (
        "linf",
        1.0,
        ours("pgd", steps=STEPS["pgd"]),
        {
            "torchattacks": torchattacks("PGD", alpha=step_of, steps=STEPS["pgd"]),
            "foolbox": foolbox("LinfPGD", abs_stepsize=step_of, steps=STEPS["pgd"]),
        },
    ),
    "pgd l2": (
        "l2",
        1.0,
        ours("pgd", norm="l2", steps=STEPS["pgd"]),
        {
            "torchattacks": torchattacks("PGDL2", alpha=step_of, steps=STEPS["pgd"]),
            "foolbox": foolbox("L2PGD", abs_stepsize=step_of, steps=STEPS["pgd"]),
        },
    ),
    "apgd ce": (
        "linf",
        1.0,
        ours("apgd", steps=STEPS["apgd"]),
        {"torchattacks": torchattacks("APGD", steps=STEPS["apgd"], loss="ce")},
    ),
    "apgd ce l2": (
        "l2",
        1.0,
        ours("apgd", norm="l2", steps=STEPS["apgd"]),
        {"torchattacks": torchattacks("APGD", norm="L2", steps=STEPS["apgd"], loss="ce")},
    ),
    "square": (
        "linf",
        2.0,
        ours("square", seeded=True, steps=STEPS["square"]),
        {"torchattacks": torchattacks("Square", seeded=True, n_queries=STEPS["square"])},
    ),
    "deepfool": (
        "l2",
        1.0,
        ours("deepfool", budget=False, steps=STEPS["deepfool"]),
        {
            "torchattacks": torchattacks("DeepFool", budget=False, steps=STEPS["deepfool"]),
            "foolbox": foolbox("L2DeepFoolAttack", steps=STEPS["deepfool"]),
        },
    ),
    "deepfool linf": (
        "linf",
        1.0,
        ours("deepfool", budget=False, norm="linf", steps=STEPS["deepfool"]),
        {"foolbox": foolbox("LinfDeepFoolAttack", steps=STEPS["deepfool"])},
    ),
    "fmn": (
        "linf",
        1.0,
        ours("fmn", budget=False, steps=STEPS["fmn"]),
        {"foolbox": foolbox("LInfFMNAttack", steps=STEPS["fmn"])},
    ),
    "fmn l2": (
        "l2",
        1.0,
        ours("fmn", budget=False, norm="l2", steps=STEPS["fmn"]),
        {"foolbox": foolbox("L2FMNAttack", steps=STEPS["fmn"])},
    ),
    "carlini_wagner": (
        "l2",
        1.0,
        ours("carlini_wagner", budget=False, steps=STEPS["carlini_wagner"], searches=SEARCHES),
        {
            "torchattacks": torchattacks(
                "CW", budget=False, steps=SEARCHES * STEPS["carlini_wagner"]
            ),
            "foolbox": foolbox(
                "L2CarliniWagnerAttack",
                binary_search_steps=SEARCHES,
                steps=STEPS["carlini_wagner"],
                initial_const=0.1,
            ),
        },
    ),
    "one_pixel": (
        "linf",
        1.0,
        ours(
            "one_pixel", seeded=True, pixels=PIXELS, population=POPULATION, iterations=GENERATIONS
        ),
        {
            "torchattacks": torchattacks(
                "OnePixel", budget=False, pixels=PIXELS, popsize=POPULATION, steps=GENERATIONS
            )
        },
    ),
}

if __name__ == "__main__":
    main()
