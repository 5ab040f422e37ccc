# `make studies` and `make test` work on a fresh clone: they create the environment in .venv first.
# Another interpreter: make setup PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
DEVICE ?= cpu

# Everything below is small models on a CPU: more threads than work makes it slower, not faster.
export OMP_NUM_THREADS ?= 1
export INTERP_PROGRESS ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup test studies notebooks lab lint format bench wheel clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create the environment in .venv (Python 3.10 or newer)

# torch is installed by itself first, so that a build for this machine that is already at hand (a CPU wheel, say)
# is taken and nothing later replaces it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "interp needs Python 3.10 or newer, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1 || echo missing)."; \
		echo "Name another one: make setup PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "Creating $(VENV) with $$($(PYTHON) -V)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing the pinned packages (a few minutes the first time)"
	@$(BIN)/python -m pip install -q -c constraints.txt torch
	@$(BIN)/python -m pip install -q -c constraints.txt hatchling
	@$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev,notebook,png]'
	@touch $@
	@echo "The environment is ready: $(VENV)"

test: $(STAMP) ## Run the tests (TESTS="tests/test_cli.py -k help" for some of them)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(TESTS)

studies: $(STAMP) ## Run every study on the embedded models and write reports/index.html
	$(BIN)/interp study --all --jobs $(JOBS) --out reports

notebooks: $(STAMP) ## Run every study and keep the outputs in the notebooks themselves
	$(BIN)/interp study --all --jobs $(JOBS) --out reports --update

lab: $(STAMP) ## Open JupyterLab on the notebooks
	OMP_NUM_THREADS= INTERP_PROGRESS=1 $(BIN)/jupyter lab --notebook-dir=notebooks

lint: $(STAMP) ## Check style, layering and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(STAMP) ## Rewrite the code in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP) ## Run the benchmarks (DEVICE=cuda, QUICK=1)
	$(BIN)/python experiments/bench/run.py --device $(DEVICE) $(if $(QUICK),--quick)

wheel: $(STAMP) ## Build the wheel in dist/
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

clean: ## Remove the environment, the reports and the caches
	rm -rf $(VENV) reports dist build .pytest_cache .ruff_cache .hypothesis
