# SPDX-License-Identifier: Apache-2.0
"""Seams of vLLM's OpenAI server: adapters as models, and fields in every kind of request.

Steering is admitted where the server chooses the model, before a reply or a stream begins, so
that whatever is wrong is a 4xx; all choices and prompts of a request get the content that its
names stood for at that moment.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from cna_vllm.serving.front import admission
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.serving.front.metrics import admit_counted
from cna_vllm.serving.front.registry import a_kind
from cna_vllm.serving.seams import batch_runner, http_app
from cna_vllm.serving.seams.gate import gate_of
from cna_vllm.serving.seams.wrapping import Original, adding, wrap
from cna_vllm.steering.content import show
from cna_vllm.steering.request import FIELD_CIRCUIT, FIELD_PREFIX, RESOLVED_FIELD, SteeringError

_SERVED: ContextVar[tuple[str, Any] | None] = ContextVar("cna_served", default=None)
"""The adapter that this HTTP request names as its model, and its LoRA request if it has one;
every request has a context of its own."""

_MOST_LISTED = 20


def install() -> None:
    """Called when a front end is built: before an API server builds its application. Elsewhere
    that is of no use, and costs a tenth of a second of imports."""
    from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing

    http_app.install()
    batch_runner.install()
    wrap(OpenAIServingModels, "__init__", _models_init)
    wrap(OpenAIServingModels, "show_available_models", _show_available_models)
    wrap(OpenAIServingModels, "model_name", _model_name)
    wrap(OpenAIServingModels, "_check_load_lora_adapter_request", _check_load_lora)
    wrap(BaseServing, "_check_model", _check_model)
    wrap(BaseServing, "_is_model_supported", _is_model_supported)
    wrap(BaseServing, "_maybe_get_adapters", _maybe_get_adapters)
    wrap(BatchChatCompletionRequest, "to_chat_completion_request", _to_chat_completion_request)


def validation_error(error: SteeringError) -> Exception:
    """vLLM's own error for bad requests, with the field as its parameter."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(str(error), parameter=error.field)


