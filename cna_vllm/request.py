# SPDX-License-Identifier: Apache-2.0
"""Steering as a request carries it: from and to the flat fields of `SamplingParams.extra_args`.

Two forms: `CircuitRequest` holds the names a client wrote, `Steering` the content digests they
stood for at admission. Only the second one decides what is computed and what the KV cache may
share, so a name that is later given to another circuit changes nothing for running requests.
"""

from __future__ import annotations

import difflib
import math
import numbers
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cna_vllm.circuit import is_int, show

FIELD_PREFIX = "cna_"
FIELD_CIRCUIT = "cna_circuit"
FIELD_MULTIPLIER = "cna_multiplier"
FIELD_SCOPE = "cna_scope"
FIELD_RECORD = "cna_record"  # discovery only; admission takes it out before parsing
RESOLVED_FIELD = "cna_resolved"  # what admission puts in the place of the client's fields
SCOPES = ("last", "all", "generated")
DEFAULT_SCOPE = "last"
MAX_NAME_LENGTH = 128
FLOAT32_MAX = float.fromhex("0x1.fffffep+127")

FIELDS = (FIELD_CIRCUIT, FIELD_MULTIPLIER, FIELD_SCOPE)


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
    if isinstance(circuit, str):
        if multiplier is None:
            raise SteeringError(FIELD_MULTIPLIER, f"missing; give one for circuit {show(circuit)}")
        fields = {FIELD_CIRCUIT: circuit, FIELD_MULTIPLIER: _as_float(multiplier)}
    else:
        if multiplier is not None:
            raise SteeringError(
                FIELD_MULTIPLIER, "give either (name, multiplier) pairs or one name and multiplier"
            )
        fields = _fields_of_pairs(circuit)
    fields[FIELD_SCOPE] = scope
    CircuitRequest.from_extra_args(fields, max_multiplier=FLOAT32_MAX, max_circuits=2**31)
    return fields


@dataclass(frozen=True)
class CircuitRequest:
    """Which circuits, by name, with which multipliers, at which positions."""

    circuits: tuple[tuple[str, float], ...]
    scope: str = DEFAULT_SCOPE

    @classmethod
    def from_extra_args(
        cls,
        extra_args: Mapping[str, Any] | None,
        *,
        max_multiplier: float,
        max_circuits: int,
    ) -> CircuitRequest | None:
        """Parses a client's fields; `None` where no field starts with `cna_`.

        Args:
            max_multiplier: largest absolute value of a multiplier.
            max_circuits: most circuits on one request.

        Raises:
            SteeringError: anything else than well-formed steering. Nothing is corrected silently.
        """
        mine = {k: v for k, v in (extra_args or {}).items() if _is_mine(k)}
        if not mine:
            return None
        for name in mine:
            if name not in FIELDS:
                raise SteeringError(name, _unknown(name))
        for name, other in ((FIELD_CIRCUIT, FIELD_MULTIPLIER), (FIELD_MULTIPLIER, FIELD_CIRCUIT)):
            if name not in mine:
                present = other if other in mine else FIELD_SCOPE
                raise SteeringError(name, f"missing, but {present} is there; give both or neither")
        names, multipliers = _parallel_lists(mine[FIELD_CIRCUIT], mine[FIELD_MULTIPLIER])
        if len(names) > max_circuits:
            raise SteeringError(
                FIELD_CIRCUIT, f"{len(names)} circuits on one request; at most {max_circuits}"
            )
        pairs = tuple(
            (_checked_name(name), _checked_multiplier(multiplier, max_multiplier))
            for name, multiplier in zip(names, multipliers, strict=True)
        )
        return cls(pairs, _checked_scope(mine.get(FIELD_SCOPE, DEFAULT_SCOPE)))

    def to_extra_args(self) -> dict[str, Any]:
        """The fields `from_extra_args` reads back: scalars for one circuit, else flat lists."""
        names = [name for name, _ in self.circuits]
        multipliers = [multiplier for _, multiplier in self.circuits]
        single = len(names) == 1
        return {
            FIELD_CIRCUIT: names[0] if single else names,
            FIELD_MULTIPLIER: multipliers[0] if single else multipliers,
            FIELD_SCOPE: self.scope,
        }


@dataclass(frozen=True)
class Steering:
    """Resolved steering: (content digest, float32 multiplier other than 1), sorted, and a scope."""

    pairs: tuple[tuple[str, float], ...]
    scope: str = DEFAULT_SCOPE

    def to_field(self) -> dict[str, Any]:
        """The value of `cna_resolved`: JSON and msgpack types only."""
        return {"circuits": [[digest, m] for digest, m in self.pairs], "scope": self.scope}

    @classmethod
    def from_field(cls, value: Any) -> Steering:
        """Reads what `to_field` wrote.

        Raises:
            SteeringError: the value has another shape.
        """
        if not isinstance(value, Mapping) or set(value) != {"circuits", "scope"}:
            raise SteeringError(RESOLVED_FIELD, f"malformed: {show(value)}")
        entries = value["circuits"]
        if not isinstance(entries, list | tuple) or not entries:
            raise SteeringError(RESOLVED_FIELD, f"malformed circuits: {show(entries)}")
        pairs = []
        for entry in entries:
            if not isinstance(entry, list | tuple) or len(entry) != 2:
                raise SteeringError(RESOLVED_FIELD, f"malformed pair: {show(entry)}")
            name = _checked_name(entry[0])
            pairs.append((name, _checked_multiplier(entry[1], FLOAT32_MAX)))
        return cls(tuple(pairs), _checked_scope(value["scope"]))

    def first_position(self, prompt_len: int) -> int:
        """First steered absolute position; `prompt_len` counts the original prompt's tokens."""
        if self.scope == "all":
            return 0
        return prompt_len if self.scope == "generated" else prompt_len - 1

    def cache_key(self, first_position: int) -> str:
        """Equal for two requests only if they steer every position from the first one on alike."""
        circuits = ",".join(f"{digest}*{m.hex()}" for digest, m in self.pairs)
        return f"cna:{self.scope}@{first_position}:{circuits}"


