#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Creates .venv with this package, vLLM for this machine, and the development tools.
# Run again, it does nothing until pyproject.toml or this script changes.
# CNA_DEVICE=cpu|cuda overrides the choice; PYTHON=... names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
LOG=$VENV/setup.log
STAMP=$VENV/setup.stamp
# PyTorch's documented home of the CPU wheels (torch==X+cpu), which other indexes do not carry.
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

# Bytecode comes with the first import of a module: that of all takes pip longer than the rest.
unset PYTHONDONTWRITEBYTECODE

device() {
    if [[ -n ${CNA_DEVICE:-} ]]; then
        echo "$CNA_DEVICE"
    elif [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then
        echo cuda
    else
        echo cpu
    fi
}

fail() {
    echo "setup: $1" >&2
    exit 1
}

# The first interpreter that runs, is at least 3.11 and can make environments. vLLM for CPUs has
# wheels for 3.11 first, so there that one comes first.
find_python() {
    local order="python3.13 python3.12 python3.11 python3"
    [[ $1 == cpu ]] && order="python3.11 python3.12 python3.13 python3"
    local candidate
    for candidate in ${PYTHON:-$order}; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer with its venv module; install one or set PYTHON=..."
}

# One line a stage on the terminal; what the stage prints goes to the log.
stage() {
    echo "setup: $1"
    shift
    echo "== $*" >>"$LOG"
    "$@" >>"$LOG" 2>&1
}

fail_with_log() {
    echo "setup: failed; the end of $LOG:" >&2
    tail -n 25 "$LOG" >&2
    exit 1
}

pip() {
    "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"
}

install() {
    local extras=$1
    local start
    start=$(($(wc -l <"$LOG") + 1))
    stage "installing (several GB, a few minutes)" pip install --no-compile -e ".[$extras]" && return
    if [[ $extras == cpu,* ]] && tail -n "+$start" "$LOG" | grep -Eq 'torch==[0-9.]+\+cpu'; then
        stage "again, with PyTorch's CPU wheels" \
            pip install --no-compile -e ".[$extras]" --extra-index-url "$TORCH_CPU_INDEX" && return
    fi
    return 1
}

# These three come in as dependencies, but their builds do not always fit the CPU build of torch,
# and transformers cannot be imported beside a broken one. Text generation needs none of them.
remove_broken() {
    local broken
    broken=$("$VENV/bin/python" -c '
import importlib.metadata, os, torch
installed = {found.name for found in importlib.metadata.distributions()}
for name in {"torchvision", "torchaudio", "torchcodec"} & installed:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        __import__(name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
')
    # shellcheck disable=SC2086  # one word a package
    [[ -z $broken ]] || pip uninstall -y $broken
}

main() {
    local kind key python
    kind=$(device)
    [[ $kind == cpu || $kind == cuda ]] || fail "CNA_DEVICE must be cpu or cuda, not '$kind'"
    key="$kind $(cat pyproject.toml .ci/setup.sh | sha256sum | cut -d' ' -f1)"
    if [[ -f $STAMP && $(<"$STAMP") == "$key" ]]; then
        return
    fi
    if ! "$VENV/bin/python" -c '' 2>/dev/null; then
        python=$(find_python "$kind")
        echo "setup: creating $VENV with $("$python" --version) for $kind"
        "$python" -m venv --clear "$VENV"
    fi
    : >"$LOG"
    install "$kind,dev" || fail_with_log
    stage "checking optional packages" remove_broken || fail_with_log
    stage "checking the result" "$VENV/bin/python" -c 'import torch, transformers, vllm, cna_vllm' ||
        fail_with_log
    echo "$key" >"$STAMP"
}

main "$@"
