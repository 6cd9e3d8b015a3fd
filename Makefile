# `make demo` and `make test` work from a fresh clone: the first target that needs it builds .venv, later ones reuse it.
# Overridable:  make PYTHON=python3.12 demo    make UV= test  (pip even where uv is installed)
#   make PARALLEL= test  (the tests in one process)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV ?= $(or $(shell command -v uv 2>/dev/null),$(BIN)/uv)
PYTHON ?=
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3 python3.12 python3.11 python3.13 python)
VERSIONS := >=3.11,<3.14
PARALLEL ?= -n auto --dist loadfile

export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: help install demo test test-all lint types format docs bench clean

help:  ## Show this list
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

install: $(STAMP)  ## Build .venv with everything in it (other targets do so when needed)

demo: $(STAMP)  ## Federate three phantom hospitals on this machine; run again, it reuses their teachers
	@echo "==> fkd fit --config configs/quickstart.yaml --overwrite"
	@$(BIN)/fkd fit --config configs/quickstart.yaml --overwrite $(ARGS)

test: lint types  ## Check style and types, then run all tests but the slow ones
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-all: lint types  ## As test, with the slow tests
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow" $(ARGS)

lint: $(STAMP)  ## Check style and formatting (changes nothing)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## Check types (mypy --strict)
	$(BIN)/mypy

format: $(STAMP)  ## Repair style and formatting where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## Check README, docs and notebook: links, commands, keys, that all of it runs
	$(BIN)/python -m pytest tests/test_documents.py $(ARGS)

bench: $(STAMP)  ## Run the programs in benchmarks/, one after the other
	@shopt -s nullglob; programs=(benchmarks/[!_]*.py); \
	if [ $${#programs[@]} -eq 0 ]; then echo "There are no benchmarks yet."; fi; \
	for program in "$${programs[@]}"; do echo "==> $$program"; $(BIN)/python "$$program"; done

clean:  ## Remove caches and build output; .venv, runs, teachers and data stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist wandb lightning_logs check-data
	find src tests benchmarks notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
	find notebooks -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +

# The environment. The stamp is younger than what it was installed from, so that a second `make` starts at once.
# uv takes less time than pip; where there is none, pip fetches it. What uv cannot do (a mirror that only pip knows, a
# proxy), pip does. pip, without a cache, and a uv of our own unpack in .venv itself, so that no other disk fills up; a uv
# of yours has its cache.
PROJECT := -c constraints.txt -e '.[dev,notebooks,pretrained]'
UV_CACHE := $(if $(filter $(BIN)/uv,$(UV)),--cache-dir $(VENV)/.uv)
PIP := mkdir -p $(VENV)/.tmp; TMPDIR="$$(cd $(VENV)/.tmp && pwd)" \
  $(BIN)/python -m pip --disable-pip-version-check --no-cache-dir --quiet
FAILED := { rm -rf $(VENV)/.uv $(VENV)/.tmp; echo "error: it could not be installed, see above. $$(df -Pk $(VENV) \
  | awk 'NR == 2 { printf "%.1f", $$4 / 1e6 }') GB are free here; it takes about 7 in all." >&2; exit 1; }

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> Installing fkd-med and its tools into $(VENV) (a few minutes and about 7 GB the first time)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null 2>&1 || true
ifneq ($(UV),)
	@{ command -v '$(UV)' >/dev/null || { $(PIP) install uv; }; } \
	  && '$(UV)' pip install --quiet --compile-bytecode $(UV_CACHE) --python $(BIN)/python $(PROJECT) \
	  || { rm -rf $(VENV)/.uv; echo "==> uv could not do it; pip does, which takes longer"; $(PIP) install $(PROJECT); } \
	  || $(FAILED)
else
	@{ $(PIP) install $(PROJECT); } || $(FAILED)
endif
	@rm -rf $(VENV)/.uv $(VENV)/.tmp
	@touch $@

$(BIN)/python:
ifneq ($(filter-out $(BIN)/uv,$(UV)),)
	@echo "==> Making $(VENV) with uv"
	@UV_VENV_CLEAR=1 '$(UV)' venv --quiet --python '$(if $(PYTHON),$(PYTHON),$(VERSIONS))' $(VENV)
else
	@for python in $(CANDIDATES); do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then \
	    echo "==> Making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "error: $$python cannot make a virtual environment. Install its venv module (python3-venv on Debian" \
	      "and Ubuntu), or uv." >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "error: Python 3.11, 3.12 or 3.13 is needed, and none of these is: $(CANDIDATES)." \
	  "Install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
	exit 1
endif
