"""Norms of layers, bounds of networks, spectral normalisation and its removal; quick second derivatives."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node, symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.overrides import TorchFunctionMode

from .pixel import PixelModel

KINDS = ("kernel", "operator")
TINY = 1e-12

# Largest slopes of the activations; anything piecewise linear with slopes of 1 at most stands in NON_EXPANSIVE.
NON_EXPANSIVE = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.Tanh,
    nn.Softplus,
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.ZeroPad2d,
)
SLOPES = {nn.Sigmoid: 0.25, nn.SiLU: 1.1, nn.GELU: 1.13, nn.Hardswish: 1.5}
AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)


# ------------------------------------------------------------------ enforced during training


def spectral_normalize(
    model: nn.Module,
    *,
    kind: str = "kernel",
    input_shape: Sequence[int] | None = None,
    bound: float = 1.0,
    n_power_iterations: int = 1,
    seed: int = 0,
) -> nn.Module:
    """Bound each Conv2d and Linear while it is trained, in place; returns the same model.

    kind "kernel" (Miyato et al. 2018, arXiv 1802.05957): each weight is divided by its largest singular value. The
    published study's "Lipschitz" model does this. What it does not give: the kernel is reshaped to a matrix
    [out, in*kh*kw], whose norm is not the norm of the convolution (`compare_norms` shows both).
    kind "operator" (power iteration on the convolution itself, as Farnia et al. 2019, arXiv 1811.07457): each weight
    is scaled down so that the layer's operator norm, at the size that an image of `input_shape` (C, H, W) gives it,
    is at most `bound`; weights already below stay as they are. The groups of a grouped convolution are bounded one by
    one. The norm is estimated from below, so that true norms may pass the bound by one or two per cent
    (`compare_norms` tells). Layers that such an image does not reach stay as they are.
    With both, `n_power_iterations` are made whenever a weight is read in train mode, none in eval mode. Neither
    bounds the network: the gains of batch normalisation and the residual sums are free (`lipschitz_bound`).
    Raises: ValueError when a layer is already normalised, for an unknown kind, for kind "operator" without
    input_shape, or a bound <= 0.

    >>> layer = spectral_normalize(nn.Sequential(nn.Linear(8, 8))).eval()[0]
    >>> round(torch.linalg.matrix_norm(layer.weight, ord=2).item(), 1)
    1.0
    >>> net = spectral_normalize(nn.Sequential(nn.Conv2d(3, 8, 3)), kind="operator", input_shape=(3, 9, 9), bound=0.5)
    >>> round(operator_norm(net.eval()[0], (3, 9, 9)), 2)
    0.5
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "kernel" and (input_shape is not None or bound != 1.0):
        raise ValueError('input_shape and bound belong to kind="operator"')
    if kind == "operator" and input_shape is None:
        raise ValueError(
            'kind="operator" needs input_shape=(C, H, W): the norm of a convolution depends on its input'
        )
    if bound <= 0:
        raise ValueError(f"bound must be positive, got {bound}")
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if any(parametrize.is_parametrized(layer) for layer in layers):
        raise ValueError("the model is already spectrally normalised")
    if kind == "kernel":
        # The start vectors of the power iteration are random; they must not depend on the caller's random stream.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in layers:
                spectral_norm(layer, n_power_iterations=n_power_iterations)
        return model
    for name, shape in _input_shapes(model, input_shape).items():
        layer = model.get_submodule(name)
        v = _iterate(
            _start(shape, layer.weight, seed),
            _as_kernel(layer.weight.detach()),
            _geometry(layer),
            100,
        )
        _register_operator(layer, v, bound, n_power_iterations)
    return model


