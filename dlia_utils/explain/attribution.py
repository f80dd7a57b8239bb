"""Maps by one call: captum's integrated gradients, occlusion; our saliency, DeepLIFT, Grad-CAM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from captum.attr import IntegratedGradients, Occlusion
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attacks.base import steady
from ..device import release_memory
from ..models.pixel import TwoLogits, fast_copy
from ..units import check_numbers
from . import base
from .gradcam import gradcam, one_pass

# Functions of torch with one output for one input: DeepLIFT's rescale rule holds for each.
ELEMENTWISE = set(
    "relu relu6 leaky_relu prelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh "
    "sigmoid tanh softplus softsign log_sigmoid threshold clamp".split()
)
TOLERANCE = 0.05  # completeness error beyond which a map is doubted
BATCH = 32  # images in one pass


def explain(
    method: str, model: nn.Module, x: Tensor, target: int | Tensor | None = None, **options
) -> base.Attribution:
    """One map per image by `method`: a name of METHODS, whose function has the `options`.

    x: [B,1|3,H,W] in [0,1]. target: a class, int64 [B], or None for the predicted class; of one
    logit z, class 1 is z and class 0 is -z. The model is left as it was. ValueError for an unknown
    method or class, a model in training mode, images outside [0,1].

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    >>> found = explain("integrated_gradients", net, torch.rand(3, 1, 2, 2), target=1)
    >>> found.maps.shape, bool((found.error < 1e-3).all())
    (torch.Size([3, 2, 2]), True)
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    found = METHODS[method](model, x, target=target, **options)
    release_memory()
    return found


def saliency(
    model: nn.Module, x: Tensor, *, target: int | Tensor | None = None
) -> base.Attribution:
    """Size of the gradient, largest over channels. Source: Simonyan et al., arXiv 1312.6034."""
    x, chosen = _start(model, x, target)
    pairs = _batches(BATCH, x, chosen)
    with steady(model, x):
        parts = [one_pass(model, images, [], one, to_input=True).to_input for images, one in pairs]
    return base.Attribution(torch.cat(parts).abs().amax(1).float(), chosen)


def integrated_gradients(
    model: nn.Module, x: Tensor, *, target: int | Tensor | None = None, steps: int = 50
) -> base.Attribution:
    """Gradients summed from black to the image. Source: Sundararajan et al., arXiv 1703.01365.

    steps: points of the Gauss-Legendre rule; more bring `error` down. maps: in logits, signed, the
    sum over channels.
    """
    check_numbers("[1,inf)", whole=True, steps=steps)
    x, chosen = _start(model, x, target)
    quick = TwoLogits(fast_copy(model))
    method = partial(IntegratedGradients(quick).attribute, n_steps=steps, internal_batch_size=BATCH)
    with torch.enable_grad():  # one image at a time: its map does not depend on its neighbours
        parts = [method(image, target=one) for image, one in _batches(1, x, chosen)]
    maps = torch.cat(parts).detach().sum(1).float()
    return base.Attribution(maps, chosen, _error(quick, maps, x, chosen))


