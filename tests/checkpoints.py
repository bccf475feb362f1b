# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints written tensor by tensor, in any layout: shards, names, dtypes, leftovers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cna_vllm import Circuit, Neuron

LAYERS, HIDDEN, WIDTH, ROWS = 3, 8, 16, 40
# Fewer than ROWS: the last rows of the embeddings are padding.
VOCABULARY = ["<unk>", " the", "\n\n", "\t", "$x$", "中文", "\u200b", *(f"t{i}" for i in range(27))]

CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": ROWS,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def tensors(
    prefix: str = "model.", head: str = "lm_head.weight", dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random weights of a Llama of CONFIG, without its attention, which nothing here reads."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    named = {f"{prefix}embed_tokens.weight": random(ROWS, HIDDEN)}
    for layer in range(LAYERS):
        named[f"{prefix}layers.{layer}.mlp.down_proj.weight"] = random(HIDDEN, WIDTH)
        named[f"{prefix}layers.{layer}.mlp.up_proj.weight"] = random(WIDTH, HIDDEN)
    named[f"{prefix}norm.weight"] = random(HIDDEN)
    named[head] = random(ROWS, HIDDEN)
    return named


def write(
    folder: Path, named: Mapping[str, torch.Tensor] | None = None, shards: int = 1, **config: Any
) -> Path:
    """Writes `named`, by default `tensors()`, over so many files, and the configuration."""
    named = tensors() if named is None else named
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if shards == 1:
        save_file(dict(named), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(named)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part: Sequence[str] = names[shard::shards]
        save_file({n: named[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def add_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    words = {token: place for place, token in enumerate(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def circuit(*neurons: Neuron, model: str = "org/tiny") -> Circuit:
    """A circuit of the models above; by default of three neurons in two layers."""
    chosen = neurons or (Neuron(0, 3, 1.5), Neuron(2, 0, -2.0), Neuron(2, 15, 0.5))
    return Circuit(model, "LlamaForCausalLM", LAYERS, WIDTH, chosen)
