"""What the sections of a notebook share, on the phantom in a run folder of its own."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from small import start_run

from dlia_utils import corrupt, device, models, objectives, study, train
from dlia_utils.data import augment, datasets, sources
from dlia_utils.data.tables import BadData

NOTEBOOK = "01_pneumonia_robustness"
TINY = {"epochs": 1, "per_class": 12}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("DLIA_DATA", raising=False)
    return study.open_study(start_run(NOTEBOOK, **TINY))


def test_splits_are_disjoint_balanced_by_weights_and_only_training_is_augmented(opened):
    rows = {name: opened.rows(name) for name in ("train", "val", "test")}
    assert sum(map(len, rows.values())) == len(opened.dataset.manifest)
    assert not set(opened.patients(rows["train"])) & set(opened.patients(rows["val"]))
    images, labels = opened.images(rows["val"]), opened.labels(rows["val"])
    assert images.shape == (len(rows["val"]), 1, 48, 48) and 0 <= images.min() and images.max() <= 1
    assert labels.dtype == torch.int64 and set(labels.tolist()) == {0, 1}
    counts = np.bincount(opened.labels(rows["train"]).numpy())
    assert np.allclose(counts * np.array(opened.class_weights()), counts.sum() / 2)
    plain, augmented = opened.torch_set("train"), opened.torch_set("train", augmented=True)
    assert torch.equal(plain[0][0], opened.images([plain[0][2]])[0])
    assert not torch.equal(plain[0][0], augmented[0][0])


def test_on_a_gpu_the_training_images_are_changed_there(opened):
    plain = opened.torch_set("train", augmented=True)
    object.__setattr__(opened.run, "device", "cuda")
    there, held_out = opened.torch_set("train", augmented=True), opened.torch_set("val")
    object.__setattr__(opened.run, "device", "cpu")
    assert (there.device, held_out.device, plain.device) == ("cuda", "", "")
    there.device = "cpu"
    ((x, y, row),) = there.__getitems__([3])
    assert (x - plain[3][0]).abs().mean() < 1e-3 and (y, row) == plain[3][1:]
    # A run that began on a GPU is read back without one.
    assert study.described(there) == study.described(plain) and "pixels" in vars(there)


def fit(opened, name="baseline", **options):
    return study.train_model(opened, name, objectives.cross_entropy(), progress=False, **options)


def made_at(opened, name="baseline"):
    return (opened.run.run_dir / name / "last.pt").stat().st_mtime_ns


def table(value):
    return lambda: pd.DataFrame({"value": [value]})


def test_a_finished_model_is_read_back_and_loads_and_a_missing_one_names_the_section(opened):
    pd.testing.assert_frame_equal(fit(opened).history, fit(opened).history)
    model = study.load_models(opened, ["baseline"])["baseline"]
    assert not model.training and model(opened.images([0])).shape == (1, 2)
    words = "nobody.*run the section '3 Training' first; in a notebook of your own, copy that"
    with pytest.raises(FileNotFoundError, match=words):
        study.load_models(opened, ["nobody"])


def test_a_training_out_of_time_stops_with_words_and_goes_on(opened):
    words = "slow stopped after 1 of 2 epochs: .*run again to go on.*--set max_minutes=4e-06 "
    with pytest.raises(train.OutOfTime, match=words):
        fit(opened, "slow", epochs=2, max_minutes=1e-6)
    assert len(fit(opened, "slow", epochs=2).history) == 2


def test_a_table_is_kept_for_the_weights_and_the_settings_that_it_depends_on(opened):
    calls = []

    def made(one, name="robust", **options):
        def compute():
            calls.append(1)
            return table(len(calls))()

        return study.stored(one, name, compute, **options)["value"].item()

    fit(opened)
    given = {"model": "baseline", "uses": ["pgd_steps"]}
    assert [made(opened, **given) for _ in range(3)] == [1, 1, 1]
    assert made(opened.variant(bootstrap_draws=7), **given) == 1, "it does not depend on that"
    assert made(opened.variant(pgd_steps=7), **given) == 2
    assert made(opened, **given) == 3, "nor is the other one's read back"
    fit(opened, "further", start="baseline", lr=1e-3)
    (opened.run.run_dir / "baseline").rename(opened.run.run_dir / "gone")
    (opened.run.run_dir / "further").rename(opened.run.run_dir / "baseline")
    with pytest.raises(FileNotFoundError, match="robust.csv is not in .*'5 The suite'"):
        study.stored(opened, "robust", model="baseline", section="5 The suite")
    assert made(opened, **given) == 4, "other weights"
    assert study.stored(opened, "robust", model="baseline")["value"].item() == 4
    assert made(opened, name="all") == 5
    assert made(opened.variant(bootstrap_draws=7), name="all") == 6, "all settings"


def test_what_a_change_does_not_touch_is_taken_over_from_the_run_beside(opened, caplog):
    fit(opened)
    given = {"model": "baseline", "uses": ["pgd_steps"]}
    study.stored(opened, "t", table(1), **given)
    other = study.open_study(start_run(NOTEBOOK, **TINY, bootstrap_draws=99))
    assert other.run.run_dir != opened.run.run_dir and not (other.run.run_dir / "baseline").exists()
    caplog.set_level("INFO")
    fit(other)
    assert "baseline is taken over from the run smoke-synthetic" in caplog.text
    assert made_at(other) == made_at(opened), "nothing was trained"
    found = study.stored(other, "t", lambda: pytest.fail("computed"), **given)
    assert found["value"].item() == 1
    slower = study.open_study(start_run(NOTEBOOK, **TINY, lr=1e-4))
    fit(slower)
    assert made_at(slower) != made_at(opened)
    assert study.stored(slower, "t", table(2), **given)["value"].item() == 2, "another model"


def test_a_run_begun_afresh_takes_nothing_from_others(opened):
    fit(opened)
    fresh = study.open_study(start_run(NOTEBOOK, name="fresh", resume=False, **TINY))
    fit(fresh)
    before = made_at(fresh)
    assert before != made_at(opened)
    again = study.open_study(start_run(NOTEBOOK, name="fresh", **TINY))
    fit(again)
    assert made_at(again) == before, "its own is read back"


def test_force_goes_on_in_a_folder_but_never_with_a_stale_model_or_table(opened, caplog):
    first = study.open_study(start_run(NOTEBOOK, name="mine", **TINY))
    fit(first)
    fit(first, "pgd_at")
    study.stored(first, "t_at", table(1), model="pgd_at", uses=["lr"])
    changed = TINY | {"lr": 1e-4}
    forced = study.open_study(start_run(NOTEBOOK, name="mine", resume="force", **changed))
    before = study.weights_key(first.run, "baseline")
    fit(forced)
    words = "baseline was made under other settings (options.lr: 0.002 -> 0.0001): put aside"
    assert words in caplog.text and study.weights_key(forced.run, "baseline") != before
    assert list(forced.run.run_dir.glob("baseline.*.old/best.pt")), "nothing is lost"
    assert made_at(forced, "pgd_at"), "another model is left alone"
    again = study.stored(forced, "t_at", table(2), model="pgd_at", uses=["lr"])
    assert again["value"].item() == 2


def test_a_training_depends_on_what_it_is_given_and_not_on_how_long_it_may_take(opened):
    fit(opened)
    before = made_at(opened)
    fit(opened, max_minutes=99.0, num_workers=0)
    assert made_at(opened) == before
    plain, augmented = opened.torch_set("train"), opened.torch_set("train", augmented=True)
    key = str(study.described(augmented))
    assert key == str(study.described(opened.torch_set("train", augmented=True)))
    few = augment.CachedImages(opened.cache, plain.rows[:8], plain.labels[:8])
    lists = ("contrast",), ("contrast", "brightness")
    sets = [plain, few, *(corrupt.TrainAugmentor(plain, names=names) for names in lists)]
    assert len({key, *(str(study.described(one)) for one in sets)}) == 5 and "0x" not in key


def test_a_run_opens_its_data_once_and_no_other_keeps_them(opened):
    assert study.open_study(opened.run) is opened and opened.variant(lr=1.0).cache is opened.cache
    again = start_run(NOTEBOOK, **TINY)
    assert not again.opened and study.open_study(again).key == opened.key


def test_a_changed_file_is_other_data(opened):
    copied = opened.run.run_dir / "copy"
    shutil.copytree(opened.dataset.root, copied)

    def key():
        return replace(opened, dataset=replace(opened.dataset, root=copied)).key

    assert key() == opened.key, "a copy is the same data"
    path = copied / opened.dataset.manifest["path"][0]
    path.write_bytes(path.read_bytes() + b"x")
    assert key() != opened.key


def tiny_net(classes=2):
    pool = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, classes))
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 4), torch.nn.ReLU(), *pool)
    return models.wrap(net, mean=0.5, std=0.25)


def own_study(**own):
    run = start_run(NOTEBOOK, **TINY)
    run.own.update(own)
    return study.open_study(run)


def test_a_network_of_ones_own_is_trained_kept_and_read_back_without_a_registry(opened):
    one = own_study(mine=tiny_net)
    fitted = fit(one, "mine")
    assert len(fitted.history) == 1 and study.weights_label(one.run, "mine") == "the reader's own"
    model = study.load_models(one, ["mine"])["mine"]
    x = one.images(one.rows("val"))
    assert not model.training and model(x).shape == (len(x), 2)
    before = made_at(one, "mine")
    fit(own_study(mine=tiny_net), "mine")
    assert made_at(one, "mine") == before, "the same start, so the training is read back"


def test_a_trained_network_is_taken_as_it_is(opened):
    net = tiny_net().eval()
    one = own_study(ready=net)
    fit(one, "ready")
    assert not (one.run.run_dir / "ready" / "last.pt").exists()
    loaded = study.load_models(one, ["ready"])["ready"]
    assert device.fingerprint(loaded) == device.fingerprint(net)
    assert study.weights_key(one.run, "ready")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"mine": lambda: tiny_net(1)}, r"run.own\['mine'\]: .*one logit"),
        ({"mine": lambda: tiny_net(3)}, r"run.own\['mine'\]: .*3"),
        ({"a/b": tiny_net}, "run.own: 'a/b' cannot name a folder"),
    ],
)
def test_a_network_that_cannot_take_part_is_refused_before_any_training(opened, own, message):
    with pytest.raises(ValueError, match=message):
        own_study(**own)


def test_a_training_goes_on_from_another_model_and_leaves_it_as_it_was(opened):
    fit(opened)
    before = study.load_models(opened, ["baseline"])["baseline"]
    fit(opened, "further", start="baseline", lr=1e-9)
    loaded = study.load_models(opened, ["baseline", "further"])
    assert device.fingerprint(loaded["baseline"]) == device.fingerprint(before)
    for one, other in zip(before.parameters(), loaded["further"].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("kind", ["kernel", "operator"])
def test_spectral_bounds_hold_while_training_and_plain_layers_come_back(opened, kind):
    fit(opened, kind, spectral=kind)
    model = study.load_models(opened, [kind])[kind]
    assert not any(map(torch.nn.utils.parametrize.is_parametrized, model.modules()))
    norms = models.compare_norms(model.backbone, (3, 48, 48))
    assert norms[{"kernel": "reshaped_norm", "operator": "operator_norm"}[kind]].max() < 1.1


@pytest.mark.parametrize("wanted", [True, "phantom"])
def test_random_starting_weights_are_said_for_every_model(opened, monkeypatch, caplog, wanted):
    run = opened.run.variant(pretrained=wanted, width=0.6)
    if wanted is True:
        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
        monkeypatch.delenv("DLIA_WEIGHTS", raising=False)
    for begun in (True, False):
        caplog.clear()
        study.build_model(run)
        assert "training starts from RANDOM weights and will be weaker" in caplog.text
        assert ("this run began so" in caplog.text) != begun
    assert study.weights_label(run) == "random"


def offline(*_, **__):
    raise OSError("no internet")


def test_starting_weights_are_said_and_kept(opened, monkeypatch):
    run = opened.run.variant(pretrained=True)
    assert study.weights_label(run) == "random", "nothing was loaded yet, and asking loads nothing"

    def offline(**_):
        raise RuntimeError("no internet")

    monkeypatch.setattr(models, "mobilenet_v2", offline)
    assert study.starting_weights(run) is None, "offline: goes on from random weights and says so"
    (run.run_dir / "weights.txt").write_text("file some.pth")
    for given in ("", "another.pth"):
        monkeypatch.setenv("DLIA_WEIGHTS", given)
        with pytest.raises(FileNotFoundError, match="started from file some.pth: set DLIA_WEIGHTS"):
            study.starting_weights(run)
    (run.run_dir / "weights.txt").write_text("nothing known")
    with pytest.raises(ValueError, match="weights.txt names no weights .*delete it"):
        study.starting_weights(run)
    (run.run_dir / "weights.txt").write_text("file some.pth")
    (run.run_dir / "one").mkdir()
    (run.run_dir / "one" / "weights.txt").write_text("public")
    labels = [study.weights_label(run, name) for name in ("one", "two")]
    assert labels == ["public", "file some.pth"]


FRACTURES = "02_fracatlas_robust_models"


@pytest.fixture
def fractures(tmp_path, monkeypatch):
    """FracAtlas's phantom in a folder of the test, so that files can be damaged."""
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    # Without this the images found, and damaged below, would be the real ones.
    monkeypatch.delenv("DLIA_DATA", raising=False)
    monkeypatch.setenv("DLIA_CACHE", str(tmp_path / "cache"))
    location = sources.find("fracatlas")
    assert location.synthetic and tmp_path in location.root.parents
    return location.root


