"""Exploration against planted truths: sizes, grey values, uneven splits and a format that gives the class away."""

from dataclasses import replace

import albumentations as A
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dlia_utils.data import cache, datasets, explore, sources

COLUMNS = ["path", "label", "class_name", "patient", "group", "split"]


def films(count=240, *, splits=("train", "val", "test"), seed=0, patients=None):
    """A data set without files: labels and splits drawn at random."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, count)
    manifest = pd.DataFrame(
        {
            "path": [f"{i}.png" for i in range(count)],
            "label": label,
            "class_name": np.array(["Normal", "COVID"])[label],
            "patient": np.arange(count) if patients is None else patients,
            "group": "",
            "split": rng.choice(splits, count),
        }
    )
    ignored = pd.DataFrame(columns=["path", "reason"])
    return datasets.Dataset("demo", None, manifest, ("Normal", "COVID"), ignored, True, "argument")


def cached(images):
    images = np.asarray(images, np.uint8)
    return cache.ImageCache(
        images, images.shape[1], "key", None, (), np.full((len(images), 2), 100, np.int32)
    )


def noise(count, seed=0, low=60, high=190):
    """Films whose own mean grey differs, as exposures do."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(low, high, (count, 1, 1))
    return (level + rng.uniform(-40, 40, (count, 8, 8))).clip(0, 255)


def written(folder, sizes, *, split="train", turned=()):
    rows = []
    for number, (height, width) in enumerate(sizes):
        exif = Image.Exif()
        if number in turned:
            exif[0x0112] = 6  # Lies on its side: shown with height and width exchanged.
        Image.new("L", (width, height), 90).save(folder / f"{number}.jpg", exif=exif)
        rows.append(
            (f"{number}.jpg", number % 2, ("Normal", "COVID")[number % 2], str(number), "", split)
        )
    manifest, ignored = (
        pd.DataFrame(rows, columns=COLUMNS),
        pd.DataFrame(columns=["path", "reason"]),
    )
    return datasets.Dataset(
        "demo", folder, manifest, ("Normal", "COVID"), ignored, True, "argument"
    )


# ------------------------------------------------------------------------------------------- sizes and grey values


def test_sizes_are_those_of_the_headers_upright(tmp_path):
    dataset = written(tmp_path, [(30, 20), (40, 40), (30, 20), (20, 50), (20, 30)], turned=(4,))
    table = explore.sizes(dataset).set_index("class_name")
    assert table.loc["Normal", ["images", "sizes", "commonest", "share"]].tolist() == [
        3,
        1,
        "30 x 20",
        1.0,
    ]
    assert table.loc[
        "COVID", ["images", "sizes", "height_min", "height_max", "width_max"]
    ].tolist() == [2, 2, 20, 40, 50]
    assert table.loc["COVID", "aspect_max"] == 2.5
    built = cache.build(dataset, size=8, root=tmp_path / "cache", progress=False)
    pd.testing.assert_frame_equal(
        explore.sizes(dataset), explore.sizes(dataset, known=built.shapes)
    )


def test_sizes_refuse_shapes_of_other_images():
    with pytest.raises(ValueError, match="has 240 images.*cache.shapes"):
        explore.sizes(films(), known=np.ones((3, 2)))


def test_rows_by_split_are_complete_and_in_order():
    dataset = films(splits=("test", "train"))
    found = explore.rows_by_split(dataset)
    assert list(found) == [
        (split, name) for split in ("train", "test") for name in ("all", "Normal", "COVID")
    ]
    assert sorted(np.concatenate([found["train", "all"], found["test", "all"]])) == list(range(240))
    assert set(dataset.manifest["class_name"].iloc[found["test", "COVID"]]) == {"COVID"}
    assert ("train", "all") not in explore.rows_by_split(dataset, together=False)


