# Thin: each line is a command one could type.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
CORES ?= all
WHAT ?=
# Packages are compiled as they are first imported, not all at their installation.
unexport PYTHONDONTWRITEBYTECODE
# An environment that was not finished, or whose Python is gone or too old, is as none.
USABLE := $(shell test -f $(INSTALLED) && $(BIN)/python -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup book test test-all lint format lock paper findings check-results clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(INSTALLED) ## create .venv and install the locked packages, if missing or out of date

ifneq ($(USABLE),True)
.PHONY: $(INSTALLED)
endif

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v.major}.{v.minor}; try make PYTHON=python3.11")'
	@if [ -e .venv ] && [ "$(USABLE)" != True ]; then echo ".venv is not complete, or its Python is gone or too old; it is made anew"; rm -rf .venv; fi
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --disable-pip-version-check -r requirements.lock --editable .
	touch $@

book: $(INSTALLED) ## build the site in _build/html, running the notebooks that changed
	$(BIN)/python book/build.py

test: lint book ## lint, quick tests, notebooks and the built book
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env notebooks
	@echo "The slow tests were left out; make test-all runs them, too."

test-all: test ## the same, and the slow tests: before an issue is closed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m slow --jaxtyping-packages=mapkg,studies,beartype.beartype

lint: $(INSTALLED) ## ruff alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: pyproject.toml ## resolve requirements.lock anew (needs pip-tools)
	pip-compile --allow-unsafe --all-extras --strip-extras --upgrade --no-header --no-annotate --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options --output-file requirements.lock pyproject.toml
	sed -i -e 's/^torch==\([0-9.]*\)+.*/torch==\1/' -e '1i # The tested closure of pyproject.toml with all extras; written by "make lock".' requirements.lock

paper: $(INSTALLED) ## the grid of paper-scale runs, to the book (many hours); CORES=4, WHAT=gt_zinc
	$(BIN)/snakemake $(WHAT) --cores $(CORES)

findings: ## what surprised us in other libraries: does it still? (minutes)
	@for script in findings/*.sh; do echo "$$script"; bash "$$script" || exit 1; done

check-results: $(INSTALLED) ## say which tracked tables are not of the present grid
	$(BIN)/python workflow/publish.py

clean: ## remove the built site and the executed notebooks
	rm -rf _build
