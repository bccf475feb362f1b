# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel, run by Triton's interpreter, against the reference."""

import json
from typing import Any

import pytest

from tests.kernels import interpreter_worker
from tests.kernels.interpreted import run_interpreted


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run_interpreted(interpreter_worker.__file__))
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
