from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dlia_utils.data import cache, datasets, explore, sources


def images_of(count=240, *, seed=0, splits=("train", "val", "test"), patients=None):
    """A data set of two classes, divided at random; no files."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, count)
    manifest = pd.DataFrame({"path": np.arange(count).astype(str), "label": label, "group": ""})
    manifest["class_name"] = np.array(["Normal", "COVID"])[label]
    manifest["patient"] = np.arange(count) if patients is None else patients
    manifest["split"] = rng.choice(splits, count)
    ignored = pd.DataFrame(columns=["path", "reason"])
    return datasets.Dataset("demo", None, manifest, ("Normal", "COVID"), ignored, True, "argument")


def cached(images):
    images = np.asarray(images, np.uint8)
    return cache.ImageCache(images, images.shape[1], "key", None, ())


def noise(count, seed=0, low=60, high=190):
    """Images whose own mean grey differs, as exposures do."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(low, high, (count, 1, 1))
    return (level + rng.uniform(-40, 40, (count, 8, 8))).clip(0, 255)


def with_labels(dataset, labels, **columns):
    names = np.array(["Normal", "COVID"])[labels]
    manifest = dataset.manifest.assign(label=labels, class_name=names, **columns)
    return replace(dataset, manifest=manifest)


def test_sizes():
    dataset = with_labels(images_of(5, splits=("train",)), [0, 1, 0, 1, 0])
    shapes = np.array([(30, 20), (40, 40), (30, 20), (20, 50), (30, 20)])
    table = explore.sizes(dataset, shapes).set_index("class_name")
    columns = ["images", "sizes", "commonest", "share"]
    assert table.loc["Normal", columns].tolist() == [3, 1, "30 x 20", 1.0]
    columns = ["images", "sizes", "height_min", "height_max", "width_max", "aspect_max"]
    assert table.loc["COVID", columns].tolist() == [2, 2, 20, 40, 50, 2.5]


def test_pixel_statistics_equal_numpy():
    images = cached(np.random.default_rng(1).integers(0, 256, (600, 8, 8)))  # More than one chunk.
    rows = {("train", "all"): np.arange(0, 600, 2), ("val", "COVID"): np.array([1, 5, 599])}
    table = explore.pixel_statistics(images, rows).set_index(["split", "class_name"])
    for key, chosen in rows.items():
        pixels = images.images[chosen] / 255
        expected = dict(images=len(chosen), min=pixels.min(), max=pixels.max(), mean=pixels.mean())
        expected |= dict(std=pixels.std(), contrast=pixels.std((1, 2)).mean())
        for name, image in (("pixel_mean", pixels.mean(0)), ("pixel_std", pixels.std(0))):
            expected |= {f"{name}_min": image.min(), f"{name}_max": image.max()}
        assert table.loc[key].to_dict() == pytest.approx(expected, abs=1e-6)


# --- are the splits alike?


def test_random_divisions_are_seldom_called_uneven():
    alarms = 0
    for seed in range(24):
        table = explore.uniform_split_test(images_of(seed=seed), cached(noise(240, seed)))
        assert len(table) == 5 and (table["p_holm"] >= table["p"]).all()
        alarms += table["uneven"].any()
    assert alarms <= 5  # 5 % each: more than 5 of 24 would happen once in 1000 times.


def test_a_planted_shift_of_grey_is_found_and_named():
    dataset, images = images_of(), noise(240, low=100, high=150)
    planted = (dataset.manifest["split"] == "val") & (dataset.manifest["class_name"] == "COVID")
    images[planted] += 30
    table = explore.uniform_split_test(dataset, cached(images)).set_index(["test", "class_name"])
    assert table.index[table["uneven"]].tolist() == [("mean grey", "COVID")]
    found = table.loc[("mean grey", "COVID")]
    assert "unevenly divided, by a large effect" in found["meaning"] and found["effect"] > 0.14
    assert "no sign of an uneven division" in table.loc[("contrast", "COVID"), "meaning"]


def test_uneven_class_shares_are_found_without_blaming_the_grey():
    dataset, images = images_of(), noise(240, low=100, high=110)
    manifest = dataset.manifest
    keep = ~((manifest["split"] == "val") & (manifest["label"] == 0) & (manifest.index % 4 > 0))
    images[manifest["label"] == 1] += 40  # Classes differ in grey, splits inside a class do not.
    dataset = replace(dataset, manifest=manifest[keep].reset_index(drop=True))
    table = explore.uniform_split_test(dataset, cached(images[keep]))
    assert table.loc[table["uneven"], "test"].tolist() == ["class counts"]


