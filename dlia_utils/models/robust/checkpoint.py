"""Public checkpoints: unwrapped and loaded whole (but for the head) or not at all, with a report."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .nets import Backbone

CONTAINERS = ("state_dict", "model_state", "model_state_dict", "last")
PREFIXES = ("module.", "model.")
NORMALISATION = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}
# Scores and optimiser payloads saved beside the weights may hold numpy numbers. These rebuild data only.
HARMLESS = [
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(
        type(np.dtype(kind))
        for kind in ("bool", "float16", "float32", "float64", "int32", "int64", "uint8")
    ),
]
SHOWN = 10


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint file gave to a model.

    file, bytes, sha256  the file: name without folder, size, digest
    container            "bare", or the entry of the file that held the weights
    payload              what else lay beside the weights in the file (epoch, optimizer, ...); not used
    prefix               what was taken off the front of every key, such as "module."
    matched, entries     entries loaded without the head, and entries of the model without the head
    head                 "file" when the last layer was loaded, "drawn anew" when it does not fit num_classes
    unused               entries of the file's block that the published forward pass never runs
    normalisation        entries that repeat the model's own mean and std; checked, not loaded
    counters             batch counters that the file lacks; set to 0
    """

    file: str
    bytes: int
    sha256: str
    container: str
    payload: tuple[str, ...]
    prefix: str
    matched: int
    entries: int
    head: str
    unused: int
    normalisation: int
    counters: int

    def __str__(self) -> str:
        extras = [f"head {'from the file' if self.head == 'file' else self.head}"]
        if self.container != "bare" or self.prefix:
            extras.append(f"unwrapped from {self.container!r}, prefix {self.prefix or 'none'}")
        for value, text in (
            (self.unused, "entries of a block the forward pass never runs left out"),
            (self.normalisation, "entries agree with the model's own normalisation"),
            (self.counters, "batch counters missing, set to 0"),
        ):
            if value:
                extras.append(f"{value} {text}")
        if self.payload:
            extras.append("not used: " + ", ".join(self.payload))
        size = f"{self.bytes / 1e6:.1f} MB, sha256 {self.sha256[:12]}"
        return f"{self.file} ({size}): {self.matched} of {self.entries} entries; " + "; ".join(
            extras
        )


def load_backbone(
    backbone: Backbone,
    path: str | Path,
    *,
    name: str,
    mean: Sequence[float],
    std: Sequence[float],
    unused: tuple[str, str] | None = None,
) -> LoadReport:
    """Load a public checkpoint into `backbone` in place: every entry but the head, or ValueError.

    The file is read with `weights_only=True`. It may be a bare state dict or lie in a container beside an
    optimiser, with "module." and "model." in front of every key. Its head is taken if it has the model's
    shape, else the model keeps its own. mean, std: what the model normalises by; a file that says otherwise
    is refused. unused: (front, twin), a block of the file that the published forward pass never runs, with
    the structure of the model's block `twin`. The backbone's body may lie on the meta device.
    Raises: FileNotFoundError; ValueError for a truncated or unreadable file, for keys or shapes that do not
    fit, for values that are not finite and for batch norms that were never trained.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint {path}: correct `pretrained=`, or use None for random weights"
        )
    own = backbone.state_dict()
    head = {key for key in own if key.startswith(f"{backbone.HEAD}.")}
    _check_size(path, name, sum(4 * value.numel() for key, value in own.items() if key not in head))
    state, container, payload = _read(path)
    state, prefix = _without_prefixes(state)
    state, normalisation = _without_normalisation(state, mean=mean, std=std, origin=path.name)
    state, dropped = _without_unused(state, own, unused, origin=path.name)

    from_file = all(key in state and state[key].shape == own[key].shape for key in head)
    counters = [key for key in own if key.endswith("num_batches_tracked") and key not in state]
    wanted = {key: value for key, value in own.items() if key not in head and key not in counters}
    _refuse_differences(
        {key: value for key, value in state.items() if key not in head},
        wanted,
        name=name,
        origin=path.name,
    )
    _refuse_untrained(state, origin=path.name)

    complete = {key: state[key].to(own[key].dtype) for key in wanted}
    complete |= {key: torch.zeros((), dtype=own[key].dtype) for key in counters}
    complete |= {key: state[key].to(own[key].dtype) if from_file else own[key] for key in head}
    backbone.load_state_dict(complete, assign=True)
    return LoadReport(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=_sha256(path),
        container=container,
        payload=payload,
        prefix=prefix,
        matched=len(wanted),
        entries=len(wanted) + len(counters),
        head="file" if from_file else "drawn anew",
        unused=dropped,
        normalisation=normalisation,
        counters=len(counters),
    )


def _check_size(path: Path, name: str, needed: int) -> None:
    size = path.stat().st_size
    if size < needed:
        raise ValueError(
            f"{path.name} has {size / 1e6:.2f} MB, but the weights of {name} alone take {needed / 1e6:.2f} MB: "
            "a truncated download, a web page saved in its place, or another model's file. Fetch it again"
        )


def _read(path: Path) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """State dict, the container's entry it came from ("bare" for none), and the names of the rest."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds a {found[1]}" if found else "it is damaged or no checkpoint"
        raise ValueError(
            f"{path.name} cannot be read with weights_only=True ({what}). Fetch it again; if you trust its "
            "source, re-save the weights alone: torch.save(state_dict, path)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path.name} is damaged or no checkpoint ({type(error).__name__}): fetch it again"
        ) from error
    container = "bare"
    payload: tuple[str, ...] = ()
    if isinstance(content, dict):
        found = [key for key in CONTAINERS if isinstance(content.get(key), dict)]
        if len(found) > 1:
            raise ValueError(
                f"{path.name} holds several sets of weights ({', '.join(found)}): save the one you mean alone"
            )
        if found:
            container = found[0]
            payload = tuple(str(key) for key in content if key != container)
            content = content[container]
    if (
        not isinstance(content, dict)
        or not content
        or not all(map(torch.is_tensor, content.values()))
    ):
        raise ValueError(
            f"{path.name} holds no state dict, bare or under {', '.join(CONTAINERS)} (a file of this suite is "
            "read by models.load)"
        )
    return dict(content), container, payload


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    taken = ""
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            taken += prefix
    return state, taken


