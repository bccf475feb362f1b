# SPDX-License-Identifier: Apache-2.0
"""Activation and quantization as one kernel: vLLM's ways to that stay open for steered layers.

vLLM fuses the two by the class of the activation (``maybe_fused_act_quant``: Llama's MLP, and those
that share it), by patterns over compiled graphs, or lets its compiler do it. ``SteeredGateUp`` runs
vLLM's own activation, so the last two see what they always see; for the first it gets rows of its
own in the table of producers, each of which steers and then is vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from cna_vllm.serving.worker.activation import SteeredGateUp


def fuses_quantization(linear: nn.Module) -> bool:
    """Whether vLLM may fuse the activation before a linear with what quantizes its input.

    True for linears that take their input quantized, and for those that quantize it to FP8 or
    NVFP4 themselves, which compiled graphs are searched for. Marlin's take it as it is.
    """
    from vllm.model_executor.kernels.linear import NvFp4LinearKernel
    from vllm.model_executor.layers.fusion.quant_activation import get_input_quant_key
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8

    if get_input_quant_key(linear) is not None:
        return True
    holders = (getattr(linear, "quant_method", None), getattr(linear, "scheme", None))
    kernels = [held for holder in holders for held in getattr(holder, "__dict__", {}).values()]
    return any(
        isinstance(kernel, NvFp4LinearKernel)
        or isinstance(getattr(kernel, "quant_fp8", None), QuantFP8)
        for kernel in kernels
        if "marlin" not in type(kernel).__module__
    )


def share_producers() -> None:
    """What is fused with SiluAndMul by class is from now on fused with ``SteeredGateUp`` too."""
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fusion import fused_act_quant

    for (activation, key), producer in list(fused_act_quant._FUSED_ACT_QUANT.items()):
        if activation is not SiluAndMul:
            continue
        fused_act_quant._FUSED_ACT_QUANT[SteeredGateUp, key] = _steered(producer)
        if (activation, key) in fused_act_quant._FUSED_ACT_QUANT_SUPPORT:
            fused_act_quant._FUSED_ACT_QUANT_SUPPORT[SteeredGateUp, key] = (
                fused_act_quant._FUSED_ACT_QUANT_SUPPORT[activation, key]
            )


def _steered(producer: Callable[[torch.Tensor, Any], Any]) -> Callable[[torch.Tensor, Any], Any]:
    def steer_and_produce(x: torch.Tensor, linear: Any) -> Any:
        return producer(linear.cna_steer(x), linear)

    return steer_and_produce


def say_what_is_unfused(layers: Sequence[str], reason: str) -> None:
    """One line at start about layers whose activation and quantization are two kernels."""
    from vllm.logger import init_logger

    init_logger("vllm.cna").warning(
        "Activation and quantization are two kernels in %d layers (%s, ...), since %s; vLLM alone "
        "may fuse them there",
        len(layers),
        layers[0],
        reason,
    )
