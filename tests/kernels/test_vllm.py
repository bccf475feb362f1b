# SPDX-License-Identifier: Apache-2.0
"""On the CPU a row that is not steered has the bits of vLLM's own eager activation."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cna_kernels import DTYPES, act_and_mul_scaled
from tests.kernels.cases import WIDTHS, bits, make_tables, make_x


@pytest.fixture(scope="module")
def forward_native() -> dict[str, Callable[[torch.Tensor], Any]]:
    layers = pytest.importorskip("vllm.model_executor.layers.activation")
    gelu = layers.GeluAndMul.forward_native
    return {
        "silu": layers.SiluAndMul.forward_native,
        "gelu": lambda x: gelu(SimpleNamespace(approximate="none"), x),
        "gelu_tanh": lambda x: gelu(SimpleNamespace(approximate="tanh"), x),
    }


@pytest.mark.parametrize("rows", [1, 8, 200])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unsteered_rows_are_vllm(
    forward_native: dict[str, Callable[[torch.Tensor], Any]],
    dtype: torch.dtype,
    activation: str,
    width: int,
    rows: int,
) -> None:
    x = make_x(width, rows, dtype, hostile=True)
    expected = forward_native[activation](x)
    tables = make_tables(width, "skewed", rows)
    out = act_and_mul_scaled(x, *tables, activation)
    unsteered = tables.row_slot[:rows] < 0
    assert torch.equal(bits(out[unsteered]), bits(expected[unsteered]))
    idle = tables._replace(row_slot=torch.full((rows,), -1, dtype=torch.int32))
    assert torch.equal(bits(act_and_mul_scaled(x, *idle, activation)), bits(expected))
