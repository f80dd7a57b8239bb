"""Norms of layers as the linear maps they are, spectral normalisation, quick second derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.overrides import TorchFunctionMode

from ..device import evaluating
from .layers import drawn, traced

LINEAR = nn.Conv2d | nn.Linear
V = ".parametrizations.weight.0.v"


def spectral_normalize(
    model: nn.Module, *, kind: str = "kernel", input_shape: Sequence[int] | None = None
) -> nn.Module:
    """Bound each Conv2d and Linear while it is trained, in place; returns the same model.

    kind "kernel" (Miyato et al. 2018, arXiv 1802.05957): each weight is divided by the norm of the
    kernel as a matrix, which is not that of the convolution. kind "operator" (Farnia et al. 2019,
    arXiv 1811.07457): a weight whose convolution, at an image of `input_shape` (C, H, W), has a
    norm above 1 is scaled down to 1, each group by itself. Both make one power iteration when a
    weight is read in train mode. Neither bounds the network: batch norms and sums are free.

    >>> layer = spectral_normalize(nn.Sequential(nn.Linear(8, 8))).eval()[0]
    >>> round(torch.linalg.matrix_norm(layer.weight, ord=2).item(), 1)
    1.0
    """
    if kind not in ("kernel", "operator") or (kind == "operator") == (input_shape is None):
        raise ValueError(f'kind must be "kernel", or "operator" with input_shape=, not {kind!r}')
    layers = [module for module in model.modules() if isinstance(module, LINEAR)]
    if any(parametrize.is_parametrized(layer) for layer in layers):
        raise ValueError("the model is already spectrally normalised")
    if kind == "kernel":
        drawn(0, lambda: [spectral_norm(layer) for layer in layers])
        return model
    for name, shape in _input_shapes(model, input_shape).items():
        layer, generator = model.get_submodule(name), torch.Generator().manual_seed(0)
        part = OperatorNorm(layer, torch.randn((1, *shape), generator=generator))
        part.iterate(layer.weight, 100)
        # Without `unsafe` the weight would be read, and one more iteration made, to compare shapes.
        parametrize.register_parametrization(layer, "weight", part, unsafe=True)
    return model


def spectral_like(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Parametrise a plain model, in place, as the model was whose state dict is `state`."""
    operators = [key.removesuffix(V) for key in state if key.endswith(V)]
    for layer, v in [(model.get_submodule(name), state[name + V]) for name in operators]:
        part = OperatorNorm(layer, v.clone())
        parametrize.register_parametrization(layer, "weight", part, unsafe=True)
    kernels = not operators and any(".parametrizations." in key for key in state)
    return spectral_normalize(model) if kernels else model


class OperatorNorm(nn.Module):
    """The parametrisation: weight -> weight scaled so that no group's norm is above the bound.

    v: an input [1, C, H, W] of the layer, about that which each group stretches most.
    """

    def __init__(self, layer: LINEAR, v: Tensor) -> None:
        super().__init__()
        self.register_buffer("v", v.to(layer.weight))
        self.register_buffer("bound", torch.tensor(1.0, device=self.v.device))
        self.geometry = _geometry(layer)
        self.train(layer.training)

    def unit(self, v: Tensor) -> Tensor:
        rows = v.reshape(self.geometry["groups"], -1)
        return (rows / rows.norm(dim=1).clamp_min(1e-12)[:, None]).view(v.shape)

    @torch.no_grad()
    def iterate(self, weight: Tensor, times: int) -> None:
        """Power iteration on the transposed operator times the operator."""
        v = self.unit(self.v)
        for _ in range(times):
            v = self.unit(_gram(v, weight, self.geometry))
        self.v.copy_(v)

    def forward(self, weight: Tensor) -> Tensor:
        groups = self.geometry["groups"]
        # A norm of half-precision sums would be off by more than what it bounds.
        with torch.autocast(weight.device.type, enabled=False):
            if self.training:
                self.iterate(weight, 1)
            # Again, as an averaged model's v is a mean of unit vectors; and a copy, as the next
            # reading of the weight changes the buffer before this one is differentiated.
            out = F.conv2d(self.unit(self.v), _kernel(weight), **self.geometry)
            scale = self.bound / out.reshape(groups, -1).norm(dim=1).maximum(self.bound)
        return (weight.reshape(groups, -1) * scale[:, None]).view_as(weight)


def bake(model: nn.Module) -> nn.Module:
    """Replace parametrised weights by their values, in place; same outputs in eval mode."""
    for module in [module for module in model.modules() if parametrize.is_parametrized(module)]:
        with evaluating(module):  # in train mode reading the weight would make one more iteration
            values = {name: getattr(module, name).detach() for name in module.parametrizations}
        # torch's remove_parametrizations would change the class, which deep copies share.
        del module._modules["parametrizations"]
        module.__class__ = module.__class__.__bases__[0]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value.clone()))
    return model


