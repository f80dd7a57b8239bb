"""Grad-CAM and Grad-CAM++ from their formulas, at the price of a forward pass and the head's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks import frozen
from ..models.transfer import last_map_layer
from . import base as s
from .eigencam import _find, _pick


def gradcam(
    model: nn.Module,
    x: Tensor,
    layer: nn.Module | str | None = None,
    *,
    target: int | Tensor | None = None,
    plus: bool = False,
) -> s.Attribution:
    """Where `layer` holds evidence for a class. Source: Selvaraju et al., arXiv 1610.02391.

    With A [C,h,w] the layer's output and g the gradient of the class's logit with respect to it, channel c
    weighs w_c = mean of g_c, and the map is ReLU(sum of w_c A_c). plus: Grad-CAM++ (Chattopadhay et al.,
    arXiv 1710.11063), w_c = sum of alpha ReLU(g_c) with alpha = g^2 / (2 g^2 + g^3 * sum of A_c), 0 where the
    denominator is 0; the factor exp(logit) common to all channels is left out.

    x: [B,1|3,H,W] in [0,1]. layer: a module of the model or its dotted name, with output [B,C,h,w]; None
    takes the last map (`models.last_map_layer`). target: a class, or int64 [B]; None takes the predicted one. A head with one logit z (shape [B] or [B,1]) is read
    as class 1 = z, class 0 = -z. Returns `maps` [B,H,W], resized bilinearly and divided by their own maximum,
    so two maps' heights cannot be compared; `grid` [B,h,w] as computed; `zero` marks images where no place
    speaks for the class (the map is then 0, not NaN). Only the part above the layer is differentiated;
    parameters may be frozen, and the model is left as it was, also after an error. Errors: ValueError for a
    model in training mode, images outside [0,1], an unknown class or layer, a layer that does not return
    maps, runs not exactly once, or does not reach the output.

    >>> net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    >>> net[0].load_state_dict({"weight": torch.ones(1, 1, 1, 1), "bias": torch.zeros(1)})
    <All keys matched successfully>
    >>> x = torch.tensor([[[[0.0, 0.5], [0.0, 1.0]]]])
    >>> gradcam(net, x, "0", target=1).maps
    tensor([[[0.0000, 0.5000],
             [0.0000, 1.0000]]])
    >>> gradcam(net, x, "0", target=0).zero  # nothing speaks against it
    tensor([True])
    """
    layer = last_map_layer(model) if layer is None else layer
    (found,) = _cams(model, x, [_find(model, layer)], target, plus)
    return found


def gradcam_layers(
    model: nn.Module,
    x: Tensor,
    layers: Sequence[str],
    *,
    target: int | Tensor | None = None,
    plus: bool = False,
) -> dict[str, s.Attribution]:
    """`gradcam` at several layers from one forward and one backward pass, by name in the given order.

    layers: dotted names of modules, which may run one after another, one inside another or in parallel
    branches. Everything else, shapes and errors too, is as for `gradcam`; each map equals the one that
    `gradcam` gives. In addition ValueError for an empty list and for a name given twice.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.AdaptiveAvgPool2d(1))
    >>> net = net.append(nn.Flatten()).eval()
    >>> found = gradcam_layers(net, torch.rand(4, 1, 8, 8), ["0", "2"])
    >>> found["0"].grid.shape, found["2"].grid.shape
    (torch.Size([4, 6, 6]), torch.Size([4, 4, 4]))
    """
    names = _check_names(layers)
    results = _cams(model, x, [_find(model, name) for name in names], target, plus)
    return dict(zip(names, results, strict=True))


def _check_names(layers: Sequence[str]) -> list[str]:
    if (
        isinstance(layers, str)
        or not len(layers)
        or not all(isinstance(name, str) for name in layers)
    ):
        raise ValueError(f"layers must be a list of one or more module names, not {layers!r}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers holds a name twice: {list(layers)}")
    return list(layers)


def _cams(
    model: nn.Module,
    x: Tensor,
    found: Sequence[tuple[nn.Module, str]],
    target: int | Tensor | None,
    plus: bool,
) -> list[s.Attribution]:
    """The finished maps of each layer."""
    once = _one_pass(model, x, found, target)
    results = []
    for kept, gradient in zip(once.kept, once.gradients, strict=True):
        grid = _grid(kept, gradient, plus=plus)
        resized = nn.functional.interpolate(
            grid[:, None], x.shape[2:], mode="bilinear", align_corners=False
        )
        results.append(
            s.Attribution(
                method="gradcam++" if plus else "gradcam",
                maps=s.scale(resized[:, 0]),
                target=once.target,
                score=once.score,
                grid=grid,
            )
        )
    return results


@dataclass(frozen=True)
class _Pass:
    """One forward and one backward pass.

    output: what the model returned; target [B] and score [B]: the class explained and its logit; kept and
    gradients: each layer's output [B,C,h,w] and the gradient of the score with respect to it; to_input: the
    gradient with respect to the images, if it was asked for.
    """

    output: Tensor
    target: Tensor
    score: Tensor
    kept: list[Tensor]
    gradients: list[Tensor]
    to_input: Tensor | None


def _one_pass(
    model: nn.Module,
    x: Tensor,
    found: Sequence[tuple[nn.Module, str]],
    target: int | Tensor | None,
    *,
    to_input: bool = False,
) -> _Pass:
    """Run the model once and differentiate the target's logit down to the lowest of the layers `found`."""
    x = s.check(model, x).requires_grad_(to_input)
    runs: list[list[Tensor]] = [[] for _ in found]
    handles = []
    try:
        for (module, name), outputs in zip(found, runs, strict=True):
            handles.append(module.register_forward_hook(_keep(outputs, name)))
        with frozen(model), torch.enable_grad():
            output = model(x.clone())  # a first layer may work in place
            logits = s.two_logits(output)
            for (_, name), outputs in zip(found, runs, strict=True):
                if len(outputs) != 1:
                    raise ValueError(
                        f"{name} ran {len(outputs)} times on this input: choose a layer that runs once"
                    )
            chosen = s.choose_target(logits.detach(), target)
            score = s.pick(logits, chosen)
            roots = [outputs[0] for outputs in runs] + [x] * to_input
            gradients = [None] * len(roots)
            if score.requires_grad:
                gradients = list(torch.autograd.grad(score.sum(), roots, allow_unused=True))
    finally:
        for handle in handles:
            handle.remove()
    for (_, name), gradient in zip(found, gradients, strict=False):
        if gradient is None:
            raise ValueError(
                f"the output does not depend on {name}: choose a layer before the head"
            )
    if to_input and gradients[-1] is None:
        raise ValueError("the output does not depend on the images: there is nothing to explain")
    return _Pass(
        output=output.detach(),
        target=chosen,
        score=score.detach().float(),
        kept=[outputs[0].detach() for outputs in runs],
        gradients=gradients[: len(runs)],
        to_input=gradients[-1] if to_input else None,
    )


def _keep(outputs: list[Tensor], name: str) -> Callable:
    """A forward hook that notes the layer's output as a tensor of the graph."""

    def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        kept = _pick(output, None, name)
        # The graph begins at the lowest layer, since parameters are frozen; higher ones lie in it already.
        outputs.append(kept if kept.requires_grad else kept.detach().requires_grad_())
        return outputs[-1].clone()  # whatever follows may work in place

    return hook


def _grid(kept: Tensor, gradient: Tensor, *, plus: bool) -> Tensor:
    """The map [B,h,w] of one layer at its own resolution."""
    weights = _plus_weights(kept, gradient) if plus else gradient.mean((2, 3))
    return torch.einsum("bc,bchw->bhw", weights, kept).clamp(min=0).float()


def _plus_weights(kept: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM++'s channel weights [B,C]."""
    # alpha does not change when A grows and g shrinks alike, and its powers then stay in float32's range.
    size = gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=s.TINY)
    g, total = gradient / size, (kept * size).sum((2, 3), keepdim=True)
    below = 2 * g**2 + g**3 * total
    alpha = torch.where(below.abs() > 1e-12, g**2 / below, 0.0)
    return (alpha * g.clamp(min=0)).sum((2, 3)) * size[:, :, 0, 0]
