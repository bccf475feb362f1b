# SPDX-License-Identifier: Apache-2.0
"""Resident vectors of one rank: one float32 row per set and layer, at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cna_vllm.serving.worker.table import ResidentTable, positions
from cna_vllm.steering.packed import Packed


class VectorTable(ResidentTable):
    """Resident sets of vectors, at 4 * hidden_size bytes a layer; 0 where a set has no vector.

    Every tensor-parallel rank holds whole vectors, since it has whole outputs.
    """

    noun = "vector"

    def __init__(
        self, layers: Sequence[int], hidden_size: int, max_vectors: int, device: torch.device
    ) -> None:
        """layers: global indices of this rank's layers."""
        super().__init__(max_vectors)
        self._layers = tuple(layers)
        self._vectors = torch.zeros(
            len(self._layers), max_vectors, hidden_size, dtype=torch.float32, device=device
        )

    @property
    def nbytes(self) -> int:
        """Memory of the vectors on this rank, in bytes."""
        return self._vectors.nbytes

    @property
    def hidden_size(self) -> int:
        """Length of a vector."""
        return self._vectors.shape[2]

    def layer_vectors(self, layer: int) -> torch.Tensor:
        """The vectors of one global layer: float32 [max_vectors, hidden_size], a fixed view."""
        return self._vectors[self._layers.index(layer)]

    def _write(self, row: int, content: Packed) -> None:
        at = positions(self._layers, content)
        values = np.frombuffer(content.values, dtype=np.float32).reshape(len(at), self.hidden_size)
        share = np.zeros((len(self._layers), self.hidden_size), dtype=np.float32)
        share[at[at >= 0]] = values[at >= 0]
        self._vectors[:, row].copy_(torch.from_numpy(share))
