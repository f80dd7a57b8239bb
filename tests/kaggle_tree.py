"""A Kaggle session in a folder: inputs in either mount layout, junk files, the wheels, no network.

The kernel sees neither the repository nor a network; `finished` runs a notebook of the suite there
once per test session, for every test that wants to look at what it left.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import nbformat
import pandas as pd
import pytest

from dlia_utils import execute
from dlia_utils.data import phantom, sources
from tools import kaggle, notebooks

LAYOUTS = ("old", "new")

# Python imports this module at its start. It also writes down what was tried.
SITECUSTOMIZE = """\
import os
import socket

connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo
LOCAL = ("", "127.0.0.1", "::1", "localhost", "0.0.0.0", socket.gethostname(), None)


def need_local(host):
    if host not in LOCAL:
        with open(os.environ["KAGGLE_TREE_NETWORK"], "a") as log:
            log.write(f"{host}\\n")
        raise OSError(101, f"Network is unreachable ({host})")


def local_connect(self, address):
    need_local(address[0] if isinstance(address, tuple) else None)  # a text: a socket file
    return connect(self, address)


def local_getaddrinfo(host, *args, **kwargs):
    need_local(host)
    return getaddrinfo(host, *args, **kwargs)


socket.socket.connect, socket.getaddrinfo = local_connect, local_getaddrinfo
"""

# Runs as an extra last cell: where the package came from, and whether the repository could be seen.
PROBE = """\
import json, sys
ours = {name: one for name, one in sys.modules.items() if name.split(".")[0] == "dlia_utils"}
modules = {name: module.__file__ for name, module in ours.items()}
print(json.dumps({"modules": modules, "path": sys.path}))
"""


@dataclass(frozen=True)
class Session:
    """A simulated session: `root` stands for /kaggle; `environment` is what `execute.execute`
    takes."""

    root: Path
    environment: dict[str, str | None]

    @property
    def working(self) -> Path:
        return self.root / "working"

    @property
    def process_environment(self) -> dict[str, str]:
        """The whole environment of a process in the session."""
        merged = {**os.environ, **execute.KERNEL_ENVIRONMENT, **self.environment}
        return {name: value for name, value in merged.items() if value is not None}

    @property
    def network(self) -> list[str]:
        """Hosts beyond this machine that anything in the session asked for."""
        log = Path(self.environment["KAGGLE_TREE_NETWORK"])
        return log.read_text().split() if log.exists() else []

    def input_state(self) -> dict[str, tuple[int, int]]:
        """Size and time of everything under input/: where the tests run as root, read-only files
        can be written."""
        paths = sorted((self.root / "input").rglob("*"))
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}

    def at_home(self, notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
        """The notebook with the session's folder in place of /kaggle in its bootstrap cell."""
        for cell in notebook.cells:
            if "bootstrap" in cell.metadata.get("tags", []):
                cell.source = cell.source.replace("/kaggle", str(self.root))
        return notebook

    def run(self, notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
        """Execute a copy of `notebook` as Kaggle does, with no parameter changed; its cells, then
        the probe."""
        self.at_home(notebook).cells.append(nbformat.v4.new_code_cell(PROBE, id="probe"))
        path = notebooks.write(notebook, self.working / "__notebook__.ipynb")
        out = self.root.parent / "executed.ipynb"
        execute.execute(path, out, environment=self.environment, progress=False)
        return notebooks.read(out)


def make(folder: Path, *, datasets: tuple[str, ...], layout: str) -> Session:
    """A session in `folder` with phantoms of `datasets` and the offline data set mounted in one
    layout."""
    root, site = folder / "kaggle", folder / "site"
    for name in ("input", "working/.virtual_documents", "temp", "lib/kaggle", "usr/lib"):
        (root / name).mkdir(parents=True)
    for name in datasets:
        source = sources.SOURCES[name]
        place = _mount(root, source.handle, source.handle.split("/")[-1] or source.mount, layout)
        shutil.copytree(_phantom(name), place, dirs_exist_ok=True)
    ours = _mount(root, "somebody/dlia-utils", "dlia-utils", layout)
    _write_wheel_at_home(ours / _our_wheel().name, root)
    write_wheel(ours, "captum", "0.9.0", "LOCAL = True\n")
    kaggle.write_list(ours)
    _write_junk(_mount(root, "somebody/else", "else", layout))
    _make_read_only(root / "input")
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)
    nowhere = "http://127.0.0.1:9"
    environment = {
        **{name: None for name in os.environ if name.startswith(("DLIA_", "KAGGLE_"))},
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "KAGGLE_URL_BASE": "https://www.kaggle.com",
        "KAGGLE_DATA_PROXY_URL": "https://dp.kaggle.net",
        "KAGGLE_DATA_PROXY_TOKEN": "none",
        "KAGGLE_USER_SECRETS_TOKEN": "none",
        "KAGGLE_CONTAINER_NAME": "kaggle_none",
        "KAGGLE_TREE_NETWORK": str(folder / "network.txt"),
        "PYTHONPATH": str(site),
        "http_proxy": nowhere,
        "https_proxy": nowhere,
    }
    return Session(root, environment)


