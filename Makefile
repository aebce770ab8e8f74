# Two commands are all a newcomer needs: `make demo` and `make test`.
# Each makes .venv if it is missing, installs the versions that constraints.txt pins, and builds the
# guards in C++, which takes ten seconds; without a C++ compiler, guards in Python do the same.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SUITE := -m pytest -n 2 --dist worksteal --doctest-modules --doctest-glob=README.md

# The oldest torch that is served, one between, and the newest Python. Each gets an environment.
COMPAT := python3.11-torch2.10.0 python3.12-torch2.11.0 python3.13-torch2.13.0
COMPAT_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/stepforge-compat

.PHONY: demo test check format compat $(COMPAT) numerics low-precision gpu-report host-time bench wheel clean

demo: $(READY)
	mkdir -p out
	$(BIN)/stepforge demo --output out/demo.html

test: check
	$(BIN)/python $(SUITE) --ignore=tests/structure

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/structure

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The suite on other versions, by hand before a release: an hour, and gigabytes of CUDA's libraries
# that come with torch. Environments stay in COMPAT_DIR. One of the names in COMPAT is a target too.
compat:
	$(MAKE) --keep-going $(COMPAT)

$(COMPAT): %: $(COMPAT_DIR)/%/.ready
	$(<D)/bin/python $(SUITE)

# What constraints.txt pins, but for torch and what follows from its version.
$(COMPAT_DIR)/%/.ready: pyproject.toml constraints.txt
	@$(call python_of,$*) -c '' || { echo "make $*: needs $(call python_of,$*) on the PATH"; exit 1; }
	$(call python_of,$*) -m venv --clear $(@D)
	grep -vE '^(torch|triton|setuptools)==' constraints.txt > $(@D)/constraints.txt
	echo 'torch==$(call torch_of,$*)' >> $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt --editable '.[dev]'
	touch $@

python_of = $(word 1,$(subst -torch, ,$1))
torch_of = $(word 2,$(subst -torch, ,$1))

# Measures rounding errors and writes docs/numerics.md.
numerics: $(READY)
	$(BIN)/python -m experiments.numerics

# Measures formats, trains runs that results.json lacks, and writes docs/low-precision.md.
low-precision: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.low_precision

# Compiles every kernel for GPUs that need not be there, into out/gpu.json and docs/gpus.md.
gpu-report: $(READY)
	$(BIN)/python -m experiments.gpu_report

# Times what a step costs the host of a GPU that need not be there, into docs/gpus.md.
host-time: $(READY)
	$(BIN)/python -m experiments.host_time

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
	-@$(BIN)/python -c 'from stepforge.extension import *; print("guards in", described(build_into_cache()))'
	touch $@

clean:
	rm -rf .venv out build dist *.egg-info
