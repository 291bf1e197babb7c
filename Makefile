# make demo, make test, make lint: each does all of its own set-up, in $(VENV); make bench also in $(BENCH_VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := artifacts/smollm2-135m-instruct-int8
READY := $(VENV)/.ready
BENCH_VENV ?= .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready

.PHONY: demo test lint bench

demo: $(DEMO)/manifest.json
	$(BIN)/python cli.py run $(DEMO) --chat --prompt "What is the capital of France?" --max-tokens 64

$(DEMO)/manifest.json: | $(READY)
	$(BIN)/python cli.py export --buckets 64,128,512 --output $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/types $(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) $(BENCH_READY)
	$(BIN)/python benchmarks/headline.py
	$(BIN)/python benchmarks/three_mistakes.py
	$(BENCH_VENV)/bin/python benchmarks/peers/bench.py --precast-python $(BIN)/python $(BENCH_ARGS)

$(READY): pyproject.toml setup.py constraints.txt $(wildcard kernels/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export,dev]'
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/precast  # mypy sees the folders as the package
	touch $@

# The peers: about 6 GB of packages, and ten minutes of compiling llama.cpp for this processor.
$(BENCH_READY): benchmarks/peers-requirements.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(BENCH_VENV)/bin/python -m pip install --quiet --requirement $<
	touch $@
