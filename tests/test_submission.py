"""The competition CSV: what `build` makes always passes `check`, and `check` finds every way to spoil it."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dlia_utils import submission
from dlia_utils.data.readers import NIH_CLASSES

PREDICTED = "x_min,y_min,x_max,y_max,confidence,label"
SIZES = {"a.png": (100, 80), "b.png": (100, 80), "c.png": (60, 60)}
# Edition A: ids from 1, and a.png has two of them. Edition B: ids from 0, each image once.
EDITIONS = {
    "A": pd.DataFrame({"id": [1, 2, 3, 4], "image_id": ["b.png", "a.png", "c.png", "a.png"]}),
    "B": pd.DataFrame({"ID": [0, 1, 2], "image_id": ["a.png", "b.png", "c.png"]}),
}
# Lines 1 to 5 of a good file of edition A.
GOOD = [
    f"id,image_id,{PREDICTED}",
    "1,b.png,1.5,2.5,30.25,40.125,0.9,Mass",
    "2,a.png,10,20,90,80,0.123456789012345678,Atelectasis",
    "3,c.png,0,0,60,60,0.0,Infiltrate",
    "4,a.png,5,5,20,30,1.0,Pneumothorax",
]


def spoilt(line, old, new, *, count=1):
    """The good file with `old` replaced in one line (1 is the header)."""
    assert old in GOOD[line - 1]
    lines = list(GOOD)
    lines[line - 1] = lines[line - 1].replace(old, new, count)
    return text(lines)


def text(lines):
    return "\n".join(lines) + "\n"


def problems(content, tmp_path, **options):
    """The message about a file with this content; it must be refused."""
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(submission.SubmissionError) as error:
        submission.check(path, EDITIONS["A"], **options)
    return str(error.value)


# What each line of the message holds, in order; " ... " stands for anything in between.
MALFORMED = {
    "empty file": ("", ["the file is empty"]),
    "blank file": ("\n \n", ["the file is empty"]),
    "header only": (text(GOOD[:1]), ["a header but no row"]),
    "no header": (text(GOOD[1:]), ["line 1 is no header but a row ... id,image_id,x_min"]),
    "missing column": (
        spoilt(1, ",label", ",class"),
        ["unknown columns 'class' in line 1", "missing columns 'label' in line 1"],
    ),
    "other edition's id": (
        spoilt(1, "id,", "ID,"),
        ["unknown columns 'ID' in line 1", "missing columns 'id' in line 1"],
    ),
    "space in the header": (
        spoilt(1, ",y_min", ", y_min"),
        ["unknown columns ' y_min'", "missing columns 'y_min'"],
    ),
    "column twice": (
        spoilt(1, "x_max", "x_min"),
        ["missing columns 'x_max'", "written twice in line 1: 'x_min'"],
    ),
    "wrong order": (
        text(",".join((*line.split(",")[:2], *line.split(",")[:1:-1])) for line in GOOD),
        ["columns in the wrong order in line 1: id,image_id,label,confidence"],
    ),
    "index column": (
        text(f"{'' if n == 0 else n - 1},{line}" for n, line in enumerate(GOOD)),
        ["an index column was written ('') ... to_csv(index=False)"],
    ),
    "index column read and written": (
        text(f"{'Unnamed: 0' if n == 0 else n - 1},{line}" for n, line in enumerate(GOOD)),
        ["an index column was written ('Unnamed: 0')"],
    ),
    "missing id": (text(GOOD[:3] + GOOD[4:]), ["1 of the mapping's 4 ids are missing: 3. Fix"]),
    "unknown id": (
        text([*GOOD, "9" + GOOD[4][1:]]),
        ["an id that the mapping does not have in 1 row: line 6 ('9')"],
    ),
    "id as a float": (spoilt(4, "3,", "3.0,"), ["line 4 ('3.0')", "ids are missing: 3"]),
    "empty id": (
        spoilt(4, "3,", ","),
        ["does not have in 1 row: line 4 ('')", "are missing: 3. Fix"],
    ),
    "duplicate id": (text([*GOOD, GOOD[2]]), ["an id a second time in 1 row: line 6 ('2')"]),
    "image of another id": (
        spoilt(4, "c.png", "a.png"),
        ["does not belong to its id in 1 row: line 4 (3 is c.png, not 'a.png')"],
    ),
    "image without suffix": (spoilt(2, "b.png", "b"), ["line 2 (1 is b.png, not 'b')"]),
    "image in capitals": (spoilt(4, "c.png", "C.png"), ["line 4 (3 is c.png, not 'C.png')"]),
    "empty cell": (spoilt(3, ",20,", ",,"), ["y_min is empty or NaN in 1 row: line 3 ('')"]),
    "NaN": (spoilt(5, "1.0", "NaN"), ["confidence is empty or NaN in 1 row: line 5 ('NaN')"]),
    "infinite": (spoilt(2, "30.25", "inf"), ["x_max is infinite in 1 row: line 2 ('inf')"]),
    "infinite below": (spoilt(2, "1.5", "-Infinity"), ["x_min is infinite in 1 row: line 2"]),
    "text for a number": (
        spoilt(2, "30.25", "wide"),
        ["x_max is not a number in 1 row: line 2 ('wide')"],
    ),
    "digits with underscore": (
        spoilt(5, "1.0", "1_0"),
        ["confidence is not a number in 1 row: line 5 ('1_0')"],
    ),
    "corners swapped": (
        spoilt(3, "10,20,90,80", "90,20,10,80"),
        ["x_min >= x_max in 1 row: line 3 (90 >= 10)"],
    ),
    "no width": (
        spoilt(3, "10,20,90,80", "10,20,10,80"),
        ["x_min >= x_max in 1 row: line 3 (10 >= 10)"],
    ),
    "width and height": (
        spoilt(3, "10,20,90,80", "10,20,60,15"),
        ["y_min >= y_max in 1 row: line 3 (20 >= 15)"],
    ),
    "negative": (spoilt(5, ",5,5", ",5,-0.5"), ["y_min is negative in 1 row: line 5 ('-0.5')"]),
    "confidence above 1": (
        spoilt(2, "0.9", "90"),
        ["confidence outside [0, 1] in 1 row: line 2 ('90')"],
    ),
    "confidence below 0": (
        spoilt(2, "0.9", "-0.1"),
        ["confidence outside [0, 1] in 1 row: line 2 ('-0.1')"],
    ),
    "Infiltration": (
        spoilt(4, "trate", "tration"),
        ["`Infiltration` in 1 row: line 4. Fix ... spells it `Infiltrate`"],
    ),
    "unknown label": (
        spoilt(2, "Mass", "No Finding"),
        ["unknown label in 1 row: line 2 ('No Finding') ... Nodule"],
    ),
    "label in lower case": (spoilt(2, "Mass", "mass"), ["unknown label in 1 row: line 2 ('mass')"]),
    "label number": (spoilt(3, "Atelectasis", "1"), ["unknown label in 1 row: line 3 ('1')"]),
    "space around a label": (
        spoilt(2, "Mass", " Mass"),
        ["unknown label in 1 row: line 2 (' Mass')"],
    ),
    "constant": (
        text([GOOD[0], *(line[:7] + ",0,0,1.5,1,0.01,Atelectasis" for line in GOOD[1:])]),
        ["constant predictions: all 4 rows (lines 2 to 5)"],
    ),
    "constant in other words": (
        text(
            [
                GOOD[0],
                *(
                    f"{line[:7]},0,{zero},9,9,.5,Mass"
                    for line, zero in zip(GOOD[1:], "0 0.0 0e1 -0".split(), strict=True)
                ),
            ]
        ),
        ["constant predictions: all 4 rows"],
    ),
    "fractions": (
        text(
            [GOOD[0], *(f"{line[:7]},.1,.2,.3,.{n + 3},.5,Mass" for n, line in enumerate(GOOD[1:]))]
        ),
        ["fractions of the image"],
    ),
    "semicolons": (text(GOOD).replace(",", ";"), ["the separator is a semicolon"]),
    "semicolons and decimal commas": (
        text(GOOD).replace(",", ";").replace("30.25", "30,25"),
        ["the separator is a semicolon", "x_max is not a number in 1 row: line 2 ('30,25')"],
    ),
    "tabs": (text(GOOD).replace(",", "\t"), ["the separator is a tab"]),
    "decimal commas": (
        spoilt(2, "30.25", "30,25"),
        ["other than 8 cells in 1 row: line 2 (9)", "missing: 1"],
    ),
    "short row": (
        spoilt(3, ",Atelectasis", ""),
        ["other than 8 cells in 1 row: line 3 (7); not read", "missing: 2"],
    ),
    "byte order mark": (b"\xef\xbb\xbf" + text(GOOD).encode(), ["a byte order mark (BOM)"]),
    "UTF-16": (text(GOOD).encode("utf-16"), ["the encoding is UTF-16"]),
    "Latin-1": (
        spoilt(3, "Atelectasis", "Atélectasie").encode("latin-1"),
        ["not UTF-8 (first at line 3)", "'Atélectasie'"],
    ),
    "no text at all": (
        b"PK\x03\x04\x9c\x00\x00",
        ["not UTF-8 (first at line 1)", "unknown columns 'PK", "missing columns 'id'"],
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_named_with_row_and_fix(case, tmp_path):
    content, expected = MALFORMED[case]
    head, *lines = problems(content, tmp_path).splitlines()
    assert f"bad.csv: {len(expected)} problem" in head and len(lines) == len(expected), lines
    for line, fragment in zip(lines, expected, strict=True):
        assert "Fix: " in line and all(part in line for part in fragment.split(" ... ")), line


def test_all_kinds_of_problems_are_listed_at_once(tmp_path):
    lines = [
        GOOD[0],
        "1,c.png,9,2,3,4,x,Mass",
        GOOD[2],
        GOOD[2],
        "4,a.png,-5,5,20,30,2,Infiltration",
    ]
    message = problems(text(lines), tmp_path, images=SIZES)
    assert (
        "bad.csv: 8 problems (line numbers are those of the CSV file; its header is line 1)"
        in message
    )
    for kind in (
        "second time",
        "missing: 3",
        "not belong",
        "not a number",
        "x_min >= x_max",
        "negative",
        "outside [0",
    ):
        assert kind in message
    assert message.splitlines()[-1].startswith("  8. `Infiltration` in 1 row: line 5")


def test_long_lists_are_cut(tmp_path):
    mapping = pd.DataFrame({"id": range(30), "image_id": [f"{n}.png" for n in range(30)]})
    table = mapping.assign(
        x_min=0, y_min=0, x_max=range(1, 31), y_max=9, confidence=0.5, label="mass"
    )
    with pytest.raises(
        submission.SubmissionError, match=r"30 rows: line 2 .* line 11 \('mass'\), ... and 20 more"
    ):
        submission.check(table, mapping)


@pytest.mark.parametrize("line", range(2, 6))
@pytest.mark.parametrize(
    "cell, fragment", [("y_max", "y_max beyond its height"), ("x_max", "x_max beyond its width")]
)
def test_box_outside_its_own_image(line, cell, fragment, tmp_path):
    cells = GOOD[line - 1].split(",")
    number = GOOD[0].split(",").index(cell)
    limit = SIZES[cells[1]][cell == "y_max"]
    cells[number] = f"{limit}.25"
    lines = [*GOOD[: line - 1], ",".join(cells), *GOOD[line:]]
    message = problems(text(lines), tmp_path, images=SIZES)
    assert (
        f"the box is outside the image: {fragment} in 1 row: line {line} ({limit}.25 > {limit})"
        in message
    )
    assert message.count("\n") == 1
    (tmp_path / "good.csv").write_text(text(lines))
    submission.check(tmp_path / "good.csv", EDITIONS["A"])  # Without images no frame is assumed.


def test_true_sizes_are_read_from_a_folder_of_images(tmp_path):
    for name, size in SIZES.items():
        (tmp_path / "deep" / name[0]).mkdir(parents=True)
        Image.new("L", size).save(tmp_path / "deep" / name[0] / name)
    (tmp_path / "bad.csv").write_text(text(GOOD))
    submission.check(tmp_path / "bad.csv", EDITIONS["A"], images=tmp_path)
    assert "(80.5 > 80)" in problems(spoilt(3, "80,0.1", "80.5,0.1"), tmp_path, images=tmp_path)
    (tmp_path / "deep" / "b" / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="b.png cannot be read as an image"):
        submission.check(tmp_path / "bad.csv", EDITIONS["A"], images=tmp_path)
    (tmp_path / "deep" / "b" / "b.png").unlink()
    with pytest.raises(ValueError, match="lacks 1 of the mapping's 3 images: b.png. Fix") as error:
        submission.check(tmp_path / "bad.csv", EDITIONS["A"], images=tmp_path)
    assert not isinstance(error.value, submission.SubmissionError)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        submission.check(tmp_path / "bad.csv", EDITIONS["A"], images=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        text(GOOD),
        text(GOOD).replace("\n", "\r\n"),
        text(GOOD).rstrip(),
        text(GOOD) + "\n",
        text([GOOD[0], *GOOD[:0:-1]]),
        text(GOOD).replace("a.png", '"a.png"'),
        spoilt(5, "1.0", "1e-3"),
    ],
    ids=[
        "plain",
        "windows",
        "no last newline",
        "blank last line",
        "rows in any order",
        "quotes",
        "exponent",
    ],
)
def test_good_files_pass(content, tmp_path):
    path = tmp_path / "good.csv"
    path.write_bytes(content.encode())
    table = submission.check(path, EDITIONS["A"], images=SIZES)
    assert list(table.columns) == GOOD[0].split(",") and len(table) == 4
    row = table.set_index("id").loc[2]
    assert (
        row["confidence"] == 0.123456789012345678
        and row["x_max"] == 90.0
        and row["label"] == "Atelectasis"
    )
    path.with_name("map.csv").write_text("id,image_id\n1,b.png\n2,a.png\n3,c.png\n4,a.png\n")
    pd.testing.assert_frame_equal(
        submission.check(str(path), path.with_name("map.csv"), images=SIZES), table
    )


def test_one_row_is_not_constant():
    table = (
        EDITIONS["B"]
        .head(1)
        .assign(x_min=1, y_min=1, x_max=9, y_max=9, confidence=0.5, label="Mass")
    )
    assert submission.check(table, EDITIONS["B"].head(1))["ID"].tolist() == [0]


def test_ids_may_be_text(tmp_path):
    mapping = pd.DataFrame({"ID": ["007", "008"], "image_id": ["a.png", "b.png"]})
    mapping.to_csv(tmp_path / "map.csv", index=False)
    table = mapping.assign(x_min=1, y_min=1, x_max=[8, 9], y_max=9, confidence=0.5, label="Mass")
    path = submission.write(table, tmp_path / "mine.csv", tmp_path / "map.csv")
    assert submission.check(path, tmp_path / "map.csv")["ID"].tolist() == ["007", "008"]


def test_other_classes(tmp_path):
    (tmp_path / "mine.csv").write_text(text(GOOD).replace("Infiltrate", "Infiltration"))
    classes = [*NIH_CLASSES[:3], "Infiltration", *NIH_CLASSES[4:]]
    assert len(submission.check(tmp_path / "mine.csv", EDITIONS["A"], classes=classes)) == 4


@pytest.mark.parametrize(
    "mapping, message",
    [
        (
            pd.DataFrame({"Id": [1], "image_id": ["a.png"]}),
            "has the columns Id, image_id; it needs `id` or `ID`",
        ),
        (pd.DataFrame({"id": [1], "ID": [1], "image_id": ["a.png"]}), "it needs `id` or `ID`"),
        (pd.DataFrame({"id": [1, 1], "image_id": ["a.png", "b.png"]}), "whole ids, each once"),
        (pd.DataFrame({"id": [1.0, 2.0], "image_id": ["a.png", "b.png"]}), "whole ids, each once"),
        (pd.DataFrame({"id": [1, 2], "image_id": ["a.png", None]}), "empty cells"),
        (pd.DataFrame({"id": [], "image_id": []}), "is empty"),
    ],
)
def test_bad_mapping(mapping, message):
    with pytest.raises(ValueError, match=message):
        submission.columns(mapping)


def test_missing_files_are_no_submission_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="mine.csv"):
        submission.check(tmp_path / "mine.csv", EDITIONS["A"])
    with pytest.raises(FileNotFoundError, match="map.csv"):
        submission.check(pd.DataFrame(), tmp_path / "map.csv")
    (tmp_path / "map.csv").touch()
    with pytest.raises(ValueError, match="map.csv is not a CSV of ids and images"):
        submission.columns(tmp_path / "map.csv")


# Building -------------------------------------------------------------------------------------------------

NAMES = {10: "a.png", 11: "b.png", 12: "c.png", 13: "no_test_image.png"}
FRAMES = {row: SIZES.get(name, (50, 50)) for row, name in NAMES.items()}
TRUTH = pd.DataFrame(
    [(1, 10, 10, 50, 50, 3), (1, 20, 20, 60, 60, 3), (2, 40, 0, 80, 40, 3), (2, 0, 0, 30, 10, 1)],
    columns=["image", "x1", "y1", "x2", "y2", "label"],
)
PRIOR = submission.class_prior(TRUTH, {1: (100, 100), 2: (200, 100)})


def found(*rows):
    return pd.DataFrame(rows, columns=["image", "x1", "y1", "x2", "y2", "label", "score"])


def build(predictions, edition="A", **options):
    options = {"names": NAMES, "classes": NIH_CLASSES, "sizes": FRAMES, "prior": PRIOR} | options
    return submission.build(predictions, EDITIONS[edition], **options)


def test_prior_is_the_median_box_of_the_most_frequent_class_first():
    assert PRIOR["label"].tolist() == [3, 1]
    np.testing.assert_allclose(PRIOR.iloc[0, 1:].astype(float), [0.2, 0.1, 0.5, 0.5])
    np.testing.assert_allclose(PRIOR.iloc[1, 1:].astype(float), [0, 0, 0.15, 0.1])


def test_nth_best_distinct_box_for_the_nth_id_of_an_image():
    table = build(
        found(
            (10, 5, 5, 40, 40, 1, 0.3),
            (10, 50, 5, 70, 40, 2, 0.8),
            (10, 50, 5, 70, 40.1, 2, 0.7),
            (11, 1, 1, 9, 9, 8, 0.001),
            (12, 0, 0, 5, 5, 4, 0.5),
            (13, 0, 0, 9, 9, 5, 1.0),
        )
    )
    assert table["id"].tolist() == [1, 2, 3, 4]
    assert table["label"].tolist() == ["Pneumothorax", "Cardiomegaly", "Infiltrate", "Atelectasis"]
    assert table["confidence"].tolist() == [0.001, 0.8, 0.5, 0.3]


def test_the_same_box_under_another_label_is_distinct():
    table = build(
        found((10, 5, 5, 40, 40, 1, 0.3), (10, 5, 5, 40, 40, 2, 0.8), (10, 5, 5, 90, 40, 2, 0.7))
    )
    assert table["label"].tolist()[1::2] == ["Cardiomegaly", "Cardiomegaly"]
    once = build(
        found((10, 5, 5, 40, 40, 1, 0.3), (10, 5, 5, 40, 40, 2, 0.8), (10, 5, 5, 90, 40, 2, 0.7)),
        same_iou=0,
    )
    assert once["label"].tolist()[1::2] == ["Cardiomegaly", "Atelectasis"]


def test_prior_fills_empty_lists_and_missing_second_boxes_with_confidence_zero():
    table = build(found((10, 5, 5, 40, 40, 1, 0.3))).set_index("id")
    assert table["confidence"].to_dict() == {1: 0, 2: 0.3, 3: 0, 4: 0}
    assert table.loc[1, list(submission.COORDINATES)].tolist() == [
        20,
        8,
        50,
        40,
    ]  # b.png is 100 x 80
    assert table.loc[3, list(submission.COORDINATES)].tolist() == [
        12,
        6,
        30,
        30,
    ]  # c.png is 60 x 60
    assert set(table.loc[[1, 3, 4], "label"]) == {"Effusion"}
    same = build(found((10, 20, 8, 50, 40, 3, 0.3))).set_index(
        "id"
    )  # is the prior's first box already
    assert same["label"].tolist()[1::2] == ["Effusion", "Atelectasis"]
    last = build(found((10, 20, 8, 50, 40, 3, 0.3)), prior=PRIOR.head(1)).set_index("id")
    assert (
        last["label"].tolist()[1::2] == ["Effusion", "Effusion"] and last.loc[4, "confidence"] == 0
    )


def test_boxes_are_clipped_and_slivers_dropped_before_ranking():
    table = build(
        found(
            (10, 120, 5, 140, 40, 1, 0.9),
            (10, -20, -5, 40, 300, 2, 0.5),
            (10, 99.9999, 0, 120, 50, 3, 0.8),
            (11, 30, 30, 20, 50, 5, 0.9),
            (11, 0, 0, 100, 80, 6, 0.1),
        ),
        "B",
    )
    assert table.iloc[0, 2:].tolist() == [0, 0, 40, 80, 0.5, "Cardiomegaly"]
    assert table.iloc[1, 2:].tolist() == [0, 0, 100, 80, 0.1, "Nodule"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"names": {10: "a.png", 12: "c.png"}}, "1 images of the mapping are not in names: b.png"),
        ({"names": {**NAMES, 14: "a.png"}}, "several rows for a.png"),
        ({"sizes": {10: (100, 80)}}, "no .width, height. for image 11"),
        ({"sizes": {**FRAMES, 11: (0, 80)}}, "0 x 80 for image 11"),
        ({"prior": None}, "a.png has 1 distinct boxes for 2 ids. Fix: pass prior"),
        ({"prior": PRIOR.assign(label=0)}, "prior has labels outside 1..8"),
        (
            {"predictions": found((10, 1, 1, 9, 9, 0, 0.5))},
            "predictions has labels outside 1..8: 0 is the background",
        ),
        ({"predictions": found((10, 1, 1, 9, 9, 9, 0.5))}, "labels outside 1..8"),
        ({"predictions": found((10, 1, 1, 9, np.nan, 1, 0.5))}, "NaN or infinite corners"),
        ({"predictions": found((10, 1, 1, 9, 9, 1, np.nan))}, "scores that are not in"),
        ({"predictions": found((10, 1, 1, 9, 9, 1, 50))}, "scores that are not in"),
        (
            {"predictions": found((10, 1, 1, 9, 9, 1, 0.5)).drop(columns="score")},
            "predictions lacks the columns score",
        ),
        (
            {"predictions": found((13, 1, 1, 9, 9, 1, 0.5))},
            "no image of the mapping has a usable box",
        ),
    ],
)
def test_build_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        build(**{"predictions": found((10, 1, 1, 9, 9, 1, 0.5))} | change)


def test_prior_refuses_an_empty_table_and_unknown_images():
    with pytest.raises(ValueError, match="boxes is empty"):
        submission.class_prior(TRUTH.head(0), {})
    with pytest.raises(ValueError, match="for image 2"):
        submission.class_prior(TRUTH, {1: (100, 100)})


def drawn(rng, images, sizes, mean):
    """Random predictions: images without any, ties, boxes over the border, inside out and of no width."""
    rows = []
    for image in images:
        for _ in range(rng.poisson(mean)):
            width, height = sizes[image]
            x, y = rng.uniform(-0.3, 1.3, (2, 2)) * [[width], [height]]
            if rng.random() < 0.9:
                x, y = np.sort(x), np.sort(y)
            box = np.round([x[0], y[0], x[1], y[1]], int(rng.integers(0, 15)))
            score = rng.choice([0.0, 0.5, 1.0, rng.random(), 1e-300])
            rows += [(image, *box, rng.integers(1, 9), score)] * int(rng.integers(1, 3))
    # A whole-image box, so that no draw leaves every list empty.
    return found((images[0], -1, -1, 9999, 9999, 1, rng.random()), *rows)


@pytest.mark.parametrize("edition", EDITIONS)
def test_whatever_is_predicted_the_built_file_is_valid(edition, tmp_path):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        table = build(drawn(rng, list(NAMES), FRAMES, mean=rng.choice([0, 0.3, 5])), edition)
        pd.testing.assert_frame_equal(table[list(EDITIONS[edition])], EDITIONS[edition])
        path = submission.write(
            table, tmp_path / "deep" / "mine.csv", EDITIONS[edition], images=SIZES
        )
        back = submission.check(path, EDITIONS[edition], images=SIZES)
        pd.testing.assert_frame_equal(back, table, check_exact=True, check_dtype=False)
        other = pd.read_csv(path)  # a reader that may round in the last digit
        assert (other.x_min < other.x_max).all() and (other.y_min < other.y_max).all()


def test_a_refused_table_leaves_the_older_file(tmp_path):
    table = build(found((10, 5, 5, 40, 40, 1, 0.3)))
    path = submission.write(table, tmp_path / "mine.csv", EDITIONS["A"])
    before = path.read_bytes()
    with pytest.raises(submission.SubmissionError, match="the submission: 1 problem"):
        submission.write(table.assign(confidence=2), path, EDITIONS["A"])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_reads_back_differently_never_appears(tmp_path, monkeypatch):
    to_csv = pd.DataFrame.to_csv
    rounded = {"float_format": "%.1f"}
    monkeypatch.setattr(
        pd.DataFrame,
        "to_csv",
        lambda self, path=None, **options: to_csv(self, path, **options, **rounded if path else {}),
    )
    with pytest.raises(
        submission.SubmissionError, match="mine.csv: what was written reads back as something else"
    ):
        submission.write(
            build(found((10, 5, 5, 40, 40, 1, 0.33))), tmp_path / "mine.csv", EDITIONS["A"]
        )
    assert not list(tmp_path.iterdir())


def test_ties_keep_the_order_of_the_table():
    ties = found(*((10, n, n, n + 9, n + 9, 1 + n % 8, 0.5) for n in range(60)))
    assert build(ties)["x_min"].tolist()[1::2] == [0, 1]
    assert build(ties[::-1])["x_min"].tolist()[1::2] == [59, 58]


def test_a_table_is_checked_as_the_csv_it_becomes():
    table = build(found((10, 5, 5, 40, 40, 1, 0.3)))
    submission.check(table.set_axis([7, 7, 7, 7]), EDITIONS["A"])
    with pytest.raises(submission.SubmissionError, match="x_min is empty or NaN in 1 row: line 4"):
        submission.check(table.assign(x_min=[1, 1, np.nan, 1]), EDITIONS["A"])
    with pytest.raises(submission.SubmissionError, match="unknown columns 'index' in line 1"):
        submission.check(table.reset_index(), EDITIONS["A"])


def test_leak_guard_counts_and_names_the_images():
    train = ["train/z.png", "train/a.png", "train\\a.png", "c.png"]
    with pytest.raises(
        ValueError, match=r"2 training images \(3 rows\) stand in .*: a.png, c.png. Fix: remove"
    ):
        submission.leak_guard(train, EDITIONS["A"])
    submission.leak_guard(["train/z.png", "A.png"], EDITIONS["A"])


@pytest.mark.real
def test_the_real_mapping_of_edition_a(real_data, tmp_path):
    folder = real_data / "nih_boxes" / "competition_edition_a"
    mapping = pd.read_csv(folder / "ID_to_Image_Mapping.csv")
    assert len(mapping) == 148 and mapping["image_id"].nunique() == 145
    names = dict(enumerate(sorted(mapping["image_id"].unique())))
    sizes = dict.fromkeys(names, (1024, 1024))
    train = pd.read_csv(folder / "train.csv")
    train.columns = ["name", "class", "x", "y", "w", "h"]
    truth = pd.DataFrame(
        {
            "image": train["name"].factorize()[0],
            "x1": train.x,
            "y1": train.y,
            "x2": train.x + train.w,
            "y2": train.y + train.h,
            "label": [NIH_CLASSES.index(one) + 1 for one in train["class"]],
        }
    )
    prior = submission.class_prior(truth, dict.fromkeys(truth["image"], (1024, 1024)))
    assert prior["label"].iloc[0] == 1 and len(prior) == 8  # Atelectasis has the most boxes
    predictions = drawn(np.random.default_rng(0), list(names), sizes, mean=2)
    table = submission.build(
        predictions, mapping, names=names, classes=NIH_CLASSES, sizes=sizes, prior=prior
    )
    frame = dict.fromkeys(names.values(), (1024, 1024))
    path = submission.write(table, tmp_path / "edition_a.csv", mapping, images=frame)
    assert len(submission.check(path, folder / "ID_to_Image_Mapping.csv", images=frame)) == 148
    twice = table[table["image_id"].duplicated(keep=False)]
    assert len(twice) == 6 and not twice.drop(columns=["id", "confidence"]).duplicated().any()
    with pytest.raises(ValueError, match="25 training images"):
        submission.leak_guard(train["name"], mapping)
