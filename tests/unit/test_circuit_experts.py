# SPDX-License-Identifier: Apache-2.0
"""Circuits of models with layers of several widths and with routed experts: file version 2."""

from __future__ import annotations

import dataclasses
import json
import random
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cna_vllm import Circuit, CircuitError, Neuron
from cna_vllm.reading.compare import compare
from cna_vllm.steering.circuit import shared_neurons
from cna_vllm.steering.shape import Shape
from tests.unit.test_circuit import JSON_VALUES

# A dense first layer, two with a shared expert and four routed ones, one of routed ones only.
SHAPE = Shape((24, 16, 16, 0), (0, 4, 4, 4), (0, 8, 8, 8))
MODEL: dict[str, Any] = {"model": "org/moe", "architecture": "DeepseekV3ForCausalLM"}
MODEL |= SHAPE.fields()
NEURONS = (
    Neuron(3, 7, -0.5, 2),
    Neuron(0, 23, 2.0),
    Neuron(1, 7, 1.0, 0),
    Neuron(1, 7, 1.5),
    Neuron(1, 2, 0.25, 3),
)
DENSE = (Neuron(0, 23, 2.0), Neuron(1, 15, 1.0))


def circuit(**changes: Any) -> Circuit:
    return Circuit(**{**MODEL, "neurons": NEURONS, **changes})


def document(**changes: Any) -> dict[str, Any]:
    data = circuit().to_dict()
    del data["digest"]
    return {**data, **changes}


def neuron(layer: Any = 1, index: Any = 0, delta: Any = 1.0, **expert: Any) -> dict[str, Any]:
    return {"layer": layer, "index": index, "delta": delta, **expert}


def test_fields_say_it_briefly_and_back() -> None:
    assert MODEL["intermediate_size"] == [24, 16, 16, 0]
    assert MODEL["experts"] == {"count": [0, 4, 4, 4], "intermediate_size": 8}
    draw = random.Random(0)
    for _ in range(200):
        layers = range(draw.randint(1, 5))
        counts = [draw.choice((0, 2, 3)) for _ in layers]
        shape = Shape(
            tuple(draw.choice((0, 5, 6)) for _ in layers),
            tuple(counts),
            tuple(draw.choice((7, 8)) if count else 0 for count in counts),
        )
        assert Shape.of(**json.loads(json.dumps(shape.fields()))) == shape
    assert Shape.of(2, 6).fields() == {"num_layers": 2, "intermediate_size": 6}
    assert str(SHAPE) == (
        "4 layers, intermediate size 1 x 24, 2 x 16, 1 x 0, 3 layers with 4 experts of 8"
    )


def test_neurons_are_sorted_by_layer_expert_index() -> None:
    assert [n.place for n in circuit().neurons] == [
        (0, -1, 23),
        (1, -1, 7),
        (1, 0, 7),
        (1, 3, 2),
        (3, 2, 7),
    ]
    assert circuit().by_mlp() == {(0, None): (23,), (1, None): (7,), (1, 0): (7,), (1, 3): (2,)} | {
        (3, 2): (7,)
    }
    with pytest.raises(CircuitError, match="routed experts"):
        circuit().by_layer()
    assert circuit(neurons=DENSE).by_layer() == {0: (23,), 1: (15,)}


def test_a_file_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    circuit().save(path)
    written = json.loads(path.read_text())
    assert written["version"] == 2
    assert written["neurons"][1] == {"layer": 1, "index": 7, "delta": 1.5}
    assert written["neurons"][2] == {"layer": 1, "expert": 0, "index": 7, "delta": 1.0}
    loaded = Circuit.load(path, **MODEL)
    assert loaded == circuit()
    assert loaded.digest == circuit().digest == written["digest"]
    assert loaded.shape == SHAPE
    with pytest.raises(CircuitError, match="'digest'"):
        Circuit.from_dict({**written, "neurons": written["neurons"][1:]})


def test_the_oldest_version_that_can_say_it() -> None:
    # Of a model of one width, a circuit that names no expert is what it was before there were any.
    fields: dict[str, Any] = {**MODEL, "intermediate_size": 16, "neurons": (Neuron(1, 2, 3.0),)}
    plain = Circuit(**{**fields, "experts": None})
    assert Circuit(**fields) == plain
    assert plain.to_dict()["version"] == 1 and "experts" not in plain.to_dict()
    assert plain.digest == "8579a8819a359683ccf6b0a137beb60bb42910f15f27c3d456d0418a73de1895"
    assert circuit(neurons=DENSE).to_dict()["version"] == 2
    assert circuit(neurons=DENSE).experts is None
    for change in ({"neurons": document()["neurons"][:2]}, {}):
        with pytest.raises(CircuitError, match="'version' is 1, but only 2"):
            Circuit.from_dict(document(version=1, **change))


