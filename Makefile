# `make` lists what can be made. Environments live in .venv and are made again only when pyproject.toml or constraints.txt change.
#
# torch: on Linux the usual wheel is the CUDA build (gigabytes). To get the CPU build, name the index that has it:
#   make demo PIP_ARGS="--extra-index-url <index of torch's CPU wheels>"

PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= 2
OUT ?= build/tiny.moec
PROMPT ?= Once upon a time

VENV := .venv
RUN := PYTHONPATH=. $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
MODEL := examples/models/tiny-moe

.DEFAULT_GOAL := help
.PHONY: help demo test lint types pytest format clean

help: ## list what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

demo: $(VENV)/.demo ## compile the small model for this machine, run a prompt, compare size, speed and quality with the original
	$(RUN) -m benchmarks.demo $(MODEL) $(OUT) --prompt "$(PROMPT)"

test: lint types pytest ## ruff, mypy and the test-suite

lint: $(VENV)/.dev ## ruff
	$(VENV)/bin/ruff check .

types: $(VENV)/.dev ## mypy, strict, tests included
	$(VENV)/bin/mypy

pytest: $(VENV)/.dev ## the test-suite and the examples in docstrings
	$(RUN) -m pytest -n $(JOBS) -q

format: $(VENV)/.dev ## ruff's formatter and its safe fixes
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove the environment and what was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	rm -rf build/lib
	$(PIP) '.[compile,onnx]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	rm -rf build/lib
	$(PIP) '.[dev]'
	touch $@
