# Two commands, from a fresh clone with Python 3.11 or newer:
#   make demo         set up .venv, make a small set of machine sounds, train, evaluate, print the table
#   make test         set up .venv, lint, run the quick tests
#   make test-slow    run all tests
#   make gpu          eight minutes on a GPU: its speed, its tests, what bounds it, what to set
#   make paper        the published table: download, train four recipes with three seeds, evaluate, compare
# make demo TORCH=cpu sets up .venv with PyTorch without CUDA, from PyTorch's own index
# Variables of make paper: RECIPES="recipes/os_scl.yaml", SEEDS="2023 1 2", DATA=folder, EPOCH=300,
# OPTIONS="--batch_size 128"
PYTHON ?= python3
BIN := .venv/bin
DEMO_DATA := datasets/synthetic
DEMO_WEIGHTS := check_points/demo.pth
# a process for each core, with one thread
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH_PINS = $(shell grep '^torch' requirements.txt)
# Several makes in one folder install once, where flock of util-linux works
LOCKED := $(if $(shell flock Makefile true 2> /dev/null && echo yes),flock .venv.lock)
.DEFAULT_GOAL := help

PAPER_OPTIONS = $(if $(RECIPES),--recipes $(RECIPES)) $(if $(SEEDS),--seeds $(SEEDS)) \
	$(if $(DATA),--data_root '$(DATA)') $(if $(EPOCH),--epoch $(EPOCH)) $(OPTIONS)

.PHONY: help demo test pytest test-slow gpu paper lint

help:
	@sed -n '2,6s/^#   //p' Makefile

demo: .venv/installed
	$(BIN)/python datasets/synthesize.py --output $(DEMO_DATA)
	$(BIN)/python train.py --data_root $(DEMO_DATA) --machines auto --save_path $(DEMO_WEIGHTS) \
		--epoch 8 --batch_size 16 --lr 1e-3 --split_ratio 0.8 --overwrite
	$(BIN)/python eval.py $(DEMO_WEIGHTS) --data_root $(DEMO_DATA)
	@echo 'The machines of the demo are synthetic: its table says nothing about real ones.'

test: .venv/installed
	$(MAKE) --jobs=2 lint pytest

# Without TorchScript, of which PyTorch's modules for oneDNN are made: compiling them in each test
# takes a tenth of the time. make test-slow has it.
pytest: .venv/installed
	PYTORCH_JIT=0 $(PYTEST)

test-slow: lint
	$(PYTEST) -m "slow or not slow"

gpu: .venv/installed
	$(BIN)/python benchmarks/gpu.py

paper: .venv/installed
ifeq ($(patsubst ./%,%,$(DATA:/=)),$(DEMO_DATA))
	$(BIN)/python datasets/synthesize.py --output $(DEMO_DATA)
	$(BIN)/python reproduce.py --machines auto $(PAPER_OPTIONS)
else
	$(BIN)/python reproduce.py $(PAPER_OPTIONS)
endif

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/tach check

.venv/installed: requirements.txt requirements-export.txt tests/requirements.txt
	@command -v $(PYTHON) > /dev/null || { echo "error: no $(PYTHON) here: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $$($(PYTHON) --version) is too old, Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 2; }
	@$(LOCKED) sh -ec '[ -e $@ ] && [ -z "$$(find $^ -newer $@)" ] && exit; \
		echo "installing into .venv ($(if $(TORCH),PyTorch for $(TORCH),5.6 GB)), which takes some minutes"; \
		$(PYTHON) -m venv .venv; $(if $(TORCH),$(PIP) $(TORCH_PINS) --index-url https://download.pytorch.org/whl/$(TORCH);) \
		$(PIP) -r tests/requirements.txt; touch $@'
