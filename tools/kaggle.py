"""What Kaggle takes: a kernel folder a notebook, and an offline data set with the package's wheel.

Kaggle's own client uploads these folders as they are (`push_commands`). Building twice gives the
same bytes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nbformat import NotebookNode

from dlia_utils import __version__, files
from dlia_utils.data.sources import SOURCES
from dlia_utils.execute import opening

from . import notebooks

OFFLINE_SLUG = "dlia-utils"
LIST = "dlia-utils.sha256"  # the hashes of the data set's wheels, which its notebooks compare
# All that Kaggle's image lacks. An exact version: a range gives other bytes after a release.
CAPTUM = "captum==0.9.0"
CAPTUM_SHA256 = "cda38e1d42c37591d71560bb2f5813ac4cae8d8543afac45279c7efd5945997e"  # as on PyPI
CAPTUM_WHEEL = re.compile(r"captum-[^-]+-py3-none-any\.whl")
# Two of them. With enable_gpu alone Kaggle gives a P100, which today's torch cannot use.
MACHINE = "NvidiaTeslaT4"
TITLE = "DLIA {}"  # groups the kernels in the user's list, and makes every title long enough
MAX_TITLE = 50
RELATIVE = re.compile(
    r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(?:#[^)\s]*)?\)"
)  # no web address, no #heading
LICENSE = re.compile(r"[^/]+\.dist-info/(licenses/)?(LICEN[CS]E|COPYING)[^/]*")


@dataclass(frozen=True)
class Build:
    """A finished build: folder, owner, slugs of the kernels, files of the data set, remarks."""

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
    """Write `out`/kernels/<slug>/ for each notebook in `folder`, and `out`/dataset/, or nothing.

    user: the Kaggle user name that owns both; captum: a captum wheel (None: fetched by pip, left
    out with a note when that fails, refused when `strict`); internet: whether kernels may use it
    (pretrained weights are downloaded); competitions: slugs of those that the user has joined, for
    the notebooks that can use one. An older build in `out` is replaced whole.
    Errors, which leave `out` as it was: ValueError (user, slugs, notebooks that fail
    `notebooks.check`, a foreign `out`, a wheel that is not captum's, none when strict).
    """
    out, sources = Path(out), notebooks.sources((), folder)
    for slug in (user, *competitions):
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*[a-z0-9]", slug):
            what = "the last part of the address: lower-case letters, digits and hyphens"
            raise ValueError(f"--user, --competition {slug!r}: give {what}")
    there = {one.name for one in out.iterdir()} if out.is_dir() else set()
    if (out.exists() and not out.is_dir()) or there - {"dataset", "kernels"}:
        raise ValueError(f"--out {out} holds other things: name a new or empty folder")
    wheel = Path(captum) if captum else None
    if wheel and not (CAPTUM_WHEEL.fullmatch(wheel.name) and zipfile.is_zipfile(wheel)):
        fix = f"get one with: python -m pip download --no-deps {CAPTUM}"
        raise ValueError(f"--captum {wheel} is not captum's wheel: {fix}")
    _ = wheel and _license(wheel)  # refused before anything is written
    problems = [f"{one.stem}: {problem}" for one in sources for problem in notebooks.check(one)]
    if problems:
        raise ValueError("the notebooks are not fit to push:\n  " + "\n  ".join(problems))
    options = {"user": user, "internet": internet, "competitions": competitions}
    kernels = [kernel(one, **options) for one in sources]
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
        known = _write_dataset(new / "dataset", user, wheel)
        for notebook, metadata in kernels:
            place = new / "kernels" / PurePosixPath(metadata["id"]).name
            place.mkdir(parents=True)
            notebooks.write(notebooks.pinned(notebook, known), place / metadata["code_file"])
            files.write_json(metadata, place / "kernel-metadata.json")
        if out.exists():
            out.rename(Path(scratch) / "old")
        new.rename(out)
    slugs = tuple(PurePosixPath(metadata["id"]).name for _, metadata in kernels)
    names = tuple(sorted(one.name for one in (out / "dataset").iterdir()))
    return Build(out, user, slugs, names, tuple(notes))


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
    dataset, version = str(build.folder / "dataset"), f"dlia_utils {__version__}"
    again = "uploads a new version of it: every later time, in place of the first command"
    ready = "says 'ready' once Kaggle has unpacked it: push the notebooks after that"
    first = "uploads the offline data set, private: the first time"
    steps = [
        (["datasets", "create", "-p", dataset], first),
        (["datasets", "version", "-p", dataset, "-m", version], again),
        (["datasets", "status", f"{build.user}/{OFFLINE_SLUG}"], ready),
    ]
    for slug in build.kernels:
        push = ["kernels", "push", "-p", str(build.folder / "kernels" / slug)]
        steps.append((push, "uploads this notebook, private, and runs it on two T4s"))
    return [(shlex.join(["kaggle", *words]), what) for words, what in steps]


def kernel(
    source: Path, *, user: str, internet: bool = True, competitions: Sequence[str] = ()
) -> tuple[NotebookNode, dict[str, Any]]:
    """The notebook to push for `source`, without outputs, and its `kernel-metadata.json`.

    Title and slug come from the file's name, which stays when a heading is reworded: another slug
    would be another kernel on Kaggle. Errors: ValueError for a name that gives no title.
    """
    title = TITLE.format(source.stem.replace("_", " "))
    if not re.fullmatch(r"\d\d(_[a-z0-9]+)+", source.stem) or len(title) > MAX_TITLE:
        fix = f"NN_some_words.py, lower case, at most {MAX_TITLE - len(TITLE) + 2} characters"
        raise ValueError(f"{source.name} gives no Kaggle title: rename it to {fix}")
    notebook = notebooks.clean(notebooks.read(notebooks.product(source)))
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = for_kaggle(cell.source, user)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.metadata.pop("source_hash", None)
    # Kaggle reads the machine from the notebook as well as from the metadata file: both say the
    # same. A list of data sources would take its internal numbers: the metadata file decides.
    about = {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "language": "python"}
    notebook.metadata["kaggle"] = about | {"isInternetEnabled": internet, "sourceType": "notebook"}
    handles = [SOURCES[name].handle for name in _datasets(source)]
    slug, machine = _slug(source.stem), {"enable_gpu": True, "enable_tpu": False}
    metadata = {"id": f"{user}/{slug}", "title": title, "is_private": True, "language": "python"}
    metadata |= {"code_file": notebooks.product(source).name, "kernel_type": "notebook"}
    # The client takes a missing enable_internet for true.
    metadata |= machine | {"machine_shape": MACHINE, "enable_internet": internet}
    metadata["dataset_sources"] = [*filter(None, handles), f"{user}/{OFFLINE_SLUG}"]
    metadata["competition_sources"] = list(competitions) if "" in handles else []
    metadata |= {"kernel_sources": [], "model_sources": []}
    return notebook, metadata


def for_kaggle(text: str, user: str) -> str:
    """Markdown whose links to notebooks lead to their kernels; other files are not there: no link.

    >>> for_kaggle("[next](02_a_b.ipynb), [all results](../results/README.md)", "me")
    '[next](https://www.kaggle.com/code/me/dlia-02-a-b), all results'
    """

    def one(link: re.Match) -> str:
        words, target = link.groups()
        where = f"https://www.kaggle.com/code/{user}/{_slug(PurePosixPath(target).stem)}"
        return f"[{words}]({where})" if target.endswith(".ipynb") else words

    return RELATIVE.sub(one, text)


def _slug(stem: str) -> str:
    """The last part of a kernel's address, from its notebook's name."""
    return TITLE.format(stem).lower().replace(" ", "-").replace("_", "-")


def _datasets(source: Path) -> Sequence[str]:
    """The data sets that the full study of a notebook can use."""
    names = opening(notebooks.product(source), ("parameters", "settings"))["FULL"]["dataset"]
    return (names,) if isinstance(names, str) else names


def _competition_notes(sources: Sequence[Path], competitions: Sequence[str]) -> list[str]:
    """A note a notebook that could use a competition; ValueError for one that none can use."""
    able = [one.stem for one in sources if not all(SOURCES[name].handle for name in _datasets(one))]
    if competitions and not able:
        raise ValueError(f"--competition {competitions[0]}: no notebook uses one, leave it out")
    hint = "can use a competition's images too: name it with --competition SLUG if you joined it"
    return [] if competitions else [f"{name} {hint}" for name in able]


def write_wheel(folder: str | Path) -> Path:
    """Write `dlia_utils` as a wheel into `folder`; returns its path.

    The bytes depend on the sources alone. It imports as it lies, from `sys.path`, or installs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # A copy: setuptools would build in the repository, and pack what an earlier build left.
        tree, out, root = Path(scratch) / "tree", Path(scratch) / "out", notebooks.REPOSITORY
        hidden = shutil.ignore_patterns(".*", "__pycache__")
        shutil.copytree(root / "dlia_utils", tree / "dlia_utils", ignore=hidden)
        for name in ("pyproject.toml", "requirements.txt", "LICENSE"):
            shutil.copyfile(root / name, tree / name)
        options = "-q --no-deps --no-build-isolation --disable-pip-version-check --no-index"
        command = [sys.executable, "-m", "pip", "wheel", *options.split(), f"-w{out}", str(tree)]
        dated = os.environ | {"SOURCE_DATE_EPOCH": "315532800"}  # the first day that a zip can hold
        subprocess.run(command, check=True, env=dated)
        (wheel,) = out.glob("*.whl")
        with files.atomic_path(Path(folder) / wheel.name) as temporary:
            shutil.copyfile(wheel, temporary)
    return Path(folder) / wheel.name


def _fetch(folder: Path) -> Path:
    """captum's wheel as pip gets it; ValueError says why it could not, and what follows from it."""
    options = "--no-deps --only-binary=:all: --disable-pip-version-check --retries=1 --timeout=10"
    pip = [sys.executable, "-m", "pip", "download", f"--dest={folder}", *options.split(), CAPTUM]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"the data set is without captum (pip could not get {CAPTUM}: {reason}): a notebook "
            "that needs it must get it from elsewhere on Kaggle; name a wheel with --captum FILE"
        )
    wheel = next(folder.glob("captum-*.whl"))
    if (found := files.sha256(wheel)) != CAPTUM_SHA256:
        fix = "do not use it, and look at where pip fetches from"
        raise ValueError(f"{wheel.name} has the SHA-256 {found}, not {CAPTUM_SHA256}: {fix}")
    return wheel


