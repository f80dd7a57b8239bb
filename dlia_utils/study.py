"""What the sections of one notebook share, so that each works alone after the opening cells.

Trained models and tables lie in the run folder with what they depend on (key.json): what other
settings made is never read back, what another run made from the same is taken from there.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import math
import os
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

from . import files, metrics, models, train
from .data import augment, cache, datasets, sources, split, tables
from .device import fingerprint
from .run import FORMAT, Run, differences, digest, for_dataset

log = logging.getLogger("dlia_utils")

FREE = "max_minutes num_workers resume progress on_epoch".split()  # they change no weight
LINKED = (".pt", ".npz")  # always replaced, never written into: a second name costs no disk
OWN = "the reader's own"
PASSING = ("epoch", "order", "device", "pixels")  # of a data set, but not what it is


class AlreadyOpened(RuntimeError):
    """The test split was opened for this purpose before."""


@dataclass(frozen=True)
class Study:
    """The data of a run: `dataset` carries the train/val/test split, `cache` the decoded images."""

    run: Run
    dataset: datasets.Dataset
    cache: cache.ImageCache

    @functools.cached_property
    def key(self) -> dict[str, Any]:
        """The data that whatever is made in this run depends on; copied files are the same."""
        files = digest(datasets.lengths(self.dataset))
        known = dict(format=FORMAT, data=self.run.data_name, files=files, size=self.cache.size)
        return known | {"fit": self.cache.fit, "split": split.split_hash(self.dataset)}

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

    def torch_set(self, name: str, *, augmented: bool | augment.A.Compose = False) -> Dataset:
        """A split as a torch data set, its images augmented as usual (True) or by a pipeline."""
        rows, seed = self.rows(name), self.run.seed
        transform = augment.train_transform() if augmented is True else augmented or None
        labels = self.dataset.manifest["label"].to_numpy()[rows]
        options = dict(balanced=bool(augmented) and self.run.balance == "sampling", seed=seed)
        options["device"] = "cuda" if augmented is True and self.run.device == "cuda" else ""
        return augment.CachedImages(self.cache, rows, labels, transform=transform, **options)

    def variant(self, **settings) -> Study:
        """The same images, split and run folder under other settings, e.g. `size` and `epochs`."""
        run, images = self.run.variant(**settings), self.cache
        if run.key not in run.opened:
            if run.size != images.size:
                images = cache.build(self.dataset, size=run.size, fit=images.fit)
            run.opened[run.key] = replace(self, run=run, cache=images)
        return run.opened[run.key]

    def class_weights(self) -> tuple[float, ...] | None:
        """n / (K n_c) per class of the training split; None where `balance` is "sampling"."""
        if self.run.balance == "sampling":
            return None
        labels = self.labels(self.rows("train")).cpu().numpy()
        counts = np.bincount(labels, minlength=len(self.dataset.classes))
        return tuple((counts.sum() / (len(counts) * counts)).tolist())


def of(dataset: datasets.Dataset, *, folder: str | Path | None = None, **changes: Any) -> Study:
    """The study of a data set of your own, outside any notebook: checked, split, decoded.

    `changes` are settings of `run.BASIC`, such as size=96; `folder` is by default below runs/own/.
    """
    return open_study(for_dataset(dataset, folder=folder, **changes), dataset=dataset)


def open_study(run: Run, *, dataset: datasets.Dataset | None = None) -> Study:
    """Find, check, split and decode the data of a run (or `dataset`); the same run is opened once.

    The split is kept in `split.json`. Without the setting `test_share` the official test split
    stays and val is drawn; with it an official split of all images stays, else all three are drawn,
    near-duplicates together. At most `unusable_share` of the files may fail to decode. Errors:
    `tables.BadData`; ValueError for a model of the reader's own that cannot take part.
    """
    if run.key not in run.opened:
        run.opened[run.key] = _opened(run, dataset or datasets.load(run.location))
    for name in run.own:
        _check_own(run.opened[run.key], name)
    return run.opened[run.key]


def _opened(run: Run, dataset: datasets.Dataset) -> Study:
    problems = datasets.check(dataset)
    if len(problems):
        raise tables.BadData(datasets.problem_text(problems))
    official, drawn = set(dataset.manifest["split"]), bool(run.test_share)
    anew = drawn and ("" in official or "test" not in official)
    if anew:
        if official != {""} and run.location.kind == "folder":
            log.warning("%s has no test split: all three are drawn anew", dataset.name)
        dataset = replace(dataset, manifest=dataset.manifest.assign(split=""))
    if run.per_class:
        dataset = split.subset(dataset, per_class=run.per_class, seed=run.seed)
    dataset, images = _decoded(run, dataset)
    if drawn:
        dataset = split.with_looks(dataset, images.images)
    saved, shares = run.run_dir / "split.json", dict(val_share=run.val_share, seed=run.seed)
    if saved.exists():
        return Study(run, split.load(dataset, saved), images)
    if anew:
        dataset = split.drawn(dataset, test_share=run.test_share, **shares)
    elif not drawn or "val" not in official:
        dataset = split.grouped(dataset, **shares)
    split.save(dataset, saved)
    return Study(run, dataset, images)


def _decoded(run: Run, dataset: datasets.Dataset) -> tuple[datasets.Dataset, cache.ImageCache]:
    """The decoded images, and the data set without the few that do not decode, if allowed."""
    how = dict(size=run.size, fit=run.fit)
    try:
        return dataset, cache.build(dataset, **how)
    except tables.BadData as error:
        lost = getattr(error, "problems", pd.DataFrame({"path": []}))["path"]
        if not 0 < len(lost) <= run.unusable_share * len(dataset.manifest):
            raise
        log.warning("left out: %s", error)
    dataset = datasets.take(dataset, np.flatnonzero(~dataset.manifest["path"].isin(lost)))
    return dataset, cache.build(dataset, **how)


def expected(run: Run) -> Study:
    """The study of a run as far as its numbers of images go, none of them decoded: for a plan.

    What only synthetic images stand for has as many as are published, but in the smoke profile.
    """
    place, wanted = run.location, run.values.get
    if run.synthetic and run.profile != "smoke":
        parts = sources.PUBLISHED[place.dataset].items()
        rows = [(part, k) for part, own in parts for k, n in enumerate(own) for _ in range(n)]
        dataset, manifest = None, pd.DataFrame(rows, columns=["split", "label"])
    else:
        dataset = datasets.load(place)
        boxes = wanted("folds") and dataset.mapping is None
        manifest = (datasets.boxed(dataset) if boxes else dataset).manifest
    tested = manifest["split"].eq("test").to_numpy() & (not wanted("test_share"))
    rest = np.random.default_rng(run.seed).permutation(np.flatnonzero(~tested))
    ends = np.cumsum([wanted(name) or 0 for name in ("test_share", "val_share")]) * len(rest)
    split, (test, val) = np.where(tested, "test", "train").astype(object), ends.round().astype(int)
    split[rest[:test]], split[rest[test:val]] = "test", "val"
    fold = np.where(tested, -1, np.arange(len(split)) % (wanted("folds") or 1))
    parts = dict(classes=tuple("ab"), ignored=manifest[:0], synthetic=run.synthetic, origin="")
    parts |= dict(manifest=manifest.assign(split=split, fold=fold))
    blank = np.broadcast_to(np.uint8(0), (len(split), run.size, run.size))
    images = cache.ImageCache(blank, run.size, "", Path(), ())
    return Study(run, datasets.Dataset(place.dataset, place.root, **parts), images)


def _check_own(study: Study, name: str) -> None:
    """Refuse a model of the reader's own that cannot take part, after a try on two images."""
    files.one_part(name, "run.own:")
    images = study.images(study.rows("train")[:2])
    try:
        model = _own_model(study.run, name)
        models.check_classifier(model, images, classes=len(study.dataset.classes))
    except (TypeError, ValueError) as error:
        raise type(error)(f"run.own[{name!r}]: {error}") from error


