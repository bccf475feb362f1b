# SPDX-License-Identifier: Apache-2.0
"""Seam of a loaded model: from it to a rank's steering runtime."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cna_vllm.serving.config import CnaConfig, CnaConfigError
from cna_vllm.serving.seams.experts import routed_experts, say_what_runs
from cna_vllm.serving.seams.model import decoder_layers, gated_mlps, served_model
from cna_vllm.serving.seams.quantization import say_what_is_unfused, share_producers
from cna_vllm.serving.worker.outputs import refuse_bare
from cna_vllm.serving.worker.runtime import SteeringRuntime
from cna_vllm.serving.worker.structure import check_structure
from cna_vllm.steering.vectors import RESIDUAL_ARCHITECTURES


def attach(vllm_config: Any, model: nn.Module, device: torch.device) -> SteeringRuntime:
    """Hooks a loaded target model. What is configured is pushed to it: see ``engines``."""
    config = CnaConfig.from_additional_config(vllm_config.additional_config)
    if config is None:
        raise CnaConfigError("the engine was not configured to steer")
    if config.record and vllm_config.parallel_config.data_parallel_size > 1:
        raise CnaConfigError(
            "cna.record does not work with data parallelism, whose dummy steps would be recorded; "
            "discover on one replica"
        )
    scheduler = vllm_config.scheduler_config
    model_config = vllm_config.model_config
    served = served_model(model_config)
    layers = decoder_layers(model, served)
    experts = routed_experts(layers) if config.max_expert_neurons else None
    mlps = gated_mlps(layers, served, steers_experts=experts is not None)
    paths = {index: path for index, (path, _) in layers.items()}
    check_structure(paths, mlps, experts, served.shape)
    if config.max_vectors:
        refuse_bare(paths, mlps)
    if any(mlp.fuses_quantization for mlp in mlps):
        share_producers()
    runtime = SteeringRuntime(
        mlps,
        config,
        hidden_size=model_config.get_hidden_size(),
        dtype=model_config.dtype,
        device=device,
        max_num_reqs=scheduler.max_num_seqs,
        max_num_tokens=scheduler.max_num_batched_tokens,
        experts=experts or (),
        record_stream=served.architecture in RESIDUAL_ARCHITECTURES,
    )
    say_what_runs(experts or ())
    if runtime.unfused:
        say_what_is_unfused(runtime.fusible, runtime.unfused)
    return runtime
