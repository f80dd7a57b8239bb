"""What the sections of one notebook share, so that each works alone after the opening cells.

`open_study` gives the data (split, audited, cached); trained models and finished tables lie in the run folder
and are read back by name. Each is kept with what it depends on (key.json): what other settings made is never
read back, and what a run beside this one made from the same things is taken from there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch.utils.data import Dataset

from . import files, models, train
from .data import augment, cache, datasets, sources, split
from .data.tables import BadData
from .device import fingerprint
from .run import Run, digest, for_dataset

log = logging.getLogger("dlia_utils")

FREE = (
    "max_minutes",
    "num_workers",
    "resume",
    "progress",
    "on_epoch",
)  # they change no weight of a training
LINKED = (".pt", ".npz")  # always replaced, never written into: a second name costs no disk


class OutOfTime(RuntimeError):
    """A training met the budget `max_minutes`; its checkpoints are kept and the same call goes on from them."""

    def __init__(self, name: str, *, done: int, epochs: int, limit: float) -> None:
        more = f"{4 * limit:g}"
        super().__init__(
            f"{name} stopped after {done} of {epochs} epochs: the next would not end within max_minutes = {limit:g}. "
            "What is done is kept: run again to go on from there (the same command, or Run All). For more time: --set "
            f'max_minutes={more} on the command line, CHANGES = {{"max_minutes": {more}}} in the notebook; None is no limit.'
        )


_OPEN: dict[tuple[str, Path], Study] = {}


@dataclass(frozen=True)
class Study:
    """The data of one run: `dataset` carries the train/val/test split, `cache` the decoded images."""

    run: Run
    dataset: datasets.Dataset
    cache: cache.ImageCache

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        """The data that whatever is made in this run depends on."""
        # Lengths and not times of the files: a copy of the data is the same data.
        return {
            "data": self.run.data_name,
            "files": digest(datasets.lengths(self.dataset)),
            "split": split.split_hash(self.dataset),
            "size": self.cache.size,
            "fit": self.cache.fit,
        }

    def rows(self, name: str) -> np.ndarray:
        """Row numbers (image ids) of a split, "train", "val" or "test"."""
        return np.flatnonzero((self.dataset.manifest["split"] == name).to_numpy())

    def images(self, rows: Sequence[int]) -> torch.Tensor:
        """Float images [n,1,S,S] in [0,1] on the run's device."""
        return self.cache.batch(rows).to(self.run.device)

    def labels(self, rows: Sequence[int]) -> torch.Tensor:
        """Labels [n] int64 on the run's device."""
        return torch.as_tensor(self.dataset.manifest["label"].to_numpy()[rows]).to(self.run.device)

    def patients(self, rows: Sequence[int]) -> np.ndarray:
        return self.dataset.manifest["patient"].to_numpy()[rows]

    def torch_set(
        self, name: str, *, augmented: bool | augment.A.Compose = False
    ) -> augment.CachedImages:
        """A split as a torch data set; only training images are ever augmented, as usual (True) or by a pipeline."""
        rows = self.rows(name)
        transform = augment.train_transform() if augmented is True else augmented or None
        labels = self.dataset.manifest["label"].to_numpy()[rows]
        images = augment.CachedImages(
            self.cache, rows, labels, transform=transform, seed=self.run.seed
        )
        balanced = augmented and self.run.settings.get("balance") == "sampling"
        return augment.Balanced(images, seed=self.run.seed) if balanced else images

    def variant(self, **settings) -> Study:
        """The same images and split under other settings, e.g. `size` and `epochs`; results go to the same run."""
        run = self.run.variant(**settings)
        name = (run.key, run.run_dir)
        if name not in _OPEN:
            decoded = self.cache
            if run.size != decoded.size:
                decoded = cache.build(self.dataset, size=run.size, fit=decoded.fit)
            _OPEN[name] = replace(self, run=run, cache=decoded)
        return _OPEN[name]

    def class_weights(self) -> tuple[float, ...] | None:
        """Weight n / (K n_c) per class of the training split, so that both classes weigh the same in the loss.

        None where the setting `balance` is "sampling": the classes are then drawn equally often instead.
        """
        if self.run.settings.get("balance") == "sampling":
            return None
        counts = np.bincount(
            self.labels(self.rows("train")).cpu().numpy(), minlength=len(self.dataset.classes)
        )
        return tuple((counts.sum() / (len(counts) * counts)).tolist())


