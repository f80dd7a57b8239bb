"""What the sections of the detection notebook share: data, folds, training, predictions, comparison of views.

Three sets of images per fold never mix: `train`, `select` (epoch, fusion, thresholds) and `score` (read last). With
an official split they are train, val and test; else fold k scores, fold k + 1 selects and the others train, so every
image is scored once, by a model that neither saw nor was chosen on its patient.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from .. import files, launch, models, objectives, report, submission, train
from ..data import augment, cache, datasets, sources, split
from ..data.tables import BadData
from ..models import faster_rcnn
from ..run import Run, submissions_root
from ..study import Study, fit_model, load_models, made_by, stored
from . import evaluate, figures, fuse, views
from .views import View

log = logging.getLogger("dlia_utils")

_OPEN: dict[tuple[str, Path], Study] = {}


@dataclass(frozen=True)
class Fold:
    """Manifest rows by use; `name` is also the model's folder in the run."""

    name: str
    train: np.ndarray
    select: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class Target:
    """Images that a submission is wanted for: their data set, rows and id table, and the models to ask."""

    name: str
    dataset: datasets.Dataset
    rows: np.ndarray
    mapping: pd.DataFrame
    folds: tuple[Fold, ...]


def open_detection(run: Run) -> Study:
    """Find, check, split and decode the boxed images of a run; a second call decodes nothing again.

    An official train/val/test split is kept; otherwise `run.folds` patient-grouped folds are drawn, saved as
    `split.json` and read back on resume. Errors: `BadData`, before anything is trained.
    """
    name = (run.key, run.run_dir)
    if name not in _OPEN:
        dataset = datasets.load(run.location)
        dataset = dataset if dataset.mapping is not None else datasets.boxed(dataset)
        problems = datasets.check(dataset)
        if len(problems):
            raise BadData(datasets.problem_text(problems))
        saved = run.run_dir / "split.json"
        if saved.exists():
            dataset = split.load(dataset, saved)
        elif not _official(dataset):
            dataset = split.folds(dataset, n=run.folds, seed=run.seed)
        _OPEN[name] = Study(run, dataset, cache.build(dataset, size=run.size, fit="pad"))
    study = _OPEN[name] = replace(_OPEN[name], run=run)
    if not (run.run_dir / "split.json").exists():
        split.save(study.dataset, run.run_dir / "split.json")
    return study


def folds(study: Study) -> list[Fold]:
    """The folds of this run: one named "official", or the first `run.run_folds` of `run.folds`."""
    manifest, run = study.dataset.manifest, study.run
    if _official(study.dataset):
        rows = {
            name: _some(study.rows(name), study, i)
            for i, name in enumerate(("train", "val", "test"))
        }
        return [Fold("official", rows["train"], rows["val"], rows["test"])]
    number = manifest["fold"].to_numpy()
    result = []
    for k in range(run.run_folds):
        chosen = (k + 1) % run.folds
        parts = ((number >= 0) & (number != k) & (number != chosen), number == chosen, number == k)
        rows = [_some(np.flatnonzero(part), study, i) for i, part in enumerate(parts)]
        result.append(Fold(f"fold{k}", *rows))
    return result


def _official(dataset: datasets.Dataset) -> bool:
    return {"train", "val", "test"} <= set(dataset.manifest["split"])


def _some(rows: np.ndarray, study: Study, salt: int) -> np.ndarray:
    """At most `run.images` of `rows`, the same ones whenever asked."""
    if study.run.images is None or len(rows) <= study.run.images:
        return rows
    return np.sort(
        np.random.default_rng([study.run.seed, salt]).permutation(rows)[: study.run.images]
    )


def truth(study: Study, rows: Sequence[int]) -> pd.DataFrame:
    """The true boxes of `rows`, in pixels of the original files."""
    boxes = study.dataset.boxes
    return boxes[boxes["image"].isin(rows)].reset_index(drop=True)


# -------------------------------------------------------------------- training


