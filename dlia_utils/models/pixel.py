"""The network between pixels and logits: its normalisation, what every body shares, a fast frozen copy."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parametrize

from ..device import device_of
from .layers import first_channels, untouched

log = logging.getLogger("dlia_utils")

TOLERANCE = 1e-6  # as the attacks'


class PixelModel(nn.Module):
    """A classifier that takes images in [0, 1], grey or colour, and normalises them itself.

    Attacks then work in pixel units, and no caller can forget or repeat the normalisation.

    Args: `backbone` maps normalised [B, 3, H, W] to logits [B, K]; `mean`, `std` are per channel, in [0, 1]
    units, and their number is that of the channels; `recipe` is what `models.create` needs to build the same
    architecture again (it is saved with the weights).
    Shapes: x [B, 1, H, W] (repeated to three channels) or [B, 3, H, W] -> logits [B, K].
    Raises: ValueError for any other shape.

    >>> model = PixelModel(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), mean=[0.5] * 3, std=[0.25] * 3)
    >>> model(torch.rand(5, 1, 4, 4)).shape
    torch.Size([5, 2])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        recipe: dict | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))
        self.recipe = recipe

    def normalize(self, x: Tensor) -> Tensor:
        """Pixels [B, 1 or 3, H, W] in [0, 1] -> normalised [B, 3, H, W]; one channel is repeated."""
        channels = self.mean.shape[1]
        if x.ndim != 4 or x.shape[1] not in (1, channels):
            colour = f" or [B, {channels}, H, W]" if channels > 1 else ""
            raise ValueError(f"expected images [B, 1, H, W]{colour}, got {tuple(x.shape)}")
        return (x - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(self.normalize(x))


def wrap(
    net: nn.Module,
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    recipe: dict | None = None,
) -> PixelModel:
    """Your own network as a model of the suite: images in [0, 1] go in, normalised inside.

    Attacks and heat maps then work in pixels: an eps of 4/255 is four grey levels, whatever the
    network was trained on, and the answer is the same as normalising by hand. Nobody else may
    normalise: give every function of the suite plain images in [0, 1] (`images.float() / 255`).
    mean, std: what the network was trained with, for pixels in [0, 1]: one number or one per
    channel, such as torchvision's (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225). Neither: the
    network takes [0, 1] itself.
    recipe: what `models.create` needs to build it again; without one, `models.load(path, build)`
    takes a function that builds it. The model holds `net` itself as `backbone`, in its mode and on
    its device.
    Shapes: [B, 1 or C, H, W] -> what `net` returns; C is what the first convolution reads (without
    any: the number of means, 3 for a single one), and one channel is repeated to C.
    Raises: TypeError for what is no nn.Module; ValueError for a network that is wrapped already,
    one of mean and std alone, std <= 0, numbers on another scale, or not one per channel.

    >>> from torchvision.models import resnet18
    >>> mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    >>> model = wrap(resnet18(num_classes=2), mean=mean, std=std).eval()
    >>> x = torch.rand(2, 1, 64, 64)  # grey, in [0, 1]
    >>> model(x).shape
    torch.Size([2, 2])
    >>> torch.equal(model(x), model.backbone((x - model.mean) / model.std))
    True
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"wrap takes a network, a torch.nn.Module, not {type(net).__name__}")
    if isinstance(net, PixelModel):
        raise ValueError(
            f"this {type(net).__name__} normalises images in [0, 1] already: use it as it is"
        )
    if (mean is None) != (std is None):
        raise ValueError("give both mean and std, or neither where the network takes [0, 1] itself")
    means, stds = _numbers(0.0 if mean is None else mean), _numbers(1.0 if std is None else std)
    if not all(0 < value < float("inf") for value in stds):
        raise ValueError(f"std must be positive, not {std}")
    if not all(value <= 1 for value in (*means, *stds)):
        raise ValueError(
            f"mean {mean} and std {std} must be those of pixels in [0, 1]: are these on the 0..255 "
            "scale? divide by 255"
        )
    listed = max(len(means), len(stds))
    channels = first_channels(net) or (listed if listed > 1 or isinstance(mean, Sequence) else 3)
    if {len(means), len(stds)} - {1, channels}:
        raise ValueError(
            f"mean and std must be one number or {channels}, one per channel, not {mean} and {std}"
        )
    means, stds = (values * (channels // len(values)) for values in (means, stds))
    model = PixelModel(net, means, stds, recipe=recipe)
    model.training = net.training
    return model.to(device_of(net))


def _numbers(values: float | Sequence[float]) -> list[float]:
    return torch.as_tensor(values, dtype=torch.float64).flatten().tolist()


def check_classifier(model: nn.Module, images: Tensor, *, classes: int | Sequence[str]) -> None:
    """Refuse, before any long work, a model that the suite would fail on, or be wrong about.

    Two of the images are run through in eval mode; the model is left as it was. classes: how many
    there are, or their names. Shapes: images [N, C, H, W] in [0, 1], on the model's device.
    Raises: TypeError for what is no nn.Module or returns no tensor; ValueError that names the fix
    for images outside [0, 1], another device, channels that do not fit, an answer that is not one
    row of logits [B, classes] an image, a single logit, probabilities, NaN or infinite logits.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    >>> check_classifier(net, torch.rand(2, 1, 4, 4), classes=2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: the model returns one logit z an image, but the suite needs one per class: ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    floats = isinstance(images, Tensor) and images.is_floating_point()
    if not floats or images.ndim != 4 or not len(images):
        raise ValueError("images must be floats [N, C, H, W] in [0, 1]; of uint8: x.float() / 255")
    wrapping = "models.wrap(net, mean=, std=)"
    low, high = (value.item() for value in images.detach().aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise ValueError(
            f"images must lie in [0, 1] but span [{low:.4g}, {high:.4g}]: pass pixels before "
            f"normalisation, and let the model normalise them: {wrapping}"
        )
    place = device_of(model, images)
    if place != images.device:
        raise ValueError(
            f"the model is on {place} but the images on {images.device}: "
            f"model.to({str(images.device)!r})"
        )
    try:
        with untouched(model):
            output = model(images[:2].clone())
    except (RuntimeError, ValueError, AssertionError) as error:
        door = any(isinstance(part, PixelModel) for part in model.modules())
        reads, shape = first_channels(model), list(images.shape[1:])
        hint = f"; it reads {reads} channel(s), and {wrapping} repeats a grey one"
        hint = "" if door or reads in (None, shape[0]) else hint
        raise ValueError(f"the model cannot read images {shape}: {error}{hint}") from error
    _check_answer(output, len(images[:2]), classes if isinstance(classes, int) else len(classes))


def _check_answer(output: object, count: int, classes: int) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returns a {type(output).__name__}, not a tensor of logits [B, K]: put it "
            "into an nn.Module whose forward returns only those, such as net(x).logits, "
            "net(x)['logits'] or net(x)[0]"
        )
    if output.shape == (count,) or output.shape == (count, 1):
        raise ValueError(
            "the model returns one logit z an image, but the suite needs one per class: give it "
            "nn.Linear(n, 2) as its last layer and train that, or make z two logits, [-z/2, z/2] "
            "with softmax sigmoid(z): models.wrap(models.TwoLogits(net, half=True), mean=, std=)"
        )
    if output.ndim != 2 or len(output) != count:
        raise ValueError(
            f"the model returns {list(output.shape)} for {count} image(s), not logits "
            f"[{count}, {classes}]"
        )
    if output.shape[1] != classes:
        raise ValueError(
            f"the model has {output.shape[1]} logits but there are {classes} classes: build it with "
            f"that many, or train a new head, models.with_head(model, num_classes={classes})"
        )
    if not bool(output.isfinite().all()):
        raise ValueError("the model returns NaN or infinite logits: were its weights loaded?")
    if bool((output >= 0).all()) and bool(((output.double().sum(1) - 1).abs() < 1e-5).all()):
        raise ValueError(
            "the model returns probabilities, not logits: take the softmax off its end"
        )


class TwoLogits(nn.Module):
    """`model` with one column per class: a scalar logit z becomes [-z, z]. Its input is copied.

    half: [-z / 2, z / 2] instead, whose softmax gives class 1 the probability sigmoid(z), as the
    model meant it.
    Shapes: x -> [B, 2] for a `model` with [B] or [B, 1]; [B, K] stays as it is.

    >>> model = TwoLogits(nn.Flatten(), half=True)
    >>> model(torch.tensor([[3.0], [-1.0]]))
    tensor([[-1.5000,  1.5000],
            [ 0.5000, -0.5000]])
    """

    def __init__(self, model: nn.Module, *, half: bool = False) -> None:
        super().__init__()
        self.model = model
        self.half = half

    def forward(self, x: Tensor) -> Tensor:
        # A first layer that works in place would write into the caller's images.
        output = self.model(x.clone())
        logits = two_logits(output)
        return logits / 2 if self.half and output.shape != logits.shape else logits


def two_logits(output: Tensor) -> Tensor:
    """Logits [B,K]; a scalar logit z [B] or [B,1] of class 1 becomes [-z, z].

    >>> two_logits(torch.tensor([[3.0], [-1.0]]))
    tensor([[-3.,  3.],
            [ 1., -1.]])
    """
    if not isinstance(output, Tensor) or output.ndim not in (1, 2):
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the model must return logits [B,K], or one logit per image [B] or [B,1], not {what}"
        )
    if output.ndim == 1 or output.shape[1] == 1:
        z = output.reshape(-1)
        return torch.stack([-z, z], 1)
    return output


class Backbone(nn.Module):
    """A network of normalised images: `features` [B, 3, H, W] -> [B, C], then the head named `HEAD`.

    `BLOCK` is the class of its blocks, what transfer learning freezes one by one; submodules are registered in
    the order of the forward pass. `MAP` names the layer that makes the last map [B, C, h, w]; "" is the last
    block.
    """

    HEAD = "fc"
    MAP = ""
    BLOCK: type[nn.Module]

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.HEAD)(self.features(x))

    def block_names(self) -> list[str]:
        """Dotted names of the blocks, the first one first."""
        return [name for name, module in self.named_modules() if isinstance(module, self.BLOCK)]


