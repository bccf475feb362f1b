# SPDX-License-Identifier: Apache-2.0
"""The routes: named after vLLM's LoRA endpoints, under ``/v1`` and so behind its API key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.serving.front.registry import Names
from cna_vllm.serving.http.control_plane import ControlError, ControlPlane
from cna_vllm.steering.circuit import Circuit
from cna_vllm.steering.request import DEFAULT_SCOPE

router = APIRouter()
T = TypeVar("T")
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
    return await _answer(
        request,
        lambda control: control.load_circuit(
            body.circuit_name, body.circuit_path, load_inplace=body.load_inplace
        ),
        lambda circuit: describe_circuit(body.circuit_name, circuit, pinned=False),
    )


@router.post("/v1/load_cna_adapter")
async def load_adapter(body: LoadAdapter, request: Request) -> JSONResponse:
    fields = body.model_dump(exclude={"adapter_name", "load_inplace"}, exclude_none=True)
    return await _answer(
        request,
        lambda control: control.load_adapter(
            body.adapter_name, fields, load_inplace=body.load_inplace
        ),
        lambda adapter: describe_adapter(body.adapter_name, adapter, pinned=False),
    )


@router.post("/v1/unload_cna_circuit")
async def unload_circuit(body: UnloadCircuit, request: Request) -> JSONResponse:
    name = body.circuit_name
    return await _answer(
        request, lambda control: control.unload_circuit(name), lambda _: _deleted(name, "circuit")
    )


@router.post("/v1/unload_cna_adapter")
async def unload_adapter(body: UnloadAdapter, request: Request) -> JSONResponse:
    name = body.adapter_name
    return await _answer(
        request, lambda control: control.unload_adapter(name), lambda _: _deleted(name, "adapter")
    )


@router.get("/v1/cna_circuits")
async def list_circuits(request: Request) -> JSONResponse:
    return await _list(request, lambda names: names.circuits, describe_circuit)


@router.get("/v1/cna_circuits/{name:path}")
async def inspect_circuit(name: str, request: Request) -> JSONResponse:
    return await _answer(request, lambda control: control.circuit(name), inspect)


@router.get("/v1/cna_adapters")
async def list_adapters(request: Request) -> JSONResponse:
    return await _list(request, lambda names: names.adapters, describe_adapter)


def describe_circuit(name: str, circuit: Circuit, *, pinned: bool) -> dict[str, Any]:
    """One entry of the list; pinned: given at start, so not to be changed."""
    return {
        "id": name,
        "object": "cna.circuit",
        "digest": circuit.digest,
        "neurons": len(circuit),
        "model": circuit.model,
        "created": circuit.created,
        "pinned": pinned,
    }


def describe_adapter(name: str, adapter: Adapter, *, pinned: bool) -> dict[str, Any]:
    """One entry of the list."""
    return {"id": name, "object": "cna.adapter", **adapter.to_dict(), "pinned": pinned}


def inspect(found: tuple[str, Circuit, bool]) -> dict[str, Any]:
    """A circuit's entry with its provenance, layer profile and strongest neurons."""
    name, circuit, pinned = found
    strongest = sorted(circuit.neurons, key=lambda n: -abs(n.delta))[:20]
    return {
        **describe_circuit(name, circuit, pinned=pinned),
        "architecture": circuit.architecture,
        "num_layers": circuit.num_layers,
        "intermediate_size": circuit.intermediate_size,
        "method": circuit.method,
        "prompts": circuit.prompts,
        "neurons_by_layer": {str(k): len(v) for k, v in circuit.by_layer().items()},
        "strongest": [{"layer": n.layer, "index": n.index, "delta": n.delta} for n in strongest],
    }


def _deleted(name: str, kind: str) -> dict[str, Any]:
    return {"id": name, "object": f"cna.{kind}", "deleted": True}


async def _list(
    request: Request,
    entries: Callable[[Names], Mapping[str, T]],
    describe: Callable[..., dict[str, Any]],
) -> JSONResponse:
    """All entries of one kind, by name. describe: (name, entry, pinned=...) -> object."""

    def listed(found: tuple[Names, frozenset[str]]) -> dict[str, Any]:
        names, pinned = found
        data = [
            describe(name, entry, pinned=name in pinned)
            for name, entry in sorted(entries(names).items())
        ]
        return {"object": "list", "data": data}

    return await _answer(request, lambda control: control.names(), listed)


async def _answer(
    request: Request,
    act: Callable[[ControlPlane], Awaitable[T]],
    describe: Callable[[T], dict[str, Any]],
) -> JSONResponse:
    control: ControlPlane | None = request.app.state.cna_control
    if control is None:
        return _refusal("cna", "this server was started without a cna configuration", 404)
    try:
        return JSONResponse(describe(await act(control)))
    except ControlError as error:
        return _refusal(error.field, str(error), error.status)


def _refusal(field: str, message: str, status: int) -> JSONResponse:
    """vLLM's own error object."""
    kind = {404: "NotFoundError", 503: "ServiceUnavailableError"}.get(status, "BadRequestError")
    body = {"message": message, "type": kind, "param": field, "code": status}
    return JSONResponse({"error": body}, status_code=status)
