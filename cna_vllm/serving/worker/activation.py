# SPDX-License-Identifier: Apache-2.0
"""The modules that stand where a gated MLP's fused activation stood."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cna_kernels import act_and_mul_scaled, record_rows, steer_gate_up


@dataclass(frozen=True)
class StepBuffers:
    """Per-step routing, shared by all layers. Addresses never change, contents do.

    row_slot: int32 [max_num_tokens]: the slot of each token row of the step, -1 for plain rows.
    slot_circuits: int32 [max_slots, entries]: table rows of a slot's circuits, -1: unused.
    slot_multipliers: float32 [max_slots, entries].
    row_record: int32 [max_num_tokens]: recording stage of each token row, -1 for none; None when
        the engine does not record.
    slot_vectors: int32 [max_slots, vector entries]: table rows of a slot's vectors, -1 for unused
        entries; None, like the coefficients, when the engine adds no vectors.
    slot_coefficients: float32 [max_slots, vector entries].
    """

    row_slot: torch.Tensor
    slot_circuits: torch.Tensor
    slot_multipliers: torch.Tensor
    row_record: torch.Tensor | None = None
    slot_vectors: torch.Tensor | None = None
    slot_coefficients: torch.Tensor | None = None


class SteeredActAndMul(nn.Module):
    """act(gate) * up with each token row's circuits scaled; one op, in place of one op.

    x: [num_tokens, 2 * width] -> [num_tokens, width], or both with leading dimensions of size 1
    (vLLM's Transformers backend has one). No Python branch depends on request data, so the module
    is traced and captured like the activation it replaces.
    """

    row_slot: torch.Tensor
    slot_circuits: torch.Tensor
    slot_multipliers: torch.Tensor
    masks: torch.Tensor
    row_record: torch.Tensor | None
    recorded: torch.Tensor | None

    def __init__(
        self,
        activation: str,
        step: StepBuffers,
        masks: torch.Tensor,
        recorded: torch.Tensor | None = None,
    ) -> None:
        """masks: uint8 [max_circuits, ceil(width / 8)], this layer's slice of the table;
        recorded: [entries, width] of the model's dtype, where recorded rows are written."""
        super().__init__()
        self.activation = activation
        # Buffers, so that what saves and restores a model's buffers (sleep mode) keeps them.
        for name, tensor in (
            ("row_slot", step.row_slot),
            ("slot_circuits", step.slot_circuits),
            ("slot_multipliers", step.slot_multipliers),
            ("masks", masks),
            ("row_record", step.row_record if recorded is not None else None),
            ("recorded", recorded),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x if x.dim() == 2 else x.flatten(0, -2)
        out = act_and_mul_scaled(
            rows,
            self.row_slot,
            self.slot_circuits,
            self.slot_multipliers,
            self.masks,
            self.activation,
        )
        if self.recorded is not None and self.row_record is not None:
            record_rows(out, self.row_record, self.recorded)
        return out if x.dim() == 2 else out.unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.activation}, circuits={self.masks.shape[0]}"


class SteeredGateUp(SteeredActAndMul):
    """Steers gate and up in place, then runs the activation that stood here before.

    For MLPs in which vLLM may fuse that activation with the quantization of ``down_proj``'s input:
    one small op goes before, and whatever computes act(gate) * up, and what it is fused with, stays
    vLLM's. Rows that are not steered, and channels outside a row's circuits, therefore are vLLM's
    own to the bit. It needs one of CARRYING_DTYPES, and cannot record.
    """

    def __init__(
        self, activation: str, step: StepBuffers, masks: torch.Tensor, replaced: nn.Module
    ) -> None:
        super().__init__(activation, step, masks)
        self.replaced = replaced

    def steer(self, x: torch.Tensor) -> torch.Tensor:
        """Steers x in place and returns it."""
        rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])  # never a copy: it is written
        steer_gate_up(
            rows,
            self.row_slot,
            self.slot_circuits,
            self.slot_multipliers,
            self.masks,
            self.activation,
        )
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.replaced(self.steer(x))
        return out
