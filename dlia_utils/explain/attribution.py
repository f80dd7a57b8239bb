"""Maps by one call: saliency, integrated gradients, DeepLIFT, occlusion (captum) and Grad-CAM (ours).

captum's DeepLIFT replaces the gradient of the non-linear modules it knows, by exact type, and takes the plain
gradient of everything else without a word: of ReLU6 (MobileNetV2), SiLU, Hardswish, and of activations called
as functions. It loses the rule of a pooling that directly follows an activation (both hook the same tensor),
and where pooling windows overlap it keeps one window's share. Here a private copy is repaired first, and the
completeness error decides whether the map is returned.
"""

from __future__ import annotations

import copy
import logging
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from captum.attr import DeepLift, IntegratedGradients, Occlusion, Saliency
from captum.attr._core import deep_lift
from torch import Tensor, fx, nn

from ..attacks import frozen
from ..models.pixel import fast_copy
from . import base as s
from .gradcam import gradcam

# One output for one input: the rescale rule, difference of outputs over difference of inputs, holds for each.
ELEMENTWISE = (
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    nn.GELU,
    nn.Mish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.SELU,
    nn.CELU,
    nn.Softsign,
    nn.LogSigmoid,
    nn.PReLU,
)
AS_MODULES: dict[object, type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    F.relu6: nn.ReLU6,
    F.silu: nn.SiLU,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
    F.mish: nn.Mish,
    torch.sigmoid: nn.Sigmoid,
    F.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    torch.tanh: nn.Tanh,
    F.tanh: nn.Tanh,
    "tanh": nn.Tanh,
}
PRODUCTS = {
    operator.mul,
    torch.mul,
    operator.matmul,
    torch.matmul,
    torch.bmm,
    operator.truediv,
    torch.div,
    "mul",
}
UNSUPPORTED = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.LocalResponseNorm,
    nn.MultiheadAttention,
    nn.Bilinear,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.LPPool2d,
    nn.Softmax2d,
    nn.LogSoftmax,
)

log = logging.getLogger("dlia_utils")


def explain(
    method: str, model: nn.Module, x: Tensor, target: int | Tensor | None = None, **options
) -> s.Attribution:
    """One map per image by `method`: a name of METHODS, whose function says which `options` it takes.

    x: [B,1|3,H,W] in [0,1]. target: a class, int64 [B], or None for the predicted class. A head with one
    logit z is read as class 1 = z, class 0 = -z. The model is in eval mode and left as it was. Returns an
    `Attribution`; its `heat()` is the [0,1] form for figures and scores. Errors: ValueError/TypeError for an
    unknown method or option, a model in training mode, or images outside [0,1].

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> found = explain("integrated_gradients", net, torch.rand(3, 1, 2, 2), target=1)
    >>> found.maps.shape, bool((found.error < 1e-3).all()), found.baseline
    (torch.Size([3, 2, 2]), True, 'grey level 0')
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    return METHODS[method](model, x, target=target, **options)


def saliency(
    model: nn.Module, x: Tensor, *, target: int | Tensor | None = None, batch_size: int = 32
) -> s.Attribution:
    """Size of the logit's gradient, largest over channels. Source: Simonyan et al., arXiv 1312.6034.

    maps: logits per unit of grey, >= 0; see `explain` for the rest.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).eval()
    >>> found = saliency(net, torch.rand(1, 1, 1, 2), target=0)
    >>> torch.allclose(found.maps.flatten(), net[1].weight[0].abs())
    True
    """
    x, chosen, score = _start(model, x, target, batch_size)
    scored = s.TwoLogits(model)
    with frozen(model), torch.enable_grad():
        parts = [
            Saliency(scored).attribute(images.requires_grad_(), target=classes)
            for images, classes in _batches(x, chosen, batch_size)
        ]
    return s.Attribution("saliency", torch.cat(parts).detach().amax(1).float(), chosen, score)


def integrated_gradients(
    model: nn.Module,
    x: Tensor,
    *,
    target: int | Tensor | None = None,
    baseline: float | Tensor | str = 0.0,
    steps: int = 50,
    batch_size: int = 32,
) -> s.Attribution:
    """Gradients summed from the baseline to the image. Source: Sundararajan et al., arXiv 1703.01365.

    baseline: a grey level in [0,1], "mean" (each image's own), or a tensor [1|B,C,H,W]. steps: points of the
    Gauss-Legendre rule; more of them bring `error` down. maps: signed, in logits, summed over channels.
    batch_size: points in one forward pass. A completeness error above 0.05 is logged.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).eval()
    >>> found = integrated_gradients(net, torch.full((1, 1, 1, 2), 0.5), target=0)
    >>> torch.allclose(found.maps.flatten(), 0.5 * net[1].weight[0], atol=1e-6)
    True
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, not {steps}")
    x, chosen, score = _start(model, x, target, batch_size)
    base, words = _baseline(x, baseline)
    quick = s.TwoLogits(fast_copy(model))
    method = IntegratedGradients(quick)
    with torch.enable_grad():  # one image at a time: its map does not depend on its neighbours
        parts = [
            method.attribute(
                image, below, target=one, n_steps=steps, internal_batch_size=batch_size
            )
            for image, below, one in zip(x.split(1), base.split(1), chosen.split(1), strict=True)
        ]
    maps = torch.cat(parts).detach().sum(1).float()
    error = _error(quick, maps, x, base, chosen, batch_size)
    if bool((error > 0.05).any()):
        log.warning(
            "integrated gradients: completeness error up to %.2g; raise steps=%d",
            error.max(),
            steps,
        )
    return s.Attribution("integrated_gradients", maps, chosen, score, error, words)


