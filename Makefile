# make run    install the core and estimate a real model (about a minute the first time, then seconds)
# make demo   install the trainer, then plan, run, compare, calibrate and plan again on this machine; some three minutes
# make test   install the rest and pass all tests
# make check  lint only, seconds
# Windows: `py -m venv .venv`, then the pip and python lines below with .venv\Scripts in place of .venv/bin.

PYTHON ?= python3
PIP_FLAGS ?=
# Any other build of torch: make test TORCH='...' with what pip should install. Empty: no torch, and the tests that need it
# are skipped and counted.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check $(PIP_FLAGS)

.DEFAULT_GOAL := run
.PHONY: run demo test check lint types unit readme clean

run: $(VENV)/.core
	@$(BIN)/python -m planner estimate examples/llama3_70b.yaml

demo: $(VENV)/.trainer
	@rm -rf build/demo
	@$(BIN)/python -m reftrain demo --out build/demo

test: $(VENV)/.dev lint types unit

check: $(VENV)/.dev lint types

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

# Every console block of README.md, in a clean copy.
readme: $(VENV)/.core
	$(BIN)/python scripts/run_readme.py README.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Stamps: a second call starts at once, a change of pyproject.toml installs again.
$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: $(VENV)/.venv pyproject.toml
	@$(PIP) --editable .
	@touch $@

# torch first and alone, so that no other requirement widens its range.
$(VENV)/.torch: $(VENV)/.venv
	@$(if $(strip $(TORCH)),$(PIP) $(TORCH))
	@touch $@

$(VENV)/.trainer: $(VENV)/.core $(VENV)/.torch pyproject.toml
	@$(PIP) --editable '.[reftrain]'
	@touch $@

$(VENV)/.dev: $(VENV)/.core $(VENV)/.torch pyproject.toml
	@$(PIP) --editable '.[dev]'
	@touch $@
