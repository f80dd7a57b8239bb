"""Faster R-CNN detectors (torchvision) that take grey images in [0, 1] or bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import detection
from torchvision.models import mobilenet_v2 as torchvision_mobilenet_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor

from .mobilenet import STAGES, load_weights, read_weights

RESNET50 = "fasterrcnn_resnet50_fpn_v2"
LIGHT = "fasterrcnn_mobilenet_v3_large_320_fpn"
MOBILENET_V2 = "fasterrcnn_mobilenet_v2_fpn"
ARCHITECTURES = (RESNET50, LIGHT, MOBILENET_V2)
COCO_WEIGHTS = {
    RESNET50: detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    LIGHT: detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1,
}
COCO_CLASSES = 91
BACKBONE_STAGES = 5  # resolutions 1/2 to 1/32
RATIOS = (0.5, 1.0, 2.0)
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
    `freeze_bn` keeps every batch normalisation at its running statistics: with four images a step
    they would be noise. Errors: ValueError for floats outside [0, 1] (normalised already?) and for
    labels below 1 (0 is the background: such a class could never be found).
    """

    def __init__(
        self, rcnn: FasterRCNN, *, freeze_bn: bool = False, recipe: dict | None = None
    ) -> None:
        super().__init__()
        self.rcnn, self.freeze_bn, self.recipe = rcnn, freeze_bn, recipe
        self._norms = [layer for layer in rcnn.modules() if isinstance(layer, _BatchNorm)]
        if freeze_bn:
            for layer in self._norms:
                layer.requires_grad_(False)
            self.train(self.training)

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        for layer in self._norms if self.freeze_bn else []:
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
            raise ValueError(
                f"images lie in [{images.min():.3g}, {images.max():.3g}], expected [0, 1]: the "
                "detector normalises them itself, leave your own normalisation out"
            )
        return images.expand(-1, 3, -1, -1)


def faster_rcnn(
    *,
    arch: str = LIGHT,
    num_classes: int,
    size: int,
    weights: str | Path | None = None,
    trainable_layers: int = BACKBONE_STAGES,
    freeze_bn: bool = False,
    anchor_sizes: Sequence[Sequence[float]] | None = None,
    channels: int = 128,
    width: float = 1.0,
    seed: int = 0,
    **options: float,
) -> Detector:
    """Faster R-CNN with an FPN (Ren et al. 2015, 1506.01497; Lin et al. 2017, 1612.03144).

    num_classes counts findings, without the background. Every image is resized so that its sides
    are at most `size`. weights: None (drawn from `seed`), "coco" (for the two torchvision
    architectures), or, for the MobileNetV2 backbone, "imagenet" or a file as in
    `models.mobilenet_v2`; the class head is always new. The last `trainable_layers` of the
    backbone's 5 resolution stages learn. anchor_sizes, one tuple per pyramid level, replaces the
    anchors and draws the region proposal head anew. channels and width belong to the MobileNetV2
    backbone. options: of `OPTIONS`, what is suppressed (`nms`, `score_floor`, `detections`) and
    what it costs (proposals `rpn_pre_nms`, `rpn_post_nms`, regions an image `roi_batch`). Raises:
    ValueError (arguments), RuntimeError (weights without internet), FileNotFoundError.

    >>> model = faster_rcnn(num_classes=8, size=64, rpn_post_nms=20).eval()
    >>> sorted(model(torch.zeros(1, 1, 64, 64))[0])
    ['boxes', 'labels', 'scores']
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown arch {arch!r}; known: {', '.join(ARCHITECTURES)}")
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"unknown options {unknown}; known: {', '.join(OPTIONS)}")
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch == MOBILENET_V2:
            rcnn = _mobilenet_v2_fpn(num_classes, channels, width, anchor_sizes, weights, chosen)
        else:
            rcnn = _torchvision(arch, num_classes, anchor_sizes, weights, chosen)
    _freeze_stages(rcnn.backbone.body, BACKBONE_STAGES - trainable_layers)
    return Detector(rcnn, freeze_bn=freeze_bn, recipe=recipe)


@contextmanager
def scaled(model: Detector, scale: float) -> Iterator[Detector]:
    """The detector looking at its images `scale` times as large; boxes stay in input pixels.

    Only here another scale really reaches the network: an image resized beforehand is resized back
    by the model's own transform.

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


