"""The training loop: killed and resumed, refused, interrupted; what it counts, keeps and leaves alone.

Run as a script (`python tests/test_train.py FOLDER`) this file is the process that gets killed.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from dlia_utils import models, objectives
from dlia_utils.train import FitResult, fit, log_odds, predict

ROOT = Path(__file__).parents[1]


class Shifted(Dataset):
    """Noise images whose brightness tells the class; every epoch shifts them, as augmentation would."""

    def __init__(self, size=20, pixels=16, seed=0, hook=None):
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
        if self.hook:
            self.hook("image")
        return self.x[row].roll(self.epoch, dims=-1), self.y[row], row


def linear(pixels=16, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels * pixels, 2))


def run(run_dir, *, model=None, train_set=None, objective=None, epochs=3, **options) -> FitResult:
    options = {"batch_size": 8, "progress": False, **options}
    model = linear() if model is None else model
    train_set = Shifted() if train_set is None else train_set
    objective = objective or objectives.cross_entropy()
    return fit(
        model, objective, train_set, Shifted(seed=1), run_dir=run_dir, epochs=epochs, **options
    )


def same(a, b) -> bool:
    """Bit-equal trees of tensors, lists, dicts and numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


# ------------------------------------------------------------------ kill -9 and resume

# Where the process dies: at the n-th image read, or just before or after the n-th file is moved into place.
# Each epoch reads 20 images and moves last.pt, best.pt (when it is the best so far) and metrics.csv.
KILLS = {
    "first epoch": ("image", 7),
    "second epoch": ("image", 33),
    "half of last.pt written": ("half of last.pt", 2),
    "last.pt written, not yet moved": ("before last.pt", 2),
    "last.pt moved, metrics.csv not": ("after last.pt", 2),
    "metrics.csv written, not yet moved": ("before metrics.csv", 1),
    "best.pt moved": ("after best.pt", 1),
    "last epoch saved": ("after last.pt", 3),
    "from outside": ("outside", 0),
}


def train_once(run_dir: Path, event: str | None, nth: int) -> None:
    """Train with all that is random (dropout, random start, order), die at the n-th `event`."""
    counts = {}

    def happens(name):
        counts[name] = counts.get(name, 0) + 1
        if (name, counts[name]) == (event, nth):
            os.kill(os.getpid(), signal.SIGKILL)

    replace, save = os.replace, torch.save

    def watched_replace(source, target):
        happens(f"before {Path(target).name}")
        replace(source, target)
        happens(f"after {Path(target).name}")

    def watched_save(content, path):
        save(content, path)
        if "optimizer" in content:
            size = Path(path).stat().st_size
            os.truncate(path, size // 2)
            happens("half of last.pt")
            save(content, path)

    os.replace, torch.save = watched_replace, watched_save
    model = models.spectral_normalize(models.mobilenet_v2(width=0.1, seed=1))
    objective = objectives.pgd_adversarial(eps=0.03, steps=1)
    run(
        run_dir,
        model=model,
        train_set=Shifted(hook=happens),
        objective=objective,
        schedule="onecycle",
        accumulate=2,
        clip_norm=1.0,
        ema=0.9,
    )


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


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory) -> Path:
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork, which Windows has not")
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report.pop("straight") == [0], done.stderr
    assert report == {name: [signal.SIGKILL, 0] for name in KILLS}, done.stderr
    return folder


@pytest.mark.parametrize("name", KILLS)
def test_killed_and_resumed_is_the_same_as_never_killed(killed_runs, name):
    straight, resumed = (
        torch.load(killed_runs / run_name / "last.pt", weights_only=True)
        for run_name in ("straight", name)
    )
    for saved in (straight, resumed):
        for row in saved["history"]:
            row.pop("seconds")
    assert straight["epoch"] == 3 and straight["finished"] and len(straight["history"]) == 3
    for part in straight:  # weights, best weights, optimiser, scheduler, history, random states
        assert same(straight[part], resumed[part]), part

    files = ["best.pt", "last.pt", "metrics.csv"]
    assert (
        sorted(path.name for path in (killed_runs / name).iterdir()) == files
    )  # and no temporary file
    tables = [
        pd.read_csv(killed_runs / run_name / "metrics.csv").drop(columns="seconds")
        for run_name in ("straight", name)
    ]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    best = [
        models.load(killed_runs / run_name / "best.pt", build) for run_name in ("straight", name)
    ]
    assert same(*(model.state_dict() for model in best))


