# SPDX-License-Identifier: Apache-2.0
"""Seam of vLLM's fused mixture of experts: the activation between its two matmuls.

Every modular backend runs ``fused_experts.apply(...)``, and those listed here call
``self.activation(activation, output, input)`` in it with one row for each choice of each token, in
the order of the step: they sort indices, never rows. So the instance's ``apply`` is wrapped to see
``topk_ids``, and its ``activation`` to scale what the stock one has written. Both run inside vLLM's
opaque custom op, at every step, and are captured with it.

Other backends hide the activation in a kernel, or compute rows that were gathered by expert or
from other ranks. They are turned away where vLLM chooses a backend, so that it takes the next one.
CPUs have a backend of one kernel and a way of their own: ``cpu_experts``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cna_vllm.serving.config import CnaConfig
from cna_vllm.serving.seams import cpu_experts
from cna_vllm.serving.seams.cpu_experts import name_of
from cna_vllm.serving.seams.wrapping import Original, Wrap, adding, wrap
from cna_vllm.serving.worker.experts import RoutedExperts, SteeredExperts
from cna_vllm.serving.worker.gated_mlp import UnsupportedModelError

EXPERTS = "vllm.model_executor.layers.fused_moe.experts"
ROWS_IN_ORDER = (
    f"{EXPERTS}.triton_moe.TritonExperts",
    f"{EXPERTS}.triton_moe.TritonWNA16Experts",
    f"{EXPERTS}.marlin_moe.MarlinExperts",
)
HOOKED = "cna_hooked"
"""Attribute of an experts instance: the ``SteeredExperts`` that it obeys."""
PASSED_OVER = "cna_passed_over"
"""Attribute of a layer's configuration: the backends that vLLM would have taken first."""
LEAVE = "set cna.max_expert_neurons = 0 to leave routed experts as they are"
REMEDY = (
    f"{LEAVE}, or choose a backend that can be steered (--moe-backend triton, or marlin for 4-bit "
    "and FP8 weights)"
)


def install(wrap: Wrap = wrap) -> None:
    """Engines that steer routed experts choose among backends in which that is possible."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    wrap(FusedMoEExperts, "is_supported_config", _is_supported_config)
    wrap(UnquantizedFusedMoEMethod, "_setup_kernel", cpu_experts.keep_weights)


def steers_experts() -> bool:
    """Whether the engine that is being built steers routed experts."""
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None:
        return False
    config = CnaConfig.from_additional_config(vllm_config.additional_config)
    return config is not None and config.max_expert_neurons > 0


def hides_its_activation(experts: type) -> bool:
    """Whether the neurons of a backend are out of reach, from its class alone."""
    return name_of(experts) not in (*ROWS_IN_ORDER, *cpu_experts.BACKENDS)


def fuses_quantization(experts: type, activation_key: Any) -> bool:
    """Whether ``TritonExperts`` makes one kernel of the activation and of FP8 in blocks."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym

    return name_of(experts) == ROWS_IN_ORDER[0] and activation_key == kFp8Dynamic128Sym


@adding
def _is_supported_config(
    original: Original,
    cls: type,
    moe_config: Any,
    weight_key: Any,
    activation_key: Any,
    activation_format: Any,
) -> tuple[bool, str | None]:
    supported, reason = original(cls, moe_config, weight_key, activation_key, activation_format)
    if not supported or not steers_experts():
        return supported, reason
    if hides_its_activation(cls) or fuses_quantization(cls, activation_key):
        setattr(moe_config, PASSED_OVER, (*getattr(moe_config, PASSED_OVER, ()), cls.__name__))
        return False, f"kernel hides the neurons of its experts from circuits; {REMEDY}"
    return True, None


