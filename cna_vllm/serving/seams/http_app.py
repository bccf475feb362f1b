# SPDX-License-Identifier: Apache-2.0
"""Seams of vLLM's HTTP application: the guard around its routes, one model by its name, which API
server process it is of, and its LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from cna_vllm.serving.front.guard import SteeringGuard
from cna_vllm.serving.seams.gate import gate_of
from cna_vllm.serving.seams.wrapping import Original, adding, wrap


def install() -> None:
    """Applications that are built from now on are guarded."""
    from vllm.entrypoints.launchers import app

    wrap(app, "init_entrypoints_middleware", _init_entrypoints_middleware)


@adding
def _init_entrypoints_middleware(
    original: Original, args: Any, app: Any, *more: Any, **kwargs: Any
) -> None:
    """Called once all routes are there. What is added last is outermost: the guard is within the
    API key's check, and within whatever the operator added, which may rewrite requests."""
    app.add_route("/v1/models/{model:path}", _model, methods=["GET"])
    app.add_middleware(SteeringGuard, names=_names, catch_up=_catch_up)
    original(args, app, *more, **kwargs)


def _names(app: Any) -> Iterable[str]:
    gate = gate_of(app.state.openai_serving_models)
    if gate is None:
        return ()
    return gate.registry.names().entries


async def _catch_up(app: Any) -> None:
    gate = gate_of(getattr(app.state, "openai_serving_models", None))
    if gate is not None:
        await gate.registry.current()


async def _model(request: Any) -> Any:
    """``GET /v1/models/ID``, which OpenAI's clients ask for and vLLM does not have."""
    from starlette.responses import JSONResponse
    from vllm.entrypoints.serve import create_error_response

    models = await request.app.state.openai_serving_models.show_available_models()
    wanted = request.path_params["model"]
    if not wanted:
        return JSONResponse(models.model_dump())
    for card in models.data:
        if card.id == wanted:
            return JSONResponse(card.model_dump())
    problem = f"The model `{wanted}` does not exist."
    error = create_error_response(problem, "NotFoundError", HTTPStatus.NOT_FOUND, "model")
    return JSONResponse(error.model_dump(), status_code=HTTPStatus.NOT_FOUND)


def api_process(engine_client: Any) -> tuple[int, int]:
    """The rank of this API server process, -1 for one that is not told, and how many there are."""
    parallel = engine_client.vllm_config.parallel_config
    return parallel._api_process_rank, parallel._api_process_count


def is_lora(app_state: Any, name: str) -> bool:
    """Whether it is the name of a LoRA adapter that is loaded."""
    return name in app_state.openai_serving_models.lora_requests
