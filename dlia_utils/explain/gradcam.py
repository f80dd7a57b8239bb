"""Grad-CAM and Grad-CAM++ from their formulas: a forward pass and the head's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
    a module or its dotted name; None takes `models.last_map_layer`. x, target: as in
    `attribution.explain`. Errors: also for an unknown layer, one without maps, or that does not run
    once.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    >>> gradcam(net, torch.rand(3, 1, 8, 8), "0").grid.shape
    torch.Size([3, 6, 6])
    """
    once = one_pass(model, x, [last_map_layer(model) if layer is None else layer], target)
    found = grid(once.kept[0], once.gradients[0], plus=plus)
    resized = nn.functional.interpolate(found[:, None], x.shape[2:], mode="bilinear")[:, 0]
    name = "gradcam++" if plus else "gradcam"
    return base.Attribution(name, base.scale(resized), once.target, once.score, grid=found)


class Pass(NamedTuple):
    """The model's output, class explained and its logit; each layer's output and gradient."""

    output: Tensor
    target: Tensor
    score: Tensor
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
    found = [base.find_layer(model, layer) for layer in layers]
    x = base.check(model, x).requires_grad_(to_input)
    runs: list[list[Tensor]] = [[] for _ in found]
    with ExitStack() as hooks:
        for (module, name), outputs in zip(found, runs, strict=True):
            hooks.enter_context(module.register_forward_hook(_keep(outputs, name)))
        with frozen(model), torch.enable_grad():
            output = model(x.clone())  # a first layer may work in place
            logits = two_logits(output)
            for (_, name), outputs in zip(found, runs, strict=True):
                if len(outputs) != 1:
                    raise ValueError(f"{name} ran {len(outputs)} times: choose one that runs once")
            chosen = base.choose_target(logits.detach(), target)
            score = base.pick(logits, chosen)
            roots = [outputs[0] for outputs in runs] + ([x] if to_input else [])
            # A layer that the output does not depend on is refused by torch.
            gradients = [*torch.autograd.grad(score.sum(), roots)] if roots else []
    kept = [outputs[0].detach() for outputs in runs]
    at_input = gradients.pop() if to_input else None
    return Pass(output.detach(), chosen, score.detach().float(), kept, gradients, at_input)


def _keep(outputs: list[Tensor], name: str) -> Callable:
    """A forward hook that notes the layer's output as a tensor of the graph."""

    def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        kept = base.feature_map(output, name)
        # Parameters are frozen: the graph begins at the lowest layer, and holds higher ones.
        outputs.append(kept if kept.requires_grad else kept.detach().requires_grad_())
        return outputs[-1].clone()  # whatever follows may work in place

    return hook


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
