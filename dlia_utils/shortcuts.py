"""What does a classifier of radiographs read? Images with only a part left.

After DeGrave, Janizek & Lee 2021 (Nature Machine Intelligence 3:610): where the classes come from
different hospitals, edges, markers and format may tell them apart without any pathology.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from . import metrics, train
from .data import datasets
from .data.cache import ImageCache, content_size
from .data.datasets import Dataset
from .data.tables import BadData, open_image

log = logging.getLogger("dlia_utils")

BOX_ROWS, BOX_COLUMNS = (0.10, 0.82), ((0.08, 0.47), (0.53, 0.92))
CRUDE_BOX = "a crude box: two rectangles over 10% to 82% of the height and "
CRUDE_BOX += "8% to 47% and 53% to 92% of the width"
REGIONS = "whole border_only corners_only centre_only lungs_only lungs_blanked lung_shape".split()
OUTSIDE = ("lungs_blanked", "border_only", "corners_only")  # no lung tissue, or hardly any
TrainAndScore = Callable[[Tensor, np.ndarray, Tensor], np.ndarray]


@dataclass(frozen=True)
class Sample:
    """Images of one split with what the audit needs; `lungs` says where the masks are from."""

    x: Tensor  # float [N,1,S,S] in [0,1]
    y: np.ndarray  # int [N] of 0/1
    patients: np.ndarray  # [N]
    masks: np.ndarray  # bool [N,S,S], the lungs
    lungs: str = "the data set's masks"


def sample(dataset: Dataset, cache: ImageCache, x: Tensor, rows: np.ndarray) -> Sample:
    """The images `x` of the manifest's `rows`, with their lung masks or the crude box."""
    own = dataset.manifest.iloc[rows]
    masks = lung_masks(dataset, rows, cache)
    return Sample(x, own["label"].to_numpy(), own["patient"].to_numpy(), *masks)


def lung_masks(dataset: Dataset, rows: np.ndarray, cache: ImageCache) -> tuple[np.ndarray, str]:
    """Masks bool [n,S,S] of `rows` in the cache's pixels, and in words what they are.

    A mask file covers the whole radiograph, whatever its size; above half of its largest value is
    lung, and several masks of one image are joined. An image without a mask or with an empty one
    gets a crude box, and the words say so. Errors: `BadData` for masks that cannot be read.
    """
    paths = dataset.masks.groupby("image")["path"].agg(list).to_dict()
    masks = np.zeros((len(rows), cache.size, cache.size), bool)
    crude, problems = 0, []
    for mask, row in zip(masks, np.asarray(rows).tolist(), strict=True):
        content = content_size(*cache.shapes[row].tolist(), cache.size, cache.fit)
        inside = mask[: content[0], : content[1]]
        for path in paths.get(row, []):
            try:
                with open_image(dataset.root / path) as image:
                    small = image.convert("L").resize(content[::-1], Image.Resampling.NEAREST)
                inside |= np.asarray(small) > np.max(small) / 2
            except (OSError, SyntaxError, ValueError) as error:
                problems.append((path, f"cannot be read as a mask ({error})"))
        if not inside.any():
            crude += 1
            inside[:] = crude_lung_box(*content)
    if problems:
        raise BadData(datasets.problem_text(pd.DataFrame(problems, columns=["path", "problem"])))
    if crude == len(rows):
        return masks, CRUDE_BOX
    words = Sample.lungs
    if crude:
        words += f"; for {crude} of {len(rows)} images without one, {CRUDE_BOX}"
        log.warning("lungs are %s", words)
    return masks, words


def crude_lung_box(height: int, width: int) -> np.ndarray:
    """Two rectangles over the lung fields of a usual frontal radiograph: bool [height,width]."""
    down, across = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    beside = np.any([(across >= left) & (across < right) for left, right in BOX_COLUMNS], axis=0)
    return np.outer((down >= BOX_ROWS[0]) & (down < BOX_ROWS[1]), beside)


