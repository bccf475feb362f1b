# SPDX-License-Identifier: Apache-2.0
"""Where the neurons of a model are: how many each decoder layer has, and in which MLPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from cna_vllm.steering.content import in_range, show

MAX_WIDTH = 2**24
MAX_EXPERTS = 2**16


@dataclass(frozen=True)
class Shape:
    """Three tuples of one integer for each decoder layer.

    Attributes:
        widths: neurons of the layer's one dense or shared MLP; 0: it has none.
        experts: routed experts of the layer; 0: none.
        expert_widths: neurons of each of these experts; 0 where there are none.

    Raises:
        ValueError: no such layers; one line that names the field of a circuit file.
    """

    widths: tuple[int, ...]
    experts: tuple[int, ...]
    expert_widths: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, values, most in (
            ("intermediate_size", self.widths, MAX_WIDTH),
            ("experts.count", self.experts, MAX_EXPERTS),
            ("experts.intermediate_size", self.expert_widths, MAX_WIDTH),
        ):
            if len(values) != len(self.widths):
                raise ValueError(
                    f"{name!r} must have {len(self.widths)} elements, one for each layer, "
                    f"not {len(values)}"
                )
            for layer, value in enumerate(values):
                if not in_range(value, 0, most):
                    raise ValueError(
                        f"{name!r} must be an integer from 0 to {most}, or a list of such for "
                        f"each layer, not {show(value)} (layer {layer})"
                    )
        for layer, (count, width) in enumerate(zip(self.experts, self.expert_widths, strict=True)):
            if (count == 0) != (width == 0):
                raise ValueError(
                    f"'experts' must have a 'count' and an 'intermediate_size' in the same layers, "
                    f"but layer {layer} has {count} experts of {width} neurons"
                )

    @classmethod
    def of(
        cls,
        num_layers: int,
        intermediate_size: int | Sequence[int],
        experts: Mapping[str, Any] | None = None,
    ) -> Shape:
        """Of the fields of a circuit file: one integer for all layers, or one for each.

        experts: ``count`` and ``intermediate_size``; where a layer's count is 0, one integer that
        is the width of all experts says nothing about that layer.
        """
        if experts is None:
            experts = {"count": 0, "intermediate_size": 0}
        if not isinstance(experts, Mapping) or set(experts) != {"count", "intermediate_size"}:
            raise ValueError(
                "'experts' must be an object with 'count' and 'intermediate_size', "
                f"not {show(experts)}"
            )
        widths = _each("intermediate_size", intermediate_size, num_layers)
        counts = _each("experts.count", experts["count"], num_layers)
        sizes = _each("experts.intermediate_size", experts["intermediate_size"], num_layers)
        if not isinstance(experts["intermediate_size"], list | tuple):
            sizes = tuple(s if c else 0 for s, c in zip(sizes, counts, strict=True))
        return cls(widths, counts, sizes)

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.widths)

    @property
    def is_routed(self) -> bool:
        """Whether any layer has routed experts."""
        return any(self.experts)

    @property
    def size(self) -> int:
        """Neurons of the model."""
        return sum(map(self.layer_size, range(self.num_layers)))

    def layer_size(self, layer: int) -> int:
        """Neurons of a layer."""
        return self.widths[layer] + self.experts[layer] * self.expert_widths[layer]

    def width(self, layer: int, expert: int | None = None) -> int:
        """Neurons of a layer's dense or shared MLP, or of each of its routed experts."""
        return self.widths[layer] if expert is None else self.expert_widths[layer]

    def dense(self) -> Shape:
        """Without its routed experts."""
        none = (0,) * self.num_layers
        return Shape(self.widths, none, none)

    def differences(self, other: Shape, experts: bool) -> list[tuple[str, int, int]]:
        """(field of a circuit file, this one's value, the other's) in the layers in which two of
        equally many layers differ; of routed experts only if asked."""
        fields = [("intermediate_size", self.widths, other.widths)]
        if experts:
            fields += [
                ("experts.count", self.experts, other.experts),
                ("experts.intermediate_size", self.expert_widths, other.expert_widths),
            ]
        return [
            (f"{name!r}" if len({*mine}) == len({*theirs}) == 1 else f"{name!r} of layer {i}", a, b)
            for name, mine, theirs in fields
            for i, (a, b) in enumerate(zip(mine, theirs, strict=True))
            if a != b
        ]

    def fields(self) -> dict[str, Any]:
        """``num_layers``, ``intermediate_size`` and, of a routed one, ``experts``, as ``of`` takes
        them and files have them: an integer where all layers agree, else a list."""
        fields: dict[str, Any] = {
            "num_layers": self.num_layers,
            "intermediate_size": _brief(self.widths),
        }
        if self.is_routed:
            widths = [w for w in self.expert_widths if w]
            fields["experts"] = {
                "count": _brief(self.experts),
                "intermediate_size": (
                    widths[0] if len(set(widths)) == 1 else list(self.expert_widths)
                ),
            }
        return fields

    def __str__(self) -> str:
        """For messages: ``4 layers, intermediate size 96``; ``1 x 96, 3 x 64`` of a list, and
        ``3 layers with 4 experts of 16``."""
        text = f"{self.num_layers} layers, intermediate size {_runs(self.widths)}"
        routed = Counter(
            pair for pair in zip(self.experts, self.expert_widths, strict=True) if pair[0]
        )
        return text + "".join(
            f", {layers} {'layer' if layers == 1 else 'layers'} with {count} experts of {width}"
            for (count, width), layers in routed.items()
        )


def _each(name: str, value: object, num_layers: int) -> tuple[int, ...]:
    if isinstance(value, list | tuple):
        if len(value) != num_layers:
            raise ValueError(
                f"{name!r} must be an integer or a list of {num_layers}, one for each layer, "
                f"not a list of {len(value)}"
            )
        return tuple(value)
    return (value,) * num_layers  # type: ignore[return-value]  # checked in __post_init__


def _brief(values: tuple[int, ...]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def _runs(values: tuple[int, ...]) -> str:
    runs = [(value, len(list(group))) for value, group in groupby(values)]
    if len(runs) == 1:
        return str(values[0])
    return ", ".join(f"{count} x {value}" for value, count in runs)
