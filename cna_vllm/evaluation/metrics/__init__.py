# SPDX-License-Identifier: Apache-2.0
"""What a metric is: one number, or none, for each answer; and how it is found by specification.

A metric is found by name through the entry point group `cna_vllm.metrics`, where this project's
own are registered too. An entry point names a callable that takes the metric's options as keyword
arguments (`int`, `float`, `str` or a `Literal` of texts) and returns a `Metric` or an
`EngineMetric`.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from vllm import LLM

Kind = Literal["binary", "continuous"]
Better = Literal["higher", "lower", "neither"]
Score = float | None

BENIGN = "benign"
HARMFUL = "harmful"

GROUP = "cna_vllm.metrics"

# A comma ends a value only before `key=`, and not after a backslash.
_NEXT_OPTION = re.compile(r"(?<!\\),(?=[A-Za-z_][A-Za-z0-9_]*=)")
_NUMBERS = {int: "a whole number", float: "a number"}


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

    @classmethod
    def plain(cls, llm: LLM) -> EngineContext:
        """That of an engine: always the plain model, whatever circuits it holds."""

        def prompt_logprobs(sequences: list[list[int]]) -> list[list[float]]:
            from vllm import SamplingParams, TokensPrompt

            from cna_vllm.serving.seams.offline import engine_of

            longest = engine_of(llm).max_model_len - 1
            prompts = [TokensPrompt(prompt_token_ids=i) for i in sequences if len(i) <= longest]
            params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
            outputs = iter(llm.generate(prompts, params) if prompts else ())
            return [
                _given(next(outputs).prompt_logprobs, ids)
                if len(ids) <= longest
                else [float("nan")] * (len(ids) - 1)
                for ids in sequences
            ]

        return cls(prompt_logprobs)


def _given(logprobs: Any, ids: list[int]) -> list[float]:
    """The log-probabilities of the prompt's own tokens; the first token has none."""
    return [step[token].logprob for step, token in zip(logprobs[1:], ids[1:], strict=True)]


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


def known_metrics() -> tuple[str, ...]:
    """Names of all installed metrics, sorted."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def load_metric(spec: str) -> Metric | EngineMetric:
    """The metric that `spec` describes.

    A comma is part of a value unless `key=` follows it; `\\,` keeps it even there, and the
    backslash stays in the value (in a regular expression it changes nothing).

    Raises:
        MetricError: unknown metric, option or value, or a package is missing: one line that names
            it, what is known, and the fix.
    """
    name, colon, rest = spec.partition(":")
    name = name.strip()
    given = _parse_options(name, rest) if colon else {}
    point = _find(name)
    try:
        factory: Callable[..., Any] = point.load()
    except (ImportError, AttributeError) as error:
        raise MetricError(
            f"metric {name}: its entry point {point.value} cannot be loaded ({error}); "
            "reinstall the package that brings it"
        ) from error
    metric = factory(**_convert(name, factory, given))
    if not isinstance(metric, Metric | EngineMetric):
        raise MetricError(f"metric {name}: {point.value} has neither score nor score_with")
    return metric


def _find(name: str) -> EntryPoint:
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        known = ", ".join(known_metrics()) or "none: reinstall cna-vllm"
        raise MetricError(f"unknown metric {name!r}; use one of: {known}")
    if len({point.value for point in points}) > 1:
        found = ", ".join(sorted({point.value for point in points}))
        raise MetricError(f"metric {name}: brought by several packages ({found}); keep one")
    return points[0]


def _parse_options(name: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in _NEXT_OPTION.split(text):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key or not value:
            raise MetricError(f"metric {name}: {part!r} is not an option; write {name}:key=value")
        if key in options:
            raise MetricError(f"metric {name}: option {key} is given twice; keep one")
        options[key] = value
    return options


def check_choices(name: str, options: Any, given: Mapping[str, Any]) -> None:
    """Raises MetricError for an option that is none of the texts of its `Literal`.

    options: the class or function whose annotations say so.
    """
    hints = typing.get_type_hints(options)
    for key, value in given.items():
        choices = (
            typing.get_args(hints[key]) if typing.get_origin(hints.get(key)) is Literal else ()
        )
        if choices and value not in choices:
            raise MetricError(f"metric {name}: {key}={value!r}; use one of {', '.join(choices)}")


def _convert(name: str, factory: Callable[..., Any], given: dict[str, str]) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters
    options = factory.__init__ if inspect.isclass(factory) else factory
    hints = typing.get_type_hints(options)
    for key in given:
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise MetricError(f"metric {name}: unknown option {key!r}; its options are: {known}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            raise MetricError(f"metric {name}: needs option {key}; write {name}:{key}=...")
    converted: dict[str, Any] = {}
    check_choices(name, options, given)
    for key, value in given.items():
        kind = hints.get(key, str)
        try:
            converted[key] = kind(value) if kind in _NUMBERS else value
        except ValueError as error:
            raise MetricError(
                f"metric {name}: {key}={value!r} is not {_NUMBERS[kind]}; correct it"
            ) from error
    return converted
