"""A reader's own folders and boxes: all layouts that are read, all that is refused."""

import json
import os
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dlia_utils import __main__ as cli
from dlia_utils.data import cache, datasets, phantom, readers, sources, tables
from dlia_utils.data.tables import BOX_COLUMNS, BadData, DataNotFound

FLAT = ["a.png", "b.png", "c.png", "d.png"]
CLASSES = ["flu/1.png", "flu/2.png", "normal/1.png", "normal/2.png"]
SPLIT = [f"{top}/{name}/1.png" for top in ("train", "test") for name in ("flu", "normal")]
LABELS = "file,label\na.png,flu\nb.png,flu\nc.png,normal\nd.png,normal\n"


def draw(root, names, *, size=(24, 16), seed=0):
    """Images of noise under these names, so that no two are alike."""
    rng = np.random.default_rng(seed)
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".dcm", ".txt", ".svg"):
            path.write_text("x")
        else:
            Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint8)).save(path)
    return root


@pytest.fixture
def root(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def column(dataset, name):
    return dict(zip(dataset.manifest["path"], dataset.manifest[name], strict=True))


# --- class folders


def test_class_folders_at_any_depth_and_of_every_type(root, caplog):
    names = "Flu/a.png Flu/deep/er/a.JPG Flu/a.tif Normal/a.bmp Normal/b.webp Normal/c.jpeg".split()
    junk = ["loose.png", "Flu/notes.txt", "Flu/._a.png", ".cache/x.png"]
    draw(root, [*names, "Normal/d.TIFF", *junk])
    dataset = datasets.from_folder(root)
    assert dataset.name == "mine" and dataset.root == root and not dataset.synthetic
    assert list(dataset.manifest["path"]) == sorted([*names, "Normal/d.TIFF"])
    assert dataset.classes == ("Normal", "Flu") and column(dataset, "label")["Flu/a.png"] == 1
    assert set(dataset.manifest["split"]) == {""} and dataset.split_rule == "none"
    assert sorted(dataset.ignored["path"]) == sorted(junk)
    assert dataset.manifest["patient"].is_unique, "a.png and a.tif are not one patient"
    assert "no patients are known" in caplog.text and "patient_pattern" in caplog.text
    assert datasets.check(dataset).empty and len(cache.build(dataset, size=16).images) == 7


@pytest.mark.parametrize(
    "tops, splits",
    [
        (("train", "val", "test"), ["test", "train", "val"]),
        (("TRAIN", "Testing"), ["test", "train"]),
    ],
)
def test_split_folders(root, tops, splits):
    draw(root, [f"{top}/{name}/deep/1.png" for top in tops for name in ("flu", "normal")])
    dataset = datasets.from_folder(root)
    assert sorted(set(dataset.manifest["split"])) == splits
    assert dataset.split_rule == "given by the folders"
    assert dataset.classes == ("normal", "flu") and len(dataset.manifest) == 2 * len(tops)


@pytest.mark.parametrize("name, head", [("labels.csv", ""), ("Table.CSV", "\ufeff")])
def test_csv_of_flat_images(root, name, head):
    draw(root, [*FLAT, "e.png"])
    text = " File ;LABEL;Patient;Split\n./a.png;flu;0012;train\nb.png;flu;12;Valid\n\n"
    text += f"{root}/c.png;normal;7;train\nd.png;normal;8;val\n"
    (root / name).write_text(head + text, encoding="utf-8")
    dataset = datasets.from_folder(root)
    assert list(dataset.manifest["path"]) == FLAT
    assert list(dataset.manifest["label"]) == [1, 1, 0, 0]
    assert list(dataset.manifest["patient"]) == ["0012", "12", "7", "8"]
    assert list(dataset.manifest["split"]) == ["train", "val", "train", "val"]
    assert dataset.split_rule == f"given by {name}"
    assert dataset.ignored.values.tolist() == [["e.png", f"not in {name}"]]


def test_csv_beside_class_folders_names_patients_by_file_name(root, caplog):
    draw(root, [*CLASSES[:2], "normal/sub/3.png", "normal/4.png"])
    (root / "info.csv").write_text("file,patient\n1.png,p\nflu\\2.png,q\n3.png,r\n4.png,s\n")
    (root / "other.csv").write_text("name,age\nx,3\n")
    dataset = datasets.from_folder(root)
    assert column(dataset, "patient")["normal/sub/3.png"] == "r"
    assert dataset.classes == ("normal", "flu") and dataset.split_rule == "none"
    assert "other.csv" in caplog.text and "no patients" not in caplog.text


def test_patients_by_pattern(root):
    draw(root, ["flu/p1_a.png", "flu/p1_b.png", "normal/p2_a.png"])
    for pattern in (r"/(p\d)", r"(?P<x>.)/(?P<patient>p\d)_"):
        dataset = datasets.from_folder(root, patient_pattern=pattern)
        assert list(dataset.manifest["patient"]) == ["p1", "p1", "p2"]


def test_names_and_synthetic(tmp_path):
    dataset = datasets.from_folder(draw(tmp_path / "x" / "covid", CLASSES))
    assert dataset.name == "covid-folder" and not dataset.synthetic
    (tmp_path / "x" / "covid" / phantom.MARKER).touch()
    assert datasets.from_folder(tmp_path / "x" / "covid").synthetic


SPLITS_CSV = "file,label,split\na.png,x,train\nb.png,y,"
BAD = {  # images, text of l.csv, message
    "flat": (FLAT, "", "no class folder, but 4 images(.|\n)*add a CSV with file and label"),
    "no image": ([*CLASSES, "x/1.dcm"], "", r"class folder x has no image .*only \.dcm: convert"),
    "case": ([*CLASSES, "Flu/1.png"], "", "Flu and flu\nFix: write each class in one way"),
    "one class": (["flu/1.png"], "", "one class only, flu: .*another class; if .*mine/flu holds"),
    "class in one split": (SPLIT[:3], "", "test has no image of normal"),
    "train only": (SPLIT[:2], "", "are train only: train is needed, with test, val or both"),
    "beside splits": ([*SPLIT, "more/1.png"], "", "more/1.png lies outside the folders of the sp"),
    "missing": (FLAT[:3], LABELS, "line 5: d.png is not there"),
    "case of name": (["A.png", *FLAT[1:]], LABELS, "a.png is not there, but A.png is"),
    "twice": (FLAT, LABELS + "./a.png,flu\n", "line 6: a.png stands above already: keep one row"),
    "ambiguous": (CLASSES, "file\n1.png", "not there, but flu/1.png and normal/1.png is"),
    "blank label": (FLAT, LABELS.replace("b.png,flu", "b.png,"), "line 3: b.png has no label"),
    "no patient": (FLAT, "file,label,patient\na.png,x,p\nb.png,y,NA\n", "line 3: b.png has no pat"),
    "unknown split": (FLAT, SPLITS_CSV + "dev", "line 3: b.png has no split of train, val, test"),
    "unlisted class": (CLASSES, "file\nflu/1.png", "folder normal has no image listed in l.csv"),
    "cells": (
        FLAT,
        LABELS + "a.png,flu,more\n",
        r"line 6: 3 cells, but the header has 2\n.*double quotes",
    ),
    "no rows": (FLAT, "file,label\n", "has 0 rows below its header. Fix: .*a row for each image"),
    "not UTF-8": (FLAT, LABELS.encode() + b"\xff", "line 6 is not UTF-8.*save it as CSV in UTF-8"),
}


@pytest.mark.parametrize("names, table, message", BAD.values(), ids=BAD)
def test_bad_folders_are_refused_with_the_fix(root, names, table, message):
    draw(root, names)
    if table:
        (root / "l.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(BadData, match=f"{message}(.|\n)*") as error:
        datasets.from_folder(root)
    assert "Fix: " in str(error.value)


ROW = "file,label\na.png,flu\n"
ODD_CSVS = {
    "latin-1": ((ROW + "b.png,Müller\n").encode("latin-1"), "line 3 is not UTF-8"),
    "utf-16": (ROW.encode("utf-16"), "UTF-16, or no text at all"),
    "binary": (b"file\0label\n", "UTF-16, or no text at all"),
    "empty": (b"", "is empty"),
    "blank": (b"\n \n,\n", "is empty"),
    "header only": (b"file,label\n\n", "has 0 rows"),
    "open quote": ((ROW + '\n"b.png,flu\nc.png,flu\n').encode(), "line 4: unexpected end of data"),
    "quote of two rows": ((ROW + 'b.png,"flu\nc.png,"no\n').encode(), "line 3: ',' expected after"),
    "long row": ((ROW + "b.png,flu,x\n").encode(), "line 3: 3 cells, but the header has 2"),
    "short row": ((ROW + "\nb.png\n").encode(), "line 4: 1 cells, but the header has 2"),
    "a name twice": (b"file,label,label\na,b,c\n", "two columns label: keep one"),
    "long cell": ((ROW + "b.png," + "x" * 5_000_000).encode(), "line 3: field larger than"),
    "no column": (f"file,{'x' * 99_999}\na,b\n".encode(), "has no column label; it has file, xxx"),
}


@pytest.mark.parametrize("content, message", ODD_CSVS.values(), ids=ODD_CSVS)
def test_a_csv_that_cannot_be_read_is_named_with_line_and_fix(root, content, message):
    (root / "l.csv").write_bytes(content)
    with pytest.raises(BadData, match=f"l.csv (cannot be read|{message[:13]})") as error:
        tables.read_csv(root / "l.csv", ["label"])
    told = str(error.value)
    assert re.search(message, told) and "Fix: " in told and len(told) < 3 * tables.LONGEST


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", ",;\t")
def test_a_csv_with_another_ending_or_separator_or_blank_rows_is_read(root, ending, separator):
    lines = ["\ufefffile,label", "a.png,01", "", " ,", "b.png,,,"]
    content = ending.join(lines).replace(",", separator).encode()
    (root / "l.csv").write_bytes(content)
    table = tables.read_csv(root / "l.csv", text=True)
    assert table["file"].to_dict() == {2: "a.png", 5: "b.png"}
    assert table["label"].tolist() == ["01", ""]
    assert tables.read_csv(root / "l.csv")["label"].to_dict()[2] == 1


def test_what_is_no_csv_file_at_all(root):
    with pytest.raises(BadData, match="mine cannot be read .Is a directory.: name a CSV"):
        tables.read_csv(root)
    with pytest.raises(DataNotFound, match="x.csv is not there"):
        tables.read_csv(root / "x.csv")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    phantom.write_nih(folder / "nih", images=4, size=24)
    phantom.write_competition(folder / "dlia", images={"train": 8, "test": 4}, size=24)
    phantom.write_fracatlas(folder / "fracatlas", images=(6, 2), size=24)
    draw(folder / "labels", CLASSES)
    draw(folder / "boxes", ["1.png"])
    return folder


DOORS = [("nih", readers.NIH_BOXES), ("dlia", readers.DLIA_TRAIN), ("dlia", readers.DLIA_MAPPING)]
DOORS += [("fracatlas", readers.FRAC_TABLE), ("fracatlas", readers.FRAC_SPLITS["train"])]


@pytest.mark.parametrize("name, file", [*DOORS, ("labels", "l.csv"), ("boxes", "b.csv")])
def test_every_csv_of_a_reader_goes_through_the_same_door(published, name, file):
    if name == "boxes":
        path, read = published / name / file, lambda: datasets.from_boxes(path, path.parent)
    elif name == "labels":
        path, read = published / name / file, lambda: datasets.from_folder(path.parent)
    else:
        location = sources.find(name, published / name)
        path, read = location.root / file, lambda: datasets.load(location)
    own = b"file,label\n" if name == "labels" else b"file,label,x1,y1,x2,y2\n"
    before = path.read_bytes() if path.exists() else own
    path.write_bytes(before.decode().encode("utf-16"))
    with pytest.raises(BadData, match=f"{re.escape(str(path))} cannot be read .UTF-16"):
        read()
    path.write_bytes(before)


def test_wrong_options_and_folders_are_refused(root, monkeypatch):
    draw(root, CLASSES)
    for options, message in (
        ({"patient_pattern": "flu"}, r"'flu': it needs \(a group\)"),
        ({"patient_pattern": "(flu"}, r"patient_pattern = '\(flu' is no regular expression"),
        ({"patient_pattern": "(flu)"}, r"normal/1.png has no patient by patient_pattern"),
        ({"classes": ["flu", "cold"]}, "must name each class once: flu, normal"),
    ):
        with pytest.raises(ValueError, match=message):
            datasets.from_folder(root, **options)
    with pytest.raises(DataNotFound, match="nowhere is not a folder; name the folder"):
        datasets.from_folder(root / "nowhere")
    for name in "ab":
        (root / f"{name}.csv").write_text("file,label\nflu/1.png,flu\n")
    with pytest.raises(BadData, match="a.csv and .*b.csv both have a column file. Fix: keep one"):
        datasets.from_folder(root)
    scandir = os.scandir

    def shut(path):
        if os.fspath(path).endswith("flu"):  # as root may open any folder, the system says no here
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", shut)
    with pytest.raises(BadData, match=r"mine/flu cannot be read \(Permission denied\). Fix: its a"):
        datasets.from_folder(root)


# --- boxes

BOXES = "file,label,x1,y1,x2,y2\n"


def coco_of(text):
    """The same boxes as COCO, with another order of the categories."""
    table = pd.read_csv(pd.io.common.StringIO(text), dtype={"patient": str})
    kinds = sorted(set(table["label"].dropna()), reverse=True)
    images = table.drop_duplicates("file").reset_index(drop=True)
    ids = {name: number for number, name in enumerate(images["file"], 7)}
    more = [name for name in ("patient", "split") if name in table]
    listed = [
        dict(id=ids[row.file], file_name=row.file, width=24, height=16)
        | {name: getattr(row, name) for name in more}
        for row in images.itertuples()
    ]
    boxes = [
        dict(id=n, image_id=ids[r.file], category_id=kinds.index(r.label))
        | dict(bbox=[r.x1, r.y1, r.x2 - r.x1, r.y2 - r.y1])
        for n, r in enumerate(table.dropna(subset="label").itertuples())
    ]
    kinds = [{"id": number, "name": name} for number, name in enumerate(kinds)]
    return {"images": listed, "annotations": boxes, "categories": kinds}


@pytest.mark.parametrize("more", ["", ",patient,split"])
def test_boxes_from_csv_and_coco_are_the_same(root, more):
    draw(root, [*FLAT, "unlisted.png"])
    rows = ["a.png,Mass,1,2,9.5,8", "b.png,Nodule,0,0,24,16", "a.png,Nodule,3,3,5,6"]
    rows += ["c.png,Mass,1,1,2,2", "d.png,,,,,"]
    splits = {"a": ",01,train", "b": ",2,val", "c": ",3,test", "d": ",4,train"}
    rows = [row + (splits[row[0]] if more else "") for row in rows]
    text = "\n".join([BOXES.strip() + more, *rows])
    (root / "boxes.csv").write_text(text.replace("x1,y1,x2,y2", "xmin,ymin,xmax,ymax"))
    (root.parent / "coco.json").write_text(json.dumps(coco_of(text)))
    files = root / "boxes.csv", root.parent / "coco.json"
    one, other = (datasets.from_boxes(file, root) for file in files)
    pd.testing.assert_frame_equal(one.boxes, other.boxes)
    pd.testing.assert_frame_equal(one.manifest, other.manifest)
    assert one.box_classes == other.box_classes == one.classes == ("Mass", "Nodule")
    assert one.boxes.values.tolist()[0] == [0, 1.0, 2.0, 9.5, 8.0, 1, "Mass"]
    assert list(one.boxes.columns) == list(BOX_COLUMNS) and one.name == "mine"
    assert list(one.manifest["class_name"]) == ["Mass", "Nodule", "Mass", "unlabelled"]
    assert list(one.manifest["label"]) == [0, 1, 0, -1] and len(datasets.boxed(one).manifest) == 3
    given = ["train", "val", "test", "train"] if more else ["train"] * 4
    assert list(one.manifest["split"]) == given
    assert one.ignored.values.tolist() == [["unlisted.png", "not in boxes.csv"]]
    assert not more or list(one.manifest["patient"]) == ["01", "2", "3", "4"]
    found = sources.find_own(root, kind="boxes")
    assert found.dataset == "mine" and found.options == {"annotations": root / "boxes.csv"}
    pd.testing.assert_frame_equal(datasets.load(found).boxes, one.boxes)


TWO_PATIENTS = BOXES.strip() + ",patient\na.png,M,1,1,3,9,p\na.png,M,1,2,3,9,q"
BAD_BOXES = {
    "columns": ("file,label,x,y,w,h\na.png,M,1,1,2,2", "no column x1, y1, x2, y2; it has file, "),
    "missing": (BOXES + "z.png,M,1,1,2,2", "line 2: z.png is not there"),
    "width": (BOXES + "a.png,M,9,9,4,4", r"line 2: a.png M .*are these x, y, width, height\?"),
    "outside": (BOXES + "a.png,M,1,1,30,9", "line 2: a.png M .*reaches out of its image"),
    "shares": (BOXES + "a.png,M,0.1,0.1,0.3,0.9", "are these shares"),
    "no label": (BOXES + "a.png,M,1,1,3,9\nb.png,,1,1,3,9", "line 3: b.png .*unknown label"),
    "no box": (BOXES + "a.png,,,,,", "holds no box"),
    "patients": (TWO_PATIENTS, "line 2: a.png has more than one patient"),
}
BAD_COCO = {
    "two ids": ("images", {"id": 1, "file_name": "./a.png"}, "image 7: a.png has more than one id"),
    "one id": ("images", {"id": 7, "file_name": "b.png"}, "image 7 is given more than once"),
    "unknown": ("annotations", {"image_id": 99}, "annotation 1: image_id and category_id must be"),
}


@pytest.mark.parametrize("text, message", BAD_BOXES.values(), ids=BAD_BOXES)
def test_bad_box_rows_are_refused(root, text, message):
    draw(root, FLAT)
    (root / "boxes.csv").write_text(text)
    with pytest.raises(BadData, match=message):
        datasets.from_boxes(root / "boxes.csv", root)


@pytest.mark.parametrize("part, one, message", BAD_COCO.values(), ids=BAD_COCO)
def test_bad_coco_is_refused(root, part, one, message):
    draw(root, FLAT)
    coco = coco_of(BOXES + "a.png,M,1,1,3,9\n")
    coco[part].append(one)
    (root / "coco.json").write_text(json.dumps(coco))
    with pytest.raises(BadData, match=message):
        datasets.from_boxes(root / "coco.json", root)


@pytest.mark.parametrize("patient, message", [("7", "7 and '7', which may be"), (None, "no pat")])
def test_patients_of_coco_never_merge(root, patient, message):
    draw(root, FLAT)
    coco = coco_of(BOXES + "a.png,M,1,1,3,9\nb.png,M,1,1,3,9\nc.png,M,1,1,3,9\n")
    for image, given in zip(coco["images"], (7, patient, patient), strict=True):
        image["patient"] = given
    (root / "coco.json").write_text(json.dumps(coco))
    with pytest.raises(BadData, match=message):
        datasets.from_boxes(root / "coco.json", root)


def test_files_of_boxes_that_are_none(root):
    draw(root, FLAT)
    coco = coco_of(BOXES + "a.png,M,1,1,3,9\n")
    coco["images"][0].update(width=48, height=32)
    (root / "size.json").write_text(json.dumps(coco))
    with pytest.raises(BadData, match="a.png is 24 x 16 px, but was annotated as 48 x 32"):
        datasets.from_boxes(root / "size.json", root)
    with pytest.raises(DataNotFound, match="b.csv is not there; name the CSV or COCO"):
        datasets.from_boxes(root / "b.csv", root)
    (root / "b.json").write_text("{")
    with pytest.raises(BadData, match="b.json is not COCO .*Fix: export"):
        datasets.from_boxes(root / "b.json", root)


# --- finding


def test_find_own_takes_what_looks_like_it_and_leaves_the_errors_to_load(root, monkeypatch):
    for folder in (None, root / "nowhere", root):
        assert sources.find_own(folder) is None
    draw(root, [*CLASSES, "cold/x.dcm"])
    location = sources.find_own(root, options={"patient_pattern": "(.)"})
    assert (location.dataset, location.root, location.origin) == ("mine", root, "argument")
    assert location.kind == "folder" and hash(location) and not location.synthetic
    with pytest.raises(BadData, match="cold"):
        datasets.load(location)
    monkeypatch.chdir(root)
    assert sources.find_own(".").root == root


@pytest.mark.parametrize("name", ["pneumonia", "nih", "breastmnist"])
def test_find_own_is_not_fooled_by_published_sets(tmp_path, monkeypatch, name):
    monkeypatch.delenv("DLIA_DATA", raising=False)  # with it no phantom would be written
    monkeypatch.setenv("DLIA_CACHE", str(tmp_path))
    tree = sources.find(name).root
    draw(tree, CLASSES)
    for folder in (tree, tree.parent):
        assert [sources.find_own(folder, kind=kind) for kind in ("folder", "boxes")] == [None, None]


# --- data check


def test_data_check_draws_a_split_and_names_near_duplicates(root, capsys, caplog):
    draw(root, [f"{name}/{n}.png" for name in ("flu", "normal") for n in range(12)], size=(64, 64))
    image = Image.open(root / "flu/0.png")
    image.point(lambda value: value * 0.8).save(root / "flu/copy.png")
    status = cli.main(["data", "check", str(root)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "mine: " in printed and "real images" in printed and "split drawn by patient" in printed
    assert "near-duplicates: 1 groups" in printed and "flu/0.png = flu/copy.png" in printed
    assert "near-duplicates in train and test" in printed and "no patients are known" in caplog.text
    (root / "flu/0.png").write_bytes(b"")
    assert cli.main(["data", "check", str(root)]) == 1
    assert "flu/0.png: empty file" in capsys.readouterr().out


def test_data_check_reads_patients_of_class_folders_by_the_pattern(root, capsys, caplog):
    draw(root, [f"{c}/p{n}_{k}.png" for c in ("flu", "no") for n in range(12) for k in (1, 2)])
    told = cli.main(["data", "check", str(root), "--patient-pattern", r"/(p\d+)_"])
    printed = capsys.readouterr().out
    assert told == 0, printed
    assert "no patients are known" not in caplog.text


def test_data_check_fails_on_a_leak_in_a_given_split(root, capsys, monkeypatch):
    draw(root, SPLIT)
    rows = [f"{one},{one.split('/')[1]}" for one in SPLIT]
    (root / "labels.csv").write_text("\n".join(["file,patient", *rows]))
    monkeypatch.chdir(root.parent)
    assert cli.main(["data", "check", "mine"]) == 1
    printed = capsys.readouterr().out
    assert "split that is given by the folders" in printed
    assert "by number      2    leak flu, normal" in printed


def test_data_check_of_boxes_and_of_bad_folders(root, tmp_path, capsys):
    draw(root, [f"images/{n}.png" for n in range(12)], size=(64, 64))
    (root / "boxes.csv").write_text(BOXES + "".join(f"{n}.png,M,1,1,9,9\n" for n in range(12)))
    assert cli.main(["data", "check", str(root)]) == 0
    assert "side_median" in capsys.readouterr().out
    phantom.write_pneumonia(tmp_path / "p", images={"train": (2, 2), "test": (2, 2)}, size=24)
    published = "holds the published pneumonia: python -m dlia_utils data check pneumonia --data"
    for path, options, message in (
        (tmp_path / "p", [], published),
        (root / "images", [], "no class folder, but 12 images"),
        (root / "nowhere", [], "is not a folder"),
        (root, ["--data", "x"], "leave --data out"),
    ):
        assert cli.main(["data", "check", os.fspath(path), *options]) == 2
        assert message in capsys.readouterr().err
