# SPDX-License-Identifier: Apache-2.0
"""Contracts of the seams of routed experts, and Triton's experts themselves, hooked."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cna_vllm.serving.seams import cpu_experts, experts
from cna_vllm.serving.seams.experts import ROWS_IN_ORDER, hides_its_activation, hook_activation
from tests.integration import triton_experts
from tests.kernels.interpreted import run_interpreted


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def named(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_a_backend_is_chosen_by_asking_its_class() -> None:
    """Each oracle asks ``is_supported_config``, which asks the base class's."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int_wna16, mxfp4, unquantized

    own = inspect.getattr_static(FusedMoEExperts, "is_supported_config")
    assert isinstance(own, staticmethod)
    assert parameters(FusedMoEExperts.is_supported_config) == [
        "cls",
        "moe_config",
        "weight_key",
        "activation_key",
        "activation_format",
    ]
    for oracle in (fp8, int_wna16, mxfp4, unquantized):
        assert ".is_supported_config(" in inspect.getsource(oracle)
    for backend in (*ROWS_IN_ORDER, *cpu_experts.BACKENDS):
        asked = named(backend).is_supported_config
        if asked is not FusedMoEExperts.is_supported_config:
            assert "mk.FusedMoEExperts.is_supported_config(" in inspect.getsource(asked)


def test_experts_are_called_as_their_wrappers_expect() -> None:
    """By keyword, once for all rows, on the instance."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernelModularImpl
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    source = inspect.getsource(FusedMoEKernelModularImpl._fused_experts)
    assert source.count("self.fused_experts.apply(\n            output=") == 1
    for name in ("hidden_states", "topk_weights", "topk_ids", "apply_router_weight_on_input"):
        assert f"            {name}={name}" in source or name == "hidden_states"
    assert "hidden_states=a1q" in source
    assert parameters(RoutedExperts.forward_modular)[:4] == [
        "self",
        "x",
        "topk_weights",
        "topk_ids",
    ]
    assert "self.quant_method.apply(" in inspect.getsource(RoutedExperts.forward_modular)
    layers = "vllm.model_executor.layers"
    for method in (
        f"{layers}.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod",
        f"{layers}.fused_moe.fused_moe_modular_method.FusedMoEModularMethod",
        f"{layers}.quantization.fp8.Fp8MoEMethod",
        f"{layers}.quantization.auto_awq.AutoAWQMoEMethod",
        f"{layers}.quantization.auto_gptq.AutoGPTQMoEMethod",
        f"{layers}.quantization.moe_wna16.MoeWNA16Method",
    ):
        assert parameters(named(method).apply) == [
            "self",
            "layer",
            "x",
            "topk_weights",
            "topk_ids",
            "shared_experts",
            "shared_experts_input",
        ]
    # Nothing else runs a layer's experts than these two, of the instance.
    ran = inspect.getsource(MoERunner)
    assert ran.count("self.routed_experts.forward_modular(") == 1
    assert ran.count("self.routed_experts.forward_monolithic(") == 1
    assert "quant_method.apply" not in ran


def test_rows_of_an_activation_are_choices_in_order() -> None:
    """What the backends of ROWS_IN_ORDER have in common, read from their sources."""
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe, triton_moe

    for cls in (triton_moe.TritonExperts, triton_moe.TritonWNA16Experts):
        source = inspect.getsource(cls.apply)
        assert source.count("self.activation(") == 1
        assert "activation, intermediate_cache2, intermediate_cache1.view(-1, N)" in source
        assert "workspace13, (num_tokens * top_k_num," in source
    fused = inspect.getsource(triton_moe.TritonExperts.apply)
    assert fused.count("silu_and_mul_per_block_quant(") == 1
    assert "and self.block_shape == [128, 128]" in fused
    marlin = inspect.getsource(marlin_moe.MarlinExperts.apply)
    assert "activation_func=self.activation," in marlin
    assert "            self.activation(\n" in marlin  # with LoRA
    inner = inspect.getsource(marlin_moe._fused_marlin_moe)
    assert inner.count("activation_func(\n") == 1
    assert "_resize_cache(intermediate_cache2, (M * num_topk, N))" in inner


def test_what_a_layer_of_experts_has() -> None:
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
    from vllm.model_executor.layers.fused_moe.prepare_finalize import no_dp_ep
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    assert callable(get_current_vllm_config_or_none)
    held = {*vars(FusedMoEConfig), *FusedMoEConfig.__dataclass_fields__}
    assert held >= {
        "experts_per_token",
        "hidden_dim",
        "intermediate_size",
        "num_experts",
        "num_logical_experts",
        "moe_parallel_config",
        "tp_shard_with_padding",
    }
    parallel = {*vars(FusedMoEParallelConfig), *FusedMoEParallelConfig.__dataclass_fields__}
    assert parallel >= {"tp_size", "tp_rank", "use_ep", "enable_eplb", "is_sequence_parallel"}
    assert "topk_ids, topk_weights" not in inspect.getsource(
        no_dp_ep.MoEPrepareAndFinalizeNoDPEPModular.prepare
    )
    chosen = inspect.getsource(MoERunner._select_forward)
    assert "torch.ops.vllm.moe_forward_shared" in chosen and "current_platform.is_cpu()" in chosen
    assert "self._forward_entry = self._select_forward()" in inspect.getsource(MoERunner.__init__)
    assert hasattr(torch.ops.vllm, "moe_forward") and hasattr(torch.ops.vllm, "moe_forward_shared")


def test_cpu_experts() -> None:
    """One kernel, whose weights are put into its order when they have been loaded, after
    ``_setup_kernel`` has been given them in the model's."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    assert parameters(UnquantizedFusedMoEMethod._setup_kernel) == ["self", "layer", "w13", "w2"]
    loaded = inspect.getsource(UnquantizedFusedMoEMethod.process_weights_after_loading)
    assert loaded.count("self._setup_kernel(") == 2
    setup = inspect.getsource(UnquantizedFusedMoEMethod._setup_kernel)
    assert setup.index("if not is_weight_update") < setup.index("fused_experts.process_weights")
    source = inspect.getsource(CPUUnquantizedExperts.process_weights_after_loading)
    assert 'replace_parameter(\n            layer, "w13_weight"' in source
    supported = {a.value for a in MoEActivation if CPUUnquantizedExperts._supports_activation(a)}
    assert supported == set(cpu_experts.ACTIVATIONS)
    for backend in cpu_experts.BACKENDS[1:]:
        assert "apply" not in vars(named(backend))
        assert "process_weights_after_loading" not in vars(named(backend))


