# SPDX-License-Identifier: Apache-2.0
"""Held-out separation, bootstrap of the selection, splits, and random controls."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cna_vllm.discovery.contrast import select_neurons
from cna_vllm.discovery.sets import SetRows, mean_difference, split
from cna_vllm.discovery.stability import (
    bootstrap,
    mean_signed_activation,
    random_control,
    separation,
)
from cna_vllm.steering.circuit import Circuit, CircuitError, Neuron
from cna_vllm.steering.layout import Layout
from cna_vllm.steering.shape import Shape

SIZE = Layout(Shape.of(3, 6))
CIRCUIT = Circuit("m", "A", 3, 6, (Neuron(0, 1, 2.0), Neuron(2, 5, -0.5), Neuron(2, 0, 1.0)))
SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=8)


@given(SCORES, SCORES)
@settings(deadline=None)
def test_auroc_is_the_share_of_ordered_pairs(above: list[int], below: list[int]) -> None:
    def rows(values: list[int]) -> dict[int, np.ndarray]:
        whole = np.zeros((3, len(values), 6), dtype=np.float32)
        whole[0, :, 1], whole[2, :, 5], whole[2, :, 0] = values, np.negative(values), values
        whole[1] = 1e6  # outside the circuit
        return dict(enumerate(whole))

    scores = mean_signed_activation(CIRCUIT, rows(above))
    assert scores.tolist() == pytest.approx(above)
    found = separation(scores, mean_signed_activation(CIRCUIT, rows(below)))
    pairs = [(a > b) + 0.5 * (a == b) for a, b in product(above, below)]
    assert found.auroc == pytest.approx(np.mean(pairs))


def rows_of(positive: np.ndarray, negative: np.ndarray, layers: list[int]) -> SetRows:
    """Of [layers, prompts, width]."""
    sets = (positive.astype(np.float32), negative.astype(np.float32))
    return SetRows(layers, *(np.concatenate(list(values), axis=1) for values in sets))


def test_mean_difference_over_chosen_layers() -> None:
    random = np.random.default_rng(0)
    positive, negative = random.standard_normal((2, 4, 6)), random.standard_normal((2, 3, 6))
    rows = rows_of(positive, negative, [0, 2])
    delta = mean_difference(rows, SIZE).reshape(3, 6)
    assert not delta[1].any()
    expected = rows.positive.mean(0, dtype=np.float64) - rows.negative.mean(0, dtype=np.float64)
    assert np.allclose(delta[[0, 2]].reshape(-1), expected, rtol=1e-14)
    weighted = mean_difference(rows, SIZE, (np.array([0, 0, 1, 0]), np.array([0.5, 0.5, 0])))
    chosen = rows.positive[2] - rows.negative[:2].mean(0, dtype=np.float64)
    assert np.allclose(weighted.reshape(3, 6)[[0, 2]].reshape(-1), chosen)


def test_a_clear_contrast_is_stable_and_noise_is_not() -> None:
    random = np.random.default_rng(1)
    shape = (3, 30, 6)
    clear = random.standard_normal(shape) * 0.01
    clear[0, :, 2] += 5
    clear[2, :, 4] -= 4
    noise = random.standard_normal(shape)
    select = partial(select_neurons, k=2, layout=SIZE)
    results = []
    for positive in (clear, noise):
        rows = rows_of(positive, random.standard_normal(shape) * 0.01, [0, 1, 2])
        chosen = select(mean_difference(rows, SIZE))
        results.append(bootstrap(rows, SIZE, chosen, select, 50, seed=3))
        assert results[-1] == bootstrap(rows, SIZE, chosen, select, 50, seed=3)
        assert list(results[-1][1]) == sorted(n.place for n in chosen)
    stable, unstable = results
    assert stable == (1.0, {(0, -1, 2): 1.0, (2, -1, 4): 1.0})
    assert unstable[0] < 0.9


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=2), max_size=20),
    st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    st.integers(0, 5),
)
@settings(deadline=None)
def test_split_keeps_equal_prompts_together(
    prompts: list[list[int]], fraction: float, seed: int
) -> None:
    kept, held = split(prompts, fraction, seed)
    assert (kept, held) == split(prompts, fraction, seed)
    assert sorted([*kept, *held]) == sorted(prompts)
    assert not set(map(tuple, kept)) & set(map(tuple, held))
    distinct = len(set(map(tuple, prompts)))
    assert len(set(map(tuple, held))) == round(fraction * distinct)
    assert kept == [ids for ids in prompts if ids in kept]


@given(st.integers(0, 1000))
@settings(deadline=None)
def test_a_control_has_the_profile_and_none_of_the_neurons(seed: int) -> None:
    control, again = random_control(CIRCUIT, seed), random_control(CIRCUIT, seed)
    assert replace(again, created=control.created) == control  # a second may end between the two
    profile = {layer: len(indices) for layer, indices in CIRCUIT.by_layer().items()}
    assert {layer: len(indices) for layer, indices in control.by_layer().items()} == profile
    mine = {(n.layer, n.index) for n in CIRCUIT.neurons}
    assert not mine & {(n.layer, n.index) for n in control.neurons}
    assert control.method == {"name": "random control", "seed": seed, "of": CIRCUIT.digest}
    assert all(n.delta == 0 for n in control.neurons)


def test_controls_differ_and_reach_every_other_neuron() -> None:
    seen = {n.index for seed in range(60) for n in random_control(CIRCUIT, seed).neurons}
    assert seen == set(range(6))
    full = Circuit("m", "A", 1, 6, tuple(Neuron(0, i, 1.0) for i in range(4)))
    with pytest.raises(CircuitError, match="layer 0 has 2 neurons outside"):
        random_control(full)