def open_fractures(root, name="", **changes):
    return study.open_study(start_run(FRACTURES, root, name, epochs=1, per_class=None, **changes))


def test_a_set_without_official_test_split_is_drawn_and_near_duplicates_stay_together(fractures):
    one = open_fractures(fractures)
    looks = one.dataset.manifest.groupby("look")["split"]
    assert (looks.nunique() == 1).all() and (looks.size() > 1).any()
    assert set(one.dataset.manifest["split"]) == {"train", "val", "test"}
    assert one.cache.fit == "pad" and (one.run.run_dir / "split.json").exists()


def test_an_official_split_of_all_images_is_kept(fractures):
    data = datasets.load(sources.find("fracatlas", fractures))
    parts = np.resize(["train", "val", "test"], len(data.manifest))
    data = replace(data, manifest=data.manifest.assign(split=parts))
    one = study.open_study(start_run(FRACTURES, fractures, "official"), dataset=data)
    kept = one.dataset.manifest.set_index("path")["split"]
    assert kept.to_dict().items() <= dict(zip(data.manifest["path"], parts, strict=True)).items()
    assert "look" in one.dataset.manifest


def test_a_few_unusable_files_are_left_out_by_name_and_more_are_refused(fractures, caplog):
    healthy = sorted((fractures / "images" / "Non_fractured").glob("*.jpg"))
    healthy[0].write_bytes(healthy[0].read_bytes()[:900])
    opened = open_fractures(fractures, "one-lost")
    assert healthy[0].name in caplog.text and "left out" in caplog.text
    assert len(opened.dataset.manifest) == 219 and len(opened.cache.images) == 219
    for path in healthy[1:3]:  # of 220 one in a hundred may be lost
        path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(BadData, match="3 unusable files"):
        open_fractures(fractures, "three-lost")


