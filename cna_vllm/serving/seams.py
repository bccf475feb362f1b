# SPDX-License-Identifier: Apache-2.0
"""Every reach into vLLM's internals, in one place. Supported: vLLM 0.32 and 0.33.

Each seam is a wrapper that calls the original and adds one thing; without a ``cna`` key in
``additional_config`` the wrappers of the worker are not even installed, and those of the front
end only refuse requests that ask for steering. ``tests/integration/test_seams.py`` holds the
contract of each seam for the installed version.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from cna_vllm.request import (
    FIELD_CIRCUIT,
    FIELD_RECORD,
    RESOLVED_FIELD,
    Steering,
    SteeringError,
)
from cna_vllm.serving import admission
from cna_vllm.serving.attach import attach
from cna_vllm.serving.cache_keys import steering_block_key
from cna_vllm.serving.config import CONFIG_KEY, CnaConfig, CnaConfigError
from cna_vllm.serving.registry import CircuitRegistry
from cna_vllm.serving.runtime import SteeringRuntime
from cna_vllm.serving.vllm_model import refuse_unsupported, served_model
from cna_vllm.serving.worker_rpc import RPC_METHODS

RUNTIME_ATTRIBUTE = "cna_runtime"
ADMISSION_ATTRIBUTE = "cna_admission"


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces ``owner.name`` by ``make(original)``, once per process.

    Raises AttributeError when vLLM no longer has the name: a seam must not vanish silently.
    """
    original = getattr(owner, name)
    if getattr(original, "__cna_seam__", False):
        return
    wrapper: Any = functools.wraps(original)(make(original))
    wrapper.__cna_seam__ = True
    if isinstance(inspect.getattr_static(owner, name), staticmethod):
        wrapper = staticmethod(wrapper)
    setattr(owner, name, wrapper)


