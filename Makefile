# Everything here works on a machine that has Python >= 3.11 (with venv), make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INTEGRATION := .venv-integration
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test integration compatibility lint bench lock clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

venv: $(STAMP)  ## make .venv with the pinned dependencies and shoal itself (editable)

# $(call install,VENV,CONSTRAINTS). The stamp holds a checksum, not a date: a fresh clone or a `touch` does not rebuild,
# another version does.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "shoal needs Python 3.11 or later; this is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@sum=$$(cat $(2) pyproject.toml | cksum); \
	if [ "$$(cat $@ 2>/dev/null)" = "$$sum" ]; then touch $@; exit 0; fi; \
	set -e; \
	$(PYTHON) -m venv $(1) || { echo "no venv here: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }; \
	echo "installing the pinned dependencies into $(1) ..."; \
	$(1)/bin/pip install --quiet --require-hashes --requirement $(2); \
	$(1)/bin/pip install --quiet --no-deps --no-build-isolation --editable .; \
	echo "$$sum" > $@
endef

$(STAMP): constraints.txt pyproject.toml
	$(call install,$(VENV),constraints.txt)

$(INTEGRATION)/.installed: tests/integration/constraints.txt pyproject.toml
	$(call install,$(INTEGRATION),tests/integration/constraints.txt)

demo: $(STAMP)  ## start a cluster of three nodes, index the standard library on it, check, and clean up
	@$(BIN)/python demo/run.py

test: $(STAMP)  ## all tests
	@$(BIN)/python -m pytest

integration: $(INTEGRATION)/.installed  ## programs of others on shoal: scikit-learn, Dask, Modin (in .venv-integration)
	@$(INTEGRATION)/bin/python -m pytest tests/integration

compatibility: $(STAMP)  ## write docs/compatibility.md from docs/compatibility.toml
	@$(BIN)/python docs/make_compatibility.py

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
	$(LOCK) pyproject.toml --extra dev --extra integration --output-file tests/integration/constraints.txt
	for peer in benchmarks/peers/*.in; do $(LOCK) $$peer --output-file $${peer%.in}.txt; done

clean:  ## remove what these commands made
	rm -rf $(VENV) $(INTEGRATION) .bench build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
