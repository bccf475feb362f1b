# SPDX-License-Identifier: Apache-2.0
"""Layers of widths of their own, without an MLP, and with routed experts: what a rank records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cna_kernels import record_rows
from cna_vllm.serving.worker.activation import StepBuffers
from cna_vllm.serving.worker.experts import RoutedExperts, SteeredExperts
from cna_vllm.serving.worker.recording import Recorder
from cna_vllm.serving.worker.share import NO_EXPERT, Part
from cna_vllm.steering.layout import Layout, Places
from cna_vllm.steering.shape import Shape

# A dense layer, one without an MLP, a mixture with a shared expert and one without it.
SHAPE = Shape((6, 0, 4, 0), (0, 0, 4, 3), (0, 0, 2, 8))
LAYOUT = Layout(SHAPE)
TOPK = {2: 3, 3: 2}
MAX_REQS, MAX_TOKENS = 3, 12
CPU = torch.device("cpu")


def routed(layer: int, local: Sequence[int], rank: int, ranks: int) -> RoutedExperts:
    def unused(*_: Any) -> Any:
        raise AssertionError

    width = SHAPE.expert_widths[layer] // ranks
    return RoutedExperts(
        layer=layer,
        path="",
        backend="",
        experts=SHAPE.experts[layer],
        local=local,
        topk=TOPK[layer],
        hidden_size=1,
        width=width,
        offset=rank * width,
        total_width=SHAPE.expert_widths[layer],
        run=unused,
        hook=unused,
    )


class Rank:
    """A recorder with the hooks of routed experts, fed with the rows of a whole model.

    Ranks have a part of every MLP; or, with ``owns``, whole experts of theirs.
    """

    def __init__(self, rank: int, ranks: int, owns: bool = False) -> None:
        self.dense = [
            Part(layer, NO_EXPERT, rank * (width // ranks), width // ranks)
            for layer, width in enumerate(SHAPE.widths)
            if width
        ]
        self.experts = [
            routed(layer, range(rank, count, ranks), 0, 1)
            if owns
            else routed(layer, range(count), rank, ranks)
            for layer, count in enumerate(SHAPE.experts)
            if count
        ]
        batch = (torch.float32, MAX_REQS, MAX_TOKENS, CPU)
        self.recorder = Recorder(self.dense, *batch, self.experts)
        step = StepBuffers(*[torch.zeros(1, 1)] * 3, self.recorder.row_record)
        none = torch.zeros(1, 1, dtype=torch.int32)
        stage = self.recorder.share.expert_stage
        self.hooks = {
            e.layer: SteeredExperts(step, none, none, stage(e.layer)) for e in self.experts
        }

    def run(self, dense: dict[int, torch.Tensor], mixtures: dict[int, Any]) -> None:
        """dense: layer -> [tokens, width]. mixtures: layer -> (ids [tokens, topk], [tokens, topk,
        width of an expert])."""
        for part in self.dense:
            rows = dense[part.layer][:, part.offset : part.offset + part.width].contiguous()
            record_rows(rows, self.recorder.row_record, self.recorder.share.stage(part.layer))
        for found in self.experts:
            ids, values = mixtures[found.layer]
            values = values[:, :, found.offset : found.offset + found.width].clone()
            # What a backend leaves in rows of experts of other ranks.
            values[~torch.isin(ids, torch.tensor(list(found.local)))] = float("nan")
            self.hooks[found.layer].record(values.flatten(0, 1), ids)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(1, False), (2, False), (2, True)]),
    st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=60, deadline=None)
def test_ranks_together_record_the_model(
    seed: int, split: tuple[int, bool], ids_dtype: torch.dtype
) -> None:
    """Sums and counts over several steps; ids that are none of the model's are nobody's."""
    ranks, owns = split
    workers = [Rank(rank, ranks, owns) for rank in range(ranks)]
    generator = torch.Generator().manual_seed(seed)
    total = np.zeros(LAYOUT.size)
    routed_to = np.zeros(LAYOUT.mlps, dtype=np.int64)
    for number in range(4):
        tokens = 5
        dense, mixtures = batch(generator, tokens, ids_dtype)
        for worker in workers:
            worker.recorder.add(f"r{number}", "g", 3)
            worker.recorder.fill([f"r{number}"], np.array([tokens]), np.array([0]))
            worker.run(dense, mixtures)
        values, reached = one_token(dense, mixtures, 2)
        total += values
        routed_to += reached
    found, counts, covered = np.zeros_like(total), np.zeros_like(routed_to), np.zeros(LAYOUT.size)
    for worker in workers:
        taken = worker.recorder.take()
        places = Places.of(taken["parts"], LAYOUT)
        assert taken["groups"]["g"]["count"] == 4
        found[places.neurons] = np.frombuffer(taken["groups"]["g"]["sum"])
        counts[places.mlps] = np.frombuffer(taken["groups"]["g"]["reached"], dtype=np.int64)
        covered[places.neurons] += 1
    assert (covered == 1).all()
    assert np.array_equal(found, total)
    assert np.array_equal(counts, routed_to)


def batch(
    generator: torch.Generator, tokens: int, ids_dtype: torch.dtype = torch.int32
) -> tuple[dict[int, torch.Tensor], dict[int, Any]]:
    def rows(*shape: int) -> torch.Tensor:
        return torch.randint(-99, 99, shape, generator=generator).float() / 8

    dense = {layer: rows(tokens, width) for layer, width in enumerate(SHAPE.widths) if width}
    mixtures = {}
    for layer, topk in TOPK.items():
        # One id more than there are experts, and -1: padding, and a fused shared expert.
        every = torch.rand(tokens, SHAPE.experts[layer] + 2, generator=generator).argsort(1) - 1
        acted = rows(tokens, topk, SHAPE.expert_widths[layer])
        mixtures[layer] = (every[:, :topk].to(ids_dtype).contiguous(), acted)
    return dense, mixtures


def one_token(
    dense: dict[int, torch.Tensor], mixtures: dict[int, Any], token: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Written out: each neuron's activation, and which MLPs the token reached."""
    values, reached = [], []
    for layer in range(SHAPE.num_layers):
        if SHAPE.widths[layer]:
            values += dense[layer][token].tolist()
            reached.append(1)
        for expert in range(SHAPE.experts[layer]):
            ids, acted = mixtures[layer]
            choices = (ids[token] == expert).nonzero()[:, 0].tolist()
            reached.append(len(choices))
            width = SHAPE.expert_widths[layer]
            values += acted[token, choices[0]].tolist() if choices else [0.0] * width
    return np.array(values), np.array(reached)


