"""Looking at a data set before training: sizes, grey values, what the format gives away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.ensemble import HistGradientBoostingClassifier

from .. import metrics
from .cache import ImageCache
from .datasets import Dataset
from .split import deal

CHUNK = 256  # Images that are turned to floats at a time.
SHAPE_FEATURES = {"height": ["height"], "width": ["width"], "aspect ratio": ["aspect"]}
SHAPE_FEATURES["all three"] = ["height", "width", "aspect"]


def mean_and_spread(
    cache: ImageCache, rows: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each pixel over `rows`: float64 [S,S] in units of [0,1]."""
    total, squares = np.zeros((2, cache.size, cache.size))
    for start in range(0, len(rows), CHUNK):
        pixels = np.asarray(cache.images[rows[start : start + CHUNK]], dtype=np.float64) / 255
        total += pixels.sum(0)
        squares += np.square(pixels).sum(0)
    mean = total / len(rows)
    return mean, np.sqrt(np.maximum(squares / len(rows) - mean**2, 0))


def size_shortcut(
    dataset: Dataset, shapes: np.ndarray, *, draws: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """How well the format alone tells the class: AUC of boosting on height, width and aspect ratio.

    `shapes` [N,2]: heights and widths, e.g. `cache.shapes`. Cross-validated by patient in 5 folds;
    scores are ranked inside each fold, since those of two fits cannot be compared. Columns
    features, metric ("auc"; of more than two classes the mean of each against the rest), value,
    ci_low, ci_high (patient bootstrap), n and finding, in words. Errors: ValueError for fewer than
    two classes, or patients of a class.

    >>> manifest = pd.DataFrame({"label": np.arange(80) % 2, "patient": np.arange(80)})
    >>> images = Dataset("demo", None, manifest, ("a", "b"), None, True, "argument")
    >>> given_away = np.stack([np.full(80, 100), 100 + 50 * manifest["label"]], axis=1)
    >>> size_shortcut(images, given_away, draws=50)["value"].round(2).tolist()
    [0.5, 1.0, 1.0, 1.0]
    """
    known = dataset.manifest[dataset.manifest["label"] >= 0]
    labels, patients = known["label"].to_numpy(), metrics.patient_codes(known["patient"])
    table = pd.DataFrame(np.asarray(shapes)[known.index], columns=["height", "width"])
    table["aspect"] = table["width"] / table["height"]
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