def write_list(folder: str | Path) -> str:
    """Write LIST, as sha256sum does, for the wheels in `folder`; returns its own hash."""
    lines = [f"{files.sha256(one)}  {one.name}\n" for one in sorted(Path(folder).glob("*.whl"))]
    return files.sha256(files.write_text("".join(lines), Path(folder) / LIST))


def _write_dataset(folder: Path, user: str, captum: Path | None) -> str:
    """The data set's folder: wheels at top level (the client skips sub-folders), and licences.

    Returns the hash of the list of its wheels.
    """
    ours = write_wheel(folder)
    (folder / "LICENSE-dlia_utils.txt").write_bytes(_license(ours))
    parts = f"{ours.name} (MIT)"
    if captum:
        (folder / "LICENSE-captum.txt").write_bytes(_license(captum))
        shutil.copyfile(captum, folder / captum.name)
        parts += f" and {captum.name} (BSD-3-Clause)"
    metadata = {"id": f"{user}/{OFFLINE_SLUG}", "title": "DLIA utils"}
    metadata["subtitle"] = "The package behind the DLIA notebooks, for use without internet"
    metadata["description"] = (
        f"Holds {parts}; the licence texts lie beside them. Attach this data set to a notebook of "
        f"the suite: its second cell imports the wheels as they are, if they are what {LIST} says."
    )
    metadata["licenses"] = [{"name": "other"}]  # one may be named; the description says which
    files.write_json(metadata, folder / "dataset-metadata.json")
    return write_list(folder)


def _license(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        texts = [archive.read(name) for name in archive.namelist() if LICENSE.fullmatch(name)]
    if not texts:
        raise ValueError(f"{wheel.name} holds no licence text: take the wheel from PyPI")
    return b"\n".join(texts)
