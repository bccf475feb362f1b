# SPDX-License-Identifier: Apache-2.0
"""Methods that every worker answers through ``collective_rpc``; plain types in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cna_vllm.serving.config import CircuitTableError, CnaConfigError
from cna_vllm.serving.worker.runtime import SteeringRuntime
from cna_vllm.steering.packed import KindName, Packed


def cna_load(
    runtime: SteeringRuntime,
    kind: KindName,
    digest: str,
    layers: bytes,
    values: bytes,
    experts: bytes = b"",
    *,
    wanted: Sequence[str] = (),
) -> dict[str, Any]:
    """Makes content, given as a ``Packed``, resident.

    wanted: digests of all requests that the engine has not finished; the engine's core adds it.
    Returns all digests that are resident then, and why the content was refused, if it was: an
    exception here would be the engine's, not the caller's.
    """
    refused = None
    try:
        runtime.load(Packed(kind, digest, layers, values, experts), wanted)
    except (CircuitTableError, CnaConfigError) as error:
        refused = str(error)
    return {"resident": runtime.resident(), "refused": refused}


def cna_unload(runtime: SteeringRuntime, digest: str) -> bool:
    """Retires content; False when it was not loaded."""
    return runtime.unload(digest)


def cna_status(runtime: SteeringRuntime) -> dict[str, Any]:
    """See ``SteeringRuntime.status``."""
    return runtime.status()


def cna_start_recording(runtime: SteeringRuntime, plan: Mapping[str, Any]) -> None:
    """See ``SteeringRuntime.start_recording``."""
    runtime.start_recording(**plan)


def cna_take_recording(runtime: SteeringRuntime) -> dict[str, Any]:
    """See ``SteeringRuntime.take_recording``."""
    return runtime.take_recording()


RPC_METHODS: dict[str, Callable[..., Any]] = {
    "cna_load": cna_load,
    "cna_unload": cna_unload,
    "cna_status": cna_status,
    "cna_start_recording": cna_start_recording,
    "cna_take_recording": cna_take_recording,
}
