# SPDX-License-Identifier: Apache-2.0
"""``add_vectors``: adds steering vectors to the rows of a layer's output, in place.

Rows are the routing of ``act_and_mul_scaled``: the same ``row_slot``, with tables of its own behind
it. In place, so that a row that is not steered costs one 4-byte load and keeps its bits. The grid
is fixed by the shape of hidden and nothing is allocated, so a launch can be captured in a CUDA
graph and routing may change between replays.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from cna_kernels.library import define_op

BLOCK: Final = 1024
NUM_WARPS: Final = 4 if torch.version.hip is None else 2

MAX_ELEMENTS: Final = 1 << 21
"""Elements of the largest temporary on the CPU, whatever the number of rows."""


def add_vectors_reference(
    hidden: Tensor,
    row_slot: Tensor,
    slot_vectors: Tensor,
    slot_coefficients: Tensor,
    vectors: Tensor,
) -> None:
    """The definition of :func:`add_vectors`, row by row and entry by entry."""
    for row in range(hidden.shape[0]):
        slot = int(row_slot[row])
        if slot < 0:
            continue
        total = hidden[row].float()
        for entry in range(slot_vectors.shape[1]):
            index = int(slot_vectors[slot, entry])
            if index >= 0:
                total = total + slot_coefficients[slot, entry] * vectors[index]
        if bool((slot_vectors[slot] >= 0).any()):
            hidden[row] = total.to(hidden.dtype)


@triton.jit(
    do_not_specialize_on_alignment=[
        "row_slot_ptr",
        "slot_vectors_ptr",
        "slot_coefficients_ptr",
    ]
)
def add_vectors_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,
    row_slot_ptr,
    slot_vectors_ptr,
    slot_coefficients_ptr,
    vectors_ptr,
    row_stride,
    size,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slot_ptr + row).to(tl.int64)
    if slot >= 0:
        channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        highest = tl.load(slot_vectors_ptr + slot * K)
        for entry in tl.static_range(1, K):
            highest = tl.maximum(highest, tl.load(slot_vectors_ptr + slot * K + entry))
        # A slot of circuits only costs no access to hidden.
        live = channel < tl.where(highest >= 0, size, 0)
        at = hidden_ptr + row * row_stride + channel
        before = tl.load(at, mask=live, other=0.0)
        total = before.to(tl.float32)
        for entry in tl.static_range(K):
            index = tl.load(slot_vectors_ptr + slot * K + entry).to(tl.int64)
            coefficient = tl.load(slot_coefficients_ptr + slot * K + entry)
            used = channel < tl.where(index >= 0, size, 0)
            vector = tl.load(vectors_ptr + index * size + channel, mask=used, other=0.0)
            total = tl.where(used, total + coefficient * vector, total)
        tl.store(at, total.to(before.dtype), mask=live)


def add_vectors_triton(
    hidden: Tensor,
    row_slot: Tensor,
    slot_vectors: Tensor,
    slot_coefficients: Tensor,
    vectors: Tensor,
) -> None:
    """See :func:`add_vectors`, which dispatches here; fused multiply-adds are off."""
    rows, size = hidden.shape
    kernel: Any = add_vectors_kernel
    kernel[(rows, -(-size // BLOCK))](
        hidden,
        row_slot,
        slot_vectors,
        slot_coefficients,
        vectors,
        hidden.stride(0),
        size,
        K=slot_vectors.shape[1],
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def add_vectors_cpu(
    hidden: Tensor,
    row_slot: Tensor,
    slot_vectors: Tensor,
    slot_coefficients: Tensor,
    vectors: Tensor,
) -> None:
    """See :func:`add_vectors`, which dispatches here; temporaries hold MAX_ELEMENTS at most."""
    slots, vectors_of = row_slot.numpy()[: len(hidden)], slot_vectors.numpy()
    rows = ((slots >= 0) & (vectors_of >= 0).any(1).take(slots)).nonzero()[0]
    step = max(1, MAX_ELEMENTS // hidden.shape[1])
    for start in range(0, rows.size, step):
        part = rows[start : start + step]
        chosen, at = slots.take(part), torch.from_numpy(part)
        total = hidden.index_select(0, at).float()
        for entry, index in enumerate(vectors_of.take(chosen, 0).T):
            which = (index >= 0).nonzero()[0]
            coefficient = slot_coefficients.numpy()[chosen.take(which), entry, None]
            added = vectors.index_select(0, torch.from_numpy(index.take(which)))
            added.mul_(torch.from_numpy(coefficient))
            total.index_add_(0, torch.from_numpy(which), added)
        hidden.index_copy_(0, at, total.to(hidden.dtype))


_OP: Final = define_op(
    "add_vectors(Tensor(a!) hidden, Tensor row_slot, Tensor slot_vectors, "
    "Tensor slot_coefficients, Tensor vectors) -> ()",
    add_vectors_triton,
    add_vectors_cpu,
)


def add_vectors(
    hidden: Tensor,
    row_slot: Tensor,
    slot_vectors: Tensor,
    slot_coefficients: Tensor,
    vectors: Tensor,
) -> None:
    """hidden[t] = round(hidden[t] + sum_k c_k * v_k) over the entries k of slot row_slot[t].

    Everything is float32: each product c_k * v_k is rounded, then each sum, in entry order,
    beginning with hidden[t]; the result is rounded once to the dtype of hidden. For float32 and
    one vector that is eager ``hidden[t] + c * v`` to the bit. Rows without a slot, or whose slot
    has no vector, keep their bits.

    Args:
        hidden: [T, H] float32, bfloat16 or float16, written in place. The last dimension is
            contiguous.
        row_slot: [>= T] int32, slot of each row, -1 = not steered. Rows past T are never read.
        slot_vectors: [S, K] int32, rows of ``vectors``; -1, anywhere, is an unused entry.
        slot_coefficients: [S, K] float32.
        vectors: [N, H] float32, contiguous.

    Operands are trusted: row_slot[t] < S and slot_vectors[a, k] < N.
    """
    _OP(hidden, row_slot, slot_vectors, slot_coefficients, vectors)
