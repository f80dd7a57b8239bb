"""Notebooks: the machinery on a tiny notebook, then every notebook of the suite, checked and executed."""

import json
import subprocess
import sys

import matplotlib.image
import nbformat
import pandas as pd
import pytest

from dlia_utils import __version__, notebooks

TINY = """\
# %% [markdown]
# # A tiny notebook

# %% tags=["bootstrap"]

# %% tags=["parameters"]
PROFILE = "auto"
DATA_DIR = ""
RUN_NAME = ""
RESUME = True

# %% tags=["config"]
print("profile", PROFILE)

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
    assert [len(cell.outputs) for cell in code] == [1, 1, 1, 1, 0]
    assert code[3].outputs[0].text == "output 4\n"
    assert "source_hash" not in code[4].metadata


def test_pick_takes_numbers_and_names_and_refuses_others(tiny):
    folder = tiny.parent.parent
    for names in ([], ["7"], ["07"], ["07_tiny"], ["notebooks/07_tiny.ipynb"]):
        assert notebooks.pick(names, folder) == [tiny]
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
        ('tags=["bootstrap"]', "", "code cell 1 must be tagged 'bootstrap'"),
        ('tags=["imports"]', "", "code cell 4 must be tagged 'imports'"),
        ('PROFILE = "auto"', 'PROFILE = "auto".lower()', "must assign literals"),
        ("RESUME = True", "RESUME = True\nEXTRA = 1", "must assign literals"),
        ("RESUME = True", "RESUME = True  # True = go on", "papermill cannot read"),
        ('print("profile", PROFILE)', "PROFILE", "must print the resolved configuration"),
        ("value = 6 * 7", "value = 6 *", "is not plain Python"),
        ("value = 6 * 7", "%matplotlib inline", "is not plain Python"),
        ("value = 6 * 7", "value = 1\n" * 41, "at most 40"),
        ("value = 6 * 7", 'value = "cuda:0"', "use config.device"),
        ("value = 6 * 7", 'value = sys.path("/kaggle/input/x")', "absolute path '/kaggle/'"),
        ("value = 6 * 7", 'value = "/home/me/data"', "absolute path '/home/'"),
        ("value = 6 * 7", "value = other", "'1 A section' does not run alone after the opening cells: other"),
        ("value = 6 * 7", "value = 6 * 8", "code changed since it was executed"),
    ],
)
def test_faults_of_a_source_are_found(tiny_fresh, before, after, fault):
    tiny_fresh.write_text(TINY.replace(before, after))
    notebooks.write(notebooks.build(tiny_fresh), notebooks.product(tiny_fresh))
    assert any(fault in problem for problem in notebooks.check(tiny_fresh)), notebooks.check(tiny_fresh)


def test_a_name_of_another_section_is_found_inside_functions_too(tiny_fresh):
    more = "\n# %% [markdown]\n# ## 2 Next\n\n# %%\ndef f(x):\n    return [x + value for y in x]\n"
    tiny_fresh.write_text(TINY + more)
    notebooks.write(notebooks.build(tiny_fresh), notebooks.product(tiny_fresh))
    problems = notebooks.check(tiny_fresh)
    assert any("section '2 Next' does not run alone after the opening cells: value" in p for p in problems)


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("6 * 7", "6 * 9", "differs from src/07_tiny.py"),
        ("output 5", "saved in /home/me/run", "shows a path of the machine"),
        ("output 5", "\\n" * 101, "more than 100 lines"),
        ('"execution_count": 5', '"execution_count": 9', "from top to bottom"),
        ('"kernelspec"', '"widgets": {}, "kernelspec"', "metadata 'widgets'"),
        ("output 5", "x" * 1_000_001, "is over 1 MB"),
    ],
)
def test_faults_of_a_committed_notebook_are_found(tiny_fresh, before, after, fault):
    edit(tiny_fresh, before, after)
    assert any(fault in problem for problem in notebooks.check(tiny_fresh)), notebooks.check(tiny_fresh)


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
        output("stream", name="stdout", text=f"{notebooks.REPOSITORY}/runs/a and {sys.prefix}/lib\n"),
        output("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}),
        output("execute_result", data={"text/plain": "42"}, execution_count=1),
    ]
    cleaned = notebooks.clean(notebook)
    assert set(cleaned.metadata) == {"kernelspec", "language_info"} and not cleaned.cells[-1].metadata
    texts = [one.get("text") or one.data["text/plain"] for one in cleaned.cells[-1].outputs]
    assert texts == ["red\nruns/a and <python>/lib\n", "42"]
    assert nbformat.writes(notebooks.clean(cleaned)) == nbformat.writes(cleaned)


# ------------------------------------------------------------------------------------------------- execution


def test_refresh_executes_cleans_and_passes_its_own_checks(tiny, monkeypatch):
    monkeypatch.setenv("DLIA_DATA", "somewhere")
    path = notebooks.refresh(tiny, progress=False)
    assert notebooks.check(tiny) == []
    cells = notebooks.read(path).cells
    assert cells[1].outputs[0].text == "dlia_utils tiny from the repository\n"
    assert [one.get("text") or one.data["text/plain"] for one in cells[-1].outputs] == ["done\n", "42"]
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
    shown = 'import os; print(PROFILE, os.environ["DLIA_DATA"], "GLIBC_TUNABLES" in os.environ)'
    tiny.write_text(TINY.replace('print("profile", PROFILE)', shown).replace("6 * 7", "6 / 0"))
    notebooks.write(notebooks.build(tiny), notebooks.product(tiny))
    with pytest.raises(PapermillExecutionError) as failure:
        parameters = {"PROFILE": "cpu"}
        notebooks.execute(notebooks.product(tiny), "out/x.ipynb", parameters=parameters, progress=False)
    text = notebooks.failure_text(failure.value)
    assert "value = 6 / 0" in text and "ZeroDivisionError" in text and "\x1b" not in text
    config = next(c for c in notebooks.read("out/x.ipynb").cells if "config" in c.metadata.get("tags", []))
    assert config.outputs[0].text == f"cpu {tmp_path / 'relative'} True\n"


# ------------------------------------------------------------------------------------------------- bootstrap


def wheel(folder, name, version, code):
    """A file that imports like a pure wheel: a zip archive holding a package."""
    import zipfile

    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", code)


def run_bootstrap(kaggle, cwd, after=""):
    """The bootstrap cell in a Python without any installed package: exit status, last line of its output."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", notebooks.BOOTSTRAP + "\n" + after],
        cwd=cwd, env={"DLIA_KAGGLE_ROOT": str(kaggle)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1]


