"""Looking at a data set before training: sizes, grey values, splits, what the format gives away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import chi2_contingency, kruskal, rankdata
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor

from .. import metrics
from ..plots import COLORS, panels
from .augment import A
from .cache import ImageCache
from .datasets import Dataset
from .split import deal

SPLITS = ("train", "val", "test", "")
CHUNK = 256  # Images that are turned to floats at a time.
SHAPE_FEATURES = {name: [name] for name in ("height", "width", "aspect ratio")}
SHAPE_FEATURES["all three"] = list(SHAPE_FEATURES)
# Upper ends of "negligible", "small" and "medium" (Cohen 1988).
EFFECTS = {"Cramer's V": (0.1, 0.3, 0.5), "epsilon squared": (0.01, 0.06, 0.14)}


def rows_by_split(dataset: Dataset, *, together: bool = True) -> dict[tuple[str, str], np.ndarray]:
    """Row numbers of each (split, class name), and if `together` of each (split, "all")."""
    manifest, found = dataset.manifest, {}
    for split in SPLITS:
        inside = (manifest["split"] == split).to_numpy()
        parts = {"all": inside} if together else {}
        parts |= {name: inside & (manifest["class_name"] == name) for name in dataset.classes}
        found |= {(split, name): np.flatnonzero(part) for name, part in parts.items() if part.any()}
    return found


def sizes(dataset: Dataset, shapes: np.ndarray) -> pd.DataFrame:
    """Do the images have one size? A row per split and class, in pixels of the original files.

    `shapes` [N,2] are heights and widths, e.g. `cache.shapes`. Columns split, class_name, images,
    sizes (how many different ones), commonest ("height x width"), share (of the images that have
    it), and the lowest, median and highest height, width and aspect ratio (width over height).
    """
    table, rows = _format(shapes), []
    for (split, name), chosen in rows_by_split(dataset, together=False).items():
        part = table.iloc[chosen]
        common = part[["height", "width"]].value_counts()
        row = dict(split=split, class_name=name, images=len(part), sizes=len(common))
        row |= dict(commonest="{} x {}".format(*common.index[0]), share=common.iloc[0] / len(part))
        spread = part.agg(["min", "median", "max"]).unstack()
        rows.append(row | {f"{side}_{how}": value for (side, how), value in spread.items()})
    return pd.DataFrame(rows)


def mean_and_spread(
    cache: ImageCache, rows: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each pixel over `rows`: float64 [S,S] in units of [0,1]."""
    rows = np.asarray(rows, dtype=np.int64)
    total, squares = np.zeros((2, cache.size, cache.size))
    for start in range(0, len(rows), CHUNK):
        pixels = np.asarray(cache.images[rows[start : start + CHUNK]], dtype=np.float64) / 255
        total += pixels.sum(0)
        squares += np.square(pixels).sum(0)
    mean = total / len(rows)
    return mean, np.sqrt(np.maximum(squares / len(rows) - mean**2, 0))


def pixel_statistics(
    cache: ImageCache, groups: Mapping[tuple[str, str], Sequence[int] | np.ndarray]
) -> pd.DataFrame:
    """Grey values in units of [0,1], a row per set of images, as `rows_by_split` gives them.

    Columns split, class_name, images, min, max; mean and std of all pixels; contrast, the mean of
    the images' own standard deviations; and of the mean image and the image of standard deviations
    the lowest and highest pixel: pixel_mean_min, pixel_mean_max, pixel_std_min, pixel_std_max.
    Padding counts.
    """
    statistics, rows = _image_statistics(cache), []
    for (split, class_name), chosen in groups.items():
        mean, spread = mean_and_spread(cache, chosen)
        own = statistics.iloc[np.asarray(chosen, dtype=np.int64)]
        row = dict(split=split, class_name=class_name, images=len(chosen))
        row |= dict(min=own["min"].min(), max=own["max"].max(), mean=mean.mean())
        row["std"] = np.sqrt((spread**2 + mean**2).mean() - mean.mean() ** 2)
        row |= dict(contrast=own["contrast"].mean())
        row |= dict(pixel_mean_min=mean.min(), pixel_mean_max=mean.max())
        rows.append(row | dict(pixel_std_min=spread.min(), pixel_std_max=spread.max()))
    return pd.DataFrame(rows)


