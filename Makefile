# Two commands, from a fresh clone with Python 3.11 or newer:
#   make demo    set up .venv, make a small set of machine sounds, train, evaluate, print the table
#   make test    set up .venv, lint, run the tests
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help

.PHONY: help venv demo lint test test-slow clean

help:
	@sed -n '2,3p' Makefile

venv: .venv/installed

.venv/installed: requirements.txt tests/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old: Python 3.11 or newer is needed (make PYTHON=python3.12)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@
