"""What the sections of one notebook share, so that each works alone after the opening cells.

`open_study` gives the data (split, audited, cached); trained models and finished tables lie in the run folder
and are read back by name.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from . import augment, cache, datasets, files, models, split, train
from .config import Config

log = logging.getLogger("dlia_utils")


class OutOfTime(RuntimeError):
    """A training met its wall-clock budget; its checkpoints are kept and the same call goes on from them."""


_OPEN: dict[tuple[str, Path], Study] = {}


@dataclass(frozen=True)
class Study:
    """The data of one run: `dataset` carries the train/val/test split, `cache` the decoded images."""

    config: Config
    dataset: datasets.Dataset
    cache: cache.ImageCache

    @property
    def key(self) -> dict[str, str]:
        """What a checkpoint of this run depends on; a resume under another key is refused."""
        return {"config": self.config.key, "split": split.split_hash(self.dataset)}

    def rows(self, name: str) -> np.ndarray:
        """Row numbers (image ids) of a split, "train", "val" or "test"."""
        return np.flatnonzero((self.dataset.manifest["split"] == name).to_numpy())

    def images(self, rows: Sequence[int]) -> torch.Tensor:
        """Float images [n,1,S,S] in [0,1] on the run's device."""
        return self.cache.batch(rows).to(self.config.device)

    def labels(self, rows: Sequence[int]) -> torch.Tensor:
        """Labels [n] int64 on the run's device."""
        return torch.as_tensor(self.dataset.manifest["label"].to_numpy()[rows]).to(self.config.device)

    def patients(self, rows: Sequence[int]) -> np.ndarray:
        return self.dataset.manifest["patient"].to_numpy()[rows]

    def torch_set(self, name: str, *, augmented: bool | augment.A.Compose = False) -> augment.CachedImages:
        """A split as a torch data set; only training images are ever augmented, as usual (True) or by a pipeline."""
        rows = self.rows(name)
        transform = augment.train_transform() if augmented is True else augmented or None
        labels = self.dataset.manifest["label"].to_numpy()[rows]
        images = augment.CachedImages(self.cache, rows, labels, transform=transform, seed=self.config.seed)
        balanced = augmented and self.config.settings.get("balance") == "sampling"
        return augment.Balanced(images, seed=self.config.seed) if balanced else images

    def variant(self, **settings) -> Study:
        """The same images and split under other settings, e.g. `size` and `epochs`; results go to the same run."""
        config = replace(self.config, settings=self.config.settings | settings)
        name = (config.key, config.run_dir)
        if name not in _OPEN:
            decoded = self.cache
            if config.size != decoded.size:
                decoded = cache.build(self.dataset, size=config.size, fit=decoded.fit)
            _OPEN[name] = replace(self, config=config, cache=decoded)
        return _OPEN[name]

    def class_weights(self) -> tuple[float, ...] | None:
        """Weight n / (K n_c) per class of the training split, so that both classes weigh the same in the loss.

        None where the setting `balance` is "sampling": the classes are then drawn equally often instead.
        """
        if self.config.settings.get("balance") == "sampling":
            return None
        counts = np.bincount(self.labels(self.rows("train")).cpu().numpy(), minlength=len(self.dataset.classes))
        return tuple((counts.sum() / (len(counts) * counts)).tolist())


def open_study(config: Config) -> Study:
    """Find, check, split and decode the data of a run; a second call returns the same object.

    The split is drawn once per run folder, saved as `split.json` with its hash, and read back on resume. Without the
    setting `test_share` the official test split stays and val is drawn anew. With it an official split of all images
    stays (val is drawn where there is none), else all three are drawn, near-duplicates kept together. At most
    `unusable_share` of the files may be left out when they do not decode; the log names them.
    Errors: `datasets.BadData` naming unreadable files, before anything is trained.
    """
    name = (config.key, config.run_dir)
    if name not in _OPEN:
        dataset = datasets.load(config.location)
        problems = datasets.check(dataset)
        if len(problems):
            raise datasets.BadData(datasets.problem_text(problems))
        official = set(dataset.manifest["split"])
        anew = "test_share" in config.settings and ("" in official or "test" not in official)
        if anew:
            dataset = replace(dataset, manifest=dataset.manifest.assign(split=""))
        if config.per_class:
            dataset = split.subset(dataset, per_class=config.per_class, seed=config.seed)
        dataset, decoded = _decode(dataset, config)
        if "test_share" in config.settings:
            dataset = split.with_looks(dataset, decoded.images)
        saved = config.run_dir / "split.json"
        if saved.exists():
            dataset = split.load(dataset, saved)
        elif anew:
            dataset = split.drawn(
                dataset, val_share=config.val_share, test_share=config.test_share, seed=config.seed
            )
        elif "test_share" not in config.settings or "val" not in official:
            dataset = split.grouped(dataset, val_share=config.val_share, seed=config.seed)
        _OPEN[name] = Study(config, dataset, decoded)
        if not saved.exists():
            # Only now: a split that names a file which does not decode would outlive the file's removal.
            split.save(dataset, saved)
    return _OPEN[name]


