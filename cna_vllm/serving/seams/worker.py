# SPDX-License-Identifier: Apache-2.0
"""Seams of a worker: the loaded model, and its batch at every step, on both model runners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cna_vllm.serving.config import CnaConfig
from cna_vllm.serving.seams import experts
from cna_vllm.serving.seams.attach import attach
from cna_vllm.serving.seams.gate import steering_of
from cna_vllm.serving.seams.kv_blocks import zero_blocks
from cna_vllm.serving.seams.model import refuse_unsupported
from cna_vllm.serving.seams.scheduler import REPORT_ATTRIBUTE, SCRUB_ATTRIBUTE
from cna_vllm.serving.seams.wrapping import Original, Wrap, adding, wrap
from cna_vllm.serving.worker.rpc import RPC_METHODS, cna_status
from cna_vllm.serving.worker.runtime import SteeringRuntime
from cna_vllm.steering.request import FIELD_RECORD

RUNTIME_ATTRIBUTE = "cna_runtime"


def install(wrap: Wrap = wrap) -> None:
    """Workers that are built from now on steer, if they are configured to."""
    from vllm.v1.worker.worker_base import WorkerBase

    wrap(WorkerBase, "__init__", _worker_init)


@adding
def _worker_init(
    original: Original, self: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    original(self, vllm_config, *args, **kwargs)
    if CnaConfig.from_additional_config(vllm_config.additional_config) is None:
        return
    refuse_unsupported(vllm_config)
    experts.install()
    for name, method in RPC_METHODS.items():
        setattr(type(self), name, _answering(method))
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu import model_states

        wrap(model_states, "resolve_model_state_cls", _v2_state_cls)
        _install_steps(_v2_runner())
    else:
        _install_v1()


def _install_v1() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    # The CPU runner overrides load_model and inherits the rest.
    wrap(CPUModelRunner, "load_model", _v1_load_model)
    wrap(GPUModelRunner, "load_model", _v1_load_model)
    wrap(GPUModelRunner, "_update_states", _v1_update_states)
    wrap(GPUModelRunner, "_prepare_inputs", _v1_prepare_inputs)
    _install_steps(GPUModelRunner)


def _v2_runner() -> type:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    runner: type = GPUModelRunner
    return runner


def _install_steps(runner: type) -> None:
    """What both runners have: a step begins, and its tokens are sampled."""
    wrap(runner, "execute_model", _execute_model)
    wrap(runner, "sample_tokens", _sample_tokens)


@adding
def _execute_model(
    original: Original, self: Any, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    if (blocks := getattr(scheduler_output, SCRUB_ATTRIBUTE, None)) is not None:
        zero_blocks(self, blocks)
    return original(self, scheduler_output, *args, **kwargs)


@adding
def _sample_tokens(original: Original, self: Any, *args: Any, **kwargs: Any) -> Any:
    state, report = self.execute_model_state, None
    runtime = _held_runtime(self)
    if runtime is not None and state is not None:
        hidden = state.hidden_states
        report = runtime.finish_step(hidden) if isinstance(hidden, torch.Tensor) else None
    output = original(self, *args, **kwargs)
    if report is not None:
        # An asynchronous output holds the one that goes to the core, by either name.
        held = getattr(output, "model_runner_output", output)
        held = getattr(held, "_model_runner_output", held)
        setattr(held, REPORT_ATTRIBUTE, report)
    return output


@adding
def _v1_load_model(original: Original, self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    self.cna_runtime = None
    if CnaConfig.from_additional_config(self.vllm_config.additional_config) is None:
        return  # a plain engine after a steered one in the same process
    self.cna_runtime = attach(self.vllm_config, self.get_model(), self.device)
    if hasattr(self, "model_memory_usage"):  # only measured on accelerators
        self.model_memory_usage += self.cna_runtime.nbytes


@adding
def _v1_update_states(original: Original, self: Any, scheduler_output: Any) -> Any:
    result = original(self, scheduler_output)
    runtime: SteeringRuntime | None = self.cna_runtime
    if runtime is None:
        return result
    for req_id in scheduler_output.finished_req_ids:
        runtime.remove_request(req_id)
    for req_id in scheduler_output.preempted_req_ids or ():
        runtime.suspend_request(req_id)
    for new in scheduler_output.scheduled_new_reqs:
        _add_request(runtime, new, self.requests[new.req_id].num_prompt_tokens)
    return result


@adding
def _v1_prepare_inputs(
    original: Original, self: Any, scheduler_output: Any, num_scheduled_tokens: Any
) -> Any:
    result = original(self, scheduler_output, num_scheduled_tokens)
    if self.cna_runtime is None:
        return result
    batch = self.input_batch
    self.cna_runtime.prepare_step(
        batch.req_ids, num_scheduled_tokens, batch.num_computed_tokens_cpu
    )
    return result


@adding
def _v2_state_cls(original: Original, vllm_config: Any, model: nn.Module) -> type:
    base: Any = original(vllm_config, model)
    if CnaConfig.from_additional_config(vllm_config.additional_config) is None:
        state: type = base
        return state

    class SteeredModelState(base):
        """The model's own state, with the steering runtime beside it."""

        def __init__(self, vllm_config: Any, model: nn.Module, *args: Any) -> None:
            super().__init__(vllm_config, model, *args)
            self.cna_runtime = attach(vllm_config, model, self.device)

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            _add_request(self.cna_runtime, new_req_data, new_req_data.prompt_len)

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


def _add_request(runtime: SteeringRuntime, new: Any, prompt_len: int) -> None:
    extra_args = getattr(new.sampling_params, "extra_args", None) or {}
    runtime.add_request(new.req_id, steering_of(new), prompt_len, extra_args.get(FIELD_RECORD))


def runtime_of(worker: Any) -> SteeringRuntime:
    """The runtime of a worker that steers, whichever model runner it has."""
    runtime = _held_runtime(worker.model_runner)
    assert runtime is not None, "a plain engine answers no call of ours"
    return runtime


def _held_runtime(runner: Any) -> SteeringRuntime | None:
    holder = getattr(runner, "model_state", runner)
    runtime: SteeringRuntime | None = getattr(holder, RUNTIME_ATTRIBUTE, None)
    return runtime


def _answering(method: Callable[..., Any]) -> Callable[..., Any]:
    """A worker's method for a call of all workers."""

    def answer(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(runtime_of(self), *args, **kwargs)
        if method is cna_status:
            result["runner"] = "V2" if self.vllm_config.use_v2_model_runner else "V1"
        return result

    return answer
