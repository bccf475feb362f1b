# SPDX-License-Identifier: Apache-2.0
"""Layer counts, late shares, the order of the strongest neurons, and the bar chart."""

from __future__ import annotations

import pytest

from cna_vllm import Circuit, Neuron
from cna_vllm.reading.profile import bar_chart, expert_counts, late_shares, layer_counts, strongest


def circuit(num_layers: int, *neurons: Neuron) -> Circuit:
    return Circuit("org/tiny", "LlamaForCausalLM", num_layers, 64, neurons)


def test_counts_cover_every_layer() -> None:
    assert layer_counts(circuit(4, Neuron(1, 0), Neuron(1, 5), Neuron(3, 2))) == [0, 2, 0, 1]


def test_late_shares_round_their_layers_up() -> None:
    spread = circuit(16, *(Neuron(layer, 0) for layer in range(16)))
    tenth, three, quarter = late_shares(spread)
    assert [s.name for s in (tenth, three, quarter)] == [
        "last 10%",
        "last three layers",
        "last quarter",
    ]
    assert [s.first_layer for s in (tenth, three, quarter)] == [14, 13, 12]
    assert [s.neurons for s in (tenth, three, quarter)] == [2, 3, 4]
    assert all(s.share == s.uniform for s in (tenth, three, quarter))


def test_late_shares_of_a_model_of_one_layer() -> None:
    assert {(s.first_layer, s.share) for s in late_shares(circuit(1, Neuron(0, 1)))} == {(0, 1.0)}


def test_late_shares_of_an_early_circuit_are_zero() -> None:
    assert all(s.share == 0 for s in late_shares(circuit(80, Neuron(0, 1), Neuron(5, 2))))


def test_strongest_orders_by_size_then_place() -> None:
    weak, low, high, late = Neuron(0, 9, 1), Neuron(1, 2, -3), Neuron(1, 4, 3), Neuron(2, 0, 3)
    assert strongest(circuit(3, late, weak, high, low), 3) == [low, high, late]
    assert len(strongest(circuit(3, weak), 10)) == 1


def test_shares_of_neurons_where_layers_have_unlike_many() -> None:
    experts = {"count": [0, 0, 4, 4], "intermediate_size": 5}
    neurons = (Neuron(0, 1), Neuron(2, 1, 1.0, 3), Neuron(2, 4, 1.0, 3), Neuron(3, 4, 1.0, 0))
    made = Circuit("m", "X", 4, [30, 20, 0, 10], neurons, experts=experts)
    assert layer_counts(made) == [1, 0, 2, 1]
    assert expert_counts(made) == [(2, 3, 2), (3, 0, 1)]
    quarter = late_shares(made)[-1]
    assert (quarter.neurons, quarter.share, quarter.uniform) == (1, 0.25, 30 / 100)
    assert late_shares(made)[1].uniform == 70 / 100
    assert expert_counts(circuit(2, Neuron(0, 1))) == []


def test_a_bar_for_every_layer() -> None:
    assert bar_chart([0, 1, 100]).splitlines() == [
        "    0      0",
        "    1      1  #",
        "    2    100  " + "#" * 40,
    ]


@pytest.mark.parametrize("layers", [1, 9, 10, 11, 30, 80, 126])
def test_groups_of_layers_lose_nothing(layers: int) -> None:
    rows = bar_chart([2] * layers, max_rows=10).splitlines()
    assert len(rows) <= 10
    assert sum(int(row.split()[1]) for row in rows) == 2 * layers
    assert rows[-1].split()[0].endswith(str(layers - 1))
