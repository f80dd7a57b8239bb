"""The committed notebooks: built from percent-format sources, executed, cleaned and checked.

People edit `notebooks/src/NN_name.py`; `notebooks/NN_name.ipynb`, with outputs, is made from it. A
code cell stores the hash of the source that produced its outputs: none can outlive its code.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jupytext
import nbformat
from nbconvert.preprocessors.coalescestreams import CoalesceStreamsPreprocessor
from nbformat import NotebookNode
from PIL import Image

from dlia_utils import files
from dlia_utils.execute import ANSI, PARAMETERS, execute, tags
from dlia_utils.progress import MARK

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "notebooks"

OPENING = ("bootstrap", "parameters", "settings", "start", "imports")  # "settings": perhaps several
YOURS = "yours"  # cells for the reader's own models: also part of the opening
FOLDED = {"jupyter": {"source_hidden": True}, "_kg_hide-input": True}  # JupyterLab, Kaggle fold it
MAX_CODE_LINES, MEDIAN_CODE_LINES, MAX_TEXT_LINES = 25, 8, 100
MAX_BYTES, MAX_OUTPUT_BYTES = 1_000_000, 500_000

# The second cell of every notebook, folded; a source holds an empty cell tagged "bootstrap". No
# wheel holds its own hash: a list beside the wheels does, and `pinned` says which list it must be.
BOOTSTRAP = """\
# Finds dlia_utils: around this notebook, else installed, else in the suite's own Kaggle data set
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

KNOWN = ""  # the hash of that data set's list: `tools kaggle` fills it in, then no other will do
INIT, LIST = "dlia_utils/__init__.py", "dlia-utils/dlia-utils.sha256"
found = {one.resolve() for place in ("..", ".") for one in Path(place).glob(INIT)}
wheels, mounts = {}, Path("/kaggle/input")
for one in (*mounts.glob(LIST), *mounts.glob(f"datasets/*/{LIST}")):
    if KNOWN in ("", sha256(one.read_bytes()).hexdigest()):
        words = one.read_text().split()
        wheels |= dict(zip(map(one.with_name, words[1::2]), words[::2], strict=True))
if bad := [one for one, known in wheels.items() if sha256(one.read_bytes()).hexdigest() != known]:
    raise ImportError(f"{bad[0]} is not what the list beside it says: attach the data set anew")
ours = {f"{one}/{INIT}" for one in wheels if one.name.startswith("dlia_utils-")}
places = found or {getattr(find_spec("dlia_utils"), "origin", None), *ours} - {None}
if len(places) != 1:
    none = "no dlia_utils: on Kaggle attach the data set pushed with this notebook, or pip install"
    raise ImportError(f"remove all but one: {', '.join(map(str, places))}" if places else none)
sys.path[:] = [*(str(one.parents[1]) for one in found), *sys.path, *map(str, wheels)]
import dlia_utils

print("dlia_utils", dlia_utils.__version__, "from", dlia_utils.__file__)"""


def sources(names: Sequence[str] = (), folder: str | Path = FOLDER) -> list[Path]:
    """The sources `src/NN_name.py` that `names` means ("01", "1,2", a full name); none means all.

    Errors: ValueError naming what there is when a name fits no notebook.
    """
    found = {path.stem: path for path in sorted((Path(folder) / "src").glob("[0-9][0-9]_*.py"))}
    if not found:
        raise ValueError(f"no notebook source src/NN_name.py in {folder}")
    numbers = {str(int(stem[:2])): stem for stem in found}
    asked = [part for name in names for part in name.split(",") if part]
    stems = [numbers.get(name.lstrip("0"), Path(name).stem) for name in asked]
    if unknown := [name for name, stem in zip(asked, stems, strict=True) if stem not in found]:
        raise ValueError(f"no notebook {', '.join(unknown)}; there are: {', '.join(found)}")
    return [path for stem, path in found.items() if stem in stems or not names]


def product(source: Path) -> Path:
    """The notebook that is made from `source`."""
    return source.parent.parent / f"{source.stem}.ipynb"


def read(path: str | Path) -> NotebookNode:
    return nbformat.read(str(path), as_version=4)


def write(notebook: NotebookNode, path: str | Path) -> Path:
    """Write `notebook` to `path` in one step."""
    return files.write_text(nbformat.writes(notebook) + "\n", path)


def pinned(notebook: NotebookNode, known: str) -> NotebookNode:
    """The notebook whose bootstrap cell takes no other list of wheels than that with this hash."""
    for cell in notebook.cells:
        if "bootstrap" in tags(cell):
            cell.source = cell.source.replace('KNOWN = ""', f'KNOWN = "{known}"')
    return notebook


def source_hash(code: str) -> str:
    """Short hash of a cell's code, stored beside the outputs that the code produced."""
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def build(source: Path) -> NotebookNode:
    """The notebook of a percent-format source; a cell with unchanged code keeps its outputs.

    Cell ids are the notebook's name and the cell's number: building twice gives the same bytes.
    """
    notebook = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    _fill(notebook, source)
    kept = defaultdict(list)  # executed cells by the hash of their code, without the stale ones
    for cell in read(product(source)).cells if product(source).exists() else []:
        if cell.metadata.get("source_hash") == source_hash(cell.source):
            kept[cell.metadata["source_hash"]].append(cell)
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"{source.stem.replace('_', '-')[:60]}-{number:03d}"
        if "bootstrap" in tags(cell):
            cell.source = BOOTSTRAP
        if cell.cell_type == "code" and kept[source_hash(cell.source)]:
            old = kept[source_hash(cell.source)].pop(0)
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
            cell.metadata["source_hash"] = old.metadata["source_hash"]
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return clean(notebook)


