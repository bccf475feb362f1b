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
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from itertools import chain
from typing import Any, Literal

from cna_vllm.files import FileError, parse_json
from cna_vllm.serving.config import CnaConfigError
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.serving.front.admission import Admission
from cna_vllm.serving.front.beneath import PathError, read_beneath
from cna_vllm.serving.front.metrics import control_metrics
from cna_vllm.serving.front.registry import Entry
from cna_vllm.serving.front.store import StoreError
from cna_vllm.serving.seams.engines import call_every_engine, ready
from cna_vllm.steering.circuit import Circuit, CircuitError
from cna_vllm.steering.content import show
from cna_vllm.steering.request import FIELD_CIRCUIT, SteeringError

logger = logging.getLogger("vllm.cna")
LIFE_SECONDS = 1.0  # between looks at whether the engine is alive, while a call is under way
Kind = Literal["circuit", "adapter"]
"""What is loaded over HTTP."""


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

    engine_client: vLLM's, for calls of its engines. is_lora: whether a name is that of a LoRA
    adapter, now; those of the start, and of models, the registry knows.
    """

    def __init__(self, engine_client: Any, is_lora: Callable[[str], bool], gate: Admission) -> None:
        self._engine = engine_client
        self._is_lora = is_lora
        self._gate = gate
        self._registry = gate.registry
        self._turn = asyncio.Lock()

    async def load(
        self, kind: Kind, name: str, source: Any, *, load_inplace: bool = False
    ) -> Entry:
        """Makes ``name`` stand for a circuit or an adapter. source: the path of a file in the
        operator's folder, or what ``Adapter.from_dict`` reads."""
        field, started = f"{kind}_name", time.monotonic()
        async with self._change(f"load_{kind}", field, name):
            self._registry.check_free(name, kind)
            if self._is_lora(name):
                problem = f"{show(name)} is the name of a model or of a LoRA adapter"
                raise ControlError(field, problem)
            previous = self._registry.names().of(kind).get(name)
            if previous is not None and not load_inplace:
                problem = f"{show(name)} is loaded already; set load_inplace to replace it"
                raise ControlError(field, problem)
            entry: Entry
            if kind == "circuit":
                entry = await asyncio.to_thread(self._read, source)
                await self._make_resident(entry)
            else:
                entry = self._adapter(source)
            self._registry.register(name, entry)
            await self._persist(entry)
            if previous is not None:
                await self._retire(previous)
            for user, adapter in self._registry.names().adapters.items():
                if name in (user, *adapter.circuits()):
                    self._gate.warn_shared(user, adapter)
        if kind == "circuit":
            control_metrics().load_seconds.observe(time.monotonic() - started)
        return entry

    async def unload(self, kind: Kind, name: str) -> None:
        """Forgets a circuit or an adapter; running requests finish on it."""
        async with self._change(f"unload_{kind}", f"{kind}_name", name):
            self.entry(kind, name)
            entry = self._registry.unregister(kind, name)
            await self._persist()
            await self._retire(entry)

    async def reconcile(self) -> None:
        """Once per start, before anything is served: all engines hold what the registry names."""
        async with self._change("start"):
            reports = await ready(self._engine)
        control_metrics().table_bytes.set(reports[0][0]["table_bytes"])

    def entries(self, kind: Kind) -> Mapping[str, Entry]:
        """All of one kind, by name."""
        with _told("circuit_name"):
            return self._registry.names().of(kind)

    def entry(self, kind: Kind, name: str) -> Entry:
        """One of them. Raises ControlError for an unknown name."""
        if (entry := self.entries(kind).get(name)) is None:
            raise ControlError(f"{kind}_name", f"no {kind} is named {show(name)}", 404)
        return entry

    def is_pinned(self, name: str) -> bool:
        """Whether it was given at start, so that it cannot be changed."""
        return name in self._registry.pinned

    async def counters(self) -> list[dict[str, Any]]:
        """What each engine's core has counted, in rank order; it asks no worker."""
        return [report for (report,) in await self._rpc("cna_counters")]

    @asynccontextmanager
    async def _change(self, action: str, field: str = "", name: str = "") -> AsyncIterator[None]:
        """One change of one process at a time; what is refused leaves everything as it was.

        field: of the request, with the name that is changed.
        """
        subject = f"{field.removesuffix('_name')}={name!r}" if field else ""
        store = self._registry.store
        lock = nullcontext() if store is None else store.locked()
        outcome = "failed"
        try:
            async with self._turn:
                with _registry_io():
                    await asyncio.to_thread(lock.__enter__)
                try:
                    await self._registry.current()  # what others wrote before it was our turn
                    with _told(field):
                        self._registry.names()
                        if field and self.is_pinned(name):
                            problem = "was given when the server started and cannot be changed"
                            raise ControlError(field, f"{show(name)} {problem}")
                        yield
                finally:
                    await asyncio.to_thread(lock.__exit__, None, None, None)
            outcome = "done"
        except ControlError as error:
            outcome = "refused" if error.status < 500 else "failed"
            logger.warning(
                "cna action=%s %s outcome=%s reason=%r", action, subject, outcome, str(error)
            )
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
        except (PathError, FileError, CircuitError) as error:
            raise ControlError("circuit_path", str(error)) from error
        if len(circuit) > config.max_neurons:
            raise ControlError(
                "circuit_path",
                f"the circuit has {len(circuit)} neurons, over the server's limit of "
                f"{config.max_neurons}",
            )
        return circuit

    def _adapter(self, value: Mapping[str, Any]) -> Adapter:
        adapter = Adapter.from_dict(value)
        self._gate.admit(adapter.fields)
        if adapter.lora is not None and not self._is_lora(adapter.lora):
            raise ControlError("lora", f"no LoRA adapter is named {show(adapter.lora)}", 404)
        return adapter

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

    async def _persist(self, new: Entry | None = None) -> None:
        store = self._registry.store
        if store is None:
            return

        def write() -> None:
            if isinstance(new, Circuit):
                store.save_circuit(new)
            store.write(self._registry.stored())

        try:
            with _registry_io():
                await asyncio.to_thread(write)
            await self._registry.current()  # what was written is known here
        except ControlError:
            with _registry_io():  # back to what is on disk: it was not acknowledged
                await asyncio.to_thread(self._registry.refresh)
            if new is not None:
                await self._retire(new)
            raise

    async def _retire(self, entry: Entry) -> None:
        """Gives back the rows of content that no name stands for any more."""
        if (digest := self._registry.unnamed(entry)) is not None:
            await self._rpc("cna_unload", digest)

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


@contextmanager
def _told(field: str) -> Iterator[None]:
    """What is refused within is told: of ``field``, where it names no other."""
    try:
        yield
    except SteeringError as error:
        raise ControlError(error.field, error.problem) from error
    except CnaConfigError as error:
        if not field:
            raise
        raise ControlError(field, str(error)) from error
