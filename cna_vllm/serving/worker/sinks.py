# SPDX-License-Identifier: Apache-2.0
"""What becomes of one prompt's recorded activations: a sum, the strongest neurons, or all of them.

Every sink takes ``values``, the [layers, width] activations of this rank at a prompt's last
token, in the model's dtype, as a view of memory that the next step overwrites. ``add`` only
enqueues device work: it never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

INDEX_BITS = 32


class Sum:
    """The float64 sum of all prompts of one group; 8 bytes a neuron, however many prompts."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return 0 if self._total is None else self._total.nbytes

    def add(self, name: str, values: torch.Tensor) -> None:
        if self._total is None:
            self._total = torch.zeros(values.shape, dtype=torch.float64, device=values.device)
        self._total.add_(values)
        self._count += 1

    def report(self) -> dict[str, Any]:
        """{"count", "sum": float64 bytes of [layers, width]}."""
        total = b"" if self._total is None else self._total.cpu().numpy().tobytes()
        return {"count": self._count, "sum": total}


class Top:
    """Each prompt's ``k`` neurons of largest |activation| on this rank, as sortable keys.

    key = bits of float32 |a| << 32 | (2**32 - 1 - neuron), neuron = row * width + column of
    ``values``. Bits of non-negative floats are ordered like the floats, so the k largest keys are
    the k largest |a|, ties going to the lower layer and then to the lower index. Which of them are
    among the k of the whole model is decided where the keys of all ranks meet.

    Holds 8 * capacity * k bytes from the start; prompts over the capacity are left out, which the
    reader sees by their absence.
    """

    def __init__(self, k: int, capacity: int, neurons: int, device: torch.device) -> None:
        """neurons: layers * width of this rank."""
        self._keys = torch.zeros(capacity, min(k, neurons), dtype=torch.int64, device=device)
        self._rest = (1 << INDEX_BITS) - 1 - torch.arange(neurons, device=device)
        self._names: list[str] = []

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return self._keys.nbytes + self._rest.nbytes

    def add(self, name: str, values: torch.Tensor) -> None:
        at = len(self._names)
        if at == len(self._keys):
            return
        bits = values.float().abs().view(torch.int32).flatten().long()
        keys = (bits << INDEX_BITS) | self._rest
        self._keys[at] = keys.topk(self._keys.shape[1], sorted=False).values
        self._names.append(name)

    def report(self) -> dict[str, Any]:
        """{"names": prompts in recorded order, "k", "keys": int64 bytes of [prompts, k]}."""
        keys = self._keys[: len(self._names)].cpu().numpy()
        return {"names": self._names, "k": keys.shape[1], "keys": keys.tobytes()}


class Rows:
    """The activations themselves of chosen layers; ``capacity`` prompts, allocated at once."""

    def __init__(
        self,
        layers: Sequence[int],
        capacity: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """layers: rows of ``values`` to keep."""
        self._layers = torch.tensor(list(layers), dtype=torch.int64, device=device)
        self._rows = torch.zeros(capacity, len(layers), width, dtype=dtype, device=device)
        self._names: list[str] = []

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return self._layers.nbytes + self._rows.nbytes

    def add(self, name: str, values: torch.Tensor) -> None:
        at = len(self._names)
        if at == len(self._rows):
            return
        torch.index_select(values, 0, self._layers, out=self._rows[at])
        self._names.append(name)

    def report(self) -> dict[str, Any]:
        """{"names": groups as recorded, "rows": float32 bytes of [prompts, layers, width]}."""
        rows = self._rows[: len(self._names)].cpu().float().numpy()
        return {"names": self._names, "rows": rows.tobytes()}
