"""Every test session caches and runs in folders of its own; real images come only by DLIA_DATA."""

import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before anything imports albumentations

import torch

# The models of the unit tests are so small that threads cost more than they give.
torch.set_num_threads(1)

ALONE = "test_reader.py"  # each of its tests executes a notebook of its own
# Beside the notebooks.
LONG = ("test_detect_learns.py", "test_detect_folds.py", "test_detection_data.py")

_SCRATCH = Path(tempfile.mkdtemp(prefix="dlia-tests-"))


def pytest_configure(config):
    # A hook and no fixture: the doctests in dlia_utils/ do not see the fixtures of tests/.
    if not os.environ.get("PYTEST_XDIST_WORKER"):  # its processes share the phantoms of the session
        os.environ["DLIA_CACHE"] = str(_SCRATCH / "cache")
    os.environ["DLIA_RUNS"] = str(_SCRATCH / "runs")
    if os.environ.get("DLIA_DATA"):
        os.environ["DLIA_DATA"] = os.path.abspath(os.environ["DLIA_DATA"])
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # in the order below, not the largest files first
    if os.environ.get("PYTEST_XDIST_WORKER"):
        # As many processes as cores, so one thread each; the kernels of notebooks inherit it.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several processes (`make test`) a file's tests stay in one, as do all of a notebook.

    They share fixtures and finished runs, which another process would have to make again. (The
    marker xdist_group of xdist 3.8 is without effect in pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            if notebook := re.search(r"\[(\d\d_\w+)\]$", nodeid):
                return notebook[1]
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(ALONE) else file

    return Groups(config, log)


def pytest_collection_modifyitems(items):
    """What takes minutes goes first: else one process would end with it while others are idle."""
    items.sort(key=lambda item: not (item.path.name in LONG or item.get_closest_marker("notebook")))


def pytest_unconfigure(config):
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.fixture(autouse=True)
def same_draws():
    """Every test begins with the same random numbers, whichever tests its process ran before."""
    torch.manual_seed(0)


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    if not os.environ.get("DLIA_DATA"):
        pytest.skip("needs real radiographs: set DLIA_DATA to the folder that contains chest_xray/")
    return Path(os.environ["DLIA_DATA"])