def test_pixel_statistics_equal_numpy():
    images = cached(np.random.default_rng(1).integers(0, 256, (600, 8, 8)))  # More than one chunk.
    rows = {"train": np.arange(0, 600, 2), ("val", "COVID"): np.array([1, 5, 599])}
    table = explore.pixel_statistics(images, rows)
    assert table[["split", "class_name", "images"]].values.tolist() == [
        ["train", "all", 300],
        ["val", "COVID", 3],
    ]
    for (_, row), chosen in zip(table.iterrows(), rows.values(), strict=True):
        pixels = images.images[chosen] / 255
        expected = {
            "min": pixels.min(),
            "max": pixels.max(),
            "mean": pixels.mean(),
            "std": pixels.std(),
            "contrast": pixels.std((1, 2)).mean(),
            "pixel_mean_min": pixels.mean(0).min(),
            "pixel_mean_max": pixels.mean(0).max(),
            "pixel_std_min": pixels.std(0).min(),
            "pixel_std_max": pixels.std(0).max(),
        }
        assert row[list(expected)].to_dict() == pytest.approx(expected, abs=1e-6)


def test_statistics_of_no_image_are_refused():
    with pytest.raises(ValueError, match="is the split empty"):
        explore.pixel_statistics(cached(noise(3)), {"val": []})


# ------------------------------------------------------------------------------------------- are the splits alike?


def test_random_divisions_are_seldom_called_uneven():
    alarms = 0
    for seed in range(24):
        table = explore.uniform_split_test(films(seed=seed), cached(noise(240, seed)))
        assert len(table) == 5 and (table["p_holm"] >= table["p"]).all()
        alarms += table["uneven"].any()
    # 5 % each: more than 5 of 24 would happen once in 1000 times.
    assert alarms <= 5


def test_a_planted_shift_of_grey_is_found_and_named():
    dataset, images = films(), noise(240, low=100, high=150)
    planted = (dataset.manifest["split"] == "val") & (dataset.manifest["class_name"] == "COVID")
    images[planted] += 30
    table = explore.uniform_split_test(dataset, cached(images)).set_index(["test", "class_name"])
    assert table.index[table["uneven"]].tolist() == [("mean grey", "COVID")]
    found = table.loc[("mean grey", "COVID")]
    assert (
        "unevenly divided, by a large effect" in found["meaning"]
        and "less than 0.1% of draws" in found["meaning"]
    )
    assert found["effect"] > 0.14
    assert "no sign of an uneven division" in table.loc[("contrast", "COVID"), "meaning"]


def test_uneven_class_shares_are_found_without_blaming_the_grey():
    dataset = films()
    manifest = dataset.manifest.copy()
    val = manifest["split"] == "val"
    keep = ~(val & (manifest["label"] == 0) & (manifest.index % 4 > 0))
    images = noise(240, low=100, high=110)
    images[manifest["label"] == 1] += 40  # Classes differ in grey, splits inside a class do not.
    dataset = replace(dataset, manifest=manifest[keep].reset_index(drop=True))
    table = explore.uniform_split_test(dataset, cached(images[keep]))
    assert table.loc[table["uneven"], "test"].tolist() == ["class counts"]
    assert table["effect"].iloc[0] == pytest.approx(
        np.sqrt(table["statistic"].iloc[0] / keep.sum())
    )


def test_a_patient_counts_once():
    # Ten copies of 24 films: as single images the chance differences would look certain.
    patients = np.repeat(np.arange(24), 10)
    label, split = np.arange(24) % 2, np.array(["train", "train", "val", "val"] * 6)
    dataset = films(patients=patients)
    manifest = dataset.manifest.assign(
        label=np.repeat(label, 10),
        class_name=np.repeat(np.array(["Normal", "COVID"])[label], 10),
        split=np.repeat(split, 10),
    )
    images = np.repeat(noise(24, 3), 10, axis=0)
    table = explore.uniform_split_test(replace(dataset, manifest=manifest), cached(images))
    once = replace(dataset, manifest=manifest.iloc[::10].reset_index(drop=True))
    pd.testing.assert_series_equal(
        table["p"], explore.uniform_split_test(once, cached(images[::10]))["p"]
    )


def test_one_split_cannot_be_compared():
    with pytest.raises(ValueError, match="one split only.*split.grouped"):
        explore.uniform_split_test(films(splits=("",)), cached(noise(240)))


