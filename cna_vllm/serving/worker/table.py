# SPDX-License-Identifier: Apache-2.0
"""What is resident on one rank, by content digest: circuits as bit masks, and sets of vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from cna_kernels import mask_width
from cna_vllm.serving.config import CircuitTableError
from cna_vllm.serving.worker.experts import ExpertTable
from cna_vllm.steering.packed import Packed


class ResidentTable(ABC):
    """Rows of content, found by digest, counted by the running requests that use them.

    What was unloaded keeps its row until the row is needed, so a request that was admitted before
    the unload still finds it; a row that a running or waiting request uses is never overwritten.
    """

    noun: str

    def __init__(
        self,
        lengths: Mapping[int, int],
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """lengths: global index of each of this rank's layers -> elements of a row in it."""
        self.layers = tuple(lengths)
        self.device = device
        # One tensor for all layers of a length, at a fixed address: making content resident is one
        # copy for each length, and a layer takes what it needs.
        self._blocks: list[tuple[tuple[int, ...], torch.Tensor]] = []
        for length in dict.fromkeys(lengths.values()):
            layers = tuple(layer for layer in lengths if lengths[layer] == length)
            rows = torch.zeros(len(layers), max_rows, length, dtype=dtype, device=device)
            self._blocks.append((layers, rows))
        self._digests: list[str | None] = [None] * max_rows
        self._row_of: dict[str, int] = {}
        self._users = [0] * max_rows
        # Rows whose content was unloaded, oldest first: the first to be overwritten.
        self._retired: dict[int, None] = {}

    @property
    def nbytes(self) -> int:
        """Memory of the rows on this rank, in bytes."""
        return sum(rows.nbytes for _, rows in self._blocks)

    @abstractmethod
    def _share(self, content: Packed, layers: tuple[int, ...]) -> np.ndarray:
        """[layers, length]: what some layers, whose rows have one length, keep of ``content``."""

    def _shares(self, content: Packed) -> list[tuple[torch.Tensor, np.ndarray]]:
        """Tensors [n, max_rows, length], and what goes into a row of each: [n, length]."""
        return [(rows, self._share(content, layers)) for layers, rows in self._blocks]

    def _layer(self, layer: int) -> torch.Tensor:
        layers, rows = next(block for block in self._blocks if layer in block[0])
        return rows[layers.index(layer)]

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
        rows are kept. Raises CircuitTableError, and changes nothing, when every row is taken or
        the content cannot be held.
        """
        row = self._row_of.get(content.digest)
        if row is not None:
            self._retired.pop(row, None)
            return row
        row, shares = self._free_row(wanted), self._shares(content)
        previous = self._digests[row]
        if previous is not None:
            del self._row_of[previous]
            del self._retired[row]
        for rows, share in shares:
            rows[:, row].copy_(torch.from_numpy(share))
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
    """Of each layer that ``content`` names, its place among ``layers``; -1 for none."""
    named = np.frombuffer(content.layers, dtype=np.int32)
    place = np.full(max(max(layers, default=0), named.max(initial=0)) + 1, -1, dtype=np.intp)
    place[list(layers)] = range(len(layers))
    return place[named]


def _experts_of(content: Packed) -> np.ndarray:
    """Of each neuron, its routed expert, or -1."""
    experts = np.frombuffer(content.experts, dtype=np.int32)
    return experts if experts.size else np.full(len(content.layers) // 4, -1, dtype=np.int32)


class CircuitTable(ResidentTable):
    """Resident circuits, at ceil(width / 8) bytes a layer of that width, at fixed addresses, and
    what ``ExpertTable`` holds."""

    noun = "circuit"

    def __init__(
        self,
        layers: Sequence[int],
        offset: int | Sequence[int],
        width: int | Sequence[int],
        max_circuits: int,
        device: torch.device,
        experts: ExpertTable | None = None,
    ) -> None:
        """layers: global indices of this rank's layers with a dense or shared MLP; each holds
        neurons [offset, offset + width) of its layer, one number of all layers or one for each.
        experts: where neurons of routed experts go; None: they are refused."""
        self._offsets, self._widths = (
            dict(zip(layers, [of] * len(layers) if isinstance(of, int) else of, strict=True))
            for of in (offset, width)
        )
        lengths = {layer: mask_width(self._widths[layer]) for layer in layers}
        super().__init__(lengths, max_circuits, torch.uint8, device)
        self._experts = experts

    @property
    def nbytes(self) -> int:
        """Memory of the masks and of routed experts' neurons on this rank, in bytes."""
        return super().nbytes + (0 if self._experts is None else self._experts.nbytes)

    def layer_masks(self, layer: int) -> torch.Tensor:
        """The masks of one global layer: uint8 [max_circuits, ceil(width / 8)], a fixed view."""
        return self._layer(layer)

    def _shares(self, content: Packed) -> list[tuple[torch.Tensor, np.ndarray]]:
        layers = np.frombuffer(content.layers, dtype=np.int32)
        experts = _experts_of(content)
        routed = experts >= 0
        if self._experts is None:
            if routed.any():
                raise CircuitTableError(
                    "the circuit names neurons of routed experts, which this engine does not "
                    "steer: its model has none, or cna.max_expert_neurons is 0"
                )
            return super()._shares(content)
        bare = np.isin(layers, list({*self._experts.layers} - {*self.layers})) & ~routed
        if bare.any():
            raise CircuitTableError(
                f"the circuit names a neuron of no expert in layer {layers[bare.argmax()]}, which "
                "has routed experts only; name the expert"
            )
        indices = np.frombuffer(content.values, dtype=np.int32)
        return super()._shares(content) + self._experts.shares(
            layers[routed], experts[routed], indices[routed]
        )

    def _share(self, content: Packed, layers: tuple[int, ...]) -> np.ndarray:
        """Channel j of a layer in bit j % 8 of byte j // 8."""
        dense = _experts_of(content) < 0
        offsets, widths = (
            np.array([of[layer] for layer in layers]) for of in (self._offsets, self._widths)
        )
        most = widths.max()
        bits = np.zeros((len(layers), most), dtype=bool)
        at = positions(layers, content)
        channel = np.frombuffer(content.values, dtype=np.int32) - offsets[at]
        here = dense & (at >= 0) & (channel >= 0) & (channel < widths[at])
        bits.reshape(-1)[(at * most + channel)[here]] = True
        return np.packbits(bits, axis=1, bitorder="little")


class VectorTable(ResidentTable):
    """Resident sets of vectors, at 4 * hidden_size bytes a layer; 0 where a set has no vector.

    Every tensor-parallel rank holds whole vectors, since it has whole outputs.
    """

    noun = "vector"

    def __init__(
        self, layers: Sequence[int], hidden_size: int, max_vectors: int, device: torch.device
    ) -> None:
        super().__init__(dict.fromkeys(layers, hidden_size), max_vectors, torch.float32, device)
        self.hidden_size = hidden_size

    def layer_vectors(self, layer: int) -> torch.Tensor:
        """The vectors of one global layer: float32 [max_vectors, hidden_size], a fixed view."""
        return self._layer(layer)

    def _share(self, content: Packed, layers: tuple[int, ...]) -> np.ndarray:
        at = positions(layers, content)
        values = np.frombuffer(content.values, dtype=np.float32).reshape(len(at), self.hidden_size)
        share = np.zeros((len(layers), self.hidden_size), dtype=np.float32)
        share[at[at >= 0]] = values[at >= 0]
        return share
