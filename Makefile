# `make` alone lists the targets. PYTHON names the interpreter of a new .venv: make demo PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Not compiled ahead: Python compiles what is imported, which is a small part of it, in half the time.
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile --constraint constraints.txt

# Processes that run tests. More than the machine has cores makes every test slower, and may end in a timeout.
WORKERS ?= 2

# Models as small as those of the tests are fastest on one thread, and only one thread repeats bit for bit.
test test-all: export OMP_NUM_THREADS ?= 1
# Empty is off: where bytecode is not kept, every program that a test starts compiles all libraries again.
test test-all: export PYTHONDONTWRITEBYTECODE =

.PHONY: help setup demo test test-all lint bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      install what is needed into $(VENV), then run the whole path on an embedded model into out/demo"
	@echo "make setup     the same installation, and the tools of those who change the code"
	@echo "make test      the tests, without the slow ones"
	@echo "make test-all  all tests"
	@echo "make lint      ruff on everything, mypy on the core"
	@echo "make bench     measure speed and memory into benchmarks/results, and print the table of retraining runs"
	@echo "make clean     remove caches and build results ($(VENV) and out stay)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; version = sys.version_info[:2]; sys.exit(0 if (3, 10) <= version <= (3, 13) else \
	  "hf_adaptive_sparse is tested on Python 3.10 to 3.13, and $(PYTHON) is Python %d.%d. Name another interpreter: " \
	  "make $(MAKECMDGOALS) PYTHON=python3.12" % version)'
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version, so that a CPU build which pip is shown is taken and no second torch is pulled.
# hatchling (with editables) is named, so that it too is a pinned version.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) torch==2.13.0 hatchling editables
	$(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

setup: $(VENV)/installed-dev

demo: $(VENV)/installed
	$(BIN)/hf-adaptive-sparse demo --output-dir out/demo --overwrite

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu"

test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/distillation_memory.py
	$(BIN)/python benchmarks/retraining.py --table

clean:
	rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
