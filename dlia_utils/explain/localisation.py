"""Does a map lie on the finding? Scores beside maps that know nothing; do weights matter?"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import sobel
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from .. import metrics
from ..data.cache import ImageCache
from ..data.datasets import Dataset
from ..data.tables import CORNERS
from . import base
from .attribution import explain
from .eigencam import inside

SCORES = ["coverage_gain", "pointing", "energy_gain", "auprc"]
TOP = 0.05  # share of the pixels that coverage takes

Region = pd.DataFrame | np.ndarray  # boxes (x1, y1, x2, y2 in the map's pixels), or a mask [H,W]


def regions_of(
    dataset: Dataset, rows: Sequence[int] | np.ndarray, cache: ImageCache, *, kind: str = "box"
) -> list[Region]:
    """The true findings of `rows` in the cached images' pixels, as `score_maps` takes them.

    kind: "box", per image the rows of `dataset.boxes`; or "outline", a mask [S,S] of all its
    polygons, where a pixel belongs when its centre lies inside. What is too small to hold a centre
    gets a pixel. ValueError for images without a finding.
    """
    rows = np.asarray(rows, dtype=np.int64)
    table, found = {"box": dataset.boxes, "outline": dataset.outlines}[kind], []
    without = dataset.manifest["path"].iloc[rows[~np.isin(rows, table["image"])]]
    if len(without):
        raise ValueError(f"leave out images without a {kind}: {', '.join(without[:3])}")
    for row, by in zip(rows, cache.scale(rows), strict=True):
        own = table[table["image"].eq(row)]
        if kind == "box":
            found.append(own.assign(**_at_least_a_pixel(own[CORNERS] * [*by, *by], cache.size)))
        else:
            masks = [_filled(np.asarray(one, float) * by, cache.size) for one in own["points"]]
            found.append(np.logical_or.reduce(masks))
    return found


def _at_least_a_pixel(boxes: pd.DataFrame, size: int) -> pd.DataFrame:
    """Boxes that hold no pixel's centre along an axis grow to the pixel of their middle."""
    low, high = np.split(boxes.to_numpy(float), 2, axis=1)
    empty = np.ceil(high - 0.5).clip(max=size) <= np.ceil(low - 0.5).clip(min=0)
    pixel = np.floor((low + high) / 2).clip(0, size - 1)
    grown = np.hstack([np.where(empty, pixel, low), np.where(empty, pixel + 1, high)])
    return pd.DataFrame(grown, boxes.index, CORNERS)


def _filled(corners: np.ndarray, size: int) -> np.ndarray:
    """Mask of the pixels whose centre lies in a polygon [n,2], or of its corners if none does."""
    centres, mask = np.arange(size) + 0.5, np.zeros((size, size), bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, 0), strict=True):
        crossed = np.flatnonzero((centres >= min(y1, y2)) & (centres < max(y1, y2)))
        place = x1 + (x2 - x1) * (centres[crossed] - y1) / ((y2 - y1) or 1)
        mask[crossed] ^= centres < place[:, None]
    if not mask.any():
        column, row = np.floor(corners).astype(int).T.clip(0, size - 1)
        mask[row, column] = True
    return mask


# ------------------------------------------------------------------------------------------ scores


def score_maps(maps: Tensor | np.ndarray, regions: Sequence[Region]) -> pd.DataFrame:
    """How well each map [N,H,W] >= 0 finds its region; one row per image.

    Columns: area, the region's share of the image (chance for the others); coverage, the share of
    the region among the highest 5 % of the pixels, and coverage_gain, above that 5 %; pointing, 1
    when the highest pixel lies inside (Zhang et al., arXiv 1608.00507); energy and energy_gain (see
    `energy_inside`); auprc of the pixels; zero, the map is 0 everywhere. Pixels of equal height
    share their places, so flat maps and zero maps score chance.

    >>> score_maps(np.eye(8)[None], [np.eye(8, dtype=bool)])[["area", "pointing", "auprc"]]
        area  pointing  auprc
    0  0.125       1.0    1.0
    """
    maps, rows = base.array(maps), []
    if not (maps >= 0).all():
        raise ValueError("maps must be [N,H,W] and >= 0 everywhere: pass Attribution.heat()")
    highest, count = base.highest(maps.reshape(len(maps), -1), TOP)
    for heat, top, region in zip(maps, highest, regions, strict=True):
        mask = inside(region, heat.shape) if isinstance(region, pd.DataFrame) else region
        if not mask.any():
            raise ValueError(f"image {len(rows)}: no pixel of its region lies on the map")
        area, zero = mask.mean(), not heat.max() > base.TINY
        coverage = top[mask.ravel()].sum() / mask.sum()
        energy = area if zero else heat[mask].sum() / heat.sum()
        row = {"area": area, "coverage": coverage, "coverage_gain": coverage - count / heat.size}
        row |= {"pointing": mask[heat == heat.max()].mean()}
        row |= {"energy": energy, "energy_gain": energy - area, "zero": zero}
        rows.append(row | {"auprc": average_precision_score(mask.ravel(), heat.ravel())})
    return pd.DataFrame(rows)


