# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with quantized weights and activations: steering acts before the quantization, and
where vLLM makes one kernel of the activation and the quantization, that stays one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny_models
from tests.engine_job import V1_HERE, run_engine
from tests.tiny_models import LAYERS, WIDTH

pytestmark = pytest.mark.engine


# int8 weights with a scale per output channel, int8 activations with a scale per token row.
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
# Layer -> multiplier of all its neurons. Powers of two, so that no rounding differs.
MULTIPLIERS = {1: 4.0, 2: 0.0}


def test_steering_equals_scaled_weights(tmp_path: Path) -> None:
    """A layer whose neurons are all scaled by m is the layer whose ``down_proj`` is scaled by m.

    That holds through the quantization of each token row only if it sees the steered row: its
    scale then is m times what it was, and its integers are the same. The other side is stock
    vLLM without the plugin.
    """
    steered, scaled = quantized(tmp_path / "steered"), quantized(tmp_path / "scaled", MULTIPLIERS)
    circuits = {}
    for layer in MULTIPLIERS:
        file = tmp_path / f"{layer}.json"
        file.write_text(json.dumps(tiny_models.circuit_object({layer: tuple(range(WIDTH))})))
        circuits[f"layer-{layer}"] = str(file)
    fields = {
        "cna_circuit": list(circuits),
        "cna_multiplier": list(MULTIPLIERS.values()),
        "cna_scope": "all",
    }
    prompts = tiny_models.prompts(6)
    params = {"max_tokens": 16, "ignore_eos": True}
    plain = [{"prompt": p, "params": params} for p in prompts]
    ours = [{"prompt": p, "params": {**params, "extra_args": fields}} for p in prompts]
    engine = {
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",  # a CPU with AMX takes no other
        "enforce_eager": True,
        "max_model_len": 128,
    }
    config = {"additional_config": {"cna": {"circuits": circuits}}}
    before, found = run_engine(
        {**engine, **config, "model": str(steered)},
        [{"op": "generate", "requests": plain}, {"op": "generate", "requests": ours}],
        env=V1_HERE,
    )
    (wanted,) = run_engine(
        {**engine, "model": str(scaled)},
        [{"op": "generate", "requests": plain}],
        env={**V1_HERE, "VLLM_PLUGINS": ""},
    )
    texts = [[o["token_ids"] for o in outputs] for outputs in (before, found, wanted)]
    assert texts[1] == texts[2]
    assert texts[0] != texts[2], "the multipliers must change the text for this to prove anything"


# FP8 weights with a scale per tensor, FP8 activations with a given scale: those that vLLM quantizes
# in its fused activation.
FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "symmetric": True,
                "strategy": "tensor",
                "dynamic": False,
            },
        }
    },
}

# What vLLM has for GPUs only, in plain torch with the same roundings: the fused activation and
# quantization, and the quantization of weights at load. The linear is vLLM's own on a CPU, in the
# form that takes FP8 activations, which one with AMX would not choose. All else is vLLM's as it is.
STAND_INS = """
import logging
import torch
import vllm._C

torch.ops._C.said = []


def hear(record):  # a filter: vLLM takes handlers away when it sets up logging anew
    torch.ops._C.said.append(record.getMessage())
    return True


logging.getLogger("vllm.cna").addFilter(hear)

torch.cpu._is_amx_tile_supported = lambda: False
torch.ops._C.calls = []
library = torch.library.Library("_C", "FRAGMENT")
library.define("silu_and_mul_quant(Tensor! result, Tensor input, Tensor scale) -> ()")


def quantize(out, x, scale, shape=None):
    out.copy_((x.float() * (1 / scale)).clamp(-448, 448))


def silu_and_mul_quant(result, input, scale):
    torch.ops._C.calls.append(len(input))
    gate, up = input.chunk(2, -1)
    quantize(result, torch.nn.functional.silu(gate) * up, scale)


library.impl("silu_and_mul_quant", silu_and_mul_quant, "CPU")
quantize.default = torch.ops._C.static_scaled_fp8_quant.default
torch.ops._C.static_scaled_fp8_quant = quantize
"""