def _decode(dataset: datasets.Dataset, config: Config) -> tuple[datasets.Dataset, cache.ImageCache]:
    """The decoded images, and the data set without the few files that do not decode, if the settings allow any."""
    options = {"size": config.size, "fit": config.settings.get("fit", "squash")}
    try:
        return dataset, cache.build(dataset, **options)
    except datasets.BadData as error:
        lost = getattr(error, "problems", pd.DataFrame({"path": []}))["path"]
        if not 0 < len(lost) <= config.settings.get("unusable_share", 0) * len(dataset.manifest):
            raise
        log.warning("left out: %s", error)
    dataset = datasets.take(dataset, np.flatnonzero(~dataset.manifest["path"].isin(lost)))
    return dataset, cache.build(dataset, **options)


def build_model(config: Config) -> models.PixelModel:
    """A fresh MobileNetV2 of the profile's width, on the run's device, from the run's starting weights."""
    weights = starting_weights(config)
    model = models.mobilenet_v2(width=config.width, stages=config.stages, weights=weights, seed=config.seed)
    return model.to(config.device)


def starting_weights(config: Config) -> str | None:
    """"imagenet" or None for `models.mobilenet_v2`; decided once per run, said in the log, kept for result rows.

    Without internet and without a file in DLIA_WEIGHTS the run goes on from random weights, and says so.
    """
    record = config.run_dir / "weights.txt"
    if not record.exists():
        files.write_text(_choose_weights(config), record)
        log.info("starting weights: %s", record.read_text(encoding="utf-8"))
    chosen = record.read_text(encoding="utf-8")
    if chosen.startswith("file") and not os.environ.get("DLIA_WEIGHTS"):
        raise FileNotFoundError(f"this run started from {chosen}: set DLIA_WEIGHTS to it, or use another RUN_NAME")
    return None if chosen == "random" else "imagenet"


def weights_label(config: Config) -> str:
    """What result rows say about the starting weights: imagenet, file NAME, random, or the setting `weights_text`."""
    if "weights_text" in config.settings:
        return config.weights_text
    starting_weights(config)
    return (config.run_dir / "weights.txt").read_text(encoding="utf-8")


def _choose_weights(config: Config) -> str:
    if not config.pretrained:
        return "random"
    try:
        models.mobilenet_v2(weights="imagenet")
    except RuntimeError as error:
        log.warning("training starts from RANDOM weights and will be weaker: %s", error)
        return "random"
    return f"file {Path(os.environ['DLIA_WEIGHTS']).name}" if os.environ.get("DLIA_WEIGHTS") else "imagenet"


def train_model(
    study: Study, name: str, objective: Callable, *, start: str | None = None, spectral: str | None = None, **overrides
) -> train.FitResult:
    """Train a classifier of this run under `name` with the profile's recipe; a finished one is read back at once.

    `start` names a trained model of this run to go on from, instead of the run's starting weights. `spectral`
    ("kernel" or "operator", see `models.spectral_normalize`) bounds every layer while training; `load_models` gives
    plain layers back. `overrides` go to `train.fit`, e.g. monitor= or val_metric=. Errors: `OutOfTime`.
    """
    model = load_models(study, [start])[start] if start else build_model(study.config)
    if spectral:
        shape = (1, study.config.size, study.config.size) if spectral == "operator" else None
        model = models.spectral_normalize(model, kind=spectral, input_shape=shape)
    options = {"schedule": study.config.schedule, "monitor": "val_accuracy"} | overrides
    return fit_model(
        study, name, model, objective, study.torch_set("train", augmented=True), study.torch_set("val"), **options
    )


def train_head(
    study: Study, name: str, model: models.PixelModel, objective: Callable, *, augmented: bool = False, **overrides
) -> train.FitResult:
    """Train only the head of `model` (see `models.with_head`) under `name`; the body's features are computed once.

    With `augmented` the images pass through the body every time instead: for augmentation, and for objectives that
    attack the image. `overrides` go to `train.fit`. The whole model is kept; a finished one is read back at once.
    """
    done = study.config.run_dir / name / "best.pt"
    options = {"schedule": study.config.schedule, "monitor": "val_auc"} | overrides
    if augmented:
        return fit_model(
            study, name, model, objective, study.torch_set("train", augmented=True), study.torch_set("val"), **options
        )
    model = model.to(study.config.device)
    sets = [
        models.cached_features(model, study.torch_set(part), batch_size=study.config.batch_size)
        for part in ("train", "val")
    ]
    fitted = fit_model(study, f"{name}_head", model.head, objective, *sets, **options | {"num_workers": 0})
    models.save(model, done, meta={"epoch": fitted.best_epoch})
    return fitted


