"""Notebooks: the machinery on a tiny notebook, then every notebook of the suite, checked and run on real data.

Synthetic runs are in test_kaggle_tree.py and test_copy.py.
"""

import base64
import io
import os
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from kaggle_tree import need_complete, write_wheel
from PIL import Image

from dlia_utils import __version__
from dlia_utils.data import sources
from dlia_utils.data.tables import DataNotFound
from tools import notebooks

TINY = """\
# %% [markdown]
# # A tiny notebook

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"
DATA_DIR = ""
RUN_NAME = ""
RESUME = True
CHANGES = {}

# %% tags=["settings"]
FULL = {"dataset": "pneumonia"}


# %% tags=["start"]
def start(full):
    return f"profile {PROFILE}"


run = start(FULL)
print(run)

# %% tags=["imports"]
import sys

# %% [markdown]
# ## 1 A section

# %%
value = 6 * 7
print("a bar: 50%|#####     | 1/2\\rdone", file=sys.stderr)
value
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The source of a tiny notebook in a suite of its own, with a stand-in for the package beside it."""
    source = tmp_path / "notebooks" / "src" / "07_tiny.py"
    source.parent.mkdir(parents=True)
    source.write_text(TINY)
    package = tmp_path / "dlia_utils"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "tiny"\n')
    return source


@pytest.fixture
def tiny_fresh(tiny):
    """The same with its notebook built and marked as executed, without the seconds that a kernel takes."""
    notebook = notebooks.build(tiny)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
        cell.metadata["source_hash"] = notebooks.source_hash(cell.source)
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"output {number}\n")]
    notebooks.write(notebook, notebooks.product(tiny))
    return tiny


def edit(source, before, after):
    """Change the committed notebook's JSON in place of the source."""
    path = notebooks.product(source)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


# ----------------------------------------------------------------------------------------------------- build


def test_build_is_deterministic_and_names_its_cells(tiny):
    first, second = notebooks.build(tiny), notebooks.build(tiny)
    assert nbformat.writes(first) == nbformat.writes(second)
    assert [cell.id for cell in first.cells][:2] == ["07-tiny-001", "07-tiny-002"]
    assert first.cells[1].source == notebooks.BOOTSTRAP
    assert first.cells[2].metadata.tags == ["parameters"]
    nbformat.validate(first)


def test_build_keeps_the_outputs_of_unchanged_cells_only(tiny_fresh):
    prose = "# Some prose.\n\n# %% [markdown]\n# ## 1"
    tiny_fresh.write_text(TINY.replace("6 * 7", "6 * 8").replace("# ## 1", prose))
    code = [cell for cell in notebooks.build(tiny_fresh).cells if cell.cell_type == "code"]
    assert [len(cell.outputs) for cell in code] == [1, 1, 1, 1, 1, 0]
    assert code[3].outputs[0].text == "output 4\n"
    assert "source_hash" not in code[5].metadata


def test_pick_takes_numbers_and_names_and_refuses_others(tiny):
    folder = tiny.parent.parent
    for names in ([], ["7"], ["07"], ["07_tiny"], ["notebooks/07_tiny.ipynb"], ["7,07"]):
        assert notebooks.pick(names, folder) == [tiny]
    with pytest.raises(ValueError, match="no notebook 08; there are"):
        notebooks.pick(["07,08"], folder)
    with pytest.raises(ValueError, match="no notebook 09; there are: 07_tiny"):
        notebooks.pick(["07", "09"], folder)


# ----------------------------------------------------------------------------------------------------- check