def test_images_of_one_grey_and_single_classes_are_no_error():
    dataset = films(60)
    manifest = dataset.manifest.assign(label=0, class_name="Normal")
    table = explore.uniform_split_test(
        replace(dataset, manifest=manifest), cached(np.full((60, 8, 8), 9))
    )
    assert table["p"].tolist() == [1.0, 1.0, 1.0] and not table["uneven"].any()


# ------------------------------------------------------------------------------------------- format as a shortcut


def test_a_leak_in_the_aspect_ratio_alone_is_found():
    dataset, rng = films(300), np.random.default_rng(5)
    height = rng.integers(200, 400, 300)
    aspect = np.where(dataset.manifest["label"] == 1, 1.3, 1.0) + rng.normal(0, 0.03, 300)
    found = explore.size_shortcut(
        dataset, np.stack([height, np.round(height * aspect)], 1), draws=200
    )
    found = found.set_index("features")
    assert found.loc["aspect ratio", "value"] > 0.98 and found.loc["all three", "value"] > 0.98
    assert (
        found.loc["aspect ratio", "finding"] == "a shortcut: tells the classes apart almost fully"
    )
    assert found.loc["height", "ci_low"] < 0.5 < found.loc["height", "ci_high"]
    assert found.loc["height", "finding"].startswith("no sign")


def test_sizes_that_have_nothing_to_do_with_the_class_score_chance():
    values = []
    for seed in range(4):
        shapes = np.random.default_rng(seed).integers(200, 400, (240, 2))
        found = explore.size_shortcut(films(seed=seed), shapes, draws=100, folds=3)
        values += found["value"].tolist()
    assert abs(np.mean(values) - 0.5) < 0.04


def test_one_size_is_exactly_chance_whatever_the_class_shares():
    found = explore.size_shortcut(films(101), np.full((101, 2), 224), draws=50, folds=3)
    assert found["value"].tolist() == [0.5] * 4 and found["ci_high"].tolist() == [0.5] * 4
    assert set(found["finding"]) == {"the same for all images: tells nothing"}


def test_patients_are_not_split_between_fit_and_score():
    # Each patient has a size of his own and a random class: only a fit that knows the patient could score.
    rng = np.random.default_rng(7)
    patients = np.repeat(np.arange(60), 8)
    label, side = rng.integers(0, 2, 60)[patients], rng.permutation(60)[patients] * 7 + 200
    dataset = films(480, patients=patients)
    dataset = replace(dataset, manifest=dataset.manifest.assign(label=label))
    found = explore.size_shortcut(dataset, np.stack([side, side], 1), draws=100, folds=3).set_index(
        "features"
    )
    assert found.loc["height", "value"] < 0.7 and not found.loc["height", "ci_low"] > 0.5


def test_size_shortcut_refuses_what_it_cannot_compare():
    dataset = films(20)
    one = replace(dataset, manifest=dataset.manifest.assign(label=0))
    with pytest.raises(ValueError, match=r"compares classes.*found \[0\]"):
        explore.size_shortcut(one, np.ones((20, 2)))
    alone = replace(dataset, manifest=dataset.manifest.assign(patient=dataset.manifest["label"]))
    with pytest.raises(ValueError, match="fewer than 2 patients"):
        explore.size_shortcut(alone, np.ones((20, 2)))


# ------------------------------------------------------------------------------------------- normalisation


def test_normalisations_do_what_their_names_say():
    images = cached(noise(40))
    ways = explore.normalisations(images, np.arange(30))
    x = images.batch(np.arange(30))
    assert torch.allclose(ways["fixed"](x), (x - 0.5) / 0.25)
    sample = ways["sample"](x)
    assert (
        sample.mean((1, 2, 3)).abs().max() < 1e-4
        and (sample.std((1, 2, 3), correction=0) - 1).abs().max() < 1e-4
    )
    overall = ways["training"](x)
    assert abs(overall.mean()) < 1e-4 and abs(overall.std(correction=0) - 1) < 1e-4
    place = ways["training, each pixel"](x)
    assert place.mean(0).abs().max() < 1e-4 and (place.std(0, correction=0) - 1).abs().max() < 1e-3
    flat = ways["sample"](torch.full((1, 1, 8, 8), 0.7))
    assert flat.abs().max() < 1e-3  # It has no contrast that could be scaled.


