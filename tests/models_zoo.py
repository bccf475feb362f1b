# SPDX-License-Identifier: Apache-2.0
"""A tiny random checkpoint of every architecture that transformers can build and that writes text.

One rule for all: the sizes that a configuration has are made small. ``CHANGES`` holds what some
families need beyond that, ``ALIASES`` the architectures that are another's under a second name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests import models_towers
from tests.expert_models import YARN
from tests.oracles import HookedModel
from tests.tiny_models import LAYERS, VOCABULARY, WIDTH

HIDDEN = 64
LARGEST = 50_000_000
"""Weights of a checkpoint; parts whose sizes have names of their own stay as they are."""

SMALL: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_kv_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "init_std": 0.25,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # MLPs under other names.
    "ffn_dim": WIDTH,
    "ffn_hidden_size": WIDTH,
    "n_inner": WIDTH,
    "word_embed_proj_dim": HIDDEN,
    # Mixtures of experts; shared experts that are counted are of another width than dense layers,
    # as in published models, and those that have a size of their own are of that size everywhere.
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": WIDTH,
    "shared_intermediate_size": WIDTH,
    "moe_shared_expert_intermediate_size": WIDTH,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "moe_num_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "zero_expert_num": 2,
    "num_nextn_predict_layers": 0,
    # Attention over low ranks.
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    # State-space and linear-attention layers.
    "mamba_d_ssm": 128,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 32,
    "mamba_head_dim": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_dt_rank": 8,
    "time_step_rank": 8,
    "ssm_state_size": 16,
    "state_size": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    # Embeddings of each layer.
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
}

# Attention over low ranks has a key head for each query head; its rotary part is its "head".
_LATENT: Mapping[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
# The sizes that attention over low ranks has kernels for on a CPU.
_MLA: Mapping[str, Any] = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "rope_parameters": YARN,
}
_TIED: Mapping[str, Any] = {"tie_word_embeddings": True}


def _mrope(*sections: int, **more: Any) -> Mapping[str, Any]:
    """Positions of three axes; half of a head is shared among them."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}
    return {"rope_parameters": rope}


