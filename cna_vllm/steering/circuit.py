# SPDX-License-Identifier: Apache-2.0
"""A circuit: a validated, immutable set of MLP neurons of one model, with its provenance."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypedDict, Unpack

from cna_vllm.files import parse_json
from cna_vllm.steering.content import MAX_FILE_BYTES, Content, show
from cna_vllm.steering.neurons import CircuitError as CircuitError
from cna_vllm.steering.neurons import Neuron as Neuron
from cna_vllm.steering.neurons import checked_neurons
from cna_vllm.steering.packed import Packed
from cna_vllm.steering.shape import Shape


class ModelNames(TypedDict, total=False):
    """What `Circuit.from_dict` takes of a model."""

    model: str | None
    architecture: str | None
    num_layers: int | None
    intermediate_size: int | Sequence[int] | None
    experts: Mapping[str, Any] | None


@dataclass(frozen=True)
class Circuit(Content):
    """The neurons, sorted by `Neuron.place` and unique, and what is known about their origin.

    Construction validates everything, so an instance is always usable.

    Attributes:
        model: id of the model the circuit was found in; only a name, since one model has many.
        architecture: class name of the model, for example `LlamaForCausalLM`.
        num_layers: decoder layers of the model.
        intermediate_size: width of the `down_proj` input of each layer's dense or shared MLP, 0
            where it has none: an integer of all layers, else a list.
        neurons: any iterable of `Neuron` is taken; kept as a sorted tuple.
        experts: `count` of each layer's routed experts and the `intermediate_size` of each of them,
            both as the field of that name; kept where a neuron is of a routed expert, else None.
        dtype: dtype of the model during discovery, empty where unknown.
        method: name and parameters of the method that found the neurons.
        prompts: counts and digest of the prompts.
        tools: versions of the software.
        created: ISO 8601 time in UTC, empty where unknown.
        notes: remarks, for instance of the loader.

    Raises:
        CircuitError: a field has a wrong type or value.
    """

    FORMAT = "cna-circuit"
    VERSIONS = (1, 2)
    REQUIRED = ("model", "architecture", "num_layers", "intermediate_size", "neurons")
    OPTIONAL = ("experts",)
    MISFIT = "circuit of {} does not fit {}; discover it in the model it shall steer"
    Error = CircuitError

    model: str
    architecture: str
    num_layers: int
    intermediate_size: int | list[int]
    neurons: tuple[Neuron, ...]
    dtype: str = ""
    method: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    notes: tuple[str, ...] = ()
    experts: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = _shape(self.num_layers, self.intermediate_size, self.experts)
        object.__setattr__(self, "neurons", checked_neurons(self.neurons, shape))
        fields = (shape if self.is_routed else shape.dense()).fields()
        object.__setattr__(self, "intermediate_size", fields["intermediate_size"])
        object.__setattr__(self, "experts", fields.get("experts"))

    @cached_property
    def shape(self) -> Shape:
        """Of the model; without its routed experts unless the circuit has neurons of them."""
        return Shape.of(self.num_layers, self.intermediate_size, self.experts)

    @cached_property
    def is_routed(self) -> bool:
        """Whether any neuron is of a routed expert."""
        return any(neuron.expert is not None for neuron in self.neurons)

    @property
    def version(self) -> int:
        """1 for one width of all layers and no routed expert, which older releases read too."""
        return 2 if self.is_routed or isinstance(self.intermediate_size, list) else 1

    def __len__(self) -> int:
        return len(self.neurons)

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) over the neurons, their deltas and the model's dimensions.

        Always computed from the content. Two circuits of equal digest steer identically. Where
        version 1 of the file can say the content, the digest is what it has always been.
        """
        content: list[Any] = [self.architecture, self.num_layers]
        if self.version == 1:
            neurons = [[n.layer, n.index, n.delta.hex()] for n in self.neurons]
            content += [self.intermediate_size, neurons]
        else:
            shape = self.shape
            content += [shape.widths, shape.experts, shape.expert_widths]
            content += [[[*n.place, n.delta.hex()] for n in self.neurons]]
        canonical = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def packed(self) -> Packed:
        """What workers get of it."""
        layers = array("i", (neuron.layer for neuron in self.neurons))
        indices = array("i", (neuron.index for neuron in self.neurons))
        experts = array("i", (n.place[1] for n in self.neurons) if self.is_routed else ())
        values = (layers.tobytes(), indices.tobytes(), experts.tobytes())
        return Packed("circuit", self.digest, *values)

    def by_mlp(self) -> dict[tuple[int, int | None], tuple[int, ...]]:
        """(layer, routed expert or None) -> ascending neuron indices, of the MLPs that have any,
        in the order of the neurons."""
        mlps: dict[tuple[int, int | None], list[int]] = {}
        for neuron in self.neurons:
            mlps.setdefault((neuron.layer, neuron.expert), []).append(neuron.index)
        return {mlp: tuple(indices) for mlp, indices in mlps.items()}

    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer -> ascending neuron indices, for the layers that have any, in ascending order.

        Raises:
            CircuitError: the circuit has neurons of routed experts, so that an index is not enough;
                see `by_mlp`.
        """
        if self.is_routed:
            raise CircuitError("has neurons of routed experts, which are not of a layer alone")
        return {layer: indices for (layer, _), indices in self.by_mlp().items()}

    def summary(self) -> str:
        """A few lines for people: model, size, where the neurons lie, origin, digest, notes."""
        size, total, layers = len(self), self.shape.size, {n.layer for n in self.neurons}
        last_quarter = self.num_layers - -(-self.num_layers // 4)
        late = sum(n.layer >= last_quarter for n in self.neurons)
        routed = [n.place[:2] for n in self.neurons if n.expert is not None]
        experts = (
            f"experts {len(routed)} of them in {len(set(routed))} of {sum(self.shape.experts)} "
            "routed experts"
        )
        return self._summary(
            [
                f"model   {self.model} ({self.architecture}, {self.shape})",
                f"neurons {size} of {total} ({size / total:.3%}) in {len(layers)} layers, "
                f"{late / size:.0%} in the last quarter",
                *([experts] if routed else []),
                f"sign    {sum(n.delta > 0 for n in self.neurons)} positive, "
                f"{sum(n.delta < 0 for n in self.neurons)} negative",
            ],
            [
                f"{name:7} " + ", ".join(f"{k}={_brief(json.dumps(v))}" for k, v in values.items())
                for name, values in (("method", self.method), ("prompts", self.prompts))
                if values
            ],
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `save` writes."""
        return {**self._fields(), "neurons": [neuron.to_dict() for neuron in self.neurons]}

    def to_bytes(self) -> bytes:
        """The content of the file that `save` writes: `to_dict` as JSON."""
        return f"{json.dumps(self.to_dict(), indent=1, allow_nan=False)}\n".encode()

    @classmethod
    def from_dict(
        cls,
        data: Any,
        *,
        model: str | None = None,
        architecture: str | None = None,
        num_layers: int | None = None,
        intermediate_size: int | Sequence[int] | None = None,
        experts: Mapping[str, Any] | None = None,
    ) -> Circuit:
        """Builds a circuit from decoded JSON: our format, the reference's, or `{layer: [indices]}`.

        The keyword arguments name the model; without `experts` it has no routed ones. The two
        foreign formats need all others; for our own format those given are checked against the
        file, except `model`, which is only a name.

        Raises:
            CircuitError: the data is not a valid circuit, or not one of the model named.
        """
        from cna_vllm.steering import circuit_file

        given = {
            "model": model,
            "architecture": architecture,
            "num_layers": num_layers,
            "intermediate_size": intermediate_size,
        }
        if not isinstance(data, dict):
            raise CircuitError(f"must be a JSON object, not {show(data)}")
        if "format" not in data and "version" not in data:
            neurons, notes = circuit_file.foreign(data)
            if missing := [name for name, value in given.items() if value is None]:
                raise CircuitError(
                    f"does not say which model it is of; pass {', '.join(missing)}, "
                    "or convert it once: cna-vllm inspect FILE --model MODEL --save OUT.json"
                )
            return cls(**given, experts=experts, neurons=neurons, notes=notes)  # type: ignore[arg-type]
        if "neurons" in data:
            data = {**data, "neurons": circuit_file.own(data["neurons"])}
        circuit = cls._of_fields(data)
        differs: list[tuple[str, Any, Any]] = [
            (f"{name!r}", getattr(circuit, name), value)
            for name, value in (("architecture", architecture), ("num_layers", num_layers))
            if value not in (None, getattr(circuit, name))
        ]
        if not differs and intermediate_size is not None:
            theirs = _shape(circuit.num_layers, intermediate_size, experts)
            differs += circuit.shape.differences(theirs, circuit.is_routed)
        for name, mine, other in differs:
            raise CircuitError(
                f"{name} is {mine!r} in the circuit of {circuit.model!r} but {other!r} in the "
                f"model {model or 'it shall steer'!r}; discover it in that model"
            )
        return circuit

    def check_model(self, model: str, architecture: str, shape: Shape) -> None:
        """Raises CircuitError, naming both models, unless architecture and dimensions agree; of
        routed experts only where the circuit has neurons of them."""
        theirs = shape if self.is_routed else shape.dense()
        self._check_fit(self.shape, model, architecture, theirs)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = MAX_FILE_BYTES,
        **model: Unpack[ModelNames],
    ) -> Circuit:
        """Reads and validates a circuit file of at most `max_bytes` bytes; see `from_dict`.

        Raises:
            CircuitError: one line that starts with the file's name.
        """
        return cls._load(path, max_bytes, lambda raw: cls.from_dict(parse_json(raw), **model))


def shared_neurons(circuits: Iterable[Circuit]) -> int:
    """How many neurons are in more than one of these circuits of one model: where they steer the
    same request, such a neuron gets the product of their multipliers."""
    seen = Counter(n.place for circuit in circuits for n in circuit.neurons)
    return sum(count > 1 for count in seen.values())


def _shape(num_layers: int, intermediate_size: Any, experts: Any) -> Shape:
    try:
        return Shape.of(num_layers, intermediate_size, experts)
    except ValueError as error:
        raise CircuitError(str(error)) from None


def _brief(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
