# SPDX-License-Identifier: Apache-2.0
"""From running requests to the arm of every token row of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch

from cna_vllm.request import Steering
from cna_vllm.serving.config import CircuitTableError
from cna_vllm.serving.step_report import SteeredRows, TokenCounts
from cna_vllm.serving.worker.activation import StepBuffers
from cna_vllm.serving.worker.staging import Block, Staging
from cna_vllm.serving.worker.table import CircuitTable
from cna_vllm.serving.worker.vector_table import VectorTable

_NEVER = 1 << 62
"""A position that no request reaches."""


@dataclass(frozen=True)
class _Arm:
    """What one request wants: table rows, multipliers and coefficients from a position on."""

    steering: Steering
    rows: tuple[int, ...]
    vector_rows: tuple[int, ...]
    first_position: int


@dataclass
class _Batch:
    """A batch's requests, while none of them may have another arm.

    arms: intp, -1 for plain requests. first_positions: int64. counts: the bytes of the last
    step's counts, see ``fill``.
    """

    req_ids: list[str]
    arms: np.ndarray
    first_positions: np.ndarray
    counts: bytes | None = None


class _Slots:
    """One kind of an arm's operands: (table row, number) pairs of every arm."""

    def __init__(self, rows: Block, numbers: Block, idle: float) -> None:
        """rows, numbers: [arms, slots]. idle: the number of an unused slot."""
        self.count = rows.host.shape[1]
        self.rows = rows.device
        self.numbers = numbers.device.view(torch.float32)
        self._idle = idle
        self._rows = rows.host
        self._numbers = numbers.host.view(np.float32)
        self._rows[:] = -1
        self._numbers[:] = idle

    def put(self, arm: int, rows: Sequence[int], pairs: Sequence[tuple[str, float]]) -> None:
        """Sets an arm's slots on the host."""
        self._rows[arm] = -1
        self._rows[arm, : len(rows)] = rows
        self._numbers[arm] = self._idle
        self._numbers[arm, : len(rows)] = [number for _, number in pairs]


