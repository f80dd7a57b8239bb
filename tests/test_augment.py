from pathlib import Path

import numpy as np
import pytest
import torch

from dlia_utils import augment
from dlia_utils.cache import ImageCache


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "images.npy"
    images = np.random.default_rng(0).integers(0, 256, (12, 20, 20), dtype=np.uint8)
    np.save(path, images)
    return ImageCache(np.load(path, mmap_mode="r"), 20, "key", Path(path.parent), ())


def images(cached, rows=range(12), **options):
    rows = np.asarray(rows)
    return augment.CachedImages(cached, rows, rows % 2, transform=augment.train_transform(), **options)


def pixels(dataset, epoch):
    dataset.set_epoch(epoch)
    return {row: x for x, _, row in (dataset[i] for i in range(len(dataset)))}


def test_plain_items(cached):
    dataset = augment.CachedImages(cached, [5, 2], [1, 0])
    x, y, row = dataset[0]
    assert len(dataset) == 2 and (y, row) == (1, 5) and x.shape == (1, 20, 20) and x.dtype == torch.float32
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
