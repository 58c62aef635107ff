# Two commands do everything on a fresh machine: `make demo` and `make test`. Both find a Python,
# make the virtual environment .venv and install what they need; `make help` lists the rest.

VENV := .venv
LOWEST_VENV := .venv-lowest
PIP_FLAGS := --quiet --disable-pip-version-check
# Processes that run tests.
JOBS ?= 2
# More arguments for the benchmark: make bench BENCH_ARGS="--impl ours,cudnn --only 4096".
BENCH_ARGS ?=
# Which notebooks to run: make notebooks NOTEBOOKS=notebooks/01*.ipynb
NOTEBOOKS ?= notebooks/*.ipynb
# More arguments for pytest: make test PYTEST_ARGS="-k causal".
PYTEST_ARGS ?=

JAX_PLATFORMS ?= cpu
# One BLAS thread per test process: NumPy's would fight for the cores.
PYTEST := OPENBLAS_NUM_THREADS=1 JAX_PLATFORMS=$(JAX_PLATFORMS) python -m pytest -n $(JOBS)

# The summary goes to a folder named after the device. What is compared with needs no autotuning.
# Nearly all of the time is compiling, on the CPU: one test at a time to whoever is free.
GPU_TEST := XLA_FLAGS=--xla_gpu_autotune_level=0 XLA_PYTHON_CLIENT_PREALLOCATE=false \
	OPENBLAS_NUM_THREADS=1 python -m pytest -m gpu -n auto --maxprocesses=12 --maxschedchunk=1 \
	--gpu-summary benchmarks/results tests/test_gpu*.py

# The lower end of each range in pyproject.toml.
LOWEST := jax==0.11.2 jaxlib==0.11.2 flax==0.12.10

# An environment whose Python is gone (upgraded, say) is made again; so is what failed half-way.
_ := $(shell for v in $(VENV) $(LOWEST_VENV); do [ -x $$v/bin/python ] || rm -f $$v/*.stamp; done)
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo notebooks test test-lowest test-gpu bench bench-train report lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(VENV)/examples.stamp  ## train a small language model on a CPU or GPU (2 to 4 minutes)
	$(VENV)/bin/python examples/train_lm.py $(DEMO_ARGS)

notebooks: $(VENV)/notebooks.stamp  ## run the notebooks on this machine; results in out/notebooks
	$(VENV)/bin/python -m nbconvert --to notebook --execute --output-dir out/notebooks $(NOTEBOOKS)

test: $(VENV)/test.stamp  ## run the test suite
	. $(VENV)/bin/activate && $(PYTEST) $(PYTEST_ARGS)

test-lowest: $(LOWEST_VENV)/test.stamp  ## run its quick part on the lowest supported JAX
	. $(LOWEST_VENV)/bin/activate && $(PYTEST) -m "quick and not gpu" $(PYTEST_ARGS)

test-gpu: $(VENV)/test.stamp  ## run what needs a Hopper GPU, with every error in a JSON summary
	$(VENV)/bin/pip install $(PIP_FLAGS) -e ".[cuda]"
	. $(VENV)/bin/activate && $(GPU_TEST)

bench: $(VENV)/bench.stamp  ## measure against the peers that are installed, on a Hopper GPU
	$(VENV)/bin/pip install $(PIP_FLAGS) -e ".[cuda]"
	$(VENV)/bin/python -m benchmarks.run --suite grid $(BENCH_ARGS)

bench-train: $(VENV)/bench.stamp  ## measure a training step of a GPT, on a Hopper GPU
	$(VENV)/bin/pip install $(PIP_FLAGS) -e ".[cuda]"
	$(VENV)/bin/python -m benchmarks.train_step $(BENCH_ARGS)

report: $(VENV)/bench.stamp  ## make the README's speed table and the plots from the results
	$(VENV)/bin/python -m benchmarks.report
	$(VENV)/bin/python -m benchmarks.train_table
	$(VENV)/bin/python -m notebooks.figures

lint: $(VENV)/test.stamp  ## check style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/test.stamp  ## format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the virtual environments and what was generated
	rm -rf $(VENV) $(LOWEST_VENV) *.egg-info build dist out .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted install starts again.
$(VENV)/bin/python $(LOWEST_VENV)/bin/python:
	@python=$$(tools/find_python.sh) && echo "making $(@D:/bin=) with $$python" \
		&& "$$python" -m venv --clear $(@D:/bin=)

$(VENV)/%.stamp: pyproject.toml $(VENV)/bin/python
	@echo "installing pallas-flash[$*] into $(VENV)"
	@$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e ".[$*]"
	@touch $@

$(LOWEST_VENV)/%.stamp: pyproject.toml $(LOWEST_VENV)/bin/python
	@echo "installing pallas-flash[$*] on the lowest supported JAX into $(LOWEST_VENV)"
	@$(LOWEST_VENV)/bin/python -m pip install $(PIP_FLAGS) -e ".[$*]" $(LOWEST)
	@touch $@
