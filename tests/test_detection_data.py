"""The detection sets: NIH boxes, both editions of the competition, FracAtlas, and what is refused."""

import base64
import io
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dlia_utils.data import _fracatlas, cache, datasets, phantom, readers, sources, split

HEADER = "Image Index,Finding Label,Bbox [x,y,w,h]"
COUNTS = {"train": 24, "test": 8}


@pytest.fixture(scope="module")
def competition(tmp_path_factory):
    return phantom.write_competition(tmp_path_factory.mktemp("competition"), images=COUNTS, size=48)


@pytest.fixture(scope="module")
def nih_tree(tmp_path_factory):
    return phantom.write_nih(tmp_path_factory.mktemp("nih"), images=30, size=48)


@pytest.fixture(scope="module")
def fracatlas_tree(tmp_path_factory):
    return phantom.write_fracatlas(tmp_path_factory.mktemp("frac"), images=(12, 4), size=64)


@pytest.fixture
def small(tmp_path):
    """A hand-made NIH copy: one image of 100 x 80 pixels and one of 60 x 60."""
    (tmp_path / "images").mkdir()
    Image.new("L", (100, 80), 7).save(tmp_path / "images" / "00000001_000.png")
    Image.new("L", (60, 60), 9).save(tmp_path / "images" / "00000002_003.png")
    write_list(
        tmp_path, "00000001_000.png,Mass,10,20,30,40", "00000002_003.png,Infiltration,0,0,60,60"
    )
    return tmp_path


def write_list(root, *rows, header=HEADER):
    (root / "BBox_List_2017.csv").write_text("\n".join([header, *rows]) + "\n")


