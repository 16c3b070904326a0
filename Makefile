# `make demo` and `make test` set everything up; a second run starts at once.
# Another Python: `make demo PYTHON=python3.12`.
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)
VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo notebooks test test-jax lint clean

demo: $(READY)
	$(BIN)/keras-vit train --data digits --out runs/demo --overwrite
	$(BIN)/keras-vit export runs/demo

# Executes the notebooks and stores them in place; some need KERAS_VIT_PRETRAINED or the network.
notebooks: $(READY)
	KERAS_BACKEND=tensorflow $(BIN)/python notebooks/execute.py

test: lint test-tensorflow test-jax

# What takes too long for every change: the published sizes whole, three of the notebooks, pairs of
# options of which each has a test.
.PHONY: test-slow
test-slow: $(READY)
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -m slow

# Three processes for two cores, as many tests wait; each takes whole files, in the order of
# tests/conftest.py.
IN_PARALLEL := --numprocesses 3 --dist loadfile --no-loadscope-reorder

.PHONY: test-tensorflow
test-tensorflow: $(READY)
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest $(IN_PARALLEL)

# The core alone: training and export are TensorFlow's. What one process compiles, the others read.
test-jax: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/$(VENV)/jax
test-jax: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
test-jax: $(READY)
	KERAS_BACKEND=jax $(BIN)/python -m pytest $(IN_PARALLEL) tests/core

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(READY): setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 found: install one, or name it with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { : Debian keeps venv in a package of its own; \
		$(PYTHON) -m pip install --quiet --target .virtualenv virtualenv && \
		PYTHONPATH=.virtualenv $(PYTHON) -m virtualenv --clear --quiet $(VENV); }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(READY)

# In turns with the peers, whose environments it makes first.
BENCHMARKS := speed tflite growth loading steady startup pipeline
.PHONY: bench
bench: $(READY)
	$(BIN)/python benchmarks/environments.py
	for name in $(BENCHMARKS); do echo "== $$name" && $(BIN)/python benchmarks/$$name.py || exit 1; done

# Whether all of it works. Two at a time, as no figures are taken.
QUICK_BENCHMARKS := $(BENCHMARKS:%=quick-%)
.PHONY: bench-quick $(QUICK_BENCHMARKS)
bench-quick: $(READY)
	$(BIN)/python benchmarks/environments.py
	$(MAKE) --jobs 2 $(QUICK_BENCHMARKS)

$(QUICK_BENCHMARKS): quick-%:
	$(BIN)/python benchmarks/$*.py --quick

clean:
	rm -rf $(VENV) .virtualenv benchmarks/.environments build dist *.egg-info
