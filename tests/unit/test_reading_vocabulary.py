# SPDX-License-Identifier: Apache-2.0
"""Promoted and suppressed items, against Hugging Face modules; checkpoints that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CohereConfig

from cna_vllm import Neuron
from cna_vllm.checkpoints.checkpoint import CheckpointError, open_checkpoint
from cna_vllm.reading.vocabulary import Reading, load_tokenizer, read_neurons
from tests import checkpoints, tiny_models
from tests.architectures import ARCHITECTURES, COMMON

NEURONS = (Neuron(0, 5, 1.5), Neuron(2, 0, -2.0), Neuron(3, 95, 0.0))


class AllRows:
    """Stands for a tokenizer that has an item for every row of the embeddings."""

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(tiny_models.VOCABULARY)}

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)

    def decode(self, tokens: list[int], **_options: object) -> str:
        return str(tokens[0])


@torch.inference_mode()
def through_the_model(folder: Path, neuron: Neuron) -> torch.Tensor:
    """Logits of a residual stream that holds only what the neuron writes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layer = model.model.layers[neuron.layer]
    mlp = getattr(layer.mlp, "shared_expert", layer.mlp)
    written = mlp.down_proj.weight[:, neuron.index] * (-1.0 if neuron.delta < 0 else 1.0)
    if hasattr(layer, "post_feedforward_layernorm"):
        written = layer.post_feedforward_layernorm(written)
    return model.lm_head(model.model.norm(written))


def same_items(reading: Reading, logits: torch.Tensor) -> None:
    high, low = logits.topk(5).indices, (-logits).topk(5).indices
    assert [item.token for item in reading.promotes] == high.tolist()
    assert [item.token for item in reading.suppresses] == low.tolist()
    ours = torch.tensor([item.score for item in (*reading.promotes, *reading.suppresses)])
    # The model also divides by the norm of what is written: one positive factor.
    ratio = ours / torch.cat([logits[high], logits[low]])
    assert (ratio > 0).all()
    torch.testing.assert_close(ratio, ratio[0].expand(10), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_items_are_those_of_the_models_own_modules(name: str, tmp_path: Path) -> None:
    folder = ARCHITECTURES[name].save(tmp_path / name)
    readings = read_neurons(open_checkpoint(str(folder)), AllRows(), NEURONS)
    assert [reading.neuron for reading in readings] == list(NEURONS)
    for reading in readings:
        same_items(reading, through_the_model(folder, reading.neuron))


def test_a_layernorm_centres(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CohereConfig(**{**COMMON, "logit_scale": 0.5, "tie_word_embeddings": True})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.model.norm.weight.data += torch.randn(64)
    model.save_pretrained(tmp_path)
    readings = read_neurons(open_checkpoint(str(tmp_path)), AllRows(), NEURONS)
    for reading in readings:
        same_items(reading, through_the_model(tmp_path, reading.neuron))


def by_hand(named: dict[str, torch.Tensor], neuron: Neuron, head: str) -> torch.Tensor:
    column = named[f"model.layers.{neuron.layer}.mlp.down_proj.weight"][:, neuron.index]
    scores = named[head] @ (named["model.norm.weight"] * column)
    return (-scores if neuron.delta < 0 else scores)[: len(checkpoints.VOCABULARY)]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_layouts_and_padding_rows(tmp_path: Path, shards: int, tied: bool) -> None:
    """Rows past the tokenizer's items never appear; tied embeddings win over a stored lm_head."""
    named = checkpoints.tensors()
    folder = checkpoints.write(tmp_path / "m", named, shards, tie_word_embeddings=tied)
    tokenizer = checkpoints.add_tokenizer(folder)
    neurons = checkpoints.circuit().neurons
    readings = read_neurons(open_checkpoint(str(folder)), tokenizer, neurons, 40)
    for reading in readings:
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        scores = by_hand(named, reading.neuron, head)
        assert [i.token for i in reading.promotes] == scores.argsort(descending=True).tolist()
        assert [i.token for i in reading.suppresses] == scores.argsort().tolist()
        assert reading.promotes[0].score == pytest.approx(float(scores.max()), rel=1e-4)
        assert {i.text for i in reading.promotes} == set(checkpoints.VOCABULARY)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("", "lm_head.weight"),
    ],
)
def test_names_of_multimodal_checkpoints(tmp_path: Path, prefix: str, head: str) -> None:
    plain = checkpoints.write(tmp_path / "plain")
    other = checkpoints.write(tmp_path / "other", checkpoints.tensors(prefix, head))
    tokenizer = checkpoints.add_tokenizer(plain)
    neurons = checkpoints.circuit().neurons
    assert read_neurons(open_checkpoint(str(other)), tokenizer, neurons) == read_neurons(
        open_checkpoint(str(plain)), tokenizer, neurons
    )


