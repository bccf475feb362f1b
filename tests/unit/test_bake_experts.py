# SPDX-License-Identifier: Apache-2.0
"""Baked mixtures of experts: the right columns in every layout, and what the hooks compute."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import cna_vllm.checkpoints.bake
from cna_vllm import Circuit, Neuron
from cna_vllm.checkpoints.bake import bake
from cna_vllm.checkpoints.checkpoint import CheckpointError, open_checkpoint
from cna_vllm.checkpoints.down_proj import neuron_axis
from cna_vllm.reading.vocabulary import _written
from tests import expert_models, tiny_models
from tests.expert_models import DENSE, ExpertArm, ExpertModel, triples
from tests.models_zoo import build

Tensors = Mapping[str, torch.Tensor]
Column = Callable[[Tensors, Neuron], torch.Tensor]


def named(pattern: str, shared: str = "") -> Column:
    """The column of a neuron in tensors of these names."""

    def column(tensors: Tensors, n: Neuron) -> torch.Tensor:
        if n.expert is None:
            return tensors[shared.format(l=n.layer)][:, n.index]
        tensor = tensors[pattern.format(l=n.layer, e=n.expert)]
        if tensor.dim() == 2:
            return tensor[:, n.index]
        return tensor[n.expert, n.index] if "feed" in pattern else tensor[n.expert, :, n.index]

    return column


# Llama 4 stores [experts, width, hidden_size]; Granite the other way.
LAYOUTS: Mapping[str, Column] = {
    "GraniteMoeSharedForCausalLM": named(
        "model.layers.{l}.block_sparse_moe.output_linear.weight",
        "model.layers.{l}.shared_mlp.output_linear.weight",
    ),
    "Llama4ForCausalLM": named(
        "model.layers.{l}.feed_forward.experts.down_proj",
        "model.layers.{l}.feed_forward.shared_expert.down_proj.weight",
    ),
    "Lfm2MoeForCausalLM": named(
        "model.layers.{l}.feed_forward.experts.{e}.w2.weight",
        "model.layers.{l}.feed_forward.w2.weight",
    ),
    "NemotronHForCausalLM": named("", "backbone.layers.{l}.mixer.down_proj.weight"),
    "GPT2LMHeadModel": lambda tensors, n: tensors[f"transformer.h.{n.layer}.mlp.c_proj.weight"][
        n.index
    ],
}


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_every_layout_is_scaled_where_it_should_be(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(architecture, tmp_path / "m")
    checkpoint = open_checkpoint(str(source))
    shape, rng = checkpoint.shape, random.Random(0)
    every = [
        Neuron(layer, index, rng.choice((-1.0, 1.0)), expert)
        for layer in range(shape.num_layers)
        for expert in ([None] if shape.widths[layer] else []) + [*range(shape.experts[layer])]
        for index in range(shape.width(layer, expert))
    ]
    circuit = Circuit("m", architecture, **shape.fields(), neurons=rng.sample(every, 60))
    monkeypatch.setattr(cna_vllm.checkpoints.bake, "_BLOCK", 3 * 4 * 64)  # a few rows
    bake(str(source), circuit, 0.3, tmp_path / "baked")
    wanted, column = load_file(source / "model.safetensors"), LAYOUTS[architecture]
    _, places = checkpoint.down_proj(circuit.by_mlp())
    for neuron in circuit.neurons:
        read = _written(checkpoint, "", places[neuron.layer, neuron.expert], neuron)
        assert torch.equal(read * neuron.delta, column(wanted, neuron))
    for neuron in circuit.neurons:
        column(wanted, neuron).mul_(0.3)
    found = load_file(tmp_path / "baked" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@torch.inference_mode()
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_equals_hooks_on_all_positions(name: str, tmp_path: Path) -> None:
    source = expert_models.save(name, tmp_path / "m")
    oracle = ExpertModel(source)
    chosen = triples(oracle, 0.2, seed=1)
    neurons = [Neuron(la, i, 1.0, None if e == DENSE else e) for la, e, i in chosen]
    architecture = expert_models.MODELS[name].model_class
    circuit = Circuit(name, architecture, **oracle.fields(), neurons=neurons)
    prompt = torch.tensor([tiny_models.prompts(1, longest=30)[0] * 8])
    plain = oracle.model(prompt).logits
    for multiplier in (0.0, 2.0):
        out = tmp_path / f"baked-{multiplier}"
        baked = bake(str(source), circuit, multiplier, out)
        assert set(baked.record["tensors"]) < load_file(out / "model.safetensors").keys()
        model = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with oracle.steered(ExpertArm((), "all", routed=((chosen, multiplier),)), prompt.shape[1]):
            steered = oracle.model(prompt).logits
        torch.testing.assert_close(model(prompt).logits, steered, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(steered, plain, atol=1e-2)


def test_a_layout_that_is_not_known_is_refused(tmp_path: Path) -> None:
    assert neuron_axis([8, 64, 32], 64, 32, "any") == 1
    assert neuron_axis([8, 32, 64], 64, 32, "any") == 0
    assert neuron_axis([64, 32], 64, 32, "any") == neuron_axis([64, 64], 64, 64, "any") == 1
    assert neuron_axis([32, 64], 64, 32, "any") is None
    assert neuron_axis([8, 64, 64], 64, 64, "any") is None
    assert neuron_axis([8, 64, 64], 64, 64, "gpt_oss") == 0
    source = build("GraniteMoeForCausalLM", tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.block_sparse_moe.output_linear.weight"
    circuit = Circuit(
        "m",
        "GraniteMoeForCausalLM",
        **open_checkpoint(str(source)).shape.fields(),
        neurons=[Neuron(2, 5, 1.0, 3)],
    )
    for spoiled, why in ((tensors[name][:3], r"has shape \[3, 64, 96\]"), (None, "no tensor")):
        held = {k: v.contiguous() for k, v in {**tensors, name: spoiled}.items() if v is not None}
        save_file(held, source / "model.safetensors")
        with pytest.raises(CheckpointError, match=why):
            bake(str(source), circuit, 0.0, tmp_path / "baked")
    assert not (tmp_path / "baked").exists()
