"""What Grad-CAM and occlusion maps cost, beside captum and pytorch-grad-cam, all measured in one
run.

    python benchmarks/explain.py                       both tables, some minutes
    python benchmarks/explain.py --only gradcam --rounds 20

MobileNetV2 with random weights; images of random pixels. A group's cases are run in turn, round
after round, and the fastest round of each is kept. Time is CPU time of this process on one thread
(it holds steady while others use the machine), or wall time on a GPU. Before anything is timed the
maps of all sides are compared, and each side is asked for a map of a frozen model.
pytorch-grad-cam's rows need `benchmarks/requirements.txt` (it is called grad-cam there).
"""

# ruff: noqa: I001  (timing sets the allocator and puts the repository on the path: it comes first)

from __future__ import annotations

import argparse
import copy
import logging
import platform
import warnings
from collections.abc import Callable

from timing import Row, installed, print_table, seconds

import captum
import numpy as np
import torch
from captum.attr import LayerGradCam, Occlusion
from torch import Tensor, nn

from dlia_utils.explain import attribution, gradcam
from dlia_utils.models import PixelModel, mobilenet_v2

WINDOW, STRIDE = 16, 8  # ours lie half a window apart
PER_PASS = attribution.BATCH  # covered copies in one forward pass


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    hardware = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, one thread"
    )
    print(
        f"{hardware}; torch {torch.__version__}; captum {captum.__version__}; MobileNetV2, "
        f"{options.size} px; "
        f"fastest of {options.rounds} rounds (occlusion: {options.occlusion_rounds}); "
        f"{'wall' if device == 'cuda' else 'CPU'} time\n"
    )
    model = mobilenet(options.size).to(device)
    rows = []
    for name in options.only:
        rows += GROUPS[name](model, options, device)
    print_table(rows)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=224, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=8, help="images of one Grad-CAM call")
    parser.add_argument("--rounds", type=int, default=20, help="of Grad-CAM")
    parser.add_argument("--occlusion-rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    return parser.parse_args()


def mobilenet(size: int) -> PixelModel:
    """Random weights, and batch norms that have seen images: without that the activations fade to
    1e-8."""
    model = mobilenet_v2(
        num_classes=10
    ).train()  # one of ten logits is above 0, so its map is not zero
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average of what is seen
    forward(model, torch.rand(8, 1, size, size, generator=torch.Generator().manual_seed(0)))
    return model.eval()


# ----------------------------------------------------------------------------------------- Grad-CAM


def grad_cam(model: PixelModel, options: argparse.Namespace, device: str) -> list[Row]:
    """Grad-CAM of the last feature maps against a plain forward of the same images."""
    x = torch.rand(options.batch, 1, options.size, options.size, device=device)
    target = forward(model, x).argmax(1)
    sides = grad_cam_sides(model, target)
    for name, side in sides.items():
        agree(f"Grad-CAM, {name}", sides["ours"](x), side(x))
    frozen = grad_cam_sides(copy.deepcopy(model).requires_grad_(False), target)
    for name, side in frozen.items():
        print(f"Grad-CAM of a frozen model: {name}: {outcome(side, x)}")
    cases = {"forward": lambda: forward(model, x)} | {
        name: (lambda side=side: side(x)) for name, side in sides.items()
    }
    time_of = seconds(cases, rounds=options.rounds, device=device, group="Grad-CAM")
    plain, ours = time_of["forward"], time_of["ours"]
    theirs = time_of.get("pytorch-grad-cam", np.nan)
    label = f"Grad-CAM, {options.batch} images"
    return [
        (label, "a plain forward", ours / plain, "<= 1.15x"),
        (label, "captum LayerGradCam + interpolate", ours / time_of["captum"], ""),
        (label, "pytorch-grad-cam", ours / theirs, ""),
        ("captum LayerGradCam + interpolate", "a plain forward", time_of["captum"] / plain, ""),
        ("pytorch-grad-cam", "a plain forward", theirs / plain, ""),
    ]


def grad_cam_sides(model: PixelModel, target: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each library's way from images to maps [B,H,W] of one model, made ready beforehand."""
    layer = model.backbone.features
    captums = LayerGradCam(model, layer)

    def with_captum(x: Tensor) -> Tensor:
        grid = captums.attribute(x, target=target, relu_attributions=True)
        return LayerGradCam.interpolate(grid, tuple(x.shape[2:]), "bilinear")[:, 0]

    sides = {"ours": lambda x: gradcam(model, x, layer, target=target).maps, "captum": with_captum}
    if installed("pytorch_grad_cam"):
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        theirs = GradCAM(model=model, target_layers=[layer])
        sides["pytorch-grad-cam"] = lambda x: torch.from_numpy(
            theirs(input_tensor=x, targets=[ClassifierOutputTarget(one) for one in target.tolist()])
        ).to(x)
    return sides


def outcome(side: Callable[[Tensor], Tensor], x: Tensor) -> str:
    try:
        return "works" if float(side(x).detach().max()) > 0 else "zero maps"
    except Exception as error:  # whatever the library raises is what its users see
        return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------------------------------- occlusion


def occlude(model: PixelModel, options: argparse.Namespace, device: str) -> list[Row]:
    """Occlusion of one image against the plain forwards of as many images in the same batches."""
    x = torch.rand(1, 1, options.size, options.size, device=device)
    count = windows(options.size) ** 2
    covered = x.repeat(PER_PASS, 1, 1, 1)
    coarse = {"window": 4 * WINDOW, "stride": 4 * STRIDE}  # the same code, sooner
    agree(
        "occlusion, captum",
        our_occlusion(model, x, coarse["window"]),
        captum_occlusion(model, x, **coarse),
    )

    def plain() -> None:
        for start in range(0, count, PER_PASS):
            forward(model, covered[: min(PER_PASS, count - start)])

    cases = {
        "forwards": plain,
        "ours": lambda: our_occlusion(model, x),
        "captum": lambda: captum_occlusion(model, x),
    }
    time_of = seconds(cases, rounds=options.occlusion_rounds, device=device, group="occlusion")
    label = f"occlusion {WINDOW}/{STRIDE}, {count} windows"
    against = f"{count} plain forwards, batch {PER_PASS}"
    return [
        (label, against, time_of["ours"] / time_of["forwards"], "<= 0.65x"),
        (label, f"captum, {PER_PASS} per pass", time_of["ours"] / time_of["captum"], ""),
        (f"captum, {PER_PASS} per pass", against, time_of["captum"] / time_of["forwards"], ""),
    ]


def our_occlusion(model: nn.Module, x: Tensor, window: int = WINDOW) -> Tensor:
    """The folded copy of the model is made anew each time, and counted."""
    return attribution.occlusion(model, x, target=0, window=window).maps


def captum_occlusion(
    model: nn.Module, x: Tensor, *, window: int = WINDOW, stride: int = STRIDE
) -> Tensor:
    with torch.no_grad():
        return Occlusion(model).attribute(
            x,
            sliding_window_shapes=(1, window, window),
            strides=(1, stride, stride),
            target=0,
            perturbations_per_eval=PER_PASS,
        )[:, 0]


def windows(side: int) -> int:
    """Windows along a side of the image; the last one is cut at the border."""
    return 1 + -(-(side - WINDOW) // STRIDE)


# ------------------------------------------------------------------------------------------- both


def forward(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def agree(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Both sides' maps must be the same up to each map's own range, which pytorch-grad-cam does not
    keep."""
    a, b = (stretched(maps.detach().double()) for maps in (ours, theirs))
    difference = float((a - b).abs().max())
    print(f"{name}: largest difference from ours {difference:.2g} of a map's range")
    if not difference < 1e-3:
        raise SystemExit(f"{name}: the maps differ by {difference:.3g} of their range")


def stretched(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)  # NaN, hence refused, for a map without a range


GROUPS = {"gradcam": grad_cam, "occlusion": occlude}

if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Setting forward, backward hooks")
    main()
