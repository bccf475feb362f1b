# SPDX-License-Identifier: Apache-2.0
"""What the names of vectors stand for in one front end."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import astuple, dataclass

from cna_vllm.circuit import show
from cna_vllm.request import FIELD_VECTOR, SteeringError
from cna_vllm.serving.config import CnaConfig, CnaConfigError, check_name
from cna_vllm.vectors import VectorSet


@dataclass(frozen=True)
class ServedStream:
    """What vectors must fit."""

    model: str
    architecture: str
    num_layers: int
    hidden_size: int


class VectorRegistry:
    """Name -> validated set of vectors. Safe to read from several threads."""

    def __init__(self, served: ServedStream) -> None:
        self.served = served
        self._vectors: Mapping[str, VectorSet] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_config(cls, config: CnaConfig, served: ServedStream) -> VectorRegistry:
        """Loads every configured set. Raises VectorError or CnaConfigError on the first that is
        missing, malformed, of another model, or not what the front end has seen."""
        registry = cls(served)
        for name, path in config.vectors.items():
            vectors = VectorSet.load(path)
            seen = config.vector_digests.get(name)
            if seen is not None and seen != vectors.digest:
                raise CnaConfigError(
                    f"cna.vectors[{name!r}]: {path} changed while the engine started "
                    f"({seen[:12]} became {vectors.digest[:12]}); start it again"
                )
            registry.register(name, vectors)
        return registry

    def check(self, vectors: VectorSet) -> None:
        """Raises VectorError, naming both models, when ``vectors`` do not fit."""
        vectors.check_model(*astuple(self.served))

    def register(self, name: str, vectors: VectorSet) -> None:
        """Lets ``name`` stand for ``vectors`` from now on; workers must hold them already."""
        check_name(name)
        self.check(vectors)
        with self._lock:
            self._vectors = {**self._vectors, name: vectors}

    def vectors(self) -> dict[str, VectorSet]:
        """A snapshot of all names."""
        return dict(self._vectors)

    def digest(self, name: str) -> str:
        """Content digest of a name. Raises SteeringError that lists the known names."""
        vectors = self._vectors.get(name)
        if vectors is None:
            known = ", ".join(sorted(self._vectors)[:20]) or "none is loaded"
            raise SteeringError(
                FIELD_VECTOR, f"no vector is named {show(name)}; known vectors: {known}"
            )
        return vectors.digest