def test_digests_of_version_2_are_stable_and_of_the_content() -> None:
    assert circuit().digest == "e1cd50a40f1576b1f33e12f7481a79630fc3c998fa6a9478790bdc744e6989df"
    dense = "fbc439179e0172e2982904e50fe6c9dd11b3c0cea57ee4288256161d34fe038f"
    assert circuit(neurons=DENSE).digest == dense
    one = circuit().neurons
    different = [
        circuit(),
        circuit(neurons=DENSE),
        circuit(neurons=[*one[:2], dataclasses.replace(one[2], expert=1), *one[3:]]),
        circuit(intermediate_size=[24, 16, 17, 0]),
        circuit(experts={"count": [0, 4, 4, 5], "intermediate_size": 8}),
        circuit(experts={"count": [0, 4, 4, 4], "intermediate_size": [0, 8, 8, 9]}),
        circuit(architecture="X"),
    ]
    assert len({c.digest for c in different}) == len(different)
    assert circuit(model="m", notes=("n",)).digest == circuit().digest


def test_shared_means_no_expert() -> None:
    entries = [neuron(1, 7, 1.5, expert="shared"), neuron(1, 7, 1.0, expert=0)]
    made = Circuit.from_dict(document(neurons=entries))
    assert made.neurons == (Neuron(1, 7, 1.5), Neuron(1, 7, 1.0, 0))
    assert "expert" not in made.to_dict()["neurons"][0]


def test_workers_get_the_experts() -> None:
    packed = circuit().packed()
    assert [*array("i", packed.layers)] == [0, 1, 1, 1, 3]
    assert [*array("i", packed.values)] == [23, 7, 7, 2, 7]
    assert [*array("i", packed.experts)] == [-1, -1, 0, 3, 2]
    assert circuit(neurons=DENSE).packed().experts == b""


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"neurons": [neuron(), neuron(3)]}, "'neurons'[1]: 'expert' is missing"),
        ({"neurons": [neuron(3, expert="shared")]}, "'neurons'[0]: 'expert' is missing"),
        ({"neurons": [neuron(0, expert=0)]}, "layer 0 has no routed experts"),
        ({"neurons": [neuron(expert=4)]}, "'neurons'[0]: 'expert' must be an integer from 0 to 3"),
        ({"neurons": [neuron(expert=-1)]}, "'expert' must be"),
        ({"neurons": [neuron(expert=True)]}, "'expert' must be"),
        ({"neurons": [neuron(expert=None), neuron(expert="all")]}, "'neurons'[1]: 'expert'"),
        ({"neurons": [neuron(expert=1.0)]}, "'expert' must be"),
        ({"neurons": [neuron(index=8, expert=1)]}, "'neurons'[0]: 'index' must be an integer"),
        ({"neurons": [neuron(index=16)]}, "from 0 to 15"),
        ({"neurons": [neuron(0, 24)]}, "from 0 to 23"),
        ({"neurons": [neuron(expert=1), neuron(expert=1)]}, "layer 1, expert 1, index 0 twice"),
        ({"intermediate_size": [24, 16, 16]}, "'intermediate_size' must be"),
        ({"intermediate_size": [24, 16, 16, -1]}, "'intermediate_size' must be"),
        ({"intermediate_size": [24, 16, 16, 0.0]}, "'intermediate_size' must be"),
        ({"intermediate_size": [0, 0, 0, 0], "experts": None}, "'neurons'[0]"),
        ({"experts": 4}, "'experts' must be"),
        ({"experts": {"count": 4}}, "'experts' must be"),
        ({"experts": {"count": 4, "intermediate_size": 0}}, "'experts' must"),
        ({"experts": {"count": 4, "intermediate_size": [8]}}, "'experts.intermediate_size'"),
        ({"experts": {"count": "4", "intermediate_size": 8}}, "'experts.count'"),
        ({"experts": {"count": 10**400, "intermediate_size": 8}}, "'experts.count'"),
        ({"experts": {"count": 4, "intermediate_size": 8, "x": 1}}, "'experts' must be"),
        ({"version": 3}, "'version' must be 1 or 2"),
    ],
)
def test_bad_fields_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CircuitError) as refused:
        Circuit.from_dict(document(**changes))
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_model_must_fit() -> None:
    wider = dataclasses.replace(SHAPE, widths=(24, 16, 17, 0))
    more = dataclasses.replace(SHAPE, experts=(0, 4, 8, 4))
    for held, model, misfit in (
        (circuit(), SHAPE, ""),
        (circuit(), wider, "'intermediate_size' of layer 2 is 16 .* but 17"),
        (circuit(), more, "'experts.count' of layer 2 is 4 .* but 8"),
        (circuit(), SHAPE.dense(), "'experts.count' of layer 1 is 4 .* but 0"),
        # Neurons of dense and shared MLPs are the same whatever is routed beside them.
        (circuit(neurons=DENSE), more, ""),
        (circuit(neurons=DENSE), wider, "'intermediate_size' of layer 2"),
    ):
        names = {"model": "m", "architecture": "DeepseekV3ForCausalLM", **model.fields()}
        if not misfit:
            assert Circuit.from_dict(held.to_dict(), **names) == held
            held.check_model("m", "DeepseekV3ForCausalLM", model)
            continue
        with pytest.raises(CircuitError, match=misfit):
            Circuit.from_dict(held.to_dict(), **names)
        with pytest.raises(CircuitError, match="does not fit 'm'"):
            held.check_model("m", "DeepseekV3ForCausalLM", model)


