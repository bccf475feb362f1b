# SPDX-License-Identifier: Apache-2.0
"""Seams of the front end: every request passes admission before the engine sees it."""

from __future__ import annotations

import copy
from typing import Any

from cna_vllm.serving.config import CnaConfig, CnaConfigError
from cna_vllm.serving.front import admission
from cna_vllm.serving.front.metrics import admit_counted
from cna_vllm.serving.front.registry import Registry
from cna_vllm.serving.seams import api_server
from cna_vllm.serving.seams.engines import refuse_partial_control
from cna_vllm.serving.seams.model import refuse_unsupported, served_model
from cna_vllm.serving.seams.offline import gate_of_llm
from cna_vllm.serving.seams.wrapping import Original, Wrap, adding, wrap
from cna_vllm.steering.request import FIELD_CIRCUIT, FIELD_RECORD, RESOLVED_FIELD, SteeringError


def install(wrap: Wrap = wrap) -> None:
    """Input processors that are built from now on have an admission gate, if configured."""
    from vllm.v1.engine.input_processor import InputProcessor

    wrap(InputProcessor, "__init__", _front_end_init)
    wrap(InputProcessor, "process_inputs", _process_inputs)
    wrap(InputProcessor, "assign_request_id", _assign_request_id)


@adding
def _front_end_init(
    original: Original, self: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    original(self, vllm_config, *args, **kwargs)
    config = CnaConfig.from_additional_config(vllm_config.additional_config)
    self.cna_admission = None
    if config is None:
        return
    refuse_unsupported(vllm_config)
    refuse_partial_control(config, vllm_config.parallel_config)
    registry = Registry.from_config(config, served_model(vllm_config.model_config))
    self.cna_admission = admission.Admission(config, registry)
    try:
        api_server.install()
    except (AttributeError, ImportError) as error:
        problem = f"cna: this vLLM cannot be steered: api_server: {error}"
        raise CnaConfigError(problem) from error


@adding
def _process_inputs(
    original: Original,
    self: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    extra_args = getattr(params, "extra_args", None)
    if extra_args and admission.asks_for_steering(extra_args):
        gate: admission.Admission | None = self.cna_admission
        resumable = bool(kwargs.get("resumable", False))
        try:
            admitted = admit_counted(gate, extra_args, resumable=resumable)
        except SteeringError as error:
            raise api_server.validation_error(error) from error
        # The caller's params may be shared between prompts: never change them.
        params = copy.copy(params)
        params.extra_args = admitted
    return original(self, request_id, prompt, params, *args, **kwargs)


@adding
def _assign_request_id(original: Original, request: Any) -> None:
    """A ready-made EngineCoreRequest skips ``process_inputs``; it must not skip admission. Whether
    a seal is true, the core tells."""
    extra_args = getattr(request.sampling_params, "extra_args", None) or {}
    others = {k: v for k, v in extra_args.items() if k not in (RESOLVED_FIELD, FIELD_RECORD)}
    resolved = extra_args.get(RESOLVED_FIELD)
    if admission.has_fields(others) or not (resolved is None or admission.is_sealed(resolved)):
        raise api_server.validation_error(
            SteeringError(
                FIELD_CIRCUIT,
                "an EngineCoreRequest cannot carry steering fields; pass the prompt and "
                "SamplingParams instead",
            )
        )
    original(request)


def admission_of(llm: Any) -> admission.Admission:
    """The admission gate of an offline ``LLM``. Raises CnaConfigError if it has none."""
    gate = gate_of_llm(llm)
    if gate is None:
        raise CnaConfigError(
            "this LLM was started without a cna key; pass additional_config={'cna': {}}"
        )
    return gate
