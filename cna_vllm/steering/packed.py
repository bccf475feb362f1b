# SPDX-License-Identifier: Apache-2.0
"""What workers get of a circuit or of a set of vectors: enough to fill a row of their tables."""

from __future__ import annotations

from typing import Literal, NamedTuple

KindName = Literal["circuit", "vector"]


class Packed(NamedTuple):
    """The arguments of ``cna_load``: content without names, origin or checks, which are the front
    end's.

    Attributes:
        kind: of the table that takes it.
        digest: of the content.
        layers: int32 of the machine: the layer of each neuron, or of each vector.
        values: of a circuit int32, the index of each neuron; of vectors float32
            [vectors, hidden_size].
        experts: of a circuit int32, the routed expert that each neuron is of, -1 for those of
            dense and shared MLPs; empty where all are.
    """

    kind: KindName
    digest: str
    layers: bytes
    values: bytes
    experts: bytes = b""
