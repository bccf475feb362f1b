# SPDX-License-Identifier: Apache-2.0
"""Methods that every worker answers through ``collective_rpc``; plain types in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cna_vllm.circuit import Circuit
from cna_vllm.serving.recording import Recorder
from cna_vllm.serving.runtime import SteeringRuntime


def _runtime(worker: Any) -> SteeringRuntime:
    from cna_vllm.serving.seams import runtime_of

    return runtime_of(worker)


def cna_load(worker: Any, circuit: Mapping[str, Any], wanted: Sequence[str] = ()) -> str:
    """Makes a circuit, given as its file's object, resident; returns its digest.

    wanted: digests of all requests that the engine has not finished; the engine's core adds it.
    """
    loaded = Circuit.from_dict(dict(circuit))
    _runtime(worker).load(loaded, wanted)
    return loaded.digest


def cna_unload(worker: Any, digest: str) -> bool:
    """Retires a circuit; False when it was not loaded."""
    return _runtime(worker).unload(digest)


def cna_status(worker: Any) -> dict[str, Any]:
    """See ``SteeringRuntime.status``."""
    return _runtime(worker).status()


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
