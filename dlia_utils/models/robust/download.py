"""Downloads from Google Drive and Hugging Face, whose clients are optional: clear words when one fails."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from ...files import atomic_path

DRIVE = re.compile(r"https://drive\.google\.com/(?:file/d/|(?:uc|open)\?(?:.*&)?id=)([\w-]+)")
HUB = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/(?:resolve|blob)/([^/]+)/([^?]+)")
# Sizes are published to three or four digits.
SLACK = 0.98

log = logging.getLogger("dlia_utils")


def drive_url(identity: str) -> str:
    """Address of a Google Drive file."""
    return f"https://drive.google.com/uc?id={identity}"


def hub_url(repository: str, file: str) -> str:
    """Address of a file in a Hugging Face repository."""
    return f"https://huggingface.co/{repository}/resolve/main/{file}"


def fetch(
    urls: Sequence[str], *, folder: str | Path, name: str, megabytes: float | None = None
) -> Path:
    """Download the checkpoint of `name` from the first of `urls` that answers; returns the file's path.

    Addresses on Google Drive need gdown, and the file is kept in `folder`; those on Hugging Face need
    huggingface_hub, which keeps its own cache. What is there already is not fetched again.
    megabytes: the published size; a shorter file is a truncated download and is not kept.
    Raises: ValueError for another kind of address; RuntimeError when none answers, with each reason.
    """
    for url in urls:
        if not DRIVE.match(url) and not HUB.match(url):
            raise ValueError(
                f"unknown address {url!r}: give a Google Drive or Hugging Face address, or the path of a file"
            )
    failures = []
    for url in urls:
        try:
            if DRIVE.match(url):
                return _from_drive(DRIVE.match(url)[1], Path(folder), name, megabytes)
            return _from_hub(*HUB.match(url).groups(), megabytes)
        except (
            Exception
        ) as error:  # each client raises types of its own: quota, no network, no such file
            failures.append(f"{url} ({type(error).__name__}: {_first_line(error)})")
    raise RuntimeError(
        f"the checkpoint of {name} could not be downloaded; tried "
        + "; ".join(failures)
        + ". Switch the "
        "internet on (Google Drive also refuses files that were fetched too often: wait, or fetch it in a "
        "browser), then pass the file's path as pretrained="
    )


def _from_drive(identity: str, folder: Path, name: str, megabytes: float | None) -> Path:
    target = folder / f"{name}-{identity}.pt"
    if target.is_file():
        return target
    gdown = _client("gdown")
    with atomic_path(target) as temporary:
        if gdown.download(url=drive_url(identity), output=str(temporary), quiet=True) is None:
            raise OSError("Google Drive gave no file")
        _require_whole(temporary, megabytes)
    log.info("%s: downloaded from Google Drive, %.1f MB", name, target.stat().st_size / 1e6)
    return target


def _from_hub(repository: str, revision: str, file: str, megabytes: float | None) -> Path:
    client = _client("huggingface_hub")
    path = Path(client.hf_hub_download(repo_id=repository, filename=file, revision=revision))
    _require_whole(path, megabytes)
    log.info("%s: from Hugging Face, %.1f MB", file, path.stat().st_size / 1e6)
    return path


def _client(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"needs {name}: python -m pip install {name}") from error


def _require_whole(path: Path, megabytes: float | None) -> None:
    size = path.stat().st_size / 1e6
    if megabytes is not None and size < SLACK * megabytes:
        raise OSError(
            f"{size:.1f} of {megabytes} MB: a truncated download, or a web page in its place"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
