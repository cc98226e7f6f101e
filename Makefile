# Two commands: `make demo` and `make test`. Both set up .venv first (once).
PYTHON ?= python3
BIN := .venv/bin
CORE := src/unift

.PHONY: setup demo test slow lint types clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/unift train

test: setup
	$(BIN)/python -m pytest -q -rs -m "not slow and not gpu and not dist and not vllm"

slow: setup
	$(BIN)/python -m pytest -q -rs -m slow

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/pyright

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
