"""The thesis' result files: names, what stands in them, and what is refused before a file is written."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from dlia_utils import thesis

LAYERS, CORRUPTIONS, SEVERITIES = ["layer2_2", "layer10_1"], ["speckle_noise", "contrast"], [1, 2]
LABELS = [0, 1, 1, 0, 1]
CLASSES = ["NORMAL", "not fractured"]


def predictions(labels=LABELS, classes=2):
    """Random probabilities of every cell, the clean one first."""
    rng, tables = np.random.default_rng(0), []
    for corruption, severity in [("clean", 0), *((c, s) for c in CORRUPTIONS for s in SEVERITIES)]:
        p = rng.dirichlet(np.ones(classes), len(labels))
        cell = pd.DataFrame(
            {
                "image": range(10, 10 + len(labels)),
                "label": labels,
                "corruption": corruption,
                "severity": severity,
                "predicted": p.argmax(1),
            }
        )
        tables.append(cell.join(pd.DataFrame(p, columns=[f"p{k}" for k in range(classes)])))
    return pd.concat(tables, ignore_index=True)


def drift(labels=LABELS):
    """RMSE of 1000 corruption + 100 severity + 10 layer + image for Grad-CAM++; the others must not come in."""
    rows = []
    for image in range(len(labels)):
        for method in ("gradcam++", "gradcam"):
            for place, layer in enumerate(LAYERS):
                add = 0 if method == "gradcam++" else 0.5
                rows += [
                    (10 + image, name, 0, method, layer, 77.0)
                    for name in ("same image", "random pair")
                ]
                rows += [
                    (
                        10 + image,
                        corruption,
                        severity,
                        method,
                        layer,
                        1000 * c + 100 * severity + 10 * place + image + add,
                    )
                    for c, corruption in enumerate(CORRUPTIONS)
                    for severity in SEVERITIES
                ]
    table = pd.DataFrame(
        rows, columns=["image", "corruption", "severity", "method", "layer", "rmse"]
    )
    return table.assign(spearman=np.where(table["rmse"] > 1000, np.nan, 0.1), zero=False)


@pytest.fixture
def written(tmp_path):
    paths = thesis.write(tmp_path, predictions(), drift(), flag="bone_mnist", classes=CLASSES)
    return {path.name: pd.read_csv(path) for path in paths}


def test_the_files_are_those_of_the_thesis_and_no_others(written, tmp_path):
    start = "bone-mnist"
    expected = {f"{start}_sev{s}_rmses.csv" for s in (1, 2)}
    expected |= {
        f"{start}_{name}_sev{s}_rmses.csv" for name in ("NORMAL", "not-fractured") for s in (1, 2)
    }
    expected |= {f"{start}_{name}_rmses_all.csv" for name in ("NORMAL", "not-fractured")}
    expected |= {f"{start}_{kind}.csv" for kind in ("auc", "drift", "predictions")}
    assert set(written) == expected == {path.name for path in tmp_path.iterdir()}


def test_mean_rmse_has_corruptions_down_and_layers_across(written):
    images = np.arange(len(LABELS))
    for name, chosen in (
        ("", images),
        ("NORMAL_", images[[0, 3]]),
        ("not-fractured_", images[[1, 2, 4]]),
    ):
        table = written[f"bone-mnist_{name}sev2_rmses.csv"]
        assert (
            list(table.columns) == ["corruption", *LAYERS]
            and table["corruption"].tolist() == CORRUPTIONS
        )
        expected = [
            [1000 * c + 200 + 10 * place + chosen.mean() for place in (0, 1)] for c in (0, 1)
        ]
        np.testing.assert_allclose(table[LAYERS], expected, rtol=1e-12)


def test_every_image_has_a_row_per_severity_and_a_column_per_corruption_and_layer(written):
    table = written["bone-mnist_NORMAL_rmses_all.csv"]
    pairs = [f"{corruption}/{layer}" for corruption in CORRUPTIONS for layer in LAYERS]
    assert list(table.columns) == ["image", "severity", *pairs]
    assert table[["image", "severity"]].values.tolist() == [[10, 1], [10, 2], [13, 1], [13, 2]]
    assert table.loc[3, pairs].tolist() == [203, 213, 1203, 1213]  # image 13 at severity 2


def test_auc_of_two_classes_is_that_of_class_1_and_delta_is_clean_minus_corrupted(written):
    table, seen = written["bone-mnist_auc.csv"], predictions()
    assert (
        table["class"].tolist() == ["not fractured"] * 2
        and table["corruption"].tolist() == CORRUPTIONS
    )
    value = {
        cell: roc_auc_score(part["label"], part["p1"])
        for cell, part in seen.groupby(["corruption", "severity"])
    }
    for _, row in table.iterrows():
        assert row["clean"] == pytest.approx(value["clean", 0])
        for severity in SEVERITIES:
            corrupted = value[row["corruption"], severity]
            assert row[f"sev{severity}"] == pytest.approx(corrupted)
            assert row[f"delta_sev{severity}"] == pytest.approx(value["clean", 0] - corrupted)
    assert len(set(value.values())) > 1


def test_auc_of_three_classes_is_each_against_the_rest_and_nan_without_images(tmp_path):
    labels = [0, 1, 1, 0, 1]
    seen = predictions(labels, classes=3)
    paths = thesis.write(tmp_path, seen, drift(labels), flag="f", classes=["a", "b", "c"])
    names = [path.name for path in paths]
    assert "f_b_rmses_all.csv" in names and not [name for name in names if name.startswith("f_c")]
    table = pd.read_csv(tmp_path / "f_auc.csv").set_index(["class", "corruption"])
    assert len(table) == 6 and table.loc["c"].isna().all(axis=None)
    own = seen[seen["corruption"].eq("contrast") & seen["severity"].eq(1)]
    assert table.loc[("a", "contrast"), "sev1"] == pytest.approx(
        roc_auc_score(own["label"].eq(0), own["p0"])
    )


def test_the_tidy_tables_read_back_whole(tmp_path):
    seen, moved = predictions(), drift()
    thesis.write(tmp_path, seen, moved, flag="f", classes=CLASSES)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "f_drift.csv"), moved)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "f_predictions.csv"), seen)


def test_trainings_never_share_a_file_and_a_second_writing_replaces_the_first(tmp_path):
    plain = thesis.write(tmp_path, predictions(), drift(), flag="f", classes=CLASSES)
    kept = {path: path.read_bytes() for path in plain}
    more = drift().assign(rmse=lambda table: table["rmse"] + 1)
    augmented = thesis.write(
        tmp_path, predictions(), more, flag="f", classes=CLASSES, model_suffix="_augmented"
    )
    assert {path.name for path in augmented} >= {
        "f_sev1_augmented_rmses.csv",
        "f_augmented_auc.csv",
        "f_NORMAL_augmented_rmses_all.csv",
    }
    assert not set(plain) & set(augmented) and all(
        path.read_bytes() == text for path, text in kept.items()
    )
    thesis.write(tmp_path, predictions(), more, flag="f", classes=CLASSES)
    assert len(list(tmp_path.iterdir())) == len(plain) + len(augmented)
    assert (tmp_path / "f_sev1_rmses.csv").read_bytes() == (
        tmp_path / "f_sev1_augmented_rmses.csv"
    ).read_bytes()


def test_another_method_goes_to_the_rmse_files_when_asked(tmp_path):
    thesis.write(tmp_path, predictions(), drift(), flag="f", classes=CLASSES, method="gradcam")
    assert pd.read_csv(tmp_path / "f_sev1_rmses.csv").loc[0, "layer2_2"] == pytest.approx(
        100 + 2 + 0.5
    )


def _without(table, column):
    return table.drop(columns=column)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"predictions": _without(predictions(), "severity")},
            "predictions lacks the columns.*severity",
        ),
        ({"drift": _without(drift(), "rmse")}, "drift lacks the columns.*rmse"),
        ({"drift": pd.concat([drift(), drift().tail(1)])}, "twice.*one model at a time"),
        (
            {"predictions": predictions().drop(index=7)},
            "speckle_noise at severity 1 has 4 images.*same images",
        ),
        (
            {"drift": drift().assign(image=lambda table: table["image"] + 4)},
            r"images that predictions lacks, such as \[15, 16",
        ),
        ({"method": "saliency"}, "no method 'saliency'.*choose with method="),
        ({"classes": ["a", "b", "c"]}, "classes must name 2 classes"),
        ({"classes": ["not sick", "Not-sick"]}, "would share files"),
        ({"flag": "/.."}, "flag '/..' has no letter"),
        ({"model_suffix": "augmented"}, "model_suffix must be"),
        ({"model_suffix": "_../x"}, "model_suffix must be"),
    ],
)
def test_what_would_give_wrong_files_is_refused_before_any_is_written(tmp_path, change, said):
    given = {
        "predictions": predictions(),
        "drift": drift(),
        "flag": "f",
        "classes": CLASSES,
    } | change
    with pytest.raises(ValueError, match=said):
        thesis.write(tmp_path, given.pop("predictions"), given.pop("drift"), **given)
    assert not list(tmp_path.iterdir())
