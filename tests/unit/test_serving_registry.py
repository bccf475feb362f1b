# SPDX-License-Identifier: Apache-2.0
"""Names: read from files of every layout, fitted to the served model, replaced and forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cna_vllm.serving.config import CnaConfig, CnaConfigError
from cna_vllm.serving.front.registry import Registry, ServedModel
from cna_vllm.steering.circuit import Circuit, CircuitError, Neuron
from cna_vllm.steering.request import SteeringError
from cna_vllm.steering.shape import Shape

SERVED = ServedModel("served/model", "LlamaForCausalLM", Shape.of(4, 16), 6)
NEURONS = (Neuron(0, 3, 0.5), Neuron(2, 15, -1.25))


def make_circuit(**changed: Any) -> Circuit:
    values: dict[str, Any] = {
        "model": "served/model",
        "architecture": "LlamaForCausalLM",
        "num_layers": 4,
        "intermediate_size": 16,
        "neurons": NEURONS,
    }
    return Circuit(**{**values, **changed})


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), "utf-8")
    return path


def load_all(**paths: Path) -> Registry:
    return Registry.from_config(CnaConfig(circuits={n: str(p) for n, p in paths.items()}), SERVED)


def test_the_three_layouts(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    make_circuit().save(own)
    reference = write(tmp_path / "ref.json", {"neurons": {"0,-1,3": 0.5, "2,-1,15": -1.25}})
    plain = write(tmp_path / "plain.json", {"0": [3], "2": [15]})
    circuits = load_all(own=own, reference=reference, plain=plain).names().circuits
    assert set(circuits) == {"own", "reference", "plain"}
    assert circuits["own"].digest == circuits["reference"].digest == make_circuit().digest
    for circuit in circuits.values():
        assert circuit.by_layer() == {0: (3,), 2: (15,)}
        assert (circuit.model, circuit.architecture) == ("served/model", "LlamaForCausalLM")
        assert (circuit.num_layers, circuit.intermediate_size) == (4, 16)
    assert {n.delta for n in circuits["plain"].neurons} == {0.0}
    assert "no activation differences" in circuits["plain"].notes[0]


def test_other_positions_of_the_reference_layout_are_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "ref.json", {"neurons": {"0,7,3": 0.5}})
    circuit = load_all(a=path).names().circuits["a"]
    assert circuit.by_layer() == {0: (3,)}
    assert any("ignored" in note and "7" in note for note in circuit.notes)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"neurons": {"4,-1,0": 0.5}}, "'layer'.*0 to 3"),
        ({"neurons": {"0,-1,16": 0.5}}, "'index'.*0 to 15"),
        ({"neurons": {"0,3": 0.5}}, "layer,position,index"),
        ({"neurons": {"0,-1,3": "x"}}, "delta"),
        ({"neurons": {}}, "empty"),
        ({"0": [16]}, "'index'"),
        ({"4": [0]}, "'layer'"),
        ({"0": [3, 3]}, "twice"),
        ({"0": 3}, "list of indices"),
        ({}, "not a circuit"),
        ([], "JSON object"),
        (make_circuit(architecture="Qwen2ForCausalLM").to_dict(), "Qwen2ForCausalLM"),
        (make_circuit(num_layers=5).to_dict(), "num_layers.*5.*4"),
        (make_circuit(intermediate_size=17).to_dict(), "intermediate_size.*17.*16"),
        ({**make_circuit().to_dict(), "digest": "0" * 64}, "edited or damaged"),
    ],
)
def test_files_that_do_not_fit_stop_the_start(tmp_path: Path, data: Any, says: str) -> None:
    path = write(tmp_path / "bad.json", data)
    with pytest.raises(CircuitError, match=says) as refused:
        load_all(bad=path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_missing_and_malformed_files_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match=r"gone\.json: cannot be read"):
        load_all(a=tmp_path / "gone.json")
    (tmp_path / "half.json").write_text('{"neurons": {', "utf-8")
    with pytest.raises(CircuitError, match=r"half\.json: is not JSON"):
        load_all(a=tmp_path / "half.json")


def test_another_id_of_the_same_model_is_the_same_model(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    make_circuit(model="a/copy").save(path)
    assert load_all(a=path).names().circuits["a"].digest == make_circuit().digest


def test_digests_are_computed_and_not_read(tmp_path: Path) -> None:
    """Two files of one claim cannot become one cache key."""
    other = make_circuit(neurons=(Neuron(0, 4, 0.5),))
    data = other.to_dict()
    del data["digest"]
    registry = load_all(a=write(tmp_path / "a.json", data))
    assert registry.digest("circuit", "a") == other.digest
    data["digest"] = make_circuit().digest
    with pytest.raises(CircuitError, match="edited or damaged"):
        load_all(a=write(tmp_path / "a.json", data))


@pytest.mark.parametrize(
    "changed",
    [{"architecture": "Qwen2ForCausalLM"}, {"num_layers": 5}, {"intermediate_size": 32}],
)
def test_a_circuit_of_another_model_gets_no_name(changed: dict[str, Any]) -> None:
    registry = Registry(SERVED)
    with pytest.raises(CircuitError, match=r"'other/model'.*does not fit 'served/model'"):
        registry.register("a", make_circuit(model="other/model", **changed))
    with pytest.raises(CircuitError):
        SERVED.check(make_circuit(**changed))
    assert registry.names().circuits == {}


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb", None, 3])
def test_bad_names(name: Any) -> None:
    registry = Registry(SERVED)
    with pytest.raises(CnaConfigError, match="circuit name"):
        registry.register(name, make_circuit())
    assert registry.names().circuits == {}


def test_register_replace_unregister() -> None:
    registry = Registry(SERVED)
    first, second = make_circuit(), make_circuit(neurons=(Neuron(1, 1, 1.0),))
    registry.register("a", first)
    snapshot = registry.names().circuits
    registry.register("a", second)
    registry.register("b", first)
    assert registry.digest("circuit", "a") == second.digest
    assert snapshot == {"a": first}, "a snapshot stays what it was"
    registry.names().circuits["c"] = first
    assert set(registry.names().circuits) == {"a", "b"}
    assert registry.unregister("circuit", "a") is second
    with pytest.raises(SteeringError, match=r"^cna_circuit: no circuit is named 'a'.*: b$"):
        registry.digest("circuit", "a")
    with pytest.raises(SteeringError, match=r"^cna_circuit: "):
        registry.unregister("circuit", "a")


def test_the_list_of_known_names_is_bounded() -> None:
    registry = Registry(SERVED)
    for i in range(500):
        registry.register(f"circuit-{i:03}", make_circuit())
    with pytest.raises(SteeringError) as refused:
        registry.digest("circuit", "x" * 100_000)
    assert "circuit-000" in str(refused.value)
    assert len(str(refused.value)) < 1000
