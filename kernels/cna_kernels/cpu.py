# SPDX-License-Identifier: Apache-2.0
"""CPU path of ``act_and_mul_scaled`` and ``scale_rows``: sparse steering in place.

Routing is resolved in numpy views of the operands, whose small calls cost a third of torch's.
Only (row, channel) pairs inside a circuit are touched; a batch that decodes resolves them once.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cna_kernels.activations import eager_activation
from cna_kernels.resolved import Entries, Floats, Ints, LastRouting

_LAST: Final = LastRouting()

MAX_ELEMENTS: Final = 1 << 21
"""Elements of the largest temporary, whatever the number of rows and the size of circuits."""

ROWS_PER_SLOT: Final = 4
"""Mean rows of a slot from which circuits are resolved once a slot, not once a row."""


def act_and_mul_scaled_cpu(
    x: Tensor,
    row_slot: Tensor,
    slot_circuits: Tensor,
    slot_multipliers: Tensor,
    masks: Tensor,
    activation: str,
) -> Tensor:
    """out[t, j] = f * (act(gate) * up)[t, j], the product in place of a second allocation.

    Operands as for :func:`cna_kernels.act_and_mul_scaled`, which dispatches here. Rows that are
    not steered hold exactly the bits of ``act(x[:, :I]) * x[:, I:]``.
    Raises ValueError for an unknown activation.
    """
    gate, up = x.chunk(2, 1)
    out = eager_activation(activation)(gate).mul_(up)
    _scale(out, row_slot, slot_circuits, slot_multipliers, masks)
    return out


def scale_rows_cpu(
    a: Tensor, row_slot: Tensor, slot_circuits: Tensor, slot_multipliers: Tensor, masks: Tensor
) -> None:
    """See :func:`cna_kernels.scale_rows`, which dispatches here."""
    rows = a.contiguous()
    _scale(rows, row_slot, slot_circuits, slot_multipliers, masks)
    if not a.is_contiguous():
        a.copy_(rows)


def _scale(
    out: Tensor, row_slot: Tensor, slot_circuits: Tensor, slot_multipliers: Tensor, masks: Tensor
) -> None:
    """out[t, j] = f * out[t, j]; out is contiguous."""
    routing = _LAST.get(out.shape[0], row_slot, slot_circuits, slot_multipliers)
    if not routing.rows.size:
        return
    size = out.shape[1]
    if routing.rows.size * size * slot_circuits.shape[1] > MAX_ELEMENTS:
        tables = slot_circuits.numpy(), slot_multipliers.numpy(), masks.numpy()
        _steer(out, routing.rows, routing.slots, *tables)
        return
    entries = routing.kept(masks, size)
    if entries is None:
        circuits = slot_circuits.numpy().take(routing.slots, 0)
        multipliers = slot_multipliers.numpy().take(routing.slots, 0)
        owner, channel, factor = _entries(circuits, multipliers, masks.numpy(), size)
        entries = Entries.of(routing.rows.take(owner) * size + channel, factor)
        routing.keep(masks, size, entries)
    entries.apply(out)


def _steer(
    out: Tensor,
    rows: Ints,
    slots: NDArray[np.int32],
    slot_circuits: NDArray[np.int32],
    slot_multipliers: Floats,
    masks: NDArray[np.uint8],
) -> None:
    """out[rows[i], j] = f(slots[i], j) * out[rows[i], j] for j in the circuits of slots[i].

    The entries of a block of slots are resolved together: of the slots in use where each serves
    many rows (prefill), else of the slot of every row.
    """
    size = out.shape[1]
    present = np.zeros(len(slot_circuits), dtype=bool)
    present[slots] = True
    used = present.nonzero()[0]
    grouped = used.size * ROWS_PER_SLOT <= rows.size
    resolved = used if grouped else slots
    block = max(1, MAX_ELEMENTS // (size * max(1, slot_circuits.shape[1])))
    for start in range(0, resolved.size, block):
        part = resolved[start : start + block]
        owner, channel, factor = _entries(
            slot_circuits.take(part, 0), slot_multipliers.take(part, 0), masks, size
        )
        if not owner.size:
            continue
        if not grouped:
            Entries.of(rows[start:].take(owner) * size + channel, factor).apply(out)
            continue
        bounds = np.searchsorted(owner, np.arange(part.size + 1)).tolist()
        for i, slot in enumerate(part):
            begin, end = bounds[i], bounds[i + 1]
            if begin == end:
                continue
            bases = rows[slots == slot][:, None] * size
            step = max(1, MAX_ELEMENTS // (end - begin))
            for low in range(0, len(bases), step):
                at = bases[low : low + step] + channel[begin:end]
                Entries.of(at, factor[begin:end]).apply(out)


def _entries(
    circuits: NDArray[np.int32], multipliers: Floats, masks: NDArray[np.uint8], size: int
) -> tuple[Ints, Ints, Floats]:
    """(a, j, f): every channel j in a circuit of slot a, once, with its factor; sorted by a.

    f is the product, in entry order, of multipliers[a, k] over the entries k whose circuit holds j.
    """
    in_use = (circuits >= 0).reshape(-1).nonzero()[0]
    held = masks.take(circuits.take(in_use), 0).reshape(-1)
    nonzero = (held != 0).nonzero()[0]  # in two dimensions: 4 to 27 times slower
    if not nonzero.size:
        return nonzero, nonzero, multipliers[:0, 0]
    hit = np.unpackbits(held.take(nonzero), bitorder="little").view(bool).nonzero()[0]
    pair, channel = np.divmod(nonzero.take(hit >> 3) * 8 + (hit & 7), 8 * masks.shape[1])
    if size & 7:  # the last byte has padding bits
        inside = channel < size
        pair, channel = pair[inside], channel[inside]
    slot = in_use // circuits.shape[1]
    owner = slot.take(pair)
    factor = multipliers.reshape(-1)[in_use.take(pair)]
    if np.count_nonzero(slot[1:] == slot[:-1]):  # several entries: merge shared channels
        key = owner * size + channel
        order = key.argsort(kind="stable")  # equal keys keep their entry order
        key = key[order]
        first = np.concatenate(([True], key[1:] != key[:-1])).nonzero()[0]
        factor = np.asarray(np.multiply.reduceat(factor[order], first))
        owner, channel = owner[order[first]], channel[order[first]]
    return owner, channel, factor
