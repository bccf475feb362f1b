# SPDX-License-Identifier: Apache-2.0
"""Discovery over layers of widths of their own, without an MLP, and with routed experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cna_vllm.discovery.activations import TokenRows, place_rows
from cna_vllm.discovery.contrast import circuit_size, select_neurons
from cna_vllm.discovery.sets import SetRows, mean_difference
from cna_vllm.discovery.shares import Mean, assemble
from cna_vllm.discovery.stability import bootstrap, mean_signed_activation, random_control
from cna_vllm.discovery.universal import GROUP, UniversalRule, membership
from cna_vllm.serving.worker.sinks import Rows, Sum, Top
from cna_vllm.steering.circuit import Circuit, CircuitError, Neuron
from cna_vllm.steering.layout import Layout, Places
from cna_vllm.steering.shape import Shape

SHAPE = Shape((4, 0, 2, 0), (0, 0, 3, 2), (0, 0, 2, 4))
LAYOUT = Layout(SHAPE)
# (layer, expert, index) of every neuron, in the order of their numbers.
TRIPLES = [
    *((0, -1, i) for i in range(4)),
    *((2, -1, i) for i in range(2)),
    *((2, e, i) for e in range(3) for i in range(2)),
    *((3, e, i) for e in range(2) for i in range(4)),
]
MLPS = [(0, -1), (2, -1), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1)]
# Parts (layer, expert, offset, width) of the ranks of an engine.
WHOLE = [[(layer, e, 0, SHAPE.width(layer, None if e < 0 else e)) for layer, e in MLPS]]
HALVES = [
    [(la, e, half * (w // 2), w // 2) for la, e, _, w in WHOLE[0]]  # each MLP in two
    for half in (1, 0)
]
EXPERTS_APART = [  # dense parts in two, whole experts, on two pipeline stages
    [(0, -1, 0, 2)],
    [(0, -1, 2, 2)],
    [(2, -1, 1, 1), (2, 0, 0, 2), (2, 2, 0, 2), (3, 1, 0, 4)],
    [(2, -1, 0, 1), (2, 1, 0, 2), (3, 0, 0, 4)],
]
SPLITS = [WHOLE, HALVES, EXPERTS_APART]
Parts = list[tuple[int, int, int, int]]


def parts_bytes(parts: Parts) -> bytes:
    return np.array(parts, dtype=np.int32).tobytes()


def mine(parts: Parts) -> list[int]:
    """Numbers of a rank's neurons, written out."""
    return [TRIPLES.index((la, e, o + i)) for la, e, o, w in parts for i in range(w)]


def test_numbers() -> None:
    assert (LAYOUT.size, LAYOUT.mlps, LAYOUT.num_layers) == (len(TRIPLES), len(MLPS), 4)
    neurons = LAYOUT.neurons(np.arange(LAYOUT.size), np.arange(LAYOUT.size) / 8)
    assert [n.place for n in neurons] == TRIPLES == sorted(TRIPLES)
    assert [n.delta for n in neurons] == [i / 8 for i in range(LAYOUT.size)]
    assert {n.expert for n in neurons} == {None, 0, 1, 2}
    assert [LAYOUT.number(n) for n in neurons] == list(range(LAYOUT.size))
    assert [*zip(LAYOUT.mlp_layers, LAYOUT.mlp_experts, strict=True)] == MLPS
    assert [LAYOUT.mlp(*mlp) for mlp in MLPS] == list(range(len(MLPS)))
    by_layer = LAYOUT.by_layer(np.array([layer for layer, _, _ in TRIPLES]))
    assert [set(values.tolist()) for values in by_layer] == [{0}, set(), {2}, {3}]
    assert LAYOUT.numbers([0, 1, 3]).tolist() == [*range(4), *range(12, 20)]
    for split in SPLITS:
        for parts in split:
            places = Places.of(parts_bytes(parts), LAYOUT)
            assert places.neurons.tolist() == mine(parts)
            assert [MLPS[m] for m in places.mlps] == [part[:2] for part in parts]


