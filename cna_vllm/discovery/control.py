# SPDX-License-Identifier: Apache-2.0
"""A random circuit with the layer profile of a real one: what the choice of neurons is worth."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime

from cna_vllm.steering.circuit import Circuit, CircuitError, Neuron


def random_control(circuit: Circuit, seed: int = 0) -> Circuit:
    """As many neurons in each layer as ``circuit`` has, drawn uniformly from those it has not.

    Their delta is 0, since none is known, and no prompts are named, since none chose them. Raises
    CircuitError when a layer has too few others.
    """
    draw = random.Random(seed)
    neurons = []
    for layer, taken in circuit.by_layer().items():
        others = sorted(set(range(circuit.intermediate_size)).difference(taken))
        if len(others) < len(taken):
            raise CircuitError(
                f"layer {layer} has {len(others)} neurons outside the circuit, too few for a "
                f"control of {len(taken)}; discover a smaller circuit"
            )
        neurons += [Neuron(layer, index) for index in draw.sample(others, len(taken))]
    return replace(
        circuit,
        neurons=tuple(neurons),
        method={"name": "random control", "seed": seed, "of": circuit.digest},
        prompts={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=(),
    )
