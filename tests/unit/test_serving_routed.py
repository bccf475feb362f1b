# SPDX-License-Identifier: Apache-2.0
"""Circuits of routed experts in a front end: which files are taken, stored and pushed as they are,
and which are refused by their field."""

from __future__ import annotations

import asyncio
import json
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cna_vllm.serving.config import CnaConfig
from cna_vllm.serving.front.registry import Registry, ServedModel
from cna_vllm.serving.front.store import RegistryStore
from cna_vllm.serving.http.control_plane import ControlError
from cna_vllm.serving.http.routes import inspect
from cna_vllm.serving.worker.experts import ExpertTable, RoutedExperts
from cna_vllm.serving.worker.table import CircuitTable
from cna_vllm.steering.circuit import Circuit, CircuitError, Neuron
from cna_vllm.steering.shape import Shape
from tests.unit.test_serving_control_plane import Plane

# A dense layer, and one of a shared and three routed experts.
SHAPE = Shape((8, 4), (0, 3), (0, 6))
SERVED = ServedModel("m", "A", SHAPE, 6)
CIRCUIT = Circuit(
    "m", "A", **SHAPE.fields(), neurons=(Neuron(0, 7), Neuron(1, 3), Neuron(1, 5, 0.5, 2))
)


def table(experts: bool = True) -> CircuitTable:
    nothing: Any = None
    found = RoutedExperts(1, "l1", "T", 3, range(3), 2, 6, 6, 0, 6, nothing, nothing)
    cpu = torch.device("cpu")
    held = ExpertTable([found], 4, 8, cpu) if experts else None
    return CircuitTable((0, 1), 0, (8, 4), 4, cpu, held)


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    """A control plane of that model."""
    plane = Plane(tmp_path)
    plane.gate.registry.served = SERVED
    plane.workers.tables = [table()]
    CIRCUIT.save(tmp_path / "circuits" / "routed.json")
    return plane


def test_a_file_is_loaded_pushed_and_stored_as_it_is(plane: Plane, tmp_path: Path) -> None:
    asyncio.run(plane.load("circuit", "a", "routed.json"))
    assert plane.gate.registry.digest("circuit", "a") == CIRCUIT.digest
    assert plane.workers.table.resident() == (CIRCUIT.digest,)
    stored = RegistryStore(tmp_path / "r").circuit(CIRCUIT.digest)
    assert stored == CIRCUIT and stored.experts == {"count": [0, 3], "intermediate_size": 6}
    # Another API server, or this one after a restart.
    config = CnaConfig(registry_dir=str(tmp_path / "r"))
    again = Registry.from_config(config, SERVED).names().circuits["a"]
    assert again == CIRCUIT
    assert [*array("i", again.packed().experts)] == [-1, -1, 2]
    shown = json.loads(json.dumps(inspect(CIRCUIT)))
    assert shown["intermediate_size"] == [8, 4] and shown["experts"]["count"] == [0, 3]
    assert shown["neurons_by_layer"] == {"0": 1, "1": 2}
    assert {"layer": 1, "expert": 2, "index": 5, "delta": 0.5} in shown["strongest"]


def test_a_plain_file_names_experts(plane: Plane, tmp_path: Path) -> None:
    (tmp_path / "circuits" / "p.json").write_text('{"0": [7], "1": {"shared": [3], "2": [5]}}')
    asyncio.run(plane.load("circuit", "a", "p.json"))
    places = [neuron.place for neuron in plane.gate.registry.names().circuits["a"].neurons]
    assert places == [neuron.place for neuron in CIRCUIT.neurons]


BAD: list[tuple[Any, str]] = [
    ({"1": {"3": [0]}}, r"'neurons'\[0\]: 'expert' must be an integer from 0 to 2"),
    ({"1": {"2": [6]}}, r"'neurons'\[0\]: 'index' must be an integer from 0 to 5"),
    ({"1": [4]}, r"'neurons'\[0\]: 'index' must be an integer from 0 to 3"),
    ({"0": {"0": [0]}}, r"'neurons'\[0\]: 'expert' is 0, but layer 0 has no routed experts"),
    (
        replace(CIRCUIT, experts={"count": [0, 4], "intermediate_size": 6}).to_dict(),
        "'experts.count' of layer 1 is 4 .* but 3",
    ),
    (
        replace(CIRCUIT, intermediate_size=[8, 5]).to_dict(),
        "'intermediate_size' of layer 1 is 5 .* but 4",
    ),
    (
        Circuit("m", "A", 2, 8, (Neuron(0, 7),)).to_dict(),
        "'intermediate_size' of layer 1 is 8 .* but 4",
    ),
]


@pytest.mark.parametrize(("data", "says"), BAD)
def test_what_does_not_exist_is_refused_by_its_field(
    plane: Plane, tmp_path: Path, data: Any, says: str
) -> None:
    path = tmp_path / "circuits" / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ControlError, match=says) as refused:
        asyncio.run(plane.load("circuit", "a", "bad.json"))
    assert (refused.value.field, refused.value.status) == ("circuit_path", 400)
    with pytest.raises(CircuitError, match=says):
        Registry.from_config(CnaConfig(circuits={"a": str(path)}), SERVED)
    assert plane.workers.table.resident() == () and not plane.gate.registry.names().circuits


def test_engines_that_leave_experts_alone_refuse_them(plane: Plane) -> None:
    plane.workers.tables = [table(), table(experts=False)]
    with pytest.raises(ControlError, match=r"cna\.max_expert_neurons is 0") as refused:
        asyncio.run(plane.load("circuit", "a", "routed.json"))
    assert (refused.value.field, refused.value.status) == ("cna_circuit", 409)
    assert [one.loaded() for one in plane.workers.tables] == [(), ()]


def test_circuits_without_experts_fit_whatever_is_routed_beside_them() -> None:
    dense = replace(CIRCUIT, neurons=CIRCUIT.neurons[:2])
    SERVED.check(dense)
    replace(SERVED, shape=SHAPE.dense()).check(dense)
    with pytest.raises(
        CircuitError, match=r"1 x 8, 1 x 4, 1 layer with 3 experts of 6.*does not fit"
    ):
        replace(SERVED, shape=SHAPE.dense()).check(CIRCUIT)
