"""What does a classifier of chest films read? The same films with only a part left, marked corners, sources.

After DeGrave, Janizek & Lee 2021 (Nature Machine Intelligence 3:610, "AI for radiographic COVID-19 detection
selects shortcuts over signal"): where the classes come from different hospitals, the edges of a film, its
markers and its format may tell them apart without any pathology.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from . import metrics, train
from .data import datasets
from .data.cache import ImageCache, content_size, shapes
from .data.datasets import Dataset
from .data.tables import BadData
from .plots import COLORS, panels
from .report import with_interval
from .study import Study

log = logging.getLogger("dlia_utils")

BOX_ROWS = (0.10, 0.82)
BOX_COLUMNS = ((0.08, 0.47), (0.53, 0.92))
CRUDE_BOX = (
    "a crude box: two rectangles over "
    f"{BOX_ROWS[0]:.0%} to {BOX_ROWS[1]:.0%} of the height and "
    + " and ".join(f"{left:.0%} to {right:.0%}" for left, right in BOX_COLUMNS)
    + " of the width"
)
REGIONS = (
    "whole",
    "border_only",
    "corners_only",
    "centre_only",
    "lungs_only",
    "lungs_blanked",
    "lung_shape",
)
OUTSIDE = (
    "lungs_blanked",
    "border_only",
    "corners_only",
)  # Regions that hold no lung tissue, or hardly any.
REGION_NAMES = {
    "whole": "the whole film",
    "border_only": "the border alone",
    "corners_only": "the corners alone",
    "centre_only": "the film without its border",
    "lungs_only": "the lungs alone",
    "lungs_blanked": "the film with the lungs blanked",
    "lung_shape": "the outline of the lungs alone",
}
AUDITED = ("accuracy", "balanced_accuracy", "auc")
CORNERS = ("upper left", "upper right", "lower left", "lower right")
HOW = {
    "tested": "trained on whole films, tested on the region",
    "retrained": "trained and tested on the region",
}

TrainAndScore = Callable[[Tensor, np.ndarray, Tensor], np.ndarray]


@dataclass(frozen=True)
class Films:
    """Images of one split with what the audit needs.

    x float [N,1,S,S] in [0,1], y int [N] of 0/1, patients [N], masks bool [N,S,S] of the lungs; `lungs` says in
    words where the masks are from.
    """

    x: Tensor
    y: np.ndarray
    patients: np.ndarray
    masks: np.ndarray
    lungs: str = "the data set's masks"


def films(study: Study, rows: Sequence[int] | np.ndarray) -> Films:
    """The images of `rows` of a study with their lung masks, or the crude box where there are none.

    Log the opening of the test split (`study.test_opened`) before its rows are passed.
    """
    rows = np.asarray(rows, dtype=np.int64)
    masks, lungs = lung_masks(study.dataset, rows, study.cache)
    return Films(
        study.images(rows), study.labels(rows).cpu().numpy(), study.patients(rows), masks, lungs
    )


# ------------------------------------------------------------------------------------------- lungs


def crude_lung_box(size: int, content: tuple[int, int] | None = None) -> np.ndarray:
    """Two rectangles that cover the lung fields of a usual frontal film: bool [S,S].

    They span 10 to 82 % of the height, and 8 to 47 % and 53 to 92 % of the width, of the film's `content` (height,
    width in pixels from the top left; default the whole square). Stated, not measured: it stands in for masks.

    >>> crude_lung_box(100).sum() == 72 * (39 + 39)
    np.True_
    """
    height, width = content or (size, size)
    down, across = (np.arange(size) + 0.5) / height, (np.arange(size) + 0.5) / width
    beside = np.any([(across >= left) & (across < right) for left, right in BOX_COLUMNS], axis=0)
    return np.outer((down >= BOX_ROWS[0]) & (down < BOX_ROWS[1]), beside)


def load_masks(
    dataset: Dataset, rows: Sequence[int] | np.ndarray, size: int, fit: str = "squash"
) -> np.ndarray:
    """Organ masks of the images `rows` at the size and fit of their cache: bool [n,S,S].

    A mask file covers the whole film, whatever its own size (the COVID-19 Radiography Database has 256-pixel masks
    for 299-pixel films); what is above half of its largest value is organ. Resized to the nearest pixel; several
    masks of one film are joined. Errors: `BadData` naming images without a mask, or masks that cannot be read;
    `lung_masks` uses a crude box for those instead.
    """
    rows = np.asarray(rows, dtype=np.int64)
    paths = _mask_paths(dataset)
    manifest = dataset.manifest["path"]
    missing = [(manifest[row], "has no mask") for row in rows.tolist() if row not in paths]
    if missing:
        raise BadData(datasets.problem_text(pd.DataFrame(missing, columns=["path", "problem"])))
    unique = np.unique(rows)
    content = dict(
        zip(unique.tolist(), _contents(datasets.take(dataset, unique), size, fit), strict=True)
    )

    def read(path: str, row: int) -> np.ndarray | tuple[str, str]:
        try:
            return _read_mask(dataset.root / path, *content[row])
        except (OSError, SyntaxError, ValueError) as error:
            return path, f"cannot be read as a mask ({error})"

    jobs = [(place, row, path) for place, row in enumerate(rows.tolist()) for path in paths[row]]
    masks, problems = np.zeros((len(rows), size, size), bool), []
    with ThreadPoolExecutor(8) as pool:
        for (place, row, _), found in zip(
            jobs, pool.map(lambda job: read(job[2], job[1]), jobs), strict=True
        ):
            if isinstance(found, tuple):
                problems.append(found)
            else:
                height, width = content[row]
                masks[place, :height, :width] |= found
    if problems:
        raise BadData(datasets.problem_text(pd.DataFrame(problems, columns=["path", "problem"])))
    return masks


def lung_masks(
    dataset: Dataset, rows: Sequence[int] | np.ndarray, cache: ImageCache
) -> tuple[np.ndarray, str]:
    """Masks bool [n,S,S] of `rows` in the cache's pixels, and in words what they are.

    The data set's own masks (`load_masks`) where it has them; `crude_lung_box` for a film without a mask or
    with an empty one, and the words say for how many.
    """
    rows = np.asarray(rows, dtype=np.int64)
    masks = np.zeros((len(rows), cache.size, cache.size), bool)
    known = np.isin(rows, list(_mask_paths(dataset)))
    if known.any():
        masks[known] = load_masks(dataset, rows[known], cache.size, cache.fit)
    empty = ~masks.any((1, 2))
    for place in np.flatnonzero(empty):
        height, width = cache.shapes[rows[place]].tolist()
        masks[place] = crude_lung_box(cache.size, content_size(height, width, cache.size, cache.fit))
    if empty.all():
        return masks, CRUDE_BOX
    words = "the data set's masks"
    if empty.any():
        words += f"; for {empty.sum()} of {len(rows)} films without one, {CRUDE_BOX}"
        log.warning("lungs are %s", words)
    return masks, words


# ------------------------------------------------------------------------------------------- regions


def border_only(x: Tensor, share: float = 0.1, *, fill: float) -> Tensor:
    """A frame as wide as `share` of the side; the rest becomes `fill`, the mean grey of the training images.

    x: [N,1,S,S] in [0,1]; a new tensor. Padding (fit "pad") is part of the frame: it shows the film's format.
    Errors: ValueError for a share outside (0, 0.5).

    >>> border_only(torch.ones(1, 1, 10, 10), 0.2, fill=0.0).sum()
    tensor(64.)
    """
    return _keep(x, _frame(x, share), fill)


def centre_only(x: Tensor, share: float = 0.1, *, fill: float) -> Tensor:
    """The film without the frame that `border_only` keeps.

    >>> centre_only(torch.ones(1, 1, 10, 10), 0.2, fill=0.0).sum()
    tensor(36.)
    """
    return _keep(x, ~_frame(x, share), fill)


def corners_only(x: Tensor, share: float = 0.2, *, fill: float) -> Tensor:
    """Four squares with `share` of the side in the corners, where markers and text stand; the rest is `fill`.

    >>> corners_only(torch.ones(1, 1, 10, 10), 0.2, fill=0.0).sum()
    tensor(16.)
    """
    down, across = (_near_edge(n, share) for n in x.shape[2:])
    return _keep(x, (down[:, None] & across).to(x.device), fill)


def lungs_only(x: Tensor, masks: Tensor | np.ndarray, *, fill: float) -> Tensor:
    """What lies inside the masks bool [N,S,S]; the rest is `fill`. The outline of the lungs stays visible.

    >>> lungs_only(torch.ones(1, 1, 2, 2), np.eye(2, dtype=bool)[None], fill=0.5)[0, 0]
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    return _keep(x, _as_mask(masks, x), fill)


