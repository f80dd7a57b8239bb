"""The training loop: killed and resumed, refused, interrupted; what it counts, keeps, leaves alone.

Run as a script (`python tests/test_train.py FOLDER`) this file is the process that gets killed.
"""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from harm import HARM, full_disk
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from dlia_utils import models, objectives, train
from dlia_utils.train import FitResult, OutOfTime, fit, log_odds, predict

ROOT = Path(__file__).parents[1]


class Shifted(Dataset):
    """Noise images whose brightness tells the class; every epoch shifts them, as augmentation."""

    def __init__(self, size=20, pixels=16, seed=0, hook=lambda name: None):
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.arange(size) % 2
        self.x = 0.7 * torch.rand(size, 1, pixels, pixels, generator=generator)
        self.x += 0.2 * self.y.view(-1, 1, 1, 1)
        self.epoch, self.hook, self.seen = 0, hook, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.y)

    def __getitem__(self, row):
        self.seen.append((self.epoch, row))
        self.hook("image")
        return self.x[row].roll(self.epoch, dims=-1), self.y[row], row


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 2))


def run(run_dir, *, model=None, train_set=None, val_set="", objective=None, **options) -> FitResult:
    options = {"epochs": 3, "batch_size": 8, "progress": False, **options}
    sets = train_set or Shifted(), Shifted(seed=1) if val_set == "" else val_set
    loss = objective or objectives.cross_entropy()
    return fit(model or linear(), loss, *sets, run_dir=run_dir, **options)


def weights(model):
    return torch.cat([value.detach().flatten().float() for value in model.state_dict().values()])


