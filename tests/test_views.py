"""Test-time augmentation: every view's boxes come back exactly where they belong."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from dlia_utils.detect.views import COLUMNS, VIEWS, View, predict
from dlia_utils.device import fingerprint
from dlia_utils.models.detector import Detector, faster_rcnn

SIZE = 100
# Multiples of ten: 0.9 and 1.1 times them are whole pixels, so that even a resized edge is sharp.
BOXES = np.array([[10, 20, 50, 40], [60, 30, 90, 80], [0, 0, 100, 100], [20, 70, 30, 100]], float)


class FindsTheBrightBox(nn.Module):
    """Returns the rectangle that is brighter than half of the image's brightest pixel.

    Resizing and the way back are torchvision's own, as in a real detector.
    """

    def __init__(self):
        super().__init__()
        self.rcnn = nn.Module()
        self.rcnn.transform = GeneralizedRCNNTransform(SIZE, SIZE, [0.0] * 3, [1.0] * 3)
        self.weight = nn.Parameter(torch.zeros(1))
        self.sides = []

    def forward(self, images):
        sizes = [tuple(image.shape[-2:]) for image in images]
        shown, _ = self.rcnn.transform(list(Detector.pixels(images)))
        self.sides.append(shown.image_sizes[0])
        found = []
        for image, (height, width) in zip(shown.tensors, shown.image_sizes, strict=True):
            image = image[0, :height, :width]
            rows, columns = torch.where(image > image.max() / 2)
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            box = {"boxes": torch.stack(corners).float()[None], "labels": torch.tensor([1])}
            found.append(box | {"scores": image.max()[None]})
        return self.rcnn.transform.postprocess(found, shown.image_sizes, sizes)


def fake_cache(shapes=None):
    """What `predict` needs of an `ImageCache`: bytes, shapes and the scale between them."""
    images = np.full((len(BOXES), SIZE, SIZE), 40, np.uint8)
    for image, (x1, y1, x2, y2) in zip(images, BOXES.astype(int), strict=True):
        image[y1:y2, x1:x2] = 200
    shapes = np.array(shapes or [(SIZE, SIZE)] * len(BOXES))

    def scale(rows):
        return np.repeat(SIZE / shapes[np.asarray(rows)].max(1)[:, None], 2, axis=1)

    return SimpleNamespace(images=images, shapes=shapes, size=SIZE, scale=scale)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_the_inverse_of_every_view_is_exact(view):
    table = predict(FindsTheBrightBox(), fake_cache(), range(4), views=[view], progress=False)
    np.testing.assert_allclose(table[["x1", "y1", "x2", "y2"]], BOXES, atol=1e-4)


def test_scales_really_differ_and_brightness_is_fixed():
    model = FindsTheBrightBox()
    table = predict(model, fake_cache(), [0], views=VIEWS, progress=False)
    assert [height for height, _ in model.sides] == [100, 90, 110, 100, 100, 100]
    scores = table.sort_values("view")["score"].to_numpy()
    assert (scores[4:] / scores[0]).tolist() == pytest.approx([0.9, 1.1], rel=1e-5)


def test_boxes_come_back_in_original_pixels_and_inside_the_image():
    # An image of 200 x 100 (height, width) lies in the left half of its padded square.
    padded = fake_cache([(200, 100)] * 4)
    table = predict(FindsTheBrightBox(), padded, [0, 1, 2], progress=False)
    assert table["image"].tolist() == [0, 2]  # image 1's box lies in the padding
    expected = [[20, 40, 100, 80], [0, 0, 100, 200]]
    assert table[["x1", "y1", "x2", "y2"]].to_numpy().tolist() == expected
    white = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    assert View("bright", brightness=1.5).show(white).max() == 1.0


@pytest.fixture(scope="module")
def small():
    return faster_rcnn(num_classes=2, size=SIZE, rpn_pre_nms=50, rpn_post_nms=20, freeze_bn=True)


def test_predictions_are_deterministic_whatever_the_batch(small):
    given, options = (small, fake_cache(), [3, 0, 2]), {"views": VIEWS, "progress": False}
    one, two, again = (predict(*given, batch_size=size, **options) for size in (1, 3, 3))
    assert list(one.columns) == list(COLUMNS) and len(one)
    assert two.equals(again)
    np.testing.assert_allclose(one.to_numpy(), two.to_numpy(), atol=1e-2)
    assert set(one["view"]) == set(range(len(VIEWS)))


def test_the_model_is_left_as_it_was(small):
    small.train()
    before, flags = fingerprint(small), [module.training for module in small.modules()]
    predict(small, fake_cache(), [0], views=VIEWS, progress=False)
    assert fingerprint(small) == before
    assert [module.training for module in small.modules()] == flags
    assert small.rcnn.transform.min_size == (SIZE,)


def test_no_images_give_an_empty_table(small):
    table = predict(small, fake_cache(), [], progress=False)
    assert len(table) == 0 and set(COLUMNS) == set(table.columns)
