"""Does a map lie on the finding? Scores beside maps that know nothing, and a check that weights matter."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import distance_transform_edt, sobel
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from ..data.cache import ImageCache
from ..data.datasets import Dataset
from ..metrics import patient_weights, share
from . import base as s
from .attribution import explain
from .eigencam import CORNERS, _find, _inside

SCORES = ("coverage_gain", "pointing", "energy_gain", "auprc")


def regions_of(
    dataset: Dataset, rows: Sequence[int] | np.ndarray, cache: ImageCache, *, kind: str = "box"
) -> list[pd.DataFrame] | list[np.ndarray]:
    """The true findings of `rows` in the cached films' pixels, as `score_maps` and the figures take them.

    kind: "box", per image a table with corners x1, y1, x2, y2 and the other columns of `dataset.boxes`; or
    "outline", a mask bool [S,S] of all its polygons, where a pixel belongs when its centre lies inside
    (even-odd rule). What is too small to hold a centre still gets a pixel. Errors: ValueError for another
    kind, and for images without a finding, by name.

    >>> manifest = pd.DataFrame({"path": ["a.jpg"]})
    >>> boxes = pd.DataFrame([{"image": 0, "x1": 10.0, "y1": 10.0, "x2": 30.0, "y2": 20.0, "label": 1}])
    >>> data = Dataset("demo", None, manifest, ("no", "yes"), None, True, "", boxes=boxes)
    >>> half = ImageCache(None, 20, "", None, (), shapes=np.array([[40, 40]]))
    >>> regions_of(data, [0], half)[0][["x1", "y1", "x2", "y2"]].values
    array([[ 5.,  5., 15., 10.]])
    """
    if kind not in ("box", "outline"):
        raise ValueError(f"kind must be 'box' or 'outline', not {kind!r}")
    rows = np.asarray(rows, dtype=np.int64)
    table = dataset.boxes if kind == "box" else dataset.outlines
    without = dataset.manifest["path"].iloc[rows[~np.isin(rows, table["image"])]]
    if len(without):
        raise ValueError(
            f"{len(without)} images have no {kind}, {', '.join(without[:3])} among them: leave out images "
            "without a finding"
        )
    scale = cache.scale(rows)
    if kind == "box":
        from ..detect.figures import boxes_by_image  # here, because it brings the figures' imports

        return [
            _at_least_a_pixel(boxes, cache.size)
            for boxes in boxes_by_image(table, rows, scale=scale)
        ]
    polygons = dict(list(table.groupby("image")["points"]))
    shape = (cache.size, cache.size)
    return [
        np.logical_or.reduce(
            [_filled(np.asarray(points, float) * by, shape) for points in polygons[row]]
        )
        for row, by in zip(rows.tolist(), scale, strict=True)
    ]


def score_maps(
    maps: Tensor | np.ndarray,
    regions: Sequence[pd.DataFrame | np.ndarray],
    *,
    p: float = 5.0,
    tolerance: float = 0.0,
) -> pd.DataFrame:
    """How well each map [N,H,W] >= 0 finds its region; one row per image.

    regions: per image a table of boxes (x1, y1, x2, y2 in the map's pixels) or a mask [H,W]; each must cover
    a pixel. Columns: area (share of the film that the region covers: the chance level of energy and of
    auprc); coverage, the share of the region that the highest p per cent of the film's pixels cover, and
    coverage_gain, the same minus p per cent, which any map covers by chance; pointing, 1 when the highest
    pixel lies inside or within `tolerance` pixels (Zhang et al., arXiv 1608.00507: 15 at 224), and
    pointing_chance, the share of pixels that would count; energy and energy_gain (see `energy_inside`);
    auprc, average precision of the pixels; zero, the map is 0 everywhere. Pixels of equal height share their
    places, so a flat map scores exactly chance, and a zero map counts as flat. Errors: ValueError for other
    shapes, negative or NaN maps, an empty region.

    >>> heat = np.zeros((1, 4, 5))
    >>> heat[0, 1, 1] = 1
    >>> boxes = pd.DataFrame([{"x1": 0, "y1": 0, "x2": 2, "y2": 2}])
    >>> score_maps(heat, [boxes], p=5)[["area", "coverage", "auprc"]]
       area  coverage  auprc
    0   0.2      0.25    0.4
    """
    maps = _as_array(maps)
    _check_share(p)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0 pixels, not {tolerance}")
    masks = _masks(regions, maps.shape)
    rows = []
    for heat, inside in zip(maps, masks, strict=True):
        area, zero = inside.mean(), not heat.max() > s.TINY
        near = distance_transform_edt(~inside) <= tolerance
        coverage, chance = _coverage(heat, inside, p)
        energy = area if zero else heat[inside].sum() / heat.sum()
        rows.append(
            {
                "area": area,
                "coverage": coverage,
                "coverage_gain": coverage - chance,
                "pointing": near[heat == heat.max()].mean(),
                "pointing_chance": near.mean(),
                "energy": energy,
                "energy_gain": energy - area,
                "auprc": average_precision_score(inside.ravel(), heat.ravel()),
                "zero": zero,
            }
        )
    return pd.DataFrame(rows)


def coverage_curve(
    maps: Tensor | np.ndarray,
    regions: Sequence[pd.DataFrame | np.ndarray],
    *,
    p: Sequence[float] = (5, 15, 25, 50, 75, 85, 95),
) -> pd.DataFrame:
    """Mean coverage of the regions by the highest p per cent of pixels, for every p (see `score_maps`).

    Columns p, coverage, minus_chance: a map that knows nothing covers p per cent, so only the last column
    says something. Errors: as for `score_maps`.

    >>> coverage_curve(np.ones((1, 10, 10)), [np.eye(10, dtype=bool)], p=(5, 50)).round(3)
        p  coverage  minus_chance
    0   5      0.05           0.0
    1  50      0.50           0.0
    """
    maps = _as_array(maps)
    masks = _masks(regions, maps.shape)
    rows = []
    for one in p:
        _check_share(one)
        pairs = [_coverage(heat, inside, one) for heat, inside in zip(maps, masks, strict=True)]
        coverage, chance = np.mean(pairs, axis=0)
        rows.append({"p": one, "coverage": coverage, "minus_chance": coverage - chance})
    return pd.DataFrame(rows)


def localise(
    maps: Mapping[str, Tensor | np.ndarray],
    images: Tensor,
    regions: Sequence[pd.DataFrame | np.ndarray],
    *,
    groups: Sequence,
    p: float = 5.0,
    tolerance: float = 0.0,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of several methods' maps beside `reference_maps`: a table per image and a summary.

    maps: name -> [N,H,W] >= 0, such as `Attribution.heat()`. images: [N,1|3,H,W] in [0,1]. groups: patient
    (or film) of each image; the summary's percentile intervals come from resampling whole patients. Returns
    the rows of `score_maps` after columns map, image, group; and map, score, value, ci_low, ci_high,
    n, zero_maps for coverage_gain, pointing, energy_gain and auprc. Errors: ValueError for names or lengths
    that do not fit.

    >>> films, boxes = torch.rand(2, 1, 8, 8), [np.eye(8, dtype=bool)] * 2
    >>> _, summary = localise({"mine": np.stack(boxes).astype(float)}, films, boxes, groups=[1, 2], draws=50)
    >>> summary.query("score == 'auprc'").set_index("map")["value"].idxmax()
    'mine'
    """
    references = reference_maps(images, seed=seed)
    if taken := set(maps) & set(references):
        raise ValueError(
            f"{', '.join(sorted(taken))} is the name of a reference map: give yours another"
        )
    if not len(groups) == len(images) == len(regions):
        raise ValueError(
            f"images ({len(images)}), regions ({len(regions)}) and groups ({len(groups)}) must have "
            "one length"
        )
    for name, these in maps.items():
        if tuple(these.shape) != (len(images), *images.shape[2:]):
            raise ValueError(
                f"maps[{name!r}] is {list(these.shape)}, not {[len(images), *images.shape[2:]]}: "
                "resize them first"
            )
    tables = []
    for name, these in {**maps, **references}.items():
        table = score_maps(these, regions, p=p, tolerance=tolerance)
        table.insert(0, "map", name)
        table.insert(1, "image", range(len(table)))
        table.insert(2, "group", list(groups))
        tables.append(table)
    per_image = pd.concat(tables, ignore_index=True)
    return per_image, summarise(per_image, draws=draws, level=level, seed=seed)


def summarise(
    per_image: pd.DataFrame, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """`localise`'s summary from its table per image: map, score, value, ci_low, ci_high, n, zero_maps.

    The intervals come from resampling whole patients (the column group).
    """
    rows = []
    for name, table in per_image.groupby("map", sort=False):
        weights = patient_weights(table["group"], draws=draws, seed=seed)
        for score in SCORES:
            interval = _interval(table[score].to_numpy(float), table["group"], weights, level, seed)
            counts = {"n": len(table), "zero_maps": int(table["zero"].sum())}
            rows.append({"map": name, "score": score} | interval | counts)
    return pd.DataFrame(rows)


def against_references(
    per_image: pd.DataFrame, *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Does a map beat the maps that know nothing, image by image? Paired differences of `localise`'s table per image.

    Columns map, score, reference, value (mean of map - reference), ci_low, ci_high, n; the intervals come from
    resampling whole patients. A method has found the region when every `ci_low` of its score is above 0.

    >>> films, boxes = torch.rand(3, 1, 8, 8), [np.eye(8, dtype=bool)] * 3
    >>> per_image, _ = localise({"mine": np.stack(boxes).astype(float)}, films, boxes, groups=[1, 2, 3], draws=50)
    >>> bool((against_references(per_image, draws=50).query("score == 'auprc'")["ci_low"] > 0).all())
    True
    """
    scores = dict(iter(per_image.groupby("map", sort=False)))
    rows = []
    for name in (name for name in scores if name not in s.REFERENCES):
        weights = patient_weights(scores[name]["group"], draws=draws, seed=seed)
        rows += [
            {"map": name, "score": score, "reference": reference}
            | _gain(scores[name], scores[reference], score, weights, level)
            for score in SCORES
            for reference in s.REFERENCES
        ]
    return pd.DataFrame(rows)


def against_model(
    per_image: pd.DataFrame,
    other: pd.DataFrame,
    *,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Do the maps of one model beat those of another? Paired differences of two tables per image of `localise`.

    Method by method, over the images of `per_image`. Columns map, score, value (mean of this model - the other),
    ci_low, ci_high, n; the intervals come from resampling whole patients. Methods that only one model has are left
    out, and so are the reference maps, which come from no model. Errors: ValueError where `other` lacks an image.

    >>> films, boxes = torch.rand(3, 1, 8, 8), [np.eye(8, dtype=bool)] * 3
    >>> here, there = (localise({"saliency": m}, films, boxes, groups=[1, 2, 3], draws=9)[0]
    ...                for m in (np.stack(boxes).astype(float), np.random.rand(3, 8, 8)))
    >>> bool((against_model(here, there, draws=50).query("score == 'auprc'")["ci_low"] > 0).all())
    True
    """
    missing = set(per_image["image"]) - set(other["image"])
    if missing:
        raise ValueError(
            f"the other table lacks the images {sorted(missing)[:5]}: score both models on the same films"
        )
    ours, theirs = (dict(iter(table.groupby("map", sort=False))) for table in (per_image, other))
    rows = []
    for name in (name for name in ours if name in theirs and name not in s.REFERENCES):
        weights = patient_weights(ours[name]["group"], draws=draws, seed=seed)
        rows += [
            {"map": name, "score": score} | _gain(ours[name], theirs[name], score, weights, level)
            for score in SCORES
        ]
    return pd.DataFrame(rows)


def _gain(
    table: pd.DataFrame, other: pd.DataFrame, score: str, weights: np.ndarray, level: float
) -> dict:
    """Mean of this score minus the other's on the same images, with its interval over the weights of resampled patients."""
    gain = table[score].to_numpy(float) - other.set_index("image")[score].reindex(
        table["image"]
    ).to_numpy(float)
    low, high = np.quantile(weights @ gain / weights.sum(1), [(1 - level) / 2, (1 + level) / 2])
    return {"value": gain.mean(), "ci_low": low, "ci_high": high, "n": len(gain)}


def reference_maps(images: Tensor, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Maps [N,H,W] that no model made: random pixels, a Gaussian at the centre, and edges of the film.

    A method that does not beat them found nothing. Random: uniform, drawn from (seed, image number). Centre:
    standard deviation a quarter of each side. Edges: Sobel magnitude of the mean over channels.

    >>> sorted(reference_maps(torch.rand(2, 3, 6, 5)))
    ['centre prior', 'edges', 'random']
    """
    grey = _as_array(images.mean(1))
    height, width = grey.shape[1:]
    down, across = ((np.arange(n) + 0.5) / n - 0.5 for n in (height, width))
    bump = np.exp(-(down[:, None] ** 2 + across[None] ** 2) / (2 * 0.25**2))
    draws = [np.random.default_rng([seed, k]).random((height, width)) for k in range(len(grey))]
    edges = [np.hypot(sobel(film, 0), sobel(film, 1)) for film in grey]
    maps = np.stack(draws), np.repeat(bump[None], len(grey), 0), np.stack(edges)
    return dict(zip(s.REFERENCES, maps, strict=True))


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
    """Does the map change when weights are lost? Cascading randomisation, Adebayo et al., arXiv 1810.03292.

    Layers with weights are randomised from the output downwards, in `steps` equal shares, on a copy: each
    parameter is drawn from a normal with mean zero and the parameter's own root mean square, so that
    activations keep their scale; batch norms keep their running statistics. The class explained stays the one
    of the intact model. method, options: as for `explain`. Returns one row per step: layers (how many are
    random), down_to (name of the deepest), spearman (ranks of the maps averaged to at most 14 x 14) and ssim
    (data range 1), means over the images; zero, images whose map vanished (left out of spearman). A map that
    explains the model falls towards the last row, "another image": the likeness of maps that have nothing in
    common but the method. One that stays near 1 would look the same for any model: an edge detector.
    Errors: ValueError for a model without weights, steps < 1, or a layer that is not in it.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    >>> table = sanity(net, torch.rand(2, 1, 8, 8), "saliency")
    >>> table["down_to"].tolist(), round(float(table["spearman"][0]), 6)
    (['none', '1', 'another image'], 1.0)
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, not {steps}")
    if isinstance(options.get("layer"), nn.Module):  # its twin in the copy is found by name
        module = options["layer"]
        options["layer"] = next(
            (name for name, part in model.named_modules() if part is module), ""
        )
        if not options["layer"]:
            _find(model, module)
    intact = explain(method, model, x, target, **options)
    first = intact.heat().cpu().numpy()
    copied = copy.deepcopy(model)
    names = _layers_from_the_top(copied, x[:1])
    marks = sorted({round(len(names) * k / steps) for k in range(1, steps + 1)} - {0})
    rows = [{"layers": 0, "down_to": "none"} | _likeness(first, first)]
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for mark in marks:
        for name in names[done:mark]:
            _randomise(copied.get_submodule(name), generator)
        done = mark
        heat = explain(method, copied, x, intact.target, **options).heat().cpu().numpy()
        rows.append({"layers": mark, "down_to": names[mark - 1]} | _likeness(first, heat))
    if len(x) > 1:
        rows.append(
            {"layers": 0, "down_to": "another image"} | _likeness(first, np.roll(first, 1, 0))
        )
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------- regions


def _at_least_a_pixel(boxes: pd.DataFrame, size: int) -> pd.DataFrame:
    """Boxes that hold no pixel's centre along an axis grow to the pixel that their middle lies in."""
    low, high = np.split(boxes[CORNERS].to_numpy(float), 2, axis=1)
    empty = np.ceil(high - 0.5).clip(max=size) <= np.ceil(low - 0.5).clip(min=0)
    pixel = np.floor((low + high) / 2).clip(0, size - 1)
    grown = np.hstack([np.where(empty, pixel, low), np.where(empty, pixel + 1, high)])
    return boxes.assign(**dict(zip(CORNERS, grown.T, strict=True)))


def _filled(corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Mask of the pixels whose centre lies in a polygon [n,2] of x, y; of its corners when none does."""
    across, down = np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5
    inside = np.zeros(shape, bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, 0), strict=True):
        crossed = np.flatnonzero(
            (down >= min(y1, y2)) & (down < max(y1, y2))
        )  # none for a level edge
        place = x1 + (x2 - x1) * (down[crossed] - y1) / ((y2 - y1) or 1)
        inside[crossed] ^= across < place[:, None]
    if not inside.any():
        column, row = np.floor(corners).astype(int).T
        inside[row.clip(0, shape[0] - 1), column.clip(0, shape[1] - 1)] = True
    return inside


# ------------------------------------------------------------------------------------------- scores


def _as_array(maps: Tensor | np.ndarray) -> np.ndarray:
    array = np.asarray(maps.detach().cpu() if isinstance(maps, Tensor) else maps, dtype=float)
    if array.ndim != 3 or not array.size:
        raise ValueError(f"maps must be [N,H,W], not {list(array.shape)}")
    if not (array >= 0).all() or not np.isfinite(array).all():
        raise ValueError("maps hold negative, infinite or NaN values: pass Attribution.heat()")
    return array


def _masks(
    regions: Sequence[pd.DataFrame | np.ndarray], shape: tuple[int, ...]
) -> list[np.ndarray]:
    """One mask [H,W] per map."""
    if len(regions) != shape[0]:
        raise ValueError(f"{len(regions)} regions for {shape[0]} maps: give each its boxes or mask")
    masks = []
    for row, region in enumerate(regions):
        mask = (
            _inside(region, shape[1:])
            if isinstance(region, pd.DataFrame)
            else np.asarray(region, dtype=bool)
        )
        if mask.shape != shape[1:]:
            raise ValueError(
                f"the mask of image {row} is {list(mask.shape)}, not {list(shape[1:])}: resize it"
            )
        if not mask.any():
            raise ValueError(
                f"the region of image {row} covers no pixel: leave out images without a finding"
            )
        masks.append(mask)
    return masks


def _check_share(p: float) -> None:
    if not 0 < p <= 100:
        raise ValueError(f"p must lie in (0,100], not {p}")


def _coverage(heat: np.ndarray, inside: np.ndarray, p: float) -> tuple[float, float]:
    """Share of the region among the highest p per cent, and of the film: what it would be by chance.

    Pixels of equal height at the edge share the places that are left.
    """
    count = max(1, round(p / 100 * heat.size))
    level = np.partition(heat.ravel(), -count)[-count]
    above, equal = heat > level, heat == level
    covered = inside[above].sum() + (count - above.sum()) * inside[equal].mean()
    return float(covered / inside.sum()), count / heat.size


def _interval(
    values: np.ndarray, groups: Sequence, weights: np.ndarray, level: float, seed: int
) -> dict:
    """Mean and its patient-bootstrap interval."""
    if np.isin(
        values, (0, 1)
    ).all():  # hits and misses: the interval does not collapse when all agree
        row = share(values, groups, draws=len(weights), level=level, seed=seed)
        return {name: row[name] for name in ("value", "ci_low", "ci_high")}
    means = weights @ values / weights.sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(values.mean()), "ci_low": float(low), "ci_high": float(high)}


# ------------------------------------------------------------------------------------------- randomisation


def _layers_from_the_top(copied: nn.Module, x: Tensor) -> list[str]:
    """Names of the modules that own parameters, the last to run first."""
    order: list[str] = []

    def note(name: str):
        return lambda *_: order.append(name)

    owners = [
        (name, part)
        for name, part in copied.named_modules()
        if any(True for _ in part.parameters(recurse=False))
    ]
    handles = [part.register_forward_hook(note(name)) for name, part in owners]
    try:
        with torch.no_grad():
            copied(x)
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise ValueError("the model has no layer with weights: there is nothing to randomise")
    return list(dict.fromkeys(reversed(order)))


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            draw = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(draw * parameter.square().mean().sqrt())


def _likeness(first: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Mean rank correlation and SSIM of two stacks of maps, and how many of `other` are zero."""
    ranks = []
    for a, b in zip(_pooled(first), _pooled(other), strict=True):
        if np.ptp(a) > 0 and np.ptp(b) > 0:
            ranks.append(spearmanr(a, b).statistic)
    zero = int((other.max((1, 2)) <= s.TINY).sum())
    return {
        "spearman": float(np.mean(ranks)) if ranks else np.nan,
        "ssim": float(np.mean([ssim(a, b) for a, b in zip(first, other, strict=True)])),
        "zero": zero,
    }


def _pooled(maps: np.ndarray) -> np.ndarray:
    """Maps averaged to at most 14 x 14 and flattened: ranks of single pixels are mostly ties and noise."""
    size = [min(side, 14) for side in maps.shape[1:]]
    return (
        nn.functional.adaptive_avg_pool2d(torch.from_numpy(maps)[:, None], size).flatten(1).numpy()
    )


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two maps [H,W], data range 1. Source: Wang et al., IEEE TIP 13:600, 2004.

    Gaussian window of standard deviation 1.5, 11 pixels wide; K1 = 0.01, K2 = 0.03.

    >>> ssim(np.eye(16), np.eye(16))
    1.0
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    mean_a, mean_b = s.window(a), s.window(b)
    return float(
        s.likeness(
            mean_a,
            mean_b,
            s.window(a * a) - mean_a**2,
            s.window(b * b) - mean_b**2,
            s.window(a * b),
        )
    )
