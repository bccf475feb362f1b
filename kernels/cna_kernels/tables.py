# SPDX-License-Identifier: Apache-2.0
"""Validation of the operands that route steering, for the time when they are built."""

import torch
from torch import Tensor

from cna_kernels.reference import mask_width


def check_tables(
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    masks: Tensor,
    *,
    intermediate_size: int,
) -> None:
    """row_slot[t] < A and -1 <= slot_circuits[a, k] < C: nothing the op reads is out of bounds.

    row_slot int32 [R], slot_circuits int32 [A, K], slot_multipliers float32 [A, K] and
    masks uint8 [C, ceil(intermediate_size / 8)] must be contiguous and on one device.
    The op itself trusts its operands; call this where they are built. It copies values to the
    host, so it must not run in a captured CUDA graph.
    Raises ValueError with one line that names the operand and what it must be.
    """
    expected = (
        ("row_slot", row_slot, torch.int32, 1),
        ("slot_circuits", slot_circuits, torch.int32, 2),
        ("slot_multipliers", slot_multipliers, torch.float32, 2),
        ("masks", masks, torch.uint8, 2),
    )
    for name, tensor, dtype, dims in expected:
        if tensor.dtype != dtype or tensor.dim() != dims:
            raise ValueError(
                f"{name} must be {dtype} with {dims} dimension(s), "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if tensor.device != row_slot.device:
            raise ValueError(f"{name} must be on {row_slot.device}, got {tensor.device}")
    if slot_circuits.shape != slot_multipliers.shape:
        raise ValueError(
            f"slot_multipliers must have the shape of slot_circuits {tuple(slot_circuits.shape)}, "
            f"got {tuple(slot_multipliers.shape)}"
        )
    if masks.shape[1] != mask_width(intermediate_size):
        raise ValueError(
            f"masks must have {mask_width(intermediate_size)} bytes a circuit for "
            f"intermediate_size {intermediate_size}, got {masks.shape[1]}"
        )
    _check_range("row_slot", row_slot, slot_circuits.shape[0])
    _check_range("slot_circuits", slot_circuits, masks.shape[0])


def _check_range(name: str, indices: Tensor, bound: int) -> None:
    if indices.numel() == 0:
        return
    low, high = (int(end) for end in indices.aminmax())
    if low < -1 or high >= bound:
        raise ValueError(f"{name} must hold -1 or indices below {bound}, got {low}..{high}")
