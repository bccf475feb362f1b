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
from cna_vllm.discovery.prefill import Dimensions
from cna_vllm.discovery.sets import SetRows, mean_difference
from cna_vllm.steering.circuit import Circuit, CircuitError, Neuron


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

    activations: layer -> [prompts, intermediate_size], of at least the circuit's layers. Neurons
    whose delta is 0 count as 0.
    """
    columns = [
        np.sign(n.delta) * activations[n.layer][:, n.index].astype(np.float64)
        for n in circuit.neurons
    ]
    return np.mean(columns, axis=0)


def bootstrap(
    rows: SetRows,
    size: Dimensions,
    chosen: Sequence[Neuron],
    select: Callable[[NDArray[np.float64]], Sequence[Neuron]],
    resamples: int,
    seed: int,
) -> tuple[float, dict[tuple[int, int], float]]:
    """Repeats the selection on prompts drawn with replacement, each set from itself.

    select: from a delta of all layers to neurons; chosen: what it selects from all prompts.
    Returns the mean of |A and B| / |A or B| of the circuit and a resample's; and, of each neuron
    of the circuit in order, the share of resamples that select it.
    """
    draw = np.random.default_rng(seed)
    full = {(n.layer, n.index) for n in chosen}
    hits = dict.fromkeys(sorted(full), 0)
    overlaps = []

    def weights(values: NDArray[np.float32]) -> NDArray[np.float64]:
        count = values.shape[1]
        return draw.multinomial(count, np.full(count, 1 / count)) / count

    for _ in range(resamples):
        delta = mean_difference(rows, size, (weights(rows.positive), weights(rows.negative)))
        found = {(n.layer, n.index) for n in select(delta)}
        overlaps.append(len(found & full) / len(found | full))
        for neuron in found & full:
            hits[neuron] += 1
    frequency = {neuron: count / resamples for neuron, count in hits.items()}
    return float(np.mean(overlaps)), frequency


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
