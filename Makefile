# One command per task; each does its own set-up in .venv with the versions of constraints.txt.
# pip reads PIP_INDEX_URL and PIP_EXTRA_INDEX_URL itself: on a machine without a GPU, name
# PyTorch's CPU index there and the CPU build is taken; this file never names an index.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
WHEEL := dist/.ready
INSTALLED := dist/installed
SOURCES := $(shell find mpq_fx passes kernels -name '*.py')
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types imports wheel bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv with everything the other targets need

demo: $(READY) ## quantize three real models on this machine and write an HTML report
	$(BIN)/mpq demo

test: $(READY) ## run the tests (ARGS="-m slow" for the slow ones)
	$(BIN)/pytest --numprocesses auto --dist worksteal $(ARGS)

lint: $(READY) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(WHEEL) ## check types on the installed wheel
	cd $(INSTALLED) && ../../$(BIN)/pyright --pythonpath ../../$(BIN)/python

imports: $(WHEEL) ## check who may import whom on the installed wheel
	cd $(INSTALLED) && ../../$(BIN)/lint-imports --no-cache --config pyproject.toml

wheel: $(WHEEL) ## build the wheel into dist/

bench: $(READY) ## measure mpq against its peers (minutes; installs them)
	$(PIP) --editable '.[test,bench]'
	$(BIN)/mpq bench $(ARGS)

clean: ## remove what the other targets made
	rm -rf .venv build dist *.egg-info

# torch goes first and alone: its build is chosen before anything else asks for one.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[test]'
	touch $@

# build/ keeps files deleted from the sources, so every wheel starts without it.
$(WHEEL): $(READY) $(SOURCES)
	rm -rf build dist
	$(BIN)/pyproject-build --wheel
	$(BIN)/pip install --quiet --no-deps --target $(INSTALLED) dist/*.whl
	cp pyproject.toml $(INSTALLED)
	touch $@
