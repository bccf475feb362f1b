# SPDX-License-Identifier: Apache-2.0
"""The front end's names: which circuit, set of vectors or adapter a name stands for, now."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cna_vllm.serving.config import CnaConfig, CnaConfigError, check_name
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.serving.front.store import RegistryStore, Stored, StoreError
from cna_vllm.steering.circuit import Circuit
from cna_vllm.steering.content import show
from cna_vllm.steering.packed import KindName
from cna_vllm.steering.request import FIELD_CIRCUIT, FIELD_VECTOR, SteeringError
from cna_vllm.steering.shape import Shape
from cna_vllm.steering.vectors import VectorSet

logger = logging.getLogger("vllm.cna")  # vLLM's handlers and level are those of its name's parents

Content = Circuit | VectorSet
Entry = Content | Adapter
Kind = Literal["circuit", "vector", "adapter"]
_FIELDS: Mapping[Kind, str] = {
    "circuit": FIELD_CIRCUIT,
    "vector": FIELD_VECTOR,
    "adapter": "adapter",
}


def kind_of(entry: Entry) -> Kind:
    """What ``entry`` is."""
    if isinstance(entry, Adapter):
        return "adapter"
    return "circuit" if isinstance(entry, Circuit) else "vector"


@dataclass(frozen=True)
class ServedModel:
    """What circuits and vectors must fit."""

    model: str
    architecture: str
    shape: Shape
    hidden_size: int

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.shape.num_layers

    def check(self, content: Content) -> None:
        """Raises CircuitError or VectorError, naming both models, when ``content`` does not fit."""
        if isinstance(content, Circuit):
            content.check_model(self.model, self.architecture, self.shape)
        else:
            content.check_model(self.model, self.architecture, self.num_layers, self.hidden_size)

    def circuit(self, path: str | os.PathLike[str]) -> Circuit:
        """Reads a circuit file; layouts that name no model are read as this model's."""
        return Circuit.load(path, **self.of_circuits())

    def of_circuits(self) -> dict[str, Any]:
        """What a circuit says of its model, as keyword arguments."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            **self.shape.fields(),
        }


@dataclass(frozen=True)
class Names:
    """One state of a registry; never changed, only replaced. One name stands for one thing."""

    entries: Mapping[str, Entry] = field(default_factory=dict)

    def of(self, kind: Kind) -> dict[str, Entry]:
        """Name -> entry, of one kind."""
        return {name: entry for name, entry in self.entries.items() if kind_of(entry) == kind}

    @property
    def circuits(self) -> dict[str, Circuit]:
        """Name -> circuit."""
        return {n: e for n, e in self.entries.items() if isinstance(e, Circuit)}

    @property
    def vectors(self) -> dict[str, VectorSet]:
        """Name -> set of vectors."""
        return {n: e for n, e in self.entries.items() if isinstance(e, VectorSet)}

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Name -> adapter."""
        return {n: e for n, e in self.entries.items() if isinstance(e, Adapter)}

    def contents(self) -> dict[str, Content]:
        """Content digest -> circuit or set of vectors, of all that have a name."""
        return {e.digest: e for e in self.entries.values() if not isinstance(e, Adapter)}

    def digests(self) -> dict[str, str]:
        """Content digest -> a name that stands for it."""
        return {e.digest: n for n, e in self.entries.items() if not isinstance(e, Adapter)}

    def kind(self, name: str) -> Kind | None:
        """What a name stands for; None for a free one."""
        entry = self.entries.get(name)
        return None if entry is None else kind_of(entry)

    def find(self, kind: Kind, name: str) -> Entry:
        """What a name stands for. Raises SteeringError that lists the known names."""
        entry = self.entries.get(name)
        if entry is None or kind_of(entry) != kind:
            known = ", ".join(sorted(self.of(kind))[:20]) or "none is loaded"
            problem = f"no {kind} is named {show(name)}; known {kind}s: {known}"
            raise SteeringError(_FIELDS[kind], problem)
        return entry


