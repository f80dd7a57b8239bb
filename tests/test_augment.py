from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from dlia_utils.data import augment
from dlia_utils.data.cache import ImageCache


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "images.npy"
    images = np.random.default_rng(0).integers(0, 256, (12, 20, 20), dtype=np.uint8)
    np.save(path, images)
    return ImageCache(
        np.load(path, mmap_mode="r"),
        20,
        "key",
        Path(path.parent),
        (),
        np.full((12, 2), 20),
        "squash",
    )


def images(cached, rows=range(12), **options):
    rows = np.asarray(rows)
    return augment.CachedImages(
        cached, rows, rows % 2, transform=augment.train_transform(), **options
    )


def pixels(dataset, epoch):
    dataset.set_epoch(epoch)
    return {row: x for x, _, row in (dataset[i] for i in range(len(dataset)))}


def test_plain_items(cached):
    dataset = augment.CachedImages(cached, [5, 2], [1, 0])
    x, y, row = dataset[0]
    assert (
        len(dataset) == 2
        and (y, row) == (1, 5)
        and x.shape == (1, 20, 20)
        and x.dtype == torch.float32
    )
    assert torch.equal(x, cached.batch([5])[0])


def test_augmented_items_stay_in_range_and_leave_the_cache(cached):
    before = np.array(cached.images)
    for x in pixels(images(cached), 0).values():
        assert x.shape == (1, 20, 20) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    assert np.array_equal(before, cached.images)


def test_depends_on_seed_epoch_and_row_only(cached):
    whole = pixels(images(cached), 3)
    dataset = images(cached, rows=[7, 1, 4])  # Other rows, other order, other epochs before.
    for epoch in (0, 9, 3):
        some = pixels(dataset, epoch)
    assert all(torch.equal(some[row], whole[row]) for row in (7, 1, 4))
    assert not torch.equal(pixels(images(cached), 4)[7], whole[7])
    assert not torch.equal(pixels(images(cached, seed=1), 3)[7], whole[7])


def test_does_not_depend_on_workers(cached):
    dataset = images(cached)
    dataset.set_epoch(2)
    loaders = [torch.utils.data.DataLoader(dataset, batch_size=5, num_workers=n) for n in (0, 2)]
    alone, forked = (torch.cat([x for x, _, _ in loader]) for loader in loaders)
    assert torch.equal(alone, forked)


def test_rows_and_labels_must_match(cached):
    with pytest.raises(ValueError, match="3 rows but 2 labels"):
        augment.CachedImages(cached, [0, 1, 2], [0, 1])


# ------------------------------------------------------------------------------------------------- with boxes


SIDE = 96


@pytest.fixture
def films():
    """Six films with a bright rectangle each, as `CachedBoxes` needs them, and the box table."""
    rng = np.random.default_rng(0)
    images = rng.integers(20, 60, (6, SIDE, SIDE), dtype=np.uint8)
    rows = []
    for image in range(6):
        x, y = rng.integers(20, 50, 2)
        images[image, y : y + 20, x : x + 24] = 250
        rows.append((image, 2.0 * x, 2.0 * y, 2.0 * (x + 24), 2.0 * (y + 20), 1 + image % 3))
    boxes = pd.DataFrame(rows, columns=["image", "x1", "y1", "x2", "y2", "label"])
    scale = lambda rows: np.full((len(rows), 2), 0.5)  # noqa: E731 (the originals are twice as large)
    return SimpleNamespace(images=images, scale=scale), boxes


def bright(image):
    rows, columns = np.where(np.asarray(image) > 150)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_targets_are_in_pixels_of_the_cached_image(films):
    cache, boxes = films
    items = augment.CachedBoxes(cache, [4, 1], boxes)
    image, target = items[0]
    assert image.dtype == torch.uint8 and image.shape == (1, SIDE, SIDE)
    assert target["boxes"].tolist() == [bright(image[0]).tolist()]
    assert (
        target["boxes"].dtype == torch.float32
        and target["labels"].tolist() == [2]
        and int(target["image_id"]) == 4
    )


def test_boxes_follow_the_image(films):
    cache, boxes = films
    items = augment.CachedBoxes(
        cache, range(6), boxes, transform=augment.box_transform(affine=1, rotate=0, dropout=0)
    )
    moved = 0
    for epoch in range(3):
        items.set_epoch(epoch)
        for image, target in items:
            seen = bright(image[0])
            assert np.abs(target["boxes"][0].numpy() - seen).max() <= 1.5
            moved += not np.array_equal(seen, bright(cache.images[int(target["image_id"])]))
    assert moved > 10


def test_the_box_of_a_turned_square_does_not_grow():
    image = np.zeros((200, 200), np.uint8)
    turn = augment.box_transform(
        flip=0, shift=0, zoom=0, rotate=15, affine=1, exposure=0, dropout=0
    )
    growth = []
    for seed in range(20):
        turn.set_random_seed(seed)
        x1, y1, x2, y2 = turn(image=image, bboxes=np.array([[80, 80, 120, 120.0]]), labels=[1])[
            "bboxes"
        ][0]
        growth.append((x2 - x1) * (y2 - y1) / 1600)
    assert max(growth) < 1.05