def write_dummies(folder, names, side=1024):
    """Images that are all black but not byte-identical: the name follows the end of the PNG."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(buffer.getvalue() + name.encode())


def load(name, root, **options):
    return datasets.load(sources.find(name, root), **options)


def assert_box_table(dataset):
    boxes = dataset.boxes
    assert list(boxes.columns) == list(datasets.BOX_COLUMNS)
    assert boxes["image"].dtype == boxes["label"].dtype == "int64"
    assert (boxes[readers.CORNERS].dtypes == "float64").all()
    assert boxes["image"].between(0, len(dataset.manifest) - 1).all()
    assert [dataset.box_classes[label - 1] for label in boxes["label"]] == list(boxes["class_name"])
    assert (boxes["x1"] < boxes["x2"]).all() and (boxes["y1"] < boxes["y2"]).all()


def test_empty_boxes_have_the_types_of_full_ones(small):
    full = load("nih", small).boxes
    assert list(datasets.no_boxes().dtypes) == list(full.dtypes)


# --- NIH


def test_nih_phantom_tree(nih_tree):
    dataset = load("nih", nih_tree)
    assert_box_table(dataset)
    assert (
        len(dataset.manifest) == 30
        and dataset.synthetic
        and set(dataset.manifest["split"]) == {"train"}
    )
    assert dataset.classes == dataset.box_classes == datasets.NIH_CLASSES
    assert len(dataset.boxes) == 40 and not dataset.boxes.duplicated(["image", "label"]).any()
    assert (
        dataset.manifest["patient"] == dataset.manifest["path"].map(lambda p: Path(p).name[:8])
    ).all()
    assert list(dataset.ignored["reason"]).count("has no box") == 1
    modes = {Image.open(nih_tree / path).mode for path in dataset.manifest["path"]}
    assert modes == {"L", "RGBA"}
    assert cache.build(dataset, size=16, progress=False).images.shape == (30, 16, 16)


def test_nih_by_hand(small):
    dataset = load("nih", small)
    assert dataset.boxes.values.tolist() == [
        [0, 10, 20, 40, 60, 5, "Mass"],
        [1, 0, 0, 60, 60, 4, "Infiltrate"],
    ]
    assert list(dataset.manifest["class_name"]) == ["Mass", "Infiltrate"]
    assert list(dataset.manifest["label"]) == [4, 3]


@pytest.mark.parametrize("header", [HEADER, HEADER + ",,,"])
@pytest.mark.parametrize("ending", ["", ",,,"])
def test_nih_trailing_empty_columns(small, header, ending):
    write_list(small, f"00000001_000.png,Mass,10,20,30,40{ending}", header=header)
    assert load("nih", small).boxes.values.tolist() == [[0, 10, 20, 40, 60, 5, "Mass"]]


@pytest.mark.parametrize("folder", ["", "images_001/images", "images_012/images", "images"])
def test_nih_image_folders(small, folder):
    path = small / "images" / "00000001_000.png"
    (small / folder).mkdir(parents=True, exist_ok=True)
    path.rename(small / folder / path.name)
    assert load("nih", small).manifest["path"][0] == (Path(folder) / path.name).as_posix()


def test_nih_class_of_an_image_is_its_rarest(small):
    write_list(
        small,
        "00000001_000.png,Mass,10,20,30,40",
        "00000002_003.png,Mass,10,20,30,30",
        "00000002_003.png,Nodule,1,2,3,4",
    )
    dataset = load("nih", small)
    assert list(dataset.manifest["class_name"]) == ["Mass", "Nodule"]


def test_missing_images_are_an_error_or_left_out(small, caplog):
    write_list(
        small,
        "00000001_000.png,Mass,10,20,30,40",
        "00000007_000.png,Mass,10,20,30,40",
        "00000007_000.png,Nodule,10,20,30,40",
    )
    location = sources.find("nih", small)
    with pytest.raises(
        datasets.BadData, match="1 of the 2 boxed .* first: 00000007_000.png; fix: .*allow_missing"
    ):
        datasets.load(location)
    dataset = datasets.load(location, allow_missing=True)
    assert len(dataset.manifest) == 1 and len(dataset.boxes) == 1
    assert "the other 1 are used" in caplog.text
    with pytest.raises(ValueError, match="nih has no option allow_leak"):
        datasets.load(location, allow_leak=True)


@pytest.mark.parametrize(
    "row, problem",
    [
        ("00000001_000.png,Fracture,10,20,30,40", "line 3: .*unknown label .*Pneumothorax"),
        ("00000001_000.png,mass,10,20,30,40", "line 3: .*unknown label"),
        ("00000001_000.png,,10,20,30,40", "line 3: .*unknown label"),
        ("00000001_000.png,Mass,,20,30,40", "line 3: .*not a number"),
        ("00000001_000.png,Mass,ten,20,30,40", "line 3: .*not a number"),
        ("00000001_000.png,Mass,10,20,0,40", "line 3: .*no width"),
        ("00000001_000.png,Mass,10,20,30,-4", "line 3: .*no width or no height"),
        ("00000001_000.png,Mass,-3,20,30,40", "line 3: .*negative"),
        ("00000001_000.png,Mass,10,20,92,40", "line 3: .*reaches out of its image"),
        ("00000001_000.png,Mass,10,20,30,61.5", "line 3: .*reaches out of its image"),
        ("00000002_003.png,Mass,0,0,60,60", "line 3: .*the same box stands above"),
        (",Mass,10,20,30,40", "line 3: .*names no image"),
    ],
)
def test_unusable_rows_are_named(small, row, problem):
    write_list(small, "00000002_003.png,Mass,0,0,60,60", row)
    location = sources.Location("nih", small, "argument", False)
    with pytest.raises(
        datasets.BadData, match=rf"BBox_List_2017.csv: 1 unusable rows(.|\n)*{problem}(.|\n)*Fix:"
    ):
        datasets.load(location, allow_missing=True)


def test_a_box_a_little_outside_is_clipped(small):
    write_list(small, "00000001_000.png,Mass,-0.5,20,101,60.9")
    boxes = load("nih", small).boxes
    assert boxes[readers.CORNERS].values.tolist() == [[0, 20, 100, 80]]


def test_wrong_header_is_named(small):
    write_list(small, "00000001_000.png,Mass,1,2,3,4", header="name,label,x,y,w,h")
    with pytest.raises(datasets.BadData, match="no column Image Index, .*it has name, label"):
        load("nih", small)


# --- the competition


@pytest.mark.parametrize("edition, key, first", [("a", "id", 1), ("b", "ID", 0)])
def test_both_editions(competition, edition, key, first):
    dataset = load("dlia", competition / f"competition_edition_{edition}")
    assert_box_table(dataset)
    manifest = dataset.manifest
    assert (
        list(dataset.mapping.columns) == [key, "image_id"] and dataset.mapping[key].min() == first
    )
    test = manifest[manifest["split"] == "test"]
    assert (
        len(test) == 8 and (test["label"] == -1).all() and set(test["class_name"]) == {"unlabelled"}
    )
    assert {Path(path).name for path in test["path"]} == set(dataset.mapping["image_id"])
    assert (manifest.loc[manifest["split"] == "train", "label"] >= 0).all()
    assert set(dataset.boxes["image"]) == set(manifest.index[manifest["split"] == "train"])
    assert dataset.split_rule == f"the competition's, edition {edition.upper()}"


def test_leaked_images_are_refused(competition, caplog):
    tree = competition / "competition_edition_a"
    dataset = load("dlia", tree)
    train = set(pd.read_csv(tree / "train.csv")["Image Index"])
    leaked = train & set(dataset.mapping["image_id"])
    kept = {Path(p).name for p in dataset.manifest.query("split == 'train'")["path"]}
    assert len(leaked) == phantom.LEAKED and kept == train - leaked and len(kept) == 20
    refused = dataset.ignored[dataset.ignored["reason"].str.contains("leak")]
    assert {Path(path).name for path in refused["path"]} == leaked
    assert "4 training images with 4 boxes are refused" in caplog.text
    everything = load("dlia", tree, allow_leak=True)
    assert (
        len(everything.manifest) == len(dataset.manifest) + 4 and "leaked" in everything.split_rule
    )
    audit = split.audit(everything).set_index("check")
    assert audit.loc["identical files in train and test", "count"] == 4
    assert (
        audit.loc["identical files with different labels", "count"] == 0
    )  # Test images have no label.


def test_truth_explains_the_ids(competition):
    truth = pd.read_csv(competition / "phantom_truth.csv")
    for edition, part in truth.groupby("edition"):
        dataset = load("dlia", competition / f"competition_edition_{edition.lower()}")
        assert sorted(part["image_id"]) == sorted(
            dataset.mapping["image_id"]
        )  # An id is one hidden box.
    repeated = truth[truth["edition"] == "A"]["image_id"].value_counts()
    assert (repeated == 2).sum() == phantom.TWO_IDS and repeated.max() == 2
    assert truth[truth["edition"] == "B"]["image_id"].is_unique


def test_editions_share_training_images_only(competition):
    a, b = (load("dlia", competition / f"competition_edition_{e}", allow_leak=True) for e in "ab")
    names = {
        (one, part): {
            Path(p).name for p in dataset.manifest.loc[dataset.manifest["split"] == part, "path"]
        }
        for one, dataset in (("a", a), ("b", b))
        for part in ("train", "test")
    }
    assert names["a", "train"] == names["b", "train"] and len(names["b", "train"]) == 24
    assert not names["b", "test"] & (names["b", "train"] | names["a", "test"])
    assert len(names["a", "test"] & names["a", "train"]) == phantom.LEAKED


@pytest.mark.parametrize("folder", ["train", "train_images"])
def test_competition_folders_and_missing_images(competition, tmp_path, folder):
    tree = Path(shutil.copytree(competition / "competition_edition_b", tmp_path / "b"))
    (tree / "train").rename(tree / folder)
    assert len(load("dlia", tmp_path).manifest) == 32
    name = load("dlia", tmp_path).mapping["image_id"][0]
    (tree / "test" / name).unlink()
    with pytest.raises(
        datasets.BadData, match=f"1 of the 32 listed images are missing, first: {name}"
    ):
        load("dlia", tmp_path)
    assert len(load("dlia", tmp_path, allow_missing=True).manifest) == 31


def test_competition_columns_are_checked(competition, tmp_path):
    tree = Path(shutil.copytree(competition / "competition_edition_b", tmp_path / "b"))
    mapping = pd.read_csv(tree / "ID_to_Image_Mapping.csv")
    mapping.assign(ID=[0, 0, *range(2, 8)]).to_csv(tree / "ID_to_Image_Mapping.csv", index=False)
    with pytest.raises(datasets.BadData, match="repeated ID in line 3"):
        load("dlia", tree)
    mapping.rename(columns={"ID": "number"}).to_csv(tree / "ID_to_Image_Mapping.csv", index=False)
    with pytest.raises(datasets.BadData, match="no column id or ID; it has number"):
        load("dlia", tree)
    mapping.to_csv(tree / "ID_to_Image_Mapping.csv", index=False)
    train = pd.read_csv(tree / "train.csv").rename(columns={"x_min": "left"})
    train.to_csv(tree / "train.csv", index=False)
    with pytest.raises(datasets.BadData, match="neither edition: no column x_min"):
        load("dlia", tree)


# --- FracAtlas


def test_fracatlas_phantom(fracatlas_tree, caplog):
    dataset = load("fracatlas", fracatlas_tree)
    assert_box_table(dataset)
    manifest = dataset.manifest
    assert dataset.classes == ("Non_fractured", "Fractured") and dataset.box_classes == (
        "fracture",
    )
    assert list(manifest["split"].value_counts()[["train", "val", "test", ""]]) == [10, 1, 1, 4]
    assert (manifest["label"] == manifest["path"].str.contains("/Fractured/")).all()
    assert (
        "IMG0000002.jpg: dataset.csv says fractured=0, its folder is Fractured, and it has a box"
        in caplog.text
    )
    assert caplog.text.count("dataset.csv says") == 1
    assert list(datasets.summary(dataset)["split"]) == ["train", "val", "test", ""]


def test_fracatlas_image_on_its_side_and_cut_short(fracatlas_tree):
    dataset = datasets.boxed(load("fracatlas", fracatlas_tree))
    cached = cache.build(dataset, size=64, fit="pad", progress=False)
    assert cached.truncated == ("images/Fractured/IMG0000003.jpg",)
    with Image.open(fracatlas_tree / dataset.manifest["path"][1]) as image:
        assert (
            (image.width, image.height) == tuple(cached.shapes[1]) != image.size[::-1]
        )  # Stored turned.
    # The gap is darker than the bone around it, upright images and the turned one alike.
    for row in dataset.boxes.itertuples():
        film = np.asarray(cached.images[row.image], dtype=float)
        sx, sy = cached.scale([row.image])[0]
        x1, x2, y1, y2 = (
            int(row.x1 * sx),
            int(row.x2 * sx) + 1,
            int(row.y1 * sy),
            int(row.y2 * sy) + 1,
        )
        inside, bright = film[y1:y2, x1:x2], np.percentile(film, 95)
        assert inside.max() > 0.75 * bright and np.percentile(inside, 20) < 0.75 * bright


def test_fracatlas_refuses_resized_images(fracatlas_tree, tmp_path):
    tree = Path(shutil.copytree(fracatlas_tree, tmp_path / "FracAtlas"))
    path = tree / "images" / "Fractured" / "IMG0000005.jpg"
    Image.open(path).resize((32, 32)).save(path)
    with pytest.raises(datasets.BadData, match="IMG0000005.jpg: .* in the file, 32 x 32 on disk"):
        load("fracatlas", tree)


def test_fracatlas_unknown_category_and_double_split(fracatlas_tree, tmp_path):
    tree = Path(shutil.copytree(fracatlas_tree, tmp_path / "FracAtlas"))
    path = tree / _fracatlas.BOXES
    coco = json.loads(path.read_text())
    coco["annotations"][3]["category_id"] = 7
    path.write_text(json.dumps(coco))
    with pytest.raises(datasets.BadData, match="annotation 3: IMG0000003.jpg 7 .*unknown label"):
        load("fracatlas", tree)
    (tree / _fracatlas.SPLITS["test"]).write_text("image_id\nIMG0000000.jpg\n")
    with pytest.raises(datasets.BadData, match="IMG0000000.jpg is in another split already"):
        load("fracatlas", tree)
    (tree / _fracatlas.SPLITS["test"]).unlink()
    with pytest.raises(sources.DataNotFound, match="Fracture Split/test.csv"):
        load("fracatlas", tree)


def outlines_by_image(dataset):
    """Paths' file names with their outlines, each as a sorted list of points."""
    names = dataset.manifest["path"].map(lambda path: Path(path).name)
    found = {}
    for row in dataset.outlines.itertuples():
        found.setdefault(names[row.image], []).append(sorted(row.points.tolist()))
    return {name: sorted(shapes) for name, shapes in found.items()}