def test_a_plain_file_may_name_experts() -> None:
    data = {"0": [23], "1": {"shared": [7], "0": [7], "3": [2]}, "3": {"2": [7]}}
    assert [n.place for n in Circuit.from_dict(data, **MODEL).neurons] == [
        n.place for n in circuit().neurons
    ]
    for bad, named in (
        ({"3": [7]}, "'expert' is missing"),
        ({"1": {"9": [0]}}, "'expert' must be"),
        ({"1": {"x": [0]}}, "numbers or 'shared'"),
        ({"1": {"0": 0}}, "a list of indices"),
        ({"0": {"0": [0]}}, "no routed experts"),
    ):
        with pytest.raises(CircuitError, match=named):
            Circuit.from_dict(bad, **MODEL)
    # The reference's keys name no expert.
    made = Circuit.from_dict({"neurons": {"1,-1,7": 1.0}}, **MODEL)
    assert made.neurons == (Neuron(1, 7, 1.0),)


def test_shared_neurons_and_comparisons_tell_experts_apart() -> None:
    other = circuit(neurons=(Neuron(1, 7, -1.0, 1), Neuron(1, 7, 5.0), Neuron(1, 2, 1.0, 3)))
    assert shared_neurons([circuit(), other]) == 2
    found = compare(circuit(), other)
    assert [a.place for a, _ in found.common] == [(1, -1, 7), (1, 3, 2)]
    assert found.by_layer[1] == (3, 3, 2)
    assert found.uniform.expected == pytest.approx(5 * 3 / SHAPE.size)
    assert found.within_layers.expected == pytest.approx(3 * 3 / SHAPE.layer_size(1))
    assert SHAPE.size == 24 + 2 * (16 + 32) + 32
    assert len(compare(circuit(), circuit(neurons=DENSE)).common) == 1
    with pytest.raises(CircuitError, match="cannot be compared"):
        compare(circuit(), circuit(experts={"count": [0, 4, 4, 5], "intermediate_size": 8}))


def test_summary_counts_experts() -> None:
    text = circuit().summary()
    assert "5 of 152" in text and "3 of them in 3 of 12 routed experts" in text
    assert "experts" not in circuit(neurons=DENSE).summary().replace("16*2 0", "")


@given(st.sampled_from([*document(), "experts"]), JSON_VALUES)
@settings(deadline=None)
def test_any_value_of_any_field_gives_a_circuit_or_a_circuit_error(name: str, value: Any) -> None:
    try:
        loaded = Circuit.from_dict(document(**{name: value}))
        assert Circuit.from_dict(json.loads(json.dumps(loaded.to_dict()))) == loaded
    except CircuitError as error:
        assert "\n" not in str(error)


PLACES = st.sampled_from(
    [
        (layer, expert, index)
        for layer in range(4)
        for expert in (None, *range(SHAPE.experts[layer]))
        for index in range(SHAPE.width(layer, expert))
    ]
)


@given(st.dictionaries(PLACES, st.floats(allow_nan=False, allow_infinity=False), min_size=1))
@settings(deadline=None)
def test_round_trip(entries: dict[tuple[int, int | None, int], float]) -> None:
    made = circuit(neurons=[Neuron(at, i, d, expert) for (at, expert, i), d in entries.items()])
    again = Circuit.from_dict(json.loads(json.dumps(made.to_dict())), **MODEL)
    assert again == made
    assert again.digest == made.digest


KEYS = st.sampled_from(["0", "1", "3", "4", "-1", "shared", "x"])
INDICES = st.lists(st.integers(-1, 24) | st.none(), max_size=3) | st.integers() | st.none()
LAYERS = st.dictionaries(KEYS, INDICES | st.dictionaries(KEYS, INDICES, max_size=3), max_size=3)


@given(JSON_VALUES | LAYERS)
@settings(deadline=None)
def test_any_plain_file_gives_a_circuit_or_a_circuit_error(data: Any) -> None:
    try:
        made = Circuit.from_dict(data, **MODEL)
        assert all(n.index < SHAPE.width(n.layer, n.expert) for n in made.neurons)
    except CircuitError as error:
        assert "\n" not in str(error)
