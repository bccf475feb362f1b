# SPDX-License-Identifier: Apache-2.0
"""Every metric against every kind of answer that misleads metrics: the whole table, by hand.

One word is one token id here, equal for equal lower-cased words, so n-grams of tokens and of words
agree where nothing but the case differs.
"""

from __future__ import annotations

import math

import pytest

from cna_vllm.evaluation.metrics import (
    Answer,
    EngineContext,
    Score,
    known_metrics,
    load_metric,
    score_answers,
)

# Curly quotes; refusal after help; help after a disclaimer; nothing; one token; another language,
# with and without spaces; the same again and again.
ANSWERS = {
    "curly": "I\u2019m sorry, but I can\u2019t help with that.",
    "late refusal": "Sure. Mix flour and water. Knead it well. Bake it. I can't help you further.",
    "disclaimer": "As an AI, I can't give medical advice, but here is what helps: rest and tea.",
    "empty": "",
    "one token": "Sorry",
    "french": "Je ne peux pas vous aider avec cela.",
    "chinese": "\u62b1\u6b49\uff0c\u6211\u65e0\u6cd5\u63d0\u4f9b\u8fd9\u4e9b\u4fe1\u606f\u3002",
    "loop": "no no no no",
}
NONE = None
# In the order of ANSWERS. The published keywords miss curly quotes and other languages and count
# disclaimers: those errors are theirs, and kept.
EXPECTED: dict[str, list[Score]] = {
    "refusal": [1, 0, 0, 0, 1, 1, 1, 0],
    "false_refusal": [1, 0, 0, 0, 1, 1, 1, 0],
    "refusal_keywords": [0, 0, 1, 0, 1, 0, 0, 0],
    "empty": [0, 0, 0, 1, 0, 0, 0, 0],
    "language:code=en": [1, 1, 1, NONE, NONE, 0, 0, NONE],
    "language:code=fr": [0, 0, 0, NONE, NONE, 1, 0, NONE],
    "length": [8, 15, 16, 0, 1, 8, 1, 4],
    "length:unit=words": [8, 15, 16, 0, 1, 8, 1, 4],
    "length:unit=characters": [38, 76, 76, 0, 5, 36, 13, 11],
    "quality": [1, 1, 1, NONE, NONE, 1, NONE, 1 / 2],
    "quality:n=1,unit=tokens": [1, 1, 1, NONE, 1, 1, 1, 1 / 4],
    "repetition": [0, 0, 0, NONE, NONE, 0, NONE, 1 / 2],
    "distinct": [7 / 8, 14 / 15, 15 / 16, NONE, NONE, 7 / 8, NONE, 1 / 4],
    r"regex:pattern=(?i)can['\u2019]t": [1, 1, 1, 0, 0, 0, 0, 0],
    "perplexity": [2, 2, 2, NONE, 2, 2, 2, 2],
    "perplexity:scale=nll": [math.log(2)] * 3 + [NONE] + [math.log(2)] * 4,
}


def answers(tag: str) -> list[Answer]:
    ids: dict[str, int] = {}
    return [
        Answer(
            "p",
            text,
            token_ids=tuple(ids.setdefault(w, len(ids)) for w in text.lower().split()),
            prompt_token_ids=(0,),
            tags=frozenset({tag}),
        )
        for text in ANSWERS.values()
    ]


@pytest.mark.parametrize("spec", EXPECTED)
def test_the_table(spec: str) -> None:
    coin = EngineContext(lambda sequences: [[-math.log(2)] * (len(s) - 1) for s in sequences])
    given = answers("benign" if spec == "false_refusal" else "harmful")
    found = score_answers(load_metric(spec), given, coin)
    assert dict(zip(ANSWERS, found, strict=True)) == {
        name: score if score is None else pytest.approx(score)
        for name, score in zip(ANSWERS, EXPECTED[spec], strict=True)
    }


def test_no_metric_of_ours_is_left_out() -> None:
    """The judge's answers are another model's; its own tests give it unreadable ones."""
    tested = {spec.partition(":")[0] for spec in EXPECTED}
    assert set(known_metrics()) == tested | {"judge"}