def localise(
    maps: Mapping[str, Tensor | np.ndarray],
    images: Tensor,
    regions: Sequence[Region],
    *,
    groups: Sequence,
) -> pd.DataFrame:
    """`score_maps` of several maps and of `reference_maps`, after columns map, image, group.

    maps: name -> [N,H,W] >= 0, such as `Attribution.heat()`. images: [N,1|3,H,W] in [0,1]. groups:
    patient of each image; the column group holds their numbers.

    >>> images, boxes = torch.rand(2, 1, 8, 8), [np.eye(8, dtype=bool)] * 2
    >>> table = localise({"mine": np.stack(boxes)}, images, boxes, groups=[1, 2])
    >>> summarise(table, draws=50).query("score == 'auprc'").set_index("map")["value"].idxmax()
    'mine'
    """
    tables = []
    about = {"image": range(len(images)), "group": metrics.patient_codes(groups)}
    for name, heats in {**maps, **reference_maps(images)}.items():
        first = pd.DataFrame({"map": name} | about)
        tables.append(first.join(score_maps(heats, regions)))
    return pd.concat(tables, ignore_index=True)


def summarise(per_image: pd.DataFrame, *, draws: int = 2000) -> pd.DataFrame:
    """Means of `localise`'s table by map and score, with intervals from resampling whole patients.

    Columns map, score, value, ci_low, ci_high, n, zero_maps.
    """
    zero = per_image.groupby("map")["zero"].sum()
    found = _means(per_image, draws, shares=True)
    return found.assign(zero_maps=found["map"].map(zero).astype(int))


def _means(per_image: pd.DataFrame, draws: int, *, shares: bool = False) -> pd.DataFrame:
    """Means by map and score; shares: hits and misses have an interval also when all agree."""
    rows = []
    for name, table in per_image.groupby("map", sort=False):
        for score in SCORES:
            values = table[score].to_numpy(float)
            if shares and np.isin(values, [0, 1]).all():
                values = values.astype(bool)
            row = metrics.mean(values, table["group"], draws=draws)
            rows.append({"map": name, "score": score} | row)
    return pd.DataFrame(rows)


def against_references(per_image: pd.DataFrame, *, draws: int = 2000) -> pd.DataFrame:
    """Does a map beat the maps that know nothing, image by image? Of `localise`'s table.

    Columns map, score, reference, value (mean of map - reference), ci_low, ci_high, n. A method has
    found the region when every `ci_low` of its score is above 0.
    """
    parts = []
    for reference in base.REFERENCES:
        other = per_image[per_image["map"].eq(reference)].drop(columns="map")
        others = other.merge(per_image[["map"]].drop_duplicates(), how="cross")
        gains = against_model(per_image, others, draws=draws)
        gains.insert(2, "reference", reference)
        parts.append(gains)
    return pd.concat(parts, ignore_index=True)


def against_model(
    per_image: pd.DataFrame, other: pd.DataFrame, *, draws: int = 2000
) -> pd.DataFrame:
    """Do a model's maps beat another's on the same images? Of two `localise` tables.

    Columns map, score, value (mean of this - the other), ci_low, ci_high, n, method by method.
    Methods that only one model has are left out, and so are the reference maps.
    """
    if missing := set(per_image["image"]) - set(other["image"]):
        raise ValueError(f"the other table lacks the images {sorted(missing)[:5]}: score the same")
    pairs = per_image.merge(other, on=["map", "image"], suffixes=("", "_other"))
    gains = {score: pairs[score] - pairs[f"{score}_other"] for score in SCORES}
    return _means(pairs.assign(**gains)[~pairs["map"].isin(base.REFERENCES)], draws)