def build():
    return models.mobilenet_v2(width=0.1)


# ------------------------------------------------------------------ resume within a process


def test_a_finished_run_returns_at_once_with_its_weights(tmp_path):
    def never(*_):
        raise AssertionError("trained again")

    first_model, second_model = linear(), linear(seed=5)
    first = run(tmp_path, model=first_model)
    never.settings = objectives.cross_entropy().settings
    second = run(tmp_path, model=second_model, objective=never)
    assert same(first_model.state_dict(), second_model.state_dict())
    pd.testing.assert_frame_equal(first.history, second.history)
    assert (first.best_epoch, first.best_score, first.status) == (
        second.best_epoch,
        second.best_score,
        "done",
    )
    assert first.seconds == pytest.approx(first.history["seconds"].sum())


def test_a_run_of_other_settings_is_refused_forced_or_overwritten(tmp_path):
    run(tmp_path, config={"size": 16})
    with pytest.raises(ValueError, match=r"epochs: 3 -> 4; config: .*16.*32.*force"):
        run(tmp_path, epochs=4, config={"size": 32})
    with pytest.raises(ValueError, match="objective"):
        run(tmp_path, config={"size": 16}, objective=objectives.cross_entropy_at(3.0))
    forced = run(tmp_path, epochs=4, resume="force")
    assert forced.history["epoch"].tolist() == [1, 2, 3, 4]
    anew = run(tmp_path, epochs=1, resume=False)
    assert len(anew.history) == 1 == len(pd.read_csv(tmp_path / "metrics.csv"))


def test_a_foreign_last_pt_is_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="resume=False"):
        run(tmp_path)


def test_the_budget_interrupts_and_the_next_call_goes_on_to_the_same_end(tmp_path):
    straight, resumed = linear(), linear()
    run(tmp_path / "straight", model=straight, epochs=4, schedule="cosine")
    options = {"epochs": 4, "schedule": "cosine"}
    first = run(tmp_path / "budget", model=linear(), max_minutes=1e-9, **options)
    assert (first.status, len(first.history), first.best_epoch) == ("interrupted", 1, 1)
    second = run(tmp_path / "budget", model=resumed, max_minutes=5, **options)
    assert (second.status, len(second.history)) == ("done", 4)
    assert same(straight.state_dict(), resumed.state_dict())