def build_detector(run: Run, num_classes: int) -> models.Detector:
    """A fresh detector of the profile; without its starting weights at hand it goes on from random ones, and says so."""
    record = run.run_dir / "weights.txt"
    options = dict(
        arch=run.arch,
        num_classes=num_classes,
        size=run.size,
        trainable_layers=run.trainable_layers,
        nms=run.nms,
        rpn_pre_nms=run.rpn_pre_nms,
        rpn_post_nms=run.rpn_post_nms,
        roi_batch=run.roi_batch,
        anchor_sizes=run.anchor_sizes,
        channels=run.channels,
        width=run.width,
        seed=run.seed,
    )
    if run.weights is not None and not (
        record.exists() and record.read_text(encoding="utf-8") == "random"
    ):
        try:
            model = faster_rcnn(**options, freeze_bn=run.freeze_bn, weights=run.weights)
        except RuntimeError as error:
            log.warning("training starts from RANDOM weights and will be much weaker: %s", error)
        else:
            own_file = run.weights == "imagenet" and os.environ.get("DLIA_WEIGHTS")
            files.write_text(f"file {Path(own_file).name}" if own_file else run.weights, record)
            return model
    files.write_text("random", record)
    # Running statistics of random weights mean nothing: without pretrained weights batch norm must learn.
    return faster_rcnn(**options, freeze_bn=False)


def train_fold(study: Study, fold: Fold) -> train.FitResult:
    """Train the detector of `fold` with the profile's recipe, or read the finished one back.

    Early stopping and the best epoch go by mAP@0.5 on `fold.select`. Errors: `study.OutOfTime`.
    """
    run, dataset = study.run, study.dataset
    model = build_detector(run, len(dataset.box_classes))
    boxes = truth(study, fold.train)
    transform = augment.box_transform(flip=run.flip)
    train_set = augment.CachedBoxes(
        study.cache, fold.train, boxes, transform=transform, seed=run.seed
    )
    known, classes = truth(study, fold.select), len(dataset.box_classes)

    def select_by(candidate: models.Detector) -> dict[str, float]:
        found = views.predict(
            candidate, study.cache, fold.select, batch_size=run.batch_size, progress=False
        )
        matches = evaluate.match(known, found, images=fold.select, classes=classes)
        return {"val_mAP50": evaluate.summary(matches)["mAP50"]}

    return fit_model(
        study,
        fold.name,
        model,
        objectives.detection(),
        train_set,
        None,
        val_metric=select_by,
        monitor="val_mAP50",
        collate=augment.collate_boxes,
        optimizer="sgd",
        schedule="cosine",
        weight_decay=run.weight_decay,
        warmup_epochs=run.warmup_epochs,
        lr_min=run.lr_min,
        accumulate=run.accumulate,
        clip_norm=run.clip_norm,
        ema=run.ema,
    )


def train_folds(study: Study, *, devices: Sequence[str] | None = None) -> pd.DataFrame:
    """Train every fold: one after the other, or side by side where there are several GPUs (`launch.each`).

    Returns a row per fold: images by use, epochs, best epoch and its mAP@0.5, minutes.
    """
    chosen = {fold.name: fold for fold in folds(study)}

    def job(name: str) -> dict[str, float | str]:
        fold, fitted = chosen[name], train_fold(study, chosen[name])
        return {
            "fold": name,
            "train": len(fold.train),
            "select": len(fold.select),
            "score": len(fold.score),
            "epochs": len(fitted.history),
            "best_epoch": fitted.best_epoch,
            "best mAP50": fitted.best_score,
            "minutes": fitted.seconds / 60,
        }

    rows = launch.each(job, list(chosen), log_dir=study.run.run_dir / "logs", devices=devices)
    return pd.DataFrame(rows.values())


def torchrun_command(run: Run, fold: str, *, processes: int) -> list[str]:
    """The command that trains one fold of this run on `processes` GPUs at once (DDP, global batch x `processes`).

    Several machines: the same with --nnodes, --node-rank and --rdzv-endpoint in place of --standalone.
    """
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "dlia_utils.detect.job",
        str(run.run_dir),
        fold,
    ]


def load_fold(study: Study, fold: Fold) -> models.Detector:
    """The trained detector of a fold, in eval mode on the run's device."""
    return load_models(study, [fold.name])[fold.name]