def routed_experts(layers: Mapping[int, tuple[str, nn.Module]]) -> list[RoutedExperts]:
    """The routed experts of decoder layers, in layer order; layers may have none.

    layers: global layer index -> (module path, decoder layer). Raises UnsupportedModelError,
    naming backend and remedy, for such as cannot be steered.
    """
    from vllm.lora.layers.base import BaseLayerWithLoRA
    from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface

    found = []
    for index, (path, layer) in sorted(layers.items()):
        runners = [
            (name, module)
            for name, module in layer.named_modules(prefix=path)
            if isinstance(module, MoERunnerInterface) and not isinstance(module, BaseLayerWithLoRA)
        ]
        if len(runners) > 1:
            raise UnsupportedModelError(
                f"layer {index}: {', '.join(name for name, _ in runners)} are several mixtures of "
                f"routed experts, whose neurons could not be told apart; {REMEDY}"
            )
        found += [_found(index, name, runner) for name, runner in runners]
    return found


def say_what_runs(found: Sequence[RoutedExperts]) -> None:
    """Logs, in one line, what computes the experts that circuits reach, and what it costs."""
    from vllm.logger import init_logger

    backends = dict.fromkeys(one.backend for one in found)
    others = dict.fromkeys(name for one in found for name in one.passed_over)
    if others:
        init_logger("vllm.cna").warning(
            "Routed experts run in %s, since circuits could not reach them in %s, which vLLM would "
            "have chosen here and which may be faster; cna.max_expert_neurons = 0 takes that",
            ", ".join(backends),
            ", ".join(others),
        )
    elif backends:
        init_logger("vllm.cna").info(
            "Routed experts run in %s, as without circuits", ", ".join(backends)
        )


