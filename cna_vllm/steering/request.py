# SPDX-License-Identifier: Apache-2.0
"""Steering as a request carries it: from and to the flat fields of `SamplingParams.extra_args`.

Two forms: `CircuitRequest` holds the names a client wrote, `Steering` the content digests they
stood for at admission. Only the second one decides what is computed and what the KV cache may
share, so a name that is later given to another circuit changes nothing for running requests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cna_vllm.steering.content import show
from cna_vllm.steering.request_fields import (
    CIRCUITS,
    DEFAULT_SCOPE,
    FIELD_CIRCUIT,
    FIELD_COEFFICIENT,
    FIELD_MULTIPLIER,
    FIELD_PREFIX,
    FIELD_RECORD,
    FIELD_SCOPE,
    FIELD_VECTOR,
    FIELDS,
    FLOAT32_MAX,
    MAX_NAME_LENGTH,
    RESOLVED_FIELD,
    SCOPES,
    SEAL_KEY,
    VECTORS,
    Kind,
    Pairs,
    SteeringError,
    checked_scope,
    own_fields,
)

__all__ = [
    "DEFAULT_SCOPE",
    "FIELDS",
    "FIELD_CIRCUIT",
    "FIELD_COEFFICIENT",
    "FIELD_MULTIPLIER",
    "FIELD_PREFIX",
    "FIELD_RECORD",
    "FIELD_SCOPE",
    "FIELD_VECTOR",
    "FLOAT32_MAX",
    "MAX_NAME_LENGTH",
    "RESOLVED_FIELD",
    "SCOPES",
    "SEAL_KEY",
    "CircuitRequest",
    "Steering",
    "SteeringError",
    "resolve",
    "steer",
    "steer_vector",
    "to_float32",
]

NO_LIMIT = 2**31


def steer(
    circuit: str | Sequence[tuple[str, float]],
    multiplier: float | None = None,
    *,
    scope: str = DEFAULT_SCOPE,
) -> dict[str, Any]:
    """`extra_args` of `SamplingParams` that scale one circuit, or several together.

    Args:
        circuit: name of a circuit the engine knows, or a list of (name, multiplier) pairs.
        multiplier: 0 ablates, 1 changes nothing, above 1 amplifies, below 0 inverts. Only with a
            single name.
        scope: which positions: `last` (the last prompt token and all after it), `all`, or
            `generated`.

    Raises:
        SteeringError: a wrong type or value. Limits of the engine are checked at admission.
    """
    return _fields(CIRCUITS, circuit, multiplier, scope)


def steer_vector(
    vector: str | Sequence[tuple[str, float]],
    coefficient: float | None = None,
    *,
    scope: str = DEFAULT_SCOPE,
) -> dict[str, Any]:
    """`extra_args` of `SamplingParams` that add one steering vector, or several together.

    With circuits on the same request, of the same scope: `{**steer(...), **steer_vector(...)}`.

    Args:
        vector: name of a vector the engine knows, or a list of (name, coefficient) pairs.
        coefficient: what the vector is multiplied by before it is added; 0 changes nothing, a
            negative one steers the other way. Only with a single name.
        scope: as for `steer`.

    Raises:
        SteeringError: a wrong type or value. Limits of the engine are checked at admission.
    """
    return _fields(VECTORS, vector, coefficient, scope)


def _fields(
    kind: Kind, names: str | Sequence[tuple[str, float]], number: float | None, scope: str
) -> dict[str, Any]:
    fields = {**kind.fields_of(names, number), FIELD_SCOPE: scope}
    CircuitRequest.from_extra_args(fields, max_multiplier=FLOAT32_MAX, max_circuits=NO_LIMIT)
    return fields


@dataclass(frozen=True)
class CircuitRequest:
    """Which circuits and vectors, by name, with which multipliers and coefficients, and where."""

    circuits: Pairs = ()
    scope: str = DEFAULT_SCOPE
    vectors: Pairs = ()

    @classmethod
    def from_extra_args(
        cls,
        extra_args: Mapping[str, Any] | None,
        *,
        max_multiplier: float,
        max_circuits: int,
        max_vectors: int = NO_LIMIT,
    ) -> CircuitRequest | None:
        """Parses a client's fields; `None` where no field starts with `cna_`.

        Args:
            max_multiplier: largest absolute value of a multiplier or coefficient.
            max_circuits: most circuits on one request.
            max_vectors: most vectors on one request.

        Raises:
            SteeringError: anything else than well-formed steering. Nothing is corrected silently.
        """
        mine = own_fields(extra_args)
        if not mine:
            return None
        circuits: Pairs = ()
        vectors: Pairs = ()
        if VECTORS.is_in(mine):
            vectors = VECTORS.parse(mine, limit=max_multiplier, most=max_vectors)
        if CIRCUITS.is_in(mine) or not vectors:
            circuits = CIRCUITS.parse(mine, limit=max_multiplier, most=max_circuits)
        return cls(circuits, checked_scope(mine.get(FIELD_SCOPE, DEFAULT_SCOPE)), vectors)

    def to_extra_args(self) -> dict[str, Any]:
        """The fields `from_extra_args` reads back: scalars for one circuit, else flat lists."""
        return {
            **(CIRCUITS.write(self.circuits) if self.circuits or not self.vectors else {}),
            **(VECTORS.write(self.vectors) if self.vectors else {}),
            FIELD_SCOPE: self.scope,
        }


@dataclass(frozen=True)
class Steering:
    """Resolved steering: sorted (content digest, float32 number) pairs, and a scope.

    Attributes:
        pairs: circuits with multipliers other than 1.
        vectors: vectors with coefficients other than 0, added in this order.
    """

    pairs: Pairs
    scope: str = DEFAULT_SCOPE
    vectors: Pairs = ()

    @property
    def digests(self) -> tuple[str, ...]:
        """Everything it needs a worker to hold."""
        return tuple(digest for digest, _ in (*self.pairs, *self.vectors))

    def to_field(self) -> dict[str, Any]:
        """The value of `cna_resolved`: JSON and msgpack types only."""
        field: dict[str, Any] = {"circuits": [list(p) for p in self.pairs], "scope": self.scope}
        return {**field, "vectors": [list(p) for p in self.vectors]} if self.vectors else field

    @classmethod
    def from_field(cls, value: Any) -> Steering:
        """Reads what `to_field` wrote; a seal beside it is not looked at.

        Raises:
            SteeringError: the value has another shape.
        """
        optional = {"vectors", SEAL_KEY}
        if not isinstance(value, Mapping) or set(value) - optional != {"circuits", "scope"}:
            raise SteeringError(RESOLVED_FIELD, f"malformed: {show(value)}")
        pairs = _resolved_pairs(CIRCUITS, value["circuits"])
        vectors = _resolved_pairs(VECTORS, value.get("vectors", ()))
        if not pairs and not vectors:
            raise SteeringError(RESOLVED_FIELD, "malformed: steers nothing")
        return cls(pairs, checked_scope(value["scope"]), vectors)

    def first_position(self, prompt_len: int) -> int:
        """First steered absolute position; `prompt_len` counts the original prompt's tokens."""
        if self.scope == "all":
            return 0
        return prompt_len if self.scope == "generated" else prompt_len - 1

    def cache_key(self, first_position: int) -> str:
        """Equal for two requests only if they steer every position from the first one on alike."""
        circuits = ",".join(f"{digest}*{m.hex()}" for digest, m in self.pairs)
        vectors = "".join(f"+{digest}*{c.hex()}" for digest, c in self.vectors)
        return f"cna:{self.scope}@{first_position}:{circuits}{vectors}"