def need_outlines_in_boxes(dataset, *, slack=0.0):
    """Every outline lies in a box of its image and reaches that box's sides: it is drawn on the same pixels."""
    assert list(dataset.outlines.columns) == ["image", "label", "points"]
    assert dataset.outlines["image"].dtype == dataset.outlines["label"].dtype == "int64"
    assert (
        set(dataset.outlines["label"]) == {1} and dataset.outlines["image"].is_monotonic_increasing
    )
    corners = {
        image: part[readers.CORNERS].to_numpy() for image, part in dataset.boxes.groupby("image")
    }
    for row in dataset.outlines.itertuples():
        assert row.points.dtype == "float64" and row.points.shape[1] == 2
        span = np.concatenate([row.points.min(0), row.points.max(0)])
        assert np.abs(corners[row.image] - span).max(axis=1).min() <= slack


def area(points):
    x, y = points.T
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def test_fracatlas_outlines(fracatlas_tree):
    dataset = load("fracatlas", fracatlas_tree)
    need_outlines_in_boxes(dataset)
    assert (
        list(dataset.outlines["image"]) == list(dataset.boxes["image"])
        and len(dataset.outlines) == 12
    )
    boxes = dataset.boxes[["x2", "y2"]].to_numpy() - dataset.boxes[["x1", "y1"]].to_numpy()
    shares = [area(points) for points in dataset.outlines["points"]] / boxes.prod(axis=1)
    assert (shares > 0.3).all() and (shares < 1).all()  # Tilted: not the box once more.
    part = datasets.take(dataset, [7, 0])
    assert list(part.outlines["image"]) == [0, 1]
    expected = [
        dataset.outlines["points"][dataset.outlines["image"] == row].iloc[0] for row in (7, 0)
    ]
    assert all(
        np.array_equal(*pair) for pair in zip(part.outlines["points"], expected, strict=True)
    )


