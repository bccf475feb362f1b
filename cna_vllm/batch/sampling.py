# SPDX-License-Identifier: Apache-2.0
"""From sampling fields as JSON has them to `vllm.SamplingParams`, checked before anything runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from cna_vllm.batch.plan import Request
from cna_vllm.serving.seams.offline import engine_of, make_final_only, refusals, verify
from cna_vllm.serving.seams.platform import on_cpu
from cna_vllm.steering.arms import Arm
from cna_vllm.steering.content import show
from cna_vllm.steering.request import FIELD_PREFIX
from cna_vllm.text.prompts import PromptError

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

# Set by the engine or by the runner, which writes finished answers only.
_RESERVED = frozenset(
    {"output_kind", "stream_interval", "skip_clone", "output_text_buffer_length", "n"}
)


def check_requests(requests: Sequence[Request], llm: LLM | None = None) -> None:
    """`check_fields` of every request, once for equal ones."""
    seen: set[str] = set()
    for request in requests:
        fields = {key: value for key, value in request.sampling.items() if key != "seed"}
        key = json.dumps(fields, sort_keys=True)
        if key not in seen:
            seen.add(key)
            check_fields(fields, f"{request.source}: sampling", llm)


def check_seeds(requests: Sequence[Request], llm: LLM) -> None:
    """Raises PromptError for seeds on a CPU engine that may prefill a prompt in parts.

    vLLM 0.32 then rewinds the request's generator, which PyTorch has on GPUs only, and the whole
    engine ends.
    """
    seeded = next((request for request in requests if "seed" in request.sampling), None)
    if seeded is not None and engine_of(llm).chunked_prefill and on_cpu():
        raise PromptError(
            f"{seeded.source}: sampling with a seed on a CPU needs an engine without chunked "
            "prefill: start it with enable_chunked_prefill=False (--no-enable-chunked-prefill)"
        )


def check_fields(fields: Mapping[str, Any], where: str, llm: LLM | None = None) -> None:
    """Builds parameters of these fields; with an engine, asks its limits too. Raises PromptError,
    `WHERE: field: reason`."""
    try:
        params = sampling_params(fields)
        if llm is not None:
            verify(llm, params)
    except ValueError as error:
        raise PromptError(f"{where}: {one_line(error)}") from error


def sampling_params(fields: Mapping[str, Any], arm: Arm | None = None) -> SamplingParams:
    """The parameters of one request, which yields nothing before it is finished; raises ValueError
    for an unknown field, a wrong type or a wrong value."""
    from pydantic import ValidationError

    adapter, known = _vllm_fields()
    for name in fields:
        if name not in known:
            raise ValueError(f"{show(name)} is not a field of SamplingParams that can be set here")
    extra_args = fields.get("extra_args") or {}
    if isinstance(extra_args, Mapping):
        for name in extra_args:
            if name.startswith(FIELD_PREFIX):
                raise ValueError(f"extra_args: {show(name)} belongs into an arm")
    try:
        # JSON mode: strict about types, but objects may stand for vLLM's own classes.
        with refusals():
            params: SamplingParams = adapter.validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        # Of a union's alternatives, the one that is about a field.
        named = [e for e in error.errors() if len(e["loc"]) > 1] or error.errors()
        field = named[0]["loc"][1] if len(named[0]["loc"]) > 1 else "fields"
        raise ValueError(f"{field}: {named[0]['msg']}") from error
    make_final_only(params)
    if arm is not None:
        params.extra_args = {**(params.extra_args or {}), **arm.extra_args()}
    return params


@cache
def _vllm_fields() -> tuple[Any, frozenset[str]]:
    from pydantic import TypeAdapter
    from vllm import SamplingParams

    names = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    return TypeAdapter(SamplingParams), frozenset(names - _RESERVED)


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split())
