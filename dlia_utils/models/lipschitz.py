"""Norms of layers as the linear maps they are, spectral normalisation, quick second derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.overrides import TorchFunctionMode

from ..device import evaluating

LINEAR = nn.Conv2d | nn.Linear
V = ".parametrizations.weight.0.v"
TINY = 1e-12


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
    if kind == "operator":
        for layer, shape in _input_shapes(model, input_shape).items():
            start = _start(shape, layer.weight)
            _register(layer, _iterate(start, layer.weight, _geometry(layer), 100))
        return model
    with torch.random.fork_rng(devices=[]):  # the caller's random stream stays as it is
        torch.manual_seed(0)
        for layer in layers:
            spectral_norm(layer)
    return model


def spectral_like(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Parametrise a plain model, in place, as the model was whose state dict is `state`."""
    operators = [key.removesuffix(V) for key in state if key.endswith(V)]
    for name in operators:
        _register(model.get_submodule(name), state[name + V].clone())
    kernels = not operators and any(".parametrizations." in key for key in state)
    return spectral_normalize(model) if kernels else model


class OperatorNorm(nn.Module):
    """The parametrisation: weight -> weight scaled so that no group's norm is above the bound."""

    def __init__(self, v: Tensor, geometry: list) -> None:
        super().__init__()
        self.register_buffer("v", v)
        self.register_buffer("bound", torch.tensor(1.0, device=v.device))
        self.geometry = geometry

    def forward(self, weight: Tensor) -> Tensor:
        groups = self.geometry[3]
        # A norm of half-precision sums would be off by more than what it bounds.
        with torch.autocast(weight.device.type, enabled=False):
            if self.training:
                self.v.copy_(_iterate(self.v, weight, self.geometry, 1))
            # Again, as an averaged model's v is a mean of unit vectors; and a copy, as the next
            # reading of the weight changes the buffer before this one is differentiated.
            out = _convolve(_unit(self.v, groups), weight, self.geometry)
            scale = self.bound / out.reshape(groups, -1).norm(dim=1).maximum(self.bound)
        return (weight.reshape(groups, -1) * scale[:, None]).view_as(weight)


