# `make run` and `make test` need Python 3.11 or newer and nothing else: they set up .venv first.
#   make run MODEL=smollm2 NOTEBOOKS="phase_1_loading" another model (bundled name, smollm2, folder, hub name), some notebooks
#   make run FULL=1                                    recompute the long results that ship with the project
#   make run PYTHON=/path/to/python3.12                which Python .venv is made of

VENV := .venv
RUN := $(VENV)/bin/python
# The stamp names what was installed and where: a changed pin or a moved folder sets up again, else nothing happens.
READY := $(VENV)/.ready-$(shell { cat requirements.txt constraints.txt pyproject.toml; pwd; } | cksum | tr -s ' \t' '-')
NOTEBOOK_FILES := $(wildcard notebooks/*.ipynb)

# Given on the command line; exported so that no character in a value is ever read by the shell.
export MODEL NOTEBOOKS PYTHON
export LENSLAB_CALLER := $(PWD)
unexport PYTHONHOME PYTHONSTARTUP

.PHONY: help setup run test test-all notebooks check-notebooks lint browser
.DEFAULT_GOAL := help

help:
	@echo "make run              set up .venv, run all notebooks in order, write outputs/index.html"
	@echo "make test             set up .venv, then ruff and all tests: unit, notebooks, browser"
	@echo "make test-all         the same, and every phase on small models of more families (minutes more)"
	@echo "make notebooks        build notebooks/*.ipynb from notebooks/interactive/*.py and execute them"
	@echo "make check-notebooks  their printed results: stable across machines, and sensitive to the model? (minutes)"
	@echo "make lint             ruff"
	@echo "options: MODEL=name-or-folder NOTEBOOKS=\"phase_1_loading ...\" FULL=1 PYTHON=python3.12"

setup: $(READY)

$(READY): requirements.txt constraints.txt pyproject.toml
	@found=; for python in "$$PYTHON" python3 python3.14 python3.13 python3.12 python3.11; do \
		test -n "$$python" || continue; \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 </dev/null && found=$$python && break; \
		test -z "$$PYTHON" || break; \
	done; \
	if test -z "$$found"; then \
		echo "No Python 3.11 or newer found ($${PYTHON:-looked for python3 to python3.14})."; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; \
	fi; \
	echo "Setting up $(VENV) (once; a few minutes) ..."; \
	"$$found" -m venv $(VENV) </dev/null || \
		{ echo "$$found could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@test -t 1 || quiet=--quiet; $(RUN) -m pip install $$quiet --no-input --disable-pip-version-check \
		-r requirements.txt -c constraints.txt </dev/null
	@$(RUN) -m pip install --quiet --no-input --disable-pip-version-check --no-deps --no-build-isolation -e . </dev/null
	@rm -f $(VENV)/.ready-*
	@touch $@

run: $(READY)
	@$(RUN) scripts/run_notebooks.py --model "$$MODEL" --notebooks "$$NOTEBOOKS" $(if $(filter-out 0,$(FULL)),--full)

notebooks: $(READY) browser
	@$(RUN) scripts/build_notebooks.py --record benchmarks/results/notebook_runs.json $$NOTEBOOKS

# One pytest call, so that its closing line speaks for all: unit and browser tests, then the notebooks' printed results.
# What is marked slow is left to test-all.
test: $(READY) lint browser
	@$(RUN) -m pytest $(SELECTED) --nbval --nbval-current-env --nbval-cell-timeout 600 tests $(NOTEBOOK_FILES) </dev/null

test-all: SELECTED := -m ""
test-all: test

check-notebooks: $(READY)
	@$(RUN) scripts/check_notebooks.py policy stability sensitivity --notebooks "$$NOTEBOOKS" \
		--record benchmarks/results/notebooks.json

lint: $(READY)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

# Chromium is wanted for pictures and browser tests. As root on a Debian-like system it is installed; elsewhere, and
# where that fails, those tests skip and say why.
browser:
	@scripts/ensure_chromium.sh </dev/null || true
