# SPDX-License-Identifier: Apache-2.0
"""What an engine core accepts from clients that may not have admitted anything."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from cna_vllm.serving.config import CnaConfig
from cna_vllm.serving.core.admission import CoreAdmission
from cna_vllm.serving.seal import Seal, deployment_secret
from cna_vllm.steering.request import SteeringError
from cna_vllm.steering.resolved import Steering
from tests.keys import block_key

A, B, V = "a" * 64, "b" * 64, "c" * 64
CONFIG = CnaConfig(max_multiplier=0.1, max_circuits_per_request=2, max_vectors_per_request=1)
LIMIT = 0.10000000149011612  # the float32 of 0.1


def sealed(steering: Steering) -> dict[str, Any]:
    return {"cna_resolved": Seal(deployment_secret()).sealed(steering)}


ADMITTED = Steering(((A, LIMIT), (B, -LIMIT)), "all", ((V, 0.0625),))


@pytest.mark.parametrize("copied", [dict, lambda x: json.loads(json.dumps(x))])
def test_what_was_admitted_passes(copied: Any) -> None:
    core = CoreAdmission(CONFIG)
    extra_args = copied({"other": 1, **sealed(ADMITTED)})
    assert core.steering(extra_args, resumable=False) == ADMITTED
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(extra_args))
    assert core.steering(packed, resumable=False) == ADMITTED
    whole = sealed(Steering(((A, 0.0),)))
    whole["cna_resolved"]["circuits"] = [[A, 0]]  # as other languages write 0.0
    assert core.steering(whole, resumable=False) == Steering(((A, 0.0),))


def test_plain_requests_pass_everywhere() -> None:
    for core in (CoreAdmission(None), CoreAdmission(CONFIG)):
        for extra_args in (None, {}, {"other": {"cna_circuit": 1}}, {1: 2}):
            assert core.steering(extra_args, resumable=True) is None


def test_a_seal_changes_no_cache_key() -> None:
    plain = {"cna_resolved": ADMITTED.to_field()}
    assert block_key(sealed(ADMITTED), 9, 16) == block_key(plain, 9, 16)


RESOLVED = ADMITTED.to_field()
NOT_ADMITTED: list[tuple[dict[Any, Any], str]] = [
    ({"cna_circuit": "x", "cna_multiplier": 0}, "cna_circuit: this request was not admitted"),
    ({"cna_scope": "all"}, "cna_scope: this request was not admitted"),
    ({"CNA_Circuit": "x"}, "CNA_Circuit: this request was not admitted"),
    ({"my cna\nfield": 1}, r"'my cna\\nfield': this request was not admitted"),
    ({**sealed(ADMITTED), "cna_scope": "all"}, "cna_scope: this request was not admitted"),
    ({"cna_resolved": None}, "cna_resolved: malformed"),
    ({"cna_resolved": {}}, "cna_resolved: malformed"),
    ({"cna_resolved": RESOLVED}, "cna_resolved: is set by the server only"),
    ({"cna_resolved": {**RESOLVED, "seal": 5}}, "cna_resolved: is set by the server only"),
    ({"cna_resolved": {**RESOLVED, "seal": "0" * 64}}, "cna_resolved: is set by the server only"),
    (
        {"cna_resolved": {**sealed(ADMITTED)["cna_resolved"], "scope": "last"}},
        "cna_resolved: is set by the server only",
    ),
    ({"cna_record": "g"}, "cna_record: this engine does not record"),
    (sealed(Steering(tuple((d * 64, 0.0) for d in "abc"))), "cna_circuit: 3 on one request"),
    (sealed(Steering((), "all", ((A, 0.0625), (B, 0.0625)))), "cna_vector: 2 on one request"),
    (sealed(Steering(((A, 0.125),))), "cna_multiplier: 0.125 is over this engine's limit"),
]


@pytest.mark.parametrize(("extra_args", "message"), NOT_ADMITTED)
def test_what_was_not_admitted_is_refused(extra_args: dict[Any, Any], message: str) -> None:
    with pytest.raises(SteeringError, match=message) as error:
        CoreAdmission(CONFIG).steering(extra_args, resumable=False)
    assert "\n" not in str(error.value)
    with pytest.raises(SteeringError, match="started without circuits"):
        CoreAdmission(None).steering(extra_args, resumable=False)


def test_recorded_requests_need_an_engine_that_records() -> None:
    core = CoreAdmission(CnaConfig(record=True))
    assert core.steering({"cna_record": "g"}, resumable=False) is None
    with pytest.raises(SteeringError, match="cna_record: must be a group name"):
        core.steering({"cna_record": 1}, resumable=False)
    for extra_args in ({"cna_record": "g"}, sealed(ADMITTED)):
        with pytest.raises(SteeringError, match="streaming inputs"):
            core.steering(extra_args, resumable=True)
