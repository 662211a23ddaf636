PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo.flashmoe
# Tests share the cores; a process of them takes up to 1 GB.
SPREAD := -n auto --maxprocesses 4 --dist worksteal

.PHONY: help setup demo test test-without-native lint cross bench clean

help:
	@echo "make setup   a virtual environment in $(VENV) with flashmoe and its development tools"
	@echo "make demo    repack the bundled model and ask it questions, its experts on disk"
	@echo "make test    run the tests"
	@echo "make test-without-native   the same (or TESTS=...) as if there were no C++ compiler"
	@echo "make lint    ruff and mypy"
	@echo "make cross   compile for macOS on ARM, and run the NEON kernels under emulation"
	@echo "make bench   decode speed over bank sizes, beside the resident model"
	@echo "make clean   remove what these targets made"

setup: $(VENV)/dev.stamp

NATIVE := $(wildcard flashmoe/native/*.cpp flashmoe/native/*.h flashmoe/native/*.inl)
LIBRARY := flashmoe/native/libflashmoe.so

$(VENV)/run.stamp: pyproject.toml setup.py flashmoe/native/build.py $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flashmoe needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

demo: $(VENV)/run.stamp
	$(BIN)/flashmoe repack flashmoe/demo $(DEMO) --force
	$(BIN)/flashmoe inspect $(DEMO)
	@echo
	@echo "Three questions with a bank of 2 MB for 18.9 MB of experts:"
	$(BIN)/flashmoe generate $(DEMO) --cache 2MB --stats -p "What is the capital of the United States?"
	$(BIN)/flashmoe generate $(DEMO) --cache 2MB --stats -p "What is a barn?"
	$(BIN)/flashmoe generate $(DEMO) --cache 2MB --stats -p "Define scent."
	@echo
	@echo "Talk to it: $(BIN)/flashmoe chat $(DEMO) --cache 2MB"

test: setup
	$(BIN)/python -m pytest $(SPREAD)

test-without-native: setup
	rm -f $(LIBRARY)
	$(BIN)/python -m pytest $(SPREAD) $(TESTS); status=$$?; \
	$(BIN)/python -m flashmoe.native.build && exit $$status

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Where the compiler does not install, the script says that it is missing.
cross: $(VENV)/run.stamp
	-$(BIN)/python -m pip install --quiet --group cross
	$(BIN)/python scripts/check_cross.py $(CROSS)

bench: setup
	$(BIN)/flashmoe bench resident

clean:
	rm -rf $(VENV) build dist *.egg-info flashmoe/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