# -------------------------------------------------------------------- parts


def _torchvision(arch, num_classes, anchor_sizes, weights, options) -> FasterRCNN:
    """A detector of torchvision's, always with plain batch norms, whatever the `weights`."""
    build = getattr(detection, arch)
    rcnn = build(weights=None, weights_backbone=None, num_classes=COCO_CLASSES, **options)
    if weights is not None:
        _load_coco(rcnn, COCO_WEIGHTS[arch])
    features = rcnn.roi_heads.box_predictor.cls_score.in_features
    rcnn.roi_heads.box_predictor = FastRCNNPredictor(features, num_classes + 1)
    if anchor_sizes is not None:
        levels, channels = len(rcnn.rpn.anchor_generator.sizes), rcnn.backbone.out_channels
        rcnn.rpn.anchor_generator, rcnn.rpn.head = _anchors(anchor_sizes, levels, channels)
    return rcnn


def _load_coco(rcnn: FasterRCNN, weights) -> None:
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise RuntimeError(
            "the COCO weights could not be downloaded: switch the internet on, attach them under "
            "torch's hub folder, or train from scratch with weights=None"
        ) from error
    missing, unknown = rcnn.load_state_dict(state, strict=False)
    # The light detector's weights were trained with frozen batch norms, which do not count batches.
    wrong = [key for key in missing if not key.endswith("num_batches_tracked")] + list(unknown)
    if wrong:
        raise ValueError(f"the COCO weights do not fit this torchvision: {', '.join(wrong[:10])}")


def _anchors(sizes, levels: int, channels: int) -> tuple[AnchorGenerator, nn.Module]:
    if len(sizes) != levels or len({len(level) for level in sizes}) != 1:
        raise ValueError(f"anchor_sizes must give {levels} levels equally many sizes, got {sizes}")
    generator = AnchorGenerator(tuple(tuple(level) for level in sizes), (RATIOS,) * len(sizes))
    return generator, detection.rpn.RPNHead(channels, generator.num_anchors_per_location()[0])


def _mobilenet_v2_fpn(num_classes, channels, width, anchor_sizes, weights, options) -> FasterRCNN:
    """MobileNetV2 with pyramid levels at strides 4 to 64; two anchor sizes per level by default."""
    stages = [list(stage) for stage in STAGES]
    network = torchvision_mobilenet_v2(
        num_classes=2, width_mult=width, inverted_residual_setting=stages
    )
    if weights is not None:
        load_weights(network, *read_weights(weights))
    features = network.features[:-1]  # the last 1x1 convolution serves the classifier
    ends = {"3": "0", "6": "1", "13": "2", "17": "3"}
    depths = [features[int(end)].conv[-1].num_features for end in ends]
    backbone = BackboneWithFPN(features, ends, depths, channels)
    sizes = anchor_sizes or tuple((4.0 * stride, 5.7 * stride) for stride in (4, 8, 16, 32, 64))
    generator, head = _anchors(sizes, len(ends) + 1, channels)
    heads = dict(rpn_anchor_generator=generator, rpn_head=head)
    return FasterRCNN(backbone, num_classes + 1, **heads, **options)


def _freeze_stages(body: nn.Module, frozen: int) -> None:
    """Stop the first `frozen` resolution stages of a backbone from learning."""
    stage = 0
    for child in body.children():
        # A stage begins with the layer that halves the resolution, or is ResNet's layer1.
        halves = any(isinstance(m, nn.Conv2d) and max(m.stride) > 1 for m in child.modules())
        stage += halves or child is getattr(body, "layer1", None)
        if stage <= frozen:
            child.requires_grad_(False)
