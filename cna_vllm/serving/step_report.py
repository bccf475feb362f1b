# SPDX-License-Identifier: Apache-2.0
"""What a worker says of one step's steering, beside the step's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

MOST_COUNTED = 4096  # digests


class TokenCounts(dict[str, int]):
    """Steered token rows by content digest, of the last MOST_COUNTED digests: bounded, however
    many circuits come and go."""

    def add(self, digests: Iterable[str], rows: int) -> None:
        """Counts ``rows`` for each digest."""
        for digest in digests:
            if digest not in self and len(self) >= MOST_COUNTED:
                del self[next(iter(self))]
            self[digest] = self.get(digest, 0) + rows


@dataclass(frozen=True, eq=False)
class SteeredRows:
    """What one step steers, over its whole batch; steps that steer the same may share one.

    slots: intp [requests], -1 for plain requests. counts: steered token rows of each.
    """

    req_ids: Sequence[str]
    slots: np.ndarray
    counts: np.ndarray

    @cached_property
    def rows(self) -> dict[str, int]:
        """Request id -> token rows, of the requests that are steered."""
        pairs = zip(self.req_ids, self.counts.tolist(), strict=True)
        return {req_id: count for req_id, count in pairs if count}


class StepReport:
    """Steered rows of each request in one step, and the requests that overflowed.

    Of the marks, only those of this step count, so their tensor is read no sooner than asked:
    when the step's tokens are on the host, or when it leaves the worker's process.
    """

    def __init__(self, step: SteeredRows, marks: torch.Tensor, mark: int) -> None:
        """marks: int32 on the host, by slot; those equal to ``mark`` are of this step."""
        self._step = step
        self._marks = marks
        self._mark = mark

    def rows(self) -> dict[str, int]:
        """Request id -> token rows that were steered."""
        return self._step.rows

    def overflowed(self) -> set[str]:
        """Ids of requests of which a steered row left the range of the model's dtype."""
        hit = self._marks.numpy() == self._mark
        if not hit.any():
            return set()
        step = self._step
        return {step.req_ids[i] for i in np.flatnonzero(hit[step.slots] & (step.counts > 0))}

    def __reduce__(self) -> tuple[Any, ...]:
        return SentReport, (self.rows(), self.overflowed())


@dataclass(frozen=True)
class SentReport:
    """A `StepReport` as it crosses from the worker's process to the core's."""

    steered: dict[str, int]
    hit: set[str]

    def rows(self) -> dict[str, int]:
        return self.steered

    def overflowed(self) -> set[str]:
        return self.hit
