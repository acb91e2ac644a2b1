# The commands of a working copy. `make` alone lists them.
#
#   make sweep PYTHON=python3.12     choose the Python that .venv is made with
#   make test  VENV=/tmp/other       choose where the environment lives
#   make test  TESTS=tests/kernels   choose what is tested

VENV    ?= .venv
TESTS   ?= tests
# Three workers keep two cores busier than two do, as some tests wait for other processes. Not more
# than four: each holds its own jax and its own thread pool.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ "$$n" -ge 4 ] && echo 4 || echo 3)
# A crashed worker ends the run with the name of its test: pytest-xdist may wait forever for the rest
# of a file whose worker it has replaced.
PYTEST := -m pytest -q -n $(WORKERS) --max-worker-restart=0
# A file at a time, in the order of tests/conftest.py: pytest-xdist itself would put files of few
# tests last, which are the longest, and leave all workers but one without work.
BY_FILE := --dist loadfile --no-loadscope-reorder

# A warning, such as a link that leads nowhere, fails the build; all of them are shown first.
SPHINX := -m sphinx -q -W --keep-going -j auto -b html -d docs/_build/doctrees

BIN := $(VENV)/bin
# -qq: warnings about the reader's own pip configuration are no concern of this project.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check install -c constraints.txt

.DEFAULT_GOAL := help
# An interrupted recipe leaves no file that would pass for a finished one.
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev setup-docs sweep test test-docs test-fast test-slow lint format docs wheel clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) \
	    | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

sweep: setup ## install if need be, then run the example sweep
	@$(BIN)/purejaxpg sweep experiments/quickstart.toml

test: setup-dev ## run the tests (all but the slow ones)
	@$(BIN)/python $(PYTEST) $(BY_FILE) --durations=5 $(TESTS)

test-fast: setup-dev ## run the part marked `fast`
	@$(BIN)/python $(PYTEST) $(BY_FILE) -m 'fast and not slow' $(TESTS)

test-slow: setup-dev ## run the slow tests: learning curves, long faults
	@$(BIN)/python $(PYTEST) -m slow --durations=5 $(TESTS)

test-docs: setup-dev docs ## build the site, then check what is on it
	@$(BIN)/python -m pytest -q -m site tests/docs

lint: setup-dev ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup-dev ## rewrite the files in the project's format
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format .

docs: setup-docs ## build the site into docs/_build/html
	@$(BIN)/python $(SPHINX) docs docs/_build/html
	@echo 'Open docs/_build/html/index.html'

wheel: setup-dev ## build the wheel into dist/
	@$(BIN)/python -m hatchling build -t wheel -d dist

setup: $(VENV)/.core ## make the environment
setup-dev: $(VENV)/.dev ## make the environment, with all that tests and lint need
setup-docs: $(VENV)/.docs ## make the environment, with all that the site needs

clean: ## remove environments and caches; results are kept
	rm -rf .venv .venv-* .jax_cache .mypy_cache .pytest_cache .ruff_cache build dist docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp each for the environment, the runtime packages, what tests and lint need, and what the site
# needs. A stamp is the last thing that its recipe writes.
$(VENV)/.made:
	@python='$(PYTHON)'; \
	suits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	for candidate in python3 python3.13 python3.12 python3.11; do \
	    if [ -z "$$python" ] && "$$candidate" -c "$$suits" 2>/dev/null; then python=$$candidate; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo 'purejaxpg needs Python 3.11, 3.12 or 3.13 and found none on PATH: name one with make PYTHON=/path/to/python3.' >&2; exit 1; \
	fi; \
	if ! "$$python" -c "$$suits" 2>/dev/null; then \
	    echo "purejaxpg needs Python 3.11, 3.12 or 3.13, and PYTHON=$$python is not one of them." >&2; exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$python cannot make an environment because it lacks ensurepip: install its venv package (python3-venv on Debian and Ubuntu) or name another with make PYTHON=/path/to/python3." >&2; exit 1; \
	fi; \
	if [ -e '$(BIN)/python' ] && ! '$(BIN)/python' -c "$$suits" 2>/dev/null; then \
	    echo '$(VENV) already holds an unsuitable Python: remove it or name another place with make VENV=...' >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv '$(VENV)'
	@touch $@

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/.made
	@echo 'Installing the runtime packages into $(VENV) (once, about a minute)'
	@start=$$(date +%s); $(PIP) -e . && echo "Installed in $$(($$(date +%s) - start)) s"
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo 'Installing what tests and lint need into $(VENV) (once, about half a minute)'
	@start=$$(date +%s); $(PIP) -e '.[dev]' && echo "Installed in $$(($$(date +%s) - start)) s"
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	@echo 'Installing what the site needs into $(VENV) (once, about half a minute)'
	@start=$$(date +%s); $(PIP) -e '.[docs]' && echo "Installed in $$(($$(date +%s) - start)) s"
	@touch $@