@torch.no_grad()
def operator_norm(layer: LINEAR, input_shape: Sequence[int]) -> float:
    """Largest singular value of a layer as a linear map of inputs (C, H, W), without its bias.

    >>> blur = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> _ = nn.init.constant_(blur.weight, 1 / 9)
    >>> 0.9 < operator_norm(blur, (1, 16, 16)) < 1.0
    True
    """
    geometry, weight, size = _geometry(layer), layer.weight.float(), math.prod(input_shape)
    if weight.ndim == 2 or (weight.shape[2:] == (1, 1) and layer.padding == (0, 0)):
        matrices = weight.reshape(geometry["groups"], -1, weight.shape[1])
        return torch.linalg.matrix_norm(matrices, ord=2).max().item()

    def gram(v) -> Any:
        v = torch.as_tensor(v, dtype=weight.dtype, device=weight.device).view(1, *input_shape)
        return _gram(v, weight, geometry).flatten().cpu().numpy()

    operator = LinearOperator((size, size), matvec=gram, dtype="float32")
    start = np.random.default_rng(0).standard_normal(size, dtype="float32")
    return math.sqrt(eigsh(operator, 1, v0=start, tol=1e-4, return_eigenvectors=False)[0])


def compare_norms(model: nn.Module, input_shape: Sequence[int]) -> pd.DataFrame:
    """The kernel's norm beside the operator's, a row per Conv2d and Linear, at an image (C, H, W).

    Columns: layer, kind (its class), reshaped_norm (of the kernel as a matrix [out, in*kh*kw]: what
    kind "kernel" divides by), operator_norm (the truth), ratio of the second to the first.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    >>> compare_norms(net, (1, 4, 4)).kind.tolist()
    ['Conv2d', 'Linear']
    """
    rows = []
    with evaluating(model):
        for name, shape in _input_shapes(model, input_shape).items():
            layer = model.get_submodule(name)
            matrix = layer.weight.detach().float().flatten(1)
            norms = torch.linalg.matrix_norm(matrix, ord=2).item(), operator_norm(layer, shape)
            rows.append((name, type(layer).__name__, *norms))
    table = pd.DataFrame(rows, columns=["layer", "kind", "reshaped_norm", "operator_norm"])
    return table.assign(ratio=table.operator_norm / table.reshaped_norm)


def _input_shapes(model: nn.Module, input_shape: Sequence[int]) -> dict[str, tuple]:
    """What shape, without the batch, each Conv2d and Linear sees; the largest of several runs."""
    shapes: dict[str, tuple] = {}
    for call in traced(model, next(model.parameters()).new_zeros(1, *input_shape)).begun():
        if isinstance(call.module, LINEAR):
            x = call.inputs[0]
            seen = tuple(x.shape[1:]) if x.ndim == 4 else (x.shape[-1], 1, 1)
            shapes[call.name] = max(shapes.get(call.name, (0,)), seen, key=math.prod)
    return {name: shapes[name] for name, _ in model.named_modules() if name in shapes}


def _geometry(layer: LINEAR) -> dict[str, Any]:
    """How `F.conv2d` applies a layer; a linear one is a 1 x 1 convolution."""
    if isinstance(layer, nn.Linear):
        return dict(stride=1, padding=0, dilation=1, groups=1)
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError("norms are known for a number of zeros as padding; use F.pad before")
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}


def _kernel(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 4 else weight[:, :, None, None]


def _gram(v: Tensor, weight: Tensor, geometry: dict[str, Any]) -> Tensor:
    """The transposed operator times the operator times `v`."""
    kernel = _kernel(weight)
    return conv2d_input(v.shape, kernel, F.conv2d(v, kernel, **geometry), **geometry)


class QuickInputGradient(TorchFunctionMode):
    """Context for a forward pass whose input gradient is differentiated again (gradient penalty).

    torch's own second derivative of a grouped convolution loops over the groups, up to 960 in
    MobileNetV2; three ordinary convolutions give the same sums. Inside, only the gradient by the
    input may be taken with create_graph=True.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # What a layer calls; `OperatorNorm`, whose weight is differentiated, names its options.
        by_layer = function is F.conv2d and len(args) == 7 and args[2] is None
        if by_layer and args[6] > 1 and not isinstance(args[4], str):
            return GroupedConv.apply(args[0], args[1], args[3:])
        return function(*args, **(kwargs or {}))


class GroupedConv(torch.autograd.Function):
    """A grouped convolution without bias; geometry: stride, padding, dilation, groups."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, geometry: Sequence) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, None, *geometry)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, weight = ctx.saved_tensors
        by_x, by_weight = InputGradient.apply(upstream, weight, x.shape, ctx.geometry), None
        # With create_graph=True the input's gradient alone is wanted.
        if ctx.needs_input_grad[1] and not torch.is_grad_enabled():
            by_weight = conv2d_weight(x, weight.shape, upstream, *ctx.geometry)
        return by_x, by_weight, None


class InputGradient(torch.autograd.Function):
    """The gradient of a convolution by its input, linear in `upstream` and `weight`."""

    @staticmethod
    def forward(ctx, upstream: Tensor, weight: Tensor, shape, geometry: Sequence) -> Tensor:
        ctx.save_for_backward(upstream, weight)
        ctx.geometry = geometry
        return conv2d_input(shape, weight, upstream, *geometry)

    @staticmethod
    def backward(ctx, direction: Tensor):
        upstream, weight = ctx.saved_tensors
        by_weight = conv2d_weight(direction, weight.shape, upstream, *ctx.geometry)
        return F.conv2d(direction, weight, None, *ctx.geometry), by_weight, None, None
