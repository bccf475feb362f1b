# SPDX-License-Identifier: Apache-2.0
"""Loading and unloading while serving: one change at a time, on every engine and API server.

A change is made in this order, under the registry directory's lock: validate; make the content
resident on the workers of every engine, or on none; write the registry; answer. So whatever was
acknowledged is on disk, a name never stands for content that a worker lacks, and a crash in
between costs at most a row of the resident table until the next start.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from itertools import chain
from typing import Any, TypeVar

from cna_vllm.serving.config import CnaConfigError
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.serving.front.admission import Admission
from cna_vllm.serving.front.beneath import PathError, read_beneath
from cna_vllm.serving.front.metrics import control_metrics
from cna_vllm.serving.front.registry import Content, Names
from cna_vllm.serving.front.store import StoreError
from cna_vllm.serving.seams.engines import call_every_engine, ready
from cna_vllm.serving.seams.served_names import ServedNames
from cna_vllm.steering.circuit import Circuit, CircuitError, show
from cna_vllm.steering.circuit_file import parse_json
from cna_vllm.steering.request import FIELD_CIRCUIT, SteeringError

logger = logging.getLogger("vllm.cna")
LIFE_SECONDS = 1.0  # between looks at whether the engine is alive, while a call is under way
T = TypeVar("T")


class ControlError(Exception):
    """A change that was refused, or that the server cannot make; no name has changed.

    Attributes:
        field: the field of the request at fault; ``cna`` where it is not the request's fault.
        status: the HTTP status: a 4xx where the change was refused, 503 where it failed.
    """

    def __init__(self, field: str, problem: str, status: int = 400) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.status = status


class ControlPlane:
    """The circuits and adapters of one API server process.

    engine_client: vLLM's, for calls of its engines.
    """

    def __init__(self, engine_client: Any, names: ServedNames, gate: Admission) -> None:
        self._engine = engine_client
        self._others = names
        self._gate = gate
        self._registry = gate.registry
        self._turn = asyncio.Lock()

    async def load_circuit(self, name: str, path: str, *, load_inplace: bool = False) -> Circuit:
        """Makes ``name`` stand for the circuit file at ``path`` in the operator's folder."""
        started = time.monotonic()
        async with self._change("load_circuit", circuit=name):
            self._check_name(name, adapter=False)
            previous = self._registry.names().circuits.get(name)
            if previous is not None and not load_inplace:
                raise ControlError(
                    "circuit_name",
                    f"{show(name)} is loaded already; set load_inplace to replace it",
                )
            circuit = await asyncio.to_thread(self._read, path)
            await self._make_resident(circuit)
            self._registry.register(name, circuit)
            await self._persist(circuit)
            if previous is not None:
                await self._retire(previous)
            for user, adapter in self._registry.names().adapters.items():
                if name in adapter.circuits():
                    self._gate.warn_shared(user, adapter)
        control_metrics().load_seconds.observe(time.monotonic() - started)
        return circuit

    async def unload_circuit(self, name: str) -> None:
        """Forgets a circuit; running requests finish on it."""
        async with self._change("unload_circuit", circuit=name):
            self._check_pinned(name, "circuit_name")
            if name not in self._registry.names().circuits:
                raise ControlError("circuit_name", f"no circuit is named {show(name)}", 404)
            circuit = _told("circuit_name", lambda: self._registry.unregister("circuit", name))
            await self._persist()
            await self._retire(circuit)

    async def load_adapter(
        self, name: str, adapter: dict[str, Any], *, load_inplace: bool = False
    ) -> Adapter:
        """Makes ``name`` a model that is steered."""
        async with self._change("load_adapter", adapter=name):
            self._check_name(name, adapter=True)
            if self._registry.adapter(name) is not None and not load_inplace:
                raise ControlError(
                    "adapter_name",
                    f"{show(name)} is loaded already; set load_inplace to replace it",
                )
            loaded = _told("adapter_name", lambda: Adapter.from_dict(adapter))
            _told("adapter_name", lambda: self._gate.admit(loaded.fields))
            if loaded.lora is not None and not self._others.is_lora(loaded.lora):
                raise ControlError("lora", f"no LoRA adapter is named {show(loaded.lora)}", 404)
            self._registry.register_adapter(name, loaded)
            await self._persist()
            self._gate.warn_shared(name, loaded)
        return loaded

    async def unload_adapter(self, name: str) -> Adapter:
        """Forgets an adapter; running requests finish on it."""
        async with self._change("unload_adapter", adapter=name):
            self._check_pinned(name, "adapter_name")
            if self._registry.adapter(name) is None:
                raise ControlError("adapter_name", f"no adapter is named {show(name)}", 404)
            adapter = _told("adapter_name", lambda: self._registry.unregister_adapter(name))
            await self._persist()
        return adapter

    async def reconcile(self) -> None:
        """Once per start, before anything is served: all engines hold what the registry names."""
        async with self._change("start"):
            await ready(self._engine)
            reports = await self._rpc("cna_status")
        control_metrics().table_bytes.set(reports[0][0]["table_bytes"])

    async def names(self) -> tuple[Names, frozenset[str]]:
        """All names now, and which of them are pinned."""
        return _told("circuit_name", self._registry.names), self._registry.pinned

    async def circuit(self, name: str) -> tuple[str, Circuit, bool]:
        """One circuit by name, and whether it is pinned."""
        circuit = (await self.names())[0].circuits.get(name)
        if circuit is None:
            raise ControlError("circuit_name", f"no circuit is named {show(name)}", 404)
        return name, circuit, name in self._registry.pinned

    async def counters(self) -> list[dict[str, Any]]:
        """What each engine's core has counted, in rank order; it asks no worker."""
        return [report for (report,) in await self._rpc("cna_counters")]

    @asynccontextmanager
    async def _change(self, action: str, **names: str) -> AsyncIterator[None]:
        """One change of one process at a time; what is refused leaves everything as it was."""
        subject = " ".join(f"{key}={value!r}" for key, value in names.items())
        store = self._registry.store
        lock = nullcontext() if store is None else store.locked()
        outcome = "failed"
        try:
            async with self._turn:
                with _registry_io():
                    await asyncio.to_thread(lock.__enter__)
                try:
                    self._registry.names()  # what others wrote before it was our turn
                    yield
                finally:
                    await asyncio.to_thread(lock.__exit__, None, None, None)
            outcome = "done"
        except (ControlError, SteeringError) as error:
            if getattr(error, "status", 400) < 500:
                outcome = "refused"
            logger.warning(
                "cna action=%s %s outcome=%s reason=%r", action, subject, outcome, str(error)
            )
            if isinstance(error, SteeringError):
                raise ControlError(error.field, error.problem) from error
            raise
        finally:
            control_metrics().actions.labels(action=action, outcome=outcome).inc()
        logger.info("cna action=%s %s outcome=done", action, subject)

    def _read(self, path: str) -> Circuit:
        config, served = self._gate.config, self._registry.served
        if config.circuit_dir is None:
            raise ControlError(
                "circuit_path", "this server loads no circuits; its operator sets circuit_dir", 403
            )
        try:
            raw = read_beneath(config.circuit_dir, path, config.max_file_bytes)
            circuit = Circuit.from_dict(parse_json(raw), **served.of_circuits())
            served.check(circuit)
        except (PathError, CircuitError) as error:
            raise ControlError("circuit_path", str(error)) from error
        if len(circuit) > config.max_neurons:
            raise ControlError(
                "circuit_path",
                f"the circuit has {len(circuit)} neurons, over the server's limit of "
                f"{config.max_neurons}",
            )
        return circuit

    def _check_name(self, name: str, *, adapter: bool) -> None:
        field = "adapter_name" if adapter else "circuit_name"
        self._check_pinned(name, field)
        _told(field, lambda: self._registry.check_free(name, "adapter" if adapter else "circuit"))
        if self._others.is_base(name) or self._others.is_lora(name):
            raise ControlError(field, f"{show(name)} is the name of a model or of a LoRA adapter")

    def _check_pinned(self, name: str, field: str) -> None:
        if name in self._registry.pinned:
            raise ControlError(
                field, f"{show(name)} was given when the server started and cannot be changed"
            )

    async def _make_resident(self, circuit: Circuit) -> None:
        """On all engines or on none: those that took what another did not, give it back."""
        try:
            content = await asyncio.to_thread(circuit.packed)
            for report in chain(*await self._rpc("cna_load", *content)):
                if report["refused"]:
                    raise ControlError(FIELD_CIRCUIT, report["refused"], 409)
        except Exception as error:
            if not self._engine.errored:
                await self._retire(circuit)
            if isinstance(error, ControlError):
                raise
            logger.exception("cna: an engine failed to load circuit %s", circuit.digest[:12])
            raise ControlError(
                "cna", "an engine failed to load the circuit; the reason is in its log", 503
            ) from error

    async def _persist(self, circuit: Circuit | None = None) -> None:
        store = self._registry.store
        if store is None:
            return

        def write() -> None:
            if circuit is not None:
                store.save_circuit(circuit)
            store.write(self._registry.stored())

        try:
            with _registry_io():
                await asyncio.to_thread(write)
        except ControlError:
            with _registry_io():
                self._registry.refresh()  # back to what is on disk: it was not acknowledged
            if circuit is not None:
                await self._retire(circuit)
            raise

    async def _retire(self, content: Content) -> None:
        if content.digest not in self._registry.names().digests():
            await self._rpc("cna_unload", content.digest)

    async def _rpc(self, method: str, *args: Any) -> list[list[Any]]:
        """One call of all workers of all engines, and their answers by engine. A call that an
        engine died on is never answered: left alone, it would keep its client waiting, and the
        server from ending."""
        call = asyncio.ensure_future(call_every_engine(self._engine, method, args))
        try:
            while not call.done() and not self._engine.errored:
                await asyncio.wait({call}, timeout=LIFE_SECONDS)
            if call.done() and (call.exception() is None or not self._engine.errored):
                return call.result()
        finally:
            call.cancel()
        raise ControlError(
            "cna", "the engine has died and the server is ending; start it again", 503
        )


@contextmanager
def _registry_io() -> Iterator[None]:
    """What the registry directory does not allow is the operator's to mend and to read of, in the
    log: clients learn no paths."""
    try:
        yield
    except (OSError, StoreError) as error:
        logger.error("cna: the registry directory cannot be used: %s", error)
        raise ControlError(
            "cna", "the server's registry cannot be read or written; ask its operator", 503
        ) from error


def _told(field: str, act: Callable[[], T]) -> T:
    """``act()``, with what it refuses told of ``field``."""
    try:
        return act()
    except SteeringError as error:
        raise ControlError(error.field, error.problem) from error
    except CnaConfigError as error:
        raise ControlError(field, str(error)) from error
