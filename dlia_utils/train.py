"""One training loop (Hugging Face Accelerate) that can be killed at any moment and resumed, and `predict`."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from . import models
from .device import evaluating, pick_device
from .files import atomic_path, write_csv
from .objectives import Objective
from .progress import Bar

FORMAT = "dlia_utils training 1"
SCHEDULES = ("constant", "cosine", "onecycle")
MEASURED = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auc")
MEASURED_IN_TRAINING = MEASURED[:3]  # also without a validation set
NAN_CHECK_EVERY = 50  # steps; reading a number from a GPU waits for it

log = logging.getLogger("dlia_utils")


@dataclass(frozen=True)
class FitResult:
    """What `fit` did: one row of `history` per epoch (counted from 1); the model has `best_epoch`'s weights.

    `status` is "done" (all epochs, or stopped early) or "interrupted" (`max_minutes`; call again to go on).
    """

    history: pd.DataFrame
    best_epoch: int
    best_score: float
    status: str
    seconds: float


@dataclass
class _Progress:
    """What must survive a kill beside model, optimiser, scheduler, scaler and random states."""

    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: float = math.nan
    best_state: dict[str, Tensor] = field(default_factory=dict)
    finished: bool = False


class _Trained(nn.Module):
    """A coat for Accelerate to sew on: it changes the forward method of the module it prepares."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        return self.model(*inputs)


class _EpochBatches(Sampler[list[int]]):
    """Batches of row numbers in an order that depends on (seed, epoch) only."""

    drop_last = False

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist()
        for start in self._starts():
            yield order[start : start + self.batch_size]

    def images(self, batches: range) -> int:
        """How many images the given batches hold: only the epoch's last batch may be smaller."""
        return sum(
            min(self.batch_size, self.size - start)
            for start in self._starts()[batches.start : batches.stop]
        )

    def _starts(self) -> range:
        # Batch normalisation cannot train on one image: a last batch of one is left out (each epoch another).
        return range(0, self.size - 1 if self.batch_size > 1 else self.size, self.batch_size)