_HALF: Mapping[str, Any] = {"partial_rotary_factor": 0.5}
_LFM2: Mapping[str, Any] = {
    "layer_types": ["conv", "full_attention"] * (LAYERS // 2),
    "block_dim": HIDDEN,
    "block_ff_dim": WIDTH,
    "block_auto_adjust_ff_dim": False,
    "conv_dim": HIDDEN,
}

CHANGES: Mapping[str, Mapping[str, Any]] = {
    "AXK1ForCausalLM": _LATENT,
    "AfmoeForCausalLM": {
        "score_func": "sigmoid",
        "route_norm": True,
        "n_group": 1,
        "topk_group": 1,
    },
    "BloomForCausalLM": _TIED,
    "CohereForCausalLM": _TIED,
    "Cohere2ForCausalLM": _TIED,
    "Cohere2VisionForConditionalGeneration": _TIED,
    "Cohere2MoeForCausalLM": {"num_shared_experts": 1, **_TIED},
    "DbrxForCausalLM": {
        "d_model": HIDDEN,
        "n_heads": 2,
        "n_layers": LAYERS,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "DeepseekV2ForCausalLM": _MLA,
    "DeepseekV3ForCausalLM": {**_MLA, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "DeepseekV32ForCausalLM": _LATENT,
    "FalconForCausalLM": {"head_dim": None, "ffn_hidden_size": 4 * HIDDEN, **_TIED},
    "Gemma2ForCausalLM": _TIED,
    "GemmaForCausalLM": _TIED,
    "Gemma3ForCausalLM": _TIED,
    "Gemma3nForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "num_kv_shared_layers": 0,
        **_TIED,
    },
    "Gemma4ForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "head_dim": 32,
        "global_head_dim": 32,
        "num_experts": None,
        **_TIED,
    },
    "Gemma3ForConditionalGeneration": _TIED,
    "Gemma4ForConditionalGeneration": {
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "head_dim": 32,
        "global_head_dim": 32,
        "num_experts": None,
        "vision_config": {"model_type": "gemma4_vision", **models_towers.TOWER},
        **_TIED,
    },
    "Glm4MoeForCausalLM": {"head_dim": 32},
    "Glm4MoeLiteForCausalLM": {**_MLA, "first_k_dense_replace": 1},
    "Glm4vForConditionalGeneration": _mrope(4, 6, 6),
    "Glm4vMoeForConditionalGeneration": {"head_dim": 32, **_mrope(2, 3, 3, **_HALF)},
    "GlmOcrForConditionalGeneration": _mrope(4, 6, 6),
    "GlmMoeDsaForCausalLM": _LATENT,
    "GPT2LMHeadModel": _TIED,
    "GPTBigCodeForCausalLM": _TIED,
    "GPTJForCausalLM": {"rotary_dim": 16},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"] * (LAYERS // 2)},
    "HrmTextForCausalLM": {"num_layers_per_stack": LAYERS // 2},
    "HYV3ForCausalLM": {"first_k_dense_replace": 1},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearForCausalLM": _LATENT,
    "Lfm2ForCausalLM": _LFM2,
    "Lfm2VlForConditionalGeneration": _LFM2,
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "Llama4ForCausalLM": {"num_experts_per_tok": 1},
    "Llama4ForConditionalGeneration": {"num_experts_per_tok": 1},
    "LongcatFlashForCausalLM": {**_LATENT, "num_layers": LAYERS},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 32, "n_groups": 1},
    "MiniCPM3ForCausalLM": _LATENT,
    "MiniMaxM2ForCausalLM": {"rotary_dim": 32, "scoring_func": "sigmoid"},
    "NemotronHForCausalLM": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]
    },
    "OPTForCausalLM": _TIED,
    "Cosmos3EdgeForConditionalGeneration": _mrope(6, 5, 5, mrope_interleaved=True),
    "PaddleOCRVLForConditionalGeneration": _mrope(4, 6, 6),
    "Qwen3_5ForCausalLM": {"head_dim": 256},  # so that a state has the size of few tokens' keys
    "Qwen2VLForConditionalGeneration": _mrope(4, 6, 6),
    "Qwen2_5_VLForConditionalGeneration": _mrope(4, 6, 6),
    "Qwen3VLForConditionalGeneration": _mrope(6, 5, 5, mrope_interleaved=True),
    "Qwen3VLMoeForConditionalGeneration": {
        "norm_topk_prob": True,  # as in published configurations
        **_mrope(6, 5, 5, mrope_interleaved=True),
    },
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"] * (LAYERS // 2)},
}

# Tied and scaled by the root of the hidden size: without it, the last token would outweigh what all
# layers add to it.
EMBEDDING_SCALES: Mapping[str, float] = {
    "GemmaForCausalLM": 0.1,
    "Gemma2ForCausalLM": 0.1,
    "Gemma3ForCausalLM": 0.1,
    "Gemma3ForConditionalGeneration": 0.1,
    "Gemma4ForConditionalGeneration": 0.1,
    "PaliGemmaForConditionalGeneration": 0.1,
    "Gemma3nForCausalLM": 0.1,
    "Gemma4ForCausalLM": 0.1,
}

ALIASES: Mapping[str, str] = {
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "ExaoneMoEForCausalLM": "ExaoneMoeForCausalLM",
    "MiMoV2ForCausalLM": "MiMoV2FlashForCausalLM",
}
"""Architectures that vLLM maps to the same class, and whose checkpoints have the same form."""

DOWN_PROJECTIONS = frozenset(
    ("down_proj", "fc2", "dense_4h_to_h", "c_proj", "fc_out", "w2", "output_linear")
)
"""Names, in transformers, of the linears that neurons are the input of."""


