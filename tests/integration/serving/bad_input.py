# SPDX-License-Identifier: Apache-2.0
"""Malformed requests and circuit files for the server's tests; every one must be a 4xx."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import strategies as st

from tests import tiny_models

KNOWN = ("one", "two", "one-off", "one-half-all", "both", "smollm2")

text = st.text(max_size=40)
names = text.filter(lambda t: t not in KNOWN)
numbers = st.one_of(st.integers(-(10**400), 10**400), st.floats())
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, text),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(text, inner, max_size=4)),
    max_leaves=20,
)
wrong_multipliers = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 1e4, -1e300, True, False, None, "0.5", {}]),
    st.floats(min_value=1001),
    st.integers(min_value=1001, max_value=10**4000),
    text,
    st.lists(st.floats(-1, 1), max_size=2000).filter(lambda v: len(v) != 1),
    st.recursive(st.just([]), lambda inner: st.lists(inner, min_size=1, max_size=1), max_leaves=60),
)
wrong_circuits = st.one_of(
    names,
    st.booleans(),
    st.integers(),
    st.floats(),
    st.lists(names, max_size=50),
    st.dictionaries(text, text, max_size=3),
)
wrong_scopes = st.one_of(
    text.filter(lambda t: t not in ("last", "all", "generated")), numbers, st.lists(text)
)


@st.composite
def steering(draw: st.DrawFn) -> dict[str, Any]:
    """A completion request whose steering fields, or model, are wrong in one way at least."""
    fields: dict[str, Any] = {"cna_circuit": "one", "cna_multiplier": 0.5}
    body: dict[str, Any] = {"model": "smollm2", "prompt": "Hello", "max_tokens": 2}
    match draw(st.sampled_from(["multiplier", "circuit", "scope", "field", "missing", "model"])):
        case "multiplier":
            fields["cna_multiplier"] = draw(wrong_multipliers)
        case "circuit":
            fields["cna_circuit"] = draw(wrong_circuits)
        case "scope":
            fields["cna_scope"] = draw(wrong_scopes)
        case "field":
            known = ("circuit", "multiplier", "scope", "vector", "coefficient")
            fields["cna_" + draw(text.filter(lambda t: t not in known))] = draw(numbers)
        case "missing":
            del fields[draw(st.sampled_from(sorted(fields)))]
        case "model":
            fields, body["model"] = {}, draw(names.filter(bool))
    body["stream"] = draw(st.booleans())
    return body | ({"vllm_xargs": fields} if fields else {})


paths = st.one_of(
    text,
    st.lists(st.sampled_from(["..", ".", "", "a", "~", "etc", "passwd", "%2e%2e", "\0", "c.json"]))
    .map("/".join)
    .filter(lambda p: p != "c.json"),
)


@st.composite
def control(draw: st.DrawFn) -> tuple[str, Any]:
    """A route of ours and a body that it must refuse."""
    route = draw(
        st.sampled_from(
            ["load_cna_circuit", "unload_cna_circuit", "load_cna_adapter", "unload_cna_adapter"]
        )
    )
    what = "circuit" if route.endswith("circuit") else "adapter"
    if draw(st.booleans()):
        return route, draw(anything)
    body = {f"{what}_name": draw(st.one_of(names, anything))}
    match route:
        case "load_cna_circuit":
            body["circuit_path"] = draw(st.one_of(paths, anything))
        case "load_cna_adapter":
            body |= {"circuit": draw(wrong_circuits), "multiplier": draw(wrong_multipliers)}
    return route, body


def _damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    match draw(st.sampled_from(["cut", "flip", "noise", "deep"])):
        case "cut":
            return whole[: draw(st.integers(0, len(whole) - 2))]
        case "flip":
            at = draw(st.integers(0, len(whole) - 1))
            return whole[:at] + b"\xff" + whole[at + 1 :]
        case "noise":
            return draw(st.binary(max_size=2000))
        case _:
            return b"[" * draw(st.integers(1, 20000))


@st.composite
def circuit_file(draw: st.DrawFn) -> bytes:
    """The bytes of a file that is no circuit of the served model."""
    circuit = tiny_models.circuit_object({0: (1, 2), 29: (1535,)}, 30, 1536)
    if draw(st.booleans()):
        return _damaged(draw, json.dumps(circuit).encode())
    key = draw(
        st.sampled_from(
            ["format", "version", "architecture", "num_layers", "intermediate_size", "neurons"]
        )
    )
    bad = draw(anything.filter(lambda v: v != circuit[key]))
    if draw(st.booleans()):
        del circuit[key]
    else:
        circuit[key] = bad
    return json.dumps(circuit).encode()
