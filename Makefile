# All that a machine needs is Python >= 3.10 and make: every target brings .venv up to date first, which takes
# no time when nothing has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs bench bench-capture bench-layouts bench-search bench-peers bench-scale soak fuzz-models gpu-check gpu-bench gpu-tests gpu-calibrate build clean test-cpus test-triton test-asan bench-evaluate bench-demo attack

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-report ## train a looped model, attribute its answers step by step, write a report
	$(BIN)/sdi demo

# A file's tests stay in one worker, so what they share is made once. The 20 slowest are listed.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist loadfile

# Interpreted Triton kernels need a process of their own: see tests/conftest.py.
test: $(VENV)/.stamp-test ## run the tests, JOBS=2 at a time
	$(BIN)/python -m pytest $(PARALLEL) --durations=20
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests/triton_interpret

# The older triton that pyproject.toml allows goes into a folder of its own, before the installed one on the path.
OLD_TRITON := $(shell sed -n 's/.*"triton>=\([0-9.]*\);.*/\1/p' pyproject.toml)
OLD_TRITON_PATH := .triton-$(OLD_TRITON)
TRITON_TESTS := -m pytest -n $(JOBS) --dist load

test-triton: $(VENV)/.stamp-test $(OLD_TRITON_PATH)/.stamp ## compile and interpret the GPU kernels under the installed triton and the oldest allowed
	$(BIN)/python tests/kernels/compile_gate.py
	PYTHONPATH=$(OLD_TRITON_PATH) $(BIN)/python tests/kernels/compile_gate.py
	TRITON_INTERPRET=1 $(BIN)/python $(TRITON_TESTS) tests/triton_interpret
	PYTHONPATH=$(OLD_TRITON_PATH) TRITON_INTERPRET=1 $(BIN)/python $(TRITON_TESTS) tests/triton_interpret

$(OLD_TRITON_PATH)/.stamp: pyproject.toml | $(BIN)/pip
	rm -rf $(OLD_TRITON_PATH)
	$(BIN)/python -m pip install --no-deps --target $(OLD_TRITON_PATH) 'triton==$(OLD_TRITON).*'
	touch $@

test-cpus: $(VENV)/.stamp-test ## run the tests of numbers as other CPUs would compute them, one kind of CPU after another
	$(BIN)/python tests/on_cpus.py -- $(PARALLEL)

