"""Saliency drift: how far an explanation moves when the image is corrupted.

A map is compared with the map of the clean image: same model, same method, same layer, and the same class,
the one predicted on the clean image. Else a change of the answer would pass for a change of the map. Clean
and corrupted images take one path (`maps`), and two reference rows say what a number means: the floor is the
same image explained again, the ceiling another image.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual

from .. import corrupt
from ..corruption_error import CLEAN
from ..device import device_of
from ..models.resnet import BasicBlock
from ..models.transfer import blocks, last_map_layer
from ..progress import Bar
from . import base as s
from .eigencam import _find
from .gradcam import _grid, _one_pass

METHODS = ("gradcam++", "gradcam", "saliency")
# Times the score: what grows with drift.
SIGN = {"rmse": 1, "rmse_raw": 1, "ssim": -1, "spearman": -1, "top10": -1, "centre_shift": 1}
FLOOR, CEILING = "same image", "random pair"  # `corruption` of the reference rows
INPUT = "input"  # `layer` of saliency
POSITIONS = 8  # layers that are looked at, shallow to deep
POOLED = 28  # side to which a saliency map is averaged
_KEYS = ["image", "corruption", "severity", "method", "layer", "target"]


# ------------------------------------------------------------------------------------------- layers and maps


def map_layers(model: nn.Module) -> dict[str, str]:
    """Label and dotted name of the layers whose maps are followed, shallow to deep.

    resnet18_cifar: the second convolution of all eight blocks, before its batch norm, under the names of the
    original study: "layer{k}_2" is the last block but one of stage k, "layer{k}_1" the last. mobilenet_v2:
    the outputs of eight inverted residual blocks, evenly spread from the first to the last (all of them where
    there are fewer), "block03" being the third. Any other network with convolutions: up to eight of its
    blocks, likewise spread, and the last map (see `models.blocks` and `models.last_map_layer`), under their
    own names. All also as the body of a transfer model. Errors: ValueError for a network whose maps are not
    found, such as a transformer: pass layers yourself.

    >>> from dlia_utils.models import mobilenet_v2, resnet18_cifar
    >>> map_layers(resnet18_cifar(width=1 / 8))["layer1_2"]
    'backbone.layer1.0.conv2'
    >>> list(map_layers(mobilenet_v2(width=0.25)))
    ['block01', 'block03', 'block06', 'block08', 'block10', 'block12', 'block15', 'block17']
    """
    advice = 'pass layers={"label": "dotted.name", ...} (named_modules() has the names)'
    try:
        names, last = blocks(model), last_map_layer(model)
    except ValueError as error:
        raise ValueError(f"no default layers for a {type(model).__name__}: {advice}") from error
    if all(isinstance(model.get_submodule(name), BasicBlock) for name in names):
        return {_thesis_label(name): f"{name}.conv2" for name in names}
    inverted = [name for name in names if isinstance(model.get_submodule(name), InvertedResidual)]
    names = inverted or list(dict.fromkeys([*names, last]))
    places = np.linspace(0, len(names) - 1, min(POSITIONS, len(names))).round().astype(int)
    if inverted:
        return {f"block{place + 1:02d}": names[place] for place in places}
    return {
        names[place].removeprefix("backbone.").removeprefix("body."): names[place]
        for place in places
    }


def _thesis_label(block: str) -> str:
    """`layer1_2` for "backbone.layer1.0", of two blocks in each stage."""
    stage, number = block.split(".")[-2:]
    return f"{stage}_{2 - int(number)}"


def maps(
    model: nn.Module,
    x: Tensor,
    *,
    target: int | Tensor | None,
    methods: Sequence[str] = METHODS,
    layers: Mapping[str, str] | Sequence[str] | None = None,
) -> dict[tuple[str, str], Tensor]:
    """Maps [B,h,w] >= 0 by (method, layer label), all from one forward and one backward pass.

    x: [B,1|3,H,W] in [0,1]. target: the class that is explained, one or int64 [B]; None takes the predicted
    one. methods: of METHODS. layers: label to dotted name, or names that are their own labels; None takes
    `map_layers`. Grad-CAM and Grad-CAM++ (see `gradcam`) come as computed, at the layer's resolution;
    Grad-CAM++ is made for layers that end in a ReLU, and on signed ones, such as a convolution before its
    norm, its denominator can come near 0. Saliency (see `attribution.saliency`), layer "input", is averaged
    to at most 28 x 28: single pixels of a gradient are mostly noise, and so are the ranks of thousands of
    them. Errors: ValueError for an unknown method or layer, and as `gradcam`.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    >>> found = maps(net, torch.rand(5, 1, 56, 40), target=0, methods=["gradcam", "saliency"], layers=["1"])
    >>> {key: list(map.shape) for key, map in found.items()}
    {('gradcam', '1'): [5, 54, 38], ('saliency', 'input'): [5, 28, 28]}
    """
    methods, layers = _check_methods(methods), _check_layers(model, methods, layers)
    return _read(model, x, target, methods, layers).maps


@dataclass(frozen=True)
class _Reading:
    """What a model says of a batch: probabilities [B,K], the class explained [B], the maps."""

    probability: np.ndarray
    target: Tensor
    maps: dict[tuple[str, str], Tensor]


def _read(
    model: nn.Module,
    x: Tensor,
    target: int | Tensor | None,
    methods: Sequence[str],
    layers: Mapping[str, str],
) -> _Reading:
    """The one path of all images, clean or corrupted."""
    if not methods:
        with torch.no_grad():
            output = model(s.check(model, x))
        logits = s.two_logits(output)
        return _Reading(_probability(output), s.choose_target(logits, target), {})
    cams = [method for method in methods if method != "saliency"]
    found = [_find(model, name) for name in layers.values()] if cams else []
    once = _one_pass(model, x, found, target, to_input="saliency" in methods)
    results = {}
    for method in methods:
        if method == "saliency":
            results[method, INPUT] = _pooled(once.to_input.abs().amax(1).float())
            continue
        for label, kept, gradient in zip(layers, once.kept, once.gradients, strict=True):
            results[method, label] = _grid(kept, gradient, plus=method == "gradcam++")
    return _Reading(_probability(once.output), once.target, results)


def _pooled(heat: Tensor) -> Tensor:
    """Maps averaged to at most POOLED x POOLED."""
    sides = [min(side, POOLED) for side in heat.shape[1:]]
    return nn.functional.adaptive_avg_pool2d(heat[:, None], sides)[:, 0]


def _probability(output: Tensor) -> np.ndarray:
    """Probabilities [B,K]; of one logit z: 1 - sigmoid(z) and sigmoid(z)."""
    logits = s.two_logits(output).double()
    if output.ndim == 1 or output.shape[1] == 1:
        logits = logits / 2  # [-z, z]: their difference must be z
    return logits.softmax(1).cpu().numpy()


def _check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    wrong = (
        [methods] if isinstance(methods, str) else [name for name in methods if name not in METHODS]
    )
    if wrong or len(set(methods)) < len(methods):
        raise ValueError(f"methods must be a list of some of {', '.join(METHODS)}, not {methods!r}")
    return tuple(methods)


def _check_layers(
    model: nn.Module, methods: Sequence[str], layers: Mapping[str, str] | Sequence[str] | None
) -> dict[str, str]:
    """Label to dotted name of the layers that `methods` need."""
    if not set(methods) - {"saliency"}:
        return {}
    if layers is None:
        return map_layers(model)
    if isinstance(layers, str) or not len(layers):
        raise ValueError(
            f"layers must map labels to module names, or list module names, not {layers!r}"
        )
    named = dict(layers) if isinstance(layers, Mapping) else {name: name for name in layers}
    if len(set(named.values())) < len(layers):
        raise ValueError(f"layers names a module twice: {layers!r}")
    for name in named.values():
        _find(model, name)
    return named


# ------------------------------------------------------------------------------------------- scores


def scores(clean_maps: Tensor | np.ndarray, other_maps: Tensor | np.ndarray) -> pd.DataFrame:
    """How far each map of a stack [N,h,w] >= 0 lies from its partner; one row per pair, symmetric.

    With each map scaled to [0,1] by its own least and greatest value (a constant map becomes 0):
    rmse: root mean square difference times 255, at the maps' resolution; that of the original study, which
    also rounded to whole numbers. ssim: structural similarity (Wang et al., IEEE TIP 13:600, 2004; for
    maps Arun et al., Radiology: AI 3:e200267, 2021), data range 1, Gaussian window of standard deviation 1.5,
    11 places wide, mirrored at the border: on a 4 x 4 map that is nearly the whole map.
    Whatever their scale: spearman: rank correlation of the places, ties with their mean rank (Adebayo et al.,
    arXiv 1810.03292). top10: share that the highest 10 % of places (rounded, at least one) have in common
    (Ghorbani et al., arXiv 1710.10547). Places of equal height at the edge share what is left, so a flat map
    scores chance, about 0.1; a map with fewer than 10 % of places above 0 stays below 1 against itself.
    centre_shift: distance of the centres of mass over the map's diagonal (Ghorbani et al.).
    Not scaled at all: rmse_raw: root mean square difference, in the maps' own unit, to be compared within one
    model, method and layer only.
    zero: one of the two maps is 0 everywhere; where both are, rmse, rmse_raw and ssim say that they agree.
    NaN: spearman with a constant map, centre_shift with a zero map, and all but rmse_raw for maps of a single
    place, which have no pattern. `SIGN` says which way each score goes. Errors: ValueError for other or
    unequal shapes, negative, NaN or infinite values.

    >>> bump = np.zeros((1, 4, 4))
    >>> bump[0, 0, 0] = 1
    >>> table = scores(bump, np.roll(bump, 2, axis=2))
    >>> table[["rmse", "spearman", "centre_shift"]].round(3)
         rmse  spearman  centre_shift
    0  90.156    -0.067         0.354
    """
    first, other = _as_array(clean_maps, "clean_maps"), _as_array(other_maps, "other_maps")
    if first.shape != other.shape:
        raise ValueError(
            f"clean_maps {list(first.shape)} and other_maps {list(other.shape)} differ in shape"
        )
    return pd.DataFrame(_compared(_Prepared.of(first), _Prepared.of(other)))


def _as_array(stack: Tensor | np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(stack.detach().cpu() if isinstance(stack, Tensor) else stack, dtype=float)
    if array.ndim != 3 or not array.size:
        raise ValueError(f"{name} must be maps [N,h,w], not {list(array.shape)}")
    if not np.isfinite(array).all() or array.min() < 0:
        raise ValueError(
            f"{name} hold negative, NaN or infinite values: pass Attribution.grid or .heat()"
        )
    return array


@dataclass(frozen=True)
class _Prepared:
    """What the scores need of a stack [N,h,w]: a clean map is prepared once for all its corrupted copies."""

    raw: np.ndarray  # [N,h,w]
    unit: np.ndarray  # [N,h,w] in [0,1]
    mean: np.ndarray  # [N,h,w] of `unit` in the SSIM's window
    variance: np.ndarray  # [N,h,w], likewise
    ranks: np.ndarray  # [N,h*w] of length 1 about their mean; NaN for a constant map
    highest: np.ndarray  # [N,h*w]: share of each place in the highest 10 %
    centre: np.ndarray  # [N,2] down and right, in places; NaN for a zero map
    zero: np.ndarray  # bool [N]

    @classmethod
    def of(cls, raw: np.ndarray) -> _Prepared:
        unit = _unit(raw)
        mean = s.window(unit)
        flat = unit.reshape(len(unit), -1)
        return cls(
            raw=raw,
            unit=unit,
            mean=mean,
            variance=s.window(unit**2) - mean**2,
            ranks=_ranks(flat),
            highest=_highest(flat),
            centre=_centre(raw),
            zero=raw.max((1, 2)) <= s.TINY,
        )


def _compared(a: _Prepared, b: _Prepared) -> dict[str, np.ndarray]:
    """The columns of `scores`."""
    height, width = a.raw.shape[1:]
    columns = {
        "rmse": 255 * np.sqrt(((a.unit - b.unit) ** 2).mean((1, 2))),
        "rmse_raw": np.sqrt(((a.raw - b.raw) ** 2).mean((1, 2))),
        "ssim": s.likeness(a.mean, b.mean, a.variance, b.variance, s.window(a.unit * b.unit)),
        "spearman": np.clip((a.ranks * b.ranks).sum(1), -1, 1),
        "top10": (a.highest * b.highest).sum(1) / _count(height * width),
        "centre_shift": np.hypot(*(a.centre - b.centre).T) / np.hypot(height, width),
    }
    if height * width == 1:
        columns = {
            name: v if name == "rmse_raw" else np.full(len(v), np.nan)
            for name, v in columns.items()
        }
    return columns | {"zero": a.zero | b.zero}


def _unit(raw: np.ndarray) -> np.ndarray:
    """Each map by its own least and greatest value on [0,1]; a constant one becomes 0."""
    low, high = raw.min((1, 2), keepdims=True), raw.max((1, 2), keepdims=True)
    # What is left of a constant map after rounding must not be blown up to a pattern.
    varied = (high - low > 1e-6 * high) & (high > s.TINY)
    return np.where(varied, (raw - low) / np.where(varied, high - low, 1), 0.0)


def _ranks(flat: np.ndarray) -> np.ndarray:
    """Ranks [N,n] about their mean, of length 1: the sum of a product is then their correlation."""
    ranks = rankdata(flat, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    return np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0)


def _count(places: int) -> int:
    """How many places are the highest 10 %."""
    return max(1, round(0.1 * places))


def _highest(flat: np.ndarray) -> np.ndarray:
    """1 for places among the highest 10 %; those of equal height at the edge share what is left."""
    count = _count(flat.shape[1])
    level = np.partition(flat, -count, axis=1)[:, -count, None]
    above, equal = flat > level, flat == level
    left = (count - above.sum(1, keepdims=True)) / equal.sum(1, keepdims=True)
    return np.where(above, 1.0, np.where(equal, left, 0.0))


def _centre(raw: np.ndarray) -> np.ndarray:
    """Centres of mass [N,2], down and right."""
    total = raw.sum((1, 2))
    total = np.where(total > s.TINY, total, np.nan)
    down, right = (raw.sum(axis) @ np.arange(raw.shape[3 - axis]) / total for axis in (2, 1))
    return np.stack([down, right], 1)


# ------------------------------------------------------------------------------------------- measurement


def measure(
    model: nn.Module,
    images: Tensor,
    labels: Sequence[int] | np.ndarray | Tensor,
    ids: Sequence[int] | np.ndarray | Tensor,
    *,
    names: Sequence[str] = corrupt.THESIS,
    severities: Sequence[int] = corrupt.SEVERITIES,
    methods: Sequence[str] = METHODS,
    layers: Mapping[str, str] | Sequence[str] | None = None,
    seed: int = 0,
    scale: str = "imagenet-c",
    batch_size: int = 32,
    progress: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predictions and map drift of every image under every corruption and severity: two tables.

    images: [N,1|3,H,W] in [0,1], N >= 2. labels: N classes. ids: rows of the manifest, each once; an image's
    corruption depends on (seed, id) alone (see `corrupt.apply`, also for names, severities and scale).
    methods, layers: as for `maps`; methods=() takes the predictions only, and the second table is empty. What
    is explained is the class predicted on the clean image, also in the corrupted copies. The model is in eval
    mode; a copy of it works, on its device. Rows do not depend on batch_size but for rounding.

    predictions: image (its id), label, corruption ("clean" once per image), severity (0 for clean),
    predicted, p0 ... p{K-1}; a head with one logit z is read as classes 0 and 1, p1 = sigmoid(z).
    drift: image, corruption, severity, method, layer, target, then `scores` against the clean map. Reference
    rows have severity 0: "same image", the clean image explained again in a batch of another make-up, the
    floor; "random pair", another image of the set (a partner drawn from `seed`, everyone's once), explained
    for the first one's class, the ceiling: what is compared is where two films have evidence for one class.

    Errors: ValueError/TypeError that names the argument, before any work.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    >>> films = torch.rand(3, 1, 16, 16)
    >>> predictions, drift = measure(net, films, [0, 1, 1], [7, 8, 9], methods=["gradcam"], layers=["1"],
    ...                              names=["contrast"], severities=[1, 5], progress=False)
    >>> len(predictions), len(drift), drift["corruption"].unique().tolist()
    (9, 12, ['same image', 'random pair', 'contrast'])
    """
    methods = _check_methods(methods)
    layers = _check_layers(model, methods, layers)
    names, severities = _check_grid(names, severities)
    images, labels, ids = _check_set(model, images, labels, ids, batch_size)
    # Checks names, seed, ids and scale; severity 0 does no work.
    for name in names:
        corrupt.apply(name, images[:1], 0, seed=seed, ids=ids.min(keepdims=True), scale=scale)
    partners = _partners(len(images), seed)
    device = device_of(model, images)
    # The same numbers but for rounding, and the maps cost a fifth less than in the usual layout.
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    predictions, drift = [], []
    copies = [(name, severity) for name in names for severity in severities]
    with Bar(
        total=len(images) * (1 + len(copies)), desc="drift", unit="image", disable=not progress
    ) as bar:
        for start in range(0, len(images), batch_size):
            rows = np.arange(start, min(start + batch_size, len(images)))
            x, who = images[rows].to(device), {"image": ids[rows]}
            clean = _read(model, x, None, methods, layers)
            prepared = {key: _Prepared.of(_numpy(heat)) for key, heat in clean.maps.items()}
            known = who | {"label": labels[rows]}
            predictions.append(_predicted(known, CLEAN, 0, clean))
            if methods:
                partner = images[partners[rows]].to(device)
                for which, found in _references(
                    model, x, partner, clean.target, methods, layers
                ).items():
                    drift += _drifted(who, which, 0, clean.target, prepared, found)
            bar.update(len(rows))
            for name, severity in copies:
                spoilt = corrupt.apply(name, x, severity, seed=seed, ids=ids[rows], scale=scale)
                seen = _read(model, spoilt, clean.target, methods, layers)
                predictions.append(_predicted(known, name, severity, seen))
                drift += _drifted(who, name, severity, clean.target, prepared, seen.maps)
                bar.update(len(rows))
    return _table(predictions, ids), _table(drift, ids, columns=[*_KEYS, *SIGN, "zero"])


