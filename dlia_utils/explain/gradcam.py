"""Grad-CAM and Grad-CAM++ from their formulas: a forward pass and the head's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attacks import frozen
from ..models.pixel import two_logits
from ..models.transfer import last_map_layer
from . import base


def gradcam(
    model: nn.Module,
    x: Tensor,
    layer: nn.Module | str | None = None,
    *,
    target: int | Tensor | None = None,
    plus: bool = False,
) -> base.Attribution:
    """Where `layer` holds evidence for a class. Source: Selvaraju et al., arXiv 1610.02391.

    With A the layer's output and g the gradient of the class's logit, channel c weighs w_c = mean
    of g_c, and the map is ReLU(sum of w_c A_c). plus: Grad-CAM++ (Chattopadhay et al., arXiv
    1710.11063), w_c = sum of alpha ReLU(g_c) with alpha = g^2 / (2 g^2 + g^3 * sum of A_c). layer:
    a module with maps that runs once, or its dotted name; None takes `models.last_map_layer`. x,
    target: as in `attribution.explain`.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    >>> gradcam(net, torch.rand(3, 1, 8, 8), "0").grid.shape
    torch.Size([3, 6, 6])
    """
    once = one_pass(model, x, [last_map_layer(model) if layer is None else layer], target)
    found = grid(once.kept[0], once.gradients[0], plus=plus)
    resized = nn.functional.interpolate(found[:, None], x.shape[2:], mode="bilinear")[:, 0]
    return base.Attribution(base.scale(resized), once.target, grid=found)


class Pass(NamedTuple):
    """The model's output and the class explained; each layer's output and gradient."""

    output: Tensor
    target: Tensor
    kept: list[Tensor]
    gradients: list[Tensor]
    to_input: Tensor | None  # the gradient at the images


def one_pass(
    model: nn.Module,
    x: Tensor,
    layers: Sequence[nn.Module | str],
    target: int | Tensor | None,
    *,
    to_input: bool = False,
) -> Pass:
    """Run the model once and differentiate the target's logit down to the lowest of `layers`."""
    x, found = base.check(model, x).requires_grad_(to_input), []
    runs: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        if name in runs:
            raise ValueError(f"{name} ran 2 times: choose one that runs once")
        out = base.feature_map(output, name)
        # Parameters are frozen: the graph begins at the lowest layer, and holds higher ones.
        runs[name] = out if out.requires_grad else out.detach().requires_grad_()
        return runs[name].clone()  # whatever follows may work in place

    with ExitStack() as hooks, frozen(model), torch.enable_grad():
        for layer in layers:
            module, name = base.find_layer(model, layer)
            found.append(name)
            hooks.enter_context(module.register_forward_hook(partial(keep, name)))
        output = model(x.clone())  # a first layer may work in place
        if missing := [name for name in found if name not in runs]:
            raise ValueError(f"{missing[0]} ran 0 times: choose one that runs once")
        logits = two_logits(output)
        chosen = base.choose_target(logits.detach(), target)
        roots = [runs[name] for name in found] + ([x] if to_input else [])
        # A layer that the output does not depend on is refused by torch.
        gradients = [*torch.autograd.grad(base.pick(logits, chosen).sum(), roots)] if roots else []
    kept = [runs[name].detach() for name in found]
    at_input = gradients.pop() if to_input else None
    return Pass(output.detach(), chosen, kept, gradients, at_input)


def grid(kept: Tensor, gradient: Tensor, *, plus: bool = False) -> Tensor:
    """The map [B,h,w] of one layer from its output and gradient [B,C,h,w]."""
    weights = gradient.mean((2, 3))
    if plus:
        # alpha is the same when A grows and g shrinks alike, and stays in float32's range.
        size = gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=base.TINY)
        g, total = gradient / size, (kept * size).sum((2, 3), keepdim=True)
        below = 2 * g**2 + g**3 * total
        alpha = torch.where(below.abs() > 1e-12, g**2 / below, 0.0)
        weights = (alpha * g.clamp(min=0)).sum((2, 3)) * size[:, :, 0, 0]
    return torch.einsum("bc,bchw->bhw", weights, kept).clamp(min=0).float()
