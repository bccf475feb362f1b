# SPDX-License-Identifier: Apache-2.0
"""What metrics may ask of a running engine: always the plain model, whatever circuits it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cna_vllm.evaluation.metrics import EngineContext
from cna_vllm.serving.seams.offline import engine_of

if TYPE_CHECKING:
    from vllm import LLM


def plain_engine(llm: LLM) -> EngineContext:
    """The context of an engine's plain requests."""

    def prompt_logprobs(sequences: list[list[int]]) -> list[list[float]]:
        from vllm import SamplingParams, TokensPrompt

        longest = engine_of(llm).max_model_len - 1
        fits = [ids for ids in sequences if len(ids) <= longest]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in fits]
        outputs = iter(llm.generate(prompts, params) if fits else ())
        return [
            _given(next(outputs).prompt_logprobs, ids)
            if len(ids) <= longest
            else [float("nan")] * (len(ids) - 1)
            for ids in sequences
        ]

    return EngineContext(prompt_logprobs)


def _given(logprobs: Any, ids: list[int]) -> list[float]:
    """The log-probabilities of the prompt's own tokens; the first token has none."""
    return [step[token].logprob for step, token in zip(logprobs[1:], ids[1:], strict=True)]
