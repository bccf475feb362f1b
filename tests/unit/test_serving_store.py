# SPDX-License-Identifier: Apache-2.0
"""The registry directory: what was acknowledged survives, whatever happens to the writer."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cna_vllm.serving.config import CnaConfig, CnaConfigError
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.serving.front.admission import Admission
from cna_vllm.serving.front.guard import SteeringGuard
from cna_vllm.serving.front.registry import Registry, ServedModel
from cna_vllm.serving.front.store import RegistryStore, Stored, StoreError
from cna_vllm.serving.seams.http_app import _catch_up, _names
from cna_vllm.steering.circuit import Circuit, CircuitError, Neuron
from cna_vllm.steering.request import SteeringError
from cna_vllm.steering.shape import Shape

SERVED = ServedModel("m", "A", Shape.of(2, 64), 6)


def circuit(index: int) -> Circuit:
    return Circuit("m", "A", 2, 64, (Neuron(0, index, 0.5),))


def save(store: RegistryStore, circuits: dict[str, Circuit], **adapters: Adapter) -> None:
    for one in circuits.values():
        store.save_circuit(one)
    store.write({**{name: c.digest for name, c in circuits.items()}, **adapters})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = RegistryStore(tmp_path / "registry")
    assert store.read() == {} and store.stamp() == ()
    save(store, {"a": circuit(1), "b": circuit(2)}, off=Adapter.parse("a@0:all"))
    contents = RegistryStore(tmp_path / "registry").read()
    circuits = {"a": circuit(1).digest, "b": circuit(2).digest}
    assert contents == {**circuits, "off": Adapter.parse("a@0:all")}
    assert store.circuit(circuit(1).digest).neurons == circuit(1).neurons


def test_circuits_that_no_name_stands_for_are_removed(tmp_path: Path) -> None:
    store = RegistryStore(tmp_path)
    save(store, {"a": circuit(1)})
    save(store, {"a": circuit(2)})
    assert [p.stem for p in (tmp_path / "circuits").iterdir()] == [circuit(2).digest]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    store = RegistryStore(tmp_path)
    for left in (tmp_path / ".registry.json.x1", tmp_path / "circuits" / ".d.json.x2"):
        left.write_text("{")
    save(store, {"a": circuit(1)})
    names = sorted(p.name for p in tmp_path.rglob("*"))
    assert names == sorted(["circuits", "registry.json", f"{circuit(1).digest}.json"])


SERVER = """
import multiprocessing, sys, time
from cna_vllm.serving.front.store import RegistryStore

def front_end(told):
    RegistryStore(sys.argv[1]).claim()
    told.put(multiprocessing.current_process().pid)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    RegistryStore(sys.argv[1]).claim()
    told = context.Queue()
    for _ in range(2):
        context.Process(target=front_end, args=(told,)).start()
    print(told.get(timeout=60), told.get(timeout=60), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_one_server_at_a_time_until_all_its_processes_have_ended(
    tmp_path: Path, method: str
) -> None:
    """Whoever started them and however: API servers may outlive it."""
    script, folder = tmp_path / "server.py", tmp_path / "registry"
    script.write_text(SERVER)
    command = [sys.executable, str(script), str(folder), method]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        front_ends = [int(pid) for pid in server.stdout.readline().split()]
        assert len(front_ends) == 2, "a front end of the same server was refused"
        try:
            for pid in (server.pid, front_ends[0]):
                with pytest.raises(StoreError, match="another server uses it"):
                    RegistryStore(folder).claim()
                os.kill(pid, signal.SIGKILL)
            server.wait()
            with pytest.raises(StoreError, match="another server uses it"):
                RegistryStore(folder).claim()
        finally:
            server.kill()
            for pid in front_ends:
                os.kill(pid, signal.SIGKILL)
    for _ in range(1000):
        try:
            os.close(RegistryStore(folder).claim())
            return
        except StoreError:
            time.sleep(0.01)
    raise AssertionError("the claim outlived its processes")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "cna-registry", "version": 2}', "{" * 9999, '{"format": "x"}',
     '{"format": "cna-registry", "version": 1, "circuits": {"a": "../x"}, "adapters": {}}',
     '{"format": "cna-registry", "version": 1, "circuits": {}, "adapters": {"a": 1}}'],
)  # fmt: skip
def test_a_spoiled_manifest_is_told(tmp_path: Path, text: str) -> None:
    store = RegistryStore(tmp_path)
    (tmp_path / "registry.json").write_text(text)
    with pytest.raises(StoreError, match=r"registry\.json"):
        store.read()


def test_a_circuit_that_was_exchanged_is_told(tmp_path: Path) -> None:
    store = RegistryStore(tmp_path)
    save(store, {"a": circuit(1)})
    circuit(2).save(tmp_path / "circuits" / f"{circuit(1).digest}.json")
    with pytest.raises(StoreError, match="restore the file"):
        store.circuit(circuit(1).digest)


def registry(tmp_path: Path, **config: object) -> Registry:
    return Registry.from_config(
        CnaConfig(registry_dir=str(tmp_path), **config),  # type: ignore[arg-type]
        SERVED,
    )


def test_two_registries_see_each_others_changes(tmp_path: Path) -> None:
    first, second = registry(tmp_path), registry(tmp_path)
    save(first.store, {"a": circuit(1)}, off=Adapter.parse("a@0"))  # type: ignore[arg-type]
    assert second.digest("circuit", "a") == circuit(1).digest
    assert second.adapter("off") == Adapter.parse("a@0")
    save(first.store, {"a": circuit(2)})  # type: ignore[arg-type]
    assert second.digest("circuit", "a") == circuit(2).digest and second.adapter("off") is None


