# SPDX-License-Identifier: Apache-2.0
"""Sets of steering vectors: what is valid, their digest, and their file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from cna_vllm.steering.vectors import VectorError, VectorSet

ONES = np.ones(4, dtype=np.float32)


def make(**changes: Any) -> VectorSet:
    arguments: dict[str, Any] = {
        "form": "mlp",
        "model": "m",
        "architecture": "LlamaForCausalLM",
        "num_layers": 3,
        "hidden_size": 4,
        "vectors": {2: ONES, 0: -2.5 * ONES},
        "method": {"name": "caa"},
    }
    return VectorSet(**{**arguments, **changes})


def test_vectors_are_sorted_read_only_copies() -> None:
    mine = np.ones(4)
    vectors = make(vectors={2: mine, 0: mine}).vectors
    mine[:] = 7.0
    assert list(vectors) == [0, 2]
    assert all(v.dtype == np.float32 and (v == 1.0).all() for v in vectors.values())
    with pytest.raises(ValueError):
        vectors[0][0] = 2.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"form": "attention"}, "'form' must be one of mlp, residual"),
        ({"form": ["mlp"]}, "'form'"),
        ({"model": ""}, "'model'"),
        ({"model": 7}, "'model'"),
        ({"architecture": "a b"}, "'architecture'"),
        ({"num_layers": 0}, "'num_layers'"),
        ({"hidden_size": True}, "'hidden_size'"),
        ({"vectors": {}}, "at least one layer"),
        ({"vectors": [ONES]}, "at least one layer"),
        ({"vectors": {3: ONES}}, "from 0 to 2, not 3"),
        ({"vectors": {"0": ONES}}, "from 0 to 2, not '0'"),
        ({"vectors": {0: ONES[:3]}}, r"4 floating-point numbers, not float32 \[3\]"),
        ({"vectors": {0: [1, 2, 3, 4]}}, "floating-point"),
        ({"vectors": {0: ["a"] * 4}}, "floating-point"),
        ({"vectors": {0: ONES * np.nan}}, "not finite"),
        ({"vectors": {0: np.full(4, 1e39)}}, "not finite in float32"),
        ({"form": "residual"}, "for one layer, not for 2"),
        ({"created": "yesterday"}, "ISO 8601"),
        ({"method": {"x": {1}}}, "'method'"),
        ({"notes": "no"}, "'notes'"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(VectorError, match=says):
        make(**changes)


def test_the_digest_is_that_of_the_content() -> None:
    same = [make(), make(model="other", notes=("x",)), make(vectors={0: ONES * -2.5, 2: ONES})]
    assert len({v.digest for v in same}) == 1
    assert make(vectors={0: ONES * 0.0}).digest == make(vectors={0: ONES * -0.0}).digest
    others = [
        make(vectors={2: ONES}),
        make(vectors={1: ONES}),
        make(form="residual", vectors={2: ONES}),
        make(num_layers=4, vectors={2: ONES}),
        make(architecture="Other", vectors={2: ONES}),
        make(vectors={2: ONES * np.nextafter(np.float32(1), np.float32(2))}),
    ]
    assert len({v.digest for v in others}) == len(others)


def test_the_summary() -> None:
    vectors = make(dtype="float32", prompts={"positive": 2, "negative": 3, "digest": "d"})
    assert vectors.summary().splitlines() == [
        "model   'm' (LlamaForCausalLM, 3 layers, hidden size 4)",
        "form    mlp",
        "layers  0, 2",
        "norms   2 to 5",
        f"digest  {vectors.digest}",
        "found   at an unknown time in float32",
        "prompts 2 positive, 3 negative",
    ]
    everywhere = make(vectors={0: ONES, 1: ONES, 2: ONES}, notes=("see",)).summary()
    assert "layers  all 3" in everywhere and everywhere.endswith("note    see")


def test_the_file_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    vectors = make(dtype="float32", prompts={"positive": 2}, created="2026-01-01", notes=("n",))
    vectors.save(path)
    again = VectorSet.load(path)
    assert again.digest == vectors.digest
    assert again.to_bytes() == vectors.to_bytes()
    assert (again.prompts, again.notes) == ({"positive": 2}, ("n",))
    assert os.listdir(tmp_path) == ["v.safetensors"]


def written(tensors: dict[str, Any] | None = None, **changes: Any) -> bytes:
    """A file as `save` writes it, with other metadata or tensors; None drops a field."""
    good = make()
    header = json.loads(good.to_bytes()[8:].split(b'"layer.0"')[0][:-1] + b"}")
    metadata = {**json.loads(header["__metadata__"]["cna_vectors"]), **changes}
    metadata = {k: v for k, v in metadata.items() if v is not None}
    values = {f"layer.{k}": v for k, v in good.vectors.items()} if tensors is None else tensors
    return safetensors.numpy.save(values, metadata={"cna_vectors": json.dumps(metadata)})


def test_the_digest_of_a_file_is_checked_and_may_be_missing() -> None:
    assert VectorSet.from_bytes(written(digest=None)).digest == make().digest
    with pytest.raises(VectorError, match="edited or damaged"):
        VectorSet.from_bytes(written(digest="0" * 64))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not a safetensors file"),
        (b"{}" * 40, "not a safetensors file"),
        (make().to_bytes()[:-1], "not a safetensors file"),
        (safetensors.numpy.save({"layer.0": ONES}), "its metadata has no 'cna_vectors'"),
        (safetensors.numpy.save({"layer.0": ONES}, {"cna_vectors": "{"}), "is not JSON"),
        (safetensors.numpy.save({"layer.0": ONES}, {"cna_vectors": "[]"}), "'format'"),
        (written(format="cna-circuit"), "'format'"),
        (written(version=2), "'version' must be 1, not 2"),
        (written(version=True), "'version'"),
        (written(more=1), "unknown field 'more'"),
        (written(form=None), "'form' is missing"),
        (written({"weight": ONES}), "'weight' is not named layer.N"),
        (written({"layer.-1": ONES}), "not named layer.N"),
        (written({"layer.0": ONES.astype(np.int32)}), "floating-point"),
        (written({"layer.0": ONES[:2]}), "4 floating-point numbers"),
        (written({}), "at least one layer"),
    ],
)
def test_bad_files_are_refused_with_the_reason(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(VectorError, match=says) as refused:
        VectorSet.load(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_missing_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match="cannot be read"):
        VectorSet.load(tmp_path / "none")
    with pytest.raises(VectorError, match="cannot be read"):
        VectorSet.load("nul\0byte")
    make().save(tmp_path / "v")
    with pytest.raises(VectorError, match="larger than 10 bytes"):
        VectorSet.load(tmp_path / "v", max_bytes=10)


@given(st.data())
def test_any_bytes_give_vectors_or_a_vector_error(data: st.DataObject) -> None:
    raw = bytearray(make().to_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        VectorSet.from_bytes(bytes(raw))
    except VectorError as error:
        assert "\n" not in str(error)


def test_the_model_must_fit() -> None:
    served = ("served", "LlamaForCausalLM", 3, 4)
    make().check_model(*served)
    make(form="residual", vectors={1: ONES}).check_model(*served)
    for other in (("s", "Qwen2ForCausalLM", 3, 4), ("s", "LlamaForCausalLM", 3, 5)):
        with pytest.raises(VectorError, match="do not fit 's'"):
            make().check_model(*other)
    gemma = {"architecture": "Gemma2ForCausalLM"}
    make(**gemma).check_model("g", "Gemma2ForCausalLM", 3, 4)
    with pytest.raises(VectorError, match="'residual' is not supported for Gemma2ForCausalLM"):
        make(**gemma, form="residual", vectors={1: ONES}).check_model("g", *gemma.values(), 3, 4)
