# SPDX-License-Identifier: Apache-2.0
"""What a worker says of one step's steering, beside the step's tokens."""

from __future__ import annotations

from typing import Any

import torch

from cna_vllm.serving.state import SteeredRows


class StepReport:
    """Steered rows of each request in one step, and the requests that overflowed.

    Of the marks, only those of this step count, so their tensor is read no sooner than asked:
    when the step's tokens are on the host, or when it leaves the worker's process.
    """

    def __init__(self, step: SteeredRows, marks: torch.Tensor, mark: int) -> None:
        """marks: int32 on the host, by arm; those equal to ``mark`` are of this step."""
        self._step = step
        self._marks = marks
        self._mark = mark

    def rows(self) -> dict[str, int]:
        """Request id -> token rows that were steered."""
        return dict(zip(self._step.req_ids, self._step.rows, strict=True))

    def overflowed(self) -> set[str]:
        """Ids of requests of which a steered row left the range of the model's dtype."""
        hit = self._marks.numpy()[self._step.arms] == self._mark
        return {self._step.req_ids[i] for i in hit.nonzero()[0]} if hit.any() else set()

    def __reduce__(self) -> tuple[Any, ...]:
        return SentReport, (self.rows(), self.overflowed())


class SentReport:
    """A `StepReport` as it crosses from the worker's process to the core's."""

    def __init__(self, rows: dict[str, int], overflowed: set[str]) -> None:
        self._rows = rows
        self._overflowed = overflowed

    def rows(self) -> dict[str, int]:
        return self._rows

    def overflowed(self) -> set[str]:
        return self._overflowed
