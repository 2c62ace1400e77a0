# What contributors run; `make` lists it. The interpreter is .venv's where there is one: PYTHON=… names another.
SHELL := bash
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
ARGS ?=

.PHONY: help env test slow lint format types docs fresh generated wheel hooks

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

env: ## .venv with the versions of constraints.txt
	. scripts/environment.sh && use_environment dev

test: ## lint, types, documentation, tests; ARGS="tests/test_files.py -x" goes to pytest
	bash run_tests.sh $(ARGS)

slow: ## the tests that take minutes
	bash run_tests.sh -m slow $(ARGS)

lint: ## ruff, without changing anything
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: ## ruff, mending what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types: ## mypy
	$(PYTHON) -m mypy

docs: ## the site, strictly, into site/
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

fresh: ## everything that the pages say, on a machine that has only Python and pip; ten minutes
	$(PYTHON) scripts/fresh_machine.py $(ARGS)

generated: ## trees, drawings and tables of the documents anew
	$(PYTHON) scripts/tree.py --write
	$(PYTHON) scripts/drawings.py
	$(PYTHON) -m scripts.results --write

wheel: ## the wheel of this commit, into dist/
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

hooks: ## ruff before every commit
	. scripts/environment.sh && use_environment dev && "$$PYTHON" -m pre_commit install --install-hooks