@pytest.mark.parametrize(
    "backend",
    [
        "flashinfer_cutlass_moe.FlashInferExperts",
        "trtllm_bf16_moe.TrtLlmBf16ExpertsModular",
        "trtllm_bf16_moe.TrtLlmBf16ExpertsMonolithic",
        "rocm_aiter_moe.AiterExperts",
        "gpt_oss_triton_kernels_moe.OAITritonExperts",
        "fused_batched_moe.BatchedTritonExperts",
        "marlin_moe.BatchedMarlinExperts",
        "triton_deep_gemm_moe.TritonOrDeepGemmExperts",
        "cpu_moe.CPUExpertsInt8",
    ],
)
def test_other_backends_are_turned_away(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the class, also one that derives from a backend that is steered, with the remedy."""
    cls = named(f"{experts.EXPERTS}.{backend}")
    assert hides_its_activation(cls)
    asked = experts._is_supported_config(lambda *args: (True, None))
    config = SimpleNamespace()
    monkeypatch.setattr(experts, "steers_experts", lambda: False)
    assert asked(cls, config, None, None, None) == (True, None)
    monkeypatch.setattr(experts, "steers_experts", lambda: True)
    supported, reason = asked(cls, config, None, None, None)
    assert not supported and "cna.max_expert_neurons = 0" in reason and "moe-backend" in reason
    assert asked(named(ROWS_IN_ORDER[0]), config, None, None, None) == (True, None)
    assert getattr(config, experts.PASSED_OVER) == (cls.__name__,)
    asked = experts._is_supported_config(lambda *args: (False, "no such device"))
    assert asked(cls, config, None, None, None) == (False, "no such device")
    assert getattr(config, experts.PASSED_OVER) == (cls.__name__,)


def test_fp8_in_blocks_is_left_to_a_backend_that_shows_its_activation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym

    monkeypatch.setattr(experts, "steers_experts", lambda: True)
    asked = experts._is_supported_config(lambda *args: (True, None))
    config = SimpleNamespace()
    assert not asked(named(ROWS_IN_ORDER[0]), config, None, kFp8Dynamic128Sym, None)[0]
    assert asked(named(ROWS_IN_ORDER[2]), config, None, kFp8Dynamic128Sym, None)[0]
    assert getattr(config, experts.PASSED_OVER) == ("TritonExperts",)


class Backend:
    """As an experts instance is called; what it does with its rows is the test's."""

    def __init__(self, rows: int, times: int = 1) -> None:
        self.rows, self.times = rows, times

    def activation(self, activation: Any, output: torch.Tensor, input: torch.Tensor) -> None:
        output.copy_(input)

    def apply(self, *, topk_ids: torch.Tensor) -> None:
        for _ in range(self.times if self.rows else 0):
            x = torch.ones(self.rows, 3)
            self.activation("silu", x.clone(), x)


@pytest.mark.parametrize(
    ("rows", "times", "says"),
    [(0, 1, "did not call its activation"), (5, 1, "has 5 rows"), (4, 2, "has 4 rows for 0")],
)
def test_nothing_runs_unsteered_where_rows_are_not_choices(
    rows: int, times: int, says: str
) -> None:
    backend = Backend(rows, times)
    steered: Any = SimpleNamespace(scale=lambda *args: None, record=lambda *args: None)
    hook_activation(backend, steered)
    with pytest.raises(RuntimeError, match=says):
        backend.apply(topk_ids=torch.zeros(2, 2, dtype=torch.int32))
    backend.rows, backend.times = 4, 1
    backend.apply(topk_ids=torch.zeros(2, 2, dtype=torch.int32))


def test_triton_experts() -> None:
    """vLLM's own ``TritonExperts`` with its kernels, and ours, in Triton's interpreter."""
    printed = run_interpreted(triton_experts.__file__).strip()
    assert printed.endswith("as expected"), printed[-2000:]