def spectral_like(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Parametrise a plain model, in place, as the model was whose state dict is `state`; returns it.

    A model without parametrised weights in `state` stays plain. The state itself is not loaded.

    >>> trained = spectral_normalize(nn.Sequential(nn.Linear(8, 8)), kind="operator", input_shape=(8,))
    >>> again = spectral_like(nn.Sequential(nn.Linear(8, 8)), trained.state_dict())
    >>> again.load_state_dict(trained.state_dict())
    <All keys matched successfully>
    """
    suffix = ".parametrizations.weight.0.v"
    operators = [key.removesuffix(suffix) for key in state if key.endswith(suffix)]
    for name in operators:
        start = f"{name}.parametrizations.weight.0."
        bound = state[start + "bound"].item()
        _register_operator(model.get_submodule(name), state[start + "v"].clone(), bound, 1)
    if not operators and any(".parametrizations." in key for key in state):
        spectral_normalize(model)
    return model


class _OperatorNorm(nn.Module):
    """The parametrisation: weight -> weight scaled so that no group's operator norm is above the bound."""

    def __init__(self, v: Tensor, geometry: list, bound: float, iterations: int) -> None:
        super().__init__()
        self.register_buffer("v", v)
        self.register_buffer("bound", torch.tensor(float(bound)))
        self.geometry, self.iterations = geometry, iterations

    def forward(self, weight: Tensor) -> Tensor:
        groups = self.geometry[3]
        # A norm of half-precision sums would be off by more than what it bounds.
        with torch.autocast(weight.device.type, enabled=False):
            kernel = _as_kernel(weight)
            if self.training:
                self.v.copy_(_iterate(self.v, kernel.detach(), self.geometry, self.iterations))
            # Normalised again, as an averaged model's v is a mean of unit vectors; and a copy, as the next reading of
            # the weight changes the buffer before this one is differentiated.
            sigma = _group_norms(_convolve(_unit(self.v, groups), kernel, self.geometry), groups)
            scale = self.bound / sigma.maximum(self.bound)
        return (weight.reshape(groups, -1) * scale[:, None]).view_as(weight)


def _register_operator(
    layer: nn.Conv2d | nn.Linear, v: Tensor, bound: float, iterations: int
) -> None:
    part = _OperatorNorm(v.to(layer.weight), _geometry(layer), bound, iterations).to(
        layer.weight.device
    )
    # Without `unsafe` the weight would be read, and one more iteration made, to compare shapes.
    parametrize.register_parametrization(layer, "weight", part.train(layer.training), unsafe=True)


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


# ------------------------------------------------------------------ measured


def operator_norm(
    layer: nn.Conv2d | nn.Linear,
    input_shape: Sequence[int],
    *,
    gain: Tensor | None = None,
    iterations: int = 50,
    seed: int = 0,
) -> float:
    """Largest singular value of a layer as the linear map it is, without its bias.

    Power iteration with the convolution and its transpose, at the given size and with the layer's stride, zero
    padding, dilation and groups (Farnia et al. 2019, arXiv 1811.07457; closed form for circular padding: Sedghi et
    al. 2019, arXiv 1805.10408). The value is the largest that the span of all iterates holds (Lanczos 1950, J. Res. NBS
    45), as the last iterate alone can still be half a per cent low after 100. Each group has iterates of its own: the
    norm is the largest of the groups'. Linear layers and 1 x 1 convolutions without padding are matrices: exact. The
    rest is estimated from below. `input_shape`: (C, H, W), for a Linear also (C,). `gain` [out] multiplies the output
    channels, as a batch norm in eval mode does.
    Raises: TypeError for another layer; ValueError for padding other than zeros or a shape that does not fit.

    >>> blur = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> _ = nn.init.constant_(blur.weight, 1 / 9)
    >>> 0.9 < operator_norm(blur, (1, 16, 16)) < 1.0
    True
    """
    geometry = _geometry(layer)
    groups = geometry[3]
    with torch.no_grad():
        weight = layer.weight.detach()
        weight = (
            weight.float()
            if gain is None
            else weight.float() * gain.view(-1, *[1] * (weight.ndim - 1))
        )
        kernel = _as_kernel(weight)
        channels = kernel.shape[1] * groups
        if input_shape[0] != channels or (isinstance(layer, nn.Conv2d) and len(input_shape) != 3):
            raise ValueError(
                f"input_shape must be ({channels}, H, W) for this layer, got {tuple(input_shape)}"
            )
        if kernel.shape[2:] == (1, 1) and geometry[1] == [0, 0]:
            return (
                torch.linalg.matrix_norm(kernel.reshape(groups, -1, kernel.shape[1]), ord=2)
                .max()
                .item()
            )
        return _largest(_start(input_shape, kernel, seed), kernel, geometry, iterations)


def compare_norms(
    model: nn.Module, input_shape: Sequence[int], *, iterations: int = 50, seed: int = 0
) -> pd.DataFrame:
    """The kernel's norm beside the operator's, one row per Conv2d and Linear, at an image of (C, H, W).

    Columns: layer, kind, reshaped_norm (of the kernel as a matrix [out, in*kh*kw], what spectral normalisation of
    kind "kernel" divides by), operator_norm (the truth), ratio = operator_norm / reshaped_norm: what the layer's norm
    is after that division, where 1 is meant. Batch norms are not counted. Layers that the image does not reach have
    no row. The model, which may be of any kind that runs, is not changed.

    >>> compare_norms(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)), (1, 4, 4)).kind.tolist()
    ['3x3', 'linear']
    """
    model = copy.deepcopy(model).eval()
    rows = []
    for name, shape in _input_shapes(model, input_shape).items():
        layer = model.get_submodule(name)
        reshaped = torch.linalg.matrix_norm(layer.weight.detach().float().flatten(1), ord=2).item()
        true = operator_norm(layer, shape, iterations=iterations, seed=seed)
        ratio = true / reshaped if reshaped else math.nan
        rows.append(
            {
                "layer": name,
                "kind": _kind(layer),
                "reshaped_norm": reshaped,
                "operator_norm": true,
                "ratio": ratio,
            }
        )
    return pd.DataFrame(rows, columns=["layer", "kind", "reshaped_norm", "operator_norm", "ratio"])


def lipschitz_bound(
    model: nn.Module, input_shape: Sequence[int], *, iterations: int = 50, seed: int = 0
) -> float:
    """An upper bound L of |f(x) - f(y)|_2 / |x - y|_2 over all images of (C, H, W), for the model in eval mode.

    The product rule of Szegedy et al. 2014 (arXiv 1312.6199) along the graph that torch.fx traces: operator norms of
    convolutions and linear layers, a batch norm that alone follows a convolution folded into it as gains
    |gamma| / sqrt(var + eps), L1 + L2 for sums (so a residual block counts 1 + L of its branch), sqrt(L1^2 + L2^2) for
    concatenations, the largest slope of activations, and norms of pools. A `PixelModel` counts from pixels in [0, 1]
    to logits, 1 / std and the repeated grey channel included. Unit: logits per pixel unit, both in L2; an image whose
    margin z_y - z_k exceeds sqrt(2) L r keeps its class within radius r. For deep networks L is far too large to say
    that of any real image: that is the point. To within the power iteration's error, see `operator_norm`.
    Raises: ValueError for a model that torch.fx cannot trace or an operation without a known bound, by name.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    >>> 0 < lipschitz_bound(net, (1, 4, 4)) < 10
    True
    """
    model = copy.deepcopy(model).eval()
    network, at_door, shape = model, 1.0, tuple(input_shape)
    if isinstance(model, PixelModel):
        network, gains = model.backbone, 1 / model.std.flatten()
        at_door = (gains.norm() if shape[0] == 1 else gains.max()).item()
        shape = (3, *shape[1:])
    try:
        # In a coat, so that a network that is itself one torch layer is a node and not taken apart.
        graph = symbolic_trace(nn.Sequential(network))
    except (
        Exception
    ) as error:  # torch.fx raises many types, its own and whatever the traced code raises
        name = type(network).__name__
        raise ValueError(
            f"torch.fx cannot trace {name} ({error}): bound its parts one by one"
        ) from error
    ShapeProp(graph).propagate(torch.zeros(1, *shape, device=_device(model)))
    return _walk(graph, at_door, iterations, seed)


def _walk(graph: GraphModule, at_door: float, iterations: int, seed: int) -> float:
    """The bound of the graph's output, from those of every node before it."""
    bounds: dict[Node, float] = {}
    for node in graph.graph.nodes:
        if node in bounds:  # a batch norm, already folded into the convolution before it
            continue
        inputs = [one for one in node.all_input_nodes if one in bounds]
        if node.op == "placeholder":
            bounds[node] = at_door
        elif node.op == "output":
            return math.hypot(*(bounds[one] for one in inputs))
        elif not inputs:
            continue  # a constant: no image in it
        elif _is_sum(node):
            # A constant summand adds nothing; x + x counts twice.
            bounds[node] = sum(
                bounds[one] for one in node.args if isinstance(one, Node) and one in bounds
            )
        elif node.target is torch.cat:
            bounds[node] = math.hypot(*(bounds[one] for one in node.args[0]))
        elif node.op == "call_module" and isinstance(
            graph.get_submodule(node.target), nn.Conv2d | nn.Linear
        ):
            layer, gain, after = graph.get_submodule(node.target), None, node
            users = list(node.users)
            if len(users) == 1 and isinstance(norm := _module(graph, users[0]), nn.BatchNorm2d):
                gain, after = _gain(norm), users[0]
            shape = (
                inputs[0].meta["tensor_meta"].shape[1:]
                if isinstance(layer, nn.Conv2d)
                else (layer.in_features,)
            )
            factor = operator_norm(layer, shape, gain=gain, iterations=iterations, seed=seed)
            bounds[node] = bounds[after] = bounds[inputs[0]] * factor
        else:
            bounds[node] = bounds[inputs[0]] * _factor(graph, node, inputs)
    raise ValueError("the traced graph has no output")


def _factor(graph: GraphModule, node: Node, inputs: list[Node]) -> float:
    """Lipschitz constant of one operation of a single tensor."""
    module, name = _module(graph, node), getattr(node.target, "__name__", str(node.target))
    meta = inputs[0].meta.get("tensor_meta")
    if len(inputs) == 1 and isinstance(module, NON_EXPANSIVE):
        return 1.0
    if len(inputs) == 1 and type(module) in SLOPES:
        return SLOPES[type(module)]
    if isinstance(module, nn.BatchNorm2d):
        return _gain(module).max().item()
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope))
    if isinstance(module, nn.MaxPool2d):
        # One value may be the largest of this many windows: taps of a window lie `dilation` apart, windows `stride`.
        sides = zip(*map(_pair, (module.kernel_size, module.stride, module.dilation)), strict=True)
        return math.sqrt(
            math.prod(
                math.ceil(size * math.gcd(stride, gap) / stride) for size, stride, gap in sides
            )
        )
    if isinstance(module, AVERAGES):
        return _average_norm(module, meta.shape)
    if len(inputs) == 1 and module is None:
        if name in (
            "relu",
            "relu_",
            "relu6",
            "flatten",
            "view",
            "reshape",
            "dropout",
            "contiguous",
            "squeeze",
        ):
            return 1.0
        if name == "silu":
            return SLOPES[nn.SiLU]
        if name == "pad" and node.args[2:] in ((), ("constant",)) and not node.kwargs:
            return 1.0
        if name in ("adaptive_avg_pool2d", "avg_pool2d", "mean"):
            rest, options = node.args[1:], node.kwargs
            call = getattr(Tensor, name) if name == "mean" else node.target
            return _average_norm(lambda z: call(z, *rest, **options), meta.shape)
    what = (
        f"module {node.target} ({type(module).__name__})"
        if module is not None
        else f"operation {name}"
    )
    raise ValueError(
        f"no bound is known for the {what}; bound the parts before and after it one by one"
    )


