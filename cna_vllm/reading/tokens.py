# SPDX-License-Identifier: Apache-2.0
"""Vocabulary items as text that can be told apart on one line of a terminal or a picture."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SPACE = "\N{OPEN BOX}"
_SENTENCEPIECE_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_ESCAPES = {" ": _SPACE, "\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"}


def token_text(tokenizer: Any, token: int) -> str:
    """The text that a vocabulary item stands for, its leading space included.

    An item that is part of a character only is given as its bytes, `\\xe4\\xb8`.
    """
    raw = tokenizer.convert_ids_to_tokens(token)
    text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if _REPLACEMENT in text and raw != text:
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", raw):  # byte fallback of SentencePiece
            return f"\\x{raw[3:5].lower()}"
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        bytes_of = {char: byte for byte, char in bytes_to_unicode().items()}  # byte-level, as GPT-2
        if all(char in bytes_of for char in raw):
            return "".join(f"\\x{bytes_of[char]:02x}" for char in raw)
        return str(raw)
    if raw.startswith(_SENTENCEPIECE_SPACE) and not text.startswith(" "):
        return f" {text}"  # decoding a single item drops it
    return text or str(raw)


def visible(text: str, max_width: int | None = None) -> str:
    """`text` with spaces, line breaks and unprintable characters made visible, and shortened.

    A space becomes an open box, other unprintable characters `\\u200b`, no text at all an empty
    set; `max_width` counts columns of a terminal, of which a wide (for instance Chinese)
    character takes two.
    """
    if not text:
        return "\N{EMPTY SET}"
    pieces = [_ESCAPES.get(char) or (char if _is_plain(char) else escape(char)) for char in text]
    if max_width is None or sum(map(columns, pieces)) <= max_width:
        return "".join(pieces)
    while sum(map(columns, pieces)) > max_width - 1:
        pieces.pop()  # whole pieces, so that no escape is cut
    return f"{''.join(pieces)}…"


def escape(char: str) -> str:
    """The character as Python spells it: `\\u4e2d`, `\\U0001f600`."""
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def columns(text: str) -> int:
    """Columns that printable text takes in a terminal."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _is_plain(char: str) -> bool:
    # A mark would be drawn over the character before it.
    return char.isprintable() and not unicodedata.combining(char)
