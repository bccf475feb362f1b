# SPDX-License-Identifier: Apache-2.0
"""Where in the model a circuit lies: neurons by layer, and the shares of the late layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cna_vllm.steering.circuit import Circuit, Neuron

BAR_WIDTH = 40


@dataclass(frozen=True)
class LateShare:
    """How much of a circuit lies in the layers from `first_layer` to the last.

    Attributes:
        name: `last 10%`, `last three layers` or `last quarter`; layers are rounded up.
        share: `neurons` of all neurons of the circuit, 0 to 1.
        uniform: the share that neurons spread evenly over all of the model's would have.
    """

    name: str
    first_layer: int
    neurons: int
    share: float
    uniform: float


def layer_counts(circuit: Circuit) -> list[int]:
    """Number of the circuit's neurons in every layer of the model."""
    counts = [0] * circuit.num_layers
    for neuron in circuit.neurons:
        counts[neuron.layer] += 1
    return counts


def expert_counts(circuit: Circuit) -> list[tuple[int, int, int]]:
    """(layer, routed expert, number of neurons) of those with any, most neurons first; ties: lower
    layer, then lower expert."""
    counts = [
        (layer, expert, len(indices))
        for (layer, expert), indices in circuit.by_mlp().items()
        if expert is not None
    ]
    return sorted(counts, key=lambda entry: -entry[2])


def late_shares(circuit: Circuit) -> tuple[LateShare, ...]:
    """The shares of the last 10% of layers, the last three and the last quarter."""
    total, shape = circuit.num_layers, circuit.shape
    counts = layer_counts(circuit)
    shares = []
    for name, layers in (
        ("last 10%", -(-total // 10)),
        ("last three layers", min(3, total)),
        ("last quarter", -(-total // 4)),
    ):
        late = range(total - layers, total)
        neurons = sum(counts[layer] for layer in late)
        uniform = sum(map(shape.layer_size, late)) / shape.size
        shares.append(LateShare(name, late[0], neurons, neurons / len(circuit), uniform))
    return tuple(shares)


def strongest(circuit: Circuit, count: int) -> list[Neuron]:
    """The `count` neurons of largest |delta|; ties: lower `Neuron.place`."""
    return sorted(circuit.neurons, key=lambda neuron: -abs(neuron.delta))[:count]


def bar_chart(counts: Sequence[int], max_rows: int | None = None) -> str:
    """A line for every layer, or for groups of layers where there are more than `max_rows`.

    A bar is `BAR_WIDTH` wide at the largest count, and at least one mark where there is any.
    """
    size = 1 if max_rows is None else -(-len(counts) // max_rows)
    groups = [
        (start, min(start + size, len(counts)) - 1, sum(counts[start : start + size]))
        for start in range(0, len(counts), size)
    ]
    most = max(count for _, _, count in groups) or 1
    labels = [str(first) if first == last else f"{first}-{last}" for first, last, _ in groups]
    width = max(5, *map(len, labels))
    return "\n".join(
        f"{label:>{width}} {count:6}  {'#' * -(-count * BAR_WIDTH // most)}".rstrip()
        for label, (_, _, count) in zip(labels, groups, strict=True)
    )
