# SPDX-License-Identifier: Apache-2.0
"""Routed experts' neurons on a rank: what of a circuit is held, and what is refused."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
import torch

from cna_vllm.serving.config import CircuitTableError
from cna_vllm.serving.worker.activation import StepBuffers
from cna_vllm.serving.worker.experts import (
    ExpertTable,
    RoutedExperts,
    SteeredExperts,
    experts_obey,
    prove_experts,
)
from cna_vllm.serving.worker.gated_mlp import UnsupportedModelError
from cna_vllm.serving.worker.table import CircuitTable
from cna_vllm.steering.packed import Packed

CPU = torch.device("cpu")
NEURONS = [(1, 0, 5), (3, 2, 7), (1, 2, 0), (1, 0, 4), (3, 0, 1), (9, 1, 1)]
"""Layer, expert, index; layer 9 is another rank's."""


def found(layer: int, offset: int = 0, local: Any = range(3)) -> RoutedExperts:
    nothing: Any = None
    return RoutedExperts(layer, f"l{layer}", "T", 3, local, 2, 8, 4, offset, 8, nothing, nothing)


def packed(neurons: list[tuple[int, int, int]]) -> Packed:
    layers, experts, indices = (array("i", part).tobytes() for part in zip(*neurons, strict=True))
    return Packed("circuit", f"{neurons}", layers, indices, experts)


def write(table: ExpertTable, neurons: list[tuple[int, int, int]]) -> None:
    for rows, share in table.shares(*np.array(neurons, dtype=np.int32).T):
        rows[:, 0] = torch.from_numpy(share)


def held(table: ExpertTable, row: int) -> set[tuple[int, int, int]]:
    """What the kernel would find, each list ascending."""
    result = []
    for layer in table.layers:
        offsets = table.layer_offsets(layer)[row].tolist()
        for expert in range(len(offsets) - 1):
            channels = table.neurons[row, offsets[expert] : offsets[expert + 1]].tolist()
            assert channels == sorted(channels)
            result += [(layer, expert, channel) for channel in channels]
    assert len(result) == len(set(result))
    return set(result)


@pytest.mark.parametrize("offset", [0, 4])
def test_a_rank_holds_its_share(offset: int) -> None:
    table = ExpertTable([found(1, offset), found(3, offset)], 2, 8, CPU)
    circuits = CircuitTable((), 0, 1, 2, CPU, table)
    for neurons in (NEURONS, NEURONS[:2]):
        row = circuits.load(packed(neurons))
        mine = {(n, e, i - offset) for n, e, i in neurons if n != 9 and 0 <= i - offset < 4}
        assert held(table, row) == mine
    assert circuits.nbytes == 4 * (2 * 2 * 4 + 2 * 8)


def test_expert_parallel_ranks_hold_their_experts() -> None:
    table = ExpertTable([found(1, local=[2]), found(3, local=[2])], 1, 8, CPU)
    write(table, NEURONS)
    assert held(table, 0) == {(1, 2, 0)}


def test_a_row_is_written_anew() -> None:
    table = ExpertTable([found(1)], 1, 8, CPU)
    for neurons in ([(1, 0, 1), (1, 2, 3)], [(1, 1, 2)]):
        write(table, neurons)
        assert held(table, 0) == set(neurons)


@pytest.mark.parametrize(
    ("neurons", "says"),
    [
        ([(1, 3, 0)], "layer 1, expert 3, index 0; that layer has 3 routed experts of 8 neurons"),
        ([(1, 0, 0), (1, 2, 8)], "layer 1, expert 2, index 8; that layer has 3"),
        ([(1, 0, 0), (1, -1, 0)], "a neuron of no expert in layer 1, which has routed experts"),
        ([(1, e, i) for e in range(3) for i in range(3)], "raise cna.max_expert_neurons"),
    ],
)
def test_what_is_not_there_is_refused(neurons: list[tuple[int, int, int]], says: str) -> None:
    table = ExpertTable([found(1)], 1, 8, CPU)
    circuits = CircuitTable((3,), 0, 8, 1, CPU, table)
    with pytest.raises(CircuitTableError, match=says):
        circuits.load(packed(neurons))
    assert circuits.resident() == () and held(table, 0) == set()


def test_experts_that_are_not_steered_are_refused() -> None:
    circuits = CircuitTable((1, 3), 0, 8, 1, CPU)
    with pytest.raises(CircuitTableError, match=r"cna\.max_expert_neurons is 0"):
        circuits.load(packed(NEURONS))
    circuits.load(packed([(1, -1, 3)]))
    assert int(circuits.layer_masks(1)[0, 0]) == 1 << 3


@pytest.mark.parametrize(
    ("flaw", "obeys"), [("", True), ("deaf", False), ("other weights", False), ("spills", False)]
)
def test_the_proof_at_start(flaw: str, obeys: bool) -> None:
    """Experts that go around the hook, or that the hook changes in more than its neurons."""
    g = torch.Generator().manual_seed(1)
    up, down = torch.randn(3, 4, 16, generator=g), torch.randn(3, 16, 4, generator=g)
    hooks: list[SteeredExperts] = []

    def run(hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        (hook,) = hooks
        acted = torch.einsum("th,tkih->tki", hidden, up[ids]).relu().flatten(0, 1)
        scaled = acted.clone()
        if flaw != "deaf":
            hook.scale(scaled, ids)
        if flaw == "spills":
            scaled[0] += scaled[2] - acted[2]
        used = down
        if flaw == "other weights" and len(hook.changed_tokens(ids)):
            used = down.roll(1, 0)
        choices = torch.einsum("tki,tkhi->tkh", scaled.view(3, 2, 4), used[ids])
        return (choices * weights[..., None]).sum(1)

    nothing: Any = None
    layer = RoutedExperts(0, "", "", 3, range(3), 2, 16, 4, 0, 4, run, nothing)
    table = ExpertTable([layer], 1, 8, CPU)
    slots = torch.full((3,), -1, dtype=torch.int32)
    step = StepBuffers(slots, torch.full((1, 2), -1, dtype=torch.int32), torch.ones(1, 2))
    hooks.append(SteeredExperts(step, table.layer_offsets(0), table.neurons))
    assert experts_obey(layer, hooks[0], torch.float32) is obeys
    assert hooks[0].neurons is table.neurons and hooks[0].row_slot is slots
    if not obeys:
        with pytest.raises(UnsupportedModelError, match="do not obey the steering hook"):
            prove_experts(layer, hooks[0], torch.float32)
