# SPDX-License-Identifier: Apache-2.0
"""The gate: what a client may ask, what the engine then sees, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cna_vllm import steer
from cna_vllm.serving.config import SECRET_VARIABLE, CnaConfig, CnaConfigError
from cna_vllm.serving.front.adapter import Adapter
from cna_vllm.serving.front.admission import (
    Admission,
    admit_or_refuse,
    asks_for_steering,
    has_fields,
    is_sealed,
)
from cna_vllm.serving.front.registry import Registry, ServedModel
from cna_vllm.steering.circuit import Circuit, CircuitError, Neuron
from cna_vllm.steering.request import SCOPES, SteeringError
from cna_vllm.steering.shape import Shape

OTHERS = {"other": [1, {"deep": 2}], "c": {"na": 1}, "scope": 2}


def make_circuit(index: int) -> Circuit:
    return Circuit("m", "A", 2, 16, (Neuron(0, index, 0.5),))


FRENCH, POLITE = make_circuit(0), make_circuit(1)


def make_admission(record: bool = False) -> Admission:
    registry = Registry(ServedModel("m", "A", Shape.of(2, 16), 6))
    registry.register("french", FRENCH)
    registry.register("polite", POLITE)
    config = CnaConfig(max_multiplier=10.0, max_circuits_per_request=2, record=record)
    return Admission(config, registry)


def without_seal(admitted: dict[str, Any] | None) -> dict[str, Any]:
    assert admitted is not None
    resolved = dict(admitted["cna_resolved"])
    assert len(bytes.fromhex(resolved.pop("seal"))) == 32
    return {**admitted, "cna_resolved": resolved}


def fields(circuit: Any = "french", multiplier: Any = 0.5, **more: Any) -> dict[str, Any]:
    return {"cna_circuit": circuit, "cna_multiplier": multiplier, **more}


RESOLVED = {"circuits": [[FRENCH.digest, 0.5]], "scope": "last"}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (fields("frnch"), "cna_circuit", "known circuits: french, polite"),
    (fields("frnch", 1.0), "cna_circuit", "no circuit is named 'frnch'"),
    (fields(["french", "frnch"], [0, 0]), "cna_circuit", "'frnch'"),
    (fields(FRENCH.digest), "cna_circuit", "no circuit is named"),
    (fields(7), "cna_circuit", "7"),
    (fields(None), "cna_circuit", "None"),
    (fields({"french": 0.5}), "cna_circuit", "french"),
    (fields([], []), "cna_circuit", "empty"),
    (fields(["french", "polite", "french"], [0, 0, 0]), "cna_circuit", "at most 2"),
    (fields(multiplier="0.5"), "cna_multiplier", "number"),
    (fields(multiplier=None), "cna_multiplier", "number"),
    (fields(multiplier=True), "cna_multiplier", "number"),
    (fields(multiplier=math.nan), "cna_multiplier", "finite"),
    (fields(multiplier=math.inf), "cna_multiplier", "finite"),
    (fields(multiplier=-math.inf), "cna_multiplier", "finite"),
    (fields(multiplier=10.001), "cna_multiplier", "use -10 to 10"),
    (fields(multiplier=-10.001), "cna_multiplier", "use -10 to 10"),
    (fields(["french", "polite"], [0.5]), "cna_multiplier", "equal length"),
    (fields(["french"], [0.5, 0.5]), "cna_multiplier", "equal length"),
    (fields(["french"], 0.5), "cna_multiplier", "list"),
    (fields("french", [0.5]), "cna_multiplier", "list"),
    ({"cna_circuit": "french"}, "cna_multiplier", "missing"),
    ({"cna_multiplier": 0.5}, "cna_circuit", "missing"),
    ({"cna_scope": "all"}, "cna_circuit", "missing"),
    (fields(cna_scope="first"), "cna_scope", "last, all, generated"),
    (fields(cna_scope=None), "cna_scope", "last, all, generated"),
    (fields(cna_scope=0), "cna_scope", "last, all, generated"),
    (fields(cna_scop="all"), "cna_scop", "did you mean cna_scope"),
    ({"cna_circuits": "french"}, "cna_circuits", "did you mean cna_circuit"),
    ({"cna_": 1}, "cna_", "unknown field"),
    ({"cna_resolved": RESOLVED}, "cna_resolved", "server only"),
    ({"cna_resolved": None}, "cna_resolved", "server only"),
    (fields(cna_resolved=RESOLVED), "cna_resolved", "server only"),
    ({"cna_record": "g"}, "cna_record", "cna.record = true"),
    ({"cna_record": None}, "cna_record", ""),
    (fields(cna_record="g"), "cna_record", ""),
]
REFUSED_RECORDING: list[tuple[dict[str, Any], str, str]] = [
    ({"cna_record": ""}, "cna_record", "1 to 64"),
    ({"cna_record": "x" * 65}, "cna_record", "1 to 64"),
    ({"cna_record": 7}, "cna_record", "group name"),
    ({"cna_record": ["g"]}, "cna_record", "group name"),
    ({"cna_record": False}, "cna_record", "group name"),
    ({"cna_record": None}, "cna_record", ""),
    (fields(cna_record=None), "cna_record", ""),
    (fields(cna_record="g"), "cna_record", "drop cna_circuit, cna_multiplier"),
    ({"cna_record": "g", "cna_scope": "all"}, "cna_record", "drop cna_scope"),
    ({"cna_record": "g", "cna_resolved": RESOLVED}, "cna_record", "drop cna_resolved"),
    ({"cna_record": "g", "cna_x": 1}, "cna_record", "drop cna_x"),
]


def assert_refused(gate: Admission, asked: dict[str, Any], field: str, says: str) -> None:
    extra_args = {**copy.deepcopy(OTHERS), **asked}
    before = copy.deepcopy(extra_args)
    with pytest.raises(SteeringError) as refused:
        gate.admit(extra_args)
    assert refused.value.field == field
    message = str(refused.value)
    assert message.startswith(f"{field}: ")
    assert says in message
    assert "\n" not in message
    assert len(message) < 400
    assert repr(extra_args) == repr(before), "the caller's dict"


@pytest.mark.parametrize(("asked", "field", "says"), REFUSED)
def test_bad_steering_is_refused(asked: dict[str, Any], field: str, says: str) -> None:
    assert_refused(make_admission(), asked, field, says)


@pytest.mark.parametrize(("asked", "field", "says"), REFUSED_RECORDING)
def test_bad_recording_is_refused(asked: dict[str, Any], field: str, says: str) -> None:
    assert_refused(make_admission(record=True), asked, field, says)


@pytest.mark.parametrize("asked", [fields(), fields("french", 1.0), {"cna_record": "g"}])
def test_streaming_sessions_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(SteeringError, match=r"^cna_.*streaming"):
        make_admission(record=True).admit(asked, resumable=True)
    assert make_admission().admit({"other": 1}, resumable=True) == {"other": 1}


def test_what_the_engine_sees() -> None:
    gate = make_admission()
    asked = {**OTHERS, **steer([("polite", 2.0), ("french", 0.0)], scope="all")}
    before = copy.deepcopy(asked)
    admitted = gate.admit(asked)
    assert asked == before
    pairs = sorted([[POLITE.digest, 2.0], [FRENCH.digest, 0.0]])
    assert without_seal(admitted) == {**OTHERS, "cna_resolved": {"circuits": pairs, "scope": "all"}}
    assert json.loads(json.dumps(admitted)) == admitted
    assert gate.admit({**asked, "cna_multiplier": [10.0, -10]}) is not None, "the limit itself"


def test_the_default_scope_is_last() -> None:
    admitted = make_admission().admit(fields())
    resolved = {"circuits": [[FRENCH.digest, 0.5]], "scope": "last"}
    assert without_seal(admitted) == {"cna_resolved": resolved}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("multiplier", [1, 1.0, 1.0 + 1e-12])
def test_multiplier_one_is_plain(scope: str, multiplier: float) -> None:
    gate = make_admission()
    assert gate.admit({**OTHERS, **fields("french", multiplier, cna_scope=scope)}) == OTHERS
    assert gate.admit(fields(["french", "polite"], [multiplier, 1.0], cna_scope=scope)) == {}
    admitted = gate.admit(fields(["french", "polite"], [multiplier, 0.0], cna_scope=scope))
    resolved = {"circuits": [[POLITE.digest, 0.0]], "scope": scope}
    assert without_seal(admitted) == {"cna_resolved": resolved}


def test_plain_requests_pass_unchanged() -> None:
    gate = make_admission()
    assert gate.admit(None) is None
    assert gate.admit({}) == {}
    given_args = dict(OTHERS)
    admitted = gate.admit(given_args)
    assert admitted == OTHERS
    assert admitted is not given_args


def test_recording_is_handed_on() -> None:
    asked = {**OTHERS, "cna_record": "x" * 64}
    before = copy.deepcopy(asked)
    assert make_admission(record=True).admit(asked) == before
    assert asked == before
    assert make_admission(record=True).admit(fields()) == make_admission().admit(fields())


def test_the_name_is_resolved_when_asked() -> None:
    gate = make_admission()
    gate.registry.register("french", make_circuit(9))
    admitted = gate.admit(fields())
    assert admitted is not None
    assert admitted["cna_resolved"]["circuits"] == [[make_circuit(9).digest, 0.5]]
    gate.registry.unregister("circuit", "french")
    assert_refused(gate, fields(), "cna_circuit", "known circuits: polite")
    gate.registry.unregister("circuit", "polite")
    assert_refused(gate, fields(), "cna_circuit", "none is loaded")


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"CNA_circuit": "french"}, "CNA_circuit"),
        ({"circuit": "french", "multiplier": 0}, "circuit"),
        ({"cna": {"circuit": "french"}}, "cna"),
        ({"vllm_xargs": fields()}, "vllm_xargs.cna_circuit"),
        ({"extra_body": {"vllm_xargs": fields()}}, "extra_body.vllm_xargs.cna_circuit"),
        ({**fields(), "scope": "all"}, "scope"),
        ({**fields(), "cnaScope": "all"}, "cnaScope"),
    ],
)
def test_misplaced_and_misspelt_fields_are_refused(asked: dict[str, Any], field: str) -> None:
    assert asks_for_steering({**OTHERS, **asked})
    with pytest.raises(SteeringError) as error:
        make_admission().admit({**OTHERS, **asked})
    assert error.value.field == field


@pytest.mark.parametrize("asked", [fields(), {"cna_typo": 1}, {"cna_record": "g"}, {"CNA": 1}])
def test_an_engine_without_circuits_refuses(asked: dict[str, Any]) -> None:
    with pytest.raises(SteeringError, match=r"started without circuits.*additional_config"):
        admit_or_refuse(None, {**OTHERS, **asked})
    assert has_fields({**OTHERS, **asked})


@pytest.mark.parametrize("asked", [None, {}, OTHERS, {1: 2}, {"vector": 1}])
def test_an_engine_without_circuits_serves_plain_requests(asked: Any) -> None:
    admit_or_refuse(None, asked or {})
    assert not has_fields(asked)


VALUES: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-11, 11)
    | st.floats()
    | st.sampled_from(["french", "polite", "last", "all", "frnch"])
    | st.lists(st.sampled_from(["french", "polite", 0, 0.5, math.inf]), max_size=3)
)
KEYS = st.sampled_from(
    ["cna_circuit", "cna_multiplier", "cna_scope", "cna_record", "cna_resolved", "cna_x", "other"]
)


@given(st.dictionaries(KEYS, VALUES), st.booleans())
@settings(max_examples=400, deadline=None)
def test_steered_refused_or_plain_by_request_and_never_silently(
    asked: dict[str, Any], record: bool
) -> None:
    before = repr(asked)
    try:
        admitted = make_admission(record).admit(asked)
    except SteeringError as error:
        assert error.field in asked or error.field in ("cna_circuit", "cna_multiplier")
    else:
        assert admitted is not None
        ours = {key for key in admitted if key.startswith("cna_")}
        assert len(ours) <= 1
        assert {k: v for k, v in admitted.items() if k not in ours} == {
            k: v for k, v in asked.items() if not k.startswith("cna_")
        }
        if "cna_record" in asked:
            assert ours == {"cna_record"}
            assert record
        elif "cna_circuit" in asked:
            multipliers = asked["cna_multiplier"]
            if not isinstance(multipliers, list):
                multipliers = [multipliers]
            plain = all(abs(m - 1) < 1e-7 for m in multipliers)
            assert ours == (set() if plain else {"cna_resolved"})
        else:
            assert not any(key.startswith("cna_") for key in asked)
    assert repr(asked) == before


def test_a_circuit_of_another_model_cannot_be_asked_for() -> None:
    """It is refused where it would get its name, so no request can reach it."""
    gate = make_admission()
    alien = Circuit("other", "B", 2, 16, (Neuron(0, 0, 0.5),))
    with pytest.raises(CircuitError, match=r"'other' \(B.*'m' \(A"):
        gate.registry.register("alien", alien)
    assert_refused(gate, fields("alien"), "cna_circuit", "no circuit is named 'alien'")


def test_what_was_admitted_passes_unchanged_and_nothing_else_does() -> None:
    """The API server admits where it chooses the model; the engine's front end sees it again."""
    gate = make_admission()
    admitted = gate.admit({**fields(), **OTHERS})
    assert admitted is not None and is_sealed(admitted["cna_resolved"])
    gate.registry.register("french", POLITE)  # the name stands for other content by then
    again = gate.admit(admitted)
    assert again == admitted and again["cna_resolved"]["circuits"] == [[FRENCH.digest, 0.5]]
    assert gate.admit(json.loads(json.dumps(admitted))) == admitted, "also from another process"
    # The same values from a client, who has no seal of ours, are refused.
    resolved = admitted["cna_resolved"]
    for forged in (
        RESOLVED,
        {**RESOLVED, "seal": None},
        {**RESOLVED, "seal": "\xe9" * 64},
        {**RESOLVED, "seal": "0" * 64},
        {**resolved, "scope": "all"},
        {**resolved, "circuits": [[FRENCH.digest, 0.25]]},
        {**resolved, "circuits": [[POLITE.digest, 0.5]]},
        {**resolved, "vectors": [[FRENCH.digest, 0.5]]},
    ):
        with pytest.raises(SteeringError, match="cna_resolved: is set by the server only"):
            gate.admit({"cna_resolved": forged})
    with pytest.raises(SteeringError, match="cna_resolved: is set by the server only"):
        gate.admit({**admitted, "cna_scope": "all"})
    with pytest.raises(SteeringError, match="cna_record: this engine does not record"):
        gate.admit({**admitted, "cna_record": "g"})
    with pytest.raises(SteeringError, match="streaming inputs"):
        gate.admit(admitted, resumable=True)


