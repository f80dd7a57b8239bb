"""Detectors: what goes in, frozen parts, saving, the scale that reaches the network."""

import pytest
import torch
from torch import nn

from dlia_utils import models
from dlia_utils.device import fingerprint
from dlia_utils.models import mobilenet_v2
from dlia_utils.models.detector import (
    ARCHITECTURES,
    LIGHT,
    MOBILENET_V2,
    RESNET50,
    Detector,
    faster_rcnn,
    scaled,
)
from dlia_utils.objectives import detection

SMALL = {"num_classes": 2, "size": 64, "rpn_pre_nms": 50, "rpn_post_nms": 20, "roi_batch": 16}


@pytest.fixture(scope="module")
def light():
    return faster_rcnn(**SMALL).eval()


def pixels(n=1):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 1, 64, 64), dtype=torch.uint8, generator=generator)


def target(*labels):
    boxes = torch.tensor([[8.0, 8, 40, 48]] * len(labels)).reshape(-1, 4)
    return [{"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64)}]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_trains_detects_and_comes_back_from_its_file(arch, tmp_path):
    model, images = faster_rcnn(arch=arch, **SMALL, freeze_bn=True), pixels()
    loss, logits = detection()(model.train(), images, target(1))
    loss.backward()
    assert loss.isfinite() and logits is None
    loaded = models.load(models.save(model, tmp_path / "model.pt", meta={}))
    ours, theirs = model.eval()(images)[0], loaded(images)[0]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(ours["labels"]) and set(ours["labels"].tolist()) <= {1, 2}


def test_settings_reach_the_model(light):
    heads, transform = light.rcnn.roi_heads, light.rcnn.transform
    assert heads.nms_thresh == 0.3  # the original study said 0.3 and left 0.5
    assert heads.score_thresh == 0.001 and light.rcnn.rpn.post_nms_top_n() == 20
    assert transform.min_size == (64,) and transform.max_size == 64
    assert heads.box_predictor.cls_score.out_features == 3  # two findings and the background


def test_bytes_and_floats_are_the_same_image_and_one_channel_is_not_copied(light):
    images = pixels(2)
    from_bytes, from_floats = light(images), light(images.float().div(255).expand(-1, 3, -1, -1))
    for a, b in zip(from_bytes, from_floats, strict=True):
        assert torch.equal(a["boxes"], b["boxes"])
    image = torch.rand(1, 1, 8, 8)
    assert Detector.pixels(image).data_ptr() == image.data_ptr()


@pytest.mark.parametrize("value", [1.5, -2.0])
def test_images_normalised_before_and_label_zero_are_refused(light, value):
    with pytest.raises(ValueError, match=r"expected \[0, 1\]: the detector normalises"):
        light(torch.full((1, 1, 64, 64), value))
    with pytest.raises(ValueError, match="labels start at 1"):
        light(torch.zeros(1, 1, 64, 64), target(0))


def test_an_image_without_boxes_trains_and_frozen_batch_norm_stays_as_it_is():
    model = faster_rcnn(**SMALL, freeze_bn=True).train()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    before = [layer.running_mean.clone() for layer in norms]
    loss, _ = detection()(model, torch.rand(2, 1, 64, 64), target() + target(2))
    loss.backward()
    assert loss.isfinite()
    assert norms and all(not layer.training and layer.weight.grad is None for layer in norms)
    for layer, old in zip(norms, before, strict=True):
        assert torch.equal(layer.running_mean, old)


def test_trainable_stages_are_counted_from_the_end():
    def learning(arch, stages):
        body = faster_rcnn(arch=arch, **SMALL, trainable_layers=stages).rcnn.backbone.body
        return {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}

    assert learning(RESNET50, 0) == set()
    assert learning(RESNET50, 2) == {"layer3", "layer4"}
    assert learning(RESNET50, 5) == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    assert "0" in learning(MOBILENET_V2, 5) and "0" not in learning(MOBILENET_V2, 4)
    assert min(map(int, learning(LIGHT, 1))) > min(map(int, learning(LIGHT, 3))) > 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"arch": "yolo"}, "unknown arch"),
        ({"roi_batches": 3}, r"unknown options \['roi_batches'\]"),
        ({"weights": "imagenet"}, "do not go with"),
        ({"arch": MOBILENET_V2, "anchor_sizes": [(8,)] * 3}, "has 3 levels; MobileNetV2's"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        faster_rcnn(**(SMALL | wrong))


def test_own_anchors_replace_the_head():
    model = faster_rcnn(**SMALL, anchor_sizes=[(8, 12), (16, 24), (32, 48)])
    assert model.rcnn.rpn.anchor_generator.num_anchors_per_location() == [6, 6, 6]


def test_anchors_for_four_levels_leave_out_the_finest():
    x, wide = torch.zeros(1, 1, 64, 64), [(8 * 2**k,) for k in range(5)]
    for levels, finest in ((wide, 16), (wide[1:], 8)):
        model = faster_rcnn(arch=MOBILENET_V2, **SMALL, anchor_sizes=levels).eval()
        maps = model.rcnn.backbone(x.expand(-1, 3, -1, -1))
        assert len(maps) == len(levels) and maps["0"].shape[-1] == finest
        assert model.rcnn.roi_heads.box_roi_pool.featmap_names == list(maps)[:-1]
        assert set(model(x)[0]) == {"boxes", "labels", "scores"}


def test_weights_depend_on_the_seed_and_leave_the_callers_randomness():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, two, other = (fingerprint(faster_rcnn(**SMALL, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert one == two != other


def test_pretrained_features_are_really_taken(tmp_path):
    state = mobilenet_v2(seed=3).backbone.state_dict()
    features = {key: value for key, value in state.items() if not key.startswith("classifier")}
    torch.save(features, tmp_path / "features.pth")
    model = faster_rcnn(arch=MOBILENET_V2, **SMALL, weights=tmp_path / "features.pth")
    body = model.rcnn.backbone.body.state_dict()
    assert all(torch.equal(value, state[f"features.{key}"]) for key, value in body.items())


def test_a_scale_reaches_the_network_and_boxes_stay_in_input_pixels(light):
    """Resizing the image beforehand does not: the model's transform makes every input one size."""
    seen, body = [], light.rcnn.backbone
    handle = body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    for side in (58, 64, 70):
        light(torch.zeros(1, 1, side, side))
    for scale in (0.5, 1.0, 1.5):
        with scaled(light, scale):
            (found,) = light(torch.zeros(1, 1, 64, 64))
            assert found["boxes"].max() <= 64
    handle.remove()
    assert seen == [64, 64, 64, 32, 64, 96]
    with pytest.raises(RuntimeError, match="stop"), scaled(light, 2.0):
        raise RuntimeError("stop")
    assert light.rcnn.transform.min_size == (64,) and light.rcnn.transform.max_size == 64
