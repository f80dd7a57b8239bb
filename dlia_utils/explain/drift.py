"""Saliency drift: how far an explanation moves when the image is corrupted.

A map is compared with that of the clean image: same model, method, layer, and the class predicted
on the clean image, by one path (`read`). Two references say what a number means: the floor is the
same image explained again, the ceiling another image.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual

from .. import corrupt
from ..corruption_error import CLEAN
from ..device import device_of, release_memory
from ..models.pixel import two_logits
from ..models.resnet import BasicBlock
from ..models.transfer import blocks, last_map_layer
from ..progress import Bar
from . import base
from .gradcam import grid, one_pass

METHODS = ("gradcam++", "gradcam", "saliency")
# Times the score: what grows with drift.
SIGN = dict(rmse=1, rmse_raw=1, ssim=-1, spearman=-1, top10=-1, centre_shift=1)
FLOOR, CEILING = "same image", "random pair"  # `corruption` of the reference rows
INPUT = "input"  # `layer` of saliency
POSITIONS = 8  # layers that are looked at, shallow to deep
POOLED = 28  # side to which a saliency map is averaged
KEYS = ["image", "corruption", "severity", "method", "layer", "target"]


def map_layers(model: nn.Module) -> dict[str, str]:
    """Label and dotted name of the layers whose maps are followed, shallow to deep.

    resnet18_cifar: the second convolution of all eight blocks ("layer{k}_2" is the last block but
    one of stage k). mobilenet_v2: eight inverted residual blocks, evenly spread, "block03" being
    the third. Any other network: up to eight of its `models.blocks` and the last map.

    >>> from dlia_utils.models import resnet18_cifar
    >>> map_layers(resnet18_cifar(width=1 / 8))["layer1_2"]
    'backbone.layer1.0.conv2'
    """
    try:
        names, last = blocks(model), last_map_layer(model)
    except ValueError as error:
        kind = type(model).__name__
        raise ValueError(f"no known layers in a {kind}: pass methods=['saliency']") from error
    kinds = [type(model.get_submodule(name)) for name in names]
    if set(kinds) == {BasicBlock}:  # two in each stage
        parts = [name.split(".")[-2:] for name in names]
        labels = [f"{stage}_{2 - int(number)}" for stage, number in parts]
        return {label: f"{name}.conv2" for label, name in zip(labels, names, strict=True)}
    inverted = [n for n, kind in zip(names, kinds, strict=True) if kind is InvertedResidual]
    names = inverted or list(dict.fromkeys([*names, last]))
    places = np.linspace(0, len(names) - 1, min(POSITIONS, len(names))).round().astype(int)
    if inverted:
        return {f"block{place + 1:02d}": names[place] for place in places}
    bare = [name.removeprefix("backbone.").removeprefix("body.") for name in names]
    return {bare[place]: names[place] for place in places}


def read(
    model: nn.Module,
    x: Tensor,
    *,
    target: int | Tensor | None = None,
    methods: Sequence[str] = METHODS,
    layers: Mapping[str, str] | None = None,
) -> tuple[np.ndarray, Tensor, dict[tuple[str, str], Tensor]]:
    """Probabilities [B,K], the class explained, and maps [B,h,w] >= 0 by (method, label of layer).

    All from one pass. target: as for `gradcam`. layers: None takes `map_layers`. Grad-CAM and
    Grad-CAM++ come at the layer's resolution; saliency, layer "input", is averaged to at most
    28 x 28, for single pixels of a gradient are mostly noise. Of one logit z: p1 = sigmoid(z).

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    >>> found = read(net, torch.rand(5, 1, 56, 40), methods=["gradcam", "saliency"])[2]
    >>> {key: list(map.shape) for key, map in found.items()}
    {('gradcam', '0'): [5, 54, 38], ('saliency', 'input'): [5, 28, 28]}
    """
    layers = _layers(model, methods) if layers is None else layers
    once = one_pass(model, x, list(layers.values()), target, to_input="saliency" in methods)
    found = {}
    for method in methods:
        if method == "saliency":
            heat = once.to_input.abs().amax(1, keepdim=True).float()
            sides = [min(side, POOLED) for side in heat.shape[2:]]
            found[method, INPUT] = nn.functional.adaptive_avg_pool2d(heat, sides)[:, 0]
            continue
        for label, kept, gradient in zip(layers, once.kept, once.gradients, strict=True):
            found[method, label] = grid(kept, gradient, plus=method == "gradcam++")
    logits = two_logits(once.output).double()
    if logits.shape != once.output.shape:
        logits = logits / 2  # they are [-z, z], but must differ by z
    return logits.softmax(1).cpu().numpy(), once.target, found


def _layers(model: nn.Module, methods: Sequence[str]) -> dict[str, str]:
    """Label and name of the layers that the methods need."""
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"methods must be some of {', '.join(METHODS)}, not {sorted(unknown)}")
    return map_layers(model) if set(methods) - {"saliency"} else {}


# ------------------------------------------------------------------------------------------ scores


def prepared(heat: Tensor | np.ndarray) -> dict[str, np.ndarray]:
    """What `compared` needs of maps [N,h,w] >= 0; of a clean one once for all its corrupted copies.

    raw; unit: by its own range on [0,1], a constant map becomes 0, and its `base.moments`; ranks
    [N,n] about their mean, of length 1; highest [N,n]: share of each place in the highest 10 %,
    ties share; centre [N,2]: down, right.
    """
    raw = base.array(heat)
    unit, total = base.stretch(torch.from_numpy(raw)).numpy(), raw.sum((1, 2))
    flat, zero = unit.reshape(len(unit), -1), raw.max((1, 2)) <= base.TINY
    ranks = rankdata(flat, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    ranks = np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0)
    highest, count = base.highest(flat, 0.1)
    total = np.where(total > base.TINY, total, np.nan)
    centre = [raw.sum(axis) @ np.arange(raw.shape[3 - axis]) / total for axis in (2, 1)]
    found = {"raw": raw, "unit": unit, "moments": base.moments(unit), "ranks": ranks, "zero": zero}
    return found | {"highest": highest, "count": count, "centre": np.stack(centre, 1)}


def compared(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How far each map lies from its partner; `SIGN` says which way each score goes.

    Of maps scaled to [0,1]: rmse (times 255, as in the original study), ssim (Arun et al.,
    Radiology: AI 3:e200267, 2021). Whatever the scale: spearman, rank correlation of the places
    (Adebayo et al., arXiv 1810.03292); top10, share of the highest 10 % of places in common, and
    centre_shift, distance of the centres of mass over the diagonal (Ghorbani et al., arXiv
    1710.10547). rmse_raw: in the maps' own unit. zero: one of the two is 0 everywhere. NaN: what is
    not defined for constant maps, zero maps, or maps of a single place.
    """
    height, width = a["raw"].shape[1:]
    columns = {
        "rmse": 255 * np.sqrt(((a["unit"] - b["unit"]) ** 2).mean((1, 2))),
        "rmse_raw": np.sqrt(((a["raw"] - b["raw"]) ** 2).mean((1, 2))),
        "ssim": base.ssim(a["unit"], b["unit"], a["moments"], b["moments"]),
        "spearman": np.clip((a["ranks"] * b["ranks"]).sum(1), -1, 1),
        "top10": (a["highest"] * b["highest"]).sum(1) / a["count"],
        "centre_shift": np.hypot(*(a["centre"] - b["centre"]).T) / np.hypot(height, width),
    }
    if height * width == 1:
        columns |= {name: np.full(len(a["raw"]), np.nan) for name in SIGN if name != "rmse_raw"}
    return columns | {"zero": a["zero"] | b["zero"]}


