# SPDX-License-Identifier: Apache-2.0
"""The neurons of one rank side by side, and where its layers write the recorded ones.

A token runs through ``topk`` of a layer's routed experts, so that is what a layer writes: with the
ids of the experts, topk * width activations for a recorded token, not experts * width of them.
``values`` puts them to their places among all neurons of the rank, 0 where a token was not routed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch

from cna_vllm.serving.worker.experts import RoutedExperts

NO_EXPERT = -1
NOT_ROUTED = -1


class Part(NamedTuple):
    """Neurons [offset, offset + width) of one MLP of a decoder layer.

    expert: of which routed expert they are, by the model's numbers; NO_EXPERT for those of the
    layer's dense or shared MLP.
    """

    layer: int
    expert: int
    offset: int
    width: int


class Share:
    """What this rank records of: its parts by layer, and in a layer by expert, -1 first."""

    def __init__(
        self,
        dense: Sequence[Part],
        routed: Sequence[RoutedExperts],
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """dense: of dense and shared MLPs. slots: prompts that one step may finish."""
        dense = sorted(dense)
        experts = [Part(r.layer, e, r.offset, r.width) for r in routed for e in r.local]
        self.parts = sorted([*dense, *experts])
        starts = list(accumulate((part.width for part in self.parts), initial=0))
        self.neurons = starts[-1]
        self._starts = dict(zip(self.parts, starts, strict=False))
        self._dense = {
            part.layer: torch.zeros(slots, part.width, dtype=dtype, device=device) for part in dense
        }
        self._acted = {
            r.layer: torch.zeros(slots, r.topk * r.width, dtype=dtype, device=device)
            for r in routed
        }
        self._ids = {
            r.layer: torch.full((slots, r.topk), NOT_ROUTED, dtype=torch.int32, device=device)
            for r in routed
        }
        none = torch.zeros(slots, 0, dtype=dtype, device=device)  # a rank may have no layers
        self._stages = [none, *self._dense.values(), *self._acted.values()]
        self._reached = torch.ones(len(self.parts), dtype=torch.uint8, device=device)
        self._places = _Places(self.parts, starts, dense, routed, dtype, device) if routed else None

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        held = chain(self._stages, self._ids.values(), [self._reached])
        return sum(tensor.nbytes for tensor in held) + (self._places.nbytes if self._places else 0)

    def stage(self, layer: int) -> torch.Tensor:
        """[slots, width]: where a layer's dense or shared MLP writes; a fixed view."""
        return self._dense[layer]

    def expert_stage(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a layer's routed experts write: [slots, topk * width], and int32 [slots, topk] of
        their ids; fixed views."""
        return self._acted[layer], self._ids[layer]

    def layer(self, layer: int) -> slice:
        """The places of a layer's neurons among all of this rank."""
        mine = [part for part in self.parts if part.layer == layer]
        return slice(self._starts[mine[0]], self._starts[mine[-1]] + mine[-1].width)

    def values(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What one slot holds: an activation for each neuron of this rank, 0 where the token was
        not routed to its expert, and uint8 for each part: whether the token reached it.

        The next call may overwrite both.
        """
        written = torch.cat([stage[slot] for stage in self._stages])
        if self._places is None:
            return written, self._reached
        return self._places.put(written, torch.cat([ids[slot] for ids in self._ids.values()]))

    def forget(self) -> None:
        """What a later step does not write is not read as if it had."""
        for ids in self._ids.values():
            ids.fill_(NOT_ROUTED)


class _Places:
    """Puts what the layers of one token wrote to the places of its experts.

    What was written is a sequence of runs, each of one MLP: first those of dense and shared MLPs,
    which are always the same; then, for each layer, those of the token's experts.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        starts: Sequence[int],
        dense: Sequence[Part],
        routed: Sequence[RoutedExperts],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def tensor(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        # A part after the last takes what no neuron of this rank is: experts of other ranks, ids
        # that are none of the model's. Its memory is never read.
        nowhere = len(parts)
        self._neurons = starts[-1]
        self._starts = tensor(starts)
        number = {(part.layer, part.expert): i for i, part in enumerate(parts)}
        # By layer, the part of each expert, and at the end that of unknown ids.
        table: list[int] = []
        tables: list[int] = []
        counts: list[int] = []
        for r in routed:
            tables += [len(table)] * r.topk
            counts += [r.experts] * r.topk
            table += [number.get((r.layer, e), nowhere) for e in range(r.experts)] + [nowhere]
        self._table, self._tables, self._counts = map(tensor, (table, tables, counts))
        fixed = [number[part.layer, part.expert] for part in dense]
        self._runs = tensor(fixed + [nowhere] * len(tables))
        self._dense = len(dense)
        widths = [part.width for part in dense] + [r.width for r in routed for _ in range(r.topk)]
        self._run_of = torch.arange(len(widths), device=device).repeat_interleave(tensor(widths))
        run_starts = tensor(list(accumulate(widths, initial=0))[:-1])
        self._column = torch.arange(sum(widths), device=device) - run_starts[self._run_of]
        self._values = torch.zeros(self._neurons + max(widths), dtype=dtype, device=device)
        self._reached = torch.zeros(nowhere + 1, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in vars(self).values() if isinstance(held, torch.Tensor))

    def put(self, written: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """written: all runs. ids: int32, of the runs of routed experts."""
        known = (ids >= 0) & (ids < self._counts)
        self._runs[self._dense :] = self._table[
            self._tables + torch.where(known, ids, self._counts)
        ]
        self._values.zero_()
        self._values[self._starts[self._runs][self._run_of] + self._column] = written
        self._reached.zero_()
        self._reached[self._runs] = 1
        return self._values[: self._neurons], self._reached[:-1]