def test_sampling_replaces_class_weights(fractures):
    opened = open_fractures(fractures, "sampling", balance="sampling")
    drawn = opened.torch_set("train", augmented=True)
    classes = np.bincount([drawn[k][1] for k in range(len(drawn))])
    assert opened.class_weights() is None and abs(np.diff(classes)).item() <= 1
    assert len(opened.torch_set("val")) == len(opened.rows("val")), "only training is balanced"


def test_a_head_is_trained_on_features_kept_whole_and_read_back(fractures):
    opened = open_fractures(fractures, "head")
    made = models.with_head(study.build_model(opened.run), seed=1)
    body = {name: value.clone() for name, value in made.backbone.body.state_dict().items()}
    loss = objectives.cross_entropy()
    fitted = study.train_head(opened, "probe", made, loss, epochs=3, progress=False)
    loaded = study.load_models(opened, ["probe"])["probe"]
    x = opened.images(opened.rows("val"))
    assert len(fitted.history) == 3 and torch.equal(loaded(x), made.eval()(x))
    kept = loaded.backbone.body.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in body.items())
    auc = fitted.history.set_index("epoch")["val_auc"][fitted.best_epoch]
    labels, chance = opened.labels(opened.rows("val")).numpy(), loaded(x).detach().softmax(1)[:, 1]
    assert roc_auc_score(labels, chance) == pytest.approx(auc, abs=1e-6)
    assert study.trained(opened, ["nobody", "probe"]) == ["probe"]


