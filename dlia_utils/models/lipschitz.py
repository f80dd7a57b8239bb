"""Spectral normalisation and its removal; grouped convolutions that are quick to differentiate twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.overrides import TorchFunctionMode


def spectral_normalize(model: nn.Module, *, n_power_iterations: int = 1, seed: int = 0) -> nn.Module:
    """Divide each Conv2d and Linear weight by its largest singular value, in place (arXiv 1802.05957).

    The published study's "Lipschitz" model does this. What it does not give: the kernel is reshaped to a
    matrix [out, in*kh*kw], whose norm is not the norm of the convolution; the gains of batch normalisation
    (gamma / sqrt(var)) and the residual sums are unbounded. So the network has no certified Lipschitz
    constant. Returns the same model. Raises: ValueError when a layer is already normalised.

    >>> layer = spectral_normalize(nn.Sequential(nn.Linear(8, 8))).eval()[0]
    >>> round(torch.linalg.matrix_norm(layer.weight, ord=2).item(), 1)
    1.0
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if any(parametrize.is_parametrized(layer) for layer in layers):
        raise ValueError("the model is already spectrally normalised")
    # The start vectors of the power iteration are random; they must not depend on the caller's random stream.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            spectral_norm(layer, n_power_iterations=n_power_iterations)
    return model


def bake(model: nn.Module) -> nn.Module:
    """Replace parametrised weights by their values, in place: plain layers, same outputs in eval mode.

    The result's state dict loads strictly into the plain architecture. Training flags stay as they were.

    >>> x, model = torch.rand(3, 8), spectral_normalize(nn.Sequential(nn.Linear(8, 8))).eval()
    >>> before = model(x)
    >>> torch.equal(bake(model)(x), before), sorted(model.state_dict())
    (True, ['0.bias', '0.weight'])
    """
    # Replacing while walking would change what is walked, hence the lists.
    for module in [module for module in model.modules() if parametrize.is_parametrized(module)]:
        training = module.training
        # In train mode reading the weight would make one more power iteration.
        module.eval()
        for name in list(module.parametrizations):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        module.train(training)
    return model


class quick_input_gradient(TorchFunctionMode):  # noqa: N801 (used as a context manager)
    """Context for a forward pass whose input gradient is differentiated again, as in a gradient penalty.

    torch's own second derivative of a grouped convolution loops over the groups, up to 960 in MobileNetV2.
    The same sums can be had from three ordinary convolutions, because a convolution is linear in its input.
    Inside, only the gradient with respect to the input may be taken with create_graph=True.

    >>> layer, x = nn.Conv2d(4, 4, 3, groups=4, bias=False), torch.rand(1, 4, 5, 5, requires_grad=True)
    >>> with quick_input_gradient():
    ...     y = layer(x).square().sum()
    >>> (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    >>> gradient.square().sum().backward()
    >>> layer.weight.grad.shape
    torch.Size([4, 1, 3, 3])
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.conv2d and len(args) == 7 and args[2] is None and args[6] > 1:
            x, weight, _, *geometry = args
            return _GroupedConv.apply(x, weight, geometry)
        return function(*args, **(kwargs or {}))


class _GroupedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, geometry: list) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, None, *geometry)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # the pass with create_graph=True: the input's gradient alone is wanted
            return _InputGradient.apply(upstream, x.detach(), weight, ctx.geometry), None, None
        return (*_convolution_backward(upstream, x, weight, ctx.geometry, ctx.needs_input_grad[:2]), None)


class _InputGradient(torch.autograd.Function):
    """The input's gradient is linear in `upstream` and in `weight`; of `x` it takes the shape only."""

    @staticmethod
    def forward(ctx, upstream: Tensor, x: Tensor, weight: Tensor, geometry: list) -> Tensor:
        ctx.save_for_backward(upstream, weight)
        ctx.geometry = geometry
        return _convolution_backward(upstream, x, weight, geometry, (True, False))[0]

    @staticmethod
    def backward(ctx, direction: Tensor):
        upstream, weight = ctx.saved_tensors
        by_weight = _convolution_backward(upstream, direction, weight, ctx.geometry, (False, True))[1]
        return F.conv2d(direction, weight, None, *ctx.geometry), None, by_weight, None


def _convolution_backward(upstream, x, weight, geometry, wanted: tuple[bool, bool]) -> tuple:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        upstream, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*wanted, False]
    )[:2]
