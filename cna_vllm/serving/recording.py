# SPDX-License-Identifier: Apache-2.0
"""Recording of last-prompt-token activations inside the engine, for discovery.

Each layer copies the flagged rows of a step to a staging slot; before the next step the slots
are added to per-group float64 sums on the device. Memory does not grow with the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cna_vllm.serving.state import upload


@dataclass(frozen=True)
class _Pending:
    group: str
    position: int


class Recorder:
    """Sums of the activations at position P - 1 of the requests of each group, on one rank.

    A request is recorded once, at the first step that computes its last prompt token; a
    recompute after preemption does not count it again.
    """

    def __init__(
        self,
        layers: Sequence[int],
        offset: int,
        width: int,
        dtype: torch.dtype,
        max_num_reqs: int,
        max_num_tokens: int,
        device: torch.device,
    ) -> None:
        self._layers = tuple(layers)
        self._offset = offset
        self.row_record = torch.full((max_num_tokens,), -1, dtype=torch.int32, device=device)
        # A step finishes at most one prompt per request, so a slot per request is enough.
        self._stage = torch.zeros(
            len(self._layers), max_num_reqs, width, dtype=dtype, device=device
        )
        self._pending: dict[str, _Pending] = {}
        self._recorded: set[str] = set()
        self._staged: list[str] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._dirty = False

    def layer_stage(self, layer: int) -> torch.Tensor:
        """[slots, width]: where one layer copies flagged rows, a fixed view."""
        return self._stage[self._layers.index(layer)]

    def add(self, req_id: str, group: str | None, prompt_len: int) -> None:
        """Asks for one recording of a request's last prompt token."""
        self._pending.pop(req_id, None)
        if group is not None and req_id not in self._recorded:
            self._pending[req_id] = _Pending(group, prompt_len - 1)

    def remove(self, req_id: str) -> None:
        """Forgets a request that has not been recorded."""
        self._pending.pop(req_id, None)

    def fill(
        self,
        req_ids: Sequence[str],
        num_scheduled_tokens: np.ndarray,
        num_computed_tokens: np.ndarray,
    ) -> None:
        """Flags the rows of the coming step that hold a wanted last prompt token."""
        self._drain()
        if not self._pending:
            if self._dirty:
                self.row_record.fill_(-1)
                self._dirty = False
            return
        rows = np.full(len(self.row_record), -1, dtype=np.int32)
        start = 0
        for i, req_id in enumerate(req_ids):
            scheduled, computed = int(num_scheduled_tokens[i]), int(num_computed_tokens[i])
            want = self._pending.get(req_id)
            if want is not None and computed <= want.position < computed + scheduled:
                rows[start + want.position - computed] = len(self._staged)
                self._staged.append(want.group)
                del self._pending[req_id]
                self._recorded.add(req_id)
            start += scheduled
        upload(self.row_record, rows)
        self._dirty = bool(self._staged)

    def take(self) -> dict[str, Any]:
        """The sums since the last call, in types that cross process boundaries; then resets.

        {"layers", "offset", "width", "groups": {group: {"count", "sum": float64 bytes of
        [layers, width]}}}
        """
        self._drain()
        groups = {
            group: {"count": self._counts[group], "sum": total.cpu().numpy().tobytes()}
            for group, total in self._sums.items()
        }
        self._sums, self._counts = {}, {}
        self._recorded.clear()
        return {
            "layers": list(self._layers),
            "offset": self._offset,
            "width": self._stage.shape[2],
            "groups": groups,
        }

    def _drain(self) -> None:
        for group in dict.fromkeys(self._staged):
            slots = [i for i, g in enumerate(self._staged) if g == group]
            index = torch.tensor(slots, device=self._stage.device)
            total = self._stage.index_select(1, index).sum(1, dtype=torch.float64)
            self._sums[group] = self._sums[group] + total if group in self._sums else total
            self._counts[group] = self._counts.get(group, 0) + len(slots)
        self._staged = []
