# SPDX-License-Identifier: Apache-2.0
"""Validation of the operands that route steering, for the time when they are built."""

import torch
from torch import Tensor

from cna_kernels.reference import mask_width


def check_tables(
    row_arm: Tensor,
    arm_circuits: Tensor,
    arm_multipliers: Tensor,
    masks: Tensor,
    *,
    intermediate_size: int,
) -> None:
    """row_arm[t] < A and -1 <= arm_circuits[a, k] < C: nothing the op reads is out of bounds.

    row_arm int32 [R], arm_circuits int32 [A, K], arm_multipliers float32 [A, K] and
    masks uint8 [C, ceil(intermediate_size / 8)] must be contiguous and on one device.
    The op itself trusts its operands; call this where they are built. It copies values to the
    host, so it must not run in a captured CUDA graph.
    Raises ValueError with one line that names the operand and what it must be.
    """
    expected = (
        ("row_arm", row_arm, torch.int32, 1),
        ("arm_circuits", arm_circuits, torch.int32, 2),
        ("arm_multipliers", arm_multipliers, torch.float32, 2),
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
        if tensor.device != row_arm.device:
            raise ValueError(f"{name} must be on {row_arm.device}, got {tensor.device}")
    if arm_circuits.shape != arm_multipliers.shape:
        raise ValueError(
            f"arm_multipliers must have the shape of arm_circuits {tuple(arm_circuits.shape)}, "
            f"got {tuple(arm_multipliers.shape)}"
        )
    if masks.shape[1] != mask_width(intermediate_size):
        raise ValueError(
            f"masks must have {mask_width(intermediate_size)} bytes a circuit for "
            f"intermediate_size {intermediate_size}, got {masks.shape[1]}"
        )
    _check_range("row_arm", row_arm, arm_circuits.shape[0])
    _check_range("arm_circuits", arm_circuits, masks.shape[0])


def _check_range(name: str, indices: Tensor, bound: int) -> None:
    if indices.numel() == 0:
        return
    low, high = (int(end) for end in indices.aminmax())
    if low < -1 or high >= bound:
        raise ValueError(f"{name} must hold -1 or indices below {bound}, got {low}..{high}")