SAID = """
import torch
(line,) = [line for line in torch.ops._C.said if "quantization" in line]
assert line.startswith("Activation and quantization are two kernels in 4 layers (model."), line
"""
COUNT = "import torch; torch.ops._C.calls.clear()"
# One call a layer in each of 8 passes, and none of rows that nobody asked for.
COUNTED = """
import torch
rows = torch.ops._C.calls
assert len(rows) == 4 * 8, rows
assert not [line for line in torch.ops._C.said if "quantization" in line]
"""

# In the loaded model: the producer's rows beside those of the unfused op, quantized by the linear's
# own quantizer, and beside those of the producer of vLLM's own activation.
ROWS = """
def rows(worker):
    import torch
    from cna_kernels import act_and_mul_scaled
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fusion.fused_act_quant import maybe_fused_act_quant
    from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation

    mlp = worker.model_runner.get_model().model.layers[1].mlp
    hook, down = mlp.act_fn, mlp.down_proj
    routing = hook.row_slot[:6], hook.slot_circuits[:2, 0], hook.slot_multipliers[:2, 0]
    before = [tensor.clone() for tensor in routing]
    try:
        for multipliers in ((0.0, 0.37), (2.0, -1.0), (1.0, 1.5)):
            for tensor, values in zip(routing, ((-1, 0, 1, -1, 0, 1), (0, 0), multipliers)):
                tensor.copy_(torch.tensor(values))
            x, _ = mlp.gate_up_proj(torch.randn(6, 64, dtype=torch.bfloat16))
            operands = hook.row_slot, hook.slot_circuits, hook.slot_multipliers, hook.masks
            unfused = act_and_mul_scaled(x, *operands, "silu")
            wanted, _ = down.scheme.fp8_linear.quant_fp8(unfused, down.input_scale)
            stock = maybe_fused_act_quant(SiluAndMul(), x, down)
            found = maybe_fused_act_quant(hook, x, down)
            assert type(found) is type(stock) is QuantizedActivation
            ours, own, wanted = (t.view(torch.uint8)[:6] for t in (found.data, stock.data, wanted))
            assert torch.equal(ours, wanted)
            changed = (ours != own).any(1).tolist()
            first, second = (m != 1 for m in multipliers)
            assert changed == [False, first, second, False, first, second], changed
    finally:
        for tensor, values in zip(routing, before):
            tensor.copy_(values)


from vllm.config import set_current_vllm_config
with set_current_vllm_config(llm.llm_engine.vllm_config):
    llm.collective_rpc(rows)
"""

# vLLM's own pass over a graph in which steering goes before activation and quantization, as in the
# models that do not ask for a producer. It is for GPUs: here its module lacks operations, which
# nothing calls.
PATTERN = """
import torch

library = torch.library.Library("_C", "FRAGMENT")
for kind in ("static_fp8", "dynamic_per_token"):
    for name in (f"rms_norm_{kind}_quant", f"fused_add_rms_norm_{kind}_quant"):
        if not hasattr(torch.ops._C, name):
            library.define(f"{name}(Tensor! result, Tensor input) -> ()")
torch.library.register_fake("_C::silu_and_mul_quant", lambda *_: None, lib=library)


def pattern(worker):
    from cna_kernels import steer_gate_up
    from torch._functorch.aot_autograd import aot_function
    from torch._inductor.decomposition import select_decomp_table
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    config = VllmConfig(compilation_config=CompilationConfig(mode=3, custom_ops=["none"]))
    with set_current_vllm_config(config):
        from vllm.compilation.passes.fusion.act_quant_fusion import ActivationQuantFusionPass

        fusion = ActivationQuantFusionPass(config)
        quantizer = QuantFP8(True, GroupShape.PER_TENSOR, compile_native=False)

    def mlp(hidden, weight, scale, *tables):
        x = hidden @ weight
        steer_gate_up(x, *tables, "silu")
        return quantizer.forward_native(SiluAndMul.forward_native(x), scale)[0]

    def compiler(module, _):
        fusion(module.graph)
        module.recompile()
        return module

    arguments = (
        torch.randn(2, 4),
        torch.randn(4, 16),
        torch.full((1, 1), 0.03),
        torch.tensor([-1, 0], dtype=torch.int32),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.tensor([[0.37]]),
        torch.tensor([[0b10111]], dtype=torch.uint8),
    )
    with torch.inference_mode():
        wanted = mlp(*arguments)
        torch.ops._C.calls.clear()
        found = aot_function(mlp, compiler, decompositions=select_decomp_table())(*arguments)
    assert fusion.matched_count == 1 and torch.ops._C.calls == [2]
    assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


llm.collective_rpc(pattern)
"""