def fit(
    model: nn.Module,
    objective: Objective,
    train_set: Dataset,
    val_set: Dataset | None,
    *,
    run_dir: str | Path,
    epochs: int,
    batch_size: int = 32,
    lr: float = 1e-3,
    optimizer: str = "adam",
    weight_decay: float = 0.0,
    schedule: str = "constant",
    warmup_epochs: float = 0.0,
    lr_min: float = 0.0,
    accumulate: int = 1,
    clip_norm: float | None = None,
    ema: float | None = None,
    patience: int | None = None,
    monitor: str = "val_auc",
    val_metric: Callable[[nn.Module], dict[str, float]] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    max_minutes: float | None = None,
    resume: bool | str = True,
    seed: int = 0,
    num_workers: int = 0,
    collate: Callable | None = None,
    config: dict[str, Any] | None = None,
    progress: bool = True,
) -> FitResult:
    """Train `model` in place and give it the weights of its best validation epoch.

    Data sets yield (x float [C, H, W] in [0, 1], y int, ...), or what `collate` makes batches (x, y, ...) of;
    `train_set.set_epoch(epoch)` is called if it exists. `objective` is one of `objectives`; `optimizer` is adam,
    adamw or sgd (momentum 0.9); `schedule` is constant, cosine (linear warm-up from lr / 50 over
    `warmup_epochs`, then down to `lr_min`) or onecycle, stepped with every optimiser step; `accumulate` batches
    make one step, every image weighing the same, the last incomplete group too. Gradients are clipped to
    `clip_norm`. With `ema`, what is validated and kept are the exponentially averaged weights (Polyak & Juditsky
    1992), with that decay once some steps are done. `monitor` names a column of the history: val_auc,
    val_accuracy, val_loss (the smaller the better, as every name that ends in "loss") or one that
    `val_metric(model)` returns (model in eval mode), which is all there is when `val_set` is None. To train for
    a known number of epochs without any validation: val_set None and monitor="epoch", which keeps the last one.
    `patience` epochs without a better score end the training. `on_epoch(row)` gets every row of the history
    once it is saved, after a resume the old rows first; what it raises ends the call, and the next call goes
    on from there. Half precision is used on GPUs (fp16 below capability 8.0, else bf16) unless the objective
    differentiates gradients. Under torchrun every process calls `fit` (DDP; `batch_size` is per process).

    `run_dir` receives last.pt (everything), best.pt (`models.load` reads it) and metrics.csv, each replaced
    in one step after every epoch. With `resume=True` a killed run goes on from its last whole epoch, on one
    CPU process to bit-equal weights, and a finished run returns at once; a run made with other settings or
    another `config` is refused unless `resume="force"`; `resume=False` starts anew. With `max_minutes` no
    epoch after the first is begun that would not end in time. The caller's random state is left as found.

    The model ends in eval mode, on the device of the training. Raises: ValueError (arguments, a run of other
    settings), FloatingPointError (the loss is no longer finite).

    >>> import tempfile
    >>> data = TensorDataset(torch.rand(8, 1, 4, 4), torch.tensor([0, 1] * 4))
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    >>> from dlia_utils.objectives import cross_entropy
    >>> done = fit(net, cross_entropy(), data, data, run_dir=tempfile.mkdtemp(), epochs=2, progress=False)
    >>> done.status, len(done.history)
    ('done', 2)
    """
    settings = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "warmup_epochs": warmup_epochs,
        "lr_min": lr_min,
        "accumulate": accumulate,
        "clip_norm": clip_norm,
        "ema": ema,
        "patience": patience,
        "monitor": monitor,
        "seed": seed,
        "train_images": len(train_set),
        "val_images": None if val_set is None else len(val_set),
        "objective": getattr(
            objective, "settings", getattr(objective, "__qualname__", "objective")
        ),
        "config": config or {},
    }
    settings = json.loads(json.dumps(settings, default=str))
    _check(settings, resume)
    if val_metric is None and val_set is None and monitor not in MEASURED_IN_TRAINING:
        raise ValueError(
            "nothing to choose the best epoch by: give a val_set, a val_metric or both, "
            'or monitor="epoch" to keep the last one'
        )
    if val_metric is None and monitor not in MEASURED:
        raise ValueError(f"monitor={monitor!r} is not measured; there are {', '.join(MEASURED)}")
    with _random_state_kept():
        run = _Run(
            model,
            objective,
            train_set,
            val_set,
            Path(run_dir),
            settings,
            num_workers,
            val_metric,
            collate,
        )
        run.start(resume)
        status = run.train(on_epoch=on_epoch, max_minutes=max_minutes, progress=progress)
        return run.result(status)


