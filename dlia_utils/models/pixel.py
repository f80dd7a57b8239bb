"""The network between pixels and logits: its normalisation, its weights, a fast frozen copy."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from importlib import resources

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Tracer
from torch.fx.experimental.optimization import fuse
from torch.fx.proxy import TraceError

from ..device import device_of, evaluating
from .layers import first_channels
from .lipschitz import bake

TOLERANCE = 1e-6  # as the attacks'
WRAPPING = "models.wrap(net, mean=, std=)"


class PixelModel(nn.Module):
    """A classifier that takes images in [0, 1], grey or colour, and normalises them itself.

    `mean`, `std`: one per channel; `recipe`: what `models.create` takes; `checked`: values outside
    [0, 1] are refused. Shapes: [B, 1, H, W] (repeated) or [B, C, H, W] -> logits [B, K].
    """

    def __init__(
        self, backbone: nn.Module, mean, std, *, recipe: dict | None = None, checked: bool = False
    ) -> None:
        super().__init__()
        self.backbone, self.recipe, self.checked = backbone, recipe, checked
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1))

    def normalize(self, x: Tensor) -> Tensor:
        """Pixels [B, 1 or C, H, W] in [0, 1] -> normalised [B, C, H, W]; grey is repeated."""
        channels = self.mean.shape[1]
        if x.ndim != 4 or x.shape[1] not in (1, channels):
            colour = f" or [B, {channels}, H, W]" if channels > 1 else ""
            raise ValueError(f"expected images [B, 1, H, W]{colour}, got {tuple(x.shape)}")
        if self.checked:
            check_pixels(x)
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(self.normalize(x))


class FeatureModel(PixelModel):
    """A `PixelModel` whose backbone tells features from the head, the layer `backbone.HEAD`."""

    load_report: str | None = None  # what a robust model's checkpoint gave

    @property
    def head(self) -> nn.Module:
        """The layers between features and logits; what trains it trains the model."""
        return getattr(self.backbone, self.backbone.HEAD)

    def features(self, x: Tensor) -> Tensor:
        """Images [B, 1 or C, H, W] in [0, 1] -> features [B, C]; `head` turns them into logits."""
        return self.backbone.features(self.normalize(x))


def check_pixels(x: Tensor) -> None:
    """Refuse images with values outside [0, 1] or NaN. Raises: ValueError."""
    low, high = (value.item() for value in x.detach().aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        span = f"images must lie in [0, 1] but span [{low:.4g}, {high:.4g}]"
        fix = f"pass pixels before normalisation, the model owns its mean and std: {WRAPPING}"
        raise ValueError(f"{span}: {fix}")


def wrap(net: nn.Module, *, mean=None, std=None, recipe: dict | None = None) -> PixelModel:
    """Your own network as a model of the suite: images in [0, 1] go in, normalised inside.

    mean, std: what it was trained with, for pixels in [0, 1], a number or one per channel; neither:
    it takes [0, 1] itself. Shapes: [B, 1 or C, H, W] -> what `net` returns; C is what the first
    convolution reads. Raises: TypeError, ValueError for what is no bare network or no such numbers.

    >>> net, x = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()), torch.rand(2, 1, 8, 8)
    >>> model = wrap(net, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    >>> torch.equal(model(x), net((x - model.mean) / model.std))
    True
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"wrap takes a network, a torch.nn.Module, not {type(net).__name__}")
    if isinstance(net, PixelModel):
        raise ValueError(f"this {type(net).__name__} normalises images already: use it as it is")
    if (mean is None) != (std is None):
        raise ValueError("give both mean and std, or neither where the network takes [0, 1] itself")
    mean, std = (0.0, 1.0) if mean is None else (mean, std)
    kept = dict(dtype=torch.float64, device="cpu")  # also where a network is built without memory
    means, stds = (torch.as_tensor(v, **kept).flatten().tolist() for v in (mean, std))
    if not (min(stds) > 0 and max(means + stds) <= 1):
        text = f"mean {mean} and std {std} must be those of pixels in [0, 1], and std positive"
        raise ValueError(f"{text}: are these on the 0..255 scale? divide by 255")
    listed = max(len(means), len(stds))
    channels = first_channels(net) or (listed if listed > 1 or isinstance(mean, Sequence) else 3)
    if {len(means), len(stds)} - {1, channels}:
        raise ValueError(f"mean and std must be one number or {channels}, not {mean} and {std}")
    numbers = (v * channels if len(v) == 1 else v for v in (means, stds))
    model = PixelModel(net, *numbers, recipe=recipe)
    model.training = net.training
    return model.to(device_of(net))


