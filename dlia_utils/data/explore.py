"""Looking at a data set before training: sizes, grey values, how the splits were drawn, what the format gives away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import albumentations as A
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import chi2_contingency, kruskal, rankdata
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from .. import metrics
from ..plots import COLORS, panels
from . import readers
from .cache import ImageCache
from .datasets import Dataset

SPLITS = ("train", "val", "test", "")
CHUNK = 256  # Images that are turned to floats at a time.
SHAPE_FEATURES = {
    "height": ("height",),
    "width": ("width",),
    "aspect ratio": ("aspect",),
    "all three": ("height", "width", "aspect"),
}
# Upper ends of "negligible", "small" and "medium": Cramer's V, and epsilon squared of ranks (Cohen 1988).
_EFFECTS = {"Cramer's V": (0.1, 0.3, 0.5), "epsilon squared": (0.01, 0.06, 0.14)}


def shapes(dataset: Dataset) -> np.ndarray:
    """Height and width int32 [N,2] of each file, upright, from its header; `ImageCache.shapes` holds the same."""

    def shape(path: str) -> tuple[int, int]:
        with Image.open(dataset.root / path) as image:
            return readers.upright_shape(image)

    with ThreadPoolExecutor(8) as pool:
        return np.array(list(pool.map(shape, dataset.manifest["path"])), dtype=np.int32).reshape(
            -1, 2
        )


def sizes(dataset: Dataset, *, known: np.ndarray | None = None) -> pd.DataFrame:
    """Do the images have one size? A row per split and class, in pixels of the original files.

    `known` [N,2] are heights and widths, e.g. `cache.shapes` (default: `shapes`, from the headers). Columns split, class_name,
    images, sizes (how many different ones), commonest ("height x width"), share (of the images that have it),
    then height, width and aspect (width over height) as _min, _median, _max. Errors: ValueError for a wrong length.
    """
    table = _format(dataset, shapes(dataset) if known is None else known)
    rows = []
    for (split, name), chosen in rows_by_split(dataset, together=False).items():
        part = table.iloc[chosen]
        common = part[["height", "width"]].value_counts()
        row = {"split": split, "class_name": name, "images": len(part), "sizes": len(common)}
        row |= {
            "commonest": f"{common.index[0][0]} x {common.index[0][1]}",
            "share": common.iloc[0] / len(part),
        }
        for side in ("height", "width", "aspect"):
            row |= {f"{side}_{how}": part[side].agg(how) for how in ("min", "median", "max")}
        rows.append(row)
    return pd.DataFrame(rows)


def rows_by_split(dataset: Dataset, *, together: bool = True) -> dict[tuple[str, str], np.ndarray]:
    """Row numbers of each (split, class name), in the order train, val, test; (split, "all") too if `together`."""
    manifest, found = dataset.manifest, {}
    names = [*dataset.classes, *sorted(set(manifest["class_name"]) - set(dataset.classes))]
    for split in SPLITS:
        inside = (manifest["split"] == split).to_numpy()
        parts = {
            name: np.flatnonzero(inside & (manifest["class_name"] == name).to_numpy())
            for name in names
        }
        if together and inside.any():
            found[split, "all"] = np.flatnonzero(inside)
        found |= {(split, name): rows for name, rows in parts.items() if len(rows)}
    return found


def mean_and_spread(
    cache: ImageCache, rows: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each pixel over the images of `rows`: two float64 [S,S], in units of [0,1]."""
    rows = np.asarray(rows, dtype=np.int64)
    if not len(rows):
        raise ValueError("no rows: a mean needs at least one image; is the split empty?")
    total, squares = np.zeros((2, cache.size, cache.size))
    for start in range(0, len(rows), CHUNK):
        pixels = np.asarray(cache.images[rows[start : start + CHUNK]], dtype=np.float64) / 255
        total += pixels.sum(0)
        squares += np.square(pixels).sum(0)
    mean = total / len(rows)
    return mean, np.sqrt(np.maximum(squares / len(rows) - mean**2, 0))


