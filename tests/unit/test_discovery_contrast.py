# SPDX-License-Identifier: Apache-2.0
"""Selection against a sort written out, ties and all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from cna_vllm.discovery.contrast import SIGNS, Sign, circuit_size, select_neurons
from cna_vllm.steering.circuit import Circuit

Deltas = NDArray[np.float64]

# Few values, so that ties are the rule; the full range of float64 beside them.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 5e-324, 1e308]) | st.floats(
    allow_nan=False, allow_infinity=False
)
DELTAS = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=VALUES, fill=VALUES
)


def naive(
    delta: Deltas, k: int, sign: str, layers: set[int] | None
) -> list[tuple[int, int, float]]:
    wanted = []
    for layer in range(delta.shape[0]):
        for index in range(delta.shape[1]):
            value = float(delta[layer, index])
            if layers is not None and layer not in layers:
                continue
            if {"both": value != 0, "positive": value > 0, "negative": value < 0}[sign]:
                wanted.append((layer, index, value))
    return sorted(wanted, key=lambda n: (-abs(n[2]), n[0], n[1]))[:k]


@given(DELTAS, st.integers(1, 50), st.sampled_from(SIGNS), st.data())
@settings(max_examples=300, deadline=None)
def test_equals_a_naive_sort(delta: Deltas, k: int, sign: Sign, data: st.DataObject) -> None:
    layers = data.draw(st.none() | st.sets(st.integers(0, delta.shape[0] - 1)))
    before = delta.copy()
    found = select_neurons(delta, k, sign=sign, layers=layers)
    assert [(n.layer, n.index, n.delta) for n in found] == naive(delta, k, sign, layers)
    assert np.array_equal(delta, before)
    if found:  # what is selected can be written down as a circuit
        circuit = Circuit("m", "A", *delta.shape, tuple(found))
        assert len(circuit) == len(found)
        assert {type(v) for n in found for v in (n.layer, n.index)} == {int}


def test_ties_go_to_the_lower_layer_and_then_to_the_lower_index() -> None:
    delta = np.array([[0.0, 1.0, -1.0], [-1.0, 2.0, 1.0]])
    found = [(n.layer, n.index) for n in select_neurons(delta, 4)]
    assert found == [(1, 1), (0, 1), (0, 2), (1, 0)]


def test_many_equal_values_keep_their_order() -> None:
    """Sorts that are stable only for short arrays show here."""
    delta = np.where(np.arange(4000).reshape(8, 500) % 2, 1.0, -1.0)
    found = [(n.layer, n.index) for n in select_neurons(delta, 1234)]
    assert found == [divmod(i, 500) for i in range(1234)]


def test_zeros_are_never_selected() -> None:
    delta = np.array([[0.0, -0.0, 3.0], [-0.5, 0.0, 0.0]])
    assert [(n.layer, n.index) for n in select_neurons(delta, 100)] == [(0, 2), (1, 0)]
    assert select_neurons(np.zeros((2, 3)), 1) == []
    assert [n.delta for n in select_neurons(delta, 100, sign="positive")] == [3.0]
    assert [n.delta for n in select_neurons(delta, 100, sign="negative")] == [-0.5]
    assert select_neurons(delta, 100, layers=[]) == []
    assert select_neurons(np.abs(delta), 100, sign="negative") == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sign", SIGNS)
def test_values_that_are_not_finite_are_refused(value: float, sign: Sign) -> None:
    delta = np.ones((3, 4))
    delta[2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        select_neurons(delta, 1, sign=sign, layers=[0])


@pytest.mark.parametrize("layers", [[3], [-1], [0, 7]])
def test_layers_out_of_range_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"layers \[.*not in 0\.\.2"):
        select_neurons(np.ones((3, 4)), 1, layers=layers)


def test_an_unknown_sign_is_refused() -> None:
    with pytest.raises(ValueError, match="sign must be one of both, positive, negative"):
        select_neurons(np.ones((3, 4)), 1, sign="Both")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "width", "fraction", "k"),
    [
        (28, 8960, 0.001, 250),
        (32, 14336, 0.001, 458),
        (30, 1536, 0.001, 46),
        (2, 16, 0.001, 1),
        (2, 16, 1.0, 32),
        (1, 1, 1e-9, 1),
        (10, 1000, 0.001, 10),
        (2, 5, 0.5, 5),
    ],
)
def test_circuit_size(layers: int, width: int, fraction: float, k: int) -> None:
    assert circuit_size(layers * width, fraction) == k
    assert type(circuit_size(layers * width, fraction)) is int


@given(st.integers(1, 128), st.integers(1, 40_000))
@settings(deadline=None)
def test_circuit_size_of_the_paper(layers: int, width: int) -> None:
    assert circuit_size(layers * width, 0.001) == max(1, layers * width // 1000)


@given(st.integers(1, 50), st.integers(1, 200), st.integers(1, 1000))
@example(10, 10, 11)
@example(1, 1, 290)
@settings(deadline=None)
def test_circuit_size_is_the_floor_of_the_fraction_as_written(
    layers: int, hundreds: int, thousandths: int
) -> None:
    """0.29 of 100 neurons are 29, though 0.29 * 100 is 28.999... in float64."""
    exact = thousandths * layers * 100 * hundreds // 1000
    assert circuit_size(layers * 100 * hundreds, thousandths / 1000) == max(1, exact)
