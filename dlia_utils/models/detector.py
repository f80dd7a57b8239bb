"""Faster R-CNN detectors (torchvision) that take grey images in [0, 1] or bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from ..units import check_numbers
from .layers import check_sizes, drawn
from .mobilenet import load_weights, network
from .pixel import load_strictly

RESNET50 = "fasterrcnn_resnet50_fpn_v2"
LIGHT = "fasterrcnn_mobilenet_v3_large_320_fpn"
MOBILENET_V2 = "fasterrcnn_mobilenet_v2_fpn"
ARCHITECTURES = (RESNET50, LIGHT, MOBILENET_V2)
STAGES = 5  # resolutions 1/2 to 1/32 of a backbone
OPTIONS = {  # ours -> torchvision's names, and the usual value
    "nms": ("box_nms_thresh", 0.3),  # class-wise IoU of the last suppression
    "score_floor": ("box_score_thresh", 0.001),  # mAP needs the low scores too
    "detections": ("box_detections_per_img", 100),
    "rpn_pre_nms": ("rpn_pre_nms_top_n_train rpn_pre_nms_top_n_test", 1000),
    "rpn_post_nms": ("rpn_post_nms_top_n_train rpn_post_nms_top_n_test", 500),
    "roi_batch": ("box_batch_size_per_image", 256),
}


class Detector(nn.Module):
    """A Faster R-CNN that takes [B, 1 or 3, H, W]: bytes (uint8) or floats in [0, 1].

    In training mode `model(images, targets)` gives the dict of losses, in eval mode
    `model(images)` one dict (boxes xyxy in pixels of the input, labels from 1, scores) per image.
    freeze_bn: every batch norm keeps its running statistics, which few images a step would make
    noise. Raises: ValueError for floats outside [0, 1] and for labels below 1, the background.
    """

    def __init__(
        self, rcnn: FasterRCNN, *, freeze_bn: bool = False, recipe: dict | None = None
    ) -> None:
        super().__init__()
        self.rcnn, self.freeze_bn, self.recipe = rcnn, freeze_bn, recipe
        self.frozen = [m for m in rcnn.modules() if isinstance(m, _BatchNorm) and freeze_bn]
        for layer in self.frozen:
            layer.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        for layer in self.frozen:
            layer.eval()
        return self

    def forward(
        self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if any((target["labels"] < 1).any() for target in targets or []):
            raise ValueError("a label below 1: labels start at 1, for 0 is the background")
        return self.rcnn(list(self.pixels(images)), targets)

    @staticmethod
    def pixels(images: Tensor) -> Tensor:
        """Images as float [B, 3, H, W] in [0, 1]; one channel is repeated without a copy."""
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        elif images.numel() and (images.amin() < 0 or images.amax() > 1):
            span = f"images lie in [{images.min():.3g}, {images.max():.3g}], expected [0, 1]"
            raise ValueError(f"{span}: the detector normalises them itself, leave yours out")
        return images.expand(-1, 3, -1, -1)


def faster_rcnn(
    *,
    arch: str = LIGHT,
    num_classes: int,
    size: int,
    weights: str | Path | None = None,
    trainable_layers: int = STAGES,
    freeze_bn: bool = False,
    anchor_sizes: Sequence[Sequence[float]] | None = None,
    channels: int = 128,
    width: float = 1.0,
    seed: int = 0,
    **options: float,
) -> Detector:
    """Faster R-CNN with an FPN (Ren et al. 2015, 1506.01497; Lin et al. 2017, 1612.03144).

    num_classes: without the background. size: the longest side to which every image is resized.
    weights: None (drawn from `seed`), "coco" (torchvision's two), or, for the MobileNetV2 backbone,
    "imagenet" or a file; the class head is always new. The last `trainable_layers` of the
    backbone's 5 resolution stages learn. anchor_sizes: a tuple per pyramid level; MobileNetV2 has
    five, or four without the finest. channels, width: of the MobileNetV2 backbone. options: see
    `OPTIONS`. Raises: ValueError (arguments), RuntimeError (weights without internet),
    FileNotFoundError.

    >>> model = faster_rcnn(num_classes=8, size=64, rpn_post_nms=20).eval()
    >>> sorted(model(torch.zeros(1, 1, 64, 64))[0])
    ['boxes', 'labels', 'scores']
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown arch {arch!r}; known: {', '.join(ARCHITECTURES)}")
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"unknown options {unknown}; known: {', '.join(OPTIONS)}")
    check_sizes(num_classes=num_classes, size=size, channels=channels, width=width, seed=seed)
    check_numbers(f"[0,{STAGES}]", whole=True, trainable_layers=trainable_layers)
    for name, value in options.items():
        share = name in ("nms", "score_floor")
        check_numbers("[0,1]" if share else "[1,inf)", whole=not share, **{name: value})
    if weights is not None and (arch == MOBILENET_V2) == (str(weights) == "coco"):
        known = "a file or 'imagenet'" if arch == MOBILENET_V2 else "'coco'"
        raise ValueError(f"weights={str(weights)!r} do not go with {arch}; known: None, {known}")
    recipe = dict(name="faster_rcnn", arch=arch, num_classes=num_classes, size=size, width=width)
    recipe |= dict(freeze_bn=freeze_bn, trainable_layers=trainable_layers, channels=channels)
    recipe |= dict(anchor_sizes=anchor_sizes and [list(level) for level in anchor_sizes])
    chosen = dict(min_size=size, max_size=size, rpn_score_thresh=0.0)
    for name, (theirs, usual) in OPTIONS.items():
        recipe[name] = options.get(name, usual)
        chosen |= dict.fromkeys(theirs.split(), recipe[name])
    if arch == MOBILENET_V2:
        sides = channels, width
        rcnn = drawn(seed, _mobilenet_v2_fpn, num_classes, *sides, anchor_sizes, weights, chosen)
    else:
        rcnn = drawn(seed, _torchvision, arch, num_classes, anchor_sizes, weights, chosen)
    _freeze_stages(rcnn.backbone.body, STAGES - trainable_layers)
    return Detector(rcnn, freeze_bn=freeze_bn, recipe=recipe)


