"""Grad-CAM and Grad-CAM++ from their formulas, at the price of a forward pass and the head's gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlia_utils.attacks import frozen

from . import _shared as s
from .eigencam import _find, _pick


def gradcam(
    model: nn.Module,
    x: Tensor,
    layer: nn.Module | str,
    *,
    target: int | Tensor | None = None,
    plus: bool = False,
) -> s.Attribution:
    """Where `layer` holds evidence for a class. Source: Selvaraju et al., arXiv 1610.02391.

    With A [C,h,w] the layer's output and g the gradient of the class's logit with respect to it, channel c
    weighs w_c = mean of g_c, and the map is ReLU(sum of w_c A_c). plus: Grad-CAM++ (Chattopadhay et al.,
    arXiv 1710.11063), w_c = sum of alpha ReLU(g_c) with alpha = g^2 / (2 g^2 + g^3 * sum of A_c), 0 where the
    denominator is 0; the factor exp(logit) common to all channels is left out.

    x: [B,1|3,H,W] in [0,1]. layer: a module of the model or its dotted name, with output [B,C,h,w]. target:
    a class, or int64 [B]; None takes the predicted one. A head with one logit z (shape [B] or [B,1]) is read
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
    module, name = _find(model, layer)
    x = s.check(model, x)
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        """The graph begins here. Whatever follows gets a copy, because it may work in place."""
        leaves.append(_pick(output, None, name).detach().requires_grad_())
        return leaves[-1].clone()

    handle = module.register_forward_hook(cut)
    try:
        with frozen(model), torch.enable_grad():
            logits = s.two_logits(model(x))
            if len(leaves) != 1:
                raise ValueError(
                    f"{name} ran {len(leaves)} times on this input: choose a layer that runs once"
                )
            chosen = s.choose_target(logits.detach(), target)
            score = s.pick(logits, chosen)
            if not score.requires_grad:
                raise ValueError(f"the output does not depend on {name}: choose a layer before the head")
            (gradient,) = torch.autograd.grad(score.sum(), leaves[0])
    finally:
        handle.remove()
    kept = leaves[0].detach()
    weights = _plus_weights(kept, gradient) if plus else gradient.mean((2, 3))
    grid = torch.einsum("bc,bchw->bhw", weights, kept).clamp(min=0).float()
    resized = nn.functional.interpolate(grid[:, None], x.shape[2:], mode="bilinear", align_corners=False)
    return s.Attribution(
        method="gradcam++" if plus else "gradcam",
        maps=s.scale(resized[:, 0]),
        target=chosen,
        score=score.detach().float(),
        grid=grid,
    )


def _plus_weights(kept: Tensor, gradient: Tensor) -> Tensor:
    """Grad-CAM++'s channel weights [B,C]."""
    # alpha does not change when A grows and g shrinks alike, and its powers then stay in float32's range.
    size = gradient.abs().amax((1, 2, 3), keepdim=True).clamp(min=s.TINY)
    g, total = gradient / size, (kept * size).sum((2, 3), keepdim=True)
    below = 2 * g**2 + g**3 * total
    alpha = torch.where(below.abs() > 1e-12, g**2 / below, 0.0)
    return (alpha * g.clamp(min=0)).sum((2, 3)) * size[:, :, 0, 0]