def of(dataset: datasets.Dataset, *, folder: str | Path | None = None, **changes: Any) -> Study:
    """The study of a data set of your own, outside any notebook: checked, split by patient, decoded.

    `changes` are settings of `run.BASIC`, such as size=96, epochs=5; trainings and tables go to `folder` (default: a
    folder below runs/own/). Errors: those of `run.for_dataset` and `open_study`.
    """
    return open_study(for_dataset(dataset, folder=folder, **changes), dataset=dataset)


def open_study(run: Run, *, dataset: datasets.Dataset | None = None) -> Study:
    """Find, check, split and decode the data of a run; a second call decodes nothing again.

    The split is drawn once per run folder, saved as `split.json` with its hash, and read back on resume. Without the
    setting `test_share` the official test split stays and val is drawn anew. With it an official split of all images
    stays (val is drawn where there is none), else all three are drawn, near-duplicates kept together. At most
    `unusable_share` of the files may be left out when they do not decode; the log names them. Models of the
    reader's own (`run.own`) are tried on two images.
    `dataset` takes the place of the one that the run names. Errors: `BadData` naming unreadable files,
    ValueError for a model of one's own that cannot take part;
    before anything is trained.
    """
    name = (run.key, run.run_dir)
    if name not in _OPEN:
        dataset = datasets.load(run.location) if dataset is None else dataset
        problems = datasets.check(dataset)
        if len(problems):
            raise BadData(datasets.problem_text(problems))
        official, drawn = set(dataset.manifest["split"]), bool(run.settings.get("test_share"))
        anew = drawn and ("" in official or "test" not in official)
        if anew and official != {""} and run.location.kind == "folder":
            log.warning(
                "%s has no test split: train, val and test are all drawn anew", dataset.name
            )
        if anew:
            dataset = replace(dataset, manifest=dataset.manifest.assign(split=""))
        if run.settings.get("per_class"):
            dataset = split.subset(dataset, per_class=run.per_class, seed=run.seed)
        dataset, decoded = _decode(dataset, run)
        if drawn:
            dataset = split.with_looks(dataset, decoded.images)
        saved = run.run_dir / "split.json"
        if saved.exists():
            dataset = split.load(dataset, saved)
        elif anew:
            dataset = split.drawn(
                dataset, val_share=run.val_share, test_share=run.test_share, seed=run.seed
            )
        elif not drawn or "val" not in official:
            dataset = split.grouped(dataset, val_share=run.val_share, seed=run.seed)
        _OPEN[name] = Study(run, dataset, decoded)
    study = _OPEN[name]
    if (
        study.run is not run
    ):  # the cells were run again, perhaps with another RESUME or a model of one's own
        study = _OPEN[name] = replace(study, run=run)
    if not (run.run_dir / "split.json").exists():
        # Only now: a split that names a file which does not decode would outlive the file's removal.
        split.save(study.dataset, run.run_dir / "split.json")
    for own in run.own:
        _check_own(study, own)
    return study


def _decode(dataset: datasets.Dataset, run: Run) -> tuple[datasets.Dataset, cache.ImageCache]:
    """The decoded images, and the data set without the few files that do not decode, if the settings allow any."""
    options = {"size": run.size, "fit": run.settings.get("fit", "squash")}
    try:
        return dataset, cache.build(dataset, **options)
    except BadData as error:
        lost = getattr(error, "problems", pd.DataFrame({"path": []}))["path"]
        if not 0 < len(lost) <= run.settings.get("unusable_share", 0) * len(dataset.manifest):
            raise
        log.warning("left out: %s", error)
    dataset = datasets.take(dataset, np.flatnonzero(~dataset.manifest["path"].isin(lost)))
    return dataset, cache.build(dataset, **options)


def _check_own(study: Study, name: str) -> None:
    """Refuse a model of the reader's own that cannot take part, before anything else is trained."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(
            f"run.own[{name!r}]: its name is also that of a folder; use letters, digits, _ . -"
        )
    images = study.images(study.rows("train")[:2])
    try:
        models.check_classifier(
            _own_model(study.run, name), images, classes=len(study.dataset.classes)
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"run.own[{name!r}]: {error}") from error


def _own_model(run: Run, name: str) -> torch.nn.Module:
    """The reader's model `name`: the trained one, or a new one from the function that builds it."""
    own = run.own[name]
    if isinstance(own, torch.nn.Module):
        return own.to(run.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)  # the same start whenever it is built
        return own().to(run.device)


