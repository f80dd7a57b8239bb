"""One training loop (Hugging Face Accelerate), killed and resumed at any moment, and `predict`."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
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
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from . import files, models
from .device import device_of, evaluating, pick_device, release_memory
from .objectives import Objective
from .progress import Bar
from .units import check_numbers

FORMAT = "dlia_utils training 1"
ANEW = "delete it to train this model anew, or set RESUME = False for the whole run"
SCHEDULES = ("constant", "cosine", "onecycle")
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
MEASURED = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_auc")
WHOLE = ("epochs", "batch_size", "accumulate", "patience", "seed")
INTERVALS = dict.fromkeys(WHOLE, "[1,inf)")
INTERVALS |= {"lr": "(0,inf)", "weight_decay": "[0,inf)", "lr_min": "[0,inf)"}
INTERVALS |= {"clip_norm": "(0,inf)", "ema": "[0,1)", "seed": "[0,inf)"}
LOST = 1e-6  # the scale of a loss in half precision, once its gradients are no numbers
NAN_CHECK_EVERY = 50  # batches; reading a number from a GPU waits for it

log = logging.getLogger("dlia_utils")


class OutOfTime(RuntimeError):
    """A training met the budget `max_minutes`: the same call goes on from what is kept."""


@dataclass(frozen=True)
class Recipe:
    """How `fit` trains. Raises: ValueError."""

    epochs: int
    batch_size: int = 32  # per process
    lr: float = 1e-3
    optimizer: str = "adam"  # or adamw, sgd (momentum 0.9)
    weight_decay: float = 0.0
    schedule: str = "constant"  # or cosine, onecycle; stepped with every optimiser step
    warmup_epochs: float = 0.0  # of cosine: a linear rise from lr / 50
    lr_min: float = 0.0  # where cosine ends
    accumulate: int = 1  # batches that make one step, every image weighing the same
    clip_norm: float | None = None  # of the gradients of a step
    ema: float | None = None  # decay of the averaged weights that are then judged and kept
    patience: int | None = None  # epochs without a better score that end the training
    monitor: str = "val_auc"  # chooses the best epoch; of a "..._loss" the smallest, "epoch": last
    seed: int = 0

    def __post_init__(self) -> None:
        for name, interval in INTERVALS.items():
            value = getattr(self, name)
            if value is not None or name not in ("clip_norm", "ema", "patience"):
                check_numbers(interval, whole=name in WHOLE, **{name: value})
        fewer = f"[0,{self.epochs})"
        check_numbers(fewer, hint=": fewer than epochs", warmup_epochs=self.warmup_epochs)
        # A search gives NumPy's numbers, which last.pt (read back with weights_only) cannot hold.
        for name in ("lr", "weight_decay", "lr_min"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.optimizer not in OPTIMIZERS or self.schedule not in SCHEDULES:
            known = f"known are {', '.join([*OPTIMIZERS])} and {', '.join(SCHEDULES)}"
            raise ValueError(f"{known}; got {self}")


@dataclass(frozen=True)
class FitResult:
    """What `fit` did: a row of `history` per epoch from 1 on; the model has the best weights."""

    history: pd.DataFrame
    best_epoch: int
    best_score: float
    seconds: float


def fit(
    model: nn.Module,
    objective: Objective,
    train_set: Dataset,
    val_set: Dataset | None,
    *,
    run_dir: str | Path,
    val_metric: Callable[[nn.Module], dict[str, float]] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    max_minutes: float | None = None,
    resume: bool = True,
    num_workers: int = 0,
    collate: Callable | None = None,
    config: dict[str, Any] | None = None,
    progress: bool = True,
    **recipe: Any,
) -> FitResult:
    """Train `model` in place by the fields of `Recipe` and give it the weights of its best epoch.

    Data sets yield (x float [C, H, W] in [0, 1], y int, ...), or what `collate` makes batches of;
    `train_set.set_epoch(epoch)` is called if it exists. `val_metric(model)` adds columns to the
    history, `on_epoch(row)` gets every saved row of it. GPUs work in half precision unless the
    objective differentiates gradients; torchrun is understood (DDP).

    `run_dir` receives last.pt, best.pt (see `models.load`) and metrics.csv after every epoch: a
    killed run goes on to bit-equal weights (one CPU process), a finished one returns at once, one
    of other settings or `config` is refused. The model ends in eval mode; random numbers and
    Accelerate's state stay the caller's. Raises: ValueError, FloatingPointError, `OutOfTime`
    before an epoch that would not end within `max_minutes`.

    >>> import tempfile
    >>> from dlia_utils.objectives import cross_entropy
    >>> data = TensorDataset(torch.rand(8, 1, 4, 4), torch.tensor([0, 1] * 4))
    >>> net, where = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), tempfile.mkdtemp()
    >>> len(fit(net, cross_entropy(), data, data, run_dir=where, epochs=2, progress=False).history)
    2
    """
    asked, measured = Recipe(**recipe), MEASURED[: 3 if val_set is None else None]
    check_numbers("[0,inf)", whole=True, num_workers=num_workers)
    if max_minutes is not None:
        check_numbers("(0,inf)", hint="; None is no limit", max_minutes=max_minutes)
    if val_metric is None and asked.monitor not in measured:
        raise ValueError(
            f"monitor={asked.monitor!r} is not measured, only {', '.join(measured)}: give a "
            'val_set or a val_metric, or monitor="epoch" to keep the last epoch'
        )
    settings = asdict(asked) | {"train_images": len(train_set), "config": config or {}}
    settings["val_images"] = None if val_set is None else len(val_set)
    settings["objective"] = getattr(objective, "settings", getattr(objective, "__qualname__", ""))
    measure = partial(_measure, val_set=val_set, val_metric=val_metric, images=asked.batch_size)
    loading = dict(num_workers=num_workers, collate_fn=collate)
    with _process_state_kept():
        run = _Run(model, objective, train_set, measure, Path(run_dir), asked, settings, loading)
        run.start(resume)
        run.train(on_epoch, max_minutes, progress)
    state, history = run.state, pd.DataFrame(run.state["history"])
    models.load_strictly(model, state["best_state"] or model.state_dict(), origin="the best epoch")
    model.eval()
    seconds = float(sum(history.get("seconds", ())))
    return FitResult(history, state["best_epoch"], state["best_score"], seconds)


class _Trained(nn.Module):
    """Accelerate replaces the forward method of what it prepares, and so not that of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        return self.model(*inputs)


