import random
import warnings
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from dlia_utils.data import augment
from dlia_utils.data.cache import ImageCache

SIDE = 96


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (12, 20, 20), dtype=np.uint8))
    shapes = np.full((12, 2), 20)
    return ImageCache(np.load(path, mmap_mode="r"), 20, "key", Path(path.parent), (), shapes)


def images(cached, rows=range(12), **options):
    rows, transform = np.asarray(rows), augment.train_transform()
    return augment.CachedImages(cached, rows, rows % 2, transform=transform, **options)


def pixels(dataset, epoch):
    dataset.set_epoch(epoch)
    return {row: x for x, _, row in (dataset[i] for i in range(len(dataset)))}


def test_items_plain_and_augmented(cached):
    before, dataset = np.array(cached.images), augment.CachedImages(cached, [5, 2], [1, 0])
    x, y, row = dataset[0]
    assert len(dataset) == 2 and (y, row) == (1, 5) and torch.equal(x, cached.batch([5])[0])
    for x in pixels(images(cached), 0).values():
        assert x.shape == (1, 20, 20) and x.dtype == torch.float32 and 0 <= x.min() <= x.max() <= 1
    assert np.array_equal(before, cached.images)


def test_depends_on_seed_epoch_and_row_only(cached):
    whole = pixels(images(cached), 3)
    dataset = images(cached, rows=[7, 1, 4])  # Other rows, other order, other epochs before.
    for epoch in (0, 9, 3):
        some = pixels(dataset, epoch)
    assert all(torch.equal(some[row], whole[row]) for row in (7, 1, 4))
    assert not torch.equal(pixels(images(cached), 4)[7], whole[7])
    assert not torch.equal(pixels(images(cached, seed=1), 3)[7], whole[7])


@pytest.fixture
def boxed():
    """Six images with a bright rectangle each, as `CachedBoxes` needs them, and the box table."""
    rng = np.random.default_rng(0)
    images, rows = rng.integers(20, 60, (6, SIDE, SIDE), dtype=np.uint8), []
    for image in range(6):
        x, y = rng.integers(20, 50, 2)
        images[image, y : y + 20, x : x + 24] = 250
        rows.append((image, 2.0 * x, 2.0 * y, 2.0 * (x + 24), 2.0 * (y + 20), 1 + image % 3))
    boxes = pd.DataFrame(rows, columns=["image", "x1", "y1", "x2", "y2", "label"])
    shapes = np.full((6, 2), 2 * SIDE)  # the originals are twice as large
    return ImageCache(images, SIDE, "", Path(), (), shapes), boxes


def bright(image):
    rows, columns = np.where(np.asarray(image) > 150)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_targets_are_in_pixels_of_the_cached_image(boxed):
    cache, boxes = boxed
    items = augment.CachedBoxes(cache, [4, 1], boxes)
    image, target = items[0]
    assert image.dtype == torch.uint8 and image.shape == (1, SIDE, SIDE)
    assert target["boxes"].tolist() == [bright(image[0]).tolist()]
    assert target["labels"].tolist() == [2] and int(target["image_id"]) == 4
    stacked, targets = augment.collate_boxes([items[0], items[1]])
    assert stacked.shape == (2, 1, SIDE, SIDE) and len(targets) == 2
    without = augment.CachedBoxes(cache, [0], boxes.iloc[1:], transform=augment.box_transform())
    assert without[0][1]["boxes"].shape == (0, 4) and without[0][1]["labels"].shape == (0,)


def test_boxes_follow_the_image(boxed):
    cache, boxes = boxed
    items = augment.CachedBoxes(cache, range(6), boxes, transform=augment.box_transform())
    moved = 0
    for epoch in range(4):
        items.set_epoch(epoch)
        for image, target in (items[k] for k in range(6)):
            seen = bright(image[0])
            assert np.abs(target["boxes"][0].numpy() - seen).max() <= 4  # turned by 10 degrees
            moved += not np.array_equal(seen, bright(cache.images[int(target["image_id"])]))
    assert moved > 10


def test_boxes_are_clipped_slivers_dropped_and_turned_ones_do_not_grow():
    transform, image = augment.box_transform(flip=0), np.zeros((200, 200), np.uint8)
    corner, middle, lost = [[0, 0, 24, 24.0]], [[80, 80, 120, 120.0]], 0
    for seed in range(60):
        transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        out = transform(image=image, bboxes=np.array(corner + middle), labels=[1, 2])
        assert len(out["bboxes"]) == len(out["labels"])
        lost += 1 not in out["labels"]
        for (x1, y1, x2, y2), label in zip(out["bboxes"], out["labels"], strict=True):
            assert 0 <= x1 < x2 <= 200 and 0 <= y1 < y2 <= 200
            assert label == 1 or (x2 - x1) * (y2 - y1) < 1.05 * 1.1**2 * 1600
    assert 0 < lost < 60


