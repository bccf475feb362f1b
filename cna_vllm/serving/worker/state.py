# SPDX-License-Identifier: Apache-2.0
"""From running requests to the slot of every token row of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch

from cna_vllm.serving.config import CircuitTableError
from cna_vllm.serving.step_report import SteeredRows, TokenCounts
from cna_vllm.serving.worker.activation import StepBuffers
from cna_vllm.serving.worker.staging import Block, Staging
from cna_vllm.serving.worker.table import CircuitTable, VectorTable
from cna_vllm.steering.resolved import Steering

_NEVER = 1 << 62
"""A position that no request reaches."""


@dataclass(frozen=True)
class _Slot:
    """What one request wants: table rows, multipliers and coefficients from a position on."""

    steering: Steering
    rows: tuple[int, ...]
    vector_rows: tuple[int, ...]
    first_position: int


@dataclass
class _Batch:
    """A batch's requests, while none of them may have another slot.

    slots: intp, -1 for plain requests. first_positions: int64. counts: the bytes of the last
    step's counts, see ``fill``.
    """

    req_ids: list[str]
    slots: np.ndarray
    first_positions: np.ndarray
    counts: bytes | None = None


class _Entries:
    """One kind of a slot's operands: (table row, number) pairs of every slot."""

    def __init__(self, rows: Block, numbers: Block, idle: float) -> None:
        """rows, numbers: [slots, entries]. idle: the number of an unused entry."""
        self.count = rows.host.shape[1]
        self.rows = rows.device
        self.numbers = numbers.device.view(torch.float32)
        self._idle = idle
        self._rows = rows.host
        self._numbers = numbers.host.view(np.float32)
        self._rows[:] = -1
        self._numbers[:] = idle

    def put(self, slot: int, rows: Sequence[int], pairs: Sequence[tuple[str, float]]) -> None:
        """Sets a slot's entries on the host."""
        self._rows[slot] = -1
        self._rows[slot, : len(rows)] = rows
        self._numbers[slot] = self._idle
        self._numbers[slot, : len(rows)] = [number for _, number in pairs]


