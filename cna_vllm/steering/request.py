# SPDX-License-Identifier: Apache-2.0
"""Steering as a client asks for it: the flat fields of `SamplingParams.extra_args`, with names.

Circuits with multipliers and vectors with coefficients are both a pair of fields that hold a name
and a number, or two lists of equal length; one scope serves all that a request names. What the
names stood for at admission is `resolved.Steering`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from cna_vllm.steering.content import show

FIELD_PREFIX = "cna_"
FIELD_CIRCUIT = "cna_circuit"
FIELD_MULTIPLIER = "cna_multiplier"
FIELD_VECTOR = "cna_vector"
FIELD_COEFFICIENT = "cna_coefficient"
FIELD_SCOPE = "cna_scope"
FIELD_RECORD = "cna_record"  # discovery only; admission takes it out before parsing
RESOLVED_FIELD = "cna_resolved"  # what admission puts in the place of the client's fields
SEAL_KEY = "seal"  # of its value: proof that admission wrote it
SCOPES = ("last", "all", "generated")
DEFAULT_SCOPE = "last"
MAX_NAME_LENGTH = 128
FLOAT32_MAX = float.fromhex("0x1.fffffep+127")

FIELDS = (FIELD_CIRCUIT, FIELD_MULTIPLIER, FIELD_VECTOR, FIELD_COEFFICIENT, FIELD_SCOPE)

NO_LIMIT = 2**31

Pairs = tuple[tuple[str, float], ...]


class SteeringError(ValueError):
    """A request that cannot be steered as it asks: one line with the field and the fix.

    Attributes:
        field: the request field at fault, for example `cna_multiplier`.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.problem)  # it crosses process borders


