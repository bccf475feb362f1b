# SPDX-License-Identifier: Apache-2.0
# make help lists the targets.

VENV := .venv
BIN := $(VENV)/bin

# Small enough for a laptop; set either in the environment to override.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_LOGGING_LEVEL ?= WARNING

.PHONY: help setup demo test style bench
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: ## create .venv with everything for this machine, CUDA or CPU; quick when it is there
	@bash .ci/setup.sh

demo: setup ## the whole story on a small real model, in a few minutes on a CPU
	@$(BIN)/cna-vllm demo

style: setup ## lint and type checks
	$(BIN)/ruff check .
	$(BIN)/mypy

test: style ## style, and all tests, those with a real engine included
	$(BIN)/python -m pytest

bench: setup ## run every benchmark; results go to benchmarks/results
	@set -e; for script in benchmarks/*.py; do \
		echo "== $$script"; $(BIN)/python "$$script"; \
	done