def pixel_statistics(
    cache: ImageCache, rows_by_split: Mapping[str | tuple[str, str], Sequence[int] | np.ndarray]
) -> pd.DataFrame:
    """Grey values in units of [0,1], a row per set of images, such as those of `rows_by_split(dataset)`.

    Keys are (split, class name), or the split's name alone. Columns split, class_name, images, min, max; mean
    and std of all pixels of all images; contrast, the mean of the images' own standard deviations; and of the
    mean image and the image of standard deviations (`mean_and_spread`) the lowest and highest pixel:
    pixel_mean_min, pixel_mean_max, pixel_std_min, pixel_std_max. Of the cached square, as a model sees it:
    padding counts. Errors: ValueError for an empty set.
    """
    grey, contrast, low, high = _image_statistics(cache)
    rows = []
    for name, chosen in rows_by_split.items():
        split, class_name = (name, "all") if isinstance(name, str) else name
        chosen = np.asarray(chosen, dtype=np.int64)
        mean, spread = mean_and_spread(cache, chosen)
        every = {
            "mean": mean.mean(),
            "std": np.sqrt((spread**2 + mean**2).mean() - mean.mean() ** 2),
        }
        rows.append(
            {"split": split, "class_name": class_name, "images": len(chosen)}
            | {
                "min": low[chosen].min(),
                "max": high[chosen].max(),
                **every,
                "contrast": contrast[chosen].mean(),
            }
            | {"pixel_mean_min": mean.min(), "pixel_mean_max": mean.max()}
            | {"pixel_std_min": spread.min(), "pixel_std_max": spread.max()}
        )
    return pd.DataFrame(rows)


def uniform_split_test(dataset: Dataset, cache: ImageCache, *, level: float = 0.05) -> pd.DataFrame:
    """Could the splits be one pool divided at random? Class counts, mean grey and contrast, with Holm's correction.

    Class counts by a chi-square test; mean grey and contrast (standard deviation) of the images by a
    Kruskal-Wallis test inside each class, so that other class shares do not count twice. A patient's images of one
    class in one split count as one, their mean, for they are alike. Columns test, class_name, method, statistic, p,
    p_holm (Holm 1979, over all rows), effect_name, effect (Cramer's V or epsilon squared, 0 to 1), uneven
    (p_holm < `level`), detail (share or median per split) and meaning (what p says, in words). A division that was
    stratified on purpose gives a p of the class counts near 1. Errors: ValueError for fewer than two splits.
    """
    manifest = dataset.manifest
    splits = [name for name in SPLITS if (manifest["split"] == name).any()]
    if len(splits) < 2:
        raise ValueError(
            f"the data set has one split only ({splits}): divide it first, e.g. with split.grouped"
        )
    grey, contrast, *_ = _image_statistics(cache)
    table = manifest[["split", "patient", "class_name"]].assign(grey=grey, contrast=contrast)
    units = table.groupby(["split", "patient", "class_name"], as_index=False)[
        ["grey", "contrast"]
    ].mean()
    rows = [_class_counts(units, splits, dataset.classes)]
    for column, test in (("grey", "mean grey"), ("contrast", "contrast")):
        for name in [name for name in dataset.classes if (units["class_name"] == name).any()]:
            rows.append(
                {"test": test, "class_name": name}
                | _ranks(units[units["class_name"] == name], column, splits)
            )
    result = pd.DataFrame(rows)
    result["p_holm"] = metrics.holm(result["p"])
    result["uneven"] = result["p_holm"] < level
    result["meaning"] = [_meaning(row, len(result)) for _, row in result.iterrows()]
    order = [
        "test",
        "class_name",
        "method",
        "statistic",
        "p",
        "p_holm",
        "effect_name",
        "effect",
        "uneven",
        "detail",
        "meaning",
    ]
    return result[order]