def test_dropout_erases_but_never_most_of_a_finding():
    transform, image = augment.box_transform(flip=0), np.full((200, 200), 255, np.uint8)
    small, erased = np.array([[50, 50, 58, 58.0], [100, 100, 180, 180]]), 0
    for seed in range(300):
        transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        out = transform(image=image, bboxes=small, labels=[1, 2])
        for x1, y1, x2, y2 in np.rint(out["bboxes"]).astype(int):
            assert (out["image"][y1:y2, x1:x2] == 0).mean() <= 0.5
        erased += bool((out["image"] == 0).any())
    assert erased > 20


def test_albumentations_ignores_no_argument():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it only warns of what it does not know
        augment.box_transform(), augment.train_transform()


def test_no_step_depends_on_another(cached):
    """albumentations' set_random_seed gives all of them the same numbers."""
    items = augment.CachedImages(cached, range(4), range(4), transform=augment.train_transform())
    taken = []
    for epoch in range(200):
        items.set_epoch(epoch)
        for row in range(4):
            items.seed_transform(row)
            draws = augment.drawn(items.transform, (8, 8))
            names = ("HorizontalFlip", "RandomBrightnessContrast", "RandomGamma", "GaussianBlur")
            taken.append([name in draws for name in names] + [draws["Affine"]["matrix"][0, 2]])
    shares = np.mean(taken, axis=0)[:4]
    assert np.abs(shares - [0.5, 0.8, 0.5, 0.2]).max() < 0.06
    apart = np.corrcoef(np.array(taken, float).T) - np.eye(5)
    assert np.abs(apart).max() < 0.12, apart.round(2)


@pytest.mark.parametrize("side", [20, 63])
def test_on_a_device_the_images_are_those_of_the_cpu_whoever_comes_first(cached, side):
    smooth = [cv2.resize(cv2.GaussianBlur(one, (0, 0), 2), (side, side)) for one in cached.images]
    cached = replace(cached, images=np.stack(smooth * 25))
    rows, labels, plain = np.arange(300), np.arange(300) % 2, augment.train_transform()
    how = dict(transform=plain, seed=3, balanced=True)
    own = augment.CachedImages(cached, rows, labels, device="cpu", **how)
    theirs = augment.CachedImages(cached, rows, labels, **how)
    for epoch in (1, 0):
        own.set_epoch(epoch), theirs.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(own, batch_size=64)
        x, y, row = (torch.cat(part) for part in zip(*loader, strict=True))
        want = [
            torch.stack(part)
            for part in zip(*(map(torch.as_tensor, theirs[k]) for k in rows), strict=True)
        ]
        assert torch.equal(y, want[1]) and torch.equal(row, want[2])
        apart = (255 * (x - want[0])).abs()  # grey levels; a gamma below 1 spreads dark ones
        assert (apart > 0.5).float().mean() < 1e-3 and apart.max() < 5
        assert (x.std(0) - want[0].std(0)).abs().max() < 1e-3
    assert torch.equal(own[7][0], theirs[7][0]) and own[7][1:] == theirs[7][1:]


def test_workers_draw_different_and_reproducible_parameters(boxed):
    """albumentations 2.0.8 by itself gives every worker and every epoch the same ones."""
    cache, boxes = boxed
    cache.images[:] = cache.images[0]
    boxes = boxes.assign(**{name: boxes[name][0] for name in ("x1", "y1", "x2", "y2")})

    def draw(workers, epoch):
        transform = augment.box_transform()
        items = augment.CachedBoxes(cache, range(6), boxes, transform=transform, seed=5)
        items.set_epoch(epoch)
        options = dict(num_workers=workers, collate_fn=augment.collate_boxes)
        loader = torch.utils.data.DataLoader(items, batch_size=1, **options)
        return [tuple(targets[0]["boxes"].flatten().tolist()) for _, targets in loader]

    two = draw(2, 0)
    assert len(set(two)) >= 3  # half of the images are flipped at most, and the box may be the same
    assert two == draw(0, 0) == draw(2, 0) != draw(2, 1)


def test_workers_survive_opencvs_threads_and_the_process_keeps_them(cached):
    """A forked worker would wait for ever for OpenCV's pool; only the worker goes without it."""
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        cv2.GaussianBlur(np.zeros((3000, 3000), np.uint8), (0, 0), 3)  # starts the pool
        found, dataset = [], images(cached)
        for workers in (0, 2):
            loader = torch.utils.data.DataLoader(dataset, batch_size=5, num_workers=workers)
            found.append(torch.cat([x for x, _, _ in loader]))
        assert torch.equal(*found) and cv2.getNumThreads() == 4
    finally:
        cv2.setNumThreads(before)


def test_balanced_draws_every_class_equally_often_anew_each_epoch_and_the_same_after_a_kill(cached):
    labels = np.array([0] * 90 + [1] * 10)
    drawn, again = (
        augment.CachedImages(cached, np.arange(100), labels, balanced=True, seed=1) for _ in "ab"
    )
    first = drawn.order
    drawn.set_epoch(1)
    assert len(drawn) == 100 and np.bincount(labels[drawn.order]).tolist() == [50, 50]
    assert not np.array_equal(first, drawn.order)
    again.set_epoch(1)
    assert np.array_equal(again.order, drawn.order)