def _image_statistics(cache: ImageCache) -> pd.DataFrame:
    """Columns grey (mean), contrast (deviation), min, max of every image, in units of [0,1]."""
    found = []
    for start in range(0, len(cache.images), CHUNK):
        block = np.asarray(cache.images[start : start + CHUNK], dtype=np.float32)
        pixels = block.reshape(-1, cache.size**2) / 255
        found.append(np.stack([pixels.mean(1), pixels.std(1), pixels.min(1), pixels.max(1)], 1))
    columns = ["grey", "contrast", "min", "max"]
    return pd.DataFrame(np.concatenate(found).astype(float), columns=columns)


def uniform_split_test(dataset: Dataset, cache: ImageCache) -> pd.DataFrame:
    """Could the splits be one pool divided at random? Tests of class counts, mean grey, contrast.

    Class counts by a chi-square test; mean grey and contrast of the images by a Kruskal-Wallis
    test inside each class, so that other class shares do not count twice. A patient's images of
    one class in one split count as one, their mean. Columns test, class_name, p, p_holm (Holm
    1979, over all rows), effect_name, effect (Cramer's V or epsilon squared, 0 to 1), uneven
    (p_holm < 0.05), detail (share or median per split) and meaning, in words.
    """
    manifest = dataset.manifest
    splits = [name for name in SPLITS if (manifest["split"] == name).any()]
    if len(splits) < 2:
        raise ValueError(
            "the data set has one split only: divide it first, e.g. with split.grouped"
        )
    keys = ["split", "patient", "class_name"]
    table = manifest[keys].join(_image_statistics(cache))
    units = table.groupby(keys, as_index=False)[["grey", "contrast"]].mean()
    names = [name for name in dataset.classes if (units["class_name"] == name).any()]
    counts = pd.crosstab(units["split"], units["class_name"]).loc[splits, names]
    outcome = chi2_contingency(counts)
    effect = np.sqrt(outcome.statistic / (counts.to_numpy().sum() * max(min(counts.shape) - 1, 1)))
    shares = (counts[names[-1]] / counts.sum(axis=1)).map("{:.1%}".format)
    row = dict(test="class counts", class_name="all", p=outcome.pvalue, effect_name="Cramer's V")
    detail = f"share of {names[-1]}: " + "; ".join(
        f"{split} {share}" for split, share in shares.items()
    )
    rows = [row | dict(effect=effect, detail=detail)]
    for column, test in (("grey", "mean grey"), ("contrast", "contrast")):
        for name in names:
            own = units[units["class_name"] == name]
            parts = {split: own.loc[own["split"] == split, column] for split in splits}
            parts = {split: values for split, values in parts.items() if len(values)}
            alike = len(parts) < 2 or own[column].nunique() < 2
            statistic, p = (0.0, 1.0) if alike else kruskal(*parts.values())
            detail = "; ".join(f"{split} {values.median():.3f}" for split, values in parts.items())
            row = dict(test=test, class_name=name, p=p, effect_name="epsilon squared")
            effect = statistic / max(len(own) - 1, 1)
            rows.append(row | dict(effect=effect, detail=f"median: {detail}"))
    result = pd.DataFrame(rows)
    result.insert(3, "p_holm", metrics.holm(result["p"]))
    result.insert(6, "uneven", result["p_holm"] < 0.05)
    result["meaning"] = [_meaning(row, len(result)) for _, row in result.iterrows()]
    return result


def _meaning(row: pd.Series, tests: int) -> str:
    share = f"{row['p']:.1%}" if row["p"] >= 0.001 else "less than 0.1%"
    often = f"a random division would differ at least this much in {share} of draws"
    if not row["uneven"]:
        return f"{often}: no sign of an uneven division"
    strength = np.searchsorted(EFFECTS[row["effect_name"]], row["effect"], side="right")
    size = ("negligible", "small", "medium", "large")[strength]
    corrected = f"p = {row['p_holm']:.2g} after correction for {tests} tests"
    return f"{often}, {corrected}: unevenly divided, by a {size} effect"


