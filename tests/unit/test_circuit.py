# SPDX-License-Identifier: Apache-2.0
"""Circuits: what is accepted, what is refused and how, and what the digest depends on."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cna_vllm import Circuit, CircuitError, Neuron
from cna_vllm.steering.shape import Shape

MODEL = {
    "model": "org/tiny",
    "architecture": "LlamaForCausalLM",
    "num_layers": 4,
    "intermediate_size": 16,
}


def circuit(**changes: Any) -> Circuit:
    fields: dict[str, Any] = {**MODEL, "neurons": (Neuron(3, 5, -0.5), Neuron(0, 15, 2.0))}
    return Circuit(**{**fields, **changes})


def document(**changes: Any) -> dict[str, Any]:
    data = circuit().to_dict()
    del data["digest"]
    return {**data, **changes}


def neuron(layer: Any = 0, index: Any = 0, delta: Any = 1.0) -> dict[str, Any]:
    return {"layer": layer, "index": index, "delta": delta}


def test_neurons_are_sorted_and_grouped() -> None:
    found = circuit(neurons=[Neuron(3, 5), Neuron(0, 9), Neuron(3, 1)])
    assert [(n.layer, n.index) for n in found.neurons] == [(0, 9), (3, 1), (3, 5)]
    assert found.by_layer() == {0: (9,), 3: (1, 5)}
    assert len(found) == 3


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    saved = circuit(
        dtype="float32",
        method={"name": "cna", "k": 2},
        prompts={"positive": 12, "digest": "ab"},
        tools={"vllm": "0.32.0"},
        created="2026-01-02T03:04:05+00:00",
        notes=("été",),
    )
    saved.save(path)
    loaded = Circuit.load(path)
    assert loaded == saved
    assert loaded.digest == saved.digest
    assert hash(loaded) == hash(saved)
    assert json.loads(path.read_text("utf-8"))["digest"] == saved.digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.json"]


def test_a_failed_save_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.mkdir()  # a folder cannot be replaced by a file
    (path / "kept").touch()
    with pytest.raises(OSError):
        circuit().save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.json"]


def test_pickles() -> None:
    assert pickle.loads(pickle.dumps(circuit())) == circuit()


def test_provenance_is_kept_as_plain_json() -> None:
    class Version(str):  # like that of torch, which no wire format takes
        pass

    made = circuit(tools={"torch": Version("2.13")}, method={"layers": (1, 2)})
    assert type(made.tools["torch"]) is str
    assert made.method == {"layers": [1, 2]}


def test_digest_is_of_the_content_only() -> None:
    base = circuit()
    assert re.fullmatch("[0-9a-f]{64}", base.digest)
    provenance = {"model": "another/name", "dtype": "bfloat16", "notes": ("n",), "tools": {"a": 1}}
    assert circuit(**provenance).digest == base.digest
    assert circuit(neurons=tuple(reversed(base.neurons))).digest == base.digest
    assert (
        circuit(neurons=[Neuron(0, 1, 0.0)]).digest == circuit(neurons=[Neuron(0, 1, -0.0)]).digest
    )
    different = [
        circuit(architecture="Qwen2ForCausalLM"),
        circuit(num_layers=5),
        circuit(intermediate_size=17),
        circuit(neurons=base.neurons[:1]),
        circuit(neurons=[base.neurons[0], dataclasses.replace(base.neurons[1], delta=-0.25)]),
    ]
    assert len({c.digest for c in [base, *different]}) == len(different) + 1


def test_digest_is_stable_across_releases() -> None:
    # Files in the wild carry it: a change of the canonical form needs a new file version.
    assert circuit().digest == "7be3f574ac0bd1330d8d8e592736e17b8ab403db3798c23019fa457d857e3a58"


def test_a_wrong_digest_in_the_file_is_refused_with_both() -> None:
    with pytest.raises(CircuitError) as refused:
        Circuit.from_dict(document(digest="0" * 64))
    assert circuit().digest in str(refused.value)
    assert "'digest'" in str(refused.value) and "000" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": "other"}, "'format'"),
        ({"version": 3}, "'version'"),
        ({"version": True}, "'version'"),
        ({"extra": 1}, "'extra'"),
        ({"model": ""}, "'model'"),
        ({"model": "two\nlines"}, "'model'"),
        ({"architecture": "not a class"}, "'architecture'"),
        ({"num_layers": 0}, "'num_layers'"),
        ({"num_layers": True}, "'num_layers'"),
        ({"num_layers": 4.0}, "'num_layers'"),
        ({"num_layers": 10**400}, "'num_layers'"),
        ({"intermediate_size": "16"}, "'intermediate_size'"),
        ({"dtype": 1}, "'dtype'"),
        ({"created": "yesterday"}, "'created'"),
        ({"notes": "text"}, "'notes'"),
        ({"notes": [1]}, "'notes'"),
        ({"method": []}, "'method'"),
        ({"tools": {"x": float("inf")}}, "'tools'"),
        ({"neurons": {}}, "'neurons'"),
        ({"neurons": []}, "empty"),
        ({"neurons": [[0, 0, 1.0]]}, "'neurons'[0]"),
        ({"neurons": [{"layer": 0, "index": 0}]}, "'neurons'[0]"),
        ({"neurons": [neuron(layer=-1)]}, "'layer'"),
        ({"neurons": [neuron(layer=4)]}, "'layer'"),
        ({"neurons": [neuron(layer=True)]}, "'layer'"),
        ({"neurons": [neuron(layer="0")]}, "'layer'"),
        ({"neurons": [neuron(), neuron(index=16)]}, "'neurons'[1]"),
        ({"neurons": [neuron(index=1.0)]}, "'index'"),
        ({"neurons": [neuron(index=10**400)]}, "'index'"),
        ({"neurons": [neuron(delta=float("nan"))]}, "'delta'"),
        ({"neurons": [neuron(delta=float("inf"))]}, "'delta'"),
        ({"neurons": [neuron(delta=10**400)]}, "'delta'"),
        ({"neurons": [neuron(delta=None)]}, "'delta'"),
        ({"neurons": [neuron(delta=False)]}, "'delta'"),
        ({"neurons": [neuron(2, 3), neuron(2, 3, 5.0)]}, "layer 2, index 3 twice"),
    ],
)
def test_bad_fields_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CircuitError) as refused:
        Circuit.from_dict(document(**changes))
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["model", "architecture", "num_layers", "neurons", "version"])
def test_missing_fields_are_named(name: str) -> None:
    data = document()
    del data[name]
    with pytest.raises(CircuitError, match=f"'{name}'"):
        Circuit.from_dict(data)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"neurons": NaN}', "NaN"),
        (b'{"neurons": ' + b"9" * 5000 + b"}", "too long"),
        (b"[]", "must be a JSON object"),
        (b"{}", "is not a circuit"),
        (b'{"weights": 1}', "is not a circuit"),
    ],
)
def test_files_that_are_no_circuit(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(raw)
    with pytest.raises(CircuitError) as refused:
        Circuit.load(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_unreadable_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(CircuitError, match="No such file"):
        Circuit.load(tmp_path / "none.json")
    with pytest.raises(CircuitError, match="cannot be read"):
        Circuit.load(tmp_path)
    with pytest.raises(CircuitError, match="cannot be read"):
        Circuit.load("nul\0byte")
    path = tmp_path / "c.json"
    circuit().save(path)
    with pytest.raises(CircuitError, match="larger than 100 bytes"):
        Circuit.load(path, max_bytes=100)
    assert Circuit.load(path, max_bytes=path.stat().st_size) == circuit()


def test_reference_format() -> None:
    data = {"neurons": {"3,-1,5": -0.5, "0,7,15": 2}, "threshold": 0.1}
    loaded = Circuit.from_dict(data, **MODEL)
    assert loaded.neurons == circuit().neurons
    assert loaded.digest == circuit().digest
    assert any("[7]" in note for note in loaded.notes)
    plain = Circuit.from_dict({"neurons": {"3,-1,5": -0.5}}, **MODEL)
    assert not any("ignored" in note for note in plain.notes)


@pytest.mark.parametrize(
    "neurons",
    [{"3,5": 1.0}, {"a,-1,5": 1.0}, {"3,-1,5": "x"}, {"3,-1,5": 1.0, "3, -1,5": 1.0}, {}, 7],
)
def test_bad_reference_files(neurons: Any) -> None:
    with pytest.raises(CircuitError):
        Circuit.from_dict({"neurons": neurons}, **MODEL)


def test_plain_format() -> None:
    loaded = Circuit.from_dict({"3": [5, 1], "0": [2]}, **MODEL)
    assert loaded.by_layer() == {0: (2,), 3: (1, 5)}
    assert {n.delta for n in loaded.neurons} == {0.0}
    for bad in ({"3": 5}, {"3": [5, 5]}, {"9": [1]}, {"3": ["5"]}, {"3": []}):
        with pytest.raises(CircuitError):
            Circuit.from_dict(bad, **MODEL)


@pytest.mark.parametrize("missing", list(MODEL))
@pytest.mark.parametrize("data", [{"0": [1]}, {"neurons": {"0,-1,1": 1.0}}])
def test_foreign_formats_need_the_model_named(data: dict[str, Any], missing: str) -> None:
    with pytest.raises(CircuitError, match=missing):
        Circuit.from_dict(data, **{k: v for k, v in MODEL.items() if k != missing})


def test_model_must_fit() -> None:
    circuit().check_model("a/copy", "LlamaForCausalLM", Shape.of(4, 16))
    with pytest.raises(CircuitError) as refused:
        circuit().check_model("org/other", "LlamaForCausalLM", Shape.of(5, 16))
    assert "'org/tiny'" in str(refused.value) and "'org/other'" in str(refused.value)
    Circuit.from_dict(document(), **{**MODEL, "model": "a/copy"})
    for name, value in (("architecture", "X"), ("num_layers", 5), ("intermediate_size", 8)):
        with pytest.raises(CircuitError, match=f"'{name}'"):
            Circuit.from_dict(document(), **{**MODEL, name: value})


def test_summary_says_what_matters() -> None:
    text = circuit(notes=("a remark",), method={"name": "cna"}).summary()
    for part in ("org/tiny", "2 of 64", "in 2 layers", circuit().digest, "a remark", "cna"):
        assert part in text


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON_VALUES)
@settings(deadline=None)
def test_any_json_gives_a_circuit_or_a_circuit_error(data: Any) -> None:
    try:
        assert isinstance(Circuit.from_dict(data, **MODEL), Circuit)
    except CircuitError as error:
        assert "\n" not in str(error)


@given(st.sampled_from(sorted(document())), JSON_VALUES)
@settings(deadline=None)
def test_any_value_of_any_field_gives_a_circuit_or_a_circuit_error(name: str, value: Any) -> None:
    try:
        loaded = Circuit.from_dict(document(**{name: value}))
        assert Circuit.from_dict(json.loads(json.dumps(loaded.to_dict()))) == loaded
    except CircuitError as error:
        assert "\n" not in str(error)


@given(st.binary(max_size=64))
@settings(deadline=None)
def test_any_bytes_give_a_circuit_error(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(raw)
    with pytest.raises(CircuitError):
        Circuit.load(path)


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 3), st.integers(0, 15)),
        st.floats(allow_nan=False, allow_infinity=False),
        min_size=1,
    )
)
@settings(deadline=None)
def test_round_trip(entries: dict[tuple[int, int], float]) -> None:
    made = circuit(neurons=[Neuron(layer, index, d) for (layer, index), d in entries.items()])
    again = Circuit.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert again.digest == made.digest