async def never(*_: Any) -> Any:
    raise AssertionError("the guard answered by itself")


def test_the_event_loop_reads_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process wrote is read in a thread, before the guard looks at a request."""
    here, there = registry(tmp_path), registry(tmp_path)
    readers: list[int] = []
    read = RegistryStore.read

    def noted(store: RegistryStore) -> Stored:
        readers.append(threading.get_ident())
        return read(store)

    monkeypatch.setattr(RegistryStore, "read", noted)
    app = SimpleNamespace(
        state=SimpleNamespace(
            openai_serving_models=SimpleNamespace(
                input_processor=SimpleNamespace(cna_admission=Admission(CnaConfig(), here))
            )
        )
    )
    seen: list[str] = []

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(here.names().entries)

    guard = SteeringGuard(vllm, names=_names, catch_up=_catch_up)
    save(there.store, {"a": circuit(1)})  # type: ignore[arg-type]
    readers.clear()
    scope = {"type": "http", "app": app, "method": "GET", "path": "/v1/models", "headers": []}
    asyncio.run(guard(scope, never, never))
    assert seen == ["a"]
    assert len(readers) == 1 and readers[0] != threading.get_ident()


def test_a_spoiled_registry_refuses_steering_and_names_no_path(tmp_path: Path) -> None:
    names = registry(tmp_path)
    (tmp_path / "registry.json").write_text("spoiled")
    with pytest.raises(SteeringError, match="ask its operator") as error:
        names.digest("circuit", "a")
    assert str(tmp_path) not in str(error.value)


def test_a_restart_with_configured_adapters_and_a_filled_registry(tmp_path: Path) -> None:
    """Adapters of the configuration use its circuits, whatever the registry directory holds."""
    circuit(1).save(tmp_path / "a.json")
    save(RegistryStore(tmp_path / "r"), {"b": circuit(2)}, more=Adapter.parse("a@2+b@0"))
    names = registry(
        tmp_path / "r",
        circuits={"a": str(tmp_path / "a.json")},
        adapters={"off": {"circuit": "a", "multiplier": 0}},
    )
    assert {n: c.digest for n, c in names.names().circuits.items()} == {
        "a": circuit(1).digest,
        "b": circuit(2).digest,
    }
    assert names.adapter("off") == Adapter.from_dict({"circuit": "a", "multiplier": 0})
    assert names.adapter("more") == Adapter.parse("a@2+b@0")
    assert set(names.stored()) == {"b", "more"}


def test_configured_names_are_pinned(tmp_path: Path) -> None:
    circuit(1).save(tmp_path / "a.json")
    save(RegistryStore(tmp_path / "r"), {"a": circuit(2)})
    with pytest.raises(StoreError, match="the configuration names too"):
        registry(tmp_path / "r", circuits={"a": str(tmp_path / "a.json")})


def test_a_circuit_of_another_model_in_the_registry_is_refused(tmp_path: Path) -> None:
    save(RegistryStore(tmp_path), {"a": Circuit("m", "A", 3, 64, (Neuron(0, 1, 0.5),))})
    with pytest.raises(CircuitError, match="3"):
        registry(tmp_path)


def test_names_are_shared_by_circuits_adapters_and_models(tmp_path: Path) -> None:
    names = registry(tmp_path)
    names.register("a", circuit(1))
    names.register("off", Adapter.parse("a@0"))
    for taken in (lambda: names.register("off", circuit(1)),
                  lambda: names.register("a", Adapter.parse("a@0"))):  # fmt: skip
        with pytest.raises(CnaConfigError, match="choose another"):
            taken()
    with pytest.raises(CnaConfigError, match="served model"):
        names.reserve(["off"])
    with pytest.raises(SteeringError, match="used by the adapter 'off'"):
        names.unregister("circuit", "a")
    names.unregister("adapter", "off")
    assert names.unregister("circuit", "a") == circuit(1)


WRITER = """
import sys
from cna_vllm.steering.circuit import Circuit, Neuron
from cna_vllm.serving.front.store import RegistryStore
from cna_vllm.steering.shape import Shape
store, step = RegistryStore(sys.argv[1]), int(sys.argv[2])
while True:
    step += 1
    one = Circuit("m", "A", 2, 4096, tuple(Neuron(0, step % 4000 + i, 0.5) for i in range(90)))
    with store.locked():
        store.save_circuit(one)
        store.write({f"step-{step}": one.digest})
    print(step, flush=True)
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """A writer is killed at random moments, 12 times: the registry is whole and not behind."""
    rng, step = random.Random(0), 0
    for _ in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(step)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        acknowledged = int(writer.stdout.readline())
        time.sleep(rng.random() * 0.1)
        writer.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
        writer.wait()
        contents = RegistryStore(tmp_path).read()
        ((name, digest),) = contents.items()
        step = int(name.removeprefix("step-"))
        assert step in (acknowledged, acknowledged + 1)
        assert RegistryStore(tmp_path).circuit(digest).digest == digest
    whole = {path.name for path in tmp_path.rglob("*.json")}
    assert all(json.loads((p).read_text()) for p in tmp_path.rglob("*.json")) and whole


def test_a_reader_between_two_writes_sees_one_of_them(tmp_path: Path) -> None:
    """It has read the first manifest; the file that this names is removed before it is opened."""
    names = registry(tmp_path)
    writer = RegistryStore(tmp_path)
    save(writer, {"a": circuit(1)})
    store = names.store
    assert store is not None
    read = store.read

    def overtaken() -> Stored:
        contents = read()
        store.read = read  # type: ignore[method-assign]
        save(writer, {"a": circuit(2)})
        return contents

    store.read = overtaken  # type: ignore[method-assign]
    assert names.digest("circuit", "a") == circuit(2).digest