@contextmanager
def scaled(model: Detector, scale: float) -> Iterator[Detector]:
    """The detector looking at its images `scale` times as large; boxes stay in input pixels.

    An image resized beforehand would be resized back by the model's own transform.

    >>> model = faster_rcnn(num_classes=1, size=100)
    >>> with scaled(model, 0.9):
    ...     print(model.rcnn.transform.max_size)
    90
    """
    transform = model.rcnn.transform
    kept = transform.min_size, transform.max_size
    transform.min_size = tuple(round(side * scale) for side in kept[0])
    transform.max_size = round(kept[1] * scale)
    try:
        yield model
    finally:
        transform.min_size, transform.max_size = kept


def _torchvision(arch, num_classes, anchor_sizes, weights, options) -> FasterRCNN:
    """A detector of torchvision's, always with plain batch norms, whatever the `weights`."""
    build = getattr(detection, arch)
    rcnn = build(weights=None, weights_backbone=None, num_classes=91, **options)  # as in COCO
    if weights is not None:
        coco = torchvision.models.get_model_weights(arch).DEFAULT
        try:
            state = coco.get_state_dict(progress=False, check_hash=True)
        except OSError as error:
            fix = "switch the internet on, or train from scratch with weights=None"
            raise RuntimeError(f"the COCO weights could not be downloaded: {fix}") from error
        load_strictly(rcnn, state, origin="the file of COCO weights")
    features = rcnn.roi_heads.box_predictor.cls_score.in_features
    rcnn.roi_heads.box_predictor = FastRCNNPredictor(features, num_classes + 1)
    if anchor_sizes is not None:
        heads = _anchors(anchor_sizes, rcnn.backbone.out_channels)
        rcnn.rpn.anchor_generator, rcnn.rpn.head = heads
    return rcnn


def _anchors(sizes, channels: int) -> tuple[AnchorGenerator, nn.Module]:
    sizes = tuple(tuple(level) for level in sizes)
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return generator, detection.rpn.RPNHead(channels, generator.num_anchors_per_location()[0])


def _mobilenet_v2_fpn(num_classes, channels, width, anchor_sizes, weights, options) -> FasterRCNN:
    """MobileNetV2 with pyramid levels at strides 4 to 64; two anchor sizes per level by default.

    Anchors for four levels only leave out the finest, which costs as much as all the others.
    """
    # The last 1x1 convolution serves the classifier.
    features = load_weights(network(2, width), weights).features[:-1]
    sizes = anchor_sizes or tuple((4.0 * stride, 5.7 * stride) for stride in (4, 8, 16, 32, 64))
    if len(sizes) not in (4, 5):
        raise ValueError(f"anchor_sizes has {len(sizes)} levels; MobileNetV2's pyramid has 5 or 4")
    ends = ("3", "6", "13", "17")[5 - len(sizes) :]
    names = [str(level) for level in range(len(ends))]
    depths = [features[int(end)].conv[-1].num_features for end in ends]
    backbone = BackboneWithFPN(features, dict(zip(ends, names, strict=True)), depths, channels)
    generator, head = _anchors(sizes, channels)
    options = dict(rpn_anchor_generator=generator, rpn_head=head) | options
    pool = MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2)  # torchvision's, less a level
    return FasterRCNN(backbone, num_classes + 1, box_roi_pool=pool, **options)


def _freeze_stages(body: nn.Module, frozen: int) -> None:
    """Stop the first `frozen` resolution stages of a backbone from learning."""
    stage = 0
    for child in body.children():
        # A stage begins with the layer that halves the resolution, or is ResNet's layer1.
        halves = any(isinstance(m, nn.Conv2d) and max(m.stride) > 1 for m in child.modules())
        stage += halves or child is getattr(body, "layer1", None)
        if stage <= frozen:
            child.requires_grad_(False)
