# SPDX-License-Identifier: Apache-2.0
"""``mark_overflow`` on the CPU: equal to the reference, and nothing else is written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cna_kernels import DTYPES, mark_overflow, mark_overflow_reference
from tests.kernels.cases import overflow_case

ARMS = 5


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(DTYPES, key=str)),
    st.integers(0, 9),
    st.sampled_from([1, 7, 64, 1030]),
    st.integers(0, 2**31 - 1),
)
def test_equals_the_reference(dtype: torch.dtype, rows: int, width: int, seed: int) -> None:
    hidden, row_slot = overflow_case(dtype, rows, width, ARMS, seed)
    marks = torch.arange(ARMS, dtype=torch.int32)
    expected = marks.clone()
    mark_overflow_reference(hidden, row_slot, expected, 77)
    mark_overflow(hidden, row_slot, marks, 77)
    assert torch.equal(marks, expected)


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str))
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_one_value_is_enough(dtype: torch.dtype, value: float) -> None:
    hidden = torch.ones(3, 1030, dtype=dtype)
    hidden[1, 1029] = hidden[2, 0] = value
    marks = torch.zeros(2, dtype=torch.int32)
    mark_overflow(hidden, torch.tensor([0, 1, -1, 0], dtype=torch.int32), marks, 3)
    assert marks.tolist() == [0, 3]


def test_the_largest_finite_values_are_none() -> None:
    for dtype in DTYPES:
        hidden = torch.full((2, 64), torch.finfo(dtype).max, dtype=dtype)
        marks = torch.zeros(1, dtype=torch.int32)
        mark_overflow(hidden, torch.zeros(2, dtype=torch.int32), marks, 3)
        assert marks.tolist() == [0]
        mark_overflow(hidden * 0, torch.zeros(2, dtype=torch.int32), marks, 3)
        assert marks.tolist() == [3]