def _average_norm(average: Callable[[Tensor], Tensor], shape: Sequence[int]) -> float:
    """Schur's bound of a map with entries >= 0: sqrt of the largest row sum times the largest column sum."""
    with torch.enable_grad():
        ones = torch.ones(shape, requires_grad=True)
        rows = average(ones)
        (columns,) = torch.autograd.grad(rows.sum(), ones)
    return math.sqrt(rows.max().item() * columns.max().item())


def _is_sum(node: Node) -> bool:
    return (
        node.target in (operator.add, operator.iadd, torch.add, "add", "add_") and not node.kwargs
    )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _module(graph: GraphModule, node: Node) -> nn.Module | None:
    return graph.get_submodule(node.target) if node.op == "call_module" else None


def _gain(norm: nn.BatchNorm2d) -> Tensor:
    """|gamma| / sqrt(var + eps) per channel, what a batch norm multiplies by in eval mode."""
    if norm.running_var is None:
        raise ValueError(
            "a batch norm without running statistics has no gain of its own; use track_running_stats=True"
        )
    gain = (norm.running_var.detach() + norm.eps).rsqrt()
    return gain if norm.weight is None else gain * norm.weight.detach().abs()


def _kind(layer: nn.Conv2d | nn.Linear) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    size = "x".join(map(str, layer.kernel_size))
    if layer.groups == 1:
        return size
    return (
        f"depthwise {size}"
        if layer.groups == layer.in_channels
        else f"{size} in {layer.groups} groups"
    )


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@torch.no_grad()
def _input_shapes(model: nn.Module, input_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """What shape, without the batch, each Conv2d and Linear sees; of several the largest: its norm is too."""
    shapes: dict[str, tuple[int, ...]] = {}

    def hook(name: str) -> Callable:
        def note(_, inputs: tuple[Tensor, ...]) -> None:
            shape = tuple(inputs[0].shape[1:])
            if math.prod(shape) > math.prod(shapes.get(name, (0,))):
                shapes[name] = shape

        return note

    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers]
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()(torch.zeros(1, *input_shape, device=_device(model)))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in flags:
            module.training = training
    return {
        name: shapes[name] if isinstance(layer, nn.Conv2d) else (layer.in_features,)
        for name, layer in layers
        if name in shapes
    }


