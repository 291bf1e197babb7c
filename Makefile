# Each target sets up everything that it needs in $(VENV). `make bench` also uses $(BENCH_VENV). `make` shows the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := artifacts/smollm2-135m-instruct-int8
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
BENCH_VENV ?= .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready
BENCH_PRECAST ?= .venv-bench-precast
# The tests of a file share fixtures, so one worker runs all of them. A worker uses up to 4 GB of memory.
PYTEST = $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile
PIP_INSTALL = .ci/pip_install.py --constraint constraints.txt

.PHONY: help demo test test-long lint wheel docs bench fuzz fuzz-serve kill interrupt soak

help:  ## show the targets
	@echo "make TARGET [PYTHON=python3.12] [VENV=.venv]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO)/manifest.json  ## set up, export SmolLM2-135M-Instruct, ask it a question (3 to 6 minutes)
	$(BIN)/python cli.py run $(DEMO) --chat --prompt "What is the capital of France?" --max-tokens 64
	@echo "Next: . $(BIN)/activate && precast chat artifacts/"

$(DEMO)/manifest.json: | $(READY)
	$(BIN)/python cli.py export --buckets 64,128,512 --output $(DEMO)

test: $(READY)  ## set up and run the tests (15 to 25 minutes on two cores)
	@echo "running the tests: 15 to 25 minutes on two cores"
	$(PYTEST) $(PYTEST_ARGS)

test-long: $(READY)  ## run long tests: sanitizers, architectures with all weights and caches (half an hour)
	$(PYTEST) -m long $(PYTEST_ARGS)

lint: $(READY)  ## ruff, mypy, import-linter, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/types $(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror kernels/src/* tests/kernels/sanitize/*.cc tests/kernels/sanitize/*.h

# With --only-plat, auditwheel fails if the wheel depends on this machine's libraries.
wheel: $(READY)  ## build the manylinux wheel into dist/
	rm -rf build/wheel
	@$(BIN)/python $(PIP_INSTALL) 'precast[release]'
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --strip --only-plat --wheel-dir dist build/wheel/precast-*.whl

docs: $(DOCS_READY)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 PRECAST_TYPES=$(VENV)/types $(BIN)/mkdocs build --strict

# Each of these five targets prints the faults that it finds.
fuzz: $(READY)  ## load 20,000 mutated artifacts
	$(BIN)/python tests/fuzz/run.py --cases 20000 --seed 1 $(FUZZ_ARGS)

kill: $(READY)  ## kill six commands that write, 200 times
	$(BIN)/python tests/fuzz/kill.py --kills 200 --seed 1 $(KILL_ARGS)

fuzz-serve: $(READY)  ## send the server 10,000 generated requests, most of them malformed
	$(BIN)/python tests/fuzz/serve.py --examples 900 --seed 1 $(FUZZ_SERVE_ARGS)

interrupt: $(READY)  ## press Ctrl-C in 13 commands, 130 times
	$(BIN)/python tests/fuzz/interrupt.py --tries 130 --seed 1 $(INTERRUPT_ARGS)

soak: $(READY) $(DEMO)/manifest.json  ## load the server with requests of all kinds for half an hour
	$(BIN)/python tests/fuzz/soak.py --minutes 30 --seed 1 --strict $(SOAK_ARGS)

bench: $(READY) $(BENCH_READY)  ## compare with llama.cpp, OpenVINO, transformers and jax.jit (6 GB of packages)
	$(BIN)/python benchmarks/headline.py
	$(BIN)/python benchmarks/three_mistakes.py
	$(BIN)/python benchmarks/on_demand.py
	$(PYTHON) -m venv $(BENCH_PRECAST)  # not editable: an editable install starts more slowly, and the peers are installed normally too
	$(BENCH_PRECAST)/bin/python $(PIP_INSTALL) '.[export,serve]'
	$(BENCH_PRECAST)/bin/python $(PIP_INSTALL) --force-reinstall --no-deps .
	$(BENCH_VENV)/bin/python benchmarks/peers/bench.py --precast-python $(BENCH_PRECAST)/bin/python $(BENCH_ARGS)
	$(BENCH_VENV)/bin/python benchmarks/peers/prefixes.py --precast-python $(BENCH_PRECAST)/bin/python
	$(BENCH_VENV)/bin/python benchmarks/peers/sizes.py --precast-python $(BENCH_PRECAST)/bin/python --shapes 1.2b 7b
	-$(BENCH_VENV)/bin/python benchmarks/peers/llama_tools.py  # optional: frontier.py leaves out what needs the tools, and serving.py ends
	$(BENCH_VENV)/bin/python benchmarks/peers/frontier.py --precast-python $(BENCH_PRECAST)/bin/python
	-$(BENCH_VENV)/bin/python benchmarks/peers/serving.py --precast-python $(BENCH_PRECAST)/bin/python

$(READY): pyproject.toml setup.py constraints.txt $(wildcard kernels/src/*)
	@echo "installing precast and its packages into $(VENV): 2 to 4 minutes, 1.2 GB"
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python .ci/pip_install.py --upgrade pip
	@$(BIN)/python $(PIP_INSTALL) --editable '.[export,dev]'
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/precast  # so that mypy finds the folders as the package precast
	touch $@

$(DOCS_READY): $(READY)
	@$(BIN)/python $(PIP_INSTALL) 'precast[docs]'
	touch $@

# The packages of the peers take about 6 GB. Compiling llama.cpp for this processor takes ten minutes.
$(BENCH_READY): benchmarks/peers-requirements.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python .ci/pip_install.py --upgrade pip
	$(BENCH_VENV)/bin/python .ci/pip_install.py --requirement $<
	touch $@