class _Run:
    """One call of `fit`: the prepared objects and the steps that work on them."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        train_set: Dataset,
        val_set: Dataset | None,
        run_dir: Path,
        settings: dict[str, Any],
        num_workers: int,
        val_metric: Callable[[nn.Module], dict[str, float]] | None,
        collate: Callable | None,
    ) -> None:
        self.objective, self.train_set, self.val_set = objective, train_set, val_set
        self.run_dir, self.settings, self.val_metric = run_dir, settings, val_metric
        self.accelerator = accelerator = _accelerator(objective, settings["accumulate"])
        # Convolutions are faster channels-last, second derivatives of batch normalisation much slower.
        second_order = getattr(objective, "second_order", False)
        layout = torch.contiguous_format if second_order else torch.channels_last
        self.model = model.to(accelerator.device, memory_format=layout)
        self.average = _average(self.model, settings["ema"])
        self.batches = _EpochBatches(len(train_set), settings["batch_size"], settings["seed"])
        loader = DataLoader(
            train_set,
            batch_sampler=self.batches,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=accelerator.device.type == "cuda",
        )
        self.trained, self.optimizer, self.loader = accelerator.prepare(
            _Trained(model), _optimizer(model, settings), loader
        )
        self.steps = math.ceil(len(self.loader) / settings["accumulate"])
        self.scheduler = _scheduler(self.optimizer.optimizer, settings, self.steps)
        self.progress = _Progress()

    @property
    def judged(self) -> nn.Module:
        """The model that is validated and kept: the average if there is one."""
        return self.average.module if self.average else self.model

    # ---------------------------------------------------------------- start, train, result

    def start(self, resume: bool | str) -> None:
        """Take up what `run_dir` holds, or begin anew; leave no temporary file of a killed run behind."""
        set_seed(self.settings["seed"], device_specific=True)
        saved = _read(self.run_dir / "last.pt") if resume else None
        if saved is not None:
            _check_same(saved["settings"], self.settings, resume, self.run_dir)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            old = (
                []
                if saved
                else [self.run_dir / name for name in ("last.pt", "best.pt", "metrics.csv")]
            )
            for path in [*old, *self.run_dir.glob(".*.tmp.*")]:
                path.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        if saved is not None:
            self._restore(saved)

    def train(self, *, on_epoch: Callable | None, max_minutes: float | None, progress: bool) -> str:
        """Run the epochs that are left; returns "done" or "interrupted"."""
        state, begun = self.progress, time.monotonic()
        total = self.settings["epochs"]
        for row in state.history if on_epoch else ():
            on_epoch(dict(row))
        with Bar(
            total=total * len(self.loader),
            initial=min(state.epoch, total) * len(self.loader),
            unit="batch",
            desc=f"train {self.run_dir.name}",
            disable=not (progress and self.accelerator.is_main_process),
        ) as bar:
            if state.finished:
                bar.mark(self._reached(state.epoch))
            while not state.finished:
                if self._out_of_time(begun, max_minutes):
                    log.warning(
                        "%s: stopped after epoch %d by max_minutes", self.run_dir.name, state.epoch
                    )
                    return "interrupted"
                self._epoch(bar)
                if on_epoch:
                    on_epoch(dict(state.history[-1]))
        self._warn_of_ties()
        return "done"

    def result(self, status: str) -> FitResult:
        """Give the model its best weights and describe the run."""
        state = self.progress
        if state.best_state:
            self.model.load_state_dict(state.best_state)
        self.model.eval()
        history = pd.DataFrame(state.history)
        seconds = float(history["seconds"].sum()) if len(history) else 0.0
        return FitResult(history, state.best_epoch, state.best_score, status, seconds)

    # ---------------------------------------------------------------- one epoch

    def _reached(self, epoch: int) -> str:
        """Where the training stands in `epoch`, and how the last whole one ended."""
        text, monitor = f"epoch {epoch} of {self.settings['epochs']}", self.settings["monitor"]
        for row in self.progress.history[-1:]:
            text += f", loss {row['train_loss']:.3f}"
            if (
                monitor != "epoch" and monitor in row
            ):  # a forced resume may bring rows of another monitor
                text += f", {monitor} {row[monitor]:.3f}"
        return text

    def _epoch(self, bar: Bar) -> None:
        state, begun = self.progress, time.monotonic()
        bar.set_postfix_str(self._reached(state.epoch + 1))
        row = {"epoch": state.epoch + 1, **self._train_epoch(state.epoch, bar), **self._validate()}
        row["seconds"] = round(time.monotonic() - begun, 3)
        # Every process must take the same decisions, so all take the main one's numbers.
        (row,) = broadcast_object_list([row])
        if self.settings["monitor"] not in row:
            raise ValueError(
                f"monitor={self.settings['monitor']!r} is not measured; there are {sorted(row)}"
            )
        state.epoch += 1
        state.history.append(row)
        self._keep_best(row)
        state.finished = self._is_finished()
        self._save()
        bar.mark(self._reached(state.epoch))
        log.info("%s: %s", self.run_dir.name, {key: round(value, 4) for key, value in row.items()})

    def _train_epoch(self, epoch: int, bar: Bar) -> dict[str, float]:
        # Accelerate counts epochs from 0 in every process and would tell the data set so after a resume.
        self.loader.set_epoch(epoch)
        self.batches.epoch = epoch
        if hasattr(self.train_set, "set_epoch"):
            self.train_set.set_epoch(epoch)
        self.model.train()
        device, rate = self.accelerator.device, self.scheduler.get_last_lr()[0]
        sums = torch.zeros(3, device=device)  # loss, right answers, images
        for step, (x, y, *_) in enumerate(self.loader):
            sums += self._step(step, x, y)
            if (step + 1) % NAN_CHECK_EVERY == 0 or step + 1 == len(self.loader):
                self._check_finite(sums[0].item(), epoch, step)
            bar.update()
        if self.accelerator.num_processes > 1:
            # The running statistics of the last batch differ between processes; the main one's are saved.
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        loss, right, images = self.accelerator.reduce(sums, "sum").tolist()
        row = {"lr": rate, "train_loss": loss / images}
        return row if math.isnan(right) else row | {"train_accuracy": right / images}

    def _step(self, step: int, x: Tensor, y: Any) -> Tensor:
        """One batch; returns (loss * images, right answers, images) without waiting for the device."""
        accelerator, images = self.accelerator, len(y)
        with accelerator.accumulate(self.trained):
            loss, logits = self.objective(self.trained, x, y)
            accelerator.backward(loss * self._share(step, images))
            if accelerator.sync_gradients and self.settings["clip_norm"]:
                accelerator.clip_grad_norm_(self.trained.parameters(), self.settings["clip_norm"])
            self.optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
                if self.average:
                    self.average.update_parameters(self.model)
            self.optimizer.zero_grad()
        # An objective without logits (a detector's) has no right answers to count.
        right = math.nan if logits is None else (logits.detach().argmax(dim=1) == y).sum()
        return torch.stack(
            [torch.as_tensor(part).to(loss) for part in (loss.detach() * images, right, images)]
        )

    def _share(self, step: int, images: int) -> float:
        """The weight of a batch in its step: its share of the group's images, as the last group may be smaller.

        Accelerate divides by `accumulate`, so this multiplies by it.
        """
        accumulate, processes = self.settings["accumulate"], self.accelerator.num_processes
        first = step - step % accumulate
        group = range(first, min(first + accumulate, len(self.loader)))
        if processes > 1:  # Accelerate fills the last batches up, so that all are of one size.
            return accumulate / len(group)
        return accumulate * images / self.batches.images(group)

    def _check_finite(self, loss_sum: float, epoch: int, step: int) -> None:
        if not math.isfinite(loss_sum):
            raise FloatingPointError(
                f"the loss is no longer finite (epoch {epoch + 1}, by batch {step + 1}): lower lr "
                f"(now {self.settings['lr']:g}); {self.run_dir.name} keeps the last whole epoch"
            )

    def _validate(self) -> dict[str, float]:
        row = {}
        if self.val_set is not None:
            batch_size = max(64, self.settings["batch_size"])
            logits, labels, _ = _logits(self.judged, self.val_set, batch_size=batch_size)
            row |= _scores(logits, torch.as_tensor(labels))
        if self.val_metric is not None:
            with evaluating(self.judged):
                row |= {name: float(value) for name, value in self.val_metric(self.judged).items()}
        return row

    def _keep_best(self, row: dict[str, float]) -> None:
        state, score = self.progress, row[self.settings["monitor"]]
        sign = -1 if self.settings["monitor"].endswith("loss") else 1
        # While no epoch has a score that is a number the newest weights are kept: there is always a best.pt.
        # A score that is not a number never beats one that is: every comparison with it is false.
        if math.isnan(state.best_score) or sign * (score - state.best_score) > 0:
            state.best_epoch, state.best_score = state.epoch, score
            state.best_state = {
                key: value.detach().cpu().clone() for key, value in self.judged.state_dict().items()
            }
        if math.isnan(score):
            log.warning("%s is not a number in epoch %d", self.settings["monitor"], state.epoch)

    def _warn_of_ties(self) -> None:
        """A monitor that never moved has chosen the first epoch: nothing was selected, and nobody would see it."""
        name = self.settings["monitor"]
        scores = {row[name] for row in self.progress.history}
        if (
            len(self.progress.history) > 1
            and len(scores) == 1
            and not math.isnan(self.progress.best_score)
        ):
            log.warning(
                "%s: %s was %g in every epoch, so the first one was kept; choose another monitor",
                self.run_dir.name,
                name,
                scores.pop(),
            )

    def _is_finished(self) -> bool:
        state, patience = self.progress, self.settings["patience"]
        stale = patience is not None and state.epoch - state.best_epoch >= patience
        return stale or state.epoch >= self.settings["epochs"]

    def _out_of_time(self, begun: float, max_minutes: float | None) -> bool:
        if max_minutes is None or not self.progress.history:
            return False  # one epoch at least: there is always a best.pt
        # Real epochs were seen to vary by a quarter.
        next_epoch = 1.25 * max(row["seconds"] for row in self.progress.history[-3:])
        (late,) = broadcast_object_list([time.monotonic() - begun + next_epoch > 60 * max_minutes])
        return late

    # ---------------------------------------------------------------- files

    def _save(self) -> None:
        """last.pt first: it holds all the rest, so a kill between two files loses nothing."""
        random_states = gather_object([_random_state()])
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "random": random_states,
            **vars(self.progress),
        }
        with atomic_path(self.run_dir / "last.pt") as temporary:
            torch.save(content, temporary)
        self._export(best=self.progress.best_epoch == self.progress.epoch)

    def _export(self, *, best: bool) -> None:
        """The files for readers, made from what last.pt holds; the judged model has the best weights when `best`."""
        write_csv(pd.DataFrame(self.progress.history), self.run_dir / "metrics.csv")
        if best:
            state = self.progress
            meta = {
                "epoch": state.best_epoch,
                "monitor": self.settings["monitor"],
                "score": state.best_score,
            }
            models.save(
                self.judged, self.run_dir / "best.pt", meta={**meta, "settings": self.settings}
            )

    def _restore(self, saved: dict[str, Any]) -> None:
        state = self.progress
        for name in vars(state):
            setattr(state, name, saved[name])
        models.load_strictly(self.judged, state.best_state, origin=f"{self.run_dir.name}/last.pt")
        if self.accelerator.is_main_process:
            self._export(best=True)
        self.model.load_state_dict(saved["model"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        if saved["settings"] != self.settings:  # only with resume="force"
            state.finished = self._is_finished()
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        if self.accelerator.scaler and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        rank = self.accelerator.process_index
        if rank < len(saved["random"]):
            _set_random_state(saved["random"][rank])
        log.info(
            "%s: resumed after epoch %d of %d",
            self.run_dir.name,
            state.epoch,
            self.settings["epochs"],
        )


# -------------------------------------------------------------------- prediction


def predict(
    model: nn.Module, data: Dataset | Tensor, *, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Class probabilities [N, K] (float64), labels [N] and row numbers [N], in the order of the data.

    `data` is a tensor of images [N, C, H, W] (labels are then None) or a data set that yields (x, y) or
    (x, y, row). Runs on the model's device in eval mode; training flags are restored.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    >>> probabilities, labels, rows = predict(model, torch.rand(3, 1, 4, 4))
    >>> probabilities.shape, labels, rows.tolist()
    ((3, 2), None, [0, 1, 2])
    """
    logits, labels, rows = _logits(model, data, batch_size=batch_size)
    return logits.double().softmax(dim=1).numpy(), labels, rows