@adding
def _models_init(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    if (gate := gate_of(self)) is not None:
        loras = [module.name for module in self.static_lora_modules or ()]
        gate.registry.reserve([*(path.name for path in self.base_model_paths), *loras])


@adding
async def _show_available_models(original: Original, self: Any) -> Any:
    from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

    models = await original(self)
    if (gate := gate_of(self)) is not None:
        base = self.base_model_paths[0].name
        models.data.extend(
            ModelCard(id=name, root=base, parent=base, permission=[ModelPermission()])
            for name in sorted(gate.registry.names().adapters)
        )
    return models


@adding
def _model_name(original: Original, self: Any, lora_request: Any = None) -> str:
    served = _SERVED.get()
    return original(self, lora_request) if served is None else served[0]


@adding
async def _check_load_lora(original: Original, self: Any, request: Any) -> Any:
    from vllm.entrypoints.serve import create_error_response

    gate = gate_of(self)
    names = gate.registry.names() if gate is not None else None
    if names and (kind := names.kind(request.lora_name)) is not None:
        return create_error_response(
            f"lora_name: {show(request.lora_name)} is the name of {a_kind(kind)} of "
            "cna_vllm; choose another"
        )
    return await original(self, request)


@adding
async def _check_model(original: Original, self: Any, request: Any) -> Any:
    _SERVED.set(None)
    try:
        if (wrong := _unwritable(request.model)) is not None:
            raise wrong
        gate = gate_of(self.models)
        # Requests for the base model need no look at the registry.
        adapter = None
        if gate is not None and not self._is_model_supported(request.model):
            adapter = gate.registry.adapter(request.model)
        if adapter is None and (error := await original(self, request)) is not None:
            if gate is not None and error.error.code == HTTPStatus.NOT_FOUND:
                error.error.message += _known_models(request.model, self.models, gate)
            return error
        _admit(self, request, adapter, gate)
        if adapter is not None:
            _SERVED.set((request.model, self.models.lora_requests.get(adapter.lora)))
        return None
    except SteeringError as error:
        return self.create_error_response(
            str(error), status_code=HTTPStatus.BAD_REQUEST, param=error.field
        )


def _admit(
    serving: Any, request: Any, adapter: Adapter | None, gate: admission.Admission | None
) -> None:
    """Leaves what admission made of a request's fields, or of its adapter's, in their place.

    Raises SteeringError for what cannot be steered as asked.
    """
    from vllm.entrypoints.scale_out.derender.serving import ServingDerender
    from vllm.entrypoints.scale_out.render.serving import ServingRender
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
    from vllm.entrypoints.serve.tokenize.serving import ServingTokenization

    if isinstance(serving, ServingTokenization | ServingDerender):
        return  # an adapter has its base model's tokens
    own = _fields(request)
    fields = own or {}
    if adapter is not None:
        if own is None:
            raise SteeringError(
                "model", f"{show(request.model)} is an adapter, and this endpoint cannot be steered"
            )
        fields = _fields_of(request.model, own, adapter, serving.models)
    if not admission.asks_for_steering(fields):
        return
    if getattr(request, "use_beam_search", False):
        raise SteeringError(FIELD_CIRCUIT, "beam search cannot be steered; drop use_beam_search")
    if isinstance(serving, ServingRender):
        # Its reply is a request for another server: that one resolves names, to its own content.
        admission.admit_or_refuse(gate, fields)
        return
    admitted = admit_counted(gate, fields)
    if isinstance(request, GenerateRequest):
        request.sampling_params.extra_args = admitted
    else:
        request.vllm_xargs = admitted


def _fields(request: Any) -> Mapping[str, Any] | None:
    """The object of a request that takes steering fields; None where nothing would read them."""
    from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

    if isinstance(request, GenerateRequest):
        return request.sampling_params.extra_args or {}
    batch = isinstance(request, BatchChatCompletionRequest)
    if not batch and "vllm_xargs" not in type(request).model_fields:
        return None
    fields = getattr(request, "vllm_xargs", None) or {}
    if not isinstance(fields, Mapping):  # the batch's model does not look
        raise SteeringError("vllm_xargs", f"must be an object, not {show(fields)}")
    return fields


def _fields_of(model: str, own: Mapping[str, Any], adapter: Adapter, models: Any) -> dict[str, Any]:
    """A request's fields with those of the adapter it names, or SteeringError."""
    if admission.asks_for_steering(own):
        raise SteeringError(
            next((key for key in own if key.startswith(FIELD_PREFIX)), FIELD_CIRCUIT),
            f"the model {show(model)} is an adapter, which sets the steering; drop the "
            "field or name the base model",
        )
    if adapter.lora is not None and adapter.lora not in models.lora_requests:
        raise SteeringError(
            "model", f"the adapter needs the LoRA adapter {show(adapter.lora)}, which is not loaded"
        )
    return {**own, **adapter.fields}


def _known_models(model: str, models: Any, gate: admission.Admission) -> str:
    """What to name instead of a model that does not exist."""
    names = gate.registry.names()
    if model in names.circuits:
        return (
            f" {show(model)} is a circuit: name a model that is served, and add "
            f'{{"vllm_xargs": {{"{FIELD_CIRCUIT}": {json.dumps(model)}, "cna_multiplier": 0}}}}, '
            "or name an adapter."
        )
    adapters = sorted(names.adapters)
    served = [*(path.name for path in models.base_model_paths), *models.lora_requests, *adapters]
    close = difflib.get_close_matches(model, served, n=1)
    listed = ", ".join(adapters[:_MOST_LISTED]) + (", ..." if adapters[_MOST_LISTED:] else "")
    return (f" Adapters: {listed}." if adapters else "") + (
        f" Did you mean {close[0]}?" if close else ""
    )


@adding
def _is_model_supported(original: Original, self: Any, model_name: str | None) -> bool:
    """With ``VLLM_SKIP_MODEL_NAME_VALIDATION`` every name is that of the base model, but for those
    that stand for something else."""
    if not original(self, model_name):
        return False
    gate = gate_of(self.models)
    if gate is None or not model_name or self.models.is_base_model(model_name):
        return True
    return gate.registry.names().kind(model_name) is None


@adding
def _to_chat_completion_request(original: Original, self: Any, messages: Any) -> Any:
    """Each conversation of a batch gets what was admitted for all, which no JSON could say."""
    xargs = dict(getattr(self, "vllm_xargs", None) or {})
    steering = xargs.pop(RESOLVED_FIELD, None)
    if steering is None:
        return original(self, messages)
    single = original(self.model_copy(update={"vllm_xargs": xargs or None}), messages)
    single.vllm_xargs = {**(single.vllm_xargs or {}), RESOLVED_FIELD: steering}
    return single


def _unwritable(model: Any) -> SteeringError | None:
    """A name that no reply could repeat, half a surrogate pair for instance, is a bad name."""
    if isinstance(model, str) and not model.isascii():
        try:
            model.encode("utf-8")
        except UnicodeEncodeError:
            return SteeringError("model", f"{show(model)} is not valid Unicode; name a model")
    return None


@adding
def _maybe_get_adapters(
    original: Original, self: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    served = _SERVED.get()
    return original(self, request, *args, **kwargs) if served is None else served[1]
