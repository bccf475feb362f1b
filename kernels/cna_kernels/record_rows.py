# SPDX-License-Identifier: Apache-2.0
"""``record_rows``: copies flagged rows of an activation to staging slots."""

from typing import Any, Final

import triton
import triton.language as tl
from torch import Tensor

from cna_kernels.library import define_op

BLOCK: Final = 1024


def record_rows_reference(rows: Tensor, row_stage: Tensor, stage: Tensor) -> None:
    """stage[row_stage[t]] = rows[t] for every row t with row_stage[t] >= 0, row by row."""
    for t in range(rows.shape[0]):
        slot = int(row_stage[t])
        if slot >= 0:
            stage[slot] = rows[t]


@triton.jit(do_not_specialize_on_alignment=["row_stage_ptr"])
def _record_rows_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, row_stage_ptr, stage_ptr, size, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_stage_ptr + row).to(tl.int64)
    if slot >= 0:
        channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        live = channel < size
        values = tl.load(rows_ptr + row * size + channel, mask=live)
        tl.store(stage_ptr + slot * size + channel, values, mask=live)


def _record_rows_triton(rows: Tensor, row_stage: Tensor, stage: Tensor) -> None:
    size = rows.shape[1]
    kernel: Any = _record_rows_kernel
    kernel[(rows.shape[0], -(-size // BLOCK))](rows, row_stage, stage, size, BLOCK=BLOCK)


def _record_rows_cpu(rows: Tensor, row_stage: Tensor, stage: Tensor) -> None:
    stages = row_stage[: rows.shape[0]]
    flagged = (stages >= 0).nonzero().squeeze(1)
    if flagged.numel():
        stage.index_copy_(0, stages[flagged].long(), rows[flagged])


_OP: Final = define_op(
    "record_rows(Tensor rows, Tensor row_stage, Tensor(a!) stage) -> ()",
    _record_rows_triton,
    _record_rows_cpu,
)


def record_rows(rows: Tensor, row_stage: Tensor, stage: Tensor) -> None:
    """stage[row_stage[t]] = rows[t] for every row t with row_stage[t] >= 0.

    Args:
        rows: [T, I] of any dtype, contiguous.
        row_stage: [>= T] int32, the staging slot of each row, -1 = not recorded; slots of one call
            are distinct. Rows past T are never read.
        stage: [S, I], dtype and device of rows, contiguous; written in place.

    Operands are trusted: a slot must be below S.
    """
    _OP(rows, row_stage, stage)
