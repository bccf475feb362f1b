# SPDX-License-Identifier: Apache-2.0
"""Numbers for all neurons of a model, whatever its layers' widths, routed experts included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cna_vllm.steering.circuit import Neuron
from cna_vllm.steering.shape import Shape

Ints = NDArray[np.int64]
_Scalar = TypeVar("_Scalar", bound=np.generic)

NO_EXPERT = -1
"""What stands for a layer's dense or shared MLP where experts are numbers; it sorts before them."""


@dataclass(frozen=True)
class Layout:
    """All neurons of a model in one row: layer by layer, those of its dense or shared MLP first,
    then expert by expert. So a lower number is a lower layer, expert and index, in this order.

    What is said of every neuron is an array of ``size`` elements; of every MLP, one of ``mlps``.
    """

    shape: Shape

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model, those without an MLP too."""
        return self.shape.num_layers

    @property
    def size(self) -> int:
        """Neurons of the model."""
        return self.shape.size

    @property
    def mlps(self) -> int:
        """Its MLPs: dense, shared, and each routed expert."""
        return len(self.mlp_layers)

    @cached_property
    def _first_mlps(self) -> Ints:
        """Of each layer, the number of its first MLP, and at the end that of all."""
        counts = np.array(self.shape.experts, dtype=np.int64) + self._has_dense
        return np.concatenate(([0], np.cumsum(counts)))

    @cached_property
    def _has_dense(self) -> NDArray[np.bool_]:
        return np.array(self.shape.widths) > 0

    @cached_property
    def mlp_layers(self) -> Ints:
        """The layer of each MLP."""
        return np.repeat(np.arange(self.num_layers), np.diff(self._first_mlps))

    @cached_property
    def mlp_experts(self) -> Ints:
        """Which routed expert each MLP is; NO_EXPERT for dense and shared ones."""
        place = np.arange(len(self.mlp_layers)) - self._first_mlps[self.mlp_layers]
        return place - self._has_dense[self.mlp_layers]

    @cached_property
    def starts(self) -> Ints:
        """The number of each MLP's first neuron, and at the end that of all."""
        dense, routed = np.array(self.shape.widths), np.array(self.shape.expert_widths)
        widths = np.where(self.mlp_experts < 0, dense[self.mlp_layers], routed[self.mlp_layers])
        return np.concatenate(([0], np.cumsum(widths))).astype(np.int64)

    def layer(self, layer: int) -> slice:
        """The numbers of a layer's neurons."""
        first, end = self.starts[self._first_mlps[layer : layer + 2]].tolist()
        return slice(first, end)

    def width(self, layers: Sequence[int]) -> int:
        """Neurons of some layers together."""
        places = map(self.layer, layers)
        return sum(place.stop - place.start for place in places)

    def numbers(self, layers: Sequence[int]) -> Ints:
        """The numbers of all neurons of some layers."""
        places = map(self.layer, layers)
        none = np.zeros(0, dtype=np.int64)
        return np.concatenate([none, *(np.arange(place.start, place.stop) for place in places)])

    def mlp(self, layer: Any, expert: Any) -> Any:
        """The number of an MLP, of one or of arrays of them."""
        return self._first_mlps[layer] + expert + self._has_dense[layer]

    def mlp_of(self, neurons: Any) -> Any:
        """The number of the MLP that a neuron is of; of one number or of an array."""
        return np.searchsorted(self.starts, neurons, side="right") - 1

    def number(self, neuron: Neuron) -> int:
        """A neuron's number."""
        expert = NO_EXPERT if neuron.expert is None else neuron.expert
        return int(self.starts[self.mlp(neuron.layer, expert)]) + neuron.index

    def neurons(self, numbers: Ints, deltas: NDArray[np.float64]) -> list[Neuron]:
        """The neurons of some numbers, with their deltas."""
        mlps = self.mlp_of(numbers)
        rows = zip(
            self.mlp_layers[mlps].tolist(),
            (numbers - self.starts[mlps]).tolist(),
            deltas.tolist(),
            self.mlp_experts[mlps].tolist(),
            strict=True,
        )
        return [Neuron(la, i, d, None if e == NO_EXPERT else e) for la, i, d, e in rows]

    def by_layer(self, values: NDArray[_Scalar]) -> list[NDArray[_Scalar]]:
        """What is said of every neuron, a view for each layer."""
        return [values[self.layer(layer)] for layer in range(self.num_layers)]


@dataclass(frozen=True)
class Places:
    """Where what one worker says belongs: the MLP of each of its parts, the number of each of its
    neurons."""

    mlps: Ints
    neurons: Ints

    @classmethod
    def of(cls, parts: bytes, layout: Layout, layers: Sequence[int] | None = None) -> Places:
        """parts: int32 of [parts, (layer, expert, offset, width)]: neurons [offset, offset + width)
        of an MLP, NO_EXPERT for a dense or shared one. layers: only the parts of these."""
        rows = np.frombuffer(parts, dtype=np.int32).reshape(-1, 4).astype(np.int64)
        if layers is not None:
            rows = rows[np.isin(rows[:, 0], layers)]
        layer, expert, offset, width = rows.T
        mlps = layout.mlp(layer, expert)
        # A run of numbers for each part.
        before = np.cumsum(width) - width
        numbers = np.arange(width.sum()) + np.repeat(layout.starts[mlps] + offset - before, width)
        return cls(mlps, numbers)