# ------------------------------------------------------------------------------- what belongs to which settings


def work_folder(run: Run, name: str, depends: Mapping[str, Any]) -> Path:
    """The folder `name` of this run for work that depends on `depends`, which is written into its key.json.

    What is there already and depends on something else is put aside (as NAME.<time>.old). Where nothing is
    there, the same work of another run of this notebook is taken over, finished or not: changing one setting
    repeats only what it touches. A run begun with RESUME = False takes nothing.
    """
    folder, wanted = (
        run.run_dir / name,
        json.loads(json.dumps(depends, sort_keys=True, default=str)),
    )
    run.run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(
        run.run_dir / ".keys.lock"
    ):  # the processes of one training ask at the same moment
        kept = files.read_json(folder / "key.json")
        if kept == wanted:
            return folder
        if kept is not None or (folder.is_dir() and any(folder.iterdir())):
            old = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}.old")
            folder.rename(old)
            what = _changes(kept or {}, wanted)
            log.warning("%s was made under other settings (%s): put aside, made anew", name, what)
        for other in [] if run.fresh else _siblings(run, f"{name}/key.json"):
            if files.read_json(other) == wanted:
                _take_over(other.parent, folder)
                place = other.parents[len(Path(name).parts)].name
                log.info("%s is taken over from the run %s", name, place)
                return folder
        files.write_json(wanted, folder / "key.json")
        return folder


def _changes(kept: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    """Which entries of two keys differ, by their dotted names."""
    found = []
    for name in sorted({*kept, *wanted}):
        old, new = kept.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [_changes(old, new, f"{prefix}{name}.")] if old != new else []
        elif old != new:
            short = [text if len(text := str(value)) < 40 else "..." for value in (old, new)]
            found.append(f"{prefix}{name}: {short[0]} -> {short[1]}")
    return "; ".join(found)


def _siblings(run: Run, pattern: str) -> list[Path]:
    """Files of that name in the other runs of this notebook, the newest first; runs put aside are left out.

    On Kaggle also in the runs of earlier sessions that are attached as inputs.
    """
    attached = [folder for mount in sources.mounts() for folder in (mount / "runs", mount)]
    places = [run.run_dir.parent, *(folder / run.notebook for folder in attached)]
    found = [path for place in places for path in place.glob(f"*/{pattern}")]
    others = [
        path for path in found if not path.is_relative_to(run.run_dir) and ".old" not in str(path)
    ]
    return sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)


