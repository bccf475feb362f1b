# SPDX-License-Identifier: Apache-2.0
"""What vectors are added to, and learned from: the output of each layer's MLP, and the stream.

One hook on the MLP serves both forms of vectors. After a layer of the architectures that the form
``residual`` is allowed for, the stream is the stream before the MLP plus the MLP's output, so
adding to that output is adding to the stream; vLLM's layers leave that sum to the next norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cna_kernels import add_vectors, record_rows
from cna_vllm.serving.worker.activation import StepBuffers
from cna_vllm.serving.worker.gated_mlp import GatedMlp, UnsupportedModelError
from cna_vllm.serving.worker.recording import Recorder
from cna_vllm.serving.worker.state import SteeringState
from cna_vllm.serving.worker.table import VectorTable

PROBE_COEFFICIENT = -2.0


class SteeredOutput(nn.Module):
    """Forward hook of an MLP: adds each token row's vectors to its output, in place.

    output: [num_tokens, hidden_size], or with leading dimensions of size 1. A recorded row is
    copied before vectors are added. No Python branch depends on request data.
    """

    row_slot: torch.Tensor
    slot_vectors: torch.Tensor
    slot_coefficients: torch.Tensor
    vectors: torch.Tensor
    row_record: torch.Tensor | None
    recorded: torch.Tensor | None

    def __init__(
        self, step: StepBuffers, vectors: torch.Tensor, recorder: Recorder | None, layer: int
    ) -> None:
        """vectors: float32 [max_vectors, hidden_size], this layer's slice of the table."""
        super().__init__()
        for name, tensor in (
            ("row_slot", step.row_slot),
            ("slot_vectors", step.slot_vectors),
            ("slot_coefficients", step.slot_coefficients),
            ("vectors", vectors),
            ("row_record", None if recorder is None else recorder.row_record),
            ("recorded", None if recorder is None else recorder.share.stage(layer)),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            return  # nothing is added then, which the proof refuses
        rows = output.view(-1, output.shape[-1])  # never a copy: it is written
        if self.recorded is not None and self.row_record is not None:
            record_rows(rows, self.row_record, self.recorded)
        add_vectors(rows, self.row_slot, self.slot_vectors, self.slot_coefficients, self.vectors)


class RecordedStream(nn.Module):
    """Forward hook of a decoder layer: copies recorded rows of the residual stream after it."""

    row_record: torch.Tensor
    recorded: torch.Tensor

    def __init__(self, recorder: Recorder, layer: int) -> None:
        super().__init__()
        self.register_buffer("row_record", recorder.row_record, persistent=False)
        self.register_buffer("recorded", recorder.share.stage(layer), persistent=False)

    def forward(self, _module: nn.Module, _args: Any, output: Any) -> None:
        # vLLM's own layers return the MLP's output and the stream before it.
        stream = output if isinstance(output, torch.Tensor) else output[0] + output[1]
        record_rows(stream.view(-1, stream.shape[-1]), self.row_record, self.recorded)


def refuse_bare(paths: Mapping[int, str], mlps: Sequence[GatedMlp]) -> None:
    """Raises UnsupportedModelError unless each of these layers has an MLP to add vectors to.

    paths: global layer index -> module path.
    """
    for layer, path in sorted(paths.items()):
        if layer not in {mlp.layer for mlp in mlps}:
            raise UnsupportedModelError(
                f"layer {layer} ({path}) has no dense MLP, whose output vectors could be added to; "
                "remove cna.max_vectors and cna.vectors"
            )


def refuse_unfit(mlps: Sequence[GatedMlp]) -> None:
    """Raises UnsupportedModelError unless the modules' outputs are those of the layers' MLPs."""
    for mlp in mlps:
        if mlp.module is mlp.decoder:
            raise UnsupportedModelError(
                f"layer {mlp.layer}: {mlp.path} computes its MLP itself, so there is no module "
                "whose output vectors could be added to; remove cna.max_vectors and cna.vectors"
            )
        if mlp.routed_experts:
            raise UnsupportedModelError(
                f"layer {mlp.layer} has routed experts ({mlp.routed_experts[0]}), so no one MLP's "
                "output to add vectors to; remove cna.max_vectors and cna.vectors"
            )
        if mlp.width < mlp.total_width and not getattr(mlp.down_proj, "reduce_results", True):
            raise UnsupportedModelError(
                f"layer {mlp.layer}: {mlp.path} leaves the sum over tensor-parallel ranks to a "
                "later module, so vectors would be added once a rank; remove cna.max_vectors and "
                "cna.vectors, or use one rank"
            )


def hook_outputs(
    mlps: Sequence[GatedMlp],
    step: StepBuffers,
    table: VectorTable,
    mlp_recorder: Recorder | None,
    stream_recorder: Recorder | None,
) -> None:
    """Adds a hook to every MLP, and one to every decoder layer where the stream is recorded."""
    for mlp in mlps:
        hook = SteeredOutput(step, table.layer_vectors(mlp.layer), mlp_recorder, mlp.layer)
        # Also a child, so that what saves and restores a model's buffers (sleep mode) keeps them.
        mlp.module.add_module("cna_output", hook)
        mlp.module.register_forward_hook(hook)
        if stream_recorder is not None and mlp.decoder is not None:
            stream = RecordedStream(stream_recorder, mlp.layer)
            mlp.decoder.add_module("cna_stream", stream)
            mlp.decoder.register_forward_hook(stream)


@torch.inference_mode()
def prove_outputs(
    mlps: Sequence[GatedMlp], state: SteeringState, table: VectorTable, dtype: torch.dtype
) -> None:
    """Adds a probe to row 1 of two rows in every layer, through the model's own code.

    Raises UnsupportedModelError unless row 1 is then the plain row plus the probe, rounded once,
    and row 0 has kept its bits.
    """
    if not mlps:
        return
    device = state.row_slot.device
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, table.hidden_size, generator=generator).to(device, dtype)
    probe = torch.randn(table.hidden_size, generator=generator).to(device)
    deaf = []
    try:
        for mlp in mlps:
            table.layer_vectors(mlp.layer)[0] = probe
        state.slot_vectors[0, 0] = 0
        state.slot_coefficients[0, 0] = PROBE_COEFFICIENT
        for mlp in mlps:
            state.row_slot[1] = -1
            expected = mlp.module(hidden)
            state.row_slot[1] = 0
            steered = mlp.module(hidden)
            if isinstance(expected, torch.Tensor):
                expected[1] = (expected[1].float() + PROBE_COEFFICIENT * probe).to(dtype)
            if not isinstance(expected, torch.Tensor) or not torch.equal(steered, expected):
                deaf.append(mlp)
    finally:
        for mlp in mlps:
            table.layer_vectors(mlp.layer)[0] = 0.0
        state.slot_vectors[0, 0] = -1
        state.slot_coefficients[0, 0] = 0.0
        state.row_slot[1] = -1
    if deaf:
        names = ", ".join(f"{m.layer} ({m.path})" for m in deaf[:4])
        raise UnsupportedModelError(
            f"{len(deaf)} of {len(mlps)} layers do not obey the vector hook: {names}; vectors "
            "would not be added there as they should; refusing to start"
        )