@pytest.mark.parametrize(
    "points, problem",
    [
        ([1, 1, 5, 5], "no polygon of three or more points"),
        ([1, 1, 5, 5, 7], "no polygon of three or more points"),
        ([1, 1, 5, 5, float("nan"), 2], "no polygon of three or more points"),
        ([1, 1, 500, 5, 7, 2], "the outline reaches out of its image"),
        ([-3, 1, 5, 5, 7, 2], "the outline reaches out of its image"),
    ],
)
def test_fracatlas_refuses_bad_outlines(fracatlas_tree, tmp_path, points, problem):
    tree = Path(shutil.copytree(fracatlas_tree, tmp_path / "FracAtlas"))
    coco = json.loads((tree / _fracatlas.BOXES).read_text())
    coco["annotations"][3]["segmentation"].append(points)
    (tree / _fracatlas.BOXES).write_text(json.dumps(coco))
    with pytest.raises(
        datasets.BadData,
        match=f"1 unusable outlines:\n  annotation 3: IMG0000003.jpg: {problem}\nFix",
    ):
        load("fracatlas", tree)


def test_fracatlas_outlines_may_be_absent_coded_or_a_little_outside(
    fracatlas_tree, tmp_path, caplog
):
    tree = Path(shutil.copytree(fracatlas_tree, tmp_path / "FracAtlas"))
    coco = json.loads((tree / _fracatlas.BOXES).read_text())
    first, second, third, *rest = coco["annotations"]
    for one in rest:
        del one["segmentation"]
    first["segmentation"] = {"counts": [3, 2], "size": [64, 64]}
    second["segmentation"], third["segmentation"] = [[-0.5, 3, 9, 3, 9, 12]], []
    (tree / _fracatlas.BOXES).write_text(json.dumps(coco))
    dataset = load("fracatlas", tree)
    assert (
        "1 outlines are run-length coded and not read" in caplog.text and len(dataset.boxes) == 12
    )
    assert [one.tolist() for one in dataset.outlines["points"]] == [[[0, 3], [9, 3], [9, 12]]]