def occlusion(
    model: nn.Module, x: Tensor, *, target: int | Tensor | None = None, window: int = 16
) -> base.Attribution:
    """Mean drop of the logit when a window is black. Source: Zeiler & Fergus, arXiv 1311.2901.

    window: side in pixels; windows lie half a side apart and are cut at the border. maps: in
    logits, signed, the mean over a pixel's windows, by a folded copy (same logits to 1e-4).
    """
    x, chosen = _start(model, x, target)
    check_numbers(f"[1,{min(x.shape[2:])}]", whole=True, window=window)
    stride = max(1, window // 2)
    method = partial(
        Occlusion(TwoLogits(fast_copy(model))).attribute,
        sliding_window_shapes=(x.shape[1], window, window),
        strides=(x.shape[1], stride, stride),
        perturbations_per_eval=BATCH,
    )
    with torch.no_grad():
        parts = [method(image, target=one) for image, one in _batches(1, x, chosen)]
    # A window covers all channels at once, so captum gives each of them the same number.
    return base.Attribution(torch.cat(parts)[:, 0].float(), chosen)


def deeplift(
    model: nn.Module, x: Tensor, *, target: int | Tensor | None = None
) -> base.Attribution:
    """DeepLIFT, rescale rule, from black. Source: Shrikumar et al., arXiv 1704.02685.

    captum's leaves out ReLU6, SiLU and activations called as functions, refuses reused ones, and
    loses shares where pooling windows overlap. maps: as in `integrated_gradients`. ValueError for a
    completeness `error` above 0.05.

    >>> net = nn.Sequential(nn.ReLU6(inplace=True), nn.Flatten(), nn.Linear(16, 2)).eval()
    >>> bool((deeplift(net, torch.rand(2, 1, 4, 4)).error < 1e-3).all())
    True
    """
    x, chosen = _start(model, x, target)
    scored, parts = TwoLogits(fast_copy(model)), []
    for images, classes in _batches(BATCH // 2, x, chosen):
        with torch.enable_grad(), Rescale(2 * len(images)):
            logits = scored(torch.cat([images.requires_grad_(), torch.zeros_like(images)]))
            total = base.pick(logits, classes.repeat(2)).sum()
        (multiplier,) = torch.autograd.grad(total, images)
        parts.append(images.detach() * multiplier)
    maps = torch.cat(parts).sum(1).float()
    error = _error(scored, maps, x, chosen)
    if not bool((error <= TOLERANCE).all()):
        raise ValueError(
            f"DeepLIFT is wrong on this model: completeness error {error.max():.2g} > {TOLERANCE}. "
            "It has no rule for products of activations, softmax, layer norms, and what is read "
            "after a change in place. Use integrated_gradients"
        )
    return base.Attribution(maps, chosen, error)


class Rescale(TorchFunctionMode):
    """While entered, activations and max pooling of a batch get DeepLIFT's gradient.

    size: of the batch, images and then as many baselines.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, options = getattr(func, "__name__", ""), dict(kwargs or {})
        plain, x = name.rstrip("_"), args[0] if args else None
        rule = _pooled if plain == "max_pool2d" else _divided if plain in ELEMENTWISE else None
        if rule and isinstance(x, Tensor) and x.requires_grad and len(x) == self.size:
            if name != plain or options.pop("inplace", False):  # the input is needed as it was
                func = getattr(nn.functional, plain, None) or getattr(torch, plain)
            return _Ruled.apply(x, lambda x: func(x, *args[1:], **options), rule)
        return func(*args, **options)


class _Ruled(torch.autograd.Function):
    """A function of torch whose gradient is `rule(function, input, output, gradient)`."""

    @staticmethod
    def forward(ctx, x: Tensor, function: Callable, rule: Callable) -> Tensor:
        y = function(x)
        ctx.function, ctx.rule = function, rule
        ctx.save_for_backward(x.clone(), y.clone())  # what follows may work in place
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rule(ctx.function, *ctx.saved_tensors, gradient), None, None


def _divided(function: Callable, x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """The difference of the outputs over that of the inputs, where there is one."""
    risen, run = (torch.cat(2 * [torch.sub(*part.chunk(2))]) for part in (y, x))
    return torch.where(run.abs() < 1e-10, _plain(function, x, gradient), gradient * risen / run)


def _pooled(function: Callable, x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """Max pooling: the greater of image and baseline hands the difference to its maximum."""
    image, below = y.chunk(2)
    top = torch.maximum(image, below)
    # The vector-Jacobian product adds up the shares of overlapping windows.
    share = _plain(function, x, gradient * torch.cat([top - below, image - top]))
    run = torch.sub(*x.chunk(2))
    return torch.cat(2 * [torch.where(run.abs() < 1e-10, 0.0, sum(share.chunk(2)) / run)])


def _plain(function: Callable, x: Tensor, gradient: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, gradient)[0]


def _start(model: nn.Module, x: Tensor, target: int | Tensor | None) -> tuple[Tensor, Tensor]:
    """Checked images and the class of each."""
    x = base.check(model, x)
    return x, base.choose_target(_logits(TwoLogits(model), x), target)


def _logits(scored: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([scored(part) for part in x.split(BATCH)]).float()


def _batches(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*([part.detach() for part in tensor.split(size)] for tensor in tensors), strict=True)


def _error(scored: nn.Module, maps: Tensor, x: Tensor, chosen: Tensor) -> Tensor:
    """Completeness error of each map [B]."""
    image, black = (base.pick(_logits(scored, part), chosen) for part in (x, torch.zeros_like(x)))
    return (maps.sum((1, 2)) - (image - black)).abs() / (image - black).abs().clamp(min=0.01)


_FUNCTIONS = (saliency, integrated_gradients, deeplift, occlusion, gradcam)
METHODS = {one.__name__: one for one in _FUNCTIONS} | {"gradcam++": partial(gradcam, plus=True)}