# A copy of the package whose C kernels look at every access, before the clone on the path.
ASAN := build/asan
ASAN_TESTS := $(addprefix tests/kernels/test_,borders.py cpu_routes.py instruction_sets.py preconditioned.py routes.py scaled_vector.py scan.py)
test-asan: $(VENV)/.stamp-test ## run the C kernels' tests under AddressSanitizer and UBSan (needs gcc)
	rm -rf $(ASAN) && mkdir -p $(ASAN) && cp -r sdi_kernels $(ASAN)/ && rm -f $(ASAN)/sdi_kernels/cpu/_sketch*.so
	gcc -shared -fPIC -g -O1 -std=gnu11 -fvisibility=hidden -Wno-psabi -Wno-unknown-pragmas -fno-omit-frame-pointer \
		-fsanitize=address,undefined -fno-sanitize-recover=undefined \
		sdi_kernels/cpu/src/*.c -o $(ASAN)/sdi_kernels/cpu/_sketch.abi3.so -lm -lpthread
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/python -m pytest -o 'pythonpath=$(ASAN) tests/shared tests/kernels .' $(ASAN_TESTS)

lint: $(VENV)/.stamp-dev ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.stamp-dev ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.stamp-docs ## build the documentation into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.stamp-bench ## run the benchmarks
	$(BIN)/python -m pytest bench --benchmark-only

bench-capture: $(VENV)/.stamp-bench ## time featurizing against a plain training step and the published package
	$(BIN)/python -m bench.capture

bench-demo: $(VENV)/.stamp-report ## run the demo with ten seeds under each instruction set of this CPU (hours; resumes)
	$(BIN)/python -m bench.demo_seeds

bench-layouts: $(VENV)/.stamp-bench ## error against bytes per example of every store layout, on trained models
	$(BIN)/python -m bench.store_layouts

SCRATCH ?= build/bench-search
bench-search: $(VENV)/.stamp-test ## scan speed, recall and time of every search stage, on 1e5 and 1e6 rows (2.6 GB in SCRATCH)
	mkdir -p $(SCRATCH)
	$(BIN)/python -m bench.search --rows 100000 1000000 --scratch $(SCRATCH)

bench-evaluate: $(VENV)/.stamp-test ## attribution methods against retraining over five seeds (docs/evaluation.md), resumable
	for problem in adder majority language parity trm; do $(BIN)/python -m bench.evaluate $$problem || exit 1; done

bench-scale: $(VENV)/.stamp-bench ## measure rates, and print what a corpus costs (docs/scale.md)
	$(BIN)/python -m bench.scale --model paper --examples 2

bench-peers: .venv-peers/.stamp ## ask other attribution libraries about a looped model (docs/peers.md)
	.venv-peers/bin/python -m bench.peers

MINUTES ?= 60
soak: $(VENV)/.stamp-test ## featurize and search in a loop for MINUTES, watching memory (soak.json, soak.png)
	$(BIN)/python -m bench.soak --minutes $(MINUTES)

SEED ?= 0
attack: $(VENV)/.stamp-test ## kill, damage and misuse for MINUTES, every input from a seed (attack.json)
	$(BIN)/python -m bench.attack --minutes $(MINUTES) --seed $(SEED)

fuzz-models: $(VENV)/.stamp-test ## MINUTES of random looped models, from SEED on, against batches of one by autograd (fuzz.json)
	$(BIN)/python -m bench.fuzz --minutes $(MINUTES) --seed $(SEED)

# On a GPU machine's own python: it needs torch, triton, numpy and pytest, nothing is installed, no network is used.
gpu-check: ## on a GPU machine: benchmark the Triton kernels into bench/results/, then test them; under nine minutes
	PYTHONPATH=.:python $(PYTHON) -m bench.gpu.check

gpu-bench: ## the benchmark of gpu-check alone
	PYTHONPATH=.:python $(PYTHON) -m bench.gpu.check --only bench

gpu-tests: ## the tests of gpu-check alone
	PYTHONPATH=.:python $(PYTHON) -m bench.gpu.check --only tests

gpu-calibrate: ## on a GPU machine: measure rates and tiles for the planner and keep them in the user's cache
	PYTHONPATH=.:python $(PYTHON) -m bench.gpu.run --calibrate

# A wheel with compiled kernels is tagged for the oldest Linux that it runs on: indexes refuse plain linux tags.
build: $(VENV)/.stamp-test ## build the sdist and the wheel into dist/
	rm -rf dist build/dist
	$(BIN)/python -m build --outdir build/dist
	mkdir dist && cp build/dist/*.tar.gz dist/
	if $(BIN)/python -m zipfile -l build/dist/*.whl | grep -q '_sketch.*\.so' && [ "$$(uname)" = Linux ]; then \
		PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir dist build/dist/*.whl; \
	else cp build/dist/*.whl dist/; fi

clean: ## remove what builds and tools leave behind; .venv stays
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find sdi_kernels python reproduce tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra, all in the same environment; the stem is the extra's name. The C sources are here
# because an editable install compiles them.
$(VENV)/.stamp-%: pyproject.toml setup.py constraints.txt $(wildcard sdi_kernels/cpu/src/*.[ch]) | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	touch $@

# pip is the last thing that venv writes, so a half-made environment is made again.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# One library after the other, without dependencies (those are in requirements.txt): one that cannot be installed is
# reported in the table and does not take the others along.
PEERS_PIP := .venv-peers/bin/python -m pip install -c constraints.txt -c bench/peers/constraints.txt
.venv-peers/.stamp: constraints.txt $(wildcard bench/peers/*.txt)
	$(PYTHON) -m venv .venv-peers
	$(PEERS_PIP) -r bench/peers/requirements.txt -e .
	for library in $$(cat bench/peers/libraries.txt); do $(PEERS_PIP) --no-deps $$library || true; done
	touch $@
