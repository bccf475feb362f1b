# SPDX-License-Identifier: Apache-2.0
"""Steering fields: what a client may write, how it is refused, and the resolved canonical form."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cna_vllm import SteeringError, steer
from cna_vllm.steering.request import FLOAT32_MAX, SCOPES, CircuitRequest
from cna_vllm.steering.resolved import Steering, resolve


def parse(extra_args: Any, limit: float = 10.0, most: int = 4) -> CircuitRequest | None:
    return CircuitRequest.from_extra_args(extra_args, max_multiplier=limit, max_circuits=most)


def fields(circuit: Any = "french", multiplier: Any = 0.5, **more: Any) -> dict[str, Any]:
    return {"cna_circuit": circuit, "cna_multiplier": multiplier, **more}


def test_steer_gives_the_fields_of_the_http_interface() -> None:
    assert steer("french", 0.0) == fields("french", 0.0, cna_scope="last")
    assert steer("french", 2, scope="all") == fields("french", 2, cna_scope="all")
    assert steer([("french", 0.0), ("polite", 1.5)], scope="generated") == fields(
        ["french", "polite"], [0.0, 1.5], cna_scope="generated"
    )
    json.dumps(steer("french", np.float32(0.5)))


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: steer("french"), "cna_multiplier"),
        (lambda: steer("french", "0"), "cna_multiplier"),  # type: ignore[arg-type]
        (lambda: steer("french", True), "cna_multiplier"),
        (lambda: steer("french", math.nan), "cna_multiplier"),
        (lambda: steer("french", 1e300), "cna_multiplier"),
        (lambda: steer("", 0.0), "cna_circuit"),
        (lambda: steer("french", 0.0, scope="first"), "cna_scope"),
        (lambda: steer([("french", 0.0)], 1.0), "cna_multiplier"),
        (lambda: steer([]), "cna_circuit"),
        (lambda: steer(["french"]), "cna_circuit"),  # type: ignore[list-item]
        (lambda: steer([("french", 0.0, 1)]), "cna_circuit"),  # type: ignore[list-item]
        (lambda: steer(7), "cna_circuit"),  # type: ignore[arg-type]
    ],
)
def test_steer_refuses(call: Any, field: str) -> None:
    with pytest.raises(SteeringError) as refused:
        call()
    assert refused.value.field == field
    assert str(refused.value).startswith(f"{field}: ")


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}, {"CNA_circuit": "x"}, {1: 2}])
def test_plain_requests_are_none(extra_args: Any) -> None:
    assert parse(extra_args) is None


def test_parses_and_writes_back() -> None:
    assert parse(fields("french", 2)) == CircuitRequest((("french", 2.0),), "last")
    two = parse({**fields(["a", "b"], [0, -1.5], cna_scope="all"), "other": object()})
    assert two == CircuitRequest((("a", 0.0), ("b", -1.5)), "all")
    assert parse(two.to_extra_args()) == two
    one = CircuitRequest((("a", 0.5),))
    assert one.to_extra_args() == fields("a", 0.5, cna_scope="last")


@pytest.mark.parametrize(
    ("extra_args", "field", "says"),
    [
        ({"cna_circuits": "x"}, "cna_circuits", "did you mean cna_circuit?"),
        ({"cna_multiplyer": 1.0}, "cna_multiplyer", "did you mean cna_multiplier?"),
        ({"cna_zzzzzzzzzzzz": 1}, "cna_zzzzzzzzzzzz", "known are"),
        (fields(cna_resolved={"circuits": [], "scope": "last"}), "cna_resolved", "server only"),
        (fields(cna_record="positive"), "cna_record", "server only"),
        ({"cna_circuit": "x"}, "cna_multiplier", "missing"),
        ({"cna_multiplier": 0.5}, "cna_circuit", "missing"),
        ({"cna_scope": "all"}, "cna_circuit", "missing"),
        (fields(circuit=7), "cna_circuit", "7"),
        (fields(circuit=None), "cna_circuit", "None"),
        (fields(circuit=""), "cna_circuit", "1 to 128"),
        (fields(circuit="x" * 129), "cna_circuit", "1 to 128"),
        (fields([], []), "cna_circuit", "empty"),
        (fields(["a", 3], [0.0, 0.0]), "cna_circuit", "3"),
        (fields(["a"] * 5, [0.0] * 5), "cna_circuit", "at most 4"),
        (fields(multiplier="0.5"), "cna_multiplier", "number"),
        (fields(multiplier=True), "cna_multiplier", "number"),
        (fields(multiplier=None), "cna_multiplier", "number"),
        (fields(multiplier=math.nan), "cna_multiplier", "finite"),
        (fields(multiplier=-math.inf), "cna_multiplier", "finite"),
        (fields(multiplier=10**400), "cna_multiplier", "finite"),
        (fields(multiplier=10.5), "cna_multiplier", "limit"),
        (fields(multiplier=-10.5), "cna_multiplier", "limit"),
        (fields("a", [0.5]), "cna_multiplier", "list"),
        (fields(["a"], 0.5), "cna_multiplier", "list"),
        (fields(["a", "b"], [0.5]), "cna_multiplier", "equal length"),
        (fields(["a", "b"], [0.5, "x"]), "cna_multiplier", "number"),
        (fields(cna_scope="first"), "cna_scope", "last, all, generated"),
        (fields(cna_scope=None), "cna_scope", "last, all, generated"),
        (fields(cna_scope=["last"]), "cna_scope", "last, all, generated"),
    ],
)
def test_refusals_name_the_field_and_the_fix(extra_args: Any, field: str, says: str) -> None:
    with pytest.raises(SteeringError) as refused:
        parse(extra_args)
    assert refused.value.field == field
    assert str(refused.value).startswith(f"{field}: ")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_limits_are_inclusive_and_never_above_float32() -> None:
    assert parse(fields(multiplier=-10.0)) is not None
    assert parse(fields(["a"] * 4, [0.0] * 4)) is not None
    assert parse(fields(multiplier=FLOAT32_MAX), limit=math.inf) is not None
    with pytest.raises(SteeringError, match="limit"):
        parse(fields(multiplier=1e39), limit=math.inf)


def test_errors_cross_process_borders() -> None:
    error = SteeringError("cna_scope", "no")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.field, again.problem) == ("cna_scope: no", "cna_scope", "no")


DIGESTS = {"a": "aa", "b": "bb", "also_a": "aa"}


def resolved(*pairs: tuple[str, float], scope: str = "last") -> Steering | None:
    return resolve(CircuitRequest(pairs, scope), DIGESTS.__getitem__)


def test_equal_steering_has_one_form() -> None:
    assert resolved(("a", 0.5), ("b", 2.0)) == resolved(("b", 2.0), ("also_a", 0.5))
    assert resolved(("a", 0.1)) == Steering((("aa", float(np.float32(0.1))),), "last")
    negative_zero, zero = resolved(("a", -0.0)), resolved(("a", 0.0))
    assert negative_zero is not None and zero is not None
    assert negative_zero.cache_key(3) == zero.cache_key(3)


def test_multiplier_one_is_plain() -> None:
    assert resolved(("a", 1.0)) is None
    assert resolved(("a", 1.0 + 1e-12)) is None
    assert resolved(("a", 1.0), ("b", 0.0)) == Steering((("bb", 0.0),), "last")
    with pytest.raises(KeyError):
        resolved(("unknown", 1.0))


def test_first_position() -> None:
    first = {scope: Steering((("aa", 0.0),), scope).first_position(7) for scope in SCOPES}
    assert first == {"last": 6, "all": 0, "generated": 7}


def test_cache_keys_differ_where_steering_differs() -> None:
    pairs = (("aa", 0.5), ("bb", 2.0))
    keys = {
        Steering(pairs, "last").cache_key(6),
        Steering(pairs, "last").cache_key(7),
        Steering(pairs, "generated").cache_key(7),
        Steering(pairs[:1], "last").cache_key(6),
        Steering((("aa", 0.5000001), ("bb", 2.0)), "last").cache_key(6),
        Steering((("ab", 0.5), ("bb", 2.0)), "last").cache_key(6),
    }
    assert len(keys) == 6


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"circuits": [], "scope": "last"},
        {"circuits": [["a"]], "scope": "last"},
        {"circuits": [["a", "b"]], "scope": "last"},
        {"circuits": [[1, 0.5]], "scope": "last"},
        {"circuits": [["a", 0.5]], "scope": "x"},
        {"circuits": [["a", 0.5]], "scope": "last", "more": 1},
    ],
)
def test_malformed_resolved_fields_are_refused(value: Any) -> None:
    with pytest.raises(SteeringError):
        Steering.from_field(value)


NAMES = st.text(min_size=1, max_size=128)
FLOATS = st.floats(-1e30, 1e30)


@given(st.lists(st.tuples(NAMES, FLOATS), min_size=1, max_size=4), st.sampled_from(SCOPES))
def test_resolved_field_round_trips_through_json(
    pairs: list[tuple[str, float]], scope: str
) -> None:
    steering = resolve(CircuitRequest(tuple(pairs), scope), lambda name: name)
    if steering is not None:
        again = Steering.from_field(json.loads(json.dumps(steering.to_field())))
        assert again == steering
        assert again.cache_key(1) == steering.cache_key(1)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=6,
)
KEYS = (
    st.sampled_from(
        ["cna_circuit", "cna_multiplier", "cna_vector", "cna_coefficient", "cna_scope", "cna_x"]
    )
    | st.text()
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_fields_give_a_request_or_a_steering_error(extra_args: dict[str, Any]) -> None:
    try:
        request = parse(extra_args)
    except SteeringError as error:
        assert error.field.startswith("cna_")
    else:
        assert (request is None) == (not any(key.startswith("cna_") for key in extra_args))


@given(VALUES, VALUES, VALUES)
def test_any_well_named_fields_give_a_request_or_a_steering_error(
    circuit: Any, multiplier: Any, scope: Any
) -> None:
    try:
        request = parse(fields(circuit, multiplier, cna_scope=scope))
    except SteeringError as error:
        assert "\n" not in str(error)
    else:
        assert request is not None and parse(request.to_extra_args()) == request
