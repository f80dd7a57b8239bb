"""What a plan counts is what hooks count; what it says of a budget, and how a run keeps to it."""

import contextlib
import re
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from small import linear, small_batch
from torch import nn
from torch.utils.data import TensorDataset

from dlia_utils import __main__ as cli
from dlia_utils import execute, models, objectives, plan, smoothing, study, suite, train
from dlia_utils.attacks import checklist, evaluate
from dlia_utils.data import datasets, sources
from dlia_utils.explain import attribution, drift
from dlia_utils.models import detector
from tools import notebooks

GRID = (1 / 255, 4 / 255, 8 / 255)
SHORT = {"apgd_ce": {"steps": 4}, "fmn": {"steps": 3}, "square": {"steps": 7}}
ASKED = 40  # by `robust` itself: whether the model is steady, and the folded copy the same


@contextlib.contextmanager
def counted(*models):
    """Image-passes of the models and of their copies: forward, and backward from their logits."""
    made = np.zeros(2, dtype=int)

    def backward(gradient):
        made[1] += len(gradient)

    def forward(_module, inputs, output):
        made[0] += len(inputs[0])
        if output.requires_grad:  # what is handed on is another tensor: a pass back counts once
            output.register_hook(backward)
            return output * 1
        return None

    hooks = [model.register_forward_hook(forward) for model in models]
    yield made
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The notebooks as their sources are now."""
    folder = tmp_path_factory.mktemp("suite") / "notebooks"
    folder.mkdir()
    for source in notebooks.sources():
        notebooks.write(notebooks.build(source), folder / notebooks.product(source).name)
    return folder


def convolutional(classes=2):
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes))


def steadfast(classes=2):
    """A model that nothing in [0, 1] fools, whose gradient is not zero; images, labels."""
    model, (x, _) = linear(classes=classes).eval(), small_batch()
    with torch.no_grad():
        model[1].bias[0] += 100
    return model, x, torch.zeros(len(x), dtype=torch.int64)


# ---------------------------------------- attacks


@pytest.mark.parametrize("options", [{}, {"restarts": 2}, {"restarts": 0}], ids=str)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", evaluate.KINDS)
def test_an_attack_that_fools_nobody_makes_the_passes_that_are_told(name, classes, options):
    kind = evaluate.KINDS[name]
    own = dict(kind.options) | {k: v for k, v in options.items() if k in kind.parameters}
    own |= {k: n for k, n in (("population", 5), ("iterations", 2)) if k in own}
    if options.get("restarts") == 0 and name != "pgd_ce":
        return  # the others start at random
    for fragile in (False, True):
        model, x, y = steadfast(classes)
        model, y = (linear(classes=classes).eval(), small_batch()[1]) if fragile else (model, y)
        found = kind.run(model, x, y, own, eps=8 / 255, seed=0)
        most = np.array(evaluate.passes(name, own, classes=classes)) * len(x)
        told = np.array([found.forwards, found.backwards])
        assert (told <= most).all() and (fragile or (told == most).all())


SUITES = [{}, {"full_at": 4 / 255}, {"at": {"square": GRID[1:2]}}]
SUITES += [{"full_at": 4 / 255, "most": {"square": 2}}, {"steps": 3, "restarts": 2}]


@pytest.mark.parametrize("options", SUITES, ids=str)
def test_a_suite_makes_at_most_the_passes_that_are_told(options):
    how = dict(attacks=evaluate.LINF, fast=False, progress=False) | options
    how["budgets"] = SHORT | {"one_pixel": {"population": 4, "iterations": 1}}
    for fragile in (False, True):
        model, x, y = (linear().eval(), *small_batch()) if fragile else steadfast()
        with counted(model) as made:
            found = evaluate.robust(model, (x, y), GRID, **how)
        spent = found.cost[["forwards", "backwards"]].sum().to_numpy()
        most = evaluate.most_passes(len(x), GRID, **how)
        assert (spent <= most).all() and abs(made[0] - spent[0]) <= ASKED
        standing = not fragile and not {"most", "full_at"} & set(options)
        assert not standing or (spent == most).all()
        with counted(model) as made:
            checklist.report(found, subset=3)
        assert (made <= checklist.most_passes(len(x), subset=3, **how)).all()


# ---------------------------------------- trainings


MAKERS = dict.fromkeys(objectives.PASSES, 0) | {"fast_adversarial": 1, "gairat": 10}  # steps
MAKERS |= dict.fromkeys(("pgd_adversarial", "pgd_awp", "trades", "mart", "hat"), 2)


def objective(name, other):
    given = {"eps": 4 / 255} if MAKERS[name] or name == "free_adversarial" else {}
    given |= {"temperature": 2.0} if name in ("cross_entropy_at", "distillation") else {}
    given |= {"sigma": 0.1} if name == "gaussian_noise" else {}
    given |= {"penalty": 0.1} if name == "margin_gradient" else {}
    args = [other] if name in ("hat", "distillation") else []
    return getattr(objectives, name)(*args, **given)


class Read(torch.utils.data.Dataset):
    """Images with labels, and how often one was asked for."""

    def __init__(self, x, y):
        self.x, self.y, self.count = x, y, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.count += 1
        return self.x[index], self.y[index]


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"detection"}))
def test_a_training_makes_the_passes_that_are_told(name, tmp_path):
    x, y = torch.rand(9, 1, 8, 8), torch.tensor([0, 1, 0] * 3)
    images = Read(x, y)
    model, other = convolutional(), convolutional()
    with counted(model, other) as made:
        loss = objective(name, other)
        how = dict(run_dir=tmp_path, epochs=2, batch_size=4, progress=False, monitor="epoch")
        how |= {"ema": 0.9} if name == "pgd_adversarial" else {}
        train.fit(model, loss, images, TensorDataset(x[:5], y[:5]), **how)
    told = dict(objective=name, steps=MAKERS[name], batch=4, val=5)
    told |= dict(replays=getattr(loss, "replays", 1))
    phases = plan.training("training", "net", 9, 2, **told)
    assert all(phase.exact for phase in phases)
    assert phases[0].half == (not loss.second_order) and phases[0].loads == images.count
    assert made.tolist() == [sum(p.forwards for p in phases), sum(p.backwards for p in phases)]


def test_every_objective_tells_its_passes():
    made = {name for name, one in vars(objectives).items() if hasattr(one, "__signature__")}
    assert made == set(objectives.PASSES)


def test_the_choice_of_an_epoch_under_attack_is_bounded(tmp_path):
    how = dict(folder=tmp_path, per_class=20, size=32, width=0.5, stages=3, pretrained=False)
    opened = study.of(datasets.load(sources.find("pneumonia")), val_share=0.4, **how)
    vars(opened.run)["values"] |= {"at_eps": 4 / 255, "attack_batch": 16}
    count = len(opened.rows("val"))
    told = dict(val=count, judge=suite.judging(count))
    learn, judge = plan.training("a", "n", 9, 1, objective="cross_entropy", **told)
    model = study.build_model(opened.run).eval()
    with counted(model) as made:
        suite.choose_under_attack(opened)["val_metric"](model)
    made[0] += count
    assert learn.exact and not judge.exact
    assert made[0] <= judge.forwards + ASKED and made[1] <= judge.backwards


# ---------------------------------------- maps, certificates, corruptions


def test_maps_make_at_most_the_passes_that_notebook_02_tells(built, monkeypatch):
    for module in (attribution, study):  # whose passes hooks count; nothing is decoded
        swapped = {"fast_copy": lambda model: model, "open_study": study.expected}
        for name in set(swapped) & set(vars(module)):
            monkeypatch.setattr(module, name, swapped[name])
    cells = *execute.HEAD, "plan"
    names = execute.opening(built / "02_fracatlas_robust_models.ipynb", cells, PROFILE="smoke")
    run, size = names["run"], 24
    model, x = convolutional().eval(), torch.rand(3, 1, size, size)
    window = max(4, run.occlusion_window * size // run.size)
    options = {"saliency": {}, "integrated_gradients": {"steps": run.integrated_steps}}
    options |= {"deeplift": {}, "occlusion": {"window": window}, "gradcam": {"layer": "0"}}
    with counted(model) as made:
        for method, own in options.items():
            attribution.explain(method, model, x, 1, **own)
    told = names["planned_maps"]("n", size, 3)
    assert told.forwards - 80 <= made[0] <= told.forwards and made[1] == told.backwards


def test_certificates_and_corrupted_images_are_counted():
    model, x = convolutional().eval(), torch.rand(4, 1, 12, 12)
    steady = 7  # forwards that see whether the model is
    with counted(model) as made:
        smoothing.certify(model, x, torch.zeros(4, dtype=int), sigma=0.1, n=20)
    assert made.tolist() == [4 * (100 + 20) + steady, 0]
    how = dict(names=["contrast", "brightness"], severities=[1, 3, 5])
    for methods, once in (((), 1), (("gradcam",), 3)):  # and again with a partner, in twos
        cells = once + 2 * 3
        with counted(model) as made:
            monitored = drift.measure(model, x, [0, 1, 0, 1], range(4), methods=methods, **how)
        assert len(monitored[0]) == 4 * 7 and made[0] >= 4 * cells
        assert made[0] <= 4 * cells + steady * (len(monitored) + 4)


# ---------------------------------------- prices, tables, budgets


def network(width, **about):
    return plan.Network(partial(models.cnn, channels=(width,), hidden=4), 16, 4, **about)


def test_prices_rise_with_the_network_and_one_of_a_kind_is_measured(monkeypatch):
    networks = {"small": network(4, kind="wide"), "large": network(64, kind="wide")}
    networks["mobile"] = plan.Network(partial(models.mobilenet_v2, width=0.5, stages=3), 16)
    work = {name: plan.multiplications(one)[0] for name, one in networks.items()}
    t4 = plan.published(networks)
    wide, depthwise = plan.T4["wide"], plan.T4["depthwise"]
    assert np.allclose(t4["small", False], work["small"] / wide[0] * np.array([1, 1, 2, 0]))
    slower = 3 * depthwise[2] - 1
    assert np.allclose(
        t4["mobile", True], work["mobile"] / depthwise[1] * np.array([1, 1, slower, 0])
    )
    asked, measure = [], plan._measured
    monkeypatch.setattr(plan, "_measured", lambda *given: asked.append(1) or measure(*given))
    before = torch.get_rng_state()
    images = TensorDataset(torch.zeros(3, 1))
    here = plan.measured(networks, "cpu", images)
    assert torch.equal(torch.get_rng_state(), before), "no training draws otherwise"
    assert len(asked) == 2 and all(
        (here[name, False] == here[name, True]).all() for name in networks
    )
    ratio = work["large"] / work["small"]
    assert np.allclose(here["large", False][:3], ratio * here["small", False][:3])
    assert here["large", False][3] == here["small", False][3] > 0
    assert len(plan.measured(networks, "cpu", images, seconds=0)) == 6 and len(asked) == 3


def test_the_multiplications_of_a_detector_are_those_of_all_its_parts():
    make = partial(detector.faster_rcnn, num_classes=2, size=64, rpn_post_nms=20)
    small, large = (plan.multiplications(plan.Network(make, size))[0] for size in (64, 128))
    heads = 2 * (small - large / 4) * 2 / 3  # what does not grow with the image: 20 boxes
    assert heads == pytest.approx(20 * 1024 * (256 * 49 + 1024 + 15), rel=0.01)


PHASES = [plan.Phase("train", "n", 9, 3600, 3600, 3600, settings="epochs", job=k) for k in "abc"]
PHASES += [plan.Phase("attack", "n", 5, 7200, 3600, exact=False, settings="attacks")]
PRICES = {("n", False): np.array([0.5, 1.0, 1.5, 0.1])}


def test_a_table_adds_up_and_two_gpus_share_the_jobs_of_a_phase():
    networks = {"n": network(4)}
    told = plan.table(networks, PHASES, PRICES)
    assert told["hours"].tolist() == [6, 2, 8] and told["forwards"].tolist() == [10800, 7200, 18000]
    assert told["count"].tolist() == ["exact", "at most", "at most"]
    assert told["network"].tolist() == ["n, 16 px", "n, 16 px", ""]
    assert plan.table(networks, PHASES, PRICES, gpus=2)["hours"].tolist() == [4, 2, 6]
    assert plan.advice(told, 9) == "8.0 hours, within the budget of 9"
    assert plan.advice(told, None) == "8.0 hours"
    cut = "over the budget of 5; cut first epochs (train: 6.0 h); attacks (attack: 2.0 h)"
    assert plan.advice(told, 5) == f"8.0 hours, {cut}"


def test_a_session_ends_between_two_phases_and_says_how_to_go_on(monkeypatch, tmp_path):
    how = dict(epochs=2, per_class=12, hours=1, size=32, width=0.5, stages=3, pretrained=False)
    images = datasets.load(sources.find("pneumonia"))
    opened = study.of(images, folder=tmp_path / "run", **how)
    run, table = opened.run, lambda: pd.DataFrame({"value": [1]})
    loss, fit = objectives.cross_entropy(), partial(study.train_model, opened, progress=False)
    vars(run)["begun"] = time.time()
    study.stored(opened, "first", table)
    assert run.budget == 1 and 3500 < study.time_left(run) <= 3600
    assert run.key == run.variant(hours=2).key, "a budget changes no result"
    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "train", late(train._Run.train, run, patch))
        with pytest.raises(train.OutOfTime, match="baseline stopped between two epochs: .* 1 ho"):
            fit("baseline", loss)
    assert len(pd.read_csv(run.run_dir / "baseline" / "metrics.csv")) == 1
    for begin in (lambda: fit("other", loss), lambda: study.stored(opened, "second", table)):
        with pytest.raises(train.OutOfTime, match="was not begun: .* run again, in a new session"):
            begin()
    assert study.stored(opened, "first", table)["value"].item() == 1  # is read back
    vars(run)["begun"] += 7200  # the next session
    assert len(fit("baseline", loss).history) == 2
    monkeypatch.setattr(sources, "on_kaggle", lambda: True)
    assert run.variant(hours=None).budget == 11


def late(train_on, run, patch):
    """The training loop, at whose first epoch's end the session is over."""

    def begin(self, on_epoch, max_minutes, progress):
        assert max_minutes == pytest.approx(60, abs=1)  # what was left of the session

        def over(row):
            vars(run)["begun"] -= 7200
            patch.setattr(train.time, "monotonic", lambda: time.perf_counter() + 1e9)

        return train_on(self, over, max_minutes, progress)

    return begin