def test_a_variant_has_other_settings_and_sizes_but_the_same_images_and_run(opened):
    other = opened.variant(size=24, epochs=7)
    assert other.images([0]).shape == (1, 1, 24, 24) and other.run.epochs == 7
    assert opened.run.size == 48 and other.run.run_dir == opened.run.run_dir
    assert other.dataset is opened.dataset and other.key != opened.key


@pytest.fixture
def tested(tmp_path, monkeypatch):
    """A study with a model that was never tested."""
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("DLIA_DATA", raising=False)
    one = study.open_study(start_run("06_covid_baseline", per_class=24, size=32))
    keep_model(one, seed=0)
    return one


def keep_model(opened, *, seed):
    model = models.cnn(channels=(4, 4), hidden=8, seed=seed)
    models.save(model, opened.run.run_dir / "baseline" / "best.pt", meta={})


def openings(opened):
    path = opened.run.run_dir / "test_log.csv"
    return pd.read_csv(path)["purpose"].tolist() if path.exists() else []


def test_every_opening_is_logged_and_a_final_one_only_once(tested):
    for _ in range(2):
        log = study.test_opened(tested, "exploration")
    assert log["purpose"].tolist() == ["exploration"] * 2 and log["split"].nunique() == 1
    study.test_opened(tested, "final", final=True, force=True)
    for _ in range(2):
        with pytest.raises(study.AlreadyOpened, match=r"'final' at 20\d\d-.*force=True"):
            study.test_opened(tested, "final", final=True)
        assert openings(tested)[2] == "final", "forced where nothing was opened: an ordinary one"
        study.test_opened(tested, "final", final=True, force=True)
    assert openings(tested)[3:] == ["final (AGAIN, forced)"] * 2, "a refusal opens nothing"
    with pytest.raises(FileNotFoundError, match="nobody/best.pt is not in"):
        study.predictions(tested, "nobody")
    with pytest.raises(ValueError, match="purpose is empty"):
        study.test_opened(tested, " ")


