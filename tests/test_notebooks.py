"""The notebooks as they are committed: built, checked, cleaned, and their bootstrap cell."""

import base64
import io
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import tiny
from kaggle_tree import write_wheel
from PIL import Image

from dlia_utils import __version__
from tools import __main__ as cli
from tools import notebooks
from tools.kaggle import write_list

SUITE = pytest.mark.parametrize("source", notebooks.sources(), ids=lambda source: source.stem)


@pytest.fixture
def source(tmp_path):
    return tiny.write(tmp_path / "notebooks")


def last(notebook):
    """The last code cell."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"][-1]


def edit(source, before, after):
    """Change the committed notebook's JSON in place of the source."""
    path = notebooks.product(source)
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


# ---------------------------------------------------------------------------------- build and back


def test_build_is_deterministic_and_keeps_the_outputs_of_unchanged_cells_only(source):
    first, second = notebooks.build(source), notebooks.build(source)
    assert nbformat.writes(first) == nbformat.writes(second)
    assert [cell.id for cell in first.cells][:2] == ["07-tiny-001", "07-tiny-002"]
    assert first.cells[1].source == notebooks.BOOTSTRAP
    prose = "# Some prose.\n\n# %% [markdown]\n# ## 1"
    source.write_text(tiny.TINY.replace("6 * 7", "6 * 8").replace("# ## 1", prose))
    code = [cell for cell in notebooks.build(source).cells if cell.cell_type == "code"]
    assert [len(cell.outputs) for cell in code] == [1, 1, 1, 1, 1, 0]
    assert code[3].outputs[0].text == "output 4\n" and "source_hash" not in code[5].metadata


def test_an_edited_notebook_becomes_its_source_again(source, tmp_path):
    edit(source, "6 * 7", "6 * 8")
    elsewhere = tmp_path / "07_tiny.ipynb"
    elsewhere.write_bytes(notebooks.product(source).read_bytes())
    assert notebooks.back(elsewhere, folder=source.parents[1]) == source
    assert source.read_text() == tiny.TINY.replace("6 * 7", "6 * 8")
    with pytest.raises(ValueError, match="08_tiny.ipynb has no source"):
        notebooks.back("08_tiny.ipynb", folder=source.parents[1])


def test_sources_are_named_by_number_or_name(source):
    folder = source.parents[1]
    for names in ([], ["7"], ["07"], ["07_tiny"], ["notebooks/07_tiny.ipynb"], ["7,07"]):
        assert notebooks.sources(names, folder) == [source]
    with pytest.raises(ValueError, match="no notebook 09; there are: 07_tiny"):
        notebooks.sources(["07", "09"], folder)