def check_classifier(model: nn.Module, images: Tensor, *, classes: int | Sequence[str]) -> None:
    """Refuse, before any long work, a model that the suite would fail on, or be wrong about.

    Two of the images [N, C, H, W] in [0, 1] are run through; classes: number or names. Raises:
    ValueError that names the fix.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError("images must be floats [N, C, H, W] in [0, 1]; of uint8: x.float() / 255")
    check_pixels(images)
    try:
        with evaluating(model), torch.no_grad():
            output = model(images[:2].clone())
    except (RuntimeError, ValueError, AssertionError) as error:
        hint = f"it reads {first_channels(model)} channel(s), and {WRAPPING} repeats a grey one"
        shape = list(images.shape[1:])
        raise ValueError(f"the model cannot read images {shape} ({hint}): {error}") from error
    classes = classes if isinstance(classes, int) else len(classes)
    if problem := _problem(output, len(images[:2]), classes):
        raise ValueError(f"the model returns {problem}")


def _problem(output: object, count: int, classes: int) -> str:
    """What is wrong with an answer that should be logits [count, classes]."""
    if not isinstance(output, Tensor):
        fix = "put it into an nn.Module whose forward returns net(x)['logits'] or net(x)[0]"
        return f"a {type(output).__name__}, not a tensor of logits [B, K]: {fix}"
    shape = list(output.shape)
    if shape in ([count], [count, 1]):
        fix = "give it nn.Linear(n, 2) as its last layer and train that, or make z [-z/2, z/2]"
        fix += ": models.wrap(models.TwoLogits(net, half=True), mean=, std=)"
        return f"one logit z an image, but the suite needs one per class: {fix}"
    if len(shape) != 2 or shape[0] != count:
        return f"{shape} for {count} image(s), not logits [{count}, {classes}]"
    if shape[1] != classes:
        fix = f"build it with that many, or models.with_head(model, num_classes={classes})"
        return f"{shape[1]} logits but there are {classes} classes: {fix}"
    if not output.isfinite().all():
        return "NaN or infinite logits: were its weights loaded?"
    if (output >= 0).all() and ((output.double().sum(1) - 1).abs() < 1e-5).all():
        return "probabilities, not logits: take the softmax off its end"
    return ""


class TwoLogits(nn.Module):
    """`model` with a column per class: one logit z becomes [-z, z]; half: [-z / 2, z / 2].

    The softmax of the latter gives class 1 the probability sigmoid(z). The input is copied, as a
    first layer may work in place.
    """

    def __init__(self, model: nn.Module, *, half: bool = False) -> None:
        super().__init__()
        self.model, self.half = model, half

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x.clone())
        logits = two_logits(output)
        return logits / 2 if self.half and output.shape != logits.shape else logits


def two_logits(output: Tensor) -> Tensor:
    """Logits [B, K]; a scalar logit z [B] or [B, 1] of class 1 becomes [-z, z]."""
    if not isinstance(output, Tensor) or output.ndim not in (1, 2):
        what = getattr(output, "shape", type(output).__name__)
        raise ValueError(f"the model must return logits [B,K], [B,1] or [B], not {what}")
    z = output.reshape(-1)
    return torch.stack([-z, z], 1) if output.ndim == 1 or output.shape[1] == 1 else output


class Backbone(nn.Module):
    """A network of normalised images: `features` [B, 3, H, W] -> [B, C], then the layer `HEAD`.

    Submodules are registered in the order of the forward pass, the head as the last. `BLOCK`: the
    class of its blocks, which transfer learning freezes one by one; `MAP`: the layer of the last
    map, "" the last block.
    """

    HEAD = "fc"
    MAP = ""
    BLOCK: type[nn.Module]

    def features(self, x: Tensor) -> Tensor:
        for part in [*self.children()][:-1]:
            x = part(x)
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.HEAD)(self.features(x))


def chains(block: type, channels: Sequence[int], depths: Sequence[int], **options) -> list:
    """Chains of `depths` blocks, from one of `channels` to the next; all but the first stride."""
    made = []
    for k, depth in enumerate(depths):
        sides = [(channels[k], channels[k + 1], 1 if k == 0 else 2)]
        sides += [(channels[k + 1], channels[k + 1], 1)] * (depth - 1)
        blocks = (block(*side, first=n == 0, **options) for n, side in enumerate(sides))
        made.append(nn.Sequential(*blocks))
    return made


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8 and at least 8."""
    return max(8, 8 * round(channels * width / 8))


