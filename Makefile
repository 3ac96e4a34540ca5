# Each target makes its own virtual environment (.venv) and installs everything into it, once.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check lint format docs install clean

help:
	@echo 'make demo       the whole journey on a real model and real text   ARGS="--results r.json --fast ..."'
	@echo 'make test       the test suite                                    ARGS="-k prompt_file"'
	@echo 'make test-slow  the tests that need the real model or minutes'
	@echo 'make check      lint, and the tests of what changed'
	@echo 'make lint       ruff, ruff format --check, mypy --strict, import-linter'
	@echo 'make format     ruff format and the fixes that ruff makes by itself'
	@echo 'make docs       fill the tables of the reference pages from the code'
	@echo 'make install    only the virtual environment'
	@echo 'make clean      remove the virtual environment and every cache'
	@echo 'PYTHON=python3.12 picks the interpreter (3.11 or later).'

demo: $(STAMP)
	$(BIN)/post demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Exit status 5 means that no test was selected, which is no failure here.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout=1800 $(ARGS) || [ $$? -eq 5 ]

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $$($(BIN)/python tests/changed.py) $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(STAMP)
	$(BIN)/python docs/tables.py

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'POST needs Python 3.11 or later, and "$(PYTHON)" is older or missing: make ... PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo '"$(PYTHON)" can make no virtual environment (Debian, Ubuntu: apt-get install python3-venv).' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find server client shared tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
