"""The reader in charge: own images, own boxes, an own model and changed settings, from the command to results.csv."""

import json
import os
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw

from dlia_utils import objectives, once, study
from dlia_utils.data import datasets, split
from tools import notebooks

# Everything as small as it goes: what is tested is that it runs to its end, under the reader's name.
SHORT = {"epochs": 1, "bootstrap_draws": 20}
ADVERSARIAL = {
    "adversarial": ("pgd_at",),
    "at_steps": 1,
    "temperatures": (50.0,),
    "certified_per_class": 2,
}
ADVERSARIAL |= {
    "certificate_draws": 50,
    "attacks": ("fgsm", "pgd_ce", "pgd_margin", "apgd_ce"),
    "check_films": 2,
}
ADVERSARIAL |= {
    "one_pixel": ((1, 4, 1, 0.5, 0.9),),
    "one_pixel_per_class": 1,
    "eps_grid": (4 / 255,),
}
SEARCH = {"trials": 2, "extend": 0, "patience": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Class folders of circles, squares (and triangles), two images a patient: two classes and three."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    corners = {"circle": 24, "square": 4, "triangle": 3}
    for classes in (("circle", "square"), ("circle", "square", "triangle")):
        for name in classes:
            folder = root / f"shapes{len(classes)}" / name
            folder.mkdir(parents=True)
            for number in range(40):
                image = Image.fromarray(rng.normal(90, 15, (64, 64)).clip(0, 255).astype(np.uint8))
                centre = (*rng.integers(22, 42, 2).tolist(), int(rng.integers(9, 15)))
                ImageDraw.Draw(image).regular_polygon(
                    centre, corners[name], fill=int(rng.integers(170, 230))
                )
                image.save(folder / f"p{number // 2:02d}_{number}.png")
    return root


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    for name in ("DLIA_DATA", "DLIA_PROFILE", "DLIA_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def with_line(number, line, tmp_path, monkeypatch):
    """Notebook `number` as a reader leaves it who has taken the # off one of its lines."""
    (source,) = notebooks.pick([number])
    notebook = notebooks.build(source)
    (cell,) = [c for c in notebook.cells if c.cell_type == "code" and f"# {line}" in c.source]
    assert "yours" in cell.metadata.tags
    cell.source = cell.source.replace(f"# {line}", line)
    path = notebooks.write(nbformat.from_dict(notebook), tmp_path / f"{source.stem}.ipynb")
    monkeypatch.setattr(notebooks, "product", lambda _: path)
    monkeypatch.setattr(
        notebooks,
        "KERNEL_ENVIRONMENT",
        notebooks.KERNEL_ENVIRONMENT | {"PYTHONPATH": str(notebooks.REPOSITORY)},
    )
    return source


def execute(source, folder, changes):
    done = notebooks.run(source, data=folder, changes=changes, progress=False)
    assert not done.error, done.error
    results = pd.read_csv(done.folder / "results.csv")
    assert set(results["data"]) == {folder.name}, "own images are never said to be somebody else's"
    assert "SYNTHETIC" not in notebooks.read(done.executed).cells[-1].get("source", "")
    kept = json.loads((done.folder / "config.json").read_text())["settings"]
    assert kept == kept | json.loads(json.dumps(changes)), "config.json says what ran"
    return done, results


@pytest.mark.notebook
def test_a_strangers_resnet18_stands_in_the_tables_of_01_after_one_line(folders, runs, monkeypatch):
    line = (
        'run.own["resnet18"] = lambda: models.backbone("resnet18", num_classes=2, pretrained=False)'
    )
    source = with_line("01", line, runs, monkeypatch)
    changes = SHORT | ADVERSARIAL | {"patient_pattern": r"/(p\d+)_"}
    done, results = execute(source, folders / "shapes2", changes)
    own = results[results["model"].eq("resnet18")]
    assert {"clean", "worst", "fgsm", "apgd_ce"} <= set(own["attack"]) and set(own["weights"]) == {
        "the reader's own"
    }
    assert "square" not in set(results["attack"]), "the list of attacks was shortened"
    split = pd.Series(json.loads((done.folder / "split.json").read_text())["split"])
    patients = split.index.str.extract(r"/(p\d+)_", expand=False)
    assert (
        pd.DataFrame({"patient": patients, "split": split.to_numpy()})
        .groupby("patient")["split"]
        .nunique()
        .max()
        == 1
    )
    text = notebooks.read(done.executed)
    assert any(
        "resnet18" in str(cell.get("outputs")) and "worst" in str(cell.get("outputs"))
        for cell in text.cells
    )


@pytest.mark.notebook
def test_a_trained_network_and_three_classes_in_04(folders, runs, monkeypatch):
    line = 'run.own["resnet34"] = lambda: models.backbone("resnet34", num_classes=2)'
    (source,) = notebooks.pick(["04"])
    notebook = notebooks.build(source)
    (cell,) = [c for c in notebook.cells if c.cell_type == "code" and f"# {line}" in c.source]
    mine = 'run.own["mine"] = models.wrap(models.cnn(num_classes=3, channels=(4, 8)).backbone, mean=0.5, std=0.25).eval()'
    cell.source = cell.source.replace(f"# {line}", mine)
    path = notebooks.write(notebook, runs / f"{source.stem}.ipynb")
    monkeypatch.setattr(notebooks, "product", lambda _: path)
    monkeypatch.setattr(
        notebooks,
        "KERNEL_ENVIRONMENT",
        notebooks.KERNEL_ENVIRONMENT | {"PYTHONPATH": str(notebooks.REPOSITORY)},
    )
    changes = SHORT | {
        "mobilenet_epochs": 1,
        "severities": (1, 5),
        "corruptions": ("contrast", "gaussian_noise"),
    }
    changes |= {
        "mapped": ("contrast",),
        "trained_on": ("contrast",),
        "map_films": 8,
        "choose_films": 8,
    }
    _, results = execute(source, folders / "shapes3", changes)
    assert {"mine", "mine_augmented", "resnet18"} <= set(results["model"])


@pytest.mark.notebook
def test_three_classes_in_06(folders, runs):
    (source,) = notebooks.pick(["06"])
    changes = SHORT | SEARCH | {"search_epochs": 1, "search_patience": 1, "quick_epochs": 1}
    _, results = execute(source, folders / "shapes3", changes)
    assert {"accuracy", "auc", "f1"} <= set(results["metric"]) and "sensitivity" not in set(
        results["metric"]
    )


@pytest.mark.notebook
def test_another_backbone_and_own_images_in_07(folders, runs, monkeypatch):
    source = with_line(
        "07",
        'run.own["densenet121"] = lambda: models.backbone("densenet121", num_classes=2)',
        runs,
        monkeypatch,
    )
    changes = (
        SHORT
        | SEARCH
        | {"backbone": "resnet18", "tuning_lrs": (1e-3,), "tuning_epochs": 1, "baseline_epochs": 1}
    )
    done, _ = execute(source, folders / "shapes2", changes | {"audit_films": 40})
    start = torch.load(done.folder / "start" / "best.pt", weights_only=True)["recipe"]
    assert start["body"] == {"name": "torchvision", "arch": "resnet18", "num_classes": 2}, (
        "never silently another network"
    )
    assert (done.folder / "densenet121" / "best.pt").exists() and (
        done.folder / "figures" / "gradcam_networks.png"
    ).exists()


@pytest.mark.notebook
def test_own_boxes_in_05(runs):
    root, rng, rows = runs / "bones", np.random.default_rng(1), []
    (root / "images").mkdir(parents=True)
    for number in range(45):
        image = Image.fromarray(rng.normal(60, 10, (96, 96)).clip(0, 255).astype(np.uint8))
        x, y = rng.integers(5, 60, 2).tolist()
        side, label = int(rng.integers(18, 30)), ("lump", "line")[number % 2]
        ImageDraw.Draw(image).rectangle([x, y, x + side, y + side // (1 + number % 2)], fill=220)
        image.save(root / "images" / f"{number:02d}.png")
        rows.append(
            (
                f"images/{number:02d}.png",
                label,
                x,
                y,
                x + side,
                y + side // (1 + number % 2),
                f"p{number // 2}",
            )
        )
    pd.DataFrame(rows, columns=["file", "label", "x1", "y1", "x2", "y2", "patient"]).to_csv(
        root / "boxes.csv", index=False
    )
    (source,) = notebooks.pick(["05"])
    done, results = execute(source, root, SHORT | {"epochs": 2, "size": 96})
    assert {"AP50 lump", "AP50 line"} <= set(results["metric"])
    assert len(datasets.from_boxes(root / "boxes.csv", root).boxes) == 45


def test_three_lines_of_python_from_a_folder_to_a_training_and_an_evaluation(folders, runs):
    data = study.of(
        datasets.from_folder(folders / "shapes3", patient_pattern=r"/(p\d+)_"),
        size=32,
        epochs=2,
        width=0.5,
        stages=3,
        pretrained=False,
    )
    study.train_model(
        data, "plain", objectives.cross_entropy(weight=data.class_weights()), progress=False
    )
    table = once.evaluation(data, "plain")
    assert table["metric"].tolist() == [
        "accuracy",
        "balanced_accuracy",
        "precision",
        "recall",
        "f1",
        "auc",
    ]
    assert data.run.run_dir.parent.name == "own" and data.run.data_name == "shapes3"
    audit = split.audit(data.dataset)
    assert not audit["verdict"].eq("leak").any() and table["n"].iloc[0] == len(data.rows("test"))
    with pytest.raises(ValueError, match="no such setting 'epoch'; did you mean epochs"):
        study.of(data.dataset, epoch=3)


@pytest.mark.notebook
def test_the_first_command_ends_well_on_a_core_that_others_keep_busy(runs):
    """As README says it, with two settings changed, on one core beside two endless loops: slower, and that is all."""
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None

    def pin():
        if core is not None:  # elsewhere the loops keep one core busy each, and the run another
            os.sched_setaffinity(0, {core})

    loops = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=pin)
        for _ in range(2)
    ]
    small = ["epochs=2", "images=12", "width=0.25", "channels=16", "size=64", "bootstrap_draws=20"]
    command = [sys.executable, "-m", "dlia_utils", "run", "--nb", "05", "--set", *small]
    try:
        done = subprocess.run(
            command,
            cwd=notebooks.REPOSITORY,
            preexec_fn=pin,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (
        "changed  * epochs = 2  (in this profile: 11)" in done.stdout
        and "submissions)" in done.stdout
    )
    (record,) = (runs / "runs" / "05_nih_detection").glob("*/config.json")
    assert json.loads(record.read_text())["settings"]["images"] == 12
