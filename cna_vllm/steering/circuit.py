# SPDX-License-Identifier: Apache-2.0
"""A circuit: a validated, immutable set of MLP neurons of one model, with its provenance."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Any

from cna_vllm.files import write_atomic
from cna_vllm.steering.packed import Packed

MAX_FILE_BYTES = 64 * 2**20
MAX_LAYERS = 2**16
MAX_INTERMEDIATE_SIZE = 2**24


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


@dataclass(frozen=True)
class Circuit:
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
        for name in ("model", "dtype", "created"):
            check_text(name, getattr(self, name))
        if not self.model:
            raise CircuitError("'model' must not be empty")
        if not (isinstance(self.architecture, str) and self.architecture.isidentifier()):
            raise CircuitError(
                f"'architecture' must be a class name such as 'LlamaForCausalLM', "
                f"not {show(self.architecture)}"
            )
        check_time(self.created)
        check_size("num_layers", self.num_layers, MAX_LAYERS)
        check_size("intermediate_size", self.intermediate_size, MAX_INTERMEDIATE_SIZE)
        for name in ("method", "prompts", "tools"):
            object.__setattr__(self, name, plain_json(name, getattr(self, name)))
        if not isinstance(self.notes, list | tuple):
            raise CircuitError(f"'notes' must be a list of strings, not {show(self.notes)}")
        for note in self.notes:
            check_text("notes", note)
        object.__setattr__(self, "notes", tuple(self.notes))
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
        from cna_vllm.steering import circuit_summary

        return circuit_summary.summarize(self)

    def check_model(
        self, model: str, architecture: str, num_layers: int, intermediate_size: int
    ) -> None:
        """Raises CircuitError, naming both models, unless architecture and dimensions agree."""
        mine = (self.architecture, self.num_layers, self.intermediate_size)
        theirs = (architecture, num_layers, intermediate_size)
        if mine != theirs:
            raise CircuitError(
                f"circuit of {_describe(self.model, *mine)} does not fit "
                f"{_describe(model, *theirs)}; discover it in the model it shall steer"
            )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `save` writes."""
        from cna_vllm.steering import circuit_file

        return circuit_file.encode(self)

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

        return circuit_file.decode(data, model, architecture, num_layers, intermediate_size)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: str | None = None,
        architecture: str | None = None,
        num_layers: int | None = None,
        intermediate_size: int | None = None,
        max_bytes: int = MAX_FILE_BYTES,
    ) -> Circuit:
        """Reads and validates a circuit file of at most `max_bytes` bytes; see `from_dict`.

        Raises:
            CircuitError: one line that starts with the file's name.
        """
        from cna_vllm.steering import circuit_file

        try:
            data = circuit_file.read_json(path, max_bytes)
            return circuit_file.decode(data, model, architecture, num_layers, intermediate_size)
        except CircuitError as error:
            raise CircuitError(f"{os.fspath(path)}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the circuit file atomically: readers see the old file or the whole new one.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        write_atomic(path, [json.dumps(self.to_dict(), indent=1, allow_nan=False), "\n"])


def shared_neurons(circuits: Iterable[Circuit]) -> int:
    """How many neurons are in more than one of these circuits of one model: where they steer the
    same request, such a neuron gets the product of their multipliers."""
    seen = Counter((n.layer, n.index) for circuit in circuits for n in circuit.neurons)
    return sum(count > 1 for count in seen.values())


def show(value: object) -> str:
    """`value` for an error message: short, on one line, whatever it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer over the interpreter's limit of digits
        return f"a huge {type(value).__name__}"


def is_int(value: object) -> bool:
    """True for int but not for bool, which JSON keeps apart and Python does not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_text(name: str, value: object) -> None:
    # Printable, so that messages and tables that quote it stay on one line.
    if not isinstance(value, str) or not value.isprintable():
        raise CircuitError(f"{name!r} must be printable text on one line, not {show(value)}")


def check_time(created: str) -> None:
    try:
        if created:
            datetime.fromisoformat(created)
    except ValueError:
        raise CircuitError(f"'created' must be an ISO 8601 time, not {show(created)}") from None


def _describe(model: str, architecture: str, num_layers: int, intermediate_size: int) -> str:
    return f"{model!r} ({architecture}, {num_layers} layers, intermediate size {intermediate_size})"


def check_size(name: str, value: object, limit: int) -> None:
    if not is_int(value) or not 1 <= value <= limit:  # type: ignore[operator]
        raise CircuitError(f"{name!r} must be an integer from 1 to {limit}, not {show(value)}")


def plain_json(name: str, value: object) -> dict[str, Any]:
    """A deep copy of JSON types only, so that it equals what a file or another process gives."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise CircuitError(f"{name!r} must be an object with string keys")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CircuitError(f"{name!r} cannot be written as JSON: {error}") from error
    return plain


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
            if not is_int(value) or not 0 <= value < limit:
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
            delta = float(value)  # type: ignore[arg-type]
            if math.isfinite(delta):
                return delta + 0.0  # -0.0 and 0.0 are equal, so they must not differ in the digest
    except OverflowError:
        pass
    raise CircuitError(f"{where}: 'delta' must be a finite number, not {show(value)}")