class SteeringState:
    """Holds the running steered requests and fills the step buffers.

    Host work per step: next to nothing while no steered request runs. While a batch decodes, a
    few array operations of its length. Where requests come and go, one pass over its request ids
    and one packed copy of 4 bytes per token, with the arm tables where an arm is new. It does not
    depend on the number of layers or of resident circuits.
    """

    def __init__(
        self,
        table: CircuitTable,
        max_num_reqs: int,
        max_num_tokens: int,
        slots: int,
        vectors: VectorTable | None = None,
        vector_slots: int = 0,
    ) -> None:
        """slots, vector_slots: circuits and vectors that one request may combine."""
        device = table.device
        self._table = table
        self._vectors = vectors
        # One tensor, so that a step needs one copy: the arm tables, then the arm of each row.
        arms = [(max_num_reqs, slots)] * 2 + [(max_num_reqs, vector_slots)] * 2
        self._staging = Staging([*arms, (max_num_tokens,)], device)
        *tables, rows = self._staging.blocks
        self._circuit_slots = _Slots(tables[0], tables[1], 1.0)
        self._vector_slots = _Slots(tables[2], tables[3], 0.0)
        self.row_arm = rows.device
        self._rows, self._rows_start = rows.host, rows.start
        self._rows[:] = -1
        self._staging.upload()
        # By arm; the entry after the last stands for plain requests, whose arm is -1.
        self._first_position = np.full(max_num_reqs + 1, _NEVER, dtype=np.int64)
        self._tokens = np.zeros(max_num_reqs + 1, dtype=np.int64)
        self._free = list(range(max_num_reqs - 1, -1, -1))
        self._arms: dict[str, _Arm] = {}
        self._index: dict[str, int] = {}
        self._arms_changed = False
        # What row_arm holds up to its last steered row, in rows; all rows after that are -1.
        self._end = 0
        self._batch: _Batch | None = None
        self._steered_tokens = TokenCounts()
        self.step: SteeredRows | None = None
        """What the last ``fill`` steers; None for a step without a steered row."""

    @property
    def arm_circuits(self) -> torch.Tensor:
        """int32 [max_num_reqs, slots], see ``StepBuffers``."""
        return self._circuit_slots.rows

    @property
    def arm_multipliers(self) -> torch.Tensor:
        """float32 [max_num_reqs, slots]."""
        return self._circuit_slots.numbers

    @property
    def arm_vectors(self) -> torch.Tensor:
        """int32 [max_num_reqs, vector slots]."""
        return self._vector_slots.rows

    @property
    def arm_coefficients(self) -> torch.Tensor:
        """float32 [max_num_reqs, vector slots]."""
        return self._vector_slots.numbers

    def add(self, req_id: str, steering: Steering | None, prompt_len: int) -> None:
        """Registers a request at its first step, or again after a resume or an update.

        prompt_len: the original prompt's length, never the length to prefill after a resume.
        Raises CircuitTableError when a circuit or vector is not resident.
        """
        self.remove(req_id)
        if steering is None:
            return
        for noun, pairs, slots in (
            ("circuits", steering.pairs, self._circuit_slots),
            ("vectors", steering.vectors, self._vector_slots),
        ):
            if len(pairs) > slots.count:
                raise ValueError(f"request {req_id} has {len(pairs)} {noun}, over {slots.count}")
        rows = self._table.acquire([digest for digest, _ in steering.pairs])
        try:
            vector_rows = self._acquire_vectors(steering)
        except CircuitTableError:
            self._table.release(rows)
            raise
        self._arms[req_id] = _Arm(steering, rows, vector_rows, steering.first_position(prompt_len))
        self._batch = None

    def suspend(self, req_id: str) -> None:
        """Gives back a preempted request's arm index; it takes a new one when it runs again.

        Preempted requests may outnumber the arm indices, running ones never do.
        """
        index = self._index.pop(req_id, None)
        if index is None:
            return
        self._count(req_id, index)
        self._free.append(index)
        self._batch = None

    def remove(self, req_id: str) -> None:
        """Forgets a request; unknown ids are fine, runners announce those too."""
        if req_id not in self._arms:
            return
        self.suspend(req_id)
        arm = self._arms.pop(req_id)
        self._table.release(arm.rows)
        if self._vectors is not None:
            self._vectors.release(arm.vector_rows)

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
            self.step = None
            if self._end:
                self._write(np.empty(0, dtype=np.int32))
            return
        batch = self._batch
        if batch is None or req_ids != batch.req_ids:
            batch = self._batch = self._take(req_ids)
        num_reqs = len(req_ids)
        scheduled = num_scheduled_tokens[:num_reqs]
        # Of each request, its rows before its first steered position and those from there on.
        counts = np.empty((num_reqs, 2), dtype=np.int64)
        plain, steered = counts[:, 0], counts[:, 1]
        np.subtract(batch.first_positions, num_computed_tokens[:num_reqs], out=plain)
        np.minimum(np.maximum(plain, 0, out=plain), scheduled, out=plain)
        np.subtract(scheduled, plain, out=steered)
        self._tokens[batch.arms] += steered
        if (held := counts.tobytes()) != batch.counts:
            batch.counts = held
            self._route(batch, counts)

    def steered_tokens(self) -> dict[str, int]:
        """Steered token rows so far, by digest (prompt rows of a recompute count again)."""
        for req_id, index in self._index.items():
            self._count(req_id, index)
        return dict(self._steered_tokens)

    def buffers(self, row_record: torch.Tensor | None = None) -> StepBuffers:
        """The tensors that the layers read."""
        buffers = StepBuffers(self.row_arm, self.arm_circuits, self.arm_multipliers, row_record)
        if self._vectors is None:
            return buffers
        return replace(
            buffers, arm_vectors=self.arm_vectors, arm_coefficients=self.arm_coefficients
        )

    def _acquire_vectors(self, steering: Steering) -> tuple[int, ...]:
        digests = [digest for digest, _ in steering.vectors]
        return self._vectors.acquire(digests) if self._vectors is not None else ()

    def _take(self, req_ids: Sequence[str]) -> _Batch:
        """Looks up the arms of a batch's requests; those that had none get one."""
        found = map(self._index.get, req_ids, repeat(-1))
        arms = np.fromiter(found, dtype=np.intp, count=len(req_ids))
        for i in np.flatnonzero(arms < 0).tolist():
            if req_ids[i] in self._arms:
                arms[i] = self._place(req_ids[i])
        # Copies the list, since runners may change theirs in place.
        return _Batch(list(req_ids), arms, self._first_position[arms])

    def _place(self, req_id: str) -> int:
        arm = self._arms[req_id]
        index = self._free.pop()
        self._index[req_id] = index
        self._circuit_slots.put(index, arm.rows, arm.steering.pairs)
        self._vector_slots.put(index, arm.vector_rows, arm.steering.vectors)
        self._first_position[index] = arm.first_position
        self._tokens[index] = 0
        self._arms_changed = True
        return index

    def _route(self, batch: _Batch, counts: np.ndarray) -> None:
        """Writes the rows of a step. counts: [requests, 2], plain and then steered rows."""
        steered = counts[:, 1]
        acting = np.flatnonzero(steered)
        end = int(acting[-1]) + 1 if acting.size else 0
        arms = np.full((end, 2), -1, dtype=np.int32)
        arms[:, 1] = batch.arms[:end]
        self._write(np.repeat(arms, counts[:end].reshape(-1)))
        self.step = SteeredRows(batch.req_ids, batch.arms, steered) if end else None

    def _write(self, rows: np.ndarray) -> None:
        """Brings ``rows``, -1 after them, and new arms to the device, in one copy or none."""
        start = 0 if self._arms_changed else self._rows_start
        stop = self._rows_start
        if not np.array_equal(rows, self._rows[: self._end]):
            stop += max(len(rows), self._end)
            self._rows[len(rows) : self._end] = -1
            self._rows[: len(rows)] = rows
            self._end = len(rows)
        if start < stop:
            self._staging.upload(start, stop)
            self._arms_changed = False

    def _count(self, req_id: str, index: int) -> None:
        tokens = int(self._tokens[index])
        self._tokens[index] = 0
        if tokens:
            self._steered_tokens.add(set(self._arms[req_id].steering.digests), tokens)
