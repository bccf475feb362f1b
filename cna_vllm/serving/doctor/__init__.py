# SPDX-License-Identifier: Apache-2.0
"""One promise, what was seen, and whether it holds: what `doctor` and `demo` print."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """``seen`` of one that does not hold also says what to do, where that is known."""

    claim: str
    seen: str
    holds: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.holds else 'FAIL'}  {self.claim}: {self.seen}"