def test_slivers_are_dropped_and_boxes_clipped():
    shifted = augment.box_transform(
        flip=0, shift=0.5, zoom=0, rotate=0, affine=1, exposure=0, dropout=0
    )
    image, kept = np.zeros((100, 100), np.uint8), []
    for seed in range(60):
        shifted.set_random_seed(seed)
        out = shifted(image=image, bboxes=np.array([[0, 0, 40, 40.0]]), labels=[3])
        assert len(out["bboxes"]) == len(out["labels"])
        kept.append(len(out["bboxes"]))
        for x1, y1, x2, y2 in out["bboxes"]:
            assert 0 <= x1 < x2 <= 100 and 0 <= y1 < y2 <= 100
            assert (x2 - x1) * (y2 - y1) >= 0.3 * 1600 - 1e-3
    assert 0 < sum(kept) < 60


def test_a_box_partly_outside_or_touching_the_border_is_no_error():
    out = augment.box_transform()(
        image=np.zeros((64, 64), np.uint8), bboxes=np.array([[30, 30, 64.4, 64.2]]), labels=[1]
    )
    assert len(out["bboxes"]) == 1


def test_images_without_boxes_stay_in_the_set(films):
    cache, boxes = films
    items = augment.CachedBoxes(cache, [0], boxes.iloc[1:], transform=augment.box_transform())
    image, target = items[0]
    assert (
        target["boxes"].shape == (0, 4)
        and target["boxes"].dtype == torch.float32
        and target["labels"].shape == (0,)
    )


def test_dropout_erases_but_never_most_of_a_finding():
    erase = augment.box_transform(flip=0, affine=0, exposure=0, dropout=1.0)
    image, small = (
        np.full((200, 200), 255, np.uint8),
        np.array([[50, 50, 58, 58.0], [100, 100, 180, 180]]),
    )
    erased = 0
    for seed in range(200):
        erase.set_random_seed(seed)
        out = erase(image=image, bboxes=small, labels=[1, 2])["image"]
        assert (out[50:58, 50:58] == 0).mean() <= 0.5
        erased += bool((out == 0).any())
    assert erased > 150
    erase.set_random_seed(0)
    assert np.allclose(erase(image=image, bboxes=small, labels=[1, 2])["bboxes"], small, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "wrong"),
    [
        (
            augment.A.CoarseDropout,
            {"max_holes": 8, "max_height": 32, "max_width": 32},
        ),  # the original study's
        (augment.A.Affine, {"shift_limit": 0.1}),
    ],
)
def test_arguments_that_albumentations_would_ignore_are_errors(build, wrong):
    with pytest.raises(ValueError, match="not valid"):
        augment.strict(build, **wrong)


def test_workers_draw_different_and_reproducible_parameters(films):
    """albumentations 2.0.8 by itself gives every worker the same ones, and the same again in every epoch."""
    cache, boxes = films
    assert augment.cv2.getNumThreads() <= 1  # else a forked worker may hang in OpenCV's pool
    cache.images[:] = cache.images[0]
    boxes = boxes.assign(**{name: boxes[name][0] for name in ("x1", "y1", "x2", "y2")})

    def draw(workers, epoch):
        items = augment.CachedBoxes(
            cache, range(6), boxes, transform=augment.box_transform(affine=1), seed=5
        )
        items.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(
            items, batch_size=1, num_workers=workers, collate_fn=augment.collate_boxes
        )
        return [tuple(targets[0]["boxes"].flatten().tolist()) for _, targets in loader]

    two = draw(2, 0)
    assert len(set(two)) == 6
    assert two == draw(0, 0) == draw(2, 0)
    assert not set(two) & set(draw(2, 1))


def test_label_zero_is_refused(films):
    cache, boxes = films
    with pytest.raises(ValueError, match="labels of boxes start at 1"):
        augment.CachedBoxes(cache, [0], boxes.assign(label=0))


def test_a_batch_is_a_stack_of_bytes_and_a_list_of_targets(films):
    cache, boxes = films
    images, targets = augment.collate_boxes(
        [augment.CachedBoxes(cache, [0, 1], boxes)[i] for i in range(2)]
    )
    assert images.shape == (2, 1, SIDE, SIDE) and images.dtype == torch.uint8 and len(targets) == 2


# ------------------------------------------------------------------------------------------- class balance


def test_balanced_draws_every_class_equally_often_anew_each_epoch_and_the_same_after_a_kill():
    from types import SimpleNamespace

    told = []
    data = SimpleNamespace(labels=np.array([0] * 90 + [1] * 10), set_epoch=told.append)
    drawn = augment.Balanced(data, seed=1)
    first = drawn.order
    drawn.set_epoch(1)
    assert len(drawn) == 100 and np.bincount(data.labels[drawn.order]).tolist() == [50, 50]
    assert not np.array_equal(first, drawn.order) and told == [0, 1]
    again = augment.Balanced(data, seed=1)
    again.set_epoch(1)
    assert np.array_equal(again.order, drawn.order)
