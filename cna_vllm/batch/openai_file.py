# SPDX-License-Identifier: Apache-2.0
"""Requests of OpenAI batch files: what of a body this engine answers, and what it refuses.

A field is taken, or has no part in the answer, or is refused: none is dropped that could change
the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cna_vllm.steering.arms import Arm, steering_arm
from cna_vllm.steering.content import show
from cna_vllm.steering.request import FIELD_PREFIX, FLOAT32_MAX, CircuitRequest, SteeringError
from cna_vllm.text.prompts import PromptError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

_ENVELOPE = ("custom_id", "method", "url", "body")
_WITHOUT_EFFECT = ("metadata", "service_tier", "store", "stream", "user")
# OpenAI's fields and those that vLLM's server adds, where they are named like SamplingParams'.
_SAMPLING = (
    "allowed_token_ids",
    "bad_words",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "max_tokens",
    "min_p",
    "min_tokens",
    "n",
    "presence_penalty",
    "prompt_logprobs",
    "repetition_penalty",
    "seed",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop",
    "stop_token_ids",
    "structured_outputs",
    "temperature",
    "top_k",
    "top_p",
)


def read_request(row: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `BatchPrompt` that stand for one request of an OpenAI batch file.

    What a body leaves out is the run's, not OpenAI's default. `vllm_xargs` with steering fields
    become the row's own arm.

    Raises:
        PromptError: another form, or a field that this engine cannot honour.
    """
    for key in row:
        if key not in _ENVELOPE:
            raise PromptError(f"unknown key {show(key)}; known are {', '.join(_ENVELOPE)}")
    body, url = row.get("body"), row.get("url")
    if row.get("method", "POST") != "POST":
        raise PromptError(f"'method' must be POST, not {show(row['method'])}")
    if url not in (CHAT, COMPLETIONS):
        raise PromptError(f"'url' must be {CHAT} or {COMPLETIONS}, not {show(url)}")
    if not isinstance(body, Mapping):
        raise PromptError("'body' must be an object")
    given = {key: value for key, value in body.items() if value is not None}
    if given.pop("stream", False) is not False:
        raise PromptError("'stream': answers go to a file; remove it")
    fields = _prompt(given, chat=url == CHAT)
    fields |= {"id": row["custom_id"], "model": given.pop("model", None)}
    extra_args, fields["arm"] = _steering(given.pop("vllm_xargs", {}))
    sampling = _logprobs(given, chat=url == CHAT)
    if extra_args:
        sampling["extra_args"] = extra_args
    longest = given.pop("max_completion_tokens", given.get("max_tokens"))
    for key in given:
        if key not in (*_SAMPLING, *_WITHOUT_EFFECT):
            raise PromptError(f"'body': {show(key)} is not supported here; remove it")
    sampling |= {key: given[key] for key in _SAMPLING if key in given}
    if longest is not None:
        sampling["max_tokens"] = longest
    return fields | {"sampling": sampling}


def _prompt(body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    """Takes the prompt out of the body; that of /v1/completions is no chat turn."""
    if chat:
        return {"messages": body.pop("messages", None) or []}
    return {"text": body.pop("prompt", None) or "", "raw": True}


def _logprobs(body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    """Takes log probabilities out of the body: a count, or for chats a switch and a count."""
    if not chat:
        return {"logprobs": body.pop("logprobs")} if "logprobs" in body else {}
    wanted, count = body.pop("logprobs", False), body.pop("top_logprobs", 0)
    return {"logprobs": count} if wanted else {}


def _steering(xargs: Any) -> tuple[dict[str, Any], Arm | None]:
    if not isinstance(xargs, Mapping):
        raise PromptError("'vllm_xargs' must be an object")
    others = {k: v for k, v in xargs.items() if not k.startswith(FIELD_PREFIX)}
    try:
        request = CircuitRequest.from_extra_args(
            xargs, max_multiplier=FLOAT32_MAX, max_circuits=2**31
        )
    except SteeringError as error:
        raise PromptError(str(error)) from error
    if request is None:
        return others, None
    return others, steering_arm(request.circuits, request.scope)
