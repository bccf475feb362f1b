# SPDX-License-Identifier: Apache-2.0
"""A random LoRA adapter: PEFT's files, written by hand, and the same weights merged for oracles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.oracles import HookedModel

RANK = 4
TARGETS = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


def write_lora(folder: Path, model: nn.Module, strength: float = 0.2) -> Path:
    """Changes every target's weight by about ``strength`` of its norm; returns ``folder``."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, linear in _targets(model):
        rows, columns = linear.weight.shape
        a = torch.randn(RANK, columns, generator=generator)
        b = torch.randn(rows, RANK, generator=generator)
        b *= strength * linear.weight.detach().float().norm() / (b @ a).norm()
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(path: str, lora: Path) -> HookedModel:
    """An oracle of the model with the adapter's product added to its weights."""
    oracle = HookedModel(path)
    tensors = load_file(lora / "adapter_model.safetensors")
    with torch.no_grad():
        for name, linear in _targets(oracle.model):
            key = f"base_model.model.{name}.lora_"
            linear.weight += tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
    return oracle


def _targets(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            yield name, module
