# SPDX-License-Identifier: Apache-2.0
"""What `cna-vllm discover` says of a circuit of routed experts besides its neurons."""

from __future__ import annotations

from cna_vllm.cli.discover import _report
from cna_vllm.steering.circuit import Circuit, Neuron

LATE = {"first_layer": 3, "routed": 0.75, "others": 0.5}
NEURONS = (
    Neuron(0, 1, 1.0),
    Neuron(3, 1, 1.0),
    Neuron(1, 0, -1.0, 2),
    *(Neuron(3, index, 1.0, 1) for index in range(3)),
)


def report(neurons: tuple[Neuron, ...], late: object) -> list[str]:
    method = {"universal": None, "routed": {"late": late}}
    experts = {"count": 4, "intermediate_size": 8}
    return _report(Circuit("m", "A", 4, 8, neurons, method=method, experts=experts))


def test_late_layers_and_the_expert_with_most() -> None:
    assert report(NEURONS, LATE) == [
        "late    75% of its routed neurons and 50% of its other neurons from layer 3 on; most in "
        "layer 3, expert 1: 50% of the circuit"
    ]
    assert report(NEURONS[2:], {**LATE, "others": None}) == [
        "late    75% of its routed neurons from layer 3 on; most in layer 3, expert 1: 75% of the "
        "circuit"
    ]


def test_a_circuit_without_routed_neurons_has_no_such_line() -> None:
    assert report(NEURONS[:2], {**LATE, "routed": None}) == []