def lungs_blanked(x: Tensor, masks: Tensor | np.ndarray, *, fill: float) -> Tensor:
    """What lies outside the masks bool [N,S,S]; the lungs are `fill`. Their outline stays visible: see `lung_shape`.

    >>> lungs_blanked(torch.ones(1, 1, 2, 2), np.eye(2, dtype=bool)[None], fill=0.5)[0, 0]
    tensor([[0.5000, 1.0000],
            [1.0000, 0.5000]])
    """
    return _keep(x, ~_as_mask(masks, x), fill)


def lung_shape(x: Tensor, masks: Tensor | np.ndarray, *, fill: float) -> Tensor:
    """The masks as images: white lungs on `fill`, no pixel of the film. A control for the two regions before.

    >>> lung_shape(torch.zeros(1, 1, 2, 2), np.eye(2, dtype=bool)[None], fill=0.5)[0, 0]
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    return _keep(torch.ones_like(x), _as_mask(masks, x), fill)


def limited(
    x: Tensor,
    region: str,
    masks: Tensor | np.ndarray,
    *,
    fill: float,
    border: float = 0.1,
    corner: float = 0.2,
) -> Tensor:
    """The images with only `region` (one of `REGIONS`) left; see the function of that name. Errors: ValueError.

    >>> limited(torch.ones(1, 1, 4, 4), "whole", np.ones((1, 4, 4), bool), fill=0.5).min()
    tensor(1.)
    """
    if region not in REGIONS:
        raise ValueError(f"region is {region!r}; it must be one of {', '.join(REGIONS)}")
    if region == "whole":
        return x.clone()
    if region == "corners_only":
        return corners_only(x, corner, fill=fill)
    if region in ("border_only", "centre_only"):
        return {"border_only": border_only, "centre_only": centre_only}[region](
            x, border, fill=fill
        )
    by_mask = {"lungs_only": lungs_only, "lungs_blanked": lungs_blanked, "lung_shape": lung_shape}
    return by_mask[region](x, masks, fill=fill)


# ------------------------------------------------------------------------------------------- the audit


def linear_probe(
    features: Callable[[Tensor], Tensor] | None = None,
    *,
    c: float = 0.1,
    pool: int = 16,
    batch_size: int = 64,
) -> TrainAndScore:
    """A quick pipeline for retraining: frozen features, standardised, then logistic regression.

    `features` maps images [B,1,S,S] to [B,F], e.g. `model.features` of a frozen network; without it the pixels
    averaged to at most `pool` x `pool`. `c` is the inverse strength of the L2 penalty; both classes weigh the same.
    Returns a function (x_train, y_train, x_test) -> P(class 1) [N]; means and deviations come from the training
    images alone.
    """

    def pooled(x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(
            x, [min(side, pool) for side in x.shape[2:]]
        ).flatten(1)

    @torch.no_grad()
    def all_features(x: Tensor) -> np.ndarray:
        return (
            torch.cat([(features or pooled)(part).flatten(1).cpu() for part in x.split(batch_size)])
            .double()
            .numpy()
        )

    def train_and_score(x_train: Tensor, y_train: np.ndarray, x_test: Tensor) -> np.ndarray:
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=1000)
        )
        return model.fit(all_features(x_train), y_train).predict_proba(all_features(x_test))[:, 1]

    return train_and_score


def region_accuracy(
    train_and_score: TrainAndScore | None,
    train_films: Films,
    test_films: Films,
    *,
    model: nn.Module | None = None,
    fill: float | None = None,
    regions: Sequence[str] = REGIONS,
    border: float = 0.1,
    corner: float = 0.2,
    batch_size: int = 64,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How well each region of the films tells the classes apart, in two forms (DeGrave et al. 2021).

    how = "tested": `model` (two logits, trained on whole films) is tested on test films of which only the region is
    left: what this model reads, as far as it copes with such films. how = "retrained": the pipeline
    `train_and_score(x_train, y_train, x_test)` -> P(class 1), e.g. `linear_probe`, is trained and tested on the
    region: what the region gives away. Either may be None. `fill` is the grey of what is taken away, by default the
    mean of the training images. Columns region, how, metric (accuracy, balanced_accuracy, auc), value, ci_low,
    ci_high (patient bootstrap), n, lungs (what the masks are). Errors: ValueError for an unknown region, lengths
    that do not fit, or neither form.
    """
    _check_films(train_films, "train_films")
    _check_films(test_films, "test_films")
    if unknown := set(regions) - set(REGIONS):
        raise ValueError(f"unknown regions {sorted(unknown)}; choose from {', '.join(REGIONS)}")
    if model is None and train_and_score is None:
        raise ValueError(
            "give a model to test, a pipeline to retrain (e.g. linear_probe()), or both"
        )
    fill = float(train_films.x.mean()) if fill is None else fill
    options = {"fill": fill, "border": border, "corner": corner}
    tables = []
    for region in regions:
        x_test = limited(test_films.x, region, test_films.masks, **options)
        answers = {}
        if model is not None:
            answers["tested"] = train.predict(model, x_test, batch_size=batch_size)[0][:, 1]
        if train_and_score is not None:
            x_train = limited(train_films.x, region, train_films.masks, **options)
            answers["retrained"] = train_and_score(x_train, train_films.y, x_test)
        for how, probability in answers.items():
            table = metrics.classification(
                test_films.y, probability, test_films.patients, draws=draws, level=level, seed=seed
            )
            table = table[table["metric"].isin(AUDITED)].assign(lungs=test_films.lungs)
            table.insert(0, "region", region)
            table.insert(1, "how", how)
            tables.append(table)
    order = {how: place for place, how in enumerate(HOW)}
    together = pd.concat(tables, ignore_index=True)
    return together.sort_values(
        "how", key=lambda column: column.map(order), kind="stable", ignore_index=True
    )


