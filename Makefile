# `make quickstart` and `make test` are all a new user needs; both create .venv themselves.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

# Python keeps the byte code of what is imported, and of nothing else: the installation does not compile, so that must be on.
unexport PYTHONDONTWRITEBYTECODE

define install
	$(PYTHON) -m venv .venv
	$(PIP) install --no-compile --constraint constraints.txt --editable '$(1)'
endef

.PHONY: quickstart talk test pytest check format mypy benchmarks gpu-wheels clean

quickstart: .venv/installed
	$(BIN)/yoco-u quickstart

MINUTES := 20

# Fetches a small chat model, converts it to a YOCO-U, heals it for so many minutes, and opens a chat with it.
talk: .venv/installed
	@$(BIN)/python -c 'import accelerate, gguf' 2> /dev/null || $(PIP) install --no-compile --constraint constraints.txt --editable '.[conversion]'
	$(BIN)/python recipes/talk.py --minutes $(MINUTES)

test: format
	@$(MAKE) --no-print-directory --jobs 2 mypy .venv/compiled
	@$(MAKE) --no-print-directory pytest

# Compiles to byte code what the tests import, once: else each of pytest's processes would, all at the same time.
.venv/compiled: .venv/installed-dev
	-@$(BIN)/pytest --collect-only > /dev/null 2>&1
	@touch $@

# One process more than there are cores, since some tests wait for processes of their own.
pytest: .venv/compiled
	$(BIN)/pytest --numprocesses $$($(PYTHON) -c 'import os; print(min(4, os.cpu_count() + 1))') --dist loadfile --no-loadscope-reorder

check: format mypy

mypy: .venv/installed-dev
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror yoco_u/inference/kernels/cpu/*.cpp yoco_u/inference/kernels/cpu/*.h

benchmarks: .venv/installed
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/attention.py

# For benchmarks/gpu.py on a machine without a package index: Linux, x86-64, Python 3.12.
gpu-wheels: .venv/installed
	$(PIP) download --no-deps --only-binary :all: --python-version 3.12 --implementation cp \
		--platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --requirement benchmarks/gpu_wheels.txt --dest benchmarks/wheels
	@du --human-readable --summarize benchmarks/wheels

.venv/installed: pyproject.toml constraints.txt
	@echo "creating .venv and installing yoco-u (a minute or two)"
	$(call install,.)
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt
	@echo "creating .venv and installing yoco-u and the test tools (a minute or two)"
	$(call install,.[dev])
	@touch .venv/installed $@

clean:
	rm -rf .venv benchmarks/wheels
