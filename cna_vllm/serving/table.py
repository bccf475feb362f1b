# SPDX-License-Identifier: Apache-2.0
"""Resident circuits of one rank: a bit mask per circuit and layer, at fixed addresses."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from cna_kernels import mask_width
from cna_vllm.circuit import Circuit


class CircuitTableError(RuntimeError):
    """A circuit cannot be made resident, or a request names one that is not."""


class CircuitTable:
    """Rows of circuits, found by content digest, counted by the running requests that use them.

    A circuit costs ceil(width / 8) bytes a layer. An unloaded circuit keeps its row until the
    row is needed, so a request that was admitted before the unload still finds it; a row that a
    running or waiting request uses is never overwritten.
    """

    def __init__(
        self,
        layers: Sequence[int],
        offset: int,
        width: int,
        max_circuits: int,
        device: torch.device,
    ) -> None:
        """layers: global indices of this rank's layers; each holds neurons
        [offset, offset + width) of its layer."""
        self.layers = tuple(layers)
        self._offset, self._width = offset, width
        # One tensor for all layers, so that making a circuit resident is one copy.
        self._masks = torch.zeros(
            len(self.layers), max_circuits, mask_width(width), dtype=torch.uint8, device=device
        )
        self._digests: list[str | None] = [None] * max_circuits
        self._row_of: dict[str, int] = {}
        self._users = [0] * max_circuits
        # Rows whose circuit was unloaded, oldest first: the first to be overwritten.
        self._retired: dict[int, None] = {}

    @property
    def device(self) -> torch.device:
        """Where the masks live."""
        return self._masks.device

    @property
    def nbytes(self) -> int:
        """Memory of the masks on this rank, in bytes."""
        return self._masks.numel()

    def layer_masks(self, layer: int) -> torch.Tensor:
        """The masks of one global layer: uint8 [max_circuits, ceil(width / 8)], a fixed view."""
        return self._masks[self.layers.index(layer)]

    def loaded(self) -> tuple[str, ...]:
        """Digests of the circuits that requests may use, in row order."""
        return tuple(
            d for row, d in enumerate(self._digests) if d is not None and row not in self._retired
        )

    def resident(self) -> tuple[str, ...]:
        """All digests that have a row: the loaded ones, and retired ones not yet overwritten."""
        return tuple(self._row_of)

    def load(self, circuit: Circuit, wanted: Collection[str] = ()) -> int:
        """Makes ``circuit`` resident and returns its row; loading it again is a no-op.

        wanted: digests that admitted requests may still ask for, also such as wait to run; their
        rows are kept. Raises CircuitTableError when every row is taken.
        """
        row = self._row_of.get(circuit.digest)
        if row is not None:
            self._retired.pop(row, None)
            return row
        row = self._free_row(wanted)
        previous = self._digests[row]
        if previous is not None:
            del self._row_of[previous]
            del self._retired[row]
        self._masks[:, row].copy_(self._packed(circuit))
        self._digests[row] = circuit.digest
        self._row_of[circuit.digest] = row
        return row

    def unload(self, digest: str) -> bool:
        """Retires a circuit; running requests finish on it. False when it is not loaded."""
        row = self._row_of.get(digest)
        if row is None or row in self._retired:
            return False
        self._retired[row] = None
        return True

    def acquire(self, digests: Sequence[str]) -> tuple[int, ...]:
        """The row of each digest, held until released; all of them, or CircuitTableError."""
        for digest in digests:
            if digest not in self._row_of:
                raise CircuitTableError(
                    f"a request was admitted with circuit {digest[:12]}, which is not resident "
                    "on this worker; refusing to run it unsteered"
                )
        rows = tuple(self._row_of[digest] for digest in digests)
        for row in rows:
            self._users[row] += 1
        return rows

    def release(self, rows: Sequence[int]) -> None:
        """Gives back what one ``acquire`` returned."""
        for row in rows:
            self._users[row] -= 1

    def users(self, digest: str) -> int:
        """How often running requests hold ``digest``."""
        row = self._row_of.get(digest)
        return 0 if row is None else self._users[row]

    def _packed(self, circuit: Circuit) -> torch.Tensor:
        """uint8 [layers, ceil(width / 8)]: this rank's share, channel j in bit j % 8."""
        bits = np.zeros((len(self.layers), self._width), dtype=np.uint8)
        by_layer = circuit.by_layer()
        for position, layer in enumerate(self.layers):
            local = np.asarray(by_layer.get(layer, ()), dtype=np.int64) - self._offset
            bits[position, local[(local >= 0) & (local < self._width)]] = 1
        return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))

    def _free_row(self, wanted: Collection[str]) -> int:
        for row, digest in enumerate(self._digests):
            if digest is None:
                return row
        for row in self._retired:
            if self._users[row] == 0 and self._digests[row] not in wanted:
                return row
        raise CircuitTableError(
            f"all {len(self._digests)} circuit rows are in use; unload a circuit or raise "
            "cna.max_circuits"
        )