def load_strictly(
    model: nn.Module, state: dict[str, Tensor], *, origin: str, head: Sequence[str] = ()
) -> bool:
    """Load `state` if every key and shape fits, else ValueError with the differences; never a part.

    head: keys of a last layer that may be absent or of another width; the model then keeps its own,
    as it keeps batch norms' counters that old files lack. Returns whether `state` gave the head.

    >>> load_strictly(nn.Linear(2, 1), {"weight": torch.zeros(1, 2)}, origin="demo.pt")
    Traceback (most recent call last):
    ValueError: demo.pt does not fit Linear (1 of 2 entries matched): missing bias
    """
    own = model.state_dict()
    optional = {*head, *(key for key in own if key.endswith("num_batches_tracked"))}
    fits = {key for key in own if key in state and state[key].shape == own[key].shape}
    problems = [f"missing {key}" for key in own if key not in state and key not in optional]
    problems += [f"unknown {key}" for key in state if key not in own]
    for key in [key for key in own if key in state and key not in fits and key not in head]:
        problems.append(f"{key}: {tuple(state[key].shape)}, expected {tuple(own[key].shape)}")
    if problems:
        shown = "; ".join(problems[:10])
        shown += f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        matched = f"{len(fits)} of {len(own)} entries matched"
        raise ValueError(f"{origin} does not fit {type(model).__name__} ({matched}): {shown}")
    from_state = fits.issuperset(head)
    own.update((key, value) for key, value in state.items() if from_state or key not in head)
    model.load_state_dict(own)  # a state dict that knows the versions of the model's modules
    return from_state


def phantom_weights(name: str) -> dict[str, Tensor]:
    """Features of `name` learnt from synthetic images alone, for the smoke profile.

    Made by `python -m tools body`: MobileNetV2 of width 0.5 and three stages, robust models of
    width 1/40; all but the last layer.
    """
    from safetensors.torch import load  # comes with accelerate; for such files only

    file = resources.files(__package__) / "phantom_weights.safetensors"  # maybe inside a wheel
    found = load(file.read_bytes())
    own = {key.split("/", 1)[1]: v for key, v in found.items() if key.startswith(f"{name}/")}
    if not own:
        raise ValueError(f"no weights from phantom images for {name!r}: train it, or use None")
    return own


class _Tracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # torch.fx would look for each buffer of a MeanSparse operator among all of the model's.
        return hasattr(m, "straight_through") or super().is_leaf_module(m, module_qualified_name)


def fast_copy(model: nn.Module) -> nn.Module:
    """A frozen eval-mode copy, channels last, batch norms folded into the convolutions before them.

    Same logits (to 1e-4) and input gradients in less time and memory. Of a model with a `.backbone`
    that part is folded. What torch.fx cannot trace is copied unfolded, with a warning.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    >>> [type(m).__name__ for m in fast_copy(net).children()]
    ['Conv2d']
    """
    copied = bake(copy.deepcopy(model).eval())
    inside = isinstance(getattr(copied, "backbone", None), nn.Module)
    folded = copied.backbone if inside else copied
    try:
        traced = GraphModule(folded, _Tracer().trace(folded))
        folded = fuse(traced, no_trace=True).eval()
    except (TraceError, TypeError, RuntimeError, AttributeError) as error:
        message = f"{type(folded).__name__} could not be folded: attacks take several times as long"
        warnings.warn(f"{message} (torch.fx: {error})", RuntimeWarning, stacklevel=2)
    if inside:
        copied.backbone = folded
    else:
        copied = folded
    return copied.requires_grad_(False).to(memory_format=torch.channels_last)
