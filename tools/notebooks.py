"""The notebooks: built from percent-format sources, executed, cleaned and checked.

`notebooks/src/NN_name.py` is what people edit; `notebooks/NN_name.ipynb`, outputs included, is made from it.
A code cell stores the hash of the source that produced its outputs, so an output can never outlive its code.
"""

from __future__ import annotations

import ast
import base64
import builtins
import hashlib
import io
import json
import math
import os
import re
import shutil
import symtable
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

import jupytext
import nbformat
from nbformat import NotebookNode
from PIL import Image

from dlia_utils import files
from dlia_utils.progress import MARK, STATUS, Bar

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "notebooks"

OPENING = (
    "bootstrap",
    "parameters",
    "settings",
    "start",
    "imports",
)  # "settings" may be several cells
YOURS = "yours"  # cells for the reader's own models, and what depends on them: part of the opening, not in all notebooks
PARAMETERS = ("PROFILE", "DATA_DIR", "RUN_NAME", "RESUME", "CHANGES")
FOLDED = {
    "jupyter": {"source_hidden": True},
    "_kg_hide-input": True,
}  # JupyterLab and Kaggle fold such a cell
MAX_CODE_LINES = 70
MAX_TEXT_LINES = 100
MAX_BYTES = 1_000_000
MAX_OUTPUT_BYTES = 500_000
SECONDS_BETWEEN_LINES = 10  # in a log file, at least

# PyTorch on CPU is 2 to 5 times faster when glibc keeps large buffers; glibc reads this at a process's start.
KERNEL_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.mmap_threshold=4294967296"
    ":glibc.malloc.trim_threshold=8589934592",
    "GOMP_SPINCOUNT": "10000",  # endless spinning costs up to ten times the work on a busy machine
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # of bars that are not ours (dlia_utils.progress)
}

PATH_VARIABLES = ("DLIA_DATA", "DLIA_RUNS", "DLIA_CACHE", "DLIA_WEIGHTS")

# The second cell of every notebook, word for word and folded: a source only holds an empty cell tagged "bootstrap".
BOOTSTRAP = """\
# Finds dlia_utils: in the repository around this notebook, attached on Kaggle (its wheel), or installed
import sys
from glob import glob

sys.path[:0] = [*glob("../dlia_utils/.."), *glob("dlia_utils/..")]
sys.path += sorted([*glob("/kaggle/input/*/*.whl"), *glob("/kaggle/input/datasets/*/*/*.whl")], reverse=True)
import dlia_utils  # not found? On Kaggle: Add Input, the data set with its wheel. Elsewhere: pip install

print("dlia_utils", dlia_utils.__version__)"""


# ------------------------------------------------------------------------------------------- find and build


def find(folder: str | Path = FOLDER) -> list[Path]:
    """The sources `src/NN_name.py` of all notebooks, in order.

    >>> [source.suffix for source in find()][:1]
    ['.py']
    """
    return sorted((Path(folder) / "src").glob("[0-9][0-9]_*.py"))


def product(source: Path) -> Path:
    """The notebook that is made from `source`.

    >>> product(Path("notebooks/src/01_name.py")).as_posix()
    'notebooks/01_name.ipynb'
    """
    return source.parent.parent / f"{source.stem}.ipynb"


def pick(names: Sequence[str], folder: str | Path = FOLDER) -> list[Path]:
    """The sources that `names` means ("01", "1", "02,03" or the full name); all of them for no names.

    Raises ValueError naming what there is when a name fits no notebook.
    """
    sources = find(folder)
    if not sources:
        raise ValueError(f"no notebook source src/NN_name.py in {folder}")
    names = [part for name in names for part in name.split(",") if part]
    unknown = [name for name in names if not any(_means(name, source) for source in sources)]
    if unknown:
        raise ValueError(
            f"no notebook {', '.join(unknown)}; there are: {', '.join(s.stem for s in sources)}"
        )
    return [
        source for source in sources if not names or any(_means(name, source) for name in names)
    ]


