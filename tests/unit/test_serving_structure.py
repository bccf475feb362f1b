# SPDX-License-Identifier: Apache-2.0
"""What was found in layers against what the configuration says: equal, or refused by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cna_vllm.serving.worker.experts import RoutedExperts
from cna_vllm.serving.worker.gated_mlp import GatedMlp, UnsupportedModelError
from cna_vllm.serving.worker.outputs import refuse_bare
from cna_vllm.serving.worker.structure import check_structure
from cna_vllm.serving.worker.table import CircuitTable
from cna_vllm.steering.circuit import Circuit, Neuron
from cna_vllm.steering.shape import Shape

# Dense, shared and routed, routed only, and a layer without an MLP.
SHAPE = Shape((24, 12, 0, 0), (0, 4, 4, 0), (0, 6, 6, 0))
PATHS = {layer: f"model.layers.{layer}" for layer in range(4)}


def mlp(layer: int, width: int) -> GatedMlp:
    module = nn.Module()
    path = f"{PATHS[layer]}.mlp"
    return GatedMlp(layer, path, module, "act", "silu", module, width // 2, 0, width)


def routed(layer: int, count: int = 4, width: int = 6) -> RoutedExperts:
    nothing: Any = None
    path, local = f"{PATHS[layer]}.experts", range(count)
    return RoutedExperts(
        layer, path, "T", count, local, 2, 8, width // 2, 0, width, nothing, nothing
    )


DENSE, ROUTED = [mlp(0, 24), mlp(1, 12)], [routed(1), routed(2)]


def test_every_kind_of_layer() -> None:
    check_structure(PATHS, DENSE, ROUTED, SHAPE)
    check_structure(PATHS, DENSE, None, SHAPE)
    check_structure({}, [], [], SHAPE)
    check_structure({2: PATHS[2]}, [], [routed(2)], SHAPE)


REFUSED: dict[str, tuple[list[GatedMlp], list[RoutedExperts], str]] = {
    "an MLP that was not found": (
        [mlp(0, 24)],
        ROUTED,
        r"layer 1 \(model\.layers\.1\): found no MLP, but .* one of 12,.*activation and a row-par",
    ),
    "an MLP too many": (
        [*DENSE, mlp(3, 10)],
        ROUTED,
        r"layer 3 \(model\.layers\.3\.mlp\): found an MLP of 10 neurons, but .* says none",
    ),
    "another width": ([mlp(0, 24), mlp(1, 24)], ROUTED, "found an MLP of 24 .* says one of 12"),
    "experts that were not found": (
        DENSE,
        [routed(1)],
        r"layer 2 .*: found no routed experts, but .* says 4 of 6, .*max_expert_neurons = 0",
    ),
    "experts too many": (DENSE, [*ROUTED, routed(3)], "layer 3 .*found 4 routed .* says none"),
    "another number": (DENSE, [routed(1, 8), routed(2)], "8 routed experts of 6 .* says 4 of 6"),
    "experts of another width": (DENSE, [routed(1), routed(2, 4, 8)], "4 routed experts of 8"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refused_with_the_layer_and_both_numbers(case: str) -> None:
    mlps, experts, says = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=says) as refused:
        check_structure(PATHS, mlps, experts, SHAPE)
    assert "\n" not in str(refused.value)


def test_a_model_without_neurons_that_are_steered() -> None:
    experts_only = Shape((0,), (4,), (6,))
    check_structure({0: PATHS[0]}, [], [routed(0)], experts_only)
    with pytest.raises(UnsupportedModelError, match=r"all of routed .*cna\.max_expert_neurons = 0"):
        check_structure({0: PATHS[0]}, [], None, experts_only)


def test_vectors_need_an_mlp_in_every_layer() -> None:
    refuse_bare({0: PATHS[0], 1: PATHS[1]}, DENSE)
    with pytest.raises(UnsupportedModelError, match=r"layer 2 \(model\.layers\.2\).*max_vectors"):
        refuse_bare(PATHS, DENSE)


@pytest.mark.parametrize("offset", [0, 1])
def test_masks_of_layers_of_their_own_widths(offset: int) -> None:
    """On rank ``offset`` of two: each layer has its own view, and takes what it needs."""
    widths = {0: 12, 1: 5, 4: 12, 7: 6}
    offsets = [offset * width for width in widths.values()]
    table = CircuitTable(tuple(widths), offsets, [*widths.values()], 3, torch.device("cpu"))
    neurons = [(0, 0), (0, 13), (1, 4), (1, 5), (1, 9), (4, 23), (7, 0), (7, 11)]
    sizes = tuple(2 * widths.get(layer, 0) for layer in range(8))
    circuit = Circuit("m", "A", 8, sizes, tuple(Neuron(*n) for n in neurons))
    row = table.load(circuit.packed())
    assert table.nbytes == 3 * (2 + 1 + 2 + 1)
    found = []
    for layer, width in widths.items():
        masks = table.layer_masks(layer)
        assert masks.shape == (3, -(-width // 8)) and masks.is_contiguous()
        assert masks.data_ptr() == table.layer_masks(layer).data_ptr()
        bits = [int(b) >> bit & 1 for b in masks[row] for bit in range(8)]
        assert not any(bits[width:]), "padding bits"
        found += [(layer, offset * width + i) for i, bit in enumerate(bits) if bit]
        assert not masks[[r for r in range(3) if r != row]].any()
    assert found == [(n, i) for n, i in neurons if i // widths[n] == offset]