def test_fused_quantization_stays_fused(tmp_path: Path) -> None:
    """An FP8 Llama goes through vLLM's fused producer in every layer of every pass. Requests that
    are not steered get what vLLM alone answers them in the same batch, and steered ones what the
    unfused op gives, which an engine that records has; both to the last bit."""
    checkpoint, file = fp8(tmp_path / "fp8"), tmp_path / "circuit.json"
    circuit = tiny_models.channels(LAYERS, WIDTH, 40, seed=1)
    file.write_text(json.dumps(tiny_models.circuit_object(circuit)))
    params = {"max_tokens": 8, "ignore_eos": True, "logprobs": 1}
    arms = [None, 0.37, None, 0.0, None, -1.0, 1.5, None]
    prompts = tiny_models.prompts(len(arms))
    mixed: list[dict[str, Any]] = []
    for prompt, arm in zip(prompts, arms, strict=True):
        fields = {} if arm is None else {"extra_args": {"cna_circuit": "c", "cna_multiplier": arm}}
        mixed.append({"prompt": prompt, "params": {**params, **fields}})
    plain = [{"prompt": prompt, "params": params} for prompt in prompts]
    engine = {
        "model": str(checkpoint),
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 128,
    }

    def steering(**more: bool) -> dict[str, Any]:
        cna = {"circuits": {"c": str(file)}, **more}
        return {**engine, "additional_config": {"cna": cna}}

    count = [{"op": "run", "code": COUNT}]
    counted = [{"op": "run", "code": COUNTED}]
    generate = [{"op": "generate", "requests": mixed}]
    status = [{"op": "status"}]
    _, fused, _, (told,), *_ = run_engine(
        steering(),
        [
            *count,
            *generate,
            *counted,
            *status,
            {"op": "run", "code": ROWS},
            {"op": "run", "code": PATTERN},
        ],
        env=V1_HERE,
        setup=STAND_INS,
    )
    unfused, (recording,), _ = run_engine(
        steering(record=True),
        [*generate, *status, {"op": "run", "code": SAID}],
        env=V1_HERE,
        setup=STAND_INS,
    )
    _, stock, _ = run_engine(
        engine,
        [*count, {"op": "generate", "requests": plain}, *counted],
        env={**V1_HERE, "VLLM_PLUGINS": ""},
        setup=STAND_INS,
    )
    assert told["quantization"] == f"fused with the activation as in vLLM alone, in {LAYERS} layers"
    assert "this engine records" in recording["quantization"]
    assert fused == unfused
    for arm, ours, own in zip(arms, fused, stock, strict=True):
        assert (ours == own) == (arm is None)


def fp8(folder: Path) -> Path:
    """The tiny Llama in FP8; returns ``folder``."""
    tiny_models.llama(folder)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            weights[name] = tensor
            continue
        scale = tensor.abs().amax() / 448
        weights[name] = (tensor / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale"] = scale.reshape(1)
        weights[f"{name.removesuffix('weight')}input_scale"] = torch.tensor([0.02])
    _save(folder, weights, FP8)
    return folder


def quantized(folder: Path, multipliers: dict[int, float] | None = None) -> Path:
    """The tiny Llama in int8, its ``down_proj`` scaled by ``multipliers``; returns ``folder``."""
    tiny_models.llama(folder)
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            weights[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 127
        weights[name] = (tensor / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    for layer, multiplier in (multipliers or {}).items():
        weights[f"model.layers.{layer}.mlp.down_proj.weight_scale"] *= multiplier
    _save(folder, weights, W8A8)
    return folder


def _save(folder: Path, weights: Mapping[str, torch.Tensor], quantization: Any) -> None:
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    config = folder / "config.json"
    whole = {**json.loads(config.read_text()), "quantization_config": quantization}
    config.write_text(json.dumps(whole))
    assert len(weights) > LAYERS
