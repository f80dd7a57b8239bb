"""What the sections of a notebook share, on the phantom in a run folder of its own."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from dlia_utils import config as dlia_config
from dlia_utils import datasets, locate, models, objectives, study

NOTEBOOK = "01_pneumonia_robustness"


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("DLIA_DATA", raising=False)
    monkeypatch.setitem(dlia_config.SETTINGS[NOTEBOOK]["smoke"], "epochs", 1)
    monkeypatch.setitem(dlia_config.SETTINGS[NOTEBOOK]["smoke"], "per_class", 12)
    return study.open_study(dlia_config.resolve(NOTEBOOK, "smoke"))


def test_splits_are_disjoint_and_patients_do_not_cross(opened):
    rows = {name: opened.rows(name) for name in ("train", "val", "test")}
    assert sum(map(len, rows.values())) == len(opened.dataset.manifest)
    assert not set(opened.patients(rows["train"])) & set(opened.patients(rows["val"]))
    images, labels = opened.images(rows["val"]), opened.labels(rows["val"])
    assert images.shape == (len(rows["val"]), 1, 48, 48) and 0 <= images.min() and images.max() <= 1
    assert labels.dtype == torch.int64 and set(labels.tolist()) == {0, 1}


def test_class_weights_balance_the_loss(opened):
    counts = np.bincount(opened.labels(opened.rows("train")).numpy())
    assert np.allclose(counts * np.array(opened.class_weights()), counts.sum() / 2)


def test_only_training_images_are_augmented(opened):
    plain, augmented = opened.torch_set("train"), opened.torch_set("train", augmented=True)
    assert torch.equal(plain[0][0], opened.images([plain[0][2]])[0])
    assert not torch.equal(plain[0][0], augmented[0][0])


def test_a_finished_model_is_read_back_and_loads(opened):
    weights = opened.class_weights()
    first = study.train_model(opened, "baseline", objectives.cross_entropy(weight=weights), progress=False)
    again = study.train_model(opened, "baseline", objectives.cross_entropy(weight=weights), progress=False)
    assert first.status == again.status == "done"
    pd.testing.assert_frame_equal(first.history, again.history)
    model = study.load_models(opened, ["baseline"])["baseline"]
    assert not model.training and model(opened.images([0])).shape == (1, 2)


def test_a_training_out_of_time_stops_with_words_and_goes_on(opened):
    objective = objectives.cross_entropy()
    with pytest.raises(study.OutOfTime, match="stopped after 1 of 2 epochs, which are kept"):
        study.train_model(opened, "slow", objective, epochs=2, max_minutes=1e-6, progress=False)
    assert len(study.train_model(opened, "slow", objective, epochs=2, progress=False).history) == 2


def test_a_model_that_was_not_trained_names_the_section(opened):
    with pytest.raises(FileNotFoundError, match="'Training' first"):
        study.load_models(opened, ["nobody"])


def test_tables_are_kept_until_their_model_is_trained_further(opened):
    calls = []

    def compute():
        calls.append(1)
        return pd.DataFrame({"value": [0.5]})

    for _ in range(2):
        assert study.stored(opened, "robust_baseline", compute)["value"].item() == 0.5
    study.stored(opened, "robust_other", compute)
    assert len(calls) == 2
    for name in ("baseline", "other"):
        study.suite_folder(opened.config, name).mkdir(parents=True)
    study.train_model(opened, "baseline", objectives.cross_entropy(), progress=False)
    tables = {path.name for path in (opened.config.run_dir / "tables").iterdir()}
    assert tables == {"robust_other.csv"}
    assert [path.name for path in study.suite_folder(opened.config, "x").parent.iterdir()] == ["other"]


def test_a_training_goes_on_from_another_model_and_leaves_it_as_it_was(opened):
    study.train_model(opened, "baseline", objectives.cross_entropy(), progress=False)
    before = study.load_models(opened, ["baseline"])["baseline"]
    study.train_model(opened, "further", objectives.cross_entropy(), start="baseline", lr=1e-9, progress=False)
    models_now = study.load_models(opened, ["baseline", "further"])
    assert objectives.fingerprint(models_now["baseline"]) == objectives.fingerprint(before)
    for one, other in zip(before.parameters(), models_now["further"].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_spectral_bounds_hold_while_training_and_plain_layers_come_back(opened):
    for kind in ("kernel", "operator"):
        study.train_model(opened, kind, objectives.cross_entropy(), spectral=kind, progress=False)
        model = study.load_models(opened, [kind])[kind]
        assert not any(torch.nn.utils.parametrize.is_parametrized(module) for module in model.modules())
        norms = models.compare_norms(model.backbone, (3, 48, 48))
        assert norms[{"kernel": "reshaped_norm", "operator": "operator_norm"}[kind]].max() < 1.1


def test_every_opening_of_the_test_split_is_logged(opened):
    study.test_opened(opened, "first")
    log = study.test_opened(opened, "second")
    assert log["purpose"].tolist() == ["first", "second"] and log["split"].nunique() == 1


def test_attack_subset_is_balanced_and_fixed(opened):
    rows = study.attack_subset(opened, 3)
    assert opened.labels(rows).bincount().tolist() == [3, 3]
    assert set(rows) <= set(opened.rows("test"))
    assert np.array_equal(rows, study.attack_subset(opened, 3))


def test_bad_files_stop_the_study_before_any_training(opened, tmp_path):
    tree = tmp_path / "data" / "chest_xray"
    for split, name in [(s, c) for s in ("train", "test") for c in ("NORMAL", "PNEUMONIA")]:
        (tree / split / name).mkdir(parents=True)
        (tree / split / name / "person1_virus_1.jpeg").write_bytes(b"")
    config = dlia_config.resolve(NOTEBOOK, "smoke", str(tmp_path / "data"), "bad")
    with pytest.raises(datasets.BadData, match="train/NORMAL/person1_virus_1.jpeg: empty file"):
        study.open_study(config)


def test_removing_a_file_that_does_not_decode_is_enough(opened, tmp_path, monkeypatch):
    monkeypatch.setitem(dlia_config.SETTINGS[NOTEBOOK]["smoke"], "per_class", None)
    shutil.copytree(opened.config.location.root, tmp_path / "data" / "chest_xray")
    cut = sorted((tmp_path / "data").glob("chest_xray/train/NORMAL/IM-*.jpeg"))[0]
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 3])
    config = dlia_config.resolve(NOTEBOOK, "smoke", str(tmp_path / "data"), "cut")
    with pytest.raises(datasets.BadData, match=f"{cut.name}: truncated"):
        study.open_study(config)
    cut.unlink()
    assert len(study.open_study(config).dataset.manifest) == 319


def test_starting_weights_are_said_and_kept(opened, monkeypatch):
    assert study.weights_label(opened.config) == "random"
    monkeypatch.setitem(opened.config.settings, "pretrained", True)
    (opened.config.run_dir / "weights.txt").unlink()

    def offline(**_):
        raise RuntimeError("no internet")

    monkeypatch.setattr(study.models, "mobilenet_v2", offline)
    assert study.starting_weights(opened.config) is None, "offline: goes on from random weights and says so"
    (opened.config.run_dir / "weights.txt").write_text("file some.pth")
    monkeypatch.delenv("DLIA_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError, match="set DLIA_WEIGHTS"):
        study.starting_weights(opened.config)


# --------------------------------------------------------------- splits drawn anew, unusable files, heads, variants

FRACTURES = "02_fracatlas_robust_models"


@pytest.fixture
def fractures(tmp_path, monkeypatch):
    """FracAtlas's phantom in a folder of the test, so that files can be spoilt; the settings may be changed."""
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    # Without this the films found, and spoilt below, would be the real ones.
    monkeypatch.delenv("DLIA_DATA", raising=False)
    location = locate.find("fracatlas", phantom_dir=tmp_path / "phantom")
    assert location.synthetic and tmp_path in location.root.parents
    root, settings = location.root, dlia_config.SETTINGS[FRACTURES]["smoke"]
    monkeypatch.setitem(dlia_config.SETTINGS[FRACTURES], "smoke", settings | {"epochs": 1, "per_class": None})
    return root