class Registry:
    """Name -> validated content or adapter of one front end. Safe to read from several threads.

    Circuits, vectors, adapters and the served model share one space of names. Names from the
    configuration are pinned: they can not be changed at run time. With a store, the names of other
    API server processes are seen as soon as they are written.
    """

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.store: RegistryStore | None = None
        self.pinned: frozenset[str] = frozenset()
        self._reserved: frozenset[str] = frozenset()
        self._names = Names()
        self._stamp: tuple[int, ...] = ()
        self._failure: Exception | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_config(cls, config: CnaConfig, served: ServedModel) -> Registry:
        """Loads everything configured, then what the registry directory holds.

        Raises CircuitError, VectorError, SteeringError, StoreError or CnaConfigError on the first
        that is missing, malformed, of another model, or under a name that is taken.
        """
        registry = cls(served)
        for name, path in config.circuits.items():
            registry.register(name, served.circuit(path))
        for name, path in config.vectors.items():
            registry.register(name, VectorSet.load(path))
        for name, adapter in config.adapters.items():
            registry.register(name, Adapter.from_dict(adapter))
        registry.pinned = frozenset([*config.circuits, *config.vectors, *config.adapters])
        if config.registry_dir is not None:
            # Not before: a look at the store keeps pinned names only.
            registry.store = RegistryStore(config.registry_dir)
            registry.store.claim()
            registry.refresh()
        return registry

    def reserve(self, names: Collection[str]) -> None:
        """Names that the server itself uses. Raises CnaConfigError if one is taken."""
        self._reserved = frozenset(names)
        current = self.names()
        for name in sorted(self._reserved):
            if (kind := current.kind(name)) is not None:
                raise CnaConfigError(
                    f"the name {name!r} is that of a served model, and of {a_kind(kind)} too; "
                    "give one of them another name"
                )

    def check_free(self, name: str, kind: Kind) -> None:
        """Raises CnaConfigError if ``name`` may not stand for a ``kind``; one that stands for
        another of that kind is free."""
        check_name(name)
        if name in self._reserved:
            raise CnaConfigError(f"the name {show(name)} is that of a served model; choose another")
        if (other := self._names.kind(name)) not in (None, kind):
            problem = f"the name {show(name)} is that of {a_kind(other)}; choose another"
            raise CnaConfigError(problem)

    def register(self, name: str, entry: Entry) -> None:
        """Lets ``name`` stand for ``entry`` from now on; workers must hold its content already.

        Raises SteeringError for an adapter with an unknown circuit.
        """
        self.check_free(name, kind_of(entry))
        if isinstance(entry, Adapter):
            for circuit in entry.circuits():
                self.digest("circuit", circuit)
        else:
            self.served.check(entry)
        with self._lock:
            self._names = Names({**self._names.entries, name: entry})

    def unregister(self, kind: Kind, name: str) -> Entry:
        """Forgets a name and returns what it stood for. Raises SteeringError for unknown names
        and for a circuit that an adapter uses."""
        with self._lock:
            entry = self._names.find(kind, name)
            adapters = self._names.adapters
            if users := sorted(n for n, a in adapters.items() if name in a.circuits()):
                problem = f"{show(name)} is used by the adapter {show(users[0])}; unload that first"
                raise SteeringError(_FIELDS[kind], problem)
            entries = self._names.entries
            self._names = Names({n: e for n, e in entries.items() if n != name})
        return entry

    def unnamed(self, entry: Entry) -> str | None:
        """The digest of content that no name stands for any more, so that workers need not keep
        it; None for what another name stands for, and for an adapter."""
        if isinstance(entry, Adapter) or entry.digest in self.names().digests():
            return None
        return entry.digest

    def names(self) -> Names:
        """The current state, changes by other processes included.

        Raises SteeringError when the registry directory was spoiled: what a name stands for is
        not known then, and the reason is the operator's, who finds it in the log.
        """
        if self.is_stale():
            self.catch_up()
        if self._failure is not None:
            raise SteeringError(
                FIELD_CIRCUIT, "the server's registry of circuits cannot be read; ask its operator"
            ) from self._failure
        return self._names

    async def current(self) -> None:
        """What a server calls before it looks at names, so that its event loop reads no file."""
        if self.is_stale():
            await asyncio.to_thread(self.catch_up)

    def catch_up(self) -> None:
        """``refresh``; a failure is logged, and told by ``names`` until the directory changes."""
        try:
            self.refresh()
        except (OSError, ValueError) as error:
            logger.error("the registry directory cannot be served: %s", error)

    def is_stale(self) -> bool:
        """Whether another process has changed the registry directory; one ``stat``."""
        return self.store is not None and self.store.stamp() != self._stamp

    def adapter(self, name: str | None) -> Adapter | None:
        """What an adapter's name stands for."""
        entry = None if name is None else self.names().entries.get(name)
        return entry if isinstance(entry, Adapter) else None

    def digest(self, kind: KindName, name: str) -> str:
        """Content digest of a name. Raises SteeringError that lists the known names."""
        content = self.names().find(kind, name)
        assert not isinstance(content, Adapter)
        return content.digest

    def refresh(self) -> None:
        """Takes over what the registry directory says. Raises StoreError, CircuitError or
        CnaConfigError, and keeps the old state, when that cannot be served."""
        if self.store is None:
            return
        with self._lock:
            while True:
                # The stamp first: what is written after it is seen by the next look.
                stamp = self.store.stamp()
                try:
                    self._names, self._failure = self._read(self.store), None
                except (OSError, ValueError) as error:
                    self._failure = error
                # A writer removes files only after the manifest that no longer names them.
                if self._failure is None or self.store.stamp() == stamp:
                    self._stamp = stamp
                    break
        if self._failure is not None:
            raise self._failure

    def _read(self, store: RegistryStore) -> Names:
        known, stored = self._names.contents(), store.read()
        entries = {
            name: entry
            for name, entry in self._names.entries.items()
            if name in self.pinned or isinstance(entry, VectorSet)
        }
        for name, one in stored.items():
            if name in self.pinned:
                raise StoreError(
                    f"the registry directory holds {show(name)}, which the configuration names "
                    "too; remove one of them"
                )
            if isinstance(one, Adapter):
                entries[name] = one
            else:
                content = known.get(one) or store.circuit(one)
                self.served.check(content)
                entries[name] = content
        return Names(entries)

    def stored(self) -> Stored:
        """What belongs into the registry directory: circuits and adapters that are not pinned."""
        return {
            name: entry if isinstance(entry, Adapter) else entry.digest
            for name, entry in self._names.entries.items()
            if name not in self.pinned and not isinstance(entry, VectorSet)
        }


def a_kind(kind: str | None) -> str:
    """A kind with its article."""
    return "an adapter" if kind == "adapter" else f"a {kind}"