def test_the_caller_goes_on_with_the_same_random_numbers_whether_trained_or_not(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    model, draws = linear(), []
    for trained in (True, True, False):  # really, found finished, not at all
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        if trained:
            run(tmp_path, model=model)
        draws.append(draw())
    assert draws[0] == draws[1] == draws[2]


# ------------------------------------------------------------------ what is learnt and kept


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


def test_accumulation_equals_the_large_batch_and_steps_the_last_incomplete_group(tmp_path):
    together, apart = linear(), linear()
    options = {"epochs": 2, "optimizer": "sgd", "lr": 0.1}
    run(
        tmp_path / "a", model=together, batch_size=8, monitor="epoch", **options
    )  # batches of 8, 8, 4
    run(
        tmp_path / "b", model=apart, batch_size=4, accumulate=2, monitor="epoch", **options
    )  # 4+4, 4+4, 4
    torch.testing.assert_close(together.state_dict(), apart.state_dict())
    steps = torch.load(tmp_path / "b" / "last.pt", weights_only=True)["scheduler"]["last_epoch"]
    assert steps == 6


def test_a_last_batch_of_one_image_is_left_out(tmp_path):
    data = Shifted(size=17)
    run(tmp_path, model=models.mobilenet_v2(width=0.1), train_set=data, epochs=1)
    assert len(data.seen) == 16


@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle"])
def test_schedules(tmp_path, schedule):
    rates = run(tmp_path, epochs=10, lr=0.01, schedule=schedule).history["lr"].to_numpy()
    if schedule == "constant":
        assert (rates == 0.01).all()
    elif schedule == "cosine":
        np.testing.assert_allclose(rates, 0.01 * (1 + np.cos(np.pi * np.arange(10) / 10)) / 2)
    else:
        assert rates[0] == pytest.approx(0.0004) and rates[3] == rates.max() == pytest.approx(0.01)
        assert rates[-1] < 0.002


def test_cosine_after_a_warm_up_over_the_real_number_of_steps(tmp_path, monkeypatch):
    seen = []
    real = torch.optim.SGD.step

    def step(self, *arguments, **options):
        seen.append(self.param_groups[0]["lr"])
        return real(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    # 20 images, batches of 4, groups of 2: three steps an epoch, the last of one batch.
    options = {"batch_size": 4, "accumulate": 2, "optimizer": "sgd", "lr": 0.1, "epochs": 6}
    run(tmp_path, schedule="cosine", warmup_epochs=2, lr_min=0.001, **options)
    rates = np.array(seen)
    assert len(rates) == 18
    np.testing.assert_allclose(rates[:6], 0.1 * (0.02 + 0.98 * np.arange(6) / 6))
    falling = np.arange(12) / 12
    np.testing.assert_allclose(rates[6:], 0.001 + 0.099 * (1 + np.cos(np.pi * falling)) / 2)
    assert rates[-1] < 0.004  # the original study's cosine ended at a seventh of its top


def test_every_image_of_a_step_weighs_the_same_also_in_a_smaller_last_batch(tmp_path):
    """22 images in batches of 8: the last group is 6 images; with a mean of batch means 8 + 6 would not be one step."""
    together, apart = linear(), linear()
    options = {
        "epochs": 2,
        "optimizer": "sgd",
        "lr": 0.1,
        "monitor": "epoch",
        "train_set": Shifted(size=22),
    }
    run(tmp_path / "a", model=together, batch_size=16, **options)
    run(tmp_path / "b", model=apart, batch_size=8, accumulate=2, **options)
    torch.testing.assert_close(together.state_dict(), apart.state_dict())


def test_gradients_are_clipped_after_they_were_accumulated(tmp_path):
    free, clipped, start = linear(), linear(), linear()
    options = {"epochs": 1, "optimizer": "sgd", "lr": 1.0, "batch_size": 10, "accumulate": 2}
    run(tmp_path / "a", model=free, **options)
    run(tmp_path / "b", model=clipped, clip_norm=1e-3, **options)

    def moved(model):
        steps = [new - old for new, old in zip(model.parameters(), start.parameters(), strict=True)]
        return torch.cat([step.detach().flatten() for step in steps])

    assert moved(clipped).norm() == pytest.approx(1e-3, rel=1e-3) and moved(free).norm() > 1e-2
    torch.testing.assert_close(
        moved(clipped) / 1e-3, moved(free) / moved(free).norm(), atol=1e-4, rtol=1e-3
    )


def test_the_average_of_the_weights_is_what_is_validated_and_kept(tmp_path):
    seen, judged, model = [], [], linear()

    def objective(net, x, y):  # sees the weights before each step
        seen.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
        return objectives.cross_entropy()(net, x, y)

    def metric(net):
        judged.append(torch.cat([p.detach().flatten().clone() for p in net.parameters()]))
        return {"val_epoch": float(len(judged))}

    run(
        tmp_path,
        model=model,
        objective=objective,
        val_metric=metric,
        monitor="val_epoch",
        ema=0.5,
        lr=0.1,
    )
    after = [*seen[1:], None]  # the weights after each step; three steps an epoch
    average = after[0]
    for steps, weights in enumerate(after[1:8], 1):
        keep = min(0.5, (1 + steps) / (10 + steps))
        average = keep * average + (1 - keep) * weights
        if steps in (2, 5):
            torch.testing.assert_close(judged[steps // 3], average)
    kept = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(kept, judged[-1])
    loaded = models.load(tmp_path / "best.pt", linear)
    assert torch.equal(torch.cat([p.detach().flatten() for p in loaded.parameters()]), judged[-1])


def test_a_validation_set_may_be_left_out_but_not_all_that_chooses(tmp_path):
    options = {"run_dir": tmp_path, "epochs": 2, "progress": False}
    metric = scripted([0.1, 0.2])
    done = fit(
        linear(),
        objectives.cross_entropy(),
        Shifted(),
        None,
        val_metric=metric,
        monitor="val_robust",
        **options,
    )
    assert done.best_epoch == 2 and "val_loss" not in done.history
    with pytest.raises(ValueError, match="give a val_set, a val_metric"):
        fit(linear(), objectives.cross_entropy(), Shifted(), None, **options)


def test_a_known_number_of_epochs_without_validation_keeps_the_last_weights(tmp_path):
    options = {"epochs": 3, "batch_size": 8, "progress": False}
    alone, beside, weights = linear(), linear(), []

    def watched(model, x, y):
        weights.append(model.model[1].weight.detach().clone())
        return objectives.cross_entropy()(model, x, y)

    done = fit(
        alone,
        watched,
        Shifted(),
        None,
        run_dir=tmp_path / "a",
        monitor="epoch",
        patience=1,
        **options,
    )
    assert (done.best_epoch, done.status, len(done.history)) == (3, "done", 3)
    assert list(done.history) == ["epoch", "lr", "train_loss", "train_accuracy", "seconds"]
    assert not any(
        torch.equal(alone[1].weight, earlier) for earlier in weights
    )  # not those before the last step
    # A validation set would have changed nothing but what is measured.
    run(tmp_path / "b", model=beside, monitor="epoch")
    assert same(alone.state_dict(), beside.state_dict())
    assert same(models.load(tmp_path / "a" / "best.pt", linear).state_dict(), alone.state_dict())
    options["run_dir"] = tmp_path / "c"
    for monitor in ("val_auc", "val_loss"):
        with pytest.raises(ValueError, match='give a val_set.*monitor="epoch"'):
            fit(linear(), watched, Shifted(), None, monitor=monitor, **options)
    assert not (tmp_path / "c").exists()


def test_every_saved_epoch_is_told_and_what_the_listener_raises_ends_the_call(tmp_path):
    told, straight, resumed = [], linear(), linear()
    run(tmp_path / "straight", model=straight, epochs=4)

    def stop_at_two(row):
        assert (
            len(pd.read_csv(tmp_path / "run" / "metrics.csv")) == row["epoch"]
        )  # saved before it is told
        if row["epoch"] == 2:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        run(tmp_path / "run", model=linear(), epochs=4, on_epoch=stop_at_two)
    result = run(tmp_path / "run", model=resumed, epochs=4, on_epoch=told.append)
    assert told == result.history.to_dict("records") and [row["epoch"] for row in told] == [
        1,
        2,
        3,
        4,
    ]
    assert same(straight.state_dict(), resumed.state_dict())
    run(tmp_path / "run", epochs=4, on_epoch=told.append)  # a finished run tells its story again
    assert told[4:] == told[:4]


def scripted(values):
    values = iter(values)
    return lambda model: {"val_robust": next(values)}


def test_the_best_epoch_wins_a_nan_never_and_patience_stops(tmp_path):
    snapshots, model, nan = [], linear(), math.nan
    scores = scripted([0.4, 0.6, nan, 0.6, 0.5])

    def metric(model):
        assert not model.training
        snapshots.append({key: value.clone() for key, value in model.state_dict().items()})
        return scores(model)

    result = run(
        tmp_path, model=model, epochs=9, monitor="val_robust", val_metric=metric, patience=3
    )
    assert (result.best_epoch, result.best_score, len(result.history)) == (2, 0.6, 5)
    assert same(model.state_dict(), snapshots[1]) and not same(snapshots[1], snapshots[4])
    assert same(models.load(tmp_path / "best.pt", linear).state_dict(), snapshots[1])
    assert not model.training


def test_a_monitor_that_never_moved_is_told(tmp_path, caplog):
    run(tmp_path / "a", monitor="val_robust", val_metric=scripted([0.0] * 3))
    assert "a: val_robust was 0 in every epoch, so the first one was kept" in caplog.text
    caplog.clear()
    run(tmp_path / "b", monitor="val_robust", val_metric=scripted([0.0, 0.1, 0.0]))
    run(tmp_path / "c", monitor="val_robust", val_metric=scripted([math.nan] * 3))
    run(tmp_path / "d", monitor="val_robust", val_metric=scripted([0.0]), epochs=1)
    assert "so the first one was kept" not in caplog.text


def test_a_loss_is_better_when_smaller_and_without_any_score_the_last_weights_are_kept(tmp_path):
    result = run(tmp_path / "a", monitor="val_loss", lr=0.01)
    assert result.best_score == result.history["val_loss"].min()
    metric = scripted([math.nan] * 3)
    result = run(tmp_path / "b", monitor="val_robust", val_metric=metric)
    assert (
        result.best_epoch == 3
        and math.isnan(result.best_score)
        and (tmp_path / "b" / "best.pt").exists()
    )


def test_a_loss_that_is_no_number_stops_and_the_last_whole_epoch_stays(tmp_path):
    def breaks(model, x, y):
        logits = model(x)
        breaks.calls += 1
        return F.cross_entropy(logits, y) * (math.nan if breaks.calls == 5 else 1.0), logits

    breaks.calls = 0
    with pytest.raises(FloatingPointError, match=r"epoch 2.*lower lr"):
        run(tmp_path, objective=breaks)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1
    assert len(run(tmp_path, objective=breaks).history) == 3  # and the next call goes on from there


def test_the_model_learns_what_there_is_to_learn(tmp_path):
    result = run(tmp_path, epochs=30, lr=0.01)
    loss = result.history["train_loss"]
    assert (
        loss.iloc[-1] < loss.iloc[0] and result.best_score == result.history["val_auc"].max() > 0.9
    )
    expected = "epoch lr train_loss train_accuracy val_loss val_accuracy val_auc seconds".split()
    assert list(result.history) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "adam, adamw, sgd"),
        ({"schedule": "step"}, "onecycle"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"patience": 0}, "patience"),
        ({"resume": "yes"}, "force"),
        ({"train_set": Shifted(size=1)}, "two images"),
        ({"monitor": "val_f1"}, "val_f1"),
        ({"ema": 1.0}, "ema"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"schedule": "cosine", "warmup_epochs": 3}, "fewer than epochs"),
        ({"warmup_epochs": 1}, "schedule='cosine'"),
    ],
)
def test_unusable_arguments_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ predict