def install() -> None:
    """Installs the seams of this process. Cheap: the worker's wait until a worker is built."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerBase

    wrap(InputProcessor, "__init__", _front_end_init)
    wrap(InputProcessor, "process_inputs", _process_inputs)
    wrap(InputProcessor, "assign_request_id", _assign_request_id)
    wrap(kv_cache_utils, "_gen_prompt_embeds_extra_hash_keys", _block_keys)
    wrap(EngineCore, "collective_rpc", _core_rpc)
    wrap(WorkerBase, "__init__", _worker_init)


# --- front end ---------------------------------------------------------------------------------


def _front_end_init(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        config = CnaConfig.from_additional_config(vllm_config.additional_config)
        self.cna_admission = None
        if config is None:
            return
        refuse_unsupported(vllm_config)
        registry = CircuitRegistry.from_config(config, served_model(vllm_config.model_config))
        self.cna_admission = admission.Admission(config, registry)
        # Workers read the same files a little later: they refuse any other content.
        section = dict(vllm_config.additional_config[CONFIG_KEY])
        section["digests"] = {name: c.digest for name, c in registry.circuits().items()}
        vllm_config.additional_config[CONFIG_KEY] = section
        _guard_beam_search()

    return __init__


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        extra_args = getattr(params, "extra_args", None)
        if extra_args and admission.has_fields(extra_args):
            gate: admission.Admission | None = self.cna_admission
            resumable = bool(kwargs.get("resumable", False))
            try:
                if gate is None:
                    admission.refuse_without_config(extra_args)
                    raise AssertionError("unreachable: refused above")
                admitted = gate.admit(extra_args, resumable=resumable)
            except SteeringError as error:
                raise _validation_error(error) from error
            # The caller's params may be shared between prompts: never change them.
            params = copy.copy(params)
            params.extra_args = admitted
        return original(self, request_id, prompt, params, *args, **kwargs)

    return process_inputs


def _assign_request_id(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """A ready-made EngineCoreRequest skips ``process_inputs``; it must not skip admission."""

    def assign_request_id(request: Any) -> None:
        extra_args = getattr(request.sampling_params, "extra_args", None) or {}
        admitted = (RESOLVED_FIELD, FIELD_RECORD)
        if admission.has_fields({k: v for k, v in extra_args.items() if k not in admitted}):
            raise _validation_error(
                SteeringError(
                    FIELD_CIRCUIT,
                    "an EngineCoreRequest cannot carry steering fields; pass the prompt and "
                    "SamplingParams instead",
                )
            )
        original(request)

    return assign_request_id


def _guard_beam_search() -> None:
    """Beam search drops extra arguments; asked to steer, it must refuse, not ignore.

    The protocol classes exist only in an API server, and are imported before its engine client.
    """
    for name, request_class in (
        ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
        ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    ):
        module = sys.modules.get(name)
        if module is not None:
            wrap(getattr(module, request_class), "to_beam_search_params", _beam_search_params)


def _beam_search_params(original: Callable[..., Any]) -> Callable[..., Any]:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if admission.has_fields(self.vllm_xargs):
            raise _validation_error(
                SteeringError(FIELD_CIRCUIT, "beam search cannot be steered; drop use_beam_search")
            )
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _validation_error(error: SteeringError) -> Exception:
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(str(error), parameter=error.field)


def admission_of(llm: Any) -> admission.Admission:
    """The admission gate of an offline ``LLM``. Raises CnaConfigError if it has none."""
    gate = getattr(llm.llm_engine.input_processor, ADMISSION_ATTRIBUTE, None)
    if gate is None:
        raise CnaConfigError(
            "this LLM was started without a cna key; pass additional_config={'cna': {}}"
        )
    return gate


# --- scheduler ---------------------------------------------------------------------------------


def _block_keys(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def _gen_prompt_embeds_extra_hash_keys(
        request: Any, start_token_idx: int, end_token_idx: int
    ) -> list[Any]:
        keys = original(request, start_token_idx, end_token_idx)
        params = request.sampling_params
        if params is None or not params.extra_args:
            return keys
        key = steering_block_key(params.extra_args, request.num_prompt_tokens, end_token_idx)
        return keys if key is None else [*keys, key]

    return _gen_prompt_embeds_extra_hash_keys


def _core_rpc(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Tells workers that make room for a circuit which ones unfinished requests still need.

    Only the core knows them all: running, preempted and waiting.
    """

    def collective_rpc(
        self: Any,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        if method == "cna_load":
            kwargs = {**(kwargs or {}), "wanted": _wanted_digests(self.scheduler.requests)}
        return original(self, method, timeout, args, kwargs)

    return collective_rpc


def _wanted_digests(requests: Mapping[str, Any]) -> list[str]:
    digests: set[str] = set()
    for request in requests.values():
        extra_args = getattr(request.sampling_params, "extra_args", None) or {}
        if (resolved := extra_args.get(RESOLVED_FIELD)) is not None:
            digests.update(digest for digest, _ in Steering.from_field(resolved).pairs)
    return sorted(digests)


# --- worker ------------------------------------------------------------------------------------


def _worker_init(original: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if CnaConfig.from_additional_config(vllm_config.additional_config) is None:
            return
        refuse_unsupported(vllm_config)
        for name, method in RPC_METHODS.items():
            setattr(type(self), name, method)
        if vllm_config.use_v2_model_runner:
            from vllm.v1.worker.gpu import model_states

            wrap(model_states, "resolve_model_state_cls", _v2_state_cls)
        else:
            _install_v1()

    return __init__


def _install_v1() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    # The CPU runner overrides load_model and inherits the rest.
    wrap(CPUModelRunner, "load_model", _v1_load_model)
    wrap(GPUModelRunner, "load_model", _v1_load_model)
    wrap(GPUModelRunner, "_update_states", _v1_update_states)
    wrap(GPUModelRunner, "_prepare_inputs", _v1_prepare_inputs)


def _v1_load_model(original: Callable[..., None]) -> Callable[..., None]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.cna_runtime = attach(self.vllm_config, self.get_model(), self.device)
        if hasattr(self, "model_memory_usage"):  # only measured on accelerators
            self.model_memory_usage += self.cna_runtime.nbytes

    return load_model


def _v1_update_states(original: Callable[..., Any]) -> Callable[..., Any]:
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        result = original(self, scheduler_output)
        runtime: SteeringRuntime = self.cna_runtime
        for req_id in scheduler_output.finished_req_ids:
            runtime.remove_request(req_id)
        for req_id in scheduler_output.preempted_req_ids or ():
            runtime.suspend_request(req_id)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            runtime.add_request(
                new.req_id,
                None if params is None else params.extra_args,
                self.requests[new.req_id].num_prompt_tokens,
            )
        return result

    return _update_states


def _v1_prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        result = original(self, scheduler_output, num_scheduled_tokens)
        batch = self.input_batch
        self.cna_runtime.prepare_step(
            batch.req_ids, num_scheduled_tokens, batch.num_computed_tokens_cpu
        )
        return result

    return _prepare_inputs


def _v2_state_cls(original: Callable[..., type]) -> Callable[..., type]:
    def resolve_model_state_cls(vllm_config: Any, model: nn.Module) -> type:
        base: Any = original(vllm_config, model)
        if CnaConfig.from_additional_config(vllm_config.additional_config) is None:
            return base

        class SteeredModelState(base):
            """The model's own state, with the steering runtime beside it."""

            def __init__(self, vllm_config: Any, model: nn.Module, *args: Any) -> None:
                super().__init__(vllm_config, model, *args)
                self.cna_runtime = attach(vllm_config, model, self.device)

            def add_request(self, req_index: int, new_req_data: Any) -> None:
                super().add_request(req_index, new_req_data)
                params = new_req_data.sampling_params
                self.cna_runtime.add_request(
                    new_req_data.req_id,
                    None if params is None else params.extra_args,
                    new_req_data.prompt_len,
                )

            def remove_request(self, req_id: str) -> None:
                super().remove_request(req_id)
                self.cna_runtime.remove_request(req_id)

            def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
                self.cna_runtime.prepare_step(
                    input_batch.req_ids,
                    input_batch.num_scheduled_tokens,
                    input_batch.num_computed_tokens_np,
                )
                return super().prepare_inputs(input_batch, req_states)

        return SteeredModelState

    return resolve_model_state_cls


def runtime_of(worker: Any) -> SteeringRuntime:
    """The runtime of a worker, whichever model runner it has."""
    runner = worker.model_runner
    holder = getattr(runner, "model_state", runner)
    return getattr(holder, RUNTIME_ATTRIBUTE)
