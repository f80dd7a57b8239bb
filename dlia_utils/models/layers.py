"""Layers drawn from a seed, and those of an unknown network, found by one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..device import evaluating
from ..units import check_numbers

# Large enough that no usual network shrinks its last map to one place; then those of networks that
# take one size alone.
SIZES = (128, 224, 64, 32, 28, 96, 256, 299, 384, 512)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.LPPool2d)
ADVICE = "name the layer of the maps yourself (named_modules() has the names)"


def check_sizes(*, seed: int = 0, width: float = 1.0, **counts: int) -> None:
    """Refuse numbers that make no network, by their names. Raises: ValueError.

    >>> check_sizes(num_classes=0)
    Traceback (most recent call last):
    ValueError: num_classes must be a whole number in [1,inf), not 0
    """
    check_numbers("[0,inf)", whole=True, seed=seed)
    check_numbers("(0,10]", width=width)
    check_numbers("[1,inf)", whole=True, **counts)


def drawn(seed: int, make: Callable, *args, **options):
    """What `make` builds with random weights from `seed`; the caller's random stream stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*args, **options)


def first_channels(network: nn.Module) -> int | None:
    """Channels that the first convolution reads; None for a network without any."""
    found = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    return next((module.in_channels for module in found), None)


class Call:
    """One run of a module: its name, itself, its inputs and output, the runs inside it.

    map: it returned [1, C, h, h], h > 1: of a square image, so that channels last does not pass for
    one. tokens: it has weights and returned vectors [1, N, C] or channels last [1, h, w, C], what a
    transformer passes on.
    """

    def __init__(self, name: str, module: nn.Module, inputs: tuple) -> None:
        self.name, self.module, self.inputs = name, module, inputs
        self.inner: list[Call] = []
        self.leaf = not any(module.children())

    def end(self, output: object) -> None:
        self.output, trained = output, any(True for _ in self.module.parameters())
        self.shape = shape = tuple(output.shape) if isinstance(output, Tensor) else ()
        self.map = len(shape) == 4 and shape[0] == 1 and shape[2] == shape[3] > 1
        self.tokens = trained and len(shape) > 2 and not self.map and shape[2:] != (1, 1)

    def begun(self) -> list[Call]:
        """All runs in the order in which they began."""
        return [self, *(call for part in self.inner for call in part.begun())]

    def ended(self) -> list[Call]:
        """All runs in the order in which they ended."""
        return [*(call for part in self.inner for call in part.ended()), self]


def traced(network: nn.Module, x: Tensor) -> Call:
    """Run `network` in eval mode on `x`, note every module's run and leave it as it was."""
    running, names = [Call("", nn.Identity(), ())], {m: name for name, m in network.named_modules()}

    def enter(module: nn.Module, inputs: tuple) -> None:
        call = Call(names[module], module, inputs)
        running[-1].inner.append(call)
        running.append(call)

    def leave(_module: nn.Module, _inputs: tuple, output: object) -> None:
        running.pop().end(output)

    handles = [module.register_forward_pre_hook(enter) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    try:
        with evaluating(network), torch.no_grad():
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    return running[0].inner[0]


def trace(network: nn.Module, channels: int | None = None) -> Call:
    """Run `network` on a black image of the first side of `SIZES` that goes."""
    channels = channels or first_channels(network) or 3
    weights = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(1))
    for size in SIZES:
        try:
            return traced(network, weights.new_zeros(1, channels, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            failed = error
    kind = type(network).__name__
    raise ValueError(f"{kind} takes none of the sizes {SIZES}: {ADVICE}") from failed


def block_names(root: Call) -> list[str]:
    """Dotted names of the blocks with maps, the first one first; empty for a transformer.

    A block is a composite module that makes a map, found by going down through the chains
    (`nn.Sequential`); a flat chain has its convolutions for blocks.
    """
    runs = Counter(call.name for call in root.ended())

    def split(parent: Call) -> list[Call]:
        children, found = [call for call in parent.inner if runs[call.name] == 1], []
        if any(child.tokens for child in children):
            return []
        for child in children:
            if child.leaf or first_channels(child.module) is None:
                continue
            chain = isinstance(child.module, nn.Sequential)
            # What makes no map itself may hold the layers that make them.
            parts = split(child) if chain or not child.map else [child]
            single = child.map and len(parts) < 2 and all(part.leaf for part in parts)
            found += [child] if single else parts
        return found or [c for c in children if c.map and isinstance(c.module, nn.Conv2d)]

    blocks = split(root)
    while len(blocks) == 1 and len(parts := split(blocks[0])) > 1:
        blocks = parts  # all in one module: its parts are the blocks
    return [call.name for call in blocks]


def last_map(root: Call) -> str:
    """Dotted name of the layer that makes the last map, before it is pooled or flattened."""
    ended = root.ended()
    runs = Counter(call.name for call in ended)
    pooled = {id(call.output) for call in ended if isinstance(call.module, POOLS)}
    maps = [call for call in ended if call.map and id(call.output) not in pooled]
    # The layer, and the chains that pass its map on; before it stands what it changed in place.
    same = [call for call in maps if call.output is maps[-1].output]
    same = same[max((k for k, call in enumerate(same) if call.leaf), default=0) :]
    once = [call.name for call in same if runs[call.name] == 1]
    problem = "" if once else "the layer of its last map runs more than once"
    if not maps:
        problem = "it has no known blocks, no layer of it returns maps"
    elif any(call.tokens for call in ended[ended.index(maps[-1]) + 1 :]):
        problem = "it turns its maps into rows of tokens, a transformer"
    if problem:
        raise ValueError(f"{type(root.module).__name__}: {problem}: {ADVICE}")
    blocks = block_names(root)
    return next((name for name in once if name in blocks), once[0])


def last_linear(root: Call) -> str:
    """Dotted name of the nn.Linear whose output is the answer. Raises: ValueError if none is."""
    for call in reversed(root.ended()):
        if isinstance(call.module, nn.Linear) and call.output is root.output and call.name:
            return call.name
    fix = "take a softmax or sigmoid off its end, or give it an nn.Linear as its last layer"
    raise ValueError(f"a {type(root.module).__name__} does not end in an nn.Linear: {fix}")
