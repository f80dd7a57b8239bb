"""What Kaggle takes: a kernel folder for each notebook, and one offline data set with the package as a wheel.

Kaggle's own client uploads these folders as they are (`push_commands`). Building twice gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nbformat import NotebookNode

from dlia_utils import __version__, files
from dlia_utils.data.sources import SOURCES

from . import notebooks

OFFLINE_SLUG = "dlia-utils"
# All that Kaggle's image lacks. One exact version, because a range would give other bytes after a release.
CAPTUM = "captum==0.9.0"
MACHINE = "NvidiaTeslaT4"  # two of them; with enable_gpu alone Kaggle gives a P100, which today's torch cannot use
MAX_TITLE = 50
PREFIX = "DLIA"  # groups the kernels in the user's list, and makes every title long enough

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]*[a-z0-9]")
_LICENSE_FILE = re.compile(r"[^/]+\.dist-info/(licenses/)?(LICEN[CS]E|COPYING)[^/]*")


@dataclass(frozen=True)
class Build:
    """A finished build: its folder, the slugs of the kernels, the files of the data set, and what is amiss."""

    folder: Path
    user: str
    kernels: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]


def build(
    user: str,
    *,
    out: str | Path = "build/kaggle",
    folder: str | Path = notebooks.FOLDER,
    captum: str | Path | None = None,
    strict: bool = False,
    internet: bool = True,
    competitions: Sequence[str] = (),
) -> Build:
    """Write `out`/kernels/<slug>/ for every notebook found in `folder`, and `out`/dataset/, all or nothing.

    `user`: the Kaggle user name that owns both; `captum`: a captum wheel (None: fetched by pip, and left out
    with a note when that fails, or refused when `strict`); `internet`: whether the kernels may use it (the
    pretrained weights are downloaded); `competitions`: slugs of competitions that the user has joined, for the
    notebooks that can use one. An older build in `out` is replaced whole.
    Errors, which leave `out` as it was: ValueError (user, slugs, notebooks that fail `notebooks.check`, a foreign
    `out`, a wheel that is not captum's, none when strict), FileNotFoundError (`captum`).
    """
    out = Path(out)
    _need_slug(user, "--user", "the last part of your profile's address")
    for slug in competitions:
        _need_slug(slug, "--competition", "the last part of the competition's address")
    _need_ours(out)
    wheel = _need_captum(Path(captum)) if captum else None
    sources = notebooks.pick([], folder)
    _need_good(sources)
    kernels = [
        kernel(one, user=user, internet=internet, competitions=competitions) for one in sources
    ]
    _need_different([metadata["title"] for _, metadata in kernels])
    notes = _competition_notes(sources, competitions)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Built beside `out`, then renamed: neither a fault nor Ctrl-C leaves half a folder to push.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        new = Path(scratch) / "new"
        try:
            wheel = wheel or _fetch(Path(scratch) / "fetched")
        except ValueError as error:
            if strict:
                raise
            notes.append(str(error))
        _write_dataset(new / "dataset", user, wheel)
        for notebook, metadata in kernels:
            place = new / "kernels" / PurePosixPath(metadata["id"]).name
            place.mkdir(parents=True)
            notebooks.write(notebook, place / metadata["code_file"])
            files.write_json(metadata, place / "kernel-metadata.json")
        _swap(new, out, Path(scratch) / "old")
    return Build(
        folder=out,
        user=user,
        kernels=tuple(PurePosixPath(metadata["id"]).name for _, metadata in kernels),
        files=tuple(sorted(one.name for one in (out / "dataset").iterdir())),
        notes=tuple(notes),
    )


def push_commands(build: Build) -> list[tuple[str, str]]:
    """The commands that bring `build` to Kaggle, in order, each with what it does.

    >>> one = Build(Path("build/kaggle"), "me", ("dlia-01-name",), (), ())
    >>> for command, _ in push_commands(one):
    ...     print(command.split(" -m ")[0])
    kaggle datasets create -p build/kaggle/dataset
    kaggle datasets version -p build/kaggle/dataset
    kaggle datasets status me/dlia-utils
    kaggle kernels push -p build/kaggle/kernels/dlia-01-name
    """
    dataset = str(build.folder / "dataset")
    steps = [
        (
            ["datasets", "create", "-p", dataset],
            "uploads the offline data set, private: the first time",
        ),
        (
            ["datasets", "version", "-p", dataset, "-m", f"dlia_utils {__version__}"],
            "uploads a new version of it: every later time, in place of the first command",
        ),
        (
            ["datasets", "status", f"{build.user}/{OFFLINE_SLUG}"],
            "says 'ready' once Kaggle has unpacked it: push the notebooks after that",
        ),
    ]
    for slug in build.kernels:
        push = ["kernels", "push", "-p", str(build.folder / "kernels" / slug)]
        steps.append((push, "uploads this notebook, private, and runs it on two T4s"))
    return [(shlex.join(["kaggle", *words]), what) for words, what in steps]


# -------------------------------------------------------------------------------------------------- kernels


def slugify(title: str) -> str:
    """The slug that Kaggle makes of a title in plain letters.

    >>> slugify("DLIA 01 pneumonia robustness")
    'dlia-01-pneumonia-robustness'
    """
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def kernel(
    source: Path, *, user: str, internet: bool = True, competitions: Sequence[str] = ()
) -> tuple[NotebookNode, dict[str, Any]]:
    """The notebook to push for `source`, without outputs, and its `kernel-metadata.json`.

    Title and slug come from the file's name, which stays when a heading is reworded: another slug would be
    another kernel on Kaggle. Errors: ValueError (a name that gives no title, a notebook without settings).
    """
    title = _title(source)
    notebook = notebooks.clean(notebooks.read(notebooks.product(source)))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.metadata.pop("source_hash", None)
    # Kaggle reads the machine from the notebook as well as from the metadata file, so both say the same. The
    # notebook's list of data sources would take Kaggle's internal numbers: left out, the metadata file decides.
    notebook.metadata["kaggle"] = {
        "accelerator": "nvidiaTeslaT4",
        "isGpuEnabled": True,
        "isInternetEnabled": internet,
        "language": "python",
        "sourceType": "notebook",
    }
    handles = [SOURCES[name].handle for name in _datasets(source)]
    metadata = {
        "id": f"{user}/{slugify(title)}",
        "title": title,
        "code_file": notebooks.product(source).name,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": internet,  # the client takes a missing one for true
        "machine_shape": MACHINE,
        "dataset_sources": [*filter(None, handles), f"{user}/{OFFLINE_SLUG}"],
        "competition_sources": list(competitions) if "" in handles else [],
        "kernel_sources": [],
        "model_sources": [],
    }
    return notebook, metadata


def _title(source: Path) -> str:
    if not re.fullmatch(r"\d\d(_[a-z0-9]+)+", source.stem):
        raise ValueError(
            f"{source.name} gives no Kaggle title: rename it to NN_some_words.py (lower-case letters, digits)"
        )
    title = f"{PREFIX} {source.stem.replace('_', ' ')}"
    if len(title) > MAX_TITLE:
        raise ValueError(
            f"{source.name} gives the Kaggle title {title!r}, {len(title)} characters of at most {MAX_TITLE}: "
            f"rename it to at most {MAX_TITLE - len(PREFIX) - 1}"
        )
    return title


def _datasets(source: Path) -> Sequence[str]:
    """The data sets that the full study of a notebook can use."""
    names = notebooks.full_settings(source)["dataset"]
    return (names,) if isinstance(names, str) else names


def _competition_notes(sources: Sequence[Path], competitions: Sequence[str]) -> list[str]:
    """A note for each notebook that could use a competition; ValueError for a competition that none can use."""
    able = [
        source for source in sources if any(not SOURCES[name].handle for name in _datasets(source))
    ]
    if competitions and not able:
        raise ValueError(
            f"--competition {' '.join(competitions)}: no notebook uses a competition, leave it out"
        )
    if competitions:
        return []
    return [
        f"{source.stem} can use a competition's films too: name it with --competition SLUG if you have joined it"
        for source in able
    ]


# ------------------------------------------------------------------------------------------ offline data set


def write_wheel(folder: str | Path) -> Path:
    """Write `dlia_utils` as a wheel into `folder`; returns its path.

    Pure Python, the files uncompressed and with a fixed date, so that the bytes depend on the sources alone. It
    installs with pip and imports as it lies, from `sys.path` (PEP 427, the wheel format).
    """
    project = tomllib.loads((notebooks.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    package = notebooks.REPOSITORY / "dlia_utils"
    info = f"dlia_utils-{__version__}.dist-info"
    content = {
        one.relative_to(notebooks.REPOSITORY).as_posix(): one.read_bytes()
        for one in package.rglob("*")
        if one.is_file() and one.suffix != ".pyc" and not _hidden(one.relative_to(package))
    }
    content[f"{info}/licenses/LICENSE"] = (notebooks.REPOSITORY / "LICENSE").read_bytes()
    content[f"{info}/METADATA"] = _core_metadata(project).encode()
    content[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: dlia_utils\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    content[f"{info}/RECORD"] = _record(content, f"{info}/RECORD").encode()
    path = Path(folder) / f"dlia_utils-{__version__}-py3-none-any.whl"
    with files.atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        # The archive's own files come last, as the format asks.
        for name in sorted(
            content, key=lambda name: (name.startswith(info), name.endswith("RECORD"), name)
        ):
            entry = zipfile.ZipInfo(name)  # dated 1980
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, content[name])
    return path


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _core_metadata(project: Mapping[str, Any]) -> str:
    """METADATA of the wheel, from what pyproject.toml and requirements.txt say."""
    lines = (notebooks.REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    needs = [need for line in lines if (need := line.split("#")[0].strip())]
    fields = [
        ("Metadata-Version", "2.4"),
        ("Name", project["name"]),
        ("Version", __version__),
        ("Summary", project["description"]),
        ("License-Expression", project["license"]),
        ("License-File", "LICENSE"),
        ("Requires-Python", project["requires-python"]),
        *(("Requires-Dist", need) for need in needs),
    ]
    return "".join(f"{name}: {value}\n" for name, value in fields)


def _record(content: Mapping[str, bytes], own_name: str) -> str:
    """RECORD of a wheel: each file with its hash and size, itself without."""
    rows = []
    for name, data in sorted(content.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(data)}\n")
    return "".join([*rows, f"{own_name},,\n"])


def _fetch(folder: Path) -> Path:
    """captum's wheel as pip gets it; ValueError says why pip could not, and what follows from that."""
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--retries=1",
        "--timeout=10",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", CAPTUM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix(
            "ERROR: "
        )
        raise ValueError(
            f"the data set is without captum (pip could not get {CAPTUM}: {reason}): a notebook that needs it must "
            "get it from elsewhere on Kaggle; name a wheel with --captum FILE"
        )
    return next(folder.glob("captum-*.whl"))