def _means(name: str, source: Path) -> bool:
    name = Path(name).stem
    return source.stem == name or (name.isdigit() and int(source.stem[:2]) == int(name))


def read(path: str | Path) -> NotebookNode:
    """The notebook in `path`."""
    return nbformat.read(str(path), as_version=4)


def write(notebook: NotebookNode, path: str | Path) -> Path:
    """Write `notebook` to `path` in one step."""
    return files.write_text(nbformat.writes(notebook) + "\n", path)


def source_hash(code: str) -> str:
    """Short hash of a cell's code, stored beside the outputs that the code produced.

    >>> source_hash("1 + 1") == source_hash("1 + 1"), len(source_hash(""))
    (True, 16)
    """
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def build(source: Path) -> NotebookNode:
    """The notebook of a percent-format source; a cell whose code is unchanged keeps the outputs it had.

    Cell ids are the notebook's name and the cell's number, so that building twice gives the same bytes.
    """
    notebook = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    kept = _kept_outputs(product(source))
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"{source.stem.replace('_', '-')[:60]}-{number:03d}"
        if "bootstrap" in _tags(cell):
            cell.source = BOOTSTRAP
        if cell.cell_type == "code" and kept[source_hash(cell.source)]:
            old = kept[source_hash(cell.source)].pop(0)
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
            cell.metadata["source_hash"] = old.metadata["source_hash"]
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return clean(notebook)


def source_text(notebook: NotebookNode) -> str:
    """The percent-format source of a notebook, such as one edited on Kaggle: the inverse of `build`.

    Outputs go; the bootstrap cell, the same in all notebooks, becomes an empty one again.
    """
    cells = []
    for cell in notebook.cells:
        tags = _tags(cell)
        source = "" if "bootstrap" in tags else cell.source
        new = (
            nbformat.v4.new_markdown_cell
            if cell.cell_type == "markdown"
            else nbformat.v4.new_code_cell
        )
        cells.append(new(source, metadata={"tags": tags} if tags else {}))
    bare = nbformat.v4.new_notebook(
        cells=cells, metadata={"jupytext": {"notebook_metadata_filter": "-all"}}
    )
    return jupytext.writes(bare, fmt="py:percent").lstrip("\n")


def back(path: str | Path, *, folder: str | Path = FOLDER) -> Path:
    """Write the edited notebook `path` (NN_name.ipynb) over its source `src/NN_name.py`; returns the source.

    Raises ValueError for a name without a source: a new notebook begins as a source.
    """
    source = Path(folder) / "src" / f"{Path(path).stem}.py"
    if source not in find(folder):
        raise ValueError(
            f"{Path(path).name} has no source {source.name} in {source.parent.name}/; name it as its source"
        )
    return files.write_text(source_text(read(path)), source)


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _kept_outputs(path: Path) -> dict[str, list[NotebookNode]]:
    """Executed cells of the notebook in `path` by source hash; a stale cell is not among them."""
    cells = defaultdict(list)
    for cell in read(path).cells if path.exists() else []:
        if cell.cell_type == "code" and cell.metadata.get("source_hash") == source_hash(
            cell.source
        ):
            cells[cell.metadata["source_hash"]].append(cell)
    return cells


