"""Synthetic films in each data set's own tree, junk included: the default when no real data is there.

What they show is drawn by `films`, from physics and not from patients: nothing medical can be learnt from it.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from . import _fracatlas, medmnist, readers
from .films import Anatomy, bone, chest, chest_with_findings, chest_with_lungs
from .tables import trace

VERSION = 3  # Raise it when the pictures change: a phantom written by an older version is then not reused.
MARKER = "SYNTHETIC.txt"
IMAGES = {"train": (96, 144), "val": (8, 8), "test": (24, 40)}
FINDING_IMAGES = {"train": 240, "test": 40}  # of each edition of the competition
MARKED = (0.25, 0.75)  # share of the Normal and of the COVID films with a marker in a corner
SPREAD = 2.5  # of how patients are placed; at 1, films of healthy lungs are taken for copies of one another
TWINS = 1 / 15  # share of the COVID set's films that are another film once more
MEDMNIST_IMAGES = {"train": 320, "val": 64, "test": 128}
LEAKED, TWO_IDS = 4, 3  # edition A: test images that train has too, and test images with two ids


def write_pneumonia(
    root: str | Path,
    *,
    seed: int = 0,
    images: Mapping[str, tuple[int, int]] | None = None,
    size: int = 128,
) -> Path:
    """Write the tree of Chest X-Ray Images (Pneumonia) with synthetic films; returns `root`/chest_xray.

    `images` gives (NORMAL, PNEUMONIA) counts by split, default `IMAGES`. The archive's traps are there too: a
    second copy in chest_xray/chest_xray, `__MACOSX`, `._*`, `.DS_Store`, a 16-image val, a byte-identical
    pair, and patient numbers that appear in train as bacteria and in test as virus. The opacities' masks (255
    = opacity) lie in `root`/phantom_masks under the image's relative path, ending in .png.
    `root`/SYNTHETIC.txt is written last. The same seed gives the same bytes.
    """
    root = Path(root)
    tree = root / "chest_xray"
    plan = list(_plan(seed, images or IMAGES))
    _in_parallel(lambda film: _write_film(root, *film, size=size), plan)
    _write_twin(tree)
    shutil.copytree(tree, tree / "chest_xray")
    _write_litter(tree)
    _mark(root, seed)
    return tree


def write_competition(
    root: str | Path, *, seed: int = 0, images: Mapping[str, int] | None = None, size: int = 128
) -> Path:
    """Write both editions of the DLIA competition with planted findings; returns `root`.

    `root`/competition_edition_a and `root`/competition_edition_b train on the same images and test on
    different ones; `images` gives the counts of one edition ("train", "test"), default `FINDING_IMAGES`. As
    in the real editions: A's ids are the boxes missing from train.csv, so that `TWO_IDS` images have two and
    `LEAKED` stand in train and test; each of B's test images has exactly one box. The boxes behind the ids
    are in `root`/phantom_truth.csv (edition, image_id, x1, y1, x2, y2, class_name), beside the editions.
    The same seed gives the same bytes. Errors: `ValueError` for fewer than 12 or 8 images.
    """
    root, counts = Path(root), {**FINDING_IMAGES, **(images or {})}
    if counts["train"] < 12 or counts["test"] < 8:
        raise ValueError(
            f"images is {counts}; the competition needs at least 12 to train on and 8 to test"
        )
    films = _draw_findings(counts["train"] + 2 * counts["test"] - LEAKED, seed=seed, size=size)
    rng = np.random.default_rng([seed, 1])
    order = [films[k] for k in rng.permutation(len(films))]
    single, double = ([film for film in order if len(film.names) == k] for k in (1, 2))
    test_b, rest = single[: counts["test"]], single[counts["test"] :]
    alone = counts["test"] - LEAKED - TWO_IDS
    test_a, train = [*rest[:alone], *double[:TWO_IDS]], [*rest[alone:], *double[TWO_IDS:]]
    leaked = double[TWO_IDS : TWO_IDS + LEAKED]
    hidden_a = [*_rows(test_a), *(list(_rows([film]))[1] for film in leaked)]
    train_a = [row for row in _rows(train) if row not in hidden_a]
    _write_edition_a(root / "competition_edition_a", rng, train, test_a + leaked, train_a, hidden_a)
    _write_edition_b(root / "competition_edition_b", rng, train, test_b)
    truth = [("A", *row) for row in sorted(hidden_a)] + [
        ("B", *row) for row in sorted(_rows(test_b))
    ]
    header = ("edition", "image_id", "class_name", "x1", "y1", "x2", "y2")
    _write_table(root / "phantom_truth.csv", header, truth)
    _mark(root, seed)
    return root


def write_nih(root: str | Path, *, seed: int = 0, images: int = 240, size: int = 128) -> Path:
    """Write the tree of NIH ChestX-ray8 with `images` films with planted findings; returns `root`/nih.

    Its traps are there too: the box list's header split by its own commas and followed by empty columns,
    `Infiltrate` there and `Infiltration` in Data_Entry_2017.csv, images in several folders, some RGBA, films
    without a box, Finder's litter. The same seed gives the same bytes.
    """
    root = Path(root)
    tree = root / "nih"
    films = _draw_findings(images, seed=seed, size=size)
    entries = []
    for k, film in enumerate(films):
        path = tree / f"images_{1 + 2 * k // len(films):03d}" / "images" / film.name
        _save(film.image, path, "PNG", mode="RGBA" if k % 28 == 4 else "L")
        labels = "|".join(film.names).replace("Infiltrate", "Infiltration")
        entries.append((film.name, labels, "PA"))
    for k in range(max(images // 20, 1)):  # As in the real archive, where most films have no box.
        name = f"{90_000_000 + k:08d}_000.png"
        image, _ = chest_with_findings(np.random.default_rng([seed, 2, k]), [], size=size)
        _save(image, tree / "images_002" / "images" / name, "PNG")
        entries.append((name, "No Finding", "PA"))
    header = "Image Index,Finding Label,Bbox [x,y,w,h],,,".split(",")
    _write_table(
        tree / readers.NIH_BOXES, header, [[*row, "", "", ""] for row in _rows_xywh(_rows(films))]
    )
    _write_table(
        tree / "Data_Entry_2017.csv", ("Image Index", "Finding Labels", "View Position"), entries
    )
    (tree / "images_001" / "images" / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    _mark(root, seed)
    return tree


def write_fracatlas(
    root: str | Path,
    *,
    seed: int = 0,
    images: tuple[int, int] = (60, 60),
    size: int = 128,
    layout: str = "original",
) -> Path:
    """Write FracAtlas with films of long bones, boxes and outlines of the fractures; returns `root`/FracAtlas.

    `images` counts (fractured, not fractured), `size` is the long side in pixels. `layout` is "original" or
    "ninja" (DatasetNinja's: every second outline is a bitmap): the same films under the same names. The
    traps are there too: one JPEG cut short, one stored on its side (EXIF), in the original layout one whose
    flag in dataset.csv contradicts its box. The same seed gives the same bytes. Errors: `ValueError` for
    another layout or fewer than 4 fractured.
    """
    writers = {"original": _write_original, "ninja": _write_ninja}
    if layout not in writers or images[0] < 4:
        raise ValueError(
            f"layout is {layout!r} (of {', '.join(writers)}), images {images} (4 or more fractured)"
        )
    root = Path(root)
    tree = root / "FracAtlas"
    bones = _in_parallel(
        lambda k: _draw_bone(seed, k, fractured=k < images[0], size=size), range(sum(images))
    )
    names = [film.name for film in bones if film.fractured]
    marks = [0, round(0.8 * len(names)), round(0.9 * len(names)), len(names)]
    splits = {split: names[marks[k] : marks[k + 1]] for k, split in enumerate(_fracatlas.SPLITS)}
    writers[layout](tree, bones, splits)
    _mark(root, seed)
    return tree


def write_tuberculosis(
    root: str | Path, *, seed: int = 0, images: tuple[int, int] = (200, 40), size: int = 128
) -> Path:
    """Write the tree of the TB Chest Radiography Database; returns `root`/TB_Chest_Radiography_Database.

    `images` counts (Normal, Tuberculosis); opacities lie in the upper half of the lungs. The tables and the
    README of the archive, Finder's litter and a few RGB files are there too. The same seed gives the same
    bytes.
    """
    root = Path(root)
    tree = root / "TB_Chest_Radiography_Database"

    def write(film: tuple[int, int]) -> None:
        label, number = film
        rng, name = (
            np.random.default_rng([seed, label, number]),
            readers.TUBERCULOSIS_CLASSES[label],
        )
        image, *_ = chest_with_lungs(
            rng, size=size, diseased=bool(label), upper=True, spread=SPREAD
        )
        mode = "RGB" if number % 7 == 0 else "L"
        _save(image, tree / name / f"{name}-{number}.png", "PNG", mode=mode)

    _in_parallel(
        write, [(label, k + 1) for label, count in enumerate(images) for k in range(count)]
    )
    _write_about(tree, readers.TUBERCULOSIS_CLASSES)
    _mark(root, seed)
    return tree


def write_covid(
    root: str | Path,
    *,
    seed: int = 0,
    images: tuple[int, int] = (90, 90),
    size: int = 128,
    layout: str = "radiography",
) -> Path:
    """Write a COVID set with a planted shortcut; returns `root`/COVID-19_Radiography_Dataset or `root`/covid_xray.

    `images` counts (Normal, COVID). `layout` is "radiography" (the COVID-19 Radiography Database: images and
    masks of the lungs, smaller than the films, two classes that are not read) or "splits" (covid_xray: train,
    val, test with normal and COVID, about 70/15/15, no masks). COVID films have opacities; but 75 % of them,
    and 25 % of the normal ones, also bear a bright L in the top left corner (`MARKED`): a shortcut that an
    audit should find. And `TWINS` of the films are another film of their class once more, a little flatter
    and re-encoded, under a name of their own; in "splits" they may lie in another split. The truth is in
    `root`/phantom_truth.csv (path, marker, twin_of: the path of the film, or ""). The same seed gives the
    same bytes. Errors: `ValueError` for another layout.
    """
    if layout not in ("radiography", "splits"):
        raise ValueError(f"layout is {layout!r}; it must be radiography or splits")
    root = Path(root)
    tree = root / ("covid_xray" if layout == "splits" else "COVID-19_Radiography_Dataset")
    plan = [
        film
        for label, count in enumerate(images)
        for film in _plan_covid(seed, label, count, layout)
    ]

    def write(film: _CovidFilm) -> None:
        rng = np.random.default_rng(film.key)
        image, _, lungs = chest_with_lungs(rng, size=size, diseased=bool(film.label), spread=SPREAD)
        if film.marker:
            _burn_l(image)
        _save(_recoded(image) if film.twin_of else image, tree / film.path, "PNG")
        if layout == "radiography":
            _save_mask(lungs, tree / film.path.replace("/images/", "/masks/"))

    _in_parallel(write, plan)
    if layout == "radiography":
        for k, name in enumerate(readers.COVID_OTHERS):
            for number in range(1, 4):
                rng = np.random.default_rng([seed, 8 + k, number])
                image, _, lungs = chest_with_lungs(rng, size=size, diseased=True, spread=SPREAD)
                _save(image, tree / name / "images" / f"{name}-{number}.png", "PNG")
                _save_mask(lungs, tree / name / "masks" / f"{name}-{number}.png")
        _write_about(tree, [*readers.COVID_CLASSES, *readers.COVID_OTHERS])
    else:
        spare = tree / "train" / "COVID" / ".ipynb_checkpoints" / "COVID-1-checkpoint.png"
        spare.parent.mkdir()
        shutil.copyfile(next(iter(sorted(tree.glob("train/COVID/*.png")))), spare)
    truth = [
        (film.path, int(film.marker), film.twin_of)
        for film in sorted(plan, key=lambda film: film.path)
    ]
    _write_table(root / "phantom_truth.csv", ("path", "marker", "twin_of"), truth)
    _mark(root, seed)
    return tree


def write_medmnist(
    root: str | Path, name: str, *, seed: int = 0, images: Mapping[str, int] | None = None
) -> Path:
    """Write the .npz file of the MedMNIST set `name` (see `medmnist.parse`) in the size it asks for; returns `root`.

    `images` counts the images of each split, default `MEDMNIST_IMAGES`; the classes are as frequent as one another.
    PneumoniaMNIST shows films with and without opacities. In the other sets label k is shown by 1 + k % 4 marks of
    kind k // 4 (bright disc, dark disc, bright ring, dark ring); a ChestMNIST film has none, one or two labels. Where
    they lie is in `root`/phantom_truth.npz: `train_masks` and so on, uint8 [N,S,S], 255 = lesion. The same seed gives
    the same arrays.
    """
    root, choice = Path(root), medmnist.parse(name)
    published, arrays, masks = medmnist.FLAGS[choice.flag], {}, {}
    for s, (split, count) in enumerate((images or MEDMNIST_IMAGES).items()):
        shown = _plan_labels(np.random.default_rng([seed, s]), published, count)

        def draw(
            number: int, s: int = s, shown: Sequence[Sequence[int]] = shown
        ) -> tuple[np.ndarray, np.ndarray]:
            rng = np.random.default_rng([seed, s, number])
            if choice.flag == "pneumoniamnist":
                return chest(rng, size=choice.size, pneumonia=shown[number] == [1])
            return _marked(rng, shown[number], size=choice.size, colour=published.colour)

        drawn = _in_parallel(draw, range(count))
        arrays[f"{split}_images"] = np.stack(
            [(255 * image).round().astype(np.uint8) for image, _ in drawn]
        )
        masks[f"{split}_masks"] = np.stack([np.uint8(255) * mask for _, mask in drawn])
        labels = np.zeros((count, len(published.names)), np.uint8)
        for number, some in enumerate(shown):
            labels[number, some] = 1
        arrays[f"{split}_labels"] = (
            labels if published.findings else labels.argmax(1).astype(np.uint8)[:, None]
        )
    root.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(root / "phantom_truth.npz", **masks)
    np.savez_compressed(root / medmnist.file_name(choice.flag, choice.size), **arrays)
    _mark(root, seed)
    return root


def _plan_labels(rng: np.random.Generator, published: medmnist.Flag, count: int) -> list[list[int]]:
    """The labels of each image: one, dealt out so that all are as frequent; or, of findings, none, one or two."""
    deck = np.arange(2 * count) % len(published.names)
    first, second = rng.permutation(deck[:count]).tolist(), rng.permutation(deck[count:]).tolist()
    if not published.findings:
        return [[label] for label in first]
    several = rng.permutation(np.arange(count) % 3).tolist()
    return [
        sorted({one, other})[:number]
        for one, other, number in zip(first, second, several, strict=True)
    ]


def _marked(
    rng: np.random.Generator, labels: Sequence[int], *, size: int, colour: bool
) -> tuple[np.ndarray, np.ndarray]:
    """An image [size,size] or [size,size,3] in [0,1] of uneven tissue with the marks of `labels`; their mask."""
    noise = gaussian_filter(rng.standard_normal((size, size)), size / 12)
    image = 0.5 + 0.06 * noise / noise.std() + rng.normal(0, 0.02, (size, size))
    marks = [label for label in labels for _ in range(1 + label % 4)]
    cells = rng.permutation(9)[: len(marks)]  # of a grid of 3 x 3, so that no mark covers another
    y, x = np.mgrid[:size, :size] + 0.5
    mask = np.zeros((size, size), bool)
    for label, cell in zip(marks, cells, strict=True):
        down, across = (
            (np.array(divmod(int(cell), 3)) + 0.5 + rng.uniform(-0.14, 0.14, 2)) / 3 * size
        )
        away = np.hypot(y - down, x - across)
        lesion = (away < 0.1 * size) & ((away > 0.05 * size) if label >= 8 else True)
        image += lesion * (-0.3 if label // 4 % 2 else 0.3)
        mask |= lesion
    if colour:
        image = image[..., None] * rng.uniform(0.7, 1.0, 3)
    return image.clip(0, 1), mask


def _in_parallel(work: Callable, jobs: Iterable) -> list:
    """`work` of every job, in threads: each draws from a generator of its own, so that the order does not matter."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, jobs))


@dataclass(frozen=True)
class _FindingFilm:
    """A drawn film: its file name, image [size,size], names and boxes of its findings."""

    name: str
    image: np.ndarray
    names: list[str]
    boxes: list[tuple[float, float, float, float]]


def _draw_findings(count: int, *, seed: int, size: int) -> list[_FindingFilm]:
    """`count` films, sorted by name; every third has two findings, about a quarter share a patient."""

    def draw(film: tuple[str, list[str], list[int], list[int]]) -> _FindingFilm:
        name, names, patient, key = film
        anatomy = Anatomy.draw(np.random.default_rng(patient))
        image, boxes = chest_with_findings(
            np.random.default_rng(key), names, size=size, anatomy=anatomy
        )
        return _FindingFilm(name, image, names, boxes)

    return _in_parallel(draw, _plan_findings(seed, count))


def _plan_findings(seed: int, count: int) -> Iterator[tuple[str, list[str], list[int], list[int]]]:
    """(file name, names of the findings, seed of the patient, seed of the film) of every image."""
    rng = np.random.default_rng([seed, 0])
    patient, films_left, deck = 0, 0, []
    for film in range(count):
        if not films_left:
            patient += int(rng.integers(1, 60))
            films_left, visit = (
                int(rng.choice([1, 2, 3], p=[0.86, 0.11, 0.03])),
                int(rng.integers(0, 20)),
            )
        films_left, visit = films_left - 1, visit + 1
        if len(deck) < 4:  # A deck of all classes, dealt out, keeps their numbers equal.
            deck += rng.permutation(readers.NIH_CLASSES).tolist()
        names = [deck.pop(0)]
        if film % 3 == 2:
            names.append(deck.pop(next(k for k, name in enumerate(deck) if name != names[0])))
        yield f"{patient:08d}_{visit:03d}.png", names, [seed, 3, patient], [seed, 4, patient, visit]


def _rows(films: Iterable[_FindingFilm]) -> Iterator[tuple]:
    """(file name, class, x1, y1, x2, y2) of every box."""
    for film in films:
        for name, box in zip(film.names, film.boxes, strict=True):
            yield film.name, name, *box


def _rows_xywh(rows: Iterable[tuple]) -> list[tuple]:
    return [(film, name, x1, y1, x2 - x1, y2 - y1) for film, name, x1, y1, x2, y2 in rows]


def _write_edition_a(
    tree: Path,
    rng: np.random.Generator,
    train: list[_FindingFilm],
    test: list[_FindingFilm],
    shown: list[tuple],
    hidden: list[tuple],
) -> None:
    """Every id stands for one of the `hidden` boxes; the header is NIH's, the rows are in no order."""
    _save_films(tree, train, test)
    header = "Image Index,Finding Label,Bbox [x,y,w,h]".split(",")
    rows = _rows_xywh(shown)
    _write_table(tree / readers.DLIA_TRAIN, header, [rows[k] for k in rng.permutation(len(rows))])
    ids = [(n, hidden[k][0]) for n, k in enumerate(rng.permutation(len(hidden)), 1)]
    _write_table(tree / readers.DLIA_MAPPING, ("id", "image_id"), ids)


def _write_edition_b(
    tree: Path, rng: np.random.Generator, train: list[_FindingFilm], test: list[_FindingFilm]
) -> None:
    """One id an image, counted from 0 in the order of the names; train.csv has a column more."""
    _save_films(tree, train, test)
    rows = [
        (film, rng.choice(["AP", "PA"]), *box, name) for film, name, *box in sorted(_rows(train))
    ]
    header = ("image_id", "view", "x_min", "y_min", "x_max", "y_max", "label")
    _write_table(tree / readers.DLIA_TRAIN, header, rows)
    ids = enumerate(sorted(film.name for film in test))
    _write_table(tree / readers.DLIA_MAPPING, ("ID", "image_id"), ids)


def _save_films(tree: Path, train: list[_FindingFilm], test: list[_FindingFilm]) -> None:
    for folder, films in (("train", train), ("test", test)):
        for film in films:
            _save(film.image, tree / folder / film.name, "PNG")


@dataclass(frozen=True)
class _BoneFilm:
    """A drawn film: its number and file name, image [h,w], box of the fracture or None, mask of the gap [h,w]."""

    number: int
    name: str
    image: np.ndarray
    box: tuple[float, float, float, float] | None
    gap: np.ndarray

    @property
    def fractured(self) -> bool:
        return self.box is not None


def _draw_bone(seed: int, number: int, *, fractured: bool, size: int) -> _BoneFilm:
    rng = np.random.default_rng([seed, number])
    height, width = size, int(size * rng.uniform(0.55, 1.0))
    if rng.random() < 0.3:
        height, width = width, height
    film = bone(rng, height=height, width=width, fractured=fractured)
    return _BoneFilm(number, f"IMG{number:07d}.jpg", *film)


def _save_bone(film: _BoneFilm, path: Path) -> None:
    """Write the JPEG; number 1 lies on its side, number 3 is cut short."""
    _save(film.image, path, "JPEG", on_its_side=film.number == 1)
    if film.number == 3:
        path.write_bytes(path.read_bytes()[:-40])


def _write_original(
    tree: Path, bones: Sequence[_BoneFilm], splits: Mapping[str, Sequence[str]]
) -> None:
    table = []
    for film in bones:
        _save_bone(
            film, tree / "images" / ("Fractured" if film.fractured else "Non_fractured") / film.name
        )
        flag = int(film.fractured and film.number != 2)
        table.append((film.name, 0, 1, 0, 0, 0, 0, 0, flag, int(film.fractured), 1, 0, 0))
    parts = "hand,leg,hip,shoulder,mixed,hardware,multiscan,fractured,fracture_count,frontal,lateral,oblique"
    _write_table(tree / _fracatlas.TABLE, ["image_id", *parts.split(",")], table)
    _write_coco(tree / _fracatlas.BOXES, [film for film in bones if film.fractured])
    for split, file in _fracatlas.SPLITS.items():
        _write_table(tree / file, ("image_id",), [(name,) for name in splits[split]])


def _write_coco(path: Path, bones: Sequence[_BoneFilm]) -> None:
    images, annotations = [], []
    for k, film in enumerate(bones):
        height, width = film.image.shape
        images.append({"id": k + 1, "width": width, "height": height, "file_name": film.name})
        x1, y1, x2, y2 = film.box
        annotations.append(
            {
                "id": k,
                "image_id": k + 1,
                "category_id": 0,
                "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "segmentation": [points.ravel().tolist() for points in trace(film.gap)],
            }
        )
    coco = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 0, "name": "fractured"}],
    }
    _write_json(path, coco)


