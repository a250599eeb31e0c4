# Everything a person types. `make` alone lists it. The second time, each target needs about a second of set-up.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup train test test-slow test-all test-gpu test-needs lint format bench bench-gpu clean

# Handed on to train.py (make train), benchmarks/throughput.py (make bench) and pytest (make test, make test-all).
ARGS ?=

PYTHON := .venv/bin/python
# The quick tests run side by side; ARGS="-n 0" for one after another, as a debugger needs it.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist worksteal
# pytest-timeout bounds each test, this the whole. In a terminal the tests stay in the foreground, for Ctrl-C.
LIMIT = timeout --signal=INT --kill-after=60 $(if $(CI),,--foreground)
TYPED := train.py mnist_fast data_prep benchmarks examples slurm/cpus.py

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## uv, FFCV's system libraries and the locked environment in .venv
	@scripts/setup.sh

# Without a configuration accelerate starts one process per GPU, or one on a machine without a GPU, and train.py chooses
# the precision. The user's own `accelerate config`, perhaps of another project, is left out: accelerate looks for it in
# HF_HOME.
NO_CONFIGURATION := $(CURDIR)/.venv/no-accelerate-configuration
# A configuration file decides on the data itself.
AUTO = $(if $(findstring --config,$(ARGS)),,--dataset auto)
train: setup ## prepare the data and train, e.g. make train ARGS="--epochs 1 --seed 2"
	@$(PYTHON) -m mnist_fast.cli $(AUTO) $(ARGS) >/dev/null # a mistake is told before anything starts
	$(PYTHON) -m data_prep --dataset auto
	HF_HOME=$(NO_CONFIGURATION) .venv/bin/accelerate launch train.py $(AUTO) $(ARGS)

test: setup ## the quick tests
	$(LIMIT) 1500 $(PYTHON) -m pytest -m "not slow" $(SIDE_BY_SIDE) $(ARGS)

test-slow: setup test-needs ## the others: real training to accuracy, SLURM, faults
	$(LIMIT) 3600 $(PYTHON) -m pytest -m slow $(ARGS)

test-all: setup test-needs ## all tests, under an hour on two cores
	$(LIMIT) 4800 $(PYTHON) -m pytest $(ARGS)

test-gpu: setup ## what only GPUs can tell; skipped where there is none
	$(LIMIT) 1800 $(PYTHON) -m pytest -m gpu $(ARGS)

# Where they cannot be installed, the tests that need them are skipped and say so. Apart: not every Debian has both.
test-needs:
	-@scripts/apt_install.sh slurm-wlm munge shellcheck
	-@scripts/apt_install.sh chromium

lint: setup ## ruff, mypy and shellcheck
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy $(TYPED)
	scripts/shellcheck_all.sh

format: setup ## let ruff sort imports and format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: setup ## measure the throughput of this machine
	$(PYTHON) benchmarks/throughput.py $(ARGS)

bench-gpu: setup ## seeds, throughput and start-up on one GPU, in under nine minutes
	$(PYTHON) benchmarks/gpu.py $(ARGS)

clean: ## remove caches; data/, runs/ and .venv stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . \( -name .git -o -name .venv -o -name .tools -o -name data -o -name runs \) -prune \
		-o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf
