# SPDX-License-Identifier: Apache-2.0
"""The language of an answer, by py3langid."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cna_vllm.evaluation.metrics import Answer, Better, Kind, MetricError, Score

# Letters of scripts in which one stands for a syllable or a word.
_DENSE = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
_DENSE_WEIGHT = 2


@dataclass(frozen=True)
class Language:
    """1 where py3langid takes the answer to be in the language `code` (ISO 639-1).

    An answer of fewer than `min_letters` letters has no score, since the identification of a few
    letters is chance. An ideograph, kana or Hangul syllable counts as two letters. Digits,
    marks and signs do not count.
    """

    code: str
    min_letters: int = 10
    kind: ClassVar[Kind] = "binary"
    better: ClassVar[Better] = "neither"

    def __post_init__(self) -> None:
        try:
            import py3langid
        except ImportError as error:
            raise MetricError(
                "metric language: needs py3langid; pip install 'cna-vllm[eval]'"
            ) from error
        known = {code for code, _ in py3langid.rank("")}
        if self.code not in known:
            raise MetricError(
                f"metric language: code={self.code!r}; use one of {', '.join(sorted(known))}"
            )
        if self.min_letters < 1:
            raise MetricError(f"metric language: min_letters={self.min_letters} must be at least 1")

    @property
    def name(self) -> str:
        return f"language-{self.code}"

    @property
    def description(self) -> str:
        return (
            f"Share of answers in the language {self.code} by py3langid, of those with at least "
            f"{self.min_letters} letters (an ideograph counts {_DENSE_WEIGHT})."
        )

    def score(self, answers: Sequence[Answer]) -> list[Score]:
        import py3langid

        return [
            float(py3langid.classify(answer.text)[0] == self.code)
            if _letters(answer.text) >= self.min_letters
            else None
            for answer in answers
        ]


def _letters(text: str) -> int:
    return sum(
        _DENSE_WEIGHT if unicodedata.name(c, "").startswith(_DENSE) else 1
        for c in text
        if c.isalpha()
    )