def test_a_good_notebook_has_no_fault(tiny_fresh):
    assert notebooks.check(tiny_fresh) == []
    assert notebooks.orphans(tiny_fresh.parent.parent) == []


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("# # A tiny", "# A tiny", "'# ' title"),
        ('tags=["bootstrap"]', "", "'bootstrap' is not where it belongs"),
        ('tags=["settings"]', 'tags=["parameters"]', "'settings' is not where it belongs"),
        ('tags=["imports"]', "", "'imports' is not where it belongs"),
        ("FULL = {", "SETTINGS = {", "must define FULL"),
        ("CHANGES = {}", "CHANGES = dict()", "must assign literals"),
        ('PROFILE = "auto"', 'PROFILE = "auto".lower()', "must assign literals"),
        ("RESUME = True", "RESUME = True\nEXTRA = 1", "must assign literals"),
        ("RESUME = True", "RESUME = True  # True = go on", "papermill cannot read"),
        ("print(run)", "run", "must hold run = start(...) and print(run)"),
        ("value = 6 * 7", "value = 6 *", "is not plain Python"),
        ("value = 6 * 7", "%matplotlib inline", "is not plain Python"),
        ("value = 6 * 7", "value = 1\n" * 41, "at most 40"),
        ("value = 6 * 7", 'value = "cuda:0"', "use run.device"),
        ("value = 6 * 7", 'value = sys.path("/kaggle/input/x")', "absolute path '/kaggle/'"),
        ("value = 6 * 7", 'value = "/home/me/data"', "absolute path '/home/'"),
        (
            "# ## 1 A section",
            "# Prose.\n#\n# ## 1 A section",
            "a section ('## ') must begin a cell of its own",
        ),
        (
            "value = 6 * 7",
            "value = other",
            "'1 A section' does not run alone after the opening cells: other",
        ),
        ("value = 6 * 7", "value = 6 * 8", "code changed since it was executed"),
    ],
)
def test_faults_of_a_source_are_found(tiny_fresh, before, after, fault):
    tiny_fresh.write_text(TINY.replace(before, after))
    notebooks.write(notebooks.build(tiny_fresh), notebooks.product(tiny_fresh))
    assert any(fault in problem for problem in notebooks.check(tiny_fresh)), notebooks.check(
        tiny_fresh
    )


def test_a_name_of_another_section_is_found_inside_functions_too(tiny_fresh):
    more = "\n# %% [markdown]\n# ## 2 Next\n\n# %%\ndef f(x):\n    return [x + value for y in x]\n"
    tiny_fresh.write_text(TINY + more)
    notebooks.write(notebooks.build(tiny_fresh), notebooks.product(tiny_fresh))
    problems = notebooks.check(tiny_fresh)
    assert any(
        "section '2 Next' does not run alone after the opening cells: value" in p for p in problems
    )


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("6 * 7", "6 * 9", "differs from src/07_tiny.py"),
        ("output 6", "saved in /home/me/run", "shows a path of the machine"),
        ("output 6", "\\n" * 101, "more than 100 lines"),
        ('"execution_count": 6', '"execution_count": 9', "from top to bottom"),
        ('"kernelspec"', '"widgets": {}, "kernelspec"', "metadata 'widgets'"),
        ("output 6", "x" * 1_000_001, "is over 1 MB"),
        ("output 6", "x" * 500_001, "cell 07-tiny-008: an output of 500 kB"),
        (
            "# A tiny notebook",
            "# ![a badge](gone.svg)",
            "cell 07-tiny-001: link 'gone.svg' points at nothing",
        ),
    ],
)
def test_faults_of_a_committed_notebook_are_found(tiny_fresh, before, after, fault):
    edit(tiny_fresh, before, after)
    assert any(fault in problem for problem in notebooks.check(tiny_fresh)), notebooks.check(
        tiny_fresh
    )