def _take_over(source: Path, target: Path) -> None:
    """Copy a folder of another run; large files, which are only ever replaced, get a second name instead."""

    def copy(old: str, new: str) -> None:
        if old.endswith(LINKED):
            try:
                return os.link(old, new)
            except OSError:  # another disk, or one that knows no links
                pass
        shutil.copyfile(old, new)

    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        files.copy_tree(
            source, scratch, copy_function=copy, ignore=shutil.ignore_patterns(".*", "*.lock")
        )
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def described(value: Any) -> Any:
    """What a data set, a pipeline or a function is made of, as JSON: equal for what gives the same training."""
    if isinstance(value, cache.ImageCache):
        return {"size": value.size, "fit": value.fit}
    if isinstance(value, np.ndarray) and value.dtype.kind in "iub":
        return hashlib.sha1(value.tobytes(), usedforsecurity=False).hexdigest()[:12]
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return list(
            value.shape
        )  # computed numbers differ in their last digit from machine to machine
    if isinstance(value, Mapping):
        return {str(name): described(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(part) for part in value]
    if isinstance(value, Dataset) or type(value).__module__.startswith("dlia_utils"):
        parts = {
            name: described(part)
            for name, part in vars(value).items()
            if name not in ("epoch", "order")
        }
        return {"kind": type(value).__name__, **parts}
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def weights_key(run: Run, name: str) -> str:
    """Which weights the trained model `name` has: a hash of them; "" where there is none."""
    path = run.run_dir / name / "best.pt"
    return _weights_hash(path, path.stat().st_mtime_ns) if path.exists() else ""


@functools.lru_cache(maxsize=256)
def _weights_hash(path: Path, stamp: int) -> str:
    # Not of the file: two files of the same weights differ in their bytes.
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    hashed = hashlib.sha1(digest(content["recipe"]).encode(), usedforsecurity=False)
    for name, value in content["state_dict"].items():
        hashed.update(name.encode() + value.contiguous().numpy().tobytes())
    return hashed.hexdigest()[:12]


# ------------------------------------------------------------------------------------------- models


def build_model(run: Run, *, classes: int = 2) -> models.PixelModel:
    """A fresh MobileNetV2 of the profile's width, on the run's device, from the run's starting weights."""
    start = {"weights": starting_weights(run), "seed": run.seed, "num_classes": classes}
    return models.mobilenet_v2(width=run.width, stages=run.stages, **start).to(run.device)


def starting_weights(run: Run) -> str | None:
    """ "imagenet" or None for `models.mobilenet_v2`; decided once per run, said in the log, kept for result rows.

    Without internet and without a file in DLIA_WEIGHTS the run goes on from random weights, and says so.
    """
    record = run.run_dir / "weights.txt"
    if not record.exists():
        files.write_text(_choose_weights(run), record)
        log.info("starting weights: %s", record.read_text(encoding="utf-8"))
    chosen = record.read_text(encoding="utf-8")
    if chosen.startswith("file") and not os.environ.get("DLIA_WEIGHTS"):
        raise FileNotFoundError(
            f"this run started from {chosen}: set DLIA_WEIGHTS to it, or use another RUN_NAME"
        )
    return None if chosen == "random" else "imagenet"


def weights_label(run: Run, model: str = "") -> str:
    """What result rows say about a model's starting weights: imagenet, file NAME, random, ...

    What weights.txt in the model's folder says, else that of the run; without either nothing was loaded.
    """
    for folder in (run.run_dir / model, run.run_dir):
        if (folder / "weights.txt").exists():
            return (folder / "weights.txt").read_text(encoding="utf-8")
    return "random"


def _choose_weights(run: Run) -> str:
    if not run.pretrained:
        return "random"
    try:
        models.mobilenet_v2(weights="imagenet")
    except RuntimeError as error:
        log.warning("training starts from RANDOM weights and will be weaker: %s", error)
        return "random"
    return (
        f"file {Path(os.environ['DLIA_WEIGHTS']).name}"
        if os.environ.get("DLIA_WEIGHTS")
        else "imagenet"
    )


def train_model(
    study: Study,
    name: str,
    objective: Callable,
    *,
    start: str | None = None,
    spectral: str | None = None,
    train_set: Dataset | None = None,
    **overrides,
) -> train.FitResult:
    """Train a classifier of this run under `name` with the profile's recipe; a finished one is read back at once.

    The network is MobileNetV2, or the reader's own where `run.own` has that name (a trained one is kept as it
    is). `start` names a trained model of this run to go on from. `spectral` ("kernel" or "operator", see
    `models.spectral_normalize`) bounds every layer while training; `load_models` gives plain layers back.
    `train_set` takes the place of the augmented training split. `overrides` go to `train.fit`, e.g. monitor= or val_metric=. Errors: `OutOfTime`.
    """
    run = study.run
    if isinstance(run.own.get(name), torch.nn.Module):
        return _keep_trained(run, name)
    if name in run.own:
        model = _own_model(run, name)
    else:
        classes = len(study.dataset.classes)
        model = load_models(study, [start])[start] if start else build_model(run, classes=classes)
    if spectral:
        shape = (1, run.size, run.size) if spectral == "operator" else None
        model = models.spectral_normalize(model, kind=spectral, input_shape=shape)
    train_set = study.torch_set("train", augmented=True) if train_set is None else train_set
    options = {
        "schedule": run.settings.get("schedule", "constant"),
        "monitor": "val_accuracy",
    } | overrides
    fitted = fit_model(study, name, model, objective, train_set, study.torch_set("val"), **options)
    if name in run.own:
        files.write_text("the reader's own", run.run_dir / name / "weights.txt")
    return fitted


def _keep_trained(run: Run, name: str) -> train.FitResult:
    """Put a model that the reader trained elsewhere into the run folder, so that tables know its weights."""
    folder = work_folder(run, name, {"own": fingerprint(run.own[name])})
    files.write_text("the reader's own", folder / "weights.txt")
    models.save(run.own[name], folder / "best.pt", meta={"epoch": 0})
    return train.FitResult(
        pd.DataFrame(columns=[*train.MEASURED, "seconds"]), 0, float("nan"), "done", 0.0
    )


def train_head(
    study: Study,
    name: str,
    model: models.PixelModel,
    objective: Callable,
    *,
    augmented: bool = False,
    **overrides,
) -> train.FitResult:
    """Train only the head of `model` (see `models.with_head`) under `name`; the body's features are computed once.

    With `augmented` the images pass through the body every time instead: for augmentation, and for objectives that
    attack the image. `overrides` go to `train.fit`. The whole model is kept; a finished one is read back at once.
    """
    run = study.run
    options = {"schedule": run.schedule, "monitor": "val_auc"} | overrides
    if augmented:
        return fit_model(
            study,
            name,
            model,
            objective,
            study.torch_set("train", augmented=True),
            study.torch_set("val"),
            **options,
        )
    model = model.to(run.device)
    body = fingerprint(model)
    sets = [
        models.cached_features(model, study.torch_set(part), batch_size=run.batch_size)
        for part in ("train", "val")
    ]
    options |= {"num_workers": 0, "depends": {"model": body}}
    fitted = fit_model(study, f"{name}_head", model.head, objective, *sets, **options)
    models.save(model, run.run_dir / name / "best.pt", meta={"epoch": fitted.best_epoch})
    return fitted


def fit_model(
    study: Study,
    name: str,
    model: torch.nn.Module,
    objective: Callable,
    train_set: Dataset,
    val_set: Dataset | None,
    *,
    depends: Mapping[str, Any] | None = None,
    **overrides,
) -> train.FitResult:
    """`train.fit` in the run's folder `name`, with the profile's epochs, batch size, rate and budget.

    A training depends on the weights it starts from, the objective, the images it learns and is chosen on, its
    options, and `depends`; it is read back, or taken over from another run, only where all are the same.
    Errors: `OutOfTime` when the budget `max_minutes` ends first: no result of a half-trained model can pass for
    one of the whole training.
    """
    run = study.run
    options = {
        "epochs": run.epochs,
        "batch_size": run.batch_size,
        "lr": run.lr,
        "patience": run.patience,
        "max_minutes": run.max_minutes,
        "num_workers": run.num_workers,
        "seed": run.seed,
    } | overrides
    key = {
        **study.key,
        "start": _start_key(model),
        "train": described(train_set),
        "val": described(val_set),
        "objective": getattr(objective, "settings", described(objective)),
        "depends": dict(depends or {}),
        "options": {name: described(value) for name, value in options.items() if name not in FREE},
    }
    folder = work_folder(run, name, key)
    fitted = train.fit(
        model,
        objective,
        train_set,
        val_set,
        run_dir=folder,
        resume=bool(run.resume),
        config={"key": digest(key)},
        **options,
    )
    if fitted.status == "interrupted":
        done = {"done": len(fitted.history), "epochs": options["epochs"]}
        raise OutOfTime(name, limit=options["max_minutes"], **done)
    return fitted


def _start_key(model: torch.nn.Module) -> dict[str, Any]:
    """The network as a training finds it: weights, architecture, and which of the weights may move."""
    made = getattr(model, "recipe", None) or repr(model)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {"weights": fingerprint(model), "network": digest(made), "learning": digest(learning)}


def load_models(study: Study, names: Sequence[str]) -> dict[str, models.PixelModel]:
    """The trained models of this run by name, in eval mode on the run's device.

    Errors: a model that was not trained yet, naming the section that trains it.
    """
    run, loaded = study.run, {}
    for name in names:
        path, own = run.run_dir / name / "best.pt", run.own.get(name)
        if not path.exists():
            raise FileNotFoundError(
                f"model {name!r} is not in {run.run_dir.parent.name}/{run.run_dir.name}: {_where(run.trains)}"
            )
        if isinstance(own, torch.nn.Module):
            loaded[name] = own.to(run.device).eval()
        else:
            build = functools.partial(_own_model, run, name) if own else None
            loaded[name] = models.load(path, build).to(run.device)
    return loaded


def _where(section: str) -> str:
    return (
        f"run the section '{section}' first; in a notebook of your own, copy that section as well"
    )


def trained(study: Study, names: Sequence[str]) -> list[str]:
    """Those of `names` that this run has a trained model of: a model whose weights were not to be had is left out."""
    return [name for name in names if (study.run.run_dir / name / "best.pt").exists()]


# ------------------------------------------------------------------------------------------- tables


def stored(
    study: Study,
    name: str,
    compute: Callable[[], pd.DataFrame] | None = None,
    *,
    model: str | Sequence[str] = (),
    uses: Sequence[str] | None = None,
    section: str = "",
) -> pd.DataFrame:
    """Read table `name` of this run, or compute it and keep it: a cut-off run goes on where it stopped.

    A table depends on the data and split, on the weights of `model` (one name or several) and on the settings
    that `uses` names (None: on all of them); what depended on others is computed again, and what another run of
    the notebook computed from the same is taken over. Without `compute` the table must be there: `section` is
    then the one that makes it.
    """
    run, path = study.run, study.run.run_dir / "tables" / f"{name}.csv"
    record = path.with_suffix(".json")
    names = [model] if isinstance(model, str) else list(model)
    settings = run.settings if uses is None else run.pick(*uses)
    key = {**study.key, "models": {one: weights_key(run, one) for one in names}}
    if compute is None:
        kept = files.read_json(record) or {}
        if path.exists() and all(kept.get(name) == key[name] for name in ("models", "split")):
            return pd.read_csv(path)
        raise FileNotFoundError(
            f"table {name} is not in {run.run_dir.parent.name}/{run.run_dir.name}: {_where(section)}"
        )
    key = json.loads(json.dumps(key | {"settings": settings}, default=str))
    if not (run.resume and path.exists() and files.read_json(record) == key):
        same = (
            []
            if run.fresh
            else [
                other
                for other in _siblings(run, f"tables/{record.name}")
                if files.read_json(other) == key
            ]
        )
        table = pd.read_csv(same[0].with_suffix(".csv")) if same else compute()
        record.unlink(
            missing_ok=True
        )  # between the two writes the table has no key, and counts as none
        files.write_csv(table, path)
        files.write_json(key, record)
    return pd.read_csv(path)


def made_by(run: Run, name: str, section: str) -> Path:
    """The file `name` of this run, which `section` of the notebook writes.

    Errors: FileNotFoundError that names the section, where it has not been run.
    """
    path = run.run_dir / name
    if not path.exists():
        raise FileNotFoundError(
            f"{name} is not in {run.run_dir.parent.name}/{run.run_dir.name}: {_where(section)}"
        )
    return path


SUITE_USES = (
    "attacks",
    "eps_grid",
    "pgd_steps",
    "pgd_restarts",
    "budgets",
    "expensive",
    "attack_batch",
    "seed",
)


def suite_options(run: Run) -> dict:
    """The options of `attacks.evaluate.robust` that the settings hold: every image attacked by everything."""
    chosen = {
        name: {k: v for k, v in getattr(run, name).items() if k in run.attacks}
        for name in ("budgets", "expensive")
    }
    return {
        "attacks": run.attacks,
        "steps": run.pgd_steps,
        "restarts": run.pgd_restarts,
        "budgets": chosen["budgets"],
        "at": chosen["expensive"],
        "batch_size": run.attack_batch,
        "seed": run.seed,
        "early_drop": False,
    }


def suite_folder(study: Study, name: str) -> Path:
    """Where `attacks.evaluate.robust` keeps what it has finished of model `name`, as it is trained now."""
    weights = weights_key(study.run, name)
    key = {**study.key, "weights": weights, "seed": study.run.seed, "batch": study.run.attack_batch}
    return work_folder(study.run, f"suite/{name}", key)


def test_opened(study: Study, purpose: str) -> pd.DataFrame:
    """Log that the test split is read, and why; returns the log so a reader sees every opening."""
    path = study.run.run_dir / "test_log.csv"
    about = {"config": study.run.key, "split": study.key["split"]}
    entry = pd.DataFrame(
        [{"time": time.strftime("%Y-%m-%d %H:%M:%S"), "purpose": purpose, **about}]
    )
    log_so_far = pd.concat([pd.read_csv(path), entry]) if path.exists() else entry
    files.write_csv(log_so_far, path)
    return log_so_far.reset_index(drop=True)


def attack_subset(study: Study, per_class: int) -> np.ndarray:
    """A fixed, class-balanced sample of test rows for attacks too expensive for the whole split."""
    rng = np.random.default_rng(study.run.seed)
    test, labels = study.rows("test"), study.labels(study.rows("test")).cpu().numpy()
    drawn = [
        rng.permutation(test[labels == c])[:per_class] for c in range(len(study.dataset.classes))
    ]
    return np.sort(np.concatenate(drawn))