# -------------------------------------------------------------------- predictions


def look(
    study: Study, fold: Fold, which: str, *, looks: Sequence[View] = views.VIEWS
) -> pd.DataFrame:
    """Boxes of a fold's model on its "select" or "score" images under every view; kept in the run folder."""
    rows = getattr(fold, which)

    def compute() -> pd.DataFrame:
        model = load_fold(study, fold)
        return views.predict(model, study.cache, rows, views=looks, batch_size=study.run.batch_size)

    uses = ("size", "images", "folds", "seed")
    return stored(study, f"boxes_{which}_{fold.name}", compute, model=fold.name, uses=uses)


def join(found: pd.DataFrame, *, method: str, views_used: Sequence[int], run: Run) -> pd.DataFrame:
    """One table of boxes from the numbered views: "wbf", "nms" or "soft_nms"; one view alone stays as it is.

    With `run.one_per_class` only the best box of each class stays in an image.
    """
    table = found[found["view"].isin(views_used)]
    if len(views_used) > 1:
        renumbered = table.assign(
            view=table["view"].map({view: i for i, view in enumerate(views_used)})
        )
        joiners: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
            "wbf": lambda t: fuse.wbf(t, iou=run.wbf_iou, views=len(views_used)),
            "nms": lambda t: fuse.nms(t, iou=run.nms),
            "soft_nms": lambda t: fuse.soft_nms(t),
        }
        if method not in joiners:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(joiners)}")
        table = joiners[method](renumbered)
    table = table.drop(columns="view", errors="ignore")
    return fuse.one_per_class(table) if run.one_per_class else table.reset_index(drop=True)