class SteeringState:
    """Holds the running steered requests and fills the step buffers.

    Host work per step: next to nothing while no steered request runs. While a batch decodes, a
    few array operations of its length. Where requests come and go, one pass over its request ids
    and one packed copy of 4 bytes per token, with the slot tables where a slot is new. It does not
    depend on the number of layers or of resident circuits.
    """

    def __init__(
        self,
        table: CircuitTable,
        max_num_reqs: int,
        max_num_tokens: int,
        entries: int,
        vectors: VectorTable | None = None,
        vector_entries: int = 0,
    ) -> None:
        """entries, vector_entries: circuits and vectors that one request may combine."""
        device = table.device
        self._table = table
        self._vectors = vectors
        # One tensor, so that a step needs one copy: the slot tables, then the slot of each row.
        slots = [(max_num_reqs, entries)] * 2 + [(max_num_reqs, vector_entries)] * 2
        self._staging = Staging([*slots, (max_num_tokens,)], device)
        *tables, rows = self._staging.blocks
        # Entries of a slot, as ``StepBuffers`` has them.
        self._circuit_entries = _Entries(tables[0], tables[1], 1.0)
        self.slot_circuits = self._circuit_entries.rows
        self.slot_multipliers = self._circuit_entries.numbers
        self._vector_entries = _Entries(tables[2], tables[3], 0.0)
        self.slot_vectors = self._vector_entries.rows
        self.slot_coefficients = self._vector_entries.numbers
        self.row_slot = rows.device
        self._rows, self._rows_start = rows.host, rows.start
        self._rows[:] = -1
        self._staging.upload()
        # By slot; the entry after the last stands for plain requests, whose slot is -1.
        self._first_position = np.full(max_num_reqs + 1, _NEVER, dtype=np.int64)
        self._tokens = np.zeros(max_num_reqs + 1, dtype=np.int64)
        self._free = list(range(max_num_reqs - 1, -1, -1))
        self._slots: dict[str, _Slot] = {}
        self._index: dict[str, int] = {}
        self._slots_changed = False
        # What row_slot holds up to its last steered row, in rows; all rows after that are -1.
        self._end = 0
        self._batch: _Batch | None = None
        self._steered_tokens = TokenCounts()
        self.step: SteeredRows | None = None
        """What the last ``fill`` steers; None for a step without a steered row."""

    def add(self, req_id: str, steering: Steering | None, prompt_len: int) -> None:
        """Registers a request at its first step, or again after a resume or an update.

        prompt_len: the original prompt's length, never the length to prefill after a resume.
        Raises CircuitTableError when a circuit or vector is not resident.
        """
        self.remove(req_id)
        if steering is None:
            return
        for noun, pairs, entries in (
            ("circuits", steering.pairs, self._circuit_entries),
            ("vectors", steering.vectors, self._vector_entries),
        ):
            if len(pairs) > entries.count:
                raise ValueError(f"request {req_id} has {len(pairs)} {noun}, over {entries.count}")
        rows = self._table.acquire([digest for digest, _ in steering.pairs])
        try:
            vector_rows = self._acquire_vectors(steering)
        except CircuitTableError:
            self._table.release(rows)
            raise
        self._slots[req_id] = _Slot(
            steering, rows, vector_rows, steering.first_position(prompt_len)
        )
        self._batch = None

    def suspend(self, req_id: str) -> None:
        """Gives back a preempted request's slot index; it takes a new one when it runs again.

        Preempted requests may outnumber the slot indices, running ones never do.
        """
        index = self._index.pop(req_id, None)
        if index is None:
            return
        self._count(req_id, index)
        self._free.append(index)
        self._batch = None

    def remove(self, req_id: str) -> None:
        """Forgets a request; unknown ids are fine, runners announce those too."""
        if req_id not in self._slots:
            return
        self.suspend(req_id)
        slot = self._slots.pop(req_id)
        self._table.release(slot.rows)
        if self._vectors is not None:
            self._vectors.release(slot.vector_rows)

    def fill(
        self,
        req_ids: Sequence[str],
        num_scheduled_tokens: np.ndarray,
        num_computed_tokens: np.ndarray,
    ) -> None:
        """Writes the slot of every token row of the coming step.

        req_ids: the batch in row order. num_scheduled_tokens, num_computed_tokens: int
        [len(req_ids)]; row i of a request is its position num_computed_tokens + i. Rows past the
        batch, up to the longest earlier batch, are reset, so padded rows are plain.
        """
        if not self._slots:
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
        self._tokens[batch.slots] += steered
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
        buffers = StepBuffers(self.row_slot, self.slot_circuits, self.slot_multipliers, row_record)
        if self._vectors is None:
            return buffers
        return replace(
            buffers, slot_vectors=self.slot_vectors, slot_coefficients=self.slot_coefficients
        )

    def _acquire_vectors(self, steering: Steering) -> tuple[int, ...]:
        digests = [digest for digest, _ in steering.vectors]
        return self._vectors.acquire(digests) if self._vectors is not None else ()

    def _take(self, req_ids: Sequence[str]) -> _Batch:
        """Looks up the slots of a batch's requests; those that had none get one."""
        found = map(self._index.get, req_ids, repeat(-1))
        slots = np.fromiter(found, dtype=np.intp, count=len(req_ids))
        for i in np.flatnonzero(slots < 0).tolist():
            if req_ids[i] in self._slots:
                slots[i] = self._place(req_ids[i])
        # Copies the list, since runners may change theirs in place.
        return _Batch(list(req_ids), slots, self._first_position[slots])

    def _place(self, req_id: str) -> int:
        slot = self._slots[req_id]
        index = self._free.pop()
        self._index[req_id] = index
        self._circuit_entries.put(index, slot.rows, slot.steering.pairs)
        self._vector_entries.put(index, slot.vector_rows, slot.steering.vectors)
        self._first_position[index] = slot.first_position
        self._tokens[index] = 0
        self._slots_changed = True
        return index

    def _route(self, batch: _Batch, counts: np.ndarray) -> None:
        """Writes the rows of a step. counts: [requests, 2], plain and then steered rows."""
        steered = counts[:, 1]
        acting = np.flatnonzero(steered)
        end = int(acting[-1]) + 1 if acting.size else 0
        slots = np.full((end, 2), -1, dtype=np.int32)
        slots[:, 1] = batch.slots[:end]
        self._write(np.repeat(slots, counts[:end].reshape(-1)))
        self.step = SteeredRows(batch.req_ids, batch.slots, steered) if end else None

    def _write(self, rows: np.ndarray) -> None:
        """Brings ``rows``, -1 after them, and new slots to the device, in one copy or none."""
        start = 0 if self._slots_changed else self._rows_start
        stop = self._rows_start
        if not np.array_equal(rows, self._rows[: self._end]):
            stop += max(len(rows), self._end)
            self._rows[len(rows) : self._end] = -1
            self._rows[: len(rows)] = rows
            self._end = len(rows)
        if start < stop:
            self._staging.upload(start, stop)
            self._slots_changed = False

    def _count(self, req_id: str, index: int) -> None:
        tokens = int(self._tokens[index])
        self._tokens[index] = 0
        if tokens:
            self._steered_tokens.add(set(self._slots[req_id].steering.digests), tokens)