def test_a_stored_error_a_missing_and_an_orphan_notebook_are_found(tiny_fresh):
    path = notebooks.product(tiny_fresh)
    notebook = notebooks.read(path)
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    notebook.cells[-1].outputs = [error]
    notebooks.write(notebook, path)
    assert any("is an error: ValueError" in problem for problem in notebooks.check(tiny_fresh))
    path.rename(path.with_name("08_alone.ipynb"))
    assert "07_tiny.ipynb is missing" in notebooks.check(tiny_fresh)[0]
    assert notebooks.orphans(path.parent) == ["08_alone.ipynb has no source in src/"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "<<<<<<< HEAD", '{"cells": 3, "nbformat": 4, "metadata": {}}']
)
def test_a_file_that_is_no_notebook_is_a_fault_not_a_crash(tiny_fresh, text):
    notebooks.product(tiny_fresh).write_text(text)
    (problem,) = notebooks.check(tiny_fresh)
    assert (
        problem.startswith("07_tiny.ipynb is not a notebook (") and "notebooks refresh" in problem
    )


def test_a_changed_source_names_the_first_cell_that_differs(tiny_fresh):
    tiny_fresh.write_text(TINY + "\n# %%\n1\n")
    assert any(
        "first where cell 07-tiny-009 is missing" in problem
        for problem in notebooks.check(tiny_fresh)
    )
    tiny_fresh.write_text(TINY.replace("import sys", "import os"))
    assert any("first in cell 07-tiny-006" in problem for problem in notebooks.check(tiny_fresh))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            '[a](other.md) [b](other.md#part-two-here) [c](#part) [d](../top.md "title") <me@there.org>',
            "",
        ),
        (
            "[![badge](https://a.b/c.svg)](https://x.org/src=https%3A//a.b/notebooks/01_here.ipynb)",
            "",
        ),
        (
            "```\n[a](gone)\n```\n`[a](gone)` ``[b](`gone)``\n\n    x = y[0](1)",
            "link '1' points at nothing",
        ),
        ("an odd ` and\n\n[a](gone) `", "link 'gone' points at nothing"),
        ("[a](<gone>)", "link 'gone' points at nothing"),
        ("[a]\n\n[a]: gone.md\n\n[^1]: a note", "link 'gone.md' points at nothing"),
        ('<a class="x" href="gone.md">', "link 'gone.md' points at nothing"),
        ('<img\n alt="a" src="gone.png" width=5>', "link 'gone.png' points at nothing"),
        ("[a](Other.md)", "link 'Other.md' points at nothing"),
        ("[a](other.md#part)", "link 'other.md#part' names no heading of other.md"),
        ("[a](/etc/hosts)", "link '/etc/hosts' leaves the repository"),
        ("[a](../../x.md)", "link '../../x.md' leaves the repository"),
        ("[a](file:///x.md)", "link 'file:///x.md' leaves the repository"),
        ("[a](http://) ", "link 'http://' is no web address"),
        ("[a](https://kaggle)", "link 'https://kaggle' is no web address"),
        (
            "[a](https://x.org/blob/main/notebooks/02_gone.ipynb)",
            "names notebooks/02_gone.ipynb, which is not there",
        ),
    ],
)
def test_links_that_lead_nowhere_are_found(tmp_path, text, fault):
    for name in ("top.md", "docs/other.md", "notebooks/01_here.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# Part two: here\n")
    problems = notebooks.link_problems(text, tmp_path / "docs", tmp_path)
    assert (problems == []) if not fault else (len(problems) == 1 and fault in problems[0]), (
        problems
    )


def test_pages_are_found_by_themselves(tmp_path):
    for name in ("README.md", "NEW.md", "data/README.md", "data/set/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[a](gone.md)")
    found = [problem.split(":")[0] for problem in notebooks.page_problems(tmp_path)]
    assert found == ["NEW.md", "README.md", "data/README.md"]


def test_pages_of_the_repository_have_no_dead_link():
    assert notebooks.page_problems() == []


