# SPDX-License-Identifier: Apache-2.0
"""Registration of ``torch.ops.cna``, and its first op, ``act_and_mul_scaled``."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.library import Library

from cna_kernels.act_and_mul_scaled import INTERPRETED, act_and_mul_scaled_triton
from cna_kernels.cpu import act_and_mul_scaled_cpu

# Library rather than custom_op: the dispatcher then calls an implementation directly, 2.4 us
# over a plain Python call. The tag keeps Inductor from giving operands another stride order.
_LIBRARY: Final = Library("cna", "DEF")


def define_op(
    schema: str,
    triton: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any] = lambda *operands: None,
) -> Any:
    """Registers the op of a schema, and returns it. fake: its result's shape, if it has one."""
    name = schema.partition("(")[0]
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, triton, "CUDA")
    _LIBRARY.impl(name, triton if INTERPRETED else cpu, "CPU")
    torch.library.register_fake(f"cna::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.cna, name).default


_OP: Final = define_op(
    "act_and_mul_scaled(Tensor x, Tensor row_slot, Tensor slot_circuits, Tensor slot_multipliers, "
    "Tensor masks, str activation) -> Tensor",
    act_and_mul_scaled_triton,
    act_and_mul_scaled_cpu,
    lambda x, *operands: x.new_empty((x.shape[0], x.shape[1] // 2)),
)


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

    Operands are trusted: row_slot[t] < S and slot_circuits[a, k] < C. An unknown activation raises
    ValueError on the CPU and fails compilation of the Triton kernel.
    """
    out: Tensor = _OP(x, row_slot, slot_circuits, slot_multipliers, masks, activation)
    return out
