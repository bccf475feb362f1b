# SPDX-License-Identifier: Apache-2.0
"""From running requests to the arm of every token row of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cna_vllm.request import Steering
from cna_vllm.serving.activation import StepBuffers
from cna_vllm.serving.table import CircuitTable, CircuitTableError
from cna_vllm.serving.vector_table import VectorTable


@dataclass(frozen=True)
class SteeredRows:
    """What one step steers: requests, their arms, and how many of their token rows."""

    req_ids: tuple[str, ...]
    arms: np.ndarray
    rows: tuple[int, ...]


@dataclass(frozen=True)
class _Arm:
    """What one request wants: table rows, multipliers and coefficients from a position on."""

    steering: Steering
    rows: tuple[int, ...]
    vector_rows: tuple[int, ...]
    first_position: int


class _Slots:
    """One kind of an arm's operands: (table row, number) pairs of every arm, on host and device."""

    def __init__(self, arms: int, slots: int, idle: float, device: torch.device) -> None:
        """idle: the number of an unused slot."""
        self.count = slots
        self._idle = idle
        self._rows = np.full((arms, slots), -1, dtype=np.int32)
        self._numbers = np.full((arms, slots), idle, dtype=np.float32)
        self.rows = torch.from_numpy(self._rows.copy()).to(device)
        self.numbers = torch.from_numpy(self._numbers.copy()).to(device)

    def put(self, arm: int, rows: Sequence[int], pairs: Sequence[tuple[str, float]]) -> None:
        """Sets an arm's slots on the host; ``upload`` brings them to the device."""
        self._rows[arm] = -1
        self._rows[arm, : len(rows)] = rows
        self._numbers[arm] = self._idle
        self._numbers[arm, : len(rows)] = [number for _, number in pairs]

    def upload(self) -> None:
        """Renews the device's copies."""
        upload(self.rows, self._rows)
        upload(self.numbers, self._numbers)


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
        self.row_arm = torch.full((max_num_tokens,), -1, dtype=torch.int32, device=device)
        # The arm tables; the device copies are renewed when an arm changed.
        self._circuit_slots = _Slots(max_num_reqs, slots, 1.0, device)
        self._vector_slots = _Slots(max_num_reqs, vector_slots, 0.0, device)
        self._first_position = np.zeros(max_num_reqs, dtype=np.int64)
        self._tokens = np.zeros(max_num_reqs, dtype=np.int64)
        self._free = list(range(max_num_reqs - 1, -1, -1))
        self._arms: dict[str, _Arm] = {}
        self._index: dict[str, int] = {}
        self._changed = False
        # What row_arm holds up to its last steered row; all rows after that are -1.
        self._rows = np.empty(0, dtype=np.int32)
        self._steered_tokens: Counter[str] = Counter()
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
        self.step = None
        if not self._arms:
            self._write_rows(np.empty(0, dtype=np.int32))
            return
        index_of = self._index
        if len(index_of) < len(self._arms):
            for req_id in req_ids:
                if req_id in self._arms and req_id not in index_of:
                    self._place(req_id)
        if self._changed:
            self._circuit_slots.upload()
            if self._vectors is not None:
                self._vector_slots.upload()
            self._changed = False
        num_reqs = len(req_ids)
        index = np.fromiter((index_of.get(r, -1) for r in req_ids), dtype=np.int32, count=num_reqs)
        scheduled = np.asarray(num_scheduled_tokens[:num_reqs], dtype=np.int64)
        # Rows of a request before its first steered position; all rows when it is plain.
        plain = self._first_position[index] - num_computed_tokens[:num_reqs]
        plain = np.where(index < 0, scheduled, np.clip(plain, 0, scheduled))
        steered = scheduled - plain
        acting = np.flatnonzero(steered)
        if acting.size:
            self._tokens[index[acting]] += steered[acting]
            self.step = SteeredRows(
                tuple(req_ids[i] for i in acting), index[acting], tuple(steered[acting].tolist())
            )

        arms = np.stack([np.full(num_reqs, -1, dtype=np.int32), index], axis=1).reshape(-1)
        counts = np.stack([plain, steered], axis=1).reshape(-1)
        rows = np.repeat(arms, counts)
        self._write_rows(rows[: int(np.flatnonzero(rows >= 0)[-1]) + 1 if steered.any() else 0])

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
        self._circuit_slots.put(index, arm.rows, arm.steering.pairs)
        self._vector_slots.put(index, arm.vector_rows, arm.steering.vectors)
        self._first_position[index] = arm.first_position
        self._tokens[index] = 0
        self._changed = True

    def _count(self, req_id: str, index: int) -> None:
        tokens = int(self._tokens[index])
        self._tokens[index] = 0
        if tokens:
            for digest in set(self._arms[req_id].steering.digests):
                self._steered_tokens[digest] += tokens
