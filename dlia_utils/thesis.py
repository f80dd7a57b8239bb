"""The result files that the original study of saliency drift promised, as CSV.

File names are `<flag>` (the data set), then what a file is about, joined by `_`; the study had no extension. In them
`S` is a severity, `CLASS` a class name and `SUFFIX` tells trainings apart ("" or "_augmented"). Letters, digits and
dots of flag and class names are kept, all else becomes "-", so that "_" only separates:

| file | rows | columns |
|---|---|---|
| `<flag>_sevS<SUFFIX>_rmses.csv` | corruptions | layers: mean RMSE over all images |
| `<flag>_CLASS_sevS<SUFFIX>_rmses.csv` | corruptions | layers: mean RMSE over the images of the class |
| `<flag>_CLASS<SUFFIX>_rmses_all.csv` | images of the class x severities | corruption/layer: RMSE |
| `<flag><SUFFIX>_auc.csv` | class x corruption | AUC clean and at each severity, and its drop (delta) |
| `<flag><SUFFIX>_drift.csv` | the tidy table of drift, whole | |
| `<flag><SUFFIX>_predictions.csv` | the tidy table of predictions, whole | |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from . import corruption_error, files
from .detect.figures import _need
from .explain.drift import CEILING, FLOOR
from .metrics import weighted_auc

CELL = ["corruption", "severity"]


def write(
    folder: str | Path,
    predictions: pd.DataFrame,
    drift: pd.DataFrame,
    *,
    flag: str,
    classes: Sequence[str],
    model_suffix: str = "",
    method: str = "gradcam++",
) -> list[Path]:
    """Write the files in the table above to `folder`, each in one step; returns their paths.

    predictions, drift: the tables of `drift.measure`, of one model; drift may have fewer images. flag: name of the data set. classes: names in the order of the
    labels. model_suffix: "" or words that start with "_". method: whose RMSE goes to the `_rmses` files; the study's
    is Grad-CAM++. A class is compared with the rest; of two classes AUC is that of class 1. A class without images
    in `drift` has no `_rmses` file, one without in `predictions` an AUC of NaN. Errors, before any file is written:
    ValueError for tables that `corruption_error.check` refuses, cells of other images than the clean ones, columns or
    images that are missing, repeated rows, an unknown method, and names that give one file name.

    >>> import tempfile
    >>> seen = pd.DataFrame({"image": [0, 1] * 2, "label": [0, 1] * 2, "corruption": ["clean"] * 2 + ["contrast"] * 2,
    ...     "severity": [0, 0, 1, 1], "predicted": [0, 1, 1, 1], "p0": [0.9, 0.2, 0.1, 0.3], "p1": [0.1, 0.8, 0.9, 0.7]})
    >>> drift = pd.DataFrame({"image": [0, 1], "corruption": "contrast", "severity": 1, "method": "gradcam++",
    ...     "layer": "layer1_2", "rmse": [10.0, 20.0]})
    >>> paths = write(tempfile.mkdtemp(), seen, drift, flag="toy", classes=["a", "b"])
    >>> [path.name for path in paths][:2], pd.read_csv(paths[0]).values.tolist()
    (['toy_sev1_rmses.csv', 'toy_a_sev1_rmses.csv'], [['contrast', 15.0]])
    """
    _check(predictions, drift, classes, method)
    start, names = _slug(flag, "flag"), _class_slugs(classes)
    if not re.fullmatch(r"(_[\w.-]*[A-Za-z0-9])?", model_suffix, re.ASCII):
        raise ValueError(
            f'model_suffix must be "" or words like "_augmented", not {model_suffix!r}'
        )
    label = predictions.drop_duplicates("image").set_index("image")["label"]
    own = drift[drift["method"].eq(method) & ~drift["corruption"].isin([FLOOR, CEILING])]
    own = own.assign(label=own["image"].map(label))
    tables = {}
    for severity, part in own.groupby("severity"):
        tables[f"{start}_sev{severity}{model_suffix}_rmses"] = _means(part)
        for number, name in enumerate(names):
            if (of_class := part[part["label"].eq(number)]).size:
                tables[f"{start}_{name}_sev{severity}{model_suffix}_rmses"] = _means(of_class)
    for number, name in enumerate(names):
        if (of_class := own[own["label"].eq(number)]).size:
            tables[f"{start}_{name}{model_suffix}_rmses_all"] = _all(of_class)
    tables[f"{start}{model_suffix}_auc"] = _auc(predictions, classes)
    tables |= {
        f"{start}{model_suffix}_drift": drift,
        f"{start}{model_suffix}_predictions": predictions,
    }
    return [files.write_csv(table, Path(folder) / f"{name}.csv") for name, table in tables.items()]


def _means(drift: pd.DataFrame) -> pd.DataFrame:
    """Mean RMSE, corruptions down and layers across in the order of the table."""
    table = drift.pivot_table(
        index="corruption", columns="layer", values="rmse", aggfunc="mean", sort=False
    )
    return table.rename_axis(columns=None).reset_index()


def _all(drift: pd.DataFrame) -> pd.DataFrame:
    """RMSE of every image: image x severity down, corruption x layer across in the order of the table."""
    named = drift.assign(column=drift["corruption"] + "/" + drift["layer"])
    table = named.pivot(index=["image", "severity"], columns="column", values="rmse")
    corruptions, layers = drift["corruption"].unique(), drift["layer"].unique()
    order = [f"{corruption}/{layer}" for corruption in corruptions for layer in layers]
    return table.reindex(columns=order).rename_axis(columns=None).reset_index()


def _auc(predictions: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """AUC of each class against the rest: class x corruption down; clean, each severity and the drops across."""
    rows = {}
    for number in [1] if len(classes) == 2 else range(len(classes)):
        value = {
            cell: _one_auc(part, number) for cell, part in predictions.groupby(CELL, sort=False)
        }
        clean = value.pop(("clean", 0))
        for (corruption, severity), auc in value.items():
            row = rows.setdefault((number, corruption), {"clean": clean})
            row |= {f"sev{severity}": auc, f"delta_sev{severity}": clean - auc}
    severities = sorted(set(predictions["severity"]) - {0})
    columns = ["clean"] + [
        f"{start}sev{severity}" for start in ("", "delta_") for severity in severities
    ]
    keys = pd.DataFrame(
        [(classes[number], corruption) for number, corruption in rows],
        columns=["class", "corruption"],
    )
    return keys.join(pd.DataFrame(list(rows.values())).reindex(columns=columns))


def _one_auc(part: pd.DataFrame, number: int) -> float:
    positive, probability = (
        part["label"].eq(number).to_numpy(int),
        part[f"p{number}"].to_numpy(float),
    )
    return float(weighted_auc(positive, probability, np.ones((1, len(part))))[0])


def _slug(name: str, what: str) -> str:
    slug = re.sub(r"[^\w.-]|_", "-", str(name)).strip("-.")
    if not slug:
        raise ValueError(f"{what} {name!r} has no letter or digit that a file could be named by")
    return slug


def _class_slugs(classes: Sequence[str]) -> list[str]:
    slugs = [_slug(name, "class") for name in classes]
    if len({slug.lower() for slug in slugs}) < len(slugs):  # some file systems do not tell A from a
        raise ValueError(
            f"classes {list(classes)} would share files: their names {slugs} must differ"
        )
    return slugs


def _check(
    predictions: pd.DataFrame, drift: pd.DataFrame, classes: Sequence[str], method: str
) -> None:
    """Refuse tables that would give wrong files."""
    probabilities = corruption_error.check(predictions)
    if len(classes) != len(probabilities):
        raise ValueError(
            f"classes must name {len(probabilities)} classes, as predictions has {probabilities}, not "
            f"{list(classes)}"
        )
    images = {cell: set(part["image"]) for cell, part in predictions.groupby(CELL)}
    clean = images[corruption_error.CLEAN, 0]
    for (corruption, severity), seen in images.items():
        if seen != clean:
            raise ValueError(
                f"{corruption} at severity {severity} has {len(seen)} images in predictions, clean "
                f"{len(clean)}: a drop of the AUC needs the same images"
            )
    keys = ["image", *CELL, "method", "layer"]
    _need(drift, "drift", *keys, "rmse")
    if (again := drift.duplicated(keys)).any():
        raise ValueError(
            f"drift has {drift.loc[again, keys].iloc[0].to_dict()} twice: pass one model at a time, "
            "without the duplicates of a repeated run"
        )
    if method not in set(drift["method"]):
        raise ValueError(
            f"drift has no method {method!r}, only {sorted(set(drift['method']))}: choose with method="
        )
    if strange := sorted(set(drift["image"]) - clean):
        raise ValueError(
            f"drift has images that predictions lacks, such as {strange[:3]}: their class is not known"
        )