_BLOCK = re.compile(r"<!-- (table [\w-]+|contents) -->(?:\n.*?<!-- end \1 -->)?", re.DOTALL)
_PICTURE = re.compile(r"!\[[^\]]+\]\(attachment:([\w.-]+)\)")


def _fill(notebook: NotebookNode, source: Path) -> None:
    """Put in what is not written by hand: contents, tables of results/, pictures of docs/."""
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        if _BLOCK.search(cell.source):
            cell.source = _BLOCK.sub(lambda found: _block(found[1], notebook, source), cell.source)
        pictures = {name: REPOSITORY / "docs" / name for name in _PICTURE.findall(cell.source)}
        if pictures:
            read = {name: base64.b64encode(one.read_bytes()) for name, one in pictures.items()}
            told = {name: {"image/png": _fewer_colours(one.decode())} for name, one in read.items()}
            cell["attachments"] = nbformat.from_dict(told)


def _block(name: str, notebook: NotebookNode, source: Path) -> str:
    if name == "contents":
        headings = re.findall(r"^## (.+)", "\n".join(_markdown(notebook)), flags=re.MULTILINE)
        # Jupyter, Kaggle and nbconvert name a heading by its words with hyphens between them.
        text = "\n".join(f"- [{title}](#{title.replace(' ', '-')})" for title in headings)
        text += f"\n\n{_neighbours(source)}"
    else:
        from . import published

        text = "\n" + published.blocks()[name.removeprefix("table ")]
    return f"<!-- {name} -->\n{text}\n<!-- end {name} -->"


