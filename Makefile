# Everything here works on a machine that has Python >= 3.11 (with venv), make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint bench lock clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

venv: $(STAMP)  ## make .venv with the pinned dependencies and shoal itself (editable)

# The stamp holds a checksum, not a date: a fresh clone or a `touch` does not rebuild, another version does.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "shoal needs Python 3.11 or later; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@sum=$$(cat constraints.txt pyproject.toml | cksum); \
	if [ "$$(cat $@ 2>/dev/null)" = "$$sum" ]; then touch $@; exit 0; fi; \
	set -e; \
	$(PYTHON) -m venv $(VENV) || { echo "no venv here: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }; \
	echo "installing the pinned dependencies into $(VENV) ..."; \
	$(BIN)/pip install --quiet --require-hashes --requirement constraints.txt; \
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .; \
	echo "$$sum" > $@

demo: $(STAMP)  ## start a cluster of three nodes, index the standard library on it, check, and clean up
	@$(BIN)/python demo/run.py

test: $(STAMP)  ## all tests
	@$(BIN)/python -m pytest

lint: $(STAMP)  ## format, lint, import layers, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(STAMP)  ## shoal beside Ray, Dask and the standard library; writes docs/benchmarks.md (BENCH="--quick --only put")
	@$(BIN)/python benchmarks/compare.py $(BENCH)

# Any index will do: only names, versions and hashes are written down.
LOCK := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links --no-emit-build-options --upgrade
lock:  ## pin the newest versions anew (needs `uv`)
	$(LOCK) pyproject.toml --extra dev --output-file constraints.txt
	for peer in benchmarks/peers/*.in; do $(LOCK) $$peer --output-file $${peer%.in}.txt; done

clean:  ## remove what these commands made
	rm -rf $(VENV) .bench build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