def recorded(seed: int, prompts: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """[prompts, neurons], 0 where not routed, and [prompts, MLPs]."""
    random = np.random.default_rng(seed)
    values = random.integers(1, 5, (prompts, LAYOUT.size)) * random.choice([-0.5, 0.5])
    reached = np.ones((prompts, len(MLPS)), dtype=bool)
    for row in reached:
        row[random.integers(2, 5)] = False  # two of three experts
        row[random.integers(5, 7)] = False  # one of two
    of = [MLPS.index(triple[:2]) for triple in TRIPLES]
    return (values * reached[:, of]).astype(np.float32), reached


def fed(sink: Any, parts: Parts, values: Any, reached: Any, names: list[str]) -> Any:
    for name, row, hit in zip(names, values, reached, strict=True):
        sink.add(
            name,
            torch.from_numpy(row[mine(parts)]),
            torch.from_numpy(hit[[MLPS.index(p[:2]) for p in parts]].astype(np.uint8)),
        )
    return sink.report()


@given(st.integers(0, 2**32 - 1), st.sampled_from(SPLITS), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_means_over_all_and_over_routed_prompts(seed: int, split: list[Parts], count: int) -> None:
    values, reached = recorded(seed, count)
    names = [str(i) for i in range(count)]
    reports = [
        {"parts": parts_bytes(p), "groups": {"g": fed(Sum(), p, values, reached, names)}}
        for p in split
    ]
    mean = assemble(reports, {"g": count}, LAYOUT)["g"]
    assert np.allclose(mean.mean, values.sum(0, dtype=np.float64) / count, rtol=1e-15)
    assert np.array_equal(mean.routed, reached.sum(0))
    over = mean.over_routed(LAYOUT, np.arange(LAYOUT.size))
    for number, triple in enumerate(TRIPLES):
        rows = reached[:, MLPS.index(triple[:2])]
        expected = values[rows, number].astype(np.float64).mean() if rows.any() else np.nan
        assert over[number] == pytest.approx(expected, nan_ok=True)


def test_a_recording_with_a_hole_is_refused() -> None:
    values, reached = recorded(0, 3)
    names = ["0", "1", "2"]
    reports = [
        {"parts": parts_bytes(p), "groups": {"g": fed(Sum(), p, values, reached, names)}}
        for p in EXPERTS_APART
    ]
    for missing in range(4):
        with pytest.raises(RuntimeError, match="a worker's share is missing"):
            assemble([r for i, r in enumerate(reports) if i != missing], {"g": 3}, LAYOUT)
    # A layer whose experts never wrote: its hook was not called.
    reached[:, 5:] = False
    silent = {"parts": parts_bytes(WHOLE[0])}
    silent["groups"] = {"g": fed(Sum(), WHOLE[0], values, reached, names)}  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="layer 3 recorded 0 routed experts for 3 prompts"):
        assemble([silent], {"g": 3}, LAYOUT)


@given(st.integers(0, 2**32 - 1), st.sampled_from(SPLITS), st.integers(1, LAYOUT.size))
@settings(max_examples=80, deadline=None)
def test_universal_neurons_of_experts(seed: int, split: list[Parts], k: int) -> None:
    """Ties are the rule, also between ranks; an expert that is not reached is 0."""
    values, reached = recorded(seed, 4)
    reports = []
    for parts in split:
        top = Top(k, 4, len(mine(parts)), torch.device("cpu"))
        names = [f"r{i}" for i in range(4)]
        kept = fed(top, parts, values, reached, names)
        reports.append({"parts": parts_bytes(parts), "top": {GROUP: kept}})
    expected = np.zeros(LAYOUT.size, dtype=np.int64)
    for row in values:
        expected[sorted(range(LAYOUT.size), key=lambda i: (-abs(row[i]), i))[:k]] += 1
    assert np.array_equal(membership(reports, 4, k, LAYOUT), expected)
    assert UniversalRule(0.1).top(LAYOUT) == circuit_size(LAYOUT.size, 0.1) == 2


@given(st.integers(0, 2**32 - 1), st.sampled_from(SPLITS), st.sets(st.sampled_from([0, 1, 2, 3])))
@settings(max_examples=60, deadline=None)
def test_rows_of_chosen_layers(seed: int, split: list[Parts], chosen: set[int]) -> None:
    values, reached = recorded(seed, 3)
    layers = sorted(chosen)
    wanted = LAYOUT.numbers(layers)
    reports = []
    for shift, parts in enumerate(split):
        order = np.roll(np.arange(3), shift)
        kept = [la for la in layers if la in {p[0] for p in parts}]
        at = [TRIPLES[i][0] for i in mine(parts)]
        places = [slice(at.index(la), len(at) - at[::-1].index(la)) for la in kept]
        rows = Rows(places, 3, len(parts), torch.float32, torch.device("cpu"))
        report = fed(rows, parts, values[order], reached[order], [str(i) for i in order])
        reports.append({"parts": parts_bytes(parts), "rows": {"layers": kept, **report}})
    widths = tuple(LAYOUT.width([layer]) for layer in layers)
    found = TokenRows(
        widths, np.zeros((3, len(wanted)), np.float32), np.zeros((3, len(MLPS)), bool)
    )
    place_rows(reports, range(3), layers, LAYOUT, found)
    assert np.array_equal(found.values, values[:, wanted])
    assert np.array_equal(found.reached, reached)
    for layer, rows in zip(layers, found.by_layer(), strict=True):
        assert np.array_equal(rows, values[:, LAYOUT.layer(layer)])


VALUES = st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0])


