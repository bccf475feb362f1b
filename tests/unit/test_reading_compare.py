# SPDX-License-Identifier: Apache-2.0
"""Overlap, chance and agreement of two circuits, against counting by hand."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from cna_vllm import Circuit, CircuitError, Neuron
from cna_vllm.reading.compare import compare
from cna_vllm.reading.report import comparison_json, comparison_text

LAYERS, WIDTH = 6, 50


def circuit(*neurons: Neuron, model: str = "org/base", width: int = WIDTH) -> Circuit:
    return Circuit(model, "LlamaForCausalLM", LAYERS, width, neurons)


def scattered(count: int, seed: int, model: str = "org/base") -> Circuit:
    rng = random.Random(seed)
    places = rng.sample(list(itertools.product(range(LAYERS), range(WIDTH))), count)
    return circuit(*(Neuron(*place, rng.uniform(-5, 5)) for place in places), model=model)


def test_overlap_is_that_of_the_sets() -> None:
    a, b = scattered(60, 1), scattered(90, 2, "org/instruct")
    result = compare(a, b)
    left, right = ({(n.layer, n.index) for n in c.neurons} for c in (a, b))
    assert {(n.layer, n.index) for n, _ in result.common} == left & right
    assert result.jaccard == len(left & right) / len(left | right)
    assert sum(both for _, _, both in result.by_layer) == len(left & right)
    assert [sum(column) for column in zip(*result.by_layer, strict=True)][:2] == [60, 90]


def test_uniform_chance_is_hypergeometric() -> None:
    a, b = scattered(40, 3), scattered(50, 4)
    result, total = compare(a, b), LAYERS * WIDTH
    seen = len(result.common)
    tail = sum(math.comb(50, i) * math.comb(total - 50, 40 - i) for i in range(seen, 41))
    assert result.uniform.expected == pytest.approx(40 * 50 / total)
    assert result.uniform.p_value == pytest.approx(tail / math.comb(total, 40))


def test_chance_within_layers_by_enumeration() -> None:
    """Two layers of four neurons: every pair of draws with the same profile is counted."""
    a = Circuit("m", "X", 2, 4, tuple(Neuron(*p) for p in [(0, 0), (0, 1), (1, 0), (1, 2)]))
    b = Circuit("m", "X", 2, 4, tuple(Neuron(*p) for p in [(0, 1), (1, 0), (1, 2), (1, 3)]))
    result = compare(a, b)
    assert len(result.common) == 3
    overlaps = [
        len({0, 1} & set(low)) + len({0, 2} & set(high))
        for low in itertools.combinations(range(4), 1)
        for high in itertools.combinations(range(4), 3)
    ]
    assert result.within_layers.expected == pytest.approx(sum(overlaps) / len(overlaps))
    assert result.within_layers.p_value == pytest.approx(
        sum(o >= 3 for o in overlaps) / len(overlaps)
    )


def test_late_circuits_overlap_within_layers_by_chance_but_not_uniformly() -> None:
    a = circuit(*(Neuron(5, i) for i in range(25)))
    b = circuit(*(Neuron(5, i) for i in range(12, 37)))
    result = compare(a, b)
    assert result.uniform.p_value < 1e-6 < 0.3 < result.within_layers.p_value


def test_a_circuit_and_itself() -> None:
    a = scattered(30, 5)
    result = compare(a, a)
    assert (result.jaccard, result.same_sign) == (1.0, 1.0)
    assert result.correlation == pytest.approx(1.0)
    assert result.uniform.p_value == pytest.approx(1 / math.comb(LAYERS * WIDTH, 30))


def test_signs_and_correlation_of_the_common_neurons() -> None:
    a = circuit(Neuron(0, 0, 1.0), Neuron(0, 1, 2.0), Neuron(0, 2, -3.0), Neuron(0, 3, 0.0))
    b = circuit(Neuron(0, 0, -1.0), Neuron(0, 1, -2.0), Neuron(0, 2, -3.0), Neuron(0, 3, 9.0))
    result = compare(a, b)
    assert result.same_sign == pytest.approx(1 / 3)  # the pair with a delta of 0 does not count
    x, y = [1.0, 2.0, -3.0, 0.0], [-1.0, -2.0, -3.0, 9.0]
    mx, my = sum(x) / 4, sum(y) / 4
    covariance = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    scale = math.sqrt(sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))
    assert result.correlation == pytest.approx(covariance / scale)


def test_nothing_in_common_and_no_deltas() -> None:
    apart = compare(circuit(Neuron(0, 0, 1.0)), circuit(Neuron(1, 0, 1.0)))
    assert (apart.jaccard, apart.same_sign, apart.correlation) == (0.0, None, None)
    assert apart.uniform.p_value == pytest.approx(1.0)
    plain = circuit(*(Neuron(0, i) for i in range(4)))
    assert compare(plain, plain).correlation is None
    assert "sign agreement unknown, correlation unknown" in comparison_text(apart)


@pytest.mark.parametrize(
    "other",
    [
        circuit(Neuron(0, 0), model="org/wide", width=64),
        Circuit("org/deep", "LlamaForCausalLM", 7, WIDTH, (Neuron(0, 0),)),
        Circuit("org/qwen", "Qwen2ForCausalLM", LAYERS, WIDTH, (Neuron(0, 0),)),
    ],
)
def test_other_shapes_are_refused_with_both_names(other: Circuit) -> None:
    with pytest.raises(CircuitError) as refused:
        compare(circuit(Neuron(0, 0)), other)
    assert "'org/base'" in str(refused.value) and f"{other.model!r}" in str(refused.value)


def test_json_holds_what_the_text_says() -> None:
    result = compare(scattered(60, 1), scattered(90, 2, "org/instruct"))
    data = comparison_json(result)
    assert data["overlap"] == len(data["common"]) == len(result.common)
    assert data["b"]["model"] == "org/instruct"
    assert f"Jaccard {data['jaccard']:.3f}" in comparison_text(result)
    assert len(data["by_layer"]) == LAYERS
