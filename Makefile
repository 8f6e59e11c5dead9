# `make demo` and `make test` do all the set-up they need; everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready

.PHONY: setup demo test test-all lint bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/signround-edge demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto -m "not full"

test-all: $(STAMP)
	$(BIN)/python -m pytest -n auto

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  # all peers on the shipped tiny model, half an hour; other models: benchmarks/reproduce.sh
	$(BIN)/python -m benchmarks.run --again
	$(BIN)/python -m benchmarks.table

clean:
	rm -rf .venv build dist *.egg-info
