"""Looking at a data set before training: sizes, grey values, splits, what the format gives away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import chi2_contingency, kruskal, rankdata
from sklearn.ensemble import HistGradientBoostingClassifier

from .. import metrics
from ..plots import COLORS, panels, titled
from .cache import ImageCache
from .datasets import Dataset
from .split import deal

SPLITS = ("train", "val", "test", "")
CHUNK = 256  # Images that are turned to floats at a time.
SHAPE_FEATURES = {"height": ["height"], "width": ["width"], "aspect ratio": ["aspect"]}
SHAPE_FEATURES["all three"] = ["height", "width", "aspect"]
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


def _format(shapes: np.ndarray) -> pd.DataFrame:
    table = pd.DataFrame(np.asarray(shapes), columns=["height", "width"])
    return table.assign(aspect=table["width"] / table["height"])


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
    the lowest and highest pixel: pixel_mean_min, ... Padding counts.
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
    test inside each class. A patient's images of one class in one split count as one, their mean.
    Columns test, class_name, p, p_holm (Holm 1979, over all rows), effect_name, effect (Cramer's V
    or epsilon squared, 0 to 1), uneven (p_holm < 0.05), detail and meaning, in words.
    """
    manifest = dataset.manifest
    splits = [name for name in SPLITS if (manifest["split"] == name).any()]
    if len(splits) < 2:
        raise ValueError("the data set has one split only: divide it first, with split.grouped")
    keys = ["split", "patient", "class_name"]
    metrics.patient_codes(manifest["patient"])  # refuses missing ones
    table = manifest[keys].join(_image_statistics(cache))
    units = table.groupby(keys, as_index=False)[["grey", "contrast"]].mean()
    names = [name for name in dataset.classes if (units["class_name"] == name).any()]
    counts = pd.crosstab(units["split"], units["class_name"]).loc[splits, names]
    outcome = chi2_contingency(counts)
    effect = np.sqrt(outcome.statistic / (counts.to_numpy().sum() * max(min(counts.shape) - 1, 1)))
    shares = (counts[names[-1]] / counts.sum(axis=1)).map("{:.1%}".format)
    detail = f"share of {names[-1]}: " + "; ".join(map(" ".join, shares.items()))
    rows = [("class counts", "all", outcome.pvalue, "Cramer's V", effect, detail)]
    for column, test in (("grey", "mean grey"), ("contrast", "contrast")):
        for name in names:
            own = units[units["class_name"] == name]
            parts = {split: own.loc[own["split"] == split, column] for split in splits}
            parts = {split: values for split, values in parts.items() if len(values)}
            alike = len(parts) < 2 or own[column].nunique() < 2
            statistic, p = (0.0, 1.0) if alike else kruskal(*parts.values())
            detail = "; ".join(f"{split} {values.median():.3f}" for split, values in parts.items())
            effect = statistic / max(len(own) - 1, 1)
            rows.append((test, name, p, "epsilon squared", effect, f"median: {detail}"))
    columns = ["test", "class_name", "p", "effect_name", "effect", "detail"]
    result = pd.DataFrame(rows, columns=columns)
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
    fold, since those of two fits cannot be compared. Columns features, metric ("auc"; of more than
    two classes the mean of each against the rest), value, ci_low, ci_high (patient bootstrap), n
    and finding, in words. Errors: ValueError for fewer than two classes, or patients of a class.

    >>> manifest = pd.DataFrame({"label": np.arange(80) % 2, "patient": np.arange(80)})
    >>> images = Dataset("demo", None, manifest, ("a", "b"), None, True, "argument")
    >>> given_away = np.stack([np.full(80, 100), 100 + 50 * manifest["label"]], axis=1)
    >>> size_shortcut(images, given_away, draws=50)["value"].round(2).tolist()
    [0.5, 1.0, 1.0, 1.0]
    """
    known = dataset.manifest[dataset.manifest["label"] >= 0]
    labels, patients = known["label"].to_numpy(), metrics.patient_codes(known["patient"])
    table = _format(np.asarray(shapes)[known.index])
    spread = pd.Series(patients).groupby(labels).nunique()
    if len(spread) < 2 or spread.min() < 2:
        text = "two classes or more, with two patients or more of each"
        raise ValueError(f"size_shortcut compares {text}")
    folds = deal(labels, patients, min(5, spread.min()), seed=seed)
    small = dict(max_iter=40, max_leaf_nodes=8, min_samples_leaf=10, early_stopping=False)
    rows = []
    for name, features in SHAPE_FEATURES.items():
        x, scores = table[features].to_numpy(float), np.empty((len(table), len(spread)))
        for held_out in folds:
            train = np.setdiff1d(np.arange(len(table)), held_out)
            model = HistGradientBoostingClassifier(**small, random_state=seed)
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


def figure_classes(dataset: Dataset, caption: str) -> Figure:
    """Images of each class in each split, with numbers and shares."""
    counts = pd.crosstab(dataset.manifest["split"], dataset.manifest["class_name"])
    splits = [name for name in SPLITS if name in counts.index]
    counts = counts.loc[splits, list(dataset.classes)]
    figure, axes = panels(1, width=6.0, height=3.2)
    colours = [COLORS[k % len(COLORS)] for k in range(len(dataset.classes))]
    counts.plot.bar(ax=axes[0, 0], width=0.8, color=colours, rot=0, xlabel="", ylabel="images")
    for name, bars in zip(dataset.classes, axes[0, 0].containers, strict=True):
        shares = counts[name] / counts.sum(axis=1)
        texts = [f"{n}\n{share:.0%}" for n, share in zip(counts[name], shares, strict=True)]
        axes[0, 0].bar_label(bars, texts, fontsize=9)
    axes[0, 0].margins(y=0.2)
    axes[0, 0].legend(fontsize=9, frameon=False)
    share = counts.sum() / counts.to_numpy().sum()
    return titled(figure, f"Most images: {share.idxmax()}, {share.max():.0%} of all", caption)


def figure_mean_images(cache: ImageCache, dataset: Dataset, caption: str) -> Figure:
    """Mean image and deviation of each class in training, and the difference of two means."""
    groups = rows_by_split(dataset, together=False)
    groups = {name: rows for (split, name), rows in groups.items() if split in ("train", "")}
    maps = {name: mean_and_spread(cache, rows) for name, rows in groups.items()}
    figure, axes = panels(len(maps) + 1, rows=2, width=2.5, height=2.6)
    for axis in axes.flat:
        axis.axis("off")
    widest, shown = max(spread.max() for _, spread in maps.values()), []
    for k, (name, (mean, _)) in enumerate(maps.items()):
        shown.append((axes[0, k], mean, f"mean, {name}", "gray", 0, 1))
    for k, (name, (_, spread)) in enumerate(maps.items()):
        shown.append((axes[1, k], spread, f"standard deviation, {name}", "viridis", 0, widest))
    if len(maps) > 1:
        one, other = list(maps)[:2]
        difference = maps[other][0] - maps[one][0]
        reach = max(float(np.abs(difference).max()), 1e-6)
        shown.append((axes[0, -1], difference, f"{other} - {one}", "RdBu_r", -reach, reach))
    for axis, image, title, colours, low, high in shown:
        drawn = axis.imshow(image, cmap=colours, vmin=low, vmax=high)
        axis.set_title(title, fontsize=9)
        if colours != "gray":
            figure.colorbar(drawn, ax=axis, fraction=0.046)
    title = f"{other} minus {one}: at most {reach:.2f} of the grey scale" if len(maps) > 1 else ""
    return titled(figure, title, f"grey values in [0, 1]; {caption}")