def _phantom(name: str) -> Path:
    """The synthetic data set of this session of tests, whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DLIA_DATA", raising=False)
        found = sources.find(name).root
    return next(top for top in (found, *found.parents) if (top / phantom.MARKER).is_file())


@functools.cache
def _our_wheel() -> Path:
    """The package's wheel, built once for all sessions of this process."""
    return kaggle.write_wheel(Path(os.environ["DLIA_CACHE"]).parent / f"wheel-{os.getpid()}")


def _write_wheel_at_home(path: Path, root: Path) -> None:
    """The package's wheel with the session's folder in place of /kaggle."""
    with zipfile.ZipFile(_our_wheel()) as ours, zipfile.ZipFile(path, "w") as moved:
        for name in ours.namelist():
            content = ours.read(name)
            if name == "dlia_utils/data/sources.py":
                assert b'KAGGLE = Path("/kaggle")' in content
                content = content.replace(b'"/kaggle"', json.dumps(str(root)).encode())
            moved.writestr(name, content)


def _mount(root: Path, handle: str, slug: str, layout: str) -> Path:
    """Where Kaggle mounts a data set of `handle`, or a competition (no handle), created."""
    if layout == "old":
        path = root / "input" / slug
    elif not handle:
        path = root / "input" / "competitions" / slug
    else:
        organised = "organizations/" if handle == "nih-chest-xrays/data" else ""
        path = root / "input" / "datasets" / f"{organised}{handle}"
    path.mkdir(parents=True)
    return path


def _write_junk(folder: Path) -> None:
    """Somebody else's data set: folders with the usual names, a notebook's left-overs."""
    names = "train/NORMAL/1.jpeg test/x.txt __MACOSX/._train .DS_Store src/utils.py"
    for name in [*names.split(), *".ipynb_checkpoints/a.ipynb dlia/readme captum/notes".split()]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not an image")


def _make_read_only(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def write_wheel(folder: Path, name: str, version: str, code: str) -> Path:
    """A small pure wheel of one module, which imports as it lies and installs with pip."""
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", code)
        said = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        archive.writestr(f"{info}/METADATA", said)
        said = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", said)
        archive.writestr(f"{info}/RECORD", "")
    return path


# -------------------------------------------------------------------- runs of the suite's notebooks


@dataclass(frozen=True)
class Finished:
    """What a notebook of the suite left in a session, or the error that ended it."""

    session: Session
    layout: str
    before: dict[str, tuple[int, int]]
    error: Exception | None
    executed: nbformat.NotebookNode | None
    seconds: float

    @property
    def run_dir(self) -> Path:
        """The one run folder of the notebook."""
        (found,) = self.session.working.glob("runs/*/*/config.json")
        return found.parent


_FINISHED: dict[Path, Finished] = {}


def finished(source: Path, tmp_path_factory) -> Finished:
    """The notebook of `source` run in a session of its own, once; the layouts take turns from
    notebook to notebook."""
    if source not in _FINISHED:
        layout = LAYOUTS[notebooks.sources().index(source) % 2]
        wanted = execute.opening(notebooks.product(source), ("parameters", "settings"))
        wanted = wanted["FULL"]["dataset"]
        first = wanted if isinstance(wanted, str) else wanted[0]
        session = make(tmp_path_factory.mktemp(source.stem), datasets=(first,), layout=layout)
        before, start = session.input_state(), time.perf_counter()
        try:
            executed, error = session.run(notebooks.build(source)), None
        except Exception as failure:  # kept, so that a second test does not run it all again
            executed, error = None, failure
        _FINISHED[source] = Finished(
            session, layout, before, error, executed, time.perf_counter() - start
        )
    return _FINISHED[source]


def need_complete(run_dir: Path, executed: nbformat.NotebookNode, *, synthetic: bool) -> None:
    """A smoke run left everything that the design promises, and nothing in it is empty."""
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    results = pd.read_csv(run_dir / "results.csv")
    assert len(results) and results["value"].notna().all()
    assert results["profile"].eq("smoke").all()
    assert results["data"].str.contains("SYNTHETIC").all() == synthetic
    assert json.loads((run_dir / "config.json").read_text())["profile"] == "smoke"
    assert json.loads((run_dir / "env.json").read_text())["torch"]
    figures = sorted((run_dir / "figures").glob("*.png"))
    assert figures
    for figure in figures:
        assert matplotlib.image.imread(figure)[..., :3].std() > 0.01, f"{figure.name} is blank"