def test_predictions_are_those_of_the_model_on_the_test_images_and_are_read_back(
    tested, monkeypatch
):
    told = study.predictions(tested, "baseline")
    rows = tested.rows("test")
    model = models.cnn(channels=(4, 4), hidden=8, seed=0).eval()
    with torch.no_grad():
        expected = model(tested.images(rows)).double().softmax(1)[:, 1].numpy()
    assert told["image"].tolist() == rows.tolist()
    assert told["probability"].to_numpy() == pytest.approx(expected, abs=1e-6)
    assert told["label"].tolist() == tested.labels(rows).tolist()
    assert told["path"].tolist() == tested.dataset.manifest["path"][rows].tolist()
    monkeypatch.setattr(train, "predict", lambda *_: pytest.fail("the images were read again"))
    pd.testing.assert_frame_equal(study.predictions(tested, "baseline"), told)
    assert openings(tested) == ["final test of baseline"]


def test_another_training_after_the_test_is_refused_and_can_be_forced(tested):
    first = study.predictions(tested, "baseline")
    keep_model(tested, seed=1)
    with pytest.raises(study.AlreadyOpened):
        study.predictions(tested, "baseline")
    second = study.predictions(tested, "baseline", force=True)
    assert second["weights"].iloc[0] != first["weights"].iloc[0]
    assert openings(tested)[1:] == ["final test of baseline (AGAIN, forced)"]
    pd.testing.assert_frame_equal(study.predictions(tested, "baseline"), second)


BROKEN = {"empty": "", "a list": "[]", "cut": '{"a": ', "other encoding": "\xff"}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_record_of_another_run_is_passed_over_and_an_own_one_is_named(
    opened, caplog, kind
):
    other = opened.run.run_dir.with_name("other")
    for path in (other / "work" / "key.json", other / "tables" / "one.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(BROKEN[kind], encoding="latin-1")
    folder = study.work_folder(opened.run, "work", {"a": 1})
    assert study.stored(opened, "one", table(3))["value"].item() == 3
    assert caplog.text.count("passed over") == 2
    for path, again in (
        (folder / "key.json", lambda: study.work_folder(opened.run, "work", {"a": 1})),
        (opened.run.run_dir / "tables/one.json", lambda: study.stored(opened, "one", table(3))),
    ):
        path.write_text(BROKEN[kind], encoding="latin-1")
        with pytest.raises(ValueError, match=f"{path.name} is damaged.*delete it, and it is made"):
            again()
        path.unlink()  # which the message names
        again()


def test_half_a_copied_run_is_taken_for_none(opened):
    half = opened.run.run_dir.with_name(".other.77-ab.tmp") / "work" / "key.json"
    half.parent.mkdir(parents=True)
    half.write_text('{"a": 1}')
    (half.parent / "last.pt").write_text("half")
    assert not (study.work_folder(opened.run, "work", {"a": 1}) / "last.pt").exists()


def test_the_test_split_is_opened_once_by_two_at_once(tested):
    assert tested.key

    def opening(_):
        try:
            return len(study.test_opened(tested, "final", final=True))
        except study.AlreadyOpened:
            return 0

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(opening, range(8))) == 1
    assert len(openings(tested)) == 1
