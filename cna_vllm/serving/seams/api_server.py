# SPDX-License-Identifier: Apache-2.0
"""Seams of vLLM's OpenAI server: adapters as models, and fields that JSON would blur.

Steering is admitted where the server chooses the model, before a reply or a stream begins, so
that whatever is wrong is a 4xx; all choices and prompts of a request get the content that its
names stood for at that moment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from cna_vllm.circuit import show
from cna_vllm.request import FIELD_CIRCUIT, FIELD_PREFIX, SteeringError
from cna_vllm.serving import admission
from cna_vllm.serving.adapter import Adapter
from cna_vllm.serving.metrics import admit_counted
from cna_vllm.serving.seams.wrapping import wrap

_SERVED: ContextVar[tuple[str, Any] | None] = ContextVar("cna_served", default=None)
"""The adapter that this HTTP request names as its model, and its LoRA request if it has one;
every request has a context of its own."""

_REQUESTS_WITH_FIELDS = (
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
    ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    ("vllm.entrypoints.openai.responses.protocol", "ResponsesRequest"),
    ("vllm.entrypoints.anthropic.protocol", "AnthropicMessagesRequest"),
)


def install() -> None:
    """Called when a front end is built. An API server has imported its serving classes by then,
    and has not yet built its routes; elsewhere there is nothing to do."""
    if "vllm.entrypoints.launchers.api_server.app_state" not in sys.modules:
        return
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing

    wrap(OpenAIServingModels, "__init__", _models_init)
    wrap(OpenAIServingModels, "show_available_models", _show_available_models)
    wrap(OpenAIServingModels, "model_name", _model_name)
    wrap(OpenAIServingModels, "_check_load_lora_adapter_request", _check_load_lora)
    wrap(BaseServing, "_check_model", _check_model)
    wrap(BaseServing, "_maybe_get_adapters", _maybe_get_adapters)
    _refuse_booleans()


def validation_error(error: SteeringError) -> Exception:
    """vLLM's own error for bad requests, with the field as its parameter."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(str(error), parameter=error.field)


def _gate_of(models: Any) -> admission.Admission | None:
    return getattr(getattr(models, "input_processor", None), "cna_admission", None)


def _models_init(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if (gate := _gate_of(self)) is not None:
            loras = [module.name for module in self.static_lora_modules or ()]
            gate.registry.reserve([*(path.name for path in self.base_model_paths), *loras])

    return __init__


def _show_available_models(original: Callable[..., Any]) -> Callable[..., Any]:
    async def show_available_models(self: Any) -> Any:
        from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

        models = await original(self)
        if (gate := _gate_of(self)) is not None:
            base = self.base_model_paths[0].name
            models.data.extend(
                ModelCard(id=name, root=base, parent=base, permission=[ModelPermission()])
                for name in sorted(gate.registry.names().adapters)
            )
        return models

    return show_available_models


def _model_name(original: Callable[..., str]) -> Callable[..., str]:
    def model_name(self: Any, lora_request: Any = None) -> str:
        served = _SERVED.get()
        return original(self, lora_request) if served is None else served[0]

    return model_name


def _check_load_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    async def _check_load_lora_adapter_request(self: Any, request: Any) -> Any:
        from vllm.entrypoints.serve import create_error_response

        gate = _gate_of(self)
        names = gate.registry.names() if gate is not None else None
        if names and (request.lora_name in names.circuits or request.lora_name in names.adapters):
            return create_error_response(
                f"lora_name: {show(request.lora_name)} is the name of a circuit or of an adapter; "
                "choose another"
            )
        return await original(self, request)

    return _check_load_lora_adapter_request


def _check_model(original: Callable[..., Any]) -> Callable[..., Any]:
    async def _check_model(self: Any, request: Any) -> Any:
        _SERVED.set(None)
        try:
            if (wrong := _unwritable(request.model)) is not None:
                raise wrong
            gate = _gate_of(self.models)
            # Requests for the base model need no look at the registry.
            adapter = None
            if gate is not None and not self._is_model_supported(request.model):
                adapter = gate.registry.adapter(request.model)
            if adapter is None:
                if (error := await original(self, request)) is not None:
                    return error
                fields = getattr(request, "vllm_xargs", None) or {}
            else:
                fields = _fields_of(request, adapter, self.models)
            if admission.has_fields(fields):
                if getattr(request, "use_beam_search", False):
                    raise SteeringError(
                        FIELD_CIRCUIT, "beam search cannot be steered; drop use_beam_search"
                    )
                request.vllm_xargs = admit_counted(gate, fields)
            if adapter is not None:
                _SERVED.set((request.model, self.models.lora_requests.get(adapter.lora)))
            return None
        except SteeringError as error:
            return self.create_error_response(
                str(error), status_code=HTTPStatus.BAD_REQUEST, param=error.field
            )

    return _check_model


def _fields_of(request: Any, adapter: Adapter, models: Any) -> dict[str, Any]:
    """A request's fields with those of the adapter it names, or SteeringError."""
    from vllm.entrypoints.serve.tokenize.protocol import (
        DetokenizeRequest,
        TokenizeChatRequest,
        TokenizeCompletionRequest,
    )

    if isinstance(request, DetokenizeRequest | TokenizeChatRequest | TokenizeCompletionRequest):
        return {}  # an adapter has its base model's tokens
    if not hasattr(request, "vllm_xargs"):
        raise SteeringError(
            "model", f"{show(request.model)} is an adapter, and this endpoint cannot be steered"
        )
    own = request.vllm_xargs or {}
    if admission.has_fields(own):
        raise SteeringError(
            next(key for key in own if key.startswith(FIELD_PREFIX)),
            f"the model {show(request.model)} is an adapter, which sets the steering; drop the "
            "field or name the base model",
        )
    if adapter.lora is not None and adapter.lora not in models.lora_requests:
        raise SteeringError(
            "model", f"the adapter needs the LoRA adapter {show(adapter.lora)}, which is not loaded"
        )
    return {**own, **adapter.fields}


def _unwritable(model: Any) -> SteeringError | None:
    """A name that no reply could repeat, half a surrogate pair for instance, is a bad name."""
    if isinstance(model, str) and not model.isascii():
        try:
            model.encode("utf-8")
        except UnicodeEncodeError:
            return SteeringError("model", f"{show(model)} is not valid Unicode; name a model")
    return None


def _maybe_get_adapters(original: Callable[..., Any]) -> Callable[..., Any]:
    def _maybe_get_adapters(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        served = _SERVED.get()
        return original(self, request, *args, **kwargs) if served is None else served[1]

    return _maybe_get_adapters


def _refuse_booleans() -> None:
    """``true`` is not a multiplier, but vLLM's request models take it for the number 1."""
    from pydantic import BeforeValidator

    for module_name, class_name in _REQUESTS_WITH_FIELDS:
        request_class: Any = getattr(sys.modules.get(module_name), class_name, None)
        if request_class is None:
            continue
        field = request_class.model_fields["vllm_xargs"]
        if not any(getattr(m, "func", None) is _without_booleans for m in field.metadata):
            field.metadata.append(BeforeValidator(_without_booleans))
            request_class.model_rebuild(force=True)


def _without_booleans(value: Any) -> Any:
    if isinstance(value, dict):
        for key, entry in value.items():
            entries = entry if isinstance(entry, list) else [entry]
            if isinstance(key, str) and key.startswith(FIELD_PREFIX):
                for one in entries:
                    if isinstance(one, bool):
                        problem = f"must be a name or a number, not {str(one).lower()}"
                        raise validation_error(SteeringError(key, problem))
    return value
