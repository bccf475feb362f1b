# SPDX-License-Identifier: Apache-2.0
"""CPU path of ``act_and_mul_scaled`` and ``scale_rows``: sparse steering in place.

Only (row, channel) pairs inside a circuit are touched. They are found in numpy views of the
operands, whose small calls cost a third of torch's; a batch that decodes finds them once.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cna_kernels.activations import eager_activation
from cna_kernels.resolved import Floats, Ints, LastEntries

MAX_ELEMENTS: Final = 1 << 21
"""Elements of the largest temporary, whatever the number of rows and the size of circuits."""

_BITS: Final = {2: torch.int16, 4: torch.int32}

_LAST: Final = LastEntries()


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
    _steer(out, row_slot, slot_circuits, slot_multipliers, masks)
    return out


def scale_rows_cpu(
    a: Tensor, row_slot: Tensor, slot_circuits: Tensor, slot_multipliers: Tensor, masks: Tensor
) -> None:
    """See :func:`cna_kernels.scale_rows`, which dispatches here."""
    rows = a.contiguous()
    _steer(rows, row_slot, slot_circuits, slot_multipliers, masks)
    if not a.is_contiguous():
        a.copy_(rows)


def _steer(
    out: Tensor, row_slot: Tensor, slot_circuits: Tensor, slot_multipliers: Tensor, masks: Tensor
) -> None:
    """out[t, j] = f * out[t, j]; out is contiguous."""
    operands = row_slot, slot_circuits, slot_multipliers, masks
    if (kept := _LAST.get(out.shape, *operands)) is not None:
        scale_entries(out, *kept)
        return
    size = out.shape[1]
    slots = row_slot.numpy()[: len(out)]
    steered = (slots >= 0).nonzero()[0]
    step = max(1, MAX_ELEMENTS // max(1, size * slot_circuits.shape[1]))
    for start in range(0, steered.size, step):
        rows = steered[start : start + step]
        chosen = slots.take(rows)
        circuits = slot_circuits.numpy().take(chosen, 0)
        multipliers = slot_multipliers.numpy().take(chosen, 0)
        owner, channel, factor = _entries(circuits, multipliers, masks.numpy(), size)
        at = rows.take(owner) * size + channel
        scale_entries(out, at, factor)
        if steered.size <= step:
            _LAST.keep((at, factor), out.shape, *operands)


def _entries(
    circuits: NDArray[np.int32], multipliers: Floats, masks: NDArray[np.uint8], size: int
) -> tuple[Ints, Ints, Floats]:
    """(a, j, f): every channel j in a circuit of row a, once, with its factor; sorted by a.

    circuits, multipliers: [rows, K]. f is the product, in entry order, of multipliers[a, k] over
    the entries k whose circuit holds j.
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
    row = in_use // circuits.shape[1]
    owner = row.take(pair)
    factor = multipliers.reshape(-1)[in_use.take(pair)]
    if np.count_nonzero(row[1:] == row[:-1]):  # several entries: merge shared channels
        key = owner * size + channel
        order = key.argsort(kind="stable")  # equal keys keep their entry order
        key = key[order]
        first = np.concatenate(([True], key[1:] != key[:-1])).nonzero()[0]
        factor = np.asarray(np.multiply.reduceat(factor[order], first))
        owner, channel = owner[order[first]], channel[order[first]]
    return owner, channel, factor


def scale_entries(out: Tensor, at: Ints, factor: Floats) -> None:
    """out.flatten()[at] = round(factor * out.flatten()[at]), +0 where the factor is 0.

    The product is taken in float32. Gathered and scattered as integers in numpy: torch's take
    and put_ enter a parallel region from a few thousand elements on, which costs milliseconds
    where cores are contended.
    """
    if not at.size:
        return
    flat = out.view(_BITS[out.itemsize]).numpy().reshape(-1)
    raw = flat[at]
    torch.from_numpy(raw).view(out.dtype).mul_(torch.from_numpy(factor))
    raw[factor == 0] = 0
    flat[at] = raw