def limited(x: Tensor, region: str, masks: Tensor | np.ndarray, *, fill: float) -> Tensor:
    """The images [N,1,S,S] with only one of `REGIONS` left; the rest is `fill`.

    The border is a tenth of the side wide, the corners are a fifth of it; masks are bool [N,S,S].
    lung_shape is their outline, white: a control, as it stays visible where lungs are blanked.

    >>> x, masks = torch.ones(1, 1, 10, 10), np.eye(10, dtype=bool)[None]
    >>> [int(limited(x, region, masks, fill=0.0).sum()) for region in REGIONS]
    [100, 36, 16, 64, 10, 90, 10]
    """
    place = torch.arange(x.shape[-1], device=x.device)
    from_edge = torch.minimum(place, place.flip(0))
    border, corner = (from_edge < max(round(share * len(place)), 1) for share in (0.1, 0.2))
    border, corner = border[:, None] | border, corner[:, None] & corner
    lungs = torch.as_tensor(masks, dtype=torch.bool, device=x.device)[:, None]
    kept = (torch.ones_like(border), border, corner, ~border, lungs, ~lungs, lungs)
    shown = torch.ones_like(x) if region == "lung_shape" else x
    return torch.where(dict(zip(REGIONS, kept, strict=True))[region], shown, fill)


def linear_probe(features: Callable[[Tensor], Tensor] | None = None) -> TrainAndScore:
    """A quick pipeline for retraining: frozen features, standardised, then logistic regression.

    `features` maps images [B,1,S,S] to [B,F], e.g. `model.features` of a frozen network; without it
    the pixels averaged to at most 16 x 16. Returns (x_train, y_train, x_test) -> P(class 1) [N].
    """

    def pooled(x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, [min(side, 16) for side in x.shape[2:]])

    @torch.no_grad()
    def all_features(x: Tensor) -> np.ndarray:
        parts = [(features or pooled)(part).flatten(1).cpu() for part in x.split(64)]
        return torch.cat(parts).double().numpy()

    def train_and_score(x_train: Tensor, y_train: np.ndarray, x_test: Tensor) -> np.ndarray:
        regression = LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)
        model = make_pipeline(StandardScaler(), regression).fit(all_features(x_train), y_train)
        return model.predict_proba(all_features(x_test))[:, 1]

    return train_and_score


def region_accuracy(
    train_and_score: TrainAndScore,
    learnt: Sample,
    tested: Sample,
    *,
    model: nn.Module | None = None,
    regions: Sequence[str] = tuple(REGIONS),
    draws: int = 2000,
) -> pd.DataFrame:
    """How well each region tells the classes apart, in two forms (DeGrave et al. 2021).

    how = "tested": `model` (two logits) on images of which only the region is left: what it reads.
    how = "retrained": `train_and_score`, e.g. `linear_probe`, trained and tested on the region:
    what the region gives away. The rest has the mean grey of the training images. Columns region,
    how, metric (accuracy, balanced_accuracy, auc), value, ci_low, ci_high, n, lungs.
    """
    patients = metrics.patient_codes(tested.patients)
    fill, tables = float(learnt.x.mean()), []
    for region in regions:
        x_train, x_test = (limited(p.x, region, p.masks, fill=fill) for p in (learnt, tested))
        answers = {"retrained": train_and_score(x_train, learnt.y, x_test)}
        if model is not None:
            answers["tested"] = train.predict(model, x_test)[0][:, 1]
        for how, p in answers.items():
            table = metrics.classification(tested.y, p, patients, draws=draws)
            table = table[table["metric"].isin(["accuracy", "balanced_accuracy", "auc"])]
            tables.append(table.assign(region=region, how=how, lungs=tested.lungs))
    together = pd.concat(tables).sort_values("how", ascending=False, kind="stable")
    columns = "region how metric value ci_low ci_high n lungs".split()
    return together[columns].reset_index(drop=True)