def test_predict_returns_rows_in_order_and_leaves_the_model_alone():
    data, model = Shifted(size=7), nn.Sequential(linear(), nn.Dropout()).train()
    state = torch.get_rng_state()
    probabilities, labels, rows = predict(model, data, batch_size=3)
    assert torch.equal(torch.get_rng_state(), state) and model.training and model[1].training
    with torch.no_grad():
        np.testing.assert_allclose(probabilities, model[0](data.x).softmax(1), atol=1e-6)
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 0] and rows.tolist() == list(range(7))
    again, none, _ = predict(model, data.x, batch_size=64)
    np.testing.assert_allclose(again, probabilities, atol=1e-7)
    assert none is None
    _, _, rows = predict(model, TensorDataset(data.x, data.y, data.y + 40))
    assert rows.tolist() == [40, 41, 40, 41, 40, 41, 40]


# ------------------------------------------------------------------ two processes


DDP = """
import sys, torch
from torch.distributed import all_gather, get_rank, get_world_size
sys.path.insert(0, sys.argv[1])
from test_train import Shifted, models, objectives, run
torch.set_num_threads(1)
for name, objective in {
    "adversarial": objectives.pgd_adversarial(eps=0.03), "lipschitz": objectives.lipschitz(),
}.items():
    model, data = models.mobilenet_v2(width=0.1), Shifted(size=32)
    folder = f"{sys.argv[2]}/{name}"
    result = run(folder, model=model, train_set=data, objective=objective, epochs=2, accumulate=2)
    weights = torch.cat([value.flatten().float() for value in model.state_dict().values()])
    everyone = [torch.empty_like(weights) for _ in range(get_world_size())]
    all_gather(everyone, weights)
    assert torch.equal(*everyone) and len(result.history) == 2
    # Each process reads its half of every epoch.
    assert len(data.seen) == 32, len(data.seen)
if get_rank() == 0:
    open(f"{sys.argv[2]}/passed", "w").close()
"""


def test_two_processes_train_one_model(tmp_path):
    (tmp_path / "script.py").write_text(DDP)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "script.py"), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    # The file and not the exit code: gloo was seen to abort now and then after all work was done.
    assert (tmp_path / "passed").exists(), done.stderr[-3000:]
    for name in ("adversarial", "lipschitz"):
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "best.pt",
            "last.pt",
            "metrics.csv",
        }


def test_log_odds_do_not_saturate_and_ask_for_two_classes():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model[1].weight.data, model[1].bias.data = (
        torch.tensor([[0.0] * 4, [100.0] * 4]),
        torch.zeros(2),
    )
    x = torch.tensor([0.5, 0.7, 0.9])[:, None, None, None].expand(3, 1, 2, 2)
    assert log_odds(model, x).tolist() == pytest.approx([200, 280, 360])
    assert (predict(model, x)[0][:, 1] == 1).all()
    with pytest.raises(ValueError, match="two logits"):
        log_odds(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), x)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