@given(
    st.lists(VALUES, min_size=LAYOUT.size, max_size=LAYOUT.size),
    st.integers(1, LAYOUT.size + 3),
    st.sampled_from(["both", "positive", "negative"]),
    st.none() | st.sets(st.integers(0, 3)),
    st.sets(st.integers(0, LAYOUT.size - 1)),
)
@settings(max_examples=150, deadline=None)
def test_selection(values: Any, k: int, sign: Any, layers: Any, out: set[int]) -> None:
    """Ties: lower layer, then the dense or shared MLP, the lower expert, the lower index."""
    excluded = np.isin(np.arange(LAYOUT.size), sorted(out))
    found = select_neurons(
        np.array(values), k, sign=sign, layers=layers, excluded=excluded, layout=LAYOUT
    )
    wanted = [
        (-abs(v), triple)
        for i, (v, triple) in enumerate(zip(values, TRIPLES, strict=True))
        if {"both": v != 0, "positive": v > 0, "negative": v < 0}[sign]
        and i not in out
        and (layers is None or triple[0] in layers)
    ]
    assert [(-abs(n.delta), n.place) for n in found] == sorted(wanted)[:k]
    if found:
        assert len(Circuit("m", "A", neurons=tuple(found), **SHAPE.fields())) == len(found)


CIRCUIT = Circuit(
    "m",
    "A",
    neurons=(Neuron(0, 1, 2.0), Neuron(2, 1, -1.0), Neuron(2, 0, 1.0, 2), Neuron(3, 3, -0.5, 1)),
    **SHAPE.fields(),
)


def test_held_out_scores() -> None:
    values = recorded(1, 5)[0]
    by_layer = {layer: values[:, LAYOUT.layer(layer)] for layer in (0, 2, 3)}
    at = [TRIPLES.index(place) for place in ((0, -1, 1), (2, -1, 1), (2, 2, 0), (3, 1, 3))]
    expected = (values[:, at] * [1, -1, 1, -1]).mean(1)
    assert mean_signed_activation(CIRCUIT, by_layer).tolist() == pytest.approx(expected)


def test_resampling() -> None:
    positive, negative = recorded(2, 6)[0], recorded(3, 5)[0]
    number = TRIPLES.index((3, 1, 2))
    positive[:, number] += 50
    rows = SetRows([2, 3], *(v[:, LAYOUT.numbers([2, 3])] for v in (positive, negative)))
    delta = mean_difference(rows, LAYOUT)
    expected = positive.mean(0, dtype=np.float64) - negative.mean(0, dtype=np.float64)
    expected[:4] = 0
    assert np.allclose(delta, expected)
    select = partial(select_neurons, k=1, layout=LAYOUT)
    found = bootstrap(rows, LAYOUT, select(delta), select, 20, seed=0)
    assert found == (1.0, {(3, 1, 2): 1.0})


def test_a_control_has_the_profile_of_every_expert() -> None:
    controls = [random_control(CIRCUIT, seed) for seed in range(60)]
    for control in controls:
        profile = {mlp: len(indices) for mlp, indices in control.by_mlp().items()}
        assert profile == {(0, None): 1, (2, None): 1, (2, 2): 1, (3, 1): 1}
        assert not {n.place for n in CIRCUIT.neurons} & {n.place for n in control.neurons}
    seen = {n.place for control in controls for n in control.neurons}
    mlps = {(0, -1), (2, -1), (2, 2), (3, 1)}
    all_of_them = {triple for triple in TRIPLES if triple[:2] in mlps}
    assert seen == all_of_them - {n.place for n in CIRCUIT.neurons}
    full = Circuit("m", "A", neurons=(Neuron(2, 0, 1.0, 1), Neuron(2, 1, 1.0, 1)), **SHAPE.fields())
    with pytest.raises(CircuitError, match="layer 2, expert 1, has 0 neurons outside"):
        random_control(full)


def test_a_mean_that_nobody_reached() -> None:
    mean = Mean(np.zeros(LAYOUT.size), 3, np.array([3, 3, 0, 3, 3, 3, 0]))
    over = mean.over_routed(LAYOUT, np.array([0, 6, 8]))
    assert over[0] == over[2] == 0 and np.isnan(over[1])