# ------------------------------------------------------------------ power iteration


def _geometry(layer: nn.Conv2d | nn.Linear) -> list:
    """Stride, padding, dilation and groups; a linear layer is a 1 x 1 convolution."""
    if isinstance(layer, nn.Linear):
        return [[1, 1], [0, 0], [1, 1], 1]
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"layer must be a Conv2d or Linear, not {type(layer).__name__}")
    padding = layer.padding
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding = "uneven" if any(r % 2 for r in reach) else [r // 2 for r in reach]
    if padding == "uneven" or layer.padding_mode != "zeros":
        raise ValueError(
            "operator norms are known for zero padding, equal on both sides; pad with F.pad before"
        )
    padding = [0, 0] if padding == "valid" else list(padding)
    return [list(layer.stride), padding, list(layer.dilation), layer.groups]


def _as_kernel(weight: Tensor) -> Tensor:
    return weight if weight.ndim == 4 else weight[:, :, None, None]


def _convolve(v: Tensor, kernel: Tensor, geometry: list) -> Tensor:
    stride, padding, dilation, groups = geometry
    # By name, so that `quick_input_gradient` leaves it alone: here the weight is what is differentiated.
    return F.conv2d(v, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)


def _start(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    """A random input of a layer, [1, C, H, W], drawn on the CPU: the same on every device."""
    shape = tuple(shape) if len(shape) == 3 else (shape[0], 1, 1)
    v = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))
    return v.to(like.device)