class _Batches(list):
    """Row numbers of the batches of an epoch, in an order that depends on (seed, epoch) only."""

    drop_last = False

    def __init__(self, images: int, recipe: Recipe) -> None:
        self.images, self.seed, self.batch_size = images, recipe.seed, recipe.batch_size
        self.shuffle(0)

    def shuffle(self, epoch: int) -> None:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.images).tolist()
        # Batch normalisation cannot train on one image: a last batch of one is left out.
        starts = range(0, self.images - (self.batch_size > 1), self.batch_size)
        self[:] = [order[start : start + self.batch_size] for start in starts]


class _Run:
    """One call of `fit`: what is prepared, and `state`, the part of it that is plain numbers."""

    def __init__(self, model, objective, train_set, measure, run_dir, recipe, settings, loading):
        self.objective, self.measure, self.recipe = objective, measure, recipe
        self.run_dir, self.name, self.train_set = run_dir, run_dir.name, train_set
        self.settings = json.loads(json.dumps(settings, default=str))
        self.state = {"epoch": 0, "history": [], "best_epoch": 0, "best_score": math.nan}
        self.state |= {"best_state": {}, "finished": False}
        second_order = getattr(objective, "second_order", False)
        self.accelerator = _accelerator(second_order, recipe.accumulate)
        # Convolutions are faster channels-last, second derivatives of batch norms much slower.
        layout = torch.contiguous_format if second_order else torch.channels_last
        self.model = model.to(self.accelerator.device, memory_format=layout)
        self.average, self.judged = None, self.model
        if recipe.ema:
            blend = partial(_blend, recipe.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=blend, use_buffers=True)
            self.judged = self.average.module
        self.batches = _Batches(len(train_set), recipe)
        loading["pin_memory"] = self.accelerator.device.type == "cuda"
        if getattr(train_set, "device", "") == "cuda":  # its images are there
            loading |= dict(num_workers=0, pin_memory=False)
        loader = DataLoader(train_set, batch_sampler=self.batches, **loading)
        # One fused kernel instead of one loop per parameter, which costs time on a CPU.
        kind = dict(lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
        kind |= {"momentum": 0.9} if recipe.optimizer == "sgd" else {}
        moving = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = OPTIMIZERS[recipe.optimizer](moving, **kind)
        self.trained, self.optimizer, self.loader = self.accelerator.prepare(
            _Trained(self.model), optimizer, loader
        )
        self.replays = getattr(objective, "replays", 1)
        steps = math.ceil(len(self.loader) * self.replays / recipe.accumulate)
        self.scheduler = LambdaLR(optimizer, _factor(recipe, steps))
        self.parts = {"average": self.average, "optimizer": self.optimizer}
        self.parts |= {"scheduler": self.scheduler, "scaler": self.accelerator.scaler}

    def start(self, resume: bool) -> None:
        """Take up what `run_dir` holds, or begin anew; remove files that a kill left unfinished."""
        set_seed(self.recipe.seed, device_specific=True)
        last = self.run_dir / "last.pt"
        saved = self.kept(last) if resume and last.is_file() else None
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            old = [] if saved else [last, last.with_name("best.pt"), last.with_name("metrics.csv")]
            for path in [*old, *self.run_dir.glob(".*.tmp.*")]:
                path.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        if saved:
            with files.reading(last, ANEW):
                self.restore(saved)

    def kept(self, last: Path) -> dict[str, Any]:
        """What `save` wrote into `last`, if it is whole and of this training."""
        saved = files.read_torch(last, ANEW)
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError(f"{last} is not of this `fit`: {ANEW}")
        with files.reading(last, ANEW):
            old, epoch, history = (saved[name] for name in ("settings", "epoch", "history"))
            needed = {"epoch", "seconds", "train_loss", old["monitor"]}
            told = [row["epoch"] for row in history if needed <= row.keys()]
            if told != list(range(1, len(told) + 1)) or not len(told) == epoch <= old["epochs"]:
                raise ValueError(f"it says epoch {epoch}, its history {len(told)} epochs")
        changed = [key for key in self.settings if old.get(key) != self.settings[key]]
        if changes := "; ".join(
            f"{key}: {old.get(key)} -> {self.settings[key]}" for key in changed
        ):
            text = f"{self.run_dir} holds a run with other settings ({changes}): "
            raise ValueError(text + "take another run_dir, or resume=False to start anew")
        return saved

    def restore(self, saved: dict[str, Any]) -> None:
        self.state = {name: saved[name] for name in self.state}
        models.load_strictly(self.judged, saved["best_state"], origin=f"{self.name}/last.pt")
        if not all(weight.isfinite().all() for weight in self.judged.parameters()):
            raise ValueError("its weights are not finite numbers")
        if self.accelerator.is_main_process:
            self.export(best=True)
        models.load_strictly(self.model, saved["model"], origin=f"{self.name}/last.pt")
        for name, part in self.parts.items():
            if part:
                part.load_state_dict(saved[name])
        rank = self.accelerator.process_index
        if rank < len(saved["random"]):
            _set_random_state(saved["random"][rank])
        log.info("%s: resumed after epoch %d of %d", self.name, saved["epoch"], self.recipe.epochs)

    def save(self) -> None:
        """last.pt first: it holds all the rest, so a kill between two files loses nothing."""
        content = {"format": FORMAT, "settings": self.settings, "model": self.model.state_dict()}
        content["random"] = gather_object([_random_state()])
        if self.accelerator.is_main_process:
            content |= {name: part and part.state_dict() for name, part in self.parts.items()}
            files.write_torch(content | self.state, self.run_dir / "last.pt")
            self.export(best=self.state["best_epoch"] == self.state["epoch"])

    def export(self, *, best: bool) -> None:
        """The files for readers; with `best` the judged model has the best weights."""
        state = self.state
        files.write_csv(pd.DataFrame(state["history"]), self.run_dir / "metrics.csv")
        if best:
            meta = {"epoch": state["best_epoch"], "monitor": self.recipe.monitor}
            meta |= {"score": state["best_score"], "settings": self.settings}
            models.save(self.judged, self.run_dir / "best.pt", meta=meta)

    def train(self, on_epoch: Callable | None, max_minutes: float | None, progress: bool) -> None:
        """Run the epochs that are left."""
        history, begun, batches = self.state["history"], time.monotonic(), len(self.loader)
        for row in history if on_epoch else ():
            on_epoch(dict(row))
        options = dict(total=self.recipe.epochs * batches, initial=self.state["epoch"] * batches)
        options["disable"] = not (progress and self.accelerator.is_main_process)
        with Bar(desc=f"train {self.name}", unit="batch", **options) as bar:
            if self.state["finished"]:
                bar.mark(self.reached(self.state["epoch"]))
            while not self.state["finished"]:
                # One epoch at least, so that there is a best.pt; epochs vary by a quarter.
                longest = 1.25 * max([row["seconds"] for row in history[-3:]], default=-math.inf)
                late = time.monotonic() - begun + longest > 60 * (max_minutes or math.inf)
                if broadcast_object_list([late])[0]:
                    raise OutOfTime(self.out_of_time(max_minutes))
                self.epoch(bar)
                if on_epoch:
                    on_epoch(dict(history[-1]))
        scores = {row[self.recipe.monitor] for row in history}
        if len(history) > 1 and len(scores) == 1 and not math.isnan(self.state["best_score"]):
            text = "%s: %s was %g in every epoch, so the first one was kept"
            log.info(text, self.name, self.recipe.monitor, scores.pop())

    def out_of_time(self, limit: float) -> str:
        """What a reader is told, with how to go on."""
        return (
            f"{self.name} stopped after {self.state['epoch']} of {self.recipe.epochs} epochs: the "
            f"next would not end within max_minutes = {limit:g}. What is done is kept: run again "
            "to go on from there (the same command, or Run All). For more time: --set max_minutes="
            f'{4 * limit:g} on the command line, CHANGES = {{"max_minutes": {4 * limit:g}}} in the '
            "notebook; None is no limit."
        )

    def reached(self, epoch: int) -> str:
        """Where the training stands in `epoch`, and how the last whole one ended."""
        text, monitor = f"epoch {epoch} of {self.recipe.epochs}", self.recipe.monitor
        for row in self.state["history"][-1:]:
            text += f", loss {row['train_loss']:.3f}"
            text += "" if monitor == "epoch" else f", {monitor} {row[monitor]:.3f}"
        return text

    def epoch(self, bar: Bar) -> None:
        """Train, judge, keep the best weights, save."""
        state, begun, monitor = self.state, time.monotonic(), self.recipe.monitor
        number = state["epoch"] + 1
        bar.set_postfix_str(self.reached(number))
        found = self.learn(number, bar) | self.measure(self.judged)
        row = {"epoch": number} | {name: float(value) for name, value in found.items()}
        row["seconds"] = round(time.monotonic() - begun, 3)
        # Every process must take the same decisions, so all take the main one's numbers.
        (row,) = broadcast_object_list([row])
        if monitor not in row:
            raise ValueError(f"monitor={monitor!r} is not among {', '.join(row)}")
        state["history"].append(row)
        score, sign = row[monitor], -1 if monitor.endswith("loss") else 1
        # A score that is not a number never beats one that is, but there is always a best.pt.
        if math.isnan(state["best_score"]) or sign * (score - state["best_score"]) > 0:
            weights = self.judged.state_dict().items()
            kept = {key: value.detach().cpu().clone() for key, value in weights}
            state |= {"best_epoch": number, "best_score": score, "best_state": kept}
        if math.isnan(score):
            log.warning("%s is not a number in epoch %d", monitor, number)
        stale = number - state["best_epoch"] >= (self.recipe.patience or math.inf)
        state |= {"epoch": number, "finished": stale or number >= self.recipe.epochs}
        self.state = state
        self.save()
        release_memory(at_once=state["finished"])
        bar.mark(self.reached(number))
        log.info("%s: %s", self.name, {key: round(value, 4) for key, value in row.items()})

    def learn(self, number: int, bar: Bar) -> dict[str, float]:
        """One pass over the training images."""
        # Accelerate counts epochs in every process and would tell the data set so after a resume.
        self.loader.set_epoch(number - 1)
        self.batches.shuffle(number - 1)
        if hasattr(self.train_set, "set_epoch"):
            self.train_set.set_epoch(number - 1)
        self.model.train()
        rate, last = self.scheduler.get_last_lr()[0], len(self.loader)
        sums = torch.zeros(3, device=self.accelerator.device)  # loss, right answers, images
        for batch, (x, y, *_) in enumerate(self.loader, 1):
            for _ in range(self.replays):
                sums += self.step(batch - 1, x, y)
            if batch % NAN_CHECK_EVERY == 0 or batch == last:
                self.check_finite(sums[0], f"epoch {number}, by batch {batch}")
            bar.update()
        if self.accelerator.num_processes > 1:
            # Running statistics differ between processes; the main one's are saved.
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)
        loss, right, images = self.accelerator.reduce(sums, "sum").tolist()
        row = {"lr": rate, "train_loss": loss / images}
        return row if math.isnan(right) else row | {"train_accuracy": right / images}

    def check_finite(self, loss: Tensor, when: str) -> None:
        """Refuse to go on, and to save, with a loss or weights that are no numbers.

        A gradient that is none is in the weights after its step, where the loss may still be fine;
        in half precision such steps are left out, and the scale ends at 0 if all are.
        """
        parts = {"the loss": loss} | dict(self.model.named_parameters())
        fine = {name: one.isfinite().all() for name, one in parts.items()}
        fine |= {name: ~one.isnan().any() for name, one in self.model.named_buffers()}
        flags = torch.stack([*fine.values()]).tolist()  # one wait for a GPU
        wrong = [name for name, good in zip(fine, flags, strict=True) if not good]
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < LOST:
            wrong.append("the gradient")
        if wrong:
            raise FloatingPointError(
                f"{wrong[0]} is no longer finite ({when}): lower lr (now {self.recipe.lr:g}) "
                f"or give clip_norm; {self.name} keeps the last whole epoch"
            )

    def step(self, number: int, x: Tensor, y: Any) -> Tensor:
        """One batch; returns (loss * images, right answers, images) without waiting for a GPU."""
        accelerator, recipe, images = self.accelerator, self.recipe, len(y)
        # Every image of a step weighs the same, also where the last group of batches is smaller.
        first = number - number % recipe.accumulate
        group = self.batches[first : first + recipe.accumulate]
        weight = recipe.accumulate * images / sum(map(len, group))
        if accelerator.num_processes > 1:  # Accelerate makes all batches of one size
            weight = recipe.accumulate / min(recipe.accumulate, len(self.loader) - first)
        with accelerator.accumulate(self.trained):
            loss, logits = self.objective(self.trained, x, y)
            accelerator.backward(loss * weight)  # which divides by `accumulate`
            if accelerator.sync_gradients and recipe.clip_norm:
                accelerator.clip_grad_norm_(self.trained.parameters(), recipe.clip_norm)
            self.optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
                if self.average:
                    self.average.update_parameters(self.model)
            self.optimizer.zero_grad()
        # An objective without logits (a detector's) has no right answers to count.
        right = math.nan if logits is None else (logits.detach().argmax(dim=1) == y).sum()
        parts = loss.detach() * images, right, images
        return torch.stack([torch.as_tensor(part).to(loss) for part in parts])


