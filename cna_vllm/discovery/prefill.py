# SPDX-License-Identifier: Apache-2.0
"""Prompts to the engine's recorder, and the shares of all ranks back; what is known of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import cna_vllm
from cna_vllm.serving.seams.offline import engine_of, gate_of_llm
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

    def layers(self, chosen: Collection[int] | None) -> list[int]:
        """The chosen layers in order, None for all. Raises DiscoveryError: there is no such one."""
        layers = sorted(set(range(self.num_layers) if chosen is None else chosen))
        if outside := [layer for layer in layers if not 0 <= layer < self.num_layers]:
            raise DiscoveryError(f"layers {outside} are not in 0..{self.num_layers - 1}")
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


def assemble(
    reports: Sequence[Mapping[str, Any]], expected: Mapping[str, int], size: Dimensions
) -> dict[str, NDArray[np.float64]]:
    """Group -> mean over its ``expected`` prompts, float64 of that size, of all ranks.

    Raises RuntimeError when a share is missing or miscounted.
    """
    means: dict[str, NDArray[np.float64]] = {}
    for group, count in expected.items():
        mean = np.zeros((size.num_layers, size.intermediate_size))
        for report in reports:
            found = report["groups"].get(group, {"count": 0})
            if found["count"] != count:
                raise RuntimeError(
                    f"{found['count']} of {count} prompts of group {group!r} were recorded; the "
                    "recording is not usable"
                )
            shape = (len(report["layers"]), report["width"])
            total = np.frombuffer(found["sum"], dtype=np.float64).reshape(shape)
            mean[report["layers"], columns(report)] = total / count
        require_all(reports, size, range(size.num_layers), f"group {group!r}")
        means[group] = mean
    return means


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
