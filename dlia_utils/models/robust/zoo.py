"""The robust models by name: what they reported, where their files are, how they are loaded."""

from __future__ import annotations

import contextlib
import io
import logging
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ... import files
from ...data.sources import cache_root
from ..layers import check_sizes, drawn
from ..pixel import FeatureModel, load_strictly, phantom_weights
from .nets import DeepMindWideResNet, TradesWideResNet

RAW = ((0.0,) * 3, (1.0,) * 3)
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
TRADES = partial(TradesWideResNet, widths=(160, 320, 640), depth=4)
HUANG = partial(TradesWideResNet, widths=(320, 640, 512), depth=5, huang=True)
WIDE = partial(DeepMindWideResNet, widths=(16, 160, 320, 640), depths=(5, 5, 5))
WIDER = partial(DeepMindWideResNet, widths=(16, 256, 512, 1024))
RA = partial(DeepMindWideResNet, widths=(96, 216, 432, 864), depths=(30, 31, 10), squeeze=True)
NETWORKS = {  # what builds the network, and what it normalises by
    "chen2024_wrn_34_20": (partial(TRADES, widths=(320, 640, 1280), depth=5), RAW),
    "gairat_wrn_28_10": (TRADES, RAW),
    "huang2021_wrn_34_r": (HUANG, RAW),
    "hat_wrn_34_10": (WIDE, CIFAR),
    "rebuffi2021_wrn_70_16": (partial(WIDER, depths=(11, 11, 11)), CIFAR),
    "standard_wrn_28_10": (TRADES, RAW),
    "meansparse_wrn_94_16": (partial(WIDER, depths=(15, 15, 15), sparse=True), CIFAR),
    "ra_wrn_70_16": (RA, CIFAR),
}
# Accuracies in per cent; the size of the public file, which may hold more than the weights.
TABLE = """name;title;clean;robust;adaptive;parameters;megabytes;licence;paper
chen2024_wrn_34_20;Data filtering;86.10;58.09;;184531674;738;MIT;Chen and Lee 2024
gairat_wrn_28_10;GAIRAT;89.36;59.64;;36479194;305;MIT (weights);arXiv 2010.01736
huang2021_wrn_34_r;Architecture (EMA);91.23;62.54;;68116698;272.6;MIT;arXiv 2110.03825
hat_wrn_34_10;HAT;91.47;62.83;;46160474;184.7;MIT;Rade et al. 2021, ICML AML
rebuffi2021_wrn_70_16;CutMix, extra data;92.23;66.56;;266796506;1067.5;Apache-2.0;arXiv 2103.01946
standard_wrn_28_10;Standard training;94.78;0.0;;36479194;292;MIT;arXiv 2010.09670
meansparse_wrn_94_16;MeanSparse;93.60;75.28;73.10;365915610;1464.7;MIT (weights);arXiv 2406.05927
ra_wrn_70_16;Robust Principles;93.27;71.07;;267240802;1069.4;MIT;arXiv 2308.16258"""
# Ids of files on Google Drive, or files in repositories of poloclub on Hugging Face; tried in turn.
FILES = {
    "chen2024_wrn_34_20": "1-IbKAGtp79tAEm59N0i8QMvMZ3nxSD2-",
    "gairat_wrn_28_10": "1UoG1JhbAps1MdMc6PEFiZ2yVXl_Ii5Jk",
    "huang2021_wrn_34_r": "1-GRwO5t9HxOS2y6RFK8QEsDXjdcgmVu6",
    "hat_wrn_34_10": "1GhAp-0C3ONRy9BxIe0J9vKc082vHvR7t",
    "rebuffi2021_wrn_70_16": "1qKDTp6IJ1BUXZaRtbYuo_t0tuDl_4mLg",
    "standard_wrn_28_10": "1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC",
    "meansparse_wrn_94_16": "1-GoAnBP6K6uwAzJbe4liOSfN_sZVYTln 1wHkKzSD4nk6IT0uOZa23ZFXSMBSAQ7mt",
    "ra_wrn_70_16": "robust-principles/ra_wrn70_16_cifar10.pt 1-6M8KHZdPmgqYkBSkdZQ2fLwp86ZQ9VU",
}
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
HUB = "https://huggingface.co/poloclub/{}/resolve/main/{}"

log = logging.getLogger("dlia_utils")


def names() -> pd.DataFrame:
    """One row per model: what it is, what it reported, its licence, whether it normalises.

    `clean`, `robust` (AutoAttack), `adaptive` (straight through MeanSparse, the number to believe):
    published accuracies on CIFAR-10 in per cent, at linf 8/255.

    >>> names().query("robust > 70").index.tolist()
    ['meansparse_wrn_94_16', 'ra_wrn_70_16']
    """
    table = pd.read_csv(io.StringIO(TABLE), sep=";", index_col="name")
    return table.assign(normalises=[NETWORKS[name][1] is not RAW for name in table.index])