def deeplift(
    model: nn.Module,
    x: Tensor,
    *,
    target: int | Tensor | None = None,
    baseline: float | Tensor | str = 0.0,
    tolerance: float = 0.05,
    batch_size: int = 16,
) -> s.Attribution:
    """DeepLIFT, rescale rule. Source: Shrikumar et al., arXiv 1704.02685.

    Runs on a private copy in which batch norms are folded, nothing works in place, every call of a reused or
    functional activation has a module of its own (where torch.fx can trace the model), and captum's table has
    all elementwise activations, ReLU6 and SiLU among them. Products of two activations (squeeze-excite,
    attention) have no rescale rule. baseline, maps: as for `integrated_gradients`. tolerance: a larger
    completeness `error` of any image is refused with the names of the likely culprits (float("inf") takes
    any). Errors: ValueError so, and for a module that runs more than once and cannot be taken apart.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(inplace=True), nn.Flatten(), nn.Linear(16, 2)).eval()
    >>> bool((deeplift(net, torch.rand(2, 1, 4, 4)).error < 1e-3).all())
    True
    """
    x, chosen, score = _start(model, x, target, batch_size)
    base, words = _baseline(x, baseline)
    copied = fast_copy(model)
    culprits = _repair(copied)
    _refuse_reused(copied, x[:1])
    scored = s.TwoLogits(copied)
    again = s.pick(_logits(scored, x, batch_size), chosen)
    if not torch.allclose(again, score, rtol=1e-3, atol=1e-3):
        raise ValueError(
            "the model reads a tensor after an activation has changed it in place, so the copy without that "
            "gives other logits: set inplace=False in the model and look at what it then computes"
        )
    with _full_table(), torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting forward, backward hooks")
        parts = [
            DeepLift(scored).attribute(images.requires_grad_(), below, target=classes).detach()
            for images, below, classes in _batches(x, base, chosen, batch_size)
        ]
    maps = torch.cat(parts).sum(1).float()
    error = _error(scored, maps, x, base, chosen, batch_size)
    if not bool((error <= tolerance).all()):
        names = (
            ", ".join(culprits[:5]) or "nothing known by name (an activation called as a function?)"
        )
        raise ValueError(
            f"DeepLIFT is wrong on this model: completeness error {error.max():.2g} > tolerance={tolerance}. "
            f"Without a rule for: {names}. Use integrated_gradients, or tolerance=float('inf') to see the map"
        )
    return s.Attribution("deeplift", maps, chosen, score, error, words)


