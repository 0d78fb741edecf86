# All commands of the project; .ci/run uses the same targets. They need only Python 3.11 or 3.12 and a package index.
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-cuda test-vllm check faults-short faults bench bench-recipe clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: .venv/.complete  ## make .venv, with everything that is needed (quick the second time)

demo: setup  ## fine-tune a real model through the real service, on this machine
	$(BIN)/python -m examples.demo

serve: setup  ## run the service on 127.0.0.1 until Ctrl-C; ARGS='--port 8001 --dashboard-port 8266'
	$(BIN)/python -m serve_app.local $(ARGS)

test: setup .venv-hf/.complete  ## run the test suite, all but the fault tests; ARGS='tests/events -x'
	$(PYTEST) --ignore=tests/faults --ignore=tests/cuda --ignore=tests/vllm $(ARGS)

test-cuda: .venv-cuda/.complete  ## test the code for GPUs on a stand-in for CUDA that computes nothing
	.venv-cuda/bin/python -m pytest -p no:cacheprovider tests/cuda $(ARGS)

test-vllm: .venv-vllm/.complete  ## run the tests of chat by vLLM, on the CPU
	.venv-vllm/bin/python -m pytest tests/vllm $(ARGS)

check: setup  ## lint, formatting, types, import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_import_rule.py

faults-short: setup  ## run each fault test briefly; ARGS='--faults-seed 7'
	$(PYTEST) tests/faults $(ARGS)

faults: setup  ## run the fault tests in full, for hours; ARGS='--faults-seed 7'
	$(BIN)/python -m pytest -s tests/faults --long --timeout=0 $(ARGS)

bench: setup  ## measure the service; writes benchmarks/README.md
	$(BIN)/python -m benchmarks.service $(ARGS)

bench-recipe: setup .venv-trl/.complete  ## measure training against torchtune and TRL; ARGS='--quick'
	$(BIN)/python -m benchmarks.recipe $(ARGS)

clean:  ## remove environments and caches; ~/.tunewright (your jobs) stays
	rm -rf .venv .venv-cuda .venv-hf .venv-trl .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.complete: pyproject.toml constraints.txt .ci/setup
	.ci/setup

.venv-hf/.complete: tests/hf/requirements.txt .ci/setup-hf
	.ci/setup-hf

.venv-cuda/.complete: .venv/.complete tests/cuda/requirements.txt .ci/setup-cuda
	.ci/setup-cuda

.venv-vllm/.complete: pyproject.toml tests/vllm/requirements.txt .ci/setup-vllm
	.ci/setup-vllm

.venv-trl/.complete: benchmarks/requirements-trl.txt tests/hf/requirements.txt .ci/setup-trl
	.ci/setup-trl
