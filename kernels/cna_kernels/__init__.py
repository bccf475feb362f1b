# SPDX-License-Identifier: Apache-2.0
"""Fused gated activation that scales chosen channels row by row; vectors added row by row."""

from cna_kernels.activations import DTYPES, EAGER
from cna_kernels.add_vectors import add_vectors, add_vectors_reference
from cna_kernels.library import act_and_mul_scaled, backend
from cna_kernels.overflow import mark_overflow, mark_overflow_reference
from cna_kernels.record_rows import record_rows, record_rows_reference
from cna_kernels.reference import (
    act_and_mul_scaled_reference,
    mask_width,
    pack_mask,
    scale_reference,
)
from cna_kernels.scale_experts import scale_experts, scale_experts_reference
from cna_kernels.scale_rows import scale_rows, scale_rows_reference
from cna_kernels.steer_gate_up import CARRYING_DTYPES, steer_gate_up, steer_gate_up_reference

__all__ = [
    "CARRYING_DTYPES",
    "DTYPES",
    "EAGER",
    "act_and_mul_scaled",
    "act_and_mul_scaled_reference",
    "add_vectors",
    "add_vectors_reference",
    "backend",
    "mark_overflow",
    "mark_overflow_reference",
    "mask_width",
    "pack_mask",
    "record_rows",
    "record_rows_reference",
    "scale_experts",
    "scale_experts_reference",
    "scale_reference",
    "scale_rows",
    "scale_rows_reference",
    "steer_gate_up",
    "steer_gate_up_reference",
]
