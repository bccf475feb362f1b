# SPDX-License-Identifier: Apache-2.0
"""What an evaluation will cost: requests and tokens, and time where an engine's speed is known."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from cna_vllm.evaluation.paper.settings import CAA_SIGNS, Settings
from cna_vllm.serving.seams.offline import engine_of
from cna_vllm.serving.seams.platform import on_cpu
from cna_vllm.text.prompts import Prompt, render

if TYPE_CHECKING:
    from vllm import LLM

# A CPU has the speed of a full batch with a few requests; for a GPU they fill the batch.
_PROBE_REQUESTS_ON_CPU = 8
_PROBE_LENGTH = 32
_PROBE_TOKENS = 8


class Load(NamedTuple):
    """Work of one part: requests, their prompt tokens, and the most tokens they may generate."""

    requests: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Speed:
    """Tokens per second of the engine, batched: prompts read, and tokens generated."""

    prompt: float
    new: float

    def seconds(self, load: Load) -> float:
        """An upper bound, since answers may end early and prompts share prefixes."""
        return load.prompt_tokens / self.prompt + load.new_tokens / self.new


def loads(settings: Settings, tokenizer: Any, questions: Sequence[str] = ()) -> dict[str, Load]:
    """The work of every part of `settings`.

    questions: the texts that one arm of mmlu scores.
    """

    def sizes(*prompts: Sequence[Prompt]) -> list[int]:
        return [len(render(tokenizer, prompt)) for some in prompts for prompt in some]

    answer, arms, signs = settings.max_tokens, len(settings.multipliers), len(CAA_SIGNS)
    contrast = sizes(settings.positive, settings.negative)
    sweep = sizes(settings.sweep_prompts)
    jbb = settings.harmful, settings.benign
    # Of each part: sizes of prompts, how often they are sent, and the most tokens of an answer.
    asked: dict[str, list[tuple[list[int], int, int]]] = {
        "jbb": [(sizes(*jbb), 1, 0), (sizes(*map(settings.limited, jbb)), 2, answer)],
        "sweep": [(contrast, 1, 0), (sweep, arms, answer)],
        "caa": [(contrast, 2, 0), (sweep, 1 + 2 * signs, answer)],
        "mmlu": [
            (
                [len(tokenizer.encode(text)) for text in questions],
                arms + signs * ("caa" in settings.parts),
                1,
            )
        ],
        "strongreject": [(sizes(settings.limited(settings.forbidden)), 2, answer)],
        "structure": [(contrast, 1, 0)],
    }
    return {
        part: _sum(Load(len(s) * n, sum(s) * n, len(s) * n * new) for s, n, new in asked[part])
        for part in settings.parts
    }


def _with_sum(found: Mapping[str, Load]) -> dict[str, Load]:
    return {**found, "all": _sum(found.values())}


def _sum(loads: Iterable[Load]) -> Load:
    return Load(*map(sum, zip(*loads, strict=True)))


def measure_speed(llm: LLM) -> Speed:
    """Two short batches of random tokens, plain, on the engine that will run the evaluation."""
    from vllm import SamplingParams, TokensPrompt

    engine = engine_of(llm)
    slots = engine.max_num_seqs
    count = min(_PROBE_REQUESTS_ON_CPU, slots) if on_cpu() else slots
    size = min(_PROBE_LENGTH, engine.max_model_len // 2)
    vocabulary = engine.vocabulary

    def run(first: int, new: int, requests: int = count) -> float:
        prompts = [
            TokensPrompt(
                prompt_token_ids=[(first + i * size + t) % vocabulary for t in range(size)]
            )
            for i in range(requests)
        ]
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began

    run(0, 2, 1)  # whatever is compiled or allocated once
    prefill = run(7, 1)
    both = run(11, 1 + _PROBE_TOKENS)
    decode = max(both - prefill, 1e-3)
    return Speed(count * size / prefill, count * _PROBE_TOKENS / decode)


def report(found: Mapping[str, Load]) -> str:
    """The loads, and their sum, as lines of text."""
    return "\n".join(
        f"{name:13} {load.requests:7,} requests, {load.prompt_tokens:11,} prompt tokens, "
        f"at most {load.new_tokens:10,} new tokens"
        for name, load in _with_sum(found).items()
    )


def durations(found: Mapping[str, Load], speed: Speed) -> str:
    """How long the parts will take, in one line."""
    times = {name: _duration(speed.seconds(load)) for name, load in _with_sum(found).items()}
    return f"at most {times.pop('all')}: {', '.join(f'{n} {time}' for n, time in times.items())}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
