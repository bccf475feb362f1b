# SPDX-License-Identifier: Apache-2.0
"""``steer_gate_up``: steering ahead of an activation that somebody else fuses with more.

vLLM computes ``quantize(act(gate) * up)`` in one kernel, of its own or of its compiler's making.
Where such a kernel is to run on steered rows, it must find in ``gate`` and ``up`` what makes it
come to the steered value v = f * a. That is gate = 32 and up = v / 32:

* act(32) is 32 exactly, in SiLU and both GELUs, in float32 and in every narrower dtype: exp(-32) is
  far under the last place of 1.
* v / 32 is exact, and 32 * (v / 32) is v again, whether or not a kernel rounds to the dtype in
  between; infinities, NaN and the sign of zero survive. For bfloat16 from |v| = 2**-121 on.
* float16 has too few exponents for that: below 2**-9 the quotient is subnormal and loses bits.

Rows that are not steered, and channels whose factor is 1, keep their bits. A program is one warp,
and those of a row without a slot end after one load. A tile without a member costs its mask bytes;
else gate and up are read and written where a channel is steered, and nowhere else.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from cna_kernels.act_and_mul_scaled import steered_factor
from cna_kernels.activations import eager_activation
from cna_kernels.library import define_op
from cna_kernels.triton_activations import activate

CARRYING_DTYPES: Final = (torch.float32, torch.bfloat16)
"""The dtypes in which a pair of gate and up stands for any product."""

CARRIER: Final = 32.0
BLOCK: Final = 256
MAX_PROGRAMS: Final = 4096
"""Programs up to which a row is split: those that one H100 holds at a time, 32 an SM."""
MAX_ELEMENTS: Final = 1 << 21
"""Elements of the largest temporary on the CPU."""


@triton.jit(
    do_not_specialize_on_alignment=[
        "row_slot_ptr",
        "slot_circuits_ptr",
        "slot_multipliers_ptr",
        "masks_ptr",
    ]
)
def steer_gate_up_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    row_slot_ptr,
    slot_circuits_ptr,
    slot_multipliers_ptr,
    masks_ptr,
    x_row_stride,
    size,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CARRIER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slot_ptr + row).to(tl.int64)
    if slot >= 0:
        width = tl.cdiv(size, 8)
        x_row = x_ptr + row * x_row_stride
        bit = tl.arange(0, 8)
        step = BLOCK // 8
        for start in range(tl.program_id(1) * step, width, tl.num_programs(1) * step):
            byte = start + tl.arange(0, BLOCK // 8)
            present = tl.zeros([BLOCK // 8], tl.int32)
            for entry in tl.static_range(K):
                circuit = tl.load(slot_circuits_ptr + slot * K + entry).to(tl.int64)
                end = tl.where(circuit >= 0, width, 0)
                held = tl.load(masks_ptr + circuit * width + byte, mask=byte < end, other=0)
                present |= held.to(tl.int32)
            if tl.max(present, 0) != 0:
                # Few tiles come here, and they find the masks in the cache.
                factor = steered_factor(
                    slot, byte, width, slot_circuits_ptr, slot_multipliers_ptr, masks_ptr, K
                )
                channel = byte[:, None] * 8 + bit[None, :]
                steered = (factor != 1.0) & (channel < size)
                gate = tl.load(x_row + channel, mask=steered, other=0.0)
                up = tl.load(x_row + size + channel, mask=steered, other=0.0)
                # As in act_and_mul_scaled: act, the product and the scaled product are rounded.
                act = activate(gate, ACTIVATION)
                product = (act.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
                scaled = tl.where(factor == 0.0, 0.0, factor * product.to(tl.float32))
                carried = scaled.to(gate.dtype).to(tl.float32) * (1.0 / CARRIER)
                carrier = tl.full([BLOCK // 8, 8], CARRIER, tl.float32).to(gate.dtype)
                tl.store(x_row + channel, carrier, mask=steered)
                tl.store(x_row + size + channel, carried.to(gate.dtype), mask=steered)


def in_place_grid(rows: int, size: int) -> tuple[int, int]:
    """Programs of an op that writes only where a row is steered, of one warp each. The shape alone
    decides, so a launch can be captured and routing change afterwards."""
    return rows, max(1, min(-(-size // BLOCK), MAX_PROGRAMS // max(rows, 1)))


def _steer_gate_up_triton(
    x: Tensor,
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    masks: Tensor,
    activation: str,
) -> None:
    rows, size = x.shape[0], x.shape[1] // 2
    kernel: Any = steer_gate_up_kernel
    kernel[in_place_grid(rows, size)](
        x,
        row_slot,
        slot_circuits,
        slot_multipliers,
        masks,
        x.stride(0),
        size,
        K=slot_circuits.shape[1],
        ACTIVATION=activation,
        CARRIER=CARRIER,
        BLOCK=BLOCK,
        num_warps=1,
        enable_fp_fusion=False,
    )


def steer_gate_up_reference(
    x: Tensor,
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    masks: Tensor,
    activation: str,
) -> None:
    """The definition of :func:`steer_gate_up` in plain torch, and its CPU path."""
    size = x.shape[1] // 2
    act = eager_activation(activation)
    bits = torch.arange(8, dtype=torch.uint8, device=x.device)
    steered_rows = (row_slot[: x.shape[0]] >= 0).nonzero().squeeze(1)
    if not len(steered_rows):
        return
    for rows in steered_rows.split(max(1, MAX_ELEMENTS // size)):
        slots = row_slot[rows].long()
        factor = torch.ones(len(rows), size, dtype=torch.float32, device=x.device)
        for circuits, multipliers in zip(
            slot_circuits[slots].unbind(1), slot_multipliers[slots].unbind(1), strict=True
        ):
            held = masks[circuits.clamp(min=0).long()]
            member = ((held[:, :, None] >> bits) & 1).bool().flatten(1)[:, :size]
            member &= (circuits >= 0)[:, None]
            factor = torch.where(member, factor * multipliers[:, None], factor)
        gate, up = x[rows].chunk(2, 1)
        scaled = (factor * (act(gate) * up).float()).masked_fill(factor == 0, 0.0).to(x.dtype)
        changed = factor != 1
        pair = torch.where(changed, CARRIER, gate), torch.where(changed, scaled / CARRIER, up)
        x[rows] = torch.cat(pair, 1)


_OP: Final = define_op(
    "steer_gate_up(Tensor(a!) x, Tensor row_slot, Tensor slot_circuits, Tensor slot_multipliers, "
    "Tensor masks, str activation) -> ()",
    _steer_gate_up_triton,
    steer_gate_up_reference,
)


def steer_gate_up(
    x: Tensor,
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    masks: Tensor,
    activation: str,
) -> None:
    """Changes x in place so that act(gate) * up is ``act_and_mul_scaled(x, ...)``.

    Where the factor of a channel is not 1, gate becomes 32 and up a 32nd of the steered value:
    the product then is that value to the bit, computed and rounded in whatever way. All other
    elements keep their bits, so there the product is what its kernel makes of them.

    Args:
        x: [T, 2 * I], of one of CARRYING_DTYPES; gate = x[:, :I], up = x[:, I:]. The last
            dimension is contiguous, the row stride may exceed 2 * I.
        row_slot, slot_circuits, slot_multipliers, masks, activation: as for
            :func:`cna_kernels.act_and_mul_scaled`.
    """
    _OP(x, row_slot, slot_circuits, slot_multipliers, masks, activation)