def test_checks_need_no_torch_and_end_in_seconds(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('the checks imported torch')")
    done = subprocess.run(
        [sys.executable, "-m", "dlia_utils", "notebooks", "check"],
        cwd=notebooks.REPOSITORY,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1) and not done.stderr, done.stderr  # faults have their own test


def test_clean_drops_what_depends_on_the_machine(tiny):
    notebook = notebooks.build(tiny)
    output = nbformat.v4.new_output
    notebook.metadata["papermill"] = {"input_path": "/home/me/x.ipynb"}
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    notebook.cells[-1].metadata["execution"] = {"iopub.execute_input": "now"}
    bar = "fit:   0%|          | 0/2 [00:00<?]\rfit: 100%|####| 2/2 [00:01<00:00]\n"
    notebook.cells[-1].outputs = [
        output("stream", name="stderr", text=bar),
        output("stream", name="stdout", text="\x1b[31mred\x1b[0m\n"),
        output(
            "stream", name="stdout", text=f"{notebooks.REPOSITORY}/runs/a and {sys.prefix}/lib\n"
        ),
        output(
            "display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
        ),
        output("execute_result", data={"text/plain": "42"}, execution_count=1),
    ]
    cleaned = notebooks.clean(notebook)
    assert (
        set(cleaned.metadata) == {"kernelspec", "language_info"} and not cleaned.cells[-1].metadata
    )
    assert (
        cleaned.cells[1].metadata["_kg_hide-input"]
        and cleaned.cells[1].metadata["jupyter"]["source_hidden"]
    )
    texts = [one.get("text") or one.data["text/plain"] for one in cleaned.cells[-1].outputs]
    assert texts == ["red\nruns/a and <python>/lib\n", "42"]
    assert nbformat.writes(notebooks.clean(cleaned)) == nbformat.writes(cleaned)


def test_clean_gives_pictures_a_palette_that_looks_the_same(tiny):
    film = np.random.default_rng(0).integers(0, 256, (60, 60, 1), dtype=np.uint8).repeat(3, axis=2)
    film[:20] = (61, 220, 132)  # boxes of one colour
    buffer = io.BytesIO()
    Image.fromarray(film).save(buffer, "PNG")
    notebook = notebooks.build(tiny)
    picture = base64.b64encode(buffer.getvalue()).decode()
    notebook.cells[-1].outputs = [
        nbformat.v4.new_output("display_data", data={"image/png": picture})
    ]
    cleaned = notebooks.clean(notebook)
    small = cleaned.cells[-1].outputs[0].data["image/png"]
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(small))).convert("RGB")).astype(int)
    assert len(small) < 0.6 * len(picture) and np.abs(seen - film).max() <= 4
    assert nbformat.writes(notebooks.clean(cleaned)) == nbformat.writes(cleaned)


# ------------------------------------------------------------------------------------------------- and back


def test_an_edited_notebook_becomes_its_source_again(tiny):
    notebooks.write(notebooks.build(tiny), notebooks.product(tiny))
    before = tiny.read_text()
    edit(tiny, "6 * 7", "6 * 8")
    elsewhere = tiny.parents[2] / "download" / "07_tiny.ipynb"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(notebooks.product(tiny).read_bytes())
    assert notebooks.back(elsewhere, folder=tiny.parents[1]) == tiny
    assert tiny.read_text() == before.replace("6 * 7", "6 * 8")
    with pytest.raises(ValueError, match="08_tiny.ipynb has no source"):
        notebooks.back(
            elsewhere.rename(elsewhere.with_name("08_tiny.ipynb")), folder=tiny.parents[1]
        )


# ------------------------------------------------------------------------------------------------- execution


def test_refresh_executes_cleans_and_passes_its_own_checks(tiny, monkeypatch):
    monkeypatch.setenv("DLIA_DATA", "somewhere")
    path = notebooks.refresh(tiny, progress=False)
    assert notebooks.check(tiny) == []
    cells = notebooks.read(path).cells
    assert cells[1].outputs[0].text == "dlia_utils tiny\n"
    assert [one.get("text") or one.data["text/plain"] for one in cells[-1].outputs] == [
        "done\n",
        "42",
    ]
    assert "papermill" not in path.read_text()


