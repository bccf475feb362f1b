# SPDX-License-Identifier: Apache-2.0
"""How far a circuit can be trusted: held-out separation, selection under resampled prompts, and
what the choice of its neurons is worth."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cna_vllm.discovery.activations import Activations
from cna_vllm.discovery.sets import SetRows, mean_difference
from cna_vllm.steering.circuit import Circuit, CircuitError, Neuron
from cna_vllm.steering.layout import Layout

Place = tuple[int, int, int]
"""Layer, routed expert (-1 for none) and index: ``Neuron.place``."""


@dataclass(frozen=True)
class Separation:
    """How well one number per prompt tells two sets apart.

    auroc: probability that a positive prompt scores above a negative one, ties counting half;
    0.5 is chance. p_value: of the two-sided Mann-Whitney U test.
    """

    auroc: float
    p_value: float


def separation(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> Separation:
    """positive, negative: scores, one a prompt, for instance ``mean_signed_activation``."""
    test = stats.mannwhitneyu(positive, negative, alternative="two-sided")
    auroc = float(test.statistic) / (len(positive) * len(negative))
    return Separation(auroc, float(test.pvalue))


def mean_signed_activation(circuit: Circuit, activations: Activations) -> NDArray[np.float64]:
    """Mean over the circuit's neurons of sign(delta) * a, for each prompt: float64 [prompts].

    activations: of at least the circuit's layers, as ``record_activations`` has them of a model of
    the circuit's shape. Neurons whose delta is 0 count as 0.
    """
    layout = Layout(circuit.shape)
    columns = [
        np.sign(n.delta)
        * activations[n.layer][:, layout.number(n) - layout.layer(n.layer).start].astype(np.float64)
        for n in circuit.neurons
    ]
    return np.mean(columns, axis=0)


def bootstrap(
    rows: SetRows,
    layout: Layout,
    chosen: Sequence[Neuron],
    select: Callable[[NDArray[np.float64]], Sequence[Neuron]],
    resamples: int,
    seed: int,
) -> tuple[float, dict[Place, float]]:
    """Repeats the selection on prompts drawn with replacement, each set from itself.

    select: from a delta of all neurons to some; chosen: what it selects from all prompts.
    Returns the mean of |A and B| / |A or B| of the circuit and a resample's; and, of each neuron
    of the circuit in order, the share of resamples that select it.
    """
    draw = np.random.default_rng(seed)
    full = {n.place for n in chosen}
    hits = dict.fromkeys(sorted(full), 0)
    overlaps = []

    def weights(values: NDArray[np.float32]) -> NDArray[np.float64]:
        count = len(values)
        return draw.multinomial(count, np.full(count, 1 / count)) / count

    for _ in range(resamples):
        delta = mean_difference(rows, layout, (weights(rows.positive), weights(rows.negative)))
        found = {n.place for n in select(delta)}
        overlaps.append(len(found & full) / len(found | full))
        for neuron in found & full:
            hits[neuron] += 1
    frequency = {neuron: count / resamples for neuron, count in hits.items()}
    return float(np.mean(overlaps)), frequency


def random_control(circuit: Circuit, seed: int = 0) -> Circuit:
    """As many neurons in each MLP as ``circuit`` has, drawn uniformly from those it has not; each
    routed expert is an MLP of its own.

    Their delta is 0, since none is known, and no prompts are named, since none chose them. Raises
    CircuitError when an MLP has too few others.
    """
    draw = random.Random(seed)
    neurons = []
    for (layer, expert), taken in circuit.by_mlp().items():
        others = sorted(set(range(circuit.shape.width(layer, expert))).difference(taken))
        if len(others) < len(taken):
            where = f"layer {layer}" + ("" if expert is None else f", expert {expert},")
            raise CircuitError(
                f"{where} has {len(others)} neurons outside the circuit, too few for a "
                f"control of {len(taken)}; discover a smaller circuit"
            )
        indices = draw.sample(others, len(taken))
        neurons += [Neuron(layer, index, expert=expert) for index in indices]
    return replace(
        circuit,
        neurons=tuple(neurons),
        method={"name": "random control", "seed": seed, "of": circuit.digest},
        prompts={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=(),
    )