def occlusion(
    model: nn.Module,
    x: Tensor,
    *,
    target: int | Tensor | None = None,
    baseline: float | Tensor | str = 0.0,
    window: int | tuple[int, int] = 16,
    stride: int | tuple[int, int] | None = None,
    batch_size: int = 32,
) -> s.Attribution:
    """Mean drop of the logit when a window is covered. Source: Zeiler & Fergus, arXiv 1311.2901.

    window, stride: pixels, one number or (down, across); stride (default: half a window) <= window, so that
    no pixel is left out; windows are cut at the border. baseline: what covers, as for `integrated_gradients`.
    batch_size: windows in one forward pass, which goes through a folded copy of the model (same logits to
    1e-4). maps: logits, signed, the mean over the windows that cover the pixel.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> found = occlusion(net, torch.ones(1, 1, 2, 2), target=0, window=1, stride=1)
    >>> torch.allclose(found.maps.flatten(), net[1].weight[0], atol=1e-6)
    True
    """
    x, chosen, score = _start(model, x, target, batch_size)
    window = _pair(window, "window")
    stride = (
        tuple(max(1, side // 2) for side in window) if stride is None else _pair(stride, "stride")
    )
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(
            f"stride {stride} leaves pixels between the windows {window}: make it <= window"
        )
    if window[0] > x.shape[2] or window[1] > x.shape[3]:
        raise ValueError(
            f"window {window} is larger than the images {tuple(x.shape[2:])}: make it smaller"
        )
    base, words = _baseline(x, baseline)
    method = Occlusion(s.TwoLogits(fast_copy(model)))
    with torch.no_grad():
        parts = [
            method.attribute(
                image,
                sliding_window_shapes=(x.shape[1], *window),
                strides=(x.shape[1], *stride),
                baselines=below,
                target=one,
                perturbations_per_eval=batch_size,
            )
            for image, below, one in zip(x.split(1), base.split(1), chosen.split(1), strict=True)
        ]
    # A window covers all channels at once, so captum gives each of them the same number.
    return s.Attribution("occlusion", torch.cat(parts)[:, 0].float(), chosen, score, None, words)


def _gradcam_plus(
    model: nn.Module, x: Tensor, *, layer: nn.Module | str, target=None
) -> s.Attribution:
    return gradcam(model, x, layer, target=target, plus=True)


METHODS: dict[str, Callable[..., s.Attribution]] = {
    "saliency": saliency,
    "integrated_gradients": integrated_gradients,
    "deeplift": deeplift,
    "occlusion": occlusion,
    "gradcam": gradcam,
    "gradcam++": _gradcam_plus,
}


# ------------------------------------------------------------------------------------------- inputs


def _start(
    model: nn.Module, x: Tensor, target: int | Tensor | None, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked images, the class of each, and its logit."""
    x = s.check(model, x, batch_size=batch_size)
    logits = _logits(s.TwoLogits(model), x, batch_size)
    chosen = s.choose_target(logits, target)
    return x, chosen, s.pick(logits, chosen)


def _logits(scored: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([scored(part) for part in x.split(batch_size)]).float()


def _batches(*tensors_and_size) -> Iterator[tuple[Tensor, ...]]:
    """Detached slices of the tensors, the last argument long."""
    *tensors, size = tensors_and_size
    return zip(*([part.detach() for part in tensor.split(size)] for tensor in tensors), strict=True)


def _baseline(x: Tensor, baseline: float | Tensor | str) -> tuple[Tensor, str]:
    """The baseline as images like x, and its description."""
    if isinstance(baseline, str):
        if baseline != "mean":
            raise ValueError(f"baseline must be a grey level, a tensor or 'mean', not {baseline!r}")
        return x.mean((1, 2, 3), keepdim=True).expand_as(x), "each image's mean grey"
    words = (
        "given images"
        if isinstance(baseline, Tensor) and baseline.ndim
        else f"grey level {float(baseline):g}"
    )
    values = torch.as_tensor(baseline).to(x)
    if values.ndim and (values.shape[1:] != x.shape[1:] or len(values) not in (1, len(x))):
        raise ValueError(
            f"baseline {list(values.shape)} must have the shape of x {list(x.shape)}, or be 1 image"
        )
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("baseline must lie in [0,1], as the images do")
    return values.expand_as(x), words


def _pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(number, int) and number >= 1 for number in pair):
        raise ValueError(
            f"{name} must be whole pixels >= 1, one number or (down, across), not {value!r}"
        )
    return pair


def _error(
    scored: nn.Module, maps: Tensor, x: Tensor, base: Tensor, chosen: Tensor, batch_size: int
) -> Tensor:
    """Completeness error of each map [B]."""
    above, below = (s.pick(_logits(scored, images, batch_size), chosen) for images in (x, base))
    return (maps.sum((1, 2)) - (above - below)).abs() / (above - below).abs().clamp(min=0.01)


# ------------------------------------------------------------------------------------------- DeepLIFT


@contextmanager
def _full_table() -> Iterator[None]:
    """captum's table of non-linear modules, completed and corrected; put back on leaving."""
    table = deep_lift.SUPPORTED_NON_LINEAR
    before = dict(table)
    table.update({kind: deep_lift.nonlinear for kind in ELEMENTWISE if kind not in table})
    table[nn.MaxPool2d] = _max_pool
    try:
        yield
    finally:
        table.clear()
        table.update(before)


def _max_pool(
    module: nn.MaxPool2d,
    inputs: Tensor,
    outputs: Tensor,
    grad_input: Tensor,
    grad_output: Tensor,
    eps: float = 1e-10,
) -> Tensor:
    """Multipliers of max pooling: the greater of image and baseline hands the difference to its maximum."""
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        pooled = module.forward(leaf)  # not module(leaf), whose hooks would run again
    image, below = outputs.chunk(2)
    top = torch.maximum(image, below)
    # The vector-Jacobian product adds up the shares of overlapping windows; unpooling would keep one.
    (share,) = torch.autograd.grad(
        pooled, leaf, grad_output * torch.cat([top - below, image - top])
    )
    difference = torch.sub(*inputs.chunk(2))
    multiplier = torch.where(difference.abs() < eps, 0.0, sum(share.chunk(2)) / difference)
    return torch.cat([multiplier, multiplier])


def _repair(copied: nn.Module) -> list[str]:
    """Make a private copy fit for DeepLIFT; returns the names of what has no rescale rule."""
    culprits = [
        f"{name} ({type(module).__name__})"
        for name, module in copied.named_modules()
        if isinstance(module, UNSUPPORTED)
    ]
    for module in list(copied.modules()):
        if isinstance(module, fx.GraphModule):
            culprits += _separate(module)
    for module in copied.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
        if _has_rule(module):  # a tensor of its own: see the note on two hooks at the top
            module.register_forward_pre_hook(
                lambda _, inputs: tuple(tensor.clone() for tensor in inputs)
            )
    return culprits


def _has_rule(module: nn.Module) -> bool:
    return type(module) in (*deep_lift.SUPPORTED_NON_LINEAR, *ELEMENTWISE)


def _separate(traced: fx.GraphModule) -> list[str]:
    """Give every call of an activation a module of its own; returns the products of two activations."""
    seen, products = set(), []
    for node in list(traced.graph.nodes):
        kind = AS_MODULES.get(node.target) if node.op in ("call_function", "call_method") else None
        if kind is not None:
            _replace(traced, node, kind())
        elif node.op == "call_module":
            module = traced.get_submodule(node.target)
            if node.target in seen and _has_rule(module):
                _replace(traced, node, copy.deepcopy(module))
            seen.add(node.target)
        elif node.target in PRODUCTS and sum(isinstance(part, fx.Node) for part in node.args) > 1:
            products.append(f"{node.name} (a product or quotient of two activations)")
    traced.recompile()
    return products


def _replace(traced: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    name = f"{node.name}_once"
    traced.add_submodule(name, module)
    with traced.graph.inserting_after(node):
        new = traced.graph.call_module(name, (node.args[0] if node.args else node.kwargs["input"],))
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)


def _refuse_reused(copied: nn.Module, x: Tensor) -> None:
    """captum keeps one input per activation, so one that runs twice would be explained with the wrong one."""
    runs: dict[str, int] = {}

    def count(name: str) -> Callable:
        return lambda *_: runs.update({name: runs.get(name, 0) + 1})

    handles = [
        module.register_forward_hook(count(name))
        for name, module in copied.named_modules()
        if _has_rule(module)
    ]
    try:
        with torch.no_grad():
            copied(x)
    finally:
        for handle in handles:
            handle.remove()
    reused = [name for name, times in runs.items() if times > 1]
    if reused:
        raise ValueError(
            f"{', '.join(reused[:5])} run(s) more than once in one pass and torch.fx could not take the "
            "model apart: write one activation module per use, or use integrated_gradients"
        )
