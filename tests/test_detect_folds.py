"""The detection study on the phantom: folds, training that is kept, processes, submissions."""

import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small import start_run
from torchvision.models import mobilenet_v2

from dlia_utils.data import cache, datasets, sources
from dlia_utils.detect import evaluate, folds, job, views
from dlia_utils.device import fingerprint
from dlia_utils.models.detector import faster_rcnn
from dlia_utils.study import Study, load_models

ROOT = Path(__file__).parents[1]
NOTEBOOK = "05_nih_detection"
TINY = dict(images=12, epochs=1, size=64, width=0.25, channels=16, rpn_post_nms=16)


def train(study):
    run, (fold,) = study.run, folds.folds(study)
    uses = {"detector": run.pick(*folds.DETECTOR), "recipe": run.pick(*folds.RECIPE)}
    return folds.train_fold(study, fold, flip=run.flip, **uses)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A tiny study on the competition's phantom, trained for one epoch: none is left to warm up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLIA_RUNS", str(tmp_path_factory.mktemp("study") / "runs"))
        with pytest.MonkeyPatch.context() as hidden:
            hidden.delenv("DLIA_DATA", raising=False)
            one = folds.open_detection(start_run(NOTEBOOK, **TINY))
        train(one)
        yield one


@pytest.fixture
def fresh_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("DLIA_DATA", raising=False)


def test_the_uses_of_images_and_their_patients_never_mix(opened):
    whole = Study(
        opened.run.variant(images=None, run_folds=opened.run.folds), opened.dataset, opened.cache
    )
    scored = []
    for fold in folds.folds(whole):
        uses = [set(opened.patients(rows)) for rows in (fold.train, fold.select, fold.score)]
        assert not (uses[0] & uses[1] or uses[0] & uses[2] or uses[1] & uses[2])
        scored += fold.score.tolist()
    labelled = np.flatnonzero((opened.dataset.manifest["label"] >= 0).to_numpy())
    assert sorted(scored) == labelled.tolist()  # every labelled image exactly once


def test_figures_get_boxes_in_pixels_of_the_cached_images(opened):
    rows = folds.folds(opened)[0].score
    known = folds.truth(opened, rows)
    images, true, found, titles = folds.on_images(opened, rows, known, known[:0])
    assert len(images) == len(true) == len(titles) == len(rows) and not any(map(len, found))
    for row, own in zip(rows, true, strict=True):
        expected = known.loc[known["image"].eq(row), evaluate.CORNERS]
        given = own[evaluate.CORNERS] / np.tile(opened.cache.scale([row])[0], 2)
        np.testing.assert_allclose(given, expected)


def test_the_box_list_that_holds_the_answers_is_never_read(opened, fresh_runs, tmp_path):
    """With BBox_List_2017.csv, here damaged, beside and above it, edition A gives equal bits."""
    root = tmp_path / "nih_boxes" / opened.run.location.root.name
    shutil.copytree(opened.run.location.root, root)
    for folder in (root, root.parent):
        (folder / "BBox_List_2017.csv").write_bytes(b"\xff\x00 not to be read")
    settings = opened.run.pick(*TINY)
    again = folds.open_detection(start_run(NOTEBOOK, root, **settings))
    train(again)
    found = []
    for study in (opened, again):
        model, target = load_models(study, ["fold0"])["fold0"], folds.targets(study)[0]
        images = cache.build(target.dataset, size=study.run.size, fit="pad", progress=False)
        boxes = views.predict(model, images, target.rows, progress=False)
        found.append((fingerprint(model), target.mapping, boxes))
    (one, ids, boxes), (other, *rest) = found
    assert one == other and len(boxes)
    pd.testing.assert_frame_equal(ids, rest[0])
    pd.testing.assert_frame_equal(boxes, rest[1])


def test_an_official_split_is_kept(fresh_runs):
    one = folds.open_detection(start_run(NOTEBOOK, sources.find("fracatlas").root))
    (fold,) = folds.folds(one)
    assert fold.name == "official" and not one.run.one_per_class
    split = one.dataset.manifest["split"]
    uses = [set(split[rows]) for rows in (fold.train, fold.select, fold.score)]
    assert uses == [{"train"}, {"val"}, {"test"}]
    (target,) = folds.targets(one)
    assert target.mapping.columns.tolist() == ["ID", "image_id"]
    assert len(target.rows) == len(fold.score)


