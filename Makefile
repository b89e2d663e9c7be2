# Two commands are all a newcomer needs: `make demo` and `make test`. Each creates what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint evidence evidence-check bench readme readme-check faults clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.core  ## install, then distil a digit classifier (under 90 seconds after installation)
	$(BIN)/limbeck run digits

test: $(VENV)/.dev  ## install, then the whole test suite
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/python -m pytest tests -n 2

lint: $(VENV)/.dev  ## ruff alone
	$(BIN)/ruff check src tests benchmarks

evidence: $(VENV)/.dev  ## make every method's evidence again (slow)
	$(BIN)/limbeck evidence
	$(BIN)/python docs/tables.py

evidence-check: $(VENV)/.dev  ## is the evidence sound and newer than the methods?
	$(BIN)/limbeck evidence --check

readme: $(VENV)/.dev  ## write the generated tables of README.md again
	$(BIN)/python docs/tables.py

bench: $(VENV)/.dev  ## speed against hand-written loops and peers (slow)
	$(BIN)/python benchmarks/run_all.py

faults: $(VENV)/.dev  ## kill runs at random moments, many times (slow)
	$(BIN)/python -m pytest tests -m slow

clean:  ## remove the environment and build products
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
