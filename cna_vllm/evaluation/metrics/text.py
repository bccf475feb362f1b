# SPDX-License-Identifier: Apache-2.0
"""Metrics of the plain text: length, empty answers, regular expressions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from cna_vllm.evaluation.metrics import Answer, Better, Kind, MetricError, Score, check_choices


def token_ids(metric: str, index: int, answer: Answer) -> tuple[int, ...]:
    """The answer's token ids. MetricError where there is text, but no ids are known."""
    if answer.text and not answer.token_ids:
        raise MetricError(
            f"metric {metric}: answer {index} has text but no token_ids; "
            "give them, or measure in words"
        )
    return answer.token_ids


@dataclass(frozen=True)
class Length:
    """Length of the answer in `unit`s. An empty answer has length 0."""

    unit: Literal["tokens", "words", "characters"] = "tokens"
    kind: ClassVar[Kind] = "continuous"
    better: ClassVar[Better] = "neither"

    def __post_init__(self) -> None:
        check_choices("length", type(self), vars(self))

    @property
    def name(self) -> str:
        return "length" if self.unit == "tokens" else f"length-{self.unit}"

    @property
    def description(self) -> str:
        what = {
            "tokens": "generated tokens",
            "words": "words, split at white space",
            "characters": "characters",
        }
        return f"Length of the answer in {what[self.unit]}."

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        if self.unit == "tokens":
            return [float(len(token_ids(self.name, i, a))) for i, a in enumerate(answers)]
        if self.unit == "words":
            return [float(len(answer.text.split())) for answer in answers]
        return [float(len(answer.text)) for answer in answers]


@dataclass(frozen=True)
class Empty:
    """1 where the answer shows nothing: white space, control and format characters only.

    Beside the metrics of refusal, which count such an answer as no refusal.
    """

    name: ClassVar[str] = "empty"
    kind: ClassVar[Kind] = "binary"
    better: ClassVar[Better] = "lower"
    description: ClassVar[str] = "Share of answers without any visible character."

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        return [
            float(all(unicodedata.category(character)[0] in "CZ" for character in answer.text))
            for answer in answers
        ]


@dataclass(frozen=True)
class Regex:
    """1 where `pattern` is found in the answer, by `re.search` with the flags it names itself."""

    pattern: str
    kind: ClassVar[Kind] = "binary"
    better: ClassVar[Better] = "neither"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise MetricError(
                f"metric regex: pattern={self.pattern!r} is not a regular expression ({error}); "
                "correct it"
            ) from error

    @property
    def name(self) -> str:
        return f"regex:{self.pattern}"

    @property
    def description(self) -> str:
        return (
            f"Share of answers in which the regular expression {self.pattern} is found "
            "(Python's re.search)."
        )

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        pattern = re.compile(self.pattern)
        return [float(pattern.search(answer.text) is not None) for answer in answers]
