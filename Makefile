# Needs Python >= 3.11, pip and make. Everything is installed in $(VENV); nothing is downloaded but packages.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
# XLA runs convolutions on one core of a CPU device, so the quickstart splits its batches over two devices.
DEVICES ?= 2
# Compiling dominates the test time, so workers share one cache of compiled programs.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TEST_ENV := JAX_COMPILATION_CACHE_DIR='$(CURDIR)/.cache/jax' JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-full reliability parity ladder plane grid benchmark lint format check golden notebook docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## make the environment; again only when pyproject.toml or constraints.txt change

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; v < (3, 11) and sys.exit('jaxdiff needs Python 3.11 or newer, got %d.%d; name another with PYTHON=python3.12' % v)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing jaxdiff and its tools in $(VENV) (a minute or two)"
	@$(INSTALL) -e '.[dev]' -c constraints.txt
	@touch $@

quickstart: setup ## train on the embedded images, sample, evaluate: a grid and a table in WORKDIR=runs/quickstart
	@$(BIN)/jaxdiff train experiments/digits_ddpm.py --workdir $(WORKDIR) --cpu-devices $(DEVICES)
	@$(BIN)/jaxdiff compare $(WORKDIR) --cpu-devices $(DEVICES)

test: setup ## the test suite without the slow tests; PYTEST_ARGS= replaces the parallel run
	@$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS)

test-full: setup ## the whole test suite
	@$(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS) -m ''

reliability: setup ## 50 kills, 200 damaged checkpoints, several processes and meshes: the figures of docs/reliability.md
	@$(TEST_ENV) $(BIN)/python -m pytest -s tests/reliability -m ''

parity: $(VENV)-parity/.installed ## outputs and weights beside diffusers, transformers and peft
	@$(TEST_ENV) $(VENV)-parity/bin/python -m pytest $(PYTEST_ARGS) tests/parity -m ''

# An environment of its own: torch is larger than everything else, and `make test` stays as it is. A CPU is enough; pip
# takes torch's smaller CPU build where its settings (PIP_EXTRA_INDEX_URL) name the place that has it.
$(VENV)-parity/.installed: pyproject.toml constraints.txt
	@test -x $(VENV)-parity/bin/python || $(PYTHON) -m venv $(VENV)-parity
	@echo "installing jaxdiff and the libraries it is compared with in $(VENV)-parity (some minutes)"
	@$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,parity]' -c constraints.txt
	@touch $@

ladder: setup ## train what is missing of every few-step method on the digits, judge, write docs/ladder.md: two hours
	@$(BIN)/python scripts/ladder.py $(LADDER_ARGS)

plane: setup ## the same on a mixture in the plane: docs/plane.md
	@$(BIN)/python scripts/plane.py $(PLANE_ARGS)

grid: setup ## which modes diffusion GANs find: docs/grid.md
	@$(BIN)/python scripts/grid.py $(GRID_ARGS)

benchmark: setup ## time against other libraries: a dated table in benchmarks/results; see benchmarks/README.md
	@$(BIN)/python -m benchmarks.unet_cpu $(BENCHMARK_ARGS)

lint: setup ## ruff (format and lint) and pyright
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: setup ## let ruff format the code and mend what it can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

check: lint test ## what CI runs: lint, then test

golden: setup ## compare with arrays of the official releases; DIR=folder takes other .npz files
	@$(TEST_ENV) $(BIN)/python -m pytest tests/golden $(if $(DIR),--golden-dir '$(DIR)') -m ''

notebook: setup ## write notebooks/*.ipynb from their .py sources and execute them
	@$(BIN)/jupytext --quiet --update --to ipynb notebooks/*.py
	@$(BIN)/jupyter-execute --kernel_name=python3 notebooks/*.ipynb

docs: setup ## build the documentation in site/
	@$(INSTALL) -e '.[dev,docs]' -c constraints.txt
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean: ## remove caches and builds; runs/ and the environment stay
	@rm -rf .cache .pytest_cache .ruff_cache build dist site
	@find . -name __pycache__ -type d -not -path './$(VENV)*/*' -prune -exec rm -rf {} +
