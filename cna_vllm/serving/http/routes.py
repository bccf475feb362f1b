# SPDX-License-Identifier: Apache-2.0
"""The routes: named after vLLM's LoRA endpoints, under ``/v1`` and so behind its API key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.serving.front.registry import Entry, kind_of
from cna_vllm.serving.http.control_plane import ControlError, ControlPlane, Kind
from cna_vllm.steering.circuit import Circuit
from cna_vllm.steering.request import DEFAULT_SCOPE

router = APIRouter()
Number = StrictInt | StrictFloat
Name = Annotated[StrictStr, Field(min_length=1, max_length=128)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LoadCircuit(_Body):
    """circuit_path is relative to the operator's circuit folder."""

    circuit_name: Name
    circuit_path: Annotated[StrictStr, Field(min_length=1, max_length=1024)]
    load_inplace: StrictBool = False


class UnloadCircuit(_Body):
    circuit_name: Name


class LoadAdapter(_Body):
    """One circuit and multiplier, or lists of equal length."""

    adapter_name: Name
    circuit: Name | Annotated[list[Name], Field(max_length=1024)] | None = None
    multiplier: Number | Annotated[list[Number], Field(max_length=1024)] | None = None
    vector: Name | Annotated[list[Name], Field(max_length=1024)] | None = None
    coefficient: Number | Annotated[list[Number], Field(max_length=1024)] | None = None
    scope: Name = DEFAULT_SCOPE
    lora: Name | None = None
    load_inplace: StrictBool = False


class UnloadAdapter(_Body):
    adapter_name: Name


@router.post("/v1/load_cna_circuit")
async def load_circuit(body: LoadCircuit, request: Request) -> JSONResponse:
    return await _load(request, "circuit", body.circuit_name, body.circuit_path, body.load_inplace)


@router.post("/v1/load_cna_adapter")
async def load_adapter(body: LoadAdapter, request: Request) -> JSONResponse:
    fields = body.model_dump(exclude={"adapter_name", "load_inplace"}, exclude_none=True)
    return await _load(request, "adapter", body.adapter_name, fields, body.load_inplace)


@router.post("/v1/unload_cna_circuit")
async def unload_circuit(body: UnloadCircuit, request: Request) -> JSONResponse:
    return await _unload(request, "circuit", body.circuit_name)


@router.post("/v1/unload_cna_adapter")
async def unload_adapter(body: UnloadAdapter, request: Request) -> JSONResponse:
    return await _unload(request, "adapter", body.adapter_name)


@router.get("/v1/cna_circuits")
async def list_circuits(request: Request) -> JSONResponse:
    return await _list(request, "circuit")


@router.get("/v1/cna_circuits/{name:path}")
async def inspect_circuit(name: str, request: Request) -> JSONResponse:
    async def act(control: ControlPlane) -> dict[str, Any]:
        circuit = control.entry("circuit", name)
        assert isinstance(circuit, Circuit)
        return {**describe(name, circuit, control.is_pinned(name)), **inspect(circuit)}

    return await _answer(request, act)


@router.get("/v1/cna_adapters")
async def list_adapters(request: Request) -> JSONResponse:
    return await _list(request, "adapter")


def describe(name: str, entry: Entry, pinned: bool) -> dict[str, Any]:
    """One entry of a list; pinned: given at start, so not to be changed."""
    about: dict[str, Any] = {}
    if isinstance(entry, Adapter):
        about = entry.to_dict()
    elif isinstance(entry, Circuit):
        about = {
            "digest": entry.digest,
            "neurons": len(entry),
            "model": entry.model,
            "created": entry.created,
        }
    return {"id": name, "object": f"cna.{kind_of(entry)}", **about, "pinned": pinned}


def inspect(circuit: Circuit) -> dict[str, Any]:
    """A circuit's provenance, layer profile and strongest neurons."""
    strongest = sorted(circuit.neurons, key=lambda n: -abs(n.delta))[:20]
    by_layer = Counter(str(neuron.layer) for neuron in circuit.neurons)
    return {
        "architecture": circuit.architecture,
        **circuit.shape.fields(),
        "method": circuit.method,
        "prompts": circuit.prompts,
        "neurons_by_layer": dict(by_layer),
        "strongest": [neuron.to_dict() for neuron in strongest],
    }


async def _load(
    request: Request, kind: Kind, name: str, source: Any, load_inplace: bool
) -> JSONResponse:
    async def act(control: ControlPlane) -> dict[str, Any]:
        entry = await control.load(kind, name, source, load_inplace=load_inplace)
        return describe(name, entry, pinned=False)

    return await _answer(request, act)


async def _unload(request: Request, kind: Kind, name: str) -> JSONResponse:
    async def act(control: ControlPlane) -> dict[str, Any]:
        await control.unload(kind, name)
        return {"id": name, "object": f"cna.{kind}", "deleted": True}

    return await _answer(request, act)


async def _list(request: Request, kind: Kind) -> JSONResponse:
    async def act(control: ControlPlane) -> dict[str, Any]:
        found = sorted(control.entries(kind).items())
        data = [describe(name, entry, control.is_pinned(name)) for name, entry in found]
        return {"object": "list", "data": data}

    return await _answer(request, act)


async def _answer(
    request: Request, act: Callable[[ControlPlane], Awaitable[dict[str, Any]]]
) -> JSONResponse:
    control: ControlPlane | None = request.app.state.cna_control
    if control is None:
        return _refusal("cna", "this server was started without a cna configuration", 404)
    try:
        return JSONResponse(await act(control))
    except ControlError as error:
        return _refusal(error.field, str(error), error.status)


def _refusal(field: str, message: str, status: int) -> JSONResponse:
    """vLLM's own error object."""
    kind = {404: "NotFoundError", 503: "ServiceUnavailableError"}.get(status, "BadRequestError")
    body = {"message": message, "type": kind, "param": field, "code": status}
    return JSONResponse({"error": body}, status_code=status)
