# SPDX-License-Identifier: Apache-2.0
"""Methods that every worker answers through ``collective_rpc``; plain types in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cna_vllm.packed import KindName, Packed
from cna_vllm.serving.config import CnaConfigError
from cna_vllm.serving.runtime import SteeringRuntime
from cna_vllm.serving.table import CircuitTableError


def _runtime(worker: Any) -> SteeringRuntime:
    from cna_vllm.serving.seams.worker import runtime_of

    return runtime_of(worker)


def cna_load(
    worker: Any,
    kind: KindName,
    digest: str,
    layers: bytes,
    values: bytes,
    wanted: Sequence[str] = (),
) -> dict[str, Any]:
    """Makes content, given as a ``Packed``, resident.

    wanted: digests of all requests that the engine has not finished; the engine's core adds it.
    Returns all digests that are resident then, and why the content was refused, if it was: an
    exception here would be the engine's, not the caller's.
    """
    runtime = _runtime(worker)
    refused = None
    try:
        runtime.load(Packed(kind, digest, layers, values), wanted)
    except (CircuitTableError, CnaConfigError) as error:
        refused = str(error)
    return {"resident": runtime.resident(), "refused": refused}


def cna_unload(worker: Any, digest: str) -> bool:
    """Retires content; False when it was not loaded."""
    return _runtime(worker).unload(digest)


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
    "cna_status": cna_status,
    "cna_start_recording": cna_start_recording,
    "cna_take_recording": cna_take_recording,
}
