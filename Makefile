# Every command of the project. Each target sets itself up: nothing has to be done first.
#   make PYTHON=python3.12 test     another interpreter
#   make ARGS="-k units -x" test    more arguments for pytest

PYTHON ?= python3
VENV ?= .venv
OUT ?= quickstart-out
ARGS ?=
BIN := $(VENV)/bin
# A worker a core; the tests of a file stay together, for they share fits. ARGS="-n 0" is without.
PARALLEL := -n auto --dist loadfile
STAMP := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all lint format types contracts wheel bench clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The set-up is done again only after pyproject.toml or the pins have changed.
$(STAMP): pyproject.toml $(wildcard constraints/*.txt)
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "bayeslr needs Python 3.11 or later, and there is no '$(PYTHON)' on the PATH." >&2; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(or $(MAKECMDGOALS),test)" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "bayeslr needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) -c 'import platform; print(platform.python_version())')." >&2; \
	  echo "Install a newer one, or name it: make PYTHON=/path/to/python3.12 $(or $(MAKECMDGOALS),test)" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' lacks the venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $$($(PYTHON) --version) ..."; $(PYTHON) -m venv $(VENV); }
	@version=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  pins=constraints/python$$version.txt; constrain="-c $$pins"; \
	  if [ ! -f $$pins ]; then \
	    constrain=; \
	    echo "No pinned versions for Python $$version (there are: $$(cd constraints && echo *.txt)): taking the newest that fit."; \
	  fi; \
	  echo "Installing into $(VENV) (minutes the first time) ..."; \
	  $(BIN)/python -m pip install -qq "pip>=25.1" && \
	  $(BIN)/python -m pip install -qq $$constrain --editable ".[runners,postgres,slurm]" --group dev
	@touch $@

setup: $(STAMP)  ## Make .venv and install everything into it (the other targets do it themselves)

quickstart: $(STAMP)  ## Train proxies here, predict a larger one, check it, write report.html (about 5 minutes)
	@$(BIN)/bayeslr quickstart --out $(OUT)

test: $(STAMP)  ## The default tests (about 6 minutes on two cores)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-all: $(STAMP)  ## Everything: also the slow tests, calibration and the notebooks
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu" $(ARGS)

lint: $(STAMP)  ## Ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP)  ## Let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP)  ## Mypy, strict
	$(BIN)/mypy

contracts: $(STAMP)  ## The import contracts between the layers
	$(BIN)/lint-imports

wheel: $(STAMP)  ## Source distribution and wheel, into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist

bench: $(STAMP)  ## The speed benchmarks, with a table of timings
	$(BIN)/python -m pytest benchmarks --benchmark-only --timeout 1800 -m "not gpu" $(ARGS)

clean:  ## Remove what was made here, the environment included
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks
