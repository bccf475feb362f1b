# SPDX-License-Identifier: Apache-2.0
"""Steered text equals the hook oracle's, token for token, however the engine schedules it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from tests import tiny_models
from tests.engine_job import OVERLAPS, V1, V1_HERE, V2, run_engine
from tests.integration.conftest import FEW_MULTIPLIERS, PLAIN, Subject
from tests.oracles import Arm, assert_token_exact

pytestmark = pytest.mark.engine


def steered_rows(wanted, outputs, circuit) -> int:
    """Token rows that must be steered: every computed position from the first steered one on.

    The last output token is never computed as an input.
    """
    total = 0
    for (prompt, arm), output in zip(wanted, outputs, strict=True):
        if any(channels is circuit for channels, _ in arm.circuits):
            computed = len(prompt) + len(output["token_ids"][0]) - 1
            total += computed - arm.first_position(len(prompt))
    return total


def test_full_matrix_in_one_mixed_batch(smollm2: Subject, chats: list[list[int]]) -> None:
    """8 prompts, each plain and in every other of 4 multipliers x 3 scopes and two circuits; 48
    tokens; one batch."""
    plain, *steered = smollm2.matrix()
    requests, wanted = [], []
    for number, prompt in enumerate(chats):
        arms = [plain, *steered[number % 2 :: 2]]
        asked, given = smollm2.requests([prompt], arms, max_tokens=48)
        requests += asked
        wanted += given
    engine = smollm2.config(enable_prefix_caching=False, max_num_seqs=128)
    outputs, status = run_engine(
        engine, [{"op": "generate", "requests": requests}, {"op": "status"}], env=V1
    )
    assert_token_exact(smollm2.verdicts(wanted, outputs), "mixed batch, SmolLM2, V1")
    texts = {tuple(o["token_ids"][0]) for o in outputs}
    assert len(texts) > len(outputs) / 2, "the arms must change the text for this to prove much"
    counted = status[0]["steered_tokens"]
    expected = [steered_rows(wanted, outputs, c) for c in smollm2.circuits.values()]
    assert sorted(counted.values()) == sorted(expected)


NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
IS_ASYNC = "assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling"
SCHEDULES: dict[str, tuple[dict[str, object], str | None]] = {
    "default": ({}, None),
    "chunked-16": ({"max_num_batched_tokens": 16, "enable_prefix_caching": False}, None),
    "preemption": (
        {"num_gpu_blocks_override": 9, "block_size": 32, "max_model_len": 256},
        "vllm:num_preemptions",
    ),
    "async": ({"async_scheduling": True}, None),
    "ngram": ({"speculative_config": NGRAM}, "vllm:spec_decode_num_accepted_tokens"),
}


# vLLM has no asynchronous scheduling on a CPU; the V2 runner, made for GPUs, can be made to.
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "async"])
def test_schedules_v1(tiny: Subject, schedule: str) -> None:
    """The matrix on the V1 runner under every way of scheduling it."""
    check_schedule(tiny, schedule, V1_HERE, tiny_models.prompts(8), tiny.matrix(), max_tokens=32)


# The V2 runner of vLLM 0.32 and 0.33 has no n-gram speculation; drafts are tested below.
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "ngram"])
def test_schedules_v2(tiny: Subject, schedule: str) -> None:
    """The GPU model runner with the real Triton kernel, both through the interpreter."""
    prompts = tiny_models.prompts(3, longest=26)
    check_schedule(tiny, schedule, V2, prompts, tiny.matrix(FEW_MULTIPLIERS), max_tokens=8)


def check_schedule(
    subject: Subject,
    schedule: str,
    runner: Mapping[str, str],
    prompts: list[list[int]],
    arms: Sequence[Arm],
    max_tokens: int,
) -> None:
    options, metric = SCHEDULES[schedule]
    requests, wanted = subject.requests(prompts, arms, max_tokens=max_tokens, ignore_eos=True)
    steps: list[dict[str, object]] = [{"op": "generate", "requests": requests}]
    if metric:
        steps.append({"op": "metric", "name": metric})
    if schedule == "async":
        steps.append({"op": "run", "code": IS_ASYNC})
    engine = subject.config(max_num_seqs=16, disable_log_stats=False, **options)
    outputs, *counts = run_engine(engine, steps, env=runner, setup=OVERLAPS)
    assert_token_exact(subject.verdicts(wanted, outputs), schedule)
    if metric:
        assert counts[0] > 0, f"{metric} is 0: what this test is about did not happen"


@pytest.mark.parametrize("runner", [V1_HERE, V2], ids=["V1", "V2-interpreted"])
def test_draft_model_is_left_alone(
    tiny: Subject, runner: Mapping[str, str], tmp_path: Path
) -> None:
    """Every draft position is steered in the target; the drafter's own MLPs are not hooked."""
    drafter = tiny_models.llama(tmp_path / "drafter", num_hidden_layers=1)
    speculative = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": 2}
    requests, wanted = tiny.requests(
        tiny_models.prompts(2, longest=16),
        tiny.matrix(FEW_MULTIPLIERS),
        max_tokens=6,
        ignore_eos=True,
    )
    engine = tiny.config(speculative_config=speculative, disable_log_stats=False)
    outputs, drafted, status = run_engine(
        engine,
        [
            {"op": "generate", "requests": requests},
            {"op": "metric", "name": "vllm:spec_decode_num_draft_tokens"},
            {"op": "status"},
        ],
        env=runner,
    )
    assert drafted > 0
    assert status[0]["layers"] == list(range(tiny_models.LAYERS))
    assert_token_exact(tiny.verdicts(wanted, outputs), "draft model")


