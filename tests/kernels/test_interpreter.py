# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel, run by Triton's interpreter, against the reference."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.kernels import interpreter_worker


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    worker = subprocess.run(
        [sys.executable, interpreter_worker.__file__],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert worker.returncode == 0, worker.stderr
    result: dict[str, Any] = json.loads(worker.stdout)
    assert result["cases"] == len(interpreter_worker.CASES)
    return result


@pytest.mark.parametrize("name", [case.name for case in interpreter_worker.CASES])
def test_kernel(report: dict[str, Any], name: str) -> None:
    assert name not in report["failures"], report["failures"][name]


@pytest.mark.parametrize(("dtype", "activation", "signs"), interpreter_worker.EVERY_GATE)
def test_every_gate(report: dict[str, Any], dtype: Any, activation: str, signs: Any) -> None:
    name = f"every-gate-{dtype}-{activation}-{signs}"
    assert name not in report["failures"], report["failures"][name]


@pytest.mark.parametrize(("dtype", "width", "routing"), interpreter_worker.VECTOR_CASES)
def test_vectors(report: dict[str, Any], dtype: Any, width: int, routing: str) -> None:
    name = f"vectors-{dtype}-{width}-{routing}"
    assert name not in report["failures"], report["failures"][name]


@pytest.mark.parametrize(("dtype", "width", "routing"), interpreter_worker.VECTOR_CASES)
def test_in_place(report: dict[str, Any], dtype: Any, width: int, routing: str) -> None:
    name = f"in-place-{dtype}-{width}-{routing}"
    assert name not in report["failures"], report["failures"][name]


@pytest.mark.parametrize(
    ("dtype", "activation", "width", "routing"), interpreter_worker.AHEAD_CASES
)
def test_ahead(
    report: dict[str, Any], dtype: Any, activation: str, width: int, routing: str
) -> None:
    name = f"ahead-{dtype}-{activation}-{width}-{routing}"
    assert name not in report["failures"], report["failures"][name]


@pytest.mark.parametrize(("dtype", "width", "seed"), interpreter_worker.OVERFLOW_CASES)
def test_overflow(report: dict[str, Any], dtype: Any, width: int, seed: int) -> None:
    name = f"overflow-{dtype}-{width}-{seed}"
    assert name not in report["failures"], report["failures"][name]