def with_marker(
    x: Tensor, place: str, *, size: float = 0.08, margin: float = 0.03, value: float = 1.0
) -> Tensor:
    """A square with side `size` (a share of the image's) burnt in at `place`: one of `CORNERS`, or "middle".

    x: [N,1|3,S,S] in [0,1]; a new tensor. `margin` is the distance from the edges, as a share too. Errors:
    ValueError for an unknown place or a mark that does not fit.

    >>> with_marker(torch.zeros(1, 1, 10, 10), "lower left", size=0.2, margin=0.1)[0, 0, 7:9, 1:3].sum()
    tensor(4.)
    """
    if place not in (*CORNERS, "middle"):
        raise ValueError(f"place is {place!r}; it must be one of {', '.join(CORNERS)}, middle")
    if not 0 < size <= 1 or margin < 0 or size + margin > 1:
        raise ValueError(
            f"size {size} and margin {margin} are shares of the side: size in (0,1], sum at most 1"
        )
    x = x.clone()
    slices = []
    for side, far in zip(
        x.shape[2:], (place.startswith("lower"), place.endswith("right")), strict=True
    ):
        long, gap = max(round(size * side), 1), round(margin * side)
        start = (side - long) // 2 if place == "middle" else side - gap - long if far else gap
        slices.append(slice(max(start, 0), max(start, 0) + long))
    x[:, :, slices[0], slices[1]] = value
    return x


