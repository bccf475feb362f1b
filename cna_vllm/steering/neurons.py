# SPDX-License-Identifier: Apache-2.0
"""The neurons of a circuit, and which of them a model has."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cna_vllm.steering.content import in_range, is_int, show
from cna_vllm.steering.shape import Shape


class CircuitError(ValueError):
    """A circuit, or the file of one, that cannot be used: one line with the field and the fix."""


@dataclass(frozen=True, slots=True)
class Neuron:
    """Element `index` of the vector that enters a down projection of decoder layer `layer`.

    All count from 0. `expert` says of which routed expert the projection is; None means that of the
    layer's one dense or shared MLP. `delta` is the signed difference of mean activations (positive
    minus negative prompts) that selected it, in activation units; 0.0 where it is not known.
    """

    layer: int
    index: int
    delta: float = 0.0
    expert: int | None = None

    @property
    def place(self) -> tuple[int, int, int]:
        """What circuits sort neurons by: layer, routed expert (-1 for none), index."""
        return self.layer, -1 if self.expert is None else self.expert, self.index

    def to_dict(self) -> dict[str, Any]:
        """As files and answers have it; `expert` only where there is one."""
        if self.expert is None:
            return {"layer": self.layer, "index": self.index, "delta": self.delta}
        return {
            "layer": self.layer,
            "expert": self.expert,
            "index": self.index,
            "delta": self.delta,
        }


def checked_neurons(neurons: Iterable[Neuron], shape: Shape) -> tuple[Neuron, ...]:
    """Sorted and unique. Raises CircuitError, naming the position and the field, for those that a
    model of this shape does not have."""
    checked = []
    for position, neuron in enumerate(neurons):
        where = f"'neurons'[{position}]"
        if not isinstance(neuron, Neuron):
            raise CircuitError(f"{where} must be a Neuron, not {show(neuron)}")
        layer, index, expert = neuron.layer, neuron.index, neuron.expert
        _check_below(where, "layer", layer, shape.num_layers)
        if expert is not None:
            if not (count := shape.experts[layer]):
                raise CircuitError(
                    f"{where}: 'expert' is {show(expert)}, but layer {layer} has no routed experts"
                )
            _check_below(where, "expert", expert, count)
        elif not shape.widths[layer]:
            routed = shape.experts[layer]
            fix = f"give one from 0 to {routed - 1}" if routed else "it has no MLP at all"
            raise CircuitError(
                f"{where}: 'expert' is missing, and layer {layer} has no dense or shared MLP; {fix}"
            )
        _check_below(where, "index", index, shape.width(layer, expert))
        checked.append(Neuron(layer, index, checked_delta(where, neuron.delta), expert))
    if not checked:
        raise CircuitError("'neurons' is empty; a circuit has at least one")
    checked.sort(key=lambda neuron: neuron.place)
    for left, right in pairwise(checked):
        if left.place == right.place:
            of = "" if left.expert is None else f" expert {left.expert},"
            raise CircuitError(
                f"'neurons' names layer {left.layer},{of} index {left.index} twice; remove one"
            )
    return tuple(checked)


def _check_below(where: str, name: str, value: object, limit: int) -> None:
    if not in_range(value, 0, limit - 1):
        raise CircuitError(
            f"{where}: {name!r} must be an integer from 0 to {limit - 1}, not {show(value)}"
        )


def checked_delta(where: str, value: object) -> float:
    """Raises CircuitError, naming `where`, unless `value` is a finite number."""
    try:
        if isinstance(value, float) or is_int(value):
            delta = float(value)
            if math.isfinite(delta):
                return delta + 0.0  # -0.0 and 0.0 are equal, so they must not differ in the digest
    except OverflowError:
        pass
    raise CircuitError(f"{where}: 'delta' must be a finite number, not {show(value)}")