def test_trace_gives_the_edges_of_the_pixels():
    mask = np.zeros((9, 12), bool)
    mask[2, 3] = True
    mask[4:9, 6:12] = True
    mask[6, 8] = False  # A hole is filled.
    small, large = sorted(readers.trace(mask), key=area)
    assert sorted(small.tolist()) == [[3, 2], [3, 3], [4, 2], [4, 3]]
    assert (large.min(0).tolist(), large.max(0).tolist(), area(large)) == ([6, 4], [12, 9], 30)
    assert readers.trace(np.zeros((4, 4), bool)) == []


# --- FracAtlas as DatasetNinja publishes it


@pytest.fixture(scope="module")
def ninja_tree(tmp_path_factory):
    return phantom.write_fracatlas(
        tmp_path_factory.mktemp("ninja"), images=(12, 4), size=64, layout="ninja"
    )


@pytest.fixture
def ninja(ninja_tree, tmp_path):
    """A copy that the test may spoil."""
    return Path(shutil.copytree(ninja_tree, tmp_path / "FracAtlas"))


def rewrite(path, change):
    """Apply `change` to an annotation file."""
    note = json.loads(path.read_text())
    change(note)
    path.write_text(json.dumps(note))


def test_both_layouts_of_fracatlas_say_the_same(fracatlas_tree, ninja_tree, caplog):
    original = load("fracatlas", fracatlas_tree)
    caplog.clear()
    dataset = load("fracatlas", ninja_tree)
    assert_box_table(dataset)
    assert not caplog.text and (ninja_tree / "train" / "ann" / "IMG0000000.jpg.json").is_file()
    same = ["label", "class_name", "patient", "split"]
    assert dataset.manifest[same].equals(original.manifest[same]) and set(
        dataset.manifest["group"]
    ) == {""}
    assert dataset.boxes.equals(original.boxes) and dataset.box_classes == ("fracture",)
    need_outlines_in_boxes(dataset)
    assert outlines_by_image(dataset) == outlines_by_image(original) and len(dataset.outlines) == 12
    kinds = [json.loads(p.read_text())["objects"] for p in ninja_tree.glob("*/ann/*.json")]
    assert {one["geometryType"] for objects in kinds for one in objects} == {
        "rectangle",
        "polygon",
        "bitmap",
    }
    assert dict(dataset.ignored.values) == {
        "README.md": "outside the image folders",
        "meta.json": "outside the image folders",
    }
    cached = cache.build(dataset, size=32, fit="pad", progress=False)
    assert cached.truncated == ("train/img/IMG0000003.jpg",)


