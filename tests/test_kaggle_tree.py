"""A Kaggle session without Kaggle: both mount layouts, no repository or network, a P100."""

import json
from functools import partial

import kaggle_tree
import numpy as np
import pandas as pd
import pytest
import torch
from small import start_run

from dlia_utils import device, execute, run, train
from dlia_utils.data import sources
from tools import notebooks

TINY = """\
# %% [markdown]
# # A tiny notebook

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"

# %%
import socket

from dlia_utils.data import sources

location = sources.find("nih")
print(location.origin, location.synthetic, location.root, sources.on_kaggle(), sources.cache_root())

# %%
import captum

web = ("192.0.2.1", 80)
for ask, where in ((socket.create_connection, web), (socket.getaddrinfo, "example.org")):
    try:
        ask(where, 443)
    except OSError as error:
        print(error)
"""


def printed(notebook, number):
    """What code cell `number` wrote to its standard output."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return "".join(one.text for one in cells[number].outputs if one.get("name") == "stdout")


def need_only_the_wheel(session, notebook):
    """All of dlia_utils came from the offline data set, and no folder of the repository could be
    imported from."""
    seen = json.loads(printed(notebook, -1))
    wheel = next((session.root / "input").rglob("dlia_utils-*.whl"))
    assert seen["modules"] and all(
        path.startswith(f"{wheel}/dlia_utils/") for path in seen["modules"].values()
    )
    assert not {str(notebooks.REPOSITORY), str(notebooks.REPOSITORY / "tests")} & set(seen["path"])


@pytest.mark.parametrize("layout", kaggle_tree.LAYOUTS)
def test_a_tiny_notebook_finds_wheel_and_data_in_both_layouts(tmp_path, layout):
    source = tmp_path / "src" / "07_tiny.py"
    source.parent.mkdir()
    source.write_text(TINY)
    session = kaggle_tree.make(tmp_path / "session", datasets=("nih",), layout=layout)
    before = session.input_state()
    executed = session.run(notebooks.build(source))
    need_only_the_wheel(session, executed)
    mounted = {"old": "data", "new": "datasets/organizations/nih-chest-xrays/data"}[layout]
    where = f"{session.root}/input/{mounted}/nih True {session.root}/temp/dlia\n"
    assert printed(executed, 2) == f"kaggle True {where}"
    assert printed(executed, 3).count("Network is unreachable") == 2
    assert session.network == ["192.0.2.1", "example.org"], "the probes above and nothing else"
    assert session.input_state() == before


@pytest.mark.notebook
@pytest.mark.parametrize("source", notebooks.sources(), ids=lambda source: source.stem)
def test_every_notebook_of_the_suite_runs_on_kaggle(source, tmp_path_factory):
    done = kaggle_tree.finished(source, tmp_path_factory)
    failed = hasattr(done.error, "traceback")
    assert not done.error, execute.failure_text(done.error) if failed else done.error
    session = done.session
    kaggle_tree.need_complete(done.run_dir, done.executed, synthetic=True)
    need_only_the_wheel(session, done.executed)
    code = [cell for cell in done.executed.cells if cell.cell_type == "code"]
    said = printed(done.executed, [execute.tags(cell) for cell in code].index(["start"]))
    banner = said.splitlines()
    assert ("CPU ONLY" in banner[1] and "GPU T4 x2" in banner[2]) or "cuda" in banner[1]
    assert "SMOKE  (auto: " in said and "[found by: kaggle]" in said
    assert session.network == [], "without internet a smoke run must not even ask for it"
    assert session.input_state() == done.before, "inputs are read-only on Kaggle"
    assert (session.root / "temp" / "dlia").is_dir(), "decoded images belong on the scratch disk"
    if "submit" in source.read_text(encoding="utf-8"):
        assert list(session.working.glob("*.csv")), "Kaggle offers them as submissions"


# ------------------------------------------------------------------------ what a smoke run teaches


def value(results, model, metric, attack="clean"):
    own = results[results.model.eq(model) & results.metric.eq(metric) & results.attack.eq(attack)]
    at = 0 if attack != "worst" else 4 / 255
    (found,) = own[np.isclose(own.eps, at)]["value"]
    return found


def robust(results, run_dir, *, plain, trained, no_defence=()):
    """Nobody gives one answer to all; plain training falls, training on attacks holds.

    no_defence: what has 0.000 in results/ must not shine on phantoms.
    """
    balanced = [value(results, model, "balanced_accuracy") for model in (plain, *trained)]
    assert min(balanced) >= 0.8
    fallen, *held = [value(results, model, "accuracy", "worst") for model in (plain, *trained)]
    assert fallen < 0.3 and held[0] >= fallen + 0.3 and min(held) > fallen
    assert all(value(results, name, "accuracy", "worst") < 0.3 for name in no_defence)


def corruptions(results, run_dir):
    for network in ("resnet18", "mobilenet_v2"):
        assert value(results, network, "auc") >= 0.8
        seen = "mean of those seen in training"
        assert value(results, f"{network}_augmented", "ce", seen) < 1


def boxes(results, run_dir):
    assert value(results, "plain", "mAP50") >= 0.5


def searched(results, run_dir):
    assert value(results, "baseline", "balanced_accuracy") >= 0.8
    first = pd.read_csv(run_dir / "initial" / "metrics.csv")["val_auc"].max()
    assert json.loads((run_dir / "choice.json").read_text())["val_auc"] >= first


def transferred(results, run_dir):
    frozen, tuned = (value(results, name, "balanced_accuracy") for name in ("frozen", "finetuned"))
    assert tuned > frozen >= 0.8
    assert value(results, "finetuned", "auc") > value(results, "frozen", "auc")
    maps = pd.read_csv(run_dir / "localisation.csv").set_index(["score", "map"])["value"]
    for score in ("pointing", "coverage_gain"):
        assert maps[score, "Grad-CAM"] > maps[score, "centre prior"]


NO_DEFENCE = ["lipschitz", "lipschitz_operator", "margin_gradient", "distilled_T50", "papernot"]
TEACHES = {
    "01": partial(robust, plain="baseline", trained=["pgd_at", "trades"], no_defence=NO_DEFENCE),
    "02": partial(
        robust, plain="standard", trained=["pgd_at", "trades"], no_defence=["linear_probe"]
    ),
    "03": partial(
        robust, plain="standard", trained=["pgd_at", "trades"], no_defence=["linear_probe"]
    ),
    "04": corruptions,
    "05": boxes,
    "06": searched,
    "07": transferred,
}


@pytest.mark.notebook
@pytest.mark.parametrize("source", notebooks.sources(), ids=lambda source: source.stem)
def test_a_smoke_run_shows_what_the_study_teaches(source, tmp_path_factory):
    run_dir = kaggle_tree.finished(source, tmp_path_factory).run_dir
    TEACHES[source.stem[:2]](pd.read_csv(run_dir / "results.csv"), run_dir)


# ---------------------------------------------------------------------- a GPU that torch cannot use


@pytest.fixture
def p100(monkeypatch):
    """Kaggle's default GPU as today's torch sees it: there, until the first operation."""
    ones = torch.ones

    def broken(*size, device=None, **options):
        if device is not None and torch.device(device).type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")
        return ones(*size, device=device, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 0))
    monkeypatch.setattr(torch, "ones", broken)


@pytest.fixture
def real_images_on_kaggle(tmp_path, monkeypatch):
    """A session with a data set that is not marked as synthetic."""
    for name in ("DLIA_DATA", "DLIA_PROFILE", "DLIA_RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "KAGGLE", tmp_path)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    for part in sources.SOURCES["pneumonia"].trees[0]:
        (tmp_path / "input" / "chest-xray-pneumonia" / "chest_xray" / part).mkdir(parents=True)


def test_a_p100_is_named_first_and_auto_becomes_smoke_on_the_cpu(p100, real_images_on_kaggle):
    one = start_run("01", profile="auto")
    assert (one.profile, one.device, one.synthetic) == ("smoke", "cpu", False)
    lines = str(one).splitlines()
    assert "CPU ONLY: Tesla P100-PCIE-16GB is there, but this torch cannot use it" in lines[1]
    assert "no kernel image" in lines[1] and "Compile" not in str(one)
    assert "'GPU T4 x2'" in lines[2] and "SMOKE" in lines[3]
    assert device.hardware().endswith(("x86_64", "arm64", "aarch64", "AMD64"))


def test_no_gpu_is_said_first_too_and_how_to_get_one(real_images_on_kaggle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lines = str(start_run("01", profile="auto")).splitlines()
    assert "CPU ONLY: no GPU" in lines[1] and "'GPU T4 x2'" in lines[2] and "SMOKE" in lines[3]
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    monkeypatch.setattr(run, "runs_root", lambda: sources.KAGGLE / "runs")
    elsewhere = str(start_run("01", sources.KAGGLE / "input"))
    assert "CPU ONLY" in elsewhere and "T4" not in elsewhere, "a laptop has no session options"


def test_training_leaves_a_p100_alone(p100):
    accelerator = train._accelerator(False, 1)
    assert accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
