"""The reader in charge: own images, boxes, model and settings, from the command to results.csv."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw

from dlia_utils import execute, objectives, study
from dlia_utils.data import datasets, split
from tools import notebooks

# As small as it goes: what is tested is that it runs to its end, under the reader's name.
SHORT = {"epochs": 1, "size": 32, "bootstrap_draws": 20}
ATTACKED = dict(
    adversarial=("pgd_at",),
    defences=("papernot",),
    at_steps=1,
    temperatures=(50.0,),
    certified_per_class=2,
)
ATTACKED |= dict(attacks=("fgsm", "pgd_ce", "pgd_margin", "apgd_ce"), check_images=2)
ATTACKED |= dict(one_pixel=((1, 4, 1, 0.5, 0.9),), one_pixel_per_class=1, certificate_draws=50)
ATTACKED |= dict(eps_grid=(4 / 255,), patient_pattern=r"/(p\d+)_")
CORRUPTED = dict(
    mobilenet_epochs=1, mobilenet_size=32, severities=(1, 5), map_images=8, choose_images=8
)
CORRUPTED |= dict(corruptions=("contrast", "gaussian_noise"))
CORRUPTED |= dict(mapped=("contrast",), trained_on=("contrast",))
SEARCH = {"trials": 2, "extend": 0, "patience": 1}
TUNED = dict(backbone="resnet18", tuning_lrs=(1e-3,), tuning_epochs=1, baseline_epochs=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Class folders of circles, squares (and triangles), two images a patient: two or three."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    corners = {"circle": 24, "square": 4, "triangle": 3}
    for classes in (("circle", "square"), tuple(corners)):
        for name in classes:
            folder = root / f"shapes{len(classes)}" / name
            folder.mkdir(parents=True)
            for number in range(40):
                image = Image.fromarray(rng.normal(90, 15, (64, 64)).clip(0, 255).astype(np.uint8))
                centre = (*rng.integers(22, 42, 2).tolist(), int(rng.integers(9, 15)))
                grey, draw = int(rng.integers(170, 230)), ImageDraw.Draw(image)
                draw.regular_polygon(centre, corners[name], fill=grey)
                image.save(folder / f"p{number // 2:02d}_{number}.png")
    return root


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    for name in ("DLIA_DATA", "DLIA_PROFILE", "DLIA_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def run_notebook(runs, monkeypatch):
    """Run a notebook as a reader leaves it who has replaced one of its # lines; folder, results."""

    def executed(number, folder, changes, line="", mine=""):
        (path,) = execute.pick([number])
        monkeypatch.setenv("PYTHONPATH", str(notebooks.REPOSITORY))
        if line:
            notebook = notebooks.read(path)
            code = [cell for cell in notebook.cells if cell.cell_type == "code"]
            (cell,) = [cell for cell in code if f"# {line}" in cell.source]
            assert "yours" in cell.metadata.tags
            cell.source = cell.source.replace(f"# {line}", mine or line)
            path = notebooks.write(notebook, runs / path.name)
        done = execute.run(path, data=folder, changes=changes, progress=False)
        assert not done.error, done.error
        results = pd.read_csv(done.folder / "results.csv")
        assert set(results["data"]) == {folder.name}, "never said to be somebody else's"
        kept = json.loads((done.folder / "config.json").read_text())["settings"]
        assert kept == kept | json.loads(json.dumps(changes)), "config.json says what ran"
        return done, results

    return executed


@pytest.mark.notebook
def test_a_strangers_resnet18_stands_in_the_tables_of_01_after_one_line(folders, run_notebook):
    built = 'models.backbone("resnet18", num_classes=2, pretrained=False)'
    line = f'run.own["resnet18"] = lambda: {built}'
    done, results = run_notebook("01", folders / "shapes2", SHORT | ATTACKED, line)
    own = results[results["model"].eq("resnet18")]
    assert {"clean", "worst", "fgsm", "apgd_ce"} <= set(own["attack"])
    assert set(own["weights"]) == {"the reader's own"}
    assert "square" not in set(results["attack"]), "the list of attacks was shortened"
    parts = pd.Series(json.loads((done.folder / "split.json").read_text())["split"])
    patients = parts.index.str.extract(r"/(p\d+)_", expand=False)
    assert parts.groupby(patients).nunique().max() == 1
    shown = [str(cell.get("outputs")) for cell in notebooks.read(done.notebook).cells]
    assert any("resnet18" in text and "worst" in text for text in shown)


