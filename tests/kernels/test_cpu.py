# SPDX-License-Identifier: Apache-2.0
"""The CPU path is the reference to the bit."""

import pytest
import torch

from cna_kernels import DTYPES, EAGER, act_and_mul_scaled, act_and_mul_scaled_reference, cpu
from tests.kernels.cases import (
    ROUTINGS,
    WIDTHS,
    Tables,
    bits,
    inside_circuits,
    make_tables,
    make_x,
    same,
)


def assert_reference(x: torch.Tensor, tables: Tables, activation: str) -> None:
    out = act_and_mul_scaled(x, *tables, activation)
    expected = act_and_mul_scaled_reference(x, *tables, activation)
    assert out.dtype == x.dtype
    assert out.shape == (x.shape[0], x.shape[1] // 2)
    assert out.is_contiguous()
    assert same(out, expected)
    outside = ~inside_circuits(tables, *out.shape)
    idle = tables._replace(row_slot=torch.full_like(tables.row_slot, -1))
    plain = act_and_mul_scaled_reference(x, *idle, activation)
    assert torch.equal(bits(out[outside]), bits(plain[outside]))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("activation", sorted(EAGER))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype: torch.dtype, activation: str, width: int, routing: str) -> None:
    assert_reference(make_x(width, 9, dtype), make_tables(width, routing, 9), activation)


@pytest.mark.parametrize("pad", [0, 3, 16])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("width", [33, 1536])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_not_finite(dtype: torch.dtype, width: int, routing: str, pad: int) -> None:
    x = make_x(width, 9, dtype, hostile=True, pad=pad)
    assert_reference(x, make_tables(width, routing, 9), "silu")


@pytest.mark.parametrize("elements", [1, 64, 5000, cpu.MAX_ELEMENTS])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_blocks_of_rows_and_arms(
    monkeypatch: pytest.MonkeyPatch, routing: str, elements: int
) -> None:
    monkeypatch.setattr(cpu, "MAX_ELEMENTS", elements)
    x = make_x(33, 70, torch.bfloat16, hostile=True)
    assert_reference(x, make_tables(33, routing, 70), "silu")


@pytest.mark.parametrize("multiplier", [0.0, -0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_multiplier_writes_positive_zero(dtype: torch.dtype, multiplier: float) -> None:
    x = make_x(33, 7, dtype, hostile=True)
    tables = make_tables(33, "identical", 7)
    tables.slot_circuits[1] = torch.tensor([-1, -1, 2, -1])
    tables.slot_multipliers[1] = multiplier
    assert not bits(act_and_mul_scaled(x, *tables, "gelu")).any()


def test_no_rows() -> None:
    out = act_and_mul_scaled(torch.empty(0, 66), *make_tables(33, "padded", 0), "silu")
    assert out.shape == (0, 33)


def test_operands_are_left_as_they_are() -> None:
    x, tables = make_x(33, 9, torch.float32), make_tables(33, "distinct", 9)
    before = [operand.clone() for operand in (x, *tables)]
    act_and_mul_scaled(x, *tables, "silu")
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *tables), strict=True))


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="activation must be one of"):
        act_and_mul_scaled(torch.zeros(1, 66), *make_tables(33, "none", 1), "relu")