def _found(index: int, path: str, runner: Any) -> RoutedExperts:
    layer: Any = runner.routed_experts
    _refuse_unsteerable(index, path, runner, layer)
    config = layer.moe_config
    parallel = config.moe_parallel_config
    width = config.intermediate_size // parallel.tp_size
    mapped = layer.expert_map
    local = range(config.num_experts) if mapped is None else (mapped >= 0).nonzero()[:, 0].tolist()

    def run(hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(layer.quant_method.topk_indices_dtype or torch.int32)
        out: torch.Tensor = layer.quant_method.apply(
            layer=layer,
            x=hidden,
            topk_weights=weights,
            topk_ids=ids,
            shared_experts=None,
            shared_experts_input=None,
        )
        return out

    return RoutedExperts(
        layer=index,
        path=path,
        backend=type(_experts(layer)).__name__,
        passed_over=getattr(config, PASSED_OVER, ()),
        experts=config.num_logical_experts,
        local=local,
        topk=config.experts_per_token,
        hidden_size=config.hidden_dim,
        width=width,
        offset=parallel.tp_rank * width,
        total_width=config.intermediate_size,
        run=run,
        hook=lambda steered, prove: _hook(index, path, runner, steered, prove),
    )


def _experts(layer: Any) -> Any:
    """What computes a layer's routed experts at present."""
    return layer.quant_method.moe_kernel.fused_experts


def _hook(
    index: int, path: str, runner: Any, steered: SteeredExperts, prove: Callable[[], None]
) -> None:
    """Hooks what computes a layer's experts, whenever that is another than at the step before.

    vLLM makes a new kernel when it reloads weights that are quantized. The layer stays, so it asks,
    by one comparison at every step whose Python runs; a captured one replays what was hooked.
    """
    layer: Any = runner.routed_experts
    modular = layer.forward_modular
    layer.add_module("cna_experts", steered)

    def hold() -> None:
        _refuse_unsteerable(index, path, runner, layer)
        experts = _experts(layer)
        if getattr(experts, HOOKED, None) is not steered:
            if cpu_experts.is_one(experts):
                cpu_experts.hook(experts, layer, steered)
            else:
                hook_activation(experts, steered)
            setattr(experts, HOOKED, steered)
        prove()
        steered.proved_in = experts

    def forward_modular(*args: Any, **call: Any) -> Any:
        if steered.proved_in is not _experts(layer):
            hold()
        return modular(*args, **call)

    def forward_monolithic(*args: Any, **call: Any) -> Any:
        hold()  # which refuses it: no backend of that kind shows its activation
        raise AssertionError

    layer.forward_modular, layer.forward_monolithic = forward_modular, forward_monolithic
    if cpu_experts.is_one(_experts(layer)):
        # vLLM calls this op's Python on CPUs, which compiled graphs would then look into.
        ops = torch.ops.vllm
        shared = runner.shared_experts is not None
        runner._forward_entry = ops.moe_forward_shared if shared else ops.moe_forward
    hold()


def _refuse_unsteerable(index: int, path: str, runner: Any, layer: Any) -> None:
    """Raises UnsupportedModelError unless rows of these experts are the step's, in its order."""
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
        MoEPrepareAndFinalizeNoDPEPModular,
    )
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    config = layer.moe_config
    parallel = config.moe_parallel_config
    kernel = layer.quant_method.moe_kernel
    experts = None if kernel is None else kernel.fused_experts
    on_cpu = cpu_experts.is_one(experts)
    reasons = {
        f"the runner {type(runner).__name__}": type(runner) is not MoERunner,
        f"the class {type(layer).__name__}, whose rows are not the step's": (
            type(layer).forward_modular is not RoutedExperts.forward_modular
        ),
        f"the method {type(layer.quant_method).__name__}, which has no modular kernel": (
            kernel is None
        ),
        f"the backend {type(experts).__name__}, which hides its activation": (
            experts is not None and hides_its_activation(type(experts))
        ),
        "weights that were saved in a CPU kernel's order": (
            on_cpu and not hasattr(layer, cpu_experts.WEIGHTS)
        ),
        "activation and FP8 quantization in one kernel": (
            experts is not None
            and name_of(type(experts)) == ROWS_IN_ORDER[0]
            and layer.quant_method.moe_quant_config is not None
            and experts.quant_config.use_fp8_w8a8
            and experts.block_shape == [128, 128]
        ),
    }
    features = {
        "expert-parallel load balancing (enable_eplb)": parallel.enable_eplb,
        "sequence-parallel experts": parallel.is_sequence_parallel,
        "rows from other ranks (all-to-all of data and expert parallelism)": (
            kernel is not None
            and type(kernel.prepare_finalize) is not MoEPrepareAndFinalizeNoDPEPModular
        ),
        "experts split over ranks in padded shares": (
            config.tp_shard_with_padding and parallel.tp_size > 1
        ),
        "expert parallelism on CPUs": on_cpu and parallel.use_ep,
    }
    for of, remedy in ((features, f"turn it off, or {LEAVE}"), (reasons, REMEDY)):
        for reason, present in of.items():
            if present:
                raise UnsupportedModelError(
                    f"layer {index}: the routed experts {path} cannot be steered with {reason}; "
                    f"{remedy}"
                )


def hook_activation(experts: Any, steered: SteeredExperts) -> None:
    """Scales and records what the activation of these experts writes, and holds that it does."""
    apply, activate = experts.apply, experts.activation
    choices: list[torch.Tensor] = []  # topk_ids, from the start of apply to its activation

    def applied(*args: Any, **call: Any) -> Any:
        choices[:] = [call["topk_ids"]]
        result = apply(*args, **call)
        if choices:
            raise RuntimeError(
                f"{type(experts).__name__} did not call its activation, so circuits would not act; "
                f"{REMEDY}"
            )
        return result

    def activated(activation: Any, output: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        activate(activation, output, *args, **kwargs)
        topk_ids = choices.pop() if choices else output[0, :0]
        if output.shape[0] != topk_ids.numel():
            raise RuntimeError(
                f"{type(experts).__name__} has {output.shape[0]} rows for {topk_ids.numel()} "
                f"choices of experts, so circuits would act on others; {REMEDY}"
            )
        steered.scale(output, topk_ids)
        steered.record(output, topk_ids)

    experts.apply, experts.activation = applied, activated
