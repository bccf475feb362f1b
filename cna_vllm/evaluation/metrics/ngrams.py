# SPDX-License-Identifier: Apache-2.0
"""Repetition, output quality and distinct-n: how many of an answer's n-grams are new.

Units are lower-cased words split at white space, as in the evaluation of the method's paper
(arXiv 2605.12290), or token ids, which also serve languages written without spaces. The paper
calls 1 - the fraction of repeated n-grams the output quality and states no n; the default here is
3. An answer with fewer than n units has no n-gram and no score: it is neither good nor bad.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from cna_vllm.evaluation.metrics import Answer, Better, Kind, MetricError, Score, check_choices
from cna_vllm.evaluation.metrics.text import token_ids


@dataclass(frozen=True)
class _NGrams:
    n: int = 3
    unit: Literal["words", "tokens"] = "words"
    kind: ClassVar[Kind] = "continuous"
    base_name: ClassVar[str]
    definition: ClassVar[str]

    def __post_init__(self) -> None:
        if self.n < 1:
            raise MetricError(f"metric {self.base_name}: n={self.n} must be at least 1")
        check_choices(self.base_name, type(self), vars(self))

    @property
    def name(self) -> str:
        suffix = "" if self.unit == "words" else f"-{self.unit}"
        return f"{self.base_name}-{self.n}{suffix}"

    @property
    def description(self) -> str:
        units = "lower-cased words" if self.unit == "words" else "token ids"
        return self.definition.format(n=self.n, units=units)

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        scores: list[Score] = []
        for index, answer in enumerate(answers):
            units: Sequence[Hashable]
            if self.unit == "words":
                units = answer.text.lower().split()
            else:
                units = token_ids(self.name, index, answer)
            total = len(units) - self.n + 1
            distinct = len({tuple(units[i : i + self.n]) for i in range(total)})
            scores.append(self._value(distinct, total, len(units)) if total > 0 else None)
        return scores

    def _value(self, distinct: int, total: int, units: int) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Repetition(_NGrams):
    """1 - distinct / all n-grams of the answer (seq-rep-n of Welleck et al., arXiv 1908.04319)."""

    base_name: ClassVar[str] = "repetition"
    better: ClassVar[Better] = "lower"
    definition: ClassVar[str] = (
        "Fraction of the answer's {n}-grams of {units} that repeat an earlier one "
        "(seq-rep-n, arXiv 1908.04319)."
    )

    def _value(self, distinct: int, total: int, units: int) -> float:
        return 1 - distinct / total


@dataclass(frozen=True)
class Quality(_NGrams):
    """distinct / all n-grams of the answer: 1 - `Repetition`."""

    base_name: ClassVar[str] = "quality"
    better: ClassVar[Better] = "higher"
    definition: ClassVar[str] = (
        "Output quality as arXiv 2605.12290 states it: 1 - the fraction of repeated {n}-grams of "
        "{units}."
    )

    def _value(self, distinct: int, total: int, units: int) -> float:
        return distinct / total


@dataclass(frozen=True)
class Distinct(_NGrams):
    """Distinct n-grams of one answer over its units (distinct-n of Li et al., arXiv 1510.03055)."""

    n: int = 2
    base_name: ClassVar[str] = "distinct"
    better: ClassVar[Better] = "higher"
    definition: ClassVar[str] = (
        "Distinct {n}-grams over the number of {units}, per answer (distinct-n, arXiv 1510.03055)."
    )

    def _value(self, distinct: int, total: int, units: int) -> float:
        return distinct / units
