# Each target makes or updates .venv by itself; that costs nothing when nothing changed.
#   make demo        the tiny world, start to finish        make test       unit and integration tests
#   make lint        ruff                                   make test-all   the slow ones too
#   make base        the tiny world's base model, anew      make docs       generated parts of docs/
#   make demo DEMO_ARGS="seed=2 output_dir=runs/demo2"      make test PYTEST_ARGS="-k dft -x"
#   make test-nightly   more online runs and faults         make PYTHON=python3.12 …

PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo base test test-slow test-all test-nightly lint format docs lock clean clean-venv

help:
	@sed -n '1,6s/^# *//p' Makefile

setup:
	@$(PYTHON) scripts/setup_env.py

demo: setup
	$(BIN)/verl-dft demo $(DEMO_ARGS)

# trains the tiny world's base model anew and ships it in recipes/tiny/base, about 3 minutes
base: setup
	$(BIN)/python scripts/make_base.py

# Tests share the cores, by file where they start trainings, but for those that must be alone; each part runs whatever
# those before it said.
PYTEST := $(BIN)/python -m pytest
parts = $(PYTEST) -m "$(1) and not integration"; first=$$?; \
	$(PYTEST) --dist=loadfile -m "$(1) and integration and not alone"; second=$$?; \
	$(PYTEST) -m "$(1) and integration and alone" && exit $$((first ? first : second))
tests = $(if $(PYTEST_ARGS),$(PYTEST) -m "$(1)" $(PYTEST_ARGS),$(call parts,$(1)))

test: setup
	@$(call tests,not slow)

test-slow: setup
	@$(call tests,slow and not nightly)

test-all: setup
	@$(call tests,not nightly)

test-nightly: setup
	$(PYTEST) -m nightly $(PYTEST_ARGS)

lint: setup
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: setup
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# the generated parts of docs/*.md
docs: setup
	$(BIN)/python scripts/make_docs.py

# resolves requirements/*.lock again from pyproject.toml; LOCK_ARGS=--upgrade takes newer versions
lock:
	$(PYTHON) scripts/lock.py $(LOCK_ARGS)

# caches and built wheels; what runs wrote (runs/) is yours and stays
clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

clean-venv: clean
	rm -rf .venv