def test_a_seal_is_of_its_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    admitted = make_admission().admit(fields())
    assert admitted == make_admission().admit(fields()), "equal steering has an equal seal"
    monkeypatch.setenv(SECRET_VARIABLE, "another secret of an operator")
    assert make_admission().admit(fields()) != admitted
    with pytest.raises(SteeringError, match=f"several nodes, all need the same {SECRET_VARIABLE}"):
        make_admission().admit(admitted)
    monkeypatch.setenv(SECRET_VARIABLE, "short")
    with pytest.raises(CnaConfigError, match="at least 16 characters"):
        make_admission()


@pytest.mark.parametrize(
    ("circuits", "multipliers", "shared"),
    [
        (["wide", "french"], [0.0, 2.0], 1),
        (["french", "french"], [0.5, 0.5], 1),
        (["wide", "french"], [1.0, 2.0], 0),
        (["french", "polite"], [0.0, 2.0], 0),
        ("wide", 0.0, 0),
    ],
)
def test_an_adapter_of_circuits_that_share_neurons_is_warned_of(
    circuits: Any,
    multipliers: Any,
    shared: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = Registry(ServedModel("m", "A", Shape.of(2, 16), 6))
    registry.register("french", FRENCH)
    registry.register("polite", POLITE)
    registry.register("wide", Circuit("m", "A", 2, 16, (Neuron(0, 0), Neuron(1, 1))))
    adapter = Adapter.from_dict({"circuit": circuits, "multiplier": multipliers})
    registry.register("both", adapter)
    logger = logging.getLogger("vllm.cna")
    # vLLM configures it where it is imported, and other tests choose a level.
    monkeypatch.setattr(logger, "disabled", False)
    caplog.set_level(logging.WARNING, logger="vllm.cna")
    logger.addHandler(caplog.handler)
    try:
        Admission(CnaConfig(), registry)
    finally:
        logger.removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records]
    assert len(set(told)) == (1 if shared else 0)
    if shared:
        assert f"adapter='both': {shared} neurons are in more than one of its circuits" in told[0]
