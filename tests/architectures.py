# SPDX-License-Identifier: Apache-2.0
"""A tiny random checkpoint of every architecture that the page of limits names as covered.

Sizes are those of ``tests.tiny_models``; what makes an architecture different (soft caps, sliding
windows, multipliers, layers without positions, tied embeddings) is set so that it matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    SmolLM3Config,
)

from tests.tiny_models import LAYERS, VOCABULARY, WIDTH

COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Shorter than the longest test prompt, so that the window cuts.
WINDOW = 24


@dataclass(frozen=True)
class Architecture:
    """One architecture that cna_vllm/serving/limits.md names.

    model_class: of Hugging Face, the name in a circuit file; vllm_mlp: the class of vLLM's, or
    in vLLM's Transformers backend of Hugging Face's, module that owns the neurons; activation:
    of the kernel that must stand there; embedding_scale: applied to the random embedding, where
    without it the last token would outweigh what all layers add to it; routed_experts: path of
    those of a layer, which no circuit reaches.
    """

    model_class: str
    vllm_mlp: str
    config: type[PretrainedConfig]
    changes: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "silu"
    embedding_scale: float = 1.0
    routed_experts: str = ""

    def save(self, folder: Path, **overrides: Any) -> Path:
        """Saves a random model whose greedy text depends on every layer; returns ``folder``."""
        torch.manual_seed(0)
        config = self.config(**{**COMMON, **self.changes, **overrides})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which start as all ones or all zeros
                parameter.data += 0.2 * torch.randn(parameter.shape)
        model.get_input_embeddings().weight.data *= self.embedding_scale
        model.save_pretrained(folder)
        return folder


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "LlamaMLP", LlamaConfig, {"head_dim": 32}),
    "qwen2": Architecture(
        "Qwen2ForCausalLM", "Qwen2MLP", Qwen2Config, {"tie_word_embeddings": True}
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        "Qwen2MLP",
        Qwen3Config,
        {"head_dim": 32, "tie_word_embeddings": True},
    ),
    "mistral": Architecture(
        "MistralForCausalLM",
        "LlamaMLP",
        MistralConfig,
        {"head_dim": 32, "sliding_window": WINDOW},
    ),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        "Gemma2MLP",
        Gemma2Config,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 5.0,
            "tie_word_embeddings": True,
        },
        activation="gelu_tanh",
        embedding_scale=0.1,
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3MLP",
        Gemma3TextConfig,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
            "tie_word_embeddings": True,
        },
        activation="gelu_tanh",
        embedding_scale=0.1,
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        "LlamaMLP",
        Phi3Config,
        {"original_max_position_embeddings": 512},
    ),
    "olmo2": Architecture("Olmo2ForCausalLM", "Olmo2MLP", Olmo2Config),
    "granite": Architecture(
        "GraniteForCausalLM",
        "GraniteMLP",
        GraniteConfig,
        {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.5,
        },
    ),
    "smollm3": Architecture(
        "SmolLM3ForCausalLM",
        "SmolLM3MLP",
        SmolLM3Config,
        {"no_rope_layer_interval": 2, "tie_word_embeddings": True},
    ),
    # Its neurons are those of the shared expert, which exists beside the routed ones in every
    # layer and is of another size than the dense MLPs that this model does not use.
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeMLP",
        Qwen2MoeConfig,
        {
            "intermediate_size": 160,
            "shared_expert_intermediate_size": WIDTH,
            "moe_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        routed_experts="model.layers.{}.mlp.experts",
    ),
}
