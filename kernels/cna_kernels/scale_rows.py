# SPDX-License-Identifier: Apache-2.0
"""``scale_rows``: scales chosen channels of an activation's rows in place.

For MLPs whose activation is not one that ``act_and_mul_scaled`` has: it runs before, as it stands,
and this op changes what a circuit holds and nothing else. So rows that are not steered, and
channels outside a row's circuits, keep the bits of whatever computed them.

A program is one warp, and those of a row without a slot end after one load. A tile without a
member costs its mask bytes; else the rows are read and written where a channel is steered, and
nowhere else. The grid is fixed by the shape of a and nothing is allocated, so a launch can be
captured in a CUDA graph and routing may change between replays.
"""

from typing import Any, Final

import triton
import triton.language as tl
from torch import Tensor

from cna_kernels.act_and_mul_scaled import steered_factor
from cna_kernels.cpu import scale_rows_cpu
from cna_kernels.library import define_op
from cna_kernels.reference import scale_reference
from cna_kernels.steer_gate_up import BLOCK, in_place_grid


def scale_rows_reference(
    a: Tensor, row_slot: Tensor, slot_circuits: Tensor, slot_multipliers: Tensor, masks: Tensor
) -> None:
    """The definition of :func:`scale_rows`."""
    a.copy_(scale_reference(a, row_slot, slot_circuits, slot_multipliers, masks))


@triton.jit(
    do_not_specialize_on_alignment=[
        "row_slot_ptr",
        "slot_circuits_ptr",
        "slot_multipliers_ptr",
        "masks_ptr",
    ]
)
def scale_rows_kernel(  # type: ignore[no-untyped-def]
    a_ptr,
    row_slot_ptr,
    slot_circuits_ptr,
    slot_multipliers_ptr,
    masks_ptr,
    a_row_stride,
    size,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slot_ptr + row).to(tl.int64)
    if slot >= 0:
        width = tl.cdiv(size, 8)
        a_row = a_ptr + row * a_row_stride
        bit = tl.arange(0, 8)
        step = BLOCK // 8
        for start in range(tl.program_id(1) * step, width, tl.num_programs(1) * step):
            byte = start + tl.arange(0, BLOCK // 8)
            factor = steered_factor(
                slot, byte, width, slot_circuits_ptr, slot_multipliers_ptr, masks_ptr, K
            )
            channel = byte[:, None] * 8 + bit[None, :]
            # A factor of 1, too, leaves what is there, NaNs included.
            steered = (factor != 1.0) & (channel < size)
            value = tl.load(a_row + channel, mask=steered, other=0.0)
            # +0 whatever the value, so an infinity never turns into NaN.
            scaled = tl.where(factor == 0.0, 0.0, factor * value.to(tl.float32))
            tl.store(a_row + channel, scaled.to(value.dtype), mask=steered)


def scale_rows_triton(
    a: Tensor, row_slot: Tensor, slot_circuits: Tensor, slot_multipliers: Tensor, masks: Tensor
) -> None:
    """See :func:`scale_rows`, which dispatches here; fused multiply-adds are off."""
    rows, size = a.shape
    kernel: Any = scale_rows_kernel
    kernel[in_place_grid(rows, size)](
        a,
        row_slot,
        slot_circuits,
        slot_multipliers,
        masks,
        a.stride(0),
        size,
        K=slot_circuits.shape[1],
        BLOCK=BLOCK,
        num_warps=1,
        enable_fp_fusion=False,
    )


_OP: Final = define_op(
    "scale_rows(Tensor(a!) a, Tensor row_slot, Tensor slot_circuits, Tensor slot_multipliers, "
    "Tensor masks) -> ()",
    scale_rows_triton,
    scale_rows_cpu,
)


def scale_rows(
    a: Tensor, row_slot: Tensor, slot_circuits: Tensor, slot_multipliers: Tensor, masks: Tensor
) -> None:
    """a[t, j] = f(t, j) * a[t, j], in place, with f as in :func:`cna_kernels.act_and_mul_scaled`.

    Where no entry holds j, or row_slot[t] < 0, a keeps its bits. Where f == 0, a becomes exactly
    +0. Else f * a is a float32 product rounded once.

    Args:
        a: [T, I] float32, bfloat16 or float16, written in place. The last dimension is contiguous,
            the row stride may exceed I.
        row_slot, slot_circuits, slot_multipliers, masks: as for
            :func:`cna_kernels.act_and_mul_scaled`.
    """
    _OP(a, row_slot, slot_circuits, slot_multipliers, masks)
