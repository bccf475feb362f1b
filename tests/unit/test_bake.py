# SPDX-License-Identifier: Apache-2.0
"""Baked checkpoints: the right columns, every other byte kept, whole or not there at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cna_vllm.checkpoints.bake
from cna_vllm import Circuit, CircuitError, Neuron
from cna_vllm.checkpoints.bake import RECORD, BakeError, bake
from cna_vllm.checkpoints.checkpoint import CheckpointError
from tests import checkpoints, tiny_models
from tests.architectures import ARCHITECTURES
from tests.oracles import Arm, HookedModel

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MULTIPLIERS = (0.0, 0.3, 1.0, 2.0, -1.5)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def scaled(named: dict[str, torch.Tensor], circuit: Circuit, m: float) -> dict[str, torch.Tensor]:
    """The definition, element by element: round(m * w), and +0 for m = 0."""
    result = {name: tensor.clone() for name, tensor in named.items()}
    for neuron in circuit.neurons:
        weight = result[f"model.layers.{neuron.layer}.mlp.down_proj.weight"]
        for row in range(weight.shape[0]):
            old = weight[row, neuron.index]
            wide = old if old.dtype == torch.float64 else old.float()
            weight[row, neuron.index] = (wide * m).to(old.dtype) if m else 0.0
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_as_defined(
    tmp_path: Path, dtype: torch.dtype, multiplier: float, shards: int
) -> None:
    named = checkpoints.tensors(dtype=dtype)
    source = checkpoints.write(tmp_path / "m", named, shards)
    circuit = checkpoints.circuit()
    bake(str(source), circuit, multiplier, tmp_path / "baked")
    found, wanted = load(tmp_path / "baked"), scaled(named, circuit, multiplier)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor), name
    if multiplier == 1:
        assert all(bits(found[name]) == bits(tensor) for name, tensor in named.items())


def test_ablation_writes_plus_zero_even_over_nan(tmp_path: Path) -> None:
    named = checkpoints.tensors()
    named["model.layers.0.mlp.down_proj.weight"][:3, 3] = torch.tensor([-1.0, math.inf, math.nan])
    bake(str(checkpoints.write(tmp_path / "m", named)), checkpoints.circuit(), 0.0, tmp_path / "b")
    column = load(tmp_path / "b")["model.layers.0.mlp.down_proj.weight"][:, 3]
    assert bits(column) == bytes(4 * checkpoints.HIDDEN)


def test_blocks_of_rows_join_seamlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = checkpoints.tensors(dtype=torch.bfloat16)
    source = checkpoints.write(tmp_path / "m", named)
    monkeypatch.setattr(
        cna_vllm.checkpoints.bake, "_BLOCK", 3 * 2 * checkpoints.WIDTH
    )  # three rows
    bake(str(source), checkpoints.circuit(), 2.0, tmp_path / "baked")
    wanted = scaled(named, checkpoints.circuit(), 2.0)
    assert all(bits(t) == bits(wanted[n]) for n, t in load(tmp_path / "baked").items())


def test_only_files_with_touched_tensors_are_rewritten(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "m", shards=6)
    (source / "sub").mkdir()
    (source / "sub" / "extra.json").write_text("{}")
    circuit = checkpoints.circuit(Neuron(1, 2, 1.0))
    baked = bake(str(source), circuit, 0.5, tmp_path / "baked")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert baked.rewritten == (index["model.layers.1.mlp.down_proj.weight"],)
    others = set(index.values()) - set(baked.rewritten)
    assert len(others) == 5 and others < set(baked.kept)
    for name in others:
        assert (tmp_path / "baked" / name).samefile(source / name)
    for name in ("config.json", "model.safetensors.index.json", "sub/extra.json"):
        copy = tmp_path / "baked" / name
        assert copy.read_bytes() == (source / name).read_bytes()
        assert not copy.samefile(source / name)  # so that it can be edited


def test_provenance_in_the_folder_and_in_the_weights(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "m", shards=2)
    circuit = checkpoints.circuit()
    baked = bake(str(source), circuit, 0.25, tmp_path / "baked")
    record = json.loads((tmp_path / "baked" / RECORD).read_text())
    assert record == baked.record
    assert record["circuit"]["digest"] == circuit.digest
    assert (record["multiplier"], record["scope"]) == (0.25, "all")
    assert record["source"] == {"model": str(source), "revision": None}
    assert Circuit.load(tmp_path / "baked" / record["circuit"]["file"]) == circuit
    assert set(record["tensors"].values()) == set(baked.rewritten)
    assert set(record["tools"]) == {"cna_vllm", "safetensors", "torch", "transformers"}
    with safe_open(tmp_path / "baked" / baked.rewritten[0], "pt") as handle:
        metadata = handle.metadata()
    assert metadata["format"] == "pt"  # what was there stays
    assert metadata["cna_circuit_digest"] == circuit.digest
    assert metadata["cna_multiplier"] == "0.25"


def test_a_baked_checkpoint_can_be_baked_again(tmp_path: Path) -> None:
    named = checkpoints.tensors()
    one, two = checkpoints.circuit(), checkpoints.circuit(Neuron(0, 3, 1.0), Neuron(1, 4, 1.0))
    bake(str(checkpoints.write(tmp_path / "m", named)), one, 0.5, tmp_path / "once")
    bake(str(tmp_path / "once"), two, -2.0, tmp_path / "twice")
    wanted = scaled(scaled(named, one, 0.5), two, -2.0)
    assert all(bits(t) == bits(wanted[n]) for n, t in load(tmp_path / "twice").items())
    record = json.loads((tmp_path / "twice" / RECORD).read_text())
    assert [entry["multiplier"] for entry in record["earlier"]] == [0.5]
    assert [entry["circuit"]["digest"] for entry in record["earlier"]] == [one.digest]
    assert len(list((tmp_path / "twice").glob("cna_circuit_*.json"))) == 2


def test_other_copies_of_the_weights_are_left_out(tmp_path: Path) -> None:
    """An engine that prefers them would run unscaled."""
    source = checkpoints.write(tmp_path / "m")
    others = ["consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    for name in (*others, "model.gguf", ".hidden", "tokenizer.model"):
        (source / name).write_bytes(b"x")
    baked = bake(str(source), checkpoints.circuit(), 0.0, tmp_path / "baked")
    assert baked.record["left_out"] == sorted([*others, "model.gguf"])
    names = {path.name for path in (tmp_path / "baked").iterdir()}
    assert names.isdisjoint({*others, "model.gguf", ".hidden"})
    assert {"tokenizer.model", "config.json", "model.safetensors"} < names


def refused(tmp_path: Path, source: Path, circuit: Circuit, m: float, kind: type) -> str:
    """The message, after a look that nothing was left behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind) as error:
        bake(str(source), circuit, m, tmp_path / "baked")
    assert sorted(tmp_path.rglob("*")) == before
    return str(error.value)


