# SPDX-License-Identifier: Apache-2.0
"""What this machine can do, and a self-test of a running engine: promises, what was seen of each,
and whether it holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One promise. ``seen`` of one that does not hold also says what to do, where that is known."""

    claim: str
    seen: str
    holds: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.holds else 'FAIL'}  {self.claim}: {self.seen}"
