# SPDX-License-Identifier: Apache-2.0
"""Prompts to the engine's recorder, and the shares of all ranks back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cna_vllm.serving.seams.offline import engine_of, gate_of_llm
from cna_vllm.steering.request import FIELD_RECORD
from cna_vllm.text.prompts import Prompt, PromptError, PromptLike, prompts_of
from cna_vllm.text.rendering import chat_template_used, render

if TYPE_CHECKING:
    from vllm import LLM

TokenIds = list[int]


class DiscoveryError(ValueError):
    """The prompts or options cannot give a circuit; one line with the reason and the fix."""


@dataclass(frozen=True)
class Dimensions:
    """Decoder layers of the model, and the width of the ``down_proj`` input of each."""

    num_layers: int
    intermediate_size: int

    @classmethod
    def of(cls, llm: LLM) -> Dimensions:
        """Of the model that an engine serves. Raises DiscoveryError when it does not record."""
        gate = gate_of_llm(llm)
        if gate is None or not gate.config.record:
            raise DiscoveryError(
                "this engine does not record; start it with "
                "additional_config={'cna': {'record': True}}"
            )
        served = gate.registry.served
        return cls(served.num_layers, served.intermediate_size)


def as_prompts(prompts: Sequence[PromptLike], what: str = "") -> list[Prompt]:
    """Strings, chat messages, token ids or `Prompt`s, as `Prompt`s. what: name of the set.

    Raises DiscoveryError, naming the first that is none of these by its number (from 1).
    """
    try:
        return prompts_of(prompts, what)
    except PromptError as error:
        raise DiscoveryError(str(error)) from error


def encode(
    llm: LLM,
    prompts: Sequence[PromptLike],
    *,
    what: str = "",
    raw: bool = False,
    system: str | None = None,
) -> list[TokenIds]:
    """Token ids of every prompt: through the chat template, or, with ``raw``, as it is. A prompt
    that is token ids already stays as it is.

    system: a system message put before every prompt. what: name of the set, for messages.
    Raises DiscoveryError, naming the prompt by its number in the set (from 1), when one does not
    fit into the context or cannot take the system message.
    """
    if raw and system is not None:
        raise DiscoveryError("a system prompt needs the chat template; drop it, or raw")
    tokenizer = llm.get_tokenizer()
    # The engine generates one token, whose position must fit too.
    longest = engine_of(llm).max_model_len - 1
    encoded = []
    for number, prompt in enumerate(as_prompts(prompts, what), start=1):
        name = f"{what} prompt {number}".lstrip()
        try:
            ids = render(tokenizer, _with_system(prompt, system), raw=raw)
        except ValueError as error:
            raise DiscoveryError(f"{name}: {error}") from error
        if not 0 < len(ids) <= longest:
            raise DiscoveryError(
                f"{name} is {len(ids)} tokens long, the context has room for 1 to {longest}; "
                "shorten it, or start the engine with a larger max_model_len"
            )
        encoded.append(ids)
    return encoded


def templated(llm: LLM, prompts: Sequence[Prompt], *, raw: bool, system: str | None) -> bool | str:
    """Whether ``encode`` puts prompts through the chat template: see ``chat_template_used``."""
    return chat_template_used(
        llm.get_tokenizer(), [_with_system(prompt, system) for prompt in prompts], raw=raw
    )


def _with_system(prompt: Prompt, system: str | None) -> Prompt:
    if system is None:
        return prompt
    if prompt.token_ids is not None:
        raise DiscoveryError("token ids take no system message; give text, or drop the option")
    messages = prompt.messages or [{"role": "user", "content": prompt.text}]
    if messages[0]["role"] == "system":
        raise DiscoveryError("has a system message of its own; drop it, or the system option")
    return Prompt(messages=[{"role": "system", "content": system}, *messages])


def prefill(
    llm: LLM,
    requests: Sequence[tuple[TokenIds, str]],
    plan: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Prefills (token ids, group) requests and returns what each rank's recorder kept.

    plan: arguments of ``Recorder.start``. Other requests of the same engine are not touched; only
    one recording runs at a time. Raises DiscoveryError when the engine does not record.
    """
    from vllm import SamplingParams, TokensPrompt

    params = {
        # One token is the least that the engine generates.
        group: SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, extra_args={FIELD_RECORD: group}
        )
        for group in dict.fromkeys(group for _, group in requests)
    }
    llm.collective_rpc("cna_start_recording", args=(dict(plan or {}),))
    llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids, _ in requests],
        [params[group] for _, group in requests],
        use_tqdm=True,
    )
    reports: list[dict[str, Any]] = llm.collective_rpc("cna_take_recording")
    return reports


def columns(report: Mapping[str, Any]) -> slice:
    """Which neurons of a layer a rank has."""
    return slice(report["offset"], report["offset"] + report["width"])


def require_all(
    reports: Sequence[Mapping[str, Any]], size: Dimensions, layers: Sequence[int], what: str
) -> None:
    """Raises RuntimeError unless the ranks' shares cover every neuron of ``layers``."""
    covered = np.zeros((size.num_layers, size.intermediate_size), dtype=bool)
    for report in reports:
        covered[report["layers"], columns(report)] = True
    wanted = covered[list(layers)]
    if not wanted.all():
        raise RuntimeError(
            f"only {wanted.sum()} of {wanted.size} neurons were recorded for {what}; a worker's "
            "share is missing"
        )
