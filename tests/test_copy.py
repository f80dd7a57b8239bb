"""Copy a section: every `## ` section of every notebook runs in a new notebook that has only the opening cells.

The run folder of a finished run is at hand, as it is for people who copy a section: trained models and tables are
read back. A new kernel for each section would import torch as many times, so run_sections.py executes the opening
cells once and forks: each child is a process that has run these cells and nothing else, in IPython, with `display`.
Like a kernel it knows no name, module or cached object of another section, and a crash stays its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import kaggle_tree
import nbformat
import pytest

from tools import notebooks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Windows lacks")

RUNNER = Path(__file__).with_name("run_sections.py")


def run_sections(notebook, folder, *, environment, cwd):
    """What each section of `notebook` did alone: {title: {"error", "seconds", "output"}}."""
    opening, sections = notebooks.sections(notebook)
    return run_cells(opening, sections, folder, environment=environment, cwd=cwd)


def run_cells(opening, sections, folder, *, environment, cwd):
    work, results = folder / "work.json", folder / "results.json"
    work.write_text(json.dumps({"opening": opening, "sections": sections}))
    # One thread: those of OpenMP do not live on in a forked process, which would wait for them for ever.
    environment = {
        **environment,
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "IPYTHONDIR": str(folder / "ipython"),
    }
    done = subprocess.run(
        [sys.executable, "-P", str(RUNNER), str(work), str(results)],
        timeout=600,
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (
        f"the opening cells failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return json.loads(results.read_text())


def trained(run_dir):
    """The trainings of a run, with the time of their last epoch; best.pt is written anew when a run is read back."""
    return {
        path.relative_to(run_dir).as_posix(): path.stat().st_mtime_ns
        for path in run_dir.rglob("last.pt")
    }


@pytest.mark.notebook
@pytest.mark.parametrize("source", notebooks.sources(), ids=lambda source: source.stem)
def test_every_section_runs_in_a_new_notebook(source, tmp_path, tmp_path_factory):
    run = kaggle_tree.finished(source, tmp_path_factory)
    assert not run.error, (
        "the run that the sections would read back failed: see test_kaggle_tree.py"
    )
    before = trained(run.run_dir)
    environment, working = run.session.process_environment, run.session.working
    notebook = run.session.at_home(notebooks.build(source))
    done = run_sections(notebook, tmp_path, environment=environment, cwd=working)
    failed = {title: section for title, section in done.items() if section["error"]}
    assert not failed, "\n".join(
        f"section {t!r}:\n{s['output'][-1500:]}\n{s['error']}" for t, s in failed.items()
    )
    assert len(done) > 1 and trained(run.run_dir) == before, (
        "a section trained a finished model again"
    )
    assert not run.session.network, "without internet a section must not even ask for it"


# -------------------------------------------------------------------------------- without a finished run at hand

TINY = {"epochs": 1, "bootstrap_draws": 20}
ATTACKS = {"attacks": ("fgsm", "pgd_ce", "pgd_margin"), "eps_grid": (4 / 255,), "check_films": 2}
SEARCH = {"trials": 2, "extend": 0, "patience": 1}
EMPTY = {  # settings that make the training sections quick
    "01": TINY
    | ATTACKS
    | {
        "adversarial": ("pgd_at",),
        "one_pixel_per_class": 1,
        "certified_per_class": 1,
        "per_class": 24,
    },
    "02": TINY | ATTACKS | {"zoo": (), "per_class": 30, "maps": 2},
    "03": TINY | ATTACKS | {"zoo": (), "per_class": (40, 20), "maps": 2},
    "04": TINY
    | {
        "mobilenet_epochs": 1,
        "per_class": 24,
        "severities": (1, 5),
        "map_films": 4,
        "choose_films": 4,
    },
    "05": TINY | {"epochs": 2, "images": 12, "width": 0.25, "channels": 16, "size": 64},
    "06": TINY
    | SEARCH
    | {"search_epochs": 1, "search_patience": 1, "quick_epochs": 1, "per_class": 30},
    "07": TINY
    | SEARCH
    | {"tuning_epochs": 1, "baseline_epochs": 1, "per_class": 30, "audit_films": 20},
}
ASKED = re.compile(
    r"run the section '(.+?)' first; in a notebook of your own, copy that section as well"
)


@pytest.mark.notebook
@pytest.mark.parametrize("source", notebooks.sources(), ids=lambda source: source.stem)
def test_from_an_empty_run_a_section_runs_or_names_the_section_to_copy_as_well(source, tmp_path):
    notebook = notebooks.build(source)
    opening, sections = notebooks.sections(notebook)
    (place,) = [number for number, code in enumerate(opening) if "CHANGES = {}" in code]
    opening[place] = opening[place].replace("CHANGES = {}", f"CHANGES = {EMPTY[source.stem[:2]]}")
    # Outside the repository, with the package installed; the last section first, so that none finds what it builds on.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("DLIA_")
    }
    environment |= {"PYTHONPATH": str(notebooks.REPOSITORY), "DLIA_RUNS": str(tmp_path / "runs")}
    environment |= {"DLIA_CACHE": os.environ["DLIA_CACHE"]}
    done = run_cells(
        opening, dict(reversed(sections.items())), tmp_path, environment=environment, cwd=tmp_path
    )
    alone = [title for title, section in done.items() if not section["error"]]
    for title, section in done.items():
        asked = ASKED.search(section["error"])
        assert title in alone or (asked and asked[1] in sections), (
            f"section {title!r}:\n{section['error'][-1500:]}"
        )
    first = next(iter(sections))
    assert first in alone, f"the first section needs nothing: {done[first]['error'][-800:]}"
    assert len(alone) >= 2, f"only {alone} run by themselves"


# ------------------------------------------------------------------------------------------ the runner itself


@pytest.fixture
def tiny():
    def cell(code, *tags):
        return nbformat.v4.new_code_cell(code, metadata={"tags": list(tags)})

    def head(title):
        return nbformat.v4.new_markdown_cell(f"## {title}\n\nSome prose.")

    parts = [
        cell("import os", "bootstrap"),
        cell("N = 2", "parameters"),
        cell("print(N)", "start"),
        cell("import sys\nsys.cached = []", "imports"),
        head("fine"),
        cell("value = N + 1"),
        cell("sys.cached.append(1)\nimport colorsys\ndisplay(value)"),
        head("again"),
        cell("'value' in globals(), sys.cached, 'colorsys' in sys.modules"),
        head("needs fine"),
        cell("x = 1\nvalue + x"),
        cell("print('never')"),
        head("dies"),
        cell("print('before', flush=True)\nos.kill(os.getpid(), 9)"),
        head("leaves"),
        cell("sys.exit(0)"),
    ]
    return nbformat.v4.new_notebook(cells=parts)


def test_sections_see_the_opening_cells_and_nothing_of_each_other(tiny, tmp_path):
    done = run_sections(tiny, tmp_path, environment=os.environ, cwd=tmp_path)
    assert list(done) == ["fine", "again", "needs fine", "dies", "leaves"]
    assert not done["fine"]["error"] and not done["again"]["error"]
    assert done["fine"]["output"] == "3\n"
    assert done["again"]["output"].endswith("(False, [], False)\n")


def test_a_section_that_fails_is_told_with_its_reason(tiny, tmp_path):
    done = run_sections(tiny, tmp_path, environment=os.environ, cwd=tmp_path)
    assert "NameError: name 'value' is not defined" in done["needs fine"]["error"]
    assert "never" not in done["needs fine"]["output"]
    assert "status -9" in done["dies"]["error"] and "before" in done["dies"]["output"]
    assert "SystemExit" in done["leaves"]["error"]


def test_a_failing_opening_cell_is_an_error(tiny, tmp_path):
    tiny.cells[1].source = "N = 1 / 0"
    with pytest.raises(AssertionError, match="the opening cells failed(.|\n)*ZeroDivisionError"):
        run_sections(tiny, tmp_path, environment=os.environ, cwd=tmp_path)
