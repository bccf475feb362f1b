# SPDX-License-Identifier: Apache-2.0
# make help lists the targets.

VENV := .venv
BIN := $(VENV)/bin

# Small enough for a laptop; set either in the environment to override.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_LOGGING_LEVEL ?= WARNING

# Set-up leaves bytecode to the first import of a module; without it, every process compiles.
unexport PYTHONDONTWRITEBYTECODE

# Engines share a CPU well, but not the memory of one GPU.
TEST_JOBS ?= $(if $(shell nvidia-smi -L 2>/dev/null),0,2)

.PHONY: help setup demo test style compat rooms models bench bench-gpu
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: ## create .venv with everything for this machine, CUDA or CPU; quick when it is there
	@bash .ci/setup.sh

demo: setup ## the whole story on a small real model, in a few minutes on a CPU
	@$(BIN)/cna-vllm demo

style: setup ## lint and type checks
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup ## style, and all tests, those with a real engine included, on both supported vLLMs
	@$(MAKE) --no-print-directory style & style=$$!; bash .ci/browser.sh >/dev/null; \
	second=$$(bash .ci/second_engine.sh) || exit 1; \
	$(BIN)/python -m pytest -n $(TEST_JOBS) $(TEST_ARGS) || failed=1; \
	[ -z "$$second" ] || PYTHONPATH=$$second \
		$(BIN)/python -m pytest -n $(TEST_JOBS) -m versions $(TEST_ARGS) || failed=1; \
	wait $$style && [ -z "$$failed" ]

rooms: setup ## the parts of the package, and what each imports
	@$(BIN)/python -m tests.test_layering

models: setup ## what steering does for every model of this vLLM: ONLY="A B" for some, FROM=A to go on
	@$(BIN)/python -m tests.models_table $(if $(ONLY),--only $(ONLY)) $(if $(FROM),--from $(FROM))

compat: setup ## what another vLLM would break, without an engine: make compat VLLM=0.34.0
	@$(BIN)/python -m tests.compat $(VLLM)

bench: setup ## run every benchmark; add RECORD=1 to append to benchmarks/results
	@set -e; for name in act_and_mul_scaled fill block_keys accounting engine_throughput sweep discovery serving; do \
		echo "== $$name"; $(BIN)/python benchmarks/$$name.py $(if $(RECORD),--record); \
	done

bench-gpu: setup ## what this machine's GPU shows, in 10 minutes: rows and the README's table
	@PYTHONPATH=benchmarks$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m gpu $(if $(ONLY),--only $(ONLY))
