# SPDX-License-Identifier: Apache-2.0
"""What a metric is: one number, or none, for each answer.

A metric is found by name through the entry point group `cna_vllm.metrics`, where this project's
own are registered too. An entry point names a callable that takes the metric's options as keyword
arguments (`int`, `float` or `str`) and returns a `Metric` or an `EngineMetric`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

Kind = Literal["binary", "continuous"]
Better = Literal["higher", "lower", "neither"]
Score = float | None

BENIGN = "benign"
HARMFUL = "harmful"


class MetricError(ValueError):
    """A metric that cannot be had, or cannot be computed: one line with the name and the fix."""


@dataclass(frozen=True)
class Answer:
    """One answer of one arm, and what it answers.

    Attributes:
        prompt: plain text of the last user turn, or the whole prompt where it is not a chat.
        text: the generated text, without special tokens.
        messages: the chat, where there is one.
        token_ids: the generated tokens.
        prompt_token_ids: the prompt as the engine saw it; only `EngineMetric`s need it.
        finish_reason: as the engine gives it: `stop`, `length`, ...
        tags: what kind of prompt it is; `benign` and `harmful` have a meaning to the metrics of
            refusal, and exclude each other.
    """

    prompt: str
    text: str
    messages: tuple[Mapping[str, Any], ...] | None = None
    token_ids: tuple[int, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    tags: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if {BENIGN, HARMFUL} <= self.tags:
            raise MetricError("tags: a prompt cannot be both benign and harmful; keep one of them")


@dataclass(frozen=True)
class EngineContext:
    """What an `EngineMetric` may ask of the engine that gave the answers.

    Attributes:
        prompt_logprobs: from sequences of token ids to the natural log-probability of every token
            but the first, given those before it, under the plain, unsteered model: for a sequence
            of `n` ids, `n - 1` numbers; all NaN for a sequence that the engine has no room for.
    """

    prompt_logprobs: Callable[[list[list[int]]], list[list[float]]]


class Described(Protocol):
    """What a report says of a metric.

    Attributes:
        name: unique among the metrics of a run: it holds the options that change its meaning.
        kind: `binary` scores are 0.0 or 1.0.
        description: one sentence with the definition, its parameters and its source.
        better: the direction that is an improvement; `neither` where that depends on the aim.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def description(self) -> str: ...
    @property
    def better(self) -> Better: ...


@runtime_checkable
class Metric(Described, Protocol):
    """A metric of answers alone."""

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        """One score an answer, in order; None where the metric does not apply to that answer."""
        ...


@runtime_checkable
class EngineMetric(Described, Protocol):
    """A metric that also needs plain requests in the engine that gave the answers."""

    def score_with(self, engine: EngineContext, answers: Sequence[Answer]) -> list[Score]:
        """As `Metric.score`."""
        ...


def score_answers(
    metric: Metric | EngineMetric, answers: Sequence[Answer], engine: EngineContext | None = None
) -> list[Score]:
    """Scores of either kind of metric, checked: one an answer, finite, and 0 or 1 if binary.

    Raises:
        MetricError: the metric needs an engine and none is given, or it breaks its contract.
    """
    if isinstance(metric, EngineMetric):
        if engine is None:
            raise MetricError(f"metric {metric.name}: needs an engine; leave it out, or run one")
        scores = metric.score_with(engine, answers)
    else:
        scores = metric.score(answers)
    if len(scores) != len(answers):
        raise MetricError(
            f"metric {metric.name}: gave {len(scores)} scores for {len(answers)} answers; "
            "it must give one an answer, None where it does not apply"
        )
    for index, score in enumerate(scores):
        if score is None:
            continue
        if metric.kind == "binary" and score not in (0.0, 1.0):
            raise MetricError(f"metric {metric.name}: is binary but scored answer {index} {score}")
        if not abs(score) < float("inf"):
            raise MetricError(f"metric {metric.name}: scored answer {index} {score}; use None")
    return scores
