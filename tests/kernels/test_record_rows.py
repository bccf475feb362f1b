# SPDX-License-Identifier: Apache-2.0
"""``record_rows`` on the CPU: equal to the reference, and in place also when compiled."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cna_kernels import DTYPES, record_rows, record_rows_reference
from tests.kernels.cases import bits

OP = torch.ops.cna.record_rows.default


def make_rows(count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bits: infinities, NaN and both zeros are copied like the rest."""
    generator = torch.Generator().manual_seed(count + width)
    rows = torch.randn(count, width, generator=generator)
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    chosen = torch.rand(rows.shape, generator=generator) < 0.2
    rows[chosen] = special[torch.randint(5, (int(chosen.sum()),), generator=generator)]
    return rows.to(dtype)


def assert_reference(rows: torch.Tensor, row_slot: torch.Tensor, slots: int) -> None:
    stage = torch.full((slots, rows.shape[1]), 7.0, dtype=rows.dtype)
    expected = stage.clone()
    record_rows_reference(rows, row_slot, expected)
    before = rows.clone(), row_slot.clone(), stage.data_ptr()
    assert record_rows(rows, row_slot, stage) is None  # type: ignore[func-returns-value]
    assert torch.equal(bits(stage), bits(expected))
    assert torch.equal(bits(rows), bits(before[0]))
    assert torch.equal(row_slot, before[1])
    assert stage.data_ptr() == before[2]
    written = {int(slot) for slot in row_slot[: rows.shape[0]] if slot >= 0}
    untouched = [slot for slot in range(slots) if slot not in written]
    assert (stage[untouched] == 7.0).all()


@st.composite
def slots_of_rows(draw: st.DrawFn) -> tuple[list[int], int]:
    """Distinct slots below a number of slots, -1 for the other rows."""
    count, slots = draw(st.integers(0, 20)), draw(st.integers(1, 12))
    order = draw(st.permutations(range(slots)))
    chosen = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    left = iter(order)
    return [next(left, -1) if flag else -1 for flag in chosen], slots


@given(slots_of_rows(), st.sampled_from(DTYPES), st.sampled_from([1, 7, 33, 1100]))
@settings(max_examples=150, deadline=None)
def test_equals_reference(case: tuple[list[int], int], dtype: torch.dtype, width: int) -> None:
    row_slot, slots = case
    padding = [1 << 30] * 3  # past the rows: never read
    tensor = torch.tensor([*row_slot, *padding], dtype=torch.int32)
    assert_reference(make_rows(len(row_slot), width, dtype), tensor, slots)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_no_flags_all_rows(dtype: torch.dtype) -> None:
    def slots(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    assert_reference(make_rows(0, 9, dtype), slots([]), 3)
    assert_reference(make_rows(0, 9, dtype), slots([2, 1]), 3)
    assert_reference(make_rows(4, 9, dtype), slots([-1] * 4), 3)
    assert_reference(make_rows(4, 9, dtype), slots([2, 0, 3, 1]), 4)
    assert_reference(make_rows(1, 9, dtype), slots([0]), 1)


def test_ids_of_experts() -> None:
    ids = torch.tensor([[3, 1], [0, 2], [2, 3]], dtype=torch.int32)
    stage = torch.full((2, 2), -1, dtype=torch.int32)
    record_rows(ids, torch.tensor([-1, 1, -1], dtype=torch.int32), stage)
    assert stage.tolist() == [[-1, -1], [0, 2]]


class Recording(torch.nn.Module):
    """The use in a model: a buffer that a traced forward pass writes as a side effect."""

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        self.register_buffer("stage", torch.zeros(slots, width), persistent=False)

    def forward(self, x: torch.Tensor, row_slot: torch.Tensor) -> torch.Tensor:
        out = x.sin() * 2
        record_rows(out, row_slot, self.stage)
        return out.cos()


@torch.inference_mode()
def test_compiled_graphs_keep_the_effect() -> None:
    torch._dynamo.reset()
    eager, module = Recording(4, 9), Recording(4, 9)
    compiled: Any = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    address = module.stage.data_ptr()
    for step, row_slot in enumerate(([-1, 2, 0, -1, -1], [-1] * 7, [3, -1, 1, 2])):
        x = torch.randn(len(row_slot), 9, generator=torch.Generator().manual_seed(step))
        slots = torch.tensor([*row_slot, -1], dtype=torch.int32)
        assert torch.equal(compiled(x, slots), eager(x, slots))
        assert torch.equal(module.stage, eager.stage)
    assert module.stage.abs().sum(1).count_nonzero() == 4
    assert module.stage.data_ptr() == address


@torch.inference_mode()
def test_the_compiled_effect_is_before_later_reads() -> None:
    """The graph may neither drop the write nor move it behind a read of the same memory."""
    torch._dynamo.reset()

    def run(rows: torch.Tensor, row_slot: torch.Tensor, stage: torch.Tensor) -> torch.Tensor:
        before = stage.sum()
        record_rows(rows, row_slot, stage)
        return torch.stack([before, stage.sum()])

    compiled: Any = torch.compile(run, fullgraph=True, backend="aot_eager")
    stage = torch.zeros(2, 3)
    sums = compiled(torch.ones(2, 3), torch.tensor([-1, 1], dtype=torch.int32), stage)
    assert sums.tolist() == [0.0, 3.0]
    assert stage.tolist() == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    row_slot = torch.tensor([2, -1, 0, -1, 1, -1], dtype=torch.int32)
    torch.library.opcheck(OP, (rows, row_slot, torch.zeros(3, 9, dtype=dtype)))
    assert OP._schema.is_mutable
    assert [a.is_write for a in (arg.alias_info for arg in OP._schema.arguments) if a] == [True]
