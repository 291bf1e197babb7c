# make demo, make test, make lint: each does all of its own set-up, in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := artifacts/smollm2-135m-instruct-float32
READY := $(VENV)/.ready

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

bench: $(READY)
	$(BIN)/python benchmarks/headline.py
	$(BIN)/python benchmarks/three_mistakes.py

$(READY): pyproject.toml setup.py constraints.txt $(wildcard kernels/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[export,dev]'
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/precast  # mypy sees the folders as the package
	touch $@

