"""Copy a section: each of every notebook runs in a notebook that has only the opening cells.

The run folder of a finished run is at hand, as for people who copy a section. A new kernel for each
section would import torch as many times, so run_sections.py executes the opening cells once and
forks. Like a kernel each child knows no name, module or cached object of another section.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import kaggle_tree
import pytest

from tools import notebooks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Windows lacks")

RUNNER = Path(__file__).with_name("run_sections.py")
TINY = {"epochs": 1, "bootstrap_draws": 20}
ATTACKS = {"attacks": ("fgsm", "pgd_ce", "pgd_margin"), "eps_grid": (4 / 255,), "check_images": 2}
ATTACKS |= {"zoo": (), "maps": 2}
SEARCH = {"trials": 2, "extend": 0, "patience": 1, "per_class": 30}
EMPTY = {  # settings that make what needs no training quick
    "01": dict(adversarial=("pgd_at",), one_pixel_per_class=1, certified_per_class=1, per_class=24),
    "02": ATTACKS | {"per_class": 30},
    "03": ATTACKS | {"per_class": (30, 15), "external_attacked": 4},
    "04": dict(mobilenet_epochs=1, per_class=24, severities=(1, 5), map_images=4, choose_images=4),
    "05": dict(epochs=2, images=12, width=0.25, channels=16, size=64),
    "06": SEARCH | dict(search_epochs=1, search_patience=1, quick_epochs=1),
    "07": SEARCH | dict(tuning_epochs=1, baseline_epochs=1, audit_images=20),
}
EMPTY["01"] |= {name: ATTACKS[name] for name in ("attacks", "eps_grid", "check_images")}
ASKED = re.compile(r"run the section '(.+?)' first; in a notebook of your own, copy that section")


def run_sections(opening, sections, folder, environment, cwd, *, untrained=False):
    """What each section did alone: {title: {"error", "output"}}."""
    work, results = folder / "work.json", folder / "results.json"
    plan = {"opening": opening, "sections": sections, "untrained": untrained}
    work.write_text(json.dumps(plan))
    # One thread: those of OpenMP do not live on in a forked process, which would wait for ever.
    own = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "IPYTHONDIR": str(folder / "ipython")}
    command = [sys.executable, "-P", str(RUNNER), str(work), str(results)]
    how = dict(cwd=cwd, env={**environment, **own}, capture_output=True, text=True, timeout=600)
    done = subprocess.run(command, check=False, **how)
    told = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, f"the opening cells failed:\n{told}"
    return json.loads(results.read_text())


def trained(run_dir):
    """The trainings of a run, with the time of their last epoch."""
    return {path: path.stat().st_mtime_ns for path in run_dir.rglob("last.pt")}


@pytest.mark.notebook
@pytest.mark.parametrize("source", notebooks.sources(), ids=lambda source: source.stem)
def test_every_section_runs_in_a_new_notebook(source, tmp_path, tmp_path_factory):
    run = kaggle_tree.finished(source, tmp_path_factory)
    assert not run.error, "the run that would be read back failed: see test_kaggle_tree.py"
    before, session = trained(run.run_dir), run.session
    opening, sections = notebooks.sections(session.at_home(notebooks.build(source)))
    where = session.process_environment, session.working
    done = run_sections(opening, sections, tmp_path, *where)
    failed = {title: one["error"] for title, one in done.items() if one["error"]}
    assert not failed, "\n".join(f"section {title!r}:\n{error}" for title, error in failed.items())
    after = trained(run.run_dir)  # a solution may train something new
    assert len(done) > 1 and {one: after[one] for one in before} == before, "trained again"
    assert sum("solution" in title for title in done) == 3
    assert not session.network, "without internet a section must not even ask for it"


@pytest.mark.notebook
@pytest.mark.parametrize("source", notebooks.sources(), ids=lambda source: source.stem)
def test_from_an_empty_run_a_section_runs_or_names_the_section_to_copy_as_well(source, tmp_path):
    opening, sections = notebooks.sections(notebooks.build(source))
    (place,) = [number for number, code in enumerate(opening) if "CHANGES = {}" in code]
    changes = TINY | EMPTY[source.stem[:2]]
    opening[place] = opening[place].replace("CHANGES = {}", f"CHANGES = {changes}")
    # Outside the repository, with the package installed; the last section first, so that none
    # finds what it builds on.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DLIA_")}
    kept |= {"PYTHONPATH": str(notebooks.REPOSITORY), "DLIA_RUNS": str(tmp_path / "runs")}
    kept |= {"DLIA_CACHE": os.environ["DLIA_CACHE"]}
    # Trainings are those of the run on Kaggle: here a section ends where it would begin one.
    parts = dict(reversed(sections.items()))
    done = run_sections(opening, parts, tmp_path, kept, tmp_path, untrained=True)
    alone = [title for title, section in done.items() if not section["error"]]
    for title, section in done.items():
        asked = ASKED.search(section["error"])
        told = f"section {title!r}:\n{section['error'][-1500:]}"
        assert title in alone or (asked and asked[1] in sections), told
    first = next(iter(sections))
    assert first in alone, f"the first section needs nothing: {done[first]['error'][-800:]}"
    assert len(alone) >= 2, f"only {alone} run by themselves"
