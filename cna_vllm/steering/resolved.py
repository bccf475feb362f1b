# SPDX-License-Identifier: Apache-2.0
"""Steering as it was resolved at admission: content digests in place of the names of a request.

Only this decides what is computed and what the KV cache may share, so a name that is later given
to another circuit changes nothing for running requests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cna_vllm.steering.content import show
from cna_vllm.steering.request import (
    CIRCUITS,
    DEFAULT_SCOPE,
    FIELD_VECTOR,
    RESOLVED_FIELD,
    SEAL_KEY,
    VECTORS,
    CircuitRequest,
    Kind,
    Pairs,
    SteeringError,
    checked_scope,
)


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


def to_float32(value: float) -> float:
    """The nearest float32, the precision that kernels apply; never -0.0."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded + 0.0  # -0.0 ablates like 0.0 and must share its cache key


def _resolved_pairs(kind: Kind, entries: Any) -> Pairs:
    if not isinstance(entries, list | tuple):
        raise SteeringError(RESOLVED_FIELD, f"malformed {kind.noun}s: {show(entries)}")
    for entry in entries:
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise SteeringError(RESOLVED_FIELD, f"malformed pair: {show(entry)}")
    return kind.checked(list(entries)) if entries else ()