def test_ninja_bitmap_by_grey_values(ninja):
    path = next(ninja.glob("*/ann/IMG0000001.jpg.json"))
    mask = np.zeros((3, 4), np.uint8)
    mask[1, 1:3] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    data = base64.b64encode(zlib.compress(buffer.getvalue())).decode()

    def change(note):
        note["objects"][1]["bitmap"] = {"data": data, "origin": [20, 10]}

    rewrite(path, change)
    assert outlines_by_image(load("fracatlas", ninja))["IMG0000001.jpg"] == [
        [[21, 11], [21, 12], [23, 11], [23, 12]]
    ]


def test_ninja_images_and_annotations_must_match(ninja):
    (ninja / "train" / "img" / "IMG0000002.jpg").unlink()
    (ninja / "not fractured" / "ann" / "IMG0000012.jpg.json").unlink()
    with pytest.raises(datasets.BadData) as error:
        load("fracatlas", ninja)
    text = str(error.value)
    assert (
        "2 images and annotations do not match" in text
        and "Fix: unpack the whole archive again" in text
    )
    assert "train/ann/IMG0000002.jpg.json names an image that is not there" in text
    assert "not fractured/ann/IMG0000012.jpg.json is missing: its image is there" in text


def test_ninja_litter_is_no_annotation(ninja):
    (ninja / "train" / "ann" / "._IMG0000000.jpg.json").write_bytes(b"x")
    (ninja / "train" / "ann" / "notes.txt").write_bytes(b"x")
    reasons = dict(load("fracatlas", ninja).ignored.values)
    assert reasons["train/ann/._IMG0000000.jpg.json"] == "macOS resource fork (._*)"
    assert reasons["train/ann/notes.txt"] == "outside the image folders"


def test_ninja_image_in_two_splits(ninja):
    for kind, ending in (("img", ""), ("ann", ".json")):
        shutil.copy(ninja / "train" / kind / f"IMG0000000.jpg{ending}", ninja / "test" / kind)
    with pytest.raises(
        datasets.BadData, match="1 images lie in two of the folders:\n  IMG0000000.jpg"
    ):
        load("fracatlas", ninja)


