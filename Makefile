# Every target sets itself up: the first one to run creates .venv and installs qtune into it, once, and again when pyproject.toml changes.
# PYTHON=python3.12          the interpreter that .venv is made from (3.10 or newer)
# TORCH="torch==2.13.0 ..."  what pip installs as torch, options included, when the default is not what you want
# ARGS="-k nf4 -x"           more arguments for pytest
# JOBS=4                     processes that share the tests; 0: all in one, for a debugger

PYTHON ?= python3
# without an NVIDIA GPU: one fixed torch, installed first, so that nothing else chooses a CUDA build
TORCH ?= $(shell if nvidia-smi -L >/dev/null 2>&1; then echo 'torch>=2.10'; else echo 'torch==2.13.0'; fi)
ARGS ?=
JOBS ?= 2

# processes that share the cores get one thread each: two threads in each of two processes wait for one another, busily
THREADS := $(if $(filter 0 1,$(JOBS)),,OMP_NUM_THREADS=1)

VENV := .venv
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
TESTS_READY := $(VENV)/.tests-ready
PY := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check bench bench-quality bench-family bench-tasks bench-7b bench-7b-stock docs docs-tables clean setup FORCE

help: ## list these targets
	@echo "make TARGET, where TARGET is one of:"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' Makefile

demo: setup ## fine-tune a small model on an NF4 base, merge and verify it (minutes on 2 CPU cores)
	@$(PY) -m qtune demo

test: setup ## run the tests that are not marked slow
	@$(THREADS) $(PY) -m pytest -q -m "not slow" -n $(JOBS) --dist worksteal $(ARGS)

test-slow: $(TESTS_READY) ## run the tests marked slow, those of the extras eval and docs too (they are installed first)
	@$(THREADS) $(PY) -m pytest -q -m slow -n $(JOBS) --dist worksteal $(ARGS)

check: setup ## lint (ruff) and type-check (mypy)
	@$(PY) -m ruff check .; linted=$$?; $(PY) -m mypy && exit $$linted

# what takes hours is a target of its own
SLOW_BENCH := $(addprefix benchmarks/,quality.py recipes.py seven_b.py family.py combine.py forgetting.py)

bench: setup ## run every script in benchmarks/ that takes minutes
	@set -e; for script in $(filter-out $(SLOW_BENCH),$(shell grep -l __main__ benchmarks/*.py)); do echo "== $$script"; $(PY) "$$script"; done

bench-quality: setup ## measure the starts and the recipes of configs/methods/ (hours; goes on where it stopped)
	@set -e; for script in benchmarks/quality.py benchmarks/recipes.py; do echo "== $$script"; $(PY) "$$script"; done

bench-family: setup ## measure every method at the same number of trained values (hours; goes on where it stopped)
	@$(PY) benchmarks/family.py $(ARGS)

bench-tasks: setup ## measure adapters of several tasks, combined and one after another (hours; goes on where it stopped)
	@set -e; for script in benchmarks/combine.py benchmarks/forgetting.py; do echo "== $$script"; $(PY) "$$script"; done

bench-7b: setup ## train a 7B shape for two steps, weights resident and streamed: memory and time (20 minutes, 8 GB of disk)
	@$(PY) benchmarks/seven_b.py $(ARGS)

bench-7b-stock: setup ## the same by transformers + PEFT + bitsandbytes
	@$(PY) benchmarks/seven_b.py --stock $(ARGS)

docs: $(DOCS_READY) ## build the documentation into site/, to be read offline
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "open site/index.html; the search asks for a server: $(PY) -m http.server --directory site"

docs-tables: setup ## write the tables of README.md and docs/ from benchmarks/results/
	@$(PY) benchmarks/tables.py

clean: ## remove what building and testing left behind (.venv and runs/ stay)
	@rm -rf build dist site qtune.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
	@echo "clean; to set up afresh as well: rm -rf $(VENV)"

setup: $(READY)

# also when another torch is asked for, and when the interpreter behind .venv is gone (Python upgraded or removed)
ifneq ($(origin TORCH)$(shell $(PY) -c 'print(1)' 2>/dev/null),file1)
$(READY): FORCE
endif

# The mark is written last: an interrupted set-up is taken up again by the next run.
$(READY): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "qtune needs Python 3.10 or newer, but $(PYTHON) is $$("$(PYTHON)" --version 2>&1 | head -n 1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  echo "[1/3] creating $(VENV) with $$("$(PYTHON)" --version)"; \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot create virtual environments: its modules venv and ensurepip are missing. On Debian or Ubuntu: sudo apt install python3-venv" >&2; \
	    exit 1; }; \
	  "$(PYTHON)" -m venv --clear $(VENV); }
	@rm -f $(READY)
	@torch='$(TORCH)'; set -f; \
	if test '$(origin TORCH)' = file && $(PY) -c 'from importlib.metadata import version; version("torch")' 2>/dev/null; then \
	  echo "[2/3] torch is installed"; \
	else \
	  echo "[2/3] installing $$torch (a large download: minutes on most lines)"; \
	  $(PY) -m pip install --quiet --disable-pip-version-check $$torch; \
	fi
	@echo "[3/3] installing qtune and what it needs"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev,gguf]'
	@touch $(READY)

$(DOCS_READY): pyproject.toml | $(READY)
	@echo "installing what the documentation is built with"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $(DOCS_READY)

$(TESTS_READY): pyproject.toml | $(READY)
	@echo "installing what the slow tests need"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev,gguf,eval,docs]'
	@touch $(TESTS_READY)
