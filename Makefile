# `make quickstart` and `make test` are all a new user needs; both create .venv themselves.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test check benchmarks gpu-wheels clean

quickstart: .venv/installed
	$(BIN)/yoco-u quickstart

test: check
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror yoco_u/inference/kernels/cpu/*.cpp yoco_u/inference/kernels/cpu/*.h

benchmarks: .venv/installed
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/attention.py

# For benchmarks/gpu.py on a machine without a package index: Linux, x86-64, Python 3.12.
gpu-wheels: .venv/installed
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.12 --implementation cp \
		--platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --requirement benchmarks/gpu_wheels.txt --dest benchmarks/wheels
	@du --human-readable --summarize benchmarks/wheels

.venv/installed: pyproject.toml constraints.txt
	@echo "creating .venv and installing yoco-u (a minute or two)"
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing the test tools"
	$(INSTALL) --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv runs datasets benchmarks/wheels