@dataclass(frozen=True)
class Kind:
    """A kind of steering: what it is called, what its number is called, the two fields, and the
    function of `cna_vllm.serving.control` that lets an engine hold one under a name."""

    noun: str
    number: str
    name_field: str
    number_field: str
    loader: str

    def given(self, names: str | Sequence[tuple[str, float]], number: Any) -> list[Any]:
        """The pairs of one name and its number, or of a list of them, unchecked.

        Raises SteeringError where the arguments have neither form.
        """
        if isinstance(names, str):
            if number is None:
                raise SteeringError(
                    self.number_field, f"missing; give one for {self.noun} {show(names)}"
                )
            return [(names, number)]
        self._refuse_content(names)
        if number is not None:
            raise SteeringError(
                self.number_field,
                f"give either (name, {self.number}) pairs or one name and {self.number}",
            )
        if not isinstance(names, list | tuple):
            raise SteeringError(
                self.name_field,
                f"must be a name or a list of (name, {self.number}) pairs, not {show(names)}",
            )
        for pair in names:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise SteeringError(
                    self.name_field, f"{show(pair)} is not a (name, {self.number}) pair"
                )
        return list(names)

    def write(self, pairs: Pairs) -> dict[str, Any]:
        """The fields `parse` reads back: scalars for one pair, else flat lists."""
        return dict(zip((self.name_field, self.number_field), columns(pairs), strict=True))

    def pairs(self, fields: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        """The (name, number) pairs of fields that `parse` has taken."""
        names, numbers = fields.get(self.name_field, ()), fields.get(self.number_field, ())
        return [(names, numbers)] if isinstance(names, str) else [*zip(names, numbers, strict=True)]

    def parse(self, fields: Mapping[str, Any], *, limit: float, most: int) -> Pairs:
        """The (name, number) pairs of a request.

        limit: largest absolute value of a number. most: how many pairs there may be.
        Raises SteeringError for anything else than two well-formed fields.
        """
        both = (self.name_field, self.number_field)
        for field, other in (both, both[::-1]):
            if field not in fields:
                present = other if other in fields else FIELD_SCOPE
                raise SteeringError(field, f"missing, but {present} is there; give both or neither")
        names, values = fields[self.name_field], fields[self.number_field]
        single = not isinstance(names, list | tuple)
        if isinstance(values, list | tuple) is single:
            raise SteeringError(
                self.number_field,
                f"is a list, but {self.name_field} is not; make both lists"
                if single
                else f"must be a list of {len(names)} numbers, one for each {self.noun}",
            )
        if single:
            return self.checked([(names, values)], limit, most)
        if len(names) != len(values):
            raise SteeringError(
                self.number_field,
                f"{len(values)} {self.number}s for {len(names)} {self.noun}s; "
                "the lists must be of equal length",
            )
        return self.checked([*zip(names, values, strict=True)], limit, most)

    def checked(self, pairs: list[Any], limit: float = FLOAT32_MAX, most: int = NO_LIMIT) -> Pairs:
        """Raises SteeringError for a wrong name or number, and for none or too many pairs."""
        if not pairs:
            raise SteeringError(
                self.name_field, f"is an empty list; name a {self.noun} or omit the field"
            )
        if len(pairs) > most:
            raise SteeringError(
                self.name_field, f"{len(pairs)} {self.noun}s on one request; at most {most}"
            )
        return tuple((self.checked_name(n), self.checked_number(x, limit)) for n, x in pairs)

    def checked_name(self, name: Any) -> str:
        """Raises SteeringError unless ``name`` is a text that can name something."""
        self._refuse_content(name)
        if not isinstance(name, str):
            raise SteeringError(self.name_field, f"must be a {self.noun}'s name, not {show(name)}")
        if not 1 <= len(name) <= MAX_NAME_LENGTH:
            raise SteeringError(
                self.name_field, f"a name has 1 to {MAX_NAME_LENGTH} characters, not {len(name)}"
            )
        return name

    def checked_number(self, value: Any, limit: float) -> float:
        """Raises SteeringError unless ``value`` is finite and, like its float32, within limits."""
        if not isinstance(value, Real) or isinstance(value, bool):
            raise SteeringError(self.number_field, f"must be a number, not {show(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise SteeringError(self.number_field, f"must be finite, not {show(value)}")
        limit = min(limit, FLOAT32_MAX)
        if abs(number) > limit:
            raise SteeringError(
                self.number_field, f"{number:g} is over the limit; use -{limit:g} to {limit:g}"
            )
        return number

    def _refuse_content(self, value: Any) -> None:
        if hasattr(value, "check_model"):
            raise SteeringError(
                self.name_field,
                f"takes the name of a {self.noun} that the engine holds, not a "
                f"{type(value).__name__}; give it one first: {self.loader}(llm, NAME, "
                f"{self.noun}), of cna_vllm.serving.control",
            )


CIRCUITS = Kind("circuit", "multiplier", FIELD_CIRCUIT, FIELD_MULTIPLIER, "load_circuit")
VECTORS = Kind("vector", "coefficient", FIELD_VECTOR, FIELD_COEFFICIENT, "load_vectors")


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
        max_multiplier: float = FLOAT32_MAX,
        max_circuits: int = NO_LIMIT,
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
        mine = {
            k: v
            for k, v in (extra_args or {}).items()
            if isinstance(k, str) and k.startswith(FIELD_PREFIX)
        }
        if not mine:
            return None
        for name in mine:
            if name not in FIELDS:
                raise SteeringError(name, _unknown(name))
        circuits: Pairs = ()
        vectors: Pairs = ()
        if FIELD_VECTOR in mine or FIELD_COEFFICIENT in mine:
            vectors = VECTORS.parse(mine, limit=max_multiplier, most=max_vectors)
        if FIELD_CIRCUIT in mine or FIELD_MULTIPLIER in mine or not vectors:
            circuits = CIRCUITS.parse(mine, limit=max_multiplier, most=max_circuits)
        return cls(circuits, checked_scope(mine.get(FIELD_SCOPE, DEFAULT_SCOPE)), vectors)

    def to_extra_args(self) -> dict[str, Any]:
        """The fields `from_extra_args` reads back: scalars for one circuit, else flat lists."""
        return {
            **(CIRCUITS.write(self.circuits) if self.circuits or not self.vectors else {}),
            **(VECTORS.write(self.vectors) if self.vectors else {}),
            FIELD_SCOPE: self.scope,
        }


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
    circuits = CIRCUITS.checked(CIRCUITS.given(circuit, multiplier))
    return CircuitRequest(circuits, checked_scope(scope)).to_extra_args()


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
    vectors = VECTORS.checked(VECTORS.given(vector, coefficient))
    return CircuitRequest((), checked_scope(scope), vectors).to_extra_args()


def columns(pairs: Pairs) -> tuple[Any, Any]:
    """Names and numbers: of one pair as they are, else two lists."""
    return pairs[0] if len(pairs) == 1 else ([n for n, _ in pairs], [x for _, x in pairs])


def checked_scope(scope: Any) -> str:
    """Raises SteeringError unless ``scope`` is one of `SCOPES`."""
    if isinstance(scope, str) and scope in SCOPES:
        return scope
    raise SteeringError(FIELD_SCOPE, f"must be one of {', '.join(SCOPES)}, not {show(scope)}")


def _unknown(name: str) -> str:
    if name in (RESOLVED_FIELD, FIELD_RECORD):
        return "is set by the server only; remove it"
    close = difflib.get_close_matches(name[:MAX_NAME_LENGTH], FIELDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(FIELDS)}"
    return f"unknown field; {hint}"
