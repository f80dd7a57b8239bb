"""Layers of an unknown network: found by one forward pass, which leaves it as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# Large enough that no usual network shrinks its last map to one place; then those of networks that
# take one size alone.
SIZES = (128, 224, 64, 32, 28, 96, 256, 299, 384, 512)
POOLS = tuple(
    getattr(nn, f"{kind}Pool2d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg", "LP")
)


@dataclass
class Call:
    """One run of a module: its dotted name, itself, what it returned, the runs inside it."""

    name: str
    module: nn.Module
    output: object = None
    inner: list[Call] = field(default_factory=list)

    @property
    def leaf(self) -> bool:
        return not any(self.module.children())

    @property
    def map(self) -> bool:
        """[1, C, h, h], h > 1: of a square image, so that channels last does not pass for one."""
        shape = self.output.shape if isinstance(self.output, Tensor) else ()
        return len(shape) == 4 and shape[0] == 1 and shape[2] == shape[3] > 1

    @property
    def tokens(self) -> bool:
        """Vectors [1, N, C], or channels last [1, h, w, C]: what a transformer passes on."""
        shape = self.output.shape if isinstance(self.output, Tensor) else ()
        trained = any(True for _ in self.module.parameters())
        return trained and len(shape) > 2 and not self.map and tuple(shape[2:]) != (1, 1)


@dataclass(frozen=True)
class Trace:
    """A forward pass: all runs, in the order in which they began and in which they ended."""

    begun: list[Call]
    ended: list[Call]
    runs: Counter  # by name

    @property
    def root(self) -> Call:
        """The network's own run."""
        return self.ended[-1]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; the training flags are put back, also after an error."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def first_channels(network: nn.Module) -> int | None:
    """Channels that the first convolution reads; None for a network without any."""
    found = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    return next((module.in_channels for module in found), None)


def trace(network: nn.Module, *, channels: int | None = None) -> Trace:
    """Run `network` once on a black image and note every module's run.

    channels: of the image; by default what the first convolution reads. The image has the first
    side of `SIZES` that runs through. Raises: ValueError where none does.
    """
    channels = channels or first_channels(network) or 3
    weights = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(1))
    for size in SIZES:
        try:
            return _traced(network, weights.new_zeros(1, channels, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            failed = error
    raise ValueError(
        f"a {type(network).__name__} takes none of the image sizes {', '.join(map(str, SIZES))}, so "
        f"its layers cannot be looked for: name the layer (the last error: {failed})"
    ) from failed


def _traced(network: nn.Module, x: Tensor) -> Trace:
    begun: list[Call] = []
    ended: list[Call] = []
    running: list[Call] = []

    def enter(name: str, module: nn.Module) -> None:
        call = Call(name, module)
        if running:
            running[-1].inner.append(call)
        running.append(call)
        begun.append(call)

    def leave(output: object) -> None:
        running[-1].output = output
        ended.append(running.pop())

    handles = []
    try:
        for name, module in network.named_modules():
            before = module.register_forward_pre_hook(
                lambda module, _, name=name: enter(name, module)
            )
            handles += [before, module.register_forward_hook(lambda _, __, output: leave(output))]
        with untouched(network):
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    return Trace(begun, ended, Counter(call.name for call in ended))


def block_names(found: Trace) -> list[str]:
    """Dotted names of the network's blocks with maps, the first one first; empty for a transformer.

    A block is a composite module that makes a map, found by going down through the chains
    (`nn.Sequential`); a flat chain has its convolutions for blocks.
    """
    blocks = _split(found.root, found)
    while len(blocks) == 1 and len(parts := _split(blocks[0], found)) > 1:
        blocks = parts  # all in one module: its parts are the blocks
    return [call.name for call in blocks]


def _split(parent: Call, found: Trace) -> list[Call]:
    children = [call for call in parent.inner if found.runs[call.name] == 1]
    if any(child.tokens for child in children):
        return []
    blocks = []
    for child in children:
        if child.leaf or first_channels(child.module) is None:
            continue
        if not child.map:  # no map itself, but it may hold the layers that make them
            blocks += _split(child, found)
        elif isinstance(child.module, nn.Sequential):
            parts = _split(child, found)
            blocks += parts if len(parts) > 1 or any(not part.leaf for part in parts) else [child]
        else:
            blocks.append(child)
    return blocks or [
        child for child in children if child.map and isinstance(child.module, nn.Conv2d)
    ]


def last_map(found: Trace) -> str:
    """Dotted name of the layer that makes the last map, before it is pooled or flattened.

    Raises: ValueError for a network without maps, and for one that turns its maps into tokens.
    """
    advice = 'name the layer of the maps yourself, "dotted.name" (named_modules() has the names)'
    pooled = {id(call.output) for call in found.ended if isinstance(call.module, POOLS)}
    maps = [call for call in found.ended if call.map and id(call.output) not in pooled]
    what = type(found.root.module).__name__
    if not maps:
        raise ValueError(
            f"a {what} has no known blocks, as no layer of it returns maps [B, C, h, w]: {advice}"
        )
    after = found.ended[found.ended.index(maps[-1]) + 1 :]
    if any(call.tokens for call in after):
        raise ValueError(
            f"a {what} turns its maps into rows of tokens, as transformers do: {advice}"
        )
    # The layer, and the chains that pass its map on; before it stands what it changed in place.
    same = [call for call in maps if call.output is maps[-1].output]
    same = same[max((k for k, call in enumerate(same) if call.leaf), default=0) :]
    once = [call.name for call in same if found.runs[call.name] == 1]
    if not once:
        raise ValueError(f"the layer of the last map of a {what} runs more than once: {advice}")
    blocks = block_names(found)
    return next((name for name in once if name in blocks), once[0])


def last_linear(found: Trace) -> str:
    """Dotted name of the nn.Linear whose output is the answer. Raises: ValueError if none is."""
    for call in reversed(found.ended):
        if isinstance(call.module, nn.Linear) and call.output is found.root.output and call.name:
            return call.name
    raise ValueError(
        f"a {type(found.root.module).__name__} does not end in an nn.Linear, so it has no head that "
        "could be replaced: take a softmax or sigmoid off its end, or give it an nn.Linear as its last layer"
    )


def replace(network: nn.Module, name: str, new: Callable[[nn.Module], nn.Module]) -> None:
    """Put `new(old)` where the layer `name` is."""
    parent, _, child = name.rpartition(".")
    holder = network.get_submodule(parent)
    setattr(holder, child, new(getattr(holder, child)))