def _write_dataset(folder: Path, user: str, captum: Path | None) -> None:
    """The data set's folder: wheels at top level, for the client passes over sub-folders, and their licences."""
    ours = write_wheel(folder)
    (folder / "LICENSE-dlia_utils.txt").write_bytes(_license(ours))
    parts = [f"{ours.name} (MIT)"]
    if captum:
        (folder / "LICENSE-captum.txt").write_bytes(_license(captum))
        shutil.copyfile(captum, folder / captum.name)
        parts.append(f"{captum.name} (BSD-3-Clause)")
    metadata = {
        "id": f"{user}/{OFFLINE_SLUG}",
        "title": "DLIA utils",
        "subtitle": "The package behind the DLIA notebooks, for use without internet",
        "description": f"Holds {' and '.join(parts)}; the licence texts lie beside them. Attach this data set to a "
        "notebook of the suite: its second cell imports the wheels as they are, nothing is installed.",
        "licenses": [
            {"name": "other"}
        ],  # exactly one may be named; the description says which they are
    }
    files.write_json(metadata, folder / "dataset-metadata.json")


def _license(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if _LICENSE_FILE.fullmatch(name)]
        if not names:
            raise ValueError(
                f"{wheel.name} holds no licence text and may not be passed on: take the wheel from PyPI"
            )
        return b"\n".join(archive.read(name) for name in names)


