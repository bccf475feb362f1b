# SPDX-License-Identifier: Apache-2.0
"""From running requests to the arm of every token row of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cna_vllm.request import Steering
from cna_vllm.serving.activation import StepBuffers
from cna_vllm.serving.table import CircuitTable


@dataclass(frozen=True)
class _Arm:
    """What one request wants: table rows and multipliers, from ``first_position`` on."""

    rows: tuple[int, ...]
    digests: tuple[str, ...]
    multipliers: tuple[float, ...]
    first_position: int


def upload(destination: torch.Tensor, values: np.ndarray) -> None:
    """Copies ``values`` over the start of ``destination`` without waiting for the device.

    The pinned staging tensor is a new one each time: the caching host allocator keeps it until
    the copy has run, so an asynchronous step that is still queued never sees later contents.
    """
    source = torch.from_numpy(values)
    if destination.is_cuda:
        source = source.pin_memory()
    destination[: len(values)].copy_(source, non_blocking=True)


class SteeringState:
    """Holds the running steered requests and fills the step buffers.

    Host work per step: next to nothing while no steered request runs; else one pass over the
    batch's request ids and, where the rows differ from the last step's, one packed copy of 4
    bytes per token. It does not depend on the number of layers or of resident circuits.
    """

    def __init__(
        self, table: CircuitTable, max_num_reqs: int, max_num_tokens: int, slots: int
    ) -> None:
        device = table.device
        self._table = table
        self._slots = slots
        self.row_arm = torch.full((max_num_tokens,), -1, dtype=torch.int32, device=device)
        # Host copies of the arm tables; the device copies are renewed when a row changed.
        self._circuits = np.full((max_num_reqs, slots), -1, dtype=np.int32)
        self._multipliers = np.ones((max_num_reqs, slots), dtype=np.float32)
        self._first_position = np.zeros(max_num_reqs, dtype=np.int64)
        self._tokens = np.zeros(max_num_reqs, dtype=np.int64)
        self.arm_circuits = torch.from_numpy(self._circuits.copy()).to(device)
        self.arm_multipliers = torch.from_numpy(self._multipliers.copy()).to(device)
        self._free = list(range(max_num_reqs - 1, -1, -1))
        self._arms: dict[str, _Arm] = {}
        self._index: dict[str, int] = {}
        self._changed = False
        # What row_arm holds up to its last steered row; all rows after that are -1.
        self._rows = np.empty(0, dtype=np.int32)
        self._steered_tokens: Counter[str] = Counter()

    def add(self, req_id: str, steering: Steering | None, prompt_len: int) -> None:
        """Registers a request at its first step, or again after a resume or an update.

        prompt_len: the original prompt's length, never the length to prefill after a resume.
        Raises CircuitTableError when a circuit is not resident.
        """
        self.remove(req_id)
        if steering is None:
            return
        digests = tuple(digest for digest, _ in steering.pairs)
        if len(digests) > self._slots:
            raise ValueError(f"request {req_id} has {len(digests)} circuits, over {self._slots}")
        self._arms[req_id] = _Arm(
            rows=self._table.acquire(digests),
            digests=digests,
            multipliers=tuple(multiplier for _, multiplier in steering.pairs),
            first_position=steering.first_position(prompt_len),
        )

    def suspend(self, req_id: str) -> None:
        """Gives back a preempted request's arm index; it takes a new one when it runs again.

        Preempted requests may outnumber the arm indices, running ones never do.
        """
        index = self._index.pop(req_id, None)
        if index is None:
            return
        self._count(req_id, index)
        self._free.append(index)

    def remove(self, req_id: str) -> None:
        """Forgets a request; unknown ids are fine, runners announce those too."""
        if req_id not in self._arms:
            return
        self.suspend(req_id)
        self._table.release(self._arms.pop(req_id).rows)

    def fill(
        self,
        req_ids: Sequence[str],
        num_scheduled_tokens: np.ndarray,
        num_computed_tokens: np.ndarray,
    ) -> None:
        """Writes the arm of every token row of the coming step.

        req_ids: the batch in row order. num_scheduled_tokens, num_computed_tokens: int
        [len(req_ids)]; row i of a request is its position num_computed_tokens + i. Rows past the
        batch, up to the longest earlier batch, are reset, so padded rows are plain.
        """
        if not self._arms:
            self._write_rows(np.empty(0, dtype=np.int32))
            return
        index_of = self._index
        if len(index_of) < len(self._arms):
            for req_id in req_ids:
                if req_id in self._arms and req_id not in index_of:
                    self._place(req_id)
        if self._changed:
            upload(self.arm_circuits, self._circuits)
            upload(self.arm_multipliers, self._multipliers)
            self._changed = False
        num_reqs = len(req_ids)
        index = np.fromiter((index_of.get(r, -1) for r in req_ids), dtype=np.int32, count=num_reqs)
        scheduled = np.asarray(num_scheduled_tokens[:num_reqs], dtype=np.int64)
        # Rows of a request before its first steered position; all rows when it is plain.
        plain = self._first_position[index] - num_computed_tokens[:num_reqs]
        plain = np.where(index < 0, scheduled, np.clip(plain, 0, scheduled))
        steered = scheduled - plain
        self._tokens[index[index >= 0]] += steered[index >= 0]

        arms = np.stack([np.full(num_reqs, -1, dtype=np.int32), index], axis=1).reshape(-1)
        counts = np.stack([plain, steered], axis=1).reshape(-1)
        rows = np.repeat(arms, counts)
        self._write_rows(rows[: int(np.flatnonzero(rows >= 0)[-1]) + 1 if steered.any() else 0])

    def steered_tokens(self) -> dict[str, int]:
        """Steered token rows so far, by circuit digest (prompt rows of a recompute count again)."""
        for req_id, index in self._index.items():
            self._count(req_id, index)
        return dict(self._steered_tokens)

    def buffers(self, row_record: torch.Tensor | None = None) -> StepBuffers:
        """The tensors that the layers read."""
        return StepBuffers(self.row_arm, self.arm_circuits, self.arm_multipliers, row_record)

    def _write_rows(self, rows: np.ndarray) -> None:
        """Makes row_arm hold ``rows`` and -1 after them; while a batch decodes, that is no copy."""
        if np.array_equal(rows, self._rows):
            return
        padding = np.full(max(len(self._rows) - len(rows), 0), -1, dtype=np.int32)
        upload(self.row_arm, np.concatenate([rows, padding]))
        self._rows = rows

    def _place(self, req_id: str) -> None:
        arm = self._arms[req_id]
        index = self._free.pop()
        self._index[req_id] = index
        self._circuits[index] = -1
        self._circuits[index, : len(arm.rows)] = arm.rows
        self._multipliers[index] = 1.0
        self._multipliers[index, : len(arm.rows)] = arm.multipliers
        self._first_position[index] = arm.first_position
        self._tokens[index] = 0
        self._changed = True

    def _count(self, req_id: str, index: int) -> None:
        tokens = int(self._tokens[index])
        self._tokens[index] = 0
        if tokens:
            for digest in set(self._arms[req_id].digests):
                self._steered_tokens[digest] += tokens
