# SPDX-License-Identifier: Apache-2.0
"""How many neurons each layer has: what is read from a configuration, against the modules that
Transformers builds of it, and against what only vLLM's model files say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cna_vllm import Circuit
from cna_vllm.checkpoints.models import ModelError, model_dimensions
from cna_vllm.checkpoints.shapes import model_shape
from cna_vllm.serving.seams.model import served_model
from cna_vllm.serving.worker.gated_mlp import UnsupportedModelError
from cna_vllm.steering.shape import Shape
from tests import models_towers
from tests.models_zoo import CHANGES, DOWN_PROJECTIONS, HIDDEN, SMALL, width_of

# Architectures as the zoo builds them, and with what it leaves at one value changed.
CASES: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "AfmoeForCausalLM": ({}, {"num_dense_layers": 3, "num_shared_experts": 0}),
    "BloomForCausalLM": ({},),
    "Cohere2MoeForCausalLM": (
        {},
        {"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}
        | {"prefix_dense_intermediate_size": 160, "num_shared_experts": 2},
    ),
    "DeepseekV2ForCausalLM": ({}, {"first_k_dense_replace": 2}, {"n_shared_experts": 1}),
    "DeepseekV3ForCausalLM": ({}, {"first_k_dense_replace": 1}),
    "Ernie4_5_MoeForCausalLM": (
        {},
        {"moe_layer_start_index": 1, "moe_layer_end_index": 2},
        {"moe_layer_interval": 2, "moe_num_shared_experts": 0},
    ),
    "ExaoneMoeForCausalLM": ({}, {"mlp_layer_types": ["sparse", "dense", "dense", "sparse"]}),
    "FalconForCausalLM": ({},),
    "FalconH1ForCausalLM": ({},),
    "FalconMambaForCausalLM": ({},),
    "FlexOlmoForCausalLM": ({},),
    "GPT2LMHeadModel": ({}, {"n_inner": None}),
    "GPTNeoXForCausalLM": ({},),
    "Gemma3ForCausalLM": ({},),
    "Gemma3nForCausalLM": ({}, {"intermediate_size": [96, 160, 96, 64]}),
    "Gemma4ForCausalLM": (
        {},
        {"use_double_wide_mlp": True, "num_kv_shared_layers": 2},
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
    ),
    "Glm4MoeForCausalLM": ({}, {"first_k_dense_replace": 3}),
    "Glm4MoeLiteForCausalLM": ({},),
    "GptOssForCausalLM": ({},),
    "GraniteMoeForCausalLM": ({},),
    "GraniteMoeHybridForCausalLM": (
        {"shared_intermediate_size": 64},
        {"num_local_experts": 0, "shared_intermediate_size": 64},
    ),
    "HYV3ForCausalLM": ({},),
    "HunYuanMoEV1ForCausalLM": ({},),
    "JambaForCausalLM": ({}, {"expert_layer_period": 3, "expert_layer_offset": 2}),
    "KimiLinearForCausalLM": ({},),
    "LagunaForCausalLM": ({}, {"shared_expert_intermediate_size": 64}),
    "Lfm2ForCausalLM": (
        {},
        {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.3}
        | {"block_multiple_of": 16, "intermediate_size": 200},
    ),
    "Lfm2MoeForCausalLM": ({}, {"num_dense_layers": 1}),
    "Llama4ForCausalLM": (
        {"intermediate_size_mlp": 160},
        {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 160},
    ),
    "MellumForCausalLM": ({}, {"mlp_layer_types": ["sparse", "dense", "sparse", "dense"]}),
    "MiMoV2FlashForCausalLM": ({},),
    "MiniMaxM2ForCausalLM": ({},),
    "MixtralForCausalLM": ({},),
    "NemotronHForCausalLM": (
        {},
        {"layers_block_type": ["moe", "mlp", "full_attention", "moe"]}
        | {"moe_shared_expert_intermediate_size": 80, "n_shared_experts": 1},
    ),
    "OPTForCausalLM": ({},),
    "OlmoeForCausalLM": ({},),
    "PhiForCausalLM": ({},),
    "Qwen2MoeForCausalLM": (
        {},
        {"decoder_sparse_step": 2, "shared_expert_intermediate_size": 64},
        {"mlp_only_layers": [0, 3], "intermediate_size": 160},
    ),
    "Qwen3MoeForCausalLM": ({}, {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "Qwen3NextForCausalLM": ({}, {"mlp_only_layers": [1]}),
    "Qwen3_5MoeForCausalLM": ({"shared_expert_intermediate_size": 64},),
    "Starcoder2ForCausalLM": ({},),
    # The text models of these, beside their towers.
    "Gemma3ForConditionalGeneration": ({},),
    "Glm4vMoeForConditionalGeneration": ({},),
    "Llama4ForConditionalGeneration": (
        {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 160},
    ),
    "Qwen3VLMoeForConditionalGeneration": ({}, {"mlp_only_layers": [1]}),
    "Qwen3_5MoeForConditionalGeneration": ({},),
}


@pytest.mark.parametrize(
    ("architecture", "changes"), [(name, one) for name, cases in CASES.items() for one in cases]
)
def test_is_what_transformers_builds(architecture: str, changes: Mapping[str, Any]) -> None:
    config, auto = small(architecture, changes)
    with torch.device("meta"):
        model = auto.from_config(config)
    text = config.get_text_config()
    assert model_shape(text, text.num_hidden_layers) == built(model, text.num_hidden_layers)


def small(architecture: str, changes: Mapping[str, Any]) -> tuple[Any, Any]:
    """The zoo's configuration, with fields of the text model changed, and the model's class."""
    found = models_towers.find(architecture)
    assert found is not None
    return models_towers.sized(
        found[0], SMALL, {**CHANGES.get(architecture, {}), **changes}
    ), found[1]


def built(model: nn.Module, num_layers: int) -> Shape:
    """Inputs of the down projections that a model has in each layer."""
    (stack,) = (
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    )
    widths, counts, expert_widths = [0] * num_layers, [0] * num_layers, [0] * num_layers
    for index, layer in enumerate(stack):
        for name, module in layer.named_modules():
            *owners, last = name.split(".")
            if last == "experts" and hasattr(module, "down_proj"):
                assert counts[index] == 0
                counts[index] = len(module.down_proj)
                (expert_widths[index],) = {*module.down_proj.shape[1:]} - {HIDDEN}
            elif last in DOWN_PROJECTIONS and not any("attn" in owner for owner in owners):
                assert widths[index] == 0
                widths[index] = width_of(module)
    return Shape(tuple(widths), tuple(counts), tuple(expert_widths))


# Fields that Transformers has no tiny model of; each as the model file of vLLM reads it.
MOE = {"intermediate_size": 9, "moe_intermediate_size": 5, "num_experts": 4}
FIELDS: list[tuple[dict[str, Any], tuple[tuple[int, ...], ...] | None]] = [
    ({"intermediate_size": 7}, ((7,) * 4, (0,) * 4, (0,) * 4)),
    ({"ffn_dim": 9}, ((9,) * 4, (0,) * 4, (0,) * 4)),
    ({"ffn_hidden_size": 9, "hidden_size": 2, "model_type": "falcon"}, ((9,) * 4,)),
    ({"n_inner": None, "hidden_size": 2, "model_type": "gpt_bigcode"}, ((8,) * 4,)),
    # Of dense models a field of experts says nothing.
    ({"intermediate_size": 7, "moe_intermediate_size": 5, "num_experts": 0}, ((7,) * 4,)),
    # Bailing, Sarvam: shared experts of a width of their own.
    (
        {**MOE, "num_shared_experts": 2, "moe_shared_expert_intermediate_size": 6}
        | {"first_k_dense_replace": 1},
        ((9, 12, 12, 12), (0, 4, 4, 4), (0, 5, 5, 5)),
    ),
    # DeepSeek, Sarvam, MiMo V2: every n-th layer, or a list.
    (
        {**MOE, "first_k_dense_replace": 1, "moe_layer_freq": 2, "n_shared_experts": 1},
        ((9, 9, 5, 9), (0, 0, 4, 0), (0, 0, 5, 0)),
    ),
    ({**MOE, "moe_layer_freq": [0, 1, 0, 1]}, ((9, 0, 9, 0), (0, 4, 0, 4), (0, 5, 0, 5))),
    # Step 3: listed layers, else all but the first.
    (
        {**MOE, "share_expert_dim": 6, "moe_layers_enum": "1,3"},
        ((9, 6, 9, 6), (0, 4, 0, 4), (0, 5, 0, 5)),
    ),
    ({**MOE, "share_expert_dim": 6}, ((9, 6, 6, 6), (0, 4, 4, 4), (0, 5, 5, 5))),
    # Nemotron-H: widths of the layers that are an MLP.
    (
        {"hybrid_override_pattern": "M-*-", "intermediate_size": [7, 9]},
        ((0, 7, 0, 9), (0,) * 4, (0,) * 4),
    ),
    ({"hybrid_override_pattern": "-M*-", "intermediate_size": [7]}, ((7, 0, 0, 7),)),
    # DBRX.
    (
        {"ffn_config": SimpleNamespace(moe_num_experts=4, ffn_hidden_size=5)},
        ((0,) * 4, (4,) * 4, (5,) * 4),
    ),
    # Not known.
    ({}, None),
    ({"intermediate_size": [7, 7]}, None),
    ({"intermediate_size": "7"}, None),
    ({"intermediate_size": -7}, None),
    ({**MOE, "mlp_layer_types": ["dense"]}, None),
    ({"intermediate_size": 7, "block_configs": [{}]}, None),
    ({**MOE, "zero_expert_num": 2}, None),
    ({"hidden_size": 2, "model_type": "something"}, None),
]


@pytest.mark.parametrize(("fields", "shape"), FIELDS)
def test_is_what_fields_say(
    fields: dict[str, Any], shape: tuple[tuple[int, ...], ...] | None
) -> None:
    found = model_shape(SimpleNamespace(**fields), 4)
    if shape is None:
        assert found is None
    else:
        assert found == Shape(*shape, *[(0,) * 4] * (3 - len(shape)))


def test_models_without_known_neurons_are_refused_by_name(tmp_path: Path) -> None:
    for fields, why in (
        ({"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}, "has no MLP"),
        (
            {"model_type": "longcat_flash", "architectures": ["LongcatFlashForCausalLM"]},
            "how many neurons",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ModelError, match=why):
            model_dimensions(str(tmp_path))
    config = SimpleNamespace(
        model="some/model",
        hf_text_config=SimpleNamespace(),
        get_total_num_hidden_layers=lambda: 4,
    )
    with pytest.raises(UnsupportedModelError, match="some/model: its configuration does not say"):
        served_model(config)


def test_a_file_without_a_model_is_read_as_the_models(tmp_path: Path) -> None:
    config, _ = small("Glm4MoeForCausalLM", {})
    config.architectures = ["Glm4MoeForCausalLM"]
    config.save_pretrained(tmp_path)
    dimensions = model_dimensions(str(tmp_path))
    assert dimensions["intermediate_size"] == [96, 64, 64, 64]
    assert dimensions["experts"] == {"count": [0, 4, 4, 4], "intermediate_size": 32}
    file = tmp_path / "plain.json"
    file.write_text('{"0": [95], "1": {"shared": [63], "3": [31]}}')
    made = Circuit.load(file, **dimensions)
    assert made.shape == Shape((96, 64, 64, 64), (0, 4, 4, 4), (0, 32, 32, 32))
    file.write_text('{"1": {"3": [32]}}')
    with pytest.raises(ValueError, match=r"'neurons'\[0\]: 'index' must be"):
        Circuit.load(file, **dimensions)
