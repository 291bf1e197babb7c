# make demo, make test, make lint: each does all of its own set-up, in $(VENV); make bench also in $(BENCH_VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := artifacts/smollm2-135m-instruct-int8
READY := $(VENV)/.ready
BENCH_VENV ?= .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready
BENCH_PRECAST ?= .venv-bench-precast

.PHONY: demo test test-long lint bench fuzz kill interrupt

demo: $(DEMO)/manifest.json
	$(BIN)/python cli.py run $(DEMO) --chat --prompt "What is the capital of France?" --max-tokens 64

$(DEMO)/manifest.json: | $(READY)
	$(BIN)/python cli.py export --buckets 64,128,512 --output $(DEMO)

test: $(READY)
	$(BIN)/pytest $(PYTEST_ARGS)

# Half an hour more: sanitizers at every vector width, architectures at every combination of weights and cache.
test-long: $(READY)
	$(BIN)/pytest -m long $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/types $(BIN)/mypy
	$(BIN)/lint-imports

# 20,000 mutated artifacts; 200 kills; 130 interrupts. All say what they found, and how to see it again.
fuzz: $(READY)
	$(BIN)/python tests/fuzz/run.py --cases 20000 --seed 1 $(FUZZ_ARGS)

kill: $(READY)
	$(BIN)/python tests/fuzz/kill.py --kills 200 --seed 1 $(KILL_ARGS)

interrupt: $(READY)
	$(BIN)/python tests/fuzz/interrupt.py --tries 130 --seed 1 $(INTERRUPT_ARGS)

bench: $(READY) $(BENCH_READY)
	$(BIN)/python benchmarks/headline.py
	$(BIN)/python benchmarks/three_mistakes.py
	$(PYTHON) -m venv $(BENCH_PRECAST)  # precast installed as its users and the peers are: an editable install starts later
	$(BENCH_PRECAST)/bin/python -m pip install --quiet --constraint constraints.txt '.[export]'
	$(BENCH_PRECAST)/bin/python -m pip install --quiet --force-reinstall --no-deps .
	$(BENCH_VENV)/bin/python benchmarks/peers/bench.py --precast-python $(BENCH_PRECAST)/bin/python $(BENCH_ARGS)

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