def _markdown(notebook: NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def _neighbours(source: Path) -> str:
    """Links to the notebook before and after."""
    suite = sorted(source.parent.glob("[0-9][0-9]_*.py"))
    at, told = suite.index(source), []
    for word, number in (("Previous", at - 1), ("Next", at + 1)):
        if 0 <= number < len(suite):
            stem = suite[number].stem
            told.append(f"{word}: [{stem.replace('_', ' ')}]({stem}.ipynb)")
    return " | ".join(told)


def back(path: str | Path, *, folder: str | Path = FOLDER) -> Path:
    """Write an edited NN_name.ipynb over its source `src/NN_name.py`; returns the source.

    Errors: ValueError for a name without a source: a new notebook begins as a source.
    """
    source = Path(folder) / "src" / f"{Path(path).stem}.py"
    if not source.exists():
        raise ValueError(f"{Path(path).name} has no source src/{source.name}: name it as its own")
    return files.write_text(source_text(read(path)), source)


def source_text(notebook: NotebookNode) -> str:
    """The percent-format source of a notebook, the inverse of `build`; its bootstrap is empty."""
    cells = []
    for cell in notebook.cells:
        source = "" if "bootstrap" in tags(cell) else cell.source
        source = _BLOCK.sub(r"<!-- \1 -->", source) if cell.cell_type == "markdown" else source
        new = getattr(nbformat.v4, f"new_{cell.cell_type}_cell")
        cells.append(new(source, metadata={"tags": tags(cell)} if tags(cell) else {}))
    metadata = {"jupytext": {"notebook_metadata_filter": "-all"}}
    bare = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    return jupytext.writes(bare, fmt="py:percent").lstrip("\n")


def refresh(source: Path, *, progress: bool = True) -> Path:
    """Build the committed notebook anew with outputs of the smoke profile on synthetic data.

    Errors: RuntimeError when a run found real images, which do not belong into the repository.
    """
    with tempfile.TemporaryDirectory() as scratch:
        runs, here = Path(scratch) / "runs", product(source).parent
        built = write(build(source), Path(scratch) / "built.ipynb")
        # PROFILE = "auto" stands in the notebook, and without real data that is the smoke profile.
        synthetic = dict.fromkeys(("DLIA_PROFILE", "DLIA_DATA", "DLIA_WEIGHTS"))
        synthetic["DLIA_RUNS"] = str(runs)
        out = Path(scratch) / "out.ipynb"
        execute(built, out, environment=synthetic, cwd=here, progress=progress)
        for record in runs.glob("*/*/config.json"):
            if "SYNTHETIC" not in json.loads(record.read_text())["data"]:
                raise RuntimeError(f"{source.stem} found real images: move them out of data/")
        executed = read(out)
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.metadata["source_hash"] = source_hash(cell.source)
    return write(clean(executed), product(source))


_PROGRESS_BAR = re.compile(r"\d+%\|.*\||\d+(it|img|step|batch|file)s? \[\d\d:\d\d")


def clean(notebook: NotebookNode) -> NotebookNode:
    """Drop from `notebook` what depends on the machine or breaks viewers; returns it.

    Dropped: widget state (GitHub calls such a notebook invalid), papermill's timings, progress
    bars, colours, the leading part of machine paths.
    """
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook.metadata = nbformat.from_dict(about)
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in ("source_hash", "tags") if key in cell.metadata}
        kept |= FOLDED if {"bootstrap", "plan"} & {*tags(cell)} else {}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            bar = MARK.items()  # a bar goes first: whether it was shown is a matter of timing
            cell.outputs = [x for x in cell.outputs if not x.get("metadata", {}).items() >= bar]
            # How a stream was cut is a matter of timing; a carriage return overwrites the line.
            CoalesceStreamsPreprocessor().preprocess_cell(cell, {}, 0)
            cell.outputs = [kept for one in cell.outputs if (kept := _clean_output(one))]
    return notebook


def _clean_output(output: NotebookNode) -> NotebookNode | None:
    if output.output_type == "stream":
        lines = ANSI.sub("", output.text).replace("\r", "").split("\n")
        text = "\n".join(line for line in lines if not _PROGRESS_BAR.search(line))
        output.text = _without_machine(text)
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
    """A PNG (base64) with a palette of 256 colours: a third of the size, the same to the eye."""
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.mode == "P":
        return picture
    smaller = io.BytesIO()
    palette = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    palette.save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def _without_machine(text: str) -> str:
    """`text` with this machine's folders replaced by short names, the longest first."""
    names = {str(REPOSITORY) + os.sep: "", sys.prefix: "<python>", tempfile.gettempdir(): "<tmp>"}
    names |= {str(Path.home()): "~"}
    for place in sorted(names, key=len, reverse=True):
        text = text.replace(place, names[place])
    return text


_MACHINE_PATH = re.compile(
    r"(?<![\w./:~<>-])/(?:home|root|Users|tmp|var|work|opt|usr|mnt|srv|private|media|kaggle)"
    r"/|(?<!\w)[A-Za-z]:\\(?!n)"
)
_CUDA = re.compile(r"""["']cuda|\.cuda\(""")
# A fenced block, or code within a paragraph, which ends with the backticks that it began with.
_CODE = re.compile(r"(?sm)^(```|~~~).*?^\1|(?<!`)(`+)(?!`)(?:(?!\n\n).)+?(?<!`)\2(?!`)")
_LINK = re.compile(
    r"\]\(\s*<?([^)\s>]*)"  # [text](target "title"), ![picture](target)
    r"|^ {0,3}\[[^\]^]+\]:\s+<?([^\s>]+)"  # [text]: target
    r"""|<(?:a|img)\b[^>]*?\b(?:href|src)=["']([^"']*)["']""",
    re.MULTILINE | re.IGNORECASE,
)


