"""What detectors learn: labels, boxes and decoding are right. These tests take minutes."""

import numpy as np
import pandas as pd
import pytest
from small import start_run

from dlia_utils import launch, models, objectives, train
from dlia_utils.data import augment, cache, datasets, sources
from dlia_utils.detect import evaluate, folds, fuse, views
from dlia_utils.models.detector import LIGHT, faster_rcnn

OVERFIT = dict(epochs=120, lr=0.02, warmup_epochs=5, batch_size=4, clip_norm=5.0)


@pytest.mark.real
def test_the_light_detector_learns_the_four_real_nih_images_by_heart(real_data, tmp_path):
    """Class 1 (Atelectasis) included: with labels from 0 it cannot be found."""
    nih = datasets.load(sources.find("nih", real_data), allow_missing=True)
    boxes = datasets.boxed(nih).boxes
    assert boxes["image"].nunique() == 4 and 1 in set(boxes["label"])
    images = cache.build(datasets.boxed(nih), size=320, fit="pad")
    cheap = dict(rpn_pre_nms=200, rpn_post_nms=64, roi_batch=32)
    model = faster_rcnn(arch=LIGHT, num_classes=8, size=320, **cheap)

    def score(candidate):
        found = views.predict(candidate, images, range(4), progress=False)
        own = evaluate.match(boxes, found, images=range(4), classes=8)
        return {"mAP50": evaluate.summary(own)["mAP50"]}

    options = dict(run_dir=tmp_path, val_metric=score, monitor="mAP50", progress=False)
    options |= dict(collate=augment.collate_boxes, optimizer="sgd", schedule="cosine", **OVERFIT)
    train_set = augment.CachedBoxes(images, range(4), boxes)
    fitted = train.fit(model, objectives.detection(), train_set, None, **options)
    assert fitted.best_score >= 0.95, fitted.history.tail()
    found = views.predict(models.load(tmp_path / "best.pt"), images, range(4), progress=False)
    best = found.sort_values("score").groupby("image").tail(1).set_index("image")
    assert (best.loc[boxes.loc[boxes["label"].eq(1), "image"], "label"] == 1).all()


def test_planted_findings_are_learnt_from_scratch_out_of_fold(tmp_path, monkeypatch):
    """Five folds of the smoke profile's detector on all phantom images, in two processes."""
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path))
    monkeypatch.delenv("DLIA_DATA", raising=False)
    sizes = dict(images=None, folds=5, run_folds=5, epochs=11)
    study = folds.open_detection(start_run("05_nih_detection", **sizes))
    run, by_name = study.run, {fold.name: fold for fold in folds.folds(study)}
    uses = {"detector": run.pick(*folds.DETECTOR), "recipe": run.pick(*folds.RECIPE)}

    def look(name):
        folds.train_fold(study, by_name[name], flip=run.flip, **uses)
        model = models.load(run.run_dir / name / "best.pt")
        return views.predict(model, study.cache, by_name[name].score, progress=False)

    parts = launch.each(look, list(by_name), log_dir=tmp_path / "logs", devices=["", ""])
    scored = np.concatenate([fold.score for fold in by_name.values()])
    found = fuse.one_per_class(pd.concat(parts.values(), ignore_index=True))
    own = folds.matches(study, scored, found)
    assert len(scored) == (study.dataset.manifest["label"] >= 0).sum()
    by_class = evaluate.average_precision(own)[0.5]
    assert evaluate.summary(own)["mAP50"] >= 0.6, by_class
    assert by_class.loc[1] >= 0.4, "Atelectasis, label 1"
