# SPDX-License-Identifier: Apache-2.0
"""The front end's names: which circuit a name stands for, now."""

from __future__ import annotations

import os
import threading
from dataclasses import asdict, dataclass

from cna_vllm.circuit import Circuit, show
from cna_vllm.request import FIELD_CIRCUIT, SteeringError
from cna_vllm.serving.config import CnaConfig, CnaConfigError, check_name


@dataclass(frozen=True)
class ServedModel:
    """What a circuit must fit."""

    model: str
    architecture: str
    num_layers: int
    intermediate_size: int


class CircuitRegistry:
    """Name -> validated circuit of one front end. Safe to read from several threads."""

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self._circuits: dict[str, Circuit] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_config(cls, config: CnaConfig, served: ServedModel) -> CircuitRegistry:
        """Loads every configured circuit; raises CircuitError or CnaConfigError on the first
        that is missing, malformed or of another model."""
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

    def register(self, name: str, circuit: Circuit) -> None:
        """Lets ``name`` stand for ``circuit`` from now on; workers must hold it already."""
        check_name(name)
        self.check(circuit)
        with self._lock:
            self._circuits = {**self._circuits, name: circuit}

    def unregister(self, name: str) -> Circuit:
        """Forgets a name and returns its circuit. Raises SteeringError for unknown names."""
        with self._lock:
            circuit = self._lookup(name)
            self._circuits = {n: c for n, c in self._circuits.items() if n != name}
        return circuit

    def circuits(self) -> dict[str, Circuit]:
        """A snapshot of all names."""
        return dict(self._circuits)

    def digest(self, name: str) -> str:
        """Content digest of a name. Raises SteeringError that lists the known names."""
        return self._lookup(name).digest

    def _lookup(self, name: str) -> Circuit:
        circuit = self._circuits.get(name)
        if circuit is None:
            known = ", ".join(sorted(self._circuits)[:20]) or "none is loaded"
            raise SteeringError(
                FIELD_CIRCUIT, f"no circuit is named {show(name)}; known circuits: {known}"
            )
        return circuit
