"""Trees of data sets for tests: another layout of FracAtlas, files, hashes."""

import base64
import hashlib
import io
import json
import shutil
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from dlia_utils.data import phantom, readers


def save(path, value=7, size=(12, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def tree_hash(root):
    files = sorted(path for path in Path(root).rglob("*") if path.is_file())
    return [(str(p.relative_to(root)), hashlib.sha1(p.read_bytes()).hexdigest()) for p in files]


def need_every_file_accounted_for(dataset):
    """No file of the tree is passed over without a word, and none counts twice."""
    found = [path for path in dataset.root.rglob("*") if path.is_file()]
    named = [*dataset.manifest["path"], *dataset.ignored["path"], *dataset.masks["path"]]
    assert sorted(named) == sorted(path.relative_to(dataset.root).as_posix() for path in found)


def ninja(folder, **options):
    """The phantom of FracAtlas as DatasetNinja publishes it; every second outline is a bitmap."""
    original = phantom.write_fracatlas(folder / "original", **options)
    coco = json.loads((original / readers.FRAC_BOXES).read_text())
    about = {one["file_name"]: one for one in coco["images"]}
    marks = {one["image_id"]: one for one in coco["annotations"]}
    place = {}
    for split, file in readers.FRAC_SPLITS.items():
        names = (original / file).read_text().split()[1:]
        place |= dict.fromkeys(names, split.replace("valid", "val"))
    tree = folder / "FracAtlas"
    for path in sorted(original.glob("images/*/*.jpg")):
        where, objects = tree / place.get(path.name, "not fractured"), []
        height, width = readers.shapes_of(path.parent, [path.name])[0]
        if path.name in about:
            mark = marks[about[path.name]["id"]]
            x, y, w, h = map(int, mark["bbox"])
            corners = {"exterior": [[x, y], [x + w, y + h]], "interior": []}
            objects = [{"geometryType": "rectangle", "points": corners}]
            if int(path.stem[3:]) % 2:
                objects.append(bitmap_of(mark, x, y, w, h))
            else:
                for flat in mark["segmentation"]:
                    points = {"exterior": np.reshape(flat, (-1, 2)).tolist(), "interior": []}
                    objects.append({"geometryType": "polygon", "points": points})
        for kind in ("img", "ann"):
            (where / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, where / "img")
        objects = [{"classTitle": "fractured"} | one for one in objects]
        note = {"size": {"height": height, "width": width}, "objects": objects}
        (where / "ann" / f"{path.name}.json").write_text(json.dumps(note))
    (tree / "meta.json").write_text("{}")
    return tree


def bitmap_of(mark, x, y, w, h):
    """The outline as Supervisely's bitmap: a palette of two colours, the first one transparent."""
    mask = np.zeros((h, w), np.uint8)
    for flat in mark["segmentation"]:  # pixels whose middle lies inside
        shape = (np.reshape(flat, (-1, 2)).astype(np.float32) - [x, y]).astype(np.float32)
        for row, column in np.ndindex(h, w):
            if cv2.pointPolygonTest(shape.reshape(-1, 1, 2), (column + 0.5, row + 0.5), False) > 0:
                mask[row, column] = 1
    image = Image.fromarray(mask)
    image.putpalette([0, 0, 0, 255, 255, 255])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    data = base64.b64encode(zlib.compress(buffer.getvalue())).decode()
    return {"geometryType": "bitmap", "bitmap": {"data": data, "origin": [x, y]}}
