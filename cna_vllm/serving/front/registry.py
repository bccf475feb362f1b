# SPDX-License-Identifier: Apache-2.0
"""The front end's names: which circuit, set of vectors or adapter a name stands for, now."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from cna_vllm.serving.config import CnaConfig, CnaConfigError, check_name
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.serving.front.store import Contents, RegistryStore, StoreError
from cna_vllm.steering.circuit import Circuit, show
from cna_vllm.steering.packed import KindName
from cna_vllm.steering.request import FIELD_CIRCUIT, FIELD_VECTOR, SteeringError
from cna_vllm.steering.vectors import VectorSet

logger = logging.getLogger("vllm.cna")  # vLLM's handlers and level are those of its name's parents

Content = Circuit | VectorSet
T = TypeVar("T")
_FIELDS: Mapping[KindName, str] = {"circuit": FIELD_CIRCUIT, "vector": FIELD_VECTOR}


def kind_of(content: Content) -> KindName:
    """What ``content`` is."""
    return "circuit" if isinstance(content, Circuit) else "vector"


@dataclass(frozen=True)
class ServedModel:
    """What circuits and vectors must fit."""

    model: str
    architecture: str
    num_layers: int
    intermediate_size: int
    hidden_size: int

    def check(self, content: Content) -> None:
        """Raises CircuitError or VectorError, naming both models, when ``content`` does not fit."""
        width = self.intermediate_size if isinstance(content, Circuit) else self.hidden_size
        content.check_model(self.model, self.architecture, self.num_layers, width)

    def circuit(self, path: str | os.PathLike[str]) -> Circuit:
        """Reads a circuit file; layouts that name no model are read as this model's."""
        return Circuit.load(path, **self.of_circuits())

    def of_circuits(self) -> dict[str, Any]:
        """What a circuit says of its model, as keyword arguments."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "num_layers": self.num_layers,
            "intermediate_size": self.intermediate_size,
        }


@dataclass(frozen=True)
class Names:
    """One state of a registry; never changed, only replaced. One name stands for one thing."""

    contents: Mapping[str, Content] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    @property
    def circuits(self) -> dict[str, Circuit]:
        """Name -> circuit."""
        return {n: c for n, c in self.contents.items() if isinstance(c, Circuit)}

    @property
    def vectors(self) -> dict[str, VectorSet]:
        """Name -> set of vectors."""
        return {n: c for n, c in self.contents.items() if isinstance(c, VectorSet)}

    def digests(self) -> dict[str, str]:
        """Content digest -> a name that stands for it."""
        return {content.digest: name for name, content in self.contents.items()}

    def kind(self, name: str) -> str | None:
        """What a name stands for: "circuit", "vector" or "adapter"; None for a free one."""
        if name in self.adapters:
            return "adapter"
        content = self.contents.get(name)
        return None if content is None else kind_of(content)


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
            registry.register_adapter(name, Adapter.from_dict(adapter))
        registry.pinned = frozenset([*config.circuits, *config.vectors, *config.adapters])
        if config.registry_dir is not None:
            # Not before: a look at the store keeps pinned names only.
            registry.store = RegistryStore(config.registry_dir)
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

    def check_free(self, name: str, kind: Literal["circuit", "vector", "adapter"]) -> None:
        """Raises CnaConfigError if ``name`` may not stand for a ``kind``; one that stands for
        another of that kind is free."""
        check_name(name)
        if name in self._reserved:
            raise CnaConfigError(f"the name {show(name)} is that of a served model; choose another")
        if (other := self._names.kind(name)) not in (None, kind):
            problem = f"the name {show(name)} is that of {a_kind(other)}; choose another"
            raise CnaConfigError(problem)

    def register(self, name: str, content: Content) -> None:
        """Lets ``name`` stand for ``content`` from now on; workers must hold it already."""
        self.check_free(name, kind_of(content))
        self.served.check(content)
        with self._lock:
            names = self._names
            self._names = replace(names, contents={**names.contents, name: content})

    def register_adapter(self, name: str, adapter: Adapter) -> None:
        """Lets ``name`` stand for ``adapter``. Raises SteeringError for an unknown circuit."""
        self.check_free(name, "adapter")
        for circuit in adapter.circuits():
            self.digest("circuit", circuit)
        with self._lock:
            names = self._names
            self._names = replace(names, adapters={**names.adapters, name: adapter})

    def unregister(self, kind: KindName, name: str) -> Content:
        """Forgets a name and returns what it stood for. Raises SteeringError for unknown names
        and for a circuit that an adapter uses."""
        with self._lock:
            names = self._names
            content = _find(names, kind, name)
            users = sorted(n for n, a in names.adapters.items() if name in a.circuits())
            if users:
                raise SteeringError(
                    _FIELDS[kind],
                    f"{show(name)} is used by the adapter {show(users[0])}; unload that first",
                )
            self._names = replace(names, contents=_without(names.contents, name))
        return content

    def unregister_adapter(self, name: str) -> Adapter:
        """Forgets an adapter's name. Raises SteeringError for unknown names."""
        with self._lock:
            names = self._names
            adapter = names.adapters.get(name)
            if adapter is None:
                raise SteeringError("adapter", f"no adapter is named {show(name)}")
            self._names = replace(names, adapters=_without(names.adapters, name))
        return adapter

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

    def catch_up(self) -> None:
        """``refresh``; a failure is logged, and told by ``names`` until the directory changes. A
        server calls this in a thread before it looks at a request, which then reads no file."""
        try:
            self.refresh()
        except (OSError, ValueError) as error:
            logger.error("the registry directory cannot be served: %s", error)

    def is_stale(self) -> bool:
        """Whether another process has changed the registry directory; one ``stat``."""
        return self.store is not None and self.store.stamp() != self._stamp

    def adapter(self, name: str | None) -> Adapter | None:
        """What an adapter's name stands for."""
        return None if name is None else self.names().adapters.get(name)

    def digest(self, kind: KindName, name: str) -> str:
        """Content digest of a name. Raises SteeringError that lists the known names."""
        return _find(self.names(), kind, name).digest

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
        names, stored = self._names, store.read()
        contents = {
            n: c for n, c in names.contents.items() if n in self.pinned or kind_of(c) == "vector"
        }
        adapters = {n: a for n, a in names.adapters.items() if n in self.pinned}
        known = {c.digest: c for c in names.contents.values()}
        for name, digest in stored.circuits.items():
            self._check_unpinned(name)
            circuit = known.get(digest) or store.circuit(digest)
            self.served.check(circuit)
            contents[name] = circuit
        for name, adapter in stored.adapters.items():
            self._check_unpinned(name)
            adapters[name] = adapter
        return Names(contents, adapters)

    def stored(self) -> Contents:
        """What belongs into the registry directory: every name that is not pinned."""
        names = self._names
        return Contents(
            {n: c.digest for n, c in names.circuits.items() if n not in self.pinned},
            {n: a for n, a in names.adapters.items() if n not in self.pinned},
        )

    def _check_unpinned(self, name: str) -> None:
        if name in self.pinned:
            raise StoreError(
                f"the registry directory holds {show(name)}, which the configuration names too; "
                "remove one of them"
            )


def _find(names: Names, kind: KindName, name: str) -> Content:
    content = names.contents.get(name)
    if content is None or kind_of(content) != kind:
        of_kind = sorted(n for n, c in names.contents.items() if kind_of(c) == kind)
        known = ", ".join(of_kind[:20]) or "none is loaded"
        raise SteeringError(
            _FIELDS[kind], f"no {kind} is named {show(name)}; known {kind}s: {known}"
        )
    return content


def _without(mapping: Mapping[str, T], name: str) -> dict[str, T]:
    return {n: value for n, value in mapping.items() if n != name}


def a_kind(kind: str | None) -> str:
    """A kind with its article."""
    return "an adapter" if kind == "adapter" else f"a {kind}"
