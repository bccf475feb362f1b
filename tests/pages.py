# SPDX-License-Identifier: Apache-2.0
"""The fenced blocks of the pages that users read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "cna_vllm/cli/README.md",
    "cna_vllm/serving/README.md",
    "cna_vllm/evaluation/README.md",
    "cna_vllm/baselines/README.md",
)
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True)
class Block:
    """One fenced block. reason: why it cannot be run, of an HTML comment right above it."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None = None

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """All blocks of all pages in one of these languages."""
    found = [block for page in PAGES for block in _blocks(page)]
    return [block for block in found if block.language in languages]


def _blocks(page: str) -> Iterator[Block]:
    start, language, reason, before = None, "", None, ""
    lines = (ROOT / page).read_text("utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            before = line if line.strip() else before
        elif start is None:
            start, language = number, line.removeprefix("```")
            comment = _NOT_RUN.fullmatch(before)
            reason = comment[1] if comment else None
        else:
            yield Block(page, start, language, "\n".join(lines[start : number - 1]) + "\n", reason)
            start, before = None, ""
    assert start is None, f"{page}:{start}: a block without an end"