def test_refresh_executes_cleans_and_passes_its_own_checks(source, tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_DATA", "somewhere")
    monkeypatch.setenv("PYTHONPATH", str(notebooks.REPOSITORY))
    path = notebooks.refresh(source, progress=False)
    assert notebooks.check(source) == []
    outputs = last(notebooks.read(path)).outputs
    assert [one.get("text") or one.data["text/plain"] for one in outputs] == ["done\n", "42"]
    assert "papermill" not in path.read_text() and "SYNTHETIC" in path.read_text()
    planted = 'value = (run.run_dir / "config.json").write_text(\'{"data": "pneumonia"}\')'
    source.write_text(tiny.TINY.replace("value = 6 * 7", planted))
    with pytest.raises(RuntimeError, match="found real images"):
        notebooks.refresh(source, progress=False)


# ------------------------------------------------------------------------------------------- check


def test_a_good_notebook_has_no_fault(source):
    assert notebooks.check(source) == []
    assert notebooks.orphans(source.parents[1]) == []


MISPLACED, LITERALS, LINE = "is misplaced", "must assign literals", "value = 6 * 7"
ALONE = "does not run alone after the opening cells: "
MORE = "\n# %% [markdown]\n# ## 2 Next\n\n# %%\ndef f(x):\n    return [x + value for y in x]\n"
SOURCE_FAULTS = [
    ("# # A tiny", "# A tiny", "'# ' title"),
    ('tags=["bootstrap"]', "", f"'bootstrap' {MISPLACED}"),
    ('tags=["settings"]', 'tags=["parameters"]', f"'settings' {MISPLACED}"),
    ('tags=["imports"]', "", f"'imports' {MISPLACED}"),
    ("FULL = {", "SETTINGS = {", "must define FULL"),
    ("CHANGES = {}", "CHANGES = dict()", LITERALS),
    ('PROFILE = "auto"', 'PROFILE = "auto".lower()', LITERALS),
    ("RESUME = True", "RESUME = True\nEXTRA = 1", LITERALS),
    ("RESUME = True", "RESUME = True  # True = go on", LITERALS),
    ("print(run)", "run", "must hold run = start(...) and print(run)"),
    (LINE, "value = 6 *", "is not plain Python"),
    (LINE, "%matplotlib inline", "is not plain Python"),
    (LINE, "value = 1\n" * 99, f"at most {notebooks.MAX_CODE_LINES}"),
    (LINE, 'value = "cuda:0"', "use run.device"),
    (LINE, 'value = sys.path("/kaggle/input/x")', "absolute path '/kaggle/'"),
    ("# ## 1 A section", "# Prose.\n#\n# ## 1 A section", "must begin a cell of its own"),
    (LINE, "value = other", f"'1 A section' {ALONE}other"),
    (LINE, "value = 6 * 8", "code changed since it was executed"),
    ("value\n", f"value\n{MORE}", f"'2 Next' {ALONE}value"),
]


@pytest.mark.parametrize(("before", "after", "fault"), SOURCE_FAULTS)
def test_faults_of_a_source_are_found(source, before, after, fault):
    assert before in tiny.TINY
    source.write_text(tiny.TINY.replace(before, after))
    notebooks.write(notebooks.build(source), notebooks.product(source))
    problems = notebooks.check(source)
    assert any(fault in problem for problem in problems), problems


NOTEBOOK_FAULTS = [
    ("6 * 7", "6 * 9", "differs from src/07_tiny.py, first in cell 07-tiny-008"),
    ("output 6", "saved in /home/me/run", "shows a path of the machine"),
    ("output 6", "\\n" * 101, "more than 100 lines"),
    ('"execution_count": 6', '"execution_count": 9', "from top to bottom"),
    ('"kernelspec"', '"widgets": {}, "kernelspec"', "metadata 'widgets'"),
    ("output 6", "x" * 1_000_001, "MB, over 1"),
    ("output 6", "x" * 500_001, "cell 07-tiny-008: an output of 500 kB"),
    ("# A tiny notebook", "# ![a badge](gone.svg)", "link 'gone.svg' points at nothing"),
]


@pytest.mark.parametrize(("before", "after", "fault"), NOTEBOOK_FAULTS)
def test_faults_of_a_committed_notebook_are_found(source, before, after, fault):
    edit(source, before, after)
    problems = notebooks.check(source)
    assert any(fault in problem for problem in problems), problems


def test_a_stored_error_a_missing_an_orphan_and_a_broken_notebook_are_found(source):
    path = notebooks.product(source)
    notebook = notebooks.read(path)
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    last(notebook).outputs = [error]
    notebooks.write(notebook, path)
    assert any("is an error: ValueError" in problem for problem in notebooks.check(source))
    path.rename(path.with_name("08_alone.ipynb"))
    assert "07_tiny.ipynb is missing" in notebooks.check(source)[0]
    assert notebooks.orphans(path.parent) == ["08_alone.ipynb has no source in src/"]
    for text in ("", "[]", "<<<<<<< HEAD", '{"cells": 3, "nbformat": 4, "metadata": {}}'):
        path.write_text(text)
        (problem,) = notebooks.check(source)
        assert problem.startswith("07_tiny.ipynb is not a notebook (")


NOWHERE, LEAVES, BADGE = "points at nothing", "leaves the repository", "https://x.org/blob/main"
LINKS = [
    ('[a](other.md) [b](other.md#part-two-here) [c](#part) [d](../top.md "t") <me@there.org>', ""),
    (f"[![badge](https://a.b/c.svg)]({BADGE}/notebooks/01_here.ipynb)", ""),
    ("```\n[a](gone)\n```\n`[a](gone)` ``[b](`gone)``\n\n    x = y[0](1)", f"link '1' {NOWHERE}"),
    ("an odd ` and\n\n[a](gone) `", f"link 'gone' {NOWHERE}"),
    ("[a](<gone>)", f"link 'gone' {NOWHERE}"),
    ("[a]\n\n[a]: gone.md\n\n[^1]: a note", f"link 'gone.md' {NOWHERE}"),
    ('<a class="x" href="gone.md">', f"link 'gone.md' {NOWHERE}"),
    ('<img\n alt="a" src="gone.png" width=5>', f"link 'gone.png' {NOWHERE}"),
    ("[a](other.md#part)", "names no heading of other.md"),
    ("[a](/etc/hosts)", LEAVES),
    ("[a](../../x.md)", LEAVES),
    ("[a](https://kaggle)", "is no web address"),
    (f"[a]({BADGE}/notebooks/02_gone.ipynb)", "names notebooks/02_gone.ipynb, which is not there"),
]


@pytest.mark.parametrize(("text", "fault"), LINKS)
def test_links_that_lead_nowhere_are_found(tmp_path, text, fault):
    for name in ("top.md", "docs/other.md", "notebooks/01_here.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# Part two: here\n")
    problems = notebooks.link_problems(text, tmp_path / "docs", tmp_path)
    assert len(problems) == bool(fault) and all(fault in one for one in problems), problems


def test_pages_of_the_repository_have_no_dead_link(tmp_path):
    assert notebooks.page_problems() == []
    for name in ("README.md", "NEW.md", "data/README.md", "data/set/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[a](gone.md)")
    found = [problem.split(":")[0] for problem in notebooks.page_problems(tmp_path)]
    assert found == ["NEW.md", "README.md", "data/README.md"]


# ------------------------------------------------------------------------------------------- clean


def test_clean_drops_what_depends_on_the_machine(source):
    notebook = notebooks.build(source)
    output = nbformat.v4.new_output
    notebook.metadata["papermill"] = {"input_path": "/home/me/x.ipynb"}
    last(notebook).metadata = {"execution": {"iopub.execute_input": "now"}}
    bar = "fit:   0%|          | 0/2 [00:00<?]\rfit: 100%|####| 2/2 [00:01<00:00]\n"
    paths = f"{notebooks.REPOSITORY}/runs/a and {sys.prefix}/lib\n"
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    last(notebook).outputs = [
        output("stream", name="stderr", text=bar),
        output("stream", name="stdout", text="\x1b[31mred\x1b[0m\n"),
        output("stream", name="stdout", text=paths),
        output("display_data", data=widget),
        output("execute_result", data={"text/plain": "42"}, execution_count=1),
    ]
    cleaned = notebooks.clean(notebook)
    assert set(cleaned.metadata) == {"kernelspec", "language_info"}
    assert not last(cleaned).metadata and cleaned.cells[1].metadata["_kg_hide-input"]
    texts = [one.get("text") or one.data["text/plain"] for one in last(cleaned).outputs]
    assert texts == ["red\nruns/a and <python>/lib\n", "42"]
    assert nbformat.writes(notebooks.clean(cleaned)) == nbformat.writes(cleaned)


def test_clean_gives_pictures_a_palette_that_looks_the_same(source):
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 1), dtype=np.uint8).repeat(3, 2)
    image[:20] = (61, 220, 132)  # boxes of one colour
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    notebook = notebooks.build(source)
    data = {"image/png": picture}
    last(notebook).outputs = [nbformat.v4.new_output("display_data", data=data)]
    small = last(notebooks.clean(notebook)).outputs[0].data["image/png"]
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(small))).convert("RGB")).astype(int)
    assert len(small) < 0.6 * len(picture) and np.abs(seen - image).max() <= 4