def size_shortcut(
    dataset: Dataset,
    shapes: np.ndarray,
    *,
    folds: int = 5,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How well the format alone tells the class: AUC of gradient boosting on height, width and aspect ratio.

    `shapes` [N,2] are heights and widths of the original files, e.g. `cache.shapes`. Cross-validated by patient;
    scores are ranked inside each fold, since those of two fits cannot be compared. Columns features, metric
    ("auc"), value, ci_low, ci_high (patient bootstrap), n and finding, in words. An AUC above 0.5 is a shortcut: a
    network that sees it (black padding, or anatomy squashed to a square) needs no pathology. Unlabelled images are
    left out. Of more than two classes the AUC is the mean of each against the rest. Errors: ValueError for one class
    only or a wrong length.

    >>> rng = np.random.default_rng(0)
    >>> manifest = pd.DataFrame({"label": np.arange(80) % 2, "patient": np.arange(80)})
    >>> films = Dataset("demo", None, manifest, ("a", "b"), None, True, "argument")
    >>> given_away = np.stack([np.full(80, 100), 100 + 50 * manifest["label"]], axis=1)
    >>> size_shortcut(films, given_away, draws=50).set_index("features")["value"].round(2).to_dict()
    {'height': 0.5, 'width': 1.0, 'aspect ratio': 1.0, 'all three': 1.0}
    """
    table = _format(dataset, shapes).assign(
        label=dataset.manifest["label"].to_numpy(), patient=dataset.manifest["patient"].to_numpy()
    )
    table = table[table["label"] >= 0]
    found = sorted(set(table["label"]))
    if len(found) < 2 or found != list(range(len(found))):
        raise ValueError(f"size_shortcut compares classes, labels 0, 1 and so on; found {found}")
    rows = []
    for name, features in SHAPE_FEATURES.items():
        score = _out_of_fold(table, list(features), folds=folds, seed=seed)
        scored = metrics.classification(
            table["label"], score, table["patient"], draws=draws, level=level, seed=seed
        )
        row = scored[scored["metric"] == "auc"].iloc[0].to_dict()
        rows.append(
            {"features": name} | row | {"finding": _size_finding(table[list(features)], row)}
        )
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------- normalisation


def normalisations(
    cache: ImageCache, train_rows: Sequence[int] | np.ndarray
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Four ways to normalise images [N,1,S,S] in [0,1], by name; statistics are those of `train_rows` alone.

    "fixed": (x - 0.5) / 0.25. "sample": each image by its own mean and standard deviation, which takes the
    exposure away (a flat image becomes zeros). "training": one mean and one deviation for all pixels. "training,
    each pixel": a mean and a deviation for each place, which writes the mean image into every film and does
    not suit a convolution. Errors: ValueError for no rows.
    """
    mean, spread = mean_and_spread(cache, train_rows)
    overall = float(mean.mean()), float(np.sqrt((spread**2 + mean**2).mean() - mean.mean() ** 2))
    place = torch.from_numpy(mean).float(), torch.from_numpy(spread).float()

    def sample(x: Tensor) -> Tensor:
        deviation = x.std((1, 2, 3), keepdim=True, correction=0)
        return (x - x.mean((1, 2, 3), keepdim=True)) / deviation.clamp(min=1 / 255)

    return {
        "fixed": lambda x: (x - 0.5) / 0.25,
        "sample": sample,
        "training": lambda x: (x - overall[0]) / max(overall[1], 1 / 255),
        # A border that is black on every film has no deviation: less than one grey level counts as one.
        "training, each pixel": lambda x: (x - place[0].to(x)) / place[1].to(x).clamp(min=1 / 255),
    }


def compare_normalisations(
    train_and_score: Callable[[Tensor, np.ndarray, Tensor], np.ndarray],
    strategies: Mapping[str, Callable[[Tensor], Tensor]],
    x_train: Tensor,
    y_train: np.ndarray,
    x_val: Tensor,
    y_val: np.ndarray,
    *,
    groups: Sequence,
    draws: int = 2000,
) -> pd.DataFrame:
    """The same pipeline trained with each normalisation, scored on validation images.

    `train_and_score(x_train, y_train, x_val)` returns P(class 1) [N] of the validation images (e.g.
    `shortcuts.linear_probe`); it never sees their labels. `groups`: patients of the validation images. Columns
    strategy, metric, value, ci_low, ci_high, n.
    """
    tables = []
    for name, normalise in strategies.items():
        probability = train_and_score(normalise(x_train), y_train, normalise(x_val))
        table = metrics.classification(y_val, probability, groups, draws=draws)
        table.insert(0, "strategy", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


# ------------------------------------------------------------------------------------------- figures


def figure_classes(dataset: Dataset) -> Figure:
    """Images of each class in each split, with numbers and shares."""
    groups = rows_by_split(dataset, together=False)
    splits = [split for split in SPLITS if any(key[0] == split for key in groups)]
    figure, axes = panels(1, width=6.0, height=3.2)
    axis, wide = axes[0, 0], 0.8 / len(dataset.classes)
    for number, name in enumerate(dataset.classes):
        counts = [len(groups.get((split, name), ())) for split in splits]
        totals = [
            sum(len(rows) for key, rows in groups.items() if key[0] == split) for split in splits
        ]
        place = np.arange(len(splits)) + (number - (len(dataset.classes) - 1) / 2) * wide
        axis.bar(place, counts, 0.95 * wide, color=COLORS[number % len(COLORS)], label=name)
        for x, count, total in zip(place, counts, totals, strict=True):
            axis.text(
                x, count, f"{count}\n{count / total:.0%}", ha="center", va="bottom", fontsize=8
            )
    axis.set_xticks(range(len(splits)), [split or "not split" for split in splits])
    axis.set(ylabel="images")
    axis.margins(y=0.2)
    axis.set_title(f"Classes per split; {_name(dataset)}", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="upper right")
    figure.tight_layout()
    return figure


def figure_mean_images(
    cache: ImageCache, dataset: Dataset, rows: Sequence[int] | np.ndarray | None = None
) -> Figure:
    """Mean image and standard deviation of each class, and the difference of the first two classes' means.

    `rows` defaults to the training split, or to all images where there is none.
    """
    if rows is None:
        inside = (dataset.manifest["split"] == "train").to_numpy()
        rows = np.flatnonzero(inside) if inside.any() else np.arange(len(dataset.manifest))
    rows = np.asarray(rows, dtype=np.int64)
    labels = dataset.manifest["label"].to_numpy()[rows]
    present = [label for label in range(len(dataset.classes)) if (labels == label).any()]
    maps = {label: mean_and_spread(cache, rows[labels == label]) for label in present}
    both = len(present) > 1
    figure, axes = panels(len(present) + both, rows=2, width=2.5, height=2.6)
    widest = max(spread.max() for _, spread in maps.values())
    for column, label in enumerate(present):
        name = f"{dataset.classes[label]} ({(labels == label).sum()} images)"
        axes[0, column].imshow(maps[label][0], cmap="gray", vmin=0, vmax=1)
        axes[0, column].set_title(f"mean, {name}", fontsize=8)
        shown = axes[1, column].imshow(maps[label][1], cmap="viridis", vmin=0, vmax=widest)
        axes[1, column].set_title(f"standard deviation, {dataset.classes[label]}", fontsize=8)
        figure.colorbar(shown, ax=axes[1, column], fraction=0.046).ax.tick_params(labelsize=7)
    if both:
        first, second = present[:2]
        difference = maps[second][0] - maps[first][0]
        reach = max(float(np.abs(difference).max()), 1e-6)
        shown = axes[0, -1].imshow(difference, cmap="RdBu_r", vmin=-reach, vmax=reach)
        axes[0, -1].set_title(f"{dataset.classes[second]} - {dataset.classes[first]}", fontsize=8)
        figure.colorbar(shown, ax=axes[0, -1], fraction=0.046).ax.tick_params(labelsize=7)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(f"{_name(dataset)}, {cache.size} px, grey values in [0, 1]", fontsize=9)
    figure.tight_layout()
    return figure


def figure_augmentations(
    image: np.ndarray,
    transforms: Mapping[str, A.BasicTransform | A.BaseCompose],
    *,
    repeats: int = 4,
    seed: int = 0,
) -> Figure:
    """Each transform alone, `repeats` draws in a row, then all of them combined; the original stands first.

    `image` uint8 [H,W], e.g. `cache.images[row]`. A draw that leaves the image as it is (a transform's own
    chance `p`) says so: give transforms with p=1 to see each one. Errors: ValueError for another image or no
    transform.
    """
    image = np.asarray(image)
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(
            f"image must be uint8 [H,W], e.g. cache.images[row], not {image.dtype} {list(image.shape)}"
        )
    if not transforms:
        raise ValueError("transforms is empty: name at least one albumentations transform")
    lines = {name: A.Compose([transform]) for name, transform in transforms.items()}
    lines["combined"] = A.Compose(list(transforms.values()))
    figure, axes = panels(repeats + 1, rows=len(lines), width=1.8, height=2.0)
    for line, (name, transform) in zip(axes, lines.items(), strict=True):
        line[0].set_title("original", fontsize=8)
        line[0].imshow(image, cmap="gray", vmin=0, vmax=255)
        for draw, axis in enumerate(line[1:]):
            transform.set_random_seed(seed + draw)
            moved = transform(image=image)["image"]
            axis.imshow(moved, cmap="gray", vmin=0, vmax=255)
            axis.set_title(
                f"{name}, unchanged" if np.array_equal(moved, image) else name, fontsize=8
            )
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    return figure


# ------------------------------------------------------------------------------------------- tables and tests


def _name(dataset: Dataset) -> str:
    return f"{dataset.name} (SYNTHETIC)" if dataset.synthetic else dataset.name


def _format(dataset: Dataset, found: np.ndarray) -> pd.DataFrame:
    """Columns height, width, aspect of every image."""
    found = np.asarray(found)
    if found.shape != (len(dataset.manifest), 2):
        raise ValueError(
            f"shapes is {list(found.shape)}, the data set has {len(dataset.manifest)} images: give [N,2] heights and "
            "widths in its order, e.g. cache.shapes or explore.shapes(dataset)"
        )
    return pd.DataFrame(
        {"height": found[:, 0], "width": found[:, 1], "aspect": found[:, 1] / found[:, 0]}
    )


def _image_statistics(cache: ImageCache) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation, lowest and highest pixel of every image, in units of [0,1]."""
    found = []
    for start in range(0, len(cache.images), CHUNK):
        pixels = (
            np.asarray(cache.images[start : start + CHUNK], dtype=np.float32).reshape(
                -1, cache.size**2
            )
            / 255
        )
        found.append(
            np.stack([pixels.mean(1), pixels.std(1), pixels.min(1), pixels.max(1)]).astype(float)
        )
    return tuple(np.concatenate(found, axis=1))


def _class_counts(units: pd.DataFrame, splits: Sequence[str], classes: Sequence[str]) -> dict:
    counts = pd.crosstab(units["split"], units["class_name"]).reindex(splits)
    # In the data set's order, so that the last one, whose shares are shown, is the finding.
    counts = counts[
        [*(name for name in classes if name in counts), *counts.columns.difference(classes)]
    ]
    result = (
        chi2_contingency(counts) if counts.shape[1] > 1 else None
    )  # One class cannot be dealt out unevenly.
    statistic, p = (float(result.statistic), float(result.pvalue)) if result else (0.0, 1.0)
    method = "chi-square"
    if result and result.expected_freq.min() < 5:
        method += " (fewer than 5 expected in a cell: p is rough)"
    dimension = max(min(counts.shape) - 1, 1)
    effect = np.sqrt(statistic / (counts.to_numpy().sum() * dimension))
    last = counts.columns[-1]
    shares = "; ".join(f"{split} {row[last] / row.sum():.1%}" for split, row in counts.iterrows())
    return {
        "test": "class counts",
        "class_name": "all",
        "method": method,
        "statistic": statistic,
        "p": p,
        "effect_name": "Cramer's V",
        "effect": effect,
        "detail": f"share of {last}: {shares}",
    }


def _ranks(units: pd.DataFrame, column: str, splits: Sequence[str]) -> dict:
    parts = {name: units.loc[units["split"] == name, column].to_numpy() for name in splits}
    parts = {name: values for name, values in parts.items() if len(values)}
    if len(parts) > 1 and units[column].nunique() > 1:
        statistic, p = map(float, kruskal(*parts.values()))
    else:
        statistic, p = (
            0.0,
            1.0,
        )  # One split, or values that are all the same: there is nothing to tell apart.
    medians = "; ".join(f"{name} {np.median(values):.3f}" for name, values in parts.items())
    return {
        "method": "Kruskal-Wallis",
        "statistic": statistic,
        "p": p,
        "effect_name": "epsilon squared",
        "effect": statistic / max(len(units) - 1, 1),
        "detail": f"median: {medians}",
    }


def _meaning(row: pd.Series, tests: int) -> str:
    often = f"a random division would differ at least this much in {_percent(row['p'])} of draws"
    if not row["uneven"]:
        return f"{often}: no sign of an uneven division"
    strength = np.searchsorted(_EFFECTS[row["effect_name"]], row["effect"], side="right")
    size = ("negligible", "small", "medium", "large")[strength]
    return f"{often}, p = {row['p_holm']:.2g} after correction for {tests} tests: unevenly divided, by a {size} effect"


def _percent(p: float) -> str:
    return f"{p:.1%}" if p >= 0.001 else "less than 0.1%"


def _out_of_fold(
    table: pd.DataFrame, features: Sequence[str], *, folds: int, seed: int
) -> np.ndarray:
    """Score of each image by a fit without its patient, as a rank in (0,1) among the images of its fold."""
    labels, patients = table["label"].to_numpy(), pd.factorize(table["patient"])[0]
    count = labels.max() + 1
    fewest = min(len(np.unique(patients[labels == label])) for label in range(count))
    if fewest < 2:
        raise ValueError(
            "a class has fewer than 2 patients: nothing can be cross-validated by patient"
        )
    # The splitter's own shuffle deals unevenly before scikit-learn 1.7: patients get new numbers instead.
    units = np.random.default_rng(seed).permutation(patients.max() + 1)[patients]
    x, scores = table[list(features)].to_numpy(float), np.empty((len(table), count))
    for train, held_out in StratifiedGroupKFold(min(folds, fewest)).split(x, labels, units):
        model = HistGradientBoostingClassifier(
            max_iter=40,
            max_leaf_nodes=8,
            min_samples_leaf=10,
            early_stopping=False,
            random_state=seed,
        )
        score = model.fit(x[train], labels[train]).predict_proba(x[held_out])
        # Rounded: a difference in the last digit is none, and equal scores must share their rank.
        scores[held_out] = (rankdata(score.round(9), axis=0) - 0.5) / len(held_out)
    return scores[:, 1] if count == 2 else scores


def _size_finding(features: pd.DataFrame, row: Mapping) -> str:
    if len(features.drop_duplicates()) == 1:
        return "the same for all images: tells nothing"
    if not row["ci_low"] > 0.5:
        return "no sign that it tells the classes apart"
    strength = (
        "almost fully" if row["value"] >= 0.9 else "clearly" if row["value"] >= 0.7 else "weakly"
    )
    return f"a shortcut: tells the classes apart {strength}"