def _references(
    model: nn.Module,
    x: Tensor,
    partners: Tensor,
    target: Tensor,
    methods: Sequence[str],
    layers: Mapping[str, str],
) -> dict[str, dict[tuple[str, str], Tensor]]:
    """Maps of the images again, and of their partners for the same classes."""
    # In twos, each image with its partner: another batch than the one that the clean maps came from.
    found = [
        _read(model, torch.stack(pair), one.repeat(2), methods, layers).maps
        for *pair, one in zip(x, partners, target, strict=True)
    ]
    return {
        which: {key: torch.stack([both[key][place] for both in found]) for key in found[0]}
        for place, which in enumerate((FLOOR, CEILING))
    }


def _partners(count: int, seed: int) -> np.ndarray:
    """For each of `count` images another one, everyone once: the next on a ring in random order."""
    order = np.random.default_rng([seed, count]).permutation(count)
    partners = np.empty(count, dtype=np.int64)
    partners[order] = np.roll(order, -1)
    return partners


def _numpy(heat: Tensor) -> np.ndarray:
    return heat.cpu().double().numpy()


def _predicted(
    known: dict, corruption: str, severity: int, seen: _Reading
) -> dict[str, np.ndarray]:
    """Rows of the predictions of one batch."""
    probability = {f"p{k}": column for k, column in enumerate(seen.probability.T)}
    where = {
        "corruption": corruption,
        "severity": severity,
        "predicted": seen.probability.argmax(1),
    }
    return known | where | probability