# --------------------------------------------------------------------------------------------------- checks


def _need_slug(text: str, option: str, what: str) -> None:
    if not _SLUG.fullmatch(text):
        raise ValueError(
            f"{option} {text!r}: give {what}, which has lower-case letters, digits and hyphens only"
        )


def _need_good(sources: Sequence[Path]) -> None:
    problems = [
        f"{source.stem}: {problem}" for source in sources for problem in notebooks.check(source)
    ]
    if problems:
        raise ValueError("the notebooks are not fit to push:\n  " + "\n  ".join(problems))


def _need_different(titles: Sequence[str]) -> None:
    twice = sorted({title for title in titles if titles.count(title) > 1})
    if twice:
        raise ValueError(
            f"several notebooks would be the kernel {', '.join(twice)}: rename all but one"
        )


def _need_captum(wheel: Path) -> Path:
    if not wheel.is_file():
        raise FileNotFoundError(f"--captum {wheel}: there is no such file")
    if not re.fullmatch(r"captum-[^-]+-py3-none-any\.whl", wheel.name) or not zipfile.is_zipfile(
        wheel
    ):
        raise ValueError(
            f"--captum {wheel} is not a captum wheel (captum-VERSION-py3-none-any.whl); get one with: "
            f"python -m pip download --no-deps {CAPTUM}"
        )
    _license(wheel)
    return wheel


def _need_ours(out: Path) -> None:
    """Refuse to replace anything but an older build."""
    there = {one.name for one in out.iterdir()} if out.is_dir() else set()
    if (out.exists() and not out.is_dir()) or there - {"dataset", "kernels"}:
        raise ValueError(
            f"--out {out} holds other things, and would be replaced: name a new or empty folder"
        )


def _swap(new: Path, out: Path, old: Path) -> None:
    """Put `new` in the place of `out`, and what was there into `old`."""
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