class NotBuildable(Exception):
    """No tiny checkpoint of this architecture can be made here; the message is one line."""


def architectures() -> list[str]:
    """Architectures of the installed vLLM that write text, those with towers and those of its
    Transformers backend included."""
    from vllm.model_executor.models import registry

    backend = [
        name
        for name, (_, model) in registry._TRANSFORMERS_SUPPORTED_MODELS.items()
        if "MultiModal" not in model
    ]
    return sorted({*registry._TEXT_GENERATION_MODELS, *registry._MULTIMODAL_MODELS, *backend})


def has_towers(architecture: str) -> bool:
    from vllm.model_executor.models import registry

    return architecture in registry._MULTIMODAL_MODELS


def build(architecture: str, folder: Path) -> Path:
    """Saves a random model whose greedy text depends on every layer; returns ``folder``.

    Raises NotBuildable.
    """
    source = ALIASES.get(architecture, architecture)
    found = models_towers.find(source)
    if found is None:
        kind = " that takes text alone" if has_towers(architecture) else ""
        raise NotBuildable(f"transformers has no model of this name{kind}")
    configuration, auto = found
    try:
        config = models_towers.sized(configuration, SMALL, CHANGES.get(source, {}))
        with torch.device("meta"):
            size = auto.from_config(config, dtype=torch.float32).num_parameters()
        if size > LARGEST:
            raise ValueError(f"the smallest that is made here has {size // 10**6} million weights")
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which start as all ones or all zeros
                parameter.data += 0.2 * torch.randn(parameter.shape)
        model.get_input_embeddings().weight.data *= EMBEDDING_SCALES.get(source, 1.0)
        if has_towers(architecture):
            model(input_ids=torch.tensor([[5, 6]]))  # some take no text without an image
        model.save_pretrained(folder)
    except Exception as error:  # whatever transformers cannot do is the result
        raise NotBuildable(f"transformers: {one_line(error)}") from error
    file = folder / "config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "architectures": [architecture]}))
    return folder


def architecture_of(folder: Path) -> str:
    """Of what ``build`` saved."""
    name: str = json.loads((folder / "config.json").read_text())["architectures"][0]
    return name


def one_line(error: BaseException) -> str:
    """A message as one line, with its type."""
    text, _, _ = " ".join(str(error).split()).partition(" [type=")
    return f"{type(error).__name__}: {text}"[:200]


class AnyHookedModel(HookedModel):
    """``HookedModel`` of an architecture that is not known beforehand."""

    def __init__(self, path: str | Path) -> None:
        architecture = architecture_of(Path(path))
        found = models_towers.find(ALIASES.get(architecture, architecture))
        assert found is not None, "it was built"
        super().__init__(path, found[1])
        self.model.config.use_cache = False  # some need to know of which kind their first layer is

    def layers(self) -> Sequence[nn.Module]:
        text = self.model.config.get_text_config()
        stacks = [
            module
            for module in self.model.modules()
            if isinstance(module, nn.ModuleList) and len(module) == text.num_hidden_layers
        ]
        return list(stacks[0]) if stacks else []

    def down_projections(self) -> dict[int, nn.Module]:
        found = {}
        for index, layer in enumerate(self.layers()):
            downs = [m for name, m in layer.named_modules() if _is_down_projection(name)]
            if len(downs) == 1:
                found[index] = downs[0]
        return found


def _is_down_projection(name: str) -> bool:
    *owners, last = name.split(".")
    routed = "experts" in owners
    return last in DOWN_PROJECTIONS and not routed and not any("attn" in o for o in owners)


def width_of(linear: nn.Module) -> int:
    """Inputs of a linear, or of GPT-2's Conv1D."""
    weight: Any = linear.weight
    return int(weight.shape[0] if type(linear).__name__ == "Conv1D" else weight.shape[1])
