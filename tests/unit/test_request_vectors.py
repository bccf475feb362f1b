# SPDX-License-Identifier: Apache-2.0
"""Steering vectors as a request carries them, alone and beside circuits."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cna_vllm import SteeringError, steer, steer_vector
from cna_vllm.steering.request import SCOPES, CircuitRequest
from cna_vllm.steering.resolved import Steering, resolve


def parse(extra_args: Any) -> CircuitRequest | None:
    return CircuitRequest.from_extra_args(
        extra_args, max_multiplier=10.0, max_circuits=4, max_vectors=2
    )


def fields(vector: Any = "v", coefficient: Any = 0.5, **more: Any) -> dict[str, Any]:
    return {"cna_vector": vector, "cna_coefficient": coefficient, **more}


def test_steer_vector_gives_the_fields_of_the_http_interface() -> None:
    assert steer_vector("v", -1.0) == fields("v", -1.0, cna_scope="last")
    assert steer_vector([("v", 1), ("w", -2.5)], scope="generated") == fields(
        ["v", "w"], [1, -2.5], cna_scope="generated"
    )
    json.dumps(steer_vector("v", np.float32(0.5)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: steer_vector("v"), "cna_coefficient"),
        (lambda: steer_vector("v", True), "cna_coefficient"),
        (lambda: steer_vector("v", math.inf), "cna_coefficient"),
        (lambda: steer_vector("", 1.0), "cna_vector"),
        (lambda: steer_vector("v", 1.0, scope="first"), "cna_scope"),
        (lambda: steer_vector([("v", 1.0)], 1.0), "cna_coefficient"),
        (lambda: steer_vector([]), "cna_vector"),
        (lambda: steer_vector(["v"]), "cna_vector"),  # type: ignore[list-item]
        (lambda: steer_vector(7), "cna_vector"),  # type: ignore[arg-type]
    ],
)
def test_steer_vector_refuses(call: Any, field: str) -> None:
    with pytest.raises(SteeringError) as refused:
        call()
    assert refused.value.field == field


def test_alone_and_beside_circuits() -> None:
    alone = parse(fields("v", -2))
    assert alone == CircuitRequest((), "last", (("v", -2.0),))
    both = parse({**steer("a", 0.0, scope="all"), **steer_vector("v", 1.0, scope="all")})
    assert both == CircuitRequest((("a", 0.0),), "all", (("v", 1.0),))
    for request in (alone, both):
        assert request is not None and parse(request.to_extra_args()) == request


@pytest.mark.parametrize(
    ("extra_args", "field", "says"),
    [
        ({"cna_vector": "v"}, "cna_coefficient", "missing"),
        ({"cna_coefficient": 1.0}, "cna_vector", "missing"),
        ({"cna_vectors": "v"}, "cna_vectors", "did you mean cna_vector?"),
        (fields(7), "cna_vector", "a vector's name"),
        (fields(["v"] * 3, [0.0] * 3), "cna_vector", "3 vectors on one request; at most 2"),
        (fields(coefficient="1"), "cna_coefficient", "number"),
        (fields(coefficient=math.nan), "cna_coefficient", "finite"),
        (fields(coefficient=-10.5), "cna_coefficient", "use -10 to 10"),
        (fields("v", [0.5]), "cna_coefficient", "list"),
        (fields(["v", "w"], [0.5]), "cna_coefficient", "1 coefficients for 2 vectors"),
        (fields(cna_scope="first"), "cna_scope", "last, all, generated"),
        (fields(cna_circuit="a"), "cna_multiplier", "missing"),
        (fields(cna_resolved={}), "cna_resolved", "server only"),
    ],
)
def test_refusals_name_the_field_and_the_fix(extra_args: Any, field: str, says: str) -> None:
    with pytest.raises(SteeringError) as refused:
        parse(extra_args)
    assert refused.value.field == field
    assert says in str(refused.value)


DIGESTS = {"a": "aa", "b": "bb"}
VECTORS = {"v": "01", "w": "02", "also_v": "01"}


def resolved(request: CircuitRequest) -> Steering | None:
    return resolve(request, DIGESTS.__getitem__, VECTORS.__getitem__)


def test_coefficient_zero_is_no_steering() -> None:
    for zero in (0.0, -0.0, 1e-60):
        assert resolved(CircuitRequest(vectors=(("v", zero),))) is None
    assert resolved(CircuitRequest((("a", 0.0),), "all", (("v", 0.0),))) == Steering(
        (("aa", 0.0),), "all"
    )
    assert resolved(CircuitRequest((("a", 1.0),), "all", (("v", 1.0),))) == Steering(
        (), "all", (("01", 1.0),)
    )
    with pytest.raises(KeyError):
        resolved(CircuitRequest(vectors=(("unknown", 0.0),)))


def test_an_engine_without_vectors_refuses_them() -> None:
    with pytest.raises(SteeringError, match=r"cna_vector: .*cna\.max_vectors"):
        resolve(CircuitRequest(vectors=(("v", 0.0),)), DIGESTS.__getitem__)


def test_cache_keys_differ_where_steering_differs() -> None:
    pairs, added = (("aa", 0.5), ("bb", 2.0)), (("01", 1.0), ("02", -1.0))
    steerings = [
        Steering(pairs, "last"),
        Steering(pairs, "last", added),
        Steering(pairs, "last", added[:1]),
        Steering(pairs[:1], "last", added),
        Steering((), "last", added),
        Steering((), "last", (("01", -1.0), ("02", -1.0))),
        Steering((), "all", added),
        Steering((("01", 1.0), ("02", -1.0)), "last"),
    ]
    assert len({s.cache_key(6) for s in steerings}) == len(steerings)
    one = resolved(CircuitRequest(vectors=(("v", 1.0), ("w", 2.0))))
    other = resolved(CircuitRequest(vectors=(("w", 2.0), ("also_v", 1.0))))
    assert one == other and one is not None


@pytest.mark.parametrize(
    "value",
    [
        {"circuits": [], "scope": "last", "vectors": []},
        {"circuits": [], "scope": "last", "vectors": [["v"]]},
        {"circuits": [], "scope": "last", "vectors": [["v", math.inf]]},
        {"circuits": [], "scope": "last", "vectors": 7},
        {"scope": "last", "vectors": [["v", 1.0]]},
    ],
)
def test_malformed_resolved_fields_are_refused(value: Any) -> None:
    with pytest.raises(SteeringError):
        Steering.from_field(value)


PAIRS = st.lists(
    st.tuples(st.text(min_size=1, max_size=9), st.floats(-1e30, 1e30)), max_size=3
).map(tuple)


@given(PAIRS, PAIRS, st.sampled_from(SCOPES))
def test_resolved_field_round_trips_through_json(circuits: Any, vectors: Any, scope: str) -> None:
    request = CircuitRequest(circuits, scope, vectors)
    steering = resolve(request, lambda name: name, lambda name: name)
    if steering is not None:
        again = Steering.from_field(json.loads(json.dumps(steering.to_field())))
        assert again == steering
        assert again.cache_key(1) == steering.cache_key(1)