# ---------------------------------------- the command


def test_every_notebook_fits_a_session_of_two_t4(built, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(built.parent)
    monkeypatch.delenv("DLIA_DATA", raising=False)
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    assert cli.main(["plan", "--device", "t4"]) == 0
    told = capsys.readouterr().out
    assert len(re.findall(r"0\d_\w+ +full .* fits 9", told)) == 7 and "NOT" not in told
    assert not (tmp_path / "runs").exists(), "a plan writes nothing"
    changes = ["epochs=50", "attacks=('fgsm',)", "budgets={}", "expensive={}", "most={}"]
    assert cli.main(["plan", "--nb", "01", "--device", "t4", "--set", *changes]) == 0
    told = capsys.readouterr().out
    assert "MobileNetV2, 224 px" in told and "pneumonia as published" in told
    assert "within the budget of 9" in told and "over the budget" not in told


def test_the_command_tells_what_to_cut(built, monkeypatch, capsys):
    monkeypatch.chdir(built.parent)
    monkeypatch.delenv("DLIA_DATA", raising=False)
    asked = ["plan", "--nb", "06", "--device", "t4", "--set"]
    assert cli.main([*asked, "hours=1"]) == 0
    told = capsys.readouterr().out
    assert (
        "over the budget of 1; cut first trials extend search_epochs search_width (search" in told
    )
    assert cli.main([*asked, "epochs=1", "--profile", "smoke"]) == 0
    assert "covid (SYNTHETIC)" in capsys.readouterr().out


def test_without_a_data_set_a_notebook_is_left_out_of_the_table(built, monkeypatch, capsys):
    monkeypatch.chdir(built.parent)
    (built.parent / "own" / "chest_xray").mkdir(parents=True)
    asked = ["plan", "--device", "t4", "--data", str(built.parent / "own")]
    assert cli.main(asked) == 0
    assert len(re.findall(r"0\d_\w+ +left out: ", capsys.readouterr().out)) == 7
    assert cli.main([*asked, "--nb", "06"]) == 2