# ------------------------------------------------------------------------------------- measurement


def measure(
    model: nn.Module,
    images: Tensor,
    labels: Sequence[int] | np.ndarray | Tensor,
    ids: Sequence[int] | np.ndarray | Tensor,
    *,
    names: Sequence[str] = corrupt.THESIS,
    severities: Sequence[int] = corrupt.SEVERITIES,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
    scale: str = "imagenet-c",
    batch_size: int = 32,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predictions and map drift of every image under every corruption and severity: two tables.

    ids: rows of the manifest, on which an image's corruption depends (names, severities, seed,
    scale: see `corrupt.apply`). methods: of METHODS; () takes the predictions only. Explained is
    the class predicted on the clean image, also in its corrupted copies. predictions: image (its
    id), label, corruption ("clean" once), severity (0 for clean), predicted, p0 ... p{K-1}. drift:
    KEYS, then the scores of `compared` against the clean map. Its reference rows have severity 0:
    FLOOR, the clean image explained again in another batch, and CEILING, another image (a partner
    drawn from `seed`, everyone's once) explained for the first one's class.
    """
    labels, ids = (np.asarray(torch.as_tensor(values).cpu()) for values in (labels, ids))
    if not len(set(ids.tolist())) == len(labels) == len(images) >= 2:
        raise ValueError("give each of two images or more one label and an id of its own")
    layers = _layers(model, methods)
    images = base.check(model, images)
    order = np.random.default_rng([seed, len(images)]).permutation(len(images))
    partners = np.empty_like(order)
    partners[order] = np.roll(order, -1)  # the next on a ring in random order
    device = device_of(model, images)
    # The same numbers but for rounding, and the maps cost a fifth less than in the usual layout.
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    look = partial(read, model, methods=methods, layers=layers)
    seen, moved = [], []
    bar = Bar(total=len(images), desc="drift", unit="image")
    with bar:
        for rows in np.split(np.arange(len(images)), range(batch_size, len(images), batch_size)):
            x, other = (images[part].to(device) for part in (rows, partners[rows]))
            probability, target, heats = look(x)
            kept = {key: prepared(heat) for key, heat in heats.items()}
            drifted = partial(_drifted, ids[rows], target.cpu().numpy(), kept)
            predicted = partial(_predicted, ids[rows], labels[rows])
            seen.append(predicted(CLEAN, 0, probability))
            # In twos, each image with its partner: another batch than that of the clean maps.
            pairs = zip(x, other, target, strict=True) if methods else ()
            twos = [look(torch.stack(two), target=one.repeat(2))[2] for *two, one in pairs]
            for place, which in enumerate((FLOOR, CEILING)):
                found = {key: torch.stack([two[key][place] for two in twos]) for key in kept}
                moved += drifted(which, 0, found)
            for name in names:
                for severity in severities:
                    options = {"ids": ids[rows], "severity": severity, "seed": seed, "scale": scale}
                    probability, _, found = look(corrupt.apply(name, x, **options), target=target)
                    seen.append(predicted(name, severity, probability))
                    moved += drifted(name, severity, found)
            bar.update(len(rows))
    release_memory()
    nothing = pd.DataFrame(columns=[*KEYS, *SIGN, "zero"])
    return _table(seen, ids), _table(moved, ids) if moved else nothing


def _predicted(
    ids: np.ndarray, labels: np.ndarray, corruption: str, severity: int, probability: np.ndarray
) -> pd.DataFrame:
    """Rows of the predictions of one batch."""
    who = {"image": ids, "label": labels, "corruption": corruption, "severity": severity}
    who["predicted"] = probability.argmax(1)
    return pd.DataFrame(who | {f"p{k}": p for k, p in enumerate(probability.T)})


def _drifted(
    ids: np.ndarray, target: np.ndarray, kept: dict, corruption: str, severity: int, found: dict
) -> Iterator[pd.DataFrame]:
    """Rows of the drift of one batch, one part for each method and layer."""
    for (method, layer), heat in found.items():
        values = [ids, corruption, severity, method, layer, target]
        scores = compared(kept[method, layer], prepared(heat))
        yield pd.DataFrame(dict(zip(KEYS, values, strict=True)) | scores)


def _table(parts: list[pd.DataFrame], ids: np.ndarray) -> pd.DataFrame:
    """One table of all parts, image by image in the order of `ids`, whatever the batch size."""
    place, table = pd.Series(range(len(ids)), ids), pd.concat(parts, ignore_index=True)
    return table.sort_values("image", key=lambda i: i.map(place), kind="stable", ignore_index=True)