LAYOUTS = ("input/{}", "input/datasets/me/{}", "input/datasets/organizations/us/{}", "input/notebooks/me/{}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["folder", "wheel"])
def test_bootstrap_finds_kaggle_mounts(tmp_path, layout, kind):
    mount = tmp_path / "kaggle" / layout.format("dlia-utils")
    (tmp_path / "kaggle" / "input" / "other" / "train").mkdir(parents=True)
    if kind == "wheel":
        wheel(mount, "dlia_utils", "0.3", "__version__ = '0.3'")
    else:
        (mount / "dlia_utils").mkdir(parents=True)
        (mount / "dlia_utils" / "__init__.py").write_text("__version__ = '0.3'")
    assert run_bootstrap(tmp_path / "kaggle", tmp_path) == (0, "dlia_utils 0.3 from Kaggle input dlia-utils")


def test_bootstrap_prefers_the_repository_and_takes_captum_from_its_wheel(tmp_path):
    (tmp_path / "clone" / "dlia_utils").mkdir(parents=True)
    (tmp_path / "clone" / "dlia_utils" / "__init__.py").write_text("__version__ = '9'")
    (tmp_path / "clone" / "notebooks").mkdir()
    wheel(tmp_path / "kaggle" / "input" / "wheels", "dlia_utils", "0.3", "__version__ = '0.3'")
    wheel(tmp_path / "kaggle" / "input" / "wheels", "captum", "0.9", "LOCAL = True")
    after = (
        "import captum; print(dlia_utils.__version__, captum.LOCAL, os.getenv('NO_ALBUMENTATIONS_UPDATE'))"
    )
    assert run_bootstrap(tmp_path / "kaggle", tmp_path / "clone" / "notebooks", after) == (0, "9 True 1")


def test_bootstrap_finds_a_utility_script_or_names_the_two_clicks(tmp_path):
    code, message = run_bootstrap(tmp_path / "kaggle", tmp_path)
    assert code == 1 and "'Add Input', then '+'" in message
    package = tmp_path / "kaggle" / "usr" / "lib" / "notebooks" / "me" / "ours" / "dlia_utils"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.3'")
    assert run_bootstrap(tmp_path / "kaggle", tmp_path) == (
        0,
        "dlia_utils 0.3 from Kaggle utility script ours",
    )


def test_bootstrap_cell_is_short_and_finds_this_repository():
    assert len(notebooks.BOOTSTRAP.splitlines()) <= notebooks.MAX_CODE_LINES
    found = run_bootstrap(notebooks.REPOSITORY / "no-kaggle", notebooks.REPOSITORY / "tests")
    assert found == (0, f"dlia_utils {__version__} from the repository")


# ------------------------------------------------------------------------------------- the suite's notebooks

SUITE = pytest.mark.parametrize("source", notebooks.find(), ids=lambda source: source.stem)


@SUITE
def test_suite_notebook_has_no_static_fault(source):
    assert notebooks.check(source) == []


def test_suite_has_no_notebook_without_source():
    assert notebooks.orphans() == []


@SUITE
def test_suite_notebook_shows_synthetic_outputs(source):
    assert "SYNTHETIC" in notebooks.product(source).read_text(), "outputs must come from synthetic images"


@pytest.mark.notebook
@SUITE
def test_suite_notebook_runs_on_synthetic_data(source, monkeypatch):
    monkeypatch.delenv("DLIA_DATA", raising=False)
    complete(notebooks.run(source, run_name="synthetic-test", progress=False), synthetic=True)


@pytest.mark.notebook
@pytest.mark.real
@SUITE
def test_suite_notebook_runs_on_real_data(source, real_data):
    complete(notebooks.run(source, data=real_data, run_name="real-test", progress=False), synthetic=False)


def complete(run, *, synthetic):
    """A run left everything that the design promises, and nothing in it is empty."""
    assert not run.error, run.error
    executed = notebooks.read(run.executed)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    results = pd.read_csv(run.folder / "results.csv")
    assert len(results) and results["value"].notna().all()
    assert results["profile"].eq("smoke").all()
    assert results["data"].str.contains("SYNTHETIC").all() == synthetic
    assert json.loads((run.folder / "config.json").read_text())["profile"] == "smoke"
    assert json.loads((run.folder / "env.json").read_text())["torch"]
    figures = sorted((run.folder / "figures").glob("*.png"))
    assert figures
    for figure in figures:
        assert matplotlib.image.imread(figure)[..., :3].std() > 0.01, f"{figure.name} is blank"