def test_normalisations_read_only_the_training_rows():
    images = noise(40)
    x = cached(images).batch([35])
    before = {
        name: way(x) for name, way in explore.normalisations(cached(images), np.arange(30)).items()
    }
    images[30:35] = 255
    after = {
        name: way(x) for name, way in explore.normalisations(cached(images), np.arange(30)).items()
    }
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_comparison_gives_each_strategy_its_own_images():
    x, y = torch.rand(8, 1, 4, 4), np.array([0, 1] * 4)
    x[y == 1] += 2.0

    def pipeline(x_train, y_train, x_val):
        return (x_val.mean((1, 2, 3)) > x_train.mean()).numpy().astype(float)

    ways = {"plain": lambda x: x, "sign lost": lambda x: -x}
    table = explore.compare_normalisations(pipeline, ways, x, y, x, y, groups=range(8), draws=20)
    auc = table[table["metric"] == "auc"].set_index("strategy")["value"]
    assert auc.to_dict() == {"plain": 1.0, "sign lost": 0.0}


# ------------------------------------------------------------------------------------------- figures


def test_figures_say_counts_and_name_synthetic_data():
    dataset, images = films(), cached(noise(240))
    figure = explore.figure_classes(dataset)
    assert isinstance(figure, Figure) and "SYNTHETIC" in figure.axes[0].get_title()
    counts = dataset.manifest.groupby(["split", "class_name"]).size()
    shown = {text.get_text().split("\n")[0] for text in figure.axes[0].texts}
    assert shown == {str(count) for count in counts}
    figure = explore.figure_mean_images(images, dataset)
    train = dataset.manifest["split"] == "train"
    means = [
        images.images[(train & (dataset.manifest["label"] == label)).to_numpy()].mean(0) / 255
        for label in (0, 1)
    ]
    shown = [axis.images[0].get_array() for axis in figure.axes[:3]]
    assert np.allclose(shown[0], means[0]) and np.allclose(shown[2], means[1] - means[0])


def test_augmentations_are_shown_singly_and_combined():
    image = np.tile(np.arange(32, dtype=np.uint8) * 4, (32, 1))
    transforms = {
        "flip": A.HorizontalFlip(p=1),
        "never": A.HorizontalFlip(p=0),
        "bright": A.RandomBrightnessContrast(p=1),
    }
    figure = explore.figure_augmentations(image, transforms, repeats=2)
    titles = np.array([axis.get_title() for axis in figure.axes]).reshape(4, 3)
    assert titles[:, 0].tolist() == ["original"] * 4 and titles[:, 1].tolist() == [
        "flip",
        "never, unchanged",
        "bright",
        "combined",
    ]
    pixels = [axis.images[0].get_array() for axis in figure.axes]
    assert np.array_equal(pixels[1], image[:, ::-1])
    assert not np.array_equal(pixels[10], pixels[11])  # Another draw.
    again = explore.figure_augmentations(image, transforms, repeats=2)
    assert np.array_equal(again.axes[10].images[0].get_array(), pixels[10])
    with pytest.raises(ValueError, match="uint8"):
        explore.figure_augmentations(image / 255, transforms)
    with pytest.raises(ValueError, match="at least one"):
        explore.figure_augmentations(image, {})


# ------------------------------------------------------------------------------------------- real films


@pytest.mark.real
def test_real_fractures_are_given_away_by_the_format_in_part(real_data):
    dataset = datasets.load(sources.find("fracatlas", real_data))
    found = explore.size_shortcut(dataset, explore.shapes(dataset), draws=100, folds=3).set_index(
        "features"
    )
    assert found["n"].eq(len(dataset.manifest)).all()
    assert (
        found.loc["all three", "value"] > 0.6 and "a shortcut" in found.loc["all three", "finding"]
    )
