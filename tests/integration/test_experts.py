# SPDX-License-Identifier: Apache-2.0
"""Routed experts, steered in a real engine, against Hugging Face with hooked experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_models
from tests.engine_job import V1, V1_HERE, V2, run_engine
from tests.expert_models import DENSE, MODELS, ExpertArm, ExpertModel, Triple, save, triples
from tests.integration.conftest import FEW_MULTIPLIERS, MULTIPLIERS, SCOPES
from tests.oracles import assert_token_exact

pytestmark = [pytest.mark.engine, pytest.mark.slow]

Circuits = Mapping[str, frozenset[Triple]]

REBUILT = """
def rebuild(worker):
    for module in worker.model_runner.get_model().modules():
        if type(module).__name__ == "RoutedExperts":
            module.quant_method._init_moe_kernel(module)

llm.collective_rpc(rebuild)
"""
"""What vLLM does to each layer when weights are loaded again that it quantizes."""

REFUSALS = """
from contextlib import contextmanager
from unittest.mock import patch
from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutlass_moe import FlashInferExperts
from vllm.model_executor.layers.fused_moe.prepare_finalize import naive_dp_ep
from cna_vllm.serving.seams.experts import _refuse_unsteerable
from cna_vllm.serving.worker.gated_mlp import UnsupportedModelError

def bare(cls):
    return cls.__new__(cls)

def refusals(worker):
    (runner, *_) = [
        m for m in worker.model_runner.get_model().modules() if type(m).__name__ == "MoERunner"
    ]
    layer = runner.routed_experts
    kernel, parallel = layer.quant_method.moe_kernel, layer.moe_config.moe_parallel_config
    all2all = bare(naive_dp_ep.MoEPrepareAndFinalizeNaiveDPEPModular)
    off = "turn it off, or set cna.max_expert_neurons = 0"
    for owner, name, value, says, helps in (
        (parallel, "enable_eplb", True, "load balancing (enable_eplb)", off),
        (parallel, "sp_size", 2, "sequence-parallel experts", off),
        (parallel, "use_ep", True, "expert parallelism on CPUs", off),
        (kernel.impl, "prepare_finalize", all2all, "all-to-all of data and expert", off),
        (
            kernel.impl,
            "fused_experts",
            bare(FlashInferExperts),
            "the backend FlashInferExperts, which hides its activation",
            "--moe-backend triton",
        ),
    ):
        _refuse_unsteerable(0, "experts", runner, layer)
        with patch.object(owner, name, value):
            try:
                _refuse_unsteerable(0, "experts", runner, layer)
            except UnsupportedModelError as error:
                assert str(error).startswith("layer 0: the routed experts experts"), error
                assert says in str(error) and helps in str(error), error
            else:
                raise AssertionError(f"{says}: not refused")

llm.collective_rpc(refusals)
"""
"""Each thing under which experts are refused, put into the engine's own loaded objects."""


@pytest.mark.parametrize("name", MODELS)
def test_steering(name: str, tmp_path: Path) -> None:
    """Every multiplier and scope and two circuits in a batch, with chunks of prompts; in one of
    them again, with the prefix cache warm and all kernels made anew."""
    engine = {"max_num_batched_tokens": 48, "enable_prefix_caching": True, "block_size": 32}
    check(name, tmp_path, V1_HERE, prompts=2, max_tokens=8, again=name == "mixtral", **engine)


def test_steering_v2(tmp_path: Path) -> None:
    """Dense, shared and routed through the GPU model runner, the kernels interpreted."""
    check("deepseek_v3", tmp_path, V2, prompts=2, max_tokens=4, small=True)