# ------------------------------------------------------------------------------------------------ execution


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Change environment variables for a while; None removes one."""
    before = dict(os.environ)
    for name, value in changes.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _absolute(path: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


def execute(
    path: str | Path,
    out: str | Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    environment: Mapping[str, str | None] | None = None,
    cwd: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Execute the notebook in `path` with papermill and leave it, outputs included, in `out`.

    `parameters` replaces names of the tagged cell; `environment` changes the kernel's variables (None removes
    one); `cwd` is where the kernel starts, the notebook's folder when not given. A failing cell raises
    papermill's PapermillExecutionError after `out` has been written. `progress` tells standard error which section
    runs, and how far its innermost bar is: one line that changes in a terminal, else a line for each new stage.
    """
    import papermill

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # The kernel starts in another folder, where a relative path would mean something else.
    paths = {name: _absolute(os.environ[name]) for name in PATH_VARIABLES if os.environ.get(name)}
    with (
        _narrated(sys.stderr if progress else None) as (hooks, status),
        _environment(KERNEL_ENVIRONMENT | paths | {STATUS: status} | dict(environment or {})),
    ):
        papermill.execute_notebook(
            # As JSON has it: papermill would write a tuple down as a text.
            str(path),
            str(out),
            parameters=json.loads(json.dumps(dict(parameters or {}))),
            cwd=str(cwd or Path(path).parent),
            kernel_name="python3",
            progress_bar=False,
            **hooks,
            extra_arguments=[
                "--Application.log_level=CRITICAL"
            ],  # else kernels warn about local TCP
        )
    return out