def recipes(looks: Sequence[View] = views.VIEWS) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What is compared: the plain view, each other view joined with it, and all of them by three fusions.

    >>> list(recipes())[:3]
    ['plain', 'plain + scale 0.9', 'plain + scale 1.1']
    """
    everything = tuple(range(len(looks)))
    known = {"plain": ("wbf", (0,))}
    known |= {
        f"plain + {view.name}": ("wbf", (0, number)) for number, view in enumerate(looks) if number
    }
    return known | {
        f"all views, {method}": (method, everything) for method in ("nms", "soft_nms", "wbf")
    }


def matches(study: Study, rows: Sequence[int], found: pd.DataFrame, **options) -> evaluate.Matches:
    """`evaluate.match` on these rows of the study."""
    classes = len(study.dataset.box_classes)
    return evaluate.match(truth(study, rows), found, images=rows, classes=classes, **options)


def compare(study: Study, rows: Sequence[int], found: pd.DataFrame) -> pd.DataFrame:
    """Every recipe of `recipes` on `rows`: mAP@0.5 with its interval, and its paired difference to the plain view.

    Columns name, value, ci_low, ci_high, difference, difference_low, difference_high, n. The intervals come from
    one bootstrap over patients, the same draws for both sides of a difference.
    """
    run, patients = study.run, study.patients(rows)
    draws, table, plain = run.bootstrap_draws, [], None
    for name, (method, used) in recipes().items():
        own = matches(study, rows, join(found, method=method, views_used=used, run=run))
        plain = plain or own
        value = evaluate.bootstrap(own, patients, draws=draws, statistics=("mAP50",)).iloc[0]
        change = evaluate.paired_bootstrap(
            own, plain, patients, draws=draws, statistics=("mAP50",)
        ).iloc[0]
        table.append(
            {
                "name": name,
                **value[["value", "ci_low", "ci_high"]],
                "difference": change["value"],
                "difference_low": change["ci_low"],
                "difference_high": change["ci_high"],
                "n": len(rows),
            }
        )
    return pd.DataFrame(table)


def record(study: Study, table: pd.DataFrame, *, model: str) -> pd.DataFrame:
    """Merge rows of `evaluate.bootstrap` (metric, label, value, ...) into the run's results.csv; returns all of it.

    A class's row is named after it, e.g. "AP50 Nodule"; label 0 or "all" stands for all classes.
    """
    names = [
        "" if label in (0, "all") else f" {study.dataset.box_classes[int(label) - 1]}"
        for label in table["label"]
    ]
    named = table.assign(metric=table["metric"] + names).drop(columns="label")
    path = study.run.run_dir / "results.csv"
    return report.update_results(report.result_rows(named, study.run, model=model), path)


def shown_threshold(run: Run) -> float:
    """The score from which boxes are drawn: the best F1 over all classes of section "Thresholds", else 0.5."""
    path = made_by(run, "thresholds.csv", "4 Thresholds")
    table = pd.read_csv(path)
    best = table.loc[
        table["objective"].eq("best F1") & table["label"].eq("all"), "threshold"
    ].item()
    return 0.5 if np.isnan(best) else float(best)


def on_film(
    study: Study, rows: Sequence[int], known: pd.DataFrame, found: pd.DataFrame
) -> tuple[np.ndarray, list[pd.DataFrame], list[pd.DataFrame], list[str]]:
    """What the figures take: the films of `rows`, true and found boxes in their pixels, and a title each."""
    scale = study.cache.scale(rows)
    both = (figures.boxes_by_image(table, rows, scale=scale) for table in (known, found))
    titles = [Path(path).stem for path in study.dataset.manifest["path"].to_numpy()[rows]]
    return np.asarray(study.cache.images[rows]), *both, titles


# -------------------------------------------------------------------- submissions


def targets(study: Study) -> list[Target]:
    """What a submission can be written for: every edition beside this data set, or else the scored images.

    An edition whose mapping names an image that this run trained or chose on is refused (`submission.leak_guard`).
    """
    chosen, dataset = tuple(folds(study)), study.dataset
    if dataset.mapping is None:
        first = chosen[0]
        names = [Path(path).name for path in dataset.manifest["path"].to_numpy()[first.score]]
        mapping = pd.DataFrame({"ID": range(len(names)), "image_id": names})
        return [Target(f"{dataset.name}_{first.name}", dataset, first.score, mapping, (first,))]
    used = np.unique(np.concatenate([np.concatenate([fold.train, fold.select]) for fold in chosen]))
    seen = [Path(path).name for path in dataset.manifest["path"].to_numpy()[used]]
    result = []
    for location in sources.siblings(study.run.location):
        edition = dataset if location.root == dataset.root else datasets.load(location)
        submission.leak_guard(seen, edition.mapping)
        rows = np.flatnonzero((edition.manifest["split"] == "test").to_numpy())
        result.append(Target(location.root.name, edition, rows, edition.mapping, chosen))
    return result


def submission_path(study: Study, target: Target) -> Path:
    """Where the submission of `target` goes; named after the run that made it."""
    return submissions_root() / f"{target.name}_{study.run.run_dir.name}.csv"


def submit(
    study: Study, target: Target, recipe: str
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, tuple[int, int]]]:
    """The submission table of `target`, the boxes it was made from, and each image's (width, height).

    All folds' models look at every image in the views of `recipe`; all their boxes are fused as that many views.
    """
    run = study.run
    method, used = recipes()[recipe]
    looks = [views.VIEWS[number] for number in used]
    images = cache.build(target.dataset, size=run.size, fit="pad")
    parts = []
    for number, fold in enumerate(target.folds):
        found = views.predict(
            load_fold(study, fold), images, target.rows, views=looks, batch_size=run.batch_size
        )
        parts.append(found.assign(view=found["view"] + number * len(looks)))
    together = join(
        pd.concat(parts), method=method, views_used=range(len(looks) * len(parts)), run=run
    )
    names = {row: Path(target.dataset.manifest["path"][row]).name for row in target.rows.tolist()}
    sizes = {row: tuple(images.shapes[row][::-1].tolist()) for row in target.rows.tolist()}
    learnt = truth(study, np.unique(np.concatenate([fold.train for fold in target.folds])))
    prior = submission.class_prior(
        learnt, {row: study.cache.shapes[row][::-1] for row in learnt["image"].unique()}
    )
    table = submission.build(
        together,
        target.mapping,
        names=names,
        classes=study.dataset.box_classes,
        sizes=sizes,
        prior=prior,
    )
    return table, together, {names[row]: sizes[row] for row in sizes}
