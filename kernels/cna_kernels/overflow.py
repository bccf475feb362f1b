# SPDX-License-Identifier: Apache-2.0
"""``mark_overflow``: which steered requests left the range of the model's dtype in this step.

A residual stream that holds an infinity or NaN keeps one to the end, so the last hidden state of a
row tells of every layer. A row of zeros tells too: a norm makes it of values whose squares leave
float32 (bfloat16 from 1.8e19 on), and of nothing else that a model computes.
"""

from typing import Any, Final

import triton
import triton.language as tl
from torch import Tensor

from cna_kernels.act_and_mul_scaled import INTERPRETED

BLOCK: Final = 1024


def mark_overflow_reference(hidden: Tensor, row_slot: Tensor, marks: Tensor, mark: int) -> None:
    """The definition of :func:`mark_overflow`, row by row."""
    for t in range(hidden.shape[0]):
        slot = int(row_slot[t])
        if slot >= 0 and not (bool(hidden[t].isfinite().all()) and bool((hidden[t] != 0).any())):
            marks[slot] = mark


@triton.jit(do_not_specialize=["mark"], do_not_specialize_on_alignment=["row_slot_ptr"])
def _mark_overflow_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr, row_slot_ptr, marks_ptr, mark, row_stride, size, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slot_ptr + row).to(tl.int64)
    if slot >= 0:
        # The largest magnitude is 0 for a row of zeros, and an infinity or NaN propagates: a
        # value less itself is 0 only if it is finite.
        largest = tl.zeros([BLOCK], tl.float32)
        spoiled = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            at = hidden_ptr + row * row_stride + channel
            value = tl.load(at, mask=channel < size, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(value))
            spoiled += tl.where(value - value == 0.0, 0.0, 1.0)
        if (tl.sum(spoiled, 0) > 0.0) | (tl.max(largest, 0) == 0.0):
            tl.store(marks_ptr + slot, mark)


def _mark_overflow_triton(hidden: Tensor, row_slot: Tensor, marks: Tensor, mark: int) -> None:
    rows, size = hidden.shape
    kernel: Any = _mark_overflow_kernel
    kernel[(rows,)](hidden, row_slot, marks, mark, hidden.stride(0), size, BLOCK=BLOCK)


def _mark_overflow_cpu(hidden: Tensor, row_slot: Tensor, marks: Tensor, mark: int) -> None:
    slots = row_slot[: hidden.shape[0]]
    steered = (slots >= 0).nonzero().squeeze(1)
    if not steered.numel():
        return
    rows = hidden[steered]
    sound = rows.isfinite().all(1) & (rows != 0).any(1)
    marks[slots[steered[~sound]].long()] = mark


def mark_overflow(hidden: Tensor, row_slot: Tensor, marks: Tensor, mark: int) -> None:
    """marks[row_slot[t]] = mark for every row t that is steered and is not finite, or all zero.

    Outside of a model's graph, one launch a step.

    Args:
        hidden: [T, H], the model's last hidden states; the last dimension is contiguous.
        row_slot: [>= T] int32, slot of each row, -1 = not steered. Rows past T are never read.
        marks: [A] int32, written in place; a mark of its own for each step needs no clearing.
        mark: what to write.

    Operands are trusted: row_slot[t] < A.
    """
    if hidden.is_cuda or INTERPRETED:
        _mark_overflow_triton(hidden, row_slot, marks, mark)
    else:
        _mark_overflow_cpu(hidden, row_slot, marks, mark)