def _write_ninja(
    tree: Path, bones: Sequence[_BoneFilm], splits: Mapping[str, Sequence[str]]
) -> None:
    folder_of = {
        name: "val" if split == "valid" else split
        for split, names in splits.items()
        for name in names
    }
    for film in bones:
        folder = tree / folder_of.get(film.name, "not fractured")
        _save_bone(film, folder / "img" / film.name)
        height, width = film.image.shape
        note = {"description": "", "tags": [], "size": {"height": height, "width": width}}
        _write_json(
            folder / "ann" / f"{film.name}.json", {**note, "objects": list(_ninja_objects(film))}
        )
    _write_json(
        tree / "meta.json", {"classes": [{"title": "fractured", "shape": "any"}], "tags": []}
    )
    (tree / "README.md").write_text("FracAtlas\n", encoding="utf-8")


def _ninja_objects(film: _BoneFilm) -> Iterator[dict]:
    """The fracture as a rectangle, and as polygons or, on films of odd numbers, as a bitmap."""
    if not film.fractured:
        return
    x1, y1, x2, y2 = map(int, film.box)
    about = {"classTitle": "fractured"}
    yield {
        **about,
        "geometryType": "rectangle",
        "points": {"exterior": [[x1, y1], [x2, y2]], "interior": []},
    }
    if film.number % 2:
        # As Supervisely writes it: a palette of two colours, of which the first is transparent.
        image = Image.fromarray(film.gap[y1:y2, x1:x2].astype(np.uint8))
        image.putpalette([0, 0, 0, 255, 255, 255])
        buffer = io.BytesIO()
        image.save(buffer, "PNG", transparency=0)
        data = base64.b64encode(zlib.compress(buffer.getvalue())).decode()
        yield {**about, "geometryType": "bitmap", "bitmap": {"data": data, "origin": [x1, y1]}}
    else:
        for points in trace(film.gap):
            shape = {"exterior": points.tolist(), "interior": []}
            yield {**about, "geometryType": "polygon", "points": shape}


