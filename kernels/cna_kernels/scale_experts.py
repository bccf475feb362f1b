# SPDX-License-Identifier: Apache-2.0
"""``scale_experts``: scales listed neurons of routed experts, in place, between their two matmuls.

Row r of the activation is choice r % topk of token r // topk, as vLLM's Triton and Marlin experts
keep it: they sort indices, never rows. The stock activation has run before, whatever it is, so what
is not listed keeps its bits.

Neurons are sorted lists, not bit masks: a circuit holds about one neuron in a thousand, and masks
of all experts would take E * I / 8 bytes a layer and circuit (12 KiB for 128 experts of 768). A
circuit's list has one offset for each (layer, expert), 4 * (E + 1) bytes a layer and circuit, so
that a program finds its neurons with one 8-byte read; searching a list sorted by (expert, index)
would save those bytes for some seven dependent reads.

One launch a layer, of a program for every row with one warp: a token that is not steered costs a
4-byte load, a steered one reads 24 bytes, and 4 a neuron beside the elements themselves. The grid
is fixed by the shapes and nothing is allocated, so a launch can be captured in a CUDA graph and
routing may change between replays.

Counted in the machine code for sm_80, sm_90 and sm_100: 25 registers with one circuit a request, 39
with four, nothing spilled; a row that is not steered ends after 11 instructions. What follows is
predicted from that and not yet measured, for Qwen3-30B-A3B (48 layers, 128 experts of 768, top 8,
bfloat16) and a circuit of one neuron in a thousand, 0.8 in an expert:

==================================  ========  ==============  =====================
a step                              launches  bytes a layer   on an H100, a layer
==================================  ========  ==============  =====================
decode, 32 rows, 8 of them steered  48        3.5 KB          1.6 to 2 us: a launch
prefill, 8192 rows, none steered    48        32 KB of slots  10 us: 65,536 programs
prefill, 8192 rows, all steered     48        2.8 MB          45 us: loads that wait
==================================  ========  ==============  =====================

That is 0.1 ms of a decoding step that reads 50 GB of weights, about 17 ms; 0.5 and 2.2 ms of a
prefill of some 100 ms. Of one token alone, which reads 6 GB, it is 0.1 ms of 2 to 3. Memory: 129
offsets of 4 bytes a layer and circuit, 3.2 MB for 128 circuits, and 4 bytes a neuron.
"""

from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from cna_kernels.cpu import scale_entries
from cna_kernels.library import define_op

BLOCK: Final = 64
NUM_WARPS: Final = 1

MAX_ENTRIES: Final = 1 << 20
"""Neurons that the CPU path resolves at once, unless one row has more."""


