"""What detectors learn: the evidence that labels, boxes and decoding are right. These tests take minutes."""

import numpy as np
import pandas as pd
import pytest
from small import start_run

from dlia_utils import models, objectives, train
from dlia_utils.data import augment, cache, datasets, sources
from dlia_utils.detect import evaluate, study, views
from dlia_utils.models.detector import LIGHT, faster_rcnn

NOTEBOOK = "05_nih_detection"
OVERFIT = {"epochs": 120, "lr": 0.02, "warmup_epochs": 5, "batch_size": 4, "clip_norm": 5.0}
OUT_OF_FOLD = {"images": None, "folds": 5, "run_folds": 5, "epochs": 11}


def learn(model, images, rows, boxes, classes, *, transform=None, run_dir, **options):
    """Train on `rows` alone and return their mAP@0.5."""

    def score(candidate):
        found = views.predict(candidate, images, rows, progress=False)
        known = boxes[boxes["image"].isin(rows)]
        return {
            "mAP50": evaluate.summary(evaluate.match(known, found, images=rows, classes=classes))[
                "mAP50"
            ]
        }

    return train.fit(
        model,
        objectives.detection(),
        augment.CachedBoxes(images, rows, boxes, transform=transform),
        None,
        run_dir=run_dir,
        val_metric=score,
        monitor="mAP50",
        collate=augment.collate_boxes,
        optimizer="sgd",
        schedule="cosine",
        progress=False,
        **options,
    )


@pytest.mark.real
def test_the_light_detector_learns_the_four_real_nih_films_by_heart(real_data, tmp_path):
    """Labels, boxes and decoding are right, class 1 (Atelectasis) included: with labels from 0 it cannot be found."""
    dataset = datasets.boxed(datasets.load(sources.find("nih", real_data), allow_missing=True))
    assert len(dataset.manifest) == 4 and 1 in set(dataset.boxes["label"])
    images = cache.build(dataset, size=320, fit="pad")
    model = faster_rcnn(
        arch=LIGHT, num_classes=8, size=320, rpn_pre_nms=200, rpn_post_nms=64, roi_batch=32
    )
    fitted = learn(model, images, range(4), dataset.boxes, 8, run_dir=tmp_path, **OVERFIT)
    assert fitted.best_score >= 0.95, fitted.history.tail()
    found = views.predict(models.load(tmp_path / "best.pt"), images, range(4), progress=False)
    atelectasis = dataset.boxes.loc[dataset.boxes["label"].eq(1), "image"]
    best = found.sort_values("score").groupby("image").tail(1).set_index("image")
    assert (best.loc[atelectasis, "label"] == 1).all()


def test_planted_findings_are_learnt_from_scratch_out_of_fold(tmp_path, monkeypatch):
    """Five folds of the smoke profile's detector on all phantom films; minutes, in two processes."""
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path))
    monkeypatch.delenv("DLIA_DATA", raising=False)
    one = study.open_detection(start_run(NOTEBOOK, **OUT_OF_FOLD))
    study.train_folds(one, devices=["", ""])
    found = [study.look(one, fold, "score", looks=(views.PLAIN,)) for fold in study.folds(one)]
    scored = np.concatenate([fold.score for fold in study.folds(one)])
    joined = study.join(pd.concat(found), method="wbf", views_used=(0,), run=one.run)
    own = study.matches(one, scored, joined)
    assert len(scored) == (one.dataset.manifest["label"] >= 0).sum()
    by_class = evaluate.average_precision(own)[0.5]
    assert evaluate.summary(own)["mAP50"] >= 0.6, by_class
    assert by_class.loc[1] >= 0.4, "Atelectasis, label 1"
