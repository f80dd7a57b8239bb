"""The data of a detection study, its folds, and the training of one.

Three sets of images per fold never mix: `train`, `select` (epoch, fusion, thresholds) and `score`
(read last). With an official split they are train, val and test; else fold k scores, fold k + 1
selects and the others train, so that every image is scored once.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .. import files, objectives, submission, train
from ..data import augment, cache, datasets, sources, split, tables
from ..data.tables import CORNERS
from ..models.detector import Detector, faster_rcnn
from ..study import Study, fit_model
from . import evaluate, views

log = logging.getLogger("dlia_utils")

# The settings that `train_fold` wants: run.pick(*DETECTOR), run.pick(*RECIPE)
DETECTOR = "arch weights size trainable_layers freeze_bn nms rpn_pre_nms rpn_post_nms".split()
DETECTOR += "roi_batch anchor_sizes channels width seed".split()
RECIPE = "optimizer weight_decay warmup_epochs lr_min accumulate clip_norm ema".split()


class Fold(NamedTuple):
    """Manifest rows by use; `name` is also the model's folder in the run."""

    name: str
    train: np.ndarray
    select: np.ndarray
    score: np.ndarray


class Target(NamedTuple):
    """Images that a submission is wanted for, their id table, and the models to ask."""

    name: str
    dataset: datasets.Dataset
    rows: np.ndarray
    mapping: pd.DataFrame
    folds: tuple[Fold, ...]


@functools.lru_cache(maxsize=1)
def open_detection(run) -> Study:
    """Find, check, split and decode the boxed images of a `run`; asking again opens nothing again.

    An official train/val/test split is kept; otherwise `run.folds` patient-grouped folds are
    drawn, saved as `split.json` and read back on resume. Errors: `tables.BadData`.
    """
    dataset = datasets.load(run.location)
    dataset = dataset if dataset.mapping is not None else datasets.boxed(dataset)
    problems = datasets.check(dataset)
    if len(problems):
        raise tables.BadData(datasets.problem_text(problems))
    saved = run.run_dir / "split.json"
    if saved.exists():
        dataset = split.load(dataset, saved)
    elif not {"train", "val", "test"} <= set(dataset.manifest["split"]):
        dataset = split.folds(dataset, n=run.folds, seed=run.seed)
    decoded = cache.build(dataset, size=run.size, fit="pad")
    if not saved.exists():
        split.save(dataset, saved)
    return Study(run, dataset, decoded)