def _own_model(run: Run, name: str) -> torch.nn.Module:
    """The reader's model: a copy of the trained one, or a new one with the same start each time."""
    own = run.own[name]
    if isinstance(own, torch.nn.Module):
        return copy.deepcopy(own).to(run.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return own().to(run.device)


def work_folder(run: Run, name: str, depends: Mapping[str, Any]) -> Path:
    """The folder `name` of this run for work that depends on `depends`, kept in its key.json.

    What is there and depends on something else is put aside (as NAME.<time>.old). Where nothing is
    there, the same work of another run of this notebook is taken over, finished or not.
    """
    folder, wanted = run.run_dir / name, json.loads(json.dumps(depends, default=str))
    run.run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(run.run_dir / ".keys.lock"):  # the processes of one training ask together
        kept = files.read_json(folder / "key.json")
        if kept == wanted:
            return folder
        if kept is not None or (folder.is_dir() and any(folder.iterdir())):
            files.put_aside(folder)
            what = differences(kept or {}, wanted)
            log.warning("%s was made under other settings (%s): put aside, made anew", name, what)
        if same := _same(run, f"{name}/key.json", wanted):
            files.copy_tree(same[0].parent, folder, linked=LINKED)
            place = same[0].parents[len(Path(name).parts)].name
            log.info("%s is taken over from the run %s", name, place)
        else:
            files.write_json(wanted, folder / "key.json")
        return folder


def _same(run: Run, record: str, wanted: Mapping[str, Any]) -> list[Path]:
    """Records of that name that say `wanted` in other runs of this notebook, the newest first.

    On Kaggle also in runs of earlier sessions that are attached as inputs; none for a fresh run.
    """
    attached = [folder for mount in sources.mounts() for folder in (mount / "runs", mount)]
    places = [run.run_dir.parent, *(folder / run.notebook for folder in attached)]
    others = [] if run.fresh else [other for place in places for other in place.glob("[!.]*")]
    others = [other for other in others if other != run.run_dir and other.suffix != ".old"]
    found = [other / record for other in others if _says(other / record, wanted)]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _says(record: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a record of another run says `wanted`; a damaged one stops nothing."""
    try:
        return files.read_json(record) == wanted
    except (ValueError, OSError) as error:
        log.warning("passed over: %s", files.error_text(error))
        return False


def described(value: Any) -> Any:
    """What a data set, a pipeline or a function is made of, as JSON; equal for equal trainings."""
    if isinstance(value, cache.ImageCache):
        return {"size": value.size, "fit": value.fit}
    if isinstance(value, np.ndarray) and value.dtype.kind in "iub":
        return hashlib.sha1(value.tobytes(), usedforsecurity=False).hexdigest()[:12]
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return list(value.shape)  # computed numbers differ in the last digit between machines
    if isinstance(value, Mapping):
        return {str(name): described(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(part) for part in value]
    if isinstance(value, Dataset) or type(value).__module__.startswith("dlia_utils"):
        parts = {name: part for name, part in vars(value).items() if name not in PASSING}
        return {"kind": type(value).__name__} | described(parts)
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
    content = models.read(path)
    hashed = hashlib.sha1(digest(content["recipe"]).encode(), usedforsecurity=False)
    for name, value in content["state_dict"].items():
        hashed.update(name.encode() + value.contiguous().numpy().tobytes())
    return hashed.hexdigest()[:12]


def build_model(run: Run, *, classes: int = 2) -> models.PixelModel:
    """A fresh MobileNetV2 of the profile's width, from the run's starting weights."""
    start = {"weights": starting_weights(run), "seed": run.seed, "num_classes": classes}
    return models.mobilenet_v2(width=run.width, stages=run.stages, **start).to(run.device)


def starting_weights(run: Run) -> str | None:
    """`weights` of `models.mobilenet_v2`: decided once per run, kept in weights.txt.

    Without internet and without a file in DLIA_WEIGHTS the run goes on from random weights, and
    says so for every model.
    """
    record, given = run.run_dir / "weights.txt", os.environ.get("DLIA_WEIGHTS")
    wanted = "phantom" if run.pretrained == "phantom" else "imagenet" if run.pretrained else None
    reason = "this run began so; another RUN_NAME tries again"
    if not record.exists():
        chosen = wanted or "random"
        try:
            models.mobilenet_v2(weights=wanted, **run.pick("width", "stages"))
        except (RuntimeError, ValueError) as error:
            if wanted == "imagenet" and isinstance(error, ValueError):
                raise  # a file that does not fit, or a network that no such weights exist for
            chosen, reason = "random", str(error)
        chosen = f"file {Path(given).name}" if given and chosen == "imagenet" else chosen
        files.write_text(chosen, record)
        log.info("starting weights: %s", chosen)
    chosen = weights_label(run)
    if wanted and chosen == "random":
        log.warning("training starts from RANDOM weights and will be weaker: %s", reason[:200])
    if chosen.startswith("file ") and chosen != f"file {Path(given or '').name}":
        how = "set DLIA_WEIGHTS to it, or use another RUN_NAME"
        raise FileNotFoundError(f"this run started from {chosen}: {how}")
    if not (chosen.startswith("file ") or chosen in ("random", "phantom", "imagenet")):
        raise files.Damaged(f"{record} names no weights ({chosen[:40]!r}): {files.ANEW}")
    return {"random": None, "phantom": "phantom"}.get(chosen, "imagenet")


def weights_label(run: Run, model: str = "") -> str:
    """What result rows say of the weights that a model (else the run) started from."""
    records = (folder / "weights.txt" for folder in (run.run_dir / model, run.run_dir))
    return next((path.read_text(encoding="utf-8") for path in records if path.exists()), "random")


def train_model(
    study: Study, name: str, objective, *, start="", spectral="", train_set=None, **overrides
) -> train.FitResult:
    """Train a classifier of this run under `name` with the profile's recipe, or read it back.

    The network is MobileNetV2, or the reader's own where `run.own` has that name (a trained one is
    kept as it is). `start`: a trained model of this run to go on from. `spectral` ("kernel" or
    "operator", see `models.spectral_normalize`) bounds every layer. `train_set` replaces the
    augmented training split; `overrides` go to `train.fit`. Errors: `train.OutOfTime`.
    """
    run = study.run
    if isinstance(own := run.own.get(name), torch.nn.Module):
        folder = work_folder(run, name, {"own": fingerprint(own)})
        files.write_text(OWN, folder / "weights.txt")
        models.save(own, folder / "best.pt", meta={"epoch": 0})
        history = pd.DataFrame(columns=[*train.MEASURED, "seconds"])
        return train.FitResult(history, 0, float("nan"), 0.0)
    if start and not own:
        model = load_models(study, [start])[start]
    else:
        classes = len(study.dataset.classes)
        model = _own_model(run, name) if own else build_model(run, classes=classes)
    if spectral:
        shape = (1, run.size, run.size) if spectral == "operator" else None
        model = models.spectral_normalize(model, kind=spectral, input_shape=shape)
    train_set = study.torch_set("train", augmented=True) if train_set is None else train_set
    options = {"schedule": run.schedule, "monitor": "val_accuracy"} | overrides
    fitted = fit_model(study, name, model, objective, train_set, study.torch_set("val"), **options)
    if own:
        files.write_text(OWN, run.run_dir / name / "weights.txt")
    return fitted


def train_head(
    study: Study, name: str, model, objective: Callable, *, augmented: bool = False, **overrides
) -> train.FitResult:
    """Train only the head of `model` (see `models.with_head`); the whole model is kept.

    The body runs once over the images; with `augmented` every time, for augmentation and attacks.
    """
    run = study.run
    options = {"schedule": run.schedule, "monitor": "val_auc"} | overrides
    if augmented:
        sets = study.torch_set("train", augmented=True), study.torch_set("val")
        return fit_model(study, name, model, objective, *sets, **options)
    model = model.to(run.device)
    options |= {"num_workers": 0, "depends": {"model": fingerprint(model)}}
    sets = map(study.torch_set, ("train", "val"))
    sets = [models.cached_features(model, one, batch_size=run.batch_size) for one in sets]
    fitted = fit_model(study, f"{name}_head", model.head, objective, *sets, **options)
    models.save(model, run.run_dir / name / "best.pt", meta={"epoch": fitted.best_epoch})
    return fitted


def fit_model(
    study: Study, name: str, model, objective, train_set, val_set, *, depends=None, **overrides
) -> train.FitResult:
    """`train.fit` in the run's folder `name`, with the run's epochs, batch size, rate and budget.

    A training depends on its starting weights, objective, images, options and `depends`; it is read
    back, or taken over from another run, only where all are the same. Errors: `train.OutOfTime`.
    """
    names = "epochs batch_size lr patience max_minutes num_workers seed".split()
    options = study.run.pick(*names) | overrides
    learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
    start = {"weights": fingerprint(model), "learning": digest(learning)}
    start["network"] = digest(getattr(model, "recipe", None) or repr(model))
    key = {**study.key, "start": start, "depends": dict(depends or {})}
    key |= {"train": described(train_set), "val": described(val_set)}
    key["objective"] = getattr(objective, "settings", described(objective))
    key["options"] = described({name: options[name] for name in options if name not in FREE})
    where = dict(run_dir=work_folder(study.run, name, key), config={"key": digest(key)})
    where["resume"] = bool(study.run.resume)
    begun = (where["run_dir"] / "last.pt").exists()  # perhaps finished, and then read back
    left = time_left(study.run, "" if begun else f"{name} was not begun") / 60
    asked = options["max_minutes"]
    options["max_minutes"] = max(left, 0.01) if left < (asked or math.inf) else asked
    try:
        return train.fit(model, objective, train_set, val_set, **where, **options)
    except train.OutOfTime:
        if options["max_minutes"] != asked:  # the session's end
            raise out_of_time(study.run, f"{name} stopped between two epochs") from None
        raise


def time_left(run: Run, what: str = "") -> float:
    """Seconds until the session's `Run.budget` is spent; `train.OutOfTime` where `what` is late."""
    left = run.begun + 3600 * (run.budget or math.inf) - time.time()
    if what and left <= 0:
        raise out_of_time(run, what)
    return left


def out_of_time(run: Run, what: str) -> train.OutOfTime:
    """The error that says what is late, and how to go on in the next session."""
    text = f"{what}: this session's {run.budget:g} hours are spent. What is done is kept: run "
    text += "again, in a new session, to go on from there (the same command; on Kaggle attach "
    return train.OutOfTime(text + "this session's output). For more time: the setting hours.")


def load_models(study: Study, names: Sequence[str]) -> dict[str, models.PixelModel]:
    """The trained models of this run by name, in eval mode on the run's device.

    Errors: FileNotFoundError for one that was not trained yet, naming the section that trains it.
    """
    run, loaded = study.run, {}
    for name in names:
        path = made_by(run, f"{name}/best.pt", run.trains)
        build = functools.partial(_own_model, run, name) if name in run.own else None
        loaded[name] = models.load(path, build).to(run.device)
    return loaded


def trained(study: Study, names: Sequence[str]) -> list[str]:
    """Those of `names` that this run has a trained model of."""
    return [name for name in names if (study.run.run_dir / name / "best.pt").exists()]


def stored(
    study: Study, name: str, compute: Callable | None = None, *, model=(), uses=None, section=""
) -> pd.DataFrame:
    """Read table `name` of this run, or compute and keep it.

    A table depends on data, split, the weights of `model` (a name or several) and the settings that
    `uses` names (None: all); another run's of the same is taken over. Without `compute` it must be
    there: `section` is then the one that makes it.
    """
    run, path = study.run, study.run.run_dir / "tables" / f"{name}.csv"
    record = path.with_suffix(".json")
    names = [model] if isinstance(model, str) else list(model)
    key = {**study.key, "models": {one: weights_key(run, one) for one in names}}
    kept = (files.read_json(record) or {}) if path.exists() else {}
    if compute is None:
        good = all(kept.get(part) == key[part] for part in ("format", "models", "split"))
        return files.read_csv(made_by(run, f"tables/{name}.csv", section, good=good))
    key["settings"] = run.settings if uses is None else run.pick(*uses)
    key = json.loads(json.dumps(key, default=str))
    if not run.resume or kept != key:
        same = _same(run, f"tables/{record.name}", key)
        time_left(run, "" if same else f"table {name} was not begun")
        table = files.read_csv(same[0].with_suffix(".csv")) if same else compute()
        record.unlink(missing_ok=True)  # without its key the table counts as none
        files.write_csv(table, path)
        files.write_json(key, record)
    return files.read_csv(path)


def made_by(run: Run, name: str, section: str, *, good: bool = True) -> Path:
    """The file `name` of this run, unless it is missing or not `good`: then FileNotFoundError.

    It names the `section` of the notebook that writes the file.
    """
    if not (good and (run.run_dir / name).exists()):
        raise FileNotFoundError(
            f"{name} is not in {run.run_dir.parent.name}/{run.run_dir.name}: run the section "
            f"'{section}' first; in a notebook of your own, copy that section as well"
        )
    return run.run_dir / name


def test_opened(
    study: Study, purpose: str, *, final: bool = False, force: bool = False
) -> pd.DataFrame:
    """Log in test_log.csv that the test split is opened for `purpose`; returns the log.

    A split that is looked at again after something was changed is a second validation split (Dwork
    et al. 2015, Science 349:636): a `final` test is refused a second time in a run folder, unless
    it is forced, which the log says. Raises: ValueError for an empty purpose, `AlreadyOpened`.
    """
    if not purpose.strip():
        raise ValueError("purpose is empty: say in a few words what the test split is opened for")
    path = study.run.run_dir / "test_log.csv"
    keep = "mend it by hand, for it says when the test split was opened"
    with files.locked(path):
        opened = (
            files.read_csv(path, keep)
            if path.exists()
            else pd.DataFrame(columns=["time", "purpose"])
        )
        before = opened.loc[opened["purpose"] == purpose, "time"].tolist() if final else []
        if before and not force:
            raise AlreadyOpened(
                f"the test split was opened for {purpose!r} at {before[0]} ({path.name} of this "
                "run). What was changed since then was changed by somebody who may know the "
                "result. Start a new run (RUN_NAME), or open it again with force=True, which is "
                "logged"
            )
        purpose += " (AGAIN, forced)" * bool(before)
        entry = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "purpose": purpose}
        entry |= {"config": study.run.key, "split": study.key["split"]}
        opened = pd.DataFrame([*opened.to_dict("records"), entry])
        files.write_csv(opened, path)
    return opened