def log_odds(model: nn.Module, data: Dataset | Tensor, *, batch_size: int = 64) -> np.ndarray:
    """The score z1 - z0 [N] (float64) of a two-class model: rank by it, and cut it at 0 instead of 0.5.

    It orders images as the probability of class 1 does, but cannot saturate: from about 37 on all probabilities are
    exactly 1, and a model with large logits (one distilled at a high temperature) would lose its ranking, and so its
    AUC, to rounding. `scipy.special.expit` turns it into that probability. `data` as in `predict`.
    Errors: ValueError for a model with other than two logits.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    >>> x = torch.rand(3, 1, 4, 4)
    >>> bool(((log_odds(model, x) > 0) == (predict(model, x)[0][:, 1] > 0.5)).all())
    True
    """
    logits, _, _ = _logits(model, data, batch_size=batch_size)
    if logits.shape[1] != 2:
        raise ValueError(
            f"log-odds need a model with two logits, not {logits.shape[1]}; use predict"
        )
    return (logits[:, 1].double() - logits[:, 0].double()).numpy()


@torch.inference_mode()
def _logits(
    model: nn.Module, data: Dataset | Tensor, *, batch_size: int
) -> tuple[Tensor, np.ndarray | None, np.ndarray]:
    data = TensorDataset(data) if isinstance(data, Tensor) else data
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    logits, labels, rows = [], [], []
    with evaluating(model):
        # Without a generator of its own a loader draws its workers' seed from the global random stream.
        for batch in DataLoader(data, batch_size=batch_size, generator=torch.Generator()):
            logits.append(model(batch[0].to(device, non_blocking=True)).float())
            labels += batch[1:2]
            rows += batch[2:3]
    together = torch.cat(logits).cpu()
    ids = torch.cat(rows).numpy() if rows else np.arange(len(together))
    return together, torch.cat(labels).numpy() if labels else None, ids


