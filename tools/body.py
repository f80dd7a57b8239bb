"""The small body that stands for pretrained weights in the smoke profile."""

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
from dlia_utils.models.mobilenet import HEAD, PHANTOM

# None of the classes that the notebooks ask for in chests: a body that knew the answers would leave
# nothing to fine-tune.
FINDINGS = ([], ["Cardiomegaly"], ["Pneumothorax"])
RECIPE = {"phantom": phantom.VERSION, "seed": 0, "size": 48, "width": 0.5, "stages": 3}
RECIPE |= {"chests": 900, "bones": 900, "epochs": 12, "batch_size": 32, "lr": 4e-3}


def make(path: str | Path = PHANTOM, **changes: Any) -> Path:
    """Learn to tell the `FINDINGS` apart, and whole bones from broken ones; keep the features.

    The file holds them in half precision, and `RECIPE` with `changes` in its metadata.
    """
    recipe = RECIPE | changes
    images, labels = _images(recipe)
    rows, classes = np.arange(len(labels)), len(FINDINGS) + 2
    options = {"weights": None, "seed": recipe["seed"], "num_classes": classes}
    model = models.mobilenet_v2(width=recipe["width"], stages=recipe["stages"], **options)
    held = cache.ImageCache(images, recipe["size"], "", Path(), ())
    learnt = augment.CachedImages(held, rows, labels, transform=augment.train_transform())
    names = "seed epochs batch_size lr".split()
    fitting = {name: recipe[name] for name in names} | {"schedule": "onecycle", "monitor": "epoch"}
    with tempfile.TemporaryDirectory() as folder:
        train.fit(model, objectives.cross_entropy(), learnt, None, run_dir=folder, **fitting)
    state = {name: value.cpu() for name, value in model.backbone.state_dict().items()}
    state = {name: value.contiguous() for name, value in state.items() if name not in HEAD}
    state = {name: v.half() if v.is_floating_point() else v for name, v in state.items()}
    save_file(state, path, metadata={"recipe": json.dumps(recipe, sort_keys=True)})
    return Path(path)


def _images(recipe: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,S,S] and their classes [N]."""
    size, drawn, labels = recipe["size"], [], []
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
