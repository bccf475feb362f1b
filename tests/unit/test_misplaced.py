# SPDX-License-Identifier: Apache-2.0
"""Which keys are signs of steering, where, and what is said of them; and what is the user's own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cna_vllm.steering.misplaced import (
    EXTRA_ARGS,
    OWN_DATA,
    XARGS,
    Pairs,
    first_sign,
    first_sign_in_text,
    holds_letters,
    may_hold_signs,
    top_level,
)

SIGNS: list[tuple[Any, str, str]] = [
    ({"cna_circuit": "f"}, "cna_circuit", 'into vllm_xargs: {"vllm_xargs": {"cna_circuit": "f"}}'),
    ({"cna_circuit": ["a"]}, "cna_circuit", '{"cna_circuit": ...}'),
    ({"cna_scope": "all"}, "cna_scope", "at the top level of the body"),
    ({"cna": {"circuit": 1}}, "cna", "in vllm_xargs there are cna_circuit, "),
    ({"circuit": "french"}, "circuit", "did you mean cna_circuit?"),
    ({"multipliers": [1]}, "multipliers", "did you mean cna_multiplier?"),
    ({"Vector": "v"}, "Vector", "did you mean cna_vector?"),
    ({"coefficient": 1}, "coefficient", "did you mean cna_coefficient?"),
    ({"scope": "All"}, "scope", "did you mean cna_scope?"),
    ({"circuit_name": "f"}, "circuit_name", "did you mean cna_circuit?"),
    ({"steering": {}}, "steering", "unknown field; in vllm_xargs"),
    ({"cna_resolved": {}}, "cna_resolved", "is set by the server only"),
    ({"docname": 1}, "docname", "unknown field"),
    ({"extra_args": {"cna_vector": 1}}, "extra_args.cna_vector", "is in extra_args; put it into"),
    ({"extra_body": {"vllm_xargs": {"cna_scope": 1}}}, "extra_body.vllm_xargs.cna_scope", "put it"),
    ({"vllm_xargs": {"circuit": "f"}}, "vllm_xargs.circuit", "unknown field; did you mean cna_c"),
    ({"vllm_xargs": {"cna-circuit": "f"}}, "vllm_xargs.cna-circuit", "did you mean cna_circuit?"),
    ({"vllm_xargs": {" cna_circuit": "f"}}, "vllm_xargs. cna_circuit", "did you mean cna_circuit?"),
    ({"vllm_xargs": {"cnaScope": "f"}}, "vllm_xargs.cnaScope", "did you mean cna_scope?"),
    ({"vllm_xargs": {"x": [{"cna_scope": 1}]}}, "vllm_xargs.x.0.cna_scope", "put it into vllm_x"),
    ([{"cna_scope": 1}], "0.cna_scope", "put it into vllm_xargs"),
    ({"c\u200bna_circuit": "f"}, "'c\\u200bna_circuit'", "did you mean cna_circuit?"),
    ({"\udc80cna": 1}, "'\\udc80cna'", "unknown field"),
    ({"cna" + "x" * 99: 1}, "'cnaxxxxxxxxx", "unknown field"),
    ({"metadata": {"cna_circuit": 1}}, "metadata.cna_circuit", "rename it if it is something else"),
    ({"tools": [{"x": {"cnae": 1}}]}, "tools.0.x.cnae", "rename it if it is something else"),
]


@pytest.mark.parametrize(("body", "field", "message"), SIGNS)
def test_signs(body: Any, field: str, message: str) -> None:
    error = first_sign(body, XARGS)
    assert error is not None and error.field.startswith(field) and message in error.problem, error
    str(error).encode()
    assert "\n" not in str(error) and len(str(error)) < 300
    read = first_sign_in_text(json.dumps(body).encode(), XARGS)
    assert read is not None and read.field == error.field
    assert first_sign(body, None) is not None


def test_the_place_is_one() -> None:
    taken = {"vllm_xargs": {"cna_circuit": "f", "cna_typo": {"cna": 1}, "x": 1}}
    assert first_sign(taken, XARGS) is None  # what a field's value may be is left to admission
    assert first_sign(taken["vllm_xargs"], ()) is None
    for place in (EXTRA_ARGS, None):
        error = first_sign(taken, place)
        assert error is not None and error.field == "vllm_xargs.cna_circuit"
    for value in (True, [0.5, False]):
        truth = first_sign({"vllm_xargs": {"cna_multiplier": value}}, XARGS)
        assert truth is not None and truth.field == "cna_multiplier" and "not " in truth.problem
    nested = first_sign(taken, ())
    assert nested is not None and "put it into extra_args itself" in str(nested)
    assert first_sign({"sampling_params": {"extra_args": {"cna_scope": "all"}}}, EXTRA_ARGS) is None


@pytest.mark.parametrize("data", sorted(OWN_DATA))
def test_the_users_own_data(data: str) -> None:
    """Words of the user's are no signs there, the letters are; both ways, and at any depth."""
    words = ("circuit", "vector", "multipliers", "steer", "c-na", "docname", "cname", "funcName")
    for key in words:
        body = {"model": "m", data: [{"x": {key: "last", "scope": "all"}}]}
        assert first_sign(body, XARGS) is None, key
    for key in ("cna", "cnae", "CNA_LICENSE", "docnamecna", "c\u200bna", "cna\u200bme", "xcnamx"):
        assert first_sign({data: [{"x": {key: 1}}]}, XARGS) is not None, key


