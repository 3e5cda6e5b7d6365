# Each target works alone on a fresh machine: it makes the virtual environment, then does its job.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TORCH := torch==2.13.0
TRITON := triton==3.7.1
TRANSFORMERS := transformers==5.23.0
# Two test processes on two cores: more threads each would only take turns.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
WORKERS ?= 2

.PHONY: demo test lint bench doctor clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m aiter_inductor bench

doctor: $(STAMP)
	$(BIN)/python -m aiter_inductor doctor

# torch comes first, so that nothing else chooses its version; Triton's version is the one that
# this torch is built for.
$(STAMP): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq '$(TORCH)'
	$(BIN)/python -m pip install -qq '$(TRITON)'
	$(BIN)/python -m pip install -qq '$(TRANSFORMERS)' -e '.[test,lint,cross]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