def predictions(study: Study, name: str, *, force: bool = False) -> pd.DataFrame:
    """What the trained model `name` says about the test images: opened once, and read back then.

    Columns image (row of the manifest), path, label, probability (of class 1; of more than two
    classes p0, p1, ...), weights (the model's fingerprint). A test of other weights is another
    opening, refused unless forced. Raises: FileNotFoundError for no such model, `AlreadyOpened`.
    """
    path = study.run.run_dir / "tables" / f"test_{name}.csv"
    model = load_models(study, [name])[name]
    weights = fingerprint(model)
    if path.exists() and not force:
        kept = files.read_csv(path, dtype={"weights": str})
        if kept["weights"].eq(weights).all():
            return kept
    test_opened(study, f"final test of {name}", final=True, force=force)
    found, labels, rows = train.predict(model, study.torch_set("test"))
    told = study.dataset.manifest.loc[rows, ["path"]].assign(label=labels)
    told.insert(0, "image", rows)
    names = ["probability"] if found.shape[1] == 2 else [f"p{k}" for k in range(found.shape[1])]
    told[names] = found[:, -len(names) :]
    files.write_csv(told.assign(weights=weights), path)
    return files.read_csv(path, dtype={"weights": str})


def scores(told: pd.DataFrame) -> np.ndarray:
    """What `metrics.classification` takes of `predictions`: [N] of two classes, [N,K] of more."""
    several = told.filter(regex=r"^p\d+$")
    return several.to_numpy() if several.shape[1] else told["probability"].to_numpy()


def evaluation(study: Study, name: str) -> pd.DataFrame:
    """Metrics of `predictions`: metric, value, interval by patient (ci_low, ci_high), n."""
    told = predictions(study, name)
    patients, draws = study.patients(told["image"].to_numpy()), study.run.bootstrap_draws
    return metrics.classification(told["label"], scores(told), patients, draws=draws)