def test_steering_on_two_ranks(tmp_path: Path) -> None:
    """Each rank has half of every expert's neurons, and of those of the dense and shared MLPs."""
    check(
        "glm4_moe",
        tmp_path,
        {**V1, "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        prompts=2,
        max_tokens=8,
        tensor_parallel_size=2,
    )


def check(
    name: str,
    folder: Path,
    runner: Mapping[str, str],
    *,
    prompts: int,
    max_tokens: int,
    small: bool = False,
    again: bool = False,
    **options: Any,
) -> None:
    oracle = ExpertModel(save(name, folder / "model"))
    check_oracle(oracle)
    circuits = {c: triples(oracle, 0.2, seed) for seed, c in enumerate(("one", "two"))}
    multipliers = FEW_MULTIPLIERS if small else MULTIPLIERS
    arms = [ExpertArm()]
    arms += [
        ExpertArm(scope=scope, routed=((circuits["one"], m),))
        for m in multipliers
        for scope in SCOPES
    ]
    arms += [ExpertArm(routed=((circuits["one"], 0.5), (circuits["two"], -1.0)))]
    longest = 8 if small else 60
    wanted = [(p, a) for p in tiny_models.prompts(prompts, longest=longest) for a in arms]
    params = {"max_tokens": max_tokens, "ignore_eos": True}
    requests = [{"prompt": p, "params": {**params, **fields(circuits, arm)}} for p, arm in wanted]
    engine = {
        "model": str(folder / "model"),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 32,
        "additional_config": {"cna": {"circuits": files(name, folder, circuits, oracle.fields())}},
        **options,
    }
    generate: dict[str, Any] = {"op": "generate", "requests": requests}
    steps = [generate, {"op": "status"}]
    if again:
        steps += [
            {"op": "run", "code": REBUILT},
            generate,
            {"op": "run", "code": REFUSALS},
            {"op": "run", "code": 'llm.collective_rpc("reload_weights")'},
            {"op": "refused", "requests": requests[1:2]},
        ]
    first, status, *more = run_engine(engine, steps, env=runner)
    runs = [first, *more[1:2]]
    if again:
        # vLLM loads a CPU's experts again in the wrong order, and computes plain tokens with them.
        (refused,) = more[-1]
        assert "do not obey the steering hook" in refused
    routed = [layer for layer, widths in enumerate(oracle.widths()) if len(widths) > 1]
    for rank in status:
        assert sorted(map(int, rank["experts"])) == routed
        assert rank["routed_experts"] == []
    for run in runs:
        verdicts = [
            oracle.check(prompt, tokens, arm)
            for (prompt, arm), output in zip(wanted, run, strict=True)
            for tokens in output["token_ids"]
        ]
        assert_token_exact(verdicts[:: len(arms)], f"{name}, without steering")
        assert_token_exact(verdicts, name)
    texts = {tuple(o["token_ids"][0]) for o in runs[0]}
    assert len(texts) > len(runs[0]) / 2, "the arms must change the text for this to prove much"
    if again:
        assert any(o["cached"] for o in runs[1])


def check_oracle(oracle: ExpertModel) -> None:
    """Hooked experts that scale nothing are the model's own, to float32's rounding."""
    prompt = torch.tensor([tiny_models.prompts(1, longest=20)[0]])
    with torch.inference_mode():
        own = oracle.model(prompt).logits
        with oracle.steered(ExpertArm(), 1):
            hooked = oracle.model(prompt).logits
    assert torch.allclose(own, hooked, atol=1e-4, rtol=1e-4)


def fields(circuits: Circuits, arm: ExpertArm) -> dict[str, Any]:
    if not arm.routed:
        return {}
    names = {circuit: name for name, circuit in circuits.items()}
    return {
        "extra_args": {
            "cna_circuit": [names[circuit] for circuit, _ in arm.routed],
            "cna_multiplier": [m for _, m in arm.routed],
            "cna_scope": arm.scope,
        }
    }


def files(
    name: str, folder: Path, circuits: Circuits, dimensions: Mapping[str, Any]
) -> dict[str, str]:
    """Writes circuit files; a neuron of a dense or shared MLP is of ``shared`` or of no expert."""
    paths = {}
    for circuit, neurons in circuits.items():
        listed = [
            {"layer": layer, "index": index, "delta": 1.0}
            | ({"expert": expert} if expert != DENSE else {"expert": "shared"} if index % 2 else {})
            for layer, expert, index in sorted(neurons)
        ]
        file = folder / f"{circuit}.json"
        origin = {"model": "tiny", "architecture": MODELS[name].model_class}
        head = {"format": "cna-circuit", "version": 2, **origin, **dimensions}
        file.write_text(json.dumps({**head, "neurons": listed}))
        paths[circuit] = str(file)
    return paths
