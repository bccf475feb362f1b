# SPDX-License-Identifier: Apache-2.0
"""What the host writes and the device reads: one tensor, renewed in one copy nobody waits for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Protocol

import numpy as np
import torch

BUFFERS = 3
"""Pinned buffers at the start: two steps may be queued while a third is prepared."""

_ALIGNED = 4
"""Blocks start at multiples of so many words: 16 bytes, what kernels load at once."""


class Event(Protocol):
    """Of ``torch.Event``, what is used here."""

    def record(self) -> None:
        """Marks the end of what is queued on the current stream."""

    def query(self) -> bool:
        """Whether all that was queued before the mark has run; true without a mark."""
        ...


@dataclass(frozen=True)
class Block:
    """A shaped part of the words, from word ``start`` on. Write ``host``, then upload."""

    start: int
    host: np.ndarray
    device: torch.Tensor


@dataclass(frozen=True)
class _Buffer:
    tensor: torch.Tensor
    words: np.ndarray
    copied: Event


class Staging:
    """Blocks of int32 words on the host and, at fixed addresses, on the device.

    On an accelerator each upload goes through a pinned buffer, so that steps may be queued to any
    depth while the host's words change. Buffers are kept and taken in turns. One whose copy is
    still queued is never written: then there is one more, at most one per step in flight.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        device: torch.device,
        new_event: Callable[[], Event] | None = None,
    ) -> None:
        """new_event: events of the device; None for ``torch.Event``, and on the CPU for none,
        where a copy has run when it returns."""
        if new_event is None and device.type != "cpu":
            new_event = partial(torch.Event, device)
        self._new_event = new_event
        starts, words = [], 0
        for shape in shapes:
            starts.append(words)
            words += -(-prod(shape) // _ALIGNED) * _ALIGNED
        self._host = torch.zeros(words, dtype=torch.int32)
        self._words = self._host.numpy()
        self._device = torch.zeros(words, dtype=torch.int32, device=device)
        self.blocks = tuple(
            Block(
                start,
                self._words[start : start + prod(shape)].reshape(shape),
                self._device[start : start + prod(shape)].view(shape),
            )
            for start, shape in zip(starts, shapes, strict=True)
        )
        # The one that was used longest ago first; none on the CPU.
        self._buffers: deque[_Buffer] = deque()
        if new_event is not None:
            self._buffers.extend(self._new_buffer(new_event) for _ in range(BUFFERS))

    def upload(self, start: int = 0, stop: int | None = None) -> None:
        """Renews words [start, stop) of the device in the order of the current stream."""
        if self._new_event is None:
            self._copy(self._host, start, stop)
            return
        if not self._buffers[0].copied.query():
            self._buffers.appendleft(self._new_buffer(self._new_event))
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        buffer.words[start:stop] = self._words[start:stop]
        self._copy(buffer.tensor, start, stop)
        buffer.copied.record()

    def _copy(self, source: torch.Tensor, start: int, stop: int | None) -> None:
        self._device[start:stop].copy_(source[start:stop], non_blocking=True)

    def _new_buffer(self, new_event: Callable[[], Event]) -> _Buffer:
        pinned = self._device.device.type != "cpu"
        tensor = torch.zeros(len(self._words), dtype=torch.int32, pin_memory=pinned)
        return _Buffer(tensor, tensor.numpy(), new_event())
