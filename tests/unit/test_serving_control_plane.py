# SPDX-License-Identifier: Apache-2.0
"""Control actions of one API server: what fails leaves every name, row and file as it was."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cna_vllm.serving.config import CircuitTableError, CnaConfig, CnaConfigError
from cna_vllm.serving.front.admission import Admission
from cna_vllm.serving.front.registry import Registry, ServedModel
from cna_vllm.serving.front.store import RegistryStore, Stored
from cna_vllm.serving.http.control_plane import ControlError, ControlPlane
from cna_vllm.serving.worker.table import CircuitTable
from cna_vllm.steering.circuit import Circuit, Neuron
from cna_vllm.steering.packed import Packed
from cna_vllm.steering.shape import Shape
from cna_vllm.steering.vectors import VectorSet

LAYERS, WIDTH = 2, 64


def circuit(index: int) -> Circuit:
    return Circuit("m", "A", LAYERS, WIDTH, (Neuron(0, index, 0.5),))


class Engines:
    """Real resident tables, one per data-parallel engine, behind the one call that the control
    plane makes."""

    def __init__(self, rows: Sequence[int] = (4,)) -> None:
        """rows: of each engine's table."""
        self.tables = [
            CircuitTable(range(LAYERS), 0, WIDTH, most, torch.device("cpu")) for most in rows
        ]
        self.errored = self.dying = False
        self.failing: set[int] = set()
        self.input_processor = SimpleNamespace()
        self.engine_core = self  # vLLM's client has one, which knows all engines

    @property
    def table(self) -> CircuitTable:
        (table,) = self.tables
        return table

    async def call_utility_all_async(self, utility: str, method: str, *call: Any) -> list[Any]:
        assert utility == "collective_rpc" and call[0] is None and call[2] is None
        if self.errored:
            raise RuntimeError("EngineCore encountered an issue")
        if self.dying:
            self.errored = True
            await asyncio.Event().wait()  # vLLM never answers a call that its engine died on
        answers = [self.answer(rank, method, *call[1]) for rank in range(len(self.tables))]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def answer(self, rank: int, method: str, *args: Any) -> Any:
        table = self.tables[rank]
        match method:
            case "cna_load":
                if rank in self.failing:
                    return RuntimeError("a worker ran out of memory")
                refused = None
                try:
                    table.load(Packed(*args))
                except CircuitTableError as error:
                    refused = str(error)
                return [{"resident": table.resident(), "refused": refused}]
            case "cna_unload":
                return [table.unload(args[0])]
            case "cna_status" | "cna_counters" if not self.failing:
                return [{"circuits": table.loaded(), "vectors": (), "table_bytes": table.nbytes}]
        return AssertionError(method)


class Plane(ControlPlane):
    def __init__(self, folder: Path, rows: Sequence[int] = (4,)) -> None:
        self.workers = Engines(rows)
        (folder / "circuits").mkdir()
        for index in range(3):
            circuit(index).save(folder / "circuits" / f"{index}.json")
        config = CnaConfig(
            circuit_dir=str(folder / "circuits"), registry_dir=str(folder / "r"), max_vectors=1
        )
        registry = Registry.from_config(config, ServedModel("m", "A", Shape.of(LAYERS, WIDTH), 6))
        registry.register("caa", VectorSet("mlp", "m", "A", LAYERS, 6, {0: np.ones(6)}))
        registry.reserve(["base"])
        self.gate = Admission(config, registry)
        self.workers.input_processor = SimpleNamespace(cna_admission=self.gate)
        super().__init__(self.workers, lambda name: name == "lora", self.gate)


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return Plane(tmp_path)


def refused(action: Any) -> ControlError:
    with pytest.raises(ControlError) as error:
        asyncio.run(action)
    return error.value


@pytest.mark.parametrize("name", ["caa", "base", "lora", "off"])
def test_a_circuit_takes_no_name_of_another_kind(plane: Plane, name: str) -> None:
    asyncio.run(plane.load("circuit", "a", "0.json"))
    asyncio.run(plane.load("adapter", "off", {"circuit": "a", "multiplier": 0}))
    error = refused(plane.load("circuit", name, "1.json"))
    assert (error.field, error.status) == ("circuit_name", 400)
    assert f"the name {name!r} is that of" in str(error) or "is the name of a model" in str(error)
    assert set(plane.gate.registry.names().circuits) == {"a"}
    assert plane.workers.table.resident() == (circuit(0).digest,)


def test_without_a_circuit_folder_nothing_is_loaded(plane: Plane) -> None:
    plane.gate.config = replace(plane.gate.config, circuit_dir=None)
    error = refused(plane.load("circuit", "a", "0.json"))
    assert (error.field, error.status) == ("circuit_path", 403)
    assert plane.workers.table.resident() == ()