def pooled(x: Tensor) -> Tensor:
    """Mean over the map: [B, C, h, w] -> [B, C]."""
    # Never `view(-1, channels)`: on a map larger than 1 x 1 that mixes channels with positions.
    return x.mean(dim=(2, 3))


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8 and at least 8; width 1 changes none of ours.

    >>> scaled(216, 1.0), scaled(216, 1 / 16)
    (216, 16)
    """
    return max(8, 8 * round(channels * width / 8))


def fast_copy(model: nn.Module) -> nn.Module:
    """A frozen eval-mode deep copy, channels last, each batch norm folded into the convolution before it.

    Same logits (to 1e-4) and input gradients in less time and memory. Parametrized weights (spectral norm)
    are computed once. Of a model with a `.backbone` that part is folded. What torch.fx cannot trace is
    copied unfolded, with a line in the log. The caller's model is not touched.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    >>> [type(m).__name__ for m in fast_copy(net).children()]
    ['Conv2d']
    """
    copied = copy.deepcopy(model).eval()
    _bake(copied)
    if isinstance(getattr(copied, "backbone", None), nn.Module):
        copied.backbone = _fold(copied.backbone)
    else:
        copied = _fold(copied)
    return copied.requires_grad_(False).to(memory_format=torch.channels_last)


def _fold(network: nn.Module) -> nn.Module:
    try:
        return fuse(network).eval()
    except (
        Exception
    ) as error:  # torch.fx raises many types, its own and whatever the traced code raises
        log.info("%s is not folded (torch.fx: %s)", type(network).__name__, error)
        return network


def _bake(network: nn.Module) -> None:
    """Replace parametrized weights of a private copy by their values.

    `remove_parametrizations` would delete the property from a class the deep copy shares with the original,
    and so break the caller's model.
    """
    for module in [module for module in network.modules() if parametrize.is_parametrized(module)]:
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
        del module._modules["parametrizations"]
        module.__class__ = module.__class__.__bases__[0]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))