@pytest.mark.parametrize("multiplier", [math.nan, math.inf, -math.inf, 1e39])
def test_multipliers_must_be_finite(tmp_path: Path, multiplier: float) -> None:
    source = checkpoints.write(tmp_path / "m")
    assert "finite" in refused(tmp_path, source, checkpoints.circuit(), multiplier, BakeError)


def test_products_must_be_finite(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.tensors(dtype=torch.float16))
    message = refused(tmp_path, source, checkpoints.circuit(), 1e6, BakeError)
    assert "out of the range of torch.float16" in message


def test_circuits_of_other_models_are_refused_with_both_names(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "m")
    other = Circuit("org/qwen", "Qwen2ForCausalLM", 3, 16, (Neuron(0, 0),))
    message = refused(tmp_path, source, other, 0.0, CircuitError)
    assert "'org/qwen'" in message and repr(str(source)) in message


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    named = checkpoints.tensors()
    named["model.layers.2.mlp.down_proj.weight"] = torch.ones(16, 8)
    source = checkpoints.write(tmp_path / "m", named)
    message = refused(tmp_path, source, checkpoints.circuit(), 0.0, CheckpointError)
    assert "shape [16, 8]" in message


def test_missing_tensors_are_refused(tmp_path: Path) -> None:
    named = checkpoints.tensors()
    del named["model.layers.2.mlp.down_proj.weight"]
    source = checkpoints.write(tmp_path / "m", named)
    message = refused(tmp_path, source, checkpoints.circuit(), 0.0, CheckpointError)
    assert "no tensor layers.2.mlp.down_proj.weight" in message


@pytest.mark.parametrize("record", ["{", "[]", "{}"])
def test_a_damaged_record_is_refused(tmp_path: Path, record: str) -> None:
    source = checkpoints.write(tmp_path / "m")
    (source / RECORD).write_text(record)
    message = refused(tmp_path, source, checkpoints.circuit(), 0.0, BakeError)
    assert "not the record of an earlier bake" in message


def test_an_existing_folder_is_refused_even_if_empty(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "m")
    (tmp_path / "baked").mkdir()
    assert "exists" in refused(tmp_path, source, checkpoints.circuit(), 0.0, BakeError)


@torch.inference_mode()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_loads_and_equals_hooks_on_all_positions(
    name: str, tmp_path: Path
) -> None:
    """Hugging Face's logits of the baked model are those of the original with scaled inputs."""
    architecture = ARCHITECTURES[name]
    source = architecture.save(tmp_path / "m")
    by_layer = tiny_models.channels(tiny_models.LAYERS, tiny_models.WIDTH, 20, seed=1)
    neurons = tuple(Neuron(layer, i, 1.0) for layer, picks in by_layer.items() for i in picks)
    circuit = Circuit(
        name, architecture.model_class, tiny_models.LAYERS, tiny_models.WIDTH, neurons
    )
    prompt = torch.tensor([tiny_models.prompts(1, longest=30)[0] * 8])
    oracle = HookedModel(source)
    for multiplier in (0.0, 2.0):
        out = tmp_path / f"baked-{multiplier}"
        bake(str(source), circuit, multiplier, out)
        baked = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with oracle.steered(Arm(((by_layer, multiplier),), "all"), prompt.shape[1]):
            steered = oracle.model(prompt).logits
        torch.testing.assert_close(baked(prompt).logits, steered, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(steered, oracle.model(prompt).logits, atol=1e-2)