def open_fractures(root, name=""):
    return study.open_study(dlia_config.resolve(FRACTURES, "smoke", str(root), name))


def test_a_set_without_official_test_split_is_drawn_and_near_duplicates_stay_together(fractures):
    one = open_fractures(fractures)
    looks = one.dataset.manifest.groupby("look")["split"].nunique()
    assert (looks == 1).all() and (one.dataset.manifest.groupby("look").size() > 1).any()
    assert set(one.dataset.manifest["split"]) == {"train", "val", "test"}
    assert one.cache.fit == "pad" and (one.config.run_dir / "split.json").exists()


def test_an_official_split_of_all_images_is_kept(fractures, monkeypatch):
    read = datasets.load

    def complete(location):
        dataset = read(location)
        names = np.resize(["train", "val", "test"], len(dataset.manifest))
        return replace(dataset, manifest=dataset.manifest.assign(split=names))

    monkeypatch.setattr(study.datasets, "load", complete)
    opened = open_fractures(fractures, "official")
    assert opened.dataset.manifest["split"].tolist() == complete(opened.config.location).manifest["split"].tolist()
    assert "look" in opened.dataset.manifest


def test_a_few_unusable_files_are_left_out_by_name_and_more_are_refused(fractures, monkeypatch, caplog):
    healthy = sorted((fractures / "images" / "Non_fractured").glob("*.jpg"))
    healthy[0].write_bytes(healthy[0].read_bytes()[:900])
    opened = open_fractures(fractures, "one-lost")
    assert healthy[0].name in caplog.text and "left out" in caplog.text
    assert len(opened.dataset.manifest) == 119 and len(opened.cache.images) == 119
    healthy[1].write_bytes(healthy[1].read_bytes()[:900])
    with pytest.raises(datasets.BadData, match="2 unusable files"):
        open_fractures(fractures, "two-lost")