def fit_model(
    study: Study,
    name: str,
    model: torch.nn.Module,
    objective: Callable,
    train_set: torch.utils.data.Dataset,
    val_set: torch.utils.data.Dataset | None,
    **overrides,
) -> train.FitResult:
    """`train.fit` in the run's folder `name`, with the profile's epochs, batch size, rate and budget.

    Errors: `OutOfTime` when the wall-clock budget ends first: no result of a half-trained model can pass for one
    of the whole training.
    """
    config = study.config
    options = {
        "epochs": config.epochs, "batch_size": config.batch_size, "lr": config.lr, "patience": config.patience,
        "max_minutes": config.max_minutes, "num_workers": config.num_workers, "seed": config.seed,
        "resume": config.resume, "config": study.key | {"model": name},
    } | overrides  # fmt: skip
    log_file = config.run_dir / name / "metrics.csv"
    epochs_before = len(pd.read_csv(log_file)) if log_file.exists() else 0
    fitted = train.fit(model, objective, train_set, val_set, run_dir=log_file.parent, **options)
    if len(fitted.history) != epochs_before:
        # Tables of an older state of this model would be read back as if they were its own.
        own = name.removesuffix("_head")
        for table in (config.run_dir / "tables").glob(f"*_{own}.csv"):
            table.unlink()
        shutil.rmtree(suite_folder(config, own), ignore_errors=True)
    if fitted.status == "interrupted":
        raise OutOfTime(
            f"{name} stopped after {len(fitted.history)} of {options['epochs']} epochs, which are kept: the next "
            f"would not end within max_minutes = {options['max_minutes']:g}. Run again (RESUME = True) to go on."
        )
    return fitted


def load_models(study: Study, names: Sequence[str]) -> dict[str, models.PixelModel]:
    """The trained models of this run by name, in eval mode on the run's device.

    Errors: a model that was not trained yet, naming the section to run first.
    """
    config, loaded = study.config, {}
    for name in names:
        path = config.run_dir / name / "best.pt"
        if not path.exists():
            raise FileNotFoundError(f"model {name!r} is not in {path.parent}: run the section 'Training' first")
        loaded[name] = models.load(path).to(config.device)
    return loaded


def trained(study: Study, names: Sequence[str]) -> list[str]:
    """Those of `names` that this run has a trained model of: a model whose weights were not to be had is left out."""
    return [name for name in names if (study.config.run_dir / name / "best.pt").exists()]


def stored(study: Study, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Read table `name` of this run, or compute it and keep it: a cut-off run goes on where it stopped.

    A table about one model must end in `_MODEL`: training that model further then removes it.
    """
    path = study.config.run_dir / "tables" / f"{name}.csv"
    if not (path.exists() and study.config.resume):
        files.write_csv(compute(), path)
    return pd.read_csv(path)


def suite_options(config: Config) -> dict:
    """The options of `attacks.evaluate.robust` that the settings hold: budgets, every film attacked by everything."""
    return {
        "steps": config.pgd_steps, "restarts": config.pgd_restarts, "budgets": config.budgets, "at": config.dear,
        "batch_size": config.attack_batch, "seed": config.seed, "early_drop": False,
    }  # fmt: skip


def suite_folder(config: Config, name: str) -> Path:
    """Where `attacks.evaluate.robust` keeps what it has finished of model `name`; training it further clears it."""
    return config.run_dir / "suite" / name


def test_opened(study: Study, purpose: str) -> pd.DataFrame:
    """Log that the test split is read, and why; returns the log so a reader sees every opening."""
    path = study.config.run_dir / "test_log.csv"
    entry = pd.DataFrame([{"time": time.strftime("%Y-%m-%d %H:%M:%S"), "purpose": purpose, **study.key}])
    log_so_far = pd.concat([pd.read_csv(path), entry]) if path.exists() else entry
    files.write_csv(log_so_far, path)
    return log_so_far.reset_index(drop=True)


def attack_subset(study: Study, per_class: int) -> np.ndarray:
    """A fixed, class-balanced sample of test rows for attacks too dear for the whole split."""
    rng = np.random.default_rng(study.config.seed)
    test, labels = study.rows("test"), study.labels(study.rows("test")).cpu().numpy()
    drawn = [rng.permutation(test[labels == c])[:per_class] for c in range(len(study.dataset.classes))]
    return np.sort(np.concatenate(drawn))