def test_ninja_folder_against_objects(ninja, caplog):
    plain = ninja / "not fractured" / "ann" / "IMG0000012.jpg.json"
    box = {
        "classTitle": "Fractured",
        "geometryType": "rectangle",
        "points": {"exterior": [[20, 30], [9, 8]]},
    }
    rewrite(plain, lambda note: note["objects"].append(box))
    rewrite(ninja / "train" / "ann" / "IMG0000004.jpg.json", lambda note: note["objects"].clear())
    dataset = load("fracatlas", ninja)
    assert list(dataset.manifest["label"]) == [1] * 13 + [0] * 3
    assert dataset.manifest["split"][12] == ""
    assert dataset.boxes.loc[dataset.boxes["image"] == 12, readers.CORNERS].values.tolist() == [
        [9, 8, 20, 30]
    ]
    assert (
        "IMG0000012.jpg lies in not fractured and has an object: taken as Fractured" in caplog.text
    )
    assert "IMG0000004.jpg lies in train and has no object: taken as Fractured" in caplog.text


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda note: note.pop("size"), r"not in Supervisely's format \(KeyError: 'size'\)"),
        (lambda note: note["objects"][0].pop("points"), r"not in Supervisely's format"),
        (
            lambda note: note["objects"][1].update(geometryType="line"),
            "line is none of rectangle, polygon, bitmap",
        ),
        (
            lambda note: note["objects"][1].update(
                geometryType="bitmap", bitmap={"data": "?", "origin": [0, 0]}
            ),
            "cannot be read",
        ),
        (
            lambda note: note["objects"][0].update(classTitle="plate"),
            "IMG0000004.jpg plate .*unknown label",
        ),
        (
            lambda note: note["objects"][1].update(classTitle="plate"),
            "IMG0000004.jpg: unknown label plate",
        ),
        (
            lambda note: note["objects"][0]["points"].update(exterior=[[1, 2], [300, 9]]),
            "IMG0000004.jpg fracture .*reaches out of its image",
        ),
        (
            lambda note: note["size"].update(width=500),
            "IMG0000004.jpg: 500 x .* in the file, .* on disk",
        ),
    ],
)
def test_ninja_bad_annotations_are_named(ninja, change, problem):
    rewrite(ninja / "train" / "ann" / "IMG0000004.jpg.json", change)
    with pytest.raises(datasets.BadData, match=problem) as error:
        load("fracatlas", ninja)
    assert "1 unusable" in str(error.value) or "1 images" in str(error.value)
    assert "IMG0000004.jpg" in str(error.value) and "Fix: " in str(error.value)


def test_ninja_that_is_not_json(ninja):
    (ninja / "train" / "ann" / "IMG0000004.jpg.json").write_text("<html>")
    with pytest.raises(datasets.BadData, match="train/ann/IMG0000004.jpg.json: cannot be read"):
        load("fracatlas", ninja)


def test_fracatlas_phantom_options(tmp_path):
    with pytest.raises(ValueError, match="layout is 'voc'"):
        phantom.write_fracatlas(tmp_path, layout="voc")
    with pytest.raises(ValueError, match="4 or more fractured"):
        phantom.write_fracatlas(tmp_path, images=(3, 3))


# --- helpers


def test_take_renumbers_images_and_boxes(competition):
    dataset = load("dlia", competition / "competition_edition_b")
    rows = [5, 30, 2]
    part = datasets.take(dataset, rows)
    assert list(part.manifest["path"]) == list(dataset.manifest["path"].iloc[rows])
    before = dataset.boxes.merge(dataset.manifest["path"], left_on="image", right_index=True)
    after = part.boxes.merge(part.manifest["path"], left_on="image", right_index=True)
    columns = ["path", *readers.CORNERS, "label"]
    expected = before[before["path"].isin(part.manifest["path"])][columns]
    assert sorted(after[columns].values.tolist()) == sorted(expected.values.tolist())
    assert datasets.take(dataset, []).boxes.empty and datasets.take(dataset, []).manifest.empty


def test_boxed(competition):
    dataset = load("dlia", competition / "competition_edition_b")
    only = datasets.boxed(dataset)
    assert len(only.manifest) == 24 and set(only.boxes["image"]) == set(range(24))
    assert len(only.boxes) == len(dataset.boxes) and set(only.manifest["split"]) == {"train"}