def test_a_registry_that_cannot_be_written_changes_nothing(
    plane: Plane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The reason and the folder are in the log only; the row is given back."""
    asyncio.run(plane.load("circuit", "a", "0.json"))

    def full(self: RegistryStore, contents: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "r" / "registry.json"))

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with monkeypatch.context() as patch:
        patch.setattr(RegistryStore, "write", full)
        for action in (
            plane.load("circuit", "b", "1.json"),
            plane.load("circuit", "a", "1.json", load_inplace=True),
            plane.load("adapter", "off", {"circuit": "a", "multiplier": 0}),
            plane.unload("circuit", "a"),
        ):
            error = refused(action)
            assert (error.field, error.status) == ("cna", 503)
            assert "ask its operator" in str(error) and str(tmp_path) not in str(error)
            assert plane.gate.registry.names().circuits == {"a": circuit(0)}
            assert not plane.gate.registry.names().adapters
            assert plane.workers.table.loaded() == (circuit(0).digest,)
    assert "No space left on device" in caplog.text
    asyncio.run(plane.load("circuit", "a", "1.json", load_inplace=True))
    assert plane.workers.table.loaded() == (circuit(1).digest,)


@pytest.mark.parametrize("during", [False, True])
def test_a_dead_engine_is_told_and_names_stay(plane: Plane, during: bool) -> None:
    asyncio.run(plane.load("circuit", "a", "0.json"))
    plane.workers.errored, plane.workers.dying = not during, during
    error = refused(plane.load("circuit", "b", "1.json"))
    assert (error.field, error.status) == ("cna", 503) and "engine has died" in str(error)
    assert plane.gate.registry.names().circuits == {"a": circuit(0)}


def test_a_failure_of_a_living_engine_is_not_hidden(plane: Plane) -> None:
    plane.workers.failing.add(0)
    with pytest.raises(AssertionError, match="cna_counters"):
        asyncio.run(plane.counters())


def loaded(plane: Plane) -> list[tuple[str, ...]]:
    """What requests may use, by engine."""
    return [table.loaded() for table in plane.workers.tables]


@pytest.mark.parametrize("rows", [(4, 1), (1, 4)], ids=["second", "first"])
def test_a_load_that_one_engine_refuses_is_undone_on_the_others(
    tmp_path: Path, rows: tuple[int, int]
) -> None:
    plane = Plane(tmp_path, rows)
    asyncio.run(plane.load("circuit", "a", "0.json"))
    for action in (
        plane.load("circuit", "b", "1.json"),
        plane.load("circuit", "a", "1.json", load_inplace=True),
    ):
        error = refused(action)
        assert (error.field, error.status) == ("cna_circuit", 409)
        assert "all 1 circuit rows are in use" in str(error)
        assert plane.gate.registry.names().circuits == {"a": circuit(0)}
        assert loaded(plane) == [(circuit(0).digest,)] * 2
    asyncio.run(plane.load("circuit", "c", "0.json"))  # the same content needs no row
    error = refused(plane.load("circuit", "c", "1.json", load_inplace=True))
    assert error.status == 409 and loaded(plane) == [(circuit(0).digest,)] * 2
    for name in ("a", "c"):
        asyncio.run(plane.unload("circuit", name))
    asyncio.run(plane.load("circuit", "b", "1.json"))
    assert loaded(plane) == [(circuit(1).digest,)] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_load_that_one_engine_fails_is_undone_on_the_others(tmp_path: Path, rank: int) -> None:
    plane = Plane(tmp_path, (4, 4))
    asyncio.run(plane.load("circuit", "a", "0.json"))
    plane.workers.failing.add(rank)
    error = refused(plane.load("circuit", "b", "1.json"))
    assert (error.field, error.status) == ("cna", 503)
    assert "memory" not in str(error), "the reason is in the log"
    assert plane.gate.registry.names().circuits == {"a": circuit(0)}
    assert loaded(plane) == [(circuit(0).digest,)] * 2


def test_every_engine_gets_what_the_registry_names(tmp_path: Path) -> None:
    """At the start engines hold nothing, or what another server's front end gave them."""
    plane = Plane(tmp_path, (4, 4))
    plane.gate.registry.unregister("vector", "caa")
    asyncio.run(plane.load("circuit", "a", "0.json"))
    plane.workers.tables[0].unload(circuit(0).digest)
    asyncio.run(plane.reconcile())
    assert loaded(plane) == [(circuit(0).digest,)] * 2


def test_an_engine_that_cannot_hold_what_is_named_stops_the_start(tmp_path: Path) -> None:
    plane = Plane(tmp_path, (2, 1))
    plane.gate.registry.unregister("vector", "caa")
    for name in "ab":
        plane.gate.registry.register(name, circuit(ord(name) - ord("a")))
    with pytest.raises(CnaConfigError, match="cannot hold what is configured: all 1 circuit rows"):
        asyncio.run(plane.reconcile())


def test_two_api_servers_that_read_different_files_do_not_both_start(tmp_path: Path) -> None:
    """A file that is replaced while they start: one name would stand for two contents."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one, two = Plane(tmp_path / "one"), Plane(tmp_path / "two")
    two.workers.tables = one.workers.tables
    for index, plane in enumerate((one, two)):
        plane.gate.registry.unregister("vector", "caa")
        plane.gate.registry.register("a", circuit(index))
    asyncio.run(one.reconcile())
    with pytest.raises(CnaConfigError, match="different content under the same names"):
        asyncio.run(two.reconcile())


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_changes_read_the_registry_in_threads(
    plane: Plane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another server wrote before, what this one writes, and what it goes back to."""
    readers: list[int] = []
    read = RegistryStore.read

    def noted(store: RegistryStore) -> Stored:
        readers.append(threading.get_ident())
        return read(store)

    monkeypatch.setattr(RegistryStore, "read", noted)
    other = RegistryStore(tmp_path / "r")
    other.save_circuit(circuit(2))
    other.write({"theirs": circuit(2).digest})
    asyncio.run(plane.load("circuit", "mine", "0.json"))
    asyncio.run(plane.load("adapter", "off", {"circuit": "theirs", "multiplier": 0}))
    assert {*plane.entries("circuit")} == {"mine", "theirs"}
    asyncio.run(plane.unload("adapter", "off"))
    monkeypatch.setattr(RegistryStore, "write", full)
    assert refused(plane.load("circuit", "lost", "1.json")).status == 503
    assert {*plane.entries("circuit")} == {"mine", "theirs"}
    assert readers and threading.get_ident() not in readers
