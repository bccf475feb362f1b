# SPDX-License-Identifier: Apache-2.0
"""Run-time control of an offline ``LLM``: load, unload and inspect circuits between requests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cna_vllm.circuit import Circuit
from cna_vllm.serving.seams.front_end import admission_of
from cna_vllm.serving.table import CircuitTableError

if TYPE_CHECKING:
    from vllm import LLM


def load_circuit(llm: LLM, name: str, circuit: Circuit | str | Path) -> Circuit:
    """Makes ``name`` stand for ``circuit`` (or a circuit file) on every worker.

    An existing name is replaced: running requests finish on what they started with, and no
    prefix-cache block of the old content can be hit. The new content needs a row of its own
    (``max_circuits``) before the old one's is given back. Raises CircuitError when the circuit is
    malformed or of another model, and CnaConfigError when the name is that of an adapter or of a
    vector, before any worker sees it.
    """
    gate = admission_of(llm)
    registry = gate.registry
    loaded = circuit if isinstance(circuit, Circuit) else registry.load(circuit)
    gate.check_free(name, "circuit")
    registry.check(loaded)
    previous = registry.circuits().get(name)
    for report in llm.collective_rpc("cna_load", args=(loaded.to_dict(),)):
        if report["refused"]:
            raise CircuitTableError(report["refused"])
    registry.register(name, loaded)
    if previous is not None and previous.digest != loaded.digest:
        _retire(llm, previous)
    return loaded


def unload_circuit(llm: LLM, name: str) -> None:
    """Forgets ``name``; later requests for it are refused. Raises SteeringError if unknown."""
    _retire(llm, admission_of(llm).registry.unregister(name))


def list_circuits(llm: LLM) -> dict[str, Circuit]:
    """Name -> circuit, as requests would resolve them now."""
    return admission_of(llm).registry.circuits()


def status(llm: LLM) -> list[dict[str, Any]]:
    """One report per worker: hooked layers, resident digests, steered tokens by digest."""
    return llm.collective_rpc("cna_status")


def _retire(llm: LLM, circuit: Circuit) -> None:
    """Frees the rows of a circuit that no name stands for any more."""
    names = admission_of(llm).registry.circuits().values()
    if all(other.digest != circuit.digest for other in names):
        llm.collective_rpc("cna_unload", args=(circuit.digest,))
