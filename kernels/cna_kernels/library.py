# SPDX-License-Identifier: Apache-2.0
"""Registration of ``torch.ops.cna.act_and_mul_scaled``."""

from typing import Final

import torch
from torch import Tensor
from torch.library import Library

from cna_kernels.act_and_mul_scaled import INTERPRETED, act_and_mul_scaled_triton
from cna_kernels.cpu import act_and_mul_scaled_cpu

# Library rather than custom_op: the dispatcher then calls an implementation directly, 2.4 us
# over a plain Python call. The tag keeps Inductor from giving x another stride order.
_LIBRARY: Final = Library("cna", "DEF")
_LIBRARY.define(
    "act_and_mul_scaled(Tensor x, Tensor row_slot, Tensor slot_circuits, Tensor slot_multipliers, "
    "Tensor masks, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _fake(
    x: Tensor,
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    masks: Tensor,
    activation: str,
) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


_CPU: Final = act_and_mul_scaled_triton if INTERPRETED else act_and_mul_scaled_cpu
for _key, _implementation in (("CUDA", act_and_mul_scaled_triton), ("CPU", _CPU)):
    _LIBRARY.impl("act_and_mul_scaled", _implementation, _key)
torch.library.register_fake("cna::act_and_mul_scaled", _fake, lib=_LIBRARY)

_OP: Final = torch.ops.cna.act_and_mul_scaled.default


def backend(device: torch.device) -> str:
    """Which implementation the op has on a device: "cuda", "cpu" or "interpreter"."""
    if device.type != "cpu":
        return device.type
    return "interpreter" if INTERPRETED else "cpu"


def act_and_mul_scaled(
    x: Tensor,
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    masks: Tensor,
    activation: str,
) -> Tensor:
    """out[t, j] = f(t, j) * a[t, j] with a = round(round(act(gate)) * up); calls the op.

    f(t, j) is the float32 product, in entry order, of the multipliers of those entries of slot
    row_slot[t] whose circuit holds channel j. Where no entry does, or row_slot[t] < 0, out is a to
    the bit. Where f == 0, out is exactly +0. Else f * a is a float32 product rounded once.

    Args:
        x: [T, 2 * I] float32, bfloat16 or float16; gate = x[:, :I], up = x[:, I:]. The last
            dimension is contiguous, the row stride may exceed 2 * I.
        row_slot: [>= T] int32, slot of each row, -1 = not steered. Rows past T are never read.
        slot_circuits: [S, K] int32, circuit rows of each slot; -1, anywhere, is an unused entry.
        slot_multipliers: [S, K] float32.
        masks: [C, ceil(I / 8)] uint8; bit value 1 << (j & 7) of byte j >> 3 is channel j.
        activation: "silu", "gelu_tanh" or "gelu" (erf).

    Returns:
        [T, I], dtype and device of x, contiguous.

    Operands are trusted: :func:`cna_kernels.check_tables` raises for what would be read out of
    bounds, where tables are built. An unknown activation raises ValueError on the CPU and fails
    compilation of the Triton kernel.
    """
    out: Tensor = _OP(x, row_slot, slot_circuits, slot_multipliers, masks, activation)
    return out
