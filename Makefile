# `make quickstart` and `make test` need Python 3.11, make and a pip that reaches a package index; nothing else.
# The first that runs: a name on PATH may be a shim without a Python behind it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# The pair of torch and torchrec, 2.13 or 2.11, and its build, cpu or cuda: another than the usual one has a folder of its own.
TORCH ?= 2.13
BUILD ?= cpu
VENV ?= .venv$(if $(filter-out 2.13,$(TORCH)),-$(TORCH))$(if $(filter-out cpu,$(BUILD)),-$(BUILD))
RUN := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.installed
DATASET := data/movielens-100k
RESULT := runs/quickstart/result.json
MODEL := models/quickstart
SCORE := from mmlrec.serving import load; model = load("$(MODEL)"); \
	print(*model.score([model.example() | {"user": user} for user in (1, 2, 3)]), sep="\n")
CODE := mmlrec apps preprocessing benchmarks tests requirements setup.py

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help environment quickstart test test-all test-cluster gpu-check lint types tests tests-all clean

help:
	@echo "make quickstart  environment, MovieLens-100K, MMoE trained on its two tasks and exported"
	@echo "make test        environment, then ruff, mypy and the tests (under 15 minutes)"
	@echo "make test-all    the same with the long tests"
	@echo "make test-cluster  pretend hosts, containers, a Slurm, an S3 server; installs what it needs where it may, and skips the rest"
	@echo "make gpu-check   what a machine with a GPU can do: tests, a user's run, speed (nine minutes); results in runs/gpu"
	@echo "make lint        ruff check and ruff format --check"
	@echo "make types       mypy"
	@echo "make environment only the environment, in $(VENV)"
	@echo "make test TORCH=2.11  any of these beside the older torch; BUILD=cuda with the GPU build"
	@echo "make clean       remove the environment and all that tools have cached; data/, runs/ and models/ stay"

environment: $(ENVIRONMENT)

$(ENVIRONMENT): $(wildcard requirements/*.txt) requirements/install.py setup.py
	@test -n "$(PYTHON)" || { echo "No Python 3.11 on PATH. Install it, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) requirements/install.py --venv $(VENV) --torch $(TORCH) $(if $(filter-out cpu,$(BUILD)),--$(BUILD))
	@touch $@

$(DATASET)/manifest.json: | $(ENVIRONMENT)
	$(RUN) -m preprocessing movielens-100k --raw data/raw/ml-100k --out $(DATASET) --download

$(RESULT): $(DATASET)/manifest.json configs/mtl/movielens-100k.yaml configs/base/train.yaml | $(ENVIRONMENT)
	@rm -rf $(@D)
	$(RUN) -m apps.train --config configs/mtl/movielens-100k.yaml --run-dir $(@D)

$(MODEL)/model.json: $(RESULT)
	@rm -rf $(@D)
	$(RUN) -m apps.export --run-dir $(<D) --out $(@D)

quickstart: $(RESULT) $(MODEL)/model.json
	$(RUN) -c '$(SCORE)'
	@echo
	@echo "Done: the trained model and its metrics are in $(<D)/ (rm -r $(<D) to train again), the exported one in $(MODEL)/. To try next:"
	@echo "  source $(VENV)/bin/activate"
	@echo "  python -m apps.train --config configs/mtl/movielens-100k.yaml model.name=ple"
	@echo "  torchrun --standalone --nproc-per-node 2 -m apps.train --config configs/mtl/movielens-100k.yaml"
	@echo "  python -m apps.evaluate --run-dir $(<D)"
	@echo "  python -m apps.serve --model $(MODEL)"

# Each of the three runs and reports, whatever the one before it said.
test: $(ENVIRONMENT)
	@$(MAKE) --no-print-directory --keep-going lint types tests

test-all: $(ENVIRONMENT)
	@$(MAKE) --no-print-directory --keep-going lint types tests-all

lint: $(ENVIRONMENT)
	$(RUN) -m ruff check $(CODE)
	$(RUN) -m ruff format --check $(CODE)

types: $(ENVIRONMENT)
	$(RUN) -m mypy

# Three files at a time on two cores, one thread each: many tests wait, for processes that they start or for a clock. The longest come
# first (tests/conftest.py).
tests: $(ENVIRONMENT)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not long and not gpu and not cluster"

tests-all: $(ENVIRONMENT)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not cluster"

# Debian's packages for pretend hosts, containers and Slurm, where this is Debian and we may, and an S3 server that keeps its data on
# disk, where there is npm; a test that lacks something says so.
test-cluster: $(ENVIRONMENT)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq; apt-get install -y -qq --no-install-recommends iproute2 util-linux podman buildah runc debootstrap slurm-wlm munge > /dev/null \
			|| echo "apt-get could not install all packages; tests that lack them are skipped"; fi
	@if command -v npm > /dev/null; then npm install --silent --no-fund --no-audit --prefix $(VENV)/s3rver s3rver@3.7.1 > /dev/null \
		|| echo "npm could not install s3rver; tests that need it are skipped"; fi
	OMP_NUM_THREADS=1 $(RUN) -m pytest -rs tests -m cluster

# Not of the environment: with packages of one's own, in a container say, PYTHON names the interpreter that has them.
gpu-check:
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) -m benchmarks.gpu --out runs/gpu

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find mmlrec apps preprocessing benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