def test_refresh_refuses_real_images(tiny):
    code = """import os, pathlib
run_dir = pathlib.Path(os.environ["DLIA_RUNS"]) / "a" / "b"
run_dir.mkdir(parents=True)
value = (run_dir / "config.json").write_text('{"data": "pneumonia"}')"""
    tiny.write_text(TINY.replace("value = 6 * 7", code))
    with pytest.raises(RuntimeError, match="found real images"):
        notebooks.refresh(tiny, progress=False)
    assert not notebooks.product(tiny).exists()


def test_execute_passes_parameters_and_tells_the_failing_cell(tiny, tmp_path, monkeypatch):
    from papermill.exceptions import PapermillExecutionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLIA_DATA", "relative")
    shown = 'import os; print(PROFILE, os.environ["DLIA_DATA"], "GLIBC_TUNABLES" in os.environ, CHANGES)'
    tiny.write_text(TINY.replace("print(run)", shown).replace("6 * 7", "6 / 0"))
    notebooks.write(notebooks.build(tiny), notebooks.product(tiny))
    with pytest.raises(PapermillExecutionError) as failure:
        parameters = {"PROFILE": "cpu", "CHANGES": {"lr": 3e-4, "grid": (1, 2)}}
        notebooks.execute(
            notebooks.product(tiny), "out/x.ipynb", parameters=parameters, progress=False
        )
    text = notebooks.failure_text(failure.value)
    assert "value = 6 / 0" in text and "ZeroDivisionError" in text and "\x1b" not in text
    started = next(
        c for c in notebooks.read("out/x.ipynb").cells if "start" in c.metadata.get("tags", [])
    )
    assert started.outputs[0].text.startswith(
        f"cpu {tmp_path / 'relative'} True {{'lr': 0.0003, 'grid': [1, 2]}}"
    )


# ------------------------------------------------------------------------------------------------- bootstrap


def run_bootstrap(kaggle, cwd, after=""):
    """The bootstrap cell in a Python without any installed package: exit status, last line of its output."""
    cell = notebooks.BOOTSTRAP.replace("/kaggle", str(kaggle))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"{cell}\n{after}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("layout", ["input/{}", "input/datasets/me/{}"])
def test_bootstrap_finds_both_wheels_in_a_data_set_on_kaggle(tmp_path, layout):
    mount = tmp_path / "kaggle" / layout.format("dlia-utils")
    (tmp_path / "kaggle" / "input" / "other" / "dlia_utils").mkdir(
        parents=True
    )  # a folder, but no package
    for version in ("0.3", "0.4"):
        write_wheel(mount, "dlia_utils", version, f"__version__ = '{version}'")
    write_wheel(mount, "captum", "0.9", "LOCAL = True")
    found = run_bootstrap(tmp_path / "kaggle", tmp_path, "import captum; assert captum.LOCAL")
    assert found == (0, "dlia_utils 0.4\n"), "the newest of several wheels"


@pytest.mark.parametrize("cwd", ["clone", "clone/notebooks"])
def test_bootstrap_prefers_the_repository_and_takes_captum_from_its_wheel(tmp_path, cwd):
    (tmp_path / "clone" / "dlia_utils").mkdir(parents=True)
    (tmp_path / "clone" / "dlia_utils" / "__init__.py").write_text("__version__ = '9'")
    (tmp_path / "clone" / "notebooks").mkdir()
    write_wheel(
        tmp_path / "kaggle" / "input" / "wheels", "dlia_utils", "0.3", "__version__ = '0.3'"
    )
    write_wheel(tmp_path / "kaggle" / "input" / "wheels", "captum", "0.9", "LOCAL = True")
    found = run_bootstrap(tmp_path / "kaggle", tmp_path / cwd, "import captum; print(captum.LOCAL)")
    assert found == (0, "dlia_utils 9\nTrue\n")


