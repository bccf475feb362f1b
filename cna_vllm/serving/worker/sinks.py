# SPDX-License-Identifier: Apache-2.0
"""What becomes of one prompt's recorded activations: a sum, the strongest neurons, or all of them.

Every sink takes ``values``, one activation for each neuron of this rank at a prompt's last token,
in the model's dtype, and ``reached``, a flag for each of its MLPs (see ``share``): both as views of
memory that the next prompt overwrites. ``add`` only enqueues device work: it never waits for the
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

INDEX_BITS = 32


class Sum:
    """The float64 sum of all prompts of one group, and how many of them reached each MLP; 8 bytes a
    neuron, however many prompts."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._reached: torch.Tensor | None = None
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return sum(held.nbytes for held in (self._total, self._reached) if held is not None)

    def add(self, name: str, values: torch.Tensor, reached: torch.Tensor) -> None:
        if self._total is None or self._reached is None:
            self._total = torch.zeros(values.shape, dtype=torch.float64, device=values.device)
            self._reached = torch.zeros(reached.shape, dtype=torch.int64, device=values.device)
        self._total.add_(values)
        self._reached.add_(reached)
        self._count += 1

    def report(self) -> dict[str, Any]:
        """{"count", "sum": float64 bytes, one a neuron; "reached": int64 bytes, one an MLP}."""
        total, reached = (
            b"" if held is None else held.cpu().numpy().tobytes()
            for held in (self._total, self._reached)
        )
        return {"count": self._count, "sum": total, "reached": reached}


class Top:
    """Each prompt's ``k`` neurons of largest |activation| on this rank, as sortable keys.

    key = bits of float32 |a| << 32 | (2**32 - 1 - neuron), neuron = place in ``values``. Bits of
    non-negative floats are ordered like the floats, so the k largest keys are the k largest |a|,
    ties going to the lower place. Which of them are among the k of the whole model is decided where
    the keys of all ranks meet.

    Holds 8 * capacity * k bytes from the start; prompts over the capacity are left out, which the
    reader sees by their absence.
    """

    def __init__(self, k: int, capacity: int, neurons: int, device: torch.device) -> None:
        """neurons: of this rank."""
        self._keys = torch.zeros(capacity, min(k, neurons), dtype=torch.int64, device=device)
        self._rest = (1 << INDEX_BITS) - 1 - torch.arange(neurons, device=device)
        self._names: list[str] = []

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return self._keys.nbytes + self._rest.nbytes

    def add(self, name: str, values: torch.Tensor, reached: torch.Tensor) -> None:
        at = len(self._names)
        if at == len(self._keys):
            return
        bits = values.float().abs().view(torch.int32).long()
        keys = (bits << INDEX_BITS) | self._rest
        self._keys[at] = keys.topk(self._keys.shape[1], sorted=False).values
        self._names.append(name)

    def report(self) -> dict[str, Any]:
        """{"names": prompts in recorded order, "k", "keys": int64 bytes of [prompts, k]}."""
        keys = self._keys[: len(self._names)].cpu().numpy()
        return {"names": self._names, "k": keys.shape[1], "keys": keys.tobytes()}


class Rows:
    """The activations themselves of some neurons; ``capacity`` prompts, allocated at once."""

    def __init__(
        self,
        places: Sequence[slice],
        capacity: int,
        mlps: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """places: of ``values``, what to keep. mlps: of this rank."""
        self._places = tuple(places)
        neurons = sum(place.stop - place.start for place in places)
        self._rows = torch.zeros(capacity, neurons, dtype=dtype, device=device)
        self._reached = torch.zeros(capacity, mlps, dtype=torch.uint8, device=device)
        self._names: list[str] = []

    @property
    def nbytes(self) -> int:
        """Device memory held, in bytes."""
        return self._rows.nbytes + self._reached.nbytes

    def add(self, name: str, values: torch.Tensor, reached: torch.Tensor) -> None:
        at = len(self._names)
        if at == len(self._rows):
            return
        if self._places:
            torch.cat([values[place] for place in self._places], out=self._rows[at])
        self._reached[at] = reached
        self._names.append(name)

    def report(self) -> dict[str, Any]:
        """{"names": groups as recorded, "rows": float32 bytes of [prompts, neurons], "reached":
        uint8 bytes of [prompts, MLPs of this rank]}."""
        rows = self._rows[: len(self._names)].cpu().float().numpy()
        reached = self._reached[: len(self._names)].cpu().numpy()
        return {"names": self._names, "rows": rows.tobytes(), "reached": reached.tobytes()}