def marker_test(
    model: nn.Module,
    x: Tensor,
    y: np.ndarray | Tensor,
    *,
    groups: Sequence,
    size: float = 0.08,
    margin: float = 0.03,
    value: float = 1.0,
    batch_size: int = 64,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Does a small bright square in a corner, such as a side marker, move the answer of a two-class model?

    Tested in each corner and, for comparison, in the middle of the film. x: [N,1,S,S] in [0,1], y: [N], groups:
    patients [N]; `size`, `margin`, `value` as for `with_marker`. Columns place, metric, value, ci_low, ci_high
    (patient bootstrap), n, size. Metrics: change (mean of P(class 1) after minus before), size_of_change (mean of
    its absolute value), flips (share of the answers that turn), flips_to_1, flips_to_0 (shares of all films) and
    accuracy_change. The model is left as it was.
    """
    y = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
    if not len(x) == len(y) == len(groups) or not len(y):
        raise ValueError(
            f"x ({len(x)}), y ({len(y)}) and groups ({len(groups)}) must have the same length above 0"
        )
    before = train.predict(model, x, batch_size=batch_size)[0][:, 1]
    rows = []
    for place in (*CORNERS, "middle"):
        marked = with_marker(x, place, size=size, margin=margin, value=value)
        after = train.predict(model, marked, batch_size=batch_size)[0][:, 1]
        answers = before > 0.5, after > 0.5
        right = [(answer == (y == 1)).astype(float) for answer in answers]
        found = {
            "change": after - before,
            "size_of_change": np.abs(after - before),
            "flips": answers[0] != answers[1],
            "flips_to_1": answers[1] & ~answers[0],
            "flips_to_0": answers[0] & ~answers[1],
            "accuracy_change": right[1] - right[0],
        }
        for name, values in found.items():
            row = _mean(values, groups, draws=draws, level=level, seed=seed)
            rows.append({"place": place, "metric": name} | row | {"size": size})
    return pd.DataFrame(rows)


def inside_energy(
    maps: Tensor | np.ndarray,
    masks: Tensor | np.ndarray,
    *,
    groups: Sequence,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of the attribution that lies inside the masks, beside the share of the film that they cover.

    Source: the energy-based pointing game of Wang et al., arXiv 1910.01279. maps [N,H,W] >= 0, masks bool
    [N,H,W]. A flat map has energy = area; a zero map counts as flat. Columns metric (energy, area, gain = energy -
    area), value, ci_low, ci_high (patient bootstrap), n, zero_maps. Errors: ValueError for other shapes, negative
    or NaN maps, an empty mask.

    >>> heat = np.zeros((1, 2, 2))
    >>> heat[0, 0] = 3, 1
    >>> inside_energy(heat, np.eye(2, dtype=bool)[None], groups=[1], draws=5)["value"].tolist()
    [0.75, 0.5, 0.25]
    """
    maps = np.asarray(maps.detach().cpu() if isinstance(maps, Tensor) else maps, dtype=float)
    masks = np.asarray(masks.cpu() if isinstance(masks, Tensor) else masks, dtype=bool)
    if maps.ndim != 3 or maps.shape != masks.shape or len(groups) != len(maps) or not len(maps):
        raise ValueError(
            f"maps {list(maps.shape)} and masks {list(masks.shape)} must be [N,H,W] of one shape, with as many groups "
            f"({len(groups)})"
        )
    if not (maps >= 0).all() or not np.isfinite(maps).all():
        raise ValueError("maps hold negative, infinite or NaN values: pass Attribution.heat()")
    if not masks.any((1, 2)).all():
        empty = np.flatnonzero(~masks.any((1, 2)))[:5].tolist()
        raise ValueError(
            f"the masks of images {empty} cover no pixel: use lung_masks, which gives them a crude box"
        )
    area, total = masks.mean((1, 2)), maps.sum((1, 2))
    zero = total <= 0
    energy = np.where(zero, area, (maps * masks).sum((1, 2)) / np.where(zero, 1, total))
    rows = [
        {"metric": name}
        | _mean(values, groups, draws=draws, level=level, seed=seed)
        | {"zero_maps": int(zero.sum())}
        for name, values in (("energy", energy), ("area", area), ("gain", energy - area))
    ]
    return pd.DataFrame(rows)


def source_bias(
    dataset: Dataset,
    predictions: pd.DataFrame,
    *,
    threshold: float = 0.5,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Error by source (the manifest's column `group`) and class; where sources are not known, the table says so.

    `predictions` has columns image (row number in the manifest) and probability (of class 1). Columns source,
    class_name, metric ("error"), value, ci_low, ci_high (patient bootstrap), n, note. The note says when a source
    holds one class only: its source and its class are then the same question. Errors: ValueError for missing
    columns.
    """
    if missing := {"image", "probability"} - set(predictions.columns):
        raise ValueError(
            f"predictions lack the columns {sorted(missing)}: image is the row number in the manifest"
        )
    table = dataset.manifest.iloc[predictions["image"].to_numpy(dtype=np.int64)].reset_index(
        drop=True
    )
    table["wrong"] = (predictions["probability"].to_numpy() > threshold) != (table["label"] == 1)
    known = (table["group"] != "").any()
    table["source"] = table["group"].where(table["group"] != "", "not known")
    rows = []
    for source, part in table.groupby("source"):
        note = "sources are not known in this copy" if not known else ""
        if known and source != "not known" and part["class_name"].nunique() == 1:
            note = "this source holds one class only: source and class cannot be told apart"
        for name, films_of_class in part.groupby("class_name"):
            share = metrics.share(
                films_of_class["wrong"],
                films_of_class["patient"],
                draws=draws,
                level=level,
                seed=seed,
            )
            rows.append(
                {"source": source, "class_name": name} | share | {"metric": "error", "note": note}
            )
    return pd.DataFrame(rows)[
        ["source", "class_name", "metric", "value", "ci_low", "ci_high", "n", "note"]
    ]


# ------------------------------------------------------------------------------------------- words


def conclude(
    rows: pd.DataFrame,
    *,
    marker: pd.DataFrame | None = None,
    energy: pd.DataFrame | None = None,
    synthetic: bool = False,
) -> str:
    """Plain sentences (markdown) on what the classifier reads, from the numbers alone.

    `rows` from `region_accuracy`, `marker` from `marker_test`, `energy` from `inside_energy`. A region tells the
    classes apart when its AUC's interval lies above 0.5; with three regions outside the lungs and 95 % intervals, chance
    alone says so in at most one audit of thirteen.

    >>> row = {"how": "tested", "metric": "auc", "n": 90, "lungs": "the data set's masks"}
    >>> table = [row | {"region": "whole", "value": 0.95, "ci_low": 0.91, "ci_high": 0.98},
    ...          row | {"region": "lungs_blanked", "value": 0.8, "ci_low": 0.7, "ci_high": 0.9}]
    >>> print(conclude(pd.DataFrame(table)).splitlines()[0])
    **The model reads more than the lungs:** its answer is better than chance where no lung can be seen.
    """
    auc = rows[rows["metric"] == "auc"].set_index(["how", "region"])
    if not len(auc):
        raise ValueError("rows hold no auc: pass the table of region_accuracy")
    lines = [f"**{_headline(auc)}", ""]
    for how, words in (
        ("tested", "The model trained on whole films, shown"),
        ("retrained", "Trained and tested on"),
    ):
        for region in REGIONS:
            if (how, region) in auc.index:
                lines.append(f"- {words} {REGION_NAMES[region]}: {_judge(auc, how, region)}")
    if marker is not None:
        lines.append(f"- {_marker_sentence(marker)}")
    if energy is not None:
        lines.append(f"- {_energy_sentence(energy)}")
    lines += ["", f"Lungs are {auc['lungs'].iloc[0]}."]
    if _outline_tells(auc, "tested") or _outline_tells(auc, "retrained"):
        lines.append(
            "Their outline alone tells the classes apart and stays visible where lungs are cut out or blanked; "
            "border and corners are free of it."
        )
    if "tested" in auc.index.get_level_values("how"):
        lines.append(
            "A film with a part taken away is unlike any that the model was trained on: that it fails there "
            "does not prove that it never reads the part that was left."
        )
    if synthetic:
        lines.append(
            "\n*Synthetic images and a tiny model: these sentences show the machinery, not a finding.*"
        )
    return "\n".join(lines)


def _headline(auc: pd.DataFrame) -> str:
    """The first sentence; its first words are to be bold, so it closes the ** that the caller opens."""

    def tells(how: str, regions: Sequence[str]) -> bool:
        return any(
            auc.loc[(how, region), "ci_low"] > _floor(auc, how, region)
            for region in regions
            if (how, region) in auc.index
        )

    if tells("tested", OUTSIDE):
        if ("tested", "lungs_only") in auc.index and not tells("tested", ["lungs_only"]):
            return (
                "The model reads what lies outside the lungs:** its answer is better than chance where no lung can "
                "be seen, and not where only the lungs can be seen."
            )
        return "The model reads more than the lungs:** its answer is better than chance where no lung can be seen."
    if tells("retrained", OUTSIDE):
        follows = "whether a model uses it was not tested here"
        if any(("tested", region) in auc.index for region in OUTSIDE):
            follows = "this model shows no sign of reading it"
        return f"The films offer a shortcut outside the lungs:** the classes can be told apart there; {follows}."
    if tells("tested", ["lungs_only"]) or tells("retrained", ["lungs_only"]):
        text = "No sign of a shortcut outside the lungs:** the lungs alone tell the classes apart"
        outside = auc[auc.index.get_level_values("region").isin(OUTSIDE)]
        if not len(outside):
            return f"{text}; nothing outside them was looked at."
        # Few films show little: what was not found may still be there.
        return f"{text}; outside, an AUC above {outside['ci_high'].max():.2f} can be excluded, and no more."
    return "No region tells the classes apart,** so the films at hand do not show what is read."


def _floor(auc: pd.DataFrame, how: str, region: str) -> float:
    """What a region must beat: chance, or for blanked lungs their outline, which is still to be seen."""
    if region == "lungs_blanked" and _outline_tells(auc, how):
        return auc.loc[(how, "lung_shape"), "value"]
    return 0.5


def _outline_tells(auc: pd.DataFrame, how: str) -> bool:
    return (how, "lung_shape") in auc.index and auc.loc[(how, "lung_shape"), "ci_low"] > 0.5


def _judge(auc: pd.DataFrame, how: str, region: str) -> str:
    row = auc.loc[(how, region)]
    text = f"AUC {with_interval(row)}, "
    if row["ci_high"] < 0.5:
        return text + "worse than chance: what was taken away turns the answers around."
    if not row["ci_low"] > 0.5:
        return text + "no better than chance."
    if region == "whole" or (how, "whole") not in auc.index:
        return text + "better than chance."
    whole = auc.loc[(how, "whole"), "value"]
    if not whole > 0.5:
        return text + "better than chance, unlike the whole film."
    kept = (row["value"] - 0.5) / (whole - 0.5)
    return text + f"{kept:.0%} of the whole film's lead over chance."


def _marker_sentence(marker: pd.DataFrame) -> str:
    table = marker.set_index(["place", "metric"])
    place = max(CORNERS, key=lambda corner: table.loc[(corner, "size_of_change"), "value"])
    change, flips = table.loc[(place, "change")], table.loc[(place, "flips")]
    middle = table.loc[("middle", "flips"), "value"]
    moved = (
        "moves the answer"
        if change["ci_low"] > 0 or change["ci_high"] < 0
        else "does not move the answer one way"
    )
    return (
        f"A bright square of {change['size']:.0%} of the side in a corner {moved}: most in the {place}, P(class 1) "
        f"{change['value']:+.3f} [{change['ci_low']:+.3f}, {change['ci_high']:+.3f}]; {flips['value']:.1%} of the "
        f"answers turn there, {middle:.1%} with the square in the middle."
    )


def _energy_sentence(energy: pd.DataFrame) -> str:
    table = energy.set_index("metric")
    gain = table.loc["gain"]
    verdict = "about what a map that knows nothing has"
    if gain["ci_low"] > 0:
        verdict = "more than a map that knows nothing has"
    elif gain["ci_high"] < 0:
        verdict = "less than a map that knows nothing has"
    zero = int(gain["zero_maps"])
    note = f" ({zero} zero maps count as flat)" if zero else ""
    return (
        f"{table.loc['energy', 'value']:.1%} of the attribution lies inside the lungs, which cover "
        f"{table.loc['area', 'value']:.1%} of the film: {verdict}{note}."
    )


# ------------------------------------------------------------------------------------------- figures


def figure_regions(
    images: Tensor,
    masks: Tensor | np.ndarray,
    caption: str,
    *,
    fill: float,
    titles: Sequence[str] = (),
    border: float = 0.1,
    corner: float = 0.2,
) -> Figure:
    """What is left of each film in each of `REGIONS`; one row an image [N,1,S,S]. `titles`: a line per image."""
    figure, axes = panels(len(REGIONS), rows=len(images), width=1.6, height=1.9)
    for column, region in enumerate(REGIONS):
        left = limited(images, region, masks, fill=fill, border=border, corner=corner).cpu().numpy()
        for row, axis in enumerate(axes[:, column]):
            axis.imshow(left[row, 0], cmap="gray", vmin=0, vmax=1)
            name = region.replace("_", " ")
            axis.set_title(f"{titles[row]}\n{name}" if titles and not column else name, fontsize=7)
            axis.axis("off")
    figure.suptitle(f"taken away: grey {fill:.2f}; {caption}", fontsize=9, y=1.0)
    figure.tight_layout()
    return figure


def figure_audit(rows: pd.DataFrame, caption: str) -> Figure:
    """AUC with its interval for each region, in both forms of `region_accuracy`; the dotted line is chance."""
    auc = rows[rows["metric"] == "auc"]
    regions = [region for region in REGIONS if (auc["region"] == region).any()]
    figure, axes = panels(1, width=7.0, height=0.8 + 0.42 * len(regions))
    axis = axes[0, 0]
    for color, offset, (how, words) in zip(COLORS, (-0.13, 0.13), HOW.items(), strict=False):
        part = auc[auc["how"] == how].set_index("region").reindex(regions).dropna(subset="value")
        place = np.array([regions.index(region) for region in part.index]) + offset
        if len(part):
            # A percentile interval may leave the value outside by a hair; a bar cannot be negative.
            bars = [
                (part["value"] - part["ci_low"]).clip(0),
                (part["ci_high"] - part["value"]).clip(0),
            ]
            axis.errorbar(
                part["value"], place, xerr=bars, fmt="o", ms=5, color=color, capsize=3, label=words
            )
    axis.axvline(0.5, ls=":", color="0.4")
    axis.set_yticks(
        range(len(regions)), [region.replace("_", " ") for region in regions], fontsize=8
    )
    axis.invert_yaxis()
    axis.set(xlabel="AUC on test films", xlim=(min(0.4, auc["ci_low"].min() - 0.03), 1.02))
    axis.grid(axis="x", alpha=0.25)
    axis.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
    figure.suptitle(f"What each region tells; {caption}", fontsize=9)
    figure.tight_layout()
    return figure


# ------------------------------------------------------------------------------------------- helpers


def _mask_paths(dataset: Dataset) -> Mapping[int, list[str]]:
    return dataset.masks.groupby("image")["path"].agg(list).to_dict()


def _contents(dataset: Dataset, size: int, fit: str) -> list[tuple[int, int]]:
    """Height and width that each film takes up in the cached square."""
    return [
        content_size(height, width, size, fit) for height, width in shapes(dataset).tolist()
    ]


def _read_mask(path: Path, height: int, width: int) -> np.ndarray:
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L").resize((width, height), Image.Resampling.NEAREST))
    return grey > grey.max() / 2


def _keep(x: Tensor, inside: Tensor, fill: float) -> Tensor:
    return torch.where(inside, x, torch.as_tensor(fill, dtype=x.dtype, device=x.device))


def _as_mask(masks: Tensor | np.ndarray, x: Tensor) -> Tensor:
    """Masks [N,S,S] as bool [N,1,S,S] beside the images."""
    mask = torch.as_tensor(masks, dtype=torch.bool, device=x.device)
    if mask.shape != (len(x), *x.shape[2:]):
        raise ValueError(
            f"masks {list(mask.shape)} do not fit images {list(x.shape)}: give [N,S,S] of the same size"
        )
    return mask[:, None]


def _near_edge(n: int, share: float) -> Tensor:
    """Bool [n]: within `share` of either end."""
    if not 0 < share < 0.5:
        raise ValueError(f"share is {share}; it must lie in (0, 0.5), as a part of the side")
    place = torch.arange(n)
    reach = max(round(share * n), 1)
    return (place < reach) | (place >= n - reach)


def _frame(x: Tensor, share: float) -> Tensor:
    down, across = (_near_edge(n, share) for n in x.shape[2:])
    return (down[:, None] | across).to(x.device)


def _mean(values: np.ndarray, groups: Sequence, *, draws: int, level: float, seed: int) -> dict:
    """Mean with a patient-bootstrap interval; of true/false values as `metrics.share`, which stays honest at 0 and 1."""
    if values.dtype == bool:
        row = metrics.share(values, groups, draws=draws, level=level, seed=seed)
        return {name: row[name] for name in ("value", "ci_low", "ci_high", "n")}
    weights = metrics.patient_weights(groups, draws=draws, seed=seed)
    low, high = np.quantile(weights @ values / weights.sum(1), [(1 - level) / 2, (1 + level) / 2])
    return {
        "value": float(values.mean()),
        "ci_low": float(low),
        "ci_high": float(high),
        "n": len(values),
    }


def _check_films(given: Films, name: str) -> None:
    lengths = {part: len(getattr(given, part)) for part in ("x", "y", "patients", "masks")}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name}: all parts must have one length, not {lengths}")
    _as_mask(given.masks, given.x)
