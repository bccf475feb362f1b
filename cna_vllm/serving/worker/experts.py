# SPDX-License-Identifier: Apache-2.0
"""Routed experts of a rank: which neurons of theirs are steered, and the proof that they obey.

Knows nothing of vLLM: ``RoutedExperts`` is what the seam found, with the way to run and to hook it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cna_kernels import record_rows, scale_experts
from cna_vllm.serving.config import CircuitTableError
from cna_vllm.serving.worker.activation import StepBuffers
from cna_vllm.serving.worker.gated_mlp import UnsupportedModelError

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class RoutedExperts:
    """The routed experts of one layer on this rank: of each, neurons [offset, offset + width).

    path: of the module. experts: their number in the model's own numbering, over all ranks. local:
    those of this rank. topk: experts of a token. hidden_size: of what enters them.
    backend: what computes them, by name. passed_over: what the engine would have taken first, had
        circuits reached the experts in it.
    run: (hidden [T, H], weights [T, topk] float32, ids [T, topk]) -> [T, H], through the engine's
        own code.
    hook: puts a ``SteeredExperts`` between the activation and the down projection, and calls the
        proof given with it: now, and again before the first step with whatever the engine has put
        in the place of what was hooked.
    """

    layer: int
    path: str
    backend: str
    experts: int
    local: Sequence[int]
    topk: int
    hidden_size: int
    width: int
    offset: int
    total_width: int
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    hook: Callable[[SteeredExperts, Callable[[], None]], None]
    passed_over: tuple[str, ...] = ()


class ExpertTable:
    """The neurons of routed experts of all resident circuits, at fixed addresses on one device.

    A circuit's row is a list of channels, ascending within a layer's expert, with the place of
    each expert's part of it: 4 bytes a neuron, of which ``capacity`` are held, and
    4 * (experts + 1) a layer, where experts are those of the layer that has the most. Rows are
    those of the ``CircuitTable``.
    """

    def __init__(
        self,
        layers: Sequence[RoutedExperts],
        rows: int,
        capacity: int,
        device: torch.device,
    ) -> None:
        self.layers = tuple(found.layer for found in layers)
        self._found = tuple(layers)
        self._place = {found.layer: i for i, found in enumerate(layers)}
        experts = max(found.experts for found in layers)
        self._offsets = torch.zeros(
            len(layers), rows, experts + 1, dtype=torch.int32, device=device
        )
        self.neurons = torch.zeros(rows, capacity, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Memory of the table on this rank, in bytes."""
        return 4 * (self._offsets.numel() + self.neurons.numel())

    def layer_offsets(self, layer: int) -> torch.Tensor:
        """int32 [rows, experts + 1], a fixed view; see ``cna_kernels.scale_experts``."""
        return self._offsets[self._place[layer]]

    def shares(
        self, layers: Ints, experts: Ints, channels: Ints
    ) -> list[tuple[torch.Tensor, NDArray[np.int32]]]:
        """``ResidentTable._shares`` of neurons that are given as three arrays of equal length.

        Neurons of layers of other ranks are left out. Raises CircuitTableError for neurons that do
        not exist and for more of them than a row holds.
        """
        offsets = np.zeros((len(self.layers), self._offsets.shape[2]), dtype=np.int32)
        parts = [np.empty(0, dtype=np.int32)]
        held = 0
        for place, found in enumerate(self._found):
            here = layers == found.layer
            expert, channel = experts[here], channels[here]
            _check_exists(found, expert, channel)
            local = channel - found.offset
            mine = np.isin(expert, found.local) & (local >= 0) & (local < found.width)
            expert, local = expert[mine], local[mine]
            parts.append(local[np.lexsort((local, expert))])
            counts = np.bincount(expert, minlength=offsets.shape[1] - 1)
            offsets[place, 0] = held
            offsets[place, 1:] = held + counts.cumsum()
            held += local.size
        capacity = self.neurons.shape[1]
        if held > capacity:
            raise CircuitTableError(
                f"the circuit has {held} neurons of routed experts on this rank, a row holds "
                f"{capacity}; raise cna.max_expert_neurons"
            )
        return [
            (self.neurons[None, :, :held], np.concatenate(parts)[None]),
            (self._offsets, offsets),
        ]


def _check_exists(found: RoutedExperts, experts: Ints, channels: Ints) -> None:
    wrong = (experts >= found.experts) | (channels < 0) | (channels >= found.total_width)
    if wrong.any():
        at = int(wrong.argmax())
        raise CircuitTableError(
            f"the circuit names layer {found.layer}, expert {experts[at]}, index {channels[at]}; "
            f"that layer has {found.experts} routed experts of {found.total_width} neurons"
        )


