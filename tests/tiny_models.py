# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints: real architectures, small enough for Triton's interpreter."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

LAYERS = 4
WIDTH = 96
VOCABULARY = 512


def llama(folder: Path, **overrides: Any) -> Path:
    """Saves a random Llama whose greedy text depends on every layer; returns ``folder``.

    Weights are larger than at initialisation, so that logits are far apart, and head counts can
    be split over two tensor-parallel ranks.
    """
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "initializer_range": 0.25,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **overrides,
        }
    )
    return _save(config, folder)


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools,\\nplease') }}{% endif %}"
    "{{ message.role }} {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def add_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A tokenizer of words, `w6` and so on, one a token, and a chat template or none."""
    names = ["<unk>", "<s>", "</s>", "user", "assistant", "system"]
    words = {f"w{i}" if i >= len(names) else names[i]: i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


def prompts(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Random prompts of different lengths, from 2 tokens on."""
    rng = random.Random(seed)
    lengths = [2 + (longest - 2) * i // max(count - 1, 1) for i in range(count)]
    return [[rng.randrange(3, VOCABULARY) for _ in range(n)] for n in lengths]


def channels(
    num_layers: int, width: int, per_layer: int, seed: int
) -> Mapping[int, tuple[int, ...]]:
    """A random circuit that spans all layers."""
    rng = random.Random(seed)
    return {i: tuple(sorted(rng.sample(range(width), per_layer))) for i in range(num_layers)}


def circuit_object(
    by_layer: Mapping[int, tuple[int, ...]],
    num_layers: int = LAYERS,
    width: int = WIDTH,
    architecture: str = "LlamaForCausalLM",
) -> dict[str, Any]:
    """The circuit file's object for a set of channels."""
    return {
        "format": "cna-circuit",
        "version": 1,
        "model": "test",
        "architecture": architecture,
        "num_layers": num_layers,
        "intermediate_size": width,
        "neurons": [
            {"layer": layer, "index": index, "delta": 1.0}
            for layer, indices in by_layer.items()
            for index in indices
        ],
    }


def two_circuits(
    folder: Path, architecture: str
) -> tuple[dict[str, dict[int, tuple[int, ...]]], dict[str, str]]:
    """Circuits of a fifth of all neurons each, which overlap: channels and files, by name."""
    circuits = {
        name: channels(LAYERS, WIDTH, WIDTH // 5, seed) for name, seed in (("one", 1), ("two", 2))
    }
    files = {}
    for name, by_layer in circuits.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(circuit_object(by_layer, architecture=architecture)))
        files[name] = str(file)
    return circuits, files


def mixtral(folder: Path) -> Path:
    """A random mixture of experts, with no dense or shared MLP beside the routed ones."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        max_position_embeddings=128,
    )
    return _save(config, folder)


def mamba(folder: Path) -> Path:
    """A random model without MLPs."""
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=16, time_step_rank=8
    )
    return _save(config, folder)


def _save(config: PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
