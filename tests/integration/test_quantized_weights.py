# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose weights alone are quantized (GPTQ, AWQ, compressed-tensors W4A16), and FP8 with
a scale for each token, as stock vLLM runs them on a CPU.

Codes are chosen so that scaled columns are exact too: see ``tests.scaled_columns``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny_models
from tests.scaled_columns import PARTS, Parts, same_as_scaled_columns

pytestmark = pytest.mark.engine

Tensors = dict[str, torch.Tensor]
GROUP = 32


@dataclass(frozen=True)
class Scheme:
    """How a matrix of codes is stored.

    config: the checkpoint's. pack: of integers [out, in] from -7 to 7 and scales [out, groups].
    """

    config: Mapping[str, Any]
    pack: Callable[[torch.Tensor, torch.Tensor], Tensors]


def nibbles(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 [rows, columns / 8]: eight columns in one, in ``order`` from the lowest bits on."""
    eights = (codes.long() + 8).reshape(len(codes), -1, 8)[:, :, list(order)]
    packed = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def gptq(codes: torch.Tensor, scales: torch.Tensor) -> Tensors:
    groups, out = scales.shape[1], len(codes)
    return {
        "qweight": nibbles(codes).T.contiguous(),
        "scales": scales.T.half().contiguous(),
        "qzeros": torch.full((groups, out // 8), 0x77777777, dtype=torch.int32),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // GROUP,
    }


def awq(codes: torch.Tensor, scales: torch.Tensor) -> Tensors:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": nibbles(codes.T, order),
        "scales": scales.T.half().contiguous(),
        "qzeros": nibbles(torch.zeros(scales.shape[1], len(codes)), order),
    }


def pack_quantized(codes: torch.Tensor, scales: torch.Tensor) -> Tensors:
    return {
        "weight_packed": nibbles(codes),
        "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor(codes.shape),
    }


SCHEMES: Mapping[str, Scheme] = {
    "gptq": Scheme(
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
        gptq,
    ),
    "awq": Scheme(
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
        awq,
    ),
    "w4a16": Scheme(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": GROUP,
                    },
                }
            },
        },
        pack_quantized,
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_of_four_bits(name: str, tmp_path: Path) -> None:
    """Four circuits with multipliers of their own, in one request of scope ``all``."""
    same_as_scaled_columns(four_bits(SCHEMES[name]), PARTS, tmp_path)


# FP8 weights with a scale for each output channel, activations with one that each token row finds.
FP8_TOKEN = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def test_fp8_with_a_scale_for_each_token(tmp_path: Path) -> None:
    """Neurons change their sign only: one that is taken away may be what a row's scale was of."""
    same_as_scaled_columns(fp8, {-1.0: range(0, 50)}, tmp_path)


def fp8(folder: Path, parts: Parts) -> Path:
    """Saves the tiny Llama in FP8, columns of its ``down_proj`` scaled."""
    tiny_models.llama(folder)
    stored: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 448
        weights = tensor / scale
        for multiplier, neurons in parts.items():
            if "down_proj" in name:
                weights[:, neurons] *= multiplier
        stored[name] = weights.to(torch.float8_e4m3fn)
        stored[f"{name}_scale"] = scale
    return store(folder, stored, FP8_TOKEN)


def store(folder: Path, tensors: Tensors, quantization: Mapping[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = folder / "config.json"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps({**whole, "quantization_config": dict(quantization)}))
    return folder


def four_bits(scheme: Scheme) -> Callable[[Path, Parts], Path]:
    """Saves the tiny Llama in a scheme, columns of its ``down_proj`` scaled."""

    def save(folder: Path, parts: Parts) -> Path:
        tiny_models.llama(folder)
        stored: Tensors = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            if not name.endswith("_proj.weight"):
                stored[name] = tensor
                continue
            groups = tensor.reshape(len(tensor), -1, GROUP)
            scales = groups.abs().amax(-1) / 7
            codes = (groups / scales[:, :, None]).round().reshape(tensor.shape)
            if "down_proj" in name:
                for multiplier, neurons in PARTS.items():
                    if abs(multiplier) not in (0, 1):  # so that half and twice are codes too
                        codes[:, neurons] = 2 * codes[:, neurons].sign()
                for multiplier, neurons in parts.items():
                    codes[:, neurons] *= multiplier
            for suffix, packed in scheme.pack(codes, scales).items():
                stored[f"{name.removesuffix('weight')}{suffix}"] = packed
        return store(folder, stored, scheme.config)

    return save