@dataclass(frozen=True)
class _CovidFilm:
    """A film to draw: its path in the tree, class, seed, marker, and the path of the film that it repeats."""

    path: str
    label: int
    key: list[int]
    marker: bool
    twin_of: str


def _plan_covid(seed: int, label: int, count: int, layout: str) -> Iterator[_CovidFilm]:
    """The `count` films of a class; the last ones in this order are twins of others."""
    rng, name = np.random.default_rng([seed, label]), readers.COVID_CLASSES[label]
    own = count - int(count * TWINS)
    shown = [*range(own), *rng.permutation(own)[: count - own].tolist()]
    marked = set(rng.permutation(own)[: round(MARKED[label] * own)].tolist())
    files = [f"{name}-{number + 1}.png" for number in rng.permutation(count)]
    if layout == "radiography":
        paths = [f"{name}/images/{file}" for file in files]
    else:
        marks = round(0.7 * count), round(0.85 * count)
        split = [
            "train" if k < marks[0] else "val" if k < marks[1] else "test"
            for k in rng.permutation(count)
        ]
        folder = "COVID" if label else "normal"
        paths = [f"{part}/{folder}/{file}" for part, file in zip(split, files, strict=True)]
    for k, film in enumerate(shown):
        twin_of = paths[film] if k >= own else ""
        yield _CovidFilm(paths[k], label, [seed, 6 + label, film], film in marked, twin_of)