def check(source: Path) -> list[str]:
    """Every static fault of a notebook and its source, as sentences; empty when there is none."""
    path = product(source)
    if not path.exists():
        return [f"{path.name} is missing: run `tools refresh`"]
    try:
        notebook = read(path)
    except (ValueError, AttributeError, KeyError, TypeError, nbformat.ValidationError) as error:
        return [f"{path.name} is not a notebook ({str(error)[:90]}): delete it and refresh"]
    problems = [*_file_problems(path, notebook), *_opening_problems(notebook)]
    problems += [*_parity_problems(source, notebook), *_section_problems(notebook)]
    problems += _teaching_problems(notebook)
    for cell in notebook.cells:
        found = link_problems(cell.source, path.parent, path.parent.parent)
        if cell.cell_type == "code":
            found = [*_code_problems(cell), *_output_problems(cell)]
        problems += [f"cell {cell.id}: {what}" for what in found]
    return problems


def orphans(folder: str | Path = FOLDER) -> list[str]:
    """A fault for each notebook without a source: it would escape building and checking."""
    alone = set(Path(folder).glob("*.ipynb")) - set(map(product, sources((), folder)))
    return [f"{path.name} has no source in src/" for path in sorted(alone)]


def page_problems(repository: str | Path = REPOSITORY) -> list[str]:
    """Every link that leads nowhere in the repository's `*.md`, README.md of its folders, docs/."""
    root, found = Path(repository), []
    for page in sorted({*root.glob("*.md"), *root.glob("*/README.md"), *root.glob("docs/*.md")}):
        problems = link_problems(page.read_text(encoding="utf-8"), page.parent, root)
        found += [f"{page.relative_to(root).as_posix()}: {problem}" for problem in problems]
    return found


def link_problems(text: str, folder: str | Path, repository: str | Path = REPOSITORY) -> list[str]:
    """Every link, picture or badge in the Markdown `text` of a file in `folder` that leads nowhere.

    A relative link must point at something inside `repository`. A web address is never fetched: it
    needs a host, and a notebook of the suite that it names (as badges do) must be there.

    >>> link_problems("[a](README.md) [b](gone.md) `[c](code.md)` [d](https://)", REPOSITORY)
    ["link 'gone.md' points at nothing", "link 'https://' is no web address"]
    """
    folder, repository = Path(folder).resolve(), Path(repository).resolve()
    targets = [next(filter(None, one.groups()), "") for one in _LINK.finditer(_CODE.sub("", text))]
    faults = {target: _link_fault(target, folder, repository) for target in targets}
    return [f"link {target!r} {fault}" for target, fault in faults.items() if fault]


def _link_fault(target: str, folder: Path, repository: Path) -> str:
    """What is wrong with a link in a file of `folder`, or ""."""
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        if not re.fullmatch(r"[\w.-]+\.\w+(:\d+)?", parts.netloc):
            return "is no web address"
        named = re.findall(r"notebooks/(\d\d_\w+\.ipynb)", unquote(target))
        gone = [name for name in named if not (repository / "notebooks" / name).exists()]
        return f"names notebooks/{gone[0]}, which is not there" if gone else ""
    if parts.scheme == "attachment":  # a picture that `build` puts into the cell
        return "" if (REPOSITORY / "docs" / parts.path).exists() else "is no picture of docs/"
    if parts.scheme == "mailto" or not parts.path:  # "#heading": this file is not known here
        return ""
    place = (folder / unquote(parts.path)).resolve()
    if parts.scheme or not place.is_relative_to(repository):
        return "leaves the repository: make it relative, or a web address"
    if not place.exists():
        return "points at nothing"
    if parts.fragment and place.suffix == ".md":
        # GitHub's names of headings: lower case with hyphens.
        headings = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), flags=re.MULTILINE)
        names = [re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings]
        return "" if parts.fragment in names else f"names no heading of {place.name}"
    return ""


