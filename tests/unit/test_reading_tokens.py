# SPDX-License-Identifier: Apache-2.0
"""Vocabulary items as text: nothing invisible, nothing lost, escapes never cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cna_vllm.reading.tokens import columns, token_text, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "␣the"),
        ("  ", "␣␣"),
        ("\n\t\r", "\\n\\t\\r"),
        ("\u200b", "\\u200b"),
        ("\\n", "\\\\n"),
        ("中文", "中文"),
        ("\u0301", "\\u0301"),
        ("é", "é"),
        ("\U000e0001", "\\U000e0001"),
        ("", "∅"),
    ],
)
def test_everything_is_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_long_items_are_shortened_between_pieces() -> None:
    assert visible("-" * 64, 8) == "-------…"
    assert visible("\t" * 9, 8) == "\\t\\t\\t…"
    assert visible("中文中文", 8) == "中文中文"
    assert visible("中文中文中", 8) == "中文中…"


@given(st.text(max_size=30), st.integers(8, 40))
def test_width_and_printability_hold_for_any_text(text: str, width: int) -> None:
    shown = visible(text, width)
    assert columns(shown) <= width
    assert shown.isprintable() and " " not in shown


def byte_level() -> PreTrainedTokenizerFast:
    """Items as GPT-2 spells them: a space is Ġ, byte 0xe4 is ä."""
    vocabulary = {"Ġthe": 0, "ä": 1, "ä\u00b8Ń": 2, "\u00b8": 3, "Ċ": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE({"▁the": 0, "the": 1, "<0xE4>": 2, "▁": 3}, []))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_byte_level_items() -> None:
    texts = [token_text(byte_level(), token) for token in range(5)]
    assert texts == [" the", "\\xe4", "中", "\\xb8", "\n"]


def test_sentencepiece_items_keep_their_space() -> None:
    texts = [token_text(sentencepiece(), token) for token in range(4)]
    assert texts == [" the", "the", "\\xe4", " "]
