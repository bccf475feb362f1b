# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of ``act_and_mul_scaled`` and its launcher.

The work is bound by memory: two elements read and one written, plus one mask bit, an output.
One program computes BLOCK channels of one row as a tile [BLOCK / 8, 8]:

* A tile row is 8 adjacent channels, so one mask byte serves it. The masks are read one byte a
  tile row and broadcast over the bits, not gathered 8 times.
* A tile row of a 16-bit dtype is 16 bytes. BLOCK = 1024 over 128 threads gives every thread one
  tile row: gate, up and out move as one 128-bit access each (two for float32). Twice the threads
  would halve the access (AMD's 4 warps are 256 threads, so it gets 2). A larger BLOCK would not
  widen it, and would leave more of the last block idle (I = 1536 fills 1.5 blocks).
* A row that is not steered costs one 4-byte load and a scalar branch.
* What a steered row reads is asked for before gate and up are needed. An entry is branched on:
  nearly all requests have one circuit, and an unused entry then costs 3 instructions a thread.
* The grid is fixed by the shape of x and nothing is allocated but the output, so a launch can be
  captured in a CUDA graph and routing may change between replays.

Rounding is that of eager torch: act, rounded to the dtype (see
``triton_activations``); product in float32, rounded; product with the factor in float32, rounded.
Contraction into fused multiply-adds is off, so that a float32 result does not depend on what a
compiler version chooses to fuse.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from cna_kernels.triton_activations import activate

INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
"""Whether ``triton.jit`` below made interpreted kernels, which also run on CPU tensors."""

BLOCK: Final = 1024
NUM_WARPS: Final = 4 if torch.version.hip is None else 2


@triton.jit
def steered_factor(  # type: ignore[no-untyped-def]
    slot,
    byte,
    width,
    slot_circuits_ptr,
    slot_multipliers_ptr,
    masks_ptr,
    K: tl.constexpr,
):
    """float32 [bytes, 8]: of each channel of the mask bytes ``byte``, the product, in entry order,
    of the multipliers of the slot's circuits that hold it. width: bytes of a mask."""
    bit = tl.arange(0, 8)
    factor = tl.full([byte.shape[0], 8], 1.0, tl.float32)
    for entry in tl.static_range(K):
        circuit = tl.load(slot_circuits_ptr + slot * K + entry).to(tl.int64)
        if circuit >= 0:
            multiplier = tl.load(slot_multipliers_ptr + slot * K + entry)
            held = tl.load(masks_ptr + circuit * width + byte, mask=byte < width, other=0)
            member = ((held.to(tl.int32)[:, None] >> bit[None, :]) & 1) != 0
            factor = tl.where(member, factor * multiplier, factor)
    return factor


# The steering operands are read by the byte or the word: their alignment must not select
# another compiled variant, or a layer's slice of a larger table could compile during serving.
@triton.jit(
    do_not_specialize_on_alignment=[
        "row_slot_ptr",
        "slot_circuits_ptr",
        "slot_multipliers_ptr",
        "masks_ptr",
    ]
)
def act_and_mul_scaled_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    x_ptr,
    row_slot_ptr,
    slot_circuits_ptr,
    slot_multipliers_ptr,
    masks_ptr,
    x_row_stride,
    size,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slot_ptr + row).to(tl.int64)

    byte = tl.program_id(1) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)
    channel = byte[:, None] * 8 + bit[None, :]
    live = channel < size

    x_row = x_ptr + row * x_row_stride
    gate = tl.load(x_row + channel, mask=live, other=0.0)
    up = tl.load(x_row + size + channel, mask=live, other=0.0)

    factor = tl.full([BLOCK // 8, 8], 1.0, tl.float32)
    if slot >= 0:
        width = tl.cdiv(size, 8)
        factor = steered_factor(
            slot, byte, width, slot_circuits_ptr, slot_multipliers_ptr, masks_ptr, K
        )

    act = activate(gate, ACTIVATION)
    out = (act.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    if slot >= 0:
        # factor == 1 is every channel outside the circuits: out keeps its bits, NaNs included.
        # factor == 0 writes +0 whatever the activation, so an infinity never turns into NaN.
        scaled = tl.where(factor == 0.0, 0.0, factor * out.to(tl.float32)).to(gate.dtype)
        out = tl.where(factor == 1.0, out, scaled)

    tl.store(out_ptr + row * size + channel, out, mask=live)


def act_and_mul_scaled_triton(
    x: Tensor,
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    masks: Tensor,
    activation: str,
) -> Tensor:
    """out[t, j] = f * (act(gate) * up)[t, j], launched on the current stream of x's device.

    Operands as for :func:`cna_kernels.act_and_mul_scaled`, which dispatches here. The current
    device must be that of x. An unknown activation fails when the kernel is compiled.
    """
    rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    # The launch operator of a jitted function is typed for plain functions only.
    kernel: Any = act_and_mul_scaled_kernel
    kernel[(rows, -(-size // BLOCK))](
        out,
        x,
        row_slot,
        slot_circuits,
        slot_multipliers,
        masks,
        x.stride(0),
        size,
        K=slot_circuits.shape[1],
        ACTIVATION=activation,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out
