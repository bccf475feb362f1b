# SPDX-License-Identifier: Apache-2.0
"""Seam of vLLM's configuration and model classes: what is served, and where its neurons are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from cna_vllm.checkpoints.shapes import NO_NEURONS, NO_SHAPE, model_shape
from cna_vllm.serving.front.registry import ServedModel
from cna_vllm.serving.seams.quantization import fuses_quantization
from cna_vllm.serving.worker.gated_mlp import (
    GatedMlp,
    LayerVocabulary,
    UnsupportedModelError,
    find_gated_mlps,
)

PLAIN_ACTIVATIONS = (
    "torch.nn.modules.activation",
    "transformers.activations",
    "vllm.model_executor.layers.activation",
)
"""Where the modules are that activations without a gate are of."""


def served_model(model_config: Any) -> ServedModel:
    """What circuits and vectors must fit, from vLLM's model configuration; ``gated_mlps`` holds
    the model to that.

    The name is the one that clients know: messages and lists show it to them, and the model's own
    may be a path.
    """
    layers = model_config.get_total_num_hidden_layers()
    shape = model_shape(model_config.hf_text_config, layers)
    if shape is None or not shape.size:
        raise UnsupportedModelError(
            f"{model_config.model}: its configuration {NO_SHAPE if shape is None else NO_NEURONS}"
        )
    return ServedModel(
        model=model_config.served_model_name,
        architecture=model_config.architectures[0],
        shape=shape,
        hidden_size=model_config.get_hidden_size(),
    )


def decoder_layers(model: nn.Module, served: ServedModel) -> dict[int, tuple[str, nn.Module]]:
    """Global layer index -> (module path, layer), of the layers that this pipeline stage owns.

    Raises UnsupportedModelError unless the model has one list of as many as ``served`` says; lists
    of the same layers are one.
    """
    from vllm.model_executor.models.utils import PPMissingLayer

    text_model: nn.Module = model
    if hasattr(model, "get_language_model"):
        language_model: Any = model.get_language_model
        text_model = language_model()
    stacks = [
        (name, module)
        for name, module in text_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == served.num_layers
    ]
    if len({tuple(map(id, stack)) for _, stack in stacks}) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one list of {served.num_layers} decoder layers, "
            f"found {[name for name, _ in stacks] or 'none'}; this architecture is not supported"
        )
    prefix, stack = min(stacks, key=lambda named: len(named[0]))
    return {
        index: (f"{prefix}.{index}", layer)
        for index, layer in enumerate(stack)
        if not isinstance(layer, PPMissingLayer)
    }


def gated_mlps(
    layers: Mapping[int, tuple[str, nn.Module]], served: ServedModel, steers_experts: bool
) -> list[GatedMlp]:
    """The MLPs of ``decoder_layers`` that are dense or shared.

    Raises UnsupportedModelError when a layer has more than one.
    """
    from vllm.logger import init_logger
    from vllm.lora.layers.base import BaseLayerWithLoRA
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
    from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear

    def activation(module: nn.Module) -> str | None:
        if type(module) is SiluAndMul:
            return "silu"
        if type(module) is GeluAndMul:
            return "gelu_tanh" if module.approximate == "tanh" else "gelu"
        return None

    def unknown_activation(module: nn.Module) -> bool:
        name = type(module).__name__
        return activation(module) is None and ("AndMul" in name or "FatRelu" in name)

    def down_projection(module: nn.Module) -> bool:
        # A linear that splits its input itself, or is replicated (a Transformers model without a
        # plan for ranks), is given all neurons on every rank, which only a single rank can record.
        if isinstance(module, RowParallelLinear):
            return module.input_is_parallel or module.tp_size == 1
        return (
            isinstance(module, ReplicatedLinear)
            and module.tp_size == 1
            and module.input_size in served.shape.widths
            and module.input_size != module.output_size
            and module.output_size == served.hidden_size
        )

    def without_adapter(module: nn.Module) -> nn.Module:
        layer: Any = module
        return layer.base_layer if isinstance(module, BaseLayerWithLoRA) else module

    found = find_gated_mlps(
        layers,
        LayerVocabulary(
            activation=activation,
            unknown_activation=unknown_activation,
            down_projection=down_projection,
            without_adapter=without_adapter,
            routed_experts=lambda module: isinstance(module, MoERunnerInterface),
            fuses_quantization=fuses_quantization,
            plain_activation=plain_activation,
        ),
    )
    routed = [path for mlp in found for path in mlp.routed_experts]
    if routed and not steers_experts:
        init_logger("vllm.cna").warning(
            "The routed experts of this model are neither steered nor recorded: %s",
            ", ".join(routed),
        )
    return found


def plain_activation(module: nn.Module) -> str | None:
    """Name of an activation that has no gate (GELU, ReLU, SiLU and their kin), or None."""
    name = type(module).__name__
    known = type(module).__module__ in PLAIN_ACTIVATIONS and "AndMul" not in name
    return name if known and re.search("elu|silu", name.lower()) else None


def refuse_unsupported(vllm_config: Any) -> None:
    """Raises UnsupportedModelError for engine features under which rows could not be routed."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    speculative = vllm_config.speculative_config
    reasons = {
        "micro-batching (enable_dbo, ubatch_size)": parallel.use_ubatching,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        # Each rank's shared experts then see a share of the step's rows.
        "sequence-parallel experts (expert, tensor and data parallelism together)": (
            parallel.use_sequence_parallel_moe
        ),
        "kv_sharing_fast_prefill": cache.kv_sharing_fast_prefill,
        "adaptive verification of drafts": speculative is not None
        and speculative.enable_adaptive_verification,
        "a KV connector, whose keys may not tell steered blocks apart (kv_transfer_config)": (
            vllm_config.kv_transfer_config is not None
        ),
        "diffusion language models": vllm_config.model_config.is_diffusion,
        "encoder-decoder models": vllm_config.model_config.is_encoder_decoder,
        "pooling models": vllm_config.model_config.runner_type == "pooling",
    }
    for reason, present in reasons.items():
        if present:
            raise UnsupportedModelError(
                f"steering does not work with {reason}; turn it off or remove the cna key"
            )