def reference_maps(images: Tensor) -> dict[str, np.ndarray]:
    """Maps [N,H,W] that no model made: random pixels, a Gaussian at the centre, the image's edges.

    Random: uniform, drawn from the image's number. Centre: standard deviation a quarter of each
    side. Edges: Sobel magnitude.
    """
    grey = base.array(images.mean(1))
    height, width = grey.shape[1:]
    down, across = ((np.arange(n) + 0.5) / n - 0.5 for n in (height, width))
    centre = np.exp(-(down[:, None] ** 2 + across[None] ** 2) / (2 * 0.25**2))
    random = [np.random.default_rng([0, k]).random((height, width)) for k in range(len(grey))]
    edges = [np.hypot(sobel(image, 0), sobel(image, 1)) for image in grey]
    maps = np.stack(random), np.repeat(centre[None], len(grey), 0), np.stack(edges)
    return dict(zip(base.REFERENCES, maps, strict=True))


def sanity(
    model: nn.Module,
    x: Tensor,
    method: str,
    *,
    target: int | Tensor | None = None,
    steps: int = 8,
    seed: int = 0,
    **options,
) -> pd.DataFrame:
    """Does the map change when weights are lost? Source: Adebayo et al., arXiv 1810.03292.

    On a copy, layers with weights are randomised from the output downwards, in `steps` equal
    shares: parameters are drawn from a normal with mean zero and their own root mean square.
    method, target, options: as for `explain`; layers by name. One row per step: layers (how many
    are random), down_to (the deepest), spearman (ranks of the maps averaged to at most 14 x 14) and
    ssim, means over the images; zero, maps that vanished. The last row, "another image", is the
    likeness of maps of different images: a map that explains the model falls towards it.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    >>> table = sanity(net, torch.rand(2, 1, 8, 8), "saliency")
    >>> table["down_to"].tolist(), round(float(table["spearman"][0]), 6)
    (['none', '1', 'another image'], 1.0)
    """
    intact = explain(method, model, x, target, **options)
    first, copied = intact.heat().cpu().numpy(), copy.deepcopy(model)
    names = _layers_from_the_top(copied, x[:1])
    rows = [{"layers": 0, "down_to": "none"} | _likeness(first, first)]
    generator, done = torch.Generator().manual_seed(seed), 0
    for mark in sorted({round(len(names) * k / steps) for k in range(1, steps + 1)} - {0}):
        for name in names[done:mark]:
            for parameter in copied.get_submodule(name).parameters(recurse=False):
                draw = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.data = draw * parameter.data.square().mean().sqrt()
        done = mark
        heat = explain(method, copied, x, intact.target, **options).heat().cpu().numpy()
        rows.append({"layers": mark, "down_to": names[mark - 1]} | _likeness(first, heat))
    if len(x) > 1:
        other = _likeness(first, np.roll(first, 1, 0))
        rows.append({"layers": 0, "down_to": "another image"} | other)
    return pd.DataFrame(rows)


def _layers_from_the_top(copied: nn.Module, x: Tensor) -> list[str]:
    """Names of the modules that own parameters, the last to run first."""
    names, order = {part: name for name, part in copied.named_modules()}, []
    with register_module_forward_hook(lambda part, *_: order.append(part)), torch.no_grad():
        copied(x)
    own = [part for part in reversed(order) if any(True for _ in part.parameters(recurse=False))]
    return [names[part] for part in dict.fromkeys(own)]


def _likeness(first: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Mean rank correlation and SSIM of two stacks of maps, and how many of `other` are zero."""
    # Ranks of single pixels are mostly noise.
    pool = nn.AdaptiveAvgPool2d([min(side, 14) for side in first.shape[1:]])
    pooled = [pool(torch.from_numpy(maps)).flatten(1).numpy() for maps in (first, other)]
    varied = [pair for pair in zip(*pooled, strict=True) if np.ptp(pair, axis=1).min() > 0]
    ranks = [spearmanr(*pair).statistic for pair in varied]
    alike = base.ssim(first.astype(float), other.astype(float)).mean()
    zero = int((other.max((1, 2)) <= base.TINY).sum())
    return {"spearman": np.mean(ranks) if ranks else np.nan, "ssim": alike, "zero": zero}
