# SPDX-License-Identifier: Apache-2.0
"""Tiny random mixtures of experts, and Hugging Face forward passes with their experts hooked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tests.architectures import Architecture
from tests.oracles import Arm, HookedModel
from tests.tiny_models import LAYERS, WIDTH

DENSE = -1
"""The expert of a neuron of a dense or shared MLP."""

EXPERTS = 4
EXPERT_WIDTH = 48

Triple = tuple[int, int, int]
"""Layer, expert, index."""

_Rows = Callable[[torch.Tensor, torch.Tensor, int], None]
"""Gets the down projection's input of an expert, and the positions of its rows."""

YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
"""Rotation as in published models of DeepSeek: without it vLLM 0.32 and 0.33 rotate with an op of
CPUs that takes the heads of a query in three dimensions for more tokens."""

# The sizes of the latent cache are the only ones that this attention has kernels for on a CPU.
_MLA: Mapping[str, Any] = {
    "rope_parameters": YARN,
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 64,
    "v_head_dim": 16,
    "moe_intermediate_size": EXPERT_WIDTH,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}

MODELS: Mapping[str, Architecture] = {
    "mixtral": Architecture(
        "MixtralForCausalLM",
        "",
        MixtralConfig,
        {"head_dim": 32, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        "",
        Qwen3MoeConfig,
        {
            "head_dim": 32,
            "moe_intermediate_size": EXPERT_WIDTH,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    # A dense layer, of another size than the shared experts of the others.
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeMLP",
        Qwen2MoeConfig,
        {
            "intermediate_size": 160,
            "shared_expert_intermediate_size": WIDTH,
            "moe_intermediate_size": EXPERT_WIDTH,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
        },
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        "",
        GptOssConfig,
        {
            "head_dim": 32,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        },
    ),
    "deepseek_v2": Architecture(
        "DeepseekV2ForCausalLM",
        "DeepseekV2MLP",
        DeepseekV2Config,
        {**_MLA, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
    # The method of choice and the score are in published configurations only; without them vLLM
    # chooses otherwise than Transformers, which has no other.
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        "DeepseekV3MLP",
        DeepseekV3Config,
        {
            **_MLA,
            "n_routed_experts": 2 * EXPERTS,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "glm4_moe": Architecture(
        "Glm4MoeForCausalLM",
        "Glm4MoeMLP",
        Glm4MoeConfig,
        {
            "head_dim": 32,
            "moe_intermediate_size": EXPERT_WIDTH,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
}


def save(name: str, folder: Path) -> Path:
    """Saves a random model of ``MODELS``; returns ``folder``. Where the choice of experts has a
    bias, it is not zero."""
    MODELS[name].save(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for key, bias in tensors.items():
        if key.endswith("e_score_correction_bias"):
            bias += 0.1 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class ExpertArm(Arm):
    """An arm of circuits that are triples: ``routed`` has them, with their multipliers."""

    routed: tuple[tuple[frozenset[Triple], float], ...] = ()


def triples(model: ExpertModel, share: float, seed: int) -> frozenset[Triple]:
    """A random circuit of a share of all neurons, routed, shared and dense."""
    rng = random.Random(seed)
    every = [
        (layer, expert, index)
        for layer, widths in enumerate(model.widths())
        for expert, width in widths.items()
        for index in range(width)
    ]
    return frozenset(rng.sample(every, int(share * len(every))))


class ExpertModel(HookedModel):
    """A Hugging Face mixture of experts whose experts' down projections are hooked too."""

    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self.model.set_experts_implementation("eager")

    def widths(self) -> list[dict[int, int]]:
        """Of each layer, the neurons of each expert, and of its dense or shared MLP."""
        found = []
        for layer in self.model.model.layers:
            sizes = {}
            if (experts := _experts(layer)) is not None:
                width = _expert_weights(experts)[1].shape[2]
                sizes = dict.fromkeys(range(experts.num_experts), width)
            if (down := _dense_down(layer)) is not None:
                sizes[DENSE] = down.in_features
            found.append(sizes)
        return found

    def fields(self) -> dict[str, Any]:
        """What a circuit file says of the model's dimensions."""
        experts = [[w for e, w in layer.items() if e != DENSE] for layer in self.widths()]
        return {
            "num_layers": len(experts),
            "intermediate_size": [layer.get(DENSE, 0) for layer in self.widths()],
            "experts": {
                "count": [len(widths) for widths in experts],
                "intermediate_size": [widths[0] if widths else 0 for widths in experts],
            },
        }

    @contextmanager
    def steered(self, arm: Arm, prompt_len: int) -> Iterator[None]:
        assert isinstance(arm, ExpertArm)
        first = arm.first_position(prompt_len)
        with self._hooked(lambda layer: _scaling(arm.routed, layer, first)):
            yield

    @torch.inference_mode()
    def neurons(self, prompt: Sequence[int]) -> dict[tuple[int, int], torch.Tensor]:
        """(layer, expert) -> its down projection's input at the last token of ``prompt``, of those
        that the token ran through."""
        seen: dict[tuple[int, int], torch.Tensor] = {}

        def keeping(layer: int) -> _Rows:
            def keep(rows: torch.Tensor, positions: torch.Tensor, expert: int) -> None:
                for row in rows[positions == len(prompt) - 1]:
                    seen[layer, expert] = row.clone()

            return keep

        with self._hooked(keeping):
            self.model(torch.tensor([list(prompt)]))
        return seen

    @contextmanager
    def _hooked(self, hook_of: Callable[[int], _Rows]) -> Iterator[None]:
        """hook_of: a layer's hook, which gets the rows of one of its MLPs and may change them."""
        handles, hooked = [], []
        for index, layer in enumerate(self.model.model.layers):
            scale = hook_of(index)
            if (down := _dense_down(layer)) is not None:

                def dense(_m: object, args: Any, scale: Any = scale) -> tuple[torch.Tensor]:
                    rows = args[0].reshape(-1, args[0].shape[-1]).clone()
                    scale(rows, torch.arange(len(rows)), DENSE)
                    return (rows.view_as(args[0]),)

                handles.append(down.register_forward_pre_hook(dense))
            if (experts := _experts(layer)) is not None:
                hooked.append(experts)
                experts.forward = MethodType(_hooked_forward(scale), experts)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for experts in hooked:
                del experts.forward


def _scaling(circuits: Iterable[tuple[frozenset[Triple], float]], layer: int, first: int) -> _Rows:
    """Scales down projection inputs in place: those of an expert at given positions."""
    pairs = list(circuits)

    def scale(rows: torch.Tensor, positions: torch.Tensor, expert: int) -> None:
        for neurons, multiplier in pairs:
            channels = [i for at, e, i in neurons if (at, e) == (layer, expert)]
            if channels:
                factor = torch.ones(rows.shape[1])
                factor[channels] = multiplier
                rows[positions >= first] *= factor

    return scale


def _experts(layer: nn.Module) -> Any:
    """The module that owns the stacked weights of all experts of a layer, if it has any."""
    owners = [
        m for m in layer.modules() if isinstance(getattr(m, "gate_up_proj", None), nn.Parameter)
    ]
    return owners[0] if owners else None


def _dense_down(layer: nn.Module) -> Any:
    linears = [
        m
        for name, m in layer.named_modules()
        if name.endswith("down_proj") and isinstance(m, nn.Linear)
    ]
    return linears[0] if linears else None


def _expert_weights(experts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[experts, 2 * width, hidden] and [experts, hidden, width]."""
    up, down = experts.gate_up_proj, experts.down_proj
    return (up.mT, down.mT) if experts.is_transposed else (up, down)


def _hooked_forward(scale: _Rows) -> Any:
    """What the experts compute, one after the other, with ``scale`` before the down projection."""

    def forward(
        self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        ups, downs = _expert_weights(self)
        up_bias, down_bias = (getattr(self, f"{n}_proj_bias", None) for n in ("gate_up", "down"))
        out = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            position, choice = (index == expert).nonzero(as_tuple=True)
            gate_up = F.linear(hidden[position], ups[expert])
            if up_bias is not None:
                gate_up = gate_up + up_bias[expert]
            neurons = self._apply_gate(gate_up)
            scale(neurons, position, expert)
            result = F.linear(neurons, downs[expert])
            if down_bias is not None:
                result = result + down_bias[expert]
            out.index_add_(0, position, result * weights[position, choice, None])
        return out

    return forward