def _measure(model: nn.Module, val_set, val_metric, images: int) -> dict[str, float]:
    """Loss, accuracy and AUC (of class 1, or one against the rest) and `val_metric`'s."""
    row = {}
    if val_set is not None:
        logits, labels, _ = _logits(model, val_set, max(64, images))
        labels, score = torch.as_tensor(labels), logits.double().softmax(dim=1)
        row["val_loss"] = F.cross_entropy(logits.double(), labels).item()
        row["val_accuracy"] = (logits.argmax(dim=1) == labels).double().mean().item()
        row["val_auc"] = math.nan
        if logits.shape[1] == 2:  # probabilities saturate, and all images would tie at 1
            score = (logits[:, 1] - logits[:, 0]).double()
        if logits.isfinite().all() and len(labels.unique()) == logits.shape[1]:
            row["val_auc"] = float(roc_auc_score(labels, score, multi_class="ovr"))
    if val_metric is not None:
        with evaluating(model):
            row |= {name: float(value) for name, value in val_metric(model).items()}
    return row


def predict(
    model: nn.Module, data: Dataset | Tensor, *, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Class probabilities [N, K] (float64), labels [N] and row numbers [N], in the data's order.

    `data` is a tensor of images [N, C, H, W] (labels are then None) or a data set that yields
    (x, y) or (x, y, row). Runs on the model's device in eval mode; training flags are restored.
    """
    logits, labels, rows = _logits(model, data, batch_size)
    return logits.double().softmax(dim=1).numpy(), labels, rows


def log_odds(model: nn.Module, data: Dataset | Tensor) -> np.ndarray:
    """The score z1 - z0 [N] (float64) of a two-class model: rank by it, cut it at 0, not at 0.5.

    Unlike the probability (`scipy.special.expit` of it) it does not saturate: from about 37 on all
    probabilities are exactly 1. Raises: ValueError for a model with other than two logits.

    >>> log_odds(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.rand(3, 1, 4, 4)).shape
    (3,)
    """
    logits, _, _ = _logits(model, data, 64)
    if logits.shape[1] != 2:
        raise ValueError(f"log-odds need two logits, not {logits.shape[1]}; use predict")
    return (logits[:, 1].double() - logits[:, 0].double()).numpy()


@torch.inference_mode()
def _logits(
    model: nn.Module, data: Dataset | Tensor, batch_size: int
) -> tuple[Tensor, np.ndarray | None, np.ndarray]:
    data = TensorDataset(data) if isinstance(data, Tensor) else data
    device = device_of(model)
    logits, others = [], []
    with evaluating(model):
        # Without a generator of its own a loader draws from the global random stream.
        for batch in DataLoader(data, batch_size=batch_size, generator=torch.Generator()):
            logits.append(model(batch[0].to(device, non_blocking=True)).float())
            others.append(batch[1:3])
    together = torch.cat(logits).cpu()
    labels, rows, *_ = *(torch.cat(part).numpy() for part in zip(*others, strict=True)), None, None
    return together, labels, np.arange(len(together)) if rows is None else rows


def _accelerator(second_order: bool, accumulate: int) -> Accelerator:
    gpu = pick_device()[0] == "cuda"
    half = gpu and not second_order  # second derivatives underflow in half precision
    # is_bf16_supported() also says yes where bf16 is emulated (T4), hence the capability.
    modern = half and torch.cuda.get_device_capability() >= (8, 0)
    return Accelerator(
        cpu=not gpu,  # else the processes of torchrun on CPUs would ignore each other
        mixed_precision=("bf16" if modern else "fp16") if half else "no",
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
    )


def _blend(decay: float, averaged: list[Tensor], current: list[Tensor], steps: Tensor) -> None:
    """Moving average; its decay rises to `decay`, so that the start is soon forgotten."""
    rising = (1 + steps.item()) / (10 + steps.item())
    get_ema_multi_avg_fn(min(decay, rising))(averaged, current, steps)


def _factor(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """The rate's factor of `lr` by step, a function of the step alone: its state is one number."""
    steps, one_cycle = steps_per_epoch * recipe.epochs, recipe.schedule == "onecycle"
    # arXiv 1708.07120: from lr / 25 up to lr in 30 % of the steps, then down to almost 0.
    rise = 0.3 * steps if one_cycle else steps_per_epoch * recipe.warmup_epochs
    lowest = 4e-6 if one_cycle else recipe.lr_min / recipe.lr

    def cosine(start: float, end: float, share: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2

    def factor(step: int) -> float:
        if recipe.schedule == "constant":
            return 1.0
        if step < rise:
            return cosine(0.04, 1.0, step / rise) if one_cycle else 0.02 + 0.98 * step / rise
        return cosine(1.0, lowest, (step - rise) / (steps - rise))

    return factor


def _random_state() -> dict[str, Any]:
    """Python's, numpy's, torch's and all GPUs' states, in types that `weights_only` accepts."""
    name, keys, *others = np.random.get_state()  # noqa: NPY002 (libraries draw from it)
    state = {"python": random.getstate(), "numpy": [name, keys.tolist(), *others]}
    state["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return state | {"torch": torch.get_rng_state()}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """Random states and what Accelerate keeps once per process are the caller's again afterwards.

    Accelerate allows one precision per process; the caller may have an Accelerator of another.
    """
    before = _random_state()
    kept = [(s, dict(s)) for s in (AcceleratorState._shared_state, GradientState._shared_state)]
    try:
        for shared, _ in kept:
            shared.clear()
        yield
    finally:
        for shared, content in kept:
            shared.clear()
            shared.update(content)
        _set_random_state(before)
