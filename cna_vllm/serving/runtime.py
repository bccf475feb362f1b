# SPDX-License-Identifier: Apache-2.0
"""Everything one worker holds to steer its share of the model; knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cna_kernels import backend
from cna_vllm.circuit import Circuit
from cna_vllm.request import FIELD_RECORD, RESOLVED_FIELD, Steering
from cna_vllm.serving.activation import SteeredActAndMul
from cna_vllm.serving.config import CnaConfig, CnaConfigError
from cna_vllm.serving.gated_mlp import GatedMlp, UnsupportedModelError, ablated_output_matches
from cna_vllm.serving.recording import Recorder
from cna_vllm.serving.state import SteeringState
from cna_vllm.serving.table import CircuitTable


class SteeringRuntime:
    """Hooks the gated MLPs of one rank and routes each step's token rows to their circuits.

    mlps: one per decoder layer of this rank. Raises UnsupportedModelError if the layers differ in
    width or if a hook does not act.
    """

    def __init__(
        self,
        mlps: Sequence[GatedMlp],
        config: CnaConfig,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_num_reqs: int,
        max_num_tokens: int,
    ) -> None:
        shapes = {(mlp.width, mlp.offset, mlp.total_width) for mlp in mlps}
        if len(shapes) > 1:
            raise UnsupportedModelError(
                f"decoder layers differ in intermediate size: {sorted(shapes)}; steering needs "
                "one size for all layers"
            )
        # A pipeline stage without decoder layers has nothing to hook and nothing to do.
        width, offset, total = shapes.pop() if shapes else (1, 0, 1)
        self.layers = tuple(mlp.layer for mlp in mlps)
        self._total_width = total
        self._routed_experts = [path for mlp in mlps for path in mlp.routed_experts]
        self.table = CircuitTable(self.layers, offset, width, config.max_circuits, device)
        self.state = SteeringState(
            self.table, max_num_reqs, max_num_tokens, config.max_circuits_per_request
        )
        self.recorder = (
            Recorder(self.layers, offset, width, dtype, max_num_reqs, max_num_tokens, device)
            if config.record
            else None
        )
        step = self.state.buffers(self.recorder.row_record if self.recorder else None)
        for mlp in mlps:
            stage = self.recorder.layer_stage(mlp.layer) if self.recorder else None
            hook = SteeredActAndMul(mlp.activation, step, self.table.layer_masks(mlp.layer), stage)
            setattr(mlp.module, mlp.attribute, hook)
        self._prove_hooks(mlps, hidden_size, dtype)

    @property
    def nbytes(self) -> int:
        """Device memory of the resident table and of the recorder, in bytes."""
        return self.table.nbytes + (0 if self.recorder is None else self.recorder.nbytes)

    def load(self, circuit: Circuit, wanted: Collection[str] = ()) -> int:
        """Makes a circuit resident on this rank and returns its row; see ``CircuitTable.load``."""
        if self.layers and circuit.intermediate_size != self._total_width:
            raise CnaConfigError(
                f"circuit of {circuit.model} has intermediate_size {circuit.intermediate_size}, "
                f"the served model {self._total_width}"
            )
        return self.table.load(circuit, wanted)

    def unload(self, digest: str) -> bool:
        """Retires a circuit; running requests finish on it."""
        return self.table.unload(digest)

    def add_request(
        self, req_id: str, extra_args: Mapping[str, Any] | None, prompt_len: int
    ) -> None:
        """A request enters the batch for the first time, resumes, or is replaced."""
        extra_args = extra_args or {}
        resolved = extra_args.get(RESOLVED_FIELD)
        self.state.add(
            req_id, None if resolved is None else Steering.from_field(resolved), prompt_len
        )
        if self.recorder is not None:
            self.recorder.add(req_id, extra_args.get(FIELD_RECORD), prompt_len)

    def suspend_request(self, req_id: str) -> None:
        """A request is preempted and will run again under the same id without being re-added."""
        self.state.suspend(req_id)

    def remove_request(self, req_id: str) -> None:
        """A request is finished, aborted, or preempted and to be re-added."""
        self.state.remove(req_id)
        if self.recorder is not None:
            self.recorder.remove(req_id)

    def prepare_step(
        self,
        req_ids: Sequence[str],
        num_scheduled_tokens: np.ndarray,
        num_computed_tokens: np.ndarray,
    ) -> None:
        """Fills the step buffers; call after the batch is final and before the forward pass."""
        self.state.fill(req_ids, num_scheduled_tokens, num_computed_tokens)
        if self.recorder is not None:
            self.recorder.fill(req_ids, num_scheduled_tokens, num_computed_tokens)

    def status(self) -> dict[str, Any]:
        """What is hooked and resident, and how many token rows were steered, by digest.

        circuits: what requests may use; resident: and what was unloaded, but not yet overwritten.
        kernel: which implementation the layers call; see ``cna_kernels.backend``.
        routed_experts: what the model has and no circuit reaches, by path.
        """
        return {
            "device": str(self.table.device),
            "kernel": backend(self.table.device),
            "layers": list(self.layers),
            "routed_experts": list(self._routed_experts),
            "circuits": list(self.table.loaded()),
            "resident": list(self.table.resident()),
            "steered_tokens": self.state.steered_tokens(),
            "table_bytes": self.table.nbytes,
            "recorder_bytes": 0 if self.recorder is None else self.recorder.nbytes,
            "addresses": [
                t.data_ptr()
                for t in (
                    self.state.row_arm,
                    self.state.arm_circuits,
                    self.state.arm_multipliers,
                    *(self.table.layer_masks(layer) for layer in self.layers),
                )
            ],
        }

    def _prove_hooks(self, mlps: Sequence[GatedMlp], hidden_size: int, dtype: torch.dtype) -> None:
        """Ablates every channel of a probe row in every layer, through the model's own code."""
        if not mlps:
            return
        state, masks = self.state, [self.table.layer_masks(mlp.layer) for mlp in mlps]
        for mask in masks:
            mask[0].fill_(0xFF)
        state.arm_circuits[0, 0] = 0
        state.arm_multipliers[0, 0] = 0.0
        state.row_arm[1] = 0
        try:
            deaf = [m for m in mlps if not ablated_output_matches(m, hidden_size, dtype)]
        finally:
            for mask in masks:
                mask[0].zero_()
            state.arm_circuits[0, 0] = -1
            state.arm_multipliers[0, 0] = 1.0
            state.row_arm[1] = -1
        if deaf:
            names = ", ".join(f"{m.layer} ({m.path})" for m in deaf[:4])
            raise UnsupportedModelError(
                f"{len(deaf)} of {len(mlps)} layers do not obey the steering hook: {names}; their "
                "forward pass goes around it, so this model would run unsteered; refusing to start"
            )