def test_sampling_replaces_class_weights(fractures, monkeypatch):
    settings = dlia_config.SETTINGS[FRACTURES]["smoke"] | {"balance": "sampling"}
    monkeypatch.setitem(dlia_config.SETTINGS[FRACTURES], "smoke", settings)
    opened = open_fractures(fractures, "sampling")
    drawn = opened.torch_set("train", augmented=True)
    classes = np.bincount([drawn[k][1] for k in range(len(drawn))])
    assert opened.class_weights() is None and abs(np.diff(classes)).item() <= 1
    assert len(opened.torch_set("val")) == len(opened.rows("val")), "only training is balanced"


def test_a_head_is_trained_on_features_kept_whole_and_read_back(fractures):
    opened = open_fractures(fractures, "head")
    made = models.with_head(study.build_model(opened.config), seed=1)
    body = made.backbone.body.state_dict()
    fitted = study.train_head(opened, "probe", made, objectives.cross_entropy(), epochs=3, progress=False)
    loaded = study.load_models(opened, ["probe"])["probe"]
    x = opened.images(opened.rows("val"))
    assert len(fitted.history) == 3 and torch.equal(loaded(x), made.eval()(x))
    assert all(torch.equal(value, loaded.backbone.body.state_dict()[key]) for key, value in body.items())
    auc = fitted.history.set_index("epoch")["val_auc"][fitted.best_epoch]
    labels = opened.labels(opened.rows("val")).numpy()
    assert roc_auc_score(labels, loaded(x).detach().softmax(1)[:, 1]) == pytest.approx(auc, abs=1e-6)
    assert study.trained(opened, ["nobody", "probe"]) == ["probe"]


def test_a_variant_has_other_settings_and_sizes_but_the_same_films_and_run(fractures):
    opened = open_fractures(fractures, "variant")
    other = opened.variant(size=24, epochs=7, weights_text="a file")
    assert other.images([0]).shape == (1, 1, 24, 24) and other.config.epochs == 7
    assert opened.config.size == 48 and other.config.run_dir == opened.config.run_dir
    assert other.dataset is opened.dataset and other.key["config"] != opened.key["config"]
    assert study.weights_label(other.config) == "a file" and study.weights_label(opened.config) == "random"
