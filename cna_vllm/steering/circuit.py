# SPDX-License-Identifier: Apache-2.0
"""A circuit: a validated, immutable set of MLP neurons of one model, with its provenance."""

from __future__ import annotations

import hashlib
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, TypedDict, Unpack

from cna_vllm.files import parse_json
from cna_vllm.steering.content import MAX_FILE_BYTES, Content, in_range, is_int, show
from cna_vllm.steering.packed import Packed


class CircuitError(ValueError):
    """A circuit, or the file of one, that cannot be used: one line with the field and the fix."""


@dataclass(frozen=True, order=True, slots=True)
class Neuron:
    """Element `index` of the vector that enters `mlp.down_proj` of decoder layer `layer` (0-based).

    `delta` is the signed difference of mean activations (positive minus negative prompts) that
    selected it, in activation units; 0.0 where it is not known.
    """

    layer: int
    index: int
    delta: float = 0.0


class ModelNames(TypedDict, total=False):
    """What `Circuit.from_dict` takes of a model."""

    model: str | None
    architecture: str | None
    num_layers: int | None
    intermediate_size: int | None


@dataclass(frozen=True)
class Circuit(Content):
    """The neurons, sorted by (layer, index) and unique, and what is known about their origin.

    Construction validates everything, so an instance is always usable.

    Attributes:
        model: id of the model the circuit was found in; only a name, since one model has many.
        architecture: class name of the model, for example `LlamaForCausalLM`.
        num_layers: decoder layers of the model.
        intermediate_size: width of the `down_proj` input.
        neurons: any iterable of `Neuron` is taken; kept as a sorted tuple.
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
    WIDTH = "intermediate_size"
    MAX_WIDTH = 2**24
    REQUIRED = ("model", "architecture", "num_layers", "intermediate_size", "neurons")
    MISFIT = "circuit of {} does not fit {}; discover it in the model it shall steer"
    Error = CircuitError

    model: str
    architecture: str
    num_layers: int
    intermediate_size: int
    neurons: tuple[Neuron, ...]
    dtype: str = ""
    method: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        neurons = _checked_neurons(self.neurons, self.num_layers, self.intermediate_size)
        object.__setattr__(self, "neurons", neurons)

    def __len__(self) -> int:
        return len(self.neurons)

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) over the neurons, their deltas and the model's dimensions.

        Always computed from the content. Two circuits of equal digest steer identically.
        """
        content = [
            self.architecture,
            self.num_layers,
            self.intermediate_size,
            [[n.layer, n.index, n.delta.hex()] for n in self.neurons],
        ]
        canonical = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def packed(self) -> Packed:
        """What workers get of it."""
        layers = array("i", (neuron.layer for neuron in self.neurons))
        indices = array("i", (neuron.index for neuron in self.neurons))
        return Packed("circuit", self.digest, layers.tobytes(), indices.tobytes())

    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """Layer -> ascending neuron indices, for the layers that have any, in ascending order."""
        layers: dict[int, list[int]] = {}
        for neuron in self.neurons:
            layers.setdefault(neuron.layer, []).append(neuron.index)
        return {layer: tuple(indices) for layer, indices in layers.items()}

    def summary(self) -> str:
        """A few lines for people: model, size, where the neurons lie, origin, digest, notes."""
        size, total = len(self), self.num_layers * self.intermediate_size
        last_quarter = self.num_layers - -(-self.num_layers // 4)
        late = sum(n.layer >= last_quarter for n in self.neurons)
        return self._summary(
            [
                f"model   {self._described(self.model, *self._shape)}",
                f"neurons {size} of {total} ({size / total:.3%}) in {len(self.by_layer())} layers, "
                f"{late / size:.0%} in the last quarter",
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
        neurons = [{"layer": n.layer, "index": n.index, "delta": n.delta} for n in self.neurons]
        return {**self._fields(), "neurons": neurons}

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
        intermediate_size: int | None = None,
    ) -> Circuit:
        """Builds a circuit from decoded JSON: our format, the reference's, or `{layer: [indices]}`.

        The keyword arguments name the model. The two foreign formats need all four; for our own
        format those given are checked against the file, except `model`, which is only a name.

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
            return cls(**given, neurons=tuple(neurons), notes=tuple(notes))  # type: ignore[arg-type]
        if "neurons" in data:
            data = {**data, "neurons": circuit_file.own(data["neurons"])}
        circuit = cls._of_fields(data)
        for name, value in given.items():
            if name != "model" and value is not None and value != getattr(circuit, name):
                raise CircuitError(
                    f"{name!r} is {getattr(circuit, name)!r} in the circuit of {circuit.model!r} "
                    f"but {value!r} in the model {model or 'it shall steer'!r}; discover it in "
                    "that model"
                )
        return circuit

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
    seen = Counter((n.layer, n.index) for circuit in circuits for n in circuit.neurons)
    return sum(count > 1 for count in seen.values())


def _checked_neurons(
    neurons: Iterable[Neuron], num_layers: int, intermediate_size: int
) -> tuple[Neuron, ...]:
    checked = []
    for position, neuron in enumerate(neurons):
        where = f"'neurons'[{position}]"
        if not isinstance(neuron, Neuron):
            raise CircuitError(f"{where} must be a Neuron, not {show(neuron)}")
        for name, value, limit in (
            ("layer", neuron.layer, num_layers),
            ("index", neuron.index, intermediate_size),
        ):
            if not in_range(value, 0, limit - 1):
                raise CircuitError(
                    f"{where}: {name!r} must be an integer from 0 to {limit - 1}, not {show(value)}"
                )
        checked.append(Neuron(neuron.layer, neuron.index, checked_delta(where, neuron.delta)))
    if not checked:
        raise CircuitError("'neurons' is empty; a circuit has at least one")
    checked.sort()
    for left, right in pairwise(checked):
        if left.layer == right.layer and left.index == right.index:
            raise CircuitError(
                f"'neurons' names layer {left.layer}, index {left.index} twice; remove one"
            )
    return tuple(checked)


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


def _brief(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
