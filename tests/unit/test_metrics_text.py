# SPDX-License-Identifier: Apache-2.0
"""Length, empty answers, regular expressions, n-grams, language and perplexity."""

from __future__ import annotations

import math

import pytest

from cna_vllm.evaluation.metrics import (
    Answer,
    EngineContext,
    MetricError,
    Score,
    load_metric,
    score_answers,
)


def answers(*texts: str) -> list[Answer]:
    """Each word a token id, equal for equal words as they are written."""
    words = {word: i for i, word in enumerate(" ".join(texts).split())}
    return [Answer("p", t, token_ids=tuple(words[w] for w in t.split())) for t in texts]


def scores(spec: str, *texts: str) -> list[Score]:
    return score_answers(load_metric(spec), answers(*texts))


def test_length() -> None:
    texts = ("", "one", "two words", "na\u00efve caf\u00e9\n\nfin", "\u4f60\u597d")
    assert scores("length", *texts) == [0, 1, 2, 3, 1]
    assert scores("length:unit=words", *texts) == [0, 1, 2, 3, 1]
    assert scores("length:unit=characters", *texts) == [0, 3, 9, 15, 2]
    with pytest.raises(MetricError, match="answer 1 has text but no token_ids"):
        load_metric("length").score([Answer("p", ""), Answer("p", "text")])


def test_empty() -> None:
    assert scores("empty", "", " \n\t", "\u200b\ufeff\u00ad", "\u00a0") == [1.0] * 4
    assert scores("empty", ".", "I", "\u4f60", "\U0001f44d") == [0.0] * 4


def test_regex() -> None:
    assert scores("regex:pattern=^Oui", "Oui.", "oui", "Non\nOui", "") == [1, 0, 0, 0]
    assert scores("regex:pattern=(?im)^oui", "Oui.", "oui", "Non\nOui", "") == [1, 1, 1, 0]
    assert scores("regex:pattern=^a{1,2},b$", "a,b", "aa,b", "aaa,b") == [1, 1, 0]
    assert scores(r"regex:pattern=x\,unit=3", "x,unit=3", "x") == [1, 0]
    with pytest.raises(MetricError, match=r"pattern='\(' is not a regular expression"):
        load_metric("regex:pattern=(")


def test_repetition_and_quality_by_hand() -> None:
    # a b a b a b: the 4 trigrams are aba bab aba bab, 2 of them new; the 5 bigrams ab ba ab ba ab.
    loop = "a b a b a b"
    assert scores("repetition:n=3", loop) == [0.5]
    assert scores("quality", loop) == [0.5]
    assert scores("repetition:n=2", loop) == pytest.approx([0.6])
    assert scores("quality:n=1", loop) == pytest.approx([2 / 6])
    assert scores("distinct", loop) == pytest.approx([2 / 6])  # bigrams over words, not bigrams
    assert scores("distinct:n=1", loop) == pytest.approx([2 / 6])


def test_ngrams_at_the_edges() -> None:
    assert scores("quality", "", "one", "two words", "now three words") == [None, None, None, 1.0]
    assert scores("repetition", "the the the the") == [0.5]
    assert scores("quality:n=1", "The the THE") == pytest.approx([1 / 3])  # case is ignored
    assert scores("quality:n=1,unit=tokens", "The the THE") == [1.0]  # ids are not words
    # Chinese has no spaces: one word, so no trigram; its token ids have.
    text = "\u96ea" * 6
    looping = [Answer("p", text, token_ids=(7,) * 6)]
    assert load_metric("quality").score(looping) == [None]
    assert load_metric("quality:unit=tokens").score(looping) == [0.25]
    with pytest.raises(MetricError, match="has text but no token_ids"):
        load_metric("quality:unit=tokens").score([Answer("p", "text")])


def test_language() -> None:
    texts = (
        "La neige tombe doucement sur les toits de la ville.",
        "Snow is falling gently on the roofs of the town.",
        "Der Schnee fällt leise auf die Dächer der Stadt.",
        "\u96ea\u9759\u9759\u5730\u843d\u5728\u57ce\u5e02\u7684\u5c4b\u9876\u4e0a\u3002",
    )
    for code, index in (("fr", 0), ("en", 1), ("de", 2), ("zh", 3)):
        assert scores(f"language:code={code}", *texts) == [float(i == index) for i in range(4)]


def test_language_of_too_little_text() -> None:
    short = ("", "Oui", "42 + 17 = 59, 1234567890", "!!! ??? ...", "La neige.")
    assert scores("language:code=fr", *short) == [None] * 5
    assert scores("language:code=fr,min_letters=7", "La neige.") != [None]
    # Five ideographs are worth ten letters, four only eight.
    found = scores("language:code=zh", "\u4f60\u4eec\u90fd\u597d\u5417", "\u4f60\u4eec\u597d\u5417")
    assert found == [1, None]
    with pytest.raises(MetricError, match=r"code='french'; use one of .*, fr, "):
        load_metric("language:code=french")


class Bigram:
    """A model that gives each token half the probability of the one before it."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def prompt_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        self.seen += sequences
        return [[-float(token) for token in ids[1:]] for ids in sequences]


def test_perplexity_counts_the_answer_given_the_prompt() -> None:
    model = Bigram()
    given = [
        Answer("p", "ab", token_ids=(1, 2), prompt_token_ids=(9, 9, 9)),
        Answer("p", "", token_ids=(), prompt_token_ids=(9,)),
        Answer("p", "c", token_ids=(4,), prompt_token_ids=(9,)),
    ]
    engine = EngineContext(model.prompt_logprobs)
    found = score_answers(load_metric("perplexity"), given, engine)
    assert found == [pytest.approx(math.exp(1.5)), None, pytest.approx(math.exp(4))]
    assert model.seen == [[9, 9, 9, 1, 2], [9, 4]]
    assert score_answers(load_metric("perplexity:scale=nll"), given, engine) == [1.5, None, 4.0]
    with pytest.raises(MetricError, match="perplexity: needs an engine"):
        score_answers(load_metric("perplexity"), given)


def test_perplexity_of_the_impossible_and_bad_input() -> None:
    metric = load_metric("perplexity")
    one = [Answer("p", "a", token_ids=(1,), prompt_token_ids=(9,))]
    never = EngineContext(lambda sequences: [[-math.inf] for _ in sequences])
    assert score_answers(metric, one, never) == [None]
    unlikely = EngineContext(lambda sequences: [[-1e4] for _ in sequences])
    assert score_answers(metric, one, unlikely) == [None]
    with pytest.raises(MetricError, match="gave 2 log-probabilities for 2 tokens"):
        score_answers(metric, one, EngineContext(lambda s: [[-1.0, -1.0] for _ in s]))
    with pytest.raises(MetricError, match="answer 0 has no prompt_token_ids"):
        score_answers(metric, [Answer("p", "a", token_ids=(1,))], never)
    assert score_answers(metric, [Answer("p", "")], never) == [None]