def _drifted(
    who: dict,
    corruption: str,
    severity: int,
    target: Tensor,
    prepared: Mapping[tuple[str, str], _Prepared],
    found: Mapping[tuple[str, str], Tensor],
) -> list[dict]:
    """Rows of the drift of one batch, one part for each method and layer."""
    where = who | {"corruption": corruption, "severity": severity}
    return [
        where
        | {"method": method, "layer": layer, "target": target.cpu().numpy()}
        | _compared(prepared[method, layer], _Prepared.of(_numpy(heat)))
        for (method, layer), heat in found.items()
    ]


def _table(
    parts: list[dict], ids: np.ndarray, columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """One table of all parts, image by image in the order of `ids`."""
    if not parts:
        return pd.DataFrame(columns=columns)
    sizes = [len(part["image"]) for part in parts]
    table = pd.DataFrame(
        {
            name: np.concatenate(
                [np.broadcast_to(p[name], n) for p, n in zip(parts, sizes, strict=True)]
            )
            for name in columns or parts[0]
        }
    )
    # Within an image the parts come in one order, whatever the batch size.
    place = pd.Series(np.arange(len(ids)), index=ids)
    order = np.argsort(place.loc[table["image"]].to_numpy(), kind="stable")
    return table.iloc[order].reset_index(drop=True)


def _check_grid(names: Sequence[str], severities: Sequence[int]) -> tuple[list[str], list[int]]:
    if isinstance(names, str) or len(set(names)) < len(names):
        raise ValueError(f"names must be a list of corruptions, each once, not {names!r}")
    once = set(severities)
    if not once or not once <= set(corrupt.SEVERITIES) or len(once) < len(severities):
        raise ValueError(
            f"severities must be whole numbers from 1 to 5, each once, not {list(severities)}"
        )
    return list(names), [int(severity) for severity in severities]


def _check_set(
    model: nn.Module, images: Tensor, labels: Sequence[int], ids: Sequence[int], batch_size: int
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Images clamped to [0,1], labels and ids as integers."""
    images = s.check(model, images, batch_size=batch_size)
    columns = []
    for values, name in ((labels, "labels"), (ids, "ids")):
        array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
        if array.shape != (len(images),) or array.dtype.kind not in "iu" or array.min() < 0:
            raise ValueError(
                f"{name} must be {len(images)} integers >= 0, one per image, not {values!r:.80}"
            )
        columns.append(array.astype(np.int64))
    labels, ids = columns
    if len(np.unique(ids)) < len(ids):
        raise ValueError("ids holds a number twice: give each image its own row of the manifest")
    if len(images) < 2:
        raise ValueError("the random pairs need two images or more")
    return images, labels, ids


# ------------------------------------------------------------------------------------------- references


def reference_levels(drift: pd.DataFrame) -> pd.DataFrame:
    """Median and quartiles of the floor and the ceiling, per method, layer and score.

    drift: the second table of `measure`. Columns: method, layer, score, reference ("floor" or "ceiling"),
    q25, median, q75, n (pairs for which the score is defined). Errors: ValueError for a table without them.

    >>> one = {"severity": 0, "method": "gradcam", "layer": "a"} | dict.fromkeys(SIGN, 1.0)
    >>> rows = [("same image", 1.0), ("random pair", 9.0)]
    >>> both = pd.DataFrame([one | {"corruption": name, "rmse": value} for name, value in rows])
    >>> reference_levels(both).query("score == 'rmse'")[["reference", "median", "n"]].to_numpy().tolist()
    [['floor', 1.0, 1], ['ceiling', 9.0, 1]]
    """
    rows = []
    for (method, layer), part in drift.groupby(["method", "layer"], sort=False):
        for score in SIGN:
            for reference, which in (("floor", FLOOR), ("ceiling", CEILING)):
                pairs = part.loc[part["corruption"] == which, score]
                if not len(pairs):
                    raise ValueError(
                        f"no rows {which!r} for {method}, {layer}: pass measure's whole table"
                    )
                values = pairs.dropna()
                low, middle, high = values.quantile([0.25, 0.5, 0.75])
                keys = {"method": method, "layer": layer, "score": score, "reference": reference}
                rows.append(keys | {"q25": low, "median": middle, "q75": high, "n": len(values)})
    return pd.DataFrame(rows)


def position(drift: pd.DataFrame) -> pd.DataFrame:
    """Where the mean drift lies between the floor (0) and the ceiling (1).

    drift: the second table of `measure`. One row per corruption, severity, method and layer, with a column
    per score; above 1 the maps differ more than those of two images. NaN where floor and ceiling are equal.
    Errors: ValueError for a table without reference rows.

    >>> one = {"severity": 0, "method": "gradcam", "layer": "a"} | dict.fromkeys(SIGN, 0.0)
    >>> rows = [("same image", 1.0), ("random pair", 9.0), ("contrast", 3.0)]
    >>> table = position(pd.DataFrame([one | {"corruption": name, "rmse": value} for name, value in rows]))
    >>> table[["corruption", "rmse"]].to_numpy().tolist()
    [['contrast', 0.25]]
    """
    keys = ["corruption", "severity", "method", "layer"]
    means = drift.groupby(keys, sort=False)[list(SIGN)].mean()
    missing = {FLOOR, CEILING} - set(drift["corruption"])
    if missing:
        raise ValueError(f"no rows {' or '.join(sorted(missing))!r}: pass measure's whole table")
    floor, ceiling = (means.xs((which, 0), level=keys[:2]) for which in (FLOOR, CEILING))
    copies = means.drop(index=[FLOOR, CEILING], level="corruption")
    cells = copies.index.droplevel(keys[:2])
    low, span = (part.reindex(cells).to_numpy() for part in (floor, ceiling - floor))
    share = (copies.to_numpy() - low) / np.where(span == 0, np.nan, span)
    return pd.DataFrame(share, index=copies.index, columns=list(SIGN)).reset_index()
