# SPDX-License-Identifier: Apache-2.0
"""Recording of last-prompt-token activations inside the engine, for discovery.

Each layer copies the flagged rows of a step to a staging slot (``share``); before the next step
each slot goes to the sink of its group (``sinks``), on the device. Memory does not grow with the
prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cna_vllm.serving.worker.experts import RoutedExperts
from cna_vllm.serving.worker.share import Part, Share
from cna_vllm.serving.worker.sinks import Rows, Sum, Top
from cna_vllm.serving.worker.staging import Staging


class Recorder:
    """Activations at position P - 1 of the requests of each group, on one rank.

    Kept as a sum per group, unless ``start`` asked for something else. A request is recorded
    once, at the first step that computes its last prompt token; a recompute after preemption does
    not count it again.
    """

    def __init__(
        self,
        dense: Sequence[Part],
        dtype: torch.dtype,
        max_num_reqs: int,
        max_num_tokens: int,
        device: torch.device,
        routed: Sequence[RoutedExperts] = (),
    ) -> None:
        """dense: this rank's part of each dense or shared MLP, or of whatever else is recorded."""
        self._staging = Staging([(max_num_tokens,)], device)
        self._row_record = self._staging.blocks[0].host
        self.row_record = self._staging.blocks[0].device
        self._row_record[:] = -1
        self._staging.upload()
        # A step finishes at most one prompt per request, so a slot per request is enough.
        self.share = Share(dense, routed, max_num_reqs, dtype, device)
        self._dtype, self._device = dtype, device
        # Group, and position of the last prompt token, of requests not yet recorded.
        self._pending: dict[str, tuple[str, int]] = {}
        self._recorded: set[str] = set()
        # Request and group of each staging slot in use.
        self._staged: list[tuple[str, str]] = []
        self._sums: dict[str, Sum] = {}
        self._tops: dict[str, Top] = {}
        self._rows: Rows | None = None
        self._row_layers: list[int] = []
        self._dirty = False

    @property
    def nbytes(self) -> int:
        """Device memory of all that is held, in bytes."""
        kept: list[Sum | Top | Rows] = [*self._sums.values(), *self._tops.values()]
        if self._rows is not None:
            kept.append(self._rows)
        return self.row_record.nbytes + self.share.nbytes + sum(sink.nbytes for sink in kept)

    @torch.inference_mode()
    def start(
        self,
        top: Mapping[str, int] | None = None,
        top_prompts: int = 0,
        row_layers: Sequence[int] = (),
        row_prompts: int = 0,
    ) -> None:
        """Forgets what was recorded and says what to keep until the next ``take``.

        top: group -> k: of these groups, the k strongest neurons of each of up to ``top_prompts``
        prompts instead of a sum. row_layers: of all groups, instead of sums, the activations of
        these layers (those of them that this rank has) of up to ``row_prompts`` prompts.
        """
        self.take()
        share, device = self.share, self._device
        for group, k in (top or {}).items():
            self._tops[group] = Top(k, top_prompts, share.neurons, device)
        if row_prompts:
            mine = {part.layer for part in share.parts}
            self._row_layers = [layer for layer in row_layers if layer in mine]
            places = [share.layer(layer) for layer in self._row_layers]
            self._rows = Rows(places, row_prompts, len(share.parts), self._dtype, device)

    def add(self, req_id: str, group: str | None, prompt_len: int) -> None:
        """Asks for one recording of a request's last prompt token."""
        self.remove(req_id)
        if group is not None and req_id not in self._recorded:
            self._pending[req_id] = (group, prompt_len - 1)

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
        if not self._pending and not self._dirty:
            return
        rows = self._row_record
        rows[:] = -1
        start = 0
        for i, req_id in enumerate(req_ids):
            scheduled, computed = int(num_scheduled_tokens[i]), int(num_computed_tokens[i])
            group, position = self._pending.get(req_id, ("", -1))
            if computed <= position < computed + scheduled:
                rows[start + position - computed] = len(self._staged)
                self._staged.append((req_id, group))
                del self._pending[req_id]
                self._recorded.add(req_id)
            start += scheduled
        self._staging.upload()
        self._dirty = bool(self._staged)

    @torch.inference_mode()
    def take(self) -> dict[str, Any]:
        """What was kept since ``start`` or the last call, in types that cross process borders.

        {"parts": int32 bytes of [MLPs, (layer, expert, offset, width)], see ``Part``; "groups":
        {group: Sum's report}, "top": {group: Top's report}, "rows": None or {"layers", and Rows'
        report}}. Neurons are those of the parts, in their order. Afterwards sums are kept again.
        """
        self._drain()
        report = {
            "parts": np.array(self.share.parts, dtype=np.int32).tobytes(),
            "groups": {group: kept.report() for group, kept in self._sums.items()},
            "top": {group: kept.report() for group, kept in self._tops.items()},
            "rows": (
                None if self._rows is None else {"layers": self._row_layers, **self._rows.report()}
            ),
        }
        self._sums, self._tops, self._rows, self._row_layers = {}, {}, None, []
        self._recorded.clear()
        return report

    # Steps run in inference mode, calls between them need not: what one makes the other updates.
    @torch.inference_mode()
    def _drain(self) -> None:
        for slot, (req_id, group) in enumerate(self._staged):
            values, reached = self.share.values(slot)
            if group in self._tops:
                self._tops[group].add(req_id, values, reached)
            elif self._rows is not None:
                self._rows.add(group, values, reached)
            else:
                self._sums.setdefault(group, Sum()).add(req_id, values, reached)
        if self._staged:
            self.share.forget()
        self._staged = []
