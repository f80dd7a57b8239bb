"""What stands for pretrained weights in the smoke profile, learnt from phantom images alone."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from safetensors.torch import save_file

from dlia_utils import models, objectives, train
from dlia_utils.data import augment, cache, phantom

# None of the classes that the notebooks ask for in chests: a body that knew the answers would leave
# nothing to fine-tune.
FINDINGS = ([], ["Cardiomegaly"], ["Pneumothorax"])
ROBUST = "hat_wrn_34_10 gairat_wrn_28_10 huang2021_wrn_34_r meansparse_wrn_94_16".split()
# phantom: the version whose drawings were learnt; the trees of VERSION 6 hold the same drawings.
RECIPE = {"phantom": 5, "seed": 0, "chests": 900, "bones": 900, "batch_size": 32}
RECIPE |= {"size": 48, "width": 0.5, "stages": 3, "epochs": 12, "lr": 4e-3}
# The robust ones: first without, then under attack
RECIPE |= {"robust": ROBUST, "robust_size": 32, "robust_width": 1 / 40, "robust_epochs": [8, 4]}
RECIPE |= {"eps": 4 / 255, "steps": 2}
FILE = Path(models.__file__).parent / "phantom_weights.safetensors"


def make(path: str | Path = FILE, **changes: Any) -> Path:
    """Learn to tell the `FINDINGS` apart, and whole bones from broken ones; keep the features.

    The file holds them in half precision, and `RECIPE` with `changes` in its metadata.
    """
    recipe = RECIPE | changes
    classes, state = len(FINDINGS) + 2, {}
    own = {"seed": recipe["seed"], "num_classes": classes}
    network = models.mobilenet_v2(width=recipe["width"], stages=recipe["stages"], **own)
    plain, hard = objectives.cross_entropy(), objectives.pgd_adversarial
    hard = hard(eps=recipe["eps"], steps=recipe["steps"])
    _learn(network, _images(recipe, recipe["size"]), recipe, [(recipe["epochs"], plain)])
    found = {"mobilenet_v2": network.backbone}
    images = _images(recipe, recipe["robust_size"])
    for name in recipe["robust"]:
        network = models.create(name, width=recipe["robust_width"], **own)
        _learn(
            network, images, recipe, list(zip(recipe["robust_epochs"], (plain, hard), strict=True))
        )
        found[name] = network.backbone
    for name, network in found.items():
        for key, value in network.state_dict().items():
            value = value.half() if value.is_floating_point() else value
            last = key.startswith(getattr(network, "HEAD", "classifier"))
            if not last and not key.endswith("num_batches_tracked"):
                state[f"{name}/{key}"] = value.cpu().contiguous()
    save_file(state, path, metadata={"recipe": json.dumps(recipe, sort_keys=True)})
    return Path(path)


def _learn(network, images: tuple[np.ndarray, np.ndarray], recipe: dict, phases: list) -> None:
    """Train the network in phases (epochs, objective)."""
    pixels, labels = images
    held = cache.ImageCache(pixels, pixels.shape[1], "", Path(), ())
    rows, transform = np.arange(len(labels)), augment.train_transform()
    learnt = augment.CachedImages(held, rows, labels, transform=transform)
    options = {name: recipe[name] for name in "seed batch_size lr".split()}
    options |= {"schedule": "onecycle", "monitor": "epoch"}
    for epochs, objective in phases:
        with tempfile.TemporaryDirectory() as folder:
            train.fit(network, objective, learnt, None, run_dir=folder, epochs=epochs, **options)


def _images(recipe: dict[str, Any], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,S,S] and their classes [N]."""
    drawn, labels = [], []
    for k in range(recipe["chests"]):
        rng, label = np.random.default_rng([recipe["seed"], 10, k]), k % len(FINDINGS)
        drawn.append(phantom.chest_with_findings(rng, FINDINGS[label], size=size)[0])
        labels.append(label)
    for k in range(recipe["bones"]):
        rng = np.random.default_rng([recipe["seed"], 11, k])
        sides = (128, int(128 * rng.uniform(0.55, 1)))[:: rng.choice([-1, 1])]
        image, *_ = phantom.bone(rng, height=sides[0], width=sides[1], fractured=bool(k % 2))
        drawn.append(image)
        labels.append(len(FINDINGS) + k % 2)
    square = [Image.fromarray((image * 255).astype(np.uint8)) for image in drawn]
    square = [np.asarray(ImageOps.pad(one, (size, size), Image.Resampling.BOX)) for one in square]
    return np.stack(square), np.array(labels)
