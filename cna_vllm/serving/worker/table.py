# SPDX-License-Identifier: Apache-2.0
"""What is resident on one rank, by content digest: circuits as bit masks, and sets of vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import numpy as np
import torch

from cna_kernels import mask_width
from cna_vllm.serving.config import CircuitTableError
from cna_vllm.steering.packed import Packed


class ResidentTable(ABC):
    """Rows of content, found by digest, counted by the running requests that use them.

    What was unloaded keeps its row until the row is needed, so a request that was admitted before
    the unload still finds it; a row that a running or waiting request uses is never overwritten.
    """

    noun: str

    def __init__(
        self,
        layers: Sequence[int],
        max_rows: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """layers: global indices of this rank's layers. length: of a row in one of them."""
        self.layers = tuple(layers)
        # One tensor for all layers, at a fixed address: making content resident is one copy.
        self._rows = torch.zeros(len(self.layers), max_rows, length, dtype=dtype, device=device)
        self._digests: list[str | None] = [None] * max_rows
        self._row_of: dict[str, int] = {}
        self._users = [0] * max_rows
        # Rows whose content was unloaded, oldest first: the first to be overwritten.
        self._retired: dict[int, None] = {}

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self._rows.device

    @property
    def nbytes(self) -> int:
        """Memory of the rows on this rank, in bytes."""
        return self._rows.nbytes

    @abstractmethod
    def _share(self, content: Packed) -> np.ndarray:
        """[layers, length]: what this rank keeps of ``content``."""

    def _layer(self, layer: int) -> torch.Tensor:
        return self._rows[self.layers.index(layer)]

    def loaded(self) -> tuple[str, ...]:
        """Digests that requests may use, in row order."""
        return tuple(
            d for row, d in enumerate(self._digests) if d is not None and row not in self._retired
        )

    def resident(self) -> tuple[str, ...]:
        """All digests that have a row: the loaded ones, and retired ones not yet overwritten."""
        return tuple(self._row_of)

    def load(self, content: Packed, wanted: Collection[str] = ()) -> int:
        """Makes ``content`` resident and returns its row; loading it again is a no-op.

        wanted: digests that admitted requests may still ask for, also such as wait to run; their
        rows are kept. Raises CircuitTableError when every row is taken.
        """
        row = self._row_of.get(content.digest)
        if row is not None:
            self._retired.pop(row, None)
            return row
        row = self._free_row(wanted)
        previous = self._digests[row]
        if previous is not None:
            del self._row_of[previous]
            del self._retired[row]
        self._rows[:, row].copy_(torch.from_numpy(self._share(content)))
        self._digests[row] = content.digest
        self._row_of[content.digest] = row
        return row

    def unload(self, digest: str) -> bool:
        """Retires content; running requests finish on it. False when it is not loaded."""
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
                    f"a request was admitted with {self.noun} {digest[:12]}, which is not resident "
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

    def _free_row(self, wanted: Collection[str]) -> int:
        for row, digest in enumerate(self._digests):
            if digest is None:
                return row
        for row in self._retired:
            if self._users[row] == 0 and self._digests[row] not in wanted:
                return row
        raise CircuitTableError(
            f"all {len(self._digests)} {self.noun} rows are in use; unload a {self.noun} or raise "
            f"cna.max_{self.noun}s"
        )


def positions(layers: Sequence[int], content: Packed) -> np.ndarray:
    """Of each layer that ``content`` names, its place among this rank's ``layers``; -1 for none."""
    named = np.frombuffer(content.layers, dtype=np.int32)
    place = np.full(max(max(layers, default=0), named.max(initial=0)) + 1, -1, dtype=np.intp)
    place[list(layers)] = range(len(layers))
    return place[named]


class CircuitTable(ResidentTable):
    """Resident circuits, at ceil(width / 8) bytes a layer, at fixed addresses."""

    noun = "circuit"

    def __init__(
        self,
        layers: Sequence[int],
        offset: int,
        width: int,
        max_circuits: int,
        device: torch.device,
    ) -> None:
        """Each layer of this rank holds neurons [offset, offset + width) of its layer."""
        super().__init__(layers, max_circuits, mask_width(width), torch.uint8, device)
        self._offset, self._width = offset, width

    def layer_masks(self, layer: int) -> torch.Tensor:
        """The masks of one global layer: uint8 [max_circuits, ceil(width / 8)], a fixed view."""
        return self._layer(layer)

    def _share(self, content: Packed) -> np.ndarray:
        """Channel j of a layer in bit j % 8 of byte j // 8."""
        bits = np.zeros((len(self.layers), self._width), dtype=bool)
        at = positions(self.layers, content)
        channel = np.frombuffer(content.values, dtype=np.int32) - self._offset
        here = (at >= 0) & (channel >= 0) & (channel < self._width)
        bits.reshape(-1)[(at * self._width + channel)[here]] = True
        return np.packbits(bits, axis=1, bitorder="little")


class VectorTable(ResidentTable):
    """Resident sets of vectors, at 4 * hidden_size bytes a layer; 0 where a set has no vector.

    Every tensor-parallel rank holds whole vectors, since it has whole outputs.
    """

    noun = "vector"

    def __init__(
        self, layers: Sequence[int], hidden_size: int, max_vectors: int, device: torch.device
    ) -> None:
        super().__init__(layers, max_vectors, hidden_size, torch.float32, device)
        self.hidden_size = hidden_size

    def layer_vectors(self, layer: int) -> torch.Tensor:
        """The vectors of one global layer: float32 [max_vectors, hidden_size], a fixed view."""
        return self._layer(layer)

    def _share(self, content: Packed) -> np.ndarray:
        at = positions(self.layers, content)
        values = np.frombuffer(content.values, dtype=np.float32).reshape(len(at), self.hidden_size)
        share = np.zeros((len(self.layers), self.hidden_size), dtype=np.float32)
        share[at[at >= 0]] = values[at >= 0]
        return share