def folds(study: Study) -> list[Fold]:
    """The folds of this run: one named "official", or the first `run.run_folds` of `run.folds`.

    Where `run.images` says so, at most that many images of each use, and of those to train on the
    share `run.train_share`; the same ones whenever asked.
    """
    manifest, run = study.dataset.manifest, study.run

    def some(salt: int, wanted: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero(wanted)
        most = len(rows) if run.images is None else min(len(rows), run.images)
        most = most if salt else max(1, round(run.train_share * most))
        return np.sort(np.random.default_rng([run.seed, salt]).permutation(rows)[:most])

    if "fold" not in manifest:
        uses = [manifest["split"].eq(name) for name in ("train", "val", "test")]
        return [Fold("official", *map(some, range(3), uses))]
    number, result = manifest["fold"].to_numpy(), []
    for k in range(run.run_folds):
        chosen = (k + 1) % run.folds
        uses = ((number >= 0) & (number != k) & (number != chosen), number == chosen, number == k)
        result.append(Fold(f"fold{k}", *map(some, range(3), uses)))
    return result


def truth(study: Study, rows: Sequence[int]) -> pd.DataFrame:
    """The true boxes of `rows`, in pixels of the original files."""
    boxes = study.dataset.boxes
    return boxes[boxes["image"].isin(rows)].reset_index(drop=True)


def matches(study: Study, rows: Sequence[int], found: pd.DataFrame, **options) -> evaluate.Matches:
    """`evaluate.match` on these rows of the study."""
    sides = study.cache.shapes[rows][:, ::-1].tolist()
    options |= dict(
        classes=len(study.dataset.box_classes), sizes=dict(zip(rows, sides, strict=True))
    )
    return evaluate.match(truth(study, rows), found, images=rows, **options)


def on_images(study: Study, rows: Sequence[int], known: pd.DataFrame, found) -> tuple:
    """What figures take: the images of `rows`, true and found boxes in their pixels, and titles."""
    scale, shown = np.tile(study.cache.scale(rows), 2), []
    for table in (known, found):
        own = [table[table["image"].eq(row)] for row in rows]
        parts = zip(own, scale, strict=True)
        shown.append([part.assign(**(part[CORNERS] * by)) for part, by in parts])
    titles = [Path(path).stem for path in study.dataset.manifest["path"].to_numpy()[rows]]
    return np.asarray(study.cache.images[rows]), *shown, titles


def build_detector(folder: Path, num_classes: int, options: Mapping[str, Any]) -> Detector:
    """A fresh detector; weights.txt in `folder` says what it starts from, random where it must."""
    record, weights = folder / "weights.txt", options["weights"]
    began = record.read_text(encoding="utf-8") if record.exists() else ""
    reason = "this training began so; another RUN_NAME tries again"
    if weights is not None and began != "random":
        try:
            model = faster_rcnn(num_classes=num_classes, **options)
        except RuntimeError as error:
            reason = str(error)
        else:
            own = {"coco": "", "imagenet": os.environ.get("DLIA_WEIGHTS")}.get(weights, weights)
            files.write_text(f"file {Path(own).name}" if own else weights, record)
            return model
    if weights is not None:
        log.warning("training starts from RANDOM weights and will be much weaker: %s", reason)
    files.write_text("random", record)
    # Running statistics of random weights mean nothing: batch norm must learn.
    random = {**options, "weights": None, "freeze_bn": False}
    return faster_rcnn(num_classes=num_classes, **random)


def train_fold(
    study: Study,
    fold: Fold,
    *,
    detector: Mapping[str, Any],
    recipe: Mapping[str, Any],
    flip: float = 0.5,
) -> train.FitResult:
    """Train the detector of `fold`, or read the finished one back; it stops by mAP on `select`.

    detector, recipe: the options named in `DETECTOR` and `RECIPE`. Errors: `train.OutOfTime`.
    """
    dataset, images = study.dataset, study.cache
    model = build_detector(study.run.run_dir, len(dataset.box_classes), detector)
    boxes, transform = truth(study, fold.train), augment.box_transform(flip=flip)
    seed, batch = study.run.seed, study.run.batch_size
    train_set = augment.CachedBoxes(images, fold.train, boxes, transform=transform, seed=seed)

    def select_by(candidate: Detector) -> dict[str, float]:
        found = views.predict(candidate, images, fold.select, batch_size=batch, progress=False)
        return {"val_mAP50": evaluate.summary(matches(study, fold.select, found))["mAP50"]}

    options = dict(monitor="val_mAP50", val_metric=select_by, collate=augment.collate_boxes)
    options |= dict(schedule="cosine", **recipe)
    # Who shortens the training to an epoch or two need not know of the warm-up.
    options["warmup_epochs"] = min(options["warmup_epochs"], study.run.epochs - 1)
    return fit_model(study, fold.name, model, objectives.detection(), train_set, None, **options)


def targets(study: Study) -> list[Target]:
    """What a submission is wanted for: every edition beside this data set, or the scored images.

    An edition whose mapping names an image that this run trained or chose on is refused.
    """
    chosen, dataset = tuple(folds(study)), study.dataset
    paths = dataset.manifest["path"].to_numpy()
    if dataset.mapping is None:
        first = chosen[0]
        mapping = pd.DataFrame({"image_id": [Path(path).name for path in paths[first.score]]})
        mapping = mapping.rename_axis("ID").reset_index()
        return [Target(f"{dataset.name}_{first.name}", dataset, first.score, mapping, (first,))]
    used = np.unique(np.concatenate([part for one in chosen for part in (one.train, one.select)]))
    result = []
    for location in sources.siblings(study.run.location):
        edition = dataset if location.root == dataset.root else datasets.load(location)
        submission.leak_guard(paths[used], edition.mapping)
        rows = np.flatnonzero(edition.manifest["split"].eq("test"))
        result.append(Target(location.root.name, edition, rows, edition.mapping, chosen))
    return result
