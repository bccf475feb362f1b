# SPDX-License-Identifier: Apache-2.0
"""A copy that is still queued carries what the host held when it was asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cna_vllm.serving.worker.staging import BUFFERS, Staging

CPU = torch.device("cpu")
WORDS = 6


class Stream:
    """Runs what is queued, in order, when it is told to: a device behind its host."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], None]] = deque()

    def run(self, steps: int) -> None:
        for _ in range(min(steps, len(self.queue))):
            self.queue.popleft()()


class StreamEvent:
    """What ``torch.Event`` is on an accelerator."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._done = True

    def record(self) -> None:
        self._done = False
        self._stream.queue.append(self._reach)

    def query(self) -> bool:
        return self._done

    def _reach(self) -> None:
        self._done = True


class QueuedStaging(Staging):
    """Its copies read their buffers when the stream comes to them, as from pinned memory."""

    def __init__(self, shapes: list[tuple[int, ...]], stream: Stream) -> None:
        self._stream = stream
        super().__init__(shapes, CPU, lambda: StreamEvent(stream))

    def _copy(self, source: torch.Tensor, start: int, stop: int | None) -> None:
        later = super()._copy
        self._stream.queue.append(lambda: later(source, start, stop))

    @property
    def buffers(self) -> int:
        return len(self._buffers)


STEPS = st.lists(
    st.tuples(st.integers(0, WORDS), st.integers(0, WORDS), st.integers(0, 4)), max_size=40
)


@given(STEPS)
@settings(max_examples=200, deadline=None)
def test_the_device_sees_each_step_as_it_was(steps: list[tuple[int, int, int]]) -> None:
    stream = Stream()
    staging = QueuedStaging([(WORDS,)], stream)
    (block,) = staging.blocks
    expected = [0] * WORDS
    wanted: list[list[int]] = []
    looks: list[list[int]] = []
    most_queued = 0
    for number, (start, stop, run) in enumerate(steps, 1):
        block.host[:] = number
        expected[start:stop] = [number] * max(stop - start, 0)
        staging.upload(start, stop)
        stream.queue.append(lambda: looks.append(block.device.tolist()))
        wanted.append(list(expected))
        most_queued = max(most_queued, len(wanted) - len(looks))
        stream.run(run)
    block.host[:] = -1
    stream.run(10**6)
    assert looks == wanted
    assert staging.buffers <= max(BUFFERS, most_queued + 1)


def test_buffers_are_kept() -> None:
    """As many as a schedule of two steps in flight needs are there from the start."""
    stream = Stream()
    staging = QueuedStaging([(WORDS,)], stream)
    for _ in range(20):
        staging.upload()
        stream.run(2 * (len(stream.queue) > 4))
    assert staging.buffers == BUFFERS
    for _ in range(9):
        staging.upload()
    deepest = staging.buffers
    assert deepest > BUFFERS
    for _ in range(3):
        stream.run(10**6)
        for _ in range(9):
            staging.upload()
    assert staging.buffers == deepest


def test_blocks_are_aligned_and_apart() -> None:
    staging = Staging([(3, 3), (2, 0), (5,)], CPU)
    assert [block.start for block in staging.blocks] == [0, 12, 12]
    assert [tuple(block.device.shape) for block in staging.blocks] == [(3, 3), (2, 0), (5,)]
    first, _, last = staging.blocks
    first.host[:], last.host[:] = 1, 2
    staging.upload(last.start)
    assert first.device.sum() == 0 and last.device.tolist() == [2] * 5
    staging.upload()
    assert first.device.tolist() == [[1] * 3] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose copies are queued")
def test_a_gpu_that_is_behind_sees_each_step_as_it_was() -> None:
    device = torch.device("cuda")
    staging = Staging([(4096,)], device)
    (block,) = staging.blocks
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about 0.1 s, in which all of the following is queued
    seen = []
    for number in range(20):
        block.host[:] = number
        staging.upload()
        seen.append(block.device.clone())
    assert [int(s.min()) for s in seen] == [int(s.max()) for s in seen] == list(range(20))
