"""Runs the notebooks without a browser and tells how far they are."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from .progress import STATUS, Bar

PARAMETERS = ("PROFILE", "DATA_DIR", "RUN_NAME", "RESUME", "CHANGES")
HEAD = ("parameters", "settings", "start", "imports", "yours")  # tags of the opening cells
PATH_VARIABLES = ("DLIA_DATA", "DLIA_RUNS", "DLIA_CACHE", "DLIA_WEIGHTS")
KERNEL_STARTS = 3
SAVED_EVERY = 5  # seconds: the notebook that is being executed, at most
SECONDS_BETWEEN_LINES = 10  # in a log file, at least
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

# PyTorch on CPU is 2 to 5 times faster when glibc keeps large buffers; glibc reads this at a
# process's start.
KEEP_BUFFERS = "mmap_max=0 mmap_threshold=4294967296 trim_threshold=1073741824".split()
KERNEL_ENVIRONMENT = {
    "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{setting}" for setting in KEEP_BUFFERS),
    "GOMP_SPINCOUNT": "10000",  # endless spinning costs up to ten times the work on a busy machine
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # of bars that are not ours
}


@dataclass(frozen=True)
class Executed:
    """One executed notebook: its name and run folder, and what went wrong ("" when nothing did)."""

    name: str
    folder: Path
    seconds: float
    error: str = ""

    @property
    def notebook(self) -> Path:
        return self.folder / "executed.ipynb"


def pick(names: Sequence[str] = (), folder: str | Path | None = None) -> list[Path]:
    """The notebooks that `names` means ("01", "1", "02,03" or the full name); without names all.

    Those of `folder`, else of notebooks/ here or in the repository around this package. Errors:
    ValueError naming what there is when a name fits no notebook.
    """
    home = Path("notebooks")
    if not any(home.glob("*.ipynb")):
        home = Path(__file__).resolve().parents[1] / "notebooks"
    found = {path.stem: path for path in sorted(Path(folder or home).glob("[0-9][0-9]_*.ipynb"))}
    if not found:
        where = "run this in the suite's repository"
        raise ValueError(f"no notebooks NN_name.ipynb in {folder or home}: {where}")
    numbers = {str(int(stem[:2])): stem for stem in found}
    chosen = []
    for name in (part for given in names for part in given.split(",") if part):
        stem = numbers.get(name.lstrip("0"), Path(name).stem)
        if stem not in found:
            raise ValueError(f"no notebook {name}; there are: {', '.join(found)}")
        chosen.append(stem)
    return [path for stem, path in found.items() if stem in chosen or not names]


def tags(cell: Mapping[str, Any]) -> list[str]:
    return cell["metadata"].get("tags", [])


def opened(notebook: str | Path, **parameters: Any) -> Any:
    """The `run.Run` that a notebook's opening cells start, executed here with these PARAMETERS.

    Prints its banner. Errors: those of `run.start`.
    """
    return opening(notebook, ("parameters", "settings", "start"), **parameters)["run"]


def opening(notebook: str | Path, wanted: Sequence[str], **parameters: Any) -> dict[str, Any]:
    """The names that the cells with the `wanted` tags define, executed in this process."""
    names: dict[str, Any] = {}
    for cell in json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and set(tags(cell)) & set(wanted):
            code = "".join(cell["source"])
            exec(compile(code, f"{Path(notebook).name}, cell {tags(cell)[0]!r}", "exec"), names)
        if "parameters" in tags(cell):
            names |= parameters
    return names


def run(
    notebook: str | Path,
    *,
    profile: str = "smoke",
    data: str | Path = "",
    run_name: str = "",
    resume: bool | str = True,
    changes: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Executed:
    """Execute one notebook of the suite in its run folder `runs/<notebook>/<run_name>/`.

    Its opening cells are executed here first, and write nothing: a wrong setting or path is told
    before a kernel starts. A failing cell is told in `Executed.error`; what was written stays.
    """
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from . import files
    from . import run as runs

    parameters = dict(PROFILE=profile, DATA_DIR=absolute(data) if data else "", RUN_NAME=run_name)
    parameters |= {"RESUME": resume, "CHANGES": dict(changes or {})}
    # The notebook opens its folder itself, so until then what is executed lies beside it.
    with mock.patch.object(runs, "open_folder", lambda run: run):
        folder = opened(notebook, **parameters).run_dir.resolve()
    beside = folder.with_name(f"{folder.name}.executed.ipynb")
    start, error = time.perf_counter(), ""
    try:
        with files.room(folder):
            execute(notebook, beside, parameters=parameters, progress=progress)
    except PapermillExecutionError as failure:
        error = failure_text(failure)
    except DeadKernelError:
        error = "the kernel died (out of memory is the usual reason): try a smaller profile"
    finally:
        if beside.exists():
            folder.mkdir(exist_ok=True)
            beside.replace(folder / "executed.ipynb")
    return Executed(Path(notebook).stem, folder, time.perf_counter() - start, error)


def warned(notebook: str | Path) -> list[str]:
    """What an executed notebook wrote to standard error, each line once."""
    path = Path(notebook)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else []
    outputs = [one for cell in cells for one in cell.get("outputs", ())]
    said = ["".join(one["text"]) for one in outputs if one.get("name") == "stderr"]
    return list(dict.fromkeys("".join(said).splitlines()))


def failure_text(failure: Any) -> str:
    """The failing cell's number, its code and the end of its traceback, without colours."""
    code = "\n".join(f"    {line}" for line in failure.source.splitlines())
    trace = [line for part in failure.traceback for line in ANSI.sub("", part).splitlines()]
    return "\n".join([f"cell [{failure.exec_count}] failed:", code, "", *trace[-12:]])


