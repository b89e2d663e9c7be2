# Two commands are all a newcomer needs: `make demo` and `make test`. Each creates what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers

.PHONY: demo test lint evidence evidence-check bench readme readme-check faults fuzz clean help

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

$(PEERS)/.done: benchmarks/peers.txt pyproject.toml
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement benchmarks/peers.txt
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

bench: $(PEERS)/.done  ## install the peers beside, then measure speed against them and write docs/benchmarks.md (about 50 minutes)
	OMP_NUM_THREADS=1 $(PEERS)/bin/python benchmarks/run_all.py

faults: $(VENV)/.dev  ## kill runs at random moments, 50 times a kind, fill disks, and every other slow test (about an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m slow -ra -s

fuzz: $(VENV)/.dev  ## thousands of altered recipes, stores, checkpoints, logs and data files (slow)
	LIMBECK_FUZZ=3000 $(BIN)/python -m pytest tests/test_fuzz_*.py -n 2

clean:  ## remove the environment and build products
	rm -rf $(VENV) $(PEERS) build dist .pytest_cache .ruff_cache
