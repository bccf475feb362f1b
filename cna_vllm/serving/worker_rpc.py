# SPDX-License-Identifier: Apache-2.0
"""Methods that every worker answers through ``collective_rpc``; plain types in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cna_vllm.circuit import Circuit, CircuitError
from cna_vllm.serving.config import CnaConfigError
from cna_vllm.serving.recording import Recorder
from cna_vllm.serving.runtime import SteeringRuntime
from cna_vllm.serving.table import CircuitTableError


def _runtime(worker: Any) -> SteeringRuntime:
    from cna_vllm.serving.seams.worker import runtime_of

    return runtime_of(worker)


def cna_load(worker: Any, circuit: Mapping[str, Any], wanted: Sequence[str] = ()) -> dict[str, Any]:
    """Makes a circuit, given as its file's object, resident.

    wanted: digests of all requests that the engine has not finished; the engine's core adds it.
    Returns all digests that are resident then, and why the circuit was refused, if it was: an
    exception here would be the engine's, not the caller's.
    """
    refused = None
    try:
        _runtime(worker).load(Circuit.from_dict(dict(circuit)), wanted)
    except (CircuitError, CircuitTableError, CnaConfigError) as error:
        refused = str(error)
    return {"resident": list(_runtime(worker).table.resident()), "refused": refused}


def cna_unload(worker: Any, digest: str) -> bool:
    """Retires a circuit; False when it was not loaded."""
    return _runtime(worker).unload(digest)


def cna_status(worker: Any) -> dict[str, Any]:
    """See ``SteeringRuntime.status``; and which model runner the worker has, "V1" or "V2"."""
    from cna_vllm.serving.seams.worker import runner_of

    return {"runner": runner_of(worker), **_runtime(worker).status()}


def cna_start_recording(worker: Any, plan: Mapping[str, Any]) -> None:
    """``Recorder.start(**plan)``. Raises RuntimeError when the engine does not record."""
    _recorder(worker).start(**plan)


def cna_take_recording(worker: Any) -> dict[str, Any]:
    """See ``Recorder.take``. Raises RuntimeError when the engine does not record."""
    return _recorder(worker).take()


def _recorder(worker: Any) -> Recorder:
    recorder = _runtime(worker).recorder
    if recorder is None:
        raise RuntimeError("this engine does not record; start it with cna.record = true")
    return recorder


RPC_METHODS: dict[str, Callable[..., Any]] = {
    "cna_load": cna_load,
    "cna_unload": cna_unload,
    "cna_status": cna_status,
    "cna_start_recording": cna_start_recording,
    "cna_take_recording": cna_take_recording,
}