def same(a, b) -> bool:
    """Bit-equal trees of tensors, lists, dicts and numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def never(*_):
    raise AssertionError("trained again")


never.settings = objectives.cross_entropy().settings


# Where the process dies: at the n-th image read, or as the n-th file moves into place. Each epoch
# reads 20 images and moves last.pt, best.pt (when it is the best so far) and metrics.csv.
KILLS = {
    "second epoch": ("image", 33),
    "half of last.pt written": ("half of last.pt", 2),
    "last.pt written, not yet moved": ("before last.pt", 2),
    "last.pt moved, metrics.csv not": ("after last.pt", 2),
    "best.pt moved": ("after best.pt", 1),
    "from outside": ("outside", 0),
}


def train_once(run_dir: Path, event: str | None, nth: int) -> None:
    """Train with all that is random (dropout, random start, order), die at the n-th `event`."""
    counts, replace, save = {}, os.replace, torch.save

    def happens(name):
        counts[name] = counts.get(name, 0) + 1
        if (name, counts[name]) == (event, nth):
            os.kill(os.getpid(), signal.SIGKILL)

    def watched_replace(source, target):
        happens(f"before {Path(target).name}")
        replace(source, target)
        happens(f"after {Path(target).name}")

    def watched_save(content, file):
        save(content, file)
        if "optimizer" in content:
            file.truncate(file.tell() // 2)
            happens("half of last.pt")
            file.seek(0)
            save(content, file)

    os.replace, torch.save = watched_replace, watched_save
    model = models.spectral_normalize(models.mobilenet_v2(width=0.1, seed=1))
    objective = objectives.pgd_adversarial(eps=0.03, steps=1)
    options = dict(schedule="onecycle", accumulate=2, clip_norm=1.0, ema=0.9)
    run(run_dir, model=model, train_set=Shifted(hook=happens), objective=objective, **options)


def in_child(run_dir: Path, event: str | None = None, nth: int = 0) -> int:
    """Fork (the imports are done once), train, return the signal that ended the child, or 0."""
    child = os.fork()
    if child == 0:
        try:
            train_once(run_dir, event, nth)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if event == "outside":
        while not (run_dir / "last.pt").exists():
            time.sleep(0.005)
        time.sleep(0.1)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def worker(folder: Path) -> None:
    torch.set_num_threads(1)
    report = {"straight": [in_child(folder / "straight")]}
    for name, (event, nth) in KILLS.items():
        report[name] = [in_child(folder / name, event, nth), in_child(folder / name)]
    (folder / "report.json").write_text(json.dumps(report))


def script(*command, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory) -> Path:
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork, which Windows has not")
    folder = tmp_path_factory.mktemp("killed")
    done = script(__file__, folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report.pop("straight") == [0], done.stderr
    assert report == {name: [signal.SIGKILL, 0] for name in KILLS}, done.stderr
    return folder


@pytest.mark.parametrize("name", KILLS)
def test_killed_and_resumed_is_the_same_as_never_killed(killed_runs, name):
    folders, saved = [killed_runs / "straight", killed_runs / name], []
    for folder in folders:
        saved.append(torch.load(folder / "last.pt", weights_only=True))
        for row in saved[-1]["history"]:
            row.pop("seconds")
    straight, resumed = saved
    assert straight["epoch"] == 3 and straight["finished"] and len(straight["history"]) == 3
    for part in straight:  # weights, best weights, optimiser, scheduler, history, random states
        assert same(straight[part], resumed[part]), part
    left = sorted(path.name for path in folders[1].iterdir())
    assert left == ["best.pt", "last.pt", "metrics.csv"]  # and no temporary file
    tables = [pd.read_csv(folder / "metrics.csv").drop(columns="seconds") for folder in folders]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    best = [torch.load(folder / "best.pt", weights_only=True)["state_dict"] for folder in folders]
    assert same(*best)


def test_a_finished_run_returns_at_once_with_its_weights(tmp_path):
    first_model, second_model = linear(), linear(seed=5)
    first = run(tmp_path, model=first_model)
    second = run(tmp_path, model=second_model, objective=never)
    assert torch.equal(weights(first_model), weights(second_model))
    pd.testing.assert_frame_equal(first.history, second.history)
    assert first.best_epoch == second.best_epoch


FOREIGN = {
    "a part is missing": lambda kept: kept.pop("epoch"),
    "no settings": lambda kept: kept.update(settings=None),
    "no history": lambda kept: kept["history"].clear(),
    "a row without its columns": lambda kept: kept["history"][0].pop("seconds"),
    "epochs that nobody trained": lambda kept: kept.update(epoch=10**9),
    "a wrong random state": lambda kept: kept.update(random=[{"python": 3}]),
    "another optimiser": lambda kept: kept.update(optimizer={}),
    "weights of another network": lambda kept: kept["best_state"].update(a=torch.ones(1)),
    "weights that are no numbers": lambda kept: kept["best_state"]["1.bias"].fill_(math.nan),
}


@pytest.mark.parametrize("harm", [*HARM, *FOREIGN])
def test_a_last_pt_that_is_damaged_or_foreign_is_named_with_the_fix(tmp_path, harm):
    run(tmp_path, epochs=1)
    last = tmp_path / "last.pt"
    if harm in HARM:
        last.write_bytes(HARM[harm](last.read_bytes()))
    else:
        kept = torch.load(last, weights_only=True)
        FOREIGN[harm](kept)
        torch.save(kept, last)
    best = (tmp_path / "best.pt").read_bytes()
    with pytest.raises(
        ValueError, match=r"/last\.pt is damaged.*delete it.*RESUME = False"
    ) as told:
        run(tmp_path, epochs=1)
    assert str(tmp_path) in str(told.value) and "Pytorch" not in str(told.value)
    assert (tmp_path / "best.pt").read_bytes() == best or harm not in HARM
    last.unlink()  # which the message names
    run(tmp_path, epochs=1)


def test_a_training_on_a_full_disk_says_so_and_goes_on_where_it_was(tmp_path):
    whole, after = linear(), linear()
    run(tmp_path / "whole", model=whole)

    def fill(row):
        if row["epoch"] == 1:
            limit.enter_context(full_disk())

    with contextlib.ExitStack() as limit, pytest.raises(OSError, match="no space left in") as told:
        run(tmp_path / "full", on_epoch=fill)
    assert str(tmp_path / "full") in str(told.value) and "delete" not in str(told.value)
    assert len(run(tmp_path / "full", model=after).history) == 3
    assert torch.equal(weights(whole), weights(after))


def test_a_run_with_numpy_numbers_is_read_back(tmp_path):
    options = {"val_metric": lambda model: {"val_share": np.float64(0.5)}, "monitor": "val_share"}
    options |= {"lr": np.float64(0.01), "weight_decay": np.float64(0.0), "schedule": "cosine"}
    first = run(tmp_path, **options)
    pd.testing.assert_frame_equal(run(tmp_path, **options).history, first.history)


def test_a_run_of_other_settings_or_a_foreign_file_is_refused_or_overwritten(tmp_path):
    run(tmp_path, config={"size": 16})
    with pytest.raises(ValueError, match=r"epochs: 3 -> 4; config: .*16.*32.*resume=False"):
        run(tmp_path, epochs=4, config={"size": 32})
    with pytest.raises(ValueError, match="objective"):
        run(tmp_path, config={"size": 16}, objective=objectives.cross_entropy_at(3.0))
    assert len(run(tmp_path, epochs=1, resume=False).history) == 1
    torch.save({"model": {}}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="RESUME = False"):
        run(tmp_path)


def test_the_budget_interrupts_and_the_next_call_goes_on_to_the_same_end(tmp_path):
    straight, resumed = linear(), linear()
    options = {"epochs": 4, "schedule": "cosine"}
    run(tmp_path / "straight", model=straight, **options)
    with pytest.raises(OutOfTime, match="budget stopped after 1 of 4 epochs"):
        run(tmp_path / "budget", max_minutes=1e-9, **options)
    assert len(pd.read_csv(tmp_path / "budget" / "metrics.csv")) == 1
    run(tmp_path / "budget", model=resumed, max_minutes=5, **options)
    assert torch.equal(weights(straight), weights(resumed))


def test_every_saved_epoch_is_told_and_what_the_listener_raises_ends_the_call(tmp_path):
    told = []

    def stop_at_two(row):
        saved = pd.read_csv(tmp_path / "metrics.csv")
        assert len(saved) == row["epoch"]  # saved before it is told
        if row["epoch"] == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        run(tmp_path, epochs=4, on_epoch=stop_at_two)
    result = run(tmp_path, epochs=4, on_epoch=told.append)
    assert told == result.history.to_dict("records") and len(told) == 4


def test_random_numbers_and_accelerates_state_stay_the_callers(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier test may have left
    mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    model, draws = linear(), []
    for trained in (True, True, False):  # really, found finished, not at all
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        if trained:
            run(tmp_path, model=model)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert draws[0] == draws[1] == draws[2]
    assert mine.mixed_precision == "bf16" and mine.gradient_accumulation_steps == 3
    assert Accelerator(cpu=True, mixed_precision="bf16").state.mixed_precision == "bf16"
    mine.state._reset_state()
    mine.gradient_state._reset_state()


def test_order_depends_on_seed_and_epoch_only_and_each_image_comes_once(tmp_path):
    def order(name, **options):
        data = Shifted()
        run(tmp_path / name, train_set=data, **options)
        return data.seen

    first = order("a")
    assert [epoch for epoch, _ in first] == [0] * 20 + [1] * 20 + [2] * 20
    for start in (0, 20, 40):
        assert sorted(row for _, row in first[start : start + 20]) == list(range(20))
    assert first[:20] != [(0, row) for _, row in first[20:40]]
    torch.rand(3)
    assert order("b", objective=objectives.pgd_adversarial(eps=0.1)) == first
    assert order("c", seed=1) != first
    data = Shifted(size=17)  # a last batch of one image is left out
    run(tmp_path / "d", model=models.mobilenet_v2(width=0.1), train_set=data, epochs=1)
    assert len(data.seen) == 16


@pytest.mark.parametrize("size", [20, 22])  # the last group is 4, or 6 of 8
def test_accumulation_equals_the_large_batch_also_in_a_smaller_last_group(tmp_path, size):
    models_of = {16: linear(), 8: linear()}
    for batch_size, model in models_of.items():
        options = {"batch_size": batch_size, "accumulate": 16 // batch_size, "epochs": 2}
        options |= {"train_set": Shifted(size=size), "monitor": "epoch", "optimizer": "sgd"}
        run(tmp_path / str(batch_size), model=model, lr=0.1, **options)
    torch.testing.assert_close(*map(weights, models_of.values()))
    saved = torch.load(tmp_path / "8" / "last.pt", weights_only=True)
    assert saved["scheduler"]["last_epoch"] == 4


def test_gradients_are_clipped_after_they_were_accumulated(tmp_path):
    moved, options = {}, dict(batch_size=10, accumulate=2, optimizer="sgd", lr=1.0, epochs=1)
    for clip_norm in (None, 1e-3):
        model = linear()
        run(tmp_path / str(clip_norm), model=model, clip_norm=clip_norm, **options)
        moved[clip_norm] = weights(model) - weights(linear())
    free, clipped = moved.values()
    assert clipped.norm() == pytest.approx(1e-3, rel=1e-3) and free.norm() > 1e-2
    torch.testing.assert_close(clipped / 1e-3, free / free.norm(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle"])
def test_the_rate_of_every_step(tmp_path, monkeypatch, schedule):
    seen, real = [], torch.optim.SGD.step

    def step(self, *arguments, **options):
        seen.append(self.param_groups[0]["lr"])
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    # 20 images, batches of 4, groups of 2: three steps an epoch, the last of one batch.
    options = {"batch_size": 4, "accumulate": 2, "optimizer": "sgd", "lr": 0.1, "epochs": 6}
    warm = {"warmup_epochs": 2, "lr_min": 0.001} if schedule == "cosine" else {}
    run(tmp_path, schedule=schedule, **warm, **options)
    rates, falling = np.array(seen), (1 + np.cos(np.pi * np.arange(12) / 12)) / 2
    assert len(rates) == 18
    if schedule == "constant":
        assert (rates == 0.1).all()
    elif schedule == "cosine":
        np.testing.assert_allclose(rates[:6], 0.1 * (0.02 + 0.98 * np.arange(6) / 6))
        np.testing.assert_allclose(rates[6:], 0.001 + 0.099 * falling)
    else:
        assert rates[0] == pytest.approx(0.004) and rates.argmax() in (5, 6)
        assert rates.max() <= 0.1 and rates[-1] < 0.002


def test_the_average_of_the_weights_is_what_is_validated_and_kept(tmp_path):
    seen, judged, model = [], [], linear()

    def objective(net, x, y):  # sees the weights before each step
        seen.append(weights(model).clone())
        return objectives.cross_entropy()(net, x, y)

    def metric(net):
        judged.append(weights(net).clone())
        return {"val_epoch": float(len(judged))}

    options = {"val_metric": metric, "monitor": "val_epoch", "ema": 0.5, "lr": 0.1}
    run(tmp_path, model=model, objective=objective, **options)
    average = seen[1]  # the weights after the first of three steps an epoch
    for steps, after in enumerate(seen[2:], 1):
        keep = min(0.5, (1 + steps) / (10 + steps))
        average = keep * average + (1 - keep) * after
        if steps in (2, 5):
            torch.testing.assert_close(judged[steps // 3], average)
    loaded = models.load(tmp_path / "best.pt", linear)
    assert torch.equal(weights(model), judged[-1]) and torch.equal(weights(loaded), judged[-1])


def test_a_known_number_of_epochs_without_validation_keeps_the_last_weights(tmp_path):
    alone, beside = linear(), linear()
    done = run(tmp_path / "a", model=alone, val_set=None, monitor="epoch", patience=1)
    assert (done.best_epoch, len(done.history)) == (3, 3)
    assert list(done.history) == ["epoch", "lr", "train_loss", "train_accuracy", "seconds"]
    # A validation set would have changed nothing but what is measured.
    run(tmp_path / "b", model=beside, monitor="epoch")
    assert torch.equal(weights(alone), weights(beside))
    assert torch.equal(weights(models.load(tmp_path / "a" / "best.pt", linear)), weights(alone))


def test_the_best_epoch_wins_a_nan_never_and_patience_stops(tmp_path):
    kept, model, scores = [], linear(), iter([0.4, 0.6, math.nan, 0.6, 0.5])

    def metric(model):
        assert not model.training
        kept.append(weights(model).clone())
        return {"val_robust": next(scores)}

    options = {"epochs": 9, "patience": 3, "monitor": "val_robust", "val_metric": metric}
    result = run(tmp_path / "a", model=model, val_set=None, **options)
    assert (result.best_epoch, result.best_score, len(result.history)) == (2, 0.6, 5)
    assert torch.equal(weights(model), kept[1]) and not torch.equal(kept[1], kept[4])
    assert torch.equal(weights(models.load(tmp_path / "a" / "best.pt", linear)), kept[1])
    assert not model.training
    nothing = {"monitor": "val_robust", "val_metric": lambda model: {"val_robust": math.nan}}
    result = run(tmp_path / "b", **nothing)
    assert result.best_epoch == 3 and (tmp_path / "b" / "best.pt").exists()


def test_a_loss_that_is_no_number_stops_and_the_last_whole_epoch_stays(tmp_path):
    calls = []

    def breaks(model, x, y):
        logits = model(x)
        calls.append(1)
        return F.cross_entropy(logits, y) * (math.nan if len(calls) == 5 else 1.0), logits

    with pytest.raises(FloatingPointError, match=r"epoch 2.*lower lr"):
        run(tmp_path, objective=breaks)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1
    assert len(run(tmp_path, objective=breaks).history) == 3  # and the next call goes on from there


def test_weights_that_are_no_numbers_stop_also_where_the_loss_is_fine(tmp_path):
    calls = []

    class Endless(torch.autograd.Function):
        """Nothing, with a gradient that is no number in the last batch of an epoch."""

        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (math.nan if len(calls) == 6 else 1.0)

    def breaks(model, x, y):
        logits = model(x)
        calls.append(1)
        return Endless.apply(F.cross_entropy(logits, y)), logits

    with pytest.raises(FloatingPointError, match=r"1\.weight.*epoch 2.*lower lr"):
        run(tmp_path, objective=breaks)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("loss", "the loss is"),
        ("scale", "the gradient is"),
        ("buffer", "0.running_mean is"),
        ("", ""),
    ],
)
def test_each_thing_that_must_stay_finite_is_named(what, words):
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].running_mean[0] = math.nan if what == "buffer" else 0.0
    model[0].running_var[0] = math.inf  # a bound or a mask may be infinite
    scaler = SimpleNamespace(get_scale=lambda: 1e-9 if what == "scale" else 1.0)  # half precision's
    recipe, accelerator = SimpleNamespace(lr=0.1), SimpleNamespace(scaler=scaler)
    run = SimpleNamespace(model=model, accelerator=accelerator, recipe=recipe, name="a")
    loss = torch.tensor(math.inf if what == "loss" else 1.0)
    with pytest.raises(FloatingPointError, match=words) if what else nullcontext():
        train._Run.check_finite(run, loss, "epoch 1")


def test_the_model_learns_what_there_is_to_learn(tmp_path):
    result = run(tmp_path / "a", epochs=30, lr=0.01)
    loss, auc = result.history["train_loss"], result.history["val_auc"]
    assert loss.iloc[-1] < loss.iloc[0] and result.best_score == auc.max() > 0.9
    expected = "epoch lr train_loss train_accuracy val_loss val_accuracy val_auc seconds".split()
    assert list(result.history) == expected
    result = run(tmp_path / "b", monitor="val_loss", lr=0.01)
    assert result.best_score == result.history["val_loss"].min()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "adam, adamw, sgd"),
        ({"schedule": "cosine", "warmup_epochs": 3}, "fewer than epochs"),
        ({"monitor": "val_f1"}, "val_f1"),
        ({"val_set": None}, "give a val_set or a val_metric"),
    ],
)
def test_unusable_arguments_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_predict_returns_rows_in_order_and_leaves_the_model_alone():
    data, model = Shifted(size=7), nn.Sequential(linear(), nn.Dropout()).train()
    state = torch.get_rng_state()
    probabilities, labels, rows = predict(model, data, batch_size=3)
    assert torch.equal(torch.get_rng_state(), state) and model.training and model[1].training
    with torch.no_grad():
        np.testing.assert_allclose(probabilities, model[0](data.x).softmax(1), atol=1e-6)
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 0] and rows.tolist() == list(range(7))
    again, none, _ = predict(model, data.x)
    np.testing.assert_allclose(again, probabilities, atol=1e-7)
    assert none is None
    _, _, rows = predict(model, TensorDataset(data.x, data.y, data.y + 40))
    assert rows.tolist() == [40, 41, 40, 41, 40, 41, 40]


def test_log_odds_do_not_saturate_and_ask_for_two_classes():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model[1].weight.data = torch.tensor([[0.0] * 4, [100.0] * 4])
    model[1].bias.data.zero_()
    x = torch.tensor([0.5, 0.7, 0.9])[:, None, None, None].expand(3, 1, 2, 2)
    assert log_odds(model, x).tolist() == pytest.approx([200, 280, 360])
    assert (predict(model, x)[0][:, 1] == 1).all()
    with pytest.raises(ValueError, match="two logits"):
        log_odds(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), x)


DDP = """
import sys, torch
from torch.distributed import all_gather, get_rank, get_world_size
sys.path.insert(0, sys.argv[1])
from test_train import Shifted, models, objectives, run, weights
torch.set_num_threads(1)
adversarial, smooth = objectives.pgd_adversarial(eps=0.03), objectives.lipschitz()
for objective in (adversarial, smooth):
    model, data = models.mobilenet_v2(width=0.1), Shifted(size=32)
    folder = f"{sys.argv[2]}/{objective.settings['name']}"
    options = dict(objective=objective, epochs=2, accumulate=2)
    result = run(folder, model=model, train_set=data, **options)
    everyone = [torch.empty_like(weights(model)) for _ in range(get_world_size())]
    all_gather(everyone, weights(model))
    assert torch.equal(*everyone) and len(result.history) == 2
    assert len(data.seen) == 32, len(data.seen)  # each process reads its half of every epoch
if get_rank() == 0:
    open(f"{sys.argv[2]}/passed", "w").close()
"""


def test_two_processes_train_one_model(tmp_path):
    (tmp_path / "script.py").write_text(DDP)
    command = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    command += [tmp_path / "script.py", Path(__file__).parent, tmp_path]
    done = script(*command, CUDA_VISIBLE_DEVICES="")
    # The file and not the exit code: gloo was seen to abort now and then after all work was done.
    assert (tmp_path / "passed").exists(), done.stderr[-3000:]
    left = {path.name for path in (tmp_path / "lipschitz").iterdir()}
    assert left == {"best.pt", "last.pt", "metrics.csv"}


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
