# SPDX-License-Identifier: Apache-2.0
"""Methods that every worker answers through ``collective_rpc``; plain types in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cna_vllm.circuit import Circuit, CircuitError
from cna_vllm.serving.config import CnaConfigError
from cna_vllm.serving.runtime import SteeringRuntime
from cna_vllm.serving.table import CircuitTableError
from cna_vllm.vectors import VectorError, VectorSet


def _runtime(worker: Any) -> SteeringRuntime:
    from cna_vllm.serving.seams.worker import runtime_of

    return runtime_of(worker)


def cna_load(worker: Any, circuit: Mapping[str, Any], wanted: Sequence[str] = ()) -> dict[str, Any]:
    """Makes a circuit, given as its file's object, resident.

    wanted: digests of all requests that the engine has not finished; the engine's core adds it.
    Returns all digests that are resident then, and why the circuit was refused, if it was: an
    exception here would be the engine's, not the caller's.
    """
    runtime = _runtime(worker)
    refused = None
    try:
        runtime.load(Circuit.from_dict(dict(circuit)), wanted)
    except (CircuitError, CircuitTableError, CnaConfigError) as error:
        refused = str(error)
    return {"resident": runtime.resident(), "refused": refused}


def cna_load_vectors(worker: Any, vectors: bytes, wanted: Sequence[str] = ()) -> dict[str, Any]:
    """``cna_load`` of a set of vectors, given as its file's content."""
    runtime = _runtime(worker)
    refused = None
    try:
        runtime.load_vectors(VectorSet.from_bytes(bytes(vectors)), wanted)
    except (VectorError, CircuitTableError, CnaConfigError) as error:
        refused = str(error)
    return {"resident": runtime.resident(), "refused": refused}


def cna_unload(worker: Any, digest: str) -> bool:
    """Retires a circuit; False when it was not loaded."""
    return _runtime(worker).unload(digest)


def cna_unload_vectors(worker: Any, digest: str) -> bool:
    """Retires a set of vectors; False when it was not loaded."""
    table = _runtime(worker).vectors
    return table is not None and table.unload(digest)


def cna_status(worker: Any) -> dict[str, Any]:
    """See ``SteeringRuntime.status``; and which model runner the worker has, "V1" or "V2"."""
    from cna_vllm.serving.seams.worker import runner_of

    return {"runner": runner_of(worker), **_runtime(worker).status()}


def cna_start_recording(worker: Any, plan: Mapping[str, Any]) -> None:
    """See ``SteeringRuntime.start_recording``."""
    _runtime(worker).start_recording(**plan)


def cna_take_recording(worker: Any) -> dict[str, Any]:
    """See ``SteeringRuntime.take_recording``."""
    return _runtime(worker).take_recording()


RPC_METHODS: dict[str, Callable[..., Any]] = {
    "cna_load": cna_load,
    "cna_unload": cna_unload,
    "cna_load_vectors": cna_load_vectors,
    "cna_unload_vectors": cna_unload_vectors,
    "cna_status": cna_status,
    "cna_start_recording": cna_start_recording,
    "cna_take_recording": cna_take_recording,
}
