# Two commands are all a newcomer needs: `make demo` and `make test`.
# Each makes .venv if it is missing and installs the versions that constraints.txt pins.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check format numerics low-precision bench wheel clean

demo: $(READY)
	mkdir -p out
	$(BIN)/stepforge demo --output out/demo.html

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal --doctest-modules --doctest-glob=README.md

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/structure

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Measures the rounding errors and writes docs/numerics.md.
numerics: $(READY)
	$(BIN)/python docs/make_numerics.py

# Measures formats, trains what docs/low_precision/results.json lacks, and writes docs/low-precision.md.
low-precision: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python docs/make_low_precision.py

# Times the step of every optimizer; a few minutes on a machine with nothing else to do.
bench: $(READY)
	mkdir -p out
	$(BIN)/python benchmarks/step.py --all --json out/bench.json

# Makes a wheel in dist/ that carries the kernels of all built-in optimizers; a minute or two.
wheel: $(READY)
	rm -rf build
	mkdir build
	$(BIN)/stepforge prebuild --output build/kernels
	STEPFORGE_KERNELS=build/kernels $(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stepforge needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv out build dist *.egg-info
