# Two commands matter: `make demo` and `make test`. Both do all their own set-up.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-long check format docs bench clean

help:  ## This list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "edgemesh needs Python 3.11 to 3.13; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing edgemesh into $(VENV) (torch is the large part; once only) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "No venv module: on Debian run 'apt install python3-venv'"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## Three nodes on this machine find each other and answer real prompts
	@$(BIN)/edgemesh demo --state-dir .demo/state

test: $(READY) check  ## Formatting, types and all tests that take minutes, not hours
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: $(READY)  ## The long runs: more seeds, more kills
	@EDGEMESH_LONG=1 $(BIN)/python -m pytest -m 'slow or not slow' --timeout 1800

check: $(READY)  ## Lint and strict types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q . || { echo "run: make format"; exit 1; }
	@$(BIN)/mypy

format: $(READY)  ## Put every file into the house format
	@$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .

docs: $(READY)  ## Print the generated pages again: protocol, AsyncAPI, command line
	@$(BIN)/python -m mesh.topic_docs --write
	@$(BIN)/python -m node.cli.reference --write

bench: $(READY)  ## Every number we publish, quickly
	@$(BIN)/python -m tests.benchmarks.mesh --quick
	@for name in generate codec decode prefix peer_prefix multi_adapter precision tune second_adapter vdf vdf_real joining ring trace_cache dataplane churn second_node hold_top; do \
	  $(BIN)/python -m tests.benchmarks.$$name --quick || echo "($$name: a quick run proves that it runs, no more)"; done

clean:  ## Remove the environment and the demo's state
	rm -rf $(VENV) .demo build *.egg-info
