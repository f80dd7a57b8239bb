"""Gradients past a module that has none worth following: the backward pass goes through a stand-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Surrogate = Callable[[Tensor], Tensor] | None


@contextmanager
def bpda(model: nn.Module, surrogates: Mapping[str | nn.Module, Surrogate]) -> Iterator[nn.Module]:
    """Context: modules answer exactly, but gradients pass through a surrogate. Source: arXiv 1802.00420.

    For a step that is not differentiable, or whose gradient vanishes (bit depth reduction, JPEG, a median
    filter, a sparsifier): `with bpda(model, {"squeeze": None}): pgd(model, ...)`. Works with every attack
    that uses gradients; answers, and so what counts as fooled, stay those of the model itself.
    surrogates: by module of `model`, or its name in `model.named_modules()`: a differentiable function of
    the module's first input that gives the shape of its output, or None for the identity. The module itself
    runs without gradients. Everything is put back on leaving, also after an error.
    Errors: KeyError for a module that the model does not have; ValueError for a surrogate of another shape
    (at the first pass with gradients); TypeError for one that cannot be called.

    >>> class Round(nn.Module):
    ...     def forward(self, x):
    ...         return (x * 7).round() / 7
    >>> model, x = nn.Sequential(Round()), torch.tensor([0.3], requires_grad=True)
    >>> torch.autograd.grad(model(x).sum(), x)[0].item()
    0.0
    >>> with bpda(model, {"0": None}):
    ...     torch.autograd.grad(model(x).sum(), x)[0].item()
    1.0
    """
    named = dict(model.named_modules())
    names = {module: name for name, module in named.items()}
    chosen = {}
    for key, surrogate in surrogates.items():
        module = named.get(key) if isinstance(key, str) else key
        if module not in names:
            raise KeyError(f"the model has no module {key!r}; its modules: {list(named)[:20]}")
        if surrogate is not None and not callable(surrogate):
            raise TypeError(
                f"the surrogate of {names[module]!r} must be a function or None, not {surrogate!r}"
            )
        chosen[module] = surrogate
    before = {module: module.__dict__.get("forward") for module in chosen}
    try:
        for module, surrogate in chosen.items():
            module.forward = _detour(module.forward, surrogate, names[module])
        yield model
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _detour(exact: Callable[..., Tensor], surrogate: Surrogate, name: str) -> Callable[..., Tensor]:
    """A forward with the values of `exact` and the gradient of `surrogate`."""

    def forward(x: Tensor, *rest, **options) -> Tensor:
        with torch.no_grad():  # a copy, as the module may work in place
            out = exact(x.detach().clone(), *rest, **options)
        if not torch.is_grad_enabled():
            return out
        smooth = x if surrogate is None else surrogate(x)
        if smooth.shape != out.shape:
            raise ValueError(
                f"the surrogate of {name!r} gives {list(smooth.shape)} where the module gives "
                f"{list(out.shape)}; give a function with the shape of the output"
            )
        return out.detach() + (smooth - smooth.detach())

    return forward