# --------------------------------------------------------------------------------------- bootstrap


def run_bootstrap(kaggle, cwd, after="", before="", known=""):
    """The bootstrap cell in a Python without any installed package: exit status and output."""
    cell = notebooks.BOOTSTRAP.replace("/kaggle", str(kaggle))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    notebook.cells[0].metadata["tags"] = ["bootstrap"]
    (one,) = notebooks.pinned(notebook, known).cells
    python = [sys.executable, "-I", "-S", "-c", f"{before}\n{one.source}\n{after}"]
    done = subprocess.run(python, capture_output=True, text=True, check=False, cwd=cwd)
    return done.returncode, done.stdout + done.stderr


def data_set(kaggle, place="dlia-utils", version="0.4"):
    """The offline data set as `tools kaggle` writes it: its package, and the hash of its list."""
    mount = kaggle / "input" / place
    write_wheel(mount, "captum", "0.9", "LOCAL = True")
    ours = write_wheel(mount, "dlia_utils", version, f"__version__ = '{version}'")
    return f"{ours}/dlia_utils/__init__.py", write_list(mount)


@pytest.fixture
def foreign(tmp_path):
    """Fault F4: a data set before ours in the alphabet that holds a package of our name."""
    mount = tmp_path / "input" / "aaa-xray-images"
    data_set(tmp_path, mount, "6.6")
    for folder in (mount / "dlia_utils", mount / "dlia-utils" / "dlia_utils"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("__version__ = 'CODE OF THE DATA SET RAN'")
    return mount


@pytest.mark.parametrize("place", ["dlia-utils", "datasets/me/dlia-utils"])
@pytest.mark.parametrize("pushed", [True, False])
def test_bootstrap_takes_both_wheels_from_our_data_set_alone(tmp_path, foreign, place, pushed):
    origin, known = data_set(tmp_path, place)
    write_wheel(tmp_path / "input" / place, "dlia_utils", "9", "__version__ = 'not in the list'")
    found = run_bootstrap(
        tmp_path, tmp_path, "import captum; assert captum.LOCAL", known=known * pushed
    )
    assert found == (0, f"dlia_utils 0.4 from {origin}\n")


def test_bootstrap_takes_nothing_from_a_foreign_data_set(tmp_path, foreign):
    code, said = run_bootstrap(tmp_path, tmp_path)
    assert code == 1 and "no dlia_utils: on Kaggle attach the data set pushed with" in said
    assert not list(tmp_path.rglob("__pycache__")), "none of its code was even read"


def test_bootstrap_of_a_pushed_notebook_takes_its_own_build_alone(tmp_path):
    data_set(tmp_path, "datasets/another/dlia-utils", "6.6")
    origin, known = data_set(tmp_path / "aside")
    code, said = run_bootstrap(tmp_path, tmp_path, known=known)
    assert code == 1 and "no dlia_utils: on Kaggle attach" in said
    origin, known = data_set(tmp_path, "datasets/me/dlia-utils")
    found = run_bootstrap(tmp_path, tmp_path, known=known)
    assert found == (0, f"dlia_utils 0.4 from {origin}\n")


def test_bootstrap_refuses_a_wheel_that_is_not_the_listed_one(tmp_path):
    origin, known = data_set(tmp_path)
    wheel = write_wheel(tmp_path / "input/dlia-utils", "dlia_utils", "0.4", "__version__ = '6.6'")
    for name in ("", known):
        code, said = run_bootstrap(tmp_path, tmp_path, known=name)
        assert code == 1 and f"{wheel} is not what the list beside it says: attach" in said


@pytest.mark.parametrize("second", ["data set", "installed", "folder"])
def test_bootstrap_refuses_two_candidates_and_names_both(tmp_path, second):
    origins, before = [data_set(tmp_path, "datasets/me/dlia-utils")[0]], ""
    if second == "data set":
        origins.append(data_set(tmp_path, "datasets/another/dlia-utils")[0])
    else:
        folders = {"installed": ["site"], "folder": [".", "notebooks"]}[second]
        before = f"import sys; sys.path.append({str(tmp_path / 'site')!r})"
        inits = [tmp_path / name / "dlia_utils" / "__init__.py" for name in folders]
        for init in inits:
            init.parent.mkdir(parents=True)
            init.write_text("__version__ = '9'")
        origins = [str(init) for init in inits] + origins * (second == "installed")
    (tmp_path / "notebooks").mkdir(exist_ok=True)
    code, said = run_bootstrap(tmp_path, tmp_path / "notebooks", before=before)
    assert code == 1 and "remove all but one: " in said and len(origins) == 2
    assert all(origin in said for origin in origins)


@pytest.mark.parametrize("cwd", ["clone", "clone/notebooks"])
def test_bootstrap_prefers_the_repository_and_takes_captum_from_its_wheel(tmp_path, cwd):
    origin = tmp_path / "clone" / "dlia_utils" / "__init__.py"
    (tmp_path / "clone" / "notebooks").mkdir(parents=True)
    origin.parent.mkdir()
    origin.write_text("__version__ = '9'")
    data_set(tmp_path)
    found = run_bootstrap(tmp_path, tmp_path / cwd, "import captum; print(captum.LOCAL)")
    assert found == (0, f"dlia_utils 9 from {origin}\nTrue\n")


def test_bootstrap_runs_twice_and_finds_this_repository(tmp_path):
    origin, _ = data_set(tmp_path)
    again = notebooks.BOOTSTRAP.replace("/kaggle", str(tmp_path))
    said = f"dlia_utils 0.4 from {origin}\n"
    assert run_bootstrap(tmp_path, tmp_path, after=again) == (0, said * 2)
    said = f"dlia_utils {__version__} from {notebooks.REPOSITORY / 'dlia_utils' / '__init__.py'}\n"
    for folder in ("tests", "notebooks", "."):
        assert run_bootstrap(tmp_path, notebooks.REPOSITORY / folder) == (0, said)


# --------------------------------------------------------------------------- the suite, by command


@SUITE
def test_suite_notebook_is_as_its_source_and_synthetic(source):
    assert notebooks.source_text(notebooks.read(notebooks.product(source))) == source.read_text()
    assert "SYNTHETIC" in notebooks.product(source).read_text(), "outputs of synthetic images only"


@SUITE
def test_the_suite_has_no_fault(source):
    assert notebooks.check(source) == []


def test_the_command_line_builds_and_checks(source, monkeypatch, capsys):
    whole = notebooks.sources
    monkeypatch.setattr(notebooks, "FOLDER", source.parents[1])
    monkeypatch.setattr(notebooks, "sources", lambda names: whole(names, source.parents[1]))
    source.write_text(tiny.TINY.replace("6 * 7", "6 * 8"))
    assert cli.main(["check", "07"]) == 1 and "07_tiny: " in capsys.readouterr().out
    assert cli.main(["build", "7"]) == 0 and "07_tiny.ipynb" in capsys.readouterr().out
    assert cli.main(["build", "8"]) == 2 and "no notebook 8" in capsys.readouterr().err