def _burn_l(image: np.ndarray) -> None:
    """Burn a bright letter L into the top left corner of a film, as side markers are."""
    side = max(len(image) // 12, 4)
    start, thick = max(len(image) // 32, 1), max(side // 3, 1)
    image[start : start + side, start : start + thick] = 0.97
    image[start + side - thick : start + side, start : start + side] = 0.97


def _recoded(image: np.ndarray) -> np.ndarray:
    """The same film as another archive might hold it: a little flatter, once through JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(((0.94 * image + 0.03) * 255).round().astype(np.uint8)).save(
        buffer, "JPEG", quality=70
    )
    return np.asarray(Image.open(buffer), dtype=np.float32) / 255


def _save_mask(mask: np.ndarray, path: Path) -> None:
    """Write a mask smaller than its film, as in the COVID-19 Radiography Database: 256 pixels for 299."""
    side = round(len(mask) * 256 / 299)
    small = Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST)
    _save(np.asarray(small), path, "PNG")


def _write_about(tree: Path, classes: Sequence[str]) -> None:
    """What lies beside the class folders: a table for each (here an empty archive), a README, Finder's litter."""
    for name in classes:
        (tree / f"{name}.metadata.xlsx").write_bytes(b"PK\x05\x06" + bytes(18))
    (tree / "README.md.txt").write_text("Synthetic stand-in.\n", encoding="utf-8")
    (tree / classes[0] / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def _mark(root: Path, seed: int) -> None:
    """Say that all of it is synthetic; written last, so that a phantom left half-written is not used."""
    note = f"Synthetic films, drawn by dlia_utils.data.phantom {VERSION}, seed {seed}. No patient data.\n"
    (root / MARKER).write_text(note, encoding="utf-8")


def _plan(
    seed: int, images: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, bool, list[int], list[int]]]:
    """(relative path, pneumonia, seed of the patient, seed of the film) of every image."""
    for s, (split, counts) in enumerate(images.items()):
        for pneumonia, count in enumerate(counts):
            rng = np.random.default_rng([seed, s, pneumonia])
            patient, films_left = 0, 0
            for film in range(1, count + 1):
                if not films_left:
                    patient, films_left = patient + 1, int(rng.choice([1, 1, 2, 3]))
                    virus = rng.random() < 0.35
                films_left -= 1
                # Numbers 1 and 2 return in every split, in test as the other kind: a trap of the real names.
                returns = pneumonia and patient <= 2
                number = patient if returns else patient + 1000 * s
                kind = "virus" if (split == "test" if returns else virus) else "bacteria"
                key = [seed, s, pneumonia, patient]
                yield (
                    f"{split}/{_name(pneumonia, number, kind, film)}",
                    bool(pneumonia),
                    key,
                    [*key, film],
                )


def _name(pneumonia: int, number: int, kind: str, film: int) -> str:
    if pneumonia:
        return f"PNEUMONIA/person{number}_{kind}_{film}.jpeg"
    return f"NORMAL/{'NORMAL2-' if number % 2 else ''}IM-{number:04d}-{film:04d}.jpeg"


def _write_film(
    root: Path, relative: str, pneumonia: bool, patient: list[int], film: list[int], *, size: int
) -> None:
    anatomy = Anatomy.draw(np.random.default_rng(patient))
    image, lesion = chest(
        np.random.default_rng(film), size=size, pneumonia=pneumonia, anatomy=anatomy
    )
    _save(image, root / "chest_xray" / relative, "JPEG")
    if pneumonia:
        _save(lesion, (root / "phantom_masks" / relative).with_suffix(".png"), "PNG")


def _save(
    picture: np.ndarray, path: Path, kind: str, *, mode: str = "L", on_its_side: bool = False
) -> None:
    """Write grey values in [0, 1]; `on_its_side` stores them turned, with the EXIF tag that says so."""
    image = Image.fromarray((picture * 255.0).round().astype(np.uint8))
    exif = Image.Exif()
    if on_its_side:
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, quality=92, **({"exif": exif} if on_its_side else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def _write_twin(tree: Path) -> None:
    """Make a normal patient's second training film a copy of the first, as happens in the published set."""
    by_patient: dict[str, Path] = {}
    for path in sorted(tree.glob("train/NORMAL/*.jpeg")):
        first = by_patient.setdefault(path.name.rpartition("-")[0], path)
        if first != path:
            shutil.copyfile(first, path)
            return


def _write_litter(tree: Path) -> None:
    for path in sorted(tree.glob("*/*/*.jpeg"))[::40]:
        fork = tree / "__MACOSX" / "chest_xray" / path.parent.relative_to(tree) / f"._{path.name}"
        fork.parent.mkdir(parents=True, exist_ok=True)
        fork.write_bytes(b"\x00\x05\x16\x07" + bytes(60))
        shutil.copyfile(fork, path.with_name(fork.name))
        (path.parent / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
