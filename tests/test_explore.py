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


def with_labels(dataset, labels, **columns):
    names = np.array(["Normal", "COVID"])[labels]
    manifest = dataset.manifest.assign(label=labels, class_name=names, **columns)
    return replace(dataset, manifest=manifest)


def test_statistics_of_images_equal_numpy():
    images = cached(np.random.default_rng(1).integers(0, 256, (600, 8, 8)))  # More than one chunk.
    pixels = images.images / 255
    chosen = np.arange(0, 600, 2)
    mean, spread = explore.mean_and_spread(images, chosen)
    assert np.allclose(mean, pixels[chosen].mean(0)) and np.allclose(spread, pixels[chosen].std(0))


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


def test_real_fractures_are_given_away_by_the_format_in_part(real_data):
    dataset = datasets.load(sources.find("fracatlas", real_data))
    found = shortcut(dataset, cache.shapes(dataset))
    assert found["n"].eq(len(dataset.manifest)).all() and found.loc["all three", "value"] > 0.6
    assert "a shortcut" in found.loc["all three", "finding"]