def resolve(
    request: CircuitRequest,
    lookup: Callable[[str], str],
    lookup_vector: Callable[[str], str] | None = None,
) -> Steering | None:
    """Names to digests, in the canonical form that equal steering shares.

    Numbers are rounded to float32, the precision the kernels apply; circuits whose multiplier is
    then exactly 1, and vectors whose coefficient is 0, are dropped. `None` means a plain request.

    Args:
        lookup: digest of a circuit's current content; what it raises for an unknown name is
            passed on, also for a circuit whose multiplier is 1.
        lookup_vector: the same of a vector; None where the engine has none.
    """
    if request.vectors and lookup_vector is None:
        raise SteeringError(
            FIELD_VECTOR, "this engine was started without vectors; start it with cna.max_vectors"
        )
    pairs = [(lookup(name), to_float32(multiplier)) for name, multiplier in request.circuits]
    vectors = [
        (lookup_vector(name), to_float32(coefficient))
        for name, coefficient in request.vectors
        if lookup_vector is not None
    ]
    steered = tuple(sorted(pair for pair in pairs if pair[1] != 1.0))
    added = tuple(sorted(pair for pair in vectors if pair[1] != 0.0))
    return Steering(steered, request.scope, added) if steered or added else None


def _resolved_pairs(kind: Kind, entries: Any) -> Pairs:
    if not isinstance(entries, list | tuple):
        raise SteeringError(RESOLVED_FIELD, f"malformed {kind.noun}s: {show(entries)}")
    pairs = []
    for entry in entries:
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise SteeringError(RESOLVED_FIELD, f"malformed pair: {show(entry)}")
        pairs.append((kind.checked_name(entry[0]), kind.checked_number(entry[1], FLOAT32_MAX)))
    return tuple(pairs)


def to_float32(value: float) -> float:
    """The nearest float32, the precision that kernels apply; never -0.0."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded + 0.0  # -0.0 ablates like 0.0 and must share its cache key
