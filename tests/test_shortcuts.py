"""The shortcut audit against planted truths: a label in the corner, a label in the lungs, and models that read either."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from dlia_utils import report, shortcuts
from dlia_utils.data import cache, datasets
from dlia_utils.data.tables import BadData
from dlia_utils.shortcuts import REGIONS, Films

SIDE = 32
CORNER = (slice(0, 3), slice(0, 3))  # Inside the frame of a tenth of the side.


@dataclass
class FakeConfig:
    """The fields of a Config that the figures read."""

    run_dir: Path = Path()
    profile: str = "smoke"
    size: int = SIDE
    data_name: str = "covid (SYNTHETIC)"
    caption: str = "covid (SYNTHETIC), smoke profile, 48 px"


class Reads(nn.Module):
    """Two logits from the mean grey of one place: class 1 where it is brighter than `level`."""

    def __init__(self, place, level):
        super().__init__()
        self.place, self.level = place, level

    def forward(self, x):
        score = 40 * (x[:, 0][:, *self.place].mean((1, 2)) - self.level)
        return torch.stack([torch.zeros_like(score), score], 1)


def lungs(rng, count):
    """Two rectangles that move a little from film to film, whatever the class; never in the frame or the corners."""
    masks = np.zeros((count, SIDE, SIDE), bool)
    for mask, (down, across) in zip(masks, rng.integers(-1, 2, (count, 2)), strict=True):
        for left in (6, 18):
            mask[8 + down : 24 + down, left + across : left + across + 8] = True
    return masks


def planted(where, *, count=160, seed=0, strength=0.25):
    """Films of noise whose label is a brightness in the "corner" or in the "lungs", or nowhere."""
    rng = np.random.default_rng(seed)
    y, masks = np.arange(count) % 2, lungs(rng, count)
    x = torch.from_numpy(rng.uniform(0.2, 0.6, (count, 1, SIDE, SIDE))).float()
    if where == "corner":
        x[y == 1, :, *CORNER] += strength
    elif where == "lungs":
        x += strength * torch.from_numpy(masks[:, None] * y[:, None, None, None]).float()
    return Films(x, y, np.arange(count), masks)


def audit(where, model=None, **options):
    parts = planted(where, seed=1), planted(where, seed=2)
    return shortcuts.region_accuracy(
        shortcuts.linear_probe(), *parts, model=model, draws=200, **options
    )


def auc(rows, how):
    return rows[(rows["metric"] == "auc") & (rows["how"] == how)].set_index("region")


# ------------------------------------------------------------------------------------------- the audit


def test_a_label_in_the_corner_is_found_outside_the_lungs():
    rows = audit("corner", Reads(CORNER, 0.525))
    for how in ("tested", "retrained"):
        found = auc(rows, how)
        for region in ("whole", "border_only", "corners_only", "lungs_blanked"):
            assert found.loc[region, "value"] > 0.97, (how, region)
        for region in ("lungs_only", "centre_only", "lung_shape"):
            # A constant answer has no interval: it is chance exactly.
            assert found.loc[region, "ci_low"] <= 0.5 <= found.loc[region, "ci_high"], (how, region)
    text = shortcuts.conclude(rows)
    assert text.startswith("**The model reads what lies outside the lungs:**")
    assert "- Trained and tested on the lungs alone: AUC 0." in text
    (line,) = [line for line in text.splitlines() if "shown the lungs alone" in line]
    assert line.endswith("no better than chance.")


def test_a_label_in_the_lungs_is_found_in_the_lungs():
    rows = audit("lungs", Reads((slice(8, 24), slice(6, 14)), 0.5))
    for how in ("tested", "retrained"):
        found = auc(rows, how)
        for region in ("whole", "lungs_only", "centre_only"):
            assert found.loc[region, "value"] > 0.97, (how, region)
        for region in ("border_only", "corners_only", "lung_shape"):
            assert found.loc[region, "ci_low"] <= 0.5 <= found.loc[region, "ci_high"], (how, region)
    assert auc(rows, "retrained").loc["lungs_blanked", "ci_low"] <= 0.5
    text = shortcuts.conclude(rows)
    assert text.startswith(
        "**No sign of a shortcut outside the lungs:** the lungs alone tell the classes apart"
    )


def test_a_shortcut_that_the_model_does_not_use_is_told_from_one_that_it_uses():
    parts = [planted("corner", seed=seed) for seed in (1, 2)]
    for films in parts:
        films.x[films.y == 1, :, 8:24, 6:14] += 0.2
    model = Reads((slice(9, 23), slice(7, 13)), 0.5)
    rows = shortcuts.region_accuracy(shortcuts.linear_probe(), *parts, model=model, draws=100)
    assert "this model shows no sign of reading it" in shortcuts.conclude(rows).splitlines()[0]
    alone = rows[rows["how"] == "retrained"]
    assert "whether a model uses it was not tested here" in shortcuts.conclude(alone)
    assert "unlike any that the model was trained on" not in shortcuts.conclude(alone)


def test_without_a_label_anywhere_no_region_tells():
    rows = audit("nowhere")
    assert set(rows["how"]) == {"retrained"} and rows["region"].drop_duplicates().tolist() == list(
        REGIONS
    )
    assert shortcuts.conclude(rows).startswith("**No region tells the classes apart,**")
    assert rows["n"].eq(160).all() and set(rows["metric"]) == set(shortcuts.AUDITED)


def test_the_pipeline_never_sees_test_labels_and_fill_is_the_training_mean():
    train_films, test_films = planted("corner", seed=1), planted("corner", seed=2)
    seen = {}

    def pipeline(x_train, y_train, x_test):
        seen[len(seen)] = x_train, y_train, x_test
        return np.linspace(0, 1, len(x_test))

    shortcuts.region_accuracy(pipeline, train_films, test_films, regions=["lungs_only"], draws=10)
    x_train, y_train, x_test = seen[0]
    assert y_train is train_films.y
    mean = float(train_films.x.mean())
    for x, films in ((x_train, train_films), (x_test, test_films)):
        outside = x[:, 0][~torch.from_numpy(films.masks)]
        assert torch.equal(outside, torch.full_like(outside, mean))
        assert torch.equal(
            x[:, 0][torch.from_numpy(films.masks)], films.x[:, 0][torch.from_numpy(films.masks)]
        )


def test_frozen_features_feed_the_probe():
    films = planted("corner", seed=1)
    probe = shortcuts.linear_probe(lambda x: x[:, :, :3, :3].mean((2, 3)), batch_size=7)
    blind = shortcuts.linear_probe(lambda x: x[:, :, 20:, 20:].mean((2, 3)))
    right = (probe(films.x, films.y, films.x) > 0.5) == films.y
    assert (
        right.mean() > 0.97 and ((blind(films.x, films.y, films.x) > 0.5) == films.y).mean() < 0.7
    )


def test_the_audit_leaves_model_and_films_as_they_were():
    films = planted("corner")
    before, model = films.x.clone(), Reads(CORNER, 0.5).train()
    shortcuts.region_accuracy(None, films, films, model=model, draws=10)
    shortcuts.marker_test(model, films.x, films.y, groups=films.patients, draws=10)
    assert torch.equal(films.x, before) and model.training


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"y": np.zeros(3)}, {}, "test_films: all parts must have one length"),
        ({"masks": np.ones((160, 8, 8), bool)}, {}, "do not fit images"),
        ({}, {"regions": ["heart"]}, "unknown regions"),
        ({}, {"train_and_score": None}, "give a model to test"),
    ],
)
def test_what_does_not_fit_is_refused(change, options, message):
    films = planted("corner")
    arguments = {"train_and_score": shortcuts.linear_probe()} | options
    with pytest.raises(ValueError, match=message):
        shortcuts.region_accuracy(
            arguments.pop("train_and_score"), films, replace(films, **change), draws=5, **arguments
        )


# ------------------------------------------------------------------------------------------- regions and lungs


def test_border_and_centre_are_complements_and_lungs_too():
    x, masks = torch.rand(3, 1, SIDE, SIDE) + 0.1, lungs(np.random.default_rng(0), 3)
    for one, other in (("border_only", "centre_only"), ("lungs_only", "lungs_blanked")):
        parts = [shortcuts.limited(x, region, masks, fill=0.0) for region in (one, other)]
        assert torch.equal(parts[0] + parts[1], x)
    corners = shortcuts.corners_only(x, 0.25, fill=0.0)
    assert corners[0, 0, 7, 7] > 0 and corners[0, 0, 8, 7] == 0 and corners[0, 0, -8, -8] > 0
    with pytest.raises(ValueError, match="share is 0.5"):
        shortcuts.border_only(x, 0.5, fill=0.0)
    with pytest.raises(ValueError, match="must be one of whole"):
        shortcuts.limited(x, "heart", masks, fill=0.0)


def test_the_crude_box_follows_the_content_and_is_stated():
    box, padded = shortcuts.crude_lung_box(100), shortcuts.crude_lung_box(100, (100, 50))
    assert np.array_equal(np.flatnonzero(box.any(1)), np.arange(10, 82))
    assert np.array_equal(np.flatnonzero(box.any(0)), np.r_[8:47, 53:92])
    assert np.array_equal(padded[:, :50], box[:, 1::2]) and not padded[:, 50:].any()
    assert "10% to 82% of the height" in shortcuts.CRUDE_BOX and "53% to 92%" in shortcuts.CRUDE_BOX


@pytest.fixture
def masked(tmp_path):
    """Four films of 60 x 40 pixels (height, width); masks at half size: left half, lower right quarter, none, empty."""
    rows, masks = [], []
    shapes = {0: np.s_[:, :10], 1: np.s_[15:, 10:], 3: np.s_[:0]}
    for number in range(4):
        Image.new("L", (40, 60), 90).save(tmp_path / f"{number}.png")
        rows.append((f"{number}.png", number % 2, "ab"[number % 2], str(number), "", "train"))
        if number in shapes:
            mask = np.zeros((30, 20), np.uint8)
            mask[shapes[number]] = 255
            Image.fromarray(mask).convert("RGB").save(tmp_path / f"mask{number}.png")
            masks.append((number, f"mask{number}.png"))
    manifest = pd.DataFrame(
        rows, columns=["path", "label", "class_name", "patient", "group", "split"]
    )
    ignored = pd.DataFrame(columns=["path", "reason"])
    dataset = datasets.Dataset("demo", tmp_path, manifest, ("a", "b"), ignored, True, "argument")
    return replace(dataset, masks=pd.DataFrame(masks, columns=["image", "path"]))


def test_masks_lie_where_the_cached_film_lies(masked):
    squashed = shortcuts.load_masks(masked, [1, 0, 1], 24)
    expected = np.zeros((3, 24, 24), bool)
    expected[[0, 2], 12:, 12:] = True
    expected[1, :, :12] = True
    assert np.array_equal(squashed, expected)
    padded = shortcuts.load_masks(masked, [0, 1], 24, "pad")  # The film takes up 24 x 16 pixels.
    expected = np.zeros((2, 24, 24), bool)
    expected[0, :, :8] = True
    expected[1, 12:, 8:16] = True
    assert np.array_equal(padded, expected)


def test_two_masks_of_a_film_are_joined(masked, tmp_path):
    both = replace(
        masked, masks=pd.DataFrame({"image": [0, 0], "path": ["mask0.png", "mask1.png"]})
    )
    mask = shortcuts.load_masks(both, [0], 24)[0]
    assert mask[:, :12].all() and mask[12:].all() and not mask[:12, 12:].any()


def test_films_without_a_mask_get_the_crude_box_and_the_words_say_so(masked, tmp_path):
    images = cache.build(masked, size=24, fit="pad", root=tmp_path / "cache", progress=False)
    masks, words = shortcuts.lung_masks(masked, [2, 0, 3], images)
    assert np.array_equal(masks[1], shortcuts.load_masks(masked, [0], 24, "pad")[0])
    box = shortcuts.crude_lung_box(24, (24, 16))
    assert np.array_equal(masks[0], box) and np.array_equal(masks[2], box)
    assert "for 2 of 3 films without one, a crude box" in words
    without = replace(masked, masks=masked.masks.iloc[:0])
    assert shortcuts.lung_masks(without, [0, 1], images)[1] == shortcuts.CRUDE_BOX
    assert shortcuts.lung_masks(masked, [0, 1], images)[1] == "the data set's masks"


def test_missing_and_broken_masks_are_named(masked, tmp_path):
    with pytest.raises(BadData, match="2.png: has no mask"):
        shortcuts.load_masks(masked, [0, 2], 24)
    (tmp_path / "mask0.png").write_bytes(b"no image")
    (tmp_path / "mask1.png").unlink()
    with pytest.raises(BadData, match="2 unusable files") as error:
        shortcuts.load_masks(masked, [0, 1], 24)
    assert "mask0.png: cannot be read as a mask" in str(error.value) and "mask1.png" in str(
        error.value
    )


# ------------------------------------------------------------------------------------------- marker, energy, sources


def test_a_marker_moves_only_the_model_that_reads_that_corner():
    films = planted("corner")
    table = shortcuts.marker_test(
        Reads(CORNER, 0.525), films.x, films.y, groups=films.patients, draws=100
    )
    found = table.set_index(["place", "metric"])["value"].unstack()
    assert (
        found.loc["upper left", "flips_to_1"] > 0.45 and found.loc["upper left", "flips_to_0"] == 0
    )
    assert found.loc["upper left", "change"] == pytest.approx(
        found.loc["upper left", "size_of_change"]
    )
    assert found.loc["upper left", "accuracy_change"] == pytest.approx(
        -found.loc["upper left", "flips"], abs=0.05
    )
    others = found.drop(index="upper left")
    assert (others == 0).all(axis=None) and len(others) == 4
    flips = table[(table["metric"] == "flips") & (table["place"] == "middle")].iloc[0]
    assert flips["ci_high"] > 0.01  # None of 160 turned: that is no proof that none ever does.
    sentence = shortcuts.conclude(audit("corner"), marker=table)
    assert "in a corner moves the answer: most in the upper left" in sentence


def test_a_marker_lies_where_it_should():
    x = torch.zeros(1, 1, 20, 20)
    rows = {
        place: shortcuts.with_marker(x, place, size=0.1, margin=0.05)[0, 0].nonzero()
        for place in shortcuts.CORNERS
    }
    corners = {place: spots.min(0).values.tolist() for place, spots in rows.items()}
    assert corners == {
        "upper left": [1, 1],
        "upper right": [1, 17],
        "lower left": [17, 1],
        "lower right": [17, 17],
    }
    assert all(len(spots) == 4 for spots in rows.values())
    assert shortcuts.with_marker(x, "middle", size=0.1).nonzero()[0].tolist() == [0, 0, 9, 9]
    with pytest.raises(ValueError, match="place is 'top'"):
        shortcuts.with_marker(x, "top")
    with pytest.raises(ValueError, match="shares of the side"):
        shortcuts.with_marker(x, "middle", size=8)


def test_energy_of_known_maps():
    masks = lungs(np.random.default_rng(0), 12)
    flat = np.ones(masks.shape)
    table = shortcuts.inside_energy(flat, masks, groups=range(12), draws=50).set_index("metric")
    assert table.loc["gain", "value"] == pytest.approx(0) and table.loc[
        "energy", "value"
    ] == pytest.approx(masks.mean())
    inside = masks.astype(float)
    inside[:3] = 0  # Zero maps count as flat.
    table = shortcuts.inside_energy(
        torch.from_numpy(inside), masks, groups=range(12), draws=50
    ).set_index("metric")
    assert table.loc["energy", "value"] == pytest.approx((9 + 3 * masks[0].mean()) / 12)
    assert table["zero_maps"].eq(3).all()
    text = shortcuts.conclude(audit("nowhere"), energy=table.reset_index())
    assert "more than a map that knows nothing has (3 zero maps count as flat)" in text
    outside = shortcuts.inside_energy(1.0 - masks, masks, groups=range(12), draws=50)
    assert "0.0% of the attribution lies inside the lungs" in shortcuts.conclude(
        audit("nowhere"), energy=outside
    )
    with pytest.raises(ValueError, match=r"images \[4\] cover no pixel"):
        shortcuts.inside_energy(
            flat, np.where(np.arange(12)[:, None, None] == 4, False, masks), groups=range(12)
        )
    with pytest.raises(ValueError, match="negative"):
        shortcuts.inside_energy(-flat, masks, groups=range(12))


def test_errors_by_source(masked):
    predictions = pd.DataFrame(
        {"image": [3, 0, 1, 2], "probability": [0.9, 0.2, 0.1, 0.8]}
    )  # 1 and 2 are wrong.
    unknown = shortcuts.source_bias(masked, predictions, draws=20)
    assert set(unknown["note"]) == {"sources are not known in this copy"}
    assert unknown.set_index("class_name")["value"].to_dict() == {"a": 0.5, "b": 0.5}
    manifest = masked.manifest.assign(group=["east", "west", "west", "north"])
    known = shortcuts.source_bias(replace(masked, manifest=manifest), predictions, draws=20)
    assert known.set_index(["source", "class_name"])["value"].to_dict() == {
        ("east", "a"): 0.0,
        ("north", "b"): 0.0,
        ("west", "a"): 1.0,
        ("west", "b"): 1.0,
    }
    notes = known.groupby("source")["note"].first()
    assert notes["west"] == "" and "source and class cannot be told apart" in notes["east"]
    with pytest.raises(ValueError, match="probability"):
        shortcuts.source_bias(masked, predictions.rename(columns={"probability": "p"}))


# ------------------------------------------------------------------------------------------- words and figures


def test_words_follow_the_numbers():
    def rows(how, **regions):
        return [
            {
                "how": how,
                "region": region,
                "metric": "auc",
                "value": (low + high) / 2,
                "ci_low": low,
                "ci_high": high,
                "n": 9,
                "lungs": shortcuts.CRUDE_BOX,
            }
            for region, (low, high) in regions.items()
        ]

    table = rows(
        "tested",
        whole=(0.9, 0.9),
        lungs_only=(0.8, 0.9),
        lungs_blanked=(0.6, 0.8),
        border_only=(0.2, 0.4),
    )
    text = shortcuts.conclude(pd.DataFrame(table), synthetic=True)
    assert text.startswith("**The model reads more than the lungs:**")
    assert (
        "lungs blanked: AUC 0.700 [0.600, 0.800], 50% of the whole film's lead over chance." in text
    )
    assert "border alone: AUC 0.300 [0.200, 0.400], worse than chance" in text
    assert f"Lungs are {shortcuts.CRUDE_BOX}." in text and "not a finding" in text
    # Blanked lungs that tell no more than their outline does are no shortcut outside the lungs.
    table = rows(
        "retrained",
        whole=(0.9, 0.9),
        lungs_only=(0.8, 0.9),
        lungs_blanked=(0.6, 0.7),
        lung_shape=(0.6, 0.7),
    )
    text = shortcuts.conclude(pd.DataFrame(table))
    assert (
        text.startswith("**No sign of a shortcut outside")
        and "an AUC above 0.70 can be excluded" in text
    )
    assert "Their outline alone tells the classes apart" in text
    with pytest.raises(ValueError, match="no auc"):
        shortcuts.conclude(pd.DataFrame(table).assign(metric="accuracy"))


def test_rows_fit_the_results_file(tmp_path):
    @dataclass
    class Config(FakeConfig):
        notebook: str = "07"
        seed: int = 0
        epochs: int = 1
        pretrained: bool = False
        settings: dict = field(default_factory=dict)

    rows = audit("nowhere", regions=["whole"])
    rows = rows.assign(attack="audit: " + rows["region"] + ", " + rows["how"])
    kept = report.update_results(
        report.result_rows(rows.filter(report.RESULT_COLUMNS), Config(tmp_path), model="probe"),
        tmp_path / "results.csv",
    )
    assert kept["attack"].eq("audit: whole, retrained").all() and len(kept) == 3


def test_figures_show_every_region():
    films, rows = planted("corner", count=4), audit("corner", Reads(CORNER, 0.5))
    figure = shortcuts.figure_regions(
        films.x, films.masks, FakeConfig().caption, fill=0.4, titles=list("abcd")
    )
    assert isinstance(figure, Figure) and len(figure.axes) == 4 * len(REGIONS)
    last = figure.axes[4 * len(REGIONS) - 2].images[0].get_array()
    assert np.allclose(last[films.masks[3]], 0.4) and np.allclose(last[0], films.x[3, 0, 0])
    figure = shortcuts.figure_audit(rows, FakeConfig().caption)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [region.replace("_", " ") for region in REGIONS]
    assert len(figure.axes[0].containers) == 2
