# SPDX-License-Identifier: Apache-2.0
"""What pictures can spell: fonts of many scripts, and escapes for what none of them has."""

from __future__ import annotations

from functools import cache

from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font

from cna_vllm.reading.tokens import escape

_BASE = "DejaVu Sans"  # comes with matplotlib
_MORE = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "Arial Unicode MS",
)


@cache
def families() -> list[str]:
    """Font families to draw with: matplotlib's own, then installed ones for other scripts."""
    installed = {entry.name for entry in fontManager.ttflist}
    return [_BASE, *(name for name in _MORE if name in installed)]


def drawable(text: str) -> str:
    """`text` with each character that no font can draw as `\\u4e2d`, instead of an empty box."""
    return "".join(char if _has_glyph(char) else escape(char) for char in text)


@cache
def _has_glyph(char: str) -> bool:
    return char == "\n" or any(font.get_char_index(ord(char)) for font in _fonts())


@cache
def _fonts() -> list[FT2Font]:
    return [FT2Font(findfont(FontProperties(family=name))) for name in families()]