def test_warm_prefix_cache_in_any_order(tiny: Subject) -> None:
    """Three orders of the same arms, each after the others have filled the cache."""
    prompts = tiny_models.prompts(4, longest=120)
    arms = tiny.matrix()
    orders = [arms, arms[::-1], arms[1::2] + arms[::2]]
    steps, wanted = [], []
    for order in orders:
        requests, asked = tiny.requests(prompts, order, max_tokens=12, ignore_eos=True)
        steps.append({"op": "generate", "requests": requests})
        wanted.append(asked)
    results = run_engine(tiny.config(block_size=32, max_num_seqs=4), steps)
    for asked, outputs in zip(wanted, results, strict=True):
        assert_token_exact(tiny.verdicts(asked, outputs), "warm prefix cache")
    assert sum(o["cached"] for o in results[-1]) > 0


def test_several_outputs_of_one_request(tiny: Subject) -> None:
    """n = 2: both outputs are steered, though their requests have other ids."""
    prompts = tiny_models.prompts(4)
    # vLLM refuses n > 1 at temperature 0; sampling from the single best token is greedy too.
    sampling = {"max_tokens": 16, "ignore_eos": True, "n": 2, "temperature": 1.0, "top_k": 1}
    requests, wanted = tiny.requests(prompts, tiny.matrix(), **sampling)
    (outputs,) = run_engine(tiny.config(), [{"op": "generate", "requests": requests}])
    assert all(len(o["token_ids"]) == 2 for o in outputs)
    assert_token_exact(tiny.verdicts(wanted, outputs), "n = 2")


def test_streaming(tiny: Subject) -> None:
    """AsyncLLM, tokens streamed one by one, arms arriving while others run."""
    prompts = tiny_models.prompts(3)
    requests, wanted = tiny.requests(prompts, tiny.matrix(), max_tokens=16, ignore_eos=True)
    (outputs,) = run_engine(tiny.config(), [{"op": "stream", "requests": requests}])
    assert all(o["pieces"] > 1 for o in outputs)
    assert_token_exact(tiny.verdicts(wanted, outputs), "streaming")


def test_tensor_parallel(tiny: Subject) -> None:
    """Two ranks, each with half of the neurons of every layer."""
    prompts = tiny_models.prompts(4)
    requests, wanted = tiny.requests(prompts, tiny.matrix(), max_tokens=24, ignore_eos=True)
    outputs, status = run_engine(
        tiny.config(tensor_parallel_size=2),
        [{"op": "generate", "requests": requests}, {"op": "status"}],
        env={**V1, "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    assert len(status) == 2
    assert_token_exact(tiny.verdicts(wanted, outputs), "tensor parallel 2")


def test_unsteered_rows_are_bit_identical(tiny: Subject) -> None:
    """Plain requests among steered ones: tokens and logprobs to the last bit of stock vLLM's."""
    prompts = tiny_models.prompts(6)
    sampling = {"max_tokens": 16, "ignore_eos": True, "logprobs": 3}
    plain, _ = tiny.requests(prompts, [PLAIN], **sampling)
    mixed, wanted = tiny.requests(prompts, [PLAIN, tiny.arm(("one", 0.0))], **sampling)
    # One request at a time in both, so that both engines run matrices of the same shapes.
    steps = [{"op": "generate", "requests": [r]} for r in plain]
    ours = run_engine(
        tiny.config(enable_prefix_caching=False, max_num_seqs=1),
        [{"op": "generate", "requests": [r]} for r in mixed],
    )
    stock = {**tiny.config(enable_prefix_caching=False, max_num_seqs=1), "additional_config": {}}
    theirs = run_engine(stock, steps, env={**V1_HERE, "VLLM_PLUGINS": ""})
    kept = [o for o, (_, arm) in zip(ours, wanted, strict=True) if arm is PLAIN]
    assert json.dumps(kept) == json.dumps(theirs)


def test_same_prompts_on_two_ranks_are_rank_local(tiny: Subject) -> None:
    """Rank r of T holds neurons [r * I / T, (r + 1) * I / T): no neuron is lost or doubled."""
    from cna_vllm import Circuit
    from cna_vllm.serving.worker.table import CircuitTable

    circuit = Circuit.load(tiny.files["one"])
    half = tiny_models.WIDTH // 2
    tables = [
        CircuitTable(range(tiny_models.LAYERS), rank * half, half, 1, torch.device("cpu"))
        for rank in range(2)
    ]
    for table in tables:
        table.load(circuit.packed())
    for layer, indices in tiny.circuits["one"].items():
        bits = torch.cat([_bits(t.layer_masks(layer)[0], half) for t in tables])
        assert bits.nonzero().squeeze(1).tolist() == list(indices)


def _bits(packed: torch.Tensor, width: int) -> torch.Tensor:
    return ((packed[:, None] >> torch.arange(8)) & 1).reshape(-1)[:width]