def refusal(folder: Path) -> str:
    """What reading the neurons of a folder is refused with."""
    with pytest.raises(CheckpointError) as refused:
        read_neurons(open_checkpoint(str(folder)), AllRows(), checkpoints.circuit().neurons)
    message = str(refused.value)
    assert "\n" not in message
    return message


def without(fragment: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in checkpoints.tensors().items() if fragment not in name}


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    awq = checkpoints.write(tmp_path / "awq", quantization_config={"quant_method": "awq"})
    assert "quantized (awq)" in refusal(awq)
    named = checkpoints.tensors()
    name = "model.layers.2.mlp.down_proj.weight"
    packed = {**named, name: named[name].to(torch.int8)}
    assert "has dtype I8" in refusal(checkpoints.write(tmp_path / "packed", packed))
    other = {
        **without("layers.2.mlp.down_proj"),
        "model.layers.2.mlp.down_proj.qweight": named[name],
    }
    assert "only model.layers.2.mlp.down_proj.qweight" in refusal(
        checkpoints.write(tmp_path / "other", other)
    )


def test_missing_and_ambiguous_tensors_are_refused(tmp_path: Path) -> None:
    lacking = checkpoints.write(tmp_path / "lacking", without("layers.2.mlp"))
    assert "no tensor layers.2.mlp.down_proj.weight" in refusal(lacking)
    experts = {**without("layers.2.mlp"), "model.layers.2.mlp.experts.0.w": torch.ones(2)}
    assert "nor one of a like name" in refusal(checkpoints.write(tmp_path / "experts", experts))
    twice = {**checkpoints.tensors(), "draft.layers.0.mlp.down_proj.weight": torch.ones(8, 16)}
    message = refusal(checkpoints.write(tmp_path / "twice", twice))
    assert "ambiguous" in message and "'draft.layers', 'model.layers'" in message
    # Not the model's own layers: of drafts and of images.
    for other in ("mtp.layers.0", "mtp.0.layers.1", "model.vision_tower.layers.2"):
        named = {**checkpoints.tensors(), f"{other}.mlp.down_proj.weight": torch.ones(8, 16)}
        folder = checkpoints.write(tmp_path / other, named)
        checkpoint = open_checkpoint(str(folder))
        prefix, places = checkpoint.down_proj([(0, None), (2, None)])
        assert prefix == "model."
        assert places[2, None] == ("model.layers.2.mlp.down_proj.weight", None, 1)
    assert "no lm_head.weight" in refusal(checkpoints.write(tmp_path / "head", without("lm_head")))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    for name, says in (
        ("pytorch_model.bin", "only .bin files"),
        ("model.gguf", "only .gguf files"),
        ("notes.txt", "no weights"),
        ("adapter_model.safetensors", "neither model.safetensors nor"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        assert says in refusal(folder)
    assert "is a file" in refusal(tmp_path / "model.gguf" / "model.gguf")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x00" * 20)
    assert "model.safetensors: " in refusal(tmp_path / "cut")


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "no usable 'weight_map'"),
        ("{}", "no usable 'weight_map'"),
        ('{"weight_map": {}}', "no usable 'weight_map'"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "is not a file name"),
        ('{"weight_map": {"a": 1}}', "is not a file name"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors, which is not there"),
    ],
)
def test_damaged_indices_are_refused(tmp_path: Path, index: str, says: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert says in refusal(tmp_path)


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "m", shards=2)
    save_file(checkpoints.tensors(), folder / "model.safetensors")
    assert "remove the one not meant" in refusal(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(open_checkpoint(str(folder)).files) == len(checkpoints.tensors())


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_tokenizer(str(checkpoints.write(tmp_path / "m")))