@pytest.mark.notebook
def test_a_trained_network_and_three_classes_in_04(folders, run_notebook):
    line = 'run.own["resnet34"] = lambda: models.backbone("resnet34", num_classes=2)'
    net = "models.cnn(num_classes=3, channels=(4, 8)).backbone"
    mine = f'run.own["mine"] = models.wrap({net}, mean=0.5, std=0.25).eval()'
    _, results = run_notebook("04", folders / "shapes3", SHORT | CORRUPTED, line, mine)
    assert {"mine", "mine_augmented", "resnet18"} <= set(results["model"])


@pytest.mark.notebook
def test_three_classes_in_06(folders, run_notebook):
    changes = SHORT | SEARCH | {"search_epochs": 1, "search_patience": 1, "quick_epochs": 1}
    found = set(run_notebook("06", folders / "shapes3", changes)[1]["metric"])
    assert {"accuracy", "auc", "f1"} <= found and "sensitivity" not in found


@pytest.mark.notebook
def test_another_backbone_and_own_images_in_07(folders, run_notebook):
    line = 'run.own["densenet121"] = lambda: models.backbone("densenet121", num_classes=2)'
    mine = line.replace("densenet121", "mnasnet0_5")  # small
    changes = SHORT | SEARCH | TUNED | {"audit_images": 40}
    done, _ = run_notebook("07", folders / "shapes2", changes, line, mine)
    start = torch.load(done.folder / "start" / "best.pt", weights_only=True)["recipe"]
    resnet = {"name": "torchvision", "arch": "resnet18", "num_classes": 2}
    assert start["body"] == resnet, "never silently another network"
    assert (done.folder / "mnasnet0_5" / "best.pt").exists()
    assert (done.folder / "figures" / "gradcam_networks.png").exists()


@pytest.mark.notebook
def test_own_boxes_in_05(runs, run_notebook):
    root, rng, rows = runs / "bones", np.random.default_rng(1), []
    (root / "images").mkdir(parents=True)
    for number in range(45):
        image = Image.fromarray(rng.normal(60, 10, (96, 96)).clip(0, 255).astype(np.uint8))
        (x, y), side = rng.integers(5, 60, 2).tolist(), int(rng.integers(18, 30))
        box = (x, y, x + side, y + side // (1 + number % 2))
        ImageDraw.Draw(image).rectangle(box, fill=220)
        image.save(root / "images" / f"{number:02d}.png")
        label = ("lump", "line")[number % 2]
        rows.append((f"images/{number:02d}.png", label, *box, f"p{number // 2}"))
    table = pd.DataFrame(rows, columns="file label x1 y1 x2 y2 patient".split())
    table.to_csv(root / "boxes.csv", index=False)
    found = set(run_notebook("05", root, SHORT | {"epochs": 2, "size": 96})[1]["metric"])
    assert {"AP50 lump", "AP50 line"} <= found
    assert len(datasets.from_boxes(root / "boxes.csv", root).boxes) == 45


def test_three_lines_of_python_from_a_folder_to_a_training_and_an_evaluation(folders, runs):
    images = datasets.from_folder(folders / "shapes3", patient_pattern=r"/(p\d+)_")
    small = dict(size=32, epochs=2, width=0.5, stages=3, pretrained=False)
    data = study.of(images, **small)
    loss = objectives.cross_entropy(weight=data.class_weights())
    study.train_model(data, "plain", loss, progress=False)
    measured = "accuracy balanced_accuracy precision recall f1 auc".split()
    table = study.evaluation(data, "plain")
    assert table["metric"].tolist() == measured
    assert data.run.run_dir.parent.name == "own" and data.run.data_name == "shapes3"
    assert not split.audit(data.dataset)["verdict"].eq("leak").any()
    assert table["n"].iloc[0] == len(data.rows("test"))
    with pytest.raises(ValueError, match="no such setting 'epoch'; did you mean epochs"):
        study.of(data.dataset, epoch=3)
