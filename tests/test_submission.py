"""The competition CSV: what `build` makes passes `check`, and `check` finds what is wrong."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dlia_utils import submission
from dlia_utils.data.readers import NIH_CLASSES

SIZES = {"a.png": (100, 80), "b.png": (100, 80), "c.png": (60, 60)}
# Edition A: ids from 1, and a.png has two of them. Edition B: ids from 0, each image once.
EDITIONS = {
    "A": pd.DataFrame({"id": [1, 2, 3, 4], "image_id": ["b.png", "a.png", "c.png", "a.png"]}),
    "B": pd.DataFrame({"ID": [0, 1, 2], "image_id": ["a.png", "b.png", "c.png"]}),
}
# Lines 1 to 5 of a good file of edition A.
GOOD = """id,image_id,x_min,y_min,x_max,y_max,confidence,label
1,b.png,1.5,2.5,30.25,40.125,0.9,Mass
2,a.png,10,20,90,80,0.123456789012345678,Atelectasis
3,c.png,0,0,60,60,0.0,Infiltrate
4,a.png,5,5,20,30,1.0,Pneumothorax
"""
LINES = GOOD.splitlines()


def text(lines):
    return "\n".join(lines) + "\n"


def problems(content, tmp_path, **options):
    """The message about a file with this content; it must be refused."""
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(submission.SubmissionError) as error:
        submission.check(path, EDITIONS["A"], **options)
    return str(error.value)


# What is replaced in the good file, by what, and what each line of the message says.
ROWS = """
2,a.png | 9,a.png | id: not in the mapping in 1 row: line 3 ('9') | ids are missing: 2. Fix
3,c.png | 2,c.png | a second time in 1 row: line 4 ('2') | not the image of its id | missing: 3
3,c.png | 3,a.png | image_id: not the image of its id in 1 row: line 4 ('a.png')
,20, | ,, | y_min: no finite number in 1 row: line 3 ('')
1.0 | NaN | confidence: no finite number in 1 row: line 5 ('NaN')
30.25 | inf | x_max: no finite number in 1 row: line 2 ('inf')
30.25 | wide | x_max: no finite number in 1 row: line 2 ('wide')
10,20,90,80 | 90,20,10,80 | x_min: not below x_max in 1 row: line 3 ('90')
10,20,90,80 | 10,20,60,15 | y_min: not below y_max in 1 row: line 3 ('20')
,5,5 | ,5,-0.5 | y_min: negative in 1 row: line 5 ('-0.5')
0.9 | 90 | confidence: above 1 in 1 row: line 2 ('90')
0.9 | -0.1 | confidence: below 0 in 1 row: line 2 ('-0.1')
Infiltrate | Infiltration | line 4 ('Infiltration'). Fix: the competition spells it Infiltrate
Mass | mass | label: unknown in 1 row: line 2 ('mass'). Fix: one of Atelectasis
,Atelectasis |  | label: unknown in 1 row: line 3 ('')
90,80 | 90,80.5 | y_max: beyond the image's height in 1 row: line 3 ('80.5')
60,60 | 60.25,60 | x_max: beyond the image's width in 1 row: line 4 ('60.25')
"""


@pytest.mark.parametrize("row", ROWS.strip().splitlines())
def test_a_wrong_row_is_named_with_its_line_and_the_fix(row, tmp_path):
    old, new, *expected = (part.strip() for part in row.split("|"))
    assert old in GOOD
    head, *lines = problems(GOOD.replace(old, new, 1), tmp_path, images=SIZES).splitlines()
    assert f"bad.csv: {len(expected)} problem" in head and len(lines) == len(expected), lines
    assert all("Fix: " in line and part in line for line, part in zip(lines, expected, strict=True))


SAME = [f"{line[:7]},0,0,1.5,1,0.01,Mass" for line in LINES[1:]]
SHARES = [f"{line[:7]},.1,.2,.3,.{line[0]},.5,Mass" for line in LINES[1:]]
FILES = {
    "empty": ("", "not readable as CSV"),
    "header only": (LINES[0], "0 rows. Fix: the header is id,image_id,x_min"),
    "no header": (text(LINES[1:]), "line 1 is '1,b.png"),
    "other edition": (GOOD.replace("id,", "ID,", 1), "Fix: the header is id,image_id"),
    "index": (text(f"{n or ''},{line}" for n, line in enumerate(LINES)), "without index"),
    "decimal comma": (GOOD.replace("30.25", "30,25"), "more cells than the header"),
    "another one": (GOOD.replace(",0.0,", ",0,0,"), "line 4, saw 9"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD.encode(), "without index or byte order mark"),
    "UTF-16": (GOOD.encode("utf-16"), "not readable as CSV ('utf-8' codec"),
    "constant": (text([LINES[0], *SAME]), "every row holds the same prediction"),
    "fractions": (text([LINES[0], *SHARES]), "not fractions of the image"),
    "trailing commas": (GOOD.replace("\n", ",\n"), "5 lines have a comma too many: 1, 2, 3, 4, 5"),
    "in the rows": (GOOD.replace("\n", ",\n").replace(",\n", "\n", 1), "too many: 2, 3, 4, 5. Fix"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_told(case, tmp_path):
    content, expected = FILES[case]
    assert expected in problems(content, tmp_path)


def test_all_kinds_of_problems_are_listed_at_once_and_long_lists_are_cut(tmp_path):
    rows = ["1,c.png,9,2,3,4,x,Mass", LINES[2], LINES[2], "4,a.png,-5,5,20,30,2,Infiltration"]
    message = problems(text([LINES[0], *rows]), tmp_path, images=SIZES)
    assert "bad.csv: 8 problems (the header is line 1)" in message
    mapping = pd.DataFrame({"id": range(30), "image_id": [f"{n}.png" for n in range(30)]})
    table = mapping.assign(x_min=0, y_min=0, x_max=range(1, 31), y_max=9, confidence=0.5, label="x")
    with pytest.raises(submission.SubmissionError, match=r"line 11 \('x'\), ... and 20 more"):
        submission.check(table, mapping)


def test_true_sizes_are_read_from_a_folder_of_images(tmp_path):
    for name, size in SIZES.items():
        (tmp_path / "deep" / name[0]).mkdir(parents=True)
        Image.new("L", size).save(tmp_path / "deep" / name[0] / name)
    assert "('80.5')" in problems(GOOD.replace("80,0.1", "80.5,0.1"), tmp_path, images=tmp_path)
    (tmp_path / "bad.csv").write_text(GOOD)
    submission.check(tmp_path / "bad.csv", EDITIONS["A"], images=tmp_path)
    (tmp_path / "deep" / "b" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of the mapping's 3 images: b.png. Fix"):
        submission.check(tmp_path / "bad.csv", EDITIONS["A"], images=tmp_path)


@pytest.mark.parametrize("orientation, size", [(1, (80, 40)), (3, (80, 40)), (6, (40, 80))])
def test_the_size_of_an_image_is_that_of_the_upright_one(orientation, size, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", (80, 40)).save(tmp_path / "a.jpg", exif=exif)
    ids = pd.DataFrame({"id": [1], "image_id": ["a.jpg"]})
    whole = dict(zip(submission.NUMBERS, (0.0, 0.0, *size, 0.5), strict=True))
    table = ids.assign(**whole, label="Mass")
    submission.check(table, ids, images=tmp_path)
    with pytest.raises(submission.SubmissionError, match="beyond the image's width"):
        submission.check(table.assign(x_max=size[0] + 1), ids, images=tmp_path)


def test_without_images_the_size_is_that_of_the_edition_or_it_is_said(caplog):
    ids = pd.DataFrame({"ID": [0], "image_id": ["00000032_037.png"]})
    table = ids.assign(x_min=0.0, y_min=0.0, x_max=1024, y_max=1024, confidence=0.5, label="Mass")
    submission.check(table, ids)
    assert not caplog.text
    with pytest.raises(submission.SubmissionError, match="beyond the image's height in 1 row"):
        submission.check(table.assign(y_max=1024.5), ids)
    ids, table = ids.assign(image_id="a.png"), table.assign(image_id="a.png", y_max=2000)
    submission.check(table, ids)
    assert "not checked: whether boxes lie inside their images" in caplog.text


GOODS = [GOOD, GOOD.replace("\n", "\r\n"), GOOD + "\n", text([LINES[0], *LINES[:0:-1]])]
GOODS += [GOOD.replace("a.png", '"a.png"'), GOOD.replace("1.0", "1e-3")]


@pytest.mark.parametrize("content", GOODS)
def test_good_files_pass(content, tmp_path):
    path = tmp_path / "good.csv"
    path.write_bytes(content.encode())
    table = submission.check(path, EDITIONS["A"], images=SIZES)
    assert list(table.columns) == LINES[0].split(",") and len(table) == 4
    row = table.set_index("id").loc[2]
    assert row["confidence"] == 0.123456789012345678 and row["x_max"] == 90.0
    (tmp_path / "map.csv").write_text("id,image_id\n1,b.png\n2,a.png\n3,c.png\n4,a.png\n")
    again = submission.check(str(path), tmp_path / "map.csv", images=SIZES)
    pd.testing.assert_frame_equal(again, table)


def test_other_classes_have_their_own_spelling():
    table = pd.DataFrame([line.split(",") for line in LINES[1:]], columns=LINES[0].split(","))
    table = table.replace("Infiltrate", "Infiltration")
    classes = [*NIH_CLASSES[:3], "Infiltration", *NIH_CLASSES[4:]]
    assert len(submission.check(table, EDITIONS["A"], classes=classes)) == 4


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"Id": [1], "image_id": ["a.png"]}, "has 1 rows of Id, image_id; it needs `id` or `ID`"),
        ({"id": [1, 1], "image_id": ["a.png", "b.png"]}, "line 3: id '1' stands above already"),
        ({"id": ["1.0", "2"], "image_id": ["a.png", "b.png"]}, "line 2: id '1.0' is no plain id"),
        ({"id": [1.0, np.nan], "image_id": ["a.png", "b.png"]}, "lacks the id of 1 rows"),
        ({"id": [2.0**53, 1], "image_id": ["a.png", "b.png"]}, "last digits are lost"),
        ({"id": [1], "image_id": [""]}, "lacks the image_id of 1 rows"),
        ({"id": [], "image_id": []}, "has 0 rows"),
    ],
)
def test_bad_mapping(columns, message):
    with pytest.raises(ValueError, match=message):
        submission.leak_guard([], pd.DataFrame(columns))


NAMES = {10: "a.png", 11: "b.png", 12: "c.png", 13: "no_test_image.png"}
FRAMES = {row: SIZES.get(name, (50, 50)) for row, name in NAMES.items()}
COLUMNS = ["image", "x1", "y1", "x2", "y2", "label"]
TRUTH = [(1, 10, 10, 50, 50, 3), (1, 20, 20, 60, 60, 3)]
TRUTH += [(2, 40, 0, 80, 40, 3), (2, 0, 0, 30, 10, 1)]
PRIOR = submission.class_prior(pd.DataFrame(TRUTH, columns=COLUMNS), {1: (100, 100), 2: (200, 100)})


def found(*rows):
    return pd.DataFrame(rows, columns=[*COLUMNS, "score"])


def build(predictions, edition="A", **options):
    options = {"names": NAMES, "classes": NIH_CLASSES, "sizes": FRAMES, "prior": PRIOR} | options
    options = {"prior_share": 1} | options
    return submission.build(predictions, EDITIONS[edition], **options)


def test_prior_is_the_median_box_of_the_most_frequent_class_first():
    expected = [[3, 0.2, 0.1, 0.5, 0.5], [1, 0, 0, 0.15, 0.1]]
    np.testing.assert_allclose(PRIOR.to_numpy(float), expected)


def test_nth_best_distinct_box_for_the_nth_id_of_an_image():
    two = [(10, 50, 5, 70, 40, 2, 0.8), (10, 50, 5, 70, 40.1, 2, 0.7), (10, 5, 5, 40, 40, 1, 0.3)]
    rest = [(11, 1, 1, 9, 9, 8, 0.001), (12, 0, 0, 5, 5, 4, 0.5), (13, 0, 0, 9, 9, 5, 1.0)]
    table = build(found(*two[::-1], *rest))
    assert table["id"].tolist() == [1, 2, 3, 4]
    assert table["label"].tolist() == ["Pneumothorax", "Cardiomegaly", "Infiltrate", "Atelectasis"]
    assert table["confidence"].tolist() == [0.001, 0.8, 0.5, 0.3]
    other = build(found(two[0], (10, 50, 5, 70, 40, 1, 0.7)))  # another label is another finding
    assert other["label"].tolist()[1::2] == ["Cardiomegaly", "Atelectasis"]


def test_the_worth_of_a_box_says_which_one_is_sent_and_its_score_stays():
    rows = found((10, 5, 5, 40, 40, 2, 0.8), (10, 5, 5, 40, 40, 1, 0.3), (11, 0, 0, 9, 9, 3, 0.2))
    table = build(rows.assign(worth=[0.1, 0.4, 0.0])).set_index("id")
    assert table.loc[[2, 4], "label"].tolist() == ["Atelectasis", "Cardiomegaly"]
    assert table.loc[[2, 4], "confidence"].tolist() == [0.3, 0.8]
    tied = build(rows.assign(worth=0.5)).set_index("id")
    assert tied.loc[2, "label"] == "Cardiomegaly", "where the worth is equal, the score decides"
    with pytest.raises(ValueError, match="worth that is no number"):
        build(rows.assign(worth=[0.1, np.nan, 0.0]))


def test_one_label_in_most_rows_or_a_class_without_a_row_is_told(caplog):
    ids = pd.DataFrame({"id": range(20), "image_id": [f"{n:08d}_000.png" for n in range(20)]})
    table = ids.assign(x_min=0.0, y_min=0.0, x_max=9, y_max=9, confidence=np.arange(20) / 20)
    even = [NIH_CLASSES[n % 8] for n in range(20)]
    submission.check(table.assign(label=even), ids)
    assert not caplog.text
    submission.check(table.assign(label=[NIH_CLASSES[0]] * 11 + even[1:8] + even[:2]), ids)
    assert "60% of 20 rows say Atelectasis" in caplog.text and "no row" not in caplog.text
    submission.check(table.assign(label=[one.replace("Mass", "Nodule") for one in even]), ids)
    assert "no row says Mass" in caplog.text


def test_prior_fills_empty_lists_and_missing_second_boxes_with_confidence_zero():
    table = build(found((10, 5, 5, 40, 40, 1, 0.3))).set_index("id")
    assert table["confidence"].to_dict() == {1: 0, 2: 0.3, 3: 0, 4: 0}
    assert table.loc[1, submission.NUMBERS].tolist() == [20, 8, 50, 40, 0]  # b.png is 100 x 80
    assert table.loc[3, submission.NUMBERS].tolist() == [12, 6, 30, 30, 0]  # c.png is 60 x 60
    assert set(table.loc[[1, 3, 4], "label"]) == {"Effusion"}
    same = found((10, 20, 8, 50, 40, 3, 0.3))  # is the prior's first box already
    assert build(same)["label"].tolist()[1::2] == ["Effusion", "Atelectasis"]
    last = build(same, prior=PRIOR.head(1))
    assert last["label"].tolist()[1::2] == ["Effusion", "Effusion"] and last["confidence"][3] == 0


def test_boxes_are_clipped_and_thin_ones_dropped_before_ranking():
    a = [(10, 100.1, 5, 101, 40, 1, 0.9), (10, -1, -0.5, 40, 80.9, 2, 0.5)]
    a += [(10, 99.9999, 0, 100.5, 50, 3, 0.8)]
    b = [(11, -1, 30, -0.2, 50, 5, 0.9), (11, 0, 0, 100, 80, 6, 0.1)]
    table = build(found(*a, *b), "B")
    assert table.iloc[0, 2:].tolist() == [0, 0, 40, 80, 0.5, "Cardiomegaly"]
    assert table.iloc[1, 2:].tolist() == [0, 0, 100, 80, 0.1, "Nodule"]


ONE = found((10, 1, 1, 9, 9, 1, 0.5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"names": {10: "a.png", 12: "c.png"}}, "1 images of the mapping are not in names: b.png"),
        ({"predictions": ONE.assign(label=0)}, "none of 1..K: 0 is the background"),
        ({"predictions": ONE.assign(label=9)}, "labels outside 1..8"),
        ({"predictions": ONE.assign(score=50)}, "a score outside .0, 1.: 50.0"),
        ({"predictions": ONE.assign(image=14)}, "an image that `sizes` lacks"),
        ({"predictions": ONE.assign(image=13)}, "no image of the mapping has a usable box"),
        ({"prior_share": 0.1}, "3 of 4 rows would be the class prior.*ask for so many"),
    ],
)
def test_build_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        build(**{"predictions": ONE} | change)


def drawn(rng, images, sizes, mean):
    """Random predictions: images without any, ties, boxes a little over the border."""
    # A whole-image box, so that no draw leaves every list empty.
    width, height = sizes[images[0]]
    rows = [(images[0], -1, -1, width + 1, height + 1, 1, rng.random())]
    for image in images:
        for _ in range(rng.poisson(mean)):
            width, height = sizes[image]
            x, y = np.sort(rng.uniform(-1, [[width + 1], [height + 1]], (2, 2)), axis=1)
            box = np.round([x[0], y[0], x[1], y[1]], int(rng.integers(1, 15)))
            if x[1] - x[0] < 0.1 or y[1] - y[0] < 0.1:
                continue
            score = rng.choice([0.0, 0.5, 1.0, rng.random(), 1e-300])
            rows += [(image, *box, rng.integers(1, 9), score)] * int(rng.integers(1, 3))
    return found(*rows)


@pytest.mark.parametrize("edition", EDITIONS)
def test_whatever_is_predicted_the_built_file_is_valid(edition, tmp_path):
    for seed in range(15):
        rng, mapping = np.random.default_rng(seed), EDITIONS[edition]
        table = build(drawn(rng, list(NAMES), FRAMES, mean=rng.choice([0, 0.3, 5])), edition)
        pd.testing.assert_frame_equal(table[list(mapping)], mapping)
        path = submission.write(table, tmp_path / "deep" / "mine.csv", mapping, images=SIZES)
        back = submission.check(path, mapping, images=SIZES)
        pd.testing.assert_frame_equal(back, table, check_exact=True, check_dtype=False)
        other = pd.read_csv(path)  # a reader that may round in the last digit
        assert (other.x_min < other.x_max).all() and (other.y_min < other.y_max).all()


def test_a_refused_table_or_a_rounded_file_leaves_the_older_one(tmp_path, monkeypatch):
    table = build(found((10, 5, 5, 40, 40, 1, 0.33)))
    path = submission.write(table, tmp_path / "mine.csv", EDITIONS["A"])
    before, to_csv = path.read_bytes(), pd.DataFrame.to_csv
    with pytest.raises(submission.SubmissionError, match="the submission: 1 problem"):
        submission.write(table.assign(confidence=2), path, EDITIONS["A"])

    def rounded(self, path=None, **options):
        return to_csv(self, path, **options, **({"float_format": "%.1f"} if path else {}))

    monkeypatch.setattr(pd.DataFrame, "to_csv", rounded)
    with pytest.raises(submission.SubmissionError, match="reads back as something else"):
        submission.write(table, path, EDITIONS["A"])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_ties_keep_the_order_of_the_table():
    ties = found(*((10, n, n, n + 9, n + 9, 1 + n % 8, 0.5) for n in range(60)))
    assert build(ties)["x_min"].tolist()[1::2] == [0, 1]
    assert build(ties[::-1])["x_min"].tolist()[1::2] == [59, 58]


def test_leak_guard_counts_and_names_the_images():
    train = ["train/z.png", "train/a.png", "train\\a.png", "c.png"]
    told = r"2 training images \(3 rows\) stand in .*: a.png, c.png. Fix: remove"
    with pytest.raises(ValueError, match=told):
        submission.leak_guard(train, EDITIONS["A"])
    submission.leak_guard(["train/z.png", "A.png"], EDITIONS["A"])


@pytest.mark.real
def test_the_real_mapping_of_edition_a(real_data, tmp_path):
    folder = real_data / "nih_boxes" / "competition_edition_a"
    mapping = pd.read_csv(folder / "ID_to_Image_Mapping.csv")
    assert len(mapping) == 148 and mapping["image_id"].nunique() == 145
    names = dict(enumerate(sorted(mapping["image_id"].unique())))
    sizes, frame = (dict.fromkeys(keys, (1024, 1024)) for keys in (names, names.values()))
    train = pd.read_csv(folder / "train.csv")
    train.columns = ["name", "class", "x1", "y1", "w", "h"]
    truth = train.assign(image=train["name"].factorize()[0], x2=train.x1 + train.w)
    label = [NIH_CLASSES.index(one) + 1 for one in train["class"]]
    truth = truth.assign(y2=train.y1 + train.h, label=label)
    prior = submission.class_prior(truth[COLUMNS], dict.fromkeys(truth["image"], (1024, 1024)))
    assert prior["label"].iloc[0] == 1 and len(prior) == 8  # Atelectasis has the most boxes
    options = dict(names=names, classes=NIH_CLASSES, sizes=sizes, prior=prior, prior_share=1)
    predictions = drawn(np.random.default_rng(0), list(names), sizes, mean=2)
    table = submission.build(predictions, mapping, **options)
    path = submission.write(table, tmp_path / "edition_a.csv", mapping, images=frame)
    assert len(submission.check(path, folder / "ID_to_Image_Mapping.csv", images=frame)) == 148
    twice = table[table["image_id"].duplicated(keep=False)]
    assert len(twice) == 6 and not twice.drop(columns=["id", "confidence"]).duplicated().any()
    with pytest.raises(ValueError, match="25 training images"):
        submission.leak_guard(train["name"], mapping)


# Whole numbers in a column of their own stay numbers; whatever else there is is text.
KEPT = [[2**53 + 1, 2**53 + 2, 0], ["007", "07", "7"], [10**20, 10**20 + 1, 5], ["x7", "1e3", "b"]]


@pytest.mark.parametrize("ids", KEPT, ids=str)
@pytest.mark.parametrize("images", [["0001", "1", "01"], [2**53 + 1, 2**53 + 2, 3]], ids=str)
def test_ids_and_names_survive_the_whole_way_to_the_last_digit(ids, images, tmp_path):
    mapping = pd.DataFrame({"id": ids, "image_id": [f"{one}.png" for one in images]})
    mapping.to_csv(tmp_path / "map.csv", index=False)
    rows = [(one, 5, 5, 30 + n, 40, 1, 0.5) for n, one in enumerate(images)]
    names = {one: f"{one}.png" for one in images}
    options = dict(names=names, sizes=dict.fromkeys(images, (100, 80)), classes=["Mass"])
    frames = dict.fromkeys(names.values(), (100, 80))
    for told_by in (mapping, tmp_path / "map.csv"):
        table = submission.build(found(*rows), told_by, prior=PRIOR, **options)
        path = submission.write(table, tmp_path / "mine.csv", told_by, images=frames)
        lines = [line.split(",") for line in path.read_text().splitlines()[1:]]
        told = [(*line[:2], float(line[4])) for line in lines]
        pairs = zip(ids, images, strict=True)
        assert told == [(str(a), f"{b}.png", 30.0 + n) for n, (a, b) in enumerate(pairs)]
        back = submission.check(path, told_by, images=frames)
        assert [str(one) for one in back["id"]] == [str(one) for one in ids]


def test_a_share_of_the_prior_is_refused_unless_it_is_asked_for():
    mapping = pd.DataFrame({"id": range(20), "image_id": [f"{n}.png" for n in range(20)]})
    names, sizes = dict(enumerate(mapping["image_id"])), dict.fromkeys(range(20), (100, 80))
    options = dict(names=names, sizes=sizes, classes=NIH_CLASSES, prior=PRIOR)
    rows = found(*((n, 5, 5, 30, 40, 1, 0.5) for n in range(18)))
    assert submission.build(rows, mapping, **options)["confidence"].eq(0).sum() == 2  # a tenth
    with pytest.raises(ValueError, match="3 of 20 rows would be the class prior"):
        submission.build(rows[1:], mapping, **options)
    table = submission.build(rows[1:], mapping, prior_share=0.15, **options)
    assert table["confidence"].eq(0).sum() == 3


@settings(derandomize=True, database=None, deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), edition=st.sampled_from("AB"), mean=st.integers(0, 4))
def test_what_is_built_knows_no_order_of_rows_and_sends_a_box_once(seed, edition, mean):
    rng = np.random.default_rng(seed)
    predictions = drawn(rng, list(NAMES), FRAMES, mean=mean)
    predictions["score"] = rng.permutation(len(predictions)) / len(predictions)
    table = build(predictions, edition)
    moved = predictions.sample(frac=1, random_state=seed % 1000)
    pd.testing.assert_frame_equal(build(moved, edition), table)
    pd.testing.assert_frame_equal(submission.check(table, EDITIONS[edition], images=SIZES), table)
    assert not table.drop(columns=[table.columns[0], "confidence"]).duplicated().any()
    best = predictions.assign(name=predictions["image"].map(NAMES)).groupby("name")["score"].max()
    first = table.drop_duplicates("image_id").set_index("image_id")["confidence"]
    assert first.le(best.reindex(first.index).fillna(0)).all()