def test_letters() -> None:
    assert [k for k in ("cna", "CnA", "xcnay", "c_n_a", "na c", "cname") if holds_letters(k)] == [
        "cna",
        "CnA",
        "xcnay",
        "cname",
    ]
    assert not holds_letters("cname", own=True) and holds_letters("cnam", own=True)


def test_plain_text_is_not_read() -> None:
    """Of a plain request only a search of its bytes is made; accents are no hidden letters."""
    body = {"model": "m", "messages": [{"role": "user", "content": "d\u00e9j\u00e0 vu \U0001f600"}]}
    for text in (json.dumps(body), json.dumps(body, ensure_ascii=False)):
        assert not may_hold_signs(text.encode())
    assert may_hold_signs(json.dumps(body).encode("utf-16"))
    assert may_hold_signs(b'{"model": "a", "model": "b"}')
    assert may_hold_signs(rb'{"\u0063ircui\u0074": 1}')


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-le"]
)
def test_encodings(encoding: str) -> None:
    raw = json.dumps({"cna_circuit": "f"}).encode(encoding)
    error = first_sign_in_text(raw, XARGS)
    assert error is not None and error.field == "cna_circuit"
    plain = json.dumps({"prompt": "f"}).encode(encoding)
    assert first_sign_in_text(plain, XARGS) is None


@pytest.mark.parametrize(
    "raw", [b'{"cna_circuit": 1', b"[" * 10**5 + b'{"cna": 1}', b'{"cna": \xff}', b"cna", b'"cna']
)
def test_what_cannot_be_read_is_refused(raw: bytes) -> None:
    error = first_sign_in_text(raw, XARGS)
    assert error is not None and error.field == "body" and "cannot be read as JSON" in str(error)


def test_keys_that_are_there_twice() -> None:
    def field(raw: bytes) -> str | None:
        error = first_sign_in_text(raw, XARGS)
        return None if error is None else error.field

    twice = b'{"vllm_xargs": {"cna_scope": "all", "cna_scope": "last"}}'
    assert field(twice) == "vllm_xargs.cna_scope"
    assert field(b'{"vllm_xargs": {"cna_scope": "all"}, "vllm_xargs": {}}') == "vllm_xargs"
    assert field(b'{"model": "french-off", "model": "base"}') == "model"
    assert field(b'{"model": "base", "model": "base"}') is None
    assert field(b'{"metadata": {"model": "a", "model": "b"}}') is None
    assert field(b'{"x": {"cna_scope": 1}, "x": 2}') == "x.cna_scope"
    assert first_sign(Pairs([("x", 1), ("x", 2)]), XARGS) is None


def test_top_level() -> None:
    assert top_level(b'{"model": "a", "x": {"model": "b"}}', "model") == "a"
    for raw in (b"[]", b"{", b"", b"[" * 10**5, b'{"x": 1}'):
        assert top_level(raw, "model") is None
