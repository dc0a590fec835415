# Each target sets up what it needs; nothing but Python 3.11 or newer, with pip, has to be there before.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
READY := .venv/.ready
BENCH_READY := .venv-bench/.ready
KUBERNETES_READY := .venv-kubernetes/.ready
MEMBERS := sdk/core services/gcs services/scheduler services/worker services/objectstore sdk/api
LOCKS := base image build dev bench kubernetes

# PYTHON=/path/to/python chooses the interpreter; else the first one that is new enough.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)

# JOBS says how many processes run tests at a time; most tests wait for other processes, not for a processor.
JOBS ?= 2

# ROWS="tasks_async put_small" chooses rows of the benchmark, BENCH="--format json" passes flags to it.
ROWS ?=
BENCH ?=

.PHONY: help setup demo test lint types unit containers kubernetes bench simulate lock clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):[^#]*## /  make \1|/' | column -t -s '|'

setup: $(READY) ## make .venv with everything that is pinned, and the six packages editable

demo: $(READY) ## run examples/quickstart.py on a cluster of its own
	@$(BIN)/python examples/quickstart.py

test: lint types unit ## lint, check types and run every test

lint: $(READY) ## ruff and the floors (import-linter)
	@echo "── ruff"
	@$(BIN)/ruff check --quiet && $(BIN)/ruff format --check --quiet || { echo "Run '$(BIN)/ruff check --fix && $(BIN)/ruff format'."; exit 1; }
	@echo "── floors"
	@$(BIN)/lint-imports --no-cache > .venv/floors.log || { cat .venv/floors.log; exit 1; }

types: $(READY) ## mypy --strict over everything
	@echo "── types"
	@$(BIN)/mypy

unit: $(READY) ## every test, without the linters
	@echo "── tests"
	@$(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist worksteal

containers: $(READY) ## the tests that need a container engine, which is started where none runs
	@echo "── containers"
	@tests/integration/containers/run

kubernetes: $(KUBERNETES_READY) ## render deploy/k8s with kubectl, and check it against schemas and policies
	@echo "── kubernetes"
	@command -v kubectl > /dev/null || { echo "There is no kubectl here, and nothing else renders the overlays as it does."; exit 1; }
	@.venv-kubernetes/bin/python -m pytest -q tests/kubernetes -p no:cacheprovider

bench: $(READY) $(BENCH_READY) ## compare with Ray and Dask on this machine
	@$(BIN)/python -m bench $(ROWS) $(BENCH)

simulate: $(READY) ## schedulers among 1,000 nodes with a million tasks, in virtual time
	@$(BIN)/python -m bench.simulate $(BENCH)

lock: $(READY) ## pin the newest versions that requirements/*.in allow, by hash
	@for name in $(LOCKS); do $(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-emit-index-url --no-emit-find-links \
		--universal --python-version 3.11 --custom-compile-command "make lock" requirements/$$name.in -o requirements/$$name.txt; \
		echo "requirements/$$name.txt"; done

clean: ## remove what the targets made, the environments too
	@rm -rf .venv .venv-bench .venv-kubernetes .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements/dev.txt $(MEMBERS:%=%/pyproject.toml)
	@[ -n "$(PYTHON)" ] || { echo "Shoal needs Python 3.11 or newer; none was found. Say which: make PYTHON=/path/to/python"; exit 1; }
	@echo "── setting up .venv with $(PYTHON) (once; a minute)"
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation $(MEMBERS:%=--editable ./%)
	@touch $@

$(BENCH_READY): requirements/bench.txt
	@echo "── setting up .venv-bench with Ray and Dask (once; some minutes)"
	@[ -x .venv-bench/bin/python ] || "$(PYTHON)" -m venv .venv-bench
	@.venv-bench/bin/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements/bench.txt
	@touch $@

$(KUBERNETES_READY): requirements/kubernetes.txt
	@echo "── setting up .venv-kubernetes with checkov (once; a minute)"
	@[ -x .venv-kubernetes/bin/python ] || "$(PYTHON)" -m venv .venv-kubernetes
	@.venv-kubernetes/bin/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements/kubernetes.txt
	@touch $@