def resolve(request: CircuitRequest, lookup: Callable[[str], str]) -> Steering | None:
    """Names to digests, in the canonical form that equal steering shares.

    Multipliers are rounded to float32, the precision the kernel applies; circuits whose multiplier
    is then exactly 1 are dropped. `None` means a plain request.

    Args:
        lookup: digest of a circuit's current content; what it raises for an unknown name is
            passed on, also for a circuit whose multiplier is 1.
    """
    pairs = [(lookup(name), _to_float32(multiplier)) for name, multiplier in request.circuits]
    steered = sorted(pair for pair in pairs if pair[1] != 1.0)
    return Steering(tuple(steered), request.scope) if steered else None


def _is_mine(key: object) -> bool:
    return isinstance(key, str) and key.startswith(FIELD_PREFIX)


def _unknown(name: str) -> str:
    if name in (RESOLVED_FIELD, FIELD_RECORD):
        return "is set by the server only; remove it"
    close = difflib.get_close_matches(name[:MAX_NAME_LENGTH], FIELDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(FIELDS)}"
    return f"unknown field; {hint}"


def _fields_of_pairs(pairs: Sequence[tuple[str, float]]) -> dict[str, Any]:
    names, multipliers = [], []
    if not isinstance(pairs, list | tuple):
        raise SteeringError(
            FIELD_CIRCUIT,
            f"must be a name or a list of (name, multiplier) pairs, not {show(pairs)}",
        )
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise SteeringError(FIELD_CIRCUIT, f"{show(pair)} is not a (name, multiplier) pair")
        names.append(pair[0])
        multipliers.append(_as_float(pair[1]))
    return {FIELD_CIRCUIT: names, FIELD_MULTIPLIER: multipliers}


def _as_float(value: Any) -> Any:
    """Other real numbers, NumPy's for instance, as a plain float; the rest unchanged."""
    if isinstance(value, numbers.Real) and not isinstance(value, int | float):
        return float(value)
    return value


def _parallel_lists(names: Any, multipliers: Any) -> tuple[list[Any], list[Any]]:
    if not isinstance(names, list | tuple):
        if isinstance(multipliers, list | tuple):
            raise SteeringError(
                FIELD_MULTIPLIER, f"is a list, but {FIELD_CIRCUIT} is not; make both lists"
            )
        return [names], [multipliers]
    if not isinstance(multipliers, list | tuple):
        raise SteeringError(
            FIELD_MULTIPLIER, f"must be a list of {len(names)} numbers, one for each circuit"
        )
    if len(names) != len(multipliers):
        raise SteeringError(
            FIELD_MULTIPLIER,
            f"{len(multipliers)} multipliers for {len(names)} circuits; "
            "the lists must be of equal length",
        )
    if not names:
        raise SteeringError(FIELD_CIRCUIT, "is an empty list; name a circuit or omit the field")
    return list(names), list(multipliers)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise SteeringError(FIELD_CIRCUIT, f"must be a circuit's name, not {show(name)}")
    if not 1 <= len(name) <= MAX_NAME_LENGTH:
        raise SteeringError(
            FIELD_CIRCUIT, f"a name has 1 to {MAX_NAME_LENGTH} characters, not {len(name)}"
        )
    return name


def _checked_multiplier(value: Any, limit: float) -> float:
    if not (isinstance(value, float) or is_int(value)):
        raise SteeringError(FIELD_MULTIPLIER, f"must be a number, not {show(value)}")
    try:
        multiplier = float(value)
    except OverflowError:
        multiplier = math.inf
    if not math.isfinite(multiplier):
        raise SteeringError(FIELD_MULTIPLIER, f"must be finite, not {show(value)}")
    limit = min(limit, FLOAT32_MAX)
    if abs(multiplier) > limit:
        raise SteeringError(
            FIELD_MULTIPLIER, f"{multiplier:g} is over the limit; use -{limit:g} to {limit:g}"
        )
    return multiplier


def _checked_scope(scope: Any) -> str:
    if isinstance(scope, str) and scope in SCOPES:
        return scope
    raise SteeringError(FIELD_SCOPE, f"must be one of {', '.join(SCOPES)}, not {show(scope)}")


def _to_float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded + 0.0  # -0.0 ablates like 0.0 and must share its cache key