def create(
    name: str,
    *,
    num_classes: int = 2,
    width: float = 1.0,
    pretrained: str | Path | None = None,
    seed: int = 0,
) -> FeatureModel:
    """Build a robust model by name, for images of any size, [B, 1 or 3, H, W] in [0, 1].

    pretrained: None (random weights, drawn from `seed`), the path of a public checkpoint, "public",
    which downloads it, or "phantom" (width 1/40 of some models, for the smoke profile). All but the
    head is loaded strictly; the head is the file's if it has `num_classes`, else drawn. width: of
    every channel count; public files have 1. Raises: ValueError (another name, a file that does not
    fit or changed), FileNotFoundError, RuntimeError (download).

    >>> create("hat_wrn_34_10", width=1 / 16).eval()(torch.rand(2, 1, 20, 24)).shape
    torch.Size([2, 2])
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown robust model {name!r}; known: {', '.join(NETWORKS)}")
    check_sizes(num_classes=num_classes, width=width, seed=seed)
    path = download(name) if pretrained == "public" else pretrained
    build, normalisation = NETWORKS[name]
    backbone = drawn(seed, build, num_classes, width)
    recipe = {"name": name, "num_classes": num_classes, "width": width}
    model = FeatureModel(backbone, *normalisation, recipe=recipe, checked=True)
    if pretrained == "phantom":
        load_strictly(backbone, phantom_weights(name), origin=f"phantom {name}", head=_head(model))
        model.load_report = "features learnt from phantom images"
    elif path is not None:
        model.load_report = _load(model, Path(path), name)
    log.info("%s: %s", name, model.load_report or f"random weights, seed {seed}")
    return model


def _published(url: str) -> str:
    """The SHA-256 that Hugging Face tells of a large file."""
    from huggingface_hub import get_hf_file_metadata  # comes with accelerate; for such files only

    known = get_hf_file_metadata(url).etag or ""
    if len(known) != 64:
        raise OSError(f"no SHA-256, but {known!r}")
    return known


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _unchanged(path: Path) -> Path:
    """The path of a file with the hash that was written beside it, or is now."""
    found, record = files.sha256(path), _record(path)
    if not record.exists():
        with contextlib.suppress(OSError):  # in a folder that is for reading only
            files.write_text(f"{found}  {path.name}\n", record)
        log.info("%s: SHA-256 %s, compared from now on", path, found)
    elif (known := record.read_text(encoding="utf-8").split()[:1]) != [found]:
        was = "".join(known) or "nothing"
        fix = f"remove both to fetch it again, or {record.name} if you replaced the file yourself"
        raise ValueError(f"{path} has the SHA-256 {found}, {record} says {was}: {fix}")
    return path


def download(name: str) -> Path:
    """The public checkpoint of `name` in the suite's cache, fetched once, or RuntimeError.

    Hugging Face gives the SHA-256 of its files, which is compared; Google Drive does not, so the
    hash is written beside the file when it is first seen. A file that is no longer that one is
    refused: ValueError.
    """
    folder = cache_root() / "checkpoints"
    for kept in sorted(folder.glob(f"{name}*.pt")):
        return _unchanged(kept)
    megabytes, failures, target = names().megabytes[name], [], folder / f"{name}.pt"
    for place in FILES[name].split():
        url = HUB.format(*place.split("/")) if "/" in place else DRIVE + place
        try:
            with files.atomic_path(target) as temporary:
                known = _published(url) if "/" in place else None
                torch.hub.download_url_to_file(url, str(temporary), known, progress=False)
                size = temporary.stat().st_size / 1e6
                if size < 0.98 * megabytes:  # published to three or four digits
                    raise OSError(f"{size:.1f} of {megabytes} MB: truncated, or a web page")
        except Exception as error:  # of four libraries; all are told below
            failures.append(f"{url} ({type(error).__name__}: {error})")
        else:
            _record(target).unlink(missing_ok=True)  # of a file that was removed
            return _unchanged(target)
    fix = "switch the internet on, wait (Google Drive refuses files fetched too often), or pass the"
    fix += " path of the file as pretrained="
    raise RuntimeError(f"{name} could not be downloaded: {fix}. Tried {'; '.join(failures)}")


def _head(model: FeatureModel) -> list[str]:
    """The keys of the last layer, which may be of another width in a file."""
    return [f"{model.backbone.HEAD}.{kind}" for kind in ("weight", "bias")]


def _load(model: FeatureModel, path: Path, name: str) -> str:
    """Load a public checkpoint, all but the head, or raise; returns what it gave in a line."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: correct `pretrained=`, or use None")
    network, origin, size = model.backbone, path.name, path.stat().st_size / 1e6
    state = _weights(path, model)
    if name == "gairat_wrn_28_10":  # whose file holds a block that is never run
        state = {key: value for key, value in state.items() if not key.startswith("sub_block1.")}
    from_file = load_strictly(network, state, origin=origin, head=_head(model))
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{origin} holds NaN or infinite values: fetch it again")
    entries, last = len(network.state_dict()) - 2, "from the file" if from_file else "drawn anew"
    what = f"{origin} ({size:.1f} MB, sha256 {files.sha256(path)[:12]})"
    return f"{what}: {entries} of {entries} entries; head {last}"


def _weights(path: Path, model: FeatureModel) -> dict[str, Tensor]:
    """The state dict in a file: out of its container, without prefixes, mean and std."""
    # Scores saved beside the weights may be numpy numbers; these rebuild data only.
    scalar = np._core.multiarray.scalar
    kinds = [type(np.dtype(kind)) for kind in ("bool", "float32", "float64", "int32", "int64")]
    harmless = [(scalar, "numpy.core.multiarray.scalar"), scalar, np.dtype, *kinds]
    with torch.serialization.safe_globals(harmless):
        content = files.read_torch(
            path, "fetch it again, or save its weights alone (weights_only=True)"
        )
    for key in ("state_dict", "model_state", "model_state_dict", "last"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{path.name} holds no state dict: save the weights alone")
    for prefix in ("module.", "model."):
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    owned = {"mean": model.mean, "mu": model.mean, "std": model.std, "sigma": model.std}
    for key, ours in owned.items():
        theirs = content.pop(key, ours)
        if not np.allclose(theirs.flatten(), ours.flatten(), atol=1e-3):
            raise ValueError(f"{path.name} normalises by {key} {theirs.flatten().tolist()}")
    return dict(content)