class SteeredExperts(nn.Module):
    """Scales the listed neurons of a layer's routed experts, for the rows of steered tokens; then
    copies those of recorded tokens.

    Its buffers lie in the model, so that what saves and restores a model's buffers keeps them. No
    Python branch depends on request data, so that a launch can be captured.

    proved_in: what it was last proved to act in; None: prove it before the next step.
    """

    row_slot: torch.Tensor
    slot_circuits: torch.Tensor
    slot_multipliers: torch.Tensor
    offsets: torch.Tensor
    neurons: torch.Tensor
    row_record: torch.Tensor | None
    recorded: torch.Tensor | None
    recorded_ids: torch.Tensor | None
    proved_in: object = None

    def __init__(
        self,
        step: StepBuffers,
        offsets: torch.Tensor,
        neurons: torch.Tensor,
        recorded: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """recorded: where recorded tokens are written, see ``share.Share.expert_stage``."""
        super().__init__()
        stage, ids = recorded or (None, None)
        for name, tensor in (
            ("row_slot", step.row_slot),
            ("slot_circuits", step.slot_circuits),
            ("slot_multipliers", step.slot_multipliers),
            ("offsets", offsets),
            ("neurons", neurons),
            ("row_record", step.row_record if recorded else None),
            ("recorded", stage),
            ("recorded_ids", ids),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def scale(
        self,
        activation: torch.Tensor,
        topk_ids: torch.Tensor,
        row_slot: torch.Tensor | None = None,
    ) -> None:
        """Scales in place. activation: [tokens * topk, width], row r of token r // topk, in the
        order of the step or with the slots of its tokens as ``row_slot``."""
        scale_experts(
            activation,
            topk_ids,
            self.row_slot if row_slot is None else row_slot,
            self.slot_circuits,
            self.slot_multipliers,
            self.offsets,
            self.neurons,
        )

    def record(
        self,
        activation: torch.Tensor,
        topk_ids: torch.Tensor,
        row_record: torch.Tensor | None = None,
    ) -> None:
        """Copies the rows of recorded tokens, and the ids of their experts; operands as those of
        ``scale``, with the stages of tokens that are not in the order of the step."""
        row_record = self.row_record if row_record is None else row_record
        if row_record is not None and self.recorded is not None and self.recorded_ids is not None:
            tokens = topk_ids.shape[0]
            record_rows(activation.view(tokens, -1), row_record, self.recorded)
            record_rows(topk_ids.to(torch.int32), row_record, self.recorded_ids)

    def recorded_tokens(self, tokens: int) -> torch.Tensor:
        """int64: which of the step's tokens are recorded. For tables on the CPU only."""
        if self.row_record is None:
            return torch.empty(0, dtype=torch.int64)
        return (self.row_record[:tokens] >= 0).nonzero()[:, 0]

    def changed_tokens(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """int64: the tokens of which an expert has a neuron to scale. Reads the step's routing, so
        for tables on the CPU only."""
        slots = self.row_slot.numpy()[: topk_ids.shape[0]]
        steered = np.flatnonzero(slots >= 0)
        if not steered.size:
            return torch.empty(0, dtype=torch.int64)
        ids, circuits = topk_ids.numpy()[steered], self.slot_circuits.numpy()[slots[steered]]
        counts = np.diff(self.offsets.numpy(), axis=1)  # [rows, experts]
        known = (ids >= 0) & (ids < counts.shape[1])
        held = counts[circuits[:, :, None], np.where(known, ids, 0)[:, None, :]] > 0
        held &= (circuits >= 0)[:, :, None] & known[:, None, :]
        return torch.from_numpy(steered[held.any(axis=(1, 2))])


TOLERANCE: Final = 2.0**-5
"""Of what a factor of 1 may change, relative to the largest element: 4 steps of bfloat16."""


@torch.inference_mode()
def experts_obey(found: RoutedExperts, hook: SteeredExperts, dtype: torch.dtype) -> bool:
    """Whether a layer's own forward pass obeys its hook.

    Three tokens of different hidden states go to the same experts; those after the first are
    steered, by tables of the proof's own, so that no step's are touched. Scaled by 0 in every
    neuron they must leave as equals, as what the down projections make of zeros; scaled by 1 as
    they are without a neuron to scale; and the first must never change. This runs the engine's real
    code, so a path that goes around the hook shows here.
    """
    device = hook.neurons.device
    chosen = [found.local[i % len(found.local)] for i in range(found.topk)]
    held = torch.zeros(1, found.experts, dtype=torch.int32, device=device)
    held[0, chosen] = found.width
    offsets = torch.zeros(1, found.experts + 1, dtype=torch.int32, device=device)
    offsets[0, 1:] = held.cumsum(1)[0]
    every = torch.arange(found.width, dtype=torch.int32, device=device)
    circuits = torch.full_like(hook.slot_circuits[:1], -1)
    circuits[0, 0] = 0
    probe = {
        "row_slot": torch.tensor([-1, 0, 0], dtype=torch.int32, device=device),
        "slot_circuits": circuits,
        "slot_multipliers": torch.ones_like(hook.slot_multipliers[:1]),
        "offsets": torch.zeros_like(offsets),
        "neurons": every.repeat(1, len(set(chosen))),
    }
    hidden = torch.randn(3, found.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(device, dtype)
    weights = torch.full((3, found.topk), 1 / found.topk, device=device)
    ids = torch.tensor([chosen] * 3, device=device)
    step = {name: getattr(hook, name) for name in probe}
    try:
        for name, tensor in probe.items():
            setattr(hook, name, tensor)
        plain = found.run(hidden, weights, ids).clone()
        hook.offsets = offsets
        kept = found.run(hidden, weights, ids).clone()
        hook.slot_multipliers[0, 0] = 0.0
        ablated = found.run(hidden, weights, ids).clone()
    finally:
        for name, tensor in step.items():
            setattr(hook, name, tensor)

    def near(a: torch.Tensor, b: torch.Tensor) -> bool:
        return bool((a - b).abs().max() <= TOLERANCE * plain.abs().max())

    return (
        near(kept, plain)
        and near(ablated[0], plain[0])
        and torch.equal(ablated[1], ablated[2])
        and not torch.equal(ablated[0], ablated[1])
    )


def prove_experts(found: RoutedExperts, hook: SteeredExperts, dtype: torch.dtype) -> None:
    """Raises UnsupportedModelError unless ``experts_obey``."""
    if not experts_obey(found, hook, dtype):
        raise UnsupportedModelError(
            f"layer {found.layer}: the routed experts {found.path} do not obey the steering hook "
            f"in the backend {found.backend}, so circuits would not act on them; refusing to run; "
            "cna.max_expert_neurons = 0 leaves routed experts as they are"
        )
