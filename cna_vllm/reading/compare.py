# SPDX-License-Identifier: Apache-2.0
"""What two circuits of models of the same shape share, and how much of it chance explains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cna_vllm.reading.profile import layer_counts
from cna_vllm.steering.circuit import Circuit, CircuitError, Neuron
from cna_vllm.steering.shape import Shape


@dataclass(frozen=True)
class Chance:
    """The overlap that random circuits would have.

    Attributes:
        expected: mean number of common neurons.
        p_value: probability of at least as many common neurons as were seen.
    """

    expected: float
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """Two circuits side by side; made by `compare`.

    Attributes:
        common: the neurons in both, each as it is in the first and in the second.
        by_layer: for every layer the neurons of the first, of the second, and in both.
        jaccard: common neurons of all neurons in either, 0 to 1.
        uniform: chance where each circuit's neurons are drawn from all neurons of the model
            (hypergeometric).
        within_layers: chance where each circuit keeps its number of neurons in every layer, so
            that "both lie late" explains nothing (a sum of hypergeometrics).
        same_sign: share of the common neurons with deltas of equal sign; None where no pair of
            nonzero deltas is common.
        correlation: Pearson's, of the deltas of the common neurons; None below three of them or
            where one side is constant.
    """

    first: Circuit
    second: Circuit
    common: tuple[tuple[Neuron, Neuron], ...]
    by_layer: tuple[tuple[int, int, int], ...]
    jaccard: float
    uniform: Chance
    within_layers: Chance
    same_sign: float | None
    correlation: float | None


def compare(first: Circuit, second: Circuit) -> Comparison:
    """Compares two circuits neuron by neuron; raises CircuitError where no neuron is the same,
    since architectures or dimensions differ."""
    shape = common_shape(first, second)
    others = {neuron.place: neuron for neuron in second.neurons}
    common = tuple(
        (neuron, others[neuron.place]) for neuron in first.neurons if neuron.place in others
    )
    shared = [0] * first.num_layers
    for neuron, _ in common:
        shared[neuron.layer] += 1
    by_layer = tuple(zip(layer_counts(first), layer_counts(second), shared, strict=True))
    sizes = [(a, b, shape.layer_size(layer)) for layer, (a, b, _) in enumerate(by_layer)]
    return Comparison(
        first,
        second,
        common,
        by_layer,
        jaccard=len(common) / (len(first) + len(second) - len(common)),
        uniform=_chance(len(common), [(len(first), len(second), shape.size)]),
        within_layers=_chance(len(common), sizes),
        same_sign=_same_sign(common),
        correlation=_correlation(common),
    )


def common_shape(first: Circuit, second: Circuit) -> Shape:
    """That of the models of both; a circuit without routed neurons says nothing about experts.
    Raises CircuitError where it is not the same."""
    one, two = first.shape, second.shape
    if not (first.is_routed and second.is_routed):
        one, two = one.dense(), two.dense()
    if (first.architecture, one) != (second.architecture, two):
        raise CircuitError(
            f"{_describe(first)} cannot be compared with {_describe(second)}: "
            "their neurons are not the same"
        )
    return (first if first.is_routed else second).shape


def _chance(overlap: int, pools: list[tuple[int, int, int]]) -> Chance:
    """Chance over independent pools: the sizes of both draws, and the neurons they are from."""
    import numpy as np
    from scipy.stats import hypergeom

    total = np.ones(1)  # distribution of the overlap so far
    for a, b, population in pools:
        if a and b:
            counts = np.arange(min(a, b) + 1)
            total = np.convolve(total, hypergeom.pmf(counts, population, a, b))
    expected = sum(a * b / population for a, b, population in pools if a and b)
    if len(pools) == 1:  # exact far into the tail, where a sum of the mass would lose digits
        a, b, population = pools[0]
        return Chance(expected, float(hypergeom.sf(overlap - 1, population, a, b)))
    return Chance(expected, min(1.0, float(total[overlap:].sum())))


def _same_sign(common: tuple[tuple[Neuron, Neuron], ...]) -> float | None:
    equal = [(a.delta > 0) == (b.delta > 0) for a, b in common if a.delta and b.delta]
    return sum(equal) / len(equal) if equal else None


def _correlation(common: tuple[tuple[Neuron, Neuron], ...]) -> float | None:
    import numpy as np

    if len(common) < 3:
        return None
    deltas = np.array([(a.delta, b.delta) for a, b in common])
    if (np.ptp(deltas, axis=0) == 0).any():
        return None
    value = float(np.corrcoef(deltas.T)[0, 1])
    return value if math.isfinite(value) else None


def _describe(circuit: Circuit) -> str:
    return f"the circuit of {circuit.model!r} ({circuit.architecture}, {circuit.shape})"