def _without_normalisation(
    state: dict[str, Tensor], *, mean: Sequence[float], std: Sequence[float], origin: str
) -> tuple[dict[str, Tensor], int]:
    """Leave out mean and std, which the model owns, after a check that the file means the same."""
    ours = {"mean": torch.tensor(mean), "std": torch.tensor(std)}
    rest = {}
    for key, value in state.items():
        role = NORMALISATION.get(key.removeprefix("normalization."))
        if role is None:
            rest[key] = value
        elif value.numel() != 3 or not torch.allclose(
            value.flatten().float(), ours[role], atol=1e-3
        ):
            raise ValueError(
                f"{origin}: {key} is {value.flatten().tolist()}, but this model normalises by "
                f"{ours[role].tolist()}: another model's file"
            )
    return rest, len(state) - len(rest)


def _without_unused(
    state: dict[str, Tensor], own: dict[str, Tensor], unused: tuple[str, str] | None, *, origin: str
) -> tuple[dict[str, Tensor], int]:
    """Leave out the block that is never run, if it is there whole; what is not whole is another model's."""
    if unused is None:
        return state, 0
    front, twin = unused
    expected = {
        front + key.removeprefix(twin): v.shape for key, v in own.items() if key.startswith(twin)
    }
    found = {key: value.shape for key, value in state.items() if key.startswith(front)}
    if any(
        found.get(key) != shape for key, shape in expected.items() if "num_batches" not in key
    ) or (found.keys() - expected.keys()):
        raise ValueError(
            f"{origin} does not hold the block {front}* that this model's public file carries unused "
            f"({len(found)} of {len(expected)} entries found): another model's file"
        )
    return {key: value for key, value in state.items() if key not in found}, len(found)


def _refuse_differences(
    state: dict[str, Tensor], wanted: dict[str, Tensor], *, name: str, origin: str
) -> None:
    problems = [f"missing {key}" for key in wanted if key not in state]
    problems += [f"unknown {key}" for key in state if key not in wanted]
    problems += [
        f"{key}: {tuple(state[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if not problems:
        return
    matched = sum(key in state and state[key].shape == value.shape for key, value in wanted.items())
    shown = "; ".join(problems[:SHOWN])
    shown += f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise ValueError(
        f"{origin} does not fit {name} ({matched} of {len(wanted)} entries matched): {shown}"
    )


def _refuse_untrained(state: dict[str, Tensor], *, origin: str) -> None:
    broken = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise ValueError(
            f"{origin} holds NaN or infinite values, first in {broken[0]}: fetch it again"
        )
    variances = [
        value
        for key, value in state.items()
        if key.endswith(".running_var") and ".meansparse" not in f".{key}"
    ]
    if all(bool((value == 1).all()) for value in variances):
        raise ValueError(
            f"{origin}: every batch norm's running variance is 1, so these weights were never trained"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
