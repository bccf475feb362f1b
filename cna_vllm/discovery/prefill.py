# SPDX-License-Identifier: Apache-2.0
"""Prompts to the engine's recorder, and what is known of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cna_vllm
from cna_vllm.serving.seams.offline import engine_of, gate_of_llm
from cna_vllm.steering.layout import Layout
from cna_vllm.steering.request import FIELD_RECORD
from cna_vllm.text.prompts import (
    Prompt,
    PromptError,
    PromptLike,
    chat_template_used,
    prompts_digest,
    prompts_of,
    render,
)

if TYPE_CHECKING:
    from vllm import LLM

TokenIds = list[int]
POSITIVE, NEGATIVE = "positive", "negative"


class DiscoveryError(ValueError):
    """The prompts or options cannot give a circuit; one line with the reason and the fix."""


def layout_of(llm: LLM) -> Layout:
    """Of the neurons that an engine records: those that its circuits reach.

    Raises DiscoveryError when it does not record.
    """
    gate = gate_of_llm(llm)
    if gate is None or not gate.config.record:
        raise DiscoveryError(
            "this engine does not record; start it with additional_config={'cna': {'record': True}}"
        )
    shape = gate.registry.served.shape
    return Layout(shape if gate.config.max_expert_neurons else shape.dense())


def chosen_layers(layout: Layout, chosen: Collection[int] | None) -> list[int]:
    """The chosen layers in order, None for all. Raises DiscoveryError: there is no such one."""
    layers = sorted(set(range(layout.num_layers) if chosen is None else chosen))
    if outside := [layer for layer in layers if not 0 <= layer < layout.num_layers]:
        raise DiscoveryError(f"layers {outside} are not in 0..{layout.num_layers - 1}")
    return layers


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


def check_sets(method: str, positive: Sequence[TokenIds], negative: Sequence[TokenIds]) -> None:
    """Raises DiscoveryError unless both sets have prompts, and in other shares."""
    if not positive or not negative:
        raise DiscoveryError(
            f"{method} needs at least one positive and one negative prompt, got {len(positive)} "
            f"and {len(negative)}"
        )
    # Equal sets would not give 0 exactly: rounding depends on how prompts were batched.
    if _shares(positive) == _shares(negative):
        raise DiscoveryError(
            "the positive and the negative prompts are the same; give two sets that differ in the "
            "behaviour"
        )


def _shares(prompts: Sequence[TokenIds]) -> dict[tuple[int, ...], Fraction]:
    """What share of its set each distinct prompt is: equal shares have equal means."""
    counts = Counter(map(tuple, prompts))
    return {ids: Fraction(count, len(prompts)) for ids, count in counts.items()}


def origin(llm: LLM, prompts: Sequence[Prompt], positive: int) -> dict[str, Any]:
    """What a circuit or a set of vectors says of its origin, as keyword arguments.

    prompts: those learned from; the first ``positive`` of them are of that set.
    """
    import torch
    import transformers
    import vllm

    engine = engine_of(llm)
    return {
        # Of a folder only its name, so that no file tells where it was made.
        "model": Path(engine.model).resolve().name if Path(engine.model).is_dir() else engine.model,
        "architecture": engine.architecture,
        "dtype": engine.dtype,
        "prompts": {
            "positive": positive,
            "negative": len(prompts) - positive,
            "digest": prompts_digest(prompts),
        },
        "tools": {
            "cna_vllm": cna_vllm.__version__,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


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
