# alignd's tasks. `make` alone lists them.
SHELL := bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# `make setup` says what to do where this is not 3.11.
PYTHON ?= python3
ENGINE ?= cpu
QUICK ?=
BENCH ?= loop

BIN := .venv/bin
ROOMS := policies serving feedback training deploy bench
# A change of what is installed changes this name, so that set-up runs again then, and only then.
PINS := requirements/$(ENGINE).txt requirements/dev.txt requirements/install.sh requirements/uv.py requirements/check_engine.py pyproject.toml
READY := .venv/.ready-$(ENGINE)-$(shell cat $(PINS) | sha256sum | cut -c 1-16)

.PHONY: help setup demo test lint format proto bench lock client clean

help: ## list these tasks
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with everything pinned in it (ENGINE=cpu or gpu, PYTHON=python3)

$(READY): | $(PINS)
	@requirements/install.sh $(ENGINE) $(PYTHON)
	@rm -f .venv/.ready-* && touch $@

demo: ## serve, rank, learn, swap, report (QUICK=1: the same path on a tiny model)
	@began_at=$$(date +%s); $(MAKE) --silent setup && $(BIN)/alignd demo $(if $(QUICK),--quick) --began-at $$began_at

test: setup ## run the tests
	$(BIN)/python -m pytest

lint: setup ## check style, types, who imports whom, and the contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(ROOMS) protos/client protos/generate.py
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: setup ## make protos/gen from the .proto files
	$(BIN)/python protos/generate.py

bench: setup ## measure (BENCH=loop, QUICK=1), to var/bench/
	@mkdir -p var/bench
	$(BIN)/python -m bench.$(BENCH) --json var/bench/$(BENCH).json $(if $(QUICK),--quick)

# PyTorch's index is asked only where pip's own sources have no +cpu build; the gpu pins must not see that build at all.
COMPILE = $(BIN)/python requirements/uv.py pip compile --quiet --python-version 3.11 --override requirements/overrides.txt \
	--custom-compile-command "make lock" --no-annotate --no-emit-index-url --no-emit-find-links
TORCH_CPU := --index https://download.pytorch.org/whl/cpu

lock: setup ## pin anew, for Python 3.11 on Linux x86-64, what pyproject.toml asks for
	$(COMPILE) pyproject.toml --extra cpu --extra demo -o requirements/cpu.txt || \
		$(COMPILE) pyproject.toml --extra cpu --extra demo -o requirements/cpu.txt $(TORCH_CPU)
	UV_FIND_LINKS= $(COMPILE) pyproject.toml --extra gpu --extra demo -o requirements/gpu.txt
	$(COMPILE) --group dev --constraint requirements/cpu.txt -o requirements/dev.txt

client: setup ## build the wheel of alignd-client, which applications install, into dist/
	$(BIN)/python requirements/uv.py build --quiet --wheel --no-build-isolation --python $(BIN)/python --out-dir dist protos/client

clean: ## remove caches and built packages; never var/, where the data is, nor .venv
	rm -rf dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(ROOMS) tests protos -name __pycache__ -type d -prune -exec rm -rf {} +
