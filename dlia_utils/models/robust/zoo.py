"""The robust models by name: where each comes from, what it reported, and how it is built."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from ...data import sources
from ..mobilenet import IMAGENET_MEAN, IMAGENET_STD
from ..pixel import PixelModel
from . import download as net
from .checkpoint import LoadReport, load_backbone
from .nets import Backbone, DeepMindWideResNet, HuangWideResNet, RaResNet, TradesWideResNet

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2471, 0.2435, 0.2616)
RAW = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CIFAR = (CIFAR_MEAN, CIFAR_STD)
IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
TOLERANCE = 1e-6  # as the attacks'

log = logging.getLogger("dlia_utils")


@dataclass(frozen=True)
class Source:
    """A published model. clean, robust, adaptive: accuracies in per cent; None where not published.

    robust is AutoAttack's, adaptive the one under an attack made for the model (straight through MeanSparse),
    both with linf perturbations of `eps` / 255 on the data set it was trained on. megabytes: size of the
    public file, which may hold more than the weights; None where unknown.
    """

    title: str
    paper: str
    robustbench: str
    build: Callable[..., Backbone]
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    parameters: int
    clean: float | None
    robust: float | None
    licence: str
    adaptive: float | None = None
    eps: int = 8
    dataset: str = "CIFAR-10"
    size: int = 32
    classes: int = 10
    drive: tuple[str, ...] = ()
    hub: tuple[tuple[str, str], ...] = ()
    megabytes: float | None = None
    unused: tuple[str, str] | None = (
        None  # (a block of the file that is never run, its twin in the model)
    )

    @property
    def urls(self) -> tuple[str, ...]:
        """Where the file is to be had, the more reliable host first."""
        return (
            *(net.hub_url(*place) for place in self.hub),
            *(net.drive_url(i) for i in self.drive),
        )


def _deepmind(depth: int, factor: int, **options) -> partial:
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    return partial(DeepMindWideResNet, widths=widths, depths=((depth - 4) // 6,) * 3, **options)


_RA_WRN = partial(DeepMindWideResNet, widths=(96, 216, 432, 864), depths=(30, 31, 10), squeeze=True)
_RA_HUB = ("poloclub/robust-principles", "poloclub/Ra-Principles")  # the authors name both


def _ra_hub(file: str) -> tuple[tuple[str, str], ...]:
    return tuple((repository, file) for repository in _RA_HUB)


SOURCES: dict[str, Source] = {
    "chen2024_wrn_34_20": Source(
        title="Data filtering, WRN-34-20",
        paper="Chen and Lee 2024, Data filtering for efficient adversarial training, Pattern Recognition",
        robustbench="Chen2024Data_WRN_34_20",
        build=partial(TradesWideResNet, depth=34, factor=20),
        normalisation=RAW,
        parameters=184_531_674,
        clean=86.10,
        robust=58.09,
        licence="MIT",
        drive=("1-IbKAGtp79tAEm59N0i8QMvMZ3nxSD2-",),
        megabytes=738,
    ),
    "gairat_wrn_28_10": Source(
        title="GAIRAT, WRN-28-10",
        paper="Zhang et al. 2020, arXiv 2010.01736",
        robustbench="Zhang2020Geometry",
        build=partial(TradesWideResNet, depth=28, factor=10),
        normalisation=RAW,
        parameters=36_479_194,
        clean=89.36,
        robust=59.64,
        licence="MIT (weights, by RobustBench; the authors' code has no licence)",
        drive=("1UoG1JhbAps1MdMc6PEFiZ2yVXl_Ii5Jk",),
        megabytes=305,
        unused=("sub_block1.", "block1."),
    ),
    "huang2021_wrn_34_r": Source(
        title="Architectural ingredients, WRN-34-R (EMA)",
        paper="Huang et al. 2021, arXiv 2110.03825",
        robustbench="Huang2021Exploring_ema",
        build=HuangWideResNet,
        normalisation=RAW,
        parameters=68_116_698,
        clean=91.23,
        robust=62.54,
        licence="MIT",
        drive=("1-GRwO5t9HxOS2y6RFK8QEsDXjdcgmVu6",),
        megabytes=272.6,
    ),
    "hat_wrn_34_10": Source(
        title="HAT, WRN-34-10",
        paper="Rade and Moosavi-Dezfooli 2021, Helper-based adversarial training, ICML workshop AML",
        robustbench="Rade2021Helper_extra",
        build=_deepmind(34, 10),
        normalisation=CIFAR,
        parameters=46_160_474,
        clean=91.47,
        robust=62.83,
        licence="MIT",
        drive=("1GhAp-0C3ONRy9BxIe0J9vKc082vHvR7t",),
        megabytes=184.7,
    ),
    "rebuffi2021_wrn_70_16": Source(
        title="CutMix and extra data, WRN-70-16",
        paper="Rebuffi et al. 2021, arXiv 2103.01946",
        robustbench="Rebuffi2021Fixing_70_16_cutmix_extra",
        build=_deepmind(70, 16),
        normalisation=CIFAR,
        parameters=266_796_506,
        clean=92.23,
        robust=66.56,
        licence="Apache-2.0",
        drive=("1qKDTp6IJ1BUXZaRtbYuo_t0tuDl_4mLg",),
        megabytes=1067.5,
    ),
    "standard_wrn_28_10": Source(
        title="Standard training, WRN-28-10",
        paper="Croce et al. 2020 (RobustBench), arXiv 2010.09670",
        robustbench="Standard",
        build=partial(TradesWideResNet, depth=28, factor=10),
        normalisation=RAW,
        parameters=36_479_194,
        clean=94.78,
        robust=0.0,
        licence="MIT",
        drive=("1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC",),
        megabytes=292,
    ),
    "meansparse_wrn_94_16": Source(
        title="MeanSparse, WRN-94-16",
        paper="Amini et al. 2024, arXiv 2406.05927",
        robustbench="Amini2024MeanSparse_S-WRN-94-16",
        build=_deepmind(94, 16, sparse=True),
        normalisation=CIFAR,
        parameters=365_915_610,
        clean=93.60,
        robust=75.28,
        adaptive=73.10,
        licence="MIT (weights, by RobustBench)",
        drive=("1-GoAnBP6K6uwAzJbe4liOSfN_sZVYTln", "1wHkKzSD4nk6IT0uOZa23ZFXSMBSAQ7mt"),
        megabytes=1464.7,
    ),
    "ra_wrn_70_16": Source(
        title="Robust Principles, RaWRN-70-16",
        paper="Peng et al. 2023, arXiv 2308.16258",
        robustbench="Peng2023Robust",
        build=_RA_WRN,
        normalisation=CIFAR,
        parameters=267_240_802,
        clean=93.27,
        robust=71.07,
        licence="MIT",
        drive=("1-6M8KHZdPmgqYkBSkdZQ2fLwp86ZQ9VU",),
        hub=_ra_hub("ra_wrn70_16_cifar10.pt"),
        megabytes=1069.4,
    ),
    "ra_resnet_50": Source(
        title="Robust Principles, RaResNet-50 for ImageNet",
        paper="Peng et al. 2023, arXiv 2308.16258",
        robustbench="",
        build=partial(RaResNet, widths=(288, 576, 1120, 2160), depths=(5, 8, 13, 1)),
        normalisation=IMAGENET,
        parameters=26_143_228,
        clean=70.17,
        robust=44.14,
        eps=4,
        dataset="ImageNet",
        size=224,
        classes=1000,
        licence="MIT",
        hub=_ra_hub("ra_resnet50_imagenet.pt"),
    ),
    "bartoldson2024_wrn_94_16": Source(
        title="Base of MeanSparse, WRN-94-16",
        paper="Bartoldson et al. 2024, arXiv 2404.09349",
        robustbench="Bartoldson2024Adversarial_WRN-94-16",
        build=_deepmind(94, 16),
        normalisation=CIFAR,
        parameters=365_915_610,
        clean=93.68,
        robust=73.71,
        licence="MIT (weights, by RobustBench)",
        drive=("1g6o9H1b6vjoBi1USdCBt64C8B8LPiioX",),
    ),
    "meansparse_ra_wrn_70_16": Source(
        title="MeanSparse on RaWRN-70-16",
        paper="Amini et al. 2024, arXiv 2406.05927",
        robustbench="Amini2024MeanSparse_Ra_WRN_70_16",
        build=partial(_RA_WRN, sparse=True),
        normalisation=CIFAR,
        parameters=267_240_802,
        clean=93.24,
        robust=72.08,
        adaptive=68.94,
        licence="MIT (weights, by RobustBench)",
        drive=("1-JdK480cLUrVCaNKCSBsmy7y59kGYF19", "1y-7wjdZI_UEvtt33pDLOhw41zx_oEqIp"),
        megabytes=1070.1,
    ),
}


def check_pixels(x: Tensor) -> None:
    """Refuse images with values outside [0, 1] or NaN. Raises: ValueError."""
    low, high = (value.item() for value in x.detach().aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise ValueError(
            f"images must lie in [0, 1] but span [{low:.4g}, {high:.4g}]: pass pixels before "
            "normalisation, the model owns its mean and std"
        )


class RobustModel(PixelModel):
    """A robust backbone behind the door [0, 1]: raw pixels in, logits out, values outside refused.

    These models differ in what they normalise by, half of them by nothing; a caller who normalises as well
    gets far worse numbers without an error, hence the check. `features` gives the pooled map [B, C] before
    the last layer, `head` is that layer. `load_report` tells what a checkpoint gave; None for random weights.
    Shapes: x [B, 1 or 3, H, W] in [0, 1], any size -> logits [B, K].
    Raises: ValueError for values outside [0, 1], NaN or another shape.

    >>> model = create("standard_wrn_28_10", width=1 / 16).eval()
    >>> model.features(torch.rand(2, 1, 32, 32)).shape
    torch.Size([2, 40])
    >>> model(torch.rand(2, 1, 32, 32) - 0.5).shape  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: images must lie in [0, 1] but span [-0...
    """

    backbone: Backbone
    load_report: LoadReport | None = None

    @property
    def head(self) -> nn.Module:
        """The layer between features and logits."""
        return getattr(self.backbone, self.backbone.HEAD)

    def normalize(self, x: Tensor) -> Tensor:
        """Pixels [B, 1 or 3, H, W] in [0, 1] -> normalised [B, 3, H, W]; one channel is repeated."""
        check_pixels(x)
        # Where the model normalises by nothing, the subtraction still makes one channel three.
        return super().normalize(x)

    def features(self, x: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [0, 1] -> pooled features [B, C]; `head` turns them into logits."""
        return self.backbone.features(self.normalize(x))


def create(
    name: str,
    *,
    num_classes: int = 2,
    width: float = 1.0,
    pretrained: str | Path | None = None,
    seed: int = 0,
) -> RobustModel:
    """Build a robust model by name (`list()` shows them with their papers), in train mode as torch does.

    pretrained: None (random weights, drawn from `seed`); the path of a public checkpoint; its address on
    Google Drive or Hugging Face; or "public", which downloads it from where the registry says. Everything
    but the head is loaded strictly (see `load_report`); the head is the file's if it has `num_classes`, else
    drawn from `seed`. width: multiplies every channel count, for quick tests; public files have width 1.
    Images of any size go in, [B, 1 or 3, H, W] in [0, 1]; the model normalises as its authors did.
    Raises: ValueError (unknown name, bad width or num_classes, a file that does not fit), FileNotFoundError,
    RuntimeError (no download).

    >>> model = create("hat_wrn_34_10", width=1 / 16).eval()
    >>> model(torch.rand(2, 1, 20, 24)).shape
    torch.Size([2, 2])
    """
    source = _source(name)
    if not width > 0:
        raise ValueError(f"width must be positive, not {width}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    remote = isinstance(pretrained, str) and (pretrained == "public" or "://" in pretrained)
    if remote and width != 1:
        raise ValueError(
            f"public checkpoints have width 1, not {width}: leave width out, or pretrained"
        )
    path = pretrained
    if remote:
        path = download(name, url=None if pretrained == "public" else pretrained)

    # The caller's random stream stays as it is: the same seed gives the same start wherever the call stands.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.device("cpu" if path is None else "meta"):
            backbone = source.build(num_classes, width)
        if (
            path is not None
        ):  # the body comes from the file; drawing 366 million numbers first is wasted
            channels = getattr(backbone, backbone.HEAD).in_features
            setattr(backbone, backbone.HEAD, nn.Linear(channels, num_classes))
    mean, std = source.normalisation
    report = None
    if path is None:
        log.info("%s: random weights, seed %d", name, seed)
    else:
        report = load_backbone(backbone, path, name=name, mean=mean, std=std, unused=source.unused)
        log.info("%s: %s", name, report)
    recipe = {"name": name, "num_classes": num_classes, "width": width}
    model = RobustModel(backbone, mean, std, recipe=recipe)
    model.load_report = report
    return model


def download(name: str, *, url: str | None = None, folder: str | Path | None = None) -> Path:
    """Fetch the public checkpoint of `name`, or the one at `url`; returns its path.

    The folder is by default `checkpoints` in the suite's cache (files of Hugging Face lie in the cache of its
    client). What is there already is not fetched again. Needs gdown or huggingface_hub. Raises: ValueError
    (unknown name or kind of address), RuntimeError (nothing could be fetched, with each reason).
    """
    source = _source(name)
    folder = Path(folder) if folder is not None else sources.cache_root() / "checkpoints"
    if url is not None:  # of unknown size; the loader still knows how much the weights take
        return net.fetch((url,), folder=folder, name=name)
    return net.fetch(source.urls, folder=folder, name=name, megabytes=source.megabytes)


def table() -> pd.DataFrame:
    """One row per model: what it is, what it reported, where its weights are and under which licence.

    `clean`, `robust`, `adaptive`: published accuracies in per cent on `dataset` at linf `eps` / 255; where
    `adaptive` is given, it is the number to believe.

    >>> table().query("robust > 70").index.tolist()[:2]
    ['meansparse_wrn_94_16', 'ra_wrn_70_16']
    """
    rows = {
        name: {
            "title": source.title,
            "paper": source.paper,
            "robustbench": source.robustbench,
            "dataset": source.dataset,
            "size": source.size,
            "classes": source.classes,
            "eps": source.eps,
            "clean": source.clean,
            "robust": source.robust,
            "adaptive": source.adaptive,
            "parameters": source.parameters,
            "normalises": source.normalisation is not RAW,
            "megabytes": source.megabytes,
            "licence": source.licence,
            "urls": " ".join(source.urls),
        }
        for name, source in SOURCES.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"unknown robust model {name!r}; known: {', '.join(SOURCES)}")
    return SOURCES[name]