def absolute(path: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


def short(path: Path) -> str:
    """`path` as seen from here when it is below, else whole."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def execute(
    notebook: str | Path,
    out: str | Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    environment: Mapping[str, str | None] | None = None,
    cwd: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Execute a notebook with papermill and leave it, outputs included, in `out`.

    `parameters` replaces names of the tagged cell; `environment` changes the kernel's variables
    (None removes one); `cwd` is where the kernel starts (the notebook's folder). A failing cell
    raises papermill's PapermillExecutionError after `out` has been written. `progress` tells
    standard error which section runs, and how far its innermost bar is.
    """
    import papermill

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # The kernel starts in another folder, where a relative path would mean something else.
    paths = {name: absolute(os.environ[name]) for name in PATH_VARIABLES if os.environ.get(name)}
    telling = narrated(sys.stderr) if progress else nullcontext(({}, None))
    # What is changed is put back afterwards.
    with telling as (hooks, status), _saved_seldom(), mock.patch.dict(os.environ):
        variables = KERNEL_ENVIRONMENT | paths | {STATUS: status} | dict(environment or {})
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in variables.items() if value is not None})
        _started(
            papermill.execute_notebook,
            # In a path papermill takes {name} for a parameter.
            *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, out)),
            # As JSON has it: papermill would write a tuple down as a text.
            parameters=json.loads(json.dumps(dict(parameters or {}))),
            cwd=str(cwd or Path(notebook).parent),
            kernel_name="python3",
            progress_bar=False,
            start_timeout=300,  # seconds: beside busy neighbours a kernel takes its time
            extra_arguments=["--Application.log_level=CRITICAL"],  # else kernels warn of TCP
            **hooks,
        )
    return out


@contextmanager
def _saved_seldom() -> Iterator[None]:
    """papermill would write the notebook before and after each cell: a tenth of a smoke run."""
    from papermill.engines import NotebookExecutionManager as Manager

    write, due = Manager.save, [0.0]

    def save(manager: Manager, **told: Any) -> None:
        if manager.end_time or time.monotonic() >= due[0]:
            write(manager, **told)
            due[0] = time.monotonic() + SAVED_EVERY

    with mock.patch.object(Manager, "save", save):
        yield


def _started(execute_notebook: Callable, *args: Any, **options: Any) -> None:
    """Execute it, again where its kernel died before it answered.

    Jupyter finds five free ports and hands their numbers on; the kernel takes them a second later.
    Within one process none is given twice, but another process may be given it in that second.
    """
    for left in range(KERNEL_STARTS - 1, -1, -1):
        try:
            return execute_notebook(*args, **options)
        except RuntimeError as error:
            if not left or "before replying" not in str(error):
                raise
            said = "the kernel died before it answered (another one may have taken its port): it is"
            print(f"{said} started again", file=sys.stderr)
            time.sleep(random.uniform(0, 3))  # those that met do not meet again


@contextmanager
def narrated(stream: TextIO) -> Iterator[tuple[dict[str, Any], str]]:
    """Hooks for nbclient and the file that bars write to, by which `stream` is told what runs."""
    at, over = {"cells": [], "number": 0}, threading.Event()
    hooks = {
        "on_notebook_start": lambda notebook: at.update(cells=list(notebook.cells)),
        "on_cell_start": lambda cell, cell_index: at.update(number=cell_index + 1),
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        status = Path(scratch) / "status"
        teller = threading.Thread(target=narrate, args=(stream, at, status, over), daemon=True)
        teller.start()
        try:
            yield hooks, str(status)
        finally:
            over.set()
            teller.join()


def narrate(stream: TextIO, at: Mapping[str, Any], status: Path, over: threading.Event) -> None:
    """Say about once a second where the execution is: one line that changes in a terminal, else a
    line for each new section, bar or epoch."""
    begun, said, stage, bar, live = time.monotonic(), -math.inf, ("", ""), "", stream.isatty()
    with suppress(OSError, ValueError):  # whoever read the lines has gone; the notebook goes on
        while not over.wait(1):
            text = status.read_text(encoding="utf-8", errors="replace") if status.exists() else "\n"
            bar = text.strip() if text else bar  # empty: it is being written
            passed = time.monotonic() - begun
            if live:
                print(f"\r{_line(at, bar, passed, live)}", end="", file=stream, flush=True)
            elif passed >= said + SECONDS_BETWEEN_LINES:
                here = _section(at), (re.match(r".*epoch \d+ of \d+|[^:]*", bar) or [""])[0]
                if here[0] != stage[0] or here[1] not in ("", stage[1]):
                    print(_line(at, bar, passed, live), file=stream, flush=True)
                    said, stage = passed, here
        if live:
            print(f"\r{_line(at, '', time.monotonic() - begun, live)}", file=stream, flush=True)


def _line(at: Mapping[str, Any], bar: str, passed: float, live: bool) -> str:
    """Such as "[03/51] 2 Training | train pgd_at: epoch 3 of 12, loss 0.61 | 00:44"."""
    total, clock = str(len(at["cells"])), f" | {Bar.format_interval(passed)}"
    number = f"[{str(at['number']).zfill(len(total))}/{total}]"
    text = " | ".join(filter(None, [f"{number} {_section(at)}".strip(), bar]))
    if not live:
        return text + clock
    width = shutil.get_terminal_size().columns - 1
    return (text[: max(width - len(clock), 0)] + clock).ljust(width)


def _section(at: Mapping[str, Any]) -> str:
    """The last '## ' heading so far."""
    above = [cell.source for cell in at["cells"][: at["number"]] if cell.cell_type == "markdown"]
    return (re.findall(r"^## +(.+)", "\n".join(above), flags=re.MULTILINE) or [""])[-1]
