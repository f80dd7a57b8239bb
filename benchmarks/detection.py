"""How many times faster metrics, fusion and loading of the detection study are than the usual ways,
in one run.

    python benchmarks/detection.py                         the whole table, some minutes
    python benchmarks/detection.py --only fusion --rounds 5

The cases of a group are run in turn, round after round, and the fastest round of each is kept. Time
is CPU time of this process on one thread: it holds steady while others use the machine. Before
anything is timed the results are compared: all sides do the same work. The row of faster-coco-eval
needs `benchmarks/requirements.txt`.
"""

# ruff: noqa: I001  (timing sets the allocator and puts the repository on the path: it comes first)

from __future__ import annotations

import argparse
import logging
import platform
import tempfile
import warnings
from pathlib import Path

from timing import Row, installed, print_table, seconds

from dlia_utils.data import augment, cache, datasets, sources, phantom

import albumentations as A
import cv2
import ensemble_boxes
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from dlia_utils.detect import COCO_IOUS, evaluate, fuse

CORNERS = evaluate.CORNERS
SIDE, CLASSES = 1024, 8


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", "Encountered more than 100 detections")
    print(
        f"{platform.machine()} CPU, one thread; torch {torch.__version__}; NumPy "
        f"{np.__version__}; ",
        end="",
    )
    print(f"fastest of {options.rounds} rounds; CPU time\n")
    rows = []
    for name in options.only:
        rows += GROUPS[name](options)
    print_table(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, default=2000, help="images of the evaluator and sweep groups"
    )
    parser.add_argument("--boxes", type=int, default=50, help="predictions per image (and view)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    return parser.parse_args()


def agree(ours: float, theirs: float) -> None:
    if not abs(ours - theirs) < 1e-3:
        raise SystemExit(
            f"the two sides differ ({ours:.6f} and {theirs:.6f}): their times say nothing"
        )


# ------------------------------------------------------------------------------------------ metrics


def random_boxes(rng: np.random.Generator, images: np.ndarray) -> pd.DataFrame:
    low, side = (
        rng.uniform(0, 0.8 * SIDE, (len(images), 2)),
        rng.uniform(0.04, 0.2, (len(images), 2)) * SIDE,
    )
    table = pd.DataFrame(np.hstack([low, low + side]), columns=CORNERS)
    return table.assign(image=images, label=rng.integers(1, CLASSES + 1, len(images)))


def evaluation_set(options: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """About 1.1 true boxes per image as in the NIH list; predictions: all of them shifted, the rest
    at random."""
    rng = np.random.default_rng(0)
    truth = random_boxes(rng, rng.integers(0, options.images, round(1.12 * options.images)))
    near = truth.assign(score=rng.beta(2, 3, len(truth)))
    near[CORNERS] += np.tile(rng.normal(0, 0.015 * SIDE, (len(near), 2)), 2)
    places = np.repeat(np.arange(options.images), options.boxes)[len(near) :]
    far = random_boxes(rng, places).assign(score=0.7 * rng.beta(1, 4, len(places)))
    return truth, pd.concat([near, far], ignore_index=True)


def per_image(table: pd.DataFrame, images: int) -> list[dict[str, Tensor]]:
    """The table as torchmetrics wants it: tensors, one dict per image."""
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
    }
    result = [empty] * images
    for image, own in table.groupby("image"):
        result[image] = {
            "boxes": torch.tensor(own[CORNERS].to_numpy(), dtype=torch.float32),
            "labels": torch.tensor(own["label"].to_numpy()),
        }
        if "score" in own:
            result[image]["scores"] = torch.tensor(own["score"].to_numpy(), dtype=torch.float32)
    return result


def their_map(
    found: list[dict],
    truth: list[dict],
    *,
    backend: str = "pycocotools",
    iou: tuple[float, ...] = (0.5,),
) -> float:
    metric = MeanAveragePrecision(iou_thresholds=list(iou), backend=backend)
    metric.update(found, truth)
    return float(metric.compute()["map"])


def above(found: list[dict], threshold: float) -> list[dict]:
    return [{key: value[one["scores"] >= threshold] for key, value in one.items()} for one in found]


def evaluator(options: argparse.Namespace) -> list[Row]:
    """mAP from tables against torchmetrics on tensors that are ready."""
    truth, predictions = evaluation_set(options)
    known, found = per_image(truth, options.images), per_image(predictions, options.images)

    def ours(iou: tuple[float, ...]) -> float:
        result = evaluate.match(
            truth, predictions, images=range(options.images), classes=CLASSES, iou=iou
        )
        return evaluate.summary(result)["mAP50_95" if len(iou) > 1 else "mAP50"]

    cases = {
        "one pass": lambda: ours((0.5,)),
        "one pass, 10 IoUs": lambda: ours(COCO_IOUS),
        "pycocotools": lambda: their_map(found, known),
        "pycocotools, 10 IoUs": lambda: their_map(found, known, iou=COCO_IOUS),
    }
    if installed("faster_coco_eval"):
        cases["faster_coco_eval"] = lambda: their_map(found, known, backend="faster_coco_eval")
        agree(ours((0.5,)), cases["faster_coco_eval"]())
    agree(ours((0.5,)), cases["pycocotools"]())
    time_of = seconds(cases, rounds=options.rounds, device="cpu", group="evaluator")
    size = f"{options.images:,} images x {options.boxes} boxes"
    faster = time_of.get("faster_coco_eval", np.nan) / time_of["one pass"]
    wide = time_of["pycocotools, 10 IoUs"] / time_of["one pass, 10 IoUs"]
    return [
        (
            f"mAP@0.5, {size}",
            "torchmetrics + pycocotools",
            time_of["pycocotools"] / time_of["one pass"],
            ">= 20x",
        ),
        (f"mAP@0.5, {size}", "torchmetrics + faster_coco_eval", faster, ""),
        (f"mAP@0.5:0.95, {size}", "torchmetrics + pycocotools", wide, ""),
    ]


def sweep(options: argparse.Namespace) -> list[Row]:
    """Eight score thresholds, with precision, recall and F1, against eight evaluations of what is
    left."""
    truth, predictions = evaluation_set(options)
    known, found = per_image(truth, options.images), per_image(predictions, options.images)

    def ours() -> pd.DataFrame:
        result = evaluate.match(truth, predictions, images=range(options.images), classes=CLASSES)
        return evaluate.threshold_sweep(result)

    def naive() -> list[float]:
        return [their_map(above(found, threshold), known) for threshold in evaluate.SWEEP]

    agree(ours()["mAP50"].iloc[-1], their_map(above(found, evaluate.SWEEP[-1]), known))
    time_of = seconds(
        {"one pass": ours, "naive": naive}, rounds=options.rounds, device="cpu", group="sweep"
    )
    what = f"threshold sweep 0.05 to 0.40, {options.images:,} images x {options.boxes} boxes"
    return [
        (
            what,
            "torchmetrics + pycocotools at each",
            time_of["naive"] / time_of["one pass"],
            ">= 100x",
        )
    ]


# ------------------------------------------------------------------------------------------- fusion


def fusion(options: argparse.Namespace, *, images: int = 500, views: int = 5) -> list[Row]:
    """Weighted boxes fusion of the whole table against ensemble-boxes on arrays that are ready,
    image by image."""
    rng = np.random.default_rng(0)
    parts = []
    for image in range(images):
        objects = random_boxes(rng, np.full(options.boxes // 2, image))
        for view in range(views):
            seen = objects.sample(
                options.boxes, replace=True, random_state=int(rng.integers(1 << 30))
            )
            seen[CORNERS] = (seen[CORNERS] + rng.normal(0, 0.006 * SIDE, (len(seen), 4))).clip(
                0, SIDE
            )
            parts.append(seen.assign(view=view, score=rng.random(len(seen))))
    table = pd.concat(parts, ignore_index=True)
    table = table[(table["x1"] < table["x2"]) & (table["y1"] < table["y2"])]
    arrays = [
        [
            [own[columns].to_numpy() for _, own in part.groupby("view")]
            for columns in (CORNERS, "score", "label")
        ]
        for _, part in table.assign(**{corner: table[corner] / SIDE for corner in CORNERS}).groupby(
            "image"
        )
    ]

    def theirs() -> list[tuple]:
        return [ensemble_boxes.weighted_boxes_fusion(*one, iou_thr=0.55) for one in arrays]

    def ours() -> pd.DataFrame:
        return fuse.wbf(table, iou=0.55, views=views)

    fused = theirs()
    agree(len(ours()), sum(len(one[0]) for one in fused))
    agree(ours()["score"].mean(), np.concatenate([one[1] for one in fused]).mean())
    time_of = seconds(
        {"ours": ours, "ensemble": theirs}, rounds=options.rounds, device="cpu", group="fusion"
    )
    what = f"weighted boxes fusion, {images} images x {views} views x {options.boxes} boxes"
    return [(what, "ensemble-boxes", time_of["ensemble"] / time_of["ours"], ">= 25x")]


# ------------------------------------------------------------------------------------------- loader


def loader(options: argparse.Namespace, *, images: int = 16) -> list[Row]:
    """An augmented sample from the cache, grey, against decoding and augmenting in colour as the
    original study."""
    with tempfile.TemporaryDirectory() as folder:
        phantom.write_nih(Path(folder), images=images, size=SIDE)
        images = datasets.boxed(datasets.load(sources.find("nih", Path(folder))))
        cached = cache.build(
            images, size=SIDE, fit="pad", root=Path(folder) / "cache", progress=False
        )
        rows = np.arange(len(images.manifest))
        data = augment.CachedBoxes(cached, rows, images.boxes, transform=augment.box_transform())
        paths = [images.root / path for path in images.manifest["path"]]
        own = [images.boxes[images.boxes["image"] == row] for row in rows]
        boxes = [table[CORNERS].to_numpy() for table in own]
        labels = [table["label"].to_numpy() for table in own]
        transform = original_transform()
        cases = {
            "seed": lambda: [
                original_sample(*one, transform) for one in zip(paths, boxes, labels, strict=True)
            ],
            "cache": lambda: [data[i] for i in range(len(data))],
            "cache, as float": lambda: [data[i][0].float().div_(255) for i in range(len(data))],
        }
        time_of = seconds(cases, rounds=options.rounds, device="cpu", group="loader")
    against = f"PIL RGB decode of {SIDE} px PNG + albumentations in RGB -> float32"
    return [
        (
            "sample from cache + augmentation, one channel -> uint8",
            against,
            time_of["seed"] / time_of["cache"],
            ">= 3x",
        ),
        (
            "the same, turned into float32 by the loader",
            against,
            time_of["seed"] / time_of["cache, as float"],
            "",
        ),
    ]


def original_transform() -> A.Compose:
    """The published study's augmentation, in the words that albumentations 2 understands."""
    return A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.Affine(
                translate_percent=(-0.0625, 0.0625), scale=(0.9, 1.1), rotate=(-15, 15), p=0.5
            ),
            A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
            A.CoarseDropout(p=0.2),
        ],
        bbox_params=A.BboxParams(
            format="pascal_voc", label_fields=["labels"], min_visibility=0.1, clip=True
        ),
        seed=0,
    )


def original_sample(
    path: Path, boxes: np.ndarray, labels: np.ndarray, transform: A.Compose
) -> tuple[Tensor, dict]:
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    moved = transform(image=pixels, bboxes=boxes, labels=labels)
    target = {"boxes": torch.as_tensor(moved["bboxes"]), "labels": torch.as_tensor(moved["labels"])}
    return torch.from_numpy(moved["image"]).permute(2, 0, 1).float() / 255, target


GROUPS = {"evaluator": evaluator, "sweep": sweep, "fusion": fusion, "loader": loader}

if __name__ == "__main__":
    main()