def test_what_a_layer_does_not_write_is_nobodys() -> None:
    """A slot that was used before does not lend its experts to the next prompt."""
    worker = Rank(0, 1)
    dense, mixtures = batch(torch.Generator().manual_seed(1), 1)
    for number, written in enumerate((mixtures, {})):
        worker.recorder.add(f"r{number}", f"g{number}", 1)
        worker.recorder.fill([f"r{number}"], np.array([1]), np.array([0]))
        if written:
            worker.run(dense, written)
    groups = worker.recorder.take()["groups"]
    experts = LAYOUT.mlp_experts >= 0
    neurons = experts[LAYOUT.mlp_of(np.arange(LAYOUT.size))]
    for group, expected in (("g0", True), ("g1", False)):
        reached = np.frombuffer(groups[group]["reached"], dtype=np.int64)
        assert bool(reached[experts].any()) is expected
        assert bool(np.frombuffer(groups[group]["sum"])[neurons].any()) is expected


@pytest.mark.parametrize("layers", [[0, 2], [3], [1], [2, 3], [0, 1, 2, 3]])
def test_rows_and_the_strongest(layers: list[int]) -> None:
    worker = Rank(0, 1)
    dense, mixtures = batch(torch.Generator().manual_seed(2), 1)
    worker.recorder.start(top={"t": 5}, top_prompts=1, row_layers=layers, row_prompts=1)
    for number, group in enumerate("t0"):
        worker.recorder.add(f"r{number}", group, 1)
        worker.recorder.fill([f"r{number}"], np.array([1]), np.array([0]))
        worker.run(dense, mixtures)
    taken = worker.recorder.take()
    values, reached = one_token(dense, mixtures, 0)
    keys = np.frombuffer(taken["top"]["t"]["keys"], dtype=np.uint64)
    strongest = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:5]
    assert sorted(2**32 - 1 - (keys & np.uint64(2**32 - 1))) == sorted(strongest)
    kept = np.frombuffer(taken["rows"]["rows"], dtype=np.float32)
    with_mlp = [layer for layer in layers if layer != 1]
    assert taken["rows"]["layers"] == with_mlp
    assert kept.tolist() == [v for layer in with_mlp for v in values[LAYOUT.layer(layer)]]
    assert np.array_equal(np.frombuffer(taken["rows"]["reached"], dtype=np.uint8), reached)


def test_memory_of_routed_experts_is_of_those_that_a_token_reaches() -> None:
    """The stage has topk experts a slot, whatever their number."""
    share = Rank(0, 1).recorder.share
    staged = sum(SHAPE.widths) + sum(TOPK[layer] * SHAPE.expert_widths[layer] for layer in TOPK)
    assert share.nbytes >= MAX_REQS * (4 * staged + 4 * sum(TOPK.values()))
    held = [share.stage(layer) for layer in (0, 2)]
    held += [tensor for layer in TOPK for tensor in share.expert_stage(layer)]
    assert sum(tensor.nbytes for tensor in held) == MAX_REQS * 4 * (staged + sum(TOPK.values()))