def test_without_the_package_the_failing_line_says_what_to_do(tmp_path):
    code, message = run_bootstrap(tmp_path / "no-kaggle", tmp_path)
    assert code == 1 and "No module named 'dlia_utils'" in message
    assert "On Kaggle: Add Input" in notebooks.BOOTSTRAP and "pip install" in notebooks.BOOTSTRAP


def test_bootstrap_is_short_folded_and_finds_this_repository():
    assert (
        len(notebooks.BOOTSTRAP.splitlines()) <= 9
        and max(map(len, notebooks.BOOTSTRAP.splitlines())) <= 110
    )
    for folder in ("tests", "notebooks", "."):
        code, said = run_bootstrap(
            notebooks.REPOSITORY / "no-kaggle", notebooks.REPOSITORY / folder
        )
        assert (code, said) == (0, f"dlia_utils {__version__}\n")


# ------------------------------------------------------------------------------------- the suite's notebooks

SUITE = pytest.mark.parametrize("source", notebooks.find(), ids=lambda source: source.stem)


@SUITE
def test_suite_notebook_has_no_static_fault(source):
    assert notebooks.check(source) == []


@SUITE
def test_suite_notebook_gives_its_source_back(source):
    assert notebooks.source_text(notebooks.read(notebooks.product(source))) == source.read_text()


def test_another_data_set_is_taken_only_by_a_notebook_that_can(tmp_path, monkeypatch):
    monkeypatch.setenv("DLIA_RUNS", str(tmp_path))
    monkeypatch.delenv("DLIA_DATA", raising=False)
    asks, own = (
        next(s for s in notebooks.find() if s.stem.startswith(number)) for number in ("04", "03")
    )
    with pytest.raises(
        ValueError,
        match="dataset = 'covid', but this notebook has a data set of its own: tuberculosis",
    ):
        notebooks.run(own, changes={"dataset": "covid"}, progress=False)
    with pytest.raises(ValueError, match="nowhere"):
        notebooks.run(asks, changes={"dataset": "nowhere"}, progress=False)
    seen = {}
    monkeypatch.setattr(
        notebooks, "execute", lambda path, out, *, parameters, progress: seen.update(parameters)
    )
    done = notebooks.run(asks, changes={"dataset": "breastmnist"}, progress=False)
    assert (
        seen["CHANGES"] == {"dataset": "breastmnist"}
        and done.folder.name == "smoke-breastmnist-synthetic"
    )


@SUITE
def test_no_smoke_run_has_a_time_limit(source):
    names = notebooks._executed(source, ("parameters", "settings"), {})
    assert names["SMOKE"]["max_minutes"] is None and set(names["SMOKE"]) | set(names["CPU"]) <= set(
        names["FULL"]
    )


def test_suite_has_no_notebook_without_source():
    assert notebooks.orphans() == []


@SUITE
def test_suite_notebook_shows_synthetic_outputs(source):
    assert "SYNTHETIC" in notebooks.product(source).read_text(), (
        "outputs must come from synthetic images"
    )


def lacks(dataset, folder):
    """Whether there is no copy of the data set in `folder`."""
    try:
        sources.find(dataset, folder)
    except DataNotFound:
        return True
    return False


@pytest.mark.notebook
@pytest.mark.real
@SUITE
def test_suite_notebook_runs_on_real_data(source, real_data):
    wanted = notebooks.full_settings(source)["dataset"]
    if isinstance(wanted, str) and lacks(wanted, real_data):
        # The user named a folder without this data set: that is said before a kernel starts, and no phantom is used.
        with pytest.raises(DataNotFound, match=f"does not hold {wanted}"):
            notebooks.run(source, data=real_data, run_name="real-test", progress=False)
        return
    done = notebooks.run(source, data=real_data, run_name="real-test", progress=False)
    assert not done.error, done.error
    need_complete(done.folder, notebooks.read(done.executed), synthetic=False)