def scale_experts_reference(
    activation: Tensor,
    topk_ids: Tensor,
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    offsets: Tensor,
    neurons: Tensor,
) -> None:
    """The definition of :func:`scale_experts`, row by row and neuron by neuron."""
    tokens, topk = topk_ids.shape
    for row in range(tokens * topk):
        slot, expert = int(row_slot[row // topk]), int(topk_ids[row // topk, row % topk])
        if slot < 0 or not 0 <= expert < offsets.shape[1] - 1:
            continue
        factors: dict[int, Tensor] = {}
        for circuit, multiplier in zip(slot_circuits[slot], slot_multipliers[slot], strict=True):
            if circuit >= 0:
                begin, end = offsets[circuit, expert : expert + 2].tolist()
                for channel in neurons[circuit, begin:end].tolist():
                    factors[channel] = factors.get(channel, torch.tensor(1.0)) * multiplier
        for channel, factor in factors.items():
            scaled = factor * activation[row, channel].float()
            activation[row, channel] = 0.0 if factor == 0 else scaled.to(activation.dtype)


@triton.jit
def held_in(  # type: ignore[no-untyped-def]
    channel,
    neurons_ptr,
    begin,
    end,
):
    """Which of the channels are in the sorted list [begin, end) of ``neurons_ptr``."""
    low = tl.zeros_like(channel) + begin
    left = end - begin
    while left > 1:
        half = left // 2
        # Every lane stays inside the list: low + left <= end.
        below = tl.load(neurons_ptr + low + half - 1) < channel
        low = tl.where(below, low + half, low)
        left = left - half
    some = low < end
    return some & (tl.load(neurons_ptr + low, mask=some, other=-1) == channel)


@triton.jit(
    do_not_specialize_on_alignment=[
        "topk_ids_ptr",
        "row_slot_ptr",
        "slot_circuits_ptr",
        "slot_multipliers_ptr",
        "offsets_ptr",
        "neurons_ptr",
    ],
    do_not_specialize=["topk", "experts", "capacity"],
)
def scale_experts_kernel(  # type: ignore[no-untyped-def]
    activation_ptr,
    topk_ids_ptr,
    row_slot_ptr,
    slot_circuits_ptr,
    slot_multipliers_ptr,
    offsets_ptr,
    neurons_ptr,
    size,
    topk,
    experts,
    capacity,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slot_ptr + token).to(tl.int64)
    if slot >= 0:
        row = token * topk + tl.program_id(1)
        expert = tl.load(topk_ids_ptr + row).to(tl.int64)
        # Others are not the model's: padding, or a shared expert that was fused with the routed.
        if (expert >= 0) & (expert < experts):
            at = activation_ptr + row * size
            for entry in tl.static_range(K):
                circuit = tl.load(slot_circuits_ptr + slot * K + entry).to(tl.int64)
                if circuit >= 0:
                    of = offsets_ptr + circuit * (experts + 1) + expert
                    end = tl.load(of + 1)
                    for start in range(tl.load(of), end, BLOCK):
                        place = start + tl.arange(0, BLOCK)
                        live = place < end
                        listed = neurons_ptr + circuit * capacity + place
                        channel = tl.load(listed, mask=live, other=0)
                        factor = tl.full([BLOCK], 1.0, tl.float32)
                        for other in tl.static_range(K):
                            others = tl.load(slot_circuits_ptr + slot * K + other).to(tl.int64)
                            if others >= 0:
                                multiplier = tl.load(slot_multipliers_ptr + slot * K + other)
                                if other == entry:
                                    factor = factor * multiplier
                                else:
                                    bounds = offsets_ptr + others * (experts + 1) + expert
                                    held = held_in(
                                        channel,
                                        neurons_ptr + others * capacity,
                                        tl.load(bounds),
                                        tl.load(bounds + 1),
                                    )
                                    factor = tl.where(held, factor * multiplier, factor)
                                    # The first circuit that holds a neuron writes it, alone.
                                    if other < entry:
                                        live = live & (held == 0)
                        before = tl.load(at + channel, mask=live, other=0.0)
                        scaled = factor * before.to(tl.float32)
                        after = tl.where(factor == 0, 0.0, scaled).to(before.dtype)
                        tl.store(at + channel, after, mask=live)


def scale_experts_triton(
    activation: Tensor,
    topk_ids: Tensor,
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    offsets: Tensor,
    neurons: Tensor,
) -> None:
    """See :func:`scale_experts`, which dispatches here."""
    tokens, topk = topk_ids.shape
    if not tokens:
        return
    kernel: Any = scale_experts_kernel
    kernel[(tokens, topk)](
        activation,
        topk_ids,
        row_slot,
        slot_circuits,
        slot_multipliers,
        offsets,
        neurons,
        activation.shape[1],
        topk,
        offsets.shape[1] - 1,
        neurons.shape[1],
        K=slot_circuits.shape[1],
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def scale_experts_cpu(
    activation: Tensor,
    topk_ids: Tensor,
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    offsets: Tensor,
    neurons: Tensor,
) -> None:
    """See :func:`scale_experts`, which dispatches here; of steered rows it touches what is listed,
    and at most MAX_ENTRIES neurons at once."""
    tokens, topk = topk_ids.shape
    slots = row_slot.numpy()[:tokens]
    steered = (slots >= 0).nonzero()[0]
    if not steered.size:
        return
    slots = slots.take(steered)
    experts = topk_ids.numpy()[steered]  # [steered, topk]
    circuits = slot_circuits.numpy()[slots]  # [steered, K]
    bounds, lists = offsets.numpy(), neurons.numpy()
    inside = (experts >= 0) & (experts < bounds.shape[1] - 1)
    token, choice, entry = np.nonzero(inside[:, :, None] & (circuits >= 0)[:, None, :])
    circuit, expert = circuits[token, entry], experts[token, choice]
    begin = bounds[circuit, expert].astype(np.intp)
    count = bounds[circuit, expert + 1] - begin
    row = steered[token] * topk + choice
    multiplier = slot_multipliers.numpy()[slots[token], entry]
    ends = np.cumsum(count)
    start = 0
    while start < row.size:
        done = ends[start] - count[start]
        stop = max(start + 1, int(np.searchsorted(ends, done + MAX_ENTRIES, side="right")))
        while stop < row.size and row[stop] == row[stop - 1]:  # a row is never split
            stop += 1
        part = slice(start, stop)
        n = count[part]
        pair = np.repeat(np.arange(n.size), n)
        place = np.arange(pair.size) - (ends[part] - n - done)[pair] + begin[part][pair]
        at = row[part][pair] * activation.shape[1] + lists[circuit[part][pair], place]
        _scale_all(activation, at, multiplier[part][pair])
        start = stop


def _scale_all(activation: Tensor, at: Any, multiplier: Any) -> None:
    """at: flat indices, equal ones in entry order; their multipliers are multiplied first."""
    if not at.size:
        return
    order = at.argsort(kind="stable")
    at = at[order]
    first = np.concatenate(([True], at[1:] != at[:-1])).nonzero()[0]
    factor = np.asarray(np.multiply.reduceat(multiplier[order], first))
    scale_entries(activation, at[first], factor)


_OP: Final = define_op(
    "scale_experts(Tensor(a!) activation, Tensor topk_ids, Tensor row_slot, Tensor slot_circuits, "
    "Tensor slot_multipliers, Tensor offsets, Tensor neurons) -> ()",
    scale_experts_triton,
    scale_experts_cpu,
)


def scale_experts(
    activation: Tensor,
    topk_ids: Tensor,
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    offsets: Tensor,
    neurons: Tensor,
) -> None:
    """activation[r, j] = f * activation[r, j] for the neurons j of the circuits of row r's token.

    Row r is token t = r // topk, routed to expert e = topk_ids[t, r % topk]. f is the float32
    product, in entry order, of the multipliers of those entries of slot row_slot[t] whose circuit
    lists j for e; it is applied in float32 and rounded once, and where it is 0, +0 is written.
    Everything else keeps its bits, as do rows of experts outside [0, E).

    Args:
        activation: [T * topk, I] float32, bfloat16 or float16, contiguous, written in place.
        topk_ids: [T, topk] int32 or int64, contiguous.
        row_slot: [>= T] int32, slot of each token, -1 = not steered. Tokens past T are never read.
        slot_circuits: [S, K] int32, circuit rows of each slot; -1, anywhere, is an unused entry.
        slot_multipliers: [S, K] float32.
        offsets: [C, E + 1] int32, contiguous: the neurons of expert e in this layer are
            neurons[c, offsets[c, e]:offsets[c, e + 1]].
        neurons: [C, N] int32, contiguous: channels, ascending within an expert, none twice.

    Operands are trusted.
    """
    _OP(activation, topk_ids, row_slot, slot_circuits, slot_multipliers, offsets, neurons)