def _iterate(v: Tensor, kernel: Tensor, geometry: list, iterations: int) -> Tensor:
    """Power iteration on the transposed operator times the operator; unit vectors, one per group."""
    groups = geometry[3]
    with torch.no_grad():
        v = _unit(v, groups)
        for _ in range(iterations):
            back = _transpose_times(v, kernel, geometry)
            # A group of zeros sends its vector to zero, where it would stay for good.
            alive = (_group_norms(back, groups) > TINY)[:, None]
            v = torch.where(alive, back.reshape(groups, -1), v.reshape(groups, -1)).view(v.shape)
            v = _unit(v, groups)
    return v


def _largest(v: Tensor, kernel: Tensor, geometry: list, iterations: int) -> float:
    """Largest singular value of all groups, by the Lanczos process on the transposed operator times the operator."""
    groups, shape = geometry[3], v.shape
    v = _unit(v, groups).reshape(groups, -1)
    before, link, squares, links = torch.zeros_like(v), v.new_zeros(groups), [], []
    # Without orthogonalisation against all former vectors: rounding then only repeats values already found.
    for _ in range(iterations):
        back = _transpose_times(v.view(shape), kernel, geometry).reshape(groups, -1)
        squares.append((back * v).sum(1))
        back = back - squares[-1][:, None] * v - link[:, None] * before
        link = back.norm(dim=1)
        # Where the span is complete nothing but rounding is left.
        link = torch.where(link > 1e-5 * squares[0], link, 0.0)
        links.append(link)
        before, v = v, torch.where(link[:, None] > 0, back / link[:, None].clamp_min(TINY), 0.0)
    # The operator in the basis of the iterates: tridiagonal; eigvalsh reads the lower half.
    small = torch.diag_embed(torch.stack(squares, 1))
    if iterations > 1:
        small = small + torch.diag_embed(torch.stack(links[:-1], 1), offset=-1)
    return torch.linalg.eigvalsh(small)[:, -1].clamp_min(0).sqrt().max().item()


def _transpose_times(v: Tensor, kernel: Tensor, geometry: list) -> Tensor:
    return _convolution_backward(
        _convolve(v, kernel, geometry), v, kernel, geometry, (True, False)
    )[0]


def _unit(v: Tensor, groups: int) -> Tensor:
    return (v.reshape(groups, -1) / _group_norms(v, groups).clamp_min(TINY)[:, None]).view(v.shape)


def _group_norms(v: Tensor, groups: int) -> Tensor:
    """L2 norm [groups] of the channels of each group of one map [1, C, H, W]."""
    return v.reshape(groups, -1).norm(dim=1)


# ------------------------------------------------------------------ second derivatives


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
        if (
            function is F.conv2d
            and len(args) == 7
            and args[2] is None
            and args[6] > 1
            and not isinstance(args[4], str)
        ):
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
        if (
            torch.is_grad_enabled()
        ):  # the pass with create_graph=True: the input's gradient alone is wanted
            return _InputGradient.apply(upstream, x.detach(), weight, ctx.geometry), None, None
        return (
            *_convolution_backward(upstream, x, weight, ctx.geometry, ctx.needs_input_grad[:2]),
            None,
        )


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
        by_weight = _convolution_backward(upstream, direction, weight, ctx.geometry, (False, True))[
            1
        ]
        return F.conv2d(direction, weight, None, *ctx.geometry), None, by_weight, None


def _convolution_backward(upstream, x, weight, geometry, wanted: tuple[bool, bool]) -> tuple:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        upstream,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [*wanted, False],
    )[:2]
