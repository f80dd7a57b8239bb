# Two commands do everything, set-up included:  make run   and   make test
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NB      =
DATA    =
DATASET =
SET     =
PROFILE = smoke

# The environment is made anew when what it must contain changes.
STAMP := $(VENV)/.installed-$(shell cat requirements.txt requirements-dev.txt constraints.txt | cksum | cut -d' ' -f1)

# The peer libraries want old packages: they get an environment of their own that sees ours behind it.
BENCH := $(VENV)/bench
SITE  := import sysconfig; print(sysconfig.get_path("purelib"))

# PyTorch on CPU returns its large buffers to the system after every operation; keeping them is 2 to 5 times faster.
# More than 1 GB at the end of the heap goes back at once, the rest by device.release_memory.
export GLIBC_TUNABLES := glibc.malloc.mmap_max=0:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=1073741824
# A thread that waits for another spins for microseconds, then sleeps: for ever spinning ones cost up to ten times the
# work itself on a busy machine, and sleeping at once costs a third on a quiet one.
export GOMP_SPINCOUNT := 10000
export NO_ALBUMENTATIONS_UPDATE := 1
ifneq ($(strip $(DATA)),)
export DLIA_DATA := $(DATA)
endif

.DEFAULT_GOAL := help
.PHONY: help run lab test notebooks bench clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1	/' | expand -t 20
	@echo
	@echo '  NB="01 04"   which notebooks (all)      DATA=path      the folder that holds the real data sets'
	@echo '  DATASET=     for notebook 04: the data set to run on, e.g. covid or a MedMNIST name'
	@echo '  SET="epochs=5 lr=3e-4"  settings of the notebook, changed'
	@echo '  PROFILE=     smoke, cpu, full or auto   PYTHON=        the Python that makes .venv (python3)'

run: $(STAMP)  ## execute the notebooks, print the results; NB=01 DATA=path SET="epochs=5" PROFILE=full
	$(BIN)/python -m dlia_utils run --profile "$(PROFILE)" $(if $(strip $(NB)),--nb $(NB)) $(if $(strip $(DATASET)),--dataset $(DATASET)) $(if $(strip $(SET)),--set $(foreach pair,$(SET),'$(pair)'))

lab: $(STAMP)  ## open the notebooks in JupyterLab
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[lab]'
	$(BIN)/python -m jupyter lab notebooks

test: $(STAMP)  ## lint, static notebook checks, unit tests, every notebook executed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check --quiet .
	$(BIN)/python -m tools check
	@date '+tests began %T'
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope --durations=40 --cov --cov-report=term:skip-covered
	@date '+tests ended %T'

notebooks: $(STAMP)  ## rebuild the committed notebooks from notebooks/src, with fresh smoke outputs; NB=01
	$(BIN)/python -m tools refresh $(NB)

bench: $(STAMP)  ## measure speed against bare PyTorch and peer libraries
	$(PYTHON) -m venv $(BENCH)
	$(BIN)/python -c '$(SITE)' > "$$($(BENCH)/bin/python -c '$(SITE)')/main.pth"
	$(BENCH)/bin/python -m pip install --disable-pip-version-check -q --no-warn-conflicts -r benchmarks/requirements.txt
	$(BENCH)/bin/python benchmarks/run.py
	$(BENCH)/bin/python benchmarks/detection.py
	$(BENCH)/bin/python benchmarks/corruptions.py
	$(BENCH)/bin/python benchmarks/explain.py
	$(BENCH)/bin/python benchmarks/attacks.py
	$(BENCH)/bin/python benchmarks/suite.py
	$(BENCH)/bin/python benchmarks/passes.py
	$(BENCH)/bin/python benchmarks/threads.py
	$(BENCH)/bin/python benchmarks/memory.py

clean:  ## remove .venv and caches (runs/ and data/ stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	touch $@