def test_a_patient_counts_once():
    # Ten copies of 24 images: as single images the chance differences would look certain.
    label = np.repeat(np.arange(24) % 2, 10)
    split = np.repeat(np.array(["train", "train", "val", "val"] * 6), 10)
    dataset = with_labels(images_of(patients=np.repeat(np.arange(24), 10)), label, split=split)
    images = np.repeat(noise(24, 3), 10, axis=0)
    once = replace(dataset, manifest=dataset.manifest.iloc[::10].reset_index(drop=True))
    p = explore.uniform_split_test(dataset, cached(images))["p"]
    pd.testing.assert_series_equal(p, explore.uniform_split_test(once, cached(images[::10]))["p"])


def test_one_split_cannot_be_compared_and_one_grey_is_no_error():
    with pytest.raises(ValueError, match="one split only"):
        explore.uniform_split_test(images_of(splits=("",)), cached(noise(240)))
    dataset = with_labels(images_of(60), np.zeros(60, int))
    table = explore.uniform_split_test(dataset, cached(np.full((60, 8, 8), 9)))
    assert table["p"].tolist() == [1.0, 1.0, 1.0] and not table["uneven"].any()


# --- format as a shortcut


def shortcut(dataset, shapes, **options):
    return explore.size_shortcut(dataset, shapes, draws=100, **options).set_index("features")


def test_a_leak_in_the_aspect_ratio_alone_is_found():
    dataset, rng = images_of(300), np.random.default_rng(5)
    height = rng.integers(200, 400, 300)
    aspect = np.where(dataset.manifest["label"] == 1, 1.3, 1.0) + rng.normal(0, 0.03, 300)
    found = shortcut(dataset, np.stack([height, np.round(height * aspect)], 1))
    assert found.loc["aspect ratio", "value"] > 0.98 and found.loc["all three", "value"] > 0.98
    assert found.loc["aspect ratio", "finding"].endswith("tells the classes apart almost fully")
    assert found.loc["height", "ci_low"] < 0.5 < found.loc["height", "ci_high"]
    assert found.loc["height", "finding"].startswith("no sign")


def test_sizes_that_have_nothing_to_do_with_the_class_score_chance():
    values = []
    for seed in range(3):
        shapes = np.random.default_rng(seed).integers(200, 400, (240, 2))
        values += shortcut(images_of(seed=seed), shapes)["value"].tolist()
    assert abs(np.mean(values) - 0.5) < 0.04
    found = shortcut(images_of(101), np.full((101, 2), 224))
    assert found["value"].tolist() == [0.5] * 4 == found["ci_high"].tolist()
    assert set(found["finding"]) == {"the same for all images: tells nothing"}


def test_patients_are_not_split_between_fit_and_score():
    # A size of its own for each patient, and a random class: only a fit that knows them scores.
    rng = np.random.default_rng(7)
    patients = np.repeat(np.arange(60), 8)
    label, side = rng.integers(0, 2, 60)[patients], rng.permutation(60)[patients] * 7 + 200
    dataset = with_labels(images_of(480, patients=patients), label)
    found = shortcut(dataset, np.stack([side, side], 1))
    assert found.loc["height", "value"] < 0.7 and not found.loc["height", "ci_low"] > 0.5
    for column, value in (("label", 0), ("patient", label)):
        wrong = replace(dataset, manifest=dataset.manifest.assign(**{column: value}))
        with pytest.raises(ValueError, match="two classes or more, with two patients"):
            shortcut(wrong, np.ones((480, 2)))


# --- figures


def test_figures_show_counts_and_mean_images():
    dataset, images = images_of(), cached(noise(240))
    figure = explore.figure_classes(dataset, "demo (SYNTHETIC)")
    assert "SYNTHETIC" in figure.alt()
    counts = dataset.manifest.groupby(["split", "class_name"]).size()
    assert {text.get_text().split("\n")[0] for text in figure.axes[0].texts} == {*map(str, counts)}
    figure = explore.figure_mean_images(images, dataset, "demo")
    train = dataset.manifest["split"] == "train"
    rows = [(train & (dataset.manifest["label"] == label)).to_numpy() for label in (0, 1)]
    means = [images.images[part].mean(0) / 255 for part in rows]
    shown = [axis.images[0].get_array() for axis in figure.axes[:3]]
    assert np.allclose(shown[0], means[0]) and np.allclose(shown[2], means[1] - means[0])


def test_real_fractures_are_given_away_by_the_format_in_part(real_data):
    dataset = datasets.load(sources.find("fracatlas", real_data))
    found = shortcut(dataset, cache.shapes(dataset))
    assert found["n"].eq(len(dataset.manifest)).all() and found.loc["all three", "value"] > 0.6
    assert "a shortcut" in found.loc["all three", "finding"]