@contextmanager
def _narrated(stream: TextIO | None) -> Iterator[tuple[dict[str, Any], str | None]]:
    """The hooks for nbclient, and the file for bars to write to, by which `stream` is told what runs."""
    if stream is None:
        yield {}, None
        return
    at, over = {"cells": [], "number": 0}, threading.Event()
    hooks = {
        "on_notebook_start": lambda notebook: at.update(cells=list(notebook.cells)),
        "on_cell_start": lambda cell, cell_index: at.update(number=cell_index + 1),
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        status = Path(scratch) / "status"
        teller = threading.Thread(target=_narrate, args=(stream, at, status, over), daemon=True)
        teller.start()
        try:
            yield hooks, str(status)
        finally:
            over.set()
            teller.join()


def _narrate(stream: TextIO, at: Mapping[str, Any], status: Path, over: threading.Event) -> None:
    """Say about once a second where the execution is, until it is `over`; the last line stays."""
    begun, said, stage, bar, live = time.monotonic(), -math.inf, ("", ""), "", stream.isatty()

    def rewrite(bar: str, end: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        line = _line(at, bar, time.monotonic() - begun, width)
        print(f"\r{line.ljust(width)}", end=end, file=stream, flush=True)

    with suppress(OSError, ValueError):  # whoever read the lines has gone; the notebook goes on
        while not over.wait(1):
            text = status.read_text(encoding="utf-8", errors="replace") if status.exists() else "\n"
            bar = text.strip() if text else bar  # empty: it is being written
            passed, here = time.monotonic() - begun, _stage(at, bar)
            if live:
                rewrite(bar, end="")
            elif passed < said + SECONDS_BETWEEN_LINES:
                continue
            elif here[0] != stage[0] or here[1] not in ("", stage[1]):
                print(_line(at, bar, passed), file=stream, flush=True)
                said, stage = passed, here
        if live:
            rewrite("", end="\n")


def _line(at: Mapping[str, Any], bar: str, passed: float, width: int | None = None) -> str:
    """Such as "[03/51] 2 Training | train pgd_at: epoch 3 of 12, loss 0.61, val_robust 0.40 | 00:44"."""
    total = str(len(at["cells"]))
    number = f"[{str(at['number']).zfill(len(total))}/{total}]"
    clock = f" | {Bar.format_interval(passed)}"
    text = " | ".join(filter(None, [f"{number} {_section(at)}".strip(), bar]))
    return text[: None if width is None else max(width - len(clock), 0)] + clock


def _stage(at: Mapping[str, Any], bar: str) -> tuple[str, str]:
    """What a log file is told of: another section, another bar or another epoch of it."""
    return _section(at), (re.match(r".*epoch \d+ of \d+|[^:]*", bar) or [""])[0]


def _section(at: Mapping[str, Any]) -> str:
    """The last '## ' heading so far."""
    above = [cell.source for cell in at["cells"][: at["number"]] if cell.cell_type == "markdown"]
    return (re.findall(r"^## +(.+)", "\n".join(above), flags=re.MULTILINE) or [""])[-1]


@dataclass(frozen=True)
class Run:
    """One executed notebook: where its files lie, and what went wrong ("" when nothing did)."""

    notebook: str
    folder: Path
    seconds: float
    error: str = ""

    @property
    def executed(self) -> Path:
        return self.folder / "executed.ipynb"


def full_settings(source: Path) -> dict[str, Any]:
    """FULL of a notebook: what its settings cells say of the whole study.

    Errors: ValueError for a notebook without settings cells.
    """
    names = _executed(source, ("parameters", "settings"), {})
    if "FULL" not in names:
        raise ValueError(f"{source.name} has no cell tagged 'settings' that defines FULL")
    return names["FULL"]


def opened(source: Path, **parameters: Any) -> Any:
    """The `run.Run` that a notebook's opening cells start, executed here with these parameters in their place.

    PROFILE, DATA_DIR, RUN_NAME, RESUME, CHANGES as in the notebook. Prints its banner. Errors: those of
    `run.start`, before any kernel is started; TypeError for another parameter.
    """
    if unknown := sorted(set(parameters) - set(PARAMETERS)):
        raise TypeError(
            f"a notebook has no parameter {', '.join(unknown)}; there are: {', '.join(PARAMETERS)}"
        )
    return _executed(source, ("parameters", "settings", "start"), parameters)["run"]


def _executed(source: Path, tags: Sequence[str], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The names that the cells with these tags define, executed in this process."""
    names: dict[str, Any] = {}
    for cell in jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent").cells:
        if cell.cell_type == "code" and set(_tags(cell)) & set(tags):
            exec(compile(cell.source, f"{source.name}, cell {_tags(cell)[0]!r}", "exec"), names)
        if "parameters" in _tags(cell):
            names |= parameters
    return names


def run(
    source: Path,
    *,
    profile: str = "smoke",
    data: str | Path = "",
    run_name: str = "",
    resume: bool | str = True,
    changes: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Run:
    """Execute one notebook of the suite in its run folder `runs/<notebook>/<run_name>/`.

    Its opening cells are executed here first: a wrong setting, data path or name is reported before a kernel
    starts. `changes` is the notebook's CHANGES. A failing cell is told in `Run.error`; everything written so
    far stays.
    """
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    data = _absolute(data) if data else ""
    parameters = {"PROFILE": profile, "DATA_DIR": data, "CHANGES": dict(changes or {})}
    folder = opened(source, RUN_NAME=run_name, RESUME=resume, **parameters).run_dir.resolve()
    # An older run was put aside above: what is there now is ours.
    parameters |= {"RUN_NAME": folder.name, "RESUME": resume or True}
    start, error = time.perf_counter(), ""
    try:
        execute(
            product(source), folder / "executed.ipynb", parameters=parameters, progress=progress
        )
    except PapermillExecutionError as failure:
        error = failure_text(failure)
    except DeadKernelError:
        error = "the kernel died (out of memory is the usual reason): try a smaller profile"
    return Run(source.stem, folder, time.perf_counter() - start, error)


def failure_text(failure: Any) -> str:
    """The failing cell's number, its code and the end of its traceback, without colours."""
    code = "\n".join(f"    {line}" for line in failure.source.splitlines())
    trace = [line for part in failure.traceback for line in _ANSI.sub("", part).splitlines()]
    return "\n".join([f"cell [{failure.exec_count}] failed:", code, "", *trace[-12:]])


def refresh(source: Path, *, progress: bool = True) -> Path:
    """Build the committed notebook anew with outputs of the smoke profile on synthetic data.

    Raises RuntimeError when a run found real images: pictures of patients do not belong into the repository.
    """
    with tempfile.TemporaryDirectory() as scratch:
        runs = Path(scratch) / "runs"
        built = write(build(source), Path(scratch) / "built.ipynb")
        # PROFILE = "auto" stands in the notebook, and without real data that is the smoke profile.
        synthetic = {
            "DLIA_RUNS": str(runs),
            "DLIA_PROFILE": None,
            "DLIA_DATA": None,
            "DLIA_WEIGHTS": None,
        }
        out = execute(
            built,
            Path(scratch) / "out.ipynb",
            environment=synthetic,
            cwd=product(source).parent,
            progress=progress,
        )
        for record in runs.glob("*/*/config.json"):
            if "SYNTHETIC" not in json.loads(record.read_text())["data"]:
                raise RuntimeError(
                    f"{source.stem} found real images: move them out of data/ for the refresh"
                )
        executed = read(out)
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.metadata["source_hash"] = source_hash(cell.source)
    return write(clean(executed), product(source))


# ------------------------------------------------------------------------------------------------- cleaning

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PROGRESS_BAR = re.compile(r"\d+%\|.*\||\d+(it|img|step|batch|file)s? \[\d\d:\d\d")


def clean(notebook: NotebookNode) -> NotebookNode:
    """Drop from `notebook` what depends on the machine or breaks viewers; returns it.

    Kept: sources, ids, tags, source hashes, execution counts and outputs. Dropped: widget state (GitHub calls
    such a notebook invalid), papermill's timings, progress bars, colours, the leading part of machine paths.
    """
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in ("source_hash", "tags") if key in cell.metadata}
        kept |= FOLDED if "bootstrap" in _tags(cell) else {}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            # A bar goes first: whether it was shown is a matter of timing, too.
            outputs = [output for output in cell.outputs if not _is_bar(output)]
            cell.outputs = [kept for output in _joined(outputs) if (kept := _clean_output(output))]
    return notebook


def _is_bar(output: NotebookNode) -> bool:
    return output.get("metadata", {}).items() >= MARK.items()


def _joined(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Neighbouring pieces of the same stream as one: how they were cut is a matter of timing."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if (
            joined
            and output.output_type == joined[-1].output_type == "stream"
            and output.name == joined[-1].name
        ):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _clean_output(output: NotebookNode) -> NotebookNode | None:
    if output.output_type == "stream":
        # A carriage return overwrites the line: what a reader would have seen last is what stays.
        lines = [
            line.rstrip("\r").rsplit("\r", 1)[-1] for line in _ANSI.sub("", output.text).split("\n")
        ]
        output.text = _without_machine(
            "\n".join(line for line in lines if not _PROGRESS_BAR.search(line))
        )
        return output if output.text.strip() else None
    if "data" in output:
        output.data = {k: v for k, v in output.data.items() if "jupyter.widget" not in k}
        for kind, text in output.data.items():
            if kind.startswith("text/"):
                output.data[kind] = _without_machine(text)
            if kind == "image/png":
                output.data[kind] = _fewer_colours(text)
        return output if output.data else None
    return output


def _fewer_colours(picture: str) -> str:
    """A PNG (base64) with a palette of 256 colours: a third of the size, and no difference that one could see."""
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.mode == "P":
        return picture
    smaller = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def _without_machine(text: str) -> str:
    """`text` with this machine's folders replaced by short names, the longest first."""
    names = {str(REPOSITORY) + os.sep: "", sys.prefix: "<python>", tempfile.gettempdir(): "<tmp>"}
    for place, name in sorted(
        (names | {str(Path.home()): "~"}).items(), key=lambda item: -len(item[0])
    ):
        text = text.replace(place, name)
    return text


# --------------------------------------------------------------------------------------------------- checks

_MACHINE_PATH = re.compile(
    r"(?<![\w./:~<>-])/(?:home|root|Users|tmp|var|work|opt|usr|mnt|srv|private|media|kaggle|content)/"
    r"|(?<!\w)[A-Za-z]:\\(?!n)"
)
_CUDA = re.compile(r"""["']cuda|\.cuda\(""")
# A fenced block, or code within a paragraph, which ends with the backticks that it began with.
_CODE = re.compile(
    r"^(```|~~~).*?^\1|(?<!`)(`+)(?!`)(?:(?!\n\n).)+?(?<!`)\2(?!`)", re.DOTALL | re.MULTILINE
)
_LINKS = (
    re.compile(r"\]\(\s*<?([^)\s>]*)"),  # [text](target "title"), ![picture](target)
    re.compile(r"^ {0,3}\[[^\]^]+\]:\s+<?([^\s>]+)", re.MULTILINE),  # [text]: target
    re.compile(r"""<(?:a|img)\b[^>]*?\b(?:href|src)=["']([^"']*)["']""", re.IGNORECASE),
)


def check(source: Path) -> list[str]:
    """Every static fault of a notebook and its source, as sentences; empty when there is none."""
    path = product(source)
    if not path.exists():
        return [f"{path.name} is missing: run `notebooks refresh`"]
    try:
        notebook = read(path)
    except (ValueError, AttributeError, KeyError, TypeError, nbformat.ValidationError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        return [f"{path.name} is not a notebook ({reason}): delete it and run `notebooks refresh`"]
    problems = [*_file_problems(path, notebook), *_opening_problems(notebook)]
    problems += [*_parity_problems(source, notebook), *_section_problems(notebook)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            problems += [
                f"cell {cell.id}: {what}"
                for what in (*_code_problems(cell), *_output_problems(cell))
            ]
        elif cell.cell_type == "markdown":
            links = link_problems(cell.source, path.parent, path.parent.parent)
            problems += [f"cell {cell.id}: {what}" for what in links]
    return problems


def orphans(folder: str | Path = FOLDER) -> list[str]:
    """A fault for each notebook without a source: it would escape building and checking."""
    alone = set(Path(folder).glob("*.ipynb")) - {product(source) for source in find(folder)}
    return [f"{path.name} has no source in src/" for path in sorted(alone)]


def pages(repository: str | Path = REPOSITORY) -> list[Path]:
    """The repository's Markdown pages: `*.md` and the README.md of its folders."""
    repository = Path(repository)
    return sorted([*repository.glob("*.md"), *repository.glob("*/README.md")])


def page_problems(repository: str | Path = REPOSITORY) -> list[str]:
    """Every link in the repository's pages that leads nowhere."""
    return [
        f"{page.relative_to(repository).as_posix()}: {problem}"
        for page in pages(repository)
        for problem in link_problems(page.read_text(encoding="utf-8"), page.parent, repository)
    ]


def link_problems(text: str, folder: str | Path, repository: str | Path = REPOSITORY) -> list[str]:
    """Every link, picture or badge in the Markdown `text` of a file in `folder` that leads nowhere.

    A relative link must point at something inside `repository`. An address on the web is only read, never
    fetched: it needs a host, and a notebook of a suite that it names (as badges do) must be there.

    >>> link_problems("[a](README.md) [b](gone.md) `[c](code.md)` [d](https://)", REPOSITORY)
    ["link 'gone.md' points at nothing", "link 'https://' is no web address"]
    """
    folder, repository = Path(folder).resolve(), Path(repository).resolve()
    faults = {target: _link_fault(target, folder, repository) for target in _links(text)}
    return [f"link {target!r} {fault}" for target, fault in faults.items() if fault]


def _links(text: str) -> list[str]:
    """Targets of the links in Markdown `text`, each once, in order; what stands in code is no link."""
    text = _CODE.sub("", text)
    found = [match for pattern in _LINKS for match in pattern.finditer(text)]
    return list(
        dict.fromkeys(match.group(1) for match in sorted(found, key=lambda match: match.start()))
    )


def _link_fault(target: str, folder: Path, repository: Path) -> str:
    """What is wrong with a link in a file of `folder`; "" when nothing is."""
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        if not re.fullmatch(r"[\w.-]+\.\w+(:\d+)?", parts.netloc):
            return "is no web address"
        named = re.findall(r"notebooks/(\d\d_\w+\.ipynb)", unquote(target))
        gone = [name for name in named if not (repository / "notebooks" / name).exists()]
        return f"names notebooks/{gone[0]}, which is not there" if gone else ""
    if (
        parts.scheme == "mailto" or not parts.path
    ):  # "#heading" of the same file, which is not known here
        return ""
    place = (folder / unquote(parts.path)).resolve()
    if parts.scheme or not place.is_relative_to(repository):
        return "leaves the repository: make it relative, or a web address"
    if not place.exists():
        return "points at nothing"
    if parts.fragment and place.suffix == ".md" and parts.fragment not in _anchors(place):
        return f"names no heading of {place.name}"
    return ""


def _anchors(page: Path) -> set[str]:
    """What `page.md#...` may name: its headings as GitHub writes them, lower case with hyphens."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _file_problems(path: Path, notebook: NotebookNode) -> Iterator[str]:
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"not a valid notebook: {error.message}"
    if path.stat().st_size > MAX_BYTES:
        yield f"{path.stat().st_size / 1e6:.1f} MB is over {MAX_BYTES / 1e6:.0f} MB: fewer or smaller figures"
    for key in sorted(set(notebook.metadata) - {"kernelspec", "language_info"}):
        yield f"metadata {key!r} does not belong into a committed notebook"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if stale := [
        cell.id for cell in code if cell.metadata.get("source_hash") != source_hash(cell.source)
    ]:
        named = ", ".join(stale[:3]) + (f" and {len(stale) - 3} more" if len(stale) > 3 else "")
        yield f"code changed since it was executed: run `notebooks refresh` ({named})"
    elif [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "cells were not executed once each, from top to bottom: run `notebooks refresh`"


def _opening_problems(notebook: NotebookNode) -> Iterator[str]:
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell must be markdown that starts with a '# ' title"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tags = [next((tag for tag in OPENING if tag in _tags(cell)), "") for cell in code]
    order = list(
        dict.fromkeys(
            tags[: len(tags) - tags[::-1].index("imports")] if "imports" in tags else tags
        )
    )
    for number, tag in enumerate(OPENING):
        if number >= len(order) or tag != order[number]:
            yield f"the opening cells must be tagged {', '.join(OPENING)}, in this order; {tag!r} is not where it belongs"
            return
    by_tag = {
        tag: [cell for cell, own in zip(code, tags, strict=True) if own == tag] for tag in OPENING
    }
    for tag, cells in by_tag.items():
        if len(cells) > 1 and tag != "settings":
            yield f"{len(cells)} cells are tagged {tag!r}; only 'settings' may be several"
    if by_tag["bootstrap"][0].source != BOOTSTRAP:
        yield "the bootstrap cell differs from tools.notebooks.BOOTSTRAP: run `notebooks build`"
    parameters = by_tag["parameters"][0].source
    if _literals(parameters) != [*PARAMETERS]:
        yield f"the parameters cell must assign literals to {', '.join(PARAMETERS)}, in this order"
    if any(line.count("=") > 1 for line in parameters.splitlines()):
        yield "papermill cannot read a parameter whose comment holds '=': write it in other words"
    if not any("FULL = " in cell.source for cell in by_tag["settings"]):
        yield "the settings cells must define FULL, the settings of the whole study"
    if (
        "run = start(" not in by_tag["start"][0].source
        or "print(run)" not in by_tag["start"][0].source
    ):
        yield "the start cell must hold run = start(...) and print(run)"
    if "import " not in by_tag["imports"][0].source:
        yield "the imports cell imports nothing"


def _literals(code: str) -> list[str] | None:
    """Names that `code` assigns plain literals to; None when it does anything else."""
    names = []
    for statement in _parse(code).body:
        plain = isinstance(statement, ast.Assign) and isinstance(
            statement.value, ast.Constant | ast.Dict
        )
        if (
            not plain
            or len(statement.targets) != 1
            or not isinstance(statement.targets[0], ast.Name)
        ):
            return None
        names.append(statement.targets[0].id)
    return names


def _parse(code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])  # _code_problems reports it


def _parity_problems(source: Path, notebook: NotebookNode) -> Iterator[str]:
    def essence(cell: NotebookNode | None) -> tuple | None:
        return cell and (cell.get("id"), cell.cell_type, cell.source, _tags(cell))

    for there, meant in zip_longest(notebook.cells, build(source).cells):
        if essence(there) != essence(meant):
            where = f"in cell {there.get('id')}" if there else f"where cell {meant.id} is missing"
            yield f"differs from src/{source.name}, first {where}: edit the source, run `notebooks refresh`"
            return


def _code_problems(cell: NotebookNode) -> Iterator[str]:
    try:
        ast.parse(cell.source)
    except SyntaxError as error:
        yield f"is not plain Python (no magics, no shell lines): {error.msg}, line {error.lineno}"
    if not cell.source.strip():
        yield "is empty"
    if (lines := len(cell.source.splitlines())) > MAX_CODE_LINES:
        yield f"{lines} lines; at most {MAX_CODE_LINES}: split it, or move code into dlia_utils"
    if "bootstrap" in _tags(cell):
        return
    if match := _MACHINE_PATH.search(cell.source):
        yield f"absolute path {match.group()!r}: use run.location and run.run_dir"
    if _CUDA.search(cell.source):
        yield "hard-coded 'cuda': use run.device"


def _output_problems(cell: NotebookNode) -> Iterator[str]:
    for output in cell.outputs:
        if output.output_type == "error":
            yield f"its stored output is an error: {output.ename}"
        data = output.get("data", {})
        if any("jupyter.widget" in kind for kind in data):
            yield "its output holds a widget, which viewers cannot show"
        text = "\n".join(
            [output.get("text", ""), *(v for k, v in data.items() if k.startswith("text/"))]
        )
        if match := _MACHINE_PATH.search(text):
            around = text[max(match.start() - 20, 0) : match.end() + 20]
            yield f"its output shows a path of the machine: {around!r}"
        if (size := len(json.dumps(output))) > MAX_OUTPUT_BYTES:
            yield f"an output of {size / 1e3:.0f} kB, over {MAX_OUTPUT_BYTES / 1e3:.0f}: draw it smaller"
        if len(output.get("text", "").splitlines()) > MAX_TEXT_LINES:
            yield f"its output has more than {MAX_TEXT_LINES} lines of text"


def sections(notebook: NotebookNode) -> tuple[list[str], dict[str, list[str]]]:
    """The code of the opening cells, and that of every section ('## ', by its title), cell by cell."""
    opening, parts, title = [], defaultdict(list), ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (heading := re.match(r"## (.+)", cell.source)):
            title = heading.group(1)
        elif cell.cell_type == "code":
            (opening if set(_tags(cell)) & {*OPENING, YOURS} else parts[title]).append(cell.source)
    return opening, dict(parts)


def _section_problems(notebook: NotebookNode) -> Iterator[str]:
    """Sections ('## ') that need another section: people copy one section behind the opening cells."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.search(r".\n## ", cell.source, re.DOTALL):
            yield f"cell {cell.id}: a section ('## ') must begin a cell of its own, else nobody can copy it"
    opening, parts = sections(notebook)
    known = _names("\n".join(opening))[0] | set(dir(builtins)) | {"display", "get_ipython"}
    for title, code in parts.items():
        bound, used = _names("\n".join(code))
        if missing := sorted(used - bound - known):
            yield f"section {title!r} does not run alone after the opening cells: {', '.join(missing)}"


def _names(code: str) -> tuple[set[str], set[str]]:
    """Global names that `code` binds, and those that it uses."""
    try:
        tables = [symtable.symtable(code, "cell", "exec")]
    except SyntaxError:
        return set(), set()  # _code_problems reports it
    bound = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}
    used = set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        top = table.get_type() == "module"
        used |= {
            s.get_name()
            for s in table.get_symbols()
            if s.is_referenced() and (top or s.is_global())
        }
    return bound, used