def test_the_best_weights_give_the_logged_score_and_a_finished_fold_is_read_back(opened):
    """The original study's "best" weights were an alias of the last ones."""
    (fold,), folder = folds.folds(opened), opened.run.run_dir / "fold0"
    history = pd.read_csv(folder / "metrics.csv")
    model = load_models(opened, ["fold0"])["fold0"]
    found = views.predict(model, opened.cache, fold.select, progress=False)
    measured = evaluate.summary(folds.matches(opened, fold.select, found))["mAP50"]
    assert measured == pytest.approx(history["val_mAP50"].max(), abs=1e-12)
    before = (folder / "last.pt").stat().st_mtime_ns
    assert len(train(opened).history) == 1 and (folder / "last.pt").stat().st_mtime_ns == before


def test_both_editions_are_targets_and_one_whose_images_were_seen_is_refused(opened):
    chosen = folds.targets(opened)
    assert [target.name for target in chosen] == ["competition_edition_a", "competition_edition_b"]
    assert [target.mapping.columns[0] for target in chosen] == ["id", "ID"]
    leaked = Path(opened.dataset.manifest["path"][folds.folds(opened)[0].train[0]]).name
    mapping = opened.dataset.mapping.copy()
    mapping.loc[0, "image_id"] = leaked
    object.__setattr__(opened.dataset, "mapping", mapping)
    try:
        with pytest.raises(ValueError, match=leaked):
            folds.targets(opened)
    finally:
        kept = datasets.load(opened.run.location).mapping
        object.__setattr__(opened.dataset, "mapping", kept)


def test_without_weights_a_detector_starts_at_random(opened, tmp_path, monkeypatch, caplog):
    def offline(**options):
        if options.get("weights"):
            raise RuntimeError("no internet")
        return faster_rcnn(**options)

    monkeypatch.setattr(folds, "faster_rcnn", offline)
    options = opened.run.variant(weights="imagenet", freeze_bn=True).pick(*folds.DETECTOR)
    for reason in ("no internet", "this training began so"):
        caplog.clear()
        model = folds.build_detector(tmp_path, 8, options)
        assert f"RANDOM weights and will be much weaker: {reason}" in caplog.text
    assert (tmp_path / "weights.txt").read_text() == "random"
    assert not model.freeze_bn  # the statistics of random weights must be learnt


JOB_SETTINGS = dict(images=16, epochs=3, size=64, width=1.0, channels=16, weights="imagenet")
JOB_SETTINGS |= dict(freeze_bn=True, ema=None, flip=0.0, lr=0.01)
JOB = """
import sys, torch
torch.set_num_threads(1)
# Faster R-CNN learns from a random sample of regions: without it both runs do the same sums.
torch.randperm = lambda n, *, device=None, **options: torch.arange(n, device=device)
from dlia_utils.detect import job
sys.exit(job.main([sys.argv[1], "fold0"]))
"""


def test_two_processes_follow_the_loss_curve_of_one_with_the_same_batch(tmp_path, fresh_runs):
    torch.manual_seed(0)
    state = mobilenet_v2().state_dict()
    features = {key: value for key, value in state.items() if not key.startswith("classifier")}
    torch.save(features, tmp_path / "features.pth")
    (tmp_path / "job.py").write_text(JOB)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DLIA_WEIGHTS": str(tmp_path / "features.pth")}
    options = dict(env=environment, capture_output=True, text=True, timeout=300, check=False)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    # As on two machines, each with one process.
    nodes = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    nodes += ["--rdzv-backend=c10d", f"--rdzv-endpoint={place}"]
    curves = []
    for name, start, batch in (("one", [], 4), ("two", nodes, 2)):
        folder = start_run(NOTEBOOK, name=name, batch_size=batch, **JOB_SETTINGS).run_dir
        command = [sys.executable, *start, str(tmp_path / "job.py"), str(folder)]
        with ThreadPoolExecutor() as pool:
            running = [pool.submit(subprocess.run, command, **options) for _ in range(4 // batch)]
        history = folder / "fold0" / "metrics.csv"
        # Not the exit code: gloo was seen to abort now and then after all work was done.
        assert history.exists(), "\n".join(one.result().stderr[-3000:] for one in running)
        curves.append(pd.read_csv(history))
    assert curves[0]["epoch"].tolist() == curves[1]["epoch"].tolist() == [1, 2, 3]
    assert curves[0]["train_loss"].iloc[-1] < curves[0]["train_loss"].iloc[0]
    np.testing.assert_allclose(curves[1]["train_loss"], curves[0]["train_loss"], rtol=0.01)


def test_the_job_names_its_wrong_arguments(tmp_path, fresh_runs, capsys):
    folder = start_run(NOTEBOOK, **TINY).run_dir
    assert job.main([str(folder), "fold9"]) == 2
    assert "FOLD fold9 is not one of fold0" in capsys.readouterr().err
    assert job.main([str(tmp_path), "fold0"]) == 2
    assert "is no run folder: it holds no config.json" in capsys.readouterr().err
