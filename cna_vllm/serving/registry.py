# SPDX-License-Identifier: Apache-2.0
"""The front end's names: which circuit or adapter a name stands for, now."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace

from cna_vllm.circuit import Circuit, show
from cna_vllm.request import FIELD_CIRCUIT, SteeringError
from cna_vllm.serving.adapter import Adapter
from cna_vllm.serving.config import CnaConfig, CnaConfigError, check_name
from cna_vllm.serving.store import Contents, RegistryStore, StoreError

logger = logging.getLogger("vllm.cna")  # vLLM's handlers and level are those of its name's parents


@dataclass(frozen=True)
class ServedModel:
    """What a circuit must fit."""

    model: str
    architecture: str
    num_layers: int
    intermediate_size: int


@dataclass(frozen=True)
class Names:
    """One state of a registry; never changed, only replaced."""

    circuits: Mapping[str, Circuit] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    def digests(self) -> set[str]:
        """Content digests that some name stands for."""
        return {circuit.digest for circuit in self.circuits.values()}


class CircuitRegistry:
    """Name -> validated circuit or adapter of one front end. Safe to read from several threads.

    Circuits, adapters and the served model share one space of names. Names from the configuration
    are pinned: they can not be changed at run time. With a store, the names of other API server
    processes are seen as soon as they are written.
    """

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.store: RegistryStore | None = None
        self.pinned: frozenset[str] = frozenset()
        self._reserved: frozenset[str] = frozenset()
        self._names = Names()
        self._stamp: tuple[int, ...] = ()
        self._lock = threading.Lock()

    @classmethod
    def from_config(cls, config: CnaConfig, served: ServedModel) -> CircuitRegistry:
        """Loads every configured circuit, then what the registry directory holds.

        Raises CircuitError, SteeringError, StoreError or CnaConfigError on the first that is
        missing, malformed, of another model, or under a name that is taken.
        """
        registry = cls(served)
        for name, path in config.circuits.items():
            circuit = registry.load(path)
            seen = config.digests.get(name)
            if seen is not None and seen != circuit.digest:
                raise CnaConfigError(
                    f"cna.circuits[{name!r}]: {path} changed while the engine started "
                    f"({seen[:12]} became {circuit.digest[:12]}); start it again"
                )
            registry.register(name, circuit)
        for name, adapter in config.adapters.items():
            registry.register_adapter(name, Adapter.from_dict(adapter))
        registry.pinned = frozenset([*config.circuits, *config.adapters])
        if config.registry_dir is not None:
            # Not before: a look at the store keeps pinned names only.
            registry.store = RegistryStore(config.registry_dir)
            registry.refresh()
        return registry

    def load(self, path: str | os.PathLike[str]) -> Circuit:
        """Reads a circuit file; layouts that name no model are read as the served model's."""
        return Circuit.load(path, **asdict(self.served))

    def check(self, circuit: Circuit) -> None:
        """Raises CircuitError, naming both models, when ``circuit`` does not fit."""
        served = self.served
        circuit.check_model(
            served.model, served.architecture, served.num_layers, served.intermediate_size
        )

    def reserve(self, names: Collection[str]) -> None:
        """Names that the server itself uses. Raises CnaConfigError if one is taken."""
        self._reserved = frozenset(names)
        current = self.names()
        for name in sorted(self._reserved):
            if name in current.circuits or name in current.adapters:
                raise CnaConfigError(
                    f"the name {name!r} is that of a served model, and of a circuit or adapter "
                    "too; give one of them another name"
                )

    def check_free(self, name: str, *, adapter: bool) -> None:
        """Raises CnaConfigError if ``name`` may not stand for a circuit (or an adapter)."""
        check_name(name)
        if name in self._reserved:
            raise CnaConfigError(f"the name {show(name)} is that of a served model; choose another")
        names = self._names
        taken = names.circuits if adapter else names.adapters
        if name in taken:
            kind = "a circuit" if adapter else "an adapter"
            raise CnaConfigError(f"the name {show(name)} is that of {kind}; choose another")

    def register(self, name: str, circuit: Circuit) -> None:
        """Lets ``name`` stand for ``circuit`` from now on; workers must hold it already."""
        self.check_free(name, adapter=False)
        self.check(circuit)
        with self._lock:
            names = self._names
            self._names = replace(names, circuits={**names.circuits, name: circuit})

    def register_adapter(self, name: str, adapter: Adapter) -> None:
        """Lets ``name`` stand for ``adapter``. Raises SteeringError for an unknown circuit."""
        self.check_free(name, adapter=True)
        for circuit in adapter.circuits():
            self.digest(circuit)
        with self._lock:
            names = self._names
            self._names = replace(names, adapters={**names.adapters, name: adapter})

    def unregister(self, name: str) -> Circuit:
        """Forgets a circuit's name and returns the circuit. Raises SteeringError for unknown names
        and for a circuit that an adapter uses."""
        with self._lock:
            names = self._names
            circuit = _find(names, name)
            users = sorted(n for n, a in names.adapters.items() if name in a.circuits())
            if users:
                raise SteeringError(
                    FIELD_CIRCUIT,
                    f"{show(name)} is used by the adapter {show(users[0])}; unload that first",
                )
            rest = {n: c for n, c in names.circuits.items() if n != name}
            self._names = replace(names, circuits=rest)
        return circuit

    def unregister_adapter(self, name: str) -> Adapter:
        """Forgets an adapter's name. Raises SteeringError for unknown names."""
        with self._lock:
            names = self._names
            adapter = names.adapters.get(name)
            if adapter is None:
                raise SteeringError("adapter", f"no adapter is named {show(name)}")
            rest = {n: a for n, a in names.adapters.items() if n != name}
            self._names = replace(names, adapters=rest)
        return adapter

    def names(self) -> Names:
        """The current state, changes by other processes included.

        Raises SteeringError when the registry directory was spoiled: what a name stands for is
        not known then, and the reason is the operator's, who finds it in the log.
        """
        if self.store is not None:
            try:
                if self.store.stamp() != self._stamp:
                    self.refresh()
            except (OSError, ValueError) as error:
                logger.error("the registry directory cannot be served: %s", error)
                raise SteeringError(
                    FIELD_CIRCUIT,
                    "the server's registry of circuits cannot be read; ask its operator",
                ) from error
        return self._names

    def circuits(self) -> dict[str, Circuit]:
        """A snapshot of all circuits' names."""
        return dict(self.names().circuits)

    def adapter(self, name: str | None) -> Adapter | None:
        """What an adapter's name stands for."""
        return None if name is None else self.names().adapters.get(name)

    def digest(self, name: str) -> str:
        """Content digest of a name. Raises SteeringError that lists the known names."""
        return _find(self.names(), name).digest

    def refresh(self) -> None:
        """Takes over what the registry directory says. Raises StoreError, CircuitError or
        CnaConfigError, and keeps the old state, when that cannot be served."""
        if self.store is None:
            return
        with self._lock:
            # The stamp first: what is written after it is seen by the next look.
            stamp = self.store.stamp()
            contents = self.store.read()
            names = self._names
            pinned = self.pinned
            circuits = {n: c for n, c in names.circuits.items() if n in pinned}
            adapters = {n: a for n, a in names.adapters.items() if n in pinned}
            known = {c.digest: c for c in names.circuits.values()}
            for name, digest in contents.circuits.items():
                self._check_unpinned(name)
                circuit = known.get(digest) or self.store.circuit(digest)
                self.check(circuit)
                circuits[name] = circuit
            for name, adapter in contents.adapters.items():
                self._check_unpinned(name)
                adapters[name] = adapter
            self._names = Names(circuits, adapters)
            self._stamp = stamp

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


def _find(names: Names, name: str) -> Circuit:
    circuit = names.circuits.get(name)
    if circuit is None:
        known = ", ".join(sorted(names.circuits)[:20]) or "none is loaded"
        raise SteeringError(
            FIELD_CIRCUIT, f"no circuit is named {show(name)}; known circuits: {known}"
        )
    return circuit
