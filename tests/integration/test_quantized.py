# SPDX-License-Identifier: Apache-2.0
"""A checkpoint with quantized weights and activations: steering acts before the quantization."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny_models
from tests.engine_job import V1_HERE, run_engine
from tests.tiny_models import LAYERS, WIDTH

pytestmark = pytest.mark.engine


# int8 weights with a scale per output channel, int8 activations with a scale per token row.
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
# Layer -> multiplier of all its neurons. Powers of two, so that no rounding differs.
MULTIPLIERS = {1: 4.0, 2: 0.0}


def test_steering_equals_scaled_weights(tmp_path: Path) -> None:
    """A layer whose neurons are all scaled by m is the layer whose ``down_proj`` is scaled by m.

    That holds through the quantization of each token row only if it sees the steered row: its
    scale then is m times what it was, and its integers are the same. The other side is stock
    vLLM without the plugin.
    """
    steered, scaled = quantized(tmp_path / "steered"), quantized(tmp_path / "scaled", MULTIPLIERS)
    circuits = {}
    for layer in MULTIPLIERS:
        file = tmp_path / f"{layer}.json"
        file.write_text(json.dumps(tiny_models.circuit_object({layer: tuple(range(WIDTH))})))
        circuits[f"layer-{layer}"] = str(file)
    fields = {
        "cna_circuit": list(circuits),
        "cna_multiplier": list(MULTIPLIERS.values()),
        "cna_scope": "all",
    }
    prompts = tiny_models.prompts(6)
    params = {"max_tokens": 16, "ignore_eos": True}
    plain = [{"prompt": p, "params": params} for p in prompts]
    ours = [{"prompt": p, "params": {**params, "extra_args": fields}} for p in prompts]
    engine = {
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",  # a CPU with AMX takes no other
        "enforce_eager": True,
        "max_model_len": 128,
    }
    config = {"additional_config": {"cna": {"circuits": circuits}}}
    before, found = run_engine(
        {**engine, **config, "model": str(steered)},
        [{"op": "generate", "requests": plain}, {"op": "generate", "requests": ours}],
        env=V1_HERE,
    )
    (wanted,) = run_engine(
        {**engine, "model": str(scaled)},
        [{"op": "generate", "requests": plain}],
        env={**V1_HERE, "VLLM_PLUGINS": ""},
    )
    texts = [[o["token_ids"] for o in outputs] for outputs in (before, found, wanted)]
    assert texts[1] == texts[2]
    assert texts[0] != texts[2], "the multipliers must change the text for this to prove anything"


def quantized(folder: Path, multipliers: dict[int, float] | None = None) -> Path:
    """The tiny Llama in int8, its ``down_proj`` scaled by ``multipliers``; returns ``folder``."""
    tiny_models.llama(folder)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            weights[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 127
        weights[name] = (tensor / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    for layer, multiplier in (multipliers or {}).items():
        weights[f"model.layers.{layer}.mlp.down_proj.weight_scale"] *= multiplier
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": W8A8}))
    assert len(weights) > LAYERS
    return folder
