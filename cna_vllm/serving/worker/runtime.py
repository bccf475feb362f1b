# SPDX-License-Identifier: Apache-2.0
"""Everything one worker holds to steer its share of the model; knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from cna_kernels import CARRYING_DTYPES, backend, mark_overflow
from cna_vllm.serving.config import CnaConfig, CnaConfigError
from cna_vllm.serving.step_report import StepReport
from cna_vllm.serving.worker.activation import SteeredActAndMul, SteeredGateUp, StepBuffers
from cna_vllm.serving.worker.experts import (
    ExpertTable,
    RoutedExperts,
    SteeredExperts,
    prove_experts,
)
from cna_vllm.serving.worker.gated_mlp import GatedMlp, prove_hooks
from cna_vllm.serving.worker.outputs import hook_outputs, prove_outputs, refuse_unfit
from cna_vllm.serving.worker.plain_mlp import hook_input
from cna_vllm.serving.worker.recording import Recorder
from cna_vllm.serving.worker.share import NO_EXPERT, Part
from cna_vllm.serving.worker.state import SteeringState
from cna_vllm.serving.worker.table import CircuitTable, ResidentTable, VectorTable
from cna_vllm.steering.packed import KindName, Packed
from cna_vllm.steering.resolved import Steering
from cna_vllm.steering.vectors import FORMS

NEURONS = "neurons"


class SteeringRuntime:
    """Hooks the gated MLPs of one rank and routes each step's token rows to their circuits.

    mlps: of the decoder layers of this rank that have a dense or shared MLP; experts: of those
    that have routed ones. Raises UnsupportedModelError if a hook does not act.
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
        experts: Sequence[RoutedExperts] = (),
        record_stream: bool = False,
    ) -> None:
        """record_stream: whether the residual stream is known to be found, where it is wanted."""
        widths, offsets = [mlp.width for mlp in mlps], [mlp.offset for mlp in mlps]
        self.layers = tuple(mlp.layer for mlp in mlps)
        self._recording = NEURONS
        self._expert_backends = {found.layer: found.backend for found in experts}
        self._routed_experts = [
            path
            for mlp in mlps
            for path in mlp.routed_experts
            if mlp.layer not in self._expert_backends
        ]
        self._experts = (
            ExpertTable(experts, config.max_circuits, config.max_expert_neurons, device)
            if experts
            else None
        )
        self.table = CircuitTable(
            self.layers, offsets, widths, config.max_circuits, device, self._experts
        )
        self.vectors = (
            VectorTable(self.layers, hidden_size, config.max_vectors, device)
            if config.max_vectors
            else None
        )
        self._tables: dict[KindName, ResidentTable] = {"circuit": self.table}
        if self.vectors is not None:
            self._tables["vector"] = self.vectors
        self.state = SteeringState(
            self.table,
            max_num_reqs,
            max_num_tokens,
            config.max_circuits_per_request,
            self.vectors,
            config.max_vectors_per_request if config.max_vectors else 0,
        )
        # Of each slot, the last step in which a row of it overflowed.
        self._marks = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self._mark = 0
        batch = (dtype, max_num_reqs, max_num_tokens, device)
        self.recorders: dict[str, Recorder] = {}
        if config.record:
            dense = [Part(mlp.layer, NO_EXPERT, mlp.offset, mlp.width) for mlp in mlps]
            self.recorders[NEURONS] = Recorder(dense, *batch, experts)
            if self.vectors is not None:
                outputs = [Part(layer, NO_EXPERT, 0, hidden_size) for layer in self.layers]
                for form in FORMS if record_stream else FORMS[:1]:
                    self.recorders[form] = Recorder(outputs, *batch)
        self.recorder = self.recorders.get(NEURONS)
        self.fusible = [mlp.path for mlp in mlps if mlp.fuses_quantization]
        self.unfused = _why_unfused(mlps, config, dtype) if self.fusible else ""
        step = self.state.buffers(self.recorder.row_record if self.recorder else None)
        for mlp in mlps:
            self._hook(mlp, step)
        prove_hooks(mlps, self.state, self.table, hidden_size, dtype)
        if self._experts is not None:
            self._steer_experts(experts, self._experts, step, dtype)
        if self.vectors is not None:
            refuse_unfit(mlps)
            hook_outputs(mlps, step, self.vectors, *map(self.recorders.get, FORMS))
            prove_outputs(mlps, self.state, self.vectors, dtype)

    @property
    def nbytes(self) -> int:
        """Device memory of the resident tables and of the recorders, in bytes."""
        vectors = 0 if self.vectors is None else self.vectors.nbytes
        return self.table.nbytes + vectors + self._recorder_bytes()

    def load(self, content: Packed, wanted: Collection[str] = ()) -> int:
        """Makes content resident on this rank and returns its row; see ``ResidentTable.load``.

        Content that does not fit the model never comes here: front ends refuse it.
        """
        if content.kind not in self._tables:
            raise CnaConfigError("this engine adds no vectors; start it with cna.max_vectors")
        return self._tables[content.kind].load(content, wanted)

    def resident(self) -> list[str]:
        """Digests of all circuits and vectors that have a row."""
        return [digest for table in self._tables.values() for digest in table.resident()]

    def unload(self, digest: str) -> bool:
        """Retires content; running requests finish on it. False when it is not loaded."""
        return any(table.unload(digest) for table in self._tables.values())

    def add_request(
        self, req_id: str, steering: Steering | None, prompt_len: int, group: str | None = None
    ) -> None:
        """A request enters the batch for the first time, resumes, or is replaced.

        group: under which it is recorded; None for one that is not.
        """
        self.state.add(req_id, steering, prompt_len)
        if self.recorders:
            self.recorders[self._recording].add(req_id, group, prompt_len)

    def suspend_request(self, req_id: str) -> None:
        """A request is preempted and will run again under the same id without being re-added."""
        self.state.suspend(req_id)

    def remove_request(self, req_id: str) -> None:
        """A request is finished, aborted, or preempted and to be re-added."""
        self.state.remove(req_id)
        for recorder in self.recorders.values():
            recorder.remove(req_id)

    def prepare_step(
        self,
        req_ids: Sequence[str],
        num_scheduled_tokens: np.ndarray,
        num_computed_tokens: np.ndarray,
    ) -> None:
        """Fills the step buffers; call after the batch is final and before the forward pass."""
        self.state.fill(req_ids, num_scheduled_tokens, num_computed_tokens)
        for recorder in self.recorders.values():
            recorder.fill(req_ids, num_scheduled_tokens, num_computed_tokens)

    def finish_step(self, hidden: torch.Tensor) -> StepReport | None:
        """What the step steered, and which of it overflowed; call after the forward pass, on its
        stream. None for a step without a steered row, which costs nothing.

        hidden: [tokens, hidden size], the model's last hidden states, rows in batch order.
        """
        step = self.state.step
        if step is None:
            return None
        self._mark = self._mark % (2**31 - 1) + 1
        mark_overflow(hidden, self.state.row_slot, self._marks, self._mark)
        # Pinned and asynchronous on a GPU: read when the step's tokens have come to the host.
        marks = self._marks.to("cpu", non_blocking=True, copy=True)
        return StepReport(step, marks, self._mark)

    def start_recording(self, what: str = NEURONS, **plan: Any) -> None:
        """``Recorder.start(**plan)`` of the neurons, of MLP outputs (``mlp``) or of the stream
        (``residual``). Raises RuntimeError when the engine does not record that."""
        if what not in self.recorders:
            raise RuntimeError(
                f"this engine does not record {what}; start it with cna.record = true, and for "
                "vectors with cna.max_vectors; the stream of some architectures is not known"
            )
        self._recording = what
        self.recorders[what].start(**plan)

    def take_recording(self) -> dict[str, Any]:
        """``Recorder.take`` of what was started. Raises RuntimeError without cna.record."""
        if not self.recorders:
            raise RuntimeError("this engine does not record; start it with cna.record = true")
        return self.recorders[self._recording].take()

    def status(self) -> dict[str, Any]:
        """What is hooked and resident, and how many token rows were steered, by digest.

        circuits: what requests may use; resident: and what was unloaded, but not yet overwritten.
        kernel: which implementation the layers call; see ``cna_kernels.backend``.
        quantization: whether that of ``down_proj``'s input may be one kernel with the activation.
        experts: layer -> backend of the routed experts that are steered.
        routed_experts: what the model has and no circuit reaches, by path.
        """
        return {
            "device": str(self.table.device),
            "kernel": backend(self.table.device),
            "quantization": self._quantization(),
            "layers": list(self.layers),
            "experts": dict(self._expert_backends),
            "routed_experts": list(self._routed_experts),
            "circuits": list(self.table.loaded()),
            "vectors": [] if self.vectors is None else list(self.vectors.loaded()),
            "resident": self.resident(),
            "steered_tokens": self.state.steered_tokens(),
            "table_bytes": self.table.nbytes,
            "recorder_bytes": self._recorder_bytes(),
            "addresses": [
                t.data_ptr()
                for t in (
                    self.state.row_slot,
                    self.state.slot_circuits,
                    self.state.slot_multipliers,
                    *(self.table.layer_masks(layer) for layer in self.layers),
                    *self._vector_operands(),
                )
            ],
        }

    def _hook(self, mlp: GatedMlp, step: StepBuffers) -> None:
        masks = self.table.layer_masks(mlp.layer)
        hook: SteeredActAndMul
        stage = self.recorder.share.stage(mlp.layer) if self.recorder else None
        if mlp.steered_input:
            hook = hook_input(mlp, step, masks, stage)
        elif mlp.fuses_quantization and not self.unfused:
            replaced = getattr(mlp.module, mlp.attribute)
            hook = SteeredGateUp(mlp.activation, step, masks, replaced)
            # Producers of quantized activations are given the linear, not the activation.
            down: Any = mlp.down_proj
            down.cna_steer = hook.steer
            setattr(mlp.module, mlp.attribute, hook)
        else:
            hook = SteeredActAndMul(mlp.activation, step, masks, stage)
            setattr(mlp.module, mlp.attribute, hook)
        # A buffer of the model, like what the hook reads: saved and restored when it sleeps.
        hook.register_buffer("marks", self._marks, persistent=False)

    def _steer_experts(
        self,
        experts: Sequence[RoutedExperts],
        table: ExpertTable,
        step: StepBuffers,
        dtype: torch.dtype,
    ) -> None:
        """Hooks routed experts, which are proved to obey."""
        for found in experts:
            stages = self.recorder.share.expert_stage(found.layer) if self.recorder else None
            offsets = table.layer_offsets(found.layer)
            hook = SteeredExperts(step, offsets, table.neurons, stages)
            found.hook(hook, partial(prove_experts, found, hook, dtype))

    def _quantization(self) -> str:
        if not self.fusible:
            return "none that an activation could be fused with"
        if self.unfused:
            return f"apart from the activation, since {self.unfused}"
        return f"fused with the activation as in vLLM alone, in {len(self.fusible)} layers"

    def _recorder_bytes(self) -> int:
        return sum(recorder.nbytes for recorder in self.recorders.values())

    def _vector_operands(self) -> list[torch.Tensor]:
        if self.vectors is None:
            return []
        layers = [self.vectors.layer_vectors(layer) for layer in self.layers]
        return [self.state.slot_vectors, self.state.slot_coefficients, *layers]


def _why_unfused(mlps: Sequence[GatedMlp], config: CnaConfig, dtype: torch.dtype) -> str:
    """Why quantization cannot be left to what is fused with the activation, or ""."""
    if any(mlp.steered_input for mlp in mlps):
        return "MLPs without a gate are steered between the two"
    if config.record:
        return "this engine records activations, which a fused kernel does not write"
    if dtype not in CARRYING_DTYPES:
        return f"{str(dtype).removeprefix('torch.')} cannot carry every steered value through it"
    return ""