def _file_problems(path: Path, notebook: NotebookNode) -> Iterator[str]:
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"not a valid notebook: {error.message}"
    if path.stat().st_size > MAX_BYTES:
        yield f"{path.stat().st_size / 1e6:.1f} MB, over {MAX_BYTES / 1e6:.0f}: use smaller figures"
    for key in sorted(set(notebook.metadata) - {"kernelspec", "language_info"}):
        yield f"metadata {key!r} does not belong into a committed notebook"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    hashes = [(cell.metadata.get("source_hash"), source_hash(cell.source)) for cell in code]
    if stale := [cell.id for cell, (old, now) in zip(code, hashes, strict=True) if old != now]:
        named = ", ".join(stale[:3]) + (f" and {len(stale) - 3} more" if len(stale) > 3 else "")
        yield f"code changed since it was executed: run `tools refresh` ({named})"
    elif [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "cells were not executed once each, from top to bottom: run `tools refresh`"


def _opening_problems(notebook: NotebookNode) -> Iterator[str]:
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell must be markdown that starts with a '# ' title"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    own = [next((tag for tag in OPENING if tag in tags(cell)), "") for cell in code]
    last = len(own) - own[::-1].index("imports") if "imports" in own else len(own)
    order = [*dict.fromkeys(own[:last]), *OPENING]
    if wrong := [tag for tag, there in zip(OPENING, order, strict=False) if tag != there]:
        yield f"the opening cells must be tagged {', '.join(OPENING)}: {wrong[0]!r} is misplaced"
        return
    if twice := [tag for tag in OPENING if own.count(tag) > 1 and tag != "settings"]:
        yield f"several cells are tagged {twice[0]!r}; only 'settings' may be several"
    text = {tag: "\n".join(one.source for one in code if tag in tags(one)) for tag in OPENING}
    if text["bootstrap"] != BOOTSTRAP:
        yield "the bootstrap cell differs from tools.notebooks.BOOTSTRAP: run `tools build`"
    plain = r"([A-Z_]+) = (\"[^\"]*\"|[\w.]+|\{\})( +#[^=]*)?"
    lines = [re.fullmatch(plain, line) for line in text["parameters"].splitlines() if line]
    if [line and line.group(1) for line in lines] != [*PARAMETERS]:
        names = ", ".join(PARAMETERS)
        yield f"the parameters cell must assign literals to {names}, no '=' in a comment"
    if "FULL = " not in text["settings"]:
        yield "the settings cells must define FULL, the settings of the whole study"
    if "run = start(" not in text["start"] or "print(run)" not in text["start"]:
        yield "the start cell must hold run = start(...) and print(run)"
    if "import " not in text["imports"]:
        yield "the imports cell imports nothing"


def _parity_problems(source: Path, notebook: NotebookNode) -> Iterator[str]:
    essence = [
        [(c.get("id"), c.cell_type, c.source, tags(c), c.get("attachments")) for c in one.cells]
        for one in (notebook, build(source))
    ]
    wrong = [
        (there or meant)[0] for there, meant in itertools.zip_longest(*essence) if there != meant
    ]
    if wrong:
        yield f"differs from src/{source.name}, first in cell {wrong[0]}: run `tools refresh`"


def _code_problems(cell: NotebookNode) -> Iterator[str]:
    try:
        ast.parse(cell.source)
    except SyntaxError as error:
        yield f"is not plain Python (no magics, no shell lines): {error.msg}, line {error.lineno}"
    if not cell.source.strip():
        yield "is empty"
    if (lines := len(cell.source.splitlines())) > MAX_CODE_LINES:
        yield f"{lines} lines; at most {MAX_CODE_LINES}: split it, or move code into dlia_utils"
    if "bootstrap" in tags(cell):
        return
    if match := re.search(r"# *(noqa|fmt: skip)", cell.source):
        yield f"{match.group()!r}: write the line so that no check need be switched off"
    if match := _MACHINE_PATH.search(cell.source):
        yield f"absolute path {match.group()!r}: use run.location and run.run_dir"
    if _CUDA.search(cell.source):
        yield "hard-coded 'cuda': use run.device"


def _output_problems(cell: NotebookNode) -> Iterator[str]:
    for output in cell.outputs:
        if output.output_type == "error":
            yield f"its stored output is an error: {output.ename}"
        data = output.get("data", {})
        texts = [value for kind, value in data.items() if kind.startswith("text/")]
        text = "\n".join([output.get("text", ""), *texts])
        if match := _MACHINE_PATH.search(text):
            around = text[max(match.start() - 20, 0) : match.end() + 20]
            yield f"its output shows a path of the machine: {around!r}"
        if "image/png" in data and not output.metadata.get("image/png", {}).get("alt"):
            yield "a stored picture has no alt text: draw it on `plots.panels`"
        if (size := len(json.dumps(output))) > MAX_OUTPUT_BYTES:
            yield f"an output of {size / 1e3:.0f} kB, over {MAX_OUTPUT_BYTES / 1e3:.0f}: too large"
        if len(output.get("text", "").splitlines()) > MAX_TEXT_LINES:
            yield f"its output has more than {MAX_TEXT_LINES} lines of text"


# An exercise's solution, folded: it runs behind the opening cells, like a section.
SOLUTION = re.compile(r"<details><summary>Solution</summary>\n\n```python\n(.*?)```", re.DOTALL)
SHOWS = re.compile(r"(?m)^(display\()?figure\)?$")  # a cell that shows a figure


def _teaching_problems(notebook: NotebookNode) -> Iterator[str]:
    """What makes a page a lesson: opening, what to see, what was learnt, takeaways, exercises."""
    text = notebook.cells[0].source if notebook.cells else ""
    for part in ("**What you will learn", "**Before you start", "**Time", "<!-- contents -->"):
        if part not in text:
            yield f"the title cell lacks {part!r}"
    lengths = [len(c.source.splitlines()) for c in notebook.cells if c.cell_type == "code"]
    if lengths and (middle := sorted(lengths)[len(lengths) // 2]) > MEDIAN_CODE_LINES:
        yield f"the median code cell has {middle} lines, more than {MEDIAN_CODE_LINES}"
    for cell, after in itertools.pairwise([*notebook.cells, nbformat.v4.new_code_cell()]):
        shows = cell.cell_type == "code" and SHOWS.search(cell.source)
        if shows and after.cell_type != "markdown":
            yield f"cell {cell.id}: no prose after the figure says what to see"
    last = _last_text(notebook)
    for title, text in last.items():
        if re.match(r"\d", title) and "**What we learnt" not in text:
            yield f"section {title!r} does not end with what we learnt"
    for title in {"Takeaways", "Exercises"} - set(last):
        yield f"there is no section '## {title}'"
    if (found := sum(len(SOLUTION.findall(text)) for text in _markdown(notebook))) != 3:
        yield f"{found} exercises have a folded solution, three are asked"


def _last_text(notebook: NotebookNode) -> dict[str, str]:
    """The last markdown cell of every section, by the section's title."""
    last, title = {}, ""
    for text in _markdown(notebook):
        title = text.removeprefix("## ").split("\n")[0] if text.startswith("## ") else title
        last[title] = text
    return last


def sections(notebook: NotebookNode) -> tuple[list[str], dict[str, list[str]]]:
    """The code of the opening cells, and that of every section ('## ', by its title), by cell."""
    opening, parts, title, solved = [], defaultdict(list), "", itertools.count(1)
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (heading := re.match(r"## (.+)", cell.source)):
            title = heading.group(1)
        if cell.cell_type == "markdown":
            for code in SOLUTION.findall(cell.source):
                parts[f"{title}, solution {next(solved)}"].append(code)
        elif cell.cell_type == "code":
            (opening if set(tags(cell)) & {*OPENING, YOURS} else parts[title]).append(cell.source)
    return opening, dict(parts)


def _section_problems(notebook: NotebookNode) -> Iterator[str]:
    """Sections ('## ') that need another section: people copy one behind the opening cells."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.search(r".\n## ", cell.source, re.DOTALL):
            yield f"cell {cell.id}: a section ('## ') must begin a cell of its own, to be copied"
    opening, parts = sections(notebook)
    for title, code in parts.items():
        if missing := _undefined("\n".join([*opening, *code])):
            yield f"section {title!r} does not run alone after the opening cells: {missing}"


def _undefined(code: str) -> str:
    """The names that `code` uses and nobody defines, as ruff finds them."""
    options = ["--isolated", "--select=F821", "--output-format=json", "--quiet", "--exit-zero"]
    known = ["--config", 'builtins=["display", "get_ipython"]', "-"]
    ruff = [sys.executable, "-m", "ruff", "check", *options, *known]
    found = subprocess.run(ruff, input=code, capture_output=True, text=True, check=True).stdout
    undefined = {one["message"].split("`")[1] for one in json.loads(found) if one["code"] == "F821"}
    return ", ".join(sorted(undefined))
