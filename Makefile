# Two commands matter: `make demo` and `make test`. Both first see to the virtual environment in .venv.
# Another interpreter: make demo PYTHON=/path/to/python3.12

VENV_PYTHON := .venv/bin/python
export PYTHON
# Single-threaded ranks by default: the tests and the demo bring their own processes.
export OMP_NUM_THREADS ?= 1
# Tests side by side, a file at a time, so that what a file's tests share is made once: make test WORKERS=4
WORKERS ?= 2
PYTEST := $(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help setup vllm demo study study-quick test test-fast test-kernels test-vllm kernels lint docs doctor clean
.NOTPARALLEL:

help:
	@printf "%-18s %s\n" "make demo" "train a small model by SRFT on 2 processes (CPU or GPUs), write report and checkpoint"
	@printf "%-18s %s\n" "make study" "all methods with several seeds on one task, then a table: up to 3 hours (examples/study)"
	@printf "%-18s %s\n" "make study-quick" "a few of them, briefly: minutes (also: make study QUICK=1)"
	@printf "%-18s %s\n" "make test" "linter and all tests"
	@printf "%-18s %s\n" "make test-fast" "the tests that are not marked slow"
	@printf "%-18s %s\n" "make test-kernels" "the tests of the ops and their kernels alone"
	@printf "%-18s %s\n" "make vllm" "install vLLM's CPU build (3 GB) beside the rest; make test then tests the vLLM engine too"
	@printf "%-18s %s\n" "make test-vllm" "the same, and run the tests of the vLLM engine alone"
	@printf "%-18s %s\n" "make kernels" "compile csrc/ anew and show the compiler's output (make setup compiles it as well)"
	@printf "%-18s %s\n" "make lint" "ruff check and format check"
	@printf "%-18s %s\n" "make docs" "write docs/configuration.md anew from the docstrings in config/"
	@printf "%-18s %s\n" "make doctor" "what is installed, and what works on this machine"
	@printf "%-18s %s\n" "make clean" "remove .venv, build products and caches; runs/ stays"

# Any Python 3 may run the script; it picks the supported interpreter and says so when there is none.
setup:
	@for candidate in $(PYTHON) python3.11 python3.12 python3; do \
	    if $$candidate -c '' 2>/dev/null; then exec $$candidate tools/bootstrap.py; fi; \
	done; \
	echo "setup: no Python 3 found; install CPython 3.11 or 3.12, or name one: make setup PYTHON=/path/to/python3.11" >&2; \
	exit 1

demo: setup
	@$(VENV_PYTHON) tools/demo.py

study: setup
	@$(VENV_PYTHON) examples/study/study.py $(if $(QUICK),--quick)

study-quick: setup
	@$(VENV_PYTHON) examples/study/study.py --quick

test: lint
	@echo "running the tests ..."
	@$(PYTEST)

test-fast: setup
	@echo "running the tests that are not marked slow ..."
	@$(PYTEST) -m "not slow"

test-kernels: setup
	@$(PYTEST) tests/ops

# Once it is there, `make test` runs the tests of the vLLM engine too.
vllm: setup
	@$(VENV_PYTHON) tools/install_vllm.py

test-vllm: vllm
	@$(PYTEST) tests/rollout/vllm

kernels: setup
	@SRFT_NATIVE=1 $(VENV_PYTHON) setup.py build_ext --inplace

lint: setup
	@echo "linting ..."
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .

docs: setup
	@$(VENV_PYTHON) tools/config_docs.py

doctor: setup
	@$(VENV_PYTHON) -m megatron_srft.cli doctor

clean:
	rm -rf .venv .venv.lock build dist *.egg-info .pytest_cache .ruff_cache
	find megatron_srft tests tools examples -name __pycache__ -type d -prune -exec rm -rf {} +
