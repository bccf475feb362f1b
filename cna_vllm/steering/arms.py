# SPDX-License-Identifier: Apache-2.0
"""Arms: the settings under which the same prompts are answered, and their short form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cna_vllm.steering.content import show
from cna_vllm.steering.request import (
    DEFAULT_SCOPE,
    SCOPES,
    Pairs,
    SteeringError,
    columns,
    steer,
    steer_vector,
)


@dataclass(frozen=True)
class Arm:
    """One setting: circuits and vectors at a scope; without either the plain model.

    Attributes:
        name: what rows and reports call it; unique in a run.
        circuits: (circuit, multiplier) pairs, applied together.
        scope: which positions are steered.
        vectors: (vector, coefficient) pairs, added together.
    """

    name: str
    circuits: Pairs = ()
    scope: str = DEFAULT_SCOPE
    vectors: Pairs = ()

    def __post_init__(self) -> None:
        self.extra_args()  # refuses what no engine would take

    def extra_args(self) -> dict[str, Any]:
        """The fields of `SamplingParams.extra_args` that ask for this arm; empty when plain.

        Raises:
            SteeringError: a wrong type or value.
        """
        circuits = steer(self.circuits, scope=self.scope) if self.circuits else {}
        return circuits | (steer_vector(self.vectors, scope=self.scope) if self.vectors else {})

    @property
    def dose(self) -> float | None:
        """The multiplier of an arm with one circuit; 1 for the plain model, else None."""
        if self.vectors or len(self.circuits) > 1:
            return None
        return self.circuits[0][1] if self.circuits else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Columns of a row: `arm`, `circuit`, `multiplier`, `scope`, `vector`, `coefficient`.

        Lists where there are several; None where there is nothing.
        """
        circuit, multiplier = columns(self.circuits) if self.circuits else (None, None)
        vector, coefficient = columns(self.vectors) if self.vectors else (None, None)
        return {
            "arm": self.name,
            "circuit": circuit,
            "multiplier": multiplier,
            "scope": self.scope if self.circuits or self.vectors else None,
            "vector": vector,
            "coefficient": coefficient,
        }


def steering_arm(circuits: Sequence[tuple[str, float]], scope: str = DEFAULT_SCOPE) -> Arm:
    """The arm with this steering, called by its short form, `CIRCUIT@M[+...][:SCOPE]`.

    Raises:
        SteeringError: steering that no engine would take.
    """
    body = "+".join(f"{name}@{float(m)!r}".removesuffix(".0") for name, m in circuits)
    return Arm(body if scope == DEFAULT_SCOPE else f"{body}:{scope}", tuple(circuits), scope)


def parse_steering(text: str, known: Collection[str] = ()) -> tuple[Pairs, str]:
    """Reads `CIRCUIT@M[+CIRCUIT@M...][:SCOPE]` as (circuit, multiplier) pairs and a scope.

    Args:
        known: names that there are. A name may hold `+` and `@` where the text can be read in one
            way only with names of these; else every `+` begins another pair.

    Raises:
        SteeringError: it has another form, or can be read in two ways; the values themselves are
            not checked here.
    """
    head, separator, tail = text.rpartition(":")
    body, scope = (head, tail) if separator and tail in SCOPES else (text, DEFAULT_SCOPE)
    found = list(islice(_readings(body, known), 2))
    if len(found) > 1:
        one, two = (" and ".join(f"{show(n)} at {m:g}" for n, m in pairs) for pairs in found)
        raise SteeringError("arm", f"{show(text)} can be read as {one}, or as {two}; rename one")
    if found:
        return found[0], scope
    try:
        parts = [part.rpartition("@") for part in body.split("+")]
        if all(name for name, _, _ in parts):
            return tuple((name, float(number)) for name, _, number in parts), scope
    except ValueError:
        pass
    raise SteeringError(
        "arm",
        f"{show(text)} is not CIRCUIT@M[+CIRCUIT@M...][:SCOPE], with scope one of "
        f"{', '.join(SCOPES)}",
    )


def parse_arm(text: str, vectors: Collection[str] = (), circuits: Collection[str] = ()) -> Arm:
    """Reads `NAME=CIRCUIT@M[+CIRCUIT@M...][:SCOPE]`, the same without `NAME=`, or `NAME=plain`.

    Without a name the arm is called by its steering, `plain` by that.

    Args:
        vectors: names that stand for vectors: then the number after `@` is a coefficient.
        circuits: names of circuits; these and those of vectors may hold `+`, see `parse_steering`.

    Raises:
        SteeringError: it has another form, or steering that no engine would take.
    """
    name, separator, steering = text.partition("=")
    if not separator:
        name, steering = text, text
    if not name.strip():
        raise SteeringError("arm", f"{show(text)} has no name; write NAME=CIRCUIT@M[:SCOPE]")
    if steering == "plain":
        return Arm(name)
    pairs, scope = parse_steering(steering, [*vectors, *circuits])
    return Arm(
        name,
        tuple(pair for pair in pairs if pair[0] not in vectors),
        scope,
        tuple(pair for pair in pairs if pair[0] in vectors),
    )


def check_names(arms: Sequence[Arm]) -> None:
    """Raises SteeringError where two arms share a name, or there is none at all."""
    if not arms:
        raise SteeringError("arm", "there is none; name at least one")
    for name, count in Counter(arm.name for arm in arms).items():
        if count > 1:
            raise SteeringError("arm", f"the name {show(name)} is given twice")


def _readings(body: str, known: Collection[str]) -> Iterator[Pairs]:
    """Every way to read the whole of `body` as pairs of known names and numbers."""
    for name in known:
        rest = body.removeprefix(f"{name}@")
        if rest == body:
            continue
        pieces = rest.split("+")
        for end in range(1, len(pieces) + 1):  # a number may hold a +, too: 1e+5
            try:
                first = (name, float("+".join(pieces[:end])))
            except ValueError:
                continue
            if end == len(pieces):
                yield (first,)
            else:
                yield from ((first, *more) for more in _readings("+".join(pieces[end:]), known))