def test_box_summary(small):
    write_list(
        small,
        "00000001_000.png,Mass,10,20,30,30",
        "00000002_003.png,Mass,0,0,50,50",
        "00000002_003.png,Nodule,1,2,4,9",
    )
    table = datasets.box_summary(load("nih", small)).set_index("class_name")
    assert list(table.index) == list(datasets.NIH_CLASSES)
    assert table.loc["Mass"].to_dict() == {
        "boxes": 2,
        "images": 2,
        "patients": 2,
        "share": 1.0,
        "width": 40,
        "height": 40,
        "side_min": 30,
        "side_median": 40,
        "side_max": 50,
    }
    assert table.loc["Nodule", ["boxes", "share", "side_max"]].tolist() == [1, 0.5, 6]
    assert table.loc["Effusion", "boxes"] == 0 and table.loc["Effusion", "share"] == 0


# --- the real files


def test_real_nih_boxes_and_folds(real_data, tmp_path):
    source = sources.find("nih", real_data)
    with pytest.raises(
        datasets.BadData, match="876 of the 880 boxed images are missing, first: 000"
    ):
        datasets.load(source)
    four = datasets.load(source, allow_missing=True)
    assert len(four.manifest) == 4 and "Atelectasis" in set(four.boxes["class_name"])
    shutil.copy(source.root / "BBox_List_2017.csv", tmp_path)
    write_dummies(
        tmp_path / "images_001" / "images",
        set(pd.read_csv(source.root / "BBox_List_2017.csv").iloc[:, 0]),
    )
    dataset = load("nih", tmp_path)
    assert (len(dataset.boxes), len(dataset.manifest), dataset.manifest["patient"].nunique()) == (
        984,
        880,
        726,
    )
    counts = datasets.box_summary(dataset).set_index("class_name")["boxes"]
    assert counts.to_dict() == dict(
        zip(datasets.NIH_CLASSES, [180, 146, 153, 123, 85, 79, 120, 98], strict=True)
    )
    dealt = split.folds(dataset)
    assert list(dealt.manifest["fold"].value_counts()) == [176] * 5
    assert dealt.manifest.groupby("patient")["fold"].nunique().max() == 1
    per_fold = dealt.boxes.groupby(
        [dealt.boxes["image"].map(dealt.manifest["fold"]), "label"]
    ).size()
    assert len(per_fold) == 40 and per_fold.min() >= 15


def test_real_edition_a(real_data, tmp_path):
    source = real_data / "nih_boxes" / "competition_edition_a"
    for name in ("train.csv", "ID_to_Image_Mapping.csv"):
        shutil.copy(source / name, tmp_path)
    write_dummies(tmp_path / "train", set(pd.read_csv(source / "train.csv").iloc[:, 0]))
    write_dummies(
        tmp_path / "test", set(pd.read_csv(source / "ID_to_Image_Mapping.csv")["image_id"])
    )
    everything = load("dlia", tmp_path, allow_leak=True)
    assert len(everything.boxes) == 836 and len(everything.mapping) == 148
    assert everything.manifest["split"].value_counts().to_dict() == {"train": 760, "test": 145}
    guarded = load("dlia", tmp_path)
    assert guarded.manifest["split"].value_counts().to_dict() == {"train": 735, "test": 145}
    assert guarded.ignored["reason"].str.contains("leak").sum() == 25
    shared = split.audit(guarded).set_index("check").loc["patients in train and test, by number"]
    assert shared["verdict"] == "warning" and shared["count"] > 0


def test_real_fracatlas(real_data, caplog):
    dataset = load("fracatlas", real_data)
    manifest = dataset.manifest
    assert_box_table(dataset)
    assert manifest["class_name"].value_counts().to_dict() == {
        "Non_fractured": 1500,
        "Fractured": 717,
    }
    assert manifest["split"].value_counts().to_dict() == {
        "": 1500,
        "train": 574,
        "val": 82,
        "test": 61,
    }
    assert len(dataset.boxes) == 922 and dataset.boxes["image"].nunique() == 717
    assert "IMG0003298.jpg: dataset.csv says fractured=0" in caplog.text
    assert len(datasets.boxed(dataset).manifest) == 717
    turned = manifest.index[manifest["path"].str.endswith("IMG0002628.jpg")][0]
    cached = cache.build(datasets.take(dataset, [turned]), size=454, fit="pad", progress=False)
    need_outlines_in_boxes(dataset, slack=1e-6)
    assert len(dataset.outlines) == 922
    assert cached.shapes.tolist() == [[373, 454]]  # The file holds it lying on its side, 373 wide.
