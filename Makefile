# One virtual environment, made by the first target that needs it and refreshed when pyproject.toml changes.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test fuzz soak check docs format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("separable needs Python 3.11 or newer, %s is %s; set PYTHON=" % (sys.executable, sys.version.split()[0]) if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || ($(PYTHON) -m pip install virtualenv && $(PYTHON) -m virtualenv $(VENV))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

setup: $(READY)  ## make the environment with everything in it

demo: $(READY)  ## the whole story on real data: train, compare, plot
	$(BIN)/separable demo

test: $(READY)  ## all tests, with coverage
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --cov --cov-report=term:skip-covered

fuzz: $(READY)  ## 500 random networks through the runtime, against eager
	PYTHONPATH=. $(BIN)/python -m tests.runtime.fuzz --networks 500

soak: $(READY)  ## 100,000 calls of compiled models: right, and memory stays flat
	PYTHONPATH=. $(BIN)/python -m tests.runtime.soak --calls 100000

check: $(READY)  ## lint, types, and which room imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(READY)  ## the documentation site in site/, every warning and broken link an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY)  ## rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the other targets made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov build dist site demo
