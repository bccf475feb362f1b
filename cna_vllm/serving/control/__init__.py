# SPDX-License-Identifier: Apache-2.0
"""Run-time control of an offline ``LLM``: load, unload and inspect circuits and vectors between
requests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cna_vllm.serving.config import CircuitTableError, CnaConfigError
from cna_vllm.serving.front.registry import Entry, kind_of
from cna_vllm.serving.seams.front_end import admission_of
from cna_vllm.steering.circuit import Circuit
from cna_vllm.steering.packed import KindName
from cna_vllm.steering.vectors import VectorSet

if TYPE_CHECKING:
    from vllm import LLM

T = TypeVar("T", Circuit, VectorSet)


def load_circuit(llm: LLM, name: str, circuit: Circuit | str | Path) -> Circuit:
    """Makes ``name`` stand for ``circuit`` (or a circuit file) on every worker.

    An existing name is replaced: running requests finish on what they started with, and no
    prefix-cache block of the old content can be hit. The new content needs a row of its own
    (``max_circuits``) before the old one's is given back. Raises CircuitError when the circuit is
    malformed or of another model, and CnaConfigError when the name is that of an adapter or of a
    vector, before any worker sees it; CircuitTableError when no row is free.
    """
    if not isinstance(circuit, Circuit):
        circuit = admission_of(llm).registry.served.circuit(circuit)
    return _load(llm, name, circuit)


def load_vectors(llm: LLM, name: str, vectors: VectorSet | str | Path) -> VectorSet:
    """``load_circuit`` of a set of vectors (or a file of one); a row is one of ``max_vectors``.

    Raises VectorError in place of CircuitError; CnaConfigError also when the engine was started
    without ``cna.max_vectors``.
    """
    if not isinstance(vectors, VectorSet):
        vectors = VectorSet.load(vectors)
    _require_vectors(llm)
    return _load(llm, name, vectors)


def unload_circuit(llm: LLM, name: str) -> None:
    """Forgets ``name``; later requests for it are refused. Raises SteeringError if unknown."""
    _unload(llm, "circuit", name)


def unload_vectors(llm: LLM, name: str) -> None:
    """``unload_circuit`` of a set of vectors."""
    _unload(llm, "vector", name)


def list_circuits(llm: LLM) -> dict[str, Circuit]:
    """Name -> circuit, as requests would resolve them now."""
    return admission_of(llm).registry.names().circuits


def list_vectors(llm: LLM) -> dict[str, VectorSet]:
    """Name -> set of vectors, as requests would resolve them now."""
    _require_vectors(llm)
    return admission_of(llm).registry.names().vectors


def status(llm: LLM) -> list[dict[str, Any]]:
    """One report per worker: hooked layers, resident digests, steered tokens by digest."""
    return llm.collective_rpc("cna_status")


def _require_vectors(llm: LLM) -> None:
    if not admission_of(llm).config.max_vectors:
        raise CnaConfigError(
            "this LLM was started without vectors; pass additional_config={'cna': "
            "{'max_vectors': 8}}"
        )


def _load(llm: LLM, name: str, content: T) -> T:
    registry = admission_of(llm).registry
    registry.check_free(name, kind_of(content))
    registry.served.check(content)
    previous = registry.names().entries.get(name)
    for report in llm.collective_rpc("cna_load", args=content.packed()):
        if report["refused"]:
            raise CircuitTableError(report["refused"])
    registry.register(name, content)
    if previous is not None:
        _retire(llm, previous)
    return content


def _unload(llm: LLM, kind: KindName, name: str) -> None:
    _retire(llm, admission_of(llm).registry.unregister(kind, name))


def _retire(llm: LLM, entry: Entry) -> None:
    """Frees the rows of content that no name stands for any more."""
    if (digest := admission_of(llm).registry.unnamed(entry)) is not None:
        llm.collective_rpc("cna_unload", args=(digest,))