def size_shortcut(
    dataset: Dataset, shapes: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """How well the format alone tells the class: AUC of boosting on height, width and aspect ratio.

    `shapes` as for `sizes`. Cross-validated by patient in 5 folds; scores are ranked inside each
    fold, since those of two fits cannot be compared. Columns features, metric ("auc"), value,
    ci_low, ci_high (patient bootstrap), n and finding, in words. Unlabelled images are left out.
    Of more than two classes the AUC is the mean of each against the rest. Errors: ValueError for
    fewer than two classes or two patients of a class.

    >>> manifest = pd.DataFrame({"label": np.arange(80) % 2, "patient": np.arange(80)})
    >>> images = Dataset("demo", None, manifest, ("a", "b"), None, True, "argument")
    >>> given_away = np.stack([np.full(80, 100), 100 + 50 * manifest["label"]], axis=1)
    >>> size_shortcut(images, given_away, draws=50)["value"].round(2).tolist()
    [0.5, 1.0, 1.0, 1.0]
    """
    labels = dataset.manifest["label"].to_numpy()
    known = labels >= 0
    table, labels = _format(shapes)[known].to_numpy(float), labels[known]
    table = pd.DataFrame(table, columns=list(SHAPE_FEATURES)[:3])
    patients = dataset.manifest["patient"].to_numpy()[known]
    spread = pd.Series(patients).groupby(labels).nunique()
    if len(spread) < 2 or spread.min() < 2:
        raise ValueError(
            "size_shortcut compares two classes or more, with two patients or more of each"
        )
    units, rows = pd.factorize(patients)[0], []
    folds = deal(labels, units, min(5, spread.min()), seed=seed)
    for name, features in SHAPE_FEATURES.items():
        x, scores = table[features].to_numpy(), np.empty((len(table), len(spread)))
        for held_out in folds:
            train = np.setdiff1d(np.arange(len(table)), held_out)
            model = HistGradientBoostingClassifier(
                max_iter=40,
                max_leaf_nodes=8,
                min_samples_leaf=10,
                early_stopping=False,
                random_state=seed,
            )
            score = model.fit(x[train], labels[train]).predict_proba(x[held_out])
            # Rounded, for scores that differ in the last digit must share their rank.
            scores[held_out] = (rankdata(score.round(9), axis=0) - 0.5) / len(held_out)
        score = scores[:, 1] if len(spread) == 2 else scores
        scored = metrics.classification(labels, score, patients, draws=draws, seed=seed)
        row = scored[scored["metric"] == "auc"].iloc[0].to_dict()
        finding = "no sign that it tells the classes apart"
        if len(np.unique(x, axis=0)) == 1:
            finding = "the same for all images: tells nothing"
        elif row["ci_low"] > 0.5:
            strength = np.searchsorted([0.7, 0.9], row["value"], side="right")
            words = ("weakly", "clearly", "almost fully")
            finding = f"a shortcut: tells the classes apart {words[strength]}"
        rows.append({"features": name} | row | {"finding": finding})
    return pd.DataFrame(rows)


def _format(shapes: np.ndarray) -> pd.DataFrame:
    table = pd.DataFrame(np.asarray(shapes), columns=["height", "width"])
    return table.assign(aspect=table["width"] / table["height"])


def normalisations(
    cache: ImageCache, train_rows: Sequence[int] | np.ndarray
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Four ways to normalise images [N,1,S,S] in [0,1], by the statistics of `train_rows`.

    "fixed": (x - 0.5) / 0.25. "sample": each image by its own mean and standard deviation (a flat
    image becomes zeros). "training": one mean and one deviation for all pixels. "training, each
    pixel": a mean and a deviation for each place.
    """
    mean, spread = mean_and_spread(cache, train_rows)
    overall = float(mean.mean()), float(np.sqrt((spread**2 + mean**2).mean() - mean.mean() ** 2))
    place = torch.from_numpy(mean).float(), torch.from_numpy(spread).float()
    least = 1 / 255  # A border that is black in every image has no deviation.

    def sample(x: Tensor) -> Tensor:
        deviation = x.std((1, 2, 3), keepdim=True, correction=0)
        return (x - x.mean((1, 2, 3), keepdim=True)) / deviation.clamp(min=least)

    return {
        "fixed": lambda x: (x - 0.5) / 0.25,
        "sample": sample,
        "training": lambda x: (x - overall[0]) / max(overall[1], least),
        "training, each pixel": lambda x: (x - place[0].to(x)) / place[1].to(x).clamp(min=least),
    }


def figure_classes(dataset: Dataset, caption: str) -> Figure:
    """Images of each class in each split, with numbers and shares."""
    counts = pd.crosstab(dataset.manifest["split"], dataset.manifest["class_name"])
    counts = counts.reindex([name for name in SPLITS if name in counts.index])[
        list(dataset.classes)
    ]
    figure, axes = panels(1, width=6.0, height=3.2)
    colours = [COLORS[k % len(COLORS)] for k in range(len(dataset.classes))]
    counts.plot.bar(ax=axes[0, 0], width=0.8, color=colours, rot=0, xlabel="", ylabel="images")
    for name, bars in zip(dataset.classes, axes[0, 0].containers, strict=True):
        shares = counts[name] / counts.sum(axis=1)
        texts = [f"{n}\n{share:.0%}" for n, share in zip(counts[name], shares, strict=True)]
        axes[0, 0].bar_label(bars, texts, fontsize=8)
    axes[0, 0].margins(y=0.2)
    axes[0, 0].set_title(f"Classes per split; {caption}", fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure


def figure_mean_images(cache: ImageCache, dataset: Dataset, caption: str) -> Figure:
    """Mean image and deviation of each class in training, and the difference of two means."""
    groups = rows_by_split(dataset, together=False)
    maps = {
        c: mean_and_spread(cache, rows) for (s, c), rows in groups.items() if s in ("train", "")
    }
    names = list(maps)
    figure, axes = panels(len(maps) + 1, rows=2, width=2.5, height=2.6)
    for axis in axes.flat:
        axis.axis("off")
    widest = max(spread.max() for _, spread in maps.values())
    shown = [
        (axes[0, k], maps[name][0], f"mean, {name}", "gray", (0, 1)) for k, name in enumerate(names)
    ]
    shown += [
        (axes[1, k], maps[name][1], f"standard deviation, {name}", "viridis", (0, widest))
        for k, name in enumerate(names)
    ]
    if len(names) > 1:
        difference = maps[names[1]][0] - maps[names[0]][0]
        reach = max(float(np.abs(difference).max()), 1e-6)
        shown.append(
            (axes[0, -1], difference, f"{names[1]} - {names[0]}", "RdBu_r", (-reach, reach))
        )
    for axis, image, title, colours, (low, high) in shown:
        drawn = axis.imshow(image, cmap=colours, vmin=low, vmax=high)
        axis.set_title(title, fontsize=9)
        if colours != "gray":
            figure.colorbar(drawn, ax=axis, fraction=0.046)
    figure.suptitle(f"{caption}; grey values in [0, 1]", fontsize=9)
    return figure


def figure_augmentations(
    image: np.ndarray,
    transforms: Mapping[str, A.BasicTransform],
    *,
    repeats: int = 2,
    seed: int = 0,
) -> Figure:
    """Each transform alone, `repeats` draws in a row, then all combined; the original is first.

    `image` uint8 [H,W], e.g. `cache.images[row]`. Give transforms with p=1 to see each one.
    """
    lines = {name: A.Compose([transform]) for name, transform in transforms.items()}
    lines["combined"] = A.Compose(list(transforms.values()))
    figure, axes = panels(repeats + 1, rows=len(lines), width=1.8, height=2.0)
    for line, (name, transform) in zip(axes, lines.items(), strict=True):
        for draw, axis in enumerate(line):
            if draw:
                transform.set_random_seed(seed + draw - 1)
            shown = transform(image=image)["image"] if draw else image
            axis.imshow(shown, cmap="gray", vmin=0, vmax=255)
            axis.set_title(name if draw else "original", fontsize=8)
            axis.axis("off")
    return figure