def _scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Validation loss, accuracy and AUC (two classes: of class 1; more: one against the rest, macro mean)."""
    row = {
        "val_loss": F.cross_entropy(logits.double(), labels).item(),
        "val_accuracy": (logits.argmax(dim=1) == labels).double().mean().item(),
        "val_auc": math.nan,
    }
    if logits.isfinite().all() and len(labels.unique()) == logits.shape[1]:
        # Two classes by their difference: probabilities saturate, and all images would tie at 1.
        score = (
            (logits[:, 1] - logits[:, 0]).double()
            if logits.shape[1] == 2
            else logits.double().softmax(dim=1)
        )
        row["val_auc"] = float(roc_auc_score(labels.numpy(), score.numpy(), multi_class="ovr"))
    return row


# -------------------------------------------------------------------- parts of a run


def _check(settings: dict[str, Any], resume: bool | str) -> None:
    """Refuse unusable arguments before anything is loaded or written."""
    for name in (
        "epochs",
        "batch_size",
        "accumulate",
        "lr",
        "train_images",
        "val_images",
        "clip_norm",
    ):
        if settings[name] is not None and settings[name] <= 0:
            raise ValueError(f"{name} must be positive, got {settings[name]}")
    if settings["ema"] is not None and not 0 < settings["ema"] < 1:
        raise ValueError(f"ema is a decay between 0 and 1 or None, got {settings['ema']}")
    if settings["schedule"] != "cosine" and (settings["warmup_epochs"] or settings["lr_min"]):
        raise ValueError(
            f"warmup_epochs and lr_min belong to schedule='cosine', not {settings['schedule']!r}"
        )
    if not 0 <= settings["warmup_epochs"] < settings["epochs"]:
        raise ValueError(
            f"warmup_epochs must be 0 or more and fewer than epochs, got {settings['warmup_epochs']}"
        )
    for name, known in (("optimizer", ("adam", "adamw", "sgd")), ("schedule", SCHEDULES)):
        if settings[name] not in known:
            raise ValueError(f"unknown {name} {settings[name]!r}; known: {', '.join(known)}")
    if settings["train_images"] < 2:
        raise ValueError("training needs at least two images")
    if settings["patience"] is not None and settings["patience"] < 1:
        raise ValueError(f"patience must be at least 1 epoch or None, got {settings['patience']}")
    if resume not in (True, False, "force"):
        raise ValueError(f'resume must be True, False or "force", got {resume!r}')


def _check_same(
    saved: dict[str, Any], asked: dict[str, Any], resume: bool | str, run_dir: Path
) -> None:
    if saved == asked:
        return
    names = [name for name in {**saved, **asked} if saved.get(name) != asked.get(name)]
    changes = "; ".join(f"{name}: {saved.get(name)!r} -> {asked.get(name)!r}" for name in names)
    if resume != "force":
        raise ValueError(
            f"{run_dir} holds a run with other settings ({changes}): take another run_dir, "
            'or resume=False to start anew, or resume="force" to go on all the same'
        )
    log.warning("%s: resumed by force with other settings (%s)", run_dir.name, changes)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by this version of fit: remove it, or pass resume=False"
        )
    return saved


def _accelerator(objective: Objective, accumulate: int) -> Accelerator:
    # Accelerate allows one precision per process; runs with another one may follow in a notebook.
    AcceleratorState._reset_state()
    GradientState._reset_state()  # a run that ended in an error leaves its loader there
    gpu = pick_device()[0] == "cuda"
    # Second derivatives underflow in half precision.
    half = gpu and not getattr(objective, "second_order", False)
    # is_bf16_supported() also says yes where bf16 is emulated (T4), hence the capability.
    precision = (
        ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16") if half else "no"
    )
    return Accelerator(
        # Without this the processes of torchrun on CPUs would ignore each other.
        cpu=not gpu,
        mixed_precision=precision,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )


def _average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """The moving average of the weights; its decay rises to `decay`, so that the random start is soon forgotten."""
    if decay is None:
        return None

    def blend(averaged: list[Tensor], current: list[Tensor], steps: Tensor) -> None:
        share = 1 - min(decay, (1 + steps.item()) / (10 + steps.item()))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, share)
        else:  # counters
            for mine, theirs in zip(averaged, current, strict=True):
                mine.copy_(theirs)

    return AveragedModel(model, multi_avg_fn=blend, use_buffers=True)


def _optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # One fused kernel instead of one loop per parameter: on a CPU the loops cost a few per cent of a step.
    options = {"lr": settings["lr"], "weight_decay": settings["weight_decay"], "fused": True}
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings["optimizer"]](
        parameters, **options
    )


def _scheduler(
    optimizer: torch.optim.Optimizer, settings: dict[str, Any], steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate as a factor of `lr`; a function of the step alone, so that its state is one number."""
    steps = steps_per_epoch * settings["epochs"]
    warmup = steps_per_epoch * settings["warmup_epochs"]
    lowest = settings["lr_min"] / settings["lr"]

    def cosine(start: float, end: float, share: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2

    def constant(step: int) -> float:
        return 1.0

    def warm_then_cosine(step: int) -> float:
        if step < warmup:
            return 0.02 + 0.98 * step / warmup
        return cosine(1.0, lowest, (step - warmup) / (steps - warmup))

    def one_cycle(step: int) -> float:
        # arXiv 1708.07120: from lr / 25 up to lr in 30 % of the steps, then down to almost 0.
        rise = 0.3 * steps
        if step < rise:
            return cosine(0.04, 1.0, step / rise)
        return cosine(1.0, 4e-6, (step - rise) / (steps - rise))

    factors = {"constant": constant, "cosine": warm_then_cosine, "onecycle": one_cycle}
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors[settings["schedule"]])


def _random_state() -> dict[str, Any]:
    """Python's, numpy's, torch's and all GPUs' random states, in types that `weights_only` accepts."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (libraries draw from it)
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """A notebook goes on with the same random numbers whether a training really ran or was found finished."""
    state = _random_state()
    try:
        yield
    finally:
        _set_random_state(state)
