# SPDX-License-Identifier: Apache-2.0
"""What a step's routing means for each layer on the CPU, kept from step to step.

While one batch decodes, every layer sees the same routing again and again, and resolving it costs
more than applying it. So the last routing is kept and used again while its operands are the same
tensors at the same version: the counter by which autograd notices in-place changes, which torch
bumps in inference mode too. Operands must therefore be changed through torch, not through numpy
views. Tensors that count no versions (made in inference mode) are resolved anew each time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final
from weakref import ReferenceType, ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.intp]
Floats = NDArray[np.float32]

MAX_KEPT_ENTRIES: Final = 1 << 16
"""Entries of a layer up to which they are kept: those of batches that decode."""

_BITS: Final = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Entries:
    """Flat indices into an activation: those that become +0, and those that are multiplied."""

    ablated: Ints
    at: Ints
    factor: Floats

    @classmethod
    def of(cls, at: Ints, factor: Floats) -> Entries:
        """Splits off the entries whose factor is 0. at: [..., n], factor: [n]."""
        scaled = factor != 0
        return cls(at[..., ~scaled], at[..., scaled], factor[scaled])

    def apply(self, out: Tensor) -> None:
        """out.flatten()[at] = round(factor * out.flatten()[at]), +0 where the factor is 0.

        The product is taken in float32. Gathered and scattered as integers in numpy: torch's take
        and put_ enter a parallel region from a few thousand elements on, which costs milliseconds
        where cores are contended.
        """
        flat = out.view(_BITS[out.itemsize]).numpy().reshape(-1)
        if self.ablated.size:
            flat[self.ablated] = 0
        if self.at.size:
            raw = flat[self.at]
            torch.from_numpy(raw).view(out.dtype).mul_(torch.from_numpy(self.factor))
            flat[self.at] = raw


@dataclass(frozen=True)
class Stamp:
    """A tensor at one version."""

    tensor: ReferenceType[Tensor]
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Stamp | None:
        """None for tensors that count no versions."""
        return None if tensor.is_inference() else cls(ref(tensor), tensor._version)

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is that tensor and has not been written to since."""
        return self.tensor() is tensor and tensor._version == self.version


@dataclass
class Routing:
    """The steered rows of a step, and the entries of the layers resolved so far.

    rows: indices of the steered rows. slots: [len(rows)], the slot of each. layers: id of a layer's
    masks -> (their stamp, width, entries).
    """

    num_rows: int
    stamps: tuple[Stamp, ...]
    rows: Ints
    slots: NDArray[np.int32]
    layers: dict[int, tuple[Stamp, int, Entries]] = field(default_factory=dict)

    def holds(self, num_rows: int, *operands: Tensor) -> bool:
        """Whether the step's operands are still what this routing was made from."""
        return num_rows == self.num_rows and all(
            stamp.holds(operand) for stamp, operand in zip(self.stamps, operands, strict=True)
        )

    def kept(self, masks: Tensor, size: int) -> Entries | None:
        """The entries of a layer, if they were resolved from these very masks."""
        found = self.layers.get(id(masks))
        if found is None or found[1] != size or not found[0].holds(masks):
            return None
        return found[2]

    def keep(self, masks: Tensor, size: int, entries: Entries) -> None:
        """Keeps the entries of a layer unless they are many or cannot be told from later ones."""
        stamp = Stamp.of(masks)
        if stamp is not None and entries.at.size + entries.ablated.size <= MAX_KEPT_ENTRIES:
            self.layers[id(masks)] = (stamp, size, entries)


class LastRouting:
    """The routing of the last call. A pure function of its operands, so it never needs clearing;
    engines that share a process only cost each other time."""

    def __init__(self) -> None:
        self._routing: Routing | None = None

    def get(
        self, num_rows: int, row_slot: Tensor, slot_circuits: Tensor, slot_multipliers: Tensor
    ) -> Routing:
        """The routing of ``row_slot[:num_rows]``, kept or made."""
        routing = self._routing
        if routing is not None and routing.holds(
            num_rows, row_slot, slot_circuits, slot_multipliers
        ):
            return routing
        slots = row_slot.numpy()[:num_rows]
        rows = (slots >= 0).nonzero()[0]
        stamps = [Stamp.of(t) for t in (row_slot, slot_circuits, slot_multipliers)]
        known = tuple(stamp for stamp in stamps if stamp is not None)
        routing = Routing(num_rows, known, rows, slots.take(rows))
        self._routing = routing if len(known) == len(stamps) else None
        return routing
