# SPDX-License-Identifier: Apache-2.0
"""The core's account of steering: every token row that must be steered was, and stayed finite.

What must be steered follows from the scheduler's own numbers; what was, the workers tell with each
step's tokens. A request of which the two differ, or of which a row overflowed, ends with an error
in place of its text. The KV cache blocks of the latter are scrubbed before anybody has them again:
attention multiplies what is past a sequence's end by 0, and a NaN stays one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cna_vllm.serving.step_report import SentReport, StepReport, TokenCounts
from cna_vllm.steering.request import FIELD_CIRCUIT, FIELD_MULTIPLIER
from cna_vllm.steering.resolved import Steering

OVERFLOW = f"{FIELD_MULTIPLIER}: the steered activations left the range of "
UNCOUNTED = f"{FIELD_CIRCUIT}: steered "


def failure_of(message: str) -> str:
    """What a message is of: `overflow`, `uncounted`, or a request that the core `refused`."""
    if message.startswith(OVERFLOW):
        return "overflow"
    return "uncounted" if message.startswith(UNCOUNTED) else "refused"


class Ledger:
    """The steered requests of one scheduler, from their first step to their end."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._steered: dict[str, tuple[int, frozenset[str]]] = {}  # first position, digests
        self._tokens = TokenCounts()
        self._failed: set[str] = set()
        # Blocks with unsound contents: those that others still hold, and those to be zeroed.
        self._tainted: set[int] = set()
        self._scrub: set[int] = set()

    def begin(self, req_id: str, steering: Steering, prompt_len: int) -> None:
        """Takes in a steered request that runs its first step."""
        first = steering.first_position(prompt_len)
        self._steered[req_id] = first, frozenset(steering.digests)

    def end(self, req_id: str) -> None:
        """Forgets a request."""
        self._steered.pop(req_id, None)
        self._failed.discard(req_id)

    def check(
        self,
        scheduled: Mapping[str, int],
        computed_before: Iterable[tuple[str, int]],
        report: StepReport | SentReport | None,
    ) -> dict[str, str]:
        """Request id -> message, for each request that must end with an error.

        scheduled: request id -> tokens of the step. computed_before: (request id, its tokens
        computed before the step) of each; read only while a steered request runs.
        """
        if not self._steered:
            return {}
        wrong: dict[str, str] = {}
        rows: Mapping[str, int] = {} if report is None else report.rows()
        for req_id, computed in computed_before:
            if req_id not in self._steered or req_id not in scheduled:
                continue
            first, digests = self._steered[req_id]
            tokens = scheduled[req_id]
            expected = tokens if computed >= first else max(computed + tokens - first, 0)
            steered = rows.get(req_id, 0)
            if steered != expected:
                wrong[req_id] = (
                    f"{UNCOUNTED}{steered} token rows of a step in place of {expected}; the "
                    "request was ended, since its text would not be that of its circuit"
                )
            self._tokens.add(digests, steered)
        for req_id in report.overflowed() if report is not None else ():
            if req_id in self._steered:
                wrong[req_id] = (
                    f"{OVERFLOW}{self._dtype}; use a multiplier nearer to 1, fewer neurons or, in "
                    "float16, bfloat16"
                )
                self._failed.add(req_id)
        return wrong

    def steered_tokens(self) -> dict[str, int]:
        """Steered token rows so far, by digest; prompt rows of a recompute count again."""
        return dict(self._tokens)

    def unsound_from(self, req_id: str, computed: int, in_flight: int) -> int | None:
        """First position of a request, which gives its blocks back, whose KV may not be finite.

        computed, in_flight: tokens that it was scheduled for, and those of them in steps whose
        report has not come yet. None where all are known to be sound.
        """
        if req_id not in self._steered or not (in_flight or req_id in self._failed):
            return None
        first, _ = self._steered[req_id]
        return first if req_id in self._failed else max(first, computed - in_flight)

    def taint(self, blocks: Iterable[int]) -> None:
        """Blocks that hold what is not sound; those that equally steered requests share stay until
        the last of these, which reads the same and so fails too, has given them back."""
        self._tainted.update(blocks)

    def scrub_unused(self, is_used: Any) -> None:
        """Tainted blocks that nobody holds any more will be zeroed. is_used: block id -> bool."""
        free = {block for block in self._tainted if not is_used(block)}
        self._tainted -= free
        self._scrub |= free

    @property
    def has_tainted(self) -> bool:
        """Whether some block is tainted and still held."""
        return bool(self._tainted)

    def take_scrub(self) -> list[int]:
        """Blocks that workers must zero before the coming step's forward pass."""
        taken = sorted(self._scrub)
        self._scrub.clear()
        return taken
