# SPDX-License-Identifier: Apache-2.0
"""Operands of ``scale_experts``: random routing, and circuits of every size from none to all."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

CIRCUITS: Final = 4
HOSTILE: Final = (float("inf"), -float("inf"), float("nan"), -0.0, 1e30)


class ExpertCase(NamedTuple):
    """Operands in the order of the op; ``activation`` is written."""

    activation: Tensor
    topk_ids: Tensor
    row_slot: Tensor
    slot_circuits: Tensor
    slot_multipliers: Tensor
    offsets: Tensor
    neurons: Tensor


def make_experts(
    tokens: int,
    topk: int,
    experts: int,
    width: int,
    dtype: torch.dtype,
    ids: torch.dtype = torch.int32,
    seed: int = 0,
) -> ExpertCase:
    """Circuit 0 is empty, 1 sparse, 2 half of all neurons, 3 all of them; lists do not begin at
    0. Slots have no circuit, one, two, the same twice, and three that overlap. Some ids are of no
    expert, some tokens are plain."""
    g = torch.Generator().manual_seed(seed)
    activation = torch.randn(tokens * topk, width, generator=g).to(dtype)
    for i, value in enumerate(HOSTILE):
        activation.view(-1)[i :: 3 * len(HOSTILE)] = value
    choices = [torch.randperm(experts + 1, generator=g)[:topk] for _ in range(tokens)]
    topk_ids = torch.stack(choices) if tokens else torch.zeros(0, topk)
    topk_ids = topk_ids.where(topk_ids < experts, torch.tensor(-1 if seed % 2 else experts))
    lists, offsets = [], torch.zeros(CIRCUITS, experts + 1, dtype=torch.int32)
    for circuit, share in enumerate((0.0, 0.02, 0.5, 1.0)):
        held = torch.rand(experts, width, generator=g) < share
        offsets[circuit, 1:] = held.sum(1).cumsum(0)
        lists.append(torch.cat([torch.full((circuit,), width), held.nonzero()[:, 1]]))
        offsets[circuit] += circuit
    neurons = torch.full((CIRCUITS, max(map(len, lists))), width, dtype=torch.int32)
    for row, held in zip(neurons, lists, strict=True):
        row[: len(held)] = held
    slot_circuits = torch.tensor([[-1, -1, -1], [-1, 1, -1], [2, -1, 1], [3, 2, 3], [1, 2, 3]])
    multipliers = torch.tensor(
        [[9.0, 9, 9], [9, 0.5, 9], [-1.7, 9, 0.3], [1.1, 3.3, -0.7], [2.0, 1.3, 0]]
    )
    row_slot = torch.randint(-1, 5, (tokens + 3,), generator=g)
    return ExpertCase(
        activation,
        topk_ids.to(ids),
        row_slot.int(),
        slot_circuits.int(),
        multipliers.float(),
        offsets,
        neurons,
    )