def _register(layer: LINEAR, v: Tensor) -> None:
    part = OperatorNorm(v.to(layer.weight), _geometry(layer)).train(layer.training)
    # Without `unsafe` the weight would be read, and one more iteration made, to compare shapes.
    parametrize.register_parametrization(layer, "weight", part, unsafe=True)


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

    Exact for matrices (Linear, 1 x 1 without padding), else the largest in the span of 50 iterates
    of the convolution and its transpose (Lanczos 1950, J. Res. NBS 45), from below.

    >>> blur = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> _ = nn.init.constant_(blur.weight, 1 / 9)
    >>> 0.9 < operator_norm(blur, (1, 16, 16)) < 1.0
    True
    """
    geometry, weight = _geometry(layer), layer.weight.float()
    groups = geometry[3]
    if weight.ndim == 2 or (weight.shape[2:] == (1, 1) and geometry[1] == [0, 0]):
        matrices = weight.reshape(groups, -1, weight.shape[1])
        return torch.linalg.matrix_norm(matrices, ord=2).max().item()
    v = _start(input_shape, weight)
    v, shape = _unit(v, groups).reshape(groups, -1), v.shape
    before, link, squares, links = torch.zeros_like(v), v.new_zeros(groups), [], []
    # Without orthogonalisation against all former vectors: rounding only repeats values found.
    for _ in range(50):
        back = _transpose_times(v.view(shape), weight, geometry).reshape(groups, -1)
        squares.append((back * v).sum(1))
        back = back - squares[-1][:, None] * v - link[:, None] * before
        link = back.norm(dim=1)
        # Where the span is complete nothing but rounding is left.
        link = torch.where(link > 1e-5 * squares[0], link, 0.0)
        links.append(link)
        before, v = v, torch.where(link[:, None] > 0, back / link[:, None].clamp_min(TINY), 0.0)
    # The operator in the basis of the iterates: tridiagonal; eigvalsh reads the lower half.
    small = torch.diag_embed(torch.stack(squares, 1))
    small = small + torch.diag_embed(torch.stack(links[:-1], 1), offset=-1)
    return torch.linalg.eigvalsh(small)[:, -1].clamp_min(0).sqrt().max().item()


def compare_norms(model: nn.Module, input_shape: Sequence[int]) -> pd.DataFrame:
    """The kernel's norm beside the operator's, a row per Conv2d and Linear, at an image (C, H, W).

    Columns: layer, kind (its class), reshaped_norm (of the kernel as a matrix [out, in*kh*kw]: what
    kind "kernel" divides by), operator_norm (the truth), ratio of the second to the first.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    >>> compare_norms(net, (1, 4, 4)).kind.tolist()
    ['Conv2d', 'Linear']
    """
    rows, names = [], {layer: name for name, layer in model.named_modules()}
    with evaluating(model):
        for layer, shape in _input_shapes(model, input_shape).items():
            matrix = layer.weight.detach().float().flatten(1)
            norms = torch.linalg.matrix_norm(matrix, ord=2).item(), operator_norm(layer, shape)
            rows.append((names[layer], type(layer).__name__, *norms))
    table = pd.DataFrame(rows, columns=["layer", "kind", "reshaped_norm", "operator_norm"])
    return table.assign(ratio=table.operator_norm / table.reshaped_norm)


def _input_shapes(model: nn.Module, input_shape: Sequence[int]) -> dict[nn.Module, tuple]:
    """What shape, without the batch, each Conv2d and Linear sees; the largest of several runs."""
    layers, shapes = [module for module in model.modules() if isinstance(module, LINEAR)], {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen = tuple(inputs[0].shape[1:]) if inputs[0].ndim == 4 else (layer.in_features, 1, 1)
        shapes[layer] = max(shapes.get(layer, (0,)), seen, key=math.prod)

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            model(torch.zeros(1, *input_shape, device=layers[0].weight.device))
    finally:
        for handle in handles:
            handle.remove()
    return {layer: shapes[layer] for layer in layers if layer in shapes}


# A geometry is [stride, padding, dilation, groups]; a linear layer is a 1 x 1 convolution; a vector
# is one map [1, C, H, W], normalised group by group.


def _geometry(layer: LINEAR) -> list:
    if isinstance(layer, nn.Linear):
        return [[1, 1], [0, 0], [1, 1], 1]
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError("norms are known for a number of zeros as padding; use F.pad before")
    return [list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups]


def _start(shape: Sequence[int], like: Tensor) -> Tensor:
    """A random input, drawn on the CPU: the same on every device."""
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(0)).to(like.device)


def _unit(v: Tensor, groups: int) -> Tensor:
    rows = v.reshape(groups, -1)
    return (rows / rows.norm(dim=1).clamp_min(TINY)[:, None]).view(v.shape)


@torch.no_grad()
def _iterate(v: Tensor, weight: Tensor, geometry: list, iterations: int) -> Tensor:
    """Power iteration on the transposed operator times the operator."""
    v = _unit(v, geometry[3])
    for _ in range(iterations):
        v = _unit(_transpose_times(v, weight, geometry), geometry[3])
    return v


def _convolve(v: Tensor, weight: Tensor, geometry: list) -> Tensor:
    kernel = weight if weight.ndim == 4 else weight[:, :, None, None]
    stride, padding, dilation, groups = geometry
    # By name, so that `quick_input_gradient` leaves it alone: here the weight is differentiated.
    return F.conv2d(v, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)


def _transpose_times(v: Tensor, weight: Tensor, geometry: list) -> Tensor:
    kernel = weight if weight.ndim == 4 else weight[:, :, None, None]
    return _backward(_convolve(v, kernel, geometry), v, kernel, geometry, [True, False])[0]


def _backward(upstream: Tensor, x: Tensor, weight: Tensor, geometry: Sequence, wanted) -> tuple:
    """Gradients of a convolution by its input and its weight, those that are `wanted`."""
    stride, padding, dilation, groups = geometry
    rest = (None, stride, padding, dilation, False, [0, 0], groups, [*wanted, False])
    return torch.ops.aten.convolution_backward(upstream, x, weight, *rest)[:2]


class QuickInputGradient(TorchFunctionMode):
    """Context for a forward pass whose input gradient is differentiated again (gradient penalty).

    torch's own second derivative of a grouped convolution loops over the groups, up to 960 in
    MobileNetV2; three ordinary convolutions give the same sums. Inside, only the gradient by the
    input may be taken with create_graph=True.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        by_layer = function is F.conv2d and len(args) == 7 and args[2] is None
        if by_layer and args[6] > 1 and not isinstance(args[4], str):
            return GroupedConv.apply(args[0], args[1], args[3:])
        return function(*args, **(kwargs or {}))


quick_input_gradient = QuickInputGradient


class GroupedConv(torch.autograd.Function):
    """A grouped convolution without bias."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, geometry: Sequence) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, None, *geometry)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the input's gradient alone is wanted
            return InputGradient.apply(upstream, x.detach(), weight, ctx.geometry), None, None
        return *_backward(upstream, x, weight, ctx.geometry, ctx.needs_input_grad[:2]), None


class InputGradient(torch.autograd.Function):
    """The input's gradient is linear in `upstream` and `weight`; of `x` it takes the shape only."""

    @staticmethod
    def forward(ctx, upstream: Tensor, x: Tensor, weight: Tensor, geometry: Sequence) -> Tensor:
        ctx.save_for_backward(upstream, weight)
        ctx.geometry = geometry
        return _backward(upstream, x, weight, geometry, [True, False])[0]

    @staticmethod
    def backward(ctx, direction: Tensor):
        upstream, weight = ctx.saved_tensors
        by_weight = _backward(upstream, direction, weight, ctx.geometry, [False, True])[1]
        return F.conv2d(direction, weight, None, *ctx.geometry), None, by_weight, None
