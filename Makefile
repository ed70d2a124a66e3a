# Everything runs in .venv, made with the first Python >= 3.11 on PATH (or PYTHON=...).
# Without a GPU on Linux, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes.
CANDIDATES := python3 python python3.13 python3.12 python3.11 python3.14
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	"$$p" -c '$(USABLE)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
export PIP_DISABLE_PIP_VERSION_CHECK := 1
INSTALL = $(1)/bin/python -m pip install --quiet -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
INPUTS := pyproject.toml constraints.txt

.PHONY: quickstart test test-all lint check format docs bench-peers clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/ardor quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n auto -m "not slow"

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n auto

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/python -m pytest -q tests/test_layers.py tests/test_budget.py

check: lint
	$(BIN)/python -m pytest -q -n auto -m "not slow and not sweep"

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-test
	$(BIN)/python -m tests.parity.docs

bench-peers: $(PEERS)/.installed

# A stamp is newer than what it was made from, so nothing is installed twice.
$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo "ardor needs Python 3.11 or newer (with venv) on PATH; found: $$(python3 --version 2>&1)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "installing ardor into $(VENV) (torch is large: the first time takes a while)"
	$(call INSTALL,$(VENV)) -e .
	@touch $@

$(VENV)/.installed-test: $(INPUTS) | $(BIN)/python
	@echo "installing ardor and what its tests need into $(VENV)"
	$(call INSTALL,$(VENV)) -e '.[test]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing ardor and its developer tools into $(VENV)"
	$(call INSTALL,$(VENV)) -e '.[test,dev]'
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

$(PEERS)/.installed: constraints.txt
	@test -n "$(PYTHON)" || { echo "ardor needs Python 3.11 or newer on PATH" >&2; exit 2; }
	"$(PYTHON)" -m venv $(PEERS)
	$(call INSTALL,$(PEERS)) torch transformers peft trl accelerate datasets bitsandbytes jaxtyping
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
